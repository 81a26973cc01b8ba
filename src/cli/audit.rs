//! `audit`: reads predictions and dead letters back and compares them with the input.

use std::collections::BTreeMap;

use clap::Args;
use rdkafka::message::Message;
use serde::Serialize;

use super::offsets::{List, Offsets, ranges, read};
use super::refusal;
use crate::cli::output::outln;
use crate::kafka::consumer::{self, Reader};
use crate::kafka::headers;
use crate::kafka::permissions;
use crate::kafka::range::{self, Point, Range};
use crate::record::Partition;
use crate::settings::{Loaded, Settings};
use crate::source;
use crate::telemetry::logging;

#[derive(Args)]
pub struct Options {
    /// Topic of the predictions, if it is not output.topic
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
    /// Start of the input: an RFC 3339 time, or offset:N in every partition
    #[arg(long, value_name = "T")]
    from: Option<Point>,
    /// End of the input, exclusive: an RFC 3339 time, or offset:N in every partition
    #[arg(long, value_name = "T")]
    to: Option<Point>,
    /// Print the complete result as JSON
    #[arg(long)]
    json: bool,
}

/// Positions are missing, or published more than once.
#[derive(Debug, thiserror::Error)]
#[error("{missing} positions are missing and {doubled} are published more than once")]
pub struct Findings {
    missing: u64,
    doubled: u64,
}

/// Result for one partition of the input.
#[derive(Debug, Default, Serialize)]
struct Found {
    topic: String,
    partition: i32,
    from: i64,
    to: i64,
    /// Positions with a prediction, a tombstone or a dead letter.
    covered: u64,
    models: Vec<Model>,
    /// Records before the group's offset that have no prediction, tombstone or dead letter.
    missing: u64,
    missing_offsets: List,
    /// Positions with more than one of these.
    doubled: u64,
    doubled_offsets: List,
    /// Offsets that the group has not reached yet.
    pending: u64,
}

#[derive(Debug, Serialize)]
struct Model {
    /// Model digest, 16 hex digits.
    digest: String,
    model: Option<String>,
    predictions: u64,
    dead_letters: u64,
    offsets: List,
}

pub fn audit(loaded: Loaded, options: &Options) -> anyhow::Result<()> {
    let settings = loaded.settings;
    logging::start(&settings.log);
    compare_all(&settings, options).map_err(|error| {
        let output = options.topic.as_deref().unwrap_or(&settings.output.topic);
        refusal::explain(error, &settings, &permissions::needed_by_audit(&settings, output))
    })
}

fn compare_all(settings: &Settings, options: &Options) -> anyhow::Result<()> {
    let consumer = consumer::reader(settings)?;
    let topics: Vec<&str> = settings.input.topics.iter().map(String::as_str).collect();
    let input = range::resolve(&consumer, &topics, options.from, options.to, true)?;
    let mut tallies: BTreeMap<Partition, Tally> =
        input.keys().map(|partition| (partition.clone(), Tally::default())).collect();
    let output = options.topic.as_deref().unwrap_or(&settings.output.topic);
    for (topic, dead) in [(output, false), (&*settings.dead_letters.topic, true)] {
        read_back(&consumer, topic, options.from, dead, &input, &mut tallies)?;
    }
    let committed = source::committed_offsets(settings, input.keys())?;
    let mut all = Vec::new();
    for (partition, range) in &input {
        let tally = tallies.remove(partition).unwrap_or_default();
        let at = committed.get(partition).copied();
        all.push(compare(&consumer, settings, partition, range, at, tally)?);
    }
    if options.json {
        outln!("{}", super::pretty(&serde_json::to_value(&all)?));
    } else {
        all.iter().for_each(show);
    }
    let sum = |of: fn(&Found) -> u64| all.iter().map(of).sum();
    let (missing, doubled) = (sum(|f| f.missing), sum(|f| f.doubled));
    if missing + doubled > 0 {
        return Err(Findings { missing, doubled }.into());
    }
    Ok(())
}

