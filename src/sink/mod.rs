//! Publishing: predictions and dead letters to Kafka, in input order, and the word to the source
//! once a window is acknowledged in full. Nothing here knows models.

mod acks;
mod member;
mod message;
mod outlet;
mod publish;
mod session;
mod transaction;

pub use publish::{Publisher, Wiring};
