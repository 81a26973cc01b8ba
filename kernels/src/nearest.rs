//! The candidates whose vectors have the largest products with a query's, exactly: every candidate is multiplied, a block
//! at a time, and only the best so far are kept.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::matmul::{Epilogue, Panels};
use super::simd::{dispatch, lanes};

/// Candidates that are multiplied together: so many that starting a block costs little even with one query.
const BLOCK: usize = 4096;
/// Blocks that a thread takes at least.
const BLOCKS: usize = 2;
/// Vectors that are compared with the worst of the best at once.
const GROUP: usize = 4;

/// The vectors of all candidates, in the layout that multiplication reads.
pub struct Candidates {
    width: usize,
    count: usize,
    /// All but the last have [`BLOCK`] candidates.
    blocks: Vec<Panels>,
    /// Candidates of the next block, `[count, width]`.
    rest: Vec<f32>,
}

/// One candidate and its product with a query.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    pub index: u32,
    pub score: f32,
}

impl Candidates {
    /// # Panics
    /// If the vectors have no values.
    pub fn new(width: usize) -> Self {
        assert!(width > 0, "vectors have values");
        Self { width, count: 0, blocks: Vec::new(), rest: Vec::new() }
    }

    /// Appends a candidate's vector.
    ///
    /// # Panics
    /// If it has another width, or there are 2³² candidates.
    pub fn push(&mut self, vector: &[f32]) {
        assert_eq!(vector.len(), self.width, "a vector of another width");
        assert!(u32::try_from(self.count).is_ok(), "fewer than 2³² candidates");
        self.rest.extend_from_slice(vector);
        self.count += 1;
        if self.rest.len() == BLOCK * self.width {
            self.close_block();
        }
    }

    fn close_block(&mut self) {
        let outputs = self.rest.len() / self.width;
        self.blocks.push(Panels::new(&self.rest, None, self.width, outputs));
        self.rest.clear();
    }

    /// Makes all candidates pushed so far ready; none is pushed after.
    pub fn finish(mut self) -> Self {
        if !self.rest.is_empty() {
            self.close_block();
        }
        self.rest = Vec::new();
        self
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of their memory.
    pub fn bytes(&self) -> usize {
        // A block's last panel is padded.
        let columns = self.blocks.iter().map(|block| block.outputs.next_multiple_of(2 * lanes()));
        columns.sum::<usize>() * self.width * size_of::<f32>()
    }

    /// For each query the `most` best candidates, the best first; of equal ones, the earlier first. `queries` is `[count,
    /// width]`. The result of a query does not depend on the others. Runs on the threads of the current rayon pool.
    pub fn nearest(&self, queries: &[f32], most: usize) -> Vec<Vec<Found>> {
        let rows = queries.len() / self.width;
        let start = || Search {
            best: vec![Best { most: most.min(self.count), found: Vec::new() }; rows],
            scores: Vec::new(),
        };
        let search = |mut search: Search, (at, block): (usize, &Panels)| {
            search.scores.resize(rows * block.outputs, 0.0);
            block.multiply(queries, &mut search.scores, &Epilogue::Nothing);
            let Search { best, scores } = &mut search;
            dispatch(Scan { scores, first: (at * BLOCK) as u32, columns: block.outputs, best });
            search
        };
        let blocks = self.blocks.par_iter().enumerate().with_min_len(BLOCKS);
        // Parts are merged in the order of the candidates.
        let all = blocks.fold(start, search).reduce(start, Search::merge);
        all.best.into_iter().map(|best| best.found).collect()
    }
}

/// The state of one thread's search.
struct Search {
    /// One per query.
    best: Vec<Best>,
    /// `[queries, candidates of a block]`.
    scores: Vec<f32>,
}

impl Search {
    /// `later` has searched candidates after those of `self`.
    fn merge(mut self, later: Self) -> Self {
        for (best, later) in self.best.iter_mut().zip(later.best) {
            later.found.into_iter().for_each(|found| best.offer(found));
        }
        self
    }
}

/// The best candidates for one query so far.
#[derive(Clone)]
struct Best {
    most: usize,
    /// The best first; of equal ones, the earlier first.
    found: Vec<Found>,
}

impl Best {
    /// What the score of another candidate must be above.
    fn worst(&self) -> f32 {
        match self.found.last() {
            Some(last) if self.found.len() == self.most => last.score,
            _ => f32::NEG_INFINITY,
        }
    }

    /// Takes a candidate that comes after all others.
    fn offer(&mut self, found: Found) {
        let at = self.found.partition_point(|known| known.score >= found.score);
        if at < self.most {
            self.found.truncate(self.most - 1);
            self.found.insert(at, found);
        }
    }
}

/// Offers the candidates of a block to each query's best.
struct Scan<'a> {
    /// `[queries, columns]`.
    scores: &'a [f32],
    /// Index of the first candidate.
    first: u32,
    columns: usize,
    best: &'a mut [Best],
}

