//! `bench pipeline`: kandle with `noop` (no model) against a bare loop of the same client library,
//! on the same broker, in turns.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;
use serde::Serialize;

use crate::cluster;
use crate::pipeline::{self, Shared};
use crate::settings::{self, Settings, Sources};
use crate::task::Task;

#[derive(Subcommand)]
pub enum Command {
    /// The pipeline without a model, against a bare consume, produce, commit loop on the same broker
    Pipeline(Options),
}

#[derive(Args)]
pub struct Options {
    /// Bootstrap brokers of a Kafka to make topics on (they are deleted again)
    #[arg(long)]
    brokers: String,
    /// Records in the backlog
    #[arg(long, default_value_t = 1_000_000)]
    records: u64,
    /// Bytes of each value
    #[arg(long, default_value_t = 165)]
    value_bytes: usize,
    #[arg(long, default_value_t = 4)]
    partitions: i32,
    /// Turns of each
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// One setting of the pipeline, as for `run`
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// The result as JSON
    #[arg(long)]
    json: bool,
    /// Only the pipeline, once, for a profiler
    #[arg(long)]
    profile: bool,
}

#[derive(Serialize)]
struct Report {
    records: u64,
    value_bytes: usize,
    partitions: i32,
    rounds: Vec<Round>,
    bare_records_per_second: f64,
    pipeline_records_per_second: f64,
    /// Median of the rounds' ratios, pipeline / bare.
    ratio: f64,
}

#[derive(Serialize)]
struct Round {
    bare_records_per_second: f64,
    pipeline_records_per_second: f64,
}

pub fn bench(command: Command) -> anyhow::Result<()> {
    let Command::Pipeline(options) = command;
    let name = format!("kandle-bench-{}", std::process::id());
    let topics = [format!("{name}-in"), format!("{name}-out"), format!("{name}-dead")];
    let admin: AdminClient<DefaultClientContext> = client(&options).create()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let new: Vec<NewTopic<'_>> = topics
        .iter()
        .map(|topic| NewTopic::new(topic, options.partitions, TopicReplication::Fixed(-1)))
        .collect();
    let wait = AdminOptions::new().operation_timeout(Some(Duration::from_secs(30)));
    for made in runtime.block_on(admin.create_topics(&new, &wait))? {
        made.map_err(|(topic, code)| anyhow::anyhow!("topic {topic}: {code}"))?;
    }
    let result = measure(&options, &topics);
    let names: Vec<&str> = topics.iter().map(String::as_str).collect();
    if let Err(error) = runtime.block_on(admin.delete_topics(&names, &wait)) {
        eprintln!("kandle: the topics {name}-* could not be deleted: {error}");
    }
    let report = result?;
    if options.json {
        println!("{}", super::pretty(&serde_json::to_value(&report)?));
    } else {
        for round in &report.rounds {
            println!(
                "bare {:>9.0}/s   pipeline {:>9.0}/s",
                round.bare_records_per_second, round.pipeline_records_per_second
            );
        }
        println!(
            "{} records of {} bytes: bare {:.0}/s, pipeline {:.0}/s (medians), ratio {:.2}",
            report.records,
            report.value_bytes,
            report.bare_records_per_second,
            report.pipeline_records_per_second,
            report.ratio
        );
    }
    Ok(())
}

fn client(options: &Options) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &options.brokers);
    config
}

