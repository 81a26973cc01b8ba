//! Which of the records that were read go through the model together.

use super::Random;

/// Indexes of the records of each window, in random order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows(pub Vec<Vec<usize>>);

/// Windows of `size` records, each of which mirrors all: the records are sorted by their work, and a window takes every n-th. No
/// record is in two windows.
pub fn windows(work: &[f64], size: usize, random: &mut Random) -> Windows {
    let mut order: Vec<usize> = (0..work.len()).collect();
    // Records of the same work are in random order, not in that of the partitions.
    random.shuffle(&mut order);
    order.sort_by(|&a, &b| work[a].total_cmp(&work[b]));
    let count = (work.len() / size.max(1)).max(1);
    let mut windows = vec![Vec::with_capacity(size + 1); count];
    // The windows take turns in each row, in a new order every time: none always gets the largest of a row.
    let mut turns: Vec<usize> = (0..count).collect();
    for row in order.chunks(count) {
        random.shuffle(&mut turns);
        for (&record, &window) in row.iter().zip(&turns) {
            windows[window].push(record);
        }
    }
    windows.retain(|window| !window.is_empty());
    random.shuffle(&mut windows);
    Windows(windows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_mirror_the_job() {
        let mut random = Random(5);
        // A few records have most of the work.
        let work: Vec<f64> = (0..1000).map(|_| (random.below(1000) as f64 / 120.0).exp()).collect();
        let mean = work.iter().sum::<f64>() / 1000.0;
        let Windows(found) = windows(&work, 50, &mut random);
        assert_eq!(found.len(), 20);
        let mut seen: Vec<usize> = found.concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>(), "each record once");
        for window in &found {
            let of = window.iter().map(|&at| work[at]).sum::<f64>() / window.len() as f64;
            assert!((of / mean - 1.0).abs() < 0.1, "{of} of {mean}");
        }
        assert_eq!(windows(&[1.0, 2.0], 50, &mut random).0.len(), 1);
        assert_eq!(windows(&[], 50, &mut random).0.len(), 0);
    }
}
