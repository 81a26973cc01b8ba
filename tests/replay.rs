//! `kandle replay` and `kandle audit` on a real Kafka: ranges by time and offset, reprocessed dead letters,
//! audits of the output; and which models may share a group.

use crate::support;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use jiff::Timestamp;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde_json::Value;
use support::ledger::Ledger;
use support::{Daemon, File, NOOP, Place, Sent, file, finish, kandle, until};

fn config(place: &Place, more: &[(&str, &str)]) -> File {
    file("kandle.yaml", &place.config(&[&NOOP, more].concat()))
}

/// Runs `kandle COMMAND -c CONFIG MORE…` to its end; returns exit code, standard output, log.
fn run(command: &str, config: &File, more: &[&str]) -> (i32, String, String) {
    finish(kandle().arg(command).arg("-c").arg(&config.path).args(more), b"")
}

const START: i64 = 1_790_000_000_000;

/// The time of record `i`.
fn at(i: i64) -> String {
    Timestamp::from_millisecond(START + i * 1000).expect("a time").to_string()
}

fn timed(i: i64, size: usize) -> Sent {
    let value = serde_json::json!({ "id": i, "text": "x".repeat(size) });
    Sent { timestamp: Some(START + i * 1000), ..Sent::new(0, value.to_string()) }
}

fn offsets(place: &Place, count: usize) -> BTreeSet<i64> {
    let got = place.read(&place.output, "the predictions", |got| got.len() >= count);
    got.iter().map(|got| got.source().1).collect()
}

/// Deletes the records before an offset.
fn delete_before(place: &Place, offset: i64) {
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&place.input, 0, Offset::Offset(offset)).expect("an offset");
    place.administer(async |admin, options| {
        admin.delete_records(&list, options).await.expect("deleted");
    });
}

