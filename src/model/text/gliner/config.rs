//! gliner_config.json: what a checkpoint of GLiNER (arXiv:2311.08526) is. The file also holds the settings of its
//! training, whose names no list has, so keys that are not named here are ignored.

use serde_json::Value;

use crate::model::store::{Files, FilesError};
use crate::model::text::ModelError;
use crate::model::text::architecture::Architecture;
use crate::model::text::sentence::is_off;

/// The file that makes a checkpoint one of GLiNER.
pub const CONFIG: &str = "gliner_config.json";

/// How to complete a checkpoint that lacks what it takes from its backbone.
const COMPLETE: &str = "write a complete copy with Python: from gliner import GLiNER; \
    GLiNER.from_pretrained('…').save_pretrained('directory', safe_serialization=True)";

/// Keys of other kinds of GLiNER, which are refused unless they are off, with what they mean.
const OTHER_KINDS: &[(&str, &str)] = &[
    ("labels_encoder", "a bi-encoder, which encodes labels apart from texts"),
    ("labels_decoder", "a model that writes labels"),
    ("relations_layer", "a model that extracts relations"),
    ("span_encoder_config", "a model with a second encoder of words"),
    ("post_fusion_schema", "a model with cross-attention between words and labels"),
    ("fuse_layers", "a model that mixes the layers of its backbone"),
    ("precomputed_prompts_mode", "a model with fixed labels"),
];

/// Keys of which one value is supported, which is the default if there is one.
const ONLY: &[(&str, &str)] =
    &[("span_mode", "markerV0"), ("subtoken_pooling", "first"), ("words_splitter_type", "whitespace")];

/// What a checkpoint's gliner_config.json says.
#[derive(Debug)]
pub struct Config {
    pub backbone: Architecture,
    /// Elements of a word's vector.
    pub hidden: usize,
    /// Words of the longest span.
    pub max_width: usize,
    /// Words of the longest text.
    pub max_words: usize,
    /// Layers of the LSTM over the words.
    pub rnn_layers: usize,
    /// Token before each label, and token after the last one.
    pub tokens: [String; 2],
    /// A label's vector is that of the token before it, or else of its first token.
    pub label_is_marker: bool,
}

impl Config {
    /// # Errors
    /// The checkpoint is of a kind of GLiNER that kandle does not support, or lacks the configuration of its backbone.
    pub fn read(files: &Files) -> Result<Self, ModelError> {
        let config = files.json(CONFIG)?.ok_or_else(|| FilesError::Missing { file: CONFIG.to_owned() })?;
        let backbone = match &config["encoder_config"] {
            Value::Null => files.json("config.json")?,
            given => Some(given.clone()),
        };
        let Some(backbone) = backbone else {
            let name = config["model_name"].as_str().unwrap_or("its backbone");
            return Err(ModelError::Unsupported(format!(
                "{CONFIG} has no encoder_config: add the config.json of {name} to the checkpoint, or {COMPLETE}"
            )));
        };
        Self::of(&config, backbone, files.ignored_keys())
    }

    fn of(config: &Value, mut backbone: Value, ignored: &[String]) -> Result<Self, ModelError> {
        let refused = |message: String| ModelError::Unsupported(format!("{CONFIG}: {message}"));
        for (key, what) in OTHER_KINDS {
            if !is_off(&config[key]) {
                return Err(refused(format!(
                    "{key} {} makes it {what}, which is not supported",
                    config[key]
                )));
            }
        }
        if config["model_type"] == "gliner_streaming_span" {
            return Err(refused("model_type gliner_streaming_span is not supported".to_owned()));
        }
        for (key, only) in ONLY {
            match config[key].as_str() {
                None => {}
                Some(value) if value == *only => {}
                Some("token_level") => {
                    return Err(refused(format!(
                        "{key} \"token_level\" makes it a model that labels single words, which is not supported; use \
                         one of spans ({key} \"{only}\"), such as gliner_small-v2.1"
                    )));
                }
                Some(value) => {
                    return Err(refused(format!("{key} {value:?} is not supported; supported: {only}")));
                }
            }
        }
        if backbone["model_type"].is_null() {
            backbone["model_type"] = "deberta-v2".into();
        }
        let backbone = Architecture::from_config(&backbone, ignored)
            .map_err(|e| refused(format!("the backbone's configuration: {}", e.0)))?;
        if backbone.is_causal() {
            return Err(refused(format!("its backbone, {}, attends to earlier tokens only", backbone.name)));
        }
        let size = |key: &str, default: usize, least: u64| match &config[key] {
            Value::Null => Ok(default),
            value => match value.as_u64().filter(|&size| size >= least) {
                Some(size) => Ok(size as usize),
                None => Err(refused(format!("{key} is {value}, not an integer from {least} on"))),
            },
        };
        let token = |key: &str, default: &str| config[key].as_str().unwrap_or(default).to_owned();
        let config = Self {
            backbone,
            hidden: size("hidden_size", 512, 2)?,
            max_width: size("max_width", 12, 1)?,
            max_words: size("max_len", 384, 1)?,
            rnn_layers: size("num_rnn_layers", 1, 0)?,
            tokens: [token("ent_token", "<<ENT>>"), token("sep_token", "<<SEP>>")],
            label_is_marker: config["embed_ent_token"].as_bool().unwrap_or(true),
        };
        match config.rnn_layers > 0 && config.hidden % 2 == 1 {
            true => Err(refused(format!("hidden_size {} is odd; the LSTM halves it", config.hidden))),
            false => Ok(config),
        }
    }
}

