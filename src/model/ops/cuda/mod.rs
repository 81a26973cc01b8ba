//! The operations on a GPU: the kernels of kernels.cu, one launch each, on Candle's tensors and stream.
//! What a batch needs of indices is copied there once (`Packed::on`); nothing waits for the device.

#[cfg(test)]
mod host;
#[cfg(feature = "cuda")]
mod launch;

#[cfg(feature = "cuda")]
pub(super) use launch::{add_activate, add_norm, attend, embed, gated, pool};

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

/// Threads of a block that works on a row: whole warps.
fn threads(width: usize) -> u32 {
    (width as u32).div_ceil(32).clamp(1, 8) * 32
}
