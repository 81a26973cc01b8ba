//! Where reading begins in an assigned partition. Pure.

use std::collections::{BTreeMap, BTreeSet};

use rdkafka::topic_partition_list::TopicPartitionListElem;

use crate::kafka::metadata::{MadeBy, Metadata};
use crate::kafka::native::{Identity, TopicId};
use crate::record::Partition;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Begin {
    At(i64),
    /// At the log's start: the group has no offset.
    LogStart,
    /// At the log's start: the group's offset belongs to an earlier topic of this name.
    Recreated {
        offset: i64,
        before: TopicId,
        now: TopicId,
    },
}

/// What is known of a partition when it is assigned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StartOf {
    pub partition: Partition,
    pub begin: Begin,
    pub topic_id: Option<TopicId>,
    /// Commit metadata of the offset, if kandle has committed it.
    pub metadata: Option<Metadata>,
}

impl StartOf {
    /// The group's committed offset, if it belongs to the current topic.
    pub fn committed(&self) -> Option<i64> {
        match self.begin {
            Begin::At(offset) => Some(offset),
            Begin::LogStart | Begin::Recreated { .. } => None,
        }
    }

    /// Who made the predictions before the start, if the group knows.
    pub fn made_by(&self) -> MadeBy {
        match (&self.begin, &self.metadata) {
            (Begin::At(_), Some(metadata)) => metadata.made_by.clone(),
            _ => MadeBy::default(),
        }
    }

    /// Offsets of records on which inference timed out before.
    pub fn suspects(&self) -> BTreeSet<i64> {
        match (&self.begin, &self.metadata) {
            (Begin::At(_), Some(metadata)) => metadata.suspects(),
            _ => BTreeSet::new(),
        }
    }
}

/// Where reading begins in a partition. `element`: what the group has committed; `offset`: its offset, or one committed
/// since; `identities`: the current topics.
pub(super) fn start_of(
    element: &TopicPartitionListElem<'_>,
    offset: Option<i64>,
    identities: &BTreeMap<String, Identity>,
) -> StartOf {
    let identity = identities.get(element.topic()).cloned().unwrap_or(Identity::Unknown);
    let partition = Partition::new(element.topic(), element.partition());
    begins(partition, offset, Metadata::read(element.metadata()), identity)
}

/// `offset` and `metadata`: committed by the group; `identity`: the current topic of that name.
fn begins(
    partition: Partition,
    offset: Option<i64>,
    metadata: Option<Metadata>,
    identity: Identity,
) -> StartOf {
    let topic_id = identity.id().cloned();
    let before = metadata.as_ref().and_then(|metadata| metadata.topic_id.clone());
    let begin = match (offset, before, &topic_id) {
        (None, ..) => Begin::LogStart,
        (Some(offset), Some(before), Some(now)) if before != *now => {
            Begin::Recreated { offset, before, now: now.clone() }
        }
        (Some(offset), ..) => Begin::At(offset),
    };
    StartOf { partition, begin, topic_id, metadata }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::ModelVersion;

    #[test]
    fn an_offset_is_valid_only_for_the_topic_it_was_committed_for() {
        let id = TopicId::new;
        let version = ModelVersion { model: "m".to_owned(), digest: "d".to_owned() };
        let made_by = || MadeBy { version: version.clone(), since: Some(3) };
        let of = |topic_id: Option<&str>| Some(Metadata::new(made_by(), topic_id.map(id), &[7].into()));
        let begin = |offset, metadata, identity| begins(Partition::new("t", 0), offset, metadata, identity);
        let now = || Identity::Id(id("now"));
        assert_eq!(begin(None, None, now()).begin, Begin::LogStart);
        assert_eq!(begin(Some(5), None, now()).begin, Begin::At(5), "committed by something else");
        assert_eq!(begin(Some(5), of(None), now()).begin, Begin::At(5));
        assert_eq!(begin(Some(5), of(Some("then")), Identity::Unknown).begin, Begin::At(5));
        let same = begin(Some(5), of(Some("now")), now());
        assert_eq!((same.committed(), same.suspects(), same.made_by()), (Some(5), [7].into(), made_by()));
        let other = begin(Some(5), of(Some("then")), now());
        assert_eq!(other.begin, Begin::Recreated { offset: 5, before: id("then"), now: id("now") });
        assert_eq!((other.committed(), other.suspects()), (None, [].into()));
        assert!(!other.made_by().is_known(), "the predictions were of another topic");
        assert_eq!(other.topic_id, Some(id("now")));
    }
}
