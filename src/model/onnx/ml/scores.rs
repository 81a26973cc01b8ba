//! What classifiers and regressors do with their sums: `post_transform`, and the two columns of a binary classifier.

use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

/// `post_transform`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transform {
    None,
    Softmax,
    Logistic,
    SoftmaxZero,
    Probit,
}

impl Transform {
    pub fn of(node: &NodeProto) -> TractResult<Self> {
        Ok(match node.get_attr_opt::<&str>("post_transform")?.unwrap_or("NONE") {
            "NONE" => Self::None,
            "SOFTMAX" => Self::Softmax,
            "LOGISTIC" => Self::Logistic,
            "SOFTMAX_ZERO" => Self::SoftmaxZero,
            "PROBIT" => Self::Probit,
            other => bail!("post_transform {other} is not one of ONNX's"),
        })
    }

    /// Transforms one row of scores in place.
    pub fn apply(self, scores: &mut [f32]) {
        match self {
            Self::None => {}
            Self::Softmax => softmax(scores, |_| true),
            Self::SoftmaxZero => softmax(scores, |score| score != 0.0),
            Self::Logistic => scores.iter_mut().for_each(|score| *score = logistic(*score)),
            Self::Probit => scores.iter_mut().for_each(|score| *score = probit(*score)),
        }
    }
}

/// Scores that are not taken keep their value.
fn softmax(scores: &mut [f32], taken: impl Fn(f32) -> bool) {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut().filter(|score| taken(**score)) {
        *score = (*score - most).exp();
        sum += *score;
    }
    if sum > 0.0 {
        scores.iter_mut().filter(|score| taken(**score)).for_each(|score| *score /= sum);
    }
}

pub fn logistic(x: f32) -> f32 {
    // exp of a negative number only: no overflow on either side.
    let small = 1.0 / (1.0 + (-x.abs()).exp());
    if x < 0.0 { 1.0 - small } else { small }
}

/// √2 · erf⁻¹(2x − 1), with Winitzki's approximation of erf⁻¹, which ONNX Runtime uses too.
fn probit(x: f32) -> f32 {
    let y = 2.0 * x - 1.0;
    let log = ((1.0 - y) * (1.0 + y)).ln();
    let v = 2.0 / (std::f32::consts::PI * 0.147) + 0.5 * log;
    let root = (-v + (v * v - log / 0.147).sqrt()).sqrt();
    std::f32::consts::SQRT_2 * if y < 0.0 { -root } else { root }
}

/// The place of the largest score; of equal ones the first.
pub fn largest(scores: &[f32]) -> usize {
    let mut best = 0;
    for (i, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_transformed() {
        let apply = |transform: Transform, scores: &[f32]| {
            let mut scores = scores.to_vec();
            transform.apply(&mut scores);
            scores.iter().map(|score| (score * 1e4).round() / 1e4).collect::<Vec<f32>>()
        };
        assert_eq!(apply(Transform::Softmax, &[1.0, 1.0, 0.0]), [0.4223, 0.4223, 0.1554]);
        assert_eq!(apply(Transform::SoftmaxZero, &[1.0, 1.0, 0.0]), [0.5, 0.5, 0.0]);
        assert_eq!(apply(Transform::Logistic, &[0.0, 200.0, -200.0, 1.0]), [0.5, 1.0, 0.0, 0.7311]);
        assert_eq!(apply(Transform::Probit, &[0.5]), [0.0]);
        assert!((probit(0.975) - 1.96).abs() < 5e-3);
    }
}
