//! Networks of convolutions: one walk over the steps of an architecture, for two kinds of devices. Batch normalization is part
//! of the weights.

mod cpu;
mod device;
#[cfg(test)]
mod tests;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use self::cpu::Cpu;
use self::device::Candle;
use super::architecture::convnet::{Convnet as Spec, Convolution as ConvolutionSpec, Step as StepSpec};
use super::model::Image;
use super::preprocess::Preprocess;
use super::tower::output_layer;
use crate::model::kernels::image::Window;
use crate::model::kernels::{Activation, Epilogue, Linear, Norm, NormKind, Slot, Transfer, Workspace};

/// The weights of a convolution in f32, batch normalization and layer scale included.
struct Weights {
    /// `[outputs, channels, size, size]`; of a depthwise convolution, `[channels, 1, size, size]`.
    weight: Tensor,
    /// `[outputs]`.
    bias: Tensor,
    window: Window,
    is_depthwise: bool,
}

/// How a kind of devices computes the steps. A map is of several images.
trait Backend: Sized {
    type Map;
    type Convolution;
    /// One value per channel.
    type Channels;

    fn convolution(&self, weights: Weights) -> Result<Self::Convolution>;
    fn channels(&self, values: &Tensor) -> Result<Self::Channels>;
    /// The maps of images, as a network takes them.
    fn images(&self, images: &[&Image], preprocess: &Preprocess) -> Result<Self::Map>;
    /// A convolution, plus `residual` if there is one, activated.
    fn convolve(
        &self,
        of: &Self::Convolution,
        x: &Self::Map,
        residual: Option<&Self::Map>,
        activation: Option<Activation>,
    ) -> Result<Self::Map>;
    fn add(&self, x: Self::Map, residual: &Self::Map, activation: Option<Activation>) -> Result<Self::Map>;
    fn max_pool(&self, x: &Self::Map, window: &Window) -> Result<Self::Map>;
    fn normalize(&self, x: Self::Map, norm: &Norm) -> Result<Self::Map>;
    fn respond(&self, x: Self::Map, weight: &Self::Channels, bias: &Self::Channels) -> Result<Self::Map>;
    /// The mean of each image's channels.
    fn mean(&self, x: &Self::Map) -> Result<Self::Map>;
    fn scale(&self, x: Self::Map, factors: &Self::Map) -> Result<Self::Map>;
    fn copy(&self, x: &Self::Map) -> Result<Self::Map>;
    /// Takes back the memory of a map.
    fn give(&self, x: Self::Map);
    /// A map of one pixel per image as `[images, channels]`.
    fn rows(&self, x: Self::Map) -> Result<Tensor>;
}

enum Step<B: Backend> {
    Convolution(B::Convolution, Option<Activation>),
    MaxPool(Window),
    Normalize(Norm),
    Respond(B::Channels, B::Channels),
    Excite { reduce: (B::Convolution, Option<Activation>), expand: (B::Convolution, Option<Activation>) },
    Residual { branch: Vec<Step<B>>, shortcut: Option<B::Convolution>, activation: Option<Activation> },
}

impl Weights {
    /// `channels`: those of the input. Also returns those of the output.
    fn load(of: &ConvolutionSpec, channels: usize, vb: &VarBuilder<'_>) -> Result<(Self, usize)> {
        let get = |name: &str| vb.get_unchecked_dtype(name, DType::F32)?.to_device(&Device::Cpu);
        let weight = get(&of.weight)?;
        let size = of.window.size;
        let outputs = weight.dim(0)?;
        let each = weight.elem_count() / outputs / (size * size);
        let is_depthwise = each == 1 && outputs == channels && channels > 1;
        if each != channels && !is_depthwise {
            candle_core::bail!(
                "{} is a convolution of {each} of {channels} channels in groups, which is not supported",
                of.weight
            );
        }
        let weight = weight.reshape((outputs, each, size, size))?;
        let vector = |name: &str| -> Result<Tensor> {
            let vector = get(name)?.flatten_all()?;
            match vector.elem_count() == outputs {
                true => Ok(vector),
                false => candle_core::bail!("{name} has {} elements, not {outputs}", vector.elem_count()),
            }
        };
        let bias = match &of.bias {
            Some(name) => vector(name)?,
            None => Tensor::zeros(outputs, DType::F32, &Device::Cpu)?,
        };
        let (weight, bias) = match &of.norm {
            None => (weight, bias),
            Some(norm) => {
                let part = |tail: &str| vector(&format!("{}.{tail}", norm.name));
                let factor = (part("weight")? / (part("running_var")? + norm.eps)?.sqrt()?)?;
                let bias = (part("bias")? + ((bias - part("running_mean")?)? * &factor)?)?;
                (weight.broadcast_mul(&factor.reshape((outputs, 1, 1, 1))?)?, bias)
            }
        };
        let (weight, bias) = match &of.scale {
            None => (weight, bias),
            Some(name) => {
                let scale = vector(name)?;
                (weight.broadcast_mul(&scale.reshape((outputs, 1, 1, 1))?)?, (bias * scale)?)
            }
        };
        Ok((Self { weight, bias, window: of.window, is_depthwise }, outputs))
    }
}

