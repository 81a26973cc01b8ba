//! Offsets: committed when windows are published, and what the group is to remember beside them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::commit::Committer;
use super::ledger::Owned;
use super::serve::{Context, Source};
use crate::failpoint;
use crate::kafka::metadata::{Metadata, add_offset};
use crate::record::{Partition, Position};

/// The commits, and when the next one is due.
pub(super) struct Offsets {
    committer: Committer,
    interval: Duration,
    last: Instant,
}

impl Offsets {
    pub fn new(committer: Committer, interval: Duration) -> Self {
        Self { committer, interval, last: Instant::now() }
    }

    pub fn is_due(&self) -> bool {
        self.last.elapsed() >= self.interval
    }

    /// A commit is under way.
    pub fn is_busy(&self) -> bool {
        self.committer.is_busy()
    }
}

impl Context {
    /// The text beside an offset of a partition: suspects before `from` are left out.
    pub(super) fn metadata(&self, owned: &Owned, from: i64) -> Arc<str> {
        let suspects = owned.suspects.range(from..).copied().collect();
        Metadata::new(&self.model, &self.digest, owned.topic_id.clone(), &suspects).text().into()
    }
}

impl Source {
    /// Sends what is published to be committed. Where transactions do that, there is nothing to send.
    pub(super) fn commit(&mut self, only: Option<&[Partition]>) {
        if self.offsets.committer.is_busy() {
            return;
        }
        self.offsets.last = Instant::now();
        let offsets = self.ledger.take_commits(only);
        if offsets.is_empty() {
            return;
        }
        failpoint::pass("commit");
        self.offsets.committer.commit(self.with_metadata(&offsets));
    }

    fn with_metadata(&self, offsets: &[(Partition, i64)]) -> TopicPartitionList {
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (partition, offset) in offsets {
            let Some(owned) = self.ledger.get(partition) else { continue };
            let metadata = self.context.metadata(owned, *offset);
            if let Err(error) = add_offset(&mut list, partition, *offset, &metadata) {
                tracing::warn!(%partition, offset, %error, "an offset that cannot be committed");
            }
        }
        list
    }

    pub(super) fn on_committed(&mut self, result: Result<(), KafkaError>, offsets: &TopicPartitionList) {
        if let Some(time) = self.offsets.committer.done() {
            self.context.metrics.stage.with_label_values(&["commit"]).observe(time.as_secs_f64());
        }
        if let Err(error) = &result {
            self.context.metrics.retries.with_label_values(&["commit"]).inc();
            self.context.health.error(&format!("commit: {error}"));
            tracing::warn!(%error, "a commit failed and will be made again");
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
    pub(super) fn suspect(&mut self, positions: &[Position], kept: Sender<()>) {
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
        self.offsets.committer.commit_and_tell(self.with_metadata(&offsets), kept);
    }

    /// Counts and logs what retention deleted before it was read.
    pub(super) fn show_skipped(&mut self, low: impl Fn(&Partition) -> Option<i64>) {
        for owned in self.ledger.iter_mut() {
            let Some(low) = low(&owned.partition) else { continue };
            for (from, to) in owned.take_skipped(low) {
                let Partition { topic, number } = &owned.partition;
                let skipped = self.context.metrics.skipped.with_label_values(&[&**topic, "retention"]);
                skipped.inc_by((to - from) as u64);
                self.context.health.error(&format!(
                    "{topic}/{number}: offsets {from} to {to} were deleted before they were read"
                ));
                tracing::error!(
                    topic = &**topic,
                    partition = number,
                    from,
                    to,
                    "data skipped: retention had deleted these offsets before they were read"
                );
            }
        }
    }
}
