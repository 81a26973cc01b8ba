//! A reference: the distributions of past predictions, in a JSON file without texts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Distribution, ENTITIES, ENTROPY, LABEL, SCORE, Shows, Tally};
use crate::compute::About;
use crate::settings::Settings;
use crate::task::Kind;

/// The layout of the file.
const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    pub version: u32,
    /// `task.kind` of the predictions.
    pub task: String,
    /// `source@revision` of their model, if the predictions say so.
    pub model: Option<String>,
    /// First 16 hex digits of its digest.
    pub digest: String,
    /// The topic that they were read from, and the points between which.
    pub topic: String,
    pub from: String,
    pub to: String,
    /// Number of predictions.
    pub records: u64,
    /// By name: `label`, `score`, `entropy`, `entities`.
    pub distributions: BTreeMap<String, Distribution>,
}

/// Why a reference cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    #[error("drift.reference: {}: {error}", .path.display())]
    Io { path: PathBuf, error: std::io::Error },
    #[error("drift.reference: {} is not a reference that `kandle reference` has written: {message}", .path.display())]
    Content { path: PathBuf, message: String },
    #[error(
        "drift.reference: it has predictions of task.kind: {reference}, but the configuration has {configured}"
    )]
    Task { reference: String, configured: String },
    #[error(
        "drift.reference: the model has no label {}: the reference belongs to another model; make one with `kandle reference`",
        .0.join(", ")
    )]
    Labels(Vec<String>),
    #[error("drift.reference: has no effect with task.kind: {0}, whose predictions show nothing to compare")]
    Nothing(String),
}

impl Reference {
    /// The reference of predictions; `None` if they show nothing.
    pub fn new(tally: &Tally) -> Option<Self> {
        let distributions = Distribution::all(tally);
        (!distributions.is_empty()).then(|| Self {
            version: VERSION,
            task: String::new(),
            model: None,
            digest: String::new(),
            topic: String::new(),
            from: String::new(),
            to: String::new(),
            records: tally.records,
            distributions,
        })
    }

    /// That of the settings, with what the user should know; `None`: `drift.reference` is not set.
    ///
    /// # Errors
    /// It cannot be read, or does not fit the model.
    pub fn of(
        settings: &Settings,
        about: &About,
        labels: Option<&[String]>,
    ) -> Result<Option<(Self, Vec<String>)>, ReferenceError> {
        let Some(path) = &settings.drift.reference else { return Ok(None) };
        let reference = Self::read(path)?;
        let shows = (Kind::of(settings.task.kind).shows)(&settings.task);
        let warnings = reference.fits(shows, about, labels)?;
        Ok(Some((reference, warnings)))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is no reference.
    pub fn read(path: &Path) -> Result<Self, ReferenceError> {
        let io = |error| ReferenceError::Io { path: path.to_owned(), error };
        let content = |message| ReferenceError::Content { path: path.to_owned(), message };
        let text = std::fs::read(path).map_err(io)?;
        let read: Self = serde_json::from_slice(&text).map_err(|error| content(error.to_string()))?;
        if read.version != VERSION {
            return Err(content(format!("its version is {}, not {VERSION}", read.version)));
        }
        let valid = |name: &str, of: &Distribution| match of {
            Distribution::Labels { .. } => name == LABEL,
            Distribution::Values { .. } => [SCORE, ENTROPY, ENTITIES].contains(&name),
        };
        let wrong = read.distributions.iter().find(|(name, of)| !of.is_valid() || !valid(name, of));
        match wrong {
            Some((name, _)) => Err(content(format!("the distribution {name:?} is not valid"))),
            None if read.distributions.is_empty() => Err(content("it has no distribution".to_owned())),
            None => Ok(read),
        }
    }

    /// Compares it with the model that is loaded. `labels`: those that its predictions may have, if they are known.
    /// Returns what the user should know, but what does no harm.
    ///
    /// # Errors
    /// It is of another task, or has labels that the model does not have.
    pub fn fits(
        &self,
        shows: Shows,
        about: &About,
        labels: Option<&[String]>,
    ) -> Result<Vec<String>, ReferenceError> {
        let configured = about.kind.name().to_owned();
        if shows == Shows::Nothing {
            return Err(ReferenceError::Nothing(configured));
        }
        if self.task != configured {
            return Err(ReferenceError::Task { reference: self.task.clone(), configured });
        }
        if let (Some(labels), Some(Distribution::Labels { labels: known })) =
            (labels, self.distributions.get(LABEL))
        {
            let labels: BTreeSet<&String> = labels.iter().collect();
            let missing: Vec<String> =
                known.keys().filter(|label| !labels.contains(label)).cloned().collect();
            if !missing.is_empty() {
                return Err(ReferenceError::Labels(missing));
            }
        }
        let mut warnings = Vec::new();
        if self.digest != about.digest.short() {
            warnings.push(format!(
                "the reference was made from predictions of a model with digest {}, and this one has {}: make a new one \
                 once it has predicted for a while",
                self.digest,
                about.digest.short()
            ));
        }
        if self.distributions.contains_key(ENTROPY) && shows == (Shows::Label { all: false }) {
            let message = "the reference has the entropy of all labels' scores, which predictions with task.top_k or \
                           task.multi_label do not show: kandle_drift leaves it out";
            warnings.push(message.to_owned());
        }
        Ok(warnings)
    }
}
