//! Input topics on a real Kafka: recreated, damaged, matched by patterns, read from `latest`, and ending with
//! transaction markers.

use crate::support;

use std::io::{Read, Seek, SeekFrom, Write};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::NewPartitions;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use support::kafka::Kafka;
use support::ledger::Ledger;
use support::{Daemon, Place, Sent, file, finish, kandle, until};

const EXACTLY_ONCE: (&str, &str) = ("delivery", "{ guarantee: exactly_once, commit_interval: 100ms }");
const AT_LEAST_ONCE: (&str, &str) = ("delivery", "{ commit_interval: 100ms }");
const GUARANTEES: [(&str, &str); 2] = [AT_LEAST_ONCE, EXACTLY_ONCE];
const NOOP: [(&str, &str); 4] = [
    ("task", "{ kind: noop }"),
    ("model", ""),
    ("output", "{ topic: $OUTPUT }"),
    ("input", "{ topics: [$INPUT], group: $GROUP, format: text, properties: { session.timeout.ms: 6000 } }"),
];

fn config(place: &Place, more: &[(&str, &str)]) -> String {
    place.config(&[&NOOP, more].concat())
}

/// `input` with other topics or properties.
fn input(topics: &str, more: &str) -> String {
    format!("{{ topics: [\"{topics}\"], group: $GROUP, format: text{more} }}")
}

fn numbered(partitions: usize, from: usize, to: usize) -> impl Iterator<Item = Sent> {
    (from..to).map(move |i| Sent::new((i % partitions) as i32, format!("record {i}")))
}

/// A broker's restart raises a partition's leader epoch. The epochs of a recreated topic begin at 0 again: the client
/// takes its metadata for outdated and stops fetching.
#[test]
fn a_client_that_stops_fetching_ends_the_process_and_the_next_one_reads_on() {
    let mut kafka = Kafka::start(1);
    let place = Place::on(&kafka.brokers, "stuck", 1);
    let properties = ", properties: { session.timeout.ms: 60000, reconnect.backoff.max.ms: 200 }";
    let config = config(&place, &[AT_LEAST_ONCE, ("input", &input("$INPUT", properties))]);
    place.produce(numbered(1, 0, 100));
    let start = || {
        Daemon::start_with(&config, |command| {
            command.env("FAILPOINTS", "stuck_after=return(5)");
        })
    };
    let mut first = start();
    values(&place, 100);
    for _ in 0..2 {
        kafka.kill(0);
        kafka.restart(0);
    }
    place.produce(numbered(1, 100, 200));
    values(&place, 200);
    first.signal("STOP");
    place.recreate(&place.input, 1);
    place.produce(numbered(1, 200, 300));
    first.signal("CONT");
    assert_eq!(first.wait().code(), Some(1), "{}", first.log());
    assert!(first.log().contains("no longer fetches at offset 0"), "{}", first.log());
    let mut second = start();
    let mut all = values(&place, 300);
    second.stop();
    all.sort();
    let mut expected: Vec<String> = (0..300).map(|i| format!("record {i}")).collect();
    expected.sort();
    assert_eq!(all, expected);
}

/// The values of the predictions, once there are `count`.
fn values(place: &Place, count: usize) -> Vec<String> {
    let value = |got: support::Got| String::from_utf8(got.value.expect("a value")).expect("text");
    place.predictions(count).into_iter().map(value).collect()
}

