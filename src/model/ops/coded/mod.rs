//! Matrix multiplication on one CPU core with fewer bits than f32: `int8` and `bf16`.
//!
//! `int8`: a weight is eight bits times its output's scale, the input is rounded to eight bits times its
//! row's scale, anew for every row; sums are exact. Where nothing multiplies bytes without overflow (AVX2),
//! both stand as sixteen bits in memory, elsewhere as f32: the results are the same everywhere.
//! `bf16`: weights and input are rounded to bfloat16, sums are f32. Where no instruction for it is faster than
//! those for f32, both stand as f32 in memory.
//!
//! Weights and input stand in groups of 4 bytes, as many inputs as one instruction multiplies and adds
//! up: one, two of 16 bits or four of 8. Panels are as in [`super::matmul`], a group in the place of a number.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod vector;

use std::cell::RefCell;
use std::ops::Range;

use aligned_vec::AVec;
use pulp::Simd;
use pulp::bytemuck::{Pod, cast_mut, cast_slice};

use super::activation::{Activation, activate_columns};
use super::tile::{self, LINE, Left, Rows};

#[cfg(target_arch = "aarch64")]
use vector::arm;
#[cfg(target_arch = "x86_64")]
use vector::x86;

/// What a weight is stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    Int8,
    Bf16,
}

/// A processor's way to multiply them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// As f32.
    Rounded(Code),
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
    /// Whole tiles of 16 rows.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Code),
}

impl Kernel {
    fn choose(code: Code) -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if amx::available() {
            return Kernel::Amx(code);
        }
        Self::choose_vectors(code)
    }

    fn choose_vectors(code: Code) -> Self {
        #[cfg(target_arch = "x86_64")]
        match code {
            Code::Int8 if x86::has_vnni() => return Kernel::Vnni,
            Code::Int8 if x86::has_avx_vnni() => return Kernel::AvxVnni,
            Code::Int8 if is_x86_feature_detected!("avx2") => return Kernel::Avx2,
            Code::Bf16 if x86::has_bf16() && x86::bf16_is_fast() => return Kernel::Bf16,
            _ => {}
        }
        #[cfg(target_arch = "aarch64")]
        match code {
            Code::Int8 if arm::has_dot() => return Kernel::Dot,
            Code::Bf16 if arm::has_bf16() => return Kernel::Bf16Dot,
            _ => {}
        }
        Kernel::Rounded(code)
    }

    fn shape(self) -> Shape {
        match self {
            Kernel::Rounded(code) => vector::shape_rounded(Encoding::Single(code)),
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
            Kernel::Amx(code) => amx::shape(code),
        }
    }

    /// A row in groups; returns its scale.
    fn encode<'a>(
        self,
        encoding: Encoding,
        x: &[f32],
        lines: impl Iterator<Item = &'a mut [u32; LINE]>,
    ) -> f32 {
        match self {
            // SAFETY: `choose` has seen the processor's features.
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Kernel::Amx(code) => unsafe { amx::encode(code, x, lines) },
            _ => vector::encode(encoding, x, lines),
        }
    }
}

/// What a kernel wants of the layout.
struct Shape {
    /// Inputs of a group.
    group: usize,
    /// Columns of a panel.
    width: usize,
    encoding: Encoding,
    /// Groups that are multiplied at a time: parts are whole ones, zeros at their ends.
    step: usize,
    /// Rows of the tallest tile.
    height: usize,
}

impl Shape {
    fn of<K: tile::Kernel>(encoding: Encoding) -> Self {
        Self { group: encoding.group(), width: 2 * K::LANES, encoding, step: 1, height: K::HEIGHT }
    }

    /// Groups of a part.
    fn groups(&self, inputs: usize) -> usize {
        inputs.div_ceil(self.group).next_multiple_of(self.step)
    }
}

/// How inputs stand in a group.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86's kernels have them all"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    /// One, in the bits of an f32.
    Single(Code),
    /// Two of i16, both sides.
    Pairs,
    /// Four: weights i8, inputs u8 with 128 added, whose share the sums begin without.
    Quads,
    /// Four of i8, both sides.
    Bytes,
    /// Two of bf16.
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

    fn code(self) -> Code {
        match self {
            Encoding::Single(code) => code,
            Encoding::Pairs | Encoding::Quads | Encoding::Bytes => Code::Int8,
            Encoding::Bf16 => Code::Bf16,
        }
    }
}

impl Code {
    /// Inputs of each part of a panel but perhaps the last: whole lines of groups, however they stand, so that
    /// parts are the same for every kernel. Sums of 768 products of bytes are exact in an f32; of bf16, 32
    /// columns and 512 inputs are 32 KiB, which the first-level cache keeps.
    fn depth(self, inputs: usize) -> usize {
        let (most, line) = match self {
            Code::Int8 => (768, 4 * LINE),
            Code::Bf16 => (512, 2 * LINE),
        };
        inputs.div_ceil(inputs.div_ceil(most)).next_multiple_of(line)
    }
}

