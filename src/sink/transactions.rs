//! `exactly_once`: the publisher's transactions.
//!
//! ```text
//! begin ─▶ records, up to the budget or commit_interval ─▶ all acknowledged ─▶ leases still held? ─▶ offsets ─▶ commit ─▶ report
//!   ▲                                                        └── no, or an error ──▶ abort ──┐
//!   └────────── the same records again, less those whose lease has ended ◀──────────────────┘
//! ```
//!
//! A transaction holds predictions of one model only: it also ends before a window of another version of the model.
//!
//! The group's generation is read before the leases are checked; see [`crate::lease`]. The records of an aborted
//! transaction are kept: they are sent again before any later ones.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::producer::Producer;
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaErrorCode;

use super::acks::Ticket;
use super::budget::Budget;
use super::error::PublishError;
use super::producer::RecordProducer;
use super::publisher::{Cursor, Delivery, Publisher};
use super::transaction_thread::{Call, CallError, TransactionThread};
use super::transactional_id::TransactionalId;
use super::window::SampleOutcome;
use crate::failpoint;
use crate::flow::ModelVersion;
use crate::kafka::metadata::{Metadata, add_offset};
use crate::record::Partition;
use crate::settings::Settings;
use crate::telemetry::Health;
use crate::telemetry::health::Stage;

/// Delay between two attempts to initialize transactions.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The transactional producer's state.
pub(super) struct Transactions {
    thread: TransactionThread,
    pub config: ClientConfig,
    timeout: Duration,
    commit_interval: Duration,
    budget: Budget,
    open: Option<Open>,
    /// Reserves the id as long as this lives.
    _id: TransactionalId,
}

/// An open transaction.
struct Open {
    begun: Instant,
    /// Its first record.
    from: Cursor,
    /// The model that made all of its predictions.
    model: Option<Arc<ModelVersion>>,
    /// Bytes sent so far.
    sent: u64,
    /// Bytes acknowledged so far.
    acknowledged: u64,
}

impl Transactions {
    /// Creates the state and its producer. Call [`Publisher::become_transactional`] before the first transaction.
    pub fn new(
        settings: &Settings,
        mut config: ClientConfig,
        health: &Arc<Health>,
    ) -> Result<(RecordProducer, Self), PublishError> {
        let id = TransactionalId::take(settings)?;
        let timeout = settings.transaction_timeout();
        config.set("transactional.id", &id.text);
        config.set("transaction.timeout.ms", timeout.as_millis().to_string());
        let producer = RecordProducer::new(&config, settings, health).map_err(PublishError::Client)?;
        let thread =
            TransactionThread::start(Arc::clone(&producer.client), timeout).map_err(PublishError::Thread)?;
        let transactions = Self {
            thread,
            config,
            timeout,
            commit_interval: settings.delivery.commit_interval.0,
            budget: Budget::default(),
            open: None,
            _id: id,
        };
        Ok((producer, transactions))
    }

    /// Counts an acknowledged message of the open transaction.
    pub fn acknowledged(&mut self, bytes: u64) {
        if let Some(open) = &mut self.open {
            open.acknowledged += bytes;
        }
    }

    /// Whether the open transaction has used up its budget of bytes.
    fn is_full(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.sent >= self.budget.bytes())
    }

    /// Whether the open transaction is older, by our clock, than the timeout after which the broker aborts it.
    fn has_timed_out(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.begun.elapsed() >= self.timeout)
    }
}

impl Publisher {
    fn transactions(&mut self) -> Option<&mut Transactions> {
        match &mut self.delivery {
            Delivery::AtLeastOnce => None,
            Delivery::ExactlyOnce(transactions) => Some(transactions),
        }
    }

    /// Whether the open transaction takes no more records and is to be committed. `input`: more windows may come.
    pub(super) fn transaction_is_due(&self, input: bool) -> bool {
        let Delivery::ExactlyOnce(transactions) = &self.delivery else { return false };
        let Some(open) = &transactions.open else { return false };
        self.next_is_of_another_model(open)
            || (!input && self.all_is_sent())
            || open.begun.elapsed() >= transactions.commit_interval
            || transactions.is_full()
            || self.context.commit_soon.is_set()
    }

