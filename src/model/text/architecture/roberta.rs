//! RoBERTa (arXiv:1907.11692) and XLM-RoBERTa (arXiv:1911.02116): BERT's encoder with its
//! own head, and with positions that start after the padding token's id.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let padding = config.get("pad_token_id").as_u64().unwrap_or(1) as usize;
    bert::post_norm(config, &["roberta"], padding + 1)
}
