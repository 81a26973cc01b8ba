//! What is predicted: one file per task. A task says what it wants of a model and how a row of the
//! model's numbers becomes a prediction; nothing here knows Kafka.

mod classification;
mod embedding;
mod similarity;

use std::sync::Arc;

use crate::engine::{Calibrations, Engine, Limits};
use crate::model::{Digest, Files, FilesError, Model, ModelError, Output, Placement, Tokens};
use crate::record::{Fault, RecordError};
use crate::settings::{Overflow, Settings, TaskKind};
use crate::telemetry::Metrics;

/// Writes predictions.
pub trait Predict: Send + Sync {
    /// Appends the prediction as a JSON object.
    fn write(&self, row: &[f32], out: &mut Vec<u8>) -> Result<(), RecordError>;

    /// Bytes of a prediction at most, about.
    fn bytes(&self) -> usize;
}

/// A task with its model, ready to run. `noop` has none.
pub struct Task {
    pub kind: TaskKind,
    /// `source@revision`: the `kandle-model` header.
    pub model_name: String,
    pub digest: Digest,
    pub device: String,
    pub dtype: String,
    pub text: Option<TextTask>,
}

/// A task that reads texts.
pub struct TextTask {
    pub model: Arc<Model>,
    pub engine: Engine,
    predict: Box<dyn Predict>,
    overflow: Overflow,
}

#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error("{0}")]
    Placement(String),
    #[error("model {model}: {error}")]
    Model { model: String, error: ModelError },
    #[error("task.candidates: {0}")]
    Candidates(String),
    #[error("model {model}: {error}")]
    Files { model: String, error: FilesError },
    #[error("a first forward failed: {0}")]
    Forward(String),
}

impl Task {
    /// Loads the model and runs one forward, so that what cannot work fails here.
    pub fn load(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Self, TaskError> {
        let kind = settings.task.kind;
        let model = settings.model.source.clone().unwrap_or_default();
        let files_error = |error| TaskError::Files { model: model.clone(), error };
        if kind == TaskKind::Noop {
            let digest = Digest::new(None, settings, "none").map_err(files_error)?;
            let (model_name, device, dtype) = ("noop".to_owned(), "none".to_owned(), "none".to_owned());
            return Ok(Self { kind, model_name, digest, device, dtype, text: None });
        }
        let placement =
            Placement::choose(settings.model.device, settings.model.dtype).map_err(TaskError::Placement)?;
        match &placement.reason {
            Some(reason) => tracing::info!(
                device = placement.name,
                dtype = placement.dtype_name(),
                reason,
                "device chosen"
            ),
            None => tracing::info!(device = placement.name, dtype = placement.dtype_name(), "device set"),
        }
        let files = Files::find(&settings.model).map_err(files_error)?;
        let output = match kind {
            TaskKind::TextClassification => Output::Logits,
            TaskKind::TextEmbedding | TaskKind::Similarity | TaskKind::Noop => Output::Embedding,
        };
        let digest = Digest::new(Some(&files), settings, placement.dtype_name()).map_err(files_error)?;
        let loaded = Model::load(files, placement, output)
            .map_err(|error| TaskError::Model { model: model.clone(), error })?;
        let loaded = Arc::new(loaded);
        let canary = loaded.tokens("kandle").map_err(TaskError::Forward)?;
        let batch = &settings.batch;
        let limits = Limits {
            max_tokens: batch.max_tokens,
            calibrated: Calibrations::here().and_then(|c| c.get(digest.short(), &loaded.placement.name)),
            lanes: batch.lanes,
            timeout: batch.timeout.0,
            cache: settings.task.cache.map(|bytes| bytes.0),
        };
        let engine = Engine::new(Arc::clone(&loaded), canary.clone(), limits, Arc::clone(metrics));
        engine.run(vec![Some(canary)]).map_err(TaskError::Forward)?;
        let predict: Box<dyn Predict> = match kind {
            TaskKind::TextClassification => {
                Box::new(classification::Classification::new(&loaded, settings.task.top_k))
            }
            TaskKind::TextEmbedding | TaskKind::Noop => Box::new(embedding::Embed::new(&loaded)),
            TaskKind::Similarity => Box::new(similarity::Similarity::load(&loaded, &engine, &settings.task)?),
        };
        Ok(Self {
            kind,
            model_name: loaded.files.name(),
            digest,
            device: loaded.placement.name.clone(),
            dtype: loaded.placement.dtype_name().to_owned(),
            text: Some(TextTask { model: loaded, engine, predict, overflow: settings.task.overflow }),
        })
    }
}

impl Task {
    /// What a record takes, about, on its way through the stages, beside its own bytes: tokens, the
    /// model's output, the prediction.
    pub fn bytes_per_record(&self) -> usize {
        let Some(text) = &self.text else { return 64 };
        let tokens = text.model.tokenizer.max_tokens().min(512) * size_of::<u32>();
        let output = text.model.width() * size_of::<f32>();
        256 + tokens + output + text.predict.bytes()
    }
}

impl TextTask {
    /// Text to tokens, within the model's limit.
    pub fn prepare(&self, text: &str) -> Result<Tokens, RecordError> {
        let tokens = self.model.tokens(text).map_err(|e| RecordError::new(Fault::Infer, e))?;
        if tokens.truncated && self.overflow == Overflow::DeadLetter {
            let limit = self.model.tokenizer.max_tokens();
            return Err(RecordError::new(Fault::TooLong, format!("more than the model's {limit} tokens")));
        }
        Ok(tokens)
    }

    /// Appends the prediction, with what `output.include` copies (`,"name":value`…), as JSON.
    pub fn write(&self, row: &[f32], include: &str, out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.predict.write(row, out)?;
        if !include.is_empty() {
            // Into the object that was just written.
            out.pop();
            out.extend_from_slice(include.as_bytes());
            out.push(b'}');
        }
        Ok(())
    }
}

/// Bytes of an f32 in JSON, at most, with the comma.
const NUMBER: usize = 14;

/// Serialises into memory, which cannot fail but for values JSON has no form for.
fn to_json(value: &impl serde::Serialize, out: &mut Vec<u8>) -> Result<(), RecordError> {
    serde_json::to_writer(out, value).map_err(|e| RecordError::new(Fault::Encode, e.to_string()))
}
