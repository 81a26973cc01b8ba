//! What is counted of each topic, and of the pairs of predictions. Nothing here depends on the order in which records come
//! from different partitions, so that the same predictions give the same report.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use rdkafka::Timestamp;
use rdkafka::message::{BorrowedMessage, Message};

use crate::agreement::distribution::Distribution;
use crate::agreement::{Comparer, Detail, Pair, Strength, Unlike};
use crate::cli::offsets::Offsets;
use crate::kafka::headers;
use crate::record::{Partition, Position};

/// Disagreements that are listed.
const LISTED: usize = 100;
/// Most pairs of labels, or labels of entities, that are counted one by one.
const MOST_LABELS: usize = 10_000;
/// Characters of a prediction that are shown.
const SHOWN: usize = 240;

/// What is counted of one topic.
#[derive(Default)]
pub(super) struct Side {
    pub topic: String,
    /// Positions with a prediction or a tombstone, by input partition.
    pub positions: BTreeMap<Partition, Offsets>,
    /// Positions with more than one.
    pub doubled: BTreeMap<Partition, Offsets>,
    pub tombstones: u64,
    /// Records that are no prediction of the input: without a position, or of another range.
    pub others: u64,
    /// Predictions by digest and name of their model.
    pub models: BTreeMap<(String, String), u64>,
    /// All records have the time at which the broker appended them.
    pub appended: bool,
    /// First and last timestamp, in milliseconds since the Unix epoch.
    pub times: Option<(i64, i64)>,
}

impl Side {
    pub fn new(topic: &str) -> Self {
        Self { topic: topic.to_owned(), appended: true, ..Self::default() }
    }

    /// Counts a record of a position. Returns false if the position had one before, which then counts.
    pub fn count(&mut self, position: &Position, message: &BorrowedMessage<'_>) -> bool {
        let time = message.timestamp();
        self.appended &= matches!(time, Timestamp::LogAppendTime(_));
        if let Some(time) = time.to_millis() {
            let (first, last) = self.times.unwrap_or((time, time));
            self.times = Some((first.min(time), last.max(time)));
        }
        let Position { partition, offset } = position;
        let all = self.positions.entry(partition.clone()).or_default();
        if !all.insert(*offset) {
            self.doubled.entry(partition.clone()).or_default().insert(*offset);
            return false;
        }
        if message.payload().is_none() {
            self.tombstones += 1;
        }
        let text = |name| {
            headers::last(message, name)
                .map(|value| String::from_utf8_lossy(value).into_owned())
                .unwrap_or_default()
        };
        *self.models.entry((text(headers::MODEL_DIGEST), text(headers::MODEL))).or_default() += 1;
        true
    }

    /// Number of positions.
    pub fn len(&self) -> u64 {
        self.positions.values().map(Offsets::count).sum()
    }
}

/// A disagreement that is listed.
pub(super) struct Example {
    /// One value for each measure.
    pub values: Vec<f64>,
    /// Both predictions, shortened.
    pub shown: [String; 2],
}

/// What is counted of the pairs.
pub(super) struct Pairs {
    pub comparer: Comparer,
    /// One for each measure.
    pub distributions: Vec<Distribution>,
    pub compared: u64,
    /// Pairs of two tombstones.
    pub tombstones: u64,
    pub unlike: BTreeMap<Unlike, u64>,
    /// Pairs by both labels.
    pub labels: BTreeMap<(String, String), u64>,
    /// By label of an entity: spans in both, only in the first, only in the second.
    pub spans: BTreeMap<String, [u64; 3]>,
    /// Pairs, or spans, that are not among these, because there are too many labels.
    pub labels_left_out: u64,
    /// The strongest first, then by position.
    pub examples: BTreeMap<(Reverse<Strength>, Partition, i64), Example>,
}

impl Pairs {
    pub fn new(comparer: Comparer) -> Self {
        Self {
            distributions: vec![Distribution::default(); comparer.measures().len()],
            comparer,
            compared: 0,
            tombstones: 0,
            unlike: BTreeMap::new(),
            labels: BTreeMap::new(),
            spans: BTreeMap::new(),
            labels_left_out: 0,
            examples: BTreeMap::new(),
        }
    }

    pub fn cannot_compare(&mut self, why: Unlike) {
        *self.unlike.entry(why).or_default() += 1;
    }

    /// Compares two predictions about the record at a position.
    pub fn compare(&mut self, position: Position, a: &[u8], b: &[u8]) {
        match self.comparer.compare(a, b) {
            Ok(pair) => self.add(position, pair, a, b),
            Err(why) => self.cannot_compare(why),
        }
    }

