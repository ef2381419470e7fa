//! What a CPU was doing when an NMI, or the end, came: context by context, and for how long it had not scheduled.
//!
//! [`contexts`] reads a backtrace; [`PreemptCount`] and [`Times`] read per-CPU memory. Evidence of NMIs before the last
//! is in `old`. Refuses to say when: times are of the scheduler's and the timers' own clocks. Source:
//! `include/linux/preempt.h`, `arch/x86/include/asm/preempt.h`, `kernel/sched/core.c`, `kernel/time/tick-sched.c`.

mod old;
mod report;

pub use old::{LoggedBacktrace, OldNmi};
pub use report::{Nested, Report, TornBy};

use super::stack::{Ended, Event, Segment, Trace};
use super::{CpuId, Kernel};
use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::unwind::{Frame, Regs};
use std::fmt;

/// The interrupt flag in `eflags`.
const IF: u64 = 1 << 9;
/// Callers kept of each context: a loop that calls something each time round is not far.
const CALLERS: usize = 3;
/// Functions in which softirqs run: the first since about v6.10, the second before.
const SOFTIRQ: [&str; 2] = ["handle_softirqs", "__do_softirq"];
/// The loop of the idle tasks.
const IDLE: [&str; 2] = ["do_idle", "cpu_startup_entry"];

/// What kind of code runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Context {
    /// A program.
    User,
    /// The kernel for a task, or a kernel thread.
    Task,
    /// An idle task.
    Idle,
    /// A softirq.
    Softirq,
    /// A hard interrupt.
    Hardirq,
    /// A fault or trap.
    Exception,
    /// An NMI.
    Nmi,
    /// The kernel's entry or exit code, with something of the user's still loaded.
    EntryGap,
}

impl Context {
    /// A short fixed name.
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Task => "task",
            Self::Idle => "idle",
            Self::Softirq => "softirq",
            Self::Hardirq => "hardirq",
            Self::Exception => "exception",
            Self::Nmi => "NMI",
            Self::EntryGap => "entry gap",
        }
    }
}

/// One context that a CPU is in, and how it stood there.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// Which.
    pub context: Context,
    /// What began it: the interrupt, fault or system call; `None` at the root.
    pub by: Option<Event>,
    /// The pc in it: where it was interrupted by the level before, or is.
    pub pc: u64,
    /// Its registers there.
    pub regs: Regs,
    /// Whether these are the registers at `pc`, not what is left of them behind a call.
    pub exact: bool,
    /// Whether interrupts were on; `None` where `eflags` is not known.
    pub irqs_on: Option<bool>,
    /// What is left of the registers of the functions that called, innermost first; a few of them.
    pub callers: Vec<Regs>,
}

impl Level {
    /// The context that `frames` are of, innermost first.
    fn new(context: Context, by: Option<Event>, frames: &[&Frame]) -> Option<Self> {
        let (frame, callers) = frames.split_first()?;
        let flags = frame.regs.get(Reg::Eflags).filter(|_| frame.exact);
        Some(Self {
            context,
            by,
            pc: frame.pc,
            regs: frame.regs,
            exact: frame.exact,
            irqs_on: flags.map(|flags| flags & IF != 0),
            callers: callers.iter().take(CALLERS).map(|frame| frame.regs).collect(),
        })
    }

    fn user(context: Context, pc: Option<u64>, regs: &Regs) -> Self {
        let irqs_on = regs.get(Reg::Eflags).map(|flags| flags & IF != 0);
        let pc = pc.or_else(|| regs.pc()).unwrap_or(0);
        Self { context, by: None, pc, regs: *regs, exact: true, irqs_on, callers: Vec::new() }
    }
}

/// The contexts that a CPU is in, innermost first. `is_idle`: of an idle task.
pub fn contexts(kernel: &Kernel, trace: &Trace, is_idle: bool) -> Vec<Level> {
    let mut levels = Vec::new();
    let mut frames: Vec<&Frame> = Vec::new();
    for (i, segment) in trace.segments.iter().enumerate() {
        frames.extend(&segment.frames);
        let is_last = i + 1 == trace.segments.len();
        if segment.boundary.is_some() || is_last {
            add(kernel, &mut levels, &frames, segment, is_idle);
            frames.clear();
        }
    }
    match &trace.ended {
        Ended::User(regs) => levels.push(Level::user(Context::User, None, regs)),
        Ended::EntryGap { pc, user } => {
            levels.push(Level::user(Context::EntryGap, Some(*pc), user));
            levels.push(Level::user(Context::User, None, user));
        }
        _ => {}
    }
    levels
}

