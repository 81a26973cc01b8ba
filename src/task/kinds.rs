//! The table of tasks, with one entry in each task's own file. Loading, the schema and the rules of the settings,
//! `model show`, the README's table and the names that `output.include` may not use come from it.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{KINDS, TaskError};
use crate::codec::write::schema::Field;
use crate::codec::{Decoder, DecoderError, Select};
use crate::compute::Compute;
use crate::model::{Output, Wants, vision};
use crate::settings::{Overflow, Settings, Task, TaskKind};
use crate::telemetry::Metrics;
use crate::watch::Shows;

/// What a task reads of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// The text that `input.field` or `input.template` selects, and the values at its own pointers.
    Text,
    /// Only the values at its own pointers: `task.inputs` of an ONNX model.
    Tensors,
    /// The value at `input.field`, a series, and nothing else.
    Series,
    /// An image: the value itself, or in base64 at `input.field`.
    Image,
}

/// The family of models that a task runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// No model, or one of its own.
    Nothing,
    /// A text model, with the output that the task needs.
    Text(Output),
    /// An ONNX graph.
    Onnx,
    /// A model of series.
    Series,
    /// A model of images, with the output that the task needs.
    Vision(vision::Output),
}

type Load = fn(&Settings, &Arc<Metrics>) -> Result<Arc<dyn Compute>, TaskError>;

/// One kind of task.
pub struct Kind {
    pub kind: TaskKind,
    /// Its prediction, as Markdown for the table in the README.
    pub prediction: &'static str,
    /// Members of the prediction, in the order in which the task writes them; none if it is the value, unchanged.
    pub fields: fn(&Task) -> Vec<Field>,
    /// What predictions show, for the metrics of predictions and for drift.
    pub shows: fn(&Task) -> Shows,
    /// Keys of `task` that have an effect, beside `kind`.
    pub keys: &'static [&'static str],
    /// The subset of `keys` that hold a JSON Pointer into the record.
    pub pointers: &'static [&'static str],
    /// Allowed values of `task.overflow`; the first is the default.
    pub overflow: &'static [Overflow],
    /// Finds problems with the task's keys: key and message of each.
    pub check: fn(&Task) -> Vec<(&'static str, String)>,
    /// The models that it runs.
    pub family: Family,
    /// What it reads of a record.
    pub reads: Reads,
    /// Loads the model and makes the task.
    pub load: Load,
}

/// For tasks with no rules beyond those of the schema.
pub(super) const NO_RULES: fn(&Task) -> Vec<(&'static str, String)> = |_| Vec::new();
/// For tasks that put a text into one sequence unless `task.overflow` is `chunk`.
pub(super) const CHUNKS: &[Overflow] = &[Overflow::Truncate, Overflow::DeadLetter, Overflow::Chunk];
/// For tasks that either truncate a long text or dead-letter its record.
pub(super) const BEGINNING: &[Overflow] = &[Overflow::Truncate, Overflow::DeadLetter];

/// What a key says that has an effect only with `overflow: chunk`.
pub(super) const NEEDS_CHUNKS: &str = "has no effect without overflow: chunk";

/// For tasks that cut a text into chunks only if `task.overflow` says so.
pub(super) fn chunk_rules(task: &Task) -> Vec<(&'static str, String)> {
    match (task.overflow, task.stride) {
        (Some(Overflow::Chunk), _) | (_, None) => Vec::new(),
        _ => vec![("stride", NEEDS_CHUNKS.to_owned())],
    }
}

impl Kind {
    /// # Panics
    /// If the table has no such task.
    pub fn of(kind: TaskKind) -> &'static Self {
        let mut entries = KINDS.iter();
        entries.find(|entry| entry.kind == kind).unwrap_or_else(|| panic!("no entry for {}", kind.name()))
    }

    /// The files that its model needs; `None` if it runs no model.
    pub fn wants(&self) -> Option<Wants> {
        match self.family {
            Family::Nothing => None,
            Family::Text(_) | Family::Series | Family::Vision(_) => Some(Wants::Checkpoint),
            Family::Onnx => Some(Wants::Onnx),
        }
    }

    /// What happens to a text that is too long: the setting, or the task's default.
    pub fn overflow(&self, task: &Task) -> Overflow {
        task.overflow.or(self.overflow.first().copied()).unwrap_or(Overflow::Truncate)
    }

    /// The decoder of the settings' format, which selects what the task reads.
    ///
    /// # Errors
    /// `input.template` is not a valid template, or a file or certificate cannot be read.
    pub fn decoder(settings: &Settings) -> Result<Decoder, DecoderError> {
        Decoder::new(settings, Self::select(settings)?)
    }

    /// What the task reads of a value.
    ///
    /// # Errors
    /// `input.template` is not a valid template.
    pub fn select(settings: &Settings) -> Result<Select, minijinja::Error> {
        Select::new(settings, Self::of(settings.task.kind).pointers_of(&settings.task))
    }

    /// The JSON Pointers that are set, in the order of [`Kind::pointers`]. [`crate::codec::Input::values`] has their
    /// values.
    fn pointers_of(&self, task: &Task) -> Vec<String> {
        let set = task.set_keys();
        let pointer = |key: &&str| set.get(*key).and_then(|value| value.as_str()).map(str::to_owned);
        self.pointers.iter().filter_map(pointer).collect()
    }
}

/// For tasks whose labels the settings name: a label may be named once.
pub(super) fn labels_rule(task: &Task) -> Option<(&'static str, String)> {
    let twice = twice(task.labels.iter().map(String::as_str))?;
    Some(("labels", format!("{twice:?} is named twice")))
}

/// The first label that is there twice.
pub(crate) fn twice<'a>(labels: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut seen = HashSet::new();
    labels.into_iter().find(|label| !seen.insert(*label))
}

static NAMES: LazyLock<Vec<&'static str>> =
    LazyLock::new(|| KINDS.iter().map(|entry| entry.kind.name()).collect());

impl<'de> Deserialize<'de> for TaskKind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let found = KINDS.iter().map(|entry| entry.kind).find(|kind| kind.name() == name);
        found.ok_or_else(|| serde::de::Error::unknown_variant(&name, &NAMES))
    }
}

impl Serialize for TaskKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl JsonSchema for TaskKind {
    fn schema_name() -> Cow<'static, str> {
        "TaskKind".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "enum": *NAMES })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_keys_of_each_task_are_settings() {
        let schema = serde_json::to_value(schemars::schema_for!(Task)).unwrap();
        let keys: BTreeSet<&str> =
            schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
        for entry in KINDS {
            let name = entry.kind.name();
            for key in entry.keys {
                assert!(keys.contains(key), "{name}: task.{key} is not a setting");
            }
            for pointer in entry.pointers {
                assert!(entry.keys.contains(pointer), "{name}: task.{pointer}");
            }
            assert_eq!(entry.keys.contains(&"overflow"), !entry.overflow.is_empty(), "{name}");
        }
    }

    #[test]
    fn the_readme_has_a_row_for_each_task() {
        let readme = include_str!("../../README.md");
        for entry in KINDS.iter().filter(|entry| entry.kind.name() != "dummy") {
            let row = format!("| `{}` | {} |", entry.kind.name(), entry.prediction);
            assert!(readme.contains(&row), "README.md lacks {row}");
        }
    }
}
