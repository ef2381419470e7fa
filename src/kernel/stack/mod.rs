//! Backtraces: the frames of a CPU or task across all the stacks that it is on, down to user mode or the root.
//!
//! [`Trace`] is what a walk found; the walk never leaves a stack without proof and says why it ended. `unwind` makes
//! the single step; this knows where stacks are, how they follow one another, and the code that needs to be known by
//! name. Source: `arch/x86/kernel/dumpstack_64.c`, `unwind_orc.c`, `arch/x86/entry/entry_64.S`.

mod bounds;
mod entry;
mod parked;
mod returns;
mod runtime_code;
mod tables;
mod tracer;
mod walk;

pub use bounds::{StackBounds, StackKind};
pub use runtime_code::{RuntimeCode, RuntimeKind};
pub use tracer::{BATCH, Tracer};

use super::{CpuId, Kernel, Symbolized};
use crate::addr::VirtAddr;
use crate::debuginfo::cfi::CfiRow;
use crate::debuginfo::orc::OrcEntry;
use crate::unwind::{Frame, PtRegs, Regs, Tables};
use entry::KnownCode;
use returns::ReturnLayout;
use runtime_code::RuntimePieces;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{OnceLock, RwLock};
use tables::{CodeTables, KernelTables};

/// `STACK_END_MAGIC`: at the low end of every task's stack (`include/uapi/linux/magic.h`).
const STACK_END_MAGIC: u64 = 0x57ac_6e9d;

/// Where the first registers are from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// The CPU's, as the dump has them.
    Cpu,
    /// What the task left on its stack when it was switched out.
    SwitchedOut,
    /// Where the user said.
    Given,
    /// It was running, and the dump has no registers of that CPU.
    NotSaved,
    /// The task has exited and its stack was released.
    Released,
    /// The task's stack, or where it is, cannot be read.
    Unreadable,
}

impl Start {
    /// Half a sentence.
    pub fn words(self) -> &'static str {
        match self {
            Self::Cpu => "from the registers of its CPU",
            Self::SwitchedOut => "from what it left on its stack when it was switched out",
            Self::Given => "from the pc and stack pointer that were given",
            Self::NotSaved => "it was running and no registers of its CPU were saved",
            Self::Released => "it has exited and its stack was released",
            Self::Unreadable => "its stack cannot be read",
        }
    }
}

/// What interrupted or entered the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A non-maskable interrupt.
    Nmi,
    /// An interrupt: a device's, a timer's, another CPU's; its vector where the saved registers tell.
    Irq(Option<u8>),
    /// A fault or trap: its vector, and the error code where the saved registers still have it.
    Exception(u8, Option<u64>),
    /// A system call of this number.
    Syscall(u64),
    /// A task that has never run yet, or a kernel thread that became a user's.
    Fork,
    /// Registers that a probe or tracer saved.
    Probe,
    /// Not known.
    Unknown,
}

impl Event {
    /// Names of the exceptions by vector (Intel SDM vol. 3, table 6-1).
    const EXCEPTIONS: [(u8, &'static str); 21] = [
        (0, "divide error"),
        (1, "debug"),
        (2, "NMI"),
        (3, "int3"),
        (4, "overflow"),
        (5, "bounds"),
        (6, "invalid opcode"),
        (7, "device not available"),
        (8, "double fault"),
        (10, "invalid TSS"),
        (11, "segment not present"),
        (12, "stack segment fault"),
        (13, "general protection fault"),
        (14, "page fault"),
        (16, "x87 error"),
        (17, "alignment check"),
        (18, "machine check"),
        (19, "SIMD error"),
        (20, "virtualization exception"),
        (21, "control protection fault"),
        (29, "VMM communication exception"),
    ];
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nmi => write!(f, "NMI"),
            Self::Irq(Some(vector)) => write!(f, "interrupt {vector:#x}"),
            Self::Irq(None) => write!(f, "interrupt"),
            Self::Exception(vector, code) => {
                match Self::EXCEPTIONS.iter().find(|(number, _)| number == vector) {
                    Some((_, name)) => write!(f, "{name}")?,
                    None => write!(f, "exception {vector}")?,
                }
                code.map_or(Ok(()), |code| write!(f, ", error code {code:#x}"))
            }
            Self::Syscall(number) => write!(f, "system call {number}"),
            Self::Fork => write!(f, "fork"),
            Self::Probe => write!(f, "probe"),
            Self::Unknown => write!(f, "unknown"),
        }
    }
}

