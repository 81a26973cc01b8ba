//! `text`: the value is UTF-8; anything else is a dead letter.

use super::{Reader, Value};
use crate::record::{Fault, Raw, RecordError};

pub struct Text;

impl Reader for Text {
    fn read<'a>(&self, value: Raw<'a>) -> Result<Value<'a>, RecordError> {
        let text = std::str::from_utf8(value.bytes)
            .map_err(|e| RecordError::new(Fault::Decode, format!("the value is not UTF-8: {e}")))?;
        Ok(Value::Text(text))
    }
}
