//! What flows: a record's place in Kafka, its bytes, and what can be wrong with it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// The headers of a record, opaque between the source and the sink: they are passed on as they
/// came, whatever bytes their names hold.
pub type Headers = rdkafka::message::OwnedHeaders;

/// Bytes that headers take, about: the client's reader insists on UTF-8 names, which a record's own
/// need not have, so they are counted and not read.
pub fn header_bytes(headers: Option<&Headers>) -> usize {
    use rdkafka::message::Headers as _;
    headers.map_or(0, |headers| headers.count() * 64)
}

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

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.number)
    }
}

/// Where a record stands in Kafka; written `topic/partition/offset`.
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

/// A record as it arrives, still in the client's memory.
#[derive(Debug, Default)]
pub struct Arrival<'a> {
    pub offset: i64,
    /// Milliseconds since the Unix epoch; `None` where the broker keeps none.
    pub timestamp: Option<i64>,
    pub key: Option<&'a [u8]>,
    /// `None` is a tombstone.
    pub value: Option<&'a [u8]>,
    pub headers: Option<Headers>,
    pub suspect: bool,
    /// Where it once came from, if not from here: it was a dead letter.
    pub origin: Option<Box<Position>>,
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
    /// It was in a forward that did not come to an end: it runs alone.
    pub suspect: bool,
    /// Where it once came from, if not from here: it was a dead letter.
    pub origin: Option<Box<Position>>,
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
    /// More tokens than the model takes, with `task.overflow: dead_letter`.
    TooLong,
    /// The model fails on this record alone.
    Infer,
    /// The model's output cannot be written as a prediction.
    Encode,
    /// The prediction is larger than the output topic takes.
    TooLarge,
}

impl Fault {
    pub const ALL: [Fault; 6] =
        [Fault::Decode, Fault::Field, Fault::TooLong, Fault::Infer, Fault::Encode, Fault::TooLarge];

    /// The value of `kandle-error`.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Decode => "decode",
            Fault::Field => "field",
            Fault::TooLong => "too_long",
            Fault::Infer => "infer",
            Fault::Encode => "encode",
            Fault::TooLarge => "too_large",
        }
    }

    /// The value of `kandle-stage`: where the fault shows.
    pub fn stage(self) -> &'static str {
        match self {
            Fault::Decode | Fault::Field => "decode",
            Fault::TooLong => "prepare",
            Fault::Infer => "infer",
            Fault::Encode => "encode",
            Fault::TooLarge => "publish",
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
