//! How many bytes a transaction may hold, so that the broker acknowledges them before it gives the transaction up. Pure.
//!
//! The budget starts small and doubles whenever it was what ended a transaction and the broker was quick. After an abort
//! it falls to what the broker was seen to take in a quarter of the time. A throttled broker takes the first megabytes
//! at once and the rest by the second, which is why a rate measured once is not enough.

use std::time::Duration;

/// Bytes of the first transaction.
const FIRST: u64 = 1 << 20;
/// The largest budget: more is bounded by `delivery.commit_interval` and the memory limit.
const MOST: u64 = 1 << 30;
/// One message may be larger; it is sent alone.
const LEAST: u64 = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Budget {
    bytes: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { bytes: FIRST }
    }
}

impl Budget {
    pub fn bytes(self) -> u64 {
        self.bytes
    }

    /// A transaction was acknowledged in full `took` after its first message; `limited`: it would have held more.
    pub fn acknowledged(&mut self, limited: bool, took: Duration, timeout: Duration) {
        if limited && took < timeout / 8 {
            self.bytes = (self.bytes * 2).min(MOST);
        }
    }

    /// A transaction was aborted for want of time, when `acknowledged` bytes of it had been taken.
    pub fn timed_out(&mut self, acknowledged: u64, after: Duration, timeout: Duration) {
        let rate = acknowledged as f64 / after.as_secs_f64().max(0.001);
        let sustained = (rate * timeout.as_secs_f64() / 4.0) as u64;
        self.bytes = sustained.min(self.bytes / 2).max(LEAST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(40);

    #[test]
    fn grows_while_the_broker_is_quick() {
        let mut budget = Budget::default();
        for _ in 0..20 {
            budget.acknowledged(true, Duration::from_millis(50), TIMEOUT);
        }
        assert_eq!(budget.bytes(), MOST);
        let mut budget = Budget::default();
        budget.acknowledged(false, Duration::from_millis(50), TIMEOUT);
        budget.acknowledged(true, Duration::from_secs(6), TIMEOUT);
        assert_eq!(budget.bytes(), FIRST, "not used up, or slow");
    }

    #[test]
    fn falls_to_what_the_broker_takes() {
        let mut budget = Budget { bytes: 64 << 20 };
        // 1 MiB/s: ten of them in a quarter of 40 s.
        budget.timed_out(30 << 20, Duration::from_secs(30), TIMEOUT);
        assert_eq!(budget.bytes(), 10 << 20);
        budget.timed_out(30 << 20, Duration::from_secs(1), TIMEOUT);
        assert_eq!(budget.bytes(), 5 << 20, "half at least");
        budget.timed_out(0, Duration::from_secs(30), TIMEOUT);
        assert_eq!(budget.bytes(), LEAST);
    }
}
