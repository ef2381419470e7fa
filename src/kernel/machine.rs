//! A machine and, where one was found, the kernel in it: what gdb and the commands work on.

use crate::addr::PhysAddr;
use crate::addr::VirtAddr;
use crate::arch::x86_64::{AddressSpace, Reg, RegisterFile, TranslateError, VirtOutcome};
use crate::backend::Backend;
use std::path::Path;
use std::sync::Arc;

/// A CPU's number in the kernel (`smp_processor_id()`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CpuId(pub u32);

/// One CPU and what ran on it.
#[derive(Clone, Debug)]
pub struct Cpu {
    /// Its number.
    pub id: CpuId,
    /// Its registers; nothing saved where the source has none for it.
    pub regs: RegisterFile,
    /// `comm` of the task that ran on it, if symbols and types told; untrusted text.
    pub comm: Option<String>,
    /// `pid` of that task.
    pub pid: Option<i32>,
    /// What else a reader must know: "panicked here", "offline", "in user mode", "registers not saved".
    pub notes: Vec<String>,
}

/// A target for as long as kstub has it open.
pub struct Machine {
    backend: Arc<dyn Backend>,
    cpus: Vec<Cpu>,
    first: CpuId,
    text_base: Option<VirtAddr>,
}

impl Machine {
    /// A machine without a known kernel; virtual memory is read through each CPU's CR3.
    pub fn from_parts(
        backend: Arc<dyn Backend>,
        cpus: Vec<Cpu>,
        first: CpuId,
        text_base: Option<VirtAddr>,
    ) -> Machine {
        Machine { backend, cpus, first, text_base }
    }

    /// The memory and saved registers underneath.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The CPUs in ascending order of number; never empty (a source without registers has one CPU with none).
    pub fn cpus(&self) -> &[Cpu] {
        &self.cpus
    }

    /// The CPU a debugger should start on: the one that panicked, else the first.
    pub fn first_cpu(&self) -> CpuId {
        self.first
    }

    /// Reads virtual memory as `cpu` should see it: kernel addresses through the kernel's tables, user
    /// addresses through those of the task that ran on `cpu`. Stops exactly at the first unreadable byte.
    pub fn read_virt(&self, cpu: CpuId, at: VirtAddr, buf: &mut [u8]) -> VirtOutcome {
        let regs = self.cpus.iter().find(|c| c.id == cpu).map(|c| &c.regs);
        let Some(cr3) = regs.and_then(|regs| regs.u64(Reg::Cr3)) else {
            let why = format!("cr3 of CPU {} was not saved", cpu.0);
            return VirtOutcome { filled: 0, stopped: Some(TranslateError::NoTables { at, why }.into()) };
        };
        const CR4_LA57: u64 = 1 << 12;
        let la57 = regs.and_then(|regs| regs.u64(Reg::Cr4)).is_some_and(|cr4| cr4 & CR4_LA57 != 0);
        let tables =
            AddressSpace { root: PhysAddr(cr3 & !0xfff), levels: if la57 { 5 } else { 4 }, sme_mask: 0 };
        tables.read(&*self.backend, at, buf)
    }

    /// Run-time address of the kernel's first loaded segment (`_text` with KASLR): what `qOffsets` reports.
    pub fn text_base(&self) -> Option<VirtAddr> {
        self.text_base
    }

    /// The vmlinux that belongs to this kernel, if one was found.
    pub fn vmlinux(&self) -> Option<&Path> {
        None
    }
}
