//! The publisher: one thread that owns the producer.
//!
//! It sends the predictions and dead letters of a window in input order, and sends the next window without waiting for
//! their acknowledgement; the idempotent producer keeps the order.
//!
//! `at_least_once`: windows are reported in the order they came, each when all of its messages are acknowledged; the
//! source commits their offsets afterwards.
//!
//! `exactly_once`: messages go into one transaction with their offsets ([`super::transactions`]). A transaction ends
//! when its budget of bytes is used up, even in the middle of a window.
//!
//! A batch that the broker refuses is split until the record to blame is found ([`super::recovery`]). A fatal error of
//! the producer ends the process.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use rdkafka::types::RDKafkaErrorCode;

use super::acks::{Arrived, Failure, Ticket};
use super::compose::{Composed, Composer, Target, partition};
use super::error::PublishError;
use super::isolation::Meaning;
use super::producer::{NotTaken, ProducerLimits, RecordProducer, compresses, config};
use super::transactions::Transactions;
use super::window::{InFlightWindow, SampleOutcome};
use crate::failpoint;
use crate::flow::{CommitSoon, Encoded, Outcome, Published, Queued, Report};
use crate::kafka::cluster::{Cluster, OutputTopic, Topics};
use crate::kafka::consumer::Group;
use crate::kafka::metadata::MadeBy;
use crate::kafka::topic_rules::{Refusal, TopicRules};
use crate::lease::Lease;
use crate::record::{Fault, Partition, Record, RecordError};
use crate::settings::{Guarantee, Settings};
use crate::telemetry::health::Stage;
use crate::telemetry::traces::Traces;
use crate::telemetry::{Health, Metrics};
use crate::watch::Watch;

/// Interval between polls for delivery reports while windows are in flight.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Interval between polls while no window is in flight.
const IDLE_POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Most messages sent between two polls for delivery reports.
const BURST: usize = 4096;
/// A topic's configuration that is older than this is read again before a record is refused because of it.
pub(super) const RULES_AGE: Duration = Duration::from_secs(10);

/// What the publisher needs from the rest of the pipeline.
pub struct Context {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    pub commit_soon: Arc<CommitSoon>,
    /// Returns the consumer group metadata, under which a transaction commits offsets.
    pub group: Group,
    pub topics: Topics,
    /// Set when the process is asked to stop.
    pub stop: Arc<AtomicBool>,
    /// Counts what the published predictions show.
    pub watch: Watch,
    pub traces: Option<Arc<Traces>>,
}

/// The delivery guarantee and the state that it needs.
pub(super) enum Delivery {
    AtLeastOnce,
    ExactlyOnce(Box<Transactions>),
}

/// A place in the windows in flight: a window's id and the index of a record in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cursor {
    pub window: u64,
    pub place: usize,
}

/// The topics that the publisher writes to, and when their configuration was last read.
pub(super) struct TopicsWritten {
    output: OutputTopic,
    dead_letters: OutputTopic,
    samples: OutputTopic,
    read: Instant,
}

impl TopicsWritten {
    pub fn of(&self, target: Target) -> &OutputTopic {
        match target {
            Target::Output => &self.output,
            Target::DeadLetters => &self.dead_letters,
            Target::Samples => &self.samples,
        }
    }

    /// Largest batch in bytes that all topics accept; `None`: unknown.
    pub fn batch_limit(&self) -> Option<u64> {
        let all = [&self.output, &self.dead_letters, &self.samples];
        all.into_iter().filter_map(|topic| topic.rules.max_bytes).min()
    }
}

