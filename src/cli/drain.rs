//! `drain`: runs the pipeline up to the end offsets that the partitions have at the start. Shows a progress bar or logs
//! progress, and reports at the end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::progress::{self, Rate, Reporter};
use super::{dry_run, run};
use crate::hex::hex;
use crate::kafka::cluster::{self, Cluster, Missing, Topics};
use crate::kafka::consumer::{self, Role};
use crate::kafka::range::{self, Range, RangeError};
use crate::kafka::retention;
use crate::pipeline::{self, Shared};
use crate::record::Partition;
use crate::settings::{Loaded, Settings, Start};
use crate::shadow;
use crate::source::{self, Bound, Drain, OriginalTopics};
use crate::task;
use crate::telemetry::traces::Traces;
use crate::telemetry::{Metrics, logging};

#[derive(Args)]
#[group(id = "drain")]
pub struct Options {
    /// Write the report, or the estimate of a dry run, to this file, as JSON; its main figures are logged in any case
    #[arg(long, value_name = "FILE")]
    pub(super) report: Option<PathBuf>,
    /// Exit with 3 if there were dead letters
    #[arg(long)]
    strict: bool,
    /// Go on in cases that are refused otherwise: if the group has members that are not drains; replay: if
    /// retention has deleted a part of the range
    #[arg(long)]
    pub(super) force: bool,
    /// Estimate how long the job takes and what it costs, with a 95 % interval, from a sample that goes through the
    /// model; publish and commit nothing. The sample takes a tenth of the job's time or 10 s at most
    #[arg(long)]
    pub(super) dry_run: bool,
}

/// The drain ended with dead letters, and `--strict` is set.
#[derive(Debug, thiserror::Error)]
#[error("{0} records became dead letters (--strict)")]
pub struct DeadLetters(u64);

pub fn drain(loaded: Loaded, options: &Options) -> anyhow::Result<()> {
    let started = Instant::now();
    let settings = loaded.settings;
    logging::start(&settings.log);
    if options.dry_run {
        return dry_run::dry_run(&settings, None, None, started, options.report.as_deref());
    }
    let settings_digest = digest(&loaded.shown);
    drain_and_report(&settings, Drain::default(), None, &settings_digest, options)
}

/// Drains, with the admin server up, and reports. With `reprocess`, the input is the dead letters of these topics.
pub(super) fn drain_and_report(
    settings: &Settings,
    bounds: Drain,
    reprocess: Option<OriginalTopics>,
    settings_digest: &str,
    options: &Options,
) -> anyhow::Result<()> {
    let bounds = Arc::new(bounds);
    let mut shared = Shared::new(settings);
    shared.drain = Some(Arc::clone(&bounds));
    shared.reprocess = reprocess.map(Arc::new);
    shared.traces = Traces::start(&settings.otel)?;
    run::serve(settings, &shared, || work(settings, &shared, &bounds, settings_digest, options))
}

fn work(
    settings: &Settings,
    shared: &Shared,
    drain: &Arc<Drain>,
    settings_digest: &str,
    options: &Options,
) -> anyhow::Result<()> {
    refuse_other_members(settings, options.force)?;
    let compute = task::load(settings, &shared.metrics)?;
    let topics = cluster::wait(settings, &shared.metrics, &shared.health, &shared.stop, Missing::Fail)?;
    let Some(topics) = topics else { bail!("stopped before anything was read") };
    run::refuse_other_models(settings, &compute.about())?;
    warn_of_retention(settings, &topics, drain.ranges());
    let about = compute.about();
    let (model, model_digest) = (about.model.clone(), about.digest.full().to_owned());
    let device = about.device.clone();
    let started = Instant::now();
    let progress = show(shared, drain, settings.log.progress_every.0, started)?;
    let result = pipeline::run(settings, compute, &topics, shared).map_err(anyhow::Error::new);
    progress.stop();
    result?;
    let report = Report {
        complete: drain.is_complete(),
        model,
        model_digest,
        settings_digest: settings_digest.to_owned(),
        shadow: settings.shadow.topic.iter().flat_map(|_| shadow::records(&shared.metrics)).collect(),
        ..Report::new(&drain.bounds(), &shared.metrics, started.elapsed(), &device, settings.cost.per_hour)
    };
    report.log();
    if let Some(path) = &options.report {
        report.write(path)?;
    }
    if !report.complete {
        bail!("stopped before the end: {} records are left; run it again to resume", drain.left());
    }
    match report.dead_lettered {
        dead @ 1.. if options.strict => Err(DeadLetters(dead).into()),
        _ => Ok(()),
    }
}

