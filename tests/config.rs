//! Configuration as a user sees it: layers, problems, `config show`, `config schema`, default.yaml.

use crate::support;

use std::path::PathBuf;

use kandle::settings::{self, Loaded, Problem, Sources};
use serde_json::Value;
use support::{file, finish, kandle, root};

const MINIMAL: &str = "
kafka: { brokers: 'localhost:9092' }
input: { topics: [in], group: g, field: /text }
task: { kind: text-classification }
model: { source: bundled }
output: { topic: out }
dead_letters: { topic: dead }
";

fn load(files: &[PathBuf], set: &[&str], environment: &[(&str, &str)]) -> Result<Loaded, Vec<Problem>> {
    settings::load(&Sources {
        files: files.to_vec(),
        set: set.iter().map(|s| s.to_string()).collect(),
        environment: environment.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
    })
}

/// The problems of the minimal configuration with `more` merged over it, as text.
fn problems(more: &str) -> Vec<String> {
    let (base, over) = (file("base.yaml", MINIMAL), file("over.yaml", more));
    match load(&[base.path.clone(), over.path.clone()], &[], &[]) {
        Ok(_) => Vec::new(),
        Err(problems) => problems.iter().map(ToString::to_string).collect(),
    }
}

#[track_caller]
fn one_problem(more: &str, parts: &[&str]) {
    let problems = problems(more);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    for part in parts {
        assert!(problems[0].contains(part), "{part:?} is not in {:?}", problems[0]);
    }
}

/// Keys of a schema that hold a value, `section.key`. The keys below `shadow.model` and `shadow.task` are those of `model` and
/// `task`.
fn leaves(schema: &Value, key: &str, out: &mut Vec<(String, Value)>) {
    let is_another_section = ["shadow.model", "shadow.task"].contains(&key);
    match schema["properties"].as_object().filter(|_| !is_another_section) {
        None => out.push((key.to_owned(), schema.clone())),
        Some(properties) => {
            for (name, child) in properties {
                leaves(child, &if key.is_empty() { name.clone() } else { format!("{key}.{name}") }, out);
            }
        }
    }
}

#[test]
fn default_yaml_the_schema_and_the_struct_agree() {
    let path = root().join("config/default.yaml");
    let loaded = load(std::slice::from_ref(&path), &[], &[]).expect("default.yaml is a configuration");
    let text = std::fs::read_to_string(&path).expect("read");
    let mut keys = Vec::new();
    leaves(&settings::schema(), "", &mut keys);
    assert!(keys.len() > 35, "{keys:?}");
    for (key, schema) in &keys {
        // Every key of the schema is in the file, with a comment right above it.
        let name = key.rsplit('.').next().expect("a name");
        let lines: Vec<&str> = text.lines().collect();
        let section = key.split('.').next().expect("a section");
        let start =
            lines.iter().position(|l| *l == format!("{section}:")).unwrap_or_else(|| panic!("{section}:"));
        let at = lines[start..]
            .iter()
            .position(|l| l.starts_with(&format!("  {name}:")))
            .unwrap_or_else(|| panic!("{key} is not in default.yaml"));
        assert!(lines[start + at - 1].trim_start().starts_with('#'), "{key} has no comment");
        assert!(
            loaded.origins.keys().any(|k| k == key || k.starts_with(&format!("{key}.")))
                || schema["type"] == "object"
                || loaded
                    .shown
                    .pointer(&format!("/{}", key.replace('.', "/")))
                    .is_some_and(|v| v.is_null() || v == &serde_json::json!([])),
            "{key} is not set by default.yaml"
        );
        // Every key is described in the schema.
        assert!(schema["description"].is_string(), "{key} has no description");
        // The file shows the default of each key that has one.
        let value = loaded.shown.pointer(&format!("/{}", key.replace('.', "/"))).expect("a value");
        if let Some(default) = schema.get("default") {
            let examples = ["input.field", "model.source"];
            assert!(
                value == default || examples.contains(&key.as_str()),
                "{key}: {value} is not the default {default}"
            );
        } else {
            assert!(text.contains("Required"), "{key}");
            let comment: String = lines[start..start + at]
                .iter()
                .rev()
                .take_while(|l| l.trim_start().starts_with('#'))
                .copied()
                .collect();
            assert!(
                comment.contains("Required"),
                "{key} has no default, and its comment does not say Required"
            );
        }
    }
    // The file has no other keys: an unknown key would have been a problem. What the struct serializes
    // is what was loaded.
    let again = serde_json::to_value(&loaded.settings).expect("JSON");
    for (key, _) in &keys {
        let pointer = format!("/{}", key.replace('.', "/"));
        assert_eq!(again.pointer(&pointer), loaded.shown.pointer(&pointer), "{key}");
    }
}

