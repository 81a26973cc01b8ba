//! The fixtures' models against ONNX Runtime (tests/fixtures/onnx_models.py), and settings that do not fit a model.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::compute::Compute;
use crate::flow::Outcome;
use crate::lease::Lease;
use crate::record::{Arrival, Partition};
use crate::settings::{self, Settings, Sources};
use crate::telemetry::Metrics;
use crate::window::{ClosedBy, Gatherer, Limits};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Settings for the model with these keys of `task`.
fn settings(model: &Path, task: &Value) -> Result<Settings, Vec<String>> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("kandle.json");
    let mut task = task.clone();
    task["kind"] = "tensor".into();
    let all = json!({
        "kafka": { "brokers": "none:1" },
        "input": { "topics": ["in"], "group": "g" },
        "task": task,
        "model": { "source": model },
        "output": { "topic": "out", "include": ["/include"] },
        "dead_letters": { "topic": "dead" },
    });
    std::fs::write(&file, all.to_string()).unwrap();
    let loaded = settings::load(&Sources { files: vec![file], ..Sources::default() });
    loaded.map(|loaded| loaded.settings).map_err(|problems| {
        problems.into_iter().map(|problem| format!("{}: {}", problem.key, problem.message)).collect()
    })
}

fn load(model: &Path, task: &Value) -> Result<Arc<dyn Compute>, String> {
    let settings = settings(model, task).map_err(|problems| problems.join("; "))?;
    crate::task::load(&settings, &Arc::new(Metrics::new())).map_err(|error| error.to_string())
}

/// The predictions of records in one window, or the errors of dead letters.
fn predict(compute: &dyn Compute, records: &[String]) -> Vec<Result<Value, String>> {
    let mut gatherer = Gatherer::new(Limits::NONE);
    for (offset, value) in records.iter().enumerate() {
        let arrival = Arrival { offset: offset as i64, value: Some(value.as_bytes()), ..Arrival::default() };
        gatherer.push(&Partition::new("in", 0), &Lease::new(0), arrival, Instant::now());
    }
    let encoded = compute.answer(gatherer.close(ClosedBy::End).unwrap()).unwrap();
    let outcome = |outcome: &Outcome| match outcome {
        Outcome::Prediction { part, bytes } => {
            Ok(serde_json::from_slice(encoded.prediction(*part, bytes)).unwrap())
        }
        Outcome::Dead(error) => Err(error.message.clone()),
        other => panic!("{other:?}"),
    };
    encoded.outcomes.iter().map(outcome).collect()
}

fn one(compute: &dyn Compute, record: &Value) -> Result<Value, String> {
    predict(compute, &[record.to_string()]).remove(0)
}

/// Numbers may differ by rounding: 1e-5 of the larger one, or of 1.
fn assert_close(found: &Value, expected: &Value, place: &str) {
    assert_within(found, expected, 1e-5, place);
}

fn assert_within(found: &Value, expected: &Value, tolerance: f64, place: &str) {
    match (found, expected) {
        (Value::Number(a), Value::Number(b)) if b.is_f64() => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() <= tolerance * a.abs().max(b.abs()).max(1.0), "{place}: {a} is not {b}");
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{place}: {found} is not {expected}");
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                assert_within(a, b, tolerance, &format!("{place}/{i}"));
            }
        }
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.len(), b.len(), "{place}: {found} is not {expected}");
            for (key, b) in b {
                assert_within(a.get(key).unwrap_or(&Value::Null), b, tolerance, &format!("{place}/{key}"));
            }
        }
        _ => assert_eq!(found, expected, "{place}"),
    }
}

/// Compares a folder's model with its `golden.json`: all records in one window, so that they share batches.
fn check(folder: &Path) -> Result<(), String> {
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
    let compute = load(folder, &golden["task"])?;
    let rows = golden["rows"].as_array().unwrap();
    if let Some(reason) = golden["reason"].as_str() {
        return Err(format!("its values cannot be in JSON: {reason}"));
    }
    let records: Vec<String> = rows.iter().map(|row| row["record"].to_string()).collect();
    for (i, (found, row)) in predict(&*compute, &records).into_iter().zip(rows).enumerate() {
        let found = found.map_err(|message| format!("record {i}: {message}"))?;
        let tolerance = golden["tolerance"].as_f64().unwrap_or(1e-5);
        let place = format!("{}, record {i}: ", folder.display());
        assert_within(&found["outputs"], &row["outputs"], tolerance, &place);
    }
    Ok(())
}

