//! `kandle run` end to end on a real Kafka.

use crate::support;

use std::collections::{HashMap, HashSet};

use support::{Daemon, Place, Sent, assert_order, file, until};

const TEXTS: [&str; 4] = [
    "I was charged twice for my subscription in May.",
    "Where is my package? It was due a week ago.",
    "The app crashes every time I open it on my phone.",
    "I forgot my password and the reset email never arrives, please unlock my account and tell me how to log in again.",
];

#[test]
fn two_daemons_one_stopped_midway_lose_nothing() {
    let place = Place::new("two", 4);
    let total = 20_000;
    let config = place.config(&[("window", "{ max_wait: 100ms, max_records: 500 }")]);
    let mut first = Daemon::start(&config);
    let mut second = Daemon::start(&config);
    first.wait_log(" assigned partitions=");
    second.wait_log(" assigned partitions=");
    place
        .produce((0..total).map(|i| Sent::ticket((i % 4) as i32, i, &format!("{} ({i})", TEXTS[i / 4 % 4]))));
    // Midway: some predictions are there, not all.
    place.predictions(total / 4);
    first.stop();
    let got = place.read(&place.output, "a prediction for each input", |got| {
        got.len() >= total && got.iter().map(support::Got::source).collect::<HashSet<_>>().len() >= total
    });
    second.stop();
    assert_order(&got);
    let mut ids: HashMap<u64, u32> = HashMap::new();
    for record in &got {
        let json = record.json();
        *ids.entry(json["id"].as_u64().expect("an id")).or_default() += 1;
        assert!(json["scores"].as_object().is_some_and(|s| s.len() == 6), "{json}");
    }
    assert_eq!(ids.len(), total);
    // Both shut down cleanly, so nothing had to be read twice.
    assert_eq!(got.len(), total, "some were predicted twice");
    for partition in 0..4 {
        assert_eq!(place.committed(partition).expect("committed").0, total as i64 / 4);
    }
}

#[test]
fn a_member_that_joins_midway_takes_over_without_gaps_or_duplicates() {
    let place = Place::new("join", 4);
    let total = 12_000;
    let config = place.config(&[("window", "{ max_wait: 100ms, max_records: 300 }")]);
    place
        .produce((0..total).map(|i| Sent::ticket((i % 4) as i32, i, &format!("{} ({i})", TEXTS[i / 4 % 4]))));
    let mut first = Daemon::start(&config);
    place.predictions(total / 6);
    let mut second = Daemon::start(&config);
    // Some partitions moved, and the first member finished the records that it had of them.
    second.wait_log(&format!(" assigned partitions={}", place.input));
    assert!(first.log().contains("partitions revoked"), "{}", first.log());
    let got = place.predictions(total);
    first.stop();
    second.stop();
    assert_order(&got);
    let positions: HashSet<(i32, i64)> = got.iter().map(support::Got::source).collect();
    assert_eq!((positions.len(), place.predictions(total).len()), (total, total));
}

#[test]
fn predictions_carry_key_timestamp_headers_and_the_model() {
    let place = Place::new("carry", 2);
    let mut sent = Sent::ticket(1, 7, TEXTS[0]);
    sent.key = Some(b"k1".to_vec());
    sent.timestamp = Some(1_700_000_000_123);
    sent.headers = vec![("traceparent".to_owned(), "00-abc".to_owned()), ("mine".to_owned(), String::new())];
    let mut tombstone = sent.clone();
    tombstone.value = None;
    place.produce([sent.clone(), tombstone]);
    let mut daemon = Daemon::start(&place.config(&[]));
    let got = place.predictions(2);
    daemon.stop();
    let prediction = got.iter().find(|g| g.value.is_some()).expect("a prediction");
    assert_eq!(prediction.key, sent.key);
    assert_eq!(prediction.timestamp, sent.timestamp);
    assert_eq!(&prediction.headers[..2], &sent.headers[..]);
    assert_eq!(prediction.header("kandle-source"), Some(format!("{}/1/0", place.input).as_str()));
    assert_eq!(prediction.header("kandle-model"), Some("bundled"));
    let digest = prediction.header("kandle-model-digest").expect("a digest").to_owned();
    assert!(digest.len() == 16 && digest.chars().all(|c| c.is_ascii_hexdigit()), "{digest}");
    let json = prediction.json();
    assert_eq!((json["label"].as_str(), json["id"].as_u64()), (Some("billing"), Some(7)));
    assert_eq!(json["score"], json["scores"]["billing"]);
    let tombstone = got.iter().find(|g| g.value.is_none()).expect("a tombstone");
    assert_eq!((&tombstone.key, tombstone.timestamp), (&sent.key, sent.timestamp));
    assert_eq!(tombstone.header("kandle-source"), Some(format!("{}/1/1", place.input).as_str()));
    let (offset, metadata) = place.committed(1).expect("committed");
    assert_eq!(offset, 2);
    let metadata: serde_json::Value = serde_json::from_str(&metadata).expect("JSON");
    assert_eq!(metadata["digest"], digest.as_str());
}

