//! The kernel for AMX (Intel, Sapphire Rapids and later): tiles of 16 rows by 16 accumulators, and 16 groups of a row
//! at a time. Four tiles of accumulators, 32 rows by 32 columns, stay in registers, so that every tile that is loaded
//! is multiplied twice.
//!
//! Rust has no stable AMX intrinsics, so the instructions are inline assembly. (Intel 64 and IA-32 Architectures
//! Software Developer's Manual, volume 1, chapter 18.)

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use pulp::x86::V4;

use super::super::tile::{F32, Kernel, LINE, Left};
use super::{Encoding, Epilogue, Grid, Precision, Shape, Strip};

/// Rows of a tile, columns of a tile, and groups of a row that are multiplied at a time.
const TILE: usize = LINE;
/// Columns of a panel: two tiles.
const WIDTH: usize = 2 * TILE;

pub(super) fn shape(precision: Precision) -> Shape {
    let encoding = match precision {
        Precision::Int8 => Encoding::Bytes,
        Precision::Bf16 => Encoding::Bf16,
    };
    let exact_height = F32::<V4>::HEIGHT;
    Shape { group: encoding.group(), width: WIDTH, encoding, step: TILE, height: TILE, exact_height }
}

/// Whether the processor and Linux support AMX. A process must request permission from Linux before the first use,
/// because the registers add 8 KiB to a thread's saved state; the permission holds for all threads.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        const INT8: u32 = 1 << 25;
        /// `TILECFG` and `TILEDATA` of XCR0.
        const STATES: u64 = 0b11 << 17;
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        if !(V4::is_available()
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("xsave"))
        {
            return false;
        }
        let all = BF16 | TILES | INT8;
        if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & all != all {
            return false;
        }
        // SAFETY: the processor has xsave, and requesting the permission touches no memory.
        unsafe {
            states() & STATES == STATES
                && libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0
        }
    })
}

#[target_feature(enable = "xsave")]
fn states() -> u64 {
    // SAFETY: register 0 exists wherever xsave does.
    unsafe { _xgetbv(0) }
}

/// The tile configuration, in the format of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes per row of each tile.
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        row_bytes[tile] = 64;
        rows[tile] = TILE as u8;
        tile += 1;
    }
    Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

/// Groups of the next panel that are prefetched in each step of [`TILE`] groups: four cache lines, so that 256 rows
/// prefetch the whole panel.
const AHEAD: usize = 64;

/// Accumulators as the tiles store them: the bits of f32 or i32.
#[repr(C, align(64))]
struct Sums([[u32; WIDTH]; 2 * TILE]);

/// The thread's configured tiles, released when this is dropped: otherwise Linux would save them at every context
/// switch.
pub(super) struct Tiles;

