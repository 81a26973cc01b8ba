//! References, drift and samples on a real Kafka.

use crate::support;

use std::collections::{BTreeMap, BTreeSet};

use kandle::record::Partition;
use kandle::share::Share;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use serde_json::{Value, json};
use support::registry::Registry;
use support::{Daemon, File, GUARANTEES, Got, NOOP, Place, Sent, TIMEOUT, file, finish, kandle, root, until};

fn tickets() -> Vec<Value> {
    let tickets = std::fs::read_to_string(root().join("demo/tickets.jsonl")).expect("tickets");
    tickets.lines().map(|line| serde_json::from_str(line).expect("a ticket")).collect()
}

/// Runs `kandle COMMAND -c CONFIG MORE…` to its end; returns exit code, standard output, log.
fn run(command: &str, config: &File, more: &[&str]) -> (i32, String, String) {
    finish(kandle().arg(command).arg("-c").arg(&config.path).args(more), b"")
}

/// The value of a metric, with its labels as they are written.
fn metric(daemon: &mut Daemon, name: &str) -> Option<f64> {
    let (_, text) = daemon.get("/metrics");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
    line.and_then(|value| value.trim().parse().ok())
}

#[test]
fn predictions_are_compared_with_a_reference() {
    let place = Place::new("drift", 2);
    let tickets = tickets();
    let ticket = |i: usize| {
        Sent::new(
            (i % 2) as i32,
            json!({ "id": i, "text": tickets[i * 7 % tickets.len()]["text"] }).to_string(),
        )
    };
    place.produce((0..600).map(ticket));
    let plain = file("kandle.yaml", &place.config(&[]));
    let (code, _, log) = run("drain", &plain, &[]);
    assert_eq!(code, 0, "{log}");
    let first = place.predictions(600);

    let made = file("reference.json", "");
    let path = made.path.to_str().expect("a path");
    let range = ["--from", "offset:0", "--to", "offset:100000"];
    let (code, out, log) = run("reference", &plain, &[&range[..], &["--output", path]].concat());
    assert_eq!(code, 0, "{log}");
    assert!(out.contains("600 predictions of "), "{out}");
    let text = std::fs::read_to_string(&made.path).expect("written");
    let mut reference: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(reference["records"], 600);
    assert_eq!(reference["task"], "text-classification");
    assert_eq!(reference["digest"], first[0].header("kandle-model-digest").expect("a digest"));
    assert_eq!(reference["model"], first[0].header("kandle-model").expect("a model"));
    let mut labels = BTreeMap::<String, u64>::new();
    for got in &first {
        *labels.entry(got.json()["label"].as_str().expect("a label").to_owned()).or_default() += 1;
    }
    assert_eq!(reference["distributions"]["label"]["labels"], json!(labels));
    assert!(reference["distributions"]["entropy"]["counts"].is_array(), "{text}");
    let (_, printed, _) = run("reference", &plain, &range);
    assert_eq!(serde_json::from_str::<Value>(&printed).expect("JSON"), reference, "without --output");

    let drift = format!("{{ reference: {path}, window: 400 }}");
    let watching = place.config(&[("drift", &drift)]);
    let config = file("kandle.yaml", &watching);
    let (code, out, _) = run("check", &config, &[]);
    assert!(code == 0 && out.contains("ok    drift reference: 600 predictions"), "{out}");
    let mut daemon = Daemon::start(&watching);
    place.produce((0..600).map(ticket));
    let label = "kandle_drift{measure=\"psi\",of=\"label\"}";
    place.predictions(1200);
    until("all to be counted", || {
        let total: f64 = labels
            .keys()
            .filter_map(|label| {
                metric(&mut daemon, &format!("kandle_predictions_total{{label=\"{label}\"}}"))
            })
            .sum();
        (total == 600.0).then_some(())
    });
    let psi = metric(&mut daemon, label).expect("measured");
    assert!(psi < 0.05, "the same mix: {psi}");
    assert_eq!(metric(&mut daemon, "kandle_drift_threshold"), Some(0.2));
    let status =
        |daemon: &mut Daemon| -> Value { serde_json::from_str(&daemon.get("/status").1).expect("JSON") };
    assert_eq!(status(&mut daemon)["drift"]["drifted"], json!([]));
    assert!(!daemon.log().contains("have drifted"), "{}", daemon.log());

    // Only tickets of one label.
    let one = first.iter().find(|got| got.json()["label"] == *labels.keys().next().expect("a label"));
    let (partition, offset) = one.expect("a prediction").source();
    let text = tickets[(offset as usize * 2 + partition as usize) * 7 % tickets.len()]["text"].to_string();
    place.produce((0..600).map(|i| Sent::new(i % 2, format!("{{\"id\":{i},\"text\":{text}}}"))));
    until("the drift", || metric(&mut daemon, label).filter(|psi| *psi > 0.2));
    daemon.wait_log("predictions have drifted");
    let drift = status(&mut daemon)["drift"].take();
    assert!(drift["drifted"].as_array().expect("a list").contains(&json!("label")), "{drift}");
    let js = metric(&mut daemon, "kandle_drift{measure=\"js\",of=\"label\"}").expect("measured");
    assert!(js > 0.2 && js <= 1.0, "{js}");
    daemon.stop();

    // References that do not fit.
    let refused = |reference: &Value, part: &str| {
        std::fs::write(&made.path, reference.to_string()).expect("written");
        let (code, _, log) = run("run", &config, &[]);
        assert!(code == 2 && log.contains(part), "{code} {log}");
        let (code, out, _) = run("check", &config, &[]);
        assert!(code == 1 && out.contains("FAIL  drift reference") && out.contains(part), "{out}");
    };
    let mut other = reference.clone();
    other["distributions"]["label"]["labels"]["weather"] = 7.into();
    refused(&other, "the model has no label weather");
    other["task"] = "zero-shot-classification".into();
    refused(&other, "task.kind: zero-shot-classification");
    refused(&json!({ "records": 3 }), "is not a reference");
    reference["digest"] = "0123456789abcdef".into();
    std::fs::write(&made.path, reference.to_string()).expect("written");
    let mut daemon = Daemon::start(&watching);
    daemon.wait_log("drift.reference may not fit the model");
    daemon.stop();
    std::fs::remove_file(&made.path).expect("removed");
    let (code, _, log) = run("run", &config, &[]);
    assert!(code == 2 && log.contains("drift.reference") && log.contains("No such file"), "{code} {log}");
}

