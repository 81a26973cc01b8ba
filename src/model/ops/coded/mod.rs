//! Matrix multiplication on one CPU core with fewer bits than f32: `int8` and `bf16`.
//!
//! `int8`: a weight is eight bits times its output's scale, the input is rounded to eight bits times its
//! row's scale, anew for every row; sums are integers. Where nothing multiplies bytes without overflow
//! (AVX2), both stand as sixteen bits in memory: the sums, and so the results, are the same everywhere.
//! `bf16`: weights and input are rounded to bfloat16, sums are f32.
//!
//! Weights and input stand in groups of 4 bytes, as many inputs as one instruction multiplies and adds
//! up: two of 16 bits or four of 8. Panels are as in [`super::matmul`], a group in the place of a number.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod vector;

use std::cell::RefCell;
use std::ops::Range;

use aligned_vec::AVec;

use super::activation::{Activation, activate_columns};

#[cfg(target_arch = "x86_64")]
use vector::x86;
use vector::{Isa, Plain};

/// What a weight is stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    Int8,
    Bf16,
}

/// A processor's way to multiply them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// Pairs of 16 bits, in plain code.
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "x86_64")]
    Bf16,
    /// Whole tiles of 16 rows.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Code),
}

impl Kernel {
    fn choose(code: Code) -> Result<Self, String> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if amx::available() {
            return Ok(Kernel::Amx(code));
        }
        Self::choose_vectors(code)
    }

    fn choose_vectors(code: Code) -> Result<Self, String> {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            match code {
                Code::Bf16 if avx512 && is_x86_feature_detected!("avx512bf16") => return Ok(Kernel::Bf16),
                Code::Int8 if avx512 && is_x86_feature_detected!("avx512vnni") => return Ok(Kernel::Vnni),
                Code::Int8 if is_x86_feature_detected!("avx2") => return Ok(Kernel::Avx2),
                _ => {}
            }
        }
        match code {
            Code::Int8 => Ok(Kernel::Plain),
            Code::Bf16 => Err("this processor has no bf16 (AVX512-BF16 or AMX): f32 or int8".to_owned()),
        }
    }

    fn shape(self) -> Shape {
        match self {
            Kernel::Plain => Shape::of::<Plain>(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => Shape::of::<x86::Avx2>(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Vnni => Shape::of::<x86::Vnni>(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Bf16 => Shape::of::<x86::Bf16>(),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Kernel::Amx(code) => amx::shape(code),
        }
    }
}

/// Whether this processor can multiply in `code`; the message says what it lacks.
pub fn supported(code: Code) -> Result<(), String> {
    Kernel::choose(code).map(drop)
}

/// What a kernel wants of the layout.
struct Shape {
    /// Inputs of a group.
    group: usize,
    /// Columns of a panel.
    width: usize,
    encoding: Encoding,
    /// Groups that are multiplied at a time: rows are whole ones, zeros at their ends.
    step: usize,
    /// Rows that are multiplied at a time; `step` groups of each stand side by side.
    height: usize,
}

impl Shape {
    fn of<K: Isa>() -> Self {
        let encoding = K::ENCODING;
        Self { group: encoding.group(), width: 2 * K::LANES, encoding, step: 1, height: 1 }
    }

    /// Groups of a row.
    fn groups(&self, inputs: usize) -> usize {
        inputs.div_ceil(self.group).next_multiple_of(self.step)
    }
}

/// How inputs stand in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
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
            Encoding::Pairs | Encoding::Bf16 => 2,
            Encoding::Quads | Encoding::Bytes => 4,
        }
    }

    /// Inputs of a part of a panel at most. Sums of 768 products of bytes are exact in an f32; of bf16, 32
    /// columns and 512 inputs are 32 KiB, which the first-level cache keeps.
    fn depth(self) -> usize {
        match self {
            Encoding::Pairs | Encoding::Quads | Encoding::Bytes => 768,
            Encoding::Bf16 => 512,
        }
    }
}

/// Weights `[inputs, outputs]`.
pub struct Coded {
    kernel: Kernel,
    inputs: usize,
    outputs: usize,
    /// Inputs of each part but perhaps the last; a multiple of a group.
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
    pub fn new(weight: &[f32], inputs: usize, outputs: usize, code: Code) -> Result<Self, String> {
        Ok(Self::with(weight, inputs, outputs, Kernel::choose(code)?))
    }

