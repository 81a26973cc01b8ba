//! Copies to and from the device that a batch runs on, and the memory that it keeps.

use candle_core::{Device, Result, Tensor};

/// Copies `numbers` to a device, as a tensor of shape `[numbers.len()]`.
pub fn upload(numbers: &[u32], device: &Device) -> Result<Tensor> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::upload(numbers, device),
        _ => Tensor::from_slice(numbers, numbers.len(), device),
    }
}

/// Memory that a CUDA GPU keeps when a batch frees it, for the next batches, until this is dropped. A model has one, as its
/// last field: it is dropped after the tensors. Other devices keep none.
pub struct KeptMemory {
    #[cfg(feature = "cuda")]
    _pool: Option<super::cuda::MemoryPool>,
}

impl KeptMemory {
    /// # Errors
    /// The driver fails.
    pub fn on(device: &Device) -> Result<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self { _pool: super::cuda::MemoryPool::on(device)? }),
            _ => Ok(Self {
                #[cfg(feature = "cuda")]
                _pool: None,
            }),
        }
    }
}

/// A batch's results on the host, or their copy from the device in flight.
pub enum Transfer {
    Done(Vec<f32>),
    #[cfg(feature = "cuda")]
    Pending(super::cuda::Download),
}

impl Transfer {
    /// Copies `x`, `[rows, width]` in f32, to the host. On a CUDA GPU it starts the copy and does not wait.
    pub fn start(x: &Tensor) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::Download::start(&x.contiguous()?).map(Transfer::Pending);
        }
        x.flatten_all()?.to_vec1().map(Transfer::Done)
    }

    /// Waits for the copy and returns the elements, row after row.
    pub fn finish(self) -> Result<Vec<f32>> {
        match self {
            Transfer::Done(numbers) => Ok(numbers),
            #[cfg(feature = "cuda")]
            Transfer::Pending(download) => download.finish(),
        }
    }
}
