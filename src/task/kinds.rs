//! The table of tasks: one entry each, made in the task's own file. Loading, the schema and the rules of the settings,
//! `model show`, the README's table and what `output.include` may not repeat come from it.

use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{KINDS, TaskError};
use crate::compute::Compute;
use crate::model::Output;
use crate::settings::{Overflow, Settings, Task, TaskKind};
use crate::telemetry::Metrics;

type Load = fn(&Settings, &Arc<Metrics>) -> Result<Arc<dyn Compute>, TaskError>;

/// One kind of task.
pub struct Kind {
    pub kind: TaskKind,
    /// What it says about a record, as Markdown: the README has a row of it.
    pub prediction: &'static str,
    /// Members of its prediction.
    pub fields: &'static [&'static str],
    /// Keys of `task` that have an effect, beside `kind`.
    pub keys: &'static [&'static str],
    /// Those of them that hold a JSON Pointer into the record.
    pub pointers: &'static [&'static str],
    /// What `task.overflow` may be; the first where it is not set.
    pub overflow: &'static [Overflow],
    /// What is wrong with its keys: key and message.
    pub check: fn(&Task) -> Vec<(&'static str, String)>,
    /// What it wants of a text model; `None` where it runs none.
    pub output: Option<Output>,
    /// Loads the model and makes the task.
    pub load: Load,
}

/// Most tasks read a text and nothing else.
pub(super) const NO_RULES: fn(&Task) -> Vec<(&'static str, String)> = |_| Vec::new();
/// Of tasks that read the beginning of a text, or none of it.
pub(super) const BEGINNING: &[Overflow] = &[Overflow::Truncate, Overflow::DeadLetter];

impl Kind {
    /// # Panics
    /// Where the table lacks it.
    pub fn of(kind: TaskKind) -> &'static Self {
        let mut entries = KINDS.iter();
        entries.find(|entry| entry.kind == kind).unwrap_or_else(|| panic!("no entry for {}", kind.name()))
    }

    /// What becomes of a text that is too long.
    pub fn overflow(&self, task: &Task) -> Overflow {
        task.overflow.or(self.overflow.first().copied()).unwrap_or(Overflow::Truncate)
    }

    /// The JSON Pointers that are set, in the order of [`Kind::pointers`]: what they point to is
    /// [`crate::codec::Input::values`].
    pub fn pointers_of(&self, task: &Task) -> Vec<String> {
        let set = task.set_keys();
        let pointer = |key: &&str| set.get(*key).and_then(|value| value.as_str()).map(str::to_owned);
        self.pointers.iter().filter_map(pointer).collect()
    }
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
                assert!(keys.contains(key), "{name}: task.{key} is no setting");
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
