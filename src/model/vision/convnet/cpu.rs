//! The steps on one CPU core, by kandle's own kernels, in f32. Other cores run other batches.

use candle_core::{Device, Result, Tensor};

use super::{Backend, Network, Weights, apply};
use crate::model::kernels::image::{Buffers, Convolution, Depthwise, Map, Window};
use crate::model::kernels::{Activation, Norm};
use crate::model::vision::model::Image;
use crate::model::vision::preprocess::Preprocess;

/// A map with at most so many pixels is computed for all images of a batch at once: then reading the weights, of which the
/// last layers have most, is worth the while. Larger maps are computed image by image, so that they stay in the cache.
const TOGETHER: usize = 256;

#[derive(Default)]
pub(super) struct Cpu {
    buffers: Buffers,
}

pub(super) enum Kernel {
    Full(Convolution),
    Depthwise(Depthwise),
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()
}

impl Backend for Cpu {
    type Map = Map;
    type Convolution = Kernel;
    type Channels = Vec<f32>;

    fn convolution(&self, of: Weights) -> Result<Kernel> {
        let (weight, bias) = (values(&of.weight)?, values(&of.bias)?);
        Ok(match of.is_depthwise {
            true => Kernel::Depthwise(Depthwise::new(&weight, &bias, of.window)),
            false => Kernel::Full(Convolution::new(&weight, &bias, of.weight.dim(1)?, of.window)),
        })
    }

    fn channels(&self, of: &Tensor) -> Result<Vec<f32>> {
        values(of)
    }

    fn images(&self, images: &[&Image], preprocess: &Preprocess) -> Result<Map> {
        let (height, width) = (preprocess.height, preprocess.width);
        let mut map = self.buffers.take(images.len(), height, width, 3);
        let levels = [0, 1, 2].map(|channel| preprocess.values(channel));
        for (image, out) in images.iter().zip(map.values.chunks_mut(3 * height * width)) {
            let pixels = image.pixels.as_chunks::<3>().0;
            for (pixel, out) in pixels.iter().zip(out.as_chunks_mut::<3>().0) {
                *out = [0, 1, 2].map(|channel| levels[channel][usize::from(pixel[channel])]);
            }
        }
        Ok(map)
    }

    fn convolve(
        &self,
        of: &Kernel,
        x: &Map,
        residual: Option<&Map>,
        activation: Option<Activation>,
    ) -> Result<Map> {
        match (of, residual) {
            (Kernel::Full(of), _) => Ok(of.forward(x, residual, activation, &self.buffers)),
            (Kernel::Depthwise(of), None) => Ok(of.forward(x, activation, &self.buffers)),
            (Kernel::Depthwise(of), Some(residual)) => {
                self.add(of.forward(x, None, &self.buffers), residual, activation)
            }
        }
    }

    fn add(&self, mut x: Map, residual: &Map, activation: Option<Activation>) -> Result<Map> {
        x.values.iter_mut().zip(&residual.values).for_each(|(x, residual)| *x += residual);
        if let Some(activation) = activation {
            x.activate(activation);
        }
        Ok(x)
    }

    fn max_pool(&self, x: &Map, window: &Window) -> Result<Map> {
        Ok(x.max_pool(window, &self.buffers))
    }

    fn normalize(&self, mut x: Map, norm: &Norm) -> Result<Map> {
        x.normalize(norm);
        Ok(x)
    }

    fn respond(&self, mut x: Map, weight: &Vec<f32>, bias: &Vec<f32>) -> Result<Map> {
        x.respond(weight, bias);
        Ok(x)
    }

    fn mean(&self, x: &Map) -> Result<Map> {
        Ok(x.mean(&self.buffers))
    }

    fn scale(&self, mut x: Map, factors: &Map) -> Result<Map> {
        x.scale(factors);
        Ok(x)
    }

    fn copy(&self, x: &Map) -> Result<Map> {
        let mut copy = self.buffers.take(x.images, x.height, x.width, x.channels);
        copy.values.copy_from_slice(&x.values);
        Ok(copy)
    }

    fn give(&self, x: Map) {
        self.buffers.give(x);
    }

    fn rows(&self, x: Map) -> Result<Tensor> {
        let rows = Tensor::from_slice(&x.values, (x.images, x.channels), &Device::Cpu);
        self.give(x);
        rows
    }
}

impl Network<Cpu> {
    /// `[images, channels]`.
    pub(super) fn forward(&self, images: &[&Image], preprocess: &Preprocess) -> Result<Tensor> {
        let b = &self.backend;
        let (mut all, mut done): (Option<Map>, usize) = (None, 0);
        for (at, image) in images.iter().enumerate() {
            let mut x = b.images(&[image], preprocess)?;
            done = 0;
            while x.pixels() > TOGETHER && done < self.steps.len() {
                x = apply(b, &self.steps[done], x)?;
                done += 1;
            }
            let all = all.get_or_insert_with(|| b.buffers.take(images.len(), x.height, x.width, x.channels));
            let each = x.values.len();
            all.values[at * each..][..each].copy_from_slice(&x.values);
            b.give(x);
        }
        let Some(all) = all else { candle_core::bail!("no images") };
        self.rows(self.steps[done..].iter().try_fold(all, |x, step| apply(b, step, x))?)
    }
}
