//! Shared by the tasks that use a text model: loading it, and turning texts into its items.

use std::sync::Arc;

use super::prompt::Choice;
use super::{Kind, TaskError};
use crate::codec::Input;
use crate::codec::write::Writer;
use crate::compute::{About, Batched, Compute, Pace};
use crate::engine::{self, Calibrations, Engine, Item, Limits, Place, Response, Rows};
use crate::model::{Digest, Files, Model, ModelError, Output, Placement, TokenizeError, Tokens};
use crate::record::{Fault, RecordError};
use crate::settings::{self, Overflow, Settings};
use crate::task::{Task, Written};
use crate::telemetry::Metrics;

/// A text model and its engine.
pub struct TextModel {
    pub about: About,
    pub texts: Texts,
    pub engine: Engine<Model>,
    pace: Pace,
    metrics: Arc<Metrics>,
}

/// What a model is loaded from, and where it will run.
#[derive(Clone)]
pub struct Source {
    pub files: Files,
    pub placement: Placement,
    digest: Digest,
}

impl Source {
    /// # Errors
    /// There is no such device, or the model's files cannot be found or read.
    pub fn find(settings: &Settings) -> Result<Self, TaskError> {
        let failed = |error| TaskError::Files { model: name_of(settings), error };
        let placement = Placement::choose(settings.model.device, settings.model.dtype)?;
        let (device, dtype) = (&placement.name, placement.dtype_name());
        match &placement.reason {
            Some(reason) => tracing::info!(device, dtype, reason, "device chosen"),
            None => tracing::info!(device, dtype, "using the configured device"),
        }
        let files = Files::find(&settings.model).map_err(failed)?;
        let digest = Digest::new(Some(&files), settings, placement.dtype_name()).map_err(failed)?;
        Ok(Self { files, placement, digest })
    }

    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Describes the model that is loaded from it; its weights take `weight_bytes` on their device.
    pub fn about(&self, settings: &Settings, architecture: String, weight_bytes: u64) -> About {
        About {
            kind: settings.task.kind,
            model: self.files.name(),
            architecture,
            device: self.placement.name.clone(),
            dtype: self.placement.dtype_name().to_owned(),
            host_memory: if self.placement.is_cpu() { weight_bytes } else { 0 },
            digest: self.digest.clone(),
        }
    }
}

/// The model's name in messages.
fn name_of(settings: &Settings) -> String {
    settings.model.source.clone().unwrap_or_default()
}

/// Makes a model's error one of the task.
pub(super) fn not_loaded(settings: &Settings) -> impl Fn(ModelError) -> TaskError {
    let model = name_of(settings);
    move |error| TaskError::Model { model: model.clone(), error }
}

/// The engine of a model, which has run once, so that a model that does not work fails at startup; and the seconds that a
/// unit of cost takes it, such as a token. `longest`: the cost of the largest item. `budget`: that of a batch until it is
/// calibrated, if not the engine's.
///
/// # Errors
/// The model does not run.
pub(super) fn start<M: engine::Model>(
    model: Arc<M>,
    about: &About,
    is_cpu: bool,
    longest: usize,
    budget: Option<usize>,
    settings: &Settings,
    metrics: &Arc<Metrics>,
) -> Result<(Engine<M>, f64), TaskError> {
    let limits = Limits {
        max_cost: settings.batch.max_tokens,
        calibrated: Calibrations::here().and_then(|c| c.get(about.digest.short(), &about.device)).or(budget),
        lanes: settings.batch.lanes,
        timeout: settings.batch.timeout.0,
        cache: settings.task.cache.map(|bytes| bytes.0),
    };
    let place = Place { name: about.device.clone(), is_cpu };
    let engine = Engine::new(Arc::clone(&model), place, limits, Arc::clone(metrics));
    let first = |cost| {
        let item = model.sample(cost);
        let cost = f64::from(item.cost());
        match engine.run(vec![item]) {
            Ok(Response { failed, busy, .. }) => match failed.into_iter().next() {
                None => Ok(busy.as_secs_f64() / cost),
                Some((_, message)) => Err(TaskError::Forward(message)),
            },
            Err(error) => Err(TaskError::Forward(error.to_string())),
        }
    };
    first(8)?;
    // The first run also allocates memory, so only the second is timed.
    let seconds = first(128.min(longest) as u32)?;
    Ok((engine, seconds))
}

