//! DistilBERT (arXiv:1910.01108): BERT without token types and pooler, under other names.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let hidden = config.size("dim")?;
    let layers = (0..config.size("n_layers")?)
        .map(|i| {
            let name = |tail: &str| format!("transformer.layer.{i}.{tail}");
            Layer {
                qkv: Qkv::Separate(
                    ["q_lin", "k_lin", "v_lin"].map(|part| name(&format!("attention.{part}"))),
                ),
                attention_out: name("attention.out_lin"),
                attention_norm: Some(name("sa_layer_norm")),
                up: vec![name("ffn.lin1")],
                down: name("ffn.lin2"),
                mlp_norm: name("output_layer_norm"),
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
        prefixes: &["distilbert"],
        vocabulary: config.size("vocab_size")?,
        hidden,
        heads: config.heads("n_heads", hidden)?,
        intermediate: config.size("hidden_dim")?,
        norm_eps: 1e-12,
        embeddings: Embeddings {
            word: "embeddings.word_embeddings",
            token_type: None,
            scale: None,
            norm: Some("embeddings.LayerNorm"),
            width: hidden,
            projection: None,
        },
        positions: Positions::Learned {
            name: "embeddings.position_embeddings",
            count: config.size("max_position_embeddings")?,
            first: 0,
        },
        layers,
        relative_bias: None,
        norms: NormPlacement::Post,
        feed_forward: FeedForward::Plain(config.activation("activation", "gelu")?),
        attention_bias: true,
        up_bias: true,
        down_bias: true,
        norm: NormKind::Layer { bias: true },
        final_norm: None,
        convolution: None,
        classifier: Classifier {
            pooling: Pooling::First,
            padding: None,
            dense: Some("pre_classifier"),
            dense_in_encoder: false,
            dense_bias: true,
            activation: Activation::Relu,
            norm: None,
            out: "classifier",
            out_bias: true,
            dense_for_tokens: false,
        },
        tower: None,
        masked_lm: Some(MaskedLm {
            dense: "vocab_transform",
            dense_bias: true,
            activation: config.activation("activation", "gelu")?,
            norm: "vocab_layer_norm",
            out: "vocab_projector",
            biases: &["vocab_projector.bias"],
        }),
    })
}
