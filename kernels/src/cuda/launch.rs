//! Launches the kernels of kernels.cu.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{LazyLock, RwLock};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaStream, DevicePtr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice, DeviceId, WrapErr};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor};

use super::{
    AttentionLaunch, activation_code, fits, gate_code, pieces, pooling_code, reduction_code, threads,
};
use crate::{Activation, Attention, Embedding, Gate, Norm, Packed, Pooling, Reduction, Rotation};

const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// The first layer's input, `[tokens, hidden]`: the sum of embedding rows, scaled and normalised where the model does so.
pub fn embed(embedding: &Embedding, batch: &Packed) -> Result<Tensor> {
    let Embedding { word, types, norm, .. } = embedding;
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
            types.as_ref(),
            norm.as_ref().map(|norm| &norm.weight),
            norm.as_ref().map(|norm| &norm.bias),
        ],
        &[
            Scalar::Float(embedding.rounded_scale()),
            Scalar::Float(norm.as_ref().map_or(0.0, |norm| norm.eps)),
            Scalar::Int(hidden as i32),
        ],
    )
}

/// x + added + residual, normalised; all but x are optional. `added` is `[hidden]`.
pub fn add_norm(
    x: &Tensor,
    added: Option<&Tensor>,
    residual: Option<&Tensor>,
    norm: Option<&Norm>,
) -> Result<Tensor> {
    if let Some(norm) = norm
        && !norm.is_layer()
    {
        return rms_norm(norm, x, added, residual, false);
    }
    let (tokens, hidden) = x.dims2()?;
    keep("add_norm", hidden, x)?;
    by_row(
        "add_norm",
        (tokens, hidden),
        x,
        &[Some(x), added, residual, norm.map(|norm| &norm.weight), norm.map(|norm| &norm.bias)],
        &[Scalar::Float(norm.map_or(0.0, |norm| norm.eps)), Scalar::Int(hidden as i32)],
    )
}

/// x + added, normalised, then + residual. `added`, `[hidden]`, is optional.
pub fn norm_add(norm: &Norm, x: &Tensor, added: Option<&Tensor>, residual: &Tensor) -> Result<Tensor> {
    match norm.is_layer() {
        // No architecture does this.
        true => add_norm(x, added, None, Some(norm))? + residual,
        false => rms_norm(norm, x, added, Some(residual), true),
    }
}

/// RMSNorm of x + added, with the residual added before or after it.
fn rms_norm(
    norm: &Norm,
    x: &Tensor,
    added: Option<&Tensor>,
    residual: Option<&Tensor>,
    after: bool,
) -> Result<Tensor> {
    let (tokens, hidden) = x.dims2()?;
    keep("rms_norm", hidden, x)?;
    by_row(
        "rms_norm",
        (tokens, hidden),
        x,
        &[Some(x), added, residual, Some(&norm.weight)],
        &[Scalar::Float(norm.eps), Scalar::Int(i32::from(after)), Scalar::Int(hidden as i32)],
    )
}

/// x + added, activated; both steps are optional. `added` is `[width]`.
pub fn add_activate(x: &Tensor, added: Option<&Tensor>, activation: Option<Activation>) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    by_row(
        "add_activate",
        (tokens, width),
        x,
        &[Some(x), added],
        &[Scalar::Int(activation_code(activation)), Scalar::Int(width as i32)],
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
            Scalar::Int(activation_code(Some(activation))),
            Scalar::Int(gate_code(gate)),
            Scalar::Int(width as i32),
        ],
    )
}

/// `[tokens, hidden]` to `[sequences, hidden]`.
pub fn pool(x: &Tensor, batch: &Packed, pooling: Pooling) -> Result<Tensor> {
    let (sequences, hidden) = (batch.order().len(), x.dim(1)?);
    let indices = batch.on(x.device())?;
    by_row(
        "pool",
        (sequences, hidden),
        x,
        &[Some(x), Some(&indices.starts), indices.skipped.as_ref()],
        &[Scalar::Int(pooling_code(pooling)), Scalar::Int(hidden as i32)],
    )
}

