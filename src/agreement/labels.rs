//! Classifications: whether the labels are equal, and how far their scores are apart.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Detail, Measure, Pair, Strength, Unlike, read};

pub(super) const MEASURES: &[Measure] = &[
    Measure { name: "label_equal", means: "share of records with the same label", best: 1.0, is_share: true },
    Measure {
        name: "score_distance",
        means: "largest difference between the two scores of a label",
        best: 0.0,
        is_share: false,
    },
];

#[derive(Deserialize)]
struct Prediction {
    label: String,
    scores: BTreeMap<String, f64>,
}

/// A label that one of the two does not list, as with `task.top_k`, counts with a score of 0 there.
pub(super) fn compare(a: &[u8], b: &[u8]) -> Result<Pair, Unlike> {
    let (a, b): (Prediction, Prediction) = (read(a)?, read(b)?);
    let of = |scores: &BTreeMap<String, f64>, label: &String| scores.get(label).copied().unwrap_or(0.0);
    let labels = a.scores.keys().chain(b.scores.keys());
    let distance =
        labels.map(|label| (of(&a.scores, label) - of(&b.scores, label)).abs()).fold(0.0, f64::max);
    let equal = if a.label == b.label { 1.0 } else { 0.0 };
    Ok(Pair {
        values: vec![equal, distance],
        strength: Strength(1.0 - equal, distance),
        detail: Detail::Labels(a.label, b.label),
    })
}
