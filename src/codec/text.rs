//! `text`: the value is UTF-8; anything else is a dead letter.

use super::{Decoder, Input};
use crate::record::{Fault, RecordError};

pub struct Text;

impl Decoder for Text {
    fn decode<'a>(&self, value: &'a [u8]) -> Result<Input<'a>, RecordError> {
        let text = std::str::from_utf8(value)
            .map_err(|e| RecordError::new(Fault::Decode, format!("the value is not UTF-8: {e}")))?;
        Ok(Input { text: text.into(), values: Vec::new(), include: String::new() })
    }
}
