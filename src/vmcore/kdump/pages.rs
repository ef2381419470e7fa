//! Finding, reading and decoding the pages of a compressed dump.
//!
//! Two paths: a page at a time through the cache, and runs of pages whose bytes lie one after the other in
//! the file, read with one pread. Source: makedumpfile `diskdump_mod.h`, `struct page_desc`.

use super::bitmap::{Bitmaps, CHUNK, CHUNK_PAGES, clear_from, rank_if_set};
use super::codec::{Codec, Decoder};
use super::header::flags;
use crate::addr::PhysAddr;
use crate::bytes::{u32_at, u64_at};
use crate::memory::{PageCache, ReadOutcome, Unreadable};
use crate::vmcore::file::{Source, Stop};
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// `sizeof(struct page_desc)`.
pub(super) const DESCRIPTOR_SIZE: u64 = 24;
/// Descriptors that are read together.
pub(super) const DESCRIPTORS_PER_BLOCK: u64 = 128;
/// Bitmap chunks and blocks of descriptors that are kept: those of 1 GiB of guest fit.
const INDEX_CACHE: u64 = 8 << 20;
/// A longer read is a scan: its pages would push out what is used again.
const SCAN_PAGES: usize = 64;

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
    fn parse(block: &[u8], index: usize) -> Option<Self> {
        let at = index.checked_mul(DESCRIPTOR_SIZE as usize)?;
        Some(Self {
            offset: u64_at(block, at)?,
            size: u32_at(block, at + 8)?,
            flags: u32_at(block, at + 12)?,
        })
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.size.into())
    }
}

/// What is kept per thread.
struct Scratch {
    decoder: Decoder,
    /// Bytes as they are in the file.
    raw: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch { decoder: Decoder::new(), raw: Vec::new() });
}

/// A dumped page and how many dumped pages follow it directly.
struct Run {
    /// Its number among the dumped pages.
    rank: u64,
    /// At least 1.
    len: usize,
}

/// Pages that one read brings.
struct Batch {
    descriptors: Vec<Descriptor>,
    /// Their bytes in the file: of all but the shared page of zeros, which lies elsewhere.
    start: u64,
    len: usize,
    /// All are uncompressed, and none is the shared page.
    is_raw: bool,
    /// [`Pages::zero_page`] when this was put together.
    zero_page: u64,
}

/// The pages of a compressed dump.
pub(in crate::vmcore) struct Pages {
    source: Source,
    page_size: usize,
    incomplete: bool,
    pub(super) bitmaps: Bitmaps,
    cache: PageCache,
    /// Chunks of the second bitmap by number; blocks of descriptors by number and [`BLOCK`].
    index: PageCache,
    /// Where the uncompressed page of zeros lies that all zero pages share, or [`UNKNOWN`].
    zero_page: AtomicU64,
    zeros: Arc<[u8]>,
}

/// The shared page of zeros has not been seen yet.
const UNKNOWN: u64 = u64::MAX;
/// Tells the number of a block of descriptors from that of a chunk of bitmap.
const BLOCK: u64 = 1 << 63;

impl Pages {
    pub(super) fn new(
        source: Source,
        block_size: u32,
        status: u32,
        bitmaps: Bitmaps,
        cache_bytes: u64,
    ) -> Self {
        let page_size = usize::try_from(block_size).unwrap_or(4096);
        Self {
            source,
            page_size,
            incomplete: status & flags::INCOMPLETE != 0,
            bitmaps,
            cache: PageCache::new(cache_bytes, block_size.into()),
            index: PageCache::new(INDEX_CACHE, DESCRIPTORS_PER_BLOCK * DESCRIPTOR_SIZE),
            zero_page: AtomicU64::new(UNKNOWN),
            zeros: std::iter::repeat_n(0, page_size).collect(),
        }
    }

