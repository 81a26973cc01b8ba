//! The one place where the stages are wired. Read this first.
//!
//! ```text
//! source ─▶ prepare ─▶ infer ─▶ encode ─▶ publish ─┐
//!  ▲  ▲     └───── the task's: [`Compute`] ─┘  │      │
//!  │  │          suspects: timed out │         │      │
//!  │  └── reports ◀──────────────────┘         │      │
//!  │  └── reports: published, dropped ◀────────────────┤
//!  └───── group: generation, before a transaction ◀───┤
//!         commit_soon: revocation or memory waits ─────▶
//! ```
//!
//! With a window go a tally of what its predictions show, from encode to publish, and the samples of some of its records.
//!
//! With a shadow ([`crate::shadow`]), windows pass a stage between encode and publish:
//!
//! ```text
//! encode ─▶ shadow ─▶ publish
//!              └──▶ worker: a second [`Compute`] ─▶ shadow.topic
//! ```
//!
//! Under `run` nothing comes back from the worker; in a drain or replay, a window waits in `shadow` until the worker is done
//! with it.
//!
//! Not shown: `stop` (a graceful shutdown is requested), `failed` (a stage has failed: the source leaves the group),
//! health and metrics.
//!
//! Every stage is a thread of its own that takes a window, works on it and passes it on through a small bounded
//! channel. A full channel blocks the stage before it, and in the end the source, which pauses its partitions
//! (backpressure). Shutdown goes the same way: the source drops its sender, and each stage ends when its input channel
//! is closed and empty.
//!
//! Records are gathered as they arrive and decoded a window at a time: the thread that polls Kafka only copies, and
//! decoding runs on all cores.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, unbounded};

use crate::codec::DecoderError;
use crate::compute::{About, Compute, ComputeError, Stage, StageContext};
use crate::flow::{CommitSoon, Encoded, Queued, Report};
use crate::kafka::cluster::Topics;
use crate::registry::registration::{self, RegistrationError};
use crate::schedule::Schedule;
use crate::settings::{Guarantee, Settings};
use crate::shadow::{Shadow, ShadowError};
use crate::sink::{self, PublishError, Publisher};
use crate::source::{self, Drain, OriginalTopics, Source, SourceError};
use crate::telemetry::traces::Traces;
use crate::telemetry::{Health, Metrics};
use crate::watch::{Observer, ReferenceError, Watch};
use crate::window::Window;

/// What a pipeline shares with the rest of the process.
#[derive(Clone)]
pub struct Shared {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    /// Set from outside to shut the pipeline down gracefully.
    pub stop: Arc<AtomicBool>,
    /// The bounds of a drain or replay: the pipeline ends by itself once they are reached.
    pub drain: Option<Arc<Drain>>,
    /// When records are consumed. With `outside: leave` the pipeline ends by itself at the end of a period.
    pub schedule: Arc<Schedule>,
    /// Set if the input is dead letters to reprocess: the topics of the original records.
    pub reprocess: Option<Arc<OriginalTopics>>,
    /// Exports trace spans; `None`: no tracing.
    pub traces: Option<Arc<Traces>>,
    /// Why a stage has requested a graceful shutdown, if one has.
    verdict: Arc<OnceLock<String>>,
}

impl Shared {
    pub fn new(settings: &Settings) -> Self {
        Self {
            metrics: Arc::new(Metrics::new()),
            health: Arc::new(Health::new(settings.server.stall_after.0)),
            stop: Arc::new(AtomicBool::new(false)),
            drain: None,
            reprocess: None,
            traces: None,
            // The settings have been checked, so the schedule is valid.
            schedule: Arc::new(Schedule::new(&settings.schedule).unwrap_or_else(Schedule::always)),
            verdict: Arc::default(),
        }
    }

