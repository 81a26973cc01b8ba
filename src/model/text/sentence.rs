//! The settings of sentence-transformers in a checkpoint: modules.json, the pooling's config.json, one of seven
//! sentence_…_config.json, and config_sentence_transformers.json.
//!
//! Unknown settings in these files are refused by name: a wrong vector would be worse than none.

use serde_json::Value;

use super::model::{ModelError, Scores};
use crate::model::kernels::Pooling;
use crate::model::store::{Files, FilesError};

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
    pub pooling: Pooling,
    /// Whether the vector is scaled to length 1.
    pub normalize: bool,
    /// Put before every text.
    pub prompt: String,
}

impl Default for Embedding {
    fn default() -> Self {
        Self { pooling: Pooling::Mean, normalize: false, prompt: String::new() }
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
        let file = "config_sentence_transformers.json";
        let prompts = files.json(file)?.unwrap_or_default();
        refuse_others(
            file,
            &prompts,
            &["__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name"],
        )?;
        let prompt = match prompts["default_prompt_name"].as_str() {
            Some(name) => prompts["prompts"][name].as_str().unwrap_or_default().to_owned(),
            None => String::new(),
        };
        let mut normalize = false;
        for module in modules.as_array().into_iter().flatten() {
            refuse_others("modules.json", module, &["idx", "name", "path", "type"])?;
            let kind = module["type"].as_str().unwrap_or_default();
            let path = module["path"].as_str().unwrap_or_default();
            match kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" if path.is_empty() => {}
                "Transformer" => {
                    let what = format!("a Transformer in the folder {path:?}");
                    return Err(unsupported(
                        "modules.json",
                        &what,
                        "one whose files are beside modules.json",
                    ));
                }
                "Pooling" => {}
                "Normalize" => normalize = true,
                _ => return Err(unsupported("modules.json", kind, "Transformer, Pooling and Normalize")),
            }
        }
        let pooling = match pooling_file(Some(&modules))? {
            None => Pooling::Mean,
            Some(name) => pooling(&name, &files.json(&name)?.unwrap_or_default())?,
        };
        Ok(Self { pooling, normalize, prompt })
    }
}

/// How a language model's logits become a score, and how it is prompted: LogitScore of sentence-transformers.
pub(super) struct LogitScore {
    /// Token ids.
    pub yes: u32,
    pub no: Option<u32>,
    /// Messages of the chat template have lists of parts as content.
    pub structured: bool,
    /// The default prompt.
    pub instruction: Option<String>,
}

impl LogitScore {
    /// `None` without modules.json.
    ///
    /// # Errors
    /// modules.json has no LogitScore, or a file has a setting that kandle does not know.
    pub fn read(files: &Files) -> Result<Option<Self>, ModelError> {
        let Some(modules) = files.json("modules.json")? else { return Ok(None) };
        for module in modules.as_array().into_iter().flatten() {
            let kind = module["type"].as_str().unwrap_or_default();
            if !matches!(kind.rsplit('.').next(), Some("Transformer" | "LogitScore")) {
                let supported = "for reranking with a language model, Transformer and LogitScore";
                return Err(unsupported("modules.json", kind, supported));
            }
        }
        let Some(file) = logit_score_file(Some(&modules))? else {
            return Err(unsupported("modules.json", "a language model without LogitScore", "one with it"));
        };
        let config = files.json(&file)?.unwrap_or_default();
        refuse_others(&file, &config, &["true_token_id", "false_token_id", "module_input_name"])?;
        let id = |key: &str| config[key].as_u64().and_then(|id| u32::try_from(id).ok());
        let Some(yes) = id("true_token_id") else {
            let what = format!("true_token_id {}", config["true_token_id"]);
            return Err(unsupported(&file, &what, "a token id"));
        };
        let mut format = Value::Null;
        for name in TEXT_SETTINGS {
            if let Some(settings) = files.json(name)? {
                format = settings["modality_config"]["message"]["format"].clone();
                break;
            }
        }
        let prompts = files.json("config_sentence_transformers.json")?.unwrap_or_default();
        let default = prompts["default_prompt_name"].as_str();
        let instruction = default.and_then(|name| prompts["prompts"][name].as_str()).map(str::to_owned);
        Ok(Some(Self { yes, no: id("false_token_id"), structured: format == "structured", instruction }))
    }
}

/// The path of the pooling's config.json, according to modules.json; `None` if it lists no pooling.
///
/// # Errors
/// The path is outside of the checkpoint's folder, or is the folder itself.
fn pooling_file(modules: Option<&Value>) -> Result<Option<String>, FilesError> {
    module_file(modules, "Pooling")
}

/// The path of LogitScore's config.json, like [`pooling_file`].
fn logit_score_file(modules: Option<&Value>) -> Result<Option<String>, FilesError> {
    module_file(modules, "LogitScore")
}

/// The paths of all modules' config.json that kandle reads.
///
/// # Errors
/// As [`pooling_file`].
pub fn module_files(modules: Option<&Value>) -> Result<impl Iterator<Item = String>, FilesError> {
    Ok(pooling_file(modules)?.into_iter().chain(logit_score_file(modules)?))
}

