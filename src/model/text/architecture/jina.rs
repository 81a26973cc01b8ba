//! JinaBERT v2 (arXiv:2310.19923): BERT with ALiBi (arXiv:2108.12409) instead of a table of positions, and a gated
//! feed-forward. config.json calls it `bert`; the tensor names are those of the model's own code.

use super::*;

/// Whether a config.json of BERT's type is for Jina's code.
pub(super) fn is_meant(config: &Config<'_>) -> bool {
    let given = |key: &str| !config.json[key].is_null();
    config.json["position_embedding_type"] == "alibi" || given("feed_forward_type") || given("emb_pooler")
}

pub(super) fn describe(config: &Config<'_>) -> Result<Architecture, ConfigError> {
    // The models for code have norms over queries and keys, and only their code's name tells.
    let code = config.get("auto_map").to_string();
    if code.contains("qk-post-norm") {
        return Err(ConfigError(
            "auto_map names jina-bert-v2-qk-post-norm, which normalises queries and keys \
             (attention.self.layer_norm_q); that is not supported; supported: jina-bert-implementation"
                .to_owned(),
        ));
    }
    let mut architecture = bert::encoder(config, &["bert"], 0)?;
    architecture.classifier = bert::classifier();
    match config.get("position_embedding_type").as_str() {
        Some("alibi") => {
            architecture.positions = Positions::Relative { count: architecture.max_tokens() };
            architecture.relative_bias = Some(RelativeBias::Slopes);
        }
        None | Some("absolute") => {}
        Some(other) => {
            return Err(ConfigError(format!(
                "position_embedding_type {other:?} is not supported; supported: alibi, absolute"
            )));
        }
    }
    // Read by the model's own `encode`; here the pooling is that of modules.json, else the mean.
    if let Some(other) = config.get("emb_pooler").as_str().filter(|pooler| *pooler != "mean") {
        return Err(ConfigError(format!("emb_pooler {other:?} is not supported; supported: mean")));
    }
    let activation = match config.get("feed_forward_type").as_str() {
        None | Some("original") => return Ok(architecture),
        Some("geglu") => Activation::Gelu,
        Some("reglu") => Activation::Relu,
        Some(other) => {
            return Err(ConfigError(format!(
                "feed_forward_type {other:?} is not supported; supported: original, geglu, reglu"
            )));
        }
    };
    architecture.feed_forward = FeedForward::Gated(activation, Gate::First);
    architecture.up_bias = false;
    for (i, layer) in architecture.layers.iter_mut().enumerate() {
        let name = |tail: &str| format!("encoder.layer.{i}.mlp.{tail}");
        layer.up = vec![name("gated_layers")];
        layer.down = name("wo");
        layer.mlp_norm = name("layernorm");
    }
    Ok(architecture)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn refuses_by_name_what_it_does_not_compute() {
        let read = |changes: Value| {
            let mut config = json!({
                "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                "intermediate_size": 96, "max_position_embeddings": 128, "vocab_size": 100,
                "position_embedding_type": "alibi", "feed_forward_type": "geglu", "emb_pooler": "mean",
                "auto_map": { "AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel" },
            });
            for (key, value) in changes.as_object().expect("an object") {
                config[key] = value.clone();
            }
            Architecture::from_config(&config, &[]).map_err(|e| e.0)
        };
        let architecture = read(json!({})).expect("an architecture");
        assert_eq!(architecture.feed_forward, FeedForward::Gated(Activation::Gelu, Gate::First));
        let code = json!({ "AutoModel": "jinaai/jina-bert-v2-qk-post-norm--modeling_bert.JinaBertModel" });
        for (changes, message) in [
            (json!({ "auto_map": code }), "jina-bert-v2-qk-post-norm"),
            (
                json!({ "position_embedding_type": "relative_key" }),
                "position_embedding_type \"relative_key\"",
            ),
            (json!({ "feed_forward_type": "swiglu" }), "feed_forward_type \"swiglu\" is not supported"),
            (json!({ "emb_pooler": "cls" }), "emb_pooler \"cls\" is not supported; supported: mean"),
        ] {
            let said = read(changes).expect_err("refused");
            assert!(said.contains(message), "{said}");
        }
    }
}
