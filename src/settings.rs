//! The typed configuration: one struct per section. The JSON Schema, the defaults and the checks are derived from
//! these structs. [`load`] fills them from files, environment and flags.

mod file;
pub mod load;
mod problems;
mod rules;
mod shadow;
mod units;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use load::{Loaded, Sources, escape, interpolate, load};
pub use problems::Problem;
pub(crate) use rules::{authority, check_pointer};
pub use shadow::{Shadow, TaskKeys};
pub use units::{ByteSize, Scalar, Wait};

/// The settings of one kandle job.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How to reach Kafka.
    pub kafka: Kafka,
    /// Which records are read, and how.
    pub input: Input,
    /// Limits of a window, which closes at whichever limit is reached first.
    #[serde(default)]
    pub window: Window,
    /// What is predicted.
    pub task: Task,
    /// The model that predicts.
    #[serde(default)]
    pub model: Model,
    /// Limits of one forward pass of the model.
    #[serde(default)]
    pub batch: Batch,
    /// Where predictions go.
    pub output: Output,
    /// Where records go that could not become a prediction.
    pub dead_letters: DeadLetters,
    /// A share of the inputs that is published with their predictions, for people to look at.
    #[serde(default)]
    pub samples: Samples,
    /// The comparison of predictions with those of an earlier time.
    #[serde(default)]
    pub drift: Drift,
    /// The schema registry of the formats that have schemas.
    #[serde(default)]
    pub registry: Registry,
    /// The delivery guarantee, and how often offsets are committed.
    #[serde(default)]
    pub delivery: Delivery,
    /// How much may be in flight.
    #[serde(default)]
    pub memory: Memory,
    /// The admin server: /metrics, /livez, /readyz, /status.
    #[serde(default)]
    pub server: Server,
    /// Logging to standard error.
    #[serde(default)]
    pub log: Log,
    /// When `run` consumes, and the time of day by which a backlog must be done.
    #[serde(default)]
    pub schedule: Schedule,
    /// OpenTelemetry tracing: one span per window.
    #[serde(default)]
    pub otel: Otel,
    /// Cost of running kandle, for a drain's report.
    #[serde(default)]
    pub cost: Cost,
    /// A second model that sees a share of the records, to compare it with the model.
    #[serde(default)]
    pub shadow: Shadow,
    /// Properties and `server.token` with placeholders as they are written, by key, so that a file can be read again.
    #[serde(skip)]
    pub templates: BTreeMap<String, String>,
}

impl Settings {
    /// Value of a librdkafka property. `output.properties` and `input.properties` win over `kafka.properties`.
    pub fn property(&self, name: &str) -> Option<&str> {
        let own = [&self.output.properties, &self.input.properties, &self.kafka.properties];
        own.into_iter().find_map(|properties| properties.get(name)).map(|value| value.0.as_str())
    }

    /// Bytes that a window may occupy until it is published, including its records' footprints: a quarter of the half
    /// of `memory.limit` that is for windows, but at least twice `window.max_bytes`: for the bytes and what is decoded
    /// from them.
    pub fn window_memory(&self) -> usize {
        (self.memory.limit.0 / 8).max(2 * self.window.max_bytes.0) as usize
    }

    /// Time after which the coordinator aborts a transaction: transaction.timeout.ms if it is set, else
    /// [`Settings::longest_transaction`] plus 30 s for a broker to restart.
    pub fn transaction_timeout(&self) -> Duration {
        let set = self.property("transaction.timeout.ms").and_then(|ms| ms.parse().ok());
        set.map_or_else(|| self.longest_transaction() + Duration::from_secs(30), Duration::from_millis)
    }

    /// The longest time that a transaction stays open: `delivery.commit_interval`, plus the time until its last window
    /// is acknowledged, estimated as 1 s and 1 s per MiB.
    pub fn longest_transaction(&self) -> Duration {
        let window = Duration::from_secs(1 + (self.window.max_bytes.0 >> 20));
        self.delivery.commit_interval.0 + window
    }
}

