//! Matrix multiplication on one CPU core, with weights laid out at load. This file has the f32 form.
//!
//! The weights' columns are split into panels two vectors wide. A panel's rows are consecutive in memory, so that the
//! innermost loop reads them in order and keeps a tile of accumulators in registers. A part of a panel, at most
//! [`DEPTH`] rows, stays in the L1 cache while it is multiplied with [`ROWS`] rows of the input, which stay in the L2
//! cache; meanwhile the next panel is prefetched. (The layout is that of Goto and van de Geijn,
//! doi:10.1145/1356052.1356053.)
//!
//! Every accumulator adds up the inputs in the same order, whatever the other rows are: a row's result is bit-identical
//! in any batch.

use std::cell::RefCell;
use std::ops::Range;

use aligned_vec::AVec;
use pulp::{Simd, WithSimd};

use super::activation::{Activation, activate};
use super::norm::{Norm, add_norm};
use super::quant::{Calibration, Precision, Quantized};
use super::simd::{add, dispatch, lanes, load_two, store_two};
use super::tile::{F32, Kernel, LINE, PackedA, Target, strip, tiles};

/// Rows of the input that are processed at a time; a multiple of every tile height in [`super::tile`].
const ROWS: usize = 264;
/// Maximum rows of a panel that are processed at a time.
const DEPTH: usize = 512;

/// A layer's weights and bias, in the layout that the multiplication reads.
pub struct Panels {
    pub inputs: usize,
    pub outputs: usize,
    weights: Weights,
    /// One element per column of every panel, 0 past the last output.
    bias: Vec<f32>,
}

enum Weights {
    F32 {
        /// Columns of a panel.
        width: usize,
        /// Inputs per part; the last part may have fewer.
        depth: usize,
        /// In order of part, panel and row, with zeros right of the last column.
        panels: AVec<f32>,
    },
    Quantized(Quantized),
}

/// What is done to the products while they are in the cache.
pub enum Epilogue<'a> {
    Nothing,
    Activate(Activation),
    /// Adds a residual, `[rows, outputs]`.
    Add(&'a [f32]),
    /// Adds a residual, then activates.
    AddActivate(&'a [f32], Activation),
    /// Adds a residual, then normalises each row.
    AddNorm(&'a [f32], &'a Norm),
    /// Normalises each row, then adds a residual.
    NormAdd(&'a Norm, &'a [f32]),
}

impl Panels {
    /// `weight` is `[outputs, inputs]`, as checkpoints have it.
    pub fn new(weight: &[f32], bias: Option<&[f32]>, inputs: usize, outputs: usize) -> Self {
        Self::f32(weight, bias, inputs, outputs, 2 * lanes())
    }

    fn f32(weight: &[f32], bias: Option<&[f32]>, inputs: usize, outputs: usize, width: usize) -> Self {
        // Whole lines, so that rows are packed without a copy on the way.
        let depth = inputs.div_ceil(inputs.div_ceil(DEPTH)).next_multiple_of(LINE);
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

    /// Like [`Panels::new`], with quantized weights. A `calibration` makes int8 more precise.
    pub fn quantized(
        weight: &[f32],
        bias: Option<&[f32]>,
        inputs: usize,
        outputs: usize,
        precision: Precision,
        calibration: Option<Calibration<'_>>,
    ) -> Self {
        let quantized = Quantized::new(weight, inputs, outputs, precision, calibration);
        let width = quantized.width();
        Self::with(Weights::Quantized(quantized), bias, inputs, outputs, width)
    }

    fn with(weights: Weights, bias: Option<&[f32]>, inputs: usize, outputs: usize, width: usize) -> Self {
        let mut bias = bias.map_or_else(|| vec![0.0; outputs], <[f32]>::to_vec);
        bias.resize(outputs.next_multiple_of(width), 0.0);
        Self { inputs, outputs, weights, bias }
    }

    /// `[rows, inputs]` to `[rows, outputs]`.
    pub fn multiply(&self, x: &[f32], out: &mut [f32], epilogue: &Epilogue<'_>) {
        PACKED_A.with_borrow_mut(|rows| dispatch(Multiply { panels: self, x, out, epilogue, rows }));
    }
}

thread_local! {
    static PACKED_A: RefCell<PackedA<f32>> = RefCell::new(PackedA::new());
}

struct Multiply<'a> {
    panels: &'a Panels,
    x: &'a [f32],
    out: &'a mut [f32],
    epilogue: &'a Epilogue<'a>,
    rows: &'a mut PackedA<f32>,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { panels, x, out, epilogue, rows } = self;
        let (inputs, outputs) = (panels.inputs, panels.outputs);
        for (block, (x, out)) in x.chunks(ROWS * inputs).zip(out.chunks_mut(ROWS * outputs)).enumerate() {
            match &panels.weights {
                Weights::F32 { width, depth, panels: weights } => {
                    let layout = (*width, *depth, &weights[..]);
                    let x = Dense(x, inputs);
                    multiply_f32(simd, &x, (inputs, outputs), layout, &panels.bias, out, epilogue, rows);
                }
                Weights::Quantized(quantized) => {
                    let activation = match epilogue {
                        Epilogue::Activate(activation) => Some(*activation),
                        _ => None,
                    };
                    quantized.multiply(x, &panels.bias, out, activation);
                }
            }
            after(simd, out, outputs, epilogue, block * ROWS * outputs);
        }
    }
}

