//! The kernels that use vector instructions.

use pulp::{Simd, WithSimd};

use super::super::simd::{dispatch, load_two, store_two};
use super::super::tile::{F32, Kernel, LINE, Target, strip, tiles};
use super::{Encoding, Epilogue, Grid, Shape, Strip};

/// What a quantized kernel needs in addition to the multiplication.
pub(super) trait Isa: Kernel<Number = u32> {
    type Simd: Simd;
    fn simd(self) -> Self::Simd;
    /// Initial accumulators: the first vector of `from`, or zeros if the encoding has no bias to cancel.
    fn start(self, from: &[i32]) -> Self::Sums;
    fn floats(self, sums: Self::Sums) -> <Self::Simd as Simd>::f32s;
}

/// Multiplies a strip, one tile of the tallest height at a time.
#[inline(always)]
pub(super) fn run<K: Isa>(kernel: K, mut part: Strip<'_>) {
    let Strip { left, panel, ahead, exact, .. } = part;
    for (row, left, right) in tiles(kernel, left, panel, ahead) {
        if let Some(exact) = exact {
            part.write_exact(kernel.simd(), exact.left.tile(F32(kernel.simd()), row), row);
        }
        let mut target = Sums { strip: &mut part, row };
        strip::<K, 2, _>(kernel, left, right, &mut target);
        part.activate(row..row + left.count);
    }
}

/// The rows of a strip from `row` on.
struct Sums<'a, 'b> {
    strip: &'a mut Strip<'b>,
    row: usize,
}

impl<K: Isa> Target<K> for Sums<'_, '_> {
    #[inline(always)]
    fn begin(&self, kernel: K, _: usize) -> [K::Sums; 2] {
        let (first, second) = self.strip.start.split_at(K::LANES);
        [kernel.start(first), kernel.start(second)]
    }

    #[inline(always)]
    fn end(&mut self, kernel: K, row: usize, sums: [K::Sums; 2]) {
        let (simd, row) = (kernel.simd(), self.row + row);
        let (mut first, mut second) = (kernel.floats(sums[0]), kernel.floats(sums[1]));
        let epilogue = self.strip.epilogue;
        let out = self.strip.row(row);
        match epilogue {
            Epilogue::Scale { rows, columns } => {
                let row = simd.splat_f32s(rows[row]);
                let ([a, b], [c, d]) = (load_two(simd, columns), load_two(simd, out));
                first = simd.mul_add_e_f32s(first, simd.mul_f32s(row, a), c);
                second = simd.mul_add_e_f32s(second, simd.mul_f32s(row, b), d);
            }
            Epilogue::Bias { add, bias } => {
                if add {
                    let [a, b] = load_two(simd, out);
                    (first, second) = (simd.add_f32s(first, a), simd.add_f32s(second, b));
                }
                if let Some(bias) = bias {
                    let [a, b] = load_two(simd, bias);
                    (first, second) = (simd.add_f32s(first, a), simd.add_f32s(second, b));
                }
            }
        }
        store_two(simd, out, [first, second]);
    }
}

/// Multiplies quantized values as f32, with any vectors. Sums of int8 products are exact in f32, so that they equal
/// those of the other kernels.
#[derive(Clone, Copy)]
pub(super) struct Rounded<S>(S);

impl<S: Simd> Kernel for Rounded<S> {
    type Number = u32;
    type Vector = S::f32s;
    type Sums = S::f32s;
    const LANES: usize = S::F32_LANES;
    const HEIGHT: usize = F32::<S>::HEIGHT;

    #[inline(always)]
    unsafe fn load(self, from: *const u32) -> S::f32s {
        // SAFETY: the caller keeps this function's contract.
        unsafe { F32(self.0).load(from.cast()) }
    }

    #[inline(always)]
    fn dot(self, sums: S::f32s, number: u32, vector: S::f32s) -> S::f32s {
        F32(self.0).dot(sums, f32::from_bits(number), vector)
    }
}

impl<S: Simd> Isa for Rounded<S> {
    type Simd = S;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn start(self, _: &[i32]) -> S::f32s {
        self.0.splat_f32s(0.0)
    }

    #[inline(always)]
    fn floats(self, sums: S::f32s) -> S::f32s {
        sums
    }
}

/// The shape of [`Rounded`] with the widest vectors.
pub(super) fn shape_portable(encoding: Encoding) -> Shape {
    struct Of(Encoding);
    impl WithSimd for Of {
        type Output = Shape;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> Shape {
            Shape::of::<Rounded<S>>(self.0)
        }
    }
    dispatch(Of(encoding))
}