impl Tiles {
    /// # Safety
    /// [`available`] has returned true.
    pub(super) unsafe fn configure() -> Self {
        // SAFETY: the configuration is valid, and the process has the permission.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the tiles were configured and are not in use any more.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// # Safety
/// [`available`] has returned true, and the thread's [`Tiles`] are configured.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn run(precision: Precision, mut strip: Strip<'_>) {
    let Strip { left: Left { x: left, count: rows, depth, tile: block, .. }, panel, .. } = strip;
    let padded = rows.next_multiple_of(TILE);
    // A block is 16 rows: its tiles, of 16 groups each, are consecutive in memory.
    assert!(depth.is_multiple_of(TILE) && depth > 0);
    assert!(panel.len() >= depth * WIDTH);
    assert!(left.len() >= (padded / TILE - 1) * block + depth * TILE);
    if let Some(exact) = strip.exact {
        // SAFETY: `available` has checked the features.
        let simd = unsafe { V4::new_unchecked() };
        strip.write_exact(simd, exact.left, 0);
    }
    let mut sums = MaybeUninit::<Sums>::uninit();
    let mut row = 0;
    let mut ahead = strip.ahead.as_ptr();
    while row < padded {
        let tall = row + TILE < padded;
        // SAFETY: the rows that are read and the panel have the lengths asserted above.
        unsafe {
            let left = left.as_ptr().add(row / TILE * block);
            let both = [left, left.wrapping_add(block)];
            match (precision, tall) {
                (Precision::Bf16, true) => tall_bf16(both, depth, panel.as_ptr(), ahead, sums.as_mut_ptr()),
                (Precision::Bf16, false) => flat_bf16(left, depth, panel.as_ptr(), ahead, sums.as_mut_ptr()),
                (Precision::Int8, true) => tall_int8(both, depth, panel.as_ptr(), ahead, sums.as_mut_ptr()),
                (Precision::Int8, false) => flat_int8(left, depth, panel.as_ptr(), ahead, sums.as_mut_ptr()),
            }
        }
        ahead = ahead.wrapping_add(depth / TILE * AHEAD);
        let height = if tall { 2 * TILE } else { TILE };
        // SAFETY: the kernel has stored this many rows of sums.
        unsafe { write(&mut strip, row..rows.min(row + height), sums.as_ptr()) };
        row += height;
    }
}

/// Finishes the sums of some rows and writes them to the output, then applies the activation while the rows are in the
/// L1 cache. Uses intrinsics, because this step takes as long as the tiles.
///
/// # Safety
/// The processor has AVX-512, and `sums` has at least `rows.len()` rows.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn write(strip: &mut Strip<'_>, rows: Range<usize>, sums: *const Sums) {
    for first in (0..strip.width).step_by(TILE) {
        let mask = __mmask16::MAX >> (TILE - TILE.min(strip.width - first));
        let columns = |of: &[f32]| {
            let of = &of[first..strip.width];
            // SAFETY: the mask has only the columns that exist.
            unsafe { _mm512_maskz_loadu_ps(mask, of.as_ptr()) }
        };
        let epilogue = strip.epilogue;
        let of_columns = match epilogue {
            Epilogue::Scale { columns: scales, .. } => columns(scales),
            Epilogue::Bias { bias: Some(bias), .. } => columns(bias),
            Epilogue::Bias { bias: None, .. } => _mm512_setzero_ps(),
        };
        for (at, row) in rows.clone().enumerate() {
            let width = strip.width;
            let out = &mut strip.row(row)[first..width];
            // SAFETY: `sums` is aligned and has the row; the mask has only the columns that `out` has.
            unsafe {
                let bits = _mm512_load_si512((&raw const (*sums).0[at][first]).cast());
                let before = _mm512_maskz_loadu_ps(mask, out.as_ptr());
                let x = match epilogue {
                    Epilogue::Scale { rows, .. } => {
                        let scale = _mm512_mul_ps(_mm512_set1_ps(rows[row]), of_columns);
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), scale, before)
                    }
                    Epilogue::Bias { add, .. } => {
                        let sum = _mm512_castsi512_ps(bits);
                        _mm512_add_ps(if add { _mm512_add_ps(sum, before) } else { sum }, of_columns)
                    }
                };
                _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, x);
            }
        }
    }
    strip.activate(rows);
}

/// Quantizes a row, and pads its last line.
///
/// # Safety
/// [`available`] has returned true.
#[target_feature(
    enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,bmi1,bmi2,fma,lzcnt,popcnt"
)]
pub(super) unsafe fn encode<'a>(
    precision: Precision,
    x: &[f32],
    grid: Grid,
    lines: impl Iterator<Item = &'a mut [u32; LINE]>,
) {
    // 16 elements of a chunk of the row from `at` on, with zeros past its end.
    let part = |x: &[f32], at: usize| {
        let x = &x[x.len().min(at)..];
        let mask = if x.len() < TILE { !(__mmask16::MAX << x.len()) } else { __mmask16::MAX };
        // SAFETY: the mask has only the elements that exist.
        unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) }
    };
    match precision {
        Precision::Bf16 => {
            for (x, groups) in x.chunks(2 * TILE).zip(lines) {
                let both = _mm512_cvtne2ps_pbh(part(x, TILE), part(x, 0));
                // SAFETY: `groups` is 64 bytes.
                unsafe { groups.as_mut_ptr().cast::<__m512bh>().write_unaligned(both) };
            }
        }
        Precision::Int8 => {
            let (zero, factor) = (_mm512_set1_ps(grid.zero), _mm512_set1_ps(grid.factor()));
            for (x, groups) in x.chunks(4 * TILE).zip(lines) {
                for (quarter, groups) in groups.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let x = _mm512_sub_ps(part(x, quarter * TILE), zero);
                    let nearest = _mm512_cvtps_epi32(_mm512_mul_ps(x, factor));
                    // SAFETY: four groups are 16 bytes.
                    unsafe { _mm_storeu_si128(groups.as_mut_ptr().cast(), _mm512_cvtsepi32_epi8(nearest)) };
                }
            }
        }
    }
}

