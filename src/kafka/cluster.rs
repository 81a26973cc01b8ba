//! Checks of the cluster before anything is consumed: whether brokers answer and the topics exist.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::client::ClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaErrorCode;

use super::login::{self, Client, Side};
use super::topic_rules::TopicRules;
use super::topics::TopicFilter;
use crate::backoff::{Backoff, pause};
use crate::settings::Settings;
use crate::telemetry::{Health, Metrics};

/// Timeout of one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for another error of the client, and how many to look at, when it could not reach the brokers.
const ERROR_WAIT: Duration = Duration::from_millis(100);
const MOST_ERRORS: usize = 20;
/// First and longest wait between attempts; it doubles each time.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));

/// Once the wait has grown to this, a topic that the broker creates on demand exists.
const AUTO_CREATE_WAIT: Duration = Duration::from_secs(2);

/// A topic that kandle writes to.
#[derive(Debug, Clone, Default)]
pub struct OutputTopic {
    pub partitions: i32,
    pub rules: TopicRules,
}

#[derive(Debug, Clone)]
pub struct Topics {
    /// Number of partitions of all input topics together.
    pub input_partitions: u64,
    pub output: OutputTopic,
    pub dead_letters: OutputTopic,
    /// Set if `samples.topic` is.
    pub samples: Option<OutputTopic>,
}

/// Why the configuration of a topic or of a broker cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    #[error("{0}")]
    Resource(#[from] RDKafkaErrorCode),
    #[error(transparent)]
    Runtime(#[from] std::io::Error),
    #[error("the cluster's answer is empty")]
    NoAnswer,
    /// This user may not see the setting.
    #[error("the broker does not show {0} to this user")]
    NotShown(String),
}

/// Why the cluster cannot be used now.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("kafka.brokers {brokers}: cannot be reached: {reason}")]
    Unreachable { brokers: String, reason: String },
    #[error(
        "{key}: topic {topic} does not exist; create it, for instance: kafka-topics.sh --bootstrap-server {brokers} --create --topic {topic} --partitions 4"
    )]
    Missing { key: &'static str, topic: String, brokers: String },
    #[error("{key}: topic {topic}: {reason}")]
    Topic { key: &'static str, topic: String, reason: String },
}

/// Remembers the client's last error, because metadata calls themselves only report "timed out".
#[derive(Debug, Default)]
pub struct LastClientError(Mutex<Option<String>>);

impl ClientContext for LastClientError {
    fn error(&self, error: KafkaError, reason: &str) {
        // It follows the errors that say why.
        let is_summary = error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown);
        if !is_summary || self.last().is_none() {
            self.keep(reason);
        }
    }

    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, _: &str, message: &str) {
        if (level as i32) <= rdkafka::config::RDKafkaLogLevel::Error as i32 {
            self.keep(message);
        }
    }
}

impl ConsumerContext for LastClientError {}

impl LastClientError {
    fn keep(&self, reason: &str) {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = Some(reason.to_owned());
    }

    fn last(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

/// Clients that ask the cluster for metadata and configuration and consume nothing.
pub struct Cluster<'a> {
    settings: &'a Settings,
    /// Client whose requests change nothing on the cluster.
    client: Client<BaseConsumer<LastClientError>>,
    /// Client whose metadata requests make a broker create a missing topic, if it creates topics on demand.
    creator: Option<Client<BaseConsumer<LastClientError>>>,
    admin: Client<AdminClient<LastClientError>>,
}

impl<'a> Cluster<'a> {
    /// Creates the clients. None of their requests changes anything on the cluster.
    pub fn connect(settings: &'a Settings) -> Result<Self, KafkaError> {
        let mut config = Self::config(settings);
        let admin = login::create(&config, LastClientError::default())?;
        config.set("allow.auto.create.topics", "false");
        let client = login::create(&config, LastClientError::default())?;
        Ok(Self { settings, client, creator: None, admin })
    }

    /// Like [`Self::connect`], but brokers that create topics on demand create a missing output or dead-letter topic.
    /// Input topics are never created: with a mistyped name, kandle would wait for records without any error.
    fn connect_and_create(settings: &'a Settings) -> Result<Self, KafkaError> {
        let mut config = Self::config(settings);
        config.set("allow.auto.create.topics", "true");
        let creator = Some(login::create(&config, LastClientError::default())?);
        Ok(Self { creator, ..Self::connect(settings)? })
    }

