//! The windows on the lanes and the progress of each. Pure.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::answers::Answers;
use super::lanes::BatchResult;
use super::model::{Item, Value};
use super::plan::Batch;
use super::reuse::Cache;
use super::{Plan, Response};
use crate::ragged::Ragged;

/// Open windows, in the order they came. They leave in the same order.
pub(super) struct Windows<W, I, V: Value> {
    open: VecDeque<Open<W, I, V>>,
}

struct Open<W, I, V: Value> {
    id: u64,
    /// Batches not yet done.
    left: usize,
    items: Arc<Vec<I>>,
    duplicates: Vec<(u32, u32)>,
    started: Instant,
    response: Response<W, V>,
}

impl<W, I: Item, V: Value> Windows<W, I, V> {
    pub fn new() -> Self {
        Self { open: VecDeque::new() }
    }

    pub fn len(&self) -> usize {
        self.open.len()
    }

    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Opens a window and returns its batches, which the caller runs.
    pub fn open(
        &mut self,
        id: u64,
        window: W,
        items: Arc<Vec<I>>,
        plan: Plan<V>,
        now: Instant,
    ) -> Vec<Batch> {
        let mut answers = Answers::new(items.len());
        let mut cached = Ragged::with_capacity(plan.cached.len(), 0);
        plan.cached.iter().for_each(|(_, answer)| cached.push(answer));
        answers.add(plan.cached.iter().map(|(item, _)| *item), cached);
        let response =
            Response { window, answers, failed: Vec::new(), lane_abandoned: false, busy: Duration::ZERO };
        let (left, duplicates) = (plan.batches.len(), plan.duplicates);
        self.open.push_back(Open { id, left, items, duplicates, started: now, response });
        plan.batches
    }

    fn find(&mut self, id: u64) -> Option<&mut Open<W, I, V>> {
        self.open.iter_mut().find(|open| open.id == id)
    }

    /// Stores the result of a batch, and adds its answers to the cache.
    pub fn done(&mut self, done: BatchResult<V>, cache: Option<&Cache<V>>) {
        let Some(open) = self.find(done.window) else { return };
        if let Some(cache) = cache {
            let failed = |item: u32| done.failed.iter().any(|(failed, _)| *failed == item);
            for (&item, answer) in
                done.items.iter().zip(done.answers.iter()).filter(|(item, _)| !failed(**item))
            {
                cache.insert(&open.items[item as usize], answer);
            }
        }
        open.response.answers.add(done.items.into_iter(), done.answers);
        open.response.failed.extend(done.failed);
        open.response.busy += done.busy;
        open.left -= 1;
    }

    /// A suspect timed out again and its lane was abandoned: the batch is done and its item has failed.
    pub fn abandoned(&mut self, id: u64, items: &[u32], limit: Duration) {
        let Some(open) = self.find(id) else { return };
        let message = || format!("inference on this record alone exceeded batch.timeout ({limit:?}) twice");
        open.response.failed.extend(items.iter().map(|&item| (item, message())));
        open.response.lane_abandoned = true;
        open.left -= 1;
    }

    /// Removes a window that cannot be completed. Returns it with `items` and their duplicates.
    pub fn give_up(&mut self, id: u64, mut items: Vec<u32>) -> Option<(W, Vec<u32>)> {
        let at = self.open.iter().position(|open| open.id == id)?;
        let open = self.open.remove(at)?;
        let equal = open.duplicates.iter().filter(|(_, first)| items.contains(first));
        let equal: Vec<u32> = equal.map(|(item, _)| *item).collect();
        items.extend(equal);
        Some((open.response.window, items))
    }

    /// Takes the next window and how long it took, if all its batches are done. Duplicates get the answer or the
    /// failure of the item that was computed for them.
    pub fn take(&mut self, now: Instant) -> Option<(Response<W, V>, Duration)> {
        if self.open.front()?.left > 0 {
            return None;
        }
        let Open { duplicates, started, mut response, .. } = self.open.pop_front()?;
        let failed: HashMap<u32, String> = response.failed.iter().cloned().collect();
        for (item, first) in duplicates {
            response.answers.copy(item, first);
            response.failed.extend(failed.get(&first).map(|message| (item, message.clone())));
        }
        Some((response, now.saturating_duration_since(started)))
    }
}
