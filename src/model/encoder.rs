//! The packed encoder: one implementation for the whole family, without padding.
//!
//! A batch is one axis of tokens, sequence after sequence. Everything runs over that axis as it is,
//! attention within each sequence: no position is ever computed that no text has, and a sequence's
//! result does not depend on its neighbours. What the layers are made of is in [`super::ops`].

use std::cell::OnceCell;
use std::sync::Mutex;

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::{Architecture, FeedForward, Layer, Norms, Positions, Qkv};
use super::ops::{
    Activation, Attention, Code, Embedding, Linear, Norm, Rotation, Scratch, Slot, Then, gated, upload,
};
use super::tokenize::Tokens;

/// Sequences of the same length, one after the other on the token axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Of the first sequence's first token.
    pub start: usize,
    pub sequences: usize,
    pub length: usize,
}

/// A batch as the encoder takes it.
#[derive(Debug)]
pub struct Packed {
    /// Token ids, `[tokens]`.
    ids: Vec<u32>,
    type_ids: Option<Vec<u32>>,
    /// Of the sequences, in the order of the token axis: the shortest first.
    lengths: Vec<usize>,
    /// `order[i]` is where the sequence at place `i` on the token axis stood in the input.
    order: Vec<usize>,
    on_device: OnceCell<Indices>,
}

/// What kernels on a device need to know of a batch.
#[derive(Debug)]
pub struct Indices {
    /// `[tokens]`.
    pub ids: Tensor,
    pub types: Option<Tensor>,
    /// Within each sequence, from 0.
    pub positions: Tensor,
    /// `[sequences + 1]`: where each begins on the token axis, and where the last ends.
    pub starts: Tensor,
}

impl Packed {
    /// No sequence is empty: [`super::Tokenizer`] sees to that.
    pub fn new(batch: &[&Tokens]) -> Self {
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_by_key(|&i| batch[i].ids.len());
        let total = batch.iter().map(|tokens| tokens.ids.len()).sum();
        let mut ids = Vec::with_capacity(total);
        for &i in &order {
            ids.extend_from_slice(&batch[i].ids);
        }
        let type_ids = batch.iter().any(|tokens| tokens.type_ids.is_some()).then(|| {
            let mut all = Vec::with_capacity(total);
            for &i in &order {
                match &batch[i].type_ids {
                    Some(types) => all.extend_from_slice(types),
                    None => all.resize(all.len() + batch[i].ids.len(), 0),
                }
            }
            all
        });
        let lengths = order.iter().map(|&i| batch[i].ids.len()).collect();
        Self { ids, type_ids, lengths, order, on_device: OnceCell::new() }
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub fn type_ids(&self) -> Option<&[u32]> {
        self.type_ids.as_deref()
    }

    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    pub fn order(&self) -> &[usize] {
        &self.order
    }

    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.lengths.iter().copied()
    }

    /// The batch's indices, copied to the device when first asked for.
    pub fn on(&self, device: &Device) -> Result<&Indices> {
        if let Some(indices) = self.on_device.get() {
            return Ok(indices);
        }
        let tokens = self.tokens();
        let (mut positions, mut starts) = (Vec::with_capacity(tokens), vec![0]);
        for length in self.lengths() {
            positions.extend(0..length as u32);
            starts.push(positions.len() as u32);
        }
        // One copy for all.
        let types = self.type_ids().unwrap_or_default();
        let all = upload(&[&self.ids, &positions, &starts, types].concat(), device)?;
        let types = self.type_ids().map(|_| all.narrow(0, 2 * tokens + starts.len(), tokens));
        let indices = Indices {
            ids: all.narrow(0, 0, tokens)?,
            types: types.transpose()?,
            positions: all.narrow(0, tokens, tokens)?,
            starts: all.narrow(0, 2 * tokens, starts.len())?,
        };
        Ok(self.on_device.get_or_init(|| indices))
    }

    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let mut start = 0;
        self.lengths.chunk_by(|a, b| a == b).map(move |run| {
            let run = Run { start, sequences: run.len(), length: run[0] };
            start += run.sequences * run.length;
            run
        })
    }
}