fn measure(options: &Options, [input, output, dead]: &[String; 3]) -> anyhow::Result<Report> {
    fill(options, input)?;
    let mut rounds = Vec::new();
    for round in 0..if options.profile { 1 } else { options.rounds } {
        let bare = if options.profile { f64::NAN } else { bare(options, input, output, round)? };
        rounds.push(Round {
            bare_records_per_second: bare,
            pipeline_records_per_second: kandle(options, [input, output, dead], round)?,
        });
    }
    let medians = |of: &dyn Fn(&Round) -> f64| {
        let mut all: Vec<f64> = rounds.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    Ok(Report {
        records: options.records,
        value_bytes: options.value_bytes,
        partitions: options.partitions,
        bare_records_per_second: medians(&|r| r.bare_records_per_second),
        pipeline_records_per_second: medians(&|r| r.pipeline_records_per_second),
        ratio: medians(&|r| r.pipeline_records_per_second / r.bare_records_per_second),
        rounds,
    })
}

fn fill(options: &Options, topic: &str) -> anyhow::Result<()> {
    let producer: BaseProducer =
        client(options).set("linger.ms", "50").set("batch.size", "500000").create()?;
    for i in 0..options.records {
        let mut value = format!("ticket {i}: the parcel with order {} has not arrived; ", i * 7919 % 100_003);
        while value.len() < options.value_bytes {
            value.push_str("where is it now? ");
        }
        value.truncate(options.value_bytes);
        let key = (i % 100_003).to_string();
        send(&producer, topic, Some(key.as_bytes()), Some(value.as_bytes()), None)?;
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
) -> anyhow::Result<()> {
    let mut record = BaseRecord::<[u8], [u8]>::to(topic);
    (record.key, record.payload, record.timestamp) = (key, value, timestamp);
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

/// Consume, produce with idempotence, commit once a second: what one would write by hand.
fn bare(options: &Options, input: &str, output: &str, round: usize) -> anyhow::Result<f64> {
    let consumer: BaseConsumer = client(options)
        .set("group.id", format!("{input}-bare-{round}"))
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("partition.assignment.strategy", "cooperative-sticky")
        // As kandle sets it, so that what is compared is the work.
        .set("fetch.queue.backoff.ms", crate::source::FETCH_BACKOFF_MS)
        .create()?;
    let producer: BaseProducer = client(options)
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
        send(&producer, output, message.key(), message.payload(), message.timestamp().to_millis())?;
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

fn kandle(options: &Options, [input, output, dead]: [&String; 3], round: usize) -> anyhow::Result<f64> {
    let settings = pipeline_settings(options, [input, output, dead], round)?;
    let shared = Shared::new(&settings);
    let task = Arc::new(Task::load(&settings, &shared.metrics)?);
    let topics =
        cluster::wait(&settings, &shared.metrics, &shared.health, &shared.stop)?.context("stopped")?;
    let running = {
        let (settings, shared) = (settings.clone(), shared.clone());
        std::thread::spawn(move || pipeline::run(&settings, task, &topics, &shared))
    };
    let metrics = &shared.metrics;
    let predicted = metrics.records.with_label_values(&[input.as_str(), "predicted"]);
    let mut started = None;
    while predicted.get() < options.records && !running.is_finished() {
        // The first window has closed.
        if started.is_none() && metrics.window_records.get_sample_count() > 0 {
            started = Some(Instant::now());
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
    let seconds = started.map_or(f64::NAN, |s| s.elapsed().as_secs_f64());
    shared.stop.store(true, Ordering::Relaxed);
    running.join().map_err(|_| anyhow::anyhow!("the pipeline panicked"))?.map_err(anyhow::Error::msg)?;
    Ok(options.records as f64 / seconds)
}

fn pipeline_settings(
    options: &Options,
    [input, output, dead]: [&String; 3],
    round: usize,
) -> anyhow::Result<Settings> {
    let mut set = vec![
        format!("kafka.brokers={}", options.brokers),
        format!("input.topics={input}"),
        format!("input.group={input}-kandle-{round}"),
        "input.format=text".to_owned(),
        "task.kind=noop".to_owned(),
        format!("output.topic={output}"),
        format!("dead_letters.topic={dead}"),
    ];
    set.extend(options.set.iter().cloned());
    let loaded = settings::load(&Sources { set, ..Sources::default() });
    loaded.map(|loaded| loaded.settings).map_err(|faults| {
        anyhow::anyhow!("{}", faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    })
}
