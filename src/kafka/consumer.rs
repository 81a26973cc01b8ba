//! The librdkafka properties of consumers: the user's, kandle's own, and the limits of prefetching.

use std::sync::Arc;

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, ConsumerContext, ConsumerGroupMetadata};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::{ClientConfig, Statistics};

use crate::kafka::log;
use crate::kafka::login::{self, Client, Side};
use crate::settings::{Guarantee, Settings};

/// How long a partition's fetcher pauses once enough is prefetched. With librdkafka's default of one second, a fast
/// pipeline has no records most of the time: 131,000 records/s, against 511,000 with this value (benches/RESULTS.md).
pub const FETCH_BACKOFF_MS: &str = "5";

/// Bytes that a prefetched message takes besides its content: librdkafka's operation and message structures, measured
/// as the resident memory of a consumer that is not polled (about 550 bytes, rounded up).
const MESSAGE_OVERHEAD: u64 = 640;

/// Bytes of a message that librdkafka does not count: it limits a queue by the bytes of values alone. Keys and headers
/// are bounded by the number of messages, as long as they take no more than this on average.
const UNCOUNTED: u64 = 20 << 10;

/// How many times its size on the wire a fetch response full of 20-byte messages takes in memory.
const SMALLEST_GROWTH: u64 = MESSAGE_OVERHEAD / 20;

/// librdkafka's default of `message.max.bytes`.
const MESSAGE_MAX_BYTES: u64 = 1_000_000;

/// Limits on the records that librdkafka prefetches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Prefetch {
    /// KiB of values in the queue, over all partitions.
    pub kib: u64,
    /// Messages per partition.
    pub messages: u64,
    /// Bytes of one fetch response. A single larger message is still fetched.
    pub answer: u64,
    /// Bytes of one partition in a fetch response. A single larger message is still fetched.
    pub partition: u64,
}

impl Prefetch {
    /// `share`: bytes of the memory limit for prefetching. `partitions`: number of all input partitions, because one
    /// member may be assigned them all.
    pub fn within(share: u64, partitions: u64) -> Self {
        let partitions = partitions.max(1);
        // A quarter for values, a quarter for keys, headers and overhead, and a quarter for the fetch response that
        // arrives when both are nearly full.
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

/// Returns the consumer group metadata for a transaction; `None` while the consumer is in no group.
pub type Group = Arc<dyn Fn() -> Option<ConsumerGroupMetadata> + Send + Sync>;

/// The command that a group member runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Run,
    /// Drain or replay.
    Drain,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Run => "run",
            Role::Drain => "drain",
        }
    }

    /// The client.id, which the group shows for each member: its role and model digest.
    fn client_id(self, digest: &str) -> String {
        format!("kandle-{}-{digest}", self.name())
    }

    /// Role and model digest in a client.id; `None` if it is not kandle's.
    pub fn of(client_id: &str) -> Option<(Self, &str)> {
        let rest = client_id.strip_prefix("kandle-")?;
        let (role, digest) = rest.split_once('-')?;
        [Role::Run, Role::Drain].into_iter().find(|known| known.name() == role).map(|role| (role, digest))
    }
}

/// A client that looks offsets and records up and joins no group.
pub type Reader = Client<BaseConsumer<ReaderContext>>;

/// Context of a [`Reader`]. It logs errors only for debugging: they are returned to the caller, which reports them.
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

/// A consumer that sees what the settings' group would see, but joins no group and commits nothing.
pub fn reader(settings: &Settings) -> KafkaResult<Reader> {
    reader_with(&config(settings, Role::Drain, "", 1))
}

/// A reader that reads short runs of records, many of them at the end of a log.
pub fn sampler(settings: &Settings) -> KafkaResult<Reader> {
    let mut config = reader_config(&config(settings, Role::Drain, "", 1));
    // The request that finds the end of a log would delay the next run by half a second: a broker answers one at a time.
    config.set("fetch.wait.max.ms", "10");
    login::create(&config, ReaderContext)
}

/// Like [`reader`], with the properties of a group member.
pub fn reader_with(config: &ClientConfig) -> KafkaResult<Reader> {
    login::create(&reader_config(config), ReaderContext)
}

