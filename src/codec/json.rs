//! `json`: the text is at one JSON Pointer (RFC 6901), at several, or made by a template.
//!
//! Only what is selected is read; everything else is checked to be JSON and skipped. What `output.include` copies is
//! copied byte for byte, so that no number loses digits and no text its escapes.

use std::borrow::Cow;
use std::fmt;

use minijinja::{Environment, UndefinedBehavior};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Decoder, Input};
use crate::record::{Fault, RecordError};
use crate::settings::Settings;
use crate::task::Kind;

pub struct Json {
    text: TextFrom,
    /// The task's own pointers.
    values: Vec<String>,
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
    pub fn new(settings: &Settings) -> Result<Self, minijinja::Error> {
        let (input, include) = (&settings.input, &settings.output.include);
        let text = match &input.template {
            Some(template) => TextFrom::Template(Box::new(Template::new(template)?)),
            None => TextFrom::Fields { pointers: input.field.0.clone(), join: input.join.clone() },
        };
        let include = include.iter().map(|pointer| (pointer.clone(), last_name(pointer))).collect();
        let values = Kind::of(settings.task.kind).pointers_of(&settings.task);
        Ok(Self { text, values, include })
    }
}

impl Decoder for Json {
    fn decode<'a>(&self, bytes: &'a [u8]) -> Result<Input<'a>, RecordError> {
        // RFC 8259, 8.1: a parser may ignore a byte order mark.
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let document: &RawValue = serde_json::from_slice(bytes).map_err(|e| not_json(bytes, &e))?;
        let document = Document::new(document);
        let mut include = String::new();
        for (pointer, name) in &self.include {
            if let Some(found) = document.at(pointer) {
                include.push(',');
                include.push_str(&Value::from(name.as_str()).to_string());
                include.push(':');
                include.push_str(found.get());
            }
        }
        let text = match &self.text {
            TextFrom::Template(template) => {
                let value: Value = serde_json::from_slice(bytes).map_err(|e| not_json(bytes, &e))?;
                let rendered = template.render(&value);
                rendered.map_err(|e| RecordError::new(Fault::Field, format!("input.template: {e}")))?.into()
            }
            TextFrom::Fields { pointers, .. } if pointers.len() == 1 => document.string_at(&pointers[0])?,
            TextFrom::Fields { pointers, join } => {
                let mut text = String::new();
                for (i, pointer) in pointers.iter().enumerate() {
                    if i > 0 {
                        text.push_str(join);
                    }
                    text.push_str(&document.string_at(pointer)?);
                }
                text.into()
            }
        };
        let values = self.values.iter().map(|pointer| document.at(pointer)).collect();
        Ok(Input { text, values, include })
    }
}

/// Says what else the bytes look like.
fn not_json(bytes: &[u8], error: &serde_json::Error) -> RecordError {
    let looks = match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [b'{' | b'[' | b'"', 0, ..] | [0, b'{' | b'[' | b'"', ..] => {
            "; it looks like UTF-16: JSON between systems is UTF-8"
        }
        [0, _, _, _, _, b'{' | b'[' | b'"', ..] => {
            "; it begins with a schema registry's frame (a zero byte and a schema's id): the producer has a serializer \
             for JSON Schema"
        }
        [0, _, _, _, _, ..] => {
            "; it begins with a zero byte, as a schema registry's frame does: the producer may have a serializer for \
             Avro or Protobuf"
        }
        _ => "",
    };
    RecordError::new(Fault::Decode, format!("the value is not JSON: {error}{looks}"))
}

/// A JSON document of which the members of the outermost object are known.
struct Document<'a> {
    whole: &'a RawValue,
    members: Option<Members<'a>>,
}

impl<'a> Document<'a> {
    fn new(whole: &'a RawValue) -> Self {
        Self { whole, members: members(whole) }
    }

    /// What stands at a pointer, as it is written.
    fn at(&self, pointer: &str) -> Option<&'a RawValue> {
        let Some(path) = pointer.strip_prefix('/') else { return pointer.is_empty().then_some(self.whole) };
        let mut found: Option<&'a RawValue> = None;
        for token in path.split('/') {
            let name = token.replace("~1", "/").replace("~0", "~");
            found = match found {
                None => self.members.as_ref().and_then(|members| members.get(&name)),
                Some(value) => members(value).and_then(|members| members.get(&name)),
            }
            .or_else(|| item(found.unwrap_or(self.whole), &name));
            found?;
        }
        found
    }

    fn string_at(&self, pointer: &str) -> Result<Cow<'a, str>, RecordError> {
        let found = self.at(pointer).ok_or_else(|| missing(pointer))?;
        text(found, || pointer.to_owned())
    }
}

/// Nothing is at a place of a record.
pub fn missing(place: &str) -> RecordError {
    RecordError::new(Fault::Field, format!("{place:?} is missing"))
}

/// The text of a JSON string, borrowed where it has no escapes. `place` is where it stands in the record.
///
/// # Errors
/// It is no string.
pub fn text(value: &RawValue, place: impl Fn() -> String) -> Result<Cow<'_, str>, RecordError> {
    match value.get().strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        None => {
            let message = format!("{:?} is {}, not a string", place(), what_is(value));
            Err(RecordError::new(Fault::Field, message))
        }
        Some(inner) if !inner.contains('\\') => Ok(Cow::Borrowed(inner)),
        Some(_) => serde_json::from_str(value.get())
            .map(Cow::Owned)
            .map_err(|e| RecordError::new(Fault::Decode, format!("{:?}: {e}", place()))),
    }
}

