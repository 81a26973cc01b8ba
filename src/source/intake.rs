//! Takes messages into the open window, passes closed windows to the next stage, and pauses partitions while that is
//! full.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{SendTimeoutError, Sender};
use rdkafka::consumer::Consumer;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::TopicPartitionList;

use super::doubt::Cause;
use super::ledger::{OffsetOrder, PartitionState};
use super::serve::{Context, POLL, Source, SourceError};
use crate::flow::Queued;
use crate::kafka::headers::{self, Headers};
use crate::record::{Arrival, Partition, TraceParent};
use crate::settings::WhenIdle;
use crate::watch::Sampler;
use crate::window::{ClosedBy, Gatherer, Load, Window};

/// Most messages taken from the client in one loop iteration.
pub(super) const BURST: usize = 1024;
const MESSAGES_PER_CLOCK_READ: usize = 64;
/// How long the pipeline must stay full before partitions are paused. Pausing discards the messages that the client has
/// prefetched.
const PAUSE_AFTER: Duration = Duration::from_secs(2);
/// Wait between two attempts to pass a window on that lacks room.
const FULL_INTERVAL: Duration = Duration::from_millis(5);
/// Longest wait for messages under `window.when_idle: close`, where the open window closes once no other is in flight.
const IDLE_INTERVAL: Duration = Duration::from_millis(2);

/// The open window, the closed ones, and their load on memory and model.
pub(super) struct Intake {
    pub gatherer: Gatherer,
    /// Closed windows not yet passed on.
    pub held: VecDeque<Queued<Window>>,
    /// Windows passed on and not yet published.
    pub in_flight: Load,
    /// `bytes`: memory of all windows. `work` and `windows`: what may be in flight.
    limit: Load,
    when_idle: WhenIdle,
    full_since: Option<Instant>,
    /// The next window waits because of the memory or work in flight.
    pub out_of_room: bool,
    /// Partitions are paused.
    pub paused: bool,
}

impl Intake {
    pub fn new(gatherer: Gatherer, limit: Load, when_idle: WhenIdle) -> Self {
        Self {
            gatherer,
            when_idle,
            held: VecDeque::new(),
            in_flight: Load::default(),
            limit,
            full_since: None,
            out_of_room: false,
            paused: false,
        }
    }

    /// Bytes of windows that are not passed on yet.
    fn waiting(&self) -> usize {
        let held: usize = self.held.iter().map(|window| window.get().load().bytes).sum();
        held + self.gatherer.bytes()
    }

    pub fn bytes(&self) -> usize {
        self.in_flight.bytes + self.waiting()
    }

    /// No window is open, held or in flight.
    fn is_idle(&self) -> bool {
        self.has_passed_all_on() && self.gatherer.is_empty()
    }

    /// No window is held or in flight.
    fn has_passed_all_on(&self) -> bool {
        self.in_flight.windows == 0 && self.held.is_empty()
    }

    /// The open window closes as soon as no message is waiting.
    fn closes_when_idle(&self) -> bool {
        self.when_idle == WhenIdle::Close && self.has_passed_all_on() && !self.gatherer.is_empty()
    }

    /// The next stage takes no more windows at present.
    pub fn is_full(&self) -> bool {
        self.full_since.is_some()
    }

    /// Whether `window`, already removed from `held`, must wait until others are published: memory is short, or the
    /// model has enough work. Work in flight is limited because a crash repeats it and a stop waits for it.
    fn lacks_room(&self, window: Load) -> bool {
        let memory = self.in_flight.bytes + window.bytes + self.waiting() > self.limit.bytes;
        (self.in_flight.bytes > 0 && memory) || self.limit.exceeds_work(self.in_flight, window)
    }

    /// Before a stop: removes the held windows that exceed the work limit, last first.
    fn take_excess_windows(&mut self) -> Vec<Window> {
        let mut before = self.in_flight;
        let fits = |window: &&Queued<Window>| {
            let load = window.get().load();
            let fits = !self.limit.exceeds_work(before, load);
            before += load;
            fits
        };
        let kept = self.held.iter().take_while(fits).count();
        self.held.drain(kept..).rev().map(Queued::into_inner).collect()
    }

    /// The next stage is full. True if partitions should be paused: it has been full for [`PAUSE_AFTER`], or much
    /// memory is waiting.
    fn is_full_for_long(&mut self, now: Instant) -> bool {
        let since = *self.full_since.get_or_insert(now);
        // Messages keep coming until the pause takes effect; if they are large, pause at once.
        let large = self.waiting() > self.limit.bytes / 4;
        !self.paused && (large || now.saturating_duration_since(since) >= PAUSE_AFTER)
    }
}