struct Block {
    qkv: Linear,
    attention: Attention,
    attention_out: Linear,
    attention_norm: Option<Norm>,
    up: Linear,
    down: Linear,
    mlp_norm: Norm,
    /// Index into [`Encoder::rotations`].
    rotation: Option<usize>,
}

pub struct Encoder {
    architecture: Architecture,
    device: Device,
    embedding: Embedding,
    blocks: Vec<Block>,
    rotations: Vec<Rotation>,
    final_norm: Option<Norm>,
    /// As many as forwards have run at the same time.
    scratch: Mutex<Vec<Scratch>>,
}

/// A dense layer with its activation and norm, for heads.
pub(super) struct Dense {
    linear: Linear,
    activation: Option<Activation>,
    norm: Option<Norm>,
}

impl Dense {
    pub(super) fn new(
        (input, output): (usize, usize),
        bias: bool,
        activation: Option<Activation>,
        norm_of: Option<(VarBuilder<'_>, bool, f64)>,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let norm = norm_of.map(|(vb, bias, eps)| Norm::load(output, bias, eps, vb)).transpose()?;
        Ok(Self { linear: Linear::load(input, output, bias, None, &[vb])?, activation, norm })
    }

    /// To `slot`; where there is a norm, by way of the stream's, which no head needs any more.
    pub(super) fn forward(&self, x: &Tensor, scratch: &Scratch, slot: Slot) -> Result<Tensor> {
        let then = self.activation.map_or(Then::Nothing, Then::Activate);
        let out = |slot| scratch.at(slot, x.device());
        match &self.norm {
            Some(norm) => norm.forward(&self.linear.forward(x, then, out(Slot::Stream))?, out(slot)),
            None => self.linear.forward(x, then, out(slot)),
        }
    }
}

impl Encoder {
    /// `vb` stands before the encoder's own names; `code` is what a CPU multiplies with, where not f32.
    pub fn load(architecture: Architecture, vb: &VarBuilder<'_>, code: Option<Code>) -> Result<Self> {
        let a = &architecture;
        let (h, device) = (a.hidden, vb.device().clone());
        let table = |name: &str, count: usize| vb.pp(name).get((count, h), "weight");
        let embedding = Embedding {
            word: table(a.embeddings.word, a.vocabulary)?,
            types: a.embeddings.token_type.map(|(name, count)| table(name, count)).transpose()?,
            positions: match a.positions {
                Positions::Learned { name, count, first } => Some((table(name, count)?, first)),
                Positions::Rotary { .. } => None,
            },
            norm: Norm::load(h, a.norm_bias, a.norm_eps, vb.pp(a.embeddings.norm))?,
        };
        let mut rotations: Vec<Rotation> = Vec::new();
        let mut blocks = Vec::with_capacity(a.layers.len());
        for layer in &a.layers {
            let rotation = match layer.rope {
                Some(rope) => Some(match rotations.iter().position(|r| r.rope == rope) {
                    Some(at) => at,
                    None => {
                        let (width, dtype) = (h / a.heads, vb.dtype());
                        rotations.push(Rotation::new(rope, a.max_tokens(), width, dtype, &device)?);
                        rotations.len() - 1
                    }
                }),
                None => None,
            };
            blocks.push(Block::load(a, layer, rotation, vb, code)?);
        }
        let final_norm = match a.final_norm {
            Some(name) => Some(Norm::load(h, a.norm_bias, a.norm_eps, vb.pp(name))?),
            None => None,
        };
        let scratch = Mutex::default();
        Ok(Self { embedding, blocks, rotations, final_norm, device, architecture, scratch })
    }

    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Runs `then` on the last layer's output, `[tokens, hidden]`, in the memory that it stands in.
    pub fn forward<T>(&self, batch: &Packed, then: impl FnOnce(&Tensor, &Scratch) -> Result<T>) -> Result<T> {
        let kept = || self.scratch.lock().unwrap_or_else(|e| e.into_inner());
        let scratch = kept().pop().unwrap_or_default();
        let result = self.layers(batch, &scratch).and_then(|x| then(&x, &scratch));
        kept().push(scratch);
        result
    }

