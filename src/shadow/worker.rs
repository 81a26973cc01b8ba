//! The thread that runs the shadow's model, compares its predictions with the model's, and publishes them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};
use rayon::ThreadPool;

use super::Job;
use super::agreement::Agreement;
use super::room::Room;
use crate::agreement::Comparer;
use crate::codec::{Waiting, WholeReader};
use crate::compute::Compute;
use crate::failpoint;
use crate::flow::{Encoded, Outcome};
use crate::record::Raw;
use crate::registry::registration;
use crate::settings::Settings;
use crate::sink::SidePublisher;
use crate::task;
use crate::telemetry::{Health, Metrics};

/// How long the brokers may refuse or not answer until a prediction counts as failed.
const RUN_TIMEOUT: Duration = Duration::from_secs(30);
const BOUNDED_TIMEOUT: Duration = Duration::from_secs(300);

/// How often the client is polled for acknowledgements while there are no jobs.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

pub(super) struct Worker {
    /// Of the shadow.
    pub settings: Settings,
    pub comparer: Comparer,
    /// A drain or replay.
    pub bounded: bool,
    /// Metrics of the shadow's model, which are not exported.
    pub of_compute: Arc<Metrics>,
    /// Metrics of the process.
    pub metrics: Arc<Metrics>,
    pub stop: Arc<AtomicBool>,
    pub room: Arc<Room>,
}

impl Drop for Worker {
    /// However the thread ends, nobody waits for it.
    fn drop(&mut self) {
        self.room.close();
    }
}

/// What the worker has once the shadow's model is loaded.
struct Running {
    compute: Arc<dyn Compute>,
    /// Decoding and encoding run here, so that the pipeline's threads stay the pipeline's.
    pool: ThreadPool,
    reader: WholeReader,
    publisher: SidePublisher,
    agreement: Agreement,
}

impl Worker {
    /// Does jobs until their channel closes. After an error, it only counts them. `compute`: the shadow's task with its
    /// model, if it is loaded already.
    pub fn serve(&self, compute: Option<Arc<dyn Compute>>, jobs: &Receiver<Job>) {
        match self.start(compute) {
            Ok(Some(running)) => self.work(running, jobs),
            Ok(None) => {}
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "the shadow cannot run: it predicts nothing until the next start");
                self.fail_all(jobs);
            }
        }
    }

    /// `None` if asked to stop meanwhile.
    fn start(&self, compute: Option<Arc<dyn Compute>>) -> anyhow::Result<Option<Running>> {
        let compute = match compute {
            Some(compute) => compute,
            None => task::load(&self.settings, &self.of_compute)?,
        };
        let health = Health::new(Duration::MAX);
        if let Some(writer) = compute.writer()
            && !registration::register(&self.settings, &writer, &self.of_compute, &health, &self.stop)?
        {
            return Ok(None);
        }
        let about = compute.about();
        let timeout = if self.bounded { BOUNDED_TIMEOUT } else { RUN_TIMEOUT };
        let publisher = SidePublisher::new(&self.settings, timeout)?;
        let lanes = self.settings.batch.lanes.unwrap_or(1);
        let name = |_| "kandle-shadow-pool".to_owned();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(lanes).thread_name(name).build()?;
        tracing::info!(
            model = about.model,
            digest = about.digest.short(),
            device = about.device,
            dtype = about.dtype,
            topic = self.settings.output.topic,
            "shadow model loaded"
        );
        Ok(Some(Running {
            pool,
            reader: WholeReader::of_predictions(&self.settings)?,
            agreement: Agreement::new(self.comparer.clone()),
            publisher,
            compute,
        }))
    }

    fn work(&self, mut running: Running, jobs: &Receiver<Job>) {
        loop {
            match jobs.recv_timeout(POLL_INTERVAL) {
                Ok(job) => {
                    failpoint::pass("shadow");
                    if !self.work_on(&mut running, job) {
                        self.settle(&running);
                        return self.fail_all(jobs);
                    }
                }
                // Acknowledgements come between jobs too.
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.settle(&running),
            }
            self.count_delivered(&running.publisher);
        }
    }

    /// Predicts, compares and publishes. Returns false if nothing more can be predicted.
    fn work_on(&self, running: &mut Running, Job { window, model, held, pending }: Job) -> bool {
        let records = window.records.len() as u64;
        let Running { compute, pool, .. } = &*running;
        match pool.install(|| compute.answer(window)) {
            Ok(encoded) => {
                self.compare(running, &encoded, &model);
                self.count("failed", running.publisher.publish(encoded));
                if self.bounded {
                    running.publisher.flush();
                }
            }
            Err(error) => {
                // Its thread may be stuck for ever, and the next one would be too.
                tracing::error!(
                    %error,
                    "inference of the shadow failed: it predicts nothing until the next start"
                );
                self.count("failed", records);
                return false;
            }
        }
        running.agreement.show(&self.metrics);
        drop((held, pending));
        self.metrics.memory.with_label_values(&["shadow"]).set(self.room.held() as i64);
        true
    }

    /// Waits for the acknowledgements of what is sent.
    fn settle(&self, running: &Running) {
        running.publisher.flush();
        self.count_delivered(&running.publisher);
    }

    fn compare(&self, running: &mut Running, encoded: &Encoded, model: &[Option<Box<[u8]>>]) {
        let waiting = Waiting { stop: Some(&self.stop), health: None, metrics: &self.of_compute };
        let Running { reader, agreement, .. } = running;
        for (outcome, model) in encoded.outcomes.iter().zip(model) {
            let (Outcome::Prediction { part, bytes }, Some(model)) = (outcome, model) else { continue };
            let json = |bytes| {
                let raw = Raw { bytes, headers: None };
                reader.fetch(std::iter::once(raw), &waiting).ok()?;
                reader.json(raw).ok()
            };
            if let (Some(model), Some(shadow)) = (json(&**model), json(encoded.prediction(*part, bytes))) {
                agreement.add(model.as_bytes(), shadow.as_bytes());
            }
        }
    }

    fn count(&self, outcome: &str, records: u64) {
        self.metrics.shadow_records.with_label_values(&[outcome]).inc_by(records);
    }

    fn count_delivered(&self, publisher: &SidePublisher) {
        let delivered = publisher.delivered();
        self.count("predicted", delivered.predictions);
        self.count("tombstone", delivered.tombstones);
        self.count("failed", delivered.failed);
    }

    /// Counts jobs that nothing can be done about.
    fn fail_all(&self, jobs: &Receiver<Job>) {
        for job in jobs {
            self.count("failed", job.window.records.len() as u64);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}
