//! The same operations on a GPU, in each type of elements, against those of a CPU in f32. scripts/gpu-check.sh runs these;
//! the other tests of this folder emulate the kernels, but not cuBLAS, the launches or f16.

use std::sync::Arc;

use candle_core::Result;

use super::super::super::{
    Activation, Attention, Buckets, Disentangled, DistanceBias, Embedding, Epilogue, Gate, Linear, Mask,
    Norm, NormKind, Pooling, Reduction, Rope, Rotation, Saturation, Slot, Workspace, gated, pool,
};
use super::*;

/// Each type of elements, with the error that results of about 1 may have.
const TYPES: [(DType, f32); 3] = [(DType::F32, 2e-4), (DType::F16, 1e-2), (DType::BF16, 6e-2)];
const LENGTHS: [usize; 8] = [1, 2, 17, 33, 63, 64, 65, 300];
/// The longest sequence of the tables.
const SPAN: usize = 300;

/// One device for all tests: each would compile the kernels anew.
fn gpu() -> Device {
    static GPU: OnceLock<Device> = OnceLock::new();
    GPU.get_or_init(|| super::super::open(0).expect("a CUDA device")).clone()
}

/// Numbers that all types represent exactly.
fn exact(rows: usize, width: usize, seed: u32) -> Tensor {
    widened(&rounded(&tensor(rows, width, seed)), width)
}

/// A place to compute: a CPU in f32, or a GPU.
struct Place {
    device: Device,
    dtype: DType,
}

impl Place {
    fn at(&self, x: &Tensor) -> Tensor {
        x.to_device(&self.device).unwrap().to_dtype(self.dtype).unwrap()
    }

    fn norm(&self, width: usize, kind: NormKind, seed: u32) -> Norm {
        let [weight, bias] = [("weight", seed), ("bias", seed + 1)]
            .map(|(name, seed)| (name.to_owned(), self.at(&exact(1, width, seed).squeeze(0).unwrap())));
        let tensors = [weight, bias].into_iter().collect();
        let vb = VarBuilder::from_tensors(tensors, self.dtype, &self.device);
        Norm::load(width, kind, 1e-5, vb).unwrap()
    }
}

/// Computes something on the GPU in each type, and on a CPU in f32: the results must be near each other.
#[track_caller]
fn alike(what: &str, compute: impl Fn(&Place) -> Result<Tensor>) {
    let want = host(&compute(&Place { device: CPU, dtype: DType::F32 }).unwrap()).unwrap();
    let device = gpu();
    for (dtype, allowed) in TYPES {
        let got = compute(&Place { device: device.clone(), dtype })
            .unwrap_or_else(|e| panic!("{what}, {dtype:?}: {e}"));
        let got = host(&got).unwrap();
        assert_eq!(got.len(), want.len(), "{what}, {dtype:?}");
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let error = (got - want).abs() / want.abs().max(1.0);
            assert!(error <= allowed, "{what}, {dtype:?}, [{i}]: {got}, not {want}");
        }
    }
}

/// Attention by the kernel on a GPU, not by the form of tensors, which is for a CPU here.
fn attended(
    place: &Place,
    attention: &Attention,
    (qkv, bias): (&Tensor, &Tensor),
    rotation: Option<&Rotation>,
    lengths: &[usize],
) -> Result<Tensor> {
    // Of its own: a batch's indices stay on the device that first asks for them.
    let packed = &batch(lengths);
    let (qkv, bias) = (place.at(qkv), place.at(bias).squeeze(0)?);
    match place.device.is_cuda() {
        true => Ok(super::super::attend(attention, &qkv, Some(&bias), rotation, packed)?.expect("a kernel")),
        false => attention.tensors(&qkv.broadcast_add(&bias)?, rotation, packed),
    }
}