/// Adds the context that `frames` are of, which `segment` ends: two, if a softirq runs in it.
fn add(kernel: &Kernel, levels: &mut Vec<Level>, frames: &[&Frame], segment: &Segment, is_idle: bool) {
    let by = segment.boundary.as_ref().map(|boundary| boundary.event);
    let is_in = |frame: &Frame, names: &[&str]| {
        let symbol = kernel.symbolize(VirtAddr(frame.lookup_pc()));
        symbol.is_some_and(|symbol| symbol.module.is_none() && names.contains(&symbol.name))
    };
    let outer = match by {
        Some(Event::Nmi) => Context::Nmi,
        Some(Event::Irq(_)) => Context::Hardirq,
        Some(Event::Exception(2, _)) => Context::Nmi,
        Some(Event::Exception(..)) => Context::Exception,
        Some(Event::Probe) => return merge(levels, frames),
        _ if is_idle && frames.iter().any(|frame| is_in(frame, &IDLE)) => Context::Idle,
        _ => Context::Task,
    };
    match frames.iter().rposition(|frame| is_in(frame, &SOFTIRQ)) {
        Some(softirq) => {
            levels.extend(Level::new(Context::Softirq, by, frames));
            // On the way out of an interrupt that is over: the softirq is what it interrupts for.
            if outer != Context::Hardirq {
                levels.extend(Level::new(outer, by, frames.get(softirq + 1..).unwrap_or_default()));
            }
        }
        None => levels.extend(Level::new(outer, by, frames)),
    }
}

/// What a probe interrupted is no context of its own: the code behind the probe goes on as if called.
fn merge(levels: &mut Vec<Level>, frames: &[&Frame]) {
    levels.extend(Level::new(Context::Exception, Some(Event::Probe), frames));
}

/// `preempt_count()` of a CPU, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PreemptCount {
    /// As it is in memory.
    pub raw: u64,
    /// How often preemption was switched off.
    pub preempt: u32,
    /// How often softirqs were.
    pub softirqs_off: u32,
    /// A softirq is being served.
    pub in_softirq: bool,
    /// How often interrupts were switched off and counted; always 0 where the kernel does not count them.
    pub irqs_off: u32,
    /// Hard interrupts on top of one another; an NMI counts as one, too.
    pub hardirq: u32,
    /// NMIs on top of one another.
    pub nmi: u32,
    /// The scheduler has asked for the CPU.
    pub needs_resched: bool,
}

impl PreemptCount {
    /// An `int`, as it was until about v7.0: preemption, softirqs (8 bits each), hard interrupts, NMIs (4 each). The top
    /// bit is set while nothing needs the CPU (`PREEMPT_NEED_RESCHED`).
    pub fn from_int(raw: u32) -> Self {
        Self::new(raw.into(), (0, raw >> 16 & 0xf, raw >> 20 & 0xf), raw >> 31 == 0)
    }

    /// A `long`: behind softirqs there are 8 bits for how often interrupts were switched off.
    pub fn from_long(raw: u64) -> Self {
        let word = raw as u32;
        Self::new(raw, (word >> 16 & 0xff, word >> 24 & 0xf, word >> 28), raw >> 63 == 0)
    }

    fn new(raw: u64, (irqs_off, hardirq, nmi): (u32, u32, u32), needs_resched: bool) -> Self {
        let word = raw as u32;
        Self {
            raw,
            preempt: word & 0xff,
            // Switched off by twos; the ones are for serving.
            softirqs_off: word >> 9 & 0x7f,
            in_softirq: word >> 8 & 1 != 0,
            irqs_off,
            hardirq,
            nmi,
            needs_resched,
        }
    }

    /// Whether nothing is counted. That says not that the task may lose the CPU: interrupts can be off all the same, and
    /// a kernel may not preempt itself at all (without `CONFIG_PREEMPTION`, or with `preempt=none` or `voluntary`).
    pub fn is_zero(self) -> bool {
        !self.in_softirq
            && [self.preempt, self.softirqs_off, self.irqs_off, self.hardirq, self.nmi]
                .iter()
                .all(|&n| n == 0)
    }
}

impl fmt::Display for PreemptCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            ("NMI", self.nmi),
            ("hardirq", self.hardirq),
            ("in softirq", self.in_softirq.into()),
            ("interrupts off", self.irqs_off),
            ("softirqs off", self.softirqs_off),
            ("preemption off", self.preempt),
            ("nothing counted", self.is_zero().into()),
            ("reschedule wanted", self.needs_resched.into()),
        ];
        write!(f, "{:#x}:", self.raw)?;
        for (i, (name, count)) in counts.into_iter().filter(|(_, count)| *count != 0).enumerate() {
            write!(f, "{} {name}", if i == 0 { "" } else { "," })?;
            if count > 1 {
                write!(f, " ×{count}")?;
            }
        }
        Ok(())
    }
}

/// How long ago things happened on a CPU, in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Times {
    /// Since the task that runs was given the CPU.
    pub since_schedule: Option<u64>,
    /// Since the run queue's clock was brought up to date: at each tick and each schedule.
    pub since_clock: Option<u64>,
    /// Since the last tick, at least; `None` while ticks are stopped, or where the tick's timer tells nothing.
    pub since_tick: Option<u64>,
    /// The tick is stopped: idle, or `nohz_full`.
    pub tick_stopped: Option<bool>,
}

