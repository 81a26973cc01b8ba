//! Settles a batch: every item of it gets an answer or a reason why it has none. A batch that does not fit the device is
//! halved and tried again; one that fails otherwise is bisected down to the item at fault, which is one only where the
//! device is healthy. Only a model that does not return cannot be settled here; see [`super::lanes`].

use std::time::Duration;

use super::lanes::{Abandoned, Done, Lane, Purpose, Run, Work};
use super::model::{Item, Model, RunError, Value};
use crate::ragged::Ragged;

/// Cost of the item that probes the device.
const PROBE: u32 = 8;

/// What ends the settling of a batch.
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

pub(super) fn settle<M: Model>(lane: &Lane<M>, work: Work<M>) -> Result<Done<M::Value>, Abandoned> {
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
    Ok(Done { window, items: batch.items, answers, failed, fatal, busy: Duration::ZERO })
}

struct Settling<'a, M: Model> {
    lane: &'a Lane<M>,
    /// Of the window.
    items: &'a [M::Item],
    window: u64,
    /// Of the batch, in its order, as far as it is settled.
    answers: Ragged<M::Value>,
    failed: Vec<(u32, String)>,
}

impl<M: Model> Settling<'_, M> {
    /// An item on which inference has timed out before: it is to blame only where the device is healthy.
    fn suspect(&mut self, items: &[u32]) -> Result<(), Stop> {
        self.probe()?;
        self.settle(items, Purpose::Suspect)
    }

    fn settle(&mut self, items: &[u32], purpose: Purpose) -> Result<(), Stop> {
        let device = &*self.lane.device;
        let batch: Vec<&M::Item> = items.iter().map(|&item| &self.items[item as usize]).collect();
        let cost: usize = batch.iter().map(|item| item.cost() as usize).sum();
        if items.len() > 1 && cost > device.budget.tokens() {
            // Planned before the budget shrank.
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
                    "the device is out of memory: halving the batch"
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

    /// One item did not fit: it is tried again while no other lane holds memory.
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
                self.fail(place, format!("an input of {cost} does not fit the device: {message}"));
                Ok(())
            }
        }
    }

    /// # Errors
    /// The device does not answer a plain item.
    fn probe(&self) -> Result<(), Stop> {
        let item = self.lane.device.model.sample(PROBE);
        match self.run(&[&item], &[], Purpose::Probe, false)? {
            Ok(_) => Ok(()),
            Err(error) => Err(Stop::Fatal(format!("the device fails on a plain item: {error}"))),
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
                self.failed.push((item, format!("the model's output has {bad} in it")));
            }
        }
        self.answers.append(answers);
    }

    fn fail(&mut self, item: u32, message: String) {
        self.failed.push((item, message));
        self.answers.push(&[]);
    }
}
