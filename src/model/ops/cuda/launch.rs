//! Launching the kernels.

use std::collections::HashMap;
use std::sync::{LazyLock, RwLock};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaStream, DevicePtr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice, DeviceId, WrapErr};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor};

use super::{AttentionLaunch, fits, number_of, number_of_gate, number_of_pooling, threads};
use crate::model::encoder::Packed;
use crate::model::ops::{Activation, Attention, Embedding, Gate, Norm, Pooling, Rotation};

const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));
/// `[tokens, hidden]`.
pub fn embed(embedding: &Embedding, batch: &Packed) -> Result<Tensor> {
    let (word, norm) = (&embedding.word, &embedding.norm);
    let (tokens, hidden) = (batch.tokens(), word.dim(1)?);
    let indices = batch.on(word.device())?;
    let positions = embedding.position_table()?;
    keep("embed", hidden, word)?;
    by_row(
        "embed",
        (tokens, hidden),
        word,
        &[
            Some(&indices.ids),
            Some(&indices.positions),
            indices.types.as_ref(),
            Some(word),
            positions.as_ref(),
            embedding.types.as_ref(),
            Some(&norm.weight),
            Some(&norm.bias),
        ],
        &[Number::Real(norm.eps), Number::Whole(hidden as i32)],
    )
}

/// x + added + residual, normalised, each where it is given; `added` is `[hidden]`.
pub fn add_norm(
    x: &Tensor,
    added: Option<&Tensor>,
    residual: Option<&Tensor>,
    norm: Option<&Norm>,
) -> Result<Tensor> {
    let (tokens, hidden) = x.dims2()?;
    keep("add_norm", hidden, x)?;
    by_row(
        "add_norm",
        (tokens, hidden),
        x,
        &[Some(x), added, residual, norm.map(|norm| &norm.weight), norm.map(|norm| &norm.bias)],
        &[Number::Real(norm.map_or(0.0, |norm| norm.eps)), Number::Whole(hidden as i32)],
    )
}

/// x + added, activated.
pub fn add_activate(x: &Tensor, added: Option<&Tensor>, activation: Option<Activation>) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    by_row(
        "add_activate",
        (tokens, width),
        x,
        &[Some(x), added],
        &[Number::Whole(number_of(activation)), Number::Whole(width as i32)],
    )
}

/// `[tokens, 2 × width]` to `[tokens, width]`.
pub fn gated(x: &Tensor, activation: Activation, gate: Gate) -> Result<Tensor> {
    let (tokens, twice) = x.dims2()?;
    let width = twice / 2;
    by_row(
        "gated",
        (tokens, width),
        x,
        &[Some(x), None],
        &[
            Number::Whole(number_of(Some(activation))),
            Number::Whole(number_of_gate(gate)),
            Number::Whole(width as i32),
        ],
    )
}

/// `[tokens, hidden]` to `[sequences, hidden]`.
pub fn pool(x: &Tensor, batch: &Packed, pooling: Pooling) -> Result<Tensor> {
    let (sequences, hidden) = (batch.order().len(), x.dim(1)?);
    by_row(
        "pool",
        (sequences, hidden),
        x,
        &[Some(x), Some(&batch.on(x.device())?.starts)],
        &[Number::Whole(number_of_pooling(pooling)), Number::Whole(hidden as i32)],
    )
}

/// `[tokens, 3 × hidden]` with its bias, `[3 × hidden]`, to `[tokens, hidden]`; queries and keys are rotated in
/// place. `None` for widths of a head that no kernel is made for, before anything is done.
pub fn attend(
    attention: &Attention,
    qkv: &Tensor,
    bias: Option<&Tensor>,
    rotation: Option<&Rotation>,
    batch: &Packed,
) -> Result<Option<Tensor>> {
    let Attention { heads, width, reach } = *attention;
    let longest = batch.lengths().max().unwrap_or(0);
    let launch = AttentionLaunch::new(longest, qkv.dtype() != DType::F32);
    let name = match (width, launch.short) {
        (32, false) => "attend_32",
        (32, true) => "attend_short_32",
        (64, false) => "attend_64",
        (64, true) => "attend_short_64",
        _ => return Ok(None),
    };
    let (tokens, hidden) = (batch.tokens(), heads * width);
    let indices = batch.on(qkv.device())?;
    let part = |index| bias.map(|bias| bias.narrow(0, index * hidden, hidden)).transpose();
    let (mut of_queries, of_values) = (part(0)?, part(2)?);
    if let Some(rotation) = rotation {
        qkv.inplace_op1(&Kernel {
            name: "rotate",
            grid: (tokens, 1, 1),
            block: threads(size_of::<f32>(), hidden),
            tensors: &[bias, Some(&indices.positions), Some(&rotation.cos), Some(&rotation.sin)],
            numbers: &[Number::Whole(heads as i32), Number::Whole(width as i32)],
        })?;
        of_queries = None;
    }
    let out = empty(tokens, hidden, qkv)?;
    out.inplace_op1(&Kernel {
        name,
        grid: (batch.order().len() * launch.blocks, heads, 1),
        block: launch.threads,
        tensors: &[Some(qkv), of_queries.as_ref(), of_values.as_ref(), Some(&indices.starts)],
        numbers: &[launch.blocks, heads, reach.unwrap_or(longest)].map(|n| Number::Whole(n as i32)),
    })?;
    Ok(Some(out))
}

