//! All that is known of one CPU at the end, brought together.
//!
//! Source: see the files beside; `arch/x86/kernel/{nmi,crash,reboot,smp}.c` (who stops CPUs, and how).

use super::{Context, Level, OldNmi, PreemptCount, Times, contexts};
use crate::arch::x86_64::Reg;
use crate::kernel::spin::Verdict;
use crate::kernel::stack::{StackKind, Start, Trace, Tracer};
use crate::kernel::{Cpu, Kernel};
use crate::unwind::Regs;

/// What tore a CPU from what it did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TornBy {
    /// An NMI, which it still handles.
    Nmi,
    /// An NMI, which saved the registers that the dump has.
    SavedByNmi,
    /// It was told to stop by an interrupt, and waits: the function.
    Parked(&'static str),
    /// Nothing: it was stopped from outside, or it made the dump.
    End,
}

/// How an NMI stands that came on top of another: the processor blocks NMIs while it handles one, but any `iret`, of a
/// fault within the handler, lets the next in. The entry code then has the handler go round once more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Nested {
    /// The one that came last is handled: the one before is over.
    Handled,
    /// The one before is handled; the last waits.
    Waiting,
}

/// Whether a context was spinning: in the loop around its pc, or in one that called what it was in.
fn spinning(kernel: &Kernel, level: &Level) -> Verdict {
    let own = kernel.spinning(&level.regs);
    if !matches!(own, Verdict::Not(_)) || level.context == Context::User {
        return own;
    }
    for caller in &level.callers {
        // A loop that retries, or that reads a clock, does its work in what it calls.
        if let Verdict::Spinning(mut spin) = kernel.spinning(caller)
            && spin.pauses
            && spin.kind.is_contention()
        {
            spin.notes.push(format!("it was in a function that the loop calls, at {:#x}", level.pc));
            return Verdict::Spinning(spin);
        }
    }
    own
}

/// One CPU at the end.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its backtrace.
    pub trace: Trace,
    /// The contexts that it is in, innermost first.
    pub levels: Vec<Level>,
    /// What tore it from what it did; `None` if that is not known, for its registers were not saved.
    pub torn_by: Option<TornBy>,
    /// The level that it was torn from: an index of `levels`.
    pub interrupted: Option<usize>,
    /// Whether it was spinning: there, and in the levels below that were spinning as well, by index.
    pub spins: Vec<(usize, Verdict)>,
    /// Its preemption count, as of the end.
    pub preempt_count: Option<PreemptCount>,
    /// How long ago it had scheduled and ticked.
    pub times: Times,
    /// What an NMI before left on the stack; `None` where there was none, or it is the one in the backtrace.
    pub old: Option<OldNmi>,
    /// `old` is of an NMI that came while the CPU handled one: which of the two it is in.
    pub nested: Option<Nested>,
    /// NMIs since boot.
    pub nmis: Option<u64>,
}

impl Report {
    /// What is known of `cpu`. `now` is [`Kernel::last_sched_clock`].
    pub fn new(kernel: &Kernel, tracer: &Tracer<'_>, cpu: &Cpu, now: Option<u64>) -> Self {
        let trace = tracer.cpu(cpu.id);
        let levels = contexts(kernel, &trace, cpu.pid == Some(0));
        let old = kernel.last_nmi(cpu.id);
        let is_of = |regs: &Regs, old: &OldNmi| {
            [Reg::Rip, Reg::Rsp, Reg::Eflags].iter().all(|&reg| regs.get(reg) == old.regs.get(reg))
        };
        let saved_by_nmi = old.as_ref().is_some_and(|old| is_of(&Regs::from_file(&cpu.regs), old));
        let in_trace = old
            .as_ref()
            .is_some_and(|old| trace.boundaries().any(|boundary| is_of(&boundary.saved.regs, old)));
        let nmi = levels.iter().position(|level| level.context == Context::Nmi);
        let hardirq = || levels.iter().position(|level| level.context == Context::Hardirq);
        let (torn_by, handler) = match (nmi, trace.parked) {
            (Some(nmi), _) => (Some(TornBy::Nmi), Some(nmi)),
            (None, Some(function)) => (Some(TornBy::Parked(function)), hardirq()),
            (None, None) if saved_by_nmi => (Some(TornBy::SavedByNmi), None),
            (None, None) if trace.start == Start::NotSaved => (None, None),
            (None, None) => (Some(TornBy::End), None),
        };
        let old = old.filter(|_| !saved_by_nmi && !in_trace);
        let nested = old.as_ref().filter(|_| torn_by == Some(TornBy::Nmi)).and_then(|old| {
            let stack = kernel.cpu_stacks(cpu.id).into_iter().find(|one| one.kind == StackKind::Nmi)?;
            let waiting = if old.repeats { Nested::Waiting } else { Nested::Handled };
            old.regs.sp().filter(|&sp| stack.contains(sp)).map(|_| waiting)
        });
        let first = handler.map_or(0, |handler| handler + 1);
        let interrupted = levels.iter().enumerate().skip(first).find(|(_, one)| one.context != Context::Nmi);
        let interrupted = interrupted.map(|(i, _)| i);
        let mut spins = Vec::new();
        for (i, level) in levels.iter().enumerate().skip(interrupted.unwrap_or(usize::MAX)) {
            let verdict = match level.exact {
                true => spinning(kernel, level),
                false => Verdict::Unknown("its registers at that point were not saved"),
            };
            // The one that it was torn from is always told of; of the others what they wait for.
            if Some(i) == interrupted || verdict.spin().is_some() {
                spins.push((i, verdict));
            }
        }
        Self {
            interrupted,
            spins,
            torn_by,
            preempt_count: kernel.preempt_count(cpu.id),
            times: now.map(|now| kernel.cpu_times(cpu.id, now)).unwrap_or_default(),
            old,
            nested,
            nmis: kernel.nmi_count(cpu.id),
            trace,
            levels,
        }
    }

    /// The level that it was torn from.
    pub fn interrupted(&self) -> Option<&Level> {
        self.levels.get(self.interrupted?)
    }
}
