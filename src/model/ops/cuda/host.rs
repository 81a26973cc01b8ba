//! The kernels on a CPU (host.h), held to what Candle's own operations give.

use std::ffi::{CStr, CString, c_void};
use std::ptr::null;
use std::sync::{Mutex, OnceLock};

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

use super::super::activation::gated;
use super::super::matmul::tests::numbers as chance;
use super::super::{Attention, Embedding, Norm, Out, Rotation, host};
use super::*;
use crate::model::architecture::Rope;
use crate::model::encoder::Packed;
use crate::model::ops::attention::tests::batch;

const CPU: Device = Device::Cpu;
/// No memory of the CPU's: what is asked for is made of Candle's operations.
const CANDLE: Out<'_> = Out(None);

/// host.cpp, compiled by the C++ compiler that librdkafka needs anyway; a function of it.
fn function(name: &CStr) -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    let library = *LIBRARY.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let library = directory.path().join("kernels.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/model/ops/cuda/host.cpp");
        let mut compiler = std::process::Command::new(std::env::var("CXX").unwrap_or("c++".to_owned()));
        compiler.args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]);
        assert!(compiler.arg(&library).arg(source).status().expect("a compiler").success());
        let path = CString::new(library.display().to_string()).expect("no zeros");
        // SAFETY: the library has no constructors but those of empty vectors.
        unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) as usize }
    });
    assert_ne!(library, 0, "the library loads");
    // SAFETY: the handle is one.
    let function = unsafe { libc::dlsym(library as *mut c_void, name.as_ptr()) };
    assert!(!function.is_null(), "{name:?}");
    function
}

/// There is one device.
static DEVICE: Mutex<()> = Mutex::new(());

/// Calls a function of host.cpp with what it takes, one at a time.
macro_rules! call {
    ($name:literal, $($value:expr => $type:ty),*) => {{
        let function = function($name);
        let _one = DEVICE.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: the types are those that host.cpp has.
        unsafe {
            let function: unsafe extern "C" fn($($type),*) = std::mem::transmute(function);
            function($($value),*)
        }
    }};
}

fn tensor(rows: usize, width: usize, seed: u32) -> Tensor {
    Tensor::from_vec(chance(rows * width, seed), (rows, width), &CPU).unwrap()
}

fn norm(width: usize) -> Norm {
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &CPU);
    vb.get_with_hints(width, "weight", candle_nn::Init::Uniform { lo: 0.5, up: 1.5 }).unwrap();
    vb.get_with_hints(width, "bias", candle_nn::Init::Uniform { lo: -0.5, up: 0.5 }).unwrap();
    Norm::load(width, true, 1e-5, vb).unwrap()
}

#[track_caller]
fn near(got: &[f32], want: &Tensor) {
    let want = host(want).unwrap();
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!((got - want).abs() < 1e-5, "[{i}]: {got}, not {want}");
    }
}

/// Where each sequence begins, and the position of every token within its own.
fn places(batch: &Packed) -> (Vec<u32>, Vec<u32>) {
    let indices = batch.on(&CPU).unwrap();
    (indices.starts.to_vec1().unwrap(), indices.positions.to_vec1().unwrap())
}

const WIDTHS: [usize; 4] = [7, 32, 96, 384];

#[test]
fn embeddings() {
    let packed = batch(&[1, 2, 17, 33]);
    let (_, positions) = places(&packed);
    for width in WIDTHS {
        let norm = norm(width);
        let (weight, bias, eps) = (host(&norm.weight).unwrap(), host(&norm.bias).unwrap(), norm.eps);
        let word = tensor(90, width, 1);
        let (position, types) = (tensor(35, width, 2), tensor(2, width, 3));
        let mut embedding =
            Embedding { word: word.clone(), positions: Some((position, 2)), types: Some(types), norm };
        for tables in [true, false] {
            if !tables {
                (embedding.positions, embedding.types) = (None, None);
            }
            let table = |table: Option<&Tensor>| table.map(|table| host(table).unwrap());
            let word = host(&word).unwrap();
            let position = table(embedding.position_table().unwrap().as_ref());
            let types = table(embedding.types.as_ref());
            let mut out = vec![f32::NAN; packed.tokens() * width];
            call!(c"host_embed",
                packed.tokens() as u32 => u32, threads(width) => u32, out.as_mut_ptr() => *mut f32,
                packed.ids().as_ptr() => *const u32, positions.as_ptr() => *const u32,
                packed.type_ids().map_or(null(), <[u32]>::as_ptr) => *const u32, word.as_ptr() => *const f32,
                position.as_ref().map_or(null(), |table| table.as_ptr()) => *const f32,
                types.as_ref().map_or(null(), |table| table.as_ptr()) => *const f32,
                weight.as_ptr() => *const f32, bias.as_ptr() => *const f32, eps => f32, width as i32 => i32
            );
            near(&out, &embedding.tensors(&packed, &CPU).unwrap());
        }
    }
}

