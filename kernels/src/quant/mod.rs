//! Quantized matrix multiplication on one CPU core: `int8` and `bf16`.
//!
//! `int8`: weights are quantized to 8 bits with one scale per output, inputs to 8 bits with one scale and zero point per
//! row, computed for each row; sums are exact. A few inputs are multiplied in f32, and inputs are smoothed ([`exact`]).
//! Without an instruction that multiplies bytes without overflow, both are stored as 16 bits (AVX2) or as f32. The
//! results are the same on every processor that has fused multiply-add.
//! `bf16`: weights and inputs are rounded to bfloat16, accumulators are f32. If the processor has no bf16 instruction
//! that is faster than f32, both are stored as f32.
//!
//! Weights and inputs are stored in groups of 4 bytes, the values that one instruction multiplies and adds up: one of
//! 32 bits, two of 16 or four of 8. Panels are as in [`super::matmul`], with a group in place of a float.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod exact;
mod vector;

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use aligned_vec::AVec;
use pulp::Simd;
use pulp::bytemuck::{Pod, cast_mut, cast_slice};

use super::activation::{Activation, activate_columns};
use super::matmul::{Products, Start};
use super::tile::{self, F32, LINE, Left, PackedA, Right, strip};

use exact::Exact;
pub use exact::{Calibration, Expected};

#[cfg(target_arch = "aarch64")]
use vector::arm;
#[cfg(target_arch = "x86_64")]
use vector::x86;

/// What weights and inputs are quantized to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    Int8,
    Bf16,
}

/// Which of the processor's instructions multiply quantized values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// Quantized values are stored and multiplied as f32.
    Portable(Precision),
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "x86_64")]
    Bf16,
    #[cfg(target_arch = "aarch64")]
    Dot,
    #[cfg(target_arch = "aarch64")]
    Bf16Dot,
    /// Tiles of 16 rows.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Precision),
}

impl Kernel {
    fn choose(precision: Precision) -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if amx::available() {
            return Kernel::Amx(precision);
        }
        Self::choose_vectors(precision)
    }

    fn choose_vectors(precision: Precision) -> Self {
        #[cfg(target_arch = "x86_64")]
        match precision {
            Precision::Int8 if x86::has_vnni() => return Kernel::Vnni,
            Precision::Int8 if x86::has_avx_vnni() => return Kernel::AvxVnni,
            Precision::Int8 if is_x86_feature_detected!("avx2") => return Kernel::Avx2,
            Precision::Bf16 if x86::has_bf16() && x86::bf16_is_fast() => return Kernel::Bf16,
            _ => {}
        }
        #[cfg(target_arch = "aarch64")]
        match precision {
            Precision::Int8 if arm::has_dot() => return Kernel::Dot,
            Precision::Bf16 if arm::has_bf16() => return Kernel::Bf16Dot,
            _ => {}
        }
        Kernel::Portable(precision)
    }

    fn shape(self) -> Shape {
        match self {
            Kernel::Portable(precision) => vector::shape_portable(Encoding::Single(precision)),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => Shape::of::<x86::Avx2>(Encoding::Pairs),
            #[cfg(target_arch = "x86_64")]
            Kernel::AvxVnni => Shape::of::<x86::AvxVnni>(Encoding::Quads),
            #[cfg(target_arch = "x86_64")]
            Kernel::Vnni => Shape::of::<x86::Vnni>(Encoding::Quads),
            #[cfg(target_arch = "aarch64")]
            Kernel::Dot => Shape::of::<arm::Dot>(Encoding::Bytes),
            #[cfg(target_arch = "aarch64")]
            Kernel::Bf16Dot => Shape::of::<arm::Bf16Dot>(Encoding::Bf16),
            #[cfg(target_arch = "x86_64")]
            Kernel::Bf16 => Shape::of::<x86::Bf16>(Encoding::Bf16),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Kernel::Amx(precision) => amx::shape(precision),
        }
    }

    /// Quantizes a row into groups.
    fn encode<'a>(
        self,
        encoding: Encoding,
        x: &[f32],
        grid: Grid,
        lines: impl Iterator<Item = &'a mut [u32; LINE]>,
    ) {
        match self {
            // SAFETY: `choose` has checked the processor's features.
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Kernel::Amx(precision) => unsafe { amx::encode(precision, x, grid, lines) },
            _ => vector::encode(encoding, x, grid, lines),
        }
    }
}

