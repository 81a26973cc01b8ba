//! A feed-forward block beside a linear layer, which both read the same rows: before the encoder and after the decoder.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::model::kernels::{Activation, Epilogue, Linear, Slot, Workspace};

pub struct ResidualBlock {
    hidden: Linear,
    output: Linear,
    residual: Linear,
    activation: Activation,
}

impl ResidualBlock {
    /// `sizes`: of the input, between the layers, and of the output. Few of a model's weights are here, and they read and
    /// write values of the series: they are never quantized.
    pub fn load(
        [inputs, between, outputs]: [usize; 3],
        activation: Activation,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let linear = |name, inputs, outputs| Linear::load(inputs, outputs, true, None, &[vb.pp(name)]);
        Ok(Self {
            hidden: linear("hidden_layer", inputs, between)?,
            output: linear("output_layer", between, outputs)?,
            residual: linear("residual_layer", inputs, outputs)?,
            activation,
        })
    }

    /// `[rows, inputs]` to `[rows, outputs]`, in `slot`, which is neither [`Slot::Wide`] nor [`Slot::Hidden`], nor that
    /// of the input.
    pub fn forward(&self, x: &Tensor, workspace: &Workspace, slot: Slot) -> Result<Tensor> {
        let out = |slot| workspace.at(slot, x.device());
        let hidden = self.hidden.forward(x, Epilogue::Activate(self.activation), out(Slot::Wide))?;
        let residual = self.residual.forward(x, Epilogue::Nothing, out(Slot::Hidden))?;
        self.output.forward(&hidden, Epilogue::Add(&residual), out(slot))
    }
}
