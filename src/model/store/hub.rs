//! Models from a hub with Hugging Face's API. The revision is resolved to a commit once. Missing files are downloaded
//! into the cache that Hugging Face's own tools share. Without a network, a cached model is used.

use std::path::PathBuf;

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::{FilesError, Place, Version, Wants};
use crate::model::manifest;
use crate::model::text::GLINER_CONFIG;
use crate::model::text::sentence::module_files;
use crate::settings;

/// Every model has one of these files.
const CONFIGS: [&str; 2] = ["config.json", GLINER_CONFIG];

/// The usual names of an ONNX file. Another one is found only online.
const ONNX: [&str; 2] = ["model.onnx", "onnx/model.onnx"];

/// A commit's files in the cache.
struct Snapshot {
    commit: String,
    directory: PathBuf,
}

pub fn open(
    model: &settings::Model,
    source: &str,
    wants: Wants,
) -> Result<Option<super::Snapshot>, FilesError> {
    if !is_id(source) {
        return Ok(None);
    }
    let Snapshot { commit, directory } = snapshot(model, source, wants)?;
    Ok(Some(super::Snapshot { place: Place::Directory(directory), revision: Some(commit), file: None }))
}

/// The commit that the revision names now.
pub fn version(model: &settings::Model, source: &str, wants: Wants) -> Result<Version, FilesError> {
    if !is_id(source) {
        return Ok(Version::NotHere);
    }
    let (cache, revision) = (cache(model), revision(model));
    if is_offline(model) {
        // Another process may have fetched a new commit into the cache.
        let found = cached(&cache, source, &revision, wants);
        let snapshot = found.ok_or_else(|| not_cached(&cache, source, &revision))?;
        return Ok(Version::Now(snapshot.commit));
    }
    match resolve(model, &cache, source, &revision) {
        Ok((_, info)) => Ok(Version::Now(info.sha)),
        Err(Asked::Unreachable(reason)) => Err(FilesError::Hub(format!("{source}@{revision}: {reason}"))),
        Err(Asked::Refused(error)) => Err(error),
    }
}

fn revision(model: &settings::Model) -> String {
    model.revision.clone().unwrap_or_else(|| "main".to_owned())
}

fn cache(model: &settings::Model) -> Cache {
    model.cache.clone().map_or_else(Cache::from_env, Cache::new)
}

fn is_offline(model: &settings::Model) -> bool {
    model.offline || std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| v == "1" || v.eq_ignore_ascii_case("true"))
}

fn not_cached(cache: &Cache, id: &str, revision: &str) -> FilesError {
    FilesError::Hub(format!(
        "{id}@{revision} is not in the cache {}, and offline mode forbids downloads",
        cache.path().display()
    ))
}

/// Whether a source has the form of a hub id: `name` or `org/name`.
fn is_id(source: &str) -> bool {
    let legal = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && part != "."
            && part != ".."
    };
    let parts: Vec<&str> = source.split('/').collect();
    parts.len() <= 2 && parts.iter().all(|part| legal(part))
}

fn snapshot(model: &settings::Model, id: &str, wants: Wants) -> Result<Snapshot, FilesError> {
    let (cache, revision) = (cache(model), revision(model));
    if is_offline(model) {
        let found = cached(&cache, id, &revision, wants);
        return found.ok_or_else(|| not_cached(&cache, id, &revision));
    }
    match download(model, &cache, id, &revision, wants) {
        Ok(snapshot) => Ok(snapshot),
        Err(Asked::Unreachable(reason)) => match cached(&cache, id, &revision, wants) {
            Some(snapshot) => {
                tracing::warn!(
                    model = id,
                    commit = snapshot.commit,
                    reason,
                    "the hub cannot be reached; using the cache"
                );
                Ok(snapshot)
            }
            None => Err(FilesError::Hub(format!(
                "{id}@{revision}: {reason}; it is not in the cache {} either",
                cache.path().display()
            ))),
        },
        Err(Asked::Refused(error)) => Err(error),
    }
}

enum Asked {
    /// The hub did not answer; the cache may have the model.
    Unreachable(String),
    /// Final: the cache is not tried.
    Refused(FilesError),
}

/// Asks the hub for the commit that a revision names, and its files.
fn resolve(
    model: &settings::Model,
    cache: &Cache,
    id: &str,
    revision: &str,
) -> Result<(Api, RepoInfo), Asked> {
    let refused = |message: String| Asked::Refused(FilesError::Hub(message));
    let mut builder =
        ApiBuilder::from_env().with_cache_dir(cache.path().clone()).with_progress(false).with_retries(3);
    if let Some(token) = model.token.clone().or_else(|| std::env::var("HF_TOKEN").ok()) {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build().map_err(|e| refused(format!("{id}: {e}")))?;
    let named = api.repo(Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned()));
    let info = named.info().map_err(|e| {
        let message = e.to_string();
        match status(&e) {
            Some(401 | 403) => {
                refused(format!("{id}@{revision}: access denied; set model.token or HF_TOKEN ({message})"))
            }
            Some(404) => refused(format!("{id}@{revision}: no such model or revision ({message})")),
            _ => Asked::Unreachable(message),
        }
    })?;
    Ok((api, info))
}

