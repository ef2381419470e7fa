//! Dump files: what they hold of a machine's physical memory, and the raw notes about its CPUs.
//!
//! Told apart by content, never by name. Knows no symbol, no register and no page table: `backend` reads the
//! notes' registers. Files are hostile: every count is bounded by the file's length. Each format's module
//! names its source.

mod arguments;
mod elf;
mod error;
mod file;
mod flattened;
mod kdump;
mod lime;
mod notes;
mod probe;
mod qemu_note;
mod raw;
mod segments;
mod stored;
#[cfg(test)]
mod tests;
mod window;

pub use error::Error;
pub use file::{DiskFile, FileRead, ReadAt, Stop};
pub use flattened::{Cut, Flattened};
pub use notes::{Note, NoteIter, Notes, PRSTATUS_SIZE};
pub use qemu_note::{QemuCpu, QemuSegment};

use crate::addr::{PAGE_SIZE, PhysAddr, PhysRange};
use crate::bytes::ByteSize;
use crate::memory::{PhysicalMemory, ReadOutcome};
use elf::ElfCore;
use kdump::Kdump;
use raw::RawMemory;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use stored::StoredMemory;

/// Pages kept by default.
pub const DEFAULT_CACHE_BYTES: u64 = 64 << 20;

/// An opened dump: one file, or several that make one.
pub struct Vmcore {
    path: PathBuf,
    body: Body,
    ranges: Vec<PhysRange>,
    notes: Notes,
    phys_base_hints: Vec<u64>,
    facts: Vec<(&'static str, String)>,
    problems: Vec<String>,
}

enum Body {
    Stored(Box<StoredMemory>),
    Kdump(Box<Kdump>),
}

impl Body {
    fn kdump(&self) -> Option<&Kdump> {
        match self {
            Self::Kdump(kdump) => Some(kdump),
            Self::Stored(_) => None,
        }
    }
}

/// What a format's reader found out.
struct Contents {
    body: Body,
    ranges: Vec<PhysRange>,
    notes: Notes,
    phys_base_hints: Vec<u64>,
    facts: Vec<(&'static str, String)>,
    problems: Vec<String>,
    /// Whether all that was to be written is there.
    complete: bool,
    /// Bytes of memory that are there.
    held: u64,
}

impl From<ElfCore> for Contents {
    fn from(elf: ElfCore) -> Self {
        Self {
            held: elf.memory.bytes_held(),
            body: Body::Stored(Box::new(elf.memory)),
            ranges: elf.ranges,
            notes: elf.notes,
            phys_base_hints: elf.phys_base_hints,
            facts: vec![("segments", elf.segments.to_string())],
            problems: elf.problems,
            complete: elf.complete,
        }
    }
}

impl From<RawMemory> for Contents {
    fn from(raw: RawMemory) -> Self {
        Self {
            held: raw.memory.bytes_held(),
            body: Body::Stored(Box::new(raw.memory)),
            ranges: raw.ranges,
            notes: Notes::default(),
            phys_base_hints: Vec::new(),
            facts: vec![raw.fact],
            problems: raw.problems,
            complete: raw.complete,
        }
    }
}

impl From<Kdump> for Contents {
    fn from(mut kdump: Kdump) -> Self {
        Self {
            ranges: kdump.ranges().to_vec(),
            notes: std::mem::take(&mut kdump.notes),
            phys_base_hints: kdump.phys_base_hint().into_iter().collect(),
            facts: kdump.facts(),
            problems: std::mem::take(&mut kdump.problems),
            complete: kdump.complete,
            held: kdump.held_pages().saturating_mul(PAGE_SIZE),
            body: Body::Kdump(Box::new(kdump)),
        }
    }
}

impl Vmcore {
    /// Opens the dump at `path`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_parts(&[path.to_path_buf()])
    }

    /// Reads `file` as a dump, keeping up to `cache_bytes` of its pages; `path` is its name in errors.
    pub fn from_file(path: &Path, file: Arc<dyn ReadAt>, cache_bytes: u64) -> Result<Self, Error> {
        Self::of_files(vec![arguments::File::new(path, file)?], cache_bytes)
    }

    /// Puts together what `about` says of the files and what is in them.
    fn new(about: About, mut contents: Contents) -> Self {
        let mut facts = vec![("format", about.format.to_string())];
        let flattened = about.records.map(|records| format!("yes ({records} records)"));
        facts.push(("flattened", flattened.unwrap_or_else(|| "no".into())));
        facts.append(&mut contents.facts);
        let total = contents.ranges.iter().map(PhysRange::len).fold(0, u64::saturating_add);
        facts.push(("dumped", format!("{} of {}", ByteSize(contents.held), ByteSize(total))));
        let complete = contents.complete && about.problems.is_empty();
        facts.push(("complete", if complete { "yes" } else { "no" }.into()));
        let mut problems = about.problems;
        problems.append(&mut contents.problems);
        problems.append(&mut contents.notes.problems);
        Self {
            path: about.path,
            body: contents.body,
            ranges: contents.ranges,
            notes: contents.notes,
            phys_base_hints: contents.phys_base_hints,
            facts,
            problems,
        }
    }

    /// The file, or the one that was named first.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The notes that matter, raw.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// The VMCOREINFO text that the dump itself brings, unchecked.
    pub fn vmcoreinfo(&self) -> Option<&[u8]> {
        self.notes.vmcoreinfo.as_deref()
    }

    /// Values of `phys_base` which the headers suggest; QEMU's are often wrong.
    pub fn phys_base_hints(&self) -> Vec<u64> {
        self.phys_base_hints.clone()
    }

    /// What the file is, as names and values for people.
    pub fn facts(&self) -> &[(&'static str, String)] {
        &self.facts
    }

    /// What is wrong with the file, one sentence each, with the cure.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
}

/// What is known of the files before their format's reader sees them.
struct About {
    path: PathBuf,
    format: &'static str,
    /// Number of records, if flattened.
    records: Option<u64>,
    /// Why a flattened stream is incomplete.
    problems: Vec<String>,
}

/// The kernel is loaded at a multiple of 2 MiB (`MIN_KERNEL_ALIGN`). QEMU takes the decimal `phys_base` of
/// VMCOREINFO for hexadecimal, so its header often has another value.
fn plausible_phys_base(hint: u64) -> bool {
    hint.is_multiple_of(2 << 20)
}

impl PhysicalMemory for Vmcore {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        match &self.body {
            Body::Stored(memory) => memory.read_phys(at, buf),
            Body::Kdump(kdump) => kdump.pages().read_phys(at, buf),
        }
    }

    fn ranges(&self) -> Vec<PhysRange> {
        self.ranges.clone()
    }

    fn stored_ranges(&self) -> Vec<PhysRange> {
        match &self.body {
            Body::Stored(memory) => memory.in_files(),
            Body::Kdump(_) => self.ranges(),
        }
    }

    fn is_ram(&self, at: PhysAddr) -> bool {
        let next = self.ranges.partition_point(|range| range.end <= at);
        self.ranges.get(next).is_some_and(|range| range.contains(at))
    }
}
