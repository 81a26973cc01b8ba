//! Which prompt is put before a text: the settings', or else the model's own default.

use super::TaskError;
use crate::model::{Model, Prompt};

/// The settings of one prompt.
pub(super) struct Choice<'a> {
    /// Key and value of the prompt's text.
    pub text: (&'static str, Option<&'a str>),
    /// Key and value of the prompt's name in the checkpoint.
    pub name: (&'static str, Option<&'a str>),
}

impl Choice<'_> {
    /// The prompt; that of the checkpoint's `default_prompt_name` if no setting chooses one.
    ///
    /// # Errors
    /// The checkpoint has no prompt of that name, or the prompt leaves no token of the model's limit for a text.
    pub fn resolve(&self, model: &Model) -> Result<Prompt, TaskError> {
        let prompts = &model.embedding.prompts;
        let (key, text) = match (self.text, self.name) {
            ((key, Some(text)), _) => (key, text),
            (_, (key, Some(name))) => {
                (key, prompts.get(name).map_err(|message| TaskError::Setting { key, message })?)
            }
            ((key, None), (_, None)) => (key, prompts.default.as_str()),
        };
        let failed = |message: String| TaskError::Setting { key, message };
        let prompt = Prompt::new(text.to_owned(), &model.tokenizer, &model.embedding)
            .map_err(|error| failed(error.to_string()))?;
        let room = model.tokenizer.room();
        match (prompt.tokens as usize) < room || text.is_empty() {
            true => Ok(prompt),
            false => Err(failed(format!(
                "the prompt {text:?} leaves no room for a text: the model takes {room} tokens"
            ))),
        }
    }
}
