//! The Kafka producer and its messages in flight.

use std::ffi::CString;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::bindings::{
    rd_kafka_default_topic_conf_dup, rd_kafka_flush, rd_kafka_topic_conf_set, rd_kafka_topic_destroy,
    rd_kafka_topic_new, rd_kafka_topic_t,
};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, PurgeConfig};
use rdkafka::types::RDKafkaErrorCode;

use super::acks::{Arrived, Reports, Ticket};
use super::compose::Composed;
use crate::kafka::login::{self, Client, Side};
use crate::settings::{Guarantee, Settings};
use crate::telemetry::Health;

/// Bytes that a message takes in the producer's queue besides its key, value and headers.
const MESSAGE_OVERHEAD: u64 = 512;
/// Bytes of a batch besides its messages, rounded up so that a full batch stays below the topic's limit.
const BATCH_MARGIN: u64 = 512;
/// librdkafka's default `batch.size` in bytes.
const BATCH_BYTES: u64 = 1_000_000;
/// If no topic's limit is known, each refused batch halves `batch.size`, down to this many bytes.
const LEAST_BATCH: u64 = 16 << 10;

/// The part of the producer's configuration that does not come from the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ProducerLimits {
    /// Smallest `max.message.bytes` of the topics that kandle writes to; `None`: unknown.
    pub batch: Option<u64>,
    /// How often to halve `batch.size`: batches were refused and no topic's limit is known.
    pub halved: u32,
    /// Send one request at a time, so that nothing is in flight behind a refused batch.
    pub one_request_at_a_time: bool,
}

/// The librdkafka properties of the producer.
pub(super) fn config(settings: &Settings, limits: ProducerLimits) -> ClientConfig {
    let share = settings.memory.limit.0 / 4;
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &settings.kafka.brokers)
        .set("client.id", "kandle")
        // The Java client hashes keys this way.
        .set("partitioner", "murmur2_random")
        .set("enable.idempotence", "true")
        // No limit here: each topic has its own; see `TopicRules` and `batch.size` below.
        .set("message.max.bytes", "1000000000")
        .set("queue.buffering.max.messages", (share / MESSAGE_OVERHEAD).clamp(1000, 1_000_000).to_string())
        // The publisher counts bytes itself. With a limit here, a message that is larger would be refused for ever.
        .set("queue.buffering.max.kbytes", "2097151");
    if settings.delivery.guarantee == Guarantee::AtLeastOnce {
        // No timeout: only the end of the process drops a message, never librdkafka silently. In a transaction the
        // transaction's timeout applies.
        config.set("message.timeout.ms", "0");
        // Sends nothing after a refused batch, so that no later message overtakes it.
        config.set("enable.gapless.guarantee", "true");
    }
    login::configure(&mut config, settings, Side::Output);
    if limits.one_request_at_a_time {
        config.set("max.in.flight.requests.per.connection", "1");
    }
    let own = settings.property("batch.size").and_then(|size| size.parse().ok()).unwrap_or(BATCH_BYTES);
    let most = limits.batch.map_or(own, |limit| limit.saturating_sub(BATCH_MARGIN).max(1));
    let size = own.min(most);
    let size =
        if limits.halved > 0 { size.min((own >> limits.halved.min(32)).max(LEAST_BATCH)) } else { size };
    config.set("batch.size", size.to_string());
    config
}

/// Whether the settings compress messages.
pub(super) fn compresses(settings: &Settings) -> bool {
    let set = ["compression.type", "compression.codec"].iter().find_map(|name| settings.property(name));
    set.is_some_and(|codec| codec != "none")
}

/// Producer settings of one topic. The client keeps them as long as this handle lives.
struct TopicSettings(*mut rd_kafka_topic_t);

// SAFETY: librdkafka's functions on topics may be called from any thread.
unsafe impl Send for TopicSettings {}

impl TopicSettings {
    /// Compresses the messages to a topic. Call this before the first message to it.
    fn compressed(client: &BaseProducer<Reports>, topic: &str) -> Option<Self> {
        let topic = CString::new(topic).ok()?;
        // SAFETY: the client is alive, the strings are NUL-terminated, `rd_kafka_topic_new` takes ownership of the
        // configuration, and `RecordProducer` drops this handle before the client.
        let handle = unsafe {
            let conf = rd_kafka_default_topic_conf_dup(client.client().native_ptr());
            let (name, codec) = (c"compression.codec", c"zstd");
            rd_kafka_topic_conf_set(conf, name.as_ptr(), codec.as_ptr(), ptr::null_mut(), 0);
            rd_kafka_topic_new(client.client().native_ptr(), topic.as_ptr(), conf)
        };
        (!handle.is_null()).then_some(Self(handle))
    }
}

impl Drop for TopicSettings {
    fn drop(&mut self) {
        // SAFETY: this struct owns the handle and destroys it once.
        unsafe { rd_kafka_topic_destroy(self.0) };
    }
}

/// The producer client. It counts bytes itself: librdkafka counts only values, neither keys nor headers.
pub(super) struct RecordProducer {
    /// Settings of the dead-letter topic. Declared first, because it must be dropped before the client.
    _dead_letters: Option<TopicSettings>,
    pub client: Arc<Client<BaseProducer<Reports>>>,
    /// Messages in flight.
    pub unacknowledged: usize,
    /// Bytes of the messages in flight.
    pub bytes: u64,
}