/// The layout that a kernel needs.
struct Shape {
    /// Inputs per group.
    group: usize,
    /// Columns of a panel.
    width: usize,
    encoding: Encoding,
    /// Groups that are multiplied at a time: a part is padded with zeros to a multiple of it.
    step: usize,
    /// Rows of the tallest tile.
    height: usize,
    /// The same of the part in f32.
    exact_height: usize,
}

impl Shape {
    fn of<K: tile::Kernel>(encoding: Encoding) -> Self {
        let height = K::HEIGHT;
        Self { group: encoding.group(), width: 2 * K::LANES, encoding, step: 1, height, exact_height: height }
    }

    /// Groups in a part of `inputs` inputs, padding included.
    fn groups(&self, inputs: usize) -> usize {
        inputs.div_ceil(self.group).next_multiple_of(self.step)
    }
}

/// What a group contains.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only the x86 kernels use all of them"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    /// One value, as the bits of an f32.
    Single(Precision),
    /// Two i16, weights and inputs.
    Pairs,
    /// Four: i8 weights, u8 inputs (biased by +128). Accumulators start at -128 Σw to cancel the bias.
    Quads,
    /// Four i8, weights and inputs.
    Bytes,
    /// Two bf16, weights and inputs.
    Bf16,
}

impl Encoding {
    fn group(self) -> usize {
        match self {
            Encoding::Single(_) => 1,
            Encoding::Pairs | Encoding::Bf16 => 2,
            Encoding::Quads | Encoding::Bytes => 4,
        }
    }

    fn precision(self) -> Precision {
        match self {
            Encoding::Single(precision) => precision,
            Encoding::Pairs | Encoding::Quads | Encoding::Bytes => Precision::Int8,
            Encoding::Bf16 => Precision::Bf16,
        }
    }
}

impl Precision {
    /// Bytes that a weight takes on this processor: more than the precision's own if it lacks the instructions.
    pub fn weight_bytes(self) -> usize {
        size_of::<u32>() / Kernel::choose(self).shape().group
    }

    /// Inputs per part of a panel; the last part may have fewer. They fill whole lines in every encoding, so that parts
    /// are the same for every kernel. At most 768 for int8, whose sums are then exact in an f32; at most 512 for bf16,
    /// of which 32 columns are 32 KiB and fit in the L1 cache.
    fn depth(self, inputs: usize) -> usize {
        let (most, line) = match self {
            Precision::Int8 => (768, 4 * LINE),
            Precision::Bf16 => (512, 2 * LINE),
        };
        inputs.div_ceil(inputs.div_ceil(most)).next_multiple_of(line)
    }
}

/// The values that int8 can represent: `zero + scale × q` for each q from -127 to 127.
#[derive(Debug, Clone, Copy)]
struct Grid {
    zero: f32,
    scale: f32,
}

impl Grid {
    /// That of bf16, which has none.
    const UNUSED: Self = Self { zero: 0.0, scale: 1.0 };

    /// For values from `low` to `high`; all NaN if one of them is.
    fn over((low, high): (f32, f32)) -> Self {
        Self { zero: (low + high) / 2.0, scale: (high - low) / 254.0 }
    }

    /// For values between -`most` and `most`.
    fn symmetric((low, high): (f32, f32)) -> Self {
        let most = high.max(-low);
        Self::over((-most, most))
    }

    /// 1 / scale; 0 if all values are equal.
    fn factor(self) -> f32 {
        if self.scale > 0.0 { 1.0 / self.scale } else { 0.0 }
    }

    /// Sum of the values that represent those of a row; the zero point is 0.
    fn sum(self, row: &[f32]) -> f32 {
        let factor = self.factor();
        self.scale * row.iter().map(|x| (x * factor).round_ties_even() as i32).sum::<i32>() as f32
    }
}

/// Quantized weights, `[inputs, outputs]`.
pub struct Quantized {
    kernel: Kernel,
    inputs: usize,
    outputs: usize,
    /// Inputs per part, which fill whole lines of groups; the last part may have fewer.
    depth: usize,
    /// In order of part, panel, group and column.
    panels: AVec<u32>,
    /// Scale of each column's weights; 1 for bf16.
    scales: Vec<f32>,
    /// Initial accumulators: for each part, one per column.
    start: Vec<i32>,
    /// Of int8.
    exact: Option<Exact>,
}

