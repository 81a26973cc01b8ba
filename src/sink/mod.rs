//! Publishing: predictions and dead letters to Kafka, in input order, and the report to the source once a window is
//! acknowledged in full. Nothing here knows models.
//!
//! ```text
//! publisher   the thread: windows in, records out, reports; at_least_once
//!   transactions   exactly_once: begin, commit, abort          (transaction_thread: the calls that block)
//!   recovery       a batch was refused: which record is to blame? (isolation: the decision, pure)
//!   compose        the message of a record: topic, key, headers, size
//!   window         what is known of each record of a window under way
//!   producer       the client, and what it has in flight        (acks: its delivery reports)
//! ```

mod acks;
mod budget;
mod compose;
mod error;
mod isolation;
mod producer;
mod publisher;
mod recovery;
mod transaction_thread;
mod transactional_id;
mod transactions;
mod window;

pub use error::{PublishError, TransactionalIdError};
pub use publisher::{Context, Publisher};
