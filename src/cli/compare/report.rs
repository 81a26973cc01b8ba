//! The figures of a comparison. As JSON, this is the report itself.

use std::collections::BTreeMap;

use serde::Serialize;

use super::join::Found;
use super::tally::{Example, Pairs, Side};
use crate::agreement::distribution::{Distribution, EDGES, significant};
use crate::agreement::{Measure, Unlike, f1};
use crate::cli::offsets::Offsets;
use crate::kafka::range::Point;
use crate::record::Partition;
use crate::settings::{Cost, Settings};

/// Offset ranges that a list has at most.
const RANGES: usize = 20;

#[derive(Serialize)]
pub(super) struct Report {
    pub task: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    pub a: TopicReport,
    pub b: TopicReport,
    pub coverage: Coverage,
    pub agreement: Agreement,
    /// The strongest first.
    pub disagreements: Vec<Disagreement>,
}

#[derive(Serialize)]
pub(super) struct TopicReport {
    pub topic: String,
    /// Positions with a prediction or a tombstone.
    pub positions: u64,
    pub tombstones: u64,
    /// Positions with more than one prediction or tombstone, of which the first counts.
    pub doubled: u64,
    /// Records that are no predictions of the input.
    pub others: u64,
    pub models: Vec<Model>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub published: Option<Published>,
}

#[derive(Serialize)]
pub(super) struct Model {
    /// 16 hex digits; empty if the predictions do not say.
    pub digest: String,
    pub model: String,
    pub positions: u64,
}

/// How fast the predictions came, by timestamps that tell when they were published.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Published {
    /// Between the first and the last.
    pub seconds: f64,
    pub records_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_per_million_records: Option<f64>,
}

#[derive(Serialize)]
pub(super) struct Coverage {
    pub both: u64,
    pub only_a: u64,
    pub only_b: u64,
    /// By partition: the first ranges of offsets, first and last inclusive.
    pub only_a_offsets: BTreeMap<String, Vec<(i64, i64)>>,
    pub only_b_offsets: BTreeMap<String, Vec<(i64, i64)>>,
}

#[derive(Serialize)]
pub(super) struct Agreement {
    /// Pairs of predictions that were compared.
    pub compared: u64,
    /// Pairs of two tombstones.
    pub tombstones: u64,
    /// Pairs that cannot be compared, by the reason.
    pub not_compared: BTreeMap<&'static str, u64>,
    pub measures: Vec<MeasureReport>,
    /// Of classifications: how often a has one label and b another, or the same.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<Labels>,
    /// Of entities: spans over all records, by label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spans: Option<Spans>,
    /// Pairs, or spans, whose labels are not listed, because there are too many.
    #[serde(skip_serializing_if = "is_zero")]
    pub labels_left_out: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

#[derive(Serialize)]
pub(super) struct MeasureReport {
    pub name: &'static str,
    pub means: &'static str,
    /// The value for equal predictions.
    pub best: f64,
    pub mean: Option<f64>,
    /// The value that half of the pairs reach or are better than, and so on. Not of shares.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reached_by: Option<ReachedBy>,
}

#[derive(Serialize)]
pub(super) struct ReachedBy {
    pub half: Option<f64>,
    #[serde(rename = "90%")]
    pub ninety: Option<f64>,
    #[serde(rename = "99%")]
    pub ninety_nine: Option<f64>,
    pub all: Option<f64>,
    pub histogram: Vec<Bar>,
}

#[derive(Serialize)]
pub(super) struct Bar {
    /// Distance from the best value that the pairs do not exceed; none: they exceed all others.
    pub distance_up_to: Option<f64>,
    pub pairs: u64,
}

#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Labels {
    pub a: String,
    pub b: String,
    pub pairs: u64,
}

#[derive(Serialize)]
pub(super) struct Spans {
    pub both: u64,
    pub only_a: u64,
    pub only_b: u64,
    pub f1: f64,
    pub labels: Vec<SpansOfLabel>,
}

#[derive(Serialize)]
pub(super) struct SpansOfLabel {
    pub label: String,
    pub both: u64,
    pub only_a: u64,
    pub only_b: u64,
    pub f1: f64,
}

#[derive(Serialize)]
pub(super) struct Disagreement {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub measures: BTreeMap<&'static str, f64>,
    /// Both predictions, shortened.
    pub a: String,
    pub b: String,
}

impl Report {
    pub fn new(settings: &Settings, range: (Option<Point>, Option<Point>), found: Found) -> Self {
        let Found { sides: [a, b], pairs } = found;
        let point = |point: Option<Point>| point.map(|point| point.to_string());
        let (only_a, only_a_offsets) = without(&a.positions, &b.positions);
        let (only_b, only_b_offsets) = without(&b.positions, &a.positions);
        let coverage = Coverage { both: a.len() - only_a, only_a, only_b, only_a_offsets, only_b_offsets };
        let measures = pairs.comparer.measures();
        let disagreement = |((_, partition, offset), example): (&(_, Partition, i64), &Example)| {
            let values = example.values.iter().map(|value| significant(*value));
            let [a, b] = example.shown.clone();
            Disagreement {
                topic: partition.topic.to_string(),
                partition: partition.number,
                offset: *offset,
                measures: measures.iter().map(|measure| measure.name).zip(values).collect(),
                a,
                b,
            }
        };
        Self {
            task: settings.task.kind.name(),
            from: point(range.0),
            to: point(range.1),
            disagreements: pairs.examples.iter().map(disagreement).collect(),
            agreement: Agreement::new(&pairs),
            coverage,
            a: TopicReport::new(settings, a),
            b: TopicReport::new(settings, b),
        }
    }
}

