//! Activations: elementwise, on their own or as the epilogue of a multiplication, and gated.

use candle_core::{D, Result, Tensor};
use pulp::{Simd, WithSimd};

use super::simd::{NORMAL_END, dispatch, normal_tail, sigmoid, tanh};
use super::{Fused, Out};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x Φ(x), by the error function.
    Gelu,
    /// GELU approximated with tanh.
    GeluTanh,
    /// min(max(x + 3, 0), 6) / 6, an approximation of the sigmoid that MobileNetV3 has (arXiv:1905.02244).
    HardSigmoid,
    /// x times [`Activation::HardSigmoid`] of it.
    HardSwish,
    /// x sigmoid(1.702 x), an approximation of GELU that CLIP has.
    QuickGelu,
    Relu,
    /// min(max(x, 0), 6).
    Relu6,
    Sigmoid,
    Silu,
    Tanh,
}

impl Activation {
    /// By Candle's own operations, for devices that have no fused form.
    pub fn tensor(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Activation::Gelu => x.gelu_erf(),
            Activation::GeluTanh => x.gelu(),
            Activation::HardSigmoid => (x + 3.0)?.clamp(0.0, 6.0)? / 6.0,
            Activation::HardSwish => x * ((x + 3.0)?.clamp(0.0, 6.0)? / 6.0)?,
            Activation::Relu6 => x.clamp(0.0, 6.0),
            Activation::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
            Activation::Relu => x.relu(),
            Activation::Sigmoid => candle_nn::ops::sigmoid(x),
            Activation::Silu => x.silu(),
            Activation::Tanh => x.tanh(),
        }
    }

    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        let splat = |x| simd.splat_f32s(x);
        match self {
            Activation::Gelu => {
                // max(0, x) - |x| Φ(-|x|). If an operand is NaN, x86's min and max return the second one: this
                // order keeps NaN.
                let t = simd.min_f32s(splat(NORMAL_END), simd.abs_f32s(x));
                simd.negate_mul_add_e_f32s(t, normal_tail(simd, t), simd.max_f32s(splat(0.0), x))
            }
            Activation::GeluTanh => {
                // 0.5 x (1 + tanh z) = x sigmoid(2z), z = √(2/π) (x + 0.044715 x³).
                let cube = simd.mul_f32s(simd.mul_f32s(x, x), x);
                let inner = simd.mul_add_e_f32s(cube, splat(0.044_715), x);
                simd.mul_f32s(x, sigmoid(simd, simd.mul_f32s(inner, splat(1.595_769))))
            }
            Activation::HardSigmoid => hard_sigmoid(simd, x),
            Activation::HardSwish => simd.mul_f32s(x, hard_sigmoid(simd, x)),
            Activation::Relu6 => simd.min_f32s(splat(6.0), simd.max_f32s(splat(0.0), x)),
            Activation::QuickGelu => simd.mul_f32s(x, sigmoid(simd, simd.mul_f32s(x, splat(1.702)))),
            Activation::Relu => simd.max_f32s(splat(0.0), x),
            Activation::Sigmoid => sigmoid(simd, x),
            Activation::Silu => simd.mul_f32s(x, sigmoid(simd, x)),
            Activation::Tanh => tanh(simd, x),
        }
    }
}

#[inline(always)]
fn hard_sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let shifted = simd.max_f32s(simd.splat_f32s(0.0), simd.add_f32s(x, simd.splat_f32s(3.0)));
    simd.mul_f32s(simd.min_f32s(simd.splat_f32s(6.0), shifted), simd.splat_f32s(1.0 / 6.0))
}

/// Applies the activation to every element of `x`, in place.
#[inline(always)]
pub(super) fn activate<S: Simd>(simd: S, activation: Activation, x: &mut [f32]) {
    // Matches outside of the loop, so that each loop is vectorized on its own.
    macro_rules! each {
        ($($name:ident),*) => {
            match activation {
                $(Activation::$name => {
                    let (vectors, rest) = S::as_mut_simd_f32s(x);
                    for x in vectors {
                        *x = Activation::$name.of(simd, *x);
                    }
                    if !rest.is_empty() {
                        let y = Activation::$name.of(simd, simd.partial_load_f32s(rest));
                        simd.partial_store_f32s(rest, y);
                    }
                })*
            }
        };
    }
    each!(Gelu, GeluTanh, HardSigmoid, HardSwish, QuickGelu, Relu, Relu6, Sigmoid, Silu, Tanh);
}