/// Drains may share a group with each other, but not with `run`: `run` would take a part of the partitions and read on
/// past their ends, and the two would wait for each other's commits.
fn refuse_other_members(settings: &Settings, force: bool) -> anyhow::Result<()> {
    let group = &settings.input.group;
    let members = match Cluster::connect(settings).and_then(|cluster| cluster.members(group)) {
        Ok(members) => members,
        Err(error) => {
            tracing::warn!(group, %error, "cannot list the group's members; not checking for members that are not drains");
            return Ok(());
        }
    };
    let others = members.into_iter().filter(|m| !matches!(Role::of(&m.client_id), Some((Role::Drain, _))));
    let names: Vec<String> = others.map(|m| format!("{} at {}", m.client_id, m.host)).collect();
    if names.is_empty() {
        return Ok(());
    }
    let names = names.join(", ");
    if force {
        tracing::warn!(
            group,
            members = names,
            "--force: starting although the group has members that are not drains"
        );
        return Ok(());
    }
    bail!(
        "group {group} has live members that are not drains ({names}): they would take a part of the \
         partitions and read on past the ends; stop them, use another group, or go on with --force"
    )
}

/// Warns if predictions of old records would be deleted as soon as they are published. `ranges`: those of a replay.
pub(super) fn warn_of_retention(
    settings: &Settings,
    topics: &Topics,
    ranges: Option<&BTreeMap<Partition, Range>>,
) {
    match retention_warnings(settings, topics, ranges) {
        Ok(warnings) => {
            for warning in warnings {
                tracing::warn!(warning, "predictions would soon be deleted");
            }
        }
        Err(error) => tracing::warn!(%error, "cannot read the age of the records; not checking retention"),
    }
}

/// See [`retention::warnings`].
pub(super) fn retention_warnings(
    settings: &Settings,
    topics: &Topics,
    ranges: Option<&BTreeMap<Partition, Range>>,
) -> Result<Vec<String>, RangeError> {
    let consumer = consumer::reader(settings)?;
    let resolved;
    let resolved_here = ranges.is_none();
    let ranges = match ranges {
        Some(ranges) => ranges,
        None => {
            let names: Vec<&str> = settings.input.topics.iter().map(String::as_str).collect();
            resolved = range::resolve(&consumer, &names, None, None, true)?;
            &resolved
        }
    };
    let standing = source::committed_offsets(settings, ranges.keys())?;
    // A group without offsets starts at the ends, so it reads no old records.
    if standing.is_empty() && settings.input.start == Start::Latest && resolved_here {
        return Ok(Vec::new());
    }
    Ok(retention::warnings(settings, topics, &consumer, ranges, &standing)?)
}

/// SHA-256 over the effective settings, secrets hidden, as 64 hex digits.
pub(super) fn digest(shown: &serde_json::Value) -> String {
    hex(&Sha256::digest(shown.to_string()))
}

/// Shows progress: a bar on a terminal, else a log line every `every`.
fn show(shared: &Shared, drain: &Arc<Drain>, every: Duration, started: Instant) -> std::io::Result<Reporter> {
    let (shared, drain) = (shared.clone(), Arc::clone(drain));
    let bar = progress::bar("{bar:30} {percent:>3}%  {pos}/{len} records  {per_sec}  {msg}  ETA {eta}");
    let wait = if bar.is_some() { progress::REDRAW } else { every };
    let mut rate = Rate::new(started);
    Reporter::start(wait, move |over| {
        let bounds = drain.bounds();
        let total: i64 = bounds.values().map(|bound| bound.to - bound.from).sum();
        let done: i64 = bounds.values().map(|bound| (bound.position() - bound.from).max(0)).sum();
        let dead: u64 = bounds.values().map(|bound| bound.dead_lettered).sum();
        let tokens_per_second = rate.next(shared.metrics.tokens.get());
        if let Some(bar) = &bar {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            bar.set_message(format!("{tokens_per_second:.0} tokens/s  {dead} dead letters"));
            if over {
                bar.finish_and_clear();
            }
        } else if total > 0 && !over {
            let per_second = done as f64 / started.elapsed().as_secs_f64().max(1e-3);
            let eta = if done > 0 { ((total - done) as f64 / per_second).ceil() as u64 } else { 0 };
            tracing::info!(
                records = done,
                of = total,
                percent = done * 100 / total,
                records_per_second = per_second.round(),
                tokens_per_second = tokens_per_second.round(),
                dead_letters = dead,
                eta_seconds = eta,
                "draining"
            );
        }
    })
}

