//! The one place where the stages are wired. Read this first.
//!
//! ```text
//! source ─▶ prepare ─▶ infer ─▶ encode ─▶ publish ─┐
//!    ▲      decode,    plan's    JSON     Kafka,   │
//!    │      tokenise,  batches            acks     │
//!    │      plan       on lanes                    │
//!    └──────────── reports: published ◀────────────┘
//! ```
//!
//! Every stage is a thread of its own that takes a window, works on it and hands it on over a
//! channel with little room; a full channel holds up the stage before it, and in the end the
//! source, which pauses its partitions. The end comes the same way: the source drops its sender,
//! and each stage ends when the channel before it is closed and empty.
//!
//! Records are gathered as they come and decoded by the window: the thread that polls Kafka does
//! nothing but copy, and decoding runs on all cores.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use rayon::prelude::*;

use crate::codec::{Decoder, Input, decoder};
use crate::engine::{EngineError, Plan, Request, Response};
use crate::failpoint;
use crate::flow::{CommitSoon, Encoded, Inferred, Outcome, Prepared, Queued, Report, State};
use crate::kafka::cluster::Topics;
use crate::model::Tokens;
use crate::record::{Position, RecordError};
use crate::schedule::Schedule;
use crate::settings::Settings;
use crate::sink::{self, Publisher};
use crate::source::{self, Drain, Origins, Source};
use crate::task::{Task, TextTask};
use crate::telemetry::health::Stage;
use crate::telemetry::traces::Traces;
use crate::telemetry::{Health, Metrics};
use crate::window::Window;

/// What a pipeline shares with the rest of the process.
#[derive(Clone)]
pub struct Shared {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    /// Set from outside to end the pipeline in good order.
    pub stop: Arc<AtomicBool>,
    /// The bounds, where it has any: it ends by itself once they are reached.
    pub drain: Option<Arc<Drain>>,
    /// When records are consumed; with `outside: leave` it ends by itself at the end of a period.
    pub schedule: Arc<Schedule>,
    /// The input are dead letters, of records of these topics.
    pub revive: Option<Arc<Origins>>,
    /// Where spans go, if anywhere.
    pub traces: Option<Arc<Traces>>,
    /// Why the pipeline ends by itself, in good order.
    verdict: Arc<OnceLock<String>>,
}

impl Shared {
    pub fn new(settings: &Settings) -> Self {
        Self {
            metrics: Arc::new(Metrics::new()),
            health: Arc::new(Health::new(settings.server.stall_after.0)),
            stop: Arc::new(AtomicBool::new(false)),
            drain: None,
            revive: None,
            traces: None,
            // The settings have been checked.
            schedule: Arc::new(Schedule::new(&settings.schedule).unwrap_or_else(Schedule::always)),
            verdict: Arc::default(),
        }
    }

    /// Ends the pipeline in good order, and the process with a failure.
    fn end(&self, verdict: &str) {
        // The first one is said.
        let _ = self.verdict.set(verdict.to_owned());
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Windows that may wait to be published: the stages before go on while a transaction is committed,
/// which takes 40 to 100 ms.
const BEFORE_PUBLISH: usize = 64;

/// How long the source may take to leave the group after another stage has failed.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs until `shared.stop` is set, the bounds are reached, or the schedule's period is over, and
/// everything in flight is committed. The first error of any stage is returned once the source has left the
/// group, with other stages still running: the process is to end.
pub fn run(settings: &Settings, task: Arc<Task>, topics: &Topics, shared: &Shared) -> Result<(), String> {
    describe(&task, shared);
    let (metrics, health) = (&shared.metrics, &shared.health);
    let decoder = decoder(settings).map_err(|e| e.to_string())?;
    let failed = Arc::new(AtomicBool::new(false));
    let commit_soon = Arc::new(CommitSoon::default());
    let source = Source::new(
        settings,
        source::Wiring {
            metrics: Arc::clone(metrics),
            health: Arc::clone(health),
            commit_soon: Arc::clone(&commit_soon),
            digest: task.digest.short().to_owned(),
            model: task.model_name.clone(),
            stop: Arc::clone(&shared.stop),
            failed: Arc::clone(&failed),
            drain: shared.drain.clone(),
            schedule: Arc::clone(&shared.schedule),
            revive: shared.revive.clone(),
            traced: shared.traces.is_some(),
            partitions: topics.input_partitions,
            bytes_per_record: task.bytes_per_record(),
        },
    )
    .map_err(|e| e.to_string())?;
    let (report, reports) = unbounded::<Report>();
    let publisher = Publisher::new(
        settings,
        sink::Context {
            metrics: Arc::clone(metrics),
            health: Arc::clone(health),
            commit_soon,
            group: source.group(),
            model: task.model_name.clone(),
            digest: task.digest.short().to_owned(),
            topics: topics.clone(),
            stop: Arc::clone(&shared.stop),
            traces: shared.traces.clone(),
        },
        report.clone(),
    )?;

    let (gathered, to_prepare) = bounded::<Queued<Window>>(1);
    let (prepared, to_infer) = bounded::<Queued<Prepared>>(1);
    let (inferred, to_encode) = bounded::<Queued<Inferred>>(1);
    let (encoded, to_publish) = bounded::<Queued<Encoded>>(BEFORE_PUBLISH);
    let (ended, ends) = unbounded();
    let stage = |name: &'static str, work: Box<dyn FnOnce() -> Result<(), String> + Send>| {
        let ended = ended.clone();
        std::thread::Builder::new()
            .name(format!("kandle-{name}"))
            .spawn(move || drop(ended.send((name, work()))))
            .map_err(|e| format!("thread {name}: {e}"))
    };
    let worker = Worker { task, shared: shared.clone() };
    let [preparer, inferrer, encoder] = [worker.clone(), worker.clone(), worker];
    stage("source", Box::new(move || source.serve(gathered, &reports).map_err(|e| e.to_string())))?;
    stage("prepare", Box::new(move || preparer.prepare_all(&*decoder, &to_prepare, &prepared)))?;
    stage("infer", Box::new(move || inferrer.infer_all(&to_infer, &inferred, report)))?;
    stage("encode", Box::new(move || encoder.encode_all(&to_encode, &encoded)))?;
    stage("publish", Box::new(move || publisher.serve(&to_publish)))?;
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
        return Err(format!("{name}: {error}"));
    }
    match shared.verdict.get() {
        None => Ok(()),
        Some(verdict) => Err(verdict.clone()),
    }
}

