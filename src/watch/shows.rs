//! Which parts of a prediction are counted, and how they are read from its JSON.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::Tally;

/// What the predictions of a task show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shows {
    /// Nothing that is counted: vectors, series, tensors, or the value itself.
    Nothing,
    /// `label`, `score` and `scores`. `all`: those of every label, so that they have an entropy if they sum to 1.
    Label { all: bool },
    /// `entities`, each with `label` and `score`; there may be none.
    Entities,
    /// `results` or `matches`, each with a `score`, the best first.
    Best,
}

/// Of scores that sum to 1, how far the sum may be off: they are written as f32.
const TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Classified<'a> {
    #[serde(borrow)]
    label: Cow<'a, str>,
    #[serde(default)]
    score: f32,
    #[serde(default)]
    scores: Spread,
}

#[derive(Deserialize)]
struct Found<'a> {
    #[serde(borrow, default)]
    entities: Vec<Entity<'a>>,
}

#[derive(Deserialize)]
struct Entity<'a> {
    #[serde(borrow)]
    label: Cow<'a, str>,
    #[serde(default)]
    score: f32,
}

#[derive(Deserialize)]
struct Ranked {
    #[serde(alias = "matches", default)]
    results: Vec<Scored>,
}

#[derive(Deserialize)]
struct Scored {
    #[serde(default)]
    score: f32,
}

/// How a prediction's scores are spread over its labels.
#[derive(Debug, Default)]
struct Spread {
    labels: usize,
    sum: f64,
    /// -Σ p ln p.
    entropy: f64,
}

impl Spread {
    /// The entropy as a part of the largest possible one: 0 if one label has everything, 1 if all have the same. `None`:
    /// the scores are no distribution over two or more labels.
    fn normalized(&self) -> Option<f32> {
        let is_distribution = self.labels > 1 && (self.sum - 1.0).abs() < TOLERANCE;
        is_distribution.then(|| (self.entropy / (self.labels as f64).ln()).clamp(0.0, 1.0) as f32)
    }
}

impl<'de> Deserialize<'de> for Spread {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Scores;
        impl<'de> Visitor<'de> for Scores {
            type Value = Spread;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("scores by label")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Spread, A::Error> {
                let mut spread = Spread::default();
                while let Some((IgnoredAny, score)) = map.next_entry::<IgnoredAny, f32>()? {
                    let score = f64::from(score);
                    spread.labels += 1;
                    spread.sum += score;
                    if score > 0.0 {
                        spread.entropy -= score * score.ln();
                    }
                }
                Ok(spread)
            }
        }
        deserializer.deserialize_map(Scores)
    }
}

impl Shows {
    /// Counts a prediction, which is a JSON object.
    ///
    /// # Errors
    /// It does not have the parts that it should show. Nothing of it is counted.
    pub fn count(self, prediction: &[u8], tally: &mut Tally) -> serde_json::Result<()> {
        match self {
            Self::Nothing => {}
            Self::Label { all } => {
                let Classified { label, score, scores } = serde_json::from_slice(prediction)?;
                tally.add_label(&label);
                tally.scores.push(score);
                tally.entropies.extend(scores.normalized().filter(|_| all));
            }
            Self::Entities => {
                let Found { entities } = serde_json::from_slice(prediction)?;
                tally.entities.push(entities.len() as f32);
                for Entity { label, score } in entities {
                    tally.add_label(&label);
                    tally.scores.push(score);
                }
            }
            Self::Best => {
                let Ranked { results } = serde_json::from_slice(prediction)?;
                tally.scores.extend(results.first().map(|best| best.score));
            }
        }
        tally.records += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(shows: Shows, predictions: &[&str]) -> Tally {
        let mut tally = Tally::default();
        for prediction in predictions {
            shows.count(prediction.as_bytes(), &mut tally).unwrap();
        }
        tally
    }

    #[test]
    fn a_classification_has_label_score_and_entropy() {
        let even = r#"{"label":"a","score":0.5,"scores":{"a":0.5,"b":0.5},"id":7}"#;
        let sure = r#"{"label":"b\"","score":1.0,"scores":{"b\"":1.0,"a":0.0}}"#;
        let tally = counted(Shows::Label { all: true }, &[even, sure]);
        assert_eq!(tally.labels().collect::<Vec<_>>(), [("a", 1), ("b\"", 1)]);
        assert_eq!(tally.scores, [0.5, 1.0]);
        assert_eq!(tally.entropies, [1.0, 0.0]);
        assert_eq!(tally.records, 2);
        assert!(counted(Shows::Label { all: false }, &[even]).entropies.is_empty(), "not all labels");
    }

    #[test]
    fn scores_that_are_no_distribution_have_no_entropy() {
        for scores in [r#"{"a":0.9,"b":0.8}"#, r#"{"a":1.0}"#, "{}"] {
            let prediction = format!(r#"{{"label":"a","score":0.9,"scores":{scores}}}"#);
            let tally = counted(Shows::Label { all: true }, &[&prediction]);
            assert!(tally.entropies.is_empty(), "{scores}");
            assert_eq!(tally.scores, [0.9]);
        }
    }

    #[test]
    fn entities_count_by_label_and_by_record() {
        let two = r#"{"entities":[{"label":"ORG","start":0,"end":2,"text":"xy","score":0.9},{"label":"ORG","score":0.5}]}"#;
        let tally = counted(Shows::Entities, &[two, r#"{"entities":[]}"#]);
        assert_eq!(tally.labels().collect::<Vec<_>>(), [("ORG", 2)]);
        assert_eq!((tally.entities, tally.scores), (vec![2.0, 0.0], vec![0.9, 0.5]));
    }

    #[test]
    fn the_best_result_counts() {
        let results = r#"{"results":[{"index":2,"score":0.91},{"index":0,"score":0.1}]}"#;
        let matches = r#"{"matches":[{"id":"x","score":-0.5}]}"#;
        assert_eq!(counted(Shows::Best, &[results, matches, r#"{"results":[]}"#]).scores, [0.91, -0.5]);
    }

    #[test]
    fn what_is_no_such_prediction_is_an_error() {
        let mut tally = Tally::default();
        for wrong in ["{}", "[1]", "{", r#"{"label":3}"#] {
            assert!(Shows::Label { all: true }.count(wrong.as_bytes(), &mut tally).is_err(), "{wrong}");
        }
        assert_eq!(tally.records, 0);
        assert!(tally.scores.is_empty());
    }
}
