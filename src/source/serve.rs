//! The source's loop: consumes for ever, or up to a drain's end offsets.
//!
//! It handles client events and the reports of the stages, passes closed windows on, polls, and commits. While the next
//! stage is full, it holds windows, pauses partitions, and keeps polling.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::statistics::Statistics;
use rdkafka::types::RDKafkaErrorCode;

use super::assignment::Assignment;
use super::bounds::Bounds;
use super::callbacks::{Callbacks, Event};
use super::commit::Committer;
use super::dead_letters::OriginalTopics;
use super::doubt::{Cause, Doubt};
use super::drain::{Drain, DrainTopicLost};
use super::fetching::Fetching;
use super::heartbeat::Heartbeats;
use super::idle::Idle;
use super::intake::Intake;
use super::joining::Joining;
use super::lag::{Lag, of_partition};
use super::ledger::{Hold, Ledger};
use super::lookup::{Answer, Lookup, Offsets as LogEnds, Question, Setup};
use super::offsets::Offsets;
use super::schedule_state::ScheduleState;
use super::subscription::Subscription;
use crate::compute::Compute;
use crate::flow::{CommitSoon, Published, Queued, Report};
use crate::kafka::consumer::{self, Group};
use crate::kafka::login::{self, Client};
use crate::record::Partition;
use crate::schedule::Schedule;
use crate::settings::{OnChange, Settings};
use crate::telemetry::health::Stage;
use crate::telemetry::{Health, Metrics};
use crate::window::{ClosedBy, Gatherer, Limits, Load, Window};

/// Longest wait for a message; rebalances and reports are handled within that time.
pub(super) const POLL: Duration = Duration::from_millis(50);
/// Timeout at shutdown for the last commit, and again for leaving the group.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);
/// A repeated client error is logged at most this often.
const REPEAT: Duration = Duration::from_secs(10);
/// Interval of queries for the end offsets of paused partitions.
const ENDS: Duration = Duration::from_secs(2);

/// Windows that may always be in flight, even if they exceed the work limit: one on the lanes, the next queued there.
const UNDER_WAY: usize = 2;

/// Errors that end the source, and with it the process.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("a call to the Kafka client failed: {0}")]
    Client(KafkaError),
    #[error("fatal error of the consumer: {0}")]
    Fatal(String),
    #[error("{0}")]
    ModelChanged(String),
    #[error(transparent)]
    DrainTopicLost(#[from] DrainTopicLost),
    #[error(
        "{partition}: the Kafka client no longer fetches at offset {position}, although the log ends at {end}: \
         restart the process to get a new client"
    )]
    Stuck { partition: Partition, position: i64, end: i64 },
    #[error("another stage has failed")]
    OtherStage,
}

/// What the source shares with the rest of the pipeline, and what is fixed for its life.
pub struct Context {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    pub commit_soon: Arc<CommitSoon>,
    pub on_change: OnChange,
    /// Set when the process is asked to stop.
    pub stop: Arc<AtomicBool>,
    /// Set when another stage has failed: the source leaves the group at once.
    pub failed: Arc<AtomicBool>,
    /// The bounds of a drain or a replay.
    pub drain: Option<Arc<Drain>>,
    pub schedule: Arc<Schedule>,
    /// Traces are exported: the source reads each record's `traceparent`.
    pub traced: bool,
    /// Original topics of the dead letters to reprocess, if the input is dead letters.
    pub reprocess: Option<Arc<OriginalTopics>>,
    /// Number of partitions of the input topics.
    pub partitions: u64,
    /// Estimates the memory and the work of a record, and knows the model's present version.
    pub compute: Arc<dyn Compute>,
    /// The share of records that are published as samples too, which take memory.
    pub sampled: Option<f64>,
    /// Offsets are committed in the sink's transactions.
    pub transactional: bool,
}

pub struct Source {
    /// Dropped before the consumer, which it shares.
    pub(super) offsets: Offsets,
    pub(super) consumer: Arc<Client<BaseConsumer<Callbacks>>>,
    pub(super) lookup: Lookup,
    pub(super) context: Context,
    pub(super) subscription: Subscription,
    pub(super) assignment: Assignment,
    pub(super) ledger: Ledger,
    pub(super) intake: Intake,
    pub(super) doubt: Doubt,
    pub(super) bounds: Bounds,
    pub(super) idle: Idle,
    pub(super) lag: Lag,
    pub(super) fetching: Fetching,
    pub(super) heartbeats: Heartbeats,
    joining: Joining,
    /// End offsets of paused partitions: librdkafka learns a high watermark only from fetch responses.
    ends: LogEnds,
    /// When they were last asked for.
    ends_asked: Option<Instant>,
    last_error: Option<(String, Instant)>,
}

