//! Which registers a backtrace starts from, for CPUs and tasks; and many of them at once.
//!
//! Source: `arch/x86/include/asm/switch_to.h` (`struct inactive_task_frame`), `arch/x86/kernel/unwind_orc.c`
//! (`__unwind_start`).

use super::walk::Walk;
use super::{Ended, Start, Trace, parked};
use crate::addr::VirtAddr;
use crate::arch::x86_64::{Reg, Saved};
use crate::backend::RegisterSource;
use crate::bytes::u64_at;
use crate::kernel::{Cpu, CpuId, Kernel, Machine};
use crate::unwind::{Frame, FrameSource, Regs};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Tasks that a thread takes at a time.
const BATCH: usize = 32;
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

impl<'m> Tracer<'m> {
    /// `None` without a kernel.
    pub fn new(machine: &'m Machine) -> Option<Self> {
        let kernel = machine.kernel()?;
        let cpus = machine.cpus();
        let running = cpus.iter().filter_map(|cpu| Some((kernel.current(cpu.id)?.at, cpu.id))).collect();
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
            None => self.switched_out(task),
        }
    }

    /// Those of many tasks, in their order; shared among all of the machine's processors.
    pub fn tasks(&self, tasks: &[VirtAddr]) -> Vec<Trace> {
        self.map(tasks, |task| self.task(*task))
    }

    /// `f` of each item, in order; shared among all of the machine's processors.
    pub fn map<T: Sync, R: Send>(&self, items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
        self.map_with(items, || (), |(), item| f(item))
    }

    /// The same, with something that each thread makes for itself: what it remembers from one item to the next.
    pub fn map_with<T: Sync, S, R: Send>(
        &self,
        items: &[T],
        state: impl Fn() -> S + Sync,
        f: impl Fn(&S, &T) -> R + Sync,
    ) -> Vec<R> {
        let workers =
            std::thread::available_parallelism().map_or(1, usize::from).min(items.len().div_ceil(BATCH));
        if workers <= 1 {
            let state = state();
            return items.iter().map(|item| f(&state, item)).collect();
        }
        let next = AtomicUsize::new(0);
        let work = || {
            let state = state();
            let mut done = Vec::new();
            loop {
                let batch = next.fetch_add(1, Ordering::Relaxed);
                let Some(from) = batch.checked_mul(BATCH).filter(|&from| from < items.len()) else {
                    return done;
                };
                let some = items.iter().skip(from).take(BATCH);
                done.push((batch, some.map(|item| f(&state, item)).collect::<Vec<_>>()));
            }
        };
        let mut batches: Vec<(usize, Vec<R>)> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            // A worker that panicked has lost its batches: there is nothing in it that can.
            workers.into_iter().filter_map(|worker| worker.join().ok()).flatten().collect()
        });
        batches.sort_by_key(|(batch, _)| *batch);
        batches.into_iter().flat_map(|(_, done)| done).collect()
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
        let first = Frame::first(regs, FrameSource::Registers, "registers of the CPU in the dump");
        let mut trace = match first {
            _ if regs.in_user_mode() == Some(true) => Trace { ended: Ended::User(regs), ..trace },
            Some(frame) => self.walk(trace, frame),
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
            (Some(task), None) => self.inactive_frame(task).map(|frame| frame.regs),
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
            Some(frame) => self.walk(trace, frame),
            None => trace,
        }
    }

    fn switched_out(&self, task: VirtAddr) -> Trace {
        let trace = Trace {
            cpu: None,
            task: Some(task),
            start: Start::SwitchedOut,
            segments: Vec::new(),
            ended: Ended::NotStarted,
            parked: None,
        };
        let stacks = self.kernel.stacks();
        let stack = stacks.stack.and_then(|offset| self.kernel.read_u64(task.wrapping_add(offset)));
        // An exited task gives its stack back before its parent has waited for it (put_task_stack).
        if stack == Some(0) {
            return Trace { start: Start::Released, ..trace };
        }
        match self.inactive_frame(task) {
            Some(frame) => self.walk(trace, frame),
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

    /// The frame that `task` goes on with: in `__switch_to_asm`'s caller.
    fn inactive_frame(&self, task: VirtAddr) -> Option<Frame> {
        let sp = self.kernel.read_u64(task.wrapping_add(self.sp?))?;
        let stack = self.kernel.task_stack(task)?;
        stack.contains(sp).then_some(())?;
        let words: [u8; INACTIVE.len() * 8] = self.kernel.read_array(VirtAddr(sp))?;
        let mut regs = Regs::default();
        for (index, reg) in INACTIVE.into_iter().enumerate() {
            regs.set(reg, u64_at(&words, index * 8)?);
        }
        regs.set(Reg::Rsp, sp.wrapping_add(words.len() as u64));
        const WHY: &str = "the frame that the task left when it was switched out";
        let mut frame = Frame::first(regs, FrameSource::InactiveTask, WHY)?;
        frame.pc_at = Some(sp.wrapping_add(words.len() as u64 - 8));
        // What a new task begins with was never called.
        frame.exact = self.kernel.stacks().code(self.kernel).fork.contains(&frame.pc);
        Some(frame)
    }

    fn walk(&self, mut trace: Trace, first: Frame) -> Trace {
        let mut walk = Walk::new(self.kernel, trace.cpu, trace.task, self.orc);
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
