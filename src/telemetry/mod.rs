//! Observability: metrics, health, logs, traces, and the admin server.

pub mod health;
pub mod logging;
pub mod metrics;
mod openmetrics;
pub mod server;
pub mod traces;

pub use health::Health;
pub use metrics::{Metrics, TABLE};
