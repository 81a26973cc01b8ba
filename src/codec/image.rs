//! `image`: the file of an image, in a format that its first bytes name. The task decodes it.

use super::{Reader, Value};
use crate::model::vision::format_of;
use crate::record::{Fault, Raw, RecordError};

pub struct Image;

impl Reader for Image {
    fn read<'a>(&self, value: Raw<'a>) -> Result<Value<'a>, RecordError> {
        match format_of(value.bytes) {
            Ok(_) => Ok(Value::Bytes(value.bytes)),
            Err(message) => Err(RecordError::new(Fault::Image, format!("the value: {message}"))),
        }
    }
}
