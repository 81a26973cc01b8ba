//! The kernel for processors with AMX (Intel, from Sapphire Rapids on): a tile of 16 rows by 16 sums, and
//! 16 groups of a row at a time. Four tiles of sums, 32 rows by 32 columns, stand in registers, so that
//! every tile that is loaded is multiplied twice.
//!
//! Rust has no stable intrinsics for it: the instructions are in assembly. (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 1, chapter 18.)

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::OnceLock;

use super::{Code, Encoding, Shape, Strip};

/// Rows of a tile, its columns, and groups of a row that are multiplied at a time.
const TILE: usize = 16;
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
        if !(is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
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

/// Sums as the tiles leave them, in the bits of f32 or i32.
#[repr(C, align(64))]
struct Sums([[u32; WIDTH]; 2 * TILE]);

/// # Safety
/// [`available`] has said so.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn run(code: Code, strip: &mut Strip<'_>) {
    let Strip { left, stride, rows, depth, panel, .. } = *strip;
    let padded = rows.next_multiple_of(TILE);
    assert!(depth.is_multiple_of(TILE) && depth > 0);
    assert!(panel.len() >= depth * WIDTH);
    assert!(left.len() >= (padded - 1) * stride + depth);
    let mut sums = Sums([[0; WIDTH]; 2 * TILE]);
    // SAFETY: the configuration is a valid one, and thread and process may use it.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
    let mut row = 0;
    while row < padded {
        let tall = row + TILE < padded;
        // SAFETY: the rows that are read and the panel are as long as was asserted.
        unsafe {
            let left = left.as_ptr().add(row * stride);
            match (code, tall) {
                (Code::Bf16, true) => tall_bf16(left, stride, depth, panel.as_ptr(), &mut sums),
                (Code::Bf16, false) => flat_bf16(left, stride, depth, panel.as_ptr(), &mut sums),
                (Code::Int8, true) => tall_int8(left, stride, depth, panel.as_ptr(), &mut sums),
                (Code::Int8, false) => flat_int8(left, stride, depth, panel.as_ptr(), &mut sums),
            }
        }
        let height = if tall { 2 * TILE } else { TILE };
        for (r, sums) in sums.0.iter().take(height.min(rows - row)).enumerate() {
            let mut sums = match code {
                Code::Bf16 => sums.map(f32::from_bits),
                Code::Int8 => sums.map(|sum| sum as i32 as f32),
            };
            strip.write(row + r, &mut sums);
        }
        row += height;
    }
    // Without it the kernel would save the tiles at every switch of threads.
    // SAFETY: no tile is used any more.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// Functions that multiply 32 rows, and 16, with a panel.
macro_rules! kernels {
    ($tall:ident, $flat:ident, $dot:literal) => {
        #[inline(always)]
        unsafe fn $tall(left: *const u32, stride: usize, depth: usize, panel: *const u32, sums: &mut Sums) {
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
                    "add {panel}, 2048",
                    "add {upper}, 64",
                    "add {lower}, 64",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {panel_stride}], tmm0",
                    "tilestored [{sums} + {panel_stride} + 64], tmm1",
                    "tilestored [{sums} + {panel_stride} + 2048], tmm2",
                    "tilestored [{sums} + {panel_stride} + 2112], tmm3",
                    upper = inout(reg) left => _,
                    lower = inout(reg) left.add(TILE * stride) => _,
                    stride = in(reg) 4 * stride,
                    panel = inout(reg) panel => _,
                    panel_stride = in(reg) 4 * WIDTH,
                    steps = inout(reg) depth / TILE => _,
                    sums = in(reg) sums,
                    options(nostack),
                );
            }
        }

        #[inline(always)]
        unsafe fn $flat(left: *const u32, stride: usize, depth: usize, panel: *const u32, sums: &mut Sums) {
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
                    "add {panel}, 2048",
                    "add {left}, 64",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {panel_stride}], tmm0",
                    "tilestored [{sums} + {panel_stride} + 64], tmm1",
                    left = inout(reg) left => _,
                    stride = in(reg) 4 * stride,
                    panel = inout(reg) panel => _,
                    panel_stride = in(reg) 4 * WIDTH,
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
