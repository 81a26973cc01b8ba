//! Runs the kernels on a CPU (host.h) and compares them with Candle's own operations.

use std::ffi::{CStr, CString, c_void};
use std::ptr::null;
use std::sync::{Mutex, OnceLock};

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use half::bf16;

use super::super::activation::gated;
use super::super::attention::tests::batch;
use super::super::matmul::tests::random;
use super::super::{Embedding, Norm, NormKind, Out, Packed, host};
use super::*;

const CPU: Device = Device::Cpu;
/// No slot of a workspace, so that an operation uses Candle's.
const CANDLE: Out<'_> = Out(None);

/// A function of host.cpp, which is compiled once, by the C++ compiler that librdkafka needs anyway.
fn function(name: &CStr) -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    let library = *LIBRARY.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let library = directory.path().join("kernels.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cuda/tests/host.cpp");
        let mut compiler = std::process::Command::new(std::env::var("CXX").unwrap_or("c++".to_owned()));
        compiler.args(["-std=c++17", "-O1", "-shared", "-fPIC", "-o"]);
        assert!(compiler.arg(&library).arg(source).status().expect("a compiler").success());
        let path = CString::new(library.display().to_string()).expect("no zeros");
        // SAFETY: the only constructors that the library runs are those of empty vectors.
        unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) as usize }
    });
    assert_ne!(library, 0, "the library loads");
    // SAFETY: the handle is valid.
    let function = unsafe { libc::dlsym(library as *mut c_void, name.as_ptr()) };
    assert!(!function.is_null(), "{name:?}");
    function
}

/// host.h has global state, so that only one kernel can run at a time.
static DEVICE: Mutex<()> = Mutex::new(());

/// Calls a function of host.cpp with arguments of the given types, one call at a time.
macro_rules! call {
    ($name:literal, $($value:expr => $type:ty),*) => { call!($name => (), $($value => $type),*) };
    ($name:literal => $result:ty, $($value:expr => $type:ty),*) => {{
        let function = function($name);
        let _one = DEVICE.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: the types are those of the declaration in host.cpp.
        unsafe {
            let function: unsafe extern "C" fn($($type),*) -> $result = std::mem::transmute(function);
            function($($value),*)
        }
    }};
}

// After the macro, which they use.
mod attention;
#[cfg(feature = "cuda")]
mod device;

fn tensor(rows: usize, width: usize, seed: u32) -> Tensor {
    Tensor::from_vec(random(rows * width, seed), (rows, width), &CPU).unwrap()
}

fn norm(width: usize) -> Norm {
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &CPU);
    vb.get_with_hints(width, "weight", candle_nn::Init::Uniform { lo: 0.5, up: 1.5 }).unwrap();
    vb.get_with_hints(width, "bias", candle_nn::Init::Uniform { lo: -0.5, up: 0.5 }).unwrap();
    Norm::load(width, NormKind::Layer { bias: true }, 1e-5, vb).unwrap()
}

#[track_caller]
fn near(got: &[f32], want: &Tensor) {
    let want = host(want).unwrap();
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!((got - want).abs() < 1e-5, "[{i}]: {got}, not {want}");
    }
}

