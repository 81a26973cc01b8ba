//! Reading: one thread owns the consumer, the window that gathers, the assignment and the commits.
//! It never waits for anything without polling the consumer, so the group never loses the member,
//! however long the model takes. Nothing here knows models.

mod assignment;
mod commit;
mod lag;
mod ledger;
mod live;
mod rebalance;

pub use live::{FETCH_BACKOFF_MS, Source, SourceError, Wiring};
