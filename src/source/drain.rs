//! The state of a drain: the end offset of each partition, frozen at the start, and the progress towards it.
//! Shared by the source, which updates it, and the command that reports it.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::Offset;
use serde::Serialize;

use super::start::{Begin, start_of};
use crate::kafka::cluster;
use crate::kafka::consumer::{self, Reader};
use crate::kafka::native::{self, Identity, TopicId};
use crate::kafka::range::{self, REQUEST_TIMEOUT, Range, RangeError};
use crate::record::{Partition, topics_of};
use crate::settings::{Settings, Start};
use crate::window::Span;

/// Interval at which the group's offsets are read, to see the progress of other members.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// A topic absent for this long counts as deleted; a broker that has just started may not know its topics yet.
const ABSENT: Duration = Duration::from_secs(3);

/// Why a drain cannot finish.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DrainTopicLost {
    #[error(
        "topic {0} was deleted and recreated during the drain, so its end offsets are void: \
         start the drain again"
    )]
    Recreated(String),
    #[error("topic {0} was deleted during the drain: its remaining records cannot be read")]
    Deleted(String),
}

/// Bounds and progress of one partition in a drain.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bound {
    /// The group's offset at the start of the drain, within the range. Without one: the range's start, or its end with
    /// `input.start: latest`.
    pub from: i64,
    /// End offset (exclusive), frozen at the start: the high watermark, or the last stable offset if
    /// `isolation.level` is read_committed.
    pub to: i64,
    /// The offset after the last one known to be published, by any member; `None` if that is not beyond `from`.
    pub reached: Option<i64>,
    pub predicted: u64,
    pub dead_lettered: u64,
    pub tombstones: u64,
    /// Messages skipped when reprocessing dead letters: another job's, or without their original value.
    pub passed_over: u64,
    /// This process has read everything before `to`.
    #[serde(skip)]
    done: bool,
    /// The group's committed offset is not known to have reached `to`, so the drain is not complete.
    #[serde(skip)]
    open: bool,
    /// The first offset of the log, or of a replay's range.
    #[serde(skip)]
    low: i64,
}

impl Bound {
    /// The offset after the last one that is known to be published.
    pub fn position(&self) -> i64 {
        self.reached.unwrap_or(self.from)
    }
}

/// A drain or replay under way.
#[derive(Default)]
pub struct Drain {
    /// The ranges of a replay; `None` for a drain.
    ranges: Option<BTreeMap<Partition, Range>>,
    bounds: Mutex<BTreeMap<Partition, Bound>>,
    /// Ids of the topics at the start, by name, to detect recreated topics.
    topics: OnceLock<BTreeMap<String, Identity>>,
    /// Topics that are absent, and since when.
    absent: Mutex<HashMap<String, Instant>>,
    complete: AtomicBool,
    /// When the group's offsets were last asked for.
    looked: Mutex<Option<Instant>>,
}

impl Drain {
    /// A replay of these ranges.
    pub fn between(ranges: BTreeMap<Partition, Range>) -> Self {
        Self { ranges: Some(ranges), ..Self::default() }
    }

    /// The ranges of a replay.
    pub fn ranges(&self) -> Option<&BTreeMap<Partition, Range>> {
        self.ranges.as_ref()
    }

    /// Freezes the end offsets of all partitions of `topics` (names, or one pattern) and reads the group's offsets.
    /// Returns the topics' names.
    pub(super) fn freeze(
        &self,
        config: &ClientConfig,
        topics: &[&str],
        start: Start,
    ) -> Result<Vec<String>, RangeError> {
        let reader = consumer::reader_with(config)?;
        let ranges = match &self.ranges {
            Some(ranges) => ranges.clone(),
            None => range::resolve(&reader, topics, None, None, true)?,
        };
        let known = committed_offsets_of(&consumer::offset_reader(config)?, ranges.keys())?;
        // `input.start: latest`: a group without any offset begins at the end offsets.
        let at_ends = start == Start::Latest && known.is_empty() && self.ranges.is_none();
        let bound = |(partition, range): (Partition, Range)| {
            let from = match known.get(&partition) {
                Some(&offset) => offset,
                None if at_ends => range.to,
                None => range.from,
            };
            let from = from.clamp(range.from, range.to);
            let bound = Bound {
                from,
                to: range.to,
                reached: None,
                predicted: 0,
                dead_lettered: 0,
                tombstones: 0,
                passed_over: 0,
                done: from >= range.to,
                open: from < range.to || at_ends,
                low: range.from,
            };
            (partition, bound)
        };
        let bounds: BTreeMap<Partition, Bound> = ranges.into_iter().map(bound).collect();
        let names = topics_of(bounds.keys());
        let identities = range::retry(|| native::identities(&reader, &names, REQUEST_TIMEOUT))?;
        self.topics.get_or_init(|| identities);
        *self.lock() = bounds;
        Ok(names)
    }