/// The value of a counter or gauge, summed over its labels.
fn metric(daemon: &mut Daemon, name: &str) -> f64 {
    let (_, metrics) = daemon.get("/metrics");
    let samples = metrics.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
    samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// After 100 records the topic is recreated with 250 others while `away` keeps kandle from reading.
#[track_caller]
fn recreated_while(
    name: &str,
    delivery: (&str, &str),
    more: &[(&str, &str)],
    start: impl FnOnce(&str) -> Daemon,
    away: impl FnOnce(&mut Daemon),
    back: impl FnOnce(&mut Daemon),
) {
    let place = Place::new(name, 1);
    let mut daemon = start(&config(&place, &[&[delivery], more].concat()));
    place.produce(numbered(1, 0, 100));
    values(&place, 100);
    until("the commit", || place.committed(0).filter(|(offset, _)| *offset == 100));
    away(&mut daemon);
    let since = Instant::now();
    place.recreate(&place.input, 1);
    place.produce(numbered(1, 1000, 1250));
    // kandle reads nothing for a second: an operator takes longer to recreate a topic.
    until("a second", || (since.elapsed() >= Duration::from_secs(1)).then_some(()));
    back(&mut daemon);
    let mut all = values(&place, 350);
    daemon.wait_log("the topic was deleted and recreated: reading from its start");
    assert_eq!(metric(&mut daemon, "kandle_topic_recreated_total"), 1.0);
    until("the commit", || place.committed(0).filter(|(offset, _)| *offset == 250));
    daemon.stop();
    all.sort();
    let mut expected: Vec<String> = (0..100).chain(1000..1250).map(|i| format!("record {i}")).collect();
    expected.sort();
    assert_eq!(all, expected);
}

#[test]
fn a_topic_recreated_while_the_process_is_frozen_is_read_from_its_start() {
    for delivery in GUARANTEES {
        recreated_while(
            "recreated-stopped",
            delivery,
            &[("input", &input("$INPUT", ", properties: { session.timeout.ms: 60000 }"))],
            Daemon::start,
            |daemon| daemon.signal("STOP"),
            |daemon| daemon.signal("CONT"),
        );
    }
}

#[test]
fn a_topic_recreated_outside_of_the_schedule_is_read_from_its_start() {
    let clock = file("clock", "2026-11-25T23:00:00Z");
    let set = |time: &str| {
        let next = clock.path.with_extension("next");
        std::fs::write(&next, time).expect("written");
        std::fs::rename(&next, &clock.path).expect("moved");
    };
    recreated_while(
        "recreated-resting",
        AT_LEAST_ONCE,
        &[("schedule", "{ periods: [{ cron: \"0 22 * * *\", duration: 8h }], timezone: UTC }")],
        |config| {
            Daemon::start_with(config, |command| {
                command.env("KANDLE_TEST_CLOCK", &clock.path);
            })
        },
        |daemon| {
            set("2026-11-26T12:00:00Z");
            daemon.wait_log("outside of the schedule: partitions paused");
        },
        |_| set("2026-11-26T23:00:00Z"),
    );
}

#[test]
fn a_topic_recreated_while_kandle_is_down_is_read_from_its_start() {
    // The broker deletes the group's offset with the topic: the test commits the offset again.
    let place = Place::new("recreated-away", 1);
    let config = config(&place, &[AT_LEAST_ONCE]);
    place.produce(numbered(1, 0, 100));
    let mut daemon = Daemon::start(&config);
    values(&place, 100);
    daemon.stop();
    let (offset, metadata) = place.committed(0).expect("an offset");
    assert_eq!(offset, 100);
    place.recreate(&place.input, 1);
    place.produce(numbered(1, 1000, 1250));
    place.commit(0, 100, &metadata);
    let mut daemon = Daemon::start(&config);
    values(&place, 350);
    daemon.wait_log("the topic was deleted and recreated: reading from its start");
    daemon.stop();
    // A drain too reads the topic from its start.
    let file = file("kandle.yaml", &config);
    place.recreate(&place.input, 1);
    place.produce(numbered(1, 2000, 2050));
    place.commit(0, 100, &metadata);
    let (code, _, log) = finish(kandle().args(["drain", "-c"]).arg(&file.path), b"");
    assert_eq!(code, 0, "{log}");
    values(&place, 400);
}

#[test]
fn a_topic_recreated_under_a_running_daemon_is_read_from_its_start() {
    let place = Place::new("recreated-running", 2);
    let properties = ", properties: { topic.metadata.refresh.interval.ms: 1000 }";
    let mut daemon =
        Daemon::start(&config(&place, &[AT_LEAST_ONCE, ("input", &input("$INPUT", properties))]));
    place.produce(numbered(2, 0, 100));
    values(&place, 100);
    place.recreate(&place.input, 2);
    place.produce(numbered(2, 1000, 1250));
    let all = until("all that is in the new topic", || {
        let all = values(&place, 350);
        (1000..1250).all(|i| all.contains(&format!("record {i}"))).then_some(all)
    });
    assert!((0..100).all(|i| all.contains(&format!("record {i}"))));
    assert!(daemon.ended().is_none(), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn latest_is_the_end_when_the_group_first_started() {
    for delivery in GUARANTEES {
        let place = Place::new("latest", 2);
        let latest = input(
            "$INPUT",
            ", start: latest, properties: { session.timeout.ms: 6000, topic.metadata.refresh.interval.ms: 1000 }",
        );
        let config = config(&place, &[delivery, ("input", &latest)]);
        place.produce(numbered(2, 0, 50));
        let mut daemon = Daemon::start(&config);
        daemon.wait_log(" assigned partitions=");
        until("the group's offsets", || {
            (place.committed(0)?.0 == 25 && place.committed(1)?.0 == 25).then_some(())
        });
        // Only one partition has new records, and kandle is down while the other one gets some.
        place.produce([Sent::new(0, "a")]);
        values(&place, 1);
        daemon.kill();
        place.produce([Sent::new(1, "b")]);
        let mut daemon = Daemon::start(&config);
        assert_eq!(values(&place, 2), ["a", "b"]);
        // A partition that appears later is read from its beginning.
        let partitions = NewPartitions::new(&place.input, 3);
        place.administer(async |admin, options| {
            admin.create_partitions([&partitions], options).await.expect("made");
        });
        until("the new partition", || {
            // The broker may not know the partition yet.
            let producer = place.producer();
            let record = BaseRecord::<[u8], [u8]>::to(&place.input).partition(2).payload(b"c");
            producer.send(record).ok()?;
            producer.flush(Duration::from_secs(5)).ok()
        });
        until("its record", || values(&place, 3).contains(&"c".to_owned()).then_some(()));
        daemon.stop();
    }
}

#[test]
fn members_that_start_together_agree_on_what_is_latest() {
    let place = Place::new("latest-two", 6);
    place.produce(numbered(6, 0, 60));
    let config = config(&place, &[AT_LEAST_ONCE, ("input", &input("$INPUT", ", start: latest"))]);
    let mut daemons = [Daemon::start(&config), Daemon::start(&config)];
    for daemon in &mut daemons {
        daemon.wait_log(" assigned partitions=");
    }
    until("the group's offsets", || (0..6).all(|p| place.committed(p).is_some()).then_some(()));
    place.produce(numbered(6, 60, 120));
    let mut ledger = Ledger::of(&place);
    until("all new records", || {
        ledger.read(Duration::from_millis(200));
        (ledger.count() >= 60).then_some(())
    });
    ledger.read(Duration::from_millis(500));
    assert_eq!(ledger.count(), 60, "old records were read");
    for daemon in &mut daemons {
        daemon.stop();
    }
}

#[test]
fn a_drain_from_latest_ends_and_the_next_one_goes_on_from_there() {
    for delivery in GUARANTEES {
        let place = Place::new("latest-drain", 2);
        place.produce(numbered(2, 0, 50));
        let latest = input("$INPUT", ", start: latest");
        let config = file("kandle.yaml", &config(&place, &[delivery, ("input", &latest)]));
        let drain = || finish(kandle().args(["drain", "-c"]).arg(&config.path), b"");
        let (code, _, log) = drain();
        assert_eq!(code, 0, "{log}");
        assert_eq!((place.committed(0).map(|c| c.0), place.committed(1).map(|c| c.0)), (Some(25), Some(25)));
        place.produce(numbered(2, 50, 60));
        let (code, _, log) = drain();
        assert_eq!(code, 0, "{log}");
        let mut all = values(&place, 10);
        all.sort();
        assert_eq!(all, (50..60).map(|i| format!("record {i}")).collect::<Vec<_>>());
    }
}

#[test]
fn patterns_use_kandles_regex_syntax() {
    let place = Place::new("Pattern", 1);
    // librdkafka's own patterns support neither `(?i)` nor `\d`.
    let pattern = format!("^(?i){}-\\\\d+$", place.input.to_lowercase());
    let properties = ", properties: { topic.metadata.refresh.interval.ms: 1000 }";
    let config = config(&place, &[AT_LEAST_ONCE, ("input", &input(&pattern, properties))]);
    let mut daemon = Daemon::start(&config);
    daemon.wait_log("no topic matches input.topics");
    assert_eq!(daemon.get("/readyz").0, 200);
    let produce = |topic: &str, value: &str| {
        place.create(topic, 1, &[]);
        let producer = place.producer();
        producer.send(BaseRecord::<[u8], [u8]>::to(topic).payload(value.as_bytes())).expect("queued");
        producer.flush(support::TIMEOUT).expect("acknowledged");
    };
    produce(&format!("{}-x", place.input), "no match");
    produce(&format!("{}-1", place.input), "one");
    values(&place, 1);
    produce(&format!("{}-22", place.input), "two");
    assert_eq!(values(&place, 2), ["one", "two"]);
    daemon.stop();
    let file = file("kandle.yaml", &config);
    let (code, _, log) = finish(kandle().args(["drain", "-c"]).arg(&file.path), b"");
    assert_eq!(code, 0, "{log}");
}

/// Sends records in one transaction, and commits or aborts it.
fn transaction(place: &Place, values: &[&str], commit: bool) {
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &place.brokers)
        .set("transactional.id", support::unique("producer"))
        .create()
        .expect("a producer");
    producer.init_transactions(support::TIMEOUT).expect("an id");
    producer.begin_transaction().expect("begun");
    for value in values {
        producer
            .send(BaseRecord::<[u8], [u8]>::to(&place.input).partition(0).payload(value.as_bytes()))
            .expect("queued");
    }
    producer.flush(support::TIMEOUT).expect("acknowledged");
    match commit {
        true => producer.commit_transaction(support::TIMEOUT).expect("committed"),
        false => producer.abort_transaction(support::TIMEOUT).expect("aborted"),
    }
}

#[test]
fn transaction_markers_leave_no_lag() {
    for delivery in GUARANTEES {
        let place = Place::new("markers", 1);
        let mut daemon = Daemon::start(&config(&place, &[delivery]));
        transaction(&place, &["a", "b"], true);
        values(&place, 2);
        // Two records and a marker: with a committed offset of 2, an autoscaler would keep a replica for ever.
        until("the commit past the marker", || place.committed(0).filter(|(offset, _)| *offset == 3));
        transaction(&place, &["c"], false);
        until("the commit past the marker", || place.committed(0).filter(|(offset, _)| *offset == 5));
        transaction(&place, &["d"], true);
        until("the commit past the marker", || place.committed(0).filter(|(offset, _)| *offset == 7));
        assert_eq!(values(&place, 3), ["a", "b", "d"]);
        assert_eq!(metric(&mut daemon, "kandle_lag_records"), 0.0);
        daemon.stop();
    }
}

#[test]
fn the_wait_for_a_dead_members_session_is_logged() {
    let place = Place::new("waits", 1);
    let properties = ", properties: { session.timeout.ms: 20000 }";
    let config = config(&place, &[AT_LEAST_ONCE, ("input", &input("$INPUT", properties))]);
    let mut first = Daemon::start(&config);
    first.wait_log(" assigned partitions=");
    first.kill();
    let mut second = Daemon::start(&config);
    let line = second.wait_log("waiting for the group's other members");
    assert!(line.contains("session_timeout_seconds=20") && line.contains("group.instance.id"), "{line}");
    second.wait_log(" assigned partitions=");
    second.stop();
}

/// Changes the last byte of the batch of `records` records that begins with `offset`, in the broker's file (message
/// format v2: base offset, length, epoch, magic, checksum, attributes, last offset delta, …).
fn damage(kafka: &Kafka, topic: &str, partition: i32, offset: i64, records: i32) {
    let path = kafka.segment(0, topic, partition);
    let mut file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("the file");
    let mut at = 0;
    loop {
        let mut header = [0; 27];
        file.seek(SeekFrom::Start(at)).expect("sought");
        file.read_exact(&mut header).expect("a batch");
        let first = i64::from_be_bytes(header[..8].try_into().expect("eight"));
        let length = i64::from(i32::from_be_bytes(header[8..12].try_into().expect("four")));
        if first == offset {
            let last = i32::from_be_bytes(header[23..].try_into().expect("four"));
            assert_eq!(last + 1, records, "records in the batch at {offset}");
            let last = at + 12 + length as u64 - 1;
            file.seek(SeekFrom::Start(last)).expect("sought");
            let mut byte = [0];
            file.read_exact(&mut byte).expect("a byte");
            file.seek(SeekFrom::Start(last)).expect("sought");
            file.write_all(&[byte[0] ^ 0x55]).expect("written");
            return;
        }
        at += 12 + length as u64;
    }
}

#[test]
fn damaged_batches_are_counted_as_lost_and_skipped() {
    let kafka = Kafka::start(1);
    for delivery in GUARANTEES {
        let place = Place::on(&kafka.brokers, "damaged", 2);
        // Ten batches of ten records in each partition.
        for i in 0..20 {
            place.produce((0..10).map(|j| Sent::new(i % 2, format!("record {}", i * 10 + j))));
        }
        // One in the middle, two adjacent ones, and the last one.
        for offset in [30, 60, 70, 90] {
            damage(&kafka, &place.input, 0, offset, 10);
        }
        let file = file("kandle.yaml", &config(&place, &[delivery]));
        let mut daemon = Daemon::start_with(&config(&place, &[delivery]), |command| {
            command.env("RUST_LOG", "info,kandle::source=debug");
        });
        let mut ledger = Ledger::of(&place);
        until("all that can be read", || {
            ledger.read(Duration::from_millis(200));
            (ledger.count() >= 160).then_some(())
        });
        until("all of the rest to be counted", || {
            (metric(&mut daemon, "kandle_skipped_records_total") == 40.0).then_some(())
        });
        let lost: Vec<i64> = (30..40).chain(60..80).chain(90..100).collect();
        assert_eq!(ledger.missing(&[100, 100]), lost.iter().map(|&o| (0, o)).collect::<Vec<_>>());
        if delivery == EXACTLY_ONCE {
            assert_eq!(ledger.duplicates(), 0);
        }
        daemon.wait_log("data lost");
        until("the commit", || place.committed(0).filter(|(offset, _)| *offset == 100));
        // Later records are read as usual.
        place.produce([Sent::new(0, "later")]);
        until("the later record", || {
            ledger.read(Duration::from_millis(200));
            ledger.missing(&[101, 100]).iter().all(|(_, offset)| *offset != 100).then_some(())
        });
        daemon.stop();
        // A drain ends too.
        for i in 0..3 {
            place.produce((0..10).map(|j| Sent::new(0, format!("more {}", i * 10 + j))));
        }
        damage(&kafka, &place.input, 0, 121, 10);
        let started = Instant::now();
        let (code, _, log) = finish(kandle().args(["drain", "-c"]).arg(&file.path), b"");
        assert_eq!(code, 0, "{log}");
        assert!(log.contains("data lost") && started.elapsed() < support::TIMEOUT, "{log}");
        assert_eq!(place.committed(0).map(|committed| committed.0), Some(131));
    }
}
