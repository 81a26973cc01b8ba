//! Matrix multiplication on one CPU core, weights laid out at load: the f32 form.
//!
//! The weights' columns stand in panels two vectors wide, a panel's rows one after the other, so that
//! the innermost loop reads them in order and keeps a tile of sums in registers. A panel's part of at
//! most [`DEPTH`] rows stays in the first-level cache while [`ROWS`] rows of the input, which stay in
//! the second level, pass by it; meanwhile the next panel is fetched from where a model's weights are.
//! (The layout is that of Goto and van de Geijn, doi:10.1145/1356052.1356053.)
//!
//! Every sum runs over the inputs in the same order, whichever rows stand around it: a row's result
//! is the same to the bit in any batch.

use std::cell::RefCell;

use aligned_vec::AVec;
use pulp::{Simd, WithSimd};

use super::activation::{Activation, activate};
use super::coded::{Code, Coded};
use super::norm::{Norm, add_norm};
use super::simd::{add, dispatch, lanes, load_two, store_two};
use super::tile::{F32, Kernel, Rows, Target, strip, tiles};

/// Rows of the input that are worked on at a time; a multiple of every height of a tile.
const ROWS: usize = 264;
/// Rows of a panel that are worked on at a time.
const DEPTH: usize = 512;

/// A layer's weights and bias as the multiplication reads them.
pub struct Panels {
    pub inputs: usize,
    pub outputs: usize,
    weights: Weights,
    /// A number for every column of every panel.
    bias: Vec<f32>,
}

enum Weights {
    F32 {
        /// Columns of a panel.
        width: usize,
        /// Inputs of each part but perhaps the last.
        depth: usize,
        /// Part after part, panel after panel, row after row; zeros right of the last column.
        panels: AVec<f32>,
    },
    Coded(Coded),
}

/// What happens to the products, while they are in the cache.
pub enum Then<'a> {
    Nothing,
    Activate(Activation),
    /// The layer's input is added, `[rows, outputs]`.
    Add(&'a [f32]),
    /// The same, then the rows are normalised.
    AddNorm(&'a [f32], &'a Norm),
}

impl Panels {
    /// `weight` is `[outputs, inputs]`, as checkpoints have it.
    pub fn new(weight: &[f32], bias: Option<&[f32]>, inputs: usize, outputs: usize) -> Self {
        Self::f32(weight, bias, inputs, outputs, 2 * lanes())
    }

    fn f32(weight: &[f32], bias: Option<&[f32]>, inputs: usize, outputs: usize, width: usize) -> Self {
        let depth = inputs.div_ceil(inputs.div_ceil(DEPTH));
        let mut panels = AVec::with_capacity(0, outputs.next_multiple_of(width) * inputs);
        for part in (0..inputs).step_by(depth) {
            for column in (0..outputs).step_by(width) {
                for input in part..(part + depth).min(inputs) {
                    for output in column..column + width {
                        panels.push(if output < outputs { weight[output * inputs + input] } else { 0.0 });
                    }
                }
            }
        }
        Self::with(Weights::F32 { width, depth, panels }, bias, inputs, outputs, width)
    }

    /// The same with fewer bits.
    pub fn coded(weight: &[f32], bias: Option<&[f32]>, inputs: usize, outputs: usize, code: Code) -> Self {
        let coded = Coded::new(weight, inputs, outputs, code);
        let width = coded.width();
        Self::with(Weights::Coded(coded), bias, inputs, outputs, width)
    }

    fn with(weights: Weights, bias: Option<&[f32]>, inputs: usize, outputs: usize, width: usize) -> Self {
        let mut bias = bias.map_or_else(|| vec![0.0; outputs], <[f32]>::to_vec);
        bias.resize(outputs.next_multiple_of(width), 0.0);
        Self { inputs, outputs, weights, bias }
    }

