//! How much two predictions about one record agree. Pure: no Kafka, no clock.
//!
//! What is compared depends on the task, by the members of its prediction (the table [`crate::task::KINDS`]):
//!
//! ```text
//! label, scores          labels    equal labels, the largest difference of a score
//! embedding              vectors   cosine
//! indices, values        vectors   cosine
//! entities               spans     F1 over equal spans
//! results, matches       ranks     equal first places, overlap of the first ten
//! outputs, mean, …       numbers   equal values, relative and absolute difference
//! none (noop)            whole     equal bytes
//! ```

pub mod distribution;
mod labels;
mod numbers;
mod ranks;
mod spans;
mod vectors;

use std::cmp::Ordering;

use crate::settings::{self, Encoding};
use crate::task::Kind;
pub use spans::f1;
pub(crate) use vectors::floats;

/// A number that says how much two predictions agree.
#[derive(Debug, PartialEq)]
pub struct Measure {
    /// Its name in reports and metrics.
    pub name: &'static str,
    /// What it says, for readers of a report.
    pub means: &'static str,
    /// Its value for equal predictions. The distance of a value is how far it is from this one.
    pub best: f64,
    /// Its value is 0 or 1, so that its mean is a share.
    pub is_share: bool,
}

impl Measure {
    /// How far a value is from that of equal predictions, 0 or more.
    pub fn distance(&self, value: f64) -> f64 {
        (value - self.best).abs()
    }
}

/// Why two predictions cannot be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unlike {
    /// One is a tombstone and the other is not.
    Tombstone,
    /// One is not a prediction of the task.
    Unreadable,
    /// They differ in the number of values, such as vectors of different models.
    Shape,
}

impl Unlike {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tombstone => "tombstone",
            Self::Unreadable => "unreadable",
            Self::Shape => "shape",
        }
    }
}

/// How strongly two predictions disagree: the first number counts, the second decides between equal ones. Both are 0 for
/// equal predictions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strength(pub f64, pub f64);

impl Strength {
    /// Whether there is a disagreement at all.
    pub fn is_some(self) -> bool {
        self.0 > 0.0 || self.1 > 0.0
    }
}

impl Eq for Strength {}

impl Ord for Strength {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0).then(self.1.total_cmp(&other.1))
    }
}

impl PartialOrd for Strength {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// What two predictions of one task are, beyond their measures.
#[derive(Debug, PartialEq)]
pub enum Detail {
    None,
    /// Both labels.
    Labels(String, String),
    /// For each label of an entity: spans in both, only in the first, only in the second.
    Spans(Vec<(String, [u64; 3])>),
}

/// Two predictions, compared.
#[derive(Debug, PartialEq)]
pub struct Pair {
    /// One value for each of [`Comparer::measures`].
    pub values: Vec<f64>,
    pub strength: Strength,
    pub detail: Detail,
}

/// Compares the predictions of one task.
#[derive(Debug, Clone)]
pub struct Comparer(Of);

#[derive(Debug, Clone)]
enum Of {
    Labels,
    /// `bits`: an embedding is one bit per value.
    Embeddings {
        bits: bool,
    },
    Sparse,
    Spans,
    /// Name of the member with the list.
    Ranks(&'static str),
    /// Names of the members with numbers.
    Numbers(Vec<String>),
    Whole,
}

impl Comparer {
    pub fn new(task: &settings::Task) -> Self {
        let fields: Vec<String> =
            (Kind::of(task.kind).fields)(task).into_iter().map(|field| field.name).collect();
        let has = |name: &str| fields.iter().any(|field| field == name);
        Self(if fields.is_empty() {
            Of::Whole
        } else if has("label") && has("scores") {
            Of::Labels
        } else if has("embedding") {
            Of::Embeddings { bits: task.encoding == Encoding::Ubinary }
        } else if has("indices") && has("values") {
            Of::Sparse
        } else if has("entities") {
            Of::Spans
        } else if has("results") {
            Of::Ranks("results")
        } else if has("matches") {
            Of::Ranks("matches")
        } else {
            Of::Numbers(fields)
        })
    }

    /// What it measures, the most important first.
    pub fn measures(&self) -> &'static [Measure] {
        match &self.0 {
            Of::Labels => labels::MEASURES,
            Of::Embeddings { .. } | Of::Sparse => vectors::MEASURES,
            Of::Spans => spans::MEASURES,
            Of::Ranks(_) => ranks::MEASURES,
            Of::Numbers(_) => numbers::MEASURES,
            Of::Whole => WHOLE,
        }
    }

    /// Whether it compares values as they are, and not as JSON.
    pub fn is_of_bytes(&self) -> bool {
        matches!(self.0, Of::Whole)
    }

