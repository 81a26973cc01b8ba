//! Time of each operation on a batch of 512 tokens, on one core and in the shapes of MiniLM-L6; matrix
//! multiplication is compared with the `gemm` crate. `cargo bench --bench kernels`.

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kandle::model::Packed;
use kandle::model::kernels::matmul::{Epilogue, Panels};
use kandle::model::kernels::{
    Activation, Attention, Mask, Norm, NormKind, Pooling, Precision, Slot, Workspace, pool,
};

const TOKENS: usize = 512;
const HIDDEN: usize = 384;
/// `(inputs, outputs)` of the matrix multiplications of a layer.
const LAYER: [(usize, usize); 4] =
    [(HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN), (4 * HIDDEN, HIDDEN)];

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i * 7919 % 2003) as f32 / 1001.5 - 1.0).collect()
}

/// `[rows, inputs]` times the transpose of `[outputs, inputs]`, by the `gemm` crate.
fn gemm_crate(x: &[f32], weight: &[f32], out: &mut [f32], (rows, inputs, outputs): (usize, usize, usize)) {
    assert!(x.len() == rows * inputs && weight.len() == inputs * outputs && out.len() == rows * outputs);
    let (row, column) = (inputs as isize, outputs as isize);
    let (out, x, weight) = (out.as_mut_ptr(), x.as_ptr(), weight.as_ptr());
    // SAFETY: the slices have the lengths that these dimensions and strides need, as asserted above.
    unsafe {
        gemm::gemm(
            rows,
            outputs,
            inputs,
            out,
            1,
            column,
            false,
            x,
            1,
            row,
            weight,
            row,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

fn matmul(c: &mut Criterion) {
    for (inputs, outputs) in LAYER {
        let mut group = c.benchmark_group(format!("matmul {TOKENS}x{inputs}x{outputs}"));
        group.throughput(Throughput::Elements((2 * TOKENS * inputs * outputs) as u64)).sample_size(20);
        let (x, weight) = (numbers(TOKENS * inputs), numbers(outputs * inputs));
        let mut out = vec![0.0; TOKENS * outputs];
        let panels = Panels::new(&weight, None, inputs, outputs);
        group.bench_function("f32", |b| b.iter(|| panels.multiply(&x, &mut out, &Epilogue::Nothing)));
        group.bench_function("f32 with GELU", |b| {
            b.iter(|| panels.multiply(&x, &mut out, &Epilogue::Activate(Activation::Gelu)));
        });
        for (name, code) in [("int8", Precision::Int8), ("bf16", Precision::Bf16)] {
            let panels = Panels::quantized(&weight, None, inputs, outputs, code, None);
            group.bench_function(name, |b| b.iter(|| panels.multiply(&x, &mut out, &Epilogue::Nothing)));
        }
        group.bench_function("gemm crate, f32", |b| {
            b.iter(|| gemm_crate(&x, &weight, &mut out, (TOKENS, inputs, outputs)));
        });
        group.finish();
    }
}

fn batch(length: usize) -> Packed {
    let ids = vec![1; length];
    Packed::new(&vec![(&ids[..], None); TOKENS / length])
}

fn layers(c: &mut Criterion) {
    let device = Device::Cpu;
    let mut group = c.benchmark_group("layer");
    group.sample_size(20);
    for length in [32, 256] {
        let (packed, workspace) = (batch(length), Workspace::default());
        let qkv =
            Tensor::from_vec(numbers(TOKENS * 3 * HIDDEN), (TOKENS, 3 * HIDDEN), &device).expect("a result");
        let attention = Attention::new(12, HIDDEN / 12, Mask::Full);
        group.bench_function(format!("attention, texts of {length}"), |b| {
            b.iter(|| {
                attention
                    .forward(&qkv, None, None, &packed, workspace.at(Slot::Mixed, &device))
                    .expect("a result")
            });
        });
    }
    let (packed, workspace, vars) = (batch(32), Workspace::default(), VarMap::new());
    let x = Tensor::from_vec(numbers(TOKENS * HIDDEN), (TOKENS, HIDDEN), &device).expect("a result");
    let norm = Norm::load(
        HIDDEN,
        NormKind::Layer { bias: true },
        1e-12,
        VarBuilder::from_varmap(&vars, DType::F32, &device),
    )
    .expect("a result");
    group.bench_function("norm", |b| {
        b.iter(|| norm.forward(&x, workspace.at(Slot::Mixed, &device)).expect("a result"));
    });
    group.bench_function("pool", |b| {
        b.iter(|| {
            pool(&[Pooling::Mean], &x, &packed, workspace.at(Slot::Pooled, &device)).expect("a result")
        });
    });
    group.finish();
}

/// All matrix multiplications of a model of six layers, with a batch of 256 tokens on one core. Unlike above,
/// the weights of a layer have left the L2 cache when they are needed again.
fn model(c: &mut Criterion) {
    const ROWS: usize = 256;
    let shapes = LAYER.repeat(6);
    let mut group = c.benchmark_group(format!("all multiplications, {ROWS} tokens"));
    let operations: usize = shapes.iter().map(|(inputs, outputs)| 2 * ROWS * inputs * outputs).sum();
    group.throughput(Throughput::Elements(operations as u64)).sample_size(20);
    let x = numbers(ROWS * 4 * HIDDEN);
    let mut out = vec![0.0; ROWS * 4 * HIDDEN];
    for (name, code) in [("f32", None), ("bf16", Some(Precision::Bf16)), ("int8", Some(Precision::Int8))] {
        let panels: Vec<Panels> = (shapes.iter())
            .map(|&(inputs, outputs)| {
                let weight = numbers(inputs * outputs);
                match code {
                    None => Panels::new(&weight, None, inputs, outputs),
                    Some(code) => Panels::quantized(&weight, None, inputs, outputs, code, None),
                }
            })
            .collect();
        group.bench_function(name, |b| {
            b.iter(|| {
                for panels in &panels {
                    let (x, out) = (&x[..ROWS * panels.inputs], &mut out[..ROWS * panels.outputs]);
                    panels.multiply(x, out, &Epilogue::Nothing);
                }
            });
        });
    }
    let weights: Vec<Vec<f32>> = shapes.iter().map(|(inputs, outputs)| numbers(inputs * outputs)).collect();
    group.bench_function("gemm crate, f32", |b| {
        b.iter(|| {
            for ((inputs, outputs), weight) in shapes.iter().zip(&weights) {
                gemm_crate(
                    &x[..ROWS * inputs],
                    weight,
                    &mut out[..ROWS * outputs],
                    (ROWS, *inputs, *outputs),
                );
            }
        });
    });
    group.finish();
}

criterion_group!(benches, matmul, model, layers);
criterion_main!(benches);
