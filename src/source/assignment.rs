//! The assignment: partitions taken up, with the model compared that made their offsets, and given
//! up again once what is in flight of them is published and committed.

use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::ledger::Ledger;
use super::live::{Source, SourceError};
use super::metadata::Metadata;
use super::range;
use super::rebalance::{give_up, take_up};
use crate::cluster::committed;
use crate::record::Partition;
use crate::settings::OnChange;

/// Partitions asked back, whose windows in flight may still finish.
pub(super) struct Revoking {
    pub list: TopicPartitionList,
    partitions: Vec<Partition>,
    deadline: Instant,
}

impl Source {
    pub(super) fn assign(&mut self, list: &TopicPartitionList) -> Result<(), SourceError> {
        let partitions = partitions(list);
        // What the group has, to compare models and to show lag before the first window.
        let known = match committed(&self.consumer, list, Duration::from_secs(10)) {
            Ok(known) => known,
            Err(error) if self.on_change == OnChange::Refuse => {
                let _ = take_up(&self.consumer, list);
                return Err(SourceError::Fatal(format!(
                    "the group's offsets cannot be read ({error}), and model.on_change is refuse"
                )));
            }
            Err(error) => {
                tracing::warn!(%error, "the group's offsets cannot be read now: the model that made them is not compared");
                list.clone()
            }
        };
        let compared = self.compare_all_models().and_then(|()| self.compare_models(&known));
        if let Err(changed) = compared {
            // The client waits for an answer, also when it is about to leave.
            let _ = take_up(&self.consumer, list);
            return Err(changed);
        }
        let taken = list.clone();
        for partition in &partitions {
            let element = known.find_partition(&partition.topic, partition.number);
            let mut start = element.as_ref().and_then(|element| match element.offset() {
                Offset::Offset(offset) => Some(offset),
                _ => None,
            });
            let begin = self.wiring.drain.as_ref().and_then(|drain| drain.begin(partition));
            if let Some(begin) = begin {
                // Not before the bounds, whatever the group has.
                let begin = start.map_or(begin, |start| start.max(begin));
                start = Some(begin);
                let element = taken.find_partition(&partition.topic, partition.number);
                if let Some(mut element) = element {
                    element.set_offset(Offset::Offset(begin)).map_err(SourceError::Client)?;
                }
            }
            self.ledger.assign(partition.clone(), start);
            if let Some(drain) = &self.wiring.drain {
                drain.taken_up(partition, start);
            }
            // A rate wants a first point.
            self.wiring.metrics.skipped.with_label_values(&[&*partition.topic]);
            let kept = element.and_then(|element| Metadata::read(element.metadata()));
            if let (Some(owned), Some(kept)) = (self.ledger.get_mut(partition), kept) {
                owned.suspects = kept.suspects();
                if let Some(first) = owned.suspects.first() {
                    tracing::warn!(
                        %partition,
                        first,
                        records = owned.suspects.len(),
                        "a forward over these records did not come to an end: each runs alone now"
                    );
                }
            }
        }
        if let Err(error) = take_up(&self.consumer, &taken) {
            return Err(SourceError::Fatal(format!("partitions cannot be taken up: {error}")));
        }
        if self.paused {
            self.pause();
        } else if !list.elements().is_empty() {
            // A partition that was paused while it was taken away, and comes back, is still paused for
            // librdkafka.
            self.consumer.resume(list).map_err(SourceError::Client)?;
        }
        if let Some(drain) = &self.wiring.drain {
            let mut done = TopicPartitionList::new();
            for partition in partitions.iter().filter(|partition| drain.is_done(partition)) {
                done.add_partition(&partition.topic, partition.number);
            }
            if done.count() > 0 {
                self.consumer.pause(&done).map_err(SourceError::Client)?;
            }
        }
        self.wiring.metrics.rebalances.with_label_values(&["assigned"]).inc();
        self.wiring.health.set_ready();
        // A new member of a cooperative group is first given nothing.
        match partitions.is_empty() {
            true => tracing::info!("in the group, standing by"),
            false => tracing::info!(partitions = %names(&partitions), "assigned"),
        }
        Ok(())
    }

