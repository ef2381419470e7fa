//! Where the stacks of a CPU and of a task are.
//!
//! Source: `arch/x86/include/asm/page_64_types.h` (sizes), `cpu_entry_area.h` (`struct cea_exception_stacks`),
//! `processor.h` (`struct tss_struct`), `arch/x86/kernel/irq_64.c` (`hardirq_stack_ptr`).

use crate::addr::VirtAddr;
use crate::kernel::{CpuId, Kernel};
use std::fmt;

/// Which stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StackKind {
    /// A task's kernel stack.
    Task,
    /// The CPU's for interrupts, hard and soft.
    Irq,
    /// What the processor switches to when it enters from user mode.
    Entry,
    /// For NMIs.
    Nmi,
    /// For double faults: also of a stack that has overflowed.
    DoubleFault,
    /// For #DB.
    Debug,
    /// For machine checks.
    MachineCheck,
    /// For #VC, of encrypted guests.
    VmmCommunication,
    /// Where #VC goes on when it came on another of these stacks.
    VmmCommunicationFallback,
}

impl StackKind {
    /// crash's name, in capitals: `IRQ stack`, `NMI exception stack`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Task => "task stack",
            Self::Irq => "IRQ stack",
            Self::Entry => "entry stack",
            Self::Nmi => "NMI exception stack",
            Self::DoubleFault => "DOUBLEFAULT exception stack",
            Self::Debug => "DEBUG exception stack",
            Self::MachineCheck => "MCE exception stack",
            Self::VmmCommunication => "VC exception stack",
            Self::VmmCommunicationFallback => "VC2 exception stack",
        }
    }
}

/// Where a stack is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StackBounds {
    /// Which.
    pub kind: StackKind,
    /// Its lowest byte.
    pub start: u64,
    /// One past its highest byte.
    pub end: u64,
    /// Whose, unless a task's.
    pub cpu: Option<CpuId>,
    /// Whose, of a task's: the `struct task_struct`.
    pub task: Option<VirtAddr>,
}

impl StackBounds {
    /// Whether `at` is on it.
    pub fn contains(&self, at: u64) -> bool {
        (self.start..self.end).contains(&at)
    }
}

impl fmt::Display for StackBounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind.name())?;
        self.cpu.map_or(Ok(()), |cpu| write!(f, " of CPU {cpu}"))
    }
}

/// `THREAD_SIZE` and `IRQ_STACK_SIZE` without KASAN; used only where neither types nor symbols tell.
const USUAL_SIZE: u64 = 16 << 10;
/// Larger is no stack: KASAN doubles them once or twice.
const SIZE_MAX: u64 = 256 << 10;
/// `sizeof(struct entry_stack)`: the processor's own stack on entry is most of a page.
const ENTRY_STACK_SIZE: u64 = 4096;
/// `EXCEPTION_STKSZ` without KASAN.
const EXCEPTION_STACK_SIZE: u64 = 4096;

/// Exception stacks by their names in `struct cea_exception_stacks`, and their slot in the TSS (`IST_INDEX_*`).
const EXCEPTION_STACKS: [(&str, u64, StackKind); 6] = [
    ("DF_stack", 0, StackKind::DoubleFault),
    ("NMI_stack", 1, StackKind::Nmi),
    ("DB_stack", 2, StackKind::Debug),
    ("MCE_stack", 3, StackKind::MachineCheck),
    ("VC_stack", 4, StackKind::VmmCommunication),
    ("VC2_stack", u64::MAX, StackKind::VmmCommunicationFallback),
];

impl StackKind {
    /// The stack of a FRED processor's stack level (`cpu_init_fred_rsps`, `arch/x86/kernel/fred.c`): the exception
    /// stacks serve there, too. Level 0 is the stack that the CPU is on.
    pub fn of_fred_level(level: u8) -> Option<Self> {
        match level {
            1 => Some(Self::Debug),
            2 => Some(Self::Nmi),
            3 => Some(Self::DoubleFault),
            _ => None,
        }
    }
}

