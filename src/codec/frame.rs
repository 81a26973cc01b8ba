//! Confluent's wire format: which schema a value has. The id is a zero byte and a number of four bytes, or a byte 1 and
//! a GUID of sixteen. It is before the data, or in the record's header `__value_schema_id`; then the value is the data
//! alone. For Protobuf, the message's indexes follow the id wherever that is.
//!
//! <https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format>

use crate::record::{Fault, Raw, RecordError};
use crate::registry::SchemaId;

/// A value without its frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Framed<'a> {
    pub id: SchemaId,
    /// What follows the id in the header, if the id is in the header.
    pub header: Option<&'a [u8]>,
    pub data: &'a [u8],
}

impl<'a> Framed<'a> {
    /// # Errors
    /// Neither the header nor the value has a schema id.
    pub fn read(value: Raw<'a>) -> Result<Self, RecordError> {
        match value.schema_id_header() {
            Some(header) => {
                let (id, rest) = split(header, "header __value_schema_id")?;
                Ok(Self { id, header: Some(rest), data: value.bytes })
            }
            None => {
                let (id, data) = split(value.bytes, "value")?;
                Ok(Self { id, header: None, data })
            }
        }
    }
}

/// Splits a schema id from what follows it. `place`: where it is, for the error.
fn split<'a>(bytes: &'a [u8], place: &str) -> Result<(SchemaId, &'a [u8]), RecordError> {
    let error = |message: &str| RecordError::new(Fault::Decode, format!("the {place} {message}"));
    let ends = |least: usize| {
        let count = bytes.len();
        error(&format!("ends within its schema id: it has {count} of at least {least} bytes"))
    };
    match bytes {
        [0, id @ ..] => {
            let (id, rest) = id.split_first_chunk::<4>().ok_or_else(|| ends(5))?;
            Ok((SchemaId::Number(u32::from_be_bytes(*id)), rest))
        }
        [1, id @ ..] => {
            let (id, rest) = id.split_first_chunk::<16>().ok_or_else(|| ends(17))?;
            Ok((SchemaId::Guid(*id), rest))
        }
        [] => Err(error("is empty: it has no schema id")),
        [first, ..] => Err(error(&format!(
            "does not begin with a schema id (a zero byte and 4 bytes, or a byte 1 and 16 bytes), but with the byte \
             0x{first:02x}: the producer does not use a schema registry's serializer"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::message::{Header, OwnedHeaders};

    use super::*;
    use crate::kafka::headers::Headers;

    fn number(id: u32, data: &[u8]) -> Framed<'_> {
        Framed { id: SchemaId::Number(id), header: None, data }
    }

    #[test]
    fn frames_before_the_data() {
        let read = |value: &'static [u8]| Framed::read(Raw::from(value)).map_err(|error| error.message);
        assert_eq!(read(b"\0\0\0\x01\x02ab"), Ok(number(258, b"ab")));
        assert_eq!(read(b"\0\xff\xff\xff\xff"), Ok(number(u32::MAX, b"")));
        let guid = *b"0123456789abcdef";
        let framed = Framed { id: SchemaId::Guid(guid), header: None, data: b"x" };
        assert_eq!(read(b"\x010123456789abcdefx"), Ok(framed));
        assert!(read(b"\0\0\0\x01").is_err_and(|message| message.contains("4 of at least 5 bytes")));
        assert!(read(b"\x01\0\0\0\x01").is_err_and(|message| message.contains("5 of at least 17 bytes")));
        assert!(read(b"{}").is_err_and(|message| message.contains("0x7b")));
        assert!(read(b"").is_err_and(|message| message.contains("value is empty")));
    }

    #[test]
    fn frames_in_the_header() {
        let name = "__value_schema_id";
        let headers = |values: &[&[u8]]| {
            let add = |headers: OwnedHeaders, value: &&[u8]| {
                headers.insert(Header { key: name, value: Some(*value) })
            };
            Headers::from(values.iter().fold(OwnedHeaders::new(), add))
        };
        type Read<'a> = (SchemaId, Option<Vec<u8>>, &'a [u8]);
        fn read<'a>(headers: &'a Headers, bytes: &'a [u8]) -> Result<Read<'a>, String> {
            let framed = Framed::read(Raw { bytes, headers: Some(headers) });
            framed
                .map(|framed| (framed.id, framed.header.map(<[u8]>::to_vec), framed.data))
                .map_err(|e| e.message)
        }
        let guid = SchemaId::Guid(*b"0123456789abcdef");
        let of_guid = headers(&[b"\x010123456789abcdef\x04"]);
        // The value is the data, whatever it begins with.
        assert_eq!(read(&of_guid, b"\0\0\0\0\x07x"), Ok((guid, Some(vec![4]), &b"\0\0\0\0\x07x"[..])));
        // The last header counts, as Kafka's clients read it.
        let two = headers(&[b"\x010123456789abcdef", b"\0\0\0\0\x07"]);
        assert_eq!(read(&two, b"x"), Ok((SchemaId::Number(7), Some(Vec::new()), &b"x"[..])));
        let other = Headers::from(OwnedHeaders::new().insert(Header { key: "other", value: Some("x") }));
        assert_eq!(read(&other, b"\0\0\0\0\x07x"), Ok((SchemaId::Number(7), None, &b"x"[..])));
        for (value, said) in [(&b"\x02"[..], "0x02"), (b"", "empty"), (b"\x01\x02", "2 of at least 17")] {
            let error = read(&headers(&[value]), b"x").unwrap_err();
            assert!(error.contains("header __value_schema_id") && error.contains(said), "{error}");
        }
    }
}
