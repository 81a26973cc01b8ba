//! Patches to the encoder's hidden states: a block that embeds each patch, the register token, and the packed trunk.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::SeriesConfig;
use super::patches::Patches;
use super::residual::ResidualBlock;
use crate::model::kernels::{Packed, Precision, Slot, Workspace, upload};
use crate::model::text::Trunk;

/// Row of the embeddings that is the register token.
const REGISTER: usize = 1;

pub struct Encoder {
    embed: ResidualBlock,
    /// `[1, hidden]`.
    register: Option<Tensor>,
    trunk: Trunk,
    /// Points of a patch.
    patch: usize,
    device: Device,
    dtype: DType,
}

impl Encoder {
    pub fn load(config: &SeriesConfig, root: &VarBuilder<'_>, precision: Option<Precision>) -> Result<Self> {
        let a = &config.encoder;
        let register = match config.register {
            true => Some(root.get((a.vocabulary, a.hidden), "shared.weight")?.narrow(0, REGISTER, 1)?),
            false => None,
        };
        let sizes = [2 * config.patch, a.intermediate, a.hidden];
        Ok(Self {
            embed: ResidualBlock::load(sizes, config.activation, &root.pp("input_patch_embedding"))?,
            register,
            trunk: Trunk::load(&a.blocks(), &root.pp("encoder"), precision, None)?,
            patch: config.patch,
            device: root.device().clone(),
            dtype: root.dtype(),
        })
    }

    /// `[tokens, hidden]` in a buffer of its own. `batch` has the sequences in the order of `series`.
    pub fn forward(&self, series: &[&Patches], batch: &Packed, workspace: &Workspace) -> Result<Tensor> {
        let rows: Vec<f32> = series.iter().flat_map(|series| &series.rows).copied().collect();
        let width = 2 * self.patch;
        let patches = rows.len() / width;
        let rows = Tensor::from_vec(rows, (patches, width), &self.device)?.to_dtype(self.dtype)?;
        let mut x = self.embed.forward(&rows, workspace, Slot::Stream)?;
        if let Some(register) = &self.register {
            let (mut index, mut next) = (Vec::with_capacity(batch.tokens()), 0);
            for series in series {
                let end = next + series.tokens() as u32 - 1;
                index.extend(next..end);
                index.push(patches as u32);
                next = end;
            }
            x = Tensor::cat(&[&x, register], 0)?.index_select(&upload(&index, &self.device)?, 0)?;
        }
        self.trunk.forward(x, batch, workspace)?.copy()
    }
}
