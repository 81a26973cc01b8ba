//! Dead letters as input: each is a record again, at the position it once came from, without the headers
//! that made it a dead letter.

use rdkafka::message::{BorrowedMessage, Message};

use crate::kafka::headers;
use crate::kafka::topics::TopicFilter;
use crate::record::Position;

/// Which dead letters are a job's own: those whose records came from its topics.
#[derive(Debug)]
pub struct OriginalTopics(TopicFilter);

impl OriginalTopics {
    pub fn new(topics: TopicFilter) -> Self {
        Self(topics)
    }

    /// Where the record once was that a message is the dead letter of. `None`: it is another job's, no dead
    /// letter at all, or its bytes were too large to keep.
    pub fn origin(&self, message: &BorrowedMessage<'_>) -> Option<Position> {
        // A dead letter was no tombstone: one without a value has lost it.
        message.payload()?;
        headers::last(message, headers::ERROR)?;
        headers::origin(message).filter(|origin| self.0.holds(&origin.partition.topic))
    }

    /// Makes a dead letter the record it was, and says where that came from.
    pub(super) fn restore(&self, message: &mut BorrowedMessage<'_>) -> Option<Position> {
        let origin = self.origin(message)?;
        headers::OF_DEAD_LETTERS.into_iter().for_each(|name| headers::remove_last(message, name));
        Some(origin)
    }
}
