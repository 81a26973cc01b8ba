//! A window in flight, with the state of each of its records.

use std::collections::BTreeMap;
use std::time::Instant;

use super::acks::Ticket;
use crate::flow::{Encoded, Sample};
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

/// What became of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SampleOutcome {
    Published,
    /// Left out: larger than the topic's `max.message.bytes`.
    TooLarge,
    /// Left out: by the topic's or the broker's rules.
    Refused,
    /// Left out: its record's lease has ended, or the record became a dead letter after all.
    Dropped,
}

impl SampleOutcome {
    /// The label `outcome` of `kandle_samples_total`; `None`: it is not counted.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Published => Some("published"),
            Self::TooLarge => Some("too_large"),
            Self::Refused => Some("refused"),
            Self::Dropped => None,
        }
    }
}

/// Where a sample is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SampleState {
    Unsent,
    /// In flight, with so many bytes.
    Sent(u64),
    /// Acknowledged, in a transaction that is not committed yet.
    Acknowledged,
    Settled(SampleOutcome),
}

/// The sample of a record, which is published beside it: a record is settled when its sample is, too.
struct SampleInFlight {
    value: Vec<u8>,
    state: SampleState,
    /// The broker has refused a batch with it before.
    refused: bool,
}

/// A window whose records are being published.
pub(super) struct InFlightWindow {
    pub content: Encoded,
    /// For each span, whether its lease was held at the last [`Self::drop_lost`].
    live: Vec<bool>,
    /// One bit per record: set when it is published and acknowledged, or when its lease has ended. Its sample may not be.
    settled: Vec<u64>,
    /// Number of records and samples that are not settled.
    left: usize,
    /// The samples, by their records' indexes.
    samples: BTreeMap<usize, SampleInFlight>,
    /// Bytes of each record's message in flight; 0: none is.
    sizes: Vec<u32>,
    /// Forms of dead letters that their topic refuses otherwise, by the record's index.
    pub forms: BTreeMap<usize, DeadLetterForm>,
    pub started: Instant,
}

impl InFlightWindow {
    pub fn new(mut content: Encoded) -> Self {
        let count = content.outcomes.len();
        let samples: BTreeMap<usize, SampleInFlight> = std::mem::take(&mut content.samples)
            .into_iter()
            .map(|Sample { record, value }| {
                (record as usize, SampleInFlight { value, state: SampleState::Unsent, refused: false })
            })
            .collect();
        let mut window = Self {
            live: vec![true; content.window.spans.len()],
            settled: vec![0; count.div_ceil(64)],
            left: count + samples.len(),
            samples,
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

    /// Whether a record and its sample are settled.
    pub fn is_settled(&self, place: usize) -> bool {
        self.record_is_settled(place)
            && self.samples.get(&place).is_none_or(|sample| matches!(sample.state, SampleState::Settled(_)))
    }

    /// Whether a record is settled; its sample may not be.
    pub fn record_is_settled(&self, place: usize) -> bool {
        self.settled[place / 64] >> (place % 64) & 1 == 1
    }

    /// Settles a record, but not its sample.
    pub fn settle(&mut self, place: usize) {
        if !self.record_is_settled(place) {
            self.settled[place / 64] |= 1 << (place % 64);
            self.left -= 1;
        }
    }

    /// Settles a record's sample, if it has one that is not.
    pub fn settle_sample(&mut self, place: usize, outcome: SampleOutcome) {
        if let Some(sample) = self.samples.get_mut(&place)
            && !matches!(sample.state, SampleState::Settled(_))
        {
            sample.state = SampleState::Settled(outcome);
            self.left -= 1;
        }
    }

    /// The broker has refused a batch with a record's sample. It is sent again once, since the topic's limits are read again
    /// before; after that it is left out.
    pub fn sample_refused(&mut self, place: usize, outcome: SampleOutcome) {
        match self.samples.get_mut(&place) {
            Some(sample) if !sample.refused => sample.refused = true,
            _ => self.settle_sample(place, outcome),
        }
    }

    /// The value of a record's sample that is still to be sent.
    pub fn sample_to_send(&self, place: usize) -> Option<&[u8]> {
        let sample = self.samples.get(&place).filter(|sample| sample.state == SampleState::Unsent)?;
        Some(&sample.value)
    }

    /// Marks a record's sample, of `bytes` bytes, as in flight.
    pub fn sample_sent(&mut self, place: usize, bytes: u64) {
        if let Some(sample) = self.samples.get_mut(&place) {
            sample.state = SampleState::Sent(bytes);
        }
    }

    /// Marks a record's sample as acknowledged. Returns its bytes, or 0 if it was not in flight.
    pub fn sample_acknowledged(&mut self, place: usize) -> u64 {
        match self.samples.get_mut(&place).map(|sample| &mut sample.state) {
            Some(state) => match *state {
                SampleState::Sent(bytes) => {
                    *state = SampleState::Acknowledged;
                    bytes
                }
                _ => 0,
            },
            None => 0,
        }
    }

    /// Nothing is in flight any more: what was sent and is not settled has to be sent again.
    pub fn forget_sent(&mut self) {
        self.sizes.fill(0);
        for sample in self.samples.values_mut() {
            if !matches!(sample.state, SampleState::Settled(_)) {
                sample.state = SampleState::Unsent;
            }
        }
    }

    /// The outcomes of the settled samples, each with its record's index.
    pub fn sample_outcomes(&self) -> impl Iterator<Item = (usize, SampleOutcome)> + '_ {
        self.samples.iter().filter_map(|(place, sample)| match sample.state {
            SampleState::Settled(outcome) => Some((*place, outcome)),
            _ => None,
        })
    }

    /// Bytes of the samples.
    pub fn sample_bytes(&self) -> usize {
        self.samples.values().map(|sample| sample.value.capacity()).sum()
    }

    /// Whether every record and sample is settled.
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
                self.settle_sample(place, SampleOutcome::Dropped);
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