    /// `[rows, inputs]` to `[rows, outputs]`.
    pub fn multiply(&self, x: &[f32], out: &mut [f32], then: &Then<'_>) {
        ROWS_PACKED.with_borrow_mut(|rows| dispatch(Multiply { panels: self, x, out, then, rows }));
    }
}

thread_local! {
    static ROWS_PACKED: RefCell<Rows<f32>> = RefCell::new(Rows::new());
}

struct Multiply<'a> {
    panels: &'a Panels,
    x: &'a [f32],
    out: &'a mut [f32],
    then: &'a Then<'a>,
    rows: &'a mut Rows<f32>,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { panels, x, out, then, rows } = self;
        let (inputs, outputs) = (panels.inputs, panels.outputs);
        for (block, (x, out)) in x.chunks(ROWS * inputs).zip(out.chunks_mut(ROWS * outputs)).enumerate() {
            match &panels.weights {
                Weights::F32 { width, depth, panels: weights } => {
                    let layout = (*width, *depth, &weights[..]);
                    multiply_f32(simd, x, (inputs, outputs), layout, &panels.bias, out, then, rows);
                }
                Weights::Coded(coded) => {
                    let activation = match then {
                        Then::Activate(activation) => Some(*activation),
                        Then::Nothing | Then::Add(_) | Then::AddNorm(..) => None,
                    };
                    coded.multiply(x, &panels.bias, out, activation);
                }
            }
            let at = block * ROWS * outputs;
            match then {
                Then::Nothing | Then::Activate(_) => {}
                Then::Add(residual) => add(simd, out, &residual[at..]),
                Then::AddNorm(residual, norm) => {
                    let residual = residual[at..].chunks(outputs);
                    for (row, residual) in out.chunks_mut(outputs).zip(residual) {
                        add_norm(simd, row, Some(residual), norm);
                    }
                }
            }
        }
    }
}

/// At most [`ROWS`] rows times all panels; what follows the products only where it is an activation.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn multiply_f32<S: Simd>(
    simd: S,
    x: &[f32],
    (inputs, outputs): (usize, usize),
    (width, part_depth, weights): (usize, usize, &[f32]),
    bias: &[f32],
    out: &mut [f32],
    then: &Then<'_>,
    rows: &mut Rows<f32>,
) {
    let kernel = F32(simd);
    let mut rest = weights;
    for part in (0..inputs).step_by(part_depth) {
        let depth = part_depth.min(inputs - part);
        rows.start(depth, F32::<S>::HEIGHT);
        for row in x.chunks(inputs) {
            rows.push(&row[part..part + depth]);
        }
        for column in (0..outputs).step_by(width) {
            let panel;
            (panel, rest) = rest.split_at(depth * width);
            let columns = column..(column + width).min(outputs);
            let left = rows.some(0..x.len() / inputs, 0..depth);
            for (row, left, right) in tiles(kernel, left, panel, rest) {
                let out = &mut out[row * outputs..][..left.count * outputs];
                let mut target = Products {
                    out: &mut out[column..],
                    stride: outputs,
                    width: columns.len(),
                    start: if part == 0 { Start::Row(&bias[column..][..width]) } else { Start::Out },
                    factors: None,
                };
                strip::<_, 2, _>(kernel, left, right, &mut target);
                if let (Then::Activate(activation), true) = (then, part + depth == inputs) {
                    for row in out.chunks_mut(outputs) {
                        activate(simd, *activation, &mut row[columns.clone()]);
                    }
                }
            }
        }
    }
}

/// Products of f32.
pub(super) struct Products<'a> {
    pub out: &'a mut [f32],
    pub stride: usize,
    /// Columns that are written, at most as many as the panel has.
    pub width: usize,
    pub start: Start<'a>,
    /// A row's sums are multiplied with its own.
    pub factors: Option<&'a [f32]>,
}

/// What the sums begin with.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    Zero,
    /// The same numbers for every row, as many as the panel is wide.
    Row(&'a [f32]),
    /// What is there.
    Out,
}

