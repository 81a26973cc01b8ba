//! librdkafka's own log lines, as events of ours.

use rdkafka::config::RDKafkaLogLevel;

/// What librdkafka says of a setting that kandle chose itself: users cannot change it, and a batch that is refused is
/// recovered from (`sink::recovery`, which says so).
const OWN_CHOICES: [&str; 2] =
    ["enable.gapless.guarantee is experimental", "Gap-less ordering would not be guaranteed"];

/// Logs a line of librdkafka. `facility` is its short name for the kind of event, such as `FAIL`.
pub fn librdkafka(level: RDKafkaLogLevel, facility: &str, text: &str) {
    if OWN_CHOICES.iter().any(|words| text.contains(words)) {
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
