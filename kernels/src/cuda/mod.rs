//! The operations on a CUDA GPU: each is one launch of a kernel of kernels.cu, on Candle's tensors and stream.
//! A batch's indices are copied to the GPU once (`Packed::on`). Only [`Download::finish`] waits for results.

#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
mod stream;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
pub(super) use launch::{add_activate, add_norm, attend, embed, gated, norm_add, pool, reduce};
#[cfg(feature = "cuda")]
pub use stream::{Download, MemoryPool, free_memory, open, upload};

use super::{Activation, Gate, Pooling, Reduction, Saturation};

/// The activation's number in kernels.cu.
fn activation_code(activation: Option<Activation>) -> i32 {
    match activation {
        None => 0,
        Some(Activation::Gelu) => 1,
        Some(Activation::GeluTanh) => 2,
        Some(Activation::Relu) => 3,
        Some(Activation::Silu) => 4,
        Some(Activation::Tanh) => 5,
        Some(Activation::Sigmoid) => 6,
        Some(Activation::QuickGelu) => 7,
        Some(Activation::Relu6) => 8,
        Some(Activation::HardSigmoid) => 9,
        Some(Activation::HardSwish) => 10,
    }
}

fn gate_code(gate: Gate) -> i32 {
    match gate {
        Gate::First => 0,
        Gate::Second => 1,
    }
}

fn pooling_code(pooling: Pooling) -> i32 {
    match pooling {
        Pooling::Mean => 0,
        Pooling::First => 1,
        Pooling::Last => 2,
        Pooling::Max => 3,
        Pooling::MeanSqrtLen => 4,
        Pooling::WeightedMean => 5,
    }
}

fn reduction_code(reduction: Reduction) -> i32 {
    match reduction {
        Reduction::Max => 0,
        Reduction::Sum(Saturation { twice: false }) => 1,
        Reduction::Sum(Saturation { twice: true }) => 2,
    }
}

/// The launch configuration of attention over a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct AttentionLaunch {
    /// Whether the kernel for short sequences runs, where the width of a head has one: it reads keys 32 at a time instead
    /// of 64, and more blocks fit on a multiprocessor.
    short: bool,
    /// Blocks for each head of each sequence.
    blocks: usize,
    threads: u32,
}

impl AttentionLaunch {
    /// For sequences of at most `longest` tokens and heads of `width` elements. In 16 bits a warp has 16 queries and a
    /// block has at most four warps, which share the keys that the block loads. In f32 a thread has at most 64 elements of
    /// one query.
    fn new(longest: usize, width: usize, bits16: bool) -> Self {
        const QUERIES: usize = 64;
        let blocks = longest.div_ceil(QUERIES);
        if !bits16 {
            return Self { short: false, blocks, threads: (QUERIES * width.div_ceil(64)) as u32 };
        }
        let warps = longest.div_ceil(blocks).div_ceil(16);
        Self { short: longest <= 32 && width <= 64, blocks, threads: 32 * warps as u32 }
    }
}

/// Maximum threads per block.
const MAX_THREADS: usize = 1024;

/// Pieces of a row of elements of `size` bytes: 16 bytes each, or one element if the row is not a multiple of that.
fn pieces(size: usize, width: usize) -> usize {
    let piece = 16 / size;
    if width.is_multiple_of(piece) { width / piece } else { width }
}

/// Threads of a block that processes a row, one piece per thread: whole warps, at most [`MAX_THREADS`] threads.
fn threads(size: usize, width: usize) -> u32 {
    (pieces(size, width).next_multiple_of(32)).min(MAX_THREADS) as u32
}

/// Whether a block has a thread for every piece of a row.
#[cfg(feature = "cuda")]
fn fits(size: usize, width: usize) -> bool {
    pieces(size, width) <= MAX_THREADS
}
