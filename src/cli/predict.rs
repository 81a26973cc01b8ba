//! `predict`: the same codec, task and engine as `run`, fed from files or standard input.

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::Args;

use super::output::Output;
use crate::compute::Compute;
use crate::flow::Outcome;
use crate::lease::Lease;
use crate::record::{Arrival, Partition};
use crate::settings::Loaded;
use crate::task;
use crate::telemetry::{Metrics, logging};
use crate::window::{ClosedBy, Gatherer, Limits, Window};

#[derive(Args)]
#[group(id = "predict")]
pub struct Options {
    /// Files of records, one per line; standard input if none is given
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
    let compute = task::load(&settings, &Arc::new(Metrics::new()))?;
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
    let mut feed = |reader: &mut dyn BufRead| -> anyhow::Result<()> {
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            let value = line.strip_suffix(b"\n").unwrap_or(&line);
            let value = value.strip_suffix(b"\r").unwrap_or(value);
            let footprint = compute.footprint(value);
            let arrival = Arrival { offset: number, value: Some(value), footprint, ..Arrival::default() };
            number += 1;
            if let Some(window) = gatherer.push(&partition, &lease, arrival, Instant::now()) {
                failed += answer(&*compute, window, &mut out)?;
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
    match failed {
        1.. if options.strict => Err(FailedLines(failed).into()),
        _ => Ok(()),
    }
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
