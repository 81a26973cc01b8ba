//! Estimates how long a job will take from a sample of its records. Pure: no Kafka, no model; time and randomness come in as
//! arguments. `cli::dry_run` reads the records, runs the windows and holds the clock.
//!
//! ```text
//! places     which offsets are read: a run of records at a random place of each of many equal parts of the job
//! lengths    what is learned of all records: how many there are of each length, and the work of such a record
//! windows    which records go through the model together: each window has long and short ones in the job's proportions
//! pace       seconds per unit of work, from when the windows were answered, while the next ones were under way
//! estimator  the time of the job, its interval, and when that is known well enough
//! ```
//!
//! The time of the job is work × pace. The work is known of every record that was read, from its length; the pace of those
//! that went through the model. Windows that mirror the job cost the same as the job's on average, whatever a length has to do
//! with the time: an error in the work of a length cancels out, because work and pace are both measured with it.

mod estimator;
mod lengths;
mod pace;
mod places;
mod windows;

pub use estimator::{Enough, Estimate, Estimator, Job, limit};
pub use lengths::Lengths;
pub use places::{Place, places};
pub use windows::{Windows, windows};

/// Pseudorandom numbers by SplitMix64: for what to look at, not for secrets.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.number()) * u128::from(end)) >> 64) as u64
    }

    /// Puts items in random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

/// Half of a 95 % interval in standard errors: the 97.5 % quantile of Student's t.
pub(crate) fn quantile(degrees: usize) -> f64 {
    match degrees {
        0 => f64::INFINITY,
        1 => 12.706,
        2 => 4.303,
        3 => 3.182,
        // Within 0.3 % of the tables.
        _ => {
            let n = degrees as f64;
            1.96 + 2.372 / n + 2.82 / (n * n) + 2.5 / (n * n * n)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (degrees, table) in
            [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (9, 2.262), (30, 2.042), (1000, 1.962)]
        {
            let found = quantile(degrees);
            assert!((found / table - 1.0).abs() < 0.004, "{degrees}: {found}, not {table}");
        }
    }

    #[test]
    fn every_order_is_a_permutation_and_every_number_occurs() {
        let mut random = Random(1);
        let mut items: Vec<u32> = (0..100).collect();
        random.shuffle(&mut items);
        assert!(items.iter().enumerate().filter(|(at, item)| *at as u32 == **item).count() < 10);
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
        let mut seen = [0; 7];
        (0..7000).for_each(|_| seen[random.below(7) as usize] += 1);
        assert!(seen.iter().all(|&count| (800..1200).contains(&count)), "{seen:?}");
    }
}