impl Quantized {
    /// Quantizes `weight`, `[outputs, inputs]`. A `calibration` makes int8 more precise.
    pub fn new(
        weight: &[f32],
        inputs: usize,
        outputs: usize,
        precision: Precision,
        calibration: Option<Calibration<'_>>,
    ) -> Self {
        Self::with(weight, inputs, outputs, Kernel::choose(precision), calibration)
    }

    fn with(
        weight: &[f32],
        inputs: usize,
        outputs: usize,
        kernel: Kernel,
        calibration: Option<Calibration<'_>>,
    ) -> Self {
        let shape = kernel.shape();
        let Shape { group, width, encoding, .. } = shape;
        let (weight, grids, exact) = match encoding.precision() {
            Precision::Int8 => {
                let (weight, grids, exact) = Exact::split(weight, inputs, calibration, width);
                (weight, grids, Some(exact))
            }
            Precision::Bf16 => (Cow::Borrowed(weight), vec![Grid::UNUSED; outputs], None),
        };
        let depth = encoding.precision().depth(inputs);
        let columns = outputs.next_multiple_of(width);
        let groups = inputs.div_ceil(group).next_multiple_of(LINE);
        let mut scales = vec![0.0; columns];
        let mut codes = vec![0; columns * groups];
        let rows = weight.chunks(inputs).zip(grids).zip(codes.chunks_mut(groups));
        for (((weight, grid), codes), scale) in rows.zip(&mut scales) {
            *scale = grid.scale;
            kernel.encode(encoding, weight, grid, codes.as_chunks_mut().0.iter_mut());
            if encoding == Encoding::Quads {
                // Undo the bias of +128, which is for inputs only.
                codes.iter_mut().for_each(|code| *code ^= 0x8080_8080);
            }
        }
        let mut panels = AVec::with_capacity(0, columns * shape.groups(inputs));
        let mut start = Vec::new();
        for part in (0..inputs).step_by(depth) {
            let at = part / group..part / group + shape.groups(depth.min(inputs - part));
            for rows in codes.chunks(width * groups) {
                for at in at.clone() {
                    rows.chunks(groups).for_each(|row| panels.push(row[at]));
                }
                start.extend(rows.chunks(groups).map(|row| match encoding {
                    Encoding::Quads => {
                        let bytes: &[i8] = cast_slice(&row[at.clone()]);
                        bytes.iter().map(|&byte| -128 * i32::from(byte)).sum()
                    }
                    _ => 0,
                }));
            }
        }
        Self { kernel, inputs, outputs, depth, panels, scales, start, exact }
    }

    /// Columns of a panel.
    pub fn width(&self) -> usize {
        self.kernel.shape().width
    }

    /// `[rows, inputs]` to `[rows, outputs]`; `bias` has one element per column of every panel.
    pub fn multiply(&self, x: &[f32], bias: &[f32], out: &mut [f32], activation: Option<Activation>) {
        let shape = self.kernel.shape();
        let Shape { group, width, .. } = shape;
        let count = x.len() / self.inputs;
        WORKSPACE.with_borrow_mut(|buffers| {
            self.encode(x, buffers);
            let Buffers { rows, scales, exact, .. } = buffers;
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            // SAFETY: `choose` has checked that AMX is available.
            let _tiles = matches!(self.kernel, Kernel::Amx(_)).then(|| unsafe { amx::Tiles::configure() });
            let (mut panels, mut start) = (&self.panels[..], &self.start[..]);
            for part in (0..self.inputs).step_by(self.depth) {
                let depth = shape.groups(self.depth.min(self.inputs - part));
                let left = rows.some(0..count, part / group..part / group + depth);
                for column in (0..self.outputs).step_by(width) {
                    let (panel, from);
                    (panel, panels) = panels.split_at(depth * width);
                    (from, start) = start.split_at(width);
                    let (first, last) = (part == 0, part + self.depth >= self.inputs);
                    let bias = &bias[column..][..width];
                    self.run(Strip {
                        left,
                        panel,
                        ahead: panels,
                        start: from,
                        out: &mut out[column..],
                        out_stride: self.outputs,
                        width: width.min(self.outputs - column),
                        exact: self.exact.as_ref().filter(|_| first).map(|e| ExactStrip {
                            left: exact.some(0..count, 0..e.inputs()),
                            panel: e.panel(column, width),
                            bias,
                        }),
                        epilogue: match &self.exact {
                            Some(_) => {
                                Epilogue::Scale { rows: scales, columns: &self.scales[column..][..width] }
                            }
                            None => Epilogue::Bias { add: !first, bias: last.then_some(bias) },
                        },
                        activation: activation.filter(|_| last),
                    });
                }
            }
        });
    }

