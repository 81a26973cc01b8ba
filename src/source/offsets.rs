//! Commits the offsets of published windows, and the metadata stored with them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::commit::Committer;
use super::ledger::PartitionState;
use super::serve::{Context, Source};
use crate::failpoint;
use crate::kafka::metadata::{Metadata, add_offset};
use crate::record::{Partition, Position};

/// Device time of published windows, in seconds, after which they are committed before the interval is over.
const WORTH_A_COMMIT: f64 = 0.25;

/// The commits, and when the next one is due.
pub(super) struct Offsets {
    committer: Committer,
    interval: Duration,
    last: Instant,
    /// Device time of the windows published since the last commit, in seconds.
    uncommitted: f64,
    suspected: Option<Suspected>,
}

/// Records on which inference timed out, to be stored in the commit metadata.
struct Suspected {
    positions: Vec<Position>,
    /// Signalled once they are committed.
    kept: Sender<()>,
}

impl Offsets {
    pub fn new(committer: Committer, interval: Duration) -> Self {
        Self { committer, interval, last: Instant::now(), uncommitted: 0.0, suspected: None }
    }

    pub fn is_due(&self) -> bool {
        self.last.elapsed() >= self.interval || self.uncommitted >= WORTH_A_COMMIT
    }

    /// Adds the device time (`work`, seconds) of a published window, so that costly work is committed soon.
    pub fn published(&mut self, work: f64) {
        self.uncommitted += work;
    }

    /// A commit is in flight.
    pub fn is_busy(&self) -> bool {
        self.committer.is_busy()
    }

    /// Suspects wait to be committed, until the windows before theirs are published.
    pub fn has_suspects(&self) -> bool {
        self.suspected.is_some()
    }
}

impl Context {
    /// Metadata to commit with an offset of a partition. Suspects before `from` are left out.
    pub(super) fn metadata(&self, owned: &PartitionState, from: i64) -> Metadata {
        let suspects = owned.suspects.range(from..).copied().collect();
        Metadata::new(owned.made_by.clone(), owned.topic_id.clone(), &suspects)
    }
}

impl Source {
    /// Commits published offsets; `only`: of these partitions. Transactions commit those of windows themselves.
    pub(super) fn commit(&mut self, only: Option<&[Partition]>) {
        if self.offsets.committer.is_busy() {
            return;
        }
        (self.offsets.last, self.offsets.uncommitted) = (Instant::now(), 0.0);
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
            let mut metadata = self.context.metadata(owned, *offset);
            if !metadata.made_by.is_known() {
                // Nothing before the offset was predicted, or not by kandle.
                metadata.made_by.version = self.context.compute.about().version();
            }
            if let Err(error) = add_offset(&mut list, partition, *offset, &metadata.text()) {
                tracing::warn!(%partition, offset, %error, "the offset could not be added to the commit");
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
            tracing::warn!(%error, "commit failed: retrying");
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

    /// Notes the records on which inference timed out. They are stored in the commit metadata, so that the
    /// next start runs each of them alone.
    pub(super) fn suspect(&mut self, positions: Vec<Position>, kept: Sender<()>) {
        for position in &positions {
            if let Some(owned) = self.ledger.get_mut(&position.partition) {
                owned.suspects.insert(position.offset);
            }
        }
        self.offsets.suspected = Some(Suspected { positions, kept });
    }

    /// Commits the suspects once all windows before theirs are published. Earlier, the commit of such a window could
    /// land after this one: it would set the offset back, or replace the metadata with one without suspects.
    pub(super) fn commit_suspects(&mut self) {
        if self.offsets.committer.is_busy() {
            return;
        }
        let is_next = |position: &Position| {
            let owned = self.ledger.get(&position.partition);
            owned.is_none_or(|owned| owned.is_in_next_window(position.offset))
        };
        let ready = |suspected: &mut Suspected| suspected.positions.iter().all(is_next);
        let Some(Suspected { positions, kept }) = self.offsets.suspected.take_if(ready) else { return };
        let partitions: BTreeSet<Partition> = positions.into_iter().map(|p| p.partition).collect();
        let at = |partition: Partition| {
            let at = self.ledger.get(&partition)?.resume_at()?;
            Some((partition, at))
        };
        let offsets: Vec<(Partition, i64)> = partitions.into_iter().filter_map(at).collect();
        self.offsets.committer.commit_and_tell(self.with_metadata(&offsets), kept);
    }

    /// Counts and logs the offsets that retention deleted before they were read. `low`: first offset of a log.
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
