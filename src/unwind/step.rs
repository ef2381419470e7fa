//! The step from a frame to its caller, or to what it interrupted.
//!
//! Source: `arch/x86/kernel/unwind_orc.c` (`unwind_next_frame`), DWARF version 5 section 6.4.

use super::{Frame, FrameSource, PT_REGS_SIZE, PtRegs, Regs, Stack, Tables, Why};
use crate::arch::x86_64::Reg;
use crate::arch::x86_64::disasm::Pushed;
use crate::debuginfo::cfi::{self, CfiRow, Rule};
use crate::debuginfo::orc::{OrcEntry, OrcKind, OrcReg};
use std::fmt;

/// `offsetof(struct pt_regs, ip)` and on: what the processor pushes, five words.
const IRET_FRAME_SIZE: u64 = 5 * 8;

/// DWARF's numbers.
const DWARF: [Reg; 16] = {
    use Reg::*;
    [Rax, Rdx, Rcx, Rbx, Rsi, Rdi, Rbp, Rsp, R8, R9, R10, R11, R12, R13, R14, R15]
};
/// What a called function gives back as it was.
const KEPT_BY_CALLS: [Reg; 6] = [Reg::Rbx, Reg::Rbp, Reg::R12, Reg::R13, Reg::R14, Reg::R15];

/// Where a step led.
#[derive(Clone, PartialEq, Debug)]
pub enum Step {
    /// The function that called.
    Caller(Frame),
    /// Registers were saved here: of what was interrupted, or of the user.
    Saved(PtRegs, OrcEntry),
    /// The table says that there is no caller.
    End(OrcEntry),
}

/// Why there was no step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoStep {
    /// No table covers the code.
    NoRow,
    /// The table says that it cannot be unwound.
    Undefined,
    /// The row needs a register whose value is not known: its name.
    Register(&'static str),
    /// The row needs the word at this address, which is on no stack or cannot be read.
    Memory(u64),
    /// The row makes no sense.
    Row,
}

impl fmt::Display for NoStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRow => write!(f, "no unwind table covers this code"),
            Self::Undefined => write!(f, "the unwind table says that this code cannot be unwound"),
            Self::Register(name) => write!(f, "the unwind table needs {name}, which is not known here"),
            Self::Memory(at) => write!(f, "the word at {at:#x} is on no known stack or cannot be read"),
            Self::Row => write!(f, "the unwind table's row makes no sense"),
        }
    }
}

/// One step from `frame` by the tables: ORC, or else call frame information. Sets `frame.cfa`.
pub fn step(frame: &mut Frame, tables: &dyn Tables, stack: &dyn Stack) -> Result<Step, NoStep> {
    let pc = frame.lookup_pc();
    if let Some(row) = tables.orc(pc) {
        return by_orc(frame, row, stack);
    }
    by_call_frames(frame, tables, stack)
}

/// One step by call frame information alone.
pub fn by_call_frames(frame: &mut Frame, tables: &dyn Tables, stack: &dyn Stack) -> Result<Step, NoStep> {
    match tables.cfi(frame.lookup_pc()) {
        Some(row) => by_cfi(frame, row, stack),
        None => Err(NoStep::NoRow),
    }
}

