//! Publishes samples: messages to `samples.topic` beside the predictions of their records, within the same guarantee.
//!
//! A sample is sent right after its record, under `exactly_once` in the same transaction, and the record's offset is
//! committed only after both are acknowledged. A sample that its topic refuses is left out and counted; it never makes its
//! record a dead letter.

use rdkafka::types::RDKafkaErrorCode;

use super::acks::Failure;
use super::compose::{Target, partition};
use super::error::PublishError;
use super::isolation::Meaning;
use super::producer::NotTaken;
use super::publisher::{Delivery, Publisher, RULES_AGE};
use super::window::SampleOutcome;
use crate::flow::Outcome;

impl Publisher {
    /// Queues the sample of a record in the client, if it has one that is not sent. If the client cannot take it now, it
    /// is owed.
    pub(super) fn send_sample(&mut self, index: usize, place: usize) -> Result<(), PublishError> {
        loop {
            let window = &self.windows[index];
            let Some(value) = window.sample_to_send(place) else { return Ok(()) };
            if matches!(window.content.outcomes[place], Outcome::Dead(_)) {
                self.windows[index].settle_sample(place, SampleOutcome::Dropped);
                return Ok(());
            }
            let (by, ticket) = (self.composer.partitioning, window.ticket(place).of_sample());
            let message = self.composer.sample(window, place, value);
            let topic = self.topics.of(Target::Samples);
            let bytes = message.batch_bytes();
            let refused = topic.rules.refusal(message.key.is_some(), message.timestamp, self.now);
            let too_large = topic.rules.is_too_large(bytes) && !self.compresses;
            if too_large || refused.is_some() {
                drop(message);
                if self.refresh_rules(RULES_AGE) {
                    continue;
                }
                let outcome = if too_large { SampleOutcome::TooLarge } else { SampleOutcome::Refused };
                let position = self.windows[index].position(place);
                tracing::debug!(source = %position, bytes, too_large, "a sample is left out: its topic would refuse it");
                self.windows[index].settle_sample(place, outcome);
                return Ok(());
            }
            let partition = partition(by, message.key, message.source_partition, topic.partitions);
            let name = Target::Samples.topic(&self.settings);
            match self.producer.send(name, partition, message, bytes, ticket) {
                Ok(bytes) => {
                    self.windows[index].sample_sent(place, bytes);
                    self.count_in_transaction(bytes);
                }
                Err(NotTaken::Full) => {
                    self.context.metrics.retries.with_label_values(&["produce"]).inc();
                    self.owed_sample = Some(ticket);
                }
                Err(NotTaken::TransactionFailed) => {
                    self.abort_reason
                        .get_or_insert_with(|| "one of its messages was not delivered".to_owned());
                }
                // `process_reports` finds the cause.
                Err(NotTaken::ProducerFailed) => {}
                Err(NotTaken::Other(error)) => {
                    return Err(PublishError::Topic { topic: name.to_owned(), error });
                }
            }
            return Ok(());
        }
    }

    /// Sends the sample that the client could not take before, if there is one.
    pub(super) fn send_owed_sample(&mut self) -> Result<(), PublishError> {
        match self.owed_sample.take() {
            None => Ok(()),
            Some(ticket) => match self.index(ticket.window()) {
                None => Ok(()),
                Some(index) => self.send_sample(index, ticket.place()),
            },
        }
    }

    /// Handles a sample that was not delivered. [`Publisher::recover`] sends a refused one again, once.
    ///
    /// # Errors
    /// No sample can be published: a permission or the topic is missing.
    pub(super) fn sample_failed(&mut self, index: usize, failure: &Failure) -> Result<(), PublishError> {
        let (window, place) = (&mut self.windows[index], failure.ticket.place());
        let bytes = window.sample_acknowledged(place);
        self.producer.finished(bytes);
        let position = window.position(place);
        match Meaning::of(failure.code) {
            Meaning::Unpublishable => {
                let topic = Target::Samples.topic(&self.settings).to_owned();
                return Err(PublishError::Refused { position, topic, code: failure.code });
            }
            Meaning::Refused => {
                let outcome = match failure.code {
                    RDKafkaErrorCode::MessageSizeTooLarge => SampleOutcome::TooLarge,
                    _ => SampleOutcome::Refused,
                };
                window.sample_refused(place, outcome);
                tracing::warn!(source = %position, code = %failure.code, "the broker refused a batch of samples");
                self.sample_refused = true;
            }
            // Not its own fault: it is sent again.
            Meaning::Neighbour => self.sample_refused = true,
            Meaning::Transient => {
                if matches!(self.delivery, Delivery::ExactlyOnce(_)) {
                    self.abort_reason
                        .get_or_insert_with(|| format!("{position}: sample not delivered: {}", failure.code));
                }
            }
        }
        Ok(())
    }
}
