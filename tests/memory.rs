//! `memory.limit`: resident memory stays under what the process with its model takes, plus the limit,
//! plus a fifth, whatever the backlog is made of and whether or not the broker answers. Sampled while
//! the backlog is worked off. Short forms here; `make chaos` runs the long ones.

#![cfg(target_os = "linux")]

mod support;

use std::time::{Duration, Instant};

use support::kafka::Kafka;
use support::{Daemon, Place, Sent, until};

const LIMIT_MIB: u64 = 128;

/// The process with its model and nothing in flight.
fn base(place: &Place, config: &str) -> u64 {
    let group = format!("{}-idle", place.group);
    let idle = config.replace(&format!("group: {}", place.group), &format!("group: {group}")).replace(
        &format!("topics: [{}]", place.input),
        &format!("topics: [{}]", place.dead.replace("-dead", "-idle")),
    );
    let mut daemon = Daemon::start(&idle);
    daemon.wait_log(" assigned partitions=");
    let rss = daemon.rss_kib();
    daemon.stop();
    rss
}

fn settings(place: &Place, more: &[(&str, &str)]) -> String {
    place.create(&place.dead.replace("-dead", "-idle"), 1, &[]);
    let limit = format!("{{ limit: {LIMIT_MIB}MiB }}");
    let common = [
        ("memory", limit.as_str()),
        ("input", "{ topics: [$INPUT], group: $GROUP, format: text }"),
        ("output", "{ topic: $OUTPUT }"),
    ];
    place.config(&[&common[..], more].concat())
}

/// Samples until `done`; returns the highest resident memory in KiB.
fn highest(daemon: &mut Daemon, mut done: impl FnMut(&mut Daemon) -> bool) -> u64 {
    let mut highest = 0;
    let started = Instant::now();
    while !done(daemon) {
        assert!(daemon.ended().is_none(), "{}", daemon.log());
        assert!(started.elapsed() < 10 * support::PATIENCE, "{}", daemon.log());
        highest = highest.max(daemon.rss_kib());
        std::thread::park_timeout(Duration::from_millis(20));
    }
    highest
}

#[track_caller]
fn assert_within(what: &str, base_kib: u64, highest_kib: u64) {
    let ceiling = (base_kib + LIMIT_MIB * 1024) * 12 / 10;
    println!(
        "memory: {what}: {} MiB at most, of {} MiB: ({} with its model + {LIMIT_MIB} limit) x 1.2",
        highest_kib / 1024,
        ceiling / 1024,
        base_kib / 1024
    );
    assert!(highest_kib <= ceiling, "{what}: {highest_kib} KiB, more than {ceiling}");
}

/// Published so far, by the daemon's own metrics.
fn published(daemon: &mut Daemon, topic: &str) -> u64 {
    let (_, metrics) = daemon.get("/metrics");
    let name = format!("kandle_records_total{{outcome=\"predicted\",topic=\"{topic}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)?.trim().parse().ok()).unwrap_or(0)
}

fn small_records(count: usize) {
    for guarantee in ["at_least_once", "exactly_once"] {
        let place = Place::new("small", 8);
        place.produce((0..count).map(|i| Sent::new((i % 8) as i32, format!("ticket {i}"))));
        let delivery = format!("{{ guarantee: {guarantee} }}");
        let config = settings(&place, &[("task", "{ kind: noop }"), ("model", ""), ("delivery", &delivery)]);
        let base = base(&place, &config);
        let mut daemon = Daemon::start(&config);
        let most = highest(&mut daemon, |d| published(d, &place.input) >= count as u64);
        daemon.stop();
        assert_within(&format!("{count} small records, {guarantee}"), base, most);
    }
}

fn large_records(count: usize) {
    let place = Place::new("large-records", 4);
    let text = "where is my order ".repeat(1_000_000 / 18);
    place.produce((0..count).map(|i| Sent::new((i % 4) as i32, text.clone())));
    let config = settings(&place, &[]);
    let base = base(&place, &config);
    let mut daemon = Daemon::start(&config);
    let most = highest(&mut daemon, |d| published(d, &place.input) >= count as u64);
    daemon.stop();
    assert_within(&format!("{count} records of 1 MB"), base, most);
}

#[test]
fn a_backlog_of_small_records() {
    small_records(300_000);
}

#[test]
#[ignore = "make chaos"]
fn a_backlog_of_five_million_small_records() {
    small_records(5_000_000);
}

#[test]
fn records_of_a_megabyte() {
    large_records(150);
}

#[test]
#[ignore = "make chaos"]
fn two_thousand_records_of_a_megabyte() {
    large_records(2000);
}

#[test]
fn a_broker_that_does_not_acknowledge_and_kafka_away_is_no_stall() {
    // Of its own: it is going to be frozen.
    let kafka = Kafka::start(1);
    let place = Place::on(&kafka.brokers, "frozen", 4);
    let count = 400_000i32;
    place.produce((0..count).map(|i| Sent::new(i % 4, "where is my order now ".repeat(8))));
    let config = settings(
        &place,
        &[
            ("task", "{ kind: noop }"),
            ("model", ""),
            ("server", "{ listen: \"127.0.0.1:0\", stall_after: 3s }"),
            ("batch", "{ timeout: 1s }"),
        ],
    );
    let base = base(&place, &config);
    let mut daemon = Daemon::start(&config);
    until("work", || (published(&mut daemon, &place.input) > 0).then_some(()));
    kafka.freeze(0);
    // Longer than a stall would take to show.
    let frozen = Instant::now();
    let most = highest(&mut daemon, |d| {
        assert_eq!(d.get("/livez").0, 200, "{}", d.get("/livez").1);
        assert_eq!(d.get("/readyz").0, 200);
        frozen.elapsed() > Duration::from_secs(8)
    });
    kafka.thaw(0);
    let most = most.max(highest(&mut daemon, |d| published(d, &place.input) >= count as u64));
    daemon.stop();
    assert_within("a broker that does not acknowledge", base, most);
}
