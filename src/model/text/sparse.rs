//! From the encoder's hidden states to sparse vectors over the vocabulary: by a head for masked language modelling (SPLADE,
//! arXiv:2109.10086), or by a weight of each token of the text itself (BGE-M3's lexical weights, arXiv:2402.03216,
//! section 3.2).

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::architecture::{Architecture, MaskedLm};
use super::model::ModelError;
use super::sentence::Splade;
use super::tokenize::Tokenizer;
use super::tokenize::vocabulary::content;
use crate::model::kernels::{
    Activation, Epilogue, Linear, Norm, Packed, Precision, Reduction, Slot, Workspace,
};
use crate::model::store::Files;
use crate::model::weights::Weights;

/// The file beside a checkpoint's weights that has the layer of lexical weights, as BGE-M3's.
pub const LEXICAL: &str = "sparse_linear.pt";

/// Token ids are f32 in an answer, which is exact below this.
const MOST_IDS: usize = 1 << 24;

/// Columns of the vocabulary whose logits are computed together. On a CPU, those of a block of tokens stay in the caches;
/// an int8 layer quantizes its input once per block, so a block is not smaller.
const ON_CPU: usize = 2048;
const ON_DEVICE: usize = 8192;

/// What follows the encoder.
pub enum SparseHead {
    Vocabulary(Box<Vocabulary>),
    Lexical {
        /// From a token's hidden state to its weight.
        weight: Box<Linear>,
        /// Ids of tokens that are left out: special tokens.
        special: Vec<u32>,
    },
}

/// A head for masked language modelling, and what becomes of its logits.
pub struct Vocabulary {
    dense: Linear,
    activation: Activation,
    norm: Norm,
    /// The output layer by blocks of the vocabulary, with the number of columns of each.
    out: Vec<(Linear, usize)>,
    splade: Splade,
}

impl SparseHead {
    /// Loads a head for masked language modelling. `root` has no prefix; `words`, `[vocabulary, width]`, is the table of
    /// embeddings; `tied`: it is the output layer's weight too. `precision` is that of the output layer on a CPU.
    ///
    /// # Errors
    /// A tensor is missing or has another shape, or the vocabulary is too large.
    pub fn vocabulary(
        a: &Architecture,
        head: &MaskedLm,
        splade: Splade,
        root: &VarBuilder<'_>,
        (words, tied): (&Tensor, bool),
        precision: Option<Precision>,
    ) -> Result<Self> {
        let width = a.embeddings.width;
        check_ids(a.vocabulary)?;
        let table = match tied {
            true => words.clone(),
            false => root.pp(head.out).get((a.vocabulary, width), "weight")?,
        };
        let bias = match head.biases {
            [] => None,
            names => {
                let found = names.iter().find(|name| root.contains_tensor(name)).unwrap_or(&names[0]);
                Some(root.get(a.vocabulary, found)?)
            }
        };
        let most = if table.device().is_cpu() { ON_CPU } else { ON_DEVICE };
        let block = |start: usize| {
            let columns = most.min(a.vocabulary - start);
            let bias = bias.as_ref().map(|bias| bias.narrow(0, start, columns)).transpose()?;
            Ok((Linear::new(&table.narrow(0, start, columns)?, bias, precision)?, columns))
        };
        Ok(Self::Vocabulary(Box::new(Vocabulary {
            dense: Linear::load(a.hidden, width, head.dense_bias, None, &[root.pp(head.dense)])?,
            activation: head.activation,
            norm: Norm::load(width, a.norm, a.norm_eps, root.pp(head.norm))?,
            out: (0..a.vocabulary).step_by(most).map(block).collect::<Result<_>>()?,
            splade,
        })))
    }

    /// Loads the layer of lexical weights from its own file.
    ///
    /// # Errors
    /// The file or a tensor of it is not as BGE-M3's, or the vocabulary is too large.
    pub fn lexical(
        a: &Architecture,
        files: &Files,
        tokenizer: &Tokenizer,
        like: &VarBuilder<'_>,
    ) -> std::result::Result<Self, ModelError> {
        let weights = Weights::open_file(files, LEXICAL.to_owned())?;
        let vb = VarBuilder::from_backend(Box::new(weights), like.dtype(), like.device().clone());
        let weight = check_ids(a.vocabulary).and_then(|()| Linear::load(a.hidden, 1, true, None, &[vb]));
        let weight =
            weight.map_err(|e| ModelError::Weights(format!("{LEXICAL}: {}", crate::model::message(&e))))?;
        let config = files.json("tokenizer_config.json")?.unwrap_or_default();
        // The defaults are those of XLM-RoBERTa's tokenizer.
        let names =
            [("cls_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>"), ("unk_token", "<unk>")];
        let id = |(key, default)| tokenizer.token_id(content(&config[key]).unwrap_or(default));
        Ok(Self::Lexical { weight: Box::new(weight), special: names.into_iter().filter_map(id).collect() })
    }

