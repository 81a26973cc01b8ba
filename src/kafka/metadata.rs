//! The commit metadata that the group stores with each offset: the topic's id, the model that processed the records
//! before the offset, and the suspects: records after it on which inference timed out.

use std::collections::BTreeSet;

use rdkafka::error::KafkaResult;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};

use super::native::TopicId;
use crate::record::Partition;

/// Most bytes of the list of suspects; Kafka accepts 4,096 bytes of metadata (`offset.metadata.max.bytes`).
const MAX_SUSPECTS_BYTES: usize = 3000;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// The model as `source@revision`.
    pub model: String,
    /// First 16 hex digits of the model digest.
    pub digest: String,
    /// The topic's id; `None` if the broker gives none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic_id: Option<TopicId>,
    /// Offsets of records on which inference timed out, as `first-last,…`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    suspects: String,
}

impl Metadata {
    pub fn new(model: &str, digest: &str, topic_id: Option<TopicId>, suspects: &BTreeSet<i64>) -> Self {
        Self { model: model.to_owned(), digest: digest.to_owned(), topic_id, suspects: ranges(suspects) }
    }

    /// Parses the metadata; `None` if another program committed the offset.
    pub fn read(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    pub fn text(&self) -> String {
        serde_json::to_string(self).expect("strings have a JSON form")
    }

    pub fn suspects(&self) -> BTreeSet<i64> {
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse().ok()?..=last.parse::<i64>().ok()?)
        };
        self.suspects.split(',').filter_map(range).flatten().collect()
    }
}

/// Adds an offset to be committed, with the text of its [`Metadata`].
pub fn add_offset(
    list: &mut TopicPartitionList,
    partition: &Partition,
    offset: i64,
    metadata: &str,
) -> KafkaResult<()> {
    let mut element = list.add_partition(&partition.topic, partition.number);
    element.set_metadata(metadata);
    element.set_offset(Offset::Offset(offset))
}

fn ranges(offsets: &BTreeSet<i64>) -> String {
    let mut runs: Vec<(i64, i64)> = Vec::new();
    for &offset in offsets {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == offset => *last = offset,
            _ => runs.push((offset, offset)),
        }
    }
    let mut text = String::new();
    for (first, last) in runs {
        let run = if first == last { format!("{first}") } else { format!("{first}-{last}") };
        if text.len() + run.len() > MAX_SUSPECTS_BYTES {
            // The rest is found again when inference on it times out once more.
            break;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&run);
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn written_and_read() {
        let id = TopicId::new("Zs2Zkx3UTyy2mHZVj5Pk9A");
        let kept = Metadata::new("m@1", "d", Some(id.clone()), &[4, 5, 6, 9].into());
        let text = r#"{"model":"m@1","digest":"d","topic_id":"Zs2Zkx3UTyy2mHZVj5Pk9A","suspects":"4-6,9"}"#;
        assert_eq!(kept.text(), text);
        let read = Metadata::read(text).unwrap();
        assert_eq!((read.suspects(), &read.topic_id), ([4, 5, 6, 9].into(), &Some(id)));
        assert_eq!(Metadata::new("m", "d", None, &BTreeSet::new()).text(), r#"{"model":"m","digest":"d"}"#);
        assert_eq!(Metadata::read(""), None);
        assert_eq!(Metadata::read("{\"other\":1}"), None);
    }

    proptest! {
        #[test]
        fn suspects_come_back_as_far_as_there_is_room(offsets in proptest::collection::btree_set(0i64..100_000, 0..1500)) {
            let kept = Metadata::new("m", "d", None, &offsets);
            prop_assert!(kept.text().len() < 4096);
            let back = Metadata::read(&kept.text()).unwrap().suspects();
            prop_assert!(back.iter().eq(offsets.iter().take(back.len())));
            prop_assert!(back.len() == offsets.len() || kept.suspects.len() > MAX_SUSPECTS_BYTES - 20);
        }
    }
}
