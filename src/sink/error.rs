//! Why nothing more can be published. The process ends with 1; the next start publishes what was not acknowledged, and
//! the broker aborts a transaction that was left open.

use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use crate::record::{Partition, Position};

#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error("the producer cannot be created: {0}")]
    Client(KafkaError),
    #[error("the producer's thread for transactions cannot be started: {0}")]
    Thread(std::io::Error),
    #[error("cannot publish to {topic}: {error}")]
    Topic { topic: String, error: KafkaError },
    /// The broker takes nothing at all: a right or a topic is missing.
    #[error("{position}: the broker refuses its prediction for good: {code}")]
    Refused { position: Position, code: RDKafkaErrorCode },
    #[error("{position}: {topic} refuses its dead letter in every form: {reason}")]
    DeadLetterRefused { position: Position, topic: String, reason: String },
    #[error("the producer failed for good: {code}: {reason}")]
    Fatal { code: RDKafkaErrorCode, reason: String },
    /// Another producer has the transactional.id, or this one has no right to it.
    #[error("transaction: {0}")]
    Transaction(String),
    /// The group's offsets tell the next start.
    #[error("transaction: {0}: whether it is committed is unknown")]
    InDoubt(String),
    #[error("{partition}: offset {offset}: {error}")]
    Offset { partition: Partition, offset: i64, error: KafkaError },
    #[error(transparent)]
    TransactionalId(#[from] TransactionalIdError),
}

/// Why no transactional.id could be made.
#[derive(Debug, thiserror::Error)]
pub enum TransactionalIdError {
    #[error(
        "{path}: {error}; set delivery.transactional_id, or group.instance.id in input.properties, where there is no room \
         for files"
    )]
    Lock { path: String, error: std::io::Error },
    #[error("{0} members of the group run on this machine")]
    TooMany(usize),
    #[error("this machine does not say its name: set delivery.transactional_id")]
    NoHostName,
}
