//! kandle: batch inference for Kafka.

pub mod codec;
pub mod model;
pub mod record;
pub mod settings;
pub mod window;
pub mod engine;
pub mod task;
pub mod telemetry;
pub mod cluster;
pub mod flow;
pub mod pipeline;
pub mod sink;
pub mod source;
pub mod cli;
