//! The two bitmaps: which page frames are RAM, which of them were dumped, and as which page.
//!
//! The bitmaps stay on disk. In memory is one count per 512 bytes of the second bitmap, 1/64 of its size:
//! a page's place among the descriptors is that count plus the bits before it in its chunk.
//! Source: makedumpfile `IMPLEMENTATION`, "1st-bitmap" and "2nd-bitmap".

use super::header::{BITMAP_BLOCKS, Header};
use crate::addr::{PAGE_SIZE, PhysAddr, PhysRange};
use crate::memory::Unreadable;
use crate::vmcore::error::Error;
use crate::vmcore::file::{Source, Stop};

/// Bytes of bitmap for each count.
pub(super) const CHUNK: usize = 512;
/// Page frames for each count.
pub(super) const CHUNK_PAGES: u64 = CHUNK as u64 * 8;
/// A machine has a few dozen ranges of RAM; a damaged bitmap could have millions.
const MAX_RANGES: usize = 1 << 16;
const SCAN: usize = 1 << 20;

/// Where the bitmaps lie, and what was counted in them.
pub(super) struct Bitmaps {
    source: Source,
    /// Page frames with a bit in each bitmap.
    pub pages: u64,
    /// Page frames whose bits the file has: fewer if it was cut.
    ram_known: u64,
    dumped_known: u64,
    ram_offset: u64,
    dumped_offset: u64,
    /// Dumped pages before each chunk.
    dumped_before: Vec<u64>,
    pub ram_pages: u64,
    pub dumped_pages: u64,
    pub ranges: Vec<PhysRange>,
    pub problems: Vec<String>,
}

impl Bitmaps {
    /// Locates and counts the bitmaps.
    pub fn read(source: &Source, header: &Header) -> Result<Self, Error> {
        let block = u64::from(header.block_size);
        let pages = header.max_mapnr;
        let needed = pages.div_ceil(8).div_ceil(block).saturating_mul(2);
        let blocks = u64::from(header.bitmap_blocks);
        let start = header.bitmaps_start();
        let each = blocks * block / 2;
        if blocks < needed {
            let what = format!("{blocks} blocks have no room for two bitmaps of {pages:#x} page frames");
            return Err(source.invalid(BITMAP_BLOCKS as u64, what));
        }
        let size = source.file.size();
        // Writers take no more than they need; so it is the field that is wrong, and not the file that is cut.
        if blocks > needed && start + each > size {
            let what = format!("{blocks} blocks for two bitmaps of {pages:#x} page frames");
            return Err(source.invalid(BITMAP_BLOCKS as u64, what));
        }
        let mut bitmaps = Self {
            source: source.clone(),
            pages,
            ram_known: pages,
            dumped_known: pages,
            ram_offset: start,
            dumped_offset: start + each,
            dumped_before: Vec::new(),
            ram_pages: 0,
            dumped_pages: 0,
            ranges: Vec::new(),
            problems: Vec::new(),
        };
        bitmaps.count_dumped()?;
        bitmaps.count_ram(block)?;
        if !bitmaps.whole() {
            bitmaps.problems.push(format!(
                "the file ends inside its page bitmaps: it was cut, none of its pages are there, and the memory \
                 map is known up to {:#x} only; copy or take the dump again",
                bitmaps.ram_known.saturating_mul(block)
            ));
        }
        Ok(bitmaps)
    }

    /// Whether the file has both bitmaps to their ends.
    pub fn whole(&self) -> bool {
        self.ram_known == self.pages && self.dumped_known == self.pages
    }

    fn count_dumped(&mut self) -> Result<(), Error> {
        let mut before = Vec::new();
        let mut count = 0u64;
        self.dumped_known = scan(&self.source, self.dumped_offset, self.pages, |_, bytes| {
            for chunk in bytes.chunks(CHUNK) {
                before.push(count);
                count += ones(chunk);
            }
        })?;
        (self.dumped_before, self.dumped_pages) = (before, count);
        Ok(())
    }

