//! What the tests run on: a real Apache Kafka, topics and a group for each test, the daemon as a process.

#![allow(dead_code)] // Each test binary uses only part of it.

pub mod decode;
pub mod gate;
pub mod kafka;
pub mod ledger;
pub mod models;
pub mod prometheus;
pub mod registry;
pub mod secure;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::message::{Header, Headers, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

use kafka::Kafka;

/// The setting `delivery` under each guarantee.
pub const GUARANTEES: [&str; 2] =
    ["{ commit_interval: 100ms }", "{ guarantee: exactly_once, commit_interval: 100ms }"];

/// How long a test waits for a condition before it fails. Long, because machines are slow at times.
pub const TIMEOUT: Duration = Duration::from_secs(90);

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A program that scripts/tools.sh has fetched, or the one on the PATH.
pub fn tool(name: &str) -> PathBuf {
    let own = root().join(".cache/tools").join(name);
    if own.exists() { own } else { PathBuf::from(name) }
}

/// The whole HTTP response to a GET; `None` if there is none.
pub fn http(address: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: test\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// Waits until `check` returns something; after `TIMEOUT`, panics and names `what`.
#[track_caller]
pub fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(started.elapsed() < TIMEOUT, "waited {TIMEOUT:?} for {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Bootstrap servers: a broker of this test process, or those that KANDLE_TEST_BROKERS names.
pub fn brokers() -> &'static str {
    static BROKERS: OnceLock<String> = OnceLock::new();
    BROKERS.get_or_init(|| match std::env::var("KANDLE_TEST_BROKERS") {
        Ok(brokers) => brokers,
        Err(_) => Kafka::start_for_process(),
    })
}

/// A name that no other test has, in this run or an earlier one.
pub fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let millis =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_millis();
    format!("{name}-{}-{millis}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Settings of a job without a model, for tests about topics and offsets.
pub const NOOP: [(&str, &str); 4] = [
    ("task", "{ kind: noop }"),
    ("model", ""),
    ("output", "{ topic: $OUTPUT }"),
    ("input", "{ topics: [$INPUT], group: $GROUP, field: /text, properties: { session.timeout.ms: 6000 } }"),
];

/// Topics and a group of one test.
pub struct Place {
    pub brokers: String,
    pub input: String,
    pub output: String,
    pub dead: String,
    pub group: String,
}

impl Place {
    pub fn new(name: &str, partitions: i32) -> Self {
        Self::on(brokers(), name, partitions)
    }

    /// Topics on another Kafka than the tests' own.
    pub fn on(brokers: &str, name: &str, partitions: i32) -> Self {
        let name = unique(name);
        let place = Self {
            brokers: brokers.to_owned(),
            input: format!("{name}-in"),
            output: format!("{name}-out"),
            dead: format!("{name}-dead"),
            group: format!("{name}-group"),
        };
        place.create(&place.input, partitions, &[]);
        place.create(&place.output, partitions, &[]);
        place.create(&place.dead, 1, &[]);
        place
    }

    /// Sends a request with an admin client.
    pub fn administer<T>(
        &self,
        ask: impl AsyncFnOnce(&AdminClient<DefaultClientContext>, &AdminOptions) -> T,
    ) -> T {
        let admin: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", &self.brokers).create().expect("a client");
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(ask(&admin, &AdminOptions::new()))
    }

    pub fn delete(&self, topic: &str) {
        let gone = self.administer(async |admin, options| {
            admin.delete_topics(&[topic], options).await.expect("an answer")
        });
        gone.into_iter().for_each(|result| drop(result.expect("deleted")));
    }

    /// Deletes a topic and creates another one with its name.
    pub fn recreate(&self, topic: &str, partitions: i32) {
        self.delete(topic);
        until("the topic to be deleted", || self.try_create(topic, partitions, &[]).then_some(()));
    }

    pub fn create(&self, topic: &str, partitions: i32, config: &[(&str, &str)]) {
        assert!(self.try_create(topic, partitions, config), "{topic} exists already");
        // The broker may not know a topic yet that was just created.
        let client: BaseConsumer =
            ClientConfig::new().set("bootstrap.servers", &self.brokers).create().expect("a client");
        known_partitions(&client, topic, partitions as usize);
    }

    /// False if the topic exists, perhaps because it is still being deleted.
    pub fn try_create(&self, topic: &str, partitions: i32, config: &[(&str, &str)]) -> bool {
        let mut topic_ = NewTopic::new(topic, partitions, TopicReplication::Fixed(-1));
        for (key, value) in config {
            topic_ = topic_.set(key, value);
        }
        let made = self.administer(async |admin, options| {
            admin.create_topics([&topic_], options).await.expect("an answer")
        });
        made.into_iter().all(|result| match result {
            Ok(_) => true,
            Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => false,
            Err(error) => panic!("{error:?}"),
        })
    }

    /// Resets all properties of a topic to the broker's defaults.
    pub fn configure_anew(&self, topic: &str) {
        self.alter(&AlterConfig::new(ResourceSpecifier::Topic(topic)));
    }

    /// Sets one property of a topic, and resets all others to the broker's defaults.
    pub fn configure(&self, topic: &str, name: &str, value: &str) {
        self.alter(&AlterConfig::new(ResourceSpecifier::Topic(topic)).set(name, value));
    }

    fn alter(&self, changes: &AlterConfig<'_>) {
        let changed = self.administer(async |admin, options| {
            admin.alter_configs([changes], options).await.expect("an answer")
        });
        changed.into_iter().for_each(|result| drop(result.expect("changed")));
    }

    /// The settings of a daemon on these topics, as YAML; `more` replaces or adds sections.
    pub fn config(&self, more: &[(&str, &str)]) -> String {
        let mut sections: Vec<(&str, String)> = vec![
            ("kafka", format!("{{ brokers: \"{}\" }}", self.brokers)),
            (
                "input",
                format!("{{ topics: [{}], group: {}, format: json, field: /text }}", self.input, self.group),
            ),
            ("task", "{ kind: text-classification }".to_owned()),
            ("model", "{ source: bundled }".to_owned()),
            ("output", format!("{{ topic: {}, include: [/id] }}", self.output)),
            ("dead_letters", format!("{{ topic: {} }}", self.dead)),
            ("server", "{ listen: \"127.0.0.1:0\" }".to_owned()),
            ("window", "{ max_wait: 50ms }".to_owned()),
        ];
        for (name, value) in more {
            let value = value
                .replace("$INPUT", &self.input)
                .replace("$OUTPUT", &self.output)
                .replace("$DEAD", &self.dead)
                .replace("$GROUP", &self.group);
            sections.retain(|(known, _)| known != name);
            sections.push((name, value));
        }
        sections
            .into_iter()
            .filter(|(_, v)| !v.is_empty())
            .map(|(name, value)| format!("{name}: {value}\n"))
            .collect()
    }

    pub fn producer(&self) -> BaseProducer {
        self.producer_with(Duration::from_millis(20))
    }

    fn producer_with(&self, linger: Duration) -> BaseProducer {
        ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("message.max.bytes", "50000000")
            .set("linger.ms", linger.as_millis().to_string())
            .create()
            .expect("a producer")
    }

    /// Produces records to the input topic and waits until all are acknowledged. As many as fit are in one batch.
    pub fn produce(&self, records: impl IntoIterator<Item = Sent>) {
        // Until the flush below: with a short linger, a busy machine sends the first record alone.
        let producer = self.producer_with(Duration::from_secs(5));
        for record in records {
            loop {
                let mut headers = OwnedHeaders::new();
                for (key, value) in &record.headers {
                    headers = headers.insert(Header { key, value: Some(value) });
                }
                let message = BaseRecord::<[u8], [u8]> {
                    topic: &self.input,
                    partition: Some(record.partition),
                    payload: record.value.as_deref(),
                    key: record.key.as_deref(),
                    timestamp: record.timestamp,
                    headers: Some(headers),
                    delivery_opaque: (),
                };
                match producer.send(message) {
                    Ok(()) => break,
                    Err(_) => producer.poll(Duration::from_millis(20)),
                }
            }
        }
        producer.flush(TIMEOUT).expect("all acknowledged");
    }

    /// Reads a topic from its beginning (read_committed, librdkafka's default) until `enough` is true.
    pub fn read(&self, topic: &str, what: &str, mut enough: impl FnMut(&[Got]) -> bool) -> Vec<Got> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", unique("reader"))
            .set("enable.auto.commit", "false")
            .set("fetch.message.max.bytes", "20000000")
            .create()
            .expect("a consumer");
        from_the_beginning(&consumer, &[topic]);
        let mut got = Vec::new();
        let started = Instant::now();
        while !enough(&got) {
            assert!(
                started.elapsed() < TIMEOUT,
                "waited {TIMEOUT:?} for {what}; {} records are there",
                got.len()
            );
            let mut wait = Duration::from_millis(100);
            while let Some(message) = consumer.poll(wait) {
                got.push(Got::from(&message.expect("a message")));
                wait = Duration::ZERO;
            }
        }
        got
    }

    pub fn predictions(&self, count: usize) -> Vec<Got> {
        self.read(&self.output, &format!("{count} predictions"), |got| got.len() >= count)
    }

    pub fn dead_letters(&self, count: usize) -> Vec<Got> {
        self.read(&self.dead, &format!("{count} dead letters"), |got| got.len() >= count)
    }

    /// A client with the group's id that does not join the group.
    fn group_client(&self) -> BaseConsumer {
        ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", &self.group)
            .create()
            .expect("a consumer")
    }

    /// Commits an offset for the group, which must have no members.
    pub fn commit(&self, partition: i32, offset: i64, metadata: &str) {
        let mut list = TopicPartitionList::new();
        let mut element = list.add_partition(&self.input, partition);
        element.set_offset(Offset::Offset(offset)).expect("an offset");
        element.set_metadata(metadata);
        let consumer = self.group_client();
        until("the group's offset", || consumer.commit(&list, CommitMode::Sync).ok());
    }

    /// The offset and metadata that the group has committed for a partition.
    pub fn committed(&self, partition: i32) -> Option<(i64, String)> {
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.input, partition);
        let offsets = self.group_client().committed_offsets(list, Duration::from_secs(10)).ok()?;
        let elements = offsets.elements();
        let offset = elements[0].offset().to_raw().filter(|&o| o >= 0)?;
        Some((offset, elements[0].metadata().to_owned()))
    }
}

/// The number of a topic's partitions, once the broker knows `least` of them: the topic may have been created just before.
fn known_partitions(client: &BaseConsumer, topic: &str, least: usize) -> usize {
    until("the topic", || {
        let metadata = client.fetch_metadata(Some(topic), Duration::from_secs(5)).ok()?;
        metadata.topics().first().map(|topic| topic.partitions().len()).filter(|&count| count >= least)
    })
}

/// Assigns all partitions of the topics, from their beginnings. Waits for the metadata first: a broker
/// may not know a topic yet that was just created.
fn from_the_beginning(consumer: &BaseConsumer, topics: &[&str]) {
    let mut list = TopicPartitionList::new();
    for topic in topics {
        let count = known_partitions(consumer, topic, 1);
        for partition in 0..count as i32 {
            list.add_partition_offset(topic, partition, Offset::Beginning).expect("an offset");
        }
    }
    consumer.assign(&list).expect("assigned");
}

/// Random letters and digits, which compress to three quarters at best.
pub fn noise(bytes: usize) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut state = bytes as u64 + 1;
    let mut next = || {
        // Knuth's linear congruential generator (MMIX).
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        DIGITS[(state >> 58) as usize]
    };
    (0..bytes).map(|_| next()).collect()
}

