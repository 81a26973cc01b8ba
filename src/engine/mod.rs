//! Running a model over windows: the plan of batches, the lanes they run on, and what happens when
//! one fails. Nothing here knows Kafka.

mod budget;
mod cache;
mod calibrate;
mod lane;
mod plan;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, never, select, unbounded};

pub use budget::Budget;
pub use calibrate::{Calibrations, Rate};
pub use lane::{Forward, ForwardError};
pub use plan::{Batch, Plan, plan};

use crate::failpoint;
use crate::model::{Model, Tokens};
use crate::record::{Fault, RecordError};
use crate::telemetry::Metrics;
use cache::Cache;
use lane::{Done, Lanes, Work};

/// Tokens of a batch on a CPU core: what a layer writes then stays in the second-level cache. In f32, 512
/// are no faster; in bf16 and int8, where the multiplication waits for nothing else, a tenth slower. 128 are
/// a tenth slower. Small batches also spread evenly over the cores.
const CORE_TOKENS: usize = 256;

/// Windows on the lanes at a time: while the last batches of one run, the next one fills idle lanes.
const WINDOWS: usize = 2;

/// What the engine is asked: one window.
pub struct Request<W> {
    /// Travels along untouched.
    pub window: W,
    pub tokens: Vec<Option<Tokens>>,
    pub plan: Plan,
}

/// What it answers: one row of `width` numbers per place in the window.
pub struct Response<W> {
    pub window: W,
    pub rows: Vec<f32>,
    pub width: usize,
    pub failed: Vec<(u32, RecordError)>,
    /// A lane was left behind for one of the failed: the process had better start again.
    pub lane_lost: bool,
}

/// Why the engine can compute no more.
#[derive(Debug, thiserror::Error)]
pub enum EngineError<W> {
    #[error("{0}")]
    Fatal(String),
    /// A forward over these records of the window has not come to an end within `batch.timeout`.
    #[error("a forward over {} records did not end within {limit:?}", records.len())]
    Hung { window: W, records: Vec<u32>, limit: Duration },
}

/// How an engine is set.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// `batch.max_tokens`.
    pub max_tokens: usize,
    /// What calibration found for the model on the device.
    pub calibrated: Option<usize>,
    /// `batch.lanes`.
    pub lanes: Option<usize>,
    /// `batch.timeout`.
    pub timeout: Duration,
    /// `task.cache`, in bytes.
    pub cache: Option<u64>,
}

/// A model on its lanes.
pub struct Engine {
    model: Arc<dyn Forward>,
    budget: Arc<Budget>,
    lanes: usize,
    /// A lane is a core.
    single_core: bool,
    device: String,
    timeout: Duration,
    cache: Option<Cache>,
    metrics: Arc<Metrics>,
}

impl Engine {
    /// A lane for each core the process may use, or two for a GPU: while one waits for its results, the
    /// other's batch is already queued.
    pub fn new(model: Arc<Model>, canary: Tokens, limits: Limits, metrics: Arc<Metrics>) -> Self {
        let cpu = model.placement.is_cpu();
        let (lanes, budget) = match cpu {
            true => (limits.lanes.unwrap_or_else(cores), CORE_TOKENS),
            false => (2, limits.max_tokens),
        };
        let budget = limits.calibrated.unwrap_or(budget).min(limits.max_tokens);
        let device = model.placement.name.clone();
        let limits = Limits { max_tokens: budget, ..limits };
        let model = Arc::new(OnDevice { model, canary });
        Self { single_core: cpu, ..Self::with(model, lanes, limits, device, metrics) }
    }

    fn with(
        model: Arc<dyn Forward>,
        lanes: usize,
        limits: Limits,
        device: String,
        metrics: Arc<Metrics>,
    ) -> Self {
        let budget = Arc::new(Budget::new(limits.max_tokens));
        let cache = limits.cache.map(|bytes| Cache::new(bytes, model.width()));
        Self { model, budget, lanes, single_core: false, device, timeout: limits.timeout, cache, metrics }
    }

