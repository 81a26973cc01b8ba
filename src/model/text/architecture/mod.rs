//! What differs between architectures, as data: sizes, tensor names, the placement of norms, positions. Each has a
//! file; [`super::Encoder`] runs them all.

mod albert;
mod bert;
mod deberta;
mod decoder;
mod distilbert;
mod electra;
mod gemma3;
mod gte;
mod jina;
mod modernbert;
mod mpnet;
mod nomic;
mod qwen3;
mod roberta;
mod tower;

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::Value;

pub use self::tower::{End, Tower};
use super::sentence::is_off;
pub use crate::model::kernels::{Activation, Gate, Mask, NormKind, Pooling, Rope};

/// The architectures, by config.json's `model_type`. To add one, add a file and a line here.
const KNOWN: &[(&str, Describe)] = &[
    ("albert", albert::describe),
    ("bert", bert::describe),
    ("camembert", roberta::describe),
    ("clip", tower::clip),
    ("clip_text_model", tower::clip),
    ("deberta-v2", deberta::describe),
    ("distilbert", distilbert::describe),
    ("electra", electra::describe),
    ("gemma3_text", gemma3::describe),
    ("gte", gte::describe),
    ("modernbert", modernbert::describe),
    ("mpnet", mpnet::describe),
    ("new", gte::describe),
    ("nomic_bert", nomic::describe),
    ("qwen3", qwen3::describe),
    ("roberta", roberta::describe),
    ("siglip", tower::siglip),
    ("siglip_text_model", tower::siglip),
    ("xlm-roberta", roberta::describe),
];

type Describe = fn(&Config<'_>) -> Result<Architecture, ConfigError>;

/// Keys that change what a model computes in ways that kandle does not support: refused unless they are off.
const UNSUPPORTED: &[&str] =
    &["is_decoder", "is_encoder_decoder", "add_cross_attention", "pruned_heads", "quantization_config"];

/// Keys that change no prediction: of training, loading and text generation, those that are read elsewhere (labels),
/// and those that transformers itself does not read.
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
    "classifier_dropout_prob",
    "cls_dropout",
    "cls_token_id",
    "decoder_bias",
    "deterministic_flash_attn",
    "directionality",
    // ALBERT: never read by transformers.
    "down_scale_factor",
    "dropout",
    "dtype",
    "embd_pdrop",
    "embedding_dropout",
    "eos_token_id",
    "finetuning_task",
    "gap_size",
    "generator_size",
    "gradient_checkpointing",
    "head_dim",
    "hidden_dropout_prob",
    "id2label",
    "initializer_cutoff_factor",
    "initializer_range",
    "label2id",
    "language",
    // DeBERTa: of the head for masked language modelling.
    "legacy",
    "mask_token_id",
    "max_length",
    "mlp_dropout",
    "model_max_length",
    "model_type",
    "net_structure_type",
    "num_labels",
    "num_memory_blocks",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "pooler_dropout",
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
    // A key of cross-encoders: only reranking reads it. Classifiers score as in transformers.
    "sbert_ce_default_activation_function",
    "sentence_transformers",
    "sep_token_id",
    "seq_classif_dropout",
    // Position tables are read from the weights, sinusoidal or learned.
    "sinusoidal_pos_embds",
    "sparse_pred_ignore_index",
    "sparse_prediction",
    // How text is generated, in files of transformers 2 to 4.
    "bad_words_ids",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_ids",
    "length_penalty",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "task_specific_params",
    // ELECTRA: of a head for other tasks.
    "summary_activation",
    "summary_last_dropout",
    "summary_type",
    "summary_use_proj",
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

/// A problem with config.json.
#[derive(Debug, thiserror::Error)]
#[error("config.json: {0}")]
pub struct ConfigError(pub String);

/// All that the encoder needs to know about a model.
#[derive(Debug, Clone)]
pub struct Architecture {
    /// config.json's `model_type`.
    pub name: String,
    /// Possible prefixes of the encoder's tensor names in a checkpoint with a head.
    pub prefixes: &'static [&'static str],
    pub vocabulary: usize,
    pub hidden: usize,
    pub heads: Heads,
    pub intermediate: usize,
    pub norm_eps: f64,
    pub embeddings: Embeddings,
    pub positions: Positions,
    /// Equal layers share their weights.
    pub layers: Vec<Layer>,
    pub relative_bias: Option<RelativeBias>,
    pub norms: NormPlacement,
    pub feed_forward: FeedForward,
    /// Whether linear layers have a bias.
    pub attention_bias: bool,
    pub up_bias: bool,
    pub down_bias: bool,
    pub norm: NormKind,
    /// Tensor name of the norm after the last layer.
    pub final_norm: Option<&'static str>,
    pub convolution: Option<LocalConvolution>,
    pub classifier: Classifier,
    pub masked_lm: Option<MaskedLm>,
    /// It is one of two models, whose vectors of texts are compared with those of images.
    pub tower: Option<Tower>,
}

