//! A bidirectional LSTM over sequences of vectors, as torch computes it
//! (<https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html>).
//!
//! What does not depend on the step before, the inputs' part of the gates, is one multiplication for all steps and both
//! directions. Then all sequences of the batch take a step together. On a GPU that is by Candle's operations: GLiNER has
//! one LSTM over the words of a text, after an encoder of many layers, so that a kernel would save little.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::ops::sigmoid as sigmoid_of;
use pulp::{Simd, WithSimd};

use super::linear::{Epilogue, Linear};
use super::matmul::{self, Panels};
use super::simd::{dispatch, sigmoid, tanh};
use super::{Fused, Out, host, upload};

/// Gates of a cell, in torch's order: input, forget, cell, output.
const GATES: usize = 4;

/// One layer; its output is the states of both directions side by side.
pub struct Lstm {
    /// Elements of one direction's state.
    width: usize,
    /// From an input to the gates of the forward direction, then of the backward one. It has the sum of both biases.
    input: Linear,
    recurrent: Recurrent,
}

/// From a state to the gates of the next step.
enum Recurrent {
    /// One per direction.
    Host(Box<[Panels; 2]>),
    /// `[directions, width, gates × width]`, for devices that use Candle's matrix multiplication.
    Tensor(Tensor),
}

/// A sequence on the axis of all vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sequence {
    start: usize,
    length: usize,
}

impl Sequence {
    /// The vector that a direction reads in a step.
    fn at(self, step: usize, backward: bool) -> usize {
        self.start + if backward { self.length - 1 - step } else { step }
    }
}

/// The longest first, so that those that still have a vector in a step are always the first ones.
fn longest_first(lengths: &[usize]) -> Vec<Sequence> {
    let mut start = 0;
    let sequence = |&length: &usize| {
        start += length;
        Sequence { start: start - length, length }
    };
    let mut sequences: Vec<_> = lengths.iter().map(sequence).collect();
    sequences.sort_by_key(|sequence| std::cmp::Reverse(sequence.length));
    sequences
}

/// For each step, the sequences that have a vector in it.
fn steps(sequences: &[Sequence]) -> impl Iterator<Item = &[Sequence]> {
    let longest = sequences.first().map_or(0, |sequence| sequence.length);
    (0..longest).map(|step| &sequences[..sequences.partition_point(|sequence| sequence.length > step)])
}

impl Lstm {
    /// Loads layer `layer` with torch's tensor names. `width` is that of one direction's state.
    pub fn load(inputs: usize, width: usize, layer: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let both = |name: &str| ["", "_reverse"].map(|direction| format!("{name}_l{layer}{direction}"));
        let tensors = |name: &str, shape: &[usize]| -> Result<Vec<Tensor>> {
            both(name).iter().map(|name| vb.get(shape, name)).collect()
        };
        let gates = GATES * width;
        let weight = Tensor::cat(&tensors("weight_ih", &[gates, inputs])?, 0)?;
        let [of_input, of_state] =
            ["bias_ih", "bias_hh"].map(|name| Tensor::cat(&tensors(name, &[gates])?, 0));
        let input = Linear::new(&weight, Some((of_input? + of_state?)?), None)?;
        let recurrent = tensors("weight_hh", &[gates, width])?;
        let recurrent = match vb.device().is_cpu() {
            true => {
                let panels = |weight: &Tensor| host(weight).map(|of| Panels::new(&of, None, width, gates));
                Recurrent::Host(Box::new([panels(&recurrent[0])?, panels(&recurrent[1])?]))
            }
            false => Recurrent::Tensor(Tensor::stack(&recurrent, 0)?.transpose(1, 2)?.contiguous()?),
        };
        Ok(Self { width, input, recurrent })
    }