impl<S: Simd> Target<F32<S>> for Products<'_> {
    #[inline(always)]
    fn begin(&self, F32(simd): F32<S>, row: usize) -> [S::f32s; 2] {
        match self.start {
            Start::Zero => [simd.splat_f32s(0.0); 2],
            Start::Row(start) => load_two(simd, start),
            Start::Out => load_two(simd, &self.out[row * self.stride..][..self.width]),
        }
    }

    #[inline(always)]
    fn end(&mut self, F32(simd): F32<S>, row: usize, mut sums: [S::f32s; 2]) {
        if let Some(factors) = self.factors {
            let factor = simd.splat_f32s(factors[row]);
            sums = [simd.mul_f32s(sums[0], factor), simd.mul_f32s(sums[1], factor)];
        }
        store_two(simd, &mut self.out[row * self.stride..][..self.width], sums);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Numbers that look like chance, between -1 and 1.
    pub fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn multiplies_whatever_the_sizes() {
        for (rows, inputs, outputs) in [(1, 1, 1), (7, 40, 33), (125, 1100, 70), (12, 513, 5), (3, 64, 64)] {
            let (x, weight) = (numbers(rows * inputs, 1), numbers(outputs * inputs, 2));
            let bias = numbers(outputs, 3);
            for out in by_each_width(|| Product { x: &x, weight: &weight, bias: &bias, inputs, outputs }) {
                for (row, out) in x.chunks(inputs).zip(out.chunks(outputs)) {
                    for (output, &got) in out.iter().enumerate() {
                        let weight = &weight[output * inputs..][..inputs];
                        let product = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
                        let want = row.iter().zip(weight).map(product).sum::<f64>() + f64::from(bias[output]);
                        let off = (f64::from(got) - want).abs();
                        assert!(off < 1e-4, "{rows}x{inputs}x{outputs}: {got} {want}");
                    }
                }
            }
        }
    }

    /// What an operation gives by all the vectors that this processor has, narrower ones too.
    pub fn by_each_width<Op: WithSimd>(operation: impl Fn() -> Op) -> Vec<Op::Output> {
        let mut results = vec![dispatch(operation()), Simd::vectorize(pulp::Scalar::new(), operation())];
        #[cfg(target_arch = "x86_64")]
        results.extend(pulp::x86::V3::try_new().map(|simd| Simd::vectorize(simd, operation())));
        #[cfg(target_arch = "aarch64")]
        results.extend(pulp::aarch64::Neon::try_new().map(|simd| Simd::vectorize(simd, operation())));
        results
    }

    struct Product<'a> {
        x: &'a [f32],
        weight: &'a [f32],
        bias: &'a [f32],
        inputs: usize,
        outputs: usize,
    }

    impl WithSimd for Product<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let Self { x, weight, bias, inputs, outputs } = self;
            let panels = Panels::f32(weight, Some(bias), inputs, outputs, 2 * S::F32_LANES);
            let mut out = vec![f32::NAN; x.len() / inputs * outputs];
            let (then, mut rows) = (Then::Nothing, Rows::new());
            Multiply { panels: &panels, x, out: &mut out, then: &then, rows: &mut rows }.with_simd(simd);
            out
        }
    }

    #[test]
    fn a_row_is_the_same_to_the_bit_wherever_it_stands() {
        let (inputs, outputs) = (700, 50);
        let weight = numbers(outputs * inputs, 2);
        let panels = Panels::new(&weight, None, inputs, outputs);
        let x = numbers(130 * inputs, 1);
        let mut all = vec![0.0; 130 * outputs];
        panels.multiply(&x, &mut all, &Then::Activate(Activation::Gelu));
        for (row, want) in x.chunks(inputs).zip(all.chunks(outputs)) {
            let mut alone = vec![0.0; outputs];
            panels.multiply(row, &mut alone, &Then::Activate(Activation::Gelu));
            assert_eq!(alone, want);
        }
    }
}
