//! Reads two topics and matches their predictions by position, in bounded memory.
//!
//! The topic with fewer records is read once, in blocks: as many predictions as fit into a half of `memory.limit`. For each
//! block, the other topic is read once, and its predictions at the block's positions are compared. So two topics of any
//! size need one pass over the smaller one and, if its predictions take n halves of the limit, n passes over the larger
//! one. Beside the block, only ranges of offsets are kept, which are few unless most positions are missing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::{ControlFlow, Range as Bytes};

use rdkafka::message::{BorrowedMessage, Message};

use super::tally::{Pairs, Side};
use crate::agreement::{Comparer, Unlike};
use crate::cli::offsets::{read, read_until};
use crate::codec::{Waiting, WholeReader};
use crate::kafka::consumer::Reader;
use crate::kafka::headers;
use crate::kafka::range::{self, Point, Range, RangeError};
use crate::record::{Partition, Position, Raw};
use crate::settings::Settings;
use crate::telemetry::Metrics;

/// Bytes that a prediction in a block takes beside its value.
const OVERHEAD: usize = 128;

/// What was found.
pub(super) struct Found {
    /// Of `--a` and `--b`.
    pub sides: [Side; 2],
    pub pairs: Pairs,
}

pub(super) struct Join<'a> {
    consumer: &'a Reader,
    /// The bounds of the input; `None`: every position.
    input: Option<&'a BTreeMap<Partition, Range>>,
    /// `None`: values are compared as they are.
    reader: Option<WholeReader>,
    /// Of the reader alone.
    metrics: Metrics,
    /// Bytes of a block.
    limit: usize,
    pairs: Pairs,
}

/// Predictions of one topic that are waiting for those of the other.
#[derive(Default)]
struct Block {
    /// Values, one after the other.
    memory: Vec<u8>,
    /// By position: where the value is (`None`: a tombstone). What has met its other prediction is taken out.
    values: HashMap<Position, Option<Bytes<usize>>>,
    /// The partitions of the positions, so that these share their topics' names.
    partitions: HashSet<Partition>,
}

impl Block {
    fn bytes(&self) -> usize {
        self.memory.len() + self.values.len() * OVERHEAD
    }

    fn keep(&mut self, mut position: Position, value: Option<&[u8]>) {
        match self.partitions.get(&position.partition) {
            Some(known) => position.partition = known.clone(),
            None => drop(self.partitions.insert(position.partition.clone())),
        }
        let place = value.map(|value| {
            let start = self.memory.len();
            self.memory.extend_from_slice(value);
            start..self.memory.len()
        });
        self.values.insert(position, place);
    }
}

/// A topic's partitions with their ranges, and the place from which the next block is read.
struct Cursor {
    parts: Vec<(Partition, Range)>,
    part: usize,
    next: Option<i64>,
}

impl Cursor {
    fn records(&self) -> i64 {
        self.parts.iter().map(|(_, range)| range.to - range.from).sum()
    }
}

impl<'a> Join<'a> {
    pub fn new(
        settings: &Settings,
        consumer: &'a Reader,
        comparer: Comparer,
        input: Option<&'a BTreeMap<Partition, Range>>,
    ) -> anyhow::Result<Self> {
        let reader = match comparer.is_of_bytes() {
            true => None,
            false => Some(WholeReader::of_predictions(settings)?),
        };
        let limit = usize::try_from(settings.memory.limit.0 / 2).unwrap_or(usize::MAX);
        Ok(Self { consumer, input, reader, metrics: Metrics::new(), limit, pairs: Pairs::new(comparer) })
    }

