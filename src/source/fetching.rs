//! Detects partitions that the client no longer fetches although they hold unread records.
//!
//! librdkafka 2.12 can stop fetching a partition for good. It remembers the highest leader epoch that it has seen of a
//! partition. A topic that is deleted and recreated begins at epoch 0 again, so brokers refuse the fetches
//! (UNKNOWN_LEADER_EPOCH), and librdkafka ignores the new metadata as outdated. Only a new client helps, so the process
//! exits.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use rdkafka::{ClientConfig, Statistics};

use super::lag::of_partition;
use super::ledger::PartitionState;
use super::lookup::{Offsets, Question};
use super::serve::{Source, SourceError};
use crate::failpoint;
use crate::kafka::native::TopicId;
use crate::record::Partition;

/// A partition whose position has not moved for this long is checked, and again at this interval.
const QUIET: Duration = Duration::from_secs(10);
/// The client counts as stuck once a partition has been behind its end for this long. Broker quotas alone can delay a
/// fetch by half a minute.
const STUCK: Duration = Duration::from_secs(60);
/// The same for a topic that was recreated while this client lived: that is when clients get stuck, and the next owner
/// of the partition may be stuck too.
const STUCK_AFTER_RECREATION: Duration = Duration::from_secs(15);

/// A partition that is fetched but whose position does not move.
#[derive(Debug)]
struct Quiet {
    /// The offset to read next.
    position: i64,
    since: Instant,
    /// Since when the log is known to hold records at or after the position.
    behind: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Fetching {
    quiet: HashMap<Partition, Quiet>,
    asked: Instant,
    /// Since when partitions are paused.
    paused: Option<Instant>,
    stuck_after: Duration,
    /// The client fetches nothing while it holds so many prefetched messages, or bytes of them.
    full: (i64, i64),
    /// The last known id of each topic that is subscribed to.
    topic_ids: HashMap<String, TopicId>,
    /// Topics that were recreated since this client first saw them.
    recreated: HashSet<String>,
}

impl Fetching {
    /// `config`: the client's.
    pub fn new(config: &ClientConfig, now: Instant) -> Self {
        let number = |name| config.get(name).and_then(|text| text.parse().ok()).unwrap_or(i64::MAX);
        let full = (number("queued.min.messages"), number("queued.max.messages.kbytes").saturating_mul(1024));
        // Tests shorten the wait.
        let stuck_after = failpoint::argument("stuck_after").and_then(|seconds| seconds.parse().ok());
        Self {
            quiet: HashMap::new(),
            asked: now,
            paused: None,
            stuck_after: stuck_after.map_or(STUCK, Duration::from_secs),
            full,
            topic_ids: HashMap::new(),
            recreated: HashSet::new(),
        }
    }

    /// Called when the id of a topic is known.
    pub fn topic_is(&mut self, topic: &str, id: &TopicId) {
        if self.topic_ids.insert(topic.to_owned(), id.clone()).is_some_and(|before| before != *id) {
            self.recreated.insert(topic.to_owned());
        }
    }

    /// Called once a second. `waiting`: offsets to read next of the partitions that should be fetched and of which nothing
    /// is prefetched or in flight. Returns the partitions whose end offsets to ask for.
    fn look(&mut self, waiting: HashMap<Partition, i64>, now: Instant) -> Vec<Partition> {
        self.paused = None;
        self.quiet.retain(|partition, quiet| waiting.get(partition) == Some(&quiet.position));
        for (partition, position) in waiting {
            self.quiet.entry(partition).or_insert(Quiet { position, since: now, behind: None });
        }
        if now.saturating_duration_since(self.asked) < QUIET {
            return Vec::new();
        }
        let quiet =
            self.quiet.iter().filter(|(_, quiet)| now.saturating_duration_since(quiet.since) >= QUIET);
        let partitions: Vec<Partition> = quiet.map(|(partition, _)| partition.clone()).collect();
        if !partitions.is_empty() {
            self.asked = now;
        }
        partitions
    }

    /// Called once a second while partitions are paused. A short pause keeps the state: pauses for topic checks are
    /// frequent on a busy machine.
    fn pause(&mut self, now: Instant) {
        let since = *self.paused.get_or_insert(now);
        if now.saturating_duration_since(since) >= QUIET {
            self.quiet.clear();
        }
    }

