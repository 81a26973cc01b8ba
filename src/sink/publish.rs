//! The publisher: one thread that owns the producer.
//!
//! It sends a window's predictions and dead letters in input order, and does not wait for their
//! acknowledgement before it sends the next window's; the idempotent producer keeps the order.
//!
//! `at_least_once`: windows are reported in the order they came, each when all of its messages are
//! acknowledged; the source commits their offsets afterwards.
//!
//! `exactly_once`: windows go into one transaction, which also takes their offsets:
//!
//! ```text
//! begin ─▶ windows of commit_interval ─▶ all acknowledged ─▶ leases still held? ─▶ offsets ─▶ commit ─▶ report
//!                                                                └── no, or an error ──▶ abort ─▶ end leases ─▶ report
//! ```
//!
//! The group's generation is asked for before the leases are looked at; see [`crate::lease`]. An abort
//! ends the leases of all that was in the transaction, so that nothing behind it can overtake it, and
//! the source reads it again. An error of the producer that no retry can help ends the process.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

use super::acks::{Reports, Ticket};
use super::member::MemberId;
use super::outlet::{Outlet, TooLarge, config};
use super::transaction::{Broken, Call, Transactions};
use crate::cluster::Topics;
use crate::failpoint;
use crate::flow::{Encoded, Hurry, Outcome, Published, Queued, Report};
use crate::record::Record;
use crate::settings::{Guarantee, Settings};
use crate::source::{Group, Metadata};
use crate::telemetry::health::Stage;
use crate::telemetry::{Health, Metrics};

/// Between two looks for delivery reports while there are some to come.
const REPORTS: Duration = Duration::from_millis(2);
/// The same while there are none.
const IDLE: Duration = Duration::from_millis(500);
/// Between two tries to become a transactional producer.
const AGAIN: Duration = Duration::from_secs(1);

/// What the publisher is told at the start.
pub struct Wiring {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    pub hurry: Arc<Hurry>,
    /// The group, for transactions.
    pub group: Group,
    /// `source@revision` and 16 hex digits.
    pub model: String,
    pub digest: String,
    pub topics: Topics,
    /// Set when the process is asked to stop.
    pub stop: Arc<AtomicBool>,
}

pub struct Publisher {
    outlet: Outlet,
    wiring: Wiring,
    /// `exactly_once`.
    session: Option<Session>,
    next: u64,
    /// Sent and not yet acknowledged; the source's share of the memory limit bounds them.
    under_way: VecDeque<UnderWay>,
    /// Why the open transaction cannot be committed.
    broken: Option<String>,
}

/// A transactional producer's life.
struct Session {
    transactions: Transactions,
    config: ClientConfig,
    timeout: Duration,
    commit_interval: Duration,
    /// The open transaction.
    begun: Option<Instant>,
    _member: MemberId,
}

/// A window that is sent, in whole or in part.
struct UnderWay {
    number: u64,
    content: Encoded,
    /// By span: whether its lease was held when the window was sent.
    live: Vec<bool>,
    /// Messages not yet acknowledged.
    left: usize,
    started: Instant,
}

impl UnderWay {
    /// A span that counts was given up or lost since.
    fn lost(&self) -> bool {
        let spans = &self.content.window.spans;
        spans.iter().zip(&self.live).any(|(span, live)| *live && !span.lease.is_held())
    }
}

/// Makes the client; its first sign of life is [`Publisher::serve`]'s to look for.
fn producer(config: &ClientConfig, health: &Arc<Health>) -> Result<Arc<BaseProducer<Reports>>, KafkaError> {
    config.create_with_context(Reports::new(Arc::clone(health))).map(Arc::new)
}

