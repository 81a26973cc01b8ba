//! Operations on the maps of images, on one CPU core: convolutions, pooling, and what networks of convolutions put between
//! them. A map is `[images, height, width, channels]`: the channels of a pixel are neighbours, so that a convolution is a
//! multiplication of packed weights with rows of pixels, which are put together as the multiplication needs them.
//!
//! Every pixel is computed in the same order, whatever the other images are: a result is bit-identical in any batch.

mod depthwise;
mod patches;

use std::sync::Mutex;

use pulp::{Simd, WithSimd};

use super::activation::{Activation, activate_columns};
use super::matmul::{Epilogue, Panels};
use super::norm::Norm;
use super::simd::dispatch;

pub use self::depthwise::Depthwise;
use self::patches::Patches;

/// Maps of several images.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Map {
    pub images: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    /// `[images, height, width, channels]`.
    pub values: Vec<f32>,
}

/// Zeros around a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// So many before the first row and column, and after the last ones.
    Around(usize, usize),
    /// TensorFlow's SAME: as many as give `⌈size / stride⌉` outputs, the smaller half before.
    Same,
}

/// What a convolution reads for each output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Pixels of a side.
    pub size: usize,
    pub stride: usize,
    pub padding: Padding,
}

impl Window {
    /// Of a side of `length` pixels: the outputs, and how many zeros are before the first pixel and after the last one.
    ///
    /// # Panics
    /// If the side, with its padding, is shorter than the window ([`Window::fits`]).
    pub fn outputs(&self, length: usize) -> (usize, usize, usize) {
        let (before, after) = match self.padding {
            Padding::Around(before, after) => (before, after),
            Padding::Same => {
                let covered = (length.div_ceil(self.stride) - 1) * self.stride + self.size;
                let all = covered.saturating_sub(length);
                (all / 2, all - all / 2)
            }
        };
        let padded = length + before + after;
        assert!(padded >= self.size, "a window of {} pixels on a side of {padded}", self.size);
        ((padded - self.size) / self.stride + 1, before, after)
    }

    /// Whether a side of `length` pixels, with its padding, is as long as the window.
    pub fn fits(&self, length: usize) -> bool {
        match self.padding {
            Padding::Around(before, after) => length + before + after >= self.size,
            Padding::Same => length > 0,
        }
    }
}

/// Buffers that are used again, by several threads; there are as many as maps have existed at the same time.
#[derive(Debug, Default)]
pub struct Buffers(Mutex<Vec<Vec<f32>>>);

impl Buffers {
    /// A map with unspecified values.
    pub fn take(&self, images: usize, height: usize, width: usize, channels: usize) -> Map {
        let count = images * height * width * channels;
        // The smallest that is large enough, or else the largest.
        let fits = |values: &Vec<f32>| (values.capacity() < count, values.capacity().abs_diff(count));
        let mut values = {
            let mut idle = self.0.lock().unwrap_or_else(|e| e.into_inner());
            let best = (0..idle.len()).min_by_key(|&at| fits(&idle[at]));
            best.map(|at| idle.swap_remove(at)).unwrap_or_default()
        };
        values.resize(count, 0.0);
        Map { images, height, width, channels, values }
    }

    pub fn give(&self, map: Map) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).push(map.values);
    }
}

impl Map {
    pub fn pixels(&self) -> usize {
        self.height * self.width
    }

    /// Normalises the channels of each pixel.
    pub fn normalize(&mut self, norm: &Norm) {
        norm.rows(&mut self.values);
    }

    pub fn activate(&mut self, activation: Activation) {
        let count = self.values.len();
        activate_columns(activation, &mut self.values, count, count);
    }

    /// The mean of each image's channels, `[images, 1, 1, channels]`.
    pub fn mean(&self, buffers: &Buffers) -> Map {
        let mut out = buffers.take(self.images, 1, 1, self.channels);
        let images = self.values.chunks(self.pixels() * self.channels);
        for (out, image) in out.values.chunks_mut(self.channels).zip(images) {
            out.fill(0.0);
            for pixel in image.chunks(self.channels) {
                out.iter_mut().zip(pixel).for_each(|(out, x)| *out += x);
            }
            out.iter_mut().for_each(|out| *out /= self.pixels() as f32);
        }
        out
    }

