//! The walk: step by step, from stack to stack, until user mode, a root, or something that proves the next step wrong.
//!
//! A step on one stack only goes up. A stack is left for another by saved registers, or by a row of the tables on a
//! stack made to be left; none is entered twice. So it ends. Source: `arch/x86/kernel/unwind_orc.c`
//! (`unwind_next_frame`), `dumpstack_64.c` (`get_stack_info`).

use super::entry::{self, Hook};
use super::runtime_code::RuntimeKind;
use super::tables::KernelTables;
use super::{Boundary, Ended, Event, Segment, StackBounds, StackKind, Stacks};
use crate::addr::{PAGE_SIZE, VirtAddr};
use crate::arch::x86_64::Reg;
use crate::arch::x86_64::disasm::{self, Call};
use crate::bytes::u64_at;
use crate::debuginfo::orc::OrcEntry;
use crate::kernel::{CpuId, Kernel};
use crate::unwind::{
    self, Frame, FrameSource, NoStep, PT_REGS_SIZE, PtRegs, Regs, Stack, Step, Why, by_call_frames,
    by_frame_pointer, by_own_code, by_top_of_stack,
};
use std::cell::RefCell;

/// Frames of one walk: more than two for every three words of the largest stacks is nothing real.
const FRAMES_MAX: usize = 8192;
/// Words looked at for a guess.
const SCAN_WORDS: u64 = 512;
/// Guesses of one walk.
const GUESSES_MAX: usize = 64;
/// Code of one function followed.
const CODE_MAX: u64 = 64 << 10;
/// Words that a thunk may have pushed.
const THUNK_WORDS: u64 = 2;
/// `__KERNEL_CS`, and user space's selectors: 64 bits, 32 bits.
const CODE_SELECTORS: [u64; 3] = [0x10, 0x33, 0x23];

/// One walk over the stacks of a CPU or a task.
pub(super) struct Walk<'k> {
    kernel: &'k Kernel,
    stacks: &'k Stacks,
    tables: KernelTables<'k>,
    cpu: Option<CpuId>,
    task: Option<VirtAddr>,
    memory: StackMemory<'k>,
    /// Starts of the stacks that were left.
    left: Vec<u64>,
    frames: usize,
    guesses: usize,
    /// Replaced return addresses met, by tracer.
    kretprobes: usize,
    pub segments: Vec<Segment>,
}

/// The stacks' bytes, a page at a time; everything else is out of bounds.
struct StackMemory<'k> {
    kernel: &'k Kernel,
    known: Vec<StackBounds>,
    /// Parts of pages that go up to their pages' ends: where each starts, where its page ends, its bytes.
    pages: RefCell<Vec<(u64, u64, Vec<u8>)>>,
}

impl Stack for StackMemory<'_> {
    fn word(&self, at: u64) -> Option<u64> {
        if !at.is_multiple_of(8) || !self.known.iter().any(|stack| stack.contains(at)) {
            return None;
        }
        let end = (at | (PAGE_SIZE - 1)).wrapping_add(1);
        let mut pages = self.pages.borrow_mut();
        let place = |start: u64| at.checked_sub(start).filter(|offset| *offset < PAGE_SIZE);
        let held = pages.iter().rev().find_map(|(start, of, bytes)| {
            place(*start).filter(|_| *of == end).map(|offset| u64_at(bytes, offset as usize))
        });
        if let Some(word) = held {
            return word;
        }
        // Walks go up: what is below, most of the page, is not asked for.
        let mut bytes = vec![0; (end.wrapping_sub(at)) as usize];
        let filled = self.kernel.read(VirtAddr(at), &mut bytes).filled;
        bytes.truncate(filled);
        let word = u64_at(&bytes, 0);
        pages.push((at, end, bytes));
        word
    }
}

/// Where the walk goes on.
enum Next {
    Frame(Frame),
    Ended(Ended),
}