/// [`super::encode`] with the widest vectors.
pub(super) fn encode<'a>(
    encoding: Encoding,
    x: &[f32],
    grid: Grid,
    lines: impl Iterator<Item = &'a mut [u32; LINE]>,
) {
    struct Encode<'a, L>(Encoding, &'a [f32], Grid, L);
    impl<'b, L: Iterator<Item = &'b mut [u32; LINE]>> WithSimd for Encode<'_, L> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            super::encode(self.0, self.1, self.2, self.3);
        }
    }
    dispatch(Encode(encoding, x, grid, lines));
}

/// [`super::range`] with the widest vectors.
pub(super) fn range(row: &[f32]) -> (f32, f32) {
    struct Of<'a>(&'a [f32]);
    impl WithSimd for Of<'_> {
        type Output = (f32, f32);
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> (f32, f32) {
            super::range(simd, self.0)
        }
    }
    dispatch(Of(row))
}

/// [`super::smooth`] with the widest vectors.
pub(super) fn smooth(row: &[f32], factors: &[f32], out: &mut [f32]) -> (f32, f32) {
    struct Of<'a>(&'a [f32], &'a [f32], &'a mut [f32]);
    impl WithSimd for Of<'_> {
        type Output = (f32, f32);
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> (f32, f32) {
            super::smooth(simd, self.0, self.1, self.2)
        }
    }
    dispatch(Of(row, factors, out))
}

/// [`run`] with [`Rounded`] and the widest vectors.
pub(super) fn run_rounded(strip: Strip<'_>) {
    struct Run<'a>(Strip<'a>);
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            run(Rounded(simd), self.0);
        }
    }
    dispatch(Run(strip));
}

