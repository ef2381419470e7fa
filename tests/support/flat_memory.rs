//! Physical memory as a plain map of pages: what a machine held before any dump was made of it.

use super::{Page, Rng};
use kstub::addr::PhysAddr;
use kstub::memory::MemoryImage;
use std::collections::BTreeMap;

/// Page frame number → contents. A frame that is missing is not RAM.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct FlatMemory {
    pub pages: BTreeMap<u64, Page>,
}

impl FlatMemory {
    pub fn new() -> Self {
        Self::default()
    }

    /// `count` frames from `pfn` on: noise, compressible pages, all-zero pages and pages of one byte, mixed.
    pub fn add_varied(&mut self, pfn: u64, count: u64, rng: &mut Rng) {
        for pfn in pfn..pfn + count {
            let page = match rng.below(8) {
                0 => Box::new([0; 4096]),
                1 => Box::new([rng.next() as u8 | 1; 4096]),
                2 | 3 => rng.noise_page(),
                _ => rng.text_page(),
            };
            self.pages.insert(pfn, page);
        }
    }

    /// Zeroed frames for `from..to`, both multiples of 4096.
    pub fn add_ram(&mut self, from: u64, to: u64) {
        for pfn in from / 4096..to / 4096 {
            self.pages.entry(pfn).or_insert_with(|| Box::new([0; 4096]));
        }
    }

    /// Writes `bytes` at `at`, adding frames where there are none.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let here = at + done as u64;
            let from = (here % 4096) as usize;
            let n = (4096 - from).min(bytes.len() - done);
            let page = self.pages.entry(here / 4096).or_insert_with(|| Box::new([0; 4096]));
            page[from..from + n].copy_from_slice(&bytes[done..done + n]);
            done += n;
        }
    }

    pub fn write_u64(&mut self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    /// `len` bytes at `at`, or `None` if a frame is missing.
    pub fn read(&self, at: u64, len: usize) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let here = at + out.len() as u64;
            let from = (here % 4096) as usize;
            let n = (4096 - from).min(len - out.len());
            out.extend_from_slice(&self.pages.get(&(here / 4096))?[from..from + n]);
        }
        Some(out)
    }

    pub fn read_u64(&self, at: u64) -> Option<u64> {
        self.read(at, 8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")))
    }

    /// Runs of adjacent frames: (physical start, bytes).
    pub fn runs(&self) -> Vec<(u64, Vec<u8>)> {
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for (&pfn, page) in &self.pages {
            match runs.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == pfn * 4096 => {
                    bytes.extend_from_slice(&page[..]);
                }
                _ => runs.push((pfn * 4096, page.to_vec())),
            }
        }
        runs
    }

    /// One past the highest frame.
    pub fn end_pfn(&self) -> u64 {
        self.pages.last_key_value().map_or(0, |(&pfn, _)| pfn + 1)
    }

    /// The same memory as kstub's own in-memory image, for tests that stand above the file formats.
    pub fn image(&self) -> MemoryImage {
        let mut image = MemoryImage::new();
        for (&pfn, page) in &self.pages {
            image.write(PhysAddr(pfn * 4096), &page[..]);
        }
        image
    }
}
