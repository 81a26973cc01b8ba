//! Attention (arXiv:1706.03762) over sequences of any lengths, concatenated without padding: nothing is computed for
//! positions that no sequence has.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use aligned_vec::AVec;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_nn::rotary_emb::rope;
use pulp::{Simd, WithSimd};

use super::disentangled::{self, Disentangled};
use super::matmul::{Products, Start};
use super::norm::Norm;
use super::simd::{add, copy, dispatch, exp};
use super::tile::{F32, Kernel, Left, PackedA, Right, strip};
use super::{Fused, Out, Packed, host};

/// Which keys a query attends to, within its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    Full,
    /// Sliding window: keys at most this many tokens before or after the query.
    Window(usize),
    /// The token itself and those before it.
    Causal,
    /// The token itself and at most this many before it.
    CausalWindow(usize),
}

impl Mask {
    /// How many tokens before and after itself a query of a sequence of `length` tokens attends to.
    pub fn bounds(self, length: usize) -> (usize, usize) {
        match self {
            Self::Full => (length, length),
            Self::Window(tokens) => (tokens.min(length), tokens.min(length)),
            Self::Causal => (length, 0),
            Self::CausalWindow(tokens) => (tokens.min(length), 0),
        }
    }

    /// The average number of keys that a query attends to.
    pub fn keys_per_query(self, length: usize) -> usize {
        match self {
            Self::Full => length,
            Self::Window(tokens) => length.min(2 * tokens + 1),
            Self::Causal => length.div_ceil(2),
            Self::CausalWindow(tokens) => length.div_ceil(2).min(tokens + 1),
        }
    }

    /// Whether no query attends to a token after it.
    pub fn is_causal(self) -> bool {
        self.bounds(1).1 == 0
    }

    fn is_full(self, length: usize) -> bool {
        let (before, after) = self.bounds(length);
        before + 1 >= length && after + 1 >= length
    }

    /// `[length, length]`: 0 where the query (row) attends to the key (column), else -inf.
    fn tensor(self, length: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let (before, after) = self.bounds(length);
        let mask: Vec<f32> = (0..length * length)
            .map(|at| (at / length, at % length))
            .map(
                |(query, key)| {
                    if key + before < query || key > query + after { f32::NEG_INFINITY } else { 0.0 }
                },
            )
            .collect();
        Tensor::from_vec(mask, (length, length), device)?.to_dtype(dtype)
    }
}

/// RoPE (arXiv:2104.09864): at a position, elements i and i + width / 2 of a head are rotated by the angle
/// position × theta^(-2i/width) / scaling_factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling_factor: f64,
}

/// A layer's attention.
pub struct Attention {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values, a divisor of `heads`: query head h attends to head h / (heads / keys)
    /// (grouped-query attention, arXiv:2305.13245).
    pub keys: usize,
    /// Elements of a head.
    pub width: usize,
    /// Factor of the scores.
    pub scale: f32,
    pub mask: Mask,
    /// RMSNorm of each head's query and of its key, before they are rotated.
    pub norms: Option<[Norm; 2]>,
    /// Added to the scores; shared by layers.
    pub distances: Option<Arc<DistanceBias>>,
    /// All sequences have as many tokens as this one has places.
    pub pairs: Option<Arc<PairBias>>,
    /// The layer's terms by distance that depend on queries and keys too.
    pub disentangled: Option<Disentangled>,
}

/// A bias on attention scores, by head and by the distance between query and key.
pub struct DistanceBias {
    /// `[heads, 2 × span - 1]` in f32: the bias at distance `query - key` is at index `query - key + span - 1`.
    pub(super) table: Tensor,
    /// Longest sequence.
    pub(super) span: usize,
    /// The table's elements, if it is on the CPU.
    host: Option<Vec<f32>>,
}

/// A bias on attention scores, by head and by the places of query and key: of the patches of an image, which are in rows.
pub struct PairBias {
    /// `[heads, queries, keys]` in f32.
    table: Tensor,
    /// Places of a sequence.
    length: usize,
    /// The elements, `[heads, keys, queries]`, if the table is on the CPU.
    host: Option<Vec<f32>>,
}

impl PairBias {
    /// `table` is `[heads, queries, keys]`.
    pub fn new(table: &Tensor) -> Result<Self> {
        let (_, length, _) = table.dims3()?;
        let table = table.to_dtype(DType::F32)?;
        let host =
            if table.device().is_cpu() { Some(host(&table.transpose(1, 2)?.contiguous()?)?) } else { None };
        Ok(Self { table, length, host })
    }
}

impl DistanceBias {
    /// T5's (arXiv:1910.10683, section 2.1): `weight`, `[buckets, heads]`, has a bias for each bucket of distances.
    /// Sequences have at most `span` tokens.
    pub fn new(weight: &Tensor, max_distance: usize, span: usize) -> Result<Self> {
        let buckets = weight.dim(0)?;
        let distances = (0..2 * span - 1).map(|i| i as i64 - (span as i64 - 1));
        let index: Vec<u32> = distances.map(|distance| bucket(distance, buckets, max_distance)).collect();
        let index = Tensor::from_vec(index, 2 * span - 1, weight.device())?;
        Self::with(weight.index_select(&index, 0)?.t()?.contiguous()?.to_dtype(DType::F32)?, span)
    }

