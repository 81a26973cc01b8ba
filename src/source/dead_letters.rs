//! Dead letters as input: restores the original record of each, with its original position and without the headers
//! of a dead letter.

use rdkafka::message::{BorrowedMessage, Message};

use crate::kafka::headers;
use crate::kafka::topics::TopicFilter;
use crate::record::Position;

/// The topics whose dead letters are reprocessed: those that the records originally came from.
#[derive(Debug)]
pub struct OriginalTopics(TopicFilter);

impl OriginalTopics {
    pub fn new(topics: TopicFilter) -> Self {
        Self(topics)
    }

    /// Original position of a dead letter's record. `None`: the record came from another topic, the message is not a
    /// dead letter, or the value was too large to keep.
    pub fn origin(&self, message: &BorrowedMessage<'_>) -> Option<Position> {
        // Tombstones never become dead letters, so one without a value has lost it.
        message.payload()?;
        headers::last(message, headers::ERROR)?;
        headers::origin(message).filter(|origin| self.0.holds(&origin.partition.topic))
    }

    /// Removes the headers of a dead letter, and returns the record's original position; `None` as for
    /// [`Self::origin`].
    pub(super) fn restore(&self, message: &mut BorrowedMessage<'_>) -> Option<Position> {
        let origin = self.origin(message)?;
        headers::OF_DEAD_LETTERS.into_iter().for_each(|name| headers::remove_last(message, name));
        Some(origin)
    }
}
