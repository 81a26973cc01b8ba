//! Every metric, in one table: name, kind, labels, help. Tests compare documentation and code with it.

use prometheus::{
    Counter, CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGaugeVec, Opts, Registry,
};

/// What a metric is; histograms carry their buckets.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram(&'static [f64]),
}

/// Name, kind, labels, help.
pub type Row = (&'static str, Kind, &'static [&'static str], &'static str);

const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
const AGES: &[f64] =
    &[0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 43200.0, 259_200.0];
const COUNTS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0];
const UNITS: &[f64] = &[
    1.0,
    4.0,
    8.0,
    16.0,
    32.0,
    64.0,
    128.0,
    256.0,
    512.0,
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    16_777_216.0,
];
const SHARES: &[f64] = &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999];
const NORMS: &[f64] =
    &[0.01, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0];
const TOKENS: &[f64] =
    &[16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0];

use Kind::{Counter as C, Gauge as G, Histogram as H};

#[rustfmt::skip]
pub const TABLE: &[Row] = &[
    ("kandle_records_total", C, &["topic", "outcome"], "Records whose outcome Kafka has acknowledged, by input topic: predicted, dead_lettered or tombstone."),
    ("kandle_dead_letters_total", C, &["error"], "Acknowledged dead letters, by error."),
    ("kandle_record_latency_seconds", H(SECONDS), &[], "Time from a record's arrival in kandle to the acknowledgement of its window."),
    ("kandle_record_age_seconds", H(AGES), &[], "Time from a record's own timestamp to the acknowledgement of its window."),
    ("kandle_stage_seconds", H(SECONDS), &["stage"], "Time that a window spends in a stage, or waiting for one (stage wait_*). Stage decode_image: images are decoded and resized."),
    ("kandle_windows_total", C, &["closed_by"], "Windows, by what closed them: records, bytes, wait, idle, memory, work (the limits of `window`), end (of a drain), stop."),
    ("kandle_window_records", H(COUNTS), &[], "Records in a window."),
    ("kandle_batch_records", H(COUNTS), &[], "Inputs in a batch; a record may have several."),
    ("kandle_batch_tokens", H(TOKENS), &[], "Work in a batch: tokens of texts, patches of images, elements of tensors."),
    ("kandle_tokens_total", C, &[], "Tokens of all texts for the model, including those whose answer was reused."),
    ("kandle_input_units_total", C, &["unit"], "Size of all inputs for the model, including those whose answer was reused: tokens of texts, pixels of images, elements of tensors, points of series."),
    ("kandle_record_units", H(UNITS), &["unit"], "Size of each record's inputs for the model, in the units of kandle_input_units_total."),
    ("kandle_unknown_tokens_total", C, &[], "Tokens of texts that stand for what the model's vocabulary lacks; part of kandle_tokens_total."),
    ("kandle_reused_predictions_total", C, &["from"], "Inputs not computed because their answer was reused: from an equal input in the same window (window), or from task.cache (cache)."),
    ("kandle_truncated_records_total", C, &[], "Records truncated to the model's maximum number of tokens."),
    ("kandle_predictions_total", C, &["label"], "Published predictions by label: of a classification its best label, of a token classification the label of each entity. At most 100 labels, the rest as other."),
    ("kandle_prediction_score", H(SHARES), &[], "Score of each published prediction: of its best label or result, or of each entity."),
    ("kandle_prediction_entropy", H(SHARES), &[], "Entropy of each published classification whose scores are of all labels and sum to 1, as a part of the largest possible one: 0 if one label has everything, 1 if all have the same."),
    ("kandle_records_without_entities_total", C, &[], "Published token classifications without any entity."),
    ("kandle_embedding_norm", H(NORMS), &[], "Length of each vector that an embedding model returned, before it is scaled to length 1."),
    ("kandle_drift", G, &["of", "measure"], "Distance of the latest published predictions from drift.reference: of label, score, entropy or entities (entities per record), as population stability index (psi) or Jensen-Shannon distance with base 2 (js)."),
    ("kandle_drift_threshold", G, &[], "The setting drift.threshold, for the psi of kandle_drift; +Inf without drift.reference."),
    ("kandle_samples_total", C, &["outcome"], "Samples for samples.topic: published, too_large (left out: more than the topic's max.message.bytes), refused (left out: by the topic's or the broker's rules)."),
    ("kandle_skipped_records_total", C, &["topic", "cause"], "Offsets skipped because they could not be read: deleted by retention (retention), or in a batch that fails its checksum (damaged)."),
    ("kandle_topic_recreated_total", C, &["topic"], "Partitions read from their start again because their topic was deleted and recreated."),
    ("kandle_device_busy_seconds_total", C, &["device"], "Time that the device was computing; on a CPU, the mean over its lanes."),
    ("kandle_lag_records", G, &["topic", "partition"], "Records in the partition after the last published one."),
    ("kandle_lag_seconds", G, &["topic", "partition"], "Age of the oldest record that is not published yet; 0 if there is none."),
    ("kandle_drain_remaining_seconds", G, &[], "Estimated time to publish the backlog at the current rate; +Inf if there is a backlog but no progress."),
    ("kandle_deadline_seconds", G, &[], "Time left until schedule.finish_by, negative once a drain is past it; +Inf if it is not set, or outside schedule.periods."),
    ("kandle_schedule_open", G, &[], "1 while the schedule allows consuming, 0 outside schedule.periods."),
    ("kandle_input_wait_seconds_total", C, &[], "Time with no records in flight, spent waiting for records from Kafka."),
    ("kandle_memory_bytes", G, &["kind"], "Bytes held: fetched by the consumer but not read yet (prefetched), in windows that are not published yet, the open one included (windows), predictions waiting for acknowledgement (predictions), task.cache (cache), records waiting for the shadow (shadow)."),
    ("kandle_memory_limit_bytes", G, &[], "The setting memory.limit."),
    ("kandle_retries_total", C, &["cause"], "Operations retried: commit, produce, refused (a batch that the broker refused), registry (fetching schemas while it is away), topics (looking them up), transaction."),
    ("kandle_rebalances_total", C, &["cause"], "Changes of the assignment: assigned, revoked, lost."),
    ("kandle_oom_splits_total", C, &["cause"], "Batches that did not fit the device's memory: several inputs are halved (batch), a single one is retried alone (item)."),
    ("kandle_bisections_total", C, &[], "Failed batches halved to find the record at fault."),
    ("kandle_shadow_records_total", C, &["outcome"], "Records chosen for the shadow model: with an acknowledged prediction (predicted) or tombstone (tombstone), not seen because the shadow could not keep up or was not loaded yet (skipped), or without a prediction because the shadow failed (failed)."),
    ("kandle_shadow_agreement", G, &["measure"], "How much the shadow model agrees with the model: the mean of a measure of `kandle compare` over the last 1000 records that both predicted."),
    ("kandle_model_info", G, &["model", "digest", "task", "device", "dtype"], "Always 1; the labels name the model, its task and its device."),
    ("kandle_model_refreshes_total", C, &["outcome"], "Looks of model.refresh for another version of the model: unchanged, replaced (it took over), failed (it could not be found out, loaded or used, and the version before runs on)."),
    ("kandle_build_info", G, &["version"], "Always 1; the label is the version of kandle."),
];

