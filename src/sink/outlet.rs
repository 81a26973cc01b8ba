//! The producer, and the message that is made of each record: its topic, partition, headers, value.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;

use super::acks::{Reports, Ticket};
use super::message::{self, Stamp};
use super::publish::Wiring;
use crate::cluster::Topics;
use crate::flow::{Encoded, Outcome};
use crate::record::{Fault, Partition, Position, RecordError, header_bytes};
use crate::settings::{Guarantee, Partitioning, Settings};
use crate::telemetry::health::Stage;
use crate::telemetry::{Health, Metrics};

/// What a message takes in the producer's queue beside its key and value: librdkafka's own structure
/// and our headers.
const MESSAGE_OVERHEAD: u64 = 1024;

/// The producer's properties for everything but transactions.
pub(super) fn config(settings: &Settings) -> ClientConfig {
    let share = settings.memory.limit.0 / 4;
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &settings.kafka.brokers)
        .set("client.id", "kandle")
        // Java's clients hash keys this way.
        .set("partitioner", "murmur2_random")
        .set("enable.idempotence", "true")
        // Sizes are checked here, against each topic's own limit; see `Outlet::send`.
        .set("message.max.bytes", "1000000000")
        .set("queue.buffering.max.messages", (share / MESSAGE_OVERHEAD).clamp(1000, 1_000_000).to_string())
        .set("queue.buffering.max.kbytes", (share / 1024).clamp(1, 2_097_151).to_string());
    if settings.delivery.guarantee == Guarantee::AtLeastOnce {
        // For ever: a message is given up by the process, never silently. In a transaction it lasts
        // as long as the transaction.
        config.set("message.timeout.ms", "0");
    }
    for (name, value) in settings.kafka.properties.iter().chain(&settings.output.properties) {
        config.set(name, &value.0);
    }
    config
}

/// Makes the client; whether the brokers answer is seen later.
pub(super) fn producer(
    config: &ClientConfig,
    health: &Arc<Health>,
) -> Result<Arc<BaseProducer<Reports>>, KafkaError> {
    config.create_with_context(Reports::new(Arc::clone(health))).map(Arc::new)
}

/// How much of a record is too large for its topic, as the broker said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TooLarge {
    /// The prediction: a dead letter goes instead.
    Prediction,
    /// The dead letter too: its headers alone.
    DeadLetter,
}

/// `topic/partition/offset`, of which mostly only the offset changes from record to record.
#[derive(Default)]
struct SourceText {
    text: String,
    /// Whose the part before the offset is, and how long it is.
    of: Option<(Partition, usize)>,
}

impl SourceText {
    fn at(&mut self, partition: &Partition, offset: i64) -> &str {
        match &self.of {
            Some((known, length)) if known == partition => self.text.truncate(*length),
            _ => {
                self.text.clear();
                // Writing to a String cannot fail.
                let _ = write!(self.text, "{partition}/");
                self.of = Some((partition.clone(), self.text.len()));
            }
        }
        self.text.push_str(itoa::Buffer::new().format(offset));
        &self.text
    }
}

pub(super) struct Outlet {
    pub producer: Arc<BaseProducer<Reports>>,
    output: String,
    dead_letters: String,
    partitioning: Partitioning,
    stamp: Stamp,
    topics: Topics,
    transactional: bool,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    source: SourceText,
    /// The transaction takes no more: a message of it has failed already.
    pub transaction_failed: Cell<bool>,
    /// What a transaction that is sent again must not send again.
    pub too_large: HashMap<Position, TooLarge>,
}

impl Outlet {
    pub fn new(settings: &Settings, producer: Arc<BaseProducer<Reports>>, wiring: &Wiring) -> Self {
        Self {
            producer,
            output: settings.output.topic.clone(),
            dead_letters: settings.dead_letters.topic.clone(),
            partitioning: settings.output.partition,
            stamp: Stamp { model: wiring.model.clone(), digest: wiring.digest.clone() },
            topics: wiring.topics,
            transactional: settings.delivery.guarantee == Guarantee::ExactlyOnce,
            metrics: Arc::clone(&wiring.metrics),
            health: Arc::clone(&wiring.health),
            source: SourceText::default(),
            transaction_failed: Cell::new(false),
            too_large: HashMap::new(),
        }
    }

