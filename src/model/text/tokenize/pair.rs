//! Two texts as one sequence: a query and a document, a premise and a hypothesis.

use std::borrow::Cow;
use std::sync::OnceLock;

use tokenizers::TruncationDirection;

use super::{TokenizeError, Tokenizer, Tokens};

/// Special tokens that the post-processor puts around two texts, each as ID and token type.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Template {
    before: Vec<(u32, u32)>,
    between: Vec<(u32, u32)>,
    after: Vec<(u32, u32)>,
    /// Token types of the two texts.
    types: [u32; 2],
}

/// Which text is truncated if both together have more tokens than the model's limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shorten {
    /// The longer one, until both have the same length; then both.
    Longer,
    /// Only the first one.
    First,
}

/// One text of a pair.
#[derive(Debug)]
pub struct Part<'t> {
    text: Cow<'t, str>,
    /// Without special tokens; at most one more than could be kept.
    ids: Vec<u32>,
    /// Number of tokens of the whole text, once it was needed.
    count: OnceLock<usize>,
}

/// The second text alone leaves no room for the first.
#[derive(Debug, thiserror::Error)]
#[error(
    "it takes at least {tokens} tokens with the special ones, and the model has {limit}: no text fits beside it"
)]
pub struct NoRoom {
    pub tokens: usize,
    pub limit: usize,
}

impl Template {
    /// Derived from what the post-processor does to two sample pairs.
    pub fn of(inner: &tokenizers::Tokenizer) -> Result<Self, TokenizeError> {
        let template = Self::of_texts(inner, "a", "b")?;
        match template == Self::of_texts(inner, "a b, c", "d e")? {
            true => Ok(template),
            false => Err(TokenizeError::PostProcessor("the tokens that it adds depend on the texts")),
        }
    }

    fn of_texts(inner: &tokenizers::Tokenizer, first: &str, second: &str) -> Result<Self, TokenizeError> {
        let plain = |text: &str| inner.encode_fast(text, false);
        let (first, second) = (plain(first)?, plain(second)?);
        let (ids_of_first, ids_of_second) = (first.get_ids().to_vec(), second.get_ids().to_vec());
        let all = inner.post_process(first, Some(second), true)?;
        let tokens: Vec<(u32, u32)> =
            all.get_ids().iter().copied().zip(all.get_type_ids().iter().copied()).collect();
        let unknown = || TokenizeError::PostProcessor("it does more than add tokens around two texts");
        let find = |ids: &[u32], from: usize| {
            let windows = tokens[from..].windows(ids.len());
            let mut places = (from..).zip(windows);
            let found = places.find(|(_, window)| window.iter().map(|(id, _)| id).eq(ids));
            found.map(|(at, _)| at..at + ids.len()).ok_or_else(unknown)
        };
        let first = find(&ids_of_first, 0)?;
        let second = find(&ids_of_second, first.end)?;
        let type_of = |text: std::ops::Range<usize>| match tokens[text.clone()] {
            [(_, one), ..] if tokens[text].iter().all(|(_, other)| *other == one) => Ok(one),
            _ => Err(unknown()),
        };
        Ok(Self {
            before: tokens[..first.start].to_vec(),
            between: tokens[first.end..second.start].to_vec(),
            after: tokens[second.end..].to_vec(),
            types: [type_of(first)?, type_of(second)?],
        })
    }

    fn count(&self) -> usize {
        self.before.len() + self.between.len() + self.after.len()
    }

    /// One value per token of the pair: that of a special token by `of`, those of the texts from `first` and `second`.
    fn around(
        &self,
        of: impl Fn(&(u32, u32)) -> u32 + Copy,
        first: impl Iterator<Item = u32>,
        second: impl Iterator<Item = u32>,
    ) -> Vec<u32> {
        let (before, between, after) = (self.before.iter(), self.between.iter(), self.after.iter());
        before.map(of).chain(first).chain(between.map(of)).chain(second).chain(after.map(of)).collect()
    }

    fn has_types(&self) -> bool {
        let special = [&self.before, &self.between, &self.after].into_iter().flatten().map(|(_, of)| *of);
        self.types.into_iter().chain(special).any(|of| of != 0)
    }
}

impl Tokenizer {
    /// Whether the tokenizer can encode pairs.
    ///
    /// # Errors
    /// kandle cannot reproduce what the post-processor does with two texts.
    pub fn takes_pairs(&self) -> Result<(), &TokenizeError> {
        self.template.as_ref().map(|_| ())
    }

