//! A directory that only this user can enter, for what gdb is given: a socket, a script, files with symbols.
//!
//! Goes with its owner. Of a kstub that was killed it stays behind, some hundred MiB, until the next one makes its own:
//! a lock, which the system drops with the process, tells who still lives. Source: `flock(2)`.

use rustix::fs::{FlockOperation, flock};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

const PREFIX: &str = "kstub-";
const LOCK: &str = ".lock";

/// The directory; removed with all that is in it when dropped.
pub struct PrivateDirectory {
    // Dropped first: what is removed must not look alive.
    made: tempfile::TempDir,
    _lock: File,
}

impl PrivateDirectory {
    /// Makes one where temporary files go, and removes those whose makers were killed.
    pub fn new() -> io::Result<Self> {
        let parent = std::env::temp_dir();
        remove_abandoned(&parent);
        loop {
            let made = tempfile::Builder::new()
                .prefix(PREFIX)
                .permissions(Permissions::from_mode(0o700))
                .tempdir_in(&parent)?;
            let path = made.path().join(LOCK);
            let lock = File::create(&path)?;
            flock(&lock, FlockOperation::LockExclusive)?;
            // Between the two somebody may have taken it for abandoned.
            if path.try_exists()? {
                return Ok(Self { made, _lock: lock });
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.made.path()
    }
}

/// Directories without a lock are younger than theirs, or none of ours.
fn remove_abandoned(parent: &Path) {
    let user = rustix::process::getuid().as_raw();
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // Of the entry itself: a link is none of ours.
        let is_ours = entry.metadata().is_ok_and(|found| found.is_dir() && found.uid() == user);
        let Some(lock) = is_ours.then(|| File::open(entry.path().join(LOCK)).ok()).flatten() else {
            continue;
        };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
            && let Err(error) = std::fs::remove_dir_all(entry.path())
        {
            tracing::debug!("{} stays: {error}", entry.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_abandoned_goes_and_what_is_in_use_stays() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let directory = parent.path().join(name);
            std::fs::create_dir(&directory).unwrap();
            std::fs::write(directory.join("vmlinux"), "symbols").unwrap();
            directory
        };
        let (abandoned, used, unlocked, other) =
            (make("kstub-1"), make("kstub-2"), make("kstub-3"), make("else"));
        let locks = [&abandoned, &used, &other].map(|directory| File::create(directory.join(LOCK)).unwrap());
        flock(&locks[1], FlockOperation::LockExclusive).unwrap();
        std::os::unix::fs::symlink(&other, parent.path().join("kstub-4")).unwrap();
        remove_abandoned(parent.path());
        assert!(!abandoned.exists());
        assert!([used, unlocked, other].iter().all(|kept| kept.join("vmlinux").exists()));
    }

    #[test]
    fn it_is_removed_by_its_owner() {
        let directory = PrivateDirectory::new().unwrap();
        let (path, mode) = (directory.path().to_owned(), directory.path().metadata().unwrap().mode());
        assert_eq!(mode & 0o777, 0o700);
        remove_abandoned(path.parent().unwrap());
        assert!(path.exists());
        drop(directory);
        assert!(!path.exists());
    }
}
