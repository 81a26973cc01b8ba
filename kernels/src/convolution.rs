//! Convolution along the tokens of a sequence, as one multiplication: a token's row is put together from its neighbours'
//! rows, with zeros before the first token and after the last. On a GPU Candle's operations gather the rows: it is once a
//! model, beside the first layer.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::{Activation, Epilogue, Expected, Fused, Linear, Out, Packed, Precision, upload};

pub struct Convolution {
    /// From `size × hidden` elements to `hidden`.
    linear: Linear,
    /// Tokens that an output depends on; odd.
    size: usize,
    activation: Activation,
}

impl Convolution {
    /// A checkpoint's weight is `[hidden, hidden, size]`. `expected` is of a token's row.
    pub fn load(
        hidden: usize,
        size: usize,
        activation: Activation,
        precision: Option<Precision>,
        expected: Option<&Expected>,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let weight = vb.get((hidden, hidden, size), "weight")?;
        let weight = weight.transpose(1, 2)?.reshape((hidden, size * hidden))?;
        let expected =
            expected.map(|e| Expected { mean: e.mean.repeat(size), spread: e.spread.repeat(size) });
        let linear = Linear::calibrated(
            &weight,
            Some(vb.get(hidden, "bias")?),
            precision,
            expected.as_ref().map(Into::into),
        )?;
        Ok(Self { linear, size, activation })
    }

    /// `[tokens, hidden]` to `[tokens, hidden]`, activated. `gathered` is for the neighbours' rows.
    pub fn forward(&self, x: &Tensor, batch: &Packed, gathered: Out<'_>, out: Out<'_>) -> Result<Tensor> {
        let (tokens, hidden) = x.dims2()?;
        let rows = match gathered.view(tokens, self.size * hidden)? {
            Some(rows) => {
                let gather = |out: &mut [f32], x: &[f32]| {
                    for (out, neighbour) in out.chunks_exact_mut(hidden).zip(self.neighbours(batch)) {
                        match neighbour {
                            Some(token) => out.copy_from_slice(&x[token * hidden..][..hidden]),
                            None => out.fill(0.0),
                        }
                    }
                };
                rows.inplace_op2(x, &Fused("convolution", gather))?;
                rows
            }
            None => self.gathered(x, batch)?,
        };
        self.linear.forward(&rows, Epilogue::Activate(self.activation), out)
    }

    /// The neighbours' rows by Candle's own operations: `[tokens, size × hidden]`.
    fn gathered(&self, x: &Tensor, batch: &Packed) -> Result<Tensor> {
        let (tokens, hidden) = x.dims2()?;
        let with_zeros = x.pad_with_zeros(0, 0, 1)?;
        let index: Vec<u32> = self.neighbours(batch).map(|token| token.unwrap_or(tokens) as u32).collect();
        let index = upload(&index, x.device())?;
        with_zeros.index_select(&index, 0)?.reshape((tokens, self.size * hidden))
    }

    /// For each token the tokens around it, itself included; `None` outside of its sequence.
    fn neighbours<'a>(&'a self, batch: &'a Packed) -> impl Iterator<Item = Option<usize>> + 'a {
        let (mut start, before) = (0, self.size / 2);
        batch.lengths().flat_map(move |length| {
            let sequence = start..start + length;
            start = sequence.end;
            sequence.clone().flat_map(move |token| {
                let sequence = sequence.clone();
                (0..self.size)
                    .map(move |i| (token + i).checked_sub(before).filter(|at| sequence.contains(at)))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::super::attention::tests::{batch, near, tensor};
    use super::super::{Slot, Workspace};
    use super::*;

    #[test]
    fn a_convolution_stays_within_a_sequence() {
        let (packed, hidden) = (batch(&[1, 2, 5, 5, 17]), 6);
        let x = tensor(packed.tokens(), hidden, 3);
        for size in [1, 3, 5] {
            let (weight, bias) = (tensor(hidden, hidden * size, 4), tensor(1, hidden, 5));
            let tensors = [
                ("weight".to_owned(), weight.reshape((hidden, hidden, size)).unwrap()),
                ("bias".to_owned(), bias.flatten_all().unwrap()),
            ];
            let vb = VarBuilder::from_tensors(tensors.clone().into(), DType::F32, &Device::Cpu);
            let convolution = Convolution::load(hidden, size, Activation::Tanh, None, None, &vb).unwrap();
            let workspace = Workspace::default();
            let out = |slot| workspace.at(slot, &Device::Cpu);
            let fused = convolution.forward(&x, &packed, out(Slot::Wide), out(Slot::Convolved)).unwrap();
            let rows = convolution.gathered(&x, &packed).unwrap();
            let plain =
                convolution.linear.forward(&rows, Epilogue::Activate(Activation::Tanh), out(Slot::Mixed));
            near(&fused, &plain.unwrap());
            // Candle's own convolution, one sequence at a time.
            let mut start = 0;
            for length in packed.lengths() {
                let alone = x.narrow(0, start, length).unwrap().t().unwrap().unsqueeze(0).unwrap();
                let want = alone.contiguous().unwrap().conv1d(&tensors[0].1, size / 2, 1, 1, 1).unwrap();
                let want =
                    want.squeeze(0).unwrap().t().unwrap().broadcast_add(&bias).unwrap().tanh().unwrap();
                near(&fused.narrow(0, start, length).unwrap(), &want);
                start += length;
            }
        }
    }
}
