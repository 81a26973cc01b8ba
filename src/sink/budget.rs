//! How many bytes a transaction may hold so that the broker acknowledges them before the transaction times out. Pure.
//!
//! The budget starts small. It doubles when a transaction used it up and the broker acknowledged quickly. When a
//! transaction is too slow, it falls to what the broker acknowledges in a quarter of the timeout at the measured rate.
//! Measuring the rate once is not enough: a throttled broker takes the first megabytes at once and the rest slowly.

use std::time::Duration;

/// Bytes of the first transaction.
const FIRST: u64 = 1 << 20;
/// Largest budget in bytes; `delivery.commit_interval` and the memory limit bound a transaction as well.
const MOST: u64 = 1 << 30;
/// Smallest budget in bytes. A larger message is still sent, alone in its transaction.
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

    /// To be called when all messages of a transaction are acknowledged, `took` after it began. `limited`: the budget
    /// ended the transaction.
    pub fn acknowledged(&mut self, limited: bool, took: Duration, timeout: Duration) {
        if limited && took < timeout / 8 {
            self.bytes = (self.bytes * 2).min(MOST);
        }
    }

    /// To be called when a transaction is too slow: `after` it began, only `acknowledged` bytes of it are acknowledged.
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
        assert_eq!(budget.bytes(), FIRST, "not used up, or the broker was slow");
    }

    #[test]
    fn falls_to_what_the_broker_takes() {
        let mut budget = Budget { bytes: 64 << 20 };
        // 1 MiB/s: 10 MiB in a quarter of 40 s.
        budget.timed_out(30 << 20, Duration::from_secs(30), TIMEOUT);
        assert_eq!(budget.bytes(), 10 << 20);
        budget.timed_out(30 << 20, Duration::from_secs(1), TIMEOUT);
        assert_eq!(budget.bytes(), 5 << 20, "at most half of the last budget");
        budget.timed_out(0, Duration::from_secs(30), TIMEOUT);
        assert_eq!(budget.bytes(), LEAST);
    }
}
