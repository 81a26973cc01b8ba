//! Rules that the schema cannot express: between keys, and about the librdkafka properties that kandle manages.

use rdkafka::ClientConfig;
use serde::Serialize;

use super::{Format, Guarantee, Model, OnChange, Properties, Registry, Server, Settings, Task, shadow};
use crate::codec::FormatEntry;
use crate::codec::select::{self, needs_members};
use crate::codec::write;
use crate::kafka::login;
use crate::kafka::topics::TopicFilter;
use crate::schedule::Schedule;
use crate::task::{Family, Kind};
use crate::watch;

/// librdkafka properties that kandle manages, each with the setting to use instead or the reason.
const OWNED: &[(&str, &str)] = &[
    ("bootstrap.servers", "set kafka.brokers"),
    ("metadata.broker.list", "set kafka.brokers"),
    ("group.id", "set input.group"),
    ("auto.offset.reset", "set input.start"),
    ("enable.auto.commit", "kandle commits what is published, not what was read"),
    ("auto.commit.interval.ms", "set delivery.commit_interval"),
    ("enable.auto.offset.store", "kandle commits what is published, not what was read"),
    ("enable.partition.eof", "kandle decides when a partition is at its end"),
    ("enable.idempotence", "delivery.guarantee depends on it"),
    ("acks", "the idempotent producer needs acks=all"),
    ("request.required.acks", "the idempotent producer needs acks=all"),
    ("max.in.flight.requests.per.connection", "the order per partition depends on it"),
    ("max.in.flight", "the order per partition depends on it"),
    ("enable.gapless.guarantee", "the order after a refused batch depends on it"),
    ("delivery.report.only.error", "kandle waits for every acknowledgement"),
    ("message.timeout.ms", "a prediction is retried until the broker acknowledges it"),
    ("delivery.timeout.ms", "a prediction is retried until the broker acknowledges it"),
    ("retries", "a prediction is retried until the broker acknowledges it"),
    ("message.send.max.retries", "a prediction is retried until the broker acknowledges it"),
    ("transactional.id", "set delivery.guarantee and delivery.transactional_id"),
    ("check.crcs", "without the check, a damaged batch would be read as records"),
    ("partitioner", "set output.partition"),
    ("statistics.interval.ms", "the lag metrics are computed from it"),
    ("queued.max.messages.kbytes", "set memory.limit"),
    ("queue.buffering.max.kbytes", "set memory.limit"),
    ("queued.min.messages", "set memory.limit"),
    ("fetch.max.bytes", "set memory.limit"),
    ("fetch.message.max.bytes", "set memory.limit"),
    ("max.partition.fetch.bytes", "set memory.limit"),
    ("queue.buffering.max.messages", "set memory.limit"),
    ("message.max.bytes", "each topic's own limit applies"),
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
        problem("kafka.brokers", "is empty: list brokers as host:port".to_owned());
    }
    let input = &settings.input;
    if input.topics.iter().any(|topic| TopicFilter::is_pattern(topic)) && input.topics.len() > 1 {
        problem("input.topics", "must be names or one pattern that starts with ^, not both".to_owned());
    }
    let twice = input.topics.iter().enumerate().find(|(i, topic)| input.topics[..*i].contains(topic));
    if let Some((_, topic)) = twice {
        problem("input.topics", format!("{topic} is named twice"));
    }
    let samples = settings.samples.topic.as_ref().map(|topic| ("samples.topic", topic));
    for (key, topic) in
        [("output.topic", &settings.output.topic), ("dead_letters.topic", &settings.dead_letters.topic)]
            .into_iter()
            .chain(samples)
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
    if let Some((key, topic)) = samples
        && [&settings.output.topic, &settings.dead_letters.topic].contains(&topic)
    {
        problem(
            key,
            format!("{topic} is also output.topic or dead_letters.topic: readers could not tell them apart"),
        );
    }
    for (key, message) in watch::problems(settings) {
        problem(key, message);
    }
    if input.group.is_empty() {
        problem("input.group", "is empty".to_owned());
    }
    let entry = Kind::of(settings.task.kind);
    for (key, message) in select::problems(settings, entry) {
        problem(key, message);
    }
    for (key, message) in write::problems(settings) {
        problem(key, message);
    }
    if entry.wants().is_none() {
        let name = entry.kind.name();
        if !settings.output.include.is_empty() {
            problem(
                "output.include",
                format!("has no effect with task.kind: {name}, which publishes the value unchanged"),
            );
        }
        if settings.model.source.is_some() {
            problem("model.source", format!("{name} runs no model"));
        }
    } else if settings.model.source.as_deref().unwrap_or_default().is_empty() {
        let message = match entry.family {
            Family::Onnx => "is required: an ONNX file, or a directory or hub id (org/name) that has one",
            Family::Series | Family::Vision(_) => "is required: a hub id (org/name) or a directory",
            Family::Text(_) | Family::Nothing => "is required: a hub id (org/name), a directory, or bundled",
        };
        problem("model.source", message.to_owned());
    }
    if let Some(message) = check_digest(&settings.model) {
        problem("model.digest", message);
    }
    if let Some(message) = check_refresh(settings) {
        problem("model.refresh", message);
    }
    for (key, message) in check_task(&settings.task, entry, FormatEntry::of(input.format)) {
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
            "{} is less than eight windows of window.max_bytes: set at least {least}",
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
            "{} is not less than server.stall_after {}: /livez would report a stall first",
            settings.batch.timeout, settings.server.stall_after
        );
        problem("batch.timeout", message);
    }
    for (key, message) in check_server(&settings.server).into_iter().chain(check_delivery(settings)) {
        problem(key, message);
    }
    for (key, message) in check_schema(settings).into_iter().chain(check_registry(&settings.registry)) {
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
    if settings.drift.reference.is_none() && settings.drift != super::Drift::default() {
        problem(
            "drift.reference",
            "is required for drift: a file that `kandle reference` has written".to_owned(),
        );
    }
    if settings.delivery.commit_interval.0.is_zero() {
        problem("delivery.commit_interval", "is zero".to_owned());
    }
    for (key, message) in shadow::problems(settings) {
        problem(&key, message);
    }
    problems
}

