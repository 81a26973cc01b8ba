//! Compares the predictions of two versions of a model for the same records. Pure.
//!
//! What a prediction decides (its label, its best result, its entities) agrees or does not; vectors of numbers are compared
//! by their cosine.

use serde::Serialize;
use serde_json::Value;

use crate::agreement::floats;
use crate::flow::{Encoded, Outcome};

/// How alike the predictions of two versions are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Records that were compared.
    pub records: usize,
    /// Records that have a prediction of one version only; of the other they would be dead letters.
    pub only_before: usize,
    pub only_now: usize,
    /// Share of the records with two predictions that decide the same; `None` if they decide nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    /// Mean cosine of the two predictions' vectors; `None` if they have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cosine: Option<f64>,
}

/// Why a version cannot follow another: readers could not use both.
#[derive(Debug, thiserror::Error)]
#[error(
    "its embeddings have {now} values, and those of the version that runs have {before}: vectors of the two cannot be \
     compared; run it in a job with an output topic of its own"
)]
pub struct OtherLength {
    before: usize,
    now: usize,
}

/// A record's prediction; `None`: it has none.
pub type Prediction = Option<Value>;

/// The predictions of a window, in JSON.
pub fn predictions(window: &Encoded) -> Vec<Prediction> {
    let prediction = |outcome: &Outcome| match outcome {
        Outcome::Prediction { part, bytes } => serde_json::from_slice(window.prediction(*part, bytes)).ok(),
        _ => None,
    };
    window.outcomes.iter().map(prediction).collect()
}

/// Compares the predictions of two versions for the same records.
///
/// # Errors
/// Their embeddings have different lengths.
pub fn compare(before: &[Prediction], now: &[Prediction]) -> Result<Comparison, OtherLength> {
    let records = before.len();
    let mut found = Comparison { records, only_before: 0, only_now: 0, agreement: None, cosine: None };
    let (mut agree, mut decide, mut cosines) = (0, 0, Vec::new());
    for pair in before.iter().zip(now) {
        let (before, now) = match pair {
            (Some(before), Some(now)) => (before, now),
            (Some(_), None) => {
                found.only_before += 1;
                continue;
            }
            (None, Some(_)) => {
                found.only_now += 1;
                continue;
            }
            (None, None) => continue,
        };
        if let (Some(one), Some(other)) = (decision(before), decision(now)) {
            decide += 1;
            agree += usize::from(one == other);
        }
        let (Some(one), Some(other)) = (vector(before), vector(now)) else { continue };
        if one.len() != other.len() {
            if before.get("embedding").is_some() {
                return Err(OtherLength { before: one.len(), now: other.len() });
            }
            continue;
        }
        cosines.extend(cosine(&one, &other));
    }
    found.agreement = (decide > 0).then(|| f64::from(agree as u32) / f64::from(decide));
    found.cosine = (!cosines.is_empty()).then(|| cosines.iter().sum::<f64>() / cosines.len() as f64);
    Ok(found)
}

/// What a prediction decides: the label, the entities, the best result or match.
fn decision(prediction: &Value) -> Option<Value> {
    let best = |list: &str, key: &str| prediction[list].get(0).and_then(|best| best.get(key)).cloned();
    if let Some(label) = prediction.get("label") {
        return Some(label.clone());
    }
    if let Some(entities) = prediction.get("entities").and_then(Value::as_array) {
        let place = |entity: &Value| ["label", "start", "end"].map(|key| entity[key].clone());
        return Some(entities.iter().map(|entity| Value::from(place(entity).to_vec())).collect());
    }
    best("results", "index").or_else(|| best("matches", "id"))
}

/// The numbers of a prediction that is a vector or a series: in `embedding`, `mean` or `outputs`.
fn vector(prediction: &Value) -> Option<Vec<f64>> {
    let member = ["embedding", "mean", "outputs"].iter().find_map(|name| prediction.get(name))?;
    if let Some(text) = member.as_str() {
        return floats(text);
    }
    let mut numbers = Vec::new();
    collect(member, &mut numbers);
    (!numbers.is_empty()).then_some(numbers)
}

