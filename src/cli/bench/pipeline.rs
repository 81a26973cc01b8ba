//! `bench pipeline`: compares kandle with `noop` (no model) under both guarantees with a bare loop of the same client
//! library, in turns on the same broker. The bare loop runs a second time with the headers of a prediction, because
//! their cost in client and broker is not kandle's.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;
use serde::Serialize;

use super::topics::{client, job, with_topics};
use crate::cli::output::outln;
use crate::kafka::cluster::{self, Missing};
use crate::pipeline::{self, Shared};
use crate::settings::Settings;
use crate::task;

#[derive(Args)]
pub struct Options {
    /// Bootstrap brokers; topics are created there and deleted again
    #[arg(long)]
    brokers: String,
    /// Records in the backlog
    #[arg(long, default_value_t = 2_000_000)]
    records: u64,
    /// Bytes of each value
    #[arg(long, default_value_t = 165)]
    value_bytes: usize,
    #[arg(long, default_value_t = 4)]
    partitions: i32,
    /// How often each variant runs
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// One setting of the pipeline, as for `run`
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Run only the pipeline, once, for a profiler; with at_least_once unless --set delivery.guarantee=exactly_once
    #[arg(long)]
    profile: bool,
}

#[derive(Serialize)]
struct Report {
    records: u64,
    value_bytes: usize,
    partitions: i32,
    rounds: Vec<Round>,
    /// Medians of the rounds.
    median: Round,
    /// Medians of the ratios within each round.
    at_least_once_to_bare: f64,
    at_least_once_to_bare_with_headers: f64,
    exactly_once_to_at_least_once: f64,
}

/// Records per second of each variant.
#[derive(Serialize)]
struct Round {
    bare: f64,
    bare_with_headers: f64,
    at_least_once: f64,
    exactly_once: f64,
}

pub fn bench(options: Options) -> anyhow::Result<()> {
    let report = with_topics(&options.brokers, options.partitions, |topics| measure(&options, topics))?;
    let Some(report) = report else { return Ok(()) };
    if options.json {
        outln!("{}", super::super::pretty(&serde_json::to_value(&report)?));
    } else {
        for Round { bare, bare_with_headers, at_least_once, exactly_once } in &report.rounds {
            outln!(
                "bare {bare:>9.0}/s   with headers {bare_with_headers:>9.0}/s   at_least_once {at_least_once:>9.0}/s   exactly_once {exactly_once:>9.0}/s"
            );
        }
        outln!(
            "{} records of {} bytes; medians: at_least_once is {:.2} of the bare loop, {:.2} of one with the same headers; exactly_once is {:.2} of at_least_once",
            report.records,
            report.value_bytes,
            report.at_least_once_to_bare,
            report.at_least_once_to_bare_with_headers,
            report.exactly_once_to_at_least_once,
        );
    }
    Ok(())
}

/// Returns `None` with `--profile`.
fn measure(options: &Options, [input, output, dead]: &[String; 3]) -> anyhow::Result<Option<Report>> {
    fill(options, input)?;
    let topics = [input, output, dead];
    if options.profile {
        outln!("{:.0} records/s", kandle(options, topics, "at_least_once", 0)?);
        return Ok(None);
    }
    let mut rounds = Vec::new();
    for round in 0..options.rounds {
        rounds.push(Round {
            bare: bare(options, input, output, false, round)?,
            bare_with_headers: bare(options, input, output, true, round)?,
            at_least_once: kandle(options, topics, "at_least_once", round)?,
            exactly_once: kandle(options, topics, "exactly_once", round)?,
        });
    }
    let median = |of: &dyn Fn(&Round) -> f64| {
        let mut all: Vec<f64> = rounds.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    Ok(Some(Report {
        records: options.records,
        value_bytes: options.value_bytes,
        partitions: options.partitions,
        median: Round {
            bare: median(&|r| r.bare),
            bare_with_headers: median(&|r| r.bare_with_headers),
            at_least_once: median(&|r| r.at_least_once),
            exactly_once: median(&|r| r.exactly_once),
        },
        at_least_once_to_bare: median(&|r| r.at_least_once / r.bare),
        at_least_once_to_bare_with_headers: median(&|r| r.at_least_once / r.bare_with_headers),
        exactly_once_to_at_least_once: median(&|r| r.exactly_once / r.at_least_once),
        rounds,
    }))
}

fn fill(options: &Options, topic: &str) -> anyhow::Result<()> {
    let producer: BaseProducer =
        client(&options.brokers).set("linger.ms", "50").set("batch.size", "500000").create()?;
    for i in 0..options.records {
        let mut value = format!("ticket {i}: the parcel with order {} has not arrived; ", i * 7919 % 100_003);
        while value.len() < options.value_bytes {
            value.push_str("where is it now? ");
        }
        value.truncate(options.value_bytes);
        let key = (i % 100_003).to_string();
        send(&producer, topic, Some(key.as_bytes()), Some(value.as_bytes()), None, None)?;
    }
    producer.flush(Duration::from_secs(120)).context("filling the input topic")?;
    Ok(())
}

fn send(
    producer: &BaseProducer,
    topic: &str,
    key: Option<&[u8]>,
    value: Option<&[u8]>,
    timestamp: Option<i64>,
    headers: Option<OwnedHeaders>,
) -> anyhow::Result<()> {
    let mut record = BaseRecord::<[u8], [u8]>::to(topic);
    (record.key, record.payload, record.timestamp, record.headers) = (key, value, timestamp, headers);
    loop {
        match producer.send(record) {
            Ok(()) => return Ok(()),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                record = back;
                producer.poll(Duration::from_millis(10));
            }
            Err((error, _)) => bail!("producing to {topic}: {error}"),
        }
    }
}

