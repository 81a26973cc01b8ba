//! BERT (arXiv:1810.04805), with the tensor names of transformers' BertModel.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    // Jina's own code has BERT's name.
    if jina::is_meant(config) {
        return jina::describe(config);
    }
    let first = 0;
    let mut architecture = post_norm(config, &["bert"], first)?;
    architecture.classifier = classifier();
    architecture.masked_lm = Some(MaskedLm {
        dense: "cls.predictions.transform.dense",
        dense_bias: true,
        activation: config.activation("hidden_act", "gelu")?,
        norm: "cls.predictions.transform.LayerNorm",
        out: "cls.predictions.decoder",
        biases: &["cls.predictions.decoder.bias", "cls.predictions.bias"],
    });
    Ok(architecture)
}

/// BERT's head: the pooler over the first token, then the labels.
pub(super) fn classifier() -> Classifier {
    Classifier {
        pooling: Pooling::First,
        padding: None,
        dense: Some("pooler.dense"),
        dense_in_encoder: true,
        dense_bias: true,
        activation: Activation::Tanh,
        norm: None,
        out: "classifier",
        out_bias: true,
        dense_for_tokens: false,
    }
}

/// BERT's encoder, which RoBERTa shares; positions count from `first`.
pub(super) fn post_norm(
    config: &Config<'_>,
    prefixes: &'static [&'static str],
    first: usize,
) -> Result<Architecture, ConfigError> {
    config.absolute_positions()?;
    encoder(config, prefixes, first)
}

/// BERT's encoder, whatever config.json says about its kind of positions.
pub(super) fn encoder(
    config: &Config<'_>,
    prefixes: &'static [&'static str],
    first: usize,
) -> Result<Architecture, ConfigError> {
    let hidden = config.size("hidden_size")?;
    let count = config.size("max_position_embeddings")?;
    if count <= first {
        return Err(ConfigError(format!(
            "max_position_embeddings {count} is too small: positions start at {first}"
        )));
    }
    let layers = (0..config.size("num_hidden_layers")?)
        .map(|i| {
            let name = |tail: &str| format!("encoder.layer.{i}.{tail}");
            Layer {
                qkv: Qkv::Separate(
                    ["query", "key", "value"].map(|part| name(&format!("attention.self.{part}"))),
                ),
                attention_out: name("attention.output.dense"),
                attention_norm: Some(name("attention.output.LayerNorm")),
                up: vec![name("intermediate.dense")],
                down: name("output.dense"),
                mlp_norm: name("output.LayerNorm"),
                branch_norms: None,
                scales: None,
                qk_norms: None,
                rope: None,
                mask: Mask::Full,
            }
        })
        .collect();
    Ok(Architecture {
        name: config.name(),
        prefixes,
        vocabulary: config.size("vocab_size")?,
        hidden,
        heads: config.heads("num_attention_heads", hidden)?,
        intermediate: config.size("intermediate_size")?,
        norm_eps: config.number_or("layer_norm_eps", 1e-12),
        embeddings: Embeddings {
            word: "embeddings.word_embeddings",
            token_type: config.types("embeddings.token_type_embeddings", 2),
            scale: None,
            norm: Some("embeddings.LayerNorm"),
            width: hidden,
            projection: None,
        },
        positions: Positions::Learned { name: "embeddings.position_embeddings", count, first },
        layers,
        relative_bias: None,
        norms: NormPlacement::Post,
        feed_forward: FeedForward::Plain(config.activation("hidden_act", "gelu")?),
        attention_bias: true,
        up_bias: true,
        down_bias: true,
        norm: NormKind::Layer { bias: true },
        final_norm: None,
        convolution: None,
        classifier: Classifier {
            pooling: Pooling::First,
            padding: None,
            dense: Some("classifier.dense"),
            dense_in_encoder: false,
            dense_bias: true,
            activation: Activation::Tanh,
            norm: None,
            out: "classifier.out_proj",
            out_bias: true,
            dense_for_tokens: false,
        },
        masked_lm: None,
        tower: None,
    })
}