#[test]
fn bad_records_become_dead_letters_and_their_neighbours_predictions() {
    let place = Place::new("bad", 1);
    let long = format!("{{\"id\":9,\"text\":\"{}\"}}", "late parcel ".repeat(10_000_000 / 12));
    let bad: Vec<(Vec<u8>, &str, &str)> = vec![
        (b"{not json".to_vec(), "decode", "not JSON"),
        (b"{\"id\":1}".to_vec(), "field", "\"/text\" is missing"),
        (b"{\"text\":17}".to_vec(), "field", "is a number, not a string"),
        (b"{\"text\":null}".to_vec(), "field", "is null"),
        (b"\xff\xfe".to_vec(), "decode", "not JSON"),
        (Vec::new(), "decode", "not JSON"),
    ];
    let mut sent = Vec::new();
    for (i, (value, ..)) in bad.iter().enumerate() {
        sent.push(Sent::ticket(0, 100 + i, TEXTS[i % 4]));
        let mut record = Sent::new(0, value.clone());
        record.key = Some(format!("key {i}").into_bytes());
        record.headers = vec![("h".to_owned(), i.to_string())];
        sent.push(record);
    }
    sent.push(Sent::ticket(0, 200, ""));
    sent.push(Sent::new(0, long.into_bytes()));
    sent.push(Sent::ticket(0, 201, TEXTS[3]));
    place.produce(sent.clone());
    let mut daemon = Daemon::start(&place.config(&[]));
    let good = place.predictions(bad.len() + 3);
    let dead = place.dead_letters(bad.len());
    let (_, metrics) = daemon.get("/metrics");
    daemon.stop();
    assert_order(&good);
    assert_eq!(good.len(), bad.len() + 3);
    for (i, (letter, (value, error, message))) in dead.iter().zip(&bad).enumerate() {
        assert_eq!(letter.value.as_deref().unwrap_or_default(), value.as_slice(), "{i}");
        assert_eq!(letter.key.as_deref(), Some(format!("key {i}").as_bytes()));
        assert_eq!(letter.headers[0], ("h".to_owned(), i.to_string()));
        assert_eq!(letter.header("kandle-source"), Some(format!("{}/0/{}", place.input, 2 * i + 1).as_str()));
        assert_eq!(letter.header("kandle-error"), Some(*error), "{i}");
        assert!(letter.header("kandle-error-message").is_some_and(|m| m.contains(message)), "{letter:?}");
        assert_eq!(letter.header("kandle-stage"), Some("decode"));
        assert!(letter.header("kandle-model-digest").is_some_and(|d| d.len() == 16));
    }
    for line in [
        format!("kandle_records_total{{outcome=\"predicted\",topic=\"{}\"}} {}", place.input, bad.len() + 3),
        format!("kandle_records_total{{outcome=\"dead_lettered\",topic=\"{}\"}} {}", place.input, bad.len()),
        "kandle_dead_letters_total{error=\"decode\"} 3".to_owned(),
        "kandle_dead_letters_total{error=\"field\"} 3".to_owned(),
        "kandle_truncated_records_total 1".to_owned(),
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line}\n{metrics}");
    }
}

