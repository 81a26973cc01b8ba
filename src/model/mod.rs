//! Models: finding and reading their files, their digest, the tokenizer, and the packed encoder.
//! Nothing here knows Kafka.

pub mod architecture;
mod device;
mod digest;
mod encoder;
mod files;
mod head;
mod hub;
mod items;
mod load;
pub mod ops;
mod sentence;
mod tokenize;

pub use device::{Placement, PlacementError};
pub use digest::Digest;
pub(crate) use digest::hex;
pub use encoder::{Encoder, Packed};
pub use files::{Files, FilesError};
pub use head::Head;
pub use load::{Model, ModelError, Output, Scores};
pub use ops::Pooling;
pub use sentence::{Embedding, TextSettings};
pub use tokenize::{NoRoom, Part, Shorten, Span, Spans, TokenizeError, Tokenizer, Tokens};

/// The message of an error of Candle's, which carries a backtrace below it.
pub(crate) fn message(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
