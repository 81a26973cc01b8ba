//! Publishes predictions and dead letters to Kafka in input order, and reports a window to the source once all its
//! messages are acknowledged. Nothing here knows about models.
//!
//! ```text
//! publisher        the thread: takes windows, sends messages, reports; at_least_once
//!   transactions   exactly_once: begin, commit, abort                (transaction_thread: the blocking calls)
//!   recovery       after a refused batch: finds the record to blame  (isolation: the decision, pure)
//!   compose        builds a record's message: topic, key, headers, size
//!   samples        publishes samples beside their records
//!   window         a window in flight: the state of each record
//!   producer       the Kafka client and its messages in flight       (acks: its delivery reports)
//! side             the predictions of the shadow, without a guarantee
//! ```

mod acks;
mod budget;
mod compose;
mod error;
mod isolation;
mod producer;
mod publisher;
mod recovery;
mod samples;
mod side;
mod transaction_thread;
mod transactional_id;
mod transactions;
mod window;

pub use error::{PublishError, TransactionalIdError};
pub use publisher::{Context, Publisher};
pub use side::SidePublisher;
pub use transactional_id::first as first_transactional_id;