/// Where each sequence begins on the token axis, and each token's position within its sequence.
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
        let (positions_table, norm) = (Some((position, 2)), Some(norm));
        let mut embedding = Embedding {
            word: word.clone(),
            positions: positions_table,
            types: Some(types),
            scale: None,
            norm,
        };
        for (tables, normed) in [(true, true), (false, true), (false, false)] {
            if !tables {
                (embedding.positions, embedding.types) = (None, None);
            }
            if !normed {
                (embedding.norm, embedding.scale) = (None, Some(4.5));
            }
            let table = |table: Option<&Tensor>| table.map(|table| host(table).unwrap());
            let word = host(&word).unwrap();
            let position = table(embedding.position_table().unwrap().as_ref());
            let types = table(embedding.types.as_ref());
            let mut out = vec![f32::NAN; packed.tokens() * width];
            call!(c"host_embed",
                packed.tokens() as u32 => u32, threads(4, width) => u32, out.as_mut_ptr() => *mut f32,
                packed.ids().as_ptr() => *const u32, positions.as_ptr() => *const u32,
                packed.type_ids().map_or(null(), <[u32]>::as_ptr) => *const u32, word.as_ptr() => *const f32,
                position.as_ref().map_or(null(), |table| table.as_ptr()) => *const f32,
                types.as_ref().map_or(null(), |table| table.as_ptr()) => *const f32,
                if normed { weight.as_ptr() } else { null() } => *const f32,
                if normed { bias.as_ptr() } else { null() } => *const f32,
                embedding.scale.unwrap_or(1.0) as f32 => f32, eps => f32, width as i32 => i32
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
                tokens as u32 => u32, threads(4, width) => u32, out.as_mut_ptr() => *mut f32,
                host(&x).unwrap().as_ptr() => *const f32, host(&added).unwrap().as_ptr() => *const f32,
                host(&residual).unwrap().as_ptr() => *const f32,
                if normed { weight.as_ptr() } else { null() } => *const f32,
                if normed { bias.as_ptr() } else { null() } => *const f32, norm.eps => f32, width as i32 => i32
            );
            near(&out, &if normed { norm.tensor(&sum).unwrap() } else { sum.clone() });
        }
    }
}

fn rms(width: usize, seed: u32) -> Norm {
    let weight = Tensor::from_vec(random(width, seed), width, &CPU).unwrap();
    let tensors = [("weight".to_owned(), weight)].into_iter().collect();
    Norm::load(width, NormKind::RmsPlusOne, 1e-6, VarBuilder::from_tensors(tensors, DType::F32, &CPU))
        .unwrap()
}

/// RMSNorm of a sum, with the residual added before or after it.
#[test]
fn sums_and_rms_norms() {
    let tokens = 5;
    for width in WIDTHS {
        let [x, residual] = [1, 2].map(|seed| tensor(tokens, width, seed));
        let (added, norm) = (tensor(1, width, 3), rms(width, 4));
        let [x, residual, added, weight] = [&x, &residual, &added, &norm.weight].map(|x| host(x).unwrap());
        let rows = |numbers: &[f32]| Tensor::from_slice(numbers, (tokens, width), &CPU).unwrap();
        let sum = rows(&x).broadcast_add(&Tensor::new(&added[..], &CPU).unwrap()).unwrap();
        for (with_residual, after) in [(false, 0), (true, 0), (true, 1)] {
            let mut out = vec![f32::NAN; tokens * width];
            call!(c"host_rms_norm",
                tokens as u32 => u32, threads(4, width) => u32, out.as_mut_ptr() => *mut f32,
                x.as_ptr() => *const f32, added.as_ptr() => *const f32,
                if with_residual { residual.as_ptr() } else { null() } => *const f32,
                weight.as_ptr() => *const f32, norm.eps => f32, after => i32, width as i32 => i32
            );
            let want = match (with_residual, after) {
                (false, _) => norm.tensor(&sum),
                (true, 0) => norm.tensor(&(&sum + rows(&residual)).unwrap()),
                (true, _) => norm.tensor(&sum).unwrap() + rows(&residual),
            };
            near(&out, &want.unwrap());
        }
    }
    for width in [20, 32, 384] {
        let (x, residual, norm) = (tensor(tokens, width, 1), tensor(tokens, width, 2), rms(width, 4));
        let (x, residual, weight) = (rounded(&x), rounded(&residual), host(&norm.weight).unwrap());
        let mut out = vec![bf16::NAN; tokens * width];
        call!(c"host_rms_norm_bf16",
            tokens as u32 => u32, threads(2, width) => u32, out.as_mut_ptr() => *mut bf16,
            x.as_ptr() => *const bf16, null() => *const bf16, residual.as_ptr() => *const bf16,
            weight.as_ptr() => *const f32, norm.eps => f32, 1 => i32, width as i32 => i32
        );
        let want = (norm.tensor(&widened(&x, width)).unwrap() + widened(&residual, width)).unwrap();
        near_bf16(&out, &want, 2.0);
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
        for activation in [
            None,
            Some(Gelu),
            Some(GeluTanh),
            Some(HardSigmoid),
            Some(HardSwish),
            Some(QuickGelu),
            Some(Relu),
            Some(Relu6),
            Some(Sigmoid),
            Some(Silu),
            Some(Tanh),
        ] {
            let mut out = vec![f32::NAN; tokens * width];
            call!(c"host_add_activate",
                tokens as u32 => u32, threads(4, width) => u32, out.as_mut_ptr() => *mut f32,
                host(&x).unwrap().as_ptr() => *const f32, host(&added).unwrap().as_ptr() => *const f32,
                activation_code(activation) => i32, width as i32 => i32
            );
            near(&out, &activation.map_or(sum.clone(), |a| a.tensor(&sum).unwrap()));
        }
        for gate in [Gate::First, Gate::Second] {
            let x = tensor(tokens, 2 * width, 3);
            let mut out = vec![f32::NAN; tokens * width];
            call!(c"host_gated",
                tokens as u32 => u32, threads(4, width) => u32, out.as_mut_ptr() => *mut f32,
                host(&x).unwrap().as_ptr() => *const f32, null() => *const f32, activation_code(Some(Silu)) => i32,
                gate_code(gate) => i32, width as i32 => i32
            );
            near(&out, &gated(&x, Silu, gate, CANDLE).unwrap());
        }
    }
}

