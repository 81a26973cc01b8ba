//! Residual networks of convolutions, by Candle's operations. Batch normalization is part of the weights.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::{Convolution as Spec, Residual as NetworkSpec};
use super::model::Image;
use super::preprocess::Preprocess;
use super::tower::output_layer;
use crate::model::kernels::{Epilogue, Linear, Slot, Transfer, Workspace};

pub struct Residual {
    device: Device,
    dtype: DType,
    stem: Convolution,
    blocks: Vec<Block>,
    out: Option<Linear>,
    /// Values of the answer.
    pub width: usize,
}

struct Block {
    convolutions: Vec<Convolution>,
    shortcut: Option<Convolution>,
}

struct Convolution {
    weight: Tensor,
    /// `[1, outputs, 1, 1]`.
    bias: Tensor,
    padding: usize,
    stride: usize,
}

/// Added to the variance by torch's BatchNorm2d.
const EPS: f64 = 1e-5;

impl Convolution {
    fn load(spec: &Spec, vb: &VarBuilder<'_>) -> Result<Self> {
        let weight = vb.get_unchecked_dtype(&spec.weight, DType::F32)?;
        let (outputs, _, size, _) = weight.dims4()?;
        let norm = |name: &str| {
            vb.pp(&spec.norm).get_with_hints_dtype(outputs, name, Default::default(), DType::F32)
        };
        let factor = (norm("weight")? / (norm("running_var")? + EPS)?.sqrt()?)?;
        let bias = (norm("bias")? - (norm("running_mean")? * &factor)?)?;
        let weight = weight.broadcast_mul(&factor.reshape((outputs, 1, 1, 1))?)?;
        Ok(Self {
            weight: weight.to_dtype(vb.dtype())?,
            bias: bias.reshape((1, outputs, 1, 1))?.to_dtype(vb.dtype())?,
            padding: size / 2,
            stride: spec.stride,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.conv2d(&self.weight, self.padding, self.stride, 1, 1)?.broadcast_add(&self.bias)
    }
}

impl Residual {
    pub fn load(spec: &NetworkSpec, vb: &VarBuilder<'_>) -> Result<Self> {
        let load = |spec: &Spec| Convolution::load(spec, vb);
        let blocks = spec.stages.iter().flatten().map(|block| {
            Ok(Block {
                convolutions: block.convolutions.iter().map(load).collect::<Result<_>>()?,
                shortcut: block.shortcut.as_ref().map(load).transpose()?,
            })
        });
        Ok(Self {
            device: vb.device().clone(),
            dtype: vb.dtype(),
            stem: load(&spec.stem)?,
            blocks: blocks.collect::<Result<_>>()?,
            out: spec.out.as_ref().map(|out| output_layer(out, spec.width, vb)).transpose()?,
            width: spec.out.as_ref().map_or(spec.width, |out| out.outputs),
        })
    }

    /// Starts to copy the answers to the host: `width` values of each image.
    pub fn forward(&self, images: &[&Image], preprocess: &Preprocess) -> Result<Transfer> {
        let (height, width) = (preprocess.height, preprocess.width);
        let mut planes = Vec::with_capacity(images.len() * 3 * height * width);
        for image in images {
            let pixels = image.pixels.as_chunks::<3>().0;
            for channel in 0..3 {
                let values = preprocess.values(channel);
                planes.extend(pixels.iter().map(|pixel| values[usize::from(pixel[channel])]));
            }
        }
        let planes = Tensor::from_vec(planes, (images.len(), 3, height, width), &Device::Cpu)?;
        let x = self.stem.forward(&planes.to_device(&self.device)?.to_dtype(self.dtype)?)?.relu()?;
        // No value is below 0, so zeros around the image are never a maximum.
        let mut x = x.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?.max_pool2d_with_stride(3, 2)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        let pooled = x.to_dtype(DType::F32)?.mean((2, 3))?;
        let workspace = Workspace::default();
        let rows = match &self.out {
            Some(out) => {
                let pooled = pooled.to_dtype(self.dtype)?;
                out.forward(&pooled, Epilogue::Nothing, workspace.at(Slot::Logits, &self.device))?
            }
            None => pooled,
        };
        Transfer::start(&rows.to_dtype(DType::F32)?)
    }
}

impl Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = x.clone();
        for (at, convolution) in self.convolutions.iter().enumerate() {
            y = convolution.forward(&if at > 0 { y.relu()? } else { y })?;
        }
        match &self.shortcut {
            Some(shortcut) => (y + shortcut.forward(x)?)?.relu(),
            None => (y + x)?.relu(),
        }
    }
}
