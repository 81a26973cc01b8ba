//! How long records will take the model, reckoned from the bytes of their values by how long those before took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::window::Window;

/// What a record costs beside its bytes: special tokens, in bytes of text.
const RECORD: usize = 16;
/// Bytes of text that make a token, about: for the first guess alone.
const BYTES_PER_TOKEN: f64 = 4.0;
/// How much the newest window counts.
const NEWEST: f64 = 0.3;
/// Windows of fewer bytes tell little.
const ENOUGH: usize = 1024;

/// Seconds of the device for each byte. Shared by the stages: one writes, the source reads.
#[derive(Debug)]
pub struct Pace(AtomicU64);

fn units(value_bytes: usize) -> usize {
    value_bytes + RECORD
}

impl Pace {
    /// A first guess, from how long a token took.
    pub fn new(seconds_per_token: f64) -> Self {
        Self(AtomicU64::new((seconds_per_token / BYTES_PER_TOKEN).to_bits()))
    }

    fn now(&self) -> f64 {
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// Seconds that the device will need for a record, on all of its lanes.
    pub fn of_record(&self, value_bytes: usize) -> f64 {
        self.now() * units(value_bytes) as f64
    }

    /// A window took so long.
    pub fn observe(&self, window: &Window, took: Duration) {
        let values = window.records.iter().filter_map(|record| window.value(record));
        let units: usize = values.map(|value| units(value.len())).sum();
        self.observe_units(units, took);
    }

    fn observe_units(&self, units: usize, took: Duration) {
        if units >= ENOUGH {
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