/// What an epilogue does to whole rows, those whose elements begin at `at` in the residual.
#[inline(always)]
fn after<S: Simd>(simd: S, out: &mut [f32], outputs: usize, epilogue: &Epilogue<'_>, at: usize) {
    match epilogue {
        Epilogue::Nothing | Epilogue::Activate(_) => {}
        Epilogue::Add(residual) => add(simd, out, &residual[at..]),
        Epilogue::AddActivate(residual, activation) => {
            add(simd, out, &residual[at..]);
            activate(simd, *activation, out);
        }
        Epilogue::AddNorm(residual, norm) => {
            let residual = residual[at..].chunks(outputs);
            for (row, residual) in out.chunks_mut(outputs).zip(residual) {
                add_norm(simd, row, Some(residual), norm);
            }
        }
        Epilogue::NormAdd(norm, residual) => {
            let residual = residual[at..].chunks(outputs);
            for (row, residual) in out.chunks_mut(outputs).zip(residual) {
                add_norm(simd, row, None, norm);
                add(simd, row, residual);
            }
        }
    }
}

/// Where a multiplication finds its rows.
pub(super) trait Rows {
    /// Appends a part of the columns of all rows, in their order.
    fn pack(&self, part: Range<usize>, packed: &mut PackedA<f32>);
}

/// A matrix of this many columns.
struct Dense<'a>(&'a [f32], usize);

impl Rows for Dense<'_> {
    #[inline(always)]
    fn pack(&self, part: Range<usize>, packed: &mut PackedA<f32>) {
        for row in self.0.chunks(self.1) {
            packed.push(&row[part.clone()]);
        }
    }
}

impl Panels {
    /// Like [`Panels::multiply`], for rows that are put together as they are needed: `block` has those of a range. The
    /// weights are f32.
    ///
    /// # Panics
    /// If the weights are quantized.
    pub(super) fn multiply_rows<R: Rows>(
        &self,
        block: impl Fn(Range<usize>) -> R,
        out: &mut [f32],
        epilogue: &Epilogue<'_>,
    ) {
        PACKED_A.with_borrow_mut(|rows| dispatch(MultiplyRows { panels: self, block, out, epilogue, rows }));
    }
}

struct MultiplyRows<'a, F> {
    panels: &'a Panels,
    block: F,
    out: &'a mut [f32],
    epilogue: &'a Epilogue<'a>,
    rows: &'a mut PackedA<f32>,
}

