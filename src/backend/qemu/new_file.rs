//! A file that has its name once it is complete, and is gone if that never comes.
//!
//! Knows names and links, and not what is written. Source: `open(2)` (`O_TMPFILE`), `linkat(2)`, `rename(2)`.

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatVfs, fstatvfs, linkat, open};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A file of mode 0600 that is being written.
pub(super) struct NewFile {
    path: PathBuf,
    replace: bool,
    content: Content,
}

enum Content {
    /// Without a name it ends with its last user, also when this process is killed.
    Unnamed(File),
    /// Beside its later name.
    Named(NamedTempFile),
}

impl NewFile {
    /// Begins the file that is to be `path`. One that is there already is an error, unless it is a plain file and to
    /// be replaced. With `named` it has a name at once, for a writer that opens it by that.
    pub(super) fn create(path: &Path, replace: bool, named: bool) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(ErrorKind::IsADirectory, "it is a directory; name a file"));
        };
        match path.symlink_metadata() {
            Ok(there) if !there.is_file() => {
                let why = "something is there that is no plain file; name another";
                return Err(io::Error::new(ErrorKind::AlreadyExists, why));
            }
            Ok(_) if !replace => {
                let why = "the file exists; --force replaces it";
                return Err(io::Error::new(ErrorKind::AlreadyExists, why));
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let unnamed = || {
            let mode = Mode::RUSR | Mode::WUSR;
            let file = open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode).ok()?;
            let file = File::from(file);
            // Without /proc it could never be named.
            Path::new(&link_to(&file)).exists().then_some(file)
        };
        let content = match if named { None } else { unnamed() } {
            Some(file) => Content::Unnamed(file),
            // Not every filesystem has files without names.
            None => {
                let prefix = format!(".{}.", name.to_string_lossy());
                Content::Named(tempfile::Builder::new().prefix(&prefix).tempfile_in(directory)?)
            }
        };
        Ok(Self { path, replace, content })
    }

    /// What it will be called.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What it is called until then.
    pub(super) fn name_now(&self) -> Option<&Path> {
        match &self.content {
            Content::Unnamed(_) => None,
            Content::Named(file) => Some(file.path()),
        }
    }

    fn file(&self) -> &File {
        match &self.content {
            Content::Unnamed(file) => file,
            Content::Named(file) => file.as_file(),
        }
    }

    /// Its size in bytes.
    pub(super) fn len(&self) -> io::Result<u64> {
        Ok(self.file().metadata()?.len())
    }

    /// How many bytes more its filesystem takes; `None` where it does not say.
    pub(super) fn room(&self) -> Option<u64> {
        let StatVfs { f_bavail, f_frsize, .. } = fstatvfs(self.file()).ok()?;
        Some(f_bavail.saturating_mul(f_frsize))
    }

    /// Gives it its name. What has taken that name meanwhile stays, unless it is to be replaced.
    pub(super) fn publish(self) -> io::Result<()> {
        match self.content {
            Content::Unnamed(file) => {
                let link = |name: &Path| Ok(linkat(CWD, link_to(&file), CWD, name, AtFlags::SYMLINK_FOLLOW)?);
                if !self.replace {
                    return link(&self.path);
                }
                // A link cannot replace a file, a name can.
                let directory = self.path.parent().unwrap_or(Path::new("/"));
                let other = tempfile::Builder::new().prefix(".kstub-").make_in(directory, link)?;
                Ok(other.into_temp_path().persist(&self.path)?)
            }
            Content::Named(file) if self.replace => {
                file.persist(&self.path).map(drop).map_err(io::Error::from)
            }
            Content::Named(file) => file.persist_noclobber(&self.path).map(drop).map_err(io::Error::from),
        }
    }
}

impl AsFd for NewFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file().as_fd()
    }
}

fn link_to(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
        entries.map(|name| name.into_string().unwrap()).collect()
    }

    #[test]
    fn there_when_complete_or_not_at_all() {
        for named in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("file");
            let write = |replace, text: &str| {
                let new = NewFile::create(&path, replace, named)?;
                assert_eq!(
                    new.name_now().is_some(),
                    names(directory.path()).iter().any(|n| n.starts_with(".file."))
                );
                new.file().write_all(text.as_bytes())?;
                assert_eq!(new.len().unwrap(), text.len() as u64);
                new.publish()
            };
            drop(NewFile::create(&path, false, named).unwrap());
            assert_eq!(names(directory.path()), [""; 0]);
            write(false, "one").unwrap();
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
            let error = write(false, "two").unwrap_err();
            assert_eq!(
                (error.kind(), error.to_string().contains("--force")),
                (ErrorKind::AlreadyExists, true)
            );
            assert_eq!(std::fs::read(&path).unwrap(), b"one");
            write(true, "three").unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"three");
            // Somebody else takes the name meanwhile.
            let late = directory.path().join("late");
            let new = NewFile::create(&late, false, named).unwrap();
            std::fs::write(&late, "theirs").unwrap();
            assert_eq!(new.publish().unwrap_err().kind(), ErrorKind::AlreadyExists);
            assert_eq!(std::fs::read(&late).unwrap(), b"theirs");
            assert_eq!(names(directory.path()).len(), 2);
        }
    }

    #[test]
    fn only_plain_files_are_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("elsewhere", &link).unwrap();
        for path in [link.as_path(), directory.path(), Path::new("/dev/full"), Path::new("/")] {
            assert!(NewFile::create(path, true, false).is_err(), "{}", path.display());
        }
        assert!(NewFile::create(&directory.path().join("none/file"), false, false).is_err());
        assert_eq!(names(directory.path()), ["link"]);
    }
}
