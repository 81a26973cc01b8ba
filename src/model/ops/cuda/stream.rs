//! A device's one stream, and copies on it that wait for nothing but their turn.

use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::{self, CUevent_flags, CUmemPool_attribute};
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaStream, DeviceRepr, PinnedHostSlice, ValidAsZeroBits, result,
};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{Device, Result, Storage, Tensor};

use super::launch::address;

/// A device on which everything runs in the order in which it was queued, by whatever thread. (Candle's
/// own choice gives each thread a stream, and nothing keeps those apart: neither weights that another thread
/// copies, nor cuBLAS's memory.)
pub fn open(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: there is one stream, so that nothing needs events to be in order.
    unsafe { cuda.disable_event_tracking() };
    Ok(device)
}

/// Memory that batches have freed, which is kept for the next: the driver's pool would give it back whenever
/// the host waits, and map it anew. Given back when this is dropped.
pub struct KeptMemory {
    stream: Arc<CudaStream>,
    pool: sys::CUmemoryPool,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for KeptMemory {}
// SAFETY: as above.
unsafe impl Sync for KeptMemory {}

impl KeptMemory {
    /// `None` where the device has no pool.
    pub fn on(device: &CudaDevice) -> Result<Option<Self>> {
        let stream = device.cuda_stream();
        if !stream.context().has_async_alloc() {
            return Ok(None);
        }
        let mut pool = std::ptr::null_mut();
        let mut threshold = u64::MAX;
        // SAFETY: the device exists, and this attribute is a u64.
        unsafe {
            sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device()).result().w()?;
            let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast::<c_void>())
                .result()
                .w()?;
        }
        Ok(Some(Self { stream, pool }))
    }
}

impl Drop for KeptMemory {
    fn drop(&mut self) {
        let trimmed = self.stream.synchronize().and_then(|()| {
            // SAFETY: a device's default pool is always there.
            unsafe { sys::cuMemPoolTrimTo(self.pool, 0) }.result()
        });
        if let Err(error) = trimmed {
            tracing::warn!(%error, "the GPU's memory was not given back");
        }
    }
}

thread_local! {
    static SENT: RefCell<Option<PinnedHostSlice<u32>>> = const { RefCell::new(None) };
    static RECEIVED: RefCell<Option<PinnedHostSlice<f32>>> = const { RefCell::new(None) };
}

/// Page-locked memory for `count` numbers at least: what was kept, or more.
fn page_locked<T: DeviceRepr + ValidAsZeroBits>(
    kept: Option<PinnedHostSlice<T>>,
    count: usize,
    flags: u32,
    device: &CudaDevice,
) -> Result<PinnedHostSlice<T>> {
    match kept {
        Some(kept) if kept.len() >= count => Ok(kept),
        _ => {
            let stream = device.cuda_stream();
            let count = count.next_power_of_two();
            // SAFETY: it is read only where it has been written to.
            unsafe { stream.context().alloc_pinned_with_flags(count, flags) }.w()
        }
    }
}

/// A copy of numbers on the device, `[numbers]`, on its way when this returns.
pub fn upload(numbers: &[u32], device: &CudaDevice) -> Result<Tensor> {
    let kept = SENT.take();
    let mut sent = page_locked(kept, numbers.len(), sys::CU_MEMHOSTALLOC_WRITECOMBINED, device)?;
    // Waits for the copy before to have left.
    sent.as_mut_slice().w()?[..numbers.len()].copy_from_slice(numbers);
    // All of the memory is copied: a batch more or less has as many.
    // SAFETY: only the numbers are read.
    let mut there = unsafe { device.alloc::<u32>(sent.len())? };
    device.memcpy_htod(&sent, &mut there)?;
    let length = sent.len();
    SENT.set(Some(sent));
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(there, device.clone()));
    Tensor::from_storage(storage, length, BackpropOp::none(), false).narrow(0, 0, numbers.len())
}

/// Numbers on their way from a device.
pub struct Download {
    /// `None` once they are taken.
    received: Option<PinnedHostSlice<f32>>,
    count: usize,
    done: CudaEvent,
}

impl Download {
    /// Of all of a tensor, in f32.
    pub fn start(x: &Tensor) -> Result<Self> {
        let (guard, layout) = x.storage_and_layout();
        let Storage::Cuda(storage) = &*guard else { candle_core::bail!("the rows are not on the GPU") };
        let (count, device) = (x.elem_count(), storage.device());
        let stream = device.cuda_stream();
        let from = address(storage, layout, &stream)?;
        let mut received = page_locked(RECEIVED.take(), count, 0, device)?;
        let to = &mut received.as_mut_slice().w()?[..count];
        stream.context().bind_to_thread().w()?;
        // SAFETY: the tensor has as many numbers, its memory is given back in the order of the stream, and
        // the host's is read in `finish` alone, when the copy is done.
        unsafe { result::memcpy_dtoh_async(to, from, stream.cu_stream()) }.w()?;
        // The thread sleeps: cores have texts to tokenise.
        match stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)) {
            Ok(done) => Ok(Self { received: Some(received), count, done }),
            Err(error) => {
                // The copy may be under way: the memory has to outlive it.
                let _ = stream.synchronize();
                Err(error).w()
            }
        }
    }

    /// Waits for what was queued before, and for nothing else.
    pub fn finish(mut self) -> Result<Vec<f32>> {
        self.done.synchronize().w()?;
        let Some(received) = self.received.take() else { return Ok(Vec::new()) };
        let numbers = received.as_slice().w()?[..self.count].to_vec();
        RECEIVED.set(Some(received));
        Ok(numbers)
    }
}

impl Drop for Download {
    /// The device may still write: page-locked memory that is freed under a copy is written to all the same.
    fn drop(&mut self) {
        if self.received.is_some() {
            let _ = self.done.synchronize();
        }
    }
}
