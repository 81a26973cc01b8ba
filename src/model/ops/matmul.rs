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
use std::ops::Range;

use aligned_vec::AVec;
use pulp::{Simd, WithSimd};

use super::activation::{Activation, activate};
use super::coded::{Code, Coded};
use super::norm::{Norm, add_norm};
use super::simd::{add, dispatch, lanes};

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

    /// The same with fewer bits; the error says what the processor lacks.
    pub fn coded(
        weight: &[f32],
        bias: Option<&[f32]>,
        inputs: usize,
        outputs: usize,
        code: Code,
    ) -> Result<Self, String> {
        let coded = Coded::new(weight, inputs, outputs, code)?;
        let width = coded.width();
        Ok(Self::with(Weights::Coded(coded), bias, inputs, outputs, width))
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
    static ROWS_PACKED: RefCell<Rows> = RefCell::new(Rows::new());
}

struct Multiply<'a> {
    panels: &'a Panels,
    x: &'a [f32],
    out: &'a mut [f32],
    then: &'a Then<'a>,
    rows: &'a mut Rows,
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
    rows: &mut Rows,
) {
    let height = height::<S>();
    let mut rest = weights;
    for part in (0..inputs).step_by(part_depth) {
        let depth = part_depth.min(inputs - part);
        rows.start(depth);
        for row in x.chunks(inputs) {
            rows.push(simd, &row[part..part + depth]);
        }
        for column in (0..outputs).step_by(width) {
            let panel;
            (panel, rest) = rest.split_at(depth * width);
            // What comes next, in as many shares as there are tiles.
            let mut ahead =
                rest[..rest.len().min(panel.len())].chunks(panel.len().div_ceil(rows.count.div_ceil(height)));
            let columns = column..(column + width).min(outputs);
            for (tile, out) in out.chunks_mut(height * outputs).enumerate() {
                let mut target = Target {
                    out: &mut out[column..],
                    stride: outputs,
                    width: columns.len(),
                    start: if part == 0 { Start::Row(&bias[column..][..width]) } else { Start::Out },
                    factors: None,
                };
                let right = Right { x: panel, stride: width, ahead: ahead.next().unwrap_or_default() };
                let left = rows.some(simd, tile * height..rows.count.min((tile + 1) * height));
                strip::<S, 2, _>(simd, left, right, &mut target);
                if let (Then::Activate(activation), true) = (then, part + depth == inputs) {
                    for row in out.chunks_mut(outputs) {
                        activate(simd, *activation, &mut row[columns.clone()]);
                    }
                }
            }
        }
    }
}

/// Numbers of a line of the cache.
const LINE: usize = 16;

/// Rows of the tallest tile: its sums, a panel's row and one number have to fit in the registers.
#[inline(always)]
fn height<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 12 } else { 6 }
}

/// Rows that a panel is multiplied with, `ROW` numbers from one to the next within the tallest tile.
#[derive(Clone, Copy)]
pub(super) struct Left<'a, const ROW: usize> {
    x: &'a [f32],
    count: usize,
    /// Numbers of a row.
    depth: usize,
    /// From one number of a row to the next, within a line of them.
    step: usize,
    /// From one line's first number to the next one's.
    line: usize,
    /// From one tallest tile to the next.
    tile: usize,
}

impl<'a> Left<'a, 1> {
    /// The first `count` columns of `depth` rows of `stride` numbers.
    #[inline(always)]
    pub fn columns<S: Simd>(_: S, x: &'a [f32], stride: usize, count: usize, depth: usize) -> Self {
        Self { x, count, depth, step: stride, line: stride * LINE, tile: height::<S>() }
    }
}

impl<const ROW: usize> Left<'_, ROW> {
    /// Numbers of `rows` rows of one tallest tile, from the first to the last: the k-th of the r-th row is at
    /// `r * ROW + k / LINE * line + k % LINE * step`.
    #[inline(always)]
    fn tile<S: Simd>(&self, row: usize, rows: usize) -> &[f32] {
        let last = self.depth - 1;
        let numbers = (rows - 1) * ROW + last / LINE * self.line + last % LINE * self.step + 1;
        &self.x[row / height::<S>() * self.tile + row % height::<S>() * ROW..][..numbers]
    }
}

/// Rows in the order in which tiles read them: a [`LINE`] of each of as many as the tallest tile has, then the
/// next line of each. Behind a row's last number are any up to a whole line.
pub(super) struct Rows {
    numbers: AVec<f32>,
    count: usize,
    depth: usize,
}

impl Rows {
    pub fn new() -> Self {
        Self { numbers: AVec::new(0), count: 0, depth: 0 }
    }

    /// None, of so many numbers each.
    pub fn start(&mut self, depth: usize) {
        (self.count, self.depth) = (0, depth);
    }

    #[inline(always)]
    pub fn push<S: Simd>(&mut self, _: S, row: &[f32]) {
        let height = height::<S>();
        let block = self.depth.next_multiple_of(LINE) * height;
        let at = self.count / height * block;
        if self.numbers.len() < at + block {
            self.numbers.resize(at + block, 0.0);
        }
        let mut lines = self.numbers[at + self.count % height * LINE..].chunks_mut(height * LINE);
        let (whole, rest) = row.as_chunks::<LINE>();
        for (line, out) in whole.iter().zip(lines.by_ref()) {
            out[..LINE].copy_from_slice(line);
        }
        if let (Some(out), false) = (lines.next(), rest.is_empty()) {
            out[..rest.len()].copy_from_slice(rest);
        }
        self.count += 1;
    }

    /// The first row of the tallest tile that a row is in.
    #[inline(always)]
    pub fn tile<S: Simd>(&self, _: S, row: usize) -> usize {
        row / height::<S>() * height::<S>()
    }

