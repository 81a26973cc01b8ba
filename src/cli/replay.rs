//! `replay`: a drain between two points in time, in a group of its own; or of the dead letters.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use rdkafka::message::Message;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::drain;
use crate::cli::output::outln;
use crate::kafka::cluster::Cluster;
use crate::kafka::consumer;
use crate::kafka::range::{self, Point, Range};
use crate::kafka::topics::TopicFilter;
use crate::lease::Lease;
use crate::model::hex;
use crate::pipeline::Shared;
use crate::record::{Arrival, Partition};
use crate::settings::{Loaded, Settings};
use crate::source::{self, Drain, OriginalTopics};
use crate::task;
use crate::telemetry::logging;
use crate::window::{ClosedBy, Gatherer, Limits};

#[derive(Args)]
pub struct Options {
    /// The first record: an RFC 3339 time, or offset:N in every partition
    #[arg(long, value_name = "T", required_unless_present = "dead_letters")]
    from: Option<Point>,
    /// Where it ends, itself not a part
    #[arg(long, value_name = "T", required_unless_present = "dead_letters")]
    to: Option<Point>,
    /// The dead letters back through the pipeline, each judged again at its original position
    #[arg(long)]
    dead_letters: bool,
    /// Names the replay: its group is the input's group, -replay- and this. Where none is given, a digest of
    /// what is replayed into what
    #[arg(long, value_name = "NAME")]
    id: Option<String>,
    /// Say how many records there are, how long they would take and what that would cost, from a sample run
    /// through the model; publish and commit nothing
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
    // The live one's is its own.
    if let Some(transactional_id) = &mut settings.delivery.transactional_id {
        *transactional_id = format!("{transactional_id}-replay-{id}");
    }
    // A static member's name is the live one's.
    settings.input.properties.remove("group.instance.id");
    settings.kafka.properties.remove("group.instance.id");

    let consumer = consumer::reader(&settings)?;
    let topics: Vec<&str> = settings.input.topics.iter().map(String::as_str).collect();
    let ranges = range::resolve(&consumer, &topics, options.from, options.to, options.drain.force)?;
    let records: i64 = ranges.values().map(|range| range.to - range.from).sum();
    tracing::info!(
        id,
        group = settings.input.group,
        partitions = ranges.len(),
        records,
        output = settings.output.topic,
        "replay"
    );
    if options.dry_run {
        match Cluster::connect(&settings)?.topics() {
            Ok(topics) => drain::warn_of_retention(&settings, &topics, Some(&ranges)),
            Err(troubles) => troubles.iter().for_each(|trouble| tracing::warn!(%trouble, "the topics")),
        }
        return dry_run(&settings, &consumer, &ranges, reprocess.as_ref());
    }
    refuse_another_range(&settings, &ranges, &id)?;
    drain::carry_out(&settings, Drain::between(ranges), reprocess, &settings_digest, &options.drain)
}

/// The same replay has the same name, so that it resumes: what, from where to where, by which model, into
/// which topics.
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

/// A group that stands outside of the range has been through another one: it would do nothing here, or
/// leave out a part.
fn refuse_another_range(
    settings: &Settings,
    ranges: &BTreeMap<Partition, Range>,
    id: &str,
) -> anyhow::Result<()> {
    for (partition, offset) in source::standing(settings, ranges.keys())? {
        if let Some(Range { from, to, low, .. }) = ranges.get(&partition)
            // What retention has deleted meanwhile is no other range.
            && (offset > *to || (offset < *from && from > low))
        {
            bail!(
                "--id {id} has been used for another range: it stands at {partition}/{offset}, and this one \
                 goes from {from} to {to}; give it another name"
            );
        }
    }
    Ok(())
}

/// Records of a sample, in all and of one place at least.
const SAMPLE: usize = 2000;
const AT_LEAST: usize = 16;
/// Places of a partition at which records are taken.
const PLACES: i64 = 4;
/// How long a place may take to be read.
const READ: Duration = Duration::from_secs(10);

/// What a replay would be.
#[derive(Debug, Serialize)]
struct Estimate {
    /// Offsets of all partitions: fewer records, where some were compacted away or are transactions' marks.
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
    let each = (SAMPLE / wanted / PLACES as usize).max(AT_LEAST);
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
        bail!("no record could be read: there is nothing to reckon with");
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

/// Gathers up to `count` records from an offset on; returns the offset after the last one.
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
    let deadline = Instant::now() + READ;
    let (mut next, mut taken) = (from, 0);
    let read = range::read(consumer, partition, from, READ, |message| {
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
            // It has no limit.
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
