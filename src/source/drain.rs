//! The bounds of a drain: where each partition ends, frozen at the start, and how far it has come.
//! Shared by the source, which moves it, and by whoever shows it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde::Serialize;

use super::client;
use super::range::{self, ASK, Range, RangeError, Read};
use crate::cluster;
use crate::record::Partition;
use crate::settings::Settings;
use crate::window::Span;

/// Between two looks at how far the group's other members are.
const LOOK: Duration = Duration::from_millis(500);

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
    complete: AtomicBool,
    /// When the other members were last looked at.
    looked: Mutex<Option<Instant>>,
    /// By what.
    bystander: Mutex<Option<BaseConsumer>>,
}

impl Drain {
    /// Between points that are known already: a replay.
    pub fn between(ranges: BTreeMap<Partition, Range>) -> Self {
        Self { ranges: Some(ranges), ..Self::default() }
    }

    /// Freezes the ends of all partitions of `topics` (names, or one pattern), and where the group stands.
    pub(super) fn freeze(&self, config: &ClientConfig, topics: &[&str]) -> Result<(), RangeError> {
        let ranges = match &self.ranges {
            Some(ranges) => ranges.clone(),
            None => range::resolve(&client::observer(config)?, topics, None, None, true)?,
        };
        let bystander = client::bystander(config)?;
        let known = committed(&bystander, ranges.keys())?;
        *self.bystander.lock().unwrap_or_else(|e| e.into_inner()) = Some(bystander);
        let bound = |(partition, range): (Partition, Range)| {
            let from = known.get(&partition).copied().unwrap_or(range.from).clamp(range.from, range.to);
            let bound = Bound {
                from,
                to: range.to,
                reached: None,
                predicted: 0,
                dead_lettered: 0,
                tombstones: 0,
                passed_over: 0,
                done: from >= range.to,
            };
            (partition, bound)
        };
        *self.lock() = ranges.into_iter().map(bound).collect();
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

    /// The offset at which a partition ends; one that is not part of the drain has nothing to give.
    pub(super) fn end(&self, partition: &Partition) -> i64 {
        self.lock().get(partition).map_or(i64::MIN, |bound| bound.to)
    }

    /// Where the group stood at the start.
    pub(super) fn start(&self, partition: &Partition) -> i64 {
        self.lock().get(partition).map_or(0, |bound| bound.from)
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

    /// The partition comes to this process, which reads on from `start`.
    pub(super) fn taken_up(&self, partition: &Partition, start: Option<i64>) {
        if let Some(bound) = self.lock().get_mut(partition) {
            bound.done = start.unwrap_or(bound.from) >= bound.to;
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

    /// Asks, now and then, how far the whole group is; true once all partitions are at their ends.
    pub(super) fn look(&self) -> bool {
        {
            let mut looked = self.looked.lock().unwrap_or_else(|e| e.into_inner());
            if looked.is_some_and(|at| at.elapsed() < LOOK) {
                return false;
            }
            *looked = Some(Instant::now());
        }
        let open: Vec<Partition> = {
            let bounds = self.lock();
            let open = bounds.iter().filter(|(_, bound)| bound.from < bound.to);
            open.map(|(partition, _)| partition.clone()).collect()
        };
        let bystander = self.bystander.lock().unwrap_or_else(|e| e.into_inner());
        let known = match bystander.as_ref().map(|bystander| committed(bystander, open.iter())) {
            // Nothing is frozen yet.
            None => return false,
            Some(Ok(known)) => known,
            Some(Err(error)) => {
                tracing::warn!(%error, "how far the group is cannot be read now; asking again");
                return false;
            }
        };
        let mut bounds = self.lock();
        let mut all = true;
        for partition in &open {
            let Some(bound) = bounds.get_mut(partition) else { continue };
            let known = known.get(partition).copied();
            bound.reached = bound.reached.max(known.filter(|&offset| offset > bound.from));
            all &= known.is_some_and(|offset| offset >= bound.to);
        }
        if all {
            self.complete.store(true, Ordering::Relaxed);
        }
        all
    }
}

/// Whether a partition has no record from `from` up to `to`: nothing but the markers of transactions,
/// or what was compacted away. A consumer of its own looks, whose end of the partition cannot be
/// mistaken for another's. `None` where there is no answer in time.
pub(super) fn is_bare(config: &ClientConfig, partition: &Partition, from: i64, to: i64) -> Option<bool> {
    let consumer = client::observer(config).ok()?;
    let first = range::read(&consumer, partition, from, ASK, |message| ControlFlow::Break(message.offset()));
    match first {
        Ok(Read::Stopped(offset)) => Some(offset >= to),
        Ok(Read::End) => Some(true),
        Ok(Read::Silence) | Err(_) => None,
    }
}

/// Where a group stands, as its settings name it.
pub fn standing<'a>(
    settings: &Settings,
    partitions: impl Iterator<Item = &'a Partition>,
) -> Result<BTreeMap<Partition, i64>, KafkaError> {
    committed(&client::bystander(&client::config(settings, client::Role::Drain, "", 1))?, partitions)
}

/// The offsets of a client's group.
fn committed<'a>(
    consumer: &BaseConsumer,
    partitions: impl Iterator<Item = &'a Partition>,
) -> Result<BTreeMap<Partition, i64>, KafkaError> {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        list.add_partition(&partition.topic, partition.number);
    }
    if list.count() == 0 {
        return Ok(BTreeMap::new());
    }
    let known = range::again(|| cluster::committed(consumer, &list, ASK))?;
    let offset = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match element.offset()
    {
        Offset::Offset(offset) => Some((Partition::new(element.topic(), element.partition()), offset)),
        _ => None,
    };
    Ok(known.elements().iter().filter_map(offset).collect())
}
