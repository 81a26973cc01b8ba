//! From the encoder's tokens to one row of numbers per sequence.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::Architecture;
use super::encoder::{Dense, Packed};
use super::ops::{Pooling, Scratch, Slot};

/// What follows the encoder.
pub enum Head {
    /// Logits, one per label.
    Classifier { pooling: Pooling, layers: Box<ClassifierLayers>, labels: usize },
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
        Ok(Head::Classifier { pooling, layers: Box::new(ClassifierLayers { hidden, out }), labels })
    }

    /// `[sequences, width]` in f32, in the order of the token axis.
    pub fn forward(&self, x: &Tensor, batch: &Packed, scratch: &Scratch) -> Result<Tensor> {
        let out = scratch.at(Slot::Pooled, x.device());
        let rows = match self {
            Head::Embedding { pooling } => pooling.forward(x, batch, out)?,
            Head::Classifier { pooling, layers, .. } => {
                let pooled = pooling.forward(x, batch, out)?;
                let hidden = layers.hidden.forward(&pooled, scratch, Slot::Hidden)?;
                layers.out.forward(&hidden, scratch, Slot::Logits)?
            }
        };
        rows.to_dtype(DType::F32)
    }
}
