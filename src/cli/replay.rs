//! `replay`: drains the records between two points in time, or the dead letters, in a group of its own.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use rdkafka::message::Message;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::{drain, refusal};
use crate::cli::output::outln;
use crate::hex::hex;
use crate::kafka::cluster::Cluster;
use crate::kafka::consumer;
use crate::kafka::permissions;
use crate::kafka::range::{self, Point, Range};
use crate::kafka::topics::TopicFilter;
use crate::lease::Lease;
use crate::pipeline::Shared;
use crate::record::{Arrival, Partition};
use crate::settings::{Loaded, Settings};
use crate::sink;
use crate::source::{self, Drain, OriginalTopics};
use crate::task;
use crate::telemetry::logging;
use crate::window::{ClosedBy, Gatherer, Limits};

#[derive(Args)]
pub struct Options {
    /// Start of the replay: an RFC 3339 time, or offset:N in every partition
    #[arg(long, value_name = "T", required_unless_present = "dead_letters")]
    from: Option<Point>,
    /// End of the replay, exclusive: an RFC 3339 time, or offset:N in every partition
    #[arg(long, value_name = "T", required_unless_present = "dead_letters")]
    to: Option<Point>,
    /// Reprocess the dead letters, each as the record at its original position
    #[arg(long)]
    dead_letters: bool,
    /// Name of the replay, whose group is the input's group, -replay- and this name. Default: a digest of
    /// input, range, model and output topic
    #[arg(long, value_name = "NAME")]
    id: Option<String>,
    /// Estimate the number of records, the duration and the cost, from a sample that goes through the model;
    /// publish and commit nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    drain: drain::Options,
}

pub fn replay(loaded: Loaded, options: &Options) -> anyhow::Result<()> {
    let mut settings = loaded.settings;
    logging::start(&settings.log);
    let settings_digest = drain::digest(&loaded.shown);
    let mut reprocess = None;
    if options.dead_letters {
        reprocess = Some(OriginalTopics::new(TopicFilter::new(&settings.input.topics)?));
        settings.input.topics = vec![settings.dead_letters.topic.clone()];
    }
    let id = options.id.clone().unwrap_or_else(|| name(&settings, options));
    settings.input.group = format!("{}-replay-{id}", settings.input.group);
    // With the live job's transactional.id, the replay would fence it.
    if let Some(transactional_id) = &mut settings.delivery.transactional_id {
        *transactional_id = format!("{transactional_id}-replay-{id}");
    }
    // The live job's static member name is not for the replay.
    settings.input.properties.remove("group.instance.id");
    settings.kafka.properties.remove("group.instance.id");

    replay_as(&settings, options, &id, reprocess, &settings_digest).map_err(|error| {
        match sink::first_transactional_id(&settings) {
            Ok(transactional_id) => {
                refusal::explain(error, &settings, &permissions::needed(&settings, &transactional_id))
            }
            Err(_) => error,
        }
    })
}

/// `settings`: with the replay's group and topics.
fn replay_as(
    settings: &Settings,
    options: &Options,
    id: &str,
    reprocess: Option<OriginalTopics>,
    settings_digest: &str,
) -> anyhow::Result<()> {
    let consumer = consumer::reader(settings)?;
    let topics: Vec<&str> = settings.input.topics.iter().map(String::as_str).collect();
    let ranges = range::resolve(&consumer, &topics, options.from, options.to, options.drain.force)?;
    let records: i64 = ranges.values().map(|range| range.to - range.from).sum();
    tracing::info!(
        id,
        group = settings.input.group,
        partitions = ranges.len(),
        records,
        output = settings.output.topic,
        "starting the replay"
    );
    if options.dry_run {
        match Cluster::connect(settings)?.topics() {
            Ok(topics) => drain::warn_of_retention(settings, &topics, Some(&ranges)),
            Err(problems) => {
                problems
                    .iter()
                    .for_each(|problem| tracing::warn!(error = %problem, "cannot check the topics"));
            }
        }
        return dry_run(settings, &consumer, &ranges, reprocess.as_ref());
    }
    refuse_another_range(settings, &ranges, id)?;
    drain::drain_and_report(settings, Drain::between(ranges), reprocess, settings_digest, &options.drain)
}

/// A digest of input, range, model and output topic. The same replay gets the same name, so that it resumes.
fn name(settings: &Settings, options: &Options) -> String {
    let point = |point: Option<Point>| point.map(|point| point.to_string());
    let what = serde_json::json!([
        settings.input.topics,
        point(options.from),
        point(options.to),
        settings.model.source,
        settings.model.revision,
        settings.output.topic,
        options.dead_letters,
    ]);
    hex(&Sha256::digest(what.to_string()))[..8].to_owned()
}

