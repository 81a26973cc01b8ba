//! token-classification with `task.labels`: GLiNER finds entities of labels that the settings name. Follows the gliner
//! package's `predict_entities`: spans of words whose score is above the threshold, the best ones first, without those
//! that overlap a better one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::entities::{self, Entity};
use super::kinds::labels_rule;
use super::text::{SEQUENCE, Source, not_loaded, not_tokens, start, stride};
use super::{Kind, Task, TaskError};
use crate::codec::Input;
use crate::codec::write::Writer;
use crate::compute::{Batched, Compute, Pace};
use crate::engine::Rows;
use crate::model::{Candidate, Gliner, Place, PromptedWords};
use crate::record::{Fault, RecordError};
use crate::settings::{self, Overflow, Settings};
use crate::telemetry::Metrics;

/// The package's default of `task.threshold`.
const THRESHOLD: f64 = 0.5;

/// Problems of `task.labels` and of the keys that go with it.
pub(super) fn check(task: &settings::Task) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    if task.labels.is_empty() {
        let set = [
            ("threshold", task.threshold.is_some()),
            ("nested", task.nested),
            ("multi_label", task.multi_label),
        ];
        let message = "has no effect without labels, which only GLiNER has";
        problems.extend(set.iter().filter(|(_, set)| *set).map(|(key, _)| (*key, message.to_owned())));
        return problems;
    }
    if task.aggregation != settings::Aggregation::default() {
        problems.push(("aggregation", "has no effect with labels: GLiNER finds whole words".to_owned()));
    }
    if task.labels.iter().any(|label| label.trim().is_empty()) {
        problems.push(("labels", "one of them is empty".to_owned()));
    }
    problems.extend(labels_rule(task));
    problems
}

/// The threshold and the labels of a GLiNER checkpoint, from the settings.
///
/// # Errors
/// There are no labels.
pub fn load_model(settings: &Settings, source: Source) -> Result<Gliner, TaskError> {
    let task = &settings.task;
    if task.labels.is_empty() {
        return Err(TaskError::Setting {
            key: "task.labels",
            message: "the model is GLiNER, which finds the entities that are named here: set a list such as \
                      [person, phone number]"
                .to_owned(),
        });
    }
    let threshold = task.threshold.unwrap_or(THRESHOLD) as f32;
    Gliner::load(source.files, source.placement, &task.labels, threshold).map_err(not_loaded(settings))
}

/// Loads a GLiNER checkpoint and the task that uses it.
pub(super) fn load(
    settings: &Settings,
    source: Source,
    metrics: &Arc<Metrics>,
) -> Result<Arc<dyn Compute>, TaskError> {
    let model = Arc::new(load_model(settings, source.clone())?);
    let task = &settings.task;
    // A text needs room for a span of words, beside the labels.
    let (room, least) = (model.room(), 2 * model.max_width);
    if room < least {
        return Err(TaskError::Setting {
            key: "task.labels",
            message: format!(
                "they take {} of the model's {} tokens, which leaves {room} for a text; at least {least} are needed: name \
                 fewer or shorter labels",
                model.prompt_tokens(),
                model.max_tokens()
            ),
        });
    }
    let stride = stride(task, room)?;
    let architecture = format!(
        "GLiNER on {}, entities of up to {} words, labels: {}",
        model.architecture().name,
        model.max_width,
        task.labels.join(", ")
    );
    let about = source.about(settings, architecture, model.weight_bytes());
    let (is_cpu, longest) = (model.placement.is_cpu(), model.max_tokens());
    let (engine, seconds_per_token) =
        start(Arc::clone(&model), &about, is_cpu, longest, None, settings, metrics)?;
    let pace = Pace::new(seconds_per_token);
    let decoder = Kind::decoder(settings)?;
    let writer = Writer::new(settings);
    let task = LabelledSpans {
        labels: task.labels.clone(),
        overflow: Kind::of(task.kind).overflow(task),
        stride,
        overlaps: Overlaps { nested: task.nested, multi_label: task.multi_label },
        redact: task.redact,
        model,
        metrics: Arc::clone(metrics),
    };
    Ok(Arc::new(Batched { about, decoder, writer, task, engine, pace, metrics: Arc::clone(metrics) }))
}

/// Finds spans of words for labels.
struct LabelledSpans {
    model: Arc<Gliner>,
    labels: Vec<String>,
    overflow: Overflow,
    stride: usize,
    overlaps: Overlaps,
    redact: bool,
    metrics: Arc<Metrics>,
}

/// A record's text and where its words are.
#[derive(Debug)]
struct Kept {
    text: Box<str>,
    words: Vec<Place>,
    /// First word of each item.
    firsts: Vec<u32>,
}

/// Which overlaps of entities are allowed.
#[derive(Debug, Clone, Copy)]
struct Overlaps {
    /// One entity within another.
    nested: bool,
    /// Several labels of the same words.
    multi_label: bool,
}

impl Overlaps {
    /// Whether an entity is left out because of a better one.
    fn exclude(self, one: &Candidate, better: &Candidate) -> bool {
        if (one.first, one.last) == (better.first, better.last) {
            return !self.multi_label || one.label == better.label;
        }
        let within = |a: &Candidate, b: &Candidate| b.first <= a.first && a.last <= b.last;
        let overlap = one.first <= better.last && better.first <= one.last;
        overlap && !(self.nested && (within(one, better) || within(better, one)))
    }