pub struct Publisher {
    pub(super) context: Context,
    pub(super) settings: Settings,
    pub(super) producer: RecordProducer,
    pub(super) delivery: Delivery,
    pub(super) topics: TopicsWritten,
    pub(super) composer: Composer,
    /// Messages are compressed, so their size on the wire is not known in advance.
    pub(super) compresses: bool,
    /// Windows received and not yet reported. The source's share of the memory limit bounds them.
    pub(super) windows: VecDeque<InFlightWindow>,
    /// Id of the last window received, plus 1. Window ids increase.
    next: u64,
    /// The next record to send.
    pub(super) cursor: Cursor,
    /// Who made the predictions up to the last window received, and the lease of its records.
    made_by: HashMap<Partition, (Lease, MadeBy)>,
    /// Messages that the broker refused and `recover` has yet to handle.
    pub(super) refused: Vec<Failure>,
    /// A sample that the client could not take, to be sent before anything else.
    pub(super) owed_sample: Option<Ticket>,
    /// The broker has refused a batch of samples, which `recover` has yet to handle.
    pub(super) sample_refused: bool,
    /// Why the open transaction cannot be committed, if so.
    pub(super) abort_reason: Option<String>,
    /// The producer has stopped because it could not deliver a batch.
    pub(super) producer_stopped: bool,
    /// How often `batch.size` was halved because batches were refused and no topic's limit is known.
    pub(super) halved: u32,
    /// The client may hold messages back to fill a batch (`linger.ms`).
    lingers: bool,
    /// Whether to send such messages at once when no more records are waiting.
    sends_at_once: bool,
    /// When the current burst began, in milliseconds since the Unix epoch.
    pub(super) now: i64,
    pub(super) reports: Sender<Report>,
}

impl Publisher {
    pub fn new(settings: &Settings, context: Context, reports: Sender<Report>) -> Result<Self, PublishError> {
        let topics = TopicsWritten {
            output: context.topics.output.clone(),
            dead_letters: context.topics.dead_letters.clone(),
            samples: context.topics.samples.clone().unwrap_or_default(),
            read: Instant::now(),
        };
        let limits = ProducerLimits { batch: topics.batch_limit(), halved: 0, one_request_at_a_time: false };
        let config = config(settings, limits);
        let (producer, delivery) = match settings.delivery.guarantee {
            Guarantee::AtLeastOnce => {
                let producer =
                    RecordProducer::new(&config, settings, &context.health).map_err(PublishError::Client)?;
                (producer, Delivery::AtLeastOnce)
            }
            Guarantee::ExactlyOnce => {
                let (producer, transactions) = Transactions::new(settings, config, &context.health)?;
                (producer, Delivery::ExactlyOnce(Box::new(transactions)))
            }
        };
        Ok(Self {
            composer: Composer::new(settings),
            compresses: compresses(settings),
            context,
            settings: settings.clone(),
            producer,
            delivery,
            topics,
            windows: VecDeque::new(),
            next: 0,
            cursor: Cursor::default(),
            made_by: HashMap::new(),
            refused: Vec::new(),
            owed_sample: None,
            sample_refused: false,
            abort_reason: None,
            producer_stopped: false,
            lingers: false,
            // A user who sets the linger time wants messages to wait.
            sends_at_once: !["linger.ms", "queue.buffering.max.ms"]
                .iter()
                .any(|name| settings.property(name).is_some()),
            halved: 0,
            now: 0,
            reports,
        })
    }

    /// Publishes windows until their channel closes and the last is acknowledged.
    pub fn serve(mut self, windows: &Receiver<Queued<Encoded>>) -> Result<(), PublishError> {
        if matches!(self.delivery, Delivery::ExactlyOnce(_)) && !self.become_transactional()? {
            return Ok(());
        }
        let mut open = true;
        while open || !self.windows.is_empty() {
            self.context.health.busy(Stage::Publish);
            // Even with no window in flight, the producer has to be polled now and then.
            let pause = if self.windows.is_empty() { IDLE_POLL_INTERVAL } else { POLL_INTERVAL };
            let ending = self.transaction_is_due(open);
            if open && !ending && self.all_is_sent() {
                match windows.recv_timeout(pause) {
                    Ok(window) => self.take(window.take(&self.context.metrics, "wait_publish")),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => open = false,
                }
            } else if ending || !self.may_send() {
                std::thread::park_timeout(pause);
            }
            self.send_owed_sample()?;
            if !ending {
                self.send()?;
            }
            if self.lingers && self.all_is_sent() && (ending || windows.is_empty()) {
                self.lingers = false;
                self.producer.send_now();
            }
            self.process_reports()?;
            if self.producer_stopped || self.sample_refused || !self.refused.is_empty() {
                self.recover()?;
            }
            match self.delivery {
                Delivery::AtLeastOnce => self.report_published(false),
                Delivery::ExactlyOnce(_) => self.advance_transaction(ending)?,
            }
        }
        self.context.health.idle(Stage::Publish);
        Ok(())
    }

