//! Which files belong to a model: weights (safetensors or PyTorch's), the tokenizer, and the configuration; or an ONNX
//! file and those with its tensors.

use serde_json::Value;

use super::onnx::external_files;
use super::store::{Files, FilesError, Wants};
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
    "preprocessor_config.json",
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

/// The ONNX file among these names: `model.onnx`, or the only one.
///
/// # Errors
/// There is none, or there are several.
pub fn onnx(names: &[String]) -> Result<String, FilesError> {
    let found: Vec<&String> = names.iter().filter(|name| name.ends_with(".onnx")).collect();
    let at = |path: &str| found.iter().find(|name| **name == path);
    match (at("model.onnx").or_else(|| at("onnx/model.onnx")), &found[..]) {
        (Some(model), _) => Ok((*model).clone()),
        (None, [only]) => Ok((*only).clone()),
        (None, []) => Err(FilesError::NoOnnx { found: names.to_vec() }),
        (None, _) => Err(FilesError::SeveralOnnx { found: found.into_iter().cloned().collect() }),
    }
}

impl Files {
    /// The name of the model's ONNX file.
    ///
    /// # Errors
    /// There is none, or there are several.
    pub fn onnx(&self) -> Result<String, FilesError> {
        match self.named() {
            Some(name) => Ok(name.to_owned()),
            None => onnx(&self.all()),
        }
    }

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
    /// There are no weights, or no ONNX file where one is wanted, or a file that names others cannot be read.
    pub fn names(&self) -> Result<Vec<String>, FilesError> {
        if self.wants() == Wants::Onnx {
            let file = self.onnx()?;
            let mut names = external_files(&file, &self.require(&file)?)
                .map_err(|message| FilesError::Content { file: file.clone(), message })?;
            names.push(file);
            names.sort();
            return Ok(names);
        }
        let mut names = self.weights()?;
        names.extend(configuration(|name| self.exists(name)).map(str::to_owned));
        names.extend(module_files(self.json("modules.json")?.as_ref(), |name| self.exists(name))?);
        names.sort();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_onnx_file_is_the_only_one_or_has_the_usual_name() {
        let of = |names: &[&str]| onnx(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&["churn.onnx", "README.md"]).unwrap(), "churn.onnx");
        assert_eq!(of(&["a.onnx", "model.onnx"]).unwrap(), "model.onnx");
        assert_eq!(of(&["onnx/model.onnx", "onnx/model_int8.onnx"]).unwrap(), "onnx/model.onnx");
        assert!(
            of(&["a.onnx", "b.onnx"]).unwrap_err().to_string().contains("several ONNX files: a.onnx, b.onnx")
        );
        assert_eq!(of(&["a.txt"]).unwrap_err().to_string(), "there is no ONNX file; there is a.txt");
    }
}
