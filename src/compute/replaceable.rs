//! A task whose model can be replaced by another version of it between two windows.
//!
//! ```text
//!            ┌─▶ prepare ─▶ infer ─▶ encode ─┐      one version at a time: the next one's stages start when
//! windows ──▶┤   (one version's stages)      ├──▶   those of the version before have passed on their last window
//!            └───────────────────────────────┘
//! changes (from the [`Replacer`]): replace, unload, give up
//! ```
//!
//! So tokenizer, items, answers and predictions of a window are all of one version, which the window names, and windows
//! leave in the order they came. Nothing here knows where versions come from.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, never, select, unbounded};

use super::{About, Compute, ComputeError, Stage, StageContext};
use crate::codec::write::Writer;
use crate::engine::{Calibration, EngineError, RunError};
use crate::failpoint;
use crate::flow::{Encoded, Queued};
use crate::kafka::headers::Headers;
use crate::lease::Lease;
use crate::record::{Arrival, Partition};
use crate::window::{ClosedBy, Gatherer, Limits, Window};

/// Records of a window that are kept as a sample, and their bytes.
const SAMPLE_RECORDS: usize = 256;
const SAMPLE_BYTES: usize = 1 << 20;

pub struct Replaceable {
    current: RwLock<Current>,
    changes: Receiver<Change>,
    /// Inputs of the last window.
    sample: Mutex<Sample>,
    usual: Usual,
    /// Disconnects the [`Replacer`].
    _alive: Sender<()>,
}

/// The version that runs.
struct Current {
    /// `None` between two versions that do not fit the memory together.
    compute: Option<Arc<dyn Compute>>,
    about: About,
    pointers: Vec<String>,
    labels: Option<Vec<String>>,
    writer: Option<Writer>,
    lanes: usize,
}

impl Current {
    fn of(compute: Arc<dyn Compute>) -> Self {
        let (about, pointers, labels) = (compute.about(), compute.pointers(), compute.labels());
        let (writer, lanes) = (compute.writer(), compute.lanes());
        Self { compute: Some(compute), about, pointers, labels, writer, lanes }
    }
}

/// What the last record took: an estimate for the next ones while no version is loaded.
#[derive(Default)]
struct Usual {
    bytes: AtomicUsize,
    footprint: AtomicUsize,
    /// Seconds, as the bits of an f64.
    work: AtomicU64,
}

impl Usual {
    /// How many such records a value of `bytes` stands for.
    fn times(&self, bytes: usize) -> usize {
        bytes.div_ceil(self.bytes.load(Ordering::Relaxed).max(1)).max(1)
    }
}

/// Values with what says how to read them.
type Sample = Vec<(Vec<u8>, Option<Headers>)>;

/// What a [`Replacer`] asks for. `done` is signalled once it has happened.
enum Change {
    Replace {
        with: Arc<dyn Compute>,
        done: Sender<()>,
    },
    /// Drops the version that runs, to make room. Another change follows.
    Unload {
        done: Sender<()>,
    },
    /// No version can be loaded any more.
    GiveUp(String),
}

/// Replaces the version that a [`Replaceable`] runs. It does not keep it alive.
pub struct Replacer {
    of: Weak<Replaceable>,
    changes: Sender<Change>,
    gone: Receiver<()>,
}

impl Replacer {
    /// Waits. False if nothing is left whose model could be replaced.
    pub fn wait(&self, delay: Duration) -> bool {
        matches!(self.gone.recv_timeout(delay), Err(RecvTimeoutError::Timeout))
    }

    /// The version that runs; `None` if there is none.
    pub fn current(&self) -> Option<Arc<dyn Compute>> {
        self.of.upgrade()?.read().compute.clone()
    }

    /// A window of the last inputs, at most [`SAMPLE_RECORDS`]; `None` before the first window.
    pub fn sample(&self) -> Option<Window> {
        let replaceable = self.of.upgrade()?;
        let sample = replaceable.sample.lock().unwrap_or_else(|e| e.into_inner());
        let (partition, lease) = (Partition::new("sample", 0), Lease::new(0));
        let mut gatherer = Gatherer::new(Limits::NONE);
        for (offset, (value, headers)) in sample.iter().enumerate() {
            let arrival = Arrival {
                offset: offset as i64,
                value: Some(value),
                headers: headers.clone(),
                ..Arrival::default()
            };
            gatherer.push(&partition, &lease, arrival, std::time::Instant::now());
        }
        gatherer.close(ClosedBy::Stop)
    }