/// All metrics, registered.
pub struct Metrics {
    registry: Registry,
    pub records: IntCounterVec,
    pub dead_letters: IntCounterVec,
    pub record_latency: Histogram,
    pub record_age: Histogram,
    pub stage: HistogramVec,
    pub windows: IntCounterVec,
    pub window_records: Histogram,
    pub batch_records: Histogram,
    pub batch_tokens: Histogram,
    pub tokens: IntCounter,
    pub input_units: IntCounterVec,
    pub record_units: HistogramVec,
    pub unknown_tokens: IntCounter,
    pub reused: IntCounterVec,
    pub truncated: IntCounter,
    pub predictions: IntCounterVec,
    pub prediction_score: Histogram,
    pub prediction_entropy: Histogram,
    pub without_entities: IntCounter,
    pub embedding_norm: Histogram,
    pub drift: GaugeVec,
    pub drift_threshold: Gauge,
    pub samples: IntCounterVec,
    pub skipped: IntCounterVec,
    pub topic_recreated: IntCounterVec,
    pub device_busy: CounterVec,
    pub lag_records: IntGaugeVec,
    pub lag_seconds: GaugeVec,
    pub drain_remaining: Gauge,
    pub deadline: Gauge,
    pub schedule_open: Gauge,
    pub input_wait: Counter,
    pub memory: IntGaugeVec,
    pub memory_limit: Gauge,
    pub retries: IntCounterVec,
    pub rebalances: IntCounterVec,
    pub oom_splits: IntCounterVec,
    pub bisections: IntCounter,
    pub shadow_records: IntCounterVec,
    pub shadow_agreement: GaugeVec,
    pub model_info: IntGaugeVec,
    pub model_refreshes: IntCounterVec,
}