    fn take(&mut self, mut content: Encoded) {
        for span in &mut content.window.spans {
            // Windows before this one may be in flight still: the source does not know yet who made them.
            let before = match self.made_by.get(&span.partition) {
                Some((lease, made_by)) if *lease == span.lease => made_by,
                _ => &span.metadata.made_by,
            };
            let made_by = before.followed_by(&content.model, span.first);
            span.metadata.made_by = made_by.clone();
            self.made_by.insert(span.partition.clone(), (span.lease.clone(), made_by));
        }
        let window = InFlightWindow::new(content);
        self.next = window.id() + 1;
        failpoint::pass("publish");
        if self.windows.is_empty() {
            self.cursor = Cursor { window: window.id(), place: 0 };
        }
        self.windows.push_back(window);
        self.show_memory();
    }

    /// Index in `windows` of the window with this id.
    pub(super) fn index(&self, id: u64) -> Option<usize> {
        self.windows.binary_search_by_key(&id, InFlightWindow::id).ok()
    }

    /// The window of the next record to send, if it has arrived.
    pub(super) fn next_window(&self) -> Option<&InFlightWindow> {
        // Ids have gaps where an earlier stage dropped a window.
        self.windows.get(self.windows.partition_point(|window| window.id() < self.cursor.window))
    }

    pub(super) fn all_is_sent(&self) -> bool {
        self.cursor.window == self.next || self.windows.is_empty()
    }

    /// Whether another message may be sent now.
    fn may_send(&self) -> bool {
        !self.all_is_sent()
            && self.abort_reason.is_none()
            && !self.producer_stopped
            && self.refused.is_empty()
            && self.owed_sample.is_none()
            && !self.sample_refused
            && self.producer.bytes < self.settings.memory.limit.0 / 4
    }

    /// Sends the next records, at most [`BURST`].
    fn send(&mut self) -> Result<(), PublishError> {
        self.now = now();
        for _ in 0..BURST {
            if !self.may_send() || !self.begin_transaction()? {
                return Ok(());
            }
            // Ids have gaps where an earlier stage dropped a window.
            let index = self.windows.partition_point(|window| window.id() < self.cursor.window);
            let Some(window) = self.windows.get(index) else { return Ok(()) };
            if window.id() > self.cursor.window {
                self.cursor = Cursor { window: window.id(), place: 0 };
            }
            if self.cursor.place == window.len() {
                failpoint::pass("sent");
                self.cursor = Cursor { window: self.cursor.window + 1, place: 0 };
                continue;
            }
            let place = self.cursor.place;
            if !self.send_if_ours(index, place)? {
                return Ok(());
            }
            self.cursor.place += 1;
        }
        Ok(())
    }

    /// Sends a record and its sample unless they are settled or its lease has ended. Returns false if the record cannot
    /// be sent now.
    pub(super) fn send_if_ours(&mut self, index: usize, place: usize) -> Result<bool, PublishError> {
        let window = &mut self.windows[index];
        if window.is_settled(place) {
            return Ok(true);
        }
        if window.is_held(place) {
            if !window.record_is_settled(place) && !self.send_record(index, place)? {
                return Ok(false);
            }
            self.send_sample(index, place)?;
            return Ok(true);
        }
        if matches!(self.delivery, Delivery::ExactlyOnce(_)) {
            // The transaction may hold records of the same lease, so it must be aborted.
            self.abort_reason.get_or_insert_with(|| "partitions were revoked".to_owned());
            return Ok(false);
        }
        window.drop_lost();
        Ok(true)
    }

