//! `model.source` is a directory, or an ONNX file in one: its files are used as they are, without a revision.

use std::path::Path;

use super::{FilesError, Place, Snapshot, Wants};
use crate::settings;

pub fn open(_: &settings::Model, source: &str, _: Wants) -> Result<Option<Snapshot>, FilesError> {
    let path = Path::new(source);
    if path.extension().is_some_and(|ending| ending == "onnx")
        && path.is_file()
        && let Some(name) = path.file_name().and_then(|name| name.to_str())
    {
        // The directory of a bare file name is an empty path.
        let directory = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        let place = Place::Directory(directory.to_owned());
        return Ok(Some(Snapshot { place, revision: None, file: Some(name.to_owned()) }));
    }
    let snapshot = || Snapshot { place: Place::Directory(path.to_owned()), revision: None, file: None };
    Ok(path.is_dir().then(snapshot))
}
