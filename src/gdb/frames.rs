//! Backtraces for a client that unwinds itself and gets stuck: `qkstub.unwind`.
//!
//! gdb has the compiler's call frame information, and kstub needs not do what that does. It lacks the entry code's,
//! that of code made at run time, and of modules without debug files; and what the compiler wrote about functions that
//! switch stacks in inline assembly is wrong about the stack, though right about where they saved registers. Source: GDB
//! manual, "Unwinding Frames in Python"; DWARF version 5, section 6.4.

use super::libraries::INTERRUPTED;
use super::threads::{Thread, Threads};
use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::bytes::printable;
use crate::debuginfo::cfi::Rule;
use crate::kernel::stack::{Ended, Trace, Tracer};
use crate::kernel::{Kernel, Machine};
use crate::unwind::{Frame, FrameSource, Regs, Why};
use serde_json::{Map, Value, json};

/// `offsetof(struct pt_regs, ip)`
const PT_REGS_IP: u64 = 128;
/// What a called function gives back as it was and ORC says nothing of, with DWARF's numbers.
const KEPT_BY_CALLS: [(u16, Reg); 5] =
    [(3, Reg::Rbx), (12, Reg::R12), (13, Reg::R13), (14, Reg::R14), (15, Reg::R15)];
/// DWARF's number of `rbp`.
const RBP: u16 = 6;
/// One piece of assembly by its names (`entry_64.S`, v5.8 to v5.11): it calls on another stack and changes none of these.
const CALLS_ON_STACK: [&str; 3] = ["asm_call_on_stack", "asm_call_sysvec_on_stack", "asm_call_irq_on_stack"];

/// The frames of a thread as JSON: of each `pc` and `sp`, by which the client knows it again, `cfa`, `function` (its
/// start) and its `name`, the registers of its `caller` (`null`: there is none), and whether call frame information would
/// get it `wrong`: those `kept` are then the frame's own, which the client knows. Where registers were saved between the
/// two, `saved` is where their `ip` is, and `through` the pc of the code in [`super::libraries`] that stands for that. It
/// ends before the first frame that is a guess; the last row then says why in `broken`, as it does where the walk ended
/// short of a root.
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
        let mut caller = next.map(|(_, next)| next.regs).or(user.filter(|_| is_last));
        let wrong = next.is_none_or(|(there, next)| {
            there != stack || next.source == FrameSource::PtRegs || next.restored.is_some()
        });
        let saved = match next.map(|(_, next)| &next.why) {
            Some(Why::PtRegs { at, .. }) => Some(at.wrapping_add(PT_REGS_IP)),
            _ => None,
        };
        let named = named(frame.lookup_pc());
        let name = named.as_ref().map(|named| named.name);
        let kept = match (&mut caller, next) {
            (Some(caller), Some((_, next))) if wrong && next.source == FrameSource::Orc => {
                add_saved(kernel, frame, name, caller)
            }
            _ => Vec::new(),
        };
        let mut row = row(frame.pc, frame.sp, caller, wrong);
        row["kept"] = json!(kept);
        row["cfa"] = json!(frame.cfa.or(caller.and_then(|regs| regs.sp())).unwrap_or(frame.sp));
        row["name"] = json!(name.map(printable));
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

/// Adds what `frame` has saved of its caller's registers, where the compiler's rules say, and gives those that it has not
/// touched. The rules count from the stack that the frame was called on, and so does the walk's canonical frame address,
/// also of a frame that has switched stacks since.
fn add_saved(kernel: &Kernel, frame: &Frame, name: Option<&str>, caller: &mut Regs) -> Vec<&'static str> {
    let Some(rules) = kernel.call_frames(frame.lookup_pc()) else {
        let changes_none = name.is_some_and(|name| CALLS_ON_STACK.contains(&name));
        return KEPT_BY_CALLS.iter().filter(|_| changes_none).map(|(_, reg)| reg.name()).collect();
    };
    let word = |offset: i64| kernel.read_u64(VirtAddr(frame.cfa?.wrapping_add_signed(offset)));
    // ORC has restored rbp: rules that lead to another one are not of this frame.
    let rbp = match rules.rule(RBP) {
        None | Some(Rule::Same) => frame.regs.get(Reg::Rbp),
        Some(Rule::Saved(offset)) => word(offset),
        _ => None,
    };
    if rules.signal || rbp != caller.get(Reg::Rbp) {
        return Vec::new();
    }
    let mut kept = Vec::new();
    for (number, reg) in KEPT_BY_CALLS {
        match rules.rule(number) {
            None | Some(Rule::Same) => kept.push(reg.name()),
            Some(Rule::Saved(offset)) => {
                if let Some(value) = word(offset) {
                    caller.set(reg, value);
                }
            }
            _ => {}
        }
    }
    kept
}

fn row(pc: u64, sp: u64, caller: Option<Regs>, wrong: bool) -> Value {
    let none = Value::Null;
    json!({
        "pc": pc, "sp": sp, "cfa": sp, "function": none, "name": none, "caller": caller.map(registers), "wrong": wrong,
        "kept": [], "saved": none, "through": none, "broken": none,
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
