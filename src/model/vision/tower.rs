//! A transformer over the patches of images. Patches become tokens by one matrix multiplication; the layers are the packed
//! trunk of the text models, so that all its precisions and devices come with it.

use std::sync::Mutex;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::{Out, Pool, Tower as Spec};
use super::model::Image;
use super::positions;
use super::preprocess::Preprocess;
use crate::model::kernels::{
    Activation, Epilogue, Linear, Norm, NormKind, Packed, Precision, Slot, Transfer, Workspace,
};
use crate::model::text::architecture::FeedForward;
use crate::model::text::trunk::Trunk;

pub struct Tower {
    device: Device,
    dtype: DType,
    hidden: usize,
    patch: usize,
    /// Rows and columns of patches.
    grid: (usize, usize),
    /// Tokens before the patches.
    before: usize,
    /// From a patch, `[3 × patch × patch]`, to its token. The bias is in `table`.
    projection: Linear,
    /// What is added to the tokens of an image, `[tokens, hidden]`: positions and, before the patches, the tokens
    /// themselves, which have an empty patch.
    table: Tensor,
    norm_before: Option<Norm>,
    trunk: Trunk,
    pool: Pool,
    attention: Option<AttentionPool>,
    /// Of the pooled vector.
    norm_after: Option<Norm>,
    out: Option<Linear>,
    /// Values of the answer.
    pub width: usize,
    /// Idle workspaces; there are as many in all as forward passes have run at the same time.
    workspaces: Mutex<Vec<Workspace>>,
}

impl Tower {
    /// `precision` is that of the matrix weights on a CPU, if not f32.
    pub fn load(
        spec: &Spec,
        preprocess: &Preprocess,
        vb: &VarBuilder<'_>,
        precision: Option<Precision>,
    ) -> Result<Self> {
        let (hidden, patch) = (spec.hidden, spec.patch);
        let grid = (preprocess.height / patch, preprocess.width / patch);
        if grid.0 * grid.1 == 0 {
            candle_core::bail!(
                "images of {} × {} pixels are smaller than a patch of {patch}",
                preprocess.height,
                preprocess.width
            );
        }
        if spec.relative_bias.is_some() && grid.0 != grid.1 {
            candle_core::bail!(
                "{} × {} patches are no square, which the biases of distances need",
                grid.0,
                grid.1
            );
        }
        let inputs = 3 * patch * patch;
        let projection = vb.pp(&spec.projection);
        let weight = projection.get((hidden, 3, patch, patch), "weight")?.reshape((hidden, inputs))?;
        let (before, table) = table(spec, grid, vb)?;
        let tokens = before + grid.0 * grid.1;
        let table = Tensor::from_vec(table, (tokens, hidden), &Device::Cpu)?;
        let norm =
            |name: &String| Norm::load(hidden, NormKind::Layer { bias: true }, spec.norm_eps, vb.pp(name));
        let attention = match &spec.pool {
            Pool::Attention(name) => Some(AttentionPool::load(spec, &vb.pp(name), precision)?),
            _ => None,
        };
        let pooled = match spec.pool {
            Pool::First(count) => count * hidden,
            Pool::FirstAndMean => 2 * hidden,
            Pool::Mean | Pool::Attention(_) => hidden,
        };
        let out = spec.out.as_ref().map(|out| output_layer(out, pooled, vb)).transpose()?;
        Ok(Self {
            device: vb.device().clone(),
            dtype: vb.dtype(),
            hidden,
            patch,
            grid,
            before,
            projection: Linear::new(&weight, None, None)?,
            table: table.to_device(vb.device())?.to_dtype(vb.dtype())?,
            norm_before: spec.norm_before.as_ref().map(norm).transpose()?,
            trunk: Trunk::load(&spec.blocks(tokens), vb, precision, None)?,
            pool: spec.pool.clone(),
            attention,
            norm_after: spec.norm_after.as_ref().map(norm).transpose()?,
            width: spec.out.as_ref().map_or(pooled, |out| out.outputs),
            out,
            workspaces: Mutex::default(),
        })
    }

    /// Tokens of an image.
    pub fn tokens(&self) -> usize {
        self.before + self.grid.0 * self.grid.1
    }

    /// Starts to copy the answers to the host: `width` values of each image.
    pub fn forward(&self, images: &[&Image], preprocess: &Preprocess) -> Result<Transfer> {
        let ids = vec![0; self.tokens()];
        let batch: Vec<(&[u32], Option<&[u32]>)> = images.iter().map(|_| (&ids[..], None)).collect();
        let batch = Packed::new(&batch);
        let kept = || self.workspaces.lock().unwrap_or_else(|e| e.into_inner());
        let workspace = kept().pop().unwrap_or_default();
        let result = self
            .embed(images, preprocess, &workspace)
            .and_then(|x| self.trunk.forward(x, &batch, &workspace))
            .and_then(|x| self.pooled(&x, images.len(), &workspace))
            .and_then(|x| Transfer::start(&x));
        kept().push(workspace);
        result
    }

