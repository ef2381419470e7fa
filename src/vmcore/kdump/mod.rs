//! The compressed dump format of makedumpfile ("kdump-compressed") and QEMU's `dump-guest-memory -z/-l/-s`.
//!
//! Knows page frames and blocks, not what is in them. A page is found in three steps: its bit in the second
//! bitmap, its descriptor (by the count of bits before it), its bytes. Source: makedumpfile `IMPLEMENTATION`,
//! crash `diskdump.c` (where it departs from it), QEMU `dump/dump.c` (`create_kdump_vmcore`).

mod bitmap;
mod codec;
mod header;
mod lzo;
mod pages;
mod part;
mod split;
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
use pages::Pages;
use part::{DESCRIPTORS_PER_BLOCK, Part};
use split::Missing;
use std::collections::BTreeMap;
use std::path::Path;

/// The first bytes of the format.
pub(super) const SIGNATURE: &[u8; 8] = b"KDUMP   ";

/// The notes of 8192 CPUs fit many times.
const MAX_NOTES: u64 = 64 << 20;
const MAX_VMCOREINFO: u64 = 1 << 20;
/// Blocks of descriptors looked at to tell the compression.
const SAMPLES: u64 = 64;
/// How many blocks from the last one backwards are looked at for the end of the pages. They are of half a gigabyte of memory.
const MOST_LAST_BLOCKS: usize = 1024;

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
    /// Parts of a split dump that are not there.
    missing: Vec<Missing>,
    /// About how many pages are there.
    held: u64,
}

impl Kdump {
    /// Reads the headers of `sources`, each of which starts with [`SIGNATURE`]: one file, or the parts of a
    /// split dump in any order. Decoded pages are kept in up to `cache_bytes`.
    pub fn open(sources: Vec<Source>, cache_bytes: u64) -> Result<Self, Error> {
        let mut files = Vec::with_capacity(sources.len());
        for source in sources {
            let header = Header::read(&source)?;
            files.push((source, header));
        }
        split::sort(&mut files)?;
        let mut bitmaps = whole_bitmaps(&files)?;
        let mut problems = std::mem::take(&mut bitmaps.problems);
        let (mut notes, notes_problems) = whole_notes(&files);
        problems.extend(notes_problems);
        problems.append(&mut notes.problems);
        let parts = (0..)
            .zip(&files)
            .map(|(number, (source, header))| Part::new(source.clone(), header, &bitmaps, number));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        let Some((_, header)) = files.into_iter().next() else { return Err(Error::Nothing) };
        let missing = split::missing(&parts, &bitmaps);
        let complete = bitmaps.whole() && missing.is_empty();
        let pages = Pages::new(parts, bitmaps, cache_bytes);
        let sampled = BTreeMap::new();
        let mut kdump = Self { header, pages, notes, problems, complete, sampled, missing, held: 0 };
        kdump.check_whole();
        for number in 0..kdump.pages.parts.len() {
            kdump.look_at_part(number);
        }
        Ok(kdump)
    }

    /// What can be told without looking at pages.
    fn check_whole(&mut self) {
        let header = &self.header;
        if header.version > header::NEWEST_VERSION {
            self.problems.push(format!(
                "header version {} is newer than this kstub knows ({}): read as that, some of it may be \
                 missed",
                header.version,
                header::NEWEST_VERSION
            ));
        }
        let (dumped, ram) = self.page_counts();
        if dumped > ram && self.pages.bitmaps.whole() {
            self.problems.push(format!(
                "the bitmaps disagree: {dumped:#x} pages dumped of {ram:#x} pages of RAM; copy or take the \
                 dump again"
            ));
        }
        for Missing { pfns, pages } in &self.missing {
            self.problems.push(format!(
                "the part of the split dump with pages {:#x} to {:#x} is not there ({pages} of {dumped} dumped \
                 pages): name its file too",
                pfns.start, pfns.end
            ));
        }
    }

    /// Samples a part's descriptors for their codec, and checks whether the file has all of them and their
    /// pages.
    fn look_at_part(&mut self, number: usize) {
        let Some(part) = self.pages.parts.get(number) else { return };
        let index = &self.pages.index;
        let blocks = part.pages.div_ceil(DESCRIPTORS_PER_BLOCK);
        let step = (blocks / SAMPLES).max(1);
        let mut cut = None;
        let samples = (0..blocks).step_by(usize::try_from(step).unwrap_or(usize::MAX));
        // The file ends with the last page that is not the shared one of zeros, which lies in front.
        let mut ends = (0..blocks).rev().take(MOST_LAST_BLOCKS);
        let last = ends.find(|&block| part.has_several_pages(block, index)).or(blocks.checked_sub(1));
        for block in samples.chain(last.unwrap_or(blocks)..blocks) {
            let first = block * DESCRIPTORS_PER_BLOCK;
            for rank in first..(first + DESCRIPTORS_PER_BLOCK).min(part.pages) {
                let Ok(descriptor) = part.descriptor(rank, index) else {
                    cut = Some("page descriptors");
                    break;
                };
                if descriptor.end() > part.source.file.size() {
                    cut = cut.or(Some("pages"));
                }
                if let Ok(codec) = Codec::from_flags(descriptor.flags) {
                    *self.sampled.entry(codec).or_default() += 1;
                }
            }
        }
        let held = if cut.is_some() || part.incomplete { part.held_pages() } else { part.pages };
        self.held += held;
        let pages = part.pages;
        // With several files it matters which.
        let the_file = if self.header.split.is_some() {
            format!("'{}'", part.source.path.display())
        } else {
            "the file".into()
        };
        if part.incomplete {
            self.complete = false;
            self.problems.push(format!(
                "{the_file} is marked as incomplete: makedumpfile ran out of space while writing, about {held} \
                 of {pages} pages are there, and the others read as truncated; dump again with more space or \
                 a higher dump level"
            ));
        }
        if let Some(what) = cut {
            self.complete = false;
            self.problems.push(format!(
                "{the_file} ends before its last {what}: it was cut, about {held} of {pages} pages are there, \
                 and the others read as truncated; copy or take the dump again"
            ));
        }
        if let Some(count) = part.miscounted(index) {
            self.problems.push(format!(
                "{the_file} has {count} page descriptors where its bitmap tells of {}: pages may be taken for \
                 one another; copy or take the dump again",
                self.pages.bitmaps.dumped_pages
            ));
        }
    }

