//! The words of a text, as the gliner package splits it: letters, digits and underscores, also joined by hyphens; each
//! other character is a word of its own, except spaces. The classes of characters are those of Python's `re`: unlike
//! Rust's `\w`, Python's has no combining marks.

use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

static WORD: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"[\p{L}\p{N}_]+(?:[-_][\p{L}\p{N}_]+)*|[^\s\x1c-\x1f]").expect("the pattern is valid")
});

/// A word's offsets in Unicode characters of the text: `start` inclusive, `end` exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub start: u32,
    pub end: u32,
}

/// A text's words and their tokens. Words without tokens are left out.
#[derive(Debug, Default)]
pub struct Words {
    pub places: Vec<Place>,
    /// The tokens of all words.
    ids: Vec<u32>,
    /// Index in `ids` where each word's tokens end.
    ends: Vec<u32>,
}

/// Splits a text into words; calls `of` with each word and its place.
pub fn split<E>(text: &str, mut of: impl FnMut(&str, Place) -> Result<(), E>) -> Result<(), E> {
    let (mut bytes, mut characters) = (0, 0);
    for word in WORD.find_iter(text) {
        characters += text[bytes..word.start()].chars().count();
        let start = characters;
        characters += word.as_str().chars().count();
        bytes = word.end();
        of(word.as_str(), Place { start: start as u32, end: characters as u32 })?;
    }
    Ok(())
}

impl Words {
    /// Appends a word unless it has no tokens: `tokens` appends those of the word.
    pub fn push<E>(
        &mut self,
        place: Place,
        tokens: impl FnOnce(&mut Vec<u32>) -> Result<(), E>,
    ) -> Result<(), E> {
        let before = self.ids.len();
        tokens(&mut self.ids)?;
        if self.ids.len() > before {
            self.places.push(place);
            self.ends.push(self.ids.len() as u32);
        }
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Index where the tokens of a word begin, or where those of the last one end.
    fn begin(&self, word: usize) -> usize {
        word.checked_sub(1).map_or(0, |before| self.ends[before] as usize)
    }

    /// Number of tokens of some consecutive words.
    fn tokens_in(&self, words: &Range<usize>) -> usize {
        self.begin(words.end) - self.begin(words.start)
    }

    /// The tokens of a word.
    pub fn tokens(&self, word: usize) -> &[u32] {
        &self.ids[self.begin(word)..self.begin(word + 1)]
    }

    /// Cuts the words into chunks that have at most `room` tokens and `most` words, or else one word. Neighbouring chunks
    /// share at least `width` words, so that each span of that many words is in one of them, and as many more as have at
    /// most `stride` tokens together.
    pub fn chunks(&self, room: usize, most: usize, width: usize, stride: usize) -> Vec<Range<usize>> {
        let (mut chunks, mut start) = (Vec::new(), 0);
        while start < self.len() {
            let fits = |end: &usize| self.tokens_in(&(start..*end)) <= room && end - start <= most;
            let end = (start + 1..=self.len()).take_while(fits).last().unwrap_or(start + 1);
            chunks.push(start..end);
            if end == self.len() {
                break;
            }
            let shared = |next: &usize| end - next <= width || self.tokens_in(&(*next..end)) <= stride;
            start = (start + 1..end).rev().take_while(shared).last().unwrap_or(end);
        }
        chunks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<(&str, u32, u32)> {
        let mut all = Vec::new();
        let characters: Vec<(usize, char)> = text.char_indices().collect();
        split(text, |word, place| {
            let at = characters[place.start as usize].0;
            assert_eq!(&text[at..at + word.len()], word);
            all.push((&text[at..at + word.len()], place.start, place.end));
            Ok::<(), ()>(())
        })
        .unwrap();
        all
    }

    #[test]
    fn words_are_those_of_the_package() {
        assert_eq!(
            words("e-mail a_b--c: ½ü"),
            [
                ("e-mail", 0, 6),
                ("a_b", 7, 10),
                ("-", 10, 11),
                ("-", 11, 12),
                ("c", 12, 13),
                (":", 13, 14),
                ("½ü", 15, 17)
            ]
        );
        // Combining marks are words of their own, and so are symbols.
        assert_eq!(words("e\u{301}").len(), 2);
        assert_eq!(words("हि").len(), 2);
        assert_eq!(words("Ⓐ東京"), [("Ⓐ", 0, 1), ("東京", 1, 3)]);
        assert!(words(" \u{1c}\u{a0}\u{2028}\n").is_empty());
    }

    fn of_lengths(lengths: &[usize]) -> Words {
        let mut words = Words::default();
        for (at, &length) in (0..).zip(lengths) {
            let push = |ids: &mut Vec<u32>| {
                ids.resize(ids.len() + length, at);
                Ok::<(), ()>(())
            };
            words.push(Place { start: at, end: at + 1 }, push).unwrap();
        }
        words
    }

    #[test]
    fn each_span_is_in_a_chunk() {
        let lengths: Vec<usize> = (0..200).map(|i| [1, 3, 1, 9, 2, 30, 1][i % 7]).collect();
        let words = of_lengths(&lengths);
        for (room, most, width, stride) in
            [(60, 100, 3, 0), (200, 12, 4, 30), (1000, 384, 12, 32), (8, 3, 1, 2)]
        {
            let chunks = words.chunks(room, most, width, stride);
            assert_eq!((chunks[0].start, chunks[chunks.len() - 1].end), (0, 200));
            for chunk in &chunks {
                assert!(
                    chunk.len() == 1 || (words.tokens_in(chunk) <= room && chunk.len() <= most),
                    "{chunk:?}"
                );
            }
            for first in 0..=200 - width {
                let whole = |chunk: &Range<usize>| chunk.start <= first && first + width <= chunk.end;
                let held = words.tokens_in(&(first..first + width)) > room || chunks.iter().any(whole);
                assert!(held, "{first} {width} of {chunks:?}");
            }
        }
    }

    #[test]
    fn words_without_tokens_are_left_out() {
        let words = of_lengths(&[2, 0, 1]);
        assert_eq!((words.len(), words.tokens(1)), (2, &[2][..]));
        assert_eq!(words.places[1], Place { start: 2, end: 3 });
        assert!(Words::default().chunks(10, 10, 1, 1).is_empty());
    }
}