/// Makes and registers one metric of the table.
fn register<M: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    name: &str,
    make: impl FnOnce(Opts, &'static [f64], &[&str]) -> prometheus::Result<M>,
) -> M {
    let (_, kind, labels, help) = TABLE
        .iter()
        .find(|(known, ..)| *known == name)
        .unwrap_or_else(|| panic!("{name} is not in the table"));
    let buckets = if let Kind::Histogram(buckets) = kind { buckets } else { &[][..] };
    let metric =
        make(Opts::new(name, *help), buckets, labels).expect("names and labels of the table are legal");
    registry.register(Box::new(metric.clone())).expect("a name is registered once");
    metric
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        let counters = |name: &str| register(r, name, |o, _, l| IntCounterVec::new(o, l));
        let counter = |name: &str| register(r, name, |o, _, _| IntCounter::with_opts(o));
        let gauges = |name: &str| register(r, name, |o, _, l| IntGaugeVec::new(o, l));
        let gauge = |name: &str| register(r, name, |o, _, _| Gauge::with_opts(o));
        let histogram = |name: &str| {
            register(r, name, |o, b, _| Histogram::with_opts(HistogramOpts::from(o).buckets(b.to_vec())))
        };
        let metrics = Self {
            records: counters("kandle_records_total"),
            dead_letters: counters("kandle_dead_letters_total"),
            record_latency: histogram("kandle_record_latency_seconds"),
            record_age: histogram("kandle_record_age_seconds"),
            stage: register(r, "kandle_stage_seconds", |o, b, l| {
                HistogramVec::new(HistogramOpts::from(o).buckets(b.to_vec()), l)
            }),
            windows: counters("kandle_windows_total"),
            window_records: histogram("kandle_window_records"),
            batch_records: histogram("kandle_batch_records"),
            batch_tokens: histogram("kandle_batch_tokens"),
            tokens: counter("kandle_tokens_total"),
            input_units: counters("kandle_input_units_total"),
            record_units: register(r, "kandle_record_units", |o, b, l| {
                HistogramVec::new(HistogramOpts::from(o).buckets(b.to_vec()), l)
            }),
            unknown_tokens: counter("kandle_unknown_tokens_total"),
            reused: counters("kandle_reused_predictions_total"),
            truncated: counter("kandle_truncated_records_total"),
            predictions: counters("kandle_predictions_total"),
            prediction_score: histogram("kandle_prediction_score"),
            prediction_entropy: histogram("kandle_prediction_entropy"),
            without_entities: counter("kandle_records_without_entities_total"),
            embedding_norm: histogram("kandle_embedding_norm"),
            drift: register(r, "kandle_drift", |o, _, l| GaugeVec::new(o, l)),
            drift_threshold: gauge("kandle_drift_threshold"),
            samples: counters("kandle_samples_total"),
            skipped: counters("kandle_skipped_records_total"),
            topic_recreated: counters("kandle_topic_recreated_total"),
            device_busy: register(r, "kandle_device_busy_seconds_total", |o, _, l| CounterVec::new(o, l)),
            lag_records: gauges("kandle_lag_records"),
            lag_seconds: register(r, "kandle_lag_seconds", |o, _, l| GaugeVec::new(o, l)),
            drain_remaining: gauge("kandle_drain_remaining_seconds"),
            deadline: gauge("kandle_deadline_seconds"),
            schedule_open: gauge("kandle_schedule_open"),
            input_wait: register(r, "kandle_input_wait_seconds_total", |o, _, _| Counter::with_opts(o)),
            memory: gauges("kandle_memory_bytes"),
            memory_limit: gauge("kandle_memory_limit_bytes"),
            retries: counters("kandle_retries_total"),
            rebalances: counters("kandle_rebalances_total"),
            oom_splits: counters("kandle_oom_splits_total"),
            bisections: counter("kandle_bisections_total"),
            shadow_records: counters("kandle_shadow_records_total"),
            shadow_agreement: register(r, "kandle_shadow_agreement", |o, _, l| GaugeVec::new(o, l)),
            model_info: gauges("kandle_model_info"),
            model_refreshes: counters("kandle_model_refreshes_total"),
            registry,
        };
        register(&metrics.registry, "kandle_build_info", |o, _, l| IntGaugeVec::new(o, l))
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        // process_*: memory, CPU, open files and start time of the process.
        #[cfg(target_os = "linux")]
        {
            let process = prometheus::process_collector::ProcessCollector::for_self();
            metrics.registry.register(Box::new(process)).expect("a name is registered once");
        }
        metrics.start_at_zero();
        metrics
    }

    /// Creates known label values at zero, so that the rate of a counter includes its first increment.
    fn start_at_zero(&self) {
        for fault in crate::record::Fault::ALL {
            self.dead_letters.with_label_values(&[fault.name()]);
        }
        for closed_by in crate::window::ClosedBy::ALL {
            self.windows.with_label_values(&[closed_by.name()]);
        }
        for kind in ["prefetched", "windows", "predictions"] {
            self.memory.with_label_values(&[kind]);
        }
        for from in ["window", "cache"] {
            self.reused.with_label_values(&[from]);
        }
        for cause in ["assigned", "revoked", "lost"] {
            self.rebalances.with_label_values(&[cause]);
        }
        for cause in ["commit", "produce", "refused", "registry", "topics", "transaction"] {
            self.retries.with_label_values(&[cause]);
        }
        for outcome in ["published", "too_large", "refused"] {
            self.samples.with_label_values(&[outcome]);
        }
        self.drift_threshold.set(f64::INFINITY);
        self.deadline.set(f64::INFINITY);
        self.schedule_open.set(1.0);
        for outcome in crate::refresh::Outcome::ALL {
            self.model_refreshes.with_label_values(&[outcome.name()]);
        }
        for cause in ["batch", "item"] {
            self.oom_splits.with_label_values(&[cause]);
        }
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn text(&self) -> String {
        prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }

    /// OpenMetrics 1.0.
    pub fn openmetrics(&self) -> String {
        super::openmetrics::encode(&self.registry.gather())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_table_is_registered() {
        let metrics = Metrics::new();
        // Metrics without a known label value are not exported until they have one.
        metrics.records.with_label_values(&["t", "predicted"]);
        metrics.skipped.with_label_values(&["t", "retention"]);
        metrics.topic_recreated.with_label_values(&["t"]);
        metrics.stage.with_label_values(&["decode"]);
        metrics.input_units.with_label_values(&["tokens"]);
        metrics.record_units.with_label_values(&["tokens"]);
        metrics.predictions.with_label_values(&["a"]);
        metrics.drift.with_label_values(&["label", "psi"]);
        metrics.device_busy.with_label_values(&["cpu"]);
        metrics.lag_records.with_label_values(&["t", "0"]);
        metrics.lag_seconds.with_label_values(&["t", "0"]);
        metrics.shadow_records.with_label_values(&["predicted"]);
        metrics.shadow_agreement.with_label_values(&["label_equal"]);
        metrics.model_info.with_label_values(&["m", "d", "t", "cpu", "f32"]);
        let text = metrics.text();
        for (name, ..) in TABLE {
            assert!(text.contains(&format!("# TYPE {name} ")), "{name} is in the table but not registered");
        }
        assert_eq!(text.matches("# TYPE kandle_").count(), TABLE.len());
    }
}