#[test]
fn pools() {
    for skipped in [[0; 4], [2; 4], [1, 0, 40, 5]] {
        let packed = batch(&[1, 2, 17, 33]).skipping(&skipped);
        let (starts, _) = places(&packed);
        let skipped: Option<Vec<u32>> =
            packed.on(&CPU).unwrap().skipped.as_ref().map(|x| x.to_vec1().unwrap());
        for width in WIDTHS {
            let x = tensor(packed.tokens(), width, 1);
            for pooling in Pooling::ALL {
                let mut out = vec![f32::NAN; 4 * width];
                call!(c"host_pool",
                    4 => u32, threads(4, width) => u32, out.as_mut_ptr() => *mut f32,
                    host(&x).unwrap().as_ptr() => *const f32, starts.as_ptr() => *const u32,
                    skipped.as_ref().map_or(null(), |skipped| skipped.as_ptr()) => *const u32,
                    pooling_code(pooling) => i32, width as i32 => i32
                );
                near(&out, &pooling.tensors(&x, &packed).unwrap());
            }
        }
    }
}

/// Blocks of tokens that end within, at the end of and beyond a sequence.
#[test]
fn reductions() {
    let packed = batch(&[1, 3, 3, 17, 40]);
    let (starts, _) = places(&packed);
    let (tokens, sequences) = (packed.tokens(), 5);
    for columns in [7, 96] {
        let x = rounded(&(tensor(tokens, columns, 3) * 3.0).unwrap());
        let wide = widened(&x, columns);
        let numbers = host(&wide).unwrap();
        let of = |twice| Reduction::Sum(Saturation { twice });
        for reduction in [Reduction::Max, of(false), of(true)] {
            let want = reduction.on_device(&packed, 2048, |range| wide.narrow(0, range.start, range.len()));
            let want = want.unwrap().relu().unwrap();
            for (most, bits16) in [(2048, false), (7, false), (4, true)] {
                let mut out = vec![0.0; sequences * columns];
                for first in (0..tokens).step_by(most) {
                    let count = most.min(tokens - first);
                    let place = (0..sequences).position(|at| starts[at + 1] as usize > first).unwrap();
                    let end =
                        (0..sequences).rposition(|at| (starts[at] as usize) < first + count).unwrap() + 1;
                    macro_rules! reduce {
                        ($name:literal, $type:ty, $from:expr, $size:literal) => {
                            call!($name,
                                pieces($size, columns).div_ceil(32) as u32 => u32, (end - place) as u32 => u32, 32 => u32,
                                out.as_mut_ptr() => *mut f32, $from.as_ptr() => *const $type,
                                starts.as_ptr() => *const u32, first as i32 => i32, count as i32 => i32,
                                place as i32 => i32, reduction_code(reduction) => i32, columns as i32 => i32
                            )
                        };
                    }
                    match bits16 {
                        true => reduce!(c"host_reduce_bf16", bf16, x[first * columns..], 2),
                        false => reduce!(c"host_reduce", f32, numbers[first * columns..], 4),
                    }
                }
                near(&out, &want);
            }
        }
    }
}

