//! A device's single stream, and asynchronous copies on it.

use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::{self, CUevent_flags, CUmemPool_attribute};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DeviceRepr, PinnedHostSlice, ValidAsZeroBits, result,
};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{Device, Result, Storage, Tensor};

use super::launch::address;

/// Opens a device with a single stream: work runs in the order in which it was queued, by any thread. (By default
/// Candle gives each thread a stream and does not synchronize them: one thread could read weights that another is
/// still copying, and all of them share cuBLAS's workspace.)
pub fn open(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: with a single stream no events are needed to keep the order.
    unsafe { cuda.disable_event_tracking() };
    Ok(device)
}

/// Makes the driver's memory pool keep what batches free, for the next batches: by default the pool releases it
/// whenever the host synchronizes, and maps it again. Dropping this releases the memory.
pub struct MemoryPool {
    stream: Arc<CudaStream>,
    pool: sys::CUmemoryPool,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for MemoryPool {}
// SAFETY: as above.
unsafe impl Sync for MemoryPool {}

impl MemoryPool {
    /// `None` if the device has no memory pool.
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

impl Drop for MemoryPool {
    fn drop(&mut self) {
        let trimmed = self.stream.synchronize().and_then(|()| {
            // SAFETY: a device's default pool always exists.
            unsafe { sys::cuMemPoolTrimTo(self.pool, 0) }.result()
        });
        if let Err(error) = trimmed {
            tracing::warn!(%error, "cannot release the GPU memory pool");
        }
    }
}

/// Bytes that can be allocated on a device: what is free, and what its memory pool keeps but nothing uses.
pub fn free_memory(ordinal: usize) -> Result<u64> {
    // The device's primary context, which Candle uses too.
    let context = CudaContext::new(ordinal).w()?;
    let (free, _) = context.mem_get_info().w()?;
    if !context.has_async_alloc() {
        return Ok(free as u64);
    }
    let mut pool = std::ptr::null_mut();
    let (mut reserved, mut used) = (0u64, 0u64);
    // SAFETY: the device exists, and these attributes are u64s.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()).result().w()?;
        for (attribute, bytes) in [
            (CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, &mut reserved),
            (CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT, &mut used),
        ] {
            let bytes: *mut u64 = bytes;
            sys::cuMemPoolGetAttribute(pool, attribute, bytes.cast::<c_void>()).result().w()?;
        }
    }
    Ok(free as u64 + reserved.saturating_sub(used))
}

thread_local! {
    static SENT: RefCell<Option<PinnedHostSlice<u32>>> = const { RefCell::new(None) };
    static RECEIVED: RefCell<Option<PinnedHostSlice<f32>>> = const { RefCell::new(None) };
}

/// Page-locked memory for at least `count` elements: `kept` if it is large enough, else a new allocation.
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
            // SAFETY: only the part that has been written to is read.
            unsafe { stream.context().alloc_pinned_with_flags(count, flags) }.w()
        }
    }
}

/// Starts to copy `numbers` to the device, as a tensor of shape `[numbers.len()]`, and does not wait for the copy.
pub fn upload(numbers: &[u32], device: &CudaDevice) -> Result<Tensor> {
    let kept = SENT.take();
    let mut sent = page_locked(kept, numbers.len(), sys::CU_MEMHOSTALLOC_WRITECOMBINED, device)?;
    // `as_mut_slice` waits until the previous copy from this memory is done.
    sent.as_mut_slice().w()?[..numbers.len()].copy_from_slice(numbers);
    // The whole buffer is copied, because a batch fills most of it.
    // SAFETY: only the elements written above are read.
    let mut there = unsafe { device.alloc::<u32>(sent.len())? };
    device.memcpy_htod(&sent, &mut there)?;
    let length = sent.len();
    SENT.set(Some(sent));
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(there, device.clone()));
    Tensor::from_storage(storage, length, BackpropOp::none(), false).narrow(0, 0, numbers.len())
}

/// A copy from a device to the host, in flight.
pub struct Download {
    /// Memory that the copy writes to; `None` once `finish` has taken it.
    received: Option<PinnedHostSlice<f32>>,
    count: usize,
    done: CudaEvent,
}

impl Download {
    /// Starts to copy all of a contiguous f32 tensor.
    pub fn start(x: &Tensor) -> Result<Self> {
        let (guard, layout) = x.storage_and_layout();
        let Storage::Cuda(storage) = &*guard else { candle_core::bail!("the results are not on the GPU") };
        let (count, device) = (x.elem_count(), storage.device());
        let stream = device.cuda_stream();
        let from = address(storage, layout, &stream)?;
        let mut received = page_locked(RECEIVED.take(), count, 0, device)?;
        let to = &mut received.as_mut_slice().w()?[..count];
        stream.context().bind_to_thread().w()?;
        // SAFETY: the tensor has this many elements, its memory is freed in stream order, and the host's memory is
        // read only by `finish`, after the copy.
        unsafe { result::memcpy_dtoh_async(to, from, stream.cu_stream()) }.w()?;
        // A blocking event lets the waiting thread sleep, so that its core can tokenise.
        match stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)) {
            Ok(done) => Ok(Self { received: Some(received), count, done }),
            Err(error) => {
                // The copy may be in flight: the memory must outlive it.
                let _ = stream.synchronize();
                Err(error).w()
            }
        }
    }

    /// Waits for the copy and what was queued before it, then returns the elements.
    pub fn finish(mut self) -> Result<Vec<f32>> {
        self.done.synchronize().w()?;
        let Some(received) = self.received.take() else { return Ok(Vec::new()) };
        let numbers = received.as_slice().w()?[..self.count].to_vec();
        RECEIVED.set(Some(received));
        Ok(numbers)
    }
}

impl Drop for Download {
    /// Waits for the copy: the device would still write to page-locked memory that has been freed.
    fn drop(&mut self) {
        if self.received.is_some() {
            let _ = self.done.synchronize();
        }
    }
}
