//! `kandle compare` on a real Kafka: predictions of two topics, made by hand and by models.

use crate::support;

use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};
use support::registry::Registry;
use support::{File, Place, Sent, file, finish, kandle};

/// A place whose output topic is the first topic, and a second topic.
fn place(name: &str) -> (Place, String) {
    let place = Place::new(name, 2);
    let other = format!("{}-other", place.output);
    place.create(&other, 2, &[]);
    (place, other)
}

fn compare(config: &File, topics: [&str; 2], more: &[&str]) -> (i32, String, String) {
    let mut command = kandle();
    command.args(["compare", "--a", topics[0], "--b", topics[1], "-c"]).arg(&config.path).args(more);
    finish(&mut command, b"")
}

fn report(config: &File, topics: [&str; 2], more: &[&str]) -> Value {
    let (code, out, log) = compare(config, topics, &[&["--format", "json"], more].concat());
    assert_eq!(code, 0, "{log}");
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out} {log}"))
}

/// A record of a topic with predictions, about a position of the input.
fn prediction(place: &Place, (partition, offset): (i32, i64), value: Option<Value>) -> Sent {
    let header = |name: &str, value: String| (name.to_owned(), value);
    Sent {
        partition,
        value: value.map(|value| value.to_string().into_bytes()),
        headers: vec![
            header("kandle-source", format!("{}/{partition}/{offset}", place.input)),
            header("kandle-model", "org/m@1".to_owned()),
            header("kandle-model-digest", "00112233aabbccdd".to_owned()),
        ],
        ..Sent::default()
    }
}

fn label(label: &str, score: f64) -> Option<Value> {
    Some(json!({ "label": label, "score": score, "scores": { label: score } }))
}

fn produce(place: &Place, topic: &str, records: impl IntoIterator<Item = Sent>) {
    let name = String::new;
    let to = Place {
        brokers: place.brokers.clone(),
        input: topic.to_owned(),
        output: name(),
        dead: name(),
        group: name(),
    };
    to.produce(records);
}

/// What no reader of committed records sees.
fn produce_aborted(place: &Place, topic: &str, record: &Sent) {
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &place.brokers)
        .set("transactional.id", support::unique("compare"))
        .create()
        .expect("a producer");
    producer.init_transactions(support::TIMEOUT).expect("a transactional producer");
    producer.begin_transaction().expect("begun");
    let headers = record
        .headers
        .iter()
        .fold(OwnedHeaders::new(), |all, (key, value)| all.insert(Header { key, value: Some(value) }));
    let value = record.value.as_deref().expect("a value");
    let base =
        BaseRecord::<[u8], [u8]>::to(topic).partition(record.partition).payload(value).headers(headers);
    producer.send(base).expect("sent");
    producer.flush(support::TIMEOUT).expect("acknowledged");
    producer.abort_transaction(support::TIMEOUT).expect("aborted");
}

