//! The shadow on a real Kafka: which records it sees, and that the model never waits for it.

use crate::support;

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};
use support::ledger::Ledger;
use support::{Daemon, GUARANTEES, Got, Place, Sent, file, finish, kandle, until};

/// A place, and a topic for the shadow.
fn place(name: &str, config: &[(&str, &str)]) -> (Place, String) {
    let place = Place::new(name, 2);
    let shadow = format!("{}-shadow", place.output);
    place.create(&shadow, 2, config);
    (place, shadow)
}

fn section(topic: &str, more: &str) -> String {
    format!("{{ topic: {topic}, model: {{ source: bundled }}, task: {{ top_k: 1 }}, {more} }}")
}

/// The section `input` of a job that may be killed: its partitions are free again soon.
fn brief_sessions(place: &Place) -> String {
    format!(
        "{{ topics: [{}], group: {}, field: /text, properties: {{ session.timeout.ms: 6000 }} }}",
        place.input, place.group
    )
}

/// A metric's value; 0 while there is none.
fn metric(daemon: &mut Daemon, name: &str) -> f64 {
    let (_, text) = daemon.get("/metrics");
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0.0)
}

fn outcome(daemon: &mut Daemon, outcome: &str) -> u64 {
    metric(daemon, &format!("kandle_shadow_records_total{{outcome=\"{outcome}\"}}")) as u64
}

/// As docs/compare.md describes it.
fn is_chosen(text: &[u8], share: f64) -> bool {
    let digest = Sha256::digest(text);
    let number = u64::from_be_bytes(digest[..8].try_into().expect("8 bytes"));
    (number as f64) < share * 2f64.powi(64)
}

/// Records with and without keys, and tombstones. Of each five, two have a key.
fn records(count: usize) -> Vec<Sent> {
    let record = |i: usize| {
        let key = (i % 5 < 2).then(|| format!("customer-{}", i / 2).into_bytes());
        let value =
            (i % 7 != 3).then(|| format!("{{\"id\":{i},\"text\":\"I was charged twice, order {i}\"}}"));
        Sent {
            partition: (i % 2) as i32,
            key,
            value: value.map(String::into_bytes),
            timestamp: Some(1_790_000_000_000 + i as i64),
            ..Sent::default()
        }
    };
    (0..count).map(record).collect()
}

fn sources(got: &[Got]) -> BTreeSet<(i32, i64)> {
    got.iter().map(Got::source).collect()
}

#[test]
fn the_shadow_predicts_exactly_its_share() {
    for delivery in GUARANTEES {
        let (place, topic) = place("shadow", &[]);
        let sent = records(400);
        place.produce(sent.clone());
        let chosen: BTreeSet<(i32, i64)> = (sent.iter().enumerate())
            .filter(|(i, record)| {
                let position = format!("{}/{}/{}", place.input, record.partition, i / 2);
                is_chosen(record.key.as_deref().unwrap_or(position.as_bytes()), 0.3)
            })
            .map(|(i, record)| (record.partition, (i / 2) as i64))
            .collect();
        assert!((60..180).contains(&chosen.len()), "{}", chosen.len());

        let shadow = section(&topic, "share: 0.3");
        let mut daemon = Daemon::start(&place.config(&[("shadow", &shadow), ("delivery", delivery)]));
        let all = place.predictions(400);
        assert_eq!(sources(&all).len(), 400);
        let got = place.read(&topic, "the shadow's predictions", |got| sources(got).len() >= chosen.len());
        assert_eq!(sources(&got), chosen);
        // The counters follow the acknowledgements.
        until("the counters", || {
            let counted = outcome(&mut daemon, "predicted") + outcome(&mut daemon, "tombstone");
            (counted == chosen.len() as u64).then_some(())
        });
        assert_eq!((outcome(&mut daemon, "skipped"), outcome(&mut daemon, "failed")), (0, 0));
        for got in &got {
            let of = all.iter().find(|of| of.source() == got.source()).expect("the model's prediction");
            assert_eq!((&got.key, got.timestamp), (&of.key, of.timestamp));
            assert_eq!(got.header("kandle-model"), of.header("kandle-model"));
            assert_ne!(got.header("kandle-model-digest"), of.header("kandle-model-digest"));
            assert_eq!(got.value.is_none(), of.value.is_none());
            if got.value.is_some() {
                let (shadow, model) = (got.json(), of.json());
                assert_eq!((&shadow["label"], &shadow["id"]), (&model["label"], &model["id"]));
                assert_eq!(shadow["scores"].as_object().map(|scores| scores.len()), Some(1), "top_k: 1");
            }
        }
        assert_eq!(metric(&mut daemon, "kandle_shadow_agreement{measure=\"label_equal\"}"), 1.0);
        assert!(metric(&mut daemon, "kandle_shadow_agreement{measure=\"score_distance\"}") > 0.0);
        daemon.stop();
    }
}