/// Refuses a group whose committed offsets are outside of the range. It belongs to a replay of another range, and would
/// skip a part of this one, or all.
fn refuse_another_range(
    settings: &Settings,
    ranges: &BTreeMap<Partition, Range>,
    id: &str,
) -> anyhow::Result<()> {
    for (partition, offset) in source::committed_offsets(settings, ranges.keys())? {
        if let Some(Range { from, to, low, .. }) = ranges.get(&partition)
            // It is the same range if retention has only deleted its start meanwhile.
            && (offset > *to || (offset < *from && from > low))
        {
            bail!(
                "--id {id} has been used for another range: its group is at {partition}/{offset}, and this range \
                 goes from {from} to {to}; use another --id"
            );
        }
    }
    Ok(())
}

/// Records of a sample.
const SAMPLE: usize = 2000;
/// Minimum number of records from each place.
const MIN_PER_PLACE: usize = 16;
/// Number of places in a partition from which records are taken.
const PLACES: i64 = 4;
/// Timeout for reading the records of one place.
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Estimate for a replay.
#[derive(Debug, Serialize)]
struct Estimate {
    /// Offsets in the ranges of all partitions. There are fewer records if some were compacted away or are control
    /// records of transactions.
    records: i64,
    sampled: usize,
    sample_dead_letters: u64,
    tokens_per_record: f64,
    records_per_second: f64,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_per_million_records: Option<f64>,
}

fn dry_run<C: rdkafka::consumer::ConsumerContext>(
    settings: &Settings,
    consumer: &rdkafka::consumer::BaseConsumer<C>,
    ranges: &BTreeMap<Partition, Range>,
    reprocess: Option<&OriginalTopics>,
) -> anyhow::Result<()> {
    let shared = Shared::new(settings);
    let compute = task::load(settings, &shared.metrics)?;
    let mut gatherer = Gatherer::new(Limits::NONE);
    let wanted = ranges.values().filter(|range| range.from < range.to).count().max(1);
    let each = (SAMPLE / wanted / PLACES as usize).max(MIN_PER_PLACE);
    for (partition, range) in ranges {
        let length = range.to - range.from;
        let mut next = range.from;
        for place in 0..PLACES {
            let from = next.max(range.from + length * place / PLACES);
            if from >= range.to {
                break;
            }
            next = sample(consumer, partition, from, range.to, each, reprocess, &mut gatherer)?;
        }
    }
    let Some(window) = gatherer.close(ClosedBy::End) else {
        bail!("no record could be read from the range: there is nothing to estimate from");
    };
    let sampled = window.records.len();
    let started = Instant::now();
    let encoded = compute.answer(window)?;
    let seconds = started.elapsed().as_secs_f64().max(1e-9);
    let dead = encoded.outcomes.iter().filter(|o| matches!(o, crate::flow::Outcome::Dead(_))).count();
    let records: i64 = ranges.values().map(|range| range.to - range.from).sum();
    let rate = sampled as f64 / seconds;
    let whole = records as f64 / rate;
    let cost = settings.cost.per_hour.map(|per_hour| per_hour * whole / 3600.0);
    let estimate = Estimate {
        records,
        sampled,
        sample_dead_letters: dead as u64,
        tokens_per_record: shared.metrics.tokens.get() as f64 / sampled as f64,
        records_per_second: rate,
        seconds: whole,
        cost,
        cost_per_million_records: cost.map(|cost| cost / records as f64 * 1e6),
    };
    outln!("{}", super::pretty(&serde_json::to_value(&estimate)?));
    Ok(())
}

/// Gathers up to `count` records from offset `from` on; returns the offset after the last one.
fn sample<C: rdkafka::consumer::ConsumerContext>(
    consumer: &rdkafka::consumer::BaseConsumer<C>,
    partition: &Partition,
    from: i64,
    to: i64,
    count: usize,
    reprocess: Option<&OriginalTopics>,
    gatherer: &mut Gatherer,
) -> anyhow::Result<i64> {
    let lease = Lease::new(0);
    let deadline = Instant::now() + SAMPLE_TIMEOUT;
    let (mut next, mut taken) = (from, 0);
    let read = range::read(consumer, partition, from, SAMPLE_TIMEOUT, |message| {
        if message.offset() >= to {
            return ControlFlow::Break(());
        }
        next = message.offset() + 1;
        if reprocess.is_none_or(|topics| topics.origin(message).is_some()) {
            taken += 1;
            let arrival = Arrival {
                offset: message.offset(),
                timestamp: message.timestamp().to_millis(),
                key: message.key(),
                value: message.payload(),
                ..Arrival::default()
            };
            // The gatherer has no limits, so this returns no window.
            gatherer.push(partition, &lease, arrival, Instant::now());
        }
        match taken < count && next < to && Instant::now() < deadline {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    });
    read.with_context(|| format!("reading {partition}"))?;
    Ok(next)
}
