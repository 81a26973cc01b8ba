//! Delivery reports.

use std::ffi::CStr;
use std::sync::{Arc, Mutex};

use rdkafka::bindings::rd_kafka_message_produce_errstr;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::producer::{DeliveryResult, ProducerContext};
use rdkafka::types::RDKafkaErrorCode;

use crate::kafka::log;
use crate::telemetry::Health;

/// Identifies a message in flight: the window's id, the record's index in the window, and whether it is the record's sample,
/// packed into the one word that librdkafka returns in the delivery report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(usize);

/// Bits of the index in the window; `window.max_records` is at most 1,000,000.
const PLACE_BITS: u32 = 24;
/// The bit of the index that marks a sample.
const SAMPLE: usize = 1 << (PLACE_BITS - 1);

impl Ticket {
    pub fn new(window: u64, place: usize) -> Self {
        Self(((window as usize) << PLACE_BITS) | place)
    }

    pub fn window(self) -> u64 {
        (self.0 >> PLACE_BITS) as u64
    }

    pub fn place(self) -> usize {
        self.0 & (SAMPLE - 1)
    }

    /// The message is the record's sample.
    pub fn of_sample(self) -> Self {
        Self(self.0 | SAMPLE)
    }

    pub fn is_sample(self) -> bool {
        self.0 & SAMPLE != 0
    }

    pub fn word(self) -> usize {
        self.0
    }
}

/// A message that was not delivered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub ticket: Ticket,
    pub code: RDKafkaErrorCode,
    /// The error message that came with the code; empty if there was none.
    pub reason: String,
}

/// The delivery reports received since the last [`Reports::take`].
#[derive(Debug, Default)]
pub(super) struct Arrived {
    pub acknowledged: Vec<Ticket>,
    pub failed: Vec<Failure>,
}

/// Collects delivery reports. The producer's callbacks add them on the thread that polls the producer: the publisher's.
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
        // A batch was refused. The delivery reports of its messages say so too, and `recovery` handles them.
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::GaplessGuarantee) {
            return;
        }
        tracing::warn!(%error, reason, "producer error");
        self.health.error(&format!("producer: {reason}"));
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log::librdkafka(level, facility, text);
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, word: usize) {
        let ticket = Ticket(word);
        let mut arrived = self.arrived.lock().unwrap_or_else(|e| e.into_inner());
        match result {
            Ok(_) => arrived.acknowledged.push(ticket),
            Err((error, message)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                // SAFETY: the message and its error text live as long as this callback; the text is NUL-terminated.
                let reason = unsafe {
                    let text = rd_kafka_message_produce_errstr(message.ptr());
                    if text.is_null() {
                        String::new()
                    } else {
                        CStr::from_ptr(text).to_string_lossy().into_owned()
                    }
                };
                arrived.failed.push(Failure { ticket, code, reason });
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
        assert!(Ticket::new(1, 999_999) < Ticket::new(2, 0), "in the order of publishing");
        let sample = ticket.of_sample();
        assert_eq!((sample.window(), sample.place()), (1 << 33, 999_999));
        assert!(sample.is_sample() && !ticket.is_sample());
    }
}