    /// ALiBi (arXiv:2108.12409) for an encoder (arXiv:2310.19923, section 3.1): -slope × distance, on both sides.
    pub fn alibi(heads: usize, span: usize, device: &Device) -> Result<Self> {
        let away = |i: usize| i.abs_diff(span - 1) as f32;
        let row = |slope: f32| (0..2 * span - 1).map(move |i| -slope * away(i));
        let table: Vec<f32> = slopes(heads).into_iter().flat_map(row).collect();
        Self::with(Tensor::from_vec(table, (heads, 2 * span - 1), device)?, span)
    }

    fn with(table: Tensor, span: usize) -> Result<Self> {
        let host = if table.device().is_cpu() { Some(host(&table)?) } else { None };
        Ok(Self { table, span, host })
    }

    /// `[heads, length, length]`: the bias of each query (row) and key (column).
    fn tensor(&self, length: usize, dtype: DType) -> Result<Tensor> {
        let index = |at: usize| (at / length + self.span - 1 - at % length) as u32;
        let index: Vec<u32> = (0..length * length).map(index).collect();
        let index = Tensor::from_vec(index, length * length, self.table.device())?;
        let heads = self.table.dim(0)?;
        self.table.index_select(&index, 1)?.reshape((heads, length, length))?.to_dtype(dtype)
    }
}

/// ALiBi's slope of each head: powers of 2^(-8/heads). If the number of heads is no power of two, the slopes are those of
/// the next lower one, then every other slope of the next higher one.
fn slopes(heads: usize) -> Vec<f32> {
    let of = |count: usize| (1..=count).map(move |i| (-8.0 * i as f64 / count as f64).exp2() as f32);
    let lower = 1 << heads.ilog2();
    of(lower).chain(of(2 * lower).step_by(2)).take(heads).collect()
}

/// T5's bucket of a distance `query - key`: half of the buckets are for keys after the query. Of each half, the first half
/// hold one distance each, the others ranges that grow logarithmically up to `max_distance`.
fn bucket(distance: i64, buckets: usize, max_distance: usize) -> u32 {
    let half = buckets / 2;
    let (exact, away) = (half / 2, distance.unsigned_abs() as usize);
    let within = if away < exact {
        away
    } else {
        // In f32, as transformers computes it.
        let ratio = (away as f32 / exact as f32).ln() / (max_distance as f32 / exact as f32).ln();
        (exact + (ratio * (half - exact) as f32) as usize).min(half - 1)
    };
    (within + if distance < 0 { half } else { 0 }) as u32
}

/// RoPE's cosines and sines, `[positions, width / 2]` each.
pub struct Rotation {
    pub rope: Rope,
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
    /// Both as vectors, if they are on the CPU.
    host: Option<(Vec<f32>, Vec<f32>)>,
}

impl Rotation {
    pub fn new(rope: Rope, positions: usize, width: usize, dtype: DType, device: &Device) -> Result<Self> {
        let frequency =
            |i| 1.0 / (rope.theta as f32).powf(i as f32 / width as f32) / rope.scaling_factor as f32;
        let frequencies: Vec<f32> = (0..width).step_by(2).map(frequency).collect();
        let frequencies = Tensor::from_vec(frequencies, (1, width / 2), device)?;
        let column = Tensor::arange(0u32, positions as u32, device)?.to_dtype(DType::F32)?;
        let angles = column.reshape((positions, 1))?.matmul(&frequencies)?;
        let (cos, sin) = (angles.cos()?.to_dtype(dtype)?, angles.sin()?.to_dtype(dtype)?);
        let host = if device.is_cpu() { Some((host(&cos)?, host(&sin)?)) } else { None };
        Ok(Self { rope, cos, sin, host })
    }
}

impl Attention {
    /// One head of keys per head of queries, with scores scaled by 1 / √width (arXiv:1706.03762).
    pub fn new(heads: usize, width: usize, mask: Mask) -> Self {
        let scale = 1.0 / (width as f32).sqrt();
        Self {
            heads,
            keys: heads,
            width,
            scale,
            mask,
            norms: None,
            distances: None,
            pairs: None,
            disentangled: None,
        }
    }

    /// Elements of a row of the input: queries, keys and values of all heads.
    fn row(&self) -> usize {
        (self.heads + 2 * self.keys) * self.width
    }

