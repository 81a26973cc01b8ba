//! Embeddings: the cosine of the angle between two vectors.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::{Detail, Measure, Pair, Strength, Unlike, read};

pub(super) const MEASURES: &[Measure] =
    &[Measure { name: "cosine", means: "cosine of the two vectors", best: 1.0, is_share: false }];

#[derive(Deserialize)]
struct Dense {
    embedding: Vector,
}

/// What `task.encoding` makes of a vector.
#[derive(Deserialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f64>),
    Base64(String),
}

#[derive(Deserialize)]
struct Sparse {
    indices: Vec<i64>,
    values: Vec<f64>,
}

/// `bits`: each number is a byte of eight values, of which a bit says whether it is greater than 0.
pub(super) fn compare_dense(a: &[u8], b: &[u8], bits: bool) -> Result<Pair, Unlike> {
    let (a, b) = (dense(a, bits)?, dense(b, bits)?);
    if a.len() != b.len() {
        return Err(Unlike::Shape);
    }
    Ok(pair(cosine(a.iter().copied().zip(b.iter().copied()))))
}

pub(super) fn compare_sparse(a: &[u8], b: &[u8]) -> Result<Pair, Unlike> {
    let read = |json| {
        let sparse: Sparse = read(json)?;
        match sparse.indices.len() == sparse.values.len() {
            true => Ok(sparse.indices.into_iter().zip(sparse.values)),
            false => Err(Unlike::Unreadable),
        }
    };
    let mut both: BTreeMap<i64, (f64, f64)> = BTreeMap::new();
    for (index, value) in read(a)? {
        both.entry(index).or_default().0 = value;
    }
    for (index, value) in read(b)? {
        both.entry(index).or_default().1 = value;
    }
    Ok(pair(cosine(both.into_values())))
}

/// The values of `task.encoding: base64`: little-endian f32. `None` if the text is not that.
pub(crate) fn floats(text: &str) -> Option<Vec<f64>> {
    let bytes = STANDARD.decode(text).ok()?;
    let (values, []) = bytes.as_chunks::<4>() else { return None };
    Some(values.iter().map(|value| f64::from(f32::from_le_bytes(*value))).collect())
}

fn dense(json: &[u8], bits: bool) -> Result<Vec<f64>, Unlike> {
    let Dense { embedding } = read(json)?;
    match embedding {
        Vector::Numbers(bytes) if bits => {
            let signs = |byte: f64| {
                let byte = byte as u8;
                (0..8).map(move |bit| if byte >> (7 - bit) & 1 == 1 { 1.0 } else { -1.0 })
            };
            Ok(bytes.into_iter().flat_map(signs).collect())
        }
        Vector::Numbers(numbers) => Ok(numbers),
        Vector::Base64(text) => floats(&text).ok_or(Unlike::Unreadable),
    }
}

/// The cosine of two vectors, whose values come in pairs. Two zero vectors are equal; one alone has no direction: 0.
fn cosine(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (mut product, mut a, mut b, mut equal) = (0.0, 0.0, 0.0, true);
    for (x, y) in pairs {
        product += x * y;
        a += x * x;
        b += y * y;
        equal &= x == y;
    }
    let norms = (a * b).sqrt();
    if equal {
        1.0
    } else if norms > 0.0 && norms.is_finite() {
        (product / norms).clamp(-1.0, 1.0)
    } else {
        0.0
    }
}

fn pair(cosine: f64) -> Pair {
    Pair { values: vec![cosine], strength: Strength(1.0 - cosine, 0.0), detail: Detail::None }
}
