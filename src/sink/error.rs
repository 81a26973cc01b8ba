//! Errors that end publishing. The process exits with 1. The next start publishes the records that were not
//! acknowledged, and the broker aborts a transaction that was left open.

use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use crate::record::{Partition, Position};

#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error("cannot create the producer: {0}")]
    Client(KafkaError),
    #[error("cannot start the transaction thread: {0}")]
    Thread(std::io::Error),
    #[error("cannot publish to topic {topic}: {error}")]
    Topic { topic: String, error: KafkaError },
    /// The broker refuses every record: a permission or a topic is missing.
    #[error(
        "{position}: topic {topic}: the broker refused its message: {code}; check the topic and this user's permissions"
    )]
    Refused { position: Position, topic: String, code: RDKafkaErrorCode },
    #[error("{position}: topic {topic} refused its dead letter, even reduced to kandle's headers: {reason}")]
    DeadLetterRefused { position: Position, topic: String, reason: String },
    #[error("fatal producer error: {code}: {reason}")]
    Fatal { code: RDKafkaErrorCode, reason: String },
    /// Another producer uses the transactional.id, or this user is not permitted to use it.
    #[error("transaction failed: {0}")]
    Transaction(String),
    /// The transaction may or may not be committed. The group's offsets show it, and the next start reads them.
    #[error(
        "transaction failed: {0}; it is unknown whether it was committed: the next start continues from the \
         group's offsets"
    )]
    InDoubt(String),
    #[error("{partition}: cannot add offset {offset} to the transaction: {error}")]
    Offset { partition: Partition, offset: i64, error: KafkaError },
    #[error(transparent)]
    TransactionalId(#[from] TransactionalIdError),
}

/// Why no transactional.id could be chosen.
#[derive(Debug, thiserror::Error)]
pub enum TransactionalIdError {
    #[error(
        "cannot lock {path}: {error}; if no file can be written there, set delivery.transactional_id, or \
         group.instance.id in input.properties"
    )]
    Lock { path: String, error: std::io::Error },
    #[error("{0} members of the group already run on this machine; set delivery.transactional_id")]
    TooMany(usize),
    #[error("cannot read the host name; set delivery.transactional_id")]
    NoHostName,
}
