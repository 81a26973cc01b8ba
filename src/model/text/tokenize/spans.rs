//! Tokens with their offsets in the text, for token classification.

use std::ops::Range;

use serde_json::Value;
use tokenizers::TruncationDirection;

use super::cuts::{Cuts, Outline};
use super::{TokenizeError, Tokenizer, Tokens};

/// A longer text is tokenized in pieces of about so many bytes: a tokenizer needs hundreds of bytes of memory per byte.
const PIECE: usize = 64 << 10;

/// A token's offsets: `start` inclusive, `end` exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// In Unicode characters of the text.
    pub start: u32,
    pub end: u32,
    /// Whether it continues the word of the token before, by the rule of transformers' pipeline. Set only on request.
    pub continues: bool,
}

/// A whole text's tokens, without special ones.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Spans {
    pub ids: Vec<u32>,
    pub spans: Vec<Span>,
}

/// How the tokenizer writes words and spaces.
pub(super) struct Spelling {
    /// A token that continues a word begins with a mark ("##"), so that it is longer than the text it stands for.
    marks_continued: bool,
    unknown: Option<u32>,
    /// The offsets of a word's first token include the space before it.
    takes_space: bool,
}

impl Spelling {
    pub fn of(
        inner: &tokenizers::Tokenizer,
        outline: &Outline,
        config: &Value,
    ) -> Result<Self, TokenizeError> {
        let named = &config["unk_token"];
        let unknown = named.as_str().or(named["content"].as_str()).or(outline.model.unk_token.as_deref());
        let two = inner.encode_char_offsets("a b", false)?;
        Ok(Self {
            marks_continued: outline
                .model
                .continuing_subword_prefix
                .as_ref()
                .is_some_and(|mark| !mark.is_empty()),
            unknown: unknown.and_then(|token| inner.token_to_id(token)),
            takes_space: two.get_offsets().iter().any(|(start, _)| *start == 1),
        })
    }
}

impl Tokenizer {
    /// How many of these tokens are the unknown token.
    pub fn unknown(&self, ids: &[u32]) -> u64 {
        let Some(unknown) = self.spelling.unknown else { return 0 };
        ids.iter().filter(|id| **id == unknown).count() as u64
    }

    /// All tokens of a text with their offsets. `words` also sets [`Span::continues`].
    ///
    /// # Errors
    /// The library fails on the text.
    pub fn spans(&self, text: &str, words: bool) -> Result<Spans, TokenizeError> {
        let mut all = self.spans_by(text, PIECE)?;
        if words {
            self.find_continued(text, &mut all);
        }
        Ok(all)
    }

    fn spans_by(&self, text: &str, piece: usize) -> Result<Spans, TokenizeError> {
        let (cuts, added) = self.cuts_of(text);
        let mut all = Spans::default();
        let (mut start, mut characters) = (0, 0);
        loop {
            let end = match text.len() - start > 2 * piece {
                true => cuts.begin_near(text, start + piece, added),
                false => text.len(),
            };
            // The space between two pieces belongs to the second one, or to neither.
            let between = matches!(cuts, Cuts::Spaces { keep: false }) && end < text.len();
            let part = &text[start..end - usize::from(between && text[..end].ends_with(' '))];
            let encoding = self.inner.encode_char_offsets(part, false)?;
            // The library takes each piece for the beginning of a text, so the offsets of its first token lack the
            // space.
            let space = match cuts {
                Cuts::Spaces { keep: true } if start > 0 && part.starts_with(' ') => Some(characters),
                Cuts::Spaces { keep: false } if start > 0 && text[..start].ends_with(' ') => {
                    Some(characters - 1)
                }
                _ => None,
            };
            let first = space.map(|at| if self.spelling.takes_space { at } else { at + 1 });
            let before = all.spans.len();
            for (&id, &(from, to)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
                let (start, end) = ((characters + from) as u32, (characters + to) as u32);
                all.ids.push(id);
                all.spans.push(Span { start, end, continues: false });
            }
            if let (Some(start), [first, rest @ ..]) = (first, &mut all.spans[before..]) {
                // A first token that is only the space has the same start as the next token.
                let alone = rest.first().is_some_and(|next| next.start == first.start);
                first.start = start as u32;
                first.end = first.end.max(first.start);
                if alone && self.spelling.takes_space {
                    first.end = first.start + 1;
                }
            }
            characters += text[start..end].chars().count();
            start = end;
            if start == text.len() {
                break;
            }
        }
        Ok(all)
    }

    /// Sets [`Span::continues`]. If the tokenizer has no marks, transformers decides by the text: a token continues a
    /// word if there is no space at its start or just before.
    fn find_continued(&self, text: &str, all: &mut Spans) {
        let spelling = &self.spelling;
        let is_space: Vec<bool> = match spelling.marks_continued {
            true => Vec::new(),
            false => text.chars().map(|c| c == ' ').collect(),
        };
        for (&id, span) in all.ids.iter().zip(&mut all.spans) {
            let (start, end) = (span.start as usize, span.end as usize);
            span.continues = match spelling.marks_continued {
                _ if spelling.unknown == Some(id) => false,
                true => {
                    let token = self.inner.id_to_token(id).unwrap_or_default();
                    token.chars().count() != end.saturating_sub(start)
                }
                false => {
                    let around = start.saturating_sub(1)..(start + 1).min(is_space.len());
                    start > 0 && !is_space[around].contains(&true)
                }
            };
        }
    }

