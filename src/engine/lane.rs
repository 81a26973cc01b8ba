//! Lanes: the threads on which batches run, one batch at a time each. A CPU has one a core, a
//! GPU two, whose batches run one after the other: while the host waits for one, the next is queued. Lanes
//! share a queue and nothing else.
//!
//! A failing batch is settled here: halved and tried again when the device is out of memory,
//! bisected down to the record at fault otherwise. One that does not come to an end cannot be settled
//! by its lane: [`Lanes::hung`] tells.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::budget::Budget;
use super::plan::Batch;
use crate::model::Tokens;
use crate::record::{Fault, RecordError};
use crate::telemetry::Metrics;

/// A model as lanes see it.
pub trait Forward: Send + Sync {
    /// Numbers per record.
    fn width(&self) -> usize;

    /// `[batch, width]`, row after row. A record's row does not depend on its neighbours.
    fn forward(&self, batch: &[&Tokens]) -> Result<Vec<f32>, ForwardError>;

    /// A batch that always works, unless the device does not.
    fn canary(&self) -> &Tokens;
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum ForwardError {
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// Perhaps one record's fault: bisection tells.
    #[error("{0}")]
    Batch(String),
    /// Nothing will work any more.
    #[error("the device failed: {0}")]
    Device(String),
}

/// A batch of a window, to be run by whichever lane is free.
pub(super) struct Work {
    pub window: u64,
    /// By place in the window; the batch's are there.
    pub tokens: Arc<Vec<Option<Tokens>>>,
    pub batch: Batch,
    pub done: Sender<Done>,
}

/// What became of a batch.
#[derive(Debug)]
pub(super) struct Done {
    pub window: u64,
    pub records: Vec<u32>,
    /// A row for each record, zeros for a failed one.
    pub rows: Vec<f32>,
    pub failed: Vec<(u32, RecordError)>,
    pub fatal: Option<String>,
    /// The work is one record.
    pub alone: bool,
}

/// A forward under way.
#[derive(Debug, Clone)]
pub(super) struct Forwarding {
    pub since: Instant,
    pub window: u64,
    pub records: Vec<u32>,
    /// The whole work is this one record: planned alone, not bisected down to it.
    pub alone: bool,
}

type Slot = Arc<Mutex<Option<Forwarding>>>;

/// The threads; they end when the last sender of work is gone.
pub(super) struct Lanes {
    pub work: Sender<Work>,
    queue: Receiver<Work>,
    lanes: Vec<(JoinHandle<()>, Slot)>,
    make: Box<dyn Fn() -> Lane>,
}

impl Lanes {
    pub fn start(
        count: usize,
        device: &str,
        model: Arc<dyn Forward>,
        budget: Arc<Budget>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (work, queue) = unbounded::<Work>();
        let device = device.to_owned();
        let make = Box::new(move || Lane {
            model: Arc::clone(&model),
            budget: Arc::clone(&budget),
            metrics: Arc::clone(&metrics),
            device: device.clone(),
            share: 1.0 / count as f64,
            slot: Slot::default(),
        });
        let mut lanes = Self { work, queue, lanes: Vec::new(), make };
        for _ in 0..count {
            lanes.add();
        }
        lanes
    }

    fn add(&mut self) {
        let lane = (self.make)();
        let (slot, queue) = (Arc::clone(&lane.slot), self.queue.clone());
        let thread = std::thread::Builder::new()
            .name(format!("kandle-lane-{}", self.lanes.len()))
            .spawn(move || lane.run(&queue))
            .expect("a thread can be started");
        self.lanes.push((thread, slot));
    }

    /// A forward that has taken longer than `limit`, and the number of its lane.
    pub fn hung(&self, limit: Duration) -> Option<(usize, Forwarding)> {
        self.lanes.iter().enumerate().find_map(|(i, (_, slot))| {
            let slot = slot.lock().unwrap_or_else(|e| e.into_inner());
            slot.as_ref().filter(|forwarding| forwarding.since.elapsed() > limit).map(|f| (i, f.clone()))
        })
    }

