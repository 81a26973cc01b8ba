//! What differs between architectures, as data: sizes, tensor names, where norms stand, how
//! positions are told. One file each; the one [`super::Encoder`] runs them all.

mod bert;
mod distilbert;
mod gte;
mod modernbert;
mod nomic;
mod roberta;

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::Value;

pub use super::ops::{Activation, Gate};
use super::sentence::is_off;

/// The architectures, by config.json's `model_type`: an architecture is one line here and a file.
const KNOWN: &[(&str, Describe)] = &[
    ("bert", bert::describe),
    ("distilbert", distilbert::describe),
    ("gte", gte::describe),
    ("modernbert", modernbert::describe),
    ("new", gte::describe),
    ("nomic_bert", nomic::describe),
    ("roberta", roberta::describe),
    ("xlm-roberta", roberta::describe),
];

type Describe = fn(&Config<'_>) -> Result<Architecture, ConfigError>;

/// Keys that change what a model computes, in ways that kandle does not: refused unless they are off.
const UNSUPPORTED: &[&str] =
    &["is_decoder", "is_encoder_decoder", "add_cross_attention", "pruned_heads", "quantization_config"];

/// Keys that change no prediction: how the model was trained, how it is loaded, how text is generated, what is read
/// elsewhere (labels), and what transformers itself does not read.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "_num_labels",
    "architectures",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "cls_token_id",
    "decoder_bias",
    "deterministic_flash_attn",
    "directionality",
    "dropout",
    "dtype",
    "embd_pdrop",
    "embedding_dropout",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "head_dim",
    "hidden_dropout_prob",
    "id2label",
    "initializer_cutoff_factor",
    "initializer_range",
    "label2id",
    "language",
    "mask_token_id",
    "max_length",
    "mlp_dropout",
    "model_max_length",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "problem_type",
    "qa_dropout",
    "reference_compile",
    "repad_logits_with_grad",
    "resid_pdrop",
    "return_dict",
    // Of cross-encoders: kandle's reranking reads it, a classifier's scores are transformers'.
    "sbert_ce_default_activation_function",
    "sentence_transformers",
    "sep_token_id",
    "seq_classif_dropout",
    // Tables of positions are read from the weights, however they were made.
    "sinusoidal_pos_embds",
    "sparse_pred_ignore_index",
    "sparse_prediction",
    "task_specific_params",
    "tie_encoder_decoder",
    "tie_weights_",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_cache",
    "use_flash_attn",
    "use_memory_efficient_attention",
    "unpad_inputs",
];

/// What is wrong with a config.json.
#[derive(Debug, thiserror::Error)]
#[error("config.json: {0}")]
pub struct ConfigError(pub String);

/// All the encoder needs to know.
#[derive(Debug, Clone)]
pub struct Architecture {
    /// config.json's `model_type`.
    pub name: String,
    /// What a checkpoint with a head puts before the encoder's tensor names, one or another.
    pub prefixes: &'static [&'static str],
    pub vocabulary: usize,
    pub hidden: usize,
    pub heads: usize,
    pub intermediate: usize,
    pub norm_eps: f64,
    pub embeddings: Embeddings,
    pub positions: Positions,
    pub layers: Vec<Layer>,
    pub norms: Norms,
    pub feed_forward: FeedForward,
    /// Whether linear layers have a bias.
    pub attention_bias: bool,
    pub up_bias: bool,
    pub down_bias: bool,
    pub norm_bias: bool,
    /// A norm after the last layer.
    pub final_norm: Option<&'static str>,
    pub classifier: Classifier,
}

