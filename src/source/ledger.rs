//! Which partitions are ours and how far each has come. Pure: no Kafka, no clock.
//!
//! A partition's offset moves only when a window that holds it is published, windows are published
//! in the order they were gathered, and a window of an earlier assignment counts no more.

use std::collections::{HashMap, VecDeque};

use crate::record::Partition;
use crate::window::Span;

/// One of our partitions.
#[derive(Debug, Clone)]
pub(super) struct Owned {
    pub partition: Partition,
    pub generation: u64,
    /// Where reading started: the committed offset, where there was one.
    pub start: Option<i64>,
    /// The offset after the last one published.
    pub published: Option<i64>,
    /// The offset last sent to be committed.
    sent: Option<i64>,
    /// The offset the group has.
    pub committed: Option<i64>,
    /// Of the oldest record of each window in flight: its timestamp.
    in_flight: VecDeque<Option<i64>>,
    /// Timestamp of the first record in the window that gathers.
    pub gathering: Option<i64>,
}

impl Owned {
    pub fn windows_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Timestamp of the oldest record read and not published.
    pub fn oldest(&self) -> Option<i64> {
        self.in_flight.front().copied().flatten().or(self.gathering)
    }

    /// All that was read is published.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.gathering.is_none()
    }
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    owned: HashMap<Partition, Owned>,
    generation: u64,
}

impl Ledger {
    /// A partition is assigned; returns its generation.
    pub fn assign(&mut self, partition: Partition, start: Option<i64>) -> u64 {
        self.generation += 1;
        let owned = Owned {
            partition: partition.clone(),
            generation: self.generation,
            start,
            published: None,
            sent: None,
            committed: start,
            in_flight: VecDeque::new(),
            gathering: None,
        };
        self.owned.insert(partition, owned);
        self.generation
    }

    /// A partition is gone.
    pub fn remove(&mut self, partition: &Partition) -> Option<Owned> {
        self.owned.remove(partition)
    }

    pub fn get(&self, partition: &Partition) -> Option<&Owned> {
        self.owned.get(partition)
    }

    pub fn get_mut(&mut self, partition: &Partition) -> Option<&mut Owned> {
        self.owned.get_mut(partition)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Owned> {
        self.owned.values()
    }

    /// A window closed and goes its way; `oldest` holds a timestamp a span.
    pub fn gathered(&mut self, spans: &[Span], oldest: &[Option<i64>]) {
        for (span, &timestamp) in spans.iter().zip(oldest) {
            if let Some(owned) = self.current(span) {
                owned.in_flight.push_back(timestamp);
                owned.gathering = None;
            }
        }
    }

    /// A window is published in full.
    pub fn published(&mut self, spans: &[Span]) {
        for span in spans {
            if let Some(owned) = self.current(span) {
                owned.in_flight.pop_front();
                owned.published = Some(span.last + 1);
            }
        }
    }

    /// What is published and not yet sent to be committed; it now counts as sent.
    pub fn take_commits(&mut self, only: Option<&[Partition]>) -> Vec<(Partition, i64)> {
        let mut offsets = Vec::new();
        for owned in self.owned.values_mut() {
            if only.is_some_and(|only| !only.contains(&owned.partition)) {
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
    pub fn commits_open(&self) -> bool {
        self.owned.values().any(|owned| owned.published.is_some() && owned.published != owned.committed)
    }

    fn current(&mut self, span: &Span) -> Option<&mut Owned> {
        self.owned.get_mut(&span.partition).filter(|owned| owned.generation == span.generation)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn span(number: i32, generation: u64, first: i64, last: i64) -> Span {
        Span { partition: Partition::new("t", number), generation, first, last }
    }

    #[test]
    fn commits_what_is_published_once() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let generation = ledger.assign(p.clone(), Some(5));
        ledger.gathered(&[span(0, generation, 5, 9)], &[Some(1)]);
        assert!(ledger.take_commits(None).is_empty(), "nothing is published yet");
        ledger.published(&[span(0, generation, 5, 9)]);
        assert_eq!(ledger.take_commits(None), [(p.clone(), 10)]);
        assert!(ledger.take_commits(None).is_empty());
        assert!(ledger.commits_open());
        ledger.committed(&p, 10, false);
        assert_eq!(ledger.take_commits(None), [(p.clone(), 10)], "a refused commit is made again");
        ledger.committed(&p, 10, true);
        assert!(!ledger.commits_open());
        assert_eq!(ledger.get(&p).unwrap().committed, Some(10));
    }

    #[test]
    fn a_window_of_an_earlier_assignment_does_not_count() {
        let mut ledger = Ledger::default();
        let p = Partition::new("t", 0);
        let old = ledger.assign(p.clone(), None);
        ledger.gathered(&[span(0, old, 0, 9)], &[None]);
        ledger.remove(&p);
        let new = ledger.assign(p.clone(), None);
        assert_ne!(old, new);
        ledger.published(&[span(0, old, 0, 9)]);
        assert!(ledger.take_commits(None).is_empty());
        assert_eq!(ledger.get(&p).unwrap().windows_in_flight(), 0);
    }

    proptest! {
        /// Windows of two partitions, published in order with rebalances between: what is committed
        /// never passes the first record that is not published, and never steps back.
        #[test]
        fn never_commits_past_what_is_published(steps in proptest::collection::vec((0u8..8, 0i32..2, 1i64..5), 1..120)) {
            let mut ledger = Ledger::default();
            // What the group has, and by our own books the first offset not published.
            let mut group = [0i64; 2];
            let mut read = [0i64; 2];
            let mut generation = [0u64; 2];
            let mut flying: VecDeque<Span> = VecDeque::new();
            for number in 0..2 {
                generation[number as usize] = ledger.assign(Partition::new("t", number), Some(0));
            }
            let mut done = [0i64; 2];
            for (what, number, size) in steps {
                let i = number as usize;
                match what {
                    0 => {
                        // Lost and assigned again: reading starts at what the group has.
                        ledger.remove(&Partition::new("t", number));
                        generation[i] = ledger.assign(Partition::new("t", number), Some(group[i]));
                        read[i] = group[i];
                        done[i] = group[i];
                    }
                    1..=3 => {
                        let span = span(number, generation[i], read[i], read[i] + size - 1);
                        read[i] += size;
                        ledger.gathered(std::slice::from_ref(&span), &[None]);
                        flying.push_back(span);
                    }
                    4 | 5 => {
                        if let Some(span) = flying.pop_front() {
                            ledger.published(std::slice::from_ref(&span));
                            let j = span.partition.number as usize;
                            if span.generation == generation[j] {
                                done[j] = span.last + 1;
                            }
                        }
                    }
                    _ => {
                        for (partition, offset) in ledger.take_commits(None) {
                            let taken = size > 1;
                            let j = partition.number as usize;
                            prop_assert!(offset <= done[j], "committed {offset}, published up to {}", done[j]);
                            if taken {
                                prop_assert!(offset >= group[j], "stepped back");
                                group[j] = offset;
                            }
                            ledger.committed(&partition, offset, taken);
                        }
                    }
                }
            }
        }
    }
}
