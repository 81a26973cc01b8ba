//! Attention of one query per sequence to the tokens of the sequence, as of a decoder that makes one step.
//!
//! Keys and values of the tokens are never computed. A score is q·(K x) = (Kᵀ q)·x, and a result Σ aᵢ V xᵢ = V (Σ aᵢ xᵢ): with
//! one query, both projections are cheaper on the query's side than on that of the tokens.

use candle_core::{Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use pulp::{Simd, WithSimd};

use super::simd::dispatch;
use super::{Epilogue, Fused, Linear, Packed, Precision, Slot, Workspace};

pub struct CrossAttention {
    /// Of each head: from its query to a query of tokens, and from mixed tokens to its result.
    heads: Vec<[Linear; 2]>,
    /// Elements of a head.
    width: usize,
}

impl CrossAttention {
    /// `keys` and `values` are the weights of the projections, `[heads × width, hidden]`. Scores are not scaled.
    pub fn new(keys: &Tensor, values: &Tensor, heads: usize, precision: Option<Precision>) -> Result<Self> {
        let width = keys.dim(0)? / heads;
        let head = |head: usize| {
            let part = |weight: &Tensor| weight.narrow(0, head * width, width)?.contiguous();
            let to_tokens = Linear::new(&part(keys)?.t()?.contiguous()?, None, precision)?;
            Ok([to_tokens, Linear::new(&part(values)?, None, precision)?])
        };
        Ok(Self { heads: (0..heads).map(head).collect::<Result<_>>()?, width })
    }

    /// From one query per sequence, `[sequences, heads × width]`, and the tokens, `[tokens, hidden]`, to
    /// `[sequences, heads × width]`. Sequences are in the order of the token axis.
    pub fn forward(&self, queries: &Tensor, x: &Tensor, batch: &Packed) -> Result<Tensor> {
        let project = |linear: &Linear, part: Tensor| {
            let workspace = Workspace::default();
            linear.forward(&part.contiguous()?, Epilogue::Nothing, workspace.at(Slot::Pooled, x.device()))
        };
        let of_tokens = (0..).zip(&self.heads).map(|(head, [to_tokens, _])| {
            project(to_tokens, queries.narrow(1, head * self.width, self.width)?)
        });
        let of_tokens = Tensor::stack(&of_tokens.collect::<Result<Vec<_>>>()?, 1)?.contiguous()?;
        let mixed = self.mix(&of_tokens, x, batch)?;
        let results = (0..)
            .zip(&self.heads)
            .map(|(head, [_, to_result])| project(to_result, mixed.narrow(1, head, 1)?.squeeze(1)?));
        Tensor::cat(&results.collect::<Result<Vec<_>>>()?, 1)?.contiguous()
    }

    /// The tokens of each sequence, mixed by the softmax of their scores: from queries of tokens,
    /// `[sequences, heads, hidden]`, to the same shape.
    fn mix(&self, queries: &Tensor, x: &Tensor, batch: &Packed) -> Result<Tensor> {
        if !x.device().is_cpu() {
            return tensors(queries, x, batch);
        }
        let (heads, hidden) = (self.heads.len(), x.dim(1)?);
        let mixed = queries.zeros_like()?;
        let mix = |out: &mut [f32], queries: &[f32], x: &[f32]| {
            dispatch(Mix { out, queries, x, batch, heads, hidden });
        };
        mixed.inplace_op3(queries, x, &Fused("cross attention", mix))?;
        Ok(mixed)
    }
}

/// The unfused form of [`CrossAttention::mix`], by Candle's own operations.
fn tensors(queries: &Tensor, x: &Tensor, batch: &Packed) -> Result<Tensor> {
    let (mut mixed, mut first) = (Vec::new(), 0);
    for run in batch.runs() {
        let tokens = x.narrow(0, run.start, run.sequences * run.length)?;
        let tokens = tokens.reshape((run.sequences, run.length, x.dim(1)?))?;
        let queries = queries.narrow(0, first, run.sequences)?.contiguous()?;
        let mut scores = queries.matmul(&tokens.t()?.contiguous()?)?;
        if let Some(mask) = batch.mask(run, scores.dtype(), x.device())? {
            scores = scores.broadcast_add(&mask.unsqueeze(1)?)?;
        }
        mixed.push(softmax_last_dim(&scores)?.matmul(&tokens)?);
        first += run.sequences;
    }
    Tensor::cat(&mixed, 0)
}

struct Mix<'a> {
    out: &'a mut [f32],
    queries: &'a [f32],
    x: &'a [f32],
    batch: &'a Packed,
    heads: usize,
    hidden: usize,
}

impl WithSimd for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { out, queries, x, batch, heads, hidden } = self;
        let mut weights = Vec::new();
        let mut start = 0;
        let sequences = out.chunks_exact_mut(heads * hidden).zip(queries.chunks_exact(heads * hidden));
        for (length, (out, queries)) in batch.lengths().zip(sequences) {
            let tokens = &x[start * hidden..][..length * hidden];
            let masked = batch.masked().map(|masked| &masked[start..][..length]);
            for (out, query) in out.chunks_exact_mut(hidden).zip(queries.chunks_exact(hidden)) {
                weights.clear();
                for token in tokens.chunks_exact(hidden) {
                    weights.push(dot(simd, query, token));
                }
                for (weight, _) in
                    weights.iter_mut().zip(masked.unwrap_or(&[])).filter(|(_, masked)| **masked)
                {
                    *weight = f32::NEG_INFINITY;
                }
                softmax(&mut weights);
                out.fill(0.0);
                for (&weight, token) in weights.iter().zip(tokens.chunks_exact(hidden)) {
                    add_scaled(simd, out, token, weight);
                }
            }
            start += length;
        }
    }
}

