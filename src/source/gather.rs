//! Gathering: messages into the window, closed windows to the next stage, and the pause while that
//! is full.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{SendTimeoutError, Sender};
use rdkafka::consumer::Consumer;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::TopicPartitionList;

use super::drain;
use super::ledger::{Owned, Read};
use super::live::{POLL, Source, SourceError};
use crate::flow::Queued;
use crate::kafka::headers;
use crate::record::{Arrival, Partition, TraceParent};
use crate::window::{ClosedBy, Window};

/// Messages taken from the client between two looks at everything else.
const BURST: usize = 1024;
/// How long a full pipeline may hold up polling before partitions are paused. Pausing throws away
/// what the client has prefetched, so it is for pipelines that stay full.
const PATIENCE: Duration = Duration::from_millis(500);

impl Source {
    pub(super) fn show_memory(&self) {
        let bytes = self.in_flight + self.waiting();
        self.wiring.metrics.memory.with_label_values(&["windows"]).set(bytes as i64);
    }

    /// Bytes of windows closed and not passed on, and of the one that gathers.
    fn waiting(&self) -> usize {
        let held: usize = self.held.iter().map(|window| window.get().reserved()).sum();
        held + 2 * self.gatherer.bytes()
    }

    /// Takes messages until none is there, a window is full, or the burst is over.
    pub(super) fn poll(&mut self) -> Result<(), SourceError> {
        let wait = match self.gatherer.deadline() {
            Some(deadline) => deadline.saturating_duration_since(Instant::now()).min(POLL),
            None => POLL,
        };
        self.take(BURST, wait)
    }

    /// Serves the client without taking messages, as far as it lets us: one that comes all the same
    /// is gathered.
    pub(super) fn poll_events(&mut self, wait: Duration) -> Result<(), SourceError> {
        self.take(1, wait)
    }

    /// Takes at most `limit` messages, or as many as fill a window; waits for the first one alone.
    fn take(&mut self, limit: usize, mut wait: Duration) -> Result<(), SourceError> {
        let consumer = Arc::clone(&self.consumer);
        let mut now = Instant::now();
        let mut full = None;
        // Partitions of which a drain has all.
        let mut ended = BTreeSet::new();
        // Messages come in runs of one partition.
        let mut run: Option<&mut Owned> = None;
        // Where a drain ends in it.
        let mut end = None;
        for i in 0..limit {
            // Nothing at all is under way.
            let idle =
                i == 0 && self.in_flight == 0 && self.held.is_empty() && self.gatherer.deadline().is_none();
            let waits = idle.then(Instant::now);
            let polled = consumer.poll(wait);
            if let Some(since) = waits {
                self.wiring.metrics.input_wait.inc_by(since.elapsed().as_secs_f64());
            }
            let mut message = match polled {
                None => break,
                Some(Ok(message)) => message,
                Some(Err(error)) => return self.error(error, ""),
            };
            wait = Duration::ZERO;
            if i % 64 == 0 {
                now = Instant::now();
            }
            let same = |p: &Partition| p.number == message.partition() && *p.topic == *message.topic();
            if !run.as_ref().is_some_and(|owned| same(&owned.partition)) {
                run = self.ledger.get_mut(&Partition::new(message.topic(), message.partition()));
                let drain = self.wiring.drain.as_ref();
                end = run.as_ref().and_then(|owned| Some(drain?.end(&owned.partition)));
            }
            // Not ours: left in the queue from before a revocation.
            let Some(mut owned) = run.take() else { continue };
            if end.is_some_and(|end| message.offset() >= end) {
                ended.insert(owned.partition.clone());
                run = Some(owned);
                continue;
            }
            let mut origin = None;
            if let Some(origins) = &self.wiring.revive {
                origin = origins.revive(&mut message).map(Box::new);
                if origin.is_none() {
                    owned.pass_over(message.offset());
                    if let Some(drain) = &self.wiring.drain {
                        drain.passed_over(&owned.partition);
                    }
                    if end == Some(message.offset() + 1) {
                        ended.insert(owned.partition.clone());
                    }
                    run = Some(owned);
                    continue;
                }
            }
            if let Read::Backwards { expected } = owned.read(message.offset(), timestamp(&message)) {
                let partition = owned.partition.clone();
                tracing::warn!(
                    %partition,
                    expected,
                    offset = message.offset(),
                    "the partition starts again: its topic was made anew or its log was cut"
                );
                owned = self.ledger.renew(partition, message.offset());
                owned.read(message.offset(), timestamp(&message));
            }
            let suspect = owned.suspects.contains(&message.offset());
            let parent = || TraceParent::read(headers::last(&message, headers::TRACEPARENT)?);
            let trace = if self.wiring.traced { parent().map(Box::new) } else { None };
            let arrival = Arrival { origin, trace, ..arrival(&message, suspect) };
            full = self.gatherer.push(&owned.partition, &owned.lease, arrival, now);
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
        Ok(())
    }

    pub(super) fn hold(&mut self, mut window: Window) {
        self.ledger.gathered(&window.spans);
        window.reserve(self.wiring.bytes_per_record);
        let metrics = &self.wiring.metrics;
        metrics.windows.with_label_values(&[window.closed_by.name()]).inc();
        metrics.window_records.observe(window.records.len() as f64);
        self.held.push_back(Queued::new(window));
        self.show_memory();
    }

    /// Hands held windows on; while the next stage is full, waits for it, but not for long.
    pub(super) fn pass_on(&mut self, windows: &Sender<Queued<Window>>) {
        while let Some(window) = self.held.pop_front() {
            let bytes = window.get().reserved();
            let all = self.in_flight + bytes + self.waiting();
            self.out_of_room = self.in_flight > 0 && all > self.window_bytes;
            if self.out_of_room {
                self.held.push_front(window);
                // Nothing tells when room is there but the reports, read by the caller.
                std::thread::park_timeout(Duration::from_millis(5));
                return self.full();
            }
            match windows.send_timeout(window, POLL) {
                Ok(()) => self.in_flight += bytes,
                Err(SendTimeoutError::Timeout(window)) => {
                    self.held.push_front(window);
                    return self.full();
                }
                Err(SendTimeoutError::Disconnected(_)) => {
                    // The stage behind has failed and says so itself.
                    self.wiring.stop.store(true, Ordering::Relaxed);
                    return;
                }
            }
        }
        self.full_since = None;
        if self.paused && !self.period.resting && !self.wiring.stop.load(Ordering::Relaxed) {
            self.resume();
        }
    }

    fn full(&mut self) {
        let since = *self.full_since.get_or_insert_with(Instant::now);
        // Some still come until it is paused: of large ones, few may.
        let large = self.waiting() > self.window_bytes / 4;
        if (large || since.elapsed() >= PATIENCE) && !self.paused {
            tracing::debug!("paused: the pipeline is full");
            self.pause();
        }
    }

    pub(super) fn pause(&mut self) {
        self.paused = true;
        if let Err(error) = self.consumer.assignment().and_then(|all| self.consumer.pause(&all)) {
            tracing::debug!(%error, "pausing");
        }
    }

    pub(super) fn resume(&mut self) {
        tracing::debug!("resumed");
        self.paused = false;
        let resumed = self.consumer.assignment().and_then(|all| {
            let mut wanted = TopicPartitionList::new();
            for e in all.elements() {
                let partition = Partition::new(e.topic(), e.partition());
                let done = self.wiring.drain.as_ref().is_some_and(|drain| drain.is_done(&partition));
                if !done && !self.is_revoking(&partition) {
                    wanted.add_partition(e.topic(), e.partition());
                }
            }
            self.consumer.resume(&wanted)
        });
        if let Err(error) = resumed {
            tracing::debug!(%error, "resuming");
        }
    }
}

/// What a drain adds.
impl Source {
    /// These partitions have given all that is wanted of them.
    fn end(&mut self, ended: &BTreeSet<Partition>) {
        let Some(drain) = &self.wiring.drain else { return };
        let mut list = TopicPartitionList::new();
        for partition in ended.iter().filter(|partition| !drain.is_done(partition)) {
            drain.set_done(partition);
            list.add_partition(&partition.topic, partition.number);
        }
        if list.count() > 0
            && let Err(error) = self.consumer.pause(&list)
        {
            tracing::debug!(%error, "pausing partitions at their ends");
        }
        if self.ledger.iter().all(|owned| drain.is_done(&owned.partition))
            && let Some(window) = self.gatherer.close(ClosedBy::End)
        {
            // Nothing is to come that it could wait for.
            self.hold(window);
        }
    }

