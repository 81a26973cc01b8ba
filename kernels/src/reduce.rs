//! Reduces the logits of a sequence's tokens to one row, a block of tokens at a time: the largest logit of each column, or
//! the sum of the activated ones (SPLADE: arXiv:2109.10086, section 3.1, and arXiv:2107.05720, section 3.2).

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use pulp::{Simd, WithSimd};

use super::simd::dispatch;
use super::{Fused, Out, Packed};

/// How the logits of a sequence's tokens become one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// The largest. [`Saturation`] is for the caller to apply: it is monotonic, so the largest stays the largest.
    Max,
    /// The sum after [`Saturation`].
    Sum(Saturation),
}

/// What SPLADE does to a logit x: log(1 + max(0, x)), and that once more if `twice` (arXiv:2504.14839).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saturation {
    pub twice: bool,
}

impl Saturation {
    /// NaN stays NaN.
    pub fn of(self, x: f32) -> f32 {
        // f32::max would drop NaN.
        let once = if x < 0.0 { 0.0 } else { x.ln_1p() };
        if self.twice { once.ln_1p() } else { once }
    }

    /// By Candle's own operations, in f32.
    fn tensor(self, x: &Tensor) -> Result<Tensor> {
        let once = (x.to_dtype(DType::F32)?.relu()? + 1.0)?.log()?;
        if self.twice { (once + 1.0)?.log() } else { Ok(once) }
    }
}

/// Tokens whose logits are computed together, at most.
const ON_CPU: usize = 264;
const ON_DEVICE: usize = 2048;

