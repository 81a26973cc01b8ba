//! Rebalances. Before a partition is read, the model that made its committed offset is compared with ours. A revoked
//! partition is unassigned once its windows in flight are published and committed.
//!
//! ```text
//! assigned ─▶ look up where to begin ─▶ compare models ─▶ assign to the client
//! revoked  ─▶ pause ─▶ windows in flight finish ─▶ commit ─▶ unassign      lost: unassign at once
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::callbacks::{assign, unassign};
use super::ledger::PartitionState;
use super::lookup::{Question, Started};
use super::serve::{Source, SourceError};
use super::start::{Begin, StartOf};
use crate::kafka::metadata::Metadata;
use crate::record::Partition;
use crate::settings::OnChange;

/// Where the member stands in a rebalance.
pub(super) struct Assignment {
    revoke_timeout: Duration,
    /// Id of the last start lookup; answers to earlier ones are ignored.
    last_id: u64,
    /// Assigned partitions whose start offsets are being looked up, with the id of the lookup.
    pending: Option<(u64, TopicPartitionList)>,
    revoking: Option<Revocation>,
    /// The models of all the group's partitions have been compared, which is done once.
    compared: bool,
}

/// A revocation under way: windows in flight may finish until `deadline`.
struct Revocation {
    list: TopicPartitionList,
    partitions: Vec<Partition>,
    deadline: Instant,
}

/// The next step of a revocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Windows are in flight.
    Wait,
    /// All windows are published, but not committed.
    Commit,
    GiveUp,
    /// The deadline has passed, or the partitions are lost: windows in flight are not committed.
    GiveUpLate,
}

impl Revocation {
    /// `lost`: another member may own the partitions already. `in_flight`: they have windows in flight. `uncommitted`:
    /// some of their published offsets are not committed.
    fn next(&self, now: Instant, lost: bool, in_flight: bool, uncommitted: bool) -> Next {
        if lost || now >= self.deadline {
            return Next::GiveUpLate;
        }
        match (in_flight, uncommitted) {
            (true, _) => Next::Wait,
            (false, true) => Next::Commit,
            (false, false) => Next::GiveUp,
        }
    }
}

impl Assignment {
    pub fn new(revoke_timeout: Duration) -> Self {
        Self { revoke_timeout, last_id: 0, pending: None, revoking: None, compared: false }
    }

    pub fn is_revoking(&self) -> bool {
        self.revoking.is_some()
    }

    /// No rebalance is under way.
    pub fn is_steady(&self) -> bool {
        self.pending.is_none() && self.revoking.is_none()
    }
}

impl Source {
    pub(super) fn on_assigned(&mut self, list: TopicPartitionList) {
        self.assignment.last_id += 1;
        let id = self.assignment.last_id;
        let compare_all = self.context.on_change == OnChange::Refuse && !self.assignment.compared;
        self.lookup.ask(Question::Start { id, partitions: list.clone(), compare_all });
        self.assignment.pending = Some((id, list));
    }

