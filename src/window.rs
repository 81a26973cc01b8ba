//! Windows and the rule by which records are gathered into them. Pure: no Kafka, no clock.
//!
//! A window closes at the first of five limits: records, bytes, the age of its oldest record, the memory that it will
//! take, or the device time that it will need. It gathers across partitions and is contiguous in each of them.

use std::time::{Duration, Instant};

use crate::kafka::headers::Headers;
use crate::kafka::metadata::Metadata;
use crate::lease::Lease;
use crate::record::{Arrival, Partition, Position, Raw, Record};
use crate::settings::Settings;

/// When a window closes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub max_records: usize,
    /// Bytes of keys, values and headers. The record that reaches the limit is the window's last.
    pub max_bytes: usize,
    /// Counted from the arrival of the window's oldest record.
    pub max_wait: Duration,
    /// Bytes that the window takes until it is published, with the footprints of its records. The record that reaches
    /// the limit is the window's last.
    pub max_memory: usize,
    /// Estimated device time. The record that reaches the limit is the window's last, unless the window has fewer than
    /// `work_records`.
    pub max_work: Duration,
    /// Number of records that keep the device busy: `max_work` does not close a smaller window.
    pub work_records: usize,
}

impl Limits {
    /// No limits: a window closes only on [`Gatherer::close`].
    pub const NONE: Self = Self {
        max_records: usize::MAX,
        max_bytes: usize::MAX,
        max_wait: Duration::MAX,
        max_memory: usize::MAX,
        max_work: Duration::MAX,
        work_records: 1,
    };

    /// Those that the settings ask for; `lanes`: the number of records that keep the device busy.
    pub fn of(settings: &Settings, lanes: usize) -> Self {
        Self {
            max_records: settings.window.max_records,
            max_bytes: settings.window.max_bytes.0 as usize,
            max_wait: settings.window.max_wait.0,
            max_memory: settings.window_memory(),
            max_work: settings.window.max_work.0,
            work_records: lanes,
        }
    }
}

/// Why a window closed: the label of `kandle_windows_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClosedBy {
    Records,
    Bytes,
    Wait,
    /// No other window was in flight, and `window.when_idle` is `close`.
    Idle,
    Memory,
    Work,
    /// A drain has read all its records.
    End,
    Stop,
}

impl ClosedBy {
    pub const ALL: [Self; 8] =
        [Self::Records, Self::Bytes, Self::Wait, Self::Idle, Self::Memory, Self::Work, Self::End, Self::Stop];

    pub fn name(self) -> &'static str {
        match self {
            ClosedBy::Records => "records",
            ClosedBy::Bytes => "bytes",
            ClosedBy::Wait => "wait",
            ClosedBy::Idle => "idle",
            ClosedBy::Memory => "memory",
            ClosedBy::Work => "work",
            ClosedBy::End => "end",
            ClosedBy::Stop => "stop",
        }
    }
}

/// The records of one partition in a window: contiguous, `first..=last` (offsets that are missing in Kafka itself, as
/// after compaction, are not gaps).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub partition: Partition,
    /// Lease under which the records were read.
    pub lease: Lease,
    pub first: i64,
    pub last: i64,
    /// Commit metadata for an offset after these records. The source says who made the predictions before them; the
    /// sink, which knows the window's model, who has made them up to the last of them.
    pub metadata: Metadata,
}

/// The unit of progress: published in input order, and committed as one under `at_least_once`.
#[derive(Debug)]
pub struct Window {
    pub id: u64,
    pub spans: Vec<Span>,
    pub records: Vec<Record>,
    pub closed_by: ClosedBy,
    /// Keys and values, in the order they arrived.
    memory: Vec<u8>,
    reserved: usize,
    work: f64,
}

/// What windows take until they are published, or the limit for it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// Bytes that count against the memory limit.
    pub bytes: usize,
    /// Estimated device seconds.
    pub work: f64,
    pub windows: usize,
}

