//! `image`: the file of an image, in a format that its first bytes name. The task decodes it.

use super::{Reader, Value};
use crate::model::vision::format_of;
use crate::record::{Fault, RecordError};

pub struct Image;

impl Reader for Image {
    fn read<'a>(&self, bytes: &'a [u8]) -> Result<Value<'a>, RecordError> {
        match format_of(bytes) {
            Ok(_) => Ok(Value::Bytes(bytes)),
            Err(message) => Err(RecordError::new(Fault::Image, format!("the value: {message}"))),
        }
    }
}
