//! What stages pass on and report. Each stage consumes one form of a window and produces the next, so a window can only
//! move forward, and only a published one can be committed.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::record::{Position, RecordError};
use crate::watch::Tally;
use crate::window::{Load, Span, Window};

/// The version of a model that made predictions: what headers, commit metadata and traces say of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelVersion {
    /// `source@revision`.
    pub model: String,
    /// First 16 hex digits of the model digest.
    pub digest: String,
}

/// What is published for one record.
#[derive(Debug)]
pub enum Outcome {
    /// An encoded prediction: a part of [`Encoded::memory`] and the byte range in it.
    Prediction {
        part: u32,
        bytes: Range<u32>,
    },
    /// The record's own value (`noop`).
    Unchanged,
    Tombstone,
    Dead(RecordError),
}

/// A window that is ready to be published.
#[derive(Debug)]
pub struct Encoded {
    pub window: Window,
    /// The model that made all of its predictions.
    pub model: Arc<ModelVersion>,
    /// One outcome per record.
    pub outcomes: Vec<Outcome>,
    /// The bytes of the predictions, in parts.
    pub memory: Vec<Vec<u8>>,
    /// What the predictions show.
    pub tally: Tally,
    /// The samples that are published beside them, in the order of the records.
    pub samples: Vec<Sample>,
}

/// The sample of a record, for `samples.topic`.
#[derive(Debug)]
pub struct Sample {
    /// Index of the record in the window.
    pub record: u32,
    pub value: Vec<u8>,
}

impl Encoded {
    /// The bytes of an [`Outcome::Prediction`].
    pub fn prediction(&self, part: u32, bytes: &Range<u32>) -> &[u8] {
        &self.memory[part as usize][bytes.start as usize..bytes.end as usize]
    }
}

/// A window whose predictions and dead letters are all acknowledged, so that the source may commit its offsets.
#[derive(Debug)]
pub struct Published {
    pub spans: Vec<Span>,
    /// Numbers of predictions, dead letters and tombstones of each span.
    pub counts: Vec<[u64; 3]>,
    /// Number of records published.
    pub records: usize,
    /// What the window occupied of the pipeline's limits.
    pub load: Load,
    /// Its offsets are committed already, in the transaction that published it.
    pub committed: bool,
}

/// What the stages tell the source.
#[derive(Debug)]
pub enum Report {
    Published(Published),
    /// A window of which nothing is published, because its leases have ended. `load`: what it occupied of the limits.
    Dropped {
        load: Load,
    },
    /// Inference on these records timed out, and the process is about to exit. The source stores their offsets in the
    /// commit metadata, then signals `kept`; if it cannot store them, it closes `kept` instead.
    Suspects {
        positions: Vec<Position>,
        kept: crossbeam_channel::Sender<()>,
    },
}

/// Set by the source while something waits for the open transaction to be committed: a revocation, or free memory under
/// the limit. The sink then commits as soon as it can.
#[derive(Debug, Default)]
pub struct CommitSoon(std::sync::atomic::AtomicBool);

impl CommitSoon {
    pub fn set(&self, wanted: bool) {
        self.0.store(wanted, std::sync::atomic::Ordering::Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// An item in a channel, with the time since which it waits for its stage.
#[derive(Debug)]
pub struct Queued<T> {
    since: std::time::Instant,
    inner: T,
}

impl<T> Queued<T> {
    pub fn new(inner: T) -> Self {
        Self { since: std::time::Instant::now(), inner }
    }

    pub fn get(&self) -> &T {
        &self.inner
    }

    pub fn into_inner(self) -> T {
        self.inner
    }

    /// Takes the item and records its wait in the stage metric under `stage`, a `wait_…` label.
    pub fn take(self, metrics: &crate::telemetry::Metrics, stage: &str) -> T {
        metrics.stage.with_label_values(&[stage]).observe(self.since.elapsed().as_secs_f64());
        self.inner
    }
}
