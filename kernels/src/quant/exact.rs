//! What keeps int8 close to f32 on trained models, whose inputs have a few channels much larger than the others.
//!
//! * Smoothing (arXiv:2211.10438): inputs are divided, and their weights multiplied, by a factor per input, so that all
//!   inputs are about as large. How large an input gets is not measured: it follows from the weight and bias of the norm
//!   before the layer ([`Expected`]), so that a model is quantized the same way on every machine and with any texts.
//! * A few of the inputs that stay the largest are multiplied in f32 (as in arXiv:2208.07339), at most [`MOST`].
//! * A row's quantized values lie symmetrically around a zero point of its own, the middle of its range. Its share of
//!   the products, the zero point times the sum of an output's quantized weights, is one more input in f32. (The sum of
//!   the weights before they were quantized would be wrong: most inputs are far from the zero point, on one side of it,
//!   and their products' errors would not cancel.)

use std::borrow::Cow;

use aligned_vec::AVec;

use super::super::activation::{Activation, Gate, activate_columns};
use super::super::tile::LINE;
use super::{Grid, vector};

/// Inputs per input that is multiplied in f32.
const INPUTS_PER_KEPT: usize = 128;
/// Most inputs that are multiplied in f32: with the zero point they fill one line of a packed row.
const MOST: usize = LINE - 1;
/// Exponent of an input's expected size in its factor; the rest is its weights' size. (0.5 in the paper. These inputs'
/// sizes are estimates, and less of them does better.)
const ALPHA: f32 = 0.3;
/// How many times the spread is added to the mean for the largest value that is expected.
const SPREADS: f32 = 3.0;
/// Least size of an input or its weights, as a share of all inputs' mean: outputs of an activation may be expected to be
/// 0.
const LEAST: f32 = 0.1;

/// The values that a layer's inputs are expected to have: one element per input.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    pub mean: Vec<f32>,
    /// Standard deviation.
    pub spread: Vec<f32>,
}

/// What the factors of a layer's inputs are chosen by.
#[derive(Clone, Copy)]
pub struct Calibration<'a> {
    /// Of the inputs.
    pub expected: &'a Expected,
    /// The first of the outputs whose weights count. Queries and keys beside values would only spoil the factors: their
    /// weights differ more, and attention needs them less precisely.
    pub first: usize,
}

impl<'a> From<&'a Expected> for Calibration<'a> {
    fn from(expected: &'a Expected) -> Self {
        Self { expected, first: 0 }
    }
}

impl Expected {
    /// Of the outputs of a linear layer whose inputs are as expected and independent. `weight` is `[outputs, inputs]`.
    pub fn after_linear(&self, weight: &[f32], bias: Option<&[f32]>) -> Self {
        let dot =
            |row: &[f32], f: &dyn Fn((&f32, &f32)) -> f32, by: &[f32]| row.iter().zip(by).map(f).sum::<f32>();
        let rows = || weight.chunks(self.mean.len());
        let mut mean: Vec<f32> = rows().map(|row| dot(row, &|(w, x)| w * x, &self.mean)).collect();
        if let Some(bias) = bias {
            mean.iter_mut().zip(bias).for_each(|(mean, bias)| *mean += bias);
        }
        let spread = rows().map(|row| dot(row, &|(w, x)| (w * x).powi(2), &self.spread).sqrt()).collect();
        Self { mean, spread }
    }

    /// Of the results of an activation. Only the sizes matter, so the largest one is returned as the mean.
    pub fn after_activation(&self, activation: Activation) -> Self {
        let at = |spreads: f32| {
            let values = self.mean.iter().zip(&self.spread).map(|(mean, spread)| mean + spreads * spread);
            let mut values: Vec<f32> = values.collect();
            let count = values.len();
            activate_columns(activation, &mut values, count, count);
            values
        };
        let mean = at(-SPREADS).iter().zip(&at(SPREADS)).map(|(a, b)| a.abs().max(b.abs())).collect();
        Self { mean, spread: vec![0.0; self.mean.len()] }
    }

    /// Of the results of a gated activation, whose input's halves lie side by side.
    pub fn after_gate(&self, activation: Activation, gate: Gate) -> Self {
        let half = self.mean.len() / 2;
        let part = |from: usize| Self {
            mean: self.mean[from..from + half].to_vec(),
            spread: self.spread[from..from + half].to_vec(),
        };
        let (gate, other) = gate.order(part(0), part(half));
        let mut result = gate.after_activation(activation);
        result.mean.iter_mut().zip(other.sizes()).for_each(|(mean, size)| *mean *= size);
        result
    }

