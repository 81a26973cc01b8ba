//! Networks of convolutions, as a list of steps.

use crate::model::kernels::Activation;
use crate::model::kernels::image::{Padding, Window};

use super::{Checkpoint, Out, VisionError};

/// A network of convolutions. Tensor names are whole.
#[derive(Debug)]
pub struct Convnet {
    /// From the image to the last map.
    pub steps: Vec<Step>,
    /// What follows the mean of the map's pixels.
    pub head: Vec<Step>,
    pub out: Option<Out>,
}

#[derive(Debug)]
pub enum Step {
    Convolution(Convolution),
    /// The largest value of each window. No value of the map may be below 0.
    MaxPool(Window),
    /// A norm of each pixel's channels.
    Normalize {
        name: String,
        eps: f64,
    },
    /// Global response normalisation (ConvNeXt V2): the names of its weight and bias.
    Respond {
        weight: String,
        bias: String,
    },
    /// Factors of the channels, which two layers make of their means (squeeze-and-excitation, arXiv:1709.01507).
    Excite {
        reduce: Convolution,
        expand: Convolution,
    },
    /// The sum of the branch's result and the block's input, activated.
    Residual {
        branch: Vec<Step>,
        /// Of the block's input, where its shape is another one.
        shortcut: Option<Convolution>,
        activation: Option<Activation>,
    },
}

/// A convolution, the batch normalization after it and the activation. A linear layer of each pixel is one of 1 × 1.
#[derive(Debug)]
pub struct Convolution {
    pub weight: String,
    pub bias: Option<String>,
    pub norm: Option<BatchNorm>,
    /// Factors of the outputs (layer scale).
    pub scale: Option<String>,
    pub window: Window,
    pub activation: Option<Activation>,
}

#[derive(Debug, Clone)]
pub struct BatchNorm {
    pub name: String,
    /// Added to the variance.
    pub eps: f64,
}

/// Where zeros are put around a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Zeros {
    Nowhere,
    /// As many as give `⌈size / stride⌉` outputs, the same before and after: torch's models.
    Around,
    /// TensorFlow's SAME.
    Same,
}

impl Checkpoint<'_> {
    /// A convolution whose tensors are `{name}.weight` and, if there is one, `{name}.bias`.
    pub(super) fn convolution(
        &self,
        name: &str,
        stride: usize,
        zeros: Zeros,
    ) -> Result<Convolution, VisionError> {
        let weight = format!("{name}.weight");
        let size = match self.weights.shape(&weight) {
            Some([_, _]) => 1,
            Some([_, _, height, width]) if height == width => *height,
            Some(shape) => {
                let message =
                    format!("{weight} is {shape:?}, which is no convolution over squares of pixels");
                return Err(VisionError::Unsupported(message));
            }
            None => return Err(VisionError::Unsupported(format!("its weights have no {weight}"))),
        };
        let padding = match zeros {
            Zeros::Nowhere => Padding::Around(0, 0),
            Zeros::Around => Padding::Around((size - 1) / 2, (size - 1) / 2),
            Zeros::Same => Padding::Same,
        };
        let bias = Some(format!("{name}.bias")).filter(|bias| self.has(bias));
        let window = Window { size, stride, padding };
        Ok(Convolution { weight, bias, norm: None, scale: None, window, activation: None })
    }
}

impl Convolution {
    pub(super) fn norm(self, name: impl Into<String>, eps: f64) -> Self {
        Self { norm: Some(BatchNorm { name: name.into(), eps }), ..self }
    }

    pub(super) fn activated(self, activation: Activation) -> Self {
        Self { activation: Some(activation), ..self }
    }
}

impl From<Convolution> for Step {
    fn from(convolution: Convolution) -> Self {
        Self::Convolution(convolution)
    }
}
