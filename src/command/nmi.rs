//! `nmi`: what each CPU was doing when an NMI, or the end, came.

use super::args::Options;
use super::bt::cpus_of;
use super::{Command, CommandError, Context, Output, cpu, printable};
use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::kernel::nmi::{
    Context as Kind, Level, LoggedBacktrace, Nested, OldNmi, PreemptCount, Report, Times, TornBy,
};
use crate::kernel::spin::{Owner, Spin, Verdict, Word};
use crate::kernel::stack::{Event, Tracer};
use crate::kernel::{Cpu, CpuId, Kernel};
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "nmi",
    arguments: "[-l] [CPUS]...",
    summary: "what each CPU was doing when an NMI, or the end, came; and whether it was spinning",
    help: "For each CPU: the context that it was torn from (user, task, idle, softirq, hardirq, exception, entry gap), \
           whether interrupts were on there, the preemption count, how long ago it had scheduled and ticked.\n\n\
           'spinning' is by the code around the pc: what the loop waits for, with the lock's address, value and place, \
           who is queued for it, and the owner where the kernel records one. A loop in user mode is not called \
           spinning.\n\n\
           CPUS are a for all (the default), or numbers and ranges such as 2,4-5.\n\n\
           What is marked 'old' was left by an NMI before, and says nothing of the end.\n\n\
           -l   with the backtraces by NMI that are in the log\n\n\
           Examples:\n  nmi\n  nmi 3\n  nmi 0,2-3\n  nmi -l\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read("nmi", &["l"], true, arguments)?;
    let kernel = context.kernel()?;
    let tracer = Tracer::new(context.machine).ok_or_else(|| CommandError("no kernel was found".into()))?;
    let mut chosen: Vec<CpuId> = Vec::new();
    for word in &options.rest {
        chosen.extend(cpus_of(context, word)?);
    }
    let cpus: Vec<&Cpu> = match options.rest.is_empty() {
        true => context.machine.cpus().iter().collect(),
        false => chosen.iter().map(|&id| cpu(context.machine, id)).collect::<Result<_, _>>()?,
    };
    let now = kernel.last_sched_clock();
    let (mut text, mut rows) = (String::new(), Vec::new());
    for cpu in cpus {
        let report = Report::new(kernel, &tracer, cpu, now);
        let show = Show { kernel, context };
        if !text.is_empty() {
            text.push('\n');
        }
        show.text(&mut text, cpu, &report);
        rows.push(show.json(cpu, &report));
    }
    let logged = kernel.logged_backtraces();
    let wanted = |one: &&LoggedBacktrace| options.rest.is_empty() || chosen.contains(&one.cpu);
    let logged: Vec<&LoggedBacktrace> = logged.iter().filter(wanted).collect();
    if !logged.is_empty() {
        let _ = writeln!(text, "\nold, in the log:");
    }
    for one in &logged {
        let seconds = one.ts_nsec as f64 / 1e9;
        let pc = one.pc.as_deref().map_or("pc not logged".to_owned(), printable);
        let idle = if one.was_idle { ", idle" } else { "" };
        let _ = writeln!(text, "  [{seconds:12.6}] CPU {}: {pc}{idle}", one.cpu);
        if options.has("l") {
            for line in &one.lines {
                let _ = writeln!(text, "      {}", printable(line));
            }
        }
    }
    let logged: Vec<Value> = logged.iter().map(|one| logged_json(one)).collect();
    Ok(Output { text, json: json!({ "cpus": rows, "old_in_log": logged }) })
}

fn logged_json(one: &LoggedBacktrace) -> Value {
    json!({ "cpu": one.cpu.0, "ts_nsec": one.ts_nsec, "pc": one.pc, "idle": one.was_idle, "lines": one.lines })
}

struct Show<'a> {
    kernel: &'a Kernel,
    context: &'a Context<'a>,
}

