//! text-embedding and similarity by their settings, against sentence-transformers (tests/fixtures/make.py): prompts,
//! dimensions, encodings, chunks and files of candidates.

use crate::support::models;

use std::path::Path;

use kandle::compute::Compute;
use serde::Deserialize;
use serde_json::{Value, json};

use models::{copy, copy_of, fixture, golden, load};

/// The fixture `bert` with the modules of a folder of `sentences`.
fn model(modules: &str) -> tempfile::TempDir {
    let folder = copy_of("bert");
    copy(&fixture("sentences").join(modules), folder.path());
    folder
}

/// The predictions of texts.
fn predict(compute: &dyn Compute, texts: &[&str]) -> Vec<Value> {
    let records: Vec<Value> = texts.iter().map(|text| json!({ "text": text })).collect();
    models::predict(compute, &records).into_iter().map(|outcome| outcome.expect("a prediction")).collect()
}

fn embeddings(compute: &dyn Compute, texts: &[&str]) -> Vec<Value> {
    predict(compute, texts).into_iter().map(|mut prediction| prediction["embedding"].take()).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).expect("numbers")
}

#[track_caller]
fn close(got: &Value, want: &[f32], within: f32, what: &str) {
    let got = floats(got);
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= within, "{what}[{i}]: {g} is not {w} within {within}");
    }
}

#[derive(Deserialize)]
struct Row {
    text: String,
    prompt: Option<String>,
    #[serde(default)]
    stride: usize,
    vector: Vec<f32>,
}

fn set_prompt(prompt: &Option<String>) -> Vec<String> {
    prompt.iter().map(|name| format!("task.prompt_name={name}")).collect()
}

#[test]
fn prompts_are_chosen_by_name_or_given() {
    for name in ["dense", "without-prompt"] {
        let folder = model(name);
        let golden: Vec<Row> = golden(folder.path(), "golden.json");
        for rows in golden.chunk_by(|a, b| a.prompt == b.prompt) {
            let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
            let mut sets = vec![set_prompt(&rows[0].prompt)];
            match rows[0].prompt.as_deref() {
                Some("query") => sets.push(vec!["task.prompt=where is the late parcel: ".to_owned()]),
                Some("none") => sets.push(vec!["task.prompt=".to_owned()]),
                _ => {}
            }
            for set in sets {
                let compute = load("text-embedding", folder.path(), &set).expect("a task");
                for (got, row) in embeddings(&*compute, &texts).iter().zip(rows) {
                    close(got, &row.vector, 1e-4, &format!("{name}, {set:?}: {:?}", row.text));
                }
            }
        }
    }
}