#[test]
fn predictions_are_matched_by_the_position_of_their_record() {
    let (place, other) = place("compare");
    let topics = [place.output.as_str(), other.as_str()];
    place.produce((0..100).map(|i| Sent::ticket((i % 2) as i32, i, "hello")));
    let all = || (0..100).map(|i| ((i % 2) as i32, i / 2));
    // Both have all of partition 0, of which the record at offset 5 was a tombstone. Of partition 1, b lacks the last ten.
    produce(
        &place,
        topics[0],
        all().map(|at| prediction(&place, at, label("<b>x", 0.75).filter(|_| at != (0, 5)))),
    );
    let of_b = all().filter(|at| at.0 == 0 || at.1 < 40).map(|at| {
        let value = match at {
            (0, 5) => None,
            (0, 7) => Some(json!("no prediction")),
            (_, offset) if offset % 10 == 0 => label("y", 0.5),
            _ => label("<b>x", 0.7),
        };
        prediction(&place, at, value)
    });
    produce(&place, topics[1], of_b);
    // A second prediction of a position, which does not count, records of no position, and one that was aborted.
    produce(
        &place,
        topics[1],
        [prediction(&place, (0, 3), label("y", 0.5)), Sent::new(0, "{}"), Sent::new(1, "{}")],
    );
    produce_aborted(&place, topics[1], &prediction(&place, (1, 45), label("y", 0.5)));

    let config = file("kandle.yaml", &place.config(&[]));
    let found = report(&config, topics, &[]);
    let input = &place.input;
    let coverage = json!({
        "both": 90, "only_a": 10, "only_b": 0,
        "only_a_offsets": { format!("{input}/1"): [[40, 49]] }, "only_b_offsets": {},
    });
    assert_eq!(found["coverage"], coverage, "{found:#}");
    let counts = |side: &str| {
        ["positions", "tombstones", "doubled", "others"]
            .map(|name| found[side][name].as_u64().expect("a number"))
    };
    assert_eq!((counts("a"), counts("b")), ([100, 1, 0, 0], [90, 1, 1, 2]), "{found:#}");
    let model = json!([{ "digest": "00112233aabbccdd", "model": "org/m@1", "positions": 90 }]);
    assert_eq!(found["b"]["models"], model);
    // These topics' timestamps are those of the producer, which tell nothing of kandle's speed.
    assert_eq!(found["a"].get("published"), None);

    let agreement = &found["agreement"];
    assert_eq!(
        (&agreement["compared"], &agreement["tombstones"], &agreement["not_compared"]),
        (&88.into(), &1.into(), &json!({ "unreadable": 1 }))
    );
    // Five of partition 0 and four of partition 1 have another label; the others' scores are 0.05 apart.
    let measures = &agreement["measures"];
    assert_eq!(measures[0]["name"], "label_equal");
    assert!((measures[0]["mean"].as_f64().expect("a mean") - 79.0 / 88.0).abs() < 1e-5, "{measures:#}");
    let distance = (79.0 * 0.05 + 9.0 * 0.75) / 88.0;
    assert!((measures[1]["mean"].as_f64().expect("a mean") - distance).abs() < 1e-5, "{measures:#}");
    let reached = &measures[1]["reached_by"];
    assert!(
        reached["half"].as_f64().is_some_and(|half| (0.05..0.0511).contains(&half)) && reached["all"] == 0.75,
        "{measures:#}"
    );
    let labels = json!([
        { "a": "<b>x", "b": "<b>x", "pairs": 79 },
        { "a": "<b>x", "b": "y", "pairs": 9 },
    ]);
    assert_eq!(agreement["labels"], labels);
    let listed = found["disagreements"].as_array().expect("a list");
    let offsets: Vec<_> =
        listed.iter().take(10).map(|of| (of["partition"].clone(), of["offset"].clone())).collect();
    let expected = [(0, 0), (0, 10), (0, 20), (0, 30), (0, 40), (1, 0), (1, 10), (1, 20), (1, 30), (0, 1)];
    assert_eq!(offsets, expected.map(|(partition, offset)| (partition.into(), offset.into())));
    assert_eq!((listed.len(), &listed[0]["topic"]), (88, &input.as_str().into()));
    assert_eq!(listed[0]["b"], r#"{"label":"y","score":0.5,"scores":{"y":0.5}}"#);

    // The same topics, the other way round.
    let turned = report(&config, [topics[1], topics[0]], &[]);
    assert_eq!(turned["coverage"]["only_b"], 10);
    assert_eq!(turned["agreement"]["measures"], found["agreement"]["measures"]);

    // A part of the input.
    let part = report(&config, topics, &["--from", "offset:10", "--to", "offset:20"]);
    assert_eq!((&part["coverage"]["both"], &part["agreement"]["compared"]), (&20.into(), &20.into()));
    assert_eq!(part["from"], "offset:10");

    // The same topics give the same bytes, in every form.
    for format in ["text", "json", "html"] {
        let written = file("report", "");
        let path = written.path.to_str().expect("a path");
        let (code, out, log) = compare(&config, topics, &["--format", format, "--output", path]);
        assert_eq!((code, out.as_str()), (0, ""), "{log}");
        let (_, again, _) = compare(&config, topics, &["--format", format]);
        assert_eq!(std::fs::read_to_string(&written.path).expect("a report"), again);
        match format {
            "text" => assert!(
                again.contains("coverage: 90 positions in both, 10 only in a, 0 only in b")
                    && again.contains("9 times \"<b>x\" and \"y\"")
                    && again.contains(&format!("{input}/1/30: label_equal 0, score_distance 0.75")),
                "{again}"
            ),
            "html" => assert!(
                again.starts_with("<!doctype html>")
                    && again.matches("<svg").count() == 2
                    && again.contains("<code>&lt;b&gt;x</code>")
                    && !again.contains("<b>")
                    && !again.contains("<script"),
                "{again}"
            ),
            _ => {}
        }
    }

    // With the broker's timestamps, the speed is known.
    let appended = format!("{}-appended", place.output);
    place.create(&appended, 1, &[("message.timestamp.type", "LogAppendTime")]);
    produce(&place, &appended, [prediction(&place, (0, 0), label("y", 0.5))]);
    support::until("the next millisecond of the broker's clock", || {
        produce(&place, &appended, [prediction(&place, (0, 1), label("y", 0.5))]);
        let found = report(&config, [topics[0], &appended], &["--set", "cost.per_hour=36"]);
        let published = &found["b"]["published"];
        let seconds = published["seconds"].as_f64()?;
        let cost = published["cost_per_million_records"].as_f64().expect("a cost");
        assert!((cost / (36.0 * seconds / 3600.0 / 2.0 * 1e6) - 1.0).abs() < 1e-4, "{published}");
        Some(())
    });
}

#[test]
fn a_wrong_command_line_is_refused() {
    let (place, other) = place("compare-wrong");
    let config = file("kandle.yaml", &place.config(&[]));
    let (code, _, log) = compare(&config, [&other, &other], &[]);
    assert!(code == 2 && log.contains("name two topics"), "{code} {log}");
    let (code, _, log) = compare(&config, [&other, "no-such-topic"], &[]);
    assert!(code == 2 && log.contains("no-such-topic does not exist"), "{code} {log}");
    // Nothing to compare is no error.
    let found = report(&config, [&place.output, &other], &[]);
    assert_eq!((&found["coverage"]["both"], &found["agreement"]["compared"]), (&0.into(), &0.into()));
    assert_eq!(found["agreement"]["measures"][0]["mean"], Value::Null);
    let (code, out, log) = compare(&config, [&place.output, &other], &[]);
    assert!(code == 0 && out.contains("0 pairs compared"), "{code} {out} {log}");
}

/// More predictions than fit into memory at a time.
#[test]
fn topics_that_are_larger_than_the_memory_limit_are_compared_in_blocks() {
    let (place, other) = place("compare-large");
    let topics = [place.output.as_str(), other.as_str()];
    let padding = "x".repeat(60_000);
    let records = |name: &'static str, count: i64| {
        let (place, padding) = (&place, &padding);
        (0..count).map(move |i| {
            let mut value = label(if i % 100 == 0 { name } else { "same" }, 0.5).expect("a value");
            value["padding"] = padding.as_str().into();
            prediction(place, ((i % 2) as i32, i / 2), Some(value))
        })
    };
    // Blocks of 8 MiB: the smaller topic has 18 MB.
    produce(&place, topics[0], records("a", 400));
    produce(&place, topics[1], records("b", 300));
    let limits = [("memory", "{ limit: 16MiB }"), ("window", "{ max_bytes: 1MiB }")];
    let config = file("kandle.yaml", &place.config(&limits));
    let (code, out, log) = compare(&config, topics, &["--format", "json"]);
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("pass=3") && !log.contains("pass=4"), "{log}");
    let found: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(found["coverage"]["both"], 300);
    assert_eq!(found["coverage"]["only_a"], 100);
    assert_eq!(found["agreement"]["labels"][0], json!({ "a": "same", "b": "same", "pairs": 297 }));
    // With enough memory, in one pass, the report is the same.
    let (_, whole, log) = compare(&config, topics, &["--format", "json", "--set", "memory.limit=1GiB"]);
    assert!(log.contains("pass=1") && !log.contains("pass=2"), "{log}");
    assert_eq!(whole, out);
}