impl Source {
    pub(super) fn show_memory(&self) {
        self.context.metrics.memory.with_label_values(&["windows"]).set(self.intake.bytes() as i64);
    }

    /// Takes messages until none is waiting, a window is full, or [`BURST`] is reached.
    pub(super) fn poll(&mut self) -> Result<(), SourceError> {
        let (closes_when_idle, records) = (self.intake.closes_when_idle(), self.intake.gatherer.len());
        let wait = match self.intake.gatherer.deadline() {
            _ if closes_when_idle => Duration::ZERO,
            Some(deadline) => {
                let longest = if self.intake.when_idle == WhenIdle::Close { IDLE_INTERVAL } else { POLL };
                deadline.saturating_duration_since(Instant::now()).min(longest)
            }
            None => POLL,
        };
        self.take(BURST, wait)?;
        if closes_when_idle
            && self.intake.gatherer.len() == records
            && let Some(window) = self.intake.gatherer.close(ClosedBy::Idle)
        {
            self.hold(window);
        }
        Ok(())
    }

    /// Polls for events only. The client may deliver a message all the same, which is gathered.
    pub(super) fn poll_events(&mut self, wait: Duration) -> Result<(), SourceError> {
        self.take(1, wait)
    }

    /// Takes at most `limit` messages, or as many as fill a window. Waits for the first one only.
    fn take(&mut self, limit: usize, mut wait: Duration) -> Result<(), SourceError> {
        let consumer = Arc::clone(&self.consumer);
        let mut now = Instant::now();
        let (mut full, mut failed, mut doubtful) = (None, None, false);
        // Partitions read to their end offsets in a drain.
        let mut ended = BTreeSet::new();
        // State of the current partition: messages come in runs of one partition.
        let mut run: Option<&mut PartitionState> = None;
        // The drain's end offset in that partition.
        let mut end = None;
        for i in 0..limit {
            let waits = (i == 0 && self.intake.is_idle()).then(Instant::now);
            let polled = consumer.poll(wait);
            if let Some(since) = waits {
                self.context.metrics.input_wait.inc_by(since.elapsed().as_secs_f64());
            }
            wait = Duration::ZERO;
            if i % MESSAGES_PER_CLOCK_READ == 0 {
                now = Instant::now();
                doubtful = self.doubt.was_suspended(now);
            }
            let mut message = match polled {
                None => break,
                Some(Ok(message)) => message,
                Some(Err(error)) => {
                    failed = Some(error);
                    break;
                }
            };
            if doubtful {
                break;
            }
            if self.doubt.is_open() {
                continue;
            }
            let same = |p: &Partition| p.number == message.partition() && *p.topic == *message.topic();
            if !run.as_ref().is_some_and(|owned| same(&owned.partition)) {
                run = self.ledger.get_mut(&Partition::new(message.topic(), message.partition()));
                let drain = self.bounds.drain.as_ref();
                end = run.as_ref().and_then(|owned| Some(drain?.end(&owned.partition)));
            }
            // Prefetched before the partition was revoked or held: discard.
            let Some(mut owned) = run.take_if(|owned| owned.hold.is_none()) else { continue };
            if end.is_some_and(|end| message.offset() >= end) {
                ended.insert(owned.partition.clone());
                run = Some(owned);
                continue;
            }
            let mut origin = None;
            if let Some(topics) = &self.context.reprocess {
                origin = topics.restore(&mut message).map(Box::new);
                if origin.is_none() {
                    owned.skip_record(message.offset());
                    if let Some(drain) = &self.bounds.drain {
                        drain.passed_over(&owned.partition);
                    }
                    if end == Some(message.offset() + 1) {
                        ended.insert(owned.partition.clone());
                    }
                    run = Some(owned);
                    continue;
                }
            }
            if let OffsetOrder::Backwards { expected } = owned.read(message.offset(), timestamp(&message)) {
                let partition = owned.partition.clone();
                tracing::warn!(
                    %partition,
                    expected,
                    offset = message.offset(),
                    "offsets went backwards: the topic was recreated or its log truncated, reading from here"
                );
                owned = self.ledger.renew(partition, Some(message.offset()));
                owned.read(message.offset(), timestamp(&message));
            }
            let suspect = owned.suspects.contains(&message.offset());
            let parent = || TraceParent::read(headers::last(&message, headers::TRACEPARENT)?);
            let trace = if self.context.traced { parent().map(Box::new) } else { None };
            let arrival = Arrival { origin, trace, ..arrival(&message, suspect, &self.context) };
            full = self.intake.gatherer.push(&owned.partition, &owned.lease, arrival, now);
            if end == Some(message.offset() + 1) {
                ended.insert(owned.partition.clone());
            }
            if full.is_some() {
                break;
            }
            run = Some(owned);
        }
        if let Some(window) = full {
            self.hold(window);
        }
        self.end(&ended);
        if doubtful {
            self.doubt(Cause::Topics);
        }
        failed.map_or(Ok(()), |error| self.on_error(error, ""))
    }