impl Drop for Source {
    /// Dropping the consumer leaves the group, which causes a revocation: from now on the callback answers it itself.
    fn drop(&mut self) {
        self.consumer.context().close();
        self.abandon_assignment();
    }
}

impl Source {
    pub fn new(settings: &Settings, context: Context) -> Result<Self, SourceError> {
        let role = if context.drain.is_some() { consumer::Role::Drain } else { consumer::Role::Run };
        let version = context.compute.about().version();
        let config = consumer::config(settings, role, &version.digest, context.partitions);
        let consumer: Client<BaseConsumer<Callbacks>> =
            login::create(&config, Callbacks::default()).map_err(SourceError::Client)?;
        let consumer = Arc::new(consumer);
        let fatal = |error: &dyn std::fmt::Display| SourceError::Fatal(error.to_string());
        let committer = Committer::start(&consumer).map_err(|e| fatal(&e))?;
        let topics: Vec<&str> = settings.input.topics.iter().map(String::as_str).collect();
        let subscription = match &context.drain {
            Some(drain) => {
                let frozen = drain.freeze(&config, &topics, settings.input.start).map_err(|e| fatal(&e))?;
                Subscription::fixed(frozen)
            }
            None => Subscription::new(&settings.input.topics),
        };
        let fetching = Fetching::new(&config, Instant::now());
        let setup =
            Setup { config, topics: settings.input.topics.clone(), start: settings.input.start, version };
        let lookup = Lookup::start(&consumer, setup).map_err(|e| fatal(&e))?;
        context.metrics.memory_limit.set(settings.memory.limit.0 as f64);
        let refresh = settings.property("topic.metadata.refresh.interval.ms");
        // -1, which does not parse here, turns the client's refresh off.
        let refresh = refresh.and_then(|ms| ms.parse().ok()).map(Duration::from_millis);
        let limits = Limits::of(settings, context.compute.lanes());
        let source = Self {
            offsets: Offsets::new(committer, settings.delivery.commit_interval.0),
            consumer,
            lookup,
            subscription,
            assignment: Assignment::new(settings.delivery.revoke_timeout.0),
            ledger: Ledger::new(context.transactional),
            intake: Intake::new(
                Gatherer::new(limits),
                Load {
                    bytes: (settings.memory.limit.0 / 2) as usize,
                    work: 2.0 * limits.max_work.as_secs_f64(),
                    windows: UNDER_WAY,
                },
                settings.window.when_idle,
            ),
            doubt: Doubt::new(Instant::now(), refresh),
            bounds: Bounds {
                schedule: ScheduleState::new(&context.schedule, context.drain.is_some()),
                drain: context.drain.clone(),
            },
            idle: Idle::default(),
            lag: Lag::new(),
            fetching,
            heartbeats: Heartbeats::new(settings),
            joining: Joining::new(settings),
            ends: LogEnds::new(),
            ends_asked: None,
            last_error: None,
            context,
        };
        source.subscribe()
    }

    /// Group metadata, under which the sink's transactions commit offsets.
    pub fn group(&self) -> Group {
        let consumer = Arc::clone(&self.consumer);
        Arc::new(move || consumer.group_metadata())
    }

    /// Consumes until it is asked to stop or a drain is complete, and everything in flight is committed.
    ///
    /// # Errors
    /// Any [`SourceError`]; the group is left before it is returned.
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

    /// Leaves the group, so that it need not wait for the session timeout. Dropping `self` might not, because the
    /// consumer is shared.
    fn leave(&mut self) {
        self.consumer.context().close();
        self.abandon_assignment();
        if self.consumer.close_queue().is_err() {
            return;
        }
        let deadline = Instant::now() + SHUTDOWN_TIMEOUT;
        while !self.consumer.closed() && Instant::now() < deadline {
            self.consumer.poll(POLL);
        }
    }

