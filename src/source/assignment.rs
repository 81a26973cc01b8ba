//! The assignment: partitions taken up, with the model compared that made their offsets, and given
//! up again once what is in flight of them is published and committed.
//!
//! ```text
//! assigned ─▶ where to begin? (lookup) ─▶ models compared ─▶ taken up
//! revoked  ─▶ paused ─▶ windows in flight end ─▶ committed ─▶ given up      lost: given up at once
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::callbacks::{give_up, take_up};
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
    /// Tells questions about assignments apart.
    last_id: u64,
    /// Partitions that are ours once it is known where to begin.
    pending: Option<(u64, TopicPartitionList)>,
    revoking: Option<Revocation>,
    /// The models of the whole group have been compared.
    compared: bool,
}

/// Partitions asked back, whose windows in flight may still finish.
struct Revocation {
    list: TopicPartitionList,
    partitions: Vec<Partition>,
    deadline: Instant,
}

/// What a revocation has to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Windows are in flight.
    Wait,
    /// All is published: commit it.
    Commit,
    GiveUp,
    /// Time is up, or the partitions are lost: what is in flight is not committed.
    GiveUpLate,
}

impl Revocation {
    /// `lost`: another member may have them already; `in_flight`: windows of them; `uncommitted`: some are published
    /// and not committed.
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

    /// No partition comes or goes.
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

    /// It is known where to begin.
    pub(super) fn on_start(&mut self, started: Started) -> Result<(), SourceError> {
        let Started { id, list, partitions: starts, all } = started;
        if self.assignment.pending.take_if(|(pending, _)| *pending == id).is_none() {
            return Ok(());
        }
        // Under `refuse`, what the group has of all partitions counts, ours or another member's: once, when we come.
        let compared = match &all {
            Some(all) if !std::mem::replace(&mut self.assignment.compared, true) => self.compare_models(all),
            _ => Ok(()),
        };
        let same_models = compared.and_then(|()| self.compare_models(&list));
        if let Err(error) = same_models.and_then(|()| self.check_topics(&starts)) {
            // The client waits for an answer, also when it is about to leave.
            let _ = take_up(&self.consumer, &list);
            return Err(error);
        }
        let mut partitions = Vec::new();
        for start in starts {
            let partition = start.partition.clone();
            let mut offset = start.committed();
            if let Some(begin) = self.bounds.drain.as_ref().and_then(|drain| drain.begin(&partition)) {
                // Not before the bounds, whatever the group has.
                let begin = offset.map_or(begin, |offset| offset.max(begin));
                offset = Some(begin);
                if let Some(mut element) = list.find_partition(&partition.topic, partition.number) {
                    element.set_offset(Offset::Offset(begin)).map_err(SourceError::Client)?;
                }
            }
            self.ledger.assign(partition.clone(), offset);
            if let Some(owned) = self.ledger.get_mut(&partition) {
                owned.topic_id = start.topic_id.clone();
                owned.suspects = start.suspects();
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
                drain.taken_up(&partition, offset);
            }
            // A rate wants a first point.
            for cause in ["retention", "damaged"] {
                self.context.metrics.skipped.with_label_values(&[&*partition.topic, cause]);
            }
            self.context.metrics.topic_recreated.with_label_values(&[&*partition.topic]);
            partitions.push(partition);
        }
        if let Err(error) = take_up(&self.consumer, &list) {
            return Err(SourceError::Fatal(format!("partitions cannot be taken up: {error}")));
        }
        if self.intake.paused {
            self.pause();
        } else if !list.elements().is_empty() {
            // A partition that was paused while it was taken away, and comes back, is still paused for
            // librdkafka.
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
        // A new member of a cooperative group is first given nothing.
        match partitions.is_empty() {
            true => tracing::info!("in the group, standing by"),
            false => tracing::info!(partitions = %names(&partitions), "assigned"),
        }
        Ok(())
    }

    /// Whether the topics are those whose ends a drain froze.
    fn check_topics(&self, starts: &[StartOf]) -> Result<(), SourceError> {
        let Some(drain) = &self.bounds.drain else { return Ok(()) };
        for start in starts {
            drain.check_topic(&start.partition.topic, start.topic_id.as_ref())?;
        }
        Ok(())
    }

    /// `model.on_change`: the digest in the committed offsets' metadata against ours.
    fn compare_models(&self, known: &TopicPartitionList) -> Result<(), SourceError> {
        if self.context.on_change == OnChange::Allow {
            return Ok(());
        }
        for element in known.elements() {
            let (Some(kept), Offset::Offset(offset)) = (Metadata::read(element.metadata()), element.offset())
            else {
                continue;
            };
            if kept.digest == self.context.digest {
                continue;
            }
            let message = format!(
                "{}/{}: records before offset {offset} were predicted by {} (digest {}); from there on {} (digest {})",
                element.topic(),
                element.partition(),
                kept.model,
                kept.digest,
                self.context.model,
                self.context.digest,
            );
            if self.context.on_change == OnChange::Refuse {
                return Err(SourceError::ModelChanged(format!(
                    "{message}: model.on_change is refuse; set it to warn or allow, or use another group"
                )));
            }
            tracing::warn!("the model changed: {message}");
        }
        Ok(())
    }

    pub(super) fn on_revoked(&mut self, list: TopicPartitionList) {
        let partitions = partitions(&list);
        // What was not taken up yet is given up all the same.
        self.assignment.pending = None;
        // Records that only wait go to the next owner.
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
            tracing::debug!(%error, "pausing what is revoked");
        }
        let deadline = Instant::now() + self.assignment.revoke_timeout;
        self.assignment.revoking = Some(Revocation { list, partitions, deadline });
    }

    /// Gives revoked partitions up once nothing of them is in flight and their offsets are committed,
    /// or time is up.
    pub(super) fn advance_revocation(&mut self) {
        let Some(revoking) = self.assignment.revoking.take() else { return };
        let lost = self.consumer.assignment_lost();
        let owned = || revoking.partitions.iter().filter_map(|partition| self.ledger.get(partition));
        if lost {
            // The session expired, before or meanwhile: it is too late to finish in good order.
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
            Next::GiveUp => self.give_up(&revoking),
            Next::GiveUpLate => {
                if in_flight {
                    tracing::warn!(
                        partitions = %names(&revoking.partitions),
                        "windows in flight did not finish in time: dropped, not committed"
                    );
                }
                self.give_up(&revoking);
            }
        }
    }

    fn give_up(&mut self, revoking: &Revocation) {
        for partition in &revoking.partitions {
            self.ledger.remove(partition);
            self.lag.forget(partition, &self.context.metrics);
        }
        if let Err(error) = give_up(&self.consumer, &revoking.list) {
            tracing::warn!(%error, "partitions could not be given up");
        }
    }

    /// Answers whatever the client waits for, because it is about to leave the group.
    pub(super) fn abandon_assignment(&mut self) {
        if let Some((_, list)) = self.assignment.pending.take() {
            let _ = take_up(&self.consumer, &list);
        }
        if let Some(revoking) = self.assignment.revoking.take() {
            let _ = give_up(&self.consumer, &revoking.list);
        }
    }
}

fn partitions(list: &TopicPartitionList) -> Vec<Partition> {
    list.elements().iter().map(|e| Partition::new(e.topic(), e.partition())).collect()
}

/// `topic[0,1,2] …`
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
