//! Lanes: the threads that run batches, one at a time each. A CPU has one a core; a GPU has two, whose batches run one
//! after the other, so that while the host waits for one the next is queued. Lanes share a queue of batches.
//!
//! A thread cannot be stopped by force. A lane whose model does not return is abandoned: another takes its place, and
//! whatever its thread does later reaches nobody, because every run begins and ends under the lane's lock.

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

/// A batch of a window, to be run by whichever lane is free.
pub(super) struct Work<M: Model> {
    pub window: u64,
    /// Of the whole window.
    pub items: Arc<Vec<M::Item>>,
    pub batch: Batch,
}

/// What became of a batch.
#[derive(Debug)]
pub(super) struct Done<V> {
    pub window: u64,
    pub items: Vec<u32>,
    /// One for each item, empty for a failed one.
    pub answers: Ragged<V>,
    /// Items at fault, and what is wrong with each.
    pub failed: Vec<(u32, String)>,
    /// Nothing more can be computed.
    pub fatal: Option<String>,
    /// Of the device's time.
    pub busy: Duration,
}

/// Why a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// For its answers.
    Answers,
    /// For the answer of an item on which inference has timed out before.
    Suspect,
    /// To see whether the device is healthy: with a plain item.
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

/// What the lanes have in common.
pub(super) struct Device<M> {
    pub model: Arc<M>,
    pub budget: Arc<Budget>,
    pub metrics: Arc<Metrics>,
    pub name: String,
    /// Held for reading while a model runs, for writing by whoever needs all of the device's memory.
    memory: RwLock<()>,
}

impl<M> Device<M> {
    pub fn new(model: Arc<M>, budget: Arc<Budget>, metrics: Arc<Metrics>, name: String) -> Self {
        Self { model, budget, metrics, name, memory: RwLock::default() }
    }
}

/// The threads. They end when this is dropped, or once their model returns.
pub(super) struct Lanes<M: Model> {
    work: Sender<Work<M>>,
    queue: Receiver<Work<M>>,
    done: Sender<Done<M::Value>>,
    device: Arc<Device<M>>,
    count: usize,
    lanes: Vec<(JoinHandle<()>, Arc<Mutex<State>>)>,
}

impl<M: Model> Lanes<M> {
    /// Results come over `done`.
    pub fn start(count: usize, device: Arc<Device<M>>, done: Sender<Done<M::Value>>) -> Self {
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
        // This end holds a receiver too.
        let _ = self.work.send(work);
    }

    /// A run that has taken longer than `limit`: the number of its lane, and when it began.
    pub fn timed_out(&self, limit: Duration) -> Option<(usize, Instant, Run)> {
        self.lanes.iter().enumerate().find_map(|(lane, (_, state))| match &*lock(state) {
            State::Running { since, run } if since.elapsed() > limit => Some((lane, *since, run.clone())),
            _ => None,
        })
    }

    /// Abandons a lane that is still at the run that began then, and starts another; false where it has ended meanwhile.
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

    /// Waits for the lanes to finish what they have.
    pub fn join(self) {
        drop(self.work);
        for (thread, _) in self.lanes {
            // A panic has ended the process already.
            let _ = thread.join();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|e| e.into_inner())
}

/// The lane was abandoned while its model ran: nobody waits for it.
#[derive(Debug)]
pub(super) struct Abandoned;

/// One lane, as its thread sees it.
pub(super) struct Lane<M> {
    pub device: Arc<Device<M>>,
    state: Arc<Mutex<State>>,
    /// Of the device's time.
    share: f64,
}

impl<M: Model> Lane<M> {
    fn serve(&self, queue: &Receiver<Work<M>>, done: &Sender<Done<M::Value>>) {
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

    /// Runs the model. `alone`: while no other lane does, so that all of the device's memory is free.
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
        // A lane that waits is not abandoned: the one that it waits for is.
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
