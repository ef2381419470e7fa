//! ORC: the kernel's own unwind tables, one fixed-size row for each stretch of code.
//!
//! Decodes rows and finds the one of an address in bytes it is given; reads no memory and knows no stack. The row's
//! layout has been the same six bytes since v4.14, their meaning changed three times: [`Format`].
//! Source: `arch/x86/include/asm/orc_types.h`, `arch/x86/kernel/unwind_orc.c`, `tools/objtool/orc_gen.c`.

use crate::bytes::{array_at, u16_at, u32_at};
use std::fmt;

/// Bytes of a `struct orc_entry`.
pub const ENTRY_SIZE: usize = 6;
/// Bytes of an element of `.orc_unwind_ip`: an address relative to where the element is.
pub const IP_SIZE: usize = 4;
/// Bytes of code that one element of `orc_lookup` is about.
pub const LOOKUP_BLOCK_SIZE: u64 = 256;

/// What a row's numbers mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Format {
    /// The bits behind the registers.
    pub flags: Flags,
    /// The registers' numbers.
    pub numbers: Numbers,
}

/// How registers are numbered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Numbers {
    /// Since v4.14: `rsp` is 5, the caller's stack pointer 1.
    Old,
    /// Since about v7.0: `rsp` is 3, the caller's stack pointer 8; there is `rax`.
    New,
}

/// What the bits behind the registers mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flags {
    /// Since v4.14: `type:2, end:1`; no row is all that says that code cannot be unwound.
    Old,
    /// Since Linux commit ffb1b4a41016 ("x86/unwind/orc: Add 'signal' field to ORC metadata") (in v6.3):
    /// `type:2, signal:1, end:1`.
    Signal,
    /// Since Linux commit fb799447ae29 ("x86,objtool: Split UNWIND_HINT_EMPTY in two") (in v6.4):
    /// `type:3, signal:1`, with types for undefined code and the end of the stack.
    Typed,
}

impl Format {
    /// Tells the format. `header`: whether there is a `__start_orc_header`, which came right behind the last change of the
    /// flags. `rows`: some of the table.
    ///
    /// Flags: an ordinary row, of type CALL, is 0 in the older and 2 in the newer numbering, and bit 3 has a meaning in
    /// [`Flags::Signal`] only.
    ///
    /// Registers: almost every row counts from `rsp`, and almost none from `rdi`, which has its number in the other
    /// numbering.
    pub fn tell(header: bool, rows: &[u8]) -> Self {
        let from = |wanted: u8| {
            let from = rows.chunks_exact(ENTRY_SIZE).filter_map(|row| row.get(4)).map(|regs| regs & 0xf);
            from.filter(|reg| *reg == wanted).count()
        };
        let numbers = if from(3) > from(5) { Numbers::New } else { Numbers::Old };
        Self { flags: Flags::tell(header, rows), numbers }
    }
}

impl Flags {
    fn tell(header: bool, rows: &[u8]) -> Self {
        let flags = || rows.chunks_exact(ENTRY_SIZE).filter_map(|row| row.get(5)).map(|flags| flags & 0xf);
        let typed = flags().filter(|flags| flags & 7 == 2).count();
        let untyped = flags().filter(|flags| flags & 3 == 0).count();
        if header || typed > untyped {
            Self::Typed
        } else if flags().any(|flags| flags & 8 != 0) {
            Self::Signal
        } else {
            Self::Old
        }
    }
}

/// What a row's offset is from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum OrcReg {
    /// Nothing is known.
    Undefined,
    /// The caller's stack pointer.
    PrevSp,
    /// `rax`
    Ax,
    /// `rdx`
    Dx,
    /// `rdi`
    Di,
    /// `rbp`
    Bp,
    /// `rsp`
    Sp,
    /// `r10`
    R10,
    /// `r13`
    R13,
    /// The word at `rbp` and the offset.
    BpIndirect,
    /// The word at `rsp`; the offset is then added to it.
    SpIndirect,
    /// No register that kernels have named.
    Unknown,
}

