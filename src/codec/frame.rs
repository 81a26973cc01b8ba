//! Confluent's wire format: a zero byte, the id of the value's schema, the data.
//!
//! <https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format>

use crate::record::{Fault, RecordError};

/// A value without its frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Framed<'a> {
    pub id: u32,
    pub data: &'a [u8],
}

impl<'a> Framed<'a> {
    /// # Errors
    /// The value does not begin as the wire format does.
    pub fn read(value: &'a [u8]) -> Result<Self, RecordError> {
        let error = |message: String| Err(RecordError::new(Fault::Decode, message));
        match value {
            [0, id @ ..] => match id.split_first_chunk::<4>() {
                Some((id, data)) => Ok(Self { id: u32::from_be_bytes(*id), data }),
                None => {
                    let count = value.len();
                    error(format!("the value ends within its schema id: it has {count} of at least 5 bytes"))
                }
            },
            [] => error("the value is empty: it has no schema id".to_owned()),
            [first, ..] => error(format!(
                "the value does not begin with a schema id (a zero byte and 4 bytes), but with the byte \
                 0x{first:02x}: the producer does not use a schema registry's serializer"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames() {
        let read = |value: &'static [u8]| Framed::read(value).map_err(|error| error.message);
        assert_eq!(read(b"\0\0\0\x01\x02ab"), Ok(Framed { id: 258, data: b"ab" }));
        assert_eq!(read(b"\0\xff\xff\xff\xff"), Ok(Framed { id: u32::MAX, data: b"" }));
        assert!(read(b"\0\0\0\x01").is_err_and(|message| message.contains("4 of at least 5 bytes")));
        assert!(read(b"{}").is_err_and(|message| message.contains("0x7b")));
        assert!(read(b"").is_err_and(|message| message.contains("empty")));
    }
}
