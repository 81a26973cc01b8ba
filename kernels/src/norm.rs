//! Normalisation of rows, LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467), with a residual added before or
//! after it.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use pulp::{Simd, WithSimd};

use super::quant::Expected;
use super::simd::{add, dispatch, sum};
use super::{Fused, Out, host};

/// What is computed of a row x, with e = `eps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// (x - mean) / √(variance + e) × weight + bias; without a bias, the bias is 0.
    Layer { bias: bool },
    /// x / √(mean of x² + e) × weight.
    Rms,
    /// RMSNorm with weights that are stored minus 1, as in Gemma.
    RmsPlusOne,
}

pub struct Norm {
    kind: NormKind,
    /// Of RMSNorm, always in f32: rows of 16 bits are normalised in f32 too.
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
    pub(super) eps: f32,
    /// Weight and bias as vectors, if they are on the CPU.
    host: Option<(Vec<f32>, Vec<f32>)>,
}

impl Norm {
    pub fn load(size: usize, kind: NormKind, eps: f64, vb: VarBuilder<'_>) -> Result<Self> {
        // Checkpoints converted from TensorFlow have the older names.
        let (weight, bias_name) =
            if vb.contains_tensor("gamma") { ("gamma", "beta") } else { ("weight", "bias") };
        let weight = vb.get(size, weight)?;
        let weight = match kind {
            NormKind::Layer { .. } => weight,
            NormKind::Rms => weight.to_dtype(DType::F32)?,
            NormKind::RmsPlusOne => (weight.to_dtype(DType::F32)? + 1.0)?,
        };
        let bias = match kind {
            NormKind::Layer { bias: true } => vb.get(size, bias_name)?,
            _ => weight.zeros_like()?,
        };
        let host = match weight.device().is_cpu() {
            true => Some((host(&weight)?, host(&bias)?)),
            false => None,
        };
        Ok(Self { kind, weight, bias, eps: eps as f32, host })
    }

    /// The values that the results are expected to have, if the weights are on the CPU: before weight and bias, they
    /// have mean 0 and standard deviation 1.
    pub fn expected(&self) -> Option<Expected> {
        let (weight, bias) = self.host.as_ref()?;
        Some(Expected { mean: bias.clone(), spread: weight.iter().map(|weight| weight.abs()).collect() })
    }

    /// Normalises each row of `[tokens, size]`.
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

    /// Whether this is LayerNorm.
    #[cfg(feature = "cuda")]
    pub(super) fn is_layer(&self) -> bool {
        matches!(self.kind, NormKind::Layer { .. })
    }

    /// The unfused form, by Candle's own operations, of the last axis.
    pub(super) fn tensor(&self, x: &Tensor) -> Result<Tensor> {
        if let NormKind::Layer { .. } = self.kind {
            return candle_nn::ops::layer_norm(x, &self.weight, &self.bias, self.eps);
        }
        let wide = x.to_dtype(DType::F32)?;
        let root = (wide.sqr()?.mean_keepdim(D::Minus1)? + f64::from(self.eps))?.sqrt()?;
        wide.broadcast_div(&root)?.broadcast_mul(&self.weight)?.to_dtype(x.dtype())
    }

    /// The weight of RMSNorm, and the factor 1 / √(mean of x² + e) of this row.
    #[inline(always)]
    pub(super) fn rms<S: Simd>(&self, simd: S, row: &[f32]) -> (&[f32], f32) {
        let (weight, _) = self.host.as_ref().expect("the weights are on the CPU");
        let squares = sum(simd, row, |x| simd.mul_f32s(x, x), |x| x * x);
        (weight, 1.0 / (squares / row.len() as f32 + self.eps).sqrt())
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
    if let Some(residual) = residual {
        add(simd, row, residual);
    }
    match norm.kind {
        NormKind::Layer { .. } => layer_norm(simd, row, norm),
        NormKind::Rms | NormKind::RmsPlusOne => rms_norm(simd, row, norm),
    }
}

#[inline(always)]
fn rms_norm<S: Simd>(simd: S, row: &mut [f32], norm: &Norm) {
    let (weight, scale) = norm.rms(simd, row);
    let scales = simd.splat_f32s(scale);
    let (weights, weights_rest) = S::as_simd_f32s(&weight[..row.len()]);
    let (vectors, rest) = S::as_mut_simd_f32s(row);
    for (x, &weight) in vectors.iter_mut().zip(weights) {
        *x = simd.mul_f32s(simd.mul_f32s(*x, scales), weight);
    }
    for (x, &weight) in rest.iter_mut().zip(weights_rest) {
        *x = *x * scale * weight;
    }
}

#[inline(always)]
fn layer_norm<S: Simd>(simd: S, row: &mut [f32], norm: &Norm) {
    let (weight, bias) = norm.host.as_ref().expect("the weights are on the CPU");
    let size = row.len();
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

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::matmul::tests::{by_each_width, random};
    use super::super::{Slot, Workspace};
    use super::*;

    struct Each<'a>(&'a [f32], &'a Norm);

    impl WithSimd for Each<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let mut out = self.0.to_vec();
            for row in out.chunks_mut(self.1.weight.elem_count()) {
                add_norm(simd, row, None, self.1);
            }
            out
        }
    }

    /// Both forms against the formula in f64, for every vector width of the CPU.
    #[test]
    fn the_root_mean_square_becomes_one() {
        let (rows, size, eps) = (5, 37, 1e-6);
        let (x, weight) = (random(rows * size, 1), random(size, 2));
        for (kind, plus) in [(NormKind::Rms, 0.0), (NormKind::RmsPlusOne, 1.0)] {
            let tensors = [("weight".to_owned(), Tensor::new(&weight[..], &Device::Cpu).unwrap())];
            let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
            let norm = Norm::load(size, kind, eps, vb).unwrap();
            let tensor = Tensor::from_vec(x.clone(), (rows, size), &Device::Cpu).unwrap();
            let workspace = Workspace::default();
            let fused = norm.forward(&tensor, workspace.at(Slot::Mixed, &Device::Cpu)).unwrap();
            let mut all = by_each_width(|| Each(&x, &norm));
            all.push(host(&norm.tensor(&tensor).unwrap()).unwrap());
            all.push(host(&fused).unwrap());
            for got in all {
                for (x, got) in x.chunks(size).zip(got.chunks(size)) {
                    let squares = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
                    let root = (squares / size as f64 + eps).sqrt();
                    for ((&x, &weight), &got) in x.iter().zip(&weight).zip(got) {
                        let want = f64::from(x) / root * (f64::from(weight) + plus);
                        assert!((f64::from(got) - want).abs() < 1e-6, "{kind:?}: {got} is not {want}");
                    }
                }
            }
        }
    }
}
