//! How a record's value becomes what a task reads. One file per format; nothing here knows Kafka.

pub mod bytes;
pub mod json;
pub mod text;

use std::borrow::Cow;

use crate::record::RecordError;
use crate::settings::{Format, Settings};

/// What a task reads of a record.
#[derive(Debug, PartialEq)]
pub struct Input<'a> {
    pub text: Cow<'a, str>,
    /// `output.include`: names and their values as JSON, `,"name":value` one after the other.
    pub include: String,
}

/// Reads values of one format.
pub trait Decoder: Send + Sync {
    /// Never called with a tombstone.
    fn decode<'a>(&self, value: &'a [u8]) -> Result<Input<'a>, RecordError>;
}

/// The decoder that the settings ask for.
pub fn decoder(settings: &Settings) -> Result<Box<dyn Decoder>, minijinja::Error> {
    Ok(match settings.input.format {
        Format::Json => Box::new(json::Json::new(&settings.input, &settings.output.include)?),
        Format::Text => Box::new(text::Text),
        Format::Bytes => Box::new(bytes::Bytes),
    })
}
