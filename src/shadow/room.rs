//! The memory that records may take while they wait for the shadow.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Interval at which a wait looks whether to go on.
const LOOK: Duration = Duration::from_millis(100);

pub(super) struct Room {
    limit: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    held: usize,
    /// Nobody makes room any more.
    closed: bool,
}

/// Bytes that are held until this is dropped.
pub(super) struct Held {
    room: Arc<Room>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.room.state.lock().unwrap_or_else(|e| e.into_inner());
        state.held -= self.bytes;
        self.room.changed.notify_all();
    }
}

impl Room {
    pub fn new(limit: usize) -> Self {
        Self { limit, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Holds bytes, if there is room for them. What is larger than the whole room is held alone.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Option<Held> {
        self.wait(bytes, || false)
    }

    /// Waits for room while `goes_on` says so; `None` if there is none, or will be none.
    pub fn wait(self: &Arc<Self>, bytes: usize, goes_on: impl Fn() -> bool) -> Option<Held> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            if state.closed {
                return None;
            }
            if state.held == 0 || state.held + bytes <= self.limit {
                state.held += bytes;
                return Some(Held { room: Arc::clone(self), bytes });
            }
            if !goes_on() {
                return None;
            }
            (state, _) = self.changed.wait_timeout(state, LOOK).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// From now on there is no room.
    pub fn close(&self) {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).closed = true;
        self.changed.notify_all();
    }

    /// Bytes held now.
    pub fn held(&self) -> usize {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_until_the_limit_and_for_one_that_is_larger() {
        let room = Arc::new(Room::new(100));
        let large = room.take(1000).unwrap();
        assert!(room.take(1).is_none());
        drop(large);
        let first = room.take(60).unwrap();
        assert!(room.take(41).is_none());
        let second = room.take(40).unwrap();
        assert_eq!(room.held(), 100);
        drop((first, second));
        assert_eq!(room.held(), 0);
    }

    #[test]
    fn a_wait_ends_with_room_or_when_there_will_be_none() {
        let room = Arc::new(Room::new(100));
        let held = room.take(100).unwrap();
        let waits = |room: &Arc<Room>| {
            let room = Arc::clone(room);
            std::thread::spawn(move || room.wait(50, || true).is_some())
        };
        let waiting = waits(&room);
        drop(held);
        assert!(waiting.join().unwrap());
        let _held = room.take(100).unwrap();
        let waiting = waits(&room);
        room.close();
        assert!(!waiting.join().unwrap());
    }
}