#[test]
fn the_model_does_not_wait_for_a_shadow_that_hangs() {
    for delivery in GUARANTEES {
        let (place, topic) = place("shadow-hangs", &[]);
        let text = "my parcel has not arrived ".repeat(60);
        place.produce((0..2000).map(|i| Sent::ticket((i % 2) as i32, i, &format!("{text}{i}"))));
        let shadow = section(&topic, "share: 1.0, memory: 1MiB");
        let more =
            [("shadow", &*shadow), ("delivery", delivery), ("window", "{ max_records: 50, max_wait: 50ms }")];
        let mut daemon = Daemon::start_with(&place.config(&more), |command| {
            command.env("FAILPOINTS", "shadow=return");
        });
        daemon.wait_log("failpoint shadow reached");
        assert_eq!(sources(&place.predictions(2000)).len(), 2000);
        // Its offsets are committed too, and what the shadow had no room for is counted.
        until("the offsets", || {
            let end = |partition| place.committed(partition).map_or(0, |(offset, _)| offset);
            (end(0) >= 1000 && end(1) >= 1000).then_some(())
        });
        assert!(outcome(&mut daemon, "skipped") > 1000);
        assert_eq!(outcome(&mut daemon, "predicted"), 0);
        assert!(metric(&mut daemon, "kandle_memory_bytes{kind=\"shadow\"}") <= f64::from(1 << 20));
        daemon.stop();
        assert!(daemon.log().contains("the shadow did not finish in time"), "{}", daemon.log());
    }
}

#[test]
fn a_topic_that_refuses_the_shadow_does_not_hinder_the_model() {
    // Every prediction is larger than this.
    let (place, topic) = place("shadow-refused", &[("max.message.bytes", "120")]);
    let shadow = section(&topic, "share: 1.0");
    let mut daemon = Daemon::start(&place.config(&[("shadow", &shadow)]));
    daemon.wait_log("shadow model loaded");
    place.produce((0..100).map(|i| Sent::ticket((i % 2) as i32, i, "where is my order?")));
    assert_eq!(sources(&place.predictions(100)).len(), 100);
    until("the failures", || (outcome(&mut daemon, "failed") == 100).then_some(()));
    daemon.wait_log("a prediction of the shadow cannot be published");
    // The topic accepts records again, and the shadow goes on.
    place.configure_anew(&topic);
    let mut next = 100;
    until("a prediction of the shadow", || {
        place.produce((next..next + 10).map(|i| Sent::ticket((i % 2) as i32, i, "where is my order?")));
        next += 10;
        (outcome(&mut daemon, "predicted") > 0).then_some(())
    });
    daemon.wait_log("predictions of the shadow are published again");
    assert_eq!(sources(&place.predictions(next)).len(), next);
    daemon.stop();
}