/// Three segments, their beginning deleted, an aborted transaction in the middle.
#[test]
fn a_range_by_time_spans_segments_and_gaps() {
    let place = Place::new("replay", 1);
    let segmented = format!("{}-segmented", place.input);
    place.create(&segmented, 1, &[("segment.bytes", "1048576")]);
    let place = Place { input: segmented, ..place };
    let sent = |i: i64, millis: i64| Sent { timestamp: Some(millis), ..timed(i, 1000) };
    // One record per second until a while ago; a transaction's marker of now; one record per millisecond.
    let before = Timestamp::now().as_millisecond() - 1_600_000;
    place.produce((0..1500).map(|i| sent(i, before + i * 1000)));
    // Offsets 1500 to 1599, which no read_committed consumer sees, and a marker after them.
    let producer: rdkafka::producer::BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &place.brokers)
        .set("transactional.id", support::unique("replay-hole"))
        .create()
        .expect("a producer");
    let reader: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", &place.brokers).create().expect("a client");
    producer.init_transactions(support::TIMEOUT).expect("a transactional producer");
    producer.begin_transaction().expect("begun");
    for i in 1500..1600 {
        let record = sent(i, before + i * 1000);
        let base = BaseRecord::<[u8], [u8]>::to(&place.input).partition(0);
        let value = record.value.expect("a value");
        producer.send(base.payload(&value[..]).timestamp(before + i * 1000)).expect("sent");
    }
    producer.flush(support::TIMEOUT).expect("acknowledged");
    producer.abort_transaction(support::TIMEOUT).expect("aborted");
    // The broker answers before the marker is written.
    until("the transaction's marker", || {
        let (_, end) = reader.fetch_watermarks(&place.input, 0, support::TIMEOUT).ok()?;
        (end == 1601).then_some(())
    });
    let after = Timestamp::now().as_millisecond() - 1600;
    place.produce((1600..3400).map(|i| sent(i, after + i)));
    until("the last record's time", || (Timestamp::now().as_millisecond() > after + 3400).then_some(()));
    let at = |i: i64| {
        let millis = if i < 1600 { before + i * 1000 } else { after + i };
        Timestamp::from_millisecond(millis).expect("a time").to_string()
    };
    delete_before(&place, 500);
    let config = config(&place, &[]);

    // After the marker, offsets are one ahead of the records' numbers.
    let (from, to) = (at(700), at(3000));
    let report = file("report.json", "");
    let part = ["--from", &from, "--to", &to, "--report", report.path.to_str().expect("a path")];
    let (code, _, log) = run("replay", &config, &part);
    assert_eq!(code, 0, "{log}");
    let expected: BTreeSet<i64> = (700..1500).chain(1601..3001).collect();
    assert_eq!(offsets(&place, expected.len()), expected);
    assert_eq!(place.committed(0), None, "the live group has no offset");
    let read = |report: &File| -> Value {
        serde_json::from_str(&std::fs::read_to_string(&report.path).expect("a report")).expect("JSON")
    };
    let first = read(&report);
    assert_eq!((&first["complete"], &first["records"]), (&true.into(), &2200.into()), "{first}");
    // The same range again: nothing is left to do.
    let (code, _, log) = run("replay", &config, &part);
    assert_eq!(code, 0, "{log}");
    assert_eq!(read(&report)["records"], 0);
    assert_eq!(place.predictions(2200).len(), 2200);

    // Retention has deleted part of the range.
    let (code, _, log) = run("replay", &config, &["--from", &at(100), "--to", &at(600)]);
    assert_eq!(code, 2, "{log}");
    let has = format!("{}/0 has offsets 500 ({}) to 3400 ({})", place.input, at(500), at(3399));
    assert!(log.contains(&has), "{has:?} is not in {log}");
    let (code, _, log) = run("replay", &config, &["--from", &at(100), "--to", &at(600), "--force"]);
    assert_eq!(code, 0, "{log}");
    assert_eq!(offsets(&place, 2300).first(), Some(&500));
    // Retention has deleted all of the range.
    let (code, _, log) = run("replay", &config, &["--from", &at(10), "--to", &at(20)]);
    assert!(code == 2 && log.contains("no records from") && log.contains("has offsets 500"), "{code} {log}");
}

#[test]
fn an_impossible_range_is_refused_with_the_reason() {
    let place = Place::new("replay-bad", 1);
    place.produce((0..10).map(|i| timed(i, 10)));
    let config = config(&place, &[]);
    let refused = |arguments: &[&str], parts: &[&str]| {
        let (code, _, log) = run("replay", &config, arguments);
        assert_eq!(code, 2, "{arguments:?}: {log}");
        for part in parts {
            assert!(log.contains(part), "{part:?} is not in {log}");
        }
    };
    refused(&["--from", &at(5), "--to", &at(5)], &["--from", "is not before --to"]);
    refused(&["--from", "offset:5", "--to", "offset:2"], &["--from offset:5 is not before --to offset:2"]);
    refused(&["--from", &at(5), "--to", "2999-01-01T00:00:00Z"], &["is in the future"]);
    refused(&["--from", "yesterday", "--to", &at(5)], &["RFC 3339"]);
    refused(&["--from", &at(5)], &["--to"]);
    let set = format!("input.topics={}-not", place.input);
    refused(&["--from", &at(0), "--to", &at(5), "--set", &set], &["-not does not exist"]);
    // An id stands for one range.
    let (code, _, log) = run("replay", &config, &["--from", "offset:5", "--to", "offset:8", "--id", "a"]);
    assert_eq!(code, 0, "{log}");
    let (code, _, log) = run("replay", &config, &["--from", "offset:0", "--to", "offset:3", "--id", "a"]);
    assert!(code == 1 && log.contains("--id a has been used for another range"), "{code} {log}");
}

