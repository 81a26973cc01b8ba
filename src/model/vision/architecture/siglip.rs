//! SigLIP's tower of images (arXiv:2303.15343), with the tensor names of transformers.

use super::*;

pub(super) fn describe(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let config = of.config;
    if !config.flag_or("vision_use_head", true) {
        return Err(ConfigError("vision_use_head: false is not supported; supported: true".to_owned()).into());
    }
    let prefix = of.prefix("vision_model.", "embeddings.patch_embedding.weight");
    let tensor = |name: &str| format!("{prefix}{name}");
    let hidden = config.size_or("hidden_size", 768)?;
    let (pool, out) = match of.output {
        Output::Embedding => (Pool::Attention(tensor("head")), None),
        Output::Logits => (Pool::Mean, classifier(of, &["classifier"])?),
    };
    Ok(Network::Tower(Box::new(Tower {
        patch: side(config, "patch_size", 16)?,
        projection: tensor("embeddings.patch_embedding"),
        projection_bias: true,
        tokens: Vec::new(),
        positions: Some(tensor("embeddings.position_embedding.weight")),
        relative_bias: None,
        norm_before: None,
        norm_after: None,
        final_norm: Some(tensor("post_layernorm")),
        hidden,
        heads: heads(hidden, config.size_or("num_attention_heads", 12)?)?,
        intermediate: config.size_or("intermediate_size", 3072)?,
        norm_eps: config.number_or("layer_norm_eps", 1e-6),
        feed_forward: FeedForward::Plain(config.activation("hidden_act", "gelu_pytorch_tanh")?),
        layers: CLIP.layers(&tensor("encoder.layers."), config.size_or("num_hidden_layers", 12)?),
        pool,
        out,
    })))
}
