//! Builds the Kafka message for a record: topic, partition, key, headers, timestamp.

use std::fmt::Write;

use rdkafka::message::OwnedHeaders;

use super::window::{DeadLetterForm, InFlightWindow};
use crate::flow::{ModelVersion, Outcome};
use crate::kafka::headers::{self, Headers};
use crate::kafka::record_size;
use crate::record::{Partition, RecordError};
use crate::settings::{OutputTimestamp, Partitioning, Settings};

/// The topic that a message goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Output,
    DeadLetters,
    Samples,
}

impl Target {
    /// Where a record with this outcome goes.
    pub fn of(outcome: &Outcome) -> Self {
        if matches!(outcome, Outcome::Dead(_)) { Self::DeadLetters } else { Self::Output }
    }

    pub fn topic(self, settings: &Settings) -> &str {
        match self {
            Self::Output => &settings.output.topic,
            Self::DeadLetters => &settings.dead_letters.topic,
            // Only messages for it have this target.
            Self::Samples => settings.samples.topic.as_deref().unwrap_or_default(),
        }
    }
}

/// A message, ready to be sent.
pub(super) struct Composed<'a> {
    pub target: Target,
    pub key: Option<&'a [u8]>,
    pub value: Option<&'a [u8]>,
    pub headers: OwnedHeaders,
    /// Milliseconds since the Unix epoch; `None`: the time of sending.
    pub timestamp: Option<i64>,
    /// Partition number of the input record.
    pub source_partition: i32,
}

impl Composed<'_> {
    /// Bytes of an uncompressed batch that holds only this message.
    pub fn batch_bytes(&self) -> u64 {
        record_size::alone(self.key.map(<[u8]>::len), self.value.map(<[u8]>::len), &self.headers)
    }
}

/// Builds messages according to the settings.
pub(super) struct Composer {
    pub partitioning: Partitioning,
    timestamps: OutputTimestamp,
    source: SourceText,
}

impl Composer {
    pub fn new(settings: &Settings) -> Self {
        Self {
            partitioning: settings.output.partition,
            timestamps: settings.output.timestamp,
            source: SourceText::default(),
        }
    }

    /// Builds the message of the sample of the record at `place`.
    pub fn sample<'a>(
        &'a mut self,
        window: &'a InFlightWindow,
        place: usize,
        value: &'a [u8],
    ) -> Composed<'a> {
        let content = &window.content.window;
        let record = &content.records[place];
        let (partition, offset) = content.origin(record);
        let source = self.source.at(partition, offset);
        let headers = headers::with(OwnedHeaders::new_with_capacity(2), headers::SOURCE, source);
        Composed {
            target: Target::Samples,
            key: content.key(record),
            value: Some(value),
            headers: headers::with(headers, headers::MODEL_DIGEST, &window.content.model.digest),
            timestamp: self.timestamps.of(record.timestamp),
            source_partition: partition.number,
        }
    }

    /// Builds the message for the record at `place`: a prediction, a tombstone or a dead letter.
    pub fn compose<'a>(&'a mut self, window: &'a InFlightWindow, place: usize) -> Composed<'a> {
        let content = &window.content;
        let record = &content.window.records[place];
        let (partition, offset) = content.window.origin(record);
        let source = self.source.at(partition, offset);
        let (key, own) = (content.window.key(record), record.headers.as_ref());
        match &content.outcomes[place] {
            Outcome::Dead(error) => {
                let form = window.forms.get(&place).copied().unwrap_or_default();
                let mut headers =
                    dead_letter(if form.bare { None } else { own }, source, error, &content.model);
                if let (true, Some(timestamp)) = (form.now, record.timestamp) {
                    headers = headers::with(headers, headers::TIMESTAMP, &timestamp.to_string());
                }
                Composed {
                    target: Target::DeadLetters,
                    key: match form {
                        DeadLetterForm { keyed: true, .. } => Some(source.as_bytes()),
                        DeadLetterForm { bare: true, .. } => None,
                        _ => key,
                    },
                    value: if form.bare { None } else { content.window.value(record) },
                    headers,
                    timestamp: if form.now { None } else { record.timestamp },
                    source_partition: partition.number,
                }
            }
            outcome => Composed {
                target: Target::Output,
                key,
                value: match outcome {
                    Outcome::Prediction { part, bytes } => Some(content.prediction(*part, bytes)),
                    Outcome::Unchanged => content.window.value(record),
                    Outcome::Tombstone | Outcome::Dead(_) => None,
                },
                headers: prediction(own, matches!(outcome, Outcome::Unchanged), source, &content.model),
                timestamp: self.timestamps.of(record.timestamp),
                source_partition: partition.number,
            },
        }
    }
}

/// The partition to send to; `None`: librdkafka hashes the key (murmur2, like the Java client).
/// A record without a key keeps its input partition's number (modulo `count`), so that order is preserved.
pub(super) fn partition(by: Partitioning, key: Option<&[u8]>, source: i32, count: i32) -> Option<i32> {
    match (by, key) {
        (Partitioning::Key, Some(_)) => None,
        (Partitioning::Key, None) | (Partitioning::Source, _) => Some(source % count.max(1)),
    }
}

