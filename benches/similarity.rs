//! How fast similarity finds the nearest of a million candidates, beside the machine's limits: the memory's bandwidth,
//! which binds with few queries, and the rate of matrix multiplication, which binds with many. All on all cores, and in
//! one run. `cargo bench --bench similarity [-- CANDIDATES WIDTH]`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use kandle::model::kernels::matmul::{Epilogue, Panels};
use kandle::model::kernels::nearest::Candidates;
use rayon::prelude::*;

const CANDIDATES: usize = 1_000_000;
const WIDTH: usize = 384;
const TOP_K: usize = 10;
const QUERIES: [usize; 7] = [1, 4, 16, 32, 64, 128, 1024];
/// A window's records are predicted in parts of so many.
const PART: usize = 128;
/// Rows and columns of the multiplication whose rate is the limit: as many rows as are multiplied together, and so few
/// columns that the weights stay in the L2 cache.
const ROWS: usize = 264;
const COLUMNS: usize = 512;

/// Pseudo-random vectors of length 1.
fn vectors(count: usize, width: usize, seed: u64) -> Vec<f32> {
    let vector = |i: usize| {
        let mut state = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
        let next = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let vector: Vec<f32> = (0..width).map(next).collect();
        let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
        vector.into_iter().map(|x| x / length).collect::<Vec<_>>()
    };
    (0..count).flat_map(vector).collect()
}

/// The shortest of several runs, in seconds: other processes only make a run longer.
fn best(runs: usize, mut run: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed()
    };
    (0..runs).map(time).min().unwrap_or(Duration::MAX).as_secs_f64()
}

/// Bytes per second of reading memory far larger than the caches, as the reading part of STREAM.
fn bandwidth() -> f64 {
    let memory: Vec<u64> = (0..1u64 << 27).into_par_iter().collect();
    let sum = |part: &[u64]| {
        let (eights, _) = part.as_chunks::<8>();
        let mut sums = [0u64; 8];
        for eight in eights {
            for (sum, x) in sums.iter_mut().zip(eight) {
                *sum = sum.wrapping_add(*x);
            }
        }
        sums.iter().fold(0, |a: u64, b| a.wrapping_add(*b))
    };
    let seconds = best(10, || {
        black_box(memory.par_chunks(1 << 16).map(sum).reduce(|| 0, u64::wrapping_add));
    });
    size_of_val(&memory[..]) as f64 / seconds
}

/// Floating-point operations per second of the multiplication of f32 in the caches.
fn multiplication(width: usize) -> f64 {
    let threads = rayon::current_num_threads();
    let (x, weight) = (vectors(ROWS, width, 1), vectors(COLUMNS, width, 2));
    let rounds = 20;
    let seconds = best(10, || {
        (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
            let panels = Panels::new(&weight, None, width, COLUMNS);
            let mut out = vec![0.0; ROWS * COLUMNS];
            for _ in 0..rounds {
                panels.multiply(&x, &mut out, &Epilogue::Nothing);
            }
            black_box(out);
        });
    });
    (2 * ROWS * COLUMNS * width * rounds * threads) as f64 / seconds
}

fn main() {
    let mut sizes = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
    let (count, width) = (sizes.next().unwrap_or(CANDIDATES), sizes.next().unwrap_or(WIDTH));
    let mut candidates = Candidates::new(width);
    for start in (0..count).step_by(PART) {
        vectors(PART.min(count - start), width, start as u64)
            .chunks(width)
            .for_each(|vector| candidates.push(vector));
    }
    let candidates = candidates.finish();
    let (read, multiply) = (bandwidth(), multiplication(width));
    println!(
        "{count} candidates of {width} values, {:.0} MiB, top {TOP_K}, {} threads; reads {:.1} GB/s, multiplies {:.0} GFLOP/s\n",
        candidates.bytes() as f64 / f64::from(1 << 20),
        rayon::current_num_threads(),
        read / 1e9,
        multiply / 1e9
    );
    println!("| queries | ms | queries/s | GB/s | of the reads | GFLOP/s | of the multiplication |");
    println!("|---|---|---|---|---|---|---|");
    for queries in QUERIES {
        let rows = vectors(queries, width, 77);
        let seconds = best(if queries > PART { 2 } else { 5 }, || {
            let parts = rows.par_chunks(PART * width);
            black_box(parts.map(|part| candidates.nearest(part, TOP_K)).collect::<Vec<_>>());
        });
        let bytes = (candidates.bytes() * queries.div_ceil(PART)) as f64 / seconds;
        let operations = (2 * count * width * queries) as f64 / seconds;
        println!(
            "| {queries} | {:.1} | {:.0} | {:.1} | {:.0}% | {:.0} | {:.0}% |",
            seconds * 1e3,
            queries as f64 / seconds,
            bytes / 1e9,
            100.0 * bytes / read,
            operations / 1e9,
            100.0 * operations / multiply
        );
    }
}
