//! The schemas of predictions: what real models predict matches them, and comes back unchanged from every format. The
//! decoders are other people's. tests/fixtures/schemas has the schemas of each version; `KANDLE_WRITE=1` writes those of
//! this one.

use crate::support;
use crate::support::decode;
use crate::support::models;

use std::path::{Path, PathBuf};

use kandle::cli::demo::scenes::TABLE;
use kandle::codec::write::{self, Record, Writer};
use kandle::settings::{OutputFormat, Settings};
use kandle::task::Family;
use serde_json::{Value, json};

use decode::{decoded, expected, same};
use models::{copy, copy_of, fixture, load, predict, settings};
use support::registry::Registry;

/// A task on a small model, with records that bring out all of its fields.
struct Case {
    /// Of the files in a folder of tests/fixtures/schemas.
    name: &'static str,
    kind: &'static str,
    model: &'static str,
    set: Vec<String>,
    records: Vec<Value>,
}

const TEXT: &str = "Ada lives in Köln; the parcel 4711 has not arrived";

/// The first records of a file of JSON lines.
fn lines(file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).expect(file);
    text.lines().take(4).map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn cases() -> Vec<Case> {
    let case = |name, kind, model, set: &[&str], records: &[Value]| Case {
        name,
        kind,
        model,
        set: set.iter().map(|s| (*s).to_owned()).collect(),
        records: records.to_vec(),
    };
    let text = json!({ "text": TEXT });
    let texts = [text.clone(), json!({ "text": "" }), json!({ "text": "x" })];
    let texts = &texts[..];
    let included = [
        json!({ "text": TEXT, "id": "C-17\n\u{e9}", "who": { "na/me": { "first": "Ada" } }, "n": [1, 2.5], "camelCase": true }),
        json!({ "text": TEXT, "id": 17, "n": null, "snake_case": "x" }),
        text.clone(),
    ];
    let documents = json!({ "text": "late parcel", "documents": [
        "plain", { "id": "a\"b", "text": "the parcel is late" }, { "id": 7, "text": "invoice" }, { "id": null, "text": "z" },
    ] });
    let candidates = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/schemas/candidates.jsonl");
    let candidates = format!("task.candidates={}", candidates.display());
    let images = lines("demo/images.jsonl");
    let series = [json!({ "values": [1, 2, null, 4, 3] }), json!({ "values": [] })];
    vec![
        case(
            "tensor",
            "tensor",
            "onnx-network",
            &["input.field=null", "task.inputs.x=/x"],
            &[json!({ "x": [0, 1, 0.5, -1, 2, 0] }), json!({ "x": [1, 1, 1, 1, 1, 1] })],
        ),
        case(
            "tensor-classification",
            "tensor",
            "bundled:churn",
            &[&["input.field=null"], TABLE.set].concat(),
            &lines("demo/customers.jsonl"),
        ),
        case(
            "image-classification",
            "image-classification",
            "bundled:shapes",
            &["input.field=/image"],
            &images,
        ),
        case("image-embedding", "image-embedding", "bundled:shapes", &["input.field=/image"], &images),
        case("forecast", "forecast", "chronos-bolt", &["input.field=/values", "task.horizon=3"], &series),
        case("text-classification", "text-classification", "bundled", &[], texts),
        case(
            "text-classification-included",
            "text-classification",
            "bundled",
            &["task.top_k=2", "output.include=/id,/who/na~1me,/n,/camelCase,/snake_case,/none"],
            &included,
        ),
        case(
            "zero-shot-classification",
            "zero-shot-classification",
            "nli-bert",
            &["task.labels=late,invoice"],
            texts,
        ),
        case("token-classification", "token-classification", "tokens-bert", &[], texts),
        case(
            "token-classification-redacted",
            "token-classification",
            "tokens-bert",
            &["task.redact=true", "task.aggregation=max"],
            texts,
        ),
        case(
            "token-classification-gliner",
            "token-classification",
            "gliner-bert",
            &["task.labels=person,city", "task.threshold=0.01"],
            texts,
        ),
        case(
            "reranking",
            "reranking",
            "pairs-bert",
            &["task.documents=/documents"],
            &[documents, json!({ "text": "q", "documents": ["a"] }), json!({ "text": "q", "documents": [] })],
        ),
        case("text-embedding", "text-embedding", "bert", &[], texts),
        case("text-embedding-base64", "text-embedding", "bert", &["task.encoding=base64"], texts),
        case("text-embedding-ubinary", "text-embedding", "bert", &["task.encoding=ubinary"], texts),
        case("similarity", "similarity", "bert", &[&candidates, "task.top_k=2"], texts),
        case("sparse-embedding", "sparse-embedding", "sparse-bert", &["task.top_k=5"], texts),
        case("sparse-embedding-tokens", "sparse-embedding", "sparse-bert", &["task.tokens=true"], texts),
    ]
}

impl Case {
    fn settings(&self, format: &str) -> Settings {
        let mut set = self.set.clone();
        if format != "json" {
            set.extend([format!("output.format={format}"), "registry.url=http://none:1".to_owned()]);
        }
        settings(self.kind, &self.model(), &set)
    }

    fn model(&self) -> PathBuf {
        if self.model.starts_with("bundled") { self.model.into() } else { fixture(self.model) }
    }

    /// What the task predicts about each record, without the dead letters.
    fn predictions(&self) -> Vec<Value> {
        // A sentence model is the fixture with modules added to it.
        let sentences = copy_of("bert");
        copy(&fixture("sentences/dense"), sentences.path());
        let model = if self.model == "bert" { sentences.path().to_owned() } else { self.model() };
        let compute = load(self.kind, &model, &self.set).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        let all: Vec<Value> = predict(&*compute, &self.records).into_iter().filter_map(Result::ok).collect();
        assert!(!all.is_empty(), "{}: no record got a prediction", self.name);
        all
    }
}