    /// `[tokens, (heads + 2 × keys) × width]`, each row the queries, the keys and the values of all heads, to
    /// `[tokens, heads × width]`. `bias`, one row, is the one that
    /// [`Linear::product`](super::Linear::product) has not added.
    pub fn forward(
        &self,
        qkv: &Tensor,
        bias: Option<&Tensor>,
        rotation: Option<&Rotation>,
        batch: &Packed,
        out: Out<'_>,
    ) -> Result<Tensor> {
        match out.view(batch.tokens(), self.heads * self.width)? {
            Some(y) => {
                let run = |out: &mut [f32], qkv: &[f32]| {
                    WORKSPACE.with_borrow_mut(|buffers| {
                        dispatch(Run { attention: self, rotation, batch, qkv, out, buffers });
                    });
                };
                y.inplace_op2(qkv, &Fused("attention", run))?;
                Ok(y)
            }
            None => {
                #[cfg(feature = "cuda")]
                // The kernel has no masks of tokens and no bias of pairs, which few models have.
                if qkv.device().is_cuda()
                    && batch.masked().is_none()
                    && self.pairs.is_none()
                    && let Some(y) = super::cuda::attend(self, qkv, bias, rotation, batch)?
                {
                    return Ok(y);
                }
                match bias {
                    Some(bias) => self.tensors(&qkv.broadcast_add(bias)?, rotation, batch),
                    None => self.tensors(qkv, rotation, batch),
                }
            }
        }
    }

    /// The unfused form, by Candle's own operations, for one run of equally long sequences at a time.
    pub(super) fn tensors(
        &self,
        qkv: &Tensor,
        rotation: Option<&Rotation>,
        batch: &Packed,
    ) -> Result<Tensor> {
        let Self { heads, keys, width, scale, .. } = *self;
        let mut mixed = Vec::new();
        for run in batch.runs() {
            let tokens = run.sequences * run.length;
            let part = |first: usize, heads: usize| {
                qkv.narrow(0, run.start, tokens)?
                    .narrow(1, first * width, heads * width)?
                    .reshape((run.sequences, run.length, heads, width))?
                    .transpose(1, 2)?
                    .contiguous()
            };
            let (mut q, mut k, mut v) = (part(0, heads)?, part(heads, keys)?, part(heads + keys, keys)?);
            if let Some([of_queries, of_keys]) = &self.norms {
                (q, k) = (of_queries.tensor(&q)?, of_keys.tensor(&k)?);
            }
            if let Some(rotation) = rotation {
                let cos = rotation.cos.narrow(0, 0, run.length)?;
                let sin = rotation.sin.narrow(0, 0, run.length)?;
                q = rope(&q, &cos, &sin)?;
                k = rope(&k, &cos, &sin)?;
            }
            if keys < heads {
                let shape = (run.sequences, keys, heads / keys, run.length, width);
                let repeat = |x: Tensor| {
                    x.unsqueeze(2)?.broadcast_as(shape)?.reshape((run.sequences, heads, run.length, width))
                };
                (k, v) = (repeat(k)?, repeat(v)?);
            }
            let mut scores = (q.matmul(&k.t()?)? * f64::from(scale))?;
            if let Some(distances) = &self.distances {
                scores = scores.broadcast_add(&distances.tensor(run.length, scores.dtype())?)?;
            }
            if let Some(pairs) = &self.pairs {
                scores = scores.broadcast_add(&pairs.table.to_dtype(scores.dtype())?)?;
            }
            if let Some(terms) = &self.disentangled {
                scores = terms.add(scores, &q, &k)?;
            }
            if !self.mask.is_full(run.length) {
                scores =
                    scores.broadcast_add(&self.mask.tensor(run.length, scores.dtype(), qkv.device())?)?;
            }
            if let Some(mask) = batch.mask(run, scores.dtype(), qkv.device())? {
                scores = scores.broadcast_add(&mask.reshape((run.sequences, 1, 1, run.length))?)?;
            }
            let out = softmax_last_dim(&scores)?.matmul(&v)?;
            mixed.push(out.transpose(1, 2)?.reshape((tokens, heads * width))?);
        }
        if mixed.len() == 1 { Ok(mixed.remove(0)) } else { Tensor::cat(&mixed, 0) }
    }
}

thread_local! {
    static WORKSPACE: RefCell<Buffers> = RefCell::new(Buffers::new());
}

/// Buffers for one head of one sequence. Queries are the columns of a panel: as many are processed at a time as two
/// vectors have elements, or one vector for the last few.
struct Buffers {
    /// Four queries or one key, rotated.
    rows: Vec<f32>,
    /// Queries, scaled, rotated and transposed: one row per element of the head.
    queries: AVec<f32>,
    /// Rotated keys.
    keys: PackedA<f32>,
    /// One row per key, padded with zeros to a whole vector.
    values: AVec<f32>,
    /// One row per key, one column per query.
    scores: AVec<f32>,
    /// For each query, 1 / the sum of its weights.
    factors: AVec<f32>,
    positions: disentangled::Buffers,
}

impl Buffers {
    fn new() -> Self {
        let numbers = || AVec::new(0);
        let (queries, values, scores, factors) = (numbers(), numbers(), numbers(), numbers());
        let positions = disentangled::Buffers::new();
        Self { rows: Vec::new(), queries, keys: PackedA::new(), values, scores, factors, positions }
    }
}

