//! Quantized matrix multiplication on one CPU core: `int8` and `bf16`.
//!
//! `int8`: weights are quantized to 8 bits with one scale per output, inputs to 8 bits with one scale per row, computed
//! for each row; sums are exact. Without an instruction that multiplies bytes without overflow, both are stored as 16
//! bits (AVX2) or as f32. The results are the same on every processor.
//! `bf16`: weights and inputs are rounded to bfloat16, accumulators are f32. If the processor has no bf16 instruction
//! that is faster than f32, both are stored as f32.
//!
//! Weights and inputs are stored in groups of 4 bytes, the values that one instruction multiplies and adds up: one of
//! 32 bits, two of 16 or four of 8. Panels are as in [`super::matmul`], with a group in place of a float.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod vector;

use std::cell::RefCell;
use std::ops::Range;

use aligned_vec::AVec;
use pulp::Simd;
use pulp::bytemuck::{Pod, cast_mut, cast_slice};

use super::activation::{Activation, activate_columns};
use super::tile::{self, LINE, Left, PackedA};

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

    /// Quantizes a row into groups; returns its scale.
    fn encode<'a>(
        self,
        encoding: Encoding,
        x: &[f32],
        lines: impl Iterator<Item = &'a mut [u32; LINE]>,
    ) -> f32 {
        match self {
            // SAFETY: `choose` has checked the processor's features.
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Kernel::Amx(precision) => unsafe { amx::encode(precision, x, lines) },
            _ => vector::encode(encoding, x, lines),
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
}

impl Shape {
    fn of<K: tile::Kernel>(encoding: Encoding) -> Self {
        Self { group: encoding.group(), width: 2 * K::LANES, encoding, step: 1, height: K::HEIGHT }
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
}

impl Quantized {
    /// Quantizes `weight`, `[outputs, inputs]`.
    pub fn new(weight: &[f32], inputs: usize, outputs: usize, precision: Precision) -> Self {
        Self::with(weight, inputs, outputs, Kernel::choose(precision))
    }

    fn with(weight: &[f32], inputs: usize, outputs: usize, kernel: Kernel) -> Self {
        let shape = kernel.shape();
        let Shape { group, width, encoding, .. } = shape;
        let depth = encoding.precision().depth(inputs);
        let columns = outputs.next_multiple_of(width);
        let groups = inputs.div_ceil(group).next_multiple_of(LINE);
        let mut scales = vec![0.0; columns];
        let mut codes = vec![0; columns * groups];
        for ((weight, codes), scale) in weight.chunks(inputs).zip(codes.chunks_mut(groups)).zip(&mut scales) {
            *scale = kernel.encode(encoding, weight, codes.as_chunks_mut().0.iter_mut());
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
        Self { kernel, inputs, outputs, depth, panels, scales, start }
    }

    /// Columns of a panel.
    pub fn width(&self) -> usize {
        self.kernel.shape().width
    }

    /// `[rows, inputs]` to `[rows, outputs]`; `bias` has one element per column of every panel.
    pub fn multiply(&self, x: &[f32], bias: &[f32], out: &mut [f32], activation: Option<Activation>) {
        let shape = self.kernel.shape();
        let Shape { group, width, encoding, height, .. } = shape;
        let count = x.len() / self.inputs;
        WORKSPACE.with_borrow_mut(|Buffers { rows, scales }| {
            rows.start(shape.groups(self.inputs), height);
            scales.clear();
            scales.extend(x.chunks(self.inputs).map(|x| self.kernel.encode(encoding, x, rows.lines())));
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
                    let last = part + self.depth >= self.inputs;
                    self.run(Strip {
                        left,
                        panel,
                        ahead: panels,
                        start: from,
                        out: &mut out[column..],
                        out_stride: self.outputs,
                        width: width.min(self.outputs - column),
                        add: part > 0,
                        finish: last.then(|| Finish {
                            rows: scales,
                            columns: &self.scales[column..][..width],
                            bias: &bias[column..][..width],
                            activation,
                        }),
                    });
                }
            }
        });
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
    static WORKSPACE: RefCell<Buffers> =
        RefCell::new(Buffers { rows: PackedA::new(), scales: Vec::new() });
}

/// The quantized input: its packed A block, and the scale of each row.
struct Buffers {
    rows: PackedA<u32>,
    scales: Vec<f32>,
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

/// The largest absolute value; NaN if an element is NaN or infinite.
#[inline(always)]
fn abs_max<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let (vectors, rest) = S::as_simd_f32s(row);
    let zero = simd.splat_f32s(0.0);
    let (mut strands, mut zeros) = ([zero; 2], [zero; 2]);
    let (pairs, last) = vectors.as_chunks::<2>();
    for pair in pairs {
        for ((strand, zeros), &x) in strands.iter_mut().zip(&mut zeros).zip(pair) {
            *strand = simd.max_f32s(simd.abs_f32s(x), *strand);
            *zeros = simd.mul_add_e_f32s(x, zero, *zeros);
        }
    }
    for &x in last {
        strands[0] = simd.max_f32s(simd.abs_f32s(x), strands[0]);
        zeros[0] = simd.mul_add_e_f32s(x, zero, zeros[0]);
    }
    let abs_max = simd.reduce_max_f32s(simd.max_f32s(strands[0], strands[1]));
    let zeros = simd.reduce_sum_f32s(simd.add_f32s(zeros[0], zeros[1]));
    rest.iter().fold(abs_max, |abs_max, x| abs_max.max(x.abs()))
        + rest.iter().fold(zeros, |zeros, x| zeros + x * 0.0)
}

/// Quantizes a row into groups, pads its last line with quantized zeros, and returns the row's scale.
#[inline(always)]
fn encode<'a, S: Simd>(
    simd: S,
    encoding: Encoding,
    x: &[f32],
    lines: impl Iterator<Item = &'a mut [u32; LINE]>,
) -> f32 {
    /// 1.5 × 2^23: adding it rounds to the nearest integer, which is then in the mantissa's low bits.
    const ROUND: f32 = 12_582_912.0;
    let (scale, factor) = match encoding.precision() {
        Precision::Bf16 => (1.0, 1.0),
        Precision::Int8 => {
            let abs_max = abs_max(simd, x);
            (abs_max / 127.0, if abs_max > 0.0 { 127.0 / abs_max } else { 0.0 })
        }
    };
    let nearest = |x: f32| (x * factor + ROUND).to_bits().wrapping_sub(ROUND.to_bits());
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
    scale
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
    /// Whether the products are added to the contents of `out`.
    add: bool,
    /// Epilogue, after the last part.
    finish: Option<Finish<'a>>,
}

impl Strip<'_> {
    /// The part of `out` for a row's results.
    #[inline(always)]
    fn row(&mut self, row: usize) -> &mut [f32] {
        &mut self.out[row * self.out_stride..][..self.width]
    }

    /// Applies the activation, if any, to rows that have been written.
    #[inline(always)]
    fn activate(&mut self, rows: Range<usize>) {
        if let Some(Finish { activation: Some(activation), .. }) = self.finish {
            let out = &mut self.out[rows.start * self.out_stride..];
            let end = out.len().min((rows.len() - 1) * self.out_stride + self.width);
            activate_columns(activation, &mut out[..end], self.out_stride, self.width);
        }
    }
}