/// What the task writes, whether the schema allows it, and whether it comes back.
#[test]
fn predictions_come_back_unchanged_from_every_format() {
    for case in cases() {
        let name = case.name;
        let predictions = case.predictions();
        let record = Record::of(&case.settings("json"));
        let schema = write::schema_text(OutputFormat::JsonSchema, &record);
        let schema: Value = serde_json::from_str(&schema).expect("JSON");
        let validator = jsonschema::validator_for(&schema).unwrap_or_else(|e| panic!("{name}: {e}"));
        for prediction in &predictions {
            if let Err(error) = validator.validate(prediction) {
                panic!("{name}: {prediction}: {error}");
            }
        }
        // A field that no prediction has would show nothing.
        for field in &record.fields {
            let shown = predictions.iter().any(|prediction| prediction.get(&field.name).is_some());
            assert!(shown || field.name == "none", "{name}: {}", field.name);
        }
        for (format, of) in FORMATS {
            let settings = case.settings(format);
            let writer = Writer::new(&settings);
            writer.set_schema(record.clone(), 0x0102_0304);
            let schema = write::schema_text(of, &record);
            for prediction in &predictions {
                let mut bytes = Vec::new();
                let json = prediction.to_string();
                writer.encoding().expect("a schema").write(json.as_bytes(), &mut bytes).expect(name);
                assert_eq!(bytes[..5], [0, 1, 2, 3, 4], "{name}");
                let got = decoded(format, &schema, &bytes[5..]);
                let want =
                    if format == "json_schema" { prediction.clone() } else { expected(&record, prediction) };
                assert!(same(&got, &want), "{name} in {format}:\n{got}\nis not\n{want}");
            }
        }
    }
}

const FORMATS: [(&str, OutputFormat); 3] = [
    ("avro", OutputFormat::Avro),
    ("protobuf", OutputFormat::Protobuf),
    ("json_schema", OutputFormat::JsonSchema),
];

impl Case {
    /// The schema of a format: its file's name and its text.
    fn schema(&self, format: OutputFormat) -> (String, String) {
        let extension = match format {
            OutputFormat::Avro => "avsc",
            OutputFormat::Protobuf => "proto",
            OutputFormat::Json | OutputFormat::JsonSchema => "json",
        };
        let text = write::schema_text(format, &Record::of(&self.settings("json")));
        (format!("{}.{extension}", self.name), text)
    }
}

/// A registry keeps a schema for ever, and its readers are made from it: a change must be seen in a review.
#[test]
fn schemas_are_those_of_this_version() {
    let folder = fixture("schemas").join(env!("CARGO_PKG_VERSION"));
    let mut changed = Vec::new();
    for case in cases() {
        for (_, format) in FORMATS {
            let (name, text) = case.schema(format);
            let path = folder.join(name);
            if std::env::var_os("KANDLE_WRITE").is_some() {
                std::fs::create_dir_all(&folder).expect("a folder");
                std::fs::write(&path, format!("{}\n", text.trim_end())).expect("written");
            }
            if std::fs::read_to_string(&path).unwrap_or_default().trim_end() != text.trim_end() {
                changed.push(path.display().to_string());
            }
        }
    }
    assert!(changed.is_empty(), "changed (KANDLE_WRITE=1 writes them): {}", changed.join(", "));
}

/// An upgrade must not stop at the registry: each version's schemas are registered, and then those of this build.
#[test]
fn a_registry_takes_the_schemas_after_those_of_earlier_versions() {
    let registry = Registry::start();
    let mut versions: Vec<PathBuf> = std::fs::read_dir(fixture("schemas"))
        .expect("a folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_dir())
        .collect();
    versions.sort();
    assert!(!versions.is_empty());
    for case in cases() {
        for ((_, format), kind) in FORMATS.into_iter().zip(["AVRO", "PROTOBUF", "JSON"]) {
            let (name, text) = case.schema(format);
            for version in &versions {
                // A case may be younger than a version.
                if let Ok(earlier) = std::fs::read_to_string(version.join(&name)) {
                    registry.register(&name, kind, &earlier, &[]);
                    registry.compatibility(&name, "BACKWARD_TRANSITIVE");
                }
            }
            registry.register(&name, kind, &text, &[]);
        }
    }
}

/// What makes a prediction richer is a compatible change: `output.include`, and the settings that add fields.
#[test]
fn a_registry_takes_schemas_with_more_fields() {
    let registry = Registry::start();
    let all = cases();
    let find = |name: &str| all.iter().find(|case| case.name == name).expect("a case");
    for (before, after) in [
        ("text-classification", "text-classification-included"),
        ("sparse-embedding", "sparse-embedding-tokens"),
        ("token-classification-redacted", "token-classification"),
    ] {
        for ((_, format), kind) in FORMATS.into_iter().zip(["AVRO", "PROTOBUF", "JSON"]) {
            // Also removes a field, which only Avro allows in every registry.
            if before == "token-classification-redacted" && kind != "AVRO" {
                continue;
            }
            let subject = format!("{after}-{kind}");
            registry.register(&subject, kind, &find(before).schema(format).1, &[]);
            registry.compatibility(&subject, "BACKWARD");
            registry.register(&subject, kind, &find(after).schema(format).1, &[]);
        }
    }
}

/// Every task has a case above, so that none can be added without its schemas.
#[test]
fn every_task_has_a_case() {
    for kind in kandle::task::KINDS.iter().filter(|kind| kind.family != Family::Nothing) {
        let name = kind.kind.name();
        assert!(cases().iter().any(|case| case.kind == name), "{name}");
    }
}
