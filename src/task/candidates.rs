//! The candidates of similarity: their ids, and their vectors scaled to length 1. They come from a file of texts, which the
//! model embeds, or from a file of vectors.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Deserialize;

use super::TaskError;
use super::embedding::normalized;
use super::prompt::Choice;
use crate::engine::Engine;
use crate::model::kernels::nearest::{Candidates as Vectors, Found};
use crate::model::vectors::{VectorFile, is_file_of_vectors};
use crate::model::{Model, Prompt};
use crate::settings;

/// Texts that are embedded at once.
const TEXTS: usize = 4096;
/// Rows of a file of vectors that are read at once.
const ROWS: usize = 4096;

pub(super) struct Candidates {
    ids: Ids,
    vectors: Vectors,
}

/// The candidates' ids.
enum Ids {
    /// The rows' numbers, from 0.
    Rows,
    Numbers(Vec<i64>),
    Texts(Texts),
}

/// Texts in one allocation.
#[derive(Default)]
struct Texts {
    all: String,
    ends: Vec<usize>,
}

#[derive(Deserialize)]
struct WithText {
    id: String,
    text: String,
}

#[derive(Deserialize)]
struct WithId {
    id: String,
}

fn failed(path: &Path, message: impl std::fmt::Display) -> TaskError {
    TaskError::Candidates(format!("{}: {message}", path.display()))
}

fn at_line(path: &Path, line: usize, message: impl std::fmt::Display) -> TaskError {
    TaskError::Candidates(format!("{}:{line}: {message}", path.display()))
}

/// Calls `each` with the number of each line, from 1, and its text, except for blank lines.
fn lines(path: &Path, mut each: impl FnMut(usize, &str) -> Result<(), TaskError>) -> Result<(), TaskError> {
    let file = File::open(path).map_err(|e| failed(path, e))?;
    for (number, line) in (1..).zip(BufReader::new(file).lines()) {
        let line = line.map_err(|e| at_line(path, number, e))?;
        if !line.trim().is_empty() {
            each(number, &line)?;
        }
    }
    Ok(())
}

impl Candidates {
    /// Loads the candidates of `task.candidates`; `model` embeds those that are texts.
    ///
    /// # Errors
    /// A file cannot be read, a line or row of it is not a candidate, or two candidates have the same id.
    pub fn load(model: &Model, engine: &Engine<Model>, task: &settings::Task) -> Result<Self, TaskError> {
        let path = task.candidates.clone().unwrap_or_default();
        let candidates = match is_file_of_vectors(&path) {
            true => Self::of_vectors(&path, model.width(), task.candidates_ids.as_deref())?,
            false => {
                let prompt = Choice {
                    text: ("task.candidates_prompt", task.candidates_prompt.as_deref()),
                    name: ("task.candidates_prompt_name", task.candidates_prompt_name.as_deref()),
                };
                Self::of_texts(&path, model, engine, &prompt.resolve(model)?)?
            }
        };
        candidates.ids.refuse_duplicates().map_err(|id| failed(&path, format!("duplicate id {id:?}")))?;
        Ok(candidates)
    }

    fn of_texts(
        path: &Path,
        model: &Model,
        engine: &Engine<Model>,
        prompt: &Prompt,
    ) -> Result<Self, TaskError> {
        let (mut ids, mut vectors) = (Texts::default(), Vectors::new(model.width()));
        let mut waiting = Vec::new();
        let mut embed = |waiting: &mut Vec<_>, ids: &Texts| {
            let first = ids.len() - waiting.len();
            let count = waiting.len();
            let response =
                engine.run(std::mem::take(waiting)).map_err(|e| TaskError::Forward(e.to_string()))?;
            if let Some((at, error)) = response.failed.first() {
                let id = ids.get(first + *at as usize);
                return Err(failed(path, format!("candidate {id:?}: {error}")));
            }
            for answer in response.answers.rows(0..count).iter() {
                vectors.push(&normalized(answer));
            }
            Ok(())
        };
        lines(path, |number, line| {
            let candidate: WithText = serde_json::from_str(line).map_err(|e| at_line(path, number, e))?;
            let tokens = model.prompted(prompt, &candidate.text).map_err(|e| at_line(path, number, e))?;
            waiting.push(tokens);
            ids.push(&candidate.id);
            if waiting.len() == TEXTS { embed(&mut waiting, &ids) } else { Ok(()) }
        })?;
        if ids.len() == 0 {
            return Err(at_line(path, 1, "no candidates"));
        }
        if !waiting.is_empty() {
            embed(&mut waiting, &ids)?;
        }
        Ok(Self { ids: Ids::Texts(ids), vectors: vectors.finish() })
    }