#[derive(Debug, Clone)]
pub struct Embeddings {
    pub word: &'static str,
    /// Name and number of types.
    pub token_type: Option<(&'static str, usize)>,
    pub norm: &'static str,
}

#[derive(Debug, Clone)]
pub enum Positions {
    /// A table of `count` rows; a sequence's first token has row `first`.
    Learned { name: &'static str, count: usize, first: usize },
    /// Rotated queries and keys, how by layer.
    Rotary { count: usize },
}

/// RoPE (arXiv:2104.09864): at a position, numbers i and i + width / 2 of a head are turned by the angle
/// position × theta^(-2i/width) / stretch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub stretch: f64,
}

/// The tensors of one layer, names complete but for the prefix, and how it attends.
#[derive(Debug, Clone)]
pub struct Layer {
    pub qkv: Qkv,
    pub attention_out: String,
    /// Before attention where norms come first (`None` for no norm), after it where they come last.
    pub attention_norm: Option<String>,
    /// One below the other, where there are several.
    pub up: Vec<String>,
    pub down: String,
    pub mlp_norm: String,
    pub rope: Option<Rope>,
    /// Tokens see others at most this far away.
    pub reach: Option<usize>,
}

#[derive(Debug, Clone)]
pub enum Qkv {
    Separate([String; 3]),
    Fused(String),
}

/// Where norms stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norms {
    /// After the residual, as in BERT.
    Last,
    /// Before attention and feed-forward, as in ModernBERT.
    First,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedForward {
    Plain(Activation),
    /// `up` gives two halves; one of them, activated, is multiplied by the other (GeGLU, arXiv:2002.05202).
    Gated(Activation, Gate),
}

/// The tensors between a pooled sequence, or a token, and its logits.
#[derive(Debug, Clone)]
pub struct Classifier {
    /// Pooled by the mean instead of the first token.
    pub mean: bool,
    pub dense: &'static str,
    /// `dense` is under the encoder's prefix.
    pub dense_in_encoder: bool,
    pub dense_bias: bool,
    pub activation: Activation,
    pub norm: Option<&'static str>,
    pub out: &'static str,
    /// A classifier of tokens has `dense` too, and not its output layer alone.
    pub dense_for_tokens: bool,
}

impl Classifier {
    /// The output layer, which all classifiers of tokens name alike.
    pub fn out(&self, per_token: bool) -> &'static str {
        if per_token { "classifier" } else { self.out }
    }
}

impl Architecture {
    /// Reads config.json. `ignored` are keys that change nothing although kandle does not know them.
    ///
    /// # Errors
    /// The architecture is not known, or a key asks for what kandle does not do.
    pub fn from_config(json: &Value, ignored: &[String]) -> Result<Self, ConfigError> {
        let known = || KNOWN.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let Some(name) = json["model_type"].as_str() else {
            return Err(ConfigError(format!("has no model_type; kandle knows {}", known())));
        };
        match KNOWN.iter().find(|(known, _)| *known == name) {
            Some((_, describe)) => {
                let config = Config::new(json);
                let architecture = describe(&config)?;
                config.refuse_others(ignored)?;
                Ok(architecture)
            }
            None => Err(ConfigError(format!("model_type {name:?} is not known; kandle knows {}", known()))),
        }
    }

    /// The longest sequence, in tokens with the special ones.
    pub fn max_tokens(&self) -> usize {
        match self.positions {
            Positions::Learned { count, first, .. } => count - first,
            Positions::Rotary { count } => count,
        }
    }

    /// Numbers that a token has before the feed-forward's activation: a gated one's are in two halves.
    pub fn up(&self) -> usize {
        match self.feed_forward {
            FeedForward::Plain(_) => self.intermediate,
            FeedForward::Gated(..) => 2 * self.intermediate,
        }
    }

    /// Floating-point operations that the layers' multiplications are for a sequence, two a multiply-add.
    pub fn operations(&self, length: usize) -> u64 {
        let weights = self.hidden * (4 * self.hidden + self.up() + self.intermediate);
        let seen = |layer: &Layer| layer.reach.map_or(length, |reach| length.min(2 * reach + 1));
        let of = |layer: &Layer| 2 * length * (weights + 2 * seen(layer) * self.hidden);
        self.layers.iter().map(|layer| of(layer) as u64).sum()
    }
}

