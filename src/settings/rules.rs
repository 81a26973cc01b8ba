//! What the schema cannot say: rules between keys, and what kandle itself sets in librdkafka.

use rdkafka::ClientConfig;
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::{KafkaError, KafkaResult};
use serde::Serialize;

use super::{Fields, Format, Guarantee, Properties, Settings, Task};
use crate::kafka::consumer::ReaderContext;
use crate::kafka::topics::TopicFilter;
use crate::schedule::Schedule;
use crate::task::Kind;

/// Properties of librdkafka that kandle owns, and why.
const OWNED: &[(&str, &str)] = &[
    ("bootstrap.servers", "set kafka.brokers"),
    ("metadata.broker.list", "set kafka.brokers"),
    ("group.id", "set input.group"),
    ("auto.offset.reset", "set input.start"),
    ("enable.auto.commit", "kandle commits what is published, not what was read"),
    ("auto.commit.interval.ms", "set delivery.commit_interval"),
    ("enable.auto.offset.store", "kandle commits what is published, not what was read"),
    ("enable.partition.eof", "kandle decides when a partition is at its end"),
    ("enable.idempotence", "delivery.guarantee rests on it"),
    ("acks", "the idempotent producer needs all of them"),
    ("request.required.acks", "the idempotent producer needs all of them"),
    ("max.in.flight.requests.per.connection", "order per partition rests on it"),
    ("max.in.flight", "order per partition rests on it"),
    ("enable.gapless.guarantee", "order after a refused batch rests on it"),
    ("delivery.report.only.error", "kandle waits for every acknowledgement"),
    ("message.timeout.ms", "a prediction is sent until the broker has it"),
    ("delivery.timeout.ms", "a prediction is sent until the broker has it"),
    ("retries", "a prediction is sent until the broker has it"),
    ("message.send.max.retries", "a prediction is sent until the broker has it"),
    ("transactional.id", "delivery.guarantee decides about transactions"),
    ("check.crcs", "what a damaged batch holds would be taken for records"),
    ("partitioner", "set output.partition"),
    ("statistics.interval.ms", "the lag metrics are made from it"),
    ("queued.max.messages.kbytes", "set memory.limit"),
    ("queue.buffering.max.kbytes", "set memory.limit"),
    ("queued.min.messages", "set memory.limit"),
    ("fetch.max.bytes", "set memory.limit"),
    ("fetch.message.max.bytes", "set memory.limit"),
    ("max.partition.fetch.bytes", "set memory.limit"),
    ("queue.buffering.max.messages", "set memory.limit"),
    ("message.max.bytes", "each topic's own limit counts"),
    ("log_level", "set log.level"),
];

