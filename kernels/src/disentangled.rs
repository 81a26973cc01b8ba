//! Disentangled attention (DeBERTa, arXiv:2006.03654, section 3.1): besides query · key, a score has terms that depend on
//! the distance from the key to the query. Content-to-position is query · (the distance's key), position-to-content is
//! key · (the distance's query). Distances share [`Buckets`]; the keys and queries of the buckets are fixed tables.

use std::ops::Range;
use std::sync::Arc;

use aligned_vec::AVec;
use candle_core::{D, Result, Tensor};
use pulp::Simd;

use super::attention::panel;
use super::matmul::{Products, Start};
use super::simd::add;
use super::tile::{F32, Kernel, LINE, PackedA, Right};
use super::{host, upload};

/// Which row of a table of `2 × span` rows belongs to a distance `query - key`.
#[derive(Debug)]
pub struct Buckets {
    /// The row of each distance from `-(longest - 1)` to `longest - 1`; it never falls from one distance to the next.
    rows: Vec<u32>,
    /// Longest sequence.
    longest: usize,
    span: usize,
    /// Up to this distance, in both directions, the row is `span + distance`.
    exact: usize,
}

impl Buckets {
    /// For sequences of at most `longest` tokens. `max_distance`: distances beyond half of the span share buckets whose
    /// widths grow logarithmically, so that this distance would be the last; `None` for a row per distance. Distances
    /// beyond the table have its first or last row.
    pub fn new(span: usize, max_distance: Option<usize>, longest: usize) -> Self {
        let row = |distance: i64| {
            let bucket = match max_distance {
                Some(max) => log_bucket(distance, span, max),
                None => distance,
            };
            (bucket + span as i64).clamp(0, 2 * span as i64 - 1) as u32
        };
        let last = longest as i64 - 1;
        let exact =
            |&distance: &i64| [distance, -distance].iter().all(|&d| i64::from(row(d)) == d + span as i64);
        let exact = (1..=last).take_while(exact).count();
        Self { rows: (-last..=last).map(row).collect(), longest, span, exact }
    }

    /// The rows of the distances of a sequence of `length` tokens, from `-(length - 1)` to `length - 1`.
    fn of(&self, length: usize) -> &[u32] {
        &self.rows[self.longest - length..][..2 * length - 1]
    }
}

/// A distance's bucket, from -span to span and beyond if the distance is larger than `max_distance - 1`: the distance
/// itself up to half of the span, then ranges that grow logarithmically (arXiv:2111.09543, as transformers computes it,
/// in f32).
fn log_bucket(distance: i64, span: usize, max_distance: usize) -> i64 {
    let (half, away) = ((span / 2) as i64, distance.abs());
    if away <= half {
        return distance;
    }
    let log = |x: i64| (x as f32 / half as f32).ln();
    let steps = log(away) / log(max_distance as i64 - 1) * (half - 1) as f32;
    distance.signum() * (steps.ceil() as i64 + half)
}

/// The terms of a layer's attention that depend on distances.
pub struct Disentangled {
    buckets: Arc<Buckets>,
    /// Terms of a score, query · key included.
    terms: usize,
    tables: Tables,
}

/// The keys of the buckets, for content-to-position, and their queries, for position-to-content.
enum Tables {
    Host {
        /// `[heads, 2 × span, width]`.
        keys: Option<Vec<f32>>,
        /// `[heads, width, stride]`, multiplied with the scale of scores.
        queries: Option<AVec<f32>>,
        stride: usize,
    },
    /// `[heads, 2 × span, width]`, for other devices.
    Tensors {
        keys: Option<Tensor>,
        queries: Option<Tensor>,
        /// [`Buckets::rows`].
        #[cfg(any(feature = "cuda", test))]
        rows: Tensor,
    },
}

/// A layer's tables on a device, as the CUDA kernel reads them.
#[cfg(any(feature = "cuda", test))]
pub(super) struct OnDevice<'a> {
    /// `[heads, 2 × span, width]`.
    pub keys: Option<&'a Tensor>,
    pub queries: Option<&'a Tensor>,
    /// The row of each distance from `-(longest - 1)` to `longest - 1`.
    pub rows: &'a Tensor,
    pub longest: usize,
    pub span: usize,
}

