//! The packed encoder: one implementation for the whole family, without padding.
//!
//! A batch is one axis of tokens, sequence after sequence, sorted by length. Every multiplication
//! runs over that axis as it is. Attention runs once for each run of sequences of the same length,
//! so no position is ever computed that no text has, nothing needs a mask, and a sequence's result
//! does not depend on its neighbours.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::ops::{layer_norm, softmax_last_dim};
use candle_nn::rotary_emb::rope;

use super::architecture::{Activation, Architecture, FeedForward, Layer, Norms, Positions, Qkv};
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
    runs: Vec<Run>,
    /// `order[i]` is where the sequence at place `i` on the token axis stood in the input.
    order: Vec<usize>,
}

impl Packed {
    /// No sequence is empty: [`super::Tokenizer`] sees to that.
    pub fn new(batch: &[&Tokens]) -> Self {
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_by_key(|&i| batch[i].ids.len());
        let total = batch.iter().map(|tokens| tokens.ids.len()).sum();
        let mut ids = Vec::with_capacity(total);
        let mut runs: Vec<Run> = Vec::new();
        for &i in &order {
            let length = batch[i].ids.len();
            match runs.last_mut() {
                Some(run) if run.length == length => run.sequences += 1,
                _ => runs.push(Run { start: ids.len(), sequences: 1, length }),
            }
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
        Self { ids, type_ids, runs, order }
    }

    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    pub fn order(&self) -> &[usize] {
        &self.order
    }
}

struct Linear {
    /// `[in, out]`, as the multiplication reads it.
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

struct Block {
    qkv: Linear,
    attention_out: Linear,
    attention_norm: Option<Norm>,
    up: Linear,
    down: Linear,
    mlp_norm: Norm,
    /// Index into [`Encoder::rotations`].
    rotation: Option<usize>,
    reach: Option<usize>,
}

/// Cosines and sines, `[positions, head width / 2]` each.
struct Rotation {
    theta: f64,
    cos: Tensor,
    sin: Tensor,
}

pub struct Encoder {
    architecture: Architecture,
    device: Device,
    word: Tensor,
    positions: Option<Tensor>,
    token_types: Option<Tensor>,
    embedding_norm: Norm,
    blocks: Vec<Block>,
    rotations: Vec<Rotation>,
    final_norm: Option<Norm>,
}

/// Loads a linear layer; weights in a checkpoint are `[out, in]`.
fn linear(input: usize, output: usize, bias: bool, vb: VarBuilder<'_>) -> Result<Linear> {
    let weight = vb.get((output, input), "weight")?.t()?.contiguous()?;
    let bias = if bias { Some(vb.get(output, "bias")?) } else { None };
    Ok(Linear { weight, bias })
}

fn norm(size: usize, bias: bool, eps: f64, vb: VarBuilder<'_>) -> Result<Norm> {
    // Checkpoints from before PyTorch have the older names.
    let (weight, bias_name) =
        if vb.contains_tensor("gamma") { ("gamma", "beta") } else { ("weight", "bias") };
    let weight = vb.get(size, weight)?;
    let bias = if bias { vb.get(size, bias_name)? } else { weight.zeros_like()? };
    Ok(Norm { weight, bias, eps: eps as f32 })
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
        let norm = norm_of.map(|(vb, bias, eps)| norm(output, bias, eps, vb)).transpose()?;
        Ok(Self { linear: linear(input, output, bias, vb)?, activation, norm })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.linear.forward(x)?;
        if let Some(activation) = self.activation {
            x = activate(&x, activation)?;
        }
        match &self.norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }
}

fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
        Activation::Silu => x.silu(),
        Activation::Tanh => x.tanh(),
    }
}

