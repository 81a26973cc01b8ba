//! Where a model runs and in which precision.

use candle_core::{DType, Device};

use crate::settings::{DeviceChoice, Dtype};

/// A device and the precision of its weights.
#[derive(Debug, Clone)]
pub struct Placement {
    pub device: Device,
    pub dtype: DType,
    /// `cpu`, `cuda:0` or `metal`: the label in metrics and logs.
    pub name: String,
    /// Why this device, where `auto` chose it.
    pub reason: Option<String>,
}

impl Placement {
    /// The error names the feature or the device that is missing.
    pub fn choose(device: DeviceChoice, dtype: Dtype) -> Result<Self, String> {
        let (device, name, reason) = match device {
            DeviceChoice::Cpu => (Device::Cpu, "cpu".to_owned(), None),
            DeviceChoice::Cuda(n) => (cuda(n)?, format!("cuda:{n}"), None),
            DeviceChoice::Metal => (metal()?, "metal".to_owned(), None),
            DeviceChoice::Auto => auto(),
        };
        let dtype = match (dtype, &device) {
            (Dtype::F32, _) | (Dtype::Auto, Device::Cpu) => DType::F32,
            (Dtype::Bf16, _) | (Dtype::Auto, Device::Cuda(_)) => DType::BF16,
            (Dtype::F16, _) | (Dtype::Auto, Device::Metal(_)) => DType::F16,
        };
        Ok(Self { device, dtype, name, reason })
    }

    pub fn is_cpu(&self) -> bool {
        self.device.is_cpu()
    }

    pub fn dtype_name(&self) -> &'static str {
        self.dtype.as_str()
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
            Err(reason) => reasons.push(reason),
        }
    }
    (Device::Cpu, "cpu".to_owned(), Some(reasons.join("; ")))
}

fn cuda(ordinal: usize) -> Result<Device, String> {
    if !cfg!(feature = "cuda") {
        return Err("this build has no CUDA: build kandle with --features cuda".to_owned());
    }
    Device::new_cuda(ordinal)
        .map_err(|e| format!("CUDA device {ordinal} cannot be used: {}", super::message(&e)))
}

fn metal() -> Result<Device, String> {
    if !cfg!(feature = "metal") {
        return Err("this build has no Metal: build kandle with --features metal".to_owned());
    }
    Device::new_metal(0).map_err(|e| format!("the Metal device cannot be used: {}", super::message(&e)))
}
