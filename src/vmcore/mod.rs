//! Dump files: what they hold of a machine's physical memory, and the raw notes about its CPUs.
//!
//! Told apart by content, never by name. Knows no symbol, no register and no page table: `backend` reads the
//! notes' registers. Files are hostile: every count is bounded by the file's length. Each format's module
//! names its source.

mod elf;
mod error;
mod file;
mod flattened;
mod kdump;
mod notes;
mod probe;
mod qemu_note;
mod segments;
#[cfg(test)]
mod tests;

pub use error::Error;
pub use file::{DiskFile, FileRead, ReadAt, Stop};
pub use flattened::{Cut, Flattened};
pub use notes::{Note, NoteIter, Notes, PRSTATUS_SIZE};
pub use qemu_note::{QemuCpu, QemuSegment};

use crate::addr::{PhysAddr, PhysRange};
use crate::memory::{PhysicalMemory, ReadOutcome};
use elf::ElfCore;
use file::Source;
use kdump::Kdump;
use probe::Format;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pages kept by default.
pub const DEFAULT_CACHE_BYTES: u64 = 64 << 20;

/// An opened dump file.
pub struct Vmcore {
    path: PathBuf,
    body: Body,
    ranges: Vec<PhysRange>,
    notes: Notes,
    facts: Vec<(&'static str, String)>,
    problems: Vec<String>,
}

enum Body {
    Elf(Box<ElfCore>),
    Kdump(Box<Kdump>),
}

impl Vmcore {
    /// Opens the dump at `path`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_with_cache(path, DEFAULT_CACHE_BYTES)
    }

    /// Opens the dump at `path`, keeping up to `cache_bytes` of pages.
    pub fn open_with_cache(path: &Path, cache_bytes: u64) -> Result<Self, Error> {
        Self::from_file(path, Arc::new(DiskFile::open(path)?), cache_bytes)
    }

    /// Reads `file` as a dump; `path` is its name in errors.
    pub fn from_file(path: &Path, file: Arc<dyn ReadAt>, cache_bytes: u64) -> Result<Self, Error> {
        let mut source = Source { path: path.to_path_buf(), file };
        let mut problems = Vec::new();
        let mut flattened = None;
        if probe::is_flattened(&source) {
            let stream = Arc::new(Flattened::open(&source)?);
            if let Some(Cut { offset, why }) = stream.cut() {
                problems.push(format!(
                    "the flattened stream is incomplete: {why} (offset {offset:#x}), and what it did not \
                     write reads as truncated; copy or take the dump again"
                ));
            }
            source.file = Arc::clone(&stream) as Arc<dyn ReadAt>;
            flattened = Some(stream);
        }
        let format = probe::format(&source)?;
        let mut vmcore = Self {
            path: source.path.clone(),
            ranges: Vec::new(),
            notes: Notes::default(),
            facts: vec![("format", format.name().to_string())],
            problems,
            body: match format {
                Format::Elf => Body::Elf(Box::new(ElfCore::open(source, cache_bytes)?)),
                Format::Kdump => Body::Kdump(Box::new(Kdump::open(source, cache_bytes)?)),
            },
        };
        let flattened = match flattened {
            Some(stream) => format!("yes ({} records)", stream.records()),
            None => "no".into(),
        };
        vmcore.facts.push(("flattened", flattened));
        let whole = vmcore.problems.is_empty();
        let whole = vmcore.take_over() && whole;
        vmcore.facts.push(("complete", if whole { "yes" } else { "no" }.into()));
        Ok(vmcore)
    }

    /// Collects what the format's reader found out; whether it found the file complete.
    fn take_over(&mut self) -> bool {
        let (held, complete) = match &mut self.body {
            Body::Elf(elf) => {
                self.ranges = std::mem::take(&mut elf.ranges);
                self.notes = std::mem::take(&mut elf.notes);
                self.problems.append(&mut elf.problems);
                self.facts.push(("segments", elf.segments.to_string()));
                (elf.bytes_held, elf.complete)
            }
            Body::Kdump(kdump) => {
                self.ranges = kdump.ranges().to_vec();
                self.notes = std::mem::take(&mut kdump.notes);
                self.problems.append(&mut kdump.problems);
                self.facts.extend(kdump.facts());
                let (dumped, ram) = kdump.page_counts();
                self.facts.push(("pages", format!("{dumped} dumped of {ram} in RAM")));
                (dumped.saturating_mul(kdump.block_size()), kdump.complete)
            }
        };
        let total = self.ranges.iter().map(PhysRange::len).fold(0, u64::saturating_add);
        let ranges = self.ranges.len();
        self.facts.push((
            "ram",
            format!("{total} bytes in {ranges} {}", if ranges == 1 { "range" } else { "ranges" }),
        ));
        self.facts.push(("dumped", format!("{held} bytes")));
        self.problems.append(&mut self.notes.problems);
        complete
    }

    /// The file.
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
        match &self.body {
            Body::Elf(elf) => elf.phys_base_hints.clone(),
            Body::Kdump(kdump) => kdump.phys_base_hint().into_iter().collect(),
        }
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

/// The kernel is loaded at a multiple of 2 MiB (`MIN_KERNEL_ALIGN`). QEMU takes the decimal `phys_base` of
/// VMCOREINFO for hexadecimal, so its header often has another value.
fn plausible_phys_base(hint: u64) -> bool {
    hint.is_multiple_of(2 << 20)
}

impl PhysicalMemory for Vmcore {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        match &self.body {
            Body::Elf(elf) => elf.read_phys(at, buf),
            Body::Kdump(kdump) => kdump.pages().read_phys(at, buf),
        }
    }

    fn ranges(&self) -> Vec<PhysRange> {
        self.ranges.clone()
    }
}