    fn with(weight: &[f32], inputs: usize, outputs: usize, kernel: Kernel) -> Self {
        let shape = kernel.shape();
        let Shape { group, width, encoding, step, .. } = shape;
        let depth = inputs.div_ceil(inputs.div_ceil(encoding.depth())).next_multiple_of(group * step);
        let columns = outputs.next_multiple_of(width);
        let mut scales = vec![0.0; columns];
        for (scale, row) in scales.iter_mut().zip(weight.chunks(inputs)) {
            *scale = match encoding {
                Encoding::Bf16 => 1.0,
                Encoding::Pairs | Encoding::Quads | Encoding::Bytes => greatest(row) / 127.0,
            };
        }
        let quantized = |input: usize, output: usize| -> i32 {
            if input >= inputs || output >= outputs || scales[output] == 0.0 {
                return 0;
            }
            (weight[output * inputs + input] / scales[output]).round_ties_even() as i32
        };
        let mut panels = AVec::with_capacity(0, columns * shape.groups(inputs));
        let mut start = Vec::new();
        for part in (0..inputs).step_by(depth) {
            let end = (part + depth).min(inputs);
            for first in (0..columns).step_by(width) {
                // Past the last input the weights are 0.
                for input in (part..part + group * shape.groups(end - part)).step_by(group) {
                    let group = |output| match encoding {
                        Encoding::Pairs => pair([0, 1].map(|i| quantized(input + i, output) as i16 as u16)),
                        Encoding::Quads | Encoding::Bytes => {
                            u32::from_le_bytes([0, 1, 2, 3].map(|i| quantized(input + i, output) as i8 as u8))
                        }
                        Encoding::Bf16 => {
                            pair([0, 1].map(|i| match input + i < inputs && output < outputs {
                                true => bf16(weight[output * inputs + input + i]),
                                false => 0,
                            }))
                        }
                    };
                    (first..first + width).for_each(|output| panels.push(group(output)));
                }
                start.extend((first..first + width).map(|output| match encoding {
                    Encoding::Quads => (part..end).map(|input| -128 * quantized(input, output)).sum(),
                    Encoding::Pairs | Encoding::Bytes | Encoding::Bf16 => 0,
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
        let rows = x.len() / self.inputs;
        let groups = shape.groups(self.inputs);
        ROOM.with_borrow_mut(|room| {
            let Room { codes, scales } = room;
            // What is there from another time is written over, or of rows that nobody reads.
            codes.resize(codes.len().max(rows.next_multiple_of(height) * groups), 0);
            scales.resize(scales.len().max(rows), 1.0);
            for (row, (x, scale)) in x.chunks(self.inputs).zip(&mut *scales).enumerate() {
                let codes = &mut codes[row / height * height * groups..][..height * groups];
                *scale = self.encode(encoding, x, codes, row % height);
            }
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            // SAFETY: `choose` has seen that there are tiles.
            let _tiles = matches!(self.kernel, Kernel::Amx(_)).then(|| unsafe { amx::Tiles::configure() });
            let (mut panels, mut start) = (&self.panels[..], &self.start[..]);
            for part in (0..self.inputs).step_by(self.depth) {
                let depth = shape.groups(self.depth.min(self.inputs - part));
                for column in (0..self.outputs).step_by(width) {
                    let (panel, from);
                    (panel, panels) = panels.split_at(depth * width);
                    (from, start) = start.split_at(width);
                    let last = part + self.depth >= self.inputs;
                    self.run(&mut Strip {
                        left: &codes[part / group * height..],
                        stride: groups,
                        rows,
                        depth,
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

    /// A row in groups, and its scale; `row` tells which of those that are multiplied at a time.
    fn encode(&self, encoding: Encoding, x: &[f32], codes: &mut [u32], row: usize) -> f32 {
        debug_assert!(row < self.kernel.shape().height);
        match self.kernel {
            Kernel::Plain => encode(encoding, x, codes),
            // SAFETY: `choose` has seen the processor's features.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { x86::encode_avx2(encoding, x, codes) },
            #[cfg(target_arch = "x86_64")]
            Kernel::Vnni | Kernel::Bf16 => unsafe { x86::encode_avx512(encoding, x, codes) },
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Kernel::Amx(code) => unsafe { amx::encode(code, x, codes, row) },
        }
    }

    fn run(&self, strip: &mut Strip<'_>) {
        match self.kernel {
            // SAFETY: plain code runs everywhere.
            Kernel::Plain => unsafe { vector::run::<Plain, 4>(strip) },
            // SAFETY: `choose` has seen the processor's features.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { x86::run_avx2(strip) },
            #[cfg(target_arch = "x86_64")]
            Kernel::Vnni => unsafe { x86::run_vnni(strip) },
            #[cfg(target_arch = "x86_64")]
            Kernel::Bf16 => unsafe { x86::run_bf16(strip) },
            // SAFETY: the same, and `multiply` has configured the tiles.
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Kernel::Amx(code) => unsafe { amx::run(code, strip) },
        }
    }
}

thread_local! {
    static ROOM: RefCell<Room> =
        RefCell::new(Room { codes: AVec::new(0), scales: Vec::new() });
}

/// The encoded input.
struct Room {
    codes: AVec<u32>,
    scales: Vec<f32>,
}

fn pair([first, second]: [u16; 2]) -> u32 {
    u32::from(first) | u32::from(second) << 16
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

#[inline(always)]
fn greatest(row: &[f32]) -> f32 {
    // In strands, so that it is done by vectors.
    let mut strands = [0f32; 32];
    let (chunks, rest) = row.as_chunks::<32>();
    for chunk in chunks {
        for (strand, x) in strands.iter_mut().zip(chunk) {
            *strand = strand.max(x.abs());
        }
    }
    rest.iter().chain(&strands).fold(0.0, |greatest, x| greatest.max(x.abs()))
}

#[inline(always)]
fn encode(encoding: Encoding, x: &[f32], codes: &mut [u32]) -> f32 {
    /// Adding it leaves the nearest integer in the mantissa's low bits.
    const ROUND: f32 = 12_582_912.0;
    let (scale, factor) = match encoding {
        Encoding::Bf16 => (1.0, 1.0),
        Encoding::Pairs | Encoding::Quads | Encoding::Bytes => {
            let greatest = greatest(x);
            (greatest / 127.0, if greatest > 0.0 { 127.0 / greatest } else { 0.0 })
        }
    };
    let nearest = |x: f32| (x * factor + ROUND).to_bits().wrapping_sub(ROUND.to_bits());
    match encoding {
        Encoding::Pairs => {
            let (pairs, rest) = x.as_chunks::<2>();
            for (code, &[a, b]) in codes.iter_mut().zip(pairs) {
                *code = nearest(a) & 0xffff | nearest(b) << 16;
            }
            if let &[a] = rest {
                codes[pairs.len()] = nearest(a) & 0xffff;
            }
        }
        Encoding::Bytes => unreachable!("its kernel has a form of its own"),
        Encoding::Quads => {
            let byte = |x: f32| nearest(x).wrapping_add(128) & 0xff;
            let (quads, rest) = x.as_chunks::<4>();
            for (code, &[a, b, c, d]) in codes.iter_mut().zip(quads) {
                *code = byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
            }
            if !rest.is_empty() {
                // The weights there are 0.
                let code = |i: usize| rest.get(i).map_or(0, |&x| byte(x)) << (8 * i);
                codes[quads.len()] = code(0) | code(1) | code(2);
            }
        }
        Encoding::Bf16 => {
            let (pairs, rest) = x.as_chunks::<2>();
            for (code, &[a, b]) in codes.iter_mut().zip(pairs) {
                *code = u32::from(bf16(a)) | u32::from(bf16(b)) << 16;
            }
            if let &[a] = rest {
                codes[pairs.len()] = u32::from(bf16(a));
            }
        }
    }
    scale
}

/// Rows times one part of one panel.
struct Strip<'a> {
    /// Groups of the first row's part.
    left: &'a [u32],
    /// From one row to the next.
    stride: usize,
    rows: usize,
    /// Groups that are multiplied.
    depth: usize,
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
    /// Some rows, which have been written.
    fn activate(&mut self, rows: Range<usize>) {
        if let Some(Finish { activation: Some(activation), .. }) = self.finish {
            let out = &mut self.out[rows.start * self.out_stride..];
            let end = out.len().min((rows.len() - 1) * self.out_stride + self.width);
            activate_columns(activation, &mut out[..end], self.out_stride, self.width);
        }
    }

    /// A row's sums, as many as the panel is wide, go where they belong.
    #[inline(always)]
    fn write(&mut self, row: usize, sums: &mut [f32]) {
        let out = &mut self.out[row * self.out_stride..][..self.width];
        let sums = &mut sums[..self.width];
        if self.add {
            for (sum, out) in sums.iter_mut().zip(&*out) {
                *sum += out;
            }
        }
        match self.finish {
            None => out.copy_from_slice(sums),
            Some(Finish { rows, columns, bias, .. }) => {
                let scale = rows[row];
                for (((out, sum), column), bias) in out.iter_mut().zip(sums).zip(columns).zip(bias) {
                    *out = *sum * (scale * column) + bias;
                }
            }
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
        let mut all: Vec<Kernel> =
            [Kernel::choose(code), Kernel::choose_vectors(code)].into_iter().flatten().collect();
        if code == Code::Int8 {
            all.push(Kernel::Plain);
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                all.push(Kernel::Avx2);
            }
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
    fn bf16_is_near_where_the_processor_has_it() {
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
