//! A model's files: a directory, a snapshot from the hub, or the bundled ones.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use super::hub;
use crate::settings;

/// The ticket classifier that is part of the binary.
const BUNDLED: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../demo/model/config.json")),
    ("tokenizer.json", include_bytes!("../../demo/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../demo/model/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../../demo/model/model.safetensors")),
];

/// Small files that say how a model is to be used; not every model has each of them.
const CONFIGURATION: &[&str] = &[
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
];

#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{source_name}: {file} is missing")]
    Missing { source_name: String, file: String },
    #[error("{source_name}: no weights: neither model.safetensors nor model.safetensors.index.json is there")]
    NoWeights { source_name: String },
    #[error("{file}: {message}")]
    Content { file: String, message: String },
    #[error("hub: {0}")]
    Hub(String),
}

/// Where a model's files are, all of them at hand.
#[derive(Debug, Clone)]
pub struct Files {
    /// As `model.source` says it.
    pub source: String,
    /// The commit on the hub.
    pub revision: Option<String>,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    Directory(PathBuf),
    Bundled,
}

impl Files {
    /// Finds the files; from the hub it downloads what the cache lacks.
    pub fn find(model: &settings::Model) -> Result<Self, FilesError> {
        let source = model.source.clone().unwrap_or_default();
        if source == "bundled" {
            return Ok(Self { source, revision: None, place: Place::Bundled });
        }
        let path = Path::new(&source);
        if path.is_dir() {
            return Ok(Self { place: Place::Directory(path.to_owned()), revision: None, source });
        }
        if !hub::is_id(&source) {
            let error = std::io::Error::new(
                std::io::ErrorKind::NotFound,
                "no such directory, and not a hub id (org/name)",
            );
            return Err(FilesError::Io { path: path.to_owned(), error });
        }
        let snapshot = hub::snapshot(model, &source)?;
        Ok(Self { source, revision: Some(snapshot.commit), place: Place::Directory(snapshot.directory) })
    }

    /// `source@revision`: the `kandle-model` header.
    pub fn name(&self) -> String {
        match &self.revision {
            Some(revision) => format!("{}@{revision}", self.source),
            None => self.source.clone(),
        }
    }

    /// The file's bytes, `None` where there is no such file.
    pub fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, FilesError> {
        match &self.place {
            Place::Bundled => {
                Ok(BUNDLED.iter().find(|(n, _)| *n == name).map(|(_, bytes)| Cow::Borrowed(*bytes)))
            }
            Place::Directory(directory) => {
                let path = directory.join(name);
                match std::fs::read(&path) {
                    Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(FilesError::Io { path, error }),
                }
            }
        }
    }

    pub fn require(&self, name: &str) -> Result<Cow<'static, [u8]>, FilesError> {
        self.read(name)?
            .ok_or_else(|| FilesError::Missing { source_name: self.source.clone(), file: name.to_owned() })
    }

    pub fn json(&self, name: &str) -> Result<Option<serde_json::Value>, FilesError> {
        match self.read(name)? {
            None => Ok(None),
            Some(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| FilesError::Content { file: name.to_owned(), message: e.to_string() }),
        }
    }

    /// The names of the files with weights.
    pub fn weights(&self) -> Result<Vec<String>, FilesError> {
        weight_names(
            |name| self.json(name),
            |name| match &self.place {
                Place::Bundled => BUNDLED.iter().any(|(n, _)| *n == name),
                Place::Directory(directory) => directory.join(name).is_file(),
            },
        )?
        .ok_or_else(|| FilesError::NoWeights { source_name: self.source.clone() })
    }

    /// The names of all files that make the model what it is and that are there, sorted.
    pub fn names(&self) -> Result<Vec<String>, FilesError> {
        let mut names = self.weights()?;
        for name in CONFIGURATION {
            if self.read(name)?.is_some() {
                names.push((*name).to_owned());
            }
        }
        names.extend(pooling_file(self.json("modules.json")?.as_ref()));
        names.sort();
        Ok(names)
    }
}

/// The one file of weights, or the shards that an index names.
fn weight_names(
    json: impl Fn(&str) -> Result<Option<serde_json::Value>, FilesError>,
    exists: impl Fn(&str) -> bool,
) -> Result<Option<Vec<String>>, FilesError> {
    if exists("model.safetensors") {
        return Ok(Some(vec!["model.safetensors".to_owned()]));
    }
    let Some(index) = json("model.safetensors.index.json")? else { return Ok(None) };
    let mut shards: Vec<String> = index["weight_map"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(_, shard)| shard.as_str())
        .map(str::to_owned)
        .collect();
    shards.sort();
    shards.dedup();
    Ok(Some(shards))
}

/// Where modules.json says that the pooling's settings are.
pub(super) fn pooling_file(modules: Option<&serde_json::Value>) -> Option<String> {
    modules?
        .as_array()?
        .iter()
        .find(|module| module["type"].as_str().is_some_and(|kind| kind.ends_with(".Pooling")))
        .and_then(|module| module["path"].as_str())
        .map(|path| format!("{path}/config.json"))
}

pub(super) const HUB_FILES: &[&str] = CONFIGURATION;
