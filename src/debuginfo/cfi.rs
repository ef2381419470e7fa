//! DWARF call frame information: how to find a function's caller, for code that ORC does not cover.
//!
//! Gives the rules of an address as values; applies none. Rules that are expressions are said to be unknown: compilers
//! emit none for the kernel's code. Source: the DWARF standard, version 5, section 6.4; the System V ABI for x86-64,
//! figure 3.36 (register numbers).

use super::Error;
use super::vmlinux::DebugInfo;
use gimli::{
    BaseAddresses, CfaRule, CieOrFde, DebugFrame, EhFrame, EndianSlice, LittleEndian, RegisterRule,
    UnwindContext, UnwindSection,
};
use std::fmt;

/// Frame descriptions looked at; a kernel has some hundred thousand functions.
const FDES_MAX: usize = 4 << 20;
/// The return address, as a register.
const RETURN_ADDRESS: u16 = 16;
/// `rsp`
pub const SP: u16 = 7;

/// DWARF's names of the registers by number.
pub const NAMES: [&str; 17] = [
    "rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15", "ra",
];

/// Where a caller's register is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// Nowhere.
    Undefined,
    /// Still in the register.
    Same,
    /// In memory, so many bytes from the canonical frame address.
    Saved(i64),
    /// It is the canonical frame address and so many bytes.
    Is(i64),
    /// In the register of this number.
    In(u16),
    /// Told by an expression, which is not evaluated.
    Expression,
}

/// The rules of one address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CfiRow {
    /// The canonical frame address: a register's number and what is added to it. `None` for an expression.
    pub cfa: Option<(u16, i64)>,
    /// Rules by register number, as far as there are any; what a call keeps is otherwise the same.
    pub rules: Vec<(u16, Rule)>,
    /// Whether the caller was interrupted (augmentation `S`).
    pub signal: bool,
}

impl CfiRow {
    /// Where the return address is.
    pub fn return_address(&self) -> Rule {
        self.rule(RETURN_ADDRESS).unwrap_or(Rule::Undefined)
    }

    /// The rule of a register.
    pub fn rule(&self, register: u16) -> Option<Rule> {
        self.rules.iter().find(|(number, _)| *number == register).map(|(_, rule)| *rule)
    }
}

impl fmt::Display for CfiRow {
    /// `cfa:rsp+16 rbp:cfa-16 ra:cfa-8`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |number: u16| NAMES.get(usize::from(number)).copied().unwrap_or("?");
        match self.cfa {
            Some((register, offset)) => write!(f, "cfa:{}{offset:+}", name(register))?,
            None => write!(f, "cfa:(expression)")?,
        }
        for (number, rule) in &self.rules {
            write!(f, " {}:", name(*number))?;
            match rule {
                Rule::Undefined => write!(f, "(und)")?,
                Rule::Same => write!(f, "same")?,
                Rule::Saved(offset) => write!(f, "cfa{offset:+}")?,
                Rule::Is(offset) => write!(f, "=cfa{offset:+}")?,
                Rule::In(register) => write!(f, "{}", name(*register))?,
                Rule::Expression => write!(f, "(expression)")?,
            }
        }
        if self.signal { write!(f, " signal") } else { Ok(()) }
    }
}

/// The call frame information of one file, or of a part of memory.
pub struct CallFrames {
    bytes: Vec<u8>,
    kind: Kind,
    /// Address of the section's first byte.
    at: u64,
    /// Start and end of each described stretch of code, and the offset of its description; by start.
    index: Vec<(u64, u64, usize)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Eh,
    Debug,
}

type Slice<'a> = EndianSlice<'a, LittleEndian>;

impl CallFrames {
    /// From the bytes of `.debug_frame`.
    pub fn from_debug_frame(bytes: Vec<u8>) -> Self {
        Self::new(bytes, Kind::Debug, 0)
    }

    /// From the bytes of `.eh_frame`, the first of which is at the address `at`.
    pub fn from_eh_frame(bytes: Vec<u8>, at: u64) -> Self {
        Self::new(bytes, Kind::Eh, at)
    }

    /// What `info` has of them; `None` if nothing.
    pub fn of(info: &DebugInfo) -> Result<Option<Self>, Error> {
        let some = |frames: Self| Some(frames).filter(|frames| !frames.index.is_empty());
        if let Some(frames) = info.section(".debug_frame")?.map(Self::from_debug_frame).and_then(some) {
            return Ok(Some(frames));
        }
        let at = info.section_address(".eh_frame");
        Ok(info.section(".eh_frame")?.map(|bytes| Self::from_eh_frame(bytes, at)).and_then(some))
    }

    fn new(bytes: Vec<u8>, kind: Kind, at: u64) -> Self {
        let mut frames = Self { bytes, kind, at, index: Vec::new() };
        frames.index = match kind {
            Kind::Debug => index(&frames.debug(), &frames.bases()),
            Kind::Eh => index(&frames.eh(), &frames.bases()),
        };
        frames
    }

    fn bases(&self) -> BaseAddresses {
        BaseAddresses::default().set_eh_frame(self.at)
    }

