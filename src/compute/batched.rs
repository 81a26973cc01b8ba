//! A task whose items go through a model in batches.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use rayon::prelude::*;

use super::{About, Compute, ComputeError, Pace, Stage, StageContext, drop_windows};
use crate::codec::write::{self, Encoding, Writer};
use crate::codec::{Decoder, Input, Waiting};
use crate::engine::{
    Answers, Calibration, Engine, EngineError, Item, Model, Request, Response, RunError, TOKENS,
};
use crate::failpoint;
use crate::flow::{Encoded, Outcome, Queued, Report, Sample};
use crate::record::{Fault, Position, RecordError};
use crate::task::Task;
use crate::telemetry::health;
use crate::telemetry::{Health, Metrics};
use crate::watch::{Observer, Tally};
use crate::window::Window;

/// Records of a window that one core takes at a time, when decoding, preparing and encoding.
const DECODE_CHUNK: usize = 128;
const PREPARE_CHUNK: usize = 16;
const ENCODE_CHUNK: usize = 128;

/// How long to wait until the suspects are committed to the group; after that the process exits anyway.
const REMEMBER_TIMEOUT: Duration = Duration::from_secs(30);

/// A task and the engine that answers its items.
pub struct Batched<T: Task, M>
where
    M: Model<Item = T::Item, Value = T::Value>,
{
    pub about: About,
    pub decoder: Decoder,
    pub writer: Writer,
    pub task: T,
    pub engine: Engine<M>,
    pub pace: Pace,
    pub metrics: Arc<Metrics>,
}

/// One record between `prepare` and `predict`.
#[derive(Debug)]
enum State<K> {
    /// A null value, published as a null value.
    Tombstone,
    Pending(Pending<K>),
    /// A dead letter.
    Failed(RecordError),
}

/// A record on its way to a prediction.
#[derive(Debug)]
struct Pending<K> {
    /// What [`Task::predict`] needs of the record beside the answers.
    kept: K,
    /// Members for `output.include`, as JSON: `,"name":value`….
    include: String,
    /// Indexes of its items in the window.
    items: Range<usize>,
}

/// A window whose items are with the engine.
#[derive(Debug)]
pub struct Prepared<K> {
    window: Window,
    /// One per record.
    states: Vec<State<K>>,
}

impl<K> Prepared<K> {
    /// Indexes of the records that asked for any of these items.
    fn records_of(&self, items: &[u32]) -> impl Iterator<Item = usize> {
        let items: HashSet<usize> = items.iter().map(|&item| item as usize).collect();
        let asks = move |state: &State<K>| match state {
            State::Pending(pending) => pending.items.clone().any(|item| items.contains(&item)),
            State::Tombstone | State::Failed(_) => false,
        };
        self.states.iter().enumerate().filter(move |(_, state)| asks(state)).map(|(record, _)| record)
    }
}

/// The predictions of consecutive records.
struct Predicted {
    outcomes: Vec<Outcome>,
    memory: Vec<u8>,
    tally: Tally,
    samples: Vec<Sample>,
}

/// Consecutive records and their items.
type Part<T> = (Vec<State<<T as Task>::Kept>>, Vec<<T as Task>::Item>);
type RequestOf<T> = Request<Prepared<<T as Task>::Kept>, <T as Task>::Item, <T as Task>::Value>;
type ResponseOf<T> = Response<Prepared<<T as Task>::Kept>, <T as Task>::Value>;

impl<T: Task, M: Model<Item = T::Item, Value = T::Value>> Batched<T, M> {
    /// Observes the time of a stage. Returns now, when the next stage starts.
    fn observe(&self, stage: &str, started: Instant) -> Instant {
        let now = Instant::now();
        self.metrics.stage.with_label_values(&[stage]).observe((now - started).as_secs_f64());
        now
    }

