//! Registers of a task that does not run: what it left on its stack when it was switched out.
//!
//! Source: `arch/x86/include/asm/switch_to.h` (`struct inactive_task_frame`), `arch/x86/entry/entry_64.S`
//! (`__switch_to_asm`), `arch/x86/include/asm/processor.h` (`struct thread_struct`).

use super::{CpuId, Kernel, Object, ObjectError};
use crate::addr::VirtAddr;
use crate::arch::x86_64::{Reg, RegisterFile, Saved};

const FROM_FRAME: &str = "from the frame the task left on its stack when it was switched out";
const FROM_THREAD: &str = "from the task's thread_struct, as of its last context switch";

/// Where a register stands in `struct inactive_task_frame`.
const FRAME: [(Reg, &str); 7] = [
    (Reg::R15, "r15"),
    (Reg::R14, "r14"),
    (Reg::R13, "r13"),
    (Reg::R12, "r12"),
    (Reg::Rbx, "bx"),
    (Reg::Rbp, "bp"),
    (Reg::Rip, "ret_addr"),
];

impl Kernel {
    /// The CPU that `task` (a `struct task_struct`) runs on; `None` for one that is switched out.
    pub fn running_on(&self, task: Object<'_>) -> Option<CpuId> {
        // task_struct.on_cpu says the same, and stays set a moment too long.
        let cpu = self.task_cpu(task).ok()?;
        self.current(cpu).is_some_and(|current| current.at == task.at).then_some(cpu)
    }

    /// The CPU that `task` runs on or last ran on.
    pub fn task_cpu(&self, task: Object<'_>) -> Result<CpuId, ObjectError> {
        // Since Linux commit bcf9033e5449 ("sched: move CPU field back into thread_info if THREAD_INFO_IN_TASK=y")
        // (in v5.16) it is there; before, in task_struct itself.
        let cpu = task.either(&["thread_info.cpu", "cpu"])?.u64()?;
        Ok(CpuId(cpu as u32))
    }

    /// The registers with which `task` will go on when it is switched in again: what the compiler expects a call
    /// to keep, `rsp` and `rip`. All others are not saved.
    pub fn switched_out_registers(&self, task: Object<'_>) -> Result<RegisterFile, ObjectError> {
        // An exited task gives its stack back before its parent has waited for it (put_task_stack).
        if task.get("stack").is_ok_and(|stack| stack == 0) {
            return Err(ObjectError::Unreadable {
                what: "stack".into(),
                at: VirtAddr(0),
                why: "the task has exited and its stack was released".into(),
            });
        }
        let sp = task.get("thread.sp")?;
        let mut regs = RegisterFile::default();
        let mut end = sp;
        for (i, (reg, member)) in (0..).zip(FRAME) {
            // Since v4.9 the frame has been these seven words in this order; types say so where they have it.
            let offset = self.member("inactive_task_frame", member).map_or(i * 8, |member| member.offset);
            let at = VirtAddr(sp.wrapping_add(offset));
            let value = self.value("unsigned long", at)?.u64()?;
            regs.set(reg, Saved::Derived(value.into(), FROM_FRAME));
            end = end.max(at.0.wrapping_add(8));
        }
        regs.set(Reg::Rsp, Saved::Derived(end.into(), FROM_FRAME));
        for (reg, member) in [(Reg::FsBase, "thread.fsbase"), (Reg::KGsBase, "thread.gsbase")] {
            if let Ok(value) = task.get(member) {
                regs.set(reg, Saved::Derived(value.into(), FROM_THREAD));
            }
        }
        Ok(regs)
    }
}
