//! `json_schema`: JSON documents that begin with a schema id, and are valid by that schema; with `input.schema`, plain
//! documents.
//!
//! A schema may refer to those that it names in the registry, and to nothing else: neither to the network nor to files.

use std::collections::HashMap;
use std::path::Path;

use jsonschema::{Retrieve, Uri, Validator};

use super::json::Json;
use super::schemas::{Compile, Planned, Plans, expect_kind, of_file};
use super::write::schema::Type;
use super::{
    DecoderError, Reader, SchemaEntry, SchemaError, SchemaFileError, Selected, Stopped, Value, Waiting,
};
use crate::record::{Fault, Raw, RecordError};
use crate::registry::{Schema, SchemaKind};
use crate::settings::{self, Settings};

/// Problems that a dead letter names.
const PROBLEMS: usize = 3;

/// The schemas that a schema refers to, by name.
struct References(HashMap<String, serde_json::Value>);

impl Retrieve for References {
    fn retrieve(
        &self,
        uri: &Uri<String>,
    ) -> Result<serde_json::Value, Box<dyn std::error::Error + Send + Sync>> {
        // A relative name has become absolute against the schema's own address.
        let uri = uri.as_str();
        let is = |name: &str| uri == name || uri.ends_with(&format!("/{name}"));
        let found = self
            .0
            .iter()
            .find(|(name, _)| uri == **name)
            .or_else(|| self.0.iter().find(|(name, _)| is(name)));
        match found {
            Some((_, schema)) => Ok(schema.clone()),
            None => Err(format!("{uri} is not among the schema's references in the registry").into()),
        }
    }
}

struct Compiler;

impl Compile for Compiler {
    type Plan = Validator;

    fn compile(&self, schema: &Schema) -> Result<Validator, SchemaError> {
        expect_kind(schema, SchemaKind::Json)?;
        let parse =
            |text: &str| serde_json::from_str(text).map_err(|e| SchemaError(format!("it is not JSON: {e}")));
        let mut references = HashMap::new();
        for (name, schema) in schema.all_references() {
            references.insert(name.to_owned(), parse(&schema.text)?);
        }
        let options = jsonschema::options().with_retriever(References(references));
        options.build(&parse(&schema.text)?).map_err(|e| SchemaError(e.to_string()))
    }

    fn compile_file(&self, path: &Path) -> Result<Validator, SchemaFileError> {
        Ok(self.compile(&of_file(SchemaKind::Json, path)?)?)
    }
}

pub(super) const SCHEMA: SchemaEntry = SchemaEntry { kind: SchemaKind::Json, types, types_of_file };

fn types(schema: &Schema, pointers: &[Vec<String>]) -> Result<Vec<Option<Type>>, SchemaError> {
    Compiler.compile(schema)?;
    let schema = serde_json::from_str(&schema.text).map_err(|e| SchemaError(e.to_string()))?;
    Ok(pointers.iter().map(|tokens| type_at(&schema, tokens)).collect())
}

fn types_of_file(
    input: &settings::Input,
    pointers: &[Vec<String>],
) -> Result<Vec<Option<Type>>, SchemaFileError> {
    Ok(types(&of_file(SchemaKind::Json, input.schema.as_deref().unwrap_or(Path::new("")))?, pointers)?)
}

/// The type that a schema gives a member; `None` if it names others but not this one. Of a schema that says nothing about
/// members here, nothing is known: any type.
fn type_at(schema: &serde_json::Value, tokens: &[String]) -> Option<Type> {
    let [first, rest @ ..] = tokens else { return Some(type_of(schema)) };
    let Some(schema) = schema.as_object() else { return Some(Type::Json) };
    if schema.contains_key("$ref") || schema.contains_key("patternProperties") {
        return Some(Type::Json);
    }
    if let Some(items) = schema.get("items")
        && first.parse::<usize>().is_ok()
    {
        return type_at(items, rest);
    }
    let alternatives =
        ["allOf", "anyOf", "oneOf"].iter().filter_map(|key| schema.get(*key)?.as_array()).flatten();
    let mut alternatives = alternatives.peekable();
    match schema.get("properties").and_then(|properties| properties.get(first)) {
        Some(member) => type_at(member, rest),
        // Another alternative may allow any value of the member.
        None if alternatives.peek().is_some() => {
            alternatives.any(|schema| type_at(schema, tokens).is_some()).then_some(Type::Json)
        }
        None => (!schema.contains_key("properties")).then_some(Type::Json),
    }
}

/// The type of the values that a schema allows, if `type` names one, or one and null.
fn type_of(schema: &serde_json::Value) -> Type {
    let types: Vec<&str> = match schema.get("type") {
        Some(serde_json::Value::String(one)) => vec![one],
        Some(serde_json::Value::Array(many)) => many.iter().filter_map(|of| of.as_str()).collect(),
        _ => Vec::new(),
    };
    let some: Vec<&str> = types.into_iter().filter(|of| *of != "null").collect();
    match some[..] {
        ["string"] => Type::Text,
        ["boolean"] => Type::Boolean,
        ["integer"] => Type::Long { quoted: false },
        ["number"] => Type::Double { quoted: false },
        ["array"] => match schema.get("items") {
            Some(items) if items.get("type").is_some_and(serde_json::Value::is_string) => {
                Type::of_scalars(Type::list, type_of(items))
            }
            _ => Type::Json,
        },
        _ => Type::Json,
    }
}

struct JsonSchema(Plans<Compiler>);

