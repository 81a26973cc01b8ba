//! sparse-embedding: `{"indices":[…],"values":[…]}`, the tokens of the vocabulary that a text is about and their weights, by
//! a SPLADE model or BGE-M3's lexical weights. With `task.tokens`, also their texts.

use std::sync::Arc;

use serde::Serialize;

use super::embedding::prompt_rule;
use super::kinds::{CHUNKS, Family, Kind, Reads, chunk_rules};
use super::text::{self, Chunk, PredictText, TextTask, Texts};
use super::{NUMBER, TaskError, to_json};
use crate::codec::write::schema::{Field, Type};
use crate::model::{Model, Output};
use crate::record::RecordError;
use crate::settings::{self, Overflow, TaskKind};
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("sparse-embedding"),
    prediction: "`{\"indices\":[…],\"values\":[…]}`: the weights of the vocabulary's tokens that are not 0, by SPLADE or BGE-M3",
    fields: |task| {
        let tokens = "The texts of the tokens that indices names";
        let mut fields = vec![
            Field::new(1, "indices", Type::list(Type::Integer), "Ids of tokens, increasing"),
            Field::new(2, "values", Type::list(Type::Float), "The weight of each of the tokens"),
        ];
        if task.tokens {
            fields.push(Field::new(3, "tokens", Type::list(Type::Text), tokens).optional());
        }
        fields
    },
    shows: |_| Shows::Nothing,
    keys: &["top_k", "tokens", "prompt", "prompt_name", "overflow", "stride", "cache"],
    pointers: &[],
    overflow: CHUNKS,
    check: |task| {
        let mut problems = chunk_rules(task);
        problems.extend(prompt_rule(("prompt", &task.prompt), ("prompt_name", &task.prompt_name)));
        problems
    },
    family: Family::Text(Output::Sparse),
    reads: Reads::Text,
    load: |settings, metrics| {
        text::load(settings, Output::Sparse, metrics, |texts, _| {
            let predict = Sparse::new(&texts, &settings.task)?;
            TextTask::new(texts, predict, &settings.task)
        })
    },
};

/// A token id and its weight.
type Entry = (u32, f32);

pub struct Sparse {
    model: Arc<Model>,
    /// How many entries are kept, the largest ones.
    top_k: usize,
    /// Whether the prediction has the tokens' texts.
    tokens: bool,
}

#[derive(Serialize)]
struct Prediction {
    indices: Vec<u32>,
    values: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<Vec<String>>,
}

impl Sparse {
    /// # Errors
    /// `task.overflow` is `chunk`, and the model adds up the weights of all tokens.
    fn new(texts: &Texts, task: &settings::Task) -> Result<Self, TaskError> {
        let model = Arc::clone(&texts.model);
        if texts.overflow == Overflow::Chunk && !model.takes_sparse_chunks() {
            let message = "chunk needs a model with pooling_strategy max; this one adds up the weights of all tokens, \
                           which chunks have twice; set truncate or dead_letter";
            return Err(TaskError::Setting { key: "task.overflow", message: message.to_owned() });
        }
        let top_k = task.top_k.or(model.kept).unwrap_or(usize::MAX);
        Ok(Self { model, top_k, tokens: task.tokens })
    }
}

/// The entries of an answer: token ids and weights in turn, by increasing id.
fn entries(answer: &[f32]) -> impl Iterator<Item = Entry> + '_ {
    answer.as_chunks::<2>().0.iter().map(|&[id, weight]| (id as u32, weight))
}

/// The entries of a text, by increasing id: of several chunks, each token's largest weight.
fn merged(chunks: &[Chunk<'_>]) -> Vec<Entry> {
    let mut all: Vec<Entry> = chunks.iter().flat_map(|chunk| entries(chunk.answer)).collect();
    if chunks.len() > 1 {
        all.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
        all.dedup_by_key(|entry| entry.0);
    }
    all
}

/// The `most` largest entries, by increasing id; of equal ones, those with the lowest ids.
fn largest(mut entries: Vec<Entry>, most: usize) -> Vec<Entry> {
    if most < entries.len() {
        entries.select_nth_unstable_by(most, |a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        entries.truncate(most);
        entries.sort_unstable_by_key(|entry| entry.0);
    }
    entries
}

impl PredictText for Sparse {
    fn write(&self, chunks: &[Chunk<'_>], out: &mut Vec<u8>) -> Result<(), RecordError> {
        let entries = largest(merged(chunks), self.top_k);
        let text = |&(id, _): &Entry| self.model.tokenizer.token(id).unwrap_or_default();
        let tokens = self.tokens.then(|| entries.iter().map(text).collect());
        let (indices, values) = entries.into_iter().unzip();
        to_json(&Prediction { indices, values, tokens }, out)
    }

    fn bytes(&self) -> usize {
        let entries = self.top_k.min(self.model.values(0) / 2);
        32 + entries * ("123456,".len() + NUMBER + if self.tokens { 24 } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_have_each_tokens_largest_weight() {
        let chunk = |answer| Chunk { answer, tokens: 5 };
        let chunks = [chunk(&[1.0, 0.5, 4.0, 2.0][..]), chunk(&[0.0, 0.25, 4.0, 1.0, 9.0, 3.0]), chunk(&[])];
        assert_eq!(merged(&chunks), [(0, 0.25), (1, 0.5), (4, 2.0), (9, 3.0)]);
    }

    #[test]
    fn the_largest_entries_stay_in_the_order_of_ids() {
        let all = vec![(1, 0.5), (2, 2.0), (5, 1.0), (7, 1.0), (8, 1.0), (9, 3.0)];
        assert_eq!(largest(all.clone(), 3), [(2, 2.0), (5, 1.0), (9, 3.0)]);
        assert_eq!(largest(all.clone(), 6), all);
    }
}
