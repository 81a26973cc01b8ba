//! CLIP's tower of images (arXiv:2103.00020), with the tensor names of transformers.

use super::*;

pub(super) fn describe(of: &Checkpoint<'_>) -> Result<Network, VisionError> {
    let config = of.config;
    let tensor = |name: &str| format!("vision_model.{name}");
    let hidden = config.size_or("hidden_size", 768)?;
    let (pool, out, final_norm) = match of.output {
        // The vector that CLIP compares with those of texts.
        Output::Embedding => {
            let outputs = of.outputs("visual_projection.weight")?;
            let out = Out { names: vec!["visual_projection".to_owned()], bias: false, outputs };
            (Pool::First(1), Some(out), Some(tensor("post_layernorm")))
        }
        Output::Logits => (Pool::Mean, classifier(of, &["classifier"])?, None),
    };
    Ok(Network::Tower(Box::new(Tower {
        patch: side(config, "patch_size", 32)?,
        projection: tensor("embeddings.patch_embedding"),
        projection_bias: false,
        tokens: vec![tensor("embeddings.class_embedding")],
        positions: Some(tensor("embeddings.position_embedding.weight")),
        relative_bias: None,
        norm_before: Some(tensor("pre_layrnorm")),
        norm_after: None,
        final_norm,
        hidden,
        heads: heads(hidden, config.size_or("num_attention_heads", 12)?)?,
        intermediate: config.size_or("intermediate_size", 3072)?,
        norm_eps: config.number_or("layer_norm_eps", 1e-5),
        feed_forward: FeedForward::Plain(config.activation("hidden_act", "quick_gelu")?),
        layers: CLIP.layers(&tensor("encoder.layers."), config.size_or("num_hidden_layers", 12)?),
        pool,
        out,
    })))
}
