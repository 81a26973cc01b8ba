//! The form of what is published: headers and partition.

use rdkafka::message::{Header, OwnedHeaders};

use crate::record::{Headers, RecordError};
use crate::settings::Partitioning;

/// What every message says of the model.
#[derive(Debug, Clone)]
pub(super) struct Stamp {
    pub model: String,
    /// 16 hex digits.
    pub digest: String,
}

/// The record's own headers, with room for ours.
fn own(headers: Option<&Headers>, more: usize) -> OwnedHeaders {
    match headers {
        Some(headers) => headers.clone(),
        None => OwnedHeaders::new_with_capacity(more),
    }
}

fn add(headers: OwnedHeaders, key: &str, value: &str) -> OwnedHeaders {
    headers.insert(Header { key, value: Some(value) })
}

/// Of a prediction or a tombstone.
pub(super) fn prediction(headers: Option<&Headers>, source: &str, stamp: &Stamp) -> OwnedHeaders {
    let headers = add(own(headers, 3), "kandle-source", source);
    let headers = add(headers, "kandle-model", &stamp.model);
    add(headers, "kandle-model-digest", &stamp.digest)
}

/// Of a dead letter.
pub(super) fn dead_letter(
    headers: Option<&Headers>,
    source: &str,
    error: &RecordError,
    stamp: &Stamp,
) -> OwnedHeaders {
    let headers = add(own(headers, 5), "kandle-source", source);
    let headers = add(headers, "kandle-error", error.fault.name());
    let headers = add(headers, "kandle-error-message", &error.message);
    let headers = add(headers, "kandle-stage", error.fault.stage());
    add(headers, "kandle-model-digest", &stamp.digest)
}

/// Bytes of a batch around its one record: batch header, lengths, attributes.
pub(super) const OVERHEAD: usize = 128;

/// The partition to name; `None` leaves it to the hash of the key (murmur2, as Java's clients).
/// A record without a key keeps its input partition's number, so that its order holds.
pub(super) fn partition(by: Partitioning, key: Option<&[u8]>, source: i32, count: i32) -> Option<i32> {
    match (by, key) {
        (Partitioning::Key, Some(_)) => None,
        (Partitioning::Key, None) | (Partitioning::Source, _) => Some(source % count),
    }
}

/// Headers as name and value, for tests.
#[cfg(test)]
fn listed(headers: &OwnedHeaders) -> Vec<(String, String)> {
    use rdkafka::message::Headers as _;
    headers
        .iter()
        .map(|h| (h.key.to_owned(), String::from_utf8_lossy(h.value.unwrap_or_default()).into_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Fault;

    #[test]
    fn own_headers_come_first_and_all_of_ours_follow() {
        let stamp = Stamp { model: "m@1".to_owned(), digest: "d".to_owned() };
        let own = OwnedHeaders::new().insert(Header { key: "traceparent", value: Some("00-x") });
        let names = |h: &OwnedHeaders| listed(h).into_iter().map(|(k, _)| k).collect::<Vec<_>>();
        let made = prediction(Some(&own), "t/0/1", &stamp);
        assert_eq!(names(&made), ["traceparent", "kandle-source", "kandle-model", "kandle-model-digest"]);
        let error = RecordError::new(Fault::Decode, "bad");
        let made = dead_letter(None, "t/0/1", &error, &stamp);
        assert_eq!(
            names(&made),
            ["kandle-source", "kandle-error", "kandle-error-message", "kandle-stage", "kandle-model-digest"]
        );
        assert_eq!(listed(&made)[1].1, "decode");
    }

    #[test]
    fn partitions() {
        assert_eq!(partition(Partitioning::Key, Some(b"k"), 5, 4), None);
        assert_eq!(partition(Partitioning::Key, None, 5, 4), Some(1));
        assert_eq!(partition(Partitioning::Source, Some(b"k"), 5, 8), Some(5));
    }
}
