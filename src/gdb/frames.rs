//! Backtraces for a client that unwinds itself and gets stuck: `qkstub.unwind`.
//!
//! gdb has the compiler's call frame information, and kstub needs not do what that does. It lacks the entry code's,
//! that of code made at run time, and of modules without debug files; and what the compiler wrote about functions that
//! switch stacks in inline assembly is wrong. Source: GDB manual, "Unwinding Frames in Python".

use super::libraries::INTERRUPTED;
use super::threads::{Thread, Threads};
use crate::addr::VirtAddr;
use crate::bytes::printable;
use crate::kernel::Machine;
use crate::kernel::stack::{Ended, Trace, Tracer};
use crate::unwind::{Frame, FrameSource, Regs, Why};
use serde_json::{Map, Value, json};

/// `offsetof(struct pt_regs, ip)`
const PT_REGS_IP: u64 = 128;

/// The frames of a thread as JSON: of each `pc` and `sp`, by which the client knows it again, `cfa`, `function` (its
/// start) and its `name`, the registers of its `caller` (`null`: there is none), and whether call frame information would get it
/// `wrong`. Where registers were saved between the two, `saved` is where their `ip` is, and `through` the pc of the code
/// in [`super::libraries`] that stands for that. It ends before the first frame that is a guess; the last row then says
/// why in `broken`, as it does where the walk ended short of a root.
pub(super) fn of(machine: &Machine, threads: &Threads, thread: Thread) -> Option<Value> {
    let tracer = Tracer::new(machine)?;
    let trace = match threads.task(machine, thread) {
        Some(task) => tracer.task(task.at),
        None => tracer.cpu(threads.cpu(machine, thread)),
    };
    let kernel = machine.kernel()?;
    let named = |pc: u64| kernel.symbolize(VirtAddr(pc));
    let user = trace.user().copied();
    let frames = places(&trace);
    let guess = frames.iter().position(|(_, frame)| frame.source.is_guess());
    let mut rows = Vec::new();
    for (index, (stack, frame)) in frames.iter().take(guess.unwrap_or(frames.len())).enumerate() {
        let next = frames.get(index + 1).filter(|(_, next)| !next.source.is_guess());
        let is_last = index + 1 == frames.len();
        let caller = next.map(|(_, next)| next.regs).or(user.filter(|_| is_last));
        let wrong = next.is_none_or(|(there, next)| {
            there != stack || next.source == FrameSource::PtRegs || next.restored.is_some()
        });
        let saved = match next.map(|(_, next)| &next.why) {
            Some(Why::PtRegs { at, .. }) => Some(at.wrapping_add(PT_REGS_IP)),
            _ => None,
        };
        let mut row = row(frame.pc, frame.sp, caller, wrong);
        row["cfa"] = json!(frame.cfa.or(caller.and_then(|regs| regs.sp())).unwrap_or(frame.sp));
        let named = named(frame.lookup_pc());
        row["name"] = json!(named.as_ref().map(|named| printable(named.name)));
        row["function"] = json!(named.map(|named| frame.lookup_pc().wrapping_sub(named.offset)));
        row["broken"] = json!(match (&trace.ended, next) {
            (_, None) if !is_last => Some("all that follows would be guesses".to_owned()),
            (Ended::Broken { why, .. }, None) => Some(printable(why)),
            _ => None,
        });
        row["saved"] = json!(saved);
        row["through"] = json!(saved.map(|_| INTERRUPTED));
        rows.push(row);
    }
    // In user mode gdb would have nothing to go by but the frame pointer, which few programs keep.
    if let Some((pc, sp)) = user.and_then(|user| Some((user.pc()?, user.sp()?))) {
        rows.push(row(pc, sp, None, true));
    }
    Some(Value::Array(rows))
}

fn row(pc: u64, sp: u64, caller: Option<Regs>, wrong: bool) -> Value {
    let none = Value::Null;
    json!({
        "pc": pc, "sp": sp, "cfa": sp, "function": none, "name": none, "caller": caller.map(registers), "wrong": wrong,
        "saved": none, "through": none, "broken": none,
    })
}

/// Each frame with the number of the segment that it is in.
fn places(trace: &Trace) -> Vec<(usize, &Frame)> {
    let segments = trace.segments.iter().enumerate();
    segments.flat_map(|(index, segment)| segment.frames.iter().map(move |frame| (index, frame))).collect()
}

fn registers(regs: Regs) -> Value {
    Value::Object(
        regs.known().map(|(reg, value)| (reg.name().to_owned(), json!(value))).collect::<Map<_, _>>(),
    )
}