/// A config.json, read with messages that name the key. It notes which keys were asked for.
pub struct Config<'a> {
    json: &'a Value,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Config<'a> {
    fn new(json: &'a Value) -> Self {
        Self { json, read: RefCell::default() }
    }

    /// The value of a key; null where it is not there.
    fn get(&self, key: &str) -> &'a Value {
        self.read.borrow_mut().insert(key.to_owned());
        &self.json[key]
    }

    /// Refuses what nobody has asked for and what may change predictions.
    fn refuse_others(&self, ignored: &[String]) -> Result<(), ConfigError> {
        for key in UNSUPPORTED {
            if !is_off(self.get(key)) {
                return Err(ConfigError(format!("{key}: {} is not supported", self.get(key))));
            }
        }
        let read = self.read.borrow();
        let known = |key: &str| {
            read.contains(key) || HARMLESS.contains(&key) || ignored.iter().any(|ignored| ignored == key)
        };
        let others = self.json.as_object().into_iter().flatten();
        let others = others.filter(|(key, value)| !known(key) && !is_off(value));
        match others.map(|(key, _)| key.as_str()).collect::<Vec<_>>().as_slice() {
            [] => Ok(()),
            keys => Err(ConfigError(format!(
                "kandle does not know {} and cannot tell whether it changes predictions; if it does not, name it in \
                 model.ignore_config",
                keys.join(", ")
            ))),
        }
    }

    fn name(&self) -> String {
        self.get("model_type").as_str().unwrap_or_default().to_owned()
    }

    fn size(&self, key: &str) -> Result<usize, ConfigError> {
        match self.get(key).as_u64() {
            Some(n) if n > 0 => Ok(n as usize),
            _ => Err(ConfigError(format!("{key} is {}, not a size", self.get(key)))),
        }
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        if self.get(key).is_null() { Ok(default) } else { self.size(key) }
    }

    fn number_or(&self, key: &str, default: f64) -> f64 {
        self.get(key).as_f64().unwrap_or(default)
    }

    fn flag_or(&self, key: &str, default: bool) -> bool {
        self.get(key).as_bool().unwrap_or(default)
    }

    fn activation(&self, key: &str, default: &str) -> Result<Activation, ConfigError> {
        Ok(match self.get(key).as_str().unwrap_or(default) {
            "gelu" | "gelu_python" => Activation::Gelu,
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            "silu" | "swish" => Activation::Silu,
            "tanh" => Activation::Tanh,
            other => {
                return Err(ConfigError(format!(
                    "{key} {other:?} is not known: gelu, gelu_new, relu, silu, tanh"
                )));
            }
        })
    }

    /// Heads that divide the width.
    fn heads(&self, key: &str, hidden: usize) -> Result<usize, ConfigError> {
        let heads = self.size(key)?;
        if !hidden.is_multiple_of(heads) {
            return Err(ConfigError(format!("{key} {heads} does not divide the width {hidden}")));
        }
        Ok(heads)
    }

    /// Name and number of token types, where there are any.
    fn types(&self, name: &'static str, default: u64) -> Option<(&'static str, usize)> {
        let count = self.get("type_vocab_size").as_u64().unwrap_or(default);
        (count > 0).then_some((name, count as usize))
    }

    /// The base of transformers 5's `rope_parameters`, where they are given.
    fn rope_parameters(&self, parameters: &Value, key: &str) -> Result<Option<f64>, ConfigError> {
        match parameters["rope_type"].as_str() {
            None | Some("default") => Ok(parameters["rope_theta"].as_f64()),
            Some(other) => Err(ConfigError(format!("{key}.rope_type {other:?} is not supported: default"))),
        }
    }

    fn absolute_positions(&self) -> Result<(), ConfigError> {
        match self.get("position_embedding_type").as_str() {
            None | Some("absolute") => Ok(()),
            Some(other) => {
                Err(ConfigError(format!("position_embedding_type {other:?} is not supported: absolute")))
            }
        }
    }
}
