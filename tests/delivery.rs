//! The guarantees of `delivery`, on a real Kafka: kill -9 at every boundary, members that join, leave,
//! hang and resume, records on which the model hangs, topics and brokers that fail.

use crate::support;

use std::time::{Duration, Instant};

use rdkafka::admin::{NewTopic, TopicReplication};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use support::ledger::Ledger;
use support::{Daemon, Place, Sent, kafka, until};

const EXACTLY_ONCE: (&str, &str) =
    ("delivery", "{ guarantee: exactly_once, commit_interval: 200ms, revoke_timeout: 10s }");
const AT_LEAST_ONCE: (&str, &str) = ("delivery", "{ commit_interval: 200ms, revoke_timeout: 10s }");
/// Small windows, so that many are in flight.
const WINDOW: (&str, &str) = ("window", "{ max_wait: 50ms, max_records: 50 }");
/// No model: these tests are about topics and offsets.
const NOOP: [(&str, &str); 4] =
    [("task", "{ kind: noop }"), ("model", ""), ("output", "{ topic: $OUTPUT }"), ("input", INPUT)];
/// With a short session timeout, so that the group soon removes a killed member.
const INPUT: &str =
    "{ topics: [$INPUT], group: $GROUP, field: /text, properties: { session.timeout.ms: 6000 } }";

fn failing(config: &str, failpoints: &str) -> Daemon {
    Daemon::start_with(config, |command| {
        command.env("FAILPOINTS", failpoints);
    })
}

fn noop(place: &Place, more: &[(&str, &str)]) -> String {
    place.config(&[&NOOP, &[WINDOW][..], more].concat())
}

fn numbered(partitions: usize, from: usize, to: usize) -> impl Iterator<Item = Sent> {
    (from..to).map(move |i| Sent::ticket((i % partitions) as i32, i, "hello"))
}

/// Waits until every position below `ends` (by partition) has an outcome. Asserts their order, and that each is the
/// only one if `once`.
#[track_caller]
fn settle(place: &Place, ends: &[i64], once: bool) -> Ledger {
    let mut ledger = Ledger::of(place);
    let started = Instant::now();
    while !ledger.missing(ends).is_empty() {
        assert!(started.elapsed() < support::TIMEOUT, "missing: {:?}", ledger.missing(ends));
        ledger.read(Duration::from_millis(200));
    }
    // Duplicates, if any, come right behind.
    ledger.read(Duration::from_millis(500));
    assert_eq!(ledger.out_of_order, Vec::<String>::new());
    if once {
        assert_eq!(ledger.duplicates(), 0);
    }
    ledger
}

/// Kills a daemon at a boundary, starts another one like it, and checks the outcome of every record.
#[track_caller]
fn killed_at(boundary: &str, delivery: (&str, &str)) {
    let place = Place::new(&format!("kill-{boundary}"), 2);
    let config = noop(&place, &[delivery]);
    place.produce(numbered(2, 0, 600));
    // Not the first time that the boundary is reached: by then something is committed.
    let mut first = failing(&config, &format!("{boundary}=2*off->return"));
    let reached = format!("failpoint {boundary} reached");
    let mut more = 600;
    // Commits happen once an interval, and only with something to commit: records keep coming.
    let started = Instant::now();
    while !first.log().contains(&reached) {
        assert!(started.elapsed() < support::TIMEOUT, "{boundary} is not reached:\n{}", first.log());
        assert!(first.ended().is_none(), "{}", first.log());
        place.produce(numbered(2, more, more + 100));
        more += 100;
        std::thread::park_timeout(Duration::from_millis(100));
    }
    first.kill();
    let mut second = Daemon::start(&config);
    place.produce(numbered(2, more, more + 200));
    let half = (more as i64 + 200) / 2;
    settle(&place, &[half, half], delivery == EXACTLY_ONCE);
    second.stop();
    for partition in 0..2 {
        assert_eq!(place.committed(partition).expect("committed").0, half, "partition {partition}");
    }
}

#[test]
fn at_least_once_killed_before_a_window_is_sent() {
    killed_at("publish", AT_LEAST_ONCE);
}

#[test]
fn at_least_once_killed_when_a_window_is_sent() {
    killed_at("sent", AT_LEAST_ONCE);
}

#[test]
fn at_least_once_killed_when_a_window_is_acknowledged() {
    killed_at("acknowledged", AT_LEAST_ONCE);
}

#[test]
fn at_least_once_killed_before_offsets_are_committed() {
    killed_at("commit", AT_LEAST_ONCE);
}

