//! The permissions (ACLs) that kandle needs, in one table, and how `check` finds out which are missing. The requests
//! change nothing on the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::bindings::rd_kafka_AclOperation_t as AclOperation;
use rdkafka::consumer::{CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, DefaultProducerContext, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

use super::consumer::reader_with;
use super::login::{self, Client, Side};
use super::native::{self, Allowed};
use super::topics::TopicFilter;
use crate::settings::{Guarantee, Settings};

/// What a permission is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    Topic(String),
    Group(String),
    TransactionalId(String),
}

/// Read and Write include Describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    DescribeConfigs,
}

/// A permission that kandle uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permission {
    pub operation: Operation,
    pub resource: Resource,
    /// What is lost without it; `None`: kandle does not work without it.
    pub optional: Option<&'static str>,
}

/// Whether this user has a permission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    Yes,
    No,
    /// Why it cannot be known.
    Unknown(String),
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, name) = self.resource.parts();
        write!(f, "{} on {kind} {name}", self.operation.name())
    }
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "Read",
            Self::Write => "Write",
            Self::DescribeConfigs => "DescribeConfigs",
        }
    }

    fn code(self) -> AclOperation {
        match self {
            Self::Read => AclOperation::RD_KAFKA_ACL_OPERATION_READ,
            Self::Write => AclOperation::RD_KAFKA_ACL_OPERATION_WRITE,
            Self::DescribeConfigs => AclOperation::RD_KAFKA_ACL_OPERATION_DESCRIBE_CONFIGS,
        }
    }
}

impl Resource {
    /// Its kind as the option of kafka-acls.sh says it, and its name.
    fn parts(&self) -> (&'static str, &str) {
        match self {
            Self::Topic(name) => ("topic", name),
            Self::Group(name) => ("group", name),
            Self::TransactionalId(name) => ("transactional-id", name),
        }
    }

    fn topic(&self) -> Option<&String> {
        match self {
            Self::Topic(name) => Some(name),
            Self::Group(_) | Self::TransactionalId(_) => None,
        }
    }
}

impl Permission {
    fn new(operation: Operation, resource: Resource) -> Self {
        Self { operation, resource, optional: None }
    }

    /// The command that grants it.
    pub fn grant(&self, brokers: &str) -> String {
        let (kind, name) = self.resource.parts();
        format!(
            "kafka-acls.sh --bootstrap-server {brokers} --add --allow-principal User:NAME --operation {} --{kind} {name}",
            self.operation.name()
        )
    }
}

/// What `run` and `drain` need. Topics that a pattern matches are not listed: they change. `transactional_id`: the one
/// that this process would take.
pub fn needed(settings: &Settings, transactional_id: &str) -> Vec<Permission> {
    let topic = |name: &String| Resource::Topic(name.clone());
    let mut all: Vec<Permission> =
        named_inputs(settings).map(|t| Permission::new(Operation::Read, topic(t))).collect();
    all.push(Permission::new(Operation::Read, Resource::Group(settings.input.group.clone())));
    let optional = settings.samples.topic.iter().chain(&settings.shadow.topic);
    let written = [&settings.output.topic, &settings.dead_letters.topic].into_iter().chain(optional);
    all.extend(written.clone().map(|t| Permission::new(Operation::Write, topic(t))));
    if settings.delivery.guarantee == Guarantee::ExactlyOnce {
        let id = Resource::TransactionalId(transactional_id.to_owned());
        all.push(Permission::new(Operation::Write, id));
    }
    all.extend(written.map(|t| Permission {
        optional: Some(
            "which records the topic refuses is found out only when the broker refuses them, and retention is not \
             checked",
        ),
        ..Permission::new(Operation::DescribeConfigs, topic(t))
    }));
    all
}

/// What `reference` needs, which reads the predictions in `output`.
pub fn needed_by_reference(output: &str) -> Vec<Permission> {
    vec![Permission::new(Operation::Read, Resource::Topic(output.to_owned()))]
}

/// What `audit` needs, which reads the predictions in `output` and the dead letters too.
pub fn needed_by_audit(settings: &Settings, output: &str) -> Vec<Permission> {
    let read = |topic: &str| Permission::new(Operation::Read, Resource::Topic(topic.to_owned()));
    let mut all: Vec<Permission> = named_inputs(settings).map(|topic| read(topic)).collect();
    all.push(Permission::new(Operation::Read, Resource::Group(settings.input.group.clone())));
    all.extend([output, &settings.dead_letters.topic].map(read));
    all
}

/// What `compare` needs, which reads the predictions in two topics, and with `bounded` asks the input topics for the offsets
/// of the bounds.
pub fn needed_by_compare(settings: &Settings, topics: [&str; 2], bounded: bool) -> Vec<Permission> {
    let read = |topic: &str| Permission::new(Operation::Read, Resource::Topic(topic.to_owned()));
    let input = named_inputs(settings).filter(|_| bounded).map(|topic| read(topic));
    topics.into_iter().map(read).chain(input).collect()
}

