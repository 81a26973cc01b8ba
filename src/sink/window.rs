//! A window in flight, with the state of each of its records.

use std::collections::BTreeMap;
use std::time::Instant;

use super::acks::Ticket;
use crate::flow::Encoded;
use crate::kafka::metadata::Metadata;
use crate::record::{Partition, Position, Record};

/// How a dead letter differs from its record, because its topic refuses the unchanged record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct DeadLetterForm {
    /// Published with the current time as timestamp; the record's own timestamp is in a header.
    pub now: bool,
    /// Published with the record's position as key.
    pub keyed: bool,
    /// Published without the record's key, value and headers.
    pub bare: bool,
}

/// A window whose records are being published.
pub(super) struct InFlightWindow {
    pub content: Encoded,
    /// For each span, whether its lease was held at the last [`Self::drop_lost`].
    live: Vec<bool>,
    /// One bit per record: set when it is published and acknowledged, or when its lease has ended.
    settled: Vec<u64>,
    /// Number of records that are not settled.
    left: usize,
    /// Bytes of each record's message in flight; 0: none is.
    sizes: Vec<u32>,
    /// Forms of dead letters that their topic refuses otherwise, by the record's index.
    pub forms: BTreeMap<usize, DeadLetterForm>,
    pub started: Instant,
}

impl InFlightWindow {
    pub fn new(content: Encoded) -> Self {
        let count = content.outcomes.len();
        let mut window = Self {
            live: vec![true; content.window.spans.len()],
            settled: vec![0; count.div_ceil(64)],
            left: count,
            sizes: vec![0; count],
            forms: BTreeMap::new(),
            started: Instant::now(),
            content,
        };
        window.drop_lost();
        window
    }

    pub fn id(&self) -> u64 {
        self.content.window.id
    }

    pub fn len(&self) -> usize {
        self.content.outcomes.len()
    }

    pub fn ticket(&self, place: usize) -> Ticket {
        Ticket::new(self.id(), place)
    }

    pub fn position(&self, place: usize) -> Position {
        self.content.window.position(&self.content.window.records[place])
    }

    pub fn is_settled(&self, place: usize) -> bool {
        self.settled[place / 64] >> (place % 64) & 1 == 1
    }

    /// Settles a record. Returns true if it was not settled before.
    pub fn settle(&mut self, place: usize) -> bool {
        let new = !self.is_settled(place);
        if new {
            self.settled[place / 64] |= 1 << (place % 64);
            self.left -= 1;
        }
        new
    }

    /// Whether every record is settled.
    pub fn is_done(&self) -> bool {
        self.left == 0
    }

    pub fn is_live(&self, span: u32) -> bool {
        self.live[span as usize]
    }

    pub fn live_spans(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.live.len()).filter(|&span| self.live[span])
    }

    /// Whether the lease that the record was read under is held.
    pub fn is_held(&self, place: usize) -> bool {
        let span = self.content.window.records[place].span as usize;
        self.live[span] && self.content.window.spans[span].lease.is_held()
    }

    /// Whether the lease of a span has ended since the last [`Self::drop_lost`].
    pub fn has_lost(&self) -> bool {
        self.live_spans().any(|span| !self.content.window.spans[span].lease.is_held())
    }

    /// Settles the records of spans whose lease has ended: the partition's next owner publishes them.
    pub fn drop_lost(&mut self) {
        if !self.has_lost() {
            return;
        }
        for (live, span) in self.live.iter_mut().zip(&self.content.window.spans) {
            *live = *live && span.lease.is_held();
        }
        for place in 0..self.len() {
            if !self.live[self.content.window.records[place].span as usize] {
                self.settle(place);
            }
        }
    }

    /// Marks a record's message, of `bytes` bytes, as in flight.
    pub fn sent(&mut self, place: usize, bytes: u64) {
        self.sizes[place] = bytes.min(u64::from(u32::MAX)) as u32;
    }

    /// Marks a record's message as no longer in flight. Returns its bytes, or 0 if it was not in flight.
    pub fn take_size(&mut self, place: usize) -> u64 {
        u64::from(std::mem::take(&mut self.sizes[place]))
    }

    /// The records in `from..to` that are not settled.
    pub fn unsettled(&self, from: usize, to: usize) -> impl Iterator<Item = Ticket> + '_ {
        (from..to).filter(|&place| !self.is_settled(place)).map(|place| self.ticket(place))
    }

    /// The offsets to commit for the records in `from..to`: for each live partition, the offset after its last record,
    /// with its commit metadata.
    pub fn offsets(&self, from: usize, to: usize) -> BTreeMap<&Partition, (i64, &Metadata)> {
        let window = &self.content.window;
        if to == self.len() {
            // The last record of a span is at `from` or later, or was committed already.
            let spans = self.live_spans().map(|span| &window.spans[span]);
            return spans.map(|span| (&span.partition, (span.last + 1, &span.metadata))).collect();
        }
        let live = window.records[from..to].iter().filter(|record| self.is_live(record.span));
        let offset = |record: &Record| {
            let span = &window.spans[record.span as usize];
            (&span.partition, (record.offset + 1, &span.metadata))
        };
        live.map(offset).collect()
    }
}
