//! The layers of sentence-transformers that follow the pooling: each reads `[sequences, width]`.

use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;

use super::model::ModelError;
use super::sentence::{self, weights_of};
use crate::model::kernels::{Activation, Epilogue, Linear, Norm, NormKind, Slot, Workspace};
use crate::model::message;
use crate::model::placement::Placement;
use crate::model::store::Files;
use crate::model::weights::Weights;

/// The epsilon of torch's LayerNorm, which a LayerNorm module never changes.
const NORM_EPS: f64 = 1e-5;

enum Layer {
    Dense(Linear, Option<Activation>),
    Norm(Norm),
    Normalize,
}

/// The layers, in their order.
pub struct Layers {
    layers: Vec<Layer>,
    /// Number of values of their output.
    pub width: usize,
    /// Number of elements of their weights.
    pub parameters: usize,
}

impl Layers {
    /// Loads the layers' weights. `width` is that of the pooled vectors.
    ///
    /// # Errors
    /// A file is missing or cannot be read, or a layer's width is not that of the layer before.
    pub fn load(
        list: &[sentence::Layer],
        width: usize,
        files: &Files,
        placement: &Placement,
    ) -> std::result::Result<Self, ModelError> {
        let mut all = Self { layers: Vec::new(), width, parameters: 0 };
        for layer in list {
            let (folder, width) = match layer {
                sentence::Layer::Dense { folder, inputs, .. } => (folder, *inputs),
                sentence::Layer::LayerNorm { folder, width } => (folder, *width),
                sentence::Layer::Normalize => {
                    all.layers.push(Layer::Normalize);
                    continue;
                }
            };
            if width != all.width {
                return Err(ModelError::Unsupported(format!(
                    "{folder}/config.json: the module takes {width} values, but the one before it gives {}",
                    all.width
                )));
            }
            let file = weights_of(folder, |name| files.exists(name));
            let failed = |e: candle_core::Error| ModelError::Weights(format!("{file}: {}", message(&e)));
            let weights = Weights::open_file(files, file.clone())?;
            all.parameters += weights.parameters();
            let vb = VarBuilder::from_backend(Box::new(weights), placement.dtype, placement.device.clone());
            all.layers.push(match layer {
                sentence::Layer::Dense { outputs, bias, activation, .. } => {
                    all.width = *outputs;
                    let linear = Linear::load(width, *outputs, *bias, None, &[vb.pp("linear")]);
                    Layer::Dense(linear.map_err(failed)?, *activation)
                }
                _ => Layer::Norm(
                    Norm::load(width, NormKind::Layer { bias: true }, NORM_EPS, vb.pp("norm"))
                        .map_err(failed)?,
                ),
            });
        }
        Ok(all)
    }

    /// The linear layer of a tower, where it has one. `width` is that of the pooled vectors. Its weights are among those of
    /// the tower, so that they are no parameters of these layers.
    pub fn projection(vb: Option<&VarBuilder<'_>>, width: usize) -> Result<Self> {
        let mut all = Self { layers: Vec::new(), width, parameters: 0 };
        if let Some(vb) = vb.filter(|vb| vb.contains_tensor("weight")) {
            let weight = vb.get_unchecked("weight")?;
            all.width = weight.dim(0)?;
            let bias = vb.contains_tensor("bias");
            let linear = Linear::load(width, all.width, bias, None, std::slice::from_ref(vb))?;
            all.layers.push(Layer::Dense(linear, None));
        }
        Ok(all)
    }

    /// `pooled` is in [`Slot::Pooled`] of the workspace.
    pub fn forward(&self, pooled: Tensor, workspace: &Workspace) -> Result<Tensor> {
        let mut x = pooled;
        // A layer never writes where its input is.
        let slots = [Slot::Hidden, Slot::Logits].into_iter().cycle();
        for (layer, slot) in self.layers.iter().zip(slots) {
            let out = workspace.at(slot, x.device());
            x = match layer {
                Layer::Dense(linear, activation) => {
                    let epilogue = activation.map_or(Epilogue::Nothing, Epilogue::Activate);
                    linear.forward(&x, epilogue, out)?
                }
                Layer::Norm(norm) => norm.forward(&x, out)?,
                Layer::Normalize => unit(&x)?,
            };
        }
        Ok(x)
    }
}

/// Scales each row to length 1, as torch's `normalize` does: a row of zeros stays as it is.
fn unit(x: &Tensor) -> Result<Tensor> {
    let lengths = x.to_dtype(candle_core::DType::F32)?.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    x.broadcast_div(&lengths.maximum(1e-12)?.to_dtype(x.dtype())?)
}