    /// The largest absolute value expected of each input.
    fn sizes(&self) -> Vec<f32> {
        let sizes = self.mean.iter().zip(&self.spread).map(|(mean, spread)| mean.abs() + SPREADS * spread);
        sizes.collect()
    }
}

/// The part of an int8 layer that is in f32.
pub(super) struct Exact {
    /// What each input is multiplied with before it is quantized; 0 if it is multiplied in f32. Empty without
    /// smoothing.
    pub factors: Vec<f32>,
    /// The inputs that are multiplied in f32.
    kept: Vec<usize>,
    /// Weights of the zero point and of the kept inputs, `[1 + kept, width]` for each panel.
    panels: AVec<f32>,
}

impl Exact {
    /// Splits a layer's `weight`, `[outputs, inputs]`: returns the weights to be quantized with the grid of each output, and
    /// what is left in f32.
    pub fn split<'a>(
        weight: &'a [f32],
        inputs: usize,
        calibration: Option<Calibration<'_>>,
        width: usize,
    ) -> (Cow<'a, [f32]>, Vec<Grid>, Self) {
        let mut quantized = Cow::Borrowed(weight);
        let (factors, kept) = match calibration {
            Some(Calibration { expected, first }) => {
                smoothing(&weight[first * inputs..], inputs, &expected.sizes())
            }
            None => (Vec::new(), Vec::new()),
        };
        if !factors.is_empty() {
            for row in quantized.to_mut().chunks_mut(inputs) {
                for (weight, factor) in row.iter_mut().zip(&factors) {
                    *weight = if *factor == 0.0 { 0.0 } else { *weight / factor };
                }
            }
        }
        let outputs = weight.len() / inputs;
        let columns = |of: &dyn Fn(usize) -> f32, column: usize| {
            (column..column + width)
                .map(|output| if output < outputs { of(output) } else { 0.0 })
                .collect::<Vec<_>>()
        };
        let grids: Vec<Grid> =
            quantized.chunks(inputs).map(|row| Grid::symmetric(vector::range(row))).collect();
        let sums: Vec<f32> = quantized.chunks(inputs).zip(&grids).map(|(row, grid)| grid.sum(row)).collect();
        let mut panels = AVec::new(0);
        for column in (0..outputs).step_by(width) {
            panels.extend_from_slice(&columns(&|output| sums[output], column));
            for &input in &kept {
                panels.extend_from_slice(&columns(&|output| weight[output * inputs + input], column));
            }
        }
        (quantized, grids, Self { factors, kept, panels })
    }

    /// Inputs of the part in f32: the zero point, and the kept inputs.
    pub fn inputs(&self) -> usize {
        1 + self.kept.len()
    }

    /// The weights of the panel that begins at this column.
    pub fn panel(&self, column: usize, width: usize) -> &[f32] {
        &self.panels[column * self.inputs()..][..width * self.inputs()]
    }

    /// A row's inputs in f32; they are written to `line`.
    #[inline(always)]
    pub fn gather(&self, zero: f32, x: &[f32], line: &mut [f32; LINE]) {
        line[0] = zero;
        for (to, &input) in line[1..].iter_mut().zip(&self.kept) {
            *to = x[input];
        }
    }
}

/// The factor of each input and the inputs to keep in f32, whose factor is 0. `sizes`: the inputs' expected sizes.
fn smoothing(weight: &[f32], inputs: usize, sizes: &[f32]) -> (Vec<f32>, Vec<usize>) {
    // Their root mean square. The largest ones would be those of a few outputs, which a norm after the layer makes small.
    let mut weights = vec![0.0f32; inputs];
    for row in weight.chunks(inputs) {
        weights.iter_mut().zip(row).for_each(|(sum, weight)| *sum += weight * weight);
    }
    weights.iter_mut().for_each(|sum| *sum = (*sum * inputs as f32 / weight.len() as f32).sqrt());
    let not_too_small = |of: &[f32]| {
        let least = (LEAST * of.iter().sum::<f32>() / inputs as f32).max(f32::MIN_POSITIVE);
        of.iter().map(|x| x.max(least)).collect::<Vec<f32>>()
    };
    let (sizes, weights) = (not_too_small(sizes), not_too_small(&weights));
    // Their mean is subtracted, because it would only scale all inputs and weights.
    let logarithms =
        sizes.iter().zip(&weights).map(|(size, weight)| (1.0 - ALPHA) * weight.ln() - ALPHA * size.ln());
    let logarithms: Vec<f32> = logarithms.collect();
    let mean = logarithms.iter().sum::<f32>() / inputs as f32;
    let mut factors: Vec<f32> = logarithms.iter().map(|logarithm| (logarithm - mean).exp()).collect();
    let mut by_size: Vec<usize> = (0..inputs).collect();
    let smoothed = |input: usize| sizes[input] * factors[input];
    by_size.sort_by(|&a, &b| smoothed(b).total_cmp(&smoothed(a)));
    let mut kept = by_size[..(inputs / INPUTS_PER_KEPT).min(MOST)].to_vec();
    kept.sort_unstable();
    for &input in &kept {
        factors[input] = 0.0;
    }
    (factors, kept)
}