    /// Start offsets are known: compares models, checks topics, and assigns the partitions to the client.
    pub(super) fn on_start(&mut self, started: Started) -> Result<(), SourceError> {
        let Started { id, list, partitions: starts, all } = started;
        if self.assignment.pending.take_if(|(pending, _)| *pending == id).is_none() {
            return Ok(());
        }
        // `refuse` also compares the partitions of other members, once, when this member joins.
        let compared = match &all {
            Some(all) if !std::mem::replace(&mut self.assignment.compared, true) => self.compare_models(all),
            _ => Ok(()),
        };
        let same_models = compared.and_then(|()| self.compare_models(&list));
        if let Err(error) = same_models.and_then(|()| self.check_topics(&starts)) {
            // librdkafka waits for an answer to the rebalance, even before it closes.
            let _ = assign(&self.consumer, &list);
            return Err(error);
        }
        let mut partitions = Vec::new();
        for start in starts {
            let partition = start.partition.clone();
            let mut offset = start.committed();
            if let Some(begin) = self.bounds.drain.as_ref().and_then(|drain| drain.begin(&partition)) {
                // A replay never reads before its range, even if the group's offset is earlier.
                let begin = offset.map_or(begin, |offset| offset.max(begin));
                offset = Some(begin);
                if let Some(mut element) = list.find_partition(&partition.topic, partition.number) {
                    element.set_offset(Offset::Offset(begin)).map_err(SourceError::Client)?;
                }
            }
            self.ledger.assign(partition.clone(), offset);
            if let Some(owned) = self.ledger.get_mut(&partition) {
                owned.topic_id = start.topic_id.clone();
                if let Some(id) = &start.topic_id {
                    self.fetching.topic_is(&partition.topic, id);
                }
                owned.suspects = start.suspects();
                owned.made_by = start.made_by();
                if let Some(first) = owned.suspects.first() {
                    tracing::warn!(
                        %partition,
                        first,
                        records = owned.suspects.len(),
                        "inference on these records exceeded batch.timeout before: each runs alone now"
                    );
                }
            }
            if let Begin::Recreated { offset, before, now } = &start.begin {
                self.count_recreated(&partition, Some(*offset), &before.to_string(), Some(&now.to_string()));
            }
            if let Some(drain) = &self.bounds.drain {
                drain.assigned(&partition, offset);
            }
            // Creates the series at 0, so that a rate includes the first increase.
            for cause in ["retention", "damaged"] {
                self.context.metrics.skipped.with_label_values(&[&*partition.topic, cause]);
            }
            self.context.metrics.topic_recreated.with_label_values(&[&*partition.topic]);
            partitions.push(partition);
        }
        if let Err(error) = assign(&self.consumer, &list) {
            return Err(SourceError::Fatal(format!("assigning partitions failed: {error}")));
        }
        if self.intake.paused {
            self.pause();
        } else if !list.elements().is_empty() {
            // librdkafka still pauses a partition that was paused when it was revoked before.
            self.consumer.resume(&list).map_err(SourceError::Client)?;
        }
        if let Some(drain) = &self.bounds.drain {
            let mut done = TopicPartitionList::new();
            for partition in partitions.iter().filter(|partition| drain.is_done(partition)) {
                done.add_partition(&partition.topic, partition.number);
            }
            if done.count() > 0 {
                self.consumer.pause(&done).map_err(SourceError::Client)?;
            }
        }
        self.context.metrics.rebalances.with_label_values(&["assigned"]).inc();
        self.context.health.set_ready();
        // A new member of a cooperative group gets an empty assignment first.
        match partitions.is_empty() {
            true => tracing::info!("joined the group, no partitions assigned"),
            false => tracing::info!(partitions = %names(&partitions), "partitions assigned"),
        }
        Ok(())
    }

    /// Checks that the topics are still those whose end offsets the drain froze.
    fn check_topics(&self, starts: &[StartOf]) -> Result<(), SourceError> {
        let Some(drain) = &self.bounds.drain else { return Ok(()) };
        for start in starts {
            drain.check_topic(&start.partition.topic, start.topic_id.as_ref())?;
        }
        Ok(())
    }

    /// Applies `model.on_change`: compares the model digest in the commit metadata with ours.
    fn compare_models(&self, known: &TopicPartitionList) -> Result<(), SourceError> {
        if self.context.on_change == OnChange::Allow {
            return Ok(());
        }
        let ours = self.context.compute.about().version();
        for element in known.elements() {
            let (Some(kept), Offset::Offset(offset)) = (Metadata::read(element.metadata()), element.offset())
            else {
                continue;
            };
            let kept = kept.made_by.version;
            if kept.digest == ours.digest {
                continue;
            }
            let message = format!(
                "{}/{}: records before offset {offset} were predicted by {} (digest {}); \
                 this process runs {} (digest {})",
                element.topic(),
                element.partition(),
                kept.model,
                kept.digest,
                ours.model,
                ours.digest,
            );
            if self.context.on_change == OnChange::Refuse {
                return Err(SourceError::ModelChanged(format!(
                    "{message}: model.on_change is refuse; set it to warn or allow, or use another group"
                )));
            }
            tracing::warn!(reason = message, "the model changed since the last commit");
        }
        Ok(())
    }

