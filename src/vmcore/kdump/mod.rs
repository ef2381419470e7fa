//! The compressed dump format of makedumpfile ("kdump-compressed") and QEMU's `dump-guest-memory -z/-l/-s`.
//!
//! Knows page frames and blocks, not what is in them. A page is found in three steps: its bit in the second
//! bitmap, its descriptor (by the count of bits before it), its bytes. Source: makedumpfile `IMPLEMENTATION`,
//! crash `diskdump.c` (where it departs from it), QEMU `dump/dump.c` (`create_kdump_vmcore`).

mod bitmap;
mod codec;
mod header;
mod pages;
#[cfg(test)]
mod tests;

use super::error::Error;
use super::file::Source;
use super::notes::{Notes, without_padding};
use super::plausible_phys_base;
use crate::addr::PhysRange;
use bitmap::Bitmaps;
pub(super) use codec::Codec;
use header::{Extent, Header};
use pages::{DESCRIPTORS_PER_BLOCK, Pages};
use std::collections::BTreeMap;

/// The first bytes of the format.
pub(super) const SIGNATURE: &[u8; 8] = b"KDUMP   ";

/// The notes of 8192 CPUs fit many times.
const MAX_NOTES: u64 = 64 << 20;
const MAX_VMCOREINFO: u64 = 1 << 20;
/// Blocks of descriptors looked at to tell the compression.
const SAMPLES: u64 = 64;

/// What `dump_level` excludes (makedumpfile(8), option -d).
const LEVELS: [(u32, &str); 5] = [(1, "zero"), (2, "cache"), (4, "cache-private"), (8, "user"), (16, "free")];

/// A compressed dump.
pub(super) struct Kdump {
    header: Header,
    pages: Pages,
    pub notes: Notes,
    pub problems: Vec<String>,
    /// Whether all that was to be written is there.
    pub complete: bool,
    /// How many sampled pages each codec has.
    sampled: BTreeMap<Codec, u64>,
}

impl Kdump {
    /// Reads the headers of `source`, which starts with [`SIGNATURE`]; decoded pages are kept in up to
    /// `cache_bytes`.
    pub fn open(source: Source, cache_bytes: u64) -> Result<Self, Error> {
        let header = Header::read(&source)?;
        let mut bitmaps = Bitmaps::read(&source, &header)?;
        let mut problems = std::mem::take(&mut bitmaps.problems);
        let mut notes = Notes::default();
        if let Some(at) = header.notes {
            let bytes = read_extent(&source, at, MAX_NOTES, "ELF notes", &mut problems);
            notes.add(&bytes, at.offset);
            problems.append(&mut notes.problems);
        }
        if let Some(at) = header.vmcoreinfo {
            let bytes = read_extent(&source, at, MAX_VMCOREINFO, "VMCOREINFO", &mut problems);
            let text = without_padding(&bytes);
            if !text.is_empty() {
                notes.vmcoreinfo = Some(text);
            }
        }
        let pages = Pages::new(source, header.block_size, header.status, bitmaps, cache_bytes);
        let mut kdump = Self { header, pages, notes, problems, complete: true, sampled: BTreeMap::new() };
        kdump.look_at_pages();
        Ok(kdump)
    }

