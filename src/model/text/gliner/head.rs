//! From the backbone's hidden states to the logits of spans of words for labels.
//!
//! The package computes a vector for each span, W₂ relu(W₁ [s; e] + b₁) + b₂ of the projected first and last word, and
//! multiplies it with each label's vector p. Here W₁ is applied to each word instead of each span, as W₁ [s; e] is the sum
//! of a part for s and one for e; and W₂ to each label instead of each span, as p · W₂ x = W₂ᵀp · x. There are
//! `max_width` times as many spans as words, and few labels, so little is left of what takes the package half its time.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::Config;
use crate::model::kernels::{Activation, Epilogue, Linear, Lstm, Slot, Workspace, span_logits, upload};

/// Two linear layers with ReLU between them.
struct Mlp {
    inner: Linear,
    outer: Linear,
}

impl Mlp {
    /// Names are those of torch's `Sequential`, in which ReLU and dropout count.
    fn load(width: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let inner = Linear::load(width, 4 * width, true, None, &[vb.pp("0")])?;
        Ok(Self { inner, outer: Linear::load(4 * width, width, true, None, &[vb.pp("3")])? })
    }

    fn forward(
        &self,
        x: &Tensor,
        then: Epilogue<'_>,
        workspace: &Workspace,
        slots: [Slot; 2],
    ) -> Result<Tensor> {
        let [inner, outer] = slots.map(|slot| workspace.at(slot, x.device()));
        let inner = self.inner.forward(x, Epilogue::Activate(Activation::Relu), inner)?;
        self.outer.forward(&inner, then, outer)
    }
}

pub struct Head {
    /// From the backbone's width, where they differ.
    projection: Option<Linear>,
    rnn: Vec<Lstm>,
    start: Mlp,
    end: Mlp,
    /// W₁'s parts for the first and the last word; the latter has b₁.
    span: [Linear; 2],
    label: Mlp,
    /// From a label's vector p to W₂ᵀp and p · b₂.
    fold: Linear,
    max_width: usize,
}

/// Which rows of a batch's hidden states are words and labels.
#[derive(Debug, Default)]
pub struct Rows {
    /// First token of each word of each sequence.
    pub words: Vec<u32>,
    /// Token of each label of each sequence.
    pub labels: Vec<u32>,
    /// Number of words of each sequence.
    pub counts: Vec<usize>,
}

impl Head {
    pub fn load(config: &Config, vb: &VarBuilder<'_>) -> Result<Self> {
        let width = config.hidden;
        let projection = match config.backbone.hidden {
            same if same == width => None,
            other => Some(Linear::load(other, width, true, None, &[vb.pp("token_rep_layer.projection")])?),
        };
        let lstm = |layer| Lstm::load(width, width / 2, layer, &vb.pp("rnn.lstm"));
        let span = vb.pp("span_rep_layer.span_rep_layer");
        let out = span.pp("out_project");
        let (first, bias) = (out.get((4 * width, 2 * width), "0.weight")?, out.get(4 * width, "0.bias")?);
        let part = |at: usize| first.narrow(1, at * width, width)?.contiguous();
        let (second, own) = (out.get((width, 4 * width), "3.weight")?, out.get(width, "3.bias")?);
        let fold = Tensor::cat(&[second, own.unsqueeze(1)?], 1)?.t()?.contiguous()?;
        Ok(Self {
            projection,
            rnn: (0..config.rnn_layers).map(lstm).collect::<Result<_>>()?,
            start: Mlp::load(width, &span.pp("project_start"))?,
            end: Mlp::load(width, &span.pp("project_end"))?,
            span: [Linear::new(&part(0)?, None, None)?, Linear::new(&part(1)?, Some(bias), None)?],
            label: Mlp::load(width, &vb.pp("prompt_rep_layer"))?,
            fold: Linear::new(&fold, None, None)?,
            max_width: config.max_width,
        })
    }

    /// The logits of [`span_logits`], in f32. `hidden` is `[tokens, backbone's width]`; the workspace's slots are free.
    pub fn forward(&self, hidden: &Tensor, rows: &Rows, workspace: &Workspace) -> Result<Tensor> {
        let device = hidden.device();
        let out = |slot| workspace.at(slot, device);
        // A copy, so that the slots are free from here on.
        let both = hidden.index_select(&upload(&[&rows.words[..], &rows.labels].concat(), device)?, 0)?;
        let both = match &self.projection {
            Some(projection) => projection.forward(&both, Epilogue::Nothing, out(Slot::Pooled))?,
            None => both,
        };
        let mut words = both.narrow(0, 0, rows.words.len())?;
        let labels = both.narrow(0, rows.words.len(), rows.labels.len())?;
        // A layer never writes where its input is.
        for (lstm, slot) in self.rnn.iter().zip([Slot::Stream, Slot::Mixed].into_iter().cycle()) {
            words = lstm.forward(&words, &rows.counts, out(Slot::Wide), out(slot))?;
        }
        let relu = || Epilogue::Activate(Activation::Relu);
        let [of_start, of_end] = &self.span;
        let slots = [Slot::Wide, Slot::Convolved];
        let starts = self.start.forward(&words, relu(), workspace, slots)?;
        let starts = of_start.forward(&starts, Epilogue::Nothing, out(Slot::Gated))?;
        let ends = self.end.forward(&words, relu(), workspace, slots)?;
        let ends = of_end.forward(&ends, Epilogue::Nothing, out(Slot::Attended))?;
        let labels = self.label.forward(&labels, Epilogue::Nothing, workspace, slots)?;
        let labels = self.fold.forward(&labels, Epilogue::Nothing, out(Slot::Hidden))?;
        span_logits(&starts, &ends, &labels, &rows.counts, self.max_width)?.to_dtype(DType::F32)
    }
}