    /// Shuts the pipeline down gracefully; the process then exits with an error.
    fn end(&self, verdict: &str) {
        // The first verdict is the one reported.
        let _ = self.verdict.set(verdict.to_owned());
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Why the pipeline ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    #[error("source: {0}")]
    Source(#[from] SourceError),
    #[error("infer: {0}")]
    Compute(#[from] ComputeError),
    #[error("publish: {0}")]
    Publish(#[from] PublishError),
    /// The schema of the predictions is not in the registry.
    #[error("output.format: {0}")]
    Registration(#[from] RegistrationError),
    #[error("shadow: {0}")]
    Shadow(#[from] ShadowError),
    /// `drift.reference` cannot be used with the model.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// What `samples` needs to read values cannot be read.
    #[error("samples: {0}")]
    Samples(#[from] DecoderError),
    #[error("thread {name}: {error}")]
    Thread { name: &'static str, error: std::io::Error },
    /// A stage requested a graceful shutdown for this reason; everything in flight was published.
    #[error("{0}")]
    Verdict(String),
}

impl<E: 'static> Stage<E> {
    /// Converts the stage's error to the pipeline's.
    fn into(self) -> Stage<PipelineError>
    where
        PipelineError: From<E>,
    {
        let Self { name, work } = self;
        Stage { name, work: Box::new(move || work().map_err(PipelineError::from)) }
    }
}

/// Windows that may wait to be published, so that earlier stages continue while a transaction is committed, which takes
/// 40 to 100 ms.
const BEFORE_PUBLISH: usize = 64;

/// How long the source may take to leave the group after another stage has failed.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs until `shared.stop` is set, the bounds are reached, or the schedule's period is over, and everything in flight
/// is committed.
///
/// # Errors
/// The first error of any stage, once the source has left the group or `LEAVE_TIMEOUT` has passed. Other stages may
/// still be running, so the process must exit.
pub fn run(
    settings: &Settings,
    compute: Arc<dyn Compute>,
    topics: &Topics,
    shared: &Shared,
) -> Result<(), PipelineError> {
    describe(&compute.about(), &shared.metrics, &shared.health);
    let (metrics, health) = (&shared.metrics, &shared.health);
    if let Some(writer) = compute.writer()
        && !registration::register(settings, &writer, metrics, health, &shared.stop)?
    {
        return Ok(());
    }
    let shadow = Shadow::start(settings, shared.drain.is_some(), metrics, &shared.stop)?;
    let watch = Watch::start(settings, &*compute, metrics, health)?;
    let observer = Observer::new(settings)?;
    let failed = Arc::new(AtomicBool::new(false));
    let commit_soon = Arc::new(CommitSoon::default());
    let source = Source::new(
        settings,
        source::Context {
            metrics: Arc::clone(metrics),
            health: Arc::clone(health),
            commit_soon: Arc::clone(&commit_soon),
            on_change: settings.model.on_change,
            stop: Arc::clone(&shared.stop),
            failed: Arc::clone(&failed),
            drain: shared.drain.clone(),
            schedule: Arc::clone(&shared.schedule),
            reprocess: shared.reprocess.clone(),
            traced: shared.traces.is_some(),
            partitions: topics.input_partitions,
            compute: Arc::clone(&compute),
            sampled: settings.samples.topic.as_ref().map(|_| settings.samples.share),
            transactional: settings.delivery.guarantee == Guarantee::ExactlyOnce,
        },
    )?;
    let (report, reports) = unbounded::<Report>();
    let publisher = Publisher::new(
        settings,
        sink::Context {
            metrics: Arc::clone(metrics),
            health: Arc::clone(health),
            commit_soon,
            group: source.group(),
            topics: topics.clone(),
            stop: Arc::clone(&shared.stop),
            watch,
            traces: shared.traces.clone(),
        },
        report.clone(),
    )?;

    let (gathered, windows) = bounded::<Queued<Window>>(1);
    let (encoded, to_publish) = bounded::<Queued<Encoded>>(BEFORE_PUBLISH);
    let (encoded, shadow) = match shadow {
        None => (encoded, None),
        Some(shadow) => {
            let (passed, (encoded, windows)) = (encoded, bounded(1));
            let work = Box::new(move || {
                shadow.choose(&windows, passed);
                Ok::<(), PipelineError>(())
            });
            (encoded, Some(Stage { name: "shadow", work }))
        }
    };
    let end = {
        let shared = shared.clone();
        Arc::new(move |verdict: &str| shared.end(verdict))
    };
    let stop = Arc::clone(&shared.stop);
    let wires =
        StageContext { windows, encoded, reports: report, health: Arc::clone(health), observer, stop, end };
    let mut stages: Vec<Stage<PipelineError>> = compute.stages(wires).into_iter().map(Stage::into).collect();
    let source = Box::new(move || source.serve(gathered, &reports));
    let publish = Box::new(move || publisher.serve(&to_publish));
    stages.extend(shadow);
    stages.push(Stage { name: "source", work: source }.into());
    stages.push(Stage { name: "publish", work: publish }.into());
    let (ended, ends) = unbounded();
    for Stage { name, work } in stages {
        let ended = ended.clone();
        std::thread::Builder::new()
            .name(format!("kandle-{name}"))
            .spawn(move || drop(ended.send((name, work()))))
            .map_err(|error| PipelineError::Thread { name, error })?;
    }
    drop(ended);
    while let Ok((name, result)) = ends.recv() {
        let Err(error) = result else { continue };
        // The source leaves the group, so that the next start need not wait for this member's session to expire.
        failed.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + LEAVE_TIMEOUT;
        while name != "source"
            && let Ok((other, _)) = ends.recv_deadline(deadline)
            && other != "source"
        {}
        return Err(error);
    }
    match shared.verdict.get() {
        None => Ok(()),
        Some(verdict) => Err(PipelineError::Verdict(verdict.clone())),
    }
}

/// Shows the model that runs in metrics, /status and the log.
pub(crate) fn describe(about: &About, metrics: &Metrics, health: &Health) {
    let About { model, device, dtype, .. } = about;
    let (digest, task) = (about.digest.short(), about.kind.name());
    // An earlier version may have been there.
    metrics.model_info.reset();
    metrics.model_info.with_label_values(&[model, digest, task, device, dtype]).set(1);
    health.set_about(serde_json::json!({
        "model": model, "digest": digest, "task": task, "device": device, "dtype": dtype,
    }));
    tracing::info!(model, digest, task, device, dtype, "model loaded");
}
