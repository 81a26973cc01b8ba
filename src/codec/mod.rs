//! Decodes records' values into a task's input, and encodes predictions. Nothing here knows Kafka.
//!
//! ```text
//! bytes ─▶ Reader (a file per format) ─▶ Value ─▶ Select ─▶ Input ─▶ the task ─▶ write ─▶ bytes
//!            ▲
//!            └─ schemas: fetched from the registry before a window is decoded
//! ```

mod avro;
mod bytes;
mod frame;
mod image;
pub mod json;
mod json_schema;
mod protobuf;
mod schemas;
pub mod select;
mod selected;
mod text;
mod whole;
pub mod write;

use std::path::PathBuf;

pub use schemas::{SchemaError, Stopped, Waiting};
pub use select::{Input, Select};
pub use selected::{Selected, tokens};
pub use whole::WholeReader;

use crate::record::{Raw, RecordError};
use crate::registry::{RegistryError, Schema, SchemaKind};
use crate::settings::{self, Format, Settings};
use write::schema::Type;

/// A record's value, parsed by its format.
#[derive(Debug)]
pub enum Value<'a> {
    Text(&'a str),
    Bytes(&'a [u8]),
    /// Has members, which pointers and templates select from.
    Tree(json::Document<'a>),
    /// The same, of a value in another format, as JSON text. Members that are not selected may be absent.
    Transcoded(String),
}

/// Parses values of one format.
pub trait Reader: Send + Sync {
    /// Never called with a tombstone.
    ///
    /// # Errors
    /// The bytes are not valid in the format.
    fn read<'a>(&self, value: Raw<'a>) -> Result<Value<'a>, RecordError>;

    /// Fetches what reading these values needs, and waits while it cannot be fetched. Called before they are read.
    ///
    /// # Errors
    /// The process is asked to stop.
    fn fetch(&self, _: &mut dyn Iterator<Item = Raw<'_>>, _: &Waiting<'_>) -> Result<(), Stopped> {
        Ok(())
    }
}

/// Why there is no decoder.
#[derive(Debug, thiserror::Error)]
pub enum DecoderError {
    #[error("input.template: {0}")]
    Template(#[from] minijinja::Error),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("input.schema: {}: {error}", .path.display())]
    SchemaFile { path: PathBuf, error: SchemaFileError },
}

#[derive(Debug, thiserror::Error)]
pub enum SchemaFileError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Schema(#[from] SchemaError),
}

/// A value of `input.format`.
pub struct FormatEntry {
    pub format: Format,
    pub name: &'static str,
    /// Values are trees: `input.field`, `input.template` and `output.include` select from them.
    pub has_members: bool,
    /// Set if values are read by a schema: from the registry, or from the file `input.schema`.
    pub schema: Option<SchemaEntry>,
    reader: MakeReader,
}

type MakeReader = fn(&Settings, &Selected) -> Result<Box<dyn Reader>, DecoderError>;

/// For each pointer, as its tokens, the type of the value there, as predictions have it; `None`: there is no such member.
type Types<E> = Result<Vec<Option<Type>>, E>;

/// What a schema says of the values that are selected: for `kandle check`, and for the schema of predictions.
#[derive(Clone, Copy)]
pub struct SchemaEntry {
    pub kind: SchemaKind,
    /// By a schema of the registry.
    pub types: fn(&Schema, &[Vec<String>]) -> Types<SchemaError>,
    /// By the file `input.schema`.
    pub types_of_file: fn(&settings::Input, &[Vec<String>]) -> Types<SchemaFileError>,
}

/// All formats. To add one, add a file here, a line in this table and a value of [`Format`].
#[rustfmt::skip]
pub const FORMATS: &[FormatEntry] = &[
    FormatEntry { format: Format::Json, name: "json", has_members: true, schema: None, reader: |_, _| Ok(Box::new(json::Json)) },
    FormatEntry { format: Format::Text, name: "text", has_members: false, schema: None, reader: |_, _| Ok(Box::new(text::Text)) },
    FormatEntry { format: Format::Bytes, name: "bytes", has_members: false, schema: None, reader: |_, _| Ok(Box::new(bytes::Bytes)) },
    FormatEntry { format: Format::Image, name: "image", has_members: false, schema: None, reader: |_, _| Ok(Box::new(image::Image)) },
    FormatEntry { format: Format::Avro, name: "avro", has_members: true, schema: Some(avro::SCHEMA), reader: avro::reader },
    FormatEntry { format: Format::Protobuf, name: "protobuf", has_members: true, schema: Some(protobuf::SCHEMA), reader: protobuf::reader },
    FormatEntry { format: Format::JsonSchema, name: "json_schema", has_members: true, schema: Some(json_schema::SCHEMA), reader: json_schema::reader },
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
    /// # Errors
    /// A file or certificate cannot be read, or a schema is not valid.
    pub fn new(settings: &Settings, select: Select) -> Result<Self, DecoderError> {
        let reader = (FormatEntry::of(settings.input.format).reader)(settings, &select.selected())?;
        Ok(Self { reader, select })
    }

    /// The JSON Pointers to everything that is selected.
    pub fn pointers(&self) -> Vec<String> {
        self.select.pointers()
    }

    /// Fetches what decoding these values needs, and waits while it cannot be fetched.
    ///
    /// # Errors
    /// The process is asked to stop.
    pub fn fetch<'a>(
        &self,
        mut values: impl Iterator<Item = Raw<'a>>,
        waiting: &Waiting<'_>,
    ) -> Result<(), Stopped> {
        self.reader.fetch(&mut values, waiting)
    }

    /// Never called with a tombstone. [`Decoder::fetch`] was called with the value before.
    ///
    /// # Errors
    /// The value is not valid in the format, or a selected value is missing or has the wrong type.
    pub fn decode<'a>(&self, value: impl Into<Raw<'a>>) -> Result<Input<'a>, RecordError> {
        self.select.select(self.reader.read(value.into())?)
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