#[test]
fn at_least_once_killed_when_offsets_are_committed() {
    killed_at("committed", AT_LEAST_ONCE);
}

#[test]
fn exactly_once_killed_before_a_window_is_sent() {
    killed_at("publish", EXACTLY_ONCE);
}

#[test]
fn exactly_once_killed_when_a_window_is_sent() {
    killed_at("sent", EXACTLY_ONCE);
}

#[test]
fn exactly_once_killed_when_all_is_acknowledged() {
    killed_at("acknowledged", EXACTLY_ONCE);
}

#[test]
fn exactly_once_killed_between_offsets_and_commit() {
    killed_at("offsets", EXACTLY_ONCE);
}

#[test]
fn exactly_once_killed_when_the_transaction_is_committed() {
    killed_at("txn-committed", EXACTLY_ONCE);
}

/// Members join and leave under load; every record has one outcome.
fn members_come_and_go(name: &str, input: &str) {
    let place = Place::new(name, 4);
    let config = noop(&place, &[EXACTLY_ONCE, ("input", input)]);
    let mut first = Daemon::start(&config);
    first.wait_log(" assigned partitions=");
    place.produce(numbered(4, 0, 4000));
    let mut second = Daemon::start(&config);
    place.produce(numbered(4, 4000, 8000));
    second.wait_log(" assigned partitions=");
    place.produce(numbered(4, 8000, 12_000));
    first.stop();
    place.produce(numbered(4, 12_000, 16_000));
    settle(&place, &[4000; 4], true);
    second.stop();
    for partition in 0..4 {
        assert_eq!(place.committed(partition).expect("committed").0, 4000);
    }
}

#[test]
fn exactly_once_through_cooperative_rebalances() {
    members_come_and_go("cooperative", INPUT);
}

#[test]
fn exactly_once_through_kip_848_rebalances() {
    let input = "{ topics: [$INPUT], group: $GROUP, field: /text, properties: { group.protocol: consumer } }";
    members_come_and_go("kip848", input);
}

/// librdkafka remembers that a partition was paused, even after it was revoked and assigned again.
#[test]
fn a_partition_revoked_and_assigned_again_is_consumed_again() {
    for protocol in ["classic", "consumer"] {
        let place = Place::new("back", 4);
        let input = format!(
            "{{ topics: [$INPUT], group: $GROUP, field: /text, properties: {{ group.protocol: {protocol} }} }}"
        );
        let config = noop(&place, &[("input", &input)]);
        place.produce(numbered(4, 0, 40));
        let mut stays = Daemon::start(&config);
        place.predictions(40);
        let mut passes = Daemon::start(&config);
        passes.wait_log("assigned partitions=");
        place.produce(numbered(4, 40, 80));
        place.predictions(80);
        passes.stop();
        place.produce(numbered(4, 80, 120));
        settle(&place, &[30; 4], false);
        stays.stop();
    }
}

#[test]
fn a_static_member_back_within_its_session_causes_no_rebalance() {
    let place = Place::new("static", 2);
    let input = |name: &str| {
        format!(
            "{{ topics: [$INPUT], group: $GROUP, field: /text, properties: {{ group.instance.id: {name}, session.timeout.ms: 30000 }} }}"
        )
    };
    let (a, b) = (input("a"), input("b"));
    let mut first = Daemon::start(&noop(&place, &[EXACTLY_ONCE, ("input", &a)]));
    first.wait_log(" assigned partitions=");
    let mut second = Daemon::start(&noop(&place, &[EXACTLY_ONCE, ("input", &b)]));
    second.wait_log(" assigned partitions=");
    let before = first.log().matches("partitions revoked").count();
    // As in a rolling update: killed, then replaced by a member with the same group.instance.id.
    second.kill();
    let mut again = Daemon::start(&noop(&place, &[EXACTLY_ONCE, ("input", &b)]));
    again.wait_log(" assigned partitions=");
    place.produce(numbered(2, 0, 1000));
    settle(&place, &[500, 500], true);
    assert_eq!(first.log().matches("partitions revoked").count(), before, "{}", first.log());
    first.stop();
    again.stop();
}

