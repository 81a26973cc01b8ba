//! Attention: with and without tensor cores, and with each kind of bias by distance.

use std::ptr::null;
use std::sync::Arc;

use super::super::super::{Attention, Buckets, Disentangled, DistanceBias, Mask, Rope, Rotation};
use super::*;

/// Lengths around the number of queries and of keys that are processed at a time.
const LENGTHS: [usize; 7] = [1, 2, 33, 63, 64, 65, 150];
/// The longest sequence of the tables by distance.
const SPAN: usize = 150;

fn distance_bias(heads: usize) -> Arc<DistanceBias> {
    Arc::new(DistanceBias::new(&tensor(32, heads, 9), 128, SPAN).unwrap())
}

fn alibi(heads: usize) -> Arc<DistanceBias> {
    Arc::new(DistanceBias::alibi(heads, SPAN, &CPU).unwrap())
}

/// Attention in f32; like `attend` in launch.rs, it first normalises and rotates queries and keys.
fn attend_f32(
    attention: &Attention,
    qkv: &Tensor,
    bias: Option<&Tensor>,
    rotation: Option<&Rotation>,
    batch: &Packed,
) -> Vec<f32> {
    let Attention { heads, keys, width, scale, mask, ref norms, ref distances, .. } = *attention;
    let (starts, positions) = places(batch);
    let (mut rows, stride) = (host(qkv).unwrap(), (heads + 2 * keys) * width);
    let bias = bias.map(|bias| host(bias).unwrap());
    let at = |first: usize| bias.as_ref().map_or(null(), |bias| bias[first * width..].as_ptr());
    let (cos, sin) = rotation.map(|r| (host(&r.cos).unwrap(), host(&r.sin).unwrap())).unwrap_or_default();
    let angles = |table: &Vec<f32>| if rotation.is_some() { table.as_ptr() } else { null() };
    let tokens = batch.tokens() as u32;
    if let Some([of_queries, of_keys]) = norms {
        let weights = [of_queries, of_keys].map(|norm| host(&norm.weight).unwrap());
        call!(c"host_norm_heads",
            tokens => u32, 64 => u32, rows.as_mut_ptr() => *mut f32, at(0) => *const f32,
            weights[0].as_ptr() => *const f32, weights[1].as_ptr() => *const f32, positions.as_ptr() => *const u32,
            angles(&cos) => *const f32, angles(&sin) => *const f32, heads as i32 => i32, (heads + keys) as i32 => i32,
            stride as i32 => i32, of_queries.eps => f32, width as i32 => i32
        );
    } else if rotation.is_some() {
        call!(c"host_rotate",
            tokens => u32, threads(4, heads * width) => u32, rows.as_mut_ptr() => *mut f32, at(0) => *const f32,
            positions.as_ptr() => *const u32, angles(&cos) => *const f32, angles(&sin) => *const f32,
            (heads + keys) as i32 => i32, stride as i32 => i32, width as i32 => i32
        );
    }
    let query_bias = if norms.is_none() && rotation.is_none() { at(0) } else { null() };
    let longest = batch.lengths().max().unwrap();
    let (before, after) = mask.bounds(longest);
    let table = distances.as_ref().map(|bias| host(&bias.table).unwrap());
    let mut out = vec![f32::NAN; batch.tokens() * heads * width];
    let launch = AttentionLaunch::new(longest, width, false);
    call!(c"host_attend",
        launch.blocks as u32 => u32, launch.threads => u32, batch.order().len() as u32 => u32,
        out.as_mut_ptr() => *mut f32, rows.as_ptr() => *const f32, query_bias => *const f32,
        at(heads + keys) => *const f32, starts.as_ptr() => *const u32,
        table.as_ref().map_or(null(), |table| table.as_ptr()) => *const f32, heads as i32 => i32, keys as i32 => i32,
        width as i32 => i32, before as i32 => i32, after as i32 => i32, SPAN as i32 => i32, scale => f32
    );
    out
}

fn rope(width: usize) -> Rotation {
    let rope = Rope { theta: 10_000.0, scaling_factor: 1.0 };
    Rotation::new(rope, 150, width, DType::F32, &CPU).unwrap()
}