    /// Queues a record's message in the client. Returns false if the client cannot take it now.
    fn send_record(&mut self, index: usize, place: usize) -> Result<bool, PublishError> {
        self.check_against_rules(index, place);
        let by = self.composer.partitioning;
        loop {
            let message = self.composer.compose(&self.windows[index], place);
            let target = message.target;
            // The size before compression; a compressed message may still fit, and then the broker decides.
            let bytes = message.batch_bytes();
            let OutputTopic { partitions, rules } = self.topics.of(target);
            if rules.is_too_large(bytes) && !may_fit_compressed(&message, bytes, rules, self.compresses) {
                drop(message);
                if self.refresh_rules(RULES_AGE) {
                    continue;
                }
                self.dead_letter_or_change_form(index, place, RefusedBecause::TooLarge)?;
                self.check_against_rules(index, place);
                continue;
            }
            let topic = target.topic(&self.settings);
            let partition = partition(by, message.key, message.source_partition, *partitions);
            let ticket = self.windows[index].ticket(place);
            return match self.producer.send(topic, partition, message, bytes, ticket) {
                Ok(bytes) => {
                    self.lingers = self.sends_at_once;
                    self.windows[index].sent(place, bytes);
                    self.count_in_transaction(bytes);
                    Ok(true)
                }
                Err(NotTaken::Full) => {
                    self.context.metrics.retries.with_label_values(&["produce"]).inc();
                    Ok(false)
                }
                Err(NotTaken::TransactionFailed) => {
                    // Its delivery report, which is not read yet, has the cause.
                    self.abort_reason
                        .get_or_insert_with(|| "one of its messages was not delivered".to_owned());
                    Ok(false)
                }
                // `process_reports` finds the cause: a refused batch or a fatal error.
                Err(NotTaken::ProducerFailed) => Ok(false),
                Err(NotTaken::Other(error)) => Err(PublishError::Topic { topic: topic.to_owned(), error }),
            };
        }
    }

    /// Turns a record that the output topic is known to refuse into a dead letter, and gives a dead letter a form that
    /// its topic accepts.
    fn check_against_rules(&mut self, index: usize, place: usize) {
        for _ in 0..4 {
            let window = &self.windows[index];
            let record = &window.content.window.records[place];
            let target = Target::of(&window.content.outcomes[place]);
            let dead = target == Target::DeadLetters;
            let form = window.forms.get(&place).copied().unwrap_or_default();
            let (has_key, timestamp) = match dead {
                true => (
                    form.keyed || (record.key.is_some() && !form.bare),
                    record.timestamp.filter(|_| !form.now),
                ),
                false => (
                    record.key.is_some(),
                    record.timestamp.filter(|_| !self.settings.output.timestamp.is_now()),
                ),
            };
            let Some(refusal) = self.topics.of(target).rules.refusal(has_key, timestamp, self.now) else {
                return;
            };
            if self.refresh_rules(RULES_AGE) {
                continue;
            }
            let window = &mut self.windows[index];
            match (dead, refusal) {
                (false, refusal) => {
                    let message =
                        format!("topic {} refuses the record: {refusal}", self.settings.output.topic);
                    window.content.outcomes[place] = Outcome::Dead(RecordError::new(Fault::Refused, message));
                }
                (true, Refusal::NoKey) => window.forms.entry(place).or_default().keyed = true,
                (true, Refusal::Timestamp(_)) => window.forms.entry(place).or_default().now = true,
            }
        }
    }

