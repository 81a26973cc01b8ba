//! The source for `run`: consumes for ever.
//!
//! One loop: read the callbacks' notes, book what is published, pass on a closed window, poll,
//! commit. What cannot be passed on because the stages behind are full is held, the partitions are
//! paused, and polling goes on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendTimeoutError, Sender, TryRecvError};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

use super::assignment::Revoking;
use super::commit::Committer;
use super::lag::Lag;
use super::ledger::Ledger;
use super::rebalance::{Note, Notes, give_up};
use crate::flow::{Ownership, Published, Queued};
use crate::record::{Arrival, Partition};
use crate::settings::{OnChange, Settings, Start};
use crate::telemetry::health::Stage;
use crate::telemetry::{Health, Metrics};
use crate::window::{ClosedBy, Gatherer, Limits, Window};

/// How long a partition's fetcher rests once enough is prefetched. librdkafka's own second leaves a
/// fast pipeline without records most of the time: 131,000 records/s with it, 511,000 with this
/// (benches/RESULTS.md).
pub const FETCH_BACKOFF_MS: &str = "5";
/// Messages taken from the client between two looks at everything else.
const BURST: usize = 1024;
/// The longest wait for a message; rebalances and acknowledgements are seen within it.
const POLL: Duration = Duration::from_millis(50);
/// How long a full pipeline may hold up polling before partitions are paused. Pausing throws away
/// what the client has prefetched, so it is for pipelines that stay full.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long the last commit and the group's coordinator may take at the end.
const FAREWELL: Duration = Duration::from_secs(10);
/// Errors of the client are logged at most this often while they repeat.
const REPEAT: Duration = Duration::from_secs(10);

/// What ends the source, and with it the process.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("the consumer cannot be made: {0}")]
    Client(KafkaError),
    #[error("the consumer failed for good: {0}")]
    Fatal(String),
    #[error("{0}")]
    ModelChanged(String),
}

/// What the source is given.
pub struct Wiring {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    pub ownership: Arc<Ownership>,
    /// 16 hex digits, and `source@revision`: kept with the committed offsets.
    pub digest: String,
    pub model: String,
    /// Set when the process is asked to stop.
    pub stop: Arc<AtomicBool>,
}

pub struct Source {
    /// Dropped before the consumer, which it shares.
    committer: Committer,
    pub(super) consumer: Arc<BaseConsumer<Notes>>,
    pub(super) wiring: Wiring,
    pub(super) on_change: OnChange,
    commit_interval: Duration,
    pub(super) revoke_timeout: Duration,
    /// Bytes that windows may hold in all.
    window_bytes: usize,
    pub(super) gatherer: Gatherer,
    pub(super) ledger: Ledger,
    pub(super) lag: Lag,
    /// Closed and not yet passed on.
    held: VecDeque<Queued<Window>>,
    /// Bytes of windows passed on and not yet published.
    in_flight: usize,
    full_since: Option<Instant>,
    pub(super) paused: bool,
    pub(super) revoking: Option<Revoking>,
    last_commit: Instant,
    last_error: Option<(String, Instant)>,
}

impl Drop for Source {
    /// Dropping the consumer leaves the group, which ends in a revocation that nobody else answers.
    fn drop(&mut self) {
        self.consumer.context().close();
        if let Some(revoking) = self.revoking.take() {
            let _ = give_up(&self.consumer, &revoking.list);
        }
    }
}