    /// Has the next windows computed by `with`, and waits until that is so. False if nothing is left to replace.
    pub fn replace(&self, with: Arc<dyn Compute>) -> bool {
        self.change(|done| Change::Replace { with, done })
    }

    /// Drops the version that runs after its windows in flight, and waits for that. False if there is none.
    pub fn unload(&self) -> bool {
        self.change(|done| Change::Unload { done })
    }

    /// After [`Replacer::unload`]: ends the pipeline, because no version can be loaded.
    pub fn give_up(&self, reason: String) {
        // Without a receiver, the pipeline has ended.
        let _ = self.changes.send(Change::GiveUp(reason));
    }

    fn change(&self, change: impl FnOnce(Sender<()>) -> Change) -> bool {
        let (done, is_done) = bounded(1);
        self.changes.send(change(done)).is_ok() && is_done.recv().is_ok()
    }
}

impl Replaceable {
    /// Runs `compute` until the replacer changes it.
    pub fn new(compute: Arc<dyn Compute>) -> (Arc<Self>, Replacer) {
        let (changes, asked) = unbounded();
        let (alive, gone) = bounded(0);
        let replaceable = Arc::new(Self {
            current: RwLock::new(Current::of(compute)),
            changes: asked,
            sample: Mutex::default(),
            usual: Usual::default(),
            _alive: alive,
        });
        let of = Arc::downgrade(&replaceable);
        (replaceable, Replacer { of, changes, gone })
    }

    fn read(&self) -> RwLockReadGuard<'_, Current> {
        self.current.read().unwrap_or_else(|e| e.into_inner())
    }

    fn set(&self, change: impl FnOnce(&mut Current)) {
        change(&mut self.current.write().unwrap_or_else(|e| e.into_inner()));
    }

    fn loaded(&self) -> Result<Arc<dyn Compute>, ComputeError> {
        let loaded = self.read().compute.clone();
        loaded.ok_or_else(|| EngineError::Fatal("the model is being replaced".to_owned()))
    }

    /// Keeps a sample of the window's inputs.
    fn keep(&self, window: &Window) {
        let mut bytes = 0;
        let sample = window.values().take(SAMPLE_RECORDS).take_while(|value| {
            bytes += value.bytes.len();
            bytes <= SAMPLE_BYTES
        });
        let sample: Sample = sample.map(|value| (value.bytes.to_vec(), value.headers.cloned())).collect();
        if !sample.is_empty() {
            *self.sample.lock().unwrap_or_else(|e| e.into_inner()) = sample;
        }
    }

    /// Passes windows on to the stages of the version that runs, and changes it between two windows.
    fn pass_on(&self, wires: &StageContext) -> Result<(), ComputeError> {
        let mut running = Running::start(self.loaded()?, wires)?;
        let mut changes = self.changes.clone();
        loop {
            select! {
                recv(changes) -> change => match change {
                    Ok(change) => {
                        running.finish()?;
                        self.apply(change)?;
                        running = Running::start(self.loaded()?, wires)?;
                    }
                    // Nobody replaces it any more.
                    Err(_) => changes = never(),
                },
                recv(wires.windows) -> window => match window {
                    Ok(window) => {
                        self.keep(window.get());
                        if running.windows.send(window).is_err() {
                            return running.finish();
                        }
                    }
                    Err(_) => return running.finish(),
                },
                // A stage ends early only if it or the one after it cannot go on.
                recv(running.ended) -> ended => {
                    if let Ok(result) = ended {
                        running.left -= 1;
                        result?;
                    }
                    return running.finish();
                }
            }
        }
    }

    /// Applies a change. The stages of the version before have ended.
    fn apply(&self, change: Change) -> Result<(), ComputeError> {
        failpoint::pass("swap-finished");
        let mut change = change;
        loop {
            match change {
                Change::Replace { with, done } => {
                    self.set(|current| {
                        // Its schema is in the registry by now: the stages run.
                        if let (Some(before), Some(now)) = (&current.writer, with.writer()) {
                            now.continue_from(before);
                        }
                        *current = Current::of(with);
                    });
                    failpoint::swapped();
                    failpoint::pass("swap-done");
                    // The replacer may be gone.
                    let _ = done.send(());
                    return Ok(());
                }
                Change::Unload { done } => {
                    self.set(|current| current.compute = None);
                    let _ = done.send(());
                    failpoint::pass("swap-unloaded");
                    // There is nothing to compute windows with until the next change.
                    change = self.changes.recv().map_err(|_| {
                        EngineError::Fatal("replacing the model ended before a version was loaded".to_owned())
                    })?;
                }
                Change::GiveUp(reason) => return Err(EngineError::Fatal(reason)),
            }
        }
    }
}