    fn count_ram(&mut self, block: u64) -> Result<(), Error> {
        let mut ranges = Ranges { found: Vec::new(), open: None, merged: false };
        let mut count = 0u64;
        self.ram_known = scan(&self.source, self.ram_offset, self.pages, |first, bytes| {
            for (i, word) in bytes.chunks(8).enumerate() {
                let word = word.iter().rev().fold(0u64, |bits, &byte| (bits << 8) | u64::from(byte));
                count += u64::from(word.count_ones());
                ranges.add(first + i as u64 * 64, word);
            }
        })?;
        ranges.close(self.ram_known);
        if ranges.merged {
            self.problems.push(
                "the bitmap of RAM is implausible (more than 65536 ranges): the memory map is \
                 approximate; copy or take the dump again"
                    .into(),
            );
        }
        self.ram_pages = count;
        let phys = |pfn: u64| PhysAddr(pfn.saturating_mul(block));
        self.ranges = ranges.found.iter().map(|&(a, b)| PhysRange { start: phys(a), end: phys(b) }).collect();
        Ok(())
    }

    /// How many page frames below `pfn` were dumped.
    pub fn rank(&self, pfn: u64) -> Result<u64, Error> {
        let pfn = pfn.min(self.dumped_known);
        let Some(before) = self.dumped_before_chunk(pfn) else { return Ok(self.dumped_pages) };
        let mut bytes = [0; CHUNK];
        let first = pfn - pfn % CHUNK_PAGES;
        let len = usize::try_from((pfn - first).div_ceil(8)).unwrap_or(CHUNK);
        let part = bytes.get_mut(..len).unwrap_or_default();
        self.source.read_exact(self.dumped_offset.saturating_add(first / 8), part, "the page bitmaps")?;
        clear_from(part, pfn - first);
        Ok(before + ones(part))
    }

    /// The chunk of the second bitmap with this number, without what the file does not have.
    pub fn chunk(&self, number: u64) -> Result<[u8; CHUNK], Unreadable> {
        let first = number.saturating_mul(CHUNK_PAGES);
        let left = self.dumped_known.saturating_sub(first);
        let mut chunk = [0; CHUNK];
        let len = usize::try_from(left.div_ceil(8)).unwrap_or(CHUNK).min(CHUNK);
        let at = self.dumped_offset.saturating_add(first / 8);
        if let Some(stop) = self.source.file.read_at(at, &mut chunk[..len]).stopped {
            return Err(stop.into());
        }
        clear_from(&mut chunk, left);
        Ok(chunk)
    }

    /// The first bitmap tells what the second one left out from what never was.
    pub fn why_not_dumped(&self, pfn: u64) -> Unreadable {
        let at = pfn.checked_mul(PAGE_SIZE).map(PhysAddr).filter(|_| pfn < self.pages);
        let Some(at) = at else { return Unreadable::NotRam };
        let range = self.ranges.get(self.ranges.partition_point(|range| range.end <= at));
        let is_ram = range.is_some_and(|range| range.contains(at));
        if pfn >= self.ram_known || (is_ram && pfn >= self.dumped_known) {
            Unreadable::Truncated { offset: self.source.end() }
        } else if is_ram {
            Unreadable::Excluded
        } else {
            Unreadable::NotRam
        }
    }

