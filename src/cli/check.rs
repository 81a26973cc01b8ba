//! `check`: tries everything that `run` needs, without consuming. Prints one line per check and goes on after a
//! failure; a check that cannot be tried says why.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::consumer::Consumer;
use rdkafka::producer::{BaseProducer, DefaultProducerContext, Producer};
use rdkafka::topic_partition_list::TopicPartitionList;

use super::{AlreadyReported, drain};
use crate::cli::output::outln;
use crate::codec::write::Record;
use crate::codec::write::schema::Type;
use crate::codec::{FormatEntry, tokens};
use crate::compute::Compute;
use crate::host_memory;
use crate::kafka::cluster::{Cluster, ConfigurationError, committed};
use crate::kafka::consumer;
use crate::kafka::login::{self, Client};
use crate::kafka::permissions::{self, Held};
use crate::model::{self, Checkpoint, Files, Output};
use crate::registry::registration::{OutputSchema, candidates};
use crate::registry::{Registry, RegistryError, Version};
use crate::settings::{self, Guarantee, Loaded, Settings, TensorInput};
use crate::sink;
use crate::task::{self, Family, Kind};
use crate::telemetry::Metrics;
use crate::watch::Reference;

const ATTEMPT: Duration = Duration::from_secs(8);

/// Prints one line per check and remembers whether one failed.
#[derive(Default)]
struct Lines {
    failed: bool,
}

impl Lines {
    fn say(&mut self, what: &str, result: Result<String, String>) {
        match result {
            Ok(found) => outln!("ok    {what}: {found}"),
            Err(reason) => {
                self.failed = true;
                outln!("FAIL  {what}: {reason}");
            }
        }
    }

    /// A warning is not a failure.
    fn warn(&self, what: &str, why: &str) {
        outln!("warn  {what}: {why}");
    }

    fn skip(&self, what: &str, why: &str) {
        outln!("skip  {what}: {why}");
    }
}

pub fn check(loaded: Loaded) -> anyhow::Result<()> {
    let settings = loaded.settings;
    let mut lines = Lines::default();
    lines.say("configuration", Ok("every key is known, every rule holds".to_owned()));
    kafka(&settings, &mut lines);
    output_schema(&settings, &mut lines);
    let loaded = model(&settings, "model", &mut lines);
    let mut models = vec![loaded.as_ref().map(|compute| compute.about().host_memory)];
    if let Some(shadow) = settings.of_shadow() {
        let loaded = model(&shadow, "shadow model", &mut lines);
        models.push(loaded.map(|compute| compute.about().host_memory));
    }
    memory(&settings, &models, &mut lines);
    schemas(&settings, loaded.map(|compute| compute.pointers()), &mut lines);
    if lines.failed { Err(AlreadyReported.into()) } else { Ok(()) }
}

fn kafka(settings: &Settings, lines: &mut Lines) {
    let cluster = match Cluster::connect(settings) {
        Ok(cluster) => cluster,
        Err(error) => return lines.say("kafka client", Err(error.to_string())),
    };
    let transport = settings
        .kafka
        .properties
        .get("security.protocol")
        .map_or("plaintext".to_owned(), |protocol| protocol.0.to_lowercase());
    let reached = cluster.reach();
    let away = reached.is_err();
    let what = format!("brokers {} ({transport})", settings.kafka.brokers);
    lines.say(&what, reached.map(|count| format!("{count} in the cluster")).map_err(|e| e.to_string()));
    if away {
        for what in
            ["topics", "group", "producer", "permissions", "transaction", "largest message", "retention"]
        {
            lines.skip(what, "the brokers cannot be reached");
        }
        return;
    }
    for topic in &settings.input.topics {
        let what = format!("input topic {topic}");
        if topic.starts_with('^') {
            lines.skip(&what, "a pattern: matched repeatedly while `run` consumes");
            continue;
        }
        let found =
            cluster.partitions("input.topics", topic).map_err(|e| e.to_string()).and_then(|partitions| {
                let range = cluster.client().fetch_watermarks(topic, 0, ATTEMPT);
                range.map(|_| format!("{partitions} partitions, readable")).map_err(|e| e.to_string())
            });
        lines.say(&what, found);
    }
    let written =
        [("output.topic", &settings.output.topic), ("dead_letters.topic", &settings.dead_letters.topic)];
    let optional = [("samples.topic", &settings.samples.topic), ("shadow.topic", &settings.shadow.topic)];
    let optional = optional.into_iter().filter_map(|(key, topic)| Some((key, topic.as_ref()?)));
    for (key, topic) in written.into_iter().chain(optional) {
        let found = cluster.partitions(key, topic);
        lines.say(
            &format!("{key} {topic}"),
            found.map(|n| format!("{n} partitions")).map_err(|e| e.to_string()),
        );
    }
    lines.say(&format!("group {}", settings.input.group), group(settings));
    lines.say("producer", producer(settings));
    permissions(settings, lines);
    transaction(&cluster, settings, lines);
    largest(&cluster, settings, lines);
    retention(&cluster, settings, lines);
}

