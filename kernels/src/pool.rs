//! Pooling: reduces a sequence's tokens to one vector.

use candle_core::{DType, Result, Tensor};

use super::{Fused, Out, Packed};

/// How a sequence's tokens become one vector. A pooling leaves out the first tokens of a sequence if [`Packed::skipped`]
/// says so. If that leaves no token, `First` and `Last` still take theirs, and the others give zeros.
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

/// `[tokens, hidden]` to `[sequences, poolings × hidden]`: the vectors of all poolings, side by side.
pub fn pool(poolings: &[Pooling], x: &Tensor, batch: &Packed, out: Out<'_>) -> Result<Tensor> {
    let hidden = x.dim(1)?;
    match out.view(batch.order().len(), poolings.len() * hidden)? {
        Some(y) => {
            let pool = |out: &mut [f32], x: &[f32]| rows(poolings, out, x, hidden, batch);
            y.inplace_op2(x, &Fused("pool", pool))?;
            Ok(y)
        }
        None => match poolings {
            [one] => one.on_device(x, batch),
            many => {
                let pooled = many.iter().map(|pooling| pooling.on_device(x, batch));
                Tensor::cat(&pooled.collect::<Result<Vec<_>>>()?, 1)
            }
        },
    }
}

/// Writes the vectors of all poolings to `out`, sequence after sequence.
fn rows(poolings: &[Pooling], out: &mut [f32], mut x: &[f32], hidden: usize, batch: &Packed) {
    let sequences = out.chunks_mut(poolings.len() * hidden).zip(batch.lengths());
    for (place, (out, length)) in sequences.enumerate() {
        let tokens;
        (tokens, x) = x.split_at(length * hidden);
        for (pooling, out) in poolings.iter().zip(out.chunks_mut(hidden)) {
            pooling.row(out, tokens, batch.skipped(place));
        }
    }
}

impl Pooling {
    #[cfg(test)]
    pub const ALL: [Self; 6] =
        [Self::Mean, Self::First, Self::Last, Self::Max, Self::MeanSqrtLen, Self::WeightedMean];

    fn on_device(self, x: &Tensor, batch: &Packed) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::pool(x, batch, self);
        }
        self.tensors(x, batch)
    }

    /// The unfused form, by Candle's own operations.
    pub(super) fn tensors(self, x: &Tensor, batch: &Packed) -> Result<Tensor> {
        match self {
            Pooling::First | Pooling::Last => {
                let (mut start, count) = (0, batch.order().len());
                let mut rows = Vec::with_capacity(count);
                for (place, length) in batch.lengths().enumerate() {
                    rows.push((start + self.place(length, batch.skipped(place))) as u32);
                    start += length;
                }
                x.index_select(&Tensor::from_vec(rows, count, x.device())?, 0)
            }
            _ => {
                let (mut place, mut pooled) = (0, Vec::new());
                for run in batch.runs() {
                    let (mut start, end) = (run.start, place + run.sequences);
                    while place < end {
                        let skipped = batch.skipped(place);
                        let equal = (place..end).take_while(|&at| batch.skipped(at) == skipped).count();
                        let tokens = x.narrow(0, start, equal * run.length)?;
                        let tokens = tokens.reshape((equal, run.length, x.dim(1)?))?.to_dtype(DType::F32)?;
                        pooled.push(self.equal_lengths(&tokens, skipped)?.to_dtype(x.dtype())?);
                        (place, start) = (place + equal, start + equal * run.length);
                    }
                }
                Tensor::cat(&pooled, 0)
            }
        }
    }

    /// `[sequences, length, hidden]` to `[sequences, hidden]`.
    fn equal_lengths(self, tokens: &Tensor, skipped: usize) -> Result<Tensor> {
        let (sequences, length, hidden) = tokens.dims3()?;
        if skipped == length {
            return Tensor::zeros((sequences, hidden), tokens.dtype(), tokens.device());
        }
        let kept = tokens.narrow(1, skipped, length - skipped)?;
        match self {
            Pooling::Max => kept.max(1),
            Pooling::MeanSqrtLen => kept.sum(1)? / ((length - skipped) as f64).sqrt(),
            Pooling::WeightedMean => {
                let weights = Tensor::arange(skipped as u32 + 1, length as u32 + 1, tokens.device())?
                    .to_dtype(DType::F32)?
                    .reshape((1, length - skipped, 1))?;
                kept.broadcast_mul(&weights)?.sum(1)? / sum_of_positions(skipped, length)
            }
            Pooling::Mean | Pooling::First | Pooling::Last => kept.mean(1),
        }
    }

    /// The token that `First` or `Last` takes of a sequence.
    fn place(self, length: usize, skipped: usize) -> usize {
        match self {
            Pooling::First if skipped < length => skipped,
            Pooling::First => 0,
            _ => length - 1,
        }
    }

    /// One sequence's tokens, `[length, hidden]`, to `out`, `[hidden]`.
    fn row(self, out: &mut [f32], tokens: &[f32], skipped: usize) {
        let hidden = out.len();
        let length = tokens.len() / hidden;
        let (kept, count) = (&tokens[skipped * hidden..], (length - skipped) as f32);
        match self {
            Pooling::First | Pooling::Last => {
                let at = self.place(length, skipped) * hidden;
                out.copy_from_slice(&tokens[at..at + hidden]);
            }
            _ if kept.is_empty() => out.fill(0.0),
            Pooling::Mean => sum(out, kept, |_| 1.0, count),
            Pooling::MeanSqrtLen => sum(out, kept, |_| 1.0, count.sqrt()),
            Pooling::WeightedMean => {
                sum(out, kept, |at| (skipped + at + 1) as f32, sum_of_positions(skipped, length) as f32);
            }
            Pooling::Max => {
                out.copy_from_slice(&kept[..hidden]);
                for token in kept.chunks(hidden).skip(1) {
                    for (max, &x) in out.iter_mut().zip(token) {
                        // Keeps NaN, so that an invalid row is detected.
                        *max = if x > *max || x.is_nan() { x } else { *max };
                    }
                }
            }
        }
    }
}

/// (skipped + 1) + … + length.
fn sum_of_positions(skipped: usize, length: usize) -> f64 {
    let up_to = |n: usize| n * (n + 1) / 2;
    (up_to(length) - up_to(skipped)) as f64
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::{Slot, Workspace};
    use super::*;

    #[test]
    fn the_fused_form_equals_that_of_tensors() {
        let lengths = [3usize, 1, 4, 3, 3, 4];
        let ids: Vec<Vec<u32>> = lengths.iter().map(|&length| vec![0; length]).collect();
        let tokens: usize = lengths.iter().sum();
        let values: Vec<f32> = (0..tokens * 5).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
        let x = Tensor::from_vec(values, (tokens, 5), &Device::Cpu).unwrap();
        for skipped in [[0; 6], [2; 6], [1, 1, 0, 3, 0, 9]] {
            let batch: Vec<(&[u32], Option<&[u32]>)> = ids.iter().map(|ids| (&ids[..], None)).collect();
            let batch = Packed::new(&batch).skipping(&skipped);
            let workspace = Workspace::default();
            let fused = pool(&Pooling::ALL, &x, &batch, workspace.at(Slot::Pooled, x.device())).unwrap();
            let of_tensors = Pooling::ALL.map(|pooling| pooling.tensors(&x, &batch).unwrap());
            let (got, want) = (fused, Tensor::cat(&of_tensors, 1).unwrap());
            let error = (got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(error < 1e-6, "{skipped:?}: {error}");
        }
    }
}
