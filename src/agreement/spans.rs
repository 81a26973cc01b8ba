//! Entities: those with the same label, start and end.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Detail, Measure, Pair, Strength, Unlike, read};

pub(super) const MEASURES: &[Measure] = &[Measure {
    name: "span_f1",
    means: "F1 over a record's entities with the same label, start and end (1 if neither has any)",
    best: 1.0,
    is_share: false,
}];

#[derive(Deserialize)]
struct Prediction {
    entities: Vec<Span>,
}

#[derive(Deserialize, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    label: String,
    start: u64,
    end: u64,
}

pub(super) fn compare(a: &[u8], b: &[u8]) -> Result<Pair, Unlike> {
    let (a, b): (Prediction, Prediction) = (read(a)?, read(b)?);
    // How often the first and the second have a span.
    let mut spans: BTreeMap<Span, (u64, u64)> = BTreeMap::new();
    for span in a.entities {
        spans.entry(span).or_default().0 += 1;
    }
    for span in b.entities {
        spans.entry(span).or_default().1 += 1;
    }
    let mut by_label: BTreeMap<String, [u64; 3]> = BTreeMap::new();
    for (Span { label, .. }, (in_a, in_b)) in spans {
        let both = in_a.min(in_b);
        let counts = by_label.entry(label).or_default();
        for (count, more) in counts.iter_mut().zip([both, in_a - both, in_b - both]) {
            *count += more;
        }
    }
    let sum = |of: usize| by_label.values().map(|counts| counts[of]).sum::<u64>();
    let [both, only_a, only_b] = [sum(0), sum(1), sum(2)];
    let f1 = f1([both, only_a, only_b]);
    Ok(Pair {
        values: vec![f1],
        strength: Strength(1.0 - f1, (only_a + only_b) as f64),
        detail: Detail::Spans(by_label.into_iter().collect()),
    })
}

/// F1 of the numbers of spans in both, only in the first, only in the second; 1 if there are none.
pub fn f1([both, only_a, only_b]: [u64; 3]) -> f64 {
    match 2 * both + only_a + only_b {
        0 => 1.0,
        all => (2 * both) as f64 / all as f64,
    }
}