/// Epilogue: multiplies sums by the scales of their row and column, adds the bias, then applies the activation.
#[derive(Clone, Copy)]
struct Finish<'a> {
    rows: &'a [f32],
    columns: &'a [f32],
    bias: &'a [f32],
    activation: Option<Activation>,
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
        for (rows, inputs, outputs) in [(1, 3, 1), (7, 41, 33), (29, 1601, 70), (14, 64, 64)] {
            if is_too_large(rows, inputs, outputs) {
                continue;
            }
            let (x, weight) = (random(rows * inputs, 1), random(outputs * inputs, 2));
            let all: Vec<Vec<f32>> = kernels(Precision::Int8)
                .into_iter()
                .map(|kernel| product(&Quantized::with(&weight, inputs, outputs, kernel), &x))
                .collect();
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

    #[test]
    fn only_a_row_that_is_not_finite_has_such_results() {
        let (inputs, outputs) = (70, 20);
        let weight = random(outputs * inputs, 2);
        for precision in [Precision::Int8, Precision::Bf16] {
            for kernel in kernels(precision) {
                for (bad, at) in [(f32::NAN, 3), (f32::INFINITY, 69)] {
                    let mut x = random(5 * inputs, 1);
                    x[2 * inputs + at] = bad;
                    let out = product(&Quantized::with(&weight, inputs, outputs, kernel), &x);
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
            let out = product(&Quantized::with(&weight, inputs, outputs, kernel), &x);
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