/// A record to produce.
#[derive(Debug, Clone, Default)]
pub struct Sent {
    pub partition: i32,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub timestamp: Option<i64>,
    pub headers: Vec<(String, String)>,
}

impl Sent {
    pub fn new(partition: i32, value: impl Into<Vec<u8>>) -> Self {
        Self { partition, value: Some(value.into()), ..Self::default() }
    }

    /// `{"id":…,"text":…}`.
    pub fn ticket(partition: i32, id: usize, text: &str) -> Self {
        Self::new(partition, serde_json::json!({ "id": id, "text": text }).to_string())
    }
}

/// A record that was read.
#[derive(Debug, Clone)]
pub struct Got {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub timestamp: Option<i64>,
    pub headers: Vec<(String, String)>,
}

impl From<&rdkafka::message::BorrowedMessage<'_>> for Got {
    fn from(message: &rdkafka::message::BorrowedMessage<'_>) -> Self {
        Self {
            partition: message.partition(),
            offset: message.offset(),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            timestamp: message.timestamp().to_millis(),
            headers: message
                .headers()
                .map(|headers| {
                    headers
                        .iter()
                        .map(|h| {
                            (
                                h.key.to_owned(),
                                String::from_utf8_lossy(h.value.unwrap_or_default()).into_owned(),
                            )
                        })
                        .collect()
                })
                .unwrap_or_default(),
        }
    }
}

