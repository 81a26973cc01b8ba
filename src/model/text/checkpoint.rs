//! What a checkpoint is for: the heads in its weights, and what config.json says of them. Nothing is computed.

use std::collections::BTreeMap;

use candle_nn::var_builder::SimpleBackend;

use super::architecture::Architecture;
use super::gliner::Gliner;
use super::model::{ModelError, label_ids, labels, trained_for};
use super::question::is_language_model;
use super::sentence::LogitScore;
use super::sparse::LEXICAL;
use crate::model::store::{Files, FilesError};
use crate::model::weights::Weights;

/// The heads of a checkpoint.
#[derive(Debug, Default)]
pub struct Checkpoint {
    /// A classifier of texts.
    pub classifies_texts: bool,
    /// A classifier of tokens, or GLiNER.
    pub classifies_tokens: bool,
    /// A language model that is asked whether a document answers a query.
    pub answers: bool,
    /// It embeds texts: its modules.json has a pooling, or it has none of the other heads.
    pub embeds: bool,
    /// It makes sparse vectors: its modules.json has their pooling, or it has a head for masked language modelling and no
    /// modules.json, or lexical weights.
    pub embeds_sparsely: bool,
    /// Label names by index, for a classifier.
    pub labels: Vec<String>,
    /// Index of a classifier's logit by label name.
    pub label_ids: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// # Errors
    /// The architecture is not supported, or a file cannot be read.
    pub fn read(files: &Files) -> Result<Self, ModelError> {
        if Gliner::is(files) {
            return Ok(Self { classifies_tokens: true, ..Self::default() });
        }
        let config = files.json("config.json")?;
        let config = config.ok_or_else(|| FilesError::Missing { file: "config.json".to_owned() })?;
        let architecture = Architecture::from_config(&config, files.ignored_keys())?;
        let weights = Weights::open(files)?;
        if architecture.tower.is_some() {
            return Ok(Self { embeds: true, ..Self::default() });
        }
        let has = |per_token| {
            let out = format!("{}.weight", architecture.classifier.out(per_token));
            weights.contains_tensor(&out) && trained_for(&config).is_none_or(|tokens| tokens == per_token)
        };
        let modules = files.json("modules.json")?;
        let (classifies_texts, classifies_tokens) = (has(false), has(true));
        let answers = is_language_model(&config)
            && match LogitScore::read(files)? {
                Some(_) => true,
                None => modules.is_none() && architecture.name == "qwen3",
            };
        // A cross-encoder may have modules too, but none that pools.
        let list = modules.as_ref().and_then(|modules| modules.as_array()).map_or(&[][..], Vec::as_slice);
        let types = || list.iter().filter_map(|module| module["type"].as_str());
        let sparse = types().any(|name| name.ends_with("SpladePooling"));
        let pools = types().any(|name| name.ends_with("Pooling") && !name.ends_with("SpladePooling"));
        let masked = architecture.masked_lm.as_ref();
        let predicts_words =
            masked.is_some_and(|head| weights.contains_tensor(&format!("{}.weight", head.dense)));
        let labels = labels(&config);
        Ok(Self {
            classifies_texts,
            classifies_tokens,
            answers,
            embeds: pools || !(classifies_texts || classifies_tokens || answers || sparse),
            embeds_sparsely: sparse || (predicts_words && modules.is_none()) || files.exists(LEXICAL),
            label_ids: label_ids(&config, &labels),
            labels,
        })
    }

    /// Whether config.json does not name the labels, so that they have transformers' names, `LABEL_0` and so on.
    pub fn labels_are_numbers(&self) -> bool {
        let is_number = |(i, label): (usize, &String)| {
            label.strip_prefix("LABEL_").is_some_and(|number| number == i.to_string())
        };
        !self.labels.is_empty() && self.labels.iter().enumerate().all(is_number)
    }
}