    /// Number of elements of weights that are not in the checkpoint's own files.
    pub fn extra_parameters(&self, a: &Architecture) -> usize {
        match self {
            Self::Vocabulary(_) => 0,
            Self::Lexical { .. } => a.hidden + 1,
        }
    }

    /// Whether the vectors of a text's chunks say what that of the whole text is: their largest values, then.
    pub fn is_maximum(&self) -> bool {
        match self {
            Self::Vocabulary(head) => head.splade.reduction == Reduction::Max,
            Self::Lexical { .. } => true,
        }
    }

    /// For each sequence, in the order of the token axis, token ids and values in turn, by increasing id: those that are
    /// greater than 0, or not a number. `x` is `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, batch: &Packed, workspace: &Workspace) -> Result<Vec<Vec<f32>>> {
        match self {
            Self::Vocabulary(head) => head.forward(x, batch, workspace),
            Self::Lexical { weight, special } => {
                let out = workspace.at(Slot::Logits, x.device());
                let weights = weight.forward(x, Epilogue::Activate(Activation::Relu), out)?;
                let weights: Vec<f32> = weights.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                Ok(lexical(&weights, batch, special))
            }
        }
    }
}

impl Vocabulary {
    fn forward(&self, x: &Tensor, batch: &Packed, workspace: &Workspace) -> Result<Vec<Vec<f32>>> {
        let out = |slot| workspace.at(slot, x.device());
        let dense = self.dense.forward(x, Epilogue::Activate(self.activation), out(Slot::Wide))?;
        let hidden = self.norm.forward(&dense, out(Slot::Hidden))?;
        let mut found = vec![Vec::new(); batch.order().len()];
        let mut first = 0;
        for (linear, columns) in &self.out {
            let logits = |tokens: std::ops::Range<usize>| {
                let x = hidden.narrow(0, tokens.start, tokens.len())?;
                linear.forward(&x, Epilogue::Nothing, out(Slot::Logits))
            };
            let rows = self.splade.reduction.rows(batch, *columns, x.device(), out(Slot::Pooled), logits)?;
            let rows: Vec<f32> = rows.flatten_all()?.to_vec1()?;
            for (row, found) in rows.chunks(*columns).zip(&mut found) {
                for (id, &x) in (first..).zip(row) {
                    // NaN fails the record.
                    if x > 0.0 || x.is_nan() {
                        found.extend([id as f32, self.value(x)]);
                    }
                }
            }
            first += columns;
        }
        Ok(found)
    }

    /// The value of a column, from its reduced logits.
    fn value(&self, x: f32) -> f32 {
        match self.splade.reduction {
            Reduction::Max => self.splade.saturation.of(x),
            Reduction::Sum(_) => x,
        }
    }
}

fn check_ids(vocabulary: usize) -> Result<()> {
    if vocabulary > MOST_IDS {
        candle_core::bail!(
            "a vocabulary of {vocabulary} tokens is larger than {MOST_IDS}, which is supported"
        );
    }
    Ok(())
}

/// The largest weight of each token id of each sequence; `weights` has one element per token.
fn lexical(weights: &[f32], batch: &Packed, special: &[u32]) -> Vec<Vec<f32>> {
    let mut rest = batch.ids().iter().zip(weights);
    let of_sequence = |length: usize| {
        let mut largest: BTreeMap<u32, f32> = BTreeMap::new();
        for (&id, &weight) in rest.by_ref().take(length) {
            // NaN fails the record.
            if (weight > 0.0 || weight.is_nan()) && !special.contains(&id) {
                let known = largest.entry(id).or_insert(weight);
                if weight > *known || weight.is_nan() {
                    *known = weight;
                }
            }
        }
        largest.into_iter().flat_map(|(id, weight)| [id as f32, weight]).collect()
    };
    batch.lengths().map(of_sequence).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_weight_of_each_token_counts() {
        let batch = Packed::new(&[(&[0, 7, 5, 7, 2], None), (&[0, 2], None), (&[0, 9, 2], None)]);
        // On the token axis, the shortest sequence comes first.
        let weights = [
            9.0,
            9.0,
            /* 0, 9, 2 */ 9.0,
            f32::NAN,
            9.0,
            /* 0, 7, 5, 7, 2 */ 9.0,
            0.25,
            0.0,
            0.5,
            9.0,
        ];
        let got = lexical(&weights, &batch, &[0, 2]);
        assert!(got[0].is_empty());
        assert!(got[1][0] == 9.0 && got[1][1].is_nan());
        assert_eq!(got[2], [7.0, 0.5]);
    }
}