impl OrcReg {
    fn from_number(numbers: Numbers, number: u8) -> Self {
        const OLD: &[OrcReg] = {
            use OrcReg::*;
            &[Undefined, PrevSp, Dx, Di, Bp, Sp, R10, R13, BpIndirect, SpIndirect]
        };
        const NEW: &[OrcReg] = {
            use OrcReg::*;
            &[Undefined, Ax, Dx, Sp, Bp, Di, R10, R13, PrevSp, SpIndirect, BpIndirect]
        };
        let all = match numbers {
            Numbers::Old => OLD,
            Numbers::New => NEW,
        };
        all.get(usize::from(number)).copied().unwrap_or(Self::Unknown)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::PrevSp => "prevsp",
            Self::Ax => "ax",
            Self::Dx => "dx",
            Self::Di => "di",
            Self::Bp => "bp",
            Self::Sp => "sp",
            Self::R10 => "r10",
            Self::R13 => "r13",
            Self::BpIndirect => "(bp)",
            Self::SpIndirect => "(sp)",
            Self::Unknown => "?",
        }
    }
}

/// What the stack has where a row's first rule leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OrcKind {
    /// The code cannot be unwound.
    Undefined,
    /// There is no caller.
    EndOfStack,
    /// A return address, just below.
    Call,
    /// A whole `struct pt_regs`.
    Regs,
    /// The last five words of a `struct pt_regs`: what the processor pushes.
    RegsPartial,
    /// A type that kernels have not named.
    Unknown(u8),
}

/// One row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OrcEntry {
    /// The caller's stack pointer, or where the saved registers are: `sp_reg` and `sp_offset`.
    pub sp_reg: OrcReg,
    /// Bytes.
    pub sp_offset: i16,
    /// Where the caller's `rbp` is saved: `bp_reg` (`PrevSp` or `Bp`) and `bp_offset`; `Undefined` if it is not.
    pub bp_reg: OrcReg,
    /// Bytes.
    pub bp_offset: i16,
    /// What is there.
    pub kind: OrcKind,
    /// Whether the caller was interrupted: its pc is the instruction itself and not what follows a call.
    pub signal: bool,
}

impl OrcEntry {
    /// Decodes the row in six bytes.
    pub fn decode(format: Format, row: [u8; ENTRY_SIZE]) -> Self {
        let offset = |at| u16_at(&row, at).unwrap_or(0) as i16;
        let [.., regs, flags] = row;
        let sp_reg = OrcReg::from_number(format.numbers, regs & 0xf);
        let old = |end: bool| match (sp_reg, flags & 3) {
            (OrcReg::Undefined, _) if end => OrcKind::EndOfStack,
            (OrcReg::Undefined, _) => OrcKind::Undefined,
            (_, 0) => OrcKind::Call,
            (_, 1) => OrcKind::Regs,
            (_, 2) => OrcKind::RegsPartial,
            (_, other) => OrcKind::Unknown(other),
        };
        let kind = match format.flags {
            Flags::Old => old(flags & 4 != 0),
            Flags::Signal => old(flags & 8 != 0),
            Flags::Typed => match flags & 7 {
                0 => OrcKind::Undefined,
                1 => OrcKind::EndOfStack,
                2 => OrcKind::Call,
                3 => OrcKind::Regs,
                4 => OrcKind::RegsPartial,
                other => OrcKind::Unknown(other),
            },
        };
        let signal = match format.flags {
            Flags::Old => matches!(kind, OrcKind::Regs | OrcKind::RegsPartial),
            Flags::Signal => flags & 4 != 0,
            Flags::Typed => flags & 8 != 0,
        };
        Self {
            sp_reg,
            sp_offset: offset(0),
            bp_reg: OrcReg::from_number(format.numbers, regs >> 4),
            bp_offset: offset(2),
            kind,
            signal,
        }
    }
}