impl Got {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(self.value.as_deref().expect("a value")).expect("JSON")
    }

    /// The last header of this name, like Kafka's `lastHeader`.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// A dead letter's error and what its message says.
    pub fn error(&self) -> (&str, &str) {
        let header = |name| self.header(name).unwrap_or_else(|| panic!("no {name}"));
        (header("kandle-error"), header("kandle-error-message"))
    }

    /// Topic of `kandle-source`.
    pub fn source_topic(&self) -> &str {
        self.header("kandle-source").and_then(|source| source.split('/').next()).expect("kandle-source")
    }

    /// Partition and offset of `kandle-source`.
    pub fn source(&self) -> (i32, i64) {
        let source = self.header("kandle-source").expect("kandle-source");
        let mut parts = source.rsplit('/');
        let offset = parts.next().and_then(|p| p.parse().ok()).expect("an offset");
        (parts.next().and_then(|p| p.parse().ok()).expect("a partition"), offset)
    }
}

/// The first occurrence of each position, per partition, must come in order.
pub fn assert_order(got: &[Got]) {
    let mut seen: HashMap<i32, (i32, i64)> = HashMap::new();
    let mut known = std::collections::HashSet::new();
    for record in got {
        let (partition, offset) = record.source();
        if !known.insert((partition, offset)) {
            continue;
        }
        let last = seen.entry(partition).or_insert((record.partition, -1));
        if last.0 == record.partition {
            assert!(offset > last.1, "{partition}/{offset} came after {partition}/{}", last.1);
            last.1 = offset;
        }
    }
}

