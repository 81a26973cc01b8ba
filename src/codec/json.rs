//! `json`: the text is at one JSON Pointer (RFC 6901), at several, or made by a template.

use std::fmt::Write;

use minijinja::{Environment, UndefinedBehavior};
use serde_json::Value;

use super::{Decoder, Input};
use crate::record::{Fault, RecordError};
use crate::settings;

pub struct Json {
    text: TextFrom,
    /// Pointers to copy, each with its name in the prediction.
    include: Vec<(String, String)>,
}

enum TextFrom {
    Fields { pointers: Vec<String>, join: String },
    Template(Box<Template>),
}

/// A template over the fields of a JSON value; a field that is not there is an error.
pub struct Template(Environment<'static>);

impl Template {
    pub fn new(source: &str) -> Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.add_template_owned("input", source.to_owned())?;
        Ok(Self(environment))
    }

    fn render(&self, value: &Value) -> Result<String, minijinja::Error> {
        self.0.get_template("input")?.render(minijinja::value::Serde(value))
    }
}

/// The name that a pointer's value has in a prediction: its last reference token.
pub fn last_name(pointer: &str) -> String {
    pointer.rsplit('/').next().unwrap_or_default().replace("~1", "/").replace("~0", "~")
}

impl Json {
    pub fn new(input: &settings::Input, include: &[String]) -> Result<Self, minijinja::Error> {
        let text = match &input.template {
            Some(template) => TextFrom::Template(Box::new(Template::new(template)?)),
            None => TextFrom::Fields { pointers: input.field.0.clone(), join: input.join.clone() },
        };
        let include = include.iter().map(|pointer| (pointer.clone(), last_name(pointer))).collect();
        Ok(Self { text, include })
    }
}

impl Decoder for Json {
    fn decode<'a>(&self, bytes: &'a [u8]) -> Result<Input<'a>, RecordError> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|e| RecordError::new(Fault::Decode, format!("the value is not JSON: {e}")))?;
        let mut include = String::new();
        for (pointer, name) in &self.include {
            if let Some(found) = value.pointer(pointer) {
                // Writing to a String cannot fail.
                let _ = write!(include, ",{}:{found}", Value::from(name.as_str()));
            }
        }
        let text = match &self.text {
            TextFrom::Template(template) => template
                .render(&value)
                .map_err(|e| RecordError::new(Fault::Field, format!("input.template: {e}")))?,
            TextFrom::Fields { pointers, .. } if pointers.len() == 1 => take(value, &pointers[0])?,
            TextFrom::Fields { pointers, join } => {
                let mut text = String::new();
                for (i, pointer) in pointers.iter().enumerate() {
                    if i > 0 {
                        text.push_str(join);
                    }
                    text.push_str(string_at(&value, pointer)?);
                }
                text
            }
        };
        Ok(Input { text: text.into(), include })
    }
}

fn take(mut value: Value, pointer: &str) -> Result<String, RecordError> {
    string_at(&value, pointer)?;
    match value.pointer_mut(pointer).map(Value::take) {
        Some(Value::String(text)) => Ok(text),
        _ => unreachable!("string_at found a string there"),
    }
}

fn string_at<'v>(value: &'v Value, pointer: &str) -> Result<&'v str, RecordError> {
    let kind = match value.pointer(pointer) {
        Some(Value::String(text)) => return Ok(text),
        None => return Err(RecordError::new(Fault::Field, format!("{pointer:?} is missing"))),
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "a boolean",
        Some(Value::Number(_)) => "a number",
        Some(Value::Array(_)) => "an array",
        Some(Value::Object(_)) => "an object",
    };
    Err(RecordError::new(Fault::Field, format!("{pointer:?} is {kind}, not a string")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::bytes::Bytes;
    use crate::codec::text::Text;

    fn json(fields: &[&str], template: Option<&str>, include: &[&str]) -> Json {
        let text = match template {
            Some(t) => TextFrom::Template(Box::new(Template::new(t).unwrap())),
            None => TextFrom::Fields {
                pointers: fields.iter().map(|f| f.to_string()).collect(),
                join: " | ".to_owned(),
            },
        };
        let include = include.iter().map(|p| (p.to_string(), last_name(p))).collect();
        Json { text, include }
    }

    fn fault(decoder: &dyn Decoder, value: &[u8]) -> (Fault, String) {
        let error = decoder.decode(value).unwrap_err();
        (error.fault, error.message)
    }

    #[test]
    fn one_field() {
        let decoder = json(&["/a/b"], None, &[]);
        assert_eq!(decoder.decode(br#"{"a":{"b":"hi"}}"#).unwrap().text, "hi");
        assert_eq!(decoder.decode(br#"{"a":{"b":""}}"#).unwrap().text, "");
        assert_eq!(fault(&decoder, br#"{"a":{}}"#), (Fault::Field, "\"/a/b\" is missing".to_owned()));
        assert_eq!(fault(&decoder, br#"{"a":{"b":3}}"#).1, "\"/a/b\" is a number, not a string");
        assert_eq!(fault(&decoder, br#"{"a":{"b":null}}"#).0, Fault::Field);
        assert_eq!(fault(&decoder, b"{").0, Fault::Decode);
        assert_eq!(fault(&decoder, b"").0, Fault::Decode);
        assert_eq!(fault(&decoder, b"\"\xff\"").0, Fault::Decode);
    }

    #[test]
    fn the_whole_value() {
        assert_eq!(json(&[""], None, &[]).decode(br#""hi""#).unwrap().text, "hi");
    }

    #[test]
    fn several_fields_and_what_is_included() {
        let decoder = json(&["/title", "/body"], None, &["/id", "/who/na~1me", "/none"]);
        let input = decoder.decode(br#"{"title":"a","body":"b","id":7,"who":{"na/me":"x\"y"}}"#).unwrap();
        assert_eq!(input.text, "a | b");
        assert_eq!(input.include, r#","id":7,"na/me":"x\"y""#);
        assert_eq!(fault(&decoder, br#"{"title":"a"}"#).0, Fault::Field);
    }

    #[test]
    fn template() {
        let decoder = json(&[], Some("{{ title }}: {{ tags | join(', ') }}"), &[]);
        let input = decoder.decode(br#"{"title":"<a>","tags":["x","y"]}"#).unwrap();
        assert_eq!(input.text, "<a>: x, y");
        assert_eq!(fault(&decoder, br#"{"tags":[]}"#).0, Fault::Field);
        assert!(Template::new("{{ open").is_err());
    }

    #[test]
    fn text_is_strict_and_bytes_is_not() {
        assert_eq!(Text.decode("größe".as_bytes()).unwrap().text, "größe");
        assert_eq!(fault(&Text, b"a\xff").0, Fault::Decode);
        assert_eq!(Bytes.decode(b"a\xff").unwrap().text, "a\u{fffd}");
    }
}
