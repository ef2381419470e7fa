//! Frames from registers, tables and the bytes of a stack: one step at a time.
//!
//! Knows how a call and an interrupt look on the stack; does not know where stacks are, which task or CPU they belong
//! to or what symbols are called: `kernel::stack` walks with it. Source: `arch/x86/kernel/unwind_orc.c`, the System V
//! ABI for x86-64 (frame pointers), `arch/x86/include/asm/ptrace.h` (`struct pt_regs`).

mod regs;
mod step;

pub use regs::{PT_REGS_SIZE, PtRegs, Regs};
pub use step::{NoStep, Step, by_call_frames, by_frame_pointer, by_own_code, by_top_of_stack, step};

use crate::debuginfo::cfi::CfiRow;
use crate::debuginfo::orc::OrcEntry;
use std::fmt;

/// How a frame was found: the kind of evidence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameSource {
    /// The registers of a CPU as the dump has them: a first frame.
    Registers,
    /// Registers that were saved when the frame was interrupted.
    PtRegs,
    /// What a task left on its stack when it was switched out: a first frame.
    InactiveTask,
    /// What a function that does not return has left on a stack that is known to be in use: a first frame.
    Remains,
    /// The kernel's ORC tables.
    Orc,
    /// DWARF call frame information.
    Cfi,
    /// The function's own code, followed from its start: what it has pushed; and a call of it is where that leads.
    Code,
    /// `rbp` and the word above the one it points at.
    FramePointer,
    /// The top of the stack: of code that was called and has pushed nothing yet.
    TopOfStack,
    /// A word on the stack that points behind a call: a guess.
    Scan,
}

impl FrameSource {
    /// A short fixed name for JSON and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Registers => "registers",
            Self::PtRegs => "pt_regs",
            Self::InactiveTask => "inactive_task_frame",
            Self::Remains => "remains",
            Self::Orc => "orc",
            Self::Cfi => "cfi",
            Self::Code => "code",
            Self::FramePointer => "frame pointer",
            Self::TopOfStack => "top of stack",
            Self::Scan => "scan",
        }
    }

    /// Whether the frame may never have been.
    pub fn is_guess(self) -> bool {
        self == Self::Scan
    }
}

/// What exactly led to a frame.
#[derive(Clone, PartialEq, Debug)]
pub enum Why {
    /// A first frame: where its registers are from, as half a sentence.
    Start(&'static str),
    /// The ORC row of the frame that it called.
    Orc(OrcEntry),
    /// The row of call frame information of the frame that it called.
    Cfi(CfiRow),
    /// Registers were saved at this address, where an ORC row, or knowledge of the code, says they are.
    PtRegs {
        /// Where.
        at: u64,
        /// What led there, if a table did.
        row: Option<OrcEntry>,
    },
    /// Half a sentence.
    Because(&'static str),
    /// A guess; what the tables came to, as half a sentence.
    Guess(String),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start(why) | Self::Because(why) => f.write_str(why),
            Self::Guess(why) => write!(f, "the next word that is behind a call, as {why}"),
            Self::Orc(row) => write!(f, "ORC {row}"),
            Self::Cfi(row) => write!(f, "CFI {row}"),
            Self::PtRegs { at, row: Some(row) } => write!(f, "pt_regs at {at:#x}, ORC {row}"),
            Self::PtRegs { at, row: None } => write!(f, "pt_regs at {at:#x}"),
        }
    }
}

/// One frame.
#[derive(Clone, PartialEq, Debug)]
pub struct Frame {
    /// Its code: an address where it was interrupted, or the one it will go on at when what it called returns.
    pub pc: u64,
    /// Whether `pc` is the instruction itself. Otherwise it follows a call: symbols and lines go by `pc - 1`.
    pub exact: bool,
    /// Where on the stack `pc` was found; `None` for first frames.
    pub pc_at: Option<u64>,
    /// Its stack pointer: with the return address, if it called, already taken off.
    pub sp: u64,
    /// Its canonical frame address: the caller's stack pointer, just behind the return address. `None` before a step
    /// out of the frame was made.
    pub cfa: Option<u64>,
    /// What is known of its registers.
    pub regs: Regs,
    /// How it was found.
    pub source: FrameSource,
    /// The row or reason.
    pub why: Why,
    /// The return address on the stack was another one, put there by what this names; `pc` is the real one.
    pub restored: Option<&'static str>,
}

impl Frame {
    /// A first frame with these registers; `None` if neither pc nor stack pointer are among them.
    pub fn first(regs: Regs, source: FrameSource, why: &'static str) -> Option<Self> {
        Some(Self {
            pc: regs.pc()?,
            exact: source != FrameSource::InactiveTask,
            pc_at: None,
            sp: regs.sp()?,
            cfa: None,
            regs,
            source,
            why: Why::Start(why),
            restored: None,
        })
    }

    /// The address to look symbols, lines and tables up by.
    pub fn lookup_pc(&self) -> u64 {
        if self.exact { self.pc } else { self.pc.wrapping_sub(1) }
    }
}

/// Reads the words of a stack.
pub trait Stack {
    /// The word at `at`; `None` if it is on no stack or cannot be read.
    fn word(&self, at: u64) -> Option<u64>;
}

/// What is known of code.
pub trait Tables {
    /// The ORC row that covers `pc`.
    fn orc(&self, pc: u64) -> Option<OrcEntry>;
    /// The row of call frame information that covers `pc`.
    fn cfi(&self, pc: u64) -> Option<CfiRow>;
    /// Whether `pc` is in code and right behind a call.
    fn follows_call(&self, pc: u64) -> bool;
}