#[test]
fn a_shadow_that_cannot_be_loaded_stops_jobs_with_an_end_alone() {
    let (place, topic) = place("shadow-missing", &[]);
    place.produce((0..20).map(|i| Sent::ticket((i % 2) as i32, i, "where is my order?")));
    let shadow = format!("{{ topic: {topic}, model: {{ source: /no/such/model }}, share: 1.0 }}");
    let config = file("kandle.yaml", &place.config(&[("shadow", &shadow)]));
    let (code, out, log) = finish(kandle().args(["check", "-c"]).arg(&config.path), b"");
    assert!(code == 1 && out.contains("FAIL  shadow model /no/such/model"), "{code} {out} {log}");
    assert!(out.contains(&format!("ok    shadow.topic {topic}")), "{out}");
    let (code, _, log) = finish(kandle().args(["drain", "-c"]).arg(&config.path), b"");
    assert!(code == 1 && log.contains("shadow: model /no/such/model"), "{code} {log}");
    assert_eq!(Ledger::count_of(&place), 0);

    let mut daemon = Daemon::start(&place.config(&[("shadow", &shadow)]));
    daemon.wait_log("the shadow cannot run");
    assert_eq!(sources(&place.predictions(20)).len(), 20);
    until("the failures", || (outcome(&mut daemon, "failed") == 20).then_some(()));
    daemon.stop();
}

#[test]
fn check_names_the_shadow() {
    let (place, topic) = place("shadow-check", &[]);
    let shadow = section(&topic, "share: 0.1");
    let config = file("kandle.yaml", &place.config(&[("shadow", &shadow)]));
    let (code, out, log) = finish(kandle().args(["check", "-c"]).arg(&config.path), b"");
    assert_eq!(code, 0, "{out} {log}");
    assert!(out.contains("ok    shadow model bundled") && out.contains("+ shadow.memory 64 MiB"), "{out}");
    place.delete(&topic);
    until("the topic to be gone", || {
        let (code, out, _) = finish(kandle().args(["check", "-c"]).arg(&config.path), b"");
        (code == 1 && out.contains(&format!("FAIL  shadow.topic {topic}"))).then_some(())
    });
}

/// Two replays of one range, with a shadow that is slower than the model's windows come.
#[test]
fn replays_choose_the_same_records_and_give_the_same_report() {
    let (place, first) = place("shadow-replay", &[]);
    place.produce(records(3000));
    let mut reports = Vec::new();
    for round in 0..2 {
        let (output, topic) = (format!("{}-{round}", place.output), format!("{first}-{round}"));
        place.create(&output, 2, &[]);
        place.create(&topic, 2, &[]);
        let shadow = section(&topic, "share: 0.4, memory: 1MiB");
        let out = format!("{{ topic: {output}, include: [/id] }}");
        let more = [("shadow", &*shadow), ("output", &*out), ("window", "{ max_records: 100 }")];
        let config = file("kandle.yaml", &place.config(&more));
        let counts = file("report.json", "");
        let mut command = kandle();
        command.args(["replay", "--from", "offset:0", "--to", "offset:1500", "--id", &round.to_string()]);
        command.arg("--report").arg(&counts.path).arg("-c").arg(&config.path);
        let (code, _, log) = finish(&mut command, b"");
        assert_eq!(code, 0, "{log}");
        let counts: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&counts.path).expect("a report")).expect("JSON");
        let shadow = &counts["shadow"];
        assert_eq!((&shadow["skipped"], &shadow["failed"]), (&0.into(), &0.into()), "{shadow}");
        assert!(shadow["predicted"].as_u64().is_some_and(|count| count > 500), "{shadow}");
        for format in ["text", "json", "html"] {
            let mut command = kandle();
            command.args(["compare", "--a", &output, "--b", &topic, "--format", format, "-c"]);
            let (code, report, log) = finish(command.arg(&config.path), b"");
            assert_eq!(code, 0, "{log}");
            // The topics have other names, and nothing else may differ.
            let report = report.replace(&topic, "SHADOW").replace(&output, "OUTPUT");
            if format == "json" {
                let found: serde_json::Value = serde_json::from_str(&report).expect("JSON");
                let covered = shadow["predicted"].as_u64().zip(shadow["tombstone"].as_u64());
                assert_eq!(found["coverage"]["both"].as_u64(), covered.map(|(a, b)| a + b), "{found:#}");
                assert_eq!((&found["coverage"]["only_b"], &found["b"]["doubled"]), (&0.into(), &0.into()));
                assert_eq!(found["agreement"]["measures"][0]["mean"], 1.0);
                assert_eq!(found["disagreements"].as_array().map(Vec::len), Some(100), "top_k: 1");
            }
            reports.push(report);
        }
    }
    let (one, other) = reports.split_at(3);
    assert_eq!(one, other);
}

