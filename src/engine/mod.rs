//! Runs a model over the items of windows: reuses answers, forms batches, runs them on lanes and handles failing ones.
//! Knows nothing of Kafka, records or tasks.
//!
//! ```text
//! requests ─▶ windows ─▶ batches ─▶ lanes: run, halve, bisect, probe ─▶ windows ─▶ responses, in the order of requests
//! ```

mod answers;
mod budget;
mod calibrate;
mod lanes;
mod model;
mod plan;
mod reuse;
mod settle;
mod windows;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, never, select, unbounded};

pub use answers::{Answers, Rows};
pub use budget::Budget;
pub use calibrate::{Calibration, Calibrations, Rate};
pub use model::{Item, Model, RunError, TOKENS, Value};
pub use plan::{Batch, Planned, plan};

use self::lanes::{BatchResult, Device, Lanes, Purpose, Work};
use self::reuse::{Cache, Reuse, reuse};
use self::windows::Windows;
use crate::flow::Queued;
use crate::telemetry::health::Stage;
use crate::telemetry::{Health, Metrics};

/// Budget of a batch on a CPU core, in tokens: the output of a layer then stays in the L2 cache. 512 tokens are no
/// faster in f32 and a tenth slower in bf16 and int8; 128 are a tenth slower. Small batches also spread more evenly
/// over the cores.
const CORE_COST: usize = 256;

/// Lanes of a GPU: while the host waits for one batch, the next is queued.
const GPU_LANES: usize = 2;

/// Windows on the lanes at a time: while the last batches of one run, the next window's batches fill idle lanes.
const WINDOWS: usize = 2;

/// The batches of a window, and the items that need not be computed.
#[derive(Debug)]
pub struct Plan<V> {
    batches: Vec<Batch>,
    duplicates: Vec<(u32, u32)>,
    cached: Vec<(u32, Arc<[V]>)>,
}

impl<V> Plan<V> {
    /// The items that are computed: neither duplicates of others nor cached.
    pub fn computed(&self) -> HashSet<u32> {
        self.batches.iter().flat_map(|batch| batch.items.iter().copied()).collect()
    }
}

/// One window for the engine to answer.
#[derive(Debug)]
pub struct Request<W, I, V> {
    /// The window's id, unique among the requests in flight.
    pub id: u64,
    /// The caller's window, handed back unchanged in the response.
    pub window: W,
    pub items: Vec<I>,
    pub plan: Plan<V>,
}

/// The answers to a [`Request`].
#[derive(Debug)]
pub struct Response<W, V> {
    pub window: W,
    pub answers: Answers<V>,
    /// Items without a valid answer, each with its error message.
    pub failed: Vec<(u32, String)>,
    /// A lane was abandoned because one of them timed out. Its stuck thread still holds memory, and a core or the
    /// device: the process should restart.
    pub lane_abandoned: bool,
    /// Device time that the window took, over all lanes.
    pub busy: Duration,
}

type RequestOf<W, M> = Request<W, <M as Model>::Item, <M as Model>::Value>;

/// Why the engine cannot compute any more.
#[derive(Debug, thiserror::Error)]
pub enum EngineError<W> {
    #[error("{0}")]
    Fatal(String),
    /// `items` of the window were in the batch that timed out. None of them is blamed yet.
    #[error("inference on {} inputs exceeded batch.timeout ({limit:?})", items.len())]
    TimedOut { window: W, items: Vec<u32>, limit: Duration },
    #[error("the device does not respond: a known-good probe input exceeded batch.timeout ({0:?})")]
    Unresponsive(Duration),
}

impl<W> EngineError<W> {
    /// The same error without its window.
    pub fn without_window(self) -> EngineError<()> {
        match self {
            Self::Fatal(message) => EngineError::Fatal(message),
            Self::TimedOut { items, limit, .. } => EngineError::TimedOut { window: (), items, limit },
            Self::Unresponsive(limit) => EngineError::Unresponsive(limit),
        }
    }
}

