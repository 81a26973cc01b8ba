//! The inner loops of matrix multiplication with a CPU's vectors: rows of the input times a panel of one or two
//! vectors, with a tile of accumulators in registers. They are generic over what is multiplied ([`Kernel`]).

use std::ops::Range;

use aligned_vec::AVec;
use pulp::Simd;

/// 4-byte elements in a cache line.
pub(super) const LINE: usize = 16;

/// How a processor multiplies and accumulates elements of one type.
pub(super) trait Kernel: Copy {
    /// Element of rows and panels, 4 bytes: one float, or the quantized values that one instruction multiplies.
    type Number: Copy + Default;
    /// Elements of a panel's row that are multiplied at a time.
    type Vector: Copy;
    type Sums: Copy;
    /// Accumulators in a vector.
    const LANES: usize;
    /// Rows of the tallest tile, 12 or 6: its accumulators, a panel's row and one element must fit in the registers.
    const HEIGHT: usize;

    /// # Safety
    /// `from` points to as many readable elements as a vector has.
    unsafe fn load(self, from: *const Self::Number) -> Self::Vector;
    /// Adds `number` times each element of `vector` to the accumulators.
    fn dot(self, sums: Self::Sums, number: Self::Number, vector: Self::Vector) -> Self::Sums;
}

/// Destination of the products.
pub(super) trait Target<K: Kernel> {
    /// Initial accumulators of a row.
    fn begin(&self, kernel: K, row: usize) -> [K::Sums; 2];
    fn end(&mut self, kernel: K, row: usize, sums: [K::Sums; 2]);
}

/// The kernel for f32: an element is one float.
#[derive(Clone, Copy)]
pub(super) struct F32<S>(pub S);

impl<S: Simd> Kernel for F32<S> {
    type Number = f32;
    type Vector = S::f32s;
    type Sums = S::f32s;
    const LANES: usize = S::F32_LANES;
    const HEIGHT: usize = if S::REGISTER_COUNT >= 32 { 12 } else { 6 };

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> S::f32s {
        // SAFETY: the caller keeps this function's contract.
        unsafe { from.cast::<S::f32s>().read_unaligned() }
    }

    #[inline(always)]
    fn dot(self, sums: S::f32s, number: f32, vector: S::f32s) -> S::f32s {
        self.0.mul_add_e_f32s(self.0.splat_f32s(number), vector, sums)
    }
}

/// Rows that a panel is multiplied with. Within a tile of the tallest height they are `ROW` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Left<'a, T, const ROW: usize> {
    pub x: &'a [T],
    pub count: usize,
    /// Elements in a row.
    pub depth: usize,
    /// Distance between the elements of a row, within a line.
    step: usize,
    /// Distance between the starts of a row's lines.
    line: usize,
    /// Distance between the starts of tiles of the tallest height.
    pub tile: usize,
}

impl<'a> Left<'a, f32, 1> {
    /// Takes as rows the first `count` columns of a matrix of `depth` rows, which are `stride` elements apart.
    #[inline(always)]
    pub fn columns<K: Kernel>(_: K, x: &'a [f32], stride: usize, count: usize, depth: usize) -> Self {
        Self { x, count, depth, step: stride, line: stride * LINE, tile: K::HEIGHT }
    }
}

impl<'a, T, const ROW: usize> Left<'a, T, ROW> {
    /// The tile of the tallest height that begins at `row`.
    #[inline(always)]
    pub fn tile<K: Kernel>(self, _: K, row: usize) -> Self {
        let count = K::HEIGHT.min(self.count - row);
        Self { x: &self.x[row / K::HEIGHT * self.tile..], count, ..self }
    }

    /// The memory of `rows` rows of one tile, from the first element to the last. Element k of row r is at
    /// `r * ROW + k / LINE * line + k % LINE * step`.
    #[inline(always)]
    fn numbers<K: Kernel>(&self, row: usize, rows: usize) -> &[T] {
        let last = self.depth - 1;
        let numbers = (rows - 1) * ROW + last / LINE * self.line + last % LINE * self.step + 1;
        &self.x[row / K::HEIGHT * self.tile + row % K::HEIGHT * ROW..][..numbers]
    }
}

