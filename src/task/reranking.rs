//! reranking: how well each of a record's documents answers its query, best first:
//! `{"results":[{"index":…,"score":…},…]}`, with the `id` of each document that has one. The query is the record's
//! text. The model is a cross-encoder, or a language model that is asked about each document: one sequence per document,
//! built as sentence-transformers' `CrossEncoder` does.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::value::RawValue;

use super::classification::{scores, softmax};
use super::kinds::{BEGINNING, Family, Kind, Reads};
use super::text::{self, SEQUENCE, Texts, not_tokens};
use super::{NUMBER, Task, TaskError, to_json};
use crate::codec::write::schema::{Field, Type};
use crate::codec::{Input, json};
use crate::engine::Rows;
use crate::model::{Output, PairPrompt, Scores, Shorten, Tokens};
use crate::record::{Fault, RecordError};
use crate::settings::{self, TaskKind};
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("reranking"),
    prediction: "`{\"results\":[{\"index\":…,\"score\":…},…]}`: a record's documents, ranked by how well they answer its query",
    fields: |_| {
        let result = vec![
            Field::new(1, "index", Type::Integer, "Place of the document in the record, from 0"),
            Field::new(2, "id", Type::Json, "The document's own id").optional(),
            Field::new(3, "score", Type::Float, "How well the document answers the query"),
        ];
        vec![Field::new(1, "results", Type::objects("Result", result), "The documents, the best first")]
    },
    shows: |_| Shows::Best,
    keys: &["documents", "instruction", "top_k", "overflow", "cache"],
    pointers: &["documents"],
    overflow: BEGINNING,
    check: |task| match task.documents {
        Some(_) => Vec::new(),
        None => vec![(
            "documents",
            "reranking needs a JSON Pointer to the documents, such as /documents".to_owned(),
        )],
    },
    family: Family::Text(Output::PairLogits),
    reads: Reads::Text,
    load: |settings, metrics| {
        let task = |texts, _: &_| Reranking::new(texts, &settings.task);
        text::load(settings, Output::PairLogits, metrics, task)
    },
};

pub struct Reranking {
    texts: Texts,
    /// JSON Pointer to the documents.
    pointer: String,
    top_k: usize,
    scores: Scores,
    /// The prompt around query and document, if the model is a language model.
    prompt: Option<PairPrompt>,
}

/// One document to rank.
struct Document<'a> {
    text: Cow<'a, str>,
    id: Option<&'a RawValue>,
}

/// The documents' ids, as JSON; empty if no document has one.
type Ids = Vec<Option<Box<str>>>;

#[derive(Serialize)]
struct Results<'a> {
    results: Vec<Ranked<'a>>,
}

#[derive(Serialize)]
struct Ranked<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a RawValue>,
    score: f32,
}

impl Reranking {
    fn new(texts: Texts, task: &settings::Task) -> Result<Self, TaskError> {
        let model = &texts.model;
        let instruction = task.instruction.as_deref();
        let prompt = match &model.question {
            Some(question) => question.prompt(instruction, &model.tokenizer).map(Some),
            None => Ok(None),
        };
        let prompt = prompt.map_err(|e| TaskError::Unsuitable(e.to_string()))?;
        if prompt.is_none() {
            if instruction.is_some() {
                let message = "the model is a classifier of pairs, which takes no instruction".to_owned();
                return Err(TaskError::Setting { key: "task.instruction", message });
            }
            model
                .tokenizer
                .takes_pairs()
                .map_err(|e| TaskError::Unsuitable(format!("it cannot take pairs of texts: {e}")))?;
        }
        let labels = model.labels.len();
        if labels > 2 {
            let message = format!("it has {labels} labels: a reranker has one (the score) or two (no, yes)");
            return Err(TaskError::Unsuitable(message));
        }
        Ok(Self {
            pointer: task.documents.clone().unwrap_or_default(),
            top_k: task.top_k.unwrap_or(usize::MAX),
            scores: model.scores,
            prompt,
            texts,
        })
    }

    fn documents<'a>(&self, found: Option<&'a RawValue>) -> Result<Vec<Document<'a>>, RecordError> {
        let values = json::list(&self.pointer, found)?;
        let document = |(index, value)| self.document(index, value);
        values.into_iter().enumerate().map(document).collect()
    }

    fn document<'a>(&self, index: usize, value: &'a RawValue) -> Result<Document<'a>, RecordError> {
        let at = || format!("{}/{index}", self.pointer);
        let Some(object) = json::members(value) else {
            return Ok(Document { text: json::text(value, at)?, id: None });
        };
        let at_text = || format!("{}/text", at());
        let text = object.get("text").ok_or_else(|| json::missing(&at_text()))?;
        Ok(Document { text: json::text(text, at_text)?, id: object.get("id") })
    }

    /// The score of a pair, from its logits.
    fn score(&self, logits: &[f32]) -> f32 {
        match logits {
            // Two labels, no and yes: the score is the probability of yes.
            [_, _] => softmax(logits)[1],
            _ => scores(self.scores, logits)[0],
        }
    }
}

impl Task for Reranking {
    type Item = Tokens;
    type Value = f32;
    type Kept = Ids;

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Tokens>) -> Result<Ids, RecordError> {
        let documents = self.documents(input.values.first().and_then(Option::as_deref))?;
        let tokenizer = &self.texts.model.tokenizer;
        let first = items.len();
        match &self.prompt {
            Some(prompt) => {
                for document in &documents {
                    items.push(tokenizer.in_prompt(prompt, &input.text, &document.text).map_err(not_tokens)?);
                }
            }
            None => {
                let query = tokenizer.part(&*input.text).map_err(not_tokens)?;
                for document in &documents {
                    let document = tokenizer.part(&*document.text).map_err(not_tokens)?;
                    let pair = tokenizer.pair(&query, &document, Shorten::Longer);
                    items.push(pair.map_err(|e| RecordError::new(Fault::TooLong, e.to_string()))?);
                }
            }
        }
        let truncated = items[first..].iter().any(|item| item.truncated);
        if truncated {
            self.texts.too_long()?;
        }
        Ok(match documents.iter().any(|document| document.id.is_some()) {
            false => Ids::new(),
            true => documents.iter().map(|document| document.id.map(|id| id.get().into())).collect(),
        })
    }

    fn predict(&self, ids: &Ids, answers: Rows<'_, f32>, out: &mut Vec<u8>) -> Result<(), RecordError> {
        let scores: Vec<f32> = answers.iter().map(|logits| self.score(logits)).collect();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        // A stable sort: documents with equal scores keep the record's order.
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(self.top_k);
        let id = |index: usize| ids.get(index)?.as_deref().and_then(|id| serde_json::from_str(id).ok());
        let results = order.into_iter().map(|index| Ranked { index, id: id(index), score: scores[index] });
        to_json(&Results { results: results.collect() }, out)
    }

    fn footprint(&self, value: &[u8]) -> usize {
        // Any string may be a document, and the query is repeated beside each document.
        let strings = json::Strings::of(value);
        let tokens = self.texts.model.tokenizer.max_tokens();
        let prompt = self.prompt.as_ref().map_or(0, PairPrompt::most_tokens);
        let both = value.len() + strings.count * (strings.longest.min(tokens) + prompt);
        let answers = strings.count * (SEQUENCE + self.texts.bytes(0) + NUMBER + 32);
        both.min(strings.count * tokens) * size_of::<u32>() + answers
    }
}
