//! Permissions: those of docs/security.md suffice, `check` names each that is missing, and what happens when one is
//! taken away while kandle runs.

use crate::support;

use std::collections::BTreeSet;

use serde_json::json;
use support::kafka::tool;
use support::secure::{NUMBER, read, secure};
use support::*;

/// The ACLs under a heading of docs/security.md, as arguments of kafka-acls.sh, for a test's user and topics.
fn documented(place: &Place, heading: &str) -> Vec<Vec<String>> {
    let text = read(&root().join("docs/security.md"));
    let block =
        text.split(heading).nth(1).and_then(|after| after.split("```").nth(1)).expect("a block of commands");
    let names = [
        ("User:kandle", "User:limited".to_owned()),
        ("kandle-tickets-replay-", format!("{}-replay-", place.group)),
        ("kandle-tickets-", format!("{}-", place.group)),
        ("kandle-tickets", place.group.clone()),
        ("tickets-predictions", place.output.clone()),
        ("tickets-dead", place.dead.clone()),
        ("tickets", place.input.clone()),
    ];
    let replaced = |word: &str| {
        let name = names.iter().find(|(documented, _)| *documented == word);
        name.map_or_else(|| word.to_owned(), |(_, name)| name.clone())
    };
    let lines = block.lines().filter_map(|line| line.strip_prefix("kafka-acls.sh --add "));
    lines.map(|line| line.split(' ').map(replaced).collect()).collect()
}

fn acl(place: &Place, what: &str, rule: &[String]) {
    let rule = rule.iter().map(String::as_str);
    let arguments: Vec<&str> =
        ["--bootstrap-server", &place.brokers, what, "--force"].into_iter().chain(rule).collect();
    tool("org.apache.kafka.tools.AclCommand", &arguments);
}

fn config(place: &Place, guarantee: &str) -> String {
    let kafka = json!({ "brokers": secure().sasl, "properties": {
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": secure().files.text("ca.pem"),
        "sasl.mechanism": "PLAIN",
        "sasl.username": "limited",
        "sasl.password": NUMBER,
        // How soon a permission that is back is noticed.
        "topic.metadata.refresh.interval.ms": 2000,
    }});
    let delivery = format!("{{ guarantee: {guarantee}, commit_interval: 500ms }}");
    let more = [("kafka", kafka.to_string()), ("delivery", delivery)];
    let more = more.iter().map(|(name, value)| (*name, value.as_str()));
    place.config(&NOOP.into_iter().chain(more).collect::<Vec<_>>())
}

fn check(config: &str) -> (i32, String) {
    let config = file("kandle.yaml", config);
    let (code, out, err) = finish(kandle().args(["check", "-c"]).arg(&config.path), b"");
    (code, out + &err)
}

/// Waits until each of the first `count` records has a prediction.
fn settle(place: &Place, count: usize, once: bool) {
    let got = place.read(&place.output, "all predictions", |got| {
        got.iter().map(|got| got.source().1).collect::<BTreeSet<_>>().len() >= count
    });
    assert_order(&got);
    assert!(!once || got.len() == count, "{} predictions of {count} records", got.len());
}

/// `lines`: what `check` says of each permission that is missing, in the order of docs/security.md.
fn each_is_needed(guarantee: &str, headings: &[&str], tested: impl Fn(&Place) -> Vec<(usize, String)>) {
    let place = Place::on(&secure().plaintext, guarantee, 1);
    let config = config(&place, guarantee);
    let rules: Vec<Vec<String>> = headings.iter().flat_map(|heading| documented(&place, heading)).collect();
    rules.iter().for_each(|rule| acl(&place, "--add", rule));
    let (code, out) = check(&config);
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("ok    permissions: Read on topic"), "{out}");
    assert!(out.contains("warn  permission DescribeConfigs on topic"), "{out}");

    let mut daemon = Daemon::start(&config);
    let mut sent = 0;
    let mut produce = |count: usize| {
        place.produce((sent..sent + count).map(|i| Sent::ticket(0, i, "text")));
        sent += count;
        sent
    };
    let once = guarantee == "exactly_once";
    settle(&place, produce(20), once);
    for (rule, missing) in tested(&place) {
        let rule = &rules[rule];
        // The refusal may be logged, once, before the tool has ended.
        let before = daemon.log().len();
        acl(&place, "--remove", rule);
        let count = produce(20);
        until("the refusal", || {
            let ended = daemon.ended().is_some();
            let refused = daemon.log()[before..].to_lowercase().contains("authorization failed");
            assert!(refused || !ended, "{}", daemon.log());
            refused.then_some(())
        });
        let (code, out) = check(&config);
        assert_eq!(code, 1, "{out}");
        let named: Vec<&str> = out.lines().filter(|line| line.starts_with("FAIL  permission ")).collect();
        assert!(named.len() == 1 && named[0].contains(&missing), "{missing}: {out}");
        acl(&place, "--add", rule);
        if missing.starts_with("Write") {
            let status = daemon.wait();
            assert_eq!(status.code(), Some(1), "{}", daemon.log());
        }
        if daemon.ended().is_some() {
            daemon = Daemon::start(&config);
        }
        settle(&place, count, once);
    }
    daemon.stop();
}

