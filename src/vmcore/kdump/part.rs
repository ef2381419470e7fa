//! One file of a compressed dump: its page descriptors and the bytes that they point at.
//!
//! A dump is one file, or several that `makedumpfile --split` wrote: each has the bitmaps of the whole dump, and
//! descriptors and data for its own page frames only. Source: makedumpfile `diskdump_mod.h`, `struct page_desc`.

use super::bitmap::Bitmaps;
use super::codec::{Codec, Decoder};
use super::header::{Header, flags};
use crate::addr::PAGE_SIZE;
use crate::bytes::{u32_at, u64_at};
use crate::memory::{PageCache, Unreadable};
use crate::vmcore::error::Error;
use crate::vmcore::file::Source;
use crate::vmcore::window;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes in a page, which is a block of the file.
pub(super) const PAGE: usize = PAGE_SIZE as usize;
/// `sizeof(struct page_desc)`.
const DESCRIPTOR_SIZE: u64 = 24;
/// Descriptors that are read together.
pub(super) const DESCRIPTORS_PER_BLOCK: u64 = 128;
/// Bytes of descriptors that are read together.
pub(super) const DESCRIPTOR_BLOCK: u64 = DESCRIPTORS_PER_BLOCK * DESCRIPTOR_SIZE;
/// Tells the key of a block of descriptors in the index from that of a chunk of bitmap.
const BLOCK: u64 = 1 << 63;
/// Where the number of the part starts in that key: no part has 2^40 blocks of descriptors.
const PART_SHIFT: u32 = 40;
/// The shared page of zeros has not been seen yet.
pub(super) const UNKNOWN: u64 = u64::MAX;

/// `struct page_desc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Where the page's bytes lie.
    pub offset: u64,
    /// How many they are.
    pub size: u32,
    /// The codec.
    pub flags: u32,
}

impl Descriptor {
    /// The one with this index in `block`, if it is that long.
    pub fn parse(block: &[u8], index: usize) -> Option<Self> {
        let at = index.checked_mul(DESCRIPTOR_SIZE as usize)?;
        // The last field, which nothing uses, may be cut off.
        Some(Self {
            offset: u64_at(block, at)?,
            size: u32_at(block, at + 8)?,
            flags: u32_at(block, at + 12)?,
        })
    }

    /// One past the page's bytes.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.size.into())
    }
}

/// A file with a dump's pages.
pub(super) struct Part {
    pub source: Source,
    /// The page frames whose pages it has.
    pub pfns: Range<u64>,
    /// Dumped pages of the whole dump below its first page frame.
    pub first_rank: u64,
    /// How many pages it has.
    pub pages: u64,
    /// Offset of its first descriptor.
    descriptors: u64,
    /// Offset behind its descriptors, where the pages start.
    data: u64,
    /// Marked so by its header.
    pub incomplete: bool,
    number: u64,
    /// Unlike that of any other part that was ever opened.
    pub id: u64,
    /// Where the uncompressed page of zeros lies that all zero pages share, or [`UNKNOWN`].
    zero_page: AtomicU64,
}

impl Part {
    /// The part with this number of a dump.
    pub fn new(source: Source, header: &Header, bitmaps: &Bitmaps, number: usize) -> Result<Self, Error> {
        let (pfns, first_rank, pages) = match &header.split {
            None => (0..u64::MAX, 0, bitmaps.dumped_pages),
            Some(pfns) => {
                let before = bitmaps.rank(pfns.start)?;
                (pfns.clone(), before, bitmaps.rank(pfns.end)?.saturating_sub(before))
            }
        };
        let descriptors = header.bitmaps_end();
        // A part has room for the descriptors of all.
        let room = bitmaps.dumped_pages.saturating_mul(DESCRIPTOR_SIZE);
        Ok(Self {
            pfns,
            first_rank,
            pages,
            descriptors,
            data: descriptors.saturating_add(room),
            incomplete: header.status & flags::INCOMPLETE != 0,
            number: number as u64,
            id: window::new_id(),
            zero_page: AtomicU64::new(UNKNOWN),
            source,
        })
    }

    /// The descriptors of a block, as many as the file has; kept in `index`.
    pub fn descriptor_block(&self, number: u64, index: &PageCache) -> Result<Arc<[u8]>, Unreadable> {
        let key = BLOCK | self.number << PART_SHIFT | number;
        if let Some(block) = index.get(key) {
            return Ok(block);
        }
        let first = number.saturating_mul(DESCRIPTORS_PER_BLOCK);
        let count = self.pages.saturating_sub(first).min(DESCRIPTORS_PER_BLOCK);
        let mut block = [0; DESCRIPTOR_BLOCK as usize];
        let len = (count * DESCRIPTOR_SIZE) as usize;
        let at = self.descriptors.saturating_add(first.saturating_mul(DESCRIPTOR_SIZE));
        let read = self.source.file.read_at(at, &mut block[..len]);
        let block: Arc<[u8]> = Arc::from(&block[..read.filled.min(len)]);
        match read.stopped {
            Some(stop) if block.len() < DESCRIPTOR_SIZE as usize => return Err(stop.into()),
            // Not kept: it is only the start, and the caller may want to hear why.
            Some(_) => {}
            None => index.insert(key, Arc::clone(&block)),
        }
        Ok(block)
    }

