//! `exactly_once`: the publisher's transactions.
//!
//! ```text
//! begin ─▶ windows of commit_interval ─▶ all acknowledged ─▶ leases still held? ─▶ offsets ─▶ commit ─▶ report
//!                                                                └── no, or an error ──▶ abort ─▶ end leases ─▶ report
//! ```
//!
//! The group's generation is asked for before the leases are looked at; see [`crate::lease`]. An abort
//! ends the leases of all that was in the transaction, so that nothing behind it can overtake it, and
//! the source reads it again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::topic_partition_list::TopicPartitionList;

use super::acks::Reports;
use super::member::MemberId;
use super::outlet::{config, producer};
use super::publish::{FOR_GOOD, Publisher, UnderWay};
use super::transaction::{Broken, Call, Transactions};
use crate::failpoint;
use crate::flow::Report;
use crate::settings::Settings;
use crate::source::Metadata;
use crate::telemetry::Health;
use crate::telemetry::health::Stage;

/// Between two tries to become a transactional producer.
const AGAIN: Duration = Duration::from_secs(1);

/// A transactional producer's life.
pub(super) struct Session {
    transactions: Transactions,
    config: ClientConfig,
    timeout: Duration,
    commit_interval: Duration,
    /// The open transaction.
    begun: Option<Instant>,
    _member: MemberId,
}

impl Session {
    /// With its producer, which [`Publisher::init`] has yet to make transactional.
    pub fn new(
        settings: &Settings,
        health: &Arc<Health>,
    ) -> Result<(Arc<BaseProducer<Reports>>, Self), String> {
        let cannot = |e: &dyn std::fmt::Display| format!("the producer cannot be made: {e}");
        let member = MemberId::take(settings)?;
        let timeout = settings.transaction_timeout();
        let mut config = config(settings);
        config.set("transactional.id", &member.id);
        config.set("transaction.timeout.ms", timeout.as_millis().to_string());
        let producer = producer(&config, health).map_err(|e| cannot(&e))?;
        let transactions = Transactions::start(Arc::clone(&producer), timeout).map_err(|e| cannot(&e))?;
        let commit_interval = settings.delivery.commit_interval.0;
        let session = Self { transactions, config, timeout, commit_interval, begun: None, _member: member };
        Ok((producer, session))
    }
}

impl Publisher {
    fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("transactions are asked of a session alone")
    }

    /// Whether the open transaction, if there is one, is to take no more windows.
    pub(super) fn commit_due(&self, open: bool) -> bool {
        let Some(Session { begun: Some(begun), commit_interval, .. }) = &self.session else { return false };
        !open || begun.elapsed() >= *commit_interval || self.wiring.hurry.is_set()
    }

    /// Opens a transaction where one is wanted and none is open; false when that failed.
    pub(super) fn begin(&mut self) -> bool {
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

    /// Becomes the transactional producer, however long the coordinator takes; false when asked to stop.
    pub(super) fn init(&mut self) -> Result<bool, String> {
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
    pub(super) fn commit(&mut self, reports: &Sender<Report>) -> Result<(), String> {
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
                self.session().begun = None;
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
        // Windows are in order: the last span of a partition counts.
        let spans = self.under_way.iter().flat_map(UnderWay::live_spans);
        let offsets: BTreeMap<_, _> = spans.map(|span| (&span.partition, span.last + 1)).collect();
        let metadata = Metadata::new(&self.wiring.model, &self.wiring.digest, &Default::default());
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (partition, offset) in offsets {
            metadata
                .add_to(&mut list, partition, offset)
                .map_err(|e| format!("{partition}: offset {offset}: {e}"))?;
        }
        Ok(list)
    }

    pub(super) fn abort(&mut self, reason: &str, reports: &Sender<Report>) -> Result<(), String> {
        self.drop_all(reason, reports);
        match self.call(Call::Abort) {
            Ok(()) => {
                // Of messages that are no more; but what was refused for good would be again.
                self.outlet.producer.poll(Duration::ZERO);
                let failed = self.outlet.producer.context().take().failed;
                if let Some((_, code)) = failed.iter().find(|(_, code)| FOR_GOOD.contains(code)) {
                    return Err(format!("the broker refuses predictions for good: {code}"));
                }
                self.session().begun = None;
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
        let cannot = |e: &dyn std::fmt::Display| format!("another producer cannot be made: {e}");
        let health = Arc::clone(&self.wiring.health);
        let session = self.session();
        let producer = producer(&session.config, &health).map_err(|e| cannot(&e))?;
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
            window.live_spans().for_each(|span| span.lease.end());
            let _ = reports.send(Report::Dropped { bytes: window.content.window.reserved() });
        }
        self.show_memory();
    }
}
