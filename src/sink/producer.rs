//! The producing client and what it has in flight.

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
use crate::settings::{Guarantee, Settings};
use crate::telemetry::Health;

/// What a message takes in the producer's queue beside its key, value and headers.
const MESSAGE_OVERHEAD: u64 = 512;
/// What a batch takes beside its messages, and a little more, so that a full one stays below a topic's limit.
const BATCH_MARGIN: u64 = 512;
/// librdkafka's own `batch.size`.
const BATCH_BYTES: u64 = 1_000_000;
/// Where no topic's limit is known, a refused batch is followed by ones half as large, down to this.
const LEAST_BATCH: u64 = 16 << 10;

/// How the producer is configured beyond the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ProducerLimits {
    /// The smallest `max.message.bytes` of the topics written, where it is known.
    pub batch: Option<u64>,
    /// Batches were refused although no limit is known: so many times they were halved.
    pub halved: u32,
    /// One request at a time, so that nothing behind a refused batch is on its way.
    pub careful: bool,
}

/// The properties of the producer.
pub(super) fn config(settings: &Settings, limits: ProducerLimits) -> ClientConfig {
    let share = settings.memory.limit.0 / 4;
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &settings.kafka.brokers)
        .set("client.id", "kandle")
        // Java's clients hash keys this way.
        .set("partitioner", "murmur2_random")
        .set("enable.idempotence", "true")
        // Each topic has its own limit; see `TopicRules` and `batch.size` below.
        .set("message.max.bytes", "1000000000")
        .set("queue.buffering.max.messages", (share / MESSAGE_OVERHEAD).clamp(1000, 1_000_000).to_string())
        .set("queue.buffering.max.kbytes", (share / 1024).clamp(1, 2_097_151).to_string());
    if settings.delivery.guarantee == Guarantee::AtLeastOnce {
        // No time limit: a message is given up by the process, never silently. In a transaction it lasts
        // as long as the transaction.
        config.set("message.timeout.ms", "0");
        // After a refused batch nothing more is sent, so that nothing overtakes it.
        config.set("enable.gapless.guarantee", "true");
    }
    for (name, value) in settings.kafka.properties.iter().chain(&settings.output.properties) {
        config.set(name, &value.0);
    }
    if limits.careful {
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

/// Whether the settings have messages compressed.
pub(super) fn compresses(settings: &Settings) -> bool {
    let set = ["compression.type", "compression.codec"].iter().find_map(|name| settings.property(name));
    set.is_some_and(|codec| codec != "none")
}

/// A topic's own settings, kept with the client for as long as this lives.
struct TopicSettings(*mut rd_kafka_topic_t);

// SAFETY: librdkafka's functions on topics may be called from any thread.
unsafe impl Send for TopicSettings {}

impl TopicSettings {
    /// Compresses what is produced to a topic. Only before the first message to it.
    fn compressed(client: &BaseProducer<Reports>, topic: &str) -> Option<Self> {
        let topic = CString::new(topic).ok()?;
        // SAFETY: the client is alive, the strings end with zeros, the topic takes the configuration over, and this
        // handle is given back before the client, which `RecordProducer` drops after it.
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
        // SAFETY: the handle is ours, and given back once.
        unsafe { rd_kafka_topic_destroy(self.0) };
    }
}

/// The client. Bytes are counted here: librdkafka counts values alone, neither keys nor headers.
pub(super) struct RecordProducer {
    /// Dropped before the client.
    _dead_letters: Option<TopicSettings>,
    pub client: Arc<BaseProducer<Reports>>,
    /// Messages and bytes on their way.
    pub unacknowledged: usize,
    pub bytes: u64,
}

/// Why a message was not taken.
pub(super) enum NotTaken {
    /// The queue is full: later.
    Full,
    /// A message of the transaction has failed already.
    TransactionFailed,
    /// The producer has failed, as [`RecordProducer::fatal_error`] says.
    ProducerFailed,
    Other(KafkaError),
}

impl RecordProducer {
    /// Whether the brokers can be reached shows later.
    pub fn new(config: &ClientConfig, settings: &Settings, health: &Arc<Health>) -> KafkaResult<Self> {
        let client: BaseProducer<Reports> = config.create_with_context(Reports::new(Arc::clone(health)))?;
        // A dead letter keeps its record's bytes wherever they fit compressed.
        let dead_letters = match compresses(settings) {
            true => None,
            false => TopicSettings::compressed(&client, &settings.dead_letters.topic),
        };
        Ok(Self { _dead_letters: dead_letters, client: Arc::new(client), unacknowledged: 0, bytes: 0 })
    }

    /// Hands a message of so many bytes over; returns the bytes that it takes until it is acknowledged.
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
            // librdkafka takes 0 for the present: the nearest that can be said.
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

    /// Has the client send what it holds, without waiting for more to fill its batches (`linger.ms`).
    pub fn send_now(&self) {
        // The client's threads look at a flag that is set during the call: so long, it takes them to wake up.
        const WAKE_UP_MS: i32 = 1;
        // SAFETY: the client is alive, and may be flushed from any thread. That not all is acknowledged is no matter.
        unsafe { rd_kafka_flush(self.client.client().native_ptr(), WAKE_UP_MS) };
    }

    /// What was reported since the last time.
    pub fn poll(&self) -> Arrived {
        // With a time to wait, the client's poll would spin through the last millisecond of it.
        self.client.poll(Duration::ZERO);
        self.client.context().take()
    }

    /// A message is no longer on its way.
    pub fn finished(&mut self, bytes: u64) {
        self.unacknowledged = self.unacknowledged.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// The error after which the client sends nothing more.
    pub fn fatal_error(&self) -> Option<(RDKafkaErrorCode, String)> {
        self.client.client().fatal_error()
    }

    /// Forgets what is queued and waits for what has been sent, at most for `limit`; returns the reports. `waits` is
    /// called now and then. Whatever is not acknowledged by then may or may not have been published.
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
        let limits = ProducerLimits { batch: None, halved: 0, careful: false };
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
