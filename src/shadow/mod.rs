//! The shadow: a second model that sees a share of the records, to compare it with the model before it takes over. Its
//! predictions go to a topic of their own.
//!
//! ```text
//! encode ─▶ shadow ─▶ publish          the model's windows pass through, unchanged
//!              │ copies of the records that the share holds, and the model's predictions of them
//!              ▼ within shadow.memory
//!           worker: the shadow's Compute ─▶ agreement ─▶ sink::SidePublisher ─▶ shadow.topic
//! ```
//!
//! `shadow` is a stage of the pipeline. Under `run` it never waits: what does not fit into `shadow.memory` is skipped and
//! counted. Under `drain` and `replay` it waits, so that the same records are predicted each time, and passes a window on
//! once the shadow's predictions of it are acknowledged, so that a job that is killed and run again lacks none. The worker
//! is a thread outside of the pipeline: whatever happens to it, the model's windows go on. It commits nothing and uses no
//! transaction, so after a restart some of its predictions are published again, and under `run` some may be missing.

mod agreement;
mod room;
mod worker;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, never, select, unbounded};

use crate::agreement::Comparer;
use crate::flow::{Encoded, Outcome, Queued};
use crate::record::Arrival;
use crate::settings::Settings;
use crate::share::Share;
use crate::task::{self, TaskError};
use crate::telemetry::Metrics;
use crate::window::{ClosedBy, Gatherer, Limits, Window};
use room::{Held, Room};
use worker::Worker;

