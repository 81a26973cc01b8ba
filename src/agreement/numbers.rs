//! Tensors and forecasts: numbers in nested lists.

use serde_json::Value;

use super::{Detail, Measure, Pair, Strength, Unlike, read};

pub(super) const MEASURES: &[Measure] = &[
    Measure { name: "equal", means: "share of records with equal values", best: 1.0, is_share: true },
    Measure {
        name: "relative_difference",
        means: "length of the difference over the length of the longer one, of the output that differs most",
        best: 0.0,
        is_share: false,
    },
    Measure {
        name: "absolute_difference",
        means: "mean absolute difference of a record's numbers",
        best: 0.0,
        is_share: false,
    },
];

/// Sums over the numbers of one output.
#[derive(Default)]
struct Sums {
    difference: f64,
    a: f64,
    b: f64,
    absolute: f64,
    numbers: u64,
    /// Texts, booleans and nulls that differ.
    others: u64,
}

/// `fields`: the members to compare. Each is an output, or each of its members is.
pub(super) fn compare(a: &[u8], b: &[u8], fields: &[String]) -> Result<Pair, Unlike> {
    let (a, b): (Value, Value) = (read(a)?, read(b)?);
    let (mut relative, mut absolute, mut numbers, mut found) = (0.0f64, 0.0, 0, false);
    let mut output = |a: &Value, b: &Value| {
        let mut sums = Sums::default();
        walk(a, b, &mut sums)?;
        relative = relative.max(sums.relative());
        absolute += sums.absolute;
        numbers += sums.numbers;
        Ok::<(), Unlike>(())
    };
    for field in fields {
        let (a, b) = match (a.get(field), b.get(field)) {
            (Some(a), Some(b)) => (a, b),
            // It is optional.
            (None, None) => continue,
            _ => return Err(Unlike::Unreadable),
        };
        found = true;
        match (a, b) {
            (Value::Object(a), Value::Object(b)) => {
                if a.len() != b.len() {
                    return Err(Unlike::Shape);
                }
                for (name, a) in a {
                    output(a, b.get(name).ok_or(Unlike::Shape)?)?;
                }
            }
            (a, b) => output(a, b)?,
        }
    }
    if !found {
        return Err(Unlike::Unreadable);
    }
    let absolute = if numbers > 0 { absolute / numbers as f64 } else { 0.0 };
    let equal = if relative == 0.0 { 1.0 } else { 0.0 };
    Ok(Pair {
        values: vec![equal, relative, absolute],
        strength: Strength(relative, absolute),
        detail: Detail::None,
    })
}

impl Sums {
    fn relative(&self) -> f64 {
        let longer = self.a.max(self.b).sqrt();
        if self.others > 0 {
            1.0
        } else if longer > 0.0 && longer.is_finite() {
            self.difference.sqrt() / longer
        } else if self.difference > 0.0 {
            // The squares are too large for a number.
            1.0
        } else {
            0.0
        }
    }
}

fn walk(a: &Value, b: &Value, sums: &mut Sums) -> Result<(), Unlike> {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => {
            if a.len() != b.len() {
                return Err(Unlike::Shape);
            }
            a.iter().zip(b).try_for_each(|(a, b)| walk(a, b, sums))
        }
        (Value::Object(a), Value::Object(b)) => {
            if a.len() != b.len() {
                return Err(Unlike::Shape);
            }
            a.iter().try_for_each(|(name, a)| walk(a, b.get(name).ok_or(Unlike::Shape)?, sums))
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap_or(0.0), b.as_f64().unwrap_or(0.0));
            sums.difference += (a - b) * (a - b);
            sums.a += a * a;
            sums.b += b * b;
            sums.absolute += (a - b).abs();
            sums.numbers += 1;
            Ok(())
        }
        (Value::Array(_) | Value::Object(_), _) | (_, Value::Array(_) | Value::Object(_)) => {
            Err(Unlike::Shape)
        }
        (a, b) => {
            sums.others += u64::from(a != b);
            Ok(())
        }
    }
}
