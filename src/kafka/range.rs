//! Ranges of topics, by time or by offset.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::ControlFlow;
use std::str::FromStr;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

use super::topics::TopicFilter;
use crate::record::Partition;

/// Timeout of one request to the cluster.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a request is made before its error counts.
const TRIES: usize = 6;

/// A point in a partition: `2026-11-25T22:00:00+01:00` (RFC 3339) or `offset:1200`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The first record at or after this time.
    Time(Timestamp),
    Offset(i64),
}

impl FromStr for Point {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(offset) = text.strip_prefix("offset:") {
            return match offset.parse() {
                Ok(offset @ 0..) => Ok(Self::Offset(offset)),
                _ => Err(format!("{offset:?} is not a valid offset")),
            };
        }
        text.parse().map(Self::Time).map_err(|_| {
            format!("{text:?} is neither a time such as 2026-11-25T22:00:00Z (RFC 3339, with its offset from UTC) nor offset:N")
        })
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(time) => time.fmt(f),
            Self::Offset(offset) => write!(f, "offset:{offset}"),
        }
    }
}

/// A range of a partition's offsets, and the bounds of its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first offset of the range.
    pub from: i64,
    /// The offset after the last one of the range.
    pub to: i64,
    /// The log's first offset; earlier records are deleted.
    pub low: i64,
    /// The log's high watermark, or its last stable offset for `read_committed`.
    pub high: i64,
}

/// Why a range cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RangeError {
    #[error("a request to the cluster failed: {0}")]
    Kafka(#[from] KafkaError),
    #[error("not a valid topic pattern: {0}")]
    Pattern(#[from] regex::Error),
    #[error("topic {0} does not exist")]
    Unknown(String),
    #[error("--from {from} is not before --to {to}")]
    Order { from: Point, to: Point },
    #[error("--to {0} is in the future: records that arrive until then would be left out")]
    Future(Timestamp),
    /// Retention has deleted a part of the range.
    #[error("{0}")]
    Deleted(String),
    /// The range holds no records.
    #[error("{0}")]
    Empty(String),
}

/// All partitions of `topics` (names, or one pattern).
pub fn partitions<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topics: &[&str],
) -> Result<Vec<Partition>, RangeError> {
    let topics = TopicFilter::new(topics)?;
    let wanted: Vec<Option<&str>> = match topics.names() {
        Some(names) => names.iter().map(|name| Some(name.as_str())).collect(),
        None => vec![None],
    };
    let mut partitions = Vec::new();
    for topic in wanted {
        let metadata = retry(|| consumer.fetch_metadata(topic, REQUEST_TIMEOUT))?;
        for found in metadata.topics().iter().filter(|found| topics.holds(found.name())) {
            if found.partitions().is_empty() {
                return Err(RangeError::Unknown(found.name().to_owned()));
            }
            partitions.extend(found.partitions().iter().map(|p| Partition::new(found.name(), p.id())));
        }
    }
    partitions.sort();
    Ok(partitions)
}

/// Which end of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// The first offset.
    Start,
    /// The high watermark, or the last stable offset for `read_committed`.
    End,
}

/// The offsets at which the logs of partitions start or end: one request to each broker. Partitions with an error are
/// absent; the first such error is returned as well.
pub fn edges<'a, C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    partitions: impl IntoIterator<Item = &'a Partition>,
    edge: Edge,
) -> Result<(HashMap<Partition, i64>, Option<KafkaError>), KafkaError> {
    // In place of a time, as in Kafka's ListOffsets request: -2 (earliest) and -1 (latest).
    let time = match edge {
        Edge::Start => Offset::Beginning,
        Edge::End => Offset::End,
    };
    let (mut offsets, mut failed) = (HashMap::new(), None);
    for element in offsets_at(consumer, partitions, time)?.elements() {
        match (element.error(), element.offset()) {
            (Ok(()), Offset::Offset(offset)) => {
                offsets.insert(Partition::new(element.topic(), element.partition()), offset);
            }
            (Ok(()), _) => failed = failed.or(Some(KafkaError::OffsetFetch(RDKafkaErrorCode::NoOffset))),
            (Err(error), _) => failed = failed.or(Some(error)),
        }
    }
    Ok((offsets, failed))
}

/// Like [`edges`], but any partition's error fails the whole.
pub fn all_edges<'a, C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    partitions: impl IntoIterator<Item = &'a Partition>,
    edge: Edge,
) -> Result<HashMap<Partition, i64>, KafkaError> {
    match edges(consumer, partitions, edge)? {
        (offsets, None) => Ok(offsets),
        (_, Some(error)) => Err(error),
    }
}

