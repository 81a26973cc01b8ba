//! The section `shadow`: a second model that sees a share of the records.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::rules::{check_digest, check_task, check_topic};
use super::{ByteSize, Delivery, Model, OnChange, Settings, Task};
use crate::codec::FormatEntry;
use crate::kafka::topics::TopicFilter;
use crate::task::Kind;

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Shadow {
    /// The topic of the shadow's predictions (default: no shadow).
    #[schemars(example = "tickets-predictions-shadow")]
    pub topic: Option<String>,
    /// The shadow's model: the keys of the section `model`.
    pub model: Model,
    /// Keys of `task` that the shadow has other values of, such as `top_k`. The kind is the same.
    pub task: TaskKeys,
    /// Share of the records that the shadow sees, chosen by a hash of their keys.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub share: f64,
    /// CPU: number of cores that run batches of the shadow.
    #[schemars(range(min = 1))]
    pub lanes: usize,
    /// Bytes of records that wait for the shadow, beside `memory.limit`. `run` skips what does not fit; `drain` and
    /// `replay` wait.
    pub memory: ByteSize,
}

impl Default for Shadow {
    fn default() -> Self {
        Self {
            topic: None,
            model: Model::default(),
            task: TaskKeys::default(),
            share: 0.05,
            lanes: 1,
            memory: ByteSize::mib(64),
        }
    }
}

/// Some of the keys of `task`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TaskKeys(Map<String, Value>);

impl TaskKeys {
    /// A task with these keys, and all others as `task` has them. The cache is not shared: it is off unless it is set here.
    ///
    /// # Errors
    /// A value has the wrong type, which the schema has checked.
    pub fn over(&self, task: &Task) -> serde_json::Result<Task> {
        let mut keys = serde_json::to_value(Task { cache: None, ..task.clone() })?;
        for (key, value) in &self.0 {
            keys[key] = value.clone();
        }
        serde_json::from_value(keys)
    }
}

impl JsonSchema for TaskKeys {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "TaskKeys".into()
    }

    /// That of `task`, without defaults: what is not set stays as `task` has it.
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = Task::json_schema(generator);
        schema.remove("required");
        schema.remove("description");
        if let Some(Value::Object(properties)) = schema.get_mut("properties") {
            for property in properties.values_mut().filter_map(Value::as_object_mut) {
                property.remove("default");
            }
        }
        schema
    }
}

impl Settings {
    /// The settings of the shadow, as of a job of its own; `None` without a shadow.
    pub fn of_shadow(&self) -> Option<Self> {
        let topic = self.shadow.topic.clone()?;
        let mut settings = self.clone();
        let shadow = std::mem::take(&mut settings.shadow);
        // The rules have checked the task.
        settings.task = shadow.task.over(&self.task).ok()?;
        settings.model = shadow.model;
        settings.output.topic = topic;
        settings.batch.lanes = Some(shadow.lanes);
        settings.memory.limit = shadow.memory;
        settings.delivery = Delivery::default();
        Some(settings)
    }
}

