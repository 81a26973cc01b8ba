//! token-classification: `{"entities":[{"label":…,"start":…,"end":…,"text":…,"score":…},…]}`. Follows transformers'
//! `TokenClassificationPipeline`: its aggregations, its words, and how it merges entities of overlapping chunks. Tokens
//! and entities with the label "O" (outside) are left out. With `task.labels`, the model is [`gliner`] instead.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::classification::softmax;
use super::kinds::{Family, Kind, NEEDS_CHUNKS, Reads};
use super::text::{SEQUENCE, Source, TextModel, Texts, not_tokens};
use super::{Task, TaskError, entities, gliner};
use crate::codec::Input;
use crate::compute::Compute;
use crate::engine::Rows;
use crate::model::{Gliner, Output, Span, Tokens};
use crate::record::RecordError;
use crate::settings::{self, Aggregation, Overflow, Settings, TaskKind};
use crate::telemetry::Metrics;
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("token-classification"),
    prediction: "`{\"entities\":[{\"label\":…,\"start\":…,\"end\":…,\"text\":…,\"score\":…},…]}`, offsets in Unicode characters of the text; with `redact`, `{\"text\":…,\"entities\":[…]}`: the text with `[LABEL]` for each entity, and the entities without their texts",
    fields: |task| entities::fields(task.redact),
    shows: |_| Shows::Entities,
    keys: &[
        "aggregation",
        "labels",
        "threshold",
        "nested",
        "multi_label",
        "redact",
        "stride",
        "overflow",
        "cache",
    ],
    pointers: &[],
    overflow: &[Overflow::Chunk, Overflow::Truncate, Overflow::DeadLetter],
    check,
    family: Family::Text(Output::TokenLogits),
    reads: Reads::Text,
    load,
};

fn check(task: &settings::Task) -> Vec<(&'static str, String)> {
    let mut problems = gliner::check(task);
    if let (Some(_), Some(Overflow::Truncate | Overflow::DeadLetter)) = (task.stride, task.overflow) {
        problems.push(("stride", NEEDS_CHUNKS.to_owned()));
    }
    if !task.redact {
        return problems;
    }
    if task.overflow == Some(Overflow::Truncate) {
        let message = "truncate is not supported with redact, which would publish the end of a text that the model has \
                       not read; allowed: chunk, dead_letter";
        problems.push(("overflow", message.to_owned()));
    }
    if task.labels.is_empty() && matches!(task.aggregation, Aggregation::None | Aggregation::Simple) {
        let message = "with redact, set first, average or max: otherwise parts of words may be left in the text \
                       (GLiNER needs task.labels instead)";
        problems.push(("aggregation", message.to_owned()));
    }
    problems
}

