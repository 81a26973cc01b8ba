//! Portable f32 SIMD: AVX-512, AVX2, NEON or scalar code, chosen once at run time. The `pulp` crate compiles one
//! source for all of them.

// Coefficients keep all the digits of their sources.
#![allow(clippy::excessive_precision)]

use std::sync::OnceLock;

use pulp::{Arch, Simd, WithSimd};

/// Runs `op` with the processor's widest vectors.
pub(super) fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    ARCH.get_or_init(Arch::new).dispatch(op)
}

/// Elements in a vector.
pub(super) fn lanes() -> usize {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    dispatch(Lanes)
}

/// c[0] + c[1] x + c[2] x² + …
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(simd: S, x: S::f32s, c: [f32; N]) -> S::f32s {
    let mut sum = simd.splat_f32s(c[N - 1]);
    for &next in c[..N - 1].iter().rev() {
        sum = simd.mul_add_e_f32s(sum, x, simd.splat_f32s(next));
    }
    sum
}

/// e^x within 2 units in the last place: x = n ln 2 + r with |r| ≤ ln 2 / 2, and Cephes' polynomial for e^r
/// (expf.c). x is clamped to -87..=88, so the result is a normal, finite number, or NaN for NaN.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    /// 1.5 × 2^23: adding it rounds to the nearest integer, which is then in the mantissa's low bits.
    const ROUND: f32 = 12_582_912.0;
    let splat = |x| simd.splat_f32s(x);
    // If an operand is NaN, x86's min and max return the second one: this order keeps NaN.
    let x = simd.min_f32s(splat(88.0), simd.max_f32s(splat(-87.0), x));
    let shifted = simd.mul_add_e_f32s(x, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let n = simd.sub_f32s(shifted, splat(ROUND));
    // ln 2 in two parts, so that n times the first is exact.
    let r = simd.mul_add_e_f32s(n, splat(-0.693_359_4), x);
    let r = simd.mul_add_e_f32s(n, splat(2.121_944_4e-4), r);
    let tail =
        polynomial(simd, r, [0.5, 1.666_666_5e-1, 4.166_579_6e-2, 8.333_452e-3, 1.398_2e-3, 1.987_569_1e-4]);
    let fraction = simd.mul_add_e_f32s(simd.mul_f32s(r, r), tail, simd.add_f32s(r, splat(1.0)));
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(fraction), exponent))
}

/// 1 - Φ(t), the upper tail of the standard normal distribution, for 0 ≤ t ≤ [`NORMAL_END`], within 3e-7. It is a
/// polynomial in u, which is t mapped to -1..=1. The coefficients minimise the largest error times max(t, 1/2), because
/// GELU multiplies the tail by t (Lawson's algorithm over Chebyshev polynomials).
#[inline(always)]
pub(super) fn normal_tail<S: Simd>(simd: S, t: S::f32s) -> S::f32s {
    let u = simd.mul_add_e_f32s(t, simd.splat_f32s(2.0 / NORMAL_END), simd.splat_f32s(-1.0));
    polynomial(
        simd,
        u,
        [
            3.466_983_326e-3,
            -2.813_712_507e-2,
            1.025_567_874e-1,
            -2.149_984_986e-1,
            2.672_889_233e-1,
            -1.550_115_496e-1,
            -7.191_336_900e-2,
            2.120_059_133e-1,
            -1.354_504_675e-1,
            -4.913_756_251e-2,
            1.207_000_539e-1,
            -3.471_678_495e-2,
            -4.272_839_427e-2,
            2.511_309_087e-2,
            6.079_394_370e-3,
            -5.117_379_595e-3,
        ],
    )
}

/// End of [`normal_tail`]'s range: from here on t (1 - Φ(t)) is below 2e-7.
pub(super) const NORMAL_END: f32 = 5.4;

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    simd.div_f32s(one, simd.add_f32s(one, exp(simd, simd.neg_f32s(x))))
}

/// The hyperbolic tangent: 2 sigmoid(2x) - 1.
#[inline(always)]
pub(super) fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let twice = simd.add_f32s(x, x);
    simd.mul_add_e_f32s(sigmoid(simd, twice), simd.splat_f32s(2.0), simd.splat_f32s(-1.0))
}

/// Copies `from` to the start of `to`, padded with zeros to a whole vector.
#[inline(always)]
pub(super) fn copy<S: Simd>(simd: S, from: &[f32], to: &mut [f32]) {
    let (from, rest) = S::as_simd_f32s(from);
    let mut to = S::as_mut_simd_f32s(to).0.iter_mut();
    for (&from, to) in from.iter().zip(to.by_ref()) {
        *to = from;
    }
    if let Some(to) = to.next() {
        *to = simd.partial_load_f32s(rest);
    }
}

/// The first two vectors of a slice, with zeros past its end.
#[inline(always)]
pub(super) fn load_two<S: Simd>(simd: S, x: &[f32]) -> [S::f32s; 2] {
    if let ([first, second, ..], _) = S::as_simd_f32s(x) {
        return [*first, *second];
    }
    let (first, second) = x.split_at(S::F32_LANES.min(x.len()));
    [simd.partial_load_f32s(first), simd.partial_load_f32s(second)]
}

