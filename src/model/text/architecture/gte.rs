//! GTE of the second generation (arXiv:2407.19669): BERT with rotary positions and a gated feed-forward.
//! config.json comes in two forms: the model's own code calls it `new` and has `rope_theta` and
//! `rope_scaling`, transformers 5 calls it `gte` and has `rope_parameters`.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    for (key, only) in [("layer_norm_type", "layer_norm"), ("position_embedding_type", "rope")] {
        match config.get(key).as_str() {
            Some(other) if other != only => {
                return Err(ConfigError(format!("{key} {other:?} is not supported; supported: {only}")));
            }
            _ => {}
        }
    }
    if config.flag_or("logn_attention_scale", false) {
        return Err(ConfigError("logn_attention_scale true is not supported; supported: false".to_owned()));
    }
    let hidden = config.size("hidden_size")?;
    let heads = config.heads("num_attention_heads", hidden)?;
    let rope = rope(config, heads.width)?;
    let layers = (0..config.size("num_hidden_layers")?)
        .map(|i| {
            let name = |tail: &str| format!("encoder.layer.{i}.{tail}");
            Layer {
                qkv: Qkv::Fused(name("attention.qkv_proj")),
                attention_out: name("attention.o_proj"),
                attention_norm: Some(name("attn_ln")),
                up: vec![name("mlp.up_gate_proj")],
                down: name("mlp.down_proj"),
                mlp_norm: name("mlp_ln"),
                branch_norms: None,
                scales: None,
                qk_norms: None,
                rope: Some(rope),
                mask: Mask::Full,
            }
        })
        .collect();
    Ok(Architecture {
        name: config.name(),
        prefixes: &["gte", "new"],
        vocabulary: config.size("vocab_size")?,
        hidden,
        heads,
        intermediate: config.size("intermediate_size")?,
        norm_eps: config.number_or("layer_norm_eps", 1e-12),
        embeddings: Embeddings {
            word: "embeddings.word_embeddings",
            token_type: config.types("embeddings.token_type_embeddings", 1),
            scale: None,
            norm: Some("embeddings.LayerNorm"),
            width: hidden,
            projection: None,
        },
        positions: Positions::Rotary { count: config.size("max_position_embeddings")? },
        layers,
        relative_bias: None,
        norms: NormPlacement::Post,
        feed_forward: FeedForward::Gated(config.activation("hidden_act", "gelu")?, Gate::Second),
        attention_bias: true,
        up_bias: false,
        down_bias: true,
        norm: NormKind::Layer { bias: true },
        final_norm: None,
        convolution: None,
        classifier: bert::classifier(),
        masked_lm: None,
        tower: None,
    })
}

fn rope(config: &Config<'_>, width: usize) -> Result<Rope, ConfigError> {
    if let Some(theta) = config.rope_parameters(config.get("rope_parameters"), "rope_parameters")? {
        return Ok(Rope { theta, scaling_factor: 1.0 });
    }
    let theta = config.number_or("rope_theta", 160_000.0);
    let scaling = &config.get("rope_scaling");
    match scaling["type"].as_str().or(scaling["rope_type"].as_str()) {
        None => Ok(Rope { theta, scaling_factor: 1.0 }),
        // NTK scaling: the base is multiplied by the factor, and all angles are divided by factor^(2/width).
        Some("ntk") => {
            let factor = scaling["factor"].as_f64().filter(|&factor| factor >= 1.0);
            let factor =
                factor.ok_or_else(|| ConfigError("rope_scaling has no factor of at least 1".to_owned()))?;
            Ok(Rope { theta: theta * factor, scaling_factor: factor.powf(2.0 / width as f64) })
        }
        Some(other) => {
            Err(ConfigError(format!("rope_scaling.type {other:?} is not supported; supported: ntk")))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn positions_of_the_models_own_code() {
        let rope = |json: &Value| rope(&Config::new(json), 64).map_err(|e| e.0);
        let of = |theta, scaling_factor| Ok(Rope { theta, scaling_factor });
        assert_eq!(rope(&json!({ "rope_theta": 500_000.0 })), of(500_000.0, 1.0));
        let ntk = json!({ "rope_theta": 20_000.0, "rope_scaling": { "type": "ntk", "factor": 8.0 } });
        assert_eq!(rope(&ntk), of(160_000.0, 8f64.powf(1.0 / 32.0)));
        let yarn = json!({ "rope_scaling": { "type": "yarn", "factor": 8.0 } });
        assert!(rope(&yarn).is_err_and(|message| message.contains("yarn")));
    }
}