/// Why `model.refresh` would do nothing.
fn check_refresh(settings: &Settings) -> Option<String> {
    let model = &settings.model;
    let is_commit =
        |revision: &String| revision.len() == 40 && revision.bytes().all(|digit| digit.is_ascii_hexdigit());
    let message = if model.refresh?.0.is_zero() {
        "is zero: set an interval such as 5m, or leave it out"
    } else if Kind::of(settings.task.kind).wants().is_none() {
        return Some(format!(
            "has no effect with task.kind: {}, which runs no model",
            settings.task.kind.name()
        ));
    } else if model.on_change == OnChange::Refuse {
        "has no effect with model.on_change: refuse, which forbids another version of the model"
    } else if model.digest.is_some() {
        "has no effect with model.digest, which pins one version of the model"
    } else if model.revision.as_ref().is_some_and(is_commit) {
        "has no effect with a model.revision that is a commit: name a branch or a tag"
    } else if model.source.as_ref().is_some_and(|source| source.split(':').next() == Some("bundled")) {
        "has no effect with a bundled model, which is part of the program"
    } else {
        return None;
    };
    Some(message.to_owned())
}

/// The problem of `digest`, if it has one.
pub(super) fn check_digest(model: &Model) -> Option<String> {
    let digest = model.digest.as_ref()?;
    let is_digest = (16..=64).contains(&digest.len())
        && digest.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    (!is_digest).then(|| {
        "is not a digest: set 16 to 64 lower-case hex digits, as `kandle model verify` prints them".to_owned()
    })
}

fn check_server(server: &Server) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    if server.cert.is_some() && server.key.is_none() {
        problems.push(("server.cert", "has no effect without server.key".to_owned()));
    }
    if server.key.is_some() && server.cert.is_none() {
        problems.push(("server.key", "has no effect without server.cert".to_owned()));
    }
    for (name, path) in [("server.cert", &server.cert), ("server.key", &server.key)] {
        if path.as_ref().is_some_and(|path| path.to_string_lossy().trim_start().starts_with("-----BEGIN")) {
            // The message does not quote it.
            problems.push((name, "is the path of a PEM file, not its text".to_owned()));
        }
    }
    if server.token.as_ref().is_some_and(|token| token.trim().is_empty()) {
        problems.push(("server.token", "is empty: everybody would have it".to_owned()));
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
            "transaction.timeout.ms {} is less than a transaction may last, {} ms: commit_interval and the time to publish window.max_bytes",
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

/// Where the schemas of the input come from.
fn check_schema(settings: &Settings) -> Vec<(&'static str, String)> {
    let (input, format) = (&settings.input, FormatEntry::of(settings.input.format));
    let mut problems = Vec::new();
    if input.schema.is_some() && format.schema.is_none() {
        problems.push(("input.schema", format!("has no effect with input.format: {}", format.name)));
    }
    let of_messages = input.format == Format::Protobuf && input.schema.is_some();
    if input.message.is_some() && !of_messages {
        let message = "has no effect without input.format: protobuf and input.schema".to_owned();
        problems.push(("input.message", message));
    } else if input.message.is_none() && of_messages {
        let message =
            "is required with input.schema: the full name of the message, such as shop.Ticket".to_owned();
        problems.push(("input.message", message));
    }
    if format.schema.is_some() && input.schema.is_none() && settings.registry.url.0.is_empty() {
        let message = format!(
            "is required with input.format: {}: the address of the schema registry; or set input.schema to a file, if \
             the values have no schema id",
            format.name
        );
        problems.push(("registry.url", message));
    }
    problems
}

/// Host and port of an http or https address, behind a login if it has one (RFC 3986, 3.2); `None` if there is no host.
pub(crate) fn authority(url: &str) -> Option<&str> {
    let rest = ["http://", "https://"].iter().find_map(|scheme| url.strip_prefix(scheme))?;
    rest.split(['/', '?', '#']).next().filter(|authority| !authority.is_empty())
}

fn check_registry(registry: &Registry) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    for url in &registry.url.0 {
        // The message does not quote an address with a login.
        let authority = authority(url);
        if authority.is_some_and(|authority| authority.contains('@')) {
            let message =
                "has a login in the address: set registry.username and registry.password".to_owned();
            problems.push(("registry.url", message));
        } else if authority.is_none() || url.contains(['?', '#']) {
            let message = format!("{url:?} is not an address such as http://localhost:8081");
            problems.push(("registry.url", message));
        }
    }
    let mut pair = |one: &'static str, there: bool, other: &str, other_there: bool| {
        if there && !other_there {
            problems.push((one, format!("has no effect without {other}")));
        }
    };
    let (username, password) = (registry.username.is_some(), registry.password.is_some());
    pair("registry.username", username, "registry.password", password);
    pair("registry.password", password, "registry.username", username);
    let (cert, key) = (registry.cert.is_some(), registry.key.is_some());
    pair("registry.cert", cert, "registry.key", key);
    pair("registry.key", key, "registry.cert", cert);
    if registry.token.is_some() && username {
        let message = "is used instead of registry.username: set only one of them".to_owned();
        problems.push(("registry.token", message));
    }
    if registry.timeout.0.is_zero() {
        problems.push(("registry.timeout", "is zero".to_owned()));
    }
    problems
}