    /// Finds partitions whose last offsets before the end hold no record: transaction markers, or what
    /// was compacted away. Statistics tell where to look, and a look whether it is so: after a pause
    /// they count what was fetched and thrown away again.
    pub(super) fn past_the_ends(&mut self, statistics: &Statistics) {
        let Some(drain) = self.wiring.drain.clone() else { return };
        let mut ended = BTreeSet::new();
        for owned in self.ledger.iter() {
            let Partition { topic, number } = &owned.partition;
            let known = statistics.topics.get(&**topic).and_then(|t| t.partitions.get(number));
            let end = drain.end(&owned.partition);
            if owned.is_idle()
                && !drain.is_done(&owned.partition)
                && known.is_some_and(|p| p.next_offset >= end && p.fetchq_cnt == 0)
                && let from = owned.resume_at().unwrap_or_else(|| drain.start(&owned.partition))
                && drain::is_bare(&self.config, &owned.partition, from, end) == Some(true)
            {
                ended.insert(owned.partition.clone());
            }
        }
        self.end(&ended);
    }

    /// Whether the drain is over: our partitions are at their ends and committed, and so are the
    /// others'.
    pub(super) fn drained(&mut self) -> bool {
        let Some(drain) = self.wiring.drain.clone() else { return false };
        let mut open = !self.held.is_empty() || self.revoking.is_some();
        for owned in self.ledger.iter_mut() {
            if !drain.is_done(&owned.partition) || !owned.is_idle() {
                open = true;
                continue;
            }
            // The group stands at the end itself, also where no record is right before it.
            owned.pass(drain.end(&owned.partition));
        }
        if open {
            return false;
        }
        if self.ledger.commits_open() {
            self.commit(None);
            return false;
        }
        drain.look()
    }
}

fn arrival<'a>(message: &'a BorrowedMessage<'_>, suspect: bool) -> Arrival<'a> {
    Arrival {
        offset: message.offset(),
        timestamp: timestamp(message),
        key: message.key(),
        value: message.payload(),
        headers: message.headers().map(rdkafka::message::BorrowedHeaders::detach),
        suspect,
        origin: None,
        trace: None,
    }
}

fn timestamp(message: &BorrowedMessage<'_>) -> Option<i64> {
    message.timestamp().to_millis().filter(|&t| t >= 0)
}