/// Key and message of each broken rule.
pub(super) fn check(settings: &Settings) -> Vec<(String, String)> {
    let mut problems = Vec::new();
    let mut problem = |key: &str, message: String| problems.push((key.to_owned(), message));

    for (section, properties) in [
        ("kafka.properties", &settings.kafka.properties),
        ("input.properties", &settings.input.properties),
        ("output.properties", &settings.output.properties),
    ] {
        for (key, message) in check_properties(section, properties) {
            problem(&key, message);
        }
    }
    for (key, message) in check_aliases(settings) {
        problem(&key, message);
    }
    for (key, message) in check_login(settings) {
        problem(&key, message);
    }
    if settings.kafka.brokers.trim().is_empty() {
        problem("kafka.brokers", "names no broker".to_owned());
    }
    let input = &settings.input;
    if input.topics.iter().any(|topic| TopicFilter::is_pattern(topic)) && input.topics.len() > 1 {
        problem("input.topics", "holds names or one pattern that starts with ^, not both".to_owned());
    }
    let twice = input.topics.iter().enumerate().find(|(i, topic)| input.topics[..*i].contains(topic));
    if let Some((_, topic)) = twice {
        problem("input.topics", format!("{topic} is named twice"));
    }
    for (key, topic) in
        [("output.topic", &settings.output.topic), ("dead_letters.topic", &settings.dead_letters.topic)]
    {
        if let Err(message) = check_topic(topic) {
            problem(key, message);
        } else if TopicFilter::new(&input.topics).is_ok_and(|input| input.holds(topic)) {
            problem(key, format!("{topic} is also in input.topics: kandle would read what it wrote"));
        }
    }
    for topic in &input.topics {
        if TopicFilter::is_pattern(topic) {
            if let Err(e) = TopicFilter::new(&[topic]) {
                problem("input.topics", format!("{topic} is not a valid pattern: {e}"));
            }
        } else if let Err(message) = check_topic(topic) {
            problem("input.topics", message);
        }
    }
    if settings.output.topic == settings.dead_letters.topic {
        problem(
            "dead_letters.topic",
            "is the same as output.topic: readers could not tell them apart".to_owned(),
        );
    }
    if input.group.is_empty() {
        problem("input.group", "is empty".to_owned());
    }
    match input.format {
        Format::Json => match (&input.field, &input.template) {
            (Fields(fields), None) if fields.is_empty() => {
                problem(
                    "input.field",
                    "json needs a field or a template: say where the text is, such as /text".to_owned(),
                );
            }
            (Fields(fields), Some(_)) if !fields.is_empty() => {
                problem("input.template", "stands instead of input.field, not beside it".to_owned());
            }
            (Fields(fields), None) => {
                for field in fields {
                    if let Err(message) = check_pointer(field) {
                        problem("input.field", message);
                    }
                }
            }
            (_, Some(template)) => {
                if let Err(e) = crate::codec::json::Template::new(template) {
                    problem("input.template", format!("is not a valid template: {e}"));
                }
            }
        },
        Format::Text | Format::Bytes => {
            let format = name_of(&input.format);
            if !input.field.0.is_empty() {
                problem("input.field", format!("has no effect with input.format: {format}"));
            }
            if input.template.is_some() {
                problem("input.template", format!("has no effect with input.format: {format}"));
            }
            if !settings.output.include.is_empty() {
                problem("output.include", format!("needs input.format: json, not {format}"));
            }
        }
    }
    let entry = Kind::of(settings.task.kind);
    let mut names: Vec<String> = entry.fields.iter().map(|&field| field.to_owned()).collect();
    for pointer in &settings.output.include {
        match check_pointer(pointer) {
            Ok(()) if pointer.is_empty() => {
                problem("output.include", "\"\" is the whole input: name its fields".to_owned())
            }
            Ok(()) => {
                let name = crate::codec::json::last_name(pointer);
                if names.contains(&name) {
                    problem(
                        "output.include",
                        format!("{pointer}: a prediction already has a field {name:?}"),
                    );
                }
                names.push(name);
            }
            Err(message) => problem("output.include", message),
        }
    }
    if entry.output.is_none() {
        let name = entry.kind.name();
        if !settings.output.include.is_empty() {
            problem(
                "output.include",
                format!("{name} publishes the value as it came: there is nothing to add to"),
            );
        }
        if settings.model.source.is_some() {
            problem("model.source", format!("{name} runs no model"));
        }
    } else if settings.model.source.as_deref().unwrap_or_default().is_empty() {
        let message = "is required: a hub id (org/name), a directory, or bundled".to_owned();
        problem("model.source", message);
    }
    for (key, message) in check_task(&settings.task, entry, input.format) {
        problem(&format!("task.{key}"), message);
    }
    if settings.window.max_work.0.is_zero() {
        problem("window.max_work", "is zero".to_owned());
    }
    if settings.window.max_wait.0.is_zero() {
        problem("window.max_wait", "is zero".to_owned());
    }
    if settings.window.max_bytes.0 == 0 {
        problem("window.max_bytes", "is zero".to_owned());
    }
    // Half the limit is for windows, and at least three overlap.
    if settings.memory.limit.0 < 8 * settings.window.max_bytes.0 {
        let least = super::ByteSize(8 * settings.window.max_bytes.0);
        let message = format!(
            "{} is less than eight windows of window.max_bytes: at least {least}",
            settings.memory.limit
        );
        problem("memory.limit", message);
    }
    if settings.memory.limit.0 < 16 << 20 {
        problem("memory.limit", "is less than 16MiB, which librdkafka's queues alone need".to_owned());
    }
    if settings.server.listen.parse::<std::net::SocketAddr>().is_err() {
        problem(
            "server.listen",
            format!("{:?} is not address:port, such as 0.0.0.0:9464", settings.server.listen),
        );
    }
    if settings.batch.timeout.0.is_zero() {
        problem("batch.timeout", "is zero".to_owned());
    } else if settings.batch.timeout.0 >= settings.server.stall_after.0 {
        let message = format!(
            "{} is not less than server.stall_after {}: the process would be taken for stalled first",
            settings.batch.timeout, settings.server.stall_after
        );
        problem("batch.timeout", message);
    }
    for (key, message) in check_delivery(settings) {
        problem(key, message);
    }
    for (key, message) in Schedule::check(&settings.schedule) {
        problem(&key, message);
    }
    if let Some(endpoint) = &settings.otel.endpoint
        && !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme))
    {
        problem("otel.endpoint", format!("{endpoint:?} is not an address such as http://localhost:4318"));
    }
    if settings.delivery.commit_interval.0.is_zero() {
        problem("delivery.commit_interval", "is zero".to_owned());
    }
    problems
}