    /// Sends what there is to say about the record at `place`.
    pub fn send(&mut self, number: u64, content: &mut Encoded, place: usize) -> Result<(), String> {
        if !self.too_large.is_empty() {
            match self.too_large.get(&content.window.position(&content.window.records[place])) {
                None => {}
                Some(TooLarge::Prediction) => self.bury(content, place),
                Some(TooLarge::DeadLetter) => {
                    self.bury(content, place);
                    return self.send_bare(number, content, place);
                }
            }
        }
        let Encoded { window, outcomes, memory } = &*content;
        let record = &window.records[place];
        let (partition, offset) = window.origin(record);
        let source = self.source.at(partition, offset);
        let (topic, written, value, headers) = match &outcomes[place] {
            Outcome::Dead(error) => {
                let headers = message::dead_letter(record.headers.as_ref(), source, error, &self.stamp);
                (&self.dead_letters, self.topics.dead_letters, window.value(record), headers)
            }
            outcome => {
                let value = match outcome {
                    Outcome::Prediction { part, bytes } => {
                        Some(&memory[*part as usize][bytes.start as usize..bytes.end as usize])
                    }
                    Outcome::Unchanged => window.value(record),
                    Outcome::Tombstone | Outcome::Dead(_) => None,
                };
                let headers = message::prediction(record.headers.as_ref(), source, &self.stamp);
                (&self.output, self.topics.output, value, headers)
            }
        };
        let key = window.key(record);
        // A batch with a message that is too large is refused as a whole, its neighbours too: what
        // may be too large never gets that far.
        let bytes = value.map_or(0, <[u8]>::len)
            + key.map_or(0, <[u8]>::len)
            + message::OVERHEAD
            + header_bytes(Some(&headers));
        if bytes as u64 > written.max_bytes {
            return self.send_instead(number, content, place);
        }
        self.produce(BaseRecord {
            topic,
            partition: message::partition(self.partitioning, key, partition.number, written.partitions),
            payload: value,
            key,
            timestamp: record.timestamp,
            headers: Some(headers),
            delivery_opaque: Ticket::new(number, place).word(),
        })
    }

    /// After a prediction that is too large its dead letter, after a dead letter its headers alone.
    pub fn send_instead(&mut self, number: u64, content: &mut Encoded, place: usize) -> Result<(), String> {
        match &content.outcomes[place] {
            Outcome::Dead(_) => self.send_bare(number, content, place),
            _ => {
                self.bury(content, place);
                self.send(number, content, place)
            }
        }
    }

    /// Makes it a dead letter; one that is one keeps its reason.
    fn bury(&self, content: &mut Encoded, place: usize) {
        if !matches!(content.outcomes[place], Outcome::Dead(_)) {
            let message = format!("the prediction is larger than {} takes", self.output);
            content.outcomes[place] = Outcome::Dead(RecordError::new(Fault::TooLarge, message));
        }
    }

    /// A dead letter of headers alone.
    fn send_bare(&self, number: u64, content: &Encoded, place: usize) -> Result<(), String> {
        let (partition, offset) = content.window.origin(&content.window.records[place]);
        let position = format!("{partition}/{offset}");
        let Outcome::Dead(error) = &content.outcomes[place] else {
            unreachable!("only a dead letter loses its bytes");
        };
        tracing::warn!(
            source = position,
            topic = self.dead_letters,
            "too large even for a dead letter: only its headers are kept"
        );
        self.produce(BaseRecord {
            topic: &self.dead_letters,
            partition: Some(0),
            payload: None,
            key: None,
            timestamp: None,
            headers: Some(message::dead_letter(None, &position, error, &self.stamp)),
            delivery_opaque: Ticket::new(number, place).word(),
        })
    }

    fn produce(&self, mut message: BaseRecord<'_, [u8], [u8], usize>) -> Result<(), String> {
        loop {
            match self.producer.send(message) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    message = back;
                    self.metrics.retries.with_label_values(&["produce"]).inc();
                    self.producer.poll(Duration::from_millis(10));
                    self.check_fatal()?;
                    // Kafka is away: it is waited for, and nothing of ours has stopped.
                    self.health.busy(Stage::Publish);
                }
                // It says so of a transaction alone, before the report of the message that failed.
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::State), _)) if self.transactional => {
                    self.transaction_failed.set(true);
                    return Ok(());
                }
                Err((error, back)) => return Err(format!("cannot publish to {}: {error}", back.topic)),
            }
        }
    }

    pub fn check_fatal(&self) -> Result<(), String> {
        match self.producer.client().fatal_error() {
            Some((code, reason)) => Err(format!("the producer failed for good: {code}: {reason}")),
            None => Ok(()),
        }
    }
}
