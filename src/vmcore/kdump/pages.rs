//! Finding and reading the pages of a compressed dump.
//!
//! Two paths: a page at a time through the cache, and runs of pages whose bytes lie one after the other in
//! a file, read with one pread. Source: makedumpfile `diskdump_mod.h`, `IMPLEMENTATION`.

use super::bitmap::{Bitmaps, CHUNK_PAGES, rank_if_set};
use super::codec::Decoder;
use super::part::{DESCRIPTOR_BLOCK, DESCRIPTORS_PER_BLOCK, Descriptor, PAGE, Part, UNKNOWN};
use crate::addr::{PAGE_SIZE, PhysAddr};
use crate::memory::{PageCache, ReadOutcome, Unreadable};
use crate::vmcore::file::Stop;
use crate::vmcore::window::{Fetched, Window};
use std::cell::RefCell;
use std::sync::Arc;

/// Bitmap chunks and blocks of descriptors that are kept: those of 1 GiB of guest fit.
const INDEX_CACHE: u64 = 8 << 20;

/// What is kept per thread.
struct Scratch {
    decoder: Decoder,
    window: Window,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> =
        RefCell::new(Scratch { decoder: Decoder::new(), window: Window::default() });
}

/// A dumped page and how many dumped pages follow it directly.
struct Run<'a> {
    part: &'a Part,
    /// Its number among the pages of the part.
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
    /// [`Part::zero_page`] when this was put together.
    zero_page: u64,
}

/// The pages of a compressed dump.
pub(in crate::vmcore) struct Pages {
    /// By page frames.
    pub(super) parts: Vec<Part>,
    pub(super) bitmaps: Bitmaps,
    cache: PageCache,
    /// Chunks of the second bitmap by number, and blocks of descriptors.
    pub(super) index: PageCache,
    zeros: Arc<[u8]>,
}

impl Pages {
    pub(super) fn new(parts: Vec<Part>, bitmaps: Bitmaps, cache_bytes: u64) -> Self {
        Self {
            parts,
            bitmaps,
            cache: PageCache::new(cache_bytes, PAGE_SIZE),
            index: PageCache::new(INDEX_CACHE, DESCRIPTOR_BLOCK),
            zeros: std::iter::repeat_n(0, PAGE).collect(),
        }
    }

    /// As [`crate::memory::PhysicalMemory::read_phys`].
    pub fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let Some(here) = at.checked_add(filled as u64) else {
                return ReadOutcome::stopped(filled, PhysAddr(u64::MAX), Unreadable::NotRam);
            };
            let (pfn, skip) = (here.pfn().0, here.page_offset() as usize);
            let whole = if skip == 0 { rest.len() / PAGE } else { 0 };
            let done = match self.cache.get(pfn) {
                Some(page) => Ok(copy_part(&page, skip, rest)),
                None if whole > 0 => self.read_run(pfn, &mut rest[..whole * PAGE]),
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
        let Run { part, rank, .. } = self.find(pfn, 1)?;
        let descriptor = part.descriptor(rank, &self.index)?;
        if is_zero_page(&descriptor, part.zero_page()) {
            // Not worth a place in the cache.
            return Ok(Arc::clone(&self.zeros));
        }
        part.check(&descriptor, pfn, rank)?;
        let mut page: Arc<[u8]> = std::iter::repeat_n(0, PAGE).collect();
        // Nobody else has it yet.
        if let Some(bytes) = Arc::get_mut(&mut page) {
            SCRATCH.with_borrow_mut(|Scratch { decoder, window }| {
                match window.fetch(part.id, &*part.source.file, descriptor.offset, descriptor.size as usize) {
                    Fetched { stopped: Some(stop), .. } => Err(stop.into()),
                    Fetched { raw, .. } => part.decode(decoder, &descriptor, pfn, raw, bytes),
                }
            })?;
        }
        self.cache.insert(pfn, Arc::clone(&page));
        Ok(page)
    }

    /// Fills the start of `out`, which is whole pages from `pfn` on, as far as their bytes lie one after
    /// the other in the file; how many bytes, at least one page. An error is about the first page.
    fn read_run(&self, pfn: u64, out: &mut [u8]) -> Result<usize, Unreadable> {
        let run = self.find(pfn, out.len() / PAGE)?;
        let part = run.part;
        let batch = self.batch(&run)?;
        let Some(first) = batch.descriptors.first() else {
            // The file ends here, or the size is nonsense: the path for one page says which.
            return self.load(pfn).map(|page| copy_part(&page, 0, out));
        };
        if batch.is_raw {
            part.check(first, pfn, run.rank)?;
            let len = (batch.descriptors.len() * PAGE).min(out.len());
            let read = part.source.file.read_at(batch.start, &mut out[..len]);
            if let Some(page) = out[..read.filled.min(len)].get(..PAGE) {
                part.learn_zero_page(first, page);
            }
            return match (read.filled / PAGE, read.stopped) {
                (0, Some(stop)) => Err(stop.into()),
                (pages, _) => Ok(pages * PAGE),
            };
        }
        SCRATCH.with_borrow_mut(|Scratch { decoder, window }| {
            let Fetched { raw, stopped } = window.fetch(part.id, &*part.source.file, batch.start, batch.len);
            let mut filled = 0;
            for (index, descriptor) in batch.descriptors.iter().enumerate() {
                let Some(page) = out.get_mut(filled..filled + PAGE) else { break };
                let pfn = pfn + index as u64;
                let decoded = if is_zero_page(descriptor, batch.zero_page) {
                    page.fill(0);
                    Ok(())
                } else {
                    let from =
                        usize::try_from(descriptor.offset.saturating_sub(batch.start)).unwrap_or(usize::MAX);
                    let to = from.saturating_add(descriptor.size as usize);
                    match (part.check(descriptor, pfn, run.rank + index as u64), &stopped) {
                        (Err(why), _) => Err(why),
                        (Ok(()), Some(stop)) if to > raw.len() => Err(stop_again(stop)),
                        (Ok(()), _) => {
                            let data = raw.get(from..to).unwrap_or_default();
                            part.decode(decoder, descriptor, pfn, data, page)
                        }
                    }
                };
                match decoded {
                    // Not kept: who reads whole pages has them now, and a scan would push out what is used again.
                    Ok(()) => {}
                    // What came before it is good; the caller comes back for this one.
                    Err(_) if filled > 0 => return Ok(filled),
                    Err(why) => return Err(why),
                }
                filled += PAGE;
            }
            Ok(filled)
        })
    }