#[test]
fn sums_and_norms() {
    for width in WIDTHS {
        let tokens = 5;
        let (x, residual, norm) = (tensor(tokens, width, 1), tensor(tokens, width, 2), norm(width));
        let added = tensor(1, width, 3);
        let (weight, bias) = (host(&norm.weight).unwrap(), host(&norm.bias).unwrap());
        let sum = ((&x + &residual).unwrap().broadcast_add(&added)).unwrap();
        for normed in [true, false] {
            let mut out = vec![f32::NAN; tokens * width];
            call!(c"host_add_norm",
                tokens as u32 => u32, threads(width) => u32, out.as_mut_ptr() => *mut f32,
                host(&x).unwrap().as_ptr() => *const f32, host(&added).unwrap().as_ptr() => *const f32,
                host(&residual).unwrap().as_ptr() => *const f32,
                if normed { weight.as_ptr() } else { null() } => *const f32,
                if normed { bias.as_ptr() } else { null() } => *const f32, norm.eps => f32, width as i32 => i32
            );
            near(&out, &if normed { norm.tensor(&sum).unwrap() } else { sum.clone() });
        }
    }
}

#[test]
fn activations() {
    use Activation::*;
    for width in WIDTHS {
        let tokens = 4;
        let x = (tensor(tokens, width, 1) * 4.0).unwrap();
        let added = tensor(1, width, 2);
        let sum = x.broadcast_add(&added).unwrap();
        for activation in [None, Some(Gelu), Some(GeluTanh), Some(Relu), Some(Silu), Some(Tanh)] {
            let mut out = vec![f32::NAN; tokens * width];
            call!(c"host_add_activate",
                tokens as u32 => u32, threads(width) => u32, out.as_mut_ptr() => *mut f32,
                host(&x).unwrap().as_ptr() => *const f32, host(&added).unwrap().as_ptr() => *const f32,
                number_of(activation) => i32, width as i32 => i32
            );
            near(&out, &activation.map_or(sum.clone(), |a| a.tensor(&sum).unwrap()));
        }
        for gate in [Gate::First, Gate::Second] {
            let x = tensor(tokens, 2 * width, 3);
            let mut out = vec![f32::NAN; tokens * width];
            call!(c"host_gated",
                tokens as u32 => u32, threads(width) => u32, out.as_mut_ptr() => *mut f32,
                host(&x).unwrap().as_ptr() => *const f32, null() => *const f32, number_of(Some(Silu)) => i32,
                number_of_gate(gate) => i32, width as i32 => i32
            );
            near(&out, &gated(&x, Silu, gate, CANDLE).unwrap());
        }
    }
}

#[test]
fn pools() {
    let packed = batch(&[1, 2, 17, 33]);
    let (starts, _) = places(&packed);
    for width in WIDTHS {
        let x = tensor(packed.tokens(), width, 1);
        for pooling in [Pooling::Mean, Pooling::First, Pooling::Last] {
            let mut out = vec![f32::NAN; 4 * width];
            call!(c"host_pool",
                4 => u32, threads(width) => u32, out.as_mut_ptr() => *mut f32,
                host(&x).unwrap().as_ptr() => *const f32, starts.as_ptr() => *const u32,
                number_of_pooling(pooling) => i32, width as i32 => i32
            );
            near(&out, &pooling.tensors(&x, &packed).unwrap());
        }
    }
}

#[test]
fn attention() {
    let packed = batch(&[1, 2, 33, 64, 65, 150]);
    let (starts, positions) = places(&packed);
    for (heads, width) in [(2, 32), (1, 64)] {
        let qkv = tensor(packed.tokens(), 3 * heads * width, 5);
        let rope = Rope { theta: 10_000.0, stretch: 1.0 };
        let rotation = Rotation::new(rope, 150, width, DType::F32, &CPU).unwrap();
        for rotation in [None, Some(&rotation)] {
            let mut turned = host(&qkv).unwrap();
            if let Some(rotation) = rotation {
                call!(c"host_rotate",
                    packed.tokens() as u32 => u32, threads(heads * width) => u32,
                    turned.as_mut_ptr() => *mut f32, positions.as_ptr() => *const u32,
                    host(&rotation.cos).unwrap().as_ptr() => *const f32,
                    host(&rotation.sin).unwrap().as_ptr() => *const f32, heads as i32 => i32, width as i32 => i32
                );
            }
            for reach in [None, Some(3), Some(70)] {
                let mut out = vec![f32::NAN; packed.tokens() * heads * width];
                call!(c"host_attend",
                    150 => u32, 6 => u32, out.as_mut_ptr() => *mut f32, turned.as_ptr() => *const f32,
                    starts.as_ptr() => *const u32, heads as i32 => i32, width as i32 => i32,
                    reach.unwrap_or(150) as i32 => i32
                );
                let attention = Attention { heads, width, reach };
                near(&out, &attention.tensors(&qkv, rotation, &packed).unwrap());
            }
        }
    }
}