/// The offsets of partitions at a time, or at an end of their logs: one request to each broker.
fn offsets_at<'a, C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    partitions: impl IntoIterator<Item = &'a Partition>,
    time: Offset,
) -> Result<TopicPartitionList, KafkaError> {
    let mut list = list_of(partitions);
    if list.count() == 0 {
        return Ok(list);
    }
    list.set_all_offsets(time)?;
    consumer.offsets_for_times(list, REQUEST_TIMEOUT)
}

/// librdkafka's list of `partitions`, without offsets.
pub fn list_of<'a>(partitions: impl IntoIterator<Item = &'a Partition>) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        list.add_partition(&partition.topic, partition.number);
    }
    list
}

/// The ranges of all partitions of `topics` from one point to another; without a point, from the start or to the end.
/// `even_deleted`: accept a range of which retention has already deleted a part.
///
/// # Errors
/// Points in the wrong order or in the future, topics that do not exist, and ranges that are empty or partly deleted,
/// with the offsets that exist.
pub fn resolve<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topics: &[&str],
    from: Option<Point>,
    to: Option<Point>,
    even_deleted: bool,
) -> Result<BTreeMap<Partition, Range>, RangeError> {
    match (from, to) {
        (Some(Point::Time(a)), Some(Point::Time(b))) if a >= b => {
            return Err(RangeError::Order { from: Point::Time(a), to: Point::Time(b) });
        }
        (Some(Point::Offset(a)), Some(Point::Offset(b))) if a >= b => {
            return Err(RangeError::Order { from: Point::Offset(a), to: Point::Offset(b) });
        }
        _ => {}
    }
    if let Some(Point::Time(to)) = to
        && to > Timestamp::now()
    {
        return Err(RangeError::Future(to));
    }
    let partitions = partitions(consumer, topics)?;
    let starts = retry(|| all_edges(consumer, &partitions, Edge::Start))?;
    let ends = retry(|| all_edges(consumer, &partitions, Edge::End))?;
    let mut ranges = BTreeMap::new();
    for partition in partitions {
        let low = starts[&partition];
        // Retention may have moved the start past this end between the two requests.
        let high = ends[&partition].max(low);
        ranges.insert(partition, Range { from: low, to: high, low, high });
    }
    let mut deleted = Vec::new();
    if let Some(point) = from {
        let at = offsets(consumer, &ranges, point)?;
        for (partition, range) in &mut ranges {
            let at = at.get(partition).copied().unwrap_or(range.high);
            range.from = at.clamp(range.low, range.high);
            if range.low > 0 && range.low < range.high && begins_before(consumer, partition, range, point)? {
                deleted.push(partition.clone());
            }
        }
    }
    if let Some(point) = to {
        let at = offsets(consumer, &ranges, point)?;
        for (partition, range) in &mut ranges {
            let at = at.get(partition).copied().unwrap_or(range.high);
            range.to = at.clamp(range.from, range.high);
        }
    }
    if (from.is_some() || to.is_some()) && ranges.values().all(|range| range.from == range.to) {
        return Err(RangeError::Empty(format!(
            "no records from {} to {}; {}",
            from.map_or("the beginning".to_owned(), |p| p.to_string()),
            to.map_or("the end".to_owned(), |p| p.to_string()),
            there_is(consumer, &ranges),
        )));
    }
    if !deleted.is_empty() && !even_deleted {
        let deleted: BTreeMap<Partition, Range> =
            deleted.into_iter().filter_map(|p| ranges.get(&p).map(|range| (p.clone(), *range))).collect();
        return Err(RangeError::Deleted(format!(
            "retention has deleted records from {} on; {}; use --force to take what is left",
            from.map_or("the beginning".to_owned(), |p| p.to_string()),
            there_is(consumer, &deleted),
        )));
    }
    Ok(ranges)
}

/// Whether a point lies before the first record that is left.
fn begins_before<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    partition: &Partition,
    range: &Range,
    point: Point,
) -> Result<bool, KafkaError> {
    Ok(match point {
        Point::Offset(offset) => offset < range.low,
        Point::Time(time) => {
            range.from == range.low
                && timestamp_at(consumer, partition, range.low)?.is_some_and(|first| time < first)
        }
    })
}