    /// Leaves a lane behind, which no thread can be stopped by force for, and puts another in its place.
    pub fn replace(&mut self, lane: usize) {
        drop(self.lanes.swap_remove(lane));
        self.add();
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

struct Lane {
    model: Arc<dyn Forward>,
    budget: Arc<Budget>,
    metrics: Arc<Metrics>,
    device: String,
    /// Of the device's time.
    share: f64,
    /// What it is at.
    slot: Slot,
}

impl Lane {
    fn run(&self, queue: &Receiver<Work>) {
        for work in queue {
            let mut done = Done {
                window: work.window,
                alone: work.batch.records.len() == 1,
                rows: Vec::with_capacity(work.batch.records.len() * self.model.width()),
                records: work.batch.records,
                failed: Vec::new(),
                fatal: None,
            };
            let started = Instant::now();
            let records = std::mem::take(&mut done.records);
            if let Err(fatal) = self.settle(&work.tokens, &records, &mut done) {
                done.fatal = Some(fatal);
            }
            done.records = records;
            self.busy(started.elapsed());
            if work.done.send(done).is_err() {
                return;
            }
        }
    }

    fn busy(&self, time: Duration) {
        self.metrics.device_busy.with_label_values(&[&self.device]).inc_by(time.as_secs_f64() * self.share);
    }

    fn forward(&self, batch: &[&Tokens], records: &[u32], done: &Done) -> Result<Vec<f32>, ForwardError> {
        let forwarding = Forwarding {
            since: Instant::now(),
            window: done.window,
            records: records.to_vec(),
            alone: done.alone,
        };
        *self.slot.lock().unwrap_or_else(|e| e.into_inner()) = Some(forwarding);
        let result = self.model.forward(batch);
        *self.slot.lock().unwrap_or_else(|e| e.into_inner()) = None;
        result
    }

    /// Rows for all of `records`, whatever it takes; an error ends the process.
    fn settle(&self, tokens: &[Option<Tokens>], records: &[u32], done: &mut Done) -> Result<(), String> {
        let batch: Vec<&Tokens> = records
            .iter()
            .map(|&i| tokens[i as usize].as_ref().expect("a planned record has tokens"))
            .collect();
        let total: usize = batch.iter().map(|t| t.ids.len()).sum();
        if records.len() > 1 && total > self.budget.tokens() {
            // Planned before the budget shrank.
            return self.halves(tokens, records, done);
        }
        match self.forward(&batch, records, done) {
            Ok(rows) => {
                self.budget.fitted();
                self.metrics.batch_records.observe(records.len() as f64);
                self.metrics.batch_tokens.observe(total as f64);
                self.metrics.batch_padding.observe(0.0);
                self.keep(records, rows, done);
                Ok(())
            }
            Err(ForwardError::Device(message)) => Err(message),
            Err(ForwardError::OutOfMemory(message)) => {
                if records.len() == 1 {
                    return Err(format!("one record of {total} tokens does not fit the device: {message}"));
                }
                self.metrics.oom_splits.with_label_values(&["forward"]).inc();
                self.budget.shrink(total);
                tracing::warn!(
                    tokens = total,
                    budget = self.budget.tokens(),
                    message,
                    "the device is out of memory: halving the batch"
                );
                self.halves(tokens, records, done)
            }
            Err(ForwardError::Batch(message)) if records.len() == 1 => {
                if let Err(e) = self.model.forward(&[self.model.canary()]) {
                    return Err(format!("even a plain text fails: {e}"));
                }
                self.fail(records[0], message, done);
                Ok(())
            }
            Err(ForwardError::Batch(message)) => {
                self.metrics.bisections.with_label_values(&["forward"]).inc();
                tracing::debug!(records = records.len(), message, "a batch failed: bisecting it");
                self.halves(tokens, records, done)
            }
        }
    }

    fn halves(&self, tokens: &[Option<Tokens>], records: &[u32], done: &mut Done) -> Result<(), String> {
        let (left, right) = records.split_at(records.len() / 2);
        self.settle(tokens, left, done)?;
        self.settle(tokens, right, done)
    }

    fn keep(&self, records: &[u32], rows: Vec<f32>, done: &mut Done) {
        let width = self.model.width();
        for (row, &record) in rows.chunks_exact(width).zip(records) {
            if let Some(bad) = row.iter().find(|x| !x.is_finite()) {
                done.failed.push((
                    record,
                    RecordError::new(Fault::Infer, format!("the model's output has {bad} in it")),
                ));
            }
        }
        done.rows.extend(rows);
    }

    fn fail(&self, record: u32, message: String, done: &mut Done) {
        done.failed.push((record, RecordError::new(Fault::Infer, message)));
        done.rows.resize(done.rows.len() + self.model.width(), 0.0);
    }
}
