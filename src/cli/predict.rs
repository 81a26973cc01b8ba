//! `predict`: the same codec, task and engine as `run`, fed from files or standard input.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Args;

use super::output::Output;
use super::progress::{self, Rate, Reporter};
use crate::codec::FormatEntry;
use crate::compute::Compute;
use crate::flow::Outcome;
use crate::lease::Lease;
use crate::record::{Arrival, Partition};
use crate::settings::{Format, Loaded};
use crate::task;
use crate::telemetry::{Metrics, logging};
use crate::window::{ClosedBy, Gatherer, Limits, Window};

#[derive(Args)]
#[group(id = "predict")]
pub struct Options {
    /// Files of records, one per line (in base64 if input.format is binary), or the files of images if input.format is
    /// image; standard input if none is given
    inputs: Vec<PathBuf>,
    /// Exit with 3 if a line got no prediction
    #[arg(long)]
    strict: bool,
}

/// Lines got no prediction, and `--strict` is set.
#[derive(Debug, thiserror::Error)]
#[error("{0} lines got no prediction (--strict)")]
pub struct FailedLines(u64);

pub fn predict(loaded: Loaded, options: &Options) -> anyhow::Result<()> {
    let settings = loaded.settings;
    logging::start(&settings.log);
    let metrics = Arc::new(Metrics::new());
    let compute = task::load(&settings, &metrics)?;
    let read = Arc::new(Read::default());
    let progress = show(&options.inputs, &read, &metrics)?;
    let mut out = std::io::BufWriter::new(Output);

    let mut gatherer = Gatherer::new(Limits {
        max_records: settings.window.max_records,
        max_bytes: settings.window.max_bytes.0 as usize,
        max_memory: settings.window_memory(),
        // Lines are read as fast as possible, so no limit of time applies.
        ..Limits::NONE
    });
    let (partition, lease) = (Partition::new("line", 0), Lease::new(0));
    let (mut number, mut failed) = (0, 0);
    // A value in a binary format may have line feeds.
    let format = FormatEntry::of(settings.input.format);
    let in_base64 =
        format.schema.is_some() && !(format.format == Format::JsonSchema && settings.input.schema.is_some());
    let is_file = format.format == Format::Image;
    let mut push = |value: &[u8]| -> anyhow::Result<()> {
        let footprint = compute.footprint(value);
        let arrival = Arrival { offset: number, value: Some(value), footprint, ..Arrival::default() };
        number += 1;
        if let Some(window) = gatherer.push(&partition, &lease, arrival, Instant::now()) {
            failed += answer(&*compute, window, &mut out)?;
            read.records.store(number as u64, Ordering::Relaxed);
        }
        Ok(())
    };
    let mut feed = |reader: &mut dyn BufRead| -> anyhow::Result<()> {
        if is_file {
            let mut value = Vec::new();
            reader.read_to_end(&mut value)?;
            read.bytes.fetch_add(value.len() as u64, Ordering::Relaxed);
            return push(&value);
        }
        let (mut line, mut lines) = (Vec::new(), 0);
        while reader.read_until(b'\n', &mut line)? > 0 {
            lines += 1;
            read.bytes.fetch_add(line.len() as u64, Ordering::Relaxed);
            let value = line.strip_suffix(b"\n").unwrap_or(&line);
            let value = value.strip_suffix(b"\r").unwrap_or(value);
            if in_base64 {
                let decoded = STANDARD.decode(value).with_context(|| {
                    format!(
                        "line {lines} is not base64, in which a record of input.format: {} is read",
                        format.name
                    )
                })?;
                push(&decoded)?;
            } else {
                push(value)?;
            }
            line.clear();
        }
        Ok(())
    };
    if options.inputs.is_empty() {
        feed(&mut std::io::stdin().lock())?;
    }
    for path in &options.inputs {
        let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
        feed(&mut std::io::BufReader::new(file)).with_context(|| path.display().to_string())?;
    }
    if let Some(window) = gatherer.close(ClosedBy::Stop) {
        failed += answer(&*compute, window, &mut out)?;
    }
    out.flush()?;
    if let Some(progress) = progress {
        progress.stop();
    }
    match failed {
        1.. if options.strict => Err(FailedLines(failed).into()),
        _ => Ok(()),
    }
}

