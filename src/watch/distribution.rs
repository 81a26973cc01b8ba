//! Distributions as counts in bins, and how far two of them are apart. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ENTITIES, ENTROPY, LABEL, SCORE, Tally};

/// A distribution, as a reference file has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Distribution {
    /// Counts by label.
    Labels { labels: BTreeMap<String, u64> },
    /// Counts of values between edges, in ascending order: below the first edge, from each edge to the next, and from the
    /// last one on.
    Values { edges: Vec<f32>, counts: Vec<u64> },
}

/// Parts of about equal size that values are divided into.
const PARTS: usize = 10;

impl Distribution {
    /// The distribution of labels in a tally; `None` if it has none.
    pub fn of_labels(tally: &Tally) -> Option<Self> {
        let labels: BTreeMap<String, u64> =
            tally.labels().map(|(label, count)| (label.to_owned(), count)).collect();
        (!labels.is_empty()).then_some(Self::Labels { labels })
    }

    /// The distribution of values, with edges between tenths of them; `None` if there are none. A value that fills a
    /// tenth or more has a bin of its own, so that a change away from it, to either side, shows.
    pub fn of_values(values: &[f32]) -> Option<Self> {
        let mut sorted: Vec<f32> = values.iter().copied().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f32::total_cmp);
        if sorted.is_empty() {
            return None;
        }
        let at = |part: usize| sorted[(sorted.len() * part / PARTS).min(sorted.len() - 1)];
        let mut edges = Vec::new();
        for part in 0..PARTS {
            let (edge, next) = (at(part), at(part + 1));
            if part > 0 {
                edges.push(edge);
            }
            if edge == next {
                edges.extend([edge, edge.next_up()]);
            }
        }
        edges.sort_by(f32::total_cmp);
        edges.dedup();
        let mut counts = vec![0; edges.len() + 1];
        for value in sorted {
            counts[bin(&edges, value)] += 1;
        }
        Some(Self::Values { edges, counts })
    }

    /// The distributions of a tally, by name.
    pub fn all(tally: &Tally) -> BTreeMap<String, Self> {
        let found = [
            (LABEL, Self::of_labels(tally)),
            (SCORE, Self::of_values(&tally.scores)),
            (ENTROPY, Self::of_values(&tally.entropies)),
            (ENTITIES, Self::of_values(&tally.entities)),
        ];
        found.into_iter().filter_map(|(name, of)| Some((name.to_owned(), of?))).collect()
    }

    /// Number of bins. Labels have one more, for labels that the distribution does not have.
    pub fn bins(&self) -> usize {
        match self {
            Self::Labels { labels } => labels.len() + 1,
            Self::Values { counts, .. } => counts.len(),
        }
    }

    /// The counts by bin.
    pub fn counts(&self) -> Vec<u64> {
        match self {
            Self::Labels { labels } => labels.values().copied().chain([0]).collect(),
            Self::Values { counts, .. } => counts.clone(),
        }
    }

    /// Adds what a tally has of the distribution `name` to counts by bin.
    ///
    /// # Panics
    /// If there are fewer counts than bins.
    pub fn add(&self, name: &str, tally: &Tally, counts: &mut [u64]) {
        match self {
            Self::Labels { labels } => {
                for (label, count) in tally.labels() {
                    let known = labels.keys().position(|known| known == label);
                    counts[known.unwrap_or(labels.len())] += count;
                }
            }
            Self::Values { edges, .. } => {
                let values = match name {
                    SCORE => &tally.scores,
                    ENTROPY => &tally.entropies,
                    ENTITIES => &tally.entities,
                    _ => return,
                };
                for value in values.iter().filter(|value| value.is_finite()) {
                    counts[bin(edges, *value)] += 1;
                }
            }
        }
    }

    /// Whether it can be used: edges ascend, every bin has a count, and something was counted.
    pub fn is_valid(&self) -> bool {
        let counted = self.counts().iter().any(|&count| count > 0);
        counted
            && match self {
                Self::Labels { .. } => true,
                Self::Values { edges, counts } => {
                    edges.windows(2).all(|pair| pair[0] < pair[1]) && counts.len() == edges.len() + 1
                }
            }
    }
}

/// The bin of a value: the number of edges that are not above it.
fn bin(edges: &[f32], value: f32) -> usize {
    edges.partition_point(|edge| *edge <= value)
}

/// Added to each count, so that a bin that is empty on one side has a finite logarithm.
const SMOOTHING: f64 = 0.5;

/// The population stability index, Σ (q - p) ln(q / p) over the bins: 0 for equal shares; from about 0.1 on the
/// distributions differ, from about 0.25 on strongly. Bins that are empty on both sides do not count.
pub fn psi(reference: &[u64], live: &[u64]) -> f64 {
    let bins: Vec<(f64, f64)> = (reference.iter().zip(live))
        .filter(|(a, b)| **a + **b > 0)
        .map(|(a, b)| (*a as f64 + SMOOTHING, *b as f64 + SMOOTHING))
        .collect();
    let (of_reference, of_live) = bins.iter().fold((0.0, 0.0), |(a, b), (one, other)| (a + one, b + other));
    bins.iter()
        .map(|(a, b)| {
            let (p, q) = (a / of_reference, b / of_live);
            (q - p) * (q / p).ln()
        })
        .sum()
}

