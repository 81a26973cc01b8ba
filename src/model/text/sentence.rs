//! The settings of sentence-transformers in a checkpoint: modules.json and the files of its modules, one of seven
//! sentence_…_config.json, and config_sentence_transformers.json.
//!
//! Unknown settings in these files are refused by name: a wrong vector would be worse than none.

mod logit_score;
mod modules;
mod pooling;
mod prompts;
mod splade;

use serde_json::Value;

pub(super) use self::logit_score::LogitScore;
use self::modules::Modules;
pub(super) use self::modules::weights_of;
pub use self::modules::{Layer, module_files};
pub use self::prompts::Prompts;
pub use self::splade::Splade;
pub(super) use self::splade::prompts_and_limit;
use super::model::{ModelError, Scores};
use crate::model::kernels::Pooling;
use crate::model::store::Files;

/// The names that sentence-transformers looks for, in this order; the first existing file is used.
pub const TEXT_SETTINGS: [&str; 7] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];

/// How a text becomes a vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Embedding {
    /// Their vectors are concatenated.
    pub poolings: Vec<Pooling>,
    /// What follows the pooling, except for a scaling to length 1 at the end.
    pub layers: Vec<Layer>,
    /// Whether the vector is scaled to length 1.
    pub normalize: bool,
    /// Whether the tokens of a prompt are pooled.
    pub include_prompt: bool,
    pub prompts: Prompts,
}

impl Default for Embedding {
    fn default() -> Self {
        Self {
            poolings: vec![Pooling::Mean],
            layers: Vec::new(),
            normalize: false,
            include_prompt: true,
            prompts: Prompts::default(),
        }
    }
}

/// Settings of sentence-transformers for the tokenizer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TextSettings {
    /// In tokens; replaces the tokenizer's own limit.
    pub max_seq_length: Option<usize>,
    pub lower_case: bool,
}

impl TextSettings {
    /// `task` is what the checkpoint is used for, as a value of `transformer_task`.
    pub(super) fn read(files: &Files, task: &str) -> Result<Self, ModelError> {
        for name in TEXT_SETTINGS {
            let Some(settings) = files.json(name)? else { continue };
            let known = [
                "max_seq_length",
                "do_lower_case",
                // Written by sentence-transformers 6: constructor arguments that do not change results.
                "transformer_task",
                "modality_config",
                "module_output_name",
            ];
            refuse_others(name, &settings, &known)?;
            match settings["transformer_task"].as_str() {
                None => {}
                Some(own) if own == task => {}
                Some(other) => return Err(unsupported(name, &format!("transformer_task {other:?}"), task)),
            }
            let length = &settings["max_seq_length"];
            let max_seq_length = match (length.is_null(), length.as_u64()) {
                (true, _) => None,
                (false, Some(length @ 1..)) => Some(length as usize),
                (false, _) => {
                    return Err(unsupported(name, &format!("max_seq_length {length}"), "a number of tokens"));
                }
            };
            return Ok(Self {
                max_seq_length,
                lower_case: settings["do_lower_case"].as_bool() == Some(true),
            });
        }
        Ok(Self::default())
    }
}

impl Embedding {
    /// Without modules.json: the mean, not normalized.
    pub(super) fn read(files: &Files) -> Result<Self, ModelError> {
        let Some(modules) = files.json("modules.json")? else { return Ok(Self::default()) };
        let prompts = Prompts::read(files)?;
        let Modules { poolings, include_prompt, mut layers } = Modules::read(files, &modules)?;
        let mut normalize = false;
        while layers.last() == Some(&Layer::Normalize) {
            layers.pop();
            normalize = true;
        }
        Ok(Self { poolings, layers, normalize, include_prompt, prompts })
    }
}

/// The activation that sentence-transformers applies to a cross-encoder's logits: that of
/// config_sentence_transformers.json, else that of config.json's newer or older key, else a sigmoid.
///
/// # Errors
/// The activation is neither a sigmoid nor the identity, or the file sets a prompt for a model that is not `prompted`.
pub(super) fn cross_encoder_scores(
    files: &Files,
    config: &Value,
    prompted: bool,
) -> Result<Scores, ModelError> {
    let file = "config_sentence_transformers.json";
    let own = files.json(file)?.unwrap_or_default();
    if let Some(prompt) = own["default_prompt_name"].as_str().filter(|_| !prompted) {
        return Err(unsupported(file, &format!("default_prompt_name {prompt:?}"), "no prompt for pairs"));
    }
    let places = [
        (file, &own["activation_fn"]),
        ("config.json", &config["sentence_transformers"]["activation_fn"]),
        ("config.json", &config["sbert_ce_default_activation_function"]),
    ];
    let named = places.into_iter().find_map(|(file, value)| Some((file, value.as_str()?)));
    match named.map(|(file, name)| (file, name, name.rsplit('.').next().unwrap_or_default())) {
        None | Some((_, _, "Sigmoid")) => Ok(Scores::Sigmoid),
        Some((_, _, "Identity")) => Ok(Scores::Raw),
        Some((file, name, _)) => {
            Err(unsupported(file, &format!("the activation {name}"), "Sigmoid, Identity"))
        }
    }
}

fn unsupported(file: &str, what: &str, supported: &str) -> ModelError {
    ModelError::Unsupported(format!("{file}: {what} is not supported; supported: {supported}"))
}

/// # Errors
/// A key is neither known nor off.
fn refuse_others(file: &str, settings: &Value, known: &[&str]) -> Result<(), ModelError> {
    let others = settings.as_object().into_iter().flatten();
    let others = others.filter(|(key, value)| !known.contains(&key.as_str()) && !is_off(value));
    match others.map(|(key, _)| key.as_str()).collect::<Vec<_>>().as_slice() {
        [] => Ok(()),
        keys => Err(ModelError::Unsupported(format!(
            "{file}: kandle does not know {} and cannot tell whether it changes the vectors; remove it from the file if it does not",
            keys.join(", ")
        ))),
    }
}

/// Whether a value is null, false or empty, so that its key changes nothing.
pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}
