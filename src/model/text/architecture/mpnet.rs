//! MPNet (arXiv:2004.09297): BERT's encoder with a bias on attention scores that depends on how far a key is from the
//! query, in the buckets of T5 (arXiv:1910.10683, section 2.1).

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let buckets = config.size_or("relative_attention_num_buckets", 32)?;
    // transformers uses 32 buckets and starts positions at 2, whatever the file says.
    if buckets != 32 {
        return Err(ConfigError(format!(
            "relative_attention_num_buckets {buckets} is not supported; supported: 32"
        )));
    }
    let mut architecture = bert::post_norm(config, &["mpnet"], 2)?;
    architecture.embeddings.token_type = None;
    for (i, layer) in architecture.layers.iter_mut().enumerate() {
        let name = |tail: &str| format!("encoder.layer.{i}.attention.{tail}");
        layer.qkv = Qkv::Separate(["q", "k", "v"].map(|part| name(&format!("attn.{part}"))));
        layer.attention_out = name("attn.o");
        layer.attention_norm = Some(name("LayerNorm"));
    }
    architecture.relative_bias =
        Some(RelativeBias::Buckets { name: "encoder.relative_attention_bias", buckets, max_distance: 128 });
    architecture.masked_lm = Some(roberta::masked_lm());
    Ok(architecture)
}
