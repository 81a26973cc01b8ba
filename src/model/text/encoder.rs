//! The text encoder: token ids to the last layer's hidden states. One implementation for the whole family.
//!
//! A batch is one axis of tokens, sequence after sequence ([`Packed`]), without padding. Attention stays within a
//! sequence, so a sequence's result does not depend on its neighbours.

use std::sync::Mutex;

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::{Architecture, Positions};
use super::trunk::Trunk;
use crate::model::kernels::{Embedding, Epilogue, Linear, Norm, Packed, Precision, Slot, Workspace};

pub struct Encoder {
    architecture: Architecture,
    device: Device,
    embedding: Embedding,
    /// From the embedding's width to the trunk's, where they differ.
    projection: Option<Linear>,
    /// The norm of the embeddings, where it follows the projection.
    norm: Option<Norm>,
    trunk: Trunk,
    /// Idle workspaces; there are as many in all as forward passes have run at the same time.
    workspaces: Mutex<Vec<Workspace>>,
}

impl Encoder {
    /// `vb` has the encoder's prefix. `precision` is that of the matrix weights on a CPU, if not f32.
    pub fn load(
        architecture: Architecture,
        vb: &VarBuilder<'_>,
        precision: Option<Precision>,
    ) -> Result<Self> {
        let a = &architecture;
        let width = a.embeddings.width;
        let table = |name: &str, count: usize| vb.pp(name).get((count, width), "weight");
        let norm = |size| {
            let name = a.embeddings.norm;
            name.map(|name| Norm::load(size, a.norm, a.norm_eps, vb.pp(name))).transpose()
        };
        let projection = &a.embeddings.projection;
        let norm_last = projection.as_ref().is_some_and(|projection| projection.before_norm);
        let embedding = Embedding {
            word: table(a.embeddings.word, a.vocabulary)?,
            types: a.embeddings.token_type.map(|(name, count)| table(name, count)).transpose()?,
            positions: match a.positions {
                Positions::Learned { name, count, first } => Some((table(name, count)?, first)),
                Positions::Rotary { .. } | Positions::Relative { .. } => None,
            },
            scale: a.embeddings.scale,
            norm: if norm_last { None } else { norm(width)? },
        };
        let projection = match projection {
            Some(p) => Some(Linear::load(width, a.hidden, p.bias, precision, &[vb.pp(p.name)])?),
            None => None,
        };
        let norm = if norm_last { norm(a.hidden)? } else { None };
        let expected = match (&projection, &norm) {
            (Some(_), norm) => norm.as_ref().and_then(Norm::expected),
            (None, _) => embedding.norm.as_ref().and_then(Norm::expected),
        };
        let trunk = Trunk::load(&a.blocks(), vb, precision, expected)?;
        let (device, workspaces) = (vb.device().clone(), Mutex::default());
        Ok(Self { architecture, device, embedding, projection, norm, trunk, workspaces })
    }

    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The embeddings of all tokens, `[vocabulary, width]`.
    pub fn word_table(&self) -> &Tensor {
        &self.embedding.word
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Calls `head` with the last layer's output, `[tokens, hidden]`, and the workspace that holds it.
    ///
    /// # Errors
    /// A sequence is longer than the model takes, a token id is outside its table, or the device fails.
    pub fn forward<T>(
        &self,
        batch: &Packed,
        head: impl FnOnce(&Tensor, &Workspace) -> Result<T>,
    ) -> Result<T> {
        let longest = batch.lengths().max().unwrap_or(0);
        if longest > self.architecture.max_tokens() {
            candle_core::bail!("{longest} tokens; the model's limit is {}", self.architecture.max_tokens());
        }
        let kept = || self.workspaces.lock().unwrap_or_else(|e| e.into_inner());
        let workspace = kept().pop().unwrap_or_default();
        let result = self
            .embed(batch, &workspace)
            .and_then(|x| self.trunk.forward(x, batch, &workspace))
            .and_then(|x| head(&x, &workspace));
        kept().push(workspace);
        result
    }

    fn embed(&self, batch: &Packed, workspace: &Workspace) -> Result<Tensor> {
        let out = |slot| workspace.at(slot, &self.device);
        match (&self.projection, &self.norm) {
            (None, _) => self.embedding.forward(batch, out(Slot::Stream)),
            (Some(projection), norm) => {
                let narrow = self.embedding.forward(batch, out(Slot::Mixed))?;
                match norm {
                    None => projection.forward(&narrow, Epilogue::Nothing, out(Slot::Stream)),
                    Some(norm) => {
                        let wide = projection.forward(&narrow, Epilogue::Nothing, out(Slot::Attended))?;
                        norm.forward(&wide, out(Slot::Stream))
                    }
                }
            }
        }
    }
}
