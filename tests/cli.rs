//! The commands that need no running daemon: check, predict, model, demo; and models from a hub.

use crate::support;

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kandle::cli::demo::scenes::{IMAGES, TABLE};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use serde_json::Value;
use support::kafka::Kafka;
use support::{Daemon, Place, Sent, file, finish, kandle, root, until};

fn bundled() -> support::File {
    file(
        "kandle.yaml",
        "
kafka: { brokers: 'localhost:9092' }
input: { topics: [in], group: g, field: /text }
task: { kind: text-classification }
model: { source: bundled }
output: { topic: out, include: [/id] }
dead_letters: { topic: dead }
log: { level: warn }
",
    )
}

#[test]
fn predict_answers_line_by_line() {
    let config = bundled();
    let input = "{\"id\":1,\"text\":\"My parcel never arrived\"}\nnot json\n{\"id\":2,\"text\":\"My invoice is wrong\"}\r\n\n{\"id\":3,\"text\":\"The app crashes\"}";
    let (code, out, err) = finish(kandle().args(["predict", "-c"]).arg(&config.path), input.as_bytes());
    assert_eq!(code, 0, "{err}");
    let lines: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert_eq!(lines.len(), 5);
    assert_eq!((&lines[0]["label"], &lines[0]["id"]), (&"shipping".into(), &1.into()));
    assert_eq!(lines[1]["error"], "decode");
    assert_eq!(lines[2]["label"], "billing");
    assert_eq!(lines[3]["error"], "decode", "an empty line is an empty record");
    assert_eq!(lines[4]["label"], "technical");
    // With --strict, the exit code reports failed lines.
    let (code, again, err) =
        finish(kandle().args(["predict", "--strict", "-c"]).arg(&config.path), input.as_bytes());
    assert_eq!((code, &again), (3, &out));
    assert!(err.contains("2 lines got no prediction"), "{err}");
    let (code, ..) =
        finish(kandle().args(["predict", "--strict", "-c"]).arg(&config.path), b"{\"text\": \"hello\"}");
    assert_eq!(code, 0);
    // The same from a file.
    let records = file("records.jsonl", input);
    let (code, again, _) = finish(kandle().args(["predict", "-c"]).arg(&config.path).arg(&records.path), b"");
    assert_eq!((code, again), (0, out));
}

#[test]
fn predict_answers_a_line_the_same_alone_and_among_many() {
    let config = bundled();
    let tickets = std::fs::read_to_string(root().join("demo/tickets.jsonl")).expect("tickets");
    let run = |more: &[&str]| {
        let (code, out, err) =
            finish(kandle().args(["predict", "-c"]).arg(&config.path).args(more), tickets.as_bytes());
        assert_eq!(code, 0, "{err}");
        out.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect::<Vec<Value>>()
    };
    let (together, alone) = (run(&[]), run(&["--set", "window.max_records=1"]));
    assert_eq!(together.len(), tickets.lines().count());
    for (a, b) in together.iter().zip(&alone) {
        assert_eq!((&a["label"], &a["id"]), (&b["label"], &b["id"]));
        assert!((a["score"].as_f64().expect("a score") - b["score"].as_f64().expect("a score")).abs() < 1e-5);
    }
}