    fn consume(
        &mut self,
        windows: Sender<Queued<Window>>,
        reports: &Receiver<Report>,
    ) -> Result<(), SourceError> {
        while !self.context.stop.load(Ordering::Relaxed) {
            self.context.health.busy(Stage::Source);
            self.check_other_stages()?;
            self.take_reports(reports);
            self.handle_events()?;
            self.pass_on(&windows);
            let waits =
                self.intake.out_of_room || self.assignment.is_revoking() || self.offsets.has_suspects();
            self.context.commit_soon.set(waits);
            if self.intake.is_full() {
                // Only events: `pass_on` has waited already.
                self.poll_events(Duration::ZERO)?;
            } else {
                self.poll()?;
            }
            if let Some(window) = self.intake.gatherer.due(Instant::now()) {
                self.hold(window);
            }
            if self.offsets.is_due() {
                self.commit(None);
            }
            if self.is_drained() || self.is_period_over() {
                break;
            }
        }
        self.finish(windows, reports)
    }

    /// After SIGTERM, or at the end of a drain or a period: closes the open window, waits until everything
    /// in flight is published, and commits it.
    fn finish(
        &mut self,
        windows: Sender<Queued<Window>>,
        reports: &Receiver<Report>,
    ) -> Result<(), SourceError> {
        let closed_by = match &self.bounds.drain {
            Some(drain) if drain.is_complete() => {
                tracing::info!("drained: all partitions are at their ends");
                ClosedBy::End
            }
            _ if self.context.stop.load(Ordering::Relaxed) => {
                tracing::info!("stopping: finishing windows in flight");
                ClosedBy::Stop
            }
            // The schedule's period has ended.
            _ => ClosedBy::End,
        };
        self.context.commit_soon.set(true);
        self.pause();
        if let Some(window) = self.intake.gatherer.close(closed_by) {
            self.hold(window);
        }
        if closed_by == ClosedBy::Stop {
            self.leave_excess_windows();
        }
        while !self.intake.held.is_empty() {
            self.context.health.busy(Stage::Source);
            self.check_other_stages()?;
            self.take_reports(reports);
            self.handle_events()?;
            self.pass_on(&windows);
            self.poll_events(Duration::ZERO)?;
        }
        // Without a sender the stages end one after the other; the last one closes `reports`.
        drop(windows);
        loop {
            self.context.health.busy(Stage::Source);
            self.check_other_stages()?;
            self.handle_events()?;
            match reports.try_recv() {
                Ok(report) => self.take_report(report),
                Err(TryRecvError::Empty) => self.poll_events(Duration::from_millis(10))?,
                Err(TryRecvError::Disconnected) => break,
            }
            if self.offsets.is_due() {
                self.commit(None);
            }
        }
        let deadline = Instant::now() + SHUTDOWN_TIMEOUT;
        while self.ledger.commits_open() && Instant::now() < deadline {
            self.commit(None);
            self.poll_events(Duration::from_millis(10))?;
            self.handle_events()?;
        }
        if self.ledger.commits_open() {
            tracing::warn!("the last offsets could not be committed: their records will be predicted again");
        }
        // From here on the new owners report the lag of these partitions.
        for owned in self.ledger.iter() {
            self.lag.forget(&owned.partition, &self.context.metrics);
        }
        self.context.metrics.drain_remaining.set(0.0);
        self.context.health.idle(Stage::Source);
        Ok(())
    }

    /// # Errors
    /// Another stage has failed: nothing more will be published.
    fn check_other_stages(&self) -> Result<(), SourceError> {
        match self.context.failed.load(Ordering::Relaxed) {
            true => Err(SourceError::OtherStage),
            false => Ok(()),
        }
    }

    fn take_reports(&mut self, reports: &Receiver<Report>) {
        while let Ok(report) = reports.try_recv() {
            self.take_report(report);
        }
    }

    fn take_report(&mut self, report: Report) {
        match report {
            Report::Published(Published { spans, counts, records, load, committed }) => {
                for change in self.ledger.published(&spans, committed) {
                    change.log();
                }
                if let Some(drain) = &self.bounds.drain {
                    drain.published(&spans, &counts);
                }
                self.lag.published += records as u64;
                self.intake.in_flight -= load;
                self.offsets.published(load.work);
            }
            Report::Dropped { load } => self.intake.in_flight -= load,
            Report::Suspects { positions, kept } => self.suspect(positions, kept),
        }
        self.show_memory();
    }

    fn handle_events(&mut self) -> Result<(), SourceError> {
        for event in self.consumer.context().take() {
            match event {
                Event::Assigned(list) => self.on_assigned(list),
                Event::Revoked(list) => self.on_revoked(list),
                Event::Committed(result, offsets) => self.on_committed(result, &offsets),
                Event::Statistics(statistics) => self.on_statistics(&statistics)?,
                Event::Answer(answer) => self.on_answer(answer)?,
                Event::Error(error, reason) => self.on_error(error, &reason)?,
            }
        }
        self.advance_revocation();
        self.commit_suspects();
        Ok(())
    }

