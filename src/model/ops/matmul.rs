//! Matrix multiplication on one CPU core, weights laid out at load: the f32 form.
//!
//! The weights' columns stand in panels two vectors wide, a panel's rows one after the other, so that
//! the innermost loop reads them in order and keeps a tile of sums in registers. A panel's part of at
//! most [`DEPTH`] rows stays in the first-level cache while [`ROWS`] rows of the input, which stay in
//! the second level, pass by it. (The layout is that of Goto and van de Geijn, doi:10.1145/1356052.1356053.)
//!
//! Every sum runs over the inputs in the same order, whichever rows stand around it: a row's result
//! is the same to the bit in any batch.

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
        let width = 2 * lanes();
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
        dispatch(Multiply { panels: self, x, out, then });
    }
}

struct Multiply<'a> {
    panels: &'a Panels,
    x: &'a [f32],
    out: &'a mut [f32],
    then: &'a Then<'a>,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { panels, x, out, then } = self;
        let (inputs, outputs) = (panels.inputs, panels.outputs);
        for (block, (x, out)) in x.chunks(ROWS * inputs).zip(out.chunks_mut(ROWS * outputs)).enumerate() {
            match &panels.weights {
                Weights::F32 { width, depth, panels: weights } => {
                    let layout = (*width, *depth, &weights[..]);
                    multiply_f32(simd, x, (inputs, outputs), layout, &panels.bias, out, then);
                }
                Weights::Coded(coded) => coded.multiply(x, &panels.bias, out, |out, columns| {
                    if let Then::Activate(activation) = then {
                        activate_columns(*activation, out, outputs, columns);
                    }
                }),
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

/// A block of rows times all panels; what follows the products only where it is an activation.
#[inline(always)]
fn multiply_f32<S: Simd>(
    simd: S,
    x: &[f32],
    (inputs, outputs): (usize, usize),
    (width, part_depth, weights): (usize, usize, &[f32]),
    bias: &[f32],
    out: &mut [f32],
    then: &Then<'_>,
) {
    let mut rest = weights;
    for part in (0..inputs).step_by(part_depth) {
        let depth = part_depth.min(inputs - part);
        for column in (0..outputs).step_by(width) {
            let panel;
            (panel, rest) = rest.split_at(depth * width);
            let columns = width.min(outputs - column);
            let mut target = Target {
                out: &mut out[column..],
                stride: outputs,
                width: columns,
                start: if part == 0 { Start::Row(&bias[column..][..width]) } else { Start::Out },
                factors: None,
            };
            let left = Left { x: &x[part..], stride: inputs, rows: x.len() / inputs, depth };
            strip::<S, 2, false>(simd, left, Right { x: panel, stride: 2 * S::F32_LANES }, &mut target);
            if let (Then::Activate(activation), true) = (then, part + depth == inputs) {
                for row in out.chunks_mut(outputs) {
                    activate(simd, *activation, &mut row[column..column + columns]);
                }
            }
        }
    }
}

/// Of every row.
fn activate_columns(activation: Activation, out: &mut [f32], outputs: usize, columns: Range<usize>) {
    struct Columns<'a>(Activation, &'a mut [f32], usize, Range<usize>);
    impl WithSimd for Columns<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for row in self.1.chunks_mut(self.2) {
                activate(simd, self.0, &mut row[self.3.clone()]);
            }
        }
    }
    dispatch(Columns(activation, out, outputs, columns));
}

/// The rows that a panel is multiplied with.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub x: &'a [f32],
    /// From one row to the next; where they stand transposed, from one number of a row to the next.
    pub stride: usize,
    pub rows: usize,
    /// Numbers of a row that are multiplied.
    pub depth: usize,
}

/// The rows of a panel.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub x: &'a [f32],
    /// From one row to the next.
    pub stride: usize,
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