/// What the layers of a model are built of, whatever comes before and after them: texts, or the patches of an image.
#[derive(Debug, Clone, Copy)]
pub struct Blocks<'a> {
    pub hidden: usize,
    pub heads: Heads,
    pub intermediate: usize,
    /// The longest sequence in tokens.
    pub max_tokens: usize,
    /// Equal layers share their weights.
    pub layers: &'a [Layer],
    pub relative_bias: Option<&'a RelativeBias>,
    pub norms: NormPlacement,
    pub norm: NormKind,
    pub norm_eps: f64,
    pub feed_forward: FeedForward,
    pub attention_bias: bool,
    pub up_bias: bool,
    pub down_bias: bool,
    /// Tensor name of the norm after the last layer.
    pub final_norm: Option<&'a str>,
    pub convolution: Option<&'a LocalConvolution>,
}

impl Blocks<'_> {
    /// Width of the feed-forward's `up` projection, which has two halves if gated.
    pub fn up(&self) -> usize {
        match self.feed_forward {
            FeedForward::Plain(_) => self.intermediate,
            FeedForward::Gated(..) => 2 * self.intermediate,
        }
    }

    /// Elements of a layer's matrices.
    pub fn layer_weights(&self) -> usize {
        let attention = 2 * self.heads.all_queries() + 2 * self.heads.all_keys();
        self.hidden * (attention + self.up() + self.intermediate)
    }
}

/// The heads of a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    pub queries: usize,
    /// Heads of keys and values; each serves `queries / keys` heads of queries.
    pub keys: usize,
    /// Elements of a head.
    pub width: usize,
    /// Factor of the attention scores.
    pub scale: f64,
}

impl Heads {
    /// Elements of all queries of a token, which is also the width of the attention's result.
    pub fn all_queries(&self) -> usize {
        self.queries * self.width
    }

    /// Elements of all keys of a token, and of all its values.
    pub fn all_keys(&self) -> usize {
        self.keys * self.width
    }
}

