//! `bench engine`: the stages prepare and infer of the pipeline over a file of texts, as `run` has
//! them: windows of texts are tokenised on all cores while the window before is on the lanes.

use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use candle_core::Tensor;
use clap::Args;
use crossbeam_channel::bounded;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::cli::output::outln;
use crate::engine::Request;
use crate::model::{Placement, Tokens};
use crate::task::{Task, TextTask};
use crate::telemetry::Metrics;

#[derive(Args)]
pub struct Options {
    /// A directory with config.json, tokenizer.json and *.safetensors, a hub id, or `bundled`
    #[arg(long)]
    model: String,
    /// Texts: one JSON object a line, with `text`
    #[arg(long)]
    input: PathBuf,
    /// Cores to use (all that the process may use where unset)
    #[arg(long)]
    threads: Option<usize>,
    /// auto, cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "auto")]
    device: String,
    /// auto, f32, bf16, f16 or int8
    #[arg(long, default_value = "auto")]
    dtype: String,
    /// Texts in a window
    #[arg(long, default_value_t = 1024)]
    window: usize,
    /// Times that the file is gone through; the fastest counts
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Where the embeddings go: one JSON object a line, with `embedding`
    #[arg(long)]
    output: Option<PathBuf>,
    /// One setting more, as for `run`
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// The result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct Line {
    text: String,
}

#[derive(Serialize)]
struct Report {
    records: usize,
    tokens: u64,
    seconds: f64,
    records_per_second: f64,
    tokens_per_second: f64,
    /// Of all positions computed, those that no text has.
    padding_ratio: f64,
    peak_rss_bytes: u64,
    dtype: String,
    device: String,
    threads: usize,
    /// Batches that were halved because the device was out of memory.
    oom_splits: u64,
    /// Of the model's multiplications, a second, as if no two texts were the same.
    operations_per_second: f64,
    /// What the device reaches in large multiplications in the model's precision, where it is not a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_operations_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_share: Option<f64>,
}

/// A window between tokenising and the lanes.
type Window = Vec<Option<Tokens>>;

pub fn bench(options: &Options) -> anyhow::Result<()> {
    let mut set = vec![
        // What a job needs and a measurement does not.
        "kafka.brokers=none:1".to_owned(),
        "input.topics=none".to_owned(),
        "input.group=none".to_owned(),
        "input.format=text".to_owned(),
        "output.topic=predictions".to_owned(),
        "dead_letters.topic=dead".to_owned(),
        "task.kind=text-embedding".to_owned(),
        format!("model.source={}", options.model),
        format!("model.device={}", options.device),
        format!("model.dtype={}", options.dtype),
    ];
    if let Some(threads) = options.threads {
        set.push(format!("batch.lanes={threads}"));
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    set.extend(options.set.iter().cloned());
    let settings = super::settings(set)?;
    let file = std::fs::File::open(&options.input).with_context(|| options.input.display().to_string())?;
    let texts = BufReader::new(file)
        .lines()
        .map(|line| anyhow::Ok(serde_json::from_str::<Line>(&line?)?.text))
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| options.input.display().to_string())?;
    let metrics = Arc::new(Metrics::new());
    let task = Task::load(&settings, &metrics)?;
    let text = task.text.as_ref().context("the task reads texts")?;

    let (mut seconds, mut tokens, mut rows, mut operations) = (f64::INFINITY, 0, Vec::new(), 0);
    for _ in 0..options.rounds {
        let before = metrics.tokens.get();
        let started = Instant::now();
        (rows, operations) = run(text, &texts, options.window, &metrics)?;
        seconds = seconds.min(started.elapsed().as_secs_f64());
        tokens = metrics.tokens.get() - before;
    }
    if let Some(path) = &options.output {
        let mut out = BufWriter::new(std::fs::File::create(path)?);
        let mut line = Vec::new();
        for row in rows.chunks(text.model.width()) {
            line.clear();
            text.write(row, "", &mut line).map_err(|e| anyhow::anyhow!(e.message))?;
            line.push(b'\n');
            out.write_all(&line)?;
        }
        out.flush()?;
    }
    let placement = &text.model.placement;
    let peak = match placement.is_cpu() {
        true => None,
        false => Some(peak(placement)?),
    };
    let padding = &metrics.batch_padding;
    let report = Report {
        records: texts.len(),
        tokens,
        seconds,
        records_per_second: texts.len() as f64 / seconds,
        tokens_per_second: tokens as f64 / seconds,
        padding_ratio: padding.get_sample_sum() / padding.get_sample_count() as f64,
        peak_rss_bytes: super::super::drain::peak_rss().context("/proc/self/status")?,
        dtype: task.dtype.clone(),
        device: task.device.clone(),
        threads: text.engine.lanes(),
        oom_splits: metrics.oom_splits.with_label_values(&["forward"]).get(),
        operations_per_second: operations as f64 / seconds,
        peak_operations_per_second: peak,
        peak_share: peak.map(|peak| operations as f64 / seconds / peak),
    };
    if options.json {
        outln!("{}", super::super::pretty(&serde_json::to_value(&report)?));
    } else {
        outln!(
            "{} records, {} tokens in {:.2} s: {:.0} records/s, {:.0} tokens/s ({} on {}, {} lanes, {} MiB at most)",
            report.records,
            report.tokens,
            report.seconds,
            report.records_per_second,
            report.tokens_per_second,
            report.dtype,
            report.device,
            report.threads,
            report.peak_rss_bytes >> 20,
        );
    }
    Ok(())
}