/// Settings of an engine.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// `batch.max_tokens`: maximum cost of a batch.
    pub max_cost: usize,
    /// The calibrated budget for this model and device, if there is one.
    pub calibrated: Option<usize>,
    /// `batch.lanes`.
    pub lanes: Option<usize>,
    /// `batch.timeout`.
    pub timeout: Duration,
    /// `task.cache`, in bytes.
    pub cache: Option<u64>,
}

/// The device that an engine runs on.
#[derive(Debug, Clone)]
pub struct Place {
    /// Value of the `device` label of its metrics.
    pub name: String,
    /// The device is the CPU: each lane is a core.
    pub is_cpu: bool,
}

/// A model and the lanes that run it.
pub struct Engine<M: Model> {
    device: Arc<Device<M>>,
    lanes: usize,
    is_cpu: bool,
    timeout: Duration,
    cache: Option<Cache<M::Value>>,
}

impl<M: Model> Engine<M> {
    /// Uses `limits.lanes` or one lane per core that the process may use on a CPU, two lanes on a GPU.
    pub fn new(model: Arc<M>, place: Place, limits: Limits, metrics: Arc<Metrics>) -> Self {
        let (lanes, cost) = match place.is_cpu {
            true => (limits.lanes.unwrap_or_else(cores), CORE_COST),
            false => (GPU_LANES, limits.max_cost),
        };
        let cost = limits.calibrated.unwrap_or(cost).min(limits.max_cost);
        Self {
            device: Arc::new(Device::new(model, Arc::new(Budget::new(cost)), metrics, place.name)),
            lanes,
            is_cpu: place.is_cpu,
            timeout: limits.timeout,
            cache: limits.cache.map(Cache::new),
        }
    }

    pub fn model(&self) -> &M {
        &self.device.model
    }

    /// Measures batch budgets and chooses one.
    pub fn calibrate(&self) -> Result<Calibration, RunError> {
        let (least, most) = if self.is_cpu { (64, 2048) } else { (1024, 65_536) };
        let rates = calibrate::measure(self.model(), least, most)?;
        Ok(Calibration { chosen: calibrate::choose(&rates), rates })
    }

    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// Maximum cost of a batch at present.
    pub fn budget(&self) -> usize {
        self.device.budget.tokens()
    }

    /// Plans the items of a window. A `suspect`, on which inference timed out before, runs alone.
    pub fn plan(&self, items: &[M::Item], suspect: impl Fn(usize) -> bool) -> Plan<M::Value> {
        let (alone, together): (Vec<u32>, Vec<u32>) =
            (0..items.len() as u32).partition(|&item| suspect(item as usize));
        let together = together.into_iter().map(|item| (item, &items[item as usize]));
        let Reuse { planned, duplicates, cached } = reuse(together, self.cache.as_ref());
        let metrics = &self.device.metrics;
        metrics.reused.with_label_values(&["window"]).inc_by(duplicates.len() as u64);
        if let Some(cache) = &self.cache {
            metrics.reused.with_label_values(&["cache"]).inc_by(cached.len() as u64);
            metrics.memory.with_label_values(&["cache"]).set(cache.bytes() as i64);
        }
        let mut batches = plan(planned, self.device.budget.tokens(), self.lanes);
        let batch = |item: u32| Batch {
            items: vec![item],
            cost: items[item as usize].cost() as usize,
            suspect: true,
        };
        batches.extend(alone.into_iter().map(batch));
        Plan { batches, duplicates, cached }
    }