#[derive(Debug, Clone)]
pub struct Embeddings {
    pub word: &'static str,
    /// Tensor name and number of types.
    pub token_type: Option<(&'static str, usize)>,
    /// Factor of the word's row.
    pub scale: Option<f64>,
    pub norm: Option<&'static str>,
    /// Elements of a row of the tables.
    pub width: usize,
    /// From `width` to the hidden size, where they differ.
    pub projection: Option<Projection>,
}

/// The layer between narrow embeddings and the first layer of the trunk.
#[derive(Debug, Clone, Copy)]
pub struct Projection {
    pub name: &'static str,
    pub bias: bool,
    /// The embeddings' norm follows the projection instead of the sum of rows.
    pub before_norm: bool,
}

/// What is added to attention scores by the distance between query and key.
#[derive(Debug, Clone)]
pub enum RelativeBias {
    /// T5's: one table of biases for all layers.
    Buckets {
        name: &'static str,
        buckets: usize,
        /// All distances from here on share a bucket.
        max_distance: usize,
    },
    /// ALiBi's: a slope per head, without weights.
    Slopes,
    /// BEiT's: for each layer the name of a table, which has a bias for each distance of two patches in rows and columns, and
    /// three for the token before them. The patches are a square.
    Patches(Vec<String>),
    /// DeBERTa's: one table of `2 × span` positions, which each layer projects to keys and queries.
    Disentangled {
        name: &'static str,
        /// Tensor name of the table's norm.
        norm: Option<&'static str>,
        span: usize,
        /// Distances share logarithmic buckets up to this one; `None` for a position per distance.
        max_distance: Option<usize>,
        /// Tensor name of a layer's projection to keys; `None` if scores have no content-to-position term.
        keys: Option<fn(usize) -> String>,
        /// The same for queries and the position-to-content term.
        queries: Option<fn(usize) -> String>,
    },
}

/// A convolution over the embeddings, whose activated output is added to the first layer's output and normalised.
#[derive(Debug, Clone)]
pub struct LocalConvolution {
    pub name: &'static str,
    pub norm: &'static str,
    /// Tokens that an output depends on; odd.
    pub size: usize,
    pub activation: Activation,
}

#[derive(Debug, Clone)]
pub enum Positions {
    /// A table of `count` rows; a sequence's first token has row `first`.
    Learned { name: &'static str, count: usize, first: usize },
    /// Rotated queries and keys (RoPE), configured by layer, for `count` positions.
    Rotary { count: usize },
    /// Only the distances between tokens count ([`RelativeBias`]); sequences have at most `count` tokens.
    Relative { count: usize },
}

/// The tensor names of one layer, without the encoder's prefix, and its kind of attention.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    pub qkv: Qkv,
    pub attention_out: String,
    /// Before attention in a pre-norm model (`None` for no norm), after it in a post-norm model.
    pub attention_norm: Option<String>,
    /// If there are several, their outputs are concatenated.
    pub up: Vec<String>,
    pub down: String,
    pub mlp_norm: String,
    /// Norms of the results of attention and feed-forward, before the residual is added (pre-norm only).
    pub branch_norms: Option<[String; 2]>,
    /// Factors of each element of the results of attention and feed-forward, before the residual is added (layer scale,
    /// arXiv:2103.17239).
    pub scales: Option<[String; 2]>,
    /// RMSNorms of each head's query and key.
    pub qk_norms: Option<[String; 2]>,
    pub rope: Option<Rope>,
    pub mask: Mask,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Qkv {
    Separate([String; 3]),
    /// Of the keys there is no bias.
    KeysWithoutBias([String; 3]),
    Fused(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// After the residual, as in BERT (post-norm).
    Post,
    /// Before attention and feed-forward, as in ModernBERT (pre-norm).
    Pre,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedForward {
    Plain(Activation),
    /// `up` gives two halves; one of them, activated, is multiplied by the other (GeGLU, arXiv:2002.05202).
    Gated(Activation, Gate),
}

/// The head for masked language modelling: a dense layer from the hidden size to the embeddings' width, its activation
/// and norm, and an output layer whose weight is the table of embeddings unless `tie_word_embeddings` is false. Tensor
/// names are without a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskedLm {
    pub dense: &'static str,
    pub dense_bias: bool,
    pub activation: Activation,
    pub norm: &'static str,
    pub out: &'static str,
    /// The names of the output layer's bias, today's first; empty if it has none.
    pub biases: &'static [&'static str],
}

/// The classification head: the tensors between a pooled sequence, or a token, and its logits.
#[derive(Debug, Clone)]
pub struct Classifier {
    pub pooling: Pooling,
    /// Tokens with this id at the end of a sequence are not pooled; only causal models have it.
    pub padding: Option<u32>,
    /// The layer before the output layer, if there is one. The following fields are about it.
    pub dense: Option<&'static str>,
    /// `dense` is under the encoder's prefix.
    pub dense_in_encoder: bool,
    pub dense_bias: bool,
    pub activation: Activation,
    pub norm: Option<&'static str>,
    pub out: &'static str,
    pub out_bias: bool,
    /// A token classifier has `dense` too, not only the output layer.
    pub dense_for_tokens: bool,
}

impl Classifier {
    /// Tensor name of the output layer, which is the same for all token classifiers.
    pub fn out(&self, per_token: bool) -> &'static str {
        if per_token { "classifier" } else { self.out }
    }
}

impl Architecture {
    /// config.json's `model_type` of all architectures.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KNOWN.iter().map(|(name, _)| *name)
    }