#[test]
#[ignore = "needs a GPU: scripts/gpu-check.sh"]
fn attention() {
    for lengths in [&LENGTHS[..], &[1, 5, 17, 32], &[3, 9, 16]] {
        for (heads, keys, width) in [(2, 2, 32), (4, 1, 32), (3, 3, 64), (4, 2, 64), (4, 2, 128), (3, 1, 256)]
        {
            let row = (heads + 2 * keys) * width;
            let of = (&exact(lengths.iter().sum(), row, 5), &exact(1, row, 6));
            for mask in [Mask::Full, Mask::Window(3), Mask::Window(70), Mask::Causal, Mask::CausalWindow(20)]
            {
                for (rotates, normed, biased) in [
                    (false, false, false),
                    (true, false, false),
                    (true, true, false),
                    (false, true, false),
                    (false, false, true),
                ] {
                    let what = format!(
                        "{lengths:?}, {heads}/{keys} of {width}, {mask:?}, rotation {rotates}, norms {normed}, bias {biased}"
                    );
                    alike(&what, |place| {
                        let norms = normed.then(|| [7, 9].map(|seed| place.norm(width, NormKind::Rms, seed)));
                        let rope = Rope { theta: 10_000.0, scaling_factor: 1.0 };
                        let rotation = match rotates {
                            true => Some(Rotation::new(rope, SPAN, width, place.dtype, &place.device)?),
                            false => None,
                        };
                        let distances = match biased {
                            true => Some(Arc::new(DistanceBias::alibi(heads, SPAN, &place.device)?)),
                            false => None,
                        };
                        let attention =
                            Attention { keys, norms, distances, ..Attention::new(heads, width, mask) };
                        attended(place, &attention, of, rotation.as_ref(), lengths)
                    });
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU: scripts/gpu-check.sh"]
fn disentangled_attention() {
    for lengths in [&LENGTHS[..], &[1, 5, 17, 32], &[3, 9, 16]] {
        for ((heads, width), (span, max_distance)) in [
            ((2, 32), (4, None)),
            ((2, 64), (200, None)),
            ((3, 64), (32, Some(48))),
            ((2, 64), (256, Some(512))),
        ] {
            let row = 3 * heads * width;
            let of = (&exact(lengths.iter().sum(), row, 5), &exact(1, row, 6));
            let tables = [6, 7].map(|seed| exact(2 * span, heads * width, seed));
            let buckets = Arc::new(Buckets::new(span, max_distance, SPAN));
            for (terms, mask) in
                [([true, true], Mask::Full), ([true, false], Mask::Full), ([false, true], Mask::Window(9))]
            {
                alike(
                    &format!("{lengths:?}, {heads} of {width}, span {span}, terms {terms:?}, {mask:?}"),
                    |place| {
                        let [keys, queries] = [0, 1].map(|i| terms[i].then(|| place.at(&tables[i])));
                        let buckets = Arc::clone(&buckets);
                        let terms = Disentangled::on_device(heads, keys.as_ref(), queries.as_ref(), buckets)?;
                        let scale = terms.scale(width);
                        let attention = Attention {
                            scale,
                            disentangled: Some(terms),
                            ..Attention::new(heads, width, mask)
                        };
                        attended(place, &attention, of, None, lengths)
                    },
                );
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU: scripts/gpu-check.sh"]
fn operations_on_rows() {
    let tokens = LENGTHS.iter().sum();
    // Widths that are a multiple of a piece, and one that is not.
    for width in [36, 64, 768, 1024] {
        let kinds = [NormKind::Layer { bias: true }, NormKind::Rms, NormKind::RmsPlusOne];
        let (x, residual, wide) =
            (exact(tokens, width, 1), exact(tokens, width, 2), exact(tokens, 2 * width, 3));
        for kind in kinds {
            alike(&format!("{kind:?} of {width}"), |place| {
                place.norm(width, kind, 4).forward(&place.at(&x), CANDLE)
            });
            let weight = (exact(width, width, 8) / (width as f64).sqrt()).unwrap();
            for after in [false, true] {
                alike(&format!("{kind:?} of a sum of {width}, after it: {after}"), |place| {
                    let bias = place.at(&exact(1, width, 9).squeeze(0)?);
                    let linear = Linear::new(&place.at(&weight), Some(bias), None)?;
                    let (norm, residual) = (place.norm(width, kind, 4), place.at(&residual));
                    let epilogue = match after {
                        false => Epilogue::AddNorm(&residual, &norm),
                        true => Epilogue::NormAdd(&norm, &residual),
                    };
                    let workspace = Workspace::default();
                    let out = workspace.at(Slot::Stream, &place.device);
                    linear.forward(&place.at(&x), epilogue, out)
                });
            }
        }
        use Activation::*;
        for activation in
            [Gelu, GeluTanh, HardSigmoid, HardSwish, QuickGelu, Relu, Relu6, Sigmoid, Silu, Tanh]
        {
            alike(&format!("{activation:?}, gated"), |place| {
                gated(&place.at(&wide), activation, Gate::First, CANDLE)
            });
        }
        for (normed, scale) in [(true, None), (false, Some(4.5)), (false, None)] {
            alike(&format!("embeddings of {width}, normed {normed}, {scale:?}"), |place| {
                let norm = normed.then(|| place.norm(width, NormKind::Layer { bias: true }, 4));
                let positions = Some((place.at(&exact(SPAN + 2, width, 2)), 2));
                let types = Some(place.at(&exact(2, width, 3)));
                let embedding =
                    Embedding { word: place.at(&exact(90, width, 1)), positions, types, scale, norm };
                let packed = batch(&LENGTHS);
                match place.device.is_cuda() {
                    true => embedding.forward(&packed, CANDLE),
                    false => embedding.tensors(&packed, &CPU),
                }
            });
        }
        for pooling in Pooling::ALL {
            alike(&format!("{pooling:?} of {width}"), |place| {
                let packed = batch(&LENGTHS).skipping(&[0, 1, 2, 3, 4, 5, 70, 7]);
                pool(&[pooling], &place.at(&x), &packed, CANDLE)
            });
        }
        let of = |twice| Reduction::Sum(Saturation { twice });
        // A sum over 300 tokens is large, and so is its error.
        for reduction in [Reduction::Max, of(false), of(true)] {
            alike(&format!("{reduction:?} of {width}"), |place| {
                let (packed, x) = (batch(&LENGTHS), place.at(&x));
                let rows = reduction.rows(&packed, width, &place.device, CANDLE, |range| {
                    x.narrow(0, range.start, range.len())
                })?;
                // Without a kernel the largest may be negative.
                rows.relu()
            });
        }
    }
}
