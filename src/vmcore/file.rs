//! Reading a file at an offset, saying how far it got: the layer under every format.
//!
//! Always pread, never a mapping: a file cut short under a mapping kills the process with SIGBUS.
//! Source: pread(2).

use super::error::Error;
use crate::memory::Unreadable;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes by offset.
pub trait ReadAt: Send + Sync {
    /// The number of bytes; reads from there on are [`Stop::Ended`].
    fn size(&self) -> u64;

    /// Bytes on the disk: what may be walked without a hostile file making it endless.
    fn stored(&self) -> u64 {
        self.size()
    }

    /// Fills `buf` from `offset` upward as far as possible.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> FileRead;

    /// Where the byte at `offset` lies in the file that the user sees.
    fn origin(&self, offset: u64) -> u64 {
        offset
    }
}

/// How much of a buffer was filled, and what stopped the read.
#[derive(Debug)]
#[must_use]
pub struct FileRead {
    /// Bytes filled from the start of the buffer.
    pub filled: usize,
    /// `None` if and only if the whole buffer was filled.
    pub stopped: Option<Stop>,
}

/// Why a read stopped. Offsets are those of the file that the user sees.
#[derive(Debug)]
pub enum Stop {
    /// The file ends at `offset`.
    Ended {
        /// Offset of the first missing byte.
        offset: u64,
    },
    /// The system failed the read.
    Io {
        /// Offset of the failed read.
        offset: u64,
        /// The system's reason.
        source: io::Error,
    },
}

impl From<Stop> for Unreadable {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Ended { offset } => Self::Truncated { offset },
            Stop::Io { offset, source } => Self::Io { offset, message: source.to_string() },
        }
    }
}

impl FileRead {
    /// The whole buffer was filled.
    pub fn complete(filled: usize) -> Self {
        Self { filled, stopped: None }
    }
    /// The file ends at `offset`.
    pub fn ended(filled: usize, offset: u64) -> Self {
        Self { filled, stopped: Some(Stop::Ended { offset }) }
    }
}

/// A regular file on disk.
pub struct DiskFile {
    file: File,
    size: u64,
}

impl DiskFile {
    /// Opens `path`; refuses what is no regular file, and empty files.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let path_buf = || path.to_path_buf();
        // Looked at before it is opened: opening a pipe would wait for its writer.
        let open_error = |source: io::Error| match source.kind() {
            io::ErrorKind::PermissionDenied => Error::Denied { path: path_buf() },
            _ => Error::Open { path: path_buf(), source },
        };
        let meta = std::fs::metadata(path).map_err(open_error)?;
        if meta.is_dir() {
            return Err(Error::Directory { path: path_buf() });
        }
        if !meta.is_file() {
            return Err(Error::NotRegular { path: path_buf() });
        }
        let file = File::open(path).map_err(open_error)?;
        let size = file.metadata().map_err(open_error)?.len();
        if size == 0 {
            return Err(Error::Empty { path: path_buf() });
        }
        Ok(Self { file, size })
    }
}

impl ReadAt for DiskFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> FileRead {
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            // Beyond i64::MAX the system says EINVAL; no file reaches that far.
            let Some(at) = offset.checked_add(filled as u64).filter(|&at| at < self.size) else {
                return FileRead::ended(filled, self.size);
            };
            match self.file.read_at(rest, at) {
                // Cut since it was opened.
                Ok(0) => return FileRead::ended(filled, at),
                Ok(n) => filled += n.min(rest.len()),
                Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return FileRead { filled, stopped: Some(Stop::Io { offset: at, source }) },
            }
        }
        FileRead::complete(filled)
    }
}

/// A file that is all in memory: for fuzzing and tests.
impl ReadAt for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> FileRead {
        let have = usize::try_from(offset).ok().and_then(|at| self.get(at..)).unwrap_or_default();
        let n = have.len().min(buf.len());
        buf[..n].copy_from_slice(&have[..n]);
        if n == buf.len() { FileRead::complete(n) } else { FileRead::ended(n, self.size()) }
    }
}

/// A file with its name, for errors.
#[derive(Clone)]
pub(super) struct Source {
    pub path: PathBuf,
    pub file: Arc<dyn ReadAt>,
}

impl Source {
    /// Fills `buf` from `offset` with what is part of `what`.
    pub fn read_exact(&self, offset: u64, buf: &mut [u8], what: &'static str) -> Result<(), Error> {
        match self.file.read_at(offset, buf).stopped {
            None => Ok(()),
            Some(Stop::Ended { offset }) => Err(Error::Truncated { path: self.path.clone(), offset, what }),
            Some(Stop::Io { offset, source }) => Err(Error::Io { path: self.path.clone(), offset, source }),
        }
    }

    /// Up to `max` bytes of the `len` at `offset`, as far as the file has them.
    pub fn read_up_to(&self, offset: u64, len: u64, max: u64) -> (Vec<u8>, Option<Stop>) {
        // Bounded by the file as well: a length field must not make us allocate what is not there.
        let have = self.file.size().saturating_sub(offset).min(self.file.stored());
        let want = len.min(max).min(have);
        let mut bytes = vec![0; usize::try_from(want).unwrap_or(0)];
        let read = self.file.read_at(offset, &mut bytes);
        bytes.truncate(read.filled);
        let short = (want < len.min(max)).then_some(Stop::Ended { offset: self.end() });
        (bytes, read.stopped.or(short))
    }

    /// Where the file ends, as the user sees it.
    pub fn end(&self) -> u64 {
        self.file.origin(self.file.size())
    }

    /// An error about the structure at `offset`.
    pub fn invalid(&self, offset: u64, what: impl Into<String>) -> Error {
        Error::Invalid { path: self.path.clone(), offset: self.file.origin(offset), what: what.into() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    #[test]
    fn a_short_file_is_not_an_io_error() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"0123456789").unwrap();
        let file = DiskFile::open(file.path()).unwrap();
        let mut buf = [0; 8];
        assert!(file.read_at(2, &mut buf).stopped.is_none());
        assert_eq!(&buf, b"23456789");
        for at in [4, 10, 11, u64::MAX - 3, u64::MAX] {
            let read = file.read_at(at, &mut buf);
            assert_eq!(read.filled as u64, 10u64.saturating_sub(at));
            assert!(matches!(read.stopped, Some(Stop::Ended { offset: 10 })), "{at}: {read:?}");
        }
        assert_eq!(file.read_at(u64::MAX, &mut []).filled, 0);
    }

    #[test]
    fn what_is_no_file_with_bytes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(DiskFile::open(dir.path()), Err(Error::Directory { .. })));
        assert!(matches!(DiskFile::open(Path::new("/dev/null")), Err(Error::NotRegular { .. })));
        assert!(matches!(DiskFile::open(&dir.path().join("none")), Err(Error::Open { .. })));
        let empty = dir.path().join("empty");
        File::create(&empty).unwrap();
        assert!(matches!(DiskFile::open(&empty), Err(Error::Empty { .. })));
    }
}
