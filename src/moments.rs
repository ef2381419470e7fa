//! A machine at the moment in which a command is run: a dump stays what it is, a guest is looked at anew.

use anyhow::Context;
use kstub::addr::{PAGE_SIZE, PhysAddr, VirtAddr};
use kstub::backend::live::{LiveControl, LiveError, RunState};
use kstub::backend::{Copies, Overlay};
use kstub::command::{CommandError, Output};
use kstub::kernel::{CpuId, Machine};
use serde_json::Value;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a command is run that met a contradiction while the guest ran: in any case, and at most.
const TRIES: Range<usize> = 3..20;

/// How long it is tried again that has been tried often enough.
const PATIENCE: Duration = Duration::from_millis(500);

/// More memory than what is copied of a guest should take, in pages.
const PAGES_MAX: usize = 1 << 16;

type Answer = Result<Output, CommandError>;

/// How a command is to be run on a guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// While it runs, again if need be.
    Looking,
    /// Stopped for the moment.
    Pausing,
    /// Once: the command does something.
    Once,
}

/// Runs `command` on `machine`, at this moment if it is a guest.
pub fn run(machine: &Machine, how: How, command: impl Fn(&Machine) -> Answer) -> anyhow::Result<Answer> {
    let Some(live) = machine.backend().live() else { return Ok(command(machine)) };
    if how == How::Once {
        return Ok(command(&machine.again(live.snapshot()?)));
    }
    if how == How::Pausing {
        let (machine, stood) = frozen(machine, live)?;
        if let Some(stood) = stood {
            eprintln!("kstub: the guest stood for {:.1} ms", stood.as_secs_f64() * 1e3);
        }
        return Ok(command(&machine));
    }
    let start = Instant::now();
    let mut tried = 0;
    let mut best: Option<(usize, Answer)> = None;
    // A command that fails most often would always: no name, no such task.
    let in_parts = |best: &Option<(usize, Answer)>| best.as_ref().is_some_and(|(_, answer)| answer.is_ok());
    while tried < TRIES.start || in_parts(&best) && tried < TRIES.end && start.elapsed() < PATIENCE {
        let answer = command(&machine.again(live.snapshot()?));
        tried += 1;
        let found = contradictions(&answer);
        if found == 0 || live.run_state()? != RunState::Running {
            return Ok(answer);
        }
        if best.as_ref().is_none_or(|(fewest, _)| found < *fewest) {
            best = Some((found, answer));
        }
    }
    let (_, answer) = best.context("nothing was tried")?;
    if answer.is_ok() {
        eprintln!(
            "kstub: the guest went on while this was read, {tried} times: what does not fit together may have changed \
             meanwhile (--pause stops the guest for the moment)"
        );
    }
    Ok(answer)
}

/// How many things did not fit together. A command that failed may have met one: it is not known why it did.
fn contradictions(answer: &Answer) -> usize {
    match answer {
        Ok(output) => in_json(&output.json),
        Err(_) => usize::MAX,
    }
}

/// Problems that lists name, and what backtraces had to guess or are short of.
fn in_json(json: &Value) -> usize {
    match json {
        Value::Array(values) => values.iter().map(in_json).sum(),
        Value::Object(fields) => {
            let of = |(name, value): (&String, &Value)| match (name.as_str(), value) {
                ("problems", Value::Array(problems)) => problems.len(),
                ("guessed", Value::Number(frames)) => {
                    frames.as_u64().and_then(|frames| frames.try_into().ok()).unwrap_or(0)
                }
                ("how", Value::String(end)) if end == "broken" => 1,
                _ => in_json(value),
            };
            fields.iter().map(of).sum()
        }
        _ => 0,
    }
}

/// The machine with the registers and the stacks of its CPUs at one moment, for which it was stopped, and for how
/// long; `None` if it stood anyway.
fn frozen(machine: &Machine, live: &dyn LiveControl) -> Result<(Machine, Option<Duration>), LiveError> {
    // What takes time and does not change is found before.
    let mut copies = Copies::with_room(&pages_of(machine, ranges_of_cpus(machine)));
    pages_of(machine, ranges_of_tasks(machine));
    let glimpse = live.glimpse(&mut |standing| {
        copies.fill(&**standing);
        let now = machine.again(Arc::clone(standing));
        copies.add(&**standing, pages_of(&now, ranges_of_tasks(&now)));
    })?;
    Ok((machine.again(Arc::new(Overlay::new(glimpse.machine, copies))), glimpse.stood))
}

/// Where the CPUs' own stacks and per-CPU variables are.
fn ranges_of_cpus(machine: &Machine) -> Vec<Range<u64>> {
    let Some(kernel) = machine.kernel() else { return Vec::new() };
    let of_cpu = |cpu: CpuId| {
        let per_cpu = || {
            let template = kernel.per_cpu_template()?;
            let start = kernel.per_cpu_pointer(template.start, cpu)?;
            Some(start.0..start.0.saturating_add(template.end.offset_from(template.start)?))
        };
        let stacks = kernel.cpu_stacks(cpu).into_iter().map(|stack| stack.start..stack.end);
        stacks.chain(per_cpu()).collect::<Vec<_>>()
    };
    machine.cpus().iter().flat_map(|cpu| of_cpu(cpu.id)).collect()
}

/// Where the tasks that the CPUs run are, and their stacks.
fn ranges_of_tasks(machine: &Machine) -> Vec<Range<u64>> {
    let Some(kernel) = machine.kernel() else { return Vec::new() };
    let size =
        kernel.types().and_then(|types| types.size(types.composite("task_struct")?)).unwrap_or(PAGE_SIZE);
    let tasks = machine.cpus().iter().filter_map(|cpu| Some(kernel.current(cpu.id)?.at));
    let of_task = |task: VirtAddr| {
        let stack = kernel.task_stack(task).map(|stack| stack.start..stack.end);
        stack.into_iter().chain(std::iter::once(task.0..task.0.saturating_add(size)))
    };
    tasks.flat_map(of_task).collect()
}

/// The physical pages of ranges of virtual addresses.
fn pages_of(machine: &Machine, ranges: Vec<Range<u64>>) -> BTreeSet<PhysAddr> {
    let Some(kernel) = machine.kernel() else { return BTreeSet::new() };
    let pages = ranges
        .into_iter()
        .flat_map(|range| (range.start - range.start % PAGE_SIZE..range.end).step_by(PAGE_SIZE as usize));
    let phys = |page| {
        let found = kernel.found().space.walk(&**kernel.backend(), VirtAddr(page), &mut |_| ());
        found.ok().map(|found| found.phys.page_start())
    };
    pages.take(PAGES_MAX).filter_map(phys).collect()
}
