//! Scores of spans of words for labels: relu(start + end) · label, plus a number of the label's own. On a GPU that is by
//! Candle's operations: most of the time goes into a multiplication, which is Candle's in any case.

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor};
use pulp::{Simd, WithSimd};

use super::simd::dispatch;
use super::{floats, upload};

/// Labels whose sums are accumulated at the same time.
const LABELS: usize = 4;

/// First and last word of each span of at most `width` words, in the order of the first, then of the last.
pub fn spans(words: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..words).flat_map(move |first| (first..(first + width).min(words)).map(move |last| (first, last)))
}

/// Number of [`spans`].
pub fn count_spans(words: usize, width: usize) -> usize {
    let width = width.min(words);
    width * (words - width) + width * (width + 1) / 2
}

/// The logits of all spans for all labels, sequence after sequence: for each of [`spans`], one per label, in f32.
///
/// `starts` and `ends`, `[words, inner]`, have a row for each word of all sequences. `labels`, `[sequences × labels,
/// inner + 1]`, has a row for each sequence and label, with the label's own number at its end. `words`: number of words
/// of each sequence.
pub fn span_logits(
    starts: &Tensor,
    ends: &Tensor,
    labels: &Tensor,
    words: &[usize],
    width: usize,
) -> Result<Tensor> {
    if starts.device().is_cpu() {
        fused(starts, ends, labels, words, width)
    } else {
        of_tensors(starts, ends, labels, words, width)
    }
}

fn fused(starts: &Tensor, ends: &Tensor, labels: &Tensor, words: &[usize], width: usize) -> Result<Tensor> {
    let (inner, count) = (starts.dim(1)?, labels.dim(0)? / words.len());
    let (starts, ends, labels) =
        (starts.storage_and_layout(), ends.storage_and_layout(), labels.storage_and_layout());
    let [starts, ends, labels] = [&starts, &ends, &labels].map(|(storage, layout)| on_host(storage, layout));
    let (mut starts, mut ends, mut labels) = (starts?, ends?, labels?);
    let total: usize = words.iter().map(|&words| count_spans(words, width) * count).sum();
    let mut out = vec![0.0; total];
    let mut rest = &mut out[..];
    for &words in words {
        let (of_starts, of_ends, of_labels, logits);
        (of_starts, starts) = starts.split_at(words * inner);
        (of_ends, ends) = ends.split_at(words * inner);
        (of_labels, labels) = labels.split_at(count * (inner + 1));
        (logits, rest) = rest.split_at_mut(count_spans(words, width) * count);
        dispatch(Score { starts: of_starts, ends: of_ends, labels: of_labels, logits, words, width, inner });
    }
    Tensor::from_vec(out, total, &Device::Cpu)
}

fn on_host<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    let Storage::Cpu(storage @ CpuStorage::F32(_)) = storage else {
        candle_core::bail!("the scores of spans need f32 on the CPU")
    };
    floats(storage, layout)
}

/// The spans of one sequence.
struct Score<'a> {
    starts: &'a [f32],
    ends: &'a [f32],
    labels: &'a [f32],
    logits: &'a mut [f32],
    words: usize,
    width: usize,
    inner: usize,
}

impl WithSimd for Score<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { starts, ends, labels, logits, words, width, inner } = self;
        let count = labels.len() / (inner + 1);
        for ((first, last), logits) in spans(words, width).zip(logits.chunks_mut(count)) {
            let (start, end) = (&starts[first * inner..][..inner], &ends[last * inner..][..inner]);
            let several = labels.chunks(LABELS * (inner + 1)).zip(logits.chunks_mut(LABELS));
            for (labels, logits) in several {
                match logits.len() {
                    LABELS => some::<S, LABELS>(simd, start, end, labels, logits),
                    _ => {
                        for (label, logit) in labels.chunks(inner + 1).zip(logits.chunks_mut(1)) {
                            some::<S, 1>(simd, start, end, label, logit);
                        }
                    }
                }
            }
        }
    }
}

