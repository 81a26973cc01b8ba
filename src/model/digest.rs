//! The model digest: the same digest means the same files and settings. Predictions are then equal up to rounding,
//! which depends on the device and its kernels.
//!
//! SHA-256 over a list of lines, sorted: `name <SHA-256 of the file>` for each file of the model,
//! and `setting <JSON>` for the settings that change a prediction. Batch sizes, topics and the
//! like are not included.

use std::fmt;
use std::fs::File;

use sha2::{Digest as _, Sha256};

use super::store::{Files, FilesError, sha256};
use crate::hex::hex;
use crate::settings::Settings;

/// 64 hex digits; shown as the first 16 everywhere except in `model show`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest(String);

impl Digest {
    /// `files` is `None` for a task without a model; `dtype` is the resolved one.
    ///
    /// # Errors
    /// A file cannot be read, or the digest is not the one that `model.digest` asks for.
    pub fn new(files: Option<&Files>, settings: &Settings, dtype: &str) -> Result<Self, FilesError> {
        let hashes = files.map(Files::hashes).transpose()?.unwrap_or_default();
        let digest = Self::of(&hashes, settings, dtype)?;
        digest.check(settings)?;
        Ok(digest)
    }

    /// The digest, whatever `model.digest` says. `hashes`: [`Files::hashes`].
    ///
    /// # Errors
    /// A file that the settings name cannot be read.
    pub fn of(hashes: &[(String, [u8; 32])], settings: &Settings, dtype: &str) -> Result<Self, FilesError> {
        let mut lines: Vec<String> =
            hashes.iter().map(|(name, hash)| format!("{name} {}", hex(hash))).collect();
        let task = &settings.task;
        let files = [
            ("candidates", &task.candidates),
            ("candidates_ids", &task.candidates_ids),
            ("ranges", &task.ranges),
        ];
        for (key, path) in files {
            let Some(path) = path else { continue };
            let hash = File::open(path)
                .and_then(sha256)
                .map_err(|error| FilesError::Io { file: path.display().to_string(), error })?;
            lines.push(format!("{key} {}", hex(&hash)));
        }
        let (mut task, input) = (settings.task.set_keys(), &settings.input);
        // The content of these files is hashed, not their path. The cache does not change predictions.
        task.retain(|key, _| key != "cache" && files.iter().all(|(file, _)| key != file));
        task.insert("kind".to_owned(), settings.task.kind.name().into());
        let settings = serde_json::json!({
            "task": task,
            "input": { "format": input.format, "field": input.field, "join": input.join, "template": input.template },
            "output": { "format": settings.output.format, "include": settings.output.include },
            "dtype": dtype,
        });
        lines.push(format!("setting {settings}"));
        lines.sort();
        Ok(Self(hex(&Sha256::digest(lines.join("\n")))))
    }

    /// # Errors
    /// `model.digest` asks for another one.
    pub fn check(&self, settings: &Settings) -> Result<(), FilesError> {
        match &settings.model.digest {
            Some(pinned) if !self.0.starts_with(pinned.as_str()) => {
                Err(FilesError::Digest { pinned: pinned.clone(), found: self.0.clone() })
            }
            _ => Ok(()),
        }
    }

    /// All 64 digits.
    pub fn full(&self) -> &str {
        &self.0
    }

    /// The first 16.
    pub fn short(&self) -> &str {
        &self.0[..16]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}