impl Publisher {
    pub fn new(settings: &Settings, wiring: Wiring) -> Result<Self, String> {
        let cannot = |e: &dyn std::fmt::Display| format!("the producer cannot be made: {e}");
        let mut config = config(settings);
        let exactly_once = settings.delivery.guarantee == Guarantee::ExactlyOnce;
        let member = if exactly_once { Some(MemberId::take(settings)?) } else { None };
        let timeout = settings.transaction_timeout();
        if let Some(member) = &member {
            config.set("transactional.id", &member.id);
            config.set("transaction.timeout.ms", timeout.as_millis().to_string());
        }
        let producer = producer(&config, &wiring.health).map_err(|e| cannot(&e))?;
        let session = match member {
            None => None,
            Some(member) => Some(Session {
                transactions: Transactions::start(Arc::clone(&producer), timeout).map_err(|e| cannot(&e))?,
                config,
                timeout,
                commit_interval: settings.delivery.commit_interval.0,
                begun: None,
                _member: member,
            }),
        };
        let outlet = Outlet::new(settings, producer, &wiring);
        Ok(Self { outlet, wiring, session, next: 0, under_way: VecDeque::new(), broken: None })
    }

    /// Publishes windows until their channel closes and the last is acknowledged.
    pub fn serve(
        mut self,
        windows: &Receiver<Queued<Encoded>>,
        reports: &Sender<Report>,
    ) -> Result<(), String> {
        if self.session.is_some() && !self.init()? {
            return Ok(());
        }
        let mut open = true;
        while open || !self.under_way.is_empty() {
            self.wiring.health.busy(Stage::Publish);
            // Reports are looked for every so often; with none to come, the producer wants to be
            // served now and then all the same.
            let pause = if self.under_way.is_empty() { IDLE } else { REPORTS };
            let due = self.commit_due(open);
            if open && !due && self.broken.is_none() {
                match windows.recv_timeout(pause) {
                    Ok(window) => {
                        let window = window.take(&self.wiring.metrics, "wait_publish");
                        self.send(window, reports)?;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => open = false,
                }
            } else {
                std::thread::park_timeout(pause);
            }
            self.poll()?;
            if let Some(reason) = self.broken.take() {
                self.abort(&reason, reports)?;
            } else if self.session.is_none() {
                while self.under_way.front().is_some_and(|first| first.left == 0) {
                    failpoint::pass("acknowledged");
                    self.report_first(reports, false);
                }
            } else if due && self.under_way.iter().all(|window| window.left == 0) {
                self.commit(reports)?;
            }
        }
        self.wiring.health.idle(Stage::Publish);
        Ok(())
    }

    fn commit_due(&self, open: bool) -> bool {
        let Some(Session { begun: Some(begun), commit_interval, .. }) = &self.session else { return false };
        !open || begun.elapsed() >= *commit_interval || self.wiring.hurry.is_set()
    }

    // Sending.

    fn send(&mut self, mut content: Encoded, reports: &Sender<Report>) -> Result<(), String> {
        let live: Vec<bool> = content.window.spans.iter().map(|span| span.lease.is_held()).collect();
        if !live.contains(&true) {
            // A closed channel is the source's end, and with it the process's.
            let _ = reports.send(Report::Dropped { bytes: content.window.reserved() });
            return Ok(());
        }
        failpoint::pass("publish");
        if !self.begin() {
            // What is aborted is read again: this window too.
            self.under_way.push_back(UnderWay {
                number: self.next,
                content,
                live,
                left: 0,
                started: Instant::now(),
            });
            self.next += 1;
            return Ok(());
        }
        let number = self.next;
        self.next += 1;
        let started = Instant::now();
        let mut sent = 0;
        // Reports may come for it before all of it is sent.
        for place in 0..content.outcomes.len() {
            let span = content.window.records[place].span as usize;
            if !live[span] || !content.window.spans[span].lease.is_held() {
                continue;
            }
            sent += 1;
            self.outlet.send(number, &mut content, place)?;
            // The producer's queue is to drain while it is filled.
            if place % 4096 == 4095 {
                self.outlet.producer.poll(Duration::ZERO);
            }
        }
        self.under_way.push_back(UnderWay { number, content, live, left: sent, started });
        failpoint::pass("sent");
        self.show_memory();
        Ok(())
    }

    /// Opens a transaction where one is wanted and none is open; false when that failed.
    fn begin(&mut self) -> bool {
        let Some(session) = &mut self.session else { return true };
        if session.begun.is_some() {
            return true;
        }
        match self.outlet.producer.begin_transaction() {
            Ok(()) => session.begun = Some(Instant::now()),
            Err(error) => self.broken = Some(format!("begin: {error}")),
        }
        session.begun.is_some()
    }

    /// Serves the producer and books what it reports.
    fn poll(&mut self) -> Result<(), String> {
        loop {
            // With a time to wait, the client's poll would spin through the last millisecond of it.
            self.outlet.producer.poll(Duration::ZERO);
            let arrived = self.outlet.producer.context().take();
            if arrived.acknowledged.is_empty() && arrived.failed.is_empty() {
                return self.outlet.check_fatal();
            }
            for (number, count) in arrived.acknowledged {
                // Of an aborted transaction, where it is no longer there.
                if let Some(window) = self.of(number) {
                    window.left -= count;
                }
            }
            for (ticket, code) in arrived.failed {
                self.refused(ticket, code)?;
            }
        }
    }

    fn of(&mut self, number: u64) -> Option<&mut UnderWay> {
        let first = self.under_way.front()?.number;
        self.under_way.get_mut(usize::try_from(number.checked_sub(first)?).ok()?)
    }

    /// A message the broker will not take. Too large a prediction becomes a dead letter, too large a
    /// dead letter one of headers alone. Anything else is no record's fault: in a transaction it may
    /// pass, and without one nothing comes here that may.
    fn refused(&mut self, ticket: Ticket, code: RDKafkaErrorCode) -> Result<(), String> {
        use RDKafkaErrorCode as Code;
        let transactional = self.session.is_some();
        let number = ticket.window();
        let Some(window) = self.of(number) else { return Ok(()) };
        let record = &window.content.window.records[ticket.place()];
        let position = window.content.window.position(record);
        if code == Code::MessageSizeTooLarge {
            if !transactional {
                let index = self.under_way.iter().position(|w| w.number == number).expect("just found");
                return self.outlet.send_instead(number, &mut self.under_way[index].content, ticket.place());
            }
            // The broker's refusal has broken the transaction; the next one knows better.
            let how = match window.content.outcomes[ticket.place()] {
                Outcome::Dead(_) => TooLarge::DeadLetter,
                _ => TooLarge::Prediction,
            };
            self.outlet.too_large.insert(position.clone(), how);
            self.broken = Some(format!("{position}: too large for its topic"));
            return Ok(());
        }
        let for_good = [
            Code::TopicAuthorizationFailed,
            Code::ClusterAuthorizationFailed,
            Code::UnknownTopic,
            Code::UnknownTopicOrPartition,
            Code::UnknownPartition,
            Code::InvalidTopic,
            Code::InvalidRecord,
            Code::PolicyViolation,
        ];
        if !transactional || for_good.contains(&code) {
            return Err(format!("{position}: the broker refuses its prediction for good: {code}"));
        }
        self.broken.get_or_insert(format!("{position}: not delivered: {code}"));
        Ok(())
    }

    // Transactions.

    /// Becomes the transactional producer, however long the coordinator takes; false when asked to stop.
    fn init(&mut self) -> Result<bool, String> {
        loop {
            let result = self.call(Call::Init);
            self.wiring.health.busy(Stage::Publish);
            match result {
                Ok(()) => return Ok(true),
                Err(Broken::Fatal(message)) => return Err(format!("transaction: {message}")),
                Err(Broken::Again(message) | Broken::Abort(message)) => {
                    tracing::warn!("transaction: {message}; trying again");
                    self.wiring.health.error(&message);
                    self.wiring.metrics.retries.with_label_values(&["transaction"]).inc();
                }
                Err(Broken::Lost(message)) => {
                    tracing::warn!("transaction: {message}; trying again");
                    self.renew()?;
                }
            }
            if self.wiring.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            std::thread::park_timeout(AGAIN);
        }
    }

    fn call(&self, call: Call) -> Result<(), Broken> {
        let session = self.session.as_ref().expect("transactions are asked of a session alone");
        let (producer, health) = (&self.outlet.producer, &self.wiring.health);
        let started = Instant::now();
        let result = session.transactions.call(call, || {
            producer.poll(Duration::ZERO);
            health.busy(Stage::Publish);
        });
        self.wiring.metrics.stage.with_label_values(&["commit"]).observe(started.elapsed().as_secs_f64());
        result
    }

    /// Offsets and predictions, all or nothing.
    fn commit(&mut self, reports: &Sender<Report>) -> Result<(), String> {
        failpoint::pass("acknowledged");
        // In this order; see `lease`.
        let group = (self.wiring.group)();
        if self.under_way.iter().any(UnderWay::lost) {
            return self.abort("partitions went away", reports);
        }
        let Some(group) = group else { return self.abort("the group is left", reports) };
        let offsets = self.offsets()?;
        let result = self.call(Call::SendOffsets(offsets, group)).and_then(|()| {
            failpoint::pass("offsets");
            self.call(Call::Commit)
        });
        match result {
            Ok(()) => {
                failpoint::pass("txn-committed");
                if let Some(session) = &mut self.session {
                    session.begun = None;
                }
                while !self.under_way.is_empty() {
                    self.report_first(reports, true);
                }
                self.outlet.too_large.clear();
                Ok(())
            }
            Err(Broken::Fatal(message)) => Err(format!("transaction: {message}")),
            Err(Broken::Abort(message) | Broken::Again(message)) => self.abort(&message, reports),
            Err(Broken::Lost(message)) => self.give_up(&message, reports),
        }
    }

    /// The offset after the last record of each partition.
    fn offsets(&self) -> Result<TopicPartitionList, String> {
        let metadata = Metadata::new(&self.wiring.model, &self.wiring.digest, &Default::default()).text();
        let mut list = TopicPartitionList::new();
        for window in &self.under_way {
            for (span, _) in window.content.window.spans.iter().zip(&window.live).filter(|(_, live)| **live) {
                let (topic, number) = (&*span.partition.topic, span.partition.number);
                let next = Offset::Offset(span.last + 1);
                let set = match list.find_partition(topic, number) {
                    // Windows are in order.
                    Some(mut known) => known.set_offset(next),
                    None => {
                        let mut element = list.add_partition(topic, number);
                        element.set_metadata(&metadata);
                        element.set_offset(next)
                    }
                };
                set.map_err(|e| format!("{topic}/{number}: offset {}: {e}", span.last + 1))?;
            }
        }
        Ok(list)
    }

    fn abort(&mut self, reason: &str, reports: &Sender<Report>) -> Result<(), String> {
        self.drop_all(reason, reports);
        match self.call(Call::Abort) {
            Ok(()) => {
                // Of messages that are no more.
                self.outlet.producer.poll(Duration::ZERO);
                drop(self.outlet.producer.context().take());
                if let Some(session) = &mut self.session {
                    session.begun = None;
                }
                let _ = reports.send(Report::Aborted);
                Ok(())
            }
            Err(Broken::Fatal(message)) => Err(format!("transaction: {message}")),
            Err(Broken::Abort(message) | Broken::Again(message) | Broken::Lost(message)) => {
                self.give_up(&message, reports)
            }
        }
    }

    /// The producer is left to itself; a new one with the same id fences it and aborts what it left.
    fn give_up(&mut self, reason: &str, reports: &Sender<Report>) -> Result<(), String> {
        self.drop_all(reason, reports);
        self.renew()?;
        if self.init()? {
            let _ = reports.send(Report::Aborted);
        }
        Ok(())
    }

    fn renew(&mut self) -> Result<(), String> {
        let session = self.session.as_mut().expect("transactions are asked of a session alone");
        let cannot = |e: &dyn std::fmt::Display| format!("another producer cannot be made: {e}");
        let producer = producer(&session.config, &self.wiring.health).map_err(|e| cannot(&e))?;
        session.transactions =
            Transactions::start(Arc::clone(&producer), session.timeout).map_err(|e| cannot(&e))?;
        session.begun = None;
        self.outlet.producer = producer;
        Ok(())
    }

    /// Ends the leases of all that is in the transaction, so that what comes behind it stays behind it.
    fn drop_all(&mut self, reason: &str, reports: &Sender<Report>) {
        if self.under_way.is_empty() {
            return;
        }
        tracing::warn!(
            windows = self.under_way.len(),
            reason,
            "transaction aborted: its records are read again"
        );
        self.wiring.metrics.retries.with_label_values(&["transaction"]).inc();
        self.wiring.health.error(&format!("transaction aborted: {reason}"));
        for window in self.under_way.drain(..) {
            for (span, _) in window.content.window.spans.iter().zip(&window.live).filter(|(_, live)| **live) {
                span.lease.end();
            }
            let _ = reports.send(Report::Dropped { bytes: window.content.window.reserved() });
        }
        self.show_memory();
    }

    // Reporting.

    fn report_first(&mut self, reports: &Sender<Report>, committed: bool) {
        if let Some(first) = self.under_way.pop_front() {
            let published = self.finish(first, committed);
            // A closed channel is the source's end, and with it the process's.
            let _ = reports.send(Report::Published(published));
        }
    }

    /// Counts what is acknowledged.
    fn finish(&self, done: UnderWay, committed: bool) -> Published {
        let UnderWay { content: Encoded { window, outcomes, memory: _ }, live, started, .. } = done;
        let metrics = &self.wiring.metrics;
        metrics.stage.with_label_values(&["publish"]).observe(started.elapsed().as_secs_f64());
        let mut counts = vec![[0u64; 3]; window.spans.len()];
        let (latency, age) = (metrics.record_latency.local(), metrics.record_age.local());
        let (now, wall) = (Instant::now(), SystemTime::now());
        let wall = wall.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
        for (record, outcome) in window.records.iter().zip(&outcomes) {
            let Record { span, arrived, timestamp, .. } = record;
            if !live[*span as usize] {
                continue;
            }
            let kind = match outcome {
                Outcome::Prediction { .. } | Outcome::Unchanged => 0,
                Outcome::Dead(error) => {
                    metrics.dead_letters.with_label_values(&[error.fault.name()]).inc();
                    1
                }
                Outcome::Tombstone => 2,
            };
            counts[*span as usize][kind] += 1;
            latency.observe((now - *arrived).as_secs_f64());
            if let Some(timestamp) = timestamp {
                age.observe((wall - timestamp).max(0) as f64 / 1000.0);
            }
        }
        let mut totals = [0; 3];
        for (span, counts) in window.spans.iter().zip(counts) {
            for (i, (outcome, count)) in
                ["predicted", "dead_lettered", "tombstone"].iter().zip(counts).enumerate()
            {
                totals[i] += count;
                if count > 0 {
                    metrics.records.with_label_values(&[&*span.partition.topic, *outcome]).inc_by(count);
                }
            }
        }
        self.show_memory();
        let ms = (now - window.records[0].arrived).as_millis() as u64;
        tracing::debug!(
            window = window.id,
            records = window.records.len(),
            partitions = window.spans.len(),
            predicted = totals[0],
            dead_lettered = totals[1],
            tombstones = totals[2],
            closed_by = window.closed_by.name(),
            ms,
            "window published"
        );
        let bytes = window.reserved();
        Published { records: window.records.len(), bytes, spans: window.spans, committed }
    }

    /// Predictions of windows not yet acknowledged in full.
    fn show_memory(&self) {
        let bytes: usize =
            self.under_way.iter().flat_map(|window| &window.content.memory).map(Vec::capacity).sum();
        self.wiring.metrics.memory.with_label_values(&["predictions"]).set(bytes as i64);
    }
}
