//! Every architecture against the outputs of Hugging Face's transformers (tests/fixtures/make.py), within 1e-4. The
//! result of a record does not depend on its batch, within 1e-5.

#[path = "support/models.rs"]
mod models;

use std::path::Path;

use kandle::model::{
    Files, FilesError, Model, Output, Placement, Pooling, Prompt, Shorten, TextSettings, Tokenizer, Tokens,
};
use kandle::settings::{self, DeviceChoice, Dtype};
use models::{copy, copy_of, fixture};
use serde::Deserialize;

const ARCHITECTURES: [&str; 16] = [
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "electra",
    "albert",
    "mpnet",
    "modernbert",
    "nomic_bert",
    "gte",
    "qwen3",
    "gemma3_text",
    "deberta-v2",
    "deberta-v3",
    "jina",
];

#[derive(Deserialize)]
struct Golden {
    text: String,
    ids: Vec<u32>,
    truncated: bool,
    logits: Vec<f32>,
    mean: Vec<f32>,
    first: Vec<f32>,
    last: Vec<f32>,
}

fn golden(name: &str) -> Vec<Golden> {
    models::golden(&fixture(name), "golden.json")
}

/// The CPU, or the device that KANDLE_TEST_DEVICE names.
fn placement(dtype: Dtype) -> Placement {
    let device = std::env::var("KANDLE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    Placement::choose(DeviceChoice::try_from(device).expect("a device"), dtype).expect("a device")
}

fn load(directory: &Path, output: Output) -> Model {
    let placement = placement(Dtype::F32);
    let model = settings::Model { source: Some(directory.display().to_string()), ..Default::default() };
    Model::load(Files::find(&model).expect("files"), placement, output).expect("a model")
}

/// The lowest cosine similarity between the mean embeddings of a model and Hugging Face's in f32.
fn least_cosine(name: &str, placement: Placement) -> f64 {
    let source = Some(fixture(name).display().to_string());
    let model = settings::Model { source, ..Default::default() };
    let model =
        Model::load(Files::find(&model).expect("files"), placement, Output::Embedding).expect("a model");
    let golden = golden(name);
    let tokens = tokens(&model, &golden);
    let rows = model.forward(&tokens.iter().collect::<Vec<_>>()).expect("rows");
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine = |(a, golden): (&[f32], &Golden)| {
        dot(a, &golden.mean) / (dot(a, a) * dot(&golden.mean, &golden.mean)).sqrt()
    };
    rows.iter().zip(&golden).map(cosine).reduce(f64::min).expect("rows")
}

/// In two layers of width 32, rounding errors hardly average out: a real model loses a tenth of this
/// (benches/RESULTS.md).
#[test]
fn lower_precisions_stay_close_to_f32() {
    for name in ARCHITECTURES {
        // A gated MLP multiplies two values that both have a rounding error.
        let int8 = match name {
            "nomic_bert" | "gte" | "jina" => 0.99,
            // Eight layers instead of two.
            "albert" => 0.93,
            "mpnet" => 0.995,
            _ => 0.998,
        };
        let other = match placement(Dtype::F32).is_cpu() {
            true => (Dtype::Int8, int8),
            false => (Dtype::F16, 0.998),
        };
        let bf16 = if name == "albert" { 0.995 } else { 0.998 };
        for (dtype, least) in [other, (Dtype::Bf16, bf16)] {
            let cosine = least_cosine(name, placement(dtype));
            assert!(cosine >= least, "{name} in {dtype:?}: {cosine}");
        }
    }
}

fn tokens(model: &Model, golden: &[Golden]) -> Vec<Tokens> {
    golden.iter().map(|g| model.tokenizer.encode(&g.text).expect("tokens")).collect()
}

#[track_caller]
fn close(got: &[f32], want: &[f32], within: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= within, "{what}[{i}]: {g} is not {w} within {within}");
    }
}

/// A copy of a fixture with some files added or replaced.
fn with(name: &str, files: &[(&str, String)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::copy(fixture(name).join(file), directory.path().join(file)).expect("copied");
    }
    for (file, content) in files {
        let path = directory.path().join(file);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        std::fs::write(path, content).expect("written");
    }
    directory
}

#[test]
fn tokens_and_logits_equal_those_of_transformers() {
    for name in ARCHITECTURES {
        let model = load(&fixture(name), Output::Logits);
        assert_eq!(model.labels, ["calm", "urgent", "spam"], "{name}");
        for golden in golden(name) {
            let tokens = model.tokenizer.encode(&golden.text).expect("tokens");
            assert_eq!(tokens.ids, golden.ids, "{name}: {:?}", golden.text);
            assert_eq!(tokens.truncated, golden.truncated, "{name}: {:?}", golden.text);
            let logits = model.forward(&[&tokens]).expect("logits");
            close(logits.row(0), &golden.logits, 1e-4, &format!("{name}: {:?}", golden.text));
        }
    }
}

