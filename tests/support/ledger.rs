//! The outcomes of every input position, as a consumer of the output topics sees them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::BaseConsumer;
use rdkafka::message::Message;

use super::{Got, Place, from_the_beginning, unique};

/// Reads the output and dead-letter topics as they grow.
pub struct Ledger {
    consumer: BaseConsumer,
    input: String,
    /// Number of outcomes (predictions, tombstones, dead letters) by input partition and offset.
    seen: HashMap<(i32, i64), u32>,
    /// Number of outcomes of other input topics, by the value's `id`: positions repeat when these topics are recreated.
    others: HashMap<u64, u32>,
    /// Highest input offset with an outcome so far, by input partition, output topic and output partition.
    last: HashMap<(i32, String, i32), i64>,
    /// First outcomes that came after the outcome of a later offset.
    pub out_of_order: Vec<String>,
    /// Outcomes whose order is not checked: they depend on the topics' configuration, and may be others when a record
    /// is processed again.
    unordered: fn(&Got) -> bool,
}

impl Ledger {
    /// Reads with `read_committed`.
    pub fn of(place: &Place) -> Self {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &place.brokers)
            .set("group.id", unique("ledger"))
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_committed")
            .set("fetch.message.max.bytes", "20000000")
            .set("reconnect.backoff.max.ms", "1000")
            .set("log_level", "0")
            .create()
            .expect("a consumer");
        from_the_beginning(&consumer, &[&place.output, &place.dead]);
        Self {
            consumer,
            input: place.input.clone(),
            seen: HashMap::new(),
            others: HashMap::new(),
            last: HashMap::new(),
            out_of_order: Vec::new(),
            unordered: |_| false,
        }
    }

    pub fn with_unordered(self, unordered: fn(&Got) -> bool) -> Self {
        Self { unordered, ..self }
    }

    /// How many positions have an outcome now.
    pub fn count_of(place: &Place) -> usize {
        let mut ledger = Self::of(place);
        ledger.read(Duration::from_millis(300));
        ledger.count()
    }

    /// Reads for at least `wait`, and on while records come.
    pub fn read(&mut self, wait: Duration) {
        let until = Instant::now() + wait;
        loop {
            match self.consumer.poll(until.saturating_duration_since(Instant::now())) {
                Some(Ok(message)) => {
                    let got = Got::from(&message);
                    if got.source_topic() != self.input {
                        let id = got.json()["id"].as_u64().expect("a record of another topic has an id");
                        *self.others.entry(id).or_default() += 1;
                        continue;
                    }
                    let (partition, offset) = got.source();
                    let count = self.seen.entry((partition, offset)).or_default();
                    *count += 1;
                    if *count > 1 || (self.unordered)(&got) {
                        continue;
                    }
                    let key = (partition, message.topic().to_owned(), message.partition());
                    let last = self.last.entry(key).or_insert(-1);
                    if offset < *last {
                        self.out_of_order.push(format!("{partition}/{offset} after {partition}/{last}"));
                    }
                    *last = offset.max(*last);
                }
                // Brokers may be down.
                Some(Err(_)) => {}
                None if Instant::now() >= until => return,
                None => {}
            }
        }
    }

    pub fn count(&self) -> usize {
        self.seen.len()
    }

    /// Number of outcomes beyond the first of a position.
    pub fn duplicates(&self) -> u64 {
        self.seen.values().chain(self.others.values()).map(|&count| u64::from(count) - 1).sum()
    }

    /// Positions and ids that have more than one outcome.
    pub fn doubled(&self) -> Vec<String> {
        let positions = self.seen.iter().filter(|(_, count)| **count > 1);
        let ids = self.others.iter().filter(|(_, count)| **count > 1);
        let positions =
            positions.map(|((partition, offset), count)| format!("{partition}/{offset} {count} times"));
        positions.chain(ids.map(|(id, count)| format!("id {id} of another topic {count} times"))).collect()
    }

    /// Those of `ids`, of records of other topics, that have no outcome.
    pub fn missing_others(&self, ids: std::ops::Range<u64>) -> Vec<u64> {
        ids.filter(|id| !self.others.contains_key(id)).collect()
    }

    /// Positions below `ends` (by partition) that have no outcome.
    pub fn missing(&self, ends: &[i64]) -> Vec<(i32, i64)> {
        let all =
            ends.iter().enumerate().flat_map(|(p, &end)| (0..end).map(move |offset| (p as i32, offset)));
        all.filter(|position| !self.seen.contains_key(position)).collect()
    }
}
