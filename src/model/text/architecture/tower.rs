//! The towers of texts of CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343), with the tensor names of transformers. Both
//! are pre-norm; CLIP's is causal and pools the end of the text, SigLIP's reads texts padded to a fixed length, as it was
//! trained, and pools the last token, padding or not.

use super::*;

/// How the tokens of a text become the vector that is compared with those of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tower {
    pub end: End,
    /// The layer after the pooling; a checkpoint may lack it.
    pub projection: &'static str,
    /// It is under the encoder's prefix, and has a bias.
    pub in_encoder: bool,
}

/// Where a text ends: the token there is pooled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The first token with this id; those after it have no effect.
    First(u32),
    /// The first of the tokens with the highest id: CLIP's checkpoints whose `eos_token_id` is 2, which is not their
    /// tokenizer's.
    Highest,
    /// The end of the padding. `id`: of a padding token, if the tokenizer does not say.
    Padded { id: u32 },
}

impl End {
    /// Makes a text's tokens those that the model reads, the last of which is pooled. `most` is the longest sequence.
    pub fn apply(self, ids: &mut Vec<u32>, most: usize) {
        let at = match self {
            Self::Padded { id } => return ids.resize(most.max(ids.len()), id),
            Self::First(end) => ids.iter().position(|&id| id == end),
            Self::Highest => {
                let highest = ids.iter().max();
                ids.iter().position(|id| Some(id) == highest)
            }
        };
        // A text without an end has its first token pooled, as in transformers.
        ids.truncate(at.unwrap_or(0) + 1);
    }
}

pub(super) fn clip(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let end = match config.get("eos_token_id").as_u64() {
        Some(2) => End::Highest,
        Some(id) => End::First(id as u32),
        None => End::First(49407),
    };
    let tower = Tower { end, projection: "text_projection", in_encoder: false };
    let sizes = Sizes { hidden: 512, intermediate: 2048, heads: 8, vocabulary: 49408, positions: 77 };
    describe(config, tower, &sizes, Mask::Causal, "quick_gelu", 1e-5)
}

pub(super) fn siglip(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let id = config.get("pad_token_id").as_u64().unwrap_or(1) as u32;
    let tower = Tower { end: End::Padded { id }, projection: "head", in_encoder: true };
    let sizes = Sizes { hidden: 768, intermediate: 3072, heads: 12, vocabulary: 32000, positions: 64 };
    describe(config, tower, &sizes, Mask::Full, "gelu_pytorch_tanh", 1e-6)
}

/// The defaults of transformers: checkpoints leave out what equals them.
struct Sizes {
    hidden: usize,
    intermediate: usize,
    heads: usize,
    vocabulary: usize,
    positions: usize,
}

fn describe(
    config: &Config<'_>,
    tower: Tower,
    sizes: &Sizes,
    mask: Mask,
    activation: &str,
    norm_eps: f64,
) -> Result<Architecture, ConfigError> {
    // The weights have the projection's size; initial values are for training.
    for key in ["projection_dim", "projection_size", "initializer_factor", "logit_scale_init_value"] {
        config.get(key);
    }
    let hidden = config.size_or("hidden_size", sizes.hidden)?;
    let heads = config.size_or("num_attention_heads", sizes.heads)?;
    if !hidden.is_multiple_of(heads) {
        return Err(ConfigError(format!("num_attention_heads {heads} does not divide the width {hidden}")));
    }
    let width = hidden / heads;
    let layers = (0..config.size_or("num_hidden_layers", 12)?).map(|i| {
        let name = |tail: &str| format!("encoder.layers.{i}.{tail}");
        Layer {
            qkv: Qkv::Separate(["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj")))),
            attention_out: name("self_attn.out_proj"),
            attention_norm: Some(name("layer_norm1")),
            up: vec![name("mlp.fc1")],
            down: name("mlp.fc2"),
            mlp_norm: name("layer_norm2"),
            branch_norms: None,
            scales: None,
            qk_norms: None,
            rope: None,
            mask,
        }
    });
    Ok(Architecture {
        name: config.name(),
        prefixes: &["text_model"],
        vocabulary: config.size_or("vocab_size", sizes.vocabulary)?,
        hidden,
        heads: Heads { queries: heads, keys: heads, width, scale: (width as f64).powf(-0.5) },
        intermediate: config.size_or("intermediate_size", sizes.intermediate)?,
        norm_eps: config.number_or("layer_norm_eps", norm_eps),
        embeddings: Embeddings {
            word: "embeddings.token_embedding",
            token_type: None,
            scale: None,
            norm: None,
            width: hidden,
            projection: None,
        },
        positions: Positions::Learned {
            name: "embeddings.position_embedding",
            count: config.size_or("max_position_embeddings", sizes.positions)?,
            first: 0,
        },
        layers: layers.collect(),
        relative_bias: None,
        norms: NormPlacement::Pre,
        feed_forward: FeedForward::Plain(config.activation("hidden_act", activation)?),
        attention_bias: true,
        up_bias: true,
        down_bias: true,
        norm: NormKind::Layer { bias: true },
        final_norm: Some("final_layer_norm"),
        convolution: None,
        // No checkpoint has a classifier of texts.
        classifier: Classifier {
            pooling: Pooling::Last,
            padding: None,
            dense: None,
            dense_in_encoder: false,
            dense_bias: false,
            activation: Activation::Tanh,
            norm: None,
            out: "text_classifier",
            out_bias: true,
            dense_for_tokens: false,
        },
        masked_lm: None,
        tower: Some(tower),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_ends_where_transformers_pools() {
        let applied = |end: End, ids: &[u32]| {
            let mut ids = ids.to_vec();
            end.apply(&mut ids, 5);
            ids
        };
        assert_eq!(applied(End::First(9), &[8, 1, 9, 3, 9]), [8, 1, 9]);
        assert_eq!(applied(End::First(7), &[8, 1, 9]), [8]);
        assert_eq!(applied(End::Highest, &[8, 1, 9, 3, 9]), [8, 1, 9]);
        assert_eq!(applied(End::Padded { id: 1 }, &[8, 2]), [8, 2, 1, 1, 1]);
        assert_eq!(applied(End::Padded { id: 1 }, &[8, 2, 3, 4, 5]), [8, 2, 3, 4, 5]);
    }
}
