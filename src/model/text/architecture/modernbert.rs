//! ModernBERT (arXiv:2412.13663): rotary positions, gated feed-forward, pre-norm, and layers with
//! a sliding window between layers with full attention. config.json comes in two forms:
//! transformers 4 has `global_attn_every_n_layers`, `global_rope_theta` and `local_rope_theta`,
//! transformers 5 has `layer_types` and `rope_parameters`.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let hidden = config.size("hidden_size")?;
    let count = config.size("num_hidden_layers")?;
    // `local_attention` is the width of the sliding window, both sides together.
    let window = config.size_or("local_attention", 128)? / 2;
    let layers = kinds(config, count)?
        .into_iter()
        .enumerate()
        .map(|(i, sliding)| {
            let name = |tail: &str| format!("layers.{i}.{tail}");
            Ok(Layer {
                qkv: Qkv::Fused(name("attn.Wqkv")),
                attention_out: name("attn.Wo"),
                // The first layer has none, because the embedding's norm comes right before it.
                attention_norm: (i > 0).then(|| name("attn_norm")),
                up: vec![name("mlp.Wi")],
                down: name("mlp.Wo"),
                mlp_norm: name("mlp_norm"),
                branch_norms: None,
                scales: None,
                qk_norms: None,
                rope: Some(Rope { theta: theta(config, sliding)?, scaling_factor: 1.0 }),
                mask: if sliding { Mask::Window(window) } else { Mask::Full },
            })
        })
        .collect::<Result<_, ConfigError>>()?;
    Ok(Architecture {
        name: config.name(),
        prefixes: &["model"],
        vocabulary: config.size("vocab_size")?,
        hidden,
        heads: config.heads("num_attention_heads", hidden)?,
        intermediate: config.size("intermediate_size")?,
        norm_eps: config.number_or("norm_eps", 1e-5),
        embeddings: Embeddings {
            word: "embeddings.tok_embeddings",
            token_type: None,
            scale: None,
            norm: Some("embeddings.norm"),
            width: hidden,
            projection: None,
        },
        positions: Positions::Rotary { count: config.size("max_position_embeddings")? },
        layers,
        relative_bias: None,
        norms: NormPlacement::Pre,
        feed_forward: FeedForward::Gated(config.activation("hidden_activation", "gelu")?, Gate::First),
        attention_bias: config.flag_or("attention_bias", false),
        up_bias: config.flag_or("mlp_bias", false),
        down_bias: config.flag_or("mlp_bias", false),
        norm: NormKind::Layer { bias: config.flag_or("norm_bias", false) },
        final_norm: Some("final_norm"),
        convolution: None,
        classifier: Classifier {
            pooling: match config.get("classifier_pooling").as_str() {
                None | Some("cls") => Pooling::First,
                Some("mean") => Pooling::Mean,
                Some(other) => {
                    return Err(ConfigError(format!(
                        "classifier_pooling {other:?} is not supported; supported: cls, mean"
                    )));
                }
            },
            padding: None,
            dense: Some("head.dense"),
            dense_in_encoder: false,
            dense_bias: config.flag_or("classifier_bias", false),
            activation: config.activation("classifier_activation", "gelu")?,
            norm: Some("head.norm"),
            out: "classifier",
            out_bias: true,
            dense_for_tokens: true,
        },
        tower: None,
        masked_lm: Some(MaskedLm {
            dense: "head.dense",
            dense_bias: config.flag_or("classifier_bias", false),
            activation: config.activation("classifier_activation", "gelu")?,
            norm: "head.norm",
            out: "decoder",
            biases: if config.flag_or("decoder_bias", true) { &["decoder.bias"] } else { &[] },
        }),
    })
}

/// For each layer, whether it has a sliding window.
fn kinds(config: &Config<'_>, count: usize) -> Result<Vec<bool>, ConfigError> {
    match config.sliding_layers(count)? {
        Some(sliding) => Ok(sliding),
        None => {
            let every = config.size_or("global_attn_every_n_layers", 3)?;
            Ok((0..count).map(|i| i % every != 0).collect())
        }
    }
}

fn theta(config: &Config<'_>, sliding: bool) -> Result<f64, ConfigError> {
    let (kind, old_key, default) = match sliding {
        true => ("sliding_attention", "local_rope_theta", 10_000.0),
        false => ("full_attention", "global_rope_theta", 160_000.0),
    };
    let parameters = &config.get("rope_parameters")[kind];
    let theta = config.rope_parameters(parameters, &format!("rope_parameters.{kind}"))?;
    Ok(theta.unwrap_or_else(|| config.number_or(old_key, default)))
}
