//! Rejoins the group after a heartbeat has timed out, under the new group protocol (KIP-848).
//!
//! There, heartbeat responses carry assignments, and the coordinator sends each change once. A member that misses a
//! response must send its whole state, which the coordinator answers with the whole assignment. librdkafka 2.12 does so
//! after a lost connection, but repeats the same short request after a timeout. The group then waits for this member to
//! read partitions that it has never heard of. A member that joins sends its whole state.

use std::time::{Duration, Instant};

use rdkafka::Statistics;
use rdkafka::consumer::Consumer;

use super::serve::{Source, SourceError};
use crate::settings::Settings;

/// Shortest time between two rejoins: each interrupts reading, and heartbeats may time out often on a slow cluster.
const REJOIN_INTERVAL: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Heartbeats {
    /// `group.protocol` is `consumer`.
    new_protocol: bool,
    /// Requests to the coordinator that have timed out so far.
    timeouts: u64,
    /// A response was lost, and the member has not rejoined since.
    response_lost: bool,
    rejoined: Option<Instant>,
}

impl Heartbeats {
    pub fn new(settings: &Settings) -> Self {
        let protocol = settings.property("group.protocol");
        let new_protocol = protocol.is_some_and(|name| name.eq_ignore_ascii_case("consumer"));
        Self { new_protocol, timeouts: 0, response_lost: false, rejoined: None }
    }

    /// Called once a second. `timeouts`: requests to the coordinator that have timed out so far. `join_state`: the
    /// client's. Returns whether to rejoin now.
    fn look(&mut self, timeouts: u64, join_state: &str, now: Instant) -> bool {
        let more = timeouts > std::mem::replace(&mut self.timeouts, timeouts);
        self.response_lost |= more;
        if join_state == "init" {
            // The client is joining, for instance because it was fenced.
            self.response_lost = false;
        }
        let soon = self.rejoined.is_some_and(|at| now.saturating_duration_since(at) < REJOIN_INTERVAL);
        // Not before the coordinator responds again.
        if !self.new_protocol || !self.response_lost || more || soon || join_state != "steady" {
            return false;
        }
        self.response_lost = false;
        self.rejoined = Some(now);
        true
    }
}

impl Source {
    /// # Errors
    /// Subscribing again fails.
    pub(super) fn look_at_heartbeats(&mut self, statistics: &Statistics) -> Result<(), SourceError> {
        let Some(group) = &statistics.cgrp else { return Ok(()) };
        let coordinator = statistics.brokers.values().find(|b| b.name.starts_with("GroupCoordinator"));
        let timeouts = coordinator.map_or(0, |broker| broker.req_timeouts);
        if self.heartbeats.look(timeouts, &group.join_state, Instant::now()) {
            tracing::warn!(
                "a heartbeat timed out: rejoining the group, which may have assigned partitions meanwhile"
            );
            self.consumer.unsubscribe();
            self.subscribe_now()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_rejoins_once_the_coordinator_responds_again() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut beats = Heartbeats { new_protocol: true, timeouts: 0, response_lost: false, rejoined: None };
        assert!(!beats.look(0, "steady", at(0)));
        assert!(!beats.look(1, "steady", at(1)), "just lost");
        assert!(!beats.look(2, "steady", at(2)), "and again");
        assert!(!beats.look(2, "wait-unassign-call", at(3)));
        assert!(beats.look(2, "steady", at(4)));
        assert!(!beats.look(2, "steady", at(5)), "once");
        assert!(!beats.look(3, "steady", at(6)) && !beats.look(3, "steady", at(63)), "not too often");
        assert!(beats.look(3, "steady", at(64)));
        assert!(!beats.look(4, "steady", at(200)) && !beats.look(4, "init", at(201)));
        assert!(!beats.look(4, "steady", at(202)), "it has joined by itself");
    }

    #[test]
    fn members_of_the_classic_protocol_ask_for_their_assignment_anyway() {
        let mut beats = Heartbeats { new_protocol: false, timeouts: 0, response_lost: false, rejoined: None };
        assert!(!beats.look(1, "steady", Instant::now()) && !beats.look(1, "steady", Instant::now()));
    }
}