    /// Multiplies the channels of each image by factors, `[images, 1, 1, channels]`.
    pub fn scale(&mut self, factors: &Map) {
        let each = self.pixels() * self.channels;
        for (image, factors) in self.values.chunks_mut(each).zip(factors.values.chunks(self.channels)) {
            for pixel in image.chunks_mut(self.channels) {
                pixel.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
            }
        }
    }

    /// Global response normalisation (arXiv:2301.00808): x + bias + weight · x · n, where n is the length of the channel over
    /// the image, divided by the mean of these lengths over the channels.
    pub fn respond(&mut self, weight: &[f32], bias: &[f32]) {
        let channels = self.channels;
        let mut lengths = vec![0.0f32; channels];
        for image in self.values.chunks_mut(self.height * self.width * channels) {
            lengths.fill(0.0);
            for pixel in image.chunks(channels) {
                lengths.iter_mut().zip(pixel).for_each(|(sum, x)| *sum += x * x);
            }
            lengths.iter_mut().for_each(|sum| *sum = sum.sqrt());
            let mean = lengths.iter().sum::<f32>() / channels as f32 + 1e-6;
            lengths
                .iter_mut()
                .zip(weight)
                .for_each(|(length, weight)| *length = 1.0 + weight * *length / mean);
            for pixel in image.chunks_mut(channels) {
                for ((x, factor), bias) in pixel.iter_mut().zip(&lengths).zip(bias) {
                    *x = *x * factor + bias;
                }
            }
        }
    }

    /// The largest value in each window; NaN if one is, or infinite. Zeros of the padding count, so that no value may be
    /// below 0.
    pub fn max_pool(&self, window: &Window, buffers: &Buffers) -> Map {
        let (height, top, _) = window.outputs(self.height);
        let (width, left, _) = window.outputs(self.width);
        let mut out = buffers.take(self.images, height, width, self.channels);
        dispatch(MaxPool { x: self, window, before: (top, left), out: &mut out });
        out
    }
}

struct MaxPool<'a> {
    x: &'a Map,
    window: &'a Window,
    /// Zeros before the first row and column.
    before: (usize, usize),
    out: &'a mut Map,
}

impl WithSimd for MaxPool<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, window, before, out } = self;
        let (channels, width, each) = (x.channels, out.width, out.pixels() * x.channels);
        let inside = |at: usize, before: usize, length: usize| {
            let start = at * window.stride;
            start.saturating_sub(before)..(start + window.size).saturating_sub(before).min(length)
        };
        let images = x.values.chunks(x.pixels() * channels);
        for (out, image) in out.values.chunks_mut(each).zip(images) {
            for (at, out) in out.chunks_mut(channels).enumerate() {
                let (rows, columns) =
                    (inside(at / width, before.0, x.height), inside(at % width, before.1, x.width));
                for first in (0..channels).step_by(S::F32_LANES) {
                    let count = S::F32_LANES.min(channels - first);
                    // The processor's maximum may drop a NaN, which 0 · x keeps.
                    let (mut most, mut invalid) = (simd.splat_f32s(0.0), simd.splat_f32s(0.0));
                    for y in rows.clone() {
                        for column in columns.clone() {
                            let at = (y * x.width + column) * channels + first;
                            let values = match count == S::F32_LANES {
                                true => S::as_simd_f32s(&image[at..][..S::F32_LANES]).0[0],
                                false => simd.partial_load_f32s(&image[at..][..count]),
                            };
                            most = simd.max_f32s(most, values);
                            invalid = simd.mul_add_e_f32s(simd.splat_f32s(0.0), values, invalid);
                        }
                    }
                    simd.partial_store_f32s(&mut out[first..][..count], simd.add_f32s(most, invalid));
                }
            }
        }
    }
}

/// A convolution over all channels.
pub struct Convolution {
    panels: Panels,
    window: Window,
    channels: usize,
}