#[test]
fn the_examples_are_valid_configurations() {
    for entry in std::fs::read_dir(root().join("config/examples")).expect("examples") {
        let path = entry.expect("an example").path();
        let variables = [
            ("KAFKA_PASSWORD", "x"),
            ("CONFLUENT_API_KEY", "x"),
            ("CONFLUENT_API_SECRET", "x"),
            ("EVENT_HUBS_CONNECTION_STRING", "Endpoint=sb://namespace/;SharedAccessKey=a+b/c="),
        ];
        let read = load(std::slice::from_ref(&path), &[], &variables);
        if path.ends_with("msk-iam.yaml") && !cfg!(feature = "msk-iam") {
            let problems = read.expect_err("a mechanism that this build lacks");
            assert!(problems[0].to_string().contains("cargo feature msk-iam"), "{problems:#?}");
        } else if let Err(problems) = read {
            panic!("{}: {problems:#?}", path.display());
        } else if path.ends_with("event-hubs.yaml") {
            let properties = read.expect("a configuration").settings.kafka.properties;
            assert_eq!(properties["sasl.username"].0, "$ConnectionString");
        }
    }
}

#[test]
fn later_layers_win_and_origins_are_known() {
    let (first, second) = (
        file("first.yaml", &format!("{MINIMAL}\nwindow: {{ max_records: 10, max_bytes: 1MiB }}")),
        file("second.toml", "[window]\nmax_records = 20\nmax_wait = \"1s\"\n"),
    );
    let loaded = load(
        &[first.path.clone(), second.path.clone()],
        &["window.max_wait=3s", "kafka.properties.client.rack=a,b"],
        &[
            ("KANDLE__WINDOW__MAX_WAIT", "2s"),
            ("KANDLE__INPUT__TOPICS", "x,y"),
            ("KANDLE__INPUT__GROUP", "123"),
            ("KANDLE__KAFKA__PROPERTIES__SASL_USERNAME", "me"),
            ("KANDLE__SERVER__LISTEN", "127.0.0.1:1"),
        ],
    )
    .expect("a configuration");
    let s = &loaded.settings;
    assert_eq!((s.window.max_records, s.window.max_bytes.to_string().as_str()), (20, "1MiB"));
    assert_eq!(s.window.max_wait.to_string(), "3s");
    assert_eq!((s.input.topics.join("+"), s.input.group.as_str()), ("x+y".to_owned(), "123"));
    assert_eq!(s.kafka.properties["client.rack"].0, "a,b");
    assert_eq!(s.kafka.properties["sasl.username"].0, "me");
    assert!(loaded.origins["window.max_records"].contains("second.toml"));
    assert!(loaded.origins["window.max_bytes"].contains("first.yaml"));
    assert_eq!(loaded.origins["window.max_wait"], "--set window.max_wait");
    assert_eq!(loaded.origins["server.listen"], "environment variable KANDLE__SERVER__LISTEN");
    assert!(!loaded.origins.contains_key("batch.max_tokens"));
    let lists = load(std::slice::from_ref(&first.path), &["input.topics=[\"a\", \"b\"]"], &[]);
    assert_eq!(lists.expect("a configuration").settings.input.topics, ["a", "b"]);
    let problems =
        load(std::slice::from_ref(&first.path), &["input.topics=[x]"], &[]).expect_err("a problem");
    let problem = problems[0].to_string();
    assert!(problems.len() == 1 && problem.contains("write a,b or [\"a\",\"b\"]"), "{problems:#?}");
}

