//! What the decoders have in common: the layout and the tensor names of Llama (arXiv:2302.13971), with normalised queries
//! and keys. A layer is pre-norm, its feed-forward is gated, and a classifier reads the last token.

use super::*;

/// `rotary` has each layer's RoPE and mask.
pub(super) fn describe(
    config: &Config<'_>,
    heads: Heads,
    norm: NormKind,
    activation: Activation,
    rotary: Vec<(Rope, Mask)>,
) -> Result<Architecture, ConfigError> {
    let hidden = config.size("hidden_size")?;
    let causal = rotary.iter().all(|(_, mask)| mask.is_causal());
    let padding = config.get("pad_token_id").as_u64().filter(|_| causal).map(|id| id as u32);
    let layers = rotary.into_iter().enumerate().map(|(i, (rope, mask))| {
        let name = |tail: &str| format!("layers.{i}.{tail}");
        Layer {
            qkv: Qkv::Separate(["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj")))),
            attention_out: name("self_attn.o_proj"),
            attention_norm: Some(name("input_layernorm")),
            up: vec![name("mlp.gate_proj"), name("mlp.up_proj")],
            down: name("mlp.down_proj"),
            mlp_norm: name("post_attention_layernorm"),
            branch_norms: None,
            scales: None,
            qk_norms: Some(["q", "k"].map(|part| name(&format!("self_attn.{part}_norm")))),
            rope: Some(rope),
            mask,
        }
    });
    Ok(Architecture {
        name: config.name(),
        prefixes: &["model"],
        vocabulary: config.size("vocab_size")?,
        hidden,
        heads,
        intermediate: config.size("intermediate_size")?,
        norm_eps: config.number_or("rms_norm_eps", 1e-6),
        embeddings: Embeddings {
            word: "embed_tokens",
            token_type: None,
            scale: None,
            norm: None,
            width: hidden,
            projection: None,
        },
        positions: Positions::Rotary { count: config.size("max_position_embeddings")? },
        layers: layers.collect(),
        relative_bias: None,
        norms: NormPlacement::Pre,
        feed_forward: FeedForward::Gated(activation, Gate::First),
        attention_bias: config.flag_or("attention_bias", false),
        up_bias: false,
        down_bias: false,
        norm,
        final_norm: Some("norm"),
        convolution: None,
        classifier: Classifier {
            pooling: Pooling::Last,
            padding,
            dense: None,
            dense_in_encoder: false,
            dense_bias: false,
            activation: Activation::Tanh,
            norm: None,
            out: "score",
            out_bias: false,
            dense_for_tokens: false,
        },
        masked_lm: None,
        tower: None,
    })
}
