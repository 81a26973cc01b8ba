//! What attention adds to its scores by the distance between query and key, loaded from a checkpoint.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::{Blocks, RelativeBias};
use crate::model::kernels::{
    Attention, Buckets, Disentangled, DistanceBias, Epilogue, Linear, Norm, PairBias, Slot, Workspace,
};

/// What the layers of a model share.
pub enum Relative<'a> {
    Nothing,
    Bias(Arc<DistanceBias>),
    /// One per layer.
    Pairs(Vec<Arc<PairBias>>),
    Positions {
        /// `[2 × span, hidden]`.
        table: Tensor,
        buckets: Arc<Buckets>,
        keys: Option<&'a fn(usize) -> String>,
        queries: Option<&'a fn(usize) -> String>,
    },
}

impl<'a> Relative<'a> {
    pub fn load(a: &Blocks<'a>, vb: &VarBuilder<'_>) -> Result<Self> {
        let longest = a.max_tokens;
        Ok(match a.relative_bias {
            None => Self::Nothing,
            Some(RelativeBias::Buckets { name, buckets, max_distance }) => {
                let weight = vb.pp(name).get((*buckets, a.heads.queries), "weight")?;
                Self::Bias(Arc::new(DistanceBias::new(&weight, *max_distance, longest)?))
            }
            Some(RelativeBias::Patches(names)) => {
                let of = |name: &String| pairs(&vb.get_unchecked(name)?, longest, name).map(Arc::new);
                Self::Pairs(names.iter().map(of).collect::<Result<_>>()?)
            }
            Some(RelativeBias::Slopes) => {
                Self::Bias(Arc::new(DistanceBias::alibi(a.heads.queries, longest, vb.device())?))
            }
            Some(RelativeBias::Disentangled { name, norm, span, max_distance, keys, queries }) => {
                let table = vb.pp(name).get((2 * span, a.hidden), "weight")?;
                let table = match norm {
                    Some(norm) => {
                        let norm = Norm::load(a.hidden, a.norm, a.norm_eps, vb.pp(norm))?;
                        norm.forward(&table, Workspace::default().at(Slot::Mixed, vb.device()))?
                    }
                    None => table,
                };
                let buckets = Arc::new(Buckets::new(*span, *max_distance, longest));
                Self::Positions { table, buckets, keys: keys.as_ref(), queries: queries.as_ref() }
            }
        })
    }

    /// The attention of a layer. Positions are projected here, once: the projections depend only on weights.
    pub fn attention(&self, a: &Blocks<'_>, layer: usize, vb: &VarBuilder<'_>) -> Result<Attention> {
        let (heads, mask) = (a.heads, a.layers[layer].mask);
        let mut attention = Attention {
            keys: heads.keys,
            scale: heads.scale as f32,
            ..Attention::new(heads.queries, heads.width, mask)
        };
        match self {
            Self::Nothing => {}
            Self::Bias(bias) => attention.distances = Some(Arc::clone(bias)),
            Self::Pairs(biases) => attention.pairs = Some(Arc::clone(&biases[layer])),
            Self::Positions { table, buckets, keys, queries } => {
                let workspace = Workspace::default();
                let project = |name: &fn(usize) -> String, slot| {
                    let linear = Linear::load(a.hidden, a.hidden, true, None, &[vb.pp(name(layer))])?;
                    linear.forward(table, Epilogue::Nothing, workspace.at(slot, vb.device()))
                };
                let keys = keys.map(|name| project(name, Slot::Wide)).transpose()?;
                let queries = queries.map(|name| project(name, Slot::Mixed)).transpose()?;
                let buckets = Arc::clone(buckets);
                let terms = Disentangled::new(heads.queries, keys.as_ref(), queries.as_ref(), buckets)?;
                attention.scale = terms.scale(heads.width);
                attention.disentangled = Some(terms);
            }
        }
        Ok(attention)
    }
}

/// A bias for each pair of `tokens` tokens: one, then the patches of a square, row after row. `table` is
/// `[distances + 3, heads]`: the last three are of the first token as query, as key, and as both.
fn pairs(table: &Tensor, tokens: usize, name: &str) -> Result<PairBias> {
    let side = (tokens - 1).isqrt();
    let (rows, heads) = table.dims2()?;
    let width = 2 * side - 1;
    if side * side + 1 != tokens || width * width + 3 != rows {
        candle_core::bail!(
            "{name} has {rows} distances, which are not those of {} patches: the images have to be of the size of the training",
            tokens - 1
        );
    }
    let index = |query: usize, key: usize| match (query.checked_sub(1), key.checked_sub(1)) {
        (None, Some(_)) => rows - 3,
        (Some(_), None) => rows - 2,
        (None, None) => rows - 1,
        (Some(query), Some(key)) => {
            let (down, right) = (query / side + side - 1 - key / side, query % side + side - 1 - key % side);
            down * width + right
        }
    };
    let all = (0..tokens).flat_map(|query| (0..tokens).map(move |key| index(query, key) as u32)).collect();
    let all = Tensor::from_vec(all, tokens * tokens, table.device())?;
    PairBias::new(&table.index_select(&all, 0)?.t()?.reshape((heads, tokens, tokens))?)
}