#[test]
fn a_record_that_breaks_the_forward_is_found_by_bisection() {
    let place = Place::new("poison", 1);
    let model = support::poisoned_model();
    // All different, because equal texts are computed once.
    let texts = |i: usize| match i {
        37 | 90 => "a poison b".to_owned(),
        _ => "order ".repeat(i % 11 + 1) + &"late ".repeat(i / 11),
    };
    place.produce((0..120).map(|i| Sent::ticket(0, i, &texts(i))));
    let model = format!("{{ source: \"{}\" }}", model.path().display());
    let mut daemon = Daemon::start(&place.config(&[("model", &model)]));
    let good = place.predictions(118);
    let dead = place.dead_letters(2);
    let (_, metrics) = daemon.get("/metrics");
    daemon.stop();
    assert_order(&good);
    assert_eq!(dead.iter().map(|d| d.source().1).collect::<Vec<_>>(), [37, 90]);
    assert!(
        dead.iter()
            .all(|d| d.header("kandle-error") == Some("infer") && d.header("kandle-stage") == Some("infer"))
    );
    assert!(dead[0].header("kandle-error-message").is_some_and(|m| m.contains("token id")));
    assert!(!metrics.contains("kandle_bisections_total{cause=\"forward\"} 0"));
}

#[test]
fn with_overflow_dead_letter_texts_over_the_limit_become_dead_letters() {
    let place = Place::new("overflow", 1);
    place.produce([Sent::ticket(0, 0, TEXTS[0]), Sent::ticket(0, 1, &"late parcel ".repeat(200))]);
    let mut daemon =
        Daemon::start(&place.config(&[("task", "{ kind: text-classification, overflow: dead_letter }")]));
    let dead = place.dead_letters(1);
    assert_eq!(place.predictions(1)[0].source(), (0, 0));
    daemon.stop();
    assert_eq!(
        (dead[0].header("kandle-error"), dead[0].header("kandle-stage")),
        (Some("too_long"), Some("prepare"))
    );
}

#[test]
fn a_prediction_too_large_for_its_topic_becomes_a_dead_letter() {
    let place = Place::new("large", 1);
    let small = format!("{}-small", place.output);
    place.create(&small, 1, &[("max.message.bytes", "2000")]);
    let included = |n: usize| format!("{{\"id\":\"{}\",\"text\":\"late\"}}", "x".repeat(n));
    place.produce([Sent::new(0, included(10)), Sent::new(0, included(5000)), Sent::new(0, included(20))]);
    let output = format!("{{ topic: {small}, include: [/id] }}");
    let mut daemon = Daemon::start(&place.config(&[("output", &output)]));
    let dead = place.dead_letters(1);
    let good = place.read(&small, "two predictions", |got| got.len() >= 2);
    daemon.stop();
    assert_eq!(good.iter().map(|g| g.source().1).collect::<Vec<_>>(), [0, 2]);
    assert_eq!((dead[0].header("kandle-error"), dead[0].source()), (Some("too_large"), (0, 1)));
    assert_eq!(dead[0].value.as_deref().map(<[u8]>::len), Some(included(5000).len()));
}

#[test]
fn similarity_routes_to_the_nearest_candidates() {
    let place = Place::new("similar", 1);
    let candidates = file(
        "candidates.jsonl",
        "{\"id\":\"pay\",\"text\":\"I was charged twice, there is a wrong payment on my invoice.\"}\n\
         {\"id\":\"parcel\",\"text\":\"My parcel has not arrived, where is the delivery?\"}\n\
         {\"id\":\"login\",\"text\":\"I cannot log in to my account with my password.\"}\n",
    );
    place.produce([
        Sent::ticket(0, 0, "Where is my package? The delivery is late."),
        Sent::ticket(0, 1, "I forgot my password, please unlock my account."),
    ]);
    let task = format!("{{ kind: similarity, candidates: \"{}\", top_k: 2 }}", candidates.path.display());
    let mut daemon = Daemon::start(&place.config(&[("task", &task)]));
    let got = place.predictions(2);
    daemon.stop();
    for (record, id) in got.iter().zip(["parcel", "login"]) {
        let json = record.json();
        let matches = json["matches"].as_array().expect("matches");
        assert_eq!(matches.len(), 2);
        assert_eq!(matches[0]["id"], id, "{json}");
        assert!(matches[0]["score"].as_f64() >= matches[1]["score"].as_f64());
    }
}

