//! `replay`: drains the records between two points in time, or the dead letters, in a group of its own.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::bail;
use clap::Args;
use sha2::{Digest as _, Sha256};

use super::{drain, dry_run, refusal};
use crate::hex::hex;
use crate::kafka::consumer;
use crate::kafka::permissions;
use crate::kafka::range::{self, Point, Range};
use crate::kafka::topics::TopicFilter;
use crate::record::Partition;
use crate::settings::{Loaded, Settings};
use crate::sink;
use crate::source::{self, Drain, OriginalTopics};
use crate::telemetry::logging;

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
    #[command(flatten)]
    drain: drain::Options,
}

pub fn replay(loaded: Loaded, options: &Options) -> anyhow::Result<()> {
    let started = Instant::now();
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

    replay_as(&settings, options, &id, reprocess, (&settings_digest, started)).map_err(|error| {
        match sink::first_transactional_id(&settings) {
            Ok(transactional_id) => {
                refusal::explain(error, &settings, &permissions::needed(&settings, &transactional_id))
            }
            Err(_) => error,
        }
    })
}

/// `settings`: with the replay's group and topics; `started`: when the process was started.
fn replay_as(
    settings: &Settings,
    options: &Options,
    id: &str,
    reprocess: Option<OriginalTopics>,
    (settings_digest, started): (&str, Instant),
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
    refuse_another_range(settings, &ranges, id)?;
    if options.drain.dry_run {
        let report = options.drain.report.as_deref();
        return dry_run::dry_run(settings, Some(ranges), reprocess.as_ref(), started, report);
    }
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
