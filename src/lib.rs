//! kandle: batch inference for Kafka.

// Standard output may be a closed pipe: print with cli::output.
#![deny(clippy::print_stdout)]

pub mod agreement;
pub mod backoff;
pub mod cli;
pub mod clock;
pub mod codec;
pub mod compute;
pub mod engine;
pub mod estimate;
pub mod failpoint;
pub mod flow;
pub mod guard;
mod hex;
mod host_memory;
pub mod kafka;
pub mod lease;
pub mod model;
pub mod pem;
pub mod pipeline;
pub mod ragged;
pub mod record;
mod refresh;
pub mod registry;
pub mod schedule;
pub mod settings;
pub mod shadow;
pub mod share;
pub mod sink;
pub mod source;
pub mod task;
pub mod telemetry;
pub mod watch;
pub mod window;