fn check_delivery(settings: &Settings) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    if settings.delivery.guarantee != Guarantee::ExactlyOnce {
        if settings.delivery.transactional_id.is_some() {
            problems.push((
                "delivery.transactional_id",
                "has no effect without guarantee: exactly_once".to_owned(),
            ));
        }
        return problems;
    }
    if settings.delivery.transactional_id.as_deref() == Some("") {
        problems.push(("delivery.transactional_id", "is empty".to_owned()));
    }
    let (timeout, longest) = (settings.transaction_timeout(), settings.longest_transaction());
    if timeout < longest {
        let message = format!(
            "transaction.timeout.ms {} is less than a transaction may last, {} ms: commit_interval and a window of window.max_bytes",
            timeout.as_millis(),
            longest.as_millis()
        );
        problems.push(("output.properties", message));
    }
    if settings.property("isolation.level").is_some_and(|level| level != "read_committed") {
        let message = "isolation.level must be read_committed with guarantee: exactly_once".to_owned();
        problems.push(("input.properties", message));
    }
    problems
}

/// Keys of `task` that are set and have no effect with its kind, and what its kind finds wrong with the others.
fn check_task(task: &Task, entry: &Kind, format: Format) -> Vec<(String, String)> {
    let (set, name) = (task.set_keys(), entry.kind.name());
    let without_effect = set.keys().filter(|key| !entry.keys.contains(&key.as_str()));
    let mut problems: Vec<(String, String)> =
        without_effect.map(|key| (key.clone(), format!("has no effect with task.kind: {name}"))).collect();
    for key in entry.pointers {
        let Some(pointer) = set.get(*key).and_then(|value| value.as_str()) else { continue };
        if let Err(message) = check_pointer(pointer) {
            problems.push(((*key).to_owned(), message));
        }
        if format != Format::Json {
            let format = name_of(&format);
            problems.push(((*key).to_owned(), format!("needs input.format: json, not {format}")));
        }
    }
    if let Some(overflow) =
        task.overflow.filter(|of| entry.keys.contains(&"overflow") && !entry.overflow.contains(of))
    {
        let allowed: Vec<String> = entry.overflow.iter().map(name_of).collect();
        let message = format!("{} is not for {name}; allowed: {}", name_of(&overflow), allowed.join(", "));
        problems.push(("overflow".to_owned(), message));
    }
    problems.extend((entry.check)(task).into_iter().map(|(key, message)| (key.to_owned(), message)));
    problems
}