impl<'k> Walk<'k> {
    /// Of `cpu`, or of `task`, whose stack is `own`.
    pub fn new(
        kernel: &'k Kernel,
        cpu: Option<CpuId>,
        task: Option<VirtAddr>,
        own: Option<StackBounds>,
        orc: bool,
    ) -> Self {
        let stacks = kernel.stacks();
        let mut known: Vec<StackBounds> = Vec::new();
        known.extend(cpu.map(|cpu| stacks.of_cpu(kernel, cpu)).into_iter().flatten());
        known.extend(own);
        Self {
            kernel,
            stacks,
            tables: stacks.tables(kernel, orc),
            cpu,
            task,
            memory: StackMemory { kernel, known, pages: RefCell::default() },
            left: Vec::new(),
            frames: 0,
            guesses: 0,
            kretprobes: 0,
            segments: Vec::new(),
        }
    }

    /// The stack of the task itself.
    pub fn task_stack(&self) -> Option<&StackBounds> {
        self.memory.known.iter().find(|stack| stack.kind == StackKind::Task)
    }

    /// The words from `at` up, which is on a stack; they may go on behind it.
    pub fn words<const N: usize>(&self, at: u64) -> Option<[u64; N]> {
        let mut words = [0; N];
        for (index, word) in words.iter_mut().enumerate() {
            let at = at.wrapping_add(index as u64 * 8);
            *word = self.memory.word(at).or_else(|| self.kernel.read_u64(VirtAddr(at)))?;
        }
        Some(words)
    }

    /// The registers saved at `at`.
    pub fn registers(&self, at: u64) -> Option<Regs> {
        PtRegs::read(&self.memory, at, false).map(|saved| saved.regs)
    }

    /// A task's stack that has overflowed goes on, for its pointer, in the page below.
    fn stack_of(&self, sp: u64) -> Option<StackBounds> {
        let known = &self.memory.known;
        let holds = |stack: &&StackBounds| stack.contains(sp) || sp == stack.end;
        let overflowed = |stack: &&StackBounds| {
            stack.kind == StackKind::Task && (stack.start.wrapping_sub(PAGE_SIZE)..stack.start).contains(&sp)
        };
        let inside = known.iter().find(|stack| stack.contains(sp));
        inside.or_else(|| known.iter().find(holds)).or_else(|| known.iter().find(overflowed)).copied()
    }

    /// Walks from `frame`; the segments are then in [`Self::segments`].
    pub fn run(&mut self, first: Frame) -> Ended {
        let mut frame = first;
        self.segments.push(Segment { stack: self.stack_of(frame.sp), ..Segment::default() });
        loop {
            if self.frames >= FRAMES_MAX {
                return broken(&frame, format!("more than {FRAMES_MAX} frames"));
            }
            self.frames += 1;
            // The step may open another segment; this frame is still of this one.
            let index = self.segments.len().saturating_sub(1);
            match self.next(&mut frame) {
                Next::Frame(next) => {
                    let done = std::mem::replace(&mut frame, next);
                    self.put(index, done);
                }
                Next::Ended(ended) => {
                    self.put(index, frame);
                    return ended;
                }
            }
        }
    }

    fn put(&mut self, segment: usize, frame: Frame) {
        if let Some(segment) = self.segments.get_mut(segment) {
            segment.frames.push(frame);
        }
    }

    fn here(&self) -> Option<StackBounds> {
        self.segments.last().and_then(|segment| segment.stack)
    }

    fn next(&mut self, frame: &mut Frame) -> Next {
        match unwind::step(frame, &self.tables, &self.memory) {
            Ok(Step::Caller(next)) => self.called(frame, next),
            Ok(Step::Saved(saved, row)) => self.interrupted(frame, saved, Some(row)),
            Ok(Step::End(_)) => self.end(frame),
            Err(why) => self.without_row(frame, why),
        }
    }

    /// The step by a call: up on the same stack, or over to another by a row made for that.
    fn called(&mut self, frame: &mut Frame, mut next: Frame) -> Next {
        let here = self.here();
        // The compiler does not know that the stack for interrupts is left: the word at its top is the stack pointer.
        if here.is_some_and(|here| here.kind == StackKind::Irq && next.sp == here.end.wrapping_sub(8))
            && next.source != FrameSource::Orc
            && let Some(sp) = self.memory.word(next.sp)
        {
            next.sp = sp;
            next.regs.set(Reg::Rsp, sp);
        }
        let on_same = here.is_some_and(|here| here.contains(next.sp) || next.sp == here.end);
        if on_same {
            if next.sp <= frame.sp && !frame.exact || next.sp < frame.sp {
                return self.guess(frame, "the next frame would be below this one");
            }
        } else {
            let may_leave = here.is_some_and(|here| {
                matches!(here.kind, StackKind::Irq | StackKind::Entry | StackKind::VmmCommunication)
            });
            match self.stack_of(next.sp) {
                Some(there) if may_leave && !self.left.contains(&there.start) => {
                    self.left.extend(here.map(|here| here.start));
                    self.restore(&mut next);
                    self.segments.push(Segment { stack: Some(there), ..Segment::default() });
                    return Next::Frame(next);
                }
                Some(there) => {
                    return self
                        .guess(frame, &format!("the next frame would be on the {}", there.kind.name()));
                }
                None => return self.guess(frame, "the next frame would be on no known stack"),
            }
        }
        self.restore(&mut next);
        Next::Frame(next)
    }