/// The registers at which one context was left for another.
#[derive(Clone, PartialEq, Debug)]
pub struct Boundary {
    /// What was interrupted: the registers and where they were saved.
    pub saved: PtRegs,
    /// Whether they are partial: only what the processor pushes, and what follows.
    pub partial: bool,
    /// By what.
    pub event: Event,
    /// `pc` of the entry code's frame that saved them.
    pub entry: u64,
}

impl Boundary {
    /// Whether a user's code was interrupted.
    pub fn of_user(&self) -> bool {
        self.saved.of_user()
    }
}

/// Frames on one stack up to where another context begins: innermost first.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Segment {
    /// The stack that they are on; `None` where the stack pointer was on none that is known.
    pub stack: Option<StackBounds>,
    /// The frames; may be empty.
    pub frames: Vec<Frame>,
    /// What lies between this segment and the next; `None` at the end, and where a call has switched stacks.
    pub boundary: Option<Boundary>,
}

/// Why a walk ended.
#[derive(Clone, PartialEq, Debug)]
pub enum Ended {
    /// In user mode: the user's registers.
    User(Regs),
    /// In the kernel's entry or exit code while that still, or again, had the user's stack pointer or was about to
    /// change it; the user's registers as far as they follow.
    EntryGap {
        /// Where in the entry code.
        pc: u64,
        /// The user's registers.
        user: Regs,
    },
    /// Where a task or CPU starts: there is no caller.
    Root {
        /// Its pc.
        pc: u64,
    },
    /// There are no registers to start from: [`Trace::start`] says why.
    NotStarted,
    /// Short of the root: half a sentence.
    Broken {
        /// The last frame's pc.
        pc: u64,
        /// Why.
        why: String,
    },
}

impl Ended {
    /// Whether the whole of the stack was walked.
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::User(_) | Self::EntryGap { .. } | Self::Root { .. })
    }
}

/// What a walk found.
#[derive(Clone, PartialEq, Debug)]
pub struct Trace {
    /// The CPU that it is about, or that the task runs on; `None` for a task that is switched out.
    pub cpu: Option<CpuId>,
    /// Address of the `struct task_struct`, where that is known.
    pub task: Option<VirtAddr>,
    /// Where it starts.
    pub start: Start,
    /// The segments, innermost first. Empty if the CPU was in user mode.
    pub segments: Vec<Segment>,
    /// Why it ends.
    pub ended: Ended,
    /// The CPU waits for others, or for the machine to be restarted: the function it was sent to. What it did before
    /// is in the segments behind the next boundary.
    pub parked: Option<&'static str>,
}

impl Trace {
    /// All frames, innermost first.
    pub fn frames(&self) -> impl Iterator<Item = &Frame> {
        self.segments.iter().flat_map(|segment| &segment.frames)
    }

    /// How many frames are guesses.
    pub fn guessed(&self) -> usize {
        self.frames().filter(|frame| frame.source.is_guess()).count()
    }

    /// Whether the CPU was in user mode: no kernel frame is to be shown.
    pub fn in_user_mode(&self) -> bool {
        self.segments.is_empty() && matches!(self.ended, Ended::User(_))
    }

    /// The user's registers at the bottom.
    pub fn user(&self) -> Option<&Regs> {
        match &self.ended {
            Ended::User(regs) | Ended::EntryGap { user: regs, .. } => Some(regs),
            _ => None,
        }
    }

