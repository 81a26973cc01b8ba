//! text-embedding: `{"embedding":[…]}`, scaled to length 1 if the model's modules.json says so.

use std::borrow::Cow;

use super::TaskError;
use super::encoding::{self, Encoder};
use super::kinds::{CHUNKS, Family, Kind, Reads, chunk_rules};
use super::text::{self, Chunk, PredictText, TextTask};
use crate::codec::write::schema::Field;
use crate::model::{Model, Output};
use crate::record::RecordError;
use crate::settings::{self, TaskKind};
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("text-embedding"),
    prediction: "`{\"embedding\":[…]}`, pooled and normalised as the model's own `modules.json` says",
    fields: |task| {
        vec![Field::new(
            1,
            "embedding",
            encoding::type_of(task),
            "The vector of the text, as task.encoding says",
        )]
    },
    shows: |_| Shows::Nothing,
    keys: &["prompt", "prompt_name", "dimensions", "encoding", "ranges", "overflow", "stride", "cache"],
    pointers: &[],
    overflow: CHUNKS,
    check: |task| {
        let mut problems = chunk_rules(task);
        problems.extend(prompt_rule(("prompt", &task.prompt), ("prompt_name", &task.prompt_name)));
        problems.extend(encoding::rules(task));
        problems
    },
    family: Family::Text(Output::Embedding),
    reads: Reads::Text,
    load: |settings, metrics| {
        text::load(settings, Output::Embedding, metrics, |texts, _| {
            let predict = Embed::of_texts(&texts.model, &settings.task)?;
            TextTask::new(texts, predict, &settings.task)
        })
    },
};

/// For tasks that put a prompt before a text: it is given by itself or by its name. Keys and values of the settings.
pub(super) fn prompt_rule(
    (key, text): (&'static str, &Option<String>),
    (name_key, name): (&'static str, &Option<String>),
) -> Option<(&'static str, String)> {
    let both = text.is_some() && name.is_some();
    both.then(|| (name_key, format!("has no effect with {key}: set one of them")))
}

/// How a model's answers become vectors.
pub struct Embed {
    vectors: Vectors,
    encoder: Encoder,
}

/// From the answers to a text to its vector.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vectors {
    pub normalize: bool,
    /// How many of the first values are kept.
    pub width: usize,
}

impl Embed {
    /// # Errors
    /// `task.dimensions` is more than the model has, or `task.ranges` does not fit.
    pub fn of_texts(model: &Model, task: &settings::Task) -> Result<Self, TaskError> {
        Self::new(model.width(), model.embedding.normalize, task)
    }

    /// Of answers of `values` values, which are scaled to length 1 if `normalize` is set.
    ///
    /// # Errors
    /// `task.dimensions` is more than that, or `task.ranges` does not fit.
    pub fn new(values: usize, normalize: bool, task: &settings::Task) -> Result<Self, TaskError> {
        let width = task.dimensions.unwrap_or(values);
        if width > values {
            let message = format!("{width} is more than the {values} values of the model's vectors");
            return Err(TaskError::Setting { key: "task.dimensions", message });
        }
        Ok(Self { vectors: Vectors { normalize, width }, encoder: Encoder::new(task, normalize, width)? })
    }
}

impl Vectors {
    /// The vector of one sequence.
    fn of_one<'a>(&self, answer: &'a [f32]) -> Cow<'a, [f32]> {
        let kept = &answer[..self.width];
        if self.normalize { Cow::Owned(normalized(kept)) } else { Cow::Borrowed(kept) }
    }

    /// The length of an answer's vector, before it is scaled to length 1.
    pub fn norm(&self, answer: &[f32]) -> f32 {
        length(&answer[..self.width]) as f32
    }

    /// The vector of a text: of several chunks, the mean of their vectors weighted by their numbers of tokens.
    pub fn of<'a>(&self, chunks: &[Chunk<'a>]) -> Cow<'a, [f32]> {
        if let [one] = chunks {
            return self.of_one(one.answer);
        }
        let mut sum = vec![0.0; self.width];
        let mut weights = 0.0;
        for chunk in chunks {
            let weight = f64::from(chunk.tokens);
            weights += weight;
            for (sum, x) in sum.iter_mut().zip(&*self.of_one(chunk.answer)) {
                *sum += weight * f64::from(*x);
            }
        }
        let mean: Vec<f32> = sum.into_iter().map(|x| (x / weights) as f32).collect();
        Cow::Owned(if self.normalize { normalized(&mean) } else { mean })
    }
}

impl PredictText for Embed {
    fn write(&self, chunks: &[Chunk<'_>], out: &mut Vec<u8>) -> Result<(), RecordError> {
        out.extend_from_slice(b"{\"embedding\":");
        self.encoder.write(&self.vectors.of(chunks), out)?;
        out.push(b'}');
        Ok(())
    }

    fn norm(&self, answer: &[f32]) -> Option<f32> {
        Some(self.vectors.norm(answer))
    }

    fn bytes(&self) -> usize {
        16 + self.encoder.bytes(self.vectors.width)
    }
}

fn length(row: &[f32]) -> f64 {
    row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// Scales to length 1, as torch's `normalize` does: a zero vector stays zero.
pub(super) fn normalized(row: &[f32]) -> Vec<f32> {
    let length = length(row).max(1e-12);
    row.iter().map(|x| (f64::from(*x) / length) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_count_by_their_tokens() {
        let chunks =
            [Chunk { answer: &[3.0, 4.0, 9.0], tokens: 3 }, Chunk { answer: &[0.0, 2.0, 9.0], tokens: 1 }];
        let plain = Vectors { normalize: false, width: 2 };
        assert_eq!(*plain.of(&chunks), [2.25, 3.5]);
        // (0.6, 0.8) and (0, 1) have the mean (0.45, 0.85).
        let unit = Vectors { normalize: true, ..plain };
        let length = 0.45f32.hypot(0.85);
        let got = unit.of(&chunks);
        assert!((got[0] - 0.45 / length).abs() < 1e-6 && (got[1] - 0.85 / length).abs() < 1e-6, "{got:?}");
        assert_eq!(*unit.of(&chunks[..1]), [0.6, 0.8]);
    }
}
