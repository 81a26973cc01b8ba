//! ELECTRA (arXiv:2003.10555): BERT's encoder behind embeddings that may be narrower, with a head of its own.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let mut architecture = bert::post_norm(config, &["electra"], 0)?;
    let width = config.size_or("embedding_size", 128)?;
    if width != architecture.hidden {
        architecture.embeddings.width = width;
        architecture.embeddings.projection =
            Some(Projection { name: "embeddings_project", bias: true, before_norm: false });
    }
    architecture.classifier.activation = Activation::Gelu;
    architecture.masked_lm = Some(MaskedLm {
        dense: "generator_predictions.dense",
        dense_bias: true,
        activation: Activation::Gelu,
        norm: "generator_predictions.LayerNorm",
        out: "generator_lm_head",
        biases: &["generator_lm_head.bias"],
    });
    Ok(architecture)
}