impl fmt::Display for OrcEntry {
    /// As objtool dumps it: `type:call sp:sp+48 bp:prevsp-16 signal:0`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            OrcKind::Undefined => return write!(f, "type:(und)"),
            OrcKind::EndOfStack => return write!(f, "type:end"),
            OrcKind::Call => write!(f, "type:call")?,
            OrcKind::Regs => write!(f, "type:regs")?,
            OrcKind::RegsPartial => write!(f, "type:regs (partial)")?,
            OrcKind::Unknown(kind) => write!(f, "type:{kind}?")?,
        }
        write!(f, " sp:{}{:+}", self.sp_reg.name(), self.sp_offset)?;
        match self.bp_reg {
            OrcReg::Undefined => {}
            reg => write!(f, " bp:{}{:+}", reg.name(), self.bp_offset)?,
        }
        write!(f, " signal:{}", u8::from(self.signal))
    }
}

/// The index of the row that covers `pc` in `ips`, the bytes of a part of `.orc_unwind_ip` that lies at the run-time
/// address `ips_at`: the last row that begins at or before `pc`. `None` if all begin behind.
pub fn find(ips: &[u8], ips_at: u64, pc: u64) -> Option<usize> {
    let (mut low, mut high) = (0, ips.len() / IP_SIZE);
    // Of rows at one address the last one counts, as in the kernel.
    while low < high {
        let middle = low + (high - low) / 2;
        if address(ips, ips_at, middle)? <= pc {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low.checked_sub(1)
}

/// The address that element `index` of `ips` stands for.
fn address(ips: &[u8], ips_at: u64, index: usize) -> Option<u64> {
    let at = index.checked_mul(IP_SIZE)?;
    let relative = u32_at(ips, at)? as i32;
    Some(ips_at.wrapping_add(at as u64).wrapping_add_signed(relative.into()))
}

/// A whole table in memory: a module's.
pub struct OrcTable {
    ips_at: u64,
    ips: Vec<u8>,
    rows: Vec<u8>,
    format: Format,
}

impl OrcTable {
    /// From the bytes of `.orc_unwind_ip`, which lies at the run-time address `ips_at`, and of `.orc_unwind`.
    pub fn new(format: Format, ips_at: u64, ips: Vec<u8>, rows: Vec<u8>) -> Self {
        Self { ips_at, ips, rows, format }
    }

    /// The row that covers the run-time address `pc`.
    pub fn row(&self, pc: u64) -> Option<OrcEntry> {
        let index = find(&self.ips, self.ips_at, pc)?;
        let row = array_at(&self.rows, index.checked_mul(ENTRY_SIZE)?)?;
        Some(OrcEntry::decode(self.format, row))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn row(sp: i16, bp: i16, regs: u8, flags: u8) -> [u8; 6] {
        let ([a, b], [c, d]) = (sp.to_le_bytes(), bp.to_le_bytes());
        [a, b, c, d, regs, flags]
    }

    const TYPED: Format = Format { flags: Flags::Typed, numbers: Numbers::Old };

    /// The bits are those of the bit-fields in the headers of v5.10, v6.3 and v6.12.
    #[test]
    fn three_formats_of_the_same_rows() {
        let shown = |flags, sp, bp, regs, bits| {
            let format = Format { flags, numbers: Numbers::Old };
            OrcEntry::decode(format, row(sp, bp, regs, bits)).to_string()
        };
        assert_eq!(shown(Flags::Old, 16, -16, 0x15, 0), "type:call sp:sp+16 bp:prevsp-16 signal:0");
        assert_eq!(shown(Flags::Signal, 16, -16, 0x15, 0), "type:call sp:sp+16 bp:prevsp-16 signal:0");
        assert_eq!(shown(Flags::Typed, 16, -16, 0x15, 2), "type:call sp:sp+16 bp:prevsp-16 signal:0");
        assert_eq!(shown(Flags::Old, 0, 0, 0x05, 1), "type:regs sp:sp+0 signal:1");
        assert_eq!(shown(Flags::Signal, 0, 0, 0x05, 5), "type:regs sp:sp+0 signal:1");
        assert_eq!(shown(Flags::Typed, 0, 0, 0x05, 11), "type:regs sp:sp+0 signal:1");
        assert_eq!(shown(Flags::Old, 8, 0, 0x05, 2), "type:regs (partial) sp:sp+8 signal:1");
        assert_eq!(shown(Flags::Signal, 8, 0, 0x05, 2), "type:regs (partial) sp:sp+8 signal:0");
        assert_eq!(shown(Flags::Typed, 8, 0, 0x05, 12), "type:regs (partial) sp:sp+8 signal:1");
        assert_eq!(shown(Flags::Old, 0, 0, 0, 4), "type:end");
        assert_eq!(shown(Flags::Old, 0, 0, 0, 0), "type:(und)");
        assert_eq!(shown(Flags::Signal, 0, 0, 0, 8), "type:end");
        assert_eq!(shown(Flags::Signal, 0, 0, 0, 0), "type:(und)");
        assert_eq!(shown(Flags::Typed, 0, 0, 0, 1), "type:end");
        assert_eq!(shown(Flags::Typed, 0, 0, 0, 0), "type:(und)");
        assert_eq!(shown(Flags::Typed, 8, -8, 0x49, 2), "type:call sp:(sp)+8 bp:bp-8 signal:0");
        assert_eq!(shown(Flags::Typed, -8, 0, 0x08, 2), "type:call sp:(bp)-8 signal:0");
        assert_eq!(shown(Flags::Typed, 0, 0, 0x0f, 7), "type:7? sp:?+0 signal:0");
    }

    /// Numbers of the header in v7.3.
    #[test]
    fn registers_were_numbered_anew() {
        let format = Format { flags: Flags::Typed, numbers: Numbers::New };
        let shown = |sp, bp, regs, bits| OrcEntry::decode(format, row(sp, bp, regs, bits)).to_string();
        assert_eq!(shown(16, -16, 0x83, 2), "type:call sp:sp+16 bp:prevsp-16 signal:0");
        assert_eq!(shown(8, 0, 0x09, 2), "type:call sp:(sp)+8 signal:0");
        assert_eq!(shown(-8, -8, 0x4a, 2), "type:call sp:(bp)-8 bp:bp-8 signal:0");
        let table =
            |reg: u8| (0..4).flat_map(|_| row(8, 0, reg, 2)).chain(row(8, 0, 4, 2)).collect::<Vec<_>>();
        assert_eq!(Format::tell(true, &table(0x83)), format);
        assert_eq!(Format::tell(true, &table(0x15)), TYPED);
    }

    #[test]
    fn the_format_is_told_by_header_and_rows() {
        let table = |flags: &[u8]| flags.iter().flat_map(|&flags| row(8, 0, 5, flags)).collect::<Vec<_>>();
        assert_eq!(Format::tell(true, &[]).flags, Flags::Typed);
        assert_eq!(Format::tell(false, &table(&[2, 2, 11, 12, 1, 2])).flags, Flags::Typed);
        assert_eq!(Format::tell(false, &table(&[0, 0, 2, 5, 8, 0])).flags, Flags::Signal);
        assert_eq!(Format::tell(false, &table(&[0, 0, 1, 2, 4, 0])).flags, Flags::Old);
    }

    #[test]
    fn the_last_row_at_or_before_an_address() {
        let ips_at = 0xffff_ffff_8200_0000u64;
        let code =
            [0xffff_ffff_8100_0000u64, 0xffff_ffff_8100_0010, 0xffff_ffff_8100_0010, 0xffff_ffff_8100_0020];
        let mut ips = Vec::new();
        for (at, code) in (ips_at..).step_by(4).zip(code) {
            ips.extend((code.wrapping_sub(at) as i32).to_le_bytes());
        }
        let found = |pc| find(&ips, ips_at, pc);
        assert_eq!(found(0xffff_ffff_80ff_ffff), None);
        assert_eq!(found(0xffff_ffff_8100_000f), Some(0));
        assert_eq!(found(0xffff_ffff_8100_0010), Some(2));
        assert_eq!(found(u64::MAX), Some(3));
        assert_eq!(find(&ips[..ips.len() - 1], ips_at, u64::MAX), Some(2), "a cut last element is none");
        let rows = (0..4).flat_map(|i| row(i, 0, 5, 2)).collect();
        let table = OrcTable::new(TYPED, ips_at, ips, rows);
        assert_eq!(table.row(0xffff_ffff_8100_0011).map(|row| row.sp_offset), Some(2));
    }
}