    fn embed(&self, images: &[&Image], preprocess: &Preprocess, workspace: &Workspace) -> Result<Tensor> {
        let inputs = 3 * self.patch * self.patch;
        let each = self.tokens() * inputs;
        let mut patches = vec![0.0; images.len() * each];
        for (image, out) in images.iter().zip(patches.chunks_mut(each)) {
            self.patches(&image.pixels, preprocess, &mut out[self.before * inputs..]);
        }
        let patches = Tensor::from_vec(patches, (images.len() * self.tokens(), inputs), &Device::Cpu)?
            .to_device(&self.device)?
            .to_dtype(self.dtype)?;
        let table = match images.len() {
            1 => self.table.clone(),
            count => self.table.repeat((count, 1))?,
        };
        let out = |slot| workspace.at(slot, &self.device);
        match &self.norm_before {
            None => self.projection.forward(&patches, Epilogue::Add(&table), out(Slot::Stream)),
            Some(norm) => {
                let x = self.projection.forward(&patches, Epilogue::Add(&table), out(Slot::Attended))?;
                norm.forward(&x, out(Slot::Stream))
            }
        }
    }

    /// Patch after patch: channel, row, column. Pixels beyond the last whole patch are left out.
    fn patches(&self, pixels: &[u8], preprocess: &Preprocess, out: &mut [f32]) {
        let (side, width) = (self.patch, preprocess.width);
        for (at, patch) in out.chunks_mut(3 * side * side).enumerate() {
            let (top, left) = (at / self.grid.1 * side, at % self.grid.1 * side);
            for (channel, plane) in patch.chunks_mut(side * side).enumerate() {
                let values = preprocess.values(channel);
                for (y, row) in plane.chunks_mut(side).enumerate() {
                    let from = &pixels[((top + y) * width + left) * 3..][..side * 3];
                    for (value, pixel) in row.iter_mut().zip(from.as_chunks::<3>().0) {
                        *value = values[usize::from(pixel[channel])];
                    }
                }
            }
        }
    }

    /// `[images, width]` in f32.
    fn pooled(&self, x: &Tensor, images: usize, workspace: &Workspace) -> Result<Tensor> {
        let each = x.reshape((images, self.tokens(), self.hidden))?;
        let first = |count| each.narrow(1, 0, count)?.contiguous()?.reshape((images, count * self.hidden));
        let mean = || {
            let patches = each.narrow(1, self.before, self.tokens() - self.before)?;
            patches.to_dtype(DType::F32)?.mean(1)?.to_dtype(self.dtype)
        };
        let pooled = match (&self.pool, &self.attention) {
            (_, Some(attention)) => attention.forward(x, images, workspace)?,
            (Pool::First(count), _) => first(*count)?,
            (Pool::FirstAndMean, _) => Tensor::cat(&[first(1)?, mean()?], 1)?,
            (Pool::Mean | Pool::Attention(_), None) => mean()?,
        };
        let pooled = match &self.norm_after {
            Some(norm) => norm.forward(&pooled.contiguous()?, workspace.at(Slot::Hidden, &self.device))?,
            None => pooled,
        };
        let rows = match &self.out {
            Some(out) => out.forward(&pooled, Epilogue::Nothing, workspace.at(Slot::Logits, &self.device))?,
            None => pooled,
        };
        rows.to_dtype(DType::F32)
    }
}

/// How many tokens are before the patches, and what is added to all tokens.
fn table(spec: &Spec, grid: (usize, usize), vb: &VarBuilder<'_>) -> Result<(usize, Vec<f32>)> {
    let (hidden, before) = (spec.hidden, spec.tokens.len());
    let host = |name: &str| -> Result<Vec<f32>> {
        vb.get_unchecked(name)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
    };
    let Some(name) = &spec.positions else {
        let mut table = Vec::new();
        for name in &spec.tokens {
            table.extend(host(name)?);
        }
        table.resize((before + grid.0 * grid.1) * hidden, 0.0);
        return with_bias(spec, table, before, &host).map(|table| (before, table));
    };
    let positions = host(name)?;
    let count = (positions.len() / hidden).saturating_sub(before);
    let side = count.isqrt();
    if count == 0 || side * side != count || positions.len() % hidden != 0 {
        candle_core::bail!("{name} is not a table for {before} tokens and a square of patches");
    }
    let (of_tokens, of_patches) = positions.split_at(before * hidden);
    let mut table = of_tokens.to_vec();
    for (row, name) in table.chunks_mut(hidden).zip(&spec.tokens) {
        let token = host(name)?;
        if token.len() != hidden {
            candle_core::bail!("{name} has {} elements, not {hidden}", token.len());
        }
        row.iter_mut().zip(token).for_each(|(row, x)| *row += x);
    }
    table.extend(match grid == (side, side) {
        true => of_patches.to_vec(),
        false => positions::resized(of_patches, side, grid, hidden),
    });
    with_bias(spec, table, before, &host).map(|table| (before, table))
}

