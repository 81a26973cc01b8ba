//! librdkafka's log lines, passed on to kandle's log.

use rdkafka::config::RDKafkaLogLevel;

/// Parts of lines that are not logged: they warn about a property that kandle sets and users cannot change. Kandle
/// recovers from refused batches and logs that itself (`sink::recovery`).
const IGNORED: [&str; 2] =
    ["enable.gapless.guarantee is experimental", "Gap-less ordering would not be guaranteed"];

/// Logs a line of librdkafka. `facility` is its short name for the kind of event, such as `FAIL`.
pub fn librdkafka(level: RDKafkaLogLevel, facility: &str, text: &str) {
    if IGNORED.iter().any(|words| text.contains(words)) {
        return;
    }
    match level {
        RDKafkaLogLevel::Emerg
        | RDKafkaLogLevel::Alert
        | RDKafkaLogLevel::Critical
        | RDKafkaLogLevel::Error => tracing::error!(target: "librdkafka", facility, text, "librdkafka"),
        RDKafkaLogLevel::Warning => tracing::warn!(target: "librdkafka", facility, text, "librdkafka"),
        RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => {
            tracing::info!(target: "librdkafka", facility, text, "librdkafka");
        }
        RDKafkaLogLevel::Debug => tracing::debug!(target: "librdkafka", facility, text, "librdkafka"),
    }
}
