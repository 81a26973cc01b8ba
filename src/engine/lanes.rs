//! Lanes: threads that each run one batch at a time. A CPU has one per core. A GPU has two, whose batches run one after
//! the other: while the host waits for one, the next is queued. Lanes share a queue of batches.
//!
//! A thread cannot be killed. A lane whose model does not return is abandoned and replaced. If its thread returns
//! later, the result is discarded: a run checks under the lane's lock, when it ends, whether its lane was abandoned.

use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::budget::Budget;
use super::model::{Model, RunError};
use super::plan::Batch;
use super::settle::settle;
use crate::ragged::Ragged;
use crate::telemetry::Metrics;

/// A batch of a window, queued for the next free lane.
pub(super) struct Work<M: Model> {
    pub window: u64,
    /// All items of the window.
    pub items: Arc<Vec<M::Item>>,
    pub batch: Batch,
}

/// Result of a batch.
#[derive(Debug)]
pub(super) struct BatchResult<V> {
    pub window: u64,
    pub items: Vec<u32>,
    /// One answer per item, empty for a failed one.
    pub answers: Ragged<V>,
    /// Items at fault, each with its error message.
    pub failed: Vec<(u32, String)>,
    /// Error after which nothing more can be computed.
    pub fatal: Option<String>,
    /// Device time that the batch took.
    pub busy: Duration,
}

/// Why a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// For its answers.
    Answers,
    /// For the answer to an item on which inference timed out before.
    Suspect,
    /// To check with a known-good item that the device is healthy.
    Probe,
}

/// A run of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub purpose: Purpose,
    pub window: u64,
    pub items: Vec<u32>,
}

#[derive(Debug)]
enum State {
    Idle,
    Running { since: Instant, run: Run },
    Abandoned,
}

/// What the lanes share.
pub(super) struct Device<M> {
    pub model: Arc<M>,
    pub budget: Arc<Budget>,
    pub metrics: Arc<Metrics>,
    pub name: String,
    /// Read-locked by each run of the model, write-locked by a run that needs all of the device's memory.
    memory: RwLock<()>,
}

impl<M> Device<M> {
    pub fn new(model: Arc<M>, budget: Arc<Budget>, metrics: Arc<Metrics>, name: String) -> Self {
        Self { model, budget, metrics, name, memory: RwLock::default() }
    }
}

/// The lanes' threads. After a drop, each ends once its model returns.
pub(super) struct Lanes<M: Model> {
    work: Sender<Work<M>>,
    queue: Receiver<Work<M>>,
    done: Sender<BatchResult<M::Value>>,
    device: Arc<Device<M>>,
    count: usize,
    lanes: Vec<(JoinHandle<()>, Arc<Mutex<State>>)>,
}

impl<M: Model> Lanes<M> {
    /// Starts `count` lanes, which send their results over `done`.
    pub fn start(count: usize, device: Arc<Device<M>>, done: Sender<BatchResult<M::Value>>) -> Self {
        let (work, queue) = unbounded();
        let mut lanes = Self { work, queue, done, device, count, lanes: Vec::new() };
        for _ in 0..count {
            lanes.add();
        }
        lanes
    }

    fn add(&mut self) {
        let state = Arc::new(Mutex::new(State::Idle));
        let lane = Lane {
            device: Arc::clone(&self.device),
            state: Arc::clone(&state),
            share: 1.0 / self.count as f64,
        };
        let (queue, done) = (self.queue.clone(), self.done.clone());
        let thread = std::thread::Builder::new()
            .name(format!("kandle-lane-{}", self.lanes.len()))
            .spawn(move || lane.serve(&queue, &done))
            .expect("a thread can be started");
        self.lanes.push((thread, state));
    }

    pub fn run(&self, work: Work<M>) {
        // Cannot fail: `self.queue` is a receiver of this channel.
        let _ = self.work.send(work);
    }

    /// A run that has taken longer than `limit`: the index of its lane, when it began, and the run itself.
    pub fn timed_out(&self, limit: Duration) -> Option<(usize, Instant, Run)> {
        self.lanes.iter().enumerate().find_map(|(lane, (_, state))| match &*lock(state) {
            State::Running { since, run } if since.elapsed() > limit => Some((lane, *since, run.clone())),
            _ => None,
        })
    }

    /// Abandons a lane and starts a replacement. Returns false, and does neither, if the run that began at `began` has
    /// ended meanwhile.
    pub fn abandon(&mut self, lane: usize, began: Instant) -> bool {
        {
            let mut state = lock(&self.lanes[lane].1);
            if !matches!(&*state, State::Running { since, .. } if *since == began) {
                return false;
            }
            *state = State::Abandoned;
        }
        drop(self.lanes.swap_remove(lane));
        self.add();
        true
    }

    /// Waits until the lanes have run all queued batches.
    pub fn join(self) {
        drop(self.work);
        for (thread, _) in self.lanes {
            // A panic in a lane has already ended the process.
            let _ = thread.join();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|e| e.into_inner())
}

/// The lane was abandoned while its model ran; its result is discarded.
#[derive(Debug)]
pub(super) struct Abandoned;

/// One lane, as its thread sees it.
pub(super) struct Lane<M> {
    pub device: Arc<Device<M>>,
    state: Arc<Mutex<State>>,
    /// Fraction of the device's time that counts as this lane's.
    share: f64,
}

impl<M: Model> Lane<M> {
    fn serve(&self, queue: &Receiver<Work<M>>, done: &Sender<BatchResult<M::Value>>) {
        for work in queue {
            let started = Instant::now();
            let Ok(mut result) = settle(self, work) else { return };
            result.busy = started.elapsed().mul_f64(self.share);
            let busy = self.device.metrics.device_busy.with_label_values(&[&self.device.name]);
            busy.inc_by(result.busy.as_secs_f64());
            if done.send(result).is_err() {
                return;
            }
        }
    }

    /// Runs the model. `alone`: while no other lane runs, so that all of the device's memory is free.
    pub fn run(
        &self,
        batch: &[&M::Item],
        run: Run,
        alone: bool,
    ) -> Result<Result<Ragged<M::Value>, RunError>, Abandoned> {
        let memory = &self.device.memory;
        let (shared, exclusive) = match alone {
            false => (Some(memory.read().unwrap_or_else(|e| e.into_inner())), None),
            true => (None, Some(memory.write().unwrap_or_else(|e| e.into_inner()))),
        };
        // Only now: waiting for the lock is not inference time, so it cannot time out this lane.
        *lock(&self.state) = State::Running { since: Instant::now(), run };
        let result = self.device.model.run(batch);
        drop((shared, exclusive));
        let mut state = lock(&self.state);
        if matches!(*state, State::Abandoned) {
            return Err(Abandoned);
        }
        *state = State::Idle;
        Ok(result)
    }
}
