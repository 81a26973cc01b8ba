//! The stages of a task without Kafka: the caller is source and sink. For what measures a task as `run` works it, with
//! decoding, inference and encoding of different windows side by side.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_channel::{bounded, unbounded};

use super::{Compute, ComputeError, StageContext};
use crate::flow::{Encoded, Queued};
use crate::telemetry::Health;
use crate::watch::Observer;
use crate::window::Window;

/// Encoded windows that may wait for the caller, as many as wait for the publisher in `run`.
const BEFORE_CALLER: usize = 64;

/// Why not all windows were answered.
#[derive(Debug, thiserror::Error)]
pub enum DetachedError {
    #[error("infer: {0}")]
    Compute(#[from] ComputeError),
    #[error("thread {name}: {error}")]
    Thread { name: &'static str, error: std::io::Error },
    /// A stage would have ended the process for this reason.
    #[error("{0}")]
    Verdict(String),
}

/// Sends windows through the task's stages and passes what comes out to `each`, in the same order, on the calling thread.
/// `windows` is asked on a thread of its own for the next window, as soon as the stages have room for it. Returns when it has
/// no more windows and all are answered, or when `each` breaks.
///
/// # Errors
/// A stage fails, or a thread cannot be started.
pub fn answer_all(
    compute: &Arc<dyn Compute>,
    windows: impl Iterator<Item = Window> + Send,
    mut each: impl FnMut(Encoded) -> ControlFlow<()>,
) -> Result<(), DetachedError> {
    let (gathered, to_stages) = bounded(1);
    let (to_caller, encoded) = bounded::<Queued<Encoded>>(BEFORE_CALLER);
    // Nobody listens: there is no group to tell of suspects.
    let (reports, _) = unbounded();
    let (verdict, stop) = (Arc::new(OnceLock::new()), Arc::new(AtomicBool::new(false)));
    let end = {
        let (verdict, stop) = (Arc::clone(&verdict), Arc::clone(&stop));
        Arc::new(move |reason: &str| {
            // The first reason is the one reported.
            let _ = verdict.set(reason.to_owned());
            stop.store(true, Ordering::Relaxed);
        })
    };
    let health = Arc::new(Health::new(Duration::MAX));
    let context = StageContext {
        windows: to_stages,
        encoded: to_caller,
        reports,
        health,
        observer: Observer::default(),
        stop: Arc::clone(&stop),
        end,
    };
    let stages = Arc::clone(compute).stages(context);
    std::thread::scope(|scope| {
        let mut threads = Vec::with_capacity(stages.len());
        for stage in stages {
            let (name, work) = (stage.name, stage.work);
            let thread = std::thread::Builder::new().name(format!("kandle-{name}"));
            let started = thread.spawn_scoped(scope, work);
            threads.push(started.map_err(|error| DetachedError::Thread { name, error })?);
        }
        let feed = move || {
            for window in windows {
                if stop.load(Ordering::Relaxed) || gathered.send(Queued::new(window)).is_err() {
                    break;
                }
            }
        };
        let feeder = std::thread::Builder::new().name("kandle-source".to_owned());
        feeder.spawn_scoped(scope, feed).map_err(|error| DetachedError::Thread { name: "source", error })?;
        for window in &encoded {
            if each(window.into_inner()).is_break() {
                break;
            }
        }
        // Stages end when nobody takes what they have.
        drop(encoded);
        for thread in threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        match verdict.get() {
            None => Ok(()),
            Some(reason) => Err(DetachedError::Verdict(reason.clone())),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::lease::Lease;
    use crate::record::{Arrival, Partition};
    use crate::settings::{self, Sources};
    use crate::task;
    use crate::telemetry::Metrics;
    use crate::window::{ClosedBy, Gatherer, Limits};

    fn compute() -> Arc<dyn Compute> {
        let set = [
            "kafka.brokers=none:1",
            "input.topics=in",
            "input.group=g",
            "input.format=text",
            "task.kind=dummy",
            "output.topic=out",
            "dead_letters.topic=dead",
        ];
        let sources = Sources { set: set.map(str::to_owned).to_vec(), ..Sources::default() };
        let settings = settings::load(&sources).unwrap_or_else(|faults| panic!("{faults:?}")).settings;
        task::load(&settings, &Arc::new(Metrics::new())).expect("dummy")
    }

    /// Endless windows of one record each.
    fn windows() -> impl Iterator<Item = Window> + Send {
        let (mut gatherer, lease) = (Gatherer::new(Limits::NONE), Lease::new(0));
        (0..).map(move |offset| {
            let text = format!("{} bee", "e".repeat(offset as usize % 50));
            let arrival = Arrival { offset, value: Some(text.as_bytes()), ..Arrival::default() };
            assert!(gatherer.push(&Partition::new("in", 0), &lease, arrival, Instant::now()).is_none());
            gatherer.close(ClosedBy::End).expect("a record")
        })
    }

    #[test]
    fn windows_are_answered_in_their_order_until_the_caller_has_enough() {
        let compute = compute();
        let mut offsets = Vec::new();
        let mut take = |encoded: Encoded, most: usize| {
            offsets.push(encoded.window.records[0].offset);
            if offsets.len() == most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        answer_all(&compute, windows(), |encoded| take(encoded, 40)).expect("answered");
        assert_eq!(offsets, (0..40).collect::<Vec<_>>());
        let mut count = 0;
        answer_all(&compute, windows().take(90), |_| {
            count += 1;
            ControlFlow::Continue(())
        })
        .expect("answered");
        assert_eq!(count, 90, "all of them");
    }

    #[test]
    fn the_costs_of_records_are_those_of_their_items() {
        let compute = compute();
        let (mut gatherer, lease) = (Gatherer::new(Limits::NONE), Lease::new(0));
        for (offset, text) in (0..).zip(["one three", "", "do not shout!", "four"]) {
            let arrival = Arrival { offset, value: Some(text.as_bytes()), ..Arrival::default() };
            assert!(gatherer.push(&Partition::new("in", 0), &lease, arrival, Instant::now()).is_none());
        }
        let window = gatherer.close(ClosedBy::End).expect("records");
        assert_eq!(compute.costs(window), [8, 0, 0, 4]);
    }
}
