//! What a window is between two stages. Each stage consumes one form and makes the next, so a
//! window can only move forward, and only a published one can be committed.

use std::ops::Range;

use crate::engine::Batch;
use crate::model::Tokens;
use crate::record::{Partition, RecordError};
use crate::window::{Span, Window};

/// What is known of one record so far.
#[derive(Debug)]
pub enum State {
    /// A null value: passed on as one.
    Tombstone,
    /// On its way to a prediction.
    Alive,
    /// A dead letter.
    Failed(RecordError),
}

/// Decoded, tokenised and planned.
#[derive(Debug)]
pub struct Prepared {
    pub window: Window,
    /// One a record.
    pub states: Vec<State>,
    /// What `output.include` copies, one a record; empty where nothing is.
    pub includes: Vec<String>,
    /// One a record that is alive, for a task with a model.
    pub tokens: Vec<Option<Tokens>>,
    pub batches: Vec<Batch>,
}

/// With the model's answer: one row of `width` numbers a record.
#[derive(Debug)]
pub struct Inferred {
    pub window: Window,
    pub states: Vec<State>,
    pub includes: Vec<String>,
    pub rows: Vec<f32>,
    pub width: usize,
}

/// What is published for one record.
#[derive(Debug)]
pub enum Outcome {
    /// Bytes of [`Encoded::memory`]: the part and the range in it.
    Prediction {
        part: u32,
        bytes: Range<u32>,
    },
    /// The record's own value (`noop`).
    Unchanged,
    Tombstone,
    Dead(RecordError),
}

/// Ready to be published.
#[derive(Debug)]
pub struct Encoded {
    pub window: Window,
    /// One a record.
    pub outcomes: Vec<Outcome>,
    pub memory: Vec<Vec<u8>>,
}

/// A window whose every prediction and dead letter is acknowledged: what the source may commit.
#[derive(Debug)]
pub struct Published {
    pub spans: Vec<Span>,
    pub records: usize,
    /// Bytes that the window held.
    pub bytes: usize,
}

/// Which partitions are ours, and since which assignment: written by the source, asked by the
/// sink before it publishes, so that what was lost is not published as if owned.
#[derive(Debug, Default)]
pub struct Ownership(std::sync::RwLock<std::collections::HashMap<Partition, u64>>);

impl Ownership {
    pub fn take(&self, partition: Partition, generation: u64) {
        self.0.write().unwrap_or_else(|e| e.into_inner()).insert(partition, generation);
    }

    pub fn release(&self, partition: &Partition) {
        self.0.write().unwrap_or_else(|e| e.into_inner()).remove(partition);
    }

    pub fn holds(&self, span: &Span) -> bool {
        let owned = self.0.read().unwrap_or_else(|e| e.into_inner());
        owned.get(&span.partition) == Some(&span.generation)
    }
}

/// Something in a channel, and since when: how long it waited for its stage.
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

    /// Observes the wait under `stage`, which is a `wait_…`.
    pub fn take(self, metrics: &crate::telemetry::Metrics, stage: &str) -> T {
        metrics.stage.with_label_values(&[stage]).observe(self.since.elapsed().as_secs_f64());
        self.inner
    }
}
