//! SpladePooling of sentence-transformers: how the logits of a text's tokens become its sparse vector.

use serde_json::Value;

use super::super::model::ModelError;
use super::modules::{config_file, transformer_then};
use super::{Prompts, refuse_others, unsupported};
use crate::model::kernels::{Reduction, Saturation};
use crate::model::store::Files;

/// The sparse head's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Splade {
    /// How the logits of a text's tokens, special ones included, become one row.
    pub reduction: Reduction,
    pub saturation: Saturation,
}

impl Splade {
    /// Without modules.json: the largest logit of each token of the vocabulary, as sentence-transformers does it.
    ///
    /// # Errors
    /// modules.json has other modules than the model and SpladePooling, or a file has a setting that kandle does not know.
    pub fn read(files: &Files) -> Result<Self, ModelError> {
        let Some(modules) = files.json("modules.json")? else { return Self::of("", &Value::Null) };
        transformer_then("SpladePooling", "sparse-embedding", &modules)?;
        let Some(file) = config_file(&modules, "SpladePooling")? else {
            let supported = "one after the model, for sparse-embedding";
            return Err(unsupported("modules.json", "a list without SpladePooling", supported));
        };
        let config = files.json(&file)?.unwrap_or_default();
        // The width is that of the vocabulary, and the size of chunks does not change results.
        let known = [
            "pooling_strategy",
            "activation_function",
            "word_embedding_dimension",
            "embedding_dimension",
            "chunk_size",
        ];
        refuse_others(&file, &config, &known)?;
        Self::of(&file, &config)
    }

    fn of(file: &str, config: &Value) -> Result<Self, ModelError> {
        let twice = match config["activation_function"].as_str() {
            None | Some("relu") => false,
            Some("log1p_relu") => true,
            Some(other) => {
                return Err(unsupported(file, &format!("activation_function {other:?}"), "relu, log1p_relu"));
            }
        };
        let saturation = Saturation { twice };
        let reduction = match config["pooling_strategy"].as_str() {
            None | Some("max") => Reduction::Max,
            Some("sum") => Reduction::Sum(saturation),
            Some(other) => {
                return Err(unsupported(file, &format!("pooling_strategy {other:?}"), "max, sum"));
            }
        };
        Ok(Self { reduction, saturation })
    }
}

/// The prompts of a sparse encoder, and how many values it keeps of a vector.
///
/// # Errors
/// config_sentence_transformers.json has a setting that kandle does not know.
pub(in crate::model::text) fn prompts_and_limit(
    files: &Files,
) -> Result<(Prompts, Option<usize>), ModelError> {
    let key = "max_active_dims";
    let config = files.json(super::prompts::FILE)?.unwrap_or_default();
    let limit = config[key].as_u64().map(|limit| limit as usize);
    Ok((Prompts::read_with(files, &[key])?, limit))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn strategies_and_activations_are_read_by_name() {
        let of = |config: Value| Splade::of("p", &config).map_err(|e| e.to_string());
        let (once, twice) = (Saturation { twice: false }, Saturation { twice: true });
        let splade = |reduction, saturation| Ok(Splade { reduction, saturation });
        assert_eq!(of(json!({})), splade(Reduction::Max, once));
        assert_eq!(of(json!({ "pooling_strategy": "sum" })), splade(Reduction::Sum(once), once));
        let both = json!({ "pooling_strategy": "sum", "activation_function": "log1p_relu" });
        assert_eq!(of(both), splade(Reduction::Sum(twice), twice));
        assert_eq!(of(json!({ "activation_function": "log1p_relu" })), splade(Reduction::Max, twice));
        assert!(of(json!({ "pooling_strategy": "mean" })).unwrap_err().contains("max, sum"));
        assert!(of(json!({ "activation_function": "gelu" })).unwrap_err().contains("relu, log1p_relu"));
    }
}