fn download(
    model: &settings::Model,
    cache: &Cache,
    id: &str,
    revision: &str,
    wants: Wants,
) -> Result<Snapshot, Asked> {
    let (api, info) = resolve(model, cache, id, revision)?;
    // All files are requested by commit, so that they are of one version.
    let repo = api.repo(Repo::with_revision(id.to_owned(), RepoType::Model, info.sha.clone()));
    let fetch = |repo: &ApiRepo, name: &str| {
        repo.get(name).map_err(|e| Asked::Unreachable(format!("{id}/{name}: {e}")))
    };
    let commit = info.sha.clone();
    let directory = match wants {
        Wants::Onnx => {
            let names: Vec<String> = info.siblings.iter().map(|file| file.rfilename.clone()).collect();
            let file = manifest::onnx(&names).map_err(Asked::Refused)?;
            // The tensors of a large model are in files beside it, such as model.onnx_data.
            for name in names.iter().filter(|name| name.starts_with(&file) && **name != file) {
                fetch(&repo, name)?;
            }
            root(fetch(&repo, &file)?, &file)
        }
        Wants::Checkpoint => {
            let config = text_files(&repo, &info, &fetch, &format!("{id}@{revision}"))?;
            config.parent().map(PathBuf::from).unwrap_or_default()
        }
    };
    // Records the commit in the cache, so that the branch or tag also resolves offline.
    let reference = cache.repo(Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned()));
    if let Err(e) = reference.create_ref(&info.sha) {
        tracing::warn!(
            model = id,
            error = %e,
            "cannot record the revision's commit in the cache: it will not resolve offline"
        );
    }
    Ok(Snapshot { commit, directory })
}

/// Fetches the files of a text model. Returns where its configuration is.
fn text_files(
    repo: &ApiRepo,
    info: &RepoInfo,
    fetch: &dyn Fn(&ApiRepo, &str) -> Result<PathBuf, Asked>,
    name: &str,
) -> Result<PathBuf, Asked> {
    let refused = |message: String| Asked::Refused(FilesError::Hub(message));
    let there = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
    let mut config = None;
    for name in manifest::configuration(there) {
        let path = fetch(repo, name)?;
        if CONFIGS.contains(&name) {
            config = Some(path);
        } else if name == "modules.json" {
            for file in module_files(read_json(&path)?.as_ref(), there).map_err(Asked::Refused)? {
                fetch(repo, &file)?;
            }
        }
    }
    let Some(config) = config else {
        return Err(refused(format!("{name} has no {}", CONFIGS.join(" or "))));
    };
    let weights = manifest::weights(there, |name| read_json(&fetch(repo, name)?))?;
    let Some(weights) = weights else {
        return Err(refused(format!(
            "{name} has no weights that kandle reads: neither safetensors nor pytorch_model.bin"
        )));
    };
    for name in weights {
        fetch(repo, &name)?;
    }
    Ok(config)
}

/// The directory that `name` is relative to.
fn root(path: PathBuf, name: &str) -> PathBuf {
    let depth = name.split('/').count();
    path.ancestors().nth(depth).map(PathBuf::from).unwrap_or_default()
}

fn read_json(path: &std::path::Path) -> Result<Option<serde_json::Value>, Asked> {
    let bytes = std::fs::read(path)
        .map_err(|error| Asked::Refused(FilesError::Io { file: path.display().to_string(), error }))?;
    Ok(serde_json::from_slice(&bytes).ok())
}

fn cached(cache: &Cache, id: &str, revision: &str, wants: Wants) -> Option<Snapshot> {
    let repo = cache.repo(Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned()));
    let known = match wants {
        Wants::Checkpoint => &CONFIGS,
        Wants::Onnx => &ONNX,
    };
    if let Some((file, name)) = known.iter().find_map(|name| Some((repo.get(name)?, name))) {
        let directory = root(file, name);
        let commit = directory.file_name()?.to_str()?.to_owned();
        return Some(Snapshot { commit, directory });
    }
    // The revision may be a commit.
    let directory = repo.pointer_path(revision);
    let there = known.iter().any(|name| directory.join(name).exists());
    there.then(|| Snapshot { commit: revision.to_owned(), directory })
}

/// The HTTP status of an error response.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        assert!(is_id("org/name-1.5"));
        assert!(is_id("bert"));
        assert!(!is_id("./model"));
        assert!(!is_id("/srv/model"));
        assert!(!is_id("a/b/c"));
        assert!(!is_id(""));
    }

    #[test]
    fn a_number_in_a_message_is_not_a_status() {
        let refused = |error| status(&ApiError::RequestError(Box::new(error)));
        assert_eq!(refused(ureq::Error::StatusCode(404)), Some(404));
        assert_eq!(refused(ureq::Error::BadUri("http://hub/models/resnet-404".to_owned())), None);
    }
}
