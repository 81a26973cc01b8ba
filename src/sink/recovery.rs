//! After a batch was refused: finds the records to blame, turns them into dead letters and publishes the rest in order.
//!
//! ```text
//! stop sending ─▶ read the topics' limits ─▶ records not published, in order ─▶ send a group, wait for all of it
//!                                              ▲                                │ refused: blame or split ([`super::isolation`])
//!                                              └────────────────────────────────┘
//! ```
//!
//! `at_least_once`: the producer stops at the first refused batch (`enable.gapless.guarantee`) and is replaced by one
//! that sends one request at a time, so that no later message overtakes the refused ones. `exactly_once`: each group is
//! a transaction of its own.

use std::collections::VecDeque;
use std::time::Duration;

use rdkafka::types::RDKafkaErrorCode;

use super::acks::{Failure, Ticket};
use super::error::PublishError;
use super::isolation::{Meaning, Verdict, judge};
use super::producer::{ProducerLimits, RecordProducer, config};
use super::publisher::{Cursor, Delivery, Publisher, RefusedBecause};
use super::window::InFlightWindow;
use crate::telemetry::health::Stage;

/// How long to wait, once the producer has stopped, for the delivery reports of messages already sent.
const WIND_UP: Duration = Duration::from_secs(60);
/// Interval between polls for delivery reports.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Age for `refresh_rules` with which it always reads the topics' configuration again.
const ALWAYS: Duration = Duration::ZERO;

/// The result of sending a group of records.
enum Sent {
    Published,
    /// Some, or samples of them, were refused. Holds the failures reported for them, perhaps none.
    Refused(Vec<Failure>),
}

impl Publisher {
    /// Handles a refused batch. Returns when all records sent so far are published.
    pub(super) fn recover(&mut self) -> Result<(), PublishError> {
        let failures = self.take_refused();
        let first = failures.iter().find(|failure| Meaning::of(failure.code) == Meaning::Refused);
        tracing::warn!(
            records = failures.len(),
            code = first.map(|failure| failure.code.to_string()),
            reason = first.map(|failure| failure.reason.as_str()),
            "the broker refused a batch: searching for the record to blame"
        );
        self.context.metrics.retries.with_label_values(&["refused"]).inc();
        let end = self.cursor;
        self.refresh_rules(ALWAYS);
        if self.topics.batch_limit().is_none() {
            self.halved += 1;
        }
        self.stop_after_refusal()?;
        let start = Cursor { window: self.windows.front().map_or(end.window, InFlightWindow::id), place: 0 };
        let all = self.unsettled(start, end);
        let mut groups = VecDeque::from([all.clone()]);
        if !failures.is_empty() {
            self.apply(judge(&all, &failures), &all, &mut groups)?;
        }
        self.sample_refused = false;
        while let Some(group) = groups.pop_front() {
            let group: Vec<Ticket> = group.into_iter().filter(|ticket| !self.is_settled(*ticket)).collect();
            if group.is_empty() {
                continue;
            }
            let Sent::Refused(mut failures) = self.publish_group(&group)? else { continue };
            self.context.metrics.retries.with_label_values(&["refused"]).inc();
            let mut of_samples = std::mem::take(&mut self.sample_refused);
            self.stop_after_refusal()?;
            of_samples |= std::mem::take(&mut self.sample_refused);
            let left: Vec<Ticket> = group.into_iter().filter(|ticket| !self.is_settled(*ticket)).collect();
            if of_samples && failures.is_empty() {
                // No record is to blame, and a sample is sent again only once.
                groups.push_front(left);
                continue;
            }
            if let ([alone], []) = (&left[..], &failures[..]) {
                // No failure was reported for it, but no other record is left to blame.
                let reason = "its batch was refused".to_owned();
                failures.push(Failure { ticket: *alone, code: RDKafkaErrorCode::Unknown, reason });
            }
            groups.push_front(left.clone());
            self.apply(judge(&left, &failures), &left, &mut groups)?;
        }
        // The window at `end` may be gone: `rewind` drops windows whose leases have ended.
        let first = self.windows.front().map_or(end, |window| Cursor { window: window.id(), place: 0 });
        self.cursor = end.max(first);
        self.start_producer(false)?;
        tracing::info!("recovered from the refused batch: all records sent so far are published");
        Ok(())
    }