/// The error for a checkpoint without a tokenizer, which the package takes from the backbone.
pub fn without_tokenizer() -> ModelError {
    ModelError::Unsupported(format!(
        "tokenizer.json is missing: add the backbone's tokenizer.json and tokenizer_config.json to the checkpoint, or \
         {COMPLETE}"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The backbone's configuration as checkpoints of transformers 4 write it.
    fn backbone() -> Value {
        let text = r#"{
            "_name_or_path": "microsoft/deberta-v3-small", "add_cross_attention": false, "architectures": null,
            "attention_probs_dropout_prob": 0.1, "bad_words_ids": null, "begin_suppress_tokens": null,
            "chunk_size_feed_forward": 0, "cross_attention_hidden_size": null, "decoder_start_token_id": null,
            "diversity_penalty": 0.0, "do_sample": false, "early_stopping": false,
            "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": null, "finetuning_task": null,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
            "id2label": { "0": "LABEL_0", "1": "LABEL_1" }, "initializer_range": 0.02, "intermediate_size": 3072,
            "is_decoder": false, "is_encoder_decoder": false, "label2id": { "LABEL_0": 0, "LABEL_1": 1 },
            "layer_norm_eps": 1e-7, "length_penalty": 1.0, "max_length": 20, "max_position_embeddings": 512,
            "max_relative_positions": -1, "min_length": 0, "model_type": "deberta-v2", "no_repeat_ngram_size": 0,
            "norm_rel_ebd": "layer_norm", "num_attention_heads": 12, "num_beam_groups": 1, "num_beams": 1,
            "num_hidden_layers": 6, "num_return_sequences": 1, "output_scores": false, "pad_token_id": 0,
            "pooler_dropout": 0, "pooler_hidden_act": "gelu", "pooler_hidden_size": 768,
            "pos_att_type": ["p2c", "c2p"], "position_biased_input": false, "position_buckets": 256,
            "prefix": null, "pruned_heads": {}, "relative_attention": true, "remove_invalid_values": false,
            "repetition_penalty": 1.0, "return_dict": true, "return_dict_in_generate": false,
            "share_att_key": true, "temperature": 1.0, "tf_legacy_loss": false, "tie_encoder_decoder": false,
            "tie_word_embeddings": true, "top_k": 50, "top_p": 1.0, "torch_dtype": null, "torchscript": false,
            "type_vocab_size": 0, "typical_p": 1.0, "use_bfloat16": false, "vocab_size": 128004
        }"#;
        serde_json::from_str(text).expect("JSON")
    }

    fn read(changes: Value) -> Result<Config, String> {
        // As published, with settings of the training.
        let mut config = json!({
            "lr_encoder": "1e-5", "num_steps": 30000, "max_width": 12, "model_name": "microsoft/deberta-v3-small",
            "fine_tune": true, "subtoken_pooling": "first", "hidden_size": 512, "span_mode": "markerV0",
            "dropout": 0.4, "root_dir": "ablation_backbone", "prev_path": "none", "size_sup": -1, "max_types": 25,
            "max_len": 384, "name": "large", "log_dir": "logs",
        });
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        Config::of(&config, backbone(), &[]).map_err(|e| e.to_string())
    }

    #[test]
    fn reads_the_published_form() {
        let config = read(json!({})).expect("a configuration");
        assert_eq!((config.hidden, config.max_width, config.max_words, config.rnn_layers), (512, 12, 384, 1));
        assert_eq!((config.backbone.hidden, config.label_is_marker), (768, true));
        assert_eq!(config.tokens, ["<<ENT>>", "<<SEP>>"]);
    }

    #[test]
    fn refuses_other_kinds_by_name() {
        for (changes, message) in [
            (
                json!({ "span_mode": "token_level" }),
                "span_mode \"token_level\" makes it a model that labels single",
            ),
            (json!({ "span_mode": "marker" }), "span_mode \"marker\" is not supported; supported: markerV0"),
            (json!({ "labels_encoder": "bge-small" }), "labels_encoder \"bge-small\" makes it a bi-encoder"),
            (json!({ "post_fusion_schema": "l2l" }), "cross-attention between words and labels"),
            (json!({ "fuse_layers": true }), "mixes the layers of its backbone"),
            (
                json!({ "subtoken_pooling": "mean" }),
                "subtoken_pooling \"mean\" is not supported; supported: first",
            ),
            (json!({ "words_splitter_type": "jieba" }), "words_splitter_type \"jieba\" is not supported"),
            (json!({ "max_width": 0 }), "max_width is 0, not an integer from 1 on"),
            (json!({ "hidden_size": 7 }), "hidden_size 7 is odd"),
        ] {
            let said = read(changes).expect_err("refused");
            assert!(said.contains(message), "{said}");
        }
    }
}
