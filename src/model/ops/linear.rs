//! Linear layers: a multiplication, and what follows it in the same pass.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::activation::Activation;
use super::coded::Code;
use super::matmul::{self, Panels};
use super::norm::Norm;
use super::{Fused, Out, host};

pub struct Linear {
    weight: Weight,
    outputs: usize,
}

enum Weight {
    /// `[in, out]` and `[out]`, for devices whose multiplication is Candle's.
    Tensor {
        weight: Tensor,
        bias: Option<Tensor>,
    },
    Panels(Panels),
}

/// What follows the multiplication.
pub enum Then<'a> {
    Nothing,
    Activate(Activation),
    /// `[tokens, out]` is added.
    Add(&'a Tensor),
    /// The same, then a norm.
    AddNorm(&'a Tensor, &'a Norm),
}

impl Linear {
    /// Weights in a checkpoint are `[out, in]`. Several that read the same input are one multiplication.
    /// `code` is what a CPU multiplies with, where not f32.
    pub fn load(
        inputs: usize,
        outputs: usize,
        bias: bool,
        code: Option<Code>,
        parts: &[VarBuilder<'_>],
    ) -> Result<Self> {
        let each = outputs / parts.len();
        let weights: Vec<Tensor> =
            parts.iter().map(|vb| vb.get((each, inputs), "weight")).collect::<Result<_>>()?;
        let biases: Vec<Tensor> = match bias {
            true => parts.iter().map(|vb| vb.get(each, "bias")).collect::<Result<_>>()?,
            false => Vec::new(),
        };
        let weight = Tensor::cat(&weights, 0)?;
        let bias = if bias { Some(Tensor::cat(&biases, 0)?) } else { None };
        let weight = match weight.device().is_cpu() {
            true => {
                let bias = bias.as_ref().map(host).transpose()?;
                let weight = host(&weight)?;
                Weight::Panels(match code {
                    None => Panels::new(&weight, bias.as_deref(), inputs, outputs),
                    Some(code) => Panels::coded(&weight, bias.as_deref(), inputs, outputs, code),
                })
            }
            false => Weight::Tensor { weight: weight.t()?.contiguous()?, bias },
        };
        Ok(Self { weight, outputs })
    }

    /// `[tokens, in]` to `[tokens, out]`, and the bias, `[out]`, where it is yet to be added: on a GPU, where the
    /// operation that follows does so without a pass over memory for it.
    pub fn product(&self, x: &Tensor, out: Out<'_>) -> Result<(Tensor, Option<&Tensor>)> {
        match &self.weight {
            Weight::Tensor { weight, bias } if x.device().is_cuda() => Ok((x.matmul(weight)?, bias.as_ref())),
            _ => Ok((self.forward(x, Then::Nothing, out)?, None)),
        }
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub fn forward(&self, x: &Tensor, then: Then<'_>, out: Out<'_>) -> Result<Tensor> {
        let (weight, bias) = match &self.weight {
            Weight::Tensor { weight, bias } => (weight, bias),
            Weight::Panels(panels) => {
                let y = out.here(x.dim(0)?, self.outputs)?;
                let alone = |then: matmul::Then<'_>| {
                    y.inplace_op2(
                        x,
                        &Fused("linear", |out: &mut [f32], x: &[f32]| panels.multiply(x, out, &then)),
                    )
                };
                match then {
                    Then::Nothing => alone(matmul::Then::Nothing)?,
                    Then::Activate(activation) => alone(matmul::Then::Activate(activation))?,
                    Then::Add(residual) => {
                        let add = |out: &mut [f32], x: &[f32], residual: &[f32]| {
                            panels.multiply(x, out, &matmul::Then::Add(residual));
                        };
                        y.inplace_op3(x, residual, &Fused("linear", add))?;
                    }
                    Then::AddNorm(residual, norm) => {
                        let add = |out: &mut [f32], x: &[f32], residual: &[f32]| {
                            panels.multiply(x, out, &matmul::Then::AddNorm(residual, norm));
                        };
                        y.inplace_op3(x, residual, &Fused("linear", add))?;
                    }
                }
                return Ok(y);
            }
        };
        let mut y = x.matmul(weight)?;
        #[cfg(feature = "cuda")]
        if y.device().is_cuda() {
            use super::cuda::{add_activate, add_norm};
            let bias = bias.as_ref();
            return match then {
                Then::Nothing if bias.is_none() => Ok(y),
                Then::Nothing => add_activate(&y, bias, None),
                Then::Activate(activation) => add_activate(&y, bias, Some(activation)),
                Then::Add(residual) => add_norm(&y, bias, Some(residual), None),
                Then::AddNorm(residual, norm) => add_norm(&y, bias, Some(residual), Some(norm)),
            };
        }
        if let Some(bias) = bias {
            y = y.broadcast_add(bias)?;
        }
        match then {
            Then::Nothing => Ok(y),
            Then::Activate(activation) => activation.tensor(&y),
            Then::Add(residual) => y + residual,
            Then::AddNorm(residual, norm) => norm.tensor(&(y + residual)?),
        }
    }
}
