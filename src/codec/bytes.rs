//! `bytes`: any value, unparsed.

use super::{Reader, Value};
use crate::record::RecordError;

pub struct Bytes;

impl Reader for Bytes {
    fn read<'a>(&self, bytes: &'a [u8]) -> Result<Value<'a>, RecordError> {
        Ok(Value::Bytes(bytes))
    }
}
