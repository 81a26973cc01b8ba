//! similarity: the candidates nearest to a record by cosine, `{"matches":[{"id":…,"score":…},…]}`.
//! Candidates come from a file of JSON lines (`id`, `text`); the same model embeds them at startup.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::embedding::{Vectors, normalized, prompt_rule};
use super::kinds::{CHUNKS, Kind, chunk_rules};
use super::prompt::Choice;
use super::text::{self, Chunk, PredictText, TextTask};
use super::{NUMBER, TaskError, to_json};
use crate::engine::Engine;
use crate::model::{Model, Output};
use crate::record::RecordError;
use crate::settings::{self, TaskKind};

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("similarity"),
    prediction: "`{\"matches\":[{\"id\":…,\"score\":…},…]}`: the nearest candidates of a file",
    fields: &["matches"],
    keys: &[
        "top_k",
        "candidates",
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
        if task.candidates.is_none() {
            let message = "similarity needs a file of candidates, one {\"id\":…,\"text\":…} per line";
            problems.push(("candidates", message.to_owned()));
        }
        problems
    },
    output: Some(Output::Embedding),
    load: |settings, metrics| {
        text::load(settings, Output::Embedding, metrics, |texts, engine| {
            let predict = Similarity::load(&texts.model, engine, &settings.task)?;
            TextTask::new(texts, predict, &settings.task)
        })
    },
};

#[derive(Deserialize)]
struct Candidate {
    id: String,
    text: String,
}

pub(super) struct Similarity {
    ids: Vec<String>,
    /// `[candidates, width]`, each row scaled to length 1.
    vectors: Vec<f32>,
    top_k: usize,
    /// How a record's answers become a vector.
    of_record: Vectors,
}

impl Similarity {
    pub fn load(model: &Model, engine: &Engine<Model>, task: &settings::Task) -> Result<Self, TaskError> {
        let path = task.candidates.clone().unwrap_or_default();
        let wrong = |line: usize, message: String| {
            TaskError::Candidates(format!("{}:{line}: {message}", path.display()))
        };
        let text = std::fs::read_to_string(&path)
            .map_err(|e| TaskError::Candidates(format!("{}: {e}", path.display())))?;
        let prompt = Choice {
            text: ("task.candidates_prompt", task.candidates_prompt.as_deref()),
            name: ("task.candidates_prompt_name", task.candidates_prompt_name.as_deref()),
        }
        .resolve(model)?;
        let (mut ids, mut tokens, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let candidate: Candidate = serde_json::from_str(line).map_err(|e| wrong(i + 1, e.to_string()))?;
            if !seen.insert(candidate.id.clone()) {
                return Err(wrong(i + 1, format!("duplicate id {:?}", candidate.id)));
            }
            tokens.push(model.prompted(&prompt, &candidate.text).map_err(|e| wrong(i + 1, e.to_string()))?);
            ids.push(candidate.id);
        }
        if ids.is_empty() {
            return Err(wrong(1, "no candidates".to_owned()));
        }
        let response = engine.run(tokens).map_err(|e| TaskError::Forward(e.to_string()))?;
        if let Some((at, error)) = response.failed.first() {
            return Err(TaskError::Candidates(format!(
                "{}: candidate {:?}: {error}",
                path.display(),
                ids[*at as usize]
            )));
        }
        let answers = response.answers.rows(0..ids.len());
        let vectors = answers.iter().flat_map(normalized).collect();
        let of_record = Vectors { normalize: model.embedding.normalize, width: model.width() };
        Ok(Self { ids, vectors, top_k: task.top_k.unwrap_or(1), of_record })
    }
}

#[derive(Serialize)]
struct Matches<'a> {
    matches: Vec<Match<'a>>,
}

#[derive(Serialize)]
struct Match<'a> {
    id: &'a str,
    score: f32,
}

impl PredictText for Similarity {
    fn write(&self, chunks: &[Chunk<'_>], out: &mut Vec<u8>) -> Result<(), RecordError> {
        let row = normalized(&self.of_record.of(chunks));
        let mut matches: Vec<Match<'_>> = self
            .vectors
            .chunks_exact(row.len())
            .zip(&self.ids)
            .map(|(candidate, id)| Match { id, score: candidate.iter().zip(&row).map(|(a, b)| a * b).sum() })
            .collect();
        let best_first = |a: &Match<'_>, b: &Match<'_>| b.score.total_cmp(&a.score);
        if self.top_k < matches.len() {
            matches.select_nth_unstable_by(self.top_k - 1, best_first);
            matches.truncate(self.top_k);
        }
        // A stable sort: if all candidates are kept, those with equal scores stay in the file's order.
        matches.sort_by(best_first);
        to_json(&Matches { matches }, out)
    }

    fn bytes(&self) -> usize {
        let id = self.ids.iter().map(String::len).max().unwrap_or(0) + 24 + NUMBER;
        16 + self.top_k.min(self.ids.len()) * id
    }
}
