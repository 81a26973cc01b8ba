//! From and to the device that a batch runs on.

use candle_core::{Device, Result, Tensor};

/// A copy of numbers on a device, `[numbers]`.
pub fn upload(numbers: &[u32], device: &Device) -> Result<Tensor> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::upload(numbers, device),
        _ => Tensor::from_slice(numbers, numbers.len(), device),
    }
}

/// A batch's results, or what will be.
pub enum Rows {
    Here(Vec<f32>),
    #[cfg(feature = "cuda")]
    Coming(super::cuda::Download),
}

impl Rows {
    /// Of `[sequences, width]` in f32. On a GPU nothing is waited for.
    pub fn of(x: &Tensor) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::Download::start(&x.contiguous()?).map(Rows::Coming);
        }
        x.flatten_all()?.to_vec1().map(Rows::Here)
    }

    /// Row after row, when they are there.
    pub fn finish(self) -> Result<Vec<f32>> {
        match self {
            Rows::Here(numbers) => Ok(numbers),
            #[cfg(feature = "cuda")]
            Rows::Coming(download) => download.finish(),
        }
    }
}
