//! The door to everything that computes. Source, sink and commands see a [`Compute`]: windows of records go in, encoded
//! windows come out. What models, items and answers are is known behind it alone.
//!
//! ```text
//! window ─▶ prepare ─▶ infer ─▶ predict ─▶ encoded window
//!           decode,    the      answers to
//!           items,     engine   predictions
//!           plan                as bytes
//! ```

mod batched;
mod noop;
mod pace;

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};

pub use batched::Batched;
pub use noop::Noop;
pub use pace::Pace;

use crate::engine::{Calibration, EngineError, RunError};
use crate::flow::{Encoded, Queued, Report};
use crate::model::Digest;
use crate::settings::TaskKind;
use crate::telemetry::Health;
use crate::window::Window;

/// What computes, in words.
#[derive(Debug, Clone)]
pub struct About {
    pub kind: TaskKind,
    /// `source@revision`: the `kandle-model` header.
    pub model: String,
    pub digest: Digest,
    /// `cpu`, `cuda:0` or `metal`; `none` without a model.
    pub device: String,
    pub dtype: String,
    /// Bytes that the weights take of the host's memory.
    pub host_memory: u64,
}

/// What the stages are wired to.
pub struct Wires {
    pub windows: Receiver<Queued<Window>>,
    pub encoded: Sender<Queued<Encoded>>,
    pub reports: Sender<Report>,
    pub health: Arc<Health>,
    /// Ends the pipeline in good order, and the process with a failure, which this says.
    pub end: Box<dyn Fn(&str) + Send + Sync>,
}

/// A thread of the pipeline, and what ends it early.
pub struct Stage<E> {
    pub name: &'static str,
    /// Works until the channel before it is closed and empty, or nobody takes what it makes.
    pub work: Box<dyn FnOnce() -> Result<(), E> + Send>,
}

/// Why nothing more can be computed.
pub type ComputeError = EngineError<()>;

/// A task with its model, ready to run.
pub trait Compute: Send + Sync {
    fn about(&self) -> &About;

    /// Bytes that a record takes, about, until it is published, beside its own: items, answers, the prediction.
    fn footprint(&self, value: &[u8]) -> usize;

    /// Seconds that the device will need for a record with a value of so many bytes, as far as is known.
    fn work(&self, value_bytes: usize) -> f64;

    /// Records that keep the device busy, each by itself.
    fn lanes(&self) -> usize;

    /// The stages between `windows` and `encoded`. Windows leave in the order they came.
    fn stages(self: Arc<Self>, wires: Wires) -> Vec<Stage<ComputeError>>;

    /// One window by itself, through the same steps.
    ///
    /// # Errors
    /// Nothing more can be computed.
    fn answer(&self, window: Window) -> Result<Encoded, ComputeError>;

    /// The budgets of a batch, measured; `None` without a model.
    fn calibrate(&self) -> Option<Result<Calibration, RunError>>;
}
