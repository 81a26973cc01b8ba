//! `reference`: reads predictions back and writes their distributions to a file, for `drift.reference`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use rdkafka::message::Message;

use super::offsets::read;
use super::refusal;
use crate::cli::output::outln;
use crate::codec::{Waiting, WholeReader};
use crate::kafka::headers::{self, Headers};
use crate::kafka::range::{self, Point};
use crate::kafka::{consumer, permissions};
use crate::record::Raw;
use crate::settings::{Loaded, Settings};
use crate::task::Kind;
use crate::telemetry::{Metrics, logging};
use crate::watch::{Reference, Shows, Tally};

#[derive(Args)]
pub struct Options {
    /// Topic of the predictions, if it is not output.topic
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
    /// Start: an RFC 3339 time, or offset:N in every partition of the predictions
    #[arg(long, value_name = "T")]
    from: Point,
    /// End, exclusive: an RFC 3339 time, or offset:N in every partition of the predictions
    #[arg(long, value_name = "T")]
    to: Point,
    /// Only predictions of the model whose digest begins with this, if there are several
    #[arg(long, value_name = "DIGEST")]
    digest: Option<String>,
    /// File to write (default: standard output)
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Predictions of one model.
#[derive(Default)]
struct OfModel {
    model: Option<String>,
    tally: Tally,
}

pub fn reference(loaded: Loaded, options: &Options) -> anyhow::Result<()> {
    let settings = loaded.settings;
    logging::start(&settings.log);
    let topic = options.topic.as_deref().unwrap_or(&settings.output.topic);
    let made = make(&settings, topic, options)
        .map_err(|error| refusal::explain(error, &settings, &permissions::needed_by_reference(topic)))?;
    let text = serde_json::to_string_pretty(&made)?;
    let Some(path) = &options.output else {
        outln!("{text}");
        return Ok(());
    };
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    let names: Vec<&str> = made.distributions.keys().map(String::as_str).collect();
    outln!(
        "{}: {} predictions of {} (digest {}), with {}",
        path.display(),
        made.records,
        made.model.as_deref().unwrap_or("an unnamed model"),
        made.digest,
        names.join(", ")
    );
    Ok(())
}

fn make(settings: &Settings, topic: &str, options: &Options) -> anyhow::Result<Reference> {
    let kind = Kind::of(settings.task.kind);
    let shows = (kind.shows)(&settings.task);
    if shows == Shows::Nothing {
        bail!(
            "task.kind: {}: its predictions show nothing to compare: there are references for tasks with labels or scores",
            kind.kind.name()
        );
    }
    let consumer = consumer::reader(settings)?;
    let ranges = range::resolve(&consumer, &[topic], Some(options.from), Some(options.to), true)?;
    let reader = WholeReader::of_predictions(settings)?;
    let metrics = Metrics::new();
    let waiting = Waiting { stop: None, health: None, metrics: &metrics };
    let mut models: BTreeMap<String, OfModel> = BTreeMap::new();
    let (mut unread, mut reason) = (0u64, String::new());
    for (partition, range) in ranges {
        read(&consumer, &partition, range.from, range.to, |message| {
            // A tombstone is no prediction.
            let Some(bytes) = message.payload() else { return };
            let text =
                |name| headers::last(message, name).map(|value| String::from_utf8_lossy(value).into_owned());
            let digest = text(headers::MODEL_DIGEST).unwrap_or_default();
            if options.digest.as_ref().is_some_and(|only| !digest.starts_with(only)) {
                return;
            }
            let model = text(headers::MODEL);
            // This takes the headers out of the message.
            let own = Headers::of(message);
            let value = Raw { bytes, headers: own.as_ref() };
            // Never stopped.
            let _ = reader.fetch(std::iter::once(value), &waiting);
            let of = models.entry(digest).or_default();
            let counted = match reader.json(value) {
                Ok(json) => shows.count(json.as_bytes(), &mut of.tally).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match counted {
                Ok(()) => of.model = of.model.take().or(model),
                Err(error) => {
                    unread += 1;
                    reason = format!("{partition}/{}: {error}", message.offset());
                }
            }
        })?;
    }
    models.retain(|_, of| of.tally.records > 0);
    if unread > 0 {
        tracing::warn!(unread, reason, "some values are no predictions of task.kind: they are left out");
    }
    if models.len() > 1 {
        let one = |(digest, of): (&String, &OfModel)| format!("{digest} ({} predictions)", of.tally.records);
        let all: Vec<String> = models.iter().map(one).collect();
        bail!(
            "topic {topic} has predictions of several models in this range: {}; choose one with --digest, or another \
             range",
            all.join(", ")
        );
    }
    let Some((digest, OfModel { model, tally })) = models.pop_first() else {
        let why = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
        bail!("topic {topic} has no predictions of task.kind: {} in this range{why}", kind.kind.name());
    };
    let reference = Reference::new(&tally)
        .with_context(|| format!("the {} predictions show nothing to compare", tally.records))?;
    Ok(Reference {
        task: kind.kind.name().to_owned(),
        model,
        digest,
        topic: topic.to_owned(),
        from: options.from.to_string(),
        to: options.to.to_string(),
        ..reference
    })
}
