//! ALBERT (arXiv:1909.11942): layers that share their weights, behind embeddings that are narrower than the layers.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let mut architecture = bert::post_norm(config, &["albert"], 0)?;
    // transformers' default is not BERT's.
    architecture.feed_forward = FeedForward::Plain(config.activation("hidden_act", "gelu_new")?);
    architecture.embeddings.width = config.size_or("embedding_size", 128)?;
    architecture.embeddings.projection =
        Some(Projection { name: "encoder.embedding_hidden_mapping_in", bias: true, before_norm: false });
    let (groups, inner) = (config.size_or("num_hidden_groups", 1)?, config.size_or("inner_group_num", 1)?);
    let steps = architecture.layers.len();
    architecture.layers = (0..steps)
        .flat_map(|step| (0..inner).map(move |layer| (step * groups / steps, layer)))
        .map(|(group, layer)| {
            let name =
                |tail: &str| format!("encoder.albert_layer_groups.{group}.albert_layers.{layer}.{tail}");
            Layer {
                qkv: Qkv::Separate(["query", "key", "value"].map(|part| name(&format!("attention.{part}")))),
                attention_out: name("attention.dense"),
                attention_norm: Some(name("attention.LayerNorm")),
                up: vec![name("ffn")],
                down: name("ffn_output"),
                mlp_norm: name("full_layer_layer_norm"),
                branch_norms: None,
                scales: None,
                qk_norms: None,
                rope: None,
                mask: Mask::Full,
            }
        })
        .collect();
    architecture.classifier = Classifier { dense: Some("pooler"), ..bert::classifier() };
    architecture.masked_lm = Some(MaskedLm {
        dense: "predictions.dense",
        dense_bias: true,
        activation: config.activation("hidden_act", "gelu_new")?,
        norm: "predictions.LayerNorm",
        out: "predictions.decoder",
        biases: &["predictions.decoder.bias", "predictions.bias"],
    });
    Ok(architecture)
}