/// The metrics of a task's predictions say what the predictions say.
#[test]
fn each_task_has_the_metrics_of_what_its_predictions_show() {
    let model = |name: &str| {
        format!("{{ source: {}, dtype: f32 }}", root().join("tests/fixtures").join(name).display())
    };
    let started = |name: &str, task: &str, model: &str, records: &[Value]| {
        let place = Place::new(name, 1);
        let output = format!("{{ topic: {} }}", place.output);
        let more = [("task", task), ("model", model), ("output", output.as_str())];
        let mut daemon = Daemon::start(&place.config(&more));
        place.produce(records.iter().map(|record| Sent::new(0, record.to_string())));
        let got = place.predictions(records.len());
        let all = format!("kandle_records_total{{outcome=\"predicted\",topic=\"{}\"}}", place.input);
        until("the window to be counted", || {
            (metric(&mut daemon, &all) == Some(records.len() as f64)).then_some(())
        });
        (daemon, got)
    };

    // The fixture's vocabulary has no snowman.
    let texts =
        ["Records crash token 42 price.", "Update!", "", "\u{2603} \u{2603} records", "Slow records where."];
    let records: Vec<Value> = texts.iter().map(|text| json!({ "text": text })).collect();
    let task = "{ kind: token-classification, aggregation: simple }";
    let (mut daemon, got) = started("entities", task, &model("tokens-bert"), &records);
    let (mut labels, mut without) = (BTreeMap::<String, f64>::new(), 0.0);
    for prediction in got.iter().map(Got::json) {
        let entities = prediction["entities"].as_array().expect("entities");
        without += f64::from(u8::from(entities.is_empty()));
        for entity in entities {
            *labels.entry(entity["label"].as_str().expect("a label").to_owned()).or_default() += 1.0;
        }
    }
    assert!(without > 0.0 && labels.len() > 1, "{labels:?}");
    assert_eq!(metric(&mut daemon, "kandle_records_without_entities_total"), Some(without));
    for (label, count) in &labels {
        assert_eq!(
            metric(&mut daemon, &format!("kandle_predictions_total{{label=\"{label}\"}}")),
            Some(*count)
        );
    }
    assert_eq!(metric(&mut daemon, "kandle_prediction_score_count"), Some(labels.values().sum()));
    assert_eq!(metric(&mut daemon, "kandle_prediction_entropy_count"), Some(0.0));
    assert_eq!(metric(&mut daemon, "kandle_record_units_count{unit=\"tokens\"}"), Some(texts.len() as f64));
    let sum = metric(&mut daemon, "kandle_record_units_sum{unit=\"tokens\"}");
    assert_eq!(sum, metric(&mut daemon, "kandle_tokens_total"));
    assert_eq!(metric(&mut daemon, "kandle_unknown_tokens_total"), Some(2.0));
    daemon.stop();

    let (mut daemon, _) = started("norms", "{ kind: text-embedding }", &model("embed-qwen3"), &records[..2]);
    assert_eq!(metric(&mut daemon, "kandle_embedding_norm_count"), Some(2.0));
    let length = metric(&mut daemon, "kandle_embedding_norm_sum").expect("measured") / 2.0;
    assert!(length > 0.0 && (length - 1.0).abs() > 1e-3, "before it is scaled: {length}");
    assert_eq!(metric(&mut daemon, "kandle_prediction_score_count"), Some(0.0));
    daemon.stop();

    let records = [
        json!({ "text": "late parcel", "documents": ["where is it", "an invoice"] }),
        json!({ "text": "x", "documents": [] }),
    ];
    let task = "{ kind: reranking, documents: /documents }";
    let (mut daemon, got) = started("ranked", task, &model("pairs-bert"), &records);
    assert_eq!(metric(&mut daemon, "kandle_prediction_score_count"), Some(1.0));
    let best = got[0].json()["results"][0]["score"].as_f64().expect("a score");
    let counted = metric(&mut daemon, "kandle_prediction_score_sum").expect("counted");
    assert!((counted - best).abs() < 1e-6, "{counted} is not {best}");
    daemon.stop();
}

