//! `run`: the pipeline; and the admin server and the signals, for all that run one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Context;

use crate::cluster;
use crate::pipeline::{self, Shared};
use crate::settings::{Loaded, Settings};
use crate::task::Task;
use crate::telemetry::{logging, server};

pub fn run(loaded: Loaded) -> anyhow::Result<()> {
    let settings = loaded.settings;
    logging::start(&settings.log);
    let shared = Shared::new(&settings);
    serve(&settings, &shared, || consume(&settings, &shared))
}

/// Does `work` with the admin server up and signals heeded.
pub(super) fn serve(
    settings: &Settings,
    shared: &Shared,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime
        .block_on(server::serve(
            &settings.server.listen,
            Arc::clone(&shared.metrics),
            Arc::clone(&shared.health),
        ))
        .with_context(|| format!("server.listen {}", settings.server.listen))?;
    runtime.spawn(signals(shared.clone()));
    let result = work();
    // The server's connections are not waited for.
    runtime.shutdown_background();
    result
}

fn consume(settings: &Settings, shared: &Shared) -> anyhow::Result<()> {
    let task = Arc::new(Task::load(settings, &shared.metrics)?);
    let Some(topics) = cluster::wait(settings, &shared.metrics, &shared.health, &shared.stop)? else {
        return Ok(());
    };
    pipeline::run(settings, task, &topics, shared).map_err(anyhow::Error::msg)
}

/// The first SIGTERM or SIGINT asks for the end, the second takes it.
async fn signals(shared: Shared) {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) =
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "signals cannot be received: SIGTERM ends at once");
                return;
            }
        };
    loop {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        if shared.stop.swap(true, Ordering::Relaxed) {
            tracing::warn!("{name} again: ending at once; what was not committed will be predicted again");
            std::process::exit(1);
        }
        tracing::info!("{name}: finishing what is in flight; once more to end at once");
    }
}