    /// Reads config.json. `ignored` are unknown keys that change nothing (`model.ignore_config`).
    ///
    /// # Errors
    /// The architecture is not known, or a key has a value that kandle does not support.
    pub fn from_config(json: &Value, ignored: &[String]) -> Result<Self, ConfigError> {
        let known = || Self::names().collect::<Vec<_>>().join(", ");
        let Some(name) = json["model_type"].as_str() else {
            return Err(ConfigError(format!("has no model_type; supported: {}", known())));
        };
        match KNOWN.iter().find(|(known, _)| *known == name) {
            Some((_, describe)) => {
                // CLIP and SigLIP have two models.
                let two = json["text_config"].is_object() && json["vision_config"].is_object();
                let config = Config::new(if two { &json["text_config"] } else { json });
                let architecture = describe(&config)?;
                config.refuse_others(ignored)?;
                Ok(Architecture { name: name.to_owned(), ..architecture })
            }
            None => Err(ConfigError(format!(
                "model_type {name:?} is not supported; supported: {}{}",
                known(),
                instead_of(name).unwrap_or_default()
            ))),
        }
    }

    /// The layers that have weights of their own.
    pub fn distinct_layers(&self) -> impl Iterator<Item = &Layer> {
        let layers = self.layers.iter().enumerate();
        layers.filter(|(i, layer)| !self.layers[..*i].contains(layer)).map(|(_, layer)| layer)
    }

    /// The longest sequence in tokens, special tokens included.
    pub fn max_tokens(&self) -> usize {
        match self.positions {
            Positions::Learned { count, first, .. } => count - first,
            Positions::Rotary { count } | Positions::Relative { count } => count,
        }
    }

    /// What the layers are built of.
    pub fn blocks(&self) -> Blocks<'_> {
        Blocks {
            hidden: self.hidden,
            heads: self.heads,
            intermediate: self.intermediate,
            max_tokens: self.max_tokens(),
            layers: &self.layers,
            relative_bias: self.relative_bias.as_ref(),
            norms: self.norms,
            norm: self.norm,
            norm_eps: self.norm_eps,
            feed_forward: self.feed_forward,
            attention_bias: self.attention_bias,
            up_bias: self.up_bias,
            down_bias: self.down_bias,
            final_norm: self.final_norm,
            convolution: self.convolution.as_ref(),
        }
    }

    /// Elements of the output layer of a head for masked language modelling.
    pub fn vocabulary_weights(&self) -> usize {
        self.vocabulary * self.embeddings.width
    }

    /// Elements of a layer's matrices.
    pub fn layer_weights(&self) -> usize {
        self.blocks().layer_weights()
    }

    /// How many tables of positions each layer has, projected when the model is loaded, and the elements of one.
    pub fn position_tables(&self) -> (usize, usize) {
        match &self.relative_bias {
            Some(RelativeBias::Disentangled { span, keys, queries, .. }) => {
                (usize::from(keys.is_some()) + usize::from(queries.is_some()), 2 * span * self.hidden)
            }
            _ => (0, 0),
        }
    }

    /// Floating-point operations of the layers' matrix products for a sequence; a multiply-add counts as two.
    pub fn operations(&self, length: usize) -> u64 {
        let weights = self.layer_weights();
        // Query · key and weights · values; each term by distance is about as much as one of them.
        let per_key = (2 + self.position_tables().0) * self.heads.all_queries();
        let of = |layer: &Layer| 2 * length * (weights + layer.mask.keys_per_query(length) * per_key);
        self.layers.iter().map(|layer| of(layer) as u64).sum()
    }

    /// Whether no token attends to a later one.
    pub fn is_causal(&self) -> bool {
        self.layers.iter().all(|layer| layer.mask.is_causal())
    }
}

