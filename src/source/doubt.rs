//! Doubt: detects recreated topics and damaged batches, and recovers from them.
//!
//! librdkafka handles neither. After a topic was deleted and recreated, it reads on at the old offset in the new topic,
//! so the records before it are never read. A batch that is damaged in the broker's file makes it fetch again and
//! again, or jump to an arbitrary offset. In both cases the source pauses all partitions, discards what is delivered
//! meanwhile, asks the cluster, and seeks to the ledger's offsets before it resumes.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::damage::Damage;
use super::ledger::Hold;
use super::lookup::{DamageReport, Question, Topics};
use super::serve::{Source, SourceError};
use crate::kafka::native::Identity;
use crate::record::{Partition, topics_of};

/// If a loop iteration takes longer, the process was suspended or starved, and topics are checked: one can be deleted
/// and recreated in less than half a second.
const STALE: Duration = Duration::from_millis(250);
/// Interval of topic checks; `topic.metadata.refresh.interval.ms` if that is shorter.
const TOPICS_INTERVAL: Duration = Duration::from_secs(5);
/// Interval of topic checks while an input topic is absent.
const HELD_INTERVAL: Duration = Duration::from_secs(1);

/// Interval of retries for partitions that cannot be read.
const UNREADABLE_INTERVAL: Duration = Duration::from_secs(10);

/// What has to be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// Whether the topics were recreated.
    Topics,
    /// Whether the next batch of each partition can be read.
    Damage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    None,
    Asking {
        topics: bool,
        damage: bool,
    },
    /// The client seeks to the ledger's offsets.
    Seeking,
}

#[derive(Debug)]
pub(super) struct Doubt {
    stage: Stage,
    /// Id of the last seek.
    seeks: u64,
    /// When [`Doubt::was_suspended`] was last called.
    turned: Instant,
    /// When topics were last asked for.
    asked: Instant,
    /// That question is not answered yet.
    waiting: bool,
    /// Interval of topic checks.
    every: Duration,
    /// When unreadable partitions were last retried.
    tried: Instant,
    /// That retry is not answered yet.
    trying: bool,
}

impl Doubt {
    /// `refresh`: `topic.metadata.refresh.interval.ms`, if it is set.
    pub fn new(now: Instant, refresh: Option<Duration>) -> Self {
        let every = refresh.map_or(TOPICS_INTERVAL, |refresh| refresh.min(TOPICS_INTERVAL));
        Self {
            stage: Stage::None,
            seeks: 0,
            turned: now,
            asked: now,
            waiting: false,
            every,
            tried: now,
            trying: false,
        }
    }

    /// A check or a seek is under way: messages delivered now are discarded.
    pub fn is_open(&self) -> bool {
        self.stage != Stage::None
    }

    /// Called on every loop iteration. True if the last call is so long ago (the process was suspended or starved) that
    /// topics may have been recreated.
    pub fn was_suspended(&mut self, now: Instant) -> bool {
        now.saturating_duration_since(std::mem::replace(&mut self.turned, now)) >= STALE
    }

    /// Whether the next topic check is due. `held`: a topic is absent.
    fn is_due(&self, held: bool, now: Instant) -> bool {
        let every = if held { HELD_INTERVAL } else { self.every };
        !self.waiting && now.saturating_duration_since(self.asked) >= every
    }

    /// Adds a cause; true if it is new.
    fn add(&mut self, cause: Cause) -> bool {
        let (topics, damage) = match self.stage {
            Stage::Asking { topics, damage } => (topics, damage),
            Stage::None | Stage::Seeking => (false, false),
        };
        let next = Stage::Asking {
            topics: topics || cause == Cause::Topics,
            damage: damage || cause == Cause::Damage,
        };
        std::mem::replace(&mut self.stage, next) != next
    }

    /// Marks a cause as answered; true if it was the last open one.
    fn answered(&mut self, cause: Cause) -> bool {
        let Stage::Asking { topics, damage } = &mut self.stage else { return false };
        match cause {
            Cause::Topics => *topics = false,
            Cause::Damage => *damage = false,
        }
        !*topics && !*damage
    }
}

impl Source {
    /// Pauses partitions and discards what the client delivers until the cluster has answered.
    pub(super) fn doubt(&mut self, cause: Cause) {
        if !self.doubt.add(cause) {
            return;
        }
        tracing::debug!(?cause, "paused: asking the cluster before reading on");
        self.pause();
        match cause {
            Cause::Topics => self.ask_for_topics(),
            Cause::Damage => {
                let next = |owned: &super::ledger::PartitionState| (owned.partition.clone(), owned.next());
                self.lookup.ask(Question::Damage(self.ledger.iter().map(next).collect()));
            }
        }
    }

