//! Which partitions are ours, and the progress of each. Pure: no Kafka, no clock.
//!
//! A partition's offset advances only when a window of its records is published. Windows are published
//! in the order they were gathered. A window of an earlier lease no longer counts.

use std::collections::{BTreeSet, HashMap, VecDeque};

use crate::flow::ModelVersion;
use crate::kafka::metadata::MadeBy;
use crate::kafka::native::TopicId;
use crate::lease::Lease;
use crate::record::Partition;
use crate::window::Span;

/// State of an assigned partition.
#[derive(Debug, Clone)]
pub(super) struct PartitionState {
    pub partition: Partition,
    pub lease: Lease,
    /// Id of the topic, if the broker gives ids.
    pub topic_id: Option<TopicId>,
    /// Why the partition is not read at present.
    pub hold: Option<Hold>,
    /// End offset of its log, as last seen.
    pub end: Option<i64>,
    /// The offset at which reading started; `None`: the log's start, because the group had no offset.
    pub start: Option<i64>,
    /// The offset after the last one read.
    next: Option<i64>,
    /// The offset after the last one published.
    pub published: Option<i64>,
    /// The offset last handed to a commit.
    sent: Option<i64>,
    /// The group's committed offset, as far as known.
    pub committed: Option<i64>,
    /// Its windows in flight, oldest first.
    in_flight: VecDeque<Pending>,
    /// Its records in the open window.
    gathering: Option<Pending>,
    /// Ranges of offsets (from, up to) at which no record was found.
    gaps: Vec<(i64, i64)>,
    /// Offsets of records on which inference timed out before.
    pub suspects: BTreeSet<i64>,
    /// Who made the predictions up to the last published record.
    pub made_by: MadeBy,
}

/// Why a partition is not read at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// Its topic does not exist: deleted, and perhaps recreated soon.
    TopicAbsent,
    /// It has a batch that can be neither read nor skipped.
    Unreadable,
    Revoked,
}

/// Records of one window, read and not published.
#[derive(Debug, Clone, Copy)]
struct Pending {
    first: i64,
    /// Timestamp of the first record, in milliseconds since the epoch.
    oldest: Option<i64>,
}

/// How a record's offset compares with the expected one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OffsetOrder {
    InOrder,
    /// The offset is lower than expected: the topic was recreated, or its log truncated.
    Backwards {
        expected: i64,
    },
}

impl PartitionState {
    fn new(partition: Partition, lease: Lease, start: Option<i64>) -> Self {
        Self {
            partition,
            lease,
            topic_id: None,
            hold: None,
            end: None,
            start,
            next: start,
            published: None,
            sent: None,
            committed: start,
            in_flight: VecDeque::new(),
            gathering: None,
            gaps: Vec::new(),
            suspects: BTreeSet::new(),
            made_by: MadeBy::default(),
        }
    }

    pub fn windows_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Timestamp of the oldest record read and not published, in milliseconds since the epoch.
    pub fn oldest(&self) -> Option<i64> {
        self.in_flight.front().or(self.gathering.as_ref()).and_then(|pending| pending.oldest)
    }