/// The metrics after three records, each produced when the one before it was published.
fn one_by_one(name: &str, window: &str) -> String {
    let place = Place::new(name, 1);
    let mut daemon = Daemon::start(&place.config(&[("window", window)]));
    daemon.wait_log(" assigned partitions=");
    for i in 0..3 {
        place.produce([Sent::ticket(0, i, TEXTS[0])]);
        place.predictions(i + 1);
    }
    let (_, metrics) = daemon.get("/metrics");
    daemon.stop();
    metrics
}

#[test]
fn with_when_idle_close_an_idle_pipeline_closes_windows_at_once() {
    // Without when_idle, each record would wait ten minutes.
    let metrics = one_by_one("idle", "{ max_wait: 10m, max_records: 1000, when_idle: close }");
    assert!(metrics.contains("kandle_windows_total{closed_by=\"idle\"} 3\n"), "{metrics}");
}

/// Runs a task with its own model and checks the outcome of each record: a part of its prediction, or its error.
fn task_of_records(name: &str, model: &str, task: &str, records: &[(&str, Result<&str, &str>)]) {
    let place = Place::new(name, 1);
    place.produce(records.iter().map(|(record, _)| Sent::new(0, *record)));
    let source = format!("{{ source: \"{}/tests/fixtures/{model}\" }}", support::root().display());
    let mut daemon = Daemon::start(&place.config(&[("task", task), ("model", &source)]));
    let dead = place.dead_letters(records.iter().filter(|(_, outcome)| outcome.is_err()).count());
    let good = place.predictions(records.len() - dead.len());
    daemon.stop();
    let (mut dead, mut good) = (dead.iter(), good.iter());
    for (offset, (record, outcome)) in (0..).zip(records) {
        match outcome {
            Ok(part) => {
                let got = good.next().expect("a prediction");
                let value = got.json().to_string();
                assert_eq!(got.source(), (0, offset), "{value}");
                assert!(value.contains(part), "{value} of {record} lacks {part}");
            }
            Err(error) => {
                let got = dead.next().expect("a dead letter");
                assert_eq!(
                    (got.source(), got.header("kandle-error")),
                    ((0, offset), Some(*error)),
                    "{record}"
                );
                assert_eq!(got.value.as_deref(), Some(record.as_bytes()));
            }
        }
    }
}

