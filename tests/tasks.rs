//! Token classification, reranking and zero-shot classification against Hugging Face's libraries
//! (tests/fixtures/make.py). Each record is predicted alone, and in a window with all others: within 1e-4 of the
//! library, within 1e-5 of each other.

use crate::support::models;

use std::path::Path;

use kandle::compute::Compute;
use serde::Deserialize;
use serde_json::{Value, json};

use models::{copy_of, fixture, load, predict};

fn golden<T: for<'a> Deserialize<'a>>(name: &str) -> Vec<T> {
    models::golden(&fixture(name), "golden.json")
}

/// The prediction of each record; asserts that it is the same alone and among the others.
#[track_caller]
fn predictions(compute: &dyn Compute, records: &[Value]) -> Vec<Value> {
    let together = predict(compute, records);
    let mut all = Vec::new();
    for (record, together) in records.iter().zip(together) {
        let together = together.unwrap_or_else(|e| panic!("{record}: {e:?}"));
        let alone = predict(compute, std::slice::from_ref(record)).remove(0).expect("a prediction");
        near(&together, &alone, 1e-5, &record.to_string());
        all.push(together);
    }
    all
}

/// Asserts that two values are equal; numbers may differ by `within`.
#[track_caller]
fn near(got: &Value, want: &Value, within: f64, what: &str) {
    match (got, want) {
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{what}");
            a.iter().for_each(|(key, a)| near(a, &b[key], within, what));
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{what}: {got} is not {want}");
            a.iter().zip(b).for_each(|(a, b)| near(a, b, within, what));
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().expect("a number"), b.as_f64().expect("a number"));
            assert!((a - b).abs() <= within, "{what}: {a} is not {b} within {within}");
        }
        _ => assert_eq!(got, want, "{what}"),
    }
}

#[derive(Deserialize)]
struct Found {
    text: String,
    aggregation: String,
    stride: Option<usize>,
    entities: Vec<Value>,
}

const TOKENS: [&str; 8] = [
    "tokens-bert",
    "tokens-roberta",
    "tokens-xlm-roberta",
    "tokens-albert",
    "tokens-electra",
    "tokens-mpnet",
    "tokens-modernbert",
    "tokens-deberta",
];

#[test]
fn entities_equal_those_of_transformers() {
    for name in TOKENS {
        let golden: Vec<Found> = golden(name);
        for part in golden.chunk_by(|a, b| (&a.aggregation, a.stride) == (&b.aggregation, b.stride)) {
            let (aggregation, stride) = (&part[0].aggregation, part[0].stride);
            let mut set = vec![format!("task.aggregation={aggregation}")];
            match stride {
                Some(stride) => set.push(format!("task.stride={stride}")),
                None => set.push("task.overflow=truncate".to_owned()),
            }
            let compute = load("token-classification", &fixture(name), &set).expect("a task");
            let records: Vec<Value> = part.iter().map(|found| json!({ "text": found.text })).collect();
            for (found, mut got) in part.iter().zip(predictions(&*compute, &records)) {
                let what = format!("{name}, {aggregation}, {stride:?}: {:?}", found.text);
                for entity in got["entities"].as_array_mut().expect("entities") {
                    let place = |key: &str| entity[key].as_u64().expect("a place") as usize;
                    let text: String =
                        found.text.chars().skip(place("start")).take(place("end") - place("start")).collect();
                    assert_eq!(entity["text"], text, "{what}");
                    entity.as_object_mut().expect("an entity").remove("text");
                }
                near(&got["entities"], &found.entities.clone().into(), 1e-4, &what);
            }
        }
    }
}

/// transformers has no chunks without aggregation, so nothing to compare with: each token is found once, even where
/// chunks overlap.
#[test]
fn overlapping_chunks_find_each_token_once() {
    for name in TOKENS {
        let set = |overflow: &str| [format!("task.overflow={overflow}"), "task.aggregation=none".to_owned()];
        let chunks = load("token-classification", &fixture(name), &set("chunk")).expect("a task");
        let words = ["late", "parcel", "über", "invoice", "x1", "account"];
        let text: Vec<&str> = words.iter().copied().cycle().take(200).collect();
        let got = predictions(&*chunks, &[json!({ "text": text.join(" ") })]);
        let starts: Vec<u64> = got[0]["entities"]
            .as_array()
            .expect("entities")
            .iter()
            .map(|entity| entity["start"].as_u64().expect("a place"))
            .collect();
        // Tokens of the bytes of one character have the same start.
        let shared = |at: u64| text.join(" ").chars().nth(at as usize) == Some('ü');
        assert!(starts.is_sorted_by(|a, b| a < b || (a == b && shared(*a))), "{name}: {starts:?}");
        assert!(starts.len() > 100 && starts[starts.len() - 1] > 1000, "{name}: {starts:?}");
        let first = load("token-classification", &fixture(name), &set("truncate")).expect("a task");
        let cut = predictions(&*first, &[json!({ "text": text.join(" ") })]);
        assert!(cut[0]["entities"].as_array().expect("entities").len() <= 46, "{name}");
    }
}

