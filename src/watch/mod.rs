//! What predictions look like: counted as they are published, compared with a reference, and sampled.
//!
//! ```text
//! encode: prediction ─▶ [`Observer`] ─▶ [`Tally`] of the window ┐
//!                                   └▶ samples, as JSON         ┴▶ publish ─▶ [`Watch`] ─▶ metrics, [`Drift`]
//! ```
//!
//! A prediction is read as the JSON that the task writes, so that the daemon and `kandle reference`, which reads what was
//! published, count the same. Which parts a task's predictions have is in the table of tasks ([`Shows`]). Nothing here
//! knows Kafka.

mod distribution;
mod drift;
mod live;
mod observer;
mod reference;
mod samples;
mod shows;
mod tally;

pub use distribution::{Distribution, js_distance, psi};
pub use drift::{Drift, Measured};
pub use live::Watch;
pub use observer::Observer;
pub use reference::{Reference, ReferenceError};
pub use samples::{Sampler, problems};
pub use shows::Shows;
pub use tally::Tally;

/// Distributions that a reference has, by name: the label `of` of `kandle_drift`.
pub const LABEL: &str = "label";
pub const SCORE: &str = "score";
pub const ENTROPY: &str = "entropy";
pub const ENTITIES: &str = "entities";