    /// Whether the next record to send has a prediction of another model than the open transaction's: a model is
    /// replaced between two transactions.
    fn next_is_of_another_model(&self, open: &Open) -> bool {
        // A window has predictions of one model only.
        let next = if self.cursor.place == 0 { self.next_window() } else { None };
        let next = next.map(|window| &window.content.model);
        matches!((next, &open.model), (Some(next), Some(model)) if next != model)
    }

    /// Opens a transaction if one is needed and none is open. Returns false if that failed, or the open one takes no
    /// more records.
    pub(super) fn begin_transaction(&mut self) -> Result<bool, PublishError> {
        let cursor = self.cursor;
        let Delivery::ExactlyOnce(transactions) = &self.delivery else { return Ok(true) };
        if let Some(open) = &transactions.open {
            return Ok(!transactions.is_full() && !self.next_is_of_another_model(open));
        }
        let model = self.next_window().map(|window| Arc::clone(&window.content.model));
        let Delivery::ExactlyOnce(transactions) = &mut self.delivery else { return Ok(true) };
        match self.producer.client.begin_transaction() {
            Ok(()) => {
                transactions.open =
                    Some(Open { begun: Instant::now(), from: cursor, model, sent: 0, acknowledged: 0 });
                Ok(true)
            }
            Err(error) => {
                self.renew(&format!("begin: {error}"))?;
                Ok(false)
            }
        }
    }

    pub(super) fn count_in_transaction(&mut self, bytes: u64) {
        if let Some(Transactions { open: Some(open), .. }) = self.transactions() {
            open.sent += bytes;
        }
    }

    /// Whether the process can survive an error that ends the producer: only its transaction has timed out, and a new
    /// producer with the same id can replace it.
    pub(super) fn may_outlive(&mut self, code: RDKafkaErrorCode) -> bool {
        let timed_out = self.transactions().is_some_and(|transactions| transactions.has_timed_out());
        let fenced = matches!(
            code,
            RDKafkaErrorCode::Fenced
                | RDKafkaErrorCode::ProducerFenced
                | RDKafkaErrorCode::InvalidProducerEpoch
        );
        if fenced && timed_out {
            self.abort_reason.get_or_insert_with(|| "the transaction timed out at the broker".to_owned());
        }
        fenced && timed_out
    }

    /// Commits the transaction once it is due and acknowledged, or aborts it where it cannot be committed.
    pub(super) fn advance_transaction(&mut self, due: bool) -> Result<(), PublishError> {
        if let Some(reason) = self.abort_reason.take() {
            return self.abort(&reason);
        }
        if self.is_too_slow() {
            return self.abort("not acknowledged in time");
        }
        let (waiting, to) = (self.producer.unacknowledged > 0, self.cursor);
        let owed = self.owed_sample.is_some();
        let Some(transactions) = self.transactions() else { return Ok(()) };
        let Some(open) = &transactions.open else {
            // Windows that have lost all their leases need no commit.
            self.report_published(true);
            return Ok(());
        };
        if !due || waiting || owed {
            return Ok(());
        }
        let (limited, took, timeout) = (transactions.is_full(), open.begun.elapsed(), transactions.timeout);
        let from = open.from;
        transactions.budget.acknowledged(limited, took, timeout);
        let tickets = self.unsettled(from, to);
        if !self.commit(&tickets)? {
            return Ok(());
        }
        self.report_published(true);
        Ok(())
    }

    /// Whether the open transaction is about to time out while messages of it are in flight. If so, this also shrinks
    /// the budget of the next one.
    pub(super) fn is_too_slow(&mut self) -> bool {
        let waiting = self.producer.unacknowledged > 0;
        let Some(transactions) = self.transactions() else { return false };
        let Some(open) = &transactions.open else { return false };
        let (acknowledged, after, timeout) = (open.acknowledged, open.begun.elapsed(), transactions.timeout);
        // The rest of the timeout is left for the abort.
        if !waiting || after <= timeout * 3 / 4 {
            return false;
        }
        transactions.budget.timed_out(acknowledged, after, timeout);
        tracing::warn!(
            acknowledged_bytes = acknowledged,
            seconds = after.as_secs(),
            next_bytes = transactions.budget.bytes(),
            "the broker acknowledges too slowly: aborting the transaction, making the next one smaller"
        );
        true
    }