    /// The descriptor with this number in the part.
    pub fn descriptor(&self, rank: u64, index: &PageCache) -> Result<Descriptor, Unreadable> {
        let block = self.descriptor_block(rank / DESCRIPTORS_PER_BLOCK, index)?;
        let at = (rank % DESCRIPTORS_PER_BLOCK) as usize;
        Descriptor::parse(&block, at).ok_or_else(|| Unreadable::Truncated { offset: self.source.end() })
    }

    /// Whether the descriptors of a block are not all of one page that they share. One that cannot be read is not.
    pub fn has_several_pages(&self, number: u64, index: &PageCache) -> bool {
        let Ok(block) = self.descriptor_block(number, index) else { return true };
        let mut offsets =
            (0..).map_while(|at| Descriptor::parse(&block, at)).map(|descriptor| descriptor.offset);
        let first = offsets.next();
        offsets.any(|offset| Some(offset) != first)
    }

    /// Refuses a descriptor that cannot be followed.
    pub fn check(&self, descriptor: &Descriptor, pfn: u64, rank: u64) -> Result<(), Unreadable> {
        let corrupt = |what: String| {
            let at = self.descriptors.saturating_add(rank.saturating_mul(DESCRIPTOR_SIZE));
            Unreadable::Corrupt { offset: self.source.file.origin(at), what }
        };
        if !self.was_written(descriptor) {
            return Err(Unreadable::Truncated { offset: self.source.end() });
        }
        if descriptor.size as usize > PAGE {
            let size = descriptor.size;
            return Err(corrupt(format!(
                "page descriptor for pfn {pfn:#x}: size {size} exceeds block size {PAGE}"
            )));
        }
        if descriptor.offset < self.descriptors || descriptor.size == 0 {
            let Descriptor { offset, size, .. } = descriptor;
            return Err(corrupt(format!(
                "page descriptor for pfn {pfn:#x}: {size} bytes at offset {offset:#x} cannot be a page"
            )));
        }
        Ok(())
    }

    /// Decodes `data`, the bytes of `pfn`, into `page`.
    pub fn decode(
        &self,
        decoder: &mut Decoder,
        descriptor: &Descriptor,
        pfn: u64,
        data: &[u8],
        page: &mut [u8],
    ) -> Result<(), Unreadable> {
        match Codec::from_flags(descriptor.flags).and_then(|codec| decoder.decode(codec, data, page)) {
            Ok(()) => {
                self.learn_zero_page(descriptor, page);
                Ok(())
            }
            Err(what) => Err(Unreadable::Corrupt {
                offset: self.source.file.origin(descriptor.offset),
                what: format!("page data of pfn {pfn:#x}: {what}"),
            }),
        }
    }

    /// Where the shared page of zeros lies, or [`UNKNOWN`].
    pub fn zero_page(&self) -> u64 {
        self.zero_page.load(Ordering::Relaxed)
    }

    /// Writers store the page of zeros once, uncompressed; so the first one seen is the one that pages share.
    pub fn learn_zero_page(&self, descriptor: &Descriptor, page: &[u8]) {
        if self.zero_page() == UNKNOWN && descriptor.flags == 0 && page.iter().all(|&byte| byte == 0) {
            self.zero_page.store(descriptor.offset, Ordering::Relaxed);
        }
    }

    /// makedumpfile clears the table of descriptors and fills it as far as it gets.
    fn was_written(&self, descriptor: &Descriptor) -> bool {
        descriptor.offset != 0 || !self.incomplete
    }

    /// Whether the file has the page.
    pub fn has(&self, descriptor: &Descriptor) -> bool {
        self.was_written(descriptor) && descriptor.end() <= self.source.file.size()
    }

    /// How many pages the file has; of a flattened stream, about how many. Reads every descriptor.
    pub fn held_pages(&self) -> u64 {
        let mut held = 0;
        let mut rank = 0;
        let mut bytes = vec![0; DESCRIPTOR_BLOCK as usize * 256];
        while rank < self.pages {
            let at = self.descriptors.saturating_add(rank.saturating_mul(DESCRIPTOR_SIZE));
            let read = self.source.file.read_at(at, &mut bytes);
            let count = (read.filled as u64 / DESCRIPTOR_SIZE).min(self.pages - rank);
            let descriptors = (0..count as usize).map_while(|index| Descriptor::parse(&bytes, index));
            held += descriptors.filter(|descriptor| self.has(descriptor)).count() as u64;
            rank += count;
            if count == 0 {
                break;
            }
        }
        held
    }

    /// How many descriptors the table has, if that is not what the bitmap says: the data follows it, first the
    /// shared page of zeros, if any, or the page of the first descriptor.
    pub fn miscounted(&self, index: &PageCache) -> Option<u64> {
        let first = self.descriptor(0, index).ok().filter(|first| self.check(first, 0, 0).is_ok())?;
        let zeros = first.offset.checked_sub(PAGE as u64);
        if first.offset == self.data || zeros == Some(self.data) {
            return None;
        }
        Some(first.offset.saturating_sub(self.descriptors) / DESCRIPTOR_SIZE)
    }
}
