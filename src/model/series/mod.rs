//! Models of time series: Chronos-Bolt (arXiv:2403.07815, "Chronos-Bolt" in the package chronos-forecasting).
//!
//! ```text
//! series ─▶ standardize, cut into patches ─▶ encoder ─▶ decoder, one step ─▶ quantiles of the next points
//!           patches.rs                       encoder.rs decoder.rs           model.rs: longer horizons by further passes
//! ```

mod config;
mod decoder;
mod encoder;
mod model;
mod patches;
mod quantiles;
mod residual;

pub use config::SeriesConfig;
pub use model::{Series, SeriesError, SeriesModel};
pub use quantiles::interpolate;
