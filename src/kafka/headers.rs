//! The headers of records: kandle's own names, and access to headers as they are. The client's own reader insists on
//! names of UTF-8, which a record's headers need not have.

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

/// `topic/partition/offset` of the input.
pub const SOURCE: Name = Name(c"kandle-source");
/// `source@revision` of the model.
pub const MODEL: Name = Name(c"kandle-model");
/// The first 16 hex digits of the model's digest.
pub const MODEL_DIGEST: Name = Name(c"kandle-model-digest");
/// Why a record is a dead letter: a [`crate::record::Fault`].
pub const ERROR: Name = Name(c"kandle-error");
pub const ERROR_MESSAGE: Name = Name(c"kandle-error-message");
/// The stage at which the fault showed.
pub const STAGE: Name = Name(c"kandle-stage");
/// The record's own timestamp, where the topic of dead letters refuses it.
pub const TIMESTAMP: Name = Name(c"kandle-timestamp");
/// The span that a record was produced in (W3C Trace Context).
pub const TRACEPARENT: Name = Name(c"traceparent");

/// What kandle adds to a prediction.
pub const OF_PREDICTIONS: [Name; 3] = [SOURCE, MODEL, MODEL_DIGEST];
/// What kandle adds to a dead letter; the last only where it has to.
pub const OF_DEAD_LETTERS: [Name; 6] = [SOURCE, ERROR, ERROR_MESSAGE, STAGE, MODEL_DIGEST, TIMESTAMP];

fn of_message(message: &BorrowedMessage<'_>) -> Option<*mut rd_kafka_headers_t> {
    let mut headers = ptr::null_mut();
    // SAFETY: the message is alive; librdkafka keeps the headers with it and hands out where they stand.
    let found = unsafe { rd_kafka_message_headers(message.ptr(), &mut headers) == DONE };
    found.then_some(headers)
}

/// The client's list: it lends it by a reference to where it stands.
fn list(headers: &OwnedHeaders) -> *const rd_kafka_headers_t {
    ptr::from_ref(headers.as_borrowed()).cast()
}

/// The value of the last header of a name.
pub fn last<'a>(message: &'a BorrowedMessage<'_>, name: Name) -> Option<&'a [u8]> {
    let headers = of_message(message)?;
    let (mut value, mut size): (*const c_void, usize) = (ptr::null(), 0);
    // SAFETY: the headers live as long as the message, and so do their values.
    unsafe {
        let found = rd_kafka_header_get_last(headers, name.0.as_ptr(), &mut value, &mut size) == DONE;
        (found && !value.is_null()).then(|| std::slice::from_raw_parts(value.cast::<u8>(), size))
    }
}

/// Removes the last header of a name from a message; earlier ones of that name move to the end. Whatever
/// [`last`] returned has to be gone: the message is borrowed for good.
pub fn remove_last(message: &mut BorrowedMessage<'_>, name: Name) {
    let Some(headers) = of_message(message) else { return };
    let mut all: Vec<Vec<u8>> = Vec::new();
    let (mut value, mut size): (*const c_void, usize) = (ptr::null(), 0);
    // SAFETY: nobody else has the message or its headers; each value is copied before they change.
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

/// The headers of a record as they came, whatever bytes their names hold. Only source and sink look into them.
#[derive(Debug, Clone)]
pub struct Headers(OwnedHeaders);

impl From<OwnedHeaders> for Headers {
    fn from(headers: OwnedHeaders) -> Self {
        Self(headers)
    }
}

impl Headers {
    /// A copy of the headers of a message that has any.
    pub fn of(message: &BorrowedMessage<'_>) -> Option<Self> {
        Some(Self(message.headers()?.detach()))
    }

    /// A copy in the client's form.
    pub fn copy(&self) -> OwnedHeaders {
        self.0.clone()
    }

    /// Bytes of memory that they take, about.
    pub fn memory(&self) -> usize {
        lengths(&self.0).map(|(name, value)| name + value.unwrap_or(0) + OVERHEAD).sum()
    }
}

/// Headers without those of some names.
pub fn without(headers: OwnedHeaders, names: &[Name]) -> OwnedHeaders {
    for name in names {
        // SAFETY: the list is ours alone; that there is none of the name is no error to us.
        unsafe { rd_kafka_header_remove(list(&headers).cast_mut(), name.0.as_ptr()) };
    }
    headers
}

/// Headers and one more.
pub fn with(headers: OwnedHeaders, name: Name, value: &str) -> OwnedHeaders {
    headers.insert(Header { key: name.text(), value: Some(value) })
}

/// Lengths of the name and the value of each header, in bytes; no length where there is no value.
pub fn lengths(headers: &OwnedHeaders) -> impl Iterator<Item = (usize, Option<usize>)> + '_ {
    (0..).map_while(move |index| {
        let (mut name, mut value, mut size): (*const c_char, *const c_void, usize) =
            (ptr::null(), ptr::null(), 0);
        // SAFETY: the list lives as long as the iterator; names end with a zero.
        unsafe {
            let found = rd_kafka_header_get_all(list(headers), index, &mut name, &mut value, &mut size);
            (found == DONE).then(|| (CStr::from_ptr(name).count_bytes(), (!value.is_null()).then_some(size)))
        }
    })
}

/// What librdkafka takes for one header beside its name and its value.
const OVERHEAD: usize = 64;

/// `kandle-source`: the position of the input that a prediction or a dead letter is about.
pub fn origin(message: &BorrowedMessage<'_>) -> Option<Position> {
    position(last(message, SOURCE)?)
}

/// Reads `topic/partition/offset`.
fn position(text: &[u8]) -> Option<Position> {
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
    fn all_headers_of_a_name_go() {
        let headers = with(with(with(OwnedHeaders::new(), SOURCE, "a/0/1"), MODEL, "m"), SOURCE, "b/0/1");
        let left = without(headers, &[SOURCE, ERROR]);
        assert_eq!(lengths(&left).collect::<Vec<_>>(), [("kandle-model".len(), Some(1))]);
    }
}
