//! The consumer's callbacks. They only leave a note: the thread that polls, whose call they run
//! in, reads the notes afterwards, and it alone owns all state.
//!
//! That includes the assignment. librdkafka waits for the application to take up or give up
//! partitions and does not ask for it to happen inside the callback; so a revocation is kept open
//! while windows in flight finish, with the consumer polled all the while.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaRespErr;

use super::ends::Known;

/// What a callback had to say.
#[derive(Debug)]
pub(super) enum Note {
    Assign(TopicPartitionList),
    Revoke(TopicPartitionList),
    Committed(Result<(), KafkaError>, TopicPartitionList),
    Statistics(Box<Statistics>),
    /// Of partitions that rest.
    Ends(Known),
    Error(KafkaError, String),
}

#[derive(Debug, Default)]
pub(super) struct Notes {
    notes: Mutex<VecDeque<Note>>,
    closing: AtomicBool,
}

impl Notes {
    pub fn take(&self) -> VecDeque<Note> {
        std::mem::take(&mut *self.notes.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// From now on revocations are answered at once: the consumer is about to be dropped.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    pub fn leave(&self, note: Note) {
        self.notes.lock().unwrap_or_else(|e| e.into_inner()).push_back(note);
    }
}

impl ClientContext for Notes {
    fn stats(&self, statistics: Statistics) {
        self.leave(Note::Statistics(Box::new(statistics)));
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.leave(Note::Error(error, reason.to_owned()));
    }
}

impl ConsumerContext for Notes {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        kind: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        let assign = kind == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        if self.closing.load(Ordering::Relaxed) {
            if !assign && let Err(error) = give_up(consumer, partitions) {
                tracing::warn!(%error, "partitions could not be given up while closing");
            }
            return;
        }
        let partitions = partitions.clone();
        self.leave(if assign { Note::Assign(partitions) } else { Note::Revoke(partitions) });
    }
}

/// Takes partitions up, as the group's protocol asks for it.
pub(super) fn take_up(consumer: &BaseConsumer<Notes>, partitions: &TopicPartitionList) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_assign(partitions),
        RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.assign(partitions),
    }
}

/// Gives partitions up.
pub(super) fn give_up(consumer: &BaseConsumer<Notes>, partitions: &TopicPartitionList) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_unassign(partitions),
        RebalanceProtocol::Eager | RebalanceProtocol::None => consumer.unassign(),
    }
}
