//! Models: where their files come from, their digest and placement, and what runs them. Nothing here knows Kafka.
//!
//! ```text
//! store       model.source to files                 (manifest: which files belong to a model; digest: their hash)
//! weights     files to tensors, one at a time
//! placement   device and precision
//! text        tokenizer, encoder, heads; an architecture is a file in text/architecture
//! series      forecasts of time series, on the packed encoder too
//! onnx        any ONNX graph, by tract
//! vision      models of images: decoding, preprocessing, towers and residual networks
//! vectors     files of vectors, for the tasks
//! kernels     the operations of the layers, on CPUs and GPUs: a crate of its own, in kernels/
//! ```

mod digest;
mod manifest;
pub mod onnx;
mod placement;
pub mod series;
mod store;
pub mod text;
pub mod vectors;
pub mod vision;
mod weights;

pub use digest::Digest;
pub use kandle_kernels as kernels;
pub use kandle_kernels::{Packed, Pooling};
pub use placement::{Placement, PlacementError, free_device_memory};
pub use store::{Files, FilesError, Wants, version};
pub use text::{
    Candidate, Checkpoint, Embedding, Encoder, Gliner, Head, Layer, Model, ModelError, NoRoom, Output,
    PairPrompt, Part, Place, Prompt, PromptedWords, Prompts, Scores, Shorten, Span, Spans, TextSettings,
    TokenizeError, Tokenizer, Tokens, Words,
};

/// The first line of a Candle error; a backtrace may follow it.
pub(crate) fn message(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