    /// Puts the real return address in the place of a tracer's.
    fn restore(&mut self, frame: &mut Frame) {
        let found = self.stacks.code(self.kernel).return_trampolines.iter().find(|(at, _)| *at == frame.pc);
        let (Some((_, hook)), Some(task)) = (found, self.task) else { return };
        let place = frame.pc_at.unwrap_or(frame.sp.wrapping_sub(8));
        let real = self.stacks.returns.real(self.kernel, task, *hook, place, self.kretprobes);
        if *hook == Hook::Kretprobe {
            self.kretprobes += 1;
        }
        let Some(real) = real else { return };
        frame.pc = real;
        frame.regs.set(Reg::Rip, real);
        frame.exact = false;
        frame.restored = Some(match hook {
            Hook::Kretprobe => "kretprobe",
            Hook::FunctionGraph => "function graph tracer",
        });
    }

    /// Saved registers: of a user, or of kernel code on this or another stack.
    fn interrupted(&mut self, frame: &mut Frame, saved: PtRegs, row: Option<OrcEntry>) -> Next {
        let partial = saved.orig_ax.is_none();
        let (Some(pc), Some(sp), Some(cs)) = (saved.regs.pc(), saved.regs.sp(), saved.regs.get(Reg::Cs))
        else {
            return self.guess(frame, "the saved registers are not all there");
        };
        if !CODE_SELECTORS.contains(&cs) {
            return self.guess(frame, &format!("the saved cs is {cs:#x}, which is no code's"));
        }
        let name = self.kernel.symbolize(VirtAddr(frame.lookup_pc())).map(|found| found.name.to_owned());
        let event = entry::event(name.as_deref().unwrap_or_default(), &saved);
        let boundary = Boundary { saved, partial, event, entry: frame.pc };
        if boundary.of_user() {
            self.close(boundary);
            return Next::Ended(Ended::User(saved.regs));
        }
        let mut next = Frame {
            pc,
            exact: row.is_none_or(|row| row.signal),
            pc_at: Some(saved.at.wrapping_add(16 * 8)),
            sp,
            cfa: None,
            regs: saved.regs,
            source: FrameSource::PtRegs,
            why: Why::PtRegs { at: saved.at, row },
            restored: None,
        };
        // The user's stack pointer in kernel mode: in the middle of the entry or exit code.
        if sp >> 63 == 0 && self.stacks.code(self.kernel).is_entry(pc) {
            self.close(boundary);
            self.segments.push(Segment::default());
            return Next::Frame(next);
        }
        let here = self.here();
        let there = self.stack_of(sp);
        let goes_up = match (here, there) {
            (_, None) => false,
            (Some(here), Some(there)) if here.start == there.start => sp > saved.at && sp > frame.sp,
            (_, Some(there)) => !self.left.contains(&there.start),
        };
        if !goes_up {
            let why = match there {
                Some(there) => {
                    format!("the saved stack pointer {sp:#x} leads back, on the {}", there.kind.name())
                }
                None => format!("the saved stack pointer {sp:#x} is on no known stack"),
            };
            self.close(boundary);
            self.segments.push(Segment { frames: vec![next], ..Segment::default() });
            return Next::Ended(Ended::Broken { pc, why });
        }
        if here != there {
            self.left.extend(here.map(|here| here.start));
        }
        self.close(boundary);
        self.restore(&mut next);
        self.segments.push(Segment { stack: there, ..Segment::default() });
        Next::Frame(next)
    }

