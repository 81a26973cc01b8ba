//! Headers of records: the names of kandle's own, and access to the raw headers. The rdkafka crate's reader requires
//! UTF-8 names; Kafka does not.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;

use rdkafka::bindings::{
    rd_kafka_header_add, rd_kafka_header_get, rd_kafka_header_get_all, rd_kafka_header_get_last,
    rd_kafka_header_remove, rd_kafka_headers_t, rd_kafka_message_headers,
};
use rdkafka::message::{BorrowedMessage, Header, Message, OwnedHeaders};
use rdkafka::types::RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR as DONE;

use crate::record::{Partition, Position};

/// The name of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name(&'static CStr);

impl Name {
    pub const fn text(self) -> &'static str {
        match self.0.to_str() {
            Ok(text) => text,
            Err(_) => panic!("names are ASCII"),
        }
    }
}

/// `topic/partition/offset` of the input record.
pub const SOURCE: Name = Name(c"kandle-source");
/// `source@revision` of the model.
pub const MODEL: Name = Name(c"kandle-model");
/// The first 16 hex digits of the model's digest.
pub const MODEL_DIGEST: Name = Name(c"kandle-model-digest");
/// Why a record is a dead letter: a [`crate::record::Fault`].
pub const ERROR: Name = Name(c"kandle-error");
pub const ERROR_MESSAGE: Name = Name(c"kandle-error-message");
/// The pipeline stage at which the record failed.
pub const STAGE: Name = Name(c"kandle-stage");
/// The record's own timestamp, if the dead-letter topic refuses it. Milliseconds since the Unix epoch.
pub const TIMESTAMP: Name = Name(c"kandle-timestamp");
/// The span that a record was produced in (W3C Trace Context).
pub const TRACEPARENT: Name = Name(c"traceparent");
/// The id of the value's schema, if it is not before the value's data: see [`crate::codec`].
pub const VALUE_SCHEMA_ID: Name = Name(c"__value_schema_id");

/// The headers that kandle adds to a prediction.
pub const OF_PREDICTIONS: [Name; 3] = [SOURCE, MODEL, MODEL_DIGEST];
/// The headers that kandle adds to a dead letter; [`TIMESTAMP`] only where it is needed.
pub const OF_DEAD_LETTERS: [Name; 6] = [SOURCE, ERROR, ERROR_MESSAGE, STAGE, MODEL_DIGEST, TIMESTAMP];

fn of_message(message: &BorrowedMessage<'_>) -> Option<*mut rd_kafka_headers_t> {
    let mut headers = ptr::null_mut();
    // SAFETY: the message is alive; librdkafka owns the headers with it and returns a pointer to them.
    let found = unsafe { rd_kafka_message_headers(message.ptr(), &mut headers) == DONE };
    found.then_some(headers)
}

/// The pointer to librdkafka's list, which the rdkafka crate hides behind a reference to it.
fn list(headers: &OwnedHeaders) -> *const rd_kafka_headers_t {
    ptr::from_ref(headers.as_borrowed()).cast()
}

/// The value of the last header with a name; `None` without such a header or value.
pub fn last<'a>(message: &'a BorrowedMessage<'_>, name: Name) -> Option<&'a [u8]> {
    let headers = of_message(message)?;
    // SAFETY: the headers live as long as the message, and so do their values.
    unsafe { last_of(headers, name) }
}

/// The value of the last header with a name.
///
/// # Safety
/// The list must be alive and unchanged for `'a`.
unsafe fn last_of<'a>(headers: *const rd_kafka_headers_t, name: Name) -> Option<&'a [u8]> {
    let (mut value, mut size): (*const c_void, usize) = (ptr::null(), 0);
    // SAFETY: the caller promises that the list lives; the value is part of it.
    unsafe {
        let found = rd_kafka_header_get_last(headers, name.0.as_ptr(), &mut value, &mut size) == DONE;
        (found && !value.is_null()).then(|| std::slice::from_raw_parts(value.cast::<u8>(), size))
    }
}

/// Removes the last header with a name from a message; earlier ones with that name move to the end. The exclusive
/// borrow rules out that a value from [`last`] is still in use.
pub fn remove_last(message: &mut BorrowedMessage<'_>, name: Name) {
    let Some(headers) = of_message(message) else { return };
    let mut all: Vec<Vec<u8>> = Vec::new();
    let (mut value, mut size): (*const c_void, usize) = (ptr::null(), 0);
    // SAFETY: the message is borrowed exclusively; each value is copied before the headers change.
    unsafe {
        while rd_kafka_header_get(headers, all.len(), name.0.as_ptr(), &mut value, &mut size) == DONE {
            let bytes =
                if value.is_null() { &[] } else { std::slice::from_raw_parts(value.cast::<u8>(), size) };
            all.push(bytes.to_vec());
        }
        if all.pop().is_none() {
            return;
        }
        rd_kafka_header_remove(headers, name.0.as_ptr());
        for value in all {
            rd_kafka_header_add(headers, name.0.as_ptr(), -1, value.as_ptr().cast(), value.len() as isize);
        }
    }
}