/// Rows of 16-bit elements have larger pieces: tests widths that are a multiple of a piece and one that is not.
#[test]
fn norms_in_bf16() {
    for width in [20, 32, 384] {
        let tokens = 3;
        let (x, residual, norm) = (tensor(tokens, width, 1), tensor(tokens, width, 2), norm(width));
        let sources = [&x, &residual, &norm.weight, &norm.bias].map(rounded);
        let [x, residual, weight, bias] = sources.each_ref().map(|numbers| numbers.as_ptr());
        let mut out = vec![bf16::NAN; tokens * width];
        call!(c"host_add_norm_bf16",
            tokens as u32 => u32, threads(2, width) => u32, out.as_mut_ptr() => *mut bf16,
            x => *const bf16, null() => *const bf16, residual => *const bf16, weight => *const bf16,
            bias => *const bf16, norm.eps => f32, width as i32 => i32
        );
        let [x, residual, weight, bias] = sources.map(|numbers| widened(&numbers, width));
        let (weight, bias) = (weight.squeeze(0).unwrap(), bias.squeeze(0).unwrap());
        let want = candle_nn::ops::layer_norm(&(x + residual).unwrap(), &weight, &bias, norm.eps).unwrap();
        near_bf16(&out, &want, 2.0);
    }
}

/// The elements as f32, in rows of `width`.
fn widened(numbers: &[bf16], width: usize) -> Tensor {
    let numbers: Vec<f32> = numbers.iter().map(|x| x.to_f32()).collect();
    let rows = numbers.len() / width;
    Tensor::from_vec(numbers, (rows, width), &CPU).unwrap()
}

fn rounded(x: &Tensor) -> Vec<bf16> {
    host(x).unwrap().into_iter().map(bf16::from_f32).collect()
}

/// For 16-bit elements the kernels use faster approximations.
#[test]
fn activations_in_bf16() {
    use Activation::*;
    let width = 512;
    // From -9 to 9, and one NaN.
    let mut x: Vec<bf16> =
        (0..2 * width).map(|i| bf16::from_f32(i as f32 * 9.0 / width as f32 - 9.0)).collect();
    x[7] = bf16::NAN;
    for activation in [Gelu, GeluTanh, HardSigmoid, HardSwish, QuickGelu, Relu, Relu6, Sigmoid, Silu, Tanh] {
        let mut out = vec![bf16::ZERO; 2 * width];
        call!(c"host_add_activate_bf16",
            2 => u32, threads(2, width) => u32, out.as_mut_ptr() => *mut bf16, x.as_ptr() => *const bf16,
            null() => *const bf16, activation_code(Some(activation)) => i32, width as i32 => i32
        );
        assert!(out[7].is_nan(), "{activation:?}");
        let want = host(&activation.tensor(&widened(&x, width)).unwrap()).unwrap();
        for (i, (got, want)) in out.iter().zip(&want).enumerate().filter(|(i, _)| *i != 7) {
            // Rounding to bf16, plus the error of the approximations.
            let allowed = want.abs() / 256.0 + 1e-6;
            assert!((got.to_f32() - want).abs() <= allowed, "{activation:?}({}): {got}, not {want}", x[i]);
        }
    }
}

/// Allows `steps` roundings to bf16 of a value of the result's size, or of 1 if that is larger.
#[track_caller]
fn near_bf16(got: &[bf16], want: &Tensor, steps: f32) {
    let want = host(want).unwrap();
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let allowed = steps * want.abs().max(1.0) / 512.0;
        assert!((got.to_f32() - want).abs() <= allowed, "[{i}]: {got}, not {want}");
    }
}