/// Why the client did not accept a message.
pub(super) enum NotTaken {
    /// The queue is full; try again later.
    Full,
    /// Another message of the transaction has already failed.
    TransactionFailed,
    /// The producer has failed; [`RecordProducer::fatal_error`] has the reason.
    ProducerFailed,
    Other(KafkaError),
}

impl RecordProducer {
    /// Creates the client. It connects later, so unreachable brokers cause no error here.
    pub fn new(config: &ClientConfig, settings: &Settings, health: &Arc<Health>) -> KafkaResult<Self> {
        let client: Client<BaseProducer<Reports>> = login::create(config, Reports::new(Arc::clone(health)))?;
        // Compress dead letters, so that a large record's bytes still fit into one.
        let dead_letters = match compresses(settings) {
            true => None,
            false => TopicSettings::compressed(&client, &settings.dead_letters.topic),
        };
        Ok(Self { _dead_letters: dead_letters, client: Arc::new(client), unacknowledged: 0, bytes: 0 })
    }

    /// Queues a message of `bytes` bytes. Returns the bytes that it occupies until it is acknowledged.
    pub fn send(
        &mut self,
        topic: &str,
        partition: Option<i32>,
        message: Composed<'_>,
        bytes: u64,
        ticket: Ticket,
    ) -> Result<u64, NotTaken> {
        let bytes = bytes + MESSAGE_OVERHEAD;
        let record = BaseRecord {
            topic,
            partition,
            payload: message.value,
            key: message.key,
            // librdkafka reads 0 as the current time; 1 is the nearest timestamp that it keeps.
            timestamp: message.timestamp.map(|timestamp| if timestamp == 0 { 1 } else { timestamp }),
            headers: Some(message.headers),
            delivery_opaque: ticket.word(),
        };
        match self.client.send(record) {
            Ok(()) => {
                self.unacknowledged += 1;
                self.bytes += bytes;
                Ok(bytes)
            }
            Err((KafkaError::MessageProduction(code), _)) => Err(match code {
                RDKafkaErrorCode::QueueFull => NotTaken::Full,
                RDKafkaErrorCode::State => NotTaken::TransactionFailed,
                RDKafkaErrorCode::Fatal | RDKafkaErrorCode::Fenced => NotTaken::ProducerFailed,
                code => NotTaken::Other(KafkaError::MessageProduction(code)),
            }),
            Err((error, _)) => Err(NotTaken::Other(error)),
        }
    }

    /// Sends all queued messages without waiting for more to fill a batch (`linger.ms`).
    pub fn send_now(&self) {
        // The client's threads check a flag that is set during the call; this is the time they take to wake up.
        const WAKE_UP_MS: i32 = 1;
        // SAFETY: the client is alive and may be flushed from any thread. A timeout of the flush is expected.
        unsafe { rd_kafka_flush(self.client.client().native_ptr(), WAKE_UP_MS) };
    }

    /// Polls the client and returns the delivery reports since the last call.
    pub fn poll(&self) -> Arrived {
        // No timeout: with one, the client's poll would busy-wait through the last millisecond.
        self.client.poll(Duration::ZERO);
        self.client.context().take()
    }

    /// Counts a message of `bytes` bytes as no longer in flight.
    pub fn finished(&mut self, bytes: u64) {
        self.unacknowledged = self.unacknowledged.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// The client's fatal error, if it had one. After it the client sends nothing more.
    pub fn fatal_error(&self) -> Option<(RDKafkaErrorCode, String)> {
        self.client.client().fatal_error()
    }

    /// Drops the queued messages and waits at most `limit` for those already sent; returns their delivery reports.
    /// Calls `waits` meanwhile. A message without a report may or may not have been published.
    pub fn wind_up(&self, limit: Duration, mut waits: impl FnMut()) -> Vec<Arrived> {
        self.client.purge(PurgeConfig::default().queue());
        let deadline = Instant::now() + limit;
        let mut all = Vec::new();
        loop {
            all.push(self.poll());
            waits();
            if self.client.in_flight_count() == 0 || Instant::now() >= deadline {
                return all;
            }
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch_size(more: &[&str], limits: ProducerLimits) -> String {
        let set =
            ["kafka.brokers=b:1", "input.topics=i", "input.group=g", "input.format=text", "task.kind=noop"];
        let set = set.iter().chain(&["output.topic=o", "dead_letters.topic=d"]).chain(more);
        let sources =
            crate::settings::Sources { set: set.map(|s| s.to_string()).collect(), ..Default::default() };
        let settings = crate::settings::load(&sources).unwrap().settings;
        config(&settings, limits).get("batch.size").unwrap().to_owned()
    }

    #[test]
    fn batches_stay_below_every_topics_limit() {
        let limits = ProducerLimits { batch: None, halved: 0, one_request_at_a_time: false };
        assert_eq!(batch_size(&[], limits), "1000000");
        assert_eq!(batch_size(&[], ProducerLimits { batch: Some(500_000), ..limits }), "499488");
        assert_eq!(batch_size(&[], ProducerLimits { batch: Some(20_000_000), ..limits }), "1000000");
        let own = ["output.properties.batch.size=200000"];
        assert_eq!(batch_size(&own, ProducerLimits { batch: Some(500_000), ..limits }), "200000");
        assert_eq!(batch_size(&own, ProducerLimits { batch: Some(100_000), ..limits }), "99488");
        assert_eq!(batch_size(&[], ProducerLimits { halved: 2, ..limits }), "250000");
        assert_eq!(batch_size(&[], ProducerLimits { halved: 60, ..limits }), "16384");
    }
}