impl Encoder {
    /// `vb` stands before the encoder's own names.
    pub fn load(architecture: Architecture, vb: &VarBuilder<'_>) -> Result<Self> {
        let a = &architecture;
        let (h, device) = (a.hidden, vb.device().clone());
        let word = vb.pp(a.embeddings.word).get((a.vocabulary, h), "weight")?;
        let token_types = match a.embeddings.token_type {
            Some((name, count)) => Some(vb.pp(name).get((count, h), "weight")?),
            None => None,
        };
        let positions = match a.positions {
            Positions::Learned { name, count, .. } => Some(vb.pp(name).get((count, h), "weight")?),
            Positions::Rotary { .. } => None,
        };
        let mut rotations: Vec<Rotation> = Vec::new();
        let mut blocks = Vec::with_capacity(a.layers.len());
        for layer in &a.layers {
            let rotation = match layer.theta {
                Some(theta) => Some(match rotations.iter().position(|r| r.theta == theta) {
                    Some(at) => at,
                    None => {
                        rotations.push(rotation(theta, a.max_tokens(), h / a.heads, vb.dtype(), &device)?);
                        rotations.len() - 1
                    }
                }),
                None => None,
            };
            blocks.push(block(a, layer, rotation, vb)?);
        }
        let final_norm = match a.final_norm {
            Some(name) => Some(norm(h, a.norm_bias, a.norm_eps, vb.pp(name))?),
            None => None,
        };
        let embedding_norm = norm(h, a.norm_bias, a.norm_eps, vb.pp(a.embeddings.norm))?;
        Ok(Self {
            word,
            positions,
            token_types,
            embedding_norm,
            blocks,
            rotations,
            final_norm,
            device,
            architecture,
        })
    }

    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The last layer's output, `[tokens, hidden]`.
    pub fn forward(&self, batch: &Packed) -> Result<Tensor> {
        let mut x = self.embed(batch)?;
        for block in &self.blocks {
            x = self.block(block, &x, batch)?;
        }
        match &self.final_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }

    fn embed(&self, batch: &Packed) -> Result<Tensor> {
        let total = batch.ids.len();
        // Checked here: a GPU would read past the table.
        if let Some(id) = batch.ids.iter().find(|&&id| id as usize >= self.architecture.vocabulary) {
            candle_core::bail!(
                "token id {id} is outside the model's vocabulary of {}",
                self.architecture.vocabulary
            );
        }
        let longest = batch.runs.last().map_or(0, |run| run.length);
        if longest > self.architecture.max_tokens() {
            candle_core::bail!("{longest} tokens, and the model takes {}", self.architecture.max_tokens());
        }
        let ids = Tensor::from_slice(&batch.ids, total, &self.device)?;
        let mut x = self.word.index_select(&ids, 0)?;
        if let (Some(table), Positions::Learned { first, .. }) =
            (&self.positions, &self.architecture.positions)
        {
            let mut positions = Vec::with_capacity(total);
            for run in &batch.runs {
                for _ in 0..run.sequences {
                    positions.extend(*first as u32..(first + run.length) as u32);
                }
            }
            let positions = Tensor::from_vec(positions, total, &self.device)?;
            x = (x + table.index_select(&positions, 0)?)?;
        }
        if let Some(table) = &self.token_types {
            x = match &batch.type_ids {
                Some(types) => {
                    let count = table.dim(0)?;
                    if let Some(id) = types.iter().find(|&&id| id as usize >= count) {
                        candle_core::bail!("token type {id}, and the model has {count}");
                    }
                    (x + table.index_select(&Tensor::from_slice(types, total, &self.device)?, 0)?)?
                }
                None => x.broadcast_add(&table.narrow(0, 0, 1)?)?,
            };
        }
        self.embedding_norm.forward(&x)
    }

    fn block(&self, block: &Block, x: &Tensor, batch: &Packed) -> Result<Tensor> {
        match self.architecture.norms {
            Norms::Last => {
                let x = (x + self.attention(block, x, batch)?)?;
                let x = match &block.attention_norm {
                    Some(norm) => norm.forward(&x)?,
                    None => x,
                };
                block.mlp_norm.forward(&(&x + self.feed_forward(block, &x)?)?)
            }
            Norms::First => {
                let normed = match &block.attention_norm {
                    Some(norm) => norm.forward(x)?,
                    None => x.clone(),
                };
                let x = (x + self.attention(block, &normed, batch)?)?;
                let fed = self.feed_forward(block, &block.mlp_norm.forward(&x)?)?;
                x + fed
            }
        }
    }

    fn feed_forward(&self, block: &Block, x: &Tensor) -> Result<Tensor> {
        let up = block.up.forward(x)?;
        let fed = match self.architecture.feed_forward {
            FeedForward::Plain(activation) => activate(&up, activation)?,
            FeedForward::Gated(activation) => {
                let half = self.architecture.intermediate;
                let input = activate(&up.narrow(D::Minus1, 0, half)?.contiguous()?, activation)?;
                (input * up.narrow(D::Minus1, half, half)?)?
            }
        };
        block.down.forward(&fed)
    }

