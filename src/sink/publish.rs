//! The publisher: one thread that owns the producer.
//!
//! It sends a window's predictions and dead letters in input order, and does not wait for their
//! acknowledgement before it sends the next window's; the idempotent producer keeps the order.
//! Windows are reported as published in the order they came, each when all of its messages are
//! acknowledged. An error of the producer that no retry can help ends the process.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::message::OwnedHeaders;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;

use super::acks::{Reports, Ticket};
use super::message::{self, Stamp};
use crate::cluster::Topics;
use crate::flow::{Encoded, Outcome, Ownership, Published, Queued};
use crate::record::{Fault, Record, RecordError};
use crate::settings::{Partitioning, Settings};
use crate::telemetry::{Health, Metrics};

/// Windows sent and not yet acknowledged, at most.
const UNDER_WAY: usize = 8;
/// Between two looks for delivery reports while there are some to come.
const REPORTS: Duration = Duration::from_millis(2);
/// The same while there are none.
const IDLE: Duration = Duration::from_millis(500);

/// What the publisher is told at the start.
pub struct Wiring {
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    pub ownership: Arc<Ownership>,
    /// `source@revision` and 16 hex digits.
    pub model: String,
    pub digest: String,
    pub topics: Topics,
}

pub struct Publisher {
    producer: BaseProducer<Reports>,
    output: String,
    dead_letters: String,
    partitioning: Partitioning,
    stamp: Stamp,
    wiring: Wiring,
    next: u64,
    under_way: VecDeque<UnderWay>,
}

/// A window that is sent, in whole or in part.
struct UnderWay {
    number: u64,
    content: Encoded,
    /// Messages not yet acknowledged.
    left: usize,
    /// Whether all of its messages have been handed to the producer.
    sent: bool,
    started: Instant,
}