    /// Tokens a second on one lane, by the tokens of a batch, and the budget to choose.
    pub fn calibrate(&self) -> Result<(Vec<Rate>, Option<usize>), String> {
        let (least, most) = if self.single_core { (64, 2048) } else { (1024, 65_536) };
        let rates = calibrate::measure(&*self.model, least, most).map_err(|e| e.to_string())?;
        let chosen = calibrate::choose(&rates);
        Ok((rates, chosen))
    }

    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// The plan for a window whose records have these tokens: inputs that are the same are computed
    /// once, those that the cache knows not at all. A suspect is a batch of its own.
    pub fn plan(&self, tokens: &[Option<Tokens>], suspect: impl Fn(usize) -> bool) -> Plan {
        let mut plan = Plan::default();
        let (mut together, mut alone) = (Vec::new(), Vec::new());
        let mut seen: HashMap<&Tokens, u32> = HashMap::with_capacity(tokens.len());
        for (i, tokens) in tokens.iter().enumerate() {
            let (record, Some(tokens)) = (i as u32, tokens) else { continue };
            if suspect(i) {
                alone.push(Batch { records: vec![record], tokens: tokens.ids.len() });
            } else if let Some(row) = self.cache.as_ref().and_then(|cache| cache.get(tokens)) {
                plan.known.push((record, row));
            } else {
                let first = *seen.entry(tokens).or_insert(record);
                if first == record {
                    together.push((record, tokens.ids.len()));
                } else {
                    plan.copies.push((record, first));
                }
            }
        }
        self.metrics.reused.with_label_values(&["window"]).inc_by(plan.copies.len() as u64);
        if let Some(cache) = &self.cache {
            self.metrics.reused.with_label_values(&["cache"]).inc_by(plan.known.len() as u64);
            self.metrics.memory.with_label_values(&["cache"]).set(cache.bytes() as i64);
        }
        plan.batches = plan::plan(together, self.budget.tokens(), self.lanes);
        plan.batches.extend(alone);
        plan
    }

    /// Serves what comes in until the channel closes; answers leave in the order of the requests.
    /// `open` makes the request of what came, `close` takes the answer and says whether to go on,
    /// `activity` is told when batches move (true) and when there is nothing to do (false). The error
    /// is one after which nothing more can be computed.
    pub fn serve<T, W>(
        &self,
        incoming: &Receiver<T>,
        open: impl Fn(T) -> Request<W>,
        mut close: impl FnMut(Response<W>) -> bool,
        activity: impl Fn(bool),
    ) -> Result<(), EngineError<W>> {
        let look = (self.timeout / 4).min(Duration::from_secs(1));
        let mut lanes = Lanes::start(
            self.lanes,
            &self.device,
            Arc::clone(&self.model),
            Arc::clone(&self.budget),
            Arc::clone(&self.metrics),
        );
        let (done, finished) = unbounded::<Done>();
        let closed = never();
        let mut more = true;
        let mut next = 0u64;
        let mut running: VecDeque<Running<W>> = VecDeque::new();
        while more || !running.is_empty() {
            let source = if more && running.len() < WINDOWS { incoming } else { &closed };
            activity(!running.is_empty());
            select! {
                recv(source) -> window => match window {
                    Ok(window) => {
                        activity(true);
                        running.push_back(Running::start(next, open(window), self.model.width(), &lanes.work, &done));
                        next += 1;
                    }
                    Err(_) => more = false,
                },
                recv(finished) -> part => {
                    let part = part.expect("this end holds a sender");
                    if let Some(message) = part.fatal {
                        return Err(EngineError::Fatal(message));
                    }
                    let at = (part.window - running[0].id) as usize;
                    running[at].take(part, self.cache.as_ref());
                }
                default(look) => {}
            }
            if let Some((lane, hung)) = lanes.hung(self.timeout) {
                let at = (hung.window - running[0].id) as usize;
                if !hung.alone {
                    let hanging = running.remove(at).expect("its batch runs");
                    let records = hanging.with_copies(hung.records);
                    let window = hanging.response.window;
                    return Err(EngineError::Hung { window, records, limit: self.timeout });
                }
                lanes.replace(lane);
                running[at].leave_behind(hung.records[0], self.timeout);
            }
            while running.front().is_some_and(|first| first.left == 0) {
                let first = running.pop_front().expect("there is a first").finish();
                // While the next stage is full the lanes go on with what they have.
                activity(false);
                if !close(first) {
                    more = false;
                    running.clear();
                }
            }
        }
        activity(false);
        lanes.join();
        Ok(())
    }

    /// Plans and runs one window by itself.
    pub fn run(&self, tokens: Vec<Option<Tokens>>) -> Result<Response<()>, String> {
        let plan = self.plan(&tokens, |_| false);
        self.answer(Request { window: (), tokens, plan })
    }

