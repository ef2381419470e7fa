//! What reads of a dump must give, worked out from the memory it was made of.

use super::{FlatMemory, Rng};
use kstub::addr::PhysAddr;
use kstub::memory::PhysicalMemory;
use std::collections::BTreeMap;

/// Memory, and for frames that the dump lacks the kind of hole they must be reported as.
#[derive(Clone, Default)]
pub struct Model {
    pub mem: FlatMemory,
    /// Frame → [`kstub::memory::Unreadable::kind`]. A frame in neither map is `not-ram`.
    pub holes: BTreeMap<u64, &'static str>,
}

/// A read's result: the bytes filled, and where and why it stopped.
pub type Expected = (Vec<u8>, Option<(u64, &'static str)>);

impl Model {
    pub fn of(mem: &FlatMemory) -> Self {
        Self { mem: mem.clone(), holes: BTreeMap::new() }
    }

    pub fn hole(mut self, pfn: u64, kind: &'static str) -> Self {
        self.holes.insert(pfn, kind);
        self
    }

    pub fn end_pfn(&self) -> u64 {
        self.mem.end_pfn().max(self.holes.keys().last().map_or(0, |pfn| pfn + 1))
    }

    pub fn read(&self, at: u64, len: usize) -> Expected {
        let mut out = Vec::new();
        while out.len() < len {
            let here = at + out.len() as u64;
            if let Some(kind) = self.holes.get(&(here / 4096)) {
                return (out, Some((here, kind)));
            }
            let from = (here % 4096) as usize;
            let n = (4096 - from).min(len - out.len());
            match self.mem.pages.get(&(here / 4096)) {
                Some(page) => out.extend_from_slice(&page[from..from + n]),
                None => return (out, Some((here, "not-ram"))),
            }
        }
        (out, None)
    }

    /// Compares one read; the text says what differs.
    pub fn compare_read(&self, dump: &dyn PhysicalMemory, at: u64, len: usize) -> Result<(), String> {
        let (bytes, stop) = self.read(at, len);
        let mut buf = vec![0x5a; len];
        let got = dump.read_phys(PhysAddr(at), &mut buf);
        let told = got.stopped.as_ref().map(|e| (e.at.0, e.why.kind()));
        if told != stop || got.filled != bytes.len() {
            return Err(format!(
                "read of {len:#x} at {at:#x}: filled {:#x}, stopped {:x?}; should fill {:#x}, stop {stop:x?}",
                got.filled,
                got.stopped,
                bytes.len()
            ));
        }
        match buf[..got.filled].iter().zip(&bytes).position(|(a, b)| a != b) {
            Some(i) => Err(format!("read of {len:#x} at {at:#x}: wrong byte at +{i:#x}")),
            None => Ok(()),
        }
    }

    /// Every frame up to a few past the last, then reads of every shape across them.
    pub fn compare(&self, dump: &dyn PhysicalMemory) -> Result<(), String> {
        for pfn in 0..self.end_pfn() + 3 {
            self.compare_read(dump, pfn * 4096, 4096)?;
        }
        let mut rng = Rng::new(42);
        let end = self.end_pfn() * 4096;
        for _ in 0..400 {
            let len = match rng.below(4) {
                0 => rng.below(17),
                1 => rng.below(4096),
                2 => rng.below(20_000),
                _ => rng.below(100_000),
            };
            self.compare_read(dump, rng.below(end + 100), len as usize)?;
        }
        // Around every edge between frames of different kinds.
        for pfn in 0..self.end_pfn() + 1 {
            for (back, len) in [(1, 2), (8, 16), (4096, 8192), (100, 100), (100, 101), (0, 1)] {
                let edge = (pfn + 1) * 4096;
                if back <= edge {
                    self.compare_read(dump, edge - back, len)?;
                }
            }
        }
        self.compare_read(dump, 0, end as usize + 4096)?;
        self.compare_read(dump, end, 1 << 16)
    }

    #[track_caller]
    pub fn check(&self, what: &str, dump: &dyn PhysicalMemory) {
        if let Err(text) = self.compare(dump) {
            panic!("{what}: {text}");
        }
    }

    /// The RAM that a source of this memory must know of.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let mut frames: Vec<u64> = self.mem.pages.keys().chain(self.holes.keys()).copied().collect();
        frames.sort_unstable();
        frames.dedup();
        let mut out: Vec<(u64, u64)> = Vec::new();
        for pfn in frames {
            match out.last_mut() {
                Some(last) if last.1 == pfn * 4096 => last.1 += 4096,
                _ => out.push((pfn * 4096, pfn * 4096 + 4096)),
            }
        }
        out
    }
}
