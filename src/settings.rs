//! The typed configuration: one struct per section, from which the JSON Schema, the defaults and
//! the checks are made. How files, environment and flags become it is in [`load`].

mod file;
pub mod load;
mod problems;
mod rules;
mod units;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use load::{Loaded, Sources, escape, load};
pub use problems::Problem;
pub use units::{ByteSize, Scalar, Wait};

/// The settings of one kandle job.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How to reach Kafka.
    pub kafka: Kafka,
    /// What is read.
    pub input: Input,
    /// When the records gathered are passed on: whichever limit comes first.
    #[serde(default)]
    pub window: Window,
    /// What is predicted.
    pub task: Task,
    /// The model that predicts.
    #[serde(default)]
    pub model: Model,
    /// What goes through the model in one forward.
    #[serde(default)]
    pub batch: Batch,
    /// Where predictions go.
    pub output: Output,
    /// Where records go that cannot become a prediction.
    pub dead_letters: DeadLetters,
    /// What is promised about each record.
    #[serde(default)]
    pub delivery: Delivery,
    /// How much may be in flight.
    #[serde(default)]
    pub memory: Memory,
    /// The admin server: /metrics, /livez, /readyz, /status.
    #[serde(default)]
    pub server: Server,
    /// What is written to standard error.
    #[serde(default)]
    pub log: Log,
    /// When `run` consumes, and by when a backlog is to be done.
    #[serde(default)]
    pub schedule: Schedule,
    /// OpenTelemetry: a span a window.
    #[serde(default)]
    pub otel: Otel,
    /// What running kandle costs, for a drain's report.
    #[serde(default)]
    pub cost: Cost,
}

impl Settings {
    /// A property of librdkafka, wherever it is set; the clients' own win.
    pub fn property(&self, name: &str) -> Option<&str> {
        let own = [&self.output.properties, &self.input.properties, &self.kafka.properties];
        own.into_iter().find_map(|properties| properties.get(name)).map(|value| value.0.as_str())
    }

    /// Bytes that a window may take until it is published, the footprints of its records included: a quarter of the half
    /// of `memory.limit` that is for windows. One that `window.max_bytes` closes has room, and is decoded beside.
    pub fn window_memory(&self) -> usize {
        (self.memory.limit.0 / 8).max(2 * self.window.max_bytes.0) as usize
    }

    /// After which the coordinator gives a transaction up: transaction.timeout.ms where it is set, else
    /// [`Settings::longest_transaction`] with time for a broker to come back.
    pub fn transaction_timeout(&self) -> Duration {
        let set = self.property("transaction.timeout.ms").and_then(|ms| ms.parse().ok());
        set.map_or_else(|| self.longest_transaction() + Duration::from_secs(30), Duration::from_millis)
    }

    /// A transaction is open for `delivery.commit_interval`, then for as long as its last window takes
    /// to be acknowledged: reckoned at no less than 1 MiB/s and 1 s.
    pub fn longest_transaction(&self) -> Duration {
        let window = Duration::from_secs(1 + (self.window.max_bytes.0 >> 20));
        self.delivery.commit_interval.0 + window
    }
}

/// Properties of librdkafka, name to value.
pub type Properties = BTreeMap<String, units::Scalar>;

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    /// Bootstrap brokers, host:port, comma-separated.
    #[schemars(example = "localhost:9092")]
    pub brokers: String,
    /// librdkafka properties for both clients. What kandle itself sets is refused with the reason.
    #[serde(default)]
    pub properties: Properties,
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Topics by name, or one pattern that starts with ^.
    #[schemars(example = ["tickets"], length(min = 1))]
    pub topics: Vec<String>,
    /// The consumer group.
    #[schemars(example = "kandle-tickets")]
    pub group: String,
    /// Where to begin in a partition for which the group has no offset.
    #[serde(default)]
    pub start: Start,
    /// How values are read.
    #[serde(default)]
    pub format: Format,
    /// json: JSON Pointer to the text, or a list of them, joined by `join`.
    #[serde(default)]
    pub field: Fields,
    /// json: what stands between the texts of several fields.
    #[serde(default = "default_join")]
    pub join: String,
    /// json: a template (Jinja) over the value's fields, instead of `field`.
    #[serde(default)]
    pub template: Option<String>,
    /// librdkafka properties for the consumer alone.
    #[serde(default)]
    pub properties: Properties,
}

