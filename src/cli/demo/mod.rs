//! `demo`: librdkafka's mock cluster in this process, a bundled model, and records produced at a steady rate. Between
//! the topics runs the same pipeline as in `run`.

pub mod scenes;

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use self::scenes::{IMAGES, Scene, TABLE, TICKETS};
use crate::cli::output::{out, outln};
use crate::kafka::cluster::{OutputTopic, Topics};
use crate::kafka::topic_rules::TopicRules;
use crate::pipeline::{self, Shared};
use crate::settings::{self, Server, Settings, Sources};
use crate::task;
use crate::telemetry::{logging, server};

#[derive(Args)]
pub struct Options {
    /// Name the shapes in images instead
    #[arg(long, conflicts_with = "table")]
    images: bool,
    /// Say which customers leave instead: an ONNX model over the columns of a table
    #[arg(long)]
    table: bool,
    /// How long to run, in seconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(3..=3600))]
    seconds: u64,
    /// Records produced per second
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rate: u64,
    /// Address of /metrics, /livez, /readyz and /status; port 0 takes a free port
    #[arg(long, default_value = "127.0.0.1:9464")]
    listen: String,
}

/// Partitions of the input topic and of the output topic.
const PARTITIONS: i32 = 4;
/// One of so many records is broken.
const BROKEN: u64 = 150;
/// How many predictions are shown in full.
const SHOWN: usize = 6;

pub fn demo(options: &Options) -> anyhow::Result<()> {
    let scene = match (options.images, options.table) {
        (true, _) => &IMAGES,
        (_, true) => &TABLE,
        _ => &TICKETS,
    };
    let cluster = MockCluster::new(1).context("the embedded broker")?;
    let (input, output, dead) = (scene.input(), scene.output(), scene.dead_letters());
    for (topic, partitions) in [(&input, PARTITIONS), (&output, PARTITIONS), (&dead, 1)] {
        cluster.create_topic(topic, partitions, 1).with_context(|| format!("topic {topic}"))?;
    }
    let settings = settings(scene, &cluster.bootstrap_servers())?;
    logging::start(&settings.log);
    let shared = Shared::new(&settings);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let serve = |listen: &str| {
        let server = Server { listen: listen.to_owned(), ..Server::default() };
        let (metrics, health) = (Arc::clone(&shared.metrics), Arc::clone(&shared.health));
        runtime.block_on(server::serve(&server, None, metrics, health))
    };
    // Another kandle on this machine may use the port.
    let address = serve(&options.listen).or_else(|_| serve("127.0.0.1:0")).context("the admin server")?;

    let started = Instant::now();
    let compute = task::load(&settings, &shared.metrics)?;
    let about = compute.about();
    outln!("kandle demo: {}", scene.title);
    outln!(
        "  model    {} (digest {}), loaded in {} ms on {}",
        about.model,
        about.digest,
        started.elapsed().as_millis(),
        about.device
    );
    outln!("  kafka    {} (embedded, gone when this ends)", settings.kafka.brokers);
    outln!("  topics   {input} -> {output}, {dead}");
    outln!("  metrics  http://{address}/metrics\n");

    // The embedded broker does not answer requests for topic configurations.
    let topics = Topics {
        input_partitions: PARTITIONS as u64,
        output: OutputTopic { partitions: PARTITIONS, rules: TopicRules::default() },
        dead_letters: OutputTopic { partitions: 1, rules: TopicRules::default() },
        samples: None,
    };
    let device = about.device;
    let running = {
        let (settings, shared) = (settings.clone(), shared.clone());
        std::thread::Builder::new()
            .name("kandle-demo".to_owned())
            .spawn(move || pipeline::run(&settings, compute, &topics, &shared))?
    };
    let shown = show(options, scene, &settings, &shared, &device, || running.is_finished());
    shared.stop.store(true, Ordering::Relaxed);
    running.join().map_err(|_| anyhow::anyhow!("the pipeline panicked"))??;
    shown?;
    outln!("\nOn your own Kafka:");
    let set: String = scene.set.iter().map(|set| format!(" --set {set}")).collect();
    outln!(
        "  kandle config show --set kafka.brokers=HOST:9092 --set input.topics=IN --set input.group=kandle{set} --set output.topic=OUT --set dead_letters.topic=DEAD > kandle.yaml"
    );
    outln!("  kandle check -c kandle.yaml");
    outln!("  kandle run -c kandle.yaml");
    Ok(())
}