fn collect(value: &Value, numbers: &mut Vec<f64>) {
    match value {
        Value::Number(number) => numbers.extend(number.as_f64()),
        Value::Array(values) => values.iter().for_each(|value| collect(value, numbers)),
        Value::Object(members) => members.values().for_each(|value| collect(value, numbers)),
        _ => {}
    }
}

/// `None` if one of them has no direction.
fn cosine(one: &[f64], other: &[f64]) -> Option<f64> {
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let lengths = (product(one, one) * product(other, other)).sqrt();
    (lengths > 0.0).then(|| product(one, other) / lengths)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(pairs: &[(Value, Value)]) -> Comparison {
        let some = |value: &Value| (!value.is_null()).then(|| value.clone());
        let (before, now): (Vec<_>, Vec<_>) =
            pairs.iter().map(|(one, other)| (some(one), some(other))).unzip();
        compare(&before, &now).unwrap()
    }

    #[test]
    fn labels_agree_or_not() {
        let label = |label: &str, score: f64| json!({ "label": label, "score": score });
        let found = of(&[
            (label("a", 0.9), label("a", 0.6)),
            (label("a", 0.9), label("b", 0.9)),
            (label("b", 0.9), label("b", 0.9)),
            (label("b", 0.9), label("b", 0.9)),
            (label("b", 0.9), Value::Null),
            (Value::Null, label("b", 0.9)),
            (Value::Null, Value::Null),
        ]);
        let want =
            Comparison { records: 7, only_before: 1, only_now: 1, agreement: Some(0.75), cosine: None };
        assert_eq!(found, want);
    }

    #[test]
    fn other_decisions_agree_or_not() {
        let entity =
            |start: u32, score: f64| json!({ "label": "ORG", "start": start, "end": 9, "score": score });
        let pairs = [
            (json!({ "entities": [entity(1, 0.5)] }), json!({ "entities": [entity(1, 0.7)] })),
            (json!({ "entities": [entity(1, 0.5)] }), json!({ "entities": [entity(2, 0.5)] })),
            (json!({ "entities": [] }), json!({ "entities": [] })),
            (json!({ "results": [{ "index": 2 }, { "index": 0 }] }), json!({ "results": [{ "index": 2 }] })),
            (json!({ "matches": [{ "id": "x" }] }), json!({ "matches": [{ "id": "y" }] })),
        ];
        let found = of(&pairs);
        assert_eq!((found.agreement, found.cosine), (Some(0.6), None));
    }

    #[test]
    fn vectors_have_a_cosine() {
        // The values 1 and 0, as little-endian f32.
        let base64 = json!({ "embedding": "AACAPwAAAAA=" });
        for (one, other, want) in [
            (json!({ "embedding": [1.0, 0.0] }), json!({ "embedding": [2.0, 0.0] }), 1.0),
            (json!({ "embedding": [1.0, 0.0] }), json!({ "embedding": [0.0, 1.0] }), 0.0),
            (base64.clone(), base64, 1.0),
            (json!({ "mean": [3, 4] }), json!({ "mean": [4, 3] }), 0.96),
            (
                json!({ "outputs": { "y": [[1.0, 1.0]] } }),
                json!({ "outputs": { "y": [[-1.0, -1.0]] } }),
                -1.0,
            ),
        ] {
            let cosine = of(&[(one.clone(), other)]).cosine.unwrap();
            assert!((cosine - want).abs() < 1e-9, "{one}: {cosine}");
        }
        assert_eq!(of(&[(json!({ "embedding": [0.0] }), json!({ "embedding": [1.0] }))]).cosine, None);
    }

    #[test]
    fn embeddings_of_another_length_cannot_follow() {
        let of_length = |length| [Some(json!({ "embedding": vec![1.0; length] }))];
        let error = compare(&of_length(2), &of_length(3)).unwrap_err().to_string();
        assert!(error.contains("have 3 values") && error.contains("have 2"), "{error}");
        // A model may predict more or fewer points for one series.
        assert_eq!(of(&[(json!({ "mean": [1.0] }), json!({ "mean": [1.0, 2.0] }))]).cosine, None);
    }
}