    /// Packs the rows of `x`, quantized.
    fn encode(&self, x: &[f32], Buffers { rows, scales, exact, smoothed }: &mut Buffers) {
        let shape = self.kernel.shape();
        rows.start(shape.groups(self.inputs), shape.height);
        let Some(part) = &self.exact else {
            return x
                .chunks(self.inputs)
                .for_each(|x| self.kernel.encode(shape.encoding, x, Grid::UNUSED, rows.lines()));
        };
        scales.clear();
        exact.start(part.inputs(), shape.exact_height);
        for x in x.chunks(self.inputs) {
            let (row, range) = match part.factors.is_empty() {
                true => (x, vector::range(x)),
                false => {
                    smoothed.resize(self.inputs, 0.0);
                    let range = vector::smooth(x, &part.factors, smoothed);
                    (&smoothed[..], range)
                }
            };
            let grid = Grid::over(range);
            scales.push(grid.scale);
            if let Some(line) = exact.lines().next() {
                part.gather(grid.zero, x, line);
            }
            self.kernel.encode(shape.encoding, row, grid, rows.lines());
        }
    }

    fn run(&self, strip: Strip<'_>) {
        match self.kernel {
            Kernel::Portable(_) => vector::run_rounded(strip),
            // SAFETY: `choose` has checked the processor's features.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { x86::run_avx2(strip) },
            // SAFETY: the same.
            #[cfg(target_arch = "x86_64")]
            Kernel::AvxVnni => unsafe { x86::run_avx_vnni(strip) },
            // SAFETY: the same.
            #[cfg(target_arch = "x86_64")]
            Kernel::Vnni => unsafe { x86::run_vnni(strip) },
            // SAFETY: the same.
            #[cfg(target_arch = "x86_64")]
            Kernel::Bf16 => unsafe { x86::run_bf16(strip) },
            // SAFETY: the same.
            #[cfg(target_arch = "aarch64")]
            Kernel::Dot => unsafe { arm::run_dot(strip) },
            // SAFETY: the same.
            #[cfg(target_arch = "aarch64")]
            Kernel::Bf16Dot => unsafe { arm::run_bf16_dot(strip) },
            // SAFETY: the same, and `multiply` has configured the tiles.
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Kernel::Amx(precision) => unsafe { amx::run(precision, strip) },
        }
    }
}

thread_local! {
    static WORKSPACE: RefCell<Buffers> = RefCell::new(Buffers {
        rows: PackedA::new(),
        scales: Vec::new(),
        exact: PackedA::new(),
        smoothed: Vec::new(),
    });
}

/// The quantized input.
struct Buffers {
    /// Packed A block.
    rows: PackedA<u32>,
    /// The scale of each row, for int8.
    scales: Vec<f32>,
    /// Packed A block of what is multiplied in f32.
    exact: PackedA<f32>,
    /// One row, smoothed.
    smoothed: Vec<f32>,
}

/// Rounds to the nearest bfloat16, ties to even.
#[inline(always)]
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The least and the greatest of a row's elements and 0; NaN if an element is NaN or infinite.
#[inline(always)]
fn range<S: Simd>(simd: S, row: &[f32]) -> (f32, f32) {
    let mut extremes = [Extremes::new(simd); 2];
    let (vectors, rest) = S::as_simd_f32s(row);
    let (pairs, last) = vectors.as_chunks::<2>();
    for pair in pairs {
        extremes.iter_mut().zip(pair).for_each(|(extremes, &x)| extremes.add(simd, x));
    }
    last.iter().for_each(|&x| extremes[0].add(simd, x));
    extremes[1].add(simd, simd.partial_load_f32s(rest));
    Extremes::range(simd, extremes)
}