/// librdkafka properties, name to value.
pub type Properties = BTreeMap<String, units::Scalar>;

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    /// Bootstrap brokers, host:port, comma-separated.
    #[schemars(example = "localhost:9092")]
    pub brokers: String,
    /// librdkafka properties for the consumer and the producer. Those that kandle manages are refused, with the reason.
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
    /// Where to start in a partition for which the group has no committed offset.
    #[serde(default)]
    pub start: Start,
    /// How record values are decoded.
    #[serde(default)]
    pub format: Format,
    /// File with the schema of all values, which then have no schema id (default: the schema of a value's id, from the
    /// registry). avro: the writer's schema (.avsc). protobuf: a .proto file, which imports files beside it, or a
    /// descriptor set. json_schema: a JSON Schema.
    #[serde(default)]
    pub schema: Option<PathBuf>,
    /// protobuf with `schema`: the full name of the values' message.
    #[serde(default)]
    #[schemars(example = "shop.Ticket")]
    pub message: Option<String>,
    /// Formats with fields: JSON Pointer to the text, or a list of pointers whose texts are joined with `join`. Of tasks over
    /// images: JSON Pointer to the image, in base64 or as a data URL.
    #[serde(default)]
    pub field: Fields,
    /// Formats with fields: separator between the texts of several fields.
    #[serde(default = "default_join")]
    pub join: String,
    /// Formats with fields: Jinja template over the value's fields, used instead of `field`.
    #[serde(default)]
    pub template: Option<String>,
    /// librdkafka properties for the consumer only.
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
    Image,
    Avro,
    Protobuf,
    JsonSchema,
}