    /// Queues a closed window to be passed on.
    pub(super) fn hold(&mut self, mut window: Window) {
        self.ledger.gathered(&window.spans);
        for span in &mut window.spans {
            if let Some(owned) = self.ledger.get(&span.partition).filter(|owned| owned.lease == span.lease) {
                span.metadata = self.context.metadata(owned, span.first);
            }
        }
        let metrics = &self.context.metrics;
        metrics.windows.with_label_values(&[window.closed_by.name()]).inc();
        metrics.window_records.observe(window.records.len() as f64);
        self.intake.held.push_back(Queued::new(window));
        self.show_memory();
    }

    /// Before a stop: leaves held windows that exceed the work limit to the next owners of their partitions.
    pub(super) fn leave_excess_windows(&mut self) {
        let left = self.intake.take_excess_windows();
        for window in &left {
            self.ledger.left(&window.spans);
        }
        if !left.is_empty() {
            tracing::info!(
                windows = left.len(),
                "windows not started are left to the next owner of their partitions"
            );
        }
    }

    /// Passes held windows on. Waits at most [`POLL`] for the next stage if it is full.
    pub(super) fn pass_on(&mut self, windows: &Sender<Queued<Window>>) {
        while let Some(window) = self.intake.held.pop_front() {
            let load = window.get().load();
            self.intake.out_of_room = self.intake.lacks_room(load);
            // A commit in flight could land after the transaction of this window and set the offset back.
            let wait = self.intake.out_of_room || (self.context.transactional && self.offsets.is_busy());
            if wait {
                self.intake.held.push_front(window);
                // Only the reports, which the caller reads, tell when there is room.
                std::thread::park_timeout(FULL_INTERVAL);
                return self.full();
            }
            match windows.send_timeout(window, POLL) {
                Ok(()) => self.intake.in_flight += load,
                Err(SendTimeoutError::Timeout(window)) => {
                    self.intake.held.push_front(window);
                    return self.full();
                }
                Err(SendTimeoutError::Disconnected(_)) => {
                    // The next stage has failed, and reports it itself.
                    self.context.stop.store(true, Ordering::Relaxed);
                    return;
                }
            }
        }
        self.intake.full_since = None;
        self.resume_if_possible();
    }

    fn full(&mut self) {
        if self.intake.is_full_for_long(Instant::now()) {
            tracing::debug!("paused: the pipeline is full");
            self.pause();
        }
    }

    pub(super) fn pause(&mut self) {
        self.intake.paused = true;
        if let Err(error) = self.consumer.assignment().and_then(|all| self.consumer.pause(&all)) {
            tracing::debug!(%error, "pausing partitions failed");
        }
    }

    /// Partitions are paused, and no reason for it is left.
    pub(super) fn may_resume(&self) -> bool {
        let stopping = self.context.stop.load(Ordering::Relaxed);
        let held_up =
            stopping || self.intake.is_full() || self.bounds.schedule.resting || self.doubt.is_open();
        self.intake.paused && !held_up
    }

    /// Starts to resume partitions if no reason for the pause is left. Topics are checked first: one may have been
    /// deleted and recreated while nothing was fetched.
    pub(super) fn resume_if_possible(&mut self) {
        if self.may_resume() {
            self.doubt(Cause::Topics);
        }
    }

    pub(super) fn resume(&mut self) {
        tracing::debug!("partitions resumed");
        self.intake.paused = false;
        let resumed = self.consumer.assignment().and_then(|all| {
            let mut wanted = TopicPartitionList::new();
            for e in all.elements() {
                let partition = Partition::new(e.topic(), e.partition());
                let done = self.bounds.is_done(&partition);
                let held = self.ledger.get(&partition).is_none_or(|owned| owned.hold.is_some());
                if !done && !held {
                    wanted.add_partition(e.topic(), e.partition());
                }
            }
            self.consumer.resume(&wanted)
        });
        if let Err(error) = resumed {
            tracing::debug!(%error, "resuming partitions failed");
        }
    }
}

