//! What is predicted: one file per task, which holds its entry of the table, and one line below. A task makes items of
//! what a record says, and a prediction of the answers to them. Nothing here knows Kafka.

mod kinds;
pub mod text;

use std::sync::Arc;

pub use kinds::Kind;

use crate::codec::Input;
use crate::compute::Compute;
use crate::engine::{Item, Rows, Value};
use crate::model::{FilesError, ModelError, PlacementError};
use crate::record::{Fault, RecordError};
use crate::settings::Settings;
use crate::telemetry::Metrics;

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

    /// Bytes that a record takes, about, until it is published, beside the value itself: items, answers, the prediction.
    fn footprint(&self, value: &[u8]) -> usize;
}

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
    #[error("a first forward failed: {0}")]
    Forward(String),
    /// The model cannot do the task.
    #[error("the model does not fit task.kind: {0}")]
    Unsuitable(String),
    /// A setting does not fit the model.
    #[error("{key}: {message}")]
    Setting { key: &'static str, message: String },
    #[error("input.template: {0}")]
    Template(#[from] minijinja::Error),
}

/// Declares the tasks' files, and makes the table of their entries.
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
    noop,
    reranking,
    similarity,
    token_classification,
    zero_shot,
}

/// The task that the settings ask for, with its model.
///
/// # Errors
/// It cannot be loaded, or the model does not run.
pub fn load(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Arc<dyn Compute>, TaskError> {
    (Kind::of(settings.task.kind).load)(settings, metrics)
}

/// Bytes of an f32 in JSON, at most, with the comma.
const NUMBER: usize = 14;

/// Serialises into memory, which cannot fail but for values JSON has no form for.
fn to_json(value: &impl serde::Serialize, out: &mut Vec<u8>) -> Result<(), RecordError> {
    serde_json::to_writer(out, value).map_err(|e| RecordError::new(Fault::Encode, e.to_string()))
}
