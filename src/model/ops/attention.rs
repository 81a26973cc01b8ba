//! Attention (arXiv:1706.03762) over sequences of any lengths that stand one after the other, without
//! padding: nothing is computed for a position that no sequence has.

use std::cell::RefCell;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_nn::rotary_emb::rope;
use pulp::{Simd, WithSimd};

use super::matmul::{Left, Start, Target, strip};
use super::simd::{dispatch, exp};
use super::{Fused, Out, host};
use crate::model::encoder::Packed;

/// How the tokens of a layer see each other.
pub struct Attention {
    pub heads: usize,
    /// Numbers of a head.
    pub width: usize,
    /// Tokens see others at most this far away.
    pub reach: Option<usize>,
}

/// RoPE's cosines and sines (arXiv:2104.09864), `[positions, width / 2]` each: of position times
/// theta^(-2i/width).
pub struct Rotation {
    pub theta: f64,
    cos: Tensor,
    sin: Tensor,
    /// Both where they are on the CPU.
    host: Option<(Vec<f32>, Vec<f32>)>,
}

impl Rotation {
    pub fn new(theta: f64, positions: usize, width: usize, dtype: DType, device: &Device) -> Result<Self> {
        let frequency = |i| 1.0 / (theta as f32).powf(i as f32 / width as f32);
        let frequencies: Vec<f32> = (0..width).step_by(2).map(frequency).collect();
        let frequencies = Tensor::from_vec(frequencies, (1, width / 2), device)?;
        let column = Tensor::arange(0u32, positions as u32, device)?.to_dtype(DType::F32)?;
        let angles = column.reshape((positions, 1))?.matmul(&frequencies)?;
        let (cos, sin) = (angles.cos()?.to_dtype(dtype)?, angles.sin()?.to_dtype(dtype)?);
        let host = if device.is_cpu() { Some((host(&cos)?, host(&sin)?)) } else { None };
        Ok(Self { theta, cos, sin, host })
    }
}

impl Attention {
    /// `[tokens, 3 × hidden]`, each row a query, a key and a value of all heads, to `[tokens, hidden]`.
    pub fn forward(
        &self,
        qkv: &Tensor,
        rotation: Option<&Rotation>,
        batch: &Packed,
        out: Out<'_>,
    ) -> Result<Tensor> {
        match out.view(batch.tokens(), self.heads * self.width)? {
            Some(y) => {
                let run = |out: &mut [f32], qkv: &[f32]| {
                    ROOM.with_borrow_mut(|room| {
                        dispatch(Run { attention: self, rotation, batch, qkv, out, room });
                    });
                };
                y.inplace_op2(qkv, &Fused("attention", run))?;
                Ok(y)
            }
            None => self.tensors(qkv, rotation, batch),
        }
    }

    /// In Candle's own operations, a run of sequences of the same length at a time.
    pub(super) fn tensors(
        &self,
        qkv: &Tensor,
        rotation: Option<&Rotation>,
        batch: &Packed,
    ) -> Result<Tensor> {
        let (heads, width) = (self.heads, self.width);
        let hidden = heads * width;
        let scale = 1.0 / (width as f64).sqrt();
        let mut mixed = Vec::new();
        for run in batch.runs() {
            let tokens = run.sequences * run.length;
            let part = |index: usize| {
                qkv.narrow(0, run.start, tokens)?
                    .narrow(1, index * hidden, hidden)?
                    .reshape((run.sequences, run.length, heads, width))?
                    .transpose(1, 2)?
                    .contiguous()
            };
            let (mut q, mut k, v) = (part(0)?, part(1)?, part(2)?);
            if let Some(rotation) = rotation {
                let cos = rotation.cos.narrow(0, 0, run.length)?;
                let sin = rotation.sin.narrow(0, 0, run.length)?;
                q = rope(&q, &cos, &sin)?;
                k = rope(&k, &cos, &sin)?;
            }
            let mut scores = (q.matmul(&k.t()?)? * scale)?;
            if let Some(reach) = self.reach.filter(|&reach| run.length > reach + 1) {
                scores = scores.broadcast_add(&band(run.length, reach, scores.dtype(), qkv.device())?)?;
            }
            let out = softmax_last_dim(&scores)?.matmul(&v)?;
            mixed.push(out.transpose(1, 2)?.reshape((tokens, hidden))?);
        }
        if mixed.len() == 1 { Ok(mixed.remove(0)) } else { Tensor::cat(&mixed, 0) }
    }
}

