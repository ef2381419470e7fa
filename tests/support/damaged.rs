//! A real dump with some words of its memory replaced: what a kernel that broke would have left.

use kstub::addr::{PhysAddr, PhysRange};
use kstub::backend::{Backend, Dump, Fact, SavedCpu};
use kstub::memory::{PhysicalMemory, ReadOutcome};
use std::collections::BTreeMap;

/// A dump with some words of its memory replaced.
pub struct Damaged {
    pub dump: Dump,
    /// By physical address.
    pub words: BTreeMap<u64, u64>,
}

impl PhysicalMemory for Damaged {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        let outcome = self.dump.read_phys(at, buf);
        for (&place, value) in &self.words {
            for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
                if let Some(index) = (place + i as u64).checked_sub(at.0)
                    && let Some(slot) = buf.get_mut(index as usize)
                {
                    *slot = byte;
                }
            }
        }
        outcome
    }

    fn ranges(&self) -> Vec<PhysRange> {
        self.dump.ranges()
    }
}

impl Backend for Damaged {
    fn saved_cpus(&self) -> &[SavedCpu] {
        self.dump.saved_cpus()
    }
    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        self.dump.vmcoreinfo_note()
    }
    fn phys_base_hints(&self) -> Vec<u64> {
        self.dump.phys_base_hints()
    }
    fn facts(&self) -> Vec<Fact> {
        self.dump.facts()
    }
    fn problems(&self) -> Vec<String> {
        self.dump.problems()
    }
}
