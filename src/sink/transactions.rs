//! `exactly_once`: the publisher's transactions.
//!
//! ```text
//! begin ─▶ records, up to the budget or commit_interval ─▶ all acknowledged ─▶ leases still held? ─▶ offsets ─▶ commit ─▶ report
//!   ▲                                                        └── no, or an error ──▶ abort ──┐
//!   └────────── the same records again, less those whose lease has ended ◀──────────────────┘
//! ```
//!
//! The group's generation is asked for before the leases are looked at; see [`crate::lease`]. What was in an aborted
//! transaction is still here: it is sent again, before anything that came later.

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
use super::transaction_thread::{Broken, Call, TransactionThread};
use super::transactional_id::TransactionalId;
use crate::failpoint;
use crate::kafka::metadata::add_offset;
use crate::record::Partition;
use crate::settings::Settings;
use crate::telemetry::Health;
use crate::telemetry::health::Stage;

/// Between two attempts to become a transactional producer.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The transactional producer's state.
pub(super) struct Transactions {
    thread: TransactionThread,
    pub config: ClientConfig,
    timeout: Duration,
    commit_interval: Duration,
    budget: Budget,
    open: Option<Open>,
    /// Kept for as long as the id is used.
    _id: TransactionalId,
}

/// An open transaction.
struct Open {
    begun: Instant,
    /// Its first record.
    from: Cursor,
    /// Bytes sent, and acknowledged.
    sent: u64,
    acknowledged: u64,
}

impl Transactions {
    /// With its producer, which [`Publisher::become_transactional`] has yet to make transactional.
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

    /// A message of the open transaction is acknowledged.
    pub fn acknowledged(&mut self, bytes: u64) {
        if let Some(open) = &mut self.open {
            open.acknowledged += bytes;
        }
    }

