//! Records whose schemas are in a registry: a real Kafka, a real registry, the daemon.

use crate::support;

use std::time::Duration;

use kandle::registry;
use kandle::settings::{self, Urls};
use serde_json::{Value, json};
use support::registry::{Registry, framed};
use support::{Daemon, Got, Place, Sent, file, finish, kandle, until};

const CUSTOMER: &str =
    r#"{"type":"record","name":"Customer","namespace":"shop","fields":[{"name":"name","type":"string"}]}"#;
const TICKET: &str = r#"{"type":"record","name":"Ticket","namespace":"shop","fields":[
    {"name":"id","type":"long"},
    {"name":"text","type":["null","string"]},
    {"name":"price","type":{"type":"bytes","logicalType":"decimal","precision":9,"scale":2}},
    {"name":"at","type":{"type":"long","logicalType":"timestamp-millis"}},
    {"name":"by","type":"shop.Customer"}
]}"#;

/// A number in Avro's encoding.
fn long(value: i64) -> Vec<u8> {
    let mut rest = (value << 1 ^ value >> 63) as u64;
    let mut bytes = Vec::new();
    while rest >= 0x80 {
        bytes.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    bytes.push(rest as u8);
    bytes
}

fn counted(bytes: &[u8]) -> Vec<u8> {
    [long(bytes.len() as i64), bytes.to_vec()].concat()
}

/// A ticket in Avro's encoding. `text` is the second type of its union.
fn avro_ticket(id: i64, text: &str) -> Vec<u8> {
    [
        long(id),
        long(1),
        counted(text.as_bytes()),
        counted(&[0x04, 0xd2]),
        long(1_769_860_800_123),
        counted(b"Ada"),
    ]
    .concat()
}

/// Registers the schema of [`avro_ticket`]; returns its id.
fn register_ticket(registry: &Registry, place: &Place) -> u32 {
    let customer = format!("{}-customer", place.input);
    registry.register(&customer, "AVRO", CUSTOMER, &[]);
    registry.register(&format!("{}-value", place.input), "AVRO", TICKET, &[("shop.Customer", &customer)])
}

fn config(place: &Place, registry: &Registry, format: &str, more: &[(&str, &str)]) -> String {
    let input = format!("{{ topics: [$INPUT], group: $GROUP, format: {format} }}");
    let url = format!("{{ url: \"{}\", unknown_id_grace: 1s, timeout: 2s }}", registry.url);
    let mut sections = vec![("input", input.as_str()), ("registry", url.as_str())];
    sections.retain(|(name, _)| more.iter().all(|(other, _)| other != name));
    sections.extend_from_slice(more);
    place.config(&sections)
}

fn labels(predictions: &[Got]) -> Vec<(Value, Value)> {
    let mut labels: Vec<_> =
        predictions.iter().map(Got::json).map(|p| (p["id"].clone(), p["label"].clone())).collect();
    labels.sort_by_key(|(id, _)| id.to_string());
    labels
}

#[test]
fn the_client_fetches_registers_and_says_what_is_wrong() {
    let server = Registry::start();
    let client = |url: &[&str]| {
        let url = Urls(url.iter().map(|url| (*url).to_owned()).collect());
        let settings = settings::Registry { url, ..settings::Registry::default() };
        registry::Registry::new(&settings).expect("usable").expect("an address")
    };
    let customer = server.register("a-customer", "AVRO", CUSTOMER, &[]);
    let ticket = server.register("ticket", "AVRO", TICKET, &[("shop.Customer", "a-customer")]);
    // The first address refuses connections.
    let client_of_two = client(&["http://127.0.0.1:1", server.url.as_str()]);
    let schema = client_of_two.schema(ticket).expect("the schema");
    assert_eq!(schema.kind, registry::SchemaKind::Avro);
    assert_eq!(schema.references.len(), 1);
    assert_eq!(schema.references[0].0, "shop.Customer");
    assert_eq!(*schema.references[0].1, client_of_two.schema(customer).expect("the schema"));
    let latest = client_of_two.latest("ticket").expect("the latest version");
    assert_eq!((latest.id, latest.version), (ticket, 1));
    assert_eq!(latest, client_of_two.version("ticket", 1).expect("the version"));
    // Registering again returns the same id.
    let kind = registry::SchemaKind::Avro;
    let id = client_of_two.register("b", kind, CUSTOMER).expect("registered");
    assert_eq!(client_of_two.register("b", kind, CUSTOMER), Ok(id));
    assert_eq!(client_of_two.lookup("b", kind, CUSTOMER), Ok(id));

    let not_found = client_of_two.schema(4711).expect_err("no such id");
    assert!(matches!(not_found, registry::RegistryError::NotFound { .. }), "{not_found}");
    assert!(matches!(client_of_two.latest("none"), Err(registry::RegistryError::NotFound { .. })));
    assert!(matches!(
        client_of_two.lookup("b", kind, "\"string\""),
        Err(registry::RegistryError::NotFound { .. })
    ));
    let refused = client_of_two.register("b", kind, r#"{"type":"recor"}"#).expect_err("not a schema");
    assert!(matches!(refused, registry::RegistryError::Refused { status: 422, .. }), "{refused}");
    // Without the API's path, the answer is not of a registry: it says nothing about a schema.
    let base = server.url.split("/apis").next().expect("a host");
    for away in ["http://127.0.0.1:1", base] {
        let error = client(&[away]).schema(ticket).expect_err("no registry");
        assert!(matches!(error, registry::RegistryError::Away { .. }), "{error}");
    }
}

#[test]
fn avro_records_with_references_are_read() {
    let registry = Registry::start();
    let place = Place::new("avro", 2);
    let id = register_ticket(&registry, &place);
    let unknown = framed(id + 100, &avro_ticket(3, "x"));
    place.produce([
        Sent::new(0, framed(id, &avro_ticket(1, "My parcel never arrived"))),
        Sent::new(0, "{\"text\":\"plain JSON\"}"),
        Sent::new(0, framed(id, &[1, 2, 3])),
        Sent::new(1, unknown.clone()),
        Sent::new(1, framed(id, &avro_ticket(2, "My invoice is wrong"))),
    ]);
    let yaml = config(
        &place,
        &registry,
        "avro, field: /text",
        &[("output", "{ topic: $OUTPUT, include: [/id, /price, /at, /by/name, /by] }")],
    );
    let mut daemon = Daemon::start(&yaml);
    let predictions = place.predictions(2);
    assert_eq!(labels(&predictions), [(json!(1), json!("shipping")), (json!(2), json!("billing"))]);
    let text = String::from_utf8(predictions[0].value.clone().expect("a value")).expect("UTF-8");
    let included = r#""price":12.34,"at":"2026-01-31T12:00:00.123Z","name":"Ada","by":{"name":"Ada"}}"#;
    assert!(text.ends_with(included), "{text}");

    let mut dead = place.dead_letters(3);
    dead.sort_by_key(Got::source);
    assert!(dead.iter().all(|letter| letter.header("kandle-error") == Some("decode")));
    let message = |i: usize| dead[i].header("kandle-error-message").expect("a message").to_owned();
    assert!(message(0).contains("does not begin with a schema id"), "{}", message(0));
    assert!(
        message(1).contains("does not match its Avro schema: /by/name") || message(1).contains("/text"),
        "{}",
        message(1)
    );
    assert!(
        message(2).contains(&format!("schema id {}", id + 100)) && message(2).contains(&registry.url),
        "{}",
        message(2)
    );
    assert_eq!(dead[2].value.as_deref(), Some(unknown.as_slice()), "its bytes are unchanged");
    daemon.wait_log("unknown to the schema registry");
    daemon.stop();
}

#[test]
fn protobuf_records_are_read_with_a_template() {
    let registry = Registry::start();
    let place = Place::new("protobuf", 1);
    let person = "syntax = \"proto3\"; package common; message Person { string name = 1; }";
    let ticket = "syntax = \"proto3\"; package shop; import \"common/person.proto\"; message Other { int32 n = 1; } \
                  message Ticket { string title = 1; string body = 2; int64 id = 3; common.Person by = 4; }";
    let subject = format!("{}-person", place.input);
    registry.register(&subject, "PROTOBUF", person, &[]);
    let id = registry.register(
        &format!("{}-value", place.input),
        "PROTOBUF",
        ticket,
        &[("common/person.proto", &subject)],
    );
    let field = |number: u8, bytes: &[u8]| [&[number << 3 | 2, bytes.len() as u8], bytes].concat();
    let record = [
        // The second message of the file.
        vec![2, 2],
        field(1, b"Where is it?"),
        field(2, b"My parcel never arrived"),
        vec![3 << 3, 7],
        field(4, &field(1, b"Ada")),
    ]
    .concat();
    place.produce([Sent::new(0, framed(id, &record)), Sent::new(0, framed(id, &[2, 2, 1 << 3 | 2, 99]))]);
    let yaml = config(
        &place,
        &registry,
        "protobuf, template: \"{{ title }} {{ body }}\"",
        &[("output", "{ topic: $OUTPUT, include: [/id, /by/name] }")],
    );
    let mut daemon = Daemon::start(&yaml);
    let prediction = place.predictions(1).remove(0).json();
    assert_eq!(prediction["label"], "shipping");
    assert_eq!((&prediction["id"], &prediction["name"]), (&json!("7"), &json!("Ada")));
    let dead = place.dead_letters(1);
    let message = dead[0].header("kandle-error-message").expect("a message");
    assert!(message.contains("not a message shop.Ticket"), "{message}");
    daemon.stop();
}

#[test]
fn json_schema_records_are_validated() {
    let registry = Registry::start();
    let place = Place::new("json-schema", 1);
    let subject = format!("{}-text", place.input);
    registry.register(
        &subject,
        "JSON",
        r#"{"$schema":"http://json-schema.org/draft-07/schema#","type":"string","minLength":1}"#,
        &[],
    );
    let schema = r#"{"$schema":"http://json-schema.org/draft-07/schema#","type":"object","properties":{"text":{"$ref":"text.json"},"id":{"type":"integer"}},"required":["text"]}"#;
    let id = registry.register(&format!("{}-value", place.input), "JSON", schema, &[("text.json", &subject)]);
    place.produce([
        Sent::new(0, framed(id, br#"{"text":"My invoice is wrong","id":1.5}"#)),
        Sent::new(0, framed(id, br#"{"text":"My invoice is wrong","id":1}"#)),
        Sent::new(0, framed(id, br#"{"text":""}"#)),
        Sent::new(0, framed(id, b"{")),
    ]);
    let mut daemon = Daemon::start(&config(&place, &registry, "json_schema, field: /text", &[]));
    assert_eq!(labels(&place.predictions(1)), [(json!(1), json!("billing"))]);
    let mut dead = place.dead_letters(3);
    dead.sort_by_key(Got::source);
    let message = |i: usize| dead[i].header("kandle-error-message").expect("a message").to_owned();
    assert!(message(0).contains("\"/id\""), "{}", message(0));
    assert!(message(1).contains("\"/text\""), "{}", message(1));
    assert!(message(2).contains("not JSON"), "{}", message(2));
    daemon.stop();
}

#[test]
fn a_registry_that_is_killed_loses_no_record() {
    let mut registry = Registry::start();
    let place = Place::new("registry-killed", 1);
    let id = register_ticket(&registry, &place);
    let second = TICKET
        .replace("{\"name\":\"id\"", "{\"name\":\"extra\",\"type\":\"int\",\"default\":0},{\"name\":\"id\"");
    let register_second = |registry: &Registry| {
        let customer = format!("{}-customer", place.input);
        registry.register(&format!("{}-other", place.input), "AVRO", &second, &[("shop.Customer", &customer)])
    };
    let yaml = config(
        &place,
        &registry,
        "avro, field: /text",
        &[("server", "{ listen: \"127.0.0.1:0\", stall_after: 6s }"), ("batch", "{ timeout: 5s }")],
    );
    let yaml = yaml.replace("unknown_id_grace: 1s", "unknown_id_grace: 60s");
    let mut daemon = Daemon::start(&yaml);
    place.produce([Sent::new(0, framed(id, &avro_ticket(1, "My parcel never arrived")))]);
    place.predictions(1);

    registry.kill();
    // The id that the registry will give to the next schema.
    let new = id + 1;
    let with_extra = |id, text| [vec![0], avro_ticket(id, text)].concat();
    place.produce([
        Sent::new(0, framed(id, &avro_ticket(2, "My invoice is wrong"))),
        Sent::new(0, framed(new, &with_extra(3, "The app crashes"))),
    ]);
    daemon.wait_log("the schema registry gives no schemas");
    let retries = |daemon: &mut Daemon| {
        let (_, metrics) = daemon.get("/metrics");
        let line = metrics.lines().find(|line| line.starts_with("kandle_retries_total{cause=\"registry\"}"));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).expect("the metric")
    };
    // The delays between them add up to more than `stall_after`.
    let seen = retries(&mut daemon);
    until("more retries", || (retries(&mut daemon) > seen + 5).then_some(()));
    assert_eq!(daemon.get("/readyz").0, 200);
    assert_eq!(daemon.get("/livez").0, 200, "waiting for the registry is no stall");
    assert_eq!(
        place.committed(0).map(|(offset, _)| offset).unwrap_or(1),
        1,
        "nothing is committed past the wait"
    );

    // A stop while the registry is away ends at once, and commits nothing of what waits.
    let started = std::time::Instant::now();
    daemon.stop();
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert!(daemon.log().contains("read again by the next start"), "{}", daemon.log());
    assert_eq!(place.committed(0).map(|(offset, _)| offset), Some(1));

    let mut daemon = Daemon::start(&yaml);
    daemon.wait_log("the schema registry gives no schemas");
    registry.restart();
    // It answers before it has the schemas again: the grace bridges that.
    assert_eq!(register_ticket(&registry, &place), id);
    assert_eq!(register_second(&registry), new);
    let predictions = place.predictions(3);
    assert_eq!(
        labels(&predictions),
        [(json!(1), json!("shipping")), (json!(2), json!("billing")), (json!(3), json!("technical"))]
    );
    daemon.wait_log("the schema registry gives schemas again");
    let (_, metrics) = daemon.get("/metrics");
    assert!(metrics.contains("kandle_dead_letters_total{error=\"decode\"} 0"), "nothing is dead-lettered");
    daemon.stop();
}

#[test]
fn check_looks_up_what_is_selected_in_the_latest_schema() {
    let registry = Registry::start();
    let place = Place::new("schema-check", 1);
    let check = |format: &str, include: &str| {
        let output = format!("{{ topic: $OUTPUT, include: [{include}] }}");
        let yaml = config(&place, &registry, format, &[("output", &output)]);
        let config = file("kandle.yaml", &yaml);
        finish(kandle().args(["check", "-c"]).arg(&config.path), b"")
    };
    let (code, out, _) = check("avro, field: /text", "/id");
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("warn  schema of") && out.contains("no such subject"), "{out}");
    register_ticket(&registry, &place);
    let (code, out, _) = check("avro, field: /text", "/by/name");
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("version 1, schema id 2 has /text, /by/name"), "{out}");
    let (code, out, _) = check("avro, field: /txt", "/by/age");
    assert_eq!(code, 1, "{out}");
    assert!(out.contains("version 1, schema id 2 lacks /txt, /by/age"), "{out}");
    let (code, out, _) = check("protobuf, field: /text", "/id");
    assert_eq!(code, 1, "{out}");
    assert!(out.contains("is of type AVRO, not PROTOBUF"), "{out}");
}

#[test]
fn predict_reads_lines_in_base64_with_a_schema_file() {
    use base64::Engine;
    let schema =
        file("ticket.avsc", r#"{"type":"record","name":"T","fields":[{"name":"text","type":"string"}]}"#);
    let config = file(
        "kandle.yaml",
        &format!(
            "
kafka: {{ brokers: 'localhost:9092' }}
input: {{ topics: [in], group: g, format: avro, schema: '{}', field: /text }}
task: {{ kind: text-classification }}
model: {{ source: bundled }}
output: {{ topic: out }}
dead_letters: {{ topic: dead }}
log: {{ level: warn }}
",
            schema.path.display()
        ),
    );
    let text = b"My parcel\nnever arrived";
    let record = [&[text.len() as u8 * 2], &text[..]].concat();
    let line = base64::engine::general_purpose::STANDARD.encode(record);
    let (code, out, err) = finish(kandle().args(["predict", "-c"]).arg(&config.path), line.as_bytes());
    assert_eq!(code, 0, "{err}");
    assert_eq!(serde_json::from_str::<Value>(&out).expect("JSON")["label"], "shipping");
    let (code, _, err) = finish(kandle().args(["predict", "-c"]).arg(&config.path), b"{\"text\":\"x\"}");
    assert_eq!(code, 1);
    assert!(err.contains("line 1 is not base64"), "{err}");
}

#[test]
fn a_format_with_schemas_needs_a_registry_or_a_file() {
    let place = Place {
        brokers: "localhost:9092".to_owned(),
        input: "in".to_owned(),
        output: "out".to_owned(),
        dead: "dead".to_owned(),
        group: "g".to_owned(),
    };
    let of = |input: &str, registry: &str| {
        let input = format!("{{ topics: [in], group: g, field: /text, {input} }}");
        let yaml = place.config(&[("input", &input), ("registry", registry)]);
        let config = file("kandle.yaml", &yaml);
        finish(kandle().args(["config", "show", "-c"]).arg(&config.path), b"")
    };
    for format in ["avro", "protobuf", "json_schema"] {
        let (code, _, err) = of(&format!("format: {format}"), "{}");
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(&format!("registry.url: is required with input.format: {format}")), "{err}");
    }
    let (code, _, err) =
        of("format: json, schema: a.avsc, message: a.B", "{ url: [ftp://r, 'http://u:p@r'], cert: c }");
    assert_eq!(code, 2);
    for part in [
        "input.schema: has no effect",
        "input.message: has no effect",
        "ftp://r",
        "registry.cert: has no effect",
    ] {
        assert!(err.contains(part), "{part}: {err}");
    }
    assert!(!err.contains("u:p"), "{err}");
    let (code, out, err) =
        of("format: avro", "{ url: http://r, username: u, password: hunter2, cert: c.pem, key: plain-key }");
    assert_eq!(code, 0, "{err}");
    assert!(!out.contains("hunter2") && !out.contains("plain-key"), "{out}");
}