/// The offset of a point in each partition. A partition whose records are all before the point is absent.
fn offsets<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    ranges: &BTreeMap<Partition, Range>,
    point: Point,
) -> Result<BTreeMap<Partition, i64>, KafkaError> {
    let time = match point {
        Point::Offset(offset) => {
            return Ok(ranges.keys().map(|partition| (partition.clone(), offset)).collect());
        }
        Point::Time(time) => time.as_millisecond(),
    };
    let found = retry(|| offsets_at(consumer, ranges.keys(), Offset::Offset(time.max(0))))?;
    let mut offsets = BTreeMap::new();
    for element in found.elements() {
        element.error()?;
        if let Offset::Offset(offset) = element.offset() {
            offsets.insert(Partition::new(element.topic(), element.partition()), offset);
        }
    }
    Ok(offsets)
}

/// How the reading of a partition ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read<B> {
    /// The callback stopped it.
    Stopped(B),
    /// The end of the log was reached.
    End,
    /// No record arrived for `patience`.
    TimedOut,
}

/// Passes the records of a partition to `see`, from an offset on, until `see` stops it. The consumer must be in no
/// group and have `enable.partition.eof` set.
///
/// # Errors
/// An error after `patience` without a record. Earlier errors are logged and reading continues.
pub fn read<C: ConsumerContext, B>(
    consumer: &BaseConsumer<C>,
    partition: &Partition,
    from: i64,
    patience: Duration,
    mut see: impl FnMut(&BorrowedMessage<'_>) -> ControlFlow<B>,
) -> Result<Read<B>, KafkaError> {
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(from))?;
    consumer.assign(&list)?;
    let mut heard = Instant::now();
    let end = loop {
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => {
                heard = Instant::now();
                if let ControlFlow::Break(stopped) = see(&message) {
                    break Ok(Read::Stopped(stopped));
                }
            }
            Some(Err(KafkaError::PartitionEOF(_))) => break Ok(Read::End),
            Some(Err(error)) if heard.elapsed() > patience => break Err(error),
            Some(Err(error)) => {
                tracing::warn!(%partition, %error, "error while reading the partition: trying again");
            }
            None if heard.elapsed() > patience => break Ok(Read::TimedOut),
            None => {}
        }
    };
    consumer.unassign()?;
    end
}

/// The timestamp of the first record at or after an offset; `None` if none arrives within [`REQUEST_TIMEOUT`].
pub fn timestamp_at<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    partition: &Partition,
    offset: i64,
) -> Result<Option<Timestamp>, KafkaError> {
    let first = read(consumer, partition, offset, REQUEST_TIMEOUT, |message| {
        ControlFlow::Break(
            message.timestamp().to_millis().and_then(|ms| Timestamp::from_millisecond(ms).ok()),
        )
    });
    Ok(match first? {
        Read::Stopped(time) => time,
        Read::End | Read::TimedOut => None,
    })
}

/// Describes, for an error message, which offsets exist.
fn there_is<C: ConsumerContext>(consumer: &BaseConsumer<C>, ranges: &BTreeMap<Partition, Range>) -> String {
    let one = |(partition, range): (&Partition, &Range)| {
        if range.low == range.high {
            return format!("{partition} is empty");
        }
        let at = |offset| match timestamp_at(consumer, partition, offset) {
            Ok(Some(time)) => format!(" ({time})"),
            // The time only helps the user; the message is complete without it.
            Ok(None) | Err(_) => String::new(),
        };
        let last = range.high - 1;
        format!("{partition} has offsets {}{} to {last}{}", range.low, at(range.low), at(last))
    };
    ranges.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Repeats a request that fails, a few times: brokers may be unavailable for a moment.
pub fn retry<T>(ask: impl Fn() -> Result<T, KafkaError>) -> Result<T, KafkaError> {
    let mut tries = 1;
    loop {
        match ask() {
            Err(error) if tries < TRIES => {
                tracing::warn!(%error, tries, "a request to the cluster failed: trying again")
            }
            answer => return answer,
        }
        tries += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_times_or_offsets() {
        assert_eq!("offset:12".parse(), Ok(Point::Offset(12)));
        let time: Point = "2026-11-25T22:00:00+01:00".parse().unwrap();
        assert_eq!(time.to_string(), "2026-11-25T21:00:00Z");
        for wrong in ["offset:-1", "offset:", "2026-11-25", "2026-11-25T22:00:00", "yesterday"] {
            assert!(wrong.parse::<Point>().is_err(), "{wrong}");
        }
    }
}
