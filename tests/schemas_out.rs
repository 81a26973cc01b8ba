//! Predictions with schemas, end to end: a real Kafka, a real schema registry, and decoders that kandle has no part in.

use crate::support;
use crate::support::decode;

use kandle::codec::write::Record;
use kandle::settings::{self, Sources};
use serde_json::{Value, json};

use decode::{decoded, expected, same};
use support::registry::{Registry, framed};
use support::{Daemon, Got, Place, Sent, file, finish, kandle};

const FORMATS: [&str; 3] = ["avro", "protobuf", "json_schema"];

/// A job that writes in a format.
fn config(place: &Place, registry: &Registry, format: &str, more: &[(&str, &str)]) -> String {
    let output = format!("{{ topic: {}, format: {format}, include: [/id, /na~1me] }}", place.output);
    let registry = format!("{{ url: \"{}\" }}", registry.url);
    let mut sections = vec![("output", output.as_str()), ("registry", registry.as_str())];
    sections.extend(more);
    place.config(&sections)
}

/// The record that describes a configuration's predictions.
fn record(config: &str) -> Record {
    let file = file("kandle.yaml", config);
    let sources = Sources { files: vec![file.path.clone()], ..Sources::default() };
    Record::of(&settings::load(&sources).unwrap_or_else(|problems| panic!("{problems:?}")).settings)
}

/// The prediction in a message, by the schema that the registry has for the id in its frame.
fn prediction(registry: &Registry, format: &str, got: &Got) -> Value {
    let value = got.value.as_deref().expect("a value");
    assert_eq!(value[0], 0, "the frame begins with a zero byte");
    let id = u32::from_be_bytes(value[1..5].try_into().expect("four bytes"));
    let schema = registry.get(&format!("/schemas/ids/{id}"));
    let kind = schema["schemaType"].as_str().unwrap_or("AVRO");
    assert_eq!(kind, ["AVRO", "PROTOBUF", "JSON"][FORMATS.iter().position(|f| *f == format).expect("known")]);
    decoded(format, schema["schema"].as_str().expect("a schema"), &value[5..])
}

fn inputs() -> Vec<Value> {
    vec![
        json!({ "id": "C-17", "text": "I was charged twice", "na/me": "Ada" }),
        json!({ "id": 18, "text": "Where is my package?", "na/me": { "first": "Grace" } }),
        json!({ "text": "The app crashes" }),
    ]
}

fn predictions_equal_those_of_predict(guarantee: &str) {
    let registry = Registry::start();
    for format in FORMATS {
        let place = Place::new(&format!("out-{}", format.replace('_', "-")), 1);
        let delivery = format!("{{ guarantee: {guarantee}, commit_interval: 200ms }}");
        let config = config(&place, &registry, format, &[("delivery", &delivery)]);
        let inputs = inputs();
        let mut sent: Vec<Sent> = inputs.iter().map(|input| Sent::new(0, input.to_string())).collect();
        sent.push(Sent { partition: 0, ..Sent::default() });
        sent.push(Sent::new(0, "{ not JSON"));
        place.produce(sent);
        let mut daemon = Daemon::start(&config);
        let got = place.predictions(inputs.len() + 1);
        let dead = place.dead_letters(1);
        daemon.stop();

        // `predict` prints JSON, whatever the format.
        let lines: String = inputs.iter().map(|input| format!("{input}\n")).collect();
        let file = file("kandle.yaml", &config);
        let (code, out, log) = finish(kandle().args(["predict", "-c"]).arg(&file.path), lines.as_bytes());
        assert_eq!(code, 0, "{log}");
        let record = record(&config);
        for (got, line) in got.iter().zip(out.lines()) {
            let want: Value = serde_json::from_str(line).expect("a line of JSON");
            let want = if format == "json_schema" { want } else { expected(&record, &want) };
            let got = prediction(&registry, format, got);
            assert!(same(&got, &want), "{format}:\n{got}\nis not\n{want}");
        }
        assert_eq!(out.lines().count(), inputs.len());
        assert_eq!(got[inputs.len()].value, None, "a tombstone stays a tombstone");
        assert_eq!(dead[0].value.as_deref(), Some(&b"{ not JSON"[..]), "a dead letter's value is unchanged");
        let subjects = registry.get("/subjects");
        let subject = format!("{}-value", place.output);
        assert!(subjects.as_array().is_some_and(|all| all.contains(&subject.as_str().into())), "{subjects}");
    }
}

