//! GLiNER against the gliner package (tests/fixtures/make.py): the scores of all spans within 1e-4, and the entities that
//! follow from them; and `task.redact`.

use crate::support::models;

use std::path::Path;

use kandle::compute::Compute;
use kandle::engine::Model;
use kandle::model::{Candidate, Files, Gliner, Placement, PromptedWords};
use kandle::settings::{self, DeviceChoice, Dtype, Sources};
use models::{copy_of, fixture, golden, load, predict};
use serde::Deserialize;
use serde_json::{Value, json};

const FIXTURES: [&str; 2] = ["gliner-deberta", "gliner-bert"];
/// What the fixtures' configuration says.
const MAX_WORDS: usize = 24;
const MAX_WIDTH: usize = 4;

#[derive(Deserialize)]
struct Golden {
    text: String,
    labels: Vec<String>,
    /// Offsets of each word.
    words: Vec<(u32, u32)>,
    /// The scores of each span, by first word and width.
    scores: Vec<Vec<f64>>,
    found: Vec<Found>,
}

#[derive(Deserialize)]
struct Found {
    threshold: f64,
    nested: bool,
    multi_label: bool,
    entities: Vec<Value>,
}

#[derive(Deserialize)]
struct Long {
    text: String,
    labels: Vec<String>,
    threshold: f64,
    entities: Vec<Value>,
}