#[derive(Deserialize)]
struct Pairs {
    query: String,
    documents: Vec<String>,
    logits: Vec<f64>,
    scores: Vec<f64>,
}

/// Scores in the order of the documents.
fn by_index(prediction: &Value) -> Vec<f64> {
    let results = prediction["results"].as_array().expect("results");
    let score = |result: &Value| result["score"].as_f64().expect("a score");
    assert!(results.is_sorted_by(|a, b| score(a) >= score(b)), "{prediction}");
    let mut scores = vec![f64::NAN; results.len()];
    for result in results {
        scores[result["index"].as_u64().expect("an index") as usize] = score(result);
    }
    scores
}

#[test]
fn document_scores_equal_those_of_cross_encoders() {
    let documents = ["task.documents=/documents".to_owned()];
    for name in ["pairs-bert", "pairs-roberta", "pairs-deberta", "pairs-qwen3"] {
        let golden: Vec<Pairs> = golden(name);
        let records: Vec<Value> =
            golden.iter().map(|pairs| json!({ "text": pairs.query, "documents": pairs.documents })).collect();
        let check = |model: &Path, want: &dyn Fn(&Pairs) -> &Vec<f64>, what: &str| {
            let compute = load("reranking", model, &documents).expect("a task");
            for (pairs, got) in golden.iter().zip(predictions(&*compute, &records)) {
                let want = want(pairs);
                near(&json!(by_index(&got)), &json!(want), 1e-4, &format!("{name}, {what}: {}", pairs.query));
            }
        };
        check(&fixture(name), &|pairs| &pairs.scores, "as saved");
        if name != "pairs-bert" {
            continue;
        }
        // Checkpoints that ask for the raw logit, and older ones that name the activation elsewhere.
        let copy = |changed: &str, from: &str, to: &str| {
            let directory = copy_of(name);
            let path = directory.path().join(changed);
            let content = std::fs::read_to_string(&path).expect("content");
            assert!(content.contains(from), "{content}");
            std::fs::write(&path, content.replacen(from, to, 1)).expect("written");
            directory
        };
        let sentence = "config_sentence_transformers.json";
        let raw = copy(sentence, "activation.Sigmoid", "linear.Identity");
        check(raw.path(), &|pairs| &pairs.logits, "raw");
        for key in [
            r#"{"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},"#,
            r#"{"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity","#,
        ] {
            let old = copy("config.json", "{", key);
            std::fs::remove_file(old.path().join(sentence)).expect("removed");
            check(old.path(), &|pairs| &pairs.logits, key);
        }
        let strange = copy(sentence, "activation.Sigmoid", "activation.Tanh");
        let error = load("reranking", strange.path(), &documents).err().expect("an error");
        assert!(error.contains("Tanh is not supported; supported: Sigmoid, Identity"), "{error}");
    }
}

#[derive(Deserialize)]
struct Answers {
    instruction: Option<String>,
    query: String,
    documents: Vec<String>,
    /// Whether each document is truncated.
    truncated: Vec<bool>,
    #[serde(default)]
    logits: Vec<f64>,
    scores: Vec<f64>,
}