    /// Under `refuse`, what the group has of all partitions counts, ours or another member's: once, when we
    /// come.
    fn compare_all_models(&mut self) -> Result<(), SourceError> {
        if self.on_change != OnChange::Refuse || std::mem::replace(&mut self.compared, true) {
            return Ok(());
        }
        let unreadable = |error: String| {
            SourceError::Fatal(format!(
                "the group's offsets cannot be read ({error}), and model.on_change is refuse"
            ))
        };
        let topics: Vec<&str> = self.topics.iter().map(String::as_str).collect();
        let all = range::partitions(&self.consumer, &topics).map_err(|e| unreadable(e.to_string()))?;
        let mut list = TopicPartitionList::new();
        for partition in &all {
            list.add_partition(&partition.topic, partition.number);
        }
        let known = committed(&self.consumer, &list, Duration::from_secs(10));
        self.compare_models(&known.map_err(|e| unreadable(e.to_string()))?)
    }

    /// `model.on_change`: the digest in the committed offsets' metadata against ours.
    fn compare_models(&self, known: &TopicPartitionList) -> Result<(), SourceError> {
        if self.on_change == OnChange::Allow {
            return Ok(());
        }
        for element in known.elements() {
            let (Some(kept), Offset::Offset(offset)) = (Metadata::read(element.metadata()), element.offset())
            else {
                continue;
            };
            if kept.digest == self.wiring.digest {
                continue;
            }
            let message = format!(
                "{}/{}: records before offset {offset} were predicted by {} (digest {}); from there on {} (digest {})",
                element.topic(),
                element.partition(),
                kept.model,
                kept.digest,
                self.wiring.model,
                self.wiring.digest,
            );
            if self.on_change == OnChange::Refuse {
                return Err(SourceError::ModelChanged(format!(
                    "{message}: model.on_change is refuse; set it to warn or allow, or use another group"
                )));
            }
            tracing::warn!("the model changed: {message}");
        }
        Ok(())
    }

    pub(super) fn revoke(&mut self, list: TopicPartitionList) {
        let partitions = partitions(&list);
        // Records that only wait go to the next owner.
        self.gatherer.forget(|p| partitions.contains(p));
        for partition in &partitions {
            if let Some(owned) = self.ledger.get_mut(partition) {
                owned.forget_gathering();
            }
        }
        let lost = self.consumer.assignment_lost();
        let cause = if lost { "lost" } else { "revoked" };
        self.wiring.metrics.rebalances.with_label_values(&[cause]).inc();
        tracing::info!(partitions = %names(&partitions), cause, "partitions go");
        if !lost && let Err(error) = self.consumer.pause(&list) {
            tracing::debug!(%error, "pausing what is revoked");
        }
        self.revoking = Some(Revoking { list, partitions, deadline: Instant::now() + self.revoke_timeout });
    }

    pub(super) fn is_revoking(&self, partition: &Partition) -> bool {
        self.revoking.as_ref().is_some_and(|revoking| revoking.partitions.contains(partition))
    }

    /// Gives revoked partitions up once nothing of them is in flight and their offsets are committed,
    /// or time is up.
    pub(super) fn finish_revoking(&mut self) {
        let Some(revoking) = self.revoking.take() else { return };
        let lost = self.consumer.assignment_lost();
        if lost {
            // The session expired, before or meanwhile: it is too late to finish in good order.
            for owned in revoking.partitions.iter().filter_map(|partition| self.ledger.get(partition)) {
                owned.lease.end();
            }
        }
        let late = lost || Instant::now() >= revoking.deadline;
        let in_flight = |ledger: &Ledger| {
            revoking
                .partitions
                .iter()
                .any(|p| ledger.get(p).is_some_and(|owned| owned.windows_in_flight() > 0))
        };
        if !late && in_flight(&self.ledger) {
            self.revoking = Some(revoking);
            return;
        }
        if !late {
            self.commit(Some(&revoking.partitions));
        }
        let open = revoking.partitions.iter().any(|p| {
            self.ledger
                .get(p)
                .is_some_and(|owned| owned.published.is_some() && owned.published != owned.committed)
        });
        if !late && open {
            self.revoking = Some(revoking);
            return;
        }
        if late && in_flight(&self.ledger) {
            tracing::warn!(partitions = %names(&revoking.partitions), "windows in flight did not finish: dropped, not committed");
        }
        for partition in &revoking.partitions {
            self.ledger.remove(partition);
            self.lag.forget(partition, &self.wiring.metrics);
        }
        if let Err(error) = give_up(&self.consumer, &revoking.list) {
            tracing::warn!(%error, "partitions could not be given up");
        }
    }
}

fn partitions(list: &TopicPartitionList) -> Vec<Partition> {
    list.elements().iter().map(|e| Partition::new(e.topic(), e.partition())).collect()
}

fn names(partitions: &[Partition]) -> String {
    partitions.iter().map(Partition::to_string).collect::<Vec<_>>().join(" ")
}
