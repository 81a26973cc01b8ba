//! text-classification: `{"label":…,"score":…,"scores":{label: score, …}}`, best first.

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::kinds::{CHUNKS, Family, Kind, NEEDS_CHUNKS, Reads, chunk_rules};
use super::text::{self, Chunk, PredictText, TextTask};
use super::{NUMBER, to_json};
use crate::codec::write::schema::{Field, Type};
use crate::model::{self, Output};
use crate::record::RecordError;
use crate::settings::{self, ChunkScores, Overflow, TaskKind};
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("text-classification"),
    prediction: "`{\"label\":…,\"score\":…,\"scores\":{…}}`",
    fields,
    shows: |task| Shows::Label { all: task.top_k.is_none() },
    keys: &["top_k", "overflow", "stride", "chunk_scores", "cache"],
    pointers: &[],
    overflow: CHUNKS,
    check: |task| {
        let mut problems = chunk_rules(task);
        if task.chunk_scores != ChunkScores::default() && task.overflow != Some(Overflow::Chunk) {
            problems.push(("chunk_scores", NEEDS_CHUNKS.to_owned()));
        }
        problems
    },
    family: Family::Text(Output::Logits),
    reads: Reads::Text,
    load: |settings, metrics| {
        text::load(settings, Output::Logits, metrics, |texts, _| {
            let model = &texts.model;
            let predict = Classification::new(&model.labels, model.scores, &settings.task);
            TextTask::new(texts, predict, &settings.task)
        })
    },
};

/// Of text-classification and what predicts alike.
pub(super) fn fields(_: &settings::Task) -> Vec<Field> {
    vec![
        Field::new(1, "label", Type::Text, "The label with the highest score"),
        Field::new(2, "score", Type::Float, "The score of that label"),
        Field::new(3, "scores", Type::map(Type::Float), "The scores of the best labels, the highest first"),
    ]
}

pub struct Classification {
    labels: Vec<String>,
    scores: model::Scores,
    top_k: usize,
    /// How the scores of several chunks become those of the text.
    of_chunks: ChunkScores,
}

impl Classification {
    /// Of a model with these labels, whose logits become scores in this way.
    pub fn new(labels: &[String], scores: model::Scores, task: &settings::Task) -> Self {
        let labels = labels.to_vec();
        let top_k = task.top_k.unwrap_or(usize::MAX).min(labels.len());
        Self { scores, top_k, of_chunks: task.chunk_scores, labels }
    }

    /// The scores of a text: of several chunks, their highest ones or their mean, weighted by the chunks' numbers of
    /// tokens.
    fn of(&self, chunks: &[Chunk<'_>]) -> Vec<f32> {
        if let [one] = chunks {
            return scores(self.scores, one.answer);
        }
        let tokens: f32 = chunks.iter().map(|chunk| chunk.tokens as f32).sum();
        let each = chunks.iter().map(|chunk| {
            let scores = scores(self.scores, chunk.answer);
            match self.of_chunks {
                ChunkScores::Mean => scores.into_iter().map(|x| x * chunk.tokens as f32 / tokens).collect(),
                ChunkScores::Max => scores,
            }
        });
        let join = |mut all: Vec<f32>, scores: Vec<f32>| {
            for (all, score) in all.iter_mut().zip(scores) {
                *all = match self.of_chunks {
                    ChunkScores::Mean => *all + score,
                    ChunkScores::Max => all.max(score),
                };
            }
            all
        };
        each.reduce(join).expect("a text has a chunk")
    }
}

impl PredictText for Classification {
    fn write(&self, chunks: &[Chunk<'_>], out: &mut Vec<u8>) -> Result<(), RecordError> {
        write(&self.labels, &self.of(chunks), self.top_k, out)
    }

    fn labels(&self) -> Option<Vec<String>> {
        Some(self.labels.clone())
    }

    fn bytes(&self) -> usize {
        bytes(&self.labels, self.top_k)
    }
}

/// Appends the prediction: the label with the highest score, and the `top_k` best labels with their scores.
///
/// # Panics
/// If there are no scores.
pub(super) fn write(
    labels: &[String],
    scores: &[f32],
    top_k: usize,
    out: &mut Vec<u8>,
) -> Result<(), RecordError> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let best = order[0];
    order.truncate(top_k);
    to_json(&Scores { labels, scores, order: &order, best }, out)
}

/// Maximum bytes of such a prediction.
pub(super) fn bytes(labels: &[String], top_k: usize) -> usize {
    let label = labels.iter().map(String::len).max().unwrap_or(0) + 4 + NUMBER;
    64 + (top_k.min(labels.len()) + 1) * label
}

struct Scores<'a> {
    labels: &'a [String],
    scores: &'a [f32],
    order: &'a [usize],
    best: usize,
}