    /// Reads the topics' configuration again if it is older than `age`. Returns true if at least one was read.
    pub(super) fn refresh_rules(&mut self, age: Duration) -> bool {
        if self.topics.read.elapsed() < age {
            return false;
        }
        self.context.health.busy(Stage::Publish);
        self.topics.read = Instant::now();
        let Ok(cluster) = Cluster::connect(&self.settings) else { return false };
        let mut read = false;
        let samples = self.settings.samples.topic.as_ref().map(|topic| (topic, &mut self.topics.samples));
        for (topic, written) in [
            (&self.settings.output.topic, &mut self.topics.output),
            (&self.settings.dead_letters.topic, &mut self.topics.dead_letters),
        ]
        .into_iter()
        .chain(samples)
        {
            match cluster.rules(topic) {
                Ok(rules) => {
                    if written.rules != rules {
                        tracing::info!(topic, ?rules, "the topic's configuration has changed");
                    }
                    written.rules = rules;
                    read = true;
                }
                Err(reason) => tracing::debug!(topic, %reason, "the topic's configuration cannot be read"),
            }
        }
        read
    }

    /// Turns a refused record into a dead letter, or gives a refused dead letter another form.
    ///
    /// # Errors
    /// The dead letter was refused even reduced to kandle's headers.
    pub(super) fn dead_letter_or_change_form(
        &mut self,
        index: usize,
        place: usize,
        why: RefusedBecause<'_>,
    ) -> Result<(), PublishError> {
        use RDKafkaErrorCode::{InvalidTimestamp, MessageSizeTooLarge};
        let window = &mut self.windows[index];
        let position = window.position(place);
        let too_large = match why {
            RefusedBecause::TooLarge => true,
            RefusedBecause::Broker(failure) => failure.code == MessageSizeTooLarge,
        };
        if !matches!(window.content.outcomes[place], Outcome::Dead(_)) {
            let topic = &self.settings.output.topic;
            let error = match why {
                _ if too_large => {
                    RecordError::new(Fault::TooLarge, format!("prediction too large for topic {topic}"))
                }
                RefusedBecause::Broker(Failure { code, reason, .. }) => {
                    let reason =
                        if reason.is_empty() { code.to_string() } else { format!("{code}: {reason}") };
                    RecordError::new(Fault::Refused, format!("topic {topic} refused the record: {reason}"))
                }
                RefusedBecause::TooLarge => unreachable!("handled above"),
            };
            tracing::warn!(source = %position, error = %error, "the output topic refused the record: publishing it as a dead letter");
            window.content.outcomes[place] = Outcome::Dead(error);
            return Ok(());
        }
        let form = window.forms.entry(place).or_default();
        let topic = &self.settings.dead_letters.topic;
        let code = match why {
            RefusedBecause::Broker(failure) => failure.code.to_string(),
            RefusedBecause::TooLarge => "larger than max.message.bytes".to_owned(),
        };
        if too_large && !form.bare {
            form.bare = true;
            tracing::warn!(source = %position, topic, "dead letter too large for its topic: publishing kandle's headers only");
            return Ok(());
        }
        let timestamp = matches!(why, RefusedBecause::Broker(failure) if failure.code == InvalidTimestamp);
        if timestamp && !form.now {
            form.now = true;
        } else if !form.keyed || !form.now {
            // The remaining changes that lose no data.
            (form.keyed, form.now) = (true, true);
        } else if !form.bare {
            form.bare = true;
        } else {
            return Err(PublishError::DeadLetterRefused { position, topic: topic.clone(), reason: code });
        }
        tracing::warn!(source = %position, topic, code, keyed = form.keyed, now = form.now, bare = form.bare, "the topic refused the dead letter: publishing it in another form");
        Ok(())
    }

    /// Polls the producer and processes its delivery reports.
    ///
    /// # Errors
    /// A fatal error of the producer, or an error of [`Self::process`].
    pub(super) fn process_reports(&mut self) -> Result<(), PublishError> {
        loop {
            let arrived = self.producer.poll();
            if arrived.acknowledged.is_empty() && arrived.failed.is_empty() {
                break;
            }
            self.process(arrived)?;
        }
        match self.producer.fatal_error() {
            None => Ok(()),
            Some((RDKafkaErrorCode::GaplessGuarantee, _)) => {
                self.producer_stopped = true;
                Ok(())
            }
            Some((code, _)) if self.may_outlive(code) => Ok(()),
            Some((code, reason)) => Err(PublishError::Fatal { code, reason }),
        }
    }

