//! The sample of a dry run: reads records, learns their work, and runs windows of them until the estimate is good enough.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::message::Message;

use crate::compute::{Compute, detached};
use crate::estimate::{self, Enough, Estimate, Estimator, Job, Lengths, Place, Random, Windows};
use crate::flow::Outcome;
use crate::kafka::consumer;
use crate::kafka::headers::Headers;
use crate::kafka::range;
use crate::lease::Lease;
use crate::record::{Arrival, Partition};
use crate::settings::Settings;
use crate::source::OriginalTopics;
use crate::telemetry::Metrics;
use crate::window::{ClosedBy, Gatherer, Limits, Window};

/// Places that are read of a job that is too large to be read as a whole. Finding one takes a request.
const PLACES: usize = 64;
/// Records of the first place, by which the others are dimensioned.
const FIRST: usize = 16;
/// Bytes of values that are kept in memory, at most.
const KEPT: u64 = 64 << 20;
/// Timeout for reading one place.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// Places that are read even if there is no time for it.
const FEWEST: usize = 4;
/// Windows of a sample that takes as long as it may.
const WINDOWS: f64 = 30.0;
/// Shares of the sample's time: for reading, and for preparing records to learn their work.
const READING: f64 = 0.3;
const PREPARING: f64 = 0.1;
/// Records of which it is enough to know the work.
const PREPARED: usize = 2048;
/// If more records than this are duplicates, the sample has whole windows as the job has them: duplicates are computed once per
/// window, so smaller ones would have fewer.
const DUPLICATES: f64 = 0.05;
/// Least time for reading and preparing, of however small a job.
const MOMENT: Duration = Duration::from_millis(100);

/// A record of the sample, outside of librdkafka's queue.
struct Sampled {
    partition: usize,
    offset: i64,
    timestamp: Option<i64>,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Option<Headers>,
}

impl Sampled {
    fn bytes(&self) -> usize {
        self.value.as_ref().map_or(0, Vec::len)
    }
}

/// Records of one place, in the order of their offsets.
pub struct Run {
    place: Place,
    records: Vec<Sampled>,
    /// Offsets that were read, from the place's first.
    offsets: i64,
    /// From the first record to the last.
    took: Duration,
}

/// How many records were prepared to learn their work, and run.
#[derive(Debug, Default)]
pub struct Seen {
    pub prepared: usize,
    /// Tokens of those that were prepared.
    pub tokens: u64,
    pub run: usize,
    pub dead: u64,
}

pub struct Sample<'a> {
    pub settings: &'a Settings,
    pub compute: Arc<dyn Compute>,
    /// The input is the dead letters of these topics.
    pub reprocess: Option<&'a OriginalTopics>,
    pub partitions: Vec<Partition>,
    pub random: Random,
    /// When the sample was begun.
    pub began: Instant,
}

