//! `bench engine`: runs the pipeline's stages prepare and infer over a file of texts. As in `run`, one window of texts
//! is tokenised on all cores while the previous window is on the lanes.

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
use crate::engine::{Answers, Engine, Request, Response};
use crate::flow::Queued;
use crate::model::{Model, Output, Placement, Tokens};
use crate::task::embedding::Embed;
use crate::task::text::{Chunk, PredictText, TextModel, Texts};
use crate::telemetry::Metrics;

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    model: super::ModelOptions,
    /// File of texts: one JSON object per line, with `text`
    #[arg(long)]
    input: PathBuf,
    /// Texts per window
    #[arg(long, default_value_t = 1024)]
    window: usize,
    /// Number of passes over the file; the fastest counts
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Write the embeddings to this file: one JSON object per line, with `embedding`
    #[arg(long)]
    output: Option<PathBuf>,
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
    peak_rss_bytes: u64,
    dtype: String,
    device: String,
    threads: usize,
    /// Batches that were halved because the device was out of memory.
    oom_splits: u64,
    /// Operations of the model's multiplications per second, two per multiply-add, counted as if all texts differed.
    operations_per_second: f64,
    /// Operations per second of a large multiplication in the model's precision on this device; `None` on a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_operations_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_share: Option<f64>,
}

pub fn bench(options: &Options) -> anyhow::Result<()> {
    let settings = options.model.settings("text", "text-embedding")?;
    let file = std::fs::File::open(&options.input).with_context(|| options.input.display().to_string())?;
    let texts = BufReader::new(file)
        .lines()
        .map(|line| anyhow::Ok(serde_json::from_str::<Line>(&line?)?.text))
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| options.input.display().to_string())?;
    let metrics = Arc::new(Metrics::new());
    let TextModel { about, texts: model, engine, .. } =
        TextModel::load(&settings, Output::Embedding, &metrics)?;

    let (mut seconds, mut done) = (f64::INFINITY, Done::default());
    for _ in 0..options.rounds {
        let started = Instant::now();
        done = run(&model, &engine, &texts, options.window)?;
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    let Done { answers, tokens, operations } = done;
    let placement = &model.model.placement;
    if let Some(path) = &options.output {
        let mut out = BufWriter::new(std::fs::File::create(path)?);
        let mut line = Vec::new();
        let embed = Embed::of_texts(&model.model, &settings.task)?;
        for row in answers.iter().flat_map(|answers| (0..answers.len()).map(|i| answers.row(i))) {
            line.clear();
            embed.write(&[Chunk::whole(row)], &mut line).map_err(|e| anyhow::anyhow!(e.message))?;
            line.push(b'\n');
            out.write_all(&line)?;
        }
        out.flush()?;
    }
    let peak = match placement.is_cpu() {
        true => None,
        false => Some(peak(placement)?),
    };
    let report = Report {
        records: texts.len(),
        tokens,
        seconds,
        records_per_second: texts.len() as f64 / seconds,
        tokens_per_second: tokens as f64 / seconds,
        peak_rss_bytes: super::super::drain::peak_rss().context("/proc/self/status")?,
        dtype: about.dtype,
        device: about.device,
        threads: engine.lanes(),
        oom_splits: ["batch", "item"]
            .iter()
            .map(|cause| metrics.oom_splits.with_label_values(&[cause]).get())
            .sum(),
        operations_per_second: operations as f64 / seconds,
        peak_operations_per_second: peak,
        peak_share: peak.map(|peak| operations as f64 / seconds / peak),
    };
    if options.model.json {
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

/// Operations per second of a square matrix multiplication, the best of 20.
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

/// Result of one round.
#[derive(Default)]
struct Done {
    /// The answers of each window.
    answers: Vec<Answers<f32>>,
    tokens: u64,
    /// Operations that the model needs for the texts.
    operations: u64,
}

fn run(model: &Texts, engine: &Engine<Model>, texts: &[String], window: usize) -> anyhow::Result<Done> {
    let mut done = Done::default();
    let (to_infer, requests) = bounded(1);
    let (to_collect, responses) = bounded::<Queued<Response<(u64, u64), f32>>>(1);
    std::thread::scope(|scope| {
        let prepare = scope.spawn(move || {
            for (id, texts) in (0..).zip(texts.chunks(window)) {
                let tokens = texts.par_iter().with_min_len(8).map(|text| model.tokens(text));
                let tokens: Vec<Tokens> = tokens.collect::<Result<_, _>>()?;
                let operations = |t: &Tokens| model.model.architecture().operations(t.ids.len());
                let counts = (
                    tokens.iter().map(|t| t.ids.len() as u64).sum::<u64>(),
                    tokens.iter().map(operations).sum::<u64>(),
                );
                let plan = engine.plan(&tokens, |_| false);
                let request = Request { id, window: counts, items: tokens, plan };
                if to_infer.send(Queued::new(request)).is_err() {
                    break;
                }
            }
            anyhow::Ok(())
        });
        let collect = scope.spawn(|| {
            let responses = responses;
            for response in &responses {
                let Response { window: (tokens, operations), answers, failed, .. } = response.into_inner();
                if let Some((text, message)) = failed.into_iter().next() {
                    bail!("text {text} of a window has no embedding: {message}");
                }
                done.tokens += tokens;
                done.operations += operations;
                done.answers.push(answers);
            }
            Ok(())
        });
        let served = engine.serve(&requests, &to_collect, None);
        drop((requests, to_collect));
        let joined = |ended: std::thread::Result<anyhow::Result<()>>| ended.expect("no thread panics");
        joined(prepare.join()).and(joined(collect.join()))?;
        served.map_err(|e| anyhow::anyhow!("{e}"))
    })?;
    Ok(done)
}
