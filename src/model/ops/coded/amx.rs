//! The kernel for processors with AMX (Intel, from Sapphire Rapids on): a tile of 16 rows by 16 sums, and
//! 16 groups of a row at a time. Four tiles of sums, 32 rows by 32 columns, stand in registers, so that
//! every tile that is loaded is multiplied twice.
//!
//! Rust has no stable intrinsics for it: the instructions are in assembly. (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 1, chapter 18.)

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use pulp::x86::V4;

use super::super::tile::{LINE, Left};
use super::{Code, Encoding, Shape, Strip, greatest};

/// Rows of a tile, its columns, and groups of a row that are multiplied at a time.
const TILE: usize = LINE;
/// Columns of a panel: two tiles.
const WIDTH: usize = 2 * TILE;

pub(super) fn shape(code: Code) -> Shape {
    let encoding = match code {
        Code::Int8 => Encoding::Bytes,
        Code::Bf16 => Encoding::Bf16,
    };
    Shape { group: encoding.group(), width: WIDTH, encoding, step: TILE, height: TILE }
}

/// Whether processor and kernel have it. Linux wants to be asked before the first use, as the registers
/// make a thread's saved state larger by 8 KiB; the answer holds for the process.
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
        // SAFETY: the processor has xsave, and asking for a permission changes nothing of ours.
        unsafe {
            states() & STATES == STATES
                && libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0
        }
    })
}

#[target_feature(enable = "xsave")]
fn states() -> u64 {
    // SAFETY: register 0 is there wherever xsave is.
    unsafe { _xgetbv(0) }
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row.
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

/// Groups of the next panel that are fetched while so many are multiplied: four lines of the cache, so that
/// with 256 rows the whole of it is.
const AHEAD: usize = 64;

/// Sums as the tiles leave them, in the bits of f32 or i32.
#[repr(C, align(64))]
struct Sums([[u32; WIDTH]; 2 * TILE]);

/// The thread's tiles, until it is dropped: without giving them back, the kernel would save them at every
/// switch of threads.
pub(super) struct Tiles;

impl Tiles {
    /// # Safety
    /// [`available`] has said so.
    pub(super) unsafe fn configure() -> Self {
        // SAFETY: the configuration is a valid one, and thread and process may use it.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: they were configured, and nobody uses them any more.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// # Safety
/// [`available`] has said so, and the thread's [`Tiles`] are configured.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn run(code: Code, mut strip: Strip<'_>) {
    let Strip { left: Left { x: left, count: rows, depth, tile: block, .. }, panel, .. } = strip;
    let padded = rows.next_multiple_of(TILE);
    // Of 16 rows, which are a block, tiles of 16 groups each stand one after the other.
    assert!(depth.is_multiple_of(TILE) && depth > 0);
    assert!(panel.len() >= depth * WIDTH);
    assert!(left.len() >= (padded / TILE - 1) * block + depth * TILE);
    let mut sums = MaybeUninit::<Sums>::uninit();
    let mut row = 0;
    let mut ahead = strip.ahead.as_ptr();
    while row < padded {
        let tall = row + TILE < padded;
        // SAFETY: the rows that are read and the panel are as long as was asserted.
        unsafe {
            let left = left.as_ptr().add(row / TILE * block);
            let both = [left, left.wrapping_add(block)];
            match (code, tall) {
                (Code::Bf16, true) => tall_bf16(both, depth, panel.as_ptr(), ahead, sums.as_mut_ptr()),
                (Code::Bf16, false) => flat_bf16(left, depth, panel.as_ptr(), ahead, sums.as_mut_ptr()),
                (Code::Int8, true) => tall_int8(both, depth, panel.as_ptr(), ahead, sums.as_mut_ptr()),
                (Code::Int8, false) => flat_int8(left, depth, panel.as_ptr(), ahead, sums.as_mut_ptr()),
            }
        }
        ahead = ahead.wrapping_add(depth / TILE * AHEAD);
        let height = if tall { 2 * TILE } else { TILE };
        // SAFETY: as many rows of sums have been stored.
        unsafe { write(code, &mut strip, row..rows.min(row + height), sums.as_ptr()) };
        row += height;
    }
}

/// Some rows' sums go where they belong, by hand: what follows the tiles costs as much as they do. Then the
/// activation, while the rows are in the first-level cache.
///
/// # Safety
/// The processor has AVX-512, and `sums` has so many rows.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn write(code: Code, strip: &mut Strip<'_>, rows: Range<usize>, sums: *const Sums) {
    for first in (0..strip.width).step_by(TILE) {
        let mask = __mmask16::MAX >> (TILE - TILE.min(strip.width - first));
        let columns = |of: &[f32]| {
            let of = &of[first..strip.width];
            // SAFETY: masked to as many as there are.
            unsafe { _mm512_maskz_loadu_ps(mask, of.as_ptr()) }
        };
        let finish = strip.finish.map(|f| (f.rows, columns(f.columns), columns(f.bias)));
        for (at, row) in rows.clone().enumerate() {
            let (add, width) = (strip.add, strip.width);
            let out = &mut strip.row(row)[first..width];
            // SAFETY: `sums` is aligned and has the row, `out` is masked to as many columns as there are.
            unsafe {
                let bits = _mm512_load_si512((&raw const (*sums).0[at][first]).cast());
                let mut x = match code {
                    Code::Bf16 => _mm512_castsi512_ps(bits),
                    Code::Int8 => _mm512_cvtepi32_ps(bits),
                };
                if add {
                    x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, out.as_ptr()));
                }
                if let Some((scales, columns, bias)) = finish {
                    if code == Code::Int8 {
                        x = _mm512_mul_ps(x, _mm512_mul_ps(_mm512_set1_ps(scales[row]), columns));
                    }
                    x = _mm512_add_ps(x, bias);
                }
                _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, x);
            }
        }
    }
    strip.activate(rows);
}