/// The stages of one version, on threads of their own.
struct Running {
    windows: Sender<Queued<Window>>,
    /// One result per stage.
    ended: Receiver<Result<(), ComputeError>>,
    /// Stages whose result is not received yet.
    left: usize,
}

impl Running {
    fn start(compute: Arc<dyn Compute>, wires: &StageContext) -> Result<Self, ComputeError> {
        // A window waits in the pipeline's own channel, and not here.
        let (windows, to_prepare) = bounded(0);
        let stages = compute.stages(StageContext {
            windows: to_prepare,
            encoded: wires.encoded.clone(),
            reports: wires.reports.clone(),
            health: Arc::clone(&wires.health),
            observer: wires.observer.clone(),
            stop: Arc::clone(&wires.stop),
            end: Arc::clone(&wires.end),
        });
        let left = stages.len();
        let (report, ended) = unbounded();
        for Stage { name, work } in stages {
            let report = report.clone();
            std::thread::Builder::new()
                .name(format!("kandle-{name}"))
                .spawn(move || drop(report.send(work())))
                .map_err(|error| EngineError::Fatal(format!("thread {name}: {error}")))?;
        }
        Ok(Self { windows, ended, left })
    }

    /// Waits until the stages have passed on all their windows and have ended.
    fn finish(self) -> Result<(), ComputeError> {
        let Self { windows, ended, left } = self;
        drop(windows);
        for _ in 0..left {
            match ended.recv() {
                Ok(result) => result?,
                Err(_) => return Err(EngineError::Fatal("a stage has panicked".to_owned())),
            }
        }
        Ok(())
    }
}

impl Compute for Replaceable {
    fn about(&self) -> About {
        self.read().about.clone()
    }

    fn pointers(&self) -> Vec<String> {
        self.read().pointers.clone()
    }

    fn labels(&self) -> Option<Vec<String>> {
        self.read().labels.clone()
    }

    fn writer(&self) -> Option<Writer> {
        self.read().writer.clone()
    }

    fn footprint(&self, value: &[u8]) -> usize {
        let Some(footprint) = self.read().compute.as_ref().map(|compute| compute.footprint(value)) else {
            return self.usual.footprint.load(Ordering::Relaxed) * self.usual.times(value.len());
        };
        self.usual.bytes.store(value.len(), Ordering::Relaxed);
        self.usual.footprint.store(footprint, Ordering::Relaxed);
        footprint
    }

    fn work(&self, value_bytes: usize) -> f64 {
        let Some(work) = self.read().compute.as_ref().map(|compute| compute.work(value_bytes)) else {
            let usual = f64::from_bits(self.usual.work.load(Ordering::Relaxed));
            return usual * self.usual.times(value_bytes) as f64;
        };
        self.usual.work.store(work.to_bits(), Ordering::Relaxed);
        work
    }

    fn costs(&self, window: Window) -> Vec<u64> {
        match self.loaded() {
            Ok(compute) => compute.costs(window),
            // Between two versions nothing says what a record costs.
            Err(_) => vec![0; window.records.len()],
        }
    }

    fn full(&self) -> u64 {
        self.read().compute.as_ref().map_or(0, |compute| compute.full())
    }