#[test]
fn prompts_and_dimensions_that_do_not_fit_are_refused() {
    let (folder, bare) = (model("dense"), fixture("bert"));
    let long = format!("task.prompt={}", "late parcel ".repeat(50));
    for (model, set, parts) in [
        (
            folder.path(),
            "task.prompt_name=qeury",
            &["task.prompt_name", "\"qeury\"", "document, none, query"][..],
        ),
        (
            bare.as_path(),
            "task.prompt_name=query",
            &["task.prompt_name", "has none", "config_sentence_transformers.json"],
        ),
        (folder.path(), &long, &["task.prompt", "leaves no room"]),
        (folder.path(), "task.dimensions=17", &["task.dimensions", "17 is more than the 16 values"]),
    ] {
        let error = load("text-embedding", model, &[set.to_owned()]).err().expect("an error");
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    five: Vec<f32>,
    int8: Vec<f32>,
    unit_int8: Vec<f32>,
    ubinary: Value,
}

#[test]
fn vectors_are_cut_and_encoded_as_in_sentence_transformers() {
    let folder = model("dense");
    let golden: Vec<Encoded> = golden(folder.path(), "encoded.json");
    let texts: Vec<&str> = golden.iter().map(|row| row.text.as_str()).collect();
    let of = |set: &[&str]| {
        let set: Vec<String> = set.iter().map(|set| format!("task.{set}")).collect();
        embeddings(&*load("text-embedding", folder.path(), &set).expect("a task"), &texts)
    };
    let ranges = format!("ranges={}", folder.path().join("ranges.json").display());
    let plain = of(&[]);
    let five = of(&["dimensions=5"]);
    let (int8, unit) = (of(&["encoding=int8", &ranges]), of(&["encoding=int8"]));
    let (bits, bits_of_five) = (of(&["encoding=ubinary"]), of(&["encoding=ubinary", "dimensions=5"]));
    let base64 = of(&["encoding=base64"]);
    for (i, row) in golden.iter().enumerate() {
        close(&five[i], &row.five, 1e-5, &row.text);
        // A value at the border of a step may round to the next one.
        close(&int8[i], &row.int8, 1.0, &row.text);
        close(&unit[i], &row.unit_int8, 1.0, &row.text);
        assert_eq!(bits[i], row.ubinary, "{}", row.text);
        assert_eq!(bits_of_five[i][0], json!(row.ubinary[0].as_u64().expect("a byte") & 0xf8));
        assert_eq!(base64[i].as_str().expect("text").len(), 88);
    }
    let others = |got: &[Value], want: fn(&Encoded) -> &Vec<f32>| {
        let rows = golden.iter().zip(got);
        rows.flat_map(|(row, got)| floats(got).into_iter().zip(want(row))).filter(|(g, w)| g != *w).count()
    };
    // The highest value of each place is at a border of its range.
    assert!(others(&int8, |row| &row.int8) <= 16 + 2 && others(&unit, |row| &row.unit_int8) <= 2);
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (text, plain) in base64.iter().zip(&plain) {
        let text = text.as_str().expect("text").trim_end_matches('=');
        let bits = text.bytes().flat_map(|digit| {
            let value = digits.iter().position(|known| *known == digit).expect("a digit");
            (0..6).rev().map(move |bit| (value >> bit & 1) as u8)
        });
        let bits: Vec<u8> = bits.collect();
        let bytes: Vec<u8> =
            bits.chunks_exact(8).map(|bits| bits.iter().fold(0, |byte, bit| byte << 1 | bit)).collect();
        let (words, _) = bytes.as_chunks::<4>();
        assert_eq!(words.iter().map(|word| f32::from_le_bytes(*word)).collect::<Vec<_>>(), floats(plain));
    }
}

#[test]
fn int8_needs_ranges_for_vectors_of_any_length() {
    let folder = model("poolings");
    let error =
        load("text-embedding", folder.path(), &["task.encoding=int8".to_owned()]).err().expect("an error");
    assert!(error.contains("task.ranges") && error.contains("is required"), "{error}");
    let ranges = fixture("sentences/dense/ranges.json");
    let set = ["task.encoding=int8".to_owned(), format!("task.ranges={}", ranges.display())];
    let error = load("text-embedding", folder.path(), &set).err().expect("an error");
    assert!(error.contains("ranges.json: has 16 values in a list, but a vector has 192"), "{error}");
}

#[test]
fn vectors_of_long_texts_are_those_of_their_chunks() {
    for name in ["dense", "without-prompt"] {
        let folder = model(name);
        let golden: Vec<Row> = golden(folder.path(), "chunked.json");
        for rows in golden.chunk_by(|a, b| (&a.prompt, a.stride) == (&b.prompt, b.stride)) {
            let mut set = set_prompt(&rows[0].prompt);
            set.extend(["task.overflow=chunk".to_owned(), format!("task.stride={}", rows[0].stride)]);
            let compute = load("text-embedding", folder.path(), &set).expect("a task");
            let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
            for (got, row) in embeddings(&*compute, &texts).iter().zip(rows) {
                close(got, &row.vector, 1e-4, &format!("{name}, {set:?}: {:?}", row.text));
            }
        }
        let set = ["task.overflow=chunk".to_owned(), "task.stride=46".to_owned()];
        let error = load("text-embedding", folder.path(), &set).err().expect("an error");
        assert!(error.contains("task.stride: 46 is not less than the"), "{error}");
    }
}

#[test]
fn a_text_that_fits_is_one_chunk() {
    let folder = model("dense");
    let texts = ["late parcel", "", "invoice error, please refund!"];
    let [one, two] = ["truncate", "chunk"].map(|overflow| {
        let set = [format!("task.overflow={overflow}"), "task.prompt_name=query".to_owned()];
        embeddings(&*load("text-embedding", folder.path(), &set).expect("a task"), &texts)
    });
    assert_eq!(one, two);
}

#[test]
fn the_memory_of_a_record_grows_with_its_chunks() {
    let folder = model("dense");
    let set = ["task.overflow=chunk".to_owned()];
    let compute = load("text-embedding", folder.path(), &set).expect("a task");
    let of = |words: usize| compute.footprint("late ".repeat(words).as_bytes());
    // A sequence of 48 tokens, its answer and what is kept of it, for each 23 tokens: a token may be one byte.
    assert!(of(100_000) - of(50_000) > 250_000 / 23 * (48 * 4 + 16 * 4), "{}", of(100_000) - of(50_000));
}

#[test]
fn scores_of_long_texts_are_those_of_their_chunks() {
    let bert = fixture("bert");
    let of = |set: &[&str], text: &str| {
        let set: Vec<String> = set.iter().map(|set| format!("task.{set}")).collect();
        predict(&*load("text-classification", &bert, &set).expect("a task"), &[text]).remove(0)
    };
    let words = ["late", "parcel", "invoice", "error", "refund"];
    // A word may be several tokens, so chunks are compared with texts of one chunk: a text of equal chunks.
    let text: Vec<&str> = words.iter().copied().cycle().take(200).collect();
    let [mean, max] = ["mean", "max"].map(|which| {
        let of_chunks = format!("chunk_scores={which}");
        of(&["overflow=chunk", "stride=0", &of_chunks], &text.join(" "))
    });
    let (mut sum, mut above) = (0.0, 0);
    for (label, score) in mean["scores"].as_object().expect("scores") {
        sum += score.as_f64().expect("a number");
        above += usize::from(max["scores"][label].as_f64() > score.as_f64());
        assert!(max["scores"][label].as_f64() >= score.as_f64(), "{mean} {max}");
    }
    assert!((sum - 1.0).abs() < 1e-5 && above > 0, "{mean} {max}");
    assert_eq!(of(&["overflow=chunk"], "late parcel"), of(&[], "late parcel"));
}

#[test]
fn candidates_have_a_prompt_of_their_own() {
    let folder = model("dense");
    let candidates = folder.path().join("candidates.jsonl");
    let lines = r#"{"id": "a", "text": "late parcel"}
        {"id": "b", "text": "invoice error"}"#;
    std::fs::write(&candidates, lines).expect("written");
    let score = |set: &[&str]| {
        let mut all = vec![format!("task.candidates={}", candidates.display()), "task.top_k=2".to_owned()];
        all.extend(set.iter().map(|set| format!("task.{set}")));
        let compute = load("similarity", folder.path(), &all).expect("a task");
        let matches = predict(&*compute, &["late parcel"]).remove(0)["matches"].take();
        let found = matches.as_array().expect("matches").iter().find(|found| found["id"] == "a").cloned();
        found.expect("a match")["score"].as_f64().expect("a score")
    };
    let vector = |set: &[&str]| {
        let set: Vec<String> = set.iter().map(|set| format!("task.{set}")).collect();
        floats(
            &embeddings(&*load("text-embedding", folder.path(), &set).expect("a task"), &["late parcel"])[0],
        )
    };
    let dot = |a: &[f32], b: &[f32]| f64::from(a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>());
    let (plain, query, document) =
        (vector(&[]), vector(&["prompt_name=query"]), vector(&["prompt_name=document"]));
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-5, "{a} is not {b}");
    near(score(&[]), 1.0);
    near(score(&["prompt_name=query"]), dot(&query, &plain));
    near(score(&["prompt_name=query", "candidates_prompt_name=document"]), dot(&query, &document));
    near(score(&["candidates_prompt=Invoice "]), dot(&plain, &document));
    near(score(&["prompt_name=query", "candidates_prompt_name=query"]), 1.0);
    let set =
        [format!("task.candidates={}", candidates.display()), "task.candidates_prompt_name=x".to_owned()];
    let error = load("similarity", folder.path(), &set).err().expect("an error");
    assert!(
        error.contains("task.candidates_prompt_name") && error.contains("document, none, query"),
        "{error}"
    );
}