impl Convolution {
    /// `weight` is `[outputs, channels, size, size]`, as checkpoints have it; `bias` is `[outputs]`.
    pub fn new(weight: &[f32], bias: &[f32], channels: usize, window: Window) -> Self {
        let (taps, outputs) = (window.size * window.size, bias.len());
        let mut by_pixel = Vec::with_capacity(weight.len());
        for of_output in weight.chunks(channels * taps) {
            for tap in 0..taps {
                by_pixel.extend((0..channels).map(|channel| of_output[channel * taps + tap]));
            }
        }
        let panels = Panels::new(&by_pixel, Some(bias), channels * taps, outputs);
        Self { panels, window, channels }
    }

    /// The convolution of a map, plus `residual` if there is one, activated.
    ///
    /// # Panics
    /// If the map has other channels, or the residual another shape than the result.
    pub fn forward(
        &self,
        x: &Map,
        residual: Option<&Map>,
        activation: Option<Activation>,
        buffers: &Buffers,
    ) -> Map {
        assert_eq!(x.channels, self.channels, "channels");
        let (height, top, _) = self.window.outputs(x.height);
        let (width, left, _) = self.window.outputs(x.width);
        let mut out = buffers.take(x.images, height, width, self.panels.outputs);
        let epilogue = match (residual, activation) {
            (None, None) => Epilogue::Nothing,
            (None, Some(activation)) => Epilogue::Activate(activation),
            (Some(residual), activation) => {
                assert_eq!(residual.values.len(), out.values.len(), "a residual of another shape");
                match activation {
                    None => Epilogue::Add(&residual.values),
                    Some(activation) => Epilogue::AddActivate(&residual.values, activation),
                }
            }
        };
        if (self.window.size, self.window.stride) == (1, 1) {
            self.panels.multiply(&x.values, &mut out.values, &epilogue);
        } else {
            let rows = |rows| Patches { x, window: self.window, before: (top, left), width, height, rows };
            self.panels.multiply_rows(rows, &mut out.values, &epilogue);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::matmul::tests::random;
    use super::*;

    fn map(images: usize, height: usize, width: usize, channels: usize) -> Map {
        let values = random(images * height * width * channels, 1);
        Map { images, height, width, channels, values }
    }

    /// `[images, channels, height, width]`, as Candle's operations take it, with zeros around it.
    fn tensor(x: &Map, window: &Window) -> Tensor {
        let (_, top, bottom) = window.outputs(x.height);
        let (_, left, right) = window.outputs(x.width);
        let shape = (x.images, x.height, x.width, x.channels);
        let x = Tensor::from_vec(x.values.clone(), shape, &Device::Cpu).unwrap();
        let x = x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
        x.pad_with_zeros(2, top, bottom).unwrap().pad_with_zeros(3, left, right).unwrap()
    }

    #[track_caller]
    fn near(got: &Map, want: &Tensor) {
        let (images, channels, height, width) = want.dims4().unwrap();
        assert_eq!((got.images, got.height, got.width, got.channels), (images, height, width, channels));
        let want = want.permute((0, 2, 3, 1)).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (at, (got, want)) in got.values.iter().zip(&want).enumerate() {
            assert!((got - want).abs() < 1e-4, "[{at}]: {got}, not {want}");
        }
    }

    const WINDOWS: [Window; 6] = [
        Window { size: 1, stride: 1, padding: Padding::Around(0, 0) },
        Window { size: 1, stride: 2, padding: Padding::Around(0, 0) },
        Window { size: 3, stride: 1, padding: Padding::Around(1, 1) },
        Window { size: 3, stride: 2, padding: Padding::Same },
        Window { size: 5, stride: 2, padding: Padding::Around(1, 2) },
        Window { size: 4, stride: 4, padding: Padding::Around(0, 0) },
    ];

    #[test]
    fn convolutions_are_those_of_candle() {
        for window in WINDOWS {
            for (images, height, width, channels, outputs) in
                [(1, 7, 9, 3, 5), (2, 8, 8, 16, 40), (1, 21, 20, 61, 7)]
            {
                let x = map(images, height, width, channels);
                let taps = window.size * window.size;
                let (weight, bias) = (random(outputs * channels * taps, 2), random(outputs, 3));
                let of =
                    Tensor::from_slice(&weight, (outputs, channels, window.size, window.size), &Device::Cpu);
                let want = tensor(&x, &window).conv2d(&of.unwrap(), 0, window.stride, 1, 1).unwrap();
                let bias_of = Tensor::from_slice(&bias, (1, outputs, 1, 1), &Device::Cpu).unwrap();
                let want = want.broadcast_add(&bias_of).unwrap();
                let convolution = Convolution::new(&weight, &bias, channels, window);
                let buffers = Buffers::default();
                let plain = convolution.forward(&x, None, None, &buffers);
                near(&plain, &want);
                let activated = convolution.forward(&x, None, Some(Activation::Relu), &buffers);
                near(&activated, &want.relu().unwrap());
                let both = convolution.forward(&x, Some(&plain), Some(Activation::Relu), &buffers);
                near(&both, &(&want + &want).unwrap().relu().unwrap());
                // An image does not depend on the one beside it.
                if images == 2 {
                    let first = x.values[..x.values.len() / 2].to_vec();
                    let alone =
                        convolution.forward(&Map { images: 1, values: first, ..x }, None, None, &buffers);
                    assert_eq!(alone.values, plain.values[..alone.values.len()]);
                }
            }
        }
    }

    #[test]
    fn depthwise_convolutions_are_those_of_candle() {
        for window in WINDOWS {
            for (images, height, width, channels) in [(1, 7, 9, 3), (2, 8, 11, 33), (1, 20, 20, 64)] {
                let x = map(images, height, width, channels);
                let taps = window.size * window.size;
                let (weight, bias) = (random(channels * taps, 2), random(channels, 3));
                let of = Tensor::from_slice(&weight, (channels, 1, window.size, window.size), &Device::Cpu);
                let want = tensor(&x, &window).conv2d(&of.unwrap(), 0, window.stride, 1, channels).unwrap();
                let bias_of = Tensor::from_slice(&bias, (1, channels, 1, 1), &Device::Cpu).unwrap();
                let want = want.broadcast_add(&bias_of).unwrap();
                let convolution = Depthwise::new(&weight, &bias, window);
                let buffers = Buffers::default();
                near(&convolution.forward(&x, None, &buffers), &want);
                let activated = convolution.forward(&x, Some(Activation::Relu), &buffers);
                near(&activated, &want.relu().unwrap());
            }
        }
    }

    #[test]
    fn the_largest_value_of_a_window_is_found() {
        let window = Window { size: 3, stride: 2, padding: Padding::Around(1, 1) };
        let mut x = map(2, 7, 8, 5);
        x.activate(Activation::Relu);
        let want = tensor(&x, &window).max_pool2d_with_stride(3, 2).unwrap();
        near(&x.max_pool(&window, &Buffers::default()), &want);
        x.values[3] = f32::NAN;
        assert!(x.max_pool(&window, &Buffers::default()).values.iter().any(|x| x.is_nan()));
    }

    #[test]
    fn channels_are_averaged_and_scaled() {
        let mut x =
            Map { images: 2, height: 1, width: 2, channels: 2, values: vec![1., 2., 3., 4., 5., 6., 7., 8.] };
        let buffers = Buffers::default();
        let mean = x.mean(&buffers);
        assert_eq!(mean.values, [2.0, 3.0, 6.0, 7.0]);
        x.scale(&mean);
        assert_eq!(x.values, [2.0, 6.0, 6.0, 12.0, 30.0, 42.0, 42.0, 56.0]);
        let mut x = Map { images: 1, height: 1, width: 2, channels: 2, values: vec![3.0, 0.0, 4.0, 1.0] };
        // Lengths 5 and 1, whose mean is 3.
        x.respond(&[3.0, 0.0], &[0.5, -1.0]);
        for (got, want) in x.values.iter().zip([3.0 * 6.0 + 0.5, -1.0, 4.0 * 6.0 + 0.5, 0.0]) {
            assert!((got - want).abs() < 1e-4, "{got}, not {want}");
        }
    }

    #[test]
    fn buffers_are_used_again() {
        let buffers = Buffers::default();
        let (large, small) = (buffers.take(1, 10, 10, 10), buffers.take(1, 2, 2, 2));
        let (at_large, at_small) = (large.values.as_ptr(), small.values.as_ptr());
        buffers.give(large);
        buffers.give(small);
        assert_eq!(buffers.take(1, 2, 2, 1).values.as_ptr(), at_small);
        assert_eq!(buffers.take(1, 3, 10, 10).values.as_ptr(), at_large);
    }
}