impl<R: Rows, F: Fn(Range<usize>) -> R> WithSimd for MultiplyRows<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { panels, block, out, epilogue, rows } = self;
        let Weights::F32 { width, depth, panels: weights } = &panels.weights else {
            panic!("the weights are quantized");
        };
        let (inputs, outputs) = (panels.inputs, panels.outputs);
        for (at, out) in out.chunks_mut(ROWS * outputs).enumerate() {
            let first = at * ROWS;
            let x = block(first..first + out.len() / outputs);
            let layout = (*width, *depth, &weights[..]);
            multiply_f32(simd, &x, (inputs, outputs), layout, &panels.bias, out, epilogue, rows);
            after(simd, out, outputs, epilogue, first * outputs);
        }
    }
}

/// Multiplies at most [`ROWS`] rows with all panels. Applies the epilogue only if it is an activation.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn multiply_f32<S: Simd>(
    simd: S,
    x: &impl Rows,
    (inputs, outputs): (usize, usize),
    (width, part_depth, weights): (usize, usize, &[f32]),
    bias: &[f32],
    out: &mut [f32],
    epilogue: &Epilogue<'_>,
    rows: &mut PackedA<f32>,
) {
    let kernel = F32(simd);
    let mut rest = weights;
    for part in (0..inputs).step_by(part_depth) {
        let depth = part_depth.min(inputs - part);
        rows.start(depth, F32::<S>::HEIGHT);
        x.pack(part..part + depth, rows);
        for column in (0..outputs).step_by(width) {
            let panel;
            (panel, rest) = rest.split_at(depth * width);
            let columns = column..(column + width).min(outputs);
            let left = rows.some(0..out.len() / outputs, 0..depth);
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
                if let (Epilogue::Activate(activation), true) = (epilogue, part + depth == inputs) {
                    for row in out.chunks_mut(outputs) {
                        activate(simd, *activation, &mut row[columns.clone()]);
                    }
                }
            }
        }
    }
}

/// The part of the output that f32 products are written to.
pub(super) struct Products<'a> {
    pub out: &'a mut [f32],
    pub stride: usize,
    /// Columns to write, at most as many as the panel has.
    pub width: usize,
    pub start: Start<'a>,
    /// One factor per row, which its products are multiplied with.
    pub factors: Option<&'a [f32]>,
}

/// Initial value of the accumulators.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    Zero,
    /// The same for every row: one element per column of the panel.
    Row(&'a [f32]),
    /// The current contents of the output.
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

    /// Pseudo-random floats between -1 and 1.
    pub fn random(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    }

    /// Miri takes minutes for what takes a processor a millisecond: larger products are left out there.
    pub fn is_too_large(rows: usize, inputs: usize, outputs: usize) -> bool {
        cfg!(miri) && rows * inputs * outputs > 15_000
    }

    #[test]
    fn multiplies_matrices_of_any_size() {
        for (rows, inputs, outputs) in [(1, 1, 1), (7, 40, 33), (125, 1100, 70), (12, 513, 5), (3, 64, 64)] {
            if is_too_large(rows, inputs, outputs) {
                continue;
            }
            let (x, weight) = (random(rows * inputs, 1), random(outputs * inputs, 2));
            let bias = random(outputs, 3);
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

    /// The results of an operation with every vector width that this processor has.
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
            let (epilogue, mut rows) = (Epilogue::Nothing, PackedA::new());
            Multiply { panels: &panels, x, out: &mut out, epilogue: &epilogue, rows: &mut rows }
                .with_simd(simd);
            out
        }
    }

    #[test]
    fn a_row_is_bit_identical_in_any_batch() {
        let (rows, inputs, outputs) = if cfg!(miri) { (14, 40, 10) } else { (130, 700, 50) };
        let weight = random(outputs * inputs, 2);
        let panels = Panels::new(&weight, None, inputs, outputs);
        let x = random(rows * inputs, 1);
        let mut all = vec![0.0; rows * outputs];
        panels.multiply(&x, &mut all, &Epilogue::Activate(Activation::Gelu));
        for (row, want) in x.chunks(inputs).zip(all.chunks(outputs)) {
            let mut alone = vec![0.0; outputs];
            panels.multiply(row, &mut alone, &Epilogue::Activate(Activation::Gelu));
            assert_eq!(alone, want);
        }
    }
}