    /// As [`crate::memory::PhysicalMemory::read_phys`].
    pub fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let page_size = self.page_size as u64;
        let keep = buf.len() <= SCAN_PAGES * self.page_size;
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let Some(here) = at.checked_add(filled as u64) else {
                return ReadOutcome::stopped(filled, PhysAddr(u64::MAX), Unreadable::NotRam);
            };
            let (pfn, skip) = (here.0 / page_size, (here.0 % page_size) as usize);
            let whole = if skip == 0 { rest.len() / self.page_size } else { 0 };
            let done = match self.cache.get(pfn) {
                Some(page) => Ok(copy_part(&page, skip, rest)),
                None if whole > 0 => self.read_run(pfn, &mut rest[..whole * self.page_size], keep),
                None => self.load(pfn).map(|page| copy_part(&page, skip, rest)),
            };
            match done {
                Ok(n) => filled += n,
                Err(why) => return ReadOutcome::stopped(filled, here, why),
            }
        }
        ReadOutcome::complete(filled)
    }

    /// The page `pfn`, decoded, and now in the cache.
    fn load(&self, pfn: u64) -> Result<Arc<[u8]>, Unreadable> {
        let run = self.find(pfn, 1)?;
        let descriptor = self.descriptor(run.rank)?;
        if self.is_zero_page(&descriptor, self.zero_page.load(Ordering::Relaxed)) {
            // Not worth a place in the cache.
            return Ok(Arc::clone(&self.zeros));
        }
        self.check(&descriptor, pfn, run.rank)?;
        let mut page: Arc<[u8]> = std::iter::repeat_n(0, self.page_size).collect();
        // Nobody else has it yet.
        if let Some(bytes) = Arc::get_mut(&mut page) {
            SCRATCH.with_borrow_mut(|Scratch { decoder, raw }| {
                raw.resize(raw.len().max(self.page_size), 0);
                let raw = raw.get_mut(..descriptor.size as usize).unwrap_or_default();
                match self.source.file.read_at(descriptor.offset, raw).stopped {
                    Some(stop) => Err(stop.into()),
                    None => self.decode(decoder, &descriptor, pfn, raw, bytes),
                }
            })?;
        }
        self.cache.insert(pfn, Arc::clone(&page));
        Ok(page)
    }

    /// Fills the start of `out`, which is whole pages from `pfn` on, as far as their bytes lie one after
    /// the other in the file; how many bytes, at least one page. An error is about the first page.
    fn read_run(&self, pfn: u64, out: &mut [u8], keep: bool) -> Result<usize, Unreadable> {
        let run = self.find(pfn, out.len() / self.page_size)?;
        let batch = self.batch(&run)?;
        let Some(first) = batch.descriptors.first() else {
            // The file ends here, or the size is nonsense: the path for one page says which.
            return self.load(pfn).map(|page| copy_part(&page, 0, out));
        };
        if batch.is_raw {
            self.check(first, pfn, run.rank)?;
            let len = (batch.descriptors.len() * self.page_size).min(out.len());
            let read = self.source.file.read_at(batch.start, &mut out[..len]);
            if let Some(page) = out[..read.filled.min(len)].get(..self.page_size) {
                self.learn_zero_page(first, page);
            }
            return match (read.filled / self.page_size, read.stopped) {
                (0, Some(stop)) => Err(stop.into()),
                (pages, _) => Ok(pages * self.page_size),
            };
        }
        SCRATCH.with_borrow_mut(|Scratch { decoder, raw }| {
            raw.resize(raw.len().max(batch.len), 0);
            let raw = raw.get_mut(..batch.len).unwrap_or_default();
            let read = self.source.file.read_at(batch.start, raw);
            let mut filled = 0;
            for (index, descriptor) in batch.descriptors.iter().enumerate() {
                let Some(page) = out.get_mut(filled..filled + self.page_size) else { break };
                let pfn = pfn + index as u64;
                let decoded = if self.is_zero_page(descriptor, batch.zero_page) {
                    page.fill(0);
                    Ok(())
                } else {
                    let from =
                        usize::try_from(descriptor.offset.saturating_sub(batch.start)).unwrap_or(usize::MAX);
                    let to = from.saturating_add(descriptor.size as usize);
                    match (self.check(descriptor, pfn, run.rank + index as u64), &read.stopped) {
                        (Err(why), _) => Err(why),
                        (Ok(()), Some(stop)) if to > read.filled => Err(stop_again(stop)),
                        (Ok(()), _) => {
                            let data = raw.get(from..to).unwrap_or_default();
                            self.decode(decoder, descriptor, pfn, data, page)
                        }
                    }
                };
                match decoded {
                    // Raw pages are as quickly read again.
                    Ok(()) if keep && descriptor.flags != 0 => self.cache.insert(pfn, Arc::from(&*page)),
                    Ok(()) => {}
                    // What came before it is good; the caller comes back for this one.
                    Err(_) if filled > 0 => return Ok(filled),
                    Err(why) => return Err(why),
                }
                filled += self.page_size;
            }
            Ok(filled)
        })
    }

    /// The first pages of `run` whose bytes lie one after the other; none if the first descriptor is
    /// unusable.
    fn batch(&self, run: &Run) -> Result<Batch, Unreadable> {
        let block = self.descriptor_block(run.rank / DESCRIPTORS_PER_BLOCK)?;
        let first = (run.rank % DESCRIPTORS_PER_BLOCK) as usize;
        // Once for the batch: another thread may learn it meanwhile.
        let zero_page = self.zero_page.load(Ordering::Relaxed);
        let mut batch =
            Batch { descriptors: Vec::with_capacity(run.len), start: 0, len: 0, is_raw: true, zero_page };
        let mut end = None;
        for descriptor in (first..first + run.len).map_while(|index| Descriptor::parse(&block, index)) {
            let size = descriptor.size as usize;
            if self.is_zero_page(&descriptor, zero_page) {
                batch.is_raw = false;
            } else if size > self.page_size || end.is_some_and(|end| end != descriptor.offset) {
                break;
            } else {
                if end.is_none() {
                    batch.start = descriptor.offset;
                }
                end = Some(descriptor.end());
                batch.len += size;
                batch.is_raw &= descriptor.flags == 0 && size == self.page_size;
            }
            batch.descriptors.push(descriptor);
        }
        Ok(batch)
    }

    /// Refuses a descriptor that cannot be followed.
    fn check(&self, descriptor: &Descriptor, pfn: u64, rank: u64) -> Result<(), Unreadable> {
        let corrupt = |what: String| {
            let at = self.bitmaps.descriptors.saturating_add(rank.saturating_mul(DESCRIPTOR_SIZE));
            Unreadable::Corrupt { offset: self.source.file.origin(at), what }
        };
        if descriptor.offset == 0 && self.incomplete {
            let offset = self.source.file.origin(self.source.file.size());
            return Err(Unreadable::Truncated { offset });
        }
        if descriptor.size as usize > self.page_size {
            let (size, block) = (descriptor.size, self.page_size);
            return Err(corrupt(format!(
                "page descriptor for pfn {pfn:#x}: size {size} exceeds block size {block}"
            )));
        }
        if descriptor.offset < self.bitmaps.descriptors || descriptor.size == 0 {
            let Descriptor { offset, size, .. } = descriptor;
            return Err(corrupt(format!(
                "page descriptor for pfn {pfn:#x}: {size} bytes at offset {offset:#x} cannot be a page"
            )));
        }
        Ok(())
    }

    fn decode(
        &self,
        decoder: &mut Decoder,
        descriptor: &Descriptor,
        pfn: u64,
        data: &[u8],
        page: &mut [u8],
    ) -> Result<(), Unreadable> {
        let decoded = Codec::from_flags(descriptor.flags).and_then(|codec| decoder.decode(codec, data, page));
        match decoded {
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

    /// Whether this is the shared page of zeros, which lies at `zero_page`.
    fn is_zero_page(&self, descriptor: &Descriptor, zero_page: u64) -> bool {
        zero_page != UNKNOWN
            && descriptor.offset == zero_page
            && descriptor.flags == 0
            && descriptor.size as usize == self.page_size
    }

    /// Writers store the page of zeros once, uncompressed; so the first one seen is the one that pages share.
    fn learn_zero_page(&self, descriptor: &Descriptor, page: &[u8]) {
        let unknown = self.zero_page.load(Ordering::Relaxed) == UNKNOWN;
        if unknown && descriptor.flags == 0 && page.iter().all(|&byte| byte == 0) {
            self.zero_page.store(descriptor.offset, Ordering::Relaxed);
        }
    }

    /// Finds `pfn` among the dumped pages, with up to `max` pages that follow directly.
    fn find(&self, pfn: u64, max: usize) -> Result<Run, Unreadable> {
        if pfn >= self.bitmaps.pages {
            return Err(Unreadable::NotRam);
        }
        let chunk = self.bitmap_chunk(pfn / CHUNK_PAGES)?;
        let index = pfn % CHUNK_PAGES;
        let before = self.bitmaps.dumped_before_chunk(pfn);
        let (Some(rank), Some(before)) = (rank_if_set(&chunk, index), before) else {
            return Err(self.why_not_dumped(pfn));
        };
        let rank = before + rank;
        // A run ends with its chunk of bitmap and with its block of descriptors.
        let left_in_block = (DESCRIPTORS_PER_BLOCK - rank % DESCRIPTORS_PER_BLOCK) as usize;
        let max = max.min(left_in_block);
        let is_dumped =
            |index: u64| chunk.get((index / 8) as usize).is_some_and(|byte| byte >> (index % 8) & 1 == 1);
        let len =
            1 + (index + 1..CHUNK_PAGES).take(max.saturating_sub(1)).take_while(|&i| is_dumped(i)).count();
        Ok(Run { rank, len })
    }

    /// The first bitmap tells what the second one left out from what never was.
    fn why_not_dumped(&self, pfn: u64) -> Unreadable {
        let Some(at) = pfn.checked_mul(self.page_size as u64).map(PhysAddr) else {
            return Unreadable::NotRam;
        };
        let ranges = &self.bitmaps.ranges;
        match ranges.get(ranges.partition_point(|range| range.end <= at)) {
            Some(range) if range.contains(at) => Unreadable::Excluded,
            _ => Unreadable::NotRam,
        }
    }

    fn bitmap_chunk(&self, number: u64) -> Result<Arc<[u8]>, Unreadable> {
        if let Some(chunk) = self.index.get(number) {
            return Ok(chunk);
        }
        let first = number * CHUNK_PAGES;
        let left = self.bitmaps.pages.saturating_sub(first);
        let mut chunk = [0; CHUNK];
        let len = usize::try_from(left.div_ceil(8)).unwrap_or(CHUNK).min(CHUNK);
        let at = self.bitmaps.dumped_offset.saturating_add(first / 8);
        if let Some(stop) = self.source.file.read_at(at, &mut chunk[..len]).stopped {
            return Err(stop.into());
        }
        clear_from(&mut chunk, left);
        let chunk: Arc<[u8]> = Arc::from(&chunk[..]);
        self.index.insert(number, Arc::clone(&chunk));
        Ok(chunk)
    }

    /// The descriptors of a block, as many as the file has.
    fn descriptor_block(&self, number: u64) -> Result<Arc<[u8]>, Unreadable> {
        if let Some(block) = self.index.get(number | BLOCK) {
            return Ok(block);
        }
        let first = number.saturating_mul(DESCRIPTORS_PER_BLOCK);
        let count = self.bitmaps.dumped_pages.saturating_sub(first).min(DESCRIPTORS_PER_BLOCK);
        let mut block = [0; (DESCRIPTORS_PER_BLOCK * DESCRIPTOR_SIZE) as usize];
        let len = (count * DESCRIPTOR_SIZE) as usize;
        let at = self.bitmaps.descriptors.saturating_add(first.saturating_mul(DESCRIPTOR_SIZE));
        let read = self.source.file.read_at(at, &mut block[..len]);
        let block: Arc<[u8]> = Arc::from(&block[..read.filled.min(len)]);
        match read.stopped {
            Some(stop) if block.len() < DESCRIPTOR_SIZE as usize => return Err(stop.into()),
            // Not kept: it is only the start, and the caller may want to hear why.
            Some(_) => {}
            None => self.index.insert(number | BLOCK, Arc::clone(&block)),
        }
        Ok(block)
    }

    /// The descriptor with this number.
    pub(super) fn descriptor(&self, rank: u64) -> Result<Descriptor, Unreadable> {
        let block = self.descriptor_block(rank / DESCRIPTORS_PER_BLOCK)?;
        let index = (rank % DESCRIPTORS_PER_BLOCK) as usize;
        let ended = || Unreadable::Truncated { offset: self.source.file.origin(self.source.file.size()) };
        Descriptor::parse(&block, index).ok_or_else(ended)
    }

    /// Whether the file ends before the page does.
    pub(super) fn past_the_end(&self, descriptor: &Descriptor) -> bool {
        descriptor.end() > self.source.file.size()
    }
}

fn stop_again(stop: &Stop) -> Unreadable {
    match stop {
        Stop::Ended { offset } => Unreadable::Truncated { offset: *offset },
        Stop::Io { offset, source } => Unreadable::Io { offset: *offset, message: source.to_string() },
    }
}

/// Copies `page` from `skip` on into the start of `out`; how many bytes.
fn copy_part(page: &[u8], skip: usize, out: &mut [u8]) -> usize {
    let from = page.get(skip..).unwrap_or_default();
    let n = from.len().min(out.len());
    out[..n].copy_from_slice(&from[..n]);
    n
}