    fn debug(&self) -> DebugFrame<Slice<'_>> {
        let mut section = DebugFrame::new(&self.bytes, LittleEndian);
        section.set_address_size(8);
        section
    }

    fn eh(&self) -> EhFrame<Slice<'_>> {
        let mut section = EhFrame::new(&self.bytes, LittleEndian);
        section.set_address_size(8);
        section
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The rules of the address `pc`.
    pub fn row(&self, pc: u64) -> Option<CfiRow> {
        let after = self.index.partition_point(|(start, ..)| *start <= pc);
        let &(_, end, offset) = self.index.get(after.checked_sub(1)?)?;
        if pc >= end {
            return None;
        }
        match self.kind {
            Kind::Debug => row(&self.debug(), &self.bases(), offset.into(), pc),
            Kind::Eh => row(&self.eh(), &self.bases(), offset.into(), pc),
        }
    }
}

fn index<'a, S: UnwindSection<Slice<'a>>>(section: &S, bases: &BaseAddresses) -> Vec<(u64, u64, usize)> {
    let mut index = Vec::new();
    let mut entries = section.entries(bases);
    // A damaged entry ends it: where the next one begins is then not known.
    while let Ok(Some(entry)) = entries.next()
        && index.len() < FDES_MAX
    {
        let CieOrFde::Fde(partial) = entry else { continue };
        let Ok(fde) = partial.parse(|section, bases, offset| section.cie_from_offset(bases, offset)) else {
            continue;
        };
        let start = fde.initial_address();
        if start != 0 && fde.len() != 0 {
            index.push((start, start.saturating_add(fde.len()), fde.offset()));
        }
    }
    index.sort_unstable();
    index
}

fn row<'a, S: UnwindSection<Slice<'a>>>(
    section: &S,
    bases: &BaseAddresses,
    offset: S::Offset,
    pc: u64,
) -> Option<CfiRow> {
    let fde = section
        .fde_from_offset(bases, offset, |section, bases, offset| section.cie_from_offset(bases, offset));
    let fde = fde.ok()?;
    let mut context = UnwindContext::new();
    let row = fde.unwind_info_for_address(section, bases, &mut context, pc).ok()?;
    let cfa = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => Some((register.0, *offset)),
        CfaRule::Expression(_) => None,
    };
    let rule = |rule: &RegisterRule<usize>| match rule {
        RegisterRule::SameValue => Rule::Same,
        RegisterRule::Offset(offset) => Rule::Saved(*offset),
        RegisterRule::ValOffset(offset) => Rule::Is(*offset),
        RegisterRule::Register(register) => Rule::In(register.0),
        RegisterRule::Expression(_) | RegisterRule::ValExpression(_) => Rule::Expression,
        _ => Rule::Undefined,
    };
    let mut rules: Vec<_> = row.registers().map(|(register, how)| (register.0, rule(how))).collect();
    rules.sort_by_key(|(register, _)| *register);
    Some(CfiRow { cfa, rules, signal: fde.is_signal_trampoline() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// One CIE and one FDE as the System V ABI lays them out: `push %rbp` at 0x1000, its effect at 0x1001.
    fn debug_frame() -> Vec<u8> {
        let cie: &[u8] = &[
            0xff, 0xff, 0xff, 0xff, // CIE_id
            1, 0, 1, 0x78, 16, // version, augmentation "", code 1, data -8, return address 16
            0x0c, 7, 8, // DW_CFA_def_cfa rsp+8
            0x90, 1, // DW_CFA_offset ra, cfa-8
            0, 0, // DW_CFA_nop
        ];
        let mut fde = vec![0, 0, 0, 0];
        fde.extend(0x1000u64.to_le_bytes());
        fde.extend(0x40u64.to_le_bytes());
        // DW_CFA_advance_loc 1, def_cfa_offset 16, offset rbp at cfa-16, nops
        fde.extend([0x41, 0x0e, 16, 0x86, 2, 0, 0]);
        let mut bytes = Vec::new();
        for entry in [cie, &fde] {
            bytes.extend((entry.len() as u32).to_le_bytes());
            bytes.extend(entry);
        }
        bytes
    }

    #[test]
    fn rules_by_address() {
        let frames = CallFrames::from_debug_frame(debug_frame());
        let shown = |pc| frames.row(pc).map(|row| row.to_string());
        assert_eq!(shown(0xfff), None);
        assert_eq!(shown(0x1000).as_deref(), Some("cfa:rsp+8 ra:cfa-8"));
        assert_eq!(shown(0x1001).as_deref(), Some("cfa:rsp+16 rbp:cfa-16 ra:cfa-8"));
        assert_eq!(shown(0x1040), None);
    }

    #[test]
    fn damage_is_no_row() {
        let whole = debug_frame();
        for end in 0..whole.len() {
            let frames = CallFrames::from_debug_frame(whole[..end].to_vec());
            frames.row(0x1001);
        }
        for at in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            CallFrames::from_debug_frame(bytes.clone()).row(0x1001);
            CallFrames::from_eh_frame(bytes, 0x2000).row(0x1001);
        }
    }
}
