//! The table of tasks: one entry each, made in the task's own file. Loading, the rules of the settings, `model show` and
//! what `output.include` may not repeat come from it.

use std::sync::Arc;

use super::{TaskError, classification, embedding, noop, similarity};
use crate::compute::Compute;
use crate::model::Output;
use crate::settings::{Settings, TaskKind};
use crate::telemetry::Metrics;

type Load = fn(&Settings, &Arc<Metrics>) -> Result<Arc<dyn Compute>, TaskError>;

/// One kind of task.
pub struct Kind {
    pub kind: TaskKind,
    /// Keys of `task` that have an effect, beside `kind`.
    pub keys: &'static [&'static str],
    /// A key of `task` that must be set, and to what.
    pub needs: Option<(&'static str, &'static str)>,
    /// Members of its prediction.
    pub fields: &'static [&'static str],
    /// What it wants of a text model; `None` where it runs none.
    pub output: Option<Output>,
    /// Loads the model and makes the task.
    pub load: Load,
}

pub const KINDS: [Kind; 4] = [classification::KIND, embedding::KIND, similarity::KIND, noop::KIND];

impl Kind {
    /// # Panics
    /// Where the table lacks it.
    pub fn of(kind: TaskKind) -> &'static Self {
        static TABLE: [Kind; KINDS.len()] = KINDS;
        TABLE
            .iter()
            .find(|entry| entry.kind == kind)
            .unwrap_or_else(|| panic!("no entry for {}", kind.name()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_task_that_can_be_set_has_an_entry_whose_keys_there_are() {
        let schema = serde_json::to_value(schemars::schema_for!(crate::settings::Task)).unwrap();
        let keys: BTreeSet<&str> =
            schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
        let kinds = serde_json::to_value(schemars::schema_for!(TaskKind)).unwrap();
        let names: Vec<&str> = kinds["enum"].as_array().unwrap().iter().filter_map(|n| n.as_str()).collect();
        assert_eq!(names.len(), KINDS.len());
        for name in names {
            let kind: TaskKind = serde_json::from_value(name.into()).unwrap();
            let entry = Kind::of(kind);
            assert_eq!(kind.name(), name);
            let used = entry.keys.iter().chain(entry.needs.iter().map(|(key, _)| key));
            for key in used {
                assert!(keys.contains(key), "{name}: task.{key} is no setting");
            }
        }
    }
}