#[test]
fn at_least_once_needs_what_is_documented() {
    each_is_needed("at_least_once", &["At least once:"], |place| {
        vec![
            (0, format!("Read on topic {}", place.input)),
            (1, format!("Read on group {}", place.group)),
            (2, format!("Write on topic {}", place.output)),
        ]
    });
}

#[test]
fn exactly_once_needs_what_is_documented() {
    each_is_needed("exactly_once", &["At least once:", "Exactly once, also:"], |place| {
        vec![
            (1, format!("Read on group {}", place.group)),
            (4, format!("Write on transactional-id {}-", place.group)),
        ]
    });
}

#[test]
fn check_names_a_permission_that_only_dead_letters_need() {
    let place = Place::on(&secure().plaintext, "dead", 1);
    let config = config(&place, "at_least_once");
    let rules = documented(&place, "At least once:");
    rules[..3].iter().for_each(|rule| acl(&place, "--add", rule));
    let (code, out) = check(&config);
    assert_eq!(code, 1, "{out}");
    let line = out.lines().find(|line| line.starts_with("FAIL  permission ")).expect("a missing permission");
    assert!(line.contains(&format!("Write on topic {}", place.dead)), "{line}");
    assert!(line.contains("--operation Write --topic"), "{line}");
}

/// Runs a command to its end; returns its exit code and what it says.
fn command(arguments: &[&str], config: &str) -> (i32, String) {
    let config = file("kandle.yaml", config);
    let (code, out, err) = finish(kandle().args(arguments).arg("-c").arg(&config.path), b"");
    (code, out + &err)
}

fn replays_and_audits(guarantee: &str, headings: &[&str]) {
    let place = Place::on(&secure().plaintext, "replay", 1);
    let config = config(&place, guarantee);
    for rule in headings.iter().flat_map(|heading| documented(&place, heading)) {
        acl(&place, "--add", &rule);
    }
    place.produce((0..20).map(|i| Sent::ticket(0, i, "text")));
    place.produce([Sent::new(0, "no JSON")]);
    let mut daemon = Daemon::start(&config);
    settle(&place, 20, true);
    place.dead_letters(1);
    daemon.stop();

    let refused = |arguments: &[&str], missing: &str| {
        let (code, out) = command(arguments, &config);
        assert_eq!(code, 1, "{out}");
        assert!(out.contains("a permission is missing") && out.contains(missing), "{missing}: {out}");
        assert!(out.contains("kafka-acls.sh"), "{out}");
    };
    // Each rule by itself is not enough: the other one's absence is named.
    let audit = documented(&place, "Audit, also:");
    let compare = ["compare", "--a", &place.output, "--b", &place.dead];
    refused(&compare, &format!("Read on topic {}", place.output));
    refused(&["audit"], &format!("Read on topic {}", place.output));
    acl(&place, "--add", &audit[0]);
    refused(&["audit"], &format!("Read on topic {}", place.dead));
    acl(&place, "--add", &audit[1]);
    let (code, out) = command(&["audit"], &config);
    assert!(code == 0 && out.contains("21 with an outcome"), "{code}: {out}");
    let (code, out) = command(&compare, &config);
    assert!(code == 0 && out.contains("20 only in a, 1 only in b"), "{code}: {out}");

    let replay = ["replay", "--id", "again", "--from", "offset:0", "--to", "offset:21"];
    refused(&replay, &format!("Read on group {}-replay-again", place.group));
    let rules = documented(&place, "Replay, also:");
    acl(&place, "--add", &rules[0]);
    let (code, out) = command(&replay, &config);
    assert_eq!(code, 0, "{out}");
    let (code, out) = command(&["audit"], &config);
    assert!(code == 3 && out.contains("doubled 21"), "{code}: {out}");
    let (code, out) = command(&["replay", "--dead-letters", "--id", "dead"], &config);
    assert_eq!(code, 0, "{out}");
}

#[test]
fn replay_and_audit_need_what_is_documented() {
    replays_and_audits("at_least_once", &["At least once:"]);
}

#[test]
fn replay_and_audit_in_transactions_need_what_is_documented() {
    replays_and_audits("exactly_once", &["At least once:", "Exactly once, also:"]);
}
