//! The size of a record on the wire, which a topic's `max.message.bytes` limits.
//!
//! The format is Kafka's record batch, version 2 (<https://kafka.apache.org/documentation/#recordbatch>): a header of
//! 61 bytes, then each record with lengths as variable-length integers.

use rdkafka::message::OwnedHeaders;

use super::headers;

/// Bytes of a batch besides its records.
pub const BATCH_HEADER: u64 = 61;

/// Bytes of a batch that holds one record, uncompressed.
pub fn alone(key: Option<usize>, value: Option<usize>, own: &OwnedHeaders) -> u64 {
    let field = |length: Option<usize>| match length {
        Some(length) => varint(length as i64) + length as u64,
        None => varint(-1),
    };
    let (mut count, mut bytes) = (0, 0);
    for (name, value) in headers::lengths(own) {
        count += 1;
        bytes += field(Some(name)) + field(value);
    }
    // Attributes and the two deltas, which are 0, take a byte each.
    let record = 3 + field(key) + field(value) + varint(count) + bytes;
    BATCH_HEADER + varint(record as i64) + record
}

/// Bytes of a zigzag-encoded variable-length integer.
fn varint(value: i64) -> u64 {
    let zigzag = ((value << 1) ^ (value >> 63)) as u64;
    u64::from((64 - zigzag.leading_zeros()).div_ceil(7).max(1))
}

#[cfg(test)]
mod tests {
    use rdkafka::message::Header;

    use super::*;

    #[test]
    fn integers_take_a_byte_for_seven_bits() {
        for (value, bytes) in [(0, 1), (-1, 1), (63, 1), (64, 2), (8191, 2), (8192, 3), (1 << 20, 4)] {
            assert_eq!(varint(value), bytes, "{value}");
        }
    }

    #[test]
    fn a_record_with_everything() {
        // 3, key 1 + 2, value 2 + 100, one header: 1 + (1 + 1) + (1 + 3).
        let own = OwnedHeaders::new().insert(Header { key: "h", value: Some("abc") });
        assert_eq!(alone(Some(2), Some(100), &own), 61 + 2 + 3 + 3 + 102 + 7);
        assert_eq!(alone(None, None, &OwnedHeaders::new()), 61 + 1 + 3 + 1 + 1 + 1);
    }
}