#[test]
fn predictions_are_decoded_by_the_schema_in_the_registry() {
    predictions_equal_those_of_predict("at_least_once");
}

#[test]
fn predictions_in_transactions_are_decoded_by_the_schema_in_the_registry() {
    predictions_equal_those_of_predict("exactly_once");
}

/// `check` says what `run` would meet, and registers nothing.
#[test]
fn an_incompatible_schema_ends_the_start_with_the_registrys_reason() {
    let registry = Registry::start();
    let place = Place::new("incompatible", 1);
    let subject = format!("{}-value", place.output);
    let config = config(&place, &registry, "avro", &[]);
    let file = file("kandle.yaml", &config);
    let check = || finish(kandle().args(["check", "-c"]).arg(&file.path), b"");
    let line = |out: &str| {
        out.lines().find(|line| line.contains("output schema")).unwrap_or_else(|| panic!("{out}")).to_owned()
    };

    let (code, out, _) = check();
    assert_eq!(code, 0, "{out}");
    assert!(line(&out).contains("not in the registry yet"), "{out}");
    assert_eq!(registry.get("/subjects"), json!([]), "check has registered something");

    // A reader of the new schema could not read what was written with this one: it has no score.
    let other = json!({ "type": "record", "name": "TextClassification", "namespace": "kandle", "fields": [
        { "name": "label", "type": "string" },
    ] });
    registry.register(&subject, "AVRO", &other.to_string(), &[]);
    registry.compatibility(&subject, "BACKWARD");
    let (code, out, _) = check();
    assert_eq!(code, 1, "{out}");
    let line = line(&out);
    assert!(line.starts_with("FAIL") && line.contains("not compatible"), "{line}");

    let mut daemon = Daemon::start(&config);
    assert_eq!(daemon.wait().code(), Some(1));
    let log = daemon.log();
    assert!(log.contains(&subject) && log.contains("status 409") && log.contains("Incompatible"), "{log}");
    assert_eq!(registry.get(&format!("/subjects/{subject}/versions")), json!([1]));
}

#[test]
fn without_auto_register_the_schema_must_be_there() {
    let registry = Registry::start();
    for format in FORMATS {
        let place = Place::new("lookup", 1);
        let subject = format!("{}-kandle.TextClassification", place.output);
        let output = format!("{{ topic: {}, format: {format}, subject: topic_record }}", place.output);
        let of_registry = format!("{{ url: \"{}\", auto_register: false }}", registry.url);
        let config = place.config(&[("output", &output), ("registry", &of_registry)]);
        let mut daemon = Daemon::start(&config);
        assert_eq!(daemon.wait().code(), Some(1));
        let log = daemon.log();
        assert!(log.contains(&subject) && log.contains("kandle config schema --output"), "{log}");

        let file = file("kandle.yaml", &config);
        let arguments = ["config", "schema", "--output", "-c"];
        let (code, schema, log) = finish(kandle().args(arguments).arg(&file.path), b"");
        assert_eq!(code, 0, "{log}");
        let kind = ["AVRO", "PROTOBUF", "JSON"][FORMATS.iter().position(|f| *f == format).expect("known")];
        let id = registry.register(&subject, kind, &schema, &[]);
        place.produce([Sent::ticket(0, 1, "Where is my package?")]);
        let mut daemon = Daemon::start(&config);
        let got = place.predictions(1);
        daemon.stop();
        assert_eq!(got[0].value.as_deref().expect("a value")[..5], [&[0], &id.to_be_bytes()[..]].concat());
    }
}