/// Key and message of each problem of `task`: keys without effect on its kind, and what the kind's check reports.
pub(super) fn check_task(task: &Task, entry: &Kind, format: &FormatEntry) -> Vec<(String, String)> {
    let (set, name) = (task.set_keys(), entry.kind.name());
    let without_effect = set.keys().filter(|key| !entry.keys.contains(&key.as_str()));
    let mut problems: Vec<(String, String)> =
        without_effect.map(|key| (key.clone(), format!("has no effect with task.kind: {name}"))).collect();
    for key in entry.pointers {
        let Some(pointer) = set.get(*key).and_then(|value| value.as_str()) else { continue };
        if let Err(message) = check_pointer(pointer) {
            problems.push(((*key).to_owned(), message));
        }
        if !format.has_members {
            problems.push(((*key).to_owned(), needs_members(format)));
        }
    }
    if let Some(overflow) =
        task.overflow.filter(|of| entry.keys.contains(&"overflow") && !entry.overflow.contains(of))
    {
        let allowed: Vec<String> = entry.overflow.iter().map(name_of).collect();
        let message =
            format!("{} is not supported by {name}; allowed: {}", name_of(&overflow), allowed.join(", "));
        problems.push(("overflow".to_owned(), message));
    }
    problems.extend((entry.check)(task).into_iter().map(|(key, message)| (key.to_owned(), message)));
    problems
}

/// A setting's value, as it is written in a configuration.
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
        if login::is_own(name) {
            continue;
        }
        if let Err(e) = ClientConfig::new().set(name, &value.0).create_native_config() {
            problems.push((key, login::reason(e)));
        }
    }
    problems
}

/// Pairs of names that librdkafka has for one property.
const ALIASES: &[(&str, &str)] = &[
    ("sasl.mechanism", "sasl.mechanisms"),
    ("linger.ms", "queue.buffering.max.ms"),
    ("compression.type", "compression.codec"),
];

/// The sections with the properties of each client: of the consumer, then of the producer. The last section that sets a
/// property wins.
fn clients(settings: &Settings) -> [[(&'static str, &Properties); 2]; 2] {
    let common = ("kafka.properties", &settings.kafka.properties);
    let (input, output) = (&settings.input.properties, &settings.output.properties);
    [("input.properties", input), ("output.properties", output)].map(|own| [common, own])
}

/// Reports properties that one client would get under two names: it is undefined which of them wins.
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

/// Checks how each client logs in. A problem is reported under the section that sets its property.
fn check_login(settings: &Settings) -> Vec<(String, String)> {
    let mut problems: Vec<(String, String)> = Vec::new();
    for sections in clients(settings) {
        let all = sections.into_iter().flat_map(|(_, set)| set);
        let properties = all.map(|(name, value)| (name.as_str(), value.0.as_str())).collect();
        for (name, message) in login::check(&properties, &settings.kafka.brokers) {
            let setter = sections.into_iter().rfind(|(_, set)| set.contains_key(&name));
            let section = setter.map_or("kafka.properties", |(section, _)| section);
            let problem = (format!("{section}.{name}"), message);
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
    }
    problems
}

/// Kafka's rule for topic names: `[a-zA-Z0-9._-]{1,249}`, except `.` and `..`.
pub(super) fn check_topic(topic: &str) -> Result<(), String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if topic.is_empty() || topic.len() > 249 || !topic.chars().all(legal) || topic == "." || topic == ".." {
        return Err(format!(
            "{topic:?} is not a valid topic name: use letters, digits, '.', '_' and '-', at most 249"
        ));
    }
    Ok(())
}

/// A JSON Pointer is empty or starts with `/` (RFC 6901).
pub(crate) fn check_pointer(pointer: &str) -> Result<(), String> {
    if pointer.is_empty() || pointer.starts_with('/') {
        return Ok(());
    }
    Err(format!("{pointer:?} is not a JSON Pointer; did you mean /{pointer}?"))
}
