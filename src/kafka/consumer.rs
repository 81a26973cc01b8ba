//! The properties of consumers: the user's, kandle's own, and how much a consumer may hold.

use std::sync::Arc;

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, ConsumerContext, ConsumerGroupMetadata};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::{ClientConfig, Statistics};

use crate::kafka::log;
use crate::settings::{Guarantee, Settings};

/// How long a partition's fetcher rests once enough is prefetched. librdkafka's own second leaves a
/// fast pipeline without records most of the time: 131,000 records/s with it, 511,000 with this
/// (benches/RESULTS.md).
pub const FETCH_BACKOFF_MS: &str = "5";

/// What a prefetched message takes beside its bytes: librdkafka's operation and message headers,
/// measured by the resident memory of a consumer that is not polled (about 550 bytes, rounded up).
const MESSAGE_OVERHEAD: u64 = 640;

/// What a message may hold that librdkafka does not count: it weighs a queue by the bytes of values alone. Keys and
/// headers are bounded by the number of messages, if they take no more than this on average.
const UNCOUNTED: u64 = 20 << 10;

/// By how much an answer grows that is full of messages of about 20 bytes.
const SMALLEST_GROWTH: u64 = MESSAGE_OVERHEAD / 20;

/// How much librdkafka may hold of what was fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Prefetch {
    /// Bytes of messages in all.
    pub kib: u64,
    /// Messages a partition.
    pub messages: u64,
    /// Bytes of one answer from a broker, and of one partition in it. A larger message still comes.
    pub answer: u64,
    pub partition: u64,
}

impl Prefetch {
    /// `share` is what of the memory limit is for it; `partitions` is how many the topics have: one
    /// member may be given them all.
    pub fn within(share: u64, partitions: u64) -> Self {
        let partitions = partitions.max(1);
        // A quarter for the bytes of values, a quarter for headers and what messages take beside them, and a quarter for
        // the answer that comes when both are nearly full.
        let quarter = share / 4;
        let partition = (quarter / SMALLEST_GROWTH / partitions).clamp(16 << 10, 1 << 20);
        Self {
            kib: (quarter / 1024).clamp(1, 2_097_151),
            messages: (quarter / UNCOUNTED / partitions).clamp(16, 100_000),
            answer: (quarter / 4).clamp(partition, 50 << 20),
            partition,
        }
    }
}

/// The group as a transaction names it; `None` while the consumer is in none.
pub type Group = Arc<dyn Fn() -> Option<ConsumerGroupMetadata> + Send + Sync>;

/// What a member of a group does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Run,
    /// Replays too.
    Drain,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Run => "run",
            Role::Drain => "drain",
        }
    }

    /// The client.id, which the group shows of each member: what it does, and by which model.
    fn client_id(self, digest: &str) -> String {
        format!("kandle-{}-{digest}", self.name())
    }

    /// What a client.id says of a kandle; `None` where it is something else's.
    pub fn of(client_id: &str) -> Option<(Self, &str)> {
        let rest = client_id.strip_prefix("kandle-")?;
        let (role, digest) = rest.split_once('-')?;
        [Role::Run, Role::Drain].into_iter().find(|known| known.name() == role).map(|role| (role, digest))
    }
}

/// A client that asks and joins no group.
pub type Reader = BaseConsumer<ReaderContext>;

/// Errors of these clients are returned to the caller, which reports them.
pub struct ReaderContext;

impl ClientContext for ReaderContext {
    fn stats(&self, _: Statistics) {}

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "consumer error (lookup client)");
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log::librdkafka(level, facility, text);
    }
}

impl ConsumerContext for ReaderContext {}

/// A consumer that reads and commits nothing, and sees what the settings' group would see. It joins no group.
pub fn reader(settings: &Settings) -> KafkaResult<Reader> {
    reader_with(&config(settings, Role::Drain, "", 1))
}

/// The same, by a member's properties.
pub fn reader_with(config: &ClientConfig) -> KafkaResult<Reader> {
    reader_config(config).create_with_context(ReaderContext)
}

/// A consumer that stops where it would otherwise jump: at offsets that are not there, and at batches that cannot be
/// read.
pub fn prober(config: &ClientConfig) -> KafkaResult<Reader> {
    let mut config = reader_config(config);
    config.set("auto.offset.reset", "error").set("check.crcs", "true");
    // It looks at one place, and is told soon where nothing is there.
    config.set("fetch.wait.max.ms", "20");
    config.create_with_context(ReaderContext)
}

/// A client that is told at once where the group stands: it waits neither for the group's rebalance, as a member's
/// requests do, nor for open transactions.
pub fn offset_reader(config: &ClientConfig) -> KafkaResult<Reader> {
    let mut config = reader_config(config);
    config.set("isolation.level", "read_uncommitted");
    config.create_with_context(ReaderContext)
}

fn reader_config(config: &ClientConfig) -> ClientConfig {
    let mut config = config.clone();
    // A static member's name stays that member's.
    config.remove("group.instance.id");
    config.set("client.id", "kandle").set("statistics.interval.ms", "0");
    config.set("enable.partition.eof", "true");
    // It changes nothing.
    config.set("allow.auto.create.topics", "false");
    config
}

/// The properties of a member of the group; `partitions`: of all input topics.
pub fn config(settings: &Settings, role: Role, digest: &str, partitions: u64) -> ClientConfig {
    let mut config = ClientConfig::new();
    let prefetch = Prefetch::within(settings.memory.limit.0 / 4, partitions);
    config
        .set("bootstrap.servers", &settings.kafka.brokers)
        .set("client.id", role.client_id(digest))
        .set("group.id", &settings.input.group)
        // Where reading begins is resolved before. This is for offsets that retention deletes meanwhile: what is left
        // is read, whatever `input.start` says.
        .set("auto.offset.reset", "earliest")
        .set("check.crcs", "true")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("statistics.interval.ms", "1000")
        .set("fetch.queue.backoff.ms", FETCH_BACKOFF_MS)
        .set("queued.max.messages.kbytes", prefetch.kib.to_string())
        .set("queued.min.messages", prefetch.messages.to_string())
        .set("fetch.max.bytes", prefetch.answer.to_string())
        .set("fetch.message.max.bytes", prefetch.partition.to_string());
    if settings.delivery.guarantee == Guarantee::ExactlyOnce {
        // Also makes the group's offsets wait for transactions that still hold some: a partition's
        // next owner begins after what its last one committed.
        config.set("isolation.level", "read_committed");
    }
    let own = settings.kafka.properties.iter().chain(&settings.input.properties);
    // The new protocol's assignor is the broker's.
    let new_protocol = |(name, value): (&String, &crate::settings::Scalar)| {
        name == "group.protocol" && value.0.eq_ignore_ascii_case("consumer")
    };
    if !own.clone().any(new_protocol) {
        config.set("partition.assignment.strategy", "cooperative-sticky");
    }
    for (name, value) in own {
        config.set(name, &value.0);
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_prefetched_stays_within_its_share() {
        for share in [4 << 20, 64 << 20, 256 << 20, 4u64 << 30] {
            for partitions in [1, 4, 64] {
                let p = Prefetch::within(share, partitions);
                // Where there is room for more than the least number of messages.
                if p.messages > 16 {
                    let most = p.kib * 1024 + p.messages * partitions * UNCOUNTED + p.answer;
                    assert!(most <= share / 4 * 3, "{p:?}");
                }
                assert!(p.answer <= 50 << 20 && p.partition <= p.answer, "{p:?}");
            }
        }
        assert_eq!(Prefetch::within(1 << 40, 1).messages, 100_000, "no more than librdkafka's own");
    }
}