    /// `[vectors, inputs]` to `[vectors, 2 × width]`. `lengths`: number of vectors of each sequence, none of which is
    /// empty. `gates` is memory for the inputs' part of the gates.
    pub fn forward(&self, x: &Tensor, lengths: &[usize], gates: Out<'_>, out: Out<'_>) -> Result<Tensor> {
        let gates = self.input.forward(x, Epilogue::Nothing, gates)?;
        let sequences = longest_first(lengths);
        match &self.recurrent {
            Recurrent::Host(panels) => {
                let y = out.here(x.dim(0)?, 2 * self.width)?;
                let run = |out: &mut [f32], gates: &[f32]| {
                    for (direction, panels) in panels.iter().enumerate() {
                        self.direction(out, gates, &sequences, panels, direction == 1);
                    }
                };
                y.inplace_op2(&gates, &Fused("lstm", run))?;
                Ok(y)
            }
            Recurrent::Tensor(recurrent) => of_tensors(&gates, recurrent, &sequences),
        }
    }

    /// One direction of all sequences.
    fn direction(
        &self,
        out: &mut [f32],
        gates: &[f32],
        sequences: &[Sequence],
        panels: &Panels,
        backward: bool,
    ) {
        let (width, side) = (self.width, usize::from(backward));
        let mut states = vec![0.0; sequences.len() * width];
        let mut cells = states.clone();
        let mut products = vec![0.0; sequences.len() * GATES * width];
        for (step, active) in steps(sequences).enumerate() {
            let products = &mut products[..active.len() * GATES * width];
            // The first state is zero, and so are its products.
            if step > 0 {
                panels.multiply(&states[..active.len() * width], products, &matmul::Epilogue::Nothing);
            }
            let (states, cells) = (states.chunks_mut(width), cells.chunks_mut(width));
            let rows = active.iter().zip(products.chunks(GATES * width)).zip(states.zip(cells));
            for ((sequence, product), (state, cell)) in rows {
                let at = sequence.at(step, backward);
                let gates = &gates[(2 * at + side) * GATES * width..][..GATES * width];
                dispatch(Cell { gates, product, cell, state });
                out[(2 * at + side) * width..][..width].copy_from_slice(state);
            }
        }
    }
}

/// One step of one sequence.
struct Cell<'a> {
    /// The inputs' part of the gates.
    gates: &'a [f32],
    /// The part of the state before.
    product: &'a [f32],
    cell: &'a mut [f32],
    /// Overwritten with the new state.
    state: &'a mut [f32],
}

impl WithSimd for Cell<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.state.len();
        for start in (0..width).step_by(S::F32_LANES) {
            let part = start..(start + S::F32_LANES).min(width);
            let gate = |gate: usize| {
                let part = gate * width + part.start..gate * width + part.end;
                let load = |x: &[f32]| simd.partial_load_f32s(x);
                simd.add_f32s(load(&self.gates[part.clone()]), load(&self.product[part]))
            };
            let [input, forget, output] = [0, 1, 3].map(|at| sigmoid(simd, gate(at)));
            let kept = simd.mul_f32s(forget, simd.partial_load_f32s(&self.cell[part.clone()]));
            let cell = simd.mul_add_e_f32s(input, tanh(simd, gate(2)), kept);
            simd.partial_store_f32s(&mut self.cell[part.clone()], cell);
            simd.partial_store_f32s(&mut self.state[part], simd.mul_f32s(output, tanh(simd, cell)));
        }
    }
}