#[test]
fn attention() {
    let packed = batch(&LENGTHS);
    for (heads, width) in [(2, 32), (1, 64)] {
        let hidden = heads * width;
        let (qkv, bias) = (tensor(packed.tokens(), 3 * hidden, 5), tensor(1, 3 * hidden, 6));
        let with_bias = qkv.broadcast_add(&bias).unwrap();
        let rotation = rope(width);
        for rotation in [None, Some(&rotation)] {
            let plain =
                [Mask::Full, Mask::Window(3), Mask::Window(70), Mask::Causal].map(|mask| (mask, None));
            let biased = [Mask::Full, Mask::Window(3)].map(|mask| (mask, Some(distance_bias(heads))));
            for (mask, distances) in plain.into_iter().chain(biased).chain([(Mask::Full, Some(alibi(heads)))])
            {
                let attention = Attention { distances, ..Attention::new(heads, width, mask) };
                let out = attend_f32(&attention, &qkv, Some(&bias), rotation, &packed);
                near(&out, &attention.tensors(&with_bias, rotation, &packed).unwrap());
            }
        }
    }
}

/// What decoders do: groups of queries, wide heads, normalised queries and keys.
#[test]
fn attention_in_groups() {
    let packed = batch(&[1, 33, 64, 70]);
    for (heads, keys, width) in [(4, 2, 32), (3, 1, 64), (2, 1, 128), (2, 1, 256)] {
        let row = (heads + 2 * keys) * width;
        let (qkv, bias) = (tensor(packed.tokens(), row, 5), tensor(1, row, 6));
        let with_bias = qkv.broadcast_add(&bias).unwrap();
        let rotation = rope(width);
        let masks = [Mask::Full, Mask::Window(9), Mask::Causal, Mask::CausalWindow(20)];
        for (rotation, normed) in [(None, true), (Some(&rotation), true), (Some(&rotation), false)] {
            for mask in masks {
                let norms = normed.then(|| [rms(width, 8), rms(width, 9)]);
                let attention = Attention { keys, scale: 0.2, norms, ..Attention::new(heads, width, mask) };
                let out = attend_f32(&attention, &qkv, Some(&bias), rotation, &packed);
                near(&out, &attention.tensors(&with_bias, rotation, &packed).unwrap());
            }
        }
    }
}