impl Serialize for Scores<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        struct Map<'a>(&'a Scores<'a>);
        impl Serialize for Map<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_map(self.0.order.iter().map(|&i| (&self.0.labels[i], self.0.scores[i])))
            }
        }
        let mut map = serializer.serialize_map(Some(3))?;
        map.serialize_entry("label", &self.labels[self.best])?;
        map.serialize_entry("score", &self.scores[self.best])?;
        map.serialize_entry("scores", &Map(self))?;
        map.end()
    }
}

/// The scores that a model's logits stand for.
pub(super) fn scores(kind: model::Scores, logits: &[f32]) -> Vec<f32> {
    match kind {
        model::Scores::Softmax => softmax(logits),
        model::Scores::Sigmoid => sigmoid(logits),
        model::Scores::Raw => logits.to_vec(),
    }
}

/// `exp(x_i - max) / Σ exp(x_j - max)`: subtracting the maximum keeps `exp` from overflowing.
pub(super) fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|x| (x - max).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

fn sigmoid(logits: &[f32]) -> Vec<f32> {
    logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(scores: model::Scores, top_k: usize, row: &[f32]) -> String {
        let labels = ["a", "b", "c"].map(str::to_owned).into();
        let mut out = Vec::new();
        let classification = Classification { labels, scores, top_k, of_chunks: ChunkScores::Mean };
        classification.write(&[Chunk::whole(row)], &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn scores_of_chunks_are_averaged_or_the_highest() {
        let chunks = [Chunk { answer: &[1.0, -4.0], tokens: 3 }, Chunk { answer: &[5.0, -8.0], tokens: 1 }];
        let of = |of_chunks| {
            let labels = ["a", "b"].map(str::to_owned).into();
            Classification { labels, scores: model::Scores::Raw, top_k: 2, of_chunks }.of(&chunks)
        };
        assert_eq!(of(ChunkScores::Mean), [2.0, -5.0]);
        assert_eq!(of(ChunkScores::Max), [5.0, -4.0]);
    }

    #[test]
    fn best_label_first() {
        let json: serde_json::Value =
            serde_json::from_str(&written(model::Scores::Softmax, 3, &[0.0, 2.0, 1.0])).unwrap();
        assert_eq!(json["label"], "b");
        assert!((json["score"].as_f64().unwrap() - 0.665_240_94).abs() < 1e-6);
        let names: Vec<&String> = json["scores"].as_object().unwrap().keys().collect();
        assert_eq!(names, ["b", "c", "a"]);
        let sum: f64 = json["scores"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
    }

    #[test]
    fn top_k_limits_the_scores() {
        assert_eq!(
            written(model::Scores::Sigmoid, 1, &[0.0, -1000.0, -9.0]),
            r#"{"label":"a","score":0.5,"scores":{"a":0.5}}"#
        );
    }

    #[test]
    fn raw_scores_stay_unchanged() {
        assert_eq!(
            written(model::Scores::Raw, 3, &[0.25, -0.5, 1.25]),
            r#"{"label":"c","score":1.25,"scores":{"c":1.25,"a":0.25,"b":-0.5}}"#
        );
    }
}
