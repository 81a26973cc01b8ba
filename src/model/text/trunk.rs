//! The transformer's layers, from `[tokens, hidden]` to `[tokens, hidden]`, without embeddings and head.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::{Blocks, FeedForward, Layer, NormPlacement, Qkv};
use super::relative::Relative;
use crate::model::kernels::{
    Attention, Calibration, Convolution, Epilogue, Expected, Linear, Norm, Packed, Precision, Rotation, Slot,
    Workspace, gated,
};

struct Block {
    qkv: Linear,
    attention: Attention,
    attention_out: Linear,
    attention_norm: Option<Norm>,
    up: Linear,
    down: Linear,
    mlp_norm: Norm,
    /// Of the results of attention and feed-forward, before the residual is added.
    branch_norms: Option<[Norm; 2]>,
    /// Index into [`Trunk::rotations`].
    rotation: Option<usize>,
}

/// All layers, and the norm after the last one.
pub struct Trunk {
    norms: NormPlacement,
    feed_forward: FeedForward,
    blocks: Vec<Block>,
    /// Index into `blocks` of each layer: layers may share their weights.
    layers: Vec<usize>,
    rotations: Vec<Rotation>,
    final_norm: Option<Norm>,
    /// Over the trunk's input; its output is added to the first layer's and normalised.
    convolution: Option<(Convolution, Norm)>,
}

impl Trunk {
    /// `expected` is of the trunk's input.
    pub fn load(
        a: &Blocks<'_>,
        vb: &VarBuilder<'_>,
        precision: Option<Precision>,
        expected: Option<Expected>,
    ) -> Result<Self> {
        let convolution = match a.convolution {
            Some(c) => {
                let (weights, expected) = (vb.pp(c.name), expected.as_ref());
                let convolution =
                    Convolution::load(a.hidden, c.size, c.activation, precision, expected, &weights)?;
                Some((convolution, Norm::load(a.hidden, a.norm, a.norm_eps, vb.pp(c.norm))?))
            }
            None => None,
        };
        let mut expected = expected;
        let mut rotations: Vec<Rotation> = Vec::new();
        let relative = Relative::load(a, vb)?;
        let (mut blocks, mut layers) = (Vec::new(), Vec::with_capacity(a.layers.len()));
        for (i, layer) in a.layers.iter().enumerate() {
            if let Some(same) = a.layers[..i].iter().position(|earlier| earlier == layer) {
                layers.push(layers[same]);
                continue;
            }
            let rotation = match layer.rope {
                Some(rope) => Some(match rotations.iter().position(|r| r.rope == rope) {
                    Some(at) => at,
                    None => {
                        let (width, dtype) = (a.heads.width, vb.dtype());
                        rotations.push(Rotation::new(rope, a.max_tokens, width, dtype, vb.device())?);
                        rotations.len() - 1
                    }
                }),
                None => None,
            };
            layers.push(blocks.len());
            let attention = relative.attention(a, i, vb)?;
            let again = a.layers.get(i + 1) == Some(layer);
            let block = Block::load(a, layer, rotation, attention, vb, precision, (expected, again))?;
            expected = match (a.norms, &convolution) {
                (NormPlacement::Pre, _) => None,
                (NormPlacement::Post, Some((_, norm))) if i == 0 => norm.expected(),
                (NormPlacement::Post, _) => block.mlp_norm.expected(),
            };
            blocks.push(block);
        }
        let final_norm = match a.final_norm {
            Some(name) => Some(Norm::load(a.hidden, a.norm, a.norm_eps, vb.pp(name))?),
            None => None,
        };
        let (norms, feed_forward) = (a.norms, a.feed_forward);
        Ok(Self { norms, feed_forward, blocks, layers, rotations, final_norm, convolution })
    }