/// Offsets whose predictions or dead letters were read back, for one input partition.
#[derive(Debug, Default)]
struct Tally {
    all: Offsets,
    doubled: Offsets,
    /// By model digest: model name, counts of predictions and of dead letters, offsets.
    models: BTreeMap<String, (Option<String>, [u64; 2], Offsets)>,
}

fn read_back(
    consumer: &Reader,
    topic: &str,
    from: Option<Point>,
    dead: bool,
    input: &BTreeMap<Partition, Range>,
    tallies: &mut BTreeMap<Partition, Tally>,
) -> anyhow::Result<()> {
    // A time is the same in both topics, because a prediction has its record's timestamp. An offset is not.
    let from = from.filter(|from| matches!(from, Point::Time(_)));
    let parts = match range::resolve(consumer, &[topic], from, None, true) {
        Err(range::RangeError::Empty(_)) => return Ok(()),
        parts => parts?,
    };
    for (partition, range) in parts {
        read(consumer, &partition, range.from, range.to, |message| {
            let Some(origin) = headers::origin(message) else { return };
            let Some(bounds) = input.get(&origin.partition) else { return };
            if !(bounds.from..bounds.to).contains(&origin.offset) {
                return;
            }
            let text =
                |name| headers::last(message, name).map(|value| String::from_utf8_lossy(value).into_owned());
            let tally = tallies.entry(origin.partition).or_default();
            if !tally.all.insert(origin.offset) {
                tally.doubled.insert(origin.offset);
            }
            let digest = text(headers::MODEL_DIGEST).unwrap_or_default();
            let (model, counts, offsets) = tally.models.entry(digest).or_default();
            if model.is_none() {
                *model = text(headers::MODEL);
            }
            counts[usize::from(dead)] += 1;
            offsets.insert(origin.offset);
        })?;
    }
    Ok(())
}

/// `stands`: the group's committed offset. If there is none, the whole range is expected to have predictions.
fn compare(
    consumer: &Reader,
    settings: &Settings,
    partition: &Partition,
    range: &Range,
    stands: Option<i64>,
    tally: Tally,
) -> anyhow::Result<Found> {
    let end = stands.unwrap_or(range.to).clamp(range.from, range.to);
    let mut lost = Offsets::default();
    // Not every offset has a record: transactions write control records, and compaction leaves gaps.
    for (first, last) in tally.all.gaps(range.from, end) {
        read(consumer, partition, first, last + 1, |message| {
            lost.insert(message.offset());
        })?;
    }
    if stands.is_none() {
        tracing::warn!(%partition, group = settings.input.group, "the group has no committed offset; expecting the whole partition");
    }
    let model = |(digest, (model, [predictions, dead_letters], offsets)): (_, (_, [u64; 2], Offsets))| {
        Model { digest, model, predictions, dead_letters, offsets: offsets.list() }
    };
    let mut models: Vec<Model> = tally.models.into_iter().map(model).collect();
    // In the order in which they followed each other.
    models.sort_by_key(|model| model.offsets.first().map(|(first, _)| *first));
    Ok(Found {
        topic: partition.topic.to_string(),
        partition: partition.number,
        from: range.from,
        to: range.to,
        covered: tally.all.count(),
        models,
        missing: lost.count(),
        missing_offsets: lost.list(),
        doubled: tally.doubled.count(),
        doubled_offsets: tally.doubled.list(),
        pending: (range.to - end) as u64,
    })
}

fn show(found: &Found) {
    let Found { topic, partition, from, to, covered, missing, doubled, pending, .. } = found;
    outln!("{topic}/{partition}: offsets {from} to {to}, {covered} with an outcome, {pending} pending");
    for Model { digest, model, predictions, dead_letters, offsets } in &found.models {
        let name = model.as_deref().unwrap_or("?");
        outln!(
            "  {digest} {name}: {predictions} predictions, {dead_letters} dead letters; {}",
            ranges(offsets)
        );
    }
    if *missing > 0 {
        outln!("  missing {missing}: {}", ranges(&found.missing_offsets));
    }
    if *doubled > 0 {
        outln!("  doubled {doubled}: {}", ranges(&found.doubled_offsets));
    }
}
