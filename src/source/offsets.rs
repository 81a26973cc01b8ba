//! Offsets: committed when windows are published, and what the group is to remember beside them.

use std::collections::BTreeMap;
use std::time::Instant;

use crossbeam_channel::Sender;
use rdkafka::consumer::{CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::live::Source;
use super::metadata::Metadata;
use crate::failpoint;
use crate::record::{Partition, Position};

impl Source {
    /// Sends what is published to be committed. Where transactions do that, there is nothing to send.
    pub(super) fn commit(&mut self, only: Option<&[Partition]>) {
        if self.committer.is_busy() {
            return;
        }
        self.last_commit = Instant::now();
        let offsets = self.ledger.take_commits(only);
        if offsets.is_empty() {
            return;
        }
        failpoint::pass("commit");
        self.committer.commit(self.with_metadata(&offsets));
    }

    fn with_metadata(&self, offsets: &[(Partition, i64)]) -> TopicPartitionList {
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (partition, offset) in offsets {
            let suspects = self.ledger.get(partition).map(|owned| owned.suspects.clone()).unwrap_or_default();
            let kept = Metadata::new(&self.wiring.model, &self.wiring.digest, &suspects);
            if let Err(error) = kept.add_to(&mut list, partition, *offset) {
                tracing::warn!(%partition, offset, %error, "an offset that cannot be committed");
            }
        }
        list
    }

    pub(super) fn committed(&mut self, result: Result<(), KafkaError>, offsets: &TopicPartitionList) {
        if let Some(time) = self.committer.done() {
            self.wiring.metrics.stage.with_label_values(&["commit"]).observe(time.as_secs_f64());
        }
        if let Err(error) = &result {
            tracing::warn!(%error, "a commit failed and will be made again");
            self.wiring.metrics.retries.with_label_values(&["commit"]).inc();
            self.wiring.health.error(&format!("commit: {error}"));
        }
        for element in offsets.elements() {
            if let Offset::Offset(offset) = element.offset() {
                self.ledger.committed(
                    &Partition::new(element.topic(), element.partition()),
                    offset,
                    result.is_ok(),
                );
            }
        }
        if result.is_ok() {
            failpoint::pass("committed");
        }
    }

    /// The group is told which records were in a forward that did not come to an end, so that the next
    /// start runs each of them alone. The offsets committed with it are those the group has anyway.
    pub(super) fn suspect(&mut self, positions: &[Position], kept: &Sender<()>) {
        let mut by_partition: BTreeMap<&Partition, Vec<i64>> = BTreeMap::new();
        for position in positions {
            by_partition.entry(&position.partition).or_default().push(position.offset);
        }
        let mut offsets = Vec::new();
        for (partition, suspects) in by_partition {
            let Some(owned) = self.ledger.get_mut(partition) else { continue };
            owned.suspects.extend(suspects);
            if let Some(at) = owned.committed.or(owned.resume_at()) {
                offsets.push((partition.clone(), at));
            }
        }
        match self.consumer.commit(&self.with_metadata(&offsets), CommitMode::Sync) {
            Ok(()) => {
                let _ = kept.send(());
            }
            Err(error) => tracing::error!(%error, "the group could not be told which records are suspects"),
        }
    }

    /// Says and counts what retention deleted before it was read.
    pub(super) fn show_skipped(&mut self, low: impl Fn(&Partition) -> Option<i64>) {
        for owned in self.ledger.iter_mut() {
            let Some(low) = low(&owned.partition) else { continue };
            for (from, to) in owned.take_skipped(low) {
                let Partition { topic, number } = &owned.partition;
                tracing::error!(
                    topic = &**topic,
                    partition = number,
                    from,
                    to,
                    "data skipped: retention had deleted these offsets before they were read"
                );
                self.wiring.health.error(&format!(
                    "{topic}/{number}: offsets {from} to {to} were deleted before they were read"
                ));
                self.wiring.metrics.skipped.with_label_values(&[&**topic]).inc_by((to - from) as u64);
            }
        }
    }
}