impl Load {
    /// With `self` as the limit: whether `window` is too much work beside what is in flight. Up to `self.windows`
    /// windows are never too much, however long they take.
    pub fn exceeds_work(&self, under_way: Self, window: Self) -> bool {
        under_way.windows >= self.windows && under_way.work + window.work > self.work
    }
}

impl std::ops::AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.work += other.work;
        self.windows += other.windows;
    }
}

impl std::ops::SubAssign for Load {
    fn sub_assign(&mut self, other: Self) {
        self.bytes -= other.bytes;
        self.work -= other.work;
        self.windows -= other.windows;
    }
}

impl Window {
    pub fn key(&self, record: &Record) -> Option<&[u8]> {
        record.key.clone().map(|range| &self.memory[range])
    }

    /// `None` is a tombstone.
    pub fn value(&self, record: &Record) -> Option<&[u8]> {
        record.value.clone().map(|range| &self.memory[range])
    }

    /// A record's value with what says how to read it; `None` is a tombstone.
    pub fn raw<'a>(&'a self, record: &'a Record) -> Option<Raw<'a>> {
        Some(Raw { bytes: self.value(record)?, headers: record.headers.as_ref() })
    }

    /// The values of its records, without tombstones.
    pub fn values(&self) -> impl Iterator<Item = Raw<'_>> {
        self.records.iter().filter_map(|record| self.raw(record))
    }

    pub fn position(&self, record: &Record) -> Position {
        Position { partition: self.spans[record.span as usize].partition.clone(), offset: record.offset }
    }

    /// Where a record came from: its own position, or for a reprocessed dead letter the original one.
    pub fn origin<'a>(&'a self, record: &'a Record) -> (&'a Partition, i64) {
        match &record.origin {
            None => (&self.spans[record.span as usize].partition, record.offset),
            Some(origin) => (&origin.partition, origin.offset),
        }
    }

    pub fn load(&self) -> Load {
        Load { bytes: self.reserved, work: self.work, windows: 1 }
    }
}

/// Gathers records into windows.
#[derive(Debug)]
pub struct Gatherer {
    limits: Limits,
    next_id: u64,
    spans: Vec<Span>,
    records: Vec<Record>,
    memory: Vec<u8>,
    /// Bytes of headers.
    headers: usize,
    footprints: usize,
    /// Estimated device seconds.
    work: f64,
}

