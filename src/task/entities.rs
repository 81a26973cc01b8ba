//! Entities of a text as they are published, and the text with their words replaced (`task.redact`).

use serde::Serialize;

use super::to_json;
use crate::codec::write::schema::{Field, Type};
use crate::record::RecordError;

/// Fields of a prediction.
pub(super) fn fields(redact: bool) -> Vec<Field> {
    let mut entity = vec![
        Field::new(1, "label", Type::Text, "What it is"),
        Field::new(
            2,
            "start",
            Type::Integer,
            "Place of its first character in the text, in Unicode characters",
        ),
        Field::new(3, "end", Type::Integer, "Place after its last character"),
        Field::new(4, "text", Type::Text, "Its text").optional(),
        Field::new(5, "score", Type::Float, "The score of the label"),
    ];
    if redact {
        entity.retain(|field| field.name != "text");
    }
    let entities =
        Field::new(1, "entities", Type::objects("Entity", entity), "The entities of the text, in its order");
    let text =
        Field::new(2, "text", Type::Text, "The text with each entity replaced by its label").optional();
    if redact { vec![text, entities] } else { vec![entities] }
}

/// An entity; `start` and `end` in Unicode characters of the text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
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

/// Appends `{"text":…,"entities":[…]}`: the text with `replaced`, and the entities without their texts.
pub(super) fn write_redacted<'a>(
    text: &str,
    replaced: Vec<Entity<'_>>,
    entities: impl Iterator<Item = Entity<'a>>,
    out: &mut Vec<u8>,
) -> Result<(), RecordError> {
    #[derive(Serialize)]
    struct Redacted<'a> {
        text: String,
        entities: Vec<Entity<'a>>,
    }
    to_json(&Redacted { text: redact(text, replaced), entities: entities.collect() }, out)
}

/// The text with each entity replaced by its label in upper case and brackets. Entities that overlap are replaced
/// together, by the label with the highest score. Spaces around an entity stay.
fn redact(text: &str, mut entities: Vec<Entity<'_>>) -> String {
    entities.sort_by_key(|entity| entity.start);
    let mut replaced: Vec<Entity<'_>> = Vec::with_capacity(entities.len());
    for entity in entities {
        match replaced.last_mut() {
            Some(last) if entity.start < last.end => {
                last.end = last.end.max(entity.end);
                if entity.score > last.score {
                    (last.label, last.score) = (entity.label, entity.score);
                }
            }
            _ => replaced.push(entity),
        }
    }
    let characters = Characters::of(text);
    let (mut out, mut done) = (String::with_capacity(text.len()), 0);
    for Entity { label, start, end, .. } in replaced {
        let inside = characters.between(start, end);
        let spaces = |text: &str| text.chars().take_while(|c| c.is_whitespace()).count() as u32;
        let start = start + spaces(inside);
        if start >= end {
            continue;
        }
        let end = end - inside.chars().rev().take_while(|c| c.is_whitespace()).count() as u32;
        out.push_str(characters.between(done, start));
        out.push('[');
        out.push_str(&label.to_uppercase());
        out.push(']');
        done = end;
    }
    out.push_str(characters.rest(done));
    out
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

    fn rest(&self, start: u32) -> &'t str {
        &self.text[self.byte(start)..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entities_are_replaced_by_their_labels() {
        let entity = |label, start, end, score| Entity { label, start, end, score };
        let ada = entity("person", 0, 3, 0.9);
        let cases = [
            (vec![], "Ada lives in Köln, Ö."),
            (vec![entity("city", 13, 17, 0.8), ada], "[PERSON] lives in [CITY], Ö."),
            // The spaces that a tokenizer counts as part of a token stay.
            (vec![entity("city", 12, 17, 0.8), entity("x", 3, 4, 0.9)], "Ada lives in [CITY], Ö."),
            // Overlaps are replaced together, neighbours are not.
            (vec![ada, entity("thing", 0, 9, 0.5), entity("city", 4, 12, 0.6)], "[PERSON] Köln, Ö."),
            (
                vec![ada, entity("b", 3, 3, 0.9), entity("c", 20, 21, 0.5), entity("d", 19, 20, 0.5)],
                "[PERSON] lives in Köln, [D][C]",
            ),
        ];
        for (entities, want) in cases {
            assert_eq!(redact("Ada lives in Köln, Ö.", entities), want);
        }
        assert_eq!(redact("", Vec::new()), "");
    }
}