/// Writes the products of a row's elements and the factors; returns their [`range`].
#[inline(always)]
fn smooth<S: Simd>(simd: S, row: &[f32], factors: &[f32], out: &mut [f32]) -> (f32, f32) {
    let mut extremes = [Extremes::new(simd); 2];
    let (vectors, rest) = S::as_simd_f32s(row);
    let (factors, factors_rest) = S::as_simd_f32s(&factors[..row.len()]);
    let (out, out_rest) = S::as_mut_simd_f32s(&mut out[..row.len()]);
    for (at, ((&x, &factor), out)) in vectors.iter().zip(factors).zip(out).enumerate() {
        *out = simd.mul_f32s(x, factor);
        extremes[at % 2].add(simd, *out);
    }
    let last = simd.mul_f32s(simd.partial_load_f32s(rest), simd.partial_load_f32s(factors_rest));
    simd.partial_store_f32s(out_rest, last);
    extremes[0].add(simd, last);
    Extremes::range(simd, extremes)
}

/// The least and the greatest elements of each lane so far.
#[derive(Clone, Copy)]
struct Extremes<S: Simd> {
    low: S::f32s,
    high: S::f32s,
    /// Sum of the elements times 0: NaN if one is NaN or infinite.
    zeros: S::f32s,
}

impl<S: Simd> Extremes<S> {
    #[inline(always)]
    fn new(simd: S) -> Self {
        let zero = simd.splat_f32s(0.0);
        Self { low: zero, high: zero, zeros: zero }
    }

    #[inline(always)]
    fn add(&mut self, simd: S, x: S::f32s) {
        self.low = simd.min_f32s(x, self.low);
        self.high = simd.max_f32s(x, self.high);
        self.zeros = simd.mul_add_e_f32s(x, simd.splat_f32s(0.0), self.zeros);
    }

    #[inline(always)]
    fn range(simd: S, [a, b]: [Self; 2]) -> (f32, f32) {
        let zeros = simd.reduce_sum_f32s(simd.add_f32s(a.zeros, b.zeros));
        let low = simd.reduce_min_f32s(simd.min_f32s(a.low, b.low));
        (low + zeros, simd.reduce_max_f32s(simd.max_f32s(a.high, b.high)) + zeros)
    }
}

/// Quantizes a row into groups, and pads its last line.
#[inline(always)]
fn encode<'a>(encoding: Encoding, x: &[f32], grid: Grid, lines: impl Iterator<Item = &'a mut [u32; LINE]>) {
    /// 1.5 × 2^23: adding it rounds to the nearest integer, which is then in the mantissa's low bits.
    const ROUND: f32 = 12_582_912.0;
    let (zero, factor) = (grid.zero, grid.factor());
    let nearest = |x: f32| ((x - zero) * factor + ROUND).to_bits().wrapping_sub(ROUND.to_bits());
    for (x, line) in x.chunks(encoding.group() * LINE).zip(lines) {
        match encoding {
            Encoding::Single(Precision::Int8) => {
                fill::<_, LINE>(line, x, |x| (nearest(x) as i32 as f32).to_bits());
            }
            Encoding::Single(Precision::Bf16) => fill::<_, LINE>(line, x, |x| u32::from(bf16(x)) << 16),
            Encoding::Pairs => fill::<_, { 2 * LINE }>(line, x, |x| nearest(x) as u16),
            Encoding::Quads => fill::<_, { 4 * LINE }>(line, x, |x| nearest(x).wrapping_add(128) as u8),
            Encoding::Bytes => fill::<_, { 4 * LINE }>(line, x, |x| nearest(x) as u8),
            Encoding::Bf16 => fill::<_, { 2 * LINE }>(line, x, bf16),
        }
    }
}

/// Encodes one line, padded with zeros.
#[inline(always)]
fn fill<T: Copy, const N: usize>(line: &mut [u32; LINE], x: &[f32], encode: impl Fn(f32) -> T)
where
    [T; N]: Pod,
{
    let mut padded = [0.0; N];
    // With a fixed length the compiler vectorizes the loop.
    let x: &[f32; N] = x.try_into().unwrap_or_else(|_| {
        padded[..x.len()].copy_from_slice(x);
        &padded
    });
    let codes: &mut [T; N] = cast_mut(line);
    for (to, &x) in codes.iter_mut().zip(x) {
        *to = encode(x);
    }
}

