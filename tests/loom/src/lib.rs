//! Runs src/lease.rs through every interleaving of source, sink and group.
#![cfg(loom)]

#[path = "../../../src/lease.rs"]
mod lease;

use loom::sync::{Arc, Mutex};
use loom::thread;

use lease::Lease;

/// The group coordinator: its current generation, and the generation of the last commit.
struct Group {
    generation: u64,
    committed: Option<u64>,
}

/// Commits like a broker, which accepts an offset only under the current generation.
fn commit(group: &Mutex<Group>, under: u64) -> bool {
    let mut group = group.lock().unwrap();
    let taken = group.generation == under;
    if taken {
        group.committed = Some(under);
    }
    taken
}

#[test]
fn records_of_a_former_owner_are_never_committed_under_a_later_generation() {
    loom::model(|| {
        let group = Arc::new(Mutex::new(Group { generation: 1, committed: None }));
        let lease = Lease::new(1);
        let sink = {
            let (group, lease) = (Arc::clone(&group), lease.clone());
            thread::spawn(move || {
                // The generation is read before the lease: in the other order this test fails.
                let generation = group.lock().unwrap().generation;
                if lease.is_held() { (commit(&group, generation), generation) } else { (false, generation) }
            })
        };
        // The source handles a revocation: it ends the lease before the group moves on.
        lease.end();
        group.lock().unwrap().generation = 2;
        let (taken, generation) = sink.join().unwrap();
        if taken {
            assert_eq!(generation, 1, "records of generation 1 were committed under {generation}");
        }
    });
}

#[test]
fn a_sink_that_starts_after_the_end_of_the_lease_sends_nothing() {
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
fn a_partition_assigned_again_has_another_lease() {
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
