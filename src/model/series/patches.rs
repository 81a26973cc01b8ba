//! From a series to the rows that the encoder reads: standardized, and cut into patches.

/// A series as the model reads it.
#[derive(Debug, PartialEq)]
pub struct Patches {
    /// `[patches, 2 × size]`: the points of a patch, 0 where there is none, then 1 for each point that there is, else 0.
    pub rows: Vec<f32>,
    /// For each token, whether it is a patch without a point: no token attends to it.
    pub masked: Vec<bool>,
    /// What was subtracted from each point, and by what it was divided then.
    pub location: f64,
    pub scale: f64,
}

/// The scale of a series whose points are all equal.
const CONSTANT: f64 = 1e-5;

impl Patches {
    /// Patches of `size` points. The last patch ends with the series; the first one may be incomplete. NaN is a missing
    /// point. With `register`, one more token follows that is not masked. Mean and deviation are computed in f64, so that
    /// equal points have no deviation.
    pub fn new(series: &[f32], size: usize, register: bool) -> Self {
        let points = || series.iter().filter(|x| !x.is_nan()).map(|&x| f64::from(x));
        let count = points().count() as f64;
        let location = if count > 0.0 { points().sum::<f64>() / count } else { 0.0 };
        let square = |x: f64| (x - location) * (x - location);
        let deviation = if count > 0.0 { (points().map(square).sum::<f64>() / count).sqrt() } else { 1.0 };
        let scale = if deviation > 0.0 { deviation } else { CONSTANT };

        let patches = series.len().div_ceil(size);
        let before = patches * size - series.len();
        let mut rows = vec![0.0; patches * 2 * size];
        for (at, &x) in (before..).zip(series) {
            if !x.is_nan() {
                let (patch, place) = (at / size, at % size);
                let row = &mut rows[patch * 2 * size..][..2 * size];
                row[place] = ((f64::from(x) - location) / scale) as f32;
                row[size + place] = 1.0;
            }
        }
        let is_empty = |row: &[f32]| row[size..].iter().all(|&there| there == 0.0);
        let mut masked: Vec<bool> = rows.chunks_exact(2 * size).map(is_empty).collect();
        if register {
            masked.push(false);
        }
        Self { rows, masked, location, scale }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.masked.len()
    }

    /// A value of the model as one of the series.
    pub fn restore(&self, x: f32) -> f32 {
        (f64::from(x) * self.scale + self.location) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f32 = f32::NAN;

    #[test]
    fn the_last_patch_ends_with_the_series() {
        let patches = Patches::new(&[1.0, 3.0, 5.0], 2, true);
        assert_eq!((patches.location, patches.tokens()), (3.0, 3));
        let root = (8.0f64 / 3.0).sqrt();
        assert!((patches.scale - root).abs() < 1e-12);
        let one = (2.0 / root) as f32;
        assert_eq!(patches.rows, [0.0, -one, 0.0, 1.0, 0.0, one, 1.0, 1.0]);
        assert_eq!(patches.restore(one), 5.0);
    }

    #[test]
    fn missing_points_count_for_nothing_and_patches_of_them_are_masked() {
        let patches = Patches::new(&[2.0, NAN, NAN, NAN, 4.0, 6.0], 2, false);
        assert_eq!(patches.location, 4.0);
        assert_eq!(patches.masked, [false, true, false]);
        assert_eq!(patches.rows[2..8], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn equal_points_are_zeros() {
        for x in [0.1, 1e30, -7.7e8] {
            let patches = Patches::new(&[x; 2047], 16, true);
            assert_eq!((patches.scale, patches.restore(0.0)), (CONSTANT, x));
            assert!(patches.rows.chunks_exact(32).all(|row| row[..16].iter().all(|&x| x == 0.0)));
        }
    }

    #[test]
    fn large_points_do_not_overflow() {
        let patches = Patches::new(&[3e38, -3e38], 2, false);
        assert!(patches.rows.iter().all(|x| x.is_finite()) && patches.scale > 1e38);
    }
}