    /// Periodic checks: retries unreadable partitions, and asks for the topics when due.
    pub(super) fn run_periodic_checks(&mut self) {
        self.retry_unreadable();
        let held = self.ledger.iter().any(|owned| owned.hold == Some(Hold::TopicAbsent));
        if self.doubt.is_due(held || self.subscription.is_empty(), Instant::now()) {
            self.ask_for_topics();
        }
    }

    pub(super) fn ask_for_topics(&mut self) {
        (self.doubt.asked, self.doubt.waiting) = (Instant::now(), true);
        let mut topics = topics_of(self.ledger.iter().map(|owned| &owned.partition));
        // A drain also checks topics whose partitions all belong to other members.
        topics.extend(self.bounds.drain.iter().flat_map(|drain| drain.open_topics()));
        // The client also knows the topics whose partitions other members have; it may get them later.
        topics.extend(self.subscription.topics().iter().cloned());
        topics.sort();
        topics.dedup();
        self.lookup.ask(Question::Topics(topics));
    }

    pub(super) fn on_topics(&mut self, topics: Option<Topics>) -> Result<(), SourceError> {
        self.doubt.waiting = false;
        let Some(topics) = topics else {
            // Partitions stay paused until there is an answer.
            if matches!(self.doubt.stage, Stage::Asking { topics: true, .. }) {
                self.ask_for_topics();
            }
            return Ok(());
        };
        if let Some(drain) = &self.bounds.drain {
            drain.check_topics(&topics.identities, Instant::now())?;
        }
        if let Some(matching) = topics.matching {
            self.subscribe_to(matching)?;
        }
        for (topic, identity) in &topics.identities {
            if let Identity::Id(id) = identity {
                self.fetching.topic_is(topic, id);
            }
        }
        let (mut again, mut back) = (Vec::new(), false);
        for owned in self.ledger.iter_mut() {
            let held = owned.hold == Some(Hold::TopicAbsent);
            match topics.identities.get(&*owned.partition.topic) {
                Some(Identity::Absent) if owned.hold.is_none() => {
                    owned.hold = Some(Hold::TopicAbsent);
                    tracing::warn!(
                        topic = &*owned.partition.topic,
                        partition = owned.partition.number,
                        "the topic no longer exists: waiting until it is recreated"
                    );
                }
                Some(Identity::Id(id)) => {
                    match owned.topic_id.replace(id.clone()) {
                        Some(before) if before != *id => again.push((owned.partition.clone(), before)),
                        _ => {}
                    }
                    if held {
                        owned.hold = None;
                        back = true;
                    }
                }
                _ => {}
            }
        }
        let changed = !again.is_empty();
        for (partition, before) in again {
            self.recreated(partition, &before.to_string());
        }
        // A periodic check can find this too: pause and seek now. A seek under way has the old offsets: repeat it.
        if (changed || back) && matches!(self.doubt.stage, Stage::None | Stage::Seeking) {
            self.doubt.stage = Stage::Asking { topics: true, damage: false };
            self.pause();
        }
        if self.doubt.answered(Cause::Topics) {
            self.seek();
        }
        Ok(())
    }

    /// The topic was deleted and recreated: reads the partition from its start.
    fn recreated(&mut self, partition: Partition, before: &str) {
        let at = self.ledger.get(&partition).and_then(super::ledger::PartitionState::next);
        let owned = self.ledger.renew(partition.clone(), None);
        let now = owned.topic_id.as_ref().map(ToString::to_string);
        self.count_recreated(&partition, at, before, now.as_deref());
    }

    /// Counts and logs a recreated topic. `at`: the offset that was next; `before`, `now`: the topic's ids.
    pub(super) fn count_recreated(
        &self,
        partition: &Partition,
        at: Option<i64>,
        before: &str,
        now: Option<&str>,
    ) {
        self.context.metrics.topic_recreated.with_label_values(&[&*partition.topic]).inc();
        tracing::warn!(
            topic = &*partition.topic,
            partition = partition.number,
            offset = at,
            topic_id_before = before,
            topic_id = now,
            "the topic was deleted and recreated: reading from its start"
        );
    }

