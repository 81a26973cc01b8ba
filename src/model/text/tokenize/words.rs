//! A cache of the tokens of recent words, one per thread. Most words of a text are among a few thousand common ones,
//! and looking a word up takes a fiftieth of the time of tokenizing it.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// The longest word that is cached, in bytes and in tokens.
const BYTES: usize = 26;
const TOKENS: usize = 6;
/// Pairs of slots per thread; a slot has 52 bytes. A word's hash selects its pair, where a new word replaces the less
/// recently used one.
const PAIRS: usize = 1 << 15;

#[derive(Clone, Copy)]
struct Slot {
    ids: [u32; TOKENS],
    text: [u8; BYTES],
    length: u8,
    count: u8,
}

impl Slot {
    fn holds(&self, word: &str) -> bool {
        usize::from(self.length) == word.len() && self.text[..word.len()] == *word.as_bytes()
    }
}

struct Words {
    /// ID of the tokenizer whose words are cached.
    tokenizer: u64,
    /// In each pair, the most recently used word comes first.
    pairs: Vec<[Slot; 2]>,
}

thread_local! {
    static WORDS: RefCell<Words> = const { RefCell::new(Words { tokenizer: 0, pairs: Vec::new() }) };
}

/// An ID that no other tokenizer of this process has.
pub(super) fn next_tokenizer() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Appends the tokens of a word. Calls `tokenize` if they are not cached.
pub(super) fn append<E>(
    tokenizer: u64,
    word: &str,
    ids: &mut Vec<u32>,
    tokenize: impl FnOnce(&str, &mut Vec<u32>) -> Result<(), E>,
) -> Result<(), E> {
    if word.len() > BYTES {
        return tokenize(word, ids);
    }
    WORDS.with_borrow_mut(|words| {
        if words.tokenizer != tokenizer || words.pairs.is_empty() {
            let empty = Slot { ids: [0; TOKENS], text: [0; BYTES], length: 0, count: 0 };
            *words = Words { tokenizer, pairs: vec![[empty; 2]; PAIRS] };
        }
        let pair = &mut words.pairs[place(word)];
        if pair[1].holds(word) {
            pair.swap(0, 1);
        }
        if pair[0].holds(word) {
            ids.extend_from_slice(&pair[0].ids[..usize::from(pair[0].count)]);
            return Ok(());
        }
        let before = ids.len();
        tokenize(word, ids)?;
        let new = &ids[before..];
        if new.len() <= TOKENS {
            pair.swap(0, 1);
            let slot = &mut pair[0];
            slot.text[..word.len()].copy_from_slice(word.as_bytes());
            slot.ids[..new.len()].copy_from_slice(new);
            (slot.length, slot.count) = (word.len() as u8, new.len() as u8);
        }
        Ok(())
    })
}

/// The index of a word's pair: FNV-1a (Fowler, Noll, Vo) with its upper bits folded in.
fn place(word: &str) -> usize {
    let hash = word
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    (hash ^ (hash >> 32)) as usize % PAIRS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_tokenized_once_by_each_tokenizer() {
        let (first, second) = (next_tokenizer(), next_tokenizer());
        let mut asked = Vec::new();
        let mut ids = Vec::new();
        for (tokenizer, word) in [(first, "word"), (first, "word"), (first, "other"), (second, "word")] {
            append(tokenizer, word, &mut ids, |word, ids| {
                asked.push((tokenizer, word.to_owned()));
                ids.push(word.len() as u32);
                Ok::<(), ()>(())
            })
            .unwrap();
        }
        assert_eq!(ids, [4, 4, 5, 4]);
        let owned = |n: u64, word: &str| (n, word.to_owned());
        assert_eq!(asked, [owned(first, "word"), owned(first, "other"), owned(second, "word")]);
    }

    #[test]
    fn words_with_many_bytes_or_tokens_are_not_cached() {
        let tokenizer = next_tokenizer();
        for (word, count) in [("a".repeat(BYTES + 1), 1), ("many".to_owned(), TOKENS + 1)] {
            let mut asked = 0;
            for _ in 0..2 {
                let mut ids = Vec::new();
                append(tokenizer, &word, &mut ids, |_, ids| {
                    asked += 1;
                    ids.resize(count, 7);
                    Ok::<(), ()>(())
                })
                .unwrap();
                assert_eq!(ids, vec![7; count]);
            }
            assert_eq!(asked, 2);
        }
    }
}
