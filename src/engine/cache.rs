//! `task.cache`: the model's rows for the inputs of late, by the input itself.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache as Entries;

use crate::model::Tokens;

/// Bytes that an entry takes beside its numbers.
const OVERHEAD: usize = 160;

pub struct Cache(Entries<Tokens, Arc<[f32]>, Bytes>);

#[derive(Clone)]
struct Bytes;

fn bytes(tokens: &Tokens, row: &[f32]) -> usize {
    let types = tokens.type_ids.as_ref().map_or(0, Vec::len);
    OVERHEAD + size_of::<u32>() * (tokens.ids.len() + types) + size_of_val(row)
}

impl Weighter<Tokens, Arc<[f32]>> for Bytes {
    fn weight(&self, tokens: &Tokens, row: &Arc<[f32]>) -> u64 {
        bytes(tokens, row) as u64
    }
}

impl Cache {
    /// `limit` in bytes; `width` is the numbers in a row.
    pub fn new(limit: u64, width: usize) -> Self {
        let entry = OVERHEAD + size_of::<f32>() * (width + 32);
        Self(Entries::with_weighter((limit as usize / entry).max(1), limit, Bytes))
    }

    pub fn get(&self, tokens: &Tokens) -> Option<Arc<[f32]>> {
        self.0.get(tokens)
    }

    pub fn insert(&self, tokens: &Tokens, row: &[f32]) {
        self.0.insert(tokens.clone(), row.into());
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.0.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_within_its_bytes() {
        let cache = Cache::new(100_000, 8);
        let tokens = |i: u32| Tokens { ids: vec![i; 30], type_ids: None, truncated: false };
        for i in 0..5000 {
            cache.insert(&tokens(i), &[i as f32; 8]);
            assert!(cache.bytes() <= 100_000);
        }
        let kept = (0..5000).filter(|&i| cache.get(&tokens(i)).is_some_and(|row| row[0] == i as f32)).count();
        assert!(kept > 100 && kept < 400, "{kept}");
    }
}
