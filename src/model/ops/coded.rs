//! Matrix multiplication on one CPU core with fewer bits than f32: `int8` and `bf16`.
//!
//! `int8`: a weight is eight bits times its output's scale, the input is rounded to eight bits times its
//! row's scale, anew for every row; sums are integers. Where nothing multiplies bytes without overflow
//! (AVX2), both stand as sixteen bits in memory: the sums, and so the results, are the same everywhere.
//! `bf16`: weights and input are rounded to bfloat16, sums are f32.
//!
//! Weights and input stand in groups of 4 bytes, as many inputs as one instruction multiplies and adds
//! up: two of 16 bits or four of 8. Panels are as in [`super::matmul`], a group in the place of a number.

use std::cell::RefCell;
use std::hint::black_box;

/// Inputs of a part of a panel at most: sums of as many products of bytes are exact in an f32.
const DEPTH: usize = 768;

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
}

impl Kernel {
    fn choose(code: Code) -> Result<Self, String> {
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
            Code::Bf16 => Err("this processor has no bf16 (AVX512-BF16): f32 or int8".to_owned()),
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
}

impl Shape {
    fn of<K: Isa>() -> Self {
        Self { group: K::ENCODING.group(), width: 2 * K::LANES, encoding: K::ENCODING }
    }
}

/// How inputs stand in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    /// Two of i16, both sides.
    Pairs,
    /// Four: weights i8, inputs u8 with 128 added, whose share the sums begin without.
    Quads,
    /// Two of bf16.
    Bf16,
}

