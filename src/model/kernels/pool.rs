//! Pooling: reduces a sequence's tokens to one vector.

use candle_core::{DType, Result, Tensor};

use super::{Fused, Out, Packed};

/// How a sequence's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    Mean,
    First,
    Last,
}

impl Pooling {
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
        if self == Pooling::Mean {
            let hidden = x.dim(1)?;
            let means = batch.runs().map(|run| {
                x.narrow(0, run.start, run.sequences * run.length)?
                    .reshape((run.sequences, run.length, hidden))?
                    .to_dtype(DType::F32)?
                    .mean(1)?
                    .to_dtype(x.dtype())
            });
            return Tensor::cat(&means.collect::<Result<Vec<_>>>()?, 0);
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
                Pooling::Mean => {
                    out.fill(0.0);
                    for token in tokens.chunks(hidden) {
                        for (sum, x) in out.iter_mut().zip(token) {
                            *sum += x;
                        }
                    }
                    for sum in out {
                        *sum /= length as f32;
                    }
                }
            }
        }
    }
}