struct Run<'a> {
    attention: &'a Attention,
    rotation: Option<&'a Rotation>,
    batch: &'a Packed,
    qkv: &'a [f32],
    out: &'a mut [f32],
    buffers: &'a mut Buffers,
}

impl WithSimd for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { attention, rotation, batch, qkv, out, buffers } = self;
        let Attention { heads, keys, width, mask, ref distances, ref pairs, ref disentangled, .. } =
            *attention;
        let distances = distances
            .as_ref()
            .map(|bias| (bias.span, &bias.host.as_ref().expect("the table is on the CPU")[..]));
        let rotation = rotation.map(|rotation| {
            let (cos, sin) = rotation.host.as_ref().expect("the rotation tables are on the CPU");
            (&cos[..], &sin[..])
        });
        let (row, hidden) = (attention.row(), heads * width);
        let (each, mut start) = (heads / keys, 0);
        for length in batch.lengths() {
            let qkv = &qkv[start * row..][..length * row];
            let out = &mut out[start * hidden..][..length * hidden];
            let masked = batch.masked().map(|masked| &masked[start..][..length]);
            let sequence = Sequence { qkv, attention, row, hidden, length, rotation, masked };
            for key in 0..keys {
                sequence.pack_keys(simd, key, buffers);
                for head in key * each..(key + 1) * each {
                    let distances = distances.map(|(span, table)| {
                        let row = 2 * span - 1;
                        (span, &table[head * row..][..row])
                    });
                    let positions = disentangled
                        .as_ref()
                        .map(|terms| terms.head(head, width).expect("the tables are on the CPU"));
                    let pairs = pairs.as_ref().map(|pairs| {
                        assert_eq!(pairs.length, length, "tokens of a sequence");
                        let all = pairs.host.as_ref().expect("the table is on the CPU");
                        &all[head * length * length..][..length * length]
                    });
                    let bias = Bias { distances, pairs, positions };
                    sequence.head(simd, mask, head, bias, &mut out[head * width..], buffers);
                }
            }
            start += length;
        }
    }
}

/// One sequence.
#[derive(Clone, Copy)]
struct Sequence<'a> {
    /// `[length, row]`.
    qkv: &'a [f32],
    attention: &'a Attention,
    row: usize,
    /// Elements of a row of the result.
    hidden: usize,
    length: usize,
    rotation: Option<(&'a [f32], &'a [f32])>,
    /// For each token, whether none attends to it.
    masked: Option<&'a [bool]>,
}

/// What a head adds to its scores by distance.
struct Bias<'a> {
    /// The longest sequence's length, and the bias for each distance.
    distances: Option<(usize, &'a [f32])>,
    /// `[keys, queries]`.
    pairs: Option<&'a [f32]>,
    positions: Option<disentangled::Head<'a>>,
}

/// Width of the next panel when `left` columns are left: two vectors, or one.
fn columns<S: Simd>(left: usize) -> usize {
    if left > S::F32_LANES { 2 * S::F32_LANES } else { S::F32_LANES }
}

/// [`strip`] for a panel whose width comes from [`columns`].
#[inline(always)]
pub(super) fn panel<S: Simd, const ROW: usize>(
    simd: S,
    columns: usize,
    left: Left<'_, f32, ROW>,
    right: Right<'_, f32>,
    mut target: Products<'_>,
) {
    if columns == S::F32_LANES {
        strip::<_, 1, _>(F32(simd), left, right, &mut target);
    } else {
        strip::<_, 2, _>(F32(simd), left, right, &mut target);
    }
}

