//! sparse-embedding against sentence-transformers' SparseEncoder (tests/fixtures/make.py), within 1e-4.

use crate::support::models;

use std::collections::BTreeMap;
use std::path::Path;

use kandle::compute::Compute;
use serde::Deserialize;
use serde_json::{Value, json};

use models::{copy_of, fixture, golden, load};

/// Each with another head, pooling or activation.
const MODELS: [&str; 8] = [
    "sparse-bert",
    "sparse-distilbert",
    "sparse-roberta",
    "sparse-mpnet",
    "sparse-electra",
    "sparse-albert",
    "sparse-modernbert",
    "sparse-m3",
];

#[derive(Deserialize)]
struct Row {
    text: String,
    prompt: Option<String>,
    #[serde(default)]
    stride: usize,
    indices: Vec<u32>,
    values: Vec<f64>,
}

type Vector = BTreeMap<u32, f64>;

impl Row {
    fn vector(&self) -> Vector {
        self.indices.iter().copied().zip(self.values.iter().copied()).collect()
    }
}

fn predict(compute: &dyn Compute, texts: &[&str]) -> Vec<Value> {
    let records: Vec<Value> = texts.iter().map(|text| json!({ "text": text })).collect();
    models::predict(compute, &records).into_iter().map(|outcome| outcome.expect("a prediction")).collect()
}

/// The vector of a prediction; asserts that its indices increase and that its values are positive.
#[track_caller]
fn vector(prediction: &Value) -> Vector {
    let indices: Vec<u32> = serde_json::from_value(prediction["indices"].clone()).expect("indices");
    let values: Vec<f64> = serde_json::from_value(prediction["values"].clone()).expect("values");
    assert!(indices.is_sorted_by(|a, b| a < b), "{indices:?}");
    assert!(values.iter().all(|&x| x > 0.0), "{values:?}");
    assert_eq!(indices.len(), values.len());
    indices.into_iter().zip(values).collect()
}

/// A missing value is 0.
#[track_caller]
fn close(got: &Vector, want: &Vector, within: f64, what: &str) {
    for id in got.keys().chain(want.keys()) {
        let of = |vector: &Vector| vector.get(id).copied().unwrap_or(0.0);
        assert!((of(got) - of(want)).abs() <= within, "{what}, {id}: {} is not {}", of(got), of(want));
    }
}

fn task(model: &Path, set: &[&str]) -> Result<std::sync::Arc<dyn Compute>, String> {
    let set: Vec<String> = set.iter().map(|&set| set.to_owned()).collect();
    load("sparse-embedding", model, &set)
}

#[test]
fn vectors_equal_those_of_sentence_transformers() {
    for name in MODELS {
        let golden: Vec<Row> = golden(&fixture(name), "golden.json");
        for rows in golden.chunk_by(|a, b| a.prompt == b.prompt) {
            let prompt = rows[0].prompt.as_ref().map(|name| format!("task.prompt_name={name}"));
            let set: Vec<&str> = prompt.iter().map(String::as_str).collect();
            let compute = task(&fixture(name), &set).expect("a task");
            let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
            let together = predict(&*compute, &texts);
            for (row, together) in rows.iter().zip(&together) {
                let what = format!("{name}, {set:?}: {:?}", row.text);
                close(&vector(together), &row.vector(), 1e-4, &what);
                let alone = predict(&*compute, &[&row.text]).remove(0);
                close(&vector(together), &vector(&alone), 1e-5, &what);
            }
        }
    }
}

#[test]
fn vectors_of_long_texts_have_the_largest_values_of_their_chunks() {
    for name in ["sparse-bert", "sparse-roberta", "sparse-albert", "sparse-modernbert"] {
        let golden: Vec<Row> = golden(&fixture(name), "chunked.json");
        let stride = format!("task.stride={}", golden[0].stride);
        let compute = task(&fixture(name), &["task.overflow=chunk", &stride]).expect("a task");
        let texts: Vec<&str> = golden.iter().map(|row| row.text.as_str()).collect();
        for (got, row) in predict(&*compute, &texts).iter().zip(&golden) {
            close(&vector(got), &row.vector(), 1e-4, &format!("{name}: {:?}", row.text));
        }
    }
}

#[test]
fn the_largest_values_are_kept_with_their_tokens() {
    let folder = fixture("sparse-bert");
    let texts = ["late parcel", "invoice error, please refund!"];
    let all = predict(&*task(&folder, &[]).expect("a task"), &texts);
    let set = ["task.top_k=3", "task.tokens=true"];
    let few = predict(&*task(&folder, &set).expect("a task"), &texts);
    let tokenizer: Value =
        serde_json::from_slice(&std::fs::read(folder.join("tokenizer.json")).expect("a file")).expect("JSON");
    for (few, all) in few.iter().zip(&all) {
        assert!(all.get("tokens").is_none());
        let (few_values, all) = (vector(few), vector(all));
        let mut values: Vec<f64> = all.values().copied().collect();
        values.sort_by(|a, b| b.total_cmp(a));
        assert_eq!(few_values.len(), 3);
        assert!(few_values.iter().all(|(id, value)| all[id] == *value && *value >= values[2]), "{few}");
        for (id, token) in few_values.keys().zip(few["tokens"].as_array().expect("tokens")) {
            assert_eq!(tokenizer["model"]["vocab"][token.as_str().expect("text")], *id);
        }
    }
    // The checkpoint keeps 20 values unless the setting says otherwise.
    let electra = fixture("sparse-electra");
    let count = |set: &[&str]| vector(&predict(&*task(&electra, set).expect("a task"), &texts)[0]).len();
    assert_eq!((count(&[]), count(&["task.top_k=30"])), (20, 30));
}