    /// Replaces the first group, which is `judged`, according to the verdict.
    fn apply(
        &mut self,
        verdict: Verdict,
        judged: &[Ticket],
        groups: &mut VecDeque<Vec<Ticket>>,
    ) -> Result<(), PublishError> {
        groups.pop_front();
        match verdict {
            Verdict::Blame(failures) => {
                for failure in &failures {
                    if let Some(index) = self.index(failure.ticket.window()) {
                        self.dead_letter_or_change_form(
                            index,
                            failure.ticket.place(),
                            RefusedBecause::Broker(failure),
                        )?;
                    }
                }
                groups.push_front(judged.to_vec());
            }
            Verdict::Split(parts) => {
                for part in parts.into_iter().rev() {
                    groups.push_front(part);
                }
            }
        }
        Ok(())
    }

    fn take_refused(&mut self) -> Vec<Failure> {
        self.producer_stopped = false;
        std::mem::take(&mut self.refused)
    }

    fn is_settled(&self, ticket: Ticket) -> bool {
        // A window that is no longer in `windows` was reported.
        self.index(ticket.window()).is_none_or(|index| self.windows[index].is_settled(ticket.place()))
    }

    /// Ends what is in flight and starts a producer for sending the groups.
    fn stop_after_refusal(&mut self) -> Result<(), PublishError> {
        match self.delivery {
            Delivery::AtLeastOnce => {
                self.wind_up(WIND_UP)?;
                // Later messages fail only because of the first one, which is being handled.
                self.take_refused();
                self.start_producer(true)
            }
            Delivery::ExactlyOnce(_) => {
                self.abort("the broker refused a batch")?;
                self.take_refused();
                self.start_producer(true)
            }
        }
    }

    /// Waits at most `limit` for the delivery reports of all messages sent, and processes them.
    pub(super) fn wind_up(&mut self, limit: Duration) -> Result<(), PublishError> {
        let arrived = self.producer.wind_up(limit, || self.context.health.busy(Stage::Publish));
        arrived.into_iter().try_for_each(|reports| self.process(reports))
    }

    fn start_producer(&mut self, one_request_at_a_time: bool) -> Result<(), PublishError> {
        let limits =
            ProducerLimits { batch: self.topics.batch_limit(), halved: self.halved, one_request_at_a_time };
        let config = config(&self.settings, limits);
        match self.delivery {
            Delivery::AtLeastOnce => {
                self.producer = RecordProducer::new(&config, &self.settings, &self.context.health)
                    .map_err(PublishError::Client)?;
                self.owed_sample = None;
                self.windows.iter_mut().for_each(InFlightWindow::forget_sent);
                Ok(())
            }
            // A transaction holds only one group, so several requests at a time do no harm.
            Delivery::ExactlyOnce(_) => self.reconfigure(super::producer::config(
                &self.settings,
                ProducerLimits { one_request_at_a_time: false, ..limits },
            )),
        }
    }

    /// Sends these records and waits until all of them are published or some are refused.
    fn publish_group(&mut self, group: &[Ticket]) -> Result<Sent, PublishError> {
        loop {
            if let Delivery::ExactlyOnce(_) = self.delivery {
                self.cursor = Cursor { window: group[0].window(), place: group[0].place() };
                if !self.begin_transaction()? {
                    continue;
                }
            }
            for ticket in group {
                while self.goes_on()
                    && let Some(index) = self.index(ticket.window())
                    && !self.send_if_ours(index, ticket.place())?
                {
                    self.wait_for_reports()?;
                }
                while self.owed_sample.is_some() && self.goes_on() {
                    self.wait_for_reports()?;
                    self.send_owed_sample()?;
                }
            }
            while self.producer.unacknowledged > 0 && self.goes_on() {
                self.wait_for_reports()?;
            }
            if self.producer_stopped {
                // The client stops before it reports the messages that made it stop.
                self.wind_up(WIND_UP)?;
            }
            if self.producer_stopped || self.sample_refused || !self.refused.is_empty() {
                return Ok(Sent::Refused(self.take_refused()));
            }
            if matches!(self.delivery, Delivery::AtLeastOnce) {
                return Ok(Sent::Published);
            }
            if let Some(reason) = self.abort_reason.take() {
                self.abort(&reason)?;
                continue;
            }
            let open: Vec<Ticket> =
                group.iter().copied().filter(|ticket| !self.is_settled(*ticket)).collect();
            if self.commit(&open)? {
                return Ok(Sent::Published);
            }
        }
    }

    /// Whether nothing has failed yet.
    fn goes_on(&mut self) -> bool {
        if self.is_too_slow() {
            self.abort_reason.get_or_insert_with(|| "not acknowledged in time".to_owned());
        }
        let refused = self.sample_refused || !self.refused.is_empty();
        self.abort_reason.is_none() && !refused && !self.producer_stopped
    }

    fn wait_for_reports(&mut self) -> Result<(), PublishError> {
        self.context.health.busy(Stage::Publish);
        std::thread::park_timeout(POLL_INTERVAL);
        self.process_reports()
    }
}