    fn config(settings: &Settings) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &settings.kafka.brokers).set("client.id", "kandle");
        login::configure(&mut config, settings, Side::Both);
        config
    }

    pub fn client(&self) -> &BaseConsumer<LastClientError> {
        &self.client
    }

    /// Asks a broker for the number of brokers.
    pub fn reach(&self) -> Result<usize, ClusterError> {
        // Any metadata will do; asking for one topic keeps the answer short.
        let topic = self.settings.output.topic.as_str();
        match self.client.fetch_metadata(Some(topic), REQUEST_TIMEOUT) {
            Ok(metadata) => Ok(metadata.brokers().len()),
            Err(error) => Err(self.unreachable(&error)),
        }
    }

    fn unreachable(&self, error: &KafkaError) -> ClusterError {
        // The client passes errors to its context only while it is polled. More than one event may be queued.
        for _ in 0..MOST_ERRORS {
            if self.client.poll(ERROR_WAIT).is_none() {
                break;
            }
        }
        let reason = self.client.context().last().unwrap_or_else(|| error.to_string());
        ClusterError::Unreachable { brokers: self.settings.kafka.brokers.clone(), reason }
    }

    /// Number of partitions of a topic. `key` is the setting that names the topic, for the error text.
    pub fn partitions(&self, key: &'static str, topic: &str) -> Result<i32, ClusterError> {
        self.partitions_by(&self.client, key, topic)
    }

    fn partitions_by(
        &self,
        client: &BaseConsumer<LastClientError>,
        key: &'static str,
        topic: &str,
    ) -> Result<i32, ClusterError> {
        let metadata =
            client.fetch_metadata(Some(topic), REQUEST_TIMEOUT).map_err(|e| self.unreachable(&e))?;
        let found = metadata.topics().iter().find(|t| t.name() == topic);
        let error = found.and_then(|t| t.error()).map(RDKafkaErrorCode::from);
        match (found, error) {
            (Some(found), None) if !found.partitions().is_empty() => Ok(found.partitions().len() as i32),
            (_, Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) | None) => {
                Err(ClusterError::Missing {
                    key,
                    topic: topic.to_owned(),
                    brokers: self.settings.kafka.brokers.clone(),
                })
            }
            (_, Some(code)) => {
                Err(ClusterError::Topic { key, topic: topic.to_owned(), reason: code.to_string() })
            }
        }
    }

    /// Number of partitions of all topics that match a pattern now; 0 if none matches.
    fn matching(&self, pattern: &str) -> Result<u64, ClusterError> {
        let metadata = self.client.fetch_metadata(None, REQUEST_TIMEOUT).map_err(|e| self.unreachable(&e))?;
        // The rules of the settings have checked the pattern.
        let Ok(filter) = TopicFilter::new(&[pattern]) else { return Ok(0) };
        let matching = metadata.topics().iter().filter(|topic| filter.holds(topic.name()));
        Ok(matching.map(|topic| topic.partitions().len() as u64).sum())
    }

    /// Reads from a topic's configuration which records it refuses.
    ///
    /// # Errors
    /// The cluster does not answer, or this user may not see the topic's configuration.
    pub fn rules(&self, topic: &str) -> Result<TopicRules, ConfigurationError> {
        Ok(TopicRules::of(&self.configuration(ResourceSpecifier::Topic(topic))?))
    }

    /// A numeric setting of the first broker; all brokers of a cluster should agree on it.
    pub fn broker_setting(&self, name: &str) -> Result<u64, ConfigurationError> {
        let topic = self.settings.output.topic.as_str();
        let metadata = self.client.fetch_metadata(Some(topic), REQUEST_TIMEOUT)?;
        let broker = metadata.brokers().first().ok_or(ConfigurationError::NoAnswer)?.id();
        let configuration = self.configuration(ResourceSpecifier::Broker(broker))?;
        let value = configuration.get(name).and_then(|value| value.parse().ok());
        value.ok_or_else(|| ConfigurationError::NotShown(name.to_owned()))
    }

    /// Reads a configuration, name to value. Entries without a value are left out.
    fn configuration(
        &self,
        of: ResourceSpecifier<'_>,
    ) -> Result<HashMap<String, String>, ConfigurationError> {
        let options = AdminOptions::new().request_timeout(Some(REQUEST_TIMEOUT));
        let resources = [of];
        let asked = self.admin.describe_configs(&resources, &options);
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let resources = runtime.block_on(asked)?;
        let resource = resources.into_iter().next().ok_or(ConfigurationError::NoAnswer)??;
        let entries = resource.entries.into_iter();
        Ok(entries.filter_map(|entry| Some((entry.name, entry.value?))).collect())
    }

    /// Checks the topics of the settings.
    ///
    /// # Errors
    /// All problems with the topics, not just the first.
    pub fn topics(&self) -> Result<Topics, Vec<ClusterError>> {
        let mut problems = Vec::new();
        let mut input_partitions = 0;
        for topic in &self.settings.input.topics {
            let found = match TopicFilter::is_pattern(topic) {
                false => self.partitions("input.topics", topic).map(|count| count as u64),
                true => self.matching(topic),
            };
            match found {
                Ok(count) => input_partitions += count,
                Err(problem) => problems.push(problem),
            }
        }
        let mut written = |key, topic: &str| {
            let client = self.creator.as_ref().unwrap_or(&self.client);
            let partitions =
                self.partitions_by(client, key, topic).map_err(|e| problems.push(e)).unwrap_or(0);
            let rules = self.rules(topic).unwrap_or_else(|reason| {
                tracing::info!(
                    topic,
                    %reason,
                    "the topic's configuration cannot be read: refused records are found only when the broker refuses them"
                );
                TopicRules::default()
            });
            OutputTopic { partitions, rules }
        };
        let topics = Topics {
            input_partitions,
            output: written("output.topic", &self.settings.output.topic),
            dead_letters: written("dead_letters.topic", &self.settings.dead_letters.topic),
            samples: self.settings.samples.topic.as_ref().map(|topic| written("samples.topic", topic)),
        };
        if problems.is_empty() { Ok(topics) } else { Err(problems) }
    }

    /// Checks the shadow's topic for a batch job, which predicts the same each time. A daemon goes on without it.
    fn shadow(&self, missing: Missing) -> Result<(), Vec<ClusterError>> {
        let Some(topic) = self.settings.shadow.topic.as_ref().filter(|_| missing == Missing::Fail) else {
            return Ok(());
        };
        let client = self.creator.as_ref().unwrap_or(&self.client);
        self.partitions_by(client, "shadow.topic", topic).map(drop).map_err(|problem| vec![problem])
    }
}

