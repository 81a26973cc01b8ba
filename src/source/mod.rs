//! Reads the input. One thread owns the consumer, the open window, the assignment and the offsets. It never waits for
//! anything without polling the consumer, so slow inference cannot cost the member its place in the group. Nothing here
//! knows about models.
//!
//! ```text
//! serve          the loop: events, reports, windows, polls
//!   callbacks      librdkafka's callbacks, queued as events
//!   assignment     partitions assigned and revoked            (start: where reading begins, pure)
//!   subscription   which topics the group reads
//!   intake         records in, windows out, pauses            (dead_letters: records restored from dead letters)
//!   ledger         progress of each partition, pure
//!   offsets        what to commit, and when                   (commit: the thread that commits)
//!   bounds         the end of a drain                         (drain: its end offsets; schedule_state: the schedule)
//!   doubt          recreated topics, damaged batches          (damage: where a damaged batch ends)
//!   fetching       partitions that the client stopped fetching
//!   idle           offsets without records at the end of a partition
//!   lookup         the thread that queries the cluster
//!   lag, joining   lag metrics; warnings while the group rebalances
//!   heartbeat      rejoins the group after a lost heartbeat response
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
mod heartbeat;
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
pub use drain::{Bound, Drain, committed_offsets, remaining};
pub use serve::{Context, Source, SourceError};
