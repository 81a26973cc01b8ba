//! The source: consumes for ever, or up to a drain's bounds.
//!
//! One loop: read the callbacks' notes, book what the stages report, pass on a closed window, poll,
//! commit. What cannot be passed on because the stages behind are full is held, the partitions are
//! paused, and polling goes on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerGroupMetadata};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;

use super::assignment::Revoking;
use super::client;
use super::commit::Committer;
use super::dead_letters::Origins;
use super::drain::Drain;
use super::ends::Ends;
use super::lag::Lag;
use super::ledger::Ledger;
use super::period::Period;
use super::rebalance::{Note, Notes, give_up};
use crate::flow::{CommitSoon, Published, Queued, Report};
use crate::schedule::Schedule;
use crate::settings::{OnChange, Settings};
use crate::telemetry::health::Stage;
use crate::telemetry::{Health, Metrics};
use crate::window::{ClosedBy, Gatherer, Limits, Window};

/// The longest wait for a message; rebalances and acknowledgements are seen within it.
pub(super) const POLL: Duration = Duration::from_millis(50);
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
    #[error("another stage has failed")]
    OtherStage,
}

/// What the source is given.
pub struct Wiring {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    pub commit_soon: Arc<CommitSoon>,
    /// 16 hex digits, and `source@revision`: kept with the committed offsets.
    pub digest: String,
    pub model: String,
    /// Set when the process is asked to stop.
    pub stop: Arc<AtomicBool>,
    /// Set when another stage has failed: the group is left at once.
    pub failed: Arc<AtomicBool>,
    pub drain: Option<Arc<Drain>>,
    pub schedule: Arc<Schedule>,
    /// Spans are sent: records are asked where they come from.
    pub traced: bool,
    /// The input are dead letters, of records of these topics.
    pub revive: Option<Arc<Origins>>,
    /// Partitions of the input topics.
    pub partitions: u64,
    /// What a record may take on its way through the stages, beside its own bytes.
    pub bytes_per_record: usize,
}

/// The group as a transaction names it; `None` while the consumer is in none.
pub type Group = Arc<dyn Fn() -> Option<ConsumerGroupMetadata> + Send + Sync>;

