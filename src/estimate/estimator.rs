//! The time of a job, the interval in which it lies, and when that is known well enough.

use super::pace::{EMPTYING, Pace};

/// The sample ends when the 95 % interval is this share of the estimate to each side.
pub const PRECISION: f64 = 0.05;
/// Share of the job's time that the sample may take at most,
pub const SHARE: f64 = 0.1;
/// and seconds.
pub const LONGEST: f64 = 10.0;
/// Fewer windows are never enough for [`PRECISION`].
const LEAST: usize = 12;
/// By how much the machine's pace differs between the sample and the job: other work, frequency, temperature. A relative standard
/// error that no sample shows, because it varies from one run to the next.
const DRIFT: f64 = 0.02;
/// Seconds by which start and end vary: joining the group, the first fetch, the last commit. A standard error.
const EDGES: f64 = 0.15;

/// Reading and publishing take so many times as long as reading: without a model, publishing costs about twice what reading does
/// (benches/RESULTS.md).
const KAFKA: f64 = 3.0;

/// Why the sample is large enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enough {
    /// The interval is narrow enough.
    Precise,
    /// It has taken as long as it may.
    Limit,
    /// The sample has no more windows.
    All,
}

impl Enough {
    pub fn name(self) -> &'static str {
        match self {
            Enough::Precise => "precision",
            Enough::Limit => "limit",
            Enough::All => "records",
        }
    }
}

/// What is known of a job before its records go through the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Job {
    pub records: f64,
    /// Work of all records, by [`Lengths::work`](super::Lengths::work).
    pub work: f64,
    /// Relative standard error of the work; 0 if every record was read.
    pub error: f64,
    /// Seconds before the first and after the last record.
    pub edges: f64,
    /// Seconds to read all records, by a client that does nothing else.
    pub reading: f64,
    /// Windows that there are to run.
    pub windows: usize,
    /// They hold all the job's records.
    pub is_whole: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Estimator {
    job: Job,
    pace: Pace,
}

/// How long a job takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    pub records: f64,
    /// Seconds from the start of the process to its end.
    pub seconds: f64,
    /// Half of the 95 % interval, in seconds.
    pub margin: f64,
    /// Windows by which the pace is known.
    pub windows: usize,
}

impl Estimate {
    /// The 95 % interval, in seconds.
    pub fn interval(&self) -> (f64, f64) {
        ((self.seconds - self.margin).max(0.0), self.seconds + self.margin)
    }
}

impl Estimator {
    pub fn new(job: Job) -> Self {
        Self { job, pace: Pace::default() }
    }

    /// Takes the work of a window, by [`Lengths::work`], and when it was answered, in seconds since the first one was sent.
    pub fn answered(&mut self, at: f64, work: f64) {
        self.pace.answered(at, work);
    }

    /// The estimate so far; `None` before the first window was answered.
    pub fn estimate(&self) -> Option<Estimate> {
        let Job { records, work, error: of_lengths, edges, reading, windows: all, is_whole } = self.job;
        let (model, of_pace, windows) = if is_whole && self.pace.len() >= all {
            // The job itself was run.
            (self.pace.whole().0, 0.0, all)
        } else {
            let known = self.pace.known(all.saturating_sub(EMPTYING), work)?;
            (known.seconds * work, known.within, known.windows)
        };
        // On a CPU the clients of Kafka compete with the model for the cores, but not where it leaves them time.
        let kafka = KAFKA * reading;
        let normal = |error: f64| (1.96 * error).powi(2);
        let of_model = (of_pace.powi(2) + normal(of_lengths) + normal(DRIFT)).sqrt() * model;
        let margin = (of_model.powi(2) + ((KAFKA - 1.0) * reading).powi(2) + normal(EDGES)).sqrt();
        Some(Estimate { records, seconds: edges + model + kafka, margin, windows })
    }

    /// Whether the sample is large enough, `elapsed` seconds after it was begun.
    pub fn enough(&self, elapsed: f64) -> Option<Enough> {
        let estimate = self.estimate()?;
        if self.pace.len() >= self.job.windows {
            return Some(Enough::All);
        }
        let limit = limit(estimate.seconds);
        // A short sample sees only one moment of the machine, and its windows look more alike than they are.
        let long = estimate.windows >= LEAST && elapsed >= limit / 2.0;
        if long && estimate.margin <= PRECISION * estimate.seconds {
            return Some(Enough::Precise);
        }
        // The windows that are under way are still answered.
        let (seconds, _) = self.pace.whole();
        let ending = 2.0 * seconds / self.pace.len() as f64;
        (elapsed + ending >= limit).then_some(Enough::Limit)
    }
}