impl Sequence<'_> {
    /// Head `head` of a token's row, which has the heads of queries, then those of keys, then those of values.
    #[inline(always)]
    fn part(&self, head: usize, token: usize) -> &[f32] {
        let width = self.attention.width;
        &self.qkv[token * self.row + head * width..][..width]
    }

    /// A token's query or key, normalised if the layer does so, and rotated by its position. `out` is a buffer for
    /// the result.
    #[inline(always)]
    fn rotated<'b, S: Simd>(
        &'b self,
        simd: S,
        head: usize,
        norm: Option<&Norm>,
        token: usize,
        out: &'b mut [f32],
    ) -> &'b [f32] {
        let x = self.part(head, token);
        let half = x.len() / 2;
        let angles =
            self.rotation.map(|(cos, sin)| (&cos[token * half..][..half], &sin[token * half..][..half]));
        match (norm, angles) {
            (None, None) => return x,
            (None, Some(angles)) => rotate(x, angles, out),
            (Some(norm), angles) => {
                let (weight, scale) = norm.rms(simd, x);
                for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                    *out = x * scale * weight;
                }
                if let Some((cos, sin)) = angles {
                    let (x1, x2) = out.split_at_mut(half);
                    for i in 0..half {
                        (x1[i], x2[i]) = (x1[i] * cos[i] - x2[i] * sin[i], x2[i] * cos[i] + x1[i] * sin[i]);
                    }
                }
            }
        }
        out
    }

    /// Packs the keys and values of head `key`.
    #[inline(always)]
    fn pack_keys<S: Simd>(&self, simd: S, key: usize, buffers: &mut Buffers) {
        let Attention { heads, keys: all, width, ref norms, .. } = *self.attention;
        let Buffers { rows, keys, values, .. } = buffers;
        rows.resize(4 * width, 0.0);
        keys.start(width, F32::<S>::HEIGHT);
        let norm = norms.as_ref().map(|[_, of_keys]| of_keys);
        for token in 0..self.length {
            keys.push(self.rotated(simd, heads + key, norm, token, &mut rows[..width]));
        }
        let stride = width.next_multiple_of(S::F32_LANES);
        values.resize(values.len().max(self.length * stride), 0.0);
        for (token, row) in values.chunks_exact_mut(stride).take(self.length).enumerate() {
            copy(simd, self.part(heads + all + key, token), row);
        }
    }

    /// Writes the result of head `head`, `[length, width]`, to `out`, with rows `hidden` elements apart. Its keys and
    /// values are packed.
    #[inline(always)]
    fn head<S: Simd>(
        &self,
        simd: S,
        mask: Mask,
        head: usize,
        bias: Bias<'_>,
        out: &mut [f32],
        buffers: &mut Buffers,
    ) {
        let Self { hidden, length, attention: &Attention { width, .. }, .. } = *self;
        let (before, after) = mask.bounds(length);
        let Buffers { rows, queries, keys, values, scores, factors, positions } = buffers;
        let stride = width.next_multiple_of(S::F32_LANES);
        if let Some(terms) = &bias.positions {
            terms.start(simd, keys, length, positions);
        }
        let mut first = 0;
        while first < length {
            let columns = columns::<S>(length - first);
            let count = columns.min(length - first);
            self.pack_queries(simd, head, first..first + count, columns, rows, queries);
            // The keys that any of these queries attends to, beginning at the first key of a tile.
            let from = keys.tile(first.saturating_sub(before));
            let to = (first + count + after).min(length);
            scores.resize(scores.len().max((to - from) * columns), 0.0);
            let scores = &mut scores[..(to - from) * columns];
            panel(
                simd,
                columns,
                keys.some(from..to, 0..width),
                Right { x: queries, stride: columns, ahead: &[] },
                Products { out: scores, stride: columns, width: columns, start: Start::Zero, factors: None },
            );
            if let Some((span, distances)) = bias.distances {
                for (key, scores) in (from..to).zip(scores.chunks_exact_mut(columns)) {
                    add(simd, &mut scores[..count], &distances[first + span - 1 - key..][..count]);
                }
            }
            if let Some(pairs) = bias.pairs {
                for (key, scores) in (from..to).zip(scores.chunks_exact_mut(columns)) {
                    add(simd, &mut scores[..count], &pairs[key * length + first..][..count]);
                }
            }
            if let Some(terms) = &bias.positions {
                terms.add(simd, first..first + count, from..to, (queries, columns), scores, positions);
            }
            if !mask.is_full(length) {
                for (key, scores) in (from..to).zip(scores.chunks_exact_mut(columns)) {
                    for (query, score) in (first..).zip(scores) {
                        if key + before < query || key > query + after {
                            *score = f32::NEG_INFINITY;
                        }
                    }
                }
            }
            if let Some(masked) = self.masked {
                for (key, scores) in (from..to).zip(scores.chunks_exact_mut(columns)) {
                    if masked[key] {
                        scores.fill(f32::NEG_INFINITY);
                    }
                }
            }
            factors.resize(2 * S::F32_LANES, 0.0);
            match columns == S::F32_LANES {
                true => softmax::<S, 1>(simd, scores, factors),
                false => softmax::<S, 2>(simd, scores, factors),
            }
            let left = Left::columns(F32(simd), scores, columns, count, to - from);
            for column in (0..width).step_by(2 * S::F32_LANES) {
                let columns = self::columns::<S>(width - column);
                let target = Products {
                    out: &mut out[first * hidden + column..],
                    stride: hidden,
                    width: columns.min(width - column),
                    start: Start::Zero,
                    factors: Some(factors),
                };
                let right = Right { x: &values[from * stride + column..], stride, ahead: &[] };
                panel(simd, columns, left, right, target);
            }
            first += count;
        }
    }

    /// Writes queries scaled, rotated and transposed, four at a time where possible; zeros right of the last.
    #[inline(always)]
    fn pack_queries<S: Simd>(
        &self,
        simd: S,
        head: usize,
        tokens: Range<usize>,
        columns: usize,
        rows: &mut [f32],
        queries: &mut AVec<f32>,
    ) {
        let Attention { width, scale, ref norms, .. } = *self.attention;
        let norm = norms.as_ref().map(|[of_queries, _]| of_queries);
        queries.resize(width * columns, 0.0);
        let whole = if width.is_multiple_of(4) { tokens.len() / 4 * 4 } else { 0 };
        for column in (0..whole).step_by(4) {
            let [a, b, c, d] = {
                let mut rows = rows.chunks_exact_mut(width);
                [0, 1, 2, 3].map(|i| {
                    let row = rows.next().expect("`rows` has room for four");
                    self.rotated(simd, head, norm, tokens.start + column + i, row).as_chunks::<4>().0
                })
            };
            let fours = a.iter().zip(b).zip(c).zip(d);
            for (out, (((a, b), c), d)) in queries.chunks_exact_mut(4 * columns).zip(fours) {
                for i in 0..4 {
                    let out = &mut out[i * columns + column..][..4];
                    out.copy_from_slice(&[a[i] * scale, b[i] * scale, c[i] * scale, d[i] * scale]);
                }
            }
        }
        for column in whole..tokens.len() {
            let query = self.rotated(simd, head, norm, tokens.start + column, &mut rows[..width]);
            for (row, x) in queries.chunks_exact_mut(columns).zip(query) {
                row[column] = x * scale;
            }
        }
        for row in queries.chunks_exact_mut(columns) {
            row[tokens.len()..].fill(0.0);
        }
    }
}

