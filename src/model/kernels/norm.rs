//! Layer normalisation (arXiv:1607.06450) of rows, with a residual added first.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use pulp::{Simd, WithSimd};

use super::simd::{add, dispatch, sum};
use super::{Fused, Out, host};

pub struct Norm {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
    pub(super) eps: f32,
    /// Weight and bias as vectors, if they are on the CPU.
    host: Option<(Vec<f32>, Vec<f32>)>,
}

impl Norm {
    pub fn load(size: usize, bias: bool, eps: f64, vb: VarBuilder<'_>) -> Result<Self> {
        // Checkpoints converted from TensorFlow have the older names.
        let (weight, bias_name) =
            if vb.contains_tensor("gamma") { ("gamma", "beta") } else { ("weight", "bias") };
        let weight = vb.get(size, weight)?;
        let bias = if bias { vb.get(size, bias_name)? } else { weight.zeros_like()? };
        let host = match weight.device().is_cpu() {
            true => Some((host(&weight)?, host(&bias)?)),
            false => None,
        };
        Ok(Self { weight, bias, eps: eps as f32, host })
    }

    /// Normalises each row of `[tokens, size]` to mean 0 and variance 1, then scales and shifts it.
    pub fn forward(&self, x: &Tensor, out: Out<'_>) -> Result<Tensor> {
        let (tokens, size) = x.dims2()?;
        match out.view(tokens, size)? {
            Some(y) => {
                let copied = |out: &mut [f32], x: &[f32]| {
                    out.copy_from_slice(x);
                    self.rows(out);
                };
                y.inplace_op2(x, &Fused("norm", copied))?;
                Ok(y)
            }
            #[cfg(feature = "cuda")]
            None if x.device().is_cuda() => super::cuda::add_norm(x, None, None, Some(self)),
            None => self.tensor(x),
        }
    }

    /// Adds `residual` to `x` and normalises each row; on a CPU in place, in `x`.
    pub fn sum(&self, x: Tensor, residual: &Tensor) -> Result<Tensor> {
        if x.device().is_cpu() {
            let size = self.weight.elem_count();
            let add = |out: &mut [f32], residual: &[f32]| {
                dispatch(Rows { out, residual: Some(residual), size, norm: self });
            };
            x.inplace_op2(residual, &Fused("norm", add))?;
            return Ok(x);
        }
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::add_norm(&x, None, Some(residual), Some(self));
        }
        self.tensor(&(x + residual)?)
    }

    /// Normalises every row of `out`, `[rows, size]`, in place.
    pub(super) fn rows(&self, out: &mut [f32]) {
        dispatch(Rows { out, residual: None, size: self.weight.elem_count(), norm: self });
    }

    /// The unfused form, by Candle's own operation.
    pub(super) fn tensor(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

struct Rows<'a> {
    out: &'a mut [f32],
    residual: Option<&'a [f32]>,
    /// Elements of a row.
    size: usize,
    norm: &'a Norm,
}

impl WithSimd for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { out, residual, size, norm } = self;
        for (i, row) in out.chunks_mut(size).enumerate() {
            add_norm(simd, row, residual.map(|residual| &residual[i * size..][..size]), norm);
        }
    }
}

/// Adds the residual, if any, to one row and normalises it, in place.
#[inline(always)]
pub(super) fn add_norm<S: Simd>(simd: S, row: &mut [f32], residual: Option<&[f32]>, norm: &Norm) {
    let (weight, bias) = norm.host.as_ref().expect("the weights are on the CPU");
    let size = row.len();
    if let Some(residual) = residual {
        add(simd, row, residual);
    }
    let mean = sum(simd, row, |x| x, |x| x) / size as f32;
    let center = simd.splat_f32s(mean);
    let square = |x| {
        let x = simd.sub_f32s(x, center);
        simd.mul_f32s(x, x)
    };
    let variance = sum(simd, row, square, |x| (x - mean) * (x - mean)) / size as f32;
    let scale = 1.0 / (variance + norm.eps).sqrt();
    let scales = simd.splat_f32s(scale);
    let (vectors, rest) = S::as_mut_simd_f32s(row);
    let (weights, weights_rest) = S::as_simd_f32s(&weight[..size]);
    let (biases, biases_rest) = S::as_simd_f32s(&bias[..size]);
    for ((x, &weight), &bias) in vectors.iter_mut().zip(weights).zip(biases) {
        *x = simd.mul_add_e_f32s(simd.mul_f32s(simd.sub_f32s(*x, center), scales), weight, bias);
    }
    for ((x, &weight), &bias) in rest.iter_mut().zip(weights_rest).zip(biases_rest) {
        *x = (*x - mean) * scale * weight + bias;
    }
}
