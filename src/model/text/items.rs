//! Text models as [`engine::Model`]: their items are token sequences.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::LazyLock;

use super::{Model, Tokens};
use crate::engine::{self, Item, RunError};
use crate::failpoint;
use crate::ragged::Ragged;

/// Two independent hashes with random keys, so that nobody can craft two inputs with the same [`Item::key`].
static HASHES: LazyLock<[RandomState; 2]> = LazyLock::new(|| [RandomState::new(), RandomState::new()]);

impl Item for Tokens {
    fn cost(&self) -> u32 {
        self.ids.len() as u32
    }

    fn key(&self) -> Option<u128> {
        Some(key((&self.ids, &self.type_ids, self.unpooled)))
    }
}

/// The [`Item::key`] of what an item contains.
pub(in crate::model) fn key(content: impl Hash) -> u128 {
    let [high, low] = HASHES.each_ref().map(|state| state.hash_one(&content));
    u128::from(high) << 64 | u128::from(low)
}

impl engine::Model for Model {
    type Item = Tokens;
    type Value = f32;

    fn run(&self, batch: &[&Tokens]) -> Result<Ragged<f32>, RunError> {
        failpoint::pass("device");
        if let Some(id) = failpoint::argument("hang").and_then(|id| id.parse().ok())
            && batch.iter().any(|tokens| tokens.ids.contains(&id))
        {
            loop {
                std::thread::park();
            }
        }
        self.forward(batch).map_err(|e| classify(&e.to_string()))
    }

    fn sample(&self, cost: u32) -> Tokens {
        let length = (cost as usize).clamp(1, self.tokenizer.max_tokens());
        Tokens {
            ids: self.plain.iter().copied().cycle().take(length).collect(),
            type_ids: None,
            truncated: false,
            unpooled: 0,
        }
    }

    fn unknown(&self, item: &Tokens) -> u64 {
        self.tokenizer.unknown(&item.ids)
    }
}

/// Candle has one error type; the kind is recognised by the driver's error name in the message.
pub(in crate::model) fn classify(message: &str) -> RunError {
    let first = message.lines().next().unwrap_or_default().to_owned();
    let lower = message.to_lowercase();
    if lower.contains("out of memory") || lower.contains("out_of_memory") || lower.contains("alloc_failed") {
        RunError::OutOfMemory(first)
    } else if lower.contains("cuda_error") || lower.contains("cublas_status") || lower.contains("metal error")
    {
        RunError::Device(first)
    } else {
        RunError::Batch(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_apart() {
        assert!(matches!(
            classify("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")"),
            RunError::OutOfMemory(_)
        ));
        assert!(matches!(classify("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS)"), RunError::Device(_)));
        assert!(
            matches!(classify("token id 9 is outside\n  0: candle"), RunError::Batch(m) if m == "token id 9 is outside")
        );
    }

    #[test]
    fn equal_tokens_have_equal_keys() {
        let tokens = |ids: &[u32], type_ids: Option<&[u32]>| Tokens {
            ids: ids.to_vec(),
            type_ids: type_ids.map(<[u32]>::to_vec),
            truncated: false,
            unpooled: 0,
        };
        let key = tokens(&[1, 2], None).key();
        assert_eq!(Tokens { truncated: true, ..tokens(&[1, 2], None) }.key(), key);
        for other in [
            tokens(&[1, 2, 0], None),
            tokens(&[2, 1], None),
            tokens(&[1, 2], Some(&[0, 1])),
            Tokens { unpooled: 1, ..tokens(&[1, 2], None) },
        ] {
            assert_ne!(other.key(), key);
        }
    }
}