/// Nanoseconds ago.
fn ago(time: u64) -> String {
    match time {
        0..10_000_000 => format!("{:.3} ms ago", time as f64 / 1e6),
        10_000_000..1_000_000_000 => format!("{} ms ago", time / 1_000_000),
        _ => format!("{:.3} s ago", time as f64 / 1e9),
    }
}

/// What began `level`. What runs in a softirq was not begun by what its registers were saved for.
fn begun_by(level: &Level) -> Option<Event> {
    level.by.filter(|_| level.context != Kind::Softirq)
}

impl Show<'_> {
    fn place(&self, pc: u64) -> String {
        self.kernel.symbolize(VirtAddr(pc)).map_or_else(|| format!("{pc:#x}"), |symbol| symbol.to_string())
    }

    fn level(&self, level: &Level) -> String {
        // "NMI (NMI)" says nothing.
        let said = begun_by(level).filter(|by| *by != Event::Nmi && *by != Event::Irq(None));
        let by = said.map_or(String::new(), |by| format!(" ({by})"));
        format!("{}{by}", level.context.name())
    }

    fn text(&self, text: &mut String, cpu: &Cpu, report: &Report) {
        let _ = write!(text, "{}", super::about(cpu));
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<13} {value}");
        };
        let torn = report.torn_by.map(|torn_by| match torn_by {
            TornBy::Nmi if report.trace.parked.is_some() => {
                format!("an NMI: it waits in {}", report.trace.parked.unwrap_or_default())
            }
            TornBy::Nmi => "an NMI, which it still handles".to_owned(),
            TornBy::SavedByNmi => "an NMI, which saved the registers".to_owned(),
            TornBy::Parked(function) => format!("told to stop: it waits in {function}"),
            TornBy::End => "the end itself".to_owned(),
        });
        match report.interrupted() {
            Some(level) => {
                let irqs = match level.irqs_on {
                    Some(true) => ", IRQs on",
                    Some(false) => ", IRQs off",
                    None => "",
                };
                line("was in", format!("{} at {}{irqs}", self.level(level), self.place(level.pc)));
            }
            None => line("was in", format!("not known: {}", report.trace.start.words())),
        }
        if let Some(torn) = torn {
            line("torn by", torn);
        }
        if report.levels.len() > 1 {
            let all: Vec<String> = report.levels.iter().map(|level| self.level(level)).collect();
            line("contexts", all.join(" ← "));
        }
        if let Some(count) = report.preempt_count {
            line("preempt count", count.to_string());
        }
        if let Some(times) = times(&report.times) {
            line("times", times);
        }
        for (i, verdict) in &report.spins {
            let within = match report.levels.get(*i) {
                Some(level) if Some(*i) != report.interrupted => format!("in {}: ", level.context.name()),
                _ => String::new(),
            };
            match verdict {
                Verdict::Not(why) => line("spinning", format!("no: {why}")),
                Verdict::Unknown(why) => line("spinning", format!("not known: {why}")),
                Verdict::Spinning(spin) => {
                    for (n, row) in self.spin(cpu, spin).into_iter().enumerate() {
                        match n {
                            0 => line("spinning", format!("{within}{row}")),
                            _ => line("", row),
                        }
                    }
                }
            }
        }
        if let Some(old) = &report.old {
            line("old", self.old(old, report));
        }
    }

    fn old(&self, old: &OldNmi, report: &Report) -> String {
        let pc = old.regs.get(Reg::Rip).unwrap_or(0);
        let place = match old.regs.in_user_mode() {
            Some(true) => format!("user mode at {pc:#x}"),
            _ => self.place(pc),
        };
        let count = report.nmis.map_or(String::new(), |count| format!(", the last of {count}"));
        let at = old.pt_regs.unwrap_or(old.at);
        match report.nested {
            Some(Nested::Handled) => format!(
                "the NMI that it handles came while it handled one before, at {place} (registers at {at})"
            ),
            Some(Nested::Waiting) => {
                format!("while it handled the NMI another came, at {place}, and waits (registers at {at})")
            }
            None => format!(
                "an NMI before had hit it in {place}{count} (registers at {at}; when is not recorded)"
            ),
        }
    }

    fn spin(&self, cpu: &Cpu, spin: &Spin) -> Vec<String> {
        let function = spin.function.as_deref().map_or("?".to_owned(), printable);
        let bit = spin.bit.map_or(String::new(), |bit| format!(", bit {bit}"));
        let mut rows = vec![format!("{}{bit}, in {function}", spin.kind)];
        if let Some(word) = &spin.word {
            rows.push(word_text("word", word));
        }
        if let Some(queue) = &spin.queue {
            let mut said = vec![if queue.is_locked { "locked" } else { "not locked" }.to_owned()];
            if queue.is_pending {
                let queued = queue.waiters.iter().any(|one| one.cpu == cpu.id);
                let who = if queued { "one" } else { "this one" };
                said.push(format!("{who} waits in front of the queue"));
            }
            if !queue.waiters.is_empty() {
                let all: Vec<String> = queue
                    .waiters
                    .iter()
                    .map(|one| match one.cpu == cpu.id {
                        true => format!("{} (this one)", one.cpu),
                        false => one.cpu.to_string(),
                    })
                    .collect();
                said.push(format!("queue of CPUs: {}", all.join(", ")));
            }
            rows.push(said.join("; "));
        }
        if let Some(word) = &spin.polled {
            rows.push(word_text("looks at", word));
        }
        match &spin.owner {
            Some(Owner::Task(task)) => rows.push(format!("held by {}", self.task(*task))),
            Some(Owner::Cpu(cpu)) => rows.push(format!("up to CPU {cpu}")),
            Some(Owner::Nobody) => rows.push("held by nobody".to_owned()),
            Some(Owner::Unknown(why)) => rows.push(format!("held by: not known: {why}")),
            None => {}
        }
        rows.extend(spin.notes.iter().map(|note| printable(note)));
        rows
    }

    fn task(&self, at: VirtAddr) -> String {
        let task = self.kernel.task(at);
        let on = self
            .context
            .machine
            .cpus()
            .iter()
            .find(|cpu| self.kernel.current(cpu.id).is_some_and(|current| current.at == at));
        let on =
            on.map_or(", which does not run".to_owned(), |cpu| format!(", which runs on CPU {}", cpu.id));
        let pid = task.pid.map_or(String::new(), |pid| format!("pid {pid} "));
        format!("{pid}{} (task {at}){on}", task.comm.as_deref().map_or(String::new(), printable))
    }

    fn json(&self, cpu: &Cpu, report: &Report) -> Value {
        let level = |one: &Level| {
            json!({
                "context": one.context.name(),
                "by": begun_by(one).map(|by| by.to_string()),
                "pc": format!("{:#x}", one.pc),
                "symbol": self.kernel.symbolize(VirtAddr(one.pc)).map(|symbol| symbol.to_string()),
                "irqs_on": one.irqs_on,
            })
        };
        let spins: Vec<Value> =
            report.spins.iter().map(|(i, verdict)| self.verdict_json(*i, verdict)).collect();
        let torn = report.torn_by.map(|torn_by| match torn_by {
            TornBy::Nmi => "nmi",
            TornBy::SavedByNmi => "nmi that saved registers",
            TornBy::Parked(_) => "parked",
            TornBy::End => "end",
        });
        json!({
            "cpu": cpu.id.0,
            "pid": cpu.pid,
            "comm": cpu.comm,
            "torn_by": torn,
            "parked_in": report.trace.parked,
            "was_in": report.interrupted().map(level),
            "contexts": report.levels.iter().map(level).collect::<Vec<_>>(),
            "preempt_count": report.preempt_count.map(preempt_count),
            "times_ns": {
                "since_schedule": report.times.since_schedule,
                "since_tick": report.times.since_tick,
                "since_clock": report.times.since_clock,
                "tick_stopped": report.times.tick_stopped,
            },
            "spinning": spins,
            "nmis": report.nmis,
            "old": report.old.as_ref().map(|old| json!({
                "at": old.at.to_string(),
                "nested": report.nested.is_some(),
                "waits": report.nested == Some(Nested::Waiting),
                "pt_regs": old.pt_regs.map(|at| at.to_string()),
                "registers": old.regs.known().map(|(reg, value)| (reg.name().to_owned(), json!(format!("{value:#x}")))).collect::<serde_json::Map<_, _>>(),
            })),
        })
    }

    fn verdict_json(&self, level: usize, verdict: &Verdict) -> Value {
        let (spinning, why) = match verdict {
            Verdict::Spinning(_) => (Some(true), None),
            Verdict::Not(why) => (Some(false), Some(*why)),
            Verdict::Unknown(why) => (None, Some(*why)),
        };
        let word = |word: &Word| {
            json!({
                "address": word.at.to_string(),
                "size": word.size,
                "value": word.value.map(|value| format!("{value:#x}")),
                "place": word.place,
            })
        };
        let spin = verdict.spin();
        let owner = spin.and_then(|spin| spin.owner.as_ref()).map(|owner| match owner {
            Owner::Task(task) => json!({ "task": task.to_string(), "pid": self.kernel.task(*task).pid }),
            Owner::Cpu(cpu) => json!({ "cpu": cpu.0 }),
            Owner::Nobody => json!({ "nobody": true }),
            Owner::Unknown(why) => json!({ "unknown": why }),
        });
        json!({
            "level": level,
            "spinning": spinning,
            "why": why,
            "kind": spin.map(|spin| spin.kind.to_string()),
            "function": spin.and_then(|spin| spin.function.clone()),
            "word": spin.and_then(|spin| spin.word.as_ref()).map(word),
            "polled": spin.and_then(|spin| spin.polled.as_ref()).map(word),
            "bit": spin.and_then(|spin| spin.bit),
            "queue": spin.and_then(|spin| spin.queue.as_ref()).map(|queue| json!({
                "locked": queue.is_locked,
                "pending": queue.is_pending,
                "cpus": queue.waiters.iter().map(|one| one.cpu.0).collect::<Vec<_>>(),
                "complete": queue.is_complete,
            })),
            "owner": owner,
            "notes": spin.map(|spin| &spin.notes),
        })
    }
}

