//! What stages hand on and report. Each stage consumes one form of a window and makes the next, so a window can only
//! move forward, and only a published one can be committed.

use std::ops::Range;

use crate::record::{Position, RecordError};
use crate::window::{Load, Span, Window};

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

impl Encoded {
    /// The bytes of an [`Outcome::Prediction`].
    pub fn prediction(&self, part: u32, bytes: &Range<u32>) -> &[u8] {
        &self.memory[part as usize][bytes.start as usize..bytes.end as usize]
    }
}

/// A window whose every prediction and dead letter is acknowledged: what the source may commit.
#[derive(Debug)]
pub struct Published {
    pub spans: Vec<Span>,
    /// Predictions, dead letters and tombstones of each span.
    pub counts: Vec<[u64; 3]>,
    pub records: usize,
    /// What the window held of the pipeline's limits.
    pub load: Load,
    /// Its offsets are committed already, in the transaction that published it.
    pub committed: bool,
}

/// What the stages tell the source.
#[derive(Debug)]
pub enum Report {
    Published(Published),
    /// A window of which nothing was published, because its leases had ended; it held this.
    Dropped {
        load: Load,
    },
    /// Inference on these records timed out, and the process is about to exit. The source stores their offsets in the
    /// commit metadata, then signals `kept`; it closes it where that cannot be done.
    Suspects {
        positions: Vec<Position>,
        kept: crossbeam_channel::Sender<()>,
    },
}

/// Set by the source while something waits for the open transaction: partitions to be revoked, room
/// under the memory limit. The sink then commits as soon as it can.
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

    pub fn into_inner(self) -> T {
        self.inner
    }

    /// Observes the wait under `stage`, which is a `wait_…`.
    pub fn take(self, metrics: &crate::telemetry::Metrics, stage: &str) -> T {
        metrics.stage.with_label_values(&[stage]).observe(self.since.elapsed().as_secs_f64());
        self.inner
    }
}
