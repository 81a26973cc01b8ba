//! Finds where a batch ends that is damaged in the broker's file. librdkafka fetches such a batch again and again, or
//! jumps to an arbitrary offset, so kandle seeks past it.

use crate::kafka::native::First;

/// Result of a check for damaged batches at an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Damage {
    /// The batch can be read, or there is none.
    None,
    /// All offsets up to this one (exclusive) are lost.
    UpTo(i64),
    /// No answer: the batch can be neither read nor skipped.
    Unknown,
}

/// Finds how far damaged batches extend from offset `from`, which lies before the log's `end`. `probe` returns what a
/// fetch at an offset finds first.
pub(super) fn extent(from: i64, end: i64, mut probe: impl FnMut(i64) -> First) -> Damage {
    let mut at = from;
    while at < end {
        match probe(at) {
            First::Record(_) | First::End => break,
            First::Damaged(batch) => match batch_end(at, end, batch, &mut probe) {
                Some(next) => at = next,
                None => return Damage::Unknown,
            },
            First::TimedOut | First::Error(_) => return Damage::Unknown,
        }
    }
    if at == from { Damage::None } else { Damage::UpTo(at) }
}

/// The offset after the damaged batch that contains `at` and begins at `batch`; `None` if a probe got no answer. A
/// broker returns the whole batch for each offset inside it, so a galloping and then a binary search finds its end.
fn batch_end(at: i64, end: i64, batch: i64, probe: &mut impl FnMut(i64) -> First) -> Option<i64> {
    let mut is_inside = |offset: i64| match probe(offset) {
        First::Damaged(other) => Some(other == batch),
        First::Record(_) | First::End => Some(false),
        First::TimedOut | First::Error(_) => None,
    };
    let (mut inside, mut step) = (at, 1);
    let mut outside = loop {
        let next = (inside + step).min(end);
        if next == end || !is_inside(next)? {
            break next;
        }
        inside = next;
        step *= 2;
    };
    while outside - inside > 1 {
        let middle = inside + (outside - inside) / 2;
        if is_inside(middle)? { inside = middle } else { outside = middle }
    }
    Some(outside)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Batches of any lengths, some damaged: the lost range ends where the next good batch begins.
        #[test]
        fn ends_at_the_next_good_batch(
            batches in proptest::collection::vec((1i64..70, any::<bool>()), 1..12), at in 0usize..12,
        ) {
            let mut starts = vec![0];
            for (length, _) in &batches {
                starts.push(starts.last().unwrap() + length);
            }
            let end = *starts.last().unwrap();
            let mut probes = 0;
            let holds = |offset: i64| starts.partition_point(|&start| start <= offset) - 1;
            let mut probe = |offset: i64| {
                probes += 1;
                match offset {
                    offset if offset >= end => First::End,
                    offset if batches[holds(offset)].1 => First::Damaged(starts[holds(offset)]),
                    offset => First::Record(offset),
                }
            };
            let from = starts[at % batches.len()];
            let good = (holds(from)..batches.len()).find(|&i| !batches[i].1).map_or(end, |i| starts[i]);
            let expected = if good == from { Damage::None } else { Damage::UpTo(good) };
            prop_assert_eq!(extent(from, end, &mut probe), expected);
            prop_assert!(probes <= 16 * batches.len(), "{} probes", probes);
        }
    }

    #[test]
    fn without_an_answer_the_damage_is_unknown() {
        assert_eq!(extent(5, 9, |_| First::TimedOut), Damage::Unknown);
        let silent_after = |offset| if offset == 5 { First::Damaged(5) } else { First::TimedOut };
        assert_eq!(extent(5, 9, silent_after), Damage::Unknown);
        assert_eq!(extent(5, 6, |_| First::Damaged(5)), Damage::UpTo(6));
    }
}