/// Settings of a job that is killed: its shadow sees all records, and the group soon notices that a member is gone.
fn killed_job(place: &Place, topic: &str, delivery: &str, window: &str) -> String {
    let (shadow, input) = (section(topic, "share: 1.0"), brief_sessions(place));
    place.config(&[("shadow", &*shadow), ("delivery", delivery), ("input", &*input), ("window", window)])
}

/// A window is published once the shadow's predictions of it are, so that a killed drain lacks none of them.
#[test]
fn a_killed_drain_has_all_predictions_of_the_shadow_after_the_next() {
    for delivery in GUARANTEES {
        let (place, topic) = place("shadow-drain", &[]);
        place.produce((0..1000).map(|i| Sent::ticket((i % 2) as i32, i, "where is my order?")));
        let text = killed_job(&place, &topic, delivery, "{ max_records: 50 }");
        let mut drain = Daemon::spawn("drain", &text, |command| {
            command.env("FAILPOINTS", "shadow=6*off->return");
        });
        // It holds the seventh of at least twenty windows.
        drain.wait_log("failpoint shadow reached");
        let done = outcome(&mut drain, "predicted") as usize;
        assert!((6..=300).contains(&done), "{done}");
        let of_shadow = sources(&place.read(&topic, "six windows", |got| sources(got).len() >= done));
        assert_eq!(of_shadow.len(), done);
        let mut ledger = Ledger::of(&place);
        until("the predictions of the model", || {
            ledger.read(std::time::Duration::from_millis(50));
            (ledger.count() == done).then_some(())
        });
        drain.kill();
        ledger.read(std::time::Duration::from_millis(300));
        assert_eq!(ledger.count(), done);
        let config = file("kandle.yaml", &text);
        let (code, _, log) = finish(kandle().args(["drain", "-c"]).arg(&config.path), b"");
        assert_eq!(code, 0, "{log}");
        for topic in [&place.output, &topic] {
            let got = place.read(topic, "all predictions", |got| sources(got).len() >= 1000);
            assert_eq!(sources(&got).len(), 1000);
        }
    }
}

#[test]
fn a_drain_needs_the_topic_of_its_shadow() {
    let place = Place::new("shadow-topic", 1);
    place.produce([Sent::ticket(0, 1, "where is my order?")]);
    let shadow = section(&format!("{}-none", place.output), "share: 1.0");
    let config = file("kandle.yaml", &place.config(&[("shadow", &shadow)]));
    let (code, _, log) = finish(kandle().args(["drain", "-c"]).arg(&config.path), b"");
    assert!(
        code == 1 && log.contains("shadow.topic: topic") && log.contains("does not exist"),
        "{code} {log}"
    );
    assert_eq!(Ledger::count_of(&place), 0);
}

#[test]
fn a_killed_job_with_a_shadow_loses_nothing_of_the_model() {
    for delivery in GUARANTEES {
        let (place, topic) = place("shadow-killed", &[]);
        let config = killed_job(&place, &topic, delivery, "{ max_records: 50, max_wait: 50ms }");
        place.produce((0..2000).map(|i| Sent::ticket((i % 2) as i32, i, "where is my order?")));
        let mut ledger = Ledger::of(&place);
        for round in 1..3 {
            // Pauses in mid-work, so that there is something left to be killed.
            let mut daemon = Daemon::start_with(&config, |command| {
                command.env("FAILPOINTS", "encode=6*off->pause;shadow=4*off->pause");
            });
            until("progress", || {
                ledger.read(std::time::Duration::from_millis(50));
                (ledger.count() >= 150 * round).then_some(())
            });
            daemon.kill();
        }
        let mut daemon = Daemon::start(&config);
        until("all predictions", || {
            ledger.read(std::time::Duration::from_millis(50));
            (ledger.count() == 2000).then_some(())
        });
        assert!(ledger.missing(&[1000, 1000]).is_empty());
        assert!(ledger.out_of_order.is_empty(), "{:?}", ledger.out_of_order);
        if delivery.contains("exactly_once") {
            assert_eq!(ledger.doubled(), [""; 0]);
        }
        daemon.stop();
    }
}
