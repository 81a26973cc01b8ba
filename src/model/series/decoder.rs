//! The decoder's only step: from the encoder's hidden states to the quantiles of the next points. A series has one token
//! here, so its attention to itself is its own value, and distances play no part.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::SeriesConfig;
use super::residual::ResidualBlock;
use crate::model::kernels::{CrossAttention, Epilogue, Linear, Norm, Packed, Precision, Slot, Workspace};
use crate::model::text::architecture::{Architecture, FeedForward};
use crate::model::text::trunk::inner;

struct Block {
    norms: [Norm; 3],
    own_value: Linear,
    own_out: Linear,
    query: Linear,
    cross: CrossAttention,
    cross_out: Linear,
    up: Linear,
    down: Linear,
}

pub struct Decoder {
    /// `[1, hidden]`: what each series begins with.
    start: Tensor,
    blocks: Vec<Block>,
    feed_forward: FeedForward,
    norm: Norm,
    predict: ResidualBlock,
}

impl Decoder {
    pub fn load(config: &SeriesConfig, root: &VarBuilder<'_>, precision: Option<Precision>) -> Result<Self> {
        let a = &config.encoder;
        let vb = root.pp("decoder");
        let embeddings = root.get((a.vocabulary, a.hidden), "shared.weight")?;
        let sizes = [a.hidden, a.intermediate, config.levels() * config.prediction];
        Ok(Self {
            start: embeddings.narrow(0, config.start, 1)?,
            blocks: (0..config.decoder_layers)
                .map(|i| Block::load(a, &vb.pp(format!("block.{i}")), precision))
                .collect::<Result<_>>()?,
            feed_forward: a.feed_forward,
            norm: Norm::load(a.hidden, a.norm, a.norm_eps, vb.pp("final_layer_norm"))?,
            predict: ResidualBlock::load(sizes, config.activation, &root.pp("output_patch_embedding"))?,
        })
    }

    /// From the hidden states, `[tokens, hidden]`, to `[sequences, quantiles × points]` in f32, in the order of the token
    /// axis.
    pub fn forward(&self, hidden: &Tensor, batch: &Packed, workspace: &Workspace) -> Result<Tensor> {
        let mut x = self.start.broadcast_as((batch.order().len(), self.start.dim(1)?))?.contiguous()?;
        for block in &self.blocks {
            x = self.block(block, &x, hidden, batch, workspace)?;
        }
        let x = self.norm.forward(&x, workspace.at(Slot::Mixed, hidden.device()))?;
        self.predict.forward(&x, workspace, Slot::Logits)?.to_dtype(DType::F32)
    }

    /// `x` is in [`Slot::Stream`] or in a buffer of its own; so is the result.
    fn block(
        &self,
        block: &Block,
        x: &Tensor,
        hidden: &Tensor,
        batch: &Packed,
        workspace: &Workspace,
    ) -> Result<Tensor> {
        let out = |slot| workspace.at(slot, hidden.device());
        let normed = |norm: usize, x: &Tensor| block.norms[norm].forward(x, out(Slot::Mixed));
        let own = block.own_value.forward(&normed(0, x)?, Epilogue::Nothing, out(Slot::Wide))?;
        let own = block.own_out.forward(&own, Epilogue::Add(x), out(Slot::Attended))?;
        let queries = block.query.forward(&normed(1, &own)?, Epilogue::Nothing, out(Slot::Wide))?;
        let mixed = block.cross.forward(&queries, hidden, batch)?;
        let crossed = block.cross_out.forward(&mixed, Epilogue::Add(&own), out(Slot::Convolved))?;
        let normed = normed(2, &crossed)?;
        let inner = inner(self.feed_forward, &block.up, &normed, workspace)?;
        block.down.forward(&inner, Epilogue::Add(&crossed), out(Slot::Stream))
    }
}

impl Block {
    fn load(a: &Architecture, vb: &VarBuilder<'_>, precision: Option<Precision>) -> Result<Self> {
        let (hidden, inner) = (a.hidden, a.heads.all_queries());
        let norm = |i: usize| Norm::load(hidden, a.norm, a.norm_eps, vb.pp(format!("layer.{i}.layer_norm")));
        let linear =
            |name: &str, inputs, outputs| Linear::load(inputs, outputs, false, precision, &[vb.pp(name)]);
        let cross = vb.pp("layer.1.EncDecAttention");
        let [keys, values] = ["k.weight", "v.weight"].map(|name| cross.get((inner, hidden), name));
        let feed_forward = vb.pp("layer.2.DenseReluDense");
        let up = match a.feed_forward {
            FeedForward::Plain(_) => vec![feed_forward.pp("wi")],
            FeedForward::Gated(..) => vec![feed_forward.pp("wi_0"), feed_forward.pp("wi_1")],
        };
        Ok(Self {
            norms: [norm(0)?, norm(1)?, norm(2)?],
            own_value: linear("layer.0.SelfAttention.v", hidden, inner)?,
            own_out: linear("layer.0.SelfAttention.o", inner, hidden)?,
            query: linear("layer.1.EncDecAttention.q", hidden, inner)?,
            cross: CrossAttention::new(&keys?, &values?, a.heads.queries, precision)?,
            cross_out: linear("layer.1.EncDecAttention.o", inner, hidden)?,
            up: Linear::load(hidden, a.blocks().up(), false, precision, &up)?,
            down: linear("layer.2.DenseReluDense.wo", a.intermediate, hidden)?,
        })
    }

    /// Elements of a block's matrices.
    fn weights(a: &Architecture) -> usize {
        a.hidden * (6 * a.heads.all_queries() + a.blocks().up() + a.intermediate)
    }
}

/// Elements of the matrices of all blocks.
pub fn weights(config: &SeriesConfig) -> usize {
    config.decoder_layers * Block::weights(&config.encoder)
}
