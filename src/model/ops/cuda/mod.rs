//! The operations on a GPU: the kernels of kernels.cu, one launch each, on Candle's tensors and stream.
//! What a batch needs of indices is copied there once (`Packed::on`); nothing waits for the device but
//! [`Download::finish`].

#[cfg(test)]
mod host;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
mod stream;

#[cfg(feature = "cuda")]
pub(super) use launch::{add_activate, add_norm, attend, embed, gated, pool};
#[cfg(feature = "cuda")]
pub use stream::{Download, KeptMemory, open, upload};

use super::{Activation, Gate, Pooling};

/// As kernels.cu has it.
fn number_of(activation: Option<Activation>) -> i32 {
    match activation {
        None => 0,
        Some(Activation::Gelu) => 1,
        Some(Activation::GeluTanh) => 2,
        Some(Activation::Relu) => 3,
        Some(Activation::Silu) => 4,
        Some(Activation::Tanh) => 5,
    }
}

fn number_of_gate(gate: Gate) -> i32 {
    match gate {
        Gate::First => 0,
        Gate::Second => 1,
    }
}

fn number_of_pooling(pooling: Pooling) -> i32 {
    match pooling {
        Pooling::Mean => 0,
        Pooling::First => 1,
        Pooling::Last => 2,
    }
}

/// How attention runs over a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct AttentionLaunch {
    /// The kernel for short sequences: keys are read 32 at a time instead of 64, and more blocks share a
    /// multiprocessor.
    short: bool,
    /// Blocks for each head of each sequence.
    blocks: usize,
    threads: u32,
}

impl AttentionLaunch {
    /// For sequences of at most `longest` tokens. In 16 bits a warp has 16 queries and a block at most four warps:
    /// all of them read the keys that the block loads. In f32 a thread has one query.
    fn new(longest: usize, bits16: bool) -> Self {
        const QUERIES: usize = 64;
        let blocks = longest.div_ceil(QUERIES);
        if !bits16 {
            return Self { short: false, blocks, threads: QUERIES as u32 };
        }
        let warps = longest.div_ceil(blocks).div_ceil(16);
        Self { short: longest <= 32, blocks, threads: 32 * warps as u32 }
    }
}

/// Threads that a block can have.
const MOST: usize = 1024;

/// Pieces of a row of numbers of `size` bytes: 16 bytes each, or one number where that leaves a rest.
fn pieces(size: usize, width: usize) -> usize {
    let piece = 16 / size;
    if width.is_multiple_of(piece) { width / piece } else { width }
}

/// Threads of a block that works on a row, a piece each: whole warps.
fn threads(size: usize, width: usize) -> u32 {
    (pieces(size, width).next_multiple_of(32)).min(MOST) as u32
}

/// Whether a block has a thread for every piece of a row.
#[cfg(feature = "cuda")]
fn fits(size: usize, width: usize) -> bool {
    pieces(size, width) <= MOST
}
