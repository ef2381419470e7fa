//! The registers as gdbstub sees them: numbers, widths and what of them is known.
//!
//! The numbering is QEMU's: gdb's own x86-64 numbering (which `gdbstub_arch` knows) with nine system
//! registers put in after `gs`. Source: QEMU `gdb-xml/i386-64bit.xml`, GDB `features/i386/64bit-core.xml`.

use crate::arch::x86_64::{Reg, RegisterFile};
use gdbstub::arch::{Arch, RegId, Registers};
use gdbstub_arch::x86::reg::id::X86_64CoreRegId;
use std::num::NonZeroUsize;

/// Numbers of the registers that gdb's own numbering lacks: `fs_base` to `efer`.
const SYSTEM: std::ops::Range<usize> = Reg::FsBase as usize..Reg::St0 as usize;

/// The architecture for gdbstub.
pub(super) enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = GdbRegisters;
    type RegId = GdbRegister;
    type BreakpointKind = usize;
}

/// One register and what kind gdb takes it for.
#[derive(Clone, Copy, Debug)]
pub(super) struct GdbRegister {
    pub(super) reg: Reg,
    pub(super) kind: Kind,
}

/// A register of gdb's own description of x86-64, or one of the nine that QEMU adds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Core(X86_64CoreRegId),
    System,
}

impl GdbRegister {
    pub(super) fn of(reg: Reg) -> Option<Self> {
        let kind = match reg as usize {
            number if SYSTEM.contains(&number) => Kind::System,
            number if number < SYSTEM.start => Kind::Core(X86_64CoreRegId::from_raw_id(number)?.0),
            number => Kind::Core(X86_64CoreRegId::from_raw_id(number - SYSTEM.len())?.0),
        };
        Some(Self { reg, kind })
    }
}

impl RegId for GdbRegister {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let register = Self::of(Reg::from_number(id)?)?;
        Some((register, NonZeroUsize::new(register.reg.bytes())))
    }

    fn to_raw_id(&self) -> Option<usize> {
        Some(self.reg as usize)
    }
}

/// The registers of one CPU; what was not saved goes out as `xx`, which gdb shows as `<unavailable>`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct GdbRegisters(pub(super) RegisterFile);

impl Registers for GdbRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        // gdbstub asks for it only when it resumes a target, which this one never is.
        self.0.u64(Reg::Rip).unwrap_or_default()
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for reg in Reg::ALL {
            match bytes_of(&self.0, reg) {
                Some(bytes) => bytes.into_iter().take(reg.bytes()).for_each(|byte| write_byte(Some(byte))),
                None => (0..reg.bytes()).for_each(|_| write_byte(None)),
            }
        }
    }

    fn gdb_deserialize(&mut self, _bytes: &[u8]) -> Result<(), ()> {
        // Registers of a dump are not written; the front refuses `G` before it comes here.
        Err(())
    }
}

/// The little-endian bytes of a register, of which the first [`Reg::bytes`] count; `None` if not saved.
pub(super) fn bytes_of(regs: &RegisterFile, reg: Reg) -> Option<[u8; 16]> {
    regs.get(reg).value().map(u128::to_le_bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::arch::x86_64::Saved;

    #[test]
    fn widths_agree_with_gdbs_own() {
        for id in 0..57 {
            let (_, width) = X86_64CoreRegId::from_raw_id(id).unwrap();
            let reg = Reg::from_number(if id < SYSTEM.start { id } else { id + SYSTEM.len() }).unwrap();
            assert_eq!(width.unwrap().get(), reg.bytes(), "{}", reg.name());
        }
        assert_eq!(SYSTEM.map(|n| Reg::from_number(n).unwrap().bytes()).sum::<usize>(), 72);
        assert!(Reg::ALL.iter().all(|&reg| GdbRegister::of(reg).is_some()));
        assert!(GdbRegister::from_raw_id(66).is_none());
    }

    #[test]
    fn distinct_values_come_out_in_protocol_order() {
        let mut regs = RegisterFile::default();
        for reg in Reg::ALL {
            // Every byte of every register differs from its neighbours.
            let pattern: [u8; 16] =
                std::array::from_fn(|i| (reg as u8).wrapping_mul(3).wrapping_add(i as u8 * 7) | 1);
            regs.set(reg, Saved::Known(u128::from_le_bytes(pattern)));
        }
        regs.set(Reg::Efer, Saved::NotSaved);
        let mut out = Vec::new();
        GdbRegisters(regs.clone()).gdb_serialize(|byte| out.push(byte));
        assert_eq!(out.len(), 608);
        let mut rest = &out[..];
        for reg in Reg::ALL {
            let (mine, after) = rest.split_at(reg.bytes());
            rest = after;
            match regs.get(reg).value() {
                Some(value) => {
                    let wanted: Vec<_> =
                        value.to_le_bytes()[..reg.bytes()].iter().map(|&b| Some(b)).collect();
                    assert_eq!(mine, wanted, "{}", reg.name());
                }
                None => assert!(mine.iter().all(Option::is_none), "{}", reg.name()),
            }
        }
    }
}
