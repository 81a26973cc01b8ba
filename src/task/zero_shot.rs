//! zero-shot-classification: labels that the model was not trained for,
//! `{"label":…,"score":…,"scores":{label: score, …}}`. The model judges whether the record's text entails a hypothesis
//! about each label (natural language inference), as transformers' `ZeroShotClassificationPipeline` does.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::classification::{self, softmax};
use super::kinds::{BEGINNING, Family, Kind, Reads, labels_rule, twice};
use super::text::{self, SEQUENCE, Texts, not_tokens};
use super::{Task, TaskError};
use crate::codec::{Input, json};
use crate::engine::Rows;
use crate::model::{Output, Part, Shorten, Tokens};
use crate::record::{Fault, RecordError};
use crate::settings::{self, TaskKind};
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("zero-shot-classification"),
    prediction: "as `text-classification`, with labels that the configuration or the record names",
    fields: classification::fields,
    shows: |task| Shows::Label { all: task.top_k.is_none() && !task.multi_label },
    keys: &["labels", "labels_field", "hypothesis", "multi_label", "top_k", "overflow", "cache"],
    pointers: &["labels_field"],
    overflow: BEGINNING,
    check,
    family: Family::Text(Output::Logits),
    reads: Reads::Text,
    load: |settings, metrics| {
        let task = |texts, _: &_| ZeroShot::new(texts, &settings.task);
        text::load(settings, Output::Logits, metrics, task)
    },
};

/// Placeholder for the label in `task.hypothesis`.
const PLACE: &str = "{}";

fn check(task: &settings::Task) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    match (task.labels.is_empty(), &task.labels_field) {
        (true, None) => {
            let message =
                "zero-shot-classification needs labels, or labels_field if each record names its own";
            problems.push(("labels", message.to_owned()));
        }
        (false, Some(_)) => {
            problems.push(("labels_field", "is used instead of task.labels: set only one of them".to_owned()))
        }
        _ => {}
    }
    problems.extend(labels_rule(task));
    if !task.hypothesis.contains(PLACE) {
        problems.push(("hypothesis", "has no {}, the placeholder for the label".to_owned()));
    }
    problems
}

pub struct ZeroShot {
    texts: Texts,
    labels: Labels,
    hypothesis: String,
    /// Scores each label independently of the others.
    multi_label: bool,
    top_k: usize,
    /// Index of the model's logit for entailment.
    entailment: usize,
    /// Index of the model's logit for contradiction.
    contradiction: usize,
}

enum Labels {
    /// The same for every record, each with the tokens of its hypothesis.
    Same(Vec<String>, Vec<Part<'static>>),
    /// JSON Pointer to the record's own labels.
    At(String),
}

/// Index of the logit for entailment, by a model's label names.
pub(super) fn entailment(label_ids: &BTreeMap<String, usize>) -> Option<usize> {
    let entails = |label: &String| label.to_lowercase().starts_with("entail");
    label_ids.iter().find(|(label, _)| entails(label)).map(|(_, id)| *id)
}

impl ZeroShot {
    fn new(texts: Texts, task: &settings::Task) -> Result<Self, TaskError> {
        let model = &texts.model;
        model
            .tokenizer
            .takes_pairs()
            .map_err(|e| TaskError::Unsuitable(format!("it cannot take pairs of texts: {e}")))?;
        let entailment = entailment(&model.label_ids).ok_or_else(|| {
            let labels: Vec<&str> = model.label_ids.keys().map(String::as_str).collect();
            TaskError::Unsuitable(format!(
                "none of its labels ({}) begins with \"entail\": it is not a natural language inference \
                 model, or its config.json has no label2id",
                labels.join(", ")
            ))
        })?;
        if model.labels.len() < 2 {
            return Err(TaskError::Unsuitable(
                "it has only one label: it needs one for contradiction too".to_owned(),
            ));
        }
        let contradiction = if entailment == 0 { model.labels.len() - 1 } else { 0 };
        let mut this = Self {
            labels: Labels::At(String::new()),
            hypothesis: task.hypothesis.clone(),
            multi_label: task.multi_label,
            top_k: task.top_k.unwrap_or(usize::MAX),
            entailment,
            contradiction,
            texts,
        };
        this.labels = match &task.labels_field {
            Some(pointer) => Labels::At(pointer.clone()),
            None => {
                let tokens = task.labels.iter().map(|label| this.tokens(label));
                let setting = |e: RecordError| TaskError::Setting { key: "task.labels", message: e.message };
                let tokens = tokens.collect::<Result<Vec<_>, _>>().map_err(setting)?;
                let shortest = this.texts.model.tokenizer.part("a").map_err(not_tokens).map_err(setting)?;
                for (label, tokens) in task.labels.iter().zip(&tokens) {
                    if let Err(e) = this.texts.model.tokenizer.pair(&shortest, tokens, Shorten::First) {
                        let message = format!("the hypothesis about {label:?} is too long: {e}");
                        return Err(TaskError::Setting { key: "task.labels", message });
                    }
                }
                Labels::Same(task.labels.clone(), tokens)
            }
        };
        Ok(this)
    }