/// A job and its shadow, in each format with a schema.
#[test]
fn predictions_with_schemas_are_read_with_the_registrys() {
    let registry = Registry::start();
    for format in ["avro", "protobuf", "json_schema"] {
        let (place, other) = place(&format!("compare-{}", format.replace('_', "-")));
        place.produce((0..30).map(|i| Sent::ticket((i % 2) as i32, i, "I was charged twice")));
        place.produce([Sent { partition: 0, ..Sent::default() }]);
        let output = format!("{{ topic: {}, format: {format}, include: [/id] }}", place.output);
        let registry = format!("{{ url: \"{}\" }}", registry.url);
        let shadow =
            format!("{{ topic: {other}, model: {{ source: bundled }}, task: {{ top_k: 1 }}, share: 1.0 }}");
        let more = [("output", &*output), ("registry", &*registry), ("shadow", &*shadow)];
        let config = file("kandle.yaml", &place.config(&more));
        let (code, _, log) = finish(kandle().args(["drain", "-c"]).arg(&config.path), b"");
        assert_eq!(code, 0, "{log}");
        assert!(!log.contains("cannot be compared"), "{log}");
        let found = report(&config, [&place.output, &other], &[]);
        let agreement = &found["agreement"];
        assert_eq!(
            (&agreement["compared"], &agreement["tombstones"], &agreement["not_compared"]),
            (&30.into(), &1.into(), &json!({})),
            "{format}: {found:#}"
        );
        assert_eq!(agreement["measures"][0]["mean"], 1.0, "{format}: {found:#}");
        assert!(agreement["measures"][1]["mean"].as_f64().is_some_and(|mean| mean > 0.0), "top_k: {found:#}");
        assert!(
            found["disagreements"][0]["b"].as_str().is_some_and(|shown| shown.starts_with("{\"label\":"))
        );
    }
}