fn settings(scene: &Scene, brokers: &str) -> anyhow::Result<Settings> {
    let mut set = vec![
        format!("kafka.brokers={brokers}"),
        format!("input.topics={}", scene.input()),
        "input.group=kandle-demo".to_owned(),
        format!("output.topic={}", scene.output()),
        format!("output.include={}", scene.include),
        format!("dead_letters.topic={}", scene.dead_letters()),
        "log.level=error".to_owned(),
    ];
    set.extend(scene.set.iter().map(|&set| set.to_owned()));
    let sources = Sources { set, ..Sources::default() };
    let loaded = settings::load(&sources).map_err(|faults| {
        anyhow::anyhow!("{}", faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    })?;
    Ok(loaded.settings)
}

/// Counts of what was produced, read back and shown so far.
#[derive(Default)]
struct Seen {
    produced: u64,
    predicted: u64,
    dead: u64,
    shown: usize,
    dead_shown: bool,
}

/// Produces records, reads their predictions and dead letters, and shows both, until the time is up and every record
/// has come back.
fn show(
    options: &Options,
    scene: &Scene,
    settings: &Settings,
    shared: &Shared,
    device: &str,
    failed: impl Fn() -> bool,
) -> anyhow::Result<()> {
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", &settings.kafka.brokers).create()?;
    let (input, dead) = (scene.input(), scene.dead_letters());
    let reader = reader(scene, &settings.kafka.brokers)?;
    let records: Vec<&str> = scene.records.lines().collect();
    let terminal = std::io::stdout().is_terminal();
    let mut seen = Seen::default();
    let mut line = Line { terminal, last: Instant::now(), windows: (0, 0.0), width: 0 };
    let started = Instant::now();
    let end = Duration::from_secs(options.seconds);
    // Records that are in flight at the end get more time to come back.
    while started.elapsed() < end
        || (seen.predicted + seen.dead < seen.produced && started.elapsed() < end * 2)
    {
        anyhow::ensure!(!failed(), "the pipeline ended early");
        let due = (started.elapsed().min(end).as_millis() as u64 * options.rate) / 1000;
        while seen.produced < due {
            let record = records[seen.produced as usize % records.len()];
            let value = match seen.produced % BROKEN == BROKEN / 4 {
                true => (scene.broken)(record),
                false => record.to_owned(),
            };
            let key = format!("customer-{}", seen.produced % 97);
            let sent = producer.send(BaseRecord::to(&input).key(&key).payload(&value));
            sent.map_err(|(e, _)| e).context("producing")?;
            seen.produced += 1;
        }
        producer.poll(Duration::ZERO);
        let mut wait = Duration::from_millis(20);
        while let Some(message) = reader.poll(wait) {
            wait = Duration::ZERO;
            match message {
                Ok(message) if message.topic() == dead => {
                    seen.dead += 1;
                    if !seen.dead_shown {
                        seen.dead_shown = true;
                        line.clear();
                        dead_letter(&message);
                    }
                }
                Ok(message) => {
                    seen.predicted += 1;
                    // A few, spread over the first seconds.
                    if seen.shown < SHOWN && seen.predicted > seen.shown as u64 * options.rate / 2 {
                        seen.shown += 1;
                        line.clear();
                        prediction(scene, &message);
                    }
                }
                Err(_) => {}
            }
        }
        line.show(scene, &seen, shared, started, device);
    }
    line.clear();
    let seconds = started.elapsed().as_secs_f64();
    outln!(
        "\n{} {} in {seconds:.0} s: {} predictions, {} dead letters, nothing lost",
        seen.produced,
        scene.name,
        seen.predicted,
        seen.dead
    );
    anyhow::ensure!(
        seen.predicted + seen.dead == seen.produced,
        "{} {} did not come back",
        seen.produced - seen.predicted - seen.dead,
        scene.name
    );
    Ok(())
}

fn reader(scene: &Scene, brokers: &str) -> anyhow::Result<BaseConsumer> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "kandle-demo-reader")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut all = TopicPartitionList::new();
    for (topic, partitions) in [(scene.output(), PARTITIONS), (scene.dead_letters(), 1)] {
        for partition in 0..partitions {
            all.add_partition_offset(&topic, partition, Offset::Beginning)?;
        }
    }
    reader.assign(&all)?;
    Ok(reader)
}

fn prediction(scene: &Scene, message: &impl Message) {
    let value: serde_json::Value =
        serde_json::from_slice(message.payload().unwrap_or_default()).unwrap_or_default();
    outln!(
        "  {:9} {:4.0} %  {}",
        value["label"].as_str().unwrap_or_default(),
        value["score"].as_f64().unwrap_or_default() * 100.0,
        shortened(&(scene.about)(&value))
    );
}

/// At most 72 characters.
fn shortened(text: &str) -> String {
    let short: String = text.chars().take(72).collect();
    if text.chars().count() > 72 { short + "…" } else { short }
}

fn dead_letter(message: &impl Message) {
    let header = |name: &str| {
        let headers = message.headers()?;
        let found = headers.iter().find(|h| h.key == name)?;
        Some(String::from_utf8_lossy(found.value?).into_owned())
    };
    let value = String::from_utf8_lossy(message.payload().unwrap_or_default());
    outln!("  dead letter from {}: {}", header("kandle-source").unwrap_or_default(), shortened(&value));
    outln!(
        "    why: {}: {}",
        header("kandle-error").unwrap_or_default(),
        header("kandle-error-message").unwrap_or_default()
    );
}

/// The status line: rewritten in place on a terminal, printed every two seconds elsewhere.
struct Line {
    terminal: bool,
    last: Instant,
    /// Count of windows and sum of their records when the line was last shown.
    windows: (u64, f64),
    width: usize,
}

impl Line {
    fn show(&mut self, scene: &Scene, seen: &Seen, shared: &Shared, started: Instant, device: &str) {
        let every = if self.terminal { Duration::from_millis(250) } else { Duration::from_secs(2) };
        if self.last.elapsed() < every {
            return;
        }
        self.last = Instant::now();
        let histogram = &shared.metrics.window_records;
        let now = (histogram.get_sample_count(), histogram.get_sample_sum());
        let window = match now.0 - self.windows.0 {
            0 => "-".to_owned(),
            closed => format!("{:.0} records", (now.1 - self.windows.1) / closed as f64),
        };
        self.windows = now;
        let seconds = started.elapsed().as_secs_f64();
        let done = seen.predicted + seen.dead;
        let text = format!(
            "[{seconds:4.0} s] {:.0} {}/s, lag {}, window {window}, {device}, {} predicted, {} dead",
            done as f64 / seconds,
            scene.name,
            seen.produced - done,
            seen.predicted,
            seen.dead
        );
        if self.terminal {
            out!("\r{text:width$}", width = self.width);
            let _ = std::io::stdout().flush();
        } else {
            outln!("{text}");
        }
        self.width = text.len();
    }

    fn clear(&mut self) {
        if self.terminal {
            out!("\r{:width$}\r", "", width = self.width);
        }
    }
}
