//! What tasks over texts have in common: a text model, and texts as its items.

use std::sync::Arc;

use super::TaskError;
use crate::codec::{self, Input};
use crate::compute::{About, Batched, Compute, Pace};
use crate::engine::{Calibrations, Engine, Limits, Model as _, Place, Response, Rows};
use crate::model::{Digest, Files, Model, Output, Placement, Tokens};
use crate::record::{Fault, RecordError};
use crate::settings::{Overflow, Settings};
use crate::task::Task;
use crate::telemetry::Metrics;

/// A text model on its engine.
pub struct TextModel {
    pub about: About,
    pub texts: Texts,
    pub engine: Engine<Model>,
    pace: Pace,
    metrics: Arc<Metrics>,
}

impl TextModel {
    /// Loads the model and runs it once, so that what cannot work fails here.
    pub fn load(settings: &Settings, output: Output, metrics: &Arc<Metrics>) -> Result<Self, TaskError> {
        let name = settings.model.source.clone().unwrap_or_default();
        let files_error = |error| TaskError::Files { model: name.clone(), error };
        let placement =
            Placement::choose(settings.model.device, settings.model.dtype).map_err(TaskError::Placement)?;
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
        // The first one makes memory ready, and is slower.
        let cost = 128.min(model.tokenizer.max_tokens());
        let seconds_per_token = first(cost as u32)?.as_secs_f64() / cost as f64;
        let texts = Texts { model, overflow: settings.task.overflow, metrics: Arc::clone(metrics) };
        let pace = Pace::new(seconds_per_token);
        Ok(Self { about, texts, engine, pace, metrics: Arc::clone(metrics) })
    }

    /// With a task that makes a prediction of each text's answer.
    pub fn batched<P: PredictText>(
        self,
        settings: &Settings,
        predict: impl FnOnce(&Model, &Engine<Model>) -> Result<P, TaskError>,
    ) -> Result<Batched<TextTask<P>, Model>, TaskError> {
        let Self { about, texts, engine, pace, metrics } = self;
        let decoder = codec::decoder(settings)?;
        let task = TextTask { predict: predict(engine.model(), &engine)?, texts };
        Ok(Batched { about, decoder, task, engine, pace, metrics })
    }
}

/// Loads a model, and a task over it that makes a prediction of each text's answer.
pub(super) fn load<P: PredictText>(
    settings: &Settings,
    output: Output,
    metrics: &Arc<Metrics>,
    predict: impl FnOnce(&Model, &Engine<Model>) -> Result<P, TaskError>,
) -> Result<Arc<dyn Compute>, TaskError> {
    Ok(Arc::new(TextModel::load(settings, output, metrics)?.batched(settings, predict)?))
}

/// From the answer to a record's text to its prediction.
pub trait PredictText: Send + Sync + 'static {
    /// Appends the prediction, a JSON object.
    ///
    /// # Errors
    /// The record is at fault; bytes that were appended do not count.
    fn write(&self, answer: &[f32], out: &mut Vec<u8>) -> Result<(), RecordError>;

    /// Bytes of a prediction at most, about.
    fn bytes(&self) -> usize;
}

/// A task whose records ask for one text each.
pub struct TextTask<P> {
    texts: Texts,
    predict: P,
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

    fn footprint(&self, value_bytes: usize) -> usize {
        self.texts.footprint(value_bytes) + self.predict.bytes()
    }
}

/// Texts as a model takes them.
pub struct Texts {
    pub model: Arc<Model>,
    overflow: Overflow,
    metrics: Arc<Metrics>,
}

impl Texts {
    /// A text's tokens, within the model's limit.
    pub fn tokens(&self, text: &str) -> Result<Tokens, RecordError> {
        let tokens = self.model.tokens(text).map_err(|e| RecordError::new(Fault::Prepare, e))?;
        if tokens.truncated {
            if self.overflow == Overflow::DeadLetter {
                let limit = self.model.tokenizer.max_tokens();
                return Err(RecordError::new(
                    Fault::TooLong,
                    format!("more than the model's {limit} tokens"),
                ));
            }
            self.metrics.truncated.inc();
        }
        Ok(tokens)
    }

    /// Bytes of a record's tokens and answer, at most.
    pub fn footprint(&self, value_bytes: usize) -> usize {
        // A token is a byte of the text at least; templates may add to it.
        let tokens = self.model.tokenizer.max_tokens().min(value_bytes + 512);
        256 + tokens * size_of::<u32>() + self.model.width() * size_of::<f32>()
    }
}