    /// Commits the open transaction, which holds these records. Returns false if it was aborted instead.
    pub(super) fn commit(&mut self, tickets: &[Ticket]) -> Result<bool, PublishError> {
        failpoint::pass("acknowledged");
        // Read the generation first, then check the leases; see `lease`.
        let group = (self.context.group)();
        if self.windows.iter().any(|window| window.has_lost()) {
            self.abort("partitions were revoked")?;
            return Ok(false);
        }
        let Some(group) = group else {
            self.abort("the consumer has left the group")?;
            return Ok(false);
        };
        let offsets = self.offsets(tickets)?;
        let mut result = self.call(Call::SendOffsets(offsets, group));
        if result.is_ok() {
            failpoint::pass("offsets");
            result = self.call(Call::Commit);
            if let Err(CallError::Again(message) | CallError::Lost(message)) = result {
                // The coordinator may have committed it. Only the group's offsets show that; the next start reads them.
                return Err(PublishError::InDoubt(message));
            }
        }
        match result {
            Ok(()) => {
                failpoint::pass("txn-committed");
                if let Some(transactions) = self.transactions() {
                    transactions.open = None;
                }
                for ticket in tickets {
                    if let Some(index) = self.index(ticket.window()) {
                        self.windows[index].settle(ticket.place());
                        self.windows[index].settle_sample(ticket.place(), SampleOutcome::Published);
                    }
                }
                Ok(true)
            }
            Err(CallError::Abort(message) | CallError::Again(message)) => {
                self.abort(&message).map(|()| false)
            }
            Err(CallError::Lost(message)) => self.renew(&message).map(|()| false),
            Err(CallError::Fatal(message)) => self.fatal(message).map(|()| false),
        }
    }

    /// The offsets to commit: for each partition, the offset after the last of these records.
    fn offsets(&self, tickets: &[Ticket]) -> Result<TopicPartitionList, PublishError> {
        let mut offsets: BTreeMap<&Partition, (i64, &Metadata)> = BTreeMap::new();
        let mut tickets = tickets;
        while let Some(first) = tickets.first() {
            // One window at a time.
            let count = tickets.iter().take_while(|ticket| ticket.window() == first.window()).count();
            let (of_window, rest) = tickets.split_at(count);
            tickets = rest;
            let (Some(index), Some(last)) = (self.index(first.window()), of_window.last()) else { continue };
            offsets.extend(self.windows[index].offsets(first.place(), last.place() + 1));
        }
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (partition, (offset, metadata)) in offsets {
            let failed = |error| PublishError::Offset { partition: partition.clone(), offset, error };
            add_offset(&mut list, partition, offset, &metadata.text()).map_err(failed)?;
        }
        Ok(list)
    }

    /// Aborts the open transaction. Its records are sent again, from the first one on.
    pub(super) fn abort(&mut self, reason: &str) -> Result<(), PublishError> {
        self.say_aborted(reason);
        match self.call(Call::Abort) {
            Ok(()) => {
                self.rewind()?;
                Ok(())
            }
            Err(CallError::Fatal(message)) => self.fatal(message),
            Err(CallError::Abort(message) | CallError::Again(message) | CallError::Lost(message)) => {
                self.renew(&message)
            }
        }
    }

    fn say_aborted(&self, reason: &str) {
        tracing::warn!(reason, "transaction aborted: its records are published again");
        self.context.metrics.retries.with_label_values(&["transaction"]).inc();
        self.context.health.error(&format!("transaction aborted: {reason}"));
    }