#[cfg(test)]
mod tests {
    use super::super::super::matmul::tests::random;
    use super::*;

    /// Mean and standard deviation of each column.
    fn measured(rows: &[Vec<f32>]) -> (Vec<f32>, Vec<f32>) {
        let count = rows.len() as f32;
        let column = |at: usize| rows.iter().map(move |row| row[at]);
        let means: Vec<f32> = (0..rows[0].len()).map(|at| column(at).sum::<f32>() / count).collect();
        let spread = |at: usize| column(at).map(|x| (x - means[at]).powi(2)).sum::<f32>() / count;
        let spreads = (0..rows[0].len()).map(|at| spread(at).sqrt()).collect();
        (means, spreads)
    }

    #[test]
    fn what_is_expected_after_a_layer_is_what_samples_show() {
        let (samples, inputs, outputs) = if cfg!(miri) { (300, 3, 2) } else { (20_000, 8, 5) };
        let expected =
            Expected { mean: random(inputs, 1), spread: random(inputs, 2).iter().map(|x| x.abs()).collect() };
        let (weight, bias) = (random(outputs * inputs, 3), random(outputs, 4));
        // Uniform between -1 and 1: the standard deviation is 1/√3.
        let noise = random(samples * inputs, 5);
        let row = |noise: &[f32]| -> Vec<f32> {
            let parts = expected.mean.iter().zip(&expected.spread).zip(noise);
            let x: Vec<f32> =
                parts.map(|((mean, spread), noise)| mean + spread * 3f32.sqrt() * noise).collect();
            let dot = |weight: &[f32]| weight.iter().zip(&x).map(|(w, x)| w * x).sum::<f32>();
            weight.chunks(inputs).zip(&bias).map(|(weight, bias)| dot(weight) + bias).collect()
        };
        let rows: Vec<Vec<f32>> = noise.chunks(inputs).map(row).collect();
        let (means, spreads) = measured(&rows);
        let after = expected.after_linear(&weight, Some(&bias));
        let tolerance = if cfg!(miri) { 0.3 } else { 0.03 };
        for (want, got) in means.iter().chain(&spreads).zip(after.mean.iter().chain(&after.spread)) {
            assert!((want - got).abs() < tolerance, "{want} {got}");
        }
    }

    #[test]
    fn the_largest_value_after_an_activation_is_at_an_end_of_the_range() {
        let expected = Expected { mean: vec![0.0, -9.0, 1.0, 2.0], spread: vec![1.0, 1.0, 0.0, 0.5] };
        let after = expected.after_activation(Activation::Relu);
        assert_eq!(after.mean, [3.0, 0.0, 1.0, 3.5]);
        let gated = expected.after_gate(Activation::Relu, Gate::First);
        assert_eq!(gated.mean, [3.0 * 1.0, 0.0 * 3.5]);
        let gated = expected.after_gate(Activation::Relu, Gate::Second);
        assert_eq!(gated.mean, [1.0 * 3.0, 3.5 * 12.0]);
    }

    #[test]
    fn the_largest_inputs_are_kept_and_the_others_become_alike() {
        let inputs = 256;
        let weight: Vec<f32> = (0..2 * inputs).map(|i| if i % inputs == 5 { 0.01 } else { 1.0 }).collect();
        let mut sizes = vec![1.0; inputs];
        (sizes[3], sizes[200]) = (50.0, 40.0);
        let (factors, kept) = smoothing(&weight, inputs, &sizes);
        assert_eq!(kept, [3, 200]);
        assert!(factors[3] == 0.0 && factors[200] == 0.0);
        // An input with small weights is made smaller, so that its weights become larger.
        assert!(factors[5] < 0.5 * factors[6], "{} {}", factors[5], factors[6]);
        let (factors, kept) = smoothing(&weight[..100], 50, &[0.0; 50]);
        assert!(kept.is_empty() && factors.iter().all(|factor| factor.is_finite() && *factor > 0.0));
    }
}