fn attend_bf16(attention: &Attention, qkv: &[bf16], bias: Option<&[bf16]>, batch: &Packed) -> Vec<bf16> {
    let Attention { heads, keys, width, scale, mask, ref distances, .. } = *attention;
    let table = distances.as_ref().map(|bias| host(&bias.table).unwrap());
    let span = distances.as_ref().map_or(0, |bias| bias.span);
    let (starts, _) = places(batch);
    let longest = batch.lengths().max().unwrap();
    let (before, after) = mask.bounds(longest);
    let at = |first: usize| bias.map_or(null(), |bias| bias[first * width..].as_ptr());
    let mut out = vec![bf16::NAN; batch.tokens() * heads * width];
    let launch = AttentionLaunch::new(longest, width, true);
    call!(c"host_attend_bf16",
        launch.blocks as u32 => u32, launch.threads => u32, launch.short => bool, batch.order().len() as u32 => u32,
        out.as_mut_ptr() => *mut bf16, qkv.as_ptr() => *const bf16, at(0) => *const bf16,
        at(heads + keys) => *const bf16, starts.as_ptr() => *const u32,
        table.as_ref().map_or(null(), |table| table.as_ptr()) => *const f32, heads as i32 => i32, keys as i32 => i32,
        width as i32 => i32, before as i32 => i32, after as i32 => i32, span as i32 => i32, scale => f32
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
                let biased = biased.into_iter().chain([(Mask::Full, Some(alibi(heads)))]);
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

#[test]
fn attention_in_groups_by_warps() {
    for lengths in [&[1, 33, 64, 100][..], &[5, 16, 31]] {
        let packed = batch(lengths);
        for (heads, keys, width) in [(4, 2, 32), (3, 1, 64), (2, 1, 128), (2, 1, 256)] {
            let row = (heads + 2 * keys) * width;
            let qkv = rounded(&(tensor(packed.tokens(), row, 5) * 2.0).unwrap());
            let bias = rounded(&tensor(1, row, 6));
            let all = widened(&qkv, row).broadcast_add(&widened(&bias, row)).unwrap();
            for mask in [Mask::Full, Mask::Window(9), Mask::Causal, Mask::CausalWindow(20)] {
                let scale = 2.0 / width as f32;
                let attention = Attention { keys, scale, ..Attention::new(heads, width, mask) };
                let out = attend_bf16(&attention, &qkv, Some(&bias), &packed);
                near_bf16(&out, &attention.tensors(&all, None, &packed).unwrap(), 6.0);
            }
        }
    }
}

fn apart(attention: &Attention, qkv: &Tensor, batch: &Packed, bits16: bool) -> Vec<f32> {
    let Attention { heads, width, scale, mask, ref disentangled, .. } = *attention;
    let tables = disentangled.as_ref().and_then(Disentangled::on_gpu).unwrap();
    let (starts, _) = places(batch);
    let longest = batch.lengths().max().unwrap();
    let (before, after) = mask.bounds(longest);
    let rows: Vec<u32> = tables.rows.to_vec1().unwrap();
    let launch = AttentionLaunch::new(longest, width, bits16);
    let count = batch.tokens() * heads * width;
    macro_rules! attend {
        ($name:literal, $type:ty, $of:expr, $nan:expr) => {{
            let [keys, queries] = [tables.keys, tables.queries].map(|table| table.map($of));
            let at = |table: &Option<Vec<$type>>| table.as_ref().map_or(null(), |table| table.as_ptr());
            let mut out = vec![$nan; count];
            call!($name,
                launch.blocks as u32 => u32, launch.threads => u32, batch.order().len() as u32 => u32,
                out.as_mut_ptr() => *mut $type, $of(qkv).as_ptr() => *const $type, starts.as_ptr() => *const u32,
                at(&keys) => *const $type, at(&queries) => *const $type, rows.as_ptr() => *const u32,
                heads as i32 => i32, width as i32 => i32, before as i32 => i32, after as i32 => i32,
                tables.longest as i32 => i32, tables.span as i32 => i32, scale => f32
            );
            out
        }};
    }
    match bits16 {
        false => attend!(c"host_attend_apart", f32, |x: &Tensor| host(x).unwrap(), f32::NAN),
        true => attend!(c"host_attend_apart_bf16", bf16, rounded, bf16::NAN)
            .into_iter()
            .map(bf16::to_f32)
            .collect(),
    }
}

/// DeBERTa's terms: each alone and both, with and without shared buckets, for sequences shorter and longer than the
/// table, with and without tensor cores.
#[test]
fn disentangled_attention() {
    let spans = [(4, None), (200, None), (32, Some(48))];
    for lengths in [&LENGTHS[..], &[1, 16, 17, 31]] {
        let packed = batch(lengths);
        for ((heads, width), (span, max_distance)) in
            [((2, 32), spans[0]), ((1, 64), spans[1]), ((1, 64), spans[2])]
        {
            let buckets = Arc::new(Buckets::new(span, max_distance, SPAN + 10));
            let exact = |x: Tensor| widened(&rounded(&x), x.dim(1).unwrap());
            let qkv = exact((tensor(packed.tokens(), 3 * heads * width, 5) * 2.0).unwrap());
            let [keys, queries] = [6, 7].map(|seed| exact(tensor(2 * span, heads * width, seed)));
            for (tables, mask) in [
                ([Some(&keys), Some(&queries)], Mask::Full),
                ([Some(&keys), None], Mask::Full),
                ([None, Some(&queries)], Mask::Window(9)),
            ] {
                let terms =
                    Disentangled::on_device(heads, tables[0], tables[1], Arc::clone(&buckets)).unwrap();
                let scale = terms.scale(width);
                let attention =
                    Attention { scale, disentangled: Some(terms), ..Attention::new(heads, width, mask) };
                let want = attention.tensors(&qkv, None, &packed).unwrap();
                near(&apart(&attention, &qkv, &packed, false), &want);
                let out: Vec<bf16> =
                    apart(&attention, &qkv, &packed, true).into_iter().map(bf16::from_f32).collect();
                near_bf16(&out, &want, 6.0);
            }
        }
    }
}

/// Every query has a warp, and no block more threads than the kernels are compiled for.
#[test]
fn attention_launches() {
    for (longest, width) in (1..=1000).flat_map(|longest| [32, 64, 128, 256].map(|width| (longest, width))) {
        let launch = AttentionLaunch::new(longest, width, true);
        let queries = launch.blocks * launch.threads as usize / 2;
        assert!(queries >= longest && queries < longest + 16 * launch.blocks, "{longest}: {launch:?}");
        let most = |bits16: bool, short: bool| -> u32 {
            call!(c"host_attention_threads" => u32, width as i32 => i32, bits16 => bool, short => bool)
        };
        assert!(launch.threads <= most(true, launch.short), "{longest}: {launch:?}");
        assert!(!launch.short || width <= 64, "{width}: wide heads have no kernel for short sequences");
        let launch = AttentionLaunch::new(longest, width, false);
        let queries = launch.blocks * launch.threads as usize / width.div_ceil(64);
        assert!(queries >= longest, "{longest}: {launch:?}");
        assert_eq!(launch.threads, most(false, launch.short), "{longest}: {launch:?}");
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