    fn close(&mut self, boundary: Boundary) {
        if let Some(segment) = self.segments.last_mut() {
            segment.boundary = Some(boundary);
        }
    }

    /// The table says that there is no caller.
    fn end(&mut self, frame: &mut Frame) -> Next {
        if frame.exact {
            let name = self.kernel.symbolize(VirtAddr(frame.pc)).map(|found| found.name).unwrap_or_default();
            if self.stacks.code(self.kernel).is_entry(frame.pc)
                && !self.stacks.code(self.kernel).fork.contains(&frame.pc)
            {
                return self.gap(frame, name);
            }
            if entry::is_thunk(name) {
                return self.thunk(frame, name);
            }
        } else if let Some(next) = self.inner_thunk(frame) {
            return next;
        }
        // A user's task begins with the registers that it will have when it gets there.
        if let Some(task) =
            self.task_stack().copied().filter(|task| Some(task.start) == self.here().map(|here| here.start))
        {
            let at = task.end.wrapping_sub(PT_REGS_SIZE);
            let saved = PtRegs::read(&self.memory, at, false).filter(|saved| saved.of_user());
            if let Some(saved) =
                saved.filter(|saved| frame.sp <= at && saved.regs.get(Reg::Cs).is_some_and(is_selector))
            {
                self.close(Boundary { saved, partial: false, event: Event::Fork, entry: frame.pc });
                return Next::Ended(Ended::User(saved.regs));
            }
        }
        Next::Ended(Ended::Root { pc: frame.pc })
    }

    fn gap(&mut self, frame: &Frame, name: &str) -> Next {
        let user =
            self.stacks.code(self.kernel).in_gap(self.kernel, self.cpu, name, &frame.regs, &self.memory);
        Next::Ended(Ended::EntryGap { pc: frame.pc, user })
    }

    /// A thunk was called, or jumped to, from a function whose return address, or that in it, is on top.
    fn thunk(&mut self, frame: &mut Frame, name: &str) -> Next {
        const WHY: &str = "a thunk pushes nothing of its own: the top of the stack is the caller's";
        for pushed in 0..=THUNK_WORDS {
            let word = self.memory.word(frame.sp.wrapping_add(pushed * 8));
            let target = word.and_then(|word| self.kernel.symbolize(VirtAddr(word)));
            // Of its own call, to trap speculation.
            if target.is_some_and(|target| target.name == name) {
                continue;
            }
            if let Some(Step::Caller(next)) = by_top_of_stack(frame, pushed, &self.tables, &self.memory, WHY)
            {
                return self.called(frame, next);
            }
        }
        self.guess(frame, "nothing on top of the stack of a thunk is behind a call")
    }

    /// A thunk that called: into its own second half.
    fn inner_thunk(&mut self, frame: &mut Frame) -> Option<Next> {
        let name = self.kernel.symbolize(VirtAddr(frame.lookup_pc())).map(|found| found.name)?;
        entry::is_thunk(name).then(|| self.thunk(frame, name))
    }

    /// No row helps: what is known of the code, frame pointers, and last a guess.
    fn without_row(&mut self, frame: &mut Frame, why: NoStep) -> Next {
        let at = VirtAddr(frame.lookup_pc());
        let name = self.kernel.symbolize(at).map(|found| found.name).unwrap_or_default();
        let entry = self.stacks.code(self.kernel).is_entry(at.0);
        if frame.exact && entry && frame.sp >> 63 == 0 {
            return self.gap(frame, name);
        }
        if why == NoStep::NoRow && entry::is_root(name) {
            return self.end(frame);
        }
        if matches!(why, NoStep::NoRow | NoStep::Undefined) {
            let kind = self.kernel.runtime_code(at).map(|code| code.kind);
            // Detours of kprobes, and entry code of kernels without ORC, call with the saved registers on top.
            if (kind == Some(RuntimeKind::Optprobe) || entry && !frame.exact)
                && let Some(saved) = PtRegs::read(&self.memory, frame.sp, false)
                && saved.regs.get(Reg::Cs).is_some_and(is_selector)
            {
                return self.interrupted(frame, saved, None);
            }
            if frame.exact && entry {
                return self.gap(frame, name);
            }
            if entry::is_thunk(name) {
                return self.thunk(frame, name);
            }
            // A call to what is no code, or to code before it has pushed anything.
            const CALLED: &str =
                "nothing is known of this code: the word on top of its stack is behind a call";
            if frame.exact && kind.is_none() {
                let called = by_top_of_stack(frame, 0, &self.tables, &self.memory, CALLED);
                if let Some(Step::Caller(next)) = called {
                    return self.called(frame, next);
                }
            }
        }
        if why == NoStep::Undefined
            && let Some(next) = self.by_own_code(frame)
        {
            return next;
        }
        self.by_frame_pointer(frame).unwrap_or_else(|| self.guess(frame, &why.to_string()))
    }