impl Encoding {
    fn group(self) -> usize {
        match self {
            Encoding::Pairs | Encoding::Bf16 => 2,
            Encoding::Quads => 4,
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
    panels: Vec<u32>,
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
        let Shape { group, width, encoding } = kernel.shape();
        let depth = inputs.div_ceil(inputs.div_ceil(DEPTH)).next_multiple_of(group);
        let columns = outputs.next_multiple_of(width);
        let mut scales = vec![0.0; columns];
        for (scale, row) in scales.iter_mut().zip(weight.chunks(inputs)) {
            *scale = match encoding {
                Encoding::Bf16 => 1.0,
                Encoding::Pairs | Encoding::Quads => greatest(row) / 127.0,
            };
        }
        let quantized = |input: usize, output: usize| -> i32 {
            if input >= inputs || output >= outputs || scales[output] == 0.0 {
                return 0;
            }
            (weight[output * inputs + input] / scales[output]).round_ties_even() as i32
        };
        let mut panels = Vec::with_capacity(columns * inputs.div_ceil(group));
        let mut start = Vec::new();
        for part in (0..inputs).step_by(depth) {
            let end = (part + depth).min(inputs);
            for first in (0..columns).step_by(width) {
                for input in (part..end).step_by(group) {
                    panels.extend((first..first + width).map(|output| match encoding {
                        Encoding::Pairs => pair([0, 1].map(|i| quantized(input + i, output) as i16 as u16)),
                        Encoding::Quads => {
                            u32::from_le_bytes([0, 1, 2, 3].map(|i| quantized(input + i, output) as i8 as u8))
                        }
                        Encoding::Bf16 => {
                            pair([0, 1].map(|i| match input + i < inputs && output < outputs {
                                true => bf16(weight[output * inputs + input + i]),
                                false => 0,
                            }))
                        }
                    }));
                }
                start.extend((first..first + width).map(|output| match encoding {
                    Encoding::Quads => (part..end).map(|input| -128 * quantized(input, output)).sum(),
                    Encoding::Pairs | Encoding::Bf16 => 0,
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
    /// `strip` is told of each panel's columns when they are done.
    pub fn multiply(
        &self,
        x: &[f32],
        bias: &[f32],
        out: &mut [f32],
        mut strip: impl FnMut(&mut [f32], std::ops::Range<usize>),
    ) {
        let Shape { group, width, encoding } = self.kernel.shape();
        let rows = x.len() / self.inputs;
        let groups = self.inputs.div_ceil(group);
        ROOM.with_borrow_mut(|room| {
            room.codes.resize(rows * groups, 0);
            room.scales.resize(rows, 1.0);
            for ((x, codes), scale) in
                x.chunks(self.inputs).zip(room.codes.chunks_mut(groups)).zip(&mut room.scales)
            {
                *scale = self.encode(encoding, x, codes);
            }
            let (mut panels, mut start) = (&self.panels[..], &self.start[..]);
            for part in (0..self.inputs).step_by(self.depth) {
                let depth = self.depth.min(self.inputs - part).div_ceil(group);
                for column in (0..self.outputs).step_by(width) {
                    let (panel, from);
                    (panel, panels) = panels.split_at(depth * width);
                    (from, start) = start.split_at(width);
                    let last = part + self.depth >= self.inputs;
                    let columns = column..self.outputs.min(column + width);
                    self.run(Strip {
                        left: &room.codes[part / group..],
                        stride: groups,
                        rows,
                        depth,
                        panel,
                        start: from,
                        out: &mut out[column..],
                        out_stride: self.outputs,
                        width: columns.len(),
                        add: part > 0,
                        finish: last.then(|| Finish {
                            rows: &room.scales,
                            columns: &self.scales[column..][..width],
                            bias: &bias[column..][..width],
                        }),
                    });
                    if last {
                        strip(out, columns);
                    }
                }
            }
        });
    }

    /// A row in groups, and its scale.
    fn encode(&self, encoding: Encoding, x: &[f32], codes: &mut [u32]) -> f32 {
        match self.kernel {
            Kernel::Plain => encode(encoding, x, codes),
            // SAFETY: `choose` has seen the processor's features.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { x86::encode_avx2(encoding, x, codes) },
            #[cfg(target_arch = "x86_64")]
            Kernel::Vnni | Kernel::Bf16 => unsafe { x86::encode_avx512(encoding, x, codes) },
        }
    }

    fn run(&self, strip: Strip<'_>) {
        match self.kernel {
            // SAFETY: plain code runs everywhere.
            Kernel::Plain => unsafe { run::<Plain, 4>(strip) },
            // SAFETY: `choose` has seen the processor's features.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { x86::run_avx2(strip) },
            #[cfg(target_arch = "x86_64")]
            Kernel::Vnni => unsafe { x86::run_vnni(strip) },
            #[cfg(target_arch = "x86_64")]
            Kernel::Bf16 => unsafe { x86::run_bf16(strip) },
        }
    }
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

/// The encoded input.
#[derive(Default)]
struct Room {
    codes: Vec<u32>,
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
        Encoding::Pairs | Encoding::Quads => {
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

/// The scales that turn sums into results, and what is added.
#[derive(Clone, Copy)]
struct Finish<'a> {
    rows: &'a [f32],
    columns: &'a [f32],
    bias: &'a [f32],
}

/// What the kernels need of a processor. All of it is unsafe for its features may be absent.
trait Isa {
    /// Sums in a vector.
    const LANES: usize;
    const ENCODING: Encoding;
    /// A vector of groups.
    type Groups: Copy;
    type Sums: Copy;
    unsafe fn start(from: *const i32) -> Self::Sums;
    unsafe fn load(from: *const u32) -> Self::Groups;
    unsafe fn splat(group: u32) -> Self::Groups;
    /// To every sum the products within its group.
    unsafe fn dot(sums: Self::Sums, left: Self::Groups, right: Self::Groups) -> Self::Sums;
    unsafe fn store(sums: Self::Sums, to: *mut f32);
}

/// The strip in tiles of `R` rows and two vectors.
///
/// # Safety
/// The processor has what `K` uses.
#[inline(always)]
unsafe fn run<K: Isa, const R: usize>(mut strip: Strip<'_>) {
    let mut row = 0;
    // SAFETY: as of this function.
    unsafe {
        while row + R <= strip.rows {
            tile::<K, R>(&mut strip, row);
            row += R;
        }
        if R > 6 && row + 6 <= strip.rows {
            tile::<K, 6>(&mut strip, row);
            row += 6;
        }
        while row + 2 <= strip.rows {
            tile::<K, 2>(&mut strip, row);
            row += 2;
        }
        if row < strip.rows {
            tile::<K, 1>(&mut strip, row);
        }
    }
}

/// # Safety
/// The processor has what `K` uses.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // as in matmul.rs: behind iterators the sums leave the registers
unsafe fn tile<K: Isa, const R: usize>(strip: &mut Strip<'_>, row: usize) {
    let (depth, stride, lanes) = (strip.depth, strip.stride, K::LANES);
    let left = &strip.left[row * stride..][..(R - 1) * stride + depth];
    let panel = &strip.panel[..depth * 2 * lanes];
    let start = &strip.start[..2 * lanes];
    let mut raw = [[0f32; 32]; R];
    assert!(2 * lanes <= 32);
    // SAFETY: the slices above are as long as what is read, and a row of `raw` holds two vectors.
    unsafe {
        let mut sums = [[K::start(start.as_ptr()), K::start(start.as_ptr().add(lanes))]; R];
        // A pointer for every row: from one, LLVM reckons the others anew for every group.
        let rows: [*const u32; R] = std::array::from_fn(|r| black_box(left.as_ptr().add(r * stride)));
        for k in 0..depth {
            let first = K::load(panel.as_ptr().add(k * 2 * lanes));
            let second = K::load(panel.as_ptr().add(k * 2 * lanes + lanes));
            for r in 0..R {
                let x = K::splat(*rows[r].add(k));
                sums[r][0] = K::dot(sums[r][0], x, first);
                sums[r][1] = K::dot(sums[r][1], x, second);
            }
        }
        for r in 0..R {
            K::store(sums[r][0], raw[r].as_mut_ptr());
            K::store(sums[r][1], raw[r].as_mut_ptr().add(lanes));
        }
    }
    for (r, raw) in raw.iter_mut().enumerate() {
        let out = &mut strip.out[(row + r) * strip.out_stride..][..strip.width];
        let raw = &mut raw[..strip.width];
        if strip.add {
            for (raw, out) in raw.iter_mut().zip(&*out) {
                *raw += out;
            }
        }
        match strip.finish {
            None => out.copy_from_slice(raw),
            Some(Finish { rows, columns, bias }) => {
                let scale = rows[row + r];
                for (((out, raw), column), bias) in out.iter_mut().zip(raw).zip(columns).zip(bias) {
                    *out = *raw * (scale * column) + bias;
                }
            }
        }
    }
}

/// Pairs of i16, eight sums.
struct Plain;

impl Isa for Plain {
    const LANES: usize = 8;
    const ENCODING: Encoding = Encoding::Pairs;
    type Groups = [u32; 8];
    type Sums = [i32; 8];

    #[inline(always)]
    unsafe fn start(from: *const i32) -> [i32; 8] {
        // SAFETY: the caller has eight.
        unsafe { from.cast::<[i32; 8]>().read() }
    }

    #[inline(always)]
    unsafe fn load(from: *const u32) -> [u32; 8] {
        // SAFETY: the caller has eight.
        unsafe { from.cast::<[u32; 8]>().read() }
    }

    #[inline(always)]
    unsafe fn splat(group: u32) -> [u32; 8] {
        [group; 8]
    }

    #[inline(always)]
    unsafe fn dot(sums: [i32; 8], left: [u32; 8], right: [u32; 8]) -> [i32; 8] {
        let half = |x: u32, shift: u32| i32::from((x >> shift) as u16 as i16);
        std::array::from_fn(|i| {
            sums[i] + half(left[i], 0) * half(right[i], 0) + half(left[i], 16) * half(right[i], 16)
        })
    }

    #[inline(always)]
    unsafe fn store(sums: [i32; 8], to: *mut f32) {
        // SAFETY: the caller has room for eight.
        unsafe { to.cast::<[f32; 8]>().write(sums.map(|sum| sum as f32)) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Encoding, Isa, Strip, encode, run};

    /// `vpmaddwd` on pairs of i16.
    pub(super) struct Avx2;
    /// `vpdpbusd` on quads of bytes.
    pub(super) struct Vnni;
    /// `vdpbf16ps` on pairs.
    pub(super) struct Bf16;

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn run_avx2(strip: Strip<'_>) {
        // SAFETY: the features are this function's.
        unsafe { run::<Avx2, 6>(strip) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn run_vnni(strip: Strip<'_>) {
        // SAFETY: the features are this function's.
        unsafe { run::<Vnni, 12>(strip) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn run_bf16(strip: Strip<'_>) {
        // SAFETY: the features are this function's.
        unsafe { run::<Bf16, 12>(strip) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn encode_avx2(encoding: Encoding, x: &[f32], codes: &mut [u32]) -> f32 {
        encode(encoding, x, codes)
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn encode_avx512(encoding: Encoding, x: &[f32], codes: &mut [u32]) -> f32 {
        encode(encoding, x, codes)
    }

    // SAFETY of all below: the caller has the features, and memory for a vector behind every pointer.
    impl Isa for Avx2 {
        const LANES: usize = 8;
        const ENCODING: Encoding = Encoding::Pairs;
        type Groups = __m256i;
        type Sums = __m256i;

        #[inline(always)]
        unsafe fn start(from: *const i32) -> __m256i {
            unsafe { _mm256_loadu_si256(from.cast()) }
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> __m256i {
            unsafe { _mm256_loadu_si256(from.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(group: u32) -> __m256i {
            unsafe { _mm256_set1_epi32(group as i32) }
        }
        #[inline(always)]
        unsafe fn dot(sums: __m256i, left: __m256i, right: __m256i) -> __m256i {
            unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(left, right)) }
        }
        #[inline(always)]
        unsafe fn store(sums: __m256i, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, _mm256_cvtepi32_ps(sums)) }
        }
    }

    impl Isa for Vnni {
        const LANES: usize = 16;
        const ENCODING: Encoding = Encoding::Quads;
        type Groups = __m512i;
        type Sums = __m512i;

        #[inline(always)]
        unsafe fn start(from: *const i32) -> __m512i {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> __m512i {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(group: u32) -> __m512i {
            unsafe { _mm512_set1_epi32(group as i32) }
        }
        #[inline(always)]
        unsafe fn dot(sums: __m512i, left: __m512i, right: __m512i) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(sums, left, right) }
        }
        #[inline(always)]
        unsafe fn store(sums: __m512i, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, _mm512_cvtepi32_ps(sums)) }
        }
    }

    impl Isa for Bf16 {
        const LANES: usize = 16;
        const ENCODING: Encoding = Encoding::Bf16;
        type Groups = __m512bh;
        type Sums = __m512;

        #[inline(always)]
        unsafe fn start(_: *const i32) -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> __m512bh {
            unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast())) }
        }
        #[inline(always)]
        unsafe fn splat(group: u32) -> __m512bh {
            unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(group as i32)) }
        }
        #[inline(always)]
        unsafe fn dot(sums: __m512, left: __m512bh, right: __m512bh) -> __m512 {
            unsafe { _mm512_dpbf16_ps(sums, left, right) }
        }
        #[inline(always)]
        unsafe fn store(sums: __m512, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, sums) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::numbers;
    use super::*;

    fn product(coded: &Coded, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / coded.inputs;
        let mut out = vec![f32::NAN; rows * coded.outputs];
        let bias = vec![0.5; coded.outputs.next_multiple_of(coded.width())];
        coded.multiply(x, &bias, &mut out, |_, _| {});
        out
    }

    /// Every kernel that this processor has.
    fn kernels(code: Code) -> Vec<Kernel> {
        let mut all: Vec<Kernel> = Kernel::choose(code).into_iter().collect();
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
                assert_eq!(&all[0], other);
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
