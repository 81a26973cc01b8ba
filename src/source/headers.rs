//! Headers read as they are: the client's own reader insists on names of UTF-8, which a record's own
//! headers need not have.

use std::ffi::{CStr, c_void};
use std::ptr;

use rdkafka::bindings::{
    rd_kafka_header_add, rd_kafka_header_get, rd_kafka_header_get_last, rd_kafka_header_remove,
    rd_kafka_headers_t, rd_kafka_message_headers,
};
use rdkafka::message::BorrowedMessage;
use rdkafka::types::RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR as DONE;

use crate::record::{Partition, Position};

fn headers(message: &BorrowedMessage<'_>) -> Option<*mut rd_kafka_headers_t> {
    let mut headers = ptr::null_mut();
    // SAFETY: the message is alive; librdkafka keeps the headers with it and hands out where they stand.
    let found = unsafe { rd_kafka_message_headers(message.ptr(), &mut headers) == DONE };
    found.then_some(headers)
}

/// The value of the last header of a name.
pub fn last<'a>(message: &'a BorrowedMessage<'_>, name: &CStr) -> Option<&'a [u8]> {
    let headers = headers(message)?;
    let (mut value, mut size): (*const c_void, usize) = (ptr::null(), 0);
    // SAFETY: the headers live as long as the message, and so do their values.
    unsafe {
        let found = rd_kafka_header_get_last(headers, name.as_ptr(), &mut value, &mut size) == DONE;
        (found && !value.is_null()).then(|| std::slice::from_raw_parts(value.cast::<u8>(), size))
    }
}

/// Removes the last header of a name from a message; earlier ones of that name move to the end. What
/// [`last`] lent must be let go of: the message is borrowed for good.
pub(super) fn remove_last(message: &mut BorrowedMessage<'_>, name: &CStr) {
    let Some(headers) = headers(message) else { return };
    let mut all: Vec<Vec<u8>> = Vec::new();
    let (mut value, mut size): (*const c_void, usize) = (ptr::null(), 0);
    // SAFETY: nobody else has the message or its headers; each value is copied before they change.
    unsafe {
        while rd_kafka_header_get(headers, all.len(), name.as_ptr(), &mut value, &mut size) == DONE {
            let bytes =
                if value.is_null() { &[] } else { std::slice::from_raw_parts(value.cast::<u8>(), size) };
            all.push(bytes.to_vec());
        }
        if all.pop().is_none() {
            return;
        }
        rd_kafka_header_remove(headers, name.as_ptr());
        for value in all {
            rd_kafka_header_add(headers, name.as_ptr(), -1, value.as_ptr().cast(), value.len() as isize);
        }
    }
}

/// `kandle-source`: the position of the input that a prediction or a dead letter is about.
pub fn origin(message: &BorrowedMessage<'_>) -> Option<Position> {
    position(last(message, c"kandle-source")?)
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
}