    pub(super) fn on_damage(&mut self, found: Vec<DamageReport>) {
        self.doubt.trying = false;
        let (mut back, mut ended) = (false, BTreeSet::new());
        for DamageReport { partition, at, from, damage } in found {
            let Some(owned) = self.ledger.get_mut(&partition) else { continue };
            if damage != Damage::Unknown && owned.hold == Some(Hold::Unreadable) {
                owned.hold = None;
                back = true;
            }
            match damage {
                Damage::None => {}
                // An outdated answer: the partition was revoked or renewed meanwhile.
                Damage::UpTo(_) if owned.next() != at || owned.hold == Some(Hold::Revoked) => {}
                Damage::UpTo(to) => {
                    owned.skip_to(to);
                    let bound = self.bounds.bound(&partition);
                    if bound.is_some_and(|bound| to >= bound) {
                        ended.insert(partition.clone());
                    }
                    self.count_lost(&partition, from, to);
                }
                Damage::Unknown if owned.hold.is_none() => {
                    owned.hold = Some(Hold::Unreadable);
                    tracing::error!(
                        topic = &*partition.topic,
                        partition = partition.number,
                        offset = from,
                        "the partition cannot be read at this offset: retrying"
                    );
                    self.context.health.error(&format!("{partition}: cannot be read at offset {from}"));
                }
                Damage::Unknown => {}
            }
        }
        self.end(&ended);
        if back && !self.doubt.is_open() {
            self.doubt.stage = Stage::Asking { topics: false, damage: true };
            self.pause();
        }
        if self.doubt.answered(Cause::Damage) {
            self.seek();
        }
    }

    /// Retries partitions that could not be read.
    fn retry_unreadable(&mut self) {
        if self.doubt.trying || self.doubt.tried.elapsed() < UNREADABLE_INTERVAL {
            return;
        }
        self.doubt.tried = Instant::now();
        let held = self.ledger.iter().filter(|owned| owned.hold == Some(Hold::Unreadable));
        let places: Vec<_> = held.map(|owned| (owned.partition.clone(), owned.next())).collect();
        if !places.is_empty() {
            self.doubt.trying = true;
            self.lookup.ask(Question::Damage(places));
        }
    }

    fn count_lost(&self, partition: &Partition, from: i64, to: i64) {
        self.context
            .metrics
            .skipped
            .with_label_values(&[&*partition.topic, "damaged"])
            .inc_by((to - from) as u64);
        self.context
            .health
            .error(&format!("{partition}: offsets {from} to {} are damaged on the broker", to - 1));
        tracing::error!(
            topic = &*partition.topic,
            partition = partition.number,
            from,
            to,
            "data lost: the broker's batches of these offsets fail their checksum and are skipped"
        );
    }

    /// Seeks the client to the ledger's offsets.
    fn seek(&mut self) {
        let wanted = self.ledger.iter().filter(|owned| owned.hold.is_none());
        let to: Vec<(Partition, Option<i64>)> =
            wanted.map(|owned| (owned.partition.clone(), owned.next())).collect();
        self.doubt.seeks += 1;
        if to.is_empty() {
            return self.settle_doubt();
        }
        self.doubt.stage = Stage::Seeking;
        self.lookup.ask(Question::Seek { id: self.doubt.seeks, to });
    }

    pub(super) fn on_sought(&mut self, id: u64, failed: &[Partition]) {
        if self.doubt.stage != Stage::Seeking || id != self.doubt.seeks {
            return;
        }
        // A partition that is no longer ours need not seek.
        if failed.iter().any(|partition| self.ledger.get(partition).is_some_and(|owned| owned.hold.is_none()))
        {
            return self.seek();
        }
        self.settle_doubt();
    }

    fn settle_doubt(&mut self) {
        self.doubt.stage = Stage::None;
        if self.may_resume() {
            self.resume();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspended_process_checks_its_topics() {
        let start = Instant::now();
        let mut doubt = Doubt::new(start, None);
        assert!(!doubt.was_suspended(start + Duration::from_millis(200)));
        assert!(!doubt.was_suspended(start + Duration::from_millis(400)), "counted from the last call");
        assert!(doubt.was_suspended(start + Duration::from_millis(700)));
    }

    #[test]
    fn is_over_once_all_causes_are_answered() {
        let mut doubt = Doubt::new(Instant::now(), None);
        assert!(doubt.add(Cause::Topics) && doubt.is_open());
        assert!(!doubt.add(Cause::Topics), "asked already");
        assert!(doubt.add(Cause::Damage));
        assert!(!doubt.answered(Cause::Topics));
        assert!(doubt.answered(Cause::Damage));
        doubt.stage = Stage::Seeking;
        assert!(!doubt.answered(Cause::Topics), "a late answer");
        assert!(doubt.add(Cause::Topics), "doubted again while seeking");
        assert_eq!(doubt.stage, Stage::Asking { topics: true, damage: false });
    }

    #[test]
    fn topics_are_checked_periodically() {
        let start = Instant::now();
        let mut doubt = Doubt::new(start, None);
        assert!(!doubt.is_due(false, start + Duration::from_secs(4)));
        assert!(doubt.is_due(false, start + Duration::from_secs(5)));
        assert!(doubt.is_due(true, start + Duration::from_secs(1)), "a partition waits");
        let often = Doubt::new(start, Some(Duration::from_secs(2)));
        assert!(often.is_due(false, start + Duration::from_secs(2)));
        doubt.waiting = true;
        assert!(!doubt.is_due(true, start + Duration::from_secs(60)), "asked already");
    }
}