    /// `x` is `[tokens, hidden]` and in [`Slot::Stream`] of the workspace. The result is there or in [`Slot::Mixed`].
    pub fn forward(&self, mut x: Tensor, batch: &Packed, workspace: &Workspace) -> Result<Tensor> {
        let mut convolved = match &self.convolution {
            Some((convolution, norm)) => {
                let out = |slot| workspace.at(slot, x.device());
                Some((convolution.forward(&x, batch, out(Slot::Wide), out(Slot::Convolved))?, norm))
            }
            None => None,
        };
        for &layer in &self.layers {
            x = self.block(&self.blocks[layer], &x, batch, workspace)?;
            if let Some((convolved, norm)) = convolved.take() {
                x = norm.sum(x, &convolved)?;
            }
        }
        match &self.final_norm {
            Some(norm) => norm.forward(&x, workspace.at(Slot::Mixed, x.device())),
            None => Ok(x),
        }
    }

    fn block(&self, block: &Block, x: &Tensor, batch: &Packed, workspace: &Workspace) -> Result<Tensor> {
        let out = |slot| workspace.at(slot, x.device());
        let rotation = block.rotation.map(|at| &self.rotations[at]);
        let pre_norm = self.norms == NormPlacement::Pre;
        let normed = match (pre_norm, &block.attention_norm) {
            (true, Some(norm)) => &norm.forward(x, out(Slot::Mixed))?,
            _ => x,
        };
        let (qkv, bias) = block.qkv.product(normed, out(Slot::Wide))?;
        let mixed = block.attention.forward(&qkv, bias, rotation, batch, out(Slot::Mixed))?;
        let of_branch = block.branch_norms.as_ref();
        let epilogue = match (pre_norm, &block.attention_norm, of_branch) {
            (false, Some(norm), _) => Epilogue::AddNorm(x, norm),
            (_, _, Some([norm, _])) => Epilogue::NormAdd(norm, x),
            _ => Epilogue::Add(x),
        };
        let attended = block.attention_out.forward(&mixed, epilogue, out(Slot::Attended))?;
        let (normed, epilogue) = match pre_norm {
            true => {
                let epilogue = match of_branch {
                    Some([_, norm]) => Epilogue::NormAdd(norm, &attended),
                    None => Epilogue::Add(&attended),
                };
                (&block.mlp_norm.forward(&attended, out(Slot::Mixed))?, epilogue)
            }
            false => (&attended, Epilogue::AddNorm(&attended, &block.mlp_norm)),
        };
        let inner = inner(self.feed_forward, &block.up, normed, workspace)?;
        block.down.forward(&inner, epilogue, out(Slot::Stream))
    }
}

/// The inner activations of a feed-forward block. `x` is its input, `[tokens, hidden]`; the result is `[tokens, intermediate]`.
pub fn inner(of: FeedForward, up: &Linear, x: &Tensor, workspace: &Workspace) -> Result<Tensor> {
    let out = |slot| workspace.at(slot, x.device());
    match of {
        FeedForward::Plain(activation) => up.forward(x, Epilogue::Activate(activation), out(Slot::Wide)),
        FeedForward::Gated(activation, gate) => {
            let up = up.forward(x, Epilogue::Nothing, out(Slot::Wide))?;
            gated(&up, activation, gate, out(Slot::Gated))
        }
    }
}

