//! `model.source` is a directory: its files are used as they are, without a revision.

use std::path::Path;

use super::{FilesError, Place, Snapshot};
use crate::settings;

pub fn open(_: &settings::Model, source: &str) -> Result<Option<Snapshot>, FilesError> {
    let path = Path::new(source);
    Ok(path.is_dir().then(|| Snapshot { place: Place::Directory(path.to_owned()), revision: None }))
}