/// Loads a token classifier, or GLiNER.
fn load(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Arc<dyn Compute>, TaskError> {
    let source = Source::find(settings)?;
    if Gliner::is(&source.files) {
        return gliner::load(settings, source, metrics);
    }
    let model = TextModel::from(source, settings, Output::TokenLogits, metrics)?;
    if !settings.task.labels.is_empty() {
        return Err(TaskError::Setting {
            key: "task.labels",
            message: format!(
                "has no effect on this model, a token classifier with labels of its own ({}): remove the key, or use a \
                 GLiNER checkpoint",
                model.texts.model.labels.join(", ")
            ),
        });
    }
    let task = |texts, _: &_| TokenClassification::new(texts, &settings.task);
    Ok(Arc::new(model.batched(settings, task)?))
}

/// Label of tokens that belong to no entity.
const OUTSIDE: &str = "O";

pub struct TokenClassification {
    texts: Texts,
    aggregation: Aggregation,
    redact: bool,
    stride: usize,
    labels: Vec<Label>,
}

/// A label of the model, and its parts that group tokens into entities.
#[derive(Debug)]
struct Label {
    name: String,
    /// "B-…": begins a new entity, even right after one of the same tag.
    begins: bool,
    /// Byte where the tag begins in `name`, after "B-" or "I-". Neighbours with equal tags are grouped.
    tag: usize,
    /// Byte where the published part of `name` begins, after the first "-".
    group: usize,
}

impl Label {
    fn new(name: String) -> Self {
        let tag = if name.starts_with("B-") || name.starts_with("I-") { 2 } else { 0 };
        Self { begins: name.starts_with("B-"), tag, group: name.find('-').map_or(0, |at| at + 1), name }
    }

    fn tag(&self) -> &str {
        &self.name[self.tag..]
    }
}

/// A record's text and where its tokens are.
#[derive(Debug)]
pub struct Kept {
    text: Box<str>,
    spans: Vec<Span>,
    /// Token range of each item.
    chunks: Vec<Range<usize>>,
}

/// Consecutive tokens with one label (an index into the model's labels); `start` and `end` in characters of the text.
#[derive(Debug, Clone, PartialEq)]
struct Entity {
    label: usize,
    start: u32,
    end: u32,
    score: f32,
}

impl TokenClassification {
    fn new(texts: Texts, task: &settings::Task) -> Result<Self, TaskError> {
        let stride = texts.stride(task)?;
        let labels = texts.model.labels.iter().cloned().map(Label::new).collect();
        Ok(Self { aggregation: task.aggregation, redact: task.redact, stride, labels, texts })
    }

    /// Labels a chunk: one entity per word, or per token if the aggregation ignores words.
    fn label_chunk(&self, spans: &[Span], scores: &[Vec<f32>]) -> Vec<Entity> {
        // If the aggregation ignores words, no span continues one: each token is a word of its own.
        let words = words(spans);
        let entity = |word: Range<usize>| {
            let (label, score) = match self.aggregation {
                Aggregation::None | Aggregation::Simple | Aggregation::First => best(&scores[word.start]),
                Aggregation::Average => best(&average(&scores[word.clone()])),
                Aggregation::Max => {
                    let surest = scores[word.clone()].iter().map(|scores| best(scores));
                    surest.reduce(|a, b| if b.1 > a.1 { b } else { a }).expect("a word has a token")
                }
            };
            Entity { label, start: spans[word.start].start, end: spans[word.end - 1].end, score }
        };
        words.into_iter().map(entity).collect()
    }

    /// Joins neighbours with equal tags, unless the second one begins a new entity.
    fn group(&self, entities: Vec<Entity>) -> Vec<Entity> {
        let joins = |a: &Entity, b: &Entity| {
            let (a, b) = (&self.labels[a.label], &self.labels[b.label]);
            a.tag() == b.tag() && !b.begins
        };
        let one = |group: &[Entity]| {
            let score = group.iter().map(|entity| f64::from(entity.score)).sum::<f64>() / group.len() as f64;
            let last = &group[group.len() - 1];
            Entity { label: group[0].label, start: group[0].start, end: last.end, score: score as f32 }
        };
        entities.chunk_by(joins).map(one).collect()
    }

    /// The label of an entity as it is published.
    fn name(&self, entity: &Entity) -> &str {
        let label = &self.labels[entity.label];
        match self.aggregation {
            Aggregation::None => &label.name,
            _ => &label.name[label.group..],
        }
    }

    /// The entities of each chunk, one chunk after the other.
    fn of_chunks(&self, kept: &Kept, answers: &Rows<'_, f32>) -> Vec<Entity> {
        let leading = self.texts.model.tokenizer.leading();
        let mut all = Vec::new();
        for (i, (chunk, answer)) in kept.chunks.iter().zip(answers.iter()).enumerate() {
            let rows = answer.chunks_exact(self.labels.len()).skip(leading).take(chunk.len());
            let scores: Vec<Vec<f32>> = rows.map(softmax).collect();
            let mut found = self.label_chunk(&kept.spans[chunk.clone()], &scores);
            match self.aggregation {
                // A token in two chunks counts in the one that has more context around it.
                Aggregation::None => {
                    let own = own_part(&kept.chunks, i);
                    found = found.drain(own.start - chunk.start..own.end - chunk.start).collect();
                }
                _ => found = self.group(found),
            }
            found.retain(|entity| self.name(entity) != OUTSIDE);
            all.extend(found);
        }
        all
    }

    /// The entities of all chunks, in the order of the text.
    fn in_order(&self, kept: &Kept, mut of_chunks: Vec<Entity>) -> Vec<Entity> {
        match self.aggregation {
            _ if kept.chunks.len() < 2 => of_chunks,
            Aggregation::None => {
                of_chunks.sort_by_key(|entity| entity.start);
                of_chunks
            }
            _ => merge(of_chunks),
        }
    }

    /// An entity as it is published.
    fn published(&self, entity: &Entity) -> entities::Entity<'_> {
        let Entity { start, end, score, .. } = *entity;
        entities::Entity { label: self.name(entity), start, end, score }
    }
}

/// The tokens of chunk `i` that have the most context in it: overlaps are split in the middle.
fn own_part(chunks: &[Range<usize>], i: usize) -> Range<usize> {
    let middle = |a: &Range<usize>, b: &Range<usize>| (a.start.max(b.start) + a.end.min(b.end)) / 2;
    let chunk = &chunks[i];
    let neighbours = [i.checked_sub(1), Some(i + 1)].into_iter().flatten().filter_map(|at| chunks.get(at));
    neighbours.fold(chunk.clone(), |own, other| match other.start < chunk.start {
        true => middle(other, chunk)..own.end,
        false => own.start..middle(chunk, other),
    })
}

/// Groups tokens into words: the token range of each.
fn words(spans: &[Span]) -> Vec<Range<usize>> {
    let mut words: Vec<Range<usize>> = Vec::new();
    for (at, span) in spans.iter().enumerate() {
        match words.last_mut() {
            Some(word) if span.continues => word.end = at + 1,
            _ => words.push(at..at + 1),
        }
    }
    words
}

/// Offsets of the words.
fn places(spans: &[Span]) -> Vec<Range<u32>> {
    words(spans).into_iter().map(|word| spans[word.start].start..spans[word.end - 1].end).collect()
}

