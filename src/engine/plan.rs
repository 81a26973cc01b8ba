//! Which records go through the model together. Pure.

use std::sync::Arc;

/// Records of similar length, together at most a budget of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Places of the records in their window.
    pub records: Vec<u32>,
    pub tokens: usize,
}

/// What a window asks of the lanes, and what it need not ask.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    pub batches: Vec<Batch>,
    /// Records whose input is that of another one in the window, and that one.
    pub copies: Vec<(u32, u32)>,
    /// Records whose row is known from before.
    pub known: Vec<(u32, Arc<[f32]>)>,
}

/// Below this many tokens a batch is not worth a lane of its own.
const LEAST: usize = 64;

/// Sorts by length, longest first, and cuts where `budget` tokens are reached; a record longer than
/// the budget is a batch of its own. Where there is less work than lanes would take, it is spread
/// over them. `lengths` holds places in the window and their tokens.
pub fn plan(mut lengths: Vec<(u32, usize)>, budget: usize, lanes: usize) -> Vec<Batch> {
    // Equal lengths keep the input's order, so that the same window makes the same batches.
    lengths.sort_by_key(|&(_, tokens)| std::cmp::Reverse(tokens));
    let total: usize = lengths.iter().map(|(_, tokens)| tokens).sum();
    let budget = budget.min(total.div_ceil(lanes.max(1)).max(LEAST));
    let mut batches: Vec<Batch> = Vec::new();
    for (record, tokens) in lengths {
        match batches.last_mut() {
            Some(batch) if batch.tokens + tokens <= budget => {
                batch.records.push(record);
                batch.tokens += tokens;
            }
            _ => batches.push(Batch { records: vec![record], tokens }),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn longest_first_within_the_budget() {
        let batches = plan(vec![(0, 10), (1, 300), (2, 200), (3, 10)], 256, 1);
        assert_eq!(batches.iter().map(|b| b.tokens).collect::<Vec<_>>(), [300, 220]);
        assert_eq!(batches[1].records, [2, 0, 3]);
    }

    #[test]
    fn little_work_is_spread_over_the_lanes() {
        let batches = plan((0..20).map(|i| (i, 10)).collect(), 512, 2);
        assert_eq!(batches.iter().map(|b| b.tokens).collect::<Vec<_>>(), [100, 100]);
    }

    proptest! {
        #[test]
        fn every_record_once_and_no_batch_over_budget(
            lengths in proptest::collection::vec(1usize..600, 0..200), budget in 1usize..1000, lanes in 1usize..5,
        ) {
            let batches = plan(lengths.iter().enumerate().map(|(i, &n)| (i as u32, n)).collect(), budget, lanes);
            let mut seen: Vec<u32> = batches.iter().flat_map(|b| b.records.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len() as u32).collect::<Vec<_>>());
            let mut last = usize::MAX;
            for batch in &batches {
                let sizes: Vec<usize> = batch.records.iter().map(|&i| lengths[i as usize]).collect();
                prop_assert_eq!(batch.tokens, sizes.iter().sum::<usize>());
                prop_assert!(batch.tokens <= budget || batch.records.len() == 1);
                prop_assert!(sizes.iter().all(|&n| n <= last));
                last = *sizes.last().unwrap();
            }
        }
    }
}