/// A copy of the record's own headers; without any, an empty list with capacity for `more` headers.
fn own(headers: Option<&Headers>, more: usize) -> OwnedHeaders {
    match headers {
        Some(headers) => headers.copy(),
        None => OwnedHeaders::new_with_capacity(more),
    }
}

/// Headers of a prediction or a tombstone. If the input is another job's predictions, that job's headers are removed. So
/// is the id of the record's schema, unless the prediction is the value, `unchanged`: readers would take it for the
/// prediction's.
fn prediction(headers: Option<&Headers>, unchanged: bool, source: &str, by: &ModelVersion) -> OwnedHeaders {
    let own = match headers {
        Some(headers) => {
            let own = headers::without(headers.copy(), &headers::OF_PREDICTIONS);
            if unchanged { own } else { headers::without(own, &[headers::VALUE_SCHEMA_ID]) }
        }
        None => OwnedHeaders::new_with_capacity(headers::OF_PREDICTIONS.len()),
    };
    let headers = headers::with(own, headers::SOURCE, source);
    let headers = headers::with(headers, headers::MODEL, &by.model);
    headers::with(headers, headers::MODEL_DIGEST, &by.digest)
}

/// Headers of a dead letter. The record's own headers stay unchanged, so that it can be reprocessed.
fn dead_letter(
    headers: Option<&Headers>,
    source: &str,
    error: &RecordError,
    by: &ModelVersion,
) -> OwnedHeaders {
    let headers = headers::with(own(headers, headers::OF_DEAD_LETTERS.len()), headers::SOURCE, source);
    let headers = headers::with(headers, headers::ERROR, error.fault.name());
    let headers = headers::with(headers, headers::ERROR_MESSAGE, &error.message);
    let headers = headers::with(headers, headers::STAGE, error.fault.stage());
    headers::with(headers, headers::MODEL_DIGEST, &by.digest)
}

/// Formats `topic/partition/offset`. Keeps the text up to the offset, as mostly only the offset changes.
#[derive(Default)]
struct SourceText {
    text: String,
    /// The partition of the last text, and the length in bytes of the part before the offset.
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

#[cfg(test)]
mod tests {
    use rdkafka::message::{Header, Headers as _};

    use super::*;
    use crate::record::Fault;

    /// Headers as name and value.
    fn listed(headers: &OwnedHeaders) -> Vec<(String, String)> {
        let text = |value: Option<&[u8]>| String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
        headers.iter().map(|h| (h.key.to_owned(), text(h.value))).collect()
    }

    fn names(headers: &OwnedHeaders) -> Vec<String> {
        listed(headers).into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn own_headers_come_first_and_kandles_headers_follow() {
        let version = ModelVersion { model: "m@1".to_owned(), digest: "d".to_owned() };
        let own = OwnedHeaders::new().insert(Header { key: "traceparent", value: Some("00-x") });
        let made = prediction(Some(&own.into()), false, "t/0/1", &version);
        assert_eq!(names(&made), ["traceparent", "kandle-source", "kandle-model", "kandle-model-digest"]);
        let error = RecordError::new(Fault::Decode, "bad");
        let made = dead_letter(None, "t/0/1", &error, &version);
        assert_eq!(
            names(&made),
            ["kandle-source", "kandle-error", "kandle-error-message", "kandle-stage", "kandle-model-digest"]
        );
        assert_eq!(listed(&made)[1].1, "decode");
    }

    #[test]
    fn predictions_of_predictions_carry_the_last_jobs_headers() {
        let version = ModelVersion { model: "m@1".to_owned(), digest: "d".to_owned() };
        let first = prediction(None, false, "a/0/1", &version).into();
        let second = prediction(Some(&first), false, "b/0/7", &version);
        assert_eq!(names(&second), ["kandle-source", "kandle-model", "kandle-model-digest"]);
        assert_eq!(listed(&second)[0].1, "b/0/7");
        // A dead letter keeps all headers of its record.
        let letter = dead_letter(Some(&first), "b/0/7", &RecordError::new(Fault::Decode, "bad"), &version);
        assert_eq!(listed(&letter)[0].1, "a/0/1");
    }

    #[test]
    fn only_an_unchanged_value_keeps_the_id_of_its_schema() {
        let version = ModelVersion { model: "m@1".to_owned(), digest: "d".to_owned() };
        let headers = ["__key_schema_id", "__value_schema_id"]
            .into_iter()
            .fold(OwnedHeaders::new(), |all, key| all.insert(Header { key, value: Some("x") }));
        let own = headers.into();
        let has = |made: &OwnedHeaders| names(made).contains(&"__value_schema_id".to_owned());
        let changed = prediction(Some(&own), false, "t/0/1", &version);
        assert!(!has(&changed) && names(&changed)[0] == "__key_schema_id", "the key is the record's");
        assert!(has(&prediction(Some(&own), true, "t/0/1", &version)));
        assert!(has(&dead_letter(Some(&own), "t/0/1", &RecordError::new(Fault::Decode, "bad"), &version)));
    }

    #[test]
    fn partitions() {
        assert_eq!(partition(Partitioning::Key, Some(b"k"), 5, 4), None);
        assert_eq!(partition(Partitioning::Key, None, 5, 4), Some(1));
        assert_eq!(partition(Partitioning::Source, Some(b"k"), 5, 8), Some(5));
    }
}
