//! Writes `.debug_frame`: call frame information for code of which the compiler wrote none, made of ORC rows.
//!
//! Knows DWARF's rules and the layout of `struct pt_regs`; what code they are for, the caller knows. Frames that
//! interrupted something are marked as signal frames: gdb then takes the next frame's pc for the instruction itself,
//! and lets the stack go where it wants. (gimli's writer makes no `.debug_frame` with signal frames.)
//! Source: DWARF 5, 6.4 and 7.24; System V ABI for x86-64, table 3.36 (register numbers); gdb `dwarf2/frame.c`.

use super::orc::{OrcEntry, OrcKind, OrcReg};

/// DWARF's numbers of registers.
const RBP: u8 = 6;
const RSP: u8 = 7;
const RETURN_ADDRESS: u8 = 16;
/// Registers in a `struct pt_regs` by DWARF's number: index of the word.
const PT_REGS: [(u8, u64); 15] = [
    (15, 0),
    (14, 1),
    (13, 2),
    (12, 3),
    (RBP, 4),
    (3, 5),
    (11, 6),
    (10, 7),
    (9, 8),
    (8, 9),
    (0, 10),
    (2, 11),
    (1, 12),
    (4, 13),
    (5, 14),
];
/// Offset of `ip` in a `struct pt_regs`.
const PT_REGS_IP: i64 = 128;
/// Offset of `sp` from `ip`, and of `cs`.
const IP_TO_SP: i64 = 24;
const IP_TO_CS: i64 = 8;

const DW_CFA_UNDEFINED: u8 = 0x07;
const DW_CFA_DEF_CFA: u8 = 0x0c;
const DW_CFA_DEF_CFA_EXPRESSION: u8 = 0x0f;
const DW_CFA_EXPRESSION: u8 = 0x10;
const DW_CFA_VAL_EXPRESSION: u8 = 0x16;
const DW_OP_ADDR: u8 = 0x03;
const DW_OP_DEREF: u8 = 0x06;
const DW_OP_AND: u8 = 0x1a;
const DW_OP_PLUS: u8 = 0x22;
const DW_OP_BRA: u8 = 0x28;
const DW_OP_SKIP: u8 = 0x2f;
const DW_OP_LIT0: u8 = 0x30;
const DW_OP_BREG0: u8 = 0x70;
const DW_OP_CONSTS: u8 = 0x11;

/// No caller; the frame's own address must be known all the same, or gdb 13 aborts.
const END: [u8; 5] = [DW_CFA_DEF_CFA, RSP, 0, DW_CFA_UNDEFINED, RETURN_ADDRESS];

/// How the caller of a stretch of code is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// By this row.
    Orc(OrcEntry),
    /// `rsp` points at the `ip` of saved registers; the others have the interrupted code's values already.
    Interrupted,
    /// There is no caller.
    End,
}

/// The section, piece by piece.
pub struct Writer {
    bytes: Vec<u8>,
    /// What the code of a user is shown as.
    user: u64,
}

impl Writer {
    /// For a relocatable file, which has no relocations left: gdb takes its addresses as they are. A user's code is given
    /// out for the code at `user`: gdb would have nothing to go by there.
    pub fn new(user: u64) -> Self {
        let mut writer = Self { bytes: Vec::new(), user };
        writer.common(b"\0");
        writer.common(b"S\0");
        writer
    }

    /// What all frames of a kind have in common.
    fn common(&mut self, augmentation: &[u8]) {
        let mut body = u32::MAX.to_le_bytes().to_vec();
        body.push(1);
        body.extend_from_slice(augmentation);
        // Code and data alignment 1 and -8, and the column of the return address.
        body.extend([1, 0x78, RETURN_ADDRESS]);
        self.entry(body);
    }

    fn entry(&mut self, mut body: Vec<u8>) {
        // Padded with DW_CFA_nop.
        body.resize((body.len() + 4).next_multiple_of(8) + 4, 0);
        self.bytes.extend((body.len() as u32).to_le_bytes());
        self.bytes.extend(body);
    }