/// Number of offsets of the first that the second does not have, and their first ranges.
fn without(
    all: &BTreeMap<Partition, Offsets>,
    other: &BTreeMap<Partition, Offsets>,
) -> (u64, BTreeMap<String, Vec<(i64, i64)>>) {
    let (mut count, mut first) = (0, BTreeMap::new());
    for (partition, offsets) in all {
        let mut left = match other.get(partition) {
            Some(other) => offsets.without(other),
            None => offsets.list(),
        };
        count += left.iter().map(|(first, last)| (last - first + 1) as u64).sum::<u64>();
        left.truncate(RANGES);
        if !left.is_empty() {
            first.insert(partition.to_string(), left);
        }
    }
    (count, first)
}

impl TopicReport {
    fn new(settings: &Settings, side: Side) -> Self {
        let tells = side.appended || settings.output.timestamp.is_now();
        let models = side.models.iter().map(|((digest, model), positions)| Model {
            digest: digest.clone(),
            model: model.clone(),
            positions: *positions,
        });
        let doubled = side.doubled.values().map(Offsets::count).sum();
        Self {
            positions: side.len(),
            tombstones: side.tombstones,
            doubled,
            others: side.others,
            models: models.collect(),
            published: side
                .times
                .filter(|_| tells)
                .and_then(|times| Published::new(side.len(), times, &settings.cost)),
            topic: side.topic,
        }
    }
}

impl Published {
    /// `None` if all records have the same time.
    fn new(records: u64, (first, last): (i64, i64), cost: &Cost) -> Option<Self> {
        let seconds = (last - first) as f64 / 1000.0;
        (seconds > 0.0).then(|| Self {
            seconds,
            records_per_second: significant(records as f64 / seconds),
            // As in a drain's report.
            cost_per_million_records: cost
                .per_hour
                .map(|per_hour| significant(per_hour * seconds / 3600.0 / records as f64 * 1e6)),
        })
    }
}

impl Agreement {
    fn new(pairs: &Pairs) -> Self {
        let mut labels: Vec<Labels> = (pairs.labels.iter())
            .map(|((a, b), pairs)| Labels { a: a.clone(), b: b.clone(), pairs: *pairs })
            .collect();
        // A stable sort: equal counts stay in the order of their labels.
        labels.sort_by_key(|labels| std::cmp::Reverse(labels.pairs));
        let not_compared = |(why, pairs): (&Unlike, &u64)| (why.name(), *pairs);
        let measures = pairs.comparer.measures().iter().zip(&pairs.distributions);
        Self {
            compared: pairs.compared,
            tombstones: pairs.tombstones,
            not_compared: pairs.unlike.iter().map(not_compared).collect(),
            measures: measures.map(|(measure, all)| MeasureReport::new(measure, all)).collect(),
            labels,
            spans: (!pairs.spans.is_empty()).then(|| Spans::new(&pairs.spans)),
            labels_left_out: pairs.labels_left_out,
        }
    }
}

impl MeasureReport {
    fn new(measure: &Measure, all: &Distribution) -> Self {
        let reached_by = || ReachedBy {
            half: all.reached_by(0.5, measure),
            ninety: all.reached_by(0.9, measure),
            ninety_nine: all.reached_by(0.99, measure),
            all: all.worst(measure),
            histogram: (all.histogram().iter().enumerate())
                .map(|(bar, pairs)| Bar { distance_up_to: EDGES.get(bar).copied(), pairs: *pairs })
                .collect(),
        };
        Self {
            name: measure.name,
            means: measure.means,
            best: measure.best,
            mean: all.mean(measure),
            reached_by: (!measure.is_share).then(reached_by),
        }
    }
}

impl Spans {
    fn new(spans: &BTreeMap<String, [u64; 3]>) -> Self {
        let sum = |of: usize| spans.values().map(|counts| counts[of]).sum::<u64>();
        let all = [sum(0), sum(1), sum(2)];
        let label = |(label, counts): (&String, &[u64; 3])| {
            let [both, only_a, only_b] = *counts;
            SpansOfLabel { label: label.clone(), both, only_a, only_b, f1: significant(f1(*counts)) }
        };
        let [both, only_a, only_b] = all;
        Self { both, only_a, only_b, f1: significant(f1(all)), labels: spans.iter().map(label).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_price_is_that_of_the_time_between_the_first_and_the_last() {
        let cost = Cost { per_hour: Some(36.0) };
        let published = Published::new(1000, (5_000, 15_000), &cost).unwrap();
        assert_eq!((published.seconds, published.records_per_second), (10.0, 100.0));
        assert_eq!(published.cost_per_million_records, Some(100.0));
        assert_eq!(Published::new(1000, (5, 5), &cost), None);
    }
}