/// Key and message of each broken rule.
pub(super) fn problems(settings: &Settings) -> Vec<(String, String)> {
    let mut problems = Vec::new();
    let mut problem = |key: &str, message: String| problems.push((format!("shadow.{key}"), message));
    let shadow = &settings.shadow;
    let Some(topic) = &shadow.topic else {
        let unset = Shadow::default();
        let set = [
            ("model.source", shadow.model.source != unset.model.source),
            ("task", shadow.task != unset.task),
            ("share", shadow.share != unset.share),
            ("lanes", shadow.lanes != unset.lanes),
            ("memory", shadow.memory != unset.memory),
        ];
        for (key, _) in set.into_iter().filter(|(_, set)| *set) {
            problem(
                key,
                "has no effect without shadow.topic: the topic of the shadow's predictions".to_owned(),
            );
        }
        return problems;
    };
    if let Err(message) = check_topic(topic) {
        problem("topic", message);
    } else if TopicFilter::new(&settings.input.topics).is_ok_and(|input| input.holds(topic)) {
        problem("topic", format!("{topic} is also in input.topics: kandle would read what it wrote"));
    }
    for (key, other) in
        [("output.topic", &settings.output.topic), ("dead_letters.topic", &settings.dead_letters.topic)]
    {
        if topic == other {
            problem("topic", format!("is the same as {key}: readers could not tell them apart"));
        }
    }
    if shadow.share <= 0.0 {
        problem("share", "is not more than 0: set the share of the records that the shadow sees".to_owned());
    }
    if shadow.memory.0 < 1 << 20 {
        problem("memory", format!("{} is less than 1MiB", shadow.memory));
    }
    let entry = Kind::of(settings.task.kind);
    if entry.wants().is_none() {
        let message = format!("has no effect with task.kind: {}, which runs no model", entry.kind.name());
        problem("topic", message);
        return problems;
    }
    if shadow.model.source.as_deref().unwrap_or_default().is_empty() {
        problem(
            "model.source",
            "is required with shadow.topic: the model to compare with model.source".to_owned(),
        );
    }
    if shadow.model.on_change != OnChange::default() {
        let message = "has no effect: the group's offsets are those of the model in the section model";
        problem("model.on_change", message.to_owned());
    }
    if shadow.model.refresh.is_some() {
        let message = "has no effect: the shadow keeps the version that it starts with";
        problem("model.refresh", message.to_owned());
    }
    if let Some(message) = check_digest(&shadow.model) {
        problem("model.digest", message);
    }
    if shadow.task.0.get("kind").is_some_and(|kind| kind != settings.task.kind.name()) {
        let message =
            format!("is not task.kind, {}: the two could not be compared", settings.task.kind.name());
        problem("task.kind", message);
        return problems;
    }
    match shadow.task.over(&settings.task) {
        Err(error) => problem("task", error.to_string()),
        Ok(task) => {
            let of = |task: &Task| check_task(task, entry, FormatEntry::of(settings.input.format));
            let known = of(&settings.task);
            for (key, message) in of(&task).into_iter().filter(|found| !known.contains(found)) {
                problem(&format!("task.{key}"), message);
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use crate::settings::{Settings, Sources, load};

    fn loaded(set: &[&str]) -> Result<Settings, Vec<String>> {
        let minimal = [
            "kafka.brokers=b:1",
            "input.topics=in",
            "input.group=g",
            "input.field=/text",
            "task.kind=text-classification",
            "task.top_k=3",
            "task.cache=1MiB",
            "model.source=m",
            "output.topic=out",
            "dead_letters.topic=dead",
        ];
        let set = minimal.iter().chain(set).map(|s| s.to_string()).collect();
        let sources = Sources { set, ..Sources::default() };
        load(&sources)
            .map(|loaded| loaded.settings)
            .map_err(|problems| problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_shadow_has_its_own_model_and_topic_and_what_it_overrides_of_the_task() {
        assert!(loaded(&[]).unwrap().of_shadow().is_none());
        let set = ["shadow.topic=s", "shadow.model.source=n", "shadow.model.offline=true"];
        let shadow = loaded(&set).unwrap().of_shadow().unwrap();
        assert_eq!((shadow.output.topic.as_str(), shadow.model.source.as_deref()), ("s", Some("n")));
        assert_eq!((shadow.task.top_k, shadow.task.cache, shadow.batch.lanes), (Some(3), None, Some(1)));
        assert!(shadow.model.offline && shadow.of_shadow().is_none());
        let more = ["shadow.task.top_k=1", "shadow.task.overflow=chunk", "shadow.lanes=2"];
        let shadow = loaded(&[&set[..], &more].concat()).unwrap().of_shadow().unwrap();
        assert_eq!((shadow.task.top_k, shadow.batch.lanes), (Some(1), Some(2)));
        assert!(shadow.task.overflow.is_some());
    }

    #[test]
    fn rules_of_the_shadow() {
        let topic = ["shadow.topic=s", "shadow.model.source=n"];
        for (set, parts) in [
            (&["shadow.model.source=n"][..], ["shadow.model.source", "without shadow.topic"]),
            (&["shadow.topic=s"], ["shadow.model.source", "is required"]),
            (&["shadow.topic=out", "shadow.model.source=n"], ["shadow.topic", "the same as output.topic"]),
            (&["shadow.topic=dead", "shadow.model.source=n"], ["shadow.topic", "dead_letters.topic"]),
            (&["shadow.topic=in", "shadow.model.source=n"], ["shadow.topic", "would read what it wrote"]),
            (&["shadow.topic=a b", "shadow.model.source=n"], ["shadow.topic", "not a valid topic name"]),
            (&["shadow.share=0"], ["shadow.share", "not more than 0"]),
            (&["shadow.share=1.5"], ["shadow.share", "1.5"]),
            (&["shadow.memory=1KiB"], ["shadow.memory", "less than 1MiB"]),
            (&["shadow.task.kind=text-embedding"], ["shadow.task.kind", "is not task.kind"]),
            (&["shadow.task.redact=true"], ["shadow.task.redact", "has no effect"]),
            (&["shadow.task.topk=1"], ["shadow.task.topk", "did you mean shadow.task.top_k?"]),
            (&["shadow.model.digest=x"], ["shadow.model.digest", "is not a digest"]),
            (&["shadow.model.on_change=refuse"], ["shadow.model.on_change", "has no effect"]),
            (&["shadow.model.refresh=5m"], ["shadow.model.refresh", "has no effect"]),
            (
                &["task.kind=noop", "task.top_k=null", "task.cache=null", "model.source=null"],
                ["shadow.topic", "runs no model"],
            ),
        ] {
            let names_topic =
                set.iter().any(|set| set.starts_with("shadow.topic") || set.starts_with("shadow.model.s"));
            let set = if names_topic { set.to_vec() } else { [&topic[..], set].concat() };
            let problems = loaded(&set).unwrap_err();
            assert_eq!(problems.len(), 1, "{set:?}: {problems:#?}");
            assert!(parts.iter().all(|part| problems[0].contains(part)), "{set:?}: {problems:#?}");
        }
    }
}