const INPUT: &str = r#"{"type":"record","name":"Ticket","fields":[
    {"name":"text","type":"string"}, {"name":"id","type":"int"}, {"name":"vip","type":["null","boolean"]},
    {"name":"price","type":{"type":"bytes","logicalType":"decimal","precision":9,"scale":2}},
    {"name":"counts","type":{"type":"array","items":"int"}}, {"name":"by","type":{"type":"record","name":"By",
    "fields":[{"name":"rank","type":"float"}]}}
]}"#;

/// A record of [`INPUT`]; `vip`: null or true.
fn ticket(id: u8, vip: bool) -> Vec<u8> {
    let text = "Where is my package?";
    let vip = if vip { &[2, 1][..] } else { &[0] };
    // Small numbers are their doubles; the price is 12.34, the rank 0.5.
    [&[text.len() as u8 * 2], text.as_bytes(), &[id * 2], vip, &[4, 0x04, 0xd2, 4, 2, 4, 0], &[0, 0, 0, 0x3f]]
        .concat()
}

/// A job that reads [`INPUT`] from the registry and includes its fields.
fn typed(place: &Place, registry: &Registry, format: &str, include: &str) -> String {
    let input = "{ topics: [$INPUT], group: $GROUP, format: avro, field: /text }";
    let output = format!("{{ topic: $OUTPUT, format: {format}, include: [{include}] }}");
    let registry = format!("{{ url: \"{}\" }}", registry.url);
    place.config(&[("input", input), ("output", &output), ("registry", &registry)])
}

const INCLUDE: &str = "/id, /vip, /price, /counts, /by/rank, /by, /counts/0";

