//! Which registers a backtrace starts from, for CPUs and tasks; and many of them at once.
//!
//! Source: `arch/x86/include/asm/switch_to.h` (`struct inactive_task_frame`), `arch/x86/kernel/unwind_orc.c`
//! (`__unwind_start`).

use super::walk::Walk;
use super::{Ended, Start, Trace, parked};
use crate::addr::VirtAddr;
use crate::arch::x86_64::{Reg, Saved};
use crate::backend::RegisterSource;
use crate::kernel::sched::TaskInfo;
use crate::kernel::{Cpu, CpuId, Kernel, Machine};
use crate::parallel;
use crate::unwind::{Frame, FrameSource, Regs};
use std::collections::HashMap;

/// Tasks whose backtraces are worth a thread.
pub const BATCH: usize = 32;
/// Words of a `struct inactive_task_frame`, since v4.9 in this order; the return address is the last.
const INACTIVE: [Reg; 7] = [Reg::R15, Reg::R14, Reg::R13, Reg::R12, Reg::Rbx, Reg::Rbp, Reg::Rip];

/// Makes backtraces of one machine.
pub struct Tracer<'m> {
    kernel: &'m Kernel,
    cpus: &'m [Cpu],
    /// What runs, by `struct task_struct`.
    running: HashMap<VirtAddr, CpuId>,
    /// `task_struct.thread.sp`
    sp: Option<u64>,
    orc: bool,
}

/// What a `struct task_struct` has of the task's stack; `None` where it cannot be read.
#[derive(Clone, Copy)]
struct Left {
    /// `stack`
    stack: Option<u64>,
    /// `thread.sp`
    sp: Option<u64>,
}

impl<'m> Tracer<'m> {
    /// `None` without a kernel.
    pub fn new(machine: &'m Machine) -> Option<Self> {
        let kernel = machine.kernel()?;
        let cpus = machine.cpus();
        // A CPU that has not been started has the copy of the boot CPU's task, whose the lower number is.
        let running =
            cpus.iter().rev().filter_map(|cpu| Some((kernel.current(cpu.id)?.at, cpu.id))).collect();
        let sp = kernel.member("task_struct", "thread.sp").map(|member| member.offset);
        Some(Self { kernel, cpus, running, sp, orc: true })
    }

    /// The same as if the kernel had no ORC: by what the vmlinux has of call frame information, and by frame pointers.
    pub fn without_orc(self) -> Self {
        Self { orc: false, ..self }
    }

    /// The CPU that the task at `task` runs on; `None` for one that is switched out.
    pub fn running_on(&self, task: VirtAddr) -> Option<CpuId> {
        self.running.get(&task).copied()
    }

    /// The backtrace of the task at `task` (its `struct task_struct`): of its CPU while it runs.
    pub fn task(&self, task: VirtAddr) -> Trace {
        match self.running_on(task) {
            Some(cpu) => self.cpu(cpu),
            None => self.switched_out(task, self.left(task)),
        }
    }

    /// The same of a task that has been read.
    pub fn task_read(&self, task: &TaskInfo) -> Trace {
        let left = task.stack.zip(task.sp).map(|(stack, sp)| Left { stack: Some(stack.0), sp: Some(sp.0) });
        match self.running_on(task.at) {
            Some(cpu) => self.cpu(cpu),
            None => self.switched_out(task.at, left.unwrap_or_else(|| self.left(task.at))),
        }
    }

    /// Those of many tasks, in their order; shared among all of the machine's processors.
    pub fn tasks(&self, tasks: &[VirtAddr]) -> Vec<Trace> {
        parallel::map(tasks, BATCH, |task| self.task(*task))
    }

    /// The backtrace of `cpu`, whatever runs there.
    pub fn cpu(&self, cpu: CpuId) -> Trace {
        let task = self.running.iter().find(|(_, on)| **on == cpu).map(|(task, _)| *task);
        let trace = Trace {
            cpu: Some(cpu),
            task,
            start: Start::Cpu,
            segments: Vec::new(),
            ended: Ended::NotStarted,
            parked: None,
        };
        let not_saved = |trace| Trace { start: Start::NotSaved, ..trace };
        let Some(one) = self.cpus.iter().find(|one| one.id == cpu) else { return not_saved(trace) };
        // A derived pc is a placeholder.
        let Saved::Known(_) = one.regs.get(Reg::Rip) else { return not_saved(trace) };
        let regs = Regs::from_file(&one.regs);
        let first = Frame::first(regs, FrameSource::Registers, "registers of the CPU");
        let mut trace = match first {
            _ if regs.in_user_mode() == Some(true) => Trace { ended: Ended::User(regs), ..trace },
            Some(frame) => self.walk_of(trace, frame),
            None => return not_saved(trace),
        };
        // The kernel's own notes are of what an NMI has stopped.
        let saved = self.kernel.backend().saved_cpus();
        let stopped = saved.first().is_some_and(|one| one.source == RegisterSource::KernelPrstatus);
        if stopped
            && self.kernel.panic_cpu() != Some(cpu)
            && let Some(segment) = parked::segment(self.kernel, cpu, task, &regs)
        {
            let code = self.kernel.stacks().code(self.kernel);
            trace.parked = segment.frames.first().and_then(|frame| code.parked(frame.lookup_pc()));
            trace.segments.insert(0, segment);
        }
        trace
    }