fn by_orc(frame: &mut Frame, row: OrcEntry, stack: &dyn Stack) -> Result<Step, NoStep> {
    match row.kind {
        OrcKind::Undefined => return Err(NoStep::Undefined),
        OrcKind::EndOfStack => return Ok(Step::End(row)),
        OrcKind::Unknown(_) => return Err(NoStep::Row),
        OrcKind::Call | OrcKind::Regs | OrcKind::RegsPartial => {}
    }
    let word = |at: u64| stack.word(at).ok_or(NoStep::Memory(at));
    let reg = |reg: Reg| frame.regs.get(reg).ok_or(NoStep::Register(reg.name()));
    let plus = |base: u64| base.wrapping_add_signed(row.sp_offset.into());
    let there = match row.sp_reg {
        OrcReg::Sp => plus(frame.sp),
        OrcReg::Bp => plus(reg(Reg::Rbp)?),
        OrcReg::R10 => plus(reg(Reg::R10)?),
        OrcReg::R13 => plus(reg(Reg::R13)?),
        OrcReg::Di => plus(reg(Reg::Rdi)?),
        OrcReg::Ax => plus(reg(Reg::Rax)?),
        OrcReg::Dx => plus(reg(Reg::Rdx)?),
        OrcReg::BpIndirect => word(plus(reg(Reg::Rbp)?))?,
        // Since Linux commit 87ccc826bf1c ("x86/unwind/orc: Change REG_SP_INDIRECT") (in v5.12); kernels before
        // have no such row (5.10).
        OrcReg::SpIndirect => plus(word(frame.sp)?),
        OrcReg::Undefined | OrcReg::PrevSp | OrcReg::Unknown => return Err(NoStep::Row),
    };
    match row.kind {
        OrcKind::Regs => {
            let saved = PtRegs::read(stack, there, false).ok_or(NoStep::Memory(there))?;
            frame.cfa = Some(there.wrapping_add(PT_REGS_SIZE));
            return Ok(Step::Saved(saved, row));
        }
        OrcKind::RegsPartial => {
            let at = there.wrapping_sub(PT_REGS_SIZE - IRET_FRAME_SIZE);
            let mut saved = PtRegs::read(stack, at, true).ok_or(NoStep::Memory(there))?;
            // The entry code that runs before all of them are saved has not changed them.
            for (reg, value) in frame.regs.known() {
                let pushed = matches!(reg, Reg::Rip | Reg::Rsp | Reg::Cs | Reg::Ss | Reg::Eflags);
                if !pushed && (frame.exact || KEPT_BY_CALLS.contains(&reg)) {
                    saved.regs.set(reg, value);
                }
            }
            frame.cfa = Some(there.wrapping_add(IRET_FRAME_SIZE));
            return Ok(Step::Saved(saved, row));
        }
        _ => {}
    }
    let pc_at = there.wrapping_sub(8);
    let pc = word(pc_at)?;
    let mut regs = Regs::default();
    let bp = match row.bp_reg {
        // The frame has not touched it.
        OrcReg::Undefined => frame.regs.get(Reg::Rbp),
        OrcReg::PrevSp => stack.word(there.wrapping_add_signed(row.bp_offset.into())),
        OrcReg::Bp => {
            let bp = frame.regs.get(Reg::Rbp);
            bp.and_then(|bp| stack.word(bp.wrapping_add_signed(row.bp_offset.into())))
        }
        _ => None,
    };
    if let Some(bp) = bp {
        regs.set(Reg::Rbp, bp);
    }
    Ok(Step::Caller(caller(frame, (pc, pc_at, there), regs, FrameSource::Orc, (Why::Orc(row), row.signal))))
}

fn by_cfi(frame: &mut Frame, row: CfiRow, stack: &dyn Stack) -> Result<Step, NoStep> {
    let value = |number: u16| match number {
        cfi::SP => Some(frame.sp),
        number => DWARF.get(usize::from(number)).and_then(|reg| frame.regs.get(*reg)),
    };
    let name = |number: u16| cfi::NAMES.get(usize::from(number)).copied().unwrap_or("?");
    let (base, offset) = row.cfa.ok_or(NoStep::Row)?;
    let cfa = value(base).ok_or(NoStep::Register(name(base)))?.wrapping_add_signed(offset);
    let Rule::Saved(offset) = row.return_address() else { return Err(NoStep::Undefined) };
    let pc_at = cfa.wrapping_add_signed(offset);
    let pc = stack.word(pc_at).ok_or(NoStep::Memory(pc_at))?;
    let mut regs = Regs::default();
    for (number, reg) in (0..).zip(DWARF) {
        let value = match row.rule(number) {
            None if KEPT_BY_CALLS.contains(&reg) => value(number),
            Some(Rule::Same) => value(number),
            Some(Rule::Saved(offset)) => stack.word(cfa.wrapping_add_signed(offset)),
            Some(Rule::Is(offset)) => Some(cfa.wrapping_add_signed(offset)),
            Some(Rule::In(other)) => value(other),
            _ => None,
        };
        if let Some(value) = value {
            regs.set(reg, value);
        }
    }
    let signal = row.signal;
    Ok(Step::Caller(caller(frame, (pc, pc_at, cfa), regs, FrameSource::Cfi, (Why::Cfi(row), signal))))
}

/// The caller by frame pointer: `rbp` points at the saved one, the return address is above. `None` if that is not on
/// the stack above `frame`, or no call leads there.
pub fn by_frame_pointer(frame: &mut Frame, tables: &dyn Tables, stack: &dyn Stack) -> Option<Step> {
    let bp = frame.regs.get(Reg::Rbp).filter(|bp| bp.is_multiple_of(8) && *bp >= frame.sp)?;
    let pc_at = bp.checked_add(8)?;
    let (saved, pc) = (stack.word(bp)?, stack.word(pc_at)?);
    tables.follows_call(pc).then_some(())?;
    let mut regs = Regs::default();
    regs.set(Reg::Rbp, saved);
    const WHY: &str = "rbp points at the caller's rbp and the return address";
    let place = (pc, pc_at, pc_at.wrapping_add(8));
    Some(Step::Caller(caller(frame, place, regs, FrameSource::FramePointer, (Why::Because(WHY), false))))
}