#[test]
fn token_classification_finds_entities() {
    let long = format!(r#"{{"text": "{}"}}"#, "parcel to Müller ".repeat(40));
    task_of_records(
        "entities",
        "tokens-bert",
        "{ kind: token-classification, aggregation: none }",
        &[
            (
                r#"{"text": "Slow records where."}"#,
                Ok(r#""label":"B-PER","start":5,"end":12,"text":"records""#),
            ),
            (r#"{"text": ""}"#, Ok(r#"{"entities":[]}"#)),
            (r#"{"text": 7}"#, Err("field")),
            ("no json", Err("decode")),
            // Longer than the model's limit: entities at its end are found too.
            (&long, Ok(r#""start":663"#)),
        ],
    );
}

#[test]
fn reranking_scores_documents() {
    task_of_records(
        "reranking",
        "pairs-bert",
        "{ kind: reranking, documents: /documents, top_k: 1 }",
        &[
            (
                r#"{"text": "parcel", "documents": ["late", {"id": "b", "text": "parcel"}]}"#,
                Ok(r#""score":"#),
            ),
            (r#"{"text": "parcel", "documents": []}"#, Ok(r#"{"results":[]}"#)),
            (r#"{"text": "parcel"}"#, Err("field")),
            (r#"{"text": "parcel", "documents": "late"}"#, Err("field")),
            (r#"{"text": "parcel", "documents": [null]}"#, Err("field")),
            (r#"{"documents": ["late"]}"#, Err("field")),
        ],
    );
}

#[test]
fn zero_shot_classification_scores_labels() {
    task_of_records(
        "zero-shot",
        "nli-bert",
        "{ kind: zero-shot-classification, labels_field: /labels, overflow: dead_letter }",
        &[
            (r#"{"text": "where is it", "labels": ["parcel", "invoice"]}"#, Ok(r#""parcel":"#)),
            (r#"{"text": "where is it", "labels": ["parcel"]}"#, Ok(r#""label":"parcel""#)),
            (r#"{"text": "where is it", "labels": []}"#, Err("field")),
            (r#"{"text": "where is it", "labels": ["a", "a"]}"#, Err("field")),
            (r#"{"text": "where is it", "labels": [["a"]]}"#, Err("field")),
            (r#"{"text": "where is it"}"#, Err("field")),
            (&format!(r#"{{"text": "{}", "labels": ["a"]}}"#, "late ".repeat(60)), Err("too_long")),
            (&format!(r#"{{"text": "a", "labels": ["{}"]}}"#, "late ".repeat(60)), Err("too_long")),
        ],
    );
}

#[test]
fn windows_close_by_wait_counted_from_the_oldest_record() {
    // The wait starts with the record, not with the window before it.
    let metrics = one_by_one("wait", "{ max_wait: 300ms, max_records: 1000 }");
    let value = |name: &str| -> f64 {
        metrics
            .lines()
            .find_map(|l| l.strip_prefix(name)?.trim().parse().ok())
            .unwrap_or_else(|| panic!("{name}\n{metrics}"))
    };
    assert_eq!(value("kandle_windows_total{closed_by=\"wait\"}"), 3.0);
    let mean = value("kandle_record_latency_seconds_sum") / value("kandle_record_latency_seconds_count");
    assert!(mean >= 0.29, "waited {mean} s");
}

#[test]
fn a_full_pipeline_pauses_and_stays_in_the_group() {
    let place = Place::new("full", 2);
    // The backlog takes longer than max.poll.interval.ms.
    let input = "{ topics: [$INPUT], group: $GROUP, field: /text, properties: { max.poll.interval.ms: 6000, session.timeout.ms: 6000 } }";
    let long = TEXTS[3].repeat(8);
    let total = 3000;
    place.produce((0..total).map(|i| Sent::ticket((i % 2) as i32, i, &format!("{i} {long}"))));
    let config =
        place.config(&[("input", input), ("window", "{ max_records: 200 }"), ("log", "{ level: debug }")]);
    let mut daemon = Daemon::start(&config);
    let got = place.predictions(total);
    let log = daemon.log();
    daemon.stop();
    assert_order(&got);
    assert_eq!(got.len(), total);
    assert!(log.contains("paused: the pipeline is full"), "it was never full:\n{log}");
    assert!(!log.contains("partitions revoked"), "the member lost its partitions:\n{log}");
}

#[test]
fn a_changed_model_is_logged_or_refused() {
    let place = Place::new("change", 1);
    place.produce([Sent::ticket(0, 0, TEXTS[0])]);
    let mut daemon = Daemon::start(&place.config(&[]));
    place.predictions(1);
    until("a commit", || place.committed(0));
    daemon.stop();
    // top_k changes predictions, so this is another model.
    let task = ("task", "{ kind: text-classification, top_k: 1 }");
    let mut warned = Daemon::start(&place.config(&[task]));
    warned.wait_log("the model changed");
    warned.wait_log("before offset 1");
    warned.stop();
    let mut refused =
        Daemon::start(&place.config(&[task, ("model", "{ source: bundled, on_change: refuse }")]));
    let status = refused.wait();
    assert_eq!(status.code(), Some(1));
    assert!(refused.log().contains("model.on_change is refuse"), "{}", refused.log());
    // The same model may start.
    let mut same = Daemon::start(&place.config(&[("model", "{ source: bundled, on_change: refuse }")]));
    same.wait_log(" assigned partitions=");
    same.stop();
}

#[test]
fn keys_choose_the_partition_like_the_java_client() {
    let place = Place::new("murmur", 4);
    // Partitions of four that Java's DefaultPartitioner gives these keys:
    // toPositive(murmur2(key)) % 4, computed by Kafka's own Utils.murmur2.
    let java = [("a", 0), ("key-1", 0), ("customer 4711", 2), ("größe", 0), ("", 1)];
    place.produce(java.iter().enumerate().map(|(i, (key, _))| {
        let mut sent = Sent::ticket(0, i, TEXTS[0]);
        sent.key = Some(key.as_bytes().to_vec());
        sent
    }));
    let mut daemon = Daemon::start(&place.config(&[]));
    let got = place.predictions(java.len());
    daemon.stop();
    let mut by_key: Vec<(String, i32)> = got
        .iter()
        .map(|g| (String::from_utf8_lossy(g.key.as_deref().unwrap_or_default()).into_owned(), g.partition))
        .collect();
    by_key.sort();
    let mut want: Vec<(String, i32)> = java.iter().map(|(k, p)| (k.to_string(), *p)).collect();
    want.sort();
    assert_eq!(by_key, want);
}

#[test]
fn the_admin_server_shows_health_status_and_both_metric_formats() {
    let place = Place::new("admin", 2);
    let mut daemon = Daemon::start(&place.config(&[]));
    daemon.wait_log(" assigned partitions=");
    place.produce((0..10).map(|i| Sent::ticket((i % 2) as i32, i, TEXTS[i % 4])));
    place.predictions(10);
    assert_eq!(daemon.get("/livez").0, 200);
    until("readiness", || (daemon.get("/readyz").0 == 200).then_some(()));
    let status = until("the assignment in /status", || {
        let status: serde_json::Value = serde_json::from_str(&daemon.get("/status").1).expect("JSON");
        let caught_up =
            status["source"]["lag_records"] == 0 && status["source"]["assignment"][0]["committed"] == 5;
        caught_up.then_some(status)
    });
    assert_eq!(status["source"]["assignment"].as_array().map(Vec::len), Some(2));
    assert_eq!(status["model"]["task"], "text-classification");
    let (_, text) = daemon.get("/metrics");
    // This job has no drift.reference and no shadow.
    let expected = |name: &str| name != "kandle_drift" && !name.starts_with("kandle_shadow_");
    for (name, ..) in kandle::telemetry::TABLE.iter().filter(|(name, ..)| expected(name)) {
        assert!(text.contains(&format!("# TYPE {name} ")), "{name} is missing from /metrics\n{text}");
    }
    for partition in 0..2 {
        let labels = format!("{{partition=\"{partition}\",topic=\"{}\"}} 0", place.input);
        assert!(text.contains(&format!("kandle_lag_records{labels}")), "{text}");
        assert!(text.contains(&format!("kandle_lag_seconds{labels}")), "{text}");
    }
    let (_, open) = daemon.get_as("/metrics", "application/openmetrics-text; version=1.0.0");
    assert!(open.ends_with("# EOF\n") && open.contains("# TYPE kandle_records counter"), "{open}");
    daemon.stop();
}

#[test]
fn kafka_unreachable_at_the_start_is_logged_and_waited_for() {
    let place = Place::new("away", 1);
    // A port that nobody listens on.
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let started = std::time::Instant::now();
    let kafka = format!("{{ brokers: \"127.0.0.1:{port}\" }}");
    let mut daemon = Daemon::start(&place.config(&[("kafka", &kafka)]));
    let line = daemon.wait_log("cannot be reached");
    assert!(started.elapsed().as_secs() < 10, "logged after {:?}", started.elapsed());
    assert!(line.contains(&format!("127.0.0.1:{port}")) && line.contains("trying again"), "{line}");
    until("a second attempt", || (daemon.log().matches("cannot be reached").count() >= 2).then_some(()));
    assert_eq!(daemon.get("/livez").0, 200);
    assert_eq!(daemon.get("/readyz").0, 503);
    daemon.stop();
}

#[test]
fn a_missing_topic_is_named_and_waited_for() {
    let place = Place::new("missing", 1);
    let later = format!("{}-later", place.output);
    let output = format!("{{ topic: {later} }}");
    let mut daemon = Daemon::start(&place.config(&[("output", &output)]));
    let line = daemon.wait_log("does not exist");
    assert!(line.contains("output.topic") && line.contains(&later), "{line}");
    place.create(&later, 1, &[]);
    place.produce([Sent::ticket(0, 0, TEXTS[0])]);
    place.read(&later, "a prediction", |got| !got.is_empty());
    daemon.stop();
}
