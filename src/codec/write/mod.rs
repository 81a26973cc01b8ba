//! Encodes predictions. A task writes its prediction as a JSON object; `output.format` says what becomes of it:
//!
//! ```text
//! json          the JSON
//! json_schema   frame ─▶ the JSON
//! avro          frame ─▶ Avro's binary encoding    ┐ by a walk over the JSON
//! protobuf      frame ─▶ Protobuf's encoding       ┘ along the fields of the task table
//! ```
//!
//! The frame is that of Confluent's serializers: a zero byte, the schema's id in the registry as four bytes, the most
//! significant first, and for Protobuf the path of the message in its file, which is one zero byte for the first message.

mod avro;
mod included;
mod json_schema;
mod protobuf;
pub mod schema;
mod transcode;

use std::sync::{Arc, OnceLock};

pub use included::{TypesError, typed};
pub use schema::Record;

use crate::record::{Fault, RecordError};
use crate::registry::SchemaKind;
use crate::settings::{OutputFormat, Settings, SubjectName};

/// Adds members (`,"name":value`…) to the JSON object at the end of `out`.
pub fn include(members: &str, out: &mut Vec<u8>) {
    if !members.is_empty() {
        out.pop();
        out.extend_from_slice(members.as_bytes());
        out.push(b'}');
    }
}

/// A value of `output.format`.
pub struct OutputEntry {
    pub format: OutputFormat,
    pub name: &'static str,
    /// Language of the schema in the registry; `None`: predictions have no schema id.
    pub kind: Option<SchemaKind>,
    /// The schema of predictions, as text.
    pub schema: fn(&Record) -> String,
    /// Appends what follows the schema id: the prediction that the JSON holds.
    encode: fn(&[u8], &Record, &mut Vec<u8>) -> serde_json::Result<()>,
}

/// All formats of predictions. To add one, add a file here, a line in this table and a value of [`OutputFormat`].
#[rustfmt::skip]
pub const OUTPUTS: &[OutputEntry] = &[
    OutputEntry { format: OutputFormat::Json, name: "json", kind: None, schema: json_schema::schema, encode: json_schema::encode },
    OutputEntry { format: OutputFormat::Avro, name: "avro", kind: Some(SchemaKind::Avro), schema: avro::schema, encode: avro::encode },
    OutputEntry { format: OutputFormat::Protobuf, name: "protobuf", kind: Some(SchemaKind::Protobuf), schema: protobuf::schema, encode: protobuf::encode },
    OutputEntry { format: OutputFormat::JsonSchema, name: "json_schema", kind: Some(SchemaKind::Json), schema: json_schema::schema, encode: json_schema::encode },
];

impl OutputEntry {
    /// The entry of a format.
    pub fn of(format: OutputFormat) -> &'static Self {
        OUTPUTS
            .iter()
            .find(|entry| entry.format == format)
            .expect("a unit test finds every format in the table")
    }
}

/// Encodes the predictions of one task. Clones share the schema.
#[derive(Debug, Clone)]
pub struct Writer {
    format: OutputFormat,
    /// What predictions consist of, and the id of its schema in the registry.
    schema: Arc<OnceLock<(Record, u32)>>,
}

impl Writer {
    pub fn new(settings: &Settings) -> Self {
        Self { format: settings.output.format, schema: Arc::default() }
    }

    /// From now on, predictions are written in `output.format`, by this record, with the id of its schema. Until then
    /// they stay JSON, as `kandle predict` prints them. Only the first call has an effect.
    pub fn set_schema(&self, record: Record, id: u32) {
        // Windows in flight were encoded with the first one.
        let _ = self.schema.set((record, id));
    }

    /// Writes as `before` does, which is of another version of the model: the schema depends on the task, not on the model.
    pub fn continue_from(&self, before: &Self) {
        if let Some((record, id)) = before.schema.get() {
            self.set_schema(record.clone(), *id);
        }
    }

    /// How to encode predictions; `None`: they are published as the task writes them.
    pub fn encoding(&self) -> Option<Encoding<'_>> {
        let ((record, id), entry) = (self.schema.get()?, OutputEntry::of(self.format));
        entry.kind.map(|_| Encoding { entry, record, id: *id })
    }
}

/// An encoding other than plain JSON.
#[derive(Clone, Copy)]
pub struct Encoding<'a> {
    entry: &'static OutputEntry,
    record: &'a Record,
    id: u32,
}

