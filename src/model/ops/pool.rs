//! From a sequence's tokens to one vector.

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor};

use super::{Out, numbers, numbers_mut};
use crate::model::encoder::Packed;

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
        match out.view(batch.order().len(), x.dim(1)?)? {
            Some(y) => {
                y.inplace_op2(x, &Pool { pooling: self, batch })?;
                Ok(y)
            }
            None => self.tensors(x, batch),
        }
    }

    /// In Candle's own operations.
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
}

struct Pool<'a> {
    pooling: Pooling,
    batch: &'a Packed,
}

impl InplaceOp2 for Pool<'_> {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        let hidden = layout.dims()[1];
        let mut x = numbers(x, x_layout)?;
        let out = numbers_mut(out, layout)?;
        for (out, length) in out.chunks_mut(hidden).zip(self.batch.lengths()) {
            let tokens;
            (tokens, x) = x.split_at(length * hidden);
            match self.pooling {
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
        Ok(())
    }
}
