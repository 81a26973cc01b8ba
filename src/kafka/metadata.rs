//! The commit metadata that the group stores with each offset: the topic's id, the model that processed the records
//! before the offset and since which offset it has, and the suspects: records after it on which inference timed out.

use std::collections::BTreeSet;

use rdkafka::error::KafkaResult;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};

use super::native::TopicId;
use crate::flow::ModelVersion;
use crate::record::Partition;

/// Most bytes of the list of suspects; Kafka accepts 4,096 bytes of metadata (`offset.metadata.max.bytes`).
const MAX_SUSPECTS_BYTES: usize = 3000;

/// Who made the predictions of a partition up to an offset. The default: not known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeBy {
    #[serde(flatten)]
    pub version: ModelVersion,
    /// The first offset from which on this version, by its digest, made all predictions; `None` if that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<i64>,
}

impl MadeBy {
    pub fn is_known(&self) -> bool {
        !self.version.digest.is_empty()
    }

    /// Who made the predictions up to a later offset, if `version` made those from `first` on.
    pub fn followed_by(&self, version: &ModelVersion, first: i64) -> Self {
        let since = if self.version.digest == version.digest { self.since } else { Some(first) };
        Self { version: version.clone(), since }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    #[serde(flatten)]
    pub made_by: MadeBy,
    /// The topic's id; `None` if the broker gives none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic_id: Option<TopicId>,
    /// Offsets of records on which inference timed out, as `first-last,…`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    suspects: String,
}

impl Metadata {
    pub fn new(made_by: MadeBy, topic_id: Option<TopicId>, suspects: &BTreeSet<i64>) -> Self {
        Self { made_by, topic_id, suspects: ranges(suspects) }
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

    fn by(model: &str, digest: &str, since: Option<i64>) -> MadeBy {
        MadeBy { version: ModelVersion { model: model.to_owned(), digest: digest.to_owned() }, since }
    }

    #[test]
    fn a_version_counts_from_its_first_offset() {
        let (old, new) = (by("m@1", "old", None).version, by("m@2", "new", None).version);
        let nobody = MadeBy::default();
        assert!(!nobody.is_known());
        let first = nobody.followed_by(&old, 5);
        assert_eq!((first.since, first.is_known()), (Some(5), true));
        assert_eq!(first.followed_by(&old, 9), first, "the same version goes on");
        let second = first.followed_by(&new, 12);
        assert_eq!(second, by("m@2", "new", Some(12)));
        assert_eq!(second.followed_by(&new, 20).since, Some(12));
        // Committed before offsets were kept: it began at some earlier one.
        assert_eq!(by("m@1", "old", None).followed_by(&old, 30).since, None);
        let text = Metadata::new(second.clone(), None, &BTreeSet::new()).text();
        assert_eq!(text, r#"{"model":"m@2","digest":"new","since":12}"#);
        assert_eq!(Metadata::read(&text).unwrap().made_by, second);
    }

    #[test]
    fn written_and_read() {
        let id = TopicId::new("Zs2Zkx3UTyy2mHZVj5Pk9A");
        let kept = Metadata::new(by("m@1", "d", None), Some(id.clone()), &[4, 5, 6, 9].into());
        let text = r#"{"model":"m@1","digest":"d","topic_id":"Zs2Zkx3UTyy2mHZVj5Pk9A","suspects":"4-6,9"}"#;
        assert_eq!(kept.text(), text);
        let read = Metadata::read(text).unwrap();
        assert_eq!((read.suspects(), &read.topic_id), ([4, 5, 6, 9].into(), &Some(id)));
        assert_eq!(
            Metadata::new(by("m", "d", None), None, &BTreeSet::new()).text(),
            r#"{"model":"m","digest":"d"}"#
        );
        assert_eq!(Metadata::read(""), None);
        assert_eq!(Metadata::read("{\"other\":1}"), None);
    }

    proptest! {
        #[test]
        fn suspects_come_back_as_far_as_there_is_room(offsets in proptest::collection::btree_set(0i64..100_000, 0..1500)) {
            let kept = Metadata::new(by("m", "d", None), None, &offsets);
            prop_assert!(kept.text().len() < 4096);
            let back = Metadata::read(&kept.text()).unwrap().suspects();
            prop_assert!(back.iter().eq(offsets.iter().take(back.len())));
            prop_assert!(back.len() == offsets.len() || kept.suspects.len() > MAX_SUSPECTS_BYTES - 20);
        }
    }
}