impl Gatherer {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            next_id: 0,
            spans: Vec::new(),
            records: Vec::new(),
            memory: Vec::new(),
            headers: 0,
            footprints: 0,
            work: 0.0,
        }
    }

    /// Adds a record; returns the window if the record completes it.
    pub fn push(
        &mut self,
        partition: &Partition,
        lease: &Lease,
        arrival: Arrival<'_>,
        now: Instant,
    ) -> Option<Window> {
        let span = self.span(partition, lease, arrival.offset);
        let key = arrival.key.map(|bytes| self.keep(bytes));
        let value = arrival.value.map(|bytes| self.keep(bytes));
        self.headers += arrival.headers.as_ref().map_or(0, Headers::memory);
        self.records.push(Record {
            span,
            offset: arrival.offset,
            timestamp: arrival.timestamp,
            arrived: now,
            headers: arrival.headers,
            suspect: arrival.suspect,
            origin: arrival.origin,
            trace: arrival.trace,
            footprint: arrival.footprint,
            work: arrival.work,
            key,
            value,
        });
        self.footprints += arrival.footprint;
        self.work += f64::from(arrival.work);
        if self.records.len() >= self.limits.max_records {
            self.close(ClosedBy::Records)
        } else if self.memory.len() + self.headers >= self.limits.max_bytes {
            self.close(ClosedBy::Bytes)
        } else if self.filled() >= self.limits.max_memory {
            self.close(ClosedBy::Memory)
        } else if self.work >= self.limits.max_work.as_secs_f64()
            && self.records.len() >= self.limits.work_records
        {
            self.close(ClosedBy::Work)
        } else {
            None
        }
    }

    /// Records in the open window.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// When the open window's oldest record will have waited `max_wait`.
    pub fn deadline(&self) -> Option<Instant> {
        self.records.first()?.arrived.checked_add(self.limits.max_wait)
    }

    /// Closes the open window if its oldest record has waited `max_wait`.
    pub fn due(&mut self, now: Instant) -> Option<Window> {
        if self.deadline()? <= now { self.close(ClosedBy::Wait) } else { None }
    }

    /// Closes the open window, if it has any records.
    pub fn close(&mut self, closed_by: ClosedBy) -> Option<Window> {
        if self.records.is_empty() {
            return None;
        }
        let (id, reserved) = (self.next_id, self.bytes());
        self.next_id += 1;
        let records = std::mem::take(&mut self.records);
        let memory = std::mem::take(&mut self.memory);
        (self.headers, self.footprints) = (0, 0);
        let work = std::mem::take(&mut self.work);
        if matches!(closed_by, ClosedBy::Records | ClosedBy::Bytes | ClosedBy::Memory | ClosedBy::Work) {
            // The next window will probably be about as large.
            self.records.reserve(records.len());
            self.memory.reserve(memory.len());
        }
        Some(Window {
            id,
            spans: std::mem::take(&mut self.spans),
            records,
            closed_by,
            memory,
            reserved,
            work,
        })
    }

    /// Drops the records of partitions that are no longer ours; their new owners read them again. Returns how many
    /// records were dropped.
    pub fn forget(&mut self, gone: impl Fn(&Partition) -> bool) -> usize {
        let before = self.records.len();
        let keep: Vec<bool> = self.spans.iter().map(|span| !gone(&span.partition)).collect();
        if keep.iter().all(|&keep| keep) {
            return 0;
        }
        let mut index = Vec::with_capacity(keep.len());
        let mut kept = 0;
        for &keep in &keep {
            index.push(kept);
            kept += u32::from(keep);
        }
        self.records.retain(|record| keep[record.span as usize]);
        self.headers =
            self.records.iter().filter_map(|record| record.headers.as_ref()).map(Headers::memory).sum();
        self.footprints = self.records.iter().map(|record| record.footprint).sum();
        self.work = self.records.iter().map(|record| f64::from(record.work)).sum();
        for record in &mut self.records {
            record.span = index[record.span as usize];
        }
        let mut at = 0;
        self.spans.retain(|_| {
            at += 1;
            keep[at - 1]
        });
        before - self.records.len()
    }

    /// Bytes that the open window takes until it is published, with spare capacity: keys and values twice (raw and
    /// decoded), headers, records, and the records' footprints.
    pub fn bytes(&self) -> usize {
        let records = self.records.capacity() * size_of::<Record>();
        2 * self.memory.capacity() + self.headers + records + self.footprints
    }

    /// The same without spare capacity.
    fn filled(&self) -> usize {
        2 * self.memory.len() + self.headers + self.records.len() * size_of::<Record>() + self.footprints
    }

    fn span(&mut self, partition: &Partition, lease: &Lease, offset: i64) -> u32 {
        // Searched from the end: a record mostly comes from the same partition as the one before it.
        let found = self.spans.iter().rposition(|s| s.lease == *lease && s.partition == *partition);
        match found {
            Some(at) => {
                debug_assert!(self.spans[at].last < offset, "records of a partition arrive in order");
                self.spans[at].last = offset;
                at as u32
            }
            None => {
                self.spans.push(Span {
                    partition: partition.clone(),
                    lease: lease.clone(),
                    first: offset,
                    last: offset,
                    metadata: Metadata::default(),
                });
                (self.spans.len() - 1) as u32
            }
        }
    }

    fn keep(&mut self, bytes: &[u8]) -> std::ops::Range<usize> {
        let start = self.memory.len();
        self.memory.extend_from_slice(bytes);
        start..self.memory.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(max_records: usize, max_bytes: usize, max_wait_ms: u64) -> Limits {
        Limits {
            max_memory: usize::MAX,
            max_records,
            max_bytes,
            max_wait: Duration::from_millis(max_wait_ms),
            max_work: Duration::MAX,
            work_records: 1,
        }
    }

    fn arrival(offset: i64, value: &[u8]) -> Arrival<'_> {
        Arrival { offset, value: Some(value), ..Arrival::default() }
    }

    #[test]
    fn closes_by_records_and_spans_partitions() {
        let (a, b) = (Partition::new("t", 0), Partition::new("t", 1));
        let mut gatherer = Gatherer::new(limits(3, 1000, 1000));
        let now = Instant::now();
        let (one, two) = (Lease::new(1), Lease::new(2));
        assert!(gatherer.push(&a, &one, arrival(10, b"x"), now).is_none());
        assert!(gatherer.push(&b, &two, arrival(7, b"yy"), now).is_none());
        let window = gatherer.push(&a, &one, arrival(11, b"zzz"), now).expect("third record closes");
        assert_eq!(window.closed_by, ClosedBy::Records);
        assert_eq!(window.spans.len(), 2);
        assert_eq!((window.spans[0].first, window.spans[0].last), (10, 11));
        assert_eq!(window.value(&window.records[2]), Some(&b"zzz"[..]));
        assert_eq!(window.position(&window.records[1]).to_string(), "t/1/7");
    }

    #[test]
    fn closes_by_bytes_with_the_record_that_reaches_them() {
        let a = Partition::new("t", 0);
        let mut gatherer = Gatherer::new(limits(100, 4, 1000));
        let now = Instant::now();
        assert!(gatherer.push(&a, &Lease::new(1), arrival(0, b"xxx"), now).is_none());
        let window = gatherer.push(&a, &Lease::new(1), arrival(1, b"y"), now).expect("four bytes close");
        assert_eq!(window.closed_by, ClosedBy::Bytes);
    }

    #[test]
    fn closes_by_the_memory_that_its_records_will_take() {
        let (a, now) = (Partition::new("t", 0), Instant::now());
        let mut gatherer = Gatherer::new(Limits { max_memory: 10_000, ..limits(100, 1_000_000, 1000) });
        let mut push = |offset, footprint| {
            gatherer.push(&a, &Lease::new(1), Arrival { footprint, ..arrival(offset, b"x") }, now)
        };
        assert!(push(0, 4000).is_none());
        let window = push(1, 6000).expect("a window");
        assert_eq!((window.closed_by, window.records.len()), (ClosedBy::Memory, 2));
        assert!(window.load().bytes >= 10_000);
        // The next window starts empty, and a single record may exceed the whole limit.
        assert!(push(2, 4000).is_none());
        assert_eq!(push(3, 1 << 30).expect("a window").records.len(), 2);
    }

    #[test]
    fn closes_by_work() {
        let limits = Limits { max_work: Duration::from_secs(1), work_records: 3, ..limits(100, 1000, 1000) };
        let mut gatherer = Gatherer::new(limits);
        let (a, now) = (Partition::new("a", 0), Instant::now());
        let mut push =
            |offset, work| gatherer.push(&a, &Lease::new(1), Arrival { work, ..arrival(offset, b"x") }, now);
        assert!(push(0, 0.25).is_none() && push(1, 0.25).is_none() && push(2, 0.25).is_none());
        let window = push(3, 0.5).expect("more than a second");
        assert_eq!((window.closed_by, window.records.len(), window.load().work), (ClosedBy::Work, 4, 1.25));
        assert!(push(4, 0.75).is_none(), "counted anew");
        assert!(push(5, 9.0).is_none(), "a third lane has nothing to do yet");
        assert_eq!(push(6, 9.0).expect("three").records.len(), 3);
    }

    #[test]
    fn waits_from_the_oldest_record_not_from_the_last_window() {
        let a = Partition::new("t", 0);
        let mut gatherer = Gatherer::new(limits(100, 1000, 200));
        let start = Instant::now();
        assert!(gatherer.due(start + Duration::from_secs(9)).is_none(), "an empty window never closes");
        let first = start + Duration::from_secs(10);
        gatherer.push(&a, &Lease::new(1), arrival(0, b"x"), first);
        gatherer.push(&a, &Lease::new(1), arrival(1, b"x"), first + Duration::from_millis(150));
        assert!(gatherer.due(first + Duration::from_millis(199)).is_none());
        let window = gatherer.due(first + Duration::from_millis(200)).expect("due");
        assert_eq!(window.closed_by, ClosedBy::Wait);
        assert!(gatherer.deadline().is_none());
    }

    #[test]
    fn a_tombstone_and_an_empty_value_differ() {
        let a = Partition::new("t", 0);
        let mut gatherer = Gatherer::new(limits(2, 1000, 200));
        let now = Instant::now();
        gatherer.push(&a, &Lease::new(1), Arrival { offset: 0, key: Some(b""), ..Arrival::default() }, now);
        let window = gatherer.push(&a, &Lease::new(1), arrival(1, b""), now).expect("closed");
        assert_eq!(window.value(&window.records[0]), None);
        assert_eq!(window.key(&window.records[0]), Some(&b""[..]));
        assert_eq!(window.value(&window.records[1]), Some(&b""[..]));
        assert_eq!(window.key(&window.records[1]), None);
    }

    proptest! {
        /// Whatever arrives and whichever partitions are revoked: each kept record appears once, in order, with its own
        /// bytes, inside its span; the records that `forget` drops do not appear.
        #[test]
        fn every_record_is_in_exactly_one_window(
            steps in proptest::collection::vec((0u8..10, 0i32..3, 0usize..9), 1..200),
            max_records in 1usize..12, max_bytes in 1usize..60, max_wait in 1u64..50,
        ) {
            let mut gatherer = Gatherer::new(limits(max_records, max_bytes, max_wait));
            let mut now = Instant::now();
            let mut next = [0i64; 3];
            let mut leases = [Lease::new(0), Lease::new(1), Lease::new(2)];
            let mut generation = [0u64, 1, 2];
            let mut expected: Vec<Vec<(u64, i64)>> = vec![Vec::new(); 3];
            let mut open: Vec<(usize, u64, i64)> = Vec::new();
            let mut windows = Vec::new();
            for (what, partition, size) in steps {
                let number = partition as usize;
                let closed = match what {
                    0 => {
                        gatherer.forget(|p| p.number == partition);
                        open.retain(|(p, ..)| *p != number);
                        generation[number] += 3;
                        leases[number] = Lease::new(generation[number]);
                        None
                    }
                    1 => {
                        now += Duration::from_millis(size as u64 * 8);
                        gatherer.due(now)
                    }
                    _ => {
                        let offset = next[number];
                        next[number] += 1 + i64::from(size == 3);
                        let value = vec![offset as u8; size];
                        open.push((number, generation[number], offset));
                        gatherer.push(&Partition::new("t", partition), &leases[number],
                                      Arrival { offset, value: Some(&value), ..Arrival::default() }, now)
                    }
                };
                if let Some(window) = closed {
                    for (p, g, o) in open.drain(..) {
                        expected[p].push((g, o));
                    }
                    prop_assert!(window.records.len() <= max_records);
                    windows.push(window);
                }
            }
            if let Some(window) = gatherer.close(ClosedBy::Stop) {
                for (p, g, o) in open.drain(..) {
                    expected[p].push((g, o));
                }
                windows.push(window);
            }
            let mut seen: Vec<Vec<(u64, i64)>> = vec![Vec::new(); 3];
            for (at, window) in windows.iter().enumerate() {
                prop_assert_eq!(window.id, at as u64);
                for record in &window.records {
                    let span = &window.spans[record.span as usize];
                    prop_assert!(span.first <= record.offset && record.offset <= span.last);
                    prop_assert!(window.value(record).unwrap().iter().all(|&b| b == record.offset as u8));
                    seen[span.partition.number as usize].push((span.lease.generation(), record.offset));
                }
            }
            prop_assert_eq!(seen, expected);
        }
    }
}