#[test]
fn a_range_with_predictions_of_two_models_needs_a_choice() {
    let place = Place::new("reference-two", 1);
    let config = file("kandle.yaml", &place.config(&[]));
    place.produce((0..30).map(|i| Sent::ticket(0, i, "where is my parcel?")));
    assert_eq!(run("drain", &config, &[]).0, 0);
    place.produce((0..20).map(|i| Sent::ticket(0, i, "where is my parcel?")));
    // The digest covers the settings that change a prediction.
    assert_eq!(run("drain", &config, &["--set", "task.top_k=1"]).0, 0);
    let got = place.predictions(50);
    let digest = |at: usize| got[at].header("kandle-model-digest").expect("a digest");
    assert_ne!(digest(0), digest(49));
    let range = ["--from", "offset:0", "--to", "offset:1000"];
    let (code, _, log) = run("reference", &config, &range);
    assert!(
        code == 1 && log.contains("several models") && log.contains(digest(0)) && log.contains(digest(49)),
        "{log}"
    );
    let (code, out, log) = run("reference", &config, &[&range[..], &["--digest", digest(49)]].concat());
    assert_eq!(code, 0, "{log}");
    let made: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((&made["records"], &made["digest"]), (&json!(20), &json!(digest(49))));
    // Tasks that show nothing have no reference.
    let noop = file("kandle.yaml", &place.config(&NOOP));
    let (code, _, log) = run("reference", &noop, &range);
    assert!(code == 1 && log.contains("show nothing to compare"), "{log}");
}