/// The unfused form, by Candle's own operations. `gates` is `[vectors, 2 × gates × width]`.
fn of_tensors(gates: &Tensor, recurrent: &Tensor, sequences: &[Sequence]) -> Result<Tensor> {
    let (vectors, width) = (gates.dim(0)?, recurrent.dim(1)?);
    let device = gates.device();
    // A row per vector and direction.
    let gates = gates.reshape((2 * vectors, GATES * width))?;
    let mut rows = Vec::with_capacity(2 * vectors);
    for (step, active) in steps(sequences).enumerate() {
        for backward in [false, true] {
            rows.extend(active.iter().map(|of| (2 * of.at(step, backward) + usize::from(backward)) as u32));
        }
    }
    let mut places = vec![0; rows.len()];
    for (place, &row) in (0u32..).zip(&rows) {
        places[row as usize] = place;
    }
    let indices = upload(&[rows, places].concat(), device)?;
    let mut states = Tensor::zeros((2, sequences.len(), width), gates.dtype(), device)?;
    let mut cells = states.clone();
    let (mut all, mut start) = (Vec::new(), 0);
    for active in steps(sequences) {
        let count = 2 * active.len();
        let of_inputs = gates.index_select(&indices.narrow(0, start, count)?, 0)?;
        start += count;
        let first = |of: &Tensor| of.narrow(1, 0, active.len())?.contiguous();
        let products = first(&states)?.matmul(recurrent)?;
        let gates = (of_inputs.reshape((2, active.len(), GATES * width))? + products)?;
        let gate = |at: usize| gates.narrow(2, at * width, width)?.contiguous();
        let kept = (sigmoid_of(&gate(1)?)? * first(&cells)?)?;
        cells = (kept + (sigmoid_of(&gate(0)?)? * gate(2)?.tanh()?)?)?;
        states = (sigmoid_of(&gate(3)?)? * cells.tanh()?)?;
        all.push(states.reshape((count, width))?);
    }
    let places = indices.narrow(0, 2 * vectors, 2 * vectors)?;
    Tensor::cat(&all, 0)?.index_select(&places, 0)?.reshape((vectors, 2 * width))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{DType, Device};

    use super::super::matmul::tests::random;
    use super::super::{Slot, Workspace};
    use super::*;

    #[test]
    fn the_fused_form_equals_that_of_tensors() {
        let (inputs, width) = (10, 21);
        let shapes = [("weight_ih", vec![84, inputs]), ("weight_hh", vec![84, width])];
        let shapes = shapes.into_iter().chain([("bias_ih", vec![84]), ("bias_hh", vec![84])]);
        let mut tensors = HashMap::new();
        for (name, shape) in shapes {
            for direction in ["", "_reverse"] {
                let count = shape.iter().product();
                let values = random(count, tensors.len() as u32);
                let tensor = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap();
                tensors.insert(format!("{name}_l0{direction}"), tensor);
            }
        }
        let vb = VarBuilder::from_tensors(tensors.clone(), DType::F32, &Device::Cpu);
        let lstm = Lstm::load(inputs, width, 0, &vb).unwrap();
        let both = |name: &str| {
            let pair = ["", "_reverse"].map(|direction| &tensors[&format!("{name}_l0{direction}")]);
            Tensor::stack(&pair, 0).unwrap()
        };
        let recurrent = both("weight_hh").transpose(1, 2).unwrap().contiguous().unwrap();
        for lengths in [vec![1], vec![3, 1, 7, 7, 2]] {
            let vectors: usize = lengths.iter().sum();
            let x = Tensor::from_vec(random(vectors * inputs, 5), (vectors, inputs), &Device::Cpu).unwrap();
            let workspace = Workspace::default();
            let [gates, out] = [Slot::Wide, Slot::Stream].map(|slot| workspace.at(slot, &Device::Cpu));
            let fused = lstm.forward(&x, &lengths, gates, out).unwrap();
            let weight = both("weight_ih").reshape((168, inputs)).unwrap().t().unwrap();
            let bias = (both("bias_ih") + both("bias_hh")).unwrap().flatten_all().unwrap();
            let gates = x.matmul(&weight).unwrap().broadcast_add(&bias).unwrap();
            let want = of_tensors(&gates, &recurrent, &longest_first(&lengths)).unwrap();
            let error = (fused - want).unwrap().abs().unwrap().max_all().unwrap();
            assert!(error.to_scalar::<f32>().unwrap() < 2e-6, "{lengths:?}");
        }
    }
}