/// The caller of code that has pushed `pushed` words since it was called: `why` says what is known of it.
pub fn by_top_of_stack(
    frame: &mut Frame,
    pushed: u64,
    tables: &dyn Tables,
    stack: &dyn Stack,
    why: &'static str,
) -> Option<Step> {
    let pc_at = frame.sp.wrapping_add(pushed.wrapping_mul(8));
    let pc = stack.word(pc_at)?;
    tables.follows_call(pc).then_some(())?;
    let mut regs = Regs::default();
    for reg in KEPT_BY_CALLS {
        if let Some(value) = frame.regs.get(reg) {
            regs.set(reg, value);
        }
    }
    let place = (pc, pc_at, pc_at.wrapping_add(8));
    Some(Step::Caller(caller(frame, place, regs, FrameSource::TopOfStack, (Why::Because(why), false))))
}

/// The caller of a function, by what its own code has `pushed`.
pub fn by_own_code(frame: &mut Frame, pushed: &Pushed, stack: &dyn Stack) -> Option<Step> {
    let pc_at = frame.sp.wrapping_add(pushed.bytes);
    let pc = stack.word(pc_at)?;
    let mut regs = Regs::default();
    for reg in KEPT_BY_CALLS {
        let value = match pushed.saved.iter().find(|(saved, _)| *saved == reg) {
            Some((_, below)) => stack.word(pc_at.wrapping_sub(*below)),
            None => frame.regs.get(reg),
        };
        if let Some(value) = value {
            regs.set(reg, value);
        }
    }
    const WHY: &str =
        "what the function has pushed by its own code, up to a return address behind a call of it";
    let place = (pc, pc_at, pc_at.wrapping_add(8));
    Some(Step::Caller(caller(frame, place, regs, FrameSource::Code, (Why::Because(WHY), false))))
}

