//! From the encoder's tokens to rows of numbers: one per sequence, or one per token.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::Architecture;
use super::encoder::{Dense, Packed};
use super::ops::{Pooling, Scratch, Slot};

/// What follows the encoder.
pub struct Head {
    /// `None` where every token has a row of its own.
    pooling: Option<Pooling>,
    /// `None` where the pooled vector itself is the row.
    classifier: Option<Classifier>,
}

/// A classifier's hidden layer, if it has one, and its output layer.
struct Classifier {
    hidden: Option<Dense>,
    out: Dense,
}

impl Head {
    /// The pooled vector of each sequence.
    pub fn embedding(pooling: Pooling) -> Self {
        Self { pooling: Some(pooling), classifier: None }
    }

    /// Logits of each sequence, or of each token, one per label. `root` is before the encoder's prefix, `encoder` after
    /// it.
    pub fn classifier(
        a: &Architecture,
        labels: usize,
        per_token: bool,
        root: &VarBuilder<'_>,
        encoder: &VarBuilder<'_>,
    ) -> Result<Self> {
        let c = &a.classifier;
        let hidden = (!per_token || c.dense_for_tokens).then(|| {
            let vb = if c.dense_in_encoder { encoder } else { root };
            let norm = c.norm.map(|name| (root.pp(name), a.norm_bias, a.norm_eps));
            Dense::new((a.hidden, a.hidden), c.dense_bias, Some(c.activation), norm, vb.pp(c.dense))
        });
        let out = Dense::new((a.hidden, labels), true, None, None, root.pp(c.out(per_token)))?;
        let pooling = if c.mean { Pooling::Mean } else { Pooling::First };
        let classifier = Some(Classifier { hidden: hidden.transpose()?, out });
        Ok(Self { pooling: (!per_token).then_some(pooling), classifier })
    }

    /// Every token has a row, instead of every sequence.
    pub fn is_per_token(&self) -> bool {
        self.pooling.is_none()
    }

    /// `[rows, width]` in f32, in the order of the token axis.
    pub fn forward(&self, x: &Tensor, batch: &Packed, scratch: &Scratch) -> Result<Tensor> {
        let pooled = match self.pooling {
            Some(pooling) => pooling.forward(x, batch, scratch.at(Slot::Pooled, x.device()))?,
            None => x.clone(),
        };
        let rows = match &self.classifier {
            None => pooled,
            Some(Classifier { hidden, out }) => {
                let hidden = hidden.as_ref().map(|layer| layer.forward(&pooled, scratch, Slot::Hidden));
                out.forward(hidden.transpose()?.as_ref().unwrap_or(&pooled), scratch, Slot::Logits)?
            }
        };
        rows.to_dtype(DType::F32)
    }
}