    /// Everything read is published.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.gathering.is_none()
    }

    /// The offset to read next; `None`: the log's first one.
    pub fn next(&self) -> Option<i64> {
        self.next
    }

    /// The first offset that is not published, where the next owner has to begin. `None` if nothing was
    /// read and the group has no offset.
    pub fn resume_at(&self) -> Option<i64> {
        self.published
            .or(self.start)
            .or_else(|| self.in_flight.front().or(self.gathering.as_ref()).map(|pending| pending.first))
    }

    /// The record is in the first window that is not published.
    pub fn is_in_next_window(&self, offset: i64) -> bool {
        let after = self.in_flight.get(1).or(self.gathering.as_ref());
        self.in_flight.front().is_some_and(|front| front.first <= offset)
            && after.is_none_or(|after| offset < after.first)
    }

    /// Notes a record that needs no processing.
    pub fn skip_record(&mut self, offset: i64) -> OffsetOrder {
        match self.next {
            Some(expected) if offset < expected => return OffsetOrder::Backwards { expected },
            Some(expected) if offset > expected => self.gaps.push((expected, offset)),
            _ => {}
        }
        self.next = Some(offset + 1);
        OffsetOrder::InOrder
    }

    /// Notes a record of the open window.
    pub fn read(&mut self, offset: i64, timestamp: Option<i64>) -> OffsetOrder {
        if let backwards @ OffsetOrder::Backwards { .. } = self.skip_record(offset) {
            return backwards;
        }
        self.gathering.get_or_insert(Pending { first: offset, oldest: timestamp });
        OffsetOrder::InOrder
    }

    /// Skips to `end`: the offsets before it hold no records, or none that can be read.
    pub fn skip_to(&mut self, end: i64) {
        // The next owner still has to read the records that were in the open window.
        if self.hold == Some(Hold::Revoked) {
            return;
        }
        self.next = self.next.max(Some(end));
    }

    /// Same as [`Self::skip_to`], and notes a gap: retention may have deleted these offsets.
    pub fn skip_deleted_to(&mut self, end: i64) {
        if let Some(next) = self.next.filter(|&next| next < end && self.hold != Some(Hold::Revoked)) {
            self.gaps.push((next, end));
        }
        self.skip_to(end);
    }

    /// Published offsets are not known to be committed.
    pub fn is_uncommitted(&self) -> bool {
        self.published.is_some() && self.published != self.committed
    }

    /// Counts everything read or skipped as published, if nothing is in flight.
    pub fn settle(&mut self) {
        let at = self.published.or(self.committed);
        if self.hold != Some(Hold::Revoked) && self.is_idle() && at < self.next {
            self.published = self.next;
        }
    }

    /// Stops reading a revoked partition. Its records in the open window go to the next owner.
    pub fn revoke(&mut self) {
        self.hold = Some(Hold::Revoked);
        if let Some(pending) = self.gathering.take() {
            self.next = Some(pending.first);
        }
    }

    /// Takes the gaps (from, up to) that retention caused: those that begin before `low`, the log's first
    /// offset now. Other gaps come from compaction and transactions.
    pub fn take_skipped(&mut self, low: i64) -> Vec<(i64, i64)> {
        let gaps = std::mem::take(&mut self.gaps);
        gaps.into_iter().filter(|&(from, _)| from < low).collect()
    }
}

/// A version of the model has followed another in a partition.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ModelChange {
    pub partition: Partition,
    /// The first offset that the new version has predicted.
    pub first: i64,
    pub before: ModelVersion,
    pub now: ModelVersion,
}

impl ModelChange {
    pub fn log(&self) {
        let Self { partition, first, before, now } = self;
        tracing::info!(
            %partition,
            first,
            model = now.model,
            digest = now.digest,
            model_before = before.model,
            digest_before = before.digest,
            "first predictions of another version of the model"
        );
    }
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    owned: HashMap<Partition, PartitionState>,
    generation: u64,
    /// Windows are committed by transactions.
    transactional: bool,
}

impl Ledger {
    pub fn new(transactional: bool) -> Self {
        Self { transactional, ..Self::default() }
    }

    /// Adds an assigned partition, read from `start`, and ends its earlier lease if there is one.
    pub fn assign(&mut self, partition: Partition, start: Option<i64>) -> Lease {
        self.generation += 1;
        let lease = Lease::new(self.generation);
        if let Some(before) =
            self.owned.insert(partition.clone(), PartitionState::new(partition, lease.clone(), start))
        {
            before.lease.end();
        }
        lease
    }

    /// Restarts an assigned partition at `offset`; `None`: at the log's start. Its windows in flight may still be
    /// published, but no longer advance its offset.
    pub fn renew(&mut self, partition: Partition, offset: Option<i64>) -> &mut PartitionState {
        self.generation += 1;
        let mut renewed = PartitionState::new(partition.clone(), Lease::new(self.generation), offset);
        if let Some(before) = self.owned.remove(&partition) {
            renewed.topic_id = before.topic_id;
            renewed.hold = before.hold.filter(|hold| *hold == Hold::Revoked);
            if self.transactional {
                // A transaction would commit offsets of the old log.
                before.lease.end();
            }
        }
        self.owned.entry(partition).insert_entry(renewed).into_mut()
    }

    /// Removes a partition and ends its lease.
    pub fn remove(&mut self, partition: &Partition) {
        if let Some(owned) = self.owned.remove(partition) {
            owned.lease.end();
        }
    }

    pub fn get(&self, partition: &Partition) -> Option<&PartitionState> {
        self.owned.get(partition)
    }

