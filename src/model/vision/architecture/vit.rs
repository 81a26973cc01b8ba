//! ViT (arXiv:2010.11929) and DeiT (arXiv:2012.12877), with the tensor names of transformers.

use super::*;

pub(super) fn describe(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let config = of.config;
    if !config.flag_or("qkv_bias", true) {
        return Err(ConfigError("qkv_bias: false is not supported; supported: true".to_owned()).into());
    }
    let name = config.name();
    let with_head: &'static str = if name == "deit" { "deit." } else { "vit." };
    let prefix = of.prefix(with_head, "embeddings.cls_token");
    let tensor = |name: &str| format!("{prefix}{name}");
    let hidden = config.size_or("hidden_size", 768)?;
    let distilled = name == "deit";
    let mut tokens = vec![tensor("embeddings.cls_token")];
    if distilled {
        tokens.push(tensor("embeddings.distillation_token"));
    }
    let (pool, out) = match of.output {
        Output::Embedding => (Pool::First(1), None),
        // The mean of two classifiers, of the class and of the distillation token.
        Output::Logits if of.has("cls_classifier.weight") => {
            (Pool::First(2), classifier(of, &["cls_classifier", "distillation_classifier"])?)
        }
        Output::Logits => (Pool::First(1), classifier(of, &["classifier"])?),
    };
    Ok(Network::Tower(Box::new(Tower {
        patch: side(config, "patch_size", 16)?,
        projection: tensor("embeddings.patch_embeddings.projection"),
        projection_bias: true,
        tokens,
        positions: Some(tensor("embeddings.position_embeddings")),
        relative_bias: None,
        norm_before: None,
        norm_after: None,
        final_norm: Some(tensor("layernorm")),
        hidden,
        heads: heads(hidden, config.size_or("num_attention_heads", 12)?)?,
        intermediate: config.size_or("intermediate_size", 3072)?,
        norm_eps: config.number_or("layer_norm_eps", 1e-12),
        feed_forward: FeedForward::Plain(config.activation("hidden_act", "gelu")?),
        layers: VIT.layers(&tensor("encoder.layer."), config.size_or("num_hidden_layers", 12)?),
        pool,
        out,
    })))
}