/// Writes two vectors to the start of a slice; what does not fit is dropped.
#[inline(always)]
pub(super) fn store_two<S: Simd>(simd: S, out: &mut [f32], x: [S::f32s; 2]) {
    if let ([first, second, ..], _) = S::as_mut_simd_f32s(out) {
        [*first, *second] = x;
        return;
    }
    let (first, second) = out.split_at_mut(S::F32_LANES.min(out.len()));
    simd.partial_store_f32s(first, x[0]);
    simd.partial_store_f32s(second, x[1]);
}

/// Adds `other`, which is at least as long, to `out` in place.
#[inline(always)]
pub(super) fn add<S: Simd>(simd: S, out: &mut [f32], other: &[f32]) {
    let other = &other[..out.len()];
    let (vectors, rest) = S::as_mut_simd_f32s(out);
    let (others, others_rest) = S::as_simd_f32s(other);
    for (x, &y) in vectors.iter_mut().zip(others) {
        *x = simd.add_f32s(*x, y);
    }
    for (x, &y) in rest.iter_mut().zip(others_rest) {
        *x += y;
    }
}

/// The sum of `of(x)` over a slice: four partial sums of vectors, then the rest by `of_one`. The order of the
/// additions depends only on the length.
#[inline(always)]
pub(super) fn sum<S: Simd>(
    simd: S,
    x: &[f32],
    of: impl Fn(S::f32s) -> S::f32s,
    of_one: impl Fn(f32) -> f32,
) -> f32 {
    let (vectors, rest) = S::as_simd_f32s(x);
    let mut strands = [simd.splat_f32s(0.0); 4];
    let (fours, left) = vectors.as_chunks::<4>();
    for four in fours {
        for (strand, &x) in strands.iter_mut().zip(four) {
            *strand = simd.add_f32s(*strand, of(x));
        }
    }
    for (strand, &x) in strands.iter_mut().zip(left) {
        *strand = simd.add_f32s(*strand, of(x));
    }
    let [a, b, c, d] = strands;
    let total = simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)));
    rest.iter().fold(total, |sum, &x| sum + of_one(x))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    struct Map<'a, F>(&'a mut [f32], F);

    trait Function {
        fn of<S: Simd>(&self, simd: S, x: S::f32s) -> S::f32s;
    }

    impl<F: Function> WithSimd for Map<'_, F> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let (vectors, rest) = S::as_mut_simd_f32s(self.0);
            assert!(rest.is_empty());
            for x in vectors {
                *x = self.1.of(simd, *x);
            }
        }
    }

    macro_rules! function {
        ($name:ident, $of:path) => {
            struct $name;
            impl Function for $name {
                #[inline(always)]
                fn of<S: Simd>(&self, simd: S, x: S::f32s) -> S::f32s {
                    $of(simd, x)
                }
            }
        };
    }
    function!(Exp, exp);
    function!(Tanh, tanh);
    struct NormalTail;
    impl Function for NormalTail {
        #[inline(always)]
        fn of<S: Simd>(&self, simd: S, x: S::f32s) -> S::f32s {
            normal_tail(simd, simd.min_f32s(simd.splat_f32s(NORMAL_END), simd.abs_f32s(x)))
        }
    }

    /// The largest error of `function` against `want` over -12..12.
    fn worst(function: impl Function, want: impl Fn(&Tensor) -> Tensor, relative: bool) -> f64 {
        let x: Vec<f32> = (0..1 << 16).map(|i| (i as f32 - 32768.0) * 12.0 / 32768.0).collect();
        let mut got = x.clone();
        dispatch(Map(&mut got, function));
        let x = Tensor::from_vec(x.iter().map(|&x| f64::from(x)).collect(), 1 << 16, &Device::Cpu);
        let want = want(&x.unwrap()).to_vec1::<f64>().unwrap();
        let error = |(g, w): (&f32, &f64)| (f64::from(*g) - w).abs() / if relative { w.abs() } else { 1.0 };
        got.iter().zip(&want).map(error).fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_within_their_documented_error() {
        assert!(worst(Exp, |x| x.exp().unwrap(), true) < 2.4e-7);
        assert!(worst(Tanh, |x| x.tanh().unwrap(), false) < 3e-7);
        let tail = |x: &Tensor| {
            let t = x.abs().unwrap().minimum(f64::from(NORMAL_END)).unwrap();
            (t * std::f64::consts::FRAC_1_SQRT_2).unwrap().erf().unwrap().affine(-0.5, 0.5).unwrap()
        };
        assert!(worst(NormalTail, tail, false) < 3e-7);
    }

    #[test]
    fn exp_saturates() {
        let mut x = [f32::NEG_INFINITY, -1000.0, 1000.0, 0.0].repeat(16);
        dispatch(Map(&mut x, Exp));
        assert!(x[0] > 0.0 && x[0] < 1e-37 && x[1] == x[0]);
        assert!(x[2] > 1e38 && x[2].is_finite());
        assert_eq!(x[3], 1.0);
    }
}