impl TextModel {
    /// Loads the model and runs it, so that a model that does not work fails at startup.
    pub fn load(settings: &Settings, output: Output, metrics: &Arc<Metrics>) -> Result<Self, TaskError> {
        Self::from(Source::find(settings)?, settings, output, metrics)
    }

    /// Like [`TextModel::load`], with the model's files.
    pub(super) fn from(
        source: Source,
        settings: &Settings,
        output: Output,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, TaskError> {
        let (files, placement) = (source.files.clone(), source.placement.clone());
        let mut model = Model::load(files, placement, output).map_err(not_loaded(settings))?;
        let task = &settings.task;
        model.prompt = Choice {
            text: ("task.prompt", task.prompt.as_deref()),
            name: ("task.prompt_name", task.prompt_name.as_deref()),
        }
        .resolve(&model)?;
        let model = Arc::new(model);
        let about = source.about(settings, model.architecture().name.clone(), model.weight_bytes());
        let (is_cpu, longest) = (model.placement.is_cpu(), model.tokenizer.max_tokens());
        let (engine, seconds_per_token) =
            start(Arc::clone(&model), &about, is_cpu, longest, None, settings, metrics)?;
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
        let writer = Writer::new(settings);
        let task = task(texts, &engine)?;
        let about = About { host_memory: about.host_memory + task.memory() as u64, ..about };
        Ok(Batched { about, decoder, writer, task, engine, pace, metrics })
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

/// The answer to a part of a text, or to all of it.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    pub answer: &'a [f32],
    /// Number of tokens of the text in it.
    pub tokens: u32,
}

impl<'a> Chunk<'a> {
    /// The answer to a text that is not cut.
    pub fn whole(answer: &'a [f32]) -> Self {
        Self { answer, tokens: 1 }
    }
}

/// Turns the answers to a record's text into its prediction.
pub trait PredictText: Send + Sync + 'static {
    /// Appends the prediction, a JSON object. There are several chunks only if `task.overflow` is `chunk`.
    ///
    /// # Errors
    /// The record is at fault. The caller discards the bytes appended so far.
    fn write(&self, chunks: &[Chunk<'_>], out: &mut Vec<u8>) -> Result<(), RecordError>;

    /// Writes the predictions of several texts, as [`Task::predict_all`] does those of records.
    fn write_all(&self, texts: &[&[Chunk<'_>]], out: &mut Vec<u8>, written: &mut Written<'_>) {
        for chunks in texts {
            let result = self.write(chunks, out);
            written(result, out);
        }
    }

    /// Approximate maximum bytes of a prediction.
    fn bytes(&self) -> usize;

    /// As [`Task::labels`].
    fn labels(&self) -> Option<Vec<String>> {
        None
    }

    /// As [`Task::norm`].
    fn norm(&self, _: &[f32]) -> Option<f32> {
        None
    }

    /// As [`Task::memory`].
    fn memory(&self) -> usize {
        0
    }
}

/// A task whose records ask for one text each.
pub struct TextTask<P> {
    texts: Texts,
    predict: P,
    /// `task.stride`, if a long text is cut into chunks.
    stride: Option<usize>,
}

impl<P: PredictText> TextTask<P> {
    /// # Errors
    /// `task.stride` does not fit the model.
    pub fn new(texts: Texts, predict: P, task: &settings::Task) -> Result<Self, TaskError> {
        let chunks = texts.overflow == Overflow::Chunk;
        let stride = if chunks { Some(texts.stride(task)?) } else { None };
        Ok(Self { texts, predict, stride })
    }
}

impl<P: PredictText> Task for TextTask<P> {
    type Item = Tokens;
    type Value = f32;
    /// Number of tokens of each chunk; empty if the text is not cut.
    type Kept = Box<[u32]>;

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Tokens>) -> Result<Box<[u32]>, RecordError> {
        let Some(stride) = self.stride else {
            items.push(self.texts.tokens(&input.text)?);
            return Ok(Box::default());
        };
        let chunks = self.texts.model.chunks(&input.text, stride).map_err(not_tokens)?;
        let (tokens, lengths): (Vec<_>, Vec<_>) = chunks.into_iter().unzip();
        items.extend(tokens);
        Ok(if lengths.len() > 1 { lengths.into() } else { Box::default() })
    }

    fn predict(
        &self,
        lengths: &Box<[u32]>,
        answers: Rows<'_, f32>,
        out: &mut Vec<u8>,
    ) -> Result<(), RecordError> {
        self.predict.write(&chunks(lengths, &answers), out)
    }

    fn predict_all(
        &self,
        records: &[(&Box<[u32]>, Rows<'_, f32>)],
        out: &mut Vec<u8>,
        written: &mut Written<'_>,
    ) {
        let texts: Vec<Vec<Chunk<'_>>> =
            records.iter().map(|(lengths, answers)| chunks(lengths, answers)).collect();
        let texts: Vec<&[Chunk<'_>]> = texts.iter().map(Vec::as_slice).collect();
        self.predict.write_all(&texts, out, written);
    }

    fn labels(&self) -> Option<Vec<String>> {
        self.predict.labels()
    }

    fn norm(&self, answer: &[f32]) -> Option<f32> {
        self.predict.norm(answer)
    }

    fn memory(&self) -> usize {
        self.predict.memory()
    }

    fn footprint(&self, value: &[u8]) -> usize {
        let texts = match self.stride {
            None => self.texts.footprint(value.len()),
            Some(stride) => self.texts.footprint_of_chunks(value.len(), stride),
        };
        texts + self.predict.bytes()
    }
}

/// The answers to a record's text; `lengths` are the numbers of tokens of its chunks, none if it is not cut.
fn chunks<'a>(lengths: &[u32], answers: &Rows<'a, f32>) -> Vec<Chunk<'a>> {
    match lengths {
        [] => vec![Chunk::whole(answers.only())],
        _ => answers.iter().zip(lengths).map(|(answer, &tokens)| Chunk { answer, tokens }).collect(),
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

    /// Tokens by which the chunks of a long text overlap: `task.stride`, or its default.
    ///
    /// # Errors
    /// There are not more tokens in a chunk.
    pub fn stride(&self, task: &settings::Task) -> Result<usize, TaskError> {
        stride(task, self.model.room())
    }

    /// Maximum bytes of the tokens and answers of a record whose text is cut into chunks.
    fn footprint_of_chunks(&self, value_bytes: usize, stride: usize) -> usize {
        // Each token is at least one byte of the text; a template may add text. Every chunk has the tokens of the prompt
        // and special ones, and repeats some of the chunk before.
        let (room, most) = (self.model.room(), self.model.tokenizer.max_tokens());
        let tokens = value_bytes + 512;
        let chunks = 1 + tokens / (room - stride);
        chunks * (SEQUENCE + self.bytes(0)) + (tokens + chunks * (most - room + stride)) * size_of::<u32>()
    }

    /// Bytes of a sequence's tokens and of the answer to it.
    pub fn bytes(&self, tokens: usize) -> usize {
        tokens * size_of::<u32>() + self.model.values(tokens) * size_of::<f32>()
    }
}

/// Tokens by which the chunks of a long text overlap, if a chunk has `room` tokens: `task.stride`, or its default.
///
/// # Errors
/// There are not more tokens in a chunk.
pub(super) fn stride(task: &settings::Task, room: usize) -> Result<usize, TaskError> {
    let stride = task.stride.unwrap_or(STRIDE.min(room / 2));
    match stride < room {
        true => Ok(stride),
        false => Err(TaskError::Setting {
            key: "task.stride",
            message: format!("{stride} is not less than the {room} tokens of a text that the model takes"),
        }),
    }
}

/// Default of `task.stride`: tokens that consecutive chunks of a long text share.
const STRIDE: usize = 32;
/// Bytes of a sequence beside its tokens: in the window, the plan and the answers.
pub const SEQUENCE: usize = 256;

/// Makes the tokenizer's error one of the record.
pub fn not_tokens(error: TokenizeError) -> RecordError {
    RecordError::new(Fault::Prepare, error.to_string())
}
