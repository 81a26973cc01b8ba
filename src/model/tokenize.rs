//! Texts to tokens, as the model's own tokenizer.json says, up to the model's limit.

use tokenizers::{PostProcessor, TruncationDirection};

use super::files::{Files, FilesError};

/// One text as the encoder takes it, special tokens included.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
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
    direction: TruncationDirection,
}

/// Bytes of a text that are looked at first for each token that is kept; four times as many while
/// they do not hold enough.
const BYTES_PER_TOKEN: usize = 16;
const LEAST_LOOK: usize = 4096;
/// A cut changes at most the tokens of the word at it: so many have to be thrown away behind it.
const MARGIN: usize = 64;
/// Bytes within which there is a space, in texts that have them.
const LONGEST_WORD: usize = 512;

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
        inner.with_truncation(None).map_err(|e| content(e.to_string()))?;
        inner.with_padding(None);
        Ok(Self { inner, max_tokens, direction })
    }

    /// The most tokens a text may have, special ones included.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Truncates what is over the limit and says so. A text without any token, where the tokenizer
    /// adds none, is an error.
    pub fn encode(&self, text: &str) -> Result<Tokens, String> {
        let mut look = (self.max_tokens * BYTES_PER_TOKEN).max(LEAST_LOOK);
        // Truncated here and not by the tokenizer, which does not say how much it threw away.
        let mut encoding = loop {
            let part = self.part(text, look);
            let encoding = self.inner.encode_fast(part, false).map_err(|e| e.to_string())?;
            if part.len() == text.len() || encoding.len() >= self.max_tokens + MARGIN {
                break encoding;
            }
            look *= 4;
        };
        let special = self.inner.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        let room = self.max_tokens.saturating_sub(special);
        let truncated = encoding.len() > room;
        encoding.truncate(room, 0, self.direction);
        let encoding = self.inner.post_process(encoding, None, true).map_err(|e| e.to_string())?;
        if encoding.get_ids().is_empty() {
            return Err("the text has no tokens".to_owned());
        }
        let types = encoding.get_type_ids();
        Ok(Tokens {
            ids: encoding.get_ids().to_vec(),
            type_ids: types.iter().any(|&t| t != 0).then(|| types.to_vec()),
            truncated,
        })
    }

    /// The end of a long text that truncation keeps, cut where words are, or the whole text. A tokenizer
    /// takes a hundred times a text's memory, and a text of megabytes is cut to some hundred tokens.
    fn part<'t>(&self, text: &'t str, look: usize) -> &'t str {
        if text.len() <= 2 * look {
            return text;
        }
        match self.direction {
            TruncationDirection::Right => {
                let start = text.floor_char_boundary(look);
                let near = &text[start..text.ceil_char_boundary(start + LONGEST_WORD)];
                near.find(char::is_whitespace).map_or(text, |at| &text[..start + at])
            }
            TruncationDirection::Left => {
                let end = text.ceil_char_boundary(text.len() - look);
                let near = &text[text.floor_char_boundary(end - LONGEST_WORD)..end];
                near.rfind(char::is_whitespace).map_or(text, |at| &text[end - near.len() + at..])
            }
        }
    }
}