    /// Whether the bitmaps that `header` tells of in `source` are the same, as far as both have them.
    pub fn same_in(&self, source: &Source, header: &Header) -> Result<bool, Error> {
        let shift =
            |offset: u64| offset.saturating_sub(self.ram_offset).saturating_add(header.bitmaps_start());
        for (at, known) in [(self.ram_offset, self.ram_known), (self.dumped_offset, self.dumped_known)] {
            let mut same = true;
            let mut mine = vec![0; SCAN];
            scan(source, shift(at), known, |first, theirs| {
                let mine = mine.get_mut(..theirs.len()).unwrap_or_default();
                let read = self.source.file.read_at(at.saturating_add(first / 8), mine);
                clear_from(mine, known.saturating_sub(first));
                same &= read.stopped.is_none() && mine == theirs;
            })?;
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Dumped pages before the chunk that holds `pfn`.
    pub fn dumped_before_chunk(&self, pfn: u64) -> Option<u64> {
        self.dumped_before.get(usize::try_from(pfn / CHUNK_PAGES).ok()?).copied()
    }
}

/// Calls `see` with the page frame number of the first bit and the bytes, in pieces of whole chunks; bits
/// from `pages` on are cleared. How many bits there are: fewer than `pages` if the file ends before.
fn scan(source: &Source, offset: u64, pages: u64, mut see: impl FnMut(u64, &[u8])) -> Result<u64, Error> {
    let mut buf = vec![0; SCAN];
    let mut first = 0;
    while first < pages {
        let bytes = (pages - first).div_ceil(8);
        let n = usize::try_from(bytes).unwrap_or(SCAN).min(SCAN);
        let Some(piece) = buf.get_mut(..n) else { break };
        let read = source.file.read_at(offset.saturating_add(first / 8), piece);
        let Some(piece) = piece.get_mut(..read.filled) else { break };
        clear_from(piece, pages - first);
        if !piece.is_empty() {
            see(first, piece);
        }
        first += read.filled as u64 * 8;
        match read.stopped {
            None => {}
            Some(Stop::Ended { .. }) => return Ok(first.min(pages)),
            Some(Stop::Io { offset, source: error }) => {
                return Err(Error::Io { path: source.path.clone(), offset, source: error });
            }
        }
    }
    Ok(pages)
}

/// Clears bit `bits` and all after it.
pub(super) fn clear_from(bytes: &mut [u8], bits: u64) {
    let Ok(byte) = usize::try_from(bits / 8) else { return };
    if let Some(last) = bytes.get_mut(byte) {
        *last &= (1u8 << (bits % 8)) - 1;
    }
    if let Some(rest) = bytes.get_mut(byte.saturating_add(1)..) {
        rest.fill(0);
    }
}

fn ones(bytes: &[u8]) -> u64 {
    // By words: the baseline x86-64 counts bits in software, and this is on the way to every page.
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from(u64::from_le_bytes(*word).count_ones()));
    words.sum::<u64>() + rest.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>()
}

/// How many bits of `chunk` are set before the one of `index`, if that one is set.
pub(super) fn rank_if_set(chunk: &[u8], index: u64) -> Option<u64> {
    let byte = usize::try_from(index / 8).ok()?;
    let bits = *chunk.get(byte)?;
    let mask = 1u8 << (index % 8);
    (bits & mask != 0).then(|| {
        let before = chunk.get(..byte).unwrap_or_default();
        ones(before) + u64::from((bits & (mask - 1)).count_ones())
    })
}

/// Runs of set bits, in ascending order.
struct Ranges {
    found: Vec<(u64, u64)>,
    open: Option<u64>,
    merged: bool,
}

impl Ranges {
    /// The 64 bits from page frame `first` on.
    fn add(&mut self, first: u64, word: u64) {
        match (self.open, word) {
            (Some(_), u64::MAX) | (None, 0) => return,
            _ => {}
        }
        let mut at = 0;
        while at < 64 {
            let left = word >> at;
            match self.open {
                None if left == 0 => return,
                None => {
                    at += left.trailing_zeros();
                    self.open = Some(first + u64::from(at));
                }
                Some(_) if left.trailing_ones() + at >= 64 => return,
                Some(_) => {
                    at += left.trailing_ones();
                    self.close(first + u64::from(at));
                }
            }
        }
    }