fn word_text(name: &str, word: &Word) -> String {
    let value = word.value.map_or("cannot be read".to_owned(), |value| format!("is {value:#x}"));
    let place = word.place.as_ref().map_or(String::new(), |place| format!(" <{place}>"));
    format!("{name} {}{place} {value}", word.at)
}

fn times(times: &Times) -> Option<String> {
    let mut said = Vec::new();
    if let Some(time) = times.since_schedule {
        said.push(format!("scheduled {}", ago(time)));
    }
    match (times.since_tick, times.tick_stopped) {
        (Some(time), _) => said.push(format!("ticked {}", ago(time))),
        (None, Some(true)) => said.push("tick stopped".to_owned()),
        _ => {}
    }
    if let Some(time) = times.since_clock {
        said.push(format!("run queue's clock {}", ago(time)));
    }
    (!said.is_empty()).then(|| said.join(", "))
}

/// A `preempt_count()` for JSON.
pub fn preempt_count(count: PreemptCount) -> Value {
    json!({
        "raw": format!("{:#x}", count.raw),
        "preempt": count.preempt,
        "softirqs_off": count.softirqs_off,
        "in_softirq": count.in_softirq,
        "irqs_off": count.irqs_off,
        "hardirq": count.hardirq,
        "nmi": count.nmi,
        "needs_resched": count.needs_resched,
    })
}