/// Adds the bias of the patches' projection to a table, after the rows of the tokens before the patches.
fn with_bias(
    spec: &Spec,
    mut table: Vec<f32>,
    before: usize,
    host: &impl Fn(&str) -> Result<Vec<f32>>,
) -> Result<Vec<f32>> {
    if spec.projection_bias {
        let bias = host(&format!("{}.bias", spec.projection))?;
        for row in table[before * spec.hidden..].chunks_mut(spec.hidden) {
            row.iter_mut().zip(&bias).for_each(|(row, x)| *row += x);
        }
    }
    Ok(table)
}

/// The linear layer after the pooling, in f32 on a CPU: it is small.
pub(super) fn output_layer(out: &Out, inputs: usize, vb: &VarBuilder<'_>) -> Result<Linear> {
    let count = out.names.len();
    let each = inputs / count;
    let weights = out.names.iter().map(|name| vb.pp(name).get((out.outputs, each), "weight"));
    let weight = (Tensor::cat(&weights.collect::<Result<Vec<_>>>()?, 1)? / count as f64)?;
    let bias = match out.bias {
        true => {
            let biases = out.names.iter().map(|name| vb.pp(name).get(out.outputs, "bias"));
            let sum = biases.reduce(|a, b| a? + b?).transpose()?;
            sum.map(|sum| sum / count as f64).transpose()?
        }
        false => None,
    };
    Linear::new(&weight, bias, None)
}

/// SigLIP's head: attention of one learned query over the tokens of an image, then a feed-forward block.
struct AttentionPool {
    heads: usize,
    /// The query, scaled, `[1, heads, width of a head]`, in f32.
    query: Tensor,
    keys_values: Linear,
    out: Linear,
    norm: Norm,
    up: Linear,
    activation: Activation,
    down: Linear,
}

impl AttentionPool {
    fn load(spec: &Spec, vb: &VarBuilder<'_>, precision: Option<Precision>) -> Result<Self> {
        let (hidden, heads) = (spec.hidden, spec.heads.queries);
        let FeedForward::Plain(activation) = spec.feed_forward else {
            candle_core::bail!("a gated feed-forward block in the head is not supported");
        };
        let attention = vb.pp("attention");
        let weight = attention.get((3 * hidden, hidden), "in_proj_weight")?;
        let bias = attention.get(3 * hidden, "in_proj_bias")?;
        let probe = vb.get((1, 1, hidden), "probe")?.reshape((1, hidden))?.to_dtype(DType::F32)?;
        let of_query = weight.narrow(0, 0, hidden)?.to_dtype(DType::F32)?.t()?.contiguous()?;
        let query =
            (probe.matmul(&of_query)? + bias.narrow(0, 0, hidden)?.to_dtype(DType::F32)?.unsqueeze(0)?)?;
        let rest = (
            weight.narrow(0, hidden, 2 * hidden)?.contiguous()?,
            bias.narrow(0, hidden, 2 * hidden)?.contiguous()?,
        );
        let inner = spec.intermediate;
        Ok(Self {
            heads,
            query: (query * spec.heads.scale)?.reshape((1, heads, hidden / heads))?,
            keys_values: Linear::new(&rest.0, Some(rest.1), precision)?,
            out: Linear::load(hidden, hidden, true, None, &[attention.pp("out_proj")])?,
            norm: Norm::load(hidden, NormKind::Layer { bias: true }, spec.norm_eps, vb.pp("layernorm"))?,
            up: Linear::load(hidden, inner, true, None, &[vb.pp("mlp.fc1")])?,
            activation,
            down: Linear::load(inner, hidden, true, None, &[vb.pp("mlp.fc2")])?,
        })
    }

    /// `[images × tokens, hidden]` to `[images, hidden]`.
    fn forward(&self, x: &Tensor, images: usize, workspace: &Workspace) -> Result<Tensor> {
        let out = |slot| workspace.at(slot, x.device());
        let (rows, hidden) = x.dims2()?;
        let both = self.keys_values.forward(x, Epilogue::Nothing, out(Slot::Wide))?.to_dtype(DType::F32)?;
        // By 0: keys; by 1: values.
        let part = |at: usize| {
            let part = both.narrow(1, at * hidden, hidden)?.contiguous()?;
            part.reshape((images, rows / images, self.heads, hidden / self.heads))
        };
        let scores = part(0)?.broadcast_mul(&self.query.unsqueeze(0)?)?.sum(D::Minus1)?;
        let weights = candle_nn::ops::softmax(&scores, 1)?;
        let mixed = part(1)?.broadcast_mul(&weights.unsqueeze(3)?)?.sum(1)?;
        let mixed = mixed.reshape((images, hidden))?.to_dtype(x.dtype())?;
        let attended = self.out.forward(&mixed, Epilogue::Nothing, out(Slot::Pooled))?;
        let normed = self.norm.forward(&attended, out(Slot::Hidden))?;
        let inner = self.up.forward(&normed, Epilogue::Activate(self.activation), out(Slot::Gated))?;
        self.down.forward(&inner, Epilogue::Add(&attended), out(Slot::Attended))
    }
}