    fn lanes(&self) -> usize {
        self.read().lanes
    }

    fn stages(self: Arc<Self>, wires: StageContext) -> Vec<Stage<ComputeError>> {
        vec![Stage { name: "model", work: Box::new(move || self.pass_on(&wires)) }]
    }

    fn answer(&self, window: Window) -> Result<Encoded, ComputeError> {
        self.loaded()?.answer(window)
    }

    fn answer_in_json(&self, window: Window) -> Result<Encoded, ComputeError> {
        self.loaded()?.answer_in_json(window)
    }

    fn calibrate(&self) -> Option<Result<Calibration, RunError>> {
        self.loaded().ok()?.calibrate()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::codec::write::Record;
    use crate::flow::Report;
    use crate::settings::{Settings, Sources, load};
    use crate::task;
    use crate::telemetry::{Health, Metrics};
    use crate::watch::Observer;

    /// A version that counts letters of at most `most` words: its answers tell it.
    fn version(most: usize) -> Arc<dyn Compute> {
        task::load(&settings(most, &[]), &Arc::new(Metrics::new())).unwrap()
    }

    fn settings(most: usize, more: &[&str]) -> Settings {
        let set = [
            "kafka.brokers=none:1",
            "input.topics=in",
            "input.group=g",
            "input.field=/text",
            "task.kind=dummy",
            &format!("task.top_k={most}"),
            "output.topic=out",
            "dead_letters.topic=dead",
        ];
        let set = set.iter().chain(more).map(|set| (*set).to_owned()).collect();
        load(&Sources { set, ..Sources::default() }).unwrap().settings
    }

    fn window(gatherer: &mut Gatherer, offset: i64) -> Queued<Window> {
        let value = br#"{"text":"eel bee tree"}"#;
        for offset in offset..offset + 3 {
            let arrival = Arrival { offset, value: Some(value), ..Arrival::default() };
            gatherer.push(&Partition::new("t", 0), &Lease::new(1), arrival, std::time::Instant::now());
        }
        Queued::new(gatherer.close(ClosedBy::Records).unwrap())
    }

    struct Ends {
        windows: Sender<Queued<Window>>,
        encoded: Receiver<Queued<Encoded>>,
        /// Kept open.
        _reports: Receiver<Report>,
        stage: std::thread::JoinHandle<Result<(), ComputeError>>,
    }

    fn start(replaceable: &Arc<Replaceable>) -> Ends {
        let (windows, gathered) = bounded(1);
        let (to_publish, encoded) = unbounded();
        let (reports, told) = unbounded();
        let wires = StageContext {
            windows: gathered,
            encoded: to_publish,
            reports,
            health: Arc::new(Health::new(Duration::from_secs(60))),
            observer: Observer::default(),
            stop: Arc::new(AtomicBool::new(false)),
            end: Arc::new(|_| {}),
        };
        let mut stages = Arc::clone(replaceable).stages(wires);
        let stage = std::thread::spawn(stages.remove(0).work);
        Ends { windows, encoded, _reports: told, stage }
    }

    /// The words that the predictions of a window have: 3 by three words, 1 by one.
    fn words(encoded: &Encoded) -> usize {
        let crate::flow::Outcome::Prediction { part, bytes } = &encoded.outcomes[0] else {
            panic!("no prediction")
        };
        let json: serde_json::Value = serde_json::from_slice(encoded.prediction(*part, bytes)).unwrap();
        json["letters"].as_array().unwrap().len()
    }

    #[test]
    fn each_window_is_of_one_version_and_names_it() {
        let (replaceable, replacer) = Replaceable::new(version(1));
        assert!(replacer.sample().is_none());
        let Ends { windows, encoded, stage, _reports } = start(&replaceable);
        let mut gatherer = Gatherer::new(Limits::NONE);
        for most in 1..=3 {
            if most > 1 {
                assert!(replacer.replace(version(most)));
            }
            windows.send(window(&mut gatherer, most as i64 * 3)).unwrap();
            let window = encoded.recv().unwrap().into_inner();
            let digest = version(most).about().digest.short().to_owned();
            assert_eq!((words(&window), &window.model.digest), (most, &digest));
            assert_eq!(replaceable.about().digest.short(), digest);
            assert_eq!(replacer.current().unwrap().about().digest.short(), digest);
        }
        let sample = replacer.sample().unwrap();
        assert_eq!((sample.records.len(), sample.values().next().unwrap().bytes.len()), (3, 23));
        assert!(replacer.wait(Duration::from_millis(1)));
        drop(windows);
        stage.join().unwrap().unwrap();
        drop(replaceable);
        assert!(!replacer.wait(Duration::from_secs(20)) && !replacer.replace(version(1)));
        assert!(replacer.sample().is_none());
    }

    #[test]
    fn windows_are_in_order_and_whole_across_replacements() {
        let (replaceable, replacer) = Replaceable::new(version(1));
        let Ends { windows, encoded, stage, _reports } = start(&replaceable);
        let replacing = std::thread::spawn(move || {
            let done = (0..20).take_while(|i| replacer.replace(version(1 + i % 3))).count();
            (done, replacer)
        });
        let feeding = std::thread::spawn(move || {
            let mut gatherer = Gatherer::new(Limits::NONE);
            (0..500).for_each(|i| windows.send(window(&mut gatherer, i * 3)).unwrap());
            windows
        });
        let (done, replacer) = replacing.join().unwrap();
        assert_eq!(done, 20);
        drop(feeding.join().unwrap());
        stage.join().unwrap().unwrap();
        let digests = [1, 2, 3].map(|most| version(most).about().digest.short().to_owned());
        let all: Vec<Encoded> = encoded.iter().map(Queued::into_inner).collect();
        assert!(all.iter().map(|w| w.window.id).eq(0..500), "none is lost, doubled or overtaken");
        assert!(
            all.iter().all(|w| w.model.digest == digests[words(w) - 1]),
            "the digest is of the version that made it"
        );
        drop(replacer);
    }

    #[test]
    fn a_version_writes_with_the_schema_of_the_one_before() {
        let of = |most| settings(most, &["output.format=avro", "registry.url=http://none:1"]);
        let load = |most| task::load(&of(most), &Arc::new(Metrics::new())).unwrap();
        let (replaceable, replacer) = Replaceable::new(load(1));
        // As the pipeline does it before the stages start.
        replaceable.writer().unwrap().set_schema(Record::of(&of(1)), 7);
        let Ends { windows, encoded, stage, _reports } = start(&replaceable);
        assert!(replacer.replace(load(2)));
        assert!(replaceable.writer().unwrap().encoding().is_some());
        windows.send(window(&mut Gatherer::new(Limits::NONE), 0)).unwrap();
        let window = encoded.recv().unwrap().into_inner();
        assert_eq!(window.memory[0][..5], [0, 0, 0, 0, 7], "framed with the schema's id");
        drop(windows);
        stage.join().unwrap().unwrap();
    }

    #[test]
    fn windows_wait_while_no_version_is_loaded() {
        let (replaceable, replacer) = Replaceable::new(version(1));
        let Ends { windows, encoded, stage, _reports } = start(&replaceable);
        let mut gatherer = Gatherer::new(Limits::NONE);
        let (footprint, work) = (replaceable.footprint(b"0123456789"), replaceable.work(10));
        let old = Arc::downgrade(&replacer.current().unwrap());
        assert!(replacer.unload());
        assert!(old.upgrade().is_none(), "its memory is free");
        // The source goes on asking.
        assert_eq!((replaceable.footprint(b"0123"), replaceable.work(4)), (footprint, work));
        assert_eq!(replaceable.footprint(&[0; 25]), 3 * footprint);
        assert!(replacer.current().is_none() && !replaceable.about().model.is_empty());
        windows.send(window(&mut gatherer, 0)).unwrap();
        assert!(replacer.replace(version(2)));
        assert_eq!(words(&encoded.recv().unwrap().into_inner()), 2);
        assert!(replacer.unload());
        replacer.give_up("neither version can be loaded".to_owned());
        let error = stage.join().unwrap().unwrap_err().to_string();
        assert_eq!(error, "neither version can be loaded");
    }
}
