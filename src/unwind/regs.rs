//! The registers of a frame, as far as they are known, and those that an interrupt or system call leaves on a stack.
//!
//! Source: `arch/x86/include/asm/ptrace.h` (`struct pt_regs`), System V ABI for x86-64 (who keeps what).

use super::Stack;
use crate::arch::x86_64::{Reg, RegisterFile};
use std::fmt;

/// Registers from `rax` to `ss` by their number in [`Reg`].
const COUNT: usize = Reg::Ss as usize + 1;

/// What is known of the registers of a frame: the general ones, `rip`, `eflags`, `cs` and `ss`.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Regs {
    /// A bit for each.
    known: u32,
    values: [u64; COUNT],
}

impl Regs {
    /// Those of a CPU.
    pub fn from_file(file: &RegisterFile) -> Self {
        let mut regs = Self::default();
        for reg in Reg::ALL.into_iter().take(COUNT) {
            if let Some(value) = file.u64(reg) {
                regs.set(reg, value);
            }
        }
        regs
    }

    /// The value of `reg`, if it is known.
    pub fn get(&self, reg: Reg) -> Option<u64> {
        let index = reg as usize;
        self.values.get(index).copied().filter(|_| self.known >> index & 1 == 1)
    }

    /// `reg` is `value`.
    pub fn set(&mut self, reg: Reg, value: u64) {
        if let Some(slot) = self.values.get_mut(reg as usize) {
            *slot = value;
            self.known |= 1 << (reg as usize);
        }
    }

    /// `reg` is no longer known.
    pub fn forget(&mut self, reg: Reg) {
        if let Some(slot) = self.values.get_mut(reg as usize) {
            *slot = 0;
            self.known &= !(1 << (reg as usize));
        }
    }

    /// `rip`
    pub fn pc(&self) -> Option<u64> {
        self.get(Reg::Rip)
    }

    /// `rsp`
    pub fn sp(&self) -> Option<u64> {
        self.get(Reg::Rsp)
    }

    /// Whether they are of user mode: the privilege level in `cs` is 3. `None` if `cs` is not known.
    pub fn in_user_mode(&self) -> Option<bool> {
        self.get(Reg::Cs).map(|cs| cs & 3 == 3)
    }

    /// Those known, in the processor's order.
    pub fn known(&self) -> impl Iterator<Item = (Reg, u64)> + '_ {
        Reg::ALL.into_iter().take(COUNT).filter_map(|reg| Some((reg, self.get(reg)?)))
    }
}

impl fmt::Debug for Regs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.known().map(|(reg, value)| (reg.name(), format!("{value:#x}")))).finish()
    }
}

/// Words of a `struct pt_regs`, in order; `None` is `orig_ax`. Unchanged since v2.6.
const PT_REGS: [Option<Reg>; 21] = {
    use Reg::*;
    [
        Some(R15),
        Some(R14),
        Some(R13),
        Some(R12),
        Some(Rbp),
        Some(Rbx),
        Some(R11),
        Some(R10),
        Some(R9),
        Some(R8),
        Some(Rax),
        Some(Rcx),
        Some(Rdx),
        Some(Rsi),
        Some(Rdi),
        None,
        Some(Rip),
        Some(Cs),
        Some(Eflags),
        Some(Rsp),
        Some(Ss),
    ]
};

/// `sizeof(struct pt_regs)`
pub const PT_REGS_SIZE: u64 = 21 * 8;
/// `offsetof(struct pt_regs, ip)`: the rest is what the processor pushes.
const IRET_FRAME: usize = 16;

/// Registers that were saved on a stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PtRegs {
    /// Where the `struct pt_regs` is, or, of a partial one, would begin.
    pub at: u64,
    /// The registers.
    pub regs: Regs,
    /// The system call's number, an exception's error code, or what else the entry code puts there; `None` in a
    /// partial one.
    pub orig_ax: Option<u64>,
    /// The rest of the words of `cs` and `ss`, in which FRED processors tell the event.
    pub fred: (u64, u64),
}

impl PtRegs {
    /// Reads the registers at `at`; of a `partial` one only the five words that the processor pushes. `None` if any
    /// cannot be read.
    pub fn read(stack: &dyn Stack, at: u64, partial: bool) -> Option<Self> {
        let mut found = Self { at, regs: Regs::default(), orig_ax: None, fred: (0, 0) };
        let from = if partial { IRET_FRAME } else { 0 };
        for (index, reg) in PT_REGS.into_iter().enumerate().skip(from) {
            let value = stack.word(at.wrapping_add(index as u64 * 8))?;
            match reg {
                None => found.orig_ax = Some(value),
                // The upper bits of both words are FRED's.
                Some(Reg::Cs) => {
                    found.fred.0 = value >> 16;
                    found.regs.set(Reg::Cs, value & 0xffff);
                }
                Some(Reg::Ss) => {
                    found.fred.1 = value >> 16;
                    found.regs.set(Reg::Ss, value & 0xffff);
                }
                Some(reg) => found.regs.set(reg, value),
            }
        }
        Some(found)
    }

    /// Whether the interrupted code was a user's.
    pub fn of_user(&self) -> bool {
        self.regs.in_user_mode() == Some(true)
    }
}