    /// Tokenizes one text of a pair.
    ///
    /// # Errors
    /// The library fails on the text.
    pub fn part<'t>(&self, text: impl Into<Cow<'t, str>>) -> Result<Part<'t>, TokenizeError> {
        let (text, mut ids, most) = (text.into(), Vec::new(), self.max_tokens + 1);
        match self.direction {
            TruncationDirection::Right => self.first(&text, most, &mut ids)?,
            TruncationDirection::Left => self.last(&text, most, &mut ids)?,
        };
        Ok(Part { text, ids, count: OnceLock::new() })
    }

    /// Number of tokens of a whole text, not all of which are kept. The longer text of a pair gets the odd token.
    fn count(&self, part: &Part<'_>) -> usize {
        let counted = || {
            let mut all = Vec::new();
            // If the library fails on the rest of the text, the kept tokens are counted.
            let done = self.first(&part.text, usize::MAX, &mut all);
            done.map_or(part.ids.len(), |_| all.len())
        };
        *part.count.get_or_init(counted)
    }

    /// Two texts as one sequence of at most [`Tokenizer::max_tokens`] tokens.
    ///
    /// # Errors
    /// Only the first text may be truncated ([`Shorten::First`]), and the second one leaves no room for it.
    ///
    /// # Panics
    /// If [`Tokenizer::takes_pairs`] fails.
    pub fn pair(&self, first: &Part<'_>, second: &Part<'_>, shorten: Shorten) -> Result<Tokens, NoRoom> {
        let template = self.template.as_ref().expect("takes_pairs was checked");
        let room = self.max_tokens.saturating_sub(template.count());
        let lengths = (first.ids.len(), second.ids.len());
        let truncated = lengths.0 + lengths.1 > room;
        let kept = match shorten {
            _ if !truncated => lengths,
            // Neither text was tokenized to its end, so the longer one is not known yet.
            Shorten::Longer if lengths.0.min(lengths.1) > self.max_tokens => {
                kept_of_both(self.count(first), self.count(second), room)
            }
            Shorten::Longer => kept_of_both(lengths.0, lengths.1, room),
            Shorten::First if lengths.1 >= room => {
                return Err(NoRoom { tokens: lengths.1 + template.count(), limit: self.max_tokens });
            }
            Shorten::First => (room - lengths.1, lengths.1),
        };
        let (first, second) = (self.keep(&first.ids, kept.0), self.keep(&second.ids, kept.1));
        let ids = template.around(|(id, _)| *id, first.iter().copied(), second.iter().copied());
        let type_ids = (self.has_types && template.has_types()).then(|| {
            let [of_first, of_second] = template.types;
            let types = |of: u32, ids: &[u32]| std::iter::repeat_n(of, ids.len());
            template.around(|(_, of)| *of, types(of_first, first), types(of_second, second))
        });
        Ok(Tokens { ids, type_ids, truncated, unpooled: 0 })
    }

    /// `count` tokens of a text, from the end that is not truncated.
    fn keep<'a>(&self, ids: &'a [u32], count: usize) -> &'a [u32] {
        match self.direction {
            TruncationDirection::Right => &ids[..count],
            TruncationDirection::Left => &ids[ids.len() - count..],
        }
    }
}

/// How many of `room` tokens each text keeps, as in the tokenizers library (`LongestFirst`).
fn kept_of_both(first: usize, second: usize, room: usize) -> (usize, usize) {
    let shorter = first.min(second);
    // The shorter text is kept whole if it needs at most half of the room.
    let (of_shorter, of_longer) = match shorter <= room && shorter + shorter.max(room - shorter) <= room {
        true => (shorter, room - shorter),
        false => (room / 2, room - room / 2),
    };
    if first > second { (of_longer, of_shorter) } else { (of_shorter, of_longer) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::{TruncationParams, TruncationStrategy};

    use super::super::tests::{KINDS, texts, tokenizer};
    use super::*;
    use crate::model::text::sentence::TextSettings;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn pairs_equal_those_of_the_library(
            texts in proptest::collection::vec((texts(), texts()), 6), limit in 8usize..60, left: bool
        ) {
            for kind in KINDS {
                let mut tokenizer = tokenizer(kind, TextSettings::default());
                tokenizer.has_types = true;
                tokenizer.max_tokens = limit;
                tokenizer.direction = if left { TruncationDirection::Left } else { TruncationDirection::Right };
                let direction = tokenizer.direction;
                for (strategy, shorten) in
                    [(TruncationStrategy::LongestFirst, Shorten::Longer), (TruncationStrategy::OnlyFirst, Shorten::First)]
                {
                    let max_length = limit - tokenizer.template.as_ref().unwrap().count();
                    let truncation = TruncationParams { max_length, strategy, direction, stride: 0 };
                    for (first, second) in &texts {
                        let [a, b] = [first, second].map(|text| tokenizer.part(text.as_str()).unwrap());
                        let got = tokenizer.pair(&a, &b, shorten);
                        let [a, b] =
                            [first, second].map(|text| tokenizer.inner.encode_fast(text.as_str(), false).unwrap());
                        let Ok((a, b)) = tokenizers::truncate_encodings(a, Some(b), &truncation) else {
                            prop_assert!(got.is_err(), "{} {:?} {:?}", kind, first, second);
                            continue;
                        };
                        let cut = |encoding: &tokenizers::Encoding| !encoding.get_overflowing().is_empty();
                        let truncated = cut(&a) || b.as_ref().is_some_and(cut);
                        let want = tokenizer.inner.post_process(a, b, true).unwrap();
                        let got = got.unwrap();
                        prop_assert_eq!(&got.ids, want.get_ids(), "{} {:?} {:?} {:?}", kind, shorten, first, second);
                        let types = got.type_ids.unwrap_or(vec![0; want.len()]);
                        prop_assert_eq!(&types, want.get_type_ids());
                        prop_assert_eq!(got.truncated, truncated);
                    }
                }
            }
        }
    }

    #[test]
    fn the_shorter_text_is_kept_whole_if_possible() {
        assert_eq!(kept_of_both(3, 100, 10), (3, 7));
        assert_eq!(kept_of_both(100, 3, 10), (7, 3));
        assert_eq!(kept_of_both(50, 60, 11), (5, 6));
        assert_eq!(kept_of_both(60, 50, 11), (6, 5));
        assert_eq!(kept_of_both(6, 6, 11), (5, 6));
    }
}