    /// Processes delivery reports: counts acknowledged messages and keeps refused ones for `recover`.
    ///
    /// # Errors
    /// The broker refuses every record: a permission or a topic is missing.
    pub(super) fn process(&mut self, arrived: Arrived) -> Result<(), PublishError> {
        for ticket in arrived.acknowledged {
            let Some(at) = self.index(ticket.window()) else { continue };
            let (window, place) = (&mut self.windows[at], ticket.place());
            let bytes = match ticket.is_sample() {
                true => window.sample_acknowledged(place),
                false => window.take_size(place),
            };
            self.producer.finished(bytes);
            match &mut self.delivery {
                Delivery::AtLeastOnce if ticket.is_sample() => {
                    window.settle_sample(place, SampleOutcome::Published);
                }
                Delivery::AtLeastOnce => window.settle(place),
                Delivery::ExactlyOnce(transactions) => transactions.acknowledged(bytes),
            }
        }
        for failure in arrived.failed {
            let Some(at) = self.index(failure.ticket.window()) else { continue };
            if failure.ticket.is_sample() {
                self.sample_failed(at, &failure)?;
                continue;
            }
            let bytes = self.windows[at].take_size(failure.ticket.place());
            self.producer.finished(bytes);
            match Meaning::of(failure.code) {
                Meaning::Unpublishable => {
                    let position = self.windows[at].position(failure.ticket.place());
                    let outcome = &self.windows[at].content.outcomes[failure.ticket.place()];
                    let topic = Target::of(outcome).topic(&self.settings).to_owned();
                    return Err(PublishError::Refused { position, topic, code: failure.code });
                }
                Meaning::Refused | Meaning::Neighbour => self.refused.push(failure),
                Meaning::Transient => {
                    if matches!(self.delivery, Delivery::ExactlyOnce(_)) {
                        let position = self.windows[at].position(failure.ticket.place());
                        self.abort_reason
                            .get_or_insert(format!("{position}: not delivered: {}", failure.code));
                    }
                }
            }
        }
        Ok(())
    }

    /// Reports the windows whose records are all settled, in the order they came. `committed`: so are their offsets.
    pub(super) fn report_published(&mut self, committed: bool) {
        while self.windows.front().is_some_and(InFlightWindow::is_done) {
            failpoint::pass("acknowledged");
            let Some(first) = self.windows.pop_front() else { return };
            if self.cursor.window == first.id() {
                self.cursor = Cursor { window: first.id() + 1, place: 0 };
            }
            let live = first.live_spans().next().is_some();
            let report = match live {
                true => Report::Published(self.finish(first, committed)),
                false => Report::Dropped { load: first.content.window.load() },
            };
            // A closed channel means that the source has ended, and with it the process.
            let _ = self.reports.send(report);
        }
    }