    pub(super) fn on_revoked(&mut self, list: TopicPartitionList) {
        let partitions = partitions(&list);
        // An assignment whose start offsets are still being looked up is unassigned too.
        self.assignment.pending = None;
        // The next owner reads the records of the open window again.
        self.intake.gatherer.forget(|p| partitions.contains(p));
        for partition in &partitions {
            if let Some(owned) = self.ledger.get_mut(partition) {
                owned.revoke();
            }
        }
        let lost = self.consumer.assignment_lost();
        let cause = if lost { "lost" } else { "revoked" };
        self.context.metrics.rebalances.with_label_values(&[cause]).inc();
        tracing::info!(partitions = %names(&partitions), cause, "partitions revoked");
        if !lost && let Err(error) = self.consumer.pause(&list) {
            tracing::debug!(%error, "pausing revoked partitions failed");
        }
        let deadline = Instant::now() + self.assignment.revoke_timeout;
        self.assignment.revoking = Some(Revocation { list, partitions, deadline });
    }

    /// Unassigns revoked partitions once nothing of them is in flight and their offsets are committed, or once
    /// `delivery.revoke_timeout` has passed.
    pub(super) fn advance_revocation(&mut self) {
        let Some(revoking) = self.assignment.revoking.take() else { return };
        let lost = self.consumer.assignment_lost();
        let owned = || revoking.partitions.iter().filter_map(|partition| self.ledger.get(partition));
        if lost {
            // The session expired, so another member may own the partitions: publish nothing more of them.
            owned().for_each(|owned| owned.lease.end());
        }
        let in_flight = owned().any(|owned| owned.windows_in_flight() > 0);
        let uncommitted = owned().any(PartitionState::is_uncommitted);
        match revoking.next(Instant::now(), lost, in_flight, uncommitted) {
            Next::Wait => self.assignment.revoking = Some(revoking),
            Next::Commit => {
                self.commit(Some(&revoking.partitions));
                self.assignment.revoking = Some(revoking);
            }
            Next::GiveUp => self.unassign(&revoking),
            Next::GiveUpLate => {
                if in_flight {
                    tracing::warn!(
                        partitions = %names(&revoking.partitions),
                        "windows in flight dropped, not committed: the next owner reads their records again"
                    );
                }
                self.unassign(&revoking);
            }
        }
    }

    fn unassign(&mut self, revoking: &Revocation) {
        for partition in &revoking.partitions {
            self.ledger.remove(partition);
            self.lag.forget(partition, &self.context.metrics);
        }
        if let Err(error) = unassign(&self.consumer, &revoking.list) {
            tracing::warn!(%error, "unassigning partitions failed");
        }
    }

    /// Answers a pending rebalance, so that the client can leave the group.
    pub(super) fn abandon_assignment(&mut self) {
        if let Some((_, list)) = self.assignment.pending.take() {
            let _ = assign(&self.consumer, &list);
        }
        if let Some(revoking) = self.assignment.revoking.take() {
            let _ = unassign(&self.consumer, &revoking.list);
        }
    }
}

fn partitions(list: &TopicPartitionList) -> Vec<Partition> {
    list.elements().iter().map(|e| Partition::new(e.topic(), e.partition())).collect()
}

/// Formats partitions as `topic[0,1,2] …`.
fn names(partitions: &[Partition]) -> String {
    let mut by_topic: BTreeMap<&str, Vec<i32>> = BTreeMap::new();
    for partition in partitions {
        by_topic.entry(&partition.topic).or_default().push(partition.number);
    }
    let one = |(topic, mut numbers): (&str, Vec<i32>)| {
        numbers.sort_unstable();
        let numbers: Vec<String> = numbers.iter().map(i32::to_string).collect();
        format!("{topic}[{}]", numbers.join(","))
    };
    by_topic.into_iter().map(one).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revocation_waits_for_windows_in_flight_and_commits_them() {
        let start = Instant::now();
        let deadline = start + Duration::from_secs(5);
        let revoking = Revocation { list: TopicPartitionList::new(), partitions: Vec::new(), deadline };
        assert_eq!(revoking.next(start, false, true, true), Next::Wait);
        assert_eq!(revoking.next(start, false, true, false), Next::Wait);
        assert_eq!(revoking.next(start, false, false, true), Next::Commit);
        assert_eq!(revoking.next(start, false, false, false), Next::GiveUp);
        assert_eq!(revoking.next(start, true, true, true), Next::GiveUpLate, "lost");
        assert_eq!(revoking.next(deadline, false, true, true), Next::GiveUpLate, "time is up");
    }

    #[test]
    fn partitions_are_named_by_topic() {
        let p = Partition::new;
        assert_eq!(names(&[p("b", 1), p("a", 2), p("b", 0)]), "a[2] b[0,1]");
    }
}
