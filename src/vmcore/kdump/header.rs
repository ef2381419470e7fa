//! The two headers of the compressed format, 64-bit layout.
//!
//! Source: makedumpfile `diskdump_mod.h` (`struct disk_dump_header`, `struct kdump_sub_header`) and
//! `IMPLEMENTATION`; QEMU `include/sysemu/dump.h` (`DiskDumpHeader64`, `KdumpSubHeader64`, packed to the same
//! offsets).

use crate::addr::PAGE_SIZE;
use crate::bytes::{cstr_at, u32_at, u64_at};
use crate::vmcore::error::Error;
use crate::vmcore::file::Source;
use std::ops::Range;

const MAIN_HEADER: usize = 464;
const SUB_HEADER: usize = 104;
/// Versions above add fields that this reader does not know.
pub(super) const NEWEST_VERSION: u32 = 6;

// Offsets in the main header.
const VERSION: usize = 8;
const RELEASE: usize = 12 + 2 * 65;
const MACHINE: usize = 12 + 4 * 65;
const STATUS: usize = 424;
const BLOCK_SIZE: usize = 428;
const SUB_HEADER_BLOCKS: usize = 432;
pub(super) const BITMAP_BLOCKS: usize = 436;
const MAX_MAPNR: usize = 440;

/// Header status and page flags share their values.
pub(super) mod flags {
    /// Written until the disk was full.
    pub const INCOMPLETE: u32 = 0x8;
    /// Pages of unused vmemmap were left out.
    pub const EXCLUDED_VMEMMAP: u32 = 0x10;
}

/// A piece of the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extent {
    pub offset: u64,
    pub size: u64,
}

impl Extent {
    fn filled(self) -> Option<Self> {
        (self.offset != 0 && self.size != 0).then_some(self)
    }
}

/// What both headers say.
#[derive(Clone, Debug, Default)]
pub(super) struct Header {
    pub version: u32,
    pub release: String,
    pub status: u32,
    pub block_size: u32,
    pub sub_header_blocks: u32,
    pub bitmap_blocks: u32,
    pub max_mapnr: u64,
    pub phys_base: Option<u64>,
    pub dump_level: Option<u32>,
    pub vmcoreinfo: Option<Extent>,
    pub notes: Option<Extent>,
    pub eraseinfo: Option<Extent>,
    /// The page frames whose pages this file has, if it is a part of a split dump.
    pub split: Option<Range<u64>>,
    /// Version, names and time: the same in all parts of a split dump.
    pub origin: Vec<u8>,
}

impl Header {
    /// Reads and checks both headers; `source` starts with the signature.
    pub fn read(source: &Source) -> Result<Self, Error> {
        let mut main = [0; MAIN_HEADER];
        source.read_exact(0, &mut main, "the main header")?;
        let word = |at| u32_at(&main, at).unwrap_or(0);
        let text = |at| String::from_utf8_lossy(cstr_at(&main, at, 65).unwrap_or_default()).into_owned();

        let version = word(VERSION);
        let machine = text(MACHINE);
        let big_endian = version > 0xffff && version.swap_bytes() <= 0xff;
        // QEMU since 10.1 names no machine: "Unknown" (`dump/dump.c`, `ELF_MACHINE_UNAME`).
        if big_endian || !["", "x86_64", "Unknown"].contains(&machine.as_str()) {
            let machine = match (machine.as_str(), big_endian) {
                ("", _) => "a big-endian machine".into(),
                ("i386" | "i486" | "i586" | "i686", _) => format!("{machine} (32 bits)"),
                _ => machine.escape_default().to_string(),
            };
            return Err(Error::OtherMachine { path: source.path.clone(), machine });
        }
        let block_size = word(BLOCK_SIZE);
        // A block is a page, and x86-64 has base pages of one size.
        if u64::from(block_size) != PAGE_SIZE {
            let what = format!("block size {block_size} where pages have {PAGE_SIZE} bytes");
            return Err(source.invalid(BLOCK_SIZE as u64, what));
        }
        // The sub header lies in block 1.
        if word(SUB_HEADER_BLOCKS) == 0 {
            return Err(source.invalid(SUB_HEADER_BLOCKS as u64, "there is no sub header"));
        }
        let mut header = Self {
            version,
            release: text(RELEASE).escape_default().to_string(),
            status: word(STATUS),
            block_size,
            sub_header_blocks: word(SUB_HEADER_BLOCKS),
            bitmap_blocks: word(BITMAP_BLOCKS),
            max_mapnr: word(MAX_MAPNR).into(),
            origin: main.get(VERSION..STATUS).unwrap_or_default().to_vec(),
            ..Self::default()
        };
        header.read_sub_header(source)?;
        Ok(header)
    }

    fn read_sub_header(&mut self, source: &Source) -> Result<(), Error> {
        let mut sub = [0; SUB_HEADER];
        source.read_exact(self.block_size.into(), &mut sub, "the sub header")?;
        let since = |version| self.version >= version;
        let word = |at| u32_at(&sub, at).unwrap_or(0);
        let long = |at| u64_at(&sub, at).unwrap_or(0);
        let extent = |at| Extent { offset: long(at), size: long(at + 8) }.filled();

        self.phys_base = Some(long(0));
        self.dump_level = since(1).then(|| word(8));
        self.vmcoreinfo = if since(3) { extent(32) } else { None };
        self.notes = if since(4) { extent(48) } else { None };
        self.eraseinfo = if since(5) { extent(64) } else { None };
        let (mut start_pfn, mut end_pfn) = (long(16), long(24));
        let split = since(2) && word(12) != 0;
        if since(6) {
            (start_pfn, end_pfn) = (long(80), long(88));
            self.max_mapnr = long(96);
        }
        if split {
            if start_pfn > end_pfn || end_pfn > self.max_mapnr {
                let what = format!(
                    "a part of a split dump with page frames {start_pfn:#x} to {end_pfn:#x} of {:#x}",
                    self.max_mapnr
                );
                return Err(source.invalid(u64::from(self.block_size) + 12, what));
            }
            self.split = Some(start_pfn..end_pfn);
        }
        Ok(())
    }

    /// Offset behind both headers, where the bitmaps start.
    pub fn bitmaps_start(&self) -> u64 {
        // Products of 32-bit fields cannot overflow 64 bits.
        (1 + u64::from(self.sub_header_blocks)) * u64::from(self.block_size)
    }

    /// Offset behind both bitmaps, where the descriptors start.
    pub fn bitmaps_end(&self) -> u64 {
        self.bitmaps_start() + u64::from(self.bitmap_blocks) * u64::from(self.block_size)
    }

    /// What shows that `other` was not written together with this one.
    pub fn differs(&self, other: &Self) -> Option<&'static str> {
        if self.origin != other.origin {
            Some("their headers differ in machine or time")
        } else if self.max_mapnr != other.max_mapnr || self.bitmap_blocks != other.bitmap_blocks {
            Some("their headers differ in the size of memory")
        } else if self.dump_level != other.dump_level || self.phys_base != other.phys_base {
            Some("their headers differ in dump level or kernel address")
        } else {
            None
        }
    }
}
