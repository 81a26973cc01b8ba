//! Tasks and their models from tests/fixtures, without Kafka.

#![allow(dead_code)] // Each test binary uses only part of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use kandle::compute::Compute;
use kandle::flow::Outcome;
use kandle::lease::Lease;
use kandle::record::{Arrival, Partition};
use kandle::settings::{self, Settings, Sources};
use kandle::task;
use kandle::telemetry::Metrics;
use kandle::window::{ClosedBy, Gatherer, Limits};
use serde::Deserialize;
use serde_json::Value;

/// Cargo sets the variable when it runs tests. scripts/gpu-check.sh does so too: it runs them where they were not built.
pub fn fixture(name: &str) -> PathBuf {
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    Path::new(&root).join("tests/fixtures").join(name)
}

/// Copies a folder's files, and those of its folders.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let to = to.join(path.file_name().expect("a name"));
        match path.is_dir() {
            true => copy(&path, &to),
            false => drop(std::fs::copy(&path, to).expect("copied")),
        }
    }
}

/// A copy of a fixture in a folder of its own.
pub fn copy_of(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    copy(&fixture(name), folder.path());
    folder
}

/// A reference library's results, in a file of a model's folder.
pub fn golden<T: for<'a> Deserialize<'a>>(model: &Path, file: &str) -> Vec<T> {
    serde_json::from_slice(&std::fs::read(model.join(file)).expect(file)).expect(file)
}

/// The settings of a task with its model; `set` is added to the usual ones.
pub fn settings(kind: &str, model: &Path, set: &[String]) -> Settings {
    let device = std::env::var("KANDLE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let mut all = vec![
        "kafka.brokers=none:1".to_owned(),
        "input.topics=in".to_owned(),
        "input.group=g".to_owned(),
        "input.field=/text".to_owned(),
        format!("task.kind={kind}"),
        format!("model.source={}", model.display()),
        format!("model.device={device}"),
        "model.dtype=f32".to_owned(),
        "output.topic=out".to_owned(),
        "dead_letters.topic=dead".to_owned(),
    ];
    all.extend(set.iter().cloned());
    let sources = Sources { set: all, ..Sources::default() };
    settings::load(&sources).unwrap_or_else(|faults| panic!("{faults:?}")).settings
}

/// Loads a task with its model; `set` is added to the usual settings.
pub fn load(kind: &str, model: &Path, set: &[String]) -> Result<Arc<dyn Compute>, String> {
    task::load(&settings(kind, model, set), &Arc::new(Metrics::new())).map_err(|e| e.to_string())
}

/// The outcome of each record, all in one window: its prediction, or the fault and its message.
pub fn predict(compute: &dyn Compute, records: &[Value]) -> Vec<Result<Value, (String, String)>> {
    let mut gatherer = Gatherer::new(Limits::NONE);
    let (partition, lease, now) = (Partition::new("in", 0), Lease::new(0), Instant::now());
    for (offset, record) in (0..).zip(records) {
        let value = record.to_string();
        let arrival = Arrival { offset, value: Some(value.as_bytes()), ..Arrival::default() };
        gatherer.push(&partition, &lease, arrival, now);
    }
    let encoded = compute.answer(gatherer.close(ClosedBy::End).expect("records")).expect("answers");
    let outcome = |outcome: &Outcome| match outcome {
        Outcome::Prediction { part, bytes } => {
            Ok(serde_json::from_slice(encoded.prediction(*part, bytes)).expect("JSON"))
        }
        Outcome::Dead(error) => Err((format!("{:?}", error.fault), error.message.clone())),
        other => panic!("{other:?}"),
    };
    encoded.outcomes.iter().map(outcome).collect()
}