    /// The tokens of the hypothesis about a label.
    fn tokens(&self, label: &str) -> Result<Part<'static>, RecordError> {
        self.texts.model.tokenizer.part(self.hypothesis.replace(PLACE, label)).map_err(not_tokens)
    }

    /// A record's own labels.
    fn labels_of<'a>(&self, input: &'a Input<'_>, pointer: &str) -> Result<Vec<Cow<'a, str>>, RecordError> {
        let field = |message: String| RecordError::new(Fault::Field, message);
        let values = json::list(pointer, input.values.first().and_then(Option::as_deref))?;
        let label = |(index, value)| json::text(value, || format!("{pointer}/{index}"));
        let labels = values.into_iter().enumerate().map(label).collect::<Result<Vec<_>, _>>()?;
        if labels.is_empty() {
            return Err(field(format!("{pointer:?} has no labels")));
        }
        match twice(labels.iter().map(|label| &**label)) {
            Some(twice) => Err(field(format!("{pointer:?} has {twice:?} twice"))),
            None => Ok(labels),
        }
    }

    /// The scores of the labels, from the logits of each label's hypothesis.
    fn scores(&self, logits: &Rows<'_, f32>) -> Vec<f32> {
        match self.multi_label || logits.len() == 1 {
            true => logits
                .iter()
                .map(|row| softmax(&[row[self.contradiction], row[self.entailment]])[1])
                .collect(),
            false => softmax(&logits.iter().map(|row| row[self.entailment]).collect::<Vec<_>>()),
        }
    }
}

impl Task for ZeroShot {
    type Item = Tokens;
    type Value = f32;
    /// The record's own labels; empty if the settings name the labels.
    type Kept = Vec<String>;

    fn prepare(&self, input: &Input<'_>, items: &mut Vec<Tokens>) -> Result<Vec<String>, RecordError> {
        let tokenizer = &self.texts.model.tokenizer;
        let text = tokenizer.part(&*input.text).map_err(not_tokens)?;
        let mut truncated = false;
        let mut ask = |label: &str, hypothesis: &Part<'_>| {
            let pair = tokenizer.pair(&text, hypothesis, Shorten::First).map_err(|e| {
                RecordError::new(Fault::TooLong, format!("the hypothesis about {label:?} is too long: {e}"))
            })?;
            truncated |= pair.truncated;
            items.push(pair);
            Ok(())
        };
        let own = match &self.labels {
            Labels::Same(labels, hypotheses) => {
                for (label, hypothesis) in labels.iter().zip(hypotheses) {
                    ask(label, hypothesis)?;
                }
                Vec::new()
            }
            Labels::At(pointer) => {
                let labels = self.labels_of(input, pointer)?;
                for label in &labels {
                    ask(label, &self.tokens(label)?)?;
                }
                labels.into_iter().map(Cow::into_owned).collect()
            }
        };
        if truncated {
            self.texts.too_long()?;
        }
        Ok(own)
    }

    fn predict(
        &self,
        own: &Vec<String>,
        answers: Rows<'_, f32>,
        out: &mut Vec<u8>,
    ) -> Result<(), RecordError> {
        let labels = match &self.labels {
            Labels::Same(labels, _) => labels,
            Labels::At(_) => own,
        };
        classification::write(labels, &self.scores(&answers), self.top_k, out)
    }

    fn labels(&self) -> Option<Vec<String>> {
        match &self.labels {
            Labels::Same(labels, _) => Some(labels.clone()),
            Labels::At(_) => None,
        }
    }

    fn footprint(&self, value: &[u8]) -> usize {
        let most = self.texts.model.tokenizer.max_tokens();
        let (labels, prediction) = match &self.labels {
            Labels::Same(labels, _) => (labels.len(), classification::bytes(labels, self.top_k)),
            // Any string of the record may be a label, and labels are repeated in the prediction.
            Labels::At(_) => {
                let labels = json::Strings::of(value).count;
                (labels, 2 * value.len() + labels * 24)
            }
        };
        let tokens = most.min(value.len() + self.hypothesis.len() + 16);
        labels * (SEQUENCE + self.texts.bytes(tokens)) + prediction
    }
}