impl Disentangled {
    /// `keys` and `queries`, `[2 × span, hidden]`, have a row for each bucket; `None` leaves that term out.
    pub fn new(
        heads: usize,
        keys: Option<&Tensor>,
        queries: Option<&Tensor>,
        buckets: Arc<Buckets>,
    ) -> Result<Self> {
        let mut new = Self::on_device(heads, keys, queries, buckets)?;
        if keys.into_iter().chain(queries).all(|table| table.device().is_cpu()) {
            new.tables = new.on_host()?;
        }
        Ok(new)
    }

    pub(super) fn on_device(
        heads: usize,
        keys: Option<&Tensor>,
        queries: Option<&Tensor>,
        buckets: Arc<Buckets>,
    ) -> Result<Self> {
        let by_head = |table: &Tensor| {
            let (rows, hidden) = table.dims2()?;
            table.reshape((rows, heads, hidden / heads))?.transpose(0, 1)?.contiguous()
        };
        let terms = 1 + usize::from(keys.is_some()) + usize::from(queries.is_some());
        #[cfg(any(feature = "cuda", test))]
        let rows = upload(&buckets.rows, keys.or(queries).map_or(&candle_core::Device::Cpu, Tensor::device))?;
        let tables = Tables::Tensors {
            keys: keys.map(by_head).transpose()?,
            queries: queries.map(by_head).transpose()?,
            #[cfg(any(feature = "cuda", test))]
            rows,
        };
        Ok(Self { buckets, terms, tables })
    }

    fn on_host(&self) -> Result<Tables> {
        let Tables::Tensors { keys, queries, .. } = &self.tables else {
            candle_core::bail!("the tables are on the host already")
        };
        let rows = 2 * self.buckets.span;
        // A line more than needed: the last panel may begin at any line, and rows that are a power of two apart would
        // share few sets of the L1 cache.
        let stride = rows.next_multiple_of(LINE) + LINE;
        let keys = keys.as_ref().map(host).transpose()?;
        let queries = match queries {
            Some(table) => {
                let scale = self.scale(table.dim(2)?);
                let mut padded = AVec::with_capacity(0, table.elem_count() / rows * stride);
                for row in host(&table.transpose(1, 2)?)?.chunks(rows) {
                    row.iter().for_each(|x| padded.push(x * scale));
                    padded.resize(padded.len() + stride - rows, 0.0);
                }
                Some(padded)
            }
            None => None,
        };
        Ok(Tables::Host { keys, queries, stride })
    }

    /// What scores are multiplied with: 1 / √(width × number of terms).
    pub fn scale(&self, width: usize) -> f32 {
        1.0 / ((width * self.terms) as f32).sqrt()
    }

    /// Adds the terms to `scores`, `[sequences, heads, length, length]`, by Candle's own operations; `q` and `k` are
    /// `[sequences, heads, length, width]`.
    pub(super) fn add(&self, scores: Tensor, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        let Tables::Tensors { keys, queries, .. } = &self.tables else {
            candle_core::bail!("the tables of positions are on the CPU, but queries are not")
        };
        let length = q.dim(2)?;
        let scale = f64::from(self.scale(q.dim(3)?));
        // Only the rows that the distances of such a sequence have.
        let rows = self.buckets.of(length);
        let (low, high) = (rows[0] as usize, rows[rows.len() - 1] as usize);
        let product = |x: &Tensor, table: &Tensor, rows: &[u32]| {
            let table = table.narrow(1, low, high + 1 - low)?.transpose(1, 2)?.unsqueeze(0)?;
            let product = (x.broadcast_matmul(&table)? * scale)?;
            diagonals(&product.index_select(&upload(rows, x.device())?, D::Minus1)?)
        };
        let mut scores = scores;
        if let Some(keys) = keys {
            let descending: Vec<u32> = rows.iter().rev().map(|&row| row - low as u32).collect();
            scores = (scores + product(q, keys, &descending)?)?;
        }
        if let Some(queries) = queries {
            let ascending: Vec<u32> = rows.iter().map(|&row| row - low as u32).collect();
            scores = (scores + product(k, queries, &ascending)?.transpose(2, 3)?)?;
        }
        Ok(scores)
    }