fn gliner(directory: &Path, labels: &[String], threshold: f32) -> Gliner {
    let device = std::env::var("KANDLE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let device = DeviceChoice::try_from(device).expect("a device");
    let placement = Placement::choose(device, Dtype::F32).expect("a device");
    let model = settings::Model { source: Some(directory.display().to_string()), ..Default::default() };
    let files = Files::find(&model).expect("files");
    Gliner::load(files, placement, labels, threshold).unwrap_or_else(|e| panic!("{e}"))
}

/// Settings for labels, with others.
fn set(labels: &[String], more: &[&str]) -> Vec<String> {
    let labels = format!("task.labels={}", json!(labels));
    std::iter::once(labels).chain(more.iter().map(|&set| set.to_owned())).collect()
}

/// The entities of each text, all in one window; asserts that their texts are those of their offsets.
fn entities(compute: &dyn Compute, texts: &[&str]) -> Vec<Vec<Value>> {
    let records: Vec<Value> = texts.iter().map(|text| json!({ "text": text })).collect();
    let of = |(prediction, text): (Result<Value, _>, &&str)| {
        let mut found = prediction.unwrap_or_else(|e| panic!("{text:?}: {e:?}"))["entities"].take();
        let found = found.as_array_mut().expect("entities");
        for entity in found.iter_mut() {
            let place = |key: &str| entity[key].as_u64().expect("a place") as usize;
            let (start, end) = (place("start"), place("end"));
            let inside: String = text.chars().skip(start).take(end - start).collect();
            assert_eq!(entity.as_object_mut().expect("an entity").remove("text"), Some(inside.into()));
        }
        std::mem::take(found)
    };
    predict(compute, &records).into_iter().zip(texts).map(of).collect()
}

#[track_caller]
fn same(got: &[Value], want: &[Value], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: {got:?} is not {want:?}");
    for (got, want) in got.iter().zip(want) {
        for key in ["label", "start", "end"] {
            assert_eq!(got[key], want[key], "{what}: {got} is not {want}");
        }
        let score = |of: &Value| of["score"].as_f64().expect("a score");
        assert!((score(got) - score(want)).abs() < 1e-4, "{what}: {got} is not {want}");
    }
}

#[test]
fn scores_of_all_spans_equal_those_of_the_package() {
    for name in FIXTURES {
        let golden: Vec<Golden> = golden(&fixture(name), "golden.json");
        for part in golden.chunk_by(|a, b| a.labels == b.labels) {
            // All scores are above the threshold.
            let model = gliner(&fixture(name), &part[0].labels, -1.0);
            let mut items = Vec::new();
            for of in part {
                let words = model.words(&of.text).expect("words");
                let places: Vec<(u32, u32)> = words.places.iter().map(|of| (of.start, of.end)).collect();
                assert_eq!(places, of.words, "{name}: {:?}", of.text);
                items.push(model.item(&words, 0..words.len().min(MAX_WORDS)));
            }
            // A text without words is no item.
            let asked: Vec<usize> = (0..part.len()).filter(|&i| !part[i].words.is_empty()).collect();
            let batch: Vec<&PromptedWords> = asked.iter().map(|&i| &items[i]).collect();
            let together = model.run(&batch).expect("answers");
            for (place, &i) in asked.iter().enumerate() {
                let (of, alone) = (&part[i], model.run(&batch[place..=place]).expect("an answer"));
                let got: Vec<Candidate> = Candidate::of(together.row(place)).collect();
                let words = of.words.len().min(MAX_WORDS) as u32;
                let spans = (0..words).flat_map(|first| {
                    (first..(first + MAX_WIDTH as u32).min(words)).map(move |last| (first, last))
                });
                let want: Vec<((u32, u32), u32, f64)> = spans
                    .zip(&of.scores)
                    .flat_map(|(span, scores)| {
                        (0..).zip(scores).map(move |(label, &score)| (span, label, score))
                    })
                    .collect();
                assert_eq!(got.len(), want.len(), "{name}: {:?}", of.text);
                for ((got, alone), (span, label, score)) in
                    got.iter().zip(Candidate::of(alone.row(0))).zip(want)
                {
                    assert_eq!(((got.first, got.last), got.label), (span, label));
                    let off = (f64::from(got.score) - score).abs();
                    assert!(off < 1e-4, "{name}: {:?} {span:?}: {} is not {score}", of.text, got.score);
                    assert!((got.score - alone.score).abs() < 1e-5, "{got:?} is {alone:?} alone");
                }
            }
        }
    }
}

#[test]
fn entities_equal_those_of_the_package() {
    for name in FIXTURES {
        for Golden { text, labels, found, .. } in golden::<Golden>(&fixture(name), "golden.json") {
            for Found { threshold, nested, multi_label, entities: want } in found {
                let more = [
                    format!("task.threshold={threshold}"),
                    format!("task.nested={nested}"),
                    format!("task.multi_label={multi_label}"),
                    // As the package does.
                    "task.overflow=truncate".to_owned(),
                ];
                let set = set(&labels, &more.each_ref().map(String::as_str));
                let compute = load("token-classification", &fixture(name), &set).expect("a task");
                let got = entities(&*compute, &[&text]);
                same(&got[0], &want, &format!("{name} {set:?} {text:?}"));
            }
        }
    }
}

#[test]
fn the_best_entities_of_chunks_are_kept() {
    for Long { text, labels, threshold, entities: want } in
        golden::<Long>(&fixture("gliner-deberta"), "golden-long.json")
    {
        let threshold = format!("task.threshold={threshold}");
        let set = set(&labels, &[&threshold, "task.stride=0"]);
        let compute = load("token-classification", &fixture("gliner-deberta"), &set).expect("a task");
        let got = entities(&*compute, &["late parcel", &text, "x1"]);
        same(&got[1], &want, &format!("{set:?} {text:?}"));
    }
}

#[test]
fn long_texts_may_be_dead_letters_and_empty_ones_have_no_entities() {
    let labels = ["person".to_owned()];
    let refusing = set(&labels, &["task.overflow=dead_letter"]);
    let compute = load("token-classification", &fixture("gliner-deberta"), &refusing).expect("a task");
    let got = predict(&*compute, &[json!({ "text": "late ".repeat(25) }), json!({ "text": " \u{1c}\n" })]);
    let (fault, message) = got[0].clone().expect_err("too long");
    assert_eq!(fault, "TooLong");
    assert!(message.starts_with("more than 24 words, or more than the "), "{message}");
    assert_eq!(got[1], Ok(json!({ "entities": [] })));
    // A word that is longer than the model takes is read from its beginning.
    let low = set(&labels, &["task.threshold=0"]);
    let compute = load("token-classification", &fixture("gliner-deberta"), &low).expect("a task");
    let word = "parcel".repeat(2000);
    let got = entities(&*compute, &[&format!("late {word} x1")]);
    assert!(got[0].iter().any(|entity| entity["end"].as_u64() > Some(12_000)), "{got:?}");
}

/// The backbone's own config.json and tokenizer.json, which know no tokens of GLiNER, do as well as what the package
/// writes.
#[test]
fn a_checkpoint_beside_the_files_of_its_backbone_is_complete() {
    let labels = ["person".to_owned(), "x1 y2".to_owned()];
    let directory = copy_of("gliner-deberta");
    let edit = |file: &str, of: &dyn Fn(&mut Value)| {
        let path = directory.path().join(file);
        let mut value: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
        of(&mut value);
        std::fs::write(&path, value.to_string()).expect("written");
        value
    };
    let scores = |directory: &Path| {
        let model = gliner(directory, &labels, -1.0);
        let words = model.words("Müller lost a parcel, late.").expect("words");
        let item = model.item(&words, 0..words.len());
        model.run(&[&item]).expect("an answer").row(0).to_vec()
    };
    let want = scores(directory.path());
    let mut backbone = Value::Null;
    edit("tokenizer.json", &|tokenizer| {
        let added = tokenizer["added_tokens"].as_array_mut().expect("tokens");
        let before = added.len();
        added.retain(|token| {
            !["[FLERT]", "<<ENT>>", "<<SEP>>"].contains(&token["content"].as_str().expect("a text"))
        });
        assert_eq!(added.len(), before - 3);
    });
    let config = edit("gliner_config.json", &|_| {});
    backbone.clone_from(&config["encoder_config"]);
    backbone["vocab_size"] = 7.into();
    edit("gliner_config.json", &|config| {
        for key in ["encoder_config", "class_token_index", "vocab_size"] {
            config.as_object_mut().expect("an object").remove(key);
        }
    });
    let refused =
        || load("token-classification", directory.path(), &set(&labels, &[])).err().expect("an error");
    let message = refused();
    assert!(
        message.contains("gliner_config.json has no encoder_config: add the config.json of tiny"),
        "{message}"
    );
    assert!(message.contains("GLiNER.from_pretrained"), "{message}");
    std::fs::write(directory.path().join("config.json"), backbone.to_string()).expect("written");
    assert_eq!(scores(directory.path()), want);
    std::fs::remove_file(directory.path().join("tokenizer.json")).expect("removed");
    let message = refused();
    assert!(message.contains("add the backbone's tokenizer.json"), "{message}");
}

#[test]
fn a_checkpoint_and_labels_that_do_not_fit_are_refused() {
    let refused = |kind: &str, name: &str, set: &[String]| {
        load(kind, &fixture(name), set).err().unwrap_or_else(|| panic!("{kind} of {name} was loaded"))
    };
    let labels = |count: usize| (0..count).map(|i| format!("label {i}")).collect::<Vec<_>>();
    let message = refused("token-classification", "gliner-deberta", &[]);
    assert!(
        message.contains("task.labels: the model is GLiNER, which finds the entities that are named"),
        "{message}"
    );
    let message = refused("token-classification", "tokens-bert", &set(&labels(1), &[]));
    assert!(message.contains("task.labels: has no effect on this model, a token classifier"), "{message}");
    let message = refused("text-embedding", "gliner-deberta", &[]);
    assert!(
        message.contains("it is a GLiNER model, which is for task.kind: token-classification"),
        "{message}"
    );
    let message = refused("token-classification", "gliner-deberta", &set(&labels(40), &[]));
    assert!(
        message.contains("task.labels: they take") && message.contains("name fewer or shorter"),
        "{message}"
    );
    let directory = copy_of("gliner-deberta");
    let path = directory.path().join("gliner_config.json");
    let config = std::fs::read_to_string(&path).expect("read");
    std::fs::write(&path, config.replace("markerV0", "token_level")).expect("written");
    let message =
        load("token-classification", directory.path(), &set(&labels(1), &[])).err().expect("an error");
    assert!(
        message.contains("span_mode \"token_level\" makes it a model that labels single words"),
        "{message}"
    );
}

/// Everything that scores above the threshold is gone, in texts of one chunk and of several.
#[test]
fn redacted_texts_have_none_of_the_entities() {
    let mut texts: Vec<Golden> = golden(&fixture("gliner-deberta"), "golden.json");
    texts.retain(|of| of.words.len() <= MAX_WORDS);
    for Golden { text, labels, words, scores, found } in texts {
        let threshold = found[4].threshold;
        let set = set(&labels, &[&format!("task.threshold={threshold}"), "task.redact=true"]);
        let compute = load("token-classification", &fixture("gliner-deberta"), &set).expect("a task");
        let got = predict(&*compute, &[json!({ "text": text })]).remove(0).expect("a prediction");
        let got = got.as_object().expect("an object");
        assert_eq!(got.keys().collect::<Vec<_>>(), ["text", "entities"]);
        same(got["entities"].as_array().expect("entities"), &found[4].entities, &text);
        for entity in got["entities"].as_array().expect("entities") {
            let keys: Vec<&String> = entity.as_object().expect("an entity").keys().collect();
            assert_eq!(keys, ["label", "start", "end", "score"]);
        }
        // Per character: the label that replaces it, with its score.
        let mut covered: Vec<Option<()>> = vec![None; text.chars().count()];
        let spans = (0..words.len())
            .flat_map(|first| (first..(first + MAX_WIDTH).min(words.len())).map(move |last| (first, last)));
        for ((first, last), scores) in spans.zip(&scores) {
            if scores.iter().any(|&score| score > threshold) {
                (words[first].0..words[last].1).for_each(|at| covered[at as usize] = Some(()));
            }
        }
        // What is outside of brackets is exactly what no such span covers.
        let kept: String =
            text.chars().zip(&covered).filter(|(_, of)| of.is_none()).map(|(c, _)| c).collect();
        let names: Vec<String> = labels.iter().map(|label| format!("[{}]", label.to_uppercase())).collect();
        let redacted = got["text"].as_str().expect("a text");
        let without = names.iter().fold(redacted.to_owned(), |text, name| text.replace(name, ""));
        assert_eq!(without, kept, "{redacted}");
    }
    for Long { text, labels, threshold, entities } in
        golden::<Long>(&fixture("gliner-deberta"), "golden-long.json")
    {
        let set =
            set(&labels, &[&format!("task.threshold={threshold}"), "task.stride=0", "task.redact=true"]);
        let compute = load("token-classification", &fixture("gliner-deberta"), &set).expect("a task");
        let got = predict(&*compute, &[json!({ "text": text })]).remove(0).expect("a prediction");
        same(got["entities"].as_array().expect("entities"), &entities, &text);
        assert!(got["text"].as_str().expect("a text").contains('['));
    }
}

#[test]
fn a_token_classifier_redacts_whole_words() {
    for name in ["tokens-bert", "tokens-roberta"] {
        let texts = [
            "Late parcel, late Müller invoice 東京 x1!",
            "password ",
            "",
            &"late parcel invoice ".repeat(40),
        ];
        let records: Vec<Value> = texts.iter().map(|text| json!({ "text": text })).collect();
        let predictions = |more: &[&str]| {
            let set: Vec<String> =
                ["task.aggregation=max"].iter().chain(more).map(|&set| set.to_owned()).collect();
            let compute = load("token-classification", &fixture(name), &set).expect("a task");
            predict(&*compute, &records).into_iter().map(|got| got.expect("a prediction")).collect::<Vec<_>>()
        };
        let plain = predictions(&[]);
        let mut replaced = 0;
        for ((text, plain), got) in texts.iter().zip(&plain).zip(predictions(&["task.redact=true"])) {
            let redacted = got["text"].as_str().expect("a text");
            let found = got["entities"].as_array().expect("entities");
            same(found, plain["entities"].as_array().expect("entities"), text);
            assert!(found.iter().all(|entity| entity.get("text").is_none()));
            if found.is_empty() {
                assert_eq!(redacted, *text);
            }
            replaced += redacted.matches(['[']).count();
            // Words that are left are words of the text.
            let words: Vec<&str> = text.split_whitespace().collect();
            let left = redacted.split_whitespace().filter(|word| !word.contains(['[', ']']));
            left.for_each(|word| assert!(words.contains(&word), "{word:?} of {redacted:?}"));
        }
        assert!(replaced > 0, "{name}");
    }
}

#[test]
fn settings_that_would_publish_what_is_redacted_are_refused() {
    let problems = |set: &[&str]| {
        let base = [
            "kafka.brokers=none:1",
            "input.topics=in",
            "input.group=g",
            "task.kind=token-classification",
            "task.labels=person",
            "model.source=none",
            "output.topic=out",
            "dead_letters.topic=dead",
        ];
        let all: Vec<String> = base.iter().chain(set).map(|&set| set.to_owned()).collect();
        let lines = settings::load(&Sources { set: all, ..Sources::default() }).map(|_| ());
        lines.err().unwrap_or_default().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    let redact = "task.redact=true";
    assert_eq!(problems(&["input.field=/body", redact, "output.include=/id,/bodyguard"]), "");
    assert_eq!(problems(&["input.field=/text", "output.include=/text"]), "");
    for (set, message) in [
        (&["input.field=/body", redact, "output.include=/body"][..], "/body has the text, which task.redact"),
        (&["input.field=/mail/body", redact, "output.include=/mail"], "/mail has the text"),
        (&["input.field=[\"/a\", \"/b\"]", redact, "output.include=/b"], "/b has the text"),
        (&["input.template={{ a.b }} {{ c }}", redact, "output.include=/a/b"], "/a/b has the text"),
        (
            &["input.field=/body", redact, "output.include=/x/text"],
            "a prediction already has a field \"text\"",
        ),
        (&["input.field=/t", redact, "task.overflow=truncate"], "truncate is not supported with redact"),
        (
            &["input.field=/t", redact, "task.labels=[]"],
            "task.aggregation: with redact, set first, average or max",
        ),
        (
            &["input.field=/t", "task.labels=[]", "task.threshold=0.3"],
            "task.threshold: has no effect without labels",
        ),
        (&["input.field=/t", "task.aggregation=max"], "task.aggregation: has no effect with labels"),
        (&["input.field=/t", "task.labels=a,b,a"], "task.labels: \"a\" is named twice"),
        (&["input.field=/t", "task.threshold=1.5"], "task.threshold"),
    ] {
        let said = problems(set);
        assert!(said.contains(message), "{set:?}: {said}");
    }
    assert_eq!(problems(&["input.template={{ a.b }} {{ c }}", redact, "output.include=/id"]), "");
}