/// `place`: the caller's pc, where that was found, and the canonical frame address of `frame`.
fn caller(
    frame: &mut Frame,
    (pc, pc_at, cfa): (u64, u64, u64),
    mut regs: Regs,
    source: FrameSource,
    (why, exact): (Why, bool),
) -> Frame {
    frame.cfa = Some(cfa);
    regs.set(Reg::Rip, pc);
    regs.set(Reg::Rsp, cfa);
    Frame { pc, exact, pc_at: Some(pc_at), sp: cfa, cfa: None, regs, source, why, restored: None }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::debuginfo::orc::{Flags, Format, Numbers};
    use std::collections::HashMap;

    const TYPED: Format = Format { flags: Flags::Typed, numbers: Numbers::Old };

    #[derive(Default)]
    struct World {
        words: HashMap<u64, u64>,
        row: Option<OrcEntry>,
        cfi: Option<CfiRow>,
        calls: Vec<u64>,
    }

    impl Stack for World {
        fn word(&self, at: u64) -> Option<u64> {
            self.words.get(&at).copied()
        }
    }

    impl Tables for World {
        fn orc(&self, _: u64) -> Option<OrcEntry> {
            self.row
        }
        fn cfi(&self, _: u64) -> Option<CfiRow> {
            self.cfi.clone()
        }
        fn follows_call(&self, pc: u64) -> bool {
            self.calls.contains(&pc)
        }
    }

    /// Words that hold their own address, but for those given.
    fn world(row: Option<[u8; 6]>, given: &[(u64, u64)]) -> World {
        let mut words: HashMap<u64, u64> = (0x1000..0x2000).step_by(8).map(|at| (at, at)).collect();
        words.extend(given.iter().copied());
        World { words, row: row.map(|row| OrcEntry::decode(TYPED, row)), ..World::default() }
    }

    fn frame(sp: u64, bp: Option<u64>) -> Frame {
        let mut regs = Regs::default();
        regs.set(Reg::Rip, 0x9000);
        regs.set(Reg::Rsp, sp);
        if let Some(bp) = bp {
            regs.set(Reg::Rbp, bp);
        }
        Frame::first(regs, FrameSource::Registers, "a test").unwrap()
    }

    /// sp register 5 is rsp, 4 rbp, 8 (rbp), 9 (rsp); bp register 1 the caller's rsp; type 2 is a call.
    fn stepped(
        row: [u8; 6],
        given: &[(u64, u64)],
        bp: Option<u64>,
    ) -> Result<(u64, u64, Option<u64>), NoStep> {
        let world = world(Some(row), given);
        match step(&mut frame(0x1100, bp), &world, &world)? {
            Step::Caller(next) => Ok((next.pc, next.sp, next.regs.get(Reg::Rbp))),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn orc_rules_of_calls() {
        assert_eq!(stepped([0x20, 0, 0, 0, 0x05, 2], &[], Some(7)), Ok((0x1118, 0x1120, Some(7))));
        assert_eq!(stepped([0x20, 0, 0xf0, 0xff, 0x15, 2], &[], Some(7)), Ok((0x1118, 0x1120, Some(0x1110))));
        assert_eq!(
            stepped([0x10, 0, 0xf0, 0xff, 0x14, 2], &[], Some(0x1200)),
            Ok((0x1208, 0x1210, Some(0x1200)))
        );
        assert_eq!(stepped([0x10, 0, 0, 0, 0x14, 2], &[], None), Err(NoStep::Register("rbp")));
        // The word at rsp, and 8 more: how the stack for interrupts is left.
        let given = [(0x1100, 0x1800)];
        assert_eq!(stepped([8, 0, 0, 0, 0x09, 2], &given, None), Ok((0x1800, 0x1808, None)));
        // The word at rbp - 8: how realigned stacks are left.
        assert_eq!(
            stepped([0xf8, 0xff, 0, 0, 0x08, 2], &[(0x11f8, 0x1400)], Some(0x1200)),
            Ok((0x13f8, 0x1400, Some(0x1200)))
        );
        assert_eq!(stepped([0, 0, 0, 0, 0x00, 0], &[], None), Err(NoStep::Undefined));
        assert_eq!(stepped([0, 0x40, 0, 0, 0x05, 2], &[], None), Err(NoStep::Memory(0x50f8)));
    }

    #[test]
    fn orc_finds_saved_registers() {
        // Words of pt_regs from 0x1100: ip at word 16, cs at 17, sp at 19.
        let given = [(0x1180, 0xffff), (0x1188, 0x10), (0x1198, 0x1900)];
        let world = world(Some([0, 0, 0, 0, 0x05, 0x0b]), &given);
        let Ok(Step::Saved(saved, row)) = step(&mut frame(0x1100, None), &world, &world) else { panic!() };
        assert_eq!((saved.regs.pc(), saved.regs.sp(), row.signal), (Some(0xffff), Some(0x1900), true));
        assert_eq!((saved.regs.get(Reg::R15), saved.orig_ax), (Some(0x1100), Some(0x1178)));
        // Only the processor's own words, from 0x1180; rbp is still what it was.
        let partial = World { row: Some(OrcEntry::decode(TYPED, [0x80, 0, 0, 0, 0x05, 0x0c])), ..world };
        let Ok(Step::Saved(saved, _)) = step(&mut frame(0x1100, Some(7)), &partial, &partial) else {
            panic!()
        };
        assert_eq!((saved.regs.pc(), saved.regs.get(Reg::Rbp), saved.orig_ax), (Some(0xffff), Some(7), None));
        assert_eq!((saved.at, saved.regs.get(Reg::R15)), (0x1100, None));
    }

    #[test]
    fn call_frames_and_frame_pointers() {
        let cfi = CfiRow {
            cfa: Some((7, 0x20)),
            rules: vec![(3, Rule::Saved(-16)), (16, Rule::Saved(-8))],
            signal: false,
        };
        let world = World { cfi: Some(cfi), calls: vec![0x1208], ..world(None, &[]) };
        let Ok(Step::Caller(next)) = step(&mut frame(0x1100, Some(7)), &world, &world) else { panic!() };
        assert_eq!((next.pc, next.sp, next.source), (0x1118, 0x1120, FrameSource::Cfi));
        assert_eq!(
            (next.regs.get(Reg::Rbx), next.regs.get(Reg::Rbp), next.regs.get(Reg::Rax)),
            (Some(0x1110), Some(7), None)
        );
        let Some(Step::Caller(next)) = by_frame_pointer(&mut frame(0x1100, Some(0x1200)), &world, &world)
        else {
            panic!()
        };
        assert_eq!((next.pc, next.sp, next.regs.get(Reg::Rbp)), (0x1208, 0x1210, Some(0x1200)));
        assert_eq!(
            by_frame_pointer(&mut frame(0x1100, Some(0x1300)), &world, &world),
            None,
            "no call leads there"
        );
        assert_eq!(by_frame_pointer(&mut frame(0x1300, Some(0x1200)), &world, &world), None, "it is below");
    }
}
