//! Reading: one thread owns the consumer, the window that gathers, the assignment and the commits. It never waits for
//! anything without polling the consumer, so the group never loses the member, however long the model takes. Nothing
//! here knows models.
//!
//! ```text
//! serve          the loop: events, reports, windows, polls
//!   callbacks      the client's events
//!   assignment     partitions come and go                    (start: where to begin in one, pure)
//!   subscription   which topics
//!   intake         records in, windows out, pauses
//!   ledger         how far each partition is, pure
//!   offsets        commits                                    (commit: the thread that makes them)
//!   bounds         the end of a drain                         (drain: its bounds; schedule_state: the schedule)
//!   doubt          is the topic still the same, can its batches be read?     (damage: where a bad batch ends)
//!   idle           the end behind the last record
//!   lookup         the thread that asks the cluster
//!   lag, joining   what is shown meanwhile
//! ```

mod assignment;
mod bounds;
mod callbacks;
mod commit;
mod damage;
mod dead_letters;
mod doubt;
mod drain;
mod fetching;
mod idle;
mod intake;
mod joining;
mod lag;
mod ledger;
mod lookup;
mod offsets;
mod schedule_state;
mod serve;
mod start;
mod subscription;

pub use dead_letters::OriginalTopics;
pub use drain::{Bound, Drain, standing};
pub use serve::{Context, Source, SourceError};
