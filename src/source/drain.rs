//! The bounds of a drain: where each partition ends, frozen at the start, and how far it has come.
//! Shared by the source, which moves it, and by whoever shows it.

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

/// Between two looks at how far the group's other members are.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// A topic counts as deleted once it has been absent for so long: a broker that has just started may know no topics yet.
const ABSENT: Duration = Duration::from_secs(3);

/// Why a drain cannot come to its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Gone {
    #[error(
        "topic {0} was deleted and recreated during the drain, so its end is gone: start the drain again"
    )]
    Recreated(String),
    #[error("topic {0} was deleted during the drain: what was left of it cannot be read")]
    Deleted(String),
}

/// One partition of a drain.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bound {
    /// Where the group stood at the start; the log's first offset where it had none.
    pub from: i64,
    /// The offset after the last record: the end of the log at the start, or of what was committed
    /// to it by transactions, for readers of such.
    pub to: i64,
    /// The offset after the last one that this process has published.
    pub reached: Option<i64>,
    pub predicted: u64,
    pub dead_lettered: u64,
    pub tombstones: u64,
    /// Dead letters left alone by a replay of such: another job's, or without their bytes.
    pub passed_over: u64,
    /// Nothing before `to` is left to be read by this process.
    #[serde(skip)]
    done: bool,
    /// The drain is over only once the group has an offset at or after `to`.
    #[serde(skip)]
    open: bool,
    /// The log's first offset.
    #[serde(skip)]
    low: i64,
}

impl Bound {
    /// The offset after the last one that is known to be published.
    pub fn position(&self) -> i64 {
        self.reached.unwrap_or(self.from)
    }
}

/// A drain under way.
#[derive(Default)]
pub struct Drain {
    /// Of a replay: from where to where.
    ranges: Option<BTreeMap<Partition, Range>>,
    bounds: Mutex<BTreeMap<Partition, Bound>>,
    /// The topics whose ends were frozen, by name, where the broker gives ids.
    topics: OnceLock<BTreeMap<String, Identity>>,
    /// Since when topics are absent.
    absent: Mutex<HashMap<String, Instant>>,
    complete: AtomicBool,
    /// When it was last asked how far the group is.
    looked: Mutex<Option<Instant>>,
}

impl Drain {
    /// Between points that are known already: a replay.
    pub fn between(ranges: BTreeMap<Partition, Range>) -> Self {
        Self { ranges: Some(ranges), ..Self::default() }
    }

    /// The ranges of a replay.
    pub fn ranges(&self) -> Option<&BTreeMap<Partition, Range>> {
        self.ranges.as_ref()
    }

    /// Freezes the ends of all partitions of `topics` (names, or one pattern), and where the group stands; returns the
    /// topics' names.
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
        let known = standing_of(&consumer::offset_reader(config)?, ranges.keys())?;
        // A group without any offset begins at the ends.
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

    /// The topics of which something is left.
    pub(super) fn open_topics(&self) -> Vec<String> {
        let bounds = self.lock();
        topics_of(bounds.iter().filter(|(_, bound)| bound.open).map(|(partition, _)| partition))
    }