    /// Decodes the records, makes their items and plans the batches.
    pub fn prepare(&self, window: Window) -> RequestOf<T> {
        let started = Instant::now();
        let inputs: Vec<Option<Result<Input<'_>, RecordError>>> = window
            .records
            .par_iter()
            .with_min_len(DECODE_CHUNK)
            .map(|record| window.raw(record).map(|value| self.decoder.decode(value)))
            .collect();
        let decoded = self.observe("decode", started);
        let parts: Vec<Part<T>> =
            inputs.into_par_iter().chunks(PREPARE_CHUNK).map(|inputs| self.prepare_part(inputs)).collect();
        let decoded = T::ITEMS_STAGE.map_or(decoded, |stage| self.observe(stage, decoded));
        let (mut states, mut items) = (Vec::with_capacity(window.records.len()), Vec::new());
        for (part, of_part) in parts {
            let before = items.len();
            states.extend(part.into_iter().map(|state| match state {
                State::Pending(pending) => {
                    let items = pending.items.start + before..pending.items.end + before;
                    State::Pending(Pending { items, ..pending })
                }
                other => other,
            }));
            items.extend(of_part);
        }
        let units = items.iter().map(Item::units).sum();
        self.metrics.input_units.with_label_values(&[T::Item::UNIT]).inc_by(units);
        if T::Item::UNIT == TOKENS {
            self.metrics.tokens.inc_by(units);
        }
        self.metrics.unknown_tokens.inc_by(items.iter().map(|item| self.engine.model().unknown(item)).sum());
        let sizes = self.metrics.record_units.with_label_values(&[T::Item::UNIT]).local();
        for state in &states {
            if let State::Pending(pending) = state {
                let of_record: u64 = items[pending.items.clone()].iter().map(Item::units).sum();
                sizes.observe(of_record as f64);
            }
        }
        sizes.flush();
        let suspects: HashSet<usize> = (window.records.iter().zip(&states))
            .filter(|(record, _)| record.suspect)
            .flat_map(|(_, state)| match state {
                State::Pending(pending) => pending.items.clone(),
                State::Tombstone | State::Failed(_) => 0..0,
            })
            .collect();
        let plan = self.engine.plan(&items, |item| suspects.contains(&item));
        self.observe("prepare", decoded);
        Request { id: window.id, window: Prepared { window, states }, items, plan }
    }

    /// Fetches the schemas of a window's records, for however long the registry is away.
    fn fetch_for(&self, window: &Window) {
        let waiting = Waiting { stop: None, health: None, metrics: &self.metrics };
        // Never stopped.
        let _ = self.decoder.fetch(window.values(), &waiting);
    }

