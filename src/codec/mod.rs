//! How a record's value becomes what a task reads. One file per format; nothing here knows Kafka.

pub mod bytes;
pub mod json;
pub mod text;

use std::borrow::Cow;

use serde_json::value::RawValue;

use crate::record::{Fault, RecordError};
use crate::settings::{Format, Settings};

/// What a task reads of a record.
#[derive(Debug)]
pub struct Input<'a> {
    pub text: Cow<'a, str>,
    /// What the task's own pointers point to, in their order; `None` where nothing is there.
    pub values: Vec<Option<&'a RawValue>>,
    /// `output.include`: names and their values as JSON, `,"name":value` one after the other.
    pub include: String,
}

/// The members of an array that a pointer of the task's points to.
///
/// # Errors
/// Nothing is there, or something else.
pub fn list<'a>(pointer: &str, found: Option<&'a RawValue>) -> Result<Vec<&'a RawValue>, RecordError> {
    let field = |message: String| RecordError::new(Fault::Field, message);
    let found = found.ok_or_else(|| field(format!("{pointer:?} is missing")))?;
    if !found.get().starts_with('[') {
        return Err(field(format!("{pointer:?} is {}, not an array", json::what_is(found))));
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

/// Reads values of one format.
pub trait Decoder: Send + Sync {
    /// Never called with a tombstone.
    fn decode<'a>(&self, value: &'a [u8]) -> Result<Input<'a>, RecordError>;
}

/// The decoder that the settings ask for.
pub fn decoder(settings: &Settings) -> Result<Box<dyn Decoder>, minijinja::Error> {
    Ok(match settings.input.format {
        Format::Json => Box::new(json::Json::new(settings)?),
        Format::Text => Box::new(text::Text),
        Format::Bytes => Box::new(bytes::Bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_counted_whatever_they_hold() {
        let of = |json: &str| Strings::of(json.as_bytes());
        assert_eq!(of(r#"{"q":"a\"b\\","d":["","x"]}"#), Strings { count: 5, longest: 6 });
        assert_eq!(of("[1, 2]"), Strings::default());
        assert_eq!(of(r#"["cut"#), Strings::default());
        assert_eq!(of("\"\\"), Strings::default());
    }
}