pub struct Source {
    /// Dropped before the consumer, which it shares.
    pub(super) committer: Committer,
    pub(super) consumer: Arc<BaseConsumer<Notes>>,
    pub(super) config: ClientConfig,
    pub(super) wiring: Wiring,
    pub(super) on_change: OnChange,
    /// The models of the whole group have been compared.
    pub(super) compared: bool,
    /// Names, or one pattern.
    pub(super) topics: Vec<String>,
    commit_interval: Duration,
    pub(super) revoke_timeout: Duration,
    /// Bytes that windows may hold in all.
    pub(super) window_bytes: usize,
    pub(super) gatherer: Gatherer,
    pub(super) ledger: Ledger,
    pub(super) lag: Lag,
    ends: Ends,
    /// Closed and not yet passed on.
    pub(super) held: VecDeque<Queued<Window>>,
    /// Bytes of windows passed on and not yet published.
    pub(super) in_flight: usize,
    pub(super) full_since: Option<Instant>,
    /// The limit on memory holds windows up.
    pub(super) out_of_room: bool,
    pub(super) paused: bool,
    pub(super) period: Period,
    pub(super) revoking: Option<Revoking>,
    pub(super) last_commit: Instant,
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
        let role = if wiring.drain.is_some() { client::Role::Drain } else { client::Role::Run };
        let config = client::config(settings, role, &wiring.digest, wiring.partitions);
        let consumer: BaseConsumer<Notes> =
            config.create_with_context(Notes::default()).map_err(SourceError::Client)?;
        let consumer = Arc::new(consumer);
        let committer = Committer::start(&consumer).map_err(|e| SourceError::Fatal(e.to_string()))?;
        let topics: Vec<&str> = settings.input.topics.iter().map(String::as_str).collect();
        if let Some(drain) = &wiring.drain {
            drain.freeze(&config, &topics).map_err(|e| SourceError::Fatal(e.to_string()))?;
        }
        consumer.subscribe(&topics).map_err(SourceError::Client)?;
        let ends = Ends::start(&consumer, &config).map_err(|e| SourceError::Fatal(e.to_string()))?;
        wiring.metrics.memory_limit.set(settings.memory.limit.0 as f64);
        Ok(Self {
            committer,
            consumer,
            config,
            on_change: settings.model.on_change,
            compared: false,
            topics: settings.input.topics.clone(),
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
            ends,
            held: VecDeque::new(),
            in_flight: 0,
            full_since: None,
            out_of_room: false,
            paused: false,
            period: Period::new(&wiring.schedule, wiring.drain.is_some()),
            revoking: None,
            last_commit: Instant::now(),
            last_error: None,
            wiring,
        })
    }

    /// What the sink commits under, where it commits.
    pub fn group(&self) -> Group {
        let consumer = Arc::clone(&self.consumer);
        Arc::new(move || consumer.group_metadata())
    }

    /// Consumes until it is asked to stop, or its bounds are reached, and everything in flight is committed.
    pub fn serve(
        mut self,
        windows: Sender<Queued<Window>>,
        reports: &Receiver<Report>,
    ) -> Result<(), SourceError> {
        let result = self.consume(windows, reports);
        if result.is_err() {
            self.leave();
        }
        result
    }

    /// Leaves the group, which need not wait for our session to end then. The consumer itself is shared.
    fn leave(&mut self) {
        self.consumer.context().close();
        if let Some(revoking) = self.revoking.take() {
            let _ = give_up(&self.consumer, &revoking.list);
        }
        if self.consumer.close_queue().is_err() {
            return;
        }
        let deadline = Instant::now() + FAREWELL;
        while !self.consumer.closed() && Instant::now() < deadline {
            self.consumer.poll(POLL);
        }
    }

    fn consume(
        &mut self,
        windows: Sender<Queued<Window>>,
        reports: &Receiver<Report>,
    ) -> Result<(), SourceError> {
        while !self.wiring.stop.load(Ordering::Relaxed) {
            self.wiring.health.busy(Stage::Source);
            self.check_other_stages()?;
            self.settle(reports)?;
            self.pass_on(&windows);
            self.wiring.commit_soon.set(self.out_of_room || self.revoking.is_some());
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
            if self.drained() || self.over_for_now() {
                break;
            }
        }
        self.finish(windows, reports)
    }

    /// SIGTERM, or the end of a drain or a period: the window that gathers goes too, all in flight is
    /// published and committed, and the member leaves the group.
    fn finish(
        &mut self,
        windows: Sender<Queued<Window>>,
        reports: &Receiver<Report>,
    ) -> Result<(), SourceError> {
        let closed_by = match &self.wiring.drain {
            Some(drain) if drain.is_complete() => {
                tracing::info!("drained: all partitions are at their ends");
                ClosedBy::End
            }
            _ if self.wiring.stop.load(Ordering::Relaxed) => {
                tracing::info!("stopping: finishing what is in flight");
                ClosedBy::Stop
            }
            // The period.
            _ => ClosedBy::End,
        };
        self.wiring.commit_soon.set(true);
        self.pause();
        if let Some(window) = self.gatherer.close(closed_by) {
            self.hold(window);
        }
        while !self.held.is_empty() {
            self.wiring.health.busy(Stage::Source);
            self.check_other_stages()?;
            self.settle(reports)?;
            self.pass_on(&windows);
            self.poll_events(Duration::ZERO)?;
        }
        // The stages end one after the other, and the last of them closes `reports`.
        drop(windows);
        loop {
            self.wiring.health.busy(Stage::Source);
            self.check_other_stages()?;
            self.rebalances()?;
            match reports.try_recv() {
                Ok(report) => self.take_report(report)?,
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
        // What is behind is other members' to show, or nobody's.
        for owned in self.ledger.iter() {
            self.lag.forget(&owned.partition, &self.wiring.metrics);
        }
        self.wiring.metrics.drain_remaining.set(0.0);
        self.wiring.health.idle(Stage::Source);
        Ok(())
    }

    /// # Errors
    /// Another stage has failed: nothing more will be published.
    fn check_other_stages(&self) -> Result<(), SourceError> {
        match self.wiring.failed.load(Ordering::Relaxed) {
            true => Err(SourceError::OtherStage),
            false => Ok(()),
        }
    }

    /// Notes of the callbacks, and what the stages report.
    fn settle(&mut self, reports: &Receiver<Report>) -> Result<(), SourceError> {
        while let Ok(report) = reports.try_recv() {
            self.take_report(report)?;
        }
        self.rebalances()
    }

    fn take_report(&mut self, report: Report) -> Result<(), SourceError> {
        match report {
            Report::Published(Published { spans, counts, records, bytes, committed }) => {
                self.ledger.published(&spans, committed);
                if let Some(drain) = &self.wiring.drain {
                    drain.published(&spans, &counts);
                }
                self.lag.published += records as u64;
                self.in_flight -= bytes;
            }
            Report::Dropped { bytes } => self.in_flight -= bytes,
            Report::Suspects { positions, kept } => self.suspect(&positions, &kept),
        }
        self.show_memory();
        Ok(())
    }

    fn rebalances(&mut self) -> Result<(), SourceError> {
        for note in self.consumer.context().take() {
            match note {
                Note::Assign(list) => self.assign(&list)?,
                Note::Revoke(list) => self.revoke(list),
                Note::Committed(result, offsets) => self.committed(result, &offsets),
                Note::Statistics(statistics) => {
                    self.past_the_ends(&statistics);
                    let drain = self.wiring.drain.as_deref();
                    let (status, remaining) = self.lag.update(
                        &statistics,
                        &self.ledger,
                        drain,
                        &self.ends.known,
                        &self.wiring.metrics,
                    );
                    if self.paused {
                        self.ends.look(self.ledger.iter().map(|owned| owned.partition.clone()));
                    }
                    self.reckon(remaining);
                    self.show_skipped(|p| {
                        let known = statistics.topics.get(&*p.topic)?.partitions.get(&p.number)?;
                        Some(known.lo_offset).filter(|&low| low >= 0)
                    });
                    self.wiring.health.set_source(status);
                    // A member without partitions stands by.
                    if statistics.cgrp.is_some_and(|group| group.join_state == "steady") {
                        self.wiring.health.set_ready();
                    }
                }
                Note::Ends(ends) => self.ends.known = ends,
                Note::Error(error, reason) => self.error(error, &reason)?,
            }
        }
        self.finish_revoking();
        Ok(())
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