#[test]
fn all_problems_at_once_each_with_its_key_and_origin() {
    let base = file(
        "base.yaml",
        "
kafka: { properties: { enable.auto.commit: true, nonsense: 1 } }
input: { topics: [in], gruop: g, format: jsn, start: 7 }
window: { max_records: 0, max_wait: soon }
task: { kind: text-classificaton }
output: { topic: 'bad name', partition: sauce }
delivery: { guarantee: exactly_onse }
batch: { max_token: 5 }
",
    );
    let problems =
        load(std::slice::from_ref(&base.path), &["memory.limit=1MiB"], &[("KANDLE__LOG__LEVEL", "loud")])
            .expect_err("problems");
    let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
    for (key, parts) in [
        ("kafka.brokers", &["is required"][..]),
        ("kafka.properties.enable.auto.commit", &["managed by kandle"]),
        ("kafka.properties.nonsense", &["nonsense", "base.yaml"]),
        ("input.gruop", &["did you mean input.group?", "base.yaml"]),
        ("input.group", &["is required"]),
        ("input.format", &["did you mean json?", "allowed: json, text, bytes"]),
        ("input.start", &["7", "allowed: earliest, latest"]),
        ("window.max_records", &["0"]),
        ("window.max_wait", &["soon", "200ms"]),
        ("task.kind", &["did you mean text-classification?"]),
        ("model.source", &["is required"]),
        ("output.topic", &["bad name"]),
        ("output.partition", &["did you mean source?", "allowed: key, source"]),
        ("dead_letters.topic", &["is required"]),
        ("delivery.guarantee", &["did you mean exactly_once?", "allowed: at_least_once, exactly_once"]),
        ("batch.max_token", &["did you mean batch.max_tokens?"]),
        ("memory.limit", &["1MiB", "--set memory.limit"]),
        ("log.level", &["loud", "KANDLE__LOG__LEVEL"]),
    ] {
        let line = lines
            .iter()
            .find(|l| l.starts_with(&format!("{key}: ")))
            .unwrap_or_else(|| panic!("no problem with {key}: {lines:#?}"));
        for part in parts {
            assert!(line.contains(part), "{part:?} is not in {line:?}");
        }
    }
}