    /// The topics that the group has not finished.
    pub(super) fn open_topics(&self) -> Vec<String> {
        let bounds = self.lock();
        topics_of(bounds.iter().filter(|(_, bound)| bound.open).map(|(partition, _)| partition))
    }

    /// # Errors
    /// The topic was recreated since the start, so its frozen end offsets are void.
    pub(super) fn check_topic(&self, topic: &str, now: Option<&TopicId>) -> Result<(), DrainTopicLost> {
        let frozen = self.topics.get().and_then(|topics| topics.get(topic)?.id());
        match (frozen, now) {
            (Some(frozen), Some(now)) if frozen != now => Err(DrainTopicLost::Recreated(topic.to_owned())),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// An unfinished topic was recreated since the start, or has been absent for [`ABSENT`].
    pub(super) fn check_topics(
        &self,
        identities: &BTreeMap<String, Identity>,
        now: Instant,
    ) -> Result<(), DrainTopicLost> {
        let mut absent = self.absent.lock().unwrap_or_else(|e| e.into_inner());
        for topic in self.open_topics() {
            let identity = identities.get(&topic);
            self.check_topic(&topic, identity.and_then(Identity::id))?;
            match identity {
                Some(Identity::Absent) => {
                    let since = *absent.entry(topic.clone()).or_insert(now);
                    if now.saturating_duration_since(since) >= ABSENT {
                        return Err(DrainTopicLost::Deleted(topic));
                    }
                }
                _ => drop(absent.remove(&topic)),
            }
        }
        Ok(())
    }

    /// The first offset of a partition in a replay; `None` in a drain, which begins at the group's offset.
    pub(super) fn begin(&self, partition: &Partition) -> Option<i64> {
        self.ranges.as_ref()?.get(partition).map(|range| range.from)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Partition, Bound>> {
        self.bounds.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn bounds(&self) -> BTreeMap<Partition, Bound> {
        self.lock().clone()
    }

    /// The group's members have together reached every end offset.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Relaxed)
    }

    /// Offsets of all partitions that are not known to be published.
    pub fn left(&self) -> i64 {
        self.lock().values().map(|bound| (bound.to - bound.position()).max(0)).sum()
    }

    /// End offset of a partition; `None` for one that is not part of the drain.
    pub(super) fn bound(&self, partition: &Partition) -> Option<i64> {
        self.lock().get(partition).map(|bound| bound.to)
    }

    /// End offset of a partition; `i64::MIN`, which no record is before, for one that is not part of the drain.
    pub(super) fn end(&self, partition: &Partition) -> i64 {
        self.bound(partition).unwrap_or(i64::MIN)
    }

    /// This process has read the partition to its end offset, or the partition is not part of the drain.
    pub(super) fn is_done(&self, partition: &Partition) -> bool {
        self.lock().get(partition).is_none_or(|bound| bound.done)
    }

    pub(super) fn set_done(&self, partition: &Partition) {
        if let Some(bound) = self.lock().get_mut(partition) {
            bound.done = true;
        }
    }

    pub(super) fn passed_over(&self, partition: &Partition) {
        if let Some(bound) = self.lock().get_mut(partition) {
            bound.passed_over += 1;
        }
    }

    /// A partition was assigned to this process, which reads it from `start`; `None`: from the log's first offset.
    pub(super) fn assigned(&self, partition: &Partition, start: Option<i64>) {
        if let Some(bound) = self.lock().get_mut(partition) {
            bound.done = start.unwrap_or(bound.low) >= bound.to;
            // Another member may have made progress.
            bound.reached = bound.reached.max(start.filter(|&start| start > bound.from));
        }
    }

    /// Counts a published window. `counts`: predictions, dead letters and tombstones of each span.
    pub(super) fn published(&self, spans: &[Span], counts: &[[u64; 3]]) {
        let mut bounds = self.lock();
        for (span, [predicted, dead_lettered, tombstones]) in spans.iter().zip(counts) {
            if let Some(bound) = bounds.get_mut(&span.partition) {
                bound.reached = bound.reached.max(Some(span.last + 1));
                bound.predicted += predicted;
                bound.dead_lettered += dead_lettered;
                bound.tombstones += tombstones;
            }
        }
    }

    /// The unfinished partitions whose group offsets to ask for; `None` until [`POLL_INTERVAL`] has passed.
    pub(super) fn partitions_to_poll(&self) -> Option<Vec<Partition>> {
        let mut looked = self.looked.lock().unwrap_or_else(|e| e.into_inner());
        if looked.is_some_and(|at| at.elapsed() < POLL_INTERVAL) {
            return None;
        }
        *looked = Some(Instant::now());
        let bounds = self.lock();
        let open = bounds.iter().filter(|(_, bound)| bound.open);
        Some(open.map(|(partition, _)| partition.clone()).collect())
    }

    /// Updates the progress from the group's offsets.
    pub(super) fn progress(&self, known: &HashMap<Partition, i64>) {
        let mut bounds = self.lock();
        let mut all = true;
        for (partition, bound) in bounds.iter_mut().filter(|(_, bound)| bound.open) {
            let known = known.get(partition).copied();
            bound.reached = bound.reached.max(known.filter(|&offset| offset > bound.from));
            // A finished partition is not opened again: its topic may be deleted, and the group's offset with it.
            bound.open = known.is_none_or(|offset| offset < bound.to);
            all &= !bound.open;
        }
        if all {
            self.complete.store(true, Ordering::Relaxed);
        }
    }
}

/// Committed offsets of the settings' group. Partitions without one, or with one of an earlier topic of the same name,
/// are left out.
///
/// # Errors
/// The cluster does not answer.
pub fn committed_offsets<'a>(
    settings: &Settings,
    partitions: impl Iterator<Item = &'a Partition>,
) -> Result<HashMap<Partition, i64>, KafkaError> {
    let config = consumer::config(settings, consumer::Role::Drain, "", 1);
    committed_offsets_of(&consumer::offset_reader(&config)?, partitions)
}

/// What a drain that starts now has to process, of each partition. `ranges`: those of a replay. Changes nothing.
pub fn remaining(
    settings: &Settings,
    ranges: Option<BTreeMap<Partition, Range>>,
) -> Result<BTreeMap<Partition, Bound>, RangeError> {
    let drain = ranges.map_or_else(Drain::default, Drain::between);
    let config = consumer::config(settings, consumer::Role::Drain, "", 1);
    let topics: Vec<&str> = settings.input.topics.iter().map(String::as_str).collect();
    drain.freeze(&config, &topics, settings.input.start)?;
    Ok(drain.bounds())
}

/// Same as [`committed_offsets`], for the group of an existing client.
pub(super) fn committed_offsets_of<'a>(
    consumer: &Reader,
    partitions: impl Iterator<Item = &'a Partition>,
) -> Result<HashMap<Partition, i64>, KafkaError> {
    let partitions: Vec<&Partition> = partitions.collect();
    if partitions.is_empty() {
        return Ok(HashMap::new());
    }
    let (list, names) = (range::list_of(partitions.iter().copied()), topics_of(partitions.into_iter()));
    let known = range::retry(|| cluster::committed(consumer, &list, REQUEST_TIMEOUT))?;
    let identities = range::retry(|| native::identities(consumer, &names, REQUEST_TIMEOUT))?;
    let start = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| {
        let offset = match element.offset() {
            Offset::Offset(offset) => Some(offset),
            _ => None,
        };
        let start = start_of(element, offset, &identities);
        match start.begin {
            Begin::At(offset) => Some((start.partition, offset)),
            Begin::LogStart | Begin::Recreated { .. } => None,
        }
    };
    Ok(known.elements().iter().filter_map(start).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(bounds: &[(i32, i64, i64, bool)]) -> Drain {
        let drain = Drain::default();
        let bound = |&(number, from, to, open): &(i32, i64, i64, bool)| {
            let done = from >= to;
            let bound = Bound {
                from,
                to,
                reached: None,
                predicted: 0,
                dead_lettered: 0,
                tombstones: 0,
                passed_over: 0,
                done,
                open,
                low: 0,
            };
            (Partition::new("t", number), bound)
        };
        *drain.lock() = bounds.iter().map(bound).collect();
        drain
    }

    #[test]
    fn is_complete_once_the_group_has_reached_all_end_offsets() {
        let p = |number| Partition::new("t", number);
        let drain = drain(&[(0, 0, 10, true), (1, 5, 5, false), (2, 3, 9, true)]);
        assert_eq!(drain.partitions_to_poll(), Some(vec![p(0), p(2)]));
        assert_eq!(drain.partitions_to_poll(), None, "asked a moment ago");
        drain.progress(&[(p(0), 10)].into());
        assert!(!drain.is_complete());
        drain.progress(&[(p(0), 10), (p(2), 8)].into());
        assert!(!drain.is_complete());
        assert_eq!(drain.left(), 1);
        drain.progress(&[(p(0), 10), (p(2), 9)].into());
        assert!(drain.is_complete());
    }

    #[test]
    fn a_group_that_begins_at_the_end_offsets_has_to_commit_them() {
        let p = Partition::new("t", 0);
        let drain = drain(&[(0, 7, 7, true)]);
        drain.progress(&HashMap::new());
        assert!(!drain.is_complete(), "the next drain would not know where this one was");
        drain.progress(&[(p, 8)].into());
        assert!(drain.is_complete());
    }

    #[test]
    fn a_topic_counts_as_recreated_if_both_ids_are_known_and_differ() {
        let id = |text| TopicId::new(text);
        let drain = drain(&[(0, 0, 10, true)]);
        assert_eq!(drain.check_topic("t", Some(&id("a"))), Ok(()), "not frozen yet");
        let topics = [("t".to_owned(), Identity::Id(id("a"))), ("u".to_owned(), Identity::Unknown)];
        drain.topics.set(topics.into()).unwrap();
        assert_eq!(drain.check_topic("t", Some(&id("b"))), Err(DrainTopicLost::Recreated("t".to_owned())));
        for (topic, now) in [("t", Some("a")), ("t", None), ("u", Some("a"))] {
            assert_eq!(drain.check_topic(topic, now.map(id).as_ref()), Ok(()));
        }
    }

    #[test]
    fn a_topic_that_stays_absent_is_deleted_unless_the_group_is_at_its_end() {
        let drain = drain(&[(0, 0, 10, true)]);
        let start = Instant::now();
        let check = |identity, after| drain.check_topics(&[("t".to_owned(), identity)].into(), start + after);
        assert_eq!(check(Identity::Absent, Duration::ZERO), Ok(()));
        assert_eq!(check(Identity::Id(TopicId::new("a")), ABSENT), Ok(()), "it is there again");
        assert_eq!(check(Identity::Absent, ABSENT), Ok(()));
        assert_eq!(check(Identity::Absent, ABSENT * 2), Err(DrainTopicLost::Deleted("t".to_owned())));
        drain.progress(&[(Partition::new("t", 0), 10)].into());
        assert_eq!(check(Identity::Absent, ABSENT * 3), Ok(()));
        assert!(drain.is_complete());
    }

    #[test]
    fn a_partition_assigned_at_its_end_offset_is_done() {
        let p = Partition::new("t", 0);
        let drain = drain(&[(0, 2, 9, true)]);
        drain.assigned(&p, Some(9));
        assert!(drain.is_done(&p));
        drain.assigned(&p, None);
        assert!(!drain.is_done(&p), "from the log's start");
        assert!(drain.is_done(&Partition::new("t", 1)), "not part of the drain");
    }
}
