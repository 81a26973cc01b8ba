//! `avro`: a prediction's Avro schema, and its binary encoding (Apache Avro 1.12, "Binary Encoding").

use serde_json::{Value, json};

use super::schema::{Field, NAMESPACE, Record, Type};
use super::transcode::{At, Encode, Mark, transcode};
use super::{insert, pretty, varint};

/// The schema, as JSON.
pub fn schema(record: &Record) -> String {
    let mut schema = object(record);
    schema["namespace"] = NAMESPACE.into();
    pretty(schema)
}

/// Appends a prediction.
///
/// # Errors
/// See [`transcode`].
pub fn encode(json: &[u8], record: &Record, out: &mut Vec<u8>) -> serde_json::Result<()> {
    transcode(json, record, &mut Avro(out))
}

fn object(record: &Record) -> Value {
    let fields: Vec<Value> = record.fields.iter().map(field).collect();
    json!({ "type": "record", "name": record.name, "fields": fields })
}

fn field(field: &Field) -> Value {
    let of = of(&field.of);
    match field.optional {
        true => json!({ "name": field.identifier, "type": ["null", of], "default": null, "doc": field.doc }),
        false => json!({ "name": field.identifier, "type": of, "doc": field.doc }),
    }
}

fn of(of: &Type) -> Value {
    match of {
        Type::Text | Type::Json => "string".into(),
        Type::Float => "float".into(),
        Type::Integer => "int".into(),
        Type::Boolean => "boolean".into(),
        Type::Long { .. } => "long".into(),
        Type::Double { .. } => "double".into(),
        Type::List(of) => json!({ "type": "array", "items": self::of(of) }),
        Type::Map(of) => json!({ "type": "map", "values": self::of(of) }),
        Type::Object(record) => object(record),
    }
}

/// Appends a prediction's values.
struct Avro<'a>(&'a mut Vec<u8>);

/// The second branch of `["null", …]`.
const PRESENT: u8 = 2;

impl Avro<'_> {
    /// `int` and `long`.
    fn number(&mut self, number: i64) {
        varint(zigzag(number), self.0);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as i64);
        self.0.extend_from_slice(bytes);
    }

    fn present(&mut self, at: At) {
        if let At::Optional(_) = at {
            self.0.push(PRESENT);
        }
    }

    fn begin(&mut self, at: At) -> Mark {
        self.present(at);
        self.0.len()
    }

    /// One block with all items, and the empty block that ends lists and maps. The count comes before the items, but is
    /// known only after them.
    fn end(&mut self, begin: Mark, count: usize) {
        if count > 0 {
            let mut before = Vec::with_capacity(10);
            varint(zigzag(count as i64), &mut before);
            insert(self.0, begin, &before);
        }
        self.0.push(0);
    }
}

/// Small negative numbers as small positive ones.
fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)) as u64
}

impl Encode for Avro<'_> {
    fn absent(&mut self) {
        self.0.push(0);
    }

    fn text(&mut self, at: At, text: &str) {
        self.present(at);
        self.bytes(text.as_bytes());
    }

    fn float(&mut self, at: At, number: f32) {
        self.present(at);
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn integer(&mut self, at: At, number: i32) {
        self.present(at);
        self.number(number.into());
    }

    fn boolean(&mut self, at: At, value: bool) {
        self.present(at);
        self.0.push(value.into());
    }

    fn long(&mut self, at: At, number: i64) {
        self.present(at);
        self.number(number);
    }

    fn double(&mut self, at: At, number: f64) {
        self.present(at);
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn begin_object(&mut self, at: At) -> Mark {
        self.begin(at)
    }

    fn end_object(&mut self, _: At, _: Mark) {}

    fn begin_list(&mut self, at: At) -> Mark {
        self.begin(at)
    }

    fn end_list(&mut self, _: At, begin: Mark, count: usize, _: &Type) {
        self.end(begin, count);
    }

    fn begin_map(&mut self, at: At) -> Mark {
        self.begin(at)
    }

    fn key(&mut self, key: &str) -> Mark {
        self.bytes(key.as_bytes());
        self.0.len()
    }

    fn end_entry(&mut self, _: At, _: Mark) {}

    fn end_map(&mut self, _: At, begin: Mark, count: usize) {
        self.end(begin, count);
    }
}