    /// Counts the records of a published window in the metrics, traces it, and makes its report.
    fn finish(&mut self, done: InFlightWindow, committed: bool) -> Published {
        let live: Vec<bool> =
            (0..done.content.window.spans.len()).map(|span| done.is_live(span as u32)).collect();
        for (place, outcome) in done.sample_outcomes() {
            let span = done.content.window.records[place].span as usize;
            if let Some(name) = outcome.name().filter(|_| live[span]) {
                self.context.metrics.samples.with_label_values(&[name]).inc();
            }
        }
        let InFlightWindow { content: Encoded { window, model, outcomes, tally, .. }, started, .. } = done;
        self.context.watch.published(&tally);
        let metrics = &self.context.metrics;
        metrics.stage.with_label_values(&["publish"]).observe(started.elapsed().as_secs_f64());
        let mut counts = vec![[0u64; 3]; window.spans.len()];
        let (latency, age) = (metrics.record_latency.local(), metrics.record_age.local());
        let (now, wall) = (Instant::now(), now());
        for (record, outcome) in window.records.iter().zip(&outcomes) {
            let Record { span, arrived, timestamp, .. } = record;
            if !live[*span as usize] {
                continue;
            }
            let kind = match outcome {
                Outcome::Prediction { .. } | Outcome::Unchanged => 0,
                Outcome::Dead(error) => {
                    metrics.dead_letters.with_label_values(&[error.fault.name()]).inc();
                    1
                }
                Outcome::Tombstone => 2,
            };
            counts[*span as usize][kind] += 1;
            latency.observe((now - *arrived).as_secs_f64());
            if let Some(timestamp) = timestamp {
                age.observe((wall - timestamp).max(0) as f64 / 1000.0);
            }
        }
        let mut totals = [0; 3];
        for (span, counts) in window.spans.iter().zip(&counts) {
            for (i, (outcome, count)) in
                ["predicted", "dead_lettered", "tombstone"].iter().zip(counts).enumerate()
            {
                totals[i] += count;
                if *count > 0 {
                    metrics.records.with_label_values(&[&*span.partition.topic, *outcome]).inc_by(*count);
                }
            }
        }
        self.show_memory();
        let ms = (now - window.records[0].arrived).as_millis() as u64;
        let traces = self.context.traces.as_ref();
        let trace_id = traces.map(|traces| traces.window(&window, totals, &model.digest, now));
        tracing::debug!(
            window = window.id,
            records = window.records.len(),
            partitions = window.spans.len(),
            predicted = totals[0],
            dead_lettered = totals[1],
            tombstones = totals[2],
            closed_by = window.closed_by.name(),
            ms,
            digest = model.digest,
            trace_id,
            "window published"
        );
        let load = window.load();
        let records = totals.iter().sum::<u64>() as usize;
        Published { records, counts, load, spans: window.spans, committed }
    }

    /// Updates the memory metric with the predictions of all windows in flight.
    pub(super) fn show_memory(&self) {
        let bytes: usize =
            self.windows.iter().flat_map(|window| &window.content.memory).map(Vec::capacity).sum();
        let samples: usize = self.windows.iter().map(InFlightWindow::sample_bytes).sum();
        let bytes = bytes + samples;
        self.context.metrics.memory.with_label_values(&["predictions"]).set(bytes as i64);
    }

    /// The records in `from..to` that are not settled, in order.
    pub(super) fn unsettled(&self, from: Cursor, to: Cursor) -> Vec<Ticket> {
        let mut tickets = Vec::new();
        for window in &self.windows {
            let start = if window.id() == from.window { from.place } else { 0 };
            let end = match window.id().cmp(&to.window) {
                std::cmp::Ordering::Less => window.len(),
                std::cmp::Ordering::Equal => to.place,
                std::cmp::Ordering::Greater => break,
            };
            if window.id() >= from.window {
                tickets.extend(window.unsettled(start, end));
            }
        }
        tickets
    }
}

/// Whether to send a message although it exceeds the topic's limit uncompressed.
fn may_fit_compressed(message: &Composed<'_>, bytes: u64, rules: &TopicRules, compresses: bool) -> bool {
    if message.target == Target::Output || compresses {
        return compresses;
    }
    // The producer compresses dead letters with zstd; so does this estimate.
    let value = message.value.unwrap_or_default();
    let compressed = zstd::bulk::compress(value, 3).map_or(value.len(), |bytes| bytes.len());
    !rules.is_too_large(bytes - value.len() as u64 + compressed as u64)
}

/// The current time in milliseconds since the Unix epoch.
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

/// Why a record cannot be published as it is.
#[derive(Clone, Copy)]
pub(super) enum RefusedBecause<'a> {
    /// It exceeds the topic's `max.message.bytes`, as last read.
    TooLarge,
    /// The broker refused its message.
    Broker(&'a Failure),
}
