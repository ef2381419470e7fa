//! Unwinding: ORC and DWARF tables, code and a stack that someone else filled. Every step is bounded, and only up.
#![no_main]

use kstub::arch::x86_64::Reg;
use kstub::arch::x86_64::disasm::{call_before, pushed_at};
use kstub::debuginfo::cfi::{CallFrames, CfiRow};
use kstub::debuginfo::orc::{Flags, Format, Numbers, OrcEntry, OrcTable};
use kstub::unwind::{
    Frame, FrameSource, Regs, Stack, Step, Tables, by_call_frames, by_frame_pointer, by_own_code,
    by_top_of_stack, step,
};
use kstub_fuzz::{take, take_u64};

const CODE: u64 = 0xffff_ffff_8100_0000;
const STACK: u64 = 0xffff_c900_0000_0000;

struct World<'a> {
    orc: OrcTable,
    cfi: CallFrames,
    code: &'a [u8],
    stack: &'a [u8],
}

impl Stack for World<'_> {
    fn word(&self, at: u64) -> Option<u64> {
        let at = usize::try_from(at.checked_sub(STACK)?).ok()?;
        Some(u64::from_le_bytes(self.stack.get(at..at.checked_add(8)?)?.try_into().ok()?))
    }
}

impl Tables for World<'_> {
    fn orc(&self, pc: u64) -> Option<OrcEntry> {
        self.orc.row(pc)
    }
    fn cfi(&self, pc: u64) -> Option<CfiRow> {
        self.cfi.row(pc)
    }
    fn follows_call(&self, pc: u64) -> bool {
        let end = usize::try_from(pc.wrapping_sub(CODE)).unwrap_or(usize::MAX);
        self.code.get(..end).is_some_and(|code| call_before(code, pc).is_some())
    }
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let [kind, orc, cfi, code] = take::<4>(&mut rest);
    let (pc, sp, bp) = (take_u64(&mut rest), take_u64(&mut rest), take_u64(&mut rest));
    let mut part = |len: u8, unit: usize| {
        let (part, after) = rest.split_at((usize::from(len) * unit).min(rest.len()));
        rest = after;
        part
    };
    let (ips, rows) = (part(orc, 4).to_vec(), part(orc, 6).to_vec());
    let (frames, code) = (part(cfi, 2).to_vec(), part(code, 4));
    let format = Format {
        flags: [Flags::Old, Flags::Signal, Flags::Typed, Flags::Typed][usize::from(kind & 3)],
        numbers: if kind & 4 == 0 { Numbers::Old } else { Numbers::New },
    };
    let _ = Format::tell(kind & 8 != 0, &rows);
    let cfi = if kind & 16 == 0 {
        CallFrames::from_debug_frame(frames)
    } else {
        CallFrames::from_eh_frame(frames, CODE)
    };
    let world = World { orc: OrcTable::new(format, CODE, ips, rows), cfi, code, stack: rest };
    let mut regs = Regs::default();
    for (reg, value) in
        [(Reg::Rip, CODE + pc % 4096), (Reg::Rsp, STACK + sp % 4096), (Reg::Rbp, STACK + bp % 4096)]
    {
        regs.set(reg, value);
    }
    let mut frame = Frame::first(regs, FrameSource::Registers, "the fuzzer's").expect("has pc and sp");
    for _ in 0..64 {
        let taken = match step(&mut frame, &world, &world) {
            Ok(step) => Some(step),
            Err(why) => {
                let _ = why.to_string();
                by_call_frames(&mut frame, &world, &world).ok()
            }
        };
        let pushed = pushed_at(world.code, CODE, frame.pc);
        let taken = taken
            .or_else(|| by_frame_pointer(&mut frame, &world, &world))
            .or_else(|| by_own_code(&mut frame, pushed.as_ref()?, &world))
            .or_else(|| by_top_of_stack(&mut frame, 0, &world, &world, "the top"));
        let Some(Step::Caller(next)) = taken else { break };
        let at = next.pc_at.expect("a caller's pc is on the stack");
        assert_eq!(world.word(at), Some(next.pc), "{}", next.why);
        assert_eq!(
            (frame.cfa, next.regs.pc(), next.regs.sp()),
            (Some(next.sp), Some(next.pc), Some(next.sp))
        );
        frame = next;
    }
});