    fn prepare_part(&self, inputs: Vec<Option<Result<Input<'_>, RecordError>>>) -> Part<T> {
        let mut items = Vec::with_capacity(inputs.len());
        let state = |input: Option<Result<Input<'_>, RecordError>>| {
            let input = match input {
                None => return State::Tombstone,
                Some(Err(error)) => return State::Failed(error),
                Some(Ok(input)) => input,
            };
            let before = items.len();
            match self.task.prepare(&input, &mut items) {
                Ok(kept) => {
                    State::Pending(Pending { kept, include: input.include, items: before..items.len() })
                }
                Err(error) => {
                    items.truncate(before);
                    State::Failed(error)
                }
            }
        };
        let states = inputs.into_iter().map(state).collect();
        (states, items)
    }

    /// Turns answers into predictions, in `output.format`, and shows them to the observer.
    pub fn predict(&self, response: ResponseOf<T>, observer: &Observer) -> Encoded {
        self.predict_in(self.writer.encoding(), response, observer)
    }

    /// Turns answers into predictions, as bytes. Without an encoding, what the task writes is published.
    fn predict_in(
        &self,
        encoding: Option<Encoding<'_>>,
        response: ResponseOf<T>,
        observer: &Observer,
    ) -> Encoded {
        let started = Instant::now();
        let Response { window: Prepared { window, mut states }, answers, failed, busy, .. } = response;
        if !failed.is_empty() {
            fail(&mut states, failed);
        }
        let parts: Vec<Predicted> = states
            .into_par_iter()
            .chunks(ENCODE_CHUNK)
            .enumerate()
            .map(|(part, states)| self.predict_part(encoding, part, states, &answers, &window, observer))
            .collect();
        let (mut outcomes, mut memory) = (Vec::with_capacity(window.records.len()), Vec::new());
        let (mut tally, mut samples) = (Tally::default(), Vec::new());
        for part in parts {
            outcomes.extend(part.outcomes);
            memory.push(part.memory);
            tally.append(part.tally);
            samples.extend(part.samples);
        }
        let ended = self.observe("encode", started);
        // Inference and predictions of different windows overlap, so the slower of the two sets the pace.
        self.pace.observe(&window, busy.max(ended - started));
        let model = Arc::new(self.about.version());
        Encoded { window, model, outcomes, memory, tally, samples }
    }

    fn predict_part(
        &self,
        encoding: Option<Encoding<'_>>,
        part: usize,
        states: Vec<State<T::Kept>>,
        answers: &Answers<T::Value>,
        window: &Window,
        observer: &Observer,
    ) -> Predicted {
        let pending = states.iter().enumerate().filter_map(|(at, state)| match state {
            State::Pending(pending) => Some((part * ENCODE_CHUNK + at, pending)),
            State::Tombstone | State::Failed(_) => None,
        });
        let (mut json, mut start, mut predictions) = (Vec::new(), 0, Vec::with_capacity(states.len()));
        let (mut tally, mut samples) = (Tally::default(), Vec::new());
        let mut memory = Vec::new();
        let records: Vec<_> =
            pending.clone().map(|(_, of)| (&of.kept, answers.rows(of.items.clone()))).collect();
        if observer.counts() {
            let items = pending.clone().flat_map(|(_, of)| of.items.clone());
            tally.norms.extend(items.filter_map(|item| self.task.norm(answers.row(item))));
        }
        let mut asked = pending;
        self.task.predict_all(&records, &mut json, &mut |result, json| {
            let (record, include) =
                asked.next().map(|(at, of)| (at, of.include.as_str())).unwrap_or_default();
            let mut result = result.map(|()| write::include(include, json));
            if let Some(encoding) = encoding {
                result = result.and_then(|()| encoding.write(json, &mut memory));
            }
            if result.is_ok() {
                let prediction = &json[if encoding.is_some() { 0 } else { start }..];
                observer.count(prediction, &mut tally);
                samples.extend(observer.sample(window, record, Some(prediction)));
            }
            let written = match encoding {
                None => json,
                Some(_) => {
                    json.clear();
                    &mut memory
                }
            };
            predictions.push(match result {
                Ok(()) => {
                    Outcome::Prediction { part: part as u32, bytes: start as u32..written.len() as u32 }
                }
                Err(error) => {
                    written.truncate(start);
                    Outcome::Dead(error)
                }
            });
            start = written.len();
        });
        let memory = if encoding.is_some() { memory } else { json };
        let mut predictions = predictions.into_iter();
        let outcome = |state| match state {
            State::Tombstone => Outcome::Tombstone,
            State::Failed(error) => Outcome::Dead(error),
            State::Pending(_) => predictions.next().expect("predict_all writes one prediction per record"),
        };
        let outcomes = states.into_iter().map(outcome).collect();
        Predicted { outcomes, memory, tally, samples }
    }

    /// Prepares one window and runs the model over it.
    fn respond(&self, window: Window) -> Result<ResponseOf<T>, ComputeError> {
        self.fetch_for(&window);
        self.engine.answer(self.prepare(window)).map_err(EngineError::without_window)
    }

    fn prepare_all(
        &self,
        windows: &Receiver<Queued<Window>>,
        requests: &Sender<Queued<RequestOf<T>>>,
        reports: &Sender<Report>,
        health: &Health,
        stop: &AtomicBool,
        observer: &Observer,
    ) {
        let waiting = Waiting {
            stop: Some(stop),
            health: Some((health, health::Stage::Prepare)),
            metrics: &self.metrics,
        };
        for window in windows {
            health.busy(health::Stage::Prepare);
            let window = window.take(&self.metrics, "wait_decode");
            let fetched = self.decoder.fetch(window.values(), &waiting);
            if fetched.and_then(|()| observer.fetch(&window, &waiting)).is_err() {
                return drop_windows(window, windows, reports);
            }
            let request = self.prepare(window);
            health.idle(health::Stage::Prepare);
            if requests.send(Queued::new(request)).is_err() {
                return;
            }
        }
    }

    fn infer_all(
        &self,
        requests: &Receiver<Queued<RequestOf<T>>>,
        responses: &Sender<Queued<ResponseOf<T>>>,
        reports: &Sender<Report>,
        health: &Health,
    ) -> Result<(), ComputeError> {
        self.engine.serve(requests, responses, Some(health)).map_err(|error| {
            if let EngineError::TimedOut { window: prepared, items, .. } = &error {
                let window = &prepared.window;
                let positions =
                    prepared.records_of(items).map(|record| window.position(&window.records[record]));
                remember(positions.collect(), reports);
            }
            error.without_window()
        })
    }

    fn predict_all(
        &self,
        responses: &Receiver<Queued<ResponseOf<T>>>,
        encoded: &Sender<Queued<Encoded>>,
        health: &Health,
        end: &dyn Fn(&str),
        observer: &Observer,
    ) {
        for response in responses {
            health.busy(health::Stage::Encode);
            failpoint::pass("encode");
            let response = response.take(&self.metrics, "wait_encode");
            if response.lane_abandoned {
                end(
                    "inference on one record exceeded batch.timeout; the record was dead-lettered. Restarting to free \
                     the stuck thread",
                );
            }
            let window = self.predict(response, observer);
            health.idle(health::Stage::Encode);
            if encoded.send(Queued::new(window)).is_err() {
                return;
            }
        }
    }
}