/// How much of the input is read, for the progress bar.
#[derive(Default)]
struct Read {
    /// Records with a prediction or an error line.
    records: AtomicU64,
    bytes: AtomicU64,
}

/// Shows progress, unless standard error is no terminal, or predictions go to one too: the bar would be among them.
/// With files, the bar and the time that is left are by the bytes that are read.
fn show(inputs: &[PathBuf], read: &Arc<Read>, metrics: &Arc<Metrics>) -> std::io::Result<Option<Reporter>> {
    if std::io::stdout().is_terminal() {
        return Ok(None);
    }
    let total = total_bytes(inputs);
    let bar = progress::bar(match total {
        Some(_) => "{bar:30} {percent:>3}%  {msg}  ETA {eta}",
        None => "{spinner} {msg}",
    });
    let Some(bar) = bar else { return Ok(None) };
    bar.set_length(total.unwrap_or_default());
    let (read, metrics, now) = (Arc::clone(read), Arc::clone(metrics), Instant::now());
    let (mut records_rate, mut tokens_rate) = (Rate::new(now), Rate::new(now));
    let report = move |over| {
        let records = read.records.load(Ordering::Relaxed);
        bar.set_position(read.bytes.load(Ordering::Relaxed));
        let rates = (records_rate.next(records), tokens_rate.next(metrics.tokens.get()));
        bar.set_message(counts(records, rates));
        if over {
            bar.finish_and_clear();
        }
    };
    Reporter::start(progress::REDRAW, report).map(Some)
}

/// Records so far, and records and tokens per second.
fn counts(records: u64, (records_per_second, tokens_per_second): (f64, f64)) -> String {
    format!("{records} records  {records_per_second:.0} records/s  {tokens_per_second:.0} tokens/s")
}

/// Bytes of all inputs; `None` if one is not a file, or there are none.
fn total_bytes(inputs: &[PathBuf]) -> Option<u64> {
    let size = |path: &PathBuf| {
        std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|file| file.len())
    };
    if inputs.is_empty() { None } else { inputs.iter().map(size).sum() }
}

/// Writes one line per record: its prediction, or `{"error":…,"message":…}`. Returns the number of error lines.
fn answer(compute: &dyn Compute, window: Window, out: &mut impl Write) -> anyhow::Result<u64> {
    let mut failed = 0;
    let encoded = compute.answer(window)?;
    for (record, outcome) in encoded.window.records.iter().zip(&encoded.outcomes) {
        match outcome {
            Outcome::Prediction { part, bytes } => {
                out.write_all(encoded.prediction(*part, bytes))?;
            }
            Outcome::Unchanged => out.write_all(encoded.window.value(record).unwrap_or_default())?,
            Outcome::Tombstone => out.write_all(b"null")?,
            Outcome::Dead(error) => {
                failed += 1;
                let line = serde_json::json!({ "error": error.fault.name(), "message": error.message });
                out.write_all(line.to_string().as_bytes())?;
            }
        }
        out.write_all(b"\n")?;
    }
    Ok(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_by_bytes_if_all_inputs_are_files() {
        let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let (file, size) = (manifest.join("Cargo.toml"), include_str!("../../Cargo.toml").len() as u64);
        assert_eq!(total_bytes(&[file.clone(), file.clone()]), Some(2 * size));
        assert_eq!(total_bytes(&[file, manifest]), None, "a directory has no bytes to read");
        assert_eq!(total_bytes(&[PathBuf::from("/dev/null")]), None);
        assert_eq!(total_bytes(&[]), None);
        assert_eq!(counts(12345, (678.4, 90_000.6)), "12345 records  678 records/s  90001 tokens/s");
    }
}
