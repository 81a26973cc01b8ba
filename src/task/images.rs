//! Shared by the tasks over images: loading the model, and turning records into its items.

use std::sync::Arc;

use super::kinds::Kind;
use super::text::{self, Chunk, PredictText, Source};
use super::{Task, TaskError};
use crate::codec::Input;
use crate::codec::write::Writer;
use crate::compute::{Batched, Compute, Pace};
use crate::engine::Rows;
use crate::guard::guarded;
use crate::model::vision::{self, DecodeMemory, Image, Limits, VisionModel, decode, from_base64};
use crate::record::{Fault, RecordError};
use crate::settings::Settings;
use crate::telemetry::Metrics;

/// Bytes of the file of an image, for the first estimate of the time that a record takes.
const USUAL_BYTES: f64 = 65_536.0;

/// Bytes of an item beside its pixels: in the window, the plan and the answers.
const ITEM: usize = 128;

/// The part of `memory.limit` that images may take while they are decoded.
const DECODING: u64 = 4;

/// Loads a model and a task that uses it.
pub(super) fn load<P: PredictText>(
    settings: &Settings,
    output: vision::Output,
    metrics: &Arc<Metrics>,
    predict: impl FnOnce(&VisionModel) -> Result<P, TaskError>,
) -> Result<Arc<dyn Compute>, TaskError> {
    let source = Source::find(settings)?;
    let model = Arc::new(load_model(settings, &source, output)?);
    let about = source.about(settings, model.architecture.clone(), model.weight_bytes());
    let (is_cpu, cost) = (model.placement.is_cpu(), model.cost());
    let (engine, seconds) =
        text::start(Arc::clone(&model), &about, is_cpu, cost as usize, None, settings, metrics)?;
    let predict = predict(&model)?;
    let task = &settings.task;
    Ok(Arc::new(Batched {
        about,
        decoder: Kind::decoder(settings)?,
        writer: Writer::new(settings),
        task: ImageTask {
            place: match settings.input.field.0.first() {
                Some(pointer) => format!("{pointer:?}"),
                None => "the value".to_owned(),
            },
            limits: Limits { pixels: task.max_pixels, bytes: task.max_bytes.0 },
            memory: DecodeMemory::new(settings.memory.limit.0 / DECODING),
            model,
            predict,
        },
        engine,
        pace: Pace::per_byte(seconds * f64::from(cost) / USUAL_BYTES),
        metrics: Arc::clone(metrics),
    }))
}

/// The model of a source.
///
/// # Errors
/// It cannot be loaded.
pub fn load_model(
    settings: &Settings,
    source: &Source,
    output: vision::Output,
) -> Result<VisionModel, TaskError> {
    let model = settings.model.source.clone().unwrap_or_default();
    VisionModel::load(source.files.clone(), source.placement.clone(), output)
        .map_err(|error| TaskError::Vision { model, error })
}

/// A task whose records ask for one image each.
struct ImageTask<P> {
    model: Arc<VisionModel>,
    predict: P,
    limits: Limits,
    memory: DecodeMemory,
    /// Where a record has its image, for messages.
    place: String,
}

impl<P: PredictText> Task for ImageTask<P> {
    type Item = Image;
    type Value = f32;
    type Kept = ();
    const ITEMS_STAGE: Option<&'static str> = Some("decode_image");

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Image>) -> Result<(), RecordError> {
        let failed = |message: String| RecordError::new(Fault::Image, format!("{}: {message}", self.place));
        let decoded;
        let bytes = match input.bytes {
            Some(bytes) => bytes,
            None => {
                decoded = from_base64(&input.text, self.limits.bytes).map_err(failed)?;
                &decoded
            }
        };
        let image = guarded("the decoder", || decode(bytes, &self.limits, &self.memory));
        let image = image.unwrap_or_else(Err).map_err(failed)?;
        let pixels = self.model.preprocess.apply(image).map_err(failed)?;
        items.push(self.model.image(pixels));
        Ok(())
    }

    fn labels(&self) -> Option<Vec<String>> {
        self.predict.labels()
    }

    fn norm(&self, answer: &[f32]) -> Option<f32> {
        self.predict.norm(answer)
    }

    fn predict(&self, (): &(), answers: Rows<'_, f32>, out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.predict.write(&[Chunk::whole(answers.only())], out)
    }

    fn footprint(&self, _: &[u8]) -> usize {
        ITEM + self.model.preprocess.bytes() + self.model.width() * size_of::<f32>() + self.predict.bytes()
    }
}
