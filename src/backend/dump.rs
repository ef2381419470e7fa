//! A crash dump as a machine.
//!
//! Knows dump files only through [`Vmcore`], and what their notes' registers mean through `registers`.

use super::registers::saved_cpus;
use super::{Backend, Fact, SavedCpu};
use crate::addr::{PhysAddr, PhysRange};
use crate::bytes::printable;
use crate::memory::{PhysicalMemory, ReadOutcome};
use crate::vmcore::{Error, Vmcore};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// An opened dump.
pub struct Dump {
    vmcore: Vmcore,
    cpus: Vec<SavedCpu>,
    problems: Vec<String>,
}

impl Dump {
    /// Opens the dump at `path`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self::new(Vmcore::open(path)?))
    }

    /// Opens what the user named: one dump, all parts of a split one, or raw images as `FILE@PHYSADDR`.
    pub fn open_arguments(arguments: &[OsString]) -> Result<Self, Error> {
        Ok(Self::new(Vmcore::open_arguments(arguments)?))
    }

    /// Opens all parts of a split dump, in any order.
    pub fn open_parts(paths: &[PathBuf]) -> Result<Self, Error> {
        Ok(Self::new(Vmcore::open_parts(paths)?))
    }

    /// A machine of an opened dump file.
    pub fn new(vmcore: Vmcore) -> Self {
        let (cpus, cpu_problems) = saved_cpus(vmcore.notes());
        let mut problems = vmcore.problems().to_vec();
        problems.extend(cpu_problems);
        let facts: Vec<String> =
            vmcore.facts().iter().map(|(name, value)| format!("{name} {}", printable(value))).collect();
        tracing::info!("{} was opened: {}", vmcore.path().display(), facts.join(", "));
        tracing::info!("registers of {} CPUs were saved", cpus.len());
        Self { vmcore, cpus, problems }
    }

    /// The file, or the one that was named first.
    pub fn path(&self) -> &Path {
        self.vmcore.path()
    }
}

impl PhysicalMemory for Dump {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        self.vmcore.read_phys(at, buf)
    }

    fn ranges(&self) -> Vec<PhysRange> {
        self.vmcore.ranges()
    }

    fn stored_ranges(&self) -> Vec<PhysRange> {
        self.vmcore.stored_ranges()
    }

    fn is_ram(&self, at: PhysAddr) -> bool {
        self.vmcore.is_ram(at)
    }
}

impl Backend for Dump {
    fn saved_cpus(&self) -> &[SavedCpu] {
        &self.cpus
    }

    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        self.vmcore.vmcoreinfo()
    }

    fn phys_base_hints(&self) -> Vec<u64> {
        self.vmcore.phys_base_hints()
    }

    fn facts(&self) -> Vec<Fact> {
        self.vmcore.facts().iter().map(|(name, value)| Fact { name, value: value.clone() }).collect()
    }

    fn problems(&self) -> Vec<String> {
        self.problems.clone()
    }
}
