//! Where the files of a model come from. To add a store, add a file here and a line in [`STORES`].

mod bundled;
mod directory;
mod hub;

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::settings;

/// Which files of a model are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// Configuration and weights, and the tokenizer of a text model.
    Checkpoint,
    /// An ONNX file and those with its tensors.
    Onnx,
}

/// A kind of place that has models. Its functions take `model`, `model.source` and the files that are wanted.
struct Store {
    /// Opens the model that the source names; `None` if the source is not of this store's form.
    open: fn(&settings::Model, &str, Wants) -> Result<Option<Snapshot>, FilesError>,
    /// What version the source names now, found without fetching files.
    version: fn(&settings::Model, &str, Wants) -> Result<Version, FilesError>,
}

/// What a store says about the version that a source names.
enum Version {
    /// The source is not of this store's form.
    NotHere,
    /// The source always names the same version.
    Fixed,
    /// A text that is another one once the source names other files.
    Now(String),
}

/// The stores, in the order in which they are tried.
const STORES: &[Store] = &[
    Store { open: bundled::open, version: bundled::version },
    Store { open: directory::open, version: directory::version },
    Store { open: hub::open, version: hub::version },
];

/// What version of the model `model.source` names now, found without fetching files: a text that is another one once the
/// source names other files. `None`: the source always names the same.
///
/// # Errors
/// `model.source` names no model, or its store does not say.
pub fn version(model: &settings::Model, wants: Wants) -> Result<Option<String>, FilesError> {
    let source = model.source.as_deref().unwrap_or_default();
    for store in STORES {
        match (store.version)(model, source, wants)? {
            Version::NotHere => {}
            Version::Fixed => return Ok(None),
            Version::Now(version) => return Ok(Some(version)),
        }
    }
    Err(FilesError::NoSuchModel)
}

/// The first bytes of a Git LFS pointer, which stands for a file that was never fetched.
const LFS: [u8; 40] = *b"version https://git-lfs.github.com/spec/";

/// One version of a model. All its files are available locally.
struct Snapshot {
    place: Place,
    /// The commit, if the store has versions.
    revision: Option<String>,
    /// The file that the source names, if it names one.
    file: Option<String>,
}

#[derive(Debug, Clone)]
enum Place {
    Directory(PathBuf),
    /// Name and content of each file.
    Memory(&'static [(&'static str, &'static [u8])]),
}

/// Problems with a model's files. Messages name files by their path in the model; callers add the model's name.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("there is no such directory, and it is not a hub id (org/name)")]
    NoSuchModel,
    #[error("{file}: {error}")]
    Io { file: String, error: std::io::Error },
    #[error("{file} is missing{}", how_to_make(file))]
    Missing { file: String },
    #[error("there are no weights that kandle reads{}", instead(found))]
    NoWeights { found: Vec<String> },
    #[error(
        "{file} is a pointer of Git LFS and not the file itself: run `git lfs pull` in the model's directory"
    )]
    LfsPointer { file: String },
    #[error("{file}: {message}")]
    Content { file: String, message: String },
    #[error("there is no ONNX file{}", among(found))]
    NoOnnx { found: Vec<String> },
    #[error("there are several ONNX files: {}; set model.source to one of them, or name one model.onnx", found.join(", "))]
    SeveralOnnx { found: Vec<String> },
    #[error("hub: {0}")]
    Hub(String),
    #[error(
        "its digest is {found} and model.digest is {pinned}: the files are not those that were pinned, or a setting \
         that changes predictions is not; `kandle model verify` lists the files with their SHA-256"
    )]
    Digest { pinned: String, found: String },
}

/// What there is instead of the file that is looked for.
fn among(found: &[String]) -> String {
    if found.is_empty() { String::new() } else { format!("; there is {}", found.join(", ")) }
}

/// How to create a file that many checkpoints lack.
pub(super) fn how_to_make(file: &str) -> &'static str {
    match file {
        "tokenizer.json" => {
            "; create it with Python in the model's directory: \
             from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('.').save_pretrained('.')"
        }
        _ => "",
    }
}

