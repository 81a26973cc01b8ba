//! LinearClassifier and LinearRegressor.

use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

use super::scores::{Transform, largest};
use super::{Built, Classes, Operator, Shape, built, floats, matrix, rows_of, tensor};

/// Rows of coefficients, one for each score, and the scores' intercepts.
#[derive(Debug)]
struct Linear {
    coefficients: Vec<f32>,
    intercepts: Vec<f32>,
    scores: usize,
    transform: Transform,
}

impl Linear {
    fn new(node: &NodeProto, scores: usize) -> TractResult<Self> {
        let coefficients: Vec<f32> = node.get_attr_vec("coefficients")?;
        let intercepts = node.get_attr_opt_vec::<f32>("intercepts")?.unwrap_or_default();
        if scores == 0 || !coefficients.len().is_multiple_of(scores) {
            bail!("{} coefficients do not fit {scores} scores", coefficients.len());
        }
        if !intercepts.is_empty() && intercepts.len() != scores {
            bail!("{} intercepts do not fit {scores} scores", intercepts.len());
        }
        Ok(Self { coefficients, intercepts, scores, transform: Transform::of(node)? })
    }

    /// The scores of each row, not transformed.
    fn sums(&self, input: &Tensor) -> TractResult<Vec<f32>> {
        let (rows, columns) = matrix(input.shape())?;
        if columns * self.scores != self.coefficients.len() {
            let takes = self.coefficients.len() / self.scores;
            bail!("takes {takes} columns, not {columns}");
        }
        let values = floats(input)?;
        let mut sums = Vec::with_capacity(rows * self.scores);
        for row in values.chunks(columns.max(1)) {
            for (i, coefficients) in self.coefficients.chunks(columns.max(1)).enumerate() {
                let sum: f32 = row.iter().zip(coefficients).map(|(x, c)| x * c).sum();
                sums.push(sum + self.intercepts.get(i).copied().unwrap_or(0.0));
            }
        }
        Ok(sums)
    }
}

#[derive(Debug)]
struct Classifier {
    linear: Linear,
    classes: Classes,
}

pub fn classifier(node: &NodeProto) -> Built {
    let classes = Classes::of(node)?;
    // Two classes may share one score.
    let intercepts = node.get_attr_opt_vec::<f32>("intercepts")?.unwrap_or_default().len();
    let scores = if classes.len() == 2 && intercepts == 1 { 1 } else { classes.len() };
    built(Classifier { linear: Linear::new(node, scores)?, classes })
}

impl Operator for Classifier {
    fn name(&self) -> &'static str {
        "LinearClassifier"
    }

    fn output_count(&self) -> usize {
        2
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        self.classes.outputs(&inputs[0].1, self.classes.len())
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let sums = self.linear.sums(&inputs[0])?;
        let (mut winners, mut scores) = (Vec::new(), Vec::new());
        for row in sums.chunks(self.linear.scores) {
            match row {
                &[sum] if self.classes.len() == 2 => {
                    winners.push(usize::from(sum > 0.0));
                    let mut one = [sum];
                    self.linear.transform.apply(&mut one);
                    scores.extend([1.0 - one[0], one[0]]);
                }
                row => {
                    winners.push(largest(row));
                    let before = scores.len();
                    scores.extend_from_slice(row);
                    self.linear.transform.apply(&mut scores[before..]);
                }
            }
        }
        let shape = [winners.len(), self.classes.len()];
        Ok(tvec!(self.classes.tensor(&winners)?, tensor(&shape, scores)?))
    }
}

#[derive(Debug)]
struct Regressor(Linear);

pub fn regressor(node: &NodeProto) -> Built {
    let targets = node.get_attr_opt::<usize>("targets")?.unwrap_or(1);
    built(Regressor(Linear::new(node, targets)?))
}

impl Operator for Regressor {
    fn name(&self) -> &'static str {
        "LinearRegressor"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        Ok(tvec!((DatumType::F32, tvec!(rows_of(&inputs[0].1)?, self.0.scores.to_dim()))))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let mut sums = self.0.sums(&inputs[0])?;
        sums.chunks_mut(self.0.scores).for_each(|row| self.0.transform.apply(row));
        Ok(tvec!(tensor(&[sums.len() / self.0.scores, self.0.scores], sums)?))
    }
}