#[test]
fn a_zombie_publishes_nothing() {
    let place = Place::new("zombie", 2);
    let input = "{ topics: [$INPUT], group: $GROUP, field: /text, properties: { session.timeout.ms: 6000, heartbeat.interval.ms: 500 } }";
    let output = "{ topic: $OUTPUT, properties: { transaction.timeout.ms: 11000 } }";
    let config = noop(&place, &[EXACTLY_ONCE, ("input", input), ("output", output)]);
    let mut zombie = Daemon::start(&config);
    zombie.wait_log(" assigned partitions=");
    place.produce(numbered(2, 0, 2000));
    // Most likely in the middle of a transaction.
    until("predictions", || (Ledger::count_of(&place) > 200).then_some(()));
    place.produce(numbered(2, 2000, 4000));
    zombie.signal("STOP");
    let mut heir = Daemon::start(&config);
    // The group removes the zombie when its session times out.
    heir.wait_log(&format!(" assigned partitions={}", place.input));
    place.produce(numbered(2, 4000, 5000));
    settle(&place, &[2500, 2500], true);
    zombie.signal("CONT");
    // The zombie learns that it was removed: it exits, or joins again and works under new leases.
    until("the zombie to notice", || {
        (zombie.ended().is_some() || zombie.log().contains("lost") || zombie.log().contains("aborted"))
            .then_some(())
    });
    place.produce(numbered(2, 5000, 6000));
    settle(&place, &[3000, 3000], true);
    heir.stop();
}

/// The bundled model's token id of a word.
fn token(word: &str) -> u64 {
    let text = std::fs::read_to_string(support::root().join("demo/model/tokenizer.json")).expect("read");
    let tokenizer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    tokenizer["model"]["vocab"][word].as_u64().expect("a word of the vocabulary")
}

#[test]
fn a_record_on_which_the_model_hangs_is_found_on_the_next_start() {
    // With a long commit interval, earlier windows are in the open transaction when inference times out.
    let open = ("delivery", "{ guarantee: exactly_once, commit_interval: 10s }");
    for delivery in [AT_LEAST_ONCE, EXACTLY_ONCE, open] {
        let place = Place::new("hang", 1);
        let config = place.config(&[delivery, WINDOW, ("batch", "{ timeout: 2s }"), ("input", INPUT)]);
        let text = |i: usize| if i == 70 { "my password" } else { "where is my order" };
        place.produce((0..120).map(|i| Sent::ticket(0, i, text(i))));
        let hang = format!("hang=return({})", token("password"));
        let start = || failing(&config, &hang);
        let mut first = start();
        assert_eq!(first.wait().code(), Some(1), "{}", first.log());
        assert!(first.log().contains("exceeded batch.timeout (2s)"), "{}", first.log());
        let mut second = start();
        // The second run dead-letters the record, commits, and exits to free the stuck thread.
        assert_eq!(second.wait().code(), Some(1), "{}", second.log());
        assert!(second.log().contains("each runs alone"), "{}", second.log());
        let dead = place.dead_letters(1);
        assert_eq!((dead[0].source(), dead[0].header("kandle-error")), ((0, 70), Some("infer")));
        assert!(
            dead[0]
                .header("kandle-error-message")
                .is_some_and(|m| m.contains("exceeded batch.timeout (2s) twice"))
        );
        let mut third = start();
        settle(&place, &[120], delivery != AT_LEAST_ONCE);
        third.stop();
        assert_eq!(place.dead_letters(1).len(), 1);
    }
}

/// Each forward takes at least 200 ms. With 256 tokens on each of two lanes, a window of 1024 records takes seconds.
const SLOW_MODEL: &str = "device=sleep(200)";

fn backlog(name: &str, delivery: (&str, &str)) -> (Place, String) {
    let place = Place::new(name, 1);
    // All different, because equal texts are computed once.
    place.produce((0..4000).map(|i| Sent::ticket(0, i, &format!("where is order {i}"))));
    let config = place.config(&[delivery, ("batch", "{ lanes: 2 }"), ("input", INPUT)]);
    (place, config)
}

#[test]
fn a_slow_model_gets_short_windows_so_that_a_stop_is_quick() {
    for delivery in [AT_LEAST_ONCE, EXACTLY_ONCE] {
        let (place, config) = backlog("slow-stop", delivery);
        let mut first = failing(&config, SLOW_MODEL);
        until("two windows", || (Ledger::count_of(&place) > 400).then_some(()));
        let (_, metrics) = first.get("/metrics");
        let by_work =
            metrics.lines().find_map(|line| line.strip_prefix("kandle_windows_total{closed_by=\"work\"} "));
        assert!(by_work.is_some_and(|count| count != "0"), "{metrics}");
        let stopping = Instant::now();
        first.stop();
        let took = stopping.elapsed();
        assert!(took < Duration::from_secs(8), "{took:?}\n{}", first.log());
        let mut second = Daemon::start(&config);
        settle(&place, &[4000], true);
        second.stop();
    }
}