/// A config.json. Its errors name the key. It records which keys were read, so that all others can be refused.
pub struct Config<'a> {
    json: &'a Value,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Config<'a> {
    pub(in crate::model) fn new(json: &'a Value) -> Self {
        Self { json, read: RefCell::default() }
    }

    /// The value of a key; null if it is missing.
    pub(in crate::model) fn get(&self, key: &str) -> &'a Value {
        self.read.borrow_mut().insert(key.to_owned());
        &self.json[key]
    }

    /// Refuses keys that were not read and may change predictions.
    pub(in crate::model) fn refuse_others(&self, ignored: &[String]) -> Result<(), ConfigError> {
        for key in UNSUPPORTED {
            // Whoever has read it supports it.
            let read = self.read.borrow().contains(*key);
            if !read && !is_off(self.get(key)) {
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

    pub(in crate::model) fn name(&self) -> String {
        self.get("model_type").as_str().unwrap_or_default().to_owned()
    }

    pub(in crate::model) fn size(&self, key: &str) -> Result<usize, ConfigError> {
        match self.get(key).as_u64() {
            Some(n) if n > 0 => Ok(n as usize),
            _ => Err(ConfigError(format!("{key} is {}, not a positive integer", self.get(key)))),
        }
    }

    pub(in crate::model) fn size_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        if self.get(key).is_null() { Ok(default) } else { self.size(key) }
    }

    pub(in crate::model) fn number_or(&self, key: &str, default: f64) -> f64 {
        self.get(key).as_f64().unwrap_or(default)
    }

    pub(in crate::model) fn flag_or(&self, key: &str, default: bool) -> bool {
        self.get(key).as_bool().unwrap_or(default)
    }

    pub(in crate::model) fn activation(&self, key: &str, default: &str) -> Result<Activation, ConfigError> {
        Ok(match self.get(key).as_str().unwrap_or(default) {
            "gelu" | "gelu_python" => Activation::Gelu,
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            "relu6" => Activation::Relu6,
            "silu" | "swish" => Activation::Silu,
            "quick_gelu" => Activation::QuickGelu,
            "tanh" => Activation::Tanh,
            other => {
                return Err(ConfigError(format!(
                    "{key} {other:?} is not supported; supported: gelu, gelu_new, quick_gelu, relu, silu, tanh"
                )));
            }
        })
    }

    /// The heads, whose number has to divide the width.
    fn heads(&self, key: &str, hidden: usize) -> Result<Heads, ConfigError> {
        let heads = self.size(key)?;
        if !hidden.is_multiple_of(heads) {
            return Err(ConfigError(format!("{key} {heads} does not divide the width {hidden}")));
        }
        let width = hidden / heads;
        Ok(Heads { queries: heads, keys: heads, width, scale: (width as f64).powf(-0.5) })
    }

    /// The heads of a decoder: those of keys may be fewer than those of queries, and their width is a key of its own.
    fn grouped_heads(&self, default_keys: usize, default_width: usize) -> Result<Heads, ConfigError> {
        let queries = self.size("num_attention_heads")?;
        let keys = self.size_or("num_key_value_heads", default_keys)?;
        let width = self.size_or("head_dim", default_width)?;
        if !queries.is_multiple_of(keys) {
            return Err(ConfigError(format!(
                "num_key_value_heads {keys} does not divide num_attention_heads {queries}"
            )));
        }
        if !width.is_multiple_of(2) {
            return Err(ConfigError(format!("head_dim {width} is odd; RoPE rotates pairs of elements")));
        }
        Ok(Heads { queries, keys, width, scale: (width as f64).powf(-0.5) })
    }

    /// Tensor name and number of token types; `None` if there are none.
    fn types(&self, name: &'static str, default: u64) -> Option<(&'static str, usize)> {
        let count = self.get("type_vocab_size").as_u64().unwrap_or(default);
        (count > 0).then_some((name, count as usize))
    }

    /// For each of `count` layers, whether `layer_types` says that it has a sliding window; `None` without that key.
    fn sliding_layers(&self, count: usize) -> Result<Option<Vec<bool>>, ConfigError> {
        let Some(types) = self.get("layer_types").as_array() else { return Ok(None) };
        if types.len() != count {
            return Err(ConfigError(format!("layer_types has {} entries for {count} layers", types.len())));
        }
        let sliding = types.iter().map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(ConfigError(format!("layer_types: {kind} is not full_attention or sliding_attention"))),
        });
        sliding.collect::<Result<_, _>>().map(Some)
    }

    /// The base in `rope_parameters` (transformers 5); `None` if it is not given.
    fn rope_parameters(&self, parameters: &Value, key: &str) -> Result<Option<f64>, ConfigError> {
        match parameters["rope_type"].as_str() {
            None | Some("default") => Ok(parameters["rope_theta"].as_f64()),
            Some(other) => {
                Err(ConfigError(format!("{key}.rope_type {other:?} is not supported; supported: default")))
            }
        }
    }

    fn absolute_positions(&self) -> Result<(), ConfigError> {
        match self.get("position_embedding_type").as_str() {
            None | Some("absolute") => Ok(()),
            Some(other) => Err(ConfigError(format!(
                "position_embedding_type {other:?} is not supported; supported: absolute"
            ))),
        }
    }
}

