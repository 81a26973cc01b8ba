//! A Chronos-Bolt model, as the engine runs it: its items are series, its answers their quantiles.

use std::sync::Mutex;

use candle_core::Tensor;
use candle_nn::VarBuilder;

use super::config::SeriesConfig;
use super::decoder::{self, Decoder};
use super::encoder::Encoder;
use super::patches::Patches;
use super::quantiles::quantile;
use crate::engine::{self, Item, RunError};
use crate::failpoint;
use crate::model::kernels::{KeptMemory, Packed, Transfer, Workspace};
use crate::model::message;
use crate::model::placement::{Placement, Queueing};
use crate::model::store::Files;
use crate::model::text::{ModelError, classify, key};
use crate::model::weights::Weights;
use crate::ragged::Ragged;

/// Tokens that the encoder takes at once on a CPU core: the output of a layer then stays in the L2 cache. The decoder, with
/// one token per series, takes a batch as a whole, so that its weights are read once.
const ENCODER_TOKENS: usize = 256;

/// The points of a series that the model reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// NaN is a missing point; the first one is none.
    points: Vec<f32>,
    cost: u32,
}

impl Item for Series {
    const UNIT: &'static str = "points";

    fn units(&self) -> u64 {
        self.points.len() as u64
    }

    /// In tokens of all passes.
    fn cost(&self) -> u32 {
        self.cost
    }

    fn key(&self) -> Option<u128> {
        Some(key(self.points.iter().map(|x| x.to_bits()).collect::<Vec<_>>()))
    }
}

/// Why a series has no forecast.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SeriesError {
    #[error("the series is empty")]
    Empty,
    #[error("all of the newest {0} points, which are those that the model reads, are missing")]
    AllMissing(usize),
}

pub struct SeriesModel {
    pub files: Files,
    pub placement: Placement,
    pub config: SeriesConfig,
    pub parameters: usize,
    /// Points that an answer predicts.
    pub horizon: usize,
    encoder: Encoder,
    decoder: Decoder,
    /// Idle workspaces; there are as many in all as batches have run at the same time.
    workspaces: Mutex<Vec<Workspace>>,
    queueing: Queueing,
    /// The last field, so that it is dropped after all others.
    _kept_memory: KeptMemory,
}

impl SeriesModel {
    /// Loads a model that predicts `horizon` points; `None` for as many as it predicts in one pass.
    ///
    /// # Errors
    /// The checkpoint is incomplete or of another kind.
    pub fn load(files: Files, placement: Placement, horizon: Option<usize>) -> Result<Self, ModelError> {
        let config = SeriesConfig::read(&files)?;
        let weights = Weights::open(&files)?;
        let parameters = weights.parameters();
        let root = VarBuilder::from_backend(Box::new(weights), placement.dtype, placement.device.clone());
        let failed = |e: candle_core::Error| ModelError::Weights(message(&e));
        Ok(Self {
            encoder: Encoder::load(&config, &root, placement.precision).map_err(failed)?,
            decoder: Decoder::load(&config, &root, placement.precision).map_err(failed)?,
            workspaces: Mutex::default(),
            queueing: Queueing::default(),
            _kept_memory: KeptMemory::on(&placement.device).map_err(failed)?,
            horizon: horizon.unwrap_or(config.prediction),
            files,
            placement,
            config,
            parameters,
        })
    }

    /// Bytes that the weights take on their device.
    pub fn weight_bytes(&self) -> u64 {
        let a = &self.config.encoder;
        let layers = a.layers.len() * a.layer_weights() + decoder::weights(&self.config);
        let layers = layers.min(self.parameters);
        self.placement.weight_bytes(layers, self.parameters - layers)
    }

    /// Number of values of an answer: for each of the model's quantiles, those of the predicted points.
    pub fn width(&self) -> usize {
        self.config.levels() * self.horizon
    }

    /// The item for a series, oldest point first; NaN is a missing point. Of a longer series than the model reads, the
    /// newest points are kept.
    ///
    /// # Errors
    /// There is no point.
    pub fn series(&self, points: &[f32]) -> Result<Series, SeriesError> {
        let newest = &points[points.len().saturating_sub(self.config.context)..];
        // What is missing before the first point is as if it were not part of the series.
        let first = newest.iter().position(|x| !x.is_nan());
        match (first, newest.len()) {
            (Some(first), length) => {
                // NaN has many forms, of which equal series need one.
                let points: Vec<f32> =
                    newest[first..].iter().map(|&x| if x.is_nan() { f32::NAN } else { x }).collect();
                Ok(Series { cost: self.cost(length - first), points })
            }
            (None, 0) => Err(SeriesError::Empty),
            (None, length) => Err(SeriesError::AllMissing(length)),
        }
    }

    /// Tokens of all passes over a series of this many points.
    fn cost(&self, points: usize) -> u32 {
        let SeriesConfig { prediction, .. } = self.config;
        let further = self.horizon.div_ceil(prediction) - 1;
        let further =
            (1..=further).map(|pass| self.config.levels() * self.config.tokens(points + pass * prediction));
        (self.config.tokens(points) + further.sum::<usize>()).try_into().unwrap_or(u32::MAX)
    }