/// One JSON Pointer or several; empty if none is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "units::OneOrMany", into = "units::OneOrMany")]
pub struct Fields(pub Vec<String>);

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Window {
    /// Maximum number of records in a window.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_records: usize,
    /// Bytes of keys, values and headers. The record that reaches this limit closes the window.
    pub max_bytes: ByteSize,
    /// How long the oldest record of a window waits for others at most.
    pub max_wait: Wait,
    /// What to do with a partial window while no other window is in flight and no more records are available: wait for
    /// more, up to max_wait (fewer and fuller batches), or close it (lowest latency).
    pub when_idle: WhenIdle,
    /// Time that the model may need for a window, estimated from earlier windows. The record that reaches this limit
    /// closes the window. At most twice this much, or two windows, is in flight (and repeated after a crash).
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
    /// What is predicted about a record. `noop` runs no model and publishes the value unchanged, for measurements.
    #[schemars(example = "text-classification")]
    pub kind: TaskKind,
    /// text-classification, zero-shot-classification, image-classification: number of labels in `scores` (default: all). similarity: number
    /// of matches (default: one). reranking: number of results (default: all). sparse-embedding: number of values, the
    /// largest ones (default: as many as the model's config_sentence_transformers.json says, or all).
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub top_k: Option<usize>,
    /// What to do with a text that has more tokens than the model accepts: truncate (counted), dead_letter, or chunk:
    /// overlapping chunks whose entities are merged (token-classification), whose vectors are averaged (text-embedding,
    /// similarity) or give each value's maximum (sparse-embedding), or whose scores are averaged (text-classification).
    /// Default: chunk for token-classification, truncate for the others.
    #[serde(default)]
    pub overflow: Option<Overflow>,
    /// token-classification: how tokens become entities, as in transformers' pipeline. none: each token is an entity.
    /// simple: neighbouring tokens with the same label are one entity. first, average, max: the same over whole words,
    /// each with the label of its first token, of the average of its tokens' scores, or of its highest-scoring token.
    #[serde(default)]
    pub aggregation: Aggregation,
    /// Number of tokens by which the chunks of a long text overlap (default: 32, or half of the model's token limit if
    /// that is less).
    #[serde(default)]
    pub stride: Option<usize>,
    /// text-classification with overflow: chunk: whether a text's scores are the mean of its chunks' scores, weighted by
    /// their numbers of tokens, or each label's highest one.
    #[serde(default)]
    pub chunk_scores: ChunkScores,
    /// reranking: JSON Pointer to the documents, an array of texts or of objects with `text` and optionally `id`. The
    /// query is `input.field`.
    #[serde(default)]
    pub documents: Option<String>,
    /// reranking: what a language model such as Qwen3-Reranker is told to judge documents by (default: the checkpoint's
    /// own instruction, or "Given a web search query, retrieve relevant passages that answer the query").
    #[serde(default)]
    pub instruction: Option<String>,
    /// zero-shot-classification: the labels, the same for every record. token-classification with a GLiNER model: the
    /// labels of the entities that it finds, such as person or phone number. tensor with as: classification: the names
    /// of the model's classes, in their order (default: those that the model names).
    #[serde(default)]
    pub labels: Vec<String>,
    /// token-classification with `labels`: the score that an entity must exceed (default: 0.5).
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub threshold: Option<f64>,
    /// token-classification with `labels`: whether an entity may be within another.
    #[serde(default)]
    pub nested: bool,
    /// token-classification: whether to publish the text with each entity replaced by its label in brackets, such as
    /// [PERSON], and the entities without their texts.
    #[serde(default)]
    pub redact: bool,
    /// zero-shot-classification: JSON Pointer to the record's own labels, an array of texts, used instead of `labels`.
    #[serde(default)]
    pub labels_field: Option<String>,
    /// zero-shot-classification: the hypothesis that the model judges for each label; {} is replaced by the label.
    #[serde(default = "default_hypothesis")]
    pub hypothesis: String,
    /// zero-shot-classification: whether more than one label may apply. If true, each label has an independent score;
    /// if false, the scores sum to 1. token-classification with `labels`: whether an entity may have several labels.
    #[serde(default)]
    pub multi_label: bool,
    /// similarity: file of candidates, read at the start: one JSON object per line with `id` and `text`, or their vectors,
    /// as a matrix in .npy or .safetensors.
    #[serde(default)]
    pub candidates: Option<PathBuf>,
    /// similarity with candidates that are vectors: file of their ids, one per line, or in the `id` of one JSON object
    /// per line if its name ends with .jsonl (default: the file's own ids, if it has them, or the rows' numbers from 0).
    #[serde(default)]
    pub candidates_ids: Option<PathBuf>,
    /// sparse-embedding: whether the prediction also has the texts of the tokens that `indices` name, as `tokens`.
    #[serde(default)]
    pub tokens: bool,
    /// text-embedding, sparse-embedding, similarity: text that is put before every record's text (default: the prompt that the model's
    /// config_sentence_transformers.json names as its default, if it does; "" for none).
    #[serde(default)]
    pub prompt: Option<String>,
    /// text-embedding, sparse-embedding, similarity: name of such a prompt in the model's
    /// config_sentence_transformers.json, used instead of `prompt`.
    #[serde(default)]
    pub prompt_name: Option<String>,
    /// similarity: like `prompt`, for the candidates.
    #[serde(default)]
    pub candidates_prompt: Option<String>,
    /// similarity: like `prompt_name`, for the candidates.
    #[serde(default)]
    pub candidates_prompt_name: Option<String>,
    /// text-embedding, image-embedding: number of values that are kept, the first ones, for models trained for it (Matryoshka). A vector
    /// of length 1 is scaled to length 1 again (default: all).
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub dimensions: Option<usize>,
    /// text-embedding, image-embedding: how a vector is written. float: an array of numbers. base64: a string with the values as
    /// little-endian f32. int8: an array of numbers from -128 to 127. ubinary: an array of bytes, one bit per value.
    #[serde(default)]
    pub encoding: Encoding,
    /// text-embedding and image-embedding with encoding: int8: JSON file with the lowest and the highest value of each place of a vector,
    /// [[lowest, …], [highest, …]] (default, for vectors of length 1: 4 over the square root of the number of values).
    #[serde(default)]
    pub ranges: Option<PathBuf>,
    /// tensor: where the values of the model's inputs come from, by the inputs' names: a JSON Pointer, a list of JSON
    /// Pointers to the columns of one input, or a constant (default: each input is the member of its name).
    #[serde(default)]
    pub inputs: BTreeMap<String, TensorInput>,
    /// tensor: the model's outputs that are published (default: all).
    #[serde(default)]
    pub outputs: Vec<String>,
    /// tensor: values used instead of null and of missing members, by JSON Pointer, or by input for all of its values
    /// (default: null is NaN in an input of floating-point numbers; anything else that is missing makes the record a
    /// dead letter).
    #[serde(default)]
    pub defaults: BTreeMap<String, serde_json::Value>,
    /// tensor: whether the outputs are published as they are, or as the label, score and scores of a classifier.
    #[serde(default, rename = "as")]
    pub form: TensorForm,
    /// tensor with as: classification: what makes scores of the model's values. none: they are scores. softmax: for the
    /// logits of classes that exclude each other. sigmoid: for independent logits, or one logit of two classes.
    #[serde(default)]
    pub activation: Activation,
    /// forecast: number of points to predict, the next ones after a series (default: as many as the model predicts in one
    /// pass; more take further passes, which are slower and less accurate).
    #[serde(default)]
    #[schemars(range(min = 1, max = 10_000))]
    pub horizon: Option<usize>,
    /// forecast: levels of the quantiles that are predicted, such as [0.1, 0.5, 0.9] (default: those of the model).
    #[serde(default)]
    #[schemars(example = [0.1, 0.5, 0.9])]
    pub quantiles: Vec<f64>,
    /// image-embedding: whether vectors are scaled to length 1, as CLIP and SigLIP do before they compare them with those of
    /// texts.
    #[serde(default)]
    pub normalize: bool,
    /// image-classification, image-embedding: pixels that an image may have, width times height. A larger one is a dead
    /// letter; its header says so, and it is not decoded.
    #[serde(default = "default_max_pixels")]
    #[schemars(range(min = 1))]
    pub max_pixels: u64,
    /// image-classification, image-embedding: bytes that the file of an image may have. A larger one is a dead letter.
    #[serde(default = "default_max_bytes")]
    pub max_bytes: ByteSize,
    /// Bytes for a cache of the model's answers, so that an input seen recently is not computed again (default: no
    /// cache). This memory is not part of memory.limit. Equal inputs within a window are computed once in any case.
    #[serde(default)]
    pub cache: Option<ByteSize>,
}

