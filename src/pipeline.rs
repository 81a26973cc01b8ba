//! The one place where the stages are wired. Read this first.
//!
//! ```text
//! source ─▶ prepare ─▶ infer ─▶ encode ─▶ publish ─┐
//!    ▲      decode,    plan's    JSON     Kafka,   │
//!    │      tokenise,  batches            acks     │
//!    │      plan       on lanes                    │
//!    └────────────── published: commit ◀───────────┘
//! ```
//!
//! Every stage is a thread of its own that takes a window, works on it and hands it on over a
//! channel with room for one; a full channel holds up the stage before it, and in the end the
//! source, which pauses its partitions. The end comes the same way: the source drops its sender,
//! and each stage ends when the channel before it is closed and empty.
//!
//! Records are gathered as they come and decoded by the window: the thread that polls Kafka does
//! nothing but copy, and decoding runs on all cores.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use rayon::prelude::*;

use crate::cluster::Topics;
use crate::codec::{Decoder, Input, decoder};
use crate::engine::{Request, Response};
use crate::flow::{Encoded, Inferred, Outcome, Ownership, Prepared, Published, Queued, State};
use crate::model::Tokens;
use crate::record::RecordError;
use crate::settings::Settings;
use crate::sink::{self, Publisher};
use crate::source::{self, Source};
use crate::task::{Task, TextTask};
use crate::telemetry::health::Stage;
use crate::telemetry::{Health, Metrics};
use crate::window::Window;

/// What a pipeline shares with the rest of the process.
#[derive(Clone)]
pub struct Shared {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    /// Set from outside to end the pipeline in good order.
    pub stop: Arc<AtomicBool>,
}

impl Shared {
    pub fn new(settings: &Settings) -> Self {
        Self {
            metrics: Arc::new(Metrics::new()),
            health: Arc::new(Health::new(settings.server.stall_after.0)),
            stop: Arc::new(AtomicBool::new(false)),
        }
    }
}

/// Runs until `shared.stop` is set and everything in flight is committed. The first error of any
/// stage is returned at once, with other stages still running: the process is to end.
pub fn run(settings: &Settings, task: Arc<Task>, topics: &Topics, shared: &Shared) -> Result<(), String> {
    describe(&task, shared);
    let (metrics, health) = (&shared.metrics, &shared.health);
    let decoder = decoder(settings).map_err(|e| e.to_string())?;
    let ownership = Arc::new(Ownership::default());
    let source = Source::new(
        settings,
        source::Wiring {
            metrics: Arc::clone(metrics),
            health: Arc::clone(health),
            ownership: Arc::clone(&ownership),
            digest: task.digest.short().to_owned(),
            model: task.model_name.clone(),
            stop: Arc::clone(&shared.stop),
        },
    )
    .map_err(|e| e.to_string())?;
    let publisher = Publisher::new(
        settings,
        sink::Wiring {
            metrics: Arc::clone(metrics),
            health: Arc::clone(health),
            ownership,
            model: task.model_name.clone(),
            digest: task.digest.short().to_owned(),
            topics: *topics,
        },
    )
    .map_err(|e| format!("the producer cannot be made: {e}"))?;

    let (gathered, to_prepare) = bounded::<Queued<Window>>(1);
    let (prepared, to_infer) = bounded::<Queued<Prepared>>(1);
    let (inferred, to_encode) = bounded::<Queued<Inferred>>(1);
    let (encoded, to_publish) = bounded::<Queued<Encoded>>(1);
    let (published, done) = unbounded::<Published>();

    let (ended, ends) = unbounded();
    let stage = |name: &'static str, work: Box<dyn FnOnce() -> Result<(), String> + Send>| {
        let ended = ended.clone();
        std::thread::Builder::new()
            .name(format!("kandle-{name}"))
            .spawn(move || drop(ended.send((name, work()))))
            .map_err(|e| format!("thread {name}: {e}"))
    };
    let cores = Worker { task: Arc::clone(&task), metrics: Arc::clone(metrics), health: Arc::clone(health) };
    let [preparer, inferrer, encoder] = [cores.clone(), cores.clone(), cores];
    stage("source", Box::new(move || source.serve(gathered, &done).map_err(|e| e.to_string())))?;
    stage("prepare", Box::new(move || preparer.prepare_all(&*decoder, &to_prepare, &prepared)))?;
    stage("infer", Box::new(move || inferrer.infer_all(&to_infer, &inferred)))?;
    stage("encode", Box::new(move || encoder.encode_all(&to_encode, &encoded)))?;
    stage("publish", Box::new(move || publisher.serve(&to_publish, &published)))?;
    drop(ended);
    for (name, result) in ends {
        result.map_err(|e| format!("{name}: {e}"))?;
    }
    Ok(())
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
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
}

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
            self.health.busy(Stage::Prepare);
            let window = self.prepare(decoder, window.take(&self.metrics, "wait_decode"));
            self.health.idle(Stage::Prepare);
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
        let (mut states, mut includes, mut tokens, mut batches) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
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
                self.metrics.tokens.inc_by(total as u64);
                self.metrics.truncated.inc_by(cut);
                batches = task.engine.plan(&tokens);
            }
        }
        self.observe("prepare", decoded);
        Prepared { window, states, includes, tokens, batches }
    }

    fn infer_all(
        &self,
        windows: &Receiver<Queued<Prepared>>,
        inferred: &Sender<Queued<Inferred>>,
    ) -> Result<(), String> {
        let Some(task) = &self.task.text else {
            for window in windows {
                let Prepared { window, states, includes, .. } = window.take(&self.metrics, "wait_infer");
                let next = Inferred { window, states, includes, rows: Vec::new(), width: 0 };
                if inferred.send(Queued::new(next)).is_err() {
                    break;
                }
            }
            return Ok(());
        };
        task.engine.serve(
            windows,
            |window| {
                let Prepared { window, states, includes, tokens, batches } =
                    window.take(&self.metrics, "wait_infer");
                Request {
                    window: InFlight { window, states, includes, started: Instant::now() },
                    tokens,
                    batches,
                }
            },
            |Response { window: InFlight { window, mut states, includes, started }, rows, width, failed }| {
                for (record, error) in failed {
                    states[record as usize] = State::Failed(error);
                }
                self.observe("infer", started);
                inferred.send(Queued::new(Inferred { window, states, includes, rows, width })).is_ok()
            },
            |working| match working {
                true => self.health.busy(Stage::Infer),
                false => self.health.idle(Stage::Infer),
            },
        )
    }

    fn encode_all(
        &self,
        windows: &Receiver<Queued<Inferred>>,
        encoded: &Sender<Queued<Encoded>>,
    ) -> Result<(), String> {
        for window in windows {
            self.health.busy(Stage::Encode);
            let window = self.encode(window.take(&self.metrics, "wait_encode"));
            self.health.idle(Stage::Encode);
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
        self.metrics.stage.with_label_values(&[stage]).observe((now - started).as_secs_f64());
        now
    }
}

/// A window on the lanes.
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