/// A member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub client_id: String,
    pub host: String,
}

impl Cluster<'_> {
    /// The group's live members. The client cannot list members of groups with the new protocol (KIP-848).
    pub fn members(&self, group: &str) -> Result<Vec<Member>, KafkaError> {
        let list = self.client.fetch_group_list(Some(group), REQUEST_TIMEOUT)?;
        let members = list.groups().iter().flat_map(|group| group.members());
        let member = |m: &rdkafka::groups::GroupMemberInfo| Member {
            client_id: m.client_id().to_owned(),
            host: m.client_host().trim_start_matches('/').to_owned(),
        };
        Ok(members.map(member).collect())
    }
}

/// The group's committed offsets. Retries for `within` while the group's coordinator is starting or moving.
pub fn committed<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    partitions: &TopicPartitionList,
    within: Duration,
) -> Result<TopicPartitionList, KafkaError> {
    use RDKafkaErrorCode::{CoordinatorLoadInProgress, CoordinatorNotAvailable, NotCoordinator};
    let deadline = Instant::now() + within;
    loop {
        let error = match consumer.committed_offsets(partitions.clone(), within) {
            Ok(offsets) => return Ok(offsets),
            Err(error) => error,
        };
        let passing = [CoordinatorLoadInProgress, CoordinatorNotAvailable, NotCoordinator];
        if !error.rdkafka_error_code().is_some_and(|code| passing.contains(&code))
            || Instant::now() >= deadline
        {
            return Err(error);
        }
        std::thread::park_timeout(Duration::from_millis(100));
    }
}

/// What to do about a topic that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Wait for someone to create it (daemon).
    Wait,
    /// Fail (batch job).
    Fail,
}

/// Why waiting for the cluster is pointless.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    #[error(transparent)]
    Client(#[from] KafkaError),
    #[error("{0}")]
    Missing(String),
}

/// Waits until the brokers answer and the topics exist; logs what it waits for. Returns `None` if asked to stop.
pub fn wait(
    settings: &Settings,
    metrics: &Metrics,
    health: &Health,
    stop: &AtomicBool,
    missing: Missing,
) -> Result<Option<Topics>, WaitError> {
    let cluster = Cluster::connect_and_create(settings)?;
    let mut backoff = Backoff::new(BACKOFF);
    loop {
        let problems = match cluster.reach() {
            Ok(_) => match cluster.shadow(missing).and_then(|()| cluster.topics()) {
                Ok(topics) => return Ok(Some(topics)),
                Err(problems) => problems,
            },
            Err(problem) => vec![problem],
        };
        let (gone, problems): (Vec<_>, Vec<_>) = problems
            .into_iter()
            .partition(|problem| missing == Missing::Fail && matches!(problem, ClusterError::Missing { .. }));
        // A broker that creates topics on demand at first answers that the topic does not exist.
        if let Some(problem) = gone.first()
            && backoff.delay() >= AUTO_CREATE_WAIT
        {
            return Err(WaitError::Missing(problem.to_string()));
        }
        for problem in problems.iter().chain(&gone) {
            let retry_in = humantime::format_duration(backoff.delay());
            tracing::error!(error = %problem, %retry_in, "the cluster is not ready: trying again");
            health.error(&problem.to_string());
        }
        metrics.retries.with_label_values(&["topics"]).inc();
        if !pause(backoff.take(), || !stop.load(Ordering::Relaxed)) {
            return Ok(None);
        }
    }
}