/// A multiplication of rows with one part of one panel.
struct Strip<'a> {
    left: Left<'a, u32, LINE>,
    panel: &'a [u32],
    /// Data needed next, which is prefetched during the multiplication.
    ahead: &'a [u32],
    /// Initial accumulators, one per column.
    start: &'a [i32],
    out: &'a mut [f32],
    out_stride: usize,
    /// Columns to write.
    width: usize,
    /// Of int8, before the first part: the part in f32, which is written first.
    exact: Option<ExactStrip<'a>>,
    epilogue: Epilogue<'a>,
    /// After the last part.
    activation: Option<Activation>,
}

/// What of a layer is multiplied in f32, for one panel.
#[derive(Clone, Copy)]
struct ExactStrip<'a> {
    left: Left<'a, f32, LINE>,
    panel: &'a [f32],
    bias: &'a [f32],
}

/// What is done to the sums of a part.
#[derive(Clone, Copy)]
enum Epilogue<'a> {
    /// Of int8: multiplies them by the scales of their row and column, and adds them to `out`.
    Scale { rows: &'a [f32], columns: &'a [f32] },
    /// Of bf16: adds them to `out` or writes them, with the bias after the last part.
    Bias { add: bool, bias: Option<&'a [f32]> },
}

impl Strip<'_> {
    /// The part of `out` for a row's results.
    #[inline(always)]
    fn row(&mut self, row: usize) -> &mut [f32] {
        &mut self.out[row * self.out_stride..][..self.width]
    }

    /// Writes the part in f32, if there is one, of a tile of rows that begins at `row`.
    #[inline(always)]
    fn write_exact<S: Simd>(&mut self, simd: S, left: Left<'_, f32, LINE>, row: usize) {
        let Some(ExactStrip { panel, bias, .. }) = self.exact else { return };
        let mut target = Products {
            out: &mut self.out[row * self.out_stride..],
            stride: self.out_stride,
            width: self.width,
            start: Start::Row(bias),
            factors: None,
        };
        let right = Right { x: panel, stride: 2 * S::F32_LANES, ahead: &[] };
        strip::<_, 2, _>(F32(simd), left, right, &mut target);
    }

    /// Applies the activation, if any, to rows that have been written.
    #[inline(always)]
    fn activate(&mut self, rows: Range<usize>) {
        if let Some(activation) = self.activation {
            let out = &mut self.out[rows.start * self.out_stride..];
            let end = out.len().min((rows.len() - 1) * self.out_stride + self.width);
            activate_columns(activation, &mut out[..end], self.out_stride, self.width);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::{is_too_large, random};
    use super::*;

    fn product(quantized: &Quantized, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / quantized.inputs;
        let mut out = vec![f32::NAN; rows * quantized.outputs];
        let bias = vec![0.5; quantized.outputs.next_multiple_of(quantized.width())];
        quantized.multiply(x, &bias, &mut out, None);
        out
    }

    /// Every kernel that this processor has.
    fn kernels(precision: Precision) -> Vec<Kernel> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut all =
            vec![Kernel::choose(precision), Kernel::choose_vectors(precision), Kernel::Portable(precision)];
        #[cfg(target_arch = "x86_64")]
        match precision {
            Precision::Int8 => {
                all.extend(is_x86_feature_detected!("avx2").then_some(Kernel::Avx2));
                all.extend(x86::has_avx_vnni().then_some(Kernel::AvxVnni));
            }
            Precision::Bf16 => all.extend(x86::has_bf16().then_some(Kernel::Bf16)),
        }
        all
    }

    #[test]
    fn int8_is_close_to_f32_and_identical_for_every_kernel() {
        for (rows, inputs, outputs) in [(1, 3, 1), (7, 41, 33), (29, 1601, 70), (14, 64, 64), (13, 300, 40)] {
            if is_too_large(rows, inputs, outputs) {
                continue;
            }
            let (x, weight) = (random(rows * inputs, 1), random(outputs * inputs, 2));
            let expected = Expected { mean: random(inputs, 3), spread: vec![0.3; inputs] };
            let with = |expected: Option<&Expected>| -> Vec<Vec<f32>> {
                let all = kernels(Precision::Int8).into_iter();
                let all = all.map(|kernel| {
                    Quantized::with(&weight, inputs, outputs, kernel, expected.map(Into::into))
                });
                all.map(|quantized| product(&quantized, &x)).collect()
            };
            let smoothed = with(Some(&expected));
            assert!(smoothed.iter().all(|other| *other == smoothed[0]), "{rows}x{inputs}x{outputs}");
            let all = with(None);
            for other in &all[1..] {
                assert!(&all[0] == other, "{rows}x{inputs}x{outputs}");
            }
            let length = (inputs as f32).sqrt();
            for (row, out) in x.chunks(inputs).zip(all[0].chunks(outputs)) {
                for (output, got) in out.iter().enumerate() {
                    let weight = &weight[output * inputs..][..inputs];
                    let want = row.iter().zip(weight).map(|(a, b)| a * b).sum::<f32>() + 0.5;
                    assert!((got - want).abs() < 0.02 * length, "{rows}x{inputs}x{outputs}: {got} {want}");
                }
            }
        }
    }

    /// As in trained models: few inputs are far larger than the others, and most have one sign.
    #[test]
    fn int8_is_close_to_f32_with_inputs_of_very_different_sizes() {
        let (rows, inputs, outputs) = if cfg!(miri) { (2, 256, 3) } else { (20, 384, 50) };
        let norm = Expected {
            mean: (0..inputs).map(|i| if i % 128 == 7 { 20.0 } else { 0.3 }).collect(),
            spread: (0..inputs).map(|i| if i % 64 == 9 { 4.0 } else { 0.3 }).collect(),
        };
        let noise = random(rows * inputs, 1);
        let value = |(i, noise): (usize, f32)| norm.mean[i % inputs] + norm.spread[i % inputs] * noise;
        let x: Vec<f32> = noise.into_iter().enumerate().map(value).collect();
        let weight = random(outputs * inputs, 2);
        let error = |expected: Option<&Expected>| {
            let got = product(
                &Quantized::new(&weight, inputs, outputs, Precision::Int8, expected.map(Into::into)),
                &x,
            );
            let of = |(at, got): (usize, &f32)| {
                let (row, output) = (at / outputs, at % outputs);
                let terms = x[row * inputs..][..inputs].iter().zip(&weight[output * inputs..]);
                let want = terms.map(|(x, weight)| f64::from(*x) * f64::from(*weight)).sum::<f64>() + 0.5;
                (f64::from(*got) - want).powi(2)
            };
            (got.iter().enumerate().map(of).sum::<f64>() / got.len() as f64).sqrt()
        };
        let (with, without) = (error(Some(&norm)), error(None));
        assert!(with < without / 6.0, "{with} is the root mean square error, {without} without smoothing");
    }

    #[test]
    fn only_a_row_that_is_not_finite_has_such_results() {
        let (inputs, outputs) = (70, 20);
        let weight = random(outputs * inputs, 2);
        for precision in [Precision::Int8, Precision::Bf16] {
            for kernel in kernels(precision) {
                for (bad, at) in [(f32::NAN, 3), (f32::INFINITY, 69)] {
                    let mut x = random(5 * inputs, 1);
                    x[2 * inputs + at] = bad;
                    let expected = Expected { mean: vec![0.5; inputs], spread: random(inputs, 3) };
                    let quantized =
                        Quantized::with(&weight, inputs, outputs, kernel, Some((&expected).into()));
                    let out = product(&quantized, &x);
                    for (row, out) in out.chunks(outputs).enumerate() {
                        assert!(out.iter().all(|x| x.is_finite() == (row != 2)), "{kernel:?} {row}: {out:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_is_close_to_f32() {
        for kernel in kernels(Precision::Bf16) {
            let (inputs, outputs) = if cfg!(miri) { (81, 7) } else { (801, 37) };
            let (x, weight) = (random(13 * inputs, 1), random(outputs * inputs, 2));
            let out = product(&Quantized::with(&weight, inputs, outputs, kernel, None), &x);
            for (row, out) in x.chunks(inputs).zip(out.chunks(outputs)) {
                for (output, got) in out.iter().enumerate() {
                    let weight = &weight[output * inputs..][..inputs];
                    let want = row.iter().zip(weight).map(|(a, b)| a * b).sum::<f32>() + 0.5;
                    assert!((got - want).abs() < 0.2, "{got} {want}");
                }
            }
        }
    }

    #[test]
    fn bfloat16_is_rounded_to_even() {
        assert_eq!(bf16(1.0), 0x3f80);
        assert_eq!(bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(bf16(f32::from_bits(0x3f80_8001)), 0x3f81);
        assert!(f32::from_bits(u32::from(bf16(f32::NAN)) << 16).is_nan());
    }
}
