//! Machines: physical memory plus the registers of its CPUs, from a dump or a live guest.
//!
//! What stands above sees only [`Backend`]; it cannot tell a dump from a guest except by asking.

mod dump;
pub mod live;
mod overlay;
pub mod qemu;
mod registers;

pub use dump::Dump;
pub use overlay::{Copies, Overlay};

use crate::arch::x86_64::RegisterFile;
use crate::memory::PhysicalMemory;

/// Who wrote the registers down; the fields' meaning differs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RegisterSource {
    /// The kernel's own `NT_PRSTATUS` (`crash_save_cpu`): in the order of the CPUs that answered, not by number.
    KernelPrstatus,
    /// QEMU's notes: one per vCPU, in vCPU order.
    Qemu,
}

/// The registers of one CPU as the source saved them.
#[derive(Clone, Debug)]
pub struct SavedCpu {
    /// The registers.
    pub regs: RegisterFile,
    /// Who saved them.
    pub source: RegisterSource,
    /// `pr_pid` of the note: the task's pid (kernel) or vCPU index + 1 (QEMU).
    pub pid: Option<u32>,
    /// The bytes of the `NT_PRSTATUS` descriptor: what the kernel also keeps in `crash_notes`.
    pub prstatus: Vec<u8>,
}

/// A fact about the source for people: `("format", "kdump-compressed")`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// Short lower-case name.
    pub name: &'static str,
    /// The value as text.
    pub value: String,
}

/// A machine: memory, registers, and what the source itself says of the kernel.
pub trait Backend: PhysicalMemory {
    /// Registers in the order in which the source has them; empty if it has none.
    fn saved_cpus(&self) -> &[SavedCpu];

    /// The VMCOREINFO text from the source's own note, unchecked: it can be of an earlier kernel.
    fn vmcoreinfo_note(&self) -> Option<&[u8]>;

    /// Values of `phys_base` which the format suggests, none of them to be trusted unchecked.
    fn phys_base_hints(&self) -> Vec<u64>;

    /// What the source is: format, compression, filter level, completeness.
    fn facts(&self) -> Vec<Fact>;

    /// What is wrong or missing in the source, one sentence each, with the cure where there is one.
    fn problems(&self) -> Vec<String>;

    /// Whether memory is of later than the registers, because the machine goes on: tables that they name may be gone.
    fn has_gone_on(&self) -> bool {
        false
    }

    /// The guest, if this is one and no dump.
    fn live(&self) -> Option<&dyn live::LiveControl> {
        None
    }
}