#[test]
fn a_killed_replay_resumes_where_it_was() {
    let place = Place::new("replay-kill", 2);
    place.produce((0..3000).map(|i| Sent::ticket((i % 2) as i32, i, "hello")));
    let slow = [("window", "{ max_records: 20 }"), ("delivery", "{ commit_interval: 50ms }")];
    let config = config(&place, &slow);
    let arguments = ["--from", "offset:100", "--to", "offset:1400", "--id", "night"];
    for _ in 0..3 {
        let mut command = kandle();
        command.args(["replay", "-c"]).arg(&config.path).args(arguments);
        // Pauses in mid-work, so that the process cannot end before it is killed.
        command.env("FAILPOINTS", "encode=10*off->pause").stdout(Stdio::null()).stderr(Stdio::null());
        let before = Ledger::count_of(&place);
        let mut child = command.spawn().expect("started");
        let mut ended = false;
        until("progress", || {
            ended = child.try_wait().expect("a child").is_some();
            (ended || Ledger::count_of(&place) > before + 100).then_some(())
        });
        assert!(!ended, "it ended before it was killed");
        child.kill().expect("killed");
        child.wait().expect("ended");
    }
    let (code, _, log) = run("replay", &config, &arguments);
    assert_eq!(code, 0, "{log}");
    let mut seen = BTreeSet::new();
    let got = place.read(&place.output, "all predictions", |got| {
        seen.extend(got[seen.len().min(got.len())..].iter().map(support::Got::source));
        got.iter().map(support::Got::source).collect::<BTreeSet<_>>().len() == 2600
    });
    assert!(
        got.iter().all(|got| (100..1400).contains(&got.source().1)),
        "records outside of the range were replayed"
    );
    assert!(got.len() < 2600 + 1500, "too many records were replayed twice: {}", got.len());
}