/// What to use instead of a checkpoint of a type that kandle does not run; it follows the list of supported types.
fn instead_of(model_type: &str) -> Option<&'static str> {
    if crate::model::vision::knows(model_type) {
        return Some(". It is a model of images, for task.kind: image-classification or image-embedding");
    }
    INSTEAD.iter().find(|(types, _)| types.contains(&model_type)).map(|(_, instead)| *instead)
}

/// Model types that users ask for most, and a kind of checkpoint that does the same job.
const INSTEAD: &[(&[&str], &str)] = &[
    (
        &["deberta"],
        ". It is the first version of DeBERTa; use a checkpoint of DeBERTa v2 or v3 (model_type \"deberta-v2\")",
    ),
    (
        &["bart", "mbart"],
        ". It is an encoder-decoder; for zero-shot-classification, use an encoder trained for natural language \
         inference, such as roberta-large-mnli or xlm-roberta-large-xnli",
    ),
    (
        &["t5", "mt5", "umt5", "longt5", "pegasus", "marian", "m2m_100", "t5gemma"],
        ". It is an encoder-decoder that generates text; for text-embedding, use an encoder such as \
         multilingual-e5-large or gte-multilingual-base, for classification one fine-tuned for it",
    ),
    (
        &[
            "deepseek_v3",
            "falcon",
            "gemma",
            "gemma2",
            "gpt2",
            "gpt_neo",
            "gpt_neox",
            "gpt_oss",
            "gptj",
            "llama",
            "mistral",
            "mixtral",
            "olmo2",
            "opt",
            "phi",
            "phi3",
            "qwen2",
            "qwen3_moe",
            "bloom",
        ],
        ". It generates text; for text-embedding, use Qwen3-Embedding or an encoder such as multilingual-e5-large, \
         for reranking Qwen3-Reranker or a cross-encoder such as bge-reranker-v2-m3",
    ),
];