    /// The boundaries, innermost first.
    pub fn boundaries(&self) -> impl Iterator<Item = &Boundary> {
        self.segments.iter().filter_map(|segment| segment.boundary.as_ref())
    }
}

/// What walks need to know of a kernel: found once, read as far as needed.
pub struct Stacks {
    thread_size: u64,
    /// `task_struct.stack`
    stack: Option<u64>,
    by_cpu: RwLock<HashMap<CpuId, Vec<StackBounds>>>,
    /// The kernel image's code.
    text: Vec<Range<u64>>,
    code: OnceLock<KnownCode>,
    returns: ReturnLayout,
    pieces: OnceLock<RuntimePieces>,
    tables: CodeTables,
}

impl Kernel {
    /// What walks need to know.
    pub(super) fn stacks(&self) -> &Stacks {
        self.stacks.get_or_init(|| Stacks::of(self))
    }

    /// Whether `at` is in the code of the kernel image.
    fn is_image_text(&self, at: VirtAddr) -> bool {
        self.stacks().text.iter().any(|range| range.contains(&at.0))
    }

    /// Whether `at` may be code: of the image, a module, or made at run time.
    fn is_code(&self, at: VirtAddr) -> bool {
        let of_module = || {
            let module = self.modules().at(at)?;
            let region = module.regions.iter().find(|region| region.contains(at))?;
            // Before v6.4 all of a module is in one piece.
            Some(region.kind.contains("text") || matches!(region.kind, "core" | "init"))
        };
        self.is_image_text(at) || of_module().unwrap_or_else(|| self.runtime_code(at).is_some())
    }

    /// The symbol of the call that `word`, a word on a stack, is the return address of, where that call ends its function
    /// because it never returns: the word itself is then behind it, where another function may begin.
    pub fn caller_that_ends(&self, word: VirtAddr) -> Option<Symbolized<'_>> {
        let call = VirtAddr(word.0.checked_sub(1)?);
        let caller = self.symbolize(call)?;
        let is_behind_call = || self.stacks().tables(self, true).call_before(word.0).is_some();
        let ends = match self.symbolize(word) {
            Some(here) => (here.offset == 0 || here.name != caller.name) && is_behind_call(),
            // Nothing but a return address leads there; the code itself may be gone, as that for the boot is.
            None => self.is_code(call),
        };
        ends.then_some(Symbolized { offset: caller.offset + 1, ..caller })
    }

    /// The symbol of a word on a stack, which a return address is of the function that called.
    pub fn symbolize_word(&self, word: VirtAddr) -> Option<Symbolized<'_>> {
        self.caller_that_ends(word).or_else(|| self.symbolize(word))
    }

    /// Rows of code that compilers know nothing of: `(from, length, row)` of the entry code and of where tasks and CPUs
    /// begin. None for kernels without ORC.
    pub fn assembly_rows(&self) -> Vec<(u64, u64, OrcEntry)> {
        /// Bytes of entry code: some eight thousand.
        const TEXT_MAX: u64 = 64 << 10;
        const STARTS: [&str; 6] = [
            "ret_from_fork",
            "ret_from_fork_asm",
            "asm_call_on_stack",
            "secondary_startup_64",
            "secondary_startup_64_no_verify",
            "common_startup_64",
        ];
        let tables = self.stacks().tables(self, true);
        let entry = self.symbol("__entry_text_start").zip(self.symbol("__entry_text_end"));
        let entry = entry.map(|(start, end)| (start.0, end.0.saturating_sub(start.0)));
        let starts = STARTS.iter().filter_map(|name| {
            let symbols = self.symbols().ok()?;
            let found = symbols.lookup(name)?;
            Some((self.symbol(name)?.0, found.size))
        });
        let mut rows: Vec<(u64, u64, OrcEntry)> = Vec::new();
        for (start, size) in entry.into_iter().chain(starts) {
            for pc in start..start.saturating_add(size.min(TEXT_MAX)) {
                let Some(row) = tables.orc(pc) else { continue };
                match rows.last_mut() {
                    Some((from, length, last)) if *last == row && from.wrapping_add(*length) == pc => {
                        *length += 1
                    }
                    _ => rows.push((pc, 1, row)),
                }
            }
        }
        rows
    }

    /// The compiler's row of call frame information for the code at `pc`; `None` for assembly, and without debug information.
    pub fn call_frames(&self, pc: u64) -> Option<CfiRow> {
        self.stacks().tables(self, false).cfi(pc)
    }

    /// The stacks of `cpu` but for those of tasks.
    pub fn cpu_stacks(&self, cpu: CpuId) -> Vec<StackBounds> {
        self.stacks().of_cpu(self, cpu)
    }

    /// How the stack of the task at `task` has overflowed, as a sentence; `None` if it has not, or none of it can be read.
    pub fn stack_overflow(&self, task: VirtAddr) -> Option<String> {
        let stack = self.task_stack(task)?;
        let marker = self.read_u64(VirtAddr(stack.start))?;
        let sp = self
            .member("task_struct", "thread.sp")
            .and_then(|sp| self.read_u64(task.wrapping_add(sp.offset)));
        if marker != STACK_END_MAGIC {
            return Some(format!("the end marker at {:#x} was overwritten: {marker:#x}", stack.start));
        }
        let outside = sp.filter(|&sp| sp < stack.start || sp > stack.end)?;
        let (start, end) = (stack.start, stack.end);
        Some(format!("its stack pointer {outside:#x} is not in its stack, {start:#x} to {end:#x}"))
    }

    /// The stack of the task at `task`; `None` if it was released or cannot be read.
    pub fn task_stack(&self, task: VirtAddr) -> Option<StackBounds> {
        self.stacks().of_task(self, task)
    }
}