    /// The best candidates, in the order of their first words. `width`: words of the widest one.
    fn choose(self, mut candidates: Vec<Candidate>, width: usize) -> Vec<Candidate> {
        candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut chosen: BTreeMap<u32, Vec<Candidate>> = BTreeMap::new();
        for one in candidates {
            // Others with words in common begin at most so many words before.
            let near = one.first.saturating_sub(width as u32 - 1)..=one.last;
            if !chosen.range(near).flat_map(|(_, all)| all).any(|better| self.exclude(&one, better)) {
                chosen.entry(one.first).or_default().push(one);
            }
        }
        chosen.into_values().flatten().collect()
    }
}

impl LabelledSpans {
    /// The candidates of all items, by the words of the whole text.
    fn candidates(kept: &Kept, answers: &Rows<'_, f32>) -> Vec<Candidate> {
        let of_item = |(answer, &start): (_, &u32)| {
            Candidate::of(answer).map(move |one| Candidate {
                first: one.first + start,
                last: one.last + start,
                ..one
            })
        };
        answers.iter().zip(&kept.firsts).flat_map(of_item).collect()
    }

    fn entity<'a>(&'a self, kept: &Kept, of: &Candidate) -> Entity<'a> {
        let (first, last) = (kept.words[of.first as usize], kept.words[of.last as usize]);
        Entity { label: &self.labels[of.label as usize], start: first.start, end: last.end, score: of.score }
    }

    /// Counts a record whose text is truncated.
    ///
    /// # Errors
    /// `task.overflow` is `dead_letter`.
    fn too_long(&self) -> Result<(), RecordError> {
        if self.overflow == Overflow::DeadLetter {
            let message = format!(
                "more than {} words, or more than the {} tokens that the labels leave",
                self.model.max_words,
                self.model.room()
            );
            return Err(RecordError::new(Fault::TooLong, message));
        }
        self.metrics.truncated.inc();
        Ok(())
    }
}

impl Task for LabelledSpans {
    type Item = PromptedWords;
    type Value = f32;
    type Kept = Kept;

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<PromptedWords>) -> Result<Kept, RecordError> {
        let words = self.model.words(&input.text).map_err(not_tokens)?;
        let mut chunks: Vec<Range<usize>> = self.model.chunks(&words, self.stride);
        if chunks.len() > 1 && self.overflow != Overflow::Chunk {
            self.too_long()?;
            chunks.truncate(1);
        }
        items.extend(chunks.iter().map(|chunk| self.model.item(&words, chunk.clone())));
        let firsts = chunks.iter().map(|chunk| chunk.start as u32).collect();
        Ok(Kept { text: (*input.text).into(), words: words.places, firsts })
    }

    fn predict(&self, kept: &Kept, answers: Rows<'_, f32>, out: &mut Vec<u8>) -> Result<(), RecordError> {
        let candidates = Self::candidates(kept, &answers);
        // All that is above the threshold is replaced, also what a better entity excludes from the list.
        let replaced = match self.redact {
            true => candidates.iter().map(|of| self.entity(kept, of)).collect(),
            false => Vec::new(),
        };
        let chosen = self.overlaps.choose(candidates, self.model.max_width);
        let entities = chosen.iter().map(|of| self.entity(kept, of));
        match self.redact {
            true => entities::write_redacted(&kept.text, replaced, entities, out),
            false => entities::write(&kept.text, entities, out),
        }
    }

    fn labels(&self) -> Option<Vec<String>> {
        Some(self.labels.clone())
    }

    fn footprint(&self, value: &[u8]) -> usize {
        let room = self.model.room();
        // Each token is at least one byte of the text. Chunks repeat the prompt and some tokens.
        let chunks = 1 + value.len() / (room - self.stride);
        let tokens = value.len() + chunks * (self.model.max_tokens() - room + self.stride);
        let label = self.labels.iter().map(String::len).max().unwrap_or(0);
        // A generous estimate: every third byte is an entity's only word.
        let entities = value.len() / 3 * (label + 64 + Candidate::VALUES * size_of::<f32>());
        let word = size_of::<Place>() + 2 * size_of::<u32>();
        chunks * SEQUENCE + tokens * size_of::<u32>() + value.len() * word + 2 * value.len() + entities
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_spans_are_chosen_by_the_rule_of_overlaps() {
        let candidates = || {
            let all = [
                (0, 2, 0, 0.9),
                (1, 1, 0, 0.8),
                (0, 2, 1, 0.7),
                (2, 3, 0, 0.95),
                (0, 2, 0, 0.6),
                (5, 5, 1, 0.5),
            ];
            all.map(|(first, last, label, score)| Candidate { first, last, label, score }).to_vec()
        };
        let chosen = |nested, multi_label| {
            let chosen = Overlaps { nested, multi_label }.choose(candidates(), 4);
            chosen.iter().map(|of| (of.first, of.last, of.label)).collect::<Vec<_>>()
        };
        assert_eq!(chosen(false, false), [(1, 1, 0), (2, 3, 0), (5, 5, 1)]);
        let all = |rule: Overlaps| {
            let without = candidates().into_iter().filter(|of| of.first != 2).collect();
            let chosen = rule.choose(without, 4);
            chosen.iter().map(|of| (of.first, of.last, of.label)).collect::<Vec<_>>()
        };
        let rule = |nested, multi_label| Overlaps { nested, multi_label };
        assert_eq!(all(rule(false, false)), [(0, 2, 0), (5, 5, 1)]);
        assert_eq!(all(rule(false, true)), [(0, 2, 0), (0, 2, 1), (5, 5, 1)]);
        assert_eq!(all(rule(true, false)), [(0, 2, 0), (1, 1, 0), (5, 5, 1)]);
        assert_eq!(all(rule(true, true)), [(0, 2, 0), (0, 2, 1), (1, 1, 0), (5, 5, 1)]);
    }
}
