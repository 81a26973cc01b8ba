//! Token ids to the first layer's input: the sum of embedding rows, scaled and normalised where the model does so here.

#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Storage, Tensor};

use super::norm::Norm;
use super::{Out, Packed, floats, floats_mut};

pub struct Embedding {
    /// `[vocabulary, hidden]`.
    pub word: Tensor,
    /// `[positions, hidden]`, and which of its rows is for a sequence's first token.
    pub positions: Option<(Tensor, usize)>,
    /// `[types, hidden]`.
    pub types: Option<Tensor>,
    /// Factor of the word's row.
    pub scale: Option<f64>,
    pub norm: Option<Norm>,
}

impl Embedding {
    /// `[tokens, hidden]`. An id outside of its table is an error.
    pub fn forward(&self, batch: &Packed, out: Out<'_>) -> Result<Tensor> {
        let (vocabulary, hidden) = self.word.dims2()?;
        // Checked here: a GPU would read past the table.
        if let Some(id) = batch.ids().iter().find(|&&id| id as usize >= vocabulary) {
            candle_core::bail!("token id {id} is outside the model's vocabulary of {vocabulary}");
        }
        if let (Some(table), Some(types)) = (&self.types, batch.type_ids()) {
            let count = table.dim(0)?;
            if let Some(id) = types.iter().find(|&&id| id as usize >= count) {
                candle_core::bail!("token type {id} is outside the model's {count} token types");
            }
        }
        match out.view(batch.tokens(), hidden)? {
            Some(y) => {
                y.inplace_op1(&Sum { embedding: self, batch })?;
                Ok(y)
            }
            None => {
                #[cfg(feature = "cuda")]
                if self.word.device().is_cuda() && self.norm.as_ref().is_none_or(Norm::is_layer) {
                    return super::cuda::embed(self, batch);
                }
                self.tensors(batch, self.word.device())
            }
        }
    }

    /// The position table, starting with the row for a sequence's first token.
    pub(super) fn position_table(&self) -> Result<Option<Tensor>> {
        match &self.positions {
            Some((table, first)) => table.narrow(0, *first, table.dim(0)? - first).map(Some),
            None => Ok(None),
        }
    }

    /// The factor in the table's type, as in transformers.
    #[cfg(feature = "cuda")]
    pub(super) fn rounded_scale(&self) -> f32 {
        let scale = self.scale.unwrap_or(1.0);
        match self.word.dtype() {
            DType::BF16 => half::bf16::from_f64(scale).to_f32(),
            DType::F16 => half::f16::from_f64(scale).to_f32(),
            _ => scale as f32,
        }
    }

    /// The unfused form, by Candle's own operations.
    pub(super) fn tensors(&self, batch: &Packed, device: &Device) -> Result<Tensor> {
        let indices = batch.on(device)?;
        let mut x = self.word.index_select(&indices.ids, 0)?;
        if let Some(scale) = self.scale {
            // In the table's type, the factor is rounded to that type first, as in transformers.
            x = (x * scale)?;
        }
        if let Some(table) = self.position_table()? {
            x = (x + table.index_select(&indices.positions, 0)?)?;
        }
        if let Some(table) = &self.types {
            x = match &indices.types {
                Some(types) => (x + table.index_select(types, 0)?)?,
                None => x.broadcast_add(&table.narrow(0, 0, 1)?)?,
            };
        }
        match &self.norm {
            Some(norm) => norm.tensor(&x),
            None => Ok(x),
        }
    }
}

struct Sum<'a> {
    embedding: &'a Embedding,
    batch: &'a Packed,
}

impl InplaceOp1 for Sum<'_> {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Embedding { word, positions, types, scale, norm } = self.embedding;
        let guards = [Some(word), positions.as_ref().map(|(table, _)| table), types.as_ref()]
            .map(|table| table.map(Tensor::storage_and_layout));
        let mut tables = [None; 3];
        for (table, guard) in tables.iter_mut().zip(&guards) {
            if let Some((storage, layout)) = guard {
                let Storage::Cpu(storage) = &**storage else {
                    candle_core::bail!("an embedding table is not on the CPU")
                };
                *table = Some(floats(storage, layout)?);
            }
        }
        let [Some(word), places, types] = tables else { unreachable!("the word table is not optional") };
        let hidden = self.embedding.word.dim(1)?;
        let row = |table, row: usize| -> &[f32] { &<&[f32]>::clone(&table)[row * hidden..][..hidden] };
        let out = floats_mut(out, layout)?;
        let (mut token, first) = (0, positions.as_ref().map_or(0, |(_, first)| *first));
        for length in self.batch.lengths() {
            for position in first..first + length {
                let out = &mut out[token * hidden..][..hidden];
                out.copy_from_slice(row(word, self.batch.ids()[token] as usize));
                if let Some(scale) = *scale {
                    out.iter_mut().for_each(|x| *x *= scale as f32);
                }
                if let Some(table) = places {
                    add(out, row(table, position));
                }
                if let Some(table) = types {
                    add(out, row(table, self.batch.type_ids().map_or(0, |ids| ids[token] as usize)));
                }
                token += 1;
            }
        }
        if let Some(norm) = norm {
            norm.rows(out);
        }
        Ok(())
    }
}

fn add(out: &mut [f32], row: &[f32]) {
    for (x, y) in out.iter_mut().zip(row) {
        *x += y;
    }
}