    /// First page frame and file of each part, in that order.
    pub fn parts(&self) -> impl Iterator<Item = (u64, &Path)> {
        self.pages.parts.iter().map(|part| (part.pfns.start, part.source.path.as_path()))
    }

    /// Parts of a split dump that are not there.
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    /// The first page frame of `source`, if it is a part that is missing here.
    pub fn completes(&self, source: &Source) -> Option<u64> {
        let other = Header::read(source).ok()?;
        let pfns = other.split.clone()?;
        let missing = self.missing.iter().any(|missing| {
            !pfns.is_empty() && missing.pfns.start <= pfns.start && pfns.end <= missing.pfns.end
        });
        let same = missing
            && self.header.differs(&other).is_none()
            && self.pages.bitmaps.same_in(source, &other).unwrap_or(false);
        same.then_some(pfns.start)
    }

    /// About how many of the dumped pages are there.
    pub fn held_pages(&self) -> u64 {
        self.held
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

    /// What the format itself tells, as name and text.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let header = &self.header;
        let mut facts =
            vec![("header version", header.version.to_string()), ("compression", self.compression())];
        if header.split.is_some() {
            let parts = self.pages.parts.len();
            let missing: Vec<String> = self
                .missing
                .iter()
                .map(|Missing { pfns, .. }| format!("{:#x} to {:#x}", pfns.start, pfns.end))
                .collect();
            let missing = match missing.as_slice() {
                [] => String::new(),
                ranges => format!(", without pages {}", ranges.join(", ")),
            };
            facts.push(("parts", format!("{parts}{missing}")));
        }
        if let Some(level) = header.dump_level {
            facts.push(("dump level", dump_level(level)));
        }
        if header.status & header::flags::EXCLUDED_VMEMMAP != 0 {
            facts.push(("excluded", "unused vmemmap".into()));
        }
        let (dumped, ram) = self.page_counts();
        facts.push(("pages", format!("{dumped} dumped of {ram} in RAM")));
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

/// The bitmaps of a file that has them to their end, if there is one; every file must have the same.
fn whole_bitmaps(files: &[(Source, Header)]) -> Result<Bitmaps, Error> {
    let mut found: Option<(&Source, Bitmaps)> = None;
    for (source, header) in files {
        if found.as_ref().is_none_or(|(_, bitmaps)| !bitmaps.whole()) {
            let bitmaps = Bitmaps::read(source, header)?;
            if found.is_none() || bitmaps.whole() {
                found = Some((source, bitmaps));
            }
        }
    }
    let Some((source, bitmaps)) = found else { return Err(Error::Nothing) };
    for (other, header) in files {
        // A part that was cut inside its bitmaps has no pages either: look_at_part says so.
        let has_them = header.bitmaps_end() <= other.file.size();
        if other.path != source.path && has_them && !bitmaps.same_in(other, header)? {
            let what = "their page bitmaps differ";
            return Err(Error::OtherDump { path: source.path.clone(), other: other.path.clone(), what });
        }
    }
    Ok(bitmaps)
}

/// The notes of a file that has all of them, if there is one, and what is wrong with them.
fn whole_notes(files: &[(Source, Header)]) -> (Notes, Vec<String>) {
    let mut first = None;
    for (source, header) in files {
        let (notes, problems) = read_notes(source, header);
        if problems.is_empty() && notes.problems.is_empty() {
            return (notes, problems);
        }
        first.get_or_insert((notes, problems));
    }
    first.unwrap_or_default()
}

fn read_notes(source: &Source, header: &Header) -> (Notes, Vec<String>) {
    let mut notes = Notes::default();
    let mut problems = Vec::new();
    if let Some(at) = header.notes {
        let bytes = read_extent(source, at, MAX_NOTES, "ELF notes", &mut problems);
        notes.add(&bytes, at.offset);
    }
    if let Some(at) = header.vmcoreinfo {
        let bytes = read_extent(source, at, MAX_VMCOREINFO, "VMCOREINFO", &mut problems);
        let text = without_padding(&bytes);
        if !text.is_empty() {
            notes.vmcoreinfo = Some(text);
        }
    }
    (notes, problems)
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