/// The headers of a record as received; their names may be any bytes.
#[derive(Debug, Clone)]
pub struct Headers(OwnedHeaders);

impl From<OwnedHeaders> for Headers {
    fn from(headers: OwnedHeaders) -> Self {
        Self(headers)
    }
}

impl Headers {
    /// A copy of a message's headers; `None` if it has none.
    pub fn of(message: &BorrowedMessage<'_>) -> Option<Self> {
        Some(Self(message.headers()?.detach()))
    }

    /// A copy in the rdkafka crate's type.
    pub fn copy(&self) -> OwnedHeaders {
        self.0.clone()
    }

    /// The value of the last header with a name; `None` without such a header or value.
    pub fn last(&self, name: Name) -> Option<&[u8]> {
        // SAFETY: the list lives as long as `self`, which is borrowed, and so do its values.
        unsafe { last_of(list(&self.0), name) }
    }

    /// Approximate bytes of memory.
    pub fn memory(&self) -> usize {
        lengths(&self.0).map(|(name, value)| name + value.unwrap_or(0) + OVERHEAD).sum()
    }
}

/// Removes all headers with these names.
pub fn without(headers: OwnedHeaders, names: &[Name]) -> OwnedHeaders {
    for name in names {
        // SAFETY: this function owns the list. An error only means that no header has the name.
        unsafe { rd_kafka_header_remove(list(&headers).cast_mut(), name.0.as_ptr()) };
    }
    headers
}

/// Appends a header.
pub fn with(headers: OwnedHeaders, name: Name, value: &str) -> OwnedHeaders {
    headers.insert(Header { key: name.text(), value: Some(value) })
}

/// Lengths of the name and the value of each header, in bytes; `None` for a header without a value.
pub fn lengths(headers: &OwnedHeaders) -> impl Iterator<Item = (usize, Option<usize>)> + '_ {
    (0..).map_while(move |index| {
        let (mut name, mut value, mut size): (*const c_char, *const c_void, usize) =
            (ptr::null(), ptr::null(), 0);
        // SAFETY: the list lives as long as the iterator; names are NUL-terminated.
        unsafe {
            let found = rd_kafka_header_get_all(list(headers), index, &mut name, &mut value, &mut size);
            (found == DONE).then(|| (CStr::from_ptr(name).count_bytes(), (!value.is_null()).then_some(size)))
        }
    })
}

/// Bytes that librdkafka takes for a header besides its name and value.
const OVERHEAD: usize = 64;

/// The position in `kandle-source`: that of the input record of a prediction or a dead letter.
pub fn origin(message: &BorrowedMessage<'_>) -> Option<Position> {
    position(last(message, SOURCE)?)
}

/// Reads `topic/partition/offset`.
pub fn position(text: &[u8]) -> Option<Position> {
    let mut parts = std::str::from_utf8(text).ok()?.rsplitn(3, '/');
    let offset = parts.next()?.parse().ok()?;
    let number = parts.next()?.parse().ok()?;
    Some(Position { partition: Partition::new(parts.next()?, number), offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_as_they_are_written() {
        let read = position(b"tickets.v2/3/17").unwrap();
        assert_eq!(read.to_string(), "tickets.v2/3/17");
        assert_eq!(position(b"tickets/3"), None);
        assert_eq!(position(b"tickets/x/17"), None);
    }

    #[test]
    fn names_and_values_count() {
        let headers = OwnedHeaders::new()
            .insert(Header { key: "four", value: Some("123456") })
            .insert(Header::<&str> { key: "no", value: None });
        assert_eq!(lengths(&headers).collect::<Vec<_>>(), [(4, Some(6)), (2, None)]);
        assert_eq!(Headers(headers).memory(), 4 + 6 + 2 + 2 * OVERHEAD);
    }

    #[test]
    fn all_headers_with_a_name_are_removed() {
        let headers = with(with(with(OwnedHeaders::new(), SOURCE, "a/0/1"), MODEL, "m"), SOURCE, "b/0/1");
        let left = without(headers, &[SOURCE, ERROR]);
        assert_eq!(lengths(&left).collect::<Vec<_>>(), [("kandle-model".len(), Some(1))]);
    }
}
