//! Kafka code that the stages and the commands share.

pub mod cluster;
pub mod consumer;
pub mod headers;
pub mod log;
pub mod login;
pub mod metadata;
pub mod native;
pub mod permissions;
pub mod range;
pub mod record_size;
pub mod retention;
pub mod topic_rules;
pub mod topics;
