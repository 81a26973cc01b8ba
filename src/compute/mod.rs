//! The interface to everything that computes. Source, sink and commands only see a [`Compute`]: windows of records go
//! in, encoded windows come out. Models, items and answers stay behind it.
//!
//! ```text
//! window ─▶ prepare ─▶ infer ─▶ predict ─▶ encoded window
//!           decode,    the      answers to
//!           items,     engine   predictions
//!           plan                as bytes
//! ```

mod batched;
pub mod detached;
mod noop;
mod pace;
mod replaceable;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crossbeam_channel::{Receiver, Sender};

pub use batched::Batched;
pub use noop::Noop;
pub use pace::Pace;
pub use replaceable::{Replaceable, Replacer};

use crate::codec::write::Writer;
use crate::engine::{Calibration, EngineError, RunError};
use crate::flow::{Encoded, ModelVersion, Queued, Report};
use crate::model::Digest;
use crate::settings::TaskKind;
use crate::telemetry::Health;
use crate::watch::Observer;
use crate::window::Window;

/// Describes the task, its model and its device.
#[derive(Debug, Clone)]
pub struct About {
    pub kind: TaskKind,
    /// `source@revision`: the `kandle-model` header.
    pub model: String,
    /// What kind of model it is; `none` without a model.
    pub architecture: String,
    pub digest: Digest,
    /// `cpu`, `cuda:0` or `metal`; `none` without a model.
    pub device: String,
    pub dtype: String,
    /// Bytes of host memory that the weights take.
    pub host_memory: u64,
}

impl About {
    /// What predictions say of the model.
    pub fn version(&self) -> ModelVersion {
        ModelVersion { model: self.model.clone(), digest: self.digest.short().to_owned() }
    }
}

/// Channels and shared state that the stages are connected to.
pub struct StageContext {
    pub windows: Receiver<Queued<Window>>,
    pub encoded: Sender<Queued<Encoded>>,
    pub reports: Sender<Report>,
    pub health: Arc<Health>,
    /// Counts and samples the predictions.
    pub observer: Observer,
    /// Set when the process is asked to stop.
    pub stop: Arc<AtomicBool>,
    /// Shuts the pipeline down gracefully and makes the process exit with this error message.
    pub end: Arc<dyn Fn(&str) + Send + Sync>,
}

/// Drops a window, and those that come after it: the process is asked to stop, and they cannot be decoded. Nothing of them
/// is published or committed, so the next start reads them again.
fn drop_windows(window: Window, windows: &Receiver<Queued<Window>>, reports: &Sender<Report>) {
    tracing::info!(
        "stopped while the schema registry was away: the records that wait for a schema are read again by the next start"
    );
    let rest = windows.iter().map(Queued::into_inner);
    for window in std::iter::once(window).chain(rest) {
        // Without the source, nobody counts what is in flight.
        let _ = reports.send(Report::Dropped { load: window.load() });
    }
}

/// A thread of the pipeline; `E` is the error that ends it early.
pub struct Stage<E> {
    pub name: &'static str,
    /// Runs until its input channel is closed and empty, or the receiver of its output is gone.
    pub work: Box<dyn FnOnce() -> Result<(), E> + Send>,
}

/// Why nothing more can be computed.
pub type ComputeError = EngineError<()>;

/// A task with its model, ready to run.
pub trait Compute: Send + Sync {
    /// Describes what it runs at present.
    fn about(&self) -> About;

    /// The JSON Pointers to what it reads of a record.
    fn pointers(&self) -> Vec<String>;

    /// The labels that its predictions may have; `None`: they have none, or every record may name its own.
    fn labels(&self) -> Option<Vec<String>>;

    /// Encodes its predictions; `None` if they are the values, unchanged.
    fn writer(&self) -> Option<Writer>;

    /// Approximate bytes that a record takes until it is published, beside its own: items, answers, the prediction.
    fn footprint(&self, value: &[u8]) -> usize;

    /// Estimated device seconds for a record with a value of `value_bytes`.
    fn work(&self, value_bytes: usize) -> f64;

    /// Prepares a window without running it: the work of each of its records, in the model's unit. A record whose items are equal
    /// to those of an earlier one has none, because they are not computed again.
    fn costs(&self, window: Window) -> Vec<u64>;

    /// Work, in the same unit, that fills the largest batch on every lane.
    fn full(&self) -> u64;

    /// Number of records that keep the device busy when each is a batch of its own.
    fn lanes(&self) -> usize;

    /// The stages between `windows` and `encoded`. Windows leave in the order they came.
    fn stages(self: Arc<Self>, wires: StageContext) -> Vec<Stage<ComputeError>>;

    /// Computes one window by itself, through the same steps.
    ///
    /// # Errors
    /// Nothing more can be computed.
    fn answer(&self, window: Window) -> Result<Encoded, ComputeError>;

    /// Like [`Compute::answer`], with predictions in JSON whatever `output.format` is.
    ///
    /// # Errors
    /// Nothing more can be computed.
    fn answer_in_json(&self, window: Window) -> Result<Encoded, ComputeError>;

    /// Measures batch budgets; `None` without a model.
    fn calibrate(&self) -> Option<Result<Calibration, RunError>>;
}