#[test]
fn embeddings_of_a_directory_with_its_own_pooling() {
    let model = tempfile::tempdir().expect("a directory");
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(root().join("tests/fixtures/roberta").join(name), model.path().join(name))
            .expect("copied");
    }
    std::fs::write(model.path().join("modules.json"), r#"[{"type":"sentence_transformers.models.Transformer","path":""},{"type":"sentence_transformers.models.Pooling","path":"1_Pooling"},{"type":"sentence_transformers.models.Normalize","path":"2_Normalize"}]"#).expect("written");
    std::fs::create_dir(model.path().join("1_Pooling")).expect("a directory");
    std::fs::write(model.path().join("1_Pooling/config.json"), r#"{"pooling_mode_cls_token":true}"#)
        .expect("written");
    let source = format!("model.source={}", model.path().display());
    let config = bundled();
    let set = [
        "--set",
        "task.kind=text-embedding",
        "--set",
        &source,
        "--set",
        "input.format=text",
        "--set",
        "input.field=null",
        "--set",
        "output.include=[]",
    ];
    let (code, out, err) =
        finish(kandle().args(["predict", "-c"]).arg(&config.path).args(set), b"order 3 is late\n");
    assert_eq!(code, 0, "{err}");
    let json: Value = serde_json::from_str(&out).expect("JSON");
    let vector: Vec<f64> = json["embedding"]
        .as_array()
        .expect("a vector")
        .iter()
        .map(|v| v.as_f64().expect("a number"))
        .collect();
    assert_eq!(vector.len(), 32);
    assert!((vector.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
    let (code, out, _) = finish(kandle().args(["model", "show", "-c"]).arg(&config.path).args(set), b"");
    assert_eq!(code, 0);
    assert!(out.contains("roberta") && out.contains("first") && out.contains("normalized    true"), "{out}");
}

#[test]
fn a_pinned_model_is_the_only_one_that_runs() {
    let config = bundled();
    let run = |command: &[&str], digest: &str, input: &[u8]| {
        let mut kandle = kandle();
        kandle.args(command).arg("-c").arg(&config.path).args(["--set", "model.device=cpu"]);
        if !digest.is_empty() {
            kandle.args(["--set", &format!("model.digest={digest}")]);
        }
        finish(&mut kandle, input)
    };
    let (code, listed, err) = run(&["model", "verify"], "", b"");
    assert_eq!(code, 0, "{err}");
    let is_digest = |word: &&str| word.len() == 64 && word.bytes().all(|digit| digit.is_ascii_hexdigit());
    let digest = listed.split_whitespace().rfind(is_digest).expect("a digest").to_owned();
    assert!(listed.contains("model.safetensors") && listed.contains("any model is accepted"), "{listed}");
    let ticket = br#"{"id":1,"text":"Where is my parcel?"}"#;
    for pinned in [&digest, &digest[..16]] {
        let (code, out, err) = run(&["model", "verify"], pinned, b"");
        assert!(code == 0 && out.contains("it is the one in model.digest"), "{out}{err}");
        assert_eq!(run(&["predict"], pinned, ticket).0, 0);
    }
    let other = "0".repeat(64);
    for (command, input) in [(&["predict"][..], &ticket[..]), (&["model", "verify"][..], b"")] {
        let (code, _, err) = run(command, &other, input);
        assert!(
            code != 0 && err.contains(&format!("its digest is {digest} and model.digest is {other}")),
            "{err}"
        );
    }
    let (code, _, err) = run(&["predict"], "ABC", ticket);
    assert!(code != 0 && err.contains("model.digest") && err.contains("is not a digest"), "{err}");
}

#[test]
fn check_warns_of_labels_without_names() {
    let directory = tempfile::tempdir().expect("a directory");
    let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bert");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::copy(fixture.join(name), directory.path().join(name)).expect("copied");
    }
    let config = bundled();
    let source = format!("model.source={}", directory.path().display());
    // No broker is there.
    let set = ["--set", "kafka.brokers=127.0.0.1:1", "--set", &source, "--set", "model.device=cpu"];
    let check = || finish(kandle().args(["check", "-c"]).arg(&config.path).args(set), b"").1;
    let named = check();
    assert!(named.contains("ok    model") && !named.contains("labels"), "{named}");
    let path = directory.path().join("config.json");
    let mut model: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    model["id2label"] = serde_json::json!({ "0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2" });
    std::fs::write(&path, model.to_string()).expect("written");
    let unnamed = check();
    assert!(
        unnamed.contains("warn  labels: ") && unnamed.contains("LABEL_0, LABEL_1, LABEL_2: set id2label"),
        "{unnamed}"
    );
}

/// `script` runs a command with a pseudo terminal as its standard input, output and error.
#[test]
fn predict_shows_progress_on_a_terminal_alone() {
    let config = bundled();
    let records = file("records.jsonl", &"{\"text\": \"where is my parcel\"}\n".repeat(3000));
    let predict = format!(
        "{} predict -c {} {}",
        env!("CARGO_BIN_EXE_kandle"),
        config.path.display(),
        records.path.display()
    );
    let on_terminal = |command: &str| {
        let mut script = std::process::Command::new("script");
        finish(script.args(["--quiet", "--return", "--command", command, "/dev/null"]), b"")
    };
    let (code, shown, _) = on_terminal(&format!("{predict} >/dev/null"));
    assert_eq!(code, 0, "{shown}");
    assert!(shown.contains("records/s") && shown.contains("tokens/s") && shown.contains("ETA"), "{shown}");
    for quiet in ["2>/dev/null >/dev/null", ""] {
        let (code, shown, _) = on_terminal(&format!("{predict} {quiet}"));
        assert_eq!(code, 0, "{shown}");
        assert!(!shown.contains("records/s"), "{quiet}: {shown}");
    }
}

#[test]
fn model_show_describes_gliner_with_the_labels_of_the_settings() {
    let config = bundled();
    let source = format!("model.source={}", root().join("tests/fixtures/gliner-deberta").display());
    let set = ["--set", "task.kind=token-classification", "--set", &source];
    let show = |more: &[&str]| {
        finish(kandle().args(["model", "show", "-c"]).arg(&config.path).args(set).args(more), b"")
    };
    let (code, out, err) = show(&["--set", "task.labels=person,phone number"]);
    assert_eq!(code, 0, "{err}");
    let rows: HashMap<&str, &str> = out.lines().map(|l| (l[..14].trim(), l[14..].trim())).collect();
    assert_eq!(rows["architecture"], "GLiNER on deberta-v2");
    assert_eq!(rows["labels"], "person, phone number");
    assert_eq!(rows["max words"], "24, of an entity 4");
    assert!(
        rows["max tokens"].starts_with("192, ") && rows["max tokens"].ends_with("of which the labels take")
    );
    assert_eq!((rows["parameters"], rows["digest"].len()), ("15180", 64));
    let (code, _, err) = show(&[]);
    assert!(code != 0 && err.contains("task.labels: the model is GLiNER"), "{err}");
}

#[test]
fn model_show_describes_the_model() {
    let config = bundled();
    let (code, out, err) = finish(kandle().args(["model", "show", "-c"]).arg(&config.path), b"");
    assert_eq!(code, 0, "{err}");
    let rows: HashMap<&str, &str> = out.lines().map(|l| (l[..14].trim(), l[14..].trim())).collect();
    assert_eq!(rows["architecture"], "bert");
    assert_eq!(rows["max tokens"], "128");
    assert_eq!(rows["tasks"], "text-classification");
    assert_eq!(rows["labels"], "account, billing, feedback, returns, shipping, technical");
    assert_eq!(rows["digest"].len(), 64);
    // The digest depends on the field, which changes predictions, and not on batch sizes.
    let digest = |set: &str| {
        let (_, out, _) =
            finish(kandle().args(["model", "show", "-c"]).arg(&config.path).args(["--set", set]), b"");
        out.lines().find_map(|l| l.strip_prefix("digest")).expect("a digest").trim().to_owned()
    };
    assert_eq!(digest("batch.max_tokens=77"), rows["digest"]);
    assert_ne!(digest("input.field=/body"), rows["digest"]);
}

#[test]
fn a_model_that_cannot_be_loaded_fails_with_the_reason() {
    let config = bundled();
    let (code, _, err) = finish(
        kandle().args(["predict", "-c"]).arg(&config.path).args(["--set", "model.source=/no/such/model"]),
        b"",
    );
    assert_eq!(code, 1);
    assert!(err.contains("/no/such/model") && err.contains("no such directory"), "{err}");
    if !cfg!(feature = "cuda") {
        let (code, _, err) = finish(
            kandle().args(["predict", "-c"]).arg(&config.path).args(["--set", "model.device=cuda"]),
            b"",
        );
        assert_eq!(code, 1);
        assert!(err.contains("--features cuda"), "{err}");
    }
}

#[test]
fn check_tries_everything_and_reports_every_failure() {
    let place = Place::new("check", 3);
    let config = file(
        "kandle.yaml",
        &place.config(&[("delivery", "{ guarantee: exactly_once, commit_interval: 2s }")]),
    );
    let (code, out, err) = finish(kandle().args(["check", "-c"]).arg(&config.path), b"");
    assert_eq!(code, 0, "{out}{err}");
    for line in [
        "ok    transaction: lasts 11 s at most",
        "times out after 41 s; the brokers allow 900000 ms",
        "ok    brokers",
        "3 partitions, readable",
        "ok    output.topic",
        "ok    dead_letters.topic",
        "ok    group",
        "ok    producer",
        "ok    largest message",
        "ok    model bundled",
        "ok    memory",
    ] {
        assert!(out.contains(line), "{line}\n{out}");
    }
    let config = file(
        "kandle.yaml",
        &place.config(&[
            ("output", "{ topic: no-such-topic }"),
            ("dead_letters", "{ topic: none-such }"),
            ("model", "{ source: /no/such/model }"),
        ]),
    );
    let (code, out, _) = finish(kandle().args(["check", "-c"]).arg(&config.path), b"");
    assert_eq!(code, 1);
    assert_eq!(out.matches("FAIL").count(), 3, "{out}");
    assert!(out.contains("topic no-such-topic does not exist; create it"), "{out}");
}

#[test]
fn commands_that_only_read_create_no_topic() {
    let kafka = Kafka::start_creating_topics();
    let place = Place::on(&kafka.brokers, "looks", 1);
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", &kafka.brokers).create().expect("a client");
    let topics = || -> BTreeSet<String> {
        let metadata = consumer.fetch_metadata(None, Duration::from_secs(10)).expect("an answer");
        let names = metadata.topics().iter().map(|topic| topic.name().to_owned());
        // Kafka creates its internal topics by itself.
        names.filter(|name| !name.starts_with("__")).collect()
    };
    let before = topics();
    let config = file(
        "kandle.yaml",
        &place.config(&[
            ("input", "{ topics: [mistyped-in], group: $GROUP, field: /text }"),
            ("output", "{ topic: mistyped-out }"),
            ("dead_letters", "{ topic: mistyped-dead }"),
        ]),
    );
    let run = |arguments: &[&str]| {
        finish(kandle().args(arguments).arg("-c").arg(&config.path), b"{\"text\": \"hello\"}\n")
    };
    for _ in 0..2 {
        let (code, out, _) = run(&["check"]);
        assert_eq!(code, 1);
        assert!(out.contains("mistyped-in does not exist") && out.contains("mistyped-out"), "{out}");
    }
    for command in [
        &["audit"][..],
        &["compare", "--a", "mistyped-a", "--b", "mistyped-b"],
        &["replay", "--from", "offset:0", "--to", "offset:1", "--dry-run"],
    ] {
        let (_, out, err) = run(command);
        // The command did ask the cluster for the topic.
        assert!((out + &err).contains("mistyped-"), "{command:?}");
    }
    assert_eq!(topics().difference(&before).collect::<Vec<_>>(), Vec::<&String>::new());
    // A daemon lets the broker create only the topics that it writes, and waits for its input, which may be mistyped.
    let mut daemon = Daemon::start(&std::fs::read_to_string(&config.path).expect("read"));
    daemon.wait_log("mistyped-in");
    until("the dead-letter topic", || topics().contains("mistyped-dead").then_some(()));
    daemon.stop();
    assert!(!topics().contains("mistyped-in"), "{:?}", topics());
}

#[test]
fn warns_of_predictions_that_retention_would_delete_at_once() {
    let place = Place::new("old", 2);
    place.configure(&place.output, "retention.ms", "604800000");
    let month_ago = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as i64 - 30 * 86_400_000;
    place.produce(
        (0..10).map(|i| Sent { timestamp: Some(month_ago + i), ..Sent::ticket(0, i as usize, "hello") }),
    );
    let config = file("kandle.yaml", &place.config(&[]));
    let run = |arguments: &[&str]| {
        let (code, out, err) = finish(kandle().args(arguments).arg("-c").arg(&config.path), b"");
        assert_eq!(code, 0, "{out}{err}");
        out + &err
    };
    let warning = format!("topic {} keeps records for 7days", place.output);
    let dry = &["replay", "--from", "offset:0", "--to", "offset:10", "--dry-run"][..];
    for command in [&["check"][..], dry, &["drain"]] {
        let said = run(command);
        assert!(said.contains(&warning) && said.contains("output.timestamp: now"), "{command:?}: {said}");
    }
    // No warning once the records are processed, nor with `output.timestamp: now`.
    assert!(!run(&["check"]).contains(&warning));
    let (_, out, err) =
        finish(kandle().args(dry).arg("-c").arg(&config.path).args(["--set", "output.timestamp=now"]), b"");
    assert!(!(out + &err).contains(&warning));
}

#[test]
fn a_closed_pipe_ends_every_command_quietly() {
    let place = Place::new("pipe", 1);
    place.produce((0..10).map(|i| Sent::ticket(0, i, "hello")));
    let config = file("kandle.yaml", &place.config(&[]));
    let (code, out, err) = finish(kandle().args(["drain", "-c"]).arg(&config.path), b"");
    assert_eq!(code, 0, "{out}{err}");
    let with_config: &[&[&str]] = &[
        &["check"],
        &["predict", "demo/tickets.jsonl"],
        &["audit"],
        &["compare", "--a", &place.output, "--b", &place.dead],
        &["replay", "--from", "offset:0", "--to", "offset:10", "--dry-run"],
        &["model", "show"],
        &["config", "show"],
        &["config", "schema", "--output"],
    ];
    let plain: &[&[&str]] = &[
        &["bench", "engine", "--model", "bundled", "--input", "demo/tickets.jsonl"],
        &["config", "schema"],
        &["--help"],
        &["--version"],
        &["run", "--help"],
    ];
    let all = with_config.iter().map(|words| (*words, true)).chain(plain.iter().map(|words| (*words, false)));
    for (words, configured) in all {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = kandle();
        command.args(words).current_dir(root()).stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
        if configured {
            command.arg("-c").arg(&config.path);
        }
        let output = command.spawn().expect("kandle starts").wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{words:?}: {said}");
        assert!(!said.contains("panicked") && !said.contains("roken pipe"), "{words:?}: {said}");
    }
}

#[test]
fn check_reports_an_unreachable_broker_within_ten_seconds() {
    let config = bundled();
    let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let started = std::time::Instant::now();
    let set = format!("kafka.brokers=127.0.0.1:{port}");
    let (code, out, _) = finish(kandle().args(["check", "-c"]).arg(&config.path).args(["--set", &set]), b"");
    assert_eq!(code, 1);
    assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
    assert!(
        out.contains(&format!("FAIL  brokers 127.0.0.1:{port}")) && out.contains("Connection refused"),
        "{out}"
    );
    assert!(out.contains("ok    model bundled"), "what does not need Kafka must be checked anyway\n{out}");
}

#[test]
fn the_demos_show_predictions_and_a_dead_letter_and_end() {
    let cases: [(&[&str], &str, &[&str]); 3] = [
        (&[], "tickets", &["why: decode"]),
        (&["--table"], "customers", &["why: field", "\"/months\" is a string", "in truth: "]),
        (&["--images"], "images", &["why: image", "drawn: "]),
    ];
    for (arguments, records, parts) in cases {
        let command = [&["demo", "--seconds", "8", "--listen", "127.0.0.1:0"], arguments].concat();
        let (code, out, err) = finish(kandle().args(command), b"");
        assert_eq!(code, 0, "{out}{err}");
        let (dead, all) = (format!("dead letter from {records}/"), format!("400 {records}"));
        let common =
            ["/metrics", "nothing lost", "On your own Kafka", "kandle check -c", "kandle run -c", "lag "];
        for part in common.iter().chain(parts).chain([&dead.as_str(), &all.as_str()]) {
            assert!(out.contains(part), "{part:?} is not in\n{out}");
        }
    }
}

/// What the settings of `kandle demo` make of its records.
#[test]
fn the_bundled_models_are_right_about_the_bundled_records() {
    let cases = [
        ("demo/customers.jsonl", "outcome", TABLE.set, 0.65),
        ("demo/images.jsonl", "drawn", IMAGES.set, 0.9),
    ];
    for (file, truth, set, least) in cases {
        let mut command = kandle();
        command.args(["predict", file]).current_dir(root());
        let common = [
            "kafka.brokers=none:1",
            "input.topics=a",
            "input.group=b",
            "output.topic=c",
            "dead_letters.topic=d",
            &format!("output.include=/{truth}"),
        ];
        for set in common.iter().chain(set) {
            command.args(["--set", set]);
        }
        let (code, out, err) = finish(&mut command, b"");
        assert_eq!(code, 0, "{err}");
        let rows: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let right = rows.iter().filter(|row| row["label"] == row[truth]).count();
        assert!(right as f64 >= least * rows.len() as f64, "{right} of {} in {file}", rows.len());
    }
}

/// A server for the part of the hub's protocol that a client needs: revisions, files with their
/// etags and commits, tokens.
struct Hub {
    endpoint: String,
    /// Path of each request so far.
    asked: Arc<Mutex<Vec<String>>>,
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const FILES: [&str; 4] = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];

impl Hub {
    fn start(directory: &Path, token: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (directory, kept) = (directory.to_owned(), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (directory, kept) = (directory.clone(), Arc::clone(&kept));
                std::thread::spawn(move || drop(answer(stream, &directory, token, &kept)));
            }
        });
        Self { endpoint, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("the list").clone()
    }
}

fn answer(
    stream: TcpStream,
    directory: &Path,
    token: Option<&str>,
    asked: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut out = stream.try_clone()?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(request) = lines.next() {
        let request = request?;
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let (mut range, mut authorized) = (None, token.is_none());
        for line in lines.by_ref() {
            let line = line?.to_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(asked) = line.strip_prefix("range: bytes=") {
                range = asked
                    .split_once('-')
                    .map(|(a, b)| (a.parse().unwrap_or(0), b.parse().unwrap_or(usize::MAX)));
            }
            authorized |= token.is_some_and(|t| line == format!("authorization: bearer {t}"));
        }
        asked.lock().expect("the list").push(path.clone());
        let mut reply = |status: &str, headers: &str, body: &[u8]| -> std::io::Result<()> {
            write!(out, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n", body.len())?;
            if !request.starts_with("HEAD") {
                out.write_all(body)?;
            }
            out.flush()
        };
        let info =
            |path: &str| path.starts_with("/api/models/org/tiny/revision/") || path == "/api/models/org/tiny";
        if !authorized {
            reply("401 Unauthorized", "", b"")?;
        } else if info(&path) && !path.ends_with("/nowhere") {
            let siblings: Vec<Value> = FILES.iter().map(|f| serde_json::json!({ "rfilename": f })).collect();
            let info = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
            reply("200 OK", "Content-Type: application/json\r\n", info.as_bytes())?;
        } else if let Some(name) = path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")) {
            let Ok(bytes) = std::fs::read(directory.join(name)) else {
                reply("404 Not Found", "", b"")?;
                continue;
            };
            let common =
                format!("ETag: \"etag-{name}\"\r\nX-Repo-Commit: {COMMIT}\r\nAccept-Ranges: bytes\r\n");
            match range {
                Some((start, end)) => {
                    let end = end.min(bytes.len() - 1);
                    let headers = format!("{common}Content-Range: bytes {start}-{end}/{}\r\n", bytes.len());
                    reply("206 Partial Content", &headers, &bytes[start..=end])?;
                }
                None => reply("200 OK", &common, &bytes)?,
            }
        } else {
            reply("404 Not Found", "", b"")?;
        }
    }
    Ok(())
}

#[test]
fn a_model_from_a_hub_is_pinned_cached_and_works_offline() {
    let hub = Hub::start(&root().join("tests/fixtures/bert"), Some("hf_secret"));
    let cache = tempfile::tempdir().expect("a directory");
    let config = bundled();
    let run = |command: &[&str], endpoint: &str, token: &str, more: &[&str]| {
        finish(
            kandle()
                .args(command)
                .arg("-c")
                .arg(&config.path)
                .args(["--set", "model.source=org/tiny"])
                .args(more)
                .env("HF_HOME", cache.path())
                .env("HF_ENDPOINT", endpoint)
                .env("HF_TOKEN", token)
                .env_remove("HF_HUB_OFFLINE"),
            b"{\"text\":\"hello\"}\n",
        )
    };
    // With a wrong token, and with a revision that does not exist.
    let (code, _, err) = run(&["model", "pull"], &hub.endpoint, "wrong", &[]);
    assert_eq!(code, 1);
    assert!(err.contains("access denied") && err.contains("HF_TOKEN"), "{err}");
    let (code, _, err) =
        run(&["model", "pull"], &hub.endpoint, "hf_secret", &["--set", "model.revision=nowhere"]);
    assert_eq!(code, 1);
    assert!(err.contains("no such model or revision"), "{err}");
    // A pulled model is named by its commit.
    let (code, out, err) = run(&["model", "pull"], &hub.endpoint, "hf_secret", &[]);
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with(&format!("org/tiny@{COMMIT}\n")), "{out}");
    assert!(hub.asked().iter().any(|path| path.ends_with("/model.safetensors")));
    // Once the files are cached, only the revision is looked up.
    let before = hub.asked().len();
    let (code, online, err) = run(&["predict"], &hub.endpoint, "hf_secret", &[]);
    assert_eq!(code, 0, "{err}");
    assert!(
        hub.asked()[before..].iter().all(|path| path.starts_with("/api/")),
        "{:?}",
        &hub.asked()[before..]
    );
    // Offline by setting, with an unreachable hub, and with a pinned commit.
    let (code, offline, err) =
        run(&["predict"], &hub.endpoint, "hf_secret", &["--set", "model.offline=true"]);
    assert_eq!((code, &offline), (0, &online), "{err}");
    let (code, away, err) = run(&["predict"], "http://127.0.0.1:9", "hf_secret", &[]);
    assert_eq!((code, &away), (0, &online), "{err}");
    assert!(err.contains("using the cache"), "{err}");
    let revision = format!("model.revision={COMMIT}");
    let (code, pinned, _) =
        run(&["predict"], &hub.endpoint, "hf_secret", &["--set", "model.offline=true", "--set", &revision]);
    assert_eq!((code, &pinned), (0, &online));
    // Offline, a model that is not cached is an error.
    let (code, _, err) = run(
        &["predict"],
        &hub.endpoint,
        "x",
        &["--set", "model.offline=true", "--set", "model.source=org/other"],
    );
    assert_eq!(code, 1);
    assert!(err.contains("org/other@main is not in the cache"), "{err}");
}