    /// How many tokens of a text fit in one sequence beside the special tokens.
    pub fn room(&self) -> usize {
        self.max_tokens.saturating_sub(self.special.count())
    }

    /// Splits a text of `tokens` tokens into ranges of at most `room`, each of which shares `overlap` tokens with the
    /// next, as the tokenizers library does (`stride`). If truncation is on the left, the text is cut from its end, and
    /// the last range comes first.
    ///
    /// # Panics
    /// If the overlap is not less than the room.
    pub fn chunks(&self, room: usize, tokens: usize, overlap: usize) -> Vec<Range<usize>> {
        assert!(overlap < room, "an overlap of {overlap} in {room} tokens");
        let mut chunks = Vec::new();
        let mut done = 0;
        loop {
            let end = (done + room).min(tokens);
            chunks.push(match self.direction {
                TruncationDirection::Right => done..end,
                TruncationDirection::Left => tokens - end..tokens - done,
            });
            if end == tokens {
                return chunks;
            }
            done += room - overlap;
        }
    }

    /// Adds the special tokens to a part of a text.
    pub fn whole(&self, ids: &[u32]) -> Tokens {
        let special = &self.special;
        let type_ids = special.type_ids(ids.len());
        Tokens {
            ids: [&special.before, ids, &special.after].concat(),
            type_ids,
            truncated: false,
            unpooled: 0,
        }
    }

    /// Number of special tokens before a text.
    pub fn leading(&self) -> usize {
        self.special.before.len()
    }

    /// Number of special tokens after a text.
    pub fn trailing(&self) -> usize {
        self.special.after.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{KINDS, texts, tokenizer};
    use super::*;
    use crate::model::text::sentence::TextSettings;

    /// A tokenizer whose post-processor removes spaces from token offsets, as RoBERTa's own does.
    fn trimming() -> Tokenizer {
        let mut tokenizer = tokenizer("tests/fixtures/roberta", TextSettings::default());
        let processor = tokenizers::processors::roberta::RobertaProcessing::default().trim_offsets(true);
        tokenizer.inner.with_post_processor(Some(processor));
        tokenizer.spelling.takes_space = false;
        tokenizer
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn spans_of_pieces_equal_those_of_the_whole_text(text in texts(), words in proptest::collection::vec("[a-z]{1,9}", 60)) {
            let text = format!("{} {text} {}", words[..30].join(" "), words[30..].join(" "));
            let tokenizers = KINDS.iter().map(|kind| tokenizer(kind, TextSettings::default())).chain([trimming()]);
            for tokenizer in tokenizers {
                let whole = tokenizer.inner.encode_char_offsets(text.as_str(), false).unwrap();
                let got = tokenizer.spans_by(&text, 32).unwrap();
                prop_assert_eq!(&got.ids, whole.get_ids());
                let places: Vec<(usize, usize)> =
                    got.spans.iter().map(|span| (span.start as usize, span.end as usize)).collect();
                prop_assert_eq!(places.as_slice(), whole.get_offsets());
            }
        }
    }

    #[test]
    fn chunks_equal_those_of_the_library() {
        let mut tokenizer = tokenizer("demo/model", TextSettings::default());
        tokenizer.max_tokens = 12;
        let text = vec!["a"; 43].join(" ");
        for direction in [TruncationDirection::Right, TruncationDirection::Left] {
            tokenizer.direction = direction;
            for (words, overlap) in [(0usize, 3), (1, 3), (10, 3), (11, 3), (17, 3), (18, 9), (22, 0)] {
                let text = &text[..(2 * words).saturating_sub(1)];
                let mut whole = tokenizer.inner.encode_char_offsets(text, false).unwrap();
                whole.truncate(10, overlap, direction);
                let ranges = [&whole].into_iter().chain(whole.get_overflowing()).map(|part| {
                    match part.get_offsets() {
                        [] => 0..0,
                        [(first, _), ..] => first / 2..first / 2 + part.len(),
                    }
                });
                assert_eq!(
                    tokenizer.chunks(tokenizer.room(), words, overlap),
                    ranges.collect::<Vec<_>>(),
                    "{words} {direction:?}"
                );
            }
        }
    }

    #[test]
    fn tokens_continue_words_by_the_rule_of_transformers() {
        let marked = tokenizer("demo/model", TextSettings::default());
        let continues = |tokenizer: &Tokenizer, text: &str| {
            let spans = tokenizer.spans(text, true).unwrap().spans;
            spans.iter().map(|span| (span.start, span.continues)).collect::<Vec<_>>()
        };
        // The unknown token never continues a word; a punctuation mark is a word.
        let got = continues(&marked, "parcelparcel 東, x");
        assert!(got.contains(&(6, true)), "{got:?}");
        assert!(!got.iter().any(|(start, continues)| *start >= 13 && *continues), "{got:?}");
        let spaced = tokenizer("tests/fixtures/roberta", TextSettings::default());
        let got = continues(&spaced, "the, model");
        assert_eq!(got.iter().find(|(start, _)| *start == 3), Some(&(3, true)), "{got:?}");
        assert_eq!(got.iter().find(|(start, _)| *start == 4), Some(&(4, false)), "{got:?}");
    }
}