#[test]
fn dead_letters_are_reprocessed_at_their_original_positions() {
    let place = Place::new("replay-dead", 2);
    let with_header = Sent {
        headers: vec![("traceparent".to_owned(), "00-ab".to_owned())],
        key: Some(b"k".to_vec()),
        ..Sent::new(1, r#"{"body": "other field"}"#)
    };
    place.produce([Sent::ticket(0, 0, "fine"), with_header, Sent::new(0, "no json")]);
    let config = config(&place, &[]);
    let (code, _, log) = run("drain", &config, &[]);
    assert_eq!(code, 0, "{log}");
    let dead = place.dead_letters(2);
    // A dead letter of another job, in the same topic.
    let mut foreign = Sent::new(0, "{}");
    foreign.headers = vec![
        ("kandle-source".to_owned(), "elsewhere/0/7".to_owned()),
        ("kandle-error".to_owned(), "decode".to_owned()),
    ];
    let elsewhere = Place {
        brokers: place.brokers.clone(),
        input: place.dead.clone(),
        output: String::new(),
        dead: String::new(),
        group: String::new(),
    };
    elsewhere.produce([foreign]);

    let report = file("report.json", "");
    let path = report.path.to_str().expect("a path");
    let again = ["--dead-letters", "--set", "input.field=/body", "--report", path, "--strict"];
    let (code, _, log) = run("replay", &config, &again);
    assert_eq!(code, 3, "one is still a dead letter: {log}");
    let text = std::fs::read_to_string(&report.path).expect("a report");
    let read: Value = serde_json::from_str(&text).expect("JSON");
    let counts = ["predicted", "dead_lettered", "passed_over"].map(|name| read[name].as_u64());
    assert_eq!(counts, [Some(1), Some(1), Some(1)], "{text}");

    let found = place.predictions(2).into_iter().find(|got| got.source() == (1, 0)).expect("reprocessed");
    assert_eq!(found.header("traceparent"), Some("00-ab"));
    assert_eq!(found.key.as_deref(), Some(&b"k"[..]));
    assert_eq!(found.header("kandle-error"), None);
    assert_eq!(found.headers.iter().filter(|(name, _)| name == "kandle-source").count(), 1);
    let original = dead.iter().find(|got| got.source() == (1, 0)).expect("its dead letter");
    assert_eq!(found.timestamp, original.timestamp);
    let dead = place.dead_letters(4);
    let last = dead.last().expect("four");
    assert_eq!((last.source(), last.header("kandle-error")), ((0, 1), Some("decode")));
    assert_eq!(last.headers.iter().filter(|(name, _)| name == "kandle-source").count(), 1);

    // A second run processes what has come since: the record that is still a dead letter.
    let (code, _, log) = run("replay", &config, &again);
    assert_eq!(code, 3, "{log}");
    let read: Value =
        serde_json::from_str(&std::fs::read_to_string(&report.path).expect("a report")).expect("JSON");
    assert_eq!((&read["records"], &read["dead_lettered"]), (&1.into(), &1.into()));

    // Retention has deleted records past the replay's offset: the replay goes on with what is left.
    let letters = place.dead_letters(5).len() as i64;
    place.produce([Sent::new(0, "no json")]);
    let (code, _, log) = run("drain", &config, &[]);
    assert_eq!(code, 0, "{log}");
    assert_eq!(place.dead_letters(6).last().expect("six").offset, letters);
    delete_before(&elsewhere, letters);
    let (code, _, log) = run("replay", &config, &again);
    assert_eq!(code, 3, "{log}");
}

#[test]
fn a_dry_run_estimates_and_publishes_nothing() {
    let place = Place::new("replay-dry", 2);
    let tickets = std::fs::read_to_string(support::root().join("demo/tickets.jsonl")).expect("tickets");
    place.produce(tickets.lines().cycle().take(600).enumerate().map(|(i, t)| Sent::new((i % 2) as i32, t)));
    let config = file("kandle.yaml", &place.config(&[("cost", "{ per_hour: 36 }")]));
    let arguments = ["--from", "offset:0", "--to", "offset:250", "--dry-run"];
    let (code, out, log) = run("replay", &config, &arguments);
    assert_eq!(code, 0, "{log}");
    let estimate: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(estimate["records"], 500, "{estimate}");
    let number = |name: &str| estimate[name].as_f64().unwrap_or_else(|| panic!("{name}: {estimate}"));
    assert!((1.0..=500.0).contains(&number("sampled")), "{estimate}");
    assert!(number("tokens_per_record") > 3.0, "{estimate}");
    assert!((number("seconds") - 500.0 / number("records_per_second")).abs() < 1e-6, "{estimate}");
    for suffix in ["", "_low", "_high"] {
        let (cost, seconds) = (number(&format!("cost{suffix}")), number(&format!("seconds{suffix}")));
        assert!((cost - seconds / 100.0).abs() < 1e-9, "{estimate}");
    }
    assert!(
        number("seconds_low") < number("seconds") && number("seconds") < number("seconds_high"),
        "{estimate}"
    );
    assert_eq!(Ledger::count_of(&place), 0, "nothing is published");
}

#[test]
fn an_audit_finds_missing_and_duplicated_positions() {
    let place = Place::new("audit", 2);
    place.produce((0..400).map(|i| Sent::ticket((i % 2) as i32, i, "hello")));
    place.produce([Sent::new(0, "no json")]);
    let config = config(&place, &[("delivery", "{ guarantee: exactly_once }")]);
    let audit = |arguments: &[&str]| -> (i32, Value, String) {
        let (code, out, log) = run("audit", &config, &[&["--json"], arguments].concat());
        (code, serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out} {log}")), log)
    };
    let (code, _, log) = run("drain", &config, &[]);
    assert_eq!(code, 0, "{log}");
    place.produce([Sent::ticket(0, 400, "not yet")]);
    let (code, found, log) = audit(&[]);
    assert_eq!(code, 0, "{log}");
    let part = |found: &Value, name: &str| [found[0][name].clone(), found[1][name].clone()];
    assert_eq!(part(&found, "covered"), [201.into(), Value::from(200)]);
    assert_eq!(part(&found, "pending"), [1.into(), Value::from(0)]);
    let model = &found[0]["models"][0];
    assert_eq!((&model["predictions"], &model["dead_letters"]), (&200.into(), &1.into()), "{found}");
    assert_eq!(model["offsets"], serde_json::json!([[0, 200]]));
    assert_eq!((&model["model"], model["digest"].as_str().map(str::len)), (&"noop".into(), Some(16)));

    // The group's offset skips a record without an outcome, and goes back over twenty that have one. A
    // setting that changes predictions makes this another model.
    place.commit(0, 202, "");
    place.commit(1, 180, "");
    let (code, _, log) = run("drain", &config, &["--set", "input.join=-"]);
    assert_eq!(code, 0, "{log}");
    let (code, found, log) = audit(&[]);
    assert_eq!(code, 3, "{log}");
    assert!(log.contains("1 positions are missing and 20 are published more than once"), "{log}");
    assert_eq!(found[0]["missing_offsets"], serde_json::json!([[201, 201]]));
    assert_eq!(found[1]["doubled_offsets"], serde_json::json!([[180, 199]]));
    assert_eq!(found[1]["models"].as_array().map(Vec::len), Some(2), "{found}");
    // Another range has no such positions.
    let (code, found, log) = audit(&["--from", "offset:0", "--to", "offset:150"]);
    assert_eq!(code, 0, "{log}");
    assert_eq!(part(&found, "covered"), [150.into(), Value::from(150)]);
    // Without --json, as text.
    let (code, out, _) = run("audit", &config, &[]);
    assert_eq!(code, 3);
    assert!(out.contains("missing 1: 201") && out.contains("doubled 20: 180-199"), "{out}");
}

#[test]
fn with_on_change_refuse_a_group_has_one_model() {
    for protocol in ["classic", "consumer"] {
        let place = Place::new("one-model", 2);
        let input = format!(
            "{{ topics: [{}], group: {}, field: /text, properties: {{ group.protocol: {protocol} }} }}",
            place.input, place.group
        );
        // With the new protocol, the broker sets the session timeout.
        let text =
            place.config(&[NOOP[0], NOOP[1], NOOP[2], ("input", &input), ("model", "{ on_change: refuse }")]);
        let mut first = Daemon::start(&text);
        first.wait_log("assigned partitions");
        if protocol == "consumer" {
            // Members of the new protocol cannot be listed; their committed offsets can be read.
            place.produce((0..10).map(|i| Sent::ticket(0, i, "hello")));
            until("an offset", || place.committed(0));
        }
        let config = file("kandle.yaml", &text);
        let (code, _, log) = run("run", &config, &["--set", "input.join=-"]);
        assert_eq!(code, 1, "{log}");
        assert!(log.contains("model.on_change is refuse"), "{log}");
        // A member with the same model may join.
        let mut second = Daemon::start(&text);
        second.wait_log("assigned partitions");
        first.stop();
    }
}

#[test]
fn a_drain_beside_a_daemon_of_its_group_is_refused() {
    let place = Place::new("beside", 2);
    place.produce((0..10).map(|i| Sent::ticket((i % 2) as i32, i, "hello")));
    let text = place.config(&NOOP);
    let mut daemon = Daemon::start(&text);
    daemon.wait_log("assigned partitions");
    let config = file("kandle.yaml", &text);
    let (code, _, log) = run("drain", &config, &[]);
    assert!(code == 1 && log.contains("has live members that are not drains (kandle-run-"), "{code} {log}");
    let (code, _, log) = run("drain", &config, &["--force"]);
    assert_eq!(code, 0, "{log}");
    daemon.stop();
    // A drain may use a group without members.
    let mut command: Command = kandle();
    let (code, _, log) = finish(command.args(["drain", "-c"]).arg(&config.path), b"");
    assert_eq!(code, 0, "{log}");
}
