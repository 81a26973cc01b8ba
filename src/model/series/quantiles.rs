//! Quantiles of samples, as torch computes them.

/// Replaces `samples` by themselves sorted, and returns the quantile at `level`, from 0 to 1, by linear interpolation
/// between the two samples around it (`torch.quantile`).
///
/// # Panics
/// If there is no sample.
pub fn quantile(samples: &mut [f32], level: f64) -> f32 {
    samples.sort_by(f32::total_cmp);
    at(samples, level)
}

fn at(sorted: &[f32], level: f64) -> f32 {
    let rank = level * (sorted.len() - 1) as f64;
    let below = rank.floor();
    let (low, high) = (sorted[below as usize], sorted[rank.ceil() as usize]);
    (f64::from(low) + (rank - below) * (f64::from(high) - f64::from(low))) as f32
}

/// A quantile at a level that a model does not predict, from the values at the levels 1/(n+1), …, n/(n+1) that it does: as
/// the chronos package interpolates them. `values` are replaced.
///
/// # Panics
/// If there is no value.
pub fn interpolate(values: &mut Vec<f32>, level: f64) -> f32 {
    let (first, last) = (values[0], values[values.len() - 1]);
    values.extend([first, last]);
    quantile(values, level)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of torch.quantile.
    #[test]
    fn quantiles_lie_between_sorted_samples() {
        let of = |level| quantile(&mut [4.0, 1.0, 3.0, 2.0], level);
        assert_eq!([0.0, 0.25, 0.5, 0.9, 1.0].map(of), [1.0, 1.75, 2.5, 3.7, 4.0]);
        assert_eq!(quantile(&mut [7.0], 0.3), 7.0);
    }

    #[test]
    fn levels_between_those_of_the_model() {
        let of = |level| interpolate(&mut (1..=9).map(|i| i as f32 * 10.0).collect(), level);
        assert_eq!([0.05, 0.1, 0.25, 0.95].map(of), [10.0, 10.0, 25.0, 90.0]);
    }
}
