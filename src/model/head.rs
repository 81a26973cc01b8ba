//! From the encoder's tokens to one row of numbers per sequence.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::Architecture;
use super::encoder::{Dense, Packed};

/// How a sequence's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    Mean,
    First,
    Last,
}

/// What follows the encoder.
pub enum Head {
    /// Logits, one per label.
    Classifier { pooling: Pooling, layers: ClassifierLayers, labels: usize },
    /// The pooled vector itself.
    Embedding { pooling: Pooling },
}

/// A classifier's hidden layer and its output layer.
pub struct ClassifierLayers {
    hidden: Dense,
    out: Dense,
}

impl Head {
    /// The classification head that stands beside the encoder. `root` is before the encoder's
    /// prefix, `encoder` after it.
    pub fn classifier(
        a: &Architecture,
        labels: usize,
        root: &VarBuilder<'_>,
        encoder: &VarBuilder<'_>,
    ) -> Result<Self> {
        let c = &a.classifier;
        let vb = if c.dense_in_encoder { encoder } else { root };
        let norm = c.norm.map(|name| (root.pp(name), a.norm_bias, a.norm_eps));
        let hidden =
            Dense::new((a.hidden, a.hidden), c.dense_bias, Some(c.activation), norm, vb.pp(c.dense))?;
        let out = Dense::new((a.hidden, labels), true, None, None, root.pp(c.out))?;
        let pooling = if c.mean { Pooling::Mean } else { Pooling::First };
        Ok(Head::Classifier { pooling, layers: ClassifierLayers { hidden, out }, labels })
    }

    /// `[sequences, width]` in f32, in the order of the token axis.
    pub fn forward(&self, x: &Tensor, batch: &Packed) -> Result<Tensor> {
        let rows = match self {
            Head::Embedding { pooling } => pool(x, *pooling, batch)?,
            Head::Classifier { pooling, layers, .. } => {
                layers.out.forward(&layers.hidden.forward(&pool(x, *pooling, batch)?)?)?
            }
        };
        rows.to_dtype(DType::F32)
    }
}

/// `[tokens, hidden]` to `[sequences, hidden]`.
fn pool(x: &Tensor, pooling: Pooling, batch: &Packed) -> Result<Tensor> {
    match pooling {
        Pooling::First => edge(x, batch, 0),
        Pooling::Last => edge(x, batch, 1),
        Pooling::Mean => {
            let hidden = x.dim(1)?;
            let means = batch
                .runs()
                .iter()
                .map(|run| {
                    x.narrow(0, run.start, run.sequences * run.length)?
                        .reshape((run.sequences, run.length, hidden))?
                        .to_dtype(DType::F32)?
                        .mean(1)?
                        .to_dtype(x.dtype())
                })
                .collect::<Result<Vec<_>>>()?;
            Tensor::cat(&means, 0)
        }
    }
}

/// The first (`side` 0) or last (`side` 1) token of each sequence.
fn edge(x: &Tensor, batch: &Packed, side: usize) -> Result<Tensor> {
    let rows: Vec<u32> = batch
        .runs()
        .iter()
        .flat_map(|run| {
            (0..run.sequences).map(|i| (run.start + i * run.length + side * (run.length - 1)) as u32)
        })
        .collect();
    let count = rows.len();
    x.index_select(&Tensor::from_vec(rows, count, x.device())?, 0)
}
