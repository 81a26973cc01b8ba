//! The operations of the encoder, one file each.
//!
//! On a CPU each is fused and writes to memory that is kept from batch to batch ([`Scratch`]); one
//! core runs it alone, other cores have batches of their own. On a GPU by CUDA each is a kernel ([`cuda`])
//! beside Candle's multiplication. On other devices each is made of Candle's own operations.

mod activation;
mod attention;
mod coded;
#[cfg(any(feature = "cuda", test))]
pub(super) mod cuda;
mod embed;
mod linear;
pub mod matmul;
mod norm;
mod pool;
mod rows;
mod simd;
mod tile;

use std::cell::RefCell;

use candle_core::{CpuStorage, DType, Device, InplaceOp2, InplaceOp3, Layout, Result, Storage, Tensor};

pub use activation::{Activation, Gate, gated};
pub use attention::{Attention, Rotation};
pub use coded::Code;
pub use embed::Embedding;
pub use linear::{Linear, Then};
pub use norm::Norm;
pub use pool::Pooling;
pub use rows::{Rows, upload};

/// What an operation writes to, by its place in a layer: two that are needed at the same time never
/// share one.
#[derive(Debug, Clone, Copy)]
pub enum Slot {
    /// A layer's input, and its output.
    Stream,
    /// What attention adds to it.
    Attended,
    /// Queries, keys and values; then the feed-forward's inner numbers.
    Wide,
    /// Heads side by side; where norms come first, the normalised input.
    Mixed,
    /// The gated half of the inner numbers.
    Gated,
    /// A row for each sequence.
    Pooled,
    /// A head's hidden layer, and its output.
    Hidden,
    Logits,
}

/// The memory of one forward at a time on a CPU; nothing on other devices, whose allocators keep
/// what they have.
#[derive(Default)]
pub struct Scratch([RefCell<Option<Tensor>>; Slot::Logits as usize + 1]);

impl Scratch {
    pub fn at(&self, slot: Slot, device: &Device) -> Out<'_> {
        Out(device.is_cpu().then_some(&self.0[slot as usize]))
    }
}

/// Where an operation puts its result.
#[derive(Clone, Copy)]
pub struct Out<'a>(Option<&'a RefCell<Option<Tensor>>>);

impl Out<'_> {
    /// Memory for `[rows, width]`, with anything in it; `None` where the device's allocator gives it.
    fn view(self, rows: usize, width: usize) -> Result<Option<Tensor>> {
        let Some(kept) = self.0 else { return Ok(None) };
        let mut kept = kept.borrow_mut();
        let count = rows * width;
        if kept.as_ref().is_none_or(|kept| kept.elem_count() < count) {
            // Freed before more is asked for.
            *kept = None;
            *kept = Some(aligned(count)?);
        }
        let flat = kept.as_ref().expect("it was made").narrow(0, 0, count)?;
        flat.reshape((rows, width)).map(Some)
    }

    /// The same where it is known to be on a CPU.
    fn here(self, rows: usize, width: usize) -> Result<Tensor> {
        match self.view(rows, width)? {
            Some(view) => Ok(view),
            None => candle_core::bail!("the weights are on the CPU and their input is not"),
        }
    }
}

/// A fused operation: its name, and what it does with the numbers of its result and its sources.
struct Fused<F>(&'static str, F);

impl<F: Fn(&mut [f32], &[f32])> InplaceOp2 for Fused<F> {
    fn name(&self) -> &'static str {
        self.0
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, layout: &Layout, x: &CpuStorage, of_x: &Layout) -> Result<()> {
        (self.1)(numbers_mut(out, layout)?, numbers(x, of_x)?);
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
        (self.1)(numbers_mut(out, layout)?, numbers(x, of_x)?, numbers(y, of_y)?);
        Ok(())
    }
}

/// The numbers of a contiguous tensor of f32 on the CPU.
fn numbers<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => candle_core::bail!("not contiguous: {layout:?}"),
    }
}

fn numbers_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let CpuStorage::F32(all) = storage else { candle_core::bail!("not f32") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&mut all[start..end]),
        None => candle_core::bail!("not contiguous: {layout:?}"),
    }
}

/// Zeros that begin with a line of the cache: a vector that lies in two of them takes twice as long to load.
fn aligned(count: usize) -> Result<Tensor> {
    const LINE: usize = 64;
    let all = Tensor::zeros(count + LINE / size_of::<f32>(), DType::F32, &Device::Cpu)?;
    let start = match &*all.storage_and_layout().0 {
        Storage::Cpu(storage) => storage.as_slice::<f32>()?.as_ptr().align_offset(LINE),
        _ => 0,
    };
    all.narrow(0, start, count)
}

/// A copy of a tensor's numbers.
fn host(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