#[test]
fn a_config_json_of_transformers_4_gives_the_same_model() {
    for name in ARCHITECTURES {
        let old = std::fs::read_to_string(fixture(name).join("config.v4.json")).expect("config.v4.json");
        assert!(old.contains("torch_dtype"), "{name}");
        let directory = with(name, &[("config.json", old)]);
        let model = load(directory.path(), Output::Logits);
        for golden in golden(name).iter().take(30) {
            let tokens = model.tokenizer.encode(&golden.text).expect("tokens");
            close(model.forward(&[&tokens]).expect("logits").row(0), &golden.logits, 1e-4, name);
        }
    }
}

#[test]
fn embeddings_for_every_pooling() {
    let modules = |normalize: bool| {
        let mut list = vec![
            serde_json::json!({"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}),
            serde_json::json!({"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}),
        ];
        if normalize {
            list.push(serde_json::json!({"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}));
        }
        serde_json::Value::from(list).to_string()
    };
    let old = |mode: &str| {
        let mut config = serde_json::json!({ "word_embedding_dimension": 32 });
        for known in [
            "cls_token",
            "mean_tokens",
            "max_tokens",
            "mean_sqrt_len_tokens",
            "weightedmean_tokens",
            "lasttoken",
        ] {
            config[format!("pooling_mode_{known}")] = (known == mode).into();
        }
        config.to_string()
    };
    let new = |mode: &str| serde_json::json!({ "embedding_dimension": 32, "pooling_mode": mode }).to_string();
    for name in ARCHITECTURES {
        let mean: fn(&Golden) -> &Vec<f32> = |golden| &golden.mean;
        for (pooling, want, configs) in [
            (Pooling::Mean, mean, [old("mean_tokens"), new("mean")]),
            (Pooling::First, |golden| &golden.first, [old("cls_token"), new("cls")]),
            (Pooling::Last, |golden| &golden.last, [old("lasttoken"), new("lasttoken")]),
        ] {
            for (i, config) in configs.into_iter().enumerate() {
                let normalize = i == 1;
                let directory =
                    with(name, &[("modules.json", modules(normalize)), ("1_Pooling/config.json", config)]);
                let model = load(directory.path(), Output::Embedding);
                assert_eq!(
                    (&model.embedding.poolings[..], model.embedding.normalize),
                    (&[pooling][..], normalize),
                    "{name}"
                );
                let golden = golden(name);
                let tokens = tokens(&model, &golden);
                let rows = model.forward(&tokens.iter().collect::<Vec<_>>()).expect("rows");
                for (row, golden) in rows.iter().zip(&golden) {
                    close(row, want(golden), 1e-4, &format!("{name} {pooling:?}: {:?}", golden.text));
                }
            }
        }
    }
}

#[test]
fn other_poolings_equal_those_of_sentence_transformers() {
    let text = std::fs::read_to_string(fixture("bert").join("poolings.json")).expect("poolings.json");
    let golden: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
    for mode in ["max", "mean_sqrt_len_tokens", "weightedmean"] {
        let modules = r#"[{"type": "sentence_transformers.models.Transformer", "path": ""},
            {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]"#;
        let config = serde_json::json!({ "embedding_dimension": 32, "pooling_mode": mode }).to_string();
        let folder = with("bert", &[("modules.json", modules.to_owned()), ("1_Pooling/config.json", config)]);
        let model = load(folder.path(), Output::Embedding);
        for golden in &golden {
            let tokens = model.tokens(golden["text"].as_str().expect("a text")).expect("tokens");
            let rows = model.forward(&[&tokens]).expect("a row");
            let want: Vec<f32> = serde_json::from_value(golden[mode].clone()).expect("floats");
            close(rows.row(0), &want, 1e-4, mode);
        }
    }
}

/// `bert` with the modules of a folder of the fixture `sentences`.
fn with_modules(name: &str) -> tempfile::TempDir {
    let folder = with("bert", &[]);
    copy(&fixture("sentences").join(name), folder.path());
    folder
}

#[test]
fn vectors_of_modules_equal_those_of_sentence_transformers() {
    #[derive(Deserialize)]
    struct Row {
        text: String,
        prompt: Option<String>,
        vector: Vec<f32>,
    }
    for name in ["dense", "activations", "poolings", "without-prompt"] {
        let folder = with_modules(name);
        let model = load(folder.path(), Output::Embedding);
        let golden: Vec<Row> = models::golden(folder.path(), "golden.json");
        let prompts = &model.embedding.prompts;
        let mut batch = Vec::new();
        for row in &golden {
            let text = row.prompt.as_ref().map(|prompt| prompts.get(prompt).expect("a prompt").to_owned());
            let prompt = match text {
                Some(text) => Prompt::new(text, &model.tokenizer, &model.embedding).expect("tokens"),
                None => model.prompt.clone(),
            };
            batch.push(model.prompted(&prompt, &row.text).expect("tokens"));
        }
        let rows = model.forward(&batch.iter().collect::<Vec<_>>()).expect("rows");
        assert_eq!(model.width(), golden[0].vector.len(), "{name}");
        for (got, row) in rows.iter().zip(&golden) {
            let mut got = got.to_vec();
            if model.embedding.normalize {
                let length = got.iter().map(|x| x * x).sum::<f32>().sqrt();
                got.iter_mut().for_each(|x| *x /= length);
            }
            close(&got, &row.vector, 1e-4, &format!("{name}, {:?}: {:?}", row.prompt, row.text));
        }
        let files = model.files.names().expect("names");
        let weights = files.iter().filter(|file| file.contains("Dense") && !file.ends_with(".json")).count();
        assert_eq!(
            weights,
            model.embedding.layers.iter().filter(|layer| layer.to_string().contains("dense")).count()
        );
    }
}

#[test]
fn modules_that_do_not_fit_are_refused_by_name() {
    let modules = |list: &[(&str, &str)]| {
        let entry = |(kind, path): &(&str, &str)| serde_json::json!({ "type": format!("sentence_transformers.models.{kind}"), "path": path });
        serde_json::Value::from(list.iter().map(entry).collect::<Vec<_>>()).to_string()
    };
    let (transformer, pooling, dense) = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"));
    for (list, file, content, parts) in [
        (
            &[transformer, ("WeightedLayerPooling", "1_Pooling")][..],
            "",
            "",
            &["models.WeightedLayerPooling is not supported", "Transformer, Pooling, Dense, LayerNorm"][..],
        ),
        (&[transformer, dense], "", "", &["Dense at place 1", "after a Pooling"]),
        (&[pooling, transformer], "", "", &["a Transformer at place 0"]),
        (
            &[transformer, pooling, dense],
            "2_Dense/config.json",
            r#"{"in_features": 24, "out_features": 2}"#,
            &["2_Dense/config.json", "takes 24 values", "gives 32"],
        ),
        (
            &[transformer, pooling, dense],
            "2_Dense/config.json",
            r#"{"in_features": 32, "out_features": 9}"#,
            &["2_Dense/model.safetensors", "linear.weight"],
        ),
        (
            &[transformer, pooling, dense],
            "2_Dense/config.json",
            r#"{"in_features": 32, "out_features": 24, "use_residual": true}"#,
            &["2_Dense/config.json", "use_residual"],
        ),
        (
            &[transformer, pooling, dense],
            "config_sentence_transformers.json",
            r#"{"default_prompt_name": "x"}"#,
            &["default_prompt_name \"x\"", "a name in prompts"],
        ),
    ] {
        let folder = with_modules("dense");
        std::fs::write(folder.path().join("modules.json"), modules(list)).expect("written");
        if !file.is_empty() {
            std::fs::write(folder.path().join(file), content).expect("written");
        }
        let error = refusal(folder.path(), Output::Embedding);
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
    let folder = with_modules("dense");
    std::fs::remove_file(folder.path().join("2_Dense/model.safetensors")).expect("removed");
    let error = refusal(folder.path(), Output::Embedding);
    assert!(error.contains("2_Dense/model.safetensors is missing"), "{error}");
}

/// Why a model cannot be loaded.
fn refusal(directory: &Path, output: Output) -> String {
    let model = settings::Model { source: Some(directory.display().to_string()), ..Default::default() };
    let files = Files::find(&model).expect("files");
    Model::load(files, placement(Dtype::F32), output).err().expect("an error").to_string()
}

#[test]
fn a_models_default_prompt_is_put_before_every_text() {
    let prompts = r#"{"prompts": {"query": "late ", "document": ""}, "default_prompt_name": "query"}"#;
    let modules = r#"[{"type": "sentence_transformers.models.Transformer", "path": ""}]"#;
    let directory = with(
        "bert",
        &[("modules.json", modules.to_owned()), ("config_sentence_transformers.json", prompts.to_owned())],
    );
    let model = load(directory.path(), Output::Embedding);
    assert_eq!(
        model.tokens("parcel").expect("tokens"),
        model.tokenizer.encode("late parcel").expect("tokens")
    );
    // A classifier ignores the prompt.
    let model = load(directory.path(), Output::Logits);
    assert_eq!(model.tokens("parcel").expect("tokens"), model.tokenizer.encode("parcel").expect("tokens"));
}

#[test]
fn a_long_text_keeps_the_tokens_that_tokenizing_all_of_it_gives() {
    let words =
        ["parcel", "late", "größe", "東京 данные", "x1", "refund,", "http://example.org/a?b=c", "\n", "!"];
    let mut long = String::new();
    for i in 0..40_000usize {
        long.push_str(words[i * i % 7 + i % 3]);
        long.push_str(if i % 11 == 0 { "  " } else { " " });
    }
    let spaces = format!("late {}parcel", " ".repeat(300_000));
    let endless = "parcel".repeat(50_000);
    for name in ARCHITECTURES {
        for side in ["right", "left"] {
            let config = format!("{{\"model_max_length\": 32, \"truncation_side\": \"{side}\"}}");
            let directory = with(name, &[("tokenizer_config.json", config)]);
            let model = load(directory.path(), Output::Logits);
            let mut whole =
                tokenizers::Tokenizer::from_file(fixture(name).join("tokenizer.json")).expect("a tokenizer");
            let direction = match side {
                "left" => tokenizers::TruncationDirection::Left,
                _ => tokenizers::TruncationDirection::Right,
            };
            let truncation = tokenizers::TruncationParams { max_length: 32, direction, ..Default::default() };
            whole.with_truncation(Some(truncation)).expect("a limit").with_padding(None);
            for text in [&long, &spaces, &endless] {
                let got = model.tokenizer.encode(text).expect("tokens");
                let want = whole.encode_fast(text.as_str(), true).expect("tokens");
                assert_eq!(got.ids, want.get_ids(), "{name}, {side}");
                assert_eq!(got.truncated, !want.get_overflowing().is_empty(), "{name}, {side}");
            }
        }
    }
}

#[test]
fn a_record_is_predicted_the_same_in_any_batch() {
    for name in ARCHITECTURES {
        let model = load(&fixture(name), Output::Logits);
        let golden = golden(name);
        let mut batch = tokens(&model, &golden);
        let more: Vec<Tokens> = batch.iter().cycle().take(64 - batch.len()).cloned().collect();
        batch.extend(more);
        let all: Vec<&Tokens> = batch.iter().collect();
        assert_eq!(all.len(), 64);
        let together = model.forward(&all).expect("rows");
        // As bisection would run them.
        let mut halves = model.forward(&all[..32]).expect("rows");
        halves.append(&model.forward(&all[32..]).expect("rows"));
        let mut reversed = all.clone();
        reversed.reverse();
        let backwards = model.forward(&reversed).expect("rows");
        for (i, tokens) in all.iter().enumerate() {
            let alone = model.forward(&[tokens]).expect("row");
            let what = format!("{name} record {i}");
            let alone = alone.row(0);
            close(together.row(i), alone, 1e-5, &what);
            close(halves.row(i), alone, 1e-5, &what);
            close(backwards.row(63 - i), alone, 1e-5, &what);
        }
    }
}

/// A fixture without some of its files.
fn without(name: &str, files: &[&str]) -> tempfile::TempDir {
    let folder = with(name, &[]);
    for file in files {
        std::fs::remove_file(folder.path().join(file)).expect("removed");
    }
    folder
}

/// `bert` with weights in PyTorch's form, a file of the fixture `pickles`.
fn with_pickle(file: &str) -> tempfile::TempDir {
    let folder = without("bert", &["model.safetensors"]);
    std::fs::copy(fixture("pickles").join(file), folder.path().join("pytorch_model.bin")).expect("copied");
    folder
}

#[test]
fn weights_of_pytorch_give_the_same_results() {
    let golden = golden("bert");
    for (file, within) in
        [("early.bin", 1e-4), ("bf16.bin", 0.1), ("legacy.bin", 1e-4), ("legacy-evil.bin", 0.02)]
    {
        let folder = with_pickle(file);
        let model = load(folder.path(), Output::Logits);
        assert_eq!(model.files.names().expect("names")[1..3], ["pytorch_model.bin", "tokenizer.json"]);
        let tokens = tokens(&model, &golden);
        let rows = model.forward(&tokens.iter().collect::<Vec<_>>()).expect("rows");
        for (row, golden) in rows.iter().zip(&golden) {
            close(row, &golden.logits, within, file);
        }
    }
}

#[test]
fn shards_of_the_form_before_zip_files_give_the_same_results() {
    let folder = without("bert", &["model.safetensors"]);
    let shards = ["legacy-00001-of-00002.bin", "legacy-00002-of-00002.bin"];
    let map: serde_json::Map<_, _> =
        shards.iter().map(|shard| (format!("a tensor of {shard}"), (*shard).into())).collect();
    let index = serde_json::json!({ "weight_map": map }).to_string();
    std::fs::write(folder.path().join("pytorch_model.bin.index.json"), index).expect("written");
    for shard in shards {
        std::fs::copy(fixture("pickles").join(shard), folder.path().join(shard)).expect("copied");
    }
    let (legacy, zipped) =
        (load(folder.path(), Output::Logits), load(with_pickle("bf16.bin").path(), Output::Logits));
    for golden in golden("bert") {
        let tokens = legacy.tokenizer.encode(&golden.text).expect("tokens");
        let row = |model: &Model| model.forward(&[&tokens]).expect("logits").row(0).to_vec();
        assert_eq!(row(&legacy), row(&zipped), "{:?}", golden.text);
    }
}

#[test]
fn a_pickle_runs_no_code() {
    let marker = Path::new("/tmp/kandle-unpickled");
    for file in ["evil.bin", "legacy-evil.bin"] {
        let _ = std::fs::remove_file(marker);
        load(with_pickle(file).path(), Output::Logits);
        assert!(!marker.exists(), "{file} ran its command");
    }
}

/// The vocabulary in a fixture's tokenizer.json, by id.
fn vocabulary(name: &str) -> (serde_json::Value, Vec<String>) {
    let text = std::fs::read_to_string(fixture(name).join("tokenizer.json")).expect("tokenizer.json");
    let tokenizer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let ids = tokenizer["model"]["vocab"].as_object().expect("a vocabulary");
    let mut tokens: Vec<(u64, String)> =
        ids.iter().map(|(token, id)| (id.as_u64().expect("an id"), token.clone())).collect();
    tokens.sort();
    (tokenizer, tokens.into_iter().map(|(_, token)| token).collect())
}

#[test]
fn a_vocabulary_without_tokenizer_json_gives_the_same_tokens() {
    let pieces = |name: &str| vocabulary(name).1.join("\n") + "\n";
    let bpe = vocabulary("roberta").0;
    let merges: Vec<String> = bpe["model"]["merges"].as_array().expect("merges").iter().map(merge).collect();
    let merges = format!("#version: 0.2\n{}\n", merges.join("\n"));
    for (name, files) in [
        ("bert", vec![("vocab.txt", pieces("bert"))]),
        ("distilbert", vec![("vocab.txt", pieces("distilbert"))]),
        ("electra", vec![("vocab.txt", pieces("electra"))]),
        ("roberta", vec![("vocab.json", bpe["model"]["vocab"].to_string()), ("merges.txt", merges)]),
    ] {
        // The class in the fixture is none that a vocabulary belongs to: the model's type counts then.
        let folder = without(name, &["tokenizer.json"]);
        for (file, content) in files {
            std::fs::write(folder.path().join(file), content).expect("written");
        }
        std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"model_max_length": 48}"#)
            .expect("written");
        let model = load(folder.path(), Output::Logits);
        for golden in golden(name) {
            let tokens = model.tokenizer.encode(&golden.text).expect("tokens");
            assert_eq!(
                (tokens.ids, tokens.truncated),
                (golden.ids, golden.truncated),
                "{name}: {:?}",
                golden.text
            );
        }
        assert!(model.files.names().expect("names").iter().any(|file| file.starts_with("vocab.")));
    }
}

/// The token ids of difficult texts, alone and before "late parcel".
#[derive(Deserialize)]
struct GoldenIds {
    /// In tokenizer_config.json.
    config: serde_json::Map<String, serde_json::Value>,
    rows: Vec<GoldenRow>,
}

#[derive(Deserialize)]
struct GoldenRow {
    text: String,
    ids: Vec<u32>,
    pair: Vec<u32>,
}

/// A copy of a fixture whose tokenizer_config.json has these values too.
fn with_settings(name: &str, more: &serde_json::Map<String, serde_json::Value>) -> tempfile::TempDir {
    let text = std::fs::read_to_string(fixture(name).join("tokenizer_config.json")).expect("a file");
    let mut config: serde_json::Map<_, _> = serde_json::from_str(&text).expect("JSON");
    config.extend(more.clone());
    let folder = copy_of(name);
    let config = serde_json::Value::Object(config).to_string();
    std::fs::write(folder.path().join("tokenizer_config.json"), config).expect("written");
    folder
}

fn tokenizer(directory: &Path) -> Result<Tokenizer, FilesError> {
    let model = settings::Model { source: Some(directory.display().to_string()), ..Default::default() };
    Tokenizer::load(&Files::find(&model).expect("files"), 512, 2, TextSettings::default())
}

const SENTENCEPIECE: [(&str, &str); 4] = [
    ("spm-xlm-roberta", "sentencepiece.bpe.model"),
    ("spm-camembert", "sentencepiece.bpe.model"),
    ("spm-albert", "spiece.model"),
    ("spm-deberta", "spm.model"),
];

#[test]
fn a_sentencepiece_model_gives_the_tokens_of_transformers() {
    for (name, _) in SENTENCEPIECE {
        let golden: Vec<GoldenIds> = models::golden(&fixture(name), "golden.json");
        for GoldenIds { config, rows } in golden {
            let directory = with_settings(name, &config);
            let tokenizer = tokenizer(directory.path()).expect("a tokenizer");
            for row in rows {
                let what = format!("{name} {config:?} {:?}", row.text);
                assert_eq!(tokenizer.encode(&row.text).expect("tokens").ids, row.ids, "{what}");
                let part = |text: &str| tokenizer.part(text.to_owned()).expect("a part");
                let pair = tokenizer.pair(&part(&row.text), &part("late parcel"), Shorten::Longer);
                assert_eq!(pair.expect("tokens").ids, row.pair, "{what}");
            }
        }
    }
}

#[test]
fn what_is_not_reproduced_of_a_sentencepiece_model_is_refused() {
    let refusal = |folder: &Path| tokenizer(folder).err().expect("an error").to_string();
    let has_command = |message: &str| {
        assert!(message.contains("AutoTokenizer.from_pretrained('.').save_pretrained('.')"), "{message}")
    };
    for (name, file) in SENTENCEPIECE {
        let folder = copy_of(name);
        let path = folder.path().join(file);
        let model = std::fs::read(&path).expect("a model");
        // Appended fields replace those before them: of trainer_spec (2), or of normalizer_spec (3).
        for (fields, rule) in [
            ([0x12, 2, 3 << 3, 2], "model_type BPE"),
            ([0x1a, 2, 3 << 3, 0], "add_dummy_prefix: false"),
            ([0x1a, 2, 4 << 3, 0], "remove_extra_whitespaces: false"),
        ] {
            std::fs::write(&path, [&model[..], &fields].concat()).expect("written");
            let message = refusal(folder.path());
            assert!(message.starts_with(&format!("{file}: {rule} is not supported")), "{message}");
            has_command(&message);
        }
    }
    for (name, file, content, says) in [
        (
            "spm-deberta",
            "added_tokens.json",
            r#"{"[MASK]": 5000}"#,
            "\"[MASK]\" has the id 5000, but the vocabulary gives it",
        ),
        (
            "spm-albert",
            "special_tokens_map.json",
            r#"{"cls_token": "<cls>"}"#,
            "cls_token is \"<cls>\", and only \"[CLS]\"",
        ),
        (
            "spm-camembert",
            "tokenizer_config.json",
            r#"{"add_prefix_space": false}"#,
            "add_prefix_space: false",
        ),
        ("spm-xlm-roberta", "tokenizer_config.json", r#"{"do_lower_case": true}"#, "do_lower_case: true"),
    ] {
        let folder = copy_of(name);
        std::fs::write(folder.path().join(file), content).expect("written");
        let message = refusal(folder.path());
        assert!(message.starts_with("tokenizer_config.json: ") && message.contains(says), "{message}");
        has_command(&message);
    }
}

#[test]
fn a_checkpoint_with_a_sentencepiece_model_loads() {
    let folder = without("xlm-roberta", &["tokenizer.json", "tokenizer_config.json"]);
    let file = "sentencepiece.bpe.model";
    std::fs::copy(fixture("spm-xlm-roberta").join(file), folder.path().join(file)).expect("copied");
    let model = load(folder.path(), Output::Logits);
    assert!(model.files.names().expect("names").contains(&file.to_owned()));
    let tokens = model.tokenizer.encode("a late parcel").expect("tokens");
    assert_eq!((tokens.ids[0], *tokens.ids.last().expect("ids")), (0, 2));
    assert!(model.forward(&[&tokens]).expect("logits").row(0).iter().all(|logit| logit.is_finite()));
}

/// A merge of a BPE: a pair, or its two parts with a space between.
fn merge(pair: &serde_json::Value) -> String {
    match pair.as_array() {
        Some(parts) => parts.iter().filter_map(|part| part.as_str()).collect::<Vec<_>>().join(" "),
        None => pair.as_str().expect("a merge").to_owned(),
    }
}

#[test]
fn a_model_that_cannot_be_loaded_fails_with_the_reason() {
    let error = |directory: &Path, output| {
        let model = settings::Model { source: Some(directory.display().to_string()), ..Default::default() };
        let placement = Placement::choose(DeviceChoice::Cpu, Dtype::F32).expect("cpu");
        match Files::find(&model)
            .map_err(|e| e.to_string())
            .and_then(|f| Model::load(f, placement, output).map_err(|e| e.to_string()))
        {
            Ok(_) => panic!("loaded"),
            Err(message) => message,
        }
    };
    let bare = with("bert", &[]);
    std::fs::remove_file(bare.path().join("model.safetensors")).expect("removed");
    assert!(error(bare.path(), Output::Logits).contains("no weights"));

    let config = std::fs::read_to_string(fixture("bert").join("config.json")).expect("config");
    let wide = with(
        "bert",
        &[("config.json", config.replace("\"intermediate_size\": 64", "\"intermediate_size\": 96"))],
    );
    let message = error(wide.path(), Output::Logits);
    assert!(message.contains("shape mismatch") && message.contains("intermediate.dense"), "{message}");

    let deep = with(
        "bert",
        &[("config.json", config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"))],
    );
    let message = error(deep.path(), Output::Logits);
    assert!(message.contains("cannot find tensor") && message.contains("layer.2"), "{message}");

    let strange = with(
        "bert",
        &[("config.json", config.replace("\"model_type\": \"bert\"", "\"model_type\": \"llama\""))],
    );
    let message = error(strange.path(), Output::Logits);
    assert!(
        message.contains("\"llama\"")
            && message.contains(
                "albert, bert, camembert, clip, clip_text_model, deberta-v2, distilbert, electra, gemma3_text, gte, \
                 modernbert, mpnet, new, nomic_bert"
            ),
        "{message}"
    );
    // A generator's error names a checkpoint that does the job.
    for (name, instead) in [
        ("llama", "Qwen3-Embedding"),
        ("gpt2", "Qwen3-Reranker"),
        ("bart", "xlm-roberta-large-xnli"),
        ("t5", "multilingual-e5-large"),
    ] {
        let named = config.replace("\"model_type\": \"bert\"", &format!("\"model_type\": \"{name}\""));
        let message = error(with("bert", &[("config.json", named)]).path(), Output::Embedding);
        assert!(message.contains(instead), "{message}");
    }
    let qwen3 = std::fs::read_to_string(fixture("qwen3").join("config.json")).expect("config");
    for (from, to, says) in [
        (
            "\"use_sliding_window\": false",
            "\"use_sliding_window\": true",
            "use_sliding_window true is not supported",
        ),
        ("full_attention", "sliding_attention", "layer_types: sliding_attention is not supported"),
        ("\"rope_type\": \"default\"", "\"rope_type\": \"yarn\"", "rope_parameters.rope_type \"yarn\""),
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "does not divide num_attention_heads 4"),
        ("\"head_dim\": 12", "\"head_dim\": 13", "head_dim 13 is odd"),
    ] {
        assert!(qwen3.contains(from), "{from}");
        let message =
            error(with("qwen3", &[("config.json", qwen3.replace(from, to))]).path(), Output::Logits);
        assert!(message.contains(says), "{message}");
    }

    assert!(error(Path::new("/no/such/model"), Output::Logits).contains("no such directory"));

    // The error about a missing file says how to make it.
    let file =
        |path: &Path, name: &str, content: &str| std::fs::write(path.join(name), content).expect("written");
    file(bare.path(), "tf_model.h5", "x");
    let message = error(bare.path(), Output::Logits);
    assert!(message.contains("only tf_model.h5") && message.contains("safe_serialization=True"), "{message}");
    std::fs::remove_file(bare.path().join("tf_model.h5")).expect("removed");
    let pickle = with_pickle("legacy.bin");
    let weights = pickle.path().join("pytorch_model.bin");
    let whole = std::fs::read(&weights).expect("weights");
    for (broken, says) in
        [(&whole[..whole.len() - 1], "cut short"), (&whole[..300], "pytorch_model.bin"), (b"junk", "zip")]
    {
        std::fs::write(&weights, broken).expect("written");
        let message = error(pickle.path(), Output::Logits).to_lowercase();
        assert!(message.contains(says) && message.contains("weights_only=true"), "{message}");
    }
    std::fs::create_dir(bare.path().join("onnx")).expect("made");
    file(&bare.path().join("onnx"), "model.onnx", "");
    let message = error(bare.path(), Output::Logits);
    assert!(message.contains("only onnx/model.onnx") && message.contains("exported from"), "{message}");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n";
    file(bare.path(), "model.safetensors", pointer);
    let message = error(bare.path(), Output::Logits);
    assert!(message.contains("model.safetensors is a pointer of Git LFS"), "{message}");
    let untold = with("bert", &[]);
    std::fs::remove_file(untold.path().join("tokenizer.json")).expect("removed");
    let message = error(untold.path(), Output::Logits);
    assert!(message.contains("tokenizer.json is missing; create it with Python"), "{message}");

    // Unknown keys and unsupported values are refused by name.
    let extended = |key: &str, value: &str| {
        with("bert", &[("config.json", config.replacen('{', &format!("{{\"{key}\": {value},"), 1))])
    };
    for (key, value, message) in [
        ("layer_scale", "0.5", "kandle does not know layer_scale"),
        ("is_decoder", "true", "is_decoder: true is not supported"),
        ("problem_type", "\"ordinal\"", "problem_type \"ordinal\" is not supported"),
    ] {
        let changed = config.replace("\"is_decoder\": false,", "");
        let model =
            with("bert", &[("config.json", changed.replacen('{', &format!("{{\"{key}\": {value},"), 1))]);
        let said = error(model.path(), Output::Logits);
        assert!(said.contains(message), "{said}");
    }
    let ignored = extended("layer_scale", "0.5");
    let model = settings::Model {
        source: Some(ignored.path().display().to_string()),
        ignore_config: vec!["layer_scale".to_owned()],
        ..Default::default()
    };
    let placement = Placement::choose(DeviceChoice::Cpu, Dtype::F32).expect("cpu");
    Model::load(Files::find(&model).expect("files"), placement, Output::Logits).expect("a model");
    for (name, content, message) in [
        (
            "modules.json",
            r#"[{"type": "a.Transformer", "path": "0_Transformer"}]"#,
            "in the folder \"0_Transformer\"",
        ),
        ("modules.json", r#"[{"type": "a.Pooling", "path": ".."}]"#, "not a folder inside of the checkpoint"),
        ("modules.json", r#"[{"type": "a.LSTM", "path": "2_LSTM"}]"#, "a.LSTM is not supported"),
        ("sentence_bert_config.json", r#"{"do_upper_case": true}"#, "kandle does not know do_upper_case"),
        ("sentence_xlnet_config.json", r#"{"max_seq_length": "all"}"#, "max_seq_length \"all\""),
    ] {
        let model = with("bert", &[(name, content.to_owned())]);
        let said = error(model.path(), Output::Embedding);
        assert!(said.contains(message), "{said}");
    }
}

/// sentence-transformers looks for its settings under seven file names, one for each of its first model types.
#[test]
fn sentence_transformers_settings_are_found_under_every_file_name() {
    let text = "The INVOICE of May is Wrong, please correct it";
    let plain = load(&fixture("roberta"), Output::Embedding);
    let tokens = |model: &Model, text: &str| model.tokenizer.encode(text).expect("tokens");
    assert_ne!(tokens(&plain, text), tokens(&plain, &text.to_lowercase()), "the tokenizer keeps capitals");
    for kind in ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"] {
        let settings = r#"{"max_seq_length": 9, "do_lower_case": true}"#.to_owned();
        let model = with("roberta", &[(&format!("sentence_{kind}_config.json"), settings)]);
        let embeds = load(model.path(), Output::Embedding);
        let got = tokens(&embeds, text);
        assert_eq!((got.ids.len(), got.truncated), (9, true), "{kind}");
        assert_eq!(got.ids[..8], tokens(&plain, &text.to_lowercase()).ids[..8], "{kind}");
        // A classifier ignores the settings of sentence-transformers.
        assert_eq!(tokens(&load(model.path(), Output::Logits), text), tokens(&plain, text), "{kind}");
    }
}

/// Without `use_bidirectional_attention`, Gemma 3 is a decoder, and so are its sliding windows.
#[test]
fn a_causal_gemma_gives_the_logits_of_transformers() {
    let model = load(&fixture("gemma3_text-causal"), Output::Logits);
    for golden in golden("gemma3_text-causal") {
        let tokens = model.tokenizer.encode(&golden.text).expect("tokens");
        assert_eq!(tokens.ids, golden.ids, "{:?}", golden.text);
        close(model.forward(&[&tokens]).expect("logits").row(0), &golden.logits, 1e-4, &golden.text);
    }
}

#[derive(Deserialize)]
struct Vectors {
    text: String,
    vector: Vec<f32>,
    query: Vec<f32>,
}

/// Checkpoints as sentence-transformers saves them, with an end-of-text token that truncation keeps.
#[test]
fn vectors_of_decoders_equal_those_of_sentence_transformers() {
    for (name, pooling) in [("embed-qwen3", Pooling::Last), ("embed-gemma3", Pooling::Mean)] {
        let model = load(&fixture(name), Output::Embedding);
        assert_eq!(
            (&model.embedding.poolings[..], model.embedding.normalize),
            (&[pooling][..], true),
            "{name}"
        );
        let golden: Vec<Vectors> = models::golden(&fixture(name), "golden.json");
        let end = *model.tokens("a").expect("tokens").ids.last().expect("a token");
        let mut truncated = 0;
        for golden in &golden {
            let query = format!("Instruct: find the parcel\nQuery:{}", golden.text);
            for (text, want) in [(&golden.text, &golden.vector), (&query, &golden.query)] {
                let tokens = model.tokens(text).expect("tokens");
                assert_eq!(tokens.ids.last(), Some(&end), "{name}: {text:?}");
                truncated += usize::from(tokens.truncated);
                let rows = model.forward(&[&tokens]).expect("a row");
                let row = rows.row(0);
                let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                let row: Vec<f32> = row.iter().map(|x| x / length).collect();
                close(&row, want, 1e-4, &format!("{name}: {text:?}"));
            }
        }
        assert!(truncated > 1, "{name}");
    }
}
