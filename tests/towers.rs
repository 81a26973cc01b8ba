//! Models of images and texts: the tower of texts against transformers (tests/fixtures/images.py), and photos found by texts.

use crate::support::models::{fixture, golden};
use crate::support::{file, finish, kandle, root};

use kandle::model::{Files, Model, Output, Placement};
use kandle::settings::{self, DeviceChoice, Dtype};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
    vector: Vec<f32>,
}

fn load(name: &str, output: Output, dtype: Dtype) -> Result<Model, String> {
    let placement = Placement::choose(DeviceChoice::Cpu, dtype).expect("a CPU");
    let source = Some(fixture(name).display().to_string());
    let model = settings::Model { source, ..Default::default() };
    Model::load(Files::find(&model).expect("files"), placement, output).map_err(|error| error.to_string())
}

fn texts(name: &str) -> Vec<Text> {
    golden(&fixture(name), "texts.json")
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

const TOWERS: [&str; 4] = ["image-clip-both", "clip-text", "image-siglip-both", "siglip-text"];

#[test]
fn vectors_of_texts_equal_those_of_transformers() {
    for name in TOWERS {
        let model =
            load(name, Output::Embedding, Dtype::F32).unwrap_or_else(|error| panic!("{name}: {error}"));
        let all = texts(name);
        let tokens: Vec<_> = all.iter().map(|text| model.tokens(&text.text).expect("tokens")).collect();
        let together = model.forward(&tokens.iter().collect::<Vec<_>>()).expect("rows");
        for ((want, tokens), got) in all.iter().zip(&tokens).zip(together.iter()) {
            assert_eq!(tokens.ids, want.ids, "{name}: {:?}", want.text);
            assert_eq!(got.len(), want.vector.len(), "{name}");
            let alone = model.forward(&[tokens]).expect("a row");
            for ((got, want_value), alone) in got.iter().zip(&want.vector).zip(alone.row(0)) {
                assert!((got - want_value).abs() < 1e-4, "{name}: {:?}: {got}, not {want_value}", want.text);
                assert!((got - alone).abs() < 1e-5, "{name}: {:?}: {got}, alone {alone}", want.text);
            }
        }
        assert!(tokens.iter().any(|tokens| tokens.truncated), "{name}");
        for (dtype, least) in [(Dtype::Bf16, 0.999), (Dtype::Int8, 0.99)] {
            let model = load(name, Output::Embedding, dtype).expect("a model");
            let rows = model.forward(&tokens.iter().collect::<Vec<_>>()).expect("rows");
            let lowest = rows.iter().zip(&all).map(|(row, want)| cosine(row, &want.vector)).reduce(f32::min);
            assert!(lowest.is_some_and(|lowest| lowest > least), "{name}, {dtype:?}: {lowest:?}");
        }
    }
}

#[test]
fn chunks_of_a_long_text_end_as_whole_texts_do() {
    for name in TOWERS {
        let model = load(name, Output::Embedding, Dtype::F32).expect("a model");
        let end = model.tokens("cat").expect("tokens");
        for (tokens, length) in model.chunks(&"a cat ".repeat(30), 2).expect("chunks") {
            assert!(length > 0 && tokens.ids.len() <= 16, "{name}");
            assert_eq!(tokens.ids.last(), end.ids.last(), "{name}");
            model.forward(&[&tokens]).expect("a row");
        }
    }
}

#[test]
fn towers_are_for_embeddings_alone() {
    for name in ["image-clip-both", "siglip-text"] {
        for output in [Output::Logits, Output::PairLogits, Output::TokenLogits, Output::Sparse] {
            let error = load(name, output, Dtype::F32).err().expect("an error");
            assert!(
                error.contains("supported: task.kind text-embedding, similarity, image-embedding"),
                "{error}"
            );
        }
    }
    // It has no tower of texts.
    let error = load("image-clip-labels", Output::Embedding, Dtype::F32).err().expect("an error");
    assert!(error.contains("tokenizer.json"), "{error}");
}

/// What a command of kandle prints for each record.
fn predict(arguments: &[String], input: &str) -> Vec<Value> {
    let (code, out, error) = finish(kandle().args(arguments), input.as_bytes());
    assert_eq!(code, 0, "{out}{error}");
    out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// The example config/examples/image-search.yaml, in the steps that it describes.
#[test]
fn photos_are_found_by_a_text() {
    for name in ["image-clip-both", "image-siglip-both"] {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name).display().to_string();
        let source = fixture(name).display().to_string();
        // The photos' vectors.
        let names = ["small-3.png", "small-4.png", "small-5.png"];
        let embed = file(
            "embed-photos.yaml",
            &format!(
                "kafka: {{ brokers: \"none:1\" }}\n\
                 input: {{ topics: [photos], group: g, format: image }}\n\
                 task: {{ kind: image-embedding }}\n\
                 model: {{ source: \"{source}\" }}\n\
                 output: {{ topic: vectors }}\n\
                 dead_letters: {{ topic: dead }}\n"
            ),
        );
        let photos = names.map(|name| root().join("tests/fixtures/images").join(name).display().to_string());
        let config = ["-c".to_owned(), embed.path.display().to_string()];
        let embedded = predict(&[&["predict".to_owned()][..], &photos, &config].concat(), "");
        let row =
            |value: &Value| serde_json::from_value::<Vec<f32>>(value["embedding"].clone()).expect("floats");
        let vectors: Vec<Vec<f32>> = embedded.iter().map(row).collect();
        crate::embeddings::npy(&folder.path().join("photos.npy"), &vectors);
        std::fs::write(at("photos.txt"), names.join("\n")).expect("written");
        // The queries.
        let all = texts(name);
        let queries: String =
            all.iter().map(|text| json!({ "query": text.text }).to_string() + "\n").collect();
        let example = root().join("config/examples/image-search.yaml").display().to_string();
        let set = [
            format!("model.source={source}"),
            format!("task.candidates={}", at("photos.npy")),
            format!("task.candidates_ids={}", at("photos.txt")),
        ];
        let set = set.into_iter().flat_map(|set| ["--set".to_owned(), set]);
        let arguments = ["predict".to_owned(), "-c".to_owned(), example].into_iter().chain(set);
        let found = predict(&arguments.collect::<Vec<_>>(), &queries);
        assert_eq!(found.len(), all.len());
        for (found, text) in found.iter().zip(&all) {
            let matches = found["matches"].as_array().expect("matches");
            let mut want: Vec<(f32, &str)> = vectors
                .iter()
                .zip(names)
                .map(|(vector, name)| (cosine(vector, &text.vector), name))
                .collect();
            want.sort_by(|a, b| b.0.total_cmp(&a.0));
            assert_eq!(matches.len(), want.len());
            for (found, (score, id)) in matches.iter().zip(want) {
                assert_eq!(found["id"], id, "{name}: {:?}", text.text);
                assert!((found["score"].as_f64().expect("a score") - f64::from(score)).abs() < 1e-4);
            }
        }
    }
}