    /// Serves requests until their channel closes or the receiver of the responses is gone. Responses leave in the
    /// order of the requests. Reports to `health` whether the engine is busy.
    ///
    /// # Errors
    /// The device failed, or inference timed out.
    pub fn serve<W>(
        &self,
        requests: &Receiver<Queued<RequestOf<W, M>>>,
        responses: &Sender<Queued<Response<W, M::Value>>>,
        health: Option<&Health>,
    ) -> Result<(), EngineError<W>> {
        let metrics = &self.device.metrics;
        let active = |active: bool| match (health, active) {
            (Some(health), true) => health.busy(Stage::Infer),
            (Some(health), false) => health.idle(Stage::Infer),
            (None, _) => {}
        };
        let look = (self.timeout / 4).min(Duration::from_secs(1));
        let (done, finished) = unbounded::<BatchResult<M::Value>>();
        let mut lanes = Lanes::start(self.lanes, Arc::clone(&self.device), done);
        let mut windows = Windows::new();
        let closed = never();
        let mut more = true;
        while more || !windows.is_empty() {
            let source = if more && windows.len() < WINDOWS { requests } else { &closed };
            active(!windows.is_empty());
            select! {
                recv(source) -> request => match request {
                    Ok(request) => {
                        active(true);
                        let Request { id, window, items, plan } = request.take(metrics, "wait_infer");
                        let items = Arc::new(items);
                        let batches = windows.open(id, window, Arc::clone(&items), plan, Instant::now());
                        for batch in batches {
                            lanes.run(Work { window: id, items: Arc::clone(&items), batch });
                        }
                    }
                    Err(_) => more = false,
                },
                recv(finished) -> done => {
                    let mut done = done.expect("the lanes hold senders");
                    if let Some(message) = done.fatal.take() {
                        return Err(EngineError::Fatal(message));
                    }
                    windows.done(done, self.cache.as_ref());
                }
                default(look) => {}
            }
            if let Some((lane, began, run)) = lanes.timed_out(self.timeout) {
                match run.purpose {
                    Purpose::Probe => return Err(EngineError::Unresponsive(self.timeout)),
                    Purpose::Answers => {
                        if let Some((window, items)) = windows.give_up(run.window, run.items) {
                            return Err(EngineError::TimedOut { window, items, limit: self.timeout });
                        }
                    }
                    Purpose::Suspect => {
                        if lanes.abandon(lane, began) {
                            windows.abandoned(run.window, &run.items, self.timeout);
                        }
                    }
                }
            }
            while let Some((response, took)) = windows.take(Instant::now()) {
                metrics.stage.with_label_values(&["infer"]).observe(took.as_secs_f64());
                // Sending may block on a full channel. That is no stall: the lanes keep running what they have.
                active(false);
                if responses.send(Queued::new(response)).is_err() {
                    return Ok(());
                }
            }
        }
        active(false);
        lanes.join();
        Ok(())
    }

    /// Plans and runs one window by itself.
    pub fn run(&self, items: Vec<M::Item>) -> Result<Response<(), M::Value>, EngineError<()>> {
        let plan = self.plan(&items, |_| false);
        self.answer(Request { id: 0, window: (), items, plan })
    }

    /// Runs one window by itself.
    pub fn answer<W>(&self, request: RequestOf<W, M>) -> Result<Response<W, M::Value>, EngineError<W>> {
        let (ask, requests) = bounded(1);
        let (respond, responses) = bounded(1);
        ask.send(Queued::new(request)).expect("the receiver is here");
        drop(ask);
        self.serve(&requests, &respond, None)?;
        let response = responses.recv().expect("one request has one response");
        Ok(response.into_inner())
    }
}