/// The loop that one would write by hand: consume, produce with idempotence, commit once a second.
fn bare(
    options: &Options,
    input: &str,
    output: &str,
    with_headers: bool,
    round: usize,
) -> anyhow::Result<f64> {
    let consumer: BaseConsumer = client(&options.brokers)
        .set("group.id", format!("{input}-bare-{with_headers}-{round}"))
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("partition.assignment.strategy", "cooperative-sticky")
        // The same value as in kandle, so that only the work differs.
        .set("fetch.queue.backoff.ms", crate::kafka::consumer::FETCH_BACKOFF_MS)
        .create()?;
    let producer: BaseProducer = client(&options.brokers)
        .set("enable.idempotence", "true")
        .set("partitioner", "murmur2_random")
        .set("queue.buffering.max.messages", "1000000")
        .create()?;
    consumer.subscribe(&[input])?;
    let (mut seen, mut started, mut committed) = (0, None, Instant::now());
    while seen < options.records {
        let Some(message) = consumer.poll(Duration::from_millis(100)) else { continue };
        let message = message?;
        started.get_or_insert_with(Instant::now);
        let headers = with_headers.then(|| headers(&message));
        let timestamp = message.timestamp().to_millis();
        send(&producer, output, message.key(), message.payload(), timestamp, headers)?;
        seen += 1;
        if seen % 1024 == 0 {
            producer.poll(Duration::ZERO);
            if committed.elapsed() >= Duration::from_secs(1) {
                committed = Instant::now();
                consumer.commit_consumer_state(CommitMode::Async)?;
            }
        }
    }
    producer.flush(Duration::from_secs(120))?;
    consumer.commit_consumer_state(CommitMode::Sync)?;
    Ok(options.records as f64 / started.map_or(f64::NAN, |s| s.elapsed().as_secs_f64()))
}

/// The headers of a prediction, with as little work as possible.
fn headers(message: &BorrowedMessage<'_>) -> OwnedHeaders {
    let source = format!("{}/{}/{}", message.topic(), message.partition(), message.offset());
    OwnedHeaders::new_with_capacity(3)
        .insert(Header { key: "kandle-source", value: Some(&source) })
        .insert(Header { key: "kandle-model", value: Some("noop") })
        .insert(Header { key: "kandle-model-digest", value: Some("0123456789abcdef") })
}

fn kandle(
    options: &Options,
    [input, output, dead]: [&String; 3],
    guarantee: &str,
    round: usize,
) -> anyhow::Result<f64> {
    let settings = pipeline_settings(options, [input, output, dead], guarantee, round)?;
    let shared = Shared::new(&settings);
    let compute = task::load(&settings, &shared.metrics)?;
    let topics = cluster::wait(&settings, &shared.metrics, &shared.health, &shared.stop, Missing::Fail)?
        .context("stopped")?;
    let running = {
        let (settings, shared) = (settings.clone(), shared.clone());
        std::thread::spawn(move || pipeline::run(&settings, compute, &topics, &shared))
    };
    let metrics = &shared.metrics;
    let predicted = metrics.records.with_label_values(&[input.as_str(), "predicted"]);
    let mut started = None;
    while predicted.get() < options.records && !running.is_finished() {
        // The first window has closed.
        if started.is_none() && metrics.window_records.get_sample_count() > 0 {
            started = Some(Instant::now());
        }
        // All records are read: stop, so that the last transaction does not wait for more.
        if metrics.window_records.get_sample_sum() as u64 == options.records {
            shared.stop.store(true, Ordering::Relaxed);
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
    let seconds = started.map_or(f64::NAN, |s| s.elapsed().as_secs_f64());
    shared.stop.store(true, Ordering::Relaxed);
    running.join().map_err(|_| anyhow::anyhow!("the pipeline panicked"))??;
    Ok(options.records as f64 / seconds)
}

fn pipeline_settings(
    options: &Options,
    [input, output, dead]: [&String; 3],
    guarantee: &str,
    round: usize,
) -> anyhow::Result<Settings> {
    let group = format!("{input}-{guarantee}-{round}");
    let mut set = job(&options.brokers, [input, output, dead], &group);
    set.push(format!("delivery.guarantee={guarantee}"));
    set.push("input.format=text".to_owned());
    set.push("task.kind=noop".to_owned());
    set.extend(options.set.iter().cloned());
    super::settings(set)
}
