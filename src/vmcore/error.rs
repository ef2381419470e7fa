//! Why a file could not be opened as a dump.

use crate::addr::PhysAddr;
use std::io;
use std::path::PathBuf;

/// Why a file could not be opened as a dump: each names the file, what is wrong, then the cure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system would not open it.
    #[error("cannot open '{}'", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The user may not read it.
    #[error("'{}' is not readable for this user; change its permissions or owner", path.display())]
    Denied {
        /// The file.
        path: PathBuf,
    },
    /// It is a directory.
    #[error("'{}' is a directory; name the dump file in it", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
    },
    /// It is a pipe, socket or device.
    #[error("'{}' is not a regular file; copy the dump to a file first", path.display())]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// It has no bytes.
    #[error("'{}' is empty; the dump was not written, or its copy failed", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// It is something else than a dump.
    #[error("'{}' is not a kernel dump but {looks_like}; {cure}", path.display())]
    NotADump {
        /// The file.
        path: PathBuf,
        /// What its content looks like, with an article.
        looks_like: String,
        /// What to do instead.
        cure: &'static str,
    },
    /// It is a dump of a kind that is not read.
    #[error("'{}' is {what}, which is not supported; {cure}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is, with an article.
        what: String,
        /// What to do instead.
        cure: &'static str,
    },
    /// It is a dump of another architecture.
    #[error("'{}' is a dump of {machine}; only x86-64 is supported", path.display())]
    OtherMachine {
        /// The file.
        path: PathBuf,
        /// The architecture.
        machine: String,
    },
    /// It is one part of a dump that `makedumpfile --split` wrote, and other parts lie beside it.
    #[error(
        "'{}' is only a part of a split dump, and other parts lie beside it; name all of its parts: {}",
        path.display(), quoted(parts)
    )]
    MoreParts {
        /// The file that was named.
        path: PathBuf,
        /// All parts, in the order of their page frames.
        parts: Vec<PathBuf>,
    },
    /// Two files are the same part of a split dump.
    #[error(
        "'{}' and '{}' are the same part of a split dump (pages {start_pfn:#x} to {end_pfn:#x}); name each \
         part once",
        path.display(), other.display()
    )]
    PartTwice {
        /// One file.
        path: PathBuf,
        /// The other.
        other: PathBuf,
        /// First page frame of the part.
        start_pfn: u64,
        /// One past its last page frame.
        end_pfn: u64,
    },
    /// Two files are not of the same split dump.
    #[error(
        "'{}' and '{}' are not parts of one dump: {what}; name the parts that one 'makedumpfile --split' wrote",
        path.display(), other.display()
    )]
    OtherDump {
        /// One file.
        path: PathBuf,
        /// The other.
        other: PathBuf,
        /// How they differ.
        what: &'static str,
    },
    /// Several files were named, and this one is a dump of its own.
    #[error(
        "several files were named, but '{}' is no part of a split dump; name one dump, all parts of a split \
         one, or raw images as FILE@PHYSADDR",
        path.display()
    )]
    NotAPart {
        /// The file.
        path: PathBuf,
    },
    /// Nothing was named.
    #[error("no dump was named; name one dump, all parts of a split one, or raw images as FILE@PHYSADDR")]
    Nothing,
    /// A raw image's address cannot be used.
    #[error("'{}': {what}; write FILE@PHYSADDR with a hexadecimal address, as in ram.bin@0x100000000", argument.display())]
    RawAddress {
        /// The argument.
        argument: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Two raw images claim the same memory.
    #[error(
        "'{}' and '{}' both hold physical address {at:#x}; give each image the address at which it starts",
        path.display(), other.display()
    )]
    RawOverlap {
        /// One file.
        path: PathBuf,
        /// The other.
        other: PathBuf,
        /// The first address that both have.
        at: PhysAddr,
    },
    /// It ends inside a structure without which nothing can be read.
    #[error(
        "'{}' ends at offset {offset:#x}, inside {what}; it was cut, copy or take it again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// File offset of the first missing byte.
        offset: u64,
        /// The structure.
        what: &'static str,
    },
    /// A structure without which nothing can be read makes no sense.
    #[error("'{}' is damaged at offset {offset:#x}: {what}; copy or take it again", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// File offset of the structure.
        offset: u64,
        /// What is wrong with it.
        what: String,
    },
    /// Reading failed.
    #[error("reading '{}' at offset {offset:#x} failed", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// File offset of the read.
        offset: u64,
        /// The system's reason.
        source: io::Error,
    },
}

/// `'a' 'b'`, ready for a command line unless a name has quotes in it.
fn quoted(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| format!("'{}'", path.display())).collect::<Vec<_>>().join(" ")
}