/// Seconds that a sample may take, of a job of this many.
pub fn limit(job: f64) -> f64 {
    (SHARE * job).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::{Lengths, Random, Windows, places, windows};

    fn uniform(random: &mut Random) -> f64 {
        (random.number() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(random: &mut Random) -> f64 {
        let (a, b) = (uniform(random).max(1e-12), uniform(random));
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }

    /// The records of a job, and what they take.
    struct Backlog {
        /// Lengths in bytes, by partition.
        partitions: Vec<Vec<usize>>,
        /// Tokens of each record.
        tokens: Vec<Vec<f64>>,
        /// Seconds per token of a short text.
        seconds: f64,
        start: f64,
        /// Records that the job puts into a window.
        window: usize,
    }

    /// A machine with other work: its pace varies from window to window, for seconds, and from run to run.
    struct Machine {
        run: f64,
        slow: f64,
        random: Random,
    }

    impl Machine {
        fn new(mut random: Random) -> Self {
            Self { run: 1.0 + 0.015 * normal(&mut random), slow: 0.0, random }
        }

        /// Seconds that work of so many takes it.
        fn takes(&mut self, seconds: f64) -> f64 {
            // Half of a slow moment is over after 1 s.
            let stays = 0.5f64.powf(seconds);
            self.slow = stays * self.slow + 0.02 * (1.0 - stays * stays).sqrt() * normal(&mut self.random);
            seconds
                * (self.run + self.slow + 0.02 / seconds.max(1e-3).sqrt() * normal(&mut self.random)).max(0.3)
        }
    }

    impl Backlog {
        /// Texts of mixed lengths: which ones depends on the partition, and may change along it.
        fn new(seed: u64) -> Self {
            let mut random = Random(seed);
            let mut pick = |options: &[f64]| options[random.below(options.len() as u64) as usize];
            let (count, window) = (pick(&[300.0, 2000.0, 12_000.0, 30_000.0]), pick(&[1024.0, 200.0]));
            let (parts, spread, trend) =
                (pick(&[1.0, 2.0, 5.0]), pick(&[0.2, 0.75, 1.3]), pick(&[0.0, 0.0, 1.5]));
            let (median, apart, seconds) =
                (pick(&[60.0, 300.0, 3000.0]), pick(&[0.0, 1.0]), pick(&[20.0, 100.0, 1000.0]));
            let each = (count / parts) as usize;
            let mut tokens_of = Random(seed ^ 1);
            let partitions: Vec<Vec<usize>> = (0..parts as usize)
                .map(|partition| {
                    (0..each)
                        .map(|i| {
                            let center: f64 = median * (apart * partition as f64).exp2();
                            let along = trend * (i as f64 / each as f64 - 0.5);
                            (center * (spread * normal(&mut random) + along).exp()) as usize + 5
                        })
                        .collect()
                })
                .collect();
            let tokens: Vec<Vec<f64>> = partitions
                .iter()
                .map(|lengths| {
                    let of = |&bytes: &usize| {
                        (2.0 + bytes as f64 / (3.0 + 2.0 * uniform(&mut tokens_of))).min(512.0)
                    };
                    lengths.iter().map(of).collect()
                })
                .collect();
            let mut job = Self { partitions, tokens, seconds: 1.0, start: 1.5, window: window as usize };
            let all: Vec<(usize, usize)> = job.all().collect();
            job.seconds = seconds / job.ideal(&all);
            job
        }

        fn all(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
            self.partitions
                .iter()
                .enumerate()
                .flat_map(|(p, lengths)| (0..lengths.len()).map(move |i| (p, i)))
        }

        /// Seconds of these records on an even machine: long texts cost more than their tokens.
        fn ideal(&self, records: &[(usize, usize)]) -> f64 {
            let of = |&(p, i): &(usize, usize)| {
                let tokens = self.tokens[p][i];
                self.seconds * tokens * (1.0 + tokens / 2000.0)
            };
            records.iter().map(of).sum()
        }

        fn run(&self, random: Random) -> f64 {
            let mut machine = Machine::new(random);
            let edges = self.start + 0.1 * normal(&mut machine.random);
            let all: Vec<(usize, usize)> = self.all().collect();
            edges + all.chunks(self.window).map(|window| machine.takes(self.ideal(window))).sum::<f64>()
        }

        /// A sample as `cli::dry_run` takes it: the estimate, why it ended, the seconds it took, and those of its longest window.
        fn sample(&self, mut random: Random) -> (Estimate, Enough, f64, f64) {
            let ranges: Vec<_> = self.partitions.iter().map(|lengths| 0..lengths.len() as i64).collect();
            let offsets = ranges.iter().map(|range| range.end).sum();
            let mut known = Lengths::default();
            let mut clock = 0.0;
            let places = places(&ranges, 64, self.window.max(64), &mut random);
            let mut pool = Vec::new();
            let mut read = 0;
            for place in places {
                let run = place.offsets.start as usize..place.offsets.end as usize;
                clock += 0.002 + 2e-6 * run.len() as f64;
                let lengths: Vec<usize> = self.partitions[place.partition][run.clone()].to_vec();
                // A part of them is prepared.
                for i in run.clone().step_by(3) {
                    let bytes = self.partitions[place.partition][i];
                    known.prepared(bytes, self.tokens[place.partition][i]);
                }
                read += run.len();
                pool.extend(run.map(|i| (place.partition, i)));
                known.read(&place, lengths.len() as i64, lengths);
            }
            let work: Vec<f64> = pool.iter().map(|&(p, i)| known.work(self.partitions[p][i])).collect();
            let per_record = self.ideal(&pool) / pool.len() as f64;
            let target = limit(per_record * offsets as f64) / 30.0;
            let size = ((target / per_record) as usize).clamp(1, self.window);
            let Windows(windows) = windows(&work, size, &mut random);
            let (records, of_job, error) = known.whole(offsets);
            let mut estimator = Estimator::new(Job {
                records,
                work: of_job,
                error,
                edges: self.start,
                reading: 2e-6 * records,
                windows: windows.len(),
                is_whole: read as i64 == offsets,
            });
            let mut machine = Machine::new(Random(random.number()));
            let (mut at, mut longest) = (0.0, 0f64);
            for window in &windows {
                let records: Vec<(usize, usize)> = window.iter().map(|&i| pool[i]).collect();
                let seconds = machine.takes(self.ideal(&records));
                (at, longest) = (at + seconds, longest.max(seconds));
                estimator.answered(at, window.iter().map(|&i| work[i]).sum());
                if let Some(enough) = estimator.enough(clock + at) {
                    return (estimator.estimate().expect("a window"), enough, clock + at, longest);
                }
            }
            panic!("the last window is enough");
        }
    }

    #[test]
    fn jobs_end_within_the_interval() {
        const JOBS: u64 = 200;
        let (mut inside, mut precise, mut long) = (0, 0, 0);
        for seed in 0..JOBS {
            let job = Backlog::new(seed * 7 + 1);
            let (estimate, enough, took, longest) = job.sample(Random(seed * 31 + 5));
            let truth = job.run(Random(seed * 13 + 9));
            let (low, high) = estimate.interval();
            inside += u64::from((low..=high).contains(&truth));
            // The last window may end a little late.
            assert!(took <= limit(1.2 * truth) + longest, "{took} s of {truth} s");
            if enough == Enough::Precise {
                assert!(high - low <= 2.0001 * PRECISION * estimate.seconds);
            }
            // If there is time for some hundred records.
            if truth > 80.0 && truth < 0.02 * job.all().count() as f64 {
                long += 1;
                precise += u64::from(enough == Enough::Precise);
            }
        }
        assert!(inside >= JOBS * 92 / 100, "{inside} of {JOBS}");
        // Not by intervals that are as wide as the limit allows.
        assert!(precise >= long * 8 / 10, "{precise} of {long}");
    }

    #[test]
    fn a_job_that_was_run_as_a_whole_takes_what_it_took() {
        let job =
            Job { records: 4.0, work: 4.0, error: 0.0, edges: 1.0, reading: 0.0, windows: 2, is_whole: true };
        let mut estimator = Estimator::new(job);
        assert_eq!(estimator.enough(0.1), None);
        estimator.answered(0.5, 2.0);
        assert_eq!(estimator.enough(0.001), Some(Enough::Limit), "a tenth of 2 s is nearly over");
        estimator.answered(0.8, 2.0);
        assert_eq!(estimator.enough(0.001), Some(Enough::All));
        let estimate = estimator.estimate().expect("answered");
        assert!((estimate.seconds - 1.8).abs() < 1e-9 && estimate.margin < 0.31, "{estimate:?}");
    }
}
