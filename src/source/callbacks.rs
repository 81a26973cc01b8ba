//! The consumer's callbacks. They run inside of the calls that poll, on the thread that owns all state; so they only
//! queue an event, which that thread handles afterwards.
//!
//! That includes the assignment. librdkafka waits until the application has taken up or given up partitions, and does
//! not need that to happen inside of the callback. So a revocation stays open while windows in flight finish, with the
//! consumer polled all the while.

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

/// What the source's loop has to handle beside records.
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
    /// The events since the last call, in order.
    pub fn take(&self) -> VecDeque<Event> {
        std::mem::take(&mut *self.events.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// From now on revocations are answered inside of the callback: the consumer is about to be dropped.
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
            // An assignment too is waited for: the client gives it up again by itself.
            let answered =
                if assigned { take_up(consumer, partitions) } else { give_up(consumer, partitions) };
            if let Err(error) = answered {
                tracing::warn!(%error, assigned, "a rebalance could not be answered while closing");
            }
            return;
        }
        let partitions = partitions.clone();
        self.queue(if assigned { Event::Assigned(partitions) } else { Event::Revoked(partitions) });
    }
}

/// Takes partitions up, as the group's protocol asks for it.
pub(super) fn take_up(
    consumer: &BaseConsumer<Callbacks>,
    partitions: &TopicPartitionList,
) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_assign(partitions),
        RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.assign(partitions),
    }
}

/// Gives partitions up.
pub(super) fn give_up(
    consumer: &BaseConsumer<Callbacks>,
    partitions: &TopicPartitionList,
) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_unassign(partitions),
        RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.unassign(),
    }
}