    fn add(&mut self, Position { partition, offset }: Position, pair: Pair, a: &[u8], b: &[u8]) {
        let Pair { values, strength, detail } = pair;
        self.compared += 1;
        let measures = self.comparer.measures();
        for ((measure, value), distribution) in measures.iter().zip(&values).zip(&mut self.distributions) {
            distribution.add(measure.distance(*value));
        }
        match detail {
            Detail::None => {}
            Detail::Labels(a, b) => {
                if self.labels.len() < MOST_LABELS || self.labels.contains_key(&(a.clone(), b.clone())) {
                    *self.labels.entry((a, b)).or_default() += 1;
                } else {
                    self.labels_left_out += 1;
                }
            }
            Detail::Spans(spans) => {
                for (label, counts) in spans {
                    if self.spans.len() < MOST_LABELS || self.spans.contains_key(&label) {
                        let sums = self.spans.entry(label).or_default();
                        sums.iter_mut().zip(counts).for_each(|(sum, more)| *sum += more);
                    } else {
                        self.labels_left_out += counts.iter().sum::<u64>();
                    }
                }
            }
        }
        let key = (Reverse(strength), partition, offset);
        let is_listed = self.examples.len() < LISTED
            || self.examples.last_key_value().is_some_and(|(last, _)| key < *last);
        if strength.is_some() && is_listed {
            self.examples.insert(key, Example { values, shown: [shortened(a), shortened(b)] });
            if self.examples.len() > LISTED {
                self.examples.pop_last();
            }
        }
    }
}

/// The beginning of a prediction.
fn shortened(value: &[u8]) -> String {
    // A character has at most four bytes.
    let text = String::from_utf8_lossy(&value[..value.len().min(4 * SHOWN + 4)]);
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Task;
    use crate::task::KINDS;

    fn pairs() -> Pairs {
        let kind = KINDS.iter().find(|entry| entry.kind.name() == "text-classification").unwrap().kind;
        Pairs::new(Comparer::new(&Task::of(kind)))
    }

    fn prediction(label: &str, score: f64) -> Vec<u8> {
        serde_json::json!({ "label": label, "score": score, "scores": { label: score } }).to_string().into()
    }

    fn at(offset: i64) -> Position {
        Position { partition: Partition::new("t", 0), offset }
    }

    #[test]
    fn the_strongest_disagreements_are_kept_in_any_order() {
        let add = |pairs: &mut Pairs, i: i64| {
            let b = prediction(if i % 3 == 0 { "b" } else { "a" }, 0.5 + 0.001 * i as f64);
            pairs.compare(at(i), &prediction("a", 0.5), &b);
        };
        let (mut forward, mut backward) = (pairs(), pairs());
        (0..400).for_each(|i| add(&mut forward, i));
        (0..400).rev().for_each(|i| add(&mut backward, i));
        let listed = |pairs: &Pairs| pairs.examples.keys().map(|key| key.2).collect::<Vec<_>>();
        assert_eq!(listed(&forward), listed(&backward));
        assert_eq!(forward.distributions, backward.distributions);
        // Differing labels come first: 134 of them, of which the farthest scores are listed.
        let expected: Vec<i64> = (0..400).rev().filter(|i| i % 3 == 0).take(LISTED).collect();
        assert_eq!(listed(&forward), expected);
        assert_eq!(forward.labels[&("a".to_owned(), "b".to_owned())], 134);
        assert_eq!(forward.compared, 400);
    }

    #[test]
    fn equal_predictions_are_no_disagreement_and_others_are_counted() {
        let mut pairs = pairs();
        pairs.compare(at(0), &prediction("a", 0.5), &prediction("a", 0.5));
        pairs.compare(at(1), &prediction("a", 0.5), b"no json");
        assert!(pairs.examples.is_empty());
        assert_eq!((pairs.compared, pairs.unlike[&Unlike::Unreadable]), (1, 1));
    }

    #[test]
    fn predictions_are_shortened_between_characters() {
        assert_eq!(shortened(b"short"), "short");
        let long = "\u{1f600}".repeat(SHOWN + 1);
        assert_eq!(shortened(long.as_bytes()), format!("{}…", "\u{1f600}".repeat(SHOWN)));
        assert_eq!(shortened("é".repeat(SHOWN).as_bytes()), "é".repeat(SHOWN));
    }
}
