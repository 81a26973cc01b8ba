//! `model.source: bundled`: the ticket classifier that is part of the binary.

use super::{FilesError, Place, Snapshot, Wants};
use crate::settings;

const FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../../demo/model/config.json")),
    ("tokenizer.json", include_bytes!("../../../demo/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../demo/model/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../../../demo/model/model.safetensors")),
];

pub fn open(_: &settings::Model, source: &str, _: Wants) -> Result<Option<Snapshot>, FilesError> {
    Ok((source == "bundled").then_some(Snapshot { place: Place::Memory(FILES), revision: None, file: None }))
}
