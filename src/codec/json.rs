//! `json`: JSON documents, from which JSON Pointers (RFC 6901) select values. Only selected values are parsed; the rest
//! is checked to be valid JSON and skipped.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::selected::unescape;
use super::{Reader, Value};
use crate::record::{Fault, Raw, RecordError};

pub struct Json;

impl Reader for Json {
    fn read<'a>(&self, value: Raw<'a>) -> Result<Value<'a>, RecordError> {
        // RFC 8259, 8.1: a parser may ignore a byte order mark.
        let bytes = value.bytes;
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let document: &RawValue = serde_json::from_slice(bytes).map_err(|e| not_json(bytes, &e))?;
        Ok(Value::Tree(Document::new(document)))
    }
}

/// The error for a value that is not JSON; names the encoding that the bytes look like.
fn not_json(bytes: &[u8], error: &serde_json::Error) -> RecordError {
    let looks = match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [b'{' | b'[' | b'"', 0, ..] | [0, b'{' | b'[' | b'"', ..] => {
            "; it looks like UTF-16, but JSON has to be UTF-8"
        }
        [0, _, _, _, _, b'{' | b'[' | b'"', ..] => {
            "; it begins with a schema registry header (a zero byte and a schema ID): the producer uses a JSON Schema \
             serializer; set input.format: json_schema"
        }
        [0, _, _, _, _, ..] => {
            "; it begins with a zero byte, like a schema registry header: the producer may use an Avro or Protobuf \
             serializer; set input.format: avro or protobuf"
        }
        _ => "",
    };
    RecordError::new(Fault::Decode, format!("the value is not JSON: {error}{looks}"))
}

/// A JSON Pointer in its parts, for pointers that are used on many documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Path {
    Whole,
    /// The names of members or indexes of items, from the outside in.
    Names(Vec<String>),
    /// Not a pointer: leads nowhere.
    Nowhere,
}

impl Path {
    pub fn new(pointer: &str) -> Self {
        match pointer.strip_prefix('/') {
            Some(path) => Self::Names(path.split('/').map(unescape).collect()),
            None if pointer.is_empty() => Self::Whole,
            None => Self::Nowhere,
        }
    }
}

/// A JSON document. Its top-level members are located once.
#[derive(Debug)]
pub struct Document<'a> {
    whole: &'a RawValue,
    members: Option<Members<'a>>,
}

impl<'a> Document<'a> {
    pub fn new(whole: &'a RawValue) -> Self {
        Self { whole, members: members(whole) }
    }

    /// The whole document, as written.
    pub fn whole(&self) -> &'a RawValue {
        self.whole
    }

    /// The value at a pointer, as written; `None` if there is none.
    pub fn at(&self, pointer: &str) -> Option<&'a RawValue> {
        self.at_path(&Path::new(pointer))
    }

    /// The value at a pointer that was taken apart before.
    pub fn at_path(&self, path: &Path) -> Option<&'a RawValue> {
        let Path::Names(names) = path else {
            return matches!(path, Path::Whole).then_some(self.whole);
        };
        let mut found: Option<&'a RawValue> = None;
        for name in names {
            found = match found {
                None => self.members.as_ref().and_then(|members| members.get(name)),
                Some(value) => members(value).and_then(|members| members.get(name)),
            }
            .or_else(|| item(found.unwrap_or(self.whole), name));
            found?;
        }
        found
    }

    /// The string at a pointer.
    ///
    /// # Errors
    /// The value is missing, or is not a string.
    pub fn string_at(&self, pointer: &str) -> Result<Cow<'a, str>, RecordError> {
        let found = self.at(pointer).ok_or_else(|| missing(pointer))?;
        text(found, || pointer.to_owned())
    }
}

/// Replaces what is at a place by null: the names of members or indexes of items, from the outside in. Nothing happens
/// if nothing is there.
pub fn null_at(value: &mut serde_json::Value, place: &[String]) {
    use serde_json::Value::{Array, Null, Object};
    let Some((name, rest)) = place.split_first() else {
        *value = Null;
        return;
    };
    let inside = match value {
        Object(members) => members.get_mut(name),
        Array(items) => name.parse::<usize>().ok().and_then(|index| items.get_mut(index)),
        _ => None,
    };
    if let Some(inside) = inside {
        null_at(inside, rest);
    }
}