    /// Runs one window by itself.
    pub fn answer(&self, request: Request<()>) -> Result<Response<()>, String> {
        let (ask, requests) = unbounded();
        ask.send(request).expect("the receiver is here");
        drop(ask);
        let mut response = None;
        self.serve(&requests, |request| request, |answer| response.replace(answer).is_none(), |_| {})
            .map_err(|e| e.to_string())?;
        Ok(response.expect("one request has one answer"))
    }
}

/// As many lanes as the process may use cores (its cgroup's quota counted).
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

struct Running<W> {
    id: u64,
    /// Batches not yet done.
    left: usize,
    tokens: Arc<Vec<Option<Tokens>>>,
    /// Without its batches, which are on the lanes.
    plan: Plan,
    response: Response<W>,
}

impl<W> Running<W> {
    fn start(id: u64, request: Request<W>, width: usize, work: &Sender<Work>, done: &Sender<Done>) -> Self {
        let Request { window, tokens, mut plan } = request;
        let empty = plan.batches.is_empty() && plan.known.is_empty();
        let mut rows = if empty { Vec::new() } else { vec![0.0; tokens.len() * width] };
        for (record, row) in plan.known.drain(..) {
            rows[record as usize * width..][..width].copy_from_slice(&row);
        }
        let tokens = Arc::new(tokens);
        let left = plan.batches.len();
        for batch in plan.batches.drain(..) {
            let sent = work.send(Work { window: id, tokens: Arc::clone(&tokens), batch, done: done.clone() });
            assert!(sent.is_ok(), "lanes live as long as the engine serves");
        }
        let response = Response { window, rows, width, failed: Vec::new(), lane_lost: false };
        Self { id, left, tokens, plan, response }
    }

    fn take(&mut self, done: Done, cache: Option<&Cache>) {
        let width = self.response.width;
        for (row, &record) in done.rows.chunks_exact(width).zip(&done.records) {
            self.response.rows[record as usize * width..][..width].copy_from_slice(row);
            if let (Some(cache), Some(tokens)) = (cache, &self.tokens[record as usize])
                && !done.failed.iter().any(|(failed, _)| *failed == record)
            {
                cache.insert(tokens, row);
            }
        }
        self.response.failed.extend(done.failed);
        self.left -= 1;
    }

    /// A record, alone in its forward, that does not come to an end: it is the one at fault.
    fn leave_behind(&mut self, record: u32, limit: Duration) {
        let message = format!("the model did not come to an end on this record within {limit:?}");
        self.response.failed.push((record, RecordError::new(Fault::Infer, message)));
        self.response.lane_lost = true;
        self.left -= 1;
    }

    /// These records, and those whose input is the same as one of theirs.
    fn with_copies(&self, mut records: Vec<u32>) -> Vec<u32> {
        let copies = self.plan.copies.iter().filter(|(_, first)| records.contains(first));
        let copies: Vec<u32> = copies.map(|(copy, _)| *copy).collect();
        records.extend(copies);
        records
    }

    /// All batches are done: what was computed once is given to all that have it.
    fn finish(mut self) -> Response<W> {
        let width = self.response.width;
        let failed: HashMap<u32, RecordError> = self.response.failed.iter().cloned().collect();
        for (copy, first) in self.plan.copies {
            if let Some(error) = failed.get(&first) {
                self.response.failed.push((copy, error.clone()));
            } else {
                let first = first as usize * width;
                self.response.rows.copy_within(first..first + width, copy as usize * width);
            }
        }
        self.response
    }
}

/// The model as it is on its device.
struct OnDevice {
    model: Arc<Model>,
    canary: Tokens,
}

impl Forward for OnDevice {
    fn width(&self) -> usize {
        self.model.width()
    }

    fn forward(&self, batch: &[&Tokens]) -> Result<Vec<f32>, ForwardError> {
        failpoint::pass("device");
        if let Some(id) = failpoint::argument("hang").and_then(|id| id.parse().ok())
            && batch.iter().any(|tokens| tokens.ids.contains(&id))
        {
            loop {
                std::thread::park();
            }
        }
        self.model.forward(batch).map_err(|e| classify(&e.to_string()))
    }

    fn canary(&self) -> &Tokens {
        &self.canary
    }
}