/// Reduces the logits of some tokens of the token axis, `[tokens, columns]`, to the rows of their sequences, of all
/// `[sequences, columns]` in f32. The tokens before them have been reduced.
pub fn reduce(
    rows: &Tensor,
    reduction: Reduction,
    logits: &Tensor,
    tokens: Range<usize>,
    batch: &Packed,
) -> Result<()> {
    let columns = logits.dim(1)?;
    // The sequences that have one of the tokens.
    let (mut end, mut places) = (0, None);
    for (place, length) in batch.lengths().enumerate() {
        let start = end;
        end += length;
        if start < tokens.end && end > tokens.start {
            places = Some((places.map_or(place, |(first, _)| first), place + 1));
        }
    }
    let Some((first, end)) = places else { return Ok(()) };
    let threads = threads(logits.dtype().size_in_bytes(), columns).min(256);
    let blocks = pieces(logits.dtype().size_in_bytes(), columns).div_ceil(threads as usize);
    rows.inplace_op1(&Kernel {
        name: "reduce",
        elements: logits.dtype(),
        grid: (blocks, end - first, 1),
        block: threads,
        tensors: &[Some(logits), Some(&batch.on(logits.device())?.starts)],
        numbers: &[
            Scalar::Int(tokens.start as i32),
            Scalar::Int(tokens.len() as i32),
            Scalar::Int(first as i32),
            Scalar::Int(reduction_code(reduction)),
            Scalar::Int(columns as i32),
        ],
    })
}

/// `[tokens, (heads + 2 × keys) × width]` with its bias, one row, to `[tokens, heads × width]`. Normalises and rotates
/// queries and keys in place. `None`, with `qkv` unchanged, if there is no kernel for the width of a head.
pub fn attend(
    attention: &Attention,
    qkv: &Tensor,
    bias: Option<&Tensor>,
    rotation: Option<&Rotation>,
    batch: &Packed,
) -> Result<Option<Tensor>> {
    let Attention { heads, keys, width, scale, mask, ref norms, ref distances, ref disentangled, .. } =
        *attention;
    let longest = batch.lengths().max().unwrap_or(0);
    let launch = AttentionLaunch::new(longest, width, qkv.dtype() != DType::F32);
    // No architecture has DeBERTa's terms together with what decoders do, or with another bias.
    let alone = keys == heads && norms.is_none() && rotation.is_none() && distances.is_none();
    let name = match (disentangled, width, launch.short) {
        (None, 32, false) => "attend_32",
        (None, 32, true) => "attend_short_32",
        (None, 64, false) => "attend_64",
        (None, 64, true) => "attend_short_64",
        (None, 128, _) => "attend_128",
        (None, 256, _) => "attend_256",
        (Some(_), 32, _) if alone => "attend_apart_32",
        (Some(_), 64, _) if alone => "attend_apart_64",
        _ => return Ok(None),
    };
    let (before, after) = mask.bounds(longest);
    let (tokens, stride) = (batch.tokens(), (heads + 2 * keys) * width);
    let indices = batch.on(qkv.device())?;
    let elements = qkv.dtype();
    let int = |n: usize| Scalar::Int(n as i32);
    let part = |first: usize, count: usize| {
        bias.map(|bias| bias.narrow(0, first * width, count * width)).transpose()
    };
    let (mut of_queries, of_values) = (part(0, heads)?, part(heads + keys, keys)?);
    if let Some([query_norm, key_norm]) = norms {
        qkv.inplace_op1(&Kernel {
            name: "norm_heads",
            elements,
            grid: (tokens, 1, 1),
            // A warp for each head.
            block: (32 * (heads + keys)).min(512) as u32,
            tensors: &[
                bias,
                Some(&query_norm.weight),
                Some(&key_norm.weight),
                Some(&indices.positions),
                rotation.map(|rotation| &rotation.cos),
                rotation.map(|rotation| &rotation.sin),
            ],
            numbers: &[int(heads), int(heads + keys), int(stride), Scalar::Float(query_norm.eps), int(width)],
        })?;
        of_queries = None;
    } else if let Some(rotation) = rotation {
        qkv.inplace_op1(&Kernel {
            name: "rotate",
            elements,
            grid: (tokens, 1, 1),
            block: threads(size_of::<f32>(), heads * width),
            tensors: &[bias, Some(&indices.positions), Some(&rotation.cos), Some(&rotation.sin)],
            numbers: &[int(heads + keys), int(stride), int(width)],
        })?;
        of_queries = None;
    }
    let out = empty(tokens, heads * width, qkv)?;
    let (grid, block) = ((batch.order().len() * launch.blocks, heads, 1), launch.threads);
    if let Some(terms) = disentangled {
        let Some(tables) = terms.on_gpu() else { return Ok(None) };
        // Unlike elsewhere, a bias of keys matters: it is multiplied with the queries of distances.
        let qkv = match bias {
            Some(_) => &add_activate(qkv, bias, None)?,
            None => qkv,
        };
        out.inplace_op1(&Kernel {
            name,
            elements,
            grid,
            block,
            tensors: &[Some(qkv), Some(&indices.starts), tables.keys, tables.queries, Some(tables.rows)],
            numbers: &[
                int(launch.blocks),
                int(heads),
                int(before),
                int(after),
                int(tables.longest),
                int(tables.span),
                Scalar::Float(scale),
            ],
        })?;
        return Ok(Some(out));
    }
    out.inplace_op1(&Kernel {
        name,
        elements,
        grid,
        block,
        tensors: &[
            Some(qkv),
            of_queries.as_ref(),
            of_values.as_ref(),
            Some(&indices.starts),
            distances.as_ref().map(|bias| &bias.table),
        ],
        numbers: &[
            int(launch.blocks),
            int(heads),
            int(keys),
            int(before),
            int(after),
            int(distances.as_ref().map_or(0, |bias| bias.span)),
            Scalar::Float(scale),
        ],
    })?;
    Ok(Some(out))
}