/// Warns if the output topics would delete predictions at once: predictions have their records' timestamps, and
/// retention goes by those.
fn retention(cluster: &Cluster<'_>, settings: &Settings, lines: &mut Lines) {
    let what = "retention";
    let Ok(topics) = cluster.topics() else { return lines.skip(what, "the topics cannot be checked") };
    match drain::retention_warnings(settings, &topics, None) {
        Err(error) => lines.skip(what, &error.to_string()),
        Ok(warnings) if warnings.is_empty() => {
            lines.say(what, Ok("published records are kept".to_owned()));
        }
        Ok(warnings) => warnings.iter().for_each(|warning| lines.warn(what, warning)),
    }
}

/// Reads the group's offsets, which needs permission to read the group.
fn group(settings: &Settings) -> Result<String, String> {
    let (config, _) = permissions::clients(settings);
    let consumer = consumer::reader_with(&config).map_err(|e| e.to_string())?;
    let mut list = TopicPartitionList::new();
    for topic in settings.input.topics.iter().filter(|topic| !topic.starts_with('^')) {
        let metadata = consumer.fetch_metadata(Some(topic), ATTEMPT).map_err(|e| e.to_string())?;
        for partition in metadata.topics().iter().flat_map(|t| t.partitions()) {
            list.add_partition(topic, partition.id());
        }
    }
    let offsets = committed(&consumer, &list, ATTEMPT).map_err(|e| e.to_string())?;
    let known = offsets.elements().iter().filter(|e| e.offset().to_raw().is_some_and(|o| o >= 0)).count();
    Ok(match known {
        0 => format!("no offsets yet: starts at input.start, {:?}", settings.input.start).to_lowercase(),
        n => format!("offsets for {n} of {} partitions", offsets.count()),
    })
}

/// Gets an idempotent producer's id, which needs permission to write. Nothing is written.
fn producer(settings: &Settings) -> Result<String, String> {
    let (_, mut config) = permissions::clients(settings);
    config.set("enable.idempotence", "true");
    config.set("allow.auto.create.topics", "false");
    let producer: Client<BaseProducer> =
        login::create(&config, DefaultProducerContext).map_err(|e| e.to_string())?;
    producer.client().fetch_metadata(Some(&settings.output.topic), ATTEMPT).map_err(|e| e.to_string())?;
    // The client requests the id in the background, and a refusal is a fatal error of the client.
    producer.poll(Duration::from_millis(500));
    match producer.client().fatal_error() {
        Some((code, reason)) => Err(format!("{code}: {reason}")),
        None => Ok("idempotent; nothing was written for this check".to_owned()),
    }
}

/// Names each permission that is missing, and how to grant it.
fn permissions(settings: &Settings, lines: &mut Lines) {
    let id = match sink::first_transactional_id(settings) {
        Ok(id) => id,
        Err(error) => return lines.say("permissions", Err(error.to_string())),
    };
    let needed = permissions::needed(settings, &id);
    let (input, output) = permissions::clients(settings);
    let held = permissions::probe(settings, &needed, (&input, &output), ATTEMPT);
    let mut found = Vec::new();
    for (permission, held) in needed.iter().zip(held) {
        let what = format!("permission {permission}");
        let grant = permission.grant(&settings.kafka.brokers);
        match (held, permission.optional) {
            (Held::Yes, _) => found.push(permission.to_string()),
            (Held::No, None) => lines.say(&what, Err(format!("is missing; grant it: {grant}"))),
            (Held::No, Some(lost)) => lines.warn(&what, &format!("is missing: {lost}; grant it: {grant}")),
            (Held::Unknown(reason), _) => lines.skip(&what, &reason),
        }
    }
    if !found.is_empty() {
        lines.say("permissions", Ok(found.join(", ")));
    }
}

