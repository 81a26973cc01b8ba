//! kandle: batch inference for Kafka.

pub mod cli;
pub mod clock;
pub mod cluster;
pub mod codec;
pub mod engine;
pub mod failpoint;
pub mod flow;
pub mod kafka;
pub mod lease;
pub mod model;
pub mod pipeline;
pub mod record;
pub mod schedule;
pub mod settings;
pub mod sink;
pub mod source;
pub mod task;
pub mod telemetry;
pub mod topics;
pub mod window;
