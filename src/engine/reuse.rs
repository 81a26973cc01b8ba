//! Finds items that need not be computed: duplicates of another item in their window, and items whose answer is in the
//! cache (`task.cache`). Items are equal if their keys are.

use std::collections::HashMap;
use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache as Entries;

use super::model::{Item, Value};
use super::plan::Planned;

/// The items of a window: those to compute, and those that need not be.
#[derive(Debug)]
pub(super) struct Reuse<V> {
    pub planned: Vec<Planned>,
    /// Items that are equal to an earlier one, each with that earlier item.
    pub duplicates: Vec<(u32, u32)>,
    pub cached: Vec<(u32, Arc<[V]>)>,
}

/// Sorts out `items`, which must not include suspects: those run alone.
pub(super) fn reuse<'a, I: Item, V: Value>(
    items: impl Iterator<Item = (u32, &'a I)>,
    cache: Option<&Cache<V>>,
) -> Reuse<V> {
    let mut found = Reuse { planned: Vec::new(), duplicates: Vec::new(), cached: Vec::new() };
    let mut seen: HashMap<u128, u32> = HashMap::with_capacity(items.size_hint().0);
    for (place, item) in items {
        if let Some(key) = item.key() {
            if let Some(answer) = cache.and_then(|cache| cache.get(key)) {
                found.cached.push((place, answer));
                continue;
            }
            let first = *seen.entry(key).or_insert(place);
            if first != place {
                found.duplicates.push((place, first));
                continue;
            }
        }
        found.planned.push(Planned { item: place, class: item.class(), cost: item.cost() as usize });
    }
    found
}

/// Bytes of a cache entry beside its values.
const OVERHEAD: usize = 128;
/// Typical bytes of a cache entry, to size the cache's tables.
const TYPICAL: usize = 1024;

/// Recent answers, by the key of their item.
pub(super) struct Cache<V: Value>(Entries<u128, Arc<[V]>, Bytes>);

#[derive(Clone)]
struct Bytes;

impl<V: Value> Weighter<u128, Arc<[V]>> for Bytes {
    fn weight(&self, _: &u128, answer: &Arc<[V]>) -> u64 {
        (OVERHEAD + size_of_val(&**answer)) as u64
    }
}

impl<V: Value> Cache<V> {
    /// `limit` in bytes.
    pub fn new(limit: u64) -> Self {
        Self(Entries::with_weighter((limit as usize / TYPICAL).max(16), limit, Bytes))
    }

    fn get(&self, key: u128) -> Option<Arc<[V]>> {
        self.0.get(&key)
    }

    pub fn insert(&self, item: &impl Item, answer: &[V]) {
        if let Some(key) = item.key() {
            self.0.insert(key, answer.into());
        }
    }

    /// Bytes in use.
    pub fn bytes(&self) -> u64 {
        self.0.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Number;
    use super::*;

    #[test]
    fn the_cache_keeps_within_its_bytes() {
        let cache = Cache::new(100_000);
        for i in 0..5000 {
            cache.insert(&Number::new(i), &[i as f32; 8]);
            assert!(cache.bytes() <= 100_000);
        }
        let kept = |&i: &u32| {
            let key = Number::new(i).key().expect("a key");
            cache.get(key).is_some_and(|answer| *answer == [i as f32; 8])
        };
        let kept = (0..5000).filter(kept).count();
        assert!(kept > 300 && kept < 700, "{kept}");
    }

    #[test]
    fn equal_items_are_planned_once_and_cached_ones_never() {
        let cache = Cache::new(1 << 20);
        cache.insert(&Number::new(3), &[0.5]);
        let items = [1, 2, 1, 3, 2].map(Number::new);
        let found = reuse((0..).zip(&items), Some(&cache));
        assert_eq!(found.planned.iter().map(|planned| planned.item).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(found.duplicates, [(2, 0), (4, 1)]);
        assert_eq!(found.cached, [(3, [0.5].into())]);
        let never = [1, 1].map(|n| Number { key: false, ..Number::new(n) });
        assert_eq!(reuse::<_, f32>((0..).zip(&never), None).planned.len(), 2);
    }
}