    /// Reads both topics. `from`: where the input begins, if it is a time: predictions are not older than their records.
    pub fn topics(mut self, topics: [&str; 2], from: Option<Point>) -> anyhow::Result<Found> {
        let from = from.filter(|from| matches!(from, Point::Time(_)));
        let (a, b) = (self.cursor(topics[0], from)?, self.cursor(topics[1], from)?);
        // The index of the topic that is kept in blocks.
        let (mut smaller, larger, kept) = if b.records() < a.records() { (b, a, 1) } else { (a, b, 0) };
        let other = 1 - kept;
        let mut sides = topics.map(Side::new);
        let mut pass = 0;
        loop {
            let mut block = self.block(&mut smaller, &mut sides[kept])?;
            if pass > 0 && block.values.is_empty() {
                break;
            }
            pass += 1;
            tracing::info!(
                pass,
                predictions = block.values.len(),
                of = topics[kept],
                with = topics[other],
                "comparing a block of predictions with the other topic"
            );
            for (partition, range) in &larger.parts {
                read(self.consumer, partition, range.from, range.to, |message| {
                    self.meet(message, &mut block, (pass == 1).then_some(&mut sides[other]), other == 0);
                })?;
            }
            if smaller.part == smaller.parts.len() {
                break;
            }
        }
        Ok(Found { sides, pairs: self.pairs })
    }

    fn cursor(&self, topic: &str, from: Option<Point>) -> anyhow::Result<Cursor> {
        let parts = match range::resolve(self.consumer, &[topic], from, None, true) {
            Ok(parts) => parts.into_iter().collect(),
            Err(RangeError::Empty(_)) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        Ok(Cursor { parts, part: 0, next: None })
    }

    /// Reads the next block of a topic; it is empty at the topic's end.
    fn block(&self, cursor: &mut Cursor, side: &mut Side) -> anyhow::Result<Block> {
        let mut block = Block::default();
        while let Some((partition, range)) = cursor.parts.get(cursor.part) {
            let (mut next, mut full) = (cursor.next.unwrap_or(range.from), false);
            read_until(self.consumer, partition, next, range.to, |message| {
                next = message.offset() + 1;
                match self.position(message) {
                    Some(position) => {
                        if side.count(&position, message) {
                            block.keep(position, message.payload());
                        }
                    }
                    None => side.others += 1,
                }
                full = block.bytes() >= self.limit;
                if full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
            if full && next < range.to {
                cursor.next = Some(next);
                return Ok(block);
            }
            (cursor.part, cursor.next) = (cursor.part + 1, None);
            if full {
                return Ok(block);
            }
        }
        Ok(block)
    }

    /// The position that a prediction is about; `None` if it is not of the input.
    fn position(&self, message: &BorrowedMessage<'_>) -> Option<Position> {
        let position = headers::origin(message)?;
        let within = |bounds: &Range| (bounds.from..bounds.to).contains(&position.offset);
        match self.input {
            None => Some(position),
            Some(input) => input.get(&position.partition).is_some_and(within).then_some(position),
        }
    }

    /// Compares a record of the other topic with what the block has of its position. `side`: counts it. `is_a`: it is
    /// of the first topic.
    fn meet(
        &mut self,
        message: &BorrowedMessage<'_>,
        block: &mut Block,
        side: Option<&mut Side>,
        is_a: bool,
    ) {
        let position = self.position(message);
        if let Some(side) = side {
            match &position {
                Some(position) => {
                    side.count(position, message);
                }
                None => side.others += 1,
            }
        }
        let Some(position) = position else { return };
        // The first record of a position counts, so a second one finds nothing.
        let Some(kept) = block.values.remove(&position) else { return };
        let kept = kept.map(|place| &block.memory[place]);
        match (kept, message.payload()) {
            (None, None) => self.pairs.tombstones += 1,
            (None, Some(_)) | (Some(_), None) => self.pairs.cannot_compare(Unlike::Tombstone),
            (Some(kept), Some(value)) => {
                let (a, b) = if is_a { (value, kept) } else { (kept, value) };
                let Some(reader) = &self.reader else { return self.pairs.compare(position, a, b) };
                let waiting = Waiting { stop: None, health: None, metrics: &self.metrics };
                let json = |value| {
                    let raw = Raw { bytes: value, headers: None };
                    // Never stopped.
                    let _ = reader.fetch(std::iter::once(raw), &waiting);
                    reader.json(raw)
                };
                match (json(a), json(b)) {
                    (Ok(a), Ok(b)) => self.pairs.compare(position, a.as_bytes(), b.as_bytes()),
                    _ => self.pairs.cannot_compare(Unlike::Unreadable),
                }
            }
        }
    }
}