    /// The tables, unless they are on the host.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn on_gpu(&self) -> Option<OnDevice<'_>> {
        let Tables::Tensors { keys, queries, rows } = &self.tables else { return None };
        let Buckets { longest, span, .. } = *self.buckets;
        Some(OnDevice { keys: keys.as_ref(), queries: queries.as_ref(), rows, longest, span })
    }

    /// The tables of one head, if they are on the host.
    pub(super) fn head(&self, head: usize, width: usize) -> Option<Head<'_>> {
        let Tables::Host { keys, queries, stride } = &self.tables else { return None };
        let rows = 2 * self.buckets.span * width;
        Some(Head {
            buckets: &self.buckets,
            keys: keys.as_ref().map(|keys| &keys[head * rows..][..rows]),
            queries: queries.as_ref().map(|queries| &queries[head * width * stride..][..width * stride]),
            stride: *stride,
            width,
        })
    }
}

/// `[…, length, 2 × length - 1]` to `[…, length, length]`: element (r, c) of the result is the row r's element for the
/// offset c - r, where the elements are those of the offsets from -(length - 1) to length - 1. Rows that are one element
/// shorter shift by one from row to row.
fn diagonals(x: &Tensor) -> Result<Tensor> {
    let (sequences, heads, length, offsets) = x.dims4()?;
    if length == 1 {
        return Ok(x.clone());
    }
    x.reshape((sequences, heads, length * offsets))?
        .narrow(2, length - 1, length * (offsets - 1))?
        .reshape((sequences, heads, length, offsets - 1))?
        .narrow(3, 0, length)?
        .contiguous()
}

/// One head's tables.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    buckets: &'a Buckets,
    keys: Option<&'a [f32]>,
    queries: Option<&'a [f32]>,
    stride: usize,
    width: usize,
}

/// Buffers for one head of one sequence.
pub(super) struct Buffers {
    /// The keys of the sequence's buckets.
    positions: PackedA<f32>,
    /// Content-to-position: one row per bucket, one column per query of a panel.
    of_queries: AVec<f32>,
    /// Position-to-content: one row per key, one column per bucket.
    of_keys: AVec<f32>,
    /// The sequence's rows of the tables.
    rows: Range<usize>,
}

impl Buffers {
    pub fn new() -> Self {
        Self { positions: PackedA::new(), of_queries: AVec::new(0), of_keys: AVec::new(0), rows: 0..0 }
    }
}

