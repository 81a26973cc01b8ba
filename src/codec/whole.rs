//! Reads whole values as JSON, for what is shown or compared: samples, and predictions that are read back.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{DecoderError, FormatEntry, Reader, Selected, Stopped, Value, Waiting};
use crate::record::{Raw, RecordError};
use crate::settings::{Format, OutputFormat, Settings};

/// Turns values of a format into JSON texts, with all their members.
pub struct WholeReader(Box<dyn Reader>);

impl WholeReader {
    /// Of `input.format`.
    ///
    /// # Errors
    /// A file or certificate cannot be read, or a schema is not valid.
    pub fn new(settings: &Settings) -> Result<Self, DecoderError> {
        (FormatEntry::of(settings.input.format).reader)(settings, &Selected::Whole).map(Self)
    }

    /// Of `output.format`, as kandle writes predictions.
    ///
    /// # Errors
    /// A certificate of the registry cannot be read.
    pub fn of_predictions(settings: &Settings) -> Result<Self, DecoderError> {
        let mut settings = settings.clone();
        settings.input.format = match settings.output.format {
            OutputFormat::Json => Format::Json,
            OutputFormat::Avro => Format::Avro,
            OutputFormat::Protobuf => Format::Protobuf,
            OutputFormat::JsonSchema => Format::JsonSchema,
        };
        // Predictions have the id of a schema in the registry.
        (settings.input.schema, settings.input.message) = (None, None);
        Self::new(&settings)
    }

    /// Fetches what reading these values needs, and waits while it cannot be fetched.
    ///
    /// # Errors
    /// The process is asked to stop.
    pub fn fetch<'a>(
        &self,
        mut values: impl Iterator<Item = Raw<'a>>,
        waiting: &Waiting<'_>,
    ) -> Result<(), Stopped> {
        self.0.fetch(&mut values, waiting)
    }

    /// A value as JSON: a document as it is written, a text as a string, other bytes as a string in base64.
    /// [`WholeReader::fetch`] was called with the value before.
    ///
    /// # Errors
    /// The value is not valid in the format.
    pub fn json<'a>(&self, value: Raw<'a>) -> Result<Cow<'a, str>, RecordError> {
        let string = |text: &str| Cow::Owned(serde_json::Value::from(text).to_string());
        Ok(match self.0.read(value)? {
            Value::Text(text) => string(text),
            Value::Bytes(bytes) => string(&STANDARD.encode(bytes)),
            Value::Tree(document) => Cow::Borrowed(document.whole().get()),
            Value::Transcoded(text) => Cow::Owned(text),
        })
    }
}
