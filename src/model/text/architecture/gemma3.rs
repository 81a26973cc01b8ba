//! The text model of Gemma 3 (arXiv:2503.19786). With `use_bidirectional_attention` it is an encoder: EmbeddingGemma
//! (arXiv:2509.20354). Layers with a sliding window are between layers with full attention, and the results of attention
//! and feed-forward are normalised before they are added. config.json comes in two forms: transformers 4 has `rope_theta`,
//! `rope_local_base_freq` and `rope_scaling`, transformers 5 has `rope_parameters`.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let count = config.size("num_hidden_layers")?;
    // transformers reads the first key if there are no layer types, and never the second one.
    let pattern = config.size_or("sliding_window_pattern", 6)?;
    config.get("_sliding_window_pattern");
    let sliding = config.sliding_layers(count)?;
    let sliding = sliding.unwrap_or_else(|| (1..=count).map(|i| !i.is_multiple_of(pattern)).collect());
    let window = config.size_or("sliding_window", 4096)?;
    let (full, window) = match config.flag_or("use_bidirectional_attention", false) {
        // transformers halves it and adds 1, and then attends to keys that are nearer than that.
        true => (Mask::Full, Mask::Window(window / 2)),
        false => (Mask::Causal, Mask::CausalWindow(window - 1)),
    };
    let ropes = [rope(config, false)?, rope(config, true)?];
    let rotary = sliding.into_iter().map(|sliding| match sliding {
        true => (ropes[1], window),
        false => (ropes[0], full),
    });
    let mut heads = config.grouped_heads(4, 256)?;
    heads.scale = config.number_or("query_pre_attn_scalar", 256.0).powf(-0.5);
    let activation = config.activation("hidden_activation", "gelu_pytorch_tanh")?;
    let mut architecture =
        decoder::describe(config, heads, NormKind::RmsPlusOne, activation, rotary.collect())?;
    architecture.embeddings.scale = Some((architecture.hidden as f64).sqrt());
    for (i, layer) in architecture.layers.iter_mut().enumerate() {
        let names = ["pre_feedforward", "post_attention", "post_feedforward"];
        let [before, after_attention, after] = names.map(|norm| format!("layers.{i}.{norm}_layernorm"));
        (layer.mlp_norm, layer.branch_norms) = (before, Some([after_attention, after]));
    }
    Ok(architecture)
}

/// The positions of layers with full attention, or with a sliding window.
fn rope(config: &Config<'_>, sliding: bool) -> Result<Rope, ConfigError> {
    let (kind, old_key, default) = match sliding {
        true => ("sliding_attention", "rope_local_base_freq", 10_000.0),
        false => ("full_attention", "rope_theta", 1_000_000.0),
    };
    let new = &config.get("rope_parameters")[kind];
    let old = config.get("rope_scaling");
    let (parameters, key) = match (new.is_null(), sliding) {
        (false, _) => (new, format!("rope_parameters.{kind}")),
        (true, false) => (old, "rope_scaling".to_owned()),
        // In the older form, only full attention is scaled.
        (true, true) => (&Value::Null, String::new()),
    };
    let theta = parameters["rope_theta"].as_f64().unwrap_or_else(|| config.number_or(old_key, default));
    let scaling_factor = match parameters["rope_type"].as_str().or(parameters["type"].as_str()) {
        None | Some("default") => 1.0,
        Some("linear") => match parameters["factor"].as_f64().filter(|&factor| factor >= 1.0) {
            Some(factor) => factor,
            None => return Err(ConfigError(format!("{key} has no factor of at least 1"))),
        },
        Some(other) => {
            return Err(ConfigError(format!(
                "{key}.rope_type {other:?} is not supported; supported: default, linear"
            )));
        }
    };
    Ok(Rope { theta, scaling_factor })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn positions_in_both_forms() {
        let of = |json: Value, sliding| rope(&Config::new(&json), sliding).map_err(|e| e.0);
        let want = |theta, scaling_factor| Ok(Rope { theta, scaling_factor });
        let old = json!({
            "rope_theta": 500_000.0, "rope_local_base_freq": 9000.0,
            "rope_scaling": { "rope_type": "linear", "factor": 8.0 }
        });
        assert_eq!(of(old.clone(), false), want(500_000.0, 8.0));
        assert_eq!(of(old, true), want(9000.0, 1.0));
        let new = json!({ "rope_parameters": {
            "full_attention": { "rope_type": "linear", "factor": 2.0, "rope_theta": 7.0 },
            "sliding_attention": { "rope_type": "default", "rope_theta": 3.0 }
        } });
        assert_eq!(of(new.clone(), false), want(7.0, 2.0));
        assert_eq!(of(new, true), want(3.0, 1.0));
        assert_eq!(of(json!({}), false), want(1_000_000.0, 1.0));
        let yarn = json!({ "rope_scaling": { "rope_type": "yarn", "factor": 8.0 } });
        assert!(of(yarn, false).is_err_and(|message| message.contains("yarn")));
    }

    #[test]
    fn windows_are_halved_only_if_attention_is_bidirectional() {
        let masks = |bidirectional: bool| {
            let json = json!({
                "model_type": "gemma3_text", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 3,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 8,
                "max_position_embeddings": 64, "sliding_window": 16, "sliding_window_pattern": 3,
                "use_bidirectional_attention": bidirectional,
            });
            let layers = Architecture::from_config(&json, &[]).expect("an architecture").layers;
            layers.iter().map(|layer| layer.mask).collect::<Vec<_>>()
        };
        assert_eq!(masks(true), [Mask::Window(8), Mask::Window(8), Mask::Full]);
        assert_eq!(masks(false), [Mask::CausalWindow(15), Mask::CausalWindow(15), Mask::Causal]);
    }
}