/// A file of NumPy with rows of f32.
pub fn npy(path: &Path, rows: &[Vec<f32>]) {
    let header = format!(
        "{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {}), }}\n",
        rows.len(),
        rows.first().map_or(0, Vec::len)
    );
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(rows.iter().flatten().flat_map(|x| x.to_le_bytes()));
    std::fs::write(path, bytes).expect("written");
}

/// The matches of texts: id and score of each.
fn matches(model: &Path, set: &[String], texts: &[&str]) -> Vec<Vec<(String, f64)>> {
    let compute = load("similarity", model, set).expect("a task");
    let one = |found: &Value| {
        (found["id"].as_str().expect("an id").to_owned(), found["score"].as_f64().expect("a score"))
    };
    let of = |prediction: Value| prediction["matches"].as_array().expect("matches").iter().map(one).collect();
    predict(&*compute, texts).into_iter().map(of).collect()
}

#[test]
fn candidates_may_be_vectors() {
    let folder = model("dense");
    let at = |name: &str| folder.path().join(name);
    let texts: Vec<String> = (0..40).map(|i| format!("invoice {i} late parcel {}", i * 7 % 10)).collect();
    let vectors: Vec<Vec<f32>> = {
        let compute = load("text-embedding", folder.path(), &[]).expect("a task");
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        // Vectors of any length: the scores are cosines.
        embeddings(&*compute, &texts)
            .iter()
            .map(|row| floats(row).iter().map(|x| 3.0 * x).collect())
            .collect()
    };
    let lines: Vec<String> =
        (0..40).map(|i| json!({ "id": format!("#{i}"), "text": texts[i], "more": 1 }).to_string()).collect();
    std::fs::write(at("texts.jsonl"), lines.join("\n")).expect("written");
    std::fs::write(at("ids.txt"), (0..40).map(|i| format!("#{i}\n")).collect::<String>()).expect("written");
    npy(&at("x.npy"), &vectors);
    let bytes: Vec<u8> = vectors.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
    let ids: Vec<u8> = (0..40i64).flat_map(|i| (100 + i).to_le_bytes()).collect();
    let view =
        |dtype, shape: &[usize], bytes| safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes);
    let tensors = [
        ("vectors", view(safetensors::Dtype::F32, &[40, 16], &bytes).expect("a tensor")),
        ("ids", view(safetensors::Dtype::I64, &[40], &ids).expect("a tensor")),
    ];
    let file = safetensors::serialize(tensors, None).expect("a file");
    std::fs::write(at("x.safetensors"), file).expect("written");

    let queries = ["late parcel", "invoice 12", "", "refund please"];
    let set = |candidates: &str, ids: Option<&str>| {
        let mut set =
            vec![format!("task.candidates={}", at(candidates).display()), "task.top_k=7".to_owned()];
        set.extend(ids.map(|ids| format!("task.candidates_ids={}", at(ids).display())));
        set
    };
    let want = matches(folder.path(), &set("texts.jsonl", None), &queries);
    for (candidates, ids, name) in [
        ("x.npy", Some("ids.txt"), (|i| format!("#{i}")) as fn(usize) -> String),
        ("x.npy", Some("texts.jsonl"), |i| format!("#{i}")),
        ("x.npy", None, |i| i.to_string()),
        ("x.safetensors", None, |i| (100 + i).to_string()),
        ("x.safetensors", Some("ids.txt"), |i| format!("#{i}")),
    ] {
        let got = matches(folder.path(), &set(candidates, ids), &queries);
        for (got, want) in got.iter().zip(&want) {
            assert_eq!(got.len(), 7);
            for ((id, score), (of, expected)) in got.iter().zip(want) {
                let index: usize = of[1..].parse().expect("a number");
                assert_eq!(*id, name(index), "{candidates}, {ids:?}");
                assert!((score - expected).abs() < 1e-5, "{score} is not {expected}");
            }
        }
    }
}

