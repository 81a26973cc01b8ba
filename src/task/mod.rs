//! What is predicted: one file per task. A task makes items of what a record says, and a prediction of the answers to
//! them. Nothing here knows Kafka.

pub mod classification;
pub mod embedding;
mod similarity;
pub mod text;

use std::sync::Arc;

use crate::codec::{self, Input};
use crate::compute::{About, Compute, Noop};
use crate::engine::{Item, Rows, Value};
use crate::model::{Digest, FilesError, ModelError, Output};
use crate::record::{Fault, RecordError};
use crate::settings::{Settings, TaskKind};
use crate::telemetry::Metrics;
use text::TextModel;

/// From a decoded record to items, and from their answers to a prediction. What it says of a record does not depend on
/// the records beside it.
pub trait Task: Send + Sync + 'static {
    type Item: Item;
    type Value: Value;
    /// What [`Task::predict`] needs of a record beside the answers.
    type Kept: Send + 'static;

    /// Appends the record's items, of which there may be none.
    ///
    /// # Errors
    /// The record is at fault; items that were appended do not count.
    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Self::Item>) -> Result<Self::Kept, RecordError>;

    /// Appends the prediction, a JSON object. `answers` has one for each of the record's items, in their order.
    ///
    /// # Errors
    /// The record is at fault; bytes that were appended do not count.
    fn predict(
        &self,
        kept: &Self::Kept,
        answers: Rows<'_, Self::Value>,
        out: &mut Vec<u8>,
    ) -> Result<(), RecordError>;

    /// Bytes that a record with a value of so many bytes takes, about, until it is published, beside the value itself:
    /// items, answers, the prediction.
    fn footprint(&self, value_bytes: usize) -> usize;
}

#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error("{0}")]
    Placement(String),
    #[error("model {model}: {error}")]
    Model { model: String, error: ModelError },
    #[error("task.candidates: {0}")]
    Candidates(String),
    #[error("model {model}: {error}")]
    Files { model: String, error: FilesError },
    #[error("a first forward failed: {0}")]
    Forward(String),
    #[error("input.template: {0}")]
    Template(#[from] minijinja::Error),
}

/// The task that the settings ask for, with its model.
///
/// # Errors
/// It cannot be loaded, or the model does not run.
pub fn load(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Arc<dyn Compute>, TaskError> {
    let text = |output| TextModel::load(settings, output, metrics);
    let task = &settings.task;
    match task.kind {
        TaskKind::TextClassification => text(Output::Logits)?
            .with(settings, |texts, _| Ok(classification::Classification::new(texts, task.top_k))),
        TaskKind::TextEmbedding => {
            text(Output::Embedding)?.with(settings, |texts, _| Ok(embedding::Embed::new(texts)))
        }
        TaskKind::Similarity => text(Output::Embedding)?
            .with(settings, |texts, engine| similarity::Similarity::load(texts, engine, task)),
        TaskKind::Noop => {
            let files_error = |error| TaskError::Files { model: "noop".to_owned(), error };
            let about = About {
                kind: task.kind,
                model: "noop".to_owned(),
                digest: Digest::new(None, settings, "none").map_err(files_error)?,
                device: "none".to_owned(),
                dtype: "none".to_owned(),
                host_memory: 0,
            };
            let decoder = codec::decoder(settings)?;
            Ok(Arc::new(Noop { about, decoder, metrics: Arc::clone(metrics) }))
        }
    }
}

/// Bytes of an f32 in JSON, at most, with the comma.
const NUMBER: usize = 14;

/// Serialises into memory, which cannot fail but for values JSON has no form for.
fn to_json(value: &impl serde::Serialize, out: &mut Vec<u8>) -> Result<(), RecordError> {
    serde_json::to_writer(out, value).map_err(|e| RecordError::new(Fault::Encode, e.to_string()))
}
