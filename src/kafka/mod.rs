//! What source and sink share of Kafka.

pub mod headers;
pub mod record_size;
pub mod topic_rules;
