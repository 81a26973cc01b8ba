//! A record: its position in Kafka, its bytes, and what can be wrong with it.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crate::kafka::headers::{self, Headers};

/// A topic's partition.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Partition {
    pub topic: Arc<str>,
    pub number: i32,
}

impl Partition {
    pub fn new(topic: impl Into<Arc<str>>, number: i32) -> Self {
        Self { topic: topic.into(), number }
    }
}

/// The topics of these partitions, sorted, each once.
pub fn topics_of<'a>(partitions: impl Iterator<Item = &'a Partition>) -> Vec<String> {
    let topics: BTreeSet<&str> = partitions.map(|partition| &*partition.topic).collect();
    topics.into_iter().map(str::to_owned).collect()
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.number)
    }
}

/// The position of a record in Kafka; displayed as `topic/partition/offset`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Position {
    pub partition: Partition,
    pub offset: i64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.partition, self.offset)
    }
}

/// The header `traceparent`: the span that a record was produced in (W3C Trace Context, version 00 and what
/// later versions begin with).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    pub trace: [u8; 16],
    pub span: [u8; 8],
    pub flags: u8,
}

impl TraceParent {
    /// Parses the value of the header; `None` if it is not valid.
    pub fn read(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let mut parts = text.split('-');
        let version = parts.next()?;
        let (trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?);
        let lengths = [version.len(), trace.len(), span.len(), flags.len()];
        let hex = |c: char| matches!(c, '0'..='9' | 'a'..='f' | '-');
        let whole = version != "00" || parts.next().is_none();
        if lengths != [2, 32, 16, 2] || version == "ff" || !whole || !text[..55].chars().all(hex) {
            return None;
        }
        let mut read = Self { trace: [0; 16], span: [0; 8], flags: u8::from_str_radix(flags, 16).ok()? };
        for (i, byte) in read.trace.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&trace[2 * i..2 * i + 2], 16).ok()?;
        }
        for (i, byte) in read.span.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&span[2 * i..2 * i + 2], 16).ok()?;
        }
        // Ids of zeros are invalid.
        (read.trace != [0; 16] && read.span != [0; 8]).then_some(read)
    }
}

/// A record's value as it arrived: its bytes, and the record's headers, which may say by which schema to read it.
#[derive(Debug, Clone, Copy)]
pub struct Raw<'a> {
    pub bytes: &'a [u8],
    pub headers: Option<&'a Headers>,
}

impl<'a> Raw<'a> {
    /// The value of the header that has the id of the value's schema; `None` without such a header.
    pub fn schema_id_header(&self) -> Option<&'a [u8]> {
        self.headers?.last(headers::VALUE_SCHEMA_ID)
    }
}

/// A value without headers.
impl<'a, T: AsRef<[u8]> + ?Sized> From<&'a T> for Raw<'a> {
    fn from(bytes: &'a T) -> Self {
        Self { bytes: bytes.as_ref(), headers: None }
    }
}

/// A record as it arrives, still in the client's memory.
#[derive(Debug, Default)]
pub struct Arrival<'a> {
    pub offset: i64,
    /// Milliseconds since the Unix epoch; `None` if the record has none.
    pub timestamp: Option<i64>,
    pub key: Option<&'a [u8]>,
    /// `None` is a tombstone.
    pub value: Option<&'a [u8]>,
    pub headers: Option<Headers>,
    pub suspect: bool,
    /// Original position, if this is a dead letter that is being reprocessed.
    pub origin: Option<Box<Position>>,
    /// Its `traceparent` header; read only if spans are exported.
    pub trace: Option<Box<TraceParent>>,
    /// Estimated bytes that it takes until it is published, beside its own.
    pub footprint: usize,
    /// Estimated device seconds for it.
    pub work: f32,
}

/// A record inside a window; its bytes are in the window's memory.
#[derive(Debug)]
pub struct Record {
    /// Index into [`crate::window::Window::spans`].
    pub span: u32,
    pub offset: i64,
    /// Milliseconds since the Unix epoch.
    pub timestamp: Option<i64>,
    pub arrived: Instant,
    pub headers: Option<Headers>,
    /// Inference on it timed out before: it runs alone.
    pub suspect: bool,
    /// Original position, if this is a dead letter that is being reprocessed.
    pub origin: Option<Box<Position>>,
    /// Its `traceparent` header; read only if spans are exported.
    pub trace: Option<Box<TraceParent>>,
    /// Estimated bytes that it takes until it is published, beside its own.
    pub footprint: usize,
    /// Estimated device seconds for it.
    pub work: f32,
    pub(crate) key: Option<Range<usize>>,
    pub(crate) value: Option<Range<usize>>,
}

/// The kinds of fault a record itself can have: the `kandle-error` header and metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The value is not what `input.format` says.
    Decode,
    /// `input.field` or `input.template` finds nothing usable in it.
    Field,
    /// The image cannot be decoded, or is larger than the settings allow.
    Image,
    /// It cannot be made into an input of the model: a text without tokens, for example.
    Prepare,
    /// More tokens than the model takes, with `task.overflow: dead_letter`.
    TooLong,
    /// The model fails on this record alone.
    Infer,
    /// The model's output cannot be written as a prediction.
    Encode,
    /// The prediction is larger than the output topic allows.
    TooLarge,
    /// The output topic refuses the record because of its key, its timestamp or a rule of the broker.
    Refused,
}

impl Fault {
    pub const ALL: [Fault; 9] = [
        Fault::Decode,
        Fault::Field,
        Fault::Image,
        Fault::Prepare,
        Fault::TooLong,
        Fault::Infer,
        Fault::Encode,
        Fault::TooLarge,
        Fault::Refused,
    ];

    /// The value of `kandle-error`.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Decode => "decode",
            Fault::Field => "field",
            Fault::Image => "image",
            Fault::Prepare => "prepare",
            Fault::TooLong => "too_long",
            Fault::Infer => "infer",
            Fault::Encode => "encode",
            Fault::TooLarge => "too_large",
            Fault::Refused => "refused",
        }
    }

    /// The value of `kandle-stage`: the stage that finds the fault.
    pub fn stage(self) -> &'static str {
        match self {
            Fault::Decode | Fault::Field | Fault::Image => "decode",
            Fault::Prepare | Fault::TooLong => "prepare",
            Fault::Infer => "infer",
            Fault::Encode => "encode",
            Fault::TooLarge | Fault::Refused => "publish",
        }
    }
}

/// Why a record becomes a dead letter.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{}: {message}", fault.name())]
pub struct RecordError {
    pub fault: Fault,
    pub message: String,
}

impl RecordError {
    pub fn new(fault: Fault, message: impl Into<String>) -> Self {
        Self { fault, message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_parents() {
        let read = TraceParent::read(b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").unwrap();
        assert_eq!((read.trace[0], read.trace[15], read.span[1], read.flags), (0x4b, 0x36, 0xf0, 1));
        // A later version may have more.
        assert!(TraceParent::read(b"01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-x").is_some());
        for none in [
            &b""[..],
            b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            b"00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            b"00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            b"00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            b"ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473\u{e9}-00f067aa0ba902b7-1".as_bytes(),
        ] {
            assert_eq!(TraceParent::read(none), None, "{}", String::from_utf8_lossy(none));
        }
    }
}