/// A row's numbers, rounded, and zeros behind the last in its line. Returns the row's scale.
///
/// # Safety
/// [`available`] has said so.
#[target_feature(
    enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,bmi1,bmi2,fma,lzcnt,popcnt"
)]
pub(super) unsafe fn encode<'a>(
    code: Code,
    x: &[f32],
    lines: impl Iterator<Item = &'a mut [u32; LINE]>,
) -> f32 {
    // What a chunk of the row has, zeros behind it.
    let part = |x: &[f32], at: usize| {
        let x = &x[x.len().min(at)..];
        let mask = if x.len() < TILE { !(__mmask16::MAX << x.len()) } else { __mmask16::MAX };
        // SAFETY: masked to as many as there are.
        unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) }
    };
    match code {
        Code::Bf16 => {
            for (x, groups) in x.chunks(2 * TILE).zip(lines) {
                let both = _mm512_cvtne2ps_pbh(part(x, TILE), part(x, 0));
                // SAFETY: the groups are 64 bytes.
                unsafe { groups.as_mut_ptr().cast::<__m512bh>().write_unaligned(both) };
            }
            1.0
        }
        Code::Int8 => {
            // SAFETY: as of this function.
            let greatest = greatest(unsafe { V4::new_unchecked() }, x);
            let factor = _mm512_set1_ps(if greatest > 0.0 { 127.0 / greatest } else { 0.0 });
            for (x, groups) in x.chunks(4 * TILE).zip(lines) {
                for (quarter, groups) in groups.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let nearest = _mm512_cvtps_epi32(_mm512_mul_ps(part(x, quarter * TILE), factor));
                    // SAFETY: four groups are 16 bytes.
                    unsafe { _mm_storeu_si128(groups.as_mut_ptr().cast(), _mm512_cvtsepi32_epi8(nearest)) };
                }
            }
            greatest / 127.0
        }
    }
}

/// Functions that multiply 32 rows, and 16, with a panel.
macro_rules! kernels {
    ($tall:ident, $flat:ident, $dot:literal) => {
        #[inline(always)]
        unsafe fn $tall([upper, lower]: [*const u32; 2], depth: usize, panel: *const u32, ahead: *const u32, sums: *mut Sums) {
            // SAFETY: the caller has 32 rows, a panel of that depth, and tiles.
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
            // SAFETY: the caller has 16 rows, a panel of that depth, and tiles.
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