/// The side of the last map of an image with a side of `length` pixels.
///
/// # Errors
/// A map is smaller than what reads it.
fn side(steps: &[StepSpec], length: usize) -> Result<usize> {
    let read = |window: &Window, length: usize| match window.fits(length) {
        true => Ok(window.outputs(length).0),
        false => candle_core::bail!(
            "the images are too small for this network: {length} pixels are left for {window:?}"
        ),
    };
    steps.iter().try_fold(length, |length, step| match step {
        StepSpec::Convolution(of) => read(&of.window, length),
        StepSpec::MaxPool(window) => read(window, length),
        StepSpec::Residual { branch, .. } => side(branch, length),
        StepSpec::Normalize { .. } | StepSpec::Respond { .. } | StepSpec::Excite { .. } => Ok(length),
    })
}

/// Loads steps. `channels`: those of the input, then those of the output.
fn load<B: Backend>(
    steps: &[StepSpec],
    channels: &mut usize,
    vb: &VarBuilder<'_>,
    backend: &B,
) -> Result<Vec<Step<B>>> {
    let convolution = |of: &ConvolutionSpec, channels: &mut usize| {
        let weights;
        (weights, *channels) = Weights::load(of, *channels, vb)?;
        Ok::<_, candle_core::Error>((backend.convolution(weights)?, of.activation))
    };
    let one = |step: &StepSpec| {
        Ok(match step {
            StepSpec::Convolution(of) => {
                let (convolution, activation) = convolution(of, channels)?;
                Step::Convolution(convolution, activation)
            }
            StepSpec::MaxPool(window) => Step::MaxPool(*window),
            StepSpec::Normalize { name, eps } => {
                Step::Normalize(Norm::load(*channels, NormKind::Layer { bias: true }, *eps, vb.pp(name))?)
            }
            StepSpec::Respond { weight, bias } => {
                let part = |name: &str| {
                    let values = vb.get_unchecked_dtype(name, DType::F32)?.flatten_all()?;
                    match values.elem_count() == *channels {
                        true => backend.channels(&values),
                        false => candle_core::bail!("{name} does not have {channels} elements"),
                    }
                };
                Step::Respond(part(weight)?, part(bias)?)
            }
            StepSpec::Excite { reduce, expand } => {
                let mut inner = *channels;
                let excite = Step::Excite {
                    reduce: convolution(reduce, &mut inner)?,
                    expand: convolution(expand, &mut inner)?,
                };
                match inner == *channels {
                    true => excite,
                    false => candle_core::bail!("{} has {inner} outputs, not {channels}", expand.weight),
                }
            }
            StepSpec::Residual { branch, shortcut, activation } => {
                let mut around = *channels;
                let branch = load(branch, channels, vb, backend)?;
                let shortcut =
                    shortcut.as_ref().map(|of| Ok::<_, candle_core::Error>(convolution(of, &mut around)?.0));
                let shortcut = shortcut.transpose()?;
                if around != *channels {
                    candle_core::bail!("a block adds {around} channels to {channels}");
                }
                Step::Residual { branch, shortcut, activation: *activation }
            }
        })
    };
    steps.iter().map(one).collect()
}