/// The error for a missing value. `place` is a pointer into the record.
pub fn missing(place: &str) -> RecordError {
    RecordError::new(Fault::Field, format!("{place:?} is missing"))
}

/// The text of a JSON string, borrowed if it has no escapes. `place` is its pointer, for the error.
///
/// # Errors
/// The value is not a string, or an escape is invalid.
pub fn text(value: &RawValue, place: impl Fn() -> String) -> Result<Cow<'_, str>, RecordError> {
    match string(value.get()) {
        None => {
            let message = format!("{:?} is {}, not a string", place(), what_is(value.get()));
            Err(RecordError::new(Fault::Field, message))
        }
        Some(text) => text.map_err(|e| RecordError::new(Fault::Decode, format!("{:?}: {e}", place()))),
    }
}

/// The text of a JSON string as it is written, borrowed if it has no escapes; `None` if the value is not a string.
pub(super) fn string(json: &str) -> Option<serde_json::Result<Cow<'_, str>>> {
    let inner = json.strip_prefix('"')?.strip_suffix('"')?;
    Some(if inner.contains('\\') {
        serde_json::from_str(json).map(Cow::Owned)
    } else {
        Ok(Cow::Borrowed(inner))
    })
}

/// The kind of a JSON value, for messages.
pub fn what_is(json: &str) -> &'static str {
    match json.as_bytes().first() {
        Some(b'"') => "a string",
        Some(b'n') => "null",
        Some(b't' | b'f') => "a boolean",
        Some(b'[') => "an array",
        Some(b'{') => "an object",
        _ => "a number",
    }
}

/// The elements of the array at a task's pointer.
///
/// # Errors
/// The value is missing, or is not an array.
pub fn list<'a>(pointer: &str, found: Option<&'a RawValue>) -> Result<Vec<&'a RawValue>, RecordError> {
    let found = found.ok_or_else(|| missing(pointer))?;
    if !found.get().starts_with('[') {
        let message = format!("{pointer:?} is {}, not an array", what_is(found.get()));
        return Err(RecordError::new(Fault::Field, message));
    }
    serde_json::from_str(found.get())
        .map_err(|e| RecordError::new(Fault::Decode, format!("{pointer:?}: {e}")))
}

/// The number of strings in a JSON text, names included, and the length of the longest in bytes: an upper bound on a
/// record's items that needs no parsing. Of a value in a binary format it is an estimate.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Strings {
    pub count: usize,
    pub longest: usize,
}

/// Bytes per string of a value in a binary format, for an estimate.
const BYTES_PER_STRING: usize = 16;

impl Strings {
    pub fn of(json: &[u8]) -> Self {
        if json.contains(&0) {
            // No JSON has a zero byte, and every schema id has one.
            return Self { count: 1 + json.len() / BYTES_PER_STRING, longest: json.len() };
        }
        let (mut strings, mut at) = (Self::default(), 0);
        let mut begin = None;
        while let Some(found) = memchr::memchr2(b'"', b'\\', &json[at..]) {
            let found = at + found;
            at = found + 1;
            match (json[found], begin) {
                // An escaped quote does not end the string.
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

/// The members of an object, in document order.
#[derive(Debug)]
pub struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Members<'a> {
    /// The value of a member. If its name is repeated, the last one is used.
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

/// A member's name, borrowed if it has no escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_with_escapes_are_counted() {
        let of = |json: &str| Strings::of(json.as_bytes());
        assert_eq!(of(r#"{"q":"a\"b\\","d":["","x"]}"#), Strings { count: 5, longest: 6 });
        assert_eq!(of("[1, 2]"), Strings::default());
        assert_eq!(of(r#"["cut"#), Strings::default());
        assert_eq!(of("\"\\"), Strings::default());
        assert_eq!(of("\0\0\0\0\u{7}").count, 1, "a binary format");
    }
}