    /// The first pages of `run` whose bytes lie one after the other; none if the first descriptor is
    /// unusable.
    fn batch(&self, run: &Run) -> Result<Batch, Unreadable> {
        let block = run.part.descriptor_block(run.rank / DESCRIPTORS_PER_BLOCK, &self.index)?;
        let first = (run.rank % DESCRIPTORS_PER_BLOCK) as usize;
        // Once for the batch: another thread may learn it meanwhile.
        let zero_page = run.part.zero_page();
        let mut batch =
            Batch { descriptors: Vec::with_capacity(run.len), start: 0, len: 0, is_raw: true, zero_page };
        let mut end = None;
        for descriptor in (first..first + run.len).map_while(|index| Descriptor::parse(&block, index)) {
            let size = descriptor.size as usize;
            if is_zero_page(&descriptor, zero_page) {
                batch.is_raw = false;
            } else if size > PAGE || end.is_some_and(|end| end != descriptor.offset) {
                break;
            } else {
                if end.is_none() {
                    batch.start = descriptor.offset;
                }
                end = Some(descriptor.end());
                batch.len += size;
                batch.is_raw &= descriptor.flags == 0 && size == PAGE;
            }
            batch.descriptors.push(descriptor);
        }
        Ok(batch)
    }

    /// Finds `pfn` among the dumped pages, with up to `max` pages that follow directly.
    fn find(&self, pfn: u64, max: usize) -> Result<Run<'_>, Unreadable> {
        if pfn >= self.bitmaps.pages {
            return Err(Unreadable::NotRam);
        }
        let chunk = self.bitmap_chunk(pfn / CHUNK_PAGES)?;
        let index = pfn % CHUNK_PAGES;
        let before = self.bitmaps.dumped_before_chunk(pfn);
        let (Some(rank), Some(before)) = (rank_if_set(&chunk, index), before) else {
            return Err(self.bitmaps.why_not_dumped(pfn));
        };
        let part = self.part(pfn)?;
        let rank = (before + rank).saturating_sub(part.first_rank);
        // A run ends with its chunk of bitmap, with its block of descriptors and with its part.
        let left_in_block = DESCRIPTORS_PER_BLOCK - rank % DESCRIPTORS_PER_BLOCK;
        let max = max.min(left_in_block.min(part.pfns.end - pfn) as usize);
        let is_dumped =
            |index: u64| chunk.get((index / 8) as usize).is_some_and(|byte| byte >> (index % 8) & 1 == 1);
        let len =
            1 + (index + 1..CHUNK_PAGES).take(max.saturating_sub(1)).take_while(|&i| is_dumped(i)).count();
        Ok(Run { part, rank, len })
    }

    /// The part that has the dumped page `pfn`.
    fn part(&self, pfn: u64) -> Result<&Part, Unreadable> {
        let next = self.parts.partition_point(|part| part.pfns.end <= pfn);
        let after = self.parts.get(next);
        match after {
            Some(part) if part.pfns.contains(&pfn) => Ok(part),
            _ => Err(Unreadable::MissingPart {
                start_pfn: next
                    .checked_sub(1)
                    .and_then(|n| self.parts.get(n))
                    .map_or(0, |part| part.pfns.end),
                end_pfn: after.map_or(self.bitmaps.pages, |part| part.pfns.start),
            }),
        }
    }

    fn bitmap_chunk(&self, number: u64) -> Result<Arc<[u8]>, Unreadable> {
        if let Some(chunk) = self.index.get(number) {
            return Ok(chunk);
        }
        let chunk: Arc<[u8]> = Arc::from(&self.bitmaps.chunk(number)?[..]);
        self.index.insert(number, Arc::clone(&chunk));
        Ok(chunk)
    }
}

/// Whether this is the shared page of zeros, which lies at `zero_page`.
fn is_zero_page(descriptor: &Descriptor, zero_page: u64) -> bool {
    zero_page != UNKNOWN
        && descriptor.offset == zero_page
        && descriptor.flags == 0
        && descriptor.size as usize == PAGE
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