fn module_file(modules: Option<&Value>, name: &str) -> Result<Option<String>, FilesError> {
    let modules = modules.and_then(Value::as_array).into_iter().flatten();
    let is_it = |module: &&Value| {
        module["type"]
            .as_str()
            .is_some_and(|kind| kind.contains('.') && kind.rsplit('.').next() == Some(name))
    };
    let Some(path) =
        modules.into_iter().find(is_it).map(|module| module["path"].as_str().unwrap_or_default())
    else {
        return Ok(None);
    };
    let inside = |part: &str| !part.is_empty() && part != "." && part != "..";
    match path.split(['/', '\\']).all(inside) {
        true => Ok(Some(format!("{path}/config.json"))),
        false => Err(FilesError::Content {
            file: "modules.json".to_owned(),
            message: format!("the path {path:?} of {name} is not a folder inside of the checkpoint"),
        }),
    }
}

/// Reads `pooling_mode: "mean"`, or the older form with one flag per mode.
fn pooling(file: &str, config: &Value) -> Result<Pooling, ModelError> {
    const MODES: [(&str, &str, Pooling); 6] = [
        ("mean", "pooling_mode_mean_tokens", Pooling::Mean),
        ("cls", "pooling_mode_cls_token", Pooling::First),
        ("lasttoken", "pooling_mode_lasttoken", Pooling::Last),
        ("max", "pooling_mode_max_tokens", Pooling::Max),
        ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens", Pooling::MeanSqrtLen),
        ("weightedmean", "pooling_mode_weightedmean_tokens", Pooling::WeightedMean),
    ];
    const SUPPORTED: &str = "mean, cls, lasttoken, max, mean_sqrt_len_tokens, weightedmean";
    let known = ["word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt"];
    let others = config.as_object().into_iter().flatten();
    let others = others.map(|(key, _)| key.as_str()).filter(|key| key.starts_with("pooling_mode_"));
    refuse_others(file, config, &known.into_iter().chain(others).collect::<Vec<_>>())?;
    if config["include_prompt"].as_bool() == Some(false) {
        return Err(unsupported(file, "include_prompt: false", "true"));
    }
    let mode = match config["pooling_mode"].as_array().map(Vec::as_slice) {
        Some([one]) => one,
        _ => &config["pooling_mode"],
    };
    if !mode.is_null() && !mode.is_string() {
        return Err(unsupported(file, &format!("pooling_mode {mode}"), "one pooling mode"));
    }
    if let Some(mode) = mode.as_str() {
        return match MODES.iter().find(|(name, ..)| *name == mode) {
            Some((.., pooling)) => Ok(*pooling),
            None => Err(unsupported(file, &format!("pooling_mode {mode:?}"), SUPPORTED)),
        };
    }
    let set: Vec<&str> = config
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| key.starts_with("pooling_mode_") && value.as_bool() == Some(true))
        .map(|(key, _)| key.as_str())
        .collect();
    match set.as_slice() {
        [] => Ok(Pooling::Mean),
        [one] => match MODES.iter().find(|(_, flag, _)| flag == one) {
            Some((.., pooling)) => Ok(*pooling),
            None => Err(unsupported(file, one, SUPPORTED)),
        },
        many => Err(unsupported(file, &many.join(" and "), "one pooling mode")),
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn poolings_are_read_in_both_forms() {
        let of = |config: Value| pooling("p", &config).map_err(|e| e.to_string());
        assert_eq!(of(json!({ "pooling_mode": "cls" })), Ok(Pooling::First));
        assert_eq!(of(json!({ "pooling_mode_max_tokens": true })), Ok(Pooling::Max));
        assert_eq!(of(json!({ "pooling_mode": ["cls"] })), Ok(Pooling::First));
        let old = json!({ "word_embedding_dimension": 4, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true });
        assert_eq!(of(old), Ok(Pooling::Mean));
        assert_eq!(of(json!({})), Ok(Pooling::Mean));
        for wrong in [
            json!({ "pooling_mode": "median" }),
            json!({ "pooling_mode": ["mean", "max"] }),
            json!({ "pooling_mode_median_tokens": true }),
            json!({ "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true }),
            json!({ "pooling_mode": "cls", "include_prompt": false }),
            json!({ "pooling_mode": "cls", "temperature": 2 }),
        ] {
            assert!(of(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn poolings_stay_inside_of_the_checkpoint() {
        let file = |path: &str| pooling_file(Some(&json!([{ "type": "a.Pooling", "path": path }])));
        assert_eq!(file("1_Pooling").unwrap().as_deref(), Some("1_Pooling/config.json"));
        for path in ["..", "", "a/../..", "/etc", "a//b", ".", "..\\x"] {
            assert!(file(path).is_err(), "{path:?}");
        }
        assert_eq!(pooling_file(Some(&json!([]))).unwrap(), None);
    }
}