/// `[length, length]`: 0 where two positions are at most `reach` apart, else -inf.
fn band(length: usize, reach: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..length * length)
        .map(|at| if (at / length).abs_diff(at % length) <= reach { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(mask, (length, length), device)?.to_dtype(dtype)
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

/// Queries that are worked on at a time: a multiple of every height of a tile.
const QUERIES: usize = 24;

/// One head of one sequence.
#[derive(Default)]
struct Room {
    /// Scaled and rotated, `[QUERIES, width]`.
    queries: Vec<f32>,
    /// Rotated and transposed: panels of keys, a row for each number of the head.
    keys: Vec<f32>,
    /// Panels of the head's numbers, a row for each key.
    values: Vec<f32>,
    /// `[QUERIES, keys up to whole vectors]`.
    scores: Vec<f32>,
    /// One over the sum of a query's weights.
    factors: Vec<f32>,
}

struct Run<'a> {
    attention: &'a Attention,
    rotation: Option<&'a Rotation>,
    batch: &'a Packed,
    qkv: &'a [f32],
    out: &'a mut [f32],
    room: &'a mut Room,
}

impl WithSimd for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { attention, rotation, batch, qkv, out, room } = self;
        let Attention { heads, width, reach } = *attention;
        let rotation = rotation.map(|rotation| {
            let (cos, sin) = rotation.host.as_ref().expect("the tables are on the CPU");
            (&cos[..], &sin[..])
        });
        let hidden = heads * width;
        let mut start = 0;
        for length in batch.lengths() {
            let qkv = &qkv[start * 3 * hidden..][..length * 3 * hidden];
            let out = &mut out[start * hidden..][..length * hidden];
            for head in 0..heads {
                let sequence = Sequence { qkv, hidden, at: head * width, width, length, rotation };
                sequence.head(simd, reach.unwrap_or(length), &mut out[head * width..], room);
            }
            start += length;
        }
    }
}

/// One head of a sequence.
#[derive(Clone, Copy)]
struct Sequence<'a> {
    /// `[length, 3 × hidden]`.
    qkv: &'a [f32],
    hidden: usize,
    /// The head's first number in a query, a key or a value.
    at: usize,
    width: usize,
    length: usize,
    rotation: Option<(&'a [f32], &'a [f32])>,
}

/// The columns of a panel that begins `left` columns before the end: two vectors, or one.
fn columns<S: Simd>(left: usize) -> usize {
    if left > S::F32_LANES { 2 * S::F32_LANES } else { S::F32_LANES }
}

/// As [`strip`], for a panel of as many columns as [`columns`] says.
#[inline(always)]
fn panel<S: Simd>(simd: S, columns: usize, left: Left<'_>, right: &[f32], mut target: Target<'_>) {
    if columns == S::F32_LANES {
        strip::<S, 1>(simd, left, right, &mut target);
    } else {
        strip::<S, 2>(simd, left, right, &mut target);
    }
}

