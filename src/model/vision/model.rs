//! A model of images: files, placement, preprocessing, layers and head together.

use candle_nn::VarBuilder;

use super::architecture::{self, Network as Spec};
use super::convnet::Convnet;
use super::preprocess::{Preprocess, PreprocessError};
use super::tower::Tower;
use crate::engine::{self, Item, RunError};
use crate::failpoint;
use crate::model::kernels::KeptMemory;
use crate::model::message;
use crate::model::placement::{Placement, Queueing};
use crate::model::store::{Files, FilesError};
use crate::model::text::architecture::ConfigError;
use crate::model::text::{ModelError, Scores, classify, key, labels};
use crate::model::weights::{Weights, WeightsError};
use crate::ragged::Ragged;

#[derive(Debug, thiserror::Error)]
pub enum VisionError {
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Preprocess(#[from] PreprocessError),
    #[error(transparent)]
    Labels(#[from] ModelError),
    #[error("weights: {0}")]
    Weights(String),
    #[error(transparent)]
    ReadWeights(#[from] WeightsError),
    #[error("{0}")]
    Unsupported(String),
}

/// The output of a model that a task needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// One logit per label.
    Logits,
    /// One vector per image.
    Embedding,
}

/// The pixels of an image as a model takes them.
#[derive(Debug)]
pub struct Image {
    /// RGB, row after row, of the size that [`VisionModel::preprocess`] says.
    pub pixels: Box<[u8]>,
    /// Tokens of a transformer; for convolutions, patches of 16 × 16 pixels.
    pub cost: u32,
}

impl Item for Image {
    const UNIT: &'static str = "pixels";

    fn units(&self) -> u64 {
        self.pixels.len() as u64 / 3
    }

    fn cost(&self) -> u32 {
        self.cost
    }

    fn key(&self) -> Option<u128> {
        Some(key(&self.pixels))
    }
}

enum Network {
    Tower(Box<Tower>),
    Convnet(Box<Convnet>),
}

pub struct VisionModel {
    pub files: Files,
    pub placement: Placement,
    /// config.json's `model_type`, or timm's `architecture`.
    pub architecture: String,
    /// Label names by index, for a classifier.
    pub labels: Vec<String>,
    /// How a classifier's logits become scores.
    pub scores: Scores,
    pub preprocess: Preprocess,
    pub parameters: usize,
    /// Elements of the matrices that are quantized.
    quantizable: usize,
    network: Network,
    queueing: Queueing,
    /// The last field, so that it is dropped after all others.
    _kept_memory: KeptMemory,
}

impl VisionModel {
    /// # Errors
    /// A file is missing or cannot be read, or the model or its preprocessing is not supported.
    pub fn load(files: Files, placement: Placement, output: Output) -> Result<Self, VisionError> {
        let config = files.json("config.json")?;
        let config = config.ok_or_else(|| FilesError::Missing { file: "config.json".to_owned() })?;
        let name = architecture::name(&config)?;
        let preprocess = Preprocess::read(&files, &config)?;
        let weights = Weights::open(&files)?;
        // A checkpoint of both towers has the one of texts too.
        let parameters = weights
            .parameters_of(|name| !name.starts_with("text_model.") && !name.starts_with("text_projection."));
        let spec = architecture::describe(&config, &weights, output, files.ignored_keys())?;
        if let (Spec::Convnet(_), Some(_)) = (&spec, placement.precision) {
            let dtype = placement.dtype_name();
            let message =
                format!("model.dtype: {dtype} on a CPU is for transformers; convolutions support f32");
            return Err(VisionError::Unsupported(message));
        }
        let vb = VarBuilder::from_backend(Box::new(weights), placement.dtype, placement.device.clone());
        let failed = |e: candle_core::Error| VisionError::Weights(message(&e));
        let (network, quantizable) = match &spec {
            Spec::Tower(spec) => {
                let tower = Tower::load(spec, &preprocess, &vb, placement.precision).map_err(failed)?;
                let quantizable = spec.layers.len() * spec.blocks(tower.tokens()).layer_weights();
                (Network::Tower(Box::new(tower)), quantizable)
            }
            Spec::Convnet(spec) => {
                (Network::Convnet(Box::new(Convnet::load(spec, &preprocess, &vb).map_err(failed)?)), 0)
            }
        };
        let mut model = Self {
            _kept_memory: KeptMemory::on(&placement.device).map_err(failed)?,
            files,
            placement,
            architecture: name,
            labels: Vec::new(),
            scores: Scores::Softmax,
            preprocess,
            parameters,
            quantizable,
            network,
            queueing: Queueing::default(),
        };
        if output == Output::Logits {
            model.labels = label_names(&config, model.width())?;
            model.scores = Scores::of(&config, model.labels.len())?;
        }
        Ok(model)
    }

    /// Number of values per image.
    pub fn width(&self) -> usize {
        match &self.network {
            Network::Tower(tower) => tower.width,
            Network::Convnet(network) => network.width,
        }
    }

    /// The cost of an image, which is the same for all.
    pub fn cost(&self) -> u32 {
        match &self.network {
            Network::Tower(tower) => tower.tokens() as u32,
            Network::Convnet(_) => (self.preprocess.height * self.preprocess.width).div_ceil(256) as u32,
        }
    }

    /// Bytes that the weights take on their device.
    pub fn weight_bytes(&self) -> u64 {
        let quantizable = self.quantizable.min(self.parameters);
        self.placement.weight_bytes(quantizable, self.parameters - quantizable)
    }

    /// An item of these pixels, which [`Preprocess::apply`] has made.
    pub fn image(&self, pixels: Vec<u8>) -> Image {
        Image { pixels: pixels.into(), cost: self.cost() }
    }
}

impl engine::Model for VisionModel {
    type Item = Image;
    type Value = f32;

    fn run(&self, batch: &[&Image]) -> Result<Ragged<f32>, RunError> {
        failpoint::pass("device");
        let turn = self.queueing.turn(&self.placement.device);
        let answers = match &self.network {
            Network::Tower(tower) => tower.forward(batch, &self.preprocess),
            Network::Convnet(network) => network.forward(batch, &self.preprocess),
        };
        drop(turn);
        let values = answers.and_then(|answers| answers.finish()).map_err(|e| classify(&e.to_string()))?;
        Ok(Ragged::of_width(values, self.width()))
    }

    /// A grey image, whatever the cost: all images have the same.
    fn sample(&self, _: u32) -> Image {
        self.image(vec![128; self.preprocess.bytes()])
    }
}

/// The names of a classifier's labels: config.json's `id2label`, or timm's `label_names`. `LABEL_n` for those without a
/// name, as in transformers.
fn label_names(config: &serde_json::Value, count: usize) -> Result<Vec<String>, VisionError> {
    let of_timm = || {
        let names = [&config["label_names"], &config["pretrained_cfg"]["label_names"]];
        names.into_iter().find_map(|names| names.as_array())
    };
    let names = match (config["model_type"].is_string(), of_timm()) {
        (true, _) => labels(config),
        (false, Some(names)) => names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect(),
        (false, None) => (0..count).map(|i| format!("LABEL_{i}")).collect(),
    };
    match names.len() == count {
        true => Ok(names),
        false => {
            Err(ConfigError(format!("names {} labels, but the weights have {count}", names.len())).into())
        }
    }
}