impl Head<'_> {
    /// Prepares a sequence: packs the buckets' keys and multiplies the sequence's `keys` with the buckets' queries.
    #[inline(always)]
    pub fn start<S: Simd>(&self, simd: S, keys: &PackedA<f32>, length: usize, buffers: &mut Buffers) {
        let Self { width, stride, .. } = *self;
        let distances = self.buckets.of(length);
        // From the first element of a line.
        let rows = distances[0] as usize / LINE * LINE..distances[distances.len() - 1] as usize + 1;
        buffers.rows = rows.clone();
        if let Some(table) = self.keys {
            buffers.positions.start(width, F32::<S>::HEIGHT);
            for row in table[rows.start * width..rows.end * width].chunks_exact(width) {
                buffers.positions.push(row);
            }
        }
        let Some(table) = self.queries else { return };
        let columns = 2 * S::F32_LANES;
        let kept = rows.len().next_multiple_of(columns);
        let out = &mut buffers.of_keys;
        out.resize(out.len().max(length * kept), 0.0);
        for column in (0..rows.len()).step_by(columns) {
            // The distances of these buckets, and the keys that have a query at such a distance.
            let first = rows.start + column;
            let start = distances.partition_point(|&row| (row as usize) < first);
            let end = distances.partition_point(|&row| (row as usize) < first + columns);
            let (start, end) = (start as i64 - (length as i64 - 1), end as i64 - 1 - (length as i64 - 1));
            let from = keys.tile((-end).max(0) as usize);
            let to = (length as i64 - start).clamp(0, length as i64) as usize;
            if from >= to {
                continue;
            }
            panel(
                simd,
                columns,
                keys.some(from..to, 0..width),
                Right { x: &table[first..], stride, ahead: &[] },
                Products {
                    out: &mut out[from * kept + column..],
                    stride: kept,
                    width: columns,
                    start: Start::Zero,
                    factors: None,
                },
            );
        }
    }

    /// Adds the terms to the scores of some queries: `scores` has a row of `columns` elements for each of `keys`, with
    /// one for each query first. `packed` are the queries, scaled and transposed.
    #[inline(always)]
    pub fn add<S: Simd>(
        &self,
        simd: S,
        queries: Range<usize>,
        keys: Range<usize>,
        (packed, columns): (&[f32], usize),
        scores: &mut [f32],
        buffers: &mut Buffers,
    ) {
        let Buckets { ref rows, longest, span, exact } = *self.buckets;
        let Buffers { positions, of_queries, of_keys, rows: table } = buffers;
        let kept = table.len().next_multiple_of(2 * S::F32_LANES);
        let row = |query: usize, key: usize| rows[query + longest - 1 - key] as usize;
        let low = match self.keys {
            Some(_) => {
                let low = positions.tile(row(queries.start, keys.end - 1) - table.start);
                let high = row(queries.end - 1, keys.start) + 1 - table.start;
                of_queries.resize(of_queries.len().max((high - low) * columns), 0.0);
                panel(
                    simd,
                    columns,
                    positions.some(low..high, 0..self.width),
                    Right { x: packed, stride: columns, ahead: &[] },
                    Products {
                        out: of_queries,
                        stride: columns,
                        width: columns,
                        start: Start::Zero,
                        factors: None,
                    },
                );
                low
            }
            None => 0,
        };
        let count = queries.len();
        for (key, scores) in keys.zip(scores.chunks_exact_mut(columns)) {
            let scores = &mut scores[..count];
            // Rows of these queries' distances from the key. Most often they are consecutive.
            let is_exact = queries.start + exact >= key && queries.end - 1 <= key + exact;
            if is_exact {
                let first = span + queries.start - key - table.start;
                if self.queries.is_some() {
                    add(simd, scores, &of_keys[key * kept + first..][..count]);
                }
                if self.keys.is_some() {
                    let diagonal = of_queries[(first - low) * columns..].iter().step_by(columns + 1);
                    for (score, x) in scores.iter_mut().zip(diagonal) {
                        *score += x;
                    }
                }
            } else {
                let rows = &rows[queries.start + longest - 1 - key..][..count];
                if self.queries.is_some() {
                    let of_key = &of_keys[key * kept..][..kept];
                    for (score, &row) in scores.iter_mut().zip(rows) {
                        *score += of_key[row as usize - table.start];
                    }
                }
                if self.keys.is_some() {
                    for (column, (score, &row)) in scores.iter_mut().zip(rows).enumerate() {
                        *score += of_queries[(row as usize - table.start - low) * columns + column];
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::attention::tests::{Alone, batch, near, tensor};
    use super::super::matmul::tests::by_each_width;
    use super::super::{Attention, Mask, Packed, Slot, Workspace};
    use super::*;

    #[test]
    fn distances_have_the_rows_that_transformers_gives_them() {
        // make_log_bucket_position(distance, 256, 512) + 256, for DeBERTa v3.
        let buckets = Buckets::new(256, Some(512), 1100);
        let row = |distance: i64| buckets.rows[(distance + 1099) as usize];
        // The first shared bucket has two distances.
        assert_eq!(buckets.exact, 131);
        let distances = [0, 1, 127, 128, 129, 130, 200, 300, 511, 512, 1000];
        assert_eq!(distances.map(row), [256, 257, 383, 384, 385, 386, 425, 463, 511, 511, 511]);
        assert_eq!(distances.map(|d| row(-d)), [256, 255, 129, 128, 127, 126, 87, 49, 1, 0, 0]);
        // Without logarithmic buckets.
        let plain = Buckets::new(4, None, 10);
        assert_eq!(plain.rows, [0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7, 7, 7]);
        assert_eq!(plain.exact, 3);
    }

    /// Scores element by element, as the paper defines them, for one sequence.
    fn by_definition(
        (heads, width): (usize, usize),
        qkv: &Tensor,
        tables: [Option<&Tensor>; 2],
        buckets: &Buckets,
        mask: Mask,
    ) -> Tensor {
        let length = qkv.dim(0).unwrap();
        let rows = qkv.to_vec2::<f32>().unwrap();
        let tables = tables.map(|table| table.map(|table| table.to_vec2::<f32>().unwrap()));
        let terms = 1 + tables.iter().flatten().count();
        let (before, after) = mask.bounds(length);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let mut out = Vec::new();
        for q in 0..length {
            for head in 0..heads {
                let part = |row: &[f32], part: usize| row[(part * heads + head) * width..][..width].to_vec();
                let query = part(&rows[q], 0);
                let score = |k: usize| {
                    let at = buckets.rows[q + buckets.longest - 1 - k] as usize;
                    let key = part(&rows[k], 1);
                    let c2p = tables[0].as_ref().map_or(0.0, |keys| dot(&query, &part(&keys[at], 0)));
                    let p2c = tables[1].as_ref().map_or(0.0, |queries| dot(&key, &part(&queries[at], 0)));
                    ((dot(&query, &key) + c2p + p2c) / ((width * terms) as f64).sqrt()).exp()
                };
                let seen: Vec<usize> = (0..length).filter(|&k| k + before >= q && k <= q + after).collect();
                let weights: Vec<f64> = seen.iter().map(|&k| score(k)).collect();
                let total: f64 = weights.iter().sum();
                for i in 0..width {
                    let value = |k: usize| f64::from(part(&rows[k], 2)[i]);
                    let sum: f64 = seen.iter().zip(&weights).map(|(&k, weight)| weight * value(k)).sum();
                    out.push((sum / total) as f32);
                }
            }
        }
        Tensor::from_vec(out, (length, heads * width), &Device::Cpu).unwrap()
    }

    /// The fused form, the form for other devices and the definition agree: with each subset of the terms, with and
    /// without shared buckets, for sequences shorter and longer than the table.
    #[test]
    fn every_form_computes_the_definition() {
        let lengths: &[usize] = if cfg!(miri) { &[1, 5] } else { &[1, 2, 17, 17, 33, 70, 130] };
        let packed: Packed = batch(lengths);
        let workspace = Workspace::default();
        let spans = [(4, None), (200, None), (8, Some(20)), (32, Some(48)), (64, Some(200)), (6, Some(7))];
        for (heads, width) in [(1, 8), (2, 20), (1, 64)] {
            let qkv = tensor(packed.tokens(), 3 * heads * width, 5);
            for (span, max_distance) in spans {
                let buckets = Arc::new(Buckets::new(span, max_distance, 140));
                let (keys, queries) =
                    (tensor(2 * span, heads * width, 6), tensor(2 * span, heads * width, 7));
                for tables in
                    [[Some(&keys), Some(&queries)], [Some(&keys), None], [None, Some(&queries)], [None; 2]]
                {
                    let mask = if span == 8 { Mask::Window(9) } else { Mask::Full };
                    let attention = |terms: Disentangled| Attention {
                        scale: terms.scale(width),
                        disentangled: Some(terms),
                        ..Attention::new(heads, width, mask)
                    };
                    let new = |make: fn(_, _, _, _) -> Result<Disentangled>| {
                        attention(make(heads, tables[0], tables[1], Arc::clone(&buckets)).unwrap())
                    };
                    let (fused, plain) = (new(Disentangled::new), new(Disentangled::on_device));
                    let mut want = Vec::new();
                    let mut start = 0;
                    for length in packed.lengths() {
                        let rows = qkv.narrow(0, start, length).unwrap();
                        want.push(by_definition((heads, width), &rows, tables, &buckets, mask));
                        start += length;
                    }
                    let want = Tensor::cat(&want, 0).unwrap();
                    near(&plain.tensors(&qkv, None, &packed).unwrap(), &want);
                    let out = workspace.at(Slot::Mixed, &Device::Cpu);
                    near(&fused.forward(&qkv, None, None, &packed, out).unwrap(), &want);
                    let numbers = host(&qkv).unwrap();
                    let alone = || Alone { attention: &fused, rotation: None, batch: &packed, qkv: &numbers };
                    for out in by_each_width(alone) {
                        near(&Tensor::from_vec(out, want.dims(), &Device::Cpu).unwrap(), &want);
                    }
                }
            }
        }
    }
}