/// Candle has one error type for all; the driver's names tell them apart.
fn classify(message: &str) -> ForwardError {
    let first = message.lines().next().unwrap_or_default().to_owned();
    let lower = message.to_lowercase();
    if lower.contains("out of memory") || lower.contains("out_of_memory") || lower.contains("alloc_failed") {
        ForwardError::OutOfMemory(first)
    } else if lower.contains("cuda_error") || lower.contains("cublas_status") || lower.contains("metal error")
    {
        ForwardError::Device(first)
    } else {
        ForwardError::Batch(first)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A device with `memory` tokens of room that fails on the token 666 and gives each record the
    /// sum of its ids.
    struct Fake {
        memory: usize,
        broken: bool,
        forwards: AtomicUsize,
        canary: Tokens,
    }

    /// A token on which the device never comes to an end.
    const ENDLESS: u32 = 777;

    impl Forward for Fake {
        fn width(&self) -> usize {
            2
        }

        fn forward(&self, batch: &[&Tokens]) -> Result<Vec<f32>, ForwardError> {
            self.forwards.fetch_add(1, Ordering::Relaxed);
            while batch.iter().any(|t| t.ids.contains(&ENDLESS)) {
                std::thread::park();
            }
            let total: usize = batch.iter().map(|t| t.ids.len()).sum();
            if total > self.memory {
                return Err(ForwardError::OutOfMemory(format!("{total} tokens")));
            }
            if self.broken || batch.iter().any(|t| t.ids.contains(&666)) {
                return Err(ForwardError::Batch("a bad token".to_owned()));
            }
            Ok(batch
                .iter()
                .flat_map(|t| {
                    let sum: u32 = t.ids.iter().sum();
                    [if sum == 1300 { f32::NAN } else { sum as f32 }, t.ids.len() as f32]
                })
                .collect())
        }

        fn canary(&self) -> &Tokens {
            &self.canary
        }
    }

    fn tokens(ids: &[u32]) -> Option<Tokens> {
        Some(Tokens { ids: ids.to_vec(), type_ids: None, truncated: false })
    }

    fn engine(memory: usize, broken: bool, lanes: usize) -> (Engine, Arc<Fake>, Arc<Metrics>) {
        let fake =
            Arc::new(Fake { memory, broken, forwards: AtomicUsize::new(0), canary: tokens(&[1]).unwrap() });
        let metrics = Arc::new(Metrics::new());
        let model: Arc<dyn Forward> = Arc::clone(&fake) as _;
        let limits = Limits {
            max_tokens: 10_000,
            calibrated: None,
            lanes: None,
            timeout: Duration::from_millis(200),
            cache: None,
        };
        (Engine::with(model, lanes, limits, "fake".to_owned(), Arc::clone(&metrics)), fake, metrics)
    }

    #[test]
    fn bisects_down_to_the_records_at_fault() {
        let (engine, _, metrics) = engine(10_000, false, 2);
        let mut window: Vec<_> = (1..=64).map(|i| tokens(&[i, 1])).collect();
        window[10] = tokens(&[666]);
        window[40] = tokens(&[5, 666]);
        window[50] = None;
        window[51] = tokens(&[1299, 1]);
        let response = engine.run(window).unwrap();
        let mut failed: Vec<(u32, Fault)> = response.failed.iter().map(|(i, e)| (*i, e.fault)).collect();
        failed.sort_by_key(|(i, _)| *i);
        assert_eq!(failed, [(10, Fault::Infer), (40, Fault::Infer), (51, Fault::Infer)]);
        for i in (0..64).filter(|i| ![10, 40, 50, 51].contains(i)) {
            assert_eq!(response.rows[i * 2..i * 2 + 2], [(i + 2) as f32, 2.0], "record {i}");
        }
        assert!(metrics.bisections.with_label_values(&["forward"]).get() > 0);
    }

    #[test]
    fn halves_when_out_of_memory_and_remembers() {
        let (engine, fake, metrics) = engine(100, false, 1);
        let window = || (0..50).map(|i| tokens(&[i, i, i, i, i, i, i, i])).collect::<Vec<_>>();
        let response = engine.run(window()).unwrap();
        assert!(response.failed.is_empty());
        assert_eq!(response.rows[49 * 2], 49.0 * 8.0);
        assert!(metrics.oom_splits.with_label_values(&["forward"]).get() > 0);
        let before = metrics.oom_splits.with_label_values(&["forward"]).get();
        let forwards = fake.forwards.load(Ordering::Relaxed);
        engine.run(window()).unwrap();
        assert_eq!(metrics.oom_splits.with_label_values(&["forward"]).get(), before, "planned to fit now");
        assert!(fake.forwards.load(Ordering::Relaxed) - forwards <= 5);
    }

    #[test]
    fn one_record_that_does_not_fit_is_fatal() {
        let (engine, ..) = engine(4, false, 1);
        let message = engine.run(vec![tokens(&[1, 2, 3, 4, 5])]).err().expect("does not fit");
        assert!(message.contains("one record of 5 tokens"), "{message}");
    }

    #[test]
    fn a_device_that_fails_everything_dead_letters_nothing() {
        let (engine, ..) = engine(10_000, true, 1);
        let message = engine.run(vec![tokens(&[1]), tokens(&[2])]).err().expect("fatal");
        assert!(message.contains("even a plain text fails"), "{message}");
    }

    #[test]
    fn a_forward_that_does_not_end_is_named_and_alone_it_is_a_dead_letter() {
        let (engine, ..) = engine(10_000, false, 2);
        let window: Vec<_> = (0..8).map(|i| tokens(&[if i == 5 { ENDLESS } else { i }, 1])).collect();
        let message = engine.run(window.clone()).err().expect("it hangs");
        assert!(message.contains("did not end"), "{message}");
        // As the next start runs it: every suspect alone.
        let plan = engine.plan(&window, |i| i >= 4);
        assert_eq!(plan.batches.iter().filter(|b| b.records.len() == 1).count(), 4);
        let response = engine.answer(Request { window: (), tokens: window, plan }).unwrap();
        assert!(response.lane_lost);
        assert_eq!(response.failed.len(), 1);
        assert_eq!((response.failed[0].0, response.failed[0].1.fault), (5, Fault::Infer));
        assert_eq!(response.rows[7 * 2], 8.0);
    }

    #[test]
    fn the_same_input_is_computed_once() {
        let (engine, fake, metrics) = engine(10_000, false, 1);
        let mut window: Vec<_> = (0..60).map(|i| tokens(&[i % 3 + 10, 1])).collect();
        window.extend([tokens(&[666]), tokens(&[666]), None]);
        let response = engine.run(window).unwrap();
        for i in 0..60 {
            assert_eq!(response.rows[i * 2..i * 2 + 2], [(i % 3 + 11) as f32, 2.0], "record {i}");
        }
        let mut failed: Vec<u32> = response.failed.iter().map(|(i, _)| *i).collect();
        failed.sort_unstable();
        assert_eq!(failed, [60, 61]);
        assert_eq!(metrics.reused.with_label_values(&["window"]).get(), 58);
        assert!(metrics.batch_records.get_sample_sum() <= 3.0, "each of the three once");
        assert!(fake.forwards.load(Ordering::Relaxed) < 12);
    }

    #[test]
    fn what_the_cache_has_is_not_computed_again() {
        let (mut engine, fake, metrics) = engine(10_000, false, 1);
        engine.cache = Some(Cache::new(1 << 20, 2));
        let window = || vec![tokens(&[5, 1]), tokens(&[6, 1]), tokens(&[666])];
        engine.run(window()).unwrap();
        let forwards = fake.forwards.load(Ordering::Relaxed);
        let response = engine.run(window()).unwrap();
        assert_eq!(response.rows[..4], [6.0, 2.0, 7.0, 2.0]);
        assert_eq!(response.failed.len(), 1, "a failure is tried again");
        assert_eq!(metrics.reused.with_label_values(&["cache"]).get(), 2);
        assert_eq!(fake.forwards.load(Ordering::Relaxed) - forwards, 2, "the failing one and the canary");
    }

    #[test]
    fn windows_leave_in_the_order_they_came() {
        let (engine, ..) = engine(10_000, false, 3);
        let (ask, requests) = unbounded();
        for id in 0..20u32 {
            let tokens: Vec<_> = (0..id % 5 * 30).map(|i| tokens(&[i + 100, 1, 1])).collect();
            let batches = plan(tokens.iter().enumerate().map(|(i, _)| (i as u32, 3)).collect(), 64, 3);
            ask.send(Request { window: id, tokens, plan: Plan { batches, ..Plan::default() } }).unwrap();
        }
        drop(ask);
        let mut order = Vec::new();
        let close = |answer: Response<u32>| {
            order.push(answer.window);
            true
        };
        engine.serve(&requests, |request| request, close, |_| {}).unwrap();
        assert_eq!(order, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn errors_are_told_apart() {
        assert!(matches!(
            classify("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")"),
            ForwardError::OutOfMemory(_)
        ));
        assert!(matches!(classify("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS)"), ForwardError::Device(_)));
        assert!(
            matches!(classify("token id 9 is outside\n  0: candle"), ForwardError::Batch(m) if m == "token id 9 is outside")
        );
    }
}
