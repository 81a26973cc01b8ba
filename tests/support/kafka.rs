//! A real Kafka, of one broker or several, that a test may break.

use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};

use super::{root, until};

pub struct Kafka {
    pub brokers: String,
    nodes: Vec<Node>,
    directory: tempfile::TempDir,
    voters: String,
    options: Options,
}

#[derive(Clone, Default)]
pub struct Options {
    /// Topics are created on first use, which is the broker's default.
    pub creates_topics: bool,
    /// Files are removed when a broker ends, so that it cannot be restarted.
    pub removes_files: bool,
    /// More lines of server.properties, which win over kafka.sh's.
    pub properties: String,
    /// Arguments of Kafka's StorageTool, one per line.
    pub format_arguments: String,
    pub java_options: String,
}

struct Node {
    port: u16,
    running: Option<Running>,
}

struct Running {
    script: Child,
    /// The script's standard input: the broker ends when it closes.
    _input: ChildStdin,
}

fn script() -> PathBuf {
    root().join("tests/support/kafka.sh")
}

/// Partitions of `__consumer_offsets` (kafka.sh).
const OFFSETS_PARTITIONS: i32 = 4;

impl Kafka {
    /// Starts a cluster. With three brokers, the replication factor is 3 and min.insync.replicas 2.
    pub fn start(count: usize) -> Self {
        Self::start_with(count, None)
    }

    /// `file_kib`: the largest size of a broker's files, until it is restarted.
    pub fn start_with(count: usize, file_kib: Option<u32>) -> Self {
        Self::new(count, file_kib, Options::default())
    }

    pub fn start_creating_topics() -> Self {
        Self::new(1, None, Options { creates_topics: true, ..Options::default() })
    }

    /// Starts a broker that lives as long as this process; returns its address.
    pub fn start_for_process() -> String {
        Self::start_for_process_with(|_| Options::default())
    }

    /// Like [`Self::start_for_process`]. `options` gets the broker's port; the port after it is the controller's.
    pub fn start_for_process_with(options: impl FnOnce(u16) -> Options) -> String {
        let port = free_ports();
        let options = Options { removes_files: true, ..options(port) };
        let kafka = Self::on_ports(vec![port], None, options);
        let brokers = kafka.brokers.clone();
        // The broker ends when its standard input closes, with this process. No destructor runs then: the script
        // removes the files.
        std::mem::forget(kafka);
        brokers
    }

    fn new(count: usize, file_kib: Option<u32>, options: Options) -> Self {
        Self::on_ports((0..count).map(|_| free_ports()).collect(), file_kib, options)
    }

    fn on_ports(ports: Vec<u16>, file_kib: Option<u32>, options: Options) -> Self {
        let count = ports.len();
        let fetched = Command::new(script()).arg("fetch").status().expect("kafka.sh runs");
        assert!(fetched.success(), "kafka.sh fetch failed");
        let voters: Vec<String> =
            ports.iter().enumerate().map(|(i, port)| format!("{}@127.0.0.1:{}", i + 1, port + 1)).collect();
        let brokers: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let mut kafka = Self {
            brokers: brokers.join(","),
            nodes: ports.into_iter().map(|port| Node { port, running: None }).collect(),
            directory: tempfile::tempdir().expect("a directory"),
            voters: voters.join(","),
            options,
        };
        for node in 0..count {
            kafka.run(node, file_kib);
        }
        kafka.wait_for(count);
        kafka
    }

    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    fn data(&self, node: usize) -> PathBuf {
        self.directory.path().join((node + 1).to_string())
    }

    /// The file of a partition's first segment.
    pub fn segment(&self, node: usize, topic: &str, partition: i32) -> PathBuf {
        let name = format!("{topic}-{partition}");
        let find = |directory: PathBuf| {
            let file = directory.join(&name).join("00000000000000000000.log");
            file.exists().then_some(file)
        };
        let data = self.data(node);
        let below = std::fs::read_dir(&data).expect("the broker's files").flatten().map(|entry| entry.path());
        std::iter::once(data.clone()).chain(below).find_map(find).expect("the partition's file")
    }

    /// Starts a broker again that has ended.
    pub fn restart(&mut self, node: usize) {
        self.run(node, None);
    }

    /// Waits for a broker to end by itself.
    pub fn wait_for_end(&mut self, node: usize) {
        let mut running = self.nodes[node].running.take().expect("it runs");
        until("the broker's end", || running.script.try_wait().expect("a status"));
    }