    fn layers(&self, batch: &Packed, scratch: &Scratch) -> Result<Tensor> {
        let longest = batch.lengths().max().unwrap_or(0);
        if longest > self.architecture.max_tokens() {
            candle_core::bail!("{longest} tokens, and the model takes {}", self.architecture.max_tokens());
        }
        let out = |slot| scratch.at(slot, &self.device);
        let mut x = self.embedding.forward(batch, out(Slot::Stream))?;
        for block in &self.blocks {
            x = self.block(block, &x, batch, scratch)?;
        }
        match &self.final_norm {
            Some(norm) => norm.forward(&x, out(Slot::Mixed)),
            None => Ok(x),
        }
    }

    fn block(&self, block: &Block, x: &Tensor, batch: &Packed, scratch: &Scratch) -> Result<Tensor> {
        let out = |slot| scratch.at(slot, &self.device);
        let rotation = block.rotation.map(|at| &self.rotations[at]);
        let first = self.architecture.norms == Norms::First;
        let normed = match (first, &block.attention_norm) {
            (true, Some(norm)) => &norm.forward(x, out(Slot::Mixed))?,
            _ => x,
        };
        let (qkv, bias) = block.qkv.product(normed, out(Slot::Wide))?;
        let mixed = block.attention.forward(&qkv, bias, rotation, batch, out(Slot::Mixed))?;
        let then = match (first, &block.attention_norm) {
            (false, Some(norm)) => Then::AddNorm(x, norm),
            _ => Then::Add(x),
        };
        let attended = block.attention_out.forward(&mixed, then, out(Slot::Attended))?;
        let (normed, then) = match first {
            true => (&block.mlp_norm.forward(&attended, out(Slot::Mixed))?, Then::Add(&attended)),
            false => (&attended, Then::AddNorm(&attended, &block.mlp_norm)),
        };
        let inner = match self.architecture.feed_forward {
            FeedForward::Plain(activation) => {
                block.up.forward(normed, Then::Activate(activation), out(Slot::Wide))?
            }
            FeedForward::Gated(activation, gate) => {
                let up = block.up.forward(normed, Then::Nothing, out(Slot::Wide))?;
                gated(&up, activation, gate, out(Slot::Gated))?
            }
        };
        block.down.forward(&inner, then, out(Slot::Stream))
    }
}

impl Block {
    fn load(
        a: &Architecture,
        layer: &Layer,
        rotation: Option<usize>,
        vb: &VarBuilder<'_>,
        code: Option<Code>,
    ) -> Result<Self> {
        let h = a.hidden;
        let qkv = match &layer.qkv {
            Qkv::Fused(name) => vec![vb.pp(name)],
            Qkv::Separate(names) => names.iter().map(|name| vb.pp(name)).collect(),
        };
        let ups: Vec<_> = layer.up.iter().map(|name| vb.pp(name)).collect();
        Ok(Self {
            qkv: Linear::load(h, 3 * h, a.attention_bias, code, &qkv)?,
            attention: Attention { heads: a.heads, width: h / a.heads, reach: layer.reach },
            attention_out: Linear::load(h, h, a.attention_bias, code, &[vb.pp(&layer.attention_out)])?,
            attention_norm: match &layer.attention_norm {
                Some(name) => Some(Norm::load(h, a.norm_bias, a.norm_eps, vb.pp(name))?),
                None => None,
            },
            up: Linear::load(h, a.up(), a.up_bias, code, &ups)?,
            down: Linear::load(a.intermediate, h, a.down_bias, code, &[vb.pp(&layer.down)])?,
            mlp_norm: Norm::load(h, a.norm_bias, a.norm_eps, vb.pp(&layer.mlp_norm))?,
            rotation,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: &[u32]) -> Tokens {
        Tokens { ids: ids.to_vec(), type_ids: None, truncated: false }
    }

    #[test]
    fn packs_by_length_without_padding() {
        let batch = [tokens(&[1, 2, 3]), tokens(&[4]), tokens(&[5, 6, 7]), tokens(&[8])];
        let packed = Packed::new(&batch.iter().collect::<Vec<_>>());
        assert_eq!(packed.ids, [4, 8, 1, 2, 3, 5, 6, 7]);
        assert_eq!(packed.order, [1, 3, 0, 2]);
        assert_eq!(
            packed.runs().collect::<Vec<_>>(),
            [Run { start: 0, sequences: 2, length: 1 }, Run { start: 2, sequences: 2, length: 3 }]
        );
    }
}