    fn of_vectors(path: &Path, width: usize, ids: Option<&Path>) -> Result<Self, TaskError> {
        let file = VectorFile::open(path).map_err(|e| TaskError::Candidates(e.to_string()))?;
        if file.width != width {
            let message =
                format!("its vectors have {} values, but those of the model have {width}", file.width);
            return Err(failed(path, message));
        }
        let ids = match (ids, &file.ids) {
            (Some(ids), _) => Ids::Texts(Texts::read(ids, file.rows)?),
            (None, Some(numbers)) => Ids::Numbers(numbers.clone()),
            (None, None) => Ids::Rows,
        };
        let mut vectors = Vectors::new(width);
        for start in (0..file.rows).step_by(ROWS) {
            let rows = start..(start + ROWS).min(file.rows);
            let values = file.read(rows.clone()).map_err(|e| TaskError::Candidates(e.to_string()))?;
            for (row, vector) in rows.zip(values.chunks(width)) {
                if let Some(at) = vector.iter().position(|x| !x.is_finite()) {
                    return Err(failed(path, format!("row {row}: value {at} is {}", vector[at])));
                }
                if vector.iter().all(|&x| x == 0.0) {
                    return Err(failed(path, format!("row {row}: all values are 0: it has no direction")));
                }
                vectors.push(&normalized(vector));
            }
        }
        Ok(Self { ids, vectors: vectors.finish() })
    }

    pub fn len(&self) -> usize {
        self.vectors.len()
    }

    pub fn id(&self, index: u32) -> Cow<'_, str> {
        self.ids.get(index as usize)
    }

    /// Maximum bytes of an id.
    pub fn longest_id(&self) -> usize {
        match &self.ids {
            Ids::Rows | Ids::Numbers(_) => 20,
            Ids::Texts(texts) => (0..texts.len()).map(|at| texts.get(at).len()).max().unwrap_or(0),
        }
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        let ids = match &self.ids {
            Ids::Rows => 0,
            Ids::Numbers(numbers) => numbers.len() * size_of::<i64>(),
            Ids::Texts(texts) => texts.all.capacity() + texts.ends.capacity() * size_of::<usize>(),
        };
        self.vectors.bytes() + ids
    }

    /// For each query, whose vectors follow each other, the `most` nearest candidates, the nearest first.
    pub fn nearest(&self, queries: &[f32], most: usize) -> Vec<Vec<Found>> {
        self.vectors.nearest(queries, most)
    }
}

impl Ids {
    fn get(&self, index: usize) -> Cow<'_, str> {
        match self {
            Self::Rows => Cow::Owned(index.to_string()),
            Self::Numbers(numbers) => Cow::Owned(numbers[index].to_string()),
            Self::Texts(texts) => Cow::Borrowed(texts.get(index)),
        }
    }

    /// # Errors
    /// The first id that an earlier candidate has.
    fn refuse_duplicates(&self) -> Result<(), String> {
        let found = match self {
            Self::Rows => None,
            Self::Numbers(numbers) => {
                let mut seen = HashSet::with_capacity(numbers.len());
                numbers.iter().find(|&&number| !seen.insert(number)).map(i64::to_string)
            }
            Self::Texts(texts) => {
                let mut seen = HashSet::with_capacity(texts.len());
                (0..texts.len()).map(|at| texts.get(at)).find(|&id| !seen.insert(id)).map(str::to_owned)
            }
        };
        found.map_or(Ok(()), Err)
    }
}

impl Texts {
    /// Reads a file of ids: of JSON lines with an `id` each, if its name ends with `.jsonl`, or else with an id per line.
    ///
    /// # Errors
    /// It cannot be read, a line has no id, or there are not as many ids as vectors.
    fn read(path: &Path, vectors: usize) -> Result<Self, TaskError> {
        let wrong = |message: String| TaskError::Setting { key: "task.candidates_ids", message };
        let mut texts = Self::default();
        let json = path.extension().is_some_and(|extension| extension == "jsonl");
        lines(path, |number, line| {
            match json {
                true => {
                    let candidate: WithId = serde_json::from_str(line)
                        .map_err(|e| wrong(format!("{}:{number}: {e}", path.display())))?;
                    texts.push(&candidate.id);
                }
                false => texts.push(line),
            }
            Ok(())
        })?;
        match texts.len() == vectors {
            true => Ok(texts),
            false => {
                let message = format!("{}: it has {} ids for {vectors} vectors", path.display(), texts.len());
                Err(wrong(message))
            }
        }
    }

    fn push(&mut self, text: &str) {
        self.all.push_str(text);
        self.ends.push(self.all.len());
    }

    fn len(&self) -> usize {
        self.ends.len()
    }

    fn get(&self, at: usize) -> &str {
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.all[start..self.ends[at]]
    }
}