/// A transaction with the largest window must end before the coordinator aborts it, and its timeout must not exceed the
/// brokers' limit.
fn transaction(cluster: &Cluster<'_>, settings: &Settings, lines: &mut Lines) {
    let what = "transaction";
    if settings.delivery.guarantee != Guarantee::ExactlyOnce {
        return lines.skip(what, "delivery.guarantee is at_least_once");
    }
    let (longest, timeout) = (settings.longest_transaction(), settings.transaction_timeout());
    let found = format!(
        "lasts {} s at most (commit_interval and a window of {}), times out after {} s",
        longest.as_secs_f64(),
        settings.window.max_bytes,
        timeout.as_secs_f64()
    );
    match cluster.broker_setting("transaction.max.timeout.ms") {
        Err(reason) => lines.skip(what, &format!("{found}; the brokers' limit cannot be read: {reason}")),
        Ok(limit) if u128::from(limit) < timeout.as_millis() => {
            lines.say(
                what,
                Err(format!(
                    "{found}; the brokers allow {limit} ms: set transaction.timeout.ms in output.properties"
                )),
            );
        }
        Ok(limit) => lines.say(what, Ok(format!("{found}; the brokers allow {limit} ms"))),
    }
}

/// A dead letter holds its record's bytes and a few headers more, so the dead-letter topic should accept slightly
/// larger records than the input topics.
fn largest(cluster: &Cluster<'_>, settings: &Settings, lines: &mut Lines) {
    let inputs = settings.input.topics.iter().filter(|topic| !topic.starts_with('^'));
    let limit = |topic: &String| {
        let not_shown = || ConfigurationError::NotShown(format!("{topic}: max.message.bytes"));
        cluster.rules(topic)?.max_bytes.ok_or_else(not_shown)
    };
    let read: Result<Vec<u64>, ConfigurationError> = inputs.map(limit).collect();
    let (read, dead) = match (read, limit(&settings.dead_letters.topic)) {
        (Ok(read), Ok(dead)) => (read.into_iter().max().unwrap_or(0), dead),
        (Err(reason), _) | (_, Err(reason)) => {
            return lines.skip("largest message", &format!("the topics' limits cannot be read: {reason}"));
        }
    };
    // Not a failure: the dead letter of a larger record says where the record is.
    let mut note = format!("input records up to {read} bytes, dead letters up to {dead} bytes");
    if dead < read + 1024 {
        note.push_str("; dead letters of larger records have only kandle's headers, no key or value");
    }
    lines.say("largest message", Ok(note));
}

/// The schema of the input must have what is selected: the file `input.schema`, or the latest schema of each topic.
/// `pointers`: what the loaded task reads; `None`: it did not load, and only what the settings name is looked up.
fn schemas(settings: &Settings, pointers: Option<Vec<String>>, lines: &mut Lines) {
    let Some(entry) = FormatEntry::of(settings.input.format).schema else { return };
    let named = || Kind::select(settings).map(|select| select.pointers()).unwrap_or_default();
    let pointers = pointers.unwrap_or_else(named);
    let tokens: Vec<Vec<String>> = pointers.iter().map(|pointer| tokens(pointer)).collect();
    if let Some(path) = &settings.input.schema {
        let what = format!("schema {}", path.display());
        let found = (entry.types_of_file)(&settings.input, &tokens).map_err(|error| error.to_string());
        return lines.say(&what, found.and_then(|types| selected(settings, "it", &pointers, &types)));
    }
    let registry = match Registry::new(&settings.registry) {
        Ok(Some(registry)) => registry,
        Ok(None) => return,
        Err(error) => return lines.say("schema registry", Err(error.to_string())),
    };
    for topic in &settings.input.topics {
        let subject = format!("{topic}-value");
        let what = format!("schema of {subject}");
        if topic.starts_with('^') {
            lines.skip(&what, "a pattern: its topics may have different schemas");
            continue;
        }
        match registry.latest(&subject) {
            // The producers may name their subjects in another way.
            Err(RegistryError::NotFound { .. }) => {
                lines.warn(
                    &what,
                    &format!("{} has no such subject; records are read by their schema ids", registry.name()),
                );
            }
            Err(error) => lines.say(&what, Err(error.to_string())),
            Ok(Version { id, version, schema }) => {
                let name = format!("version {version}, schema id {id}");
                let found = match schema.kind == entry.kind {
                    true => {
                        (entry.types)(&schema, &tokens).map_err(|e| format!("{name} cannot be used: {e}"))
                    }
                    false => {
                        Err(format!("{name} is of type {}, not {}", schema.kind.name(), entry.kind.name()))
                    }
                };
                lines.say(&what, found.and_then(|types| selected(settings, &name, &pointers, &types)));
            }
        }
    }
}

