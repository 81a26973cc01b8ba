//! Forecasts against those of the chronos package (tests/fixtures/forecast.py), and settings that do not fit a model.

use crate::support::models::{fixture, load, predict};

use serde_json::{Value, json};

/// How far a value may be off, in units of the spread of the series' predictions.
const TOLERANCE: f64 = 1e-4;

fn numbers(values: &Value) -> Vec<f64> {
    let values = values.as_array().unwrap_or_else(|| panic!("{values} is no array"));
    values.iter().map(|value| value.as_f64().expect("a number")).collect()
}

/// The predictions of a row of a golden file: the mean, and each quantile by its level.
fn rows(of: &Value) -> Vec<(String, Vec<f64>)> {
    let quantiles = of["quantiles"].as_object().expect("quantiles");
    let quantiles = quantiles.iter().map(|(level, values)| (level.clone(), numbers(values)));
    std::iter::once(("mean".to_owned(), numbers(&of["mean"]))).chain(quantiles).collect()
}

/// The largest error of a prediction, in units of the spread of what is expected; rounding to f32 does not count.
fn error(found: &Value, expected: &Value, place: &str) -> f64 {
    let (found, expected) = (rows(found), rows(expected));
    let all = || expected.iter().flat_map(|(_, values)| values).copied();
    let spread = all().fold(f64::NEG_INFINITY, f64::max) - all().fold(f64::INFINITY, f64::min);
    let mut worst = 0.0f64;
    assert_eq!(found.len(), expected.len(), "{place}");
    for ((name, found), (expected_name, expected)) in found.iter().zip(&expected) {
        assert_eq!((name, found.len()), (expected_name, expected.len()), "{place}");
        for (a, b) in found.iter().zip(expected) {
            let rounding = 4.0 * f64::from(f32::EPSILON) * b.abs();
            worst = worst.max(((a - b).abs() - rounding).max(0.0) / spread);
        }
    }
    worst
}

fn golden(model: &str) -> Vec<Value> {
    let file = fixture(model).join("golden.json");
    let golden = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    serde_json::from_str(&golden).expect("JSON")
}

fn settings(asked: &Value) -> Vec<String> {
    let mut set = vec!["input.field=/series".to_owned(), format!("task.horizon={}", asked["horizon"])];
    if asked["quantiles"] != json!([]) {
        set.push(format!("task.quantiles={}", asked["quantiles"]));
    }
    set
}

/// The predictions of a golden file's rows, all in one window, so that series of all lengths share batches.
fn predictions(model: &str, asked: &Value, more: &[&str]) -> Vec<Value> {
    let mut set = settings(asked);
    set.extend(more.iter().map(|set| (*set).to_owned()));
    let compute = load("forecast", &fixture(model), &set).unwrap_or_else(|e| panic!("{model}: {e}"));
    let records: Vec<Value> = asked["rows"].as_array().expect("rows").clone();
    predict(&*compute, &records).into_iter().map(|found| found.unwrap_or_else(|e| panic!("{e:?}"))).collect()
}

const MODELS: [&str; 2] = ["chronos-bolt", "chronos-bolt-gated"];

#[test]
fn forecasts_are_those_of_the_chronos_package() {
    for model in MODELS {
        for asked in golden(model) {
            for (found, row) in
                predictions(model, &asked, &[]).iter().zip(asked["rows"].as_array().expect("rows"))
            {
                let place = format!("{model}, {} points, {}", asked["horizon"], row["what"]);
                let error = error(found, row, &place);
                assert!(error <= TOLERANCE, "{place}: {error} off: {found} is not {row}");
            }
        }
    }
}

/// Lower precisions: of the layers' weights.
#[test]
fn lower_precisions_stay_close() {
    if std::env::var("KANDLE_TEST_DEVICE").is_ok_and(|device| device != "cpu") {
        return;
    }
    for model in MODELS {
        for (dtype, most) in [("bf16", 0.06), ("int8", 0.12)] {
            // Of one pass: what a second one reads depends on the first.
            let asked = &golden(model)[0];
            let set = format!("model.dtype={dtype}");
            let rows = asked["rows"].as_array().expect("rows");
            let mut errors = Vec::new();
            for (found, row) in predictions(model, asked, &[&set]).iter().zip(rows) {
                errors.push(error(found, row, &format!("{model}, {dtype}, {}", row["what"])));
            }
            let mean = errors.iter().sum::<f64>() / errors.len() as f64;
            assert!(mean > TOLERANCE / 100.0 && mean < most, "{model}, {dtype}: {mean}, {errors:?}");
        }
    }
}

/// Objects with timestamps are the same series, and so is one in a batch of its own.
#[test]
fn forms_of_a_series_and_neighbours_change_nothing() {
    let set = ["input.field=".to_owned()];
    let compute = load("forecast", &fixture("chronos-bolt"), &set).expect("a model");
    let points = [1.5, 2.0, -3.25, 4.0, 8.5, 1.0, 2.0];
    let plain = json!(points);
    let at = |i: usize| format!("2026-01-{:02}T00:00:00Z", i + 1);
    let objects: Value =
        points.iter().enumerate().map(|(i, x)| json!({ "timestamp": at(i), "value": x })).collect();
    let long: Value = (0..500).map(|i| f64::from(i % 9)).collect();
    let alone = predict(&*compute, std::slice::from_ref(&plain)).remove(0).expect("a prediction");
    let together = predict(&*compute, &[long, plain, objects]);
    for found in &together[1..] {
        let error = error(found.as_ref().expect("a prediction"), &alone, "together");
        assert!(error < 1e-5, "{error}");
    }
}

#[test]
fn series_without_points_are_dead_letters_with_the_reason() {
    let compute =
        load("forecast", &fixture("chronos-bolt"), &["input.field=/s".to_owned()]).expect("a model");
    let missing_where_the_model_reads = [vec![json!(1.0)], vec![Value::Null; 96]].concat();
    for (record, fault, message) in [
        (json!({ "s": [] }), "Field", "\"/s\": the series is empty"),
        (
            json!({ "s": [null, null] }),
            "Prepare",
            "\"/s\": all of the newest 2 points, which are those that the model reads, are missing",
        ),
        (
            json!({ "s": missing_where_the_model_reads }),
            "Prepare",
            "\"/s\": all of the newest 96 points, which are those that the model reads, are missing",
        ),
        (json!({}), "Field", "\"/s\" is missing"),
        (json!({ "s": null }), "Field", "\"/s\" is null, not an array"),
    ] {
        let found = predict(&*compute, &[record]).remove(0);
        assert_eq!(found, Err((fault.to_owned(), message.to_owned())));
    }
}

#[test]
fn settings_that_do_not_fit_the_model_are_refused() {
    let refused = |set: &str| {
        let set = ["input.field=/s".to_owned(), set.to_owned()];
        load("forecast", &fixture("chronos-bolt"), &set)
            .err()
            .unwrap_or_else(|| panic!("{set:?} is accepted"))
    };
    assert_eq!(
        refused("task.quantiles=[0.01,0.5]"),
        "task.quantiles: 0.01 is outside of the quantiles that the model was trained for: 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, \
         0.7, 0.8, 0.9"
    );
    let set = ["input.field=/s".to_owned()];
    let other = load("forecast", &fixture("bert"), &set).err().expect("an error");
    assert!(other.contains("it is no Chronos-Bolt model"), "{other}");
}
