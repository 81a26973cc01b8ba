//! `model.source: bundled`: the models that are part of the binary, for `kandle demo` and the tests.

use super::{FilesError, Place, Snapshot, Version, Wants};
use crate::settings;

type Files = &'static [(&'static str, &'static [u8])];

/// Routes support tickets.
const TICKETS: Files = &[
    ("config.json", include_bytes!("../../../demo/model/config.json")),
    ("tokenizer.json", include_bytes!("../../../demo/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../demo/model/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../../../demo/model/model.safetensors")),
];
/// Says which customers leave.
const CHURN: Files = &[("model.onnx", include_bytes!("../../../demo/churn/model.onnx"))];
/// Names the shape in an image.
const SHAPES: Files = &[
    ("config.json", include_bytes!("../../../demo/shapes/config.json")),
    ("preprocessor_config.json", include_bytes!("../../../demo/shapes/preprocessor_config.json")),
    ("model.safetensors", include_bytes!("../../../demo/shapes/model.safetensors")),
];

/// Part of the program, so always the same.
pub fn version(model: &settings::Model, source: &str, wants: Wants) -> Result<Version, FilesError> {
    Ok(open(model, source, wants)?.map_or(Version::NotHere, |_| Version::Fixed))
}

pub fn open(_: &settings::Model, source: &str, _: Wants) -> Result<Option<Snapshot>, FilesError> {
    let files = match source {
        "bundled" => TICKETS,
        "bundled:churn" => CHURN,
        "bundled:shapes" => SHAPES,
        _ => return Ok(None),
    };
    Ok(Some(Snapshot { place: Place::Memory(files), revision: None, file: None }))
}