impl Task {
    /// A task of this kind with every other key at its default.
    pub fn of(kind: TaskKind) -> Self {
        Self {
            kind,
            top_k: None,
            overflow: None,
            aggregation: Aggregation::default(),
            stride: None,
            chunk_scores: ChunkScores::default(),
            documents: None,
            instruction: None,
            labels: Vec::new(),
            threshold: None,
            nested: false,
            redact: false,
            labels_field: None,
            hypothesis: default_hypothesis(),
            multi_label: false,
            candidates: None,
            candidates_ids: None,
            tokens: false,
            prompt: None,
            prompt_name: None,
            candidates_prompt: None,
            candidates_prompt_name: None,
            dimensions: None,
            encoding: Encoding::default(),
            ranges: None,
            inputs: BTreeMap::new(),
            outputs: Vec::new(),
            defaults: BTreeMap::new(),
            form: TensorForm::default(),
            activation: Activation::default(),
            horizon: None,
            quantiles: Vec::new(),
            normalize: false,
            max_pixels: default_max_pixels(),
            max_bytes: default_max_bytes(),
            cache: None,
        }
    }

    /// Keys whose values differ from the defaults, without `kind`.
    pub fn set_keys(&self) -> serde_json::Map<String, serde_json::Value> {
        let keys = |task: &Self| match serde_json::to_value(task) {
            Ok(serde_json::Value::Object(keys)) => keys,
            _ => serde_json::Map::new(),
        };
        let unset = keys(&Self::of(self.kind));
        keys(self).into_iter().filter(|(key, value)| unset.get(key) != Some(value)).collect()
    }
}

