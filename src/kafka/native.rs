//! librdkafka functions that the rdkafka crate does not wrap: topic ids, permissions, and errors with their offsets.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::ptr;
use std::time::Duration;

use rdkafka::bindings::{
    rd_kafka_AclOperation_t as RDKafkaAclOperation, rd_kafka_AdminOptions_destroy, rd_kafka_AdminOptions_new,
    rd_kafka_AdminOptions_set_broker, rd_kafka_AdminOptions_set_include_authorized_operations,
    rd_kafka_AdminOptions_set_request_timeout, rd_kafka_DescribeTopics,
    rd_kafka_DescribeTopics_result_topics, rd_kafka_TopicCollection_destroy,
    rd_kafka_TopicCollection_of_topic_names, rd_kafka_TopicDescription_authorized_operations,
    rd_kafka_TopicDescription_error, rd_kafka_TopicDescription_name, rd_kafka_TopicDescription_t,
    rd_kafka_TopicDescription_topic_id, rd_kafka_Uuid_base64str, rd_kafka_Uuid_least_significant_bits,
    rd_kafka_Uuid_most_significant_bits, rd_kafka_consumer_poll, rd_kafka_error_code,
    rd_kafka_event_DescribeTopics_result, rd_kafka_event_destroy, rd_kafka_event_error,
    rd_kafka_message_destroy, rd_kafka_queue_destroy, rd_kafka_queue_new, rd_kafka_queue_poll,
};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::{RDKafkaAdminOp, RDKafkaErrorCode, RDKafkaRespErr};
use serde::{Deserialize, Serialize};

/// A topic's id, as `kafka-topics.sh --describe` shows it. A topic that is deleted and recreated has a new one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TopicId(String);

impl TopicId {
    pub fn new(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Display for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which topic a name refers to now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    Id(TopicId),
    /// No topic has the name.
    Absent,
    /// The broker gives no ids (before Kafka 2.8), or not to this user.
    Unknown,
}

impl Identity {
    pub fn id(&self) -> Option<&TopicId> {
        match self {
            Self::Id(id) => Some(id),
            Self::Absent | Self::Unknown => None,
        }
    }
}

/// Looks up which topics these names refer to now.
///
/// # Errors
/// No broker answers in time.
pub fn identities<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topics: &[String],
    timeout: Duration,
) -> Result<BTreeMap<String, Identity>, KafkaError> {
    describe(client, topics, timeout, false, identity)
}

/// What this user may do with a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    Operations(Vec<RDKafkaAclOperation>),
    /// Not even describe it.
    Nothing,
    /// The broker does not tell (before Kafka 2.3), or the topic does not exist.
    Unknown,
}

/// Asks what this user may do with each topic (KIP-430).
///
/// # Errors
/// No broker answers in time.
pub fn allowed<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    topics: &[String],
    timeout: Duration,
) -> Result<BTreeMap<String, Allowed>, KafkaError> {
    describe(client, topics, timeout, true, operations)
}

/// Describes topics. `read` takes the name and what it needs from each description, which is valid only during the call.
fn describe<C: ConsumerContext, T>(
    client: &BaseConsumer<C>,
    topics: &[String],
    timeout: Duration,
    with_operations: bool,
    read: unsafe fn(*const rd_kafka_TopicDescription_t) -> (String, T),
) -> Result<BTreeMap<String, T>, KafkaError> {
    let names: Vec<CString> = topics.iter().filter_map(|name| CString::new(name.as_str()).ok()).collect();
    if names.is_empty() {
        return Ok(BTreeMap::new());
    }
    // Any broker can describe topics. Unless one is given, librdkafka waits for the controller, which may be
    // unavailable while all topics can be read.
    let metadata = client.fetch_metadata(topics.first().map(String::as_str), timeout)?;
    let numbers = || metadata.brokers().iter().map(|broker| broker.id());
    let broker = numbers().find(|&id| id == metadata.orig_broker_id()).or_else(|| numbers().next());
    let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    let rk = client.client().native_ptr();
    let ms = timeout.as_millis().min(i32::MAX as u128) as i32;
    // SAFETY: the client outlives the call; each object is destroyed once, after its last use; data borrowed from the
    // event is copied before the event is destroyed.
    unsafe {
        let options = rd_kafka_AdminOptions_new(rk, RDKafkaAdminOp::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS);
        rd_kafka_AdminOptions_set_request_timeout(options, ms, ptr::null_mut(), 0);
        rd_kafka_AdminOptions_set_include_authorized_operations(options, i32::from(with_operations));
        if let Some(broker) = broker {
            rd_kafka_AdminOptions_set_broker(options, broker, ptr::null_mut(), 0);
        }
        let collection = rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len());
        let queue = rd_kafka_queue_new(rk);
        rd_kafka_DescribeTopics(rk, collection, options, queue);
        // The request has its own timeout, which also produces an event; wait a little longer than that.
        let event = rd_kafka_queue_poll(queue, ms.saturating_add(1000));
        let found = if event.is_null() {
            Err(RDKafkaErrorCode::OperationTimedOut)
        } else {
            let error = rd_kafka_event_error(event);
            let found = match error {
                RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR => {
                    let mut count = 0;
                    let result = rd_kafka_event_DescribeTopics_result(event);
                    let topics = rd_kafka_DescribeTopics_result_topics(result, &mut count);
                    Ok((0..count).map(|i| read(*topics.add(i))).collect())
                }
                error => Err(error.into()),
            };
            rd_kafka_event_destroy(event);
            found
        };
        rd_kafka_queue_destroy(queue);
        rd_kafka_TopicCollection_destroy(collection);
        rd_kafka_AdminOptions_destroy(options);
        found.map_err(KafkaError::MetadataFetch)
    }
}