/// Applies the activation to the first `width` elements of each row, in place. Rows are `stride` elements apart.
pub(super) fn activate_columns(activation: Activation, x: &mut [f32], stride: usize, width: usize) {
    struct Columns<'a>(Activation, &'a mut [f32], usize, usize);
    impl WithSimd for Columns<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(activation, x, stride, width) = self;
            for row in x.chunks_mut(stride) {
                activate(simd, activation, &mut row[..width]);
            }
        }
    }
    dispatch(Columns(activation, x, stride, width));
}

/// Which half of a gated layer's input is activated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    First,
    Second,
}

impl Gate {
    /// The gate's half, then the other.
    pub(super) fn order<T>(self, first: T, second: T) -> (T, T) {
        match self {
            Gate::First => (first, second),
            Gate::Second => (second, first),
        }
    }
}

/// `[tokens, 2 × width]` to `[tokens, width]`: one half, activated, times the other
/// (GeGLU, arXiv:2002.05202).
pub fn gated(x: &Tensor, activation: Activation, gate: Gate, out: Out<'_>) -> Result<Tensor> {
    let (tokens, twice) = x.dims2()?;
    let width = twice / 2;
    match out.view(tokens, width)? {
        Some(y) => {
            y.inplace_op2(
                x,
                &Fused("gated", |out: &mut [f32], x: &[f32]| {
                    dispatch(Gated { out, x, activation, gate, width })
                }),
            )?;
            Ok(y)
        }
        #[cfg(feature = "cuda")]
        None if x.device().is_cuda() => super::cuda::gated(x, activation, gate),
        None => {
            let (gate, other) = gate.order(0, width);
            let activated = activation.tensor(&x.narrow(D::Minus1, gate, width)?.contiguous()?)?;
            activated * x.narrow(D::Minus1, other, width)?
        }
    }
}

struct Gated<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    activation: Activation,
    gate: Gate,
    width: usize,
}

impl WithSimd for Gated<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.width;
        for (out, x) in self.out.chunks_mut(width).zip(self.x.chunks(2 * width)) {
            let (first, second) = x.split_at(width);
            let (gate, other) = self.gate.order(first, second);
            out.copy_from_slice(gate);
            activate(simd, self.activation, out);
            let (vectors, rest) = S::as_mut_simd_f32s(out);
            let (others, others_rest) = S::as_simd_f32s(other);
            for (x, &y) in vectors.iter_mut().zip(others) {
                *x = simd.mul_f32s(*x, y);
            }
            for (x, &y) in rest.iter_mut().zip(others_rest) {
                *x *= y;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    struct All<'a>(Activation, &'a mut [f32]);

    impl WithSimd for All<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            activate(simd, self.0, self.1);
        }
    }

    #[test]
    fn matches_candle_in_f64() {
        let x: Vec<f32> = (0..24_001).map(|i| (i as f32 - 12_000.0) / 1000.0).collect();
        let exact = Tensor::from_vec(x.iter().map(|&x| f64::from(x)).collect(), x.len(), &Device::Cpu);
        let exact = exact.unwrap();
        use Activation::*;
        for activation in
            [Gelu, GeluTanh, HardSigmoid, HardSwish, QuickGelu, Relu, Relu6, Sigmoid, Silu, Tanh]
        {
            let mut got = x.clone();
            dispatch(All(activation, &mut got));
            let want = activation.tensor(&exact).unwrap().to_vec1::<f64>().unwrap();
            for ((x, got), want) in x.iter().zip(got).zip(want) {
                let error = (f64::from(got) - want).abs();
                assert!(error <= 1e-6 * want.abs().max(1.0), "{activation:?}({x}) is {got}, not {want}");
            }
        }
    }

    #[test]
    fn nan_stays_nan() {
        use Activation::*;
        for activation in
            [Gelu, GeluTanh, HardSigmoid, HardSwish, QuickGelu, Relu, Relu6, Sigmoid, Silu, Tanh]
        {
            let mut x = [f32::NAN; 35];
            dispatch(All(activation, &mut x));
            assert!(x.iter().all(|x| x.is_nan()), "{activation:?}: {x:?}");
        }
    }
}
