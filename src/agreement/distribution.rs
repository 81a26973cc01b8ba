//! How a measure is distributed over many pairs, in little memory and independent of their order.

use std::collections::BTreeMap;

use super::Measure;

/// Ratio of two neighbouring bins: a percentile is at most this factor above the distance that it stands for.
const GROWTH: f64 = 1.02;
/// Distances below this count as 0 in percentiles.
const LEAST: f64 = 1e-9;
/// Distances above this count as this, so that sums do not overflow.
const MOST: f64 = 1e18;
/// Sums are integers of this many parts of 1: unlike sums of floats, they do not depend on the order.
const PARTS: f64 = (1u64 << 40) as f64;

/// Upper edges of a histogram's bars, in distances from the best value; the last bar has no edge.
pub const EDGES: [f64; 12] = [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

/// The distances of a measure's values from its best one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Distribution {
    count: u64,
    sum: i128,
    worst: f64,
    /// Number of distances in each bin, by the logarithm of its upper edge.
    bins: BTreeMap<i32, u64>,
    histogram: [u64; EDGES.len() + 1],
}

impl Distribution {
    pub fn add(&mut self, distance: f64) {
        let distance = distance.min(MOST);
        self.count += 1;
        self.sum += (distance * PARTS) as i128;
        self.worst = self.worst.max(distance);
        let bin = match distance < LEAST {
            true => i32::MIN,
            false => (distance.ln() / GROWTH.ln()).ceil() as i32,
        };
        *self.bins.entry(bin).or_default() += 1;
        self.histogram[EDGES.partition_point(|edge| *edge < distance)] += 1;
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// Numbers of distances up to each of [`EDGES`] and above the one before, and of those above the last.
    pub fn histogram(&self) -> &[u64] {
        &self.histogram
    }

    /// The measure's mean value; `None` if there are no values.
    pub fn mean(&self, measure: &Measure) -> Option<f64> {
        (self.count > 0).then(|| value(measure, self.sum as f64 / PARTS / self.count as f64))
    }

    /// The value that this share of all values reaches, or is better than; `None` if there are no values.
    pub fn reached_by(&self, share: f64, measure: &Measure) -> Option<f64> {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        let bin = self.bins.iter().find_map(|(bin, count)| {
            seen += count;
            (seen >= rank).then_some(*bin)
        })?;
        let distance = if bin == i32::MIN { 0.0 } else { GROWTH.powi(bin).min(self.worst) };
        Some(value(measure, distance))
    }

    /// The value that is farthest from the best one; `None` if there are no values.
    pub fn worst(&self, measure: &Measure) -> Option<f64> {
        (self.count > 0).then(|| value(measure, self.worst))
    }
}

/// The value at a distance, with six significant digits of the distance.
fn value(measure: &Measure, distance: f64) -> f64 {
    let distance = significant(distance);
    match measure.best > 0.0 {
        true => round(measure.best - distance),
        false => distance,
    }
}

/// Six significant digits.
pub fn significant(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// Removes the error of a subtraction.
fn round(value: f64) -> f64 {
    (value * 1e12).round() / 1e12
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const COSINE: Measure = Measure { name: "c", means: "", best: 1.0, is_share: false };
    const DISTANCE: Measure = Measure { name: "d", means: "", best: 0.0, is_share: false };

    #[test]
    fn values_are_measured_from_the_best_one() {
        let mut all = Distribution::default();
        assert_eq!((all.mean(&COSINE), all.reached_by(0.5, &COSINE), all.worst(&COSINE)), (None, None, None));
        for cosine in [1.0, 0.9, -0.5, 1.0] {
            all.add(COSINE.distance(cosine));
        }
        assert_eq!(all.mean(&COSINE), Some(0.6));
        assert_eq!(all.reached_by(0.5, &COSINE), Some(1.0));
        assert_eq!(all.worst(&COSINE), Some(-0.5));
        assert_eq!((all.histogram()[0], all.histogram()[EDGES.len()]), (2, 1));
    }

    proptest! {
        #[test]
        fn percentiles_are_near_and_independent_of_the_order(
            distances in proptest::collection::vec(0.0f64..3.0, 1..200),
            share in 0.01f64..1.0,
        ) {
            let of = |distances: &[f64]| {
                let mut all = Distribution::default();
                distances.iter().for_each(|distance| all.add(*distance));
                all
            };
            let mut sorted = distances.clone();
            sorted.sort_by(f64::total_cmp);
            prop_assert_eq!(of(&distances), of(&sorted));
            let exact = sorted[((share * sorted.len() as f64).ceil() as usize).max(1) - 1];
            let found = of(&distances).reached_by(share, &DISTANCE).unwrap();
            prop_assert!(found >= exact * 0.9999 && found <= exact * 1.021 + LEAST, "{found} for {exact}");
            let mean = sorted.iter().sum::<f64>() / sorted.len() as f64;
            prop_assert!((of(&distances).mean(&DISTANCE).unwrap() - mean).abs() < 1e-4);
        }
    }
}
