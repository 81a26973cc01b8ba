//! Which files belong to a model: weights (safetensors or PyTorch's), the tokenizer, and the configuration.

use serde_json::Value;

use super::store::{Files, FilesError};
use super::text::sentence::{TEXT_SETTINGS, module_files};
use super::text::sparse::LEXICAL;
use super::text::{GLINER_CONFIG, vocabulary};

/// Small files that say how a model is used; not every model has each of them.
const CONFIGURATION: &[&str] = &[
    "config.json",
    GLINER_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "modules.json",
    TEXT_SETTINGS[0],
    TEXT_SETTINGS[1],
    TEXT_SETTINGS[2],
    TEXT_SETTINGS[3],
    TEXT_SETTINGS[4],
    TEXT_SETTINGS[5],
    TEXT_SETTINGS[6],
    "config_sentence_transformers.json",
    LEXICAL,
];

/// The small files that exist. A vocabulary counts only if the tokenizer is made of it.
pub fn configuration(exists: impl Fn(&str) -> bool) -> impl Iterator<Item = &'static str> {
    let vocabulary = if exists("tokenizer.json") { &[] } else { vocabulary::FILES };
    CONFIGURATION.iter().chain(vocabulary).copied().filter(move |name| exists(name))
}

/// The one file of weights, or the shards that an index names, sorted; `None` if there is neither.
///
/// # Errors
/// `json` fails on the index.
pub fn weights<E>(
    exists: impl Fn(&str) -> bool,
    json: impl Fn(&str) -> Result<Option<Value>, E>,
) -> Result<Option<Vec<String>>, E> {
    // Safetensors come first: they are read without interpreting anything.
    for (one, index) in [
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ] {
        if exists(one) {
            return Ok(Some(vec![one.to_owned()]));
        }
        if !exists(index) {
            continue;
        }
        let index = json(index)?.unwrap_or_default();
        let map = index["weight_map"].as_object().into_iter().flatten();
        // A shard is a file beside the index.
        let is_name = |shard: &&str| !shard.contains(['/', '\\']) && *shard != "..";
        let mut shards: Vec<String> =
            map.filter_map(|(_, shard)| shard.as_str()).filter(is_name).map(str::to_owned).collect();
        shards.sort();
        shards.dedup();
        return Ok(Some(shards));
    }
    Ok(None)
}

impl Files {
    /// The names of the files with weights.
    ///
    /// # Errors
    /// There are no weights, or their index cannot be read.
    pub fn weights(&self) -> Result<Vec<String>, FilesError> {
        weights(|name| self.exists(name), |name| self.json(name))?
            .ok_or_else(|| FilesError::NoWeights { found: self.all() })
    }

    /// The names of all existing files that belong to the model, sorted.
    ///
    /// # Errors
    /// There are no weights, or a file that names others cannot be read.
    pub fn names(&self) -> Result<Vec<String>, FilesError> {
        let mut names = self.weights()?;
        names.extend(configuration(|name| self.exists(name)).map(str::to_owned));
        names.extend(module_files(self.json("modules.json")?.as_ref(), |name| self.exists(name))?);
        names.sort();
        Ok(names)
    }
}
