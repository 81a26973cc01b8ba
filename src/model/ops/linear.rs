//! Linear layers: a multiplication, and what follows it in the same pass.

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Tensor};
use candle_nn::VarBuilder;

use super::activation::Activation;
use super::coded::Code;
use super::matmul::{self, Panels};
use super::norm::Norm;
use super::{Out, host, numbers, numbers_mut};

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
                    Some(code) => Panels::coded(&weight, bias.as_deref(), inputs, outputs, code)
                        .map_err(candle_core::Error::msg)?,
                })
            }
            false => Weight::Tensor { weight: weight.t()?.contiguous()?, bias },
        };
        Ok(Self { weight, outputs })
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub fn forward(&self, x: &Tensor, then: Then<'_>, out: Out<'_>) -> Result<Tensor> {
        let (weight, bias) = match &self.weight {
            Weight::Tensor { weight, bias } => (weight, bias),
            Weight::Panels(panels) => {
                let y = out.here(x.dim(0)?, self.outputs)?;
                match then {
                    Then::Add(residual) | Then::AddNorm(residual, _) => {
                        y.inplace_op3(x, residual, &Multiply { panels, then: &then })?;
                    }
                    _ => y.inplace_op2(x, &Multiply { panels, then: &then })?,
                }
                return Ok(y);
            }
        };
        let mut y = x.matmul(weight)?;
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

struct Multiply<'a> {
    panels: &'a Panels,
    then: &'a Then<'a>,
}

impl InplaceOp2 for Multiply<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        let then = match self.then {
            Then::Activate(activation) => matmul::Then::Activate(*activation),
            _ => matmul::Then::Nothing,
        };
        self.panels.multiply(numbers(x, x_layout)?, numbers_mut(out, layout)?, &then);
        Ok(())
    }
}

impl InplaceOp3 for Multiply<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<()> {
        let residual = numbers(residual, residual_layout)?;
        let then = match self.then {
            Then::AddNorm(_, norm) => matmul::Then::AddNorm(residual, norm),
            _ => matmul::Then::Add(residual),
        };
        self.panels.multiply(numbers(x, x_layout)?, numbers_mut(out, layout)?, &then);
        Ok(())
    }
}