/// The weights found in another format, and how to convert them.
fn instead(found: &[String]) -> String {
    let with = |ending: &str| found.iter().find(|name| name.ends_with(ending));
    if let Some(name) = with(".pt").or_else(|| with(".h5")).or_else(|| with(".msgpack")) {
        return format!(
            ", only {name}; convert it with Python in the model's directory: from transformers import AutoModel, \
             AutoModelForSequenceClassification as Classifier; (AutoModel for embeddings, Classifier for labels).\
             from_pretrained('.').save_pretrained('.', safe_serialization=True)"
        );
    }
    match with(".onnx") {
        Some(name) => {
            format!(", only {name}, which kandle does not read: use the checkpoint that it was exported from")
        }
        None => ": neither model.safetensors nor pytorch_model.bin exists, nor an index of either".to_owned(),
    }
}

/// The files of a model. All are available locally.
#[derive(Debug, Clone)]
pub struct Files {
    /// `model.source`.
    pub source: String,
    /// The commit on the hub.
    pub revision: Option<String>,
    place: Place,
    /// The file that `model.source` names, if it names one.
    file: Option<String>,
    wants: Wants,
    /// `model.ignore_config`.
    ignored_keys: Vec<String>,
}

impl Files {
    /// Finds a text model's files. From the hub, downloads those that the cache lacks.
    ///
    /// # Errors
    /// `model.source` names no model, or its store fails.
    pub fn find(model: &settings::Model) -> Result<Self, FilesError> {
        Self::find_for(model, Wants::Checkpoint)
    }

    /// Finds the files that are wanted. From the hub, downloads those that the cache lacks.
    ///
    /// # Errors
    /// `model.source` names no model, or its store fails.
    pub fn find_for(model: &settings::Model, wants: Wants) -> Result<Self, FilesError> {
        let source = model.source.clone().unwrap_or_default();
        for store in STORES {
            if let Some(snapshot) = (store.open)(model, &source, wants)? {
                return Ok(Self::of(snapshot, model, wants));
            }
        }
        Err(FilesError::NoSuchModel)
    }

    /// The files of a snapshot that a store has opened.
    fn of(Snapshot { place, revision, file }: Snapshot, model: &settings::Model, wants: Wants) -> Self {
        let (source, ignored_keys) = (model.source.clone().unwrap_or_default(), model.ignore_config.clone());
        Self { source, revision, place, file, wants, ignored_keys }
    }

    /// Settings that name this version itself, whatever `model.source` names later: its revision, or where its directory
    /// really is.
    pub fn pinned(&self, model: &settings::Model) -> settings::Model {
        let mut model = model.clone();
        if self.revision.is_some() {
            model.revision.clone_from(&self.revision);
        } else if let Some(real) = self.directory().and_then(|directory| directory.canonicalize().ok()) {
            let path = self.file.as_ref().map_or(real.clone(), |file| real.join(file));
            model.source = Some(path.display().to_string());
        }
        model
    }

    /// Bytes of all files that belong to the model, which are mostly its weights.
    ///
    /// # Errors
    /// As [`Files::names`] and [`Files::open`].
    pub fn bytes(&self) -> Result<u64, FilesError> {
        let names = self.names()?;
        names.iter().map(|name| self.open(name)?.len().map_err(|error| io(name, error))).sum()
    }

    /// Unknown keys of config.json that do not change predictions, according to the settings.
    pub(super) fn ignored_keys(&self) -> &[String] {
        &self.ignored_keys
    }

    /// `source@revision`: the `kandle-model` header.
    pub fn name(&self) -> String {
        match &self.revision {
            Some(revision) => format!("{}@{revision}", self.source),
            None => self.source.clone(),
        }
    }

    pub(super) fn exists(&self, name: &str) -> bool {
        match &self.place {
            Place::Memory(files) => files.iter().any(|(known, _)| *known == name),
            Place::Directory(directory) => directory.join(name).is_file(),
        }
    }

    /// Where a file is on a disk; `None` if the model is in memory.
    pub(super) fn path(&self, name: &str) -> Option<PathBuf> {
        match &self.place {
            Place::Directory(directory) => Some(directory.join(name)),
            Place::Memory(_) => None,
        }
    }

    /// Opens a file to read parts of it.
    ///
    /// # Errors
    /// There is no such file, it is a Git LFS pointer, or it cannot be read.
    pub fn open(&self, name: &str) -> Result<Source, FilesError> {
        let missing = || FilesError::Missing { file: name.to_owned() };
        let source = match &self.place {
            Place::Memory(files) => {
                let (_, bytes) = files.iter().find(|(known, _)| *known == name).ok_or_else(missing)?;
                Source::Memory(bytes)
            }
            Place::Directory(directory) => match File::open(directory.join(name)) {
                Ok(file) => Source::File(file),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(missing()),
                Err(error) => return Err(io(name, error)),
            },
        };
        let mut start = [0; LFS.len()];
        let is_pointer = source.len().map_err(|error| io(name, error))? >= LFS.len() as u64
            && source.read_at(0, &mut start).map(|()| start == LFS).map_err(|error| io(name, error))?;
        if is_pointer { Err(FilesError::LfsPointer { file: name.to_owned() }) } else { Ok(source) }
    }