impl Sequence<'_> {
    /// The query (0), key (1) or value (2) of a token.
    #[inline(always)]
    fn part(&self, part: usize, token: usize) -> &[f32] {
        &self.qkv[token * 3 * self.hidden + part * self.hidden + self.at..][..self.width]
    }

    /// Number `i` of a query or key, rotated by its position.
    #[inline(always)]
    fn rotated(&self, x: &[f32], token: usize, i: usize) -> f32 {
        let Some((cos, sin)) = self.rotation else { return x[i] };
        let half = self.width / 2;
        let at = token * half + i % half;
        match i < half {
            true => x[i] * cos[at] - x[i + half] * sin[at],
            false => x[i] * cos[at] + x[i - half] * sin[at],
        }
    }

    /// Writes `[length, width]`, rows `hidden` apart.
    #[inline(always)]
    fn head<S: Simd>(&self, simd: S, reach: usize, out: &mut [f32], room: &mut Room) {
        let Self { hidden, width, length, .. } = *self;
        self.pack_keys::<S>(&mut room.keys);
        self.pack_values::<S>(&mut room.values);
        let scale = 1.0 / (width as f32).sqrt();
        let two = 2 * S::F32_LANES;
        for first in (0..length).step_by(QUERIES) {
            let rows = QUERIES.min(length - first);
            room.queries.clear();
            for token in first..first + rows {
                let query = self.part(0, token);
                room.queries.extend((0..width).map(|i| self.rotated(query, token, i) * scale));
            }
            // The keys that any of these queries sees, from the beginning of a panel.
            let (from, to) = (first.saturating_sub(reach), (first + rows).saturating_add(reach).min(length));
            let base = from / two * two;
            let stride = (to - base).next_multiple_of(S::F32_LANES);
            room.scores.resize(QUERIES * (length + two), 0.0);
            for key in (base..to).step_by(two) {
                let columns = columns::<S>(length - key);
                // What the last panel has beyond the last key that is seen is not written.
                let written = columns.min(stride - (key - base));
                let left = Left { x: &room.queries, stride: width, rows, depth: width };
                let out = &mut room.scores[key - base..];
                let target = Target { out, stride, width: written, start: Start::Zero, factors: None };
                panel(simd, columns, left, &room.keys[key * width..], target);
            }
            room.factors.clear();
            for (row, scores) in room.scores.chunks_mut(stride).take(rows).enumerate() {
                let token = first + row;
                scores[to - base..].fill(f32::NEG_INFINITY);
                scores[..token.saturating_sub(reach).saturating_sub(base)].fill(f32::NEG_INFINITY);
                let last = token.saturating_add(reach).saturating_add(1).min(to) - base;
                scores[last..].fill(f32::NEG_INFINITY);
                room.factors.push(1.0 / softmax(simd, scores));
            }
            for column in (0..width).step_by(two) {
                let columns = columns::<S>(width - column);
                let left = Left { x: &room.scores[from - base..], stride, rows, depth: to - from };
                let target = Target {
                    out: &mut out[first * hidden + column..],
                    stride: hidden,
                    width: columns.min(width - column),
                    start: Start::Zero,
                    factors: Some(&room.factors),
                };
                let values = &room.values[column * length + from * columns..];
                panel(simd, columns, left, values, target);
            }
        }
    }

    #[inline(always)]
    fn pack_keys<S: Simd>(&self, keys: &mut Vec<f32>) {
        let (width, length) = (self.width, self.length);
        keys.clear();
        keys.resize(length.next_multiple_of(2 * S::F32_LANES) * width, 0.0);
        for key in (0..length).step_by(2 * S::F32_LANES) {
            let columns = columns::<S>(length - key);
            let panel = &mut keys[key * width..][..columns * width];
            for column in 0..columns.min(length - key) {
                let x = self.part(1, key + column);
                if self.rotation.is_none() {
                    for (row, &x) in panel.chunks_exact_mut(columns).zip(x) {
                        row[column] = x;
                    }
                } else {
                    for (i, row) in panel.chunks_exact_mut(columns).enumerate() {
                        row[column] = self.rotated(x, key + column, i);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn pack_values<S: Simd>(&self, values: &mut Vec<f32>) {
        let (width, length) = (self.width, self.length);
        values.clear();
        for column in (0..width).step_by(2 * S::F32_LANES) {
            let columns = columns::<S>(width - column);
            for key in 0..length {
                let x = &self.part(2, key)[column..];
                let x = &x[..columns.min(x.len())];
                values.extend_from_slice(x);
                values.resize(values.len() + columns - x.len(), 0.0);
            }
        }
    }
}

/// Replaces scores by e^(score - the greatest) and returns their sum. -inf becomes e^-87, which adds
/// nothing to a sum of 1 and more. The row is whole vectors.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32]) -> f32 {
    let (vectors, _) = S::as_mut_simd_f32s(scores);
    let mut greatest = simd.splat_f32s(f32::NEG_INFINITY);
    for &x in &*vectors {
        greatest = simd.max_f32s(greatest, x);
    }
    let greatest = simd.splat_f32s(simd.reduce_max_f32s(greatest));
    let mut sum = simd.splat_f32s(0.0);
    for x in vectors {
        *x = exp(simd, simd.sub_f32s(*x, greatest));
        sum = simd.add_f32s(sum, *x);
    }
    simd.reduce_sum_f32s(sum)
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::numbers as chance;
    use super::super::{Embedding, Norm, Pooling, Scratch, Slot};
    use super::*;
    use crate::model::Tokens;

    const CPU: Device = Device::Cpu;

    fn batch(lengths: &[usize]) -> Packed {
        let texts: Vec<Tokens> = lengths
            .iter()
            .map(|&n| Tokens {
                ids: (0..n as u32).map(|i| i * 7 % 90).collect(),
                type_ids: (n % 2 == 0).then(|| (0..n as u32).map(|i| i % 2).collect()),
                truncated: false,
            })
            .collect();
        Packed::new(&texts.iter().collect::<Vec<_>>())
    }

    fn tensor(rows: usize, width: usize, seed: u32) -> Tensor {
        Tensor::from_vec(chance(rows * width, seed), (rows, width), &CPU).unwrap()
    }

    fn near(fused: &Tensor, plain: &Tensor) {
        assert_eq!(fused.dims(), plain.dims());
        let worst = (fused - plain).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(worst < 1e-5, "{worst}");
    }

    /// What other devices run is Candle's operations: the same results on the CPU, whatever the widths.
    #[test]
    fn fused_is_what_candles_operations_give() {
        let packed = batch(&[1, 2, 17, 17, 33, 70, 130]);
        let scratch = Scratch::default();
        for (heads, width) in [(1, 8), (3, 16), (2, 20), (2, 64)] {
            let qkv = tensor(packed.tokens(), 3 * heads * width, 5);
            for reach in [None, Some(3), Some(40)] {
                let rotation = Rotation::new(10_000.0, 130, width, DType::F32, &CPU).unwrap();
                for rotation in [None, Some(&rotation)] {
                    let attention = Attention { heads, width, reach };
                    let fused =
                        attention.forward(&qkv, rotation, &packed, scratch.at(Slot::Mixed, &CPU)).unwrap();
                    near(&fused, &attention.tensors(&qkv, rotation, &packed).unwrap());
                }
            }
        }
    }

    #[test]
    fn so_are_embedding_and_pooling() {
        let packed = batch(&[1, 2, 17, 17, 33, 70]);
        let scratch = Scratch::default();
        let vars = candle_nn::VarMap::new();
        let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &CPU);
        let embedding = Embedding {
            word: tensor(100, 20, 1),
            positions: Some((tensor(80, 20, 2), 2)),
            types: Some(tensor(2, 20, 3)),
            norm: Norm::load(20, true, 1e-5, vb).unwrap(),
        };
        let x = embedding.forward(&packed, scratch.at(Slot::Stream, &CPU)).unwrap();
        near(&x, &embedding.tensors(&packed, &CPU).unwrap());
        for pooling in [Pooling::Mean, Pooling::First, Pooling::Last] {
            let fused = pooling.forward(&x, &packed, scratch.at(Slot::Pooled, &CPU)).unwrap();
            near(&fused, &pooling.tensors(&x, &packed).unwrap());
        }
    }
}
