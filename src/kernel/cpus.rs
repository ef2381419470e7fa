//! CPUs as the kernel numbers them: which exist, whose registers are whose, what ran on each.
//!
//! Notes do not say which CPU they are of: the kernel writes one per CPU that answered, and a reader sees them
//! in a row. Each CPU's own copy of its note (`crash_notes`) and its per-CPU base tell.
//! Source: `kernel/crash_core.c` (`crash_notes`), `arch/x86/kernel/setup_percpu.c` (`__per_cpu_offset`).

use super::{CpuId, Kernel, Task};
use crate::addr::VirtAddr;
use crate::arch::x86_64::{Reg, Saved};
use crate::backend::{RegisterSource, SavedCpu};

/// `NR_CPUS` is at most 8192 on x86-64 (`MAXSMP`); hostile masks end here.
const NR_CPUS_MAX: u64 = 8192;
/// An ELF note header and the name `"CORE"`, padded: what stands before the descriptor in `crash_notes`.
const NOTE_HEADER: u64 = 12 + 8;

/// A saved register set and the CPU it is of.
pub struct Attributed {
    /// The CPU.
    pub cpu: CpuId,
    /// Index into the backend's saved CPUs.
    pub index: usize,
    /// Whether evidence led here, or only the order of the notes.
    pub certain: bool,
}

impl Kernel {
    /// The CPUs set in a mask such as `"__cpu_online_mask"`; `None` where it is not known.
    pub fn cpu_mask(&self, name: &str) -> Option<Vec<CpuId>> {
        let (at, size) = self.symbol_and_size(name)?;
        let mut mask = vec![0; usize::try_from(size.min(NR_CPUS_MAX / 8)).ok()?];
        if mask.is_empty() || self.read(at, &mut mask).stopped.is_some() {
            return None;
        }
        let bits = mask.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
        Some((0..).zip(bits).filter(|&(_, set)| set).map(|(cpu, _)| CpuId(cpu)).collect())
    }

    /// `__per_cpu_offset[cpu]`: what is added to a per-CPU symbol for `cpu`, and that CPU's kernel gs base.
    pub fn per_cpu_offset(&self, cpu: CpuId) -> Option<u64> {
        let (table, size) = self.symbol_and_size("__per_cpu_offset")?;
        let slot = u64::from(cpu.0) * 8;
        // A kernel for one CPU only (no CONFIG_SMP) has no such table and no need for one.
        (slot < size).then(|| self.read_u64(table.wrapping_add(slot)))?
    }

    /// Address of the static per-CPU variable `name` on `cpu`.
    pub fn per_cpu(&self, name: &str, cpu: CpuId) -> Option<VirtAddr> {
        Some(self.symbol(name)?.wrapping_add(self.per_cpu_offset(cpu)?))
    }

    /// The task that runs on `cpu`.
    pub fn current(&self, cpu: CpuId) -> Option<Task> {
        // Since Linux commit e57ef2ed97c1 ("x86: Put hot per CPU variables into a struct") (in v6.2) and until
        // a1e4cc0155ad ("x86/percpu: Move current_task to percpu hot section") (in v6.15) the pointer is
        // pcpu_hot.current_task; before and after it is a variable of its own.
        let at = match self.per_cpu("pcpu_hot", cpu) {
            Some(hot) => hot.wrapping_add(self.member("pcpu_hot", "current_task")?.offset),
            None => self.per_cpu("current_task", cpu)?,
        };
        let task = self.read_u64(at).filter(|&task| task != 0)?;
        Some(self.task(VirtAddr(task)))
    }

    /// The CPU that panicked, or crashed into kdump; `None` if none did.
    pub fn panic_cpu(&self) -> Option<CpuId> {
        // Since Linux commit 1717f2096b54 ("panic, x86: Fix re-entrance problem due to panic on NMI") (in v4.5);
        // x86's own crashing_cpu serves before. Both are -1 until it happens.
        ["panic_cpu", "crashing_cpu"].iter().find_map(|name| {
            let cpu = self.symbol(name).and_then(|at| self.read_u32(at))?;
            (u64::from(cpu) < NR_CPUS_MAX).then_some(CpuId(cpu))
        })
    }

    /// Says which CPU each register set is of; `None` where there are no symbols to tell by.
    pub fn attribute(&self, saved: &[SavedCpu]) -> Option<Vec<Attributed>> {
        let possible = self.cpu_mask("__cpu_possible_mask")?;
        let mut attributed: Vec<Attributed> = Vec::new();
        let mut unknown = Vec::new();
        for (index, one) in saved.iter().enumerate() {
            let taken = |cpu: &CpuId| attributed.iter().any(|a| a.cpu == *cpu);
            let cpu = possible.iter().copied().find(|&cpu| !taken(&cpu) && self.is_of(one, cpu));
            match cpu {
                Some(cpu) => attributed.push(Attributed { cpu, index, certain: true }),
                None => unknown.push(index),
            }
        }
        for index in unknown {
            let taken = |cpu: &CpuId| attributed.iter().any(|a| a.cpu == *cpu);
            let same_number = possible.get(index).copied().filter(|cpu| !taken(cpu));
            let cpu = same_number.or_else(|| possible.iter().copied().find(|cpu| !taken(cpu)));
            if let Some(cpu) = cpu {
                attributed.push(Attributed { cpu, index, certain: false });
            }
        }
        Some(attributed)
    }

    /// Whether evidence in memory says that `saved` is of `cpu`.
    fn is_of(&self, saved: &SavedCpu, cpu: CpuId) -> bool {
        match saved.source {
            RegisterSource::Qemu => self.per_cpu_offset(cpu).is_some_and(|base| {
                base != 0 && [Reg::GsBase, Reg::KGsBase].iter().any(|&reg| saved.regs.u64(reg) == Some(base))
            }),
            RegisterSource::KernelPrstatus => self
                .crash_note(cpu, saved.prstatus.len())
                .is_some_and(|note| !note.is_empty() && note == saved.prstatus),
        }
    }

    /// The descriptor of the `NT_PRSTATUS` that `cpu` left in its `crash_notes`.
    fn crash_note(&self, cpu: CpuId, len: usize) -> Option<Vec<u8>> {
        let notes = self.read_u64(self.symbol("crash_notes")?)?;
        let at = VirtAddr(notes.wrapping_add(self.per_cpu_offset(cpu)?).wrapping_add(NOTE_HEADER));
        let mut note = vec![0; len.min(4096)];
        self.read(at, &mut note).stopped.is_none().then_some(note)
    }
}

/// Fills in what a kernel-written `NT_PRSTATUS` leaves out of the two gs bases: one is the user's, the other the
/// per-CPU base, and the mode tells which was active.
pub fn derive_gs_base(regs: &mut crate::arch::x86_64::RegisterFile, per_cpu_base: u64) {
    let missing = match regs.in_user_mode() {
        Some(true) => Reg::KGsBase,
        Some(false) => Reg::GsBase,
        None => return,
    };
    if regs.get(missing) == Saved::NotSaved {
        regs.set(missing, Saved::Derived(per_cpu_base.into(), "from __per_cpu_offset of this CPU"));
    }
}
