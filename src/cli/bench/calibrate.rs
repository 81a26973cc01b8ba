//! `bench calibrate`: finds the token budget of a batch for the configured model on its device, and stores it.

use std::sync::Arc;

use anyhow::Context;

use crate::cli::output::outln;
use crate::engine::{Calibration, Calibrations};
use crate::settings::Loaded;
use crate::task;
use crate::telemetry::{Metrics, logging};

pub fn bench(loaded: Loaded) -> anyhow::Result<()> {
    logging::start(&loaded.settings.log);
    let compute = task::load(&loaded.settings, &Arc::new(Metrics::new()))?;
    let about = compute.about();
    let calibrated = compute.calibrate().context("task.kind noop has no model to calibrate")?;
    let Calibration { rates, chosen } = calibrated?;
    for (budget, rate) in &rates {
        outln!("{budget:>6} tokens per batch: {rate:>9.0} tokens/s on one lane");
    }
    let chosen = chosen.context("no batch fits the device")?;
    let calibrations = Calibrations::here().context("neither XDG_CACHE_HOME nor HOME is set")?;
    calibrations
        .set(about.digest.short(), &about.device, chosen)
        .with_context(|| calibrations.path().display().to_string())?;
    outln!("{chosen} tokens per batch stored for digest {} on {}", about.digest, about.device);
    Ok(())
}
