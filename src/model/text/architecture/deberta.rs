//! DeBERTa v2 and v3 (arXiv:2006.03654, arXiv:2111.09543): BERT's encoder with attention scores that have terms for the
//! distance between query and key, and, in the largest models of v2, a convolution beside the first layer.

use super::*;

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    let mut architecture = bert::post_norm(config, &["deberta"], 0)?;
    let (hidden, heads) = (architecture.hidden, architecture.heads);
    for (key, only) in
        [("attention_head_size", heads.width), ("pooler_hidden_size", hidden), ("conv_groups", 1)]
    {
        let size = config.size_or(key, only)?;
        if size != only {
            return Err(ConfigError(format!("{key} {size} is not supported; supported: {only}")));
        }
    }
    architecture.norm_eps = config.number_or("layer_norm_eps", 1e-7);
    architecture.embeddings.token_type = config.types("embeddings.token_type_embeddings", 0);
    architecture.embeddings.width = config.size_or("embedding_size", hidden)?;
    if architecture.embeddings.width != hidden {
        architecture.embeddings.projection =
            Some(Projection { name: "embeddings.embed_proj", bias: false, before_norm: true });
    }
    let count = architecture.max_tokens();
    if !config.flag_or("position_biased_input", true) {
        architecture.positions = Positions::Relative { count };
    }
    for (i, layer) in architecture.layers.iter_mut().enumerate() {
        layer.qkv = Qkv::Separate([query, key, value].map(|name| name(i)));
    }
    architecture.relative_bias = positions(config, count)?;
    architecture.convolution = convolution(config)?;
    architecture.classifier = Classifier {
        dense_in_encoder: false,
        activation: config.activation("pooler_hidden_act", "gelu")?,
        ..bert::classifier()
    };
    Ok(architecture)
}

fn name(layer: usize, tail: &str) -> String {
    format!("encoder.layer.{layer}.attention.self.{tail}")
}

fn query(layer: usize) -> String {
    name(layer, "query_proj")
}

fn key(layer: usize) -> String {
    name(layer, "key_proj")
}

fn value(layer: usize) -> String {
    name(layer, "value_proj")
}

fn position_query(layer: usize) -> String {
    name(layer, "pos_query_proj")
}

fn position_key(layer: usize) -> String {
    name(layer, "pos_key_proj")
}

/// The terms by distance, for sequences of at most `count` tokens.
fn positions(config: &Config<'_>, count: usize) -> Result<Option<RelativeBias>, ConfigError> {
    let (mut keys, mut queries) = (None, None);
    let shared = config.flag_or("share_att_key", false);
    for term in terms(config)? {
        match term.as_str() {
            "c2p" => keys = Some(if shared { key } else { position_key } as fn(usize) -> String),
            "p2c" => queries = Some(if shared { query } else { position_query } as fn(usize) -> String),
            other => {
                return Err(ConfigError(format!(
                    "pos_att_type {other:?} is not supported; supported: c2p, p2c"
                )));
            }
        }
    }
    let norm = norm(config)?;
    // Not positive means the default.
    let size = |key: &str| config.get(key).as_u64().filter(|&size| size > 0).map(|size| size as usize);
    let max_distance = size("max_relative_positions").unwrap_or(count);
    let buckets = size("position_buckets");
    if !config.flag_or("relative_attention", false) {
        if keys.is_some() || queries.is_some() {
            return Err(ConfigError(
                "relative_attention false with a pos_att_type is not supported; supported: relative_attention \
                 true, or no pos_att_type"
                    .to_owned(),
            ));
        }
        return Ok(None);
    }
    if let Some(buckets) = buckets
        && (buckets < 2 || max_distance <= buckets / 2 + 1)
    {
        return Err(ConfigError(format!(
            "position_buckets {buckets} is not supported with max_relative_positions {max_distance}; supported: at \
             least 2, and at most twice as many as max_relative_positions - 2"
        )));
    }
    Ok(Some(RelativeBias::Disentangled {
        name: "encoder.rel_embeddings",
        norm,
        span: buckets.unwrap_or(max_distance),
        max_distance: buckets.map(|_| max_distance),
        keys,
        queries,
    }))
}

/// `pos_att_type`: a list, or a text with `|` between the terms.
fn terms(config: &Config<'_>) -> Result<Vec<String>, ConfigError> {
    let trimmed = |term: &str| term.trim().to_lowercase();
    match config.get("pos_att_type") {
        Value::Null => Ok(Vec::new()),
        Value::String(terms) => Ok(terms.split('|').map(trimmed).filter(|term| !term.is_empty()).collect()),
        Value::Array(terms) => {
            Ok(terms.iter().map(|term| term.as_str().map_or_else(|| term.to_string(), trimmed)).collect())
        }
        other => Err(ConfigError(format!("pos_att_type is {other}, not a list of c2p and p2c"))),
    }
}