/// Language models that answer yes or no: with the prompt of Qwen3-Reranker's model card, and with the chat template of
/// sentence-transformers. Long documents are truncated, the end of the prompt is not.
#[test]
fn document_scores_equal_those_of_language_models() {
    for name in ["rerank-qwen3", "rerank-qwen3-logit-score"] {
        let golden: Vec<Answers> = golden(name);
        for part in golden.chunk_by(|a, b| a.instruction == b.instruction) {
            let mut set = vec!["task.documents=/documents".to_owned()];
            set.extend(part[0].instruction.iter().map(|text| format!("task.instruction={text}")));
            let records: Vec<Value> =
                part.iter().map(|of| json!({ "text": of.query, "documents": of.documents })).collect();
            let check = |model: &Path, set: &[String], want: &dyn Fn(&Answers) -> &Vec<f64>| {
                let compute = load("reranking", model, set).expect("a task");
                for (of, got) in part.iter().zip(predictions(&*compute, &records)) {
                    near(
                        &json!(by_index(&got)),
                        &json!(want(of)),
                        1e-4,
                        &format!("{name}, {set:?}: {}", of.query),
                    );
                }
            };
            check(&fixture(name), &set, &|of| &of.scores);
            if name == "rerank-qwen3" {
                let strict = [&set[..], &["task.overflow=dead_letter".to_owned()]].concat();
                let compute = load("reranking", &fixture(name), &strict).expect("a task");
                for of in part {
                    for (document, truncated) in of.documents.iter().zip(&of.truncated) {
                        let record = json!({ "text": of.query, "documents": [document] });
                        let got = predict(&*compute, &[record]).remove(0);
                        assert_eq!(got.is_err(), *truncated, "{document:?}");
                    }
                }
                continue;
            }
            // The checkpoint's own instruction and activation.
            let own = copy_of(name);
            let path = own.path().join("config_sentence_transformers.json");
            let content = std::fs::read_to_string(&path).expect("content");
            let content = content.replace("activation.Sigmoid", "linear.Identity");
            let default = if part[0].instruction.is_some() { "\"parcel\"" } else { "null" };
            let content = content
                .replace("\"default_prompt_name\": null", &format!("\"default_prompt_name\": {default}"));
            std::fs::write(&path, content).expect("written");
            check(own.path(), &set[..1], &|of| &of.logits);
        }
    }
}

/// Without `lm_head` and a word about it, the output layer is the table of embeddings.
#[test]
fn a_language_model_without_an_output_layer_uses_its_embeddings() {
    let documents = ["task.documents=/d".to_owned()];
    let records = [json!({ "text": "late parcel", "d": ["where is the parcel", "refund"] })];
    let directory = copy_of("rerank-qwen3");
    let path = directory.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    config.as_object_mut().expect("an object").remove("tie_word_embeddings");
    std::fs::write(&path, config.to_string()).expect("written");
    let untold = load("reranking", directory.path(), &documents).expect("a task");
    let told = load("reranking", &fixture("rerank-qwen3"), &documents).expect("a task");
    assert_eq!(predictions(&*untold, &records), predictions(&*told, &records));
    config["tie_word_embeddings"] = false.into();
    std::fs::write(&path, config.to_string()).expect("written");
    let error = load("reranking", directory.path(), &documents).err().expect("an error");
    assert!(error.contains("cannot find tensor lm_head.weight"), "{error}");
}

#[test]
fn a_language_model_that_cannot_be_asked_is_refused() {
    let set = ["task.documents=/d".to_owned()];
    let refused = |name: &str, file: &str, content: &str, set: &[String], says: &str| {
        let directory = copy_of(name);
        std::fs::write(directory.path().join(file), content).expect("written");
        let error = load("reranking", directory.path(), set).err().expect("an error");
        assert!(error.contains(says), "{error}");
    };
    let score = "rerank-qwen3-logit-score";
    let template = "chat_template.jinja";
    let one = "{{ messages[0].content }}<|im_end|>";
    refused(score, template, one, &set, "the texts of the roles query and document");
    let plain = "{{ messages[0].content }} {{ messages[1].content }}.";
    refused(score, template, plain, &set, "does not begin with a token that tokenizer.json adds");
    let fails = "{{ messages[0].content.nothing.more }}";
    refused(score, template, fails, &set, "the chat template cannot be rendered");
    let long =
        format!("{{{{ messages[0].content }}}} {{{{ messages[1].content }}}}{}", "<|im_end|>".repeat(200));
    refused(score, template, &long, &set, "leaves no room");
    let modules =
        r#"[{"type": "a.Transformer", "path": ""}, {"type": "a.Normalize", "path": "1_Normalize"}]"#;
    refused(score, "modules.json", modules, &set, "a.Normalize is not supported");
    let config = r#"{"true_token_id": 4, "false_token_id": 5, "temperature": 2}"#;
    refused(score, "1_LogitScore/config.json", config, &set, "kandle does not know temperature");
    let other = fixture("qwen3").join("tokenizer.json");
    let tokenizer = std::fs::read_to_string(other).expect("tokenizer.json");
    refused("rerank-qwen3", "tokenizer.json", &tokenizer, &set, "no token \"yes\"");
    let with_instruction = [set[0].clone(), "task.instruction=Find".to_owned()];
    let error = load("reranking", &fixture("pairs-bert"), &with_instruction).err().expect("an error");
    assert!(error.contains("task.instruction: the model is a classifier of pairs"), "{error}");
}