impl Encoding<'_> {
    /// Appends the frame and the prediction that `json` holds.
    ///
    /// # Errors
    /// The format cannot hold the prediction. What was appended must be discarded.
    pub fn write(&self, json: &[u8], out: &mut Vec<u8>) -> Result<(), RecordError> {
        out.push(0);
        out.extend_from_slice(&self.id.to_be_bytes());
        (self.entry.encode)(json, self.record, out).map_err(|error| {
            let name = self.entry.name;
            RecordError::new(
                Fault::Encode,
                format!("output.format: {name} cannot hold the prediction: {error}"),
            )
        })
    }
}

/// The schema of the settings' predictions, as text that a registry takes. That of `json` is its JSON Schema.
pub fn schema_text(format: OutputFormat, record: &Record) -> String {
    (OutputEntry::of(format).schema)(record)
}

fn pretty(schema: serde_json::Value) -> String {
    serde_json::to_string_pretty(&schema).expect("a JSON value can be written as text")
}

/// The subject under which the registry has the schema.
pub fn subject(settings: &Settings, record: &Record) -> String {
    let (topic, name) = (&settings.output.topic, record.full_name());
    match settings.output.subject {
        SubjectName::Topic => format!("{topic}-value"),
        SubjectName::Record => name,
        SubjectName::TopicRecord => format!("{topic}-{name}"),
    }
}

/// Problems of the settings that say how predictions are written: keys and messages.
pub fn problems(settings: &Settings) -> Vec<(&'static str, String)> {
    let output = &settings.output;
    let mut problems = Vec::new();
    let name = OutputEntry::of(output.format).name;
    if output.format == OutputFormat::Json {
        if output.subject != SubjectName::default() {
            let message = "has no effect with output.format: json, which has no schema in a registry";
            problems.push(("output.subject", message.to_owned()));
        }
        return problems;
    }
    if settings.registry.url.0.is_empty() {
        let message = format!("is required for output.format: {name}, such as http://registry:8081");
        problems.push(("registry.url", message));
    }
    let record = Record::of(settings);
    if record.fields.is_empty() {
        let message = format!(
            "{name} has no effect with task.kind: {}, which publishes the value unchanged",
            settings.task.kind.name()
        );
        problems.push(("output.format", message));
    }
    if output.format != OutputFormat::JsonSchema
        && let Some((one, other)) = record.clash()
    {
        let message = format!(
            "{one:?} and {other:?} would be one field in {name}, where both are {:?}",
            schema::identifier(other)
        );
        problems.push(("output.include", message));
    }
    problems
}