/// A reference of predictions in another format equals that of the same predictions in JSON; samples are JSON anyway.
#[test]
fn every_output_format_has_a_reference_and_samples() {
    let registry = Registry::start();
    let tickets = tickets();
    for format in ["avro", "protobuf", "json_schema"] {
        let place = Place::new("reference-format", 1);
        let (samples, json) = (format!("{}-s", place.output), format!("{}-j", place.output));
        [&samples, &json].iter().for_each(|topic| place.create(topic, 1, &[]));
        place.produce(tickets.iter().take(80).map(|ticket| Sent::new(0, ticket.to_string())));
        let (output, of_samples, url) = (
            format!("{{ topic: $OUTPUT, format: {format} }}"),
            format!("{{ topic: {samples}, share: 1 }}"),
            format!("{{ url: \"{}\" }}", registry.url),
        );
        let more =
            [("output", output.as_str()), ("samples", of_samples.as_str()), ("registry", url.as_str())];
        let config = file("kandle.yaml", &place.config(&more));
        let (code, _, log) = run("drain", &config, &[]);
        assert_eq!(code, 0, "{format}: {log}");
        let plain = file("kandle.yaml", &place.config(&[("output", &format!("{{ topic: {json} }}"))]));
        let range = ["--from", "offset:0", "--to", "offset:1000"];
        let (code, _, log) = run("replay", &plain, &range);
        assert_eq!(code, 0, "{log}");
        let distributions = |config: &File| -> Value {
            let (code, out, log) = run("reference", config, &range);
            assert_eq!(code, 0, "{format}: {log}");
            let mut reference: Value = serde_json::from_str(&out).expect("JSON");
            assert_eq!(reference["records"], 80, "{format}");
            reference["distributions"].take()
        };
        assert_eq!(distributions(&config), distributions(&plain), "{format}");
        let published = place.read(&json, "the predictions in JSON", |got| got.len() >= 80);
        let of = place.read(&samples, "the samples", |got| got.len() >= 80);
        for (sample, prediction) in of.iter().zip(&published) {
            assert_eq!(sample.source(), prediction.source());
            assert_eq!(sample.json()["prediction"], prediction.json(), "{format}");
            assert_eq!(sample.json()["input"], tickets[sample.source().1 as usize]);
        }
    }
}

const SHARE: f64 = 0.2;
const START: i64 = 1_790_000_000_000;

