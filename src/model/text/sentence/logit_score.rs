//! Rerankers that are language models, as sentence-transformers saves them.

use serde_json::Value;

use super::super::model::ModelError;
use super::modules::config_file;
use super::{TEXT_SETTINGS, refuse_others, unsupported};
use crate::model::store::Files;

/// How a language model's logits become a score, and how it is prompted: LogitScore of sentence-transformers.
pub struct LogitScore {
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
        let Some(file) = config_file(&modules, "LogitScore")? else {
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