/// The included fields of `ticket(7, …)` as a format's decoder shows them. Decoders leave nulls out.
fn included(format: &str, vip: bool) -> Value {
    let long = |number: i64| if format == "protobuf" { json!(number.to_string()) } else { json!(number) };
    let text = |json: &str| {
        if format == "json_schema" { serde_json::from_str(json).expect("JSON") } else { json!(json) }
    };
    let mut want = json!({
        "id": long(7), "price": text("12.34"), "counts": [long(1), long(2)], "rank": 0.5, "by": text(r#"{"rank":0.5}"#),
        "0": long(1),
    });
    if vip || format == "json_schema" {
        want["vip"] = if vip { json!(true) } else { Value::Null };
    }
    want
}

/// A prediction without the task's own fields.
fn without_task(registry: &Registry, format: &str, got: &Got) -> Value {
    let mut value = prediction(registry, format, got);
    let members = value.as_object_mut().expect("an object");
    ["label", "score", "scores"].iter().for_each(|own| drop(members.remove(*own).expect("a field")));
    value
}

#[test]
fn included_fields_have_the_types_of_the_input() {
    let registry = Registry::start();
    for format in FORMATS {
        let place = Place::new("typed", 1);
        let id = registry.register(&format!("{}-value", place.input), "AVRO", INPUT, &[]);
        place.produce([true, false].map(|vip| Sent::new(0, framed(id, &ticket(7, vip)))));
        let config = typed(&place, &registry, format, INCLUDE);
        let mut daemon = Daemon::start(&config);
        let got = place.predictions(2);
        daemon.stop();
        for (got, vip) in got.iter().zip([true, false]) {
            let (value, want) = (without_task(&registry, format, got), included(format, vip));
            assert!(same(&value, &want), "{format}:\n{value}\nis not\n{want}");
        }
        // What `config schema` prints is what was registered.
        let file = file("kandle.yaml", &config);
        let arguments = ["config", "schema", "--output", "-c"];
        let (code, schema, log) = finish(kandle().args(arguments).arg(&file.path), b"");
        assert_eq!(code, 0, "{log}");
        let kind = ["AVRO", "PROTOBUF", "JSON"][FORMATS.iter().position(|f| *f == format).expect("known")];
        let subject = format!("{}-value", place.output);
        let registered = registry.get(&format!("/subjects/{subject}/versions/latest"))["schema"].clone();
        let registered = registered.as_str().expect("a schema");
        let parsed = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
        match kind {
            "PROTOBUF" => assert_eq!(registered.trim(), schema.trim()),
            _ => assert_eq!(parsed(registered), parsed(&schema), "{format}"),
        }
        assert_eq!(registry.get(&format!("/subjects/{subject}/versions")), json!([1]), "{format}");

        // A promotion in the input's schema changes nothing; one more field is a compatible change.
        registry.compatibility(&subject, "BACKWARD");
        let promoted = INPUT.replace("\"int\"", "\"long\"").replace("\"float\"", "\"double\"");
        registry.register(&format!("{}-value", place.input), "AVRO", &promoted, &[]);
        let check = |include: &str| {
            let file = support::file("kandle.yaml", &typed(&place, &registry, format, include));
            let (code, out, _) = finish(kandle().args(["check", "-c"]).arg(&file.path), b"");
            assert_eq!(code, 0, "{out}");
            out.lines().find(|line| line.contains("output schema")).expect("a line").to_owned()
        };
        let line = check(INCLUDE);
        assert!(line.starts_with("ok") && line.contains("is in the registry"), "{format}: {line}");
        let line = check(&format!("{INCLUDE}, /text"));
        assert!(line.starts_with("ok") && line.contains("it is compatible"), "{format}: {line}");
    }
}

/// A subject with texts keeps them: an upgrade, or a schema that comes late, must not stop the job.
#[test]
fn a_subject_that_has_texts_keeps_them() {
    let registry = Registry::start();
    for format in FORMATS {
        let place = Place::new("texts", 1);
        let id = registry.register(&format!("{}-elsewhere", place.input), "AVRO", INPUT, &[]);
        let config = typed(&place, &registry, format, "/id");
        let mut daemon = Daemon::start(&config);
        place.produce([Sent::new(0, framed(id, &ticket(7, true)))]);
        let first = place.predictions(1).remove(0);
        daemon.stop();
        let subject = format!("{}-value", place.output);
        registry.compatibility(&subject, "BACKWARD");

        registry.register(&format!("{}-value", place.input), "AVRO", INPUT, &[]);
        let file = file("kandle.yaml", &config);
        let (code, out, _) = finish(kandle().args(["check", "-c"]).arg(&file.path), b"");
        assert_eq!(code, 0, "{out}");
        assert!(out.contains("the fields of output.include stay texts"), "{out}");
        let mut daemon = Daemon::start(&config);
        daemon.wait_log("so the fields stay texts");
        place.produce([Sent::new(0, framed(id, &ticket(7, true)))]);
        let second = place.predictions(2).remove(1);
        daemon.stop();
        let want = if format == "json_schema" { json!({ "id": 7 }) } else { json!({ "id": "7" }) };
        for got in [first, second] {
            assert_eq!(without_task(&registry, format, &got), want, "{format}");
        }
        assert_eq!(registry.get(&format!("/subjects/{subject}/versions")), json!([1]), "{format}");
    }
}

#[test]
fn a_registry_that_is_away_at_the_start_is_waited_for() {
    let mut registry = Registry::start();
    registry.kill();
    let place = Place::new("away", 1);
    place.produce([Sent::ticket(0, 1, "Where is my package?")]);
    let mut daemon = Daemon::start(&config(&place, &registry, "protobuf", &[]));
    daemon.wait_log("the schema registry is away");
    assert_eq!(daemon.get("/readyz").0, 503, "it is not ready before the schema is registered");
    registry.restart();
    let got = place.predictions(1);
    daemon.stop();
    assert_eq!(prediction(&registry, "protobuf", &got[0])["id"], "1");
}

/// A stop is not held up by a registry that never comes.
#[test]
fn a_stop_while_the_registry_is_away_ends_at_once() {
    let mut registry = Registry::start();
    registry.kill();
    let place = Place::new("away-stop", 1);
    let mut daemon = Daemon::start(&config(&place, &registry, "avro", &[]));
    daemon.wait_log("the schema registry is away");
    daemon.stop();
}