/// `left`, which may stand `TRANSPOSED`, times one panel of `W` vectors, `[depth, W × lanes]`.
#[inline(always)]
pub(super) fn strip<S: Simd, const W: usize, const TRANSPOSED: bool>(
    simd: S,
    left: Left<'_>,
    right: Right<'_>,
    target: &mut Target<'_>,
) {
    let mut row = 0;
    // Sums, a panel's row and one number have to fit in the registers.
    if S::REGISTER_COUNT >= 32 {
        while row + 12 <= left.rows {
            tile::<S, 12, W, TRANSPOSED>(simd, left, row, right, target);
            row += 12;
        }
    }
    while row + 6 <= left.rows {
        tile::<S, 6, W, TRANSPOSED>(simd, left, row, right, target);
        row += 6;
    }
    if row + 4 <= left.rows {
        tile::<S, 4, W, TRANSPOSED>(simd, left, row, right, target);
        row += 4;
    }
    if row + 2 <= left.rows {
        tile::<S, 2, W, TRANSPOSED>(simd, left, row, right, target);
        row += 2;
    }
    if row < left.rows {
        tile::<S, 1, W, TRANSPOSED>(simd, left, row, right, target);
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // the reason is below
fn tile<S: Simd, const R: usize, const W: usize, const TRANSPOSED: bool>(
    simd: S,
    left: Left<'_>,
    row: usize,
    right: Right<'_>,
    target: &mut Target<'_>,
) {
    let Left { x, stride, depth, .. } = left;
    let lanes = S::F32_LANES;
    // Plain loops over indices: behind closures and iterators the sums do not stay in registers.
    let mut sums = [[simd.splat_f32s(0.0); W]; R];
    match target.start {
        Start::Zero => {}
        Start::Row(start) => {
            let (start, _) = S::as_simd_f32s(start);
            for r in 0..R {
                sums[r].copy_from_slice(&start[..W]);
            }
        }
        Start::Out => {
            for r in 0..R {
                let out = &target.out[(row + r) * target.stride..][..target.width];
                for w in 0..W {
                    let out = &out[(w * lanes).min(out.len())..];
                    sums[r][w] = simd.partial_load_f32s(&out[..lanes.min(out.len())]);
                }
            }
        }
    }
    let x = match TRANSPOSED {
        true => &x[row..][..(depth - 1) * stride + R],
        false => &x[row * stride..][..(R - 1) * stride + depth],
    };
    let panel = &right.x[..(depth - 1) * right.stride + W * lanes];
    for k in 0..depth {
        let mut vectors = [simd.splat_f32s(0.0); W];
        for w in 0..W {
            // SAFETY: k < depth and w < W, and the panel was cut to the end of the last of them above.
            vectors[w] = unsafe {
                panel.as_ptr().add(k * right.stride + w * lanes).cast::<S::f32s>().read_unaligned()
            };
        }
        for r in 0..R {
            let at = if TRANSPOSED { k * stride + r } else { r * stride + k };
            // SAFETY: r < R and k < depth, and x was cut to the end of the last of them above.
            let left = simd.splat_f32s(unsafe { *x.get_unchecked(at) });
            for w in 0..W {
                sums[r][w] = simd.mul_add_e_f32s(left, vectors[w], sums[r][w]);
            }
        }
    }
    for r in 0..R {
        if let Some(factors) = target.factors {
            let factor = simd.splat_f32s(factors[row + r]);
            for w in 0..W {
                sums[r][w] = simd.mul_f32s(sums[r][w], factor);
            }
        }
        let out = &mut target.out[(row + r) * target.stride..][..target.width];
        if target.width == W * lanes {
            let (out, _) = S::as_mut_simd_f32s(out);
            out[..W].copy_from_slice(&sums[r]);
        } else {
            for w in 0..W {
                let at = (w * lanes).min(out.len());
                let out = &mut out[at..];
                let end = lanes.min(out.len());
                simd.partial_store_f32s(&mut out[..end], sums[r][w]);
            }
        }
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
            let panels = Panels::new(&weight, Some(&bias), inputs, outputs);
            let mut out = vec![f32::NAN; rows * outputs];
            panels.multiply(&x, &mut out, &Then::Nothing);
            for (row, out) in x.chunks(inputs).zip(out.chunks(outputs)) {
                for (output, &got) in out.iter().enumerate() {
                    let weight = &weight[output * inputs..][..inputs];
                    let want: f64 = row.iter().zip(weight).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let want = want + f64::from(bias[output]);
                    assert!((f64::from(got) - want).abs() < 1e-4, "{rows}x{inputs}x{outputs}: {got} {want}");
                }
            }
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