/// How long the worker may take to finish once the pipeline was asked to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval between two looks at whether the pipeline was asked to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What became of the records that were chosen: the label of `kandle_shadow_records_total`, and their number.
pub fn records(metrics: &Metrics) -> [(&'static str, u64); 4] {
    ["predicted", "tombstone", "skipped", "failed"]
        .map(|outcome| (outcome, metrics.shadow_records.with_label_values(&[outcome]).get()))
}

/// Why there is no shadow.
#[derive(Debug, thiserror::Error)]
pub enum ShadowError {
    #[error(transparent)]
    Task(#[from] TaskError),
    #[error("the worker's thread cannot be started: {0}")]
    Thread(std::io::Error),
}

/// For each record, the bytes of the model's prediction; `None`: it has none.
type Predictions = Vec<Option<Box<[u8]>>>;

/// Records for the shadow, and what the model predicted.
struct Job {
    window: Window,
    model: Predictions,
    held: Held,
    /// Dropped when the job is done.
    pending: Sender<Infallible>,
}

/// A running shadow.
pub struct Shadow {
    jobs: Sender<Job>,
    /// Closes when the worker has ended.
    ended: Receiver<()>,
    room: Arc<Room>,
    share: Share,
    /// A drain or replay: nothing is skipped.
    bounded: bool,
    metrics: Arc<Metrics>,
    stop: Arc<AtomicBool>,
}

impl Shadow {
    /// Starts the shadow of the settings; `None` without one. `bounded`: a drain or replay, which loads the shadow's model
    /// first; `run` goes on meanwhile. `stop`: set when the process is asked to stop.
    ///
    /// # Errors
    /// `bounded`: the shadow's model cannot be loaded.
    pub fn start(
        settings: &Settings,
        bounded: bool,
        metrics: &Arc<Metrics>,
        stop: &Arc<AtomicBool>,
    ) -> Result<Option<Self>, ShadowError> {
        let Some(own) = settings.of_shadow() else { return Ok(None) };
        // The metrics of the pipeline are the model's.
        let of_compute = Arc::new(Metrics::new());
        let compute = match bounded {
            true => Some(task::load(&own, &of_compute)?),
            false => None,
        };
        let room = Arc::new(Room::new(settings.shadow.memory.0 as usize));
        let (jobs, queue) = unbounded();
        let (alive, ended) = unbounded();
        let worker = Worker {
            comparer: Comparer::new(&own.task),
            settings: own,
            bounded,
            of_compute,
            metrics: Arc::clone(metrics),
            stop: Arc::clone(stop),
            room: Arc::clone(&room),
        };
        std::thread::Builder::new()
            .name("kandle-shadow".to_owned())
            .spawn(move || {
                worker.serve(compute, &queue);
                drop(alive);
            })
            .map_err(ShadowError::Thread)?;
        // Known outcomes begin at zero.
        records(metrics);
        Ok(Some(Self {
            jobs,
            ended,
            room,
            share: Share::new(settings.shadow.share),
            bounded,
            metrics: Arc::clone(metrics),
            stop: Arc::clone(stop),
        }))
    }

    /// Passes windows on, in their order, and offers the shadow its share of them, until the channel closes or the receiver
    /// is gone. In a drain or replay, a window is passed on once the shadow is done with it. Afterwards, waits for the
    /// worker: as long as it takes in a drain or replay that comes to its end, else for [`STOP_TIMEOUT`].
    pub fn choose(self, windows: &Receiver<Queued<Encoded>>, passed: Sender<Queued<Encoded>>) {
        match self.bounded {
            true => self.pass_done(windows, &passed),
            false => self.pass_at_once(windows, &passed),
        }
        // The publisher does not wait for the shadow.
        drop(passed);
        self.finish();
    }

    fn pass_at_once(&self, windows: &Receiver<Queued<Encoded>>, passed: &Sender<Queued<Encoded>>) {
        for window in windows {
            self.offer(window.get());
            if passed.send(window).is_err() {
                return;
            }
        }
    }

    fn pass_done(&self, windows: &Receiver<Queued<Encoded>>, passed: &Sender<Queued<Encoded>>) {
        // The windows that are not passed on yet, each with a channel that closes when the shadow is done with it.
        let mut held: VecDeque<(Queued<Encoded>, Receiver<Infallible>)> = VecDeque::new();
        let closed = never();
        let mut open = true;
        let mut deadline = None;
        while open || !held.is_empty() {
            let done = held.front().map_or_else(never, |(_, done)| done.clone());
            let windows = if open { windows } else { &closed };
            let mut is_done = false;
            select! {
                recv(done) -> _ => is_done = true,
                recv(windows) -> window => match window {
                    Ok(window) => {
                        let done = self.offer(window.get());
                        held.push_back((window, done));
                    }
                    Err(_) => open = false,
                },
                default(POLL_INTERVAL) => {}
            }
            if deadline.is_none() && self.stop.load(Ordering::Relaxed) {
                deadline = Some(Instant::now() + STOP_TIMEOUT);
            }
            // What is predicted is published when the job is stopped, done or not.
            if (is_done || deadline.is_some_and(|deadline| Instant::now() >= deadline))
                && let Some((window, _)) = held.pop_front()
                && passed.send(window).is_err()
            {
                return;
            }
        }
    }

    /// Gives the shadow its share of a window. Returns a channel that closes when the shadow is done with it.
    fn offer(&self, encoded: &Encoded) -> Receiver<Infallible> {
        let (pending, done) = bounded(0);
        let Some((window, model)) = self.chosen(encoded) else { return done };
        let records = window.records.len() as u64;
        let bytes = window.load().bytes + model.iter().flatten().map(|bytes| bytes.len()).sum::<usize>();
        let held = match self.bounded {
            true => self.room.wait(bytes, || !self.stop.load(Ordering::Relaxed)),
            false => self.room.take(bytes),
        };
        let sent = held.is_some_and(|held| self.jobs.send(Job { window, model, held, pending }).is_ok());
        if !sent {
            self.metrics.shadow_records.with_label_values(&["skipped"]).inc_by(records);
        }
        self.metrics.memory.with_label_values(&["shadow"]).set(self.room.held() as i64);
        done
    }

    /// Copies of the records that the share holds; `None` if it holds none.
    fn chosen(&self, encoded: &Encoded) -> Option<(Window, Predictions)> {
        let all = &encoded.window;
        let mut gatherer = Gatherer::new(Limits::NONE);
        let mut model = Vec::new();
        for (record, outcome) in all.records.iter().zip(&encoded.outcomes) {
            if !self.share.holds(all.key(record), all.origin(record)) {
                continue;
            }
            let span = &all.spans[record.span as usize];
            let arrival = Arrival {
                offset: record.offset,
                timestamp: record.timestamp,
                key: all.key(record),
                value: all.value(record),
                headers: record.headers.clone(),
                suspect: record.suspect,
                origin: record.origin.clone(),
                trace: None,
                footprint: record.footprint,
                work: 0.0,
            };
            // Without limits, this returns no window.
            gatherer.push(&span.partition, &span.lease, arrival, record.arrived);
            model.push(match outcome {
                Outcome::Prediction { part, bytes } => Some(encoded.prediction(*part, bytes).into()),
                Outcome::Unchanged | Outcome::Tombstone | Outcome::Dead(_) => None,
            });
        }
        Some((gatherer.close(ClosedBy::End)?, model))
    }

    fn finish(self) {
        // The worker ends once it has done all its jobs.
        drop(self.jobs);
        let mut deadline = (!self.bounded).then(|| Instant::now() + STOP_TIMEOUT);
        while self.ended.recv_timeout(POLL_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            if deadline.is_none() && self.stop.load(Ordering::Relaxed) {
                deadline = Some(Instant::now() + STOP_TIMEOUT);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                tracing::warn!("the shadow did not finish in time: its last predictions are not published");
                return;
            }
        }
    }
}
