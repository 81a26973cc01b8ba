//! Which partitions are ours and how far each has come. Pure: no Kafka, no clock.
//!
//! A partition's offset moves only when a window that holds it is published, windows are published
//! in the order they were gathered, and a window of an earlier lease counts no more.

use std::collections::{BTreeSet, HashMap, VecDeque};

use crate::kafka::native::TopicId;
use crate::lease::Lease;
use crate::record::Partition;
use crate::window::Span;

/// One of our partitions.
#[derive(Debug, Clone)]
pub(super) struct PartitionState {
    pub partition: Partition,
    pub lease: Lease,
    /// Which topic stands behind the name, where the broker gives ids.
    pub topic_id: Option<TopicId>,
    /// Why it is not read now.
    pub hold: Option<Hold>,
    /// The end of its log when it was last seen.
    pub end: Option<i64>,
    /// Where reading started: the committed offset, where there was one.
    pub start: Option<i64>,
    /// The offset after the last one read.
    next: Option<i64>,
    /// The offset after the last one published.
    pub published: Option<i64>,
    /// The offset last sent to be committed.
    sent: Option<i64>,
    /// The offset the group has.
    pub committed: Option<i64>,
    in_flight: VecDeque<Pending>,
    /// What the window that gathers holds of it.
    gathering: Option<Pending>,
    /// Offsets that were not there when their turn came: from, up to.
    gaps: Vec<(i64, i64)>,
    /// Records on which inference timed out the last time.
    pub suspects: BTreeSet<i64>,
}

/// Why a partition is not read for the time being.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// Its topic does not exist: deleted, and perhaps recreated soon.
    TopicAbsent,
    /// It has a batch that can neither be read nor passed.
    Unreadable,
    Revoked,
}

/// Records read and not published.
#[derive(Debug, Clone, Copy)]
struct Pending {
    first: i64,
    /// Timestamp of the oldest.
    oldest: Option<i64>,
}

