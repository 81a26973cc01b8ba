//! `json_schema`: the JSON Schema of a prediction, in draft 7, which every registry knows.

use serde_json::{Map, Value, json};

use super::pretty;
use super::schema::{Record, Type};

/// The schema. It allows no other members, so that members which a later version adds are a compatible change: a
/// registry takes them for new ones, not for ones whose values might have had any type.
pub fn schema(record: &Record) -> String {
    let mut schema = json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": record.full_name(),
    });
    if let (Value::Object(schema), Value::Object(object)) = (&mut schema, object(record)) {
        schema.extend(object);
    }
    pretty(schema)
}

/// Appends a prediction, unchanged. It never fails.
pub fn encode(json: &[u8], _: &Record, out: &mut Vec<u8>) -> serde_json::Result<()> {
    out.extend_from_slice(json);
    Ok(())
}

fn object(record: &Record) -> Value {
    let property = |field: &super::schema::Field| {
        let mut property = of(&field.of);
        if field.is_included() {
            nullable(&mut property);
        }
        property["description"] = field.doc.clone().into();
        (field.name.clone(), property)
    };
    let properties: Map<String, Value> = record.fields.iter().map(property).collect();
    let required: Vec<&str> =
        record.fields.iter().filter(|field| !field.optional).map(|field| field.name.as_str()).collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

/// Allows null as well. A schema without a type allows it already.
fn nullable(schema: &mut Value) {
    let Some(of) = schema.get("type").cloned() else { return };
    let mut types = match of {
        Value::Array(types) => types,
        one => vec![one],
    };
    if !types.contains(&Value::from("null")) {
        types.push("null".into());
    }
    schema["type"] = types.into();
}

fn of(of: &Type) -> Value {
    match of {
        Type::Text => json!({ "type": "string" }),
        Type::Float => json!({ "type": "number" }),
        Type::Integer | Type::Long { quoted: false } => json!({ "type": "integer" }),
        Type::Boolean => json!({ "type": "boolean" }),
        Type::Long { quoted: true } => json!({ "type": "string" }),
        // What is not finite is a string or null.
        Type::Double { quoted: true } => json!({ "type": ["number", "string"] }),
        Type::Double { quoted: false } => json!({ "type": ["number", "null"] }),
        Type::List(of) => json!({ "type": "array", "items": self::of(of) }),
        Type::Map(of) => json!({ "type": "object", "additionalProperties": self::of(of) }),
        Type::Object(record) => object(record),
        Type::Json => json!({}),
    }
}
