//! The publisher: one thread that owns the producer.
//!
//! It sends a window's predictions and dead letters in input order, and does not wait for their
//! acknowledgement before it sends the next window's; the idempotent producer keeps the order.
//!
//! `at_least_once`: windows are reported in the order they came, each when all of its messages are
//! acknowledged; the source commits their offsets afterwards.
//!
//! `exactly_once`: windows go into one transaction with their offsets; see [`super::session`]. An error
//! of the producer that no retry can help ends the process.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use rdkafka::error::KafkaError;
use rdkafka::producer::Producer;
use rdkafka::types::RDKafkaErrorCode;

use super::acks::Ticket;
use super::outlet::{Outlet, TooLarge, config, producer};
use super::session::Session;
use crate::cluster::Topics;
use crate::failpoint;
use crate::flow::{Encoded, Hurry, Outcome, Published, Queued, Report};
use crate::record::Record;
use crate::settings::{Guarantee, Settings};
use crate::source::Group;
use crate::telemetry::health::Stage;
use crate::telemetry::traces::Traces;
use crate::telemetry::{Health, Metrics};
use crate::window::Span;

/// Between two looks for delivery reports while there are some to come.
const REPORTS: Duration = Duration::from_millis(2);
/// The same while there are none.
const IDLE: Duration = Duration::from_millis(500);

/// Refusals that trying again does not change.
pub(super) const FOR_GOOD: [RDKafkaErrorCode; 8] = [
    RDKafkaErrorCode::TopicAuthorizationFailed,
    RDKafkaErrorCode::ClusterAuthorizationFailed,
    RDKafkaErrorCode::UnknownTopic,
    RDKafkaErrorCode::UnknownTopicOrPartition,
    RDKafkaErrorCode::UnknownPartition,
    RDKafkaErrorCode::InvalidTopic,
    RDKafkaErrorCode::InvalidRecord,
    RDKafkaErrorCode::PolicyViolation,
];

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
    pub traces: Option<Arc<Traces>>,
}

pub struct Publisher {
    pub(super) outlet: Outlet,
    pub(super) wiring: Wiring,
    /// `exactly_once`.
    pub(super) session: Option<Session>,
    next: u64,
    /// Sent and not yet acknowledged; the source's share of the memory limit bounds them.
    pub(super) under_way: VecDeque<UnderWay>,
    /// Why the open transaction cannot be committed.
    pub(super) broken: Option<String>,
}

/// A window that is sent, in whole or in part.
pub(super) struct UnderWay {
    number: u64,
    pub content: Encoded,
    /// By span: whether its lease was held when the window was sent.
    pub live: Vec<bool>,
    /// Messages not yet acknowledged.
    pub left: usize,
    started: Instant,
}

impl UnderWay {
    /// The spans that count.
    pub fn live_spans(&self) -> impl Iterator<Item = &Span> {
        self.content.window.spans.iter().zip(&self.live).filter(|(_, live)| **live).map(|(span, _)| span)
    }

    /// A span that counts was given up or lost since.
    pub fn lost(&self) -> bool {
        self.live_spans().any(|span| !span.lease.is_held())
    }
}

