//! Texts to tokens, as the model's own tokenizer.json says, up to the model's limit.

use tokenizers::{TruncationDirection, TruncationParams, TruncationStrategy};

use super::files::{Files, FilesError};

/// One text as the encoder takes it, special tokens included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    pub ids: Vec<u32>,
    /// `None` where all are 0, as for single texts in most models.
    pub type_ids: Option<Vec<u32>>,
    /// The text had more tokens than the limit.
    pub truncated: bool,
}

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    max_tokens: usize,
}

impl Tokenizer {
    /// `positions` is how many the model has; the tokenizer's own limit counts where it is lower.
    pub fn load(files: &Files, positions: usize) -> Result<Self, FilesError> {
        let content = |message: String| FilesError::Content { file: "tokenizer.json".to_owned(), message };
        let bytes = files.require("tokenizer.json")?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| content(e.to_string()))?;
        let config = files.json("tokenizer_config.json")?.unwrap_or_default();
        let sentences = files.json("sentence_bert_config.json")?.unwrap_or_default();
        // Tokenizers without a limit say 1e30.
        let stated = [config["model_max_length"].as_f64(), sentences["max_seq_length"].as_f64()];
        let max_tokens = stated.into_iter().flatten().fold(positions as f64, f64::min) as usize;
        let own = inner.get_truncation();
        let direction = match config["truncation_side"].as_str() {
            Some("left") => TruncationDirection::Left,
            Some(_) => TruncationDirection::Right,
            None => own.map_or(TruncationDirection::Right, |own| own.direction),
        };
        let truncation = TruncationParams {
            max_length: max_tokens,
            direction,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        };
        inner.with_truncation(Some(truncation)).map_err(|e| content(e.to_string()))?;
        inner.with_padding(None);
        Ok(Self { inner, max_tokens })
    }

    /// The most tokens a text may have, special ones included.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Truncates what is over the limit and says so. A text without any token, where the tokenizer
    /// adds none, is an error.
    pub fn encode(&self, text: &str) -> Result<Tokens, String> {
        let encoding = self.inner.encode_fast(text, true).map_err(|e| e.to_string())?;
        if encoding.get_ids().is_empty() {
            return Err("the text has no tokens".to_owned());
        }
        let types = encoding.get_type_ids();
        Ok(Tokens {
            ids: encoding.get_ids().to_vec(),
            type_ids: types.iter().any(|&t| t != 0).then(|| types.to_vec()),
            truncated: !encoding.get_overflowing().is_empty(),
        })
    }
}
