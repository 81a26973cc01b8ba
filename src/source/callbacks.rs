//! The consumer's callbacks. They run inside poll calls on the source's thread, so they only queue events, which that
//! thread handles after the call.
//!
//! Rebalances are queued too. librdkafka waits until the application calls assign or unassign, but does not need the
//! call inside the callback. So a revocation can stay open until windows in flight finish, while polling goes on.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaRespErr;

use super::lookup::Answer;
use crate::kafka::log;

/// What the source's loop handles besides records.
#[derive(Debug)]
pub(super) enum Event {
    Assigned(TopicPartitionList),
    Revoked(TopicPartitionList),
    Committed(Result<(), KafkaError>, TopicPartitionList),
    Statistics(Box<Statistics>),
    Answer(Answer),
    Error(KafkaError, String),
}

#[derive(Debug, Default)]
pub(super) struct Callbacks {
    events: Mutex<VecDeque<Event>>,
    closing: AtomicBool,
}

impl Callbacks {
    /// Takes the events queued since the last call, in order.
    pub fn take(&self) -> VecDeque<Event> {
        std::mem::take(&mut *self.events.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// From now on rebalances are answered inside the callback: the consumer is about to close.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    pub fn queue(&self, event: Event) {
        self.events.lock().unwrap_or_else(|e| e.into_inner()).push_back(event);
    }
}

impl ClientContext for Callbacks {
    fn stats(&self, statistics: Statistics) {
        self.queue(Event::Statistics(Box::new(statistics)));
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.queue(Event::Error(error, reason.to_owned()));
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log::librdkafka(level, facility, text);
    }
}

impl ConsumerContext for Callbacks {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        kind: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        let assigned = kind == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        if self.closing.load(Ordering::Relaxed) {
            // librdkafka waits for an answer to an assignment too, and then unassigns it by itself.
            let answered =
                if assigned { assign(consumer, partitions) } else { unassign(consumer, partitions) };
            if let Err(error) = answered {
                tracing::warn!(%error, assigned, "answering a rebalance failed while closing the consumer");
            }
            return;
        }
        let partitions = partitions.clone();
        self.queue(if assigned { Event::Assigned(partitions) } else { Event::Revoked(partitions) });
    }
}

/// Assigns partitions to the client; incrementally under the cooperative protocol.
pub(super) fn assign(consumer: &BaseConsumer<Callbacks>, partitions: &TopicPartitionList) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_assign(partitions),
        RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.assign(partitions),
    }
}

/// Unassigns partitions; all of them unless the protocol is cooperative.
pub(super) fn unassign(
    consumer: &BaseConsumer<Callbacks>,
    partitions: &TopicPartitionList,
) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_unassign(partitions),
        RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.unassign(),
    }
}