/// Extends an entity to all words that it has a part of: the end of a chunk may be within a word.
fn whole_words<'a>(entity: entities::Entity<'a>, words: &[Range<u32>]) -> entities::Entity<'a> {
    let first = words.partition_point(|word| word.end <= entity.start);
    let last = words.partition_point(|word| word.start < entity.end);
    let start = words.get(first).map_or(entity.start, |word| word.start.min(entity.start));
    let end = last.checked_sub(1).map_or(entity.end, |last| words[last].end.max(entity.end));
    entities::Entity { start, end, ..entity }
}

fn best(scores: &[f32]) -> (usize, f32) {
    let all = scores.iter().copied().enumerate();
    all.reduce(|a, b| if b.1 > a.1 { b } else { a }).expect("a model has labels")
}

fn average(scores: &[Vec<f32>]) -> Vec<f32> {
    let mean = |label: usize| scores.iter().map(|of| of[label]).sum::<f32>() / scores.len() as f32;
    (0..scores[0].len()).map(mean).collect()
}

/// Keeps the longest of overlapping entities, and of equally long ones that with the highest score. In the order of
/// their starts, each entity is compared with the last one kept.
fn merge(mut entities: Vec<Entity>) -> Vec<Entity> {
    entities.sort_by_key(|entity| entity.start);
    let mut merged: Vec<Entity> = Vec::new();
    for entity in entities {
        match merged.last_mut() {
            Some(last) if last.start <= entity.start && entity.start < last.end => {
                let (length, of_last) = (entity.end - entity.start, last.end - last.start);
                if length > of_last || (length == of_last && entity.score > last.score) {
                    *last = entity;
                }
            }
            _ => merged.push(entity),
        }
    }
    merged
}

impl Task for TokenClassification {
    type Item = Tokens;
    type Value = f32;
    type Kept = Kept;

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Tokens>) -> Result<Kept, RecordError> {
        let tokenizer = &self.texts.model.tokenizer;
        let words = !matches!(self.aggregation, Aggregation::None | Aggregation::Simple);
        let all = tokenizer.spans(&input.text, words).map_err(not_tokens)?;
        let mut chunks = match all.ids.len() {
            0 => Vec::new(),
            tokens => tokenizer.chunks(tokenizer.room(), tokens, self.stride),
        };
        if chunks.len() > 1 && self.texts.overflow != Overflow::Chunk {
            self.texts.too_long()?;
            chunks.truncate(1);
        }
        items.extend(chunks.iter().map(|chunk| tokenizer.whole(&all.ids[chunk.clone()])));
        Ok(Kept { text: (*input.text).into(), spans: all.spans, chunks })
    }

    fn predict(&self, kept: &Kept, answers: Rows<'_, f32>, out: &mut Vec<u8>) -> Result<(), RecordError> {
        let all = self.of_chunks(kept, &answers);
        // What any chunk found is replaced, also if an entity of another chunk is published instead.
        let replaced = match self.redact {
            true => {
                let words = places(&kept.spans);
                all.iter().map(|entity| whole_words(self.published(entity), &words)).collect()
            }
            false => Vec::new(),
        };
        let found = self.in_order(kept, all);
        let entities = found.iter().map(|entity| self.published(entity));
        match self.redact {
            true => entities::write_redacted(&kept.text, replaced, entities, out),
            false => entities::write(&kept.text, entities, out),
        }
    }

    fn labels(&self) -> Option<Vec<String>> {
        let published = |label: &Label| match self.aggregation {
            Aggregation::None => label.name.clone(),
            _ => label.name[label.group..].to_owned(),
        };
        let names: BTreeSet<String> = self.labels.iter().map(published).collect();
        Some(names.into_iter().filter(|name| name != OUTSIDE).collect())
    }

    fn footprint(&self, value: &[u8]) -> usize {
        let room = self.texts.model.tokenizer.room();
        // Each token is at least one byte of the text. Chunks repeat some tokens.
        let chunks = 1 + value.len() / (room - self.stride);
        let tokens = value.len() + chunks * (self.stride + 2);
        let label = self.labels.iter().map(|label| label.name.len()).max().unwrap_or(0);
        // A generous estimate: every third token is an entity.
        let entities = tokens / 3 * (label + 64);
        chunks * SEQUENCE + self.texts.bytes(tokens) + tokens * size_of::<Span>() + 2 * value.len() + entities
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_word_becomes_the_whole_word() {
        let whole = |start, end| {
            let entity = entities::Entity { label: "a", start, end, score: 0.5 };
            let entity = whole_words(entity, &[0..3, 4..9, 9..10, 12..15]);
            entity.start..entity.end
        };
        assert_eq!(whole(1, 2), 0..3);
        assert_eq!(whole(4, 9), 4..9);
        assert_eq!(whole(2, 6), 0..9);
        assert_eq!(whole(9, 13), 9..15);
        assert_eq!(whole(10, 12), 10..12);
    }
}