/// The logits of one span for `N` labels.
#[inline(always)]
fn some<S: Simd, const N: usize>(simd: S, start: &[f32], end: &[f32], labels: &[f32], logits: &mut [f32]) {
    let inner = start.len();
    let zero = simd.splat_f32s(0.0);
    let label = |at: usize| &labels[at * (inner + 1)..][..inner];
    let (starts, start_rest) = S::as_simd_f32s(start);
    let (ends, end_rest) = S::as_simd_f32s(end);
    let vectors: [_; N] = std::array::from_fn(|at| S::as_simd_f32s(label(at)).0);
    let mut sums = [zero; N];
    for (i, (&start, &end)) in starts.iter().zip(ends).enumerate() {
        // If an operand is NaN, x86's max returns the second one: this order keeps NaN.
        let x = simd.max_f32s(zero, simd.add_f32s(start, end));
        for (sum, vectors) in sums.iter_mut().zip(&vectors) {
            *sum = simd.mul_add_e_f32s(x, vectors[i], *sum);
        }
    }
    if !start_rest.is_empty() {
        let load = |x: &[f32]| simd.partial_load_f32s(x);
        let x = simd.max_f32s(zero, simd.add_f32s(load(start_rest), load(end_rest)));
        for (at, sum) in sums.iter_mut().enumerate() {
            *sum = simd.mul_add_e_f32s(x, load(S::as_simd_f32s(label(at)).1), *sum);
        }
    }
    for (at, (logit, sum)) in logits.iter_mut().zip(sums).enumerate() {
        *logit = simd.reduce_sum_f32s(sum) + labels[at * (inner + 1) + inner];
    }
}

/// The unfused form, by Candle's own operations.
fn of_tensors(
    starts: &Tensor,
    ends: &Tensor,
    labels: &Tensor,
    words: &[usize],
    width: usize,
) -> Result<Tensor> {
    let (inner, device) = (starts.dim(1)?, starts.device());
    let count = labels.dim(0)? / words.len();
    let (mut before, mut all) = (0, Vec::with_capacity(words.len()));
    for (sequence, &words) in words.iter().enumerate() {
        let (first, last): (Vec<u32>, Vec<u32>) = spans(words, width)
            .map(|(first, last)| ((before + first) as u32, (before + last) as u32))
            .unzip();
        before += words;
        let spans = first.len();
        let rows = upload(&[first, last].concat(), device)?;
        let starts = starts.index_select(&rows.narrow(0, 0, spans)?, 0)?;
        let ends = ends.index_select(&rows.narrow(0, spans, spans)?, 0)?;
        let labels = labels.narrow(0, sequence * count, count)?;
        let own = labels.narrow(1, inner, 1)?.t()?.contiguous()?;
        let labels = labels.narrow(1, 0, inner)?.t()?.contiguous()?;
        let logits = (starts + ends)?.relu()?.matmul(&labels)?.broadcast_add(&own)?;
        all.push(logits.flatten_all()?.to_dtype(DType::F32)?);
    }
    Tensor::cat(&all, 0)
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::random;
    use super::*;

    #[test]
    fn spans_are_counted() {
        for (words, width) in [(1, 1), (1, 12), (3, 2), (12, 12), (30, 12), (5, 1)] {
            assert_eq!(spans(words, width).count(), count_spans(words, width), "{words} {width}");
        }
        assert_eq!(spans(3, 2).collect::<Vec<_>>(), [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)]);
    }

    #[test]
    fn the_fused_form_equals_that_of_tensors() {
        for (inner, labels, words) in [(21, 1, vec![1]), (64, 6, vec![5, 1, 13]), (7, 4, vec![2])] {
            let all: usize = words.iter().sum();
            let tensor = |rows: usize, width: usize, seed| {
                Tensor::from_vec(random(rows * width, seed), (rows, width), &Device::Cpu).unwrap()
            };
            let (starts, ends) = (tensor(all, inner, 1), tensor(all, inner, 2));
            let labels = tensor(words.len() * labels, inner + 1, 3);
            let got = fused(&starts, &ends, &labels, &words, 4).unwrap();
            let want = of_tensors(&starts, &ends, &labels, &words, 4).unwrap();
            let error = (got - want).unwrap().abs().unwrap().max_all().unwrap();
            assert!(error.to_scalar::<f32>().unwrap() < 1e-5, "{inner} {words:?}");
        }
    }
}