/// The kind of a JSON value, for messages.
fn what_is(value: &RawValue) -> &'static str {
    match value.get().as_bytes().first() {
        Some(b'"') => "a string",
        Some(b'n') => "null",
        Some(b't' | b'f') => "a boolean",
        Some(b'[') => "an array",
        Some(b'{') => "an object",
        _ => "a number",
    }
}

/// The members of an array that a pointer of the task's points to.
///
/// # Errors
/// Nothing is there, or something else.
pub fn list<'a>(pointer: &str, found: Option<&'a RawValue>) -> Result<Vec<&'a RawValue>, RecordError> {
    let found = found.ok_or_else(|| missing(pointer))?;
    if !found.get().starts_with('[') {
        let message = format!("{pointer:?} is {}, not an array", what_is(found));
        return Err(RecordError::new(Fault::Field, message));
    }
    serde_json::from_str(found.get())
        .map_err(|e| RecordError::new(Fault::Decode, format!("{pointer:?}: {e}")))
}

/// How many strings a JSON text has, names included, and how many bytes the longest: what a record may ask for, found
/// without reading it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Strings {
    pub count: usize,
    pub longest: usize,
}

impl Strings {
    pub fn of(json: &[u8]) -> Self {
        let (mut strings, mut at) = (Self::default(), 0);
        let mut begin = None;
        while let Some(found) = memchr::memchr2(b'"', b'\\', &json[at..]) {
            let found = at + found;
            at = found + 1;
            match (json[found], begin) {
                // What is escaped is no end.
                (b'\\', _) => at = (found + 2).min(json.len()),
                (_, None) => begin = Some(at),
                (_, Some(start)) => {
                    strings.count += 1;
                    strings.longest = strings.longest.max(found - start);
                    begin = None;
                }
            }
        }
        strings
    }
}

/// Members of an object; `None` for anything else.
pub fn members(value: &RawValue) -> Option<Members<'_>> {
    if !value.get().starts_with('{') {
        return None;
    }
    serde_json::from_str(value.get()).ok()
}

/// An item of an array, by its index (RFC 6901: without leading zeros).
fn item<'a>(value: &'a RawValue, index: &str) -> Option<&'a RawValue> {
    if !value.get().starts_with('[') || (index.len() > 1 && index.starts_with('0')) || index.starts_with('+')
    {
        return None;
    }
    let items: Vec<&RawValue> = serde_json::from_str(value.get()).ok()?;
    items.get(index.parse::<usize>().ok()?).copied()
}

/// The members of an object, in their order.
pub struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Members<'a> {
    /// Of several members of a name the last one counts.
    pub fn get(&self, name: &str) -> Option<&'a RawValue> {
        self.0.iter().rev().find(|(known, _)| known == name).map(|(_, value)| *value)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(Name(name)) = map.next_key()? {
                    members.push((name, map.next_value()?));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Each)
    }
}

/// A name, borrowed where it has no escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

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
        Json { text, values: Vec::new(), include }
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
    fn what_is_included_is_copied_byte_for_byte() {
        let decoder = json(&["/t"], None, &["/n", "/o", "/s"]);
        for number in
            ["18446744073709551616", "123456789.123456789123", "1.10", "1e400", "-0", "1E+2", "0.1e-7"]
        {
            let value = format!(r#"{{"t":"x","n":{number},"o":{{ "a" : [1.0,  2] }},"s":"\u00e9\/"}}"#);
            let include = decoder.decode(value.as_bytes()).unwrap().include;
            assert_eq!(include, format!(r#","n":{number},"o":{{ "a" : [1.0,  2] }},"s":"\u00e9\/""#));
        }
    }

    #[test]
    fn pointers_through_arrays_escapes_and_repeated_names() {
        let value = br#"{"a":[{"b":"x"},{"b":"\u00fc"}],"c":"1","c":"2","d\u00e9":"3"}"#;
        let text =
            |pointer: &str| json(&[pointer], None, &[]).decode(value).map(|input| input.text.into_owned());
        assert_eq!(text("/a/1/b").unwrap(), "ü");
        assert_eq!(text("/c").unwrap(), "2");
        assert_eq!(text("/dé").unwrap(), "3");
        for missing in ["/a/2/b", "/a/01/b", "/a/-/b", "/x/y", "/c/0"] {
            assert_eq!(text(missing).unwrap_err().message, format!("{missing:?} is missing"));
        }
        assert_eq!(json(&["/0"], None, &[]).decode(br#"["x"]"#).unwrap().text, "x");
    }

    #[test]
    fn byte_order_marks_are_skipped_and_other_encodings_named() {
        let decoder = json(&["/t"], None, &[]);
        assert_eq!(decoder.decode(b"\xef\xbb\xbf{\"t\":\"x\"}").unwrap().text, "x");
        let utf16: Vec<u8> = "{\"t\":\"x\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let marked = [&[0xff, 0xfe][..], &utf16].concat();
        for value in [utf16, marked] {
            assert!(fault(&decoder, &value).1.contains("UTF-16"), "{:?}", fault(&decoder, &value));
        }
        assert!(fault(&decoder, b"\0\0\0\0\x07{\"t\":\"x\"}").1.contains("schema registry"));
        assert!(fault(&decoder, b"\0\0\0\0\x07\x06abc").1.contains("Avro"));
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

    #[test]
    fn strings_are_counted_whatever_they_hold() {
        let of = |json: &str| Strings::of(json.as_bytes());
        assert_eq!(of(r#"{"q":"a\"b\\","d":["","x"]}"#), Strings { count: 5, longest: 6 });
        assert_eq!(of("[1, 2]"), Strings::default());
        assert_eq!(of(r#"["cut"#), Strings::default());
        assert_eq!(of("\"\\"), Strings::default());
    }
}
