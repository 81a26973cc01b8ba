//! Every architecture with heads as wide as those of real models and random weights, on a device against a CPU. The
//! fixtures' heads of 8 or 12 elements are too narrow for the attention kernels of GPUs. Each model is a fixture whose
//! tensors have been made larger.

#[path = "../support/models.rs"]
mod models;

use std::collections::BTreeMap;

use kandle::model::{Files, Model, Output, Placement, Tokens};
use kandle::settings::{self, DeviceChoice, Dtype};
use models::{copy_of, fixture};
use safetensors::tensor::{Dtype as Elements, TensorView};
use serde_json::Value;

/// Each fixture, and how many elements its heads get: those of decoders keep their number of heads.
const MODELS: [(&str, usize); 18] = [
    ("bert", 32),
    ("roberta", 64),
    ("xlm-roberta", 64),
    ("camembert", 64),
    ("distilbert", 64),
    ("electra", 64),
    ("albert", 64),
    ("mpnet", 64),
    ("modernbert", 64),
    ("nomic_bert", 64),
    ("gte", 64),
    ("qwen3", 128),
    ("qwen3", 64),
    ("gemma3_text", 256),
    ("deberta-v2", 64),
    ("deberta-v3", 64),
    ("deberta-v3", 32),
    ("jina", 64),
];

/// Positions that a model gets more.
const MORE: usize = 256;

/// The size of a dimension of a tensor in the larger model.
fn enlarged(name: &str, tensor: &str, size: usize, config: &Value, head: usize) -> usize {
    let decoder = matches!(name, "qwen3" | "gemma3_text");
    let number = |key: &str| config[key].as_u64().map(|n| n as usize);
    let hidden = number("hidden_size").or(number("dim")).expect("a width");
    let heads = number("num_attention_heads").or(number("n_heads")).expect("heads");
    match decoder {
        // Heads of queries, of keys, and one.
        true if size % 12 == 0 && size <= heads * 12 => size / 12 * head,
        true => size,
        false if tensor.contains("relative_attention_bias") => size,
        false if size == hidden => heads * head,
        false if size == 3 * hidden => 3 * heads * head,
        false => size,
    }
}

/// Random numbers from -1 to 1 (xorshift).
fn random(state: &mut u32) -> f32 {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    (*state >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// A larger copy of a fixture.
fn wide(name: &str, head: usize) -> tempfile::TempDir {
    let folder = copy_of(name);
    let json = |file: &str| -> Value {
        serde_json::from_slice(&std::fs::read(fixture(name).join(file)).expect(file)).expect(file)
    };
    let (old, mut config) = (json("config.json"), json("config.json"));
    for key in ["hidden_size", "dim", "pooler_hidden_size"] {
        if let Some(size) = old[key].as_u64() {
            config[key] = enlarged(name, key, size as usize, &old, head).into();
        }
    }
    if old["head_dim"].is_u64() {
        config["head_dim"] = head.into();
    }
    if let Some(positions) = old["max_position_embeddings"].as_u64() {
        config["max_position_embeddings"] = (positions as usize + MORE).into();
    }
    let write = |file: &str, bytes: &[u8]| std::fs::write(folder.path().join(file), bytes).expect("written");
    write("config.json", config.to_string().as_bytes());
    let mut tokenizer = json("tokenizer_config.json");
    tokenizer.as_object_mut().expect("settings").remove("model_max_length");
    write("tokenizer_config.json", tokenizer.to_string().as_bytes());

    let bytes = std::fs::read(fixture(name).join("model.safetensors")).expect("weights");
    let weights = safetensors::SafeTensors::deserialize(&bytes).expect("weights");
    let mut state = 7;
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (tensor, view) in weights.tensors() {
        assert_eq!(view.dtype(), Elements::F32, "{name}: {tensor}");
        let mut shape: Vec<usize> =
            view.shape().iter().map(|&size| enlarged(name, &tensor, size, &old, head)).collect();
        if tensor.ends_with("position_embeddings.weight") {
            shape[0] += MORE;
        }
        let numbers: Vec<f32> = match shape[..] {
            // Norms and biases repeat.
            [count] => {
                let of = |at: usize| {
                    f32::from_le_bytes(view.data()[4 * at..][..4].try_into().expect("four bytes"))
                };
                (0..count).map(|i| of(i % view.shape()[0])).collect()
            }
            // Products of unit variance.
            _ => {
                let inputs: usize = shape[1..].iter().product();
                let most = (3.0 / inputs as f32).sqrt();
                (0..shape.iter().product()).map(|_| most * random(&mut state)).collect()
            }
        };
        tensors.insert(tensor, (shape, numbers.into_iter().flat_map(f32::to_le_bytes).collect()));
    }
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Elements::F32, shape.clone(), bytes).expect("a tensor"))
    });
    write("model.safetensors", &safetensors::serialize(views, None).expect("weights"));
    folder
}

fn load(folder: &std::path::Path, device: &str, dtype: Dtype) -> Model {
    let source = Some(folder.display().to_string());
    let files = Files::find(&settings::Model { source, ..Default::default() }).expect("files");
    let device = DeviceChoice::try_from(device.to_owned()).expect("a device");
    let placement = Placement::choose(device, dtype).expect("a device");
    Model::load(files, placement, Output::Embedding).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

/// Texts of different lengths, some longer than a block of an attention kernel.
fn texts() -> Vec<String> {
    let words = ["late", "parcel", "invoice", "x1", "account", "refund", "please", "error"];
    let text = |count: usize| (0..count).map(|i| words[i * i % 7 + i % 2]).collect::<Vec<_>>().join(" ");
    [1, 2, 7, 14, 20, 40, 60].map(text).to_vec()
}

/// In f32, values are close. In 16 bits, vectors point in the same direction.
#[test]
fn a_device_gives_the_vectors_of_a_cpu() {
    let device = std::env::var("KANDLE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    for (name, head) in MODELS {
        let folder = wide(name, head);
        let cpu = load(folder.path(), "cpu", Dtype::F32);
        let tokens: Vec<Tokens> =
            texts().iter().map(|text| cpu.tokenizer.encode(text).expect("tokens")).collect();
        let longest = tokens.iter().map(|tokens| tokens.ids.len()).max().expect("tokens");
        assert!(longest > 130, "{name}: {longest} tokens are too few for several blocks");
        let batch: Vec<&Tokens> = tokens.iter().collect();
        let want = cpu.forward(&batch).expect("rows");
        // f16 needs a GPU.
        let types = [(Dtype::F32, 0.999_999), (Dtype::F16, 0.999), (Dtype::Bf16, 0.99)];
        for (dtype, least) in types.into_iter().filter(|(dtype, _)| device != "cpu" || *dtype != Dtype::F16) {
            let got = load(folder.path(), &device, dtype).forward(&batch).expect("rows");
            for (i, (got, want)) in got.iter().zip(want.iter()).enumerate() {
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
                let cosine = dot(got, want) / (dot(got, got) * dot(want, want)).sqrt();
                let what = format!("{name} with heads of {head} in {dtype:?}, text {i}");
                assert!(cosine >= least, "{what}: {cosine}");
                if dtype == Dtype::F32 {
                    let error = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(error < 1e-3, "{what}: {error}");
                }
            }
        }
    }
}