/// A kernel with a block for each row of its result, `[rows, width]`, which stands where `like` does.
fn by_row(
    name: &'static str,
    (rows, width): (usize, usize),
    like: &Tensor,
    tensors: &[Option<&Tensor>],
    numbers: &[Number],
) -> Result<Tensor> {
    let out = empty(rows, width, like)?;
    let (grid, block) = ((rows, 1, 1), threads(like.dtype().size_in_bytes(), width));
    out.inplace_op1(&Kernel { name, grid, block, tensors, numbers })?;
    Ok(out)
}

/// Refuses rows of which a block cannot keep each number in a register.
fn keep(name: &str, width: usize, like: &Tensor) -> Result<()> {
    if !fits(like.dtype().size_in_bytes(), width) {
        candle_core::bail!("{name}: rows of {width} numbers are longer than a block of the GPU");
    }
    Ok(())
}

/// Memory for `[rows, width]` where `like` is, with anything in it.
fn empty(rows: usize, width: usize, like: &Tensor) -> Result<Tensor> {
    // SAFETY: every kernel writes all of its result.
    unsafe { Tensor::empty((rows, width), like.dtype(), like.device()) }
}

#[derive(Debug, Clone, Copy)]
enum Number {
    Whole(i32),
    Real(f32),
}

/// A launch: the result's address, then the tensors' (0 for one that is absent), then the numbers.
struct Kernel<'a> {
    /// Without the ending that tells the numbers' type.
    name: &'static str,
    grid: (usize, usize, usize),
    block: u32,
    tensors: &'a [Option<&'a Tensor>],
    numbers: &'a [Number],
}

impl InplaceOp1 for Kernel<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        candle_core::bail!("{} is a kernel for GPUs", self.name)
    }

    fn cuda_fwd(&self, out: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let device = out.device().clone();
        let stream = device.cuda_stream();
        let function = function(self.name, out.dtype(), &device)?;
        let mut addresses = vec![address(out, layout, &stream)?];
        for tensor in self.tensors {
            addresses.push(match tensor {
                None => 0,
                Some(tensor) => {
                    let (guard, layout) = tensor.storage_and_layout();
                    match &*guard {
                        Storage::Cuda(storage) => address(storage, layout, &stream)?,
                        _ => candle_core::bail!("{}: a tensor is not on the GPU", self.name),
                    }
                }
            });
        }
        let mut launch = stream.launch_builder(&function);
        for address in &addresses {
            launch.arg(address);
        }
        for number in self.numbers {
            match number {
                Number::Whole(n) => launch.arg(n),
                Number::Real(x) => launch.arg(x),
            };
        }
        let (x, y, z) = self.grid;
        let config = LaunchConfig {
            grid_dim: (x as u32, y as u32, z as u32),
            block_dim: (self.block, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the arguments are the kernel's, and tensors are as long as their shapes say, which the
        // operations have seen to; memory is given back in the order of the stream.
        unsafe { launch.launch(config) }.w()?;
        Ok(())
    }
}

/// A kernel for a type of elements, looked up in the driver once for each device.
fn function(name: &'static str, dtype: DType, device: &CudaDevice) -> Result<CudaFunction> {
    type Functions = HashMap<(DeviceId, &'static str, DType), CudaFunction>;
    static FUNCTIONS: LazyLock<RwLock<Functions>> = LazyLock::new(RwLock::default);
    let key = (device.id(), name, dtype);
    if let Some(function) = FUNCTIONS.read().unwrap_or_else(|e| e.into_inner()).get(&key) {
        return Ok(function.clone());
    }
    let ending = match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        other => candle_core::bail!("{name}: not for {}", other.as_str()),
    };
    let function =
        device.get_or_load_custom_func(&format!("{name}_{ending}"), "kandle", PTX)?.into_cuda_function();
    FUNCTIONS.write().unwrap_or_else(|e| e.into_inner()).insert(key, function.clone());
    Ok(function)
}

/// Where a contiguous tensor begins.
pub(super) fn address(storage: &CudaStorage, layout: &Layout, stream: &CudaStream) -> Result<u64> {
    let Some((start, _)) = layout.contiguous_offsets() else {
        candle_core::bail!("not contiguous: {layout:?}")
    };
    let (first, size) = match &storage.slice {
        CudaStorageSlice::F32(slice) => (slice.device_ptr(stream).0, 4),
        CudaStorageSlice::U32(slice) => (slice.device_ptr(stream).0, 4),
        CudaStorageSlice::F16(slice) => (slice.device_ptr(stream).0, 2),
        CudaStorageSlice::BF16(slice) => (slice.device_ptr(stream).0, 2),
        _ => candle_core::bail!("not for {}", storage.dtype().as_str()),
    };
    Ok(first + (size * start) as u64)
}
