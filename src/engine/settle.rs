//! Settles a batch: each of its items gets an answer or an error. A batch that does not fit the device's memory is
//! halved and retried. A batch that fails otherwise is bisected down to the item at fault; that item is blamed only
//! after a probe has shown that the device is healthy. For a model that never returns see [`super::lanes`].

use std::time::Duration;

use super::lanes::{Abandoned, BatchResult, Lane, Purpose, Run, Work};
use super::model::{Item, Model, RunError, Value};
use crate::ragged::Ragged;

/// Cost of the item that probes the device.
const PROBE: u32 = 8;

/// Why a batch cannot be settled.
enum Stop {
    Abandoned,
    /// Nothing more can be computed.
    Fatal(String),
}

impl From<Abandoned> for Stop {
    fn from(_: Abandoned) -> Self {
        Self::Abandoned
    }
}

pub(super) fn settle<M: Model>(lane: &Lane<M>, work: Work<M>) -> Result<BatchResult<M::Value>, Abandoned> {
    let Work { window, items, batch } = work;
    let mut settling = Settling {
        lane,
        items: &items,
        window,
        answers: Ragged::with_capacity(batch.items.len(), 0),
        failed: Vec::new(),
    };
    let result = match batch.suspect {
        true => settling.suspect(&batch.items),
        false => settling.settle(&batch.items, Purpose::Answers),
    };
    let fatal = match result {
        Ok(()) => None,
        Err(Stop::Fatal(message)) => Some(message),
        Err(Stop::Abandoned) => return Err(Abandoned),
    };
    let Settling { answers, failed, .. } = settling;
    Ok(BatchResult { window, items: batch.items, answers, failed, fatal, busy: Duration::ZERO })
}

struct Settling<'a, M: Model> {
    lane: &'a Lane<M>,
    /// All items of the window.
    items: &'a [M::Item],
    window: u64,
    /// Answers to the items settled so far, in the order of the batch.
    answers: Ragged<M::Value>,
    failed: Vec<(u32, String)>,
}

impl<M: Model> Settling<'_, M> {
    /// Settles an item on which inference timed out before. Probes the device first: only if it is healthy can the item
    /// be at fault.
    fn suspect(&mut self, items: &[u32]) -> Result<(), Stop> {
        self.probe()?;
        self.settle(items, Purpose::Suspect)
    }

    fn settle(&mut self, items: &[u32], purpose: Purpose) -> Result<(), Stop> {
        let device = &*self.lane.device;
        let batch: Vec<&M::Item> = items.iter().map(|&item| &self.items[item as usize]).collect();
        let cost: usize = batch.iter().map(|item| item.cost() as usize).sum();
        if items.len() > 1 && cost > device.budget.tokens() {
            // The batch was planned before the budget shrank.
            return self.halves(items, purpose);
        }
        match self.run(&batch, items, purpose, false)? {
            Ok(answers) => {
                device.budget.fitted();
                device.metrics.batch_records.observe(items.len() as f64);
                device.metrics.batch_tokens.observe(cost as f64);
                self.keep(items, &answers);
                Ok(())
            }
            Err(RunError::Device(message)) => Err(Stop::Fatal(message)),
            Err(RunError::OutOfMemory(message)) => {
                let cause = if items.len() > 1 { "batch" } else { "item" };
                device.metrics.oom_splits.with_label_values(&[cause]).inc();
                device.budget.shrink(cost);
                tracing::warn!(
                    cost,
                    budget = device.budget.tokens(),
                    message,
                    "the device is out of memory: halving the batch, or retrying its only item alone"
                );
                match items {
                    [item] => self.too_large(*item, batch[0], purpose),
                    _ => self.halves(items, purpose),
                }
            }
            Err(RunError::Batch(message)) => {
                if let [item] = items {
                    self.probe()?;
                    self.fail(*item, message);
                    return Ok(());
                }
                device.metrics.bisections.inc();
                tracing::debug!(items = items.len(), message, "a batch failed: bisecting it");
                self.halves(items, purpose)
            }
        }
    }

    fn halves(&mut self, items: &[u32], purpose: Purpose) -> Result<(), Stop> {
        let (left, right) = items.split_at(items.len() / 2);
        self.settle(left, purpose)?;
        self.settle(right, purpose)
    }

    /// A single item did not fit: retries it while no other lane holds memory.
    fn too_large(&mut self, place: u32, item: &M::Item, purpose: Purpose) -> Result<(), Stop> {
        match self.run(&[item], &[place], purpose, true)? {
            Ok(answers) => {
                self.keep(&[place], &answers);
                Ok(())
            }
            Err(RunError::Device(message)) => Err(Stop::Fatal(message)),
            Err(RunError::Batch(message) | RunError::OutOfMemory(message)) => {
                self.probe()?;
                let cost = item.cost();
                self.fail(place, format!("an input of cost {cost} does not fit the device: {message}"));
                Ok(())
            }
        }
    }

    /// Runs a known-good item.
    ///
    /// # Errors
    /// The device fails on it.
    fn probe(&self) -> Result<(), Stop> {
        let item = self.lane.device.model.sample(PROBE);
        match self.run(&[&item], &[], Purpose::Probe, false)? {
            Ok(_) => Ok(()),
            Err(error) => Err(Stop::Fatal(format!("the device fails on a known-good probe input: {error}"))),
        }
    }

    fn run(
        &self,
        batch: &[&M::Item],
        items: &[u32],
        purpose: Purpose,
        alone: bool,
    ) -> Result<Result<Ragged<M::Value>, RunError>, Stop> {
        let run = Run { purpose, window: self.window, items: items.to_vec() };
        Ok(self.lane.run(batch, run, alone)?)
    }

    fn keep(&mut self, items: &[u32], answers: &Ragged<M::Value>) {
        for (&item, answer) in items.iter().zip(answers.iter()) {
            if let Some(bad) = answer.iter().find(|value| !value.is_valid()) {
                self.failed.push((item, format!("the model's output contains {bad}")));
            }
        }
        self.answers.append(answers);
    }

    fn fail(&mut self, item: u32, message: String) {
        self.failed.push((item, message));
        self.answers.push(&[]);
    }
}