/// Says which of the pointers a schema has; `types`: what it says of each. What has a default in `task.defaults` may be
/// absent.
fn selected(
    settings: &Settings,
    name: &str,
    pointers: &[String],
    types: &[Option<Type>],
) -> Result<String, String> {
    let absent: Vec<&str> = (pointers.iter().zip(types))
        .filter(|(pointer, of)| of.is_none() && !has_default(&settings.task, pointer))
        .map(|(pointer, _)| pointer.as_str())
        .collect();
    if absent.is_empty() {
        return Ok(format!("{name} has {}", pointers.join(", ")));
    }
    Err(format!(
        "{name} lacks {}: set input.field, input.template, output.include, task.inputs or the task's other pointers to \
         its fields",
        absent.join(", ")
    ))
}

/// Whether `task.defaults` has a value for a pointer: by the pointer, or by the input that it belongs to.
fn has_default(task: &settings::Task, pointer: &str) -> bool {
    let of_input = |name: &String| match task.inputs.get(name) {
        None => tokens(pointer) == [name.as_str()],
        Some(TensorInput::Pointer(one)) => one == pointer,
        Some(TensorInput::Pointers(all)) => all.iter().any(|one| one == pointer),
        Some(TensorInput::Value { .. } | TensorInput::Constant(_)) => false,
    };
    task.defaults.keys().any(|key| key == pointer || of_input(key))
}

/// Whether the registry has the predictions' schema, or would take it. Nothing is registered.
fn output_schema(settings: &Settings, lines: &mut Lines) {
    let Some(schema) = OutputSchema::new(settings, &Record::of(settings)) else { return };
    let what = format!("output schema, subject {}", schema.subject);
    let registry = match Registry::new(&settings.registry) {
        Ok(Some(registry)) => registry,
        Ok(None) => return lines.skip(&what, "no registry is set"),
        Err(error) => return lines.say(&what, Err(error.to_string())),
    };
    let candidates = match candidates(settings, &registry) {
        Ok(candidates) => candidates,
        Err(error) => return lines.say(&what, Err(error.to_string())),
    };
    let schemas = candidates.iter().filter_map(|record| OutputSchema::new(settings, record));
    let mut found = schemas.map(|schema| taken(&schema, &registry, settings.registry.auto_register));
    let Some(first) = found.next() else { return };
    let found = first.or_else(|why| match found.next() {
        Some(Ok(found)) => {
            let why = format!("the fields of output.include stay texts: with the input's types, it {why}");
            lines.warn(&what, &why);
            Ok(found)
        }
        _ => Err(why),
    });
    lines.say(&what, found);
}

/// Whether a subject has a schema, or would take it.
fn taken(schema: &OutputSchema, registry: &Registry, auto_register: bool) -> Result<String, String> {
    match schema.known(registry) {
        Ok(id) => Ok(format!("is in the registry, id {id}")),
        Err(RegistryError::NotFound { .. }) if !auto_register => Err(
            "is not in the registry, and registry.auto_register is false: register what `kandle config schema --output` \
             prints"
                .to_owned(),
        ),
        Err(RegistryError::NotFound { .. }) => match schema.objection(registry) {
            Ok(None) => Ok("is not in the registry yet; it is compatible, and `run` will register it".to_owned()),
            Ok(Some(reason)) => Err(format!("is not compatible with the subject's latest version: {reason}")),
            Err(error) => Err(error.to_string()),
        },
        Err(error) => Err(error.to_string()),
    }
}