    /// `[tokens, hidden]` to the same, a run of equal lengths at a time.
    fn attention(&self, block: &Block, x: &Tensor, batch: &Packed) -> Result<Tensor> {
        let (heads, hidden) = (self.architecture.heads, self.architecture.hidden);
        let width = hidden / heads;
        let scale = 1.0 / (width as f64).sqrt();
        let qkv = block.qkv.forward(x)?;
        let mut mixed = Vec::with_capacity(batch.runs.len());
        for run in &batch.runs {
            let tokens = run.sequences * run.length;
            let part = |index: usize| {
                qkv.narrow(0, run.start, tokens)?
                    .narrow(1, index * hidden, hidden)?
                    .reshape((run.sequences, run.length, heads, width))?
                    .transpose(1, 2)?
                    .contiguous()
            };
            let (mut q, mut k, v) = (part(0)?, part(1)?, part(2)?);
            if let Some(at) = block.rotation {
                let rotation = &self.rotations[at];
                let cos = rotation.cos.narrow(0, 0, run.length)?;
                let sin = rotation.sin.narrow(0, 0, run.length)?;
                q = rope(&q, &cos, &sin)?;
                k = rope(&k, &cos, &sin)?;
            }
            let mut scores = (q.matmul(&k.t()?)? * scale)?;
            if let Some(reach) = block.reach.filter(|&reach| run.length > reach + 1) {
                scores = scores.broadcast_add(&band(run.length, reach, scores.dtype(), &self.device)?)?;
            }
            let out = softmax_last_dim(&scores)?.matmul(&v)?;
            mixed.push(out.transpose(1, 2)?.reshape((tokens, hidden))?);
        }
        let mixed = if mixed.len() == 1 { mixed.remove(0) } else { Tensor::cat(&mixed, 0)? };
        block.attention_out.forward(&mixed)
    }
}

fn block(a: &Architecture, layer: &Layer, rotation: Option<usize>, vb: &VarBuilder<'_>) -> Result<Block> {
    let h = a.hidden;
    let qkv = match &layer.qkv {
        Qkv::Fused(name) => linear(h, 3 * h, a.attention_bias, vb.pp(name))?,
        Qkv::Separate(names) => {
            let parts = names
                .iter()
                .map(|name| linear(h, h, a.attention_bias, vb.pp(name)))
                .collect::<Result<Vec<_>>>()?;
            let weight = Tensor::cat(&parts.iter().map(|p| &p.weight).collect::<Vec<_>>(), 1)?;
            let biases: Vec<&Tensor> = parts.iter().filter_map(|p| p.bias.as_ref()).collect();
            Linear { weight, bias: if biases.is_empty() { None } else { Some(Tensor::cat(&biases, 0)?) } }
        }
    };
    let up = match a.feed_forward {
        FeedForward::Plain(_) => a.intermediate,
        FeedForward::Gated(_) => 2 * a.intermediate,
    };
    Ok(Block {
        qkv,
        attention_out: linear(h, h, a.attention_bias, vb.pp(&layer.attention_out))?,
        attention_norm: match &layer.attention_norm {
            Some(name) => Some(norm(h, a.norm_bias, a.norm_eps, vb.pp(name))?),
            None => None,
        },
        up: linear(h, up, a.mlp_bias, vb.pp(&layer.up))?,
        down: linear(a.intermediate, h, a.mlp_bias, vb.pp(&layer.down))?,
        mlp_norm: norm(h, a.norm_bias, a.norm_eps, vb.pp(&layer.mlp_norm))?,
        rotation,
        reach: layer.reach,
    })
}

/// RoPE's angles: position times theta^(-2i/width).
fn rotation(theta: f64, count: usize, width: usize, dtype: DType, device: &Device) -> Result<Rotation> {
    let frequencies: Vec<f32> =
        (0..width).step_by(2).map(|i| 1.0 / (theta as f32).powf(i as f32 / width as f32)).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, width / 2), device)?;
    let positions = Tensor::arange(0u32, count as u32, device)?.to_dtype(DType::F32)?.reshape((count, 1))?;
    let angles = positions.matmul(&frequencies)?;
    Ok(Rotation { theta, cos: angles.cos()?.to_dtype(dtype)?, sin: angles.sin()?.to_dtype(dtype)? })
}

/// `[length, length]`: 0 where two positions are at most `reach` apart, else -inf.
fn band(length: usize, reach: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..length * length)
        .map(|at| if (at / length).abs_diff(at % length) <= reach { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(mask, (length, length), device)?.to_dtype(dtype)
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
            packed.runs,
            [Run { start: 0, sequences: 2, length: 1 }, Run { start: 2, sequences: 2, length: 3 }]
        );
    }
}
