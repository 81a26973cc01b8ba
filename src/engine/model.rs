//! The engine's view of a model: it answers items, one batch at a time.

use crate::ragged::Ragged;

/// The unit of texts.
pub const TOKENS: &str = "tokens";

/// One input of a model: a token sequence, an image, a set of tensors. A record asks for any number of them.
pub trait Item: Send + Sync + 'static {
    /// What [`Item::units`] counts: the label `unit` of `kandle_input_units_total`.
    const UNIT: &'static str = TOKENS;

    /// Its size as users see it.
    fn units(&self) -> u64 {
        u64::from(self.cost())
    }

    /// Work, in the model's unit: tokens, patches, elements.
    fn cost(&self) -> u32;

    /// Only items of one class share a batch. Models that take ragged batches have one class.
    fn class(&self) -> u64 {
        0
    }

    /// Items with equal keys have equal answers, so only one of them is computed. `None`: its answer is never reused.
    fn key(&self) -> Option<u128>;
}

/// One number of an answer.
pub trait Value: Copy + Send + Sync + std::fmt::Display + 'static {
    /// Whether a prediction can be made from it. An item with an invalid value in its answer has failed.
    fn is_valid(self) -> bool;
}

impl Value for f32 {
    fn is_valid(self) -> bool {
        self.is_finite()
    }
}

/// A model as the engine runs it.
pub trait Model: Send + Sync + 'static {
    type Item: Item;
    type Value: Value;

    /// One answer per item, in the order of the batch. An answer does not depend on the items beside it.
    ///
    /// # Errors
    /// No item of the batch is answered. The kind of [`RunError`] decides what the engine does next.
    fn run(&self, batch: &[&Self::Item]) -> Result<Ragged<Self::Value>, RunError>;

    /// A known-good item of about this cost, which every healthy device answers. Used for the first forward pass,
    /// probes and calibration.
    fn sample(&self, cost: u32) -> Self::Item;

    /// Number of an item's tokens that stand for what the model has no token for.
    fn unknown(&self, _: &Self::Item) -> u64 {
        0
    }
}

/// Why a batch has no answers.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RunError {
    /// The batch is halved and retried; a single item is retried alone.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// Possibly one item's fault: the batch is bisected to find it.
    #[error("{0}")]
    Batch(String),
    /// The device is unusable: nothing more can be computed.
    #[error("the device failed: {0}")]
    Device(String),
}
