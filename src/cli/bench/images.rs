//! `bench images`: files of images through the stages of `run` without Kafka, or through decoding and preprocessing alone on
//! one core.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;

use crate::cli::output::outln;
use crate::compute::{Compute, detached};
use crate::flow::Outcome;
use crate::lease::Lease;
use crate::model::vision::{self, DecodeMemory, Limits as ImageLimits, VisionModel, decode};
use crate::record::{Arrival, Partition};
use crate::settings::Settings;
use crate::task;
use crate::task::text::Source;
use crate::telemetry::Metrics;
use crate::window::{ClosedBy, Gatherer, Limits, Window};

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    model: super::ModelOptions,
    /// Directory of image files, which are taken in the order of their names
    #[arg(long)]
    input: PathBuf,
    /// Number of passes over the files; the fastest counts
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Measure on one core, without the model: the file's bytes to the values that the model takes
    #[arg(long)]
    preprocess: bool,
    /// Write the predictions to this file: one per line
    #[arg(long, conflicts_with = "preprocess")]
    output: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    images: usize,
    bytes: usize,
    seconds: f64,
    images_per_second: f64,
    peak_rss_bytes: u64,
    dtype: String,
    device: String,
    threads: usize,
}

pub fn bench(options: &Options) -> anyhow::Result<()> {
    let settings = options.model.settings("image", "image-classification")?;
    let files = read(&options.input)?;
    let report = match options.preprocess {
        true => preprocess(&settings, &files, options.rounds)?,
        false => predict(&settings, &files, options)?,
    };
    if options.model.json {
        outln!("{}", super::super::pretty(&serde_json::to_value(&report)?));
    } else {
        outln!(
            "{} images, {} MiB in {:.2} s: {:.1} images/s ({} on {}, {} threads, {} MiB at most)",
            report.images,
            report.bytes >> 20,
            report.seconds,
            report.images_per_second,
            report.dtype,
            report.device,
            report.threads,
            report.peak_rss_bytes >> 20,
        );
    }
    Ok(())
}

/// The files of a directory, by name.
fn read(folder: &PathBuf) -> anyhow::Result<Vec<Vec<u8>>> {
    let shown = || folder.display().to_string();
    let entries = std::fs::read_dir(folder).with_context(shown)?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    let mut paths = paths.with_context(shown)?;
    paths.sort();
    if paths.is_empty() {
        bail!("{} has no files", folder.display());
    }
    paths.iter().map(|path| std::fs::read(path).with_context(|| path.display().to_string())).collect()
}

fn predict(settings: &Settings, files: &[Vec<u8>], options: &Options) -> anyhow::Result<Report> {
    let compute = task::load(settings, &Arc::new(Metrics::new()))?;
    let mut seconds = f64::INFINITY;
    for round in 0..options.rounds.max(1) {
        let mut lines = Vec::new();
        let keep = round == 0 && options.output.is_some();
        let mut failed = None;
        let windows = windows(settings, &*compute, files);
        let started = Instant::now();
        detached::answer_all(&compute, windows, |encoded| {
            for outcome in &encoded.outcomes {
                match outcome {
                    Outcome::Prediction { part, bytes } if keep => {
                        lines.extend_from_slice(encoded.prediction(*part, bytes));
                        lines.push(b'\n');
                    }
                    Outcome::Dead(error) => failed = Some(error.message.clone()),
                    _ => {}
                }
            }
            match failed {
                None => ControlFlow::Continue(()),
                Some(_) => ControlFlow::Break(()),
            }
        })?;
        seconds = seconds.min(started.elapsed().as_secs_f64());
        if let Some(message) = failed {
            bail!("an image has no prediction: {message}");
        }
        if let (true, Some(path)) = (keep, &options.output) {
            std::fs::write(path, lines).with_context(|| path.display().to_string())?;
        }
    }
    let about = compute.about();
    report(files, seconds, (&about.dtype, &about.device), compute.lanes())
}

fn report(
    files: &[Vec<u8>],
    seconds: f64,
    (dtype, device): (&str, &str),
    threads: usize,
) -> anyhow::Result<Report> {
    Ok(Report {
        images: files.len(),
        bytes: files.iter().map(Vec::len).sum(),
        seconds,
        images_per_second: files.len() as f64 / seconds,
        peak_rss_bytes: super::super::drain::peak_rss().context("/proc/self/status")?,
        dtype: dtype.to_owned(),
        device: device.to_owned(),
        threads,
    })
}