/// A model whose tokenizer has a token, "poison", without a row in the embedding table: a forward over it fails.
pub fn poisoned_model() -> tempfile::TempDir {
    let model = tempfile::tempdir().expect("a directory");
    let fixture = root().join("tests/fixtures/bert");
    for name in ["config.json", "model.safetensors", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(name), model.path().join(name)).expect("copied");
    }
    let tokenizer = std::fs::read(fixture.join("tokenizer.json")).expect("read");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&tokenizer).expect("JSON");
    tokenizer["added_tokens"].as_array_mut().expect("a list").push(serde_json::json!({
        "id": 5000, "content": "poison", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true
    }));
    std::fs::write(model.path().join("tokenizer.json"), tokenizer.to_string()).expect("written");
    model
}

/// The kandle binary of this build.
pub fn kandle() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kandle"));
    // Only the settings that a test makes itself.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("KANDLE__")) {
        command.env_remove(name);
    }
    command
}

/// Runs a command to its end; returns exit code, standard output, standard error.
pub fn finish(command: &mut Command, input: &[u8]) -> (i32, String, String) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kandle starts");
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_vec();
    // On a thread of its own: full pipes would block both sides.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let pid = child.id().to_string();
    let (done, over) = std::sync::mpsc::channel::<()>();
    // A process that does not end is killed, and the test fails with its output.
    let watch = std::thread::spawn(move || {
        if over.recv_timeout(3 * TIMEOUT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = Command::new("kill").args(["-9", &pid]).status();
        }
    });
    let output = child.wait_with_output().expect("kandle ends");
    drop(done);
    let _ = watch.join();
    let _ = writer.join();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// A temporary file, deleted when this is dropped.
pub struct File {
    _directory: tempfile::TempDir,
    pub path: PathBuf,
}

pub fn file(name: &str, content: &str) -> File {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join(name);
    std::fs::write(&path, content).expect("written");
    File { _directory: directory, path }
}

