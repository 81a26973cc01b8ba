//! Pooling: reduces a sequence's tokens to one vector.

use candle_core::{DType, Result, Tensor};

use super::{Fused, Out, Packed};

/// How a sequence's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    Mean,
    First,
    Last,
    /// The largest value of each element.
    Max,
    /// The sum over the square root of the number of tokens.
    MeanSqrtLen,
    /// A mean in which a token's weight is its position, from 1.
    WeightedMean,
}

impl Pooling {
    #[cfg(test)]
    pub const ALL: [Self; 6] =
        [Self::Mean, Self::First, Self::Last, Self::Max, Self::MeanSqrtLen, Self::WeightedMean];

    /// `[tokens, hidden]` to `[sequences, hidden]`.
    pub fn forward(self, x: &Tensor, batch: &Packed, out: Out<'_>) -> Result<Tensor> {
        let hidden = x.dim(1)?;
        match out.view(batch.order().len(), hidden)? {
            Some(y) => {
                let pool = |out: &mut [f32], x: &[f32]| self.rows(out, x, hidden, batch);
                y.inplace_op2(x, &Fused("pool", pool))?;
                Ok(y)
            }
            #[cfg(feature = "cuda")]
            None if x.device().is_cuda() => super::cuda::pool(x, batch, self),
            None => self.tensors(x, batch),
        }
    }

    /// The unfused form, by Candle's own operations.
    pub(super) fn tensors(self, x: &Tensor, batch: &Packed) -> Result<Tensor> {
        if !matches!(self, Pooling::First | Pooling::Last) {
            let hidden = x.dim(1)?;
            let pooled = batch.runs().map(|run| {
                let tokens = x
                    .narrow(0, run.start, run.sequences * run.length)?
                    .reshape((run.sequences, run.length, hidden))?
                    .to_dtype(DType::F32)?;
                let pooled = match self {
                    Pooling::Max => tokens.max(1)?,
                    Pooling::MeanSqrtLen => (tokens.sum(1)? / (run.length as f64).sqrt())?,
                    Pooling::WeightedMean => {
                        let weights = Tensor::arange(1u32, run.length as u32 + 1, x.device())?
                            .to_dtype(DType::F32)?
                            .reshape((1, run.length, 1))?;
                        (tokens.broadcast_mul(&weights)?.sum(1)? / sum_of_positions(run.length))?
                    }
                    Pooling::Mean | Pooling::First | Pooling::Last => tokens.mean(1)?,
                };
                pooled.to_dtype(x.dtype())
            });
            return Tensor::cat(&pooled.collect::<Result<Vec<_>>>()?, 0);
        }
        let mut start = 0;
        let mut rows = Vec::with_capacity(batch.order().len());
        for length in batch.lengths() {
            rows.push((if self == Pooling::First { start } else { start + length - 1 }) as u32);
            start += length;
        }
        let count = rows.len();
        x.index_select(&Tensor::from_vec(rows, count, x.device())?, 0)
    }

    fn rows(self, out: &mut [f32], mut x: &[f32], hidden: usize, batch: &Packed) {
        for (out, length) in out.chunks_mut(hidden).zip(batch.lengths()) {
            let tokens;
            (tokens, x) = x.split_at(length * hidden);
            match self {
                Pooling::First => out.copy_from_slice(&tokens[..hidden]),
                Pooling::Last => out.copy_from_slice(&tokens[(length - 1) * hidden..]),
                Pooling::Mean => sum(out, tokens, |_| 1.0, length as f32),
                Pooling::MeanSqrtLen => sum(out, tokens, |_| 1.0, (length as f32).sqrt()),
                Pooling::WeightedMean => {
                    sum(out, tokens, |at| (at + 1) as f32, sum_of_positions(length) as f32);
                }
                Pooling::Max => {
                    out.copy_from_slice(&tokens[..hidden]);
                    for token in tokens.chunks(hidden).skip(1) {
                        for (max, &x) in out.iter_mut().zip(token) {
                            // Keeps NaN, so that an invalid row is detected.
                            *max = if x > *max || x.is_nan() { x } else { *max };
                        }
                    }
                }
            }
        }
    }
}

/// 1 + 2 + … + length.
fn sum_of_positions(length: usize) -> f64 {
    (length * (length + 1) / 2) as f64
}

/// The weighted sum of tokens by their places, over `divisor`.
fn sum(out: &mut [f32], tokens: &[f32], weight: impl Fn(usize) -> f32, divisor: f32) {
    out.fill(0.0);
    for (at, token) in tokens.chunks(out.len()).enumerate() {
        let weight = weight(at);
        for (sum, x) in out.iter_mut().zip(token) {
            *sum += weight * x;
        }
    }
    for sum in out {
        *sum /= divisor;
    }
}
