//! Which items go through the model together. Pure.

/// Items of one class and of similar cost, together at most a budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Indexes of the items in their window.
    pub items: Vec<u32>,
    /// Sum of the items' costs.
    pub cost: usize,
    /// Inference on its only item timed out before: it runs alone, after a probe.
    pub suspect: bool,
}

/// An item that needs a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// Its index in the window.
    pub item: u32,
    pub class: u64,
    pub cost: usize,
}

/// A batch of a lower cost than this is not worth a lane of its own.
const MIN_BATCH_COST: usize = 64;

/// Sorts items by class and cost, largest first, and starts a new batch where the class changes or `budget` is reached.
/// An item above the budget is a batch of its own. If there is too little work to fill all lanes, smaller batches
/// spread it over them.
pub fn plan(mut items: Vec<Planned>, budget: usize, lanes: usize) -> Vec<Batch> {
    // A stable sort: the same window always makes the same batches.
    items.sort_by_key(|item| (item.class, std::cmp::Reverse(item.cost)));
    let total: usize = items.iter().map(|item| item.cost).sum();
    let budget = budget.min(total.div_ceil(lanes.max(1)).max(MIN_BATCH_COST));
    let mut batches: Vec<Batch> = Vec::new();
    let mut class = None;
    for Planned { item, class: of_item, cost } in items {
        match batches.last_mut() {
            Some(batch) if class == Some(of_item) && batch.cost + cost <= budget => {
                batch.items.push(item);
                batch.cost += cost;
            }
            _ => batches.push(Batch { items: vec![item], cost, suspect: false }),
        }
        class = Some(of_item);
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn items(costs: &[(u64, usize)]) -> Vec<Planned> {
        let one = |(i, &(class, cost)): (usize, &(u64, usize))| Planned { item: i as u32, class, cost };
        costs.iter().enumerate().map(one).collect()
    }

    fn costs(batches: &[Batch]) -> Vec<usize> {
        batches.iter().map(|batch| batch.cost).collect()
    }

    #[test]
    fn largest_first_within_the_budget() {
        let batches = plan(items(&[(0, 10), (0, 300), (0, 200), (0, 10)]), 256, 1);
        assert_eq!(costs(&batches), [300, 220]);
        assert_eq!(batches[1].items, [2, 0, 3]);
    }

    #[test]
    fn little_work_is_spread_over_the_lanes() {
        assert_eq!(costs(&plan(items(&[(0, 10); 20]), 512, 2)), [100, 100]);
    }

    #[test]
    fn classes_do_not_mix() {
        let batches = plan(items(&[(7, 10), (0, 20), (7, 30), (0, 5)]), 1000, 1);
        assert_eq!(batches.iter().map(|b| b.items.clone()).collect::<Vec<_>>(), [vec![1, 3], vec![2, 0]]);
    }

    proptest! {
        #[test]
        fn every_item_once_and_no_batch_over_budget(
            all in proptest::collection::vec((0u64..3, 1usize..600), 0..200),
            budget in 1usize..1000,
            lanes in 1usize..5,
        ) {
            let batches = plan(items(&all), budget, lanes);
            let mut seen: Vec<u32> = batches.iter().flat_map(|batch| batch.items.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..all.len() as u32).collect::<Vec<_>>());
            for batch in &batches {
                let of_batch: Vec<(u64, usize)> = batch.items.iter().map(|&i| all[i as usize]).collect();
                prop_assert_eq!(batch.cost, of_batch.iter().map(|(_, cost)| cost).sum::<usize>());
                prop_assert!(batch.cost <= budget || batch.items.len() == 1);
                prop_assert!(of_batch.windows(2).all(|pair| pair[0].0 == pair[1].0 && pair[0].1 >= pair[1].1));
            }
        }
    }
}