#[test]
fn rules_between_keys() {
    assert!(problems("").is_empty());
    one_problem("input: { field: null }", &["input.field", "needs a field or a template"]);
    one_problem("input: { template: '{{ x }}' }", &["input.template", "instead of input.field"]);
    one_problem("input: { field: null, template: '{{ x' }", &["input.template", "not a valid template"]);
    one_problem("input: { field: text }", &["input.field", "JSON Pointer; did you mean /text?"]);
    one_problem("input: { format: text }", &["input.field", "has no effect with input.format: text"]);
    one_problem("input: { topics: [out] }", &["output.topic", "would read what it wrote"]);
    one_problem("input: { topics: [] }", &["input.topics"]);
    one_problem("input: { topics: [a, b, a] }", &["input.topics", "a is named twice"]);
    one_problem("input: { topics: ['^o.*'] }", &["output.topic", "would read what it wrote"]);
    one_problem("input: { topics: ['^(a'] }", &["input.topics", "not a valid pattern"]);
    one_problem("input: { topics: ['a b'] }", &["input.topics", "not a valid topic name"]);
    one_problem("input: { topics: ['^a.*', b] }", &["input.topics", "not both"]);
    one_problem("dead_letters: { topic: out }", &["dead_letters.topic", "the same as output.topic"]);
    one_problem("output: { include: [/a/label] }", &["output.include", "already has a field \"label\""]);
    one_problem("output: { include: [/a/id, /b/id] }", &["output.include", "already has a field \"id\""]);
    one_problem("task: { kind: similarity }", &["task.candidates", "needs a file"]);
    let source = |more: &str| format!("model: {{ source: org/name, refresh: 5m{more} }}");
    assert!(problems(&source("")).is_empty() && problems(&source(", revision: production")).is_empty());
    one_problem(&source(", on_change: refuse"), &["model.refresh", "model.on_change: refuse, which forbids"]);
    one_problem(
        &source(&format!(", digest: {}", "a".repeat(64))),
        &["model.refresh", "which pins one version"],
    );
    one_problem(&source(&format!(", revision: {}", "a".repeat(40))), &["model.refresh", "is a commit"]);
    one_problem("model: { refresh: 5m }", &["model.refresh", "has no effect with a bundled model"]);
    one_problem("model: { source: org/name, refresh: 0s }", &["model.refresh", "is zero"]);
    one_problem("task: { candidates: x }", &["task.candidates", "has no effect"]);
    one_problem("task: { kind: text-embedding, top_k: 2 }", &["task.top_k", "has no effect"]);
    one_problem(
        "task: { kind: text-embedding, prompt: a, prompt_name: b }",
        &["task.prompt_name", "has no effect with prompt: set one of them"],
    );
    one_problem(
        "task: { kind: similarity, candidates: x.npy, candidates_prompt: a }",
        &["task.candidates_prompt", "vectors already"],
    );
    one_problem(
        "task: { kind: similarity, candidates: x.jsonl, candidates_ids: y }",
        &["task.candidates_ids", "have their ids"],
    );
    one_problem(
        "task: { kind: similarity, candidates: x, candidates_prompt: a, candidates_prompt_name: b }",
        &["task.candidates_prompt_name", "has no effect with candidates_prompt"],
    );
    one_problem("task: { prompt: a }", &["task.prompt", "has no effect with task.kind: text-classification"]);
    one_problem("task: { kind: text-embedding, dimensions: 0 }", &["task.dimensions"]);
    one_problem("task: { kind: text-embedding, encoding: int4 }", &["task.encoding"]);
    one_problem("task: { kind: text-embedding, ranges: x }", &["task.ranges", "without encoding: int8"]);
    one_problem("task: { kind: text-embedding, stride: 3 }", &["task.stride", "without overflow: chunk"]);
    one_problem("task: { chunk_scores: max }", &["task.chunk_scores", "without overflow: chunk"]);
    one_problem("task: { kind: noop }", &["model.source", "noop runs no model"]);
    for key in ["cache: 1MiB", "overflow: dead_letter"] {
        let name = key.split(':').next().expect("a key");
        let noop = format!("task: {{ kind: noop, {key} }}\nmodel: {{ source: null }}");
        one_problem(&noop, &[&format!("task.{name}"), "has no effect with task.kind: noop"]);
    }
    one_problem(
        "task: { kind: reranking, documents: /d, overflow: chunk }",
        &["task.overflow", "allowed: truncate, dead_letter"],
    );
    one_problem(
        "task: { kind: text-embedding, chunk_scores: max }",
        &["task.chunk_scores", "text-embedding"],
    );
    one_problem("task: { kind: reranking }", &["task.documents", "needs a JSON Pointer"]);
    one_problem(
        "task: { kind: reranking, documents: docs }",
        &["task.documents", "not a JSON Pointer; did you mean /docs?"],
    );
    one_problem(
        "task: { kind: reranking, documents: /d }\ninput: { format: text, field: null }",
        &["task.documents", "needs one of input.format: json, avro, protobuf, json_schema; not text"],
    );
    let zero_shot = |keys: &str| format!("task: {{ kind: zero-shot-classification, {keys} }}");
    one_problem(&zero_shot("top_k: 2"), &["task.labels", "needs labels, or labels_field"]);
    one_problem(
        &zero_shot("labels: [a], labels_field: /l"),
        &["task.labels_field", "instead of task.labels"],
    );
    one_problem(&zero_shot("labels: [a, b, a]"), &["task.labels", "\"a\" is named twice"]);
    one_problem(&zero_shot("labels: [a], hypothesis: so"), &["task.hypothesis", "has no {}"]);
    assert!(problems(&zero_shot("labels: [a], multi_label: true, overflow: dead_letter")).is_empty());
    one_problem(
        "task: { kind: token-classification, overflow: truncate, stride: 4 }",
        &["task.stride", "no effect"],
    );
    assert!(problems("task: { kind: token-classification, aggregation: first, stride: 4 }").is_empty());
    assert!(problems("task: { kind: text-embedding }\noutput: { include: [/label] }").is_empty());
    one_problem("model: { device: gpu }", &["model.device", "auto, cpu, cuda"]);
    one_problem("server: { listen: here }", &["server.listen", "address:port"]);
    one_problem("server: { cert: a.pem }", &["server.cert", "without server.key"]);
    one_problem("server: { key: a.pem }", &["server.key", "without server.cert"]);
    one_problem("server: { token: ' ' }", &["server.token", "is empty"]);
    one_problem(
        "server: { cert: a.pem, key: '-----BEGIN PRIVATE KEY-----' }",
        &["server.key", "not its text"],
    );
    one_problem("window: { max_bytes: 512MiB }", &["memory.limit", "eight windows"]);
    one_problem("max_records: 5", &["max_records", "did you mean window.max_records?"]);
    one_problem("batch: { timeout: 10m }", &["batch.timeout", "not less than server.stall_after 5m"]);
    one_problem("delivery: { transactional_id: x }", &["delivery.transactional_id", "has no effect"]);
    let exactly_once = "delivery: { guarantee: exactly_once }\n";
    assert!(problems(exactly_once).is_empty());
    one_problem(
        &format!("{exactly_once}output: {{ properties: {{ transaction.timeout.ms: 5000 }} }}"),
        &["output.properties", "less than a transaction may last, 10000 ms"],
    );
    one_problem(
        &format!("{exactly_once}input: {{ properties: {{ isolation.level: read_uncommitted }} }}"),
        &["input.properties", "isolation.level must be read_committed"],
    );
    one_problem("otel: { endpoint: 'localhost:4318' }", &["otel.endpoint", "http://localhost:4318"]);
    let night = "{ cron: '0 22 * * *', duration: 8h }";
    let more = ", outside: leave, unload_model: true, timezone: Europe/Berlin, finish_by: '06:00'";
    assert!(problems(&format!("schedule: {{ periods: [{night}]{more} }}")).is_empty());
    one_problem(
        "schedule: { periods: [{ cron: '0 0 30 2 *', duration: 1h }] }",
        &["schedule.periods.0.cron", "never matches"],
    );
    one_problem(
        "schedule: { periods: [{ cron: 'at night', duration: 1h }] }",
        &["schedule.periods.0.cron", "not a valid cron expression"],
    );
    one_problem("schedule: { timezone: Berlin }", &["schedule.timezone", "not an IANA time zone"]);
    one_problem("schedule: { finish_by: 6am }", &["schedule.finish_by", "not a time of day"]);
    one_problem("schedule: { outside: leave }", &["schedule.outside", "without schedule.periods"]);
    one_problem(
        &format!("schedule: {{ periods: [{night}], unload_model: true }}"),
        &["schedule.unload_model", "needs outside: leave"],
    );
    one_problem(
        "kafka: { properties: { sasl.password: '${env:NOT_SET}' } }",
        &["kafka.properties.sasl.password", "NOT_SET is not set"],
    );
    one_problem("kafka: { properties: { sasl.password: '${file:/no/such}' } }", &["/no/such"]);
}

