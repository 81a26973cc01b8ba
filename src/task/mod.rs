//! The tasks. Each is one file, which holds its entry of the table, and one line below. A task turns a decoded record
//! into items, and the answers to them into a prediction. Nothing here knows Kafka.

mod candidates;
mod encoding;
mod entities;
pub mod gliner;
pub mod images;
mod kinds;
mod prompt;
mod suited;
pub mod text;

use std::sync::Arc;

pub use kinds::{Family, Kind, Reads};
pub use suited::suited;

use crate::codec::{DecoderError, Input};
use crate::compute::Compute;
use crate::engine::{Item, Rows, Value};
use crate::model::onnx::OnnxError;
use crate::model::vision::VisionError;
use crate::model::{FilesError, ModelError, PlacementError};
use crate::record::{Fault, RecordError};
use crate::settings::Settings;
use crate::telemetry::Metrics;

/// Turns a decoded record into items, and the answers to them into a prediction. A prediction does not depend on the
/// other records of the window.
pub trait Task: Send + Sync + 'static {
    type Item: Item;
    type Value: Value;
    /// What [`Task::predict`] needs of a record beside the answers.
    type Kept: Send + 'static;

    /// The stage of `kandle_stage_seconds` in which the items are made, if that is work of another kind than what follows.
    const ITEMS_STAGE: Option<&'static str> = None;

    /// Appends the record's items; there may be none.
    ///
    /// # Errors
    /// The record is at fault. The caller discards the items appended so far.
    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Self::Item>) -> Result<Self::Kept, RecordError>;

    /// Appends the prediction, a JSON object. `answers` has one answer per item of the record, in their order.
    ///
    /// # Errors
    /// The record is at fault. The caller discards the bytes appended so far.
    fn predict(
        &self,
        kept: &Self::Kept,
        answers: Rows<'_, Self::Value>,
        out: &mut Vec<u8>,
    ) -> Result<(), RecordError>;

    /// Predicts several records, as [`Task::predict`] does one: for tasks that do it better together. Appends the predictions
    /// in the order of the records and calls `written` after each, with its result.
    fn predict_all(
        &self,
        records: &[(&Self::Kept, Rows<'_, Self::Value>)],
        out: &mut Vec<u8>,
        written: &mut Written<'_>,
    ) {
        for (kept, answers) in records {
            let result = self.predict(kept, answers.clone(), out);
            written(result, out);
        }
    }

    /// The labels that predictions may have; `None`: they have none, or every record may name its own.
    fn labels(&self) -> Option<Vec<String>> {
        None
    }

    /// The length of an answer that is a vector, before it is scaled to length 1: for `kandle_embedding_norm`. `None`:
    /// answers are no vectors.
    fn norm(&self, _: &[Self::Value]) -> Option<f32> {
        None
    }

    /// Bytes of host memory that the task itself takes, beside the model.
    fn memory(&self) -> usize {
        0
    }

    /// Approximate bytes that a record takes until it is published, beside its own: items, answers, the prediction.
    fn footprint(&self, value: &[u8]) -> usize;
}

/// Takes the result of a prediction and the bytes that end with it. After an error it discards what was appended; it may
/// append more after a success.
pub type Written<'a> = dyn FnMut(Result<(), RecordError>, &mut Vec<u8>) + 'a;

#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error(transparent)]
    Placement(#[from] PlacementError),
    #[error("model {model}: {error}")]
    Model { model: String, error: ModelError },
    #[error("task.candidates: {0}")]
    Candidates(String),
    #[error("model {model}: {error}")]
    Files { model: String, error: FilesError },
    #[error("model {model}: {error}")]
    Onnx { model: String, error: OnnxError },
    #[error("model {model}: {error}")]
    Vision { model: String, error: VisionError },
    #[error("the model's first forward pass failed: {0}")]
    Forward(String),
    /// The model cannot do the task.
    #[error("the model does not fit task.kind: {0}")]
    Unsuitable(String),
    /// A setting does not fit the model.
    #[error("{key}: {message}")]
    Setting { key: &'static str, message: String },
    #[error(transparent)]
    Decoder(#[from] DecoderError),
}

/// Declares the tasks' modules and makes the table of their entries.
macro_rules! tasks {
    ($($(#[$attribute:meta])* $task:ident,)*) => {
        $($(#[$attribute])* pub mod $task;)*

        /// All kinds of task.
        pub static KINDS: &[Kind] = &[$($(#[$attribute])* $task::KIND,)*];
    };
}

tasks! {
    classification,
    #[cfg(test)]
    dummy,
    embedding,
    forecast,
    image_classification,
    image_embedding,
    noop,
    reranking,
    similarity,
    sparse_embedding,
    tensor,
    token_classification,
    zero_shot,
}

/// Loads the task that the settings ask for, with its model.
///
/// # Errors
/// The task or its model cannot be loaded, or the model does not run.
pub fn load(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Arc<dyn Compute>, TaskError> {
    (Kind::of(settings.task.kind).load)(settings, metrics)
}

/// Maximum bytes of an f32 in JSON, with a comma.
const NUMBER: usize = 14;

/// Appends a value as JSON. Fails only for values that JSON cannot represent.
fn to_json(value: &impl serde::Serialize, out: &mut Vec<u8>) -> Result<(), RecordError> {
    serde_json::to_writer(out, value).map_err(|e| RecordError::new(Fault::Encode, e.to_string()))
}