/// As a setting's value is written.
fn name_of(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

fn check_properties(section: &str, properties: &Properties) -> Vec<(String, String)> {
    let mut problems = Vec::new();
    for (name, value) in properties {
        let key = format!("{section}.{name}");
        if let Some((_, reason)) = OWNED.iter().find(|(owned, _)| owned == name) {
            problems.push((key, format!("is managed by kandle: {reason}")));
            continue;
        }
        if let Err(e) = ClientConfig::new().set(name, &value.0).create_native_config() {
            problems.push((key, reason(e)));
        }
    }
    problems
}

/// Names of librdkafka for one property.
const ALIASES: &[(&str, &str)] = &[
    ("sasl.mechanism", "sasl.mechanisms"),
    ("linger.ms", "queue.buffering.max.ms"),
    ("compression.type", "compression.codec"),
];

/// The sections that each client has its properties from, the consumer and the producer; the last one that sets a
/// property wins.
fn clients(settings: &Settings) -> [[(&'static str, &Properties); 2]; 2] {
    let common = ("kafka.properties", &settings.kafka.properties);
    let (input, output) = (&settings.input.properties, &settings.output.properties);
    [("input.properties", input), ("output.properties", output)].map(|own| [common, own])
}

/// Two names of one property, of which one client would take either.
fn check_aliases(settings: &Settings) -> Vec<(String, String)> {
    let mut problems = Vec::new();
    for sections in clients(settings) {
        let section =
            |name: &str| sections.iter().find(|(_, set)| set.contains_key(name)).map(|(section, _)| *section);
        for (one, other) in ALIASES {
            if let (Some(first), Some(second)) = (section(one), section(other)) {
                let problem = (
                    format!("{second}.{other}"),
                    format!("is the same property as {one}, which {first} sets: write one name"),
                );
                if !problems.contains(&problem) {
                    problems.push(problem);
                }
            }
        }
    }
    problems
}

/// What librdkafka says, without the value, which may be a secret.
fn reason(error: KafkaError) -> String {
    match error {
        KafkaError::ClientConfig(_, reason, ..) | KafkaError::ClientCreation(reason) => reason,
        error => error.to_string(),
    }
}

/// Creates a client to let librdkafka check the SASL settings: the mechanisms depend on the build, and some need more
/// properties. Without brokers it connects to nothing.
fn check_login(settings: &Settings) -> Vec<(String, String)> {
    let mut problems: Vec<(String, String)> = Vec::new();
    for sections in clients(settings) {
        let all =
            || sections.into_iter().flat_map(|(section, set)| set.iter().map(move |pair| (section, pair)));
        let last = |name: &str| all().rfind(|(_, (key, _))| *key == name);
        let Some((protocol_in, (_, protocol))) = last("security.protocol") else { continue };
        if !protocol.0.to_ascii_uppercase().starts_with("SASL_") {
            continue;
        }
        let mut config = ClientConfig::new();
        config.set("security.protocol", "SASL_PLAINTEXT").set("log_level", "0");
        for (_, (name, value)) in all().filter(|(_, (name, _))| name.contains("sasl.")) {
            // A property that does not exist is a problem of its own.
            if ClientConfig::new().set(name, &value.0).create_native_config().is_ok() {
                config.set(name, &value.0);
            }
        }
        let made: KafkaResult<BaseConsumer<ReaderContext>> = config.create_with_context(ReaderContext);
        if let Err(error) = made {
            let (section, name) = ["sasl.mechanism", "sasl.mechanisms"]
                .iter()
                .find_map(|name| last(name).map(|(section, _)| (section, *name)))
                .unwrap_or((protocol_in, "security.protocol"));
            let problem = (format!("{section}.{name}"), reason(error));
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
    }
    problems
}

/// Kafka's own rule for names: `[a-zA-Z0-9._-]{1,249}`.
fn check_topic(topic: &str) -> Result<(), String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if topic.is_empty() || topic.len() > 249 || !topic.chars().all(legal) || topic == "." || topic == ".." {
        return Err(format!(
            "{topic:?} is not a topic's name: letters, digits, '.', '_' and '-', at most 249"
        ));
    }
    Ok(())
}

/// RFC 6901: empty, or starting with `/`.
fn check_pointer(pointer: &str) -> Result<(), String> {
    if pointer.is_empty() || pointer.starts_with('/') {
        return Ok(());
    }
    Err(format!("{pointer:?} is not a JSON Pointer: /{pointer}?"))
}