    /// The open transaction holds as much as the broker will take in time.
    fn is_full(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.sent >= self.budget.bytes())
    }

    /// The broker has given the open transaction up, by our clock.
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

    /// Whether the open transaction, if there is one, takes no more records; `input`: more may come.
    pub(super) fn transaction_is_due(&self, input: bool) -> bool {
        let Delivery::ExactlyOnce(transactions) = &self.delivery else { return false };
        let Some(open) = &transactions.open else { return false };
        (!input && self.all_is_sent())
            || open.begun.elapsed() >= transactions.commit_interval
            || transactions.is_full()
            || self.context.commit_soon.is_set()
    }

    /// Opens a transaction where one is needed and none is open; false where that failed.
    pub(super) fn begin_transaction(&mut self) -> Result<bool, PublishError> {
        let cursor = self.cursor;
        let Delivery::ExactlyOnce(transactions) = &mut self.delivery else { return Ok(true) };
        if transactions.open.is_some() {
            return Ok(!transactions.is_full());
        }
        match self.producer.client.begin_transaction() {
            Ok(()) => {
                transactions.open =
                    Some(Open { begun: Instant::now(), from: cursor, sent: 0, acknowledged: 0 });
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

    /// Whether the process goes on after an error that ends the producer: its transaction has timed out, and another
    /// producer of the same id can take its place.
    pub(super) fn may_outlive(&mut self, code: RDKafkaErrorCode) -> bool {
        let timed_out = self.transactions().is_some_and(|transactions| transactions.has_timed_out());
        let fenced = matches!(
            code,
            RDKafkaErrorCode::Fenced
                | RDKafkaErrorCode::ProducerFenced
                | RDKafkaErrorCode::InvalidProducerEpoch
        );
        if fenced && timed_out {
            self.broken.get_or_insert_with(|| "the broker timed the transaction out".to_owned());
        }
        fenced && timed_out
    }

    /// Commits the transaction once it is due and acknowledged, or aborts it where it cannot be committed.
    pub(super) fn advance_transaction(&mut self, due: bool) -> Result<(), PublishError> {
        if let Some(reason) = self.broken.take() {
            return self.abort(&reason);
        }
        if self.is_too_slow() {
            return self.abort("not acknowledged in time");
        }
        let (waiting, to) = (self.producer.unacknowledged > 0, self.cursor);
        let Some(transactions) = self.transactions() else { return Ok(()) };
        let Some(open) = &transactions.open else {
            // Of windows that have lost all leases nothing is to be committed.
            self.report_published(true);
            return Ok(());
        };
        if !due || waiting {
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

    /// Whether the broker is about to give the open transaction up while messages of it are on their way. The next one
    /// is smaller then.
    pub(super) fn is_too_slow(&mut self) -> bool {
        let waiting = self.producer.unacknowledged > 0;
        let Some(transactions) = self.transactions() else { return false };
        let Some(open) = &transactions.open else { return false };
        let (acknowledged, after, timeout) = (open.acknowledged, open.begun.elapsed(), transactions.timeout);
        // What is left of the time is for the abort.
        if !waiting || after <= timeout * 3 / 4 {
            return false;
        }
        transactions.budget.timed_out(acknowledged, after, timeout);
        tracing::warn!(
            acknowledged_bytes = acknowledged,
            seconds = after.as_secs(),
            next_bytes = transactions.budget.bytes(),
            "the broker acknowledges too slowly for the transaction: the next one is smaller"
        );
        true
    }

    /// Commits the open transaction, which holds these records; false where it was aborted instead.
    pub(super) fn commit(&mut self, tickets: &[Ticket]) -> Result<bool, PublishError> {
        failpoint::pass("acknowledged");
        // In this order; see `lease`.
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
            if let Err(Broken::Again(message) | Broken::Lost(message)) = result {
                // The coordinator may have taken it: only the group's offsets say so, where the next start reads on.
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
                    }
                }
                Ok(true)
            }
            Err(Broken::Abort(message) | Broken::Again(message)) => self.abort(&message).map(|()| false),
            Err(Broken::Lost(message)) => self.renew(&message).map(|()| false),
            Err(Broken::Fatal(message)) => self.fatal(message).map(|()| false),
        }
    }

    /// The offset after the last of these records, by partition.
    fn offsets(&self, tickets: &[Ticket]) -> Result<TopicPartitionList, PublishError> {
        let mut offsets: BTreeMap<&Partition, (i64, &str)> = BTreeMap::new();
        let mut tickets = tickets;
        while let Some(first) = tickets.first() {
            // Of one window at a time.
            let count = tickets.iter().take_while(|ticket| ticket.window() == first.window()).count();
            let (of_window, rest) = tickets.split_at(count);
            tickets = rest;
            let (Some(index), Some(last)) = (self.index(first.window()), of_window.last()) else { continue };
            offsets.extend(self.windows[index].offsets(first.place(), last.place() + 1));
        }
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (partition, (offset, metadata)) in offsets {
            let failed = |error| PublishError::Offset { partition: partition.clone(), offset, error };
            add_offset(&mut list, partition, offset, metadata).map_err(failed)?;
        }
        Ok(list)
    }

    /// Aborts the open transaction. What was in it is sent again, from its first record on.
    pub(super) fn abort(&mut self, reason: &str) -> Result<(), PublishError> {
        self.say_aborted(reason);
        match self.call(Call::Abort) {
            Ok(()) => {
                self.rewind()?;
                Ok(())
            }
            Err(Broken::Fatal(message)) => self.fatal(message),
            Err(Broken::Abort(message) | Broken::Again(message) | Broken::Lost(message)) => {
                self.renew(&message)
            }
        }
    }

    fn say_aborted(&self, reason: &str) {
        tracing::warn!(reason, "transaction aborted: its records are published again");
        self.context.metrics.retries.with_label_values(&["transaction"]).inc();
        self.context.health.error(&format!("transaction aborted: {reason}"));
    }

    /// Goes back to the first record of the transaction that is no more.
    fn rewind(&mut self) -> Result<(), PublishError> {
        // Reports of its messages would be taken for those of the next one's.
        let limit = self.transactions().map_or(Duration::ZERO, |transactions| transactions.timeout);
        self.wind_up(limit)?;
        self.broken = None;
        if let Some(open) = self.transactions().and_then(|transactions| transactions.open.take()) {
            self.cursor = open.from;
        }
        for window in &mut self.windows {
            for place in 0..window.len() {
                window.take_size(place);
            }
            window.drop_lost();
        }
        (self.producer.unacknowledged, self.producer.bytes) = (0, 0);
        self.report_published(true);
        Ok(())
    }

    /// An error that ends the producer: the process too, unless the transaction had only timed out.
    fn fatal(&mut self, message: String) -> Result<(), PublishError> {
        match self.transactions() {
            Some(transactions) if transactions.has_timed_out() => {
                self.renew(&format!("the broker timed the transaction out ({message})"))
            }
            _ => Err(PublishError::Transaction(message)),
        }
    }

    /// Abandons the producer for a new one with the same id, which fences it and aborts what it left open.
    pub(super) fn renew(&mut self, reason: &str) -> Result<(), PublishError> {
        self.say_aborted(reason);
        self.replace_producer()?;
        self.become_transactional().map(drop)
    }

    /// Puts a new producer, by the present configuration, in the old one's place.
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

    /// Takes the producer's configuration as it is now; between transactions.
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

    /// Becomes the transactional producer, however long the coordinator takes; false when asked to stop.
    pub(super) fn become_transactional(&mut self) -> Result<bool, PublishError> {
        loop {
            let result = self.call(Call::Init);
            self.context.health.busy(Stage::Publish);
            match result {
                Ok(()) => return Ok(true),
                Err(Broken::Fatal(message)) => return Err(PublishError::Transaction(message)),
                Err(Broken::Again(message) | Broken::Abort(message)) => {
                    tracing::warn!(reason = message, "the transactional producer cannot start: trying again");
                    self.context.health.error(&message);
                    self.context.metrics.retries.with_label_values(&["transaction"]).inc();
                }
                Err(Broken::Lost(message)) => {
                    tracing::warn!(
                        reason = message,
                        "the transactional producer does not answer: replacing it"
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

    fn call(&self, call: Call) -> Result<(), Broken> {
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