/// Packed A block: rows in the order in which tiles read them. For each tile of the tallest height it has one [`LINE`]
/// of each row, then the next line of each row. A row's last line is padded with unspecified elements.
pub(super) struct PackedA<T> {
    numbers: AVec<T>,
    count: usize,
    depth: usize,
    /// Rows of the tallest tile.
    height: usize,
}

impl<T: Copy + Default> PackedA<T> {
    pub fn new() -> Self {
        Self { numbers: AVec::new(0), count: 0, depth: 0, height: 1 }
    }

    /// Removes all rows. The next ones have `depth` elements and are for tiles of at most `height` rows.
    #[inline(always)]
    pub fn start(&mut self, depth: usize, height: usize) {
        (self.count, self.depth, self.height) = (0, depth, height);
    }

    /// Appends a row and returns its lines, for the caller to write.
    #[inline(always)]
    pub fn lines(&mut self) -> impl Iterator<Item = &mut [T; LINE]> {
        let (row, height) = (self.count, self.height);
        self.count += 1;
        let block = self.depth.next_multiple_of(LINE) * height;
        let at = row / height * block;
        if self.numbers.len() < at + block {
            self.numbers.resize(at + block, T::default());
        }
        let lines = self.numbers[at + row % height * LINE..at + block].chunks_mut(height * LINE);
        lines.filter_map(|lines| lines.first_chunk_mut())
    }

    #[inline(always)]
    pub fn push(&mut self, row: &[T]) {
        let (whole, rest) = row.as_chunks::<LINE>();
        let mut lines = self.lines();
        for (line, out) in whole.iter().zip(lines.by_ref()) {
            *out = *line;
        }
        if let (Some(out), false) = (lines.next(), rest.is_empty()) {
            out[..rest.len()].copy_from_slice(rest);
        }
    }

    /// The first row of the tile that contains `row`.
    #[inline(always)]
    pub fn tile(&self, row: usize) -> usize {
        row / self.height * self.height
    }

    /// A range of the rows, and of each row a range of its elements. The ranges must start at the first row of a tile
    /// and at the first element of a line.
    #[inline(always)]
    pub fn some(&self, rows: Range<usize>, numbers: Range<usize>) -> Left<'_, T, LINE> {
        let padded = self.depth.next_multiple_of(LINE);
        let (line, tile) = (self.height * LINE, self.height * padded);
        let x = &self.numbers[rows.start * padded + numbers.start * self.height..];
        Left { x, count: rows.len(), depth: numbers.len(), step: 1, line, tile }
    }
}

/// A panel.
#[derive(Clone, Copy)]
pub(super) struct Right<'a, T> {
    pub x: &'a [T],
    /// Distance between the starts of rows.
    pub stride: usize,
    /// Data needed next, which is prefetched during the multiplication.
    pub ahead: &'a [T],
}

/// Splits `left` into tiles of the tallest height. For each it returns the first row, the rows, and the panel of two
/// vectors, with the tile's share of `next` to prefetch.
#[inline(always)]
pub(super) fn tiles<'a, K: Kernel>(
    kernel: K,
    left: Left<'a, K::Number, LINE>,
    panel: &'a [K::Number],
    next: &'a [K::Number],
) -> impl Iterator<Item = (usize, Left<'a, K::Number, LINE>, Right<'a, K::Number>)> {
    let shares = panel.len().div_ceil(left.count.div_ceil(K::HEIGHT));
    let mut ahead = next[..next.len().min(panel.len())].chunks(shares);
    (0..left.count).step_by(K::HEIGHT).map(move |row| {
        let right = Right { x: panel, stride: 2 * K::LANES, ahead: ahead.next().unwrap_or_default() };
        (row, left.tile(kernel, row), right)
    })
}

