//! The kernels that are a vector at a time: one tile of sums in registers, whatever the instruction.

use std::hint::black_box;

use super::{Encoding, Strip};

/// What the kernels need of a processor. All of it is unsafe for its features may be absent.
pub(super) trait Isa {
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
pub(super) unsafe fn run<K: Isa, const R: usize>(strip: &mut Strip<'_>) {
    let mut row = 0;
    // SAFETY: as of this function.
    unsafe {
        while row + R <= strip.rows {
            tile::<K, R>(strip, row);
            row += R;
        }
        if R > 6 && row + 6 <= strip.rows {
            tile::<K, 6>(strip, row);
            row += 6;
        }
        while row + 2 <= strip.rows {
            tile::<K, 2>(strip, row);
            row += 2;
        }
        if row < strip.rows {
            tile::<K, 1>(strip, row);
        }
    }
    strip.activate(0..strip.rows);
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
        strip.write(row + r, raw);
    }
}

/// Pairs of i16, eight sums.
pub(super) struct Plain;

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
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::super::{Encoding, Strip, encode};
    use super::{Isa, run};

    /// `vpmaddwd` on pairs of i16.
    pub struct Avx2;
    /// `vpdpbusd` on quads of bytes.
    pub struct Vnni;
    /// `vdpbf16ps` on pairs.
    pub struct Bf16;

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn run_avx2(strip: &mut Strip<'_>) {
        // SAFETY: the features are this function's.
        unsafe { run::<Avx2, 6>(strip) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub unsafe fn run_vnni(strip: &mut Strip<'_>) {
        // SAFETY: the features are this function's.
        unsafe { run::<Vnni, 12>(strip) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn run_bf16(strip: &mut Strip<'_>) {
        // SAFETY: the features are this function's.
        unsafe { run::<Bf16, 12>(strip) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn encode_avx2(encoding: Encoding, x: &[f32], codes: &mut [u32]) -> f32 {
        encode(encoding, x, codes)
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub unsafe fn encode_avx512(encoding: Encoding, x: &[f32], codes: &mut [u32]) -> f32 {
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
