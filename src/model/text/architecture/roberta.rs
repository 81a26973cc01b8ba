//! RoBERTa (arXiv:1907.11692) and XLM-RoBERTa (arXiv:1911.02116): BERT's encoder with its
//! own head, and with positions that start after the padding token's id.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let padding = config.get("pad_token_id").as_u64().unwrap_or(1) as usize;
    let mut architecture = bert::post_norm(config, &["roberta"], padding + 1)?;
    architecture.masked_lm = Some(masked_lm());
    Ok(architecture)
}

/// RoBERTa's head for masked language modelling, which MPNet shares. Its activation is no setting.
pub(super) fn masked_lm() -> MaskedLm {
    MaskedLm {
        dense: "lm_head.dense",
        dense_bias: true,
        activation: Activation::Gelu,
        norm: "lm_head.layer_norm",
        out: "lm_head.decoder",
        biases: &["lm_head.decoder.bias", "lm_head.bias"],
    }
}
