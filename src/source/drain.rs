//! The bounds of a drain: where each partition ends, frozen at the start, and how far it has come.
//! Shared by the source, which moves it, and by whoever shows it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde::Serialize;

use crate::cluster;
use crate::record::Partition;
use crate::window::Span;

/// How long one question to the cluster may take, and how often it is asked.
const ASK: Duration = Duration::from_secs(5);
const TRIES: usize = 6;
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
#[derive(Debug, Default)]
pub struct Drain {
    bounds: Mutex<BTreeMap<Partition, Bound>>,
    complete: AtomicBool,
    /// When the other members were last looked at.
    looked: Mutex<Option<Instant>>,
}

impl Drain {
    /// Freezes the ends of all partitions of `topics` (names, or one pattern).
    pub fn freeze<C: ConsumerContext>(
        &self,
        consumer: &BaseConsumer<C>,
        topics: &[&str],
    ) -> Result<(), String> {
        let said = |error: KafkaError| format!("the ends of the input cannot be read: {error}");
        let mut partitions = Vec::new();
        let pattern =
            topics.iter().find_map(|topic| topic.starts_with('^').then(|| regex::Regex::new(topic)));
        let wanted: Vec<Option<&str>> = match &pattern {
            Some(_) => vec![None],
            None => topics.iter().copied().map(Some).collect(),
        };
        for topic in wanted {
            let metadata = again(|| consumer.fetch_metadata(topic, ASK)).map_err(said)?;
            for found in metadata.topics() {
                let fits = match &pattern {
                    Some(Ok(pattern)) => pattern.is_match(found.name()),
                    _ => topic == Some(found.name()),
                };
                if fits {
                    partitions
                        .extend(found.partitions().iter().map(|p| Partition::new(found.name(), p.id())));
                }
            }
        }
        let mut ends = BTreeMap::new();
        for partition in partitions {
            let (low, high) =
                again(|| consumer.fetch_watermarks(&partition.topic, partition.number, ASK)).map_err(said)?;
            ends.insert(partition, (low, high));
        }
        let known = again(|| committed(consumer, ends.keys())).map_err(said)?;
        let bound = |(partition, (low, high)): (Partition, (i64, i64))| {
            let from = known.get(&partition).copied().unwrap_or(low).max(low).min(high);
            let bound = Bound {
                from,
                to: high,
                reached: None,
                predicted: 0,
                dead_lettered: 0,
                tombstones: 0,
                done: from >= high,
            };
            (partition, bound)
        };
        *self.lock() = ends.into_iter().map(bound).collect();
        Ok(())
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
    pub(super) fn look<C: ConsumerContext>(&self, consumer: &BaseConsumer<C>) -> bool {
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
        let known = match committed(consumer, open.iter()) {
            Ok(known) => known,
            Err(error) => {
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

/// Asks until there is an answer, some times: brokers come and go.
fn again<T>(ask: impl Fn() -> Result<T, KafkaError>) -> Result<T, KafkaError> {
    let mut tries = 1;
    loop {
        match ask() {
            Err(error) if tries < TRIES => {
                tracing::warn!(%error, tries, "the ends of the input: asking again")
            }
            answer => return answer,
        }
        tries += 1;
    }
}

/// Whether a partition has no record from `from` up to `to`: nothing but the markers of transactions,
/// or what was compacted away. A consumer of its own looks, whose end of the partition cannot be
/// mistaken for another's. `None` where there is no answer in time.
pub(super) fn is_bare(config: &ClientConfig, partition: &Partition, from: i64, to: i64) -> Option<bool> {
    let mut config = config.clone();
    // It is assigned by hand and commits nothing: the group does not see it.
    config.remove("group.instance.id");
    config.set("enable.partition.eof", "true").set("statistics.interval.ms", "0");
    let consumer: BaseConsumer = config.create().ok()?;
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(from)).ok()?;
    consumer.assign(&list).ok()?;
    let deadline = Instant::now() + ASK;
    while Instant::now() < deadline {
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => return Some(message.offset() >= to),
            Some(Err(KafkaError::PartitionEOF(_))) => return Some(true),
            Some(Err(error)) => tracing::debug!(%partition, %error, "looking at the end"),
            None => {}
        }
    }
    None
}

fn committed<'a, C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    partitions: impl Iterator<Item = &'a Partition>,
) -> Result<BTreeMap<Partition, i64>, KafkaError> {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        list.add_partition(&partition.topic, partition.number);
    }
    if list.count() == 0 {
        return Ok(BTreeMap::new());
    }
    let known = cluster::committed(consumer, &list, ASK)?;
    let offset = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match element.offset()
    {
        Offset::Offset(offset) => Some((Partition::new(element.topic(), element.partition()), offset)),
        _ => None,
    };
    Ok(known.elements().iter().filter_map(offset).collect())
}
