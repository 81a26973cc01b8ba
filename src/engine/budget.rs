//! The token budget of one forward pass: halved when the device is out of memory, grown back slowly.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Forward passes without running out of memory after which the budget grows by an eighth.
const GROW_AFTER: usize = 64;

#[derive(Debug)]
pub struct Budget {
    max: usize,
    now: AtomicUsize,
    fits: AtomicUsize,
}

impl Budget {
    pub fn new(max: usize) -> Self {
        Self { max, now: AtomicUsize::new(max), fits: AtomicUsize::new(0) }
    }

    pub fn tokens(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }

    /// A forward pass of `tokens` ran out of memory: lowers the budget to half of that.
    pub fn shrink(&self, tokens: usize) {
        self.fits.store(0, Ordering::Relaxed);
        self.now.fetch_min((tokens / 2).max(1), Ordering::Relaxed);
    }

    /// A forward pass fitted: after enough of them the budget grows again, up to its initial value.
    pub fn fitted(&self) {
        let now = self.tokens();
        if now < self.max && self.fits.fetch_add(1, Ordering::Relaxed) + 1 >= GROW_AFTER {
            self.fits.store(0, Ordering::Relaxed);
            self.now.store((now + now.div_ceil(8)).min(self.max), Ordering::Relaxed);
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