/// Defines a kernel that uses a processor's own instructions: its name and vectors, then the function that runs it and
/// the features that this function is compiled with.
///
/// SAFETY: the caller of that function has checked the features, and only that function creates the kernel.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! kernel {
    (
        $(#[doc = $about:literal])*
        $name:ident($simd:ident), $run:ident with $features:literal:
        $lanes:literal lanes, $height:literal rows, $vector:ty, $sums:ty;
        load |$from:ident| $load:expr;
        dot |$into:ident, $group:ident, $by:ident| $dot:expr;
        start |$start:ident| $begin:expr;
        floats |$end:ident| $floats:expr;
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Copy)]
        pub struct $name($simd);

        #[target_feature(enable = $features)]
        pub unsafe fn $run(strip: Strip<'_>) {
            // SAFETY: the caller has checked the features.
            run($name(unsafe { $simd::new_unchecked() }), strip);
        }

        impl Kernel for $name {
            type Number = u32;
            type Vector = $vector;
            type Sums = $sums;
            const LANES: usize = $lanes;
            const HEIGHT: usize = $height;

            #[inline(always)]
            unsafe fn load(self, $from: *const u32) -> $vector {
                // SAFETY: a kernel exists only in a function with its features; the caller keeps `load`'s contract.
                unsafe { $load }
            }
            #[inline(always)]
            fn dot(self, $into: $sums, $group: u32, $by: $vector) -> $sums {
                // SAFETY: a kernel exists only in a function with its features.
                unsafe { $dot }
            }
        }

        impl Isa for $name {
            type Simd = $simd;

            #[inline(always)]
            fn simd(self) -> $simd {
                self.0
            }
            #[inline(always)]
            fn start(self, $start: &[i32]) -> $sums {
                // SAFETY: a kernel exists only in a function with its features.
                unsafe { $begin }
            }
            #[inline(always)]
            // No unsafe call is needed where accumulators are f32 already.
            #[allow(unused_unsafe)]
            fn floats(self, $end: $sums) -> <$simd as Simd>::f32s {
                // SAFETY: a kernel exists only in a function with its features.
                unsafe { $floats }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use pulp::x86::{V3, V4};
    use pulp::{Simd, cast};

    use super::super::Strip;
    use super::{Isa, Kernel, run};

    pub fn has_vnni() -> bool {
        V4::is_available() && is_x86_feature_detected!("avx512vnni")
    }

    pub fn has_avx_vnni() -> bool {
        V3::is_available() && is_x86_feature_detected!("avxvnni")
    }

    pub fn has_bf16() -> bool {
        V4::is_available() && is_x86_feature_detected!("avx512bf16")
    }

    /// Whether `vdpbf16ps` is faster than f32 multiplication. It is not on Intel: its cores start one every two cycles,
    /// which is half their f32 throughput (84 against 157 GFLOP/s on a core without AMX).
    pub fn bf16_is_fast() -> bool {
        let vendor = __cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() != b"GenuineIntel"
    }

    kernel! {
        /// `vpmaddwd` on pairs of i16.
        Avx2(V3), run_avx2 with "avx2,bmi1,bmi2,fma,lzcnt,popcnt":
        8 lanes, 6 rows, __m256i, __m256i;
        load |from| _mm256_loadu_si256(from.cast());
        dot |sums, group, vector| _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_set1_epi32(group as i32), vector));
        start |_from| _mm256_setzero_si256();
        floats |sums| cast(_mm256_cvtepi32_ps(sums));
    }

    kernel! {
        /// `vpdpbusd` on quads of bytes, with 256-bit vectors.
        AvxVnni(V3), run_avx_vnni with "avx2,avxvnni,bmi1,bmi2,fma,lzcnt,popcnt":
        8 lanes, 6 rows, __m256i, __m256i;
        load |from| _mm256_loadu_si256(from.cast());
        dot |sums, group, vector| _mm256_dpbusd_avx_epi32(sums, _mm256_set1_epi32(group as i32), vector);
        start |from| _mm256_loadu_si256(from[..8].as_ptr().cast());
        floats |sums| cast(_mm256_cvtepi32_ps(sums));
    }

    kernel! {
        /// `vpdpbusd` on quads of bytes.
        Vnni(V4), run_vnni with
            "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,bmi1,bmi2,fma,lzcnt,popcnt":
        16 lanes, 12 rows, __m512i, __m512i;
        load |from| _mm512_loadu_si512(from.cast());
        dot |sums, group, vector| _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(group as i32), vector);
        start |from| _mm512_loadu_si512(from[..16].as_ptr().cast());
        floats |sums| cast(_mm512_cvtepi32_ps(sums));
    }

    kernel! {
        /// `vdpbf16ps` on pairs.
        Bf16(V4), run_bf16 with
            "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,bmi1,bmi2,fma,lzcnt,popcnt":
        16 lanes, 12 rows, __m512bh, __m512;
        load |from| from.cast::<__m512bh>().read_unaligned();
        dot |sums, group, vector| {
            let pairs = transmute::<__m512i, __m512bh>(_mm512_set1_epi32(group as i32));
            _mm512_dpbf16_ps(sums, pairs, vector)
        };
        start |_from| _mm512_setzero_ps();
        floats |sums| cast(sums);
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) mod arm {
    use std::arch::aarch64::*;
    use std::arch::{asm, is_aarch64_feature_detected};

    use pulp::aarch64::Neon;
    use pulp::{Simd, cast};

    use super::super::Strip;
    use super::{Isa, Kernel, run};

    pub fn has_dot() -> bool {
        Neon::is_available() && is_aarch64_feature_detected!("dotprod")
    }

    pub fn has_bf16() -> bool {
        Neon::is_available() && is_aarch64_feature_detected!("bf16")
    }

    /// Inline assembly, because neither instruction has a stable intrinsic.
    macro_rules! dot {
        ($instruction:literal, $into:ident, $group:ident, $by:ident) => {{
            let mut sums = $into;
            asm!(
                $instruction,
                sums = inout(vreg) sums,
                group = in(vreg) vdupq_n_u32($group),
                vector = in(vreg) $by,
                options(pure, nomem, nostack, preserves_flags),
            );
            sums
        }};
    }

    kernel! {
        /// `sdot` on quads of bytes.
        Dot(Neon), run_dot with "neon,dotprod":
        4 lanes, 12 rows, uint32x4_t, int32x4_t;
        load |from| vld1q_u32(from);
        dot |sums, group, vector| dot!("sdot {sums:v}.4s, {group:v}.16b, {vector:v}.16b", sums, group, vector);
        start |_from| vdupq_n_s32(0);
        floats |sums| cast(vcvtq_f32_s32(sums));
    }

    kernel! {
        /// `bfdot` on pairs.
        Bf16Dot(Neon), run_bf16_dot with "neon,bf16":
        4 lanes, 12 rows, uint32x4_t, float32x4_t;
        load |from| vld1q_u32(from);
        dot |sums, group, vector| dot!("bfdot {sums:v}.4s, {group:v}.8h, {vector:v}.8h", sums, group, vector);
        start |_from| vdupq_n_f32(0.0);
        floats |sums| cast(sums);
    }
}