/// What a record's offset says beside itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    InOrder,
    /// The partition starts again: its topic was made anew, or its log was cut.
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
        }
    }

    pub fn windows_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Timestamp of the oldest record read and not published.
    pub fn oldest(&self) -> Option<i64> {
        self.in_flight.front().or(self.gathering.as_ref()).and_then(|pending| pending.oldest)
    }

    /// All that was read is published.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.gathering.is_none()
    }

    /// The offset that is read next; `None`: the first one that is there.
    pub fn next(&self) -> Option<i64> {
        self.next
    }

    /// The first offset that is not published: where whoever owns it next has to begin. `None` where
    /// nothing was read and the group has no offset.
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

    /// A record comes in that nothing is to be done about.
    pub fn pass_over(&mut self, offset: i64) -> Read {
        match self.next {
            Some(expected) if offset < expected => return Read::Backwards { expected },
            Some(expected) if offset > expected => self.gaps.push((expected, offset)),
            _ => {}
        }
        self.next = Some(offset + 1);
        Read::InOrder
    }

    /// A record comes in; it belongs to the window that gathers.
    pub fn read(&mut self, offset: i64, timestamp: Option<i64>) -> Read {
        if let backwards @ Read::Backwards { .. } = self.pass_over(offset) {
            return backwards;
        }
        self.gathering.get_or_insert(Pending { first: offset, oldest: timestamp });
        Read::InOrder
    }

    /// What lies before `end` is passed: it holds no records, or none that can be read.
    pub fn skip_to(&mut self, end: i64) {
        // What the window that gathered held of it is still to be read, by the next owner.
        if self.hold == Some(Hold::Revoked) {
            return;
        }
        self.next = self.next.max(Some(end));
    }

    /// The same, of what the log does not hold: retention may have deleted it.
    pub fn pass_to(&mut self, end: i64) {
        if let Some(next) = self.next.filter(|&next| next < end && self.hold != Some(Hold::Revoked)) {
            self.gaps.push((next, end));
        }
        self.skip_to(end);
    }

    /// Some is published, and not known to be committed.
    pub fn is_uncommitted(&self) -> bool {
        self.published.is_some() && self.published != self.committed
    }

    /// Once nothing is under way, all that was read or passed counts as published.
    pub fn settle(&mut self) {
        let at = self.published.or(self.committed);
        if self.hold != Some(Hold::Revoked) && self.is_idle() && at < self.next {
            self.published = self.next;
        }
    }

    /// It is revoked: what the window that gathers held of it goes to the next owner, and nothing more is read.
    pub fn revoke(&mut self) {
        self.hold = Some(Hold::Revoked);
        if let Some(pending) = self.gathering.take() {
            self.next = Some(pending.first);
        }
    }

    /// Offsets that retention had deleted before their turn came, `low` being the log's first offset
    /// now: from, up to. Other gaps are what compaction and transactions leave.
    pub fn take_skipped(&mut self, low: i64) -> Vec<(i64, i64)> {
        let gaps = std::mem::take(&mut self.gaps);
        gaps.into_iter().filter(|&(from, _)| from < low).collect()
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

    /// A partition is assigned.
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

    /// A partition starts again, at `offset` or at the first record that is there, without having been away: what is
    /// in flight of it may still be published, and no longer counts for its offsets.
    pub fn renew(&mut self, partition: Partition, offset: Option<i64>) -> &mut PartitionState {
        self.generation += 1;
        let mut renewed = PartitionState::new(partition.clone(), Lease::new(self.generation), offset);
        if let Some(before) = self.owned.remove(&partition) {
            renewed.topic_id = before.topic_id;
            renewed.hold = before.hold.filter(|hold| *hold == Hold::Revoked);
            if self.transactional {
                // A transaction would commit its offsets, which are those of the log of before.
                before.lease.end();
            }
        }
        self.owned.entry(partition).insert_entry(renewed).into_mut()
    }

    /// A partition is gone.
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

    /// A window closed and goes its way.
    pub fn gathered(&mut self, spans: &[Span]) {
        for span in spans {
            if let Some(owned) = self.current(span) {
                let pending = owned.gathering.take().unwrap_or(Pending { first: span.first, oldest: None });
                owned.in_flight.push_back(pending);
            }
        }
    }

    /// The last window of these partitions is left to their next owners: nothing more of them is read.
    pub fn left(&mut self, spans: &[Span]) {
        for span in spans {
            if let Some(owned) = self.current(span) {
                owned.revoke();
                owned.in_flight.pop_back();
                owned.next = Some(span.first);
            }
        }
    }

    /// A window is published in full; `committed` with its offsets, where both were one transaction.
    pub fn published(&mut self, spans: &[Span], committed: bool) {
        for span in spans {
            if let Some(owned) = self.current(span) {
                owned.in_flight.pop_front();
                let next = Some(span.last + 1);
                owned.published = next;
                if committed {
                    (owned.sent, owned.committed) = (next, next);
                }
                owned.suspects = owned.suspects.split_off(&(span.last + 1));
            }
        }
    }

    /// What is published and not yet sent to be committed; it now counts as sent. Beside transactions that is what was
    /// passed, and only while none is under way: the commit could come after the transaction's and step back.
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

    /// The group has, or has not, taken an offset. What it has not is sent again.
    pub fn committed(&mut self, partition: &Partition, offset: i64, taken: bool) {
        if let Some(owned) = self.owned.get_mut(partition) {
            if taken {
                owned.committed = owned.committed.max(Some(offset));
            } else if owned.sent == Some(offset) {
                owned.sent = None;
            }
        }
    }

    /// Whether a commit is under way or still to be made.
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
            assert_eq!(ledger.get_mut(partition).unwrap().read(offset, Some(offset)), Read::InOrder);
        }
    }

    #[test]
    fn what_a_revocation_takes_from_the_open_window_is_not_passed() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let lease = ledger.assign(p.clone(), Some(0));
        read(&mut ledger, &p, 0..=9);
        ledger.gathered(&[span(0, &lease, 0, 9)]);
        // In the window that gathers.
        read(&mut ledger, &p, 10..=14);
        ledger.get_mut(&p).unwrap().revoke();
        ledger.published(&[span(0, &lease, 0, 9)], false);
        let owned = ledger.get_mut(&p).unwrap();
        // The end of a drain, and of a batch that is damaged.
        owned.skip_to(15);
        owned.pass_to(15);
        owned.settle();
        assert_eq!(ledger.take_commits(None), [(p, 10)]);
    }

    #[test]
    fn what_is_renewed_stays_revoked_and_ends_its_lease_in_a_transaction() {
        for transactional in [false, true] {
            let mut ledger = Ledger::new(transactional);
            let p = Partition::new("t", 0);
            let lease = ledger.assign(p.clone(), Some(5));
            ledger.get_mut(&p).unwrap().revoke();
            ledger.renew(p.clone(), None);
            assert_eq!(ledger.get(&p).unwrap().hold, Some(Hold::Revoked));
            assert_eq!(!lease.is_held(), transactional, "its offsets are those of the log of before");
            ledger.get_mut(&p).unwrap().hold = Some(Hold::TopicAbsent);
            assert_eq!(ledger.renew(p, None).hold, None);
        }
    }

    #[test]
    fn what_is_passed_counts_as_deleted_where_the_log_begins_later() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        ledger.assign(p.clone(), Some(40));
        let owned = ledger.get_mut(&p).unwrap();
        owned.pass_to(100);
        assert_eq!((owned.next(), owned.take_skipped(100)), (Some(100), vec![(40, 100)]));
        owned.pass_to(101);
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
        assert_eq!(ledger.take_commits(None), [(p.clone(), 10)], "a refused commit is recreated");
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
        assert_eq!(owned.read(20, None), Read::Backwards { expected: 54 });
        assert_eq!(ledger.renew(p, Some(20)).read(20, None), Read::InOrder);
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
        assert!(next(&ledger).is_empty(), "that one still gathers");
    }

    #[test]
    fn a_window_that_is_left_is_not_passed() {
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
    fn suspects_go_once_they_are_published() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let lease = ledger.assign(p.clone(), Some(0));
        ledger.get_mut(&p).unwrap().suspects = [3, 8].into();
        ledger.published(&[span(0, &lease, 0, 5)], false);
        assert_eq!(ledger.get(&p).unwrap().suspects, [8].into());
    }

    /// What happens to a group's member, in any order.
    #[derive(Debug, Clone)]
    enum Step {
        /// Given up in good order, or lost; assigned again, perhaps after another member went on.
        Reassign { partition: usize, lost: bool, elsewhere: i64 },
        /// Records come in, and their window closes.
        Gather { partition: usize, records: i64 },
        /// Offsets without records are passed.
        Pass { partition: usize, offsets: i64 },
        /// Records come in, and the partition is revoked before their window closes; it comes back at once.
        Revoke { partition: usize, records: i64 },
        /// The oldest window in flight is acknowledged.
        Acknowledge,
        /// Offsets are committed; the broker takes them or not.
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
        /// A model of the group beside the ledger: whatever the order, what is committed never passes
        /// the first record that is not published, never steps back, and at the end nothing is missing.
        #[test]
        fn commits_are_contiguous(steps in steps(), transactions in any::<bool>()) {
            let mut ledger = Ledger::new(transactions);
            let partitions = [Partition::new("t", 0), Partition::new("t", 1)];
            // What the group has; which records were published at all; where reading stands.
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
                            // Whoever had it meanwhile went on from what the group has.
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
                            prop_assert_eq!(owned.read(offset, None), Read::InOrder);
                        }
                        let span = span(i as i32, &lease, at[i], at[i] + records - 1);
                        at[i] += records;
                        ledger.gathered(std::slice::from_ref(&span));
                        flying.push_back(span);
                    }
                    Step::Pass { partition: i, offsets } => {
                        // Nobody will ever publish them.
                        published[i].extend(at[i]..at[i] + offsets);
                        at[i] += offsets;
                        ledger.get_mut(&partitions[i]).unwrap().skip_to(at[i]);
                    }
                    Step::Revoke { partition: i, records } => {
                        let owned = ledger.get_mut(&partitions[i]).unwrap();
                        for offset in at[i]..at[i] + records {
                            prop_assert_eq!(owned.read(offset, None), Read::InOrder);
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
                        // The sink sends, and commits, only what is still held.
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