#[test]
fn the_memory_of_candidates_counts() {
    let folder = model("dense");
    let path = folder.path().join("x.npy");
    npy(&path, &vec![vec![1.0; 16]; 100_000]);
    let of = |kind: &str, set: &[String]| load(kind, folder.path(), set).expect("a task").about().host_memory;
    let set = [format!("task.candidates={}", path.display())];
    let more = of("similarity", &set) - of("text-embedding", &[]);
    if of("text-embedding", &[]) > 0 {
        assert!((100_000 * 64..100_000 * 66).contains(&more), "{more}");
    }
}

#[test]
fn candidates_that_do_not_fit_are_refused() {
    let folder = model("dense");
    let at = |name: &str| folder.path().join(name);
    let mut rows = vec![vec![1.0; 16]; 5000];
    npy(&at("good.npy"), &rows);
    rows[4500][3] = f32::NAN;
    npy(&at("nan.npy"), &rows);
    rows[4500] = vec![0.0; 16];
    npy(&at("zero.npy"), &rows);
    npy(&at("wide.npy"), &[vec![1.0; 17]]);
    std::fs::write(at("few.txt"), "a\nb\n").expect("written");
    std::fs::write(at("same.txt"), "a\n".repeat(5000)).expect("written");
    std::fs::write(at("no-id.jsonl"), "{\"id\":\"a\"}\n{}\n").expect("written");
    for (candidates, ids, parts) in [
        ("wide.npy", None, &["task.candidates", "wide.npy", "17 values", "the model have 16"][..]),
        ("nan.npy", None, &["nan.npy: row 4500: value 3 is NaN"]),
        ("zero.npy", None, &["zero.npy: row 4500: all values are 0"]),
        ("none.npy", None, &["none.npy", "No such file"]),
        ("good.npy", Some("few.txt"), &["task.candidates_ids", "few.txt: it has 2 ids for 5000 vectors"]),
        ("good.npy", Some("same.txt"), &["duplicate id \"a\""]),
        ("good.npy", Some("no-id.jsonl"), &["task.candidates_ids", "no-id.jsonl:2: missing field `id`"]),
    ] {
        let mut set = vec![format!("task.candidates={}", at(candidates).display())];
        set.extend(ids.map(|ids| format!("task.candidates_ids={}", at(ids).display())));
        let error = load("similarity", folder.path(), &set).err().expect("an error");
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
}