/// Loads a model, and returns its task if it loads.
fn model(settings: &Settings, name: &str, lines: &mut Lines) -> Option<Arc<dyn Compute>> {
    let metrics = Arc::new(Metrics::new());
    let what = format!("{name} {}", settings.model.source.as_deref().unwrap_or("(none)"));
    match task::load(settings, &metrics) {
        Err(error) => {
            lines.say(&what, Err(error.to_string()));
            None
        }
        Ok(compute) => {
            let about = compute.about();
            let found = format!(
                "{}, {}, one forward pass done on {} in {}, digest {}",
                about.model, about.architecture, about.device, about.dtype, about.digest
            );
            lines.say(&what, Ok(found));
            labels(settings, lines);
            refresh(settings, lines);
            drift(settings, &*compute, lines);
            Some(compute)
        }
    }
}

/// Whether `drift.reference` fits the model.
fn drift(settings: &Settings, compute: &dyn Compute, lines: &mut Lines) {
    let what = "drift reference";
    match Reference::of(settings, &compute.about(), compute.labels().as_deref()) {
        Ok(None) => {}
        Ok(Some((reference, warnings))) => {
            warnings.iter().for_each(|warning| lines.warn(what, warning));
            let names: Vec<&str> = reference.distributions.keys().map(String::as_str).collect();
            lines.say(what, Ok(format!("{} predictions, with {}", reference.records, names.join(", "))));
        }
        Err(error) => lines.say(what, Err(error.to_string())),
    }
}

/// Warns if predictions would have labels that say nothing, because the checkpoint does not name its own.
fn labels(settings: &Settings, lines: &Lines) {
    let family = Kind::of(settings.task.kind).family;
    // A task with labels of its own has no use for the model's names.
    let unnamed = settings.task.labels.is_empty()
        && matches!(family, Family::Text(Output::Logits | Output::TokenLogits));
    let read = |files: Files| Checkpoint::read(&files).ok();
    if unnamed
        && let Some(checkpoint) = Files::find(&settings.model).ok().and_then(read)
        && checkpoint.labels_are_numbers()
    {
        let why = format!(
            "the model names none of its labels, so that predictions have {}: set id2label in its config.json, such \
             as {{\"0\": \"negative\", \"1\": \"positive\"}}",
            checkpoint.labels.join(", ")
        );
        lines.warn("labels", &why);
    }
}

/// Compares the model plus `memory.limit` with the memory of the machine or the container. `models`: the bytes of the
/// weights of the model, and of the shadow's if there is one; `None`: it did not load.
fn memory(settings: &Settings, models: &[Option<u64>], lines: &mut Lines) {
    let loaded: Vec<u64> = models.iter().copied().flatten().collect();
    if loaded.len() < models.len() {
        return lines.skip("memory", "the model did not load");
    }
    let Some(room) = host_memory::limit() else {
        return lines.skip("memory", "the system does not report its memory");
    };
    let mib = |bytes: u64| bytes >> 20;
    let limit = settings.memory.limit.0;
    let mut found = format!("model {} MiB + memory.limit {} MiB", mib(loaded[0]), mib(limit));
    let mut need = loaded[0] + limit;
    if let [_, shadow] = loaded[..] {
        let waiting = settings.shadow.memory.0;
        found += &format!(" + shadow model {} MiB + shadow.memory {} MiB", mib(shadow), mib(waiting));
        need += shadow + waiting;
    }
    found += &format!(", of {} MiB", mib(room));
    if settings.model.refresh.is_some() && need <= room && need + loaded[0] > room {
        let why = format!(
            "{found}, which does not hold two versions of the model: to replace it (model.refresh), kandle drops the one \
             that runs before it loads the other, and records wait meanwhile"
        );
        return lines.warn("memory", &why);
    }
    lines.say("memory", if need <= room { Ok(found) } else { Err(format!("{found}: lower memory.limit")) });
}

/// What version `model.refresh` sees: the store must say it without loading the model.
fn refresh(settings: &Settings, lines: &mut Lines) {
    let (Some(every), Some(wants)) = (settings.model.refresh, Kind::of(settings.task.kind).wants()) else {
        return;
    };
    let found = model::version(&settings.model, wants).map(|version| {
        let version = version.unwrap_or_else(|| "the only one".to_owned());
        format!("looks every {every}; the version now is {version}")
    });
    lines.say("model.refresh", found.map_err(|error| error.to_string()));
}
