//! Nomic BERT (arXiv:2402.01613): BERT with rotary positions and a gated feed-forward, without biases.
//! config.json comes in two forms: the model's own code, which transformers 4 runs, has GPT-2's names
//! (`n_embd`, `n_layer`, …), transformers 5 has BERT's.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let old = !config.get("n_embd").is_null();
    let key = |new: &'static str, old_key: &'static str| if old { old_key } else { new };
    for key in [
        "prenorm",
        "use_rms_norm",
        "parallel_block",
        "rotary_emb_interleaved",
        "qkv_proj_bias",
        "mlp_fc1_bias",
        "mlp_fc2_bias",
        "causal",
    ] {
        if config.flag_or(key, false) {
            return Err(ConfigError(format!("{key} true is not supported; supported: false")));
        }
    }
    for (key, only) in [("rotary_emb_fraction", 1.0), ("num_experts", 0.0)] {
        let value = config.number_or(key, only);
        if value != only {
            return Err(ConfigError(format!("{key} {value} is not supported; supported: {only}")));
        }
    }
    let hidden = config.size(key("hidden_size", "n_embd"))?;
    let theta = match old {
        true => config.number_or("rotary_emb_base", 10_000.0),
        false => config.rope_parameters(config.get("rope_parameters"), "rope_parameters")?.unwrap_or(1000.0),
    };
    // Beyond the trained length, the model's own code scales RoPE by each sequence's length. kandle does not, so this
    // is the limit.
    let mut count = config.size(key("max_position_embeddings", "n_positions"))?;
    if !config.get("rotary_scaling_factor").is_null() {
        count = count.min(config.size("max_trained_positions")?);
    }
    let layers = (0..config.size(key("num_hidden_layers", "n_layer"))?)
        .map(|i| {
            let name = |tail: &str| format!("encoder.layers.{i}.{tail}");
            Layer {
                qkv: Qkv::Fused(name("attn.Wqkv")),
                attention_out: name("attn.out_proj"),
                attention_norm: Some(name("norm1")),
                up: vec![name("mlp.fc11"), name("mlp.fc12")],
                down: name("mlp.fc2"),
                mlp_norm: name("norm2"),
                branch_norms: None,
                scales: None,
                qk_norms: None,
                rope: Some(Rope { theta, scaling_factor: 1.0 }),
                mask: Mask::Full,
            }
        })
        .collect();
    let activation = match config.get("activation_function").as_str() {
        Some("swiglu") => Activation::Silu,
        Some("geglu") => Activation::Gelu,
        Some(other) => {
            return Err(ConfigError(format!(
                "activation_function {other:?} is not supported; supported: swiglu, geglu"
            )));
        }
        None => config.activation("hidden_act", "silu")?,
    };
    Ok(Architecture {
        name: config.name(),
        prefixes: &["nomic_bert", "bert"],
        vocabulary: config.size("vocab_size")?,
        hidden,
        heads: config.heads(key("num_attention_heads", "n_head"), hidden)?,
        intermediate: config.size(key("intermediate_size", "n_inner"))?,
        norm_eps: config.number_or(key("layer_norm_eps", "layer_norm_epsilon"), 1e-12),
        embeddings: Embeddings {
            word: "embeddings.word_embeddings",
            token_type: config.types("embeddings.token_type_embeddings", 2),
            scale: None,
            norm: Some("emb_ln"),
            width: hidden,
            projection: None,
        },
        positions: Positions::Rotary { count },
        layers,
        relative_bias: None,
        norms: NormPlacement::Post,
        feed_forward: FeedForward::Gated(activation, Gate::Second),
        attention_bias: false,
        up_bias: false,
        down_bias: false,
        norm: NormKind::Layer { bias: true },
        final_norm: None,
        convolution: None,
        classifier: bert::classifier(),
        masked_lm: None,
        tower: None,
    })
}
