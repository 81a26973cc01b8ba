//! A model's files: a directory, a snapshot from the hub, or the bundled ones.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use super::hub;
use super::sentence::{TEXT_SETTINGS, pooling_file};
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
    TEXT_SETTINGS[0],
    TEXT_SETTINGS[1],
    TEXT_SETTINGS[2],
    TEXT_SETTINGS[3],
    TEXT_SETTINGS[4],
    TEXT_SETTINGS[5],
    TEXT_SETTINGS[6],
    "config_sentence_transformers.json",
];

/// What is wrong with a model's files. Messages name files by their place in the model: callers name the model.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("there is no such directory, and it is not a hub id (org/name)")]
    NoSuchModel,
    #[error("{file}: {error}")]
    Io { file: String, error: std::io::Error },
    #[error("{file} is missing{}", how_to_make(file))]
    Missing { file: String },
    #[error("there are no weights in safetensors{}", instead(found))]
    NoWeights { found: Vec<String> },
    #[error(
        "{file} is a pointer of Git LFS and not the file itself: run `git lfs pull` in the model's directory"
    )]
    LfsPointer { file: String },
    #[error("{file}: {message}")]
    Content { file: String, message: String },
    #[error("hub: {0}")]
    Hub(String),
}

/// How a file is made that many checkpoints lack.
fn how_to_make(file: &str) -> &'static str {
    match file {
        "tokenizer.json" => {
            "; Python makes it, in the model's directory: \
             from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('.').save_pretrained('.')"
        }
        _ => "",
    }
}

/// What there is instead of safetensors, and how that is converted.
fn instead(found: &[String]) -> String {
    let with = |ending: &str| found.iter().find(|name| name.ends_with(ending));
    if let Some(name) = with(".bin").or_else(|| with(".pt")).or_else(|| with(".h5")) {
        return format!(
            ", only {name}; Python converts it, in the model's directory: from transformers import AutoModel, \
             AutoModelForSequenceClassification as Classifier; (AutoModel for embeddings, Classifier for labels).\
             from_pretrained('.').save_pretrained('.', safe_serialization=True)"
        );
    }
    match with(".onnx") {
        Some(name) => format!(
            ", only {name}, which kandle does not read: take the checkpoint that it was exported from"
        ),
        None => ": neither model.safetensors nor model.safetensors.index.json is there".to_owned(),
    }
}

/// The first line of a file that Git LFS has not fetched.
const LFS: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Where a model's files are, all of them at hand.
#[derive(Debug, Clone)]
pub struct Files {
    /// As `model.source` says it.
    pub source: String,
    /// The commit on the hub.
    pub revision: Option<String>,
    place: Place,
    /// `model.ignore_config`.
    ignored_keys: Vec<String>,
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
        let ignored_keys = model.ignore_config.clone();
        if source == "bundled" {
            return Ok(Self { source, revision: None, place: Place::Bundled, ignored_keys });
        }
        let path = Path::new(&source);
        if path.is_dir() {
            return Ok(Self {
                place: Place::Directory(path.to_owned()),
                revision: None,
                source,
                ignored_keys,
            });
        }
        if !hub::is_id(&source) {
            return Err(FilesError::NoSuchModel);
        }
        let snapshot = hub::snapshot(model, &source)?;
        let place = Place::Directory(snapshot.directory);
        Ok(Self { source, revision: Some(snapshot.commit), place, ignored_keys })
    }

    /// Keys of config.json that change nothing, as the settings say.
    pub(super) fn ignored_keys(&self) -> &[String] {
        &self.ignored_keys
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
                    Ok(bytes) if bytes.starts_with(LFS) => {
                        Err(FilesError::LfsPointer { file: name.to_owned() })
                    }
                    Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(FilesError::Io { file: name.to_owned(), error }),
                }
            }
        }
    }

    pub fn require(&self, name: &str) -> Result<Cow<'static, [u8]>, FilesError> {
        self.read(name)?.ok_or_else(|| FilesError::Missing { file: name.to_owned() })
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
        .ok_or_else(|| FilesError::NoWeights { found: self.all() })
    }

    /// Names of all files beside config.json and in a folder beneath, for messages.
    fn all(&self) -> Vec<String> {
        let Place::Directory(directory) = &self.place else { return Vec::new() };
        let list =
            |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut names: Vec<String> = list(directory)
            .flat_map(|path| if path.is_dir() { list(&path).collect() } else { vec![path] })
            .filter_map(|path| Some(path.strip_prefix(directory).ok()?.display().to_string()))
            .collect();
        names.sort();
        names
    }

    /// The names of all files that make the model what it is and that are there, sorted.
    pub fn names(&self) -> Result<Vec<String>, FilesError> {
        let mut names = self.weights()?;
        for name in CONFIGURATION {
            if self.read(name)?.is_some() {
                names.push((*name).to_owned());
            }
        }
        names.extend(pooling_file(self.json("modules.json")?.as_ref())?);
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

pub(super) const HUB_FILES: &[&str] = CONFIGURATION;
