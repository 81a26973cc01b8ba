//! Models of tasks in 16 bits on a GPU against those of a CPU in f32. The fixtures are 16 wide, so that rounding errors
//! hardly average out. Classifiers' architectures and sparse models have such tests in golden.rs and sparse.rs.

#[path = "../support/models.rs"]
mod models;

use kandle::engine::Model;
use kandle::model::{Candidate, Files, Gliner, Placement};
use kandle::settings::{self, DeviceChoice, Dtype};
use models::{fixture, load, predict};
use serde_json::{Value, json};

const TEXTS: [&str; 4] = [
    "late parcel",
    "the invoice is wrong, please refund account x1",
    "where",
    "my parcel is late and the account has an error",
];

fn device() -> String {
    std::env::var("KANDLE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned())
}

/// The types of elements to test, which on a CPU do not include f16.
fn types() -> impl Iterator<Item = (&'static str, f64)> {
    [("f32", 1e-4), ("f16", 0.02), ("bf16", 0.08)]
        .into_iter()
        .filter(|(dtype, _)| device() != "cpu" || *dtype != "f16")
}

/// The predictions on a CPU in f32, and then those on the device in each type with the allowed error.
fn each(
    kind: &str,
    name: &str,
    set: &[&str],
    records: &[Value],
    check: impl Fn(&[Value], &[Value], f64, &str),
) {
    let run = |device: &str, dtype: &str| -> Vec<Value> {
        let own = [format!("model.device={device}"), format!("model.dtype={dtype}")];
        let set: Vec<String> = set.iter().map(|&set| set.to_owned()).chain(own).collect();
        let compute = load(kind, &fixture(name), &set).expect("a task");
        predict(&*compute, records).into_iter().map(|outcome| outcome.expect("a prediction")).collect()
    };
    let want = run("cpu", "f32");
    for (dtype, within) in types() {
        check(&run(&device(), dtype), &want, within, &format!("{name} in {dtype}"));
    }
}

#[test]
fn embeddings() {
    let records: Vec<Value> = TEXTS.iter().map(|text| json!({ "text": text })).collect();
    for name in ["embed-qwen3", "embed-gemma3", "gemma3_text-causal"] {
        each("text-embedding", name, &[], &records, |got, want, within, what| {
            for (got, want) in got.iter().zip(want) {
                let floats =
                    |of: &Value| serde_json::from_value::<Vec<f64>>(of["embedding"].clone()).expect("floats");
                let (a, b) = (floats(got), floats(want));
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let cosine = dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt();
                assert!(cosine >= 1.0 - within, "{what}: {cosine}");
            }
        });
    }
}

#[test]
fn scores_of_documents_and_labels() {
    let records = [json!({ "text": TEXTS[0], "d": TEXTS })];
    let rerankers = [
        "pairs-bert",
        "pairs-roberta",
        "pairs-deberta",
        "pairs-qwen3",
        "rerank-qwen3",
        "rerank-qwen3-logit-score",
    ];
    for name in rerankers {
        each("reranking", name, &["task.documents=/d"], &records, |got, want, within, what| {
            let scores = |of: &Value| {
                let results = of["results"].as_array().expect("results").iter();
                let score = |of: &Value| {
                    (of["index"].as_u64().expect("an index"), of["score"].as_f64().expect("a score"))
                };
                let mut scores: Vec<_> = results.map(score).collect();
                scores.sort_by_key(|(index, _)| *index);
                scores
            };
            for (got, want) in scores(&got[0]).into_iter().zip(scores(&want[0])) {
                assert!((got.1 - want.1).abs() <= within, "{what}: {got:?} is not {want:?}");
            }
        });
    }
    let records: Vec<Value> = TEXTS.iter().map(|text| json!({ "text": text })).collect();
    for name in ["nli-bert", "nli-xlm-roberta", "nli-deberta"] {
        let set = [r#"task.labels=["parcel","invoice"]"#, "task.multi_label=true"];
        each("zero-shot-classification", name, &set, &records, |got, want, within, what| {
            for (got, want) in got.iter().zip(want) {
                let scores = |of: &Value| {
                    let scores = of["scores"].as_object().expect("scores").iter();
                    let mut scores: Vec<_> = scores
                        .map(|(label, score)| (label.clone(), score.as_f64().expect("a score")))
                        .collect();
                    scores.sort_by(|a, b| a.0.cmp(&b.0));
                    scores
                };
                for (got, want) in scores(got).into_iter().zip(scores(want)) {
                    assert!((got.1 - want.1).abs() <= within, "{what}: {got:?} is not {want:?}");
                }
            }
        });
    }
}

#[test]
fn scores_of_spans() {
    let labels = ["thing".to_owned(), "problem".to_owned()];
    for name in ["gliner-bert", "gliner-deberta"] {
        let run = |device: &str, dtype: &str| -> Vec<Candidate> {
            let source = Some(fixture(name).display().to_string());
            let files = Files::find(&settings::Model { source, ..Default::default() }).expect("files");
            let dtype = match dtype {
                "f32" => Dtype::F32,
                "f16" => Dtype::F16,
                _ => Dtype::Bf16,
            };
            let device = DeviceChoice::try_from(device.to_owned()).expect("a device");
            let placement = Placement::choose(device, dtype).expect("a device");
            let model = Gliner::load(files, placement, &labels, -1.0).expect("a model");
            let items = TEXTS.map(|text| {
                let words = model.words(text).expect("words");
                model.item(&words, 0..words.len())
            });
            let answers = model.run(&items.iter().collect::<Vec<_>>()).expect("answers");
            answers.iter().flat_map(Candidate::of).collect()
        };
        let want = run("cpu", "f32");
        for (dtype, within) in types() {
            let got = run(&device(), dtype);
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(&want) {
                assert_eq!((got.first, got.last, got.label), (want.first, want.last, want.label));
                let off = f64::from((got.score - want.score).abs());
                assert!(off <= within, "{name} in {dtype}: {got:?} is not {want:?}");
            }
        }
    }
}