fn default_join() -> String {
    "\n".to_owned()
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Start {
    #[default]
    Earliest,
    Latest,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    #[default]
    Json,
    Text,
    Bytes,
}

/// One JSON Pointer or several; empty where none is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "units::OneOrMany", into = "units::OneOrMany")]
pub struct Fields(pub Vec<String>);

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Window {
    /// Records in a window at most.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_records: usize,
    /// Bytes of keys and values: the record that reaches it closes the window.
    pub max_bytes: ByteSize,
    /// How long the oldest record waits at most for others.
    pub max_wait: Wait,
    /// What becomes of a window while no other one is under way and no more records are there: wait for others, up to
    /// max_wait, so that fewer and fuller batches do the work; or close, for the lowest latency.
    pub when_idle: WhenIdle,
    /// How long the model will need at most, as long as the windows before took: the record that reaches it closes the
    /// window. Twice as much is under way at a time: what a crash repeats, and a stop waits for.
    pub max_work: Wait,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            max_records: 1024,
            max_bytes: ByteSize::mib(8),
            max_wait: Wait::millis(200),
            when_idle: WhenIdle::default(),
            max_work: Wait::millis(1000),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenIdle {
    #[default]
    Wait,
    Close,
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// What is predicted about a record. `noop` runs no model and publishes the value as it came:
    /// for measuring.
    #[schemars(example = "text-classification")]
    pub kind: TaskKind,
    /// text-classification, zero-shot-classification: how many labels `scores` has (all of them where unset);
    /// similarity: how many matches a prediction has (one where unset); reranking: how many results (all where unset).
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub top_k: Option<usize>,
    /// What becomes of a text with more tokens than the model takes: truncate (counted), dead_letter, or, for
    /// token-classification, chunk (overlapping chunks, whose entities are merged). Where unset: chunk for
    /// token-classification, truncate for the others.
    #[serde(default)]
    pub overflow: Option<Overflow>,
    /// token-classification: how tokens become entities, as in transformers' pipeline. none: each token is one.
    /// simple: neighbours with one label are one. first, average, max: so are the tokens of a word, which have the
    /// label of the first of them, of their average, or of the surest.
    #[serde(default)]
    pub aggregation: Aggregation,
    /// token-classification: by how many tokens the chunks of a long text overlap (32 where unset, or half of what the
    /// model takes if that is less).
    #[serde(default)]
    pub stride: Option<usize>,
    /// reranking: JSON Pointer to the documents, an array of texts or of objects with `text` and perhaps `id`. The
    /// query is `input.field`.
    #[serde(default)]
    pub documents: Option<String>,
    /// zero-shot-classification: the labels, the same for every record.
    #[serde(default)]
    pub labels: Vec<String>,
    /// zero-shot-classification: JSON Pointer to the record's own labels, an array of texts, instead of `labels`.
    #[serde(default)]
    pub labels_field: Option<String>,
    /// zero-shot-classification: what the model judges of each label, which stands for {}.
    #[serde(default = "default_hypothesis")]
    pub hypothesis: String,
    /// zero-shot-classification: more than one label may hold. Each has a score of its own then; otherwise they are
    /// shares of 1.
    #[serde(default)]
    pub multi_label: bool,
    /// similarity: a file of candidates, one JSON object a line with `id` and `text`.
    #[serde(default)]
    pub candidates: Option<PathBuf>,
    /// Bytes for what the model said about the inputs of late: the same input again is not computed
    /// again. Beside memory.limit; none where unset. Within a window it is so without this.
    #[serde(default)]
    pub cache: Option<ByteSize>,
}

impl Task {
    /// With nothing else set.
    pub fn of(kind: TaskKind) -> Self {
        Self {
            kind,
            top_k: None,
            overflow: None,
            aggregation: Aggregation::default(),
            stride: None,
            documents: None,
            labels: Vec::new(),
            labels_field: None,
            hypothesis: default_hypothesis(),
            multi_label: false,
            candidates: None,
            cache: None,
        }
    }

    /// The keys with another value than where nothing is set, beside `kind`.
    pub fn set_keys(&self) -> serde_json::Map<String, serde_json::Value> {
        let keys = |task: &Self| match serde_json::to_value(task) {
            Ok(serde_json::Value::Object(keys)) => keys,
            _ => serde_json::Map::new(),
        };
        let unset = keys(&Self::of(self.kind));
        keys(self).into_iter().filter(|(key, value)| unset.get(key) != Some(value)).collect()
    }
}

fn default_hypothesis() -> String {
    "This example is {}.".to_owned()
}

/// A task by its name in the table: [`crate::task::KINDS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskKind(pub(crate) &'static str);

impl TaskKind {
    /// The name in configuration and metrics.
    pub fn name(self) -> &'static str {
        self.0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overflow {
    Truncate,
    DeadLetter,
    Chunk,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    None,
    #[default]
    Simple,
    First,
    Average,
    Max,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// A hub id (`org/name`), a directory with config.json, tokenizer.json and *.safetensors, or
    /// `bundled`: the ticket classifier that is part of kandle.
    pub source: Option<String>,
    /// Hub: branch, tag or commit; the commit it stands for is resolved once and named everywhere.
    pub revision: Option<String>,
    /// Hub: the cache directory ($HF_HOME/hub or ~/.cache/huggingface/hub where unset).
    pub cache: Option<PathBuf>,
    /// Hub: access token ($HF_TOKEN or the cache's token file where unset).
    pub token: Option<String>,
    /// Hub: use the cache alone ($HF_HUB_OFFLINE=1 does the same).
    pub offline: bool,
    /// Where it runs: auto, cpu, cuda, cuda:N or metal. auto takes the best that build and machine have.
    pub device: DeviceChoice,
    /// Precision: auto (f32 on a CPU, bf16 on CUDA, f16 on Metal), f32, bf16 (on a CPU faster than f32 where
    /// that has AMX, or Arm's BF16), f16 (not on a CPU) or int8 (CPU alone: multiplications in eight bits).
    pub dtype: Dtype,
    /// What to do when another model made the group's last commit.
    pub on_change: OnChange,
    /// Keys of the checkpoint's config.json that kandle does not know and that do not change predictions. Any other
    /// unknown key is refused.
    pub ignore_config: Vec<String>,
}

/// auto, cpu, cuda, cuda:N or metal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
    Metal,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    #[default]
    Auto,
    F32,
    Bf16,
    F16,
    Int8,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnChange {
    Refuse,
    #[default]
    Warn,
    Allow,
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Batch {
    /// Tokens of one forward at most, halved while the device is out of memory. A CPU core takes 256 at a
    /// time, a GPU all of them, unless `kandle bench calibrate` has found better for model and device.
    #[schemars(range(min = 1))]
    pub max_tokens: usize,
    /// CPU cores that run batches, each one of its own at a time: as many as the process may use where
    /// unset. A GPU has two, of which one is queued.
    #[schemars(range(min = 1))]
    pub lanes: Option<usize>,
    /// How long one forward may take. One that takes longer ends the process, and on the next start its
    /// records run one by one: the one at problem becomes a dead letter.
    pub timeout: Wait,
}

impl Default for Batch {
    fn default() -> Self {
        Self { max_tokens: 16384, lanes: None, timeout: Wait::millis(120_000) }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// The topic of the predictions.
    #[schemars(example = "tickets-predictions")]
    pub topic: String,
    /// How predictions are written.
    #[serde(default)]
    pub format: OutputFormat,
    /// JSON Pointers whose values are copied from the input into the prediction, under their last name.
    #[serde(default)]
    pub include: Vec<String>,
    /// Which partition: by the key's murmur2 hash as Java's clients do, or the input's number.
    /// A record without a key keeps its input partition's number (modulo the output's count).
    #[serde(default)]
    pub partition: Partitioning,
    /// A prediction's timestamp: the record's own, or the time at which it is published. Retention goes by it.
    #[serde(default)]
    pub timestamp: OutputTimestamp,
    /// librdkafka properties for the producer alone.
    #[serde(default)]
    pub properties: Properties,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputFormat {
    #[default]
    Json,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Partitioning {
    #[default]
    Key,
    Source,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputTimestamp {
    #[default]
    Record,
    Now,
}

impl OutputTimestamp {
    pub fn is_now(self) -> bool {
        self == Self::Now
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeadLetters {
    /// The topic of the dead letters.
    #[schemars(example = "tickets-dead")]
    pub topic: String,
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Delivery {
    /// at_least_once: offsets are committed only when every prediction and dead letter before them
    /// is acknowledged; after a crash some are published again. exactly_once: predictions, dead letters
    /// and offsets are one transaction; readers set isolation.level=read_committed.
    pub guarantee: Guarantee,
    /// How often offsets are committed; exactly_once: how long windows share a transaction.
    pub commit_interval: Wait,
    /// When partitions are taken away: how long windows in flight may take to finish.
    pub revoke_timeout: Wait,
    /// exactly_once: the transactional.id, which no other member may have. Where unset: the group with
    /// group.instance.id, else with the machine's name and a number that no other kandle there has.
    pub transactional_id: Option<String>,
}

impl Default for Delivery {
    fn default() -> Self {
        Self {
            guarantee: Guarantee::AtLeastOnce,
            commit_interval: Wait::millis(1000),
            revoke_timeout: Wait::millis(30_000),
            transactional_id: None,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Guarantee {
    #[default]
    AtLeastOnce,
    ExactlyOnce,
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// Bytes in flight: a quarter for what librdkafka prefetches, a quarter for what waits for the
    /// broker's acknowledgement, half for windows. Consumption pauses at the limit.
    pub limit: ByteSize,
}

impl Default for Memory {
    fn default() -> Self {
        Self { limit: ByteSize::mib(1024) }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Address of the admin server; port 0 takes a free one, which the log names.
    pub listen: String,
    /// /livez turns false when a stage has been at one window for longer than this.
    pub stall_after: Wait,
}

impl Default for Server {
    fn default() -> Self {
        Self { listen: "0.0.0.0:9464".to_owned(), stall_after: Wait::millis(300_000) }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// text or json.
    pub format: LogFormat,
    /// error, warn, info, debug or trace.
    pub level: LogLevel,
    /// How often a drain says how far it is, where no terminal shows its bar.
    pub progress_every: Wait,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            format: LogFormat::default(),
            level: LogLevel::default(),
            progress_every: Wait::millis(10_000),
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// When `run` consumes; always where there are none. What they share counts once.
    pub periods: Vec<Period>,
    /// The time zone of `periods` and `finish_by`, by its IANA name.
    #[schemars(example = "Europe/Berlin")]
    pub timezone: String,
    /// Outside of all periods: stay in the group with partitions paused, or leave it.
    pub outside: Outside,
    /// outside: leave: the model goes too, so that its memory and the GPU are free, and is loaded again
    /// ahead of the next period.
    pub unload_model: bool,
    /// The time of day, HH:MM, by which a backlog is to be done: what will not be is said ahead of time.
    pub finish_by: Option<String>,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            periods: Vec::new(),
            timezone: "UTC".to_owned(),
            outside: Outside::default(),
            unload_model: false,
            finish_by: None,
        }
    }
}

/// A time in which is consumed, again and again.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Period {
    /// When it begins: minute, hour, day of the month, month, day of the week.
    #[schemars(example = "0 22 * * MON-FRI")]
    pub cron: String,
    /// How long it lasts, by a stopwatch: clocks that are put forward or back meanwhile do not count.
    pub duration: Wait,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outside {
    #[default]
    Stay,
    Leave,
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Otel {
    /// Where spans are sent by OTLP over HTTP, without /v1/traces; none are where unset.
    #[schemars(example = "http://localhost:4318")]
    pub endpoint: Option<String>,
    /// The name under which they stand.
    pub service_name: String,
}

impl Default for Otel {
    fn default() -> Self {
        Self { endpoint: None, service_name: "kandle".to_owned() }
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cost {
    /// What an hour of this machine costs, in whatever currency; a drain's report reckons with it.
    #[schemars(range(min = 0.0))]
    pub per_hour: Option<f64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// The JSON Schema of [`Settings`], without references.
pub fn schema() -> serde_json::Value {
    let mut generator = schemars::generate::SchemaSettings::draft2020_12()
        .with(|s| s.inline_subschemas = true)
        .into_generator();
    let mut schema = generator.root_schema_for::<Settings>().to_value();
    schema["title"] = "kandle".into();
    schema
}