    /// Compares positions with the logs' end offsets. Returns a stuck partition, its position and its end offset.
    fn ends(&mut self, ends: &Offsets, now: Instant) -> Option<(Partition, i64, i64)> {
        for (partition, &end) in ends {
            let Some(quiet) = self.quiet.get_mut(partition) else { continue };
            if end <= quiet.position {
                quiet.behind = None;
                continue;
            }
            let behind = *quiet.behind.get_or_insert(now);
            let limit = match self.recreated.contains(&*partition.topic) {
                true => self.stuck_after.min(STUCK_AFTER_RECREATION),
                false => self.stuck_after,
            };
            if now.saturating_duration_since(behind) >= limit {
                return Some((partition.clone(), quiet.position, end));
            }
        }
        None
    }
}

impl Source {
    pub(super) fn look_at_fetching(&mut self, statistics: &Statistics) {
        if self.intake.paused || self.doubt.is_open() {
            return self.fetching.pause(Instant::now());
        }
        let waiting = |owned: &PartitionState| {
            let known = of_partition(statistics, &owned.partition)?;
            let fetched = owned.hold.is_none() && !self.bounds.is_done(&owned.partition);
            let position = owned.next().unwrap_or_else(|| known.lo_offset.max(0));
            // `fetchq_cnt` and `fetchq_size` are those of all partitions together. Half full counts as full: the queue is
            // full in between.
            let (messages, bytes) = self.fetching.full;
            let full = known.fetchq_cnt >= messages / 2 || known.fetchq_size as i64 >= bytes / 2;
            let prefetched = known.next_offset > position;
            let waits = fetched && owned.is_idle() && !prefetched && !full;
            // The fetch state says nothing: a stuck client goes from "active" to "validate-epoch-wait" and back.
            waits.then(|| (owned.partition.clone(), position))
        };
        let waiting = self.ledger.iter().filter_map(waiting).collect();
        let quiet = self.fetching.look(waiting, Instant::now());
        if !quiet.is_empty() {
            tracing::debug!(partitions = ?quiet, "no progress: asking for the ends of the logs");
            self.lookup.ask(Question::Quiet(quiet));
        }
    }

    /// # Errors
    /// The client no longer fetches a partition that holds records.
    pub(super) fn on_quiet(&mut self, ends: &Offsets) -> Result<(), SourceError> {
        match self.fetching.ends(ends, Instant::now()) {
            Some((partition, position, end)) => Err(SourceError::Stuck { partition, position, end }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_that_holds_records_and_does_not_move_is_stuck() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut fetching = Fetching::new(&ClientConfig::new(), start);
        let p = Partition::new("t", 0);
        let read = |offset| HashMap::from([(p.clone(), offset)]);
        let position = |offset| HashMap::from([(p.clone(), offset)]);
        assert!(fetching.look(read(5), at(1)).is_empty());
        assert!(fetching.look(read(5), at(10)).is_empty(), "not for long enough");
        assert_eq!(fetching.look(read(5), at(11)), std::slice::from_ref(&p));
        assert!(fetching.look(read(5), at(12)).is_empty(), "asked already");
        assert_eq!(fetching.ends(&position(9), at(12)), None, "the first time that it is behind");
        assert_eq!(fetching.ends(&position(9), at(71)), None);
        assert_eq!(fetching.ends(&position(9), at(72)), Some((p.clone(), 5, 9)));
        assert_eq!(fetching.ends(&position(5), at(73)), None, "at its end");
        assert_eq!(fetching.ends(&position(9), at(140)), None, "counted anew");
        fetching.look(read(6), at(200));
        assert_eq!(fetching.ends(&position(9), at(300)), None, "it has moved");
        for seconds in [301, 305] {
            fetching.pause(at(seconds));
            fetching.look(read(6), at(seconds + 1));
        }
        assert!(fetching.ends(&position(9), at(360)).is_some(), "short pauses do not count");
        for seconds in 361..372 {
            fetching.pause(at(seconds));
        }
        fetching.look(read(6), at(372));
        assert_eq!(fetching.ends(&position(9), at(373)), None, "counted anew after a long one");
        let id = TopicId::new;
        fetching.topic_is(&p.topic, &id("a"));
        fetching.topic_is(&p.topic, &id("a"));
        assert_eq!(fetching.ends(&position(9), at(388)), None, "the same topic");
        fetching.topic_is(&p.topic, &id("b"));
        assert!(fetching.ends(&position(9), at(388)).is_some(), "recreated: for a shorter time");
        fetching.look(HashMap::new(), at(389));
        assert_eq!(fetching.ends(&position(9), at(400)), None, "not fetched now");
    }
}