#[test]
fn a_slow_model_repeats_little_work_after_a_crash() {
    let (place, config) = backlog("slow-crash", AT_LEAST_ONCE);
    let mut first = failing(&config, SLOW_MODEL);
    until("some windows", || (Ledger::count_of(&place) > 800).then_some(()));
    first.kill();
    let mut second = Daemon::start(&config);
    let mut ledger = settle(&place, &[4000], false);
    second.stop();
    ledger.read(Duration::from_millis(200));
    // Bounded by records alone, a window of 1024 records would be repeated.
    assert!(ledger.duplicates() < 700, "{}", ledger.duplicates());
}

#[test]
fn records_that_retention_deleted_are_counted_and_logged() {
    let place = Place::new("retention", 1);
    let config = noop(&place, &[AT_LEAST_ONCE]);
    place.produce(numbered(1, 0, 100));
    let mut first = Daemon::start(&config);
    settle(&place, &[100], true);
    first.stop();
    place.produce(numbered(1, 100, 400));
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&place.input, 0, Offset::Offset(250)).expect("an offset");
    place.administer(async |admin, options| {
        admin.delete_records(&list, options).await.expect("deleted");
    });
    let mut second = Daemon::start(&config);
    place.predictions(100 + 150);
    let line = second.wait_log("data skipped");
    assert!(line.contains("from=100") && line.contains("to=250"), "{line}");
    let (_, metrics) = second.get("/metrics");
    let counted =
        format!("kandle_skipped_records_total{{cause=\"retention\",topic=\"{}\"}} 150", place.input);
    assert!(metrics.contains(&counted), "{metrics}");
    second.stop();
}

#[test]
fn a_value_too_large_even_for_a_dead_letter_is_dropped_and_its_headers_are_kept() {
    for delivery in [AT_LEAST_ONCE, EXACTLY_ONCE] {
        let place = Place::new("huge", 1);
        let (out, dead) = (format!("{}-small", place.output), format!("{}-small", place.dead));
        place.create(&out, 1, &[("max.message.bytes", "2000")]);
        place.create(&dead, 1, &[("max.message.bytes", "4000")]);
        // Bytes that hardly compress.
        place.produce([10, 3000, 6000, 20].map(|n| Sent::new(0, support::noise(n))));
        let config = place.config(&[
            delivery,
            ("task", "{ kind: noop }"),
            ("model", ""),
            ("input", "{ topics: [$INPUT], group: $GROUP, format: text }"),
            ("output", &format!("{{ topic: {out} }}")),
            ("dead_letters", &format!("{{ topic: {dead} }}")),
        ]);
        let mut daemon = Daemon::start(&config);
        let letters = place.read(&dead, "two dead letters", |got| got.len() >= 2);
        let good = place.read(&out, "two predictions", |got| got.len() >= 2);
        daemon.stop();
        assert_eq!(good.iter().map(|g| g.source().1).collect::<Vec<_>>(), [0, 3]);
        let lengths: Vec<Option<usize>> = letters.iter().map(|l| l.value.as_ref().map(Vec::len)).collect();
        assert_eq!(lengths, [Some(3000), None]);
        assert_eq!(letters.iter().map(|l| l.source().1).collect::<Vec<_>>(), [1, 2]);
        assert!(letters.iter().all(|l| l.header("kandle-error") == Some("too_large")));
    }
}

#[test]
fn a_denied_acl_ends_the_process_and_loses_nothing_once_it_is_removed() {
    for delivery in [AT_LEAST_ONCE, EXACTLY_ONCE] {
        let place = Place::new("acl", 1);
        let config = noop(&place, &[delivery]);
        place.produce(numbered(1, 0, 100));
        let mut daemon = Daemon::start(&config);
        place.predictions(100);
        let acl = |what: &str| {
            let server = ["--bootstrap-server", &place.brokers, what, "--force"];
            let rule =
                ["--deny-principal", "User:ANONYMOUS", "--operation", "Write", "--topic", &place.output];
            kafka::tool("org.apache.kafka.tools.AclCommand", &[&server[..], &rule[..]].concat());
        };
        acl("--add");
        place.produce(numbered(1, 100, 200));
        let status = daemon.wait();
        assert_eq!(status.code(), Some(1), "{}", daemon.log());
        assert!(daemon.log().to_lowercase().contains("authorization failed"), "{}", daemon.log());
        acl("--remove");
        let mut again = Daemon::start(&config);
        settle(&place, &[200], delivery == EXACTLY_ONCE);
        again.stop();
    }
}

