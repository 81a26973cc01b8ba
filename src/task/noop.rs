//! noop: publishes each value unchanged, to measure kandle and Kafka without a model.

use std::sync::Arc;

use super::TaskError;
use super::kinds::{Family, Kind, NO_RULES, Reads};
use crate::compute::{About, Compute, Noop};
use crate::model::Digest;
use crate::settings::{Settings, TaskKind};
use crate::telemetry::Metrics;
use crate::watch::Shows;

pub(super) const KIND: Kind = Kind {
    kind: TaskKind("noop"),
    prediction: "the input value, unchanged: no model, for benchmarks",
    fields: |_| Vec::new(),
    shows: |_| Shows::Nothing,
    keys: &[],
    pointers: &[],
    overflow: &[],
    check: NO_RULES,
    family: Family::Nothing,
    reads: Reads::Text,
    load,
};

fn load(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Arc<dyn Compute>, TaskError> {
    let files_error = |error| TaskError::Files { model: "noop".to_owned(), error };
    let about = About {
        kind: settings.task.kind,
        model: "noop".to_owned(),
        architecture: "none".to_owned(),
        digest: Digest::new(None, settings, "none").map_err(files_error)?,
        device: "none".to_owned(),
        dtype: "none".to_owned(),
        host_memory: 0,
    };
    let decoder = Kind::decoder(settings)?;
    Ok(Arc::new(Noop { about, decoder, metrics: Arc::clone(metrics) }))
}
