//! A lease: our hold on a partition, from the moment it is assigned until it is given up or lost.
//!
//! Every record carries the lease it was read under. The source ends a lease before it answers the
//! group; the sink looks before each message it sends, and again between asking for the group's
//! generation and committing under it. So what was read by a former owner, us included, is never
//! published or committed as if owned: either the sink sees the lease ended, or it commits under a
//! generation that the group no longer takes. `tests/loom` runs this file through every
//! interleaving of that hand-over.

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
    /// `generation` tells leases apart: none is used twice in a process.
    pub fn new(generation: u64) -> Self {
        Self { generation, held: Arc::new(AtomicBool::new(true)) }
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// For good: the partition may come back, under another lease.
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