/// Record `i`: every third has no key.
fn record(i: usize) -> Sent {
    let value =
        format!(r#"{{ "id": {i}, "text": "where is parcel {i}?", "who": {{ "mail": "a@b", "n": 1.10 }} }}"#);
    Sent {
        key: (!i.is_multiple_of(3)).then(|| format!("customer-{i}").into_bytes()),
        timestamp: Some(START + i as i64),
        ..Sent::new((i % 2) as i32, value)
    }
}

/// Those of the first `count` records that are to be samples: partition and offset.
fn expected(place: &Place, count: usize) -> BTreeSet<(i32, i64)> {
    let position = |i: usize| ((i % 2) as i32, (i / 2) as i64);
    let takes = |i: &usize| {
        let (partition, offset) = position(*i);
        let partition = Partition::new(place.input.as_str(), partition);
        Share::new(SHARE).holds(record(*i).key.as_deref(), (&partition, offset))
    };
    (0..count).filter(takes).map(position).collect()
}

fn sources(got: &[Got]) -> BTreeSet<(i32, i64)> {
    got.iter().map(Got::source).collect()
}

#[test]
fn samples_are_published_beside_the_predictions_and_a_replay_chooses_the_same() {
    const COUNT: usize = 500;
    for guarantee in GUARANTEES {
        let place = Place::new("samples", 2);
        let (samples, again, other) =
            (format!("{}-s", place.output), format!("{}-t", place.output), format!("{}-u", place.output));
        [&samples, &again, &other].iter().for_each(|topic| place.create(topic, 2, &[]));
        let of_samples = format!("{{ topic: {samples}, share: {SHARE}, redact: [/who/mail] }}");
        let output = "{ topic: $OUTPUT, include: [/id, /who] }";
        let config = place.config(&[("samples", &of_samples), ("output", output), ("delivery", guarantee)]);
        place.produce((0..COUNT).map(record));
        let mut daemon = Daemon::start(&config);
        let predictions: BTreeMap<(i32, i64), Value> =
            place.predictions(COUNT).iter().map(|got| (got.source(), got.json())).collect();
        let wanted = expected(&place, COUNT);
        assert!((40..160).contains(&wanted.len()), "{}", wanted.len());
        let published = "kandle_samples_total{outcome=\"published\"}";
        until("the samples to be counted", || {
            (metric(&mut daemon, published) == Some(wanted.len() as f64)).then_some(())
        });
        daemon.stop();
        let got = place.read(&samples, "the samples", |got| got.len() >= wanted.len());
        assert_eq!((sources(&got), got.len()), (wanted.clone(), wanted.len()), "{guarantee}");
        for sample in &got {
            let (partition, offset) = sample.source();
            let i = offset as usize * 2 + partition as usize;
            let sent = record(i);
            assert_eq!((&sample.key, sample.timestamp), (&sent.key, sent.timestamp));
            let digest = sample.header("kandle-model-digest").expect("a digest");
            assert_eq!((sample.headers.len(), digest.len()), (2, 16));
            let mut prediction = predictions[&sample.source()].clone();
            assert_eq!(prediction["who"]["mail"], "a@b");
            prediction["who"]["mail"] = Value::Null;
            let input = json!({
                "id": i, "text": format!("where is parcel {i}?"), "who": { "mail": null, "n": 1.1 },
            });
            assert_eq!(sample.json(), json!({ "input": input, "prediction": prediction }));
        }
        // The same records, into other topics.
        let config = file("kandle.yaml", &config);
        let set = [format!("output.topic={other}"), format!("samples.topic={again}")];
        let replay = ["--from", "offset:0", "--to", "offset:1000", "--set", &set[0], "--set", &set[1]];
        let (code, _, log) = run("replay", &config, &replay);
        assert_eq!(code, 0, "{log}");
        let got = place.read(&again, "the samples again", |got| got.len() >= wanted.len());
        assert_eq!((sources(&got), got.len()), (wanted.clone(), wanted.len()), "{guarantee}");
    }
}

/// The limit is known, or has just changed so that the broker refuses the batch.
#[test]
fn a_sample_that_is_too_large_is_left_out() {
    for (guarantee, known) in
        GUARANTEES.into_iter().flat_map(|guarantee| [(guarantee, true), (guarantee, false)])
    {
        let place = Place::new("samples-large", 1);
        let samples = format!("{}-s", place.output);
        let limit: &[(&str, &str)] = if known { &[("max.message.bytes", "2000")] } else { &[] };
        place.create(&samples, 1, limit);
        let of_samples = format!("{{ topic: {samples}, share: 1 }}");
        let more = [("samples", of_samples.as_str()), ("delivery", guarantee)];
        let mut daemon = Daemon::start(&place.config(&[&NOOP[..], &more].concat()));
        place.produce([Sent::ticket(0, 0, "small")]);
        place.predictions(1);
        if !known {
            place.configure(&samples, "max.message.bytes", "2000");
        }
        let large = "x".repeat(3000);
        let text = |i: usize| if i.is_multiple_of(4) { large.as_str() } else { "small" };
        place.produce((1..41).map(|i| Sent::ticket(0, i, text(i))));
        let got = place.predictions(41);
        assert_eq!((got.len(), sources(&got).len()), (41, 41), "{guarantee}: {}", daemon.log());
        let outcome = |daemon: &mut Daemon, name: &str| {
            metric(daemon, &format!("kandle_samples_total{{outcome=\"{name}\"}}"))
        };
        until("all samples to be settled", || {
            let all =
                ["published", "too_large", "refused"].map(|name| outcome(&mut daemon, name).unwrap_or(0.0));
            (all.iter().sum::<f64>() == 41.0).then_some(())
        });
        assert_eq!(
            outcome(&mut daemon, "too_large"),
            Some(10.0),
            "{guarantee}, known: {known}: {}",
            daemon.log()
        );
        assert_eq!(outcome(&mut daemon, "published"), Some(31.0), "{guarantee}, known: {known}");
        let (_, metrics) = daemon.get("/metrics");
        let dead = metrics.lines().any(|line| line.contains("outcome=\"dead_lettered\""));
        assert!(!dead, "{guarantee}: {metrics}");
        daemon.stop();
        let got = place.read(&samples, "the samples", |got| sources(got).len() >= 31);
        assert_eq!(sources(&got).len(), 31);
        assert!(got.iter().all(|got| got.json()["input"] == got.json()["prediction"]), "noop");
    }
}

#[test]
fn a_kill_between_publishing_and_commit_doubles_no_sample_under_exactly_once() {
    const COUNT: usize = 300;
    let place = Place::new("samples-kill", 2);
    let samples = format!("{}-s", place.output);
    place.create(&samples, 2, &[]);
    let of_samples = format!("{{ topic: {samples}, share: {SHARE} }}");
    let more = [
        ("samples", of_samples.as_str()),
        ("delivery", "{ guarantee: exactly_once, commit_interval: 50ms }"),
        ("window", "{ max_records: 20 }"),
    ];
    let config = place.config(&[&NOOP[..], &more].concat());
    place.produce((0..COUNT).map(record));
    // Stops when the first transaction is acknowledged, before it is committed.
    let mut daemon = Daemon::start_with(&config, |command| {
        command.env("FAILPOINTS", "offsets=pause");
    });
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &place.brokers)
        .set("isolation.level", "read_uncommitted")
        .create()
        .expect("a client");
    until("samples that are not committed", || {
        let high = |partition| client.fetch_watermarks(&samples, partition, TIMEOUT).map(|(_, high)| high);
        (0..2).any(|partition| high(partition).is_ok_and(|high| high > 0)).then_some(())
    });
    daemon.kill();
    let mut daemon = Daemon::start(&config);
    let got = place.predictions(COUNT);
    assert_eq!(got.len(), COUNT);
    daemon.stop();
    let wanted = expected(&place, COUNT);
    let got = place.read(&samples, "the samples", |got| got.len() >= wanted.len());
    assert_eq!((got.len(), sources(&got)), (wanted.len(), wanted));
}

#[test]
fn check_tries_the_topic_of_the_samples() {
    let place = Place::new("samples-check", 1);
    let samples = format!("{}-none", place.output);
    let of_samples = format!("{{ topic: {samples} }}");
    let more = [("samples", of_samples.as_str())];
    let config = file("kandle.yaml", &place.config(&[&NOOP[..], &more].concat()));
    let (code, out, _) = run("check", &config, &[]);
    assert!(code == 1 && out.contains(&format!("FAIL  samples.topic {samples}")), "{out}");
    place.create(&samples, 3, &[]);
    let (code, out, _) = run("check", &config, &[]);
    assert!(code == 0 && out.contains(&format!("ok    samples.topic {samples}: 3 partitions")), "{out}");
    assert!(out.contains(&format!("Write on topic {samples}")), "{out}");
}
