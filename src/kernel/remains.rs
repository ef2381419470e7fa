//! What lies on a stack, read without unwinding: addresses of code, saved registers, how deep it was ever used.
//!
//! All of it may be old: a stack is not cleared when calls return. Source: `include/linux/sched/task_stack.h`
//! (`stack_not_used`, `end_of_stack`), `include/uapi/linux/magic.h`, Intel SDM vol. 1, 3.4.3 (`eflags`).

use super::stack::StackBounds;
use super::{Kernel, Object, ObjectError};
use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::bytes::u64_at;
use crate::unwind::{PT_REGS_SIZE, PtRegs, Stack};
use std::ops::RangeInclusive;

/// No stack is larger: 16 KiB, twice that with KASAN, 64 KiB for #VC and interrupts at most.
const STACK_MAX: u64 = 256 << 10;
/// Bits of `eflags` that are always set, and those that never are.
const FLAGS_SET: u64 = 1 << 1;
const FLAGS_CLEAR: u64 = !0x003f_7fd7;
const KERNEL_CS: u64 = 0x10;
const USER_CS: [u64; 2] = [0x33, 0x23];
const KERNEL_SS: [u64; 2] = [0x18, 0];
const USER_SS: u64 = 0x2b;
/// What the entry code leaves in `orig_ax` when the kernel is interrupted: -1, a vector inverted, or an error code.
const KERNEL_ORIG_AX: RangeInclusive<i64> = -256..=0xffff;

/// A stack's bytes, as far as they can be read.
pub struct StackBytes {
    start: u64,
    bytes: Vec<u8>,
    /// Why they end before the stack does.
    pub problem: Option<String>,
}

impl Stack for StackBytes {
    fn word(&self, at: u64) -> Option<u64> {
        u64_at(&self.bytes, usize::try_from(at.checked_sub(self.start)?).ok()?)
    }
}

impl StackBytes {
    /// Whether none of them could be read.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The aligned words from `from` up, with the address of each.
    fn words(&self, from: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let skip = (from.saturating_sub(self.start).div_ceil(8) as usize).min(self.bytes.len() / 8);
        let words = self.bytes.chunks_exact(8).enumerate().skip(skip);
        words.filter_map(|(i, word)| {
            Some((self.start + i as u64 * 8, u64::from_le_bytes(word.try_into().ok()?)))
        })
    }
}

/// Whether a task's stack has overflowed, and how deep it was used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackUse {
    /// Its lowest byte.
    pub start: VirtAddr,
    /// Bytes.
    pub size: u64,
    /// The word at its lowest end, which is STACK_END_MAGIC unless something has written over it. `None` if it cannot
    /// be read.
    pub end_word: Option<u64>,
    /// Bytes that were ever used, at most: up to the lowest word that is not zero, for stacks are made of zeros.
    pub deepest: Option<u64>,
    /// Bytes used as of the task's last switch.
    pub now: Option<u64>,
    /// What is wrong, half a sentence each; empty on a sound stack.
    pub problems: Vec<String>,
}

impl Kernel {
    /// Reads a stack whole.
    pub fn stack_bytes(&self, bounds: &StackBounds) -> StackBytes {
        let size = bounds.end.saturating_sub(bounds.start).min(STACK_MAX);
        let mut bytes = vec![0; size as usize];
        let read = self.read(VirtAddr(bounds.start), &mut bytes);
        bytes.truncate(read.filled);
        StackBytes { start: bounds.start, bytes, problem: read.stopped.map(|why| why.to_string()) }
    }

    /// Every word from `from` up that is an address in code, with where it lies.
    pub fn text_on_stack(&self, stack: &StackBytes, from: u64) -> Vec<(VirtAddr, VirtAddr)> {
        let words = stack.words(from).filter(|(_, word)| word >> 63 == 1 && self.is_text(VirtAddr(*word)));
        words.map(|(at, word)| (VirtAddr(at), VirtAddr(word))).collect()
    }

    /// Whatever on a stack looks like saved registers (`struct pt_regs`), lowest first.
    pub fn exception_frames(&self, stack: &StackBytes) -> Vec<PtRegs> {
        let mut found: Vec<PtRegs> = Vec::new();
        // By the word of cs: few words are a selector.
        const CS: u64 = 17 * 8;
        for (at, word) in stack.words(stack.start.saturating_add(CS)) {
            let cs = word & 0xffff;
            if cs != KERNEL_CS && !USER_CS.contains(&cs) {
                continue;
            }
            let Some(saved) = PtRegs::read(stack, at - CS, false) else { continue };
            let overlaps = found.last().is_some_and(|last| last.at + PT_REGS_SIZE > saved.at);
            if !overlaps && self.looks_saved(&saved) {
                found.push(saved);
            }
        }
        found
    }

    /// Whether a CPU can have saved these registers.
    fn looks_saved(&self, saved: &PtRegs) -> bool {
        let get = |reg| saved.regs.get(reg).unwrap_or(0);
        let (pc, cs, flags, sp, ss) =
            (get(Reg::Rip), get(Reg::Cs), get(Reg::Eflags), get(Reg::Rsp), get(Reg::Ss));
        if flags & FLAGS_SET == 0 || flags & FLAGS_CLEAR != 0 {
            return false;
        }
        let is_user = |at: u64| at >> 56 == 0 && at != 0;
        if cs == KERNEL_CS {
            // The kernel makes frames of its own to return by `iret` (sync_core()), with nothing below them.
            saved.orig_ax.is_some_and(|word| KERNEL_ORIG_AX.contains(&word.cast_signed()))
                && KERNEL_SS.contains(&ss)
                && sp >> 63 == 1
                && sp % 8 == 0
                && self.is_text(VirtAddr(pc))
        } else {
            ss == USER_SS && is_user(pc) && is_user(sp)
        }
    }

    /// Whether the stack of `task` has overflowed, and how deep it was used; `None` once released.
    pub fn stack_use(&self, task: Object<'_>) -> Result<Option<StackUse>, ObjectError> {
        if task.get("stack")? == 0 {
            return Ok(None);
        }
        let Some(bounds) = self.task_stack(task.at) else { return Ok(None) };
        let stack = self.stack_bytes(&bounds);
        let size = bounds.end.wrapping_sub(bounds.start);
        // Before Linux commit c65eacbe290b ("sched/core: Allow putting thread_info into task_struct") (in v4.9) a
        // thread_info lay below the magic; later kernels have it in the task.
        let end_word = stack.word(bounds.start);
        let mut used = StackUse {
            start: VirtAddr(bounds.start),
            size,
            end_word,
            deepest: None,
            now: None,
            problems: stack.problem.iter().map(|why| format!("it cannot be read: {why}")).collect(),
        };
        if stack.problem.is_none() {
            let lowest = stack.words(bounds.start + 8).find(|(_, word)| *word != 0);
            used.deepest = Some(lowest.map_or(0, |(at, _)| bounds.end - at));
        }
        used.problems.extend(self.stack_overflow(task.at));
        used.now = task.get("thread.sp").ok().filter(|&sp| bounds.contains(sp)).map(|sp| bounds.end - sp);
        match self.task_cpu(task) {
            Ok(cpu) if !self.possible_cpus().contains(&cpu) => {
                used.problems.push(format!("its CPU is {cpu}, which there is not"));
            }
            _ => {}
        }
        Ok(Some(used))
    }
}
