//! What kandle shows of itself: metrics, health, logs, and the admin server that serves them.

pub mod health;
pub mod logging;
pub mod metrics;
mod openmetrics;
pub mod server;
pub mod traces;

pub use health::Health;
pub use metrics::{Metrics, TABLE};
