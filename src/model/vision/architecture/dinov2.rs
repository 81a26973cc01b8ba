//! DINOv2 (arXiv:2304.07193), with the tensor names of transformers.

use super::*;
use crate::model::text::architecture::{Activation, Gate};

pub(super) fn describe(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let config = of.config;
    if !config.flag_or("qkv_bias", true) {
        return Err(ConfigError("qkv_bias: false is not supported; supported: true".to_owned()).into());
    }
    let prefix = of.prefix("dinov2.", "embeddings.cls_token");
    let tensor = |name: &str| format!("{prefix}{name}");
    let hidden = config.size_or("hidden_size", 768)?;
    let ratio = config.number_or("mlp_ratio", 4.0);
    let gated = config.flag_or("use_swiglu_ffn", false);
    let activation = config.activation("hidden_act", "gelu")?;
    let wide = (hidden as f64 * ratio) as usize;
    let mut layers = VIT.layers(&tensor("encoder.layer."), config.size_or("num_hidden_layers", 12)?);
    for (i, layer) in layers.iter_mut().enumerate() {
        let name = |tail: &str| tensor(&format!("encoder.layer.{i}.{tail}"));
        layer.attention_norm = Some(name("norm1"));
        layer.mlp_norm = name("norm2");
        let [up, down] = if gated { ["mlp.weights_in", "mlp.weights_out"] } else { ["mlp.fc1", "mlp.fc2"] };
        (layer.up, layer.down) = (vec![name(up)], name(down));
        layer.scales = Some(["layer_scale1.lambda1", "layer_scale2.lambda1"].map(name));
    }
    let (pool, out) = match of.output {
        Output::Embedding => (Pool::First(1), None),
        Output::Logits => (Pool::FirstAndMean, classifier(of, &["classifier"])?),
    };
    Ok(Network::Tower(Box::new(Tower {
        patch: side(config, "patch_size", 14)?,
        projection: tensor("embeddings.patch_embeddings.projection"),
        projection_bias: true,
        tokens: vec![tensor("embeddings.cls_token")],
        positions: Some(tensor("embeddings.position_embeddings")),
        relative_bias: None,
        norm_before: None,
        norm_after: None,
        final_norm: Some(tensor("layernorm")),
        hidden,
        heads: heads(hidden, config.size_or("num_attention_heads", 12)?)?,
        // A gated block has two thirds of the width, rounded up to a multiple of 8.
        intermediate: if gated { (wide * 2 / 3).div_ceil(8) * 8 } else { wide },
        norm_eps: config.number_or("layer_norm_eps", 1e-6),
        feed_forward: match gated {
            true => FeedForward::Gated(Activation::Silu, Gate::First),
            false => FeedForward::Plain(activation),
        },
        layers,
        pool,
        out,
    })))
}
