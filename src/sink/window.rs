//! A window under way: what is known of each of its records.

use std::collections::BTreeMap;
use std::time::Instant;

use super::acks::Ticket;
use crate::flow::Encoded;
use crate::record::{Partition, Position, Record};

/// How a dead letter differs from its record, where its topic refuses the record as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Form {
    /// Published with the present time; its own is in a header.
    pub now: bool,
    /// Published under its position as key.
    pub keyed: bool,
    /// Published without its key, value and headers.
    pub bare: bool,
}

/// A window that is published, in whole or in part.
pub(super) struct UnderWay {
    pub content: Encoded,
    /// By span: its lease is held.
    live: Vec<bool>,
    /// One bit a record: published and acknowledged, or no longer ours.
    settled: Vec<u64>,
    /// Records that are not settled.
    left: usize,
    /// Bytes of each message under way.
    sizes: Vec<u32>,
    pub forms: BTreeMap<usize, Form>,
    pub started: Instant,
}

impl UnderWay {
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

    /// True where it was not settled before.
    pub fn settle(&mut self, place: usize) -> bool {
        let new = !self.is_settled(place);
        if new {
            self.settled[place / 64] |= 1 << (place % 64);
            self.left -= 1;
        }
        new
    }

    /// Every record is settled.
    pub fn is_done(&self) -> bool {
        self.left == 0
    }

    pub fn is_live(&self, span: u32) -> bool {
        self.live[span as usize]
    }

    pub fn live_spans(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.live.len()).filter(|&span| self.live[span])
    }

    /// The lease that the record was read under is held.
    pub fn is_held(&self, place: usize) -> bool {
        let span = self.content.window.records[place].span as usize;
        self.live[span] && self.content.window.spans[span].lease.is_held()
    }

    /// A span that counts was revoked or lost since we last looked.
    pub fn has_lost(&self) -> bool {
        self.live_spans().any(|span| !self.content.window.spans[span].lease.is_held())
    }

    /// Settles the records of spans whose lease has ended: somebody else publishes them.
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

    /// The message of a record is on its way.
    pub fn sent(&mut self, place: usize, bytes: u64) {
        self.sizes[place] = bytes.min(u64::from(u32::MAX)) as u32;
    }

    /// Bytes of the record's message, if it is on its way; it is not any more.
    pub fn take_size(&mut self, place: usize) -> u64 {
        u64::from(std::mem::take(&mut self.sizes[place]))
    }

    /// Records from `from` up to `to` that are not settled.
    pub fn unsettled(&self, from: usize, to: usize) -> impl Iterator<Item = Ticket> + '_ {
        (from..to).filter(|&place| !self.is_settled(place)).map(|place| self.ticket(place))
    }

    /// The offset after the last record of each live partition before `to`, of those from `from` on, with what is kept
    /// beside it.
    pub fn offsets(&self, from: usize, to: usize) -> BTreeMap<&Partition, (i64, &str)> {
        let window = &self.content.window;
        if to == self.len() {
            // The last of a span stands behind `from`, or was committed already.
            let spans = self.live_spans().map(|span| &window.spans[span]);
            return spans.map(|span| (&span.partition, (span.last + 1, &*span.metadata))).collect();
        }
        let live = window.records[from..to].iter().filter(|record| self.is_live(record.span));
        let offset = |record: &Record| {
            let span = &window.spans[record.span as usize];
            (&span.partition, (record.offset + 1, &*span.metadata))
        };
        live.map(offset).collect()
    }
}