    /// The answers, in the order of the batch. A horizon beyond one pass is predicted as in the chronos package: each
    /// quantile of the points so far is appended to the series once, and the quantiles of what is predicted of all of
    /// these are those of the next points.
    fn forward(&self, batch: &[&Series]) -> candle_core::Result<Ragged<f32>> {
        let SeriesConfig { prediction, context, ref quantiles, .. } = self.config;
        let levels = quantiles.len();
        let mut longer: Vec<Vec<f32>> = Vec::new();
        let (mut passes, mut ahead): (Vec<Vec<f32>>, usize) = (Vec::new(), 0);
        while ahead < self.horizon {
            let Some(last) = passes.last() else {
                let series: Vec<&[f32]> = batch.iter().map(|series| &series.points[..]).collect();
                passes.push(self.pass(&series)?);
                ahead += prediction;
                continue;
            };
            if longer.is_empty() {
                longer = batch.iter().flat_map(|series| vec![series.points.clone(); levels]).collect();
            }
            for (series, predicted) in longer.iter_mut().zip(last.chunks_exact(prediction)) {
                series.extend_from_slice(predicted);
                series.drain(..series.len().saturating_sub(context));
            }
            let series: Vec<&[f32]> = longer.iter().map(Vec::as_slice).collect();
            let all = self.pass(&series)?;
            let mut next = Vec::with_capacity(last.len());
            // Of each series, `levels` predictions of `levels` quantiles.
            for all in all.chunks_exact(levels * levels * prediction) {
                let start = next.len();
                next.resize(start + levels * prediction, 0.0);
                for point in 0..prediction {
                    let mut samples: Vec<f32> = all[point..].iter().step_by(prediction).copied().collect();
                    for (row, level) in quantiles.iter().enumerate() {
                        next[start + row * prediction + point] = quantile(&mut samples, *level);
                    }
                }
            }
            passes.push(next);
            ahead += prediction;
        }
        let mut answers = Ragged::with_capacity(batch.len(), batch.len() * self.width());
        let mut answer = Vec::with_capacity(self.width());
        for series in 0..batch.len() {
            answer.clear();
            for level in 0..levels {
                let end = answer.len() + self.horizon;
                for pass in &passes {
                    answer.extend_from_slice(&pass[(series * levels + level) * prediction..][..prediction]);
                }
                answer.truncate(end);
            }
            answers.push(&answer);
        }
        Ok(answers)
    }

    /// `[series, quantiles, points]` of one pass.
    fn pass(&self, series: &[&[f32]]) -> candle_core::Result<Vec<f32>> {
        let inputs: Vec<Patches> = (series.iter())
            .map(|points| Patches::new(points, self.config.patch, self.config.register))
            .collect();
        let lengths: Vec<usize> = inputs.iter().map(Patches::tokens).collect();
        let masked: Vec<&[bool]> = inputs.iter().map(|series| &series.masked[..]).collect();
        let batch = Packed::of_lengths(&lengths).masking(&masked);
        let kept = || self.workspaces.lock().unwrap_or_else(|e| e.into_inner());
        let workspace = kept().pop().unwrap_or_default();
        let turn = self.queueing.turn(&self.placement.device);
        let predicted = self
            .encode(&inputs, &batch, &workspace)
            .and_then(|hidden| Transfer::start(&self.decoder.forward(&hidden, &batch, &workspace)?));
        drop(turn);
        kept().push(workspace);
        let predicted = predicted?.finish()?;
        let width = self.config.levels() * self.config.prediction;
        let mut all = vec![0.0; predicted.len()];
        for (&i, values) in batch.order().iter().zip(predicted.chunks_exact(width)) {
            for (out, &x) in all[i * width..][..width].iter_mut().zip(values) {
                *out = inputs[i].restore(x);
            }
        }
        Ok(all)
    }

    /// The encoder's hidden states of a batch, `[tokens, hidden]`.
    fn encode(
        &self,
        inputs: &[Patches],
        batch: &Packed,
        workspace: &Workspace,
    ) -> candle_core::Result<Tensor> {
        let most = if self.placement.is_cpu() { ENCODER_TOKENS } else { usize::MAX };
        let in_order: Vec<&Patches> = batch.order().iter().map(|&i| &inputs[i]).collect();
        let (mut hidden, mut rest) = (Vec::new(), &in_order[..]);
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = rest.iter().take_while(|series| {
                tokens += series.tokens();
                tokens <= most
            });
            let (part, after) = rest.split_at(fits.count().max(1));
            let lengths: Vec<usize> = part.iter().map(|series| series.tokens()).collect();
            let masked: Vec<&[bool]> = part.iter().map(|series| &series.masked[..]).collect();
            // The order stays as it is: sorting by length is stable.
            let packed = Packed::of_lengths(&lengths).masking(&masked);
            hidden.push(self.encoder.forward(part, &packed, workspace)?);
            rest = after;
        }
        if hidden.len() == 1 { Ok(hidden.remove(0)) } else { Tensor::cat(&hidden, 0) }
    }
}

impl engine::Model for SeriesModel {
    type Item = Series;
    type Value = f32;

    fn run(&self, batch: &[&Series]) -> Result<Ragged<f32>, RunError> {
        failpoint::pass("device");
        self.forward(batch).map_err(|e| classify(&e.to_string()))
    }

    fn sample(&self, cost: u32) -> Series {
        let patches = (cost as usize).saturating_sub(usize::from(self.config.register)).max(1);
        let length = (patches * self.config.patch).min(self.config.context);
        let points = (0..length).map(|i| (i % 7) as f32).collect();
        Series { cost: self.cost(length), points }
    }
}
