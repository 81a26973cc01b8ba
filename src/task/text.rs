//! Shared by the tasks that use a text model: loading it, and turning texts into its items.

use std::sync::Arc;

use super::{Kind, TaskError};
use crate::codec::Input;
use crate::compute::{About, Batched, Compute, Pace};
use crate::engine::{Calibrations, Engine, Limits, Model as _, Place, Response, Rows};
use crate::model::{Digest, Files, Model, Output, Placement, TokenizeError, Tokens};
use crate::record::{Fault, RecordError};
use crate::settings::{Overflow, Settings};
use crate::task::Task;
use crate::telemetry::Metrics;

/// A text model and its engine.
pub struct TextModel {
    pub about: About,
    pub texts: Texts,
    pub engine: Engine<Model>,
    pace: Pace,
    metrics: Arc<Metrics>,
}

impl TextModel {
    /// Loads the model and runs it, so that a model that does not work fails at startup.
    pub fn load(settings: &Settings, output: Output, metrics: &Arc<Metrics>) -> Result<Self, TaskError> {
        let name = settings.model.source.clone().unwrap_or_default();
        let files_error = |error| TaskError::Files { model: name.clone(), error };
        let placement = Placement::choose(settings.model.device, settings.model.dtype)?;
        let (device, dtype) = (&placement.name, placement.dtype_name());
        match &placement.reason {
            Some(reason) => tracing::info!(device, dtype, reason, "device chosen"),
            None => tracing::info!(device, dtype, "using the configured device"),
        }
        let files = Files::find(&settings.model).map_err(files_error)?;
        let digest = Digest::new(Some(&files), settings, placement.dtype_name()).map_err(files_error)?;
        let model = Model::load(files, placement, output)
            .map_err(|error| TaskError::Model { model: name.clone(), error })?;
        let model = Arc::new(model);
        let placement = &model.placement;
        let about = About {
            kind: settings.task.kind,
            model: model.files.name(),
            device: placement.name.clone(),
            dtype: placement.dtype_name().to_owned(),
            host_memory: if placement.is_cpu() { model.weight_bytes() } else { 0 },
            digest,
        };
        let limits = Limits {
            max_cost: settings.batch.max_tokens,
            calibrated: Calibrations::here().and_then(|c| c.get(about.digest.short(), &about.device)),
            lanes: settings.batch.lanes,
            timeout: settings.batch.timeout.0,
            cache: settings.task.cache.map(|bytes| bytes.0),
        };
        let place = Place { name: about.device.clone(), is_cpu: placement.is_cpu() };
        let engine = Engine::new(Arc::clone(&model), place, limits, Arc::clone(metrics));
        let first = |cost| match engine.run(vec![model.sample(cost)]) {
            Ok(Response { failed, busy, .. }) => match failed.into_iter().next() {
                None => Ok(busy),
                Some((_, message)) => Err(TaskError::Forward(message)),
            },
            Err(error) => Err(TaskError::Forward(error.to_string())),
        };
        first(8)?;
        // The first run also allocates memory, so only the second is timed.
        let cost = 128.min(model.tokenizer.max_tokens());
        let seconds_per_token = first(cost as u32)?.as_secs_f64() / cost as f64;
        let overflow = Kind::of(settings.task.kind).overflow(&settings.task);
        let texts = Texts { model, overflow, metrics: Arc::clone(metrics) };
        let pace = Pace::new(seconds_per_token);
        Ok(Self { about, texts, engine, pace, metrics: Arc::clone(metrics) })
    }

    /// Adds a task that uses the model.
    pub fn batched<T: Task<Item = Tokens, Value = f32>>(
        self,
        settings: &Settings,
        task: impl FnOnce(Texts, &Engine<Model>) -> Result<T, TaskError>,
    ) -> Result<Batched<T, Model>, TaskError> {
        let Self { about, texts, engine, pace, metrics } = self;
        let decoder = Kind::decoder(settings)?;
        Ok(Batched { about, decoder, task: task(texts, &engine)?, engine, pace, metrics })
    }
}

/// Loads a model and a task that uses it.
pub(super) fn load<T: Task<Item = Tokens, Value = f32>>(
    settings: &Settings,
    output: Output,
    metrics: &Arc<Metrics>,
    task: impl FnOnce(Texts, &Engine<Model>) -> Result<T, TaskError>,
) -> Result<Arc<dyn Compute>, TaskError> {
    Ok(Arc::new(TextModel::load(settings, output, metrics)?.batched(settings, task)?))
}

/// Turns the answer to a record's text into its prediction.
pub trait PredictText: Send + Sync + 'static {
    /// Appends the prediction, a JSON object.
    ///
    /// # Errors
    /// The record is at fault. The caller discards the bytes appended so far.
    fn write(&self, answer: &[f32], out: &mut Vec<u8>) -> Result<(), RecordError>;

    /// Approximate maximum bytes of a prediction.
    fn bytes(&self) -> usize;
}

/// A task whose records ask for one text each.
pub struct TextTask<P> {
    pub texts: Texts,
    pub predict: P,
}

impl<P: PredictText> Task for TextTask<P> {
    type Item = Tokens;
    type Value = f32;
    type Kept = ();

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Tokens>) -> Result<(), RecordError> {
        items.push(self.texts.tokens(&input.text)?);
        Ok(())
    }

    fn predict(&self, (): &(), answers: Rows<'_, f32>, out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.predict.write(answers.only(), out)
    }

    fn footprint(&self, value: &[u8]) -> usize {
        self.texts.footprint(value.len()) + self.predict.bytes()
    }
}

/// Turns texts into the tokens that a model takes.
pub struct Texts {
    pub model: Arc<Model>,
    pub overflow: Overflow,
    metrics: Arc<Metrics>,
}

impl Texts {
    /// A text's tokens, within the model's limit.
    pub fn tokens(&self, text: &str) -> Result<Tokens, RecordError> {
        let tokens = self.model.tokens(text).map_err(not_tokens)?;
        if tokens.truncated {
            self.too_long()?;
        }
        Ok(tokens)
    }

    /// Counts a record whose text is truncated.
    ///
    /// # Errors
    /// `task.overflow` is `dead_letter`.
    pub fn too_long(&self) -> Result<(), RecordError> {
        if self.overflow == Overflow::DeadLetter {
            let limit = self.model.tokenizer.max_tokens();
            return Err(RecordError::new(Fault::TooLong, format!("more than the model's {limit} tokens")));
        }
        self.metrics.truncated.inc();
        Ok(())
    }

    /// Maximum bytes of a record's tokens and answer.
    pub fn footprint(&self, value_bytes: usize) -> usize {
        // Each token is at least one byte of the text; a template may add text.
        let tokens = self.model.tokenizer.max_tokens().min(value_bytes + 512);
        SEQUENCE + self.bytes(tokens)
    }

    /// Bytes of a sequence's tokens and of the answer to it.
    pub fn bytes(&self, tokens: usize) -> usize {
        tokens * size_of::<u32>() + self.model.values(tokens) * size_of::<f32>()
    }
}

/// Bytes of a sequence beside its tokens: in the window, the plan and the answers.
pub const SEQUENCE: usize = 256;

/// Makes the tokenizer's error one of the record.
pub fn not_tokens(error: TokenizeError) -> RecordError {
    RecordError::new(Fault::Prepare, error.to_string())
}
