//! `bench latency`: latency of a record at low load, from its produce call until a consumer has its prediction. A bare
//! loop with the same client library shows how much of it is Kafka's.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde::Serialize;

use super::topics::{client, job, with_topics};
use crate::cli::output::outln;
use crate::kafka::cluster::{self, Missing};
use crate::pipeline::{self, Shared};
use crate::task;

#[derive(Args)]
pub struct Options {
    /// Bootstrap brokers; topics are created there and deleted again
    #[arg(long)]
    brokers: String,
    /// File of texts, one {"text": …} per line, sent repeatedly
    #[arg(long)]
    input: PathBuf,
    /// The model: a directory or a hub id
    #[arg(long)]
    model: String,
    /// Records per second
    #[arg(long, default_value_t = 20.0)]
    rate: f64,
    /// Number of records to measure
    #[arg(long, default_value_t = 400)]
    records: usize,
    /// One setting of the pipeline, as for `run`
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Records that are sent before the measured ones.
const WARM_UP: usize = 40;
/// How long to wait for the next prediction before giving up.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);

/// Percentiles in milliseconds.
#[derive(Serialize)]
struct Latency {
    p50: f64,
    p99: f64,
    max: f64,
}

#[derive(Serialize)]
struct Report {
    rate: f64,
    records: usize,
    /// Latency of a loop that only consumes and produces, without waiting for anything.
    bare: Latency,
    kandle: Latency,
}

pub fn bench(options: &Options) -> anyhow::Result<()> {
    let file = std::fs::File::open(&options.input).with_context(|| options.input.display().to_string())?;
    let texts = BufReader::new(file).lines().collect::<Result<Vec<_>, _>>()?;
    anyhow::ensure!(!texts.is_empty(), "{} has no lines", options.input.display());
    let bare = with_topics(&options.brokers, 1, |[input, output, _]| bare(options, &texts, input, output))?;
    let kandle = with_topics(&options.brokers, 1, |topics| kandle(options, &texts, topics))?;
    let report = Report { rate: options.rate, records: options.records, bare, kandle };
    if options.json {
        outln!("{}", super::super::pretty(&serde_json::to_value(&report)?));
        return Ok(());
    }
    for (name, Latency { p50, p99, max }) in [("bare", &report.bare), ("kandle", &report.kandle)] {
        outln!("{name:8} p50 {p50:.1} ms, p99 {p99:.1} ms, at most {max:.1} ms");
    }
    Ok(())
}

fn bare(options: &Options, texts: &[String], input: &str, output: &str) -> anyhow::Result<Latency> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let looped = threads.spawn(|| {
            let consumer = reader(&options.brokers, input)?;
            let producer: BaseProducer = client(&options.brokers).set("linger.ms", "0").create()?;
            while !stop.load(Ordering::Relaxed) {
                if let Some(message) = consumer.poll(Duration::from_millis(50)) {
                    let message = message?;
                    let record = BaseRecord::<[u8], [u8]>::to(output).key(message.key().unwrap_or_default());
                    let record = record.payload(message.payload().unwrap_or_default());
                    producer.send(record).map_err(|(error, _)| error)?;
                }
                producer.poll(Duration::ZERO);
            }
            anyhow::Ok(())
        });
        let result = measure(options, texts, input, output, || Ok(()));
        stop.store(true, Ordering::Relaxed);
        looped.join().map_err(|_| anyhow::anyhow!("the loop panicked"))??;
        result
    })
}

fn kandle(
    options: &Options,
    texts: &[String],
    [input, output, dead]: &[String; 3],
) -> anyhow::Result<Latency> {
    let mut set = job(&options.brokers, [input, output, dead], input);
    set.push("input.field=/text".to_owned());
    set.push("task.kind=text-embedding".to_owned());
    set.push(format!("model.source={}", options.model));
    set.extend(options.set.iter().cloned());
    let settings = super::settings(set)?;
    let shared = Shared::new(&settings);
    let compute = task::load(&settings, &shared.metrics)?;
    let topics = cluster::wait(&settings, &shared.metrics, &shared.health, &shared.stop, Missing::Fail)?
        .context("stopped")?;
    std::thread::scope(|threads| {
        let running = threads.spawn(|| pipeline::run(&settings, compute, &topics, &shared));
        let ended = || match running.is_finished() {
            true => anyhow::bail!("the pipeline ended"),
            false => Ok(()),
        };
        let result = measure(options, texts, input, output, ended);
        shared.stop.store(true, Ordering::Relaxed);
        running.join().map_err(|_| anyhow::anyhow!("the pipeline panicked"))??;
        result
    })
}

/// Reads the only partition of a topic from its beginning.
fn reader(brokers: &str, topic: &str) -> anyhow::Result<BaseConsumer> {
    let consumer: BaseConsumer = client(brokers).set("group.id", topic).create()?;
    let mut partition = TopicPartitionList::new();
    partition.add_partition_offset(topic, 0, Offset::Beginning)?;
    consumer.assign(&partition)?;
    Ok(consumer)
}

/// Sends records at the rate of the options and reads their results. `goes_on` fails once no more results can come.
fn measure(
    options: &Options,
    texts: &[String],
    input: &str,
    output: &str,
    goes_on: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<Latency> {
    let total = WARM_UP + options.records;
    let sent: Mutex<HashMap<usize, Instant>> = Mutex::default();
    let consumer = reader(&options.brokers, output)?;
    std::thread::scope(|threads| {
        let sending = threads.spawn(|| send(options, texts, input, total, &sent));
        let (mut latencies, mut last) = (Vec::with_capacity(options.records), Instant::now());
        let mut read = 0;
        while read < total {
            goes_on()?;
            anyhow::ensure!(last.elapsed() < SILENCE_TIMEOUT, "only {read} of {total} predictions came");
            let Some(message) = consumer.poll(Duration::from_millis(100)) else { continue };
            let message = message?;
            last = Instant::now();
            read += 1;
            let key = message.key().and_then(|key| std::str::from_utf8(key).ok()?.parse().ok());
            let began = key.and_then(|key: usize| Some((key, *sent.lock().ok()?.get(&key)?)));
            let (key, began) = began.context("the prediction belongs to no record that was sent")?;
            if key >= WARM_UP {
                latencies.push((last - began).as_secs_f64() * 1e3);
            }
        }
        sending.join().map_err(|_| anyhow::anyhow!("the producer panicked"))??;
        latencies.sort_by(f64::total_cmp);
        let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share).round() as usize];
        Ok(Latency { p50: at(0.5), p99: at(0.99), max: at(1.0) })
    })
}

fn send(
    options: &Options,
    texts: &[String],
    topic: &str,
    total: usize,
    sent: &Mutex<HashMap<usize, Instant>>,
) -> anyhow::Result<()> {
    let producer: BaseProducer = client(&options.brokers).set("linger.ms", "0").create()?;
    let started = Instant::now();
    for i in 0..total {
        let due = started + Duration::from_secs_f64(i as f64 / options.rate);
        while let Some(left) = due.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            producer.poll(left);
        }
        let key = i.to_string();
        sent.lock().map_err(|_| anyhow::anyhow!("the reader panicked"))?.insert(i, Instant::now());
        let record = BaseRecord::<[u8], [u8]>::to(topic)
            .key(key.as_bytes())
            .payload(texts[i % texts.len()].as_bytes());
        producer.send(record).map_err(|(error, _)| error)?;
    }
    producer.flush(SILENCE_TIMEOUT)?;
    Ok(())
}