impl Publisher {
    pub fn new(settings: &Settings, wiring: Wiring) -> Result<Self, KafkaError> {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &settings.kafka.brokers)
            .set("client.id", "kandle")
            // Java's clients hash keys this way.
            .set("partitioner", "murmur2_random")
            .set("enable.idempotence", "true")
            // For ever: a message is given up by the process, never silently.
            .set("message.timeout.ms", "0")
            // Sizes are checked here, against each topic's own limit; see `produce`.
            .set("message.max.bytes", "1000000000")
            .set("queue.buffering.max.messages", "1000000")
            .set("queue.buffering.max.kbytes", (settings.memory.limit.0 / 4 / 1024).to_string());
        for (name, value) in settings.kafka.properties.iter().chain(&settings.output.properties) {
            config.set(name, &value.0);
        }
        let producer = config.create_with_context(Reports::new(Arc::clone(&wiring.health)))?;
        Ok(Self {
            producer,
            output: settings.output.topic.clone(),
            dead_letters: settings.dead_letters.topic.clone(),
            partitioning: settings.output.partition,
            stamp: Stamp { model: wiring.model.clone(), digest: wiring.digest.clone() },
            wiring,
            next: 0,
            under_way: VecDeque::new(),
        })
    }

    /// Publishes windows until their channel closes and the last is acknowledged.
    pub fn serve(
        mut self,
        windows: &Receiver<Queued<Encoded>>,
        published: &Sender<Published>,
    ) -> Result<(), String> {
        let mut open = true;
        while open || !self.under_way.is_empty() {
            // Reports are looked for every so often; with none to come, the producer wants to be
            // served now and then all the same.
            let pause = if self.under_way.is_empty() { IDLE } else { REPORTS };
            if open && self.under_way.len() < UNDER_WAY {
                match windows.recv_timeout(pause) {
                    Ok(window) => {
                        let window = window.take(&self.wiring.metrics, "wait_publish");
                        self.send(window)?;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => open = false,
                }
            } else {
                std::thread::park_timeout(pause);
            }
            self.poll()?;
            while self.under_way.front().is_some_and(|first| first.sent && first.left == 0) {
                let first = self.under_way.pop_front().expect("there is a first");
                if published.send(self.finish(first)).is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, content: Encoded) -> Result<(), String> {
        let number = self.next;
        self.next += 1;
        self.under_way.push_back(UnderWay { number, content, left: 0, sent: false, started: Instant::now() });
        let at = self.under_way.len() - 1;
        let owned: Vec<bool> = self.under_way[at]
            .content
            .window
            .spans
            .iter()
            .map(|span| self.wiring.ownership.holds(span))
            .collect();
        let mut source = String::new();
        for place in 0..self.under_way[at].content.outcomes.len() {
            if !owned[self.under_way[at].content.window.records[place].span as usize] {
                continue;
            }
            self.under_way[at].left += 1;
            self.send_record(at, place, &mut source)?;
            // Room in the producer's queue and in our list of reports.
            if place % 4096 == 4095 {
                self.poll()?;
            }
        }
        self.under_way[at].sent = true;
        self.show_memory();
        Ok(())
    }

    /// Sends what there is to say about one record of the window at `at`.
    fn send_record(&self, at: usize, place: usize, source: &mut String) -> Result<(), String> {
        let UnderWay { number, content, .. } = &self.under_way[at];
        let Encoded { window, outcomes, memory } = content;
        let record = &window.records[place];
        let ticket = Ticket::new(*number, place);
        let position = window.position(record);
        source.clear();
        // Writing to a String cannot fail.
        let _ = write!(source, "{position}");
        let (topic, written, value, headers) = match &outcomes[place] {
            Outcome::Dead(error) => {
                let headers = message::dead_letter(record.headers.as_ref(), source, error, &self.stamp);
                (&self.dead_letters, self.wiring.topics.dead_letters, window.value(record), headers)
            }
            outcome => {
                let value = match outcome {
                    Outcome::Prediction { part, bytes } => {
                        Some(&memory[*part as usize][bytes.start as usize..bytes.end as usize])
                    }
                    Outcome::Unchanged => window.value(record),
                    Outcome::Tombstone | Outcome::Dead(_) => None,
                };
                let headers = message::prediction(record.headers.as_ref(), source, &self.stamp);
                (&self.output, self.wiring.topics.output, value, headers)
            }
        };
        let key = window.key(record);
        let partition = message::partition(self.partitioning, key, &position, written.partitions);
        // A batch with a message that is too large is refused as a whole, its neighbours too: what
        // may be too large never gets that far.
        let bytes = value.map_or(0, <[u8]>::len)
            + key.map_or(0, <[u8]>::len)
            + message::OVERHEAD
            + message::size(&headers);
        if bytes as u64 > written.max_bytes {
            self.producer.context().refuse(ticket.word(), RDKafkaErrorCode::MessageSizeTooLarge);
            return Ok(());
        }
        self.produce(BaseRecord {
            topic,
            partition,
            payload: value,
            key,
            timestamp: record.timestamp,
            headers: Some(headers),
            delivery_opaque: ticket.word(),
        })
    }

    fn produce(&self, mut message: BaseRecord<'_, [u8], [u8], usize>) -> Result<(), String> {
        loop {
            match self.producer.send(message) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    message = back;
                    self.wiring.metrics.retries.with_label_values(&["produce"]).inc();
                    self.producer.poll(Duration::from_millis(10));
                    self.check_fatal()?;
                }
                Err((error, back)) => return Err(format!("cannot publish to {}: {error}", back.topic)),
            }
        }
    }

    fn check_fatal(&self) -> Result<(), String> {
        match self.producer.client().fatal_error() {
            Some((code, reason)) => Err(format!("the producer failed for good: {code}: {reason}")),
            None => Ok(()),
        }
    }

    /// Serves the producer and books what it reports.
    fn poll(&mut self) -> Result<(), String> {
        loop {
            // With a time to wait, the client's poll would spin through the last millisecond of it.
            self.producer.poll(Duration::ZERO);
            let arrived = self.producer.context().take();
            if arrived.acknowledged.is_empty() && arrived.failed.is_empty() {
                return self.check_fatal();
            }
            for (number, count) in arrived.acknowledged {
                self.of(number).left -= count;
            }
            for (ticket, code) in arrived.failed {
                self.refused(ticket, code)?;
            }
        }
    }

    fn of(&mut self, number: u64) -> &mut UnderWay {
        let first = self.under_way.front().map_or(0, |first| first.number);
        &mut self.under_way[(number - first) as usize]
    }

    /// A message the broker will never take. Too large a prediction becomes a dead letter, too large
    /// a dead letter one of headers alone; anything else is no record's fault.
    fn refused(&mut self, ticket: Ticket, code: RDKafkaErrorCode) -> Result<(), String> {
        let first = self.under_way.front().map_or(0, |first| first.number);
        let at = (ticket.window() - first) as usize;
        let place = ticket.place();
        let record = &self.under_way[at].content.window.records[place];
        let position = self.under_way[at].content.window.position(record);
        if code != RDKafkaErrorCode::MessageSizeTooLarge {
            return Err(format!("{position}: the broker refuses its prediction for good: {code}"));
        }
        match &self.under_way[at].content.outcomes[place] {
            Outcome::Dead(error) => {
                // Its fault stays the reason; only the bytes cannot come along.
                let headers = message::dead_letter(None, &position.to_string(), error, &self.stamp);
                self.bare(ticket, &position.to_string(), headers)
            }
            _ => {
                let message = format!("the prediction is larger than {} takes", self.output);
                self.under_way[at].content.outcomes[place] =
                    Outcome::Dead(RecordError::new(Fault::TooLarge, message));
                self.send_record(at, place, &mut String::new())
            }
        }
    }

    /// A dead letter of headers alone.
    fn bare(&self, ticket: Ticket, source: &str, headers: OwnedHeaders) -> Result<(), String> {
        tracing::warn!(
            source,
            topic = self.dead_letters,
            "too large even for a dead letter: only its headers are kept"
        );
        self.produce(BaseRecord {
            topic: &self.dead_letters,
            partition: Some(0),
            payload: None,
            key: None,
            timestamp: None,
            headers: Some(headers),
            delivery_opaque: ticket.word(),
        })
    }

    /// Counts what is acknowledged.
    fn finish(&self, done: UnderWay) -> Published {
        let Encoded { window, outcomes, memory: _ } = done.content;
        let metrics = &self.wiring.metrics;
        metrics.stage.with_label_values(&["publish"]).observe(done.started.elapsed().as_secs_f64());
        let mut counts = vec![[0u64; 3]; window.spans.len()];
        let (latency, age) = (metrics.record_latency.local(), metrics.record_age.local());
        let (now, wall) = (Instant::now(), SystemTime::now());
        let wall = wall.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
        let owned: Vec<bool> = window.spans.iter().map(|span| self.wiring.ownership.holds(span)).collect();
        for (record, outcome) in window.records.iter().zip(&outcomes) {
            let Record { span, arrived, timestamp, .. } = record;
            if !owned[*span as usize] {
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
        for (span, counts) in window.spans.iter().zip(counts) {
            for (i, (outcome, count)) in
                ["predicted", "dead_lettered", "tombstone"].iter().zip(counts).enumerate()
            {
                totals[i] += count;
                if count > 0 {
                    metrics.records.with_label_values(&[&*span.partition.topic, *outcome]).inc_by(count);
                }
            }
        }
        self.show_memory();
        let ms = (now - window.records[0].arrived).as_millis() as u64;
        tracing::debug!(
            window = window.id,
            records = window.records.len(),
            partitions = window.spans.len(),
            predicted = totals[0],
            dead_lettered = totals[1],
            tombstones = totals[2],
            closed_by = window.closed_by.name(),
            ms,
            "window published"
        );
        Published { records: window.records.len(), bytes: window.bytes(), spans: window.spans.clone() }
    }

    /// Predictions of windows not yet acknowledged in full.
    fn show_memory(&self) {
        let bytes: usize =
            self.under_way.iter().flat_map(|window| &window.content.memory).map(Vec::capacity).sum();
        self.wiring.metrics.memory.with_label_values(&["predictions"]).set(bytes as i64);
    }
}
