//! The steps by Candle's operations, for GPUs: a map is `[images, channels, height, width]`.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{Backend, Network, Weights, apply};
use crate::model::kernels::image::Window;
use crate::model::kernels::{Activation, Norm, Slot, Workspace};
use crate::model::vision::model::Image;
use crate::model::vision::preprocess::Preprocess;

pub(super) struct Candle {
    pub device: Device,
    pub dtype: DType,
}

pub(super) struct Kernel {
    /// Of a depthwise convolution, `[size × size, channels, 1, 1]`.
    weight: Tensor,
    /// `[1, outputs, 1, 1]`.
    bias: Tensor,
    window: Window,
    is_depthwise: bool,
}

impl Candle {
    fn own(&self, x: &Tensor) -> Result<Tensor> {
        x.to_device(&self.device)?.to_dtype(self.dtype)
    }
}

/// A map with a window's zeros around it, and the height and width of the window's outputs.
fn padded(x: &Tensor, window: &Window) -> Result<(Tensor, usize, usize)> {
    let (_, _, height, width) = x.dims4()?;
    let ((height, top, bottom), (width, left, right)) = (window.outputs(height), window.outputs(width));
    let x = if top + bottom > 0 { x.pad_with_zeros(2, top, bottom)? } else { x.clone() };
    let x = if left + right > 0 { x.pad_with_zeros(3, left, right)? } else { x };
    Ok((x, height, width))
}

/// `count` elements of a dimension from `start` on, so many apart.
fn every(x: &Tensor, dimension: usize, start: usize, count: usize, stride: usize) -> Result<Tensor> {
    if stride == 1 {
        return x.narrow(dimension, start, count);
    }
    let places: Vec<u32> = (0..count).map(|at| (start + at * stride) as u32).collect();
    x.index_select(&Tensor::from_vec(places, count, x.device())?, dimension)
}

impl Kernel {
    /// Candle's own convolution runs once per group, so here each pixel of the window is a multiplication of maps.
    fn depthwise(&self, x: &Tensor) -> Result<Tensor> {
        let (x, height, width) = padded(x, &self.window)?;
        let mut sum: Option<Tensor> = None;
        for row in 0..self.window.size {
            let rows = every(&x, 2, row, height, self.window.stride)?;
            for column in 0..self.window.size {
                let pixels = every(&rows, 3, column, width, self.window.stride)?;
                let weight = self.weight.get(row * self.window.size + column)?.unsqueeze(0)?;
                let product = pixels.broadcast_mul(&weight)?;
                sum = Some(match sum {
                    Some(sum) => (sum + product)?,
                    None => product,
                });
            }
        }
        match sum {
            Some(sum) => Ok(sum),
            None => candle_core::bail!("a window without pixels"),
        }
    }
}

impl Backend for Candle {
    type Map = Tensor;
    type Convolution = Kernel;
    type Channels = Tensor;

    fn convolution(&self, of: Weights) -> Result<Kernel> {
        let Weights { weight, bias, window, is_depthwise } = of;
        let weight = match is_depthwise {
            true => {
                let channels = weight.dim(0)?;
                weight
                    .reshape((channels, window.size * window.size))?
                    .t()?
                    .contiguous()?
                    .unsqueeze(2)?
                    .unsqueeze(3)?
            }
            false => weight,
        };
        let bias = bias.reshape((1, (), 1, 1))?;
        Ok(Kernel { weight: self.own(&weight)?, bias: self.own(&bias)?, window, is_depthwise })
    }

    fn channels(&self, values: &Tensor) -> Result<Tensor> {
        self.own(&values.reshape((1, (), 1, 1))?)
    }

    fn images(&self, images: &[&Image], preprocess: &Preprocess) -> Result<Tensor> {
        let (height, width) = (preprocess.height, preprocess.width);
        let mut planes = Vec::with_capacity(images.len() * 3 * height * width);
        for image in images {
            let pixels = image.pixels.as_chunks::<3>().0;
            for channel in 0..3 {
                let values = preprocess.values(channel);
                planes.extend(pixels.iter().map(|pixel| values[usize::from(pixel[channel])]));
            }
        }
        self.own(&Tensor::from_vec(planes, (images.len(), 3, height, width), &Device::Cpu)?)
    }

    fn convolve(
        &self,
        of: &Kernel,
        x: &Tensor,
        residual: Option<&Tensor>,
        activation: Option<Activation>,
    ) -> Result<Tensor> {
        let y = match of.is_depthwise {
            true => of.depthwise(x)?,
            false => {
                let (x, ..) = padded(x, &of.window)?;
                x.contiguous()?.conv2d(&of.weight, 0, of.window.stride, 1, 1)?
            }
        };
        let y = y.broadcast_add(&of.bias)?;
        let y = match residual {
            Some(residual) => (y + residual)?,
            None => y,
        };
        activation.map_or(Ok(y.clone()), |activation| activation.tensor(&y))
    }

    fn add(&self, x: Tensor, residual: &Tensor, activation: Option<Activation>) -> Result<Tensor> {
        let sum = (x + residual)?;
        activation.map_or(Ok(sum.clone()), |activation| activation.tensor(&sum))
    }

    fn max_pool(&self, x: &Tensor, window: &Window) -> Result<Tensor> {
        padded(x, window)?.0.max_pool2d_with_stride(window.size, window.stride)
    }

    fn normalize(&self, x: Tensor, norm: &Norm) -> Result<Tensor> {
        let pixels = x.permute((0, 2, 3, 1))?.contiguous()?;
        let shape = pixels.shape().clone();
        let rows = pixels.reshape(((), shape.dims()[3]))?;
        let workspace = Workspace::default();
        let normed = norm.forward(&rows, workspace.at(Slot::Mixed, &self.device))?;
        normed.reshape(shape)?.permute((0, 3, 1, 2))?.contiguous()
    }

    fn respond(&self, x: Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let lengths = x.to_dtype(DType::F32)?.sqr()?.sum_keepdim((2, 3))?.sqrt()?;
        let mean = (lengths.mean_keepdim(1)? + 1e-6)?;
        let shares = lengths.broadcast_div(&mean)?.to_dtype(self.dtype)?;
        let factors = (shares.broadcast_mul(weight)? + 1.0)?;
        x.broadcast_mul(&factors)?.broadcast_add(bias)
    }

    fn mean(&self, x: &Tensor) -> Result<Tensor> {
        x.to_dtype(DType::F32)?.mean_keepdim((D::Minus2, D::Minus1))?.to_dtype(self.dtype)
    }

    fn scale(&self, x: Tensor, factors: &Tensor) -> Result<Tensor> {
        x.broadcast_mul(factors)
    }

    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }

    fn give(&self, _: Tensor) {}

    fn rows(&self, x: Tensor) -> Result<Tensor> {
        x.flatten_from(1)
    }
}

impl Network<Candle> {
    /// `[images, channels]`.
    pub(super) fn forward(&self, images: &[&Image], preprocess: &Preprocess) -> Result<Tensor> {
        let b = &self.backend;
        let x = b.images(images, preprocess)?;
        self.rows(self.steps.iter().try_fold(x, |x, step| apply(b, step, x))?)
    }
}
