//! Sets of offsets, and reading a range of them back: for `audit` and `compare`.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::message::{BorrowedMessage, Message};

use crate::kafka::consumer::Reader;
use crate::kafka::range::{self, Read};
use crate::record::Partition;

/// How long to wait for the next record from Kafka before giving up.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);
/// Offset ranges that are shown per line.
const SHOWN: usize = 10;

/// Offsets as ranges: first and last offset, both inclusive.
pub(super) type List = Vec<(i64, i64)>;

/// Passes the records of a partition at offsets `from..to` to `take`.
///
/// # Errors
/// The brokers cannot be read from, or no record comes for [`SILENCE_TIMEOUT`].
pub(super) fn read(
    consumer: &Reader,
    partition: &Partition,
    from: i64,
    to: i64,
    mut take: impl FnMut(&BorrowedMessage<'_>),
) -> anyhow::Result<()> {
    read_until(consumer, partition, from, to, |message| {
        take(message);
        ControlFlow::Continue(())
    })
}

/// Like [`read`], but `take` may stop it.
///
/// # Errors
/// As of [`read`].
pub(super) fn read_until(
    consumer: &Reader,
    partition: &Partition,
    from: i64,
    to: i64,
    mut take: impl FnMut(&BorrowedMessage<'_>) -> ControlFlow<()>,
) -> anyhow::Result<()> {
    if from >= to {
        return Ok(());
    }
    let seen = range::read(consumer, partition, from, SILENCE_TIMEOUT, |message| {
        if message.offset() < to {
            take(message)?;
        }
        if message.offset() + 1 < to { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    match seen.with_context(|| format!("reading {partition}"))? {
        Read::Stopped(()) | Read::End => Ok(()),
        Read::TimedOut => bail!("{partition}: no record came from Kafka for {} s", SILENCE_TIMEOUT.as_secs()),
    }
}

/// The first ranges as text, and the number of the others.
pub(super) fn ranges(list: &[(i64, i64)]) -> String {
    let one = |&(first, last): &(i64, i64)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let mut text = list.iter().take(SHOWN).map(one).collect::<Vec<_>>().join(" ");
    if list.len() > SHOWN {
        text += &format!(" and {} more ranges", list.len() - SHOWN);
    }
    text
}

/// A set of offsets that are mostly inserted in order: first to last offset of each range.
#[derive(Debug, Default)]
pub(super) struct Offsets(BTreeMap<i64, i64>);

impl Offsets {
    /// Returns false if the offset was already in the set.
    pub fn insert(&mut self, offset: i64) -> bool {
        let before = self.0.range(..=offset).next_back().map(|(&first, &last)| (first, last));
        if before.is_some_and(|(_, last)| last >= offset) {
            return false;
        }
        let first = before.filter(|(_, last)| last + 1 == offset).map_or(offset, |(first, _)| first);
        let last = self.0.remove(&(offset + 1)).unwrap_or(offset);
        self.0.insert(first, last);
        true
    }

    pub fn count(&self) -> u64 {
        self.0.iter().map(|(first, last)| (last - first + 1) as u64).sum()
    }

    pub fn list(&self) -> List {
        self.0.iter().map(|(&first, &last)| (first, last)).collect()
    }

    /// The ranges that are in this set and not in the other.
    pub fn without(&self, other: &Self) -> List {
        let left = |(&first, &last): (&i64, &i64)| other.gaps(first, last + 1);
        self.0.iter().flat_map(left).collect()
    }

    /// The ranges of `from..to` that are not in the set.
    pub fn gaps(&self, from: i64, to: i64) -> List {
        let mut gaps = Vec::new();
        let mut next = from;
        // The range before may reach into these.
        let start = self.0.range(..=from).next_back().map_or(from, |(&first, _)| first);
        for (&first, &last) in self.0.range(start..) {
            if first >= to {
                break;
            }
            if first > next {
                gaps.push((next, first - 1));
            }
            next = next.max(last + 1);
        }
        if next < to {
            gaps.push((next, to - 1));
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_hold_the_same_offsets_as_a_set(offsets in proptest::collection::vec(0i64..60, 0..80)) {
            let (mut ranges, mut set) = (Offsets::default(), BTreeSet::new());
            for offset in offsets {
                prop_assert_eq!(ranges.insert(offset), set.insert(offset));
            }
            let listed: BTreeSet<i64> = ranges.list().into_iter().flat_map(|(a, b)| a..=b).collect();
            prop_assert_eq!(&listed, &set);
            prop_assert!(ranges.list().windows(2).all(|w| w[0].1 + 1 < w[1].0), "adjacent ranges are merged");
            prop_assert_eq!(ranges.count(), set.len() as u64);
            let gaps: BTreeSet<i64> = ranges.gaps(5, 50).into_iter().flat_map(|(a, b)| a..=b).collect();
            let expected: BTreeSet<i64> = (5..50).filter(|offset| !set.contains(offset)).collect();
            prop_assert_eq!(gaps, expected);
        }

        #[test]
        fn ranges_are_subtracted_as_sets(
            a in proptest::collection::vec(0i64..60, 0..60),
            b in proptest::collection::vec(0i64..60, 0..60),
        ) {
            let of = |offsets: &[i64]| {
                let mut all = Offsets::default();
                for offset in offsets {
                    all.insert(*offset);
                }
                all
            };
            let left: BTreeSet<i64> =
                of(&a).without(&of(&b)).into_iter().flat_map(|(first, last)| first..=last).collect();
            let expected: BTreeSet<i64> = a.iter().copied().filter(|offset| !b.contains(offset)).collect();
            prop_assert_eq!(left, expected);
        }
    }
}