impl Source {
    pub fn new(settings: &Settings, wiring: Wiring) -> Result<Self, SourceError> {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &settings.kafka.brokers)
            .set("client.id", "kandle")
            .set("group.id", &settings.input.group)
            .set(
                "auto.offset.reset",
                match settings.input.start {
                    Start::Earliest => "earliest",
                    Start::Latest => "latest",
                },
            )
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("statistics.interval.ms", "1000")
            .set("fetch.queue.backoff.ms", FETCH_BACKOFF_MS)
            .set(
                "queued.max.messages.kbytes",
                (settings.memory.limit.0 / 4 / 1024).min(2_097_151).to_string(),
            );
        let own = settings.kafka.properties.iter().chain(&settings.input.properties);
        if !own
            .clone()
            .any(|(name, value)| name == "group.protocol" && value.0.eq_ignore_ascii_case("consumer"))
        {
            config.set("partition.assignment.strategy", "cooperative-sticky");
        }
        for (name, value) in own {
            config.set(name, &value.0);
        }
        let consumer: BaseConsumer<Notes> =
            config.create_with_context(Notes::default()).map_err(SourceError::Client)?;
        let consumer = Arc::new(consumer);
        let committer = Committer::start(&consumer).map_err(|e| SourceError::Fatal(e.to_string()))?;
        let topics: Vec<&str> = settings.input.topics.iter().map(String::as_str).collect();
        consumer.subscribe(&topics).map_err(SourceError::Client)?;
        wiring.metrics.memory_limit.set(settings.memory.limit.0 as f64);
        Ok(Self {
            committer,
            consumer,
            on_change: settings.model.on_change,
            commit_interval: settings.delivery.commit_interval.0,
            revoke_timeout: settings.delivery.revoke_timeout.0,
            window_bytes: (settings.memory.limit.0 / 2) as usize,
            gatherer: Gatherer::new(Limits {
                max_records: settings.window.max_records,
                max_bytes: settings.window.max_bytes.0 as usize,
                max_wait: settings.window.max_wait.0,
            }),
            ledger: Ledger::default(),
            lag: Lag::new(),
            held: VecDeque::new(),
            in_flight: 0,
            full_since: None,
            paused: false,
            revoking: None,
            last_commit: Instant::now(),
            last_error: None,
            wiring,
        })
    }

    /// Consumes until it is asked to stop and everything in flight is committed.
    pub fn serve(
        mut self,
        windows: Sender<Queued<Window>>,
        published: &Receiver<Published>,
    ) -> Result<(), SourceError> {
        while !self.wiring.stop.load(Ordering::Relaxed) {
            self.wiring.health.busy(Stage::Source);
            self.settle(published)?;
            self.pass_on(&windows);
            if self.full_since.is_some() {
                // Events alone; the wait was in passing on.
                self.poll_events(Duration::ZERO)?;
            } else {
                self.poll()?;
            }
            if let Some(window) = self.gatherer.due(Instant::now()) {
                self.hold(window);
            }
            if self.last_commit.elapsed() >= self.commit_interval {
                self.commit(None);
            }
        }
        self.finish(windows, published)
    }

    /// SIGTERM: the window that gathers goes too, all in flight is published and committed, and the
    /// member leaves the group.
    fn finish(
        mut self,
        windows: Sender<Queued<Window>>,
        published: &Receiver<Published>,
    ) -> Result<(), SourceError> {
        tracing::info!("stopping: finishing what is in flight");
        self.pause();
        if let Some(window) = self.gatherer.close(ClosedBy::Stop) {
            self.hold(window);
        }
        while !self.held.is_empty() {
            self.settle(published)?;
            self.pass_on(&windows);
            self.poll_events(Duration::ZERO)?;
        }
        // The stages end one after the other, and the last of them closes `published`.
        drop(windows);
        loop {
            self.wiring.health.busy(Stage::Source);
            self.rebalances()?;
            match published.try_recv() {
                Ok(done) => self.book(&done),
                Err(TryRecvError::Empty) => self.poll_events(Duration::from_millis(10))?,
                Err(TryRecvError::Disconnected) => break,
            }
            if self.last_commit.elapsed() >= self.commit_interval {
                self.commit(None);
            }
        }
        let deadline = Instant::now() + FAREWELL;
        while self.ledger.commits_open() && Instant::now() < deadline {
            self.commit(None);
            self.poll_events(Duration::from_millis(10))?;
            self.rebalances()?;
        }
        if self.ledger.commits_open() {
            tracing::warn!("the last offsets could not be committed: their records will be predicted again");
        }
        self.wiring.health.idle(Stage::Source);
        Ok(())
    }

    /// Notes of the callbacks, and what is published.
    fn settle(&mut self, published: &Receiver<Published>) -> Result<(), SourceError> {
        while let Ok(done) = published.try_recv() {
            self.book(&done);
        }
        self.rebalances()
    }

    fn book(&mut self, done: &Published) {
        self.ledger.published(&done.spans);
        self.lag.published += done.records as u64;
        self.in_flight -= done.bytes;
        self.show_memory();
    }

    fn show_memory(&self) {
        let held: usize = self.held.iter().map(|window| window.get().bytes()).sum();
        let bytes = self.in_flight + held + self.gatherer.bytes();
        self.wiring.metrics.memory.with_label_values(&["windows"]).set(bytes as i64);
    }

    // Gathering.

    /// Takes messages until none is there, a window is full, or the burst is over.
    fn poll(&mut self) -> Result<(), SourceError> {
        let wait = match self.gatherer.deadline() {
            Some(deadline) => deadline.saturating_duration_since(Instant::now()).min(POLL),
            None => POLL,
        };
        self.take(BURST, wait)
    }

    /// Serves the client without taking messages, as far as it lets us: one that comes all the same
    /// is gathered.
    fn poll_events(&mut self, wait: Duration) -> Result<(), SourceError> {
        self.take(1, wait)
    }

    /// Takes at most `limit` messages; waits for the first one alone.
    fn take(&mut self, limit: usize, mut wait: Duration) -> Result<(), SourceError> {
        let consumer = Arc::clone(&self.consumer);
        let mut now = Instant::now();
        // Messages come in runs of one partition.
        let mut last: Option<(Partition, u64)> = None;
        for i in 0..limit {
            let message = match consumer.poll(wait) {
                None => break,
                Some(Ok(message)) => message,
                Some(Err(error)) => return self.error(error, ""),
            };
            wait = Duration::ZERO;
            if i % 64 == 0 {
                now = Instant::now();
            }
            let known =
                |(p, _): &(Partition, u64)| p.number == message.partition() && &*p.topic == message.topic();
            if !last.as_ref().is_some_and(known) {
                let partition = Partition::new(message.topic(), message.partition());
                // Not ours: left in the queue from before a revocation.
                let Some(owned) = self.ledger.get_mut(&partition) else { continue };
                owned.gathering.get_or_insert(message.timestamp().to_millis().unwrap_or_default());
                last = Some((partition, owned.generation));
            }
            let Some((partition, generation)) = &last else { continue };
            if let Some(window) = self.gatherer.push(partition, *generation, arrival(&message), now) {
                self.hold(window);
                break;
            }
        }
        Ok(())
    }

    fn hold(&mut self, window: Window) {
        let mut oldest = vec![None; window.spans.len()];
        for record in window.records.iter().rev() {
            oldest[record.span as usize] = record.timestamp;
        }
        self.ledger.gathered(&window.spans, &oldest);
        let metrics = &self.wiring.metrics;
        metrics.windows.with_label_values(&[window.closed_by.name()]).inc();
        metrics.window_records.observe(window.records.len() as f64);
        self.held.push_back(Queued::new(window));
        self.show_memory();
    }

    /// Hands held windows on; while the next stage is full, waits for it, but not for long.
    fn pass_on(&mut self, windows: &Sender<Queued<Window>>) {
        while let Some(window) = self.held.pop_front() {
            let bytes = window.get().bytes();
            if self.in_flight > 0 && self.in_flight + bytes > self.window_bytes {
                self.held.push_front(window);
                // Nothing tells when room is there but `published`, read by the caller.
                std::thread::park_timeout(Duration::from_millis(5));
                return self.full();
            }
            match windows.send_timeout(window, POLL) {
                Ok(()) => self.in_flight += bytes,
                Err(SendTimeoutError::Timeout(window)) => {
                    self.held.push_front(window);
                    return self.full();
                }
                Err(SendTimeoutError::Disconnected(_)) => {
                    // The stage behind has failed and says so itself.
                    self.wiring.stop.store(true, Ordering::Relaxed);
                    return;
                }
            }
        }
        self.full_since = None;
        if self.paused && !self.wiring.stop.load(Ordering::Relaxed) {
            self.resume();
        }
    }

    fn full(&mut self) {
        let since = *self.full_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= PATIENCE && !self.paused {
            self.pause();
        }
    }

    pub(super) fn pause(&mut self) {
        tracing::debug!("paused: the pipeline is full");
        self.paused = true;
        if let Err(error) = self.consumer.assignment().and_then(|all| self.consumer.pause(&all)) {
            tracing::debug!(%error, "pausing");
        }
    }

    fn resume(&mut self) {
        tracing::debug!("resumed");
        self.paused = false;
        let resumed = self.consumer.assignment().and_then(|mut all| {
            if let Some(revoking) = &self.revoking {
                let mut kept = TopicPartitionList::new();
                for e in all.elements() {
                    if revoking.list.find_partition(e.topic(), e.partition()).is_none() {
                        kept.add_partition(e.topic(), e.partition());
                    }
                }
                all = kept;
            }
            self.consumer.resume(&all)
        });
        if let Err(error) = resumed {
            tracing::debug!(%error, "resuming");
        }
    }

    // Notes and commits.

    fn rebalances(&mut self) -> Result<(), SourceError> {
        for note in self.consumer.context().take() {
            match note {
                Note::Assign(list) => self.assign(&list)?,
                Note::Revoke(list) => self.revoke(list),
                Note::Committed(result, offsets) => self.committed(result, &offsets),
                Note::Statistics(statistics) => {
                    let status = self.lag.update(&statistics, &self.ledger, &self.wiring.metrics);
                    self.wiring.health.set_source(status);
                    // A member without partitions stands by.
                    if statistics.cgrp.is_some_and(|group| group.join_state == "steady") {
                        self.wiring.health.set_ready();
                    }
                }
                Note::Error(error, reason) => self.error(error, &reason)?,
            }
        }
        self.finish_revoking();
        Ok(())
    }

    pub(super) fn commit(&mut self, only: Option<&[Partition]>) {
        if self.committer.is_busy() {
            return;
        }
        self.last_commit = Instant::now();
        let offsets = self.ledger.take_commits(only);
        if offsets.is_empty() {
            return;
        }
        let metadata =
            serde_json::json!({ "model": self.wiring.model, "digest": self.wiring.digest }).to_string();
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (partition, offset) in &offsets {
            let mut element = list.add_partition(&partition.topic, partition.number);
            element.set_metadata(&metadata);
            if let Err(error) = element.set_offset(Offset::Offset(*offset)) {
                tracing::warn!(%partition, offset, %error, "an offset that cannot be committed");
            }
        }
        self.committer.commit(list);
    }

    pub(super) fn committed(&mut self, result: Result<(), KafkaError>, offsets: &TopicPartitionList) {
        if let Some(time) = self.committer.done() {
            self.wiring.metrics.stage.with_label_values(&["commit"]).observe(time.as_secs_f64());
        }
        if let Err(error) = &result {
            tracing::warn!(%error, "a commit failed and will be made again");
            self.wiring.metrics.retries.with_label_values(&["commit"]).inc();
            self.wiring.health.error(&format!("commit: {error}"));
        }
        for element in offsets.elements() {
            if let Offset::Offset(offset) = element.offset() {
                self.ledger.committed(
                    &Partition::new(element.topic(), element.partition()),
                    offset,
                    result.is_ok(),
                );
            }
        }
    }

    /// Errors of the client: most pass, and librdkafka tries again by itself.
    pub(super) fn error(&mut self, error: KafkaError, reason: &str) -> Result<(), SourceError> {
        if let KafkaError::MessageConsumptionFatal(code) = error {
            return Err(SourceError::Fatal(code.to_string()));
        }
        if let Some((code, reason)) = self.consumer.client().fatal_error() {
            return Err(SourceError::Fatal(format!("{code}: {reason}")));
        }
        let hint = match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::UnknownTopicOrPartition) => " (an input topic does not exist)",
            Some(RDKafkaErrorCode::TopicAuthorizationFailed) => " (this user may not read an input topic)",
            Some(RDKafkaErrorCode::GroupAuthorizationFailed) => " (this user may not use the group)",
            _ => "",
        };
        let message = format!("{error}{hint} {reason}").trim_end().to_owned();
        let again =
            self.last_error.as_ref().is_some_and(|(last, at)| *last == message && at.elapsed() < REPEAT);
        if !again {
            tracing::warn!("Kafka: {message}; trying again");
            self.wiring.health.error(&message);
            self.last_error = Some((message, Instant::now()));
        }
        Ok(())
    }
}

fn arrival<'a>(message: &'a BorrowedMessage<'_>) -> Arrival<'a> {
    Arrival {
        offset: message.offset(),
        timestamp: message.timestamp().to_millis().filter(|&t| t >= 0),
        key: message.key(),
        value: message.payload(),
        headers: message.headers().map(rdkafka::message::BorrowedHeaders::detach),
    }
}