/// One step.
fn apply<B: Backend>(b: &B, step: &Step<B>, x: B::Map) -> Result<B::Map> {
    match step {
        Step::Convolution(of, activation) => {
            let y = b.convolve(of, &x, None, *activation)?;
            b.give(x);
            Ok(y)
        }
        Step::MaxPool(window) => {
            let y = b.max_pool(&x, window)?;
            b.give(x);
            Ok(y)
        }
        Step::Normalize(norm) => b.normalize(x, norm),
        Step::Respond(weight, bias) => b.respond(x, weight, bias),
        Step::Excite { reduce, expand } => {
            let mean = b.mean(&x)?;
            let reduced = b.convolve(&reduce.0, &mean, None, reduce.1)?;
            let factors = b.convolve(&expand.0, &reduced, None, expand.1)?;
            let y = b.scale(x, &factors)?;
            [mean, reduced, factors].into_iter().for_each(|map| b.give(map));
            Ok(y)
        }
        Step::Residual { branch, shortcut, activation } => {
            let shortcut = shortcut.as_ref().map(|of| b.convolve(of, &x, None, None)).transpose()?;
            let residual = shortcut.as_ref().unwrap_or(&x);
            let mut y: Option<B::Map> = None;
            let mut is_added = false;
            for (at, step) in branch.iter().enumerate() {
                let input = y.take();
                y = Some(match (step, input) {
                    (Step::Convolution(of, None), input) if at + 1 == branch.len() => {
                        is_added = true;
                        let sum =
                            b.convolve(of, input.as_ref().unwrap_or(&x), Some(residual), *activation)?;
                        if let Some(input) = input {
                            b.give(input);
                        }
                        sum
                    }
                    (Step::Convolution(of, activation), None) => b.convolve(of, &x, None, *activation)?,
                    (step, Some(input)) => apply(b, step, input)?,
                    (step, None) => apply(b, step, b.copy(&x)?)?,
                });
            }
            let y = match (y, is_added) {
                (Some(y), true) => y,
                (Some(y), false) => b.add(y, residual, *activation)?,
                (None, _) => candle_core::bail!("a block without steps"),
            };
            if let Some(shortcut) = shortcut {
                b.give(shortcut);
            }
            b.give(x);
            Ok(y)
        }
    }
}

/// A network on a kind of devices.
struct Network<B: Backend> {
    backend: B,
    steps: Vec<Step<B>>,
    head: Vec<Step<B>>,
}

impl<B: Backend> Network<B> {
    /// Also returns the channels at its end.
    fn load(spec: &Spec, vb: &VarBuilder<'_>, backend: B) -> Result<(Self, usize)> {
        let mut channels = 3;
        let steps = load(&spec.steps, &mut channels, vb, &backend)?;
        let head = load(&spec.head, &mut channels, vb, &backend)?;
        Ok((Self { backend, steps, head }, channels))
    }

    /// What follows the last map: `[images, channels]`.
    fn rows(&self, x: B::Map) -> Result<Tensor> {
        let b = &self.backend;
        let mean = b.mean(&x)?;
        b.give(x);
        b.rows(self.head.iter().try_fold(mean, |x, step| apply(b, step, x))?)
    }
}

enum Kind {
    /// In f32.
    Cpu(Network<Cpu>),
    Candle(Network<Candle>),
}

pub struct Convnet {
    device: Device,
    dtype: DType,
    network: Kind,
    out: Option<Linear>,
    /// Values of the answer.
    pub width: usize,
}

impl Convnet {
    pub fn load(spec: &Spec, preprocess: &Preprocess, vb: &VarBuilder<'_>) -> Result<Self> {
        for length in [preprocess.height, preprocess.width] {
            side(&spec.steps, length)?;
        }
        let (network, width) = match vb.device().is_cpu() && vb.dtype() == DType::F32 {
            true => {
                let (network, width) = Network::load(spec, vb, Cpu::default())?;
                (Kind::Cpu(network), width)
            }
            false => {
                let backend = Candle { device: vb.device().clone(), dtype: vb.dtype() };
                let (network, width) = Network::load(spec, vb, backend)?;
                (Kind::Candle(network), width)
            }
        };
        Ok(Self {
            device: vb.device().clone(),
            dtype: vb.dtype(),
            network,
            out: spec.out.as_ref().map(|out| output_layer(out, width, vb)).transpose()?,
            width: spec.out.as_ref().map_or(width, |out| out.outputs),
        })
    }

    /// Starts to copy the answers to the host: `width` values of each image.
    pub fn forward(&self, images: &[&Image], preprocess: &Preprocess) -> Result<Transfer> {
        let rows = match &self.network {
            Kind::Cpu(network) => network.forward(images, preprocess)?,
            Kind::Candle(network) => network.forward(images, preprocess)?,
        };
        let workspace = Workspace::default();
        let rows = match &self.out {
            Some(out) => {
                let rows = rows.to_dtype(self.dtype)?;
                out.forward(&rows, Epilogue::Nothing, workspace.at(Slot::Logits, &self.device))?
            }
            None => rows,
        };
        Transfer::start(&rows.to_dtype(DType::F32)?)
    }
}
