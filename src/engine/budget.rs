//! The token budget of one forward: halved when the device is out of memory, grown back slowly.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Forwards without a fault after which the budget grows by an eighth.
const GROW_AFTER: usize = 64;

#[derive(Debug)]
pub struct Budget {
    most: usize,
    now: AtomicUsize,
    good: AtomicUsize,
}

impl Budget {
    pub fn new(most: usize) -> Self {
        Self { most, now: AtomicUsize::new(most), good: AtomicUsize::new(0) }
    }

    pub fn tokens(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }

    /// A forward of `tokens` did not fit.
    pub fn shrink(&self, tokens: usize) {
        self.good.store(0, Ordering::Relaxed);
        self.now.fetch_min((tokens / 2).max(1), Ordering::Relaxed);
    }

    /// A forward fitted.
    pub fn fitted(&self) {
        let now = self.tokens();
        if now < self.most && self.good.fetch_add(1, Ordering::Relaxed) + 1 >= GROW_AFTER {
            self.good.store(0, Ordering::Relaxed);
            self.now.store((now + now.div_ceil(8)).min(self.most), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_at_once_and_grows_slowly_to_what_was_set() {
        let budget = Budget::new(1000);
        budget.shrink(1000);
        assert_eq!(budget.tokens(), 500);
        budget.shrink(900);
        assert_eq!(budget.tokens(), 450, "a smaller batch that fails counts");
        for _ in 0..GROW_AFTER - 1 {
            budget.fitted();
        }
        assert_eq!(budget.tokens(), 450);
        budget.fitted();
        assert_eq!(budget.tokens(), 507);
        for _ in 0..20 * GROW_AFTER {
            budget.fitted();
        }
        assert_eq!(budget.tokens(), 1000);
    }
}
