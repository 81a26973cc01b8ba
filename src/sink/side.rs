//! Publishes predictions beside the pipeline's own, as well as it can: without a transaction, and without a report to the
//! source. A record that the topic refuses is counted, and the next one is sent.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext};
use rdkafka::types::RDKafkaErrorCode;

use super::compose::{Composer, Target, partition};
use super::producer::{ProducerLimits, config};
use super::window::InFlightWindow;
use crate::flow::{Encoded, Outcome};
use crate::kafka::cluster::Cluster;
use crate::kafka::log;
use crate::kafka::login::{self, Client};
use crate::settings::Settings;

/// How long to wait for room in the client's queue before looking again.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Timeout of a request for the topic's partitions, and how long to wait before the next one.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// Numbers of messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Delivered {
    pub predictions: u64,
    pub tombstones: u64,
    pub failed: u64,
}

/// Counts delivery reports. Callbacks come on the thread that polls the producer.
#[derive(Default)]
struct Reports {
    delivered: Mutex<Delivered>,
    /// Whether the last message failed: only changes are logged.
    failing: Mutex<bool>,
}

impl Reports {
    /// Logs the first failure, and the first success after it.
    fn say(&self, error: Option<String>) {
        let mut failing = self.failing.lock().unwrap_or_else(|e| e.into_inner());
        match error {
            Some(error) if !*failing => {
                *failing = true;
                tracing::error!(
                    error,
                    "a prediction of the shadow cannot be published: going on with the next"
                );
            }
            None if *failing => {
                *failing = false;
                tracing::info!("predictions of the shadow are published again");
            }
            _ => {}
        }
    }
}

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        // The pipeline's producer says the same of the brokers.
        tracing::debug!(%error, reason, "producer error (shadow)");
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log::librdkafka(level, facility, text);
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        let mut delivered = self.delivered.lock().unwrap_or_else(|e| e.into_inner());
        let error = match result {
            Ok(message) => {
                match message.payload() {
                    Some(_) => delivered.predictions += 1,
                    None => delivered.tombstones += 1,
                }
                None
            }
            Err((error, _)) => {
                delivered.failed += 1;
                Some(error.to_string())
            }
        };
        drop(delivered);
        self.say(error);
    }
}

pub struct SidePublisher {
    client: Client<BaseProducer<Reports>>,
    composer: Composer,
    topic: String,
    /// Number of the topic's partitions, if it is known.
    partitions: Option<i32>,
    asked: Option<Instant>,
    timeout: Duration,
}

impl SidePublisher {
    /// `settings`: their `output` says where and how, and a quarter of `memory.limit` bounds what waits to be sent. A message
    /// is given up after `timeout`.
    ///
    /// # Errors
    /// The client cannot be created.
    pub fn new(settings: &Settings, timeout: Duration) -> KafkaResult<Self> {
        let topic = settings.output.topic.clone();
        // Without its limit, batches are as large as the client makes them.
        let rules = Cluster::connect(settings).ok().and_then(|cluster| cluster.rules(&topic).ok());
        let batch = rules.and_then(|rules| rules.max_bytes);
        let mut config = config(settings, ProducerLimits { batch, halved: 0, one_request_at_a_time: true });
        config
            .set("client.id", "kandle-shadow")
            // A refused message must not stop those behind it. With one request at a time, they stay in order.
            .set("enable.idempotence", "false")
            .set("enable.gapless.guarantee", "false")
            .set("acks", "all")
            .set("message.timeout.ms", timeout.as_millis().to_string())
            .set(
                "queue.buffering.max.kbytes",
                (settings.memory.limit.0 / 4 / 1024).clamp(1024, 2_097_151).to_string(),
            );
        let client = login::create(&config, Reports::default())?;
        let composer = Composer::new(settings);
        Ok(Self { client, composer, topic, partitions: None, asked: None, timeout })
    }

    /// Sends the predictions and tombstones of a window; waits while the client's queue is full. Returns the number of
    /// records that have none, or could not be sent.
    pub fn publish(&mut self, encoded: Encoded) -> u64 {
        let window = InFlightWindow::new(encoded);
        let deadline = Instant::now() + self.timeout;
        let mut failed = 0;
        for place in 0..window.len() {
            let outcome = &window.content.outcomes[place];
            if Target::of(outcome) == Target::DeadLetters {
                if let Outcome::Dead(error) = outcome {
                    tracing::debug!(position = %window.position(place), %error, "the shadow cannot predict a record");
                }
                failed += 1;
            } else if !self.send(&window, place, deadline) {
                failed += 1;
            }
        }
        self.client.poll(Duration::ZERO);
        failed
    }

    fn send(&mut self, window: &InFlightWindow, place: usize, deadline: Instant) -> bool {
        let partitions = self.partitions();
        let by = self.composer.partitioning;
        let message = self.composer.compose(window, place);
        let to = partition(by, message.key, message.source_partition, partitions.unwrap_or(0));
        if to.is_some() && partitions.is_none() {
            self.client.context().say(Some(format!("topic {}: its partitions are not known", self.topic)));
            return false;
        }
        let mut record = BaseRecord {
            topic: &self.topic,
            partition: to,
            payload: message.value,
            key: message.key,
            // librdkafka reads 0 as the current time; 1 is the nearest timestamp that it keeps.
            timestamp: message.timestamp.map(|timestamp| timestamp.max(1)),
            headers: Some(message.headers),
            delivery_opaque: (),
        };
        loop {
            match self.client.send(record) {
                Ok(()) => return true,
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back))
                    if Instant::now() < deadline =>
                {
                    record = back;
                    self.client.poll(POLL_INTERVAL);
                }
                Err((error, _)) => {
                    self.client.context().say(Some(error.to_string()));
                    return false;
                }
            }
        }
    }

    /// Number of the topic's partitions; asks the brokers until it is known, now and then.
    fn partitions(&mut self) -> Option<i32> {
        if self.partitions.is_none() && self.asked.is_none_or(|asked| asked.elapsed() >= ASK_AGAIN) {
            self.asked = Some(Instant::now());
            let metadata = self.client.client().fetch_metadata(Some(&self.topic), REQUEST_TIMEOUT).ok();
            let count = metadata.and_then(|all| all.topics().first().map(|topic| topic.partitions().len()));
            self.partitions = count.filter(|count| *count > 0).map(|count| count as i32);
        }
        self.partitions
    }

    /// What was delivered, or given up, since the last call.
    pub fn delivered(&self) -> Delivered {
        self.client.poll(Duration::ZERO);
        std::mem::take(&mut *self.client.context().delivered.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Waits until each message is acknowledged or given up.
    pub fn flush(&self) {
        // An error only says that the time is over.
        let _ = self.client.flush(self.timeout + REQUEST_TIMEOUT);
    }
}