/// Windows as the source closes them, each made when it is asked for.
fn windows<'a>(
    settings: &Settings,
    compute: &'a dyn Compute,
    files: &'a [Vec<u8>],
) -> impl Iterator<Item = Window> + Send + 'a {
    let mut gatherer = Gatherer::new(Limits::of(settings, compute.lanes()));
    let (partition, lease) = (Partition::new("image", 0), Lease::new(0));
    let mut rest = (0..).zip(files);
    std::iter::from_fn(move || {
        for (offset, file) in rest.by_ref() {
            let arrival = Arrival {
                offset,
                value: Some(file),
                footprint: compute.footprint(file),
                work: compute.work(file.len()) as f32,
                ..Arrival::default()
            };
            let window = gatherer.push(&partition, &lease, arrival, Instant::now());
            if window.is_some() {
                return window;
            }
        }
        gatherer.close(ClosedBy::End)
    })
}

/// On the calling thread. The values of a channel are side by side, as most models take them.
fn preprocess(settings: &Settings, files: &[Vec<u8>], rounds: usize) -> anyhow::Result<Report> {
    let source = Source::find(settings)?;
    let output = match settings.task.kind.name() {
        "image-embedding" => vision::Output::Embedding,
        _ => vision::Output::Logits,
    };
    let model: VisionModel = task::images::load_model(settings, &source, output)?;
    let limits = ImageLimits { pixels: settings.task.max_pixels, bytes: settings.task.max_bytes.0 };
    let memory = DecodeMemory::new(settings.memory.limit.0);
    let preprocess = &model.preprocess;
    let size = preprocess.height * preprocess.width;
    let mut values = vec![0f32; 3 * size];
    let mut seconds = f64::INFINITY;
    for _ in 0..rounds.max(1) {
        let started = Instant::now();
        for file in files {
            let image = decode(file, &limits, &memory).map_err(|message| anyhow::anyhow!(message))?;
            let pixels = preprocess.apply(image).map_err(|message| anyhow::anyhow!(message))?;
            for (channel, plane) in values.chunks_mut(size).enumerate() {
                let levels = preprocess.values(channel);
                for (value, pixel) in plane.iter_mut().zip(pixels.as_chunks::<3>().0) {
                    *value = levels[usize::from(pixel[channel])];
                }
            }
            std::hint::black_box(&values);
        }
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    report(files, seconds, ("f32", "cpu"), 1)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn predictions_are_in_the_order_of_the_files() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let folder = tempfile::tempdir().expect("a directory");
        let input = folder.path().join("in");
        std::fs::create_dir(&input).expect("a directory");
        let golden = std::fs::read(fixtures.join("image-vit/golden.json")).expect("golden.json");
        let golden: serde_json::Value = serde_json::from_slice(&golden).expect("JSON");
        let cases = golden.as_array().expect("a list");
        for case in cases {
            let name = case["image"].as_str().expect("a name");
            std::fs::copy(fixtures.join("images").join(name), input.join(name)).expect("copied");
        }
        let output = folder.path().join("out");
        let options = |preprocess| Options {
            model: crate::cli::bench::ModelOptions {
                model: fixtures.join("image-vit").display().to_string(),
                threads: None,
                device: "cpu".to_owned(),
                dtype: "f32".to_owned(),
                set: Vec::new(),
                json: true,
            },
            input: input.clone(),
            rounds: 2,
            preprocess,
            output: (!preprocess).then(|| output.clone()),
        };
        bench(&options(false)).expect("measured");
        let lines = std::fs::read_to_string(&output).expect("predictions");
        assert_eq!(lines.lines().count(), cases.len(), "those of the first round");
        for (line, case) in lines.lines().zip(cases) {
            let logits: Vec<f64> =
                case["logits"].as_array().expect("a list").iter().filter_map(|x| x.as_f64()).collect();
            let all: f64 = logits.iter().map(|x| x.exp()).sum();
            let scores: serde_json::Value = serde_json::from_str(line).expect("JSON");
            let score = scores["scores"]["cat"].as_f64().expect("a score");
            assert!((score - logits[0].exp() / all).abs() < 1e-4, "{line}");
        }
        bench(&options(true)).expect("measured");
    }
}
