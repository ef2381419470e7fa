//! A machine and, where one was found, the kernel in it: what gdb and the commands work on.

use crate::addr::VirtAddr;
use crate::arch::x86_64::{RegisterFile, VirtOutcome};
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
}

impl Machine {
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
        CpuId(0)
    }

    /// Reads virtual memory as `cpu` should see it: kernel addresses through the kernel's tables, user
    /// addresses through those of the task that ran on `cpu`. Stops exactly at the first unreadable byte.
    pub fn read_virt(&self, _cpu: CpuId, _at: VirtAddr, _buf: &mut [u8]) -> VirtOutcome {
        VirtOutcome { filled: 0, stopped: None }
    }

    /// Run-time address of the kernel's first loaded segment (`_text` with KASLR): what `qOffsets` reports.
    pub fn text_base(&self) -> Option<VirtAddr> {
        None
    }

    /// The vmlinux that belongs to this kernel, if one was found.
    pub fn vmlinux(&self) -> Option<&Path> {
        None
    }
}
