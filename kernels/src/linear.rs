//! Linear layers: a matrix multiplication with a fused epilogue.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::activation::Activation;
use super::matmul::{self, Panels};
use super::norm::Norm;
use super::quant::{Calibration, Expected, Precision};
use super::{Fused, Out, host};

pub struct Linear {
    weight: Weight,
    outputs: usize,
    /// Of the outputs.
    expected: Option<Box<Expected>>,
}

enum Weight {
    /// `[in, out]` and `[out]`, for devices that use Candle's matrix multiplication.
    Tensor {
        weight: Tensor,
        bias: Option<Tensor>,
    },
    Panels(Panels),
}

/// What is done to the products after the bias is added.
pub enum Epilogue<'a> {
    Nothing,
    Activate(Activation),
    /// Adds a residual, `[tokens, out]`.
    Add(&'a Tensor),
    /// Adds a residual, then normalises each row.
    AddNorm(&'a Tensor, &'a Norm),
    /// Normalises each row, then adds a residual.
    NormAdd(&'a Norm, &'a Tensor),
}

impl Linear {
    /// Loads layers that read the same input as one, with their outputs side by side. A checkpoint's weights are
    /// `[out, in]`. On a CPU they are quantized to `precision`; `None` is f32.
    pub fn load(
        inputs: usize,
        outputs: usize,
        bias: bool,
        precision: Option<Precision>,
        parts: &[VarBuilder<'_>],
    ) -> Result<Self> {
        let each = outputs / parts.len();
        let parts: Vec<_> = parts.iter().map(|vb| (vb.clone(), each)).collect();
        Self::load_parts(inputs, bias, precision, None, &parts)
    }

    /// Like [`Linear::load`], for layers that have different numbers of outputs. A
    /// `calibration` makes int8 more precise.
    pub fn load_parts(
        inputs: usize,
        bias: bool,
        precision: Option<Precision>,
        calibration: Option<Calibration<'_>>,
        parts: &[(VarBuilder<'_>, usize)],
    ) -> Result<Self> {
        let weights = parts.iter().map(|(vb, outputs)| vb.get((*outputs, inputs), "weight"));
        let weight = Tensor::cat(&weights.collect::<Result<Vec<_>>>()?, 0)?;
        let bias = match bias {
            true => {
                let biases = parts.iter().map(|(vb, outputs)| vb.get(*outputs, "bias"));
                Some(Tensor::cat(&biases.collect::<Result<Vec<_>>>()?, 0)?)
            }
            false => None,
        };
        Self::calibrated(&weight, bias, precision, calibration)
    }

    /// `weight` is `[out, in]`, `bias` is `[out]`.
    pub fn new(weight: &Tensor, bias: Option<Tensor>, precision: Option<Precision>) -> Result<Self> {
        Self::calibrated(weight, bias, precision, None)
    }

    /// Like [`Linear::new`]; a `calibration` makes int8 more precise.
    pub fn calibrated(
        weight: &Tensor,
        bias: Option<Tensor>,
        precision: Option<Precision>,
        calibration: Option<Calibration<'_>>,
    ) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        let mut expected = None;
        let weight = match weight.device().is_cpu() {
            true => {
                let bias = bias.as_ref().map(host).transpose()?;
                let weight = host(weight)?;
                Weight::Panels(match precision {
                    None => Panels::new(&weight, bias.as_deref(), inputs, outputs),
                    Some(precision) => {
                        if precision == Precision::Int8 {
                            expected = calibration
                                .map(|c| Box::new(c.expected.after_linear(&weight, bias.as_deref())));
                        }
                        Panels::quantized(&weight, bias.as_deref(), inputs, outputs, precision, calibration)
                    }
                })
            }
            false => Weight::Tensor { weight: weight.t()?.contiguous()?, bias },
        };
        Ok(Self { weight, outputs, expected })
    }

    /// The values that the outputs are expected to have; known of int8 if it was known of the inputs.
    pub fn expected(&self) -> Option<&Expected> {
        self.expected.as_deref()
    }

    /// `[tokens, in]` to `[tokens, out]`. On a CUDA GPU the bias, `[out]`, is returned instead of added: the next
    /// operation adds it, which saves a pass over memory.
    pub fn product(&self, x: &Tensor, out: Out<'_>) -> Result<(Tensor, Option<&Tensor>)> {
        match &self.weight {
            Weight::Tensor { weight, bias } if x.device().is_cuda() => Ok((x.matmul(weight)?, bias.as_ref())),
            _ => Ok((self.forward(x, Epilogue::Nothing, out)?, None)),
        }
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub fn forward(&self, x: &Tensor, epilogue: Epilogue<'_>, out: Out<'_>) -> Result<Tensor> {
        let (weight, bias) = match &self.weight {
            Weight::Tensor { weight, bias } => (weight, bias),
            Weight::Panels(panels) => {
                let y = out.here(x.dim(0)?, self.outputs)?;
                let alone = |epilogue: matmul::Epilogue<'_>| {
                    y.inplace_op2(
                        x,
                        &Fused("linear", |out: &mut [f32], x: &[f32]| panels.multiply(x, out, &epilogue)),
                    )
                };
                match epilogue {
                    Epilogue::Nothing => alone(matmul::Epilogue::Nothing)?,
                    Epilogue::Activate(activation) => alone(matmul::Epilogue::Activate(activation))?,
                    Epilogue::Add(residual) => {
                        let add = |out: &mut [f32], x: &[f32], residual: &[f32]| {
                            panels.multiply(x, out, &matmul::Epilogue::Add(residual));
                        };
                        y.inplace_op3(x, residual, &Fused("linear", add))?;
                    }
                    Epilogue::AddNorm(residual, norm) => {
                        let add = |out: &mut [f32], x: &[f32], residual: &[f32]| {
                            panels.multiply(x, out, &matmul::Epilogue::AddNorm(residual, norm));
                        };
                        y.inplace_op3(x, residual, &Fused("linear", add))?;
                    }
                    Epilogue::NormAdd(norm, residual) => {
                        let add = |out: &mut [f32], x: &[f32], residual: &[f32]| {
                            panels.multiply(x, out, &matmul::Epilogue::NormAdd(norm, residual));
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
            use super::cuda::{add_activate, add_norm, norm_add};
            let bias = bias.as_ref();
            return match epilogue {
                Epilogue::Nothing if bias.is_none() => Ok(y),
                Epilogue::Nothing => add_activate(&y, bias, None),
                Epilogue::Activate(activation) => add_activate(&y, bias, Some(activation)),
                Epilogue::Add(residual) => add_norm(&y, bias, Some(residual), None),
                Epilogue::AddNorm(residual, norm) => add_norm(&y, bias, Some(residual), Some(norm)),
                Epilogue::NormAdd(norm, residual) => norm_add(norm, &y, bias, residual),
            };
        }
        if let Some(bias) = bias {
            y = y.broadcast_add(bias)?;
        }
        match epilogue {
            Epilogue::Nothing => Ok(y),
            Epilogue::Activate(activation) => activation.tensor(&y),
            Epilogue::Add(residual) => y + residual,
            Epilogue::AddNorm(residual, norm) => norm.tensor(&(y + residual)?),
            Epilogue::NormAdd(norm, residual) => norm.tensor(&y)? + residual,
        }
    }
}
