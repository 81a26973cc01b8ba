//! Drift: how far the latest predictions are from a reference. Pure, and of bounded memory.
//!
//! The latest predictions are counted in slices. A slice that is full is closed; the oldest is dropped once the others
//! have as many predictions as the window. So the window slides by a slice, and always has at least its length, except
//! at the start.

use std::collections::VecDeque;

use super::{Reference, Tally, js_distance, psi};

/// Slices of a window.
const SLICES: usize = 20;
/// Counts for each bin below which a distance is mostly noise: the index of two samples of the same distribution is
/// about the number of bins divided by the size of the smaller one.
const COUNTS_PER_BIN: u64 = 20;

/// How far one distribution is from the reference.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The distribution's name.
    pub of: String,
    /// Population stability index.
    pub psi: f64,
    /// Jensen-Shannon distance, from 0 to 1.
    pub js: f64,
}

/// Counts of consecutive predictions.
#[derive(Debug)]
struct Slice {
    records: u64,
    /// By distribution and bin.
    counts: Vec<Vec<u64>>,
}

pub struct Drift {
    reference: Reference,
    /// Predictions that are compared.
    window: u64,
    slices: VecDeque<Slice>,
}

impl Drift {
    /// `window`: how many of the latest predictions are compared.
    pub fn new(reference: Reference, window: usize) -> Self {
        Self { reference, window: window as u64, slices: VecDeque::new() }
    }

    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// Adds the predictions that follow.
    pub fn add(&mut self, tally: &Tally) {
        let full = (self.window / SLICES as u64).max(1);
        if self.slices.back().is_none_or(|slice| slice.records >= full) {
            let counts = self.reference.distributions.values().map(|of| vec![0; of.bins()]).collect();
            self.slices.push_back(Slice { records: 0, counts });
        }
        if let Some(slice) = self.slices.back_mut() {
            slice.records += tally.records;
            for ((name, of), counts) in self.reference.distributions.iter().zip(&mut slice.counts) {
                of.add(name, tally, counts);
            }
        }
        while let Some(oldest) = self.slices.front()
            && self.records() - oldest.records >= self.window
        {
            self.slices.pop_front();
        }
    }

    /// Predictions in the window.
    pub fn records(&self) -> u64 {
        self.slices.iter().map(|slice| slice.records).sum()
    }

    /// How far each distribution is from the reference. Those with too few counts yet are left out: with fewer than a
    /// tenth of the window, or than 20 for each bin.
    pub fn measure(&self) -> Vec<Measured> {
        if self.records() < (self.window / 10).max(1) {
            return Vec::new();
        }
        let complete = self.records() >= self.window;
        let mut all = Vec::new();
        for (at, (name, of)) in self.reference.distributions.iter().enumerate() {
            let mut live = vec![0; of.bins()];
            for slice in &self.slices {
                live.iter_mut().zip(&slice.counts[at]).for_each(|(sum, count)| *sum += count);
            }
            let count: u64 = live.iter().sum();
            // A window that is shorter has to do.
            let enough = if complete { 1 } else { COUNTS_PER_BIN * of.bins() as u64 };
            if count < enough {
                continue;
            }
            let counts = of.counts();
            all.push(Measured {
                of: name.clone(),
                psi: psi(&counts, &live),
                js: js_distance(&counts, &live),
            });
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(label: &str, records: u64) -> Tally {
        let mut tally = Tally { records, ..Tally::default() };
        for _ in 0..records {
            tally.add_label(label);
        }
        tally
    }

    fn drift(window: usize) -> Drift {
        let mut both = tally("a", 50);
        both.append(tally("b", 50));
        Drift::new(Reference::new(&both).unwrap(), window)
    }

    fn psi_of(drift: &Drift) -> Option<f64> {
        drift.measure().first().map(|measured| measured.psi)
    }

    #[test]
    fn the_window_slides_and_stays_bounded() {
        let mut drift = drift(1000);
        for _ in 0..100 {
            drift.add(&tally("a", 25));
            drift.add(&tally("b", 25));
        }
        assert!((1000..=1050).contains(&drift.records()), "{}", drift.records());
        assert!(drift.slices.len() <= SLICES + 1);
        assert!(psi_of(&drift).unwrap() < 0.01);
        let before = psi_of(&drift).unwrap();
        for _ in 0..10 {
            drift.add(&tally("a", 50));
        }
        let half = psi_of(&drift).unwrap();
        assert!(half > before + 0.1, "{half}");
        for _ in 0..20 {
            drift.add(&tally("a", 50));
        }
        let only = drift.measure();
        assert!(only[0].psi > half && only[0].js > 0.5, "{only:?}");
        for _ in 0..30 {
            drift.add(&tally("a", 25));
            drift.add(&tally("b", 25));
        }
        assert!(psi_of(&drift).unwrap() < 0.01, "what has left the window is forgotten");
    }

    #[test]
    fn few_predictions_are_not_measured() {
        let mut drift = drift(1000);
        drift.add(&tally("a", 59));
        assert_eq!(drift.measure(), []);
        drift.add(&tally("a", 41));
        assert_eq!(drift.measure().len(), 1, "20 for each of three bins, and a tenth of the window");
    }

    #[test]
    fn a_tally_that_is_larger_than_the_window_replaces_it() {
        let mut drift = drift(200);
        drift.add(&tally("a", 150));
        drift.add(&tally("b", 5000));
        drift.add(&tally("b", 1));
        assert_eq!(drift.records(), 5001);
        drift.add(&tally("b", 250));
        assert_eq!(drift.records(), 251);
    }
}