/// Weights `[inputs, outputs]`.
pub struct Coded {
    kernel: Kernel,
    inputs: usize,
    outputs: usize,
    /// Inputs of each part but perhaps the last: whole lines of groups.
    depth: usize,
    /// Part after part, panel after panel, group after group.
    panels: AVec<u32>,
    /// Of a column's weights; 1 for bf16.
    scales: Vec<f32>,
    /// What each part's sums begin with, a number for every column.
    start: Vec<i32>,
}

impl Coded {
    /// `weight` is `[outputs, inputs]`.
    pub fn new(weight: &[f32], inputs: usize, outputs: usize, code: Code) -> Self {
        Self::with(weight, inputs, outputs, Kernel::choose(code))
    }

    fn with(weight: &[f32], inputs: usize, outputs: usize, kernel: Kernel) -> Self {
        let shape = kernel.shape();
        let Shape { group, width, encoding, .. } = shape;
        let depth = encoding.code().depth(inputs);
        let columns = outputs.next_multiple_of(width);
        let groups = inputs.div_ceil(group).next_multiple_of(LINE);
        let mut scales = vec![0.0; columns];
        let mut codes = vec![0; columns * groups];
        for ((weight, codes), scale) in weight.chunks(inputs).zip(codes.chunks_mut(groups)).zip(&mut scales) {
            *scale = kernel.encode(encoding, weight, codes.as_chunks_mut().0.iter_mut());
            if encoding == Encoding::Quads {
                // What is added to an input is not to a weight.
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

    /// `[rows, inputs]` to `[rows, outputs]`; `bias` has a number for every column of every panel.
    pub fn multiply(&self, x: &[f32], bias: &[f32], out: &mut [f32], activation: Option<Activation>) {
        let shape = self.kernel.shape();
        let Shape { group, width, encoding, height, .. } = shape;
        let count = x.len() / self.inputs;
        ROOM.with_borrow_mut(|Room { rows, scales }| {
            rows.start(shape.groups(self.inputs), height);
            scales.clear();
            scales.extend(x.chunks(self.inputs).map(|x| self.kernel.encode(encoding, x, rows.lines())));
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            // SAFETY: `choose` has seen that there are tiles.
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
            Kernel::Rounded(_) => vector::run_rounded(strip),
            // SAFETY: `choose` has seen the processor's features.
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
            Kernel::Amx(code) => unsafe { amx::run(code, strip) },
        }
    }
}

thread_local! {
    static ROOM: RefCell<Room> =
        RefCell::new(Room { rows: Rows::new(), scales: Vec::new() });
}

/// The encoded input.
struct Room {
    rows: Rows<u32>,
    scales: Vec<f32>,
}

/// Rounded to the nearest bfloat16, ties to even.
#[inline(always)]
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The greatest absolute value; NaN where a number is none, or infinite.
#[inline(always)]
fn greatest<S: Simd>(simd: S, row: &[f32]) -> f32 {
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
    let greatest = simd.reduce_max_f32s(simd.max_f32s(strands[0], strands[1]));
    let zeros = simd.reduce_sum_f32s(simd.add_f32s(zeros[0], zeros[1]));
    rest.iter().fold(greatest, |greatest, x| greatest.max(x.abs()))
        + rest.iter().fold(zeros, |zeros, x| zeros + x * 0.0)
}

/// A row in groups, those of zeros behind the last in its line; returns the row's scale.
#[inline(always)]
fn encode<'a, S: Simd>(
    simd: S,
    encoding: Encoding,
    x: &[f32],
    lines: impl Iterator<Item = &'a mut [u32; LINE]>,
) -> f32 {
    /// Adding it leaves the nearest integer in the mantissa's low bits.
    const ROUND: f32 = 12_582_912.0;
    let (scale, factor) = match encoding.code() {
        Code::Bf16 => (1.0, 1.0),
        Code::Int8 => {
            let greatest = greatest(simd, x);
            (greatest / 127.0, if greatest > 0.0 { 127.0 / greatest } else { 0.0 })
        }
    };
    let nearest = |x: f32| (x * factor + ROUND).to_bits().wrapping_sub(ROUND.to_bits());
    for (x, line) in x.chunks(encoding.group() * LINE).zip(lines) {
        match encoding {
            Encoding::Single(Code::Int8) => {
                fill::<_, LINE>(line, x, |x| (nearest(x) as i32 as f32).to_bits());
            }
            Encoding::Single(Code::Bf16) => fill::<_, LINE>(line, x, |x| u32::from(bf16(x)) << 16),
            Encoding::Pairs => fill::<_, { 2 * LINE }>(line, x, |x| nearest(x) as u16),
            Encoding::Quads => fill::<_, { 4 * LINE }>(line, x, |x| nearest(x).wrapping_add(128) as u8),
            Encoding::Bytes => fill::<_, { 4 * LINE }>(line, x, |x| nearest(x) as u8),
            Encoding::Bf16 => fill::<_, { 2 * LINE }>(line, x, bf16),
        }
    }
    scale
}

/// A line's codes, those of zeros behind the last number.
#[inline(always)]
fn fill<T: Copy, const N: usize>(line: &mut [u32; LINE], x: &[f32], code: impl Fn(f32) -> T)
where
    [T; N]: Pod,
{
    let mut padded = [0.0; N];
    // So many that the compiler knows how many vectors they are.
    let x: &[f32; N] = x.try_into().unwrap_or_else(|_| {
        padded[..x.len()].copy_from_slice(x);
        &padded
    });
    let codes: &mut [T; N] = cast_mut(line);
    for (to, &x) in codes.iter_mut().zip(x) {
        *to = code(x);
    }
}

/// Rows times one part of one panel.
struct Strip<'a> {
    left: Left<'a, u32, LINE>,
    panel: &'a [u32],
    /// What is needed next; it is fetched meanwhile.
    ahead: &'a [u32],
    /// What the sums begin with.
    start: &'a [i32],
    out: &'a mut [f32],
    out_stride: usize,
    /// Columns that are written.
    width: usize,
    /// To what is there.
    add: bool,
    /// After the last part.
    finish: Option<Finish<'a>>,
}

impl Strip<'_> {
    /// Where a row's results go.
    #[inline(always)]
    fn row(&mut self, row: usize) -> &mut [f32] {
        &mut self.out[row * self.out_stride..][..self.width]
    }

    /// Some rows, which have been written.
    #[inline(always)]
    fn activate(&mut self, rows: Range<usize>) {
        if let Some(Finish { activation: Some(activation), .. }) = self.finish {
            let out = &mut self.out[rows.start * self.out_stride..];
            let end = out.len().min((rows.len() - 1) * self.out_stride + self.width);
            activate_columns(activation, &mut out[..end], self.out_stride, self.width);
        }
    }
}

/// The scales that turn sums into results, and what is added.
#[derive(Clone, Copy)]
struct Finish<'a> {
    rows: &'a [f32],
    columns: &'a [f32],
    bias: &'a [f32],
    activation: Option<Activation>,
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::numbers;
    use super::*;