    /// The code of `length` bytes at the run-time address `from` has this rule. Nothing is written of a row that no
    /// rule can say.
    pub fn add(&mut self, from: u64, length: u64, rule: Rule) {
        let Some((signal, rules)) = self.rules(rule) else { return };
        let common: u32 = if signal { self.second() } else { 0 };
        let mut body = common.to_le_bytes().to_vec();
        body.extend(from.to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(rules);
        self.entry(body);
    }

    /// Where the second common entry is: behind the first.
    fn second(&self) -> u32 {
        let length = self.bytes.first_chunk().map_or(0, |length| u32::from_le_bytes(*length));
        length.saturating_add(4)
    }

    /// The section.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }

    /// Whether it is a signal frame, and its instructions.
    fn rules(&self, rule: Rule) -> Option<(bool, Vec<u8>)> {
        let row = match rule {
            Rule::End => return Some((false, END.to_vec())),
            Rule::Interrupted => return Some((true, self.interrupted(register(RSP, 0), None))),
            Rule::Orc(row) => row,
        };
        let offset = i64::from(row.sp_offset);
        let base = match row.sp_reg {
            OrcReg::Sp => register(RSP, offset),
            OrcReg::Bp => register(RBP, offset),
            OrcReg::Ax => register(0, offset),
            OrcReg::Dx => register(1, offset),
            OrcReg::Di => register(5, offset),
            OrcReg::R10 => register(10, offset),
            OrcReg::R13 => register(13, offset),
            OrcReg::SpIndirect => [register(RSP, 0), vec![DW_OP_DEREF], added(offset)].concat(),
            OrcReg::BpIndirect => [register(RBP, offset), vec![DW_OP_DEREF]].concat(),
            OrcReg::Undefined | OrcReg::PrevSp | OrcReg::Unknown => Vec::new(),
        };
        let needs_base = matches!(row.kind, OrcKind::Call | OrcKind::Regs | OrcKind::RegsPartial);
        if base.is_empty() && needs_base {
            return None;
        }
        Some(match row.kind {
            OrcKind::Undefined | OrcKind::Unknown(_) => return None,
            OrcKind::EndOfStack => (false, END.to_vec()),
            OrcKind::Regs => (true, self.interrupted([base.clone(), added(PT_REGS_IP)].concat(), Some(base))),
            OrcKind::RegsPartial => (true, self.interrupted(base, None)),
            OrcKind::Call => {
                let mut rules = block(&[DW_CFA_DEF_CFA_EXPRESSION], &base);
                let return_address = [base.clone(), added(-8)].concat();
                rules.extend(block(&[DW_CFA_EXPRESSION, RETURN_ADDRESS], &return_address));
                let bp = match row.bp_reg {
                    OrcReg::PrevSp => Some([base, added(row.bp_offset.into())].concat()),
                    OrcReg::Bp => Some(register(RBP, row.bp_offset.into())),
                    _ => None,
                };
                rules.extend(bp.map(|bp| block(&[DW_CFA_EXPRESSION, RBP], &bp)).into_iter().flatten());
                (row.signal, rules)
            }
        })
    }

    /// Registers that were saved: `ip` is an expression for where their `ip` is, `all` for where a whole `pt_regs` is.
    fn interrupted(&self, ip: Vec<u8>, all: Option<Vec<u8>>) -> Vec<u8> {
        let sp = [ip.clone(), added(IP_TO_SP), vec![DW_OP_DEREF]].concat();
        let mut rules = block(&[DW_CFA_DEF_CFA_EXPRESSION], &sp);
        // ip if the last two bits of cs are clear, else the stand-in for user mode.
        let kernel = [ip.clone(), vec![DW_OP_DEREF]].concat();
        let mut pc = [ip, added(IP_TO_CS), vec![DW_OP_DEREF, DW_OP_LIT0 + 3, DW_OP_AND, DW_OP_BRA]].concat();
        pc.extend((kernel.len() as i16 + 3).to_le_bytes());
        pc.extend(kernel);
        pc.push(DW_OP_SKIP);
        pc.extend(9i16.to_le_bytes());
        pc.push(DW_OP_ADDR);
        pc.extend(self.user.to_le_bytes());
        rules.extend(block(&[DW_CFA_VAL_EXPRESSION, RETURN_ADDRESS], &pc));
        for (register, index) in all.iter().flat_map(|_| PT_REGS) {
            let at = [all.clone().unwrap_or_default(), added(index as i64 * 8)].concat();
            rules.extend(block(&[DW_CFA_EXPRESSION, register], &at));
        }
        rules
    }
}

/// The value of a register and an offset.
fn register(number: u8, offset: i64) -> Vec<u8> {
    let mut expression = vec![DW_OP_BREG0 + number];
    signed(offset, &mut expression);
    expression
}

/// What is on top of the stack, and `offset`.
fn added(offset: i64) -> Vec<u8> {
    let mut expression = vec![DW_OP_CONSTS];
    signed(offset, &mut expression);
    expression.push(DW_OP_PLUS);
    expression
}

/// An instruction with an expression: its length in LEB128 first.
fn block(instruction: &[u8], expression: &[u8]) -> Vec<u8> {
    let mut bytes = instruction.to_vec();
    let mut length = expression.len();
    loop {
        let low = (length & 0x7f) as u8;
        length >>= 7;
        bytes.push(if length == 0 { low } else { low | 0x80 });
        if length == 0 {
            break;
        }
    }
    bytes.extend_from_slice(expression);
    bytes
}

/// Signed LEB128.
fn signed(mut value: i64, out: &mut Vec<u8>) {
    loop {
        let low = (value & 0x7f) as u8;
        value >>= 7;
        let done = value == 0 && low & 0x40 == 0 || value == -1 && low & 0x40 != 0;
        out.push(if done { low } else { low | 0x80 });
        if done {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use gimli::{CfaRule, DebugFrame, LittleEndian, RegisterRule, UnwindContext, UnwindSection};

    const CALL: OrcEntry = OrcEntry {
        sp_reg: OrcReg::Sp,
        sp_offset: 16,
        bp_reg: OrcReg::PrevSp,
        bp_offset: -16,
        kind: OrcKind::Call,
        signal: false,
    };

    #[test]
    fn another_reader_finds_the_rows() {
        let base = 0xffff_ffff_7fff_f000;
        let mut writer = Writer::new(base + 16);
        writer.add(0xffff_ffff_8100_0000, 0x10, Rule::Orc(CALL));
        writer.add(0xffff_ffff_8100_0010, 0x10, Rule::Orc(OrcEntry { kind: OrcKind::Regs, ..CALL }));
        writer.add(base, 16, Rule::Interrupted);
        writer.add(base + 16, 16, Rule::End);
        writer.add(base + 32, 16, Rule::Orc(OrcEntry { kind: OrcKind::Undefined, ..CALL }));
        let bytes = writer.finish();
        let mut section = DebugFrame::new(&bytes, LittleEndian);
        section.set_address_size(8);
        let bases = gimli::BaseAddresses::default();
        let row = |at: u64| {
            let entry = section.fde_for_address(&bases, at, DebugFrame::cie_from_offset).ok()?;
            let mut context = UnwindContext::new();
            let row = entry.unwind_info_for_address(&section, &bases, &mut context, at).unwrap();
            Some((entry.cie().is_signal_trampoline(), row.clone()))
        };
        let (signal, call) = row(0xffff_ffff_8100_000f).unwrap();
        assert!(!signal && matches!(call.cfa(), CfaRule::Expression(_)));
        assert!(matches!(call.register(gimli::Register(6)), Some(RegisterRule::Expression(_))));
        assert!(row(0xffff_ffff_8100_0020).is_none());
        let (signal, regs) = row(0xffff_ffff_8100_0010).unwrap();
        assert!(signal && matches!(regs.register(gimli::Register(15)), Some(RegisterRule::Expression(_))));
        let (signal, saved) = row(base).unwrap();
        assert!(
            signal && matches!(saved.register(gimli::Register(16)), Some(RegisterRule::ValExpression(_)))
        );
        assert!(saved.register(gimli::Register(15)).is_none());
        let (_, end) = row(base + 16).unwrap();
        assert_eq!(end.register(gimli::Register(16)), Some(RegisterRule::Undefined));
        assert!(row(base + 32).is_none());
    }

    #[test]
    fn numbers_are_as_dwarf_writes_them() {
        let leb = |value| {
            let mut bytes = Vec::new();
            signed(value, &mut bytes);
            bytes
        };
        // DWARF 5, table 7.8.
        assert_eq!(leb(2), [2]);
        assert_eq!(leb(-2), [0x7e]);
        assert_eq!(leb(127), [0xff, 0]);
        assert_eq!(leb(-129), [0xff, 0x7e]);
    }
}