impl Stacks {
    fn of(kernel: &Kernel) -> Self {
        let range = |start, end| Some(kernel.symbol(start)?.0..kernel.symbol(end)?.0);
        Self {
            thread_size: kernel.read_thread_size(),
            stack: kernel.member("task_struct", "stack").map(|member| member.offset),
            by_cpu: RwLock::default(),
            text: [range("_stext", "_etext"), range("_sinittext", "_einittext")]
                .into_iter()
                .flatten()
                .collect(),
            code: OnceLock::new(),
            returns: ReturnLayout::of(kernel),
            pieces: OnceLock::new(),
            tables: CodeTables::of(kernel),
        }
    }

    fn code(&self, kernel: &Kernel) -> &KnownCode {
        self.code.get_or_init(|| KnownCode::of(kernel))
    }

    fn pieces(&self, kernel: &Kernel) -> &RuntimePieces {
        self.pieces.get_or_init(|| RuntimePieces::of(kernel))
    }

    fn tables<'k>(&'k self, kernel: &'k Kernel, orc: bool) -> KernelTables<'k> {
        KernelTables { kernel, tables: &self.tables, orc }
    }

    fn of_cpu(&self, kernel: &Kernel, cpu: CpuId) -> Vec<StackBounds> {
        if let Some(found) = self.by_cpu.read().ok().and_then(|all| all.get(&cpu).cloned()) {
            return found;
        }
        let found = kernel.read_cpu_stacks(cpu);
        if let Ok(mut all) = self.by_cpu.write() {
            all.insert(cpu, found.clone());
        }
        found
    }

    fn of_task(&self, kernel: &Kernel, task: VirtAddr) -> Option<StackBounds> {
        self.at(task, kernel.read_u64(task.wrapping_add(self.stack?))?)
    }

    /// That of the task at `task` if it begins at `start`.
    fn at(&self, task: VirtAddr, start: u64) -> Option<StackBounds> {
        let end = start.checked_add(self.thread_size).filter(|_| start >> 63 == 1)?;
        Some(StackBounds { kind: StackKind::Task, start, end, cpu: None, task: Some(task) })
    }
}
