//! Entities of a text as they are published.

use serde::Serialize;

use super::to_json;
use crate::record::RecordError;

/// An entity; `start` and `end` in Unicode characters of the text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Entity<'a> {
    pub label: &'a str,
    pub start: u32,
    pub end: u32,
    pub score: f32,
}

#[derive(Serialize)]
struct Found<'a> {
    label: &'a str,
    start: u32,
    end: u32,
    text: &'a str,
    score: f32,
}

/// Appends `{"entities":[…]}`.
pub(super) fn write<'a>(
    text: &str,
    entities: impl Iterator<Item = Entity<'a>>,
    out: &mut Vec<u8>,
) -> Result<(), RecordError> {
    #[derive(Serialize)]
    struct Entities<'a> {
        entities: Vec<Found<'a>>,
    }
    let characters = Characters::of(text);
    let found = |Entity { label, start, end, score }| Found {
        label,
        start,
        end,
        text: characters.between(start, end),
        score,
    };
    to_json(&Entities { entities: entities.map(found).collect() }, out)
}

/// Slices a text by character positions.
struct Characters<'t> {
    text: &'t str,
    /// Byte offset of each character, then the text's length; empty for ASCII.
    starts: Vec<usize>,
}

impl<'t> Characters<'t> {
    fn of(text: &'t str) -> Self {
        let starts = match text.is_ascii() {
            true => Vec::new(),
            false => text.char_indices().map(|(at, _)| at).chain([text.len()]).collect(),
        };
        Self { text, starts }
    }

    fn byte(&self, character: u32) -> usize {
        match self.starts.is_empty() {
            true => character as usize,
            false => self.starts[character as usize],
        }
    }

    fn between(&self, start: u32, end: u32) -> &'t str {
        &self.text[self.byte(start)..self.byte(end)]
    }
}