/// Runs a kernel with one block per row of its result, `[rows, width]`, which has `like`'s type and device.
fn by_row(
    name: &'static str,
    (rows, width): (usize, usize),
    like: &Tensor,
    tensors: &[Option<&Tensor>],
    numbers: &[Scalar],
) -> Result<Tensor> {
    let out = empty(rows, width, like)?;
    let (grid, block) = ((rows, 1, 1), threads(like.dtype().size_in_bytes(), width));
    out.inplace_op1(&Kernel { name, elements: like.dtype(), grid, block, tensors, numbers })?;
    Ok(out)
}

/// Fails if rows are too wide for a block to keep every element in a register.
fn keep(name: &str, width: usize, like: &Tensor) -> Result<()> {
    if !fits(like.dtype().size_in_bytes(), width) {
        candle_core::bail!("{name}: rows of {width} elements are too wide for a block of the GPU");
    }
    Ok(())
}

/// An uninitialised tensor, `[rows, width]`, of `like`'s type and device.
fn empty(rows: usize, width: usize, like: &Tensor) -> Result<Tensor> {
    // SAFETY: every kernel writes all of its result.
    unsafe { Tensor::empty((rows, width), like.dtype(), like.device()) }
}

#[derive(Debug, Clone, Copy)]
enum Scalar {
    Int(i32),
    Float(f32),
}

/// A launch. Its arguments are the result's address, the tensors' addresses (0 if absent), then `numbers`.
struct Kernel<'a> {
    /// Name of the kernel, without the suffix for the type of the elements.
    name: &'static str,
    /// Their type.
    elements: DType,
    grid: (usize, usize, usize),
    block: u32,
    tensors: &'a [Option<&'a Tensor>],
    numbers: &'a [Scalar],
}

impl InplaceOp1 for Kernel<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        candle_core::bail!("{} is a GPU kernel, but its result is on the CPU", self.name)
    }

    fn cuda_fwd(&self, out: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let device = out.device().clone();
        let stream = device.cuda_stream();
        let function = function(self.name, self.elements, &device)?;
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
                Scalar::Int(n) => launch.arg(n),
                Scalar::Float(x) => launch.arg(x),
            };
        }
        let (x, y, z) = self.grid;
        let config = LaunchConfig {
            grid_dim: (x as u32, y as u32, z as u32),
            block_dim: (self.block, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the operations above pass the arguments that the kernel declares, with tensors of the shapes that
        // it expects; memory is freed in stream order.
        unsafe { launch.launch(config) }.w()?;
        Ok(())
    }
}

/// The kernel for a type of elements, looked up in the driver once per device.
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
        other => candle_core::bail!("{name}: no kernel for elements of type {}", other.as_str()),
    };
    let function =
        device.get_or_load_custom_func(&format!("{name}_{ending}"), "kandle", PTX)?.into_cuda_function();
    FUNCTIONS.write().unwrap_or_else(|e| e.into_inner()).insert(key, function.clone());
    Ok(function)
}

/// Device address of a contiguous tensor.
pub(super) fn address(storage: &CudaStorage, layout: &Layout, stream: &CudaStream) -> Result<u64> {
    let Some((start, _)) = layout.contiguous_offsets() else {
        candle_core::bail!("the tensor is not contiguous: {layout:?}")
    };
    let (first, size) = match &storage.slice {
        CudaStorageSlice::F32(slice) => (slice.device_ptr(stream).0, 4),
        CudaStorageSlice::U32(slice) => (slice.device_ptr(stream).0, 4),
        CudaStorageSlice::F16(slice) => (slice.device_ptr(stream).0, 2),
        CudaStorageSlice::BF16(slice) => (slice.device_ptr(stream).0, 2),
        _ => candle_core::bail!("no kernel for elements of type {}", storage.dtype().as_str()),
    };
    Ok(first + (size * start) as u64)
}