    /// A C function that the tables leave out (`STACK_FRAME_NON_STANDARD`): by what its own code has pushed if a call of it
    /// is where that leads, else by call frame information.
    fn by_own_code(&mut self, frame: &mut Frame) -> Option<Next> {
        let pc = frame.lookup_pc();
        let start = pc - self.kernel.symbolize(VirtAddr(pc))?.offset;
        let mut code = vec![0; (frame.pc.checked_sub(start)?.checked_add(16)?).min(CODE_MAX) as usize];
        let filled = self.kernel.read(VirtAddr(start), &mut code).filled;
        let pushed = disasm::pushed_at(code.get(..filled)?, start, frame.pc);
        if let Some(Step::Caller(next)) = pushed.and_then(|pushed| by_own_code(frame, &pushed, &self.memory))
            && self.tables.call_before(next.pc) == Some(Call::Direct(start))
        {
            return Some(self.called(frame, next));
        }
        match by_call_frames(frame, &self.tables, &self.memory) {
            Ok(Step::Caller(next)) if self.tables.call_before(next.pc).is_some() => {
                Some(self.called(frame, next))
            }
            _ => None,
        }
    }

    fn by_frame_pointer(&mut self, frame: &mut Frame) -> Option<Next> {
        let bp = frame.regs.get(Reg::Rbp)?;
        // `ENCODE_FRAME_POINTER`: the lowest bit says that there are saved registers.
        if bp & 1 == 1 && bp >= frame.sp {
            let saved = PtRegs::read(&self.memory, bp & !1, false)?;
            saved.regs.get(Reg::Cs).filter(|cs| is_selector(*cs))?;
            return Some(self.interrupted(frame, saved, None));
        }
        match by_frame_pointer(frame, &self.tables, &self.memory)? {
            Step::Caller(next) => Some(self.called(frame, next)),
            _ => None,
        }
    }

    /// The nearest word above that is behind a call, best one that calls the function of `frame`: a guess, and marked as
    /// one. `why` is what the tables came to.
    fn guess(&mut self, frame: &mut Frame, why: &str) -> Next {
        let (Some(here), true) = (self.here(), self.guesses < GUESSES_MAX) else {
            return Next::Ended(broken(frame, why.to_owned()));
        };
        self.guesses += 1;
        let begins =
            self.kernel.symbolize(VirtAddr(frame.lookup_pc())).map(|found| frame.lookup_pc() - found.offset);
        let from = frame.sp.max(here.start).next_multiple_of(8);
        let mut nearest = None;
        for at in (from..here.end).step_by(8).take(SCAN_WORDS as usize) {
            let Some(word) = self.memory.word(at) else { continue };
            let Some(call) = self.tables.call_before(word) else { continue };
            nearest = nearest.or(Some((at, word)));
            if matches!(call, Call::Direct(target) if Some(target) == begins) {
                nearest = Some((at, word));
                break;
            }
        }
        let Some((at, pc)) = nearest else {
            return Next::Ended(broken(frame, why.to_owned()));
        };
        let sp = at.wrapping_add(8);
        let mut regs = Regs::default();
        regs.set(Reg::Rip, pc);
        regs.set(Reg::Rsp, sp);
        let mut next = Frame {
            pc,
            exact: false,
            pc_at: Some(at),
            sp,
            cfa: None,
            regs,
            source: FrameSource::Scan,
            why: Why::Guess(why.to_owned()),
            restored: None,
        };
        self.restore(&mut next);
        Next::Frame(next)
    }
}

fn is_selector(cs: u64) -> bool {
    CODE_SELECTORS.contains(&cs)
}

fn broken(frame: &Frame, why: String) -> Ended {
    Ended::Broken { pc: frame.pc, why }
}
