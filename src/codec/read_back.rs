//! Reads predictions back that were written in `output.format`.

use std::borrow::Cow;

use super::{DecoderError, FormatEntry, Reader, Selected, Stopped, Value, Waiting};
use crate::record::{Fault, Raw, RecordError};
use crate::settings::{Format, OutputFormat, Settings};

/// Turns predictions into the JSON that the task wrote. Those with a schema are read by the schema of their id, from the
/// registry.
pub struct PredictionReader(Box<dyn Reader>);

impl PredictionReader {
    /// # Errors
    /// A certificate of the registry cannot be read.
    pub fn new(settings: &Settings) -> Result<Self, DecoderError> {
        let format = match settings.output.format {
            OutputFormat::Json => Format::Json,
            OutputFormat::Avro => Format::Avro,
            OutputFormat::Protobuf => Format::Protobuf,
            OutputFormat::JsonSchema => Format::JsonSchema,
        };
        let mut settings = settings.clone();
        // The file is the schema of the input.
        (settings.input.schema, settings.input.message) = (None, None);
        Ok(Self((FormatEntry::of(format).reader)(&settings, &Selected::Whole)?))
    }

    /// Fetches the schema that reading a prediction needs. See [`super::Decoder::fetch`].
    ///
    /// # Errors
    /// The process is asked to stop.
    pub fn fetch(&self, value: Raw<'_>, waiting: &Waiting<'_>) -> Result<(), Stopped> {
        self.0.fetch(&mut std::iter::once(value), waiting)
    }

    /// The prediction as JSON. [`PredictionReader::fetch`] was called with it before.
    ///
    /// # Errors
    /// The value is not one of the format.
    pub fn json<'a>(&self, value: Raw<'a>) -> Result<Cow<'a, str>, RecordError> {
        match self.0.read(value)? {
            Value::Tree(document) => Ok(Cow::Borrowed(document.whole().get())),
            Value::Transcoded(text) => Ok(Cow::Owned(text)),
            // None of the formats of predictions.
            Value::Text(_) | Value::Bytes(_) => {
                Err(RecordError::new(Fault::Decode, "the value has no members"))
            }
        }
    }
}
