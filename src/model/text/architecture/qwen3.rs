//! Qwen3 (arXiv:2505.09388), a decoder: Qwen3-Embedding and Qwen3-Reranker (arXiv:2506.05176), and classifiers.
//! config.json comes in two forms: transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 has
//! `rope_parameters`.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let count = config.size("num_hidden_layers")?;
    if config.flag_or("use_sliding_window", false) {
        return Err(ConfigError("use_sliding_window true is not supported; supported: false".to_owned()));
    }
    // Without use_sliding_window they have no effect.
    let _ = ["sliding_window", "max_window_layers"].map(|key| config.get(key));
    if config.sliding_layers(count)?.is_some_and(|sliding| sliding.contains(&true)) {
        return Err(ConfigError(
            "layer_types: sliding_attention is not supported; supported: full_attention".to_owned(),
        ));
    }
    let theta = config.rope_parameters(config.get("rope_parameters"), "rope_parameters")?;
    let old = config.rope_parameters(config.get("rope_scaling"), "rope_scaling")?;
    let theta = theta.or(old).unwrap_or_else(|| config.number_or("rope_theta", 1_000_000.0));
    let rotary = vec![(Rope { theta, scaling_factor: 1.0 }, Mask::Causal); count];
    let heads = config.grouped_heads(32, 128)?;
    let activation = config.activation("hidden_act", "silu")?;
    decoder::describe(config, heads, NormKind::Rms, activation, rotary)
}
