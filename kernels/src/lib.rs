//! The operations of the encoder, one file each.
//!
//! On a CPU each operation is fused and writes to memory that is reused from batch to batch ([`Workspace`]). It
//! runs on one core; other cores run other batches. On a CUDA GPU each operation is a kernel ([`cuda`]), except for
//! matrix multiplication, which is Candle's, and what few models have: LSTMs, the scores of spans, and DeBERTa's
//! convolution. On other devices each is made of Candle's own operations.

mod activation;
mod attention;
mod convolution;
mod cross;
#[cfg(any(feature = "cuda", test))]
pub mod cuda;
mod disentangled;
mod embed;
pub mod forest;
pub mod image;
mod linear;
mod lstm;
pub mod matmul;
pub mod nearest;
mod norm;
mod packed;
mod pool;
mod quant;
mod reduce;
mod simd;
mod spans;
mod tile;
mod transfer;

use std::cell::RefCell;

use candle_core::{CpuStorage, DType, Device, InplaceOp2, InplaceOp3, Layout, Result, Storage, Tensor};

pub use activation::{Activation, Gate, gated};
pub use attention::{Attention, DistanceBias, Mask, PairBias, Rope, Rotation};
pub use convolution::Convolution;
pub use cross::CrossAttention;
pub use disentangled::{Buckets, Disentangled};
pub use embed::Embedding;
pub use linear::{Epilogue, Linear};
pub use lstm::Lstm;
pub use norm::{Norm, NormKind};
pub use packed::{Indices, Packed, Run};
pub use pool::{Pooling, pool};
pub use quant::{Calibration, Expected, Precision};
pub use reduce::{Reduction, Saturation};
pub use spans::{count_spans, span_logits, spans};
pub use transfer::{KeptMemory, Transfer, upload};

/// The buffer of a [`Workspace`] that an operation writes to, named by its place in a layer. Results that are needed
/// at the same time never share a slot.
#[derive(Debug, Clone, Copy)]
pub enum Slot {
    /// A layer's input and its output.
    Stream,
    /// Output of the attention block, with the residual added.
    Attended,
    /// Queries, keys and values; later the inner activations of the feed-forward block.
    Wide,
    /// The concatenated heads; with pre-norm, also the normalised input of a block.
    Mixed,
    /// The inner activations after gating.
    Gated,
    /// Output of the convolution beside the first layer.
    Convolved,
    /// One row per sequence.
    Pooled,
    /// Output of a classifier's hidden layer.
    Hidden,
    Logits,
}

/// Buffers that forward passes on a CPU reuse, one pass at a time. Empty on other devices, whose allocators reuse
/// memory themselves.
#[derive(Default)]
pub struct Workspace([RefCell<Option<Tensor>>; Slot::Logits as usize + 1]);

impl Workspace {
    pub fn at(&self, slot: Slot, device: &Device) -> Out<'_> {
        Out(device.is_cpu().then_some(&self.0[slot as usize]))
    }
}

/// Where an operation writes its result: a slot of the workspace, or memory from the device's allocator.
#[derive(Clone, Copy)]
pub struct Out<'a>(Option<&'a RefCell<Option<Tensor>>>);

impl Out<'_> {
    /// The slot as `[rows, width]`, with unspecified contents; `None` if the device's allocator provides the memory.
    fn view(self, rows: usize, width: usize) -> Result<Option<Tensor>> {
        let Some(kept) = self.0 else { return Ok(None) };
        let mut kept = kept.borrow_mut();
        let count = rows * width;
        if kept.as_ref().is_none_or(|kept| kept.elem_count() < count) {
            // Free the old buffer first, so that the two never exist at once.
            *kept = None;
            *kept = Some(aligned(count)?);
        }
        let flat = kept.as_ref().expect("allocated above").narrow(0, 0, count)?;
        flat.reshape((rows, width)).map(Some)
    }

    /// Like `view`, but fails if there is no slot: for operations whose weights are on the CPU.
    fn here(self, rows: usize, width: usize) -> Result<Tensor> {
        match self.view(rows, width)? {
            Some(view) => Ok(view),
            None => candle_core::bail!("the weights are on the CPU but their input is not"),
        }
    }
}

/// A fused CPU operation: its name, and a function of the elements of its result and its sources.
struct Fused<F>(&'static str, F);

impl<F: Fn(&mut [f32], &[f32])> InplaceOp2 for Fused<F> {
    fn name(&self) -> &'static str {
        self.0
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, layout: &Layout, x: &CpuStorage, of_x: &Layout) -> Result<()> {
        (self.1)(floats_mut(out, layout)?, floats(x, of_x)?);
        Ok(())
    }
}

impl<F: Fn(&mut [f32], &[f32], &[f32])> InplaceOp3 for Fused<F> {
    fn name(&self) -> &'static str {
        self.0
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        layout: &Layout,
        x: &CpuStorage,
        of_x: &Layout,
        y: &CpuStorage,
        of_y: &Layout,
    ) -> Result<()> {
        (self.1)(floats_mut(out, layout)?, floats(x, of_x)?, floats(y, of_y)?);
        Ok(())
    }
}

/// The elements of a contiguous f32 tensor on the CPU.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => candle_core::bail!("the tensor is not contiguous: {layout:?}"),
    }
}

fn floats_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let CpuStorage::F32(all) = storage else { candle_core::bail!("the tensor is not f32") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&mut all[start..end]),
        None => candle_core::bail!("the tensor is not contiguous: {layout:?}"),
    }
}

/// Zeros, aligned to a cache line: a vector that straddles two lines takes twice as long to load.
fn aligned(count: usize) -> Result<Tensor> {
    const LINE: usize = 64;
    let all = Tensor::zeros(count + LINE / size_of::<f32>(), DType::F32, &Device::Cpu)?;
    let start = match &*all.storage_and_layout().0 {
        Storage::Cpu(storage) => storage.as_slice::<f32>()?.as_ptr().align_offset(LINE),
        _ => 0,
    };
    all.narrow(0, start, count)
}

/// A copy of a tensor's elements on the host, as f32.
fn host(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
