//! Where a model runs and in which precision.

use std::sync::{Mutex, MutexGuard};

use candle_core::{DType, Device};

use super::kernels::Precision;
use crate::settings::{DeviceChoice, Dtype};

/// A device and the precision of its weights.
#[derive(Debug, Clone)]
pub struct Placement {
    pub device: Device,
    /// Element type of tensors.
    pub dtype: DType,
    /// Precision of the matrix weights on a CPU, if not f32.
    pub precision: Option<Precision>,
    /// `cpu`, `cuda:0` or `metal`: the label in metrics and logs.
    pub name: String,
    /// Why `auto` chose this device; `None` if it was configured.
    pub reason: Option<String>,
}

/// Why a model cannot be placed as the settings ask.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    #[error("model.device: {0}")]
    Device(#[from] DeviceError),
    #[error("model.dtype: f16 needs a GPU; a CPU supports f32, bf16 and int8")]
    HalfOnCpu,
    #[error("model.dtype: int8 needs a CPU; {0} supports bf16, f16 and f32")]
    Int8OnGpu(String),
}

/// Why a device is not available.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("this build has no support for {name}: build kandle with --features {feature}")]
    NotBuilt { name: &'static str, feature: &'static str },
    #[error("{device} cannot be used: {message}")]
    Unusable { device: String, message: String },
}

impl Placement {
    /// # Errors
    /// The build or the machine lacks the device, or the device does not support the precision.
    pub fn choose(device: DeviceChoice, dtype: Dtype) -> Result<Self, PlacementError> {
        let (device, name, reason) = match device {
            DeviceChoice::Cpu => (Device::Cpu, "cpu".to_owned(), None),
            DeviceChoice::Cuda(n) => (cuda(n)?, format!("cuda:{n}"), None),
            DeviceChoice::Metal => (metal()?, "metal".to_owned(), None),
            DeviceChoice::Auto => auto(),
        };
        let (dtype, precision) = match (dtype, &device) {
            (Dtype::F32 | Dtype::Auto, Device::Cpu) => (DType::F32, None),
            (Dtype::Int8, Device::Cpu) => (DType::F32, Some(Precision::Int8)),
            (Dtype::Bf16, Device::Cpu) => (DType::F32, Some(Precision::Bf16)),
            (Dtype::F16, Device::Cpu) => return Err(PlacementError::HalfOnCpu),
            (Dtype::Int8, _) => return Err(PlacementError::Int8OnGpu(name)),
            (Dtype::F32, _) => (DType::F32, None),
            (Dtype::Bf16, _) | (Dtype::Auto, Device::Cuda(_)) => (DType::BF16, None),
            (Dtype::F16, _) | (Dtype::Auto, Device::Metal(_)) => (DType::F16, None),
        };
        Ok(Self { device, dtype, precision, name, reason })
    }

    pub fn is_cpu(&self) -> bool {
        self.device.is_cpu()
    }

    pub fn dtype_name(&self) -> &'static str {
        match self.precision {
            None => self.dtype.as_str(),
            Some(Precision::Int8) => "int8",
            Some(Precision::Bf16) => "bf16",
        }
    }

    /// Bytes that weights take on the device: so many elements of matrices that are quantized if `precision` is set, and
    /// so many others.
    pub fn weight_bytes(&self, quantized: usize, others: usize) -> u64 {
        let whole = self.dtype.size_in_bytes();
        (quantized * self.precision.map_or(whole, Precision::weight_bytes) + others * whole) as u64
    }
}

/// Bytes that can be allocated on a device, by its name as in [`Placement::name`]. `None`: it uses the host's memory, or
/// does not say.
pub fn free_device_memory(name: &str) -> Option<u64> {
    #[cfg(feature = "cuda")]
    {
        let ordinal = name.strip_prefix("cuda:")?.parse().ok()?;
        match super::kernels::cuda::free_memory(ordinal) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                tracing::warn!(
                    error = super::message(&error),
                    "the device does not say how much of its memory is free"
                );
                None
            }
        }
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = name;
        None
    }
}

/// Held while a batch is queued on a GPU, which has one queue: otherwise two batches would interleave and both finish late.
#[derive(Debug, Default)]
pub struct Queueing(Mutex<()>);

impl Queueing {
    /// Waits for the turn on a GPU. A CPU has no queue.
    pub fn turn(&self, device: &Device) -> Option<MutexGuard<'_, ()>> {
        (!device.is_cpu()).then(|| self.0.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

fn auto() -> (Device, String, Option<String>) {
    let attempts = [("cuda:0", cuda(0)), ("metal", metal())];
    let mut reasons = Vec::new();
    for (name, attempt) in attempts {
        match attempt {
            Ok(device) => {
                return (device, name.to_owned(), Some("the build and the machine have it".to_owned()));
            }
            Err(reason) => reasons.push(reason.to_string()),
        }
    }
    (Device::Cpu, "cpu".to_owned(), Some(reasons.join("; ")))
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> Result<Device, DeviceError> {
    super::kernels::cuda::open(ordinal).map_err(|e| DeviceError::Unusable {
        device: format!("CUDA device {ordinal}"),
        message: super::message(&e),
    })
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Device, DeviceError> {
    Err(DeviceError::NotBuilt { name: "CUDA", feature: "cuda" })
}

fn metal() -> Result<Device, DeviceError> {
    if !cfg!(feature = "metal") {
        return Err(DeviceError::NotBuilt { name: "Metal", feature: "metal" });
    }
    Device::new_metal(0).map_err(|e| DeviceError::Unusable {
        device: "the Metal device".to_owned(),
        message: super::message(&e),
    })
}
