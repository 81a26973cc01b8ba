//! The end of a drain: which partitions have been read to their end offsets, and whether the whole group is done.

use std::collections::BTreeSet;
use std::sync::Arc;

use rdkafka::consumer::Consumer;
use rdkafka::topic_partition_list::TopicPartitionList;

use super::drain::Drain;
use super::ledger::Hold;
use super::lookup::{Offsets, Question};
use super::schedule_state::ScheduleState;
use super::serve::Source;
use crate::record::Partition;
use crate::window::ClosedBy;

pub(super) struct Bounds {
    pub drain: Option<Arc<Drain>>,
    pub schedule: ScheduleState,
}

impl Bounds {
    /// A drain needs no more records of the partition.
    pub fn is_done(&self, partition: &Partition) -> bool {
        self.drain.as_ref().is_some_and(|drain| drain.is_done(partition))
    }

    /// The drain's end offset of the partition.
    pub fn bound(&self, partition: &Partition) -> Option<i64> {
        self.drain.as_ref()?.bound(partition)
    }
}

impl Source {
    /// Marks partitions as read to their end offsets, and pauses them.
    pub(super) fn end(&mut self, ended: &BTreeSet<Partition>) {
        let Some(drain) = &self.bounds.drain else { return };
        let mut list = TopicPartitionList::new();
        for partition in ended.iter().filter(|partition| !drain.is_done(partition)) {
            drain.set_done(partition);
            list.add_partition(&partition.topic, partition.number);
        }
        if list.count() > 0
            && let Err(error) = self.consumer.pause(&list)
        {
            tracing::debug!(%error, "pausing finished partitions failed");
        }
        if self.ledger.iter().all(|owned| drain.is_done(&owned.partition))
            && let Some(window) = self.intake.gatherer.close(ClosedBy::End)
        {
            // No more records will come, so the window need not wait.
            self.hold(window);
        }
    }

    /// Whether the drain is complete: all members' partitions are committed up to their end offsets. Asks for the
    /// group's offsets once our own partitions are.
    pub(super) fn is_drained(&mut self) -> bool {
        let Some(drain) = self.bounds.drain.clone() else { return false };
        if drain.is_complete() {
            return true;
        }
        let mut open = !self.intake.held.is_empty() || !self.assignment.is_steady();
        for owned in self.ledger.iter_mut() {
            let revoked = owned.hold == Some(Hold::Revoked);
            if revoked || !drain.is_done(&owned.partition) || !owned.is_idle() {
                open = true;
                continue;
            }
            // Commit the end offset itself, even if no record lies right before it.
            if let Some(end) = drain.bound(&owned.partition) {
                owned.skip_to(end);
                owned.settle();
            }
        }
        if open {
            return false;
        }
        if self.ledger.commits_open() {
            self.commit(None);
            return false;
        }
        if let Some(partitions) = drain.partitions_to_poll() {
            self.lookup.ask(Question::Progress(partitions));
        }
        false
    }

    pub(super) fn on_progress(&self, known: &Offsets) {
        if let Some(drain) = &self.bounds.drain {
            drain.progress(known);
        }
    }
}
