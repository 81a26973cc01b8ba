//! Rebalances while brokers stall, on a Kafka of three brokers.

use crate::support;

use std::time::{Duration, Instant};

use support::kafka::Kafka;
use support::ledger::Ledger;
use support::{Daemon, Place, Sent, TIMEOUT};

const PARTITIONS: usize = 6;

fn numbered(from: usize, to: usize) -> impl Iterator<Item = Sent> {
    (from..to).map(|i| Sent::ticket((i % PARTITIONS) as i32, i, "where is my order"))
}

/// With `group.protocol: consumer`, the coordinator sends a change of the assignment once. If the response is lost, the
/// member has to ask for its whole assignment. librdkafka does not, so the partition would have no reader.
#[test]
fn an_assignment_in_a_lost_heartbeat_response_is_received_all_the_same() {
    let kafka = Kafka::start(3);
    let place = Place::on(&kafka.brokers, "lost-heartbeat", PARTITIONS as i32);
    let config = place.config(&[
        (
            "input",
            "{ topics: [$INPUT], group: $GROUP, field: /text, properties: { group.protocol: consumer } }",
        ),
        ("task", "{ kind: noop }"),
        ("model", ""),
        ("output", "{ topic: $OUTPUT }"),
        ("delivery", "{ commit_interval: 200ms, revoke_timeout: 3s }"),
        ("window", "{ max_wait: 500ms, max_records: 600 }"),
    ]);
    let mut fast = Daemon::start(&config);
    fast.wait_log(" assigned partitions=");
    let mut slow = Daemon::start_with(&config, |command| {
        command.env("FAILPOINTS", "encode=1*sleep(8000)->off");
    });
    slow.wait_log(" assigned partitions=");
    place.produce(numbered(0, 1200));
    // The new member gets one partition of the fast member, and later one of the slow member, which waits until its
    // timeout for windows in flight.
    let mut new = Daemon::start(&config);
    new.wait_log(" assigned partitions=");
    slow.wait_log("windows in flight dropped");
    // The coordinator responds once its followers have the group's change. It waits for one that is frozen.
    let coordinator = kafka.coordinator(&place.group).expect("a coordinator");
    let follower = (coordinator + 1) % kafka.count();
    kafka.freeze(follower);
    new.wait_log("REQTMOUT");
    kafka.thaw(follower);
    let mut ledger = Ledger::of(&place);
    let (started, ends) = (Instant::now(), [200; PARTITIONS]);
    while !ledger.missing(&ends).is_empty() {
        assert!(
            started.elapsed() < TIMEOUT,
            "missing: {:?}\n{}\n---\n{}\n---\n{}",
            ledger.missing(&ends),
            fast.log(),
            slow.log(),
            new.log()
        );
        ledger.read(Duration::from_millis(200));
    }
}
