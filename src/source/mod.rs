//! Reading: one thread owns the consumer, the window that gathers, the assignment and the commits.
//! It never waits for anything without polling the consumer, so the group never loses the member,
//! however long the model takes. Nothing here knows models.

mod assignment;
mod client;
mod commit;
mod dead_letters;
mod drain;
mod ends;
mod gather;
mod lag;
mod ledger;
mod live;
mod metadata;
mod offsets;
mod period;
mod range;
mod rebalance;

pub use client::{FETCH_BACKOFF_MS, Role, reader};
pub use dead_letters::Origins;
pub use drain::{Bound, Drain, standing};
pub use live::{Group, Source, SourceError, Wiring};
pub use metadata::Metadata;
pub use range::{Point, Range, RangeError, Read, read, resolve};