#[test]
fn secrets_come_from_files_or_variables_and_are_not_shown() {
    let secret = file("secret", "hunter2\n");
    let config = file("kandle.yaml", &format!(
        "{MINIMAL}\nlog: {{ level: \"${{env:LEVEL}}\" }}\nbatch: {{ max_tokens: \"${{env:TOKENS}}\" }}\n"
    ).replace("kafka: { brokers: 'localhost:9092' }", &format!(
        "kafka: {{ brokers: 'localhost:9092', properties: {{ sasl.password: '${{file:{}}}', ssl.key.password: plain }} }}", secret.path.display()
    )));
    let loaded = load(std::slice::from_ref(&config.path), &[], &[("LEVEL", "warn"), ("TOKENS", "77")])
        .expect("a configuration");
    assert_eq!(loaded.settings.kafka.properties["sasl.password"].0, "hunter2");
    assert_eq!(loaded.settings.batch.max_tokens, 77);
    let (code, out, _) = finish(
        kandle().args(["config", "show", "-c"]).arg(&config.path).env("LEVEL", "warn").env("TOKENS", "77"),
        b"",
    );
    assert_eq!(code, 0);
    assert!(
        !out.contains("hunter2") && !out.contains("plain") && out.matches("<hidden>").count() >= 3,
        "{out}"
    );
}