/// `left` times one panel of `W` vectors, `[depth, W × lanes]`.
#[inline(always)]
pub(super) fn strip<K: Kernel, const W: usize, const ROW: usize>(
    kernel: K,
    left: Left<'_, K::Number, ROW>,
    right: Right<'_, K::Number>,
    target: &mut impl Target<K>,
) {
    let mut row = 0;
    if K::HEIGHT == 12 {
        while row + 12 <= left.count {
            tile12::<K, W, ROW>(kernel, left, row, right, target);
            row += 12;
        }
    }
    while row + 6 <= left.count {
        tile6::<K, W, ROW>(kernel, left, row, right, target);
        row += 6;
    }
    if row + 4 <= left.count {
        tile4::<K, W, ROW>(kernel, left, row, right, target);
        row += 4;
    }
    if row + 2 <= left.count {
        tile2::<K, W, ROW>(kernel, left, row, right, target);
        row += 2;
    }
    if row < left.count {
        tile1::<K, W, ROW>(kernel, left, row, right, target);
    }
}

macro_rules! tile {
    ($name:ident, $rows:literal: $($r:literal $a:ident $b:ident),*) => {
        /// Multiplies one tile. Each accumulator is a separate variable: the compiler does not reliably keep an
        /// array of them in registers.
        #[inline(always)]
        fn $name<K: Kernel, const W: usize, const ROW: usize>(
            kernel: K,
            left: Left<'_, K::Number, ROW>,
            row: usize,
            right: Right<'_, K::Number>,
            target: &mut impl Target<K>,
        ) {
            let Left { depth, step, line: next_line, .. } = left;
            let lines = depth.div_ceil(LINE);
            let x = left.numbers::<K>(row, $rows).as_ptr();
            let mut panel = right.x[..(depth - 1) * right.stride + W * K::LANES].as_ptr();
            let ahead = right.ahead.len().div_ceil(lines).div_ceil(LINE);
            $(let [mut $a, mut $b] = target.begin(kernel, row + $r);)*
            for line in 0..lines {
                fetch(right.ahead, line * ahead * LINE, ahead);
                let mut x = x.wrapping_add(line * next_line);
                for _ in 0..LINE.min(depth - line * LINE) {
                    // SAFETY: `panel` and `x` come from slices that end at the last element that is read.
                    unsafe {
                        let first = kernel.load(panel);
                        let second = match W {
                            2 => kernel.load(panel.add(K::LANES)),
                            _ => first,
                        };
                        $(
                            let number = *x.add($r * ROW);
                            $a = kernel.dot($a, number, first);
                            if W == 2 {
                                $b = kernel.dot($b, number, second);
                            }
                        )*
                    }
                    x = x.wrapping_add(step);
                    panel = panel.wrapping_add(right.stride);
                }
            }
            $(target.end(kernel, row + $r, [$a, $b]);)*
        }
    };
}

tile!(tile12, 12: 0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5, 6 a6 b6, 7 a7 b7, 8 a8 b8, 9 a9 b9, 10 a10 b10,
    11 a11 b11);
tile!(tile6, 6: 0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5);
tile!(tile4, 4: 0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3);
tile!(tile2, 2: 0 a0 b0, 1 a1 b1);
tile!(tile1, 1: 0 a0 b0);

/// Prefetches `lines` cache lines of `x`, beginning at index `from`.
#[inline(always)]
fn fetch<T>(x: &[T], from: usize, lines: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..lines {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let at = x.as_ptr().wrapping_add(from + line * LINE);
        // SAFETY: a prefetch is a hint and never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[cfg(target_arch = "aarch64")]
    for line in 0..lines {
        let at = x.as_ptr().wrapping_add(from + line * LINE);
        // SAFETY: as above.
        unsafe {
            std::arch::asm!("prfm pldl2keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = (x, from, lines);
}