/// In a width of 16, rounding errors hardly average out: a real model loses far less (benches/RESULTS.md).
#[test]
fn lower_precisions_stay_close_to_f32() {
    // A GPU has no int8, a CPU no f16.
    let other = match std::env::var("KANDLE_TEST_DEVICE").is_ok_and(|device| device != "cpu") {
        true => ("f16", 0.999),
        false => ("int8", 0.98),
    };
    for name in ["sparse-bert", "sparse-modernbert", "sparse-m3"] {
        let mut golden: Vec<Row> = golden(&fixture(name), "golden.json");
        golden.retain(|row| row.prompt.is_none());
        let texts: Vec<&str> = golden.iter().map(|row| row.text.as_str()).collect();
        for (dtype, least) in [other, ("bf16", 0.999)] {
            let set = format!("model.dtype={dtype}");
            let compute = task(&fixture(name), &[&set]).expect("a task");
            let cosine = |(got, row): (&Value, &Row)| {
                let (a, b) = (vector(got), row.vector());
                let dot = |a: &Vector, b: &Vector| {
                    a.iter().map(|(id, x)| x * b.get(id).copied().unwrap_or(0.0)).sum::<f64>()
                };
                let lengths = (dot(&a, &a) * dot(&b, &b)).sqrt();
                if lengths == 0.0 { 1.0 } else { dot(&a, &b) / lengths }
            };
            let cosines: Vec<f64> = predict(&*compute, &texts).iter().zip(&golden).map(cosine).collect();
            let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
            assert!(mean >= least, "{name}, {dtype}: {mean} of {cosines:?}");
        }
    }
}

#[test]
fn a_model_without_a_sparse_head_is_refused() {
    let refusal = |model: &Path, set: &[&str]| task(model, set).err().expect("an error");
    let contains = |error: String, parts: &[&str]| {
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    };
    contains(
        refusal(&fixture("bert"), &[]),
        &[
            "no head for masked language modelling",
            "cls.predictions.transform.dense.weight",
            "sparse_linear.pt",
        ],
    );
    contains(
        refusal(&fixture("qwen3"), &[]),
        &["model_type \"qwen3\"", "docs/models.md lists the architectures"],
    );
    contains(refusal(&fixture("embed-qwen3"), &[]), &["transformer_task", "fill-mask"]);
    contains(
        refusal(&fixture("sparse-distilbert"), &["task.overflow=chunk"]),
        &["task.overflow", "pooling_strategy max"],
    );
    let folder = copy_of("sparse-albert");
    let write = |file: &str, value: Value| {
        std::fs::write(folder.path().join(file), value.to_string()).expect("written");
    };
    let module =
        |path: &str, kind: &str| json!({ "path": path, "type": format!("sentence_transformers.{kind}") });
    write("1_SpladePooling/config.json", json!({ "pooling_strategy": "max", "k": 7 }));
    contains(refusal(folder.path(), &[]), &["1_SpladePooling/config.json", "does not know k"]);
    write("modules.json", json!([module("", "Transformer"), module("1", "SparseAutoEncoder")]));
    contains(refusal(folder.path(), &[]), &["modules.json", "SparseAutoEncoder", "SpladePooling"]);
    write("modules.json", json!([module("", "Transformer")]));
    contains(refusal(folder.path(), &[]), &["modules.json", "without SpladePooling"]);
    let folder = copy_of("sparse-m3");
    std::fs::copy(fixture("pickles/legacy.bin"), folder.path().join("sparse_linear.pt")).expect("copied");
    contains(refusal(folder.path(), &[]), &["sparse_linear.pt"]);
}

/// The model of an older version of sentence-transformers has another name.
#[test]
fn the_older_name_of_the_model_is_known() {
    let folder = copy_of("sparse-albert");
    let name = |kind: &str| format!("sentence_transformers.sparse_encoder.models.{kind}.{kind}");
    let modules = json!([
        { "idx": 0, "name": "0", "path": "", "type": name("MLMTransformer") },
        { "idx": 1, "name": "1", "path": "1_SpladePooling", "type": name("SpladePooling") },
    ]);
    std::fs::write(folder.path().join("modules.json"), modules.to_string()).expect("written");
    let of = |model: &Path| predict(&*task(model, &[]).expect("a task"), &["late parcel"]);
    assert_eq!(of(folder.path()), of(&fixture("sparse-albert")));
}
