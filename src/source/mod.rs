//! Reading: one thread owns the consumer, the window that gathers, the assignment and the commits.
//! It never waits for anything without polling the consumer, so the group never loses the member,
//! however long the model takes. Nothing here knows models.

mod assignment;
mod client;
mod commit;
mod drain;
mod gather;
mod lag;
mod ledger;
mod live;
mod metadata;
mod offsets;
mod rebalance;

pub use client::FETCH_BACKOFF_MS;
pub use drain::{Bound, Drain};
pub use live::{Group, Source, SourceError, Wiring};
pub use metadata::Metadata;
