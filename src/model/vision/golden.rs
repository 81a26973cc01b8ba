//! The fixtures' models against transformers and timm (tests/fixtures/images.py).

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::decode::{DecodeMemory, Limits, decode};
use super::{Image, Output, VisionModel};
use crate::engine::Model as _;
use crate::model::{Files, Placement};
use crate::settings::{self, DeviceChoice, Dtype};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn load(folder: &Path, output: Output, dtype: Dtype) -> Result<VisionModel, String> {
    let settings = settings::Model { source: Some(folder.display().to_string()), ..Default::default() };
    let files = Files::find(&settings).map_err(|error| error.to_string())?;
    let placement = Placement::choose(DeviceChoice::Cpu, dtype).map_err(|error| error.to_string())?;
    VisionModel::load(files, placement, output).map_err(|error| error.to_string())
}

fn image(model: &VisionModel, name: &str) -> Image {
    let bytes = std::fs::read(fixture("images").join(name)).unwrap();
    let limits = Limits { pixels: 1 << 20, bytes: 1 << 20 };
    let rgb = decode(&bytes, &limits, &DecodeMemory::new(1 << 24)).unwrap();
    model.image(model.preprocess.apply(rgb).unwrap())
}

fn golden(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The largest difference between a model's answers and the golden ones, over the largest golden value.
fn difference(folder: &Path, output: Output, dtype: Dtype) -> Option<f64> {
    let key = if output == Output::Logits { "logits" } else { "embedding" };
    let rows = golden(folder);
    rows[0].get(key)?;
    let model = load(folder, output, dtype).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let images: Vec<Image> = rows.iter().map(|row| image(&model, row["image"].as_str().unwrap())).collect();
    let together = model.run(&images.iter().collect::<Vec<_>>()).unwrap();
    let (mut worst, mut largest) = (0.0f64, 1.0f64);
    for ((row, image), answer) in rows.iter().zip(&images).zip(together.iter()) {
        let want: Vec<f64> = row[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert_eq!((answer.len(), model.width()), (want.len(), want.len()), "{}", folder.display());
        for (got, want) in answer.iter().zip(&want) {
            worst = worst.max((f64::from(*got) - want).abs());
            largest = largest.max(want.abs());
        }
        // An answer does not depend on the images beside it.
        let alone = model.run(&[image]).unwrap();
        for (a, b) in alone.row(0).iter().zip(answer) {
            assert!((a - b).abs() < 1e-5, "{}: {a} alone, {b} in a batch", folder.display());
        }
    }
    Some(worst / largest)
}

fn folders() -> Vec<PathBuf> {
    let all = std::fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> =
        all.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("image-")).collect();
    folders.sort();
    folders
}

#[test]
fn answers_are_those_of_transformers_and_timm() {
    let mut compared = 0;
    for folder in folders() {
        for output in [Output::Logits, Output::Embedding] {
            let Some(difference) = difference(&folder, output, Dtype::F32) else { continue };
            assert!(difference < 1e-4, "{}, {output:?}: {difference}", folder.display());
            compared += 1;
        }
    }
    assert!(compared >= 44, "{compared}");
}

#[test]
fn towers_run_in_bf16_and_int8() {
    for name in ["image-vit", "image-dinov2", "image-siglip", "image-clip", "image-beit"] {
        for (dtype, allowed) in [(Dtype::Bf16, 0.03), (Dtype::Int8, 0.05)] {
            let difference = difference(&fixture(name), Output::Embedding, dtype).unwrap();
            assert!(difference > 0.0 && difference < allowed, "{name}, {dtype:?}: {difference}");
        }
    }
    let error = load(&fixture("image-resnet-timm"), Output::Logits, Dtype::Int8).err().unwrap();
    assert!(error.contains("int8 on a CPU is for transformers"), "{error}");
}

#[test]
fn what_a_checkpoint_is_not_for_is_said() {
    for (name, output, part) in [
        (
            "image-clip",
            Output::Logits,
            "it is not a classifier of images: its weights have no classifier.weight",
        ),
        ("image-siglip", Output::Logits, "it is not a classifier of images"),
        (
            "bert",
            Output::Logits,
            "model_type \"bert\" is not a model of images that kandle runs; supported: beit, clip",
        ),
        ("image-clip-labels", Output::Embedding, "its weights have no visual_projection.weight"),
    ] {
        let error = load(&fixture(name), output, Dtype::F32).err().unwrap();
        assert!(error.contains(part), "{name}: {error}");
    }
}

/// A copy of a fixture with another config.json.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> Result<VisionModel, String> {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    load(folder.path(), Output::Logits, Dtype::F32)
}

#[test]
fn configurations_that_change_what_is_computed_are_refused() {
    for (name, key, value, part) in [
        ("image-vit", "hidden_act", "mish".into(), "hidden_act \"mish\" is not supported"),
        ("image-vit", "qkv_bias", false.into(), "qkv_bias: false is not supported"),
        ("image-vit", "num_attention_heads", 5.into(), "5 heads do not divide the width 32"),
        ("image-vit", "shiny", true.into(), "kandle does not know shiny"),
        ("image-vit", "id2label", serde_json::json!({ "0": "a" }), "names 1 labels, but the weights have 3"),
        ("image-resnet-basic", "hidden_act", "gelu".into(), "hidden_act \"gelu\" is not supported"),
        ("image-vit-timm", "global_pool", "avg".into(), "global_pool \"avg\""),
        (
            "image-vit-timm",
            "architecture",
            "swin_tiny".into(),
            "architecture \"swin_tiny\" is not a model of images",
        ),
        ("image-vit-timm", "architecture", "swin_tiny".into(), "use a ConvNeXt or ViT"),
        (
            "image-convnext-timm",
            "architecture",
            "mobilenetv3_large_100".into(),
            "mobilenetv3_large_100 of timm is not supported",
        ),
        ("image-convnext", "hidden_act", "mish".into(), "hidden_act \"mish\" is not supported"),
        (
            "image-mobilenetv4-timm",
            "architecture",
            "mobilenetv4_conv_aa_large".into(),
            "mobilenetv4_conv_aa_large",
        ),
        ("image-mobilenetv2-timm", "architecture", "mobilenetv3_small_100".into(), "has 7 stages, not 6"),
        ("image-mobilenet-v2", "output_stride", 16.into(), "output_stride 16 is not supported"),
        ("image-efficientnet", "pooling_type", "max".into(), "pooling_type \"max\" is not supported"),
        (
            "image-efficientnet",
            "num_block_repeats",
            serde_json::json!([1, 1, 2, 1]),
            "says that there are 5 blocks",
        ),
        ("image-beit", "patch_size", 16.into(), "projection"),
    ] {
        let error = changed(name, |config| config[key] = value).err().unwrap();
        assert!(error.contains(part), "{name}: {error}");
    }
    let labels = |model: VisionModel| model.labels;
    assert_eq!(changed("image-vit", |_| ()).map(labels).unwrap(), ["cat", "dog", "fish"]);
    assert_eq!(changed("image-resnet-timm", |_| ()).map(labels).unwrap(), ["LABEL_0", "LABEL_1", "LABEL_2"]);
}

#[test]
fn every_architecture_is_in_the_table_of_models() {
    let table = std::fs::read_to_string(fixture("../../docs/models.md")).unwrap();
    let table = table.split_once("## Images").unwrap().1.split_once("\n## ").unwrap().0.to_owned();
    for name in super::architecture::names() {
        assert!(table.contains(&format!("`{name}")), "docs/models.md has no row for {name}");
    }
}