/// Name and error of a described topic.
///
/// # Safety
/// `topic` must be valid during the call.
unsafe fn name_and_error(topic: *const rd_kafka_TopicDescription_t) -> (String, RDKafkaRespErr) {
    // SAFETY: the caller guarantees that the topic is valid; everything borrowed lives as long as the topic.
    unsafe {
        let name = CStr::from_ptr(rd_kafka_TopicDescription_name(topic)).to_string_lossy().into_owned();
        let error = rd_kafka_TopicDescription_error(topic);
        let none = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
        (name, if error.is_null() { none } else { rd_kafka_error_code(error) })
    }
}

/// Name of a described topic, and what this user may do with it.
///
/// # Safety
/// `topic` must be valid during the call.
unsafe fn operations(topic: *const rd_kafka_TopicDescription_t) -> (String, Allowed) {
    // SAFETY: the caller guarantees that the topic is valid; the list has `count` values and lives as long as it.
    unsafe {
        let (name, error) = name_and_error(topic);
        let mut count = 0;
        let list = rd_kafka_TopicDescription_authorized_operations(topic, &mut count);
        let allowed = match error {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED => Allowed::Nothing,
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR if !list.is_null() && count > 0 => {
                Allowed::Operations(std::slice::from_raw_parts(list, count).to_vec())
            }
            _ => Allowed::Unknown,
        };
        (name, allowed)
    }
}

/// Name and identity of a described topic.
///
/// # Safety
/// `topic` must be valid during the call.
unsafe fn identity(topic: *const rd_kafka_TopicDescription_t) -> (String, Identity) {
    // SAFETY: the caller guarantees that the topic is valid; everything borrowed lives as long as the topic.
    unsafe {
        let (name, code) = name_and_error(topic);
        let id = rd_kafka_TopicDescription_topic_id(topic);
        let none = id.is_null()
            || (rd_kafka_Uuid_most_significant_bits(id) == 0
                && rd_kafka_Uuid_least_significant_bits(id) == 0);
        let identity = match code {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART => Identity::Absent,
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR if !none => {
                Identity::Id(TopicId::new(&CStr::from_ptr(rd_kafka_Uuid_base64str(id)).to_string_lossy()))
            }
            _ => Identity::Unknown,
        };
        (name, identity)
    }
}

/// What a consumer receives first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum First {
    /// A record at this offset.
    Record(i64),
    /// The end of the partition.
    End,
    /// A batch that begins at this offset and cannot be read.
    Damaged(i64),
    /// Nothing before the timeout.
    TimedOut,
    Error(RDKafkaErrorCode),
}

/// Waits for what a consumer receives first. The consumer must be assigned one partition manually, with
/// `enable.partition.eof` and `check.crcs` set.
pub fn first<C: ConsumerContext>(consumer: &BaseConsumer<C>, timeout: Duration) -> First {
    let ms = timeout.as_millis().min(i32::MAX as u128) as i32;
    // SAFETY: the consumer is alive, and the message is destroyed once, after its last use.
    unsafe {
        let message = rd_kafka_consumer_poll(consumer.client().native_ptr(), ms);
        if message.is_null() {
            return First::TimedOut;
        }
        let (error, offset) = ((*message).err, (*message).offset);
        rd_kafka_message_destroy(message);
        match error {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR => First::Record(offset),
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__PARTITION_EOF => First::End,
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__BAD_MSG => First::Damaged(offset),
            error => First::Error(error.into()),
        }
    }
}