impl Publisher {
    pub fn new(settings: &Settings, wiring: Wiring) -> Result<Self, String> {
        let cannot = |e: KafkaError| format!("the producer cannot be made: {e}");
        let (producer, session) = match settings.delivery.guarantee {
            Guarantee::AtLeastOnce => (producer(&config(settings), &wiring.health).map_err(cannot)?, None),
            Guarantee::ExactlyOnce => {
                let (producer, session) = Session::new(settings, &wiring.health)?;
                (producer, Some(session))
            }
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

    fn send(&mut self, mut content: Encoded, reports: &Sender<Report>) -> Result<(), String> {
        let live: Vec<bool> = content.window.spans.iter().map(|span| span.lease.is_held()).collect();
        if !live.contains(&true) {
            // A closed channel is the source's end, and with it the process's.
            let _ = reports.send(Report::Dropped { bytes: content.window.reserved() });
            return Ok(());
        }
        failpoint::pass("publish");
        let (number, started) = (self.next, Instant::now());
        self.next += 1;
        // Without a transaction nothing is sent, and the window is aborted with what else there is.
        let places = if self.begin() { content.outcomes.len() } else { 0 };
        let mut sent = 0;
        // Reports may come for it before all of it is sent.
        for place in 0..places {
            let span = content.window.records[place].span as usize;
            if !live[span] || !content.window.spans[span].lease.is_held() {
                continue;
            }
            sent += 1;
            self.outlet.send(number, &mut content, place)?;
            if self.outlet.transaction_failed.take() {
                // Reports say why, and until they are read this is what is known.
                self.broken.get_or_insert_with(|| "a message of it was not delivered".to_owned());
                break;
            }
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
                if let Some(at) = self.index(number) {
                    self.under_way[at].left -= count;
                }
            }
            for (ticket, code) in arrived.failed {
                self.refused(ticket, code)?;
            }
        }
    }

    /// Where the window stands in `under_way`.
    fn index(&self, number: u64) -> Option<usize> {
        let first = self.under_way.front()?.number;
        usize::try_from(number.checked_sub(first)?).ok().filter(|&at| at < self.under_way.len())
    }

    /// A message the broker will not take. Too large a prediction becomes a dead letter, too large a
    /// dead letter one of headers alone. Anything else is no record's fault: in a transaction it may
    /// pass, and without one nothing comes here that may.
    fn refused(&mut self, ticket: Ticket, code: RDKafkaErrorCode) -> Result<(), String> {
        let transactional = self.session.is_some();
        let number = ticket.window();
        let Some(at) = self.index(number) else { return Ok(()) };
        let content = &mut self.under_way[at].content;
        let position = content.window.position(&content.window.records[ticket.place()]);
        if code == RDKafkaErrorCode::MessageSizeTooLarge {
            if !transactional {
                return self.outlet.send_instead(number, content, ticket.place());
            }
            // The broker's refusal has broken the transaction; the next one knows better.
            let how = match content.outcomes[ticket.place()] {
                Outcome::Dead(_) => TooLarge::DeadLetter,
                _ => TooLarge::Prediction,
            };
            self.outlet.too_large.insert(position.clone(), how);
            self.broken = Some(format!("{position}: too large for its topic"));
            return Ok(());
        }
        if !transactional || FOR_GOOD.contains(&code) {
            return Err(format!("{position}: the broker refuses its prediction for good: {code}"));
        }
        self.broken.get_or_insert(format!("{position}: not delivered: {code}"));
        Ok(())
    }

    pub(super) fn report_first(&mut self, reports: &Sender<Report>, committed: bool) {
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
        for (span, counts) in window.spans.iter().zip(&counts) {
            for (i, (outcome, count)) in
                ["predicted", "dead_lettered", "tombstone"].iter().zip(counts).enumerate()
            {
                totals[i] += count;
                if *count > 0 {
                    metrics.records.with_label_values(&[&*span.partition.topic, *outcome]).inc_by(*count);
                }
            }
        }
        self.show_memory();
        let ms = (now - window.records[0].arrived).as_millis() as u64;
        let traces = self.wiring.traces.as_ref();
        let trace_id = traces.map(|traces| traces.window(&window, totals, &self.wiring.digest, now));
        tracing::debug!(
            window = window.id,
            records = window.records.len(),
            partitions = window.spans.len(),
            predicted = totals[0],
            dead_lettered = totals[1],
            tombstones = totals[2],
            closed_by = window.closed_by.name(),
            ms,
            trace_id,
            "window published"
        );
        let bytes = window.reserved();
        Published { records: window.records.len(), counts, bytes, spans: window.spans, committed }
    }

    /// Predictions of windows not yet acknowledged in full.
    pub(super) fn show_memory(&self) {
        let bytes: usize =
            self.under_way.iter().flat_map(|window| &window.content.memory).map(Vec::capacity).sum();
        self.wiring.metrics.memory.with_label_values(&["predictions"]).set(bytes as i64);
    }
}
