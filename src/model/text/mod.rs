//! Text models: the tokenizer, the packed encoder, and the heads on it.

pub mod architecture;
mod checkpoint;
mod encoder;
mod gliner;
mod head;
mod items;
mod layers;
mod model;
mod question;
mod relative;
pub(super) mod sentence;
pub(super) mod sparse;
mod tokenize;
pub(super) mod trunk;

pub use checkpoint::Checkpoint;
pub use encoder::Encoder;
pub(super) use gliner::CONFIG as GLINER_CONFIG;
pub use gliner::{Candidate, Gliner, Place, PromptedWords, Words};
pub use head::Head;
pub(super) use items::{classify, key};
pub(super) use model::labels;
pub use model::{Model, ModelError, Output, Prompt, Scores};
pub use question::Question;
pub use sentence::{Embedding, Layer, Prompts, TextSettings};
pub(super) use tokenize::vocabulary;
pub use tokenize::{NoRoom, PairPrompt, Part, Shorten, Span, Spans, TokenizeError, Tokenizer, Tokens};
pub(super) use trunk::Trunk;