impl Sample<'_> {
    /// Records of this many bytes that a window of the job holds.
    fn window(&self, bytes: f64) -> usize {
        let limits = Limits::of(self.settings, self.compute.lanes());
        let by_bytes = limits.max_bytes as f64 / bytes.max(1.0);
        let by_work = limits.max_work.as_secs_f64() / self.compute.work(bytes as usize).max(1e-9);
        let by_work = (by_work as usize).max(limits.work_records);
        (by_bytes as usize).min(by_work).clamp(1, limits.max_records)
    }

    /// Seconds that a sample may take, by the pace of the first forward passes; `bytes`: of a record.
    fn limit(&self, offsets: i64, bytes: f64) -> f64 {
        estimate::limit(offsets as f64 * self.compute.work(bytes as usize))
    }

    /// Reads runs of records at places all over the job, or all of a small job.
    pub fn read(&mut self, ranges: &[Range<i64>], offsets: i64) -> anyhow::Result<Vec<Run>> {
        let consumer = consumer::sampler(self.settings)?;
        let first = self.first(&consumer, ranges)?;
        // The job's windows are as long as the runs if there is memory for it.
        let kept = KEPT.min(self.settings.memory.limit.0 / 8) as f64;
        let run = self.window(first).max(FIRST).min((kept / first / PLACES as f64) as usize).max(1);
        let places = estimate::places(ranges, PLACES, run, &mut self.random);
        let is_whole = places.iter().map(|place| place.part).sum::<i64>()
            == places.iter().map(|place| place.offsets.end - place.offsets.start).sum::<i64>();
        let deadline = Duration::from_secs_f64(READING * self.limit(offsets, first)).max(MOMENT);
        let (mut runs, mut bytes): (Vec<Run>, usize) = (Vec::new(), 0);
        for place in places {
            let late = !is_whole && runs.len() >= FEWEST && self.began.elapsed() > deadline;
            // The first records may have been much smaller than others.
            if late || bytes as f64 > 2.0 * kept {
                break;
            }
            let run = self.run(&consumer, place, usize::MAX)?;
            bytes += run.records.iter().map(Sampled::bytes).sum::<usize>();
            runs.push(run);
        }
        if runs.iter().all(|run| run.records.is_empty()) {
            bail!("no record could be read: there is nothing to estimate from");
        }
        Ok(runs)
    }

    /// Mean bytes of a few records, from the first partition that has some.
    fn first<C: ConsumerContext>(
        &self,
        consumer: &BaseConsumer<C>,
        ranges: &[Range<i64>],
    ) -> anyhow::Result<f64> {
        for (partition, offsets) in ranges.iter().enumerate().filter(|(_, range)| !range.is_empty()) {
            let place = Place { partition, offsets: offsets.clone(), part: offsets.end - offsets.start };
            let Run { records, .. } = self.run(consumer, place, FIRST)?;
            if !records.is_empty() {
                let bytes: usize = records.iter().map(Sampled::bytes).sum();
                return Ok((bytes as f64 / records.len() as f64).max(1.0));
            }
        }
        bail!("no record could be read: there is nothing to estimate from")
    }

    /// Reads the records of a place, `count` of them at most.
    fn run<C: ConsumerContext>(
        &self,
        consumer: &BaseConsumer<C>,
        place: Place,
        count: usize,
    ) -> anyhow::Result<Run> {
        let partition = &self.partitions[place.partition];
        let (from, to) = (place.offsets.start, place.offsets.end);
        let deadline = Instant::now() + READ_TIMEOUT;
        let (mut next, mut records, mut times) = (from, Vec::new(), None);
        let read = range::read(consumer, partition, from, READ_TIMEOUT, |message| {
            if message.offset() >= to {
                next = to;
                return ControlFlow::Break(());
            }
            let now = Instant::now();
            let (first, _) = *times.get_or_insert((now, now));
            times = Some((first, now));
            next = message.offset() + 1;
            if self.reprocess.is_none_or(|topics| topics.origin(message).is_some()) {
                records.push(Sampled {
                    partition: place.partition,
                    offset: message.offset(),
                    timestamp: message.timestamp().to_millis().filter(|&t| t >= 0),
                    key: message.key().map(<[u8]>::to_vec),
                    value: message.payload().map(<[u8]>::to_vec),
                    headers: Headers::of(message),
                });
            }
            match records.len() < count && next < to && now < deadline {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
        if read.with_context(|| format!("reading {partition}"))? == range::Read::End {
            // The last offsets have no records.
            next = to;
        }
        let took = times.map_or(Duration::ZERO, |(first, last)| last - first);
        Ok(Run { place, records, offsets: next - from, took })
    }

    /// Learns the work of the records, and runs windows of them until the pace is known well enough.
    pub fn measure(
        &mut self,
        runs: Vec<Run>,
        offsets: i64,
        start: f64,
        metrics: &Metrics,
    ) -> anyhow::Result<(Estimate, Enough, Seen)> {
        let mut known = Lengths::default();
        let mut seen = Seen::default();
        let (mut bytes, mut count, mut took) = (0, 0, Duration::ZERO);
        for Run { place, records, offsets, took: of_run } in &runs {
            known.read(place, *offsets, records.iter().map(Sampled::bytes).collect());
            bytes += records.iter().map(Sampled::bytes).sum::<usize>();
            count += records.len();
            took += *of_run;
        }
        let (mean, read_seconds) = (bytes as f64 / count as f64, self.began.elapsed().as_secs_f64());
        let (window, limit) = (self.window(mean), self.limit(offsets, mean));
        let is_read = offsets == runs.iter().map(|run| run.offsets).sum::<i64>();

        let chunks: Vec<&[Sampled]> = runs.iter().flat_map(|run| run.records.chunks(window)).collect();
        let mut order: Vec<usize> = (0..chunks.len()).collect();
        self.random.shuffle(&mut order);
        let (preparing, until) = (Instant::now(), Duration::from_secs_f64(PREPARING * limit).max(MOMENT / 2));
        let (mut work, mut equal, mut gatherer) = (0, 0, Gatherer::new(Limits::NONE));
        for (number, &at) in order.iter().enumerate() {
            if number > 0 && (seen.prepared >= PREPARED || preparing.elapsed() > until) {
                break;
            }
            let records = chunks[at];
            let costs = self.compute.costs(self.gather(&mut gatherer, records.iter()));
            for (record, &cost) in records.iter().zip(&costs) {
                // A record without items takes a little time too.
                known.prepared(record.bytes(), cost as f64 + 1.0);
                work += cost;
                equal += usize::from(cost == 0 && record.value.is_some());
            }
            seen.prepared += records.len();
        }
        seen.tokens = metrics.tokens.get();

        let pool: Vec<&Sampled> = runs.iter().flat_map(|run| &run.records).collect();
        let of_pool: Vec<f64> = pool.iter().map(|record| known.work(record.bytes())).collect();
        let Windows(windows) = match equal as f64 > DUPLICATES * seen.prepared as f64 {
            true => {
                let mut at = 0;
                let windows = chunks.iter().map(|chunk| {
                    at += chunk.len();
                    (at - chunk.len()..at).collect()
                });
                let mut windows: Vec<Vec<usize>> = windows.collect();
                self.random.shuffle(&mut windows);
                Windows(windows)
            }
            false => {
                let by_time = limit / WINDOWS / self.compute.work(mean as usize).max(1e-9);
                // A window of less work would be cut into smaller batches than the job's.
                let full = 1.5 * self.compute.full() as f64 * seen.prepared as f64 / (work as f64).max(1.0);
                estimate::windows(&of_pool, (by_time.max(full) as usize).clamp(1, window), &mut self.random)
            }
        };
        let (records, of_job, error) = known.whole(offsets);
        let mut estimator = Estimator::new(Job {
            records,
            work: of_job,
            error,
            edges: start,
            reading: took.as_secs_f64() * records / count as f64,
            windows: windows.len(),
            is_whole: is_read,
        });
        let sizes = windows.iter().map(Vec::len);
        tracing::debug!(
            records = count,
            prepared = seen.prepared,
            equal,
            windows = windows.len(),
            largest_window = sizes.max(),
            read_seconds,
            prepared_seconds = preparing.elapsed().as_secs_f64(),
            "running the sample"
        );
        let enough = self.windows(&windows, (&pool, &of_pool), &mut estimator, &mut seen)?;
        let estimate = estimator.estimate().context("no window of the sample was answered")?;
        Ok((estimate, enough, seen))
    }

    /// Runs windows until it is enough.
    fn windows(
        &self,
        windows: &[Vec<usize>],
        (pool, work): (&[&Sampled], &[f64]),
        estimator: &mut Estimator,
        seen: &mut Seen,
    ) -> anyhow::Result<Enough> {
        let mut gatherer = Gatherer::new(Limits::NONE);
        let gathered = windows.iter().map(move |window| {
            let mut records: Vec<&Sampled> = window.iter().map(|&at| pool[at]).collect();
            records.sort_by_key(|record| (record.partition, record.offset));
            self.gather(&mut gatherer, records.into_iter())
        });
        let mut rest = windows.iter();
        let mut enough = None;
        let sent = Instant::now();
        detached::answer_all(&self.compute, gathered, |encoded| {
            let at = sent.elapsed().as_secs_f64();
            // They are answered in the order in which they were sent.
            let of_window = rest.next().map_or(0.0, |window| window.iter().map(|&at| work[at]).sum());
            seen.run += encoded.outcomes.len();
            let dead = encoded.outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Dead(_)));
            seen.dead += dead.count() as u64;
            estimator.answered(at, of_window);
            enough = estimator.enough(self.began.elapsed().as_secs_f64());
            match enough {
                None => ControlFlow::Continue(()),
                Some(_) => ControlFlow::Break(()),
            }
        })?;
        enough.context("the sample ended before its last window was answered")
    }

    /// A window of these records, which are in the order of their offsets.
    fn gather<'r>(&self, gatherer: &mut Gatherer, records: impl Iterator<Item = &'r Sampled>) -> Window {
        let lease = Lease::new(0);
        for record in records {
            let arrival = Arrival {
                offset: record.offset,
                timestamp: record.timestamp,
                key: record.key.as_deref(),
                value: record.value.as_deref(),
                headers: record.headers.clone(),
                ..Arrival::default()
            };
            // The gatherer has no limits, so this returns no window.
            gatherer.push(&self.partitions[record.partition], &lease, arrival, Instant::now());
        }
        gatherer.close(ClosedBy::End).expect("a window of the sample has records")
    }
}
