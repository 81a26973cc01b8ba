//! `bytes`: the value as it is. A task that reads text takes what is UTF-8 in it and a replacement
//! character for the rest, so that no value is refused.

use super::{Decoder, Input};
use crate::record::RecordError;

pub struct Bytes;

impl Decoder for Bytes {
    fn decode<'a>(&self, value: &'a [u8]) -> Result<Input<'a>, RecordError> {
        Ok(Input { text: String::from_utf8_lossy(value), values: Vec::new(), include: String::new() })
    }
}
