//! A lease: the right to publish what was read from a partition, from its assignment until it is unassigned or lost.
//!
//! Every record carries the lease it was read under. When a partition is revoked, the source ends its lease before it
//! answers the group. The sink checks the lease before each message, and again between reading the group's generation
//! and committing under it. So records read under an earlier assignment, by any member, are never published or
//! committed as if the partition were still assigned: either the sink sees that the lease has ended, or the group
//! refuses the commit's generation. `tests/loom` runs this file through every interleaving of that hand-over.

#[cfg(loom)]
use loom::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};
#[cfg(not(loom))]
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// One assignment of one partition; clones are the same lease.
#[derive(Debug, Clone)]
pub struct Lease {
    generation: u64,
    held: Arc<AtomicBool>,
}

impl Lease {
    /// `generation` identifies the lease; a process uses no value twice.
    pub fn new(generation: u64) -> Self {
        Self { generation, held: Arc::new(AtomicBool::new(true)) }
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Ends the lease permanently. If the partition is assigned again, it gets another lease.
    pub fn end(&self) {
        self.held.store(false, Ordering::Release);
    }
}

impl PartialEq for Lease {
    fn eq(&self, other: &Self) -> bool {
        self.generation == other.generation
    }
}

impl Eq for Lease {}
