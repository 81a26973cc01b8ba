//! The transactional.id. It stays the same over restarts, so that a transaction left open is aborted at once. No two
//! members have the same id, because they would fence each other.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use super::error::TransactionalIdError;
use crate::hex::hex;
use crate::settings::Settings;

/// The id. As long as this lives, other processes on this machine take another one.
#[derive(Debug)]
pub(super) struct TransactionalId {
    pub text: String,
    /// The lock file that reserves the id's number; `None` if the id is configured.
    _held: Option<File>,
}

/// Most members of one group on one machine.
const SLOTS: usize = 4096;

impl TransactionalId {
    /// Takes `delivery.transactional_id` if it is set; else the group with `group.instance.id`, which only one member
    /// can have; else the group with the host name and the lowest number that no other process here holds.
    pub fn take(settings: &Settings) -> Result<Self, TransactionalIdError> {
        if let Some(id) = configured(settings) {
            return Ok(Self { text: id, _held: None });
        }
        let (group, host) = (&settings.input.group, host()?);
        let (number, held) = slot(&std::env::temp_dir(), &format!("{}/{group}", settings.kafka.brokers))?;
        Ok(Self { text: format!("{group}-{host}-{number}"), _held: Some(held) })
    }
}

/// The id that the settings name.
fn configured(settings: &Settings) -> Option<String> {
    let instance = || settings.property("group.instance.id");
    let of_instance = || Some(format!("{}-{}", settings.input.group, instance()?));
    settings.delivery.transactional_id.clone().or_else(of_instance)
}

/// The id that a single member on this machine would take.
pub fn first(settings: &Settings) -> Result<String, TransactionalIdError> {
    match configured(settings) {
        Some(id) => Ok(id),
        None => Ok(format!("{}-{}-0", settings.input.group, host()?)),
    }
}

/// Locks the lowest free number for `name`, with a lock file in `directory`.
fn slot(directory: &Path, name: &str) -> Result<(usize, File), TransactionalIdError> {
    use sha2::{Digest, Sha256};
    let name = hex(&Sha256::digest(name)[..8]);
    for number in 0..SLOTS {
        let path = directory.join(format!("kandle-{name}-{number}.lock"));
        let failed = |error| TransactionalIdError::Lock { path: path.display().to_string(), error };
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => return Ok((number, file)),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
    }
    Err(TransactionalIdError::TooMany(SLOTS))
}

fn host() -> Result<String, TransactionalIdError> {
    let name =
        std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
    name.map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .ok_or(TransactionalIdError::NoHostName)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_and_never_one_that_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let take = || slot(directory.path(), "b/g").unwrap();
        let (first, second) = (take(), take());
        assert_eq!((first.0, second.0), (0, 1));
        assert_eq!(slot(directory.path(), "b/other").unwrap().0, 0);
        drop(first);
        assert_eq!(take().0, 0, "the same again");
    }
}