impl Reduction {
    /// One row per sequence, `[sequences, columns]` in f32, in the order of the token axis. `logits` gives those of a range
    /// of the token axis, `[tokens, columns]`, on `device`. [`Reduction::Max`] may give 0 instead of a negative number.
    pub fn rows(
        self,
        batch: &Packed,
        columns: usize,
        device: &Device,
        out: Out<'_>,
        mut logits: impl FnMut(Range<usize>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Some(rows) = out.view(batch.order().len(), columns)? else {
            return match device {
                #[cfg(feature = "cuda")]
                Device::Cuda(_) => self.by_kernel(batch, columns, device, logits),
                _ => self.on_device(batch, ON_DEVICE, logits),
            };
        };
        let ends: Vec<usize> = ends(batch);
        for start in (0..batch.tokens()).step_by(ON_CPU) {
            let tokens = start..(start + ON_CPU).min(batch.tokens());
            let block = |rows: &mut [f32], logits: &[f32]| {
                if start == 0 {
                    rows.fill(0.0);
                }
                dispatch(Block {
                    reduction: self,
                    rows,
                    logits,
                    columns,
                    tokens: tokens.clone(),
                    ends: &ends,
                });
            };
            rows.inplace_op2(&logits(tokens.clone())?, &Fused("reduce", block))?;
        }
        Ok(rows)
    }

    /// By the CUDA kernel, which takes the tokens of several sequences of any lengths at a time.
    #[cfg(feature = "cuda")]
    fn by_kernel(
        self,
        batch: &Packed,
        columns: usize,
        device: &Device,
        mut logits: impl FnMut(Range<usize>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let rows = Tensor::zeros((batch.order().len(), columns), DType::F32, device)?;
        for start in (0..batch.tokens()).step_by(ON_DEVICE) {
            let tokens = start..(start + ON_DEVICE).min(batch.tokens());
            super::cuda::reduce(&rows, self, &logits(tokens.clone())?, tokens, batch)?;
        }
        Ok(rows)
    }

    /// By Candle's own operations: as many sequences of equal length at a time as have at most `most` tokens, or so many
    /// tokens of one.
    pub(super) fn on_device(
        self,
        batch: &Packed,
        most: usize,
        mut logits: impl FnMut(Range<usize>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut rows = Vec::new();
        for run in batch.runs() {
            let together = (most / run.length).clamp(1, run.sequences);
            for first in (0..run.sequences).step_by(together) {
                let count = together.min(run.sequences - first);
                let (start, mut row) = (run.start + first * run.length, None);
                // If a sequence is cut, it is the only one of its block.
                for at in (0..run.length).step_by(most.min(run.length)) {
                    let length = most.min(run.length - at);
                    let x = logits(start + at..start + at + count * length)?;
                    let x = x.reshape((count, length, ()))?;
                    let part = match self {
                        Self::Max => x.max(1)?.to_dtype(DType::F32)?,
                        Self::Sum(saturation) => saturation.tensor(&x)?.sum(1)?,
                    };
                    row = Some(match (row, self) {
                        (None, _) => part,
                        (Some(row), Self::Max) => part.maximum(&row)?,
                        (Some(row), Self::Sum(_)) => (part + row)?,
                    });
                }
                rows.extend(row);
            }
        }
        Tensor::cat(&rows, 0)
    }
}

/// Where each sequence ends on the token axis.
fn ends(batch: &Packed) -> Vec<usize> {
    let mut end = 0;
    let after = |length| {
        end += length;
        end
    };
    batch.lengths().map(after).collect()
}

struct Block<'a> {
    reduction: Reduction,
    /// `[sequences, columns]`.
    rows: &'a mut [f32],
    /// `[tokens, columns]`.
    logits: &'a [f32],
    columns: usize,
    tokens: Range<usize>,
    ends: &'a [usize],
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { reduction, rows, logits, columns, tokens, ends } = self;
        let mut place = ends.partition_point(|&end| end <= tokens.start);
        for (token, logits) in tokens.zip(logits.chunks(columns)) {
            // No sequence is empty.
            place += usize::from(token >= ends[place]);
            let row = &mut rows[place * columns..][..columns];
            match reduction {
                Reduction::Max => maximum(simd, row, logits),
                Reduction::Sum(saturation) => {
                    for (sum, &x) in row.iter_mut().zip(logits) {
                        if x > 0.0 || x.is_nan() {
                            *sum += saturation.of(x);
                        }
                    }
                }
            }
        }
    }
}

/// The larger of each two elements, to `row`; NaN if one of them is.
#[inline(always)]
fn maximum<S: Simd>(simd: S, row: &mut [f32], other: &[f32]) {
    let (vectors, rest) = S::as_mut_simd_f32s(row);
    let (others, others_rest) = S::as_simd_f32s(other);
    for (max, &x) in vectors.iter_mut().zip(others) {
        let larger = simd.select_f32s(simd.less_than_f32s(*max, x), x, *max);
        // NaN alone differs from itself.
        *max = simd.select_f32s(simd.equal_f32s(x, x), larger, x);
    }
    for (max, &x) in rest.iter_mut().zip(others_rest) {
        *max = if x > *max || x.is_nan() { x } else { *max };
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::random;
    use super::super::{Slot, Workspace};
    use super::*;

    /// Sequences that end within, at the end of and beyond a block.
    #[test]
    fn the_fused_form_equals_that_of_tensors() {
        let lengths = [3usize, 1, 40, 3, 260, 263, 600];
        let ids: Vec<Vec<u32>> = lengths.iter().map(|&length| vec![0; length]).collect();
        let batch: Vec<(&[u32], Option<&[u32]>)> = ids.iter().map(|ids| (&ids[..], None)).collect();
        let batch = Packed::new(&batch);
        let columns = 37;
        let values = random(batch.tokens() * columns, 3);
        let x = Tensor::from_vec(values, (batch.tokens(), columns), &Device::Cpu).unwrap();
        let logits = |tokens: Range<usize>| x.narrow(0, tokens.start, tokens.len());
        let of = |twice| Reduction::Sum(Saturation { twice });
        for reduction in [Reduction::Max, of(false), of(true)] {
            let workspace = Workspace::default();
            let fused = reduction
                .rows(&batch, columns, x.device(), workspace.at(Slot::Pooled, x.device()), logits)
                .unwrap();
            for most in [7, 50, 2048] {
                let want = reduction.on_device(&batch, most, logits).unwrap();
                let error = (&fused - want.relu().unwrap()).unwrap().abs().unwrap().max_all().unwrap();
                let error = error.to_scalar::<f32>().unwrap();
                assert!(error < 1e-4, "{reduction:?}, {most}: {error}");
            }
        }
    }

    #[test]
    fn nan_stays_nan() {
        let columns = 35;
        let mut x = random(4 * columns, 5);
        x[columns + 1] = f32::NAN;
        x[2 * columns + 34] = f32::NAN;
        let x = Tensor::from_vec(x, (4, columns), &Device::Cpu).unwrap();
        let ids = [0; 4];
        let batch = Packed::new(&[(&ids[..], None)]);
        for reduction in [Reduction::Max, Reduction::Sum(Saturation { twice: false })] {
            let workspace = Workspace::default();
            let out = workspace.at(Slot::Pooled, x.device());
            let rows = reduction.rows(&batch, columns, x.device(), out, |_| Ok(x.clone())).unwrap();
            let rows: Vec<f32> = rows.flatten_all().unwrap().to_vec1().unwrap();
            let found: Vec<usize> = (0..columns).filter(|&at| rows[at].is_nan()).collect();
            assert_eq!(found, [1, 34], "{reduction:?}");
        }
    }
}
