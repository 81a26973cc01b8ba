//! BEiT (arXiv:2106.08254), with the tensor names of transformers: ViT with a bias on attention scores by the distance of two
//! patches.

use super::*;

pub(super) fn describe(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let config = of.config;
    for key in [
        // Of other heads, and of the initial values of what the weights have.
        "add_fpn",
        "auxiliary_channels",
        "auxiliary_concat_input",
        "auxiliary_loss_weight",
        "auxiliary_num_convs",
        "layer_scale_init_value",
        "pool_scales",
        "semantic_loss_ignore_index",
        "use_absolute_position_embeddings",
        "use_auxiliary_head",
        "vocab_size",
    ] {
        config.get(key);
    }
    let prefix = of.prefix("beit.", "embeddings.cls_token");
    let tensor = |name: &str| format!("{prefix}{name}");
    let hidden = config.size_or("hidden_size", 768)?;
    let count = config.size_or("num_hidden_layers", 12)?;
    let table = "relative_position_bias.relative_position_bias_table";
    let mut names = Vec::new();
    if config.flag_or("use_shared_relative_position_bias", false) {
        names = vec![tensor(&format!("encoder.{table}")); count];
    }
    if config.flag_or("use_relative_position_bias", false) {
        if !names.is_empty() {
            let message =
                "use_relative_position_bias with use_shared_relative_position_bias is not supported";
            return Err(ConfigError(message.to_owned()).into());
        }
        names =
            (0..count).map(|i| tensor(&format!("encoder.layer.{i}.attention.attention.{table}"))).collect();
    }
    let mut layers = VIT.layers(&tensor("encoder.layer."), count);
    for (i, layer) in layers.iter_mut().enumerate() {
        if let Qkv::Separate(names) = &layer.qkv {
            layer.qkv = Qkv::KeysWithoutBias(names.clone());
        }
        let scales = ["lambda_1", "lambda_2"].map(|name| tensor(&format!("encoder.layer.{i}.{name}")));
        layer.scales = of.has(&scales[0]).then_some(scales);
    }
    let mean = config.flag_or("use_mean_pooling", true);
    let positions = tensor("embeddings.position_embeddings");
    Ok(Network::Tower(Box::new(Tower {
        patch: side(config, "patch_size", 16)?,
        projection: tensor("embeddings.patch_embeddings.projection"),
        projection_bias: true,
        tokens: vec![tensor("embeddings.cls_token")],
        positions: of.has(&positions).then_some(positions),
        relative_bias: (!names.is_empty()).then_some(RelativeBias::Patches(names)),
        norm_before: None,
        final_norm: (!mean).then(|| tensor("layernorm")),
        norm_after: mean.then(|| tensor("pooler.layernorm")),
        hidden,
        heads: heads(hidden, config.size_or("num_attention_heads", 12)?)?,
        intermediate: config.size_or("intermediate_size", 3072)?,
        norm_eps: config.number_or("layer_norm_eps", 1e-12),
        feed_forward: FeedForward::Plain(config.activation("hidden_act", "gelu")?),
        layers,
        pool: if mean { Pool::Mean } else { Pool::First(1) },
        out: out(of, "classifier")?,
    })))
}
