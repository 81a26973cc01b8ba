//! SVMClassifier and SVMRegressor, with support vectors or linear.

use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

use super::scores::{Transform, largest};
use super::{Built, Classes, Operator, Shape, built, floats, matrix, rows_of, tensor};

#[derive(Debug, Clone, Copy)]
enum Kernel {
    Linear,
    Poly { gamma: f32, coef0: f32, degree: f32 },
    Rbf { gamma: f32 },
    Sigmoid { gamma: f32, coef0: f32 },
}

impl Kernel {
    fn of(node: &NodeProto) -> TractResult<Self> {
        let parameters = node.get_attr_opt_vec::<f32>("kernel_params")?.unwrap_or_default();
        let parameter = |i: usize| parameters.get(i).copied().unwrap_or(0.0);
        let (gamma, coef0, degree) = (parameter(0), parameter(1), parameter(2));
        Ok(match node.get_attr_opt::<&str>("kernel_type")?.unwrap_or("LINEAR") {
            "LINEAR" => Self::Linear,
            "POLY" => Self::Poly { gamma, coef0, degree },
            "RBF" => Self::Rbf { gamma },
            "SIGMOID" => Self::Sigmoid { gamma, coef0 },
            other => bail!("kernel_type {other} is not one of ONNX's"),
        })
    }

    fn apply(self, a: &[f32], b: &[f32]) -> f32 {
        let dot = || a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        match self {
            Self::Linear => dot(),
            Self::Poly { gamma, coef0, degree } => (gamma * dot() + coef0).powf(degree),
            Self::Rbf { gamma } => {
                let distance: f32 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
                (-gamma * distance).exp()
            }
            Self::Sigmoid { gamma, coef0 } => (gamma * dot() + coef0).tanh(),
        }
    }
}

/// What both operators have.
#[derive(Debug)]
struct Machine {
    kernel: Kernel,
    vectors: Vec<f32>,
    coefficients: Vec<f32>,
    rho: Vec<f32>,
    columns: usize,
}

impl Machine {
    /// `count`: the number of support vectors, or of rows of coefficients without any.
    fn new(node: &NodeProto, count: usize, is_linear: bool) -> TractResult<Self> {
        let vectors = node.get_attr_opt_vec::<f32>("support_vectors")?.unwrap_or_default();
        let coefficients: Vec<f32> = node.get_attr_vec("coefficients")?;
        let of = if is_linear { coefficients.len() } else { vectors.len() };
        if count == 0 || !of.is_multiple_of(count) {
            bail!("{of} values do not fit {count} vectors of {}", node.op_type);
        }
        let rho = node.get_attr_opt_vec::<f32>("rho")?.unwrap_or_default();
        Ok(Self { kernel: Kernel::of(node)?, vectors, coefficients, rho, columns: of / count })
    }

    fn rows<'a>(&self, input: &'a Tensor) -> TractResult<std::borrow::Cow<'a, [f32]>> {
        let (_, columns) = matrix(input.shape())?;
        if columns != self.columns {
            bail!("takes {} columns, not {columns}", self.columns);
        }
        floats(input)
    }

    /// The kernel of a row with each support vector.
    fn kernels(&self, row: &[f32]) -> Vec<f32> {
        self.vectors.chunks(self.columns.max(1)).map(|vector| self.kernel.apply(row, vector)).collect()
    }

    fn rho(&self, i: usize) -> f32 {
        self.rho.get(i).copied().unwrap_or(0.0)
    }
}

#[derive(Debug)]
struct Regressor {
    machine: Machine,
    is_linear: bool,
    one_class: bool,
    transform: Transform,
}

pub fn regressor(node: &NodeProto) -> Built {
    let supports = node.get_attr_opt::<usize>("n_supports")?.unwrap_or(0);
    built(Regressor {
        machine: Machine::new(node, supports.max(1), supports == 0)?,
        is_linear: supports == 0,
        one_class: node.get_attr_opt::<i64>("one_class")?.unwrap_or(0) != 0,
        transform: Transform::of(node)?,
    })
}

impl Operator for Regressor {
    fn name(&self) -> &'static str {
        "SVMRegressor"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        Ok(tvec!((DatumType::F32, tvec!(rows_of(&inputs[0].1)?, 1.to_dim()))))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let Machine { coefficients, columns, kernel, .. } = &self.machine;
        let values = self.machine.rows(&inputs[0])?;
        let mut sums = Vec::new();
        for row in values.chunks((*columns).max(1)) {
            let sum = match self.is_linear {
                true => kernel.apply(row, coefficients),
                false => self.machine.kernels(row).iter().zip(coefficients).map(|(k, c)| k * c).sum(),
            };
            let sum = sum + self.machine.rho(0);
            let mut one = [match self.one_class {
                true => {
                    if sum > 0.0 {
                        1.0
                    } else {
                        -1.0
                    }
                }
                false => sum,
            }];
            self.transform.apply(&mut one);
            sums.extend(one);
        }
        Ok(tvec!(tensor(&[sums.len(), 1], sums)?))
    }
}

#[derive(Debug)]
struct Classifier {
    machine: Machine,
    classes: Classes,
    /// Support vectors of each class; empty for a linear one.
    supports: Vec<usize>,
    /// Slopes and offsets of the pairs' probabilities; empty without probabilities.
    slopes: Vec<f32>,
    offsets: Vec<f32>,
    transform: Transform,
}

