//! From the encoder's tokens to rows of numbers: one per sequence, or one per token.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::{Architecture, TOKEN_CLASSIFIER};
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

    /// Logits of each sequence, one per label. `root` is before the encoder's prefix, `encoder` after it.
    pub fn classifier(
        a: &Architecture,
        labels: usize,
        root: &VarBuilder<'_>,
        encoder: &VarBuilder<'_>,
    ) -> Result<Self> {
        let c = &a.classifier;
        let hidden = Some(hidden(a, root, encoder)?);
        let out = Dense::new((a.hidden, labels), true, None, None, root.pp(c.out))?;
        let pooling = if c.mean { Pooling::Mean } else { Pooling::First };
        Ok(Self { pooling: Some(pooling), classifier: Some(Classifier { hidden, out }) })
    }

    /// Logits of each token, one per label.
    pub fn token_classifier(
        a: &Architecture,
        labels: usize,
        root: &VarBuilder<'_>,
        encoder: &VarBuilder<'_>,
    ) -> Result<Self> {
        let hidden = a.classifier.dense_for_tokens.then(|| hidden(a, root, encoder)).transpose()?;
        let out = Dense::new((a.hidden, labels), true, None, None, root.pp(TOKEN_CLASSIFIER))?;
        Ok(Self { pooling: None, classifier: Some(Classifier { hidden, out }) })
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
            Some(Classifier { hidden, out }) => match hidden {
                None => out.forward(&pooled, scratch, Slot::Logits)?,
                Some(hidden) => {
                    out.forward(&hidden.forward(&pooled, scratch, Slot::Hidden)?, scratch, Slot::Logits)?
                }
            },
        };
        rows.to_dtype(DType::F32)
    }
}

/// A classifier's hidden layer.
fn hidden(a: &Architecture, root: &VarBuilder<'_>, encoder: &VarBuilder<'_>) -> Result<Dense> {
    let c = &a.classifier;
    let vb = if c.dense_in_encoder { encoder } else { root };
    let norm = c.norm.map(|name| (root.pp(name), a.norm_bias, a.norm_eps));
    Dense::new((a.hidden, a.hidden), c.dense_bias, Some(c.activation), norm, vb.pp(c.dense))
}