/// Operations a second of a square multiplication, the best of some.
fn peak(placement: &Placement) -> candle_core::Result<f64> {
    const SIZE: usize = 8192;
    let device = &placement.device;
    let matrix = Tensor::rand(-1f32, 1f32, (SIZE, SIZE), device)?.to_dtype(placement.dtype)?;
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        device.synchronize()?;
        let started = Instant::now();
        let product = matrix.matmul(&matrix)?;
        device.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64());
        drop(product);
    }
    Ok(2.0 * (SIZE as f64).powi(3) / best)
}

/// `[texts, width]`, and the operations that the texts are for the model.
fn run(
    task: &TextTask,
    texts: &[String],
    window: usize,
    metrics: &Metrics,
) -> anyhow::Result<(Vec<f32>, u64)> {
    let (prepared, windows) = bounded::<Window>(1);
    let mut rows = Vec::with_capacity(texts.len() * task.model.width());
    let (mut failed, mut operations) = (None, 0);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for texts in texts.chunks(window) {
                let tokens = texts.par_iter().with_min_len(8).map(|text| task.prepare(text).ok()).collect();
                if prepared.send(tokens).is_err() {
                    return;
                }
            }
        });
        let open = |tokens: Window| {
            let total = tokens.iter().flatten().map(|t| t.ids.len()).sum::<usize>();
            metrics.tokens.inc_by(total as u64);
            let of = |tokens: &Tokens| task.model.architecture().operations(tokens.ids.len());
            let operations: u64 = tokens.iter().flatten().map(of).sum();
            let plan = task.engine.plan(&tokens, |_| false);
            Request { window: (tokens.iter().position(Option::is_none), operations), tokens, plan }
        };
        let served = task.engine.serve(
            &windows,
            open,
            |response| {
                let (unread, of_window) = response.window;
                operations += of_window;
                failed = failed.or(unread).or(response.failed.first().map(|(i, _)| *i as usize));
                rows.extend(response.rows);
                failed.is_none()
            },
            |_| {},
        );
        // After a failure the other thread may wait for room.
        drop(windows);
        served
    })
    .map_err(|e| anyhow::anyhow!("{e}"))?;
    match failed {
        None => Ok((rows, operations)),
        Some(line) => bail!("text {line} of a window has no embedding"),
    }
}