#[test]
fn outputs_are_those_of_onnx_runtime() {
    let folders = std::fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap().path());
    let is_onnx = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("onnx-");
    let mut folders: Vec<PathBuf> = folders.filter(is_onnx).collect();
    folders.sort();
    assert!(folders.len() >= 14, "{folders:?}");
    let failed: Vec<String> = folders
        .iter()
        .filter_map(|folder| check(folder).err().map(|error| format!("{}: {error}", folder.display())))
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// `KANDLE_ONNX_MODELS`: folders with model.onnx and golden.json that are too large for the repository, or too many.
#[test]
#[ignore = "compares models that KANDLE_ONNX_MODELS names"]
#[allow(clippy::print_stdout, reason = "benches/onnx-backend.sh reads it")]
fn outputs_of_other_models() {
    let folder = std::env::var_os("KANDLE_ONNX_MODELS").expect("KANDLE_ONNX_MODELS is set");
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    let mut passed = 0;
    for folder in &folders {
        let result = std::panic::catch_unwind(|| check(folder)).unwrap_or_else(|panic| {
            let message = panic.downcast_ref::<String>().cloned();
            Err(format!("differs: {}", message.unwrap_or_default()))
        });
        match result {
            Ok(()) => passed += 1,
            Err(error) => println!("FAILED {}: {error}", folder.file_name().unwrap().display()),
        }
    }
    println!("PASSED {passed} of {}", folders.len());
}

#[test]
fn a_classifier_has_labels_and_scores() {
    let task = json!({ "inputs": { "input": (0..8).map(|i| format!("/c{i}")).collect::<Vec<_>>() },
                       "as": "classification", "labels": ["stays", "leaves"] });
    let compute = load(&fixture("onnx-xgboost"), &task).unwrap();
    let golden: Value =
        serde_json::from_str(include_str!("../../../tests/fixtures/onnx-xgboost/golden.json")).unwrap();
    for row in golden["rows"].as_array().unwrap() {
        let mut record = row["record"].clone();
        record["include"] = json!("x");
        let found = one(&*compute, &record).unwrap();
        let scores = &row["outputs"]["probabilities"];
        assert_close(&found["scores"]["stays"], &scores[0], "stays");
        assert_close(&found["scores"]["leaves"], &scores[1], "leaves");
        assert_eq!(found["label"], ["stays", "leaves"][row["outputs"]["label"].as_u64().unwrap() as usize]);
        assert_eq!(found["include"], "x");
    }
}

#[test]
fn the_labels_are_those_of_the_model() {
    let inputs = json!({ "monthly_fee": "/who/fee", "age": "/who/age", "plan": "/who/plan", "region": "/who/region",
                         "visits": "/who/visits" });
    let compute =
        load(&fixture("onnx-forest/model.onnx"), &json!({ "inputs": inputs, "as": "classification" }))
            .unwrap();
    let record =
        json!({ "who": { "fee": 30, "age": 40.5, "plan": "größer", "region": "north", "visits": 3 } });
    let found = one(&*compute, &record).unwrap();
    let names: Vec<&String> = found["scores"].as_object().unwrap().keys().collect();
    assert!(names.contains(&&"yes".to_owned()) && names.contains(&&"no".to_owned()), "{found}");
}

#[test]
fn missing_values_take_their_defaults() {
    let columns: Vec<String> = (0..8).map(|i| format!("/c{i}")).collect();
    let of = |defaults: Value| {
        load(&fixture("onnx-xgboost"), &json!({ "inputs": { "input": columns }, "defaults": defaults }))
            .unwrap()
    };
    let full = json!({ "c0": 1, "c1": 0.5, "c2": -1, "c3": 0, "c4": 2, "c5": 0, "c6": 1, "c7": 0.5 });
    let without = |value: Option<Value>| {
        let mut record = full.clone();
        match value {
            Some(value) => record["c0"] = value,
            None => drop(record.as_object_mut().unwrap().remove("c0")),
        }
        record
    };
    let expected = one(&*of(json!({})), &full);
    assert_eq!(one(&*of(json!({ "/c0": 1 })), &without(None)), expected);
    assert_eq!(one(&*of(json!({ "input": 1 })), &without(Some(Value::Null))), expected);
    // Without a default, null is NaN, and a missing member is an error.
    assert!(one(&*of(json!({})), &without(Some(Value::Null))).is_ok());
    assert_eq!(one(&*of(json!({})), &without(None)), Err("\"/c0\" is missing".to_owned()));
}