    /// A backtrace that starts at another pc or stack pointer than the CPU or task has.
    pub fn from(
        &self,
        cpu: Option<CpuId>,
        task: Option<VirtAddr>,
        pc: Option<u64>,
        sp: Option<u64>,
    ) -> Trace {
        let usual = match (task, cpu) {
            (Some(task), None) => {
                let left = self.left(task);
                self.inactive_frame(&self.new_walk(None, Some(task), left), left).map(|frame| frame.regs)
            }
            (_, Some(cpu)) => {
                self.cpus.iter().find(|one| one.id == cpu).map(|one| Regs::from_file(&one.regs))
            }
            (None, None) => None,
        };
        let usual = usual.unwrap_or_default();
        let mut regs = Regs::default();
        let both = [(Reg::Rip, pc), (Reg::Rsp, sp), (Reg::Rbp, None)];
        for (reg, given) in both {
            if let Some(value) = given.or_else(|| usual.get(reg)) {
                regs.set(reg, value);
            }
        }
        let task =
            task.or_else(|| self.running.iter().find(|(_, on)| Some(**on) == cpu).map(|(task, _)| *task));
        let trace = Trace {
            cpu,
            task,
            start: Start::Given,
            segments: Vec::new(),
            ended: Ended::NotStarted,
            parked: None,
        };
        match Frame::first(regs, FrameSource::Registers, "the pc and stack pointer that were given") {
            Some(frame) => self.walk_of(trace, frame),
            None => trace,
        }
    }

    fn walk_of(&self, trace: Trace, first: Frame) -> Trace {
        let left = trace.task.map_or(Left { stack: None, sp: None }, |task| self.left(task));
        let walk = self.new_walk(trace.cpu, trace.task, left);
        self.walk(trace, walk, first)
    }

    fn left(&self, task: VirtAddr) -> Left {
        let word = |offset: Option<u64>| self.kernel.read_u64(task.wrapping_add(offset?));
        Left { stack: word(self.kernel.stacks().stack), sp: word(self.sp) }
    }

    fn new_walk(&self, cpu: Option<CpuId>, task: Option<VirtAddr>, left: Left) -> Walk<'m> {
        let stack = task.zip(left.stack);
        let stack = stack.and_then(|(task, start)| self.kernel.stacks().at(task, start));
        Walk::new(self.kernel, cpu, task, stack, self.orc)
    }

    fn switched_out(&self, task: VirtAddr, left: Left) -> Trace {
        let trace = Trace {
            cpu: None,
            task: Some(task),
            start: Start::SwitchedOut,
            segments: Vec::new(),
            ended: Ended::NotStarted,
            parked: None,
        };
        // An exited task gives its stack back before its parent has waited for it (put_task_stack).
        if left.stack == Some(0) {
            return Trace { start: Start::Released, ..trace };
        }
        let walk = self.new_walk(None, Some(task), left);
        match self.inactive_frame(&walk, left) {
            Some(frame) => self.walk(trace, walk, frame),
            None => {
                let ended = Ended::Broken { pc: 0, why: self.why_not(task) };
                Trace { start: Start::Unreadable, ended, ..trace }
            }
        }
    }

    /// Why the task at `task` has no first frame.
    fn why_not(&self, task: VirtAddr) -> String {
        let Some(offset) = self.sp else {
            return "where its registers are is not known without types".to_owned();
        };
        let mut word = [0; 8];
        if let Err(why) = self.kernel.fill(task.wrapping_add(offset), &mut word) {
            return format!("its thread.sp cannot be read: {why}");
        }
        let sp = u64::from_le_bytes(word);
        match self.kernel.fill(VirtAddr(sp), &mut word) {
            Err(why) => format!("its stack at {sp:#x} cannot be read: {why}"),
            Ok(()) => format!("its thread.sp {sp:#x} is not on its stack"),
        }
    }

    /// The frame that a task goes on with: in `__switch_to_asm`'s caller.
    fn inactive_frame(&self, walk: &Walk<'_>, left: Left) -> Option<Frame> {
        let sp = left.sp?;
        walk.task_stack()?.contains(sp).then_some(())?;
        let words: [u64; INACTIVE.len()] = walk.words(sp)?;
        let mut regs = Regs::default();
        for (reg, word) in INACTIVE.into_iter().zip(words) {
            regs.set(reg, word);
        }
        let size = size_of_val(&words) as u64;
        regs.set(Reg::Rsp, sp.wrapping_add(size));
        const WHY: &str = "the frame that the task left when it was switched out";
        let mut frame = Frame::first(regs, FrameSource::InactiveTask, WHY)?;
        frame.pc_at = Some(sp.wrapping_add(size - 8));
        // What a new task begins with was never called.
        frame.exact = self.kernel.stacks().code(self.kernel).fork.contains(&frame.pc);
        Some(frame)
    }

    fn walk(&self, mut trace: Trace, mut walk: Walk<'_>, first: Frame) -> Trace {
        trace.ended = walk.run(first);
        trace.segments = walk.segments;
        // Only what is in front of the first boundary: behind it is what was interrupted.
        let first = trace.segments.iter().position(|segment| segment.boundary.is_some());
        let segments = trace.segments.iter().take(first.map_or(usize::MAX, |first| first + 1));
        let code = self.kernel.stacks().code(self.kernel);
        trace.parked = segments.flat_map(|one| &one.frames).find_map(|frame| code.parked(frame.lookup_pc()));
        trace
    }
}
