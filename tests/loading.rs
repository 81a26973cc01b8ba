//! Loading a model takes little more memory than the model itself: weights are read one tensor at a time.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use kandle::model::{Files, Model, Output, Placement};
use kandle::settings::{self, DeviceChoice, Dtype};

const VOCABULARY: usize = 60_000;
const HIDDEN: usize = 512;
const INNER: usize = 2048;
const LAYERS: usize = 6;

/// Environment variables of the child process that loads the model: the model's directory and the precision.
const FOLDER: &str = "KANDLE_TEST_LOAD";
const DTYPE: &str = "KANDLE_TEST_LOAD_DTYPE";

/// Maximum ratio of the peak resident memory of loading to the bytes of the loaded weights. It is 1.16 where bf16 weights
/// are kept as f32, because the processor has no instructions for them.
const LIMIT: f64 = 1.2;

/// Tensor names and shapes of a BERT checkpoint, in the order of the file.
fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("embeddings.word_embeddings.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("embeddings.position_embeddings.weight".to_owned(), vec![512, HIDDEN]),
        ("embeddings.token_type_embeddings.weight".to_owned(), vec![2, HIDDEN]),
    ];
    let mut linear = |name: String, (inputs, outputs): (usize, usize)| {
        all.push((format!("{name}.weight"), vec![outputs, inputs]));
        all.push((format!("{name}.bias"), vec![outputs]));
    };
    let square = (HIDDEN, HIDDEN);
    for layer in 0..LAYERS {
        let layer = format!("encoder.layer.{layer}");
        for name in ["query", "key", "value"] {
            linear(format!("{layer}.attention.self.{name}"), square);
        }
        linear(format!("{layer}.attention.output.dense"), square);
        linear(format!("{layer}.intermediate.dense"), (HIDDEN, INNER));
        linear(format!("{layer}.output.dense"), (INNER, HIDDEN));
    }
    let norms = (0..LAYERS).flat_map(|layer| {
        ["attention.output", "output"].map(|name| format!("encoder.layer.{layer}.{name}.LayerNorm"))
    });
    for norm in norms.chain(["embeddings.LayerNorm".to_owned()]) {
        all.push((format!("{norm}.weight"), vec![HIDDEN]));
        all.push((format!("{norm}.bias"), vec![HIDDEN]));
    }
    all
}

/// Writes a checkpoint of zeros: loading does not depend on the values.
fn write_model(folder: &Path) {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in shapes() {
        let start = end;
        end += shape.iter().product::<usize>() * size_of::<f32>();
        header.insert(
            name,
            serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] }),
        );
    }
    let header = serde_json::Value::from(header).to_string();
    let mut file = std::fs::File::create(folder.join("model.safetensors")).expect("a file");
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("written");
    file.write_all(header.as_bytes()).expect("written");
    file.set_len((8 + header.len() + end) as u64).expect("as long as its header says");
    let config = serde_json::json!({
        "model_type": "bert", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "intermediate_size": INNER, "hidden_act": "gelu", "max_position_embeddings": 512,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).expect("written");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(demo.join(name), folder.join(name)).expect("copied");
    }
}

/// `VmRSS` or `VmHWM` of this process, in bytes.
fn memory(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).expect(key);
    line.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok()).expect("a size") * 1024
}

/// Runs in the child process: loads the model and prints the bytes of its weights and the peak memory of loading.
fn load(folder: &str, dtype: Dtype) {
    let model = settings::Model { source: Some(folder.to_owned()), ..settings::Model::default() };
    let placement = Placement::choose(DeviceChoice::Cpu, dtype).expect("a CPU");
    let before = memory("VmRSS");
    let files = Files::find(&model).expect("a model");
    for name in files.names().expect("names") {
        files.sha256(&name).expect("hashed");
    }
    let model = Model::load(files, placement, Output::Embedding).expect("it loads");
    println!("{{\"weights\":{},\"peak\":{}}}", model.weight_bytes(), memory("VmHWM") - before);
}

#[test]
fn loading_takes_little_more_memory_than_the_weights() {
    if let (Ok(folder), Ok(dtype)) = (std::env::var(FOLDER), std::env::var(DTYPE)) {
        return load(&folder, if dtype == "bf16" { Dtype::Bf16 } else { Dtype::F32 });
    }
    let folder = tempfile::tempdir().expect("a folder");
    write_model(folder.path());
    for dtype in ["f32", "bf16"] {
        let output = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "loading_takes_little_more_memory_than_the_weights", "--nocapture"])
            .env(FOLDER, folder.path())
            .env(DTYPE, dtype)
            .output()
            .expect("it runs");
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find_map(|line| line.find('{').map(|at| &line[at..]));
        let line = line.unwrap_or_else(|| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
        let sizes: HashMap<String, u64> = serde_json::from_str(line).expect("sizes");
        let ratio = sizes["peak"] as f64 / sizes["weights"] as f64;
        println!("{dtype}: peak ÷ weights {ratio:.3} ({} of {} bytes)", sizes["peak"], sizes["weights"]);
        assert!(ratio <= LIMIT, "{dtype}: {ratio:.3}: {sizes:?}");
    }
}