#[test]
fn records_that_do_not_fit_say_what_and_where_and_neighbours_are_unharmed() {
    let columns: Vec<String> = (0..8).map(|i| format!("/c{i}")).collect();
    let compute = load(&fixture("onnx-xgboost"), &json!({ "inputs": { "input": columns } })).unwrap();
    let record = |c0: &str| format!(r#"{{"c0":{c0},"c1":1,"c2":1,"c3":1,"c4":1,"c5":1,"c6":1,"c7":1}}"#);
    let many = format!("[{}]", vec!["1"; 1_000_000].join(","));
    let records: Vec<String> = ["1", "NaN", "\"1\"", "[1,2]", "1e400", &many, "1"].map(record).into();
    let found = predict(&*compute, &records);
    let error = |i: usize| found[i].clone().unwrap_err();
    assert!(error(1).contains("not JSON"), "{}", error(1));
    assert_eq!(error(2), "\"/c0\" is a string, and the model takes float");
    assert_eq!(error(3), "\"/c0\" and the other columns have 9 values; input input: float[?, 8] takes 8");
    assert_eq!(error(4), "\"/c0\" is 1e400, which float cannot hold");
    assert_eq!(error(5), "\"/c0/8\" is one more than the 8 elements that the model takes");
    assert_eq!(found[0], found[6]);
    assert!(found[0].is_ok());
}

#[test]
fn settings_are_checked_against_the_graph() {
    let error = |model: &str, task: Value| load(&fixture(model), &task).err().expect("an error");
    let columns = |count: usize| (0..count).map(|i| format!("/c{i}")).collect::<Vec<_>>();
    for (model, task, message) in [
        (
            "onnx-network",
            json!({ "inputs": { "y": "/y" } }),
            "task.inputs: the model has no input y; it has x: float[batch, 6]",
        ),
        (
            "onnx-network",
            json!({ "inputs": { "x": columns(7) } }),
            "takes 6 values of a record, and 7 pointers are listed",
        ),
        (
            "onnx-network",
            json!({ "inputs": { "x": [1, 2] } }),
            "the value is of the shape [2], and the model's input is x: float[batch, 6]",
        ),
        (
            "onnx-network",
            json!({ "outputs": ["z"] }),
            "task.outputs: the model has no output z; it has logits",
        ),
        (
            "onnx-network",
            json!({ "as": "classification" }),
            "task.labels: the model does not name its classes: set the labels of 3 classes",
        ),
        (
            "onnx-network",
            json!({ "as": "classification", "labels": ["a", "b"] }),
            "there are 2 labels, and logits has 3 scores",
        ),
        (
            "onnx-network",
            json!({ "defaults": { "/z": 1 } }),
            "task.defaults: /z is neither an input of the model nor a pointer",
        ),
        (
            "onnx-network",
            json!({ "defaults": { "x": "a" } }),
            "task.defaults: x is a string, and the model takes float",
        ),
        ("onnx-network", json!({ "inputs": { "x": "x" } }), "\"x\" is not a JSON Pointer"),
        ("onnx-network", json!({ "top_k": 1 }), "task.top_k: has no effect without as: classification"),
        (
            "onnx-convolution",
            json!({ "as": "classification", "labels": ["a"] }),
            "task.outputs: set the one that has the classes' scores: mean, place, loud",
        ),
        ("bert", json!({}), "there is no ONNX file"),
    ] {
        let found = error(model, task);
        assert!(found.contains(message), "{found}");
    }
}

#[test]
fn a_batch_of_rows_in_one_record_has_rows_of_outputs() {
    let compute = load(&fixture("onnx-network"), &json!({})).unwrap();
    let rows = [[1.0, 0.0, -1.0, 0.5, 2.0, 0.0], [0.0, 1.0, 1.0, 0.0, -2.0, 0.5]];
    let both = one(&*compute, &json!({ "x": rows })).unwrap();
    for (i, row) in rows.iter().enumerate() {
        let alone = one(&*compute, &json!({ "x": row })).unwrap();
        assert_close(&both["outputs"]["logits"][i], &alone["outputs"]["logits"], "logits");
    }
}
