//! similarity: the candidates nearest to a record by cosine, `{"matches":[{"id":…,"score":…},…]}`. Every candidate is
//! compared: the result is exact. They are loaded at the start.

use std::borrow::Cow;

use serde::Serialize;

use super::candidates::Candidates;
use super::embedding::{Vectors, normalized, prompt_rule};
use super::kinds::{CHUNKS, Family, Kind, Reads, chunk_rules};
use super::text::{self, Chunk, PredictText, TextTask};
use super::{NUMBER, TaskError, Written, to_json};
use crate::codec::write::schema::{Field, Type};
use crate::engine::Engine;
use crate::model::kernels::nearest::Found;
use crate::model::vectors::is_file_of_vectors;
use crate::model::{Model, Output};
use crate::record::RecordError;
use crate::settings::{self, TaskKind};
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("similarity"),
    prediction: "`{\"matches\":[{\"id\":…,\"score\":…},…]}`: the nearest candidates of a file",
    fields: |_| {
        let found = vec![
            Field::new(1, "id", Type::Text, "The candidate's id"),
            Field::new(2, "score", Type::Float, "Cosine of the two vectors"),
        ];
        vec![Field::new(
            1,
            "matches",
            Type::objects("Match", found),
            "The nearest candidates, the nearest first",
        )]
    },
    shows: |_| Shows::Best,
    keys: &[
        "top_k",
        "candidates",
        "candidates_ids",
        "prompt",
        "prompt_name",
        "candidates_prompt",
        "candidates_prompt_name",
        "overflow",
        "stride",
        "cache",
    ],
    pointers: &[],
    overflow: CHUNKS,
    check: |task| {
        let mut problems = chunk_rules(task);
        problems.extend(prompt_rule(("prompt", &task.prompt), ("prompt_name", &task.prompt_name)));
        problems.extend(prompt_rule(
            ("candidates_prompt", &task.candidates_prompt),
            ("candidates_prompt_name", &task.candidates_prompt_name),
        ));
        problems.extend(candidates_rules(task));
        problems
    },
    family: Family::Text(Output::Embedding),
    reads: Reads::Text,
    load: |settings, metrics| {
        text::load(settings, Output::Embedding, metrics, |texts, engine| {
            let predict = Similarity::load(&texts.model, engine, &settings.task)?;
            TextTask::new(texts, predict, &settings.task)
        })
    },
};

fn candidates_rules(task: &settings::Task) -> Vec<(&'static str, String)> {
    let Some(path) = &task.candidates else {
        let message = "similarity needs a file of candidates: JSON lines with {\"id\":…,\"text\":…}, or vectors \
                       in .npy or .safetensors";
        return vec![("candidates", message.to_owned())];
    };
    let mut problems = Vec::new();
    if is_file_of_vectors(path) {
        let prompts = [
            ("candidates_prompt", &task.candidates_prompt),
            ("candidates_prompt_name", &task.candidates_prompt_name),
        ];
        for (key, _) in prompts.into_iter().filter(|(_, prompt)| prompt.is_some()) {
            problems.push((key, "has no effect on candidates that are vectors already".to_owned()));
        }
    } else if task.candidates_ids.is_some() {
        let message = "has no effect on candidates that are texts, which have their ids in their own file";
        problems.push(("candidates_ids", message.to_owned()));
    }
    problems
}

pub(super) struct Similarity {
    candidates: Candidates,
    top_k: usize,
    /// Maximum bytes of a match.
    match_bytes: usize,
    /// How a record's answers become a vector.
    of_record: Vectors,
}

impl Similarity {
    pub fn load(model: &Model, engine: &Engine<Model>, task: &settings::Task) -> Result<Self, TaskError> {
        let candidates = Candidates::load(model, engine, task)?;
        let of_record = Vectors { normalize: model.embedding.normalize, width: model.width() };
        let top_k = task.top_k.unwrap_or(1).min(candidates.len());
        let match_bytes = candidates.longest_id() + 24 + NUMBER;
        Ok(Self { candidates, top_k, match_bytes, of_record })
    }
}

#[derive(Serialize)]
struct Matches<'a> {
    matches: Vec<Match<'a>>,
}

#[derive(Serialize)]
struct Match<'a> {
    id: Cow<'a, str>,
    score: f32,
}

impl PredictText for Similarity {
    fn write(&self, chunks: &[Chunk<'_>], out: &mut Vec<u8>) -> Result<(), RecordError> {
        let mut result = Ok(());
        self.write_all(&[chunks], out, &mut |written, _| result = written);
        result
    }

    /// One multiplication for all texts.
    fn write_all(&self, texts: &[&[Chunk<'_>]], out: &mut Vec<u8>, written: &mut Written<'_>) {
        let queries: Vec<f32> =
            texts.iter().flat_map(|chunks| normalized(&self.of_record.of(chunks))).collect();
        for found in self.candidates.nearest(&queries, self.top_k) {
            let one = |found: Found| Match { id: self.candidates.id(found.index), score: found.score };
            let matches = found.into_iter().map(one).collect();
            let result = to_json(&Matches { matches }, out);
            written(result, out);
        }
    }

    fn norm(&self, answer: &[f32]) -> Option<f32> {
        Some(self.of_record.norm(answer))
    }

    fn bytes(&self) -> usize {
        16 + self.top_k * self.match_bytes
    }

    fn memory(&self) -> usize {
        self.candidates.bytes()
    }
}
