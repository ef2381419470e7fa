//! Where the stacks of a CPU and of a task are.
//!
//! Source: `arch/x86/include/asm/page_64_types.h` (sizes), `cpu_entry_area.h` (`struct cea_exception_stacks`),
//! `processor.h` (`struct tss_struct`), `arch/x86/kernel/irq_64.c` (`hardirq_stack_ptr`).

use crate::addr::VirtAddr;
use crate::kernel::CpuId;
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