    fn on_answer(&mut self, answer: Answer) -> Result<(), SourceError> {
        match answer {
            Answer::Start(started) => self.on_start(*started)?,
            Answer::Ends(ends) => self.ends = ends,
            Answer::Quiet(ends) => self.on_quiet(&ends)?,
            Answer::Progress(known) => self.on_progress(&known),
            Answer::Content(found) => self.on_content(found),
            Answer::Topics(topics) => self.on_topics(topics)?,
            Answer::Damage(found) => self.on_damage(found),
            Answer::SeekDone { id, failed } => self.on_sought(id, &failed),
        }
        Ok(())
    }

    /// Called once a second.
    fn on_statistics(&mut self, statistics: &Statistics) -> Result<(), SourceError> {
        self.look_at_ends(statistics);
        self.look_at_idle(statistics);
        self.look_at_fetching(statistics);
        let drain = self.bounds.drain.as_deref();
        let (status, remaining) =
            self.lag.update(statistics, &self.ledger, drain, &self.ends, &self.context.metrics);
        self.warn_if_late(remaining);
        self.show_skipped(|p| Some(of_partition(statistics, p)?.lo_offset).filter(|&low| low >= 0));
        self.context.health.set_source(status);
        self.run_periodic_checks();
        let state = statistics.cgrp.as_ref().map_or("", |group| &group.join_state);
        // A member without partitions is ready too.
        if state == "steady" {
            self.context.health.set_ready();
        }
        self.joining.look(state, &self.context);
        self.look_at_heartbeats(statistics)
    }

    /// Follows the end offsets of the logs, and asks for those of paused partitions. One that moves back hints at a
    /// recreated topic.
    fn look_at_ends(&mut self, statistics: &Statistics) {
        let mut back = false;
        for owned in self.ledger.iter_mut() {
            let known = of_partition(statistics, &owned.partition);
            let end = known.map(|known| known.hi_offset).filter(|&end| end >= 0);
            back |= end.is_some_and(|end| owned.end.is_some_and(|before| end < before));
            owned.end = end.or(owned.end);
        }
        if back {
            self.doubt(Cause::Topics);
        }
        if self.intake.paused && self.ends_asked.is_none_or(|at| at.elapsed() >= ENDS) {
            self.ends_asked = Some(Instant::now());
            // A topic that does not exist would delay the answer for the others.
            let there = self.ledger.iter().filter(|o| o.hold != Some(Hold::TopicAbsent));
            self.lookup.ask(Question::Ends(there.map(|owned| owned.partition.clone()).collect()));
        }
    }

    /// Handles a client error. Most are temporary, and librdkafka retries by itself.
    ///
    /// # Errors
    /// The error is fatal.
    pub(super) fn on_error(&mut self, error: KafkaError, reason: &str) -> Result<(), SourceError> {
        if let KafkaError::MessageConsumptionFatal(code) = error {
            return Err(SourceError::Fatal(code.to_string()));
        }
        if let Some((code, reason)) = self.consumer.client().fatal_error() {
            return Err(SourceError::Fatal(format!("{code}: {reason}")));
        }
        let code = error.rdkafka_error_code();
        match code {
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
                self.doubt(Cause::Topics);
            }
            // librdkafka returns these codes for a failed checksum, or after one.
            Some(RDKafkaErrorCode::BadMessage | RDKafkaErrorCode::NotImplemented) => {
                self.doubt(Cause::Damage);
            }
            _ => {}
        }
        let hint = match code {
            Some(RDKafkaErrorCode::UnknownTopicOrPartition) => " (an input topic does not exist)",
            Some(RDKafkaErrorCode::TopicAuthorizationFailed) => " (this user may not read an input topic)",
            Some(RDKafkaErrorCode::GroupAuthorizationFailed) => " (this user may not use the group)",
            _ => "",
        };
        let message = format!("{error}{hint} {reason}").trim_end().to_owned();
        let again =
            self.last_error.as_ref().is_some_and(|(last, at)| *last == message && at.elapsed() < REPEAT);
        if !again {
            tracing::warn!(reason = message, "Kafka client error: retrying");
            self.context.health.error(&message);
            self.last_error = Some((message, Instant::now()));
        }
        Ok(())
    }
}