/// Cores that the process may use, within its cgroup's CPU quota.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;
    use crate::ragged::Ragged;

    /// A number with a cost.
    #[derive(Debug, Clone)]
    pub(super) struct Number {
        pub value: u32,
        pub cost: u32,
        pub key: bool,
    }

    impl Number {
        pub fn new(value: u32) -> Self {
            Self { value, cost: 1, key: true }
        }

        fn of(value: u32, cost: u32) -> Self {
            Self { cost, ..Self::new(value) }
        }
    }

    impl Item for Number {
        fn cost(&self) -> u32 {
            self.cost
        }

        fn key(&self) -> Option<u128> {
            self.key.then_some(u128::from(self.value) << 32 | u128::from(self.cost))
        }
    }

    /// Fails its batch.
    const BAD: u32 = 666;
    /// Keeps its batch running until it is released.
    const ENDLESS: u32 = 777;
    /// Keeps its batch running until another one has run out of memory.
    const GREEDY: u32 = 888;
    /// Is answered with NaN.
    const UNCLEAR: u32 = 999;
    const PLAIN: u32 = 1;

    /// A device with memory for a limited cost. Its model answers each number with its value and its cost.
    #[derive(Default)]
    struct Fake {
        memory: usize,
        /// Fails every item.
        broken: bool,
        /// Never returns from the probe item.
        deaf: bool,
        runs: AtomicUsize,
        in_use: AtomicUsize,
        did_not_fit: AtomicUsize,
        released: AtomicBool,
        returned: AtomicUsize,
    }

    fn until(done: impl Fn() -> bool) {
        let started = Instant::now();
        while !done() {
            assert!(started.elapsed() < Duration::from_secs(20), "the condition never became true");
            std::thread::yield_now();
        }
    }

    impl Model for Fake {
        type Item = Number;
        type Value = f32;

        fn run(&self, batch: &[&Number]) -> Result<Ragged<f32>, RunError> {
            self.runs.fetch_add(1, Ordering::SeqCst);
            let has = |value| batch.iter().any(|number| number.value == value);
            let cost: usize = batch.iter().map(|number| number.cost as usize).sum();
            if self.in_use.fetch_add(cost, Ordering::SeqCst) + cost > self.memory {
                self.in_use.fetch_sub(cost, Ordering::SeqCst);
                self.did_not_fit.fetch_add(1, Ordering::SeqCst);
                return Err(RunError::OutOfMemory(format!("{cost} of {}", self.memory)));
            }
            if has(GREEDY) {
                until(|| self.did_not_fit.load(Ordering::SeqCst) > 0);
            }
            let endless = has(ENDLESS) || (self.deaf && has(PLAIN));
            while endless && !self.released.load(Ordering::SeqCst) {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            self.returned.fetch_add(usize::from(endless), Ordering::SeqCst);
            self.in_use.fetch_sub(cost, Ordering::SeqCst);
            if self.broken || has(BAD) {
                return Err(RunError::Batch("a bad number".to_owned()));
            }
            let mut answers = Ragged::default();
            for number in batch {
                let value = if number.value == UNCLEAR { f32::NAN } else { number.value as f32 };
                answers.push(&[value, number.cost as f32]);
            }
            Ok(answers)
        }

        fn sample(&self, _: u32) -> Number {
            Number::new(PLAIN)
        }
    }

    fn engine(lanes: usize, fake: Fake) -> Engine<Fake> {
        let limits = Limits {
            max_cost: 10_000,
            calibrated: Some(10_000),
            lanes: Some(lanes),
            timeout: Duration::from_millis(200),
            cache: None,
        };
        let place = Place { name: "fake".to_owned(), is_cpu: true };
        Engine::new(Arc::new(fake), place, limits, Arc::new(Metrics::new()))
    }

    fn roomy() -> Fake {
        Fake { memory: 10_000, ..Fake::default() }
    }

    fn numbers(values: impl IntoIterator<Item = u32>) -> Vec<Number> {
        values.into_iter().map(|value| Number::of(value, 2)).collect()
    }

    fn failed(response: &Response<(), f32>) -> Vec<u32> {
        let mut failed: Vec<u32> = response.failed.iter().map(|(item, _)| *item).collect();
        failed.sort_unstable();
        failed
    }

    /// Runs the items with these suspects, as after a timeout.
    fn suspected(
        engine: &Engine<Fake>,
        items: Vec<Number>,
        suspects: &[usize],
    ) -> Result<Response<(), f32>, EngineError<()>> {
        let plan = engine.plan(&items, |item| suspects.contains(&item));
        engine.answer(Request { id: 0, window: (), items, plan })
    }

    #[test]
    fn bisects_down_to_the_items_at_fault() {
        let engine = engine(2, roomy());
        let mut items = numbers(100..164);
        (items[10].value, items[40].value, items[51].value) = (BAD, BAD, UNCLEAR);
        items[40].cost = 3;
        let response = engine.run(items).unwrap();
        assert_eq!(failed(&response), [10, 40, 51]);
        for i in (0..64).filter(|i| ![10, 40, 51].contains(i)) {
            assert_eq!(response.answers.row(i), [100.0 + i as f32, 2.0], "item {i}");
        }
        assert!(response.answers.row(10).is_empty());
        assert!(engine.device.metrics.bisections.get() > 0);
    }

    #[test]
    fn halves_when_out_of_memory_and_remembers() {
        let engine = engine(1, Fake { memory: 100, ..Fake::default() });
        let items = || (0..50).map(|i| Number::of(i, 8)).collect::<Vec<_>>();
        let response = engine.run(items()).unwrap();
        assert!(response.failed.is_empty());
        assert_eq!(response.answers.row(49), [49.0, 8.0]);
        let splits = engine.device.metrics.oom_splits.with_label_values(&["batch"]);
        let (before, runs) = (splits.get(), engine.model().runs.load(Ordering::SeqCst));
        assert!(before > 0);
        engine.run(items()).unwrap();
        assert_eq!(splits.get(), before, "planned to fit now");
        assert!(engine.model().runs.load(Ordering::SeqCst) - runs <= 5);
    }

    #[test]
    fn one_item_that_does_not_fit_is_at_fault_if_the_device_is_healthy() {
        let engine = engine(1, Fake { memory: 4, ..Fake::default() });
        let response = engine.run(vec![Number::of(7, 5), Number::of(8, 3)]).unwrap();
        assert_eq!(failed(&response), [0]);
        assert!(response.failed[0].1.contains("does not fit the device"), "{:?}", response.failed);
        assert_eq!(response.answers.row(1), [8.0, 3.0]);
        let sick = super::tests::engine(1, Fake { memory: 0, ..Fake::default() });
        let message = sick.run(vec![Number::of(7, 5)]).expect_err("nothing fits").to_string();
        assert!(message.contains("fails on a known-good probe input"), "{message}");
    }

    #[test]
    fn one_item_that_does_not_fit_beside_another_lanes_batch_is_tried_alone() {
        let engine = engine(2, Fake { memory: 5, ..Fake::default() });
        let (greedy, large) = (Number::of(GREEDY, 3), Number::of(9, 4));
        // Two batches: the first holds its memory until the second has failed to fit.
        let batch = |item, cost| Batch { items: vec![item], cost, suspect: false };
        let plan = Plan { batches: vec![batch(0, 3), batch(1, 4)], duplicates: vec![], cached: vec![] };
        let response =
            engine.answer(Request { id: 0, window: (), items: vec![greedy, large], plan }).unwrap();
        assert!(response.failed.is_empty(), "{:?}", response.failed);
        assert_eq!(response.answers.row(1), [9.0, 4.0]);
    }

    #[test]
    fn no_item_is_blamed_if_the_device_fails_on_all_of_them() {
        let engine = engine(1, Fake { broken: true, ..roomy() });
        let message = engine.run(numbers([5, 6])).expect_err("fatal").to_string();
        assert!(message.contains("fails on a known-good probe input"), "{message}");
    }

    #[test]
    fn no_item_is_blamed_for_a_first_timeout_even_if_alone() {
        let engine = engine(2, roomy());
        let result = engine.run(vec![Number::new(ENDLESS), Number::new(ENDLESS)]);
        let Err(EngineError::TimedOut { items, .. }) = result else { panic!("{result:?}") };
        assert_eq!(items, [0, 1], "the item and its duplicate");
        engine.model().released.store(true, Ordering::SeqCst);
    }

    #[test]
    fn an_item_that_times_out_again_is_at_fault() {
        let engine = engine(2, roomy());
        let mut items = numbers(10..18);
        items[5].value = ENDLESS;
        let response = suspected(&engine, items, &[4, 5, 6, 7]).unwrap();
        assert_eq!((failed(&response), response.lane_abandoned), (vec![5], true));
        assert_eq!(response.answers.row(7), [17.0, 2.0]);
        engine.model().released.store(true, Ordering::SeqCst);
    }

    #[test]
    fn no_item_is_blamed_if_the_probe_times_out() {
        let engine = engine(1, Fake { deaf: true, ..roomy() });
        let result = suspected(&engine, numbers([5]), &[0]);
        assert!(matches!(result, Err(EngineError::Unresponsive(_))), "{result:?}");
        engine.model().released.store(true, Ordering::SeqCst);
    }

    #[test]
    fn an_abandoned_lane_that_returns_changes_nothing() {
        let engine = engine(1, roomy());
        let (ask, requests) = bounded(1);
        let (respond, responses) = bounded(1);
        std::thread::scope(|scope| {
            scope.spawn(|| engine.serve(&requests, &respond, None).unwrap());
            let ask = ask;
            let send = |id: u64, items: Vec<Number>, suspects: &[usize]| {
                let plan = engine.plan(&items, |item| suspects.contains(&item));
                ask.send(Queued::new(Request { id, window: (), items, plan })).unwrap();
            };
            send(0, vec![Number::new(ENDLESS)], &[0]);
            assert!(responses.recv().unwrap().into_inner().lane_abandoned);
            // The abandoned thread returns while another window is open.
            send(1, vec![Number::new(5), Number::of(GREEDY, 2)], &[]);
            engine.model().released.store(true, Ordering::SeqCst);
            until(|| engine.model().returned.load(Ordering::SeqCst) == 1);
            engine.model().did_not_fit.store(1, Ordering::SeqCst);
            for i in 0..50 {
                let response = responses.recv().unwrap().into_inner();
                assert!(response.failed.is_empty() && !response.lane_abandoned);
                assert_eq!(response.answers.row(0)[0], if i == 0 { 5.0 } else { 100.0 + i as f32 });
                send(2 + u64::from(i), numbers([101 + i]), &[]);
            }
            drop(responses.recv().unwrap());
        });
    }

    #[test]
    fn equal_items_are_computed_once() {
        let engine = engine(1, roomy());
        let mut items = numbers((0..60).map(|i| i % 3 + 10));
        items.extend(numbers([BAD, BAD]));
        let response = engine.run(items).unwrap();
        for i in 0..60 {
            assert_eq!(response.answers.row(i), [(i % 3 + 10) as f32, 2.0], "item {i}");
        }
        assert_eq!(failed(&response), [60, 61]);
        let metrics = &engine.device.metrics;
        assert_eq!(metrics.reused.with_label_values(&["window"]).get(), 58);
        assert!(metrics.batch_records.get_sample_sum() <= 3.0, "each of the three once");
    }

    #[test]
    fn cached_answers_are_not_computed_again() {
        let mut engine = engine(1, roomy());
        engine.cache = Some(Cache::new(1 << 20));
        engine.run(numbers([5, 6, BAD])).unwrap();
        let runs = engine.model().runs.load(Ordering::SeqCst);
        let response = engine.run(numbers([5, 6, BAD])).unwrap();
        assert_eq!((response.answers.row(0), response.answers.row(1)), (&[5.0, 2.0][..], &[6.0, 2.0][..]));
        assert_eq!(failed(&response), [2], "a failure is tried again");
        assert_eq!(engine.device.metrics.reused.with_label_values(&["cache"]).get(), 2);
        assert_eq!(engine.model().runs.load(Ordering::SeqCst) - runs, 2, "the failing one and the probe");
    }

    #[test]
    fn windows_leave_in_the_order_they_came() {
        let engine = engine(3, roomy());
        let (ask, requests) = unbounded();
        let (respond, responses) = unbounded();
        for window in 0..20u32 {
            let items: Vec<Number> = (0..window % 5 * 30).map(|i| Number::of(i + 100, 3)).collect();
            let plan = engine.plan(&items, |_| false);
            ask.send(Queued::new(Request { id: window.into(), window, items, plan })).unwrap();
        }
        drop(ask);
        engine.serve(&requests, &respond, None).unwrap();
        drop(respond);
        let order: Vec<u32> = responses.iter().map(|response| response.into_inner().window).collect();
        assert_eq!(order, (0..20).collect::<Vec<_>>());
    }
}