fn softmax(scores: &mut [f32]) {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - most).exp();
        sum += *score;
    }
    scores.iter_mut().for_each(|score| *score /= sum);
}

#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let ((a, a_left), (b, b_left)) = (a.as_chunks::<4>(), b.as_chunks::<4>());
    let mut strands = [simd.splat_f32s(0.0); 4];
    for (a, b) in a.iter().zip(b) {
        for (strand, (&a, &b)) in strands.iter_mut().zip(a.iter().zip(b)) {
            *strand = simd.mul_add_e_f32s(a, b, *strand);
        }
    }
    for (strand, (&a, &b)) in strands.iter_mut().zip(a_left.iter().zip(b_left)) {
        *strand = simd.mul_add_e_f32s(a, b, *strand);
    }
    let [p, q, r, s] = strands;
    let total = simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(p, q), simd.add_f32s(r, s)));
    a_rest.iter().zip(b_rest).fold(total, |sum, (a, b)| sum + a * b)
}

/// Adds `factor` × `x` to `out`.
#[inline(always)]
fn add_scaled<S: Simd>(simd: S, out: &mut [f32], x: &[f32], factor: f32) {
    let ((out, out_rest), (x, x_rest)) = (S::as_mut_simd_f32s(out), S::as_simd_f32s(x));
    let factors = simd.splat_f32s(factor);
    for (out, &x) in out.iter_mut().zip(x) {
        *out = simd.mul_add_e_f32s(x, factors, *out);
    }
    for (out, x) in out_rest.iter_mut().zip(x_rest) {
        *out += x * factor;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::attention::tests::{near, tensor};
    use super::super::matmul::tests::by_each_width;
    use super::*;

    struct Alone<'a>(&'a [f32], &'a [f32], &'a Packed, [usize; 2]);

    impl WithSimd for Alone<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let Self(queries, x, batch, [heads, hidden]) = self;
            let mut out = vec![f32::NAN; queries.len()];
            Mix { out: &mut out, queries, x, batch, heads, hidden }.with_simd(simd);
            out
        }
    }

    fn batch(masked: bool) -> Packed {
        let lengths = [4, 1, 19, 4, 33];
        let masks: Vec<Vec<bool>> = lengths
            .iter()
            .map(|&length| (0..length).map(|token| masked && token % 3 == 1).collect())
            .collect();
        let masks: Vec<&[bool]> = masks.iter().map(Vec::as_slice).collect();
        Packed::of_lengths(&lengths).masking(&masks)
    }

    /// The formula with the keys and values of all tokens.
    #[test]
    fn projecting_the_queries_is_projecting_the_tokens() {
        let (heads, width, hidden) = (3, 20, 37);
        let (keys, values) = (tensor(heads * width, hidden, 1), tensor(heads * width, hidden, 2));
        let cross = CrossAttention::new(&keys, &values, heads, None).unwrap();
        for packed in [batch(false), batch(true)] {
            // So that scores do not become large, whose rounding would be too.
            let (queries, x) =
                (tensor(5, heads * width, 3), (tensor(packed.tokens(), hidden, 4) * 0.2).unwrap());
            let (keys, values) =
                (x.matmul(&keys.t().unwrap()).unwrap(), x.matmul(&values.t().unwrap()).unwrap());
            let (mut want, mut place) = (Vec::new(), 0);
            for run in packed.runs() {
                for sequence in 0..run.sequences {
                    let one = crate::Run { start: run.start + sequence * run.length, sequences: 1, ..run };
                    for head in 0..heads {
                        let part = |x: &Tensor, start, length| {
                            x.narrow(0, start, length)
                                .unwrap()
                                .narrow(1, head * width, width)
                                .unwrap()
                                .contiguous()
                        };
                        let (k, v) =
                            (part(&keys, one.start, one.length), part(&values, one.start, one.length));
                        let query = part(&queries, place, 1).unwrap();
                        let mut scores =
                            query.matmul(&k.unwrap().t().unwrap().contiguous().unwrap()).unwrap();
                        if let Some(mask) = packed.mask(one, scores.dtype(), &Device::Cpu).unwrap() {
                            scores = (scores + mask).unwrap();
                        }
                        want.push(softmax_last_dim(&scores).unwrap().matmul(&v.unwrap()).unwrap());
                    }
                    place += 1;
                }
            }
            let want = Tensor::cat(&want, 0).unwrap().reshape((5, heads * width)).unwrap();
            near(&cross.forward(&queries, &x, &packed).unwrap(), &want);
        }
    }

    #[test]
    fn fused_mixing_matches_candle() {
        for (heads, hidden) in [(2, 16), (3, 37), (8, 130)] {
            for packed in [batch(false), batch(true)] {
                let queries = tensor(5 * heads, hidden, 3).reshape((5, heads, hidden)).unwrap();
                let x = (tensor(packed.tokens(), hidden, 4) * 0.2).unwrap();
                let want = tensors(&queries, &x, &packed).unwrap();
                let (q, x) = (super::super::host(&queries).unwrap(), super::super::host(&x).unwrap());
                for out in by_each_width(|| Alone(&q, &x, &packed, [heads, hidden])) {
                    near(&Tensor::from_vec(out, want.dims(), &Device::Cpu).unwrap(), &want);
                }
            }
        }
    }
}
