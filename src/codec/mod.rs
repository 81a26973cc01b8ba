//! Decodes records' values into a task's input, and encodes predictions. Nothing here knows Kafka.
//!
//! ```text
//! bytes ─▶ Reader (a file per format) ─▶ Value ─▶ Select ─▶ Input ─▶ the task ─▶ write ─▶ bytes
//! ```

mod bytes;
pub mod json;
pub mod select;
mod text;
pub mod write;

pub use select::{Input, Select};

use crate::record::RecordError;
use crate::settings::{Format, Settings};

/// A record's value, parsed by its format.
#[derive(Debug)]
pub enum Value<'a> {
    Text(&'a str),
    Bytes(&'a [u8]),
    /// Has members, which pointers and templates select from.
    Tree(json::Document<'a>),
}

/// Parses values of one format.
pub trait Reader: Send + Sync {
    /// Never called with a tombstone.
    ///
    /// # Errors
    /// The bytes are not valid in the format.
    fn read<'a>(&self, bytes: &'a [u8]) -> Result<Value<'a>, RecordError>;
}

/// A value of `input.format`.
pub struct FormatEntry {
    pub format: Format,
    pub name: &'static str,
    /// Values are trees: `input.field`, `input.template` and `output.include` select from them.
    pub has_members: bool,
    reader: fn(&Settings) -> Box<dyn Reader>,
}

/// All formats. To add one, add a file here, a line in this table and a value of [`Format`].
pub const FORMATS: &[FormatEntry] = &[
    FormatEntry { format: Format::Json, name: "json", has_members: true, reader: |_| Box::new(json::Json) },
    FormatEntry { format: Format::Text, name: "text", has_members: false, reader: |_| Box::new(text::Text) },
    FormatEntry {
        format: Format::Bytes,
        name: "bytes",
        has_members: false,
        reader: |_| Box::new(bytes::Bytes),
    },
];

impl FormatEntry {
    /// The entry of a format.
    pub fn of(format: Format) -> &'static Self {
        FORMATS
            .iter()
            .find(|entry| entry.format == format)
            .expect("a unit test finds every format in the table")
    }
}

/// Decodes a value's bytes into the task's input.
pub struct Decoder {
    reader: Box<dyn Reader>,
    select: Select,
}

impl Decoder {
    /// `pointers`: the task's own, as JSON Pointers.
    ///
    /// # Errors
    /// `input.template` is not a valid template.
    pub fn new(settings: &Settings, pointers: Vec<String>) -> Result<Self, minijinja::Error> {
        let reader = (FormatEntry::of(settings.input.format).reader)(settings);
        Ok(Self { reader, select: Select::new(settings, pointers)? })
    }

    /// Never called with a tombstone.
    ///
    /// # Errors
    /// The value is not valid in the format, or a selected value is missing or has the wrong type.
    pub fn decode<'a>(&self, value: &'a [u8]) -> Result<Input<'a>, RecordError> {
        self.select.select(self.reader.read(value)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_is_in_the_table_under_its_name() {
        let schema = serde_json::to_value(schemars::schema_for!(Format)).unwrap();
        let names: Vec<&str> = schema["enum"].as_array().unwrap().iter().filter_map(|v| v.as_str()).collect();
        assert_eq!(names, FORMATS.iter().map(|entry| entry.name).collect::<Vec<_>>());
        for entry in FORMATS {
            assert_eq!(serde_json::to_value(entry.format).unwrap(), entry.name);
        }
    }
}