fn describe(task: &Task, shared: &Shared) {
    let labels = [&task.model_name, task.digest.short(), task.kind.name(), &task.device, &task.dtype];
    shared.metrics.model_info.with_label_values(&labels).set(1);
    shared.health.set_about(serde_json::json!({
        "model": task.model_name, "digest": task.digest.short(), "task": task.kind.name(),
        "device": task.device, "dtype": task.dtype,
    }));
    tracing::info!(
        model = task.model_name,
        digest = task.digest.short(),
        task = task.kind.name(),
        device = task.device,
        dtype = task.dtype,
        "model loaded"
    );
}

/// The stages that compute.
#[derive(Clone)]
pub struct Worker {
    pub task: Arc<Task>,
    pub shared: Shared,
}

/// How long the group may take to be told of suspects before the process ends without.
const FAREWELL: Duration = Duration::from_secs(30);

/// Records of a window that one core takes at a time.
const CHUNK: usize = 128;

impl Worker {
    fn prepare_all(
        &self,
        decoder: &dyn Decoder,
        windows: &Receiver<Queued<Window>>,
        prepared: &Sender<Queued<Prepared>>,
    ) -> Result<(), String> {
        for window in windows {
            self.shared.health.busy(Stage::Prepare);
            let window = self.prepare(decoder, window.take(&self.shared.metrics, "wait_decode"));
            self.shared.health.idle(Stage::Prepare);
            if prepared.send(Queued::new(window)).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// decode, prepare, plan.
    pub fn prepare(&self, decoder: &dyn Decoder, window: Window) -> Prepared {
        let started = Instant::now();
        let inputs: Vec<Option<Result<Input<'_>, RecordError>>> = window
            .records
            .par_iter()
            .with_min_len(CHUNK)
            .map(|record| window.value(record).map(|value| decoder.decode(value)))
            .collect();
        let decoded = self.observe("decode", started);
        let (mut states, mut includes, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        let mut plan = Plan::default();
        match &self.task.text {
            None => states.extend(inputs.into_iter().map(|input| match input {
                None => State::Tombstone,
                Some(Ok(_)) => State::Alive,
                Some(Err(error)) => State::Failed(error),
            })),
            Some(task) => {
                let all: Vec<(State, String, Option<Tokens>)> =
                    inputs.into_par_iter().with_min_len(8).map(|input| tokenize(task, input)).collect();
                let (mut total, mut cut) = (0, 0);
                for (state, include, mine) in all {
                    total += mine.as_ref().map_or(0, |t| t.ids.len());
                    cut += u64::from(mine.as_ref().is_some_and(|t| t.truncated));
                    states.push(state);
                    includes.push(include);
                    tokens.push(mine);
                }
                self.shared.metrics.tokens.inc_by(total as u64);
                self.shared.metrics.truncated.inc_by(cut);
                plan = task.engine.plan(&tokens, |i| window.records[i].suspect);
            }
        }
        self.observe("prepare", decoded);
        Prepared { window, states, includes, tokens, plan }
    }

    fn infer_all(
        &self,
        windows: &Receiver<Queued<Prepared>>,
        inferred: &Sender<Queued<Inferred>>,
        reports: Sender<Report>,
    ) -> Result<(), String> {
        let Some(task) = &self.task.text else {
            for window in windows {
                let Prepared { window, states, includes, .. } =
                    window.take(&self.shared.metrics, "wait_infer");
                let next = Inferred { window, states, includes, rows: Vec::new(), width: 0 };
                if inferred.send(Queued::new(next)).is_err() {
                    break;
                }
            }
            return Ok(());
        };
        let result = task.engine.serve(
            windows,
            |window| {
                let Prepared { window, states, includes, tokens, plan } =
                    window.take(&self.shared.metrics, "wait_infer");
                Request {
                    window: InFlight { window, states, includes, started: Instant::now() },
                    tokens,
                    plan,
                }
            },
            |Response {
                 window: InFlight { window, mut states, includes, started },
                 rows,
                 width,
                 failed,
                 lane_lost,
             }| {
                if lane_lost {
                    self.shared.end(
                        "the model did not come to an end on a record, which is a dead letter now: ending to start afresh",
                    );
                }
                for (record, error) in failed {
                    states[record as usize] = State::Failed(error);
                }
                self.observe("infer", started);
                inferred.send(Queued::new(Inferred { window, states, includes, rows, width })).is_ok()
            },
            |working| match working {
                true => self.shared.health.busy(Stage::Infer),
                false => self.shared.health.idle(Stage::Infer),
            },
        );
        result.map_err(|error| {
            if let EngineError::Hung { window: InFlight { window, .. }, records, .. } = &error {
                let position = |&i: &u32| window.position(&window.records[i as usize]);
                remember(records.iter().map(position).collect(), &reports);
            }
            error.to_string()
        })
    }

    fn encode_all(
        &self,
        windows: &Receiver<Queued<Inferred>>,
        encoded: &Sender<Queued<Encoded>>,
    ) -> Result<(), String> {
        for window in windows {
            self.shared.health.busy(Stage::Encode);
            failpoint::pass("encode");
            let window = self.encode(window.take(&self.shared.metrics, "wait_encode"));
            self.shared.health.idle(Stage::Encode);
            if encoded.send(Queued::new(window)).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Predictions to bytes.
    pub fn encode(&self, inferred: Inferred) -> Encoded {
        let started = Instant::now();
        let Inferred { window, states, includes, rows, width } = inferred;
        let (outcomes, memory) = match &self.task.text {
            None => (
                states.into_iter().map(|state| outcome(state, || Ok(Outcome::Unchanged))).collect(),
                Vec::new(),
            ),
            Some(task) => {
                let parts: Vec<(Vec<Outcome>, Vec<u8>)> = states
                    .into_par_iter()
                    .chunks(CHUNK)
                    .enumerate()
                    .map(|(part, chunk)| encode_part(task, part, chunk, &includes, &rows, width))
                    .collect();
                let (outcomes, memory): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
                (outcomes.into_iter().flatten().collect(), memory)
            }
        };
        self.observe("encode", started);
        Encoded { window, outcomes, memory }
    }

    /// Observes a stage's time and returns the present, where the next begins.
    fn observe(&self, stage: &str, started: Instant) -> Instant {
        let now = Instant::now();
        self.shared.metrics.stage.with_label_values(&[stage]).observe((now - started).as_secs_f64());
        now
    }
}

/// Has the group remember records whose forward did not come to an end, for the next start.
fn remember(positions: Vec<Position>, reports: &Sender<Report>) {
    let names: Vec<String> = positions.iter().map(Position::to_string).collect();
    tracing::error!(records = names.join(" "), "a forward over these records did not come to an end");
    let (kept, told) = bounded(1);
    if reports.send(Report::Suspects { positions, kept }).is_ok() {
        // Closed without a word, it was tried in vain, and the log says so.
        let _ = told.recv_timeout(FAREWELL);
    }
}

/// A window on the lanes.
#[derive(Debug)]
struct InFlight {
    window: Window,
    states: Vec<State>,
    includes: Vec<String>,
    started: Instant,
}

fn tokenize(
    task: &TextTask,
    input: Option<Result<Input<'_>, RecordError>>,
) -> (State, String, Option<Tokens>) {
    match input {
        None => (State::Tombstone, String::new(), None),
        Some(Err(error)) => (State::Failed(error), String::new(), None),
        Some(Ok(Input { text, include })) => match task.prepare(&text) {
            Ok(tokens) => (State::Alive, include, Some(tokens)),
            Err(error) => (State::Failed(error), String::new(), None),
        },
    }
}

/// The outcome of a record, which `predict` makes where it is alive.
fn outcome(state: State, predict: impl FnOnce() -> Result<Outcome, RecordError>) -> Outcome {
    match state {
        State::Tombstone => Outcome::Tombstone,
        State::Failed(error) => Outcome::Dead(error),
        State::Alive => predict().unwrap_or_else(Outcome::Dead),
    }
}

fn encode_part(
    task: &TextTask,
    part: usize,
    states: Vec<State>,
    includes: &[String],
    rows: &[f32],
    width: usize,
) -> (Vec<Outcome>, Vec<u8>) {
    let mut memory = Vec::new();
    let outcomes = states
        .into_iter()
        .enumerate()
        .map(|(i, state)| {
            let record = part * CHUNK + i;
            outcome(state, || {
                let start = memory.len();
                let written = task.write(&rows[record * width..][..width], &includes[record], &mut memory);
                if written.is_err() {
                    memory.truncate(start);
                }
                written.map(|()| Outcome::Prediction {
                    part: part as u32,
                    bytes: start as u32..memory.len() as u32,
                })
            })
        })
        .collect();
    (outcomes, memory)
}
