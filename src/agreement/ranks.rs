//! Rankings: whether the first places are equal, and how much the first ten overlap.

use std::collections::HashSet;

use serde_json::Value;

use super::{Detail, Measure, Pair, Strength, Unlike, read};

pub(super) const MEASURES: &[Measure] = &[
    Measure {
        name: "top_equal",
        means: "share of records with the same first place",
        best: 1.0,
        is_share: true,
    },
    Measure {
        name: "rank_overlap",
        means: "average overlap of the first places, of the first two, and so on to the first ten",
        best: 1.0,
        is_share: false,
    },
];

/// Places that count.
const DEPTH: usize = 10;

pub(super) fn compare(a: &[u8], b: &[u8], member: &str) -> Result<Pair, Unlike> {
    let (a, b) = (ranked(a, member)?, ranked(b, member)?);
    let top = if a.first() == b.first() { 1.0 } else { 0.0 };
    let depth = a.len().max(b.len()).min(DEPTH);
    let overlap = if depth == 0 { 1.0 } else { overlap(&a, &b, depth) };
    Ok(Pair {
        values: vec![top, overlap],
        strength: Strength(1.0 - top, 1.0 - overlap),
        detail: Detail::None,
    })
}

/// The mean over all depths of the share of the places down to there that both have: the average overlap of Fagin, Kumar
/// and Sivakumar, "Comparing top k lists".
fn overlap(a: &[String], b: &[String], depth: usize) -> f64 {
    let (mut seen_a, mut seen_b, mut both, mut sum) = (HashSet::new(), HashSet::new(), 0, 0.0);
    for place in 0..depth {
        let (x, y) = (a.get(place), b.get(place));
        if x.is_some() && x == y {
            both += 1;
        } else {
            both += usize::from(x.is_some_and(|x| seen_b.contains(x)));
            both += usize::from(y.is_some_and(|y| seen_a.contains(y)));
        }
        seen_a.extend(x);
        seen_b.extend(y);
        sum += both as f64 / (place + 1) as f64;
    }
    sum / depth as f64
}

/// What is ranked: by its index in the record if it has one, else by its id.
fn ranked(json: &[u8], member: &str) -> Result<Vec<String>, Unlike> {
    let prediction: Value = read(json)?;
    let list = prediction.get(member).and_then(Value::as_array).ok_or(Unlike::Unreadable)?;
    let name = |one: &Value| one.get("index").or_else(|| one.get("id")).map(Value::to_string);
    list.iter().map(|one| name(one).ok_or(Unlike::Unreadable)).collect()
}
