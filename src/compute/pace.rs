//! Estimates how long the device needs for a record, from the bytes of its value and the speed of recent windows.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::window::Window;

/// Fixed cost of a record (its special tokens), as bytes of text.
const RECORD_OVERHEAD: usize = 16;
/// Approximate bytes of text per token, for the first estimate only.
const BYTES_PER_TOKEN: f64 = 4.0;
/// Weight of the newest window in the moving average.
const NEWEST: f64 = 0.3;
/// Windows of fewer bytes are ignored: their time says little.
const MIN_BYTES: usize = 1024;

/// Device seconds per byte, as the bits of an f64. The encode stage writes it, the source reads it.
#[derive(Debug)]
pub struct Pace(AtomicU64);

fn units(value_bytes: usize) -> usize {
    value_bytes + RECORD_OVERHEAD
}

impl Pace {
    /// Starts with an estimate from the measured time per token.
    pub fn new(seconds_per_token: f64) -> Self {
        Self::per_byte(seconds_per_token / BYTES_PER_TOKEN)
    }

    /// Starts with an estimate of the seconds per byte of a record's value.
    pub fn per_byte(seconds: f64) -> Self {
        Self(AtomicU64::new(seconds.to_bits()))
    }

    fn now(&self) -> f64 {
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// Estimated device seconds for a record, all lanes sharing the work.
    pub fn of_record(&self, value_bytes: usize) -> f64 {
        self.now() * units(value_bytes) as f64
    }

    /// Updates the estimate with the device time that a window took.
    pub fn observe(&self, window: &Window, took: Duration) {
        let units: usize = window.values().map(|value| units(value.bytes.len())).sum();
        self.observe_units(units, took);
    }

    fn observe_units(&self, units: usize, took: Duration) {
        if units >= MIN_BYTES {
            let now = self.now() + NEWEST * (took.as_secs_f64() / units as f64 - self.now());
            self.0.store(now.to_bits(), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_what_windows_took() {
        let pace = Pace::new(4e-3);
        assert!((pace.of_record(984) - 1.0).abs() < 1e-9, "1 ms a byte");
        pace.observe_units(100, Duration::from_secs(9));
        assert!((pace.of_record(984) - 1.0).abs() < 1e-9, "too little to tell");
        for _ in 0..30 {
            pace.observe_units(10_000, Duration::from_secs(1));
        }
        assert!((pace.of_record(984) - 0.1).abs() < 1e-3, "0.1 ms a byte");
    }
}