    /// Some of them; the first is one that a tallest tile can begin with.
    #[inline(always)]
    pub fn some<S: Simd>(&self, _: S, rows: Range<usize>) -> Left<'_, LINE> {
        let padded = self.depth.next_multiple_of(LINE);
        let (line, tile) = (height::<S>() * LINE, height::<S>() * padded);
        let x = &self.numbers[rows.start * padded..];
        Left { x, count: rows.len(), depth: self.depth, step: 1, line, tile }
    }
}

/// The rows of a panel.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub x: &'a [f32],
    /// From one row to the next.
    pub stride: usize,
    /// What is needed next: it is fetched meanwhile.
    pub ahead: &'a [f32],
}

/// Where the products go.
pub(super) struct Target<'a> {
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

impl Target<'_> {
    /// What the sums of a row begin with.
    #[inline(always)]
    fn begin<S: Simd>(&self, simd: S, row: usize) -> (S::f32s, S::f32s) {
        let x = match self.start {
            Start::Zero => return (simd.splat_f32s(0.0), simd.splat_f32s(0.0)),
            Start::Row(start) => start,
            Start::Out => &self.out[row * self.stride..][..self.width],
        };
        if let ([first, second, ..], _) = S::as_simd_f32s(x) {
            return (*first, *second);
        }
        let (first, second) = x.split_at(S::F32_LANES.min(x.len()));
        (simd.partial_load_f32s(first), simd.partial_load_f32s(second))
    }

    #[inline(always)]
    fn end<S: Simd>(&mut self, simd: S, row: usize, mut sums: (S::f32s, S::f32s)) {
        if let Some(factors) = self.factors {
            let factor = simd.splat_f32s(factors[row]);
            sums = (simd.mul_f32s(sums.0, factor), simd.mul_f32s(sums.1, factor));
        }
        let out = &mut self.out[row * self.stride..][..self.width];
        if let ([first, second, ..], _) = S::as_mut_simd_f32s(out) {
            (*first, *second) = sums;
            return;
        }
        let (first, second) = out.split_at_mut(S::F32_LANES.min(out.len()));
        simd.partial_store_f32s(first, sums.0);
        simd.partial_store_f32s(second, sums.1);
    }
}

/// `left` times one panel of `W` vectors, `[depth, W × lanes]`.
#[inline(always)]
pub(super) fn strip<S: Simd, const W: usize, const ROW: usize>(
    simd: S,
    left: Left<'_, ROW>,
    right: Right<'_>,
    target: &mut Target<'_>,
) {
    let mut row = 0;
    if height::<S>() == 12 {
        while row + 12 <= left.count {
            tile12::<S, W, ROW>(simd, left, row, right, target);
            row += 12;
        }
    }
    while row + 6 <= left.count {
        tile6::<S, W, ROW>(simd, left, row, right, target);
        row += 6;
    }
    if row + 4 <= left.count {
        tile4::<S, W, ROW>(simd, left, row, right, target);
        row += 4;
    }
    if row + 2 <= left.count {
        tile2::<S, W, ROW>(simd, left, row, right, target);
        row += 2;
    }
    if row < left.count {
        tile1::<S, W, ROW>(simd, left, row, right, target);
    }
}

macro_rules! tile {
    ($name:ident, $rows:literal: $($r:literal $a:ident $b:ident),*) => {
        /// So many rows. Each sum is a variable of its own: those of an array do not stay in registers
        /// whenever the compiler sees the loops in another order.
        #[inline(always)]
        fn $name<S: Simd, const W: usize, const ROW: usize>(
            simd: S,
            left: Left<'_, ROW>,
            row: usize,
            right: Right<'_>,
            target: &mut Target<'_>,
        ) {
            let Left { depth, step, line: next_line, .. } = left;
            let lines = depth.div_ceil(LINE);
            let x = left.tile::<S>(row, $rows).as_ptr();
            let mut panel = right.x[..(depth - 1) * right.stride + W * S::F32_LANES].as_ptr();
            let ahead = right.ahead.len().div_ceil(lines).div_ceil(LINE);
            $(let (mut $a, mut $b) = target.begin(simd, row + $r);)*
            for line in 0..lines {
                fetch(right.ahead, line * ahead * LINE, ahead);
                let mut x = x.wrapping_add(line * next_line);
                for _ in 0..LINE.min(depth - line * LINE) {
                    // SAFETY: the panel was cut to the end of the last that is read of it, and x as well.
                    unsafe {
                        let first = panel.cast::<S::f32s>().read_unaligned();
                        let second = match W {
                            2 => panel.add(S::F32_LANES).cast::<S::f32s>().read_unaligned(),
                            _ => first,
                        };
                        $(
                            let number = simd.splat_f32s(*x.add($r * ROW));
                            $a = simd.mul_add_e_f32s(number, first, $a);
                            if W == 2 {
                                $b = simd.mul_add_e_f32s(number, second, $b);
                            }
                        )*
                    }
                    x = x.wrapping_add(step);
                    panel = panel.wrapping_add(right.stride);
                }
            }
            $(target.end(simd, row + $r, ($a, $b));)*
        }
    };
}

tile!(tile12, 12: 0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5, 6 a6 b6, 7 a7 b7, 8 a8 b8, 9 a9 b9, 10 a10 b10,
    11 a11 b11);
tile!(tile6, 6: 0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5);
tile!(tile4, 4: 0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3);
tile!(tile2, 2: 0 a0 b0, 1 a1 b1);
tile!(tile1, 1: 0 a0 b0);

/// Asks for so many lines of numbers that are needed soon.
#[inline(always)]
fn fetch(x: &[f32], from: usize, lines: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..lines {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let at = x.as_ptr().wrapping_add(from + line * LINE);
        // SAFETY: it is a hint, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, from, lines);
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
