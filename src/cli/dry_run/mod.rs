//! `drain --dry-run` and `replay --dry-run`: estimate the time and the price of the job from a sample. Publishes and commits
//! nothing, and joins no group. What the numbers mean is in [`crate::estimate`].

mod sample;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use anyhow::{Context, bail};
use serde::Serialize;

use self::sample::{Sample, Seen};
use super::drain;
use super::output::outln;
use crate::estimate::{Enough, Estimate, Random};
use crate::kafka::cluster::Cluster;
use crate::kafka::range::Range;
use crate::record::Partition;
use crate::settings::Settings;
use crate::source::{self, OriginalTopics};
use crate::task;
use crate::telemetry::Metrics;

/// The time that a coordinator waits for more members of an empty group, in ms; and Kafka's default.
const REBALANCE_DELAY: &str = "group.initial.rebalance.delay.ms";
const DEFAULT_REBALANCE_DELAY: u64 = 3000;
/// Seconds to join and leave the group and for the last commit, with a broker nearby.
const GROUP: f64 = 0.2;

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    /// Records of the job. An estimate unless all were read: offsets of compacted records and transactions' markers have none.
    records: u64,
    /// Records that went through the model.
    sampled: usize,
    sample_dead_letters: u64,
    tokens_per_record: f64,
    records_per_second: f64,
    /// From the start of the process to its end.
    seconds: f64,
    /// The 95 % interval.
    seconds_low: f64,
    seconds_high: f64,
    /// Half of the interval, relative to `seconds`.
    precision: f64,
    /// The part of `seconds` before the first record: loading the model, joining the group.
    start_seconds: f64,
    /// What the sample took: reading, preparing and running it, without loading the model.
    sample_seconds: f64,
    /// Why the sample ended: precision, limit (of time), or records (it has no more).
    sample_ended_by: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_low: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_high: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_per_million_records: Option<f64>,
}

/// Estimates a drain, or a replay of `ranges`, and prints the estimate; `report`: a file that gets it too. `started`: when the
/// process was started. With `reprocess`, the input is the dead letters of these topics.
pub(super) fn dry_run(
    settings: &Settings,
    ranges: Option<BTreeMap<Partition, Range>>,
    reprocess: Option<&OriginalTopics>,
    started: Instant,
    report: Option<&Path>,
) -> anyhow::Result<()> {
    let cluster = Cluster::connect(settings)?;
    match cluster.topics() {
        Ok(topics) => drain::warn_of_retention(settings, &topics, ranges.as_ref()),
        Err(problems) => {
            problems.iter().for_each(|problem| tracing::warn!(error = %problem, "cannot check the topics"));
        }
    }
    let bounds = source::remaining(settings, ranges)?;
    let ranges: Vec<_> = bounds.values().map(|bound| bound.from..bound.to).collect();
    let offsets: i64 = ranges.iter().map(|range| range.end - range.start).sum();
    if offsets == 0 {
        bail!("the group has no records left to process: there is nothing to estimate");
    }
    let metrics = Arc::new(Metrics::new());
    let compute = task::load(settings, &metrics)?;
    let start = started.elapsed().as_secs_f64() + joining(settings, &cluster);
    if settings.task.cache.is_some() {
        tracing::warn!(
            "task.cache keeps answers across windows: a sample repeats fewer records than the job, so the job may take less time"
        );
    }
    let began = Instant::now();
    let mut sample = Sample {
        settings,
        compute,
        reprocess,
        partitions: bounds.keys().cloned().collect(),
        random: Random(SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64)),
        began,
    };
    let runs = sample.read(&ranges, offsets)?;
    let (estimate, enough, seen) = sample.measure(runs, offsets, start, &metrics)?;
    let printed = Report::new(&estimate, (enough, &seen), (start, began), settings.cost.per_hour);
    tracing::info!(
        records = printed.records,
        sampled = printed.sampled,
        seconds = rounded(printed.seconds),
        seconds_low = rounded(printed.seconds_low),
        seconds_high = rounded(printed.seconds_high),
        cost = printed.cost,
        cost_low = printed.cost_low,
        cost_high = printed.cost_high,
        sample_seconds = rounded(printed.sample_seconds),
        "dry run finished"
    );
    let text = super::pretty(&serde_json::to_value(&printed)?);
    if let Some(path) = report {
        std::fs::write(path, format!("{text}\n"))
            .with_context(|| format!("writing the report to {}", path.display()))?;
    }
    outln!("{text}");
    Ok(())
}

fn rounded(seconds: f64) -> f64 {
    (seconds * 10.0).round() / 10.0
}

/// Estimated seconds until a member that is the first of its group gets its partitions, and for leaving.
fn joining(settings: &Settings, cluster: &Cluster<'_>) -> f64 {
    if settings.property("group.protocol").is_some_and(|protocol| protocol == "consumer") {
        return GROUP;
    }
    // A user may not be allowed to see it.
    let delay = cluster.broker_setting(REBALANCE_DELAY).unwrap_or(DEFAULT_REBALANCE_DELAY);
    delay as f64 / 1000.0 + GROUP
}

impl Report {
    fn new(
        estimate: &Estimate,
        (enough, seen): (Enough, &Seen),
        (start, began): (f64, Instant),
        per_hour: Option<f64>,
    ) -> Self {
        let (low, high) = estimate.interval();
        let cost = |seconds: f64| per_hour.map(|per_hour| per_hour * seconds / 3600.0);
        Self {
            records: estimate.records.round() as u64,
            sampled: seen.run,
            sample_dead_letters: seen.dead,
            tokens_per_record: seen.tokens as f64 / seen.prepared as f64,
            records_per_second: estimate.records / estimate.seconds,
            seconds: estimate.seconds,
            seconds_low: low,
            seconds_high: high,
            precision: estimate.margin / estimate.seconds,
            start_seconds: start,
            sample_seconds: began.elapsed().as_secs_f64(),
            sample_ended_by: enough.name(),
            cost: cost(estimate.seconds),
            cost_low: cost(low),
            cost_high: cost(high),
            cost_per_million_records: cost(estimate.seconds).map(|cost| cost / estimate.records * 1e6),
        }
    }
}
