//! Decodes predictions with other people's libraries, by the text of a schema.

#![allow(dead_code)] // Each test binary uses only part of it.

use apache_avro::reader::datum::GenericDatumReader;
use kandle::codec::write::schema::{Field, Record, Type};
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::{Map, Value};

/// The JSON of a value without its schema id. Without fields that are null.
pub fn decoded(format: &str, schema: &str, bytes: &[u8]) -> Value {
    let mut value = match format {
        "avro" => avro(schema, bytes),
        "protobuf" => {
            assert_eq!(bytes[0], 0, "the first message of the file");
            protobuf(schema, &bytes[1..])
        }
        _ => serde_json::from_slice(bytes).expect("JSON"),
    };
    if format != "json_schema" {
        drop_nulls(&mut value);
    }
    value
}

fn avro(schema: &str, mut bytes: &[u8]) -> Value {
    let schema = apache_avro::Schema::parse_str(schema).expect("an Avro schema");
    let reader = GenericDatumReader::builder(&schema).build().expect("a reader");
    let value = reader.read_value(&mut bytes).expect("a value of the schema");
    assert!(bytes.is_empty(), "{} bytes follow the value", bytes.len());
    value.try_into().expect("JSON")
}

fn protobuf(schema: &str, bytes: &[u8]) -> Value {
    let file = protox_parse(schema);
    let message = file.get_message_by_name(&first_message(schema)).expect("the message");
    let message = DynamicMessage::decode(message, bytes).expect("a message");
    assert_eq!(message.unknown_fields().count(), 0);
    let options = SerializeOptions::new().skip_default_fields(false);
    let mut value = message.serialize_with_options(serde_json::value::Serializer, &options).expect("JSON");
    unwrap_lists(&mut value);
    value
}

/// Protobuf's maps hold no lists, but messages with a list.
fn unwrap_lists(value: &mut Value) {
    match value {
        Value::Object(members) => match members.get_mut("items") {
            Some(items) if items.is_array() => *value = items.take(),
            _ => members.values_mut().for_each(unwrap_lists),
        },
        Value::Array(items) => items.iter_mut().for_each(unwrap_lists),
        _ => {}
    }
}

fn protox_parse(schema: &str) -> DescriptorPool {
    let mut compiler = protox::Compiler::with_file_resolver(One(schema.to_owned()));
    compiler.include_imports(true);
    compiler.open_file("kandle.proto").expect("a .proto file");
    compiler.descriptor_pool()
}

/// Resolves one file.
struct One(String);

impl protox::file::FileResolver for One {
    fn open_file(&self, name: &str) -> Result<protox::file::File, protox::Error> {
        match name {
            "kandle.proto" => protox::file::File::from_source(name, &self.0),
            _ => Err(protox::Error::file_not_found(name)),
        }
    }
}

/// The full name of the first message.
fn first_message(schema: &str) -> String {
    let line = schema.lines().find_map(|line| line.strip_prefix("message "));
    format!("kandle.{}", line.and_then(|line| line.split(' ').next()).expect("a message"))
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, value| !value.is_null());
            members.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// A prediction as Avro and Protobuf hold it: what has no type there is a text, and null is left out.
pub fn expected(record: &Record, prediction: &Value) -> Value {
    let mut members = Map::new();
    for field in &record.fields {
        let Some(value) = prediction.get(&field.name).filter(|value| !value.is_null()) else { continue };
        members.insert(field.name.clone(), of(&field.of, value));
    }
    let known = |name: &String| record.fields.iter().any(|field: &Field| field.name == *name);
    assert!(prediction.as_object().is_some_and(|members| members.keys().all(known)), "{prediction}");
    members.into()
}

fn of(of: &Type, value: &Value) -> Value {
    match (of, value) {
        (Type::Json, Value::String(_)) => value.clone(),
        (Type::Json, value) => value.to_string().into(),
        (Type::List(of), Value::Array(items)) => items.iter().map(|item| self::of(of, item)).collect(),
        (Type::Map(of), Value::Object(members)) => {
            members.iter().map(|(name, value)| (name.clone(), self::of(of, value))).collect()
        }
        (Type::Object(record), value) => expected(record, value),
        _ => value.clone(),
    }
}

/// Whether two values are equal, numbers as 32-bit floats. Avro's names stand for JSON's.
pub fn same(got: &Value, want: &Value) -> bool {
    match (got, want) {
        (Value::Object(got), Value::Object(want)) => {
            let member = |(name, want): (&String, &Value)| {
                let identifier = kandle::codec::write::schema::identifier(name);
                got.get(name).or_else(|| got.get(&identifier)).is_some_and(|got| same(got, want))
            };
            got.len() == want.len() && want.iter().all(member)
        }
        (Value::Array(got), Value::Array(want)) => {
            got.len() == want.len() && got.iter().zip(want).all(|(got, want)| same(got, want))
        }
        (Value::Number(got), Value::Number(want)) => {
            got.as_f64().map(|x| x as f32) == want.as_f64().map(|x| x as f32)
        }
        _ => got == want,
    }
}