impl Block {
    /// `before`: what is expected of the block's input, and whether the same block comes again right after it.
    fn load(
        a: &Blocks<'_>,
        layer: &Layer,
        rotation: Option<usize>,
        attention: Attention,
        vb: &VarBuilder<'_>,
        precision: Option<Precision>,
        before: (Option<Expected>, bool),
    ) -> Result<Self> {
        let (h, heads) = (a.hidden, a.heads);
        let sizes = [heads.all_queries(), heads.all_keys(), heads.all_keys()];
        let qkv = match &layer.qkv {
            Qkv::Fused(name) => vec![(vb.pp(name), sizes.iter().sum())],
            Qkv::Separate(names) | Qkv::KeysWithoutBias(names) => {
                names.iter().map(|name| vb.pp(name)).zip(sizes).collect()
            }
        };
        let ups: Vec<_> = layer.up.iter().map(|name| vb.pp(name)).collect();
        let norm = |name: &String, size: usize| Norm::load(size, a.norm, a.norm_eps, vb.pp(name));
        let pair = |names: &Option<[String; 2]>, size: usize| match names {
            Some([first, second]) => {
                Ok::<_, candle_core::Error>(Some([norm(first, size)?, norm(second, size)?]))
            }
            None => Ok(None),
        };
        let attention_norm = layer.attention_norm.as_ref().map(|name| norm(name, h)).transpose()?;
        let mlp_norm = norm(&layer.mlp_norm, h)?;
        let of_attention_norm = attention_norm.as_ref().and_then(Norm::expected);
        let (into_qkv, into_up) = match (a.norms, before) {
            (NormPlacement::Pre, (before, _)) => (of_attention_norm.or(before), mlp_norm.expected()),
            (NormPlacement::Post, (_, true)) => (mlp_norm.expected(), of_attention_norm),
            (NormPlacement::Post, (before, false)) => (before, of_attention_norm),
        };
        let first = heads.all_queries() + heads.all_keys();
        let values = into_qkv.as_ref().map(|expected| Calibration { expected, first });
        // Factors of the outputs are part of the weights.
        let scaled = |name: &String, inputs, bias, expected: Option<Expected>, scale: Option<&String>| {
            let (part, expected) = (vb.pp(name), expected.as_ref().map(Into::into));
            let Some(scale) = scale else {
                return Linear::load_parts(inputs, bias, precision, expected, &[(part, h)]);
            };
            let scale = vb.get(h, scale)?;
            let weight = part.get((h, inputs), "weight")?.broadcast_mul(&scale.unsqueeze(1)?)?;
            let bias = if bias { Some((part.get(h, "bias")? * &scale)?) } else { None };
            Linear::calibrated(&weight, bias, precision, expected)
        };
        let [out_scale, down_scale] = match &layer.scales {
            Some([out, down]) => [Some(out), Some(down)],
            None => [None, None],
        };
        let qkv = match &layer.qkv {
            Qkv::KeysWithoutBias(_) => {
                let weights = qkv.iter().map(|(vb, size)| vb.get((*size, h), "weight"));
                let weight = Tensor::cat(&weights.collect::<Result<Vec<_>>>()?, 0)?;
                let bias = |at: usize| qkv[at].0.get(qkv[at].1, "bias");
                let none = Tensor::zeros(heads.all_keys(), vb.dtype(), vb.device())?;
                Linear::calibrated(
                    &weight,
                    Some(Tensor::cat(&[bias(0)?, none, bias(2)?], 0)?),
                    precision,
                    values,
                )?
            }
            _ => Linear::load_parts(h, a.attention_bias, precision, values, &qkv)?,
        };
        let attention_out =
            scaled(&layer.attention_out, heads.all_queries(), a.attention_bias, None, out_scale)?;
        let each = a.up() / ups.len();
        let ups: Vec<_> = ups.into_iter().map(|vb| (vb, each)).collect();
        let up = Linear::load_parts(h, a.up_bias, precision, into_up.as_ref().map(Into::into), &ups)?;
        let into_down = up.expected().map(|expected| match a.feed_forward {
            FeedForward::Plain(activation) => expected.after_activation(activation),
            FeedForward::Gated(activation, gate) => expected.after_gate(activation, gate),
        });
        Ok(Self {
            qkv,
            attention: Attention { norms: pair(&layer.qk_norms, heads.width)?, ..attention },
            attention_out,
            attention_norm,
            up,
            down: scaled(&layer.down, a.intermediate, a.down_bias, into_down, down_scale)?,
            mlp_norm,
            branch_norms: pair(&layer.branch_norms, h)?,
            rotation,
        })
    }
}