    pub fn get_mut(&mut self, partition: &Partition) -> Option<&mut PartitionState> {
        self.owned.get_mut(partition)
    }

    pub fn iter(&self) -> impl Iterator<Item = &PartitionState> {
        self.owned.values()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut PartitionState> {
        self.owned.values_mut()
    }

    /// Marks a closed window as in flight.
    pub fn gathered(&mut self, spans: &[Span]) {
        for span in spans {
            if let Some(owned) = self.current(span) {
                let pending = owned.gathering.take().unwrap_or(Pending { first: span.first, oldest: None });
                owned.in_flight.push_back(pending);
            }
        }
    }

    /// Leaves the last window of these partitions to their next owners, and stops reading them.
    pub fn left(&mut self, spans: &[Span]) {
        for span in spans {
            if let Some(owned) = self.current(span) {
                owned.revoke();
                owned.in_flight.pop_back();
                owned.next = Some(span.first);
            }
        }
    }

    /// Marks a window as published. `committed`: the same transaction has committed its offsets. Returns where a version
    /// of the model has followed another.
    pub fn published(&mut self, spans: &[Span], committed: bool) -> Vec<ModelChange> {
        let mut changes = Vec::new();
        for span in spans {
            if let Some(owned) = self.current(span) {
                owned.in_flight.pop_front();
                let next = Some(span.last + 1);
                owned.published = next;
                if committed {
                    (owned.sent, owned.committed) = (next, next);
                }
                owned.suspects = owned.suspects.split_off(&(span.last + 1));
                let made_by = &span.metadata.made_by;
                let before = std::mem::replace(&mut owned.made_by, made_by.clone()).version;
                if !before.digest.is_empty() && before.digest != made_by.version.digest {
                    changes.push(ModelChange {
                        partition: span.partition.clone(),
                        first: span.first,
                        before,
                        now: made_by.version.clone(),
                    });
                }
            }
        }
        changes
    }

    /// Takes the published offsets that are not handed to a commit yet. With transactions these are skipped offsets,
    /// and only of idle partitions: else this commit could land after a transaction's and set the offset back.
    pub fn take_commits(&mut self, only: Option<&[Partition]>) -> Vec<(Partition, i64)> {
        let mut offsets = Vec::new();
        for owned in self.owned.values_mut() {
            if only.is_some_and(|only| !only.contains(&owned.partition)) {
                continue;
            }
            owned.settle();
            if self.transactional && !owned.is_idle() {
                continue;
            }
            if let Some(published) = owned.published.filter(|&offset| owned.sent != Some(offset)) {
                owned.sent = Some(published);
                offsets.push((owned.partition.clone(), published));
            }
        }
        offsets.sort();
        offsets
    }

    /// Notes the outcome of a commit. If it failed (not `taken`), the offset is committed again.
    pub fn committed(&mut self, partition: &Partition, offset: i64, taken: bool) {
        if let Some(owned) = self.owned.get_mut(partition) {
            if taken {
                owned.committed = owned.committed.max(Some(offset));
            } else if owned.sent == Some(offset) {
                owned.sent = None;
            }
        }
    }

    /// Whether a commit is in flight or still to be made.
    pub fn commits_open(&mut self) -> bool {
        self.owned.values_mut().any(|owned| {
            owned.settle();
            owned.is_uncommitted()
        })
    }

    fn current(&mut self, span: &Span) -> Option<&mut PartitionState> {
        self.owned.get_mut(&span.partition).filter(|owned| owned.lease == span.lease)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn span(number: i32, lease: &Lease, first: i64, last: i64) -> Span {
        Span {
            partition: Partition::new("t", number),
            lease: lease.clone(),
            first,
            last,
            metadata: Default::default(),
        }
    }

    fn read(ledger: &mut Ledger, partition: &Partition, offsets: std::ops::RangeInclusive<i64>) {
        for offset in offsets {
            assert_eq!(ledger.get_mut(partition).unwrap().read(offset, Some(offset)), OffsetOrder::InOrder);
        }
    }

    #[test]
    fn a_revocation_does_not_skip_records_of_the_open_window() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let lease = ledger.assign(p.clone(), Some(0));
        read(&mut ledger, &p, 0..=9);
        ledger.gathered(&[span(0, &lease, 0, 9)]);
        // In the open window.
        read(&mut ledger, &p, 10..=14);
        ledger.get_mut(&p).unwrap().revoke();
        ledger.published(&[span(0, &lease, 0, 9)], false);
        let owned = ledger.get_mut(&p).unwrap();
        // The end of a drain, and of a damaged batch.
        owned.skip_to(15);
        owned.skip_deleted_to(15);
        owned.settle();
        assert_eq!(ledger.take_commits(None), [(p, 10)]);
    }

    #[test]
    fn a_renewed_partition_stays_revoked_and_ends_its_lease_with_transactions() {
        for transactional in [false, true] {
            let mut ledger = Ledger::new(transactional);
            let p = Partition::new("t", 0);
            let lease = ledger.assign(p.clone(), Some(5));
            ledger.get_mut(&p).unwrap().revoke();
            ledger.renew(p.clone(), None);
            assert_eq!(ledger.get(&p).unwrap().hold, Some(Hold::Revoked));
            assert_eq!(!lease.is_held(), transactional, "its offsets are those of the old log");
            ledger.get_mut(&p).unwrap().hold = Some(Hold::TopicAbsent);
            assert_eq!(ledger.renew(p, None).hold, None);
        }
    }

    #[test]
    fn skipped_offsets_count_as_deleted_if_the_log_begins_later() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        ledger.assign(p.clone(), Some(40));
        let owned = ledger.get_mut(&p).unwrap();
        owned.skip_deleted_to(100);
        assert_eq!((owned.next(), owned.take_skipped(100)), (Some(100), vec![(40, 100)]));
        owned.skip_deleted_to(101);
        assert_eq!(owned.take_skipped(100), [], "the marker of a transaction");
    }

