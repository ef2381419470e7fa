//! What a CPU does that a crashing one has stopped with an NMI: it waits in `crash_nmi_callback`, and the dump's note has
//! the registers of what it was doing before.
//!
//! The frames of the NMI itself are still on its stack. They are believed only if the step from each leads to the next
//! and the last to the very registers that the note has. Source: `arch/x86/kernel/{nmi.c,reboot.c}`
//! (`crash_nmi_callback`), `arch/x86/entry/entry_64.S` (`asm_exc_nmi`).

use super::walk::Walk;
use super::{Segment, StackKind};
use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::bytes::u64_at;
use crate::kernel::{CpuId, Kernel};
use crate::unwind::{Frame, FrameSource, PT_REGS_SIZE, Regs};

/// Registers that are compared: more would only be the same again.
const COMPARED: [Reg; 6] = [Reg::Rip, Reg::Rsp, Reg::Rbp, Reg::Rbx, Reg::R15, Reg::Eflags];
/// Word of a `struct pt_regs` with `ip`.
const IP: u64 = 16 * 8;
/// Beginnings tried.
const TRIES_MAX: usize = 64;

/// The segment in front of the context with these registers; `None` if no NMI's is there.
pub fn segment(kernel: &Kernel, cpu: CpuId, task: Option<VirtAddr>, regs: &Regs) -> Option<Segment> {
    let pc = regs.pc()?;
    // From user mode the NMI goes over to the task's stack.
    let stack = match regs.in_user_mode()? {
        true => kernel.task_stack(task?)?,
        false => kernel.cpu_stacks(cpu).into_iter().find(|stack| stack.kind == StackKind::Nmi)?,
    };
    let mut bytes = vec![0; usize::try_from(stack.end.checked_sub(stack.start)?).ok()?];
    kernel.read(VirtAddr(stack.start), &mut bytes).stopped.is_none().then_some(())?;
    let word = |at: u64| u64_at(&bytes, usize::try_from(at.checked_sub(stack.start)?).ok()?);
    let own = task.and_then(|task| kernel.task_stack(task));
    let walk = Walk::new(kernel, Some(cpu), task, own, true);
    let last = stack.end.checked_sub(PT_REGS_SIZE)?;
    let saved = (stack.start..=last).rev().step_by(8).find(|&at| {
        word(at.wrapping_add(IP)) == Some(pc)
            && walk
                .registers(at)
                .is_some_and(|found| COMPARED.iter().all(|&reg| found.get(reg) == regs.get(reg)))
    })?;
    let code = kernel.stacks().code(kernel);
    let begins = (stack.start..saved).step_by(8).filter_map(|at| Some((at, word(at)?)));
    let begins = begins.filter(|(_, pc)| code.parked(pc.wrapping_sub(1)).is_some()).take(TRIES_MAX);
    for (at, pc) in begins {
        const WHY: &str = "still on the stack of the NMI: where the function that the CPU is in last called";
        let mut regs = Regs::default();
        regs.set(Reg::Rip, pc);
        regs.set(Reg::Rsp, at.wrapping_add(8));
        let mut first = Frame::first(regs, FrameSource::Remains, WHY)?;
        first.exact = false;
        first.pc_at = Some(at);
        let mut walk = Walk::new(kernel, Some(cpu), task, own, true);
        walk.run(first);
        let segment = walk.segments.into_iter().next()?;
        let proven = segment.boundary.as_ref().is_some_and(|boundary| boundary.saved.at == saved);
        if proven && !segment.frames.iter().any(|frame| frame.source.is_guess()) {
            return Some(segment);
        }
    }
    None
}
