//! `noop`: every record that can be decoded is its own prediction.

use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;

use super::{About, Compute, ComputeError, Stage, StageContext, drop_windows};
use crate::codec::write::Writer;
use crate::codec::{Decoder, Waiting};
use crate::engine::{Calibration, RunError};
use crate::failpoint;
use crate::flow::{Encoded, Outcome, Queued};
use crate::telemetry::Metrics;
use crate::telemetry::health;
use crate::watch::{Observer, Tally};
use crate::window::Window;

/// Records of a window that one core takes at a time.
const CHUNK: usize = 128;

pub struct Noop {
    pub about: About,
    pub decoder: Decoder,
    pub metrics: Arc<Metrics>,
}

impl Noop {
    fn encoded(&self, window: Window, observer: &Observer) -> Encoded {
        let started = Instant::now();
        let outcome = |record| match window.raw(record).map(|value| self.decoder.decode(value)) {
            None => Outcome::Tombstone,
            Some(Ok(_)) => Outcome::Unchanged,
            Some(Err(error)) => Outcome::Dead(error),
        };
        let outcomes: Vec<Outcome> = window.records.par_iter().with_min_len(CHUNK).map(outcome).collect();
        let samples = observer.samples(&window, &outcomes);
        self.metrics.stage.with_label_values(&["decode"]).observe(started.elapsed().as_secs_f64());
        let model = Arc::new(self.about.version());
        Encoded { window, model, outcomes, memory: Vec::new(), tally: Tally::default(), samples }
    }
}

impl Compute for Noop {
    fn about(&self) -> About {
        self.about.clone()
    }

    fn pointers(&self) -> Vec<String> {
        self.decoder.pointers()
    }

    fn labels(&self) -> Option<Vec<String>> {
        None
    }

    fn writer(&self) -> Option<Writer> {
        None
    }

    fn footprint(&self, _: &[u8]) -> usize {
        64
    }

    fn work(&self, _: usize) -> f64 {
        0.0
    }

    fn costs(&self, window: Window) -> Vec<u64> {
        vec![1; window.records.len()]
    }

    fn full(&self) -> u64 {
        CHUNK as u64
    }

    fn lanes(&self) -> usize {
        1
    }

    fn stages(self: Arc<Self>, wires: StageContext) -> Vec<Stage<ComputeError>> {
        let work = move || {
            for window in &wires.windows {
                wires.health.busy(health::Stage::Encode);
                failpoint::pass("encode");
                let window = window.take(&self.metrics, "wait_decode");
                let health = Some((&*wires.health, health::Stage::Encode));
                let waiting = Waiting { stop: Some(&wires.stop), health, metrics: &self.metrics };
                let fetched = self.decoder.fetch(window.values(), &waiting);
                if fetched.and_then(|()| wires.observer.fetch(&window, &waiting)).is_err() {
                    drop_windows(window, &wires.windows, &wires.reports);
                    break;
                }
                let encoded = self.encoded(window, &wires.observer);
                wires.health.idle(health::Stage::Encode);
                if wires.encoded.send(Queued::new(encoded)).is_err() {
                    break;
                }
            }
            Ok(())
        };
        vec![Stage { name: "encode", work: Box::new(work) }]
    }

    fn answer(&self, window: Window) -> Result<Encoded, ComputeError> {
        let waiting = Waiting { stop: None, health: None, metrics: &self.metrics };
        // Never stopped.
        let _ = self.decoder.fetch(window.values(), &waiting);
        Ok(self.encoded(window, &Observer::default()))
    }

    fn answer_in_json(&self, window: Window) -> Result<Encoded, ComputeError> {
        self.answer(window)
    }

    fn calibrate(&self) -> Option<Result<Calibration, RunError>> {
        None
    }
}