    /// Samples descriptors for their codec, and checks whether the file has all of them and their pages.
    fn look_at_pages(&mut self) {
        let header = &self.header;
        if header.version > header::NEWEST_VERSION {
            self.problems.push(format!(
                "header version {} is newer than this kstub knows ({}): read as that, some of it may be \
                 missed",
                header.version,
                header::NEWEST_VERSION
            ));
        }
        if header.status & header::flags::INCOMPLETE != 0 {
            self.complete = false;
            self.problems.push(
                "the header marks the dump as incomplete: makedumpfile ran out of space while writing, \
                 and pages it could not write read as truncated; dump again with more space or a higher \
                 dump level"
                    .into(),
            );
        }
        let dumped = self.pages.bitmaps.dumped_pages;
        if dumped > self.pages.bitmaps.ram_pages {
            self.problems.push(format!(
                "the bitmaps disagree: {dumped:#x} pages dumped of {:#x} pages of RAM; copy or take the \
                 dump again",
                self.pages.bitmaps.ram_pages
            ));
        }
        let blocks = dumped.div_ceil(DESCRIPTORS_PER_BLOCK);
        let step = (blocks / SAMPLES).max(1);
        let mut cut = None;
        let samples = (0..blocks).step_by(usize::try_from(step).unwrap_or(usize::MAX));
        for block in samples.chain(blocks.checked_sub(1)) {
            let first = block * DESCRIPTORS_PER_BLOCK;
            for rank in first..(first + DESCRIPTORS_PER_BLOCK).min(dumped) {
                let Ok(descriptor) = self.pages.descriptor(rank) else {
                    cut = Some("page descriptors");
                    break;
                };
                if self.pages.past_the_end(&descriptor) {
                    cut = cut.or(Some("pages"));
                }
                if let Ok(codec) = Codec::from_flags(descriptor.flags) {
                    *self.sampled.entry(codec).or_default() += 1;
                }
            }
        }
        if let Some(what) = cut {
            self.complete = false;
            self.problems.push(format!(
                "the file ends before its last {what}: it was cut, and pages beyond its end read as \
                 truncated; copy or take the dump again"
            ));
        }
    }

    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    pub fn ranges(&self) -> &[PhysRange] {
        &self.pages.bitmaps.ranges
    }

    pub fn phys_base_hint(&self) -> Option<u64> {
        self.header.phys_base.filter(|&hint| plausible_phys_base(hint))
    }

    /// Pages dumped, pages of RAM.
    pub fn page_counts(&self) -> (u64, u64) {
        (self.pages.bitmaps.dumped_pages, self.pages.bitmaps.ram_pages)
    }

    pub fn block_size(&self) -> u64 {
        self.header.block_size.into()
    }

    /// What the format itself tells, as name and text.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let header = &self.header;
        let mut facts =
            vec![("header version", header.version.to_string()), ("compression", self.compression())];
        if let Some(level) = header.dump_level {
            facts.push(("dump level", dump_level(level)));
        }
        if header.status & header::flags::EXCLUDED_VMEMMAP != 0 {
            facts.push(("excluded", "unused vmemmap".into()));
        }
        if header.eraseinfo.is_some() {
            facts.push(("erased", "makedumpfile overwrote some data (--config or --eppic)".into()));
        }
        if !header.release.is_empty() {
            facts.push(("header release", header.release.clone()));
        }
        facts
    }

    fn compression(&self) -> String {
        let used: Vec<&str> = self.sampled.keys().filter(|c| **c != Codec::None).map(|c| c.name()).collect();
        match used.as_slice() {
            // Every dump has some pages that compression would not have made smaller.
            [] => match Codec::from_status(self.header.status) {
                Some(codec) => format!("none ({} in the header)", codec.name()),
                None => "none".into(),
            },
            [one] => (*one).into(),
            many => format!("mixed ({})", many.join(", ")),
        }
    }
}

/// `31 (zero, cache, cache-private, user, free)`.
fn dump_level(level: u32) -> String {
    let mut names: Vec<&str> =
        LEVELS.iter().filter(|(bit, _)| level & bit != 0).map(|(_, name)| *name).collect();
    let known = LEVELS.iter().fold(0, |all, (bit, _)| all | bit);
    if level & !known != 0 {
        names.push("others unknown to kstub");
    }
    match names.as_slice() {
        [] => format!("{level} (nothing excluded)"),
        names => format!("{level} (excludes {})", names.join(", ")),
    }
}

/// The bytes of `at` as far as the file has them, at most `max`.
fn read_extent(source: &Source, at: Extent, max: u64, what: &str, problems: &mut Vec<String>) -> Vec<u8> {
    let (bytes, stopped) = source.read_up_to(at.offset, at.size, max);
    if stopped.is_some() || at.size > max {
        problems.push(format!(
            "only {:#x} of the {:#x} bytes of {what} at offset {:#x} could be read; copy or take the \
             dump again",
            bytes.len(),
            at.size,
            source.file.origin(at.offset)
        ));
    }
    bytes
}
