//! Where a vmlinux was last time: one small file for each build-id, which holds a path.
//!
//! It saves a search and is believed no further than that: the file it names is checked like any other. Without a
//! cache directory, or one that cannot be written, nothing is lost but time.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Longer than any path (`PATH_MAX`).
const MAX_LEN: u64 = 4096;

/// The path kept in `directory` for `build_id`, which must be hex.
pub(super) fn recall(directory: &Path, build_id: &str) -> Option<PathBuf> {
    let mut path = Vec::new();
    let file = std::fs::File::open(directory.join(build_id)).ok()?;
    file.take(MAX_LEN).read_to_end(&mut path).ok()?;
    let path = PathBuf::from(OsStr::from_bytes(path.strip_suffix(b"\n")?));
    path.is_absolute().then_some(path)
}

/// Keeps `path` in `directory` for `build_id`, which must be hex.
pub(super) fn remember(directory: &Path, build_id: &str, path: &Path) {
    let keep = || -> std::io::Result<()> {
        let path = std::path::absolute(path)?;
        if recall(directory, build_id).as_ref() == Some(&path) {
            return Ok(());
        }
        std::fs::create_dir_all(directory)?;
        // Readers see the old file or the new one, never half of one.
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(&[path.as_os_str().as_bytes(), b"\n"].concat())?;
        file.persist(directory.join(build_id)).map_err(|error| error.error)?;
        Ok(())
    };
    if let Err(error) = keep() {
        tracing::debug!("where the vmlinux is was not kept in {}: {error}", directory.display());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn paths_come_back_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("kstub/vmlinux");
        assert_eq!(recall(&cache, "ab"), None);
        let odd = PathBuf::from(OsStr::from_bytes(b"/x y/\xff'\n"));
        remember(&cache, "ab", &odd);
        assert_eq!(recall(&cache, "ab"), Some(odd));
        assert_eq!(recall(&cache, "cd"), None);
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn what_was_tampered_with_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for text in [&b""[..], b"/cut", b"relative\n"] {
            std::fs::write(dir.path().join("ab"), text).unwrap();
            assert_eq!(recall(dir.path(), "ab"), None, "{text:?}");
        }
        // A directory that cannot be made.
        remember(Path::new("/proc/nowhere"), "ab", Path::new("/x"));
    }
}
