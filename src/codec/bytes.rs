//! `bytes`: any value, unparsed.

use super::{Reader, Value};
use crate::record::{Raw, RecordError};

pub struct Bytes;

impl Reader for Bytes {
    fn read<'a>(&self, value: Raw<'a>) -> Result<Value<'a>, RecordError> {
        Ok(Value::Bytes(value.bytes))
    }
}