    /// Compares two predictions, as JSON (`noop`: any bytes).
    ///
    /// # Errors
    /// They cannot be compared.
    pub fn compare(&self, a: &[u8], b: &[u8]) -> Result<Pair, Unlike> {
        match &self.0 {
            Of::Labels => labels::compare(a, b),
            Of::Embeddings { bits } => vectors::compare_dense(a, b, *bits),
            Of::Sparse => vectors::compare_sparse(a, b),
            Of::Spans => spans::compare(a, b),
            Of::Ranks(member) => ranks::compare(a, b, member),
            Of::Numbers(fields) => numbers::compare(a, b, fields),
            Of::Whole => {
                let equal = if a == b { 1.0 } else { 0.0 };
                Ok(Pair { values: vec![equal], strength: Strength(1.0 - equal, 0.0), detail: Detail::None })
            }
        }
    }
}

const WHOLE: &[Measure] =
    &[Measure { name: "equal", means: "share of equal values", best: 1.0, is_share: true }];

/// Reads a prediction.
fn read<'a, T: serde::Deserialize<'a>>(json: &'a [u8]) -> Result<T, Unlike> {
    serde_json::from_slice(json).map_err(|_| Unlike::Unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::KINDS;

    fn comparer(kind: &str) -> Comparer {
        let kind = KINDS.iter().find(|entry| entry.kind.name() == kind).unwrap().kind;
        Comparer::new(&settings::Task::of(kind))
    }

    fn values(kind: &str, a: &str, b: &str) -> Vec<f64> {
        let pair = comparer(kind).compare(a.as_bytes(), b.as_bytes()).unwrap();
        assert_eq!(pair.values.len(), comparer(kind).measures().len());
        pair.values
    }

    #[test]
    fn every_task_has_a_measure_and_equal_predictions_reach_its_best() {
        for (kind, prediction) in [
            ("text-classification", r#"{"label":"a","score":0.9,"scores":{"a":0.9,"b":0.1},"id":7}"#),
            ("zero-shot-classification", r#"{"label":"a","score":0.9,"scores":{"a":0.9}}"#),
            ("image-classification", r#"{"label":"a","score":0.9,"scores":{"a":0.9}}"#),
            ("text-embedding", r#"{"embedding":[0.1,0.7,-0.3]}"#),
            ("image-embedding", r#"{"embedding":"AACAPwAAAEA="}"#),
            ("sparse-embedding", r#"{"indices":[3,9],"values":[0.5,1.5]}"#),
            ("token-classification", r#"{"entities":[{"label":"ORG","start":0,"end":5,"score":0.9}]}"#),
            ("reranking", r#"{"results":[{"index":2,"score":0.9},{"index":0,"score":0.1}]}"#),
            ("similarity", r#"{"matches":[{"id":"x","score":0.9}]}"#),
            ("tensor", r#"{"outputs":{"y":[[1.5,2.5]],"name":["a"]}}"#),
            ("forecast", r#"{"mean":[1.0,2.0],"quantiles":{"0.1":[0.5,1.0]}}"#),
            ("noop", "anything"),
        ] {
            let comparer = comparer(kind);
            let pair = comparer.compare(prediction.as_bytes(), prediction.as_bytes()).unwrap();
            for (measure, value) in comparer.measures().iter().zip(&pair.values) {
                assert_eq!(*value, measure.best, "{kind}: {}", measure.name);
            }
            assert!(!pair.strength.is_some(), "{kind}");
            if kind != "noop" {
                for other in [&b"{}"[..], b"no json", b"[]"] {
                    let found = comparer.compare(prediction.as_bytes(), other);
                    assert_eq!(found, Err(Unlike::Unreadable), "{kind}");
                }
            }
        }
        assert_eq!(values("noop", "a", "b"), [0.0]);
    }

    #[test]
    fn labels_differ() {
        let a = r#"{"label":"a","score":0.75,"scores":{"a":0.75,"b":0.25}}"#;
        let b = r#"{"label":"b","score":0.5,"scores":{"b":0.5,"c":0.375,"a":0.125}}"#;
        let pair = comparer("text-classification").compare(a.as_bytes(), b.as_bytes()).unwrap();
        assert_eq!(pair.values, [0.0, 0.625]);
        assert_eq!(pair.detail, Detail::Labels("a".to_owned(), "b".to_owned()));
        // Any two labels that differ are a stronger disagreement than any difference of scores.
        let close = r#"{"label":"b","score":0.51,"scores":{"b":0.51,"a":0.49}}"#;
        let far = r#"{"label":"a","score":1.0,"scores":{"a":1.0,"b":0.0}}"#;
        let other =
            |b: &str| comparer("text-classification").compare(a.as_bytes(), b.as_bytes()).unwrap().strength;
        assert!(other(close) > other(far) && other(far).is_some());
    }

    #[test]
    fn vectors_differ_by_their_angle() {
        assert_eq!(values("text-embedding", r#"{"embedding":[1,0]}"#, r#"{"embedding":[0,3]}"#), [0.0]);
        assert_eq!(values("text-embedding", r#"{"embedding":[1,2]}"#, r#"{"embedding":[-2,-4]}"#), [-1.0]);
        // The values 1 and 2, as little-endian f32.
        let [base64] =
            values("text-embedding", r#"{"embedding":"AACAPwAAAEA="}"#, r#"{"embedding":[1,2]}"#)[..]
        else {
            panic!("one value")
        };
        assert!((base64 - 1.0).abs() < 1e-12);
        let shape = comparer("text-embedding").compare(br#"{"embedding":[1]}"#, br#"{"embedding":[1,2]}"#);
        assert_eq!(shape, Err(Unlike::Shape));
        let sparse = values(
            "sparse-embedding",
            r#"{"indices":[1,5],"values":[3,4]}"#,
            r#"{"indices":[5,9],"values":[4,3]}"#,
        );
        assert!((sparse[0] - 16.0 / 25.0).abs() < 1e-12, "{sparse:?}");
        let none = r#"{"indices":[],"values":[]}"#;
        assert_eq!(values("sparse-embedding", none, none), [1.0]);
        assert_eq!(values("sparse-embedding", none, r#"{"indices":[1],"values":[3]}"#), [0.0]);
        let mut task =
            settings::Task::of(KINDS.iter().find(|k| k.kind.name() == "text-embedding").unwrap().kind);
        task.encoding = Encoding::Ubinary;
        // 6 of 8 bits are equal.
        let pair =
            Comparer::new(&task).compare(br#"{"embedding":[255]}"#, br#"{"embedding":[252]}"#).unwrap();
        assert_eq!(pair.values, [0.5]);
    }

    #[test]
    fn spans_differ() {
        let a = r#"{"entities":[{"label":"ORG","start":0,"end":5},{"label":"PER","start":8,"end":9}]}"#;
        let b = r#"{"entities":[{"label":"ORG","start":0,"end":5},{"label":"PER","start":8,"end":10},{"label":"ORG","start":8,"end":9}]}"#;
        let pair = comparer("token-classification").compare(a.as_bytes(), b.as_bytes()).unwrap();
        assert!((pair.values[0] - 0.4).abs() < 1e-12, "2 · 1 / (2 + 3): {:?}", pair.values);
        let expected = vec![("ORG".to_owned(), [1, 0, 1]), ("PER".to_owned(), [0, 1, 1])];
        assert_eq!(pair.detail, Detail::Spans(expected));
        let none = r#"{"entities":[]}"#;
        assert_eq!(values("token-classification", none, none), [1.0]);
        assert_eq!(values("token-classification", none, a), [0.0]);
    }

    #[test]
    fn ranks_differ() {
        let list = |of: &[u32]| {
            let all: Vec<_> = of.iter().map(|i| serde_json::json!({ "index": i, "score": 0 })).collect();
            serde_json::json!({ "results": all }).to_string()
        };
        // First places: {0} and {1} share none of 1; {0,1} and {1,0} share 2 of 2; the third both have.
        assert_eq!(values("reranking", &list(&[0, 1, 2]), &list(&[1, 0, 2])), [0.0, 2.0 / 3.0]);
        assert_eq!(values("reranking", &list(&[4, 1]), &list(&[4, 2])), [1.0, 0.75]);
        assert_eq!(values("reranking", &list(&[]), &list(&[])), [1.0, 1.0]);
        assert_eq!(values("reranking", &list(&[]), &list(&[1])), [0.0, 0.0]);
        let ids = |id: &str| format!(r#"{{"matches":[{{"id":"{id}","score":0.5}}]}}"#);
        assert_eq!(values("similarity", &ids("x"), &ids("y")), [0.0, 0.0]);
    }

    #[test]
    fn numbers_differ() {
        let a = r#"{"outputs":{"large":[1000,1000],"small":[1,0]}}"#;
        let b = r#"{"outputs":{"large":[1000,1000],"small":[0,0]}}"#;
        // The output that differs most counts, not the one with the largest values.
        assert_eq!(values("tensor", a, b), [0.0, 1.0, 0.25]);
        let text = |of: &str| format!(r#"{{"outputs":{{"y":["{of}",2.0]}}}}"#);
        assert_eq!(values("tensor", &text("a"), &text("b")), [0.0, 1.0, 0.0]);
        let shape = |b: &str| comparer("tensor").compare(a.as_bytes(), b.as_bytes());
        assert_eq!(shape(r#"{"outputs":{"large":[1000],"small":[1,0]}}"#), Err(Unlike::Shape));
        assert_eq!(shape(r#"{"outputs":{"large":[1000,1000]}}"#), Err(Unlike::Shape));
        let forecast = |mean: &str| format!(r#"{{"mean":[{mean}],"quantiles":{{}},"id":"{mean}"}}"#);
        assert_eq!(values("forecast", &forecast("4"), &forecast("3")), [0.0, 0.25, 1.0]);
    }
}