    #[test]
    fn commits_what_is_published_once() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let lease = ledger.assign(p.clone(), Some(5));
        read(&mut ledger, &p, 5..=9);
        ledger.gathered(&[span(0, &lease, 5, 9)]);
        assert!(ledger.take_commits(None).is_empty(), "nothing is published yet");
        ledger.published(&[span(0, &lease, 5, 9)], false);
        assert_eq!(ledger.take_commits(None), [(p.clone(), 10)]);
        assert!(ledger.take_commits(None).is_empty());
        assert!(ledger.commits_open());
        ledger.committed(&p, 10, false);
        assert_eq!(ledger.take_commits(None), [(p.clone(), 10)], "a failed commit is retried");
        ledger.committed(&p, 10, true);
        assert!(!ledger.commits_open());
        assert_eq!(ledger.get(&p).unwrap().committed, Some(10));
    }

    #[test]
    fn what_a_transaction_committed_is_not_committed_again() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let lease = ledger.assign(p.clone(), None);
        read(&mut ledger, &p, 3..=4);
        ledger.gathered(&[span(0, &lease, 3, 4)]);
        ledger.published(&[span(0, &lease, 3, 4)], true);
        assert!(ledger.take_commits(None).is_empty() && !ledger.commits_open());
        assert_eq!(ledger.get(&p).unwrap().committed, Some(5));
    }

    #[test]
    fn a_window_of_an_earlier_lease_does_not_count() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let old = ledger.assign(p.clone(), None);
        read(&mut ledger, &p, 0..=9);
        ledger.gathered(&[span(0, &old, 0, 9)]);
        ledger.remove(&p);
        assert!(!old.is_held());
        let new = ledger.assign(p.clone(), None);
        assert_ne!(old, new);
        ledger.published(&[span(0, &old, 0, 9)], false);
        assert!(ledger.take_commits(None).is_empty());
        assert_eq!(ledger.get(&p).unwrap().windows_in_flight(), 0);
    }

    #[test]
    fn gaps_that_retention_left_are_told_from_those_of_compaction() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        ledger.assign(p.clone(), Some(10));
        let owned = ledger.get_mut(&p).unwrap();
        owned.read(50, None);
        owned.read(53, None);
        assert_eq!(owned.take_skipped(50), [(10, 50)]);
        assert!(owned.take_skipped(50).is_empty());
        assert_eq!(owned.read(20, None), OffsetOrder::Backwards { expected: 54 });
        assert_eq!(ledger.renew(p, Some(20)).read(20, None), OffsetOrder::InOrder);
    }

    #[test]
    fn the_next_window_is_the_first_that_is_not_published() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let lease = ledger.assign(p.clone(), Some(0));
        for (first, last) in [(0, 4), (5, 9)] {
            read(&mut ledger, &p, first..=last);
            ledger.gathered(&[span(0, &lease, first, last)]);
        }
        read(&mut ledger, &p, 10..=11);
        let next = |ledger: &Ledger| {
            let owned = ledger.get(&p).unwrap();
            (0..12).filter(|&offset| owned.is_in_next_window(offset)).collect::<Vec<_>>()
        };
        assert_eq!(next(&ledger), [0, 1, 2, 3, 4]);
        ledger.published(&[span(0, &lease, 0, 4)], false);
        assert_eq!(next(&ledger), [5, 6, 7, 8, 9]);
        ledger.published(&[span(0, &lease, 5, 9)], false);
        assert!(next(&ledger).is_empty(), "the last one is still open");
    }

    #[test]
    fn a_window_left_to_the_next_owner_is_not_skipped() {
        let mut ledger = Ledger::new(true);
        let p = Partition::new("t", 0);
        let lease = ledger.assign(p.clone(), Some(0));
        for (first, last) in [(0, 4), (5, 9)] {
            read(&mut ledger, &p, first..=last);
            ledger.gathered(&[span(0, &lease, first, last)]);
        }
        ledger.left(&[span(0, &lease, 5, 9)]);
        ledger.published(&[span(0, &lease, 0, 4)], true);
        assert!(!ledger.commits_open() && ledger.take_commits(None).is_empty());
        let owned = ledger.get(&p).unwrap();
        assert_eq!((owned.committed, owned.next(), owned.is_idle()), (Some(5), Some(5), true));
    }

    #[test]
    fn a_new_version_of_the_model_begins_with_its_first_offset() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let lease = ledger.assign(p.clone(), Some(0));
        let version =
            |name: &str| ModelVersion { model: name.to_owned(), digest: format!("digest of {name}") };
        let mut made_by = MadeBy::default();
        let mut publish = |first, last, name: &str| {
            made_by = made_by.followed_by(&version(name), first);
            read(&mut ledger, &p, first..=last);
            let mut span = span(0, &lease, first, last);
            span.metadata.made_by = made_by.clone();
            ledger.gathered(std::slice::from_ref(&span));
            let changes = ledger.published(&[span], false);
            (changes, ledger.get(&p).unwrap().made_by.since)
        };
        assert_eq!(publish(0, 4, "a"), (vec![], Some(0)), "nobody was before it");
        assert_eq!(publish(5, 9, "a"), (vec![], Some(0)));
        let change = ModelChange { partition: p.clone(), first: 10, before: version("a"), now: version("b") };
        assert_eq!(publish(10, 14, "b"), (vec![change], Some(10)));
        assert_eq!(publish(15, 19, "b"), (vec![], Some(10)));
    }

    #[test]
    fn suspects_are_dropped_once_they_are_published() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let lease = ledger.assign(p.clone(), Some(0));
        ledger.get_mut(&p).unwrap().suspects = [3, 8].into();
        ledger.published(&[span(0, &lease, 0, 5)], false);
        assert_eq!(ledger.get(&p).unwrap().suspects, [8].into());
    }

    /// Events of a group member, in any order.
    #[derive(Debug, Clone)]
    enum Step {
        /// Unassigned or lost, then assigned again; if lost, another member published `elsewhere` records.
        Reassign { partition: usize, lost: bool, elsewhere: i64 },
        /// Records come in, and their window closes.
        Gather { partition: usize, records: i64 },
        /// Offsets without records are skipped.
        Pass { partition: usize, offsets: i64 },
        /// Records come in, and the partition is revoked before their window closes; it comes back at once.
        Revoke { partition: usize, records: i64 },
        /// The oldest window in flight is acknowledged.
        Acknowledge,
        /// Offsets are committed; `taken`: the broker accepts them.
        Commit { taken: bool },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            1 => (0..2usize, any::<bool>(), 0..3i64)
                .prop_map(|(partition, lost, elsewhere)| Step::Reassign { partition, lost, elsewhere }),
            4 => (0..2usize, 1..5i64).prop_map(|(partition, records)| Step::Gather { partition, records }),
            1 => (0..2usize, 1..3i64).prop_map(|(partition, offsets)| Step::Pass { partition, offsets }),
            1 => (0..2usize, 1..3i64).prop_map(|(partition, records)| Step::Revoke { partition, records }),
            3 => Just(Step::Acknowledge),
            3 => any::<bool>().prop_map(|taken| Step::Commit { taken }),
        ];
        proptest::collection::vec(step, 1..150)
    }

    proptest! {
        /// Compares the ledger with a model of the group: in any order of events, a committed offset never
        /// passes the first unpublished record and never steps back.
        #[test]
        fn commits_are_contiguous(steps in steps(), transactions in any::<bool>()) {
            let mut ledger = Ledger::new(transactions);
            let partitions = [Partition::new("t", 0), Partition::new("t", 1)];
            // For each partition: the group's offset, the published records, the next offset to read.
            let mut group = [0i64; 2];
            let mut published = [BTreeSet::new(), BTreeSet::new()];
            let mut at = [0i64; 2];
            let mut flying: VecDeque<Span> = VecDeque::new();
            for p in &partitions {
                ledger.assign(p.clone(), Some(0));
            }
            for step in steps {
                match step {
                    Step::Reassign { partition: i, lost, elsewhere } => {
                        let before = ledger.get(&partitions[i]).unwrap().lease.clone();
                        ledger.remove(&partitions[i]);
                        prop_assert!(!before.is_held());
                        if lost {
                            // The other owner read on from the group's offset.
                            published[i].extend(group[i]..group[i] + elsewhere);
                            group[i] += elsewhere;
                        }
                        ledger.assign(partitions[i].clone(), Some(group[i]));
                        at[i] = group[i];
                    }
                    Step::Gather { partition: i, records } => {
                        let owned = ledger.get_mut(&partitions[i]).unwrap();
                        let lease = owned.lease.clone();
                        for offset in at[i]..at[i] + records {
                            prop_assert_eq!(owned.read(offset, None), OffsetOrder::InOrder);
                        }
                        let span = span(i as i32, &lease, at[i], at[i] + records - 1);
                        at[i] += records;
                        ledger.gathered(std::slice::from_ref(&span));
                        flying.push_back(span);
                    }
                    Step::Pass { partition: i, offsets } => {
                        // They hold no records, so they count as published.
                        published[i].extend(at[i]..at[i] + offsets);
                        at[i] += offsets;
                        ledger.get_mut(&partitions[i]).unwrap().skip_to(at[i]);
                    }
                    Step::Revoke { partition: i, records } => {
                        let owned = ledger.get_mut(&partitions[i]).unwrap();
                        for offset in at[i]..at[i] + records {
                            prop_assert_eq!(owned.read(offset, None), OffsetOrder::InOrder);
                        }
                        owned.revoke();
                        for (partition, offset) in ledger.take_commits(Some(&partitions[i..=i])) {
                            prop_assert!((0..offset).all(|o| published[i].contains(&o)), "{offset}");
                            group[i] = offset;
                            ledger.committed(&partition, offset, true);
                        }
                        ledger.remove(&partitions[i]);
                        ledger.assign(partitions[i].clone(), Some(group[i]));
                        at[i] = group[i];
                    }
                    Step::Acknowledge => {
                        // The sink publishes and commits only under a lease that is still held.
                        if let Some(span) = flying.pop_front() {
                            let i = span.partition.number as usize;
                            if span.lease.is_held() {
                                published[i].extend(span.first..=span.last);
                                if transactions {
                                    let gap = group[i]..span.first;
                                    prop_assert!(group[i] <= span.first && gap.clone().all(|o| published[i].contains(&o)),
                                        "a gap {gap:?}");
                                    group[i] = span.last + 1;
                                }
                            }
                            ledger.published(std::slice::from_ref(&span), transactions && span.lease.is_held());
                        }
                    }
                    Step::Commit { taken } => {
                        for (partition, offset) in ledger.take_commits(None) {
                            let i = partition.number as usize;
                            let idle = ledger.get(&partition).unwrap().is_idle();
                            prop_assert!(!transactions || idle, "the transaction commits it");
                            prop_assert!((0..offset).all(|o| published[i].contains(&o)), "{offset}");
                            if taken {
                                prop_assert!(offset >= group[i], "stepped back");
                                group[i] = offset;
                            }
                            ledger.committed(&partition, offset, taken);
                        }
                    }
                }
            }
        }
    }
}