/// The properties of kandle's consumer and producer, who may be different users, for [`probe`].
pub fn clients(settings: &Settings) -> (ClientConfig, ClientConfig) {
    let base = |side| {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &settings.kafka.brokers);
        login::configure(&mut config, settings, side);
        config
    };
    let (mut input, output) = (base(Side::Input), base(Side::Output));
    input.set("group.id", &settings.input.group).set("enable.auto.commit", "false");
    (input, output)
}

fn named_inputs(settings: &Settings) -> impl Iterator<Item = &String> {
    settings.input.topics.iter().filter(|topic| !TopicFilter::is_pattern(topic))
}

/// Finds out which of the permissions this user has. `input` and `output`: the properties of kandle's consumer and
/// producer.
pub fn probe(
    settings: &Settings,
    needed: &[Permission],
    (input, output): (&ClientConfig, &ClientConfig),
    timeout: Duration,
) -> Vec<Held> {
    // The consumer and the producer may be different users.
    let reads = |permission: &Permission| permission.operation == Operation::Read;
    let ask = |config: &ClientConfig, of_consumer: bool| {
        let of_side = needed.iter().filter(|permission| reads(permission) == of_consumer);
        let names: BTreeSet<&String> = of_side.filter_map(|permission| permission.resource.topic()).collect();
        let names: Vec<String> = names.into_iter().cloned().collect();
        if names.is_empty() {
            return Ok(BTreeMap::new());
        }
        let asked = reader_with(config).and_then(|client| native::allowed(&client, &names, timeout));
        asked.map_err(|error| error.to_string())
    };
    let (of_consumer, of_producer) = (ask(input, true), ask(output, false));
    let held = |permission: &Permission| match &permission.resource {
        Resource::Topic(name) => match if reads(permission) { &of_consumer } else { &of_producer } {
            Err(error) => Held::Unknown(error.clone()),
            Ok(topics) => match topics.get(name) {
                Some(Allowed::Operations(all)) if all.contains(&permission.operation.code()) => Held::Yes,
                Some(Allowed::Operations(_) | Allowed::Nothing) => Held::No,
                Some(Allowed::Unknown) => Held::Unknown("the brokers do not tell".to_owned()),
                None => Held::Unknown("the brokers do not name the topic".to_owned()),
            },
        },
        Resource::Group(_) => group(settings, input, timeout),
        Resource::TransactionalId(id) => transactional_id(id, output, timeout),
    };
    needed.iter().map(held).collect()
}

/// How long to wait for an event of the client, and how many to look at.
const EVENT_WAIT: Duration = Duration::from_millis(100);
const MOST_EVENTS: usize = 20;

/// A partition that no topic has.
const NO_PARTITION: i32 = i32::MAX - 1;

/// Commits an offset of a partition that does not exist: the broker checks the permission first.
fn group(settings: &Settings, config: &ClientConfig, timeout: Duration) -> Held {
    use RDKafkaErrorCode::{GroupAuthorizationFailed, UnknownPartition, UnknownTopicOrPartition};
    let Some(topic) = named_inputs(settings).next() else {
        return Held::Unknown("input.topics is a pattern".to_owned());
    };
    let client = match reader_with(config) {
        Ok(client) => client,
        Err(error) => return Held::Unknown(error.to_string()),
    };
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, 0);
    // A user without any permission on the group gets no coordinator. The commit below would wait for one for longer.
    let asked = super::cluster::committed(&client, &list, timeout).and_then(|_| {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(topic, NO_PARTITION, Offset::Offset(0))?;
        client.commit(&list, CommitMode::Sync)
    });
    let Err(error) = asked else { return Held::Yes };
    // The refusal of a coordinator is an event; the call itself only times out.
    let mut events = std::iter::from_fn(|| client.poll(EVENT_WAIT)).take(MOST_EVENTS);
    let refused = |error: &KafkaError| error.rdkafka_error_code() == Some(GroupAuthorizationFailed);
    match error.rdkafka_error_code() {
        Some(UnknownTopicOrPartition | UnknownPartition) => Held::Yes,
        _ if refused(&error) || events.any(|event| event.is_err_and(|e| refused(&e))) => Held::No,
        _ => Held::Unknown(error.to_string()),
    }
}

/// Longer than brokers allow (`transaction.max.timeout.ms`).
const LONGEST_TRANSACTION_MS: &str = "2147483647";

/// Initializes transactions with a timeout that the broker refuses: it checks the permission first, and neither fences
/// a producer with this id nor remembers it.
fn transactional_id(id: &str, config: &ClientConfig, timeout: Duration) -> Held {
    use RDKafkaErrorCode::{InvalidTransactionTimeout, TransactionalIdAuthorizationFailed};
    let mut config = config.clone();
    config.set("transactional.id", id).set("transaction.timeout.ms", LONGEST_TRANSACTION_MS);
    let producer: Client<BaseProducer> = match login::create(&config, DefaultProducerContext) {
        Ok(producer) => producer,
        Err(error) => return Held::Unknown(error.to_string()),
    };
    let Err(error) = producer.init_transactions(timeout) else { return Held::Yes };
    let fatal = producer.client().fatal_error().map(|(code, _)| code);
    match fatal.or(error.rdkafka_error_code()) {
        Some(InvalidTransactionTimeout) => Held::Yes,
        Some(TransactionalIdAuthorizationFailed) => Held::No,
        _ => Held::Unknown(error.to_string()),
    }
}
