//! `run`: runs the pipeline. Also the admin server and signal handling, for all commands that run a pipeline.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::clock;
use crate::compute::{About, Compute, Replaceable};
use crate::kafka::cluster::{self, Cluster, Missing};
use crate::kafka::consumer::Role;
use crate::pipeline::{self, Shared};
use crate::refresh;
use crate::schedule::Phase;
use crate::settings::{Loaded, OnChange, Outside, Settings};
use crate::task;
use crate::telemetry::traces::Traces;
use crate::telemetry::{logging, server};

pub fn run(loaded: Loaded) -> anyhow::Result<()> {
    let settings = loaded.settings;
    logging::start(&settings.log);
    let mut shared = Shared::new(&settings);
    shared.traces = Traces::start(&settings.otel)?;
    serve(&settings, &shared, || consume(&settings, &shared))
}

/// Runs `work` with the admin server up and signals handled.
pub(super) fn serve(
    settings: &Settings,
    shared: &Shared,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(server::serve(
        &settings.server,
        settings.templates.get("server.token").map(String::as_str),
        Arc::clone(&shared.metrics),
        Arc::clone(&shared.health),
    ))?;
    runtime.spawn(signals(shared.clone()));
    let result = work();
    if let Some(traces) = &shared.traces {
        traces.end();
    }
    // Do not wait for the server's open connections.
    runtime.shutdown_background();
    result
}

/// Runs the pipeline once; with `schedule.outside: leave`, once per period.
fn consume(settings: &Settings, shared: &Shared) -> anyhow::Result<()> {
    let mut loaded = None;
    loop {
        if shared.schedule.unload_model && !await_period(shared, LOAD_AHEAD) {
            return Ok(());
        }
        let compute = match loaded.take() {
            Some(compute) => compute,
            None => load(settings, shared)?,
        };
        if shared.schedule.outside == Outside::Leave && !await_period(shared, Duration::ZERO) {
            return Ok(());
        }
        let Some(topics) =
            cluster::wait(settings, &shared.metrics, &shared.health, &shared.stop, Missing::Wait)?
        else {
            return Ok(());
        };
        refuse_other_models(settings, &compute.about())?;
        pipeline::run(settings, Arc::clone(&compute), &topics, shared)?;
        if shared.stop.load(Ordering::Relaxed) || shared.schedule.outside == Outside::Stay {
            return Ok(());
        }
        if shared.schedule.unload_model {
            tracing::info!("model unloaded until the next period");
        } else {
            loaded = Some(compute);
        }
    }
}

/// Loads the model; with `model.refresh`, one that is replaced while it runs.
fn load(settings: &Settings, shared: &Shared) -> anyhow::Result<Arc<dyn Compute>> {
    if settings.model.refresh.is_none() {
        return Ok(task::load(settings, &shared.metrics)?);
    }
    let named = refresh::Named::now(settings);
    let (replaceable, replacer) = Replaceable::new(task::load(settings, &shared.metrics)?);
    refresh::start(settings, replacer, named, &shared.metrics, &shared.health)?;
    Ok(replaceable)
}

/// With `model.on_change: refuse`, refuses to join a group whose live members have another model. The model of the
/// group's last commit is compared after joining.
pub(super) fn refuse_other_models(settings: &Settings, about: &About) -> anyhow::Result<()> {
    if settings.model.on_change != OnChange::Refuse {
        return Ok(());
    }
    let group = &settings.input.group;
    let members = Cluster::connect(settings)?
        .members(group)
        .with_context(|| format!("cannot list the members of group {group} (model.on_change: refuse)"))?;
    for member in members {
        if let Some((_, digest)) = Role::of(&member.client_id)
            && digest != about.digest.short()
        {
            bail!(
                "group {group} has a live member at {} with model digest {digest}, but this is {} (digest {}), \
                 and model.on_change is refuse; stop that member first, or use another group",
                member.host,
                about.model,
                about.digest.short(),
            );
        }
    }
    Ok(())
}

/// How long before the next period an unloaded model is loaded again.
const LOAD_AHEAD: Duration = Duration::from_secs(60);

/// Waits until `ahead` before the next period; inside of a period, returns at once. False if asked to stop.
fn await_period(shared: &Shared, ahead: Duration) -> bool {
    let mut said = false;
    while !shared.stop.load(Ordering::Relaxed) {
        let now = clock::now();
        match shared.schedule.at(now) {
            Phase::Closed { until } if until.duration_since(now).as_secs_f64() > ahead.as_secs_f64() => {
                if !said {
                    tracing::info!(%until, "outside of all schedule periods, not in the group");
                    shared.metrics.schedule_open.set(0.0);
                    shared.metrics.deadline.set(f64::INFINITY);
                    shared
                        .health
                        .set_source(serde_json::json!({ "outside_schedule_until": until.to_string() }));
                    // Waiting is what the process should do now, so it is ready.
                    shared.health.set_ready();
                    said = true;
                }
                std::thread::park_timeout(POLL_INTERVAL);
            }
            _ => {
                if ahead.is_zero() {
                    shared.metrics.schedule_open.set(1.0);
                }
                return true;
            }
        }
    }
    false
}

/// Interval between two looks at the clock.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The first SIGTERM or SIGINT stops gracefully, the second exits at once.
async fn signals(shared: Shared) {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) =
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "cannot handle signals; SIGTERM will end the process at once");
                return;
            }
        };
    loop {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        if shared.stop.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                signal = name,
                "second signal: exiting at once; uncommitted records will be predicted again"
            );
            std::process::exit(1);
        }
        tracing::info!(
            signal = name,
            "stopping: finishing the windows in flight; a second signal exits at once"
        );
    }
}