pub(super) fn reader(settings: &Settings, _: &Selected) -> Result<Box<dyn Reader>, DecoderError> {
    Ok(Box::new(JsonSchema(Plans::new(settings, Compiler)?)))
}

impl Reader for JsonSchema {
    fn read<'a>(&self, value: Raw<'a>) -> Result<Value<'a>, RecordError> {
        let Planned { plan, data, .. } = self.0.of(value)?;
        let document = Json.read(data.into())?;
        if let Value::Tree(tree) = &document {
            validate(&plan, tree.whole().get())?;
        }
        Ok(document)
    }

    fn fetch(&self, values: &mut dyn Iterator<Item = Raw<'_>>, waiting: &Waiting<'_>) -> Result<(), Stopped> {
        self.0.fetch(values, waiting)
    }
}

fn validate(validator: &Validator, json: &str) -> Result<(), RecordError> {
    let fault = |message: String| RecordError::new(Fault::Decode, message);
    let value = serde_json::from_str(json).map_err(|e| fault(format!("the value cannot be read: {e}")))?;
    // The messages do not have the value, which may be large or private.
    let place = |error: jsonschema::ValidationError<'_>| {
        format!("{:?}: {}", error.instance_path().to_string(), error.masked())
    };
    let problems: Vec<String> = validator.iter_errors(&value).take(PROBLEMS).map(place).collect();
    if problems.is_empty() {
        return Ok(());
    }
    Err(fault(format!("the value does not match its JSON Schema: {}", problems.join("; "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(text: &str, references: &[(&str, &str)]) -> Schema {
        let reference =
            |(name, text): &(&str, &str)| ((*name).to_owned(), Schema::new(SchemaKind::Json, *text).into());
        Schema {
            references: references.iter().map(reference).collect(),
            ..Schema::new(SchemaKind::Json, text)
        }
    }

    #[test]
    fn a_value_that_is_not_valid_says_where() {
        let schema = schema(
            r#"{"type":"object","properties":{"a":{"type":"object","properties":{"n":{"type":"integer"}}}}}"#,
            &[],
        );
        let validator = Compiler.compile(&schema).unwrap();
        assert_eq!(validate(&validator, r#"{"a":{"n":1}}"#), Ok(()));
        let error = validate(&validator, r#"{"a":{"n":"secret"}}"#).unwrap_err();
        assert_eq!(error.fault, Fault::Decode);
        assert!(error.message.contains("\"/a/n\"") && error.message.contains("integer"), "{error}");
        assert!(!error.message.contains("secret"), "{error}");
    }

    #[test]
    fn members_are_looked_up_in_the_schema() {
        let schema = schema(
            r#"{"properties":{"a":{"properties":{"b":{}}},"l":{"items":{"properties":{"x":{}}}},"any":{}},
                "anyOf":[{"properties":{"c":{}}}]}"#,
            &[],
        );
        for (pointer, there) in [
            ("/a/b", true),
            ("/a/x", false),
            ("/l/0/x", true),
            ("/l/0/y", false),
            ("/any/x", true),
            ("/c", true),
            ("/d", false),
        ] {
            let found = types(&schema, &[crate::codec::tokens(pointer)]).unwrap();
            assert_eq!(found[0].is_some(), there, "{pointer}");
        }
    }

    #[test]
    fn included_fields_have_types() {
        let schema = schema(
            r#"{"properties":{"i":{"type":"integer"},"n":{"type":["null","number"]},"s":{"type":"string"},
                "two":{"type":["string","integer"]},"l":{"type":"array","items":{"type":"boolean"}},
                "ln":{"type":"array","items":{"type":["integer","null"]}},"o":{"type":"object"},"any":{}},
                "anyOf":[{"properties":{"c":{"type":"integer"}}}]}"#,
            &[],
        );
        for (pointer, want) in [
            ("/i", Type::Long { quoted: false }),
            ("/n", Type::Double { quoted: false }),
            ("/s", Type::Text),
            ("/two", Type::Json),
            ("/l", Type::list(Type::Boolean)),
            ("/l/0", Type::Boolean),
            ("/ln", Type::Json),
            ("/o", Type::Json),
            ("/any", Type::Json),
            ("/c", Type::Json),
        ] {
            assert_eq!(types(&schema, &[crate::codec::tokens(pointer)]).unwrap(), [Some(want)], "{pointer}");
        }
    }

    #[test]
    fn references_come_from_the_registry_only() {
        let text = r##"{"type":"object","properties":{"a":{"$ref":"address.json#/$defs/city"}}}"##;
        let address = ("address.json", r#"{"$defs":{"city":{"type":"string"}}}"#);
        let validator = Compiler.compile(&schema(text, &[address])).unwrap();
        assert_eq!(validate(&validator, r#"{"a":"Kiel"}"#), Ok(()));
        assert!(validate(&validator, r#"{"a":1}"#).is_err());
        let absolute = r#"{"$id":"https://shop.example/order.json","$ref":"https://shop.example/a.json"}"#;
        let validator =
            Compiler.compile(&schema(absolute, &[("https://shop.example/a.json", r#"{"type":"string"}"#)]));
        assert!(validate(&validator.unwrap(), "1").is_err());
        for elsewhere in ["https://shop.example/b.json", "file:///etc/passwd"] {
            let text = format!(r#"{{"$ref":"{elsewhere}"}}"#);
            let error = Compiler.compile(&schema(&text, &[])).unwrap_err();
            assert!(error.to_string().contains("references in the registry"), "{error}");
        }
    }
}