impl Kernel {
    /// The preemption count of `cpu`.
    pub fn preempt_count(&self, cpu: CpuId) -> Option<PreemptCount> {
        // pcpu_hot from Linux commit 64701838bf05 ("x86/percpu: Move preempt_count next to current_task") (in v6.2) until
        // about v6.15; a variable of its own before and after.
        let at = match self.per_cpu("pcpu_hot", cpu) {
            Some(hot) => hot.wrapping_add(self.member("pcpu_hot", "preempt_count")?.offset),
            None => self.per_cpu("__preempt_count", cpu)?,
        };
        // Since about v7.0 it is a long.
        let size = self.variable_type("__preempt_count").and_then(|ty| self.types()?.size(ty));
        match size {
            Some(8) => self.read_u64(at).map(PreemptCount::from_long),
            _ => self.read_u32(at).map(PreemptCount::from_int),
        }
    }

    /// The latest time that any CPU's scheduler or the log knows of, in nanoseconds of the scheduler's clock: as good
    /// as the end.
    pub fn last_sched_clock(&self) -> Option<u64> {
        let log = self.log().ok().and_then(|log| log.iter().map(|record| record.ts_nsec).max());
        let clock = |cpu| self.runqueue(cpu).and_then(|rq| rq.get("clock")).ok();
        self.possible_cpus().into_iter().filter_map(clock).chain(log).max()
    }

    /// How long ago things happened on `cpu`; `now` is [`Self::last_sched_clock`].
    pub fn cpu_times(&self, cpu: CpuId, now: u64) -> Times {
        let mut times = Times::default();
        let ago = |then: u64| now.checked_sub(then).filter(|_| then != 0);
        if let Ok(rq) = self.runqueue(cpu) {
            times.since_clock = rq.get("clock").ok().and_then(ago);
            let task = rq.at("curr").ok().flatten();
            // Without CONFIG_SCHED_INFO the time since it was last accounted has to do, which is at most a tick.
            let arrival = task.and_then(|task| task.get("sched_info.last_arrival").ok());
            times.since_schedule = arrival.and_then(ago);
        }
        let ticks = self.per_cpu("tick_cpu_sched", cpu).and_then(|at| self.object("tick_sched", at).ok());
        let Some(ticks) = ticks else { return times };
        // Since about v6.9 the flags are bits of a word: TS_FLAG_STOPPED is the second.
        const FLAG_STOPPED: u64 = 2;
        let stopped = ticks.get("tick_stopped").ok().map(|stopped| stopped != 0);
        times.tick_stopped = stopped.or_else(|| Some(ticks.get("flags").ok()? & FLAG_STOPPED != 0));
        let Ok(clock) = self.clock() else { return times };
        let Some(period) = clock.hz.and_then(|hz| 1_000_000_000u64.checked_div(hz.into())) else {
            return times;
        };
        let next = ["sched_timer.node.expires", "sched_timer._softexpires"].iter();
        let next = next.filter_map(|path| ticks.get(path).ok()).find(|&next| next != 0 && next >> 63 == 0);
        if let (Some(next), Some(false)) = (next, times.tick_stopped) {
            // The tick's timer is of the monotonic clock, whose last update is in the timekeeper. That may be long before
            // the end: if the CPU that brings it up to date hangs, it stands still. But each tick brings the run queue's
            // clock up to date, too, so the last is no later than that.
            let since = clock.monotonic.checked_sub(next.saturating_sub(period));
            times.since_tick = since.map(|since| since.max(times.since_clock.unwrap_or(0)));
        }
        times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The masks are those of `include/linux/preempt.h`.
    #[test]
    fn preempt_counts() {
        let shown = |raw| PreemptCount::from_int(raw).to_string();
        assert_eq!(shown(0x8000_0000), "0x80000000: nothing counted");
        assert_eq!(shown(0x8000_0001), "0x80000001: preemption off");
        assert_eq!(shown(0x0000_0002), "0x2: preemption off ×2, reschedule wanted");
        assert_eq!(shown(0x8000_0200), "0x80000200: softirqs off");
        assert_eq!(shown(0x8000_0100), "0x80000100: in softirq");
        let all = "0x80110301: NMI, hardirq, in softirq, softirqs off, preemption off";
        assert_eq!(shown(0x8011_0301), all);
        assert!(!PreemptCount::from_int(0x8001_0000).is_zero());
        let long = PreemptCount::from_long(0x8000_0000_1202_0103).to_string();
        assert_eq!(
            long,
            "0x8000000012020103: NMI, hardirq ×2, in softirq, interrupts off ×2, preemption off ×3"
        );
        assert!(PreemptCount::from_long(0).needs_resched);
    }
}