fn arrival<'a>(message: &'a BorrowedMessage<'_>, suspect: bool, context: &Context) -> Arrival<'a> {
    let (value, compute) = (message.payload(), &context.compute);
    let of_sample = |bytes| context.sampled.map_or(0, |share| Sampler::footprint(share, bytes));
    Arrival {
        footprint: value.map_or(0, |value| compute.footprint(value) + of_sample(value.len())),
        work: value.map_or(0.0, |value| compute.work(value.len())) as f32,
        offset: message.offset(),
        timestamp: timestamp(message),
        key: message.key(),
        value,
        headers: Headers::of(message),
        suspect,
        origin: None,
        trace: None,
    }
}

fn timestamp(message: &BorrowedMessage<'_>) -> Option<i64> {
    message.timestamp().to_millis().filter(|&t| t >= 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::window::Limits;

    const SECOND: Duration = Duration::from_secs(1);

    fn intake(bytes: usize) -> Intake {
        let limits = Limits {
            max_records: 10,
            max_bytes: 1000,
            max_wait: SECOND,
            max_memory: 10_000,
            max_work: SECOND,
            work_records: 1,
        };
        Intake::new(Gatherer::new(limits), Load { bytes, work: 2.0, windows: 2 }, WhenIdle::Wait)
    }

    fn load(bytes: usize, work: f64, windows: usize) -> Load {
        Load { bytes, work, windows }
    }

    /// Queues windows of one record each, with the given work.
    fn hold(intake: &mut Intake, work: &[f32]) {
        for &work in work {
            let arrival = Arrival { value: Some(b"x"), work, ..Arrival::default() };
            let lease = crate::lease::Lease::new(1);
            let window = intake.gatherer.push(&Partition::new("t", 0), &lease, arrival, Instant::now());
            let window = window.or_else(|| intake.gatherer.close(crate::window::ClosedBy::Wait));
            intake.held.push_back(Queued::new(window.expect("a record")));
        }
    }

    #[test]
    fn the_first_window_always_has_room() {
        let mut intake = intake(1000);
        assert!(!intake.lacks_room(load(5000, 9.0, 1)), "it is alone");
        intake.in_flight = load(600, 1.25, 1);
        assert!(!intake.lacks_room(load(400, 9.0, 1)), "the second is queued behind the first");
        assert!(intake.lacks_room(load(401, 0.0, 1)), "memory");
        intake.in_flight = load(600, 1.25, 2);
        assert!(!intake.lacks_room(load(400, 0.75, 1)));
        assert!(intake.lacks_room(load(400, 1.0, 1)), "work");
    }

    #[test]
    fn a_stop_leaves_windows_that_would_take_long() {
        let mut intake = intake(1 << 20);
        intake.in_flight = load(100, 1.0, 1);
        hold(&mut intake, &[0.5, 0.5, 1.0, 0.125]);
        let left = intake.take_excess_windows();
        assert_eq!(left.iter().map(|window| window.load().work).collect::<Vec<_>>(), [0.125, 1.0]);
        assert_eq!(intake.held.len(), 2, "in their order, up to what may be in flight");
        hold(&mut intake, &[0.0; 20]);
        assert!(intake.take_excess_windows().is_empty(), "what takes no time is done");
    }

    #[test]
    fn partitions_are_paused_once_the_pipeline_is_full_for_long() {
        let mut intake = intake(1 << 20);
        let start = Instant::now();
        assert!(!intake.is_full());
        assert!(!intake.is_full_for_long(start));
        assert!(intake.is_full() && !intake.is_full_for_long(start + PAUSE_AFTER / 2));
        assert!(intake.is_full_for_long(start + PAUSE_AFTER));
        intake.paused = true;
        assert!(!intake.is_full_for_long(start + 2 * PAUSE_AFTER), "they are paused already");
    }

    #[test]
    fn partitions_are_paused_at_once_if_much_memory_waits() {
        let mut intake = intake(1000);
        let value = [0; 900];
        let arrival = Arrival { value: Some(&value), ..Arrival::default() };
        let lease = crate::lease::Lease::new(1);
        intake.gatherer.push(&Partition::new("t", 0), &lease, arrival, Instant::now());
        assert!(intake.is_full_for_long(Instant::now()));
    }
}