/// Tensor name of the norm over the table of positions.
fn norm(config: &Config<'_>) -> Result<Option<&'static str>, ConfigError> {
    let mut norm = None;
    for kind in config.get("norm_rel_ebd").as_str().unwrap_or("none").split('|') {
        match kind.trim().to_lowercase().as_str() {
            "none" => {}
            "layer_norm" => norm = Some("encoder.LayerNorm"),
            other => {
                return Err(ConfigError(format!(
                    "norm_rel_ebd {other:?} is not supported; supported: none, layer_norm"
                )));
            }
        }
    }
    Ok(norm)
}

fn convolution(config: &Config<'_>) -> Result<Option<LocalConvolution>, ConfigError> {
    let activation = config.activation("conv_act", "tanh")?;
    match config.get("conv_kernel_size").as_u64().unwrap_or(0) as usize {
        0 => Ok(None),
        size if size % 2 == 1 => Ok(Some(LocalConvolution {
            name: "encoder.conv.conv",
            norm: "encoder.conv.LayerNorm",
            size,
            activation,
        })),
        size => Err(ConfigError(format!("conv_kernel_size {size} is not supported; supported: odd sizes"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// config.json as Microsoft publishes it for DeBERTa v3, with some keys replaced.
    fn read(changes: Value) -> Result<Architecture, String> {
        let mut config = json!({
            "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
            "max_position_embeddings": 512, "relative_attention": true, "position_buckets": 256,
            "norm_rel_ebd": "layer_norm", "share_att_key": true, "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7,
            "max_relative_positions": -1, "position_biased_input": false, "num_attention_heads": 12,
            "num_hidden_layers": 12, "type_vocab_size": 0, "vocab_size": 128_100,
        });
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        Architecture::from_config(&config, &[]).map_err(|e| e.0)
    }

    #[test]
    fn reads_the_published_form() {
        let a = read(json!({})).expect("an architecture");
        assert!(
            a.embeddings.token_type.is_none() && matches!(a.positions, Positions::Relative { count: 512 })
        );
        let Some(RelativeBias::Disentangled { norm, span, max_distance, keys, queries, .. }) =
            a.relative_bias
        else {
            panic!("no terms")
        };
        assert_eq!((norm, span, max_distance), (Some("encoder.LayerNorm"), 256, Some(512)));
        assert_eq!(keys.expect("a term")(3), "encoder.layer.3.attention.self.key_proj");
        assert_eq!(queries.expect("a term")(3), "encoder.layer.3.attention.self.query_proj");
    }

    #[test]
    fn each_term_may_be_left_out() {
        for (terms, want) in [
            (json!(["c2p"]), (true, false)),
            (json!("P2C"), (false, true)),
            (json!([]), (false, false)),
            (Value::Null, (false, false)),
        ] {
            let a = read(json!({ "pos_att_type": terms, "share_att_key": false })).expect("an architecture");
            let Some(RelativeBias::Disentangled { keys, queries, .. }) = a.relative_bias else {
                panic!("no terms")
            };
            assert_eq!((keys.is_some(), queries.is_some()), want);
            if let Some(keys) = keys {
                assert_eq!(keys(0), "encoder.layer.0.attention.self.pos_key_proj");
            }
        }
        let plain = json!({ "relative_attention": false, "pos_att_type": null });
        assert!(read(plain).expect("an architecture").relative_bias.is_none());
    }

    #[test]
    fn refuses_by_name_what_it_does_not_compute() {
        for (changes, message) in [
            (json!({ "relative_attention": false }), "relative_attention false with a pos_att_type"),
            (
                json!({ "pos_att_type": ["p2p"] }),
                "pos_att_type \"p2p\" is not supported; supported: c2p, p2c",
            ),
            (json!({ "norm_rel_ebd": "batch" }), "norm_rel_ebd \"batch\" is not supported"),
            (json!({ "position_buckets": 1 }), "position_buckets 1 is not supported"),
            (json!({ "max_relative_positions": 100 }), "position_buckets 256 is not supported with"),
            (json!({ "conv_kernel_size": 4 }), "conv_kernel_size 4 is not supported; supported: odd sizes"),
            (
                json!({ "conv_kernel_size": 3, "conv_groups": 2 }),
                "conv_groups 2 is not supported; supported: 1",
            ),
            (json!({ "attention_head_size": 32 }), "attention_head_size 32 is not supported; supported: 64"),
            (json!({ "pooler_hidden_size": 32 }), "pooler_hidden_size 32 is not supported; supported: 768"),
            (
                json!({ "model_type": "deberta" }),
                "use a checkpoint of DeBERTa v2 or v3 (model_type \"deberta-v2\")",
            ),
        ] {
            let said = read(changes).expect_err("refused");
            assert!(said.contains(message), "{said}");
        }
    }
}