#[test]
fn an_output_topic_deleted_at_run_time_ends_the_process() {
    let place = Place::new("deleted", 1);
    let properties = "{ topic: $OUTPUT, properties: { topic.metadata.propagation.max.ms: 1000, topic.metadata.refresh.interval.ms: 500 } }";
    let mut daemon = Daemon::start(&noop(&place, &[AT_LEAST_ONCE, ("output", properties)]));
    place.produce(numbered(1, 0, 100));
    place.predictions(100);
    place.delete(&place.output);
    let mut next = 100;
    until("the exit", || {
        place.produce(numbered(1, next, next + 1));
        next += 1;
        daemon.ended()
    });
    assert!(daemon.log().contains("the broker refused its message"), "{}", daemon.log());
    // The next start names the missing topic, and resumes where the first one stopped.
    let mut again = Daemon::start(&noop(&place, &[AT_LEAST_ONCE]));
    let line = again.wait_log("does not exist");
    assert!(line.contains(&place.output), "{line}");
    place.create(&place.output, 1, &[]);
    place.read(&place.output, "the rest", |got| got.iter().any(|g| g.source().1 == next as i64 - 1));
    again.stop();
}

#[test]
fn a_recreated_input_topic_is_read_from_its_beginning() {
    let place = Place::new("anew", 1);
    let input = "{ topics: [$INPUT], group: $GROUP, field: /text, properties: { topic.metadata.refresh.interval.ms: 500 } }";
    let mut daemon = Daemon::start(&noop(&place, &[AT_LEAST_ONCE, ("input", input)]));
    place.produce(numbered(1, 0, 100));
    place.predictions(100);
    place.delete(&place.input);
    until("the topic to be gone", || {
        let topic = NewTopic::new(&place.input, 1, TopicReplication::Fixed(-1));
        let made =
            place.administer(async |admin, options| admin.create_topics([&topic], options).await).ok()?;
        made.iter().all(Result::is_ok).then_some(())
    });
    place.produce(numbered(1, 0, 40));
    place.predictions(140);
    assert!(daemon.ended().is_none(), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn a_broker_with_a_full_disk_is_waited_for() {
    for delivery in [AT_LEAST_ONCE, EXACTLY_ONCE] {
        let mut kafka = kafka::Kafka::start_with(1, Some(16_000));
        let place = Place::on(&kafka.brokers, "disk", 1);
        let count = 150_000;
        // Predictions, with their headers, are larger than records: the output fills the disk first.
        place.produce(numbered(1, 0, count));
        let mut daemon = Daemon::start(&noop(&place, &[delivery, ("window", "{ max_wait: 50ms }")]));
        kafka.wait_for_end(0);
        assert!(daemon.ended().is_none(), "{}", daemon.log());
        assert_eq!((daemon.get("/livez").0, daemon.get("/readyz").0), (200, 200));
        // The broker comes back without the limit on its files.
        kafka.restart(0);
        settle(&place, &[count as i64], delivery == EXACTLY_ONCE);
        daemon.stop();
    }
}

#[test]
fn a_panic_in_a_stage_ends_the_process_with_its_message() {
    let place = Place::new("panic", 1);
    place.produce(numbered(1, 0, 10));
    // Not in the first forward, which is part of loading the model.
    let mut daemon = failing(&place.config(&[]), "device=1*off->panic(the device is on fire)");
    assert_eq!(daemon.wait().code(), Some(1));
    assert!(daemon.log().contains("the device is on fire"), "{}", daemon.log());
    assert!(place.committed(0).is_none());
}

#[test]
fn livez_fails_during_a_stall_and_recovers_after_it() {
    let place = Place::new("stall", 1);
    let config = noop(
        &place,
        &[("server", "{ listen: \"127.0.0.1:0\", stall_after: 2s }"), ("batch", "{ timeout: 1s }")],
    );
    let mut daemon = failing(&config, "encode=1*sleep(8000)->off");
    daemon.wait_log(" assigned partitions=");
    assert_eq!(daemon.get("/livez").0, 200);
    place.produce(numbered(1, 0, 10));
    until("livez to fail", || (daemon.get("/livez").0 == 503).then_some(()));
    assert!(daemon.get("/livez").1.contains("encode"));
    place.predictions(10);
    until("livez to recover", || (daemon.get("/livez").0 == 200).then_some(()));
    daemon.stop();
}