fn default_max_pixels() -> u64 {
    40_000_000
}

fn default_max_bytes() -> ByteSize {
    ByteSize::mib(32)
}

fn default_hypothesis() -> String {
    "This example is {}.".to_owned()
}

/// A task by its name in the table [`crate::task::KINDS`].
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
pub enum ChunkScores {
    #[default]
    Mean,
    Max,
}

/// Where the values of a model's input come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TensorInput {
    /// A JSON Pointer to a number, a text, a boolean or nested arrays of them.
    Pointer(String),
    /// JSON Pointers to the columns.
    Pointers(Vec<String>),
    /// A constant that is or has texts.
    Value { value: serde_json::Value },
    /// A constant: a number, a boolean, or arrays of them.
    Constant(serde_json::Value),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TensorForm {
    #[default]
    Tensor,
    Classification,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    #[default]
    None,
    Softmax,
    Sigmoid,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    #[default]
    Float,
    Base64,
    Int8,
    Ubinary,
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
    /// A hub id (`org/name`), a directory with config.json, weights (*.safetensors or pytorch_model.bin) and
    /// tokenizer.json or a vocabulary (of images: preprocessor_config.json, or timm's pretrained_cfg in config.json), or a
    /// model that is part of kandle: `bundled`, which routes support tickets, `bundled:churn` (ONNX), `bundled:shapes`
    /// (images). For the task tensor: an ONNX file, or a directory or hub id with model.onnx or one *.onnx.
    pub source: Option<String>,
    /// Hub: branch, tag or commit (default: main). It is resolved to a commit each time the model is loaded.
    pub revision: Option<String>,
    /// Hub: the cache directory (default: $HF_HOME/hub or ~/.cache/huggingface/hub).
    pub cache: Option<PathBuf>,
    /// Hub: access token (default: $HF_TOKEN or the cache's token file).
    pub token: Option<String>,
    /// Hub: use only the cache, never the network ($HF_HUB_OFFLINE=1 does the same).
    pub offline: bool,
    /// The digest that the model must have (`kandle model verify` prints it), or at least its first 16 digits; with any
    /// other, nothing starts. The digest covers the model's files and the settings that change a prediction.
    pub digest: Option<String>,
    /// Where the model runs: auto, cpu, cuda, cuda:N or metal. auto takes the best device of this build and machine.
    pub device: DeviceChoice,
    /// Precision: auto (f32 on a CPU, bf16 on CUDA, f16 on Metal), f32, bf16 (faster than f32 on a CPU with AMX or Arm
    /// BF16), f16 (not on a CPU) or int8 (only on a CPU: quantized multiplications).
    pub dtype: Dtype,
    /// What to do if the group's last commit was made with another model.
    pub on_change: OnChange,
    /// run: interval at which `source` is looked at again. Another version of the model is loaded while the one that runs
    /// goes on, and takes over between two windows. One that cannot be loaded or fails its first forward is not used
    /// (default: never).
    #[schemars(example = "5m")]
    pub refresh: Option<Wait>,
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
    /// Maximum tokens of one forward pass, halved while the device is out of memory. A CPU core takes 256 of them at a
    /// time and a GPU all, unless `kandle bench calibrate` has stored a better number for the model and device.
    #[schemars(range(min = 1))]
    pub max_tokens: usize,
    /// CPU: number of cores that run batches, one batch per core at a time (default: all cores that the process may
    /// use). A GPU always has two lanes: one batch runs while the next is queued.
    #[schemars(range(min = 1))]
    pub lanes: Option<usize>,
    /// Timeout of one forward pass. If it is exceeded, the process exits; after the restart, the records of that pass
    /// run one by one, and the record at fault becomes a dead letter.
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
    /// How predictions are written: json, or avro, protobuf or json_schema with a schema that is in the registry and is
    /// made from the task and `include`.
    #[serde(default)]
    pub format: OutputFormat,
    /// avro, protobuf, json_schema: the subject of the predictions' schema. topic: the topic with -value. record: the
    /// schema's name, such as kandle.TextClassification. topic_record: the topic, - and that name.
    #[serde(default)]
    pub subject: SubjectName,
    /// JSON Pointers to values that are copied from the input into the prediction, each under its pointer's last name.
    #[serde(default)]
    pub include: Vec<String>,
    /// Partition of a prediction: by the murmur2 hash of the key, as Java clients do, or the input partition's number.
    /// A record without a key always keeps its input partition's number (modulo the output topic's partition count).
    #[serde(default)]
    pub partition: Partitioning,
    /// Timestamp of a prediction: that of its record, or the time of publishing. Retention goes by this timestamp.
    #[serde(default)]
    pub timestamp: OutputTimestamp,
    /// librdkafka properties for the producer only.
    #[serde(default)]
    pub properties: Properties,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputFormat {
    #[default]
    Json,
    Avro,
    Protobuf,
    JsonSchema,
}

/// How the registry's subject is named, as Confluent's TopicNameStrategy, RecordNameStrategy and
/// TopicRecordNameStrategy do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SubjectName {
    #[default]
    Topic,
    Record,
    TopicRecord,
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

    /// The timestamp of what is published for a record with this timestamp; `None`: the time of publishing.
    pub fn of(self, record: Option<i64>) -> Option<i64> {
        record.filter(|_| !self.is_now())
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeadLetters {
    /// The topic of the dead letters.
    #[schemars(example = "tickets-dead")]
    pub topic: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Samples {
    /// The topic of the samples: `{"input": …, "prediction": …}` in JSON, with the record's key and timestamp (default: no
    /// samples are published). An input that is no JSON is a string: a text itself, other bytes in base64.
    #[schemars(example = "tickets-samples")]
    pub topic: Option<String>,
    /// The share of records that are chosen, by a hash of their keys, or of their positions if they have none: the same
    /// records in every replay.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub share: f64,
    /// JSON Pointers to values of the input that are null in a sample, also where output.include copies them.
    pub redact: Vec<String>,
}

impl Default for Samples {
    fn default() -> Self {
        Self { topic: None, share: 0.001, redact: Vec::new() }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Drift {
    /// File that `kandle reference` has written: the distributions of predictions that were good. kandle_drift is how far
    /// the latest predictions are from them (default: nothing is compared).
    pub reference: Option<PathBuf>,
    /// Number of the latest predictions that are compared.
    #[schemars(range(min = 200, max = 100_000_000))]
    pub window: usize,
    /// The population stability index (psi) above which predictions have drifted: kandle logs it, and the alert
    /// KandlePredictionDrift fires.
    #[schemars(range(min = 0.0))]
    pub threshold: f64,
}

impl Default for Drift {
    fn default() -> Self {
        Self { reference: None, window: 10_000, threshold: 0.2 }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Base address of a schema registry with Confluent's API, or a list of addresses, which are tried in turn.
    pub url: Urls,
    /// Name for basic authentication.
    pub username: Option<String>,
    /// Password for basic authentication.
    pub password: Option<String>,
    /// Bearer token, used instead of a name and a password.
    pub token: Option<String>,
    /// PEM file, or its text, with the certificate authorities to trust instead of the web's.
    pub ca: Option<String>,
    /// PEM file, or its text, with the certificate that kandle shows to the registry, and its chain.
    pub cert: Option<String>,
    /// PEM file, or its text, with the private key of `cert`.
    pub key: Option<String>,
    /// Timeout of one request.
    pub timeout: Wait,
    /// Whether kandle may register a schema that a subject does not have yet.
    pub auto_register: bool,
    /// How long a schema id may be unknown to the registry, which may learn of it late, until records with this id
    /// become dead letters.
    pub unknown_id_grace: Wait,
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            url: Urls::default(),
            username: None,
            password: None,
            token: None,
            ca: None,
            cert: None,
            key: None,
            timeout: Wait::millis(10_000),
            auto_register: true,
            unknown_id_grace: Wait::millis(30_000),
        }
    }
}

/// One address or several; empty if none is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "units::OneOrMany", into = "units::OneOrMany")]
pub struct Urls(pub Vec<String>);

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Delivery {
    /// at_least_once: an offset is committed only when every prediction and dead letter before it is acknowledged;
    /// after a crash some are published again. exactly_once: predictions, dead letters and offsets are committed in one
    /// transaction; readers set isolation.level=read_committed.
    pub guarantee: Guarantee,
    /// How often offsets are committed; exactly_once: how long windows share a transaction.
    pub commit_interval: Wait,
    /// When partitions are revoked: how long windows in flight may take to finish.
    pub revoke_timeout: Wait,
    /// exactly_once: the transactional.id, which no other member may use. Default: the group with group.instance.id, or
    /// else with the host name and a number that no other kandle on this host uses.
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
    /// Bytes in flight: a quarter for records that librdkafka prefetches, a quarter for records that wait for the
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
    /// Address of the admin server. Port 0 takes a free port, which is logged.
    pub listen: String,
    /// /livez fails when a stage has worked on one window for longer than this.
    pub stall_after: Wait,
    /// PEM file with the admin server's certificate and its chain: it then speaks HTTPS only. A changed file is read
    /// without a restart.
    pub cert: Option<PathBuf>,
    /// PEM file with the private key of `cert`.
    pub key: Option<PathBuf>,
    /// Bearer token that /metrics and /status ask for. /livez and /readyz need none. A changed ${file:/path} is read
    /// without a restart.
    pub token: Option<String>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: "0.0.0.0:9464".to_owned(),
            stall_after: Wait::millis(300_000),
            cert: None,
            key: None,
            token: None,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// text or json.
    pub format: LogFormat,
    /// error, warn, info, debug or trace.
    pub level: LogLevel,
    /// How often a drain logs its progress. On a terminal, a progress bar is shown instead.
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
    /// Periods in which `run` consumes (default: always). Periods may overlap.
    pub periods: Vec<Period>,
    /// The time zone of `periods` and `finish_by`, by its IANA name.
    #[schemars(example = "Europe/Berlin")]
    pub timezone: String,
    /// Outside of all periods: stay in the group with partitions paused, or leave the group.
    pub outside: Outside,
    /// With outside: leave, also unload the model outside of all periods, which frees its memory and the GPU. It is
    /// loaded again before the next period starts.
    pub unload_model: bool,
    /// Time of day, HH:MM, by which a backlog must be done. kandle warns ahead of time if it will not be.
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

/// A recurring period in which records are consumed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Period {
    /// Start of the period, as a cron expression: minute, hour, day of the month, month, day of the week.
    #[schemars(example = "0 22 * * MON-FRI")]
    pub cron: String,
    /// Length of the period, in elapsed time: clocks that go forward or back meanwhile do not change it.
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
    /// OTLP/HTTP endpoint that spans are sent to, without /v1/traces (default: no spans are sent).
    #[schemars(example = "http://localhost:4318")]
    pub endpoint: Option<String>,
    /// The service.name of the spans.
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
    /// Cost of one hour of this machine, in any currency; a drain's report computes its cost from it.
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

/// The JSON Schema of [`Settings`], with all references inlined.
pub fn schema() -> serde_json::Value {
    let mut generator = schemars::generate::SchemaSettings::draft2020_12()
        .with(|s| s.inline_subschemas = true)
        .into_generator();
    let mut schema = generator.root_schema_for::<Settings>().to_value();
    schema["title"] = "kandle".into();
    schema
}
