//! Physical memory held in our own memory: what tests build page tables and kernels in.

use super::{PhysicalMemory, ReadOutcome, Unreadable};
use crate::addr::{PAGE_SIZE, PhysAddr, PhysRange, join_ranges};
use std::collections::BTreeMap;

/// A sparse image of pages; a page never written is [`Unreadable::NotRam`].
#[derive(Default)]
pub struct MemoryImage {
    /// Page start → contents of that page, or why it cannot be read.
    pages: BTreeMap<u64, Result<Box<[u8; PAGE_SIZE as usize]>, Unreadable>>,
}

impl MemoryImage {
    /// An image without any page.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes `bytes` at `at`, adding zeroed pages where there are none.
    pub fn write(&mut self, at: PhysAddr, bytes: &[u8]) {
        let mut at = at.0;
        for byte in bytes {
            let page = self
                .pages
                .entry(at - at % PAGE_SIZE)
                .and_modify(|page| {
                    if page.is_err() {
                        *page = Ok(Box::new([0; PAGE_SIZE as usize]));
                    }
                })
                .or_insert_with(|| Ok(Box::new([0; PAGE_SIZE as usize])));
            if let Ok(page) = page {
                page[(at % PAGE_SIZE) as usize] = *byte;
            }
            at = at.wrapping_add(1);
        }
    }

    /// Writes a little-endian `u64`.
    pub fn write_u64(&mut self, at: PhysAddr, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    /// Makes the page that holds `at` unreadable for `why`.
    pub fn set_unreadable(&mut self, at: PhysAddr, why: Unreadable) {
        self.pages.insert(at.page_start().0, Err(why));
    }
}

impl PhysicalMemory for MemoryImage {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let mut filled = 0;
        while filled < buf.len() {
            let Some(here) = at.checked_add(filled as u64) else {
                return ReadOutcome::stopped(filled, PhysAddr(u64::MAX), Unreadable::NotRam);
            };
            let page = match self.pages.get(&here.page_start().0) {
                Some(Ok(page)) => page,
                Some(Err(why)) => return ReadOutcome::stopped(filled, here, why.clone()),
                None => return ReadOutcome::stopped(filled, here, Unreadable::NotRam),
            };
            let n = (here.left_in_page() as usize).min(buf.len() - filled);
            let from = here.page_offset() as usize;
            buf[filled..filled + n].copy_from_slice(&page[from..from + n]);
            filled += n;
        }
        ReadOutcome::complete(filled)
    }

    fn ranges(&self) -> Vec<PhysRange> {
        join_ranges(self.pages.keys().filter_map(|&p| PhysRange::new(PhysAddr(p), PAGE_SIZE)).collect())
    }
}