    /// Rewinds to the first record of the aborted transaction.
    fn rewind(&mut self) -> Result<(), PublishError> {
        // Delivery reports of its messages must not be counted for the next transaction.
        let limit = self.transactions().map_or(Duration::ZERO, |transactions| transactions.timeout);
        self.wind_up(limit)?;
        self.abort_reason = None;
        if let Some(open) = self.transactions().and_then(|transactions| transactions.open.take()) {
            self.cursor = open.from;
        }
        (self.owed_sample, self.sample_refused) = (None, false);
        for window in &mut self.windows {
            window.forget_sent();
            window.drop_lost();
        }
        (self.producer.unacknowledged, self.producer.bytes) = (0, 0);
        self.report_published(true);
        Ok(())
    }

    /// Handles an error that ends the producer. It also ends the process, unless only the transaction has timed out.
    fn fatal(&mut self, message: String) -> Result<(), PublishError> {
        match self.transactions() {
            Some(transactions) if transactions.has_timed_out() => {
                self.renew(&format!("the transaction timed out at the broker ({message})"))
            }
            _ => Err(PublishError::Transaction(message)),
        }
    }

    /// Replaces the producer with a new one with the same id, which fences the old one and aborts its transaction.
    pub(super) fn renew(&mut self, reason: &str) -> Result<(), PublishError> {
        self.say_aborted(reason);
        self.replace_producer()?;
        self.become_transactional().map(drop)
    }

    /// Replaces the producer with a new one of the current configuration, and rewinds.
    fn replace_producer(&mut self) -> Result<(), PublishError> {
        let Delivery::ExactlyOnce(transactions) = &mut self.delivery else { return Ok(()) };
        let producer = RecordProducer::new(&transactions.config, &self.settings, &self.context.health)
            .map_err(PublishError::Client)?;
        transactions.thread = TransactionThread::start(Arc::clone(&producer.client), transactions.timeout)
            .map_err(PublishError::Thread)?;
        self.producer = producer;
        self.refused.clear();
        self.rewind()
    }

    /// Replaces the producer if `config` differs from its configuration. Call this only between transactions.
    pub(super) fn reconfigure(&mut self, mut config: ClientConfig) -> Result<(), PublishError> {
        let Some(transactions) = self.transactions() else { return Ok(()) };
        for own in ["transactional.id", "transaction.timeout.ms"] {
            if let Some(value) = transactions.config.get(own) {
                config.set(own, value);
            }
        }
        if transactions.config.config_map() == config.config_map() {
            return Ok(());
        }
        transactions.config = config;
        self.replace_producer()?;
        self.become_transactional().map(drop)
    }

    /// Initializes transactions, however long the coordinator takes. Returns false if the process is asked to stop.
    pub(super) fn become_transactional(&mut self) -> Result<bool, PublishError> {
        loop {
            let result = self.call(Call::Init);
            self.context.health.busy(Stage::Publish);
            match result {
                Ok(()) => return Ok(true),
                Err(CallError::Fatal(message)) => return Err(PublishError::Transaction(message)),
                Err(CallError::Again(message) | CallError::Abort(message)) => {
                    tracing::warn!(reason = message, "cannot initialize transactions: trying again");
                    self.context.health.error(&message);
                    self.context.metrics.retries.with_label_values(&["transaction"]).inc();
                }
                Err(CallError::Lost(message)) => {
                    tracing::warn!(
                        reason = message,
                        "the transactional producer does not respond: replacing it"
                    );
                    self.replace_producer()?;
                }
            }
            if self.context.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            std::thread::park_timeout(RETRY_DELAY);
        }
    }

    fn call(&self, call: Call) -> Result<(), CallError> {
        let Delivery::ExactlyOnce(transactions) = &self.delivery else { return Ok(()) };
        let (client, health) = (&self.producer.client, &self.context.health);
        let started = Instant::now();
        let result = transactions.thread.call(call, || {
            client.poll(Duration::ZERO);
            health.busy(Stage::Publish);
        });
        self.context.metrics.stage.with_label_values(&["commit"]).observe(started.elapsed().as_secs_f64());
        result
    }
}
