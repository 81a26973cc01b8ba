//! A table of positions for another number of patches than the model was trained with.

/// Resizes `[side × side, width]` to `[rows × columns, width]` by bicubic interpolation with a = -0.75 and without
/// antialiasing, as torch's `interpolate(mode="bicubic", align_corners=False)`.
pub fn resized(table: &[f32], side: usize, (rows, columns): (usize, usize), width: usize) -> Vec<f32> {
    let row_weights: Vec<_> = (0..rows).map(|at| weights(at, side, rows)).collect();
    let column_weights: Vec<_> = (0..columns).map(|at| weights(at, side, columns)).collect();
    let mut out = Vec::with_capacity(rows * columns * width);
    for row in &row_weights {
        for column in &column_weights {
            let start = out.len();
            out.resize(start + width, 0.0);
            for (y, by_row) in row {
                for (x, by_column) in column {
                    let from = &table[(y * side + x) * width..][..width];
                    let weight = by_row * by_column;
                    out[start..].iter_mut().zip(from).for_each(|(out, x)| *out += weight * x);
                }
            }
        }
    }
    out
}

/// The four places of `from` that make place `at` of `to`, and their weights. Places beyond the edge are those at it.
fn weights(at: usize, from: usize, to: usize) -> [(usize, f32); 4] {
    const A: f64 = -0.75;
    let exact = (at as f64 + 0.5) * from as f64 / to as f64 - 0.5;
    let (whole, t) = (exact.floor(), exact - exact.floor());
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
    let mut place = whole as i64 - 1;
    weights.map(|weight| {
        let clamped = place.clamp(0, from as i64 - 1) as usize;
        place += 1;
        (clamped, weight as f32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_size_stays_and_others_are_those_of_torch() {
        let table: Vec<f32> = (0..16).map(|i| (i % 4) as f32 + 10.0 * (i / 4) as f32).collect();
        assert_eq!(resized(&table, 4, (4, 4), 1), table);
        let fine = resized(&table, 4, (8, 8), 1);
        for (y, x, want) in [(0, 0, -1.160_156_2), (3, 3, 14.265_625), (3, 4, 14.671_875), (4, 3, 18.328_125)]
        {
            let got: f32 = fine[y * 8 + x];
            assert!((got - want).abs() < 1e-4, "({y}, {x}): {got}, not {want}");
        }
    }
}
