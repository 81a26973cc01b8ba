//! How a record's value becomes what a task reads. One file per format; nothing here knows Kafka.

pub mod bytes;
pub mod json;
pub mod text;

use std::borrow::Cow;

use serde_json::value::RawValue;

use crate::record::RecordError;
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
