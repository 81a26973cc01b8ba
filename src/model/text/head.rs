//! From the encoder's hidden states to rows of output: one per sequence, or one per token.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::Architecture;
use super::layers::Layers;
use crate::model::kernels::{
    Activation, Epilogue, Linear, Norm, NormKind, Packed, Pooling, Slot, Workspace, pool,
};

/// What follows the encoder.
pub struct Head {
    /// Their vectors are concatenated. Empty if each token has a row.
    poolings: Vec<Pooling>,
    then: Then,
}

/// What follows the pooling.
enum Then {
    Layers(Layers),
    Classifier(Box<Classifier>),
}

/// A dense layer with its activation and norm.
struct Dense {
    linear: Linear,
    activation: Option<Activation>,
    norm: Option<Norm>,
}

impl Dense {
    fn new(
        (input, output): (usize, usize),
        bias: bool,
        activation: Option<Activation>,
        norm_of: Option<(VarBuilder<'_>, NormKind, f64)>,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let norm = norm_of.map(|(vb, kind, eps)| Norm::load(output, kind, eps, vb)).transpose()?;
        Ok(Self { linear: Linear::load(input, output, bias, None, &[vb])?, activation, norm })
    }

    /// Writes to `slot`. If there is a norm, its input is in [`Slot::Stream`], which the head no longer needs.
    fn forward(&self, x: &Tensor, workspace: &Workspace, slot: Slot) -> Result<Tensor> {
        let epilogue = self.activation.map_or(Epilogue::Nothing, Epilogue::Activate);
        let out = |slot| workspace.at(slot, x.device());
        match &self.norm {
            Some(norm) => norm.forward(&self.linear.forward(x, epilogue, out(Slot::Stream))?, out(slot)),
            None => self.linear.forward(x, epilogue, out(slot)),
        }
    }
}

/// A classifier's hidden layer, if it has one, and its output layer.
struct Classifier {
    hidden: Option<Dense>,
    out: Dense,
}

impl Head {
    /// The vector of each sequence.
    pub fn embedding(poolings: Vec<Pooling>, layers: Layers) -> Self {
        Self { poolings, then: Then::Layers(layers) }
    }

    /// How much higher a language model's logit of token `yes` is than that of `no`, after each sequence; without `no`,
    /// the logit of `yes`. `table`, `[vocabulary, hidden]`, is the layer that gives the logits.
    pub fn answer(table: &Tensor, yes: u32, no: Option<u32>) -> Result<Self> {
        let count = table.dim(0)?;
        let row = |id: u32| {
            if id as usize >= count {
                candle_core::bail!("token id {id} is outside the model's vocabulary of {count}");
            }
            table.narrow(0, id as usize, 1)?.to_dtype(DType::F32)
        };
        let weight = match no {
            Some(no) => (row(yes)? - row(no)?)?,
            None => row(yes)?,
        };
        let linear = Linear::new(&weight.to_dtype(table.dtype())?, None, None)?;
        let classifier = Classifier { hidden: None, out: Dense { linear, activation: None, norm: None } };
        Ok(Self { poolings: vec![Pooling::Last], then: Then::Classifier(Box::new(classifier)) })
    }

    /// Logits of each sequence, or of each token, one per label. `root` has no prefix, `encoder` has the encoder's.
    pub fn classifier(
        a: &Architecture,
        labels: usize,
        per_token: bool,
        root: &VarBuilder<'_>,
        encoder: &VarBuilder<'_>,
    ) -> Result<Self> {
        let c = &a.classifier;
        let dense = c.dense.filter(|_| !per_token || c.dense_for_tokens);
        let hidden = dense.map(|name| {
            let vb = if c.dense_in_encoder { encoder } else { root };
            let norm = c.norm.map(|name| (root.pp(name), a.norm, a.norm_eps));
            Dense::new((a.hidden, a.hidden), c.dense_bias, Some(c.activation), norm, vb.pp(name))
        });
        let bias = per_token || c.out_bias;
        let out = Dense::new((a.hidden, labels), bias, None, None, root.pp(c.out(per_token)))?;
        let then = Then::Classifier(Box::new(Classifier { hidden: hidden.transpose()?, out }));
        Ok(Self { poolings: if per_token { Vec::new() } else { vec![c.pooling] }, then })
    }

    /// Whether each token has a row, instead of each sequence.
    pub fn is_per_token(&self) -> bool {
        self.poolings.is_empty()
    }

    /// `[rows, width]` in f32, in the order of the token axis.
    pub fn forward(&self, x: &Tensor, batch: &Packed, workspace: &Workspace) -> Result<Tensor> {
        let pooled = match self.poolings.as_slice() {
            [] => x.clone(),
            poolings => pool(poolings, x, batch, workspace.at(Slot::Pooled, x.device()))?,
        };
        let rows = match &self.then {
            Then::Layers(layers) => layers.forward(pooled, workspace)?,
            Then::Classifier(classifier) => {
                let Classifier { hidden, out } = &**classifier;
                let hidden = hidden.as_ref().map(|layer| layer.forward(&pooled, workspace, Slot::Hidden));
                out.forward(hidden.transpose()?.as_ref().unwrap_or(&pooled), workspace, Slot::Logits)?
            }
        };
        rows.to_dtype(DType::F32)
    }
}
