//! Runs the kernels on a CPU (host.h) and compares them with Candle's own operations.

use std::ffi::{CStr, CString, c_void};
use std::ptr::null;
use std::sync::{Arc, Mutex, OnceLock};

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use half::bf16;

use super::super::activation::gated;
use super::super::attention::tests::batch;
use super::super::matmul::tests::random;
use super::super::{
    Attention, DistanceBias, Embedding, Mask, Norm, NormKind, Out, Packed, Rope, Rotation, host,
};
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
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/model/kernels/cuda/tests/host.cpp");
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
                packed.tokens() as u32 => u32, threads(4, width) => u32, out.as_mut_ptr() => *mut f32,
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

#[test]
fn activations() {
    use Activation::*;
    for width in WIDTHS {
        let tokens = 4;
        let x = (tensor(tokens, width, 1) * 4.0).unwrap();
        let added = tensor(1, width, 2);
        let sum = x.broadcast_add(&added).unwrap();
        for activation in
            [None, Some(Gelu), Some(GeluTanh), Some(Relu), Some(Sigmoid), Some(Silu), Some(Tanh)]
        {
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
    let packed = batch(&[1, 2, 17, 33]);
    let (starts, _) = places(&packed);
    for width in WIDTHS {
        let x = tensor(packed.tokens(), width, 1);
        for pooling in Pooling::ALL {
            let mut out = vec![f32::NAN; 4 * width];
            call!(c"host_pool",
                4 => u32, threads(4, width) => u32, out.as_mut_ptr() => *mut f32,
                host(&x).unwrap().as_ptr() => *const f32, starts.as_ptr() => *const u32,
                pooling_code(pooling) => i32, width as i32 => i32
            );
            near(&out, &pooling.tensors(&x, &packed).unwrap());
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
    for activation in [Gelu, GeluTanh, Relu, Sigmoid, Silu, Tanh] {
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

/// Lengths around the number of queries and of keys that are processed at a time.
const LENGTHS: [usize; 7] = [1, 2, 33, 63, 64, 65, 150];

#[test]
fn attention() {
    let packed = batch(&LENGTHS);
    let (starts, positions) = places(&packed);
    for (heads, width) in [(2, 32), (1, 64)] {
        let hidden = heads * width;
        let (qkv, bias) = (tensor(packed.tokens(), 3 * hidden, 5), tensor(1, 3 * hidden, 6));
        let with_bias = qkv.broadcast_add(&bias).unwrap();
        let bias = host(&bias).unwrap();
        let rope = Rope { theta: 10_000.0, scaling_factor: 1.0 };
        let rotation = Rotation::new(rope, 150, width, DType::F32, &CPU).unwrap();
        for rotation in [None, Some(&rotation)] {
            let mut turned = host(&qkv).unwrap();
            if let Some(rotation) = rotation {
                call!(c"host_rotate",
                    packed.tokens() as u32 => u32, threads(4, hidden) => u32,
                    turned.as_mut_ptr() => *mut f32, bias.as_ptr() => *const f32,
                    positions.as_ptr() => *const u32, host(&rotation.cos).unwrap().as_ptr() => *const f32,
                    host(&rotation.sin).unwrap().as_ptr() => *const f32, heads as i32 => i32, width as i32 => i32
                );
            }
            let query_bias = if rotation.is_some() { null() } else { bias.as_ptr() };
            let plain =
                [Mask::Full, Mask::Window(3), Mask::Window(70), Mask::Causal].map(|mask| (mask, None));
            let biased = [Mask::Full, Mask::Window(3)].map(|mask| (mask, Some(distance_bias(heads))));
            for (mask, distances) in plain.into_iter().chain(biased) {
                let (before, after) = mask.bounds(150);
                let table = distances.as_ref().map(|bias| host(&bias.table).unwrap());
                let mut out = vec![f32::NAN; packed.tokens() * hidden];
                let launch = AttentionLaunch::new(150, false);
                call!(c"host_attend",
                    launch.blocks as u32 => u32, launch.threads => u32, LENGTHS.len() as u32 => u32, out.as_mut_ptr() => *mut f32,
                    turned.as_ptr() => *const f32, query_bias => *const f32,
                    bias[2 * hidden..].as_ptr() => *const f32, starts.as_ptr() => *const u32,
                    table.as_ref().map_or(null(), |table| table.as_ptr()) => *const f32,
                    heads as i32 => i32, width as i32 => i32, before as i32 => i32, after as i32 => i32, SPAN as i32 => i32
                );
                let attention =
                    Attention { distances: distances.clone(), ..Attention::new(heads, width, mask) };
                near(&out, &attention.tensors(&with_bias, rotation, &packed).unwrap());
            }
        }
    }
}

/// The longest sequence of [`distance_bias`].
const SPAN: usize = 150;

fn distance_bias(heads: usize) -> Arc<DistanceBias> {
    Arc::new(DistanceBias::new(&tensor(32, heads, 9), 128, SPAN).unwrap())
}

fn attend_bf16(attention: &Attention, qkv: &[bf16], bias: Option<&[bf16]>, batch: &Packed) -> Vec<bf16> {
    let Attention { heads, width, mask, ref distances, .. } = *attention;
    let table = distances.as_ref().map(|bias| host(&bias.table).unwrap());
    let span = distances.as_ref().map_or(0, |bias| bias.span);
    let (hidden, (starts, _)) = (heads * width, places(batch));
    let longest = batch.lengths().max().unwrap();
    let (before, after) = mask.bounds(longest);
    let at = |start: usize| bias.map_or(null(), |bias| bias[start..].as_ptr());
    let mut out = vec![bf16::NAN; batch.tokens() * hidden];
    let launch = AttentionLaunch::new(longest, true);
    call!(c"host_attend_bf16",
        launch.blocks as u32 => u32, launch.threads => u32, launch.short => bool, batch.order().len() as u32 => u32, out.as_mut_ptr() => *mut bf16,
        qkv.as_ptr() => *const bf16, at(0) => *const bf16, at(2 * hidden) => *const bf16,
        starts.as_ptr() => *const u32, table.as_ref().map_or(null(), |table| table.as_ptr()) => *const f32,
        heads as i32 => i32, width as i32 => i32, before as i32 => i32, after as i32 => i32, span as i32 => i32
    );
    out
}

/// Tensor core instructions, which host.h emulates with the fragment layouts of the PTX ISA.
#[test]
fn attention_by_warps() {
    // Each of these sets of lengths has a different launch.
    for lengths in [&LENGTHS[..], &[1, 33, 80, 97], &[1, 16, 17, 31, 32], &[1, 5, 16]] {
        let packed = batch(lengths);
        for (heads, width) in [(2, 32), (1, 64)] {
            let hidden = heads * width;
            // Scores are far enough apart for a wrong one to show.
            let qkv = (tensor(packed.tokens(), 3 * hidden, 5) * 2.0).unwrap();
            let bias = tensor(1, 3 * hidden, 6);
            let (qkv, bias) = (rounded(&qkv), rounded(&bias));
            for with_bias in [false, true] {
                let all = match with_bias {
                    true => widened(&qkv, 3 * hidden).broadcast_add(&widened(&bias, 3 * hidden)).unwrap(),
                    false => widened(&qkv, 3 * hidden),
                };
                let masks = [Mask::Full, Mask::Window(0), Mask::Window(3), Mask::Window(70), Mask::Causal];
                let biased = [Mask::Full, Mask::Window(3)].map(|mask| (mask, Some(distance_bias(heads))));
                for (mask, distances) in masks.map(|mask| (mask, None)).into_iter().chain(biased) {
                    // Queries with their bias, weights and results are rounded to bf16; a bias by distance makes
                    // few keys heavy, so that their rounding errors average out less.
                    let steps = if distances.is_some() { 8.0 } else { 6.0 };
                    let attention = Attention { distances, ..Attention::new(heads, width, mask) };
                    let out = attend_bf16(&attention, &qkv, with_bias.then_some(&bias[..]), &packed);
                    near_bf16(&out, &attention.tensors(&all, None, &packed).unwrap(), steps);
                }
            }
        }
    }
}

/// Every query has a warp, and no block more threads than the kernels are compiled for.
#[test]
fn attention_launches() {
    for longest in 1..=1000 {
        let launch = AttentionLaunch::new(longest, true);
        let queries = launch.blocks * launch.threads as usize / 2;
        assert!(queries >= longest && queries < longest + 16 * launch.blocks, "{longest}: {launch:?}");
        let most = |short: bool| -> u32 { call!(c"host_attention_threads" => u32, short => bool) };
        assert!(launch.threads <= most(launch.short), "{longest}: {launch:?}");
        let launch = AttentionLaunch::new(longest, false);
        assert!(launch.blocks * launch.threads as usize >= longest, "{longest}: {launch:?}");
        assert!(launch.threads <= most(launch.short), "{longest}: {launch:?}");
    }
}

/// The memory behind a sequence belongs to the next one and must not affect it, even if it is NaN.
#[test]
fn attention_ignores_other_sequences() {
    let packed = batch(&[5, 70]);
    let width = 64;
    let mut qkv = rounded(&tensor(packed.tokens(), 3 * width, 7));
    let attention = Attention::new(1, width, Mask::Full);
    let before = attend_bf16(&attention, &qkv, None, &packed);
    qkv[5 * 3 * width..].fill(bf16::NAN);
    let after = attend_bf16(&attention, &qkv, None, &packed);
    assert_eq!(before[..5 * width], after[..5 * width]);
    assert!(after[5 * width..].iter().all(|x| x.is_nan()), "NaN stays NaN");
}