    fn close(&mut self, end: u64) {
        let Some(start) = self.open.take() else { return };
        let full = self.found.len() >= MAX_RANGES;
        match self.found.last_mut() {
            Some(last) if full => {
                last.1 = end;
                self.merged = true;
            }
            _ => self.found.push((start, end)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn bits(len: usize, seed: u32) -> Vec<u8> {
        let mut seed = seed;
        let mut next = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 16) as u8
        };
        // Runs and noise in turn.
        (0..len).map(|i| [0, 0xff, next() | 1, next()][i / 50 % 4]).collect()
    }

    #[test]
    fn rank_matches_counting() {
        for seed in 0..4 {
            let chunk = bits(CHUNK, seed);
            let mut count = 0;
            for index in 0..CHUNK_PAGES {
                let set = chunk[index as usize / 8] >> (index % 8) & 1 == 1;
                assert_eq!(rank_if_set(&chunk, index), set.then_some(count));
                count += u64::from(set);
            }
            assert_eq!(rank_if_set(&chunk, CHUNK_PAGES), None);
        }
    }

    #[test]
    fn index_and_ranges_match_counting() {
        let block = 4096u64;
        for (pages, seed) in [(1u64, 1), (63, 2), (4096, 3), (4097, 4), (9 * 4096 + 77, 5), (2 * 4096 * 8, 6)]
        {
            let each = pages.div_ceil(8).div_ceil(block) * block;
            let (ram, dumped) = (bits(each as usize, seed), bits(each as usize, seed + 100));
            let file = [vec![0; 8192], ram.clone(), dumped.clone()].concat();
            let source = Source { path: "bits".into(), file: std::sync::Arc::new(file) };
            let header = Header {
                block_size: 4096,
                sub_header_blocks: 1,
                bitmap_blocks: (each / block * 2) as u32,
                max_mapnr: pages,
                ..Header::default()
            };
            let bitmaps = Bitmaps::read(&source, &header).unwrap();
            let is_set = |bitmap: &[u8], pfn: u64| bitmap[pfn as usize / 8] >> (pfn % 8) & 1 == 1;
            let mut count = 0;
            for pfn in 0..pages {
                if pfn % CHUNK_PAGES == 0 {
                    assert_eq!(bitmaps.dumped_before_chunk(pfn), Some(count));
                }
                count += u64::from(is_set(&dumped, pfn));
                let at = PhysAddr(pfn * block);
                assert_eq!(bitmaps.ranges.iter().any(|r| r.contains(at)), is_set(&ram, pfn), "{pfn}");
            }
            assert_eq!(bitmaps.dumped_pages, count);
            assert_eq!(bitmaps.ranges.iter().map(|r| r.len() / block).sum::<u64>(), bitmaps.ram_pages);
            assert!(bitmaps.ranges.windows(2).all(|w| w[0].end < w[1].start));
        }
    }

    #[test]
    fn bitmaps_longer_than_the_file_are_known_as_far_as_they_go() {
        let mut file = vec![0; 8192 + 10];
        file[8192..].fill(0x0f);
        let source = Source { path: "bits".into(), file: std::sync::Arc::new(file) };
        let header = |bitmap_blocks, max_mapnr| Header {
            block_size: 4096,
            sub_header_blocks: 1,
            bitmap_blocks,
            max_mapnr,
            ..Header::default()
        };
        let bitmaps = Bitmaps::read(&source, &header(1 << 20, 1 << 34)).unwrap();
        assert!(!bitmaps.whole() && bitmaps.problems[0].contains("bitmaps"));
        assert_eq!((bitmaps.ram_pages, bitmaps.dumped_pages), (40, 0));
        assert_eq!(bitmaps.why_not_dumped(4), Unreadable::NotRam);
        for pfn in [3, 80, (1 << 34) - 1] {
            assert_eq!(bitmaps.why_not_dumped(pfn), Unreadable::Truncated { offset: 8202 });
        }
        assert_eq!(bitmaps.why_not_dumped(1 << 34), Unreadable::NotRam);
        for (bitmap_blocks, max_mapnr) in
            [(u32::MAX, 1 << 44), (u32::MAX, u64::MAX), (2, 32769), (1, 1), (0, 1)]
        {
            let read = Bitmaps::read(&source, &header(bitmap_blocks, max_mapnr));
            assert!(
                matches!(read, Err(Error::Invalid { offset: 436, .. })),
                "{bitmap_blocks:#x} {max_mapnr:#x}"
            );
        }
    }

    #[test]
    fn bitmaps_are_compared_bit_by_bit() {
        let (pages, each) = (5000u64, 4096);
        let file = |seed| [vec![0; 8192], bits(each, seed), bits(each, seed + 1)].concat();
        let source = |file: Vec<u8>| Source { path: "bits".into(), file: std::sync::Arc::new(file) };
        let header = Header {
            block_size: 4096,
            sub_header_blocks: 1,
            bitmap_blocks: 2,
            max_mapnr: pages,
            ..Header::default()
        };
        let bitmaps = Bitmaps::read(&source(file(1)), &header).unwrap();
        assert!(bitmaps.same_in(&source(file(1)), &header).unwrap());
        for (at, same) in [(8192, false), (8192 + 624, false), (8192 + 625, true), (12288 + 624, false)] {
            let mut other = file(1);
            other[at] ^= 0x80;
            assert_eq!(bitmaps.same_in(&source(other), &header).unwrap(), same, "{at}");
        }
        let mut count = 0;
        for pfn in 0..=pages + 1 {
            assert_eq!(bitmaps.rank(pfn).unwrap(), count, "{pfn}");
            count += u64::from(pfn < pages && file(1)[12288 + pfn as usize / 8] >> (pfn % 8) & 1 == 1);
        }
    }
}