pub fn classifier(node: &NodeProto) -> Built {
    let classes = Classes::of(node)?;
    let supports = node.get_attr_opt_vec::<usize>("vectors_per_class")?.unwrap_or_default();
    let numbers = |name| -> TractResult<Vec<f32>> { Ok(node.get_attr_opt_vec(name)?.unwrap_or_default()) };
    let (slopes, offsets) = (numbers("prob_a")?, numbers("prob_b")?);
    let all: usize = supports.iter().sum();
    let machine = Machine::new(node, if all == 0 { classes.len() } else { all }, all == 0)?;
    let count = classes.len();
    let pairs = count * count.saturating_sub(1) / 2;
    if all > 0
        && (supports.len() != count
            || machine.coefficients.len() != all * (count - 1)
            || machine.rho.len() < pairs)
    {
        bail!("the attributes of SVMClassifier do not fit {count} classes");
    }
    if !slopes.is_empty() && (slopes.len() != pairs || offsets.len() != pairs) {
        bail!("prob_a and prob_b do not fit {pairs} pairs of classes");
    }
    if all > 0 && slopes.is_empty() && count == 2 {
        bail!("two classes without probabilities are not supported: convert the model with probability=True");
    }
    built(Classifier { machine, classes, supports, slopes, offsets, transform: Transform::of(node)? })
}

impl Classifier {
    /// The scores of a row and the class that wins.
    fn score(&self, row: &[f32]) -> (Vec<f32>, usize) {
        let count = self.classes.len();
        let Machine { coefficients, columns, kernel, .. } = &self.machine;
        if self.supports.is_empty() {
            let of = |coefficients| kernel.apply(row, coefficients) + self.machine.rho(0);
            let mut scores: Vec<f32> = coefficients.chunks((*columns).max(1)).map(of).collect();
            let winner = largest(&scores);
            self.transform.apply(&mut scores);
            return (scores, winner);
        }
        let kernels = self.machine.kernels(row);
        let all = kernels.len();
        let firsts: Vec<usize> = (0..count).map(|class| self.supports[..class].iter().sum()).collect();
        let (mut decisions, mut votes) = (Vec::new(), vec![0.0; count]);
        for i in 0..count {
            for j in i + 1..count {
                // The coefficients of a class against the others are in rows, without the class itself.
                let part = |class: usize, row: usize| -> f32 {
                    (firsts[class]..firsts[class] + self.supports[class])
                        .map(|at| coefficients[row * all + at] * kernels[at])
                        .sum()
                };
                let sum = part(i, j - 1) + part(j, i) + self.machine.rho(decisions.len());
                votes[if sum > 0.0 { i } else { j }] += 1.0;
                decisions.push(sum);
            }
        }
        if self.slopes.is_empty() {
            let winner = largest(&votes);
            self.transform.apply(&mut decisions);
            return (decisions, winner);
        }
        let mut pairs = vec![0.0; count * count];
        let mut pair = 0;
        for i in 0..count {
            for j in i + 1..count {
                let logit = decisions[pair] * self.slopes[pair] + self.offsets[pair];
                let p = (1.0 / (1.0 + f64::from(logit).exp())).clamp(1e-7, 1.0 - 1e-7);
                (pairs[i * count + j], pairs[j * count + i]) = (p, 1.0 - p);
                pair += 1;
            }
        }
        let mut scores = coupled(&pairs, count);
        let winner = largest(&scores);
        self.transform.apply(&mut scores);
        (scores, winner)
    }

    /// Scores without probabilities are those of the pairs of classes.
    fn width(&self) -> usize {
        let count = self.classes.len();
        match self.supports.is_empty() || !self.slopes.is_empty() {
            true => count,
            false => count * (count - 1) / 2,
        }
    }
}

/// The probabilities of classes from those of each pair: the second method of Wu, Lin and Weng, "Probability Estimates for
/// Multi-class Classification by Pairwise Coupling" (2004).
fn coupled(pairs: &[f64], count: usize) -> Vec<f32> {
    let mut q = vec![0.0; count * count];
    for i in 0..count {
        for j in (0..count).filter(|j| *j != i) {
            q[i * count + i] += pairs[j * count + i] * pairs[j * count + i];
            q[i * count + j] = -pairs[j * count + i] * pairs[i * count + j];
        }
    }
    let mut p = vec![1.0 / count as f64; count];
    for _ in 0..count.max(100) {
        let times: Vec<f64> = (0..count).map(|i| (0..count).map(|j| q[i * count + j] * p[j]).sum()).collect();
        let mut times = times;
        let mut square: f64 = p.iter().zip(&times).map(|(p, t)| p * t).sum();
        let error = times.iter().map(|t| (t - square).abs()).fold(0.0, f64::max);
        if error < 0.005 / count as f64 {
            break;
        }
        for i in 0..count {
            let step = (square - times[i]) / q[i * count + i];
            p[i] += step;
            let scale = 1.0 + step;
            square = (square + step * (step * q[i * count + i] + 2.0 * times[i])) / (scale * scale);
            for j in 0..count {
                times[j] = (times[j] + step * q[i * count + j]) / scale;
                p[j] /= scale;
            }
        }
    }
    p.into_iter().map(|p| p as f32).collect()
}

impl Operator for Classifier {
    fn name(&self) -> &'static str {
        "SVMClassifier"
    }

    fn output_count(&self) -> usize {
        2
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        self.classes.outputs(&inputs[0].1, self.width())
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let values = self.machine.rows(&inputs[0])?;
        let (mut winners, mut all) = (Vec::new(), Vec::new());
        for row in values.chunks(self.machine.columns.max(1)) {
            let (scores, winner) = self.score(row);
            winners.push(winner);
            all.extend(scores);
        }
        let shape = [winners.len(), self.width()];
        Ok(tvec!(self.classes.tensor(&winners)?, tensor(&shape, all)?))
    }
}