impl WithSimd for Scan<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { scores, first, columns, best } = self;
        for (scores, best) in scores.chunks(columns).zip(best) {
            let mut worst = best.worst();
            let mut offer = |start: usize, scores: &[f32]| {
                for (index, &score) in (first + start as u32..).zip(scores) {
                    if score > worst {
                        best.offer(Found { index, score });
                        worst = best.worst();
                    }
                }
                worst
            };
            let (vectors, rest) = S::as_simd_f32s(scores);
            let mut limit = offer(0, &[]);
            for (at, group) in vectors.chunks(GROUP).enumerate() {
                let largest = group[1..].iter().fold(group[0], |a, &b| simd.max_f32s(a, b));
                if simd.reduce_max_f32s(largest) > limit {
                    let start = at * GROUP * S::F32_LANES;
                    limit = offer(start, &scores[start..start + group.len() * S::F32_LANES]);
                }
            }
            offer(scores.len() - rest.len(), rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::{by_each_width, is_too_large, random};
    use super::*;

    fn candidates(vectors: &[f32], width: usize) -> Candidates {
        let mut candidates = Candidates::new(width);
        vectors.chunks(width).for_each(|vector| candidates.push(vector));
        candidates.finish()
    }

    #[test]
    fn the_best_of_all_are_found() {
        for (count, width, queries) in [(1, 3, 2), (700, 5, 3), (5000, 17, 40), (4096, 8, 1)] {
            if is_too_large(queries, width, count) {
                continue;
            }
            let (vectors, queries) = (random(count * width, 1), random(queries * width, 2));
            let all = candidates(&vectors, width);
            assert_eq!(all.len(), count);
            for most in [1, 10, count] {
                for (query, found) in queries.chunks(width).zip(all.nearest(&queries, most)) {
                    let dot = |a: &[f32]| {
                        a.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
                    };
                    let mut want: Vec<f64> = vectors.chunks(width).map(dot).collect();
                    for found in &found {
                        assert!((want[found.index as usize] - f64::from(found.score)).abs() < 1e-5);
                    }
                    want.sort_by(|a, b| b.total_cmp(a));
                    assert_eq!(found.len(), most.min(count));
                    assert!(found.is_sorted_by(|a, b| a.score >= b.score));
                    for (found, want) in found.iter().zip(want) {
                        assert!((f64::from(found.score) - want).abs() < 1e-5);
                    }
                    let distinct: std::collections::HashSet<u32> =
                        found.iter().map(|found| found.index).collect();
                    assert_eq!(distinct.len(), found.len());
                }
            }
        }
    }

    #[test]
    fn of_equal_candidates_the_earlier_is_first() {
        let (count, width) = if cfg!(miri) { (600, 2) } else { (40_000, 2) };
        let vectors: Vec<f32> = (0..count).flat_map(|i| [(i % 3) as f32, 0.0]).collect();
        let found = candidates(&vectors, width).nearest(&[1.0, 0.0, -1.0, 0.0], 5);
        let indexes = |at: usize| found[at].iter().map(|found| found.index).collect::<Vec<_>>();
        assert_eq!(indexes(0), [2, 5, 8, 11, 14]);
        assert_eq!(indexes(1), [0, 3, 6, 9, 12]);
    }

    #[test]
    fn a_query_has_the_same_result_among_others() {
        let (count, width) = if cfg!(miri) { (100, 4) } else { (3000, 24) };
        let (all, queries) = (candidates(&random(count * width, 1), width), random(30 * width, 2));
        for (query, together) in queries.chunks(width).zip(all.nearest(&queries, 7)) {
            assert_eq!(all.nearest(query, 7), [together]);
        }
    }

    struct Each<'a>(&'a [f32]);

    impl WithSimd for Each<'_> {
        type Output = Vec<Found>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<Found> {
            let mut best = vec![Best { most: 6, found: Vec::new() }];
            Scan { scores: self.0, first: 100, columns: self.0.len(), best: &mut best }.with_simd(simd);
            best.remove(0).found
        }
    }

    #[test]
    fn every_vector_width_finds_the_same() {
        let scores = random(333, 9);
        let mut want: Vec<Found> =
            (100..).zip(&scores).map(|(index, &score)| Found { index, score }).collect();
        want.sort_by(|a, b| b.score.total_cmp(&a.score));
        want.truncate(6);
        for found in by_each_width(|| Each(&scores)) {
            assert_eq!(found, want);
        }
    }
}
