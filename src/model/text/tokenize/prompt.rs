//! A query and a document in a prompt, as one sequence: fixed texts are before, between and after them.

use super::{TokenizeError, Tokenizer, Tokens};
use crate::model::text::ModelError;

/// The fixed texts around a query and a document.
#[derive(Debug, PartialEq, Eq)]
pub struct PairPrompt {
    before: String,
    between: String,
    /// Tokens after the document. Truncation keeps them.
    after: Vec<u32>,
}

impl PairPrompt {
    /// At least as many tokens as the prompt has.
    pub fn most_tokens(&self) -> usize {
        self.before.len() + self.between.len() + self.after.len()
    }
}

impl Tokenizer {
    /// The id of a token of the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, as the vocabulary has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// # Errors
    /// The text after the document does not begin with a token of its own, or is longer than the model takes.
    pub fn prompt(&self, before: &str, between: &str, after: &str) -> Result<PairPrompt, ModelError> {
        // Otherwise its first token would depend on how the document ends.
        if !self.added.iter().any(|token| !token.is_empty() && after.starts_with(token)) {
            return Err(ModelError::Unsupported(format!(
                "its prompt has {after:?} after the document, which does not begin with a token that tokenizer.json adds"
            )));
        }
        let mut ids = Vec::new();
        self.first(after, usize::MAX, &mut ids)?;
        if ids.len() >= self.max_tokens {
            return Err(ModelError::Unsupported(format!(
                "the end of its prompt has {} tokens, which leaves no room in the model's {}",
                ids.len(),
                self.max_tokens
            )));
        }
        Ok(PairPrompt { before: before.to_owned(), between: between.to_owned(), after: ids })
    }

    /// Tokenizes a query and a document in their prompt. If they are too long together, the end of the document is
    /// left out.
    ///
    /// # Errors
    /// The library fails on the text.
    pub fn in_prompt(
        &self,
        prompt: &PairPrompt,
        query: &str,
        document: &str,
    ) -> Result<Tokens, TokenizeError> {
        let text = [&prompt.before, query, &prompt.between, document].concat();
        let mut ids = Vec::new();
        let truncated = self.first(&text, self.max_tokens - prompt.after.len(), &mut ids)?;
        ids.extend_from_slice(&prompt.after);
        Ok(Tokens { ids, type_ids: None, truncated, unpooled: 0 })
    }
}
