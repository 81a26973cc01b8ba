//! The schedule on a real Kafka, with a clock that the test sets.

use crate::support;

use std::path::Path;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use support::{Daemon, File, Place, Sent, file, finish, kandle, until};

const NOOP: [(&str, &str); 3] = [("task", "{ kind: noop }"), ("model", ""), ("output", "{ topic: $OUTPUT }")];

/// Sets the clock that a process reads.
fn set(clock: &File, time: &str) {
    // Renamed into place, so that no process reads half of it.
    let next = clock.path.with_extension("next");
    std::fs::write(&next, time).expect("written");
    std::fs::rename(&next, &clock.path).expect("moved");
}

fn start(config: &str, clock: &Path) -> Daemon {
    Daemon::start_with(config, |command| {
        command.env("KANDLE_TEST_CLOCK", clock);
    })
}

fn tickets(from: usize, to: usize) -> impl Iterator<Item = Sent> {
    (from..to).map(|i| Sent::ticket((i % 2) as i32, i, "hello"))
}

fn members(place: &Place) -> usize {
    let client: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", &place.brokers).create().expect("a client");
    until("the group's members", || {
        let list = client.fetch_group_list(Some(&place.group), Duration::from_secs(5)).ok()?;
        Some(list.groups().iter().map(|group| group.members().len()).sum())
    })
}

fn sum(place: &Place) -> i64 {
    (0..2).filter_map(|partition| place.committed(partition)).map(|(offset, _)| offset).sum()
}

const NIGHTS: &str = "periods: [{ cron: \"0 22 * * *\", duration: 8h }], timezone: Europe/Berlin";

#[test]
fn outside_of_its_periods_kandle_stays_in_the_group_and_pauses() {
    let place = Place::new("schedule-stay", 2);
    let clock = file("clock", "2026-11-25T12:00:00Z");
    let schedule = format!("{{ {NIGHTS} }}");
    let mut daemon = start(&place.config(&[&NOOP[..], &[("schedule", &schedule)]].concat()), &clock.path);
    daemon.wait_log("outside of the schedule: partitions paused");
    daemon.wait_log("assigned partitions");
    place.produce(tickets(0, 100));
    assert_eq!(members(&place), 1);
    until("the schedule metric", || {
        daemon.get("/metrics").1.contains("kandle_schedule_open 0").then_some(())
    });
    assert_eq!(sum(&place), 0, "nothing is consumed by day");
    // Ten at night in Berlin.
    set(&clock, "2026-11-25T21:00:00Z");
    assert_eq!(place.predictions(100).len(), 100);
    until("the group's offsets", || (sum(&place) == 100).then_some(()));
    assert!(daemon.get("/metrics").1.contains("kandle_schedule_open 1"));
    // Six in the morning.
    set(&clock, "2026-11-26T05:00:00Z");
    until("the pause", || (daemon.log().matches("partitions paused").count() == 2).then_some(()));
    place.produce(tickets(100, 150));
    // While paused, kandle reports its lag and consumes nothing.
    until("the lag", || {
        let (_, metrics) = daemon.get("/metrics");
        let lag = metrics.lines().filter(|line| line.starts_with("kandle_lag_records{"));
        let lag: u64 = lag.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
        (lag == 50).then_some(())
    });
    assert_eq!(daemon.get("/readyz").0, 200);
    daemon.stop();
    assert_eq!(sum(&place), 100);
}

#[test]
fn outside_of_its_periods_kandle_leaves_the_group_and_unloads_the_model() {
    let place = Place::new("schedule-leave", 2);
    let clock = file("clock", "2026-11-25T23:00:00Z");
    let schedule = format!("{{ {NIGHTS}, outside: leave, unload_model: true }}");
    let mut daemon = start(&place.config(&[("schedule", &schedule)]), &clock.path);
    place.produce(tickets(0, 20));
    assert_eq!(place.predictions(20).len(), 20);
    set(&clock, "2026-11-26T05:00:01Z");
    daemon.wait_log("not in the group");
    daemon.wait_log("model unloaded");
    assert_eq!(members(&place), 0);
    assert_eq!(sum(&place), 20, "what was in flight is committed");
    assert_eq!(daemon.get("/readyz").0, 200);
    let metrics = daemon.get("/metrics").1;
    assert!(!metrics.contains("kandle_lag_records{"), "a member without partitions has no lag: {metrics}");
    let status = daemon.get("/status").1;
    assert!(status.contains("\"outside_schedule_until\":\"2026-11-26T21:00:00Z\""), "{status}");
    place.produce(tickets(20, 40));
    let loads = |daemon: &Daemon| daemon.log().matches("device chosen").count();
    assert_eq!(loads(&daemon), 1);
    // A minute before, the model is loaded; the group is joined on time.
    set(&clock, "2026-11-26T20:59:30Z");
    until("the model", || (loads(&daemon) == 2).then_some(()));
    assert_eq!(members(&place), 0);
    set(&clock, "2026-11-26T21:00:00Z");
    assert_eq!(place.predictions(40).len(), 40);
    daemon.stop();
    assert_eq!(sum(&place), 40);
}

#[test]
fn started_and_stopped_outside_of_its_periods_kandle_never_joins() {
    let place = Place::new("schedule-never", 2);
    let clock = file("clock", "2026-11-25T12:00:00Z");
    let schedule = format!("{{ {NIGHTS}, outside: leave }}");
    let mut daemon = start(&place.config(&[&NOOP[..], &[("schedule", &schedule)]].concat()), &clock.path);
    daemon.wait_log("not in the group");
    assert_eq!(daemon.get("/readyz").0, 200);
    daemon.stop();
    assert_eq!(members(&place), 0);
}

#[test]
fn a_backlog_that_will_miss_finish_by_is_logged_in_advance() {
    let place = Place::new("schedule-late", 2);
    place.produce(tickets(0, 2000));
    // The clock stands still two seconds before finish_by. Once the rate is measured, nine seconds of work remain.
    let clock = file("clock", "2026-11-25T05:59:58Z");
    let more = [
        ("schedule", "{ finish_by: \"06:00\" }"),
        ("window", "{ max_records: 10 }"),
        ("delivery", "{ commit_interval: 100ms }"),
    ];
    let config = file("kandle.yaml", &place.config(&[&NOOP[..], &more].concat()));
    let mut command = kandle();
    command.args(["drain", "-c"]).arg(&config.path).env("KANDLE_TEST_CLOCK", &clock.path);
    // Ten records per 70 ms: 14 s for all of them. The first five seconds measure the rate.
    let (code, _, log) = finish(command.env("FAILPOINTS", "encode=sleep(70)"), b"");
    assert_eq!(code, 0, "{log}");
    let late = "the backlog will miss schedule.finish_by at the present rate deadline=2026-11-25T06:00:00Z";
    assert_eq!(log.matches(late).count(), 1, "{log}");
    // No warning if there is enough time.
    place.produce(tickets(0, 2000));
    set(&clock, "2026-11-25T04:00:00Z");
    let (code, _, log) = finish(&mut command, b"");
    assert_eq!(code, 0, "{log}");
    assert!(!log.contains("will miss schedule.finish_by"), "{log}");
}
