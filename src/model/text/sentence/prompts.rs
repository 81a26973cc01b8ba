//! The prompts of config_sentence_transformers.json: texts that are put before a text, by name.

use std::collections::BTreeMap;

use super::super::model::ModelError;
use super::{refuse_others, unsupported};
use crate::model::store::Files;

pub(super) const FILE: &str = "config_sentence_transformers.json";

/// A model's prompts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompts {
    named: BTreeMap<String, String>,
    /// The text of `default_prompt_name`; empty if there is none.
    pub default: String,
}

impl Prompts {
    pub(super) fn read(files: &Files) -> Result<Self, ModelError> {
        Self::read_with(files, &[])
    }

    /// `more`: keys that the caller reads.
    pub(super) fn read_with(files: &Files, more: &[&str]) -> Result<Self, ModelError> {
        let config = files.json(FILE)?.unwrap_or_default();
        let known = ["__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name"];
        refuse_others(FILE, &config, &[&known[..], more].concat())?;
        let named = config["prompts"].as_object().into_iter().flatten();
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let named: BTreeMap<String, String> =
            named.map(|(name, value)| (name.clone(), text(value))).collect();
        let default = match config["default_prompt_name"].as_str() {
            None => String::new(),
            Some(name) => named.get(name).cloned().ok_or_else(|| {
                let what = format!("default_prompt_name {name:?}");
                unsupported(FILE, &what, "a name in prompts")
            })?,
        };
        Ok(Self { named, default })
    }

    /// The prompt of this name.
    ///
    /// # Errors
    /// There is none; the message lists the names.
    pub fn get(&self, name: &str) -> Result<&str, String> {
        let names: Vec<&str> = self.named.keys().map(String::as_str).collect();
        match (self.named.get(name), names.as_slice()) {
            (Some(text), _) => Ok(text),
            (None, []) => Err(format!("{name:?} is not a prompt of the model, which has none ({FILE})")),
            (None, names) => {
                Err(format!("{name:?} is not a prompt of the model; {FILE} has: {}", names.join(", ")))
            }
        }
    }
}
