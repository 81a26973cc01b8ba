//! Which offsets are read. Each partition is divided into equal parts, more of them the longer it is, and one run of records is
//! read at a random place of each part: so every stretch of the job has its share.

use std::ops::Range;

use super::Random;

/// A run of offsets in one part of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Index of the partition.
    pub partition: usize,
    /// The offsets to read.
    pub offsets: Range<i64>,
    /// Offsets of the part for which the run stands.
    pub part: i64,
}

/// The places for about `count` runs of `run` offsets, in the order in which they are to be read, so that those read until any
/// moment are spread over the job. `partitions`: the job's offsets. A job of no more offsets than that is read as a whole, in
/// order.
pub fn places(partitions: &[Range<i64>], count: usize, run: usize, random: &mut Random) -> Vec<Place> {
    let run = run.max(1) as i64;
    let all: i64 = partitions.iter().map(|range| (range.end - range.start).max(0)).sum();
    let numbered = || partitions.iter().cloned().enumerate().filter(|(_, range)| range.start < range.end);
    if all <= run.saturating_mul(count as i64) {
        let whole = |(partition, offsets): (usize, Range<i64>)| {
            let part = offsets.end - offsets.start;
            Place { partition, offsets, part }
        };
        return numbered().map(whole).collect();
    }
    let mut places = Vec::with_capacity(count);
    for (partition, range) in numbered() {
        let length = range.end - range.start;
        let parts = (i128::from(length) * count as i128 / i128::from(all)).max(1) as i64;
        for part in 0..parts {
            let edge = |n: i64| range.start + (i128::from(length) * i128::from(n) / i128::from(parts)) as i64;
            let (from, to) = (edge(part), edge(part + 1));
            let spare = (to - from - run).max(0);
            let start = from + random.below(spare as u64 + 1) as i64;
            places.push(Place { partition, offsets: start..(start + run).min(to), part: to - from });
        }
    }
    random.shuffle(&mut places);
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_job_is_read_as_a_whole() {
        let partitions = [5..105, 0..0, 7..9];
        let places = places(&partitions, 10, 20, &mut Random(1));
        let place = |partition, offsets: Range<i64>| {
            let part = offsets.end - offsets.start;
            Place { partition, offsets, part }
        };
        assert_eq!(places, [place(0, 5..105), place(2, 7..9)]);
    }

    #[test]
    fn parts_cover_the_job_and_runs_lie_within_them() {
        let partitions = [1000..91_000, 50..50, 0..9000, 7..8];
        for seed in 0..50 {
            let places = places(&partitions, 30, 100, &mut Random(seed));
            let of = |partition| places.iter().filter(move |place| place.partition == partition);
            for (partition, range) in partitions.iter().enumerate() {
                assert_eq!(of(partition).map(|place| place.part).sum::<i64>(), range.end - range.start);
            }
            assert_eq!((of(0).count(), of(2).count(), of(3).count()), (27, 2, 1));
            for Place { partition, offsets, part } in &places {
                let range = &partitions[*partition];
                assert!(range.start <= offsets.start && offsets.end <= range.end, "{offsets:?}");
                assert_eq!(offsets.end - offsets.start, 100.min(*part));
            }
        }
    }
}