#[test]
fn bench_engine_measures_and_writes_correct_embeddings() {
    let fixture = support::root().join("tests/fixtures/bert");
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture.join("golden.json")).expect("golden.json"))
            .expect("JSON");
    let golden = golden.as_array().expect("a list");
    let lines: Vec<String> =
        golden.iter().map(|g| serde_json::json!({ "text": g["text"] }).to_string()).collect();
    let input = support::file("texts.jsonl", &lines.join("\n"));
    let output = support::file("embeddings.jsonl", "");
    let mut command = kandle();
    command.args(["bench", "engine", "--json", "--threads", "2", "--dtype", "f32", "--device", "cpu"]);
    command.arg("--model").arg(&fixture).arg("--input").arg(&input.path).arg("--output").arg(&output.path);
    let (code, out, error) = finish(&mut command, b"");
    assert_eq!(code, 0, "{error}");
    let report: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    let tokens: usize = golden.iter().map(|g| g["ids"].as_array().expect("ids").len()).sum();
    assert_eq!(report["records"], golden.len());
    assert_eq!(report["tokens"], tokens);
    assert_eq!(
        (&report["dtype"], &report["device"], &report["threads"]),
        (&"f32".into(), &"cpu".into(), &2.into())
    );
    for key in ["seconds", "records_per_second", "tokens_per_second", "peak_rss_bytes"] {
        assert!(report[key].as_f64().is_some_and(|x| x > 0.0), "{key}: {report}");
    }
    let rows = std::fs::read_to_string(&output.path).expect("embeddings");
    assert_eq!(rows.lines().count(), golden.len());
    for (row, golden) in rows.lines().zip(golden) {
        let row: serde_json::Value = serde_json::from_str(row).expect("JSON");
        for (got, want) in
            row["embedding"].as_array().expect("a list").iter().zip(golden["mean"].as_array().unwrap())
        {
            assert!((got.as_f64().unwrap() - want.as_f64().unwrap()).abs() < 1e-4, "{golden}");
        }
    }
}

