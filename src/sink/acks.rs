//! Delivery reports, counted by window.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use rdkafka::client::ClientContext;
use rdkafka::error::KafkaError;
use rdkafka::producer::{DeliveryResult, ProducerContext};
use rdkafka::types::RDKafkaErrorCode;

use crate::telemetry::Health;

/// Identifies a record with a message under way: window number and place in the window, in the one
/// word that librdkafka carries along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket(usize);

/// `window.max_records` is at most 1,000,000.
const PLACE_BITS: u32 = 24;

impl Ticket {
    pub fn new(window: u64, place: usize) -> Self {
        Self(((window as usize) << PLACE_BITS) | place)
    }

    pub fn window(self) -> u64 {
        (self.0 >> PLACE_BITS) as u64
    }

    pub fn place(self) -> usize {
        self.0 & ((1 << PLACE_BITS) - 1)
    }

    pub fn word(self) -> usize {
        self.0
    }
}

/// What arrived since it was last asked.
#[derive(Debug, Default)]
pub(super) struct Arrived {
    /// Messages acknowledged, by window.
    pub acknowledged: HashMap<u64, usize>,
    pub failed: Vec<(Ticket, RDKafkaErrorCode)>,
}

/// Filled by the producer's callbacks, which run on the thread that polls it: the publisher's own.
pub(super) struct Reports {
    arrived: Mutex<Arrived>,
    health: Arc<Health>,
}

impl Reports {
    pub fn new(health: Arc<Health>) -> Self {
        Self { arrived: Mutex::default(), health }
    }

    pub fn take(&self) -> Arrived {
        std::mem::take(&mut *self.arrived.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::warn!(%error, reason, "producer");
        self.health.error(&format!("producer: {reason}"));
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, word: usize) {
        let ticket = Ticket(word);
        let mut arrived = self.arrived.lock().unwrap_or_else(|e| e.into_inner());
        match result {
            Ok(_) => *arrived.acknowledged.entry(ticket.window()).or_default() += 1,
            Err((error, _)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                arrived.failed.push((ticket, code));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_holds_window_and_place() {
        let ticket = Ticket::new(1 << 33, 999_999);
        assert_eq!((ticket.window(), ticket.place()), (1 << 33, 999_999));
        assert_eq!(Ticket(ticket.word()), ticket);
    }
}