#[test]
fn properties_keep_their_text_and_secrets_of_any_type_are_hidden() {
    let config = file(
        "kandle.yaml",
        &MINIMAL.replace(
            "kafka: { brokers: 'localhost:9092' }",
            "kafka: { brokers: 'localhost:9092', properties: { sasl.password: 0123456, ssl.key.password: 1e5,
               sasl.oauthbearer.config: 12, client.rack: 1.10 } }",
        ),
    );
    let more = file("more.toml", "output.properties.\"ssl.keystore.password\" = 0x10\n");
    let loaded = load(&[config.path.clone(), more.path.clone()], &[], &[]).expect("a configuration");
    let kafka = &loaded.settings.kafka.properties;
    assert_eq!((kafka["sasl.password"].0.as_str(), kafka["client.rack"].0.as_str()), ("0123456", "1.10"));
    assert_eq!(loaded.settings.output.properties["ssl.keystore.password"].0, "0x10");
    let shown = loaded.shown.to_string();
    for secret in ["123456", "1e5", "100000", ":12", "\"12\"", "0x10", "16}"] {
        assert!(!shown.contains(secret), "{secret} is in {shown}");
    }
    assert!(shown.contains("1.10") && shown.matches("<hidden>").count() == 4, "{shown}");
    // No problem quotes a secret.
    for more in [
        "kafka: { properties: { sasl: { password: hunter2 } } }\nmodel: { token: [hunter2] }\n",
        "kafka: { properties: 'sasl.password=hunter2' }\ninput: { start: 7 }\n",
        "kafka: { properties: { sasl.jaas.config: 'password=hunter2', ssl.truststore.password: hunter2 } }\n",
        "kafka: { properties: { sasl.pasword: hunter2, Ssl.Password: hunter2 } }\n",
        "kafka: { properties: { sasl.password: '${env:OPEN hunter2', ssl.key.password: '${env:A hunter2} b' } }\n",
    ] {
        let problems = problems(more);
        assert!(problems.len() == 2 && !problems.join("").contains("hunter2"), "{problems:#?}");
    }
    let refused = |set: &[&str], environment: &[(&str, &str)]| {
        let problems = load(std::slice::from_ref(&config.path), set, environment).expect_err("problems");
        let text = problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        assert!(!text.contains("hunter2"), "{text}");
        text
    };
    let object = r#"{"sasl.password":"hunter2"}"#;
    assert!(refused(&[], &[("KANDLE__KAFKA__PROPERTIES", object)]).contains("is a section"));
    assert!(refused(&[&format!("kafka.properties={object}")], &[]).contains("is a section"));
    assert!(refused(&["kafka.properties.sasl.password:hunter2"], &[]).contains("expected section.key=value"));
    refused(&["input.topics=${env:T}"], &[("T", "[hunter2")]);
    let toml = file("broken.toml", "[kafka.properties]\n\"sasl.password\" = hunter2\n");
    let problems = load(std::slice::from_ref(&toml.path), &[], &[]).expect_err("a problem");
    let problem = problems[0].to_string();
    assert!(problem.contains("broken.toml: line 2: ") && !problem.contains("hunter2"), "{problem}");
    // The value of an environment variable is taken literally.
    let variable = [("KANDLE__KAFKA__PROPERTIES__SASL_PASSWORD", "pa$$word")];
    let loaded = load(std::slice::from_ref(&config.path), &[], &variable).expect("a configuration");
    assert_eq!(loaded.settings.kafka.properties["sasl.password"].0, "pa$$word");
}