impl Kernel {
    /// `THREAD_SIZE`: bytes of a task's kernel stack.
    pub(super) fn read_thread_size(&self) -> u64 {
        let by_type = || self.types().and_then(|types| types.size(types.composite("thread_union")?));
        let between = |start, end| self.symbol(end)?.offset_from(self.symbol(start)?);
        // Renamed in about v6.9.
        let by_symbol = || between("__start_init_stack", "__end_init_stack");
        let by_older_symbol = || between("__start_init_task", "__end_init_task");
        let plausible = |size: &u64| size.is_power_of_two() && (4096..=SIZE_MAX).contains(size);
        let found = by_symbol().filter(plausible).or_else(|| by_older_symbol().filter(plausible));
        found.or_else(|| by_type().filter(plausible)).unwrap_or(USUAL_SIZE)
    }

    /// The stacks of `cpu`, but for those of tasks.
    pub(super) fn read_cpu_stacks(&self, cpu: CpuId) -> Vec<StackBounds> {
        let mut stacks = Vec::new();
        let mut add = |kind, start: u64, end: u64| {
            let size = end.checked_sub(start).filter(|size| (1..=SIZE_MAX).contains(size));
            if start != 0 && size.is_some() {
                stacks.push(StackBounds { kind, start, end, cpu: Some(cpu), task: None });
            }
        };
        if let Some(end) = self.irq_stack_end(cpu) {
            let by_type = self.types().and_then(|types| types.size(types.composite("irq_stack")?));
            let size = by_type.filter(|size| (4096..=SIZE_MAX).contains(size)).unwrap_or(USUAL_SIZE);
            add(StackKind::Irq, end.wrapping_sub(size), end);
        }
        let tss = self.per_cpu("cpu_tss_rw", cpu);
        let in_tss = |path| Some(tss?.wrapping_add(self.member("tss_struct", path)?.offset));
        if let Some(top) =
            in_tss("x86_tss.sp0").and_then(|at| self.read_u64(at)).filter(|&top| top >> 63 == 1)
        {
            // The page below holds nothing else that is a stack.
            add(StackKind::Entry, top.wrapping_sub(1) & !(ENTRY_STACK_SIZE - 1), top);
        }
        let area =
            self.per_cpu("cea_exception_stacks", cpu).and_then(|at| self.read_u64(at)).filter(|&at| at != 0);
        for (name, slot, kind) in EXCEPTION_STACKS {
            // Since Linux commit 019b17b3ffe4 ("x86/exceptions: Add structs for exception stacks") (in v5.2).
            if let (Some(area), Some(member)) = (area, self.member("cea_exception_stacks", name)) {
                let start = area.wrapping_add(member.offset);
                add(kind, start, start.wrapping_add(member.size.unwrap_or(0)));
            } else if let Some(ist) = in_tss("x86_tss.ist").filter(|_| slot < 7)
                && let Some(top) = self.read_u64(ist.wrapping_add(slot * 8)).filter(|&top| top >> 63 == 1)
            {
                add(kind, top.wrapping_sub(EXCEPTION_STACK_SIZE), top);
            }
        }
        stacks
    }

    /// One past the highest byte of the stack for interrupts.
    fn irq_stack_end(&self, cpu: CpuId) -> Option<u64> {
        // Since Linux commit d7b6d709a76a ("x86/percpu: Move irq_stack variables next to current_task") (in v6.2) and
        // until c6a0918072ea ("x86/irq: Move irq stacks to percpu hot section") (in v6.15) the pointer is
        // pcpu_hot.hardirq_stack_ptr; before and after it is a variable of its own, before v5.1 irq_stack_ptr.
        let hot = || {
            let at = self.per_cpu("pcpu_hot", cpu)?;
            self.read_u64(at.wrapping_add(self.member("pcpu_hot", "hardirq_stack_ptr")?.offset))
        };
        let own = |name| self.read_u64(self.per_cpu(name, cpu)?);
        let top = own("hardirq_stack_ptr").or_else(hot).or_else(|| own("irq_stack_ptr"))?;
        // It points at the end, or, since Linux commit 951c2a51ae75 ("x86/irq/64: Adjust the per CPU irq stack pointer
        // by 8") (in v5.12), at the last word; older ones left room for 64 bytes.
        (top >> 63 == 1).then(|| top.wrapping_add(4095) & !4095)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Levels as `cpu_init_fred_exceptions` assigns them: #DB 1, NMI and #MC 2, #DF 3.
    #[test]
    fn fred_levels_use_the_exception_stacks() {
        let kinds: Vec<_> = (0..=4).map(StackKind::of_fred_level).collect();
        let expected =
            [None, Some(StackKind::Debug), Some(StackKind::Nmi), Some(StackKind::DoubleFault), None];
        assert_eq!(kinds, expected);
    }
}
