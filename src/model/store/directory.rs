//! `model.source` is a directory, or an ONNX file in one: its files are used as they are, without a revision.

use std::fmt::Write as _;
use std::path::Path;
use std::time::UNIX_EPOCH;

use sha2::{Digest as _, Sha256};

use super::{Files, FilesError, Place, Snapshot, Version, Wants, io};
use crate::hex::hex;
use crate::settings;

/// A hash of where the model's files really are, their sizes and when they were written. So it changes when a file is
/// replaced or written to, and when a symbolic link on the way to it is.
pub fn version(model: &settings::Model, source: &str, wants: Wants) -> Result<Version, FilesError> {
    let Some(snapshot) = open(model, source, wants)? else { return Ok(Version::NotHere) };
    let files = Files::of(snapshot, model, wants);
    let mut seen = String::new();
    for name in files.names()? {
        let Some(path) = files.path(&name) else { continue };
        let look = || {
            let file = path.metadata()?;
            let written = file.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            Ok((path.canonicalize()?, file.len(), written))
        };
        let (place, bytes, written) = look().map_err(|error| io(&name, error))?;
        // Writing to a String cannot fail.
        let _ = writeln!(seen, "{name} {} {bytes} {}", place.display(), written.as_nanos());
    }
    Ok(Version::Now(hex(&Sha256::digest(seen))))
}

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

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a checkpoint of so many bytes of weights.
    fn write(directory: &Path, weights: usize) {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("config.json"), "{}").unwrap();
        std::fs::write(directory.join("model.safetensors"), vec![0; weights]).unwrap();
    }

    fn version_of(path: &Path) -> Result<Option<String>, FilesError> {
        let model =
            settings::Model { source: Some(path.display().to_string()), ..settings::Model::default() };
        super::super::version(&model, Wants::Checkpoint)
    }

    #[test]
    fn the_version_changes_with_the_files_and_with_the_link_to_them() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two, link) = (folder.path().join("1"), folder.path().join("2"), folder.path().join("now"));
        write(&one, 10);
        write(&two, 10);
        std::os::unix::fs::symlink(&one, &link).unwrap();
        let first = version_of(&link).unwrap().unwrap();
        assert_eq!(version_of(&link).unwrap().unwrap(), first, "nothing has changed");
        assert_eq!(version_of(&one).unwrap().unwrap(), first, "the same files");
        std::fs::write(one.join("README.md"), "about").unwrap();
        assert_eq!(version_of(&link).unwrap().unwrap(), first, "not a file of the model");
        // As `ln -sfn` does it.
        std::os::unix::fs::symlink(&two, folder.path().join("next")).unwrap();
        std::fs::rename(folder.path().join("next"), &link).unwrap();
        let second = version_of(&link).unwrap().unwrap();
        assert_ne!(second, first);
        write(&two, 11);
        let third = version_of(&link).unwrap().unwrap();
        assert!(third != second && third != first, "a file is longer");
        std::fs::write(two.join("tokenizer.json"), "{}").unwrap();
        assert_ne!(version_of(&link).unwrap().unwrap(), third, "another file belongs to it");
        std::fs::remove_file(two.join("model.safetensors")).unwrap();
        assert!(version_of(&link).unwrap_err().to_string().contains("no weights"));
        std::fs::remove_file(&link).unwrap();
        assert!(version_of(&link).is_err());
    }

    #[test]
    fn a_model_that_is_part_of_kandle_has_no_versions() {
        for source in ["bundled", "bundled:shapes"] {
            assert_eq!(version_of(Path::new(source)).unwrap(), None);
        }
    }

    #[test]
    fn a_pinned_directory_stays_the_same_when_the_link_changes() {
        let folder = tempfile::tempdir().unwrap();
        let (one, link) = (folder.path().join("1"), folder.path().join("now"));
        write(&one, 10);
        std::os::unix::fs::symlink(&one, &link).unwrap();
        let model =
            settings::Model { source: Some(link.display().to_string()), ..settings::Model::default() };
        let files = Files::find(&model).unwrap();
        assert_eq!(files.bytes().unwrap(), 12);
        let pinned = files.pinned(&model).source.unwrap();
        assert_eq!(Path::new(&pinned), one.canonicalize().unwrap());
    }
}