    /// The file's bytes; `None` if there is no such file.
    ///
    /// # Errors
    /// As [`Files::open`], except for a missing file.
    pub fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, FilesError> {
        match self.open(name) {
            Ok(Source::Memory(bytes)) => Ok(Some(Cow::Borrowed(bytes))),
            Ok(Source::File(mut file)) => {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).map_err(|error| io(name, error))?;
                Ok(Some(Cow::Owned(bytes)))
            }
            Err(FilesError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn require(&self, name: &str) -> Result<Cow<'static, [u8]>, FilesError> {
        self.read(name)?.ok_or_else(|| FilesError::Missing { file: name.to_owned() })
    }

    pub fn json(&self, name: &str) -> Result<Option<serde_json::Value>, FilesError> {
        match self.read(name)? {
            None => Ok(None),
            Some(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| FilesError::Content { file: name.to_owned(), message: e.to_string() }),
        }
    }

    /// SHA-256 of a file, read piece by piece: weights may be larger than memory.
    ///
    /// # Errors
    /// As [`Files::open`].
    pub fn sha256(&self, name: &str) -> Result<[u8; 32], FilesError> {
        match self.open(name)? {
            Source::Memory(bytes) => Ok(Sha256::digest(bytes).into()),
            Source::File(file) => sha256(file).map_err(|error| io(name, error)),
        }
    }

    /// The name and the SHA-256 of each file that belongs to the model, by name.
    ///
    /// # Errors
    /// As [`Files::names`] and [`Files::open`].
    pub fn hashes(&self) -> Result<Vec<(String, [u8; 32])>, FilesError> {
        let hashed = |name: String| self.sha256(&name).map(|hash| (name, hash));
        self.names()?.into_iter().map(hashed).collect()
    }

    pub(super) fn wants(&self) -> Wants {
        self.wants
    }

    /// The ONNX file that `model.source` names.
    pub(super) fn named(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// The directory that has the files; `None` if the model is in memory.
    pub fn directory(&self) -> Option<&Path> {
        match &self.place {
            Place::Directory(directory) => Some(directory),
            Place::Memory(_) => None,
        }
    }

    /// The names of all files, including those one folder down.
    pub(super) fn all(&self) -> Vec<String> {
        let directory = match &self.place {
            Place::Directory(directory) => directory,
            Place::Memory(files) => return files.iter().map(|(name, _)| (*name).to_owned()).collect(),
        };
        let list =
            |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut names: Vec<String> = list(directory)
            .flat_map(|path| if path.is_dir() { list(&path).collect() } else { vec![path] })
            .filter_map(|path| Some(path.strip_prefix(directory).ok()?.display().to_string()))
            .collect();
        names.sort();
        names
    }
}

/// The hash of what is read, a piece at a time: it may be larger than the memory.
pub(super) fn sha256(mut reader: impl Read) -> std::io::Result<[u8; 32]> {
    let (mut hash, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match reader.read(&mut piece) {
            Ok(0) => return Ok(hash.finalize().into()),
            Ok(count) => hash.update(&piece[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn io(name: &str, error: std::io::Error) -> FilesError {
    FilesError::Io { file: name.to_owned(), error }
}

/// An open file of a model.
#[derive(Debug)]
pub enum Source {
    File(File),
    Memory(&'static [u8]),
}

impl Source {
    pub fn len(&self) -> std::io::Result<u64> {
        match self {
            Self::File(file) => Ok(file.metadata()?.len()),
            Self::Memory(bytes) => Ok(bytes.len() as u64),
        }
    }

    /// Fills `out` with the bytes from `offset` on.
    ///
    /// # Errors
    /// The file ends too early, or cannot be read.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(out, offset),
            Self::Memory(bytes) => {
                let start = usize::try_from(offset).ok();
                let from = start.and_then(|start| bytes.get(start..start.checked_add(out.len())?));
                out.copy_from_slice(from.ok_or(std::io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}
