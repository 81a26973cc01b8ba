//! Runs src/lease.rs through every interleaving of source, sink and group.
#![cfg(loom)]

#[path = "../../../src/lease.rs"]
mod lease;

use loom::sync::{Arc, Mutex};
use loom::thread;

use lease::Lease;

/// The coordinator's side: who owns the partition, by generation, and what was committed by whom.
struct Group {
    generation: u64,
    committed: Option<u64>,
}

/// As the broker does it: an offset is taken under the present generation alone.
fn commit(group: &Mutex<Group>, under: u64) -> bool {
    let mut group = group.lock().unwrap();
    let taken = group.generation == under;
    if taken {
        group.committed = Some(under);
    }
    taken
}

#[test]
fn what_a_former_owner_read_is_never_committed_under_a_later_generation() {
    loom::model(|| {
        let group = Arc::new(Mutex::new(Group { generation: 1, committed: None }));
        let lease = Lease::new(1);
        let sink = {
            let (group, lease) = (Arc::clone(&group), lease.clone());
            thread::spawn(move || {
                // First the generation, then the lease: the other way round this test fails.
                let generation = group.lock().unwrap().generation;
                if lease.is_held() { (commit(&group, generation), generation) } else { (false, generation) }
            })
        };
        // The source answers a revocation: the lease ends before the group moves on.
        lease.end();
        group.lock().unwrap().generation = 2;
        let (taken, generation) = sink.join().unwrap();
        if taken {
            assert_eq!(generation, 1, "records of generation 1 were committed under {generation}");
        }
    });
}

#[test]
fn a_sink_that_starts_after_the_end_sends_nothing() {
    loom::model(|| {
        let lease = Lease::new(1);
        let ended = Arc::new(Mutex::new(false));
        let sink = {
            let (lease, ended) = (lease.clone(), Arc::clone(&ended));
            thread::spawn(move || {
                let after = *ended.lock().unwrap();
                (after, lease.is_held())
            })
        };
        lease.end();
        *ended.lock().unwrap() = true;
        let (after, held) = sink.join().unwrap();
        assert!(!(after && held), "sent after the lease had ended");
    });
}

#[test]
fn the_same_partition_again_is_another_lease() {
    loom::model(|| {
        let first = Lease::new(1);
        let again = Lease::new(2);
        let source = {
            let first = first.clone();
            thread::spawn(move || first.end())
        };
        assert!(again.is_held());
        assert_ne!(first, again);
        source.join().unwrap();
        assert!(!first.is_held());
        assert!(again.is_held());
    });
}