/// What a drain did.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// All partitions reached their ends, by this member or others of the group.
    complete: bool,
    model: String,
    model_digest: String,
    settings_digest: String,
    /// Counts of this process only, as in all fields below.
    records: u64,
    predicted: u64,
    dead_lettered: u64,
    tombstones: u64,
    dead_letters: BTreeMap<String, u64>,
    /// Dead letters that a replay of dead letters skipped: they are another job's, or have lost their bytes.
    passed_over: u64,
    tokens: u64,
    truncated: u64,
    seconds: f64,
    records_per_second: f64,
    tokens_per_second: f64,
    device_busy_seconds: f64,
    device_idle_seconds: f64,
    /// Time in which nothing was in flight and kandle waited for records. Part of the device's idle time.
    kafka_wait_seconds: f64,
    peak_rss_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<CostReport>,
    /// Records chosen for the shadow, by outcome.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    shadow: BTreeMap<&'static str, u64>,
    partitions: Vec<Part>,
}

#[derive(Debug, Serialize)]
struct CostReport {
    per_hour: f64,
    total: f64,
    per_million_records: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Part {
    topic: String,
    partition: i32,
    #[serde(flatten)]
    bound: Bound,
}

impl Report {
    fn new(
        bounds: &BTreeMap<Partition, Bound>,
        metrics: &Metrics,
        time: Duration,
        device: &str,
        per_hour: Option<f64>,
    ) -> Self {
        let sum = |of: fn(&Bound) -> u64| bounds.values().map(of).sum::<u64>();
        let (predicted, dead_lettered) = (sum(|b| b.predicted), sum(|b| b.dead_lettered));
        let tombstones = sum(|b| b.tombstones);
        let records = predicted + dead_lettered + tombstones;
        let seconds = time.as_secs_f64();
        let busy = metrics.device_busy.with_label_values(&[device]).get();
        Self {
            records,
            predicted,
            dead_lettered,
            tombstones,
            passed_over: sum(|b| b.passed_over),
            dead_letters: crate::record::Fault::ALL
                .iter()
                .map(|fault| (fault.name(), metrics.dead_letters.with_label_values(&[fault.name()]).get()))
                .filter(|(_, count)| *count > 0)
                .map(|(name, count)| (name.to_owned(), count))
                .collect(),
            tokens: metrics.tokens.get(),
            truncated: metrics.truncated.get(),
            seconds,
            records_per_second: records as f64 / seconds,
            tokens_per_second: metrics.tokens.get() as f64 / seconds,
            device_busy_seconds: busy,
            device_idle_seconds: (seconds - busy).max(0.0),
            kafka_wait_seconds: metrics.input_wait.get(),
            peak_rss_bytes: peak_rss(),
            cost: per_hour.map(|per_hour| {
                let total = per_hour * seconds / 3600.0;
                CostReport {
                    per_hour,
                    total,
                    per_million_records: (records > 0).then(|| total / records as f64 * 1e6),
                }
            }),
            partitions: bounds
                .iter()
                .map(|(partition, bound)| Part {
                    topic: partition.topic.to_string(),
                    partition: partition.number,
                    bound: bound.clone(),
                })
                .collect(),
            ..Self::default()
        }
    }

    fn log(&self) {
        tracing::info!(
            complete = self.complete,
            records = self.records,
            predicted = self.predicted,
            dead_lettered = self.dead_lettered,
            tokens = self.tokens,
            seconds = (self.seconds * 10.0).round() / 10.0,
            records_per_second = self.records_per_second.round(),
            device_busy_seconds = (self.device_busy_seconds * 10.0).round() / 10.0,
            cost = self.cost.as_ref().map(|cost| cost.total),
            digest = &self.model_digest[..16],
            "drain finished"
        );
    }

    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = super::pretty(&serde_json::to_value(self)?) + "\n";
        std::fs::write(path, text).with_context(|| format!("writing the report to {}", path.display()))
    }
}

/// Peak resident memory of the process, in bytes; `None` if the system does not report it.
pub(super) fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10)
}