/// The Jensen-Shannon distance with base 2: the square root of the divergence, from 0 (equal shares) to 1 (no bin in
/// common). 0 if one side is empty.
pub fn js_distance(reference: &[u64], live: &[u64]) -> f64 {
    let sum = |counts: &[u64]| counts.iter().sum::<u64>() as f64;
    let (of_reference, of_live) = (sum(reference), sum(live));
    if of_reference == 0.0 || of_live == 0.0 {
        return 0.0;
    }
    let part = |share: f64, mean: f64| if share > 0.0 { share * (share / mean).log2() } else { 0.0 };
    let divergence: f64 = (reference.iter().zip(live))
        .map(|(&a, &b)| {
            let (p, q) = (a as f64 / of_reference, b as f64 / of_live);
            let mean = (p + q) / 2.0;
            (part(p, mean) + part(q, mean)) / 2.0
        })
        .sum();
    divergence.clamp(0.0, 1.0).sqrt()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_values() {
        assert_eq!(js_distance(&[5, 5], &[50, 50]), 0.0);
        assert_eq!(js_distance(&[5, 0], &[0, 7]), 1.0);
        // scipy.spatial.distance.jensenshannon([0.1, 0.9], [0.5, 0.5], base=2)
        assert!(
            (js_distance(&[1, 9], &[5, 5]) - 0.383_135_9).abs() < 1e-6,
            "{}",
            js_distance(&[1, 9], &[5, 5])
        );
        // Many records, so that smoothing does not matter: (0.5 - 0.1) ln 5 + (0.5 - 0.9) ln (5 / 9).
        let expected = 0.4 * 5f64.ln() - 0.4 * (5f64 / 9.0).ln();
        assert!((psi(&[1_000_000, 9_000_000], &[5_000_000, 5_000_000]) - expected).abs() < 1e-5);
    }

    #[test]
    fn a_value_that_is_frequent_has_its_own_bin() {
        let values: Vec<f32> = [vec![1.0; 70], vec![0.5; 20], vec![0.0; 10]].concat();
        let Some(Distribution::Values { edges, counts }) = Distribution::of_values(&values) else { panic!() };
        assert!(edges.contains(&1.0) && edges.contains(&1f32.next_up()), "{edges:?}");
        assert_eq!(counts[bin(&edges, 1.0)], 70);
        assert_ne!(bin(&edges, 0.9), bin(&edges, 1.0));
        let one = Distribution::of_values(&[0.0; 9]).unwrap();
        assert_eq!(one.counts(), [0, 9, 0], "a change to either side shows");
        assert!(one.is_valid() && Distribution::of_values(&[]).is_none());
    }

    #[test]
    fn labels_that_the_reference_does_not_have_are_counted() {
        let mut tally = Tally::default();
        for label in ["a", "b", "b"] {
            tally.add_label(label);
        }
        let of = Distribution::of_labels(&tally).unwrap();
        tally.add_label("c");
        let mut counts = vec![0; of.bins()];
        of.add(LABEL, &tally, &mut counts);
        assert_eq!((of.counts(), counts), (vec![1, 2, 0], vec![1, 2, 1]));
    }

    proptest! {
        #[test]
        fn both_measures_are_zero_for_equals_and_never_negative(
            a in proptest::collection::vec(0u64..1000, 1..12), b in proptest::collection::vec(0u64..1000, 12),
        ) {
            let b = &b[..a.len()];
            prop_assert!(psi(&a, &a).abs() < 1e-9 && js_distance(&a, &a) < 1e-6);
            prop_assert!(psi(&a, b) >= -1e-12);
            prop_assert!((0.0..=1.0).contains(&js_distance(&a, b)));
            prop_assert!((js_distance(&a, b) - js_distance(b, &a)).abs() < 1e-9);
        }

        #[test]
        fn tenths_of_different_values_are_equal(count in 20usize..400) {
            let values: Vec<f32> = (0..count).map(|i| i as f32).collect();
            let of = Distribution::of_values(&values).unwrap();
            prop_assert_eq!(of.counts().iter().sum::<u64>(), count as u64);
            prop_assert_eq!(of.bins(), 10);
            prop_assert!(of.counts().iter().all(|&n| n.abs_diff(count as u64 / 10) <= 1));
        }

        /// A reference that is written and read again has the same bins.
        #[test]
        fn edges_survive_the_file(values in proptest::collection::vec(-4f32..4.0, 1..100)) {
            let of = Distribution::of_values(&values).unwrap();
            let read: Distribution = serde_json::from_str(&serde_json::to_string(&of).unwrap()).unwrap();
            prop_assert_eq!(read, of);
        }
    }
}