    /// # Errors
    /// The topic is another one than at the start, so that the frozen ends mean nothing.
    pub(super) fn check_topic(&self, topic: &str, now: Option<&TopicId>) -> Result<(), Gone> {
        let frozen = self.topics.get().and_then(|topics| topics.get(topic)?.id());
        match (frozen, now) {
            (Some(frozen), Some(now)) if frozen != now => Err(Gone::Recreated(topic.to_owned())),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// A topic of which something is left is another one than at the start, or has been absent for [`ABSENT`].
    pub(super) fn check_topics(
        &self,
        identities: &BTreeMap<String, Identity>,
        now: Instant,
    ) -> Result<(), Gone> {
        let mut absent = self.absent.lock().unwrap_or_else(|e| e.into_inner());
        for topic in self.open_topics() {
            let identity = identities.get(&topic);
            self.check_topic(&topic, identity.and_then(Identity::id))?;
            match identity {
                Some(Identity::Absent) => {
                    let since = *absent.entry(topic.clone()).or_insert(now);
                    if now.saturating_duration_since(since) >= ABSENT {
                        return Err(Gone::Deleted(topic));
                    }
                }
                _ => drop(absent.remove(&topic)),
            }
        }
        Ok(())
    }

    /// Where to begin in a partition for which the group has no offset; `None` leaves it to `input.start`.
    pub(super) fn begin(&self, partition: &Partition) -> Option<i64> {
        self.ranges.as_ref()?.get(partition).map(|range| range.from)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Partition, Bound>> {
        self.bounds.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn bounds(&self) -> BTreeMap<Partition, Bound> {
        self.lock().clone()
    }

    /// Every partition has reached its end, by whichever member.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Relaxed)
    }

    /// Records (offsets) of all partitions that nobody is known to have published.
    pub fn left(&self) -> i64 {
        self.lock().values().map(|bound| (bound.to - bound.position()).max(0)).sum()
    }

    /// The offset at which a partition ends; `None` for one that is not part of the drain.
    pub(super) fn bound(&self, partition: &Partition) -> Option<i64> {
        self.lock().get(partition).map(|bound| bound.to)
    }

    /// The same; a partition that is not part of the drain has nothing to give.
    pub(super) fn end(&self, partition: &Partition) -> i64 {
        self.bound(partition).unwrap_or(i64::MIN)
    }

    /// Nothing of the partition is left to be read.
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

    /// The partition comes to this process, which reads on from `start`, or from the log's first offset.
    pub(super) fn taken_up(&self, partition: &Partition, start: Option<i64>) {
        if let Some(bound) = self.lock().get_mut(partition) {
            bound.done = start.unwrap_or(bound.low) >= bound.to;
            // Another member may have come further.
            bound.reached = bound.reached.max(start.filter(|&start| start > bound.from));
        }
    }

    /// A window is published; `counts` are its predictions, dead letters and tombstones by span.
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

    /// The partitions of which it is time to ask how far the group is.
    pub(super) fn to_look_at(&self) -> Option<Vec<Partition>> {
        let mut looked = self.looked.lock().unwrap_or_else(|e| e.into_inner());
        if looked.is_some_and(|at| at.elapsed() < POLL_INTERVAL) {
            return None;
        }
        *looked = Some(Instant::now());
        let bounds = self.lock();
        let open = bounds.iter().filter(|(_, bound)| bound.open);
        Some(open.map(|(partition, _)| partition.clone()).collect())
    }

    /// The group's offsets of the partitions that were asked for.
    pub(super) fn progress(&self, known: &HashMap<Partition, i64>) {
        let mut bounds = self.lock();
        let mut all = true;
        for (partition, bound) in bounds.iter_mut().filter(|(_, bound)| bound.open) {
            let known = known.get(partition).copied();
            bound.reached = bound.reached.max(known.filter(|&offset| offset > bound.from));
            // From here on the topic may be deleted, and the group's offset with it.
            bound.open = known.is_none_or(|offset| offset < bound.to);
            all &= !bound.open;
        }
        if all {
            self.complete.store(true, Ordering::Relaxed);
        }
    }
}

/// Where a group stands, as its settings name it.
pub fn standing<'a>(
    settings: &Settings,
    partitions: impl Iterator<Item = &'a Partition>,
) -> Result<HashMap<Partition, i64>, KafkaError> {
    let config = consumer::config(settings, consumer::Role::Drain, "", 1);
    standing_of(&consumer::offset_reader(&config)?, partitions)
}

/// The offsets of a client's group, less those of earlier topics of the same names.
pub(super) fn standing_of<'a>(
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
    fn is_over_once_the_group_is_at_all_ends() {
        let p = |number| Partition::new("t", number);
        let drain = drain(&[(0, 0, 10, true), (1, 5, 5, false), (2, 3, 9, true)]);
        assert_eq!(drain.to_look_at(), Some(vec![p(0), p(2)]));
        assert_eq!(drain.to_look_at(), None, "not at once again");
        drain.progress(&[(p(0), 10)].into());
        assert!(!drain.is_complete());
        drain.progress(&[(p(0), 10), (p(2), 8)].into());
        assert!(!drain.is_complete());
        assert_eq!(drain.left(), 1);
        drain.progress(&[(p(0), 10), (p(2), 9)].into());
        assert!(drain.is_complete());
    }

    #[test]
    fn a_group_that_begins_at_the_ends_has_to_have_offsets() {
        let p = Partition::new("t", 0);
        let drain = drain(&[(0, 7, 7, true)]);
        drain.progress(&HashMap::new());
        assert!(!drain.is_complete(), "the next drain would not know where this one was");
        drain.progress(&[(p, 8)].into());
        assert!(drain.is_complete());
    }

    #[test]
    fn a_topic_is_another_one_where_both_ids_are_known_and_differ() {
        let id = |text| TopicId::new(text);
        let drain = drain(&[(0, 0, 10, true)]);
        assert_eq!(drain.check_topic("t", Some(&id("a"))), Ok(()), "not frozen yet");
        let topics = [("t".to_owned(), Identity::Id(id("a"))), ("u".to_owned(), Identity::Unknown)];
        drain.topics.set(topics.into()).unwrap();
        assert_eq!(drain.check_topic("t", Some(&id("b"))), Err(Gone::Recreated("t".to_owned())));
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
        assert_eq!(check(Identity::Absent, ABSENT * 2), Err(Gone::Deleted("t".to_owned())));
        drain.progress(&[(Partition::new("t", 0), 10)].into());
        assert_eq!(check(Identity::Absent, ABSENT * 3), Ok(()));
        assert!(drain.is_complete());
    }

    #[test]
    fn what_is_taken_up_at_its_end_is_done() {
        let p = Partition::new("t", 0);
        let drain = drain(&[(0, 2, 9, true)]);
        drain.taken_up(&p, Some(9));
        assert!(drain.is_done(&p));
        drain.taken_up(&p, None);
        assert!(!drain.is_done(&p), "from the log's start");
        assert!(drain.is_done(&Partition::new("t", 1)), "no part of the drain");
    }
}