/// A reader that reports an error instead of skipping offsets that do not exist and batches that cannot be read.
pub fn prober(config: &ClientConfig) -> KafkaResult<Reader> {
    let mut config = reader_config(config);
    config.set("auto.offset.reset", "error").set("check.crcs", "true");
    // It reads at a single offset and should learn quickly if nothing is there.
    config.set("fetch.wait.max.ms", "20");
    login::create(&config, ReaderContext)
}

/// A reader that gets the group's committed offsets at once: it waits neither for a rebalance, as a member's requests
/// do, nor for open transactions.
pub fn offset_reader(config: &ClientConfig) -> KafkaResult<Reader> {
    let mut config = reader_config(config);
    config.set("isolation.level", "read_uncommitted");
    login::create(&config, ReaderContext)
}

fn reader_config(config: &ClientConfig) -> ClientConfig {
    let mut config = config.clone();
    // A second client with the same instance id would fence the static member.
    config.remove("group.instance.id");
    config.set("client.id", "kandle").set("statistics.interval.ms", "0");
    config.set("enable.partition.eof", "true");
    // A reader must change nothing on the cluster.
    config.set("allow.auto.create.topics", "false");
    config
}

/// The properties of a group member. `partitions`: number of partitions of all input topics.
pub fn config(settings: &Settings, role: Role, digest: &str, partitions: u64) -> ClientConfig {
    let mut config = ClientConfig::new();
    let prefetch = Prefetch::within(settings.memory.limit.0 / 4, partitions);
    config
        .set("bootstrap.servers", &settings.kafka.brokers)
        .set("client.id", role.client_id(digest))
        .set("group.id", &settings.input.group)
        // Start offsets are resolved before. This applies when retention deletes them meanwhile: reading continues with
        // the earliest record left, whatever `input.start` says.
        .set("auto.offset.reset", "earliest")
        .set("check.crcs", "true")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("statistics.interval.ms", "1000")
        .set("fetch.queue.backoff.ms", FETCH_BACKOFF_MS)
        .set("queued.max.messages.kbytes", prefetch.kib.to_string())
        .set("queued.min.messages", prefetch.messages.to_string())
        .set("fetch.max.bytes", prefetch.answer.to_string())
        // librdkafka refuses a smaller fetch.max.bytes, although this limits only what is produced.
        .set("message.max.bytes", prefetch.answer.min(MESSAGE_MAX_BYTES).to_string())
        .set("fetch.message.max.bytes", prefetch.partition.to_string());
    if settings.delivery.guarantee == Guarantee::ExactlyOnce {
        // Also makes reads of the group's offsets wait for open transactions, so that a partition's next owner starts
        // after the last one's commit.
        config.set("isolation.level", "read_committed");
    }
    let mut own = settings.kafka.properties.iter().chain(&settings.input.properties);
    // With the new protocol (KIP-848) the broker chooses the assignor.
    let new_protocol = |(name, value): (&String, &crate::settings::Scalar)| {
        name == "group.protocol" && value.0.eq_ignore_ascii_case("consumer")
    };
    if !own.any(new_protocol) {
        config.set("partition.assignment.strategy", "cooperative-sticky");
    }
    login::configure(&mut config, settings, Side::Input);
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_memory_limit_makes_a_consumer() {
        let set = [
            "kafka.brokers=b:1",
            "input.topics=i",
            "input.group=g",
            "input.format=text",
            "task.kind=noop",
            "output.topic=o",
            "dead_letters.topic=d",
            "window.max_bytes=1MiB",
            "memory.limit=16MiB",
        ];
        let set = set.iter().map(|s| s.to_string()).collect();
        let sources = crate::settings::Sources { set, ..Default::default() };
        let settings = crate::settings::load(&sources).unwrap().settings;
        reader(&settings).map(drop).unwrap();
    }

    #[test]
    fn prefetched_records_stay_within_their_share() {
        for share in [4 << 20, 64 << 20, 256 << 20, 4u64 << 30] {
            for partitions in [1, 4, 64] {
                let p = Prefetch::within(share, partitions);
                // At the minimum of 16 messages, the share may be exceeded.
                if p.messages > 16 {
                    let most = p.kib * 1024 + p.messages * partitions * UNCOUNTED + p.answer;
                    assert!(most <= share / 4 * 3, "{p:?}");
                }
                assert!(p.answer <= 50 << 20 && p.partition <= p.answer, "{p:?}");
            }
        }
        assert_eq!(Prefetch::within(1 << 40, 1).messages, 100_000, "at most librdkafka's default");
    }
}
