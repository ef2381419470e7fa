//! Physical memory that lies in files as it is: ELF segments, LiME ranges, raw images.
//!
//! Knows which bytes of which file stand for which address, and no format. Source: pread(2).

use super::file::Source;
use super::segments::{Backing, SegmentMap};
use super::window;
use crate::addr::{PhysAddr, PhysRange};
use crate::memory::{PageCache, ReadOutcome, Unreadable};
use std::sync::Arc;

/// What is read and kept for a word that is asked for: copying a page takes longer than asking the system for it.
const BLOCK: u64 = 1024;
/// No more is worth keeping of what needs no decoding: memory that is new to the process costs more than reading again.
const KEPT_MAX: u64 = 8 << 20;

/// Pieces of files by physical address; pages read in part are kept.
pub(super) struct StoredMemory {
    /// Each with its number for [`window`].
    sources: Vec<(u64, Source)>,
    map: SegmentMap,
    cache: PageCache,
}

impl Default for StoredMemory {
    fn default() -> Self {
        Self::new(Vec::new(), Vec::new(), 0)
    }
}

impl StoredMemory {
    /// Puts together claims of `(start, end, backing)` on `sources`, keeping up to `cache_bytes` of pages.
    pub fn new(sources: Vec<Source>, claims: Vec<(PhysAddr, PhysAddr, Backing)>, cache_bytes: u64) -> Self {
        let sources = sources.into_iter().map(|source| (window::new_id(), source)).collect();
        Self {
            sources,
            map: SegmentMap::new(claims),
            cache: PageCache::new(cache_bytes.min(KEPT_MAX), BLOCK),
        }
    }

    /// The memory whose bytes are in the files, sorted.
    pub fn in_files(&self) -> Vec<PhysRange> {
        self.map.in_files()
    }

    /// Bytes of memory that the files have.
    pub fn bytes_held(&self) -> u64 {
        self.map.bytes(|backing| matches!(backing, Backing::File { .. }))
    }

    /// Bytes of memory that lay in the files before they were cut.
    pub fn bytes_cut(&self) -> u64 {
        self.map.bytes(|backing| matches!(backing, Backing::CutOff { .. }))
    }

    /// As [`crate::memory::PhysicalMemory::read_phys`].
    pub fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        match self.read_from_cached_block(at, buf) {
            Some(outcome) => outcome,
            None => self.read_files(at, buf),
        }
    }

    /// Walks of page tables and lists come back to the same bytes: ten times faster than a pread for each
    /// word. `None` if `buf` is not a part of one whole block.
    fn read_from_cached_block(&self, at: PhysAddr, buf: &mut [u8]) -> Option<ReadOutcome> {
        let from = usize::try_from(at.0 % BLOCK).ok()?;
        let to = from.checked_add(buf.len())?;
        if to > BLOCK as usize || buf.len() == BLOCK as usize {
            return None;
        }
        let number = at.0 / BLOCK;
        let block = match self.cache.get(number) {
            Some(block) => block,
            None => {
                let mut block: Arc<[u8]> = std::iter::repeat_n(0, BLOCK as usize).collect();
                let read = self.read_files(PhysAddr(number * BLOCK), Arc::get_mut(&mut block)?);
                if read.stopped.is_some() {
                    return None;
                }
                self.cache.insert(number, Arc::clone(&block));
                block
            }
        };
        buf.copy_from_slice(block.get(from..to)?);
        Some(ReadOutcome::complete(buf.len()))
    }

    fn read_files(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let Some(here) = at.checked_add(filled as u64) else {
                return ReadOutcome::stopped(filled, PhysAddr(u64::MAX), Unreadable::NotRam);
            };
            let Some((backing, left)) = self.map.find(here) else {
                return ReadOutcome::stopped(filled, here, Unreadable::NotRam);
            };
            let file = |number: u32| usize::try_from(number).ok().and_then(|n| self.sources.get(n));
            let ((id, source), offset) = match backing {
                Backing::Absent => return ReadOutcome::stopped(filled, here, Unreadable::ZeroOrExcluded),
                Backing::CutOff { file: number } => {
                    let offset = file(number).map_or(0, |(_, source)| source.end());
                    return ReadOutcome::stopped(filled, here, Unreadable::Truncated { offset });
                }
                Backing::File { file: number, offset } => match file(number) {
                    Some(source) => (source, offset),
                    None => return ReadOutcome::stopped(filled, here, Unreadable::NotRam),
                },
            };
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let read = window::read_at(*id, &*source.file, offset, &mut rest[..n]);
            filled += read.filled.min(n);
            if let Some(stop) = read.stopped {
                return ReadOutcome::stopped(filled, at.wrapping_add(filled as u64), stop.into());
            }
        }
        ReadOutcome::complete(filled)
    }
}
