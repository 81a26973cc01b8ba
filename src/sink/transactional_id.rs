//! The transactional.id: the same whenever this member starts again, so that what its last life left
//! open is aborted at once, and never that of another member, which would be fenced.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use super::error::TransactionalIdError;
use crate::settings::Settings;

/// The id; others on this machine take another one for as long as this lives.
#[derive(Debug)]
pub(super) struct TransactionalId {
    pub text: String,
    /// Locked.
    _held: Option<File>,
}

/// Members of one group on one machine.
const SLOTS: usize = 4096;

impl TransactionalId {
    /// `delivery.transactional_id`; else the group with its static member's `group.instance.id`,
    /// which the group itself keeps from being used twice; else with the machine's name and the first
    /// number that no other process here holds.
    pub fn take(settings: &Settings) -> Result<Self, TransactionalIdError> {
        if let Some(id) = &settings.delivery.transactional_id {
            return Ok(Self { text: id.clone(), _held: None });
        }
        let group = &settings.input.group;
        if let Some(instance) = settings.property("group.instance.id") {
            return Ok(Self { text: format!("{group}-{instance}"), _held: None });
        }
        let host = host()?;
        let (number, held) = slot(&std::env::temp_dir(), &format!("{}/{group}", settings.kafka.brokers))?;
        Ok(Self { text: format!("{group}-{host}-{number}"), _held: Some(held) })
    }
}

/// The lowest free number among those of `name`.
fn slot(directory: &Path, name: &str) -> Result<(usize, File), TransactionalIdError> {
    use sha2::{Digest, Sha256};
    let name: String = Sha256::digest(name).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
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