/// Writes x to `out`, rotated by the angles with these cosines and sines.
#[inline(always)]
fn rotate(x: &[f32], (cos, sin): (&[f32], &[f32]), out: &mut [f32]) {
    let half = x.len() / 2;
    let ((x1, x2), (out1, out2)) = (x.split_at(half), out.split_at_mut(half));
    for i in 0..half {
        out1[i] = x1[i] * cos[i] - x2[i] * sin[i];
        out2[i] = x2[i] * cos[i] + x1[i] * sin[i];
    }
}

/// Replaces each column's scores, `W` vectors wide, by e^(score - the column's maximum) and writes 1 / their sum to
/// `factors`. -inf becomes e^-87, which does not change a sum of at least 1.
#[inline(always)]
fn softmax<S: Simd, const W: usize>(simd: S, scores: &mut [f32], factors: &mut [f32]) {
    let (rows, _) = S::as_mut_simd_f32s(scores).0.as_chunks_mut::<W>();
    let mut abs_max = [simd.splat_f32s(f32::NEG_INFINITY); W];
    for row in &*rows {
        for w in 0..W {
            abs_max[w] = simd.max_f32s(abs_max[w], row[w]);
        }
    }
    let mut sums = [simd.splat_f32s(0.0); W];
    for row in rows {
        for w in 0..W {
            row[w] = exp(simd, simd.sub_f32s(row[w], abs_max[w]));
            sums[w] = simd.add_f32s(sums[w], row[w]);
        }
    }
    let (factors, _) = S::as_mut_simd_f32s(factors);
    for (factor, sum) in factors.iter_mut().zip(sums) {
        *factor = simd.div_f32s(simd.splat_f32s(1.0), sum);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::matmul::tests::{by_each_width, random};
    use super::super::{Embedding, NormKind, Pooling, Slot, Workspace};
    use super::*;

    const CPU: Device = Device::Cpu;

    pub fn batch(lengths: &[usize]) -> Packed {
        let texts: Vec<(Vec<u32>, Option<Vec<u32>>)> = lengths
            .iter()
            .map(|&n| {
                let types = (n % 2 == 0).then(|| (0..n as u32).map(|i| i % 2).collect());
                ((0..n as u32).map(|i| i * 7 % 90).collect(), types)
            })
            .collect();
        let texts: Vec<_> = texts.iter().map(|(ids, types)| (&ids[..], types.as_deref())).collect();
        Packed::new(&texts)
    }

    pub struct Alone<'a> {
        pub attention: &'a Attention,
        pub rotation: Option<&'a Rotation>,
        pub batch: &'a Packed,
        pub qkv: &'a [f32],
    }

    impl WithSimd for Alone<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let Self { attention, rotation, batch, qkv } = self;
            let mut out = vec![f32::NAN; batch.tokens() * attention.heads * attention.width];
            let mut buffers = Buffers::new();
            Run { attention, rotation, batch, qkv, out: &mut out, buffers: &mut buffers }.with_simd(simd);
            out
        }
    }

    pub fn tensor(rows: usize, width: usize, seed: u32) -> Tensor {
        Tensor::from_vec(random(rows * width, seed), (rows, width), &CPU).unwrap()
    }

    pub fn near(fused: &Tensor, plain: &Tensor) {
        assert_eq!(fused.dims(), plain.dims());
        let worst = (fused - plain).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(worst < 1e-5, "{worst}");
    }

    /// Other devices run Candle's operations: both forms must agree, for every vector width of the CPU.
    #[test]
    fn fused_attention_matches_candle() {
        let packed = batch(&[1, 2, 17, 17, 33, 70, 130]);
        let workspace = Workspace::default();
        for (heads, width) in [(1, 8), (3, 16), (2, 20), (2, 64)] {
            let qkv = tensor(packed.tokens(), 3 * heads * width, 5);
            for mask in [Mask::Full, Mask::Window(3), Mask::Window(40), Mask::Causal] {
                let rope = Rope { theta: 10_000.0, scaling_factor: 1.0 };
                let rotation = Rotation::new(rope, 130, width, DType::F32, &CPU).unwrap();
                for rotation in [None, Some(&rotation)] {
                    let attention = Attention::new(heads, width, mask);
                    both_forms_agree(&attention, &qkv, rotation, &packed, &workspace);
                }
            }
        }
    }

    fn both_forms_agree(
        attention: &Attention,
        qkv: &Tensor,
        rotation: Option<&Rotation>,
        packed: &Packed,
        workspace: &Workspace,
    ) {
        let fused = attention.forward(qkv, None, rotation, packed, workspace.at(Slot::Mixed, &CPU)).unwrap();
        let plain = attention.tensors(qkv, rotation, packed).unwrap();
        near(&fused, &plain);
        let numbers = host(qkv).unwrap();
        let alone = || Alone { attention, rotation, batch: packed, qkv: &numbers };
        for out in by_each_width(alone) {
            near(&Tensor::from_vec(out, plain.dims(), &CPU).unwrap(), &plain);
        }
    }

    fn rms_norm(width: usize, seed: u32) -> Norm {
        let weight = Tensor::from_vec(random(width, seed), width, &CPU).unwrap();
        let tensors = [("weight".to_owned(), weight)].into_iter().collect();
        let vb = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &CPU);
        Norm::load(width, NormKind::RmsPlusOne, 1e-6, vb).unwrap()
    }

    /// Groups of queries with normalised queries and keys, as in decoders.
    #[test]
    fn fused_attention_in_groups_matches_candle() {
        let packed = batch(&[1, 2, 17, 17, 33, 70]);
        let workspace = Workspace::default();
        for (heads, keys, width) in [(4, 2, 8), (3, 1, 20), (2, 2, 16), (6, 2, 64)] {
            let qkv = tensor(packed.tokens(), (heads + 2 * keys) * width, 5);
            for mask in [Mask::Full, Mask::Window(3), Mask::Causal, Mask::CausalWindow(7)] {
                let rope = Rope { theta: 1_000_000.0, scaling_factor: 8.0 };
                let rotation = Rotation::new(rope, 70, width, DType::F32, &CPU).unwrap();
                for rotation in [None, Some(&rotation)] {
                    let norms = Some([rms_norm(width, 8), rms_norm(width, 9)]);
                    let attention =
                        Attention { keys, scale: 0.3, norms, ..Attention::new(heads, width, mask) };
                    both_forms_agree(&attention, &qkv, rotation, &packed, &workspace);
                }
            }
        }
    }

    /// Query head h attends to key head h / (heads / keys): repeating the keys changes nothing.
    #[test]
    fn a_group_of_queries_shares_its_keys() {
        let packed = batch(&[3, 9]);
        let (heads, keys, width) = (4, 2, 8);
        let qkv = tensor(packed.tokens(), (heads + 2 * keys) * width, 5);
        let head = |index: usize| qkv.narrow(1, index * width, width).unwrap();
        let order = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7].map(head);
        let repeated = Tensor::cat(&order, 1).unwrap();
        let plain = Attention::new(heads, width, Mask::Causal);
        let want = plain.tensors(&repeated, None, &packed).unwrap();
        let grouped = Attention { keys, ..Attention::new(heads, width, Mask::Causal) };
        near(&grouped.tensors(&qkv, None, &packed).unwrap(), &want);
    }

    #[test]
    fn a_bias_by_distance_is_added_to_the_scores() {
        let packed = batch(&[1, 2, 17, 33, 70, 130]);
        let workspace = Workspace::default();
        for (heads, width) in [(1, 8), (3, 16)] {
            let qkv = tensor(packed.tokens(), 3 * heads * width, 5);
            let distances = Arc::new(DistanceBias::new(&tensor(32, heads, 9), 128, 140).unwrap());
            for mask in [Mask::Full, Mask::Window(3), Mask::Causal] {
                let distances = Some(Arc::clone(&distances));
                let attention = Attention { distances, ..Attention::new(heads, width, mask) };
                let out = workspace.at(Slot::Mixed, &CPU);
                let fused = attention.forward(&qkv, None, None, &packed, out).unwrap();
                near(&fused, &attention.tensors(&qkv, None, &packed).unwrap());
            }
            let without = Attention::new(heads, width, Mask::Full);
            let with = Attention { distances: Some(distances), ..Attention::new(heads, width, Mask::Full) };
            let difference = (without.tensors(&qkv, None, &packed).unwrap()
                - with.tensors(&qkv, None, &packed).unwrap())
            .unwrap();
            assert!(difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 1e-2);
        }
    }

    #[test]
    fn a_bias_of_pairs_is_added() {
        let (heads, width, length) = (3, 16, 37);
        let table = tensor(heads * length, length, 9).reshape((heads, length, length)).unwrap();
        let packed = Packed::of_lengths(&[length, length]);
        let qkv = tensor(packed.tokens(), 3 * heads * width, 5);
        let pairs = Some(Arc::new(PairBias::new(&table).unwrap()));
        let with = Attention { pairs, ..Attention::new(heads, width, Mask::Full) };
        both_forms_agree(&with, &qkv, None, &packed, &Workspace::default());
        let plain = Attention::new(heads, width, Mask::Full).tensors(&qkv, None, &packed).unwrap();
        let difference = (plain - with.tensors(&qkv, None, &packed).unwrap()).unwrap();
        assert!(difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 1e-2);
    }

    /// A masked token changes no result but its own.
    #[test]
    fn masked_tokens_are_not_attended_to() {
        let (heads, width, lengths) = (3, 16, [2, 17, 33, 33, 70]);
        let masks: Vec<Vec<bool>> =
            lengths.iter().map(|&length| (0..length).map(|token| token % 5 == 1).collect()).collect();
        let masks: Vec<&[bool]> = masks.iter().map(Vec::as_slice).collect();
        let packed = Packed::of_lengths(&lengths).masking(&masks);
        let workspace = Workspace::default();
        let qkv = tensor(packed.tokens(), 3 * heads * width, 5);
        let distances = Arc::new(DistanceBias::new(&tensor(32, heads, 9), 128, 70).unwrap());
        for distances in [None, Some(distances)] {
            let attention = Attention { distances, ..Attention::new(heads, width, Mask::Full) };
            both_forms_agree(&attention, &qkv, None, &packed, &workspace);
        }
        let attention = Attention::new(heads, width, Mask::Full);
        let kept: Vec<u32> =
            (0..).zip(packed.masked().unwrap()).filter(|(_, masked)| !**masked).map(|(i, _)| i).collect();
        let kept = Tensor::new(&kept[..], &CPU).unwrap();
        let want = attention
            .tensors(&qkv.index_select(&kept, 0).unwrap(), None, &Packed::of_lengths(&[1, 13, 26, 26, 56]))
            .unwrap();
        let found = attention.tensors(&qkv, None, &packed).unwrap().index_select(&kept, 0).unwrap();
        near(&found, &want);
    }

    #[test]
    fn distances_fall_into_the_buckets_of_t5() {
        let of = |distance| bucket(distance, 32, 128);
        assert_eq!([0, 1, 7, 8, 11, 12, 16, 127, 128, 500].map(of), [0, 1, 7, 8, 8, 9, 10, 15, 15, 15]);
        assert_eq!([-1, -7, -8, -500].map(of), [17, 23, 24, 31]);
    }

    /// The slopes of the paper's own code for 8 heads and for 12.
    #[test]
    fn alibi_lowers_scores_by_slope_and_distance() {
        let of = |heads| slopes(heads).into_iter().map(f64::from).map(f64::log2).collect::<Vec<_>>();
        assert_eq!(of(8), [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0]);
        assert_eq!(of(12)[..8], of(8));
        for (got, want) in of(12)[8..].iter().zip([-0.5, -1.5, -2.5, -3.5]) {
            assert!((got - want).abs() < 1e-6, "{got}");
        }
        let bias = DistanceBias::alibi(8, 5, &CPU).unwrap();
        let rows = bias.tensor(3, DType::F32).unwrap().to_vec3::<f32>().unwrap();
        assert_eq!(rows[1], [[0.0, -0.25, -0.5], [-0.25, 0.0, -0.25], [-0.5, -0.25, 0.0]]);
    }

    #[test]
    fn fused_embedding_and_pooling_match_candle() {
        let packed = batch(&[1, 2, 17, 17, 33, 70]);
        let workspace = Workspace::default();
        let vars = candle_nn::VarMap::new();
        let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &CPU);
        let mut embedding = Embedding {
            word: tensor(100, 20, 1),
            positions: Some((tensor(80, 20, 2), 2)),
            types: Some(tensor(2, 20, 3)),
            scale: None,
            norm: Some(Norm::load(20, NormKind::Layer { bias: true }, 1e-5, vb).unwrap()),
        };
        let fused = |embedding: &Embedding| {
            let x = embedding.forward(&packed, workspace.at(Slot::Stream, &CPU)).unwrap();
            near(&x, &embedding.tensors(&packed, &CPU).unwrap());
            x
        };
        fused(&embedding);
        (embedding.scale, embedding.norm) = (Some(4.5), None);
        let x = fused(&embedding);
        for pooling in Pooling::ALL {
            let fused = crate::pool(&[pooling], &x, &packed, workspace.at(Slot::Pooled, &CPU)).unwrap();
            near(&fused, &pooling.tensors(&x, &packed).unwrap());
        }
    }
}