    fn run(&mut self, node: usize, file_kib: Option<u32>) {
        assert!(self.nodes[node].running.is_none(), "broker {node} runs");
        let port = self.nodes[node].port.to_string();
        let _ = std::fs::remove_file(self.data(node).join("pid"));
        let mut script = Command::new(script())
            .args(["run", &self.data(node).display().to_string(), &port])
            .env("NODE", (node + 1).to_string())
            .env("VOTERS", &self.voters)
            .env("REPLICAS", self.nodes.len().to_string())
            .env("CREATE_TOPICS", self.options.creates_topics.to_string())
            .env("REMOVE", self.options.removes_files.to_string())
            .env("PROPERTIES", &self.options.properties)
            .env("FORMAT_ARGUMENTS", &self.options.format_arguments)
            .env("JAVA_OPTIONS", &self.options.java_options)
            .env("FILE_KIB", file_kib.map(|kib| kib.to_string()).unwrap_or_default())
            .stdin(Stdio::piped())
            .spawn()
            .expect("kafka.sh runs");
        let input = script.stdin.take().expect("piped");
        self.nodes[node].running = Some(Running { script, _input: input });
    }

    /// Waits until `count` brokers are in the cluster.
    pub fn wait_for(&self, count: usize) {
        let client = self.client();
        until("the brokers", || {
            let metadata = client.fetch_metadata(None, Duration::from_secs(2)).ok()?;
            // A broker that was killed is listed until its session is over.
            (metadata.brokers().len() == count).then_some(())
        });
    }

    fn signal(&self, node: usize, name: &str) {
        let pid = until("the broker's process id", || {
            let text = std::fs::read_to_string(self.data(node).join("pid")).ok()?;
            text.trim().parse::<u32>().ok()
        });
        let _ = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    }

    /// kill -9.
    pub fn kill(&mut self, node: usize) {
        self.signal(node, "KILL");
        if let Some(mut running) = self.nodes[node].running.take() {
            let _ = running.script.wait();
        }
    }

    pub fn freeze(&self, node: usize) {
        self.signal(node, "STOP");
    }

    pub fn thaw(&self, node: usize) {
        self.signal(node, "CONT");
    }

    fn client(&self) -> BaseConsumer {
        ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("log_level", "0")
            .create()
            .expect("a client")
    }

    /// The broker that leads a partition.
    pub fn leader(&self, topic: &str, partition: i32) -> Option<usize> {
        let metadata = self.client().fetch_metadata(Some(topic), Duration::from_secs(5)).ok()?;
        let topic = metadata.topics().iter().find(|t| t.name() == topic)?;
        let leader = topic.partitions().iter().find(|p| p.id() == partition)?.leader();
        usize::try_from(leader - 1).ok()
    }

    /// Waits until every replica of a topic is in sync: another broker may fail then.
    pub fn wait_in_sync(&self, topic: &str) {
        let client = self.client();
        until("all replicas in sync", || {
            let metadata = client.fetch_metadata(Some(topic), Duration::from_secs(2)).ok()?;
            let topic = metadata.topics().iter().find(|t| t.name() == topic)?;
            let in_sync = |p: &rdkafka::metadata::MetadataPartition| p.isr().len() == p.replicas().len();
            (!topic.partitions().is_empty() && topic.partitions().iter().all(in_sync)).then_some(())
        });
    }

    /// The broker that coordinates a group.
    pub fn coordinator(&self, group: &str) -> Option<usize> {
        // As Kafka's Utils.abs(groupId.hashCode) does it.
        let hash =
            group.encode_utf16().fold(0i32, |hash, c| hash.wrapping_mul(31).wrapping_add(i32::from(c)));
        self.leader("__consumer_offsets", (hash & 0x7fff_ffff) % OFFSETS_PARTITIONS)
    }
}

/// Runs one of Kafka's tools to its end.
pub fn tool(class: &str, arguments: &[&str]) {
    let output =
        Command::new(script()).args(["tool", class]).args(arguments).output().expect("kafka.sh runs");
    assert!(
        output.status.success(),
        "{class}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The first of two adjacent free ports, below the ephemeral ports.
pub fn free_ports() -> u16 {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    let start = (std::process::id() as u16 % 5000) * 2;
    for _ in 0..10_000 {
        let port = 20_000 + (start + NEXT.fetch_add(2, Ordering::Relaxed)) % 12_000;
        if free(port) && free(port + 1) {
            return port;
        }
    }
    panic!("no two free ports");
}