    fn product(coded: &Coded, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / coded.inputs;
        let mut out = vec![f32::NAN; rows * coded.outputs];
        let bias = vec![0.5; coded.outputs.next_multiple_of(coded.width())];
        coded.multiply(x, &bias, &mut out, None);
        out
    }

    /// Every kernel that this processor has.
    fn kernels(code: Code) -> Vec<Kernel> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut all = vec![Kernel::choose(code), Kernel::choose_vectors(code), Kernel::Rounded(code)];
        #[cfg(target_arch = "x86_64")]
        match code {
            Code::Int8 => {
                all.extend(is_x86_feature_detected!("avx2").then_some(Kernel::Avx2));
                all.extend(x86::has_avx_vnni().then_some(Kernel::AvxVnni));
            }
            Code::Bf16 => all.extend(x86::has_bf16().then_some(Kernel::Bf16)),
        }
        all
    }

    #[test]
    fn int8_is_near_and_the_same_by_every_kernel() {
        for (rows, inputs, outputs) in [(1, 3, 1), (7, 41, 33), (29, 1601, 70), (14, 64, 64)] {
            let (x, weight) = (numbers(rows * inputs, 1), numbers(outputs * inputs, 2));
            let all: Vec<Vec<f32>> = kernels(Code::Int8)
                .into_iter()
                .map(|kernel| product(&Coded::with(&weight, inputs, outputs, kernel), &x))
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
    fn a_row_that_is_not_finite_stays_so_and_alone() {
        let (inputs, outputs) = (70, 20);
        let weight = numbers(outputs * inputs, 2);
        for code in [Code::Int8, Code::Bf16] {
            for kernel in kernels(code) {
                for (bad, at) in [(f32::NAN, 3), (f32::INFINITY, 69)] {
                    let mut x = numbers(5 * inputs, 1);
                    x[2 * inputs + at] = bad;
                    let out = product(&Coded::with(&weight, inputs, outputs, kernel), &x);
                    for (row, out) in out.chunks(outputs).enumerate() {
                        assert!(out.iter().all(|x| x.is_finite() == (row != 2)), "{kernel:?} {row}: {out:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_is_near() {
        for kernel in kernels(Code::Bf16) {
            let (inputs, outputs) = (801, 37);
            let (x, weight) = (numbers(13 * inputs, 1), numbers(outputs * inputs, 2));
            let out = product(&Coded::with(&weight, inputs, outputs, kernel), &x);
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