/// Defines functions that multiply 32 and 16 rows with a panel.
macro_rules! kernels {
    ($tall:ident, $flat:ident, $dot:literal) => {
        #[inline(always)]
        unsafe fn $tall([upper, lower]: [*const u32; 2], depth: usize, panel: *const u32, ahead: *const u32, sums: *mut Sums) {
            // SAFETY: the caller passes 32 rows and a panel of that depth, and has configured the tiles.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm6, [{panel} + {panel_stride}]",
                    "tileloadd tmm4, [{upper} + {stride}]",
                    "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
                    concat!($dot, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm5, [{lower} + {stride}]",
                    concat!($dot, " tmm1, tmm4, tmm7"),
                    concat!($dot, " tmm2, tmm5, tmm6"),
                    concat!($dot, " tmm3, tmm5, tmm7"),
                    "prefetcht1 [{ahead}]",
                    "prefetcht1 [{ahead} + 64]",
                    "prefetcht1 [{ahead} + 128]",
                    "prefetcht1 [{ahead} + 192]",
                    "add {ahead}, 256",
                    "add {panel}, 2048",
                    "add {upper}, 1024",
                    "add {lower}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {panel_stride}], tmm0",
                    "tilestored [{sums} + {panel_stride} + 64], tmm1",
                    "tilestored [{sums} + {panel_stride} + 2048], tmm2",
                    "tilestored [{sums} + {panel_stride} + 2112], tmm3",
                    upper = inout(reg) upper => _,
                    lower = inout(reg) lower => _,
                    stride = in(reg) 64usize,
                    panel = inout(reg) panel => _,
                    panel_stride = in(reg) 4 * WIDTH,
                    ahead = inout(reg) ahead => _,
                    steps = inout(reg) depth / TILE => _,
                    sums = in(reg) sums,
                    options(nostack),
                );
            }
        }

        #[inline(always)]
        unsafe fn $flat(left: *const u32, depth: usize, panel: *const u32, ahead: *const u32, sums: *mut Sums) {
            // SAFETY: the caller passes 16 rows and a panel of that depth, and has configured the tiles.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "2:",
                    "tileloadd tmm4, [{left} + {stride}]",
                    "tileloadd tmm6, [{panel} + {panel_stride}]",
                    "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
                    concat!($dot, " tmm0, tmm4, tmm6"),
                    concat!($dot, " tmm1, tmm4, tmm7"),
                    "prefetcht1 [{ahead}]",
                    "prefetcht1 [{ahead} + 64]",
                    "prefetcht1 [{ahead} + 128]",
                    "prefetcht1 [{ahead} + 192]",
                    "add {ahead}, 256",
                    "add {panel}, 2048",
                    "add {left}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {panel_stride}], tmm0",
                    "tilestored [{sums} + {panel_stride} + 64], tmm1",
                    left = inout(reg) left => _,
                    stride = in(reg) 64usize,
                    panel = inout(reg) panel => _,
                    panel_stride = in(reg) 4 * WIDTH,
                    ahead = inout(reg) ahead => _,
                    steps = inout(reg) depth / TILE => _,
                    sums = in(reg) sums,
                    options(nostack),
                );
            }
        }
    };
}
kernels!(tall_bf16, flat_bf16, "tdpbf16ps");
kernels!(tall_int8, flat_int8, "tdpbssd");