#[test]
fn a_problem_with_a_property_hides_no_other_problem() {
    let problems = problems(
        "kafka: { properties: { sasl.password: '${env:NOT_SET}' } }\ninput: { topics: [out] }\nwindow: { max_records: 0 }\n",
    );
    assert_eq!(problems.len(), 3, "{problems:#?}");
    one_problem("kafka.properties: { client.id: 0123 }", &["kafka.properties is not a section"]);
    one_problem(
        "kafka: { properties: { sasl.mechanism: PLAIN } }\noutput: { properties: { sasl.mechanisms: PLAIN } }",
        &[
            "output.properties.sasl.mechanisms",
            "same property as sasl.mechanism, which kafka.properties sets",
        ],
    );
    one_problem(
        "output: { properties: { delivery.report.only.error: true } }",
        &["output.properties.delivery.report.only.error", "managed by kandle"],
    );
}

#[test]
fn dollar_signs_can_be_escaped() {
    let dollars = "
input: { field: null, template: '{{ t }} costs ${{ price }} of $100' }
kafka: { properties: { sasl.username: 'a${b}c', client.rack: '$${env:HOME} $$ ${env:RACK}', client.id: '$$$$' } }
";
    let (base, over) = (file("base.yaml", MINIMAL), file("over.yaml", dollars));
    let files = [base.path.clone(), over.path.clone()];
    let loaded = load(&files, &["input.group=$$x"], &[("RACK", "$$1")]).expect("a configuration");
    let kafka = &loaded.settings.kafka.properties;
    assert_eq!(loaded.settings.input.template.as_deref(), Some("{{ t }} costs ${{ price }} of $100"));
    assert_eq!(kafka["sasl.username"].0, "a${b}c");
    assert_eq!(kafka["client.rack"].0, "${env:HOME} $ $$1");
    assert_eq!((kafka["client.id"].0.as_str(), loaded.settings.input.group.as_str()), ("$$", "$x"));
    // The output of `config show` reads back as the same configuration.
    let (code, out, _) = finish(
        kandle().args(["config", "show", "-c"]).args([&files[0]]).arg("-c").arg(&files[1]).env("RACK", "r"),
        b"",
    );
    assert_eq!(code, 0);
    let shown = file("shown.yaml", &out);
    let again = load(std::slice::from_ref(&shown.path), &[], &[]).expect("what is shown is a configuration");
    assert_eq!(again.settings.kafka.properties["client.id"].0, "$$");
    assert_eq!(again.settings.input.template, loaded.settings.input.template);
    // A problem is reported once.
    one_problem("window: { max_records: '${env:NOT_SET}' }", &["window.max_records", "NOT_SET is not set"]);
    one_problem("input: { group: '${env:OPEN' }", &["input.group", "has no }"]);
}

#[test]
fn security_settings_that_the_build_lacks_are_refused() {
    let sasl = |more: &str| format!("kafka: {{ properties: {{ security.protocol: sasl_ssl{more} }} }}");
    // GSSAPI is librdkafka's default mechanism.
    one_problem(&sasl(""), &["kafka.properties.security.protocol", "GSSAPI"]);
    one_problem(&sasl(", sasl.mechanism: GSSAPI"), &["kafka.properties.sasl.mechanism", "GSSAPI"]);
    one_problem(&sasl(", sasl.mechanisms: PLAIN"), &["kafka.properties.sasl.mechanisms", "sasl.username"]);
    if !cfg!(feature = "kerberos") {
        one_problem(&sasl(", sasl.mechanism: GSSAPI"), &["cargo feature kerberos"]);
    }
    if !cfg!(feature = "msk-iam") {
        let iam = "kafka: { properties: { sasl.mechanism: AWS_MSK_IAM } }";
        one_problem(iam, &["kafka.properties.sasl.mechanism", "cargo feature msk-iam"]);
    }
    let oidc = ", sasl.mechanism: OAUTHBEARER, sasl.oauthbearer.method: oidc";
    one_problem(
        &sasl(oidc),
        &["kafka.properties.sasl.oauthbearer.method", "needs sasl.oauthbearer.client.id"],
    );
    one_problem(&sasl(", sasl.mechanism: OAUTHBEARER"), &["kafka.properties.sasl.mechanism", "needs"]);
    let whole = format!(
        "{oidc}, sasl.oauthbearer.client.id: me, sasl.oauthbearer.token.endpoint.url: 'https://idp/token'"
    );
    let secret = ", sasl.oauthbearer.client.secret: s";
    assert!(problems(&sasl(&format!("{whole}{secret}"))).is_empty(), "{:?}", problems(&sasl(&whole)));
    // The consumer's and the producer's own properties complete it, each for its client.
    let own = format!("{}\ninput: {{ properties: {{ sasl.oauthbearer.client.secret: s }} }}", sasl(&whole));
    one_problem(&own, &["sasl.oauthbearer.method", "needs sasl.oauthbearer.client.secret"]);
    one_problem(
        &sasl(&format!("{whole}{secret}, sasl.oauthbearer.assertion.file: /x")),
        &["kafka.properties.sasl.oauthbearer.assertion.file", "not supported in this build"],
    );
    let scram = ", sasl.mechanism: SCRAM-SHA-512, sasl.username: u, sasl.password: p";
    assert!(problems(&sasl(scram)).is_empty(), "{:?}", problems(&sasl(scram)));
    let other = format!("{}\noutput: {{ properties: {{ sasl.mechanism: GSSAPI }} }}", sasl(scram));
    one_problem(&other, &["output.properties.sasl.mechanism", "GSSAPI"]);
}