/// `kandle run` as a process, with its log.
pub struct Daemon {
    child: Child,
    log: Arc<Mutex<String>>,
    /// Thread that reads the log; `None` once the process has ended.
    log_reader: Option<JoinHandle<()>>,
    _config: File,
}

impl Daemon {
    pub fn start(config: &str) -> Self {
        Self::start_with(config, |_| {})
    }

    pub fn start_with(config: &str, more: impl FnOnce(&mut Command)) -> Self {
        Self::spawn("run", config, more)
    }

    /// Starts another command that reads a configuration and consumes, such as `drain`.
    pub fn spawn(subcommand: &str, config: &str, more: impl FnOnce(&mut Command)) -> Self {
        let config = file("kandle.yaml", config);
        let mut command = kandle();
        command
            .args([subcommand, "-c"])
            .arg(&config.path)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .stdin(Stdio::null());
        more(&mut command);
        let mut child = command.spawn().expect("kandle starts");
        let log = Arc::new(Mutex::new(String::new()));
        let (kept, stderr) = (Arc::clone(&log), child.stderr.take().expect("piped"));
        let log_reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = kept.lock().expect("the log");
                log.push_str(&line);
                log.push('\n');
            }
        });
        Self { child, log, log_reader: Some(log_reader), _config: config }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        self.log.lock().expect("the log").clone()
    }

    /// Waits for a line in the log that contains `text`.
    #[track_caller]
    pub fn wait_log(&mut self, text: &str) -> String {
        let started = Instant::now();
        loop {
            // Checked before the log, which is complete if the process has ended.
            let ended = self.ended();
            if let Some(line) = self.log().lines().find(|line| line.contains(text)) {
                return line.to_owned();
            }
            assert!(
                ended.is_none() && started.elapsed() < TIMEOUT,
                "{text:?} is not in the log ({ended:?}):\n{}",
                self.log()
            );
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    pub fn address(&mut self) -> String {
        let line = self.wait_log("admin server listens");
        // A log of JSON lines.
        if let Ok(line) = serde_json::from_str::<serde_json::Value>(&line) {
            return line["address"].as_str().expect("an address").to_owned();
        }
        line.rsplit("address=").next().expect("an address").trim().to_owned()
    }

    /// Status and body of a GET.
    pub fn get(&mut self, path: &str) -> (u16, String) {
        self.get_as(path, "*/*")
    }

    pub fn get_as(&mut self, path: &str, accept: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address()).expect("the admin server answers");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nAccept: {accept}\r\nConnection: close\r\n\r\n")
            .expect("asked");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
        (status, body.to_owned())
    }

    pub fn signal(&self, name: &str) {
        let status =
            Command::new("kill").args([&format!("-{name}"), &self.pid().to_string()]).status().expect("kill");
        assert!(status.success(), "kill -{name}");
    }

    /// Waits for the process to end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(
                started.elapsed() < TIMEOUT,
                "kandle does not end:\n{}",
                self.log.lock().expect("the log")
            );
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// Sends SIGTERM; the exit code must be 0.
    #[track_caller]
    pub fn stop(&mut self) {
        self.signal("TERM");
        let status = self.wait();
        assert!(status.success(), "{status}:\n{}", self.log());
    }

    /// Sends SIGKILL and waits for the process to end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.ended();
    }

    /// The exit status if the process has ended; its log is complete then.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().expect("a status")?;
        if let Some(reader) = self.log_reader.take() {
            reader.join().expect("the log was read");
        }
        Some(status)
    }

    /// Resident memory in KiB; 0 once the process has ended.
    pub fn rss_kib(&self) -> u64 {
        self.memory_kib("VmRSS:")
    }

    /// Resident memory in KiB without the pages of files, such as the program, which is large because it is not optimized;
    /// 0 once the process has ended.
    pub fn anonymous_kib(&self) -> u64 {
        self.memory_kib("RssAnon:")
    }

    fn memory_kib(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
    }
}

impl Drop for Daemon {
    /// Kills the process; a failed test prints its log.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of kandle, process {}:\n{}", self.pid(), self.log.lock().expect("the log"));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