impl<T: Task, M: Model<Item = T::Item, Value = T::Value>> Compute for Batched<T, M> {
    fn about(&self) -> About {
        self.about.clone()
    }

    fn pointers(&self) -> Vec<String> {
        self.decoder.pointers()
    }

    fn labels(&self) -> Option<Vec<String>> {
        self.task.labels()
    }

    fn writer(&self) -> Option<Writer> {
        Some(self.writer.clone())
    }

    fn footprint(&self, value: &[u8]) -> usize {
        self.task.footprint(value)
    }

    fn work(&self, value_bytes: usize) -> f64 {
        self.pace.of_record(value_bytes)
    }

    fn costs(&self, window: Window) -> Vec<u64> {
        self.fetch_for(&window);
        let Request { window: Prepared { states, .. }, items, plan, .. } = self.prepare(window);
        let computed = plan.computed();
        let cost =
            |item: usize| if computed.contains(&(item as u32)) { u64::from(items[item].cost()) } else { 0 };
        let of_record = |state: &State<T::Kept>| match state {
            State::Pending(pending) => pending.items.clone().map(cost).sum(),
            State::Tombstone | State::Failed(_) => 0,
        };
        states.iter().map(of_record).collect()
    }

    fn full(&self) -> u64 {
        (self.engine.lanes() * self.engine.budget()) as u64
    }

    fn lanes(&self) -> usize {
        self.engine.lanes()
    }

    fn stages(self: Arc<Self>, wires: StageContext) -> Vec<Stage<ComputeError>> {
        let StageContext { windows, encoded, reports, health, observer, stop, end } = wires;
        let of_windows = observer.clone();
        let dropped = reports.clone();
        let (to_infer, requests) = bounded(1);
        let (to_predict, responses) = bounded(1);
        let [preparer, inferrer, predictor] = [Arc::clone(&self), Arc::clone(&self), self];
        let [of_prepare, of_infer, of_predict] = [Arc::clone(&health), Arc::clone(&health), health];
        let stage = |name, work| Stage { name, work };
        vec![
            stage(
                "prepare",
                Box::new(move || {
                    preparer.prepare_all(&windows, &to_infer, &dropped, &of_prepare, &stop, &of_windows);
                    Ok(())
                }),
            ),
            stage("infer", Box::new(move || inferrer.infer_all(&requests, &to_predict, &reports, &of_infer))),
            stage(
                "encode",
                Box::new(move || {
                    predictor.predict_all(&responses, &encoded, &of_predict, &*end, &observer);
                    Ok(())
                }),
            ),
        ]
    }

    fn answer(&self, window: Window) -> Result<Encoded, ComputeError> {
        Ok(self.predict(self.respond(window)?, &Observer::default()))
    }

    fn answer_in_json(&self, window: Window) -> Result<Encoded, ComputeError> {
        Ok(self.predict_in(None, self.respond(window)?, &Observer::default()))
    }

    fn calibrate(&self) -> Option<Result<Calibration, RunError>> {
        Some(self.engine.calibrate())
    }
}

/// Fails each record that has a failed item, with the message of the first one.
fn fail<K>(states: &mut [State<K>], mut failed: Vec<(u32, String)>) {
    failed.sort_by_key(|(item, _)| *item);
    for state in states {
        let State::Pending(pending) = state else { continue };
        let first = failed.partition_point(|(item, _)| (*item as usize) < pending.items.start);
        if let Some((item, message)) = failed.get(first)
            && pending.items.contains(&(*item as usize))
        {
            *state = State::Failed(RecordError::new(Fault::Infer, message.clone()));
        }
    }
}

/// Has the source store the records on which inference timed out in the group's commit metadata, for the next start.
fn remember(positions: Vec<Position>, reports: &Sender<Report>) {
    let names: Vec<String> = positions.iter().map(Position::to_string).collect();
    tracing::error!(
        records = names.join(" "),
        "inference exceeded batch.timeout on a batch with these records: the next start runs each of them alone"
    );
    let (kept, told) = bounded(1);
    if reports.send(Report::Suspects { positions, kept }).is_ok() {
        // A channel that closes without a message means that the commit failed, which the source logs.
        let _ = told.recv_timeout(REMEMBER_TIMEOUT);
    }
}