#[test]
fn config_show_prints_yaml_that_reads_back_the_same() {
    let config = file("kandle.yaml", MINIMAL);
    let (code, out, _) = finish(
        kandle().args(["config", "show", "-c"]).arg(&config.path).args(["--set", "log.level=debug"]),
        b"",
    );
    assert_eq!(code, 0);
    assert!(
        out.lines()
            .any(|l| l.trim_start().starts_with("level: \"debug\"") && l.ends_with("# --set log.level")),
        "{out}"
    );
    assert!(
        out.lines().any(|l| l.trim_start().starts_with("max_records: 1024") && l.ends_with("# default")),
        "{out}"
    );
    assert!(
        out.lines().any(|l| l.trim_start().starts_with("group: \"g\"") && l.contains("kandle.yaml")),
        "{out}"
    );
    let shown = file("shown.yaml", &out);
    let again = load(std::slice::from_ref(&shown.path), &[], &[]).expect("what is shown is a configuration");
    let first = load(std::slice::from_ref(&config.path), &["log.level=debug"], &[]).expect("a configuration");
    assert_eq!(again.shown, first.shown);
}

#[test]
fn exit_codes() {
    let config = file("kandle.yaml", &format!("{MINIMAL}\nwindw: {{}}\n"));
    for command in [["run", "-c"], ["check", "-c"], ["predict", "-c"]] {
        let (code, out, err) = finish(kandle().args(command).arg(&config.path), b"");
        assert_eq!(code, 2, "{out}{err}");
        assert!(
            err.contains("1 problem") && err.contains("windw: unknown key; did you mean window?"),
            "{err}"
        );
    }
    let (code, _, err) = finish(kandle().args(["run", "-c", "/no/such.yaml"]), b"");
    assert_eq!(code, 2);
    assert!(err.contains("/no/such.yaml: no such file"), "{err}");
    let broken = file("broken.yaml", "a: [1,\nb: 2");
    let (code, _, err) = finish(kandle().args(["run", "-c"]).arg(&broken.path), b"");
    assert_eq!(code, 2);
    assert!(err.contains("broken.yaml"), "{err}");
    assert_eq!(finish(kandle().arg("rnu"), b"").0, 2);
    let (code, out, _) = finish(kandle().args(["config", "schema"]), b"");
    assert_eq!(code, 0);
    assert_eq!(serde_json::from_str::<Value>(&out).expect("JSON"), settings::schema());
}

#[test]
fn help_names_every_command() {
    let (code, out, _) = finish(kandle().arg("--help"), b"");
    assert_eq!(code, 0);
    for command in ["run", "check", "predict", "model", "config", "bench", "demo", "Exit codes"] {
        assert!(out.contains(command), "{out}");
    }
}