#[test]
fn the_best_documents_keep_their_ids() {
    let set = ["task.documents=/documents".to_owned(), "task.top_k=2".to_owned()];
    let compute = load("reranking", &fixture("pairs-bert"), &set).expect("a task");
    let records = [
        json!({ "text": "late parcel", "documents": [
            { "id": 7, "text": "where is the parcel" }, "a text alone", { "text": "without" },
            { "id": { "a": ["b"] }, "text": "late \"x\"", "more": 1 },
        ] }),
        json!({ "text": "late parcel", "documents": [] }),
    ];
    let got = predictions(&*compute, &records);
    let results = got[0]["results"].as_array().expect("results");
    assert_eq!(results.len(), 2);
    let ids = [json!(7), Value::Null, Value::Null, json!({ "a": ["b"] })];
    for result in results {
        assert_eq!(result["id"], ids[result["index"].as_u64().expect("an index") as usize]);
    }
    assert_eq!(got[1], json!({ "results": [] }));
}

#[derive(Deserialize)]
struct Judged {
    text: String,
    labels: Vec<String>,
    hypothesis: String,
    multi_label: bool,
    scores: serde_json::Map<String, Value>,
}

#[test]
fn zero_shot_scores_equal_those_of_transformers() {
    for name in ["nli-bert", "nli-xlm-roberta", "nli-deberta"] {
        let golden: Vec<Judged> = golden(name);
        let same = |a: &Judged, b: &Judged| {
            (&a.labels, &a.hypothesis, a.multi_label) == (&b.labels, &b.hypothesis, b.multi_label)
        };
        for part in golden.chunk_by(same) {
            let set = [
                format!("task.hypothesis={}", part[0].hypothesis),
                format!("task.multi_label={}", part[0].multi_label),
            ];
            let labels = format!("task.labels={}", json!(part[0].labels));
            let records: Vec<Value> =
                part.iter().map(|judged| json!({ "text": judged.text, "own": judged.labels })).collect();
            for which in [labels, "task.labels_field=/own".to_owned()] {
                let set: Vec<String> = set.iter().cloned().chain([which]).collect();
                let compute = load("zero-shot-classification", &fixture(name), &set).expect("a task");
                for (judged, got) in part.iter().zip(predictions(&*compute, &records)) {
                    let what = format!("{name}: {:?} {set:?}", judged.text);
                    near(&got["scores"], &judged.scores.clone().into(), 1e-4, &what);
                    let best = judged.scores.values().filter_map(Value::as_f64).fold(0.0, f64::max);
                    near(&got["score"], &json!(best), 1e-4, &what);
                    assert_eq!(
                        got["score"],
                        got["scores"][got["label"].as_str().expect("a label")],
                        "{what}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_bad_record_fails_with_the_reason() {
    let faults = |compute: &dyn Compute, records: &[(Value, &str, &str)]| {
        let values: Vec<Value> = records.iter().map(|(record, ..)| record.clone()).collect();
        for ((record, fault, message), got) in records.iter().zip(predict(compute, &values)) {
            let (got_fault, got_message) = got.expect_err(&record.to_string());
            assert_eq!((got_fault.as_str(), got_message.as_str()), (*fault, *message), "{record}");
        }
    };
    let reranking =
        load("reranking", &fixture("pairs-bert"), &["task.documents=/d".to_owned()]).expect("a task");
    faults(
        &*reranking,
        &[
            (json!({ "text": "q" }), "Field", "\"/d\" is missing"),
            (json!({ "text": "q", "d": "x" }), "Field", "\"/d\" is a string, not an array"),
            (json!({ "text": "q", "d": ["x", 3] }), "Field", "\"/d/1\" is a number, not a string"),
            (json!({ "text": "q", "d": [["x"]] }), "Field", "\"/d/0\" is an array, not a string"),
            (json!({ "text": "q", "d": [{ "id": 1 }] }), "Field", "\"/d/0/text\" is missing"),
            (json!({ "text": "q", "d": [{ "text": null }] }), "Field", "\"/d/0/text\" is null, not a string"),
            (json!({ "d": ["x"] }), "Field", "\"/text\" is missing"),
        ],
    );
    let own = load("zero-shot-classification", &fixture("nli-bert"), &["task.labels_field=/l".to_owned()])
        .expect("a task");
    let long = "parcel ".repeat(60);
    faults(
        &*own,
        &[
            (json!({ "text": "t" }), "Field", "\"/l\" is missing"),
            (json!({ "text": "t", "l": [] }), "Field", "\"/l\" has no labels"),
            (json!({ "text": "t", "l": ["a", false] }), "Field", "\"/l/1\" is a boolean, not a string"),
            (json!({ "text": "t", "l": ["a", "a"] }), "Field", "\"/l\" has \"a\" twice"),
            (
                json!({ "text": "t", "l": [long] }),
                "TooLong",
                &format!(
                    "the hypothesis about {long:?} is too long: it takes at least 52 tokens with the special ones, and \
                     the model has 48: no text fits beside it"
                ),
            ),
        ],
    );
    let short =
        load("token-classification", &fixture("tokens-bert"), &["task.overflow=dead_letter".to_owned()])
            .expect("a task");
    faults(
        &*short,
        &[
            (json!({ "text": "parcel ".repeat(60) }), "TooLong", "more than the model's 48 tokens"),
            (json!({ "text": ["a"] }), "Field", "\"/text\" is an array, not a string"),
        ],
    );
    assert_eq!(predictions(&*short, &[json!({ "text": "" })]), [json!({ "entities": [] })]);
}

/// Thousands of items of one record are answered like any others.
#[test]
fn a_record_may_have_five_thousand_documents_or_labels() {
    let texts: Vec<String> = (0..5000).map(|i| format!("parcel {i}")).collect();
    let reranking =
        load("reranking", &fixture("pairs-bert"), &["task.documents=/d".to_owned()]).expect("a task");
    let records = [json!({ "text": "late", "d": texts }), json!({ "text": "late", "d": ["parcel 17"] })];
    let got: Vec<Value> =
        predict(&*reranking, &records).into_iter().map(|got| got.expect("a prediction")).collect();
    let (all, one) = (by_index(&got[0]), by_index(&got[1]));
    assert_eq!(all.len(), 5000);
    assert!((all[17] - one[0]).abs() < 1e-5);
    let own = load("zero-shot-classification", &fixture("nli-bert"), &["task.labels_field=/d".to_owned()])
        .expect("a task");
    let got = predict(&*own, &records[..1]).remove(0).expect("a prediction");
    let scores = got["scores"].as_object().expect("scores");
    assert_eq!(scores.len(), 5000);
    assert!((scores.values().filter_map(Value::as_f64).sum::<f64>() - 1.0).abs() < 1e-3);
}

#[test]
fn a_model_that_cannot_do_the_task_is_refused_at_the_start() {
    let error = |kind: &str, model: &str, set: &[&str]| {
        let set: Vec<String> = set.iter().map(|&set| set.to_owned()).collect();
        load(kind, &fixture(model), &set).err().unwrap_or_else(|| panic!("{kind} of {model} was loaded"))
    };
    let message = error("zero-shot-classification", "bert", &["task.labels=a,b"]);
    assert!(message.contains("none of its labels (calm, spam, urgent) begins with \"entail\""), "{message}");
    // The entailment label is found in label2id, whatever id2label says.
    let directory = copy_of("nli-bert");
    let path = directory.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    config["id2label"] = json!({ "0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2" });
    std::fs::write(&path, config.to_string()).expect("written");
    load("zero-shot-classification", directory.path(), &["task.labels=a,b".to_owned()]).expect("a task");
    let message = error("reranking", "bert", &["task.documents=/d"]);
    assert!(message.contains("it has 3 labels"), "{message}");
    let message = error("token-classification", "bert", &[]);
    assert!(
        message.contains("BertForSequenceClassification: it is a model for task.kind: text-classification"),
        "{message}"
    );
    let message = error("text-classification", "tokens-bert", &[]);
    assert!(message.contains("it is a model for task.kind: token-classification"), "{message}");
    let message = error("token-classification", "tokens-bert", &["task.stride=46"]);
    assert!(message.contains("task.stride: 46 is not less than the 46 tokens"), "{message}");
    let long = format!("task.labels=[\"{}\"]", "parcel ".repeat(60));
    let message = error("zero-shot-classification", "nli-bert", &[&long]);
    assert!(message.contains("task.labels: the hypothesis about"), "{message}");
}
