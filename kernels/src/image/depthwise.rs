//! Depthwise convolution: each channel alone. It is a few operations per value, so that it runs as fast as the values are
//! read: a vector of channels at a time, for some neighbouring pixels, which share the weights.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{Buffers, Map, Window};
use crate::activation::{Activation, activate};
use crate::simd::dispatch;

pub struct Depthwise {
    /// `[size × size, channels]`.
    weight: Vec<f32>,
    bias: Vec<f32>,
    window: Window,
}

/// Neighbouring output pixels that are computed together.
const TOGETHER: usize = 4;

impl Depthwise {
    /// `weight` is `[channels, 1, size, size]`, as checkpoints have it; `bias` is `[channels]`.
    pub fn new(weight: &[f32], bias: &[f32], window: Window) -> Self {
        let (taps, channels) = (window.size * window.size, bias.len());
        let by_tap = (0..taps * channels).map(|at| weight[at % channels * taps + at / channels]);
        Self { weight: by_tap.collect(), bias: bias.to_vec(), window }
    }

    /// The convolution of a map, activated.
    ///
    /// # Panics
    /// If the map has other channels.
    pub fn forward(&self, x: &Map, activation: Option<Activation>, buffers: &Buffers) -> Map {
        assert_eq!(x.channels, self.bias.len(), "channels");
        let (height, top, _) = self.window.outputs(x.height);
        let (width, left, _) = self.window.outputs(x.width);
        let mut out = buffers.take(x.images, height, width, x.channels);
        let rows = Lines { of: self, x, out: &mut out, before: (top, left), activation };
        dispatch(rows);
        out
    }
}

struct Lines<'a> {
    of: &'a Depthwise,
    x: &'a Map,
    out: &'a mut Map,
    /// Zeros before the first row and column.
    before: (usize, usize),
    activation: Option<Activation>,
}

/// The pixels of a window that are inside of a side, and where they begin in the side.
#[inline(always)]
fn inside(window: &Window, at: usize, before: usize, length: usize) -> (Range<usize>, usize) {
    let start = at * window.stride;
    let first = before.saturating_sub(start).min(window.size);
    let last = (length + before).saturating_sub(start).min(window.size).max(first);
    (first..last, (start + first).saturating_sub(before))
}

impl WithSimd for Lines<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { of, x, out, before, activation } = self;
        let (window, channels) = (&of.window, x.channels);
        let line = out.width * channels;
        let (height, width) = (out.height, out.width);
        for (at, out) in out.values.chunks_mut(line).enumerate() {
            let (image, y) = (at / height, at % height);
            let (rows, top) = inside(window, y, before.0, x.height);
            let lines = &x.values[(image * x.height + top.min(x.height)) * x.width * channels..];
            let mut done = 0;
            while done < width {
                let (columns, left) = inside(window, done, before.1, x.width);
                let last = done + TOGETHER - 1;
                let whole = last < width
                    && columns.len() == window.size
                    && inside(window, last, before.1, x.width).0.len() == window.size;
                let count = if whole { TOGETHER } else { 1 };
                let pixels = Pixels {
                    lines,
                    line: x.width * channels,
                    left,
                    weight: &of.weight,
                    bias: &of.bias,
                    size: window.size,
                    stride: window.stride * channels,
                    rows: rows.clone(),
                    columns,
                };
                let out = &mut out[done * channels..][..count * channels];
                match whole {
                    true => pixels.sum::<S, TOGETHER>(simd, out),
                    false => pixels.sum::<S, 1>(simd, out),
                }
                done += count;
            }
            if let Some(activation) = activation {
                activate(simd, activation, out);
            }
        }
    }
}

/// What some neighbouring output pixels read.
struct Pixels<'a> {
    /// From the first line of the map that is read.
    lines: &'a [f32],
    /// Values of a line.
    line: usize,
    /// The first pixel of a line that is read.
    left: usize,
    weight: &'a [f32],
    bias: &'a [f32],
    size: usize,
    /// Values from one output's pixels to the next one's.
    stride: usize,
    /// Rows and columns of the window that are inside of the map.
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Pixels<'_> {
    /// `out` is `[N, channels]`.
    #[inline(always)]
    fn sum<S: Simd, const N: usize>(&self, simd: S, out: &mut [f32]) {
        let channels = self.bias.len();
        let whole = channels / S::F32_LANES * S::F32_LANES;
        let load = |x: &[f32]| S::as_simd_f32s(x).0[0];
        for channel in (0..whole).step_by(S::F32_LANES) {
            let bias = load(&self.bias[channel..][..S::F32_LANES]);
            let mut sums = [bias; N];
            self.each(channel, S::F32_LANES, |weight, first| {
                let weight = load(weight);
                for (i, sum) in sums.iter_mut().enumerate() {
                    let x = load(&self.lines[first + i * self.stride..][..S::F32_LANES]);
                    *sum = simd.mul_add_e_f32s(weight, x, *sum);
                }
            });
            for (i, sum) in sums.into_iter().enumerate() {
                S::as_mut_simd_f32s(&mut out[i * channels + channel..][..S::F32_LANES]).0[0] = sum;
            }
        }
        if whole < channels {
            let rest = channels - whole;
            let mut sums = [simd.partial_load_f32s(&self.bias[whole..]); N];
            self.each(whole, rest, |weight, first| {
                let weight = simd.partial_load_f32s(weight);
                for (i, sum) in sums.iter_mut().enumerate() {
                    let x = simd.partial_load_f32s(&self.lines[first + i * self.stride..][..rest]);
                    *sum = simd.mul_add_e_f32s(weight, x, *sum);
                }
            });
            for (i, sum) in sums.into_iter().enumerate() {
                simd.partial_store_f32s(&mut out[i * channels + whole..][..rest], sum);
            }
        }
    }

    /// Calls `tap` for each pixel of the window with its weights of some channels, and where the first output's values begin.
    #[inline(always)]
    fn each(&self, channel: usize, count: usize, mut tap: impl FnMut(&[f32], usize)) {
        let channels = self.bias.len();
        for (y, row) in self.rows.clone().enumerate() {
            let mut first = y * self.line + self.left * channels + channel;
            for column in self.columns.clone() {
                tap(&self.weight[(row * self.size + column) * channels + channel..][..count], first);
                first += channels;
            }
        }
    }
}