/// Appends a number in base 128, the least significant digit first (LEB128): what Avro and Protobuf call a varint.
fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Puts bytes before what begins at `at`.
fn insert(out: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = out.len();
    out.resize(end + bytes.len(), 0);
    out.copy_within(at..end, at + bytes.len());
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::schema::{Field, Type};
    use super::*;

    fn record() -> Record {
        let fields = vec![
            Field::new(1, "label", Type::Text, ""),
            Field::new(2, "score", Type::Float, ""),
            Field::new(3, "scores", Type::map(Type::Float), ""),
            Field::new(4, "counts", Type::list(Type::Integer), ""),
            Field::new(5, "id", Type::Json, "").optional(),
            Field::new(6, "tokens", Type::list(Type::Text), "").optional(),
            Field::new(7, "found", Type::objects("Found", vec![Field::new(1, "at", Type::Integer, "")]), ""),
            Field::new(8, "lists", Type::map(Type::list(Type::Float)), "").optional(),
        ];
        Record { name: "X".to_owned(), fields }
    }

    fn written(format: OutputFormat, json: &str) -> Result<Vec<u8>, String> {
        let writer = Writer { format, schema: Arc::new(OnceLock::from((record(), 7))) };
        let mut out = vec![9];
        let encoding = writer.encoding().unwrap();
        encoding.write(json.as_bytes(), &mut out).map_err(|error| error.message)?;
        assert_eq!(out[..6], [9, 0, 0, 0, 0, 7], "the frame follows what was there");
        Ok(out.split_off(6))
    }

    const FULL: &str = r#"{"label":"a","score":0.5,"scores":{"a":0.5},"counts":[1,-2],"id":"x","tokens":["y"],"found":[{"at":300},{"at":0}],"lists":{"a":[0.5],"b":[]}}"#;
    const LEAST: &str = r#"{"label":"","score":0,"scores":{},"counts":[],"found":[]}"#;

    #[test]
    fn every_format_is_in_the_table_under_its_name() {
        let schema = serde_json::to_value(schemars::schema_for!(OutputFormat)).unwrap();
        let names: Vec<&str> = schema["enum"].as_array().unwrap().iter().filter_map(|v| v.as_str()).collect();
        assert_eq!(names, OUTPUTS.iter().map(|entry| entry.name).collect::<Vec<_>>());
        for entry in OUTPUTS {
            assert_eq!(serde_json::to_value(entry.format).unwrap(), entry.name);
        }
    }

    /// By hand, after the specification.
    #[test]
    fn avro_is_as_specified() {
        let full: &[&[u8]] = &[
            b"\x02a",                         // label: length 1
            b"\x00\x00\x00\x3f",              // score
            b"\x02\x02a\x00\x00\x00\x3f\x00", // scores: one entry, the end
            b"\x04\x02\x03\x00",              // counts: two items, 1, -2, the end
            b"\x02\x02x",                     // id: the second branch
            b"\x02\x02\x02y\x00",             // tokens
            b"\x04\xd8\x04\x00\x00",          // found: 300 is 600 in zigzag
            // lists: the second branch, two entries, each with its items and their end
            b"\x02\x04\x02a\x02\x00\x00\x00\x3f\x00\x02b\x00\x00",
        ];
        assert_eq!(written(OutputFormat::Avro, FULL).unwrap(), full.concat());
        let least = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(written(OutputFormat::Avro, LEAST).unwrap(), least);
    }

    #[test]
    fn protobuf_is_as_specified() {
        let full: &[&[u8]] = &[
            b"\x00", // the first message
            b"\x0a\x01a",
            b"\x15\x00\x00\x00\x3f",
            b"\x1a\x08\x0a\x01a\x15\x00\x00\x00\x3f",
            b"\x22\x0b\x01\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01", // packed
            b"\x2a\x01x",
            b"\x32\x01y",
            b"\x3a\x03\x08\xac\x02\x3a\x00", // the second object has only defaults
            b"\x42\x0b\x0a\x01a\x12\x06\x0a\x04\x00\x00\x00\x3f\x42\x05\x0a\x01b\x12\x00",
        ];
        assert_eq!(written(OutputFormat::Protobuf, FULL).unwrap(), full.concat());
        assert_eq!(written(OutputFormat::Protobuf, LEAST).unwrap(), [0]);
    }

    #[test]
    fn json_is_framed_unchanged() {
        assert_eq!(written(OutputFormat::JsonSchema, FULL).unwrap(), FULL.as_bytes());
        let writer = Writer { format: OutputFormat::Avro, schema: Arc::default() };
        assert!(writer.encoding().is_none(), "there is no encoding before the schema has an id");
    }

    /// What `output.include` copies: any JSON, with escapes and all digits.
    #[test]
    fn values_without_a_type_become_texts() {
        let cases = [
            (r#""x\u00e9\n""#, Some("x\u{e9}\n")),
            (r#""""#, Some("")),
            ("123456789012345678901.10", Some("123456789012345678901.10")),
            (r#"{ "a" : ["b", 1.0] }"#, Some(r#"{ "a" : ["b", 1.0] }"#)),
            ("true", Some("true")),
            ("null", None),
        ];
        for (value, want) in cases {
            let json =
                format!(r#"{{"label":"","score":0,"scores":{{}},"counts":[],"id":{value},"found":[]}}"#);
            let got = written(OutputFormat::Avro, &json).unwrap();
            let mut text = vec![0; 7];
            match want {
                None => text.push(0),
                Some(want) => {
                    text.extend([2, 2 * want.len() as u8]);
                    text.extend(want.as_bytes());
                }
            }
            text.extend([0, 0, 0]);
            assert_eq!(got, text, "{value}");
            let protobuf = written(OutputFormat::Protobuf, &json).unwrap();
            assert_eq!(protobuf.len(), 1 + want.map_or(0, |want| 2 + want.len()), "{value}");
        }
    }

    /// Included fields with the types of the input's schema, by hand, after the specifications.
    #[test]
    fn included_fields_have_the_types_of_the_input() {
        let (long, double) = (Type::Long { quoted: false }, Type::Double { quoted: true });
        let fields = vec![
            Field::new(1, "a", long.clone(), "").optional(),
            Field::new(2, "b", double.clone(), "").optional(),
            Field::new(3, "c", Type::Boolean, "").optional(),
            Field::new(4, "d", Type::list(long), "").optional(),
            Field::new(5, "e", Type::map(double), "").optional(),
        ];
        let record = Record { name: "X".to_owned(), fields };
        let written = |format, json: &str| {
            let writer = Writer { format, schema: Arc::new(OnceLock::from((record.clone(), 7))) };
            let mut out = Vec::new();
            let done = writer.encoding().unwrap().write(json.as_bytes(), &mut out);
            done.map(|()| out.split_off(5)).map_err(|error| error.message)
        };
        let json = r#"{"a":300.0,"b":"-Infinity","c":true,"d":[-1,"9223372036854775807"],"e":{"k":0.5}}"#;
        let avro: &[&[u8]] = &[
            b"\x02\xd8\x04",
            b"\x02\0\0\0\0\0\0\xf0\xff",
            b"\x02\x01",
            b"\x02\x04\x01\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00",
            b"\x02\x02\x02k\0\0\0\0\0\0\xe0\x3f\x00",
        ];
        assert_eq!(written(OutputFormat::Avro, json).unwrap(), avro.concat());
        let protobuf: &[&[u8]] = &[
            b"\x00",
            b"\x08\xac\x02",
            b"\x11\0\0\0\0\0\0\xf0\xff",
            b"\x18\x01",
            b"\x22\x13\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\x2a\x0c\x0a\x01k\x11\0\0\0\0\0\0\xe0\x3f",
        ];
        assert_eq!(written(OutputFormat::Protobuf, json).unwrap(), protobuf.concat());
        // Optional values are written even if they are 0; null and what is missing are not.
        assert_eq!(
            written(OutputFormat::Protobuf, r#"{"a":0,"b":0,"c":false,"d":[],"e":null}"#).unwrap(),
            [0, 8, 0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0]
        );
        assert_eq!(written(OutputFormat::Avro, r#"{"a":null}"#).unwrap(), [0; 5]);
        for (json, said) in [
            (r#"{"a":1.5}"#, "\"a\": is a number, not a 64-bit integer"),
            (r#"{"a":9223372036854775808}"#, "64-bit integer"),
            (r#"{"a":"x"}"#, "\"a\": is a string"),
            (r#"{"b":"x"}"#, "\"b\": is a string, not a number"),
            (r#"{"c":0}"#, "not a boolean"),
            (r#"{"d":[null]}"#, "null, not a 64-bit integer"),
        ] {
            let error = written(OutputFormat::Avro, json).unwrap_err();
            assert!(error.contains(said) && error.contains("input's schema"), "{json}: {error}");
        }
    }

    #[test]
    fn what_does_not_match_the_schema_is_refused() {
        let part = |json: &str| written(OutputFormat::Avro, json).unwrap_err();
        for (json, said) in [
            ("{}", "\"label\" is missing"),
            (r#"{"label":"a","scores":{}}"#, "\"score\" is missing"),
            (r#"{"label":"a","score":0,"label":"b"}"#, "\"label\" is not in the schema"),
            (r#"{"label":"a","score":null}"#, "null"),
            (r#"{"label":7}"#, "integer `7`"),
            (r#"{"label":"a","score":0,"scores":{},"counts":[2147483648]}"#, "2147483648"),
            (r#"{"label":"a","score":0,"scores":{},"counts":[],"id":"\ud800","found":[]}"#, "escape"),
        ] {
            let error = part(json);
            assert!(error.contains(said) && error.contains("output.format: avro"), "{json}: {error}");
        }
    }

    /// Subjects as Confluent's strategies name them.
    #[test]
    fn subjects() {
        let set = |subject: &str| {
            let set = [
                "kafka.brokers=none:1",
                "input.topics=in",
                "input.group=g",
                "input.field=/text",
                "task.kind=text-classification",
                "model.source=bundled",
                "output.topic=out",
                "output.format=avro",
                "registry.url=http://none:1",
                "dead_letters.topic=dead",
            ];
            let mut set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
            set.push(format!("output.subject={subject}"));
            let sources = crate::settings::Sources { set, ..Default::default() };
            crate::settings::load(&sources).unwrap().settings
        };
        for (strategy, want) in [
            ("topic", "out-value"),
            ("record", "kandle.TextClassification"),
            ("topic_record", "out-kandle.TextClassification"),
        ] {
            let settings = set(strategy);
            assert_eq!(subject(&settings, &Record::of(&settings)), want);
        }
    }
}