#[test]
fn bench_engine_ends_when_a_text_fails() {
    let model = support::poisoned_model();
    // More windows than the queue holds: some are blocked when the text fails.
    let texts =
        (0..6000).map(|i| format!("{{\"text\":\"order {}\"}}\n", if i == 9 { "poison" } else { "late" }));
    let texts = file("texts.jsonl", &texts.collect::<String>());
    let mut command = kandle();
    command.args(["bench", "engine", "--threads", "1", "--device", "cpu", "--model"]);
    let (code, _, err) = finish(command.arg(model.path()).arg("--input").arg(&texts.path), b"");
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("text 9 of a window has no embedding"), "{err}");
}

#[test]
fn calibrate_saves_the_chosen_budget_for_the_model_and_device() {
    let cache = tempfile::tempdir().expect("a directory");
    let config = bundled();
    let mut command = kandle();
    command.env("XDG_CACHE_HOME", cache.path()).args(["bench", "calibrate", "-c"]).arg(&config.path);
    let (code, out, error) = finish(&mut command, b"");
    assert_eq!(code, 0, "{error}");
    let chosen: usize = out.lines().last().and_then(|l| l.split(' ').next()?.parse().ok()).expect("a number");
    let kept = std::fs::read_to_string(cache.path().join("kandle/calibration.json")).expect("kept");
    assert!(kept.contains(&format!(" cpu\": {chosen}")), "{kept}");
    assert!([64, 128, 256, 512, 1024, 2048].contains(&chosen), "{out}");
}
