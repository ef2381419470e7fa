//! `bt`: backtraces of tasks and CPUs.
//!
//! The letters and the look are crash's; what crash does not have is spelled out. Knows no stack: `kernel::stack` walks.

mod group;
mod remains;
mod render;
mod user;

use super::args::{self, Options};
use super::foreach;
use super::task::identity;
use super::{Command, CommandError, Context, Output, printable};
use crate::addr::VirtAddr;
use crate::kernel::sched::TaskInfo;
use crate::kernel::stack::{Trace, Tracer};
use crate::kernel::{CpuId, Kernel};
use render::{Renderer, Style};
use serde_json::{Value, json};

pub const COMMAND: Command = Command {
    name: "bt",
    arguments: "[-a|-c CPUS|-p|-g|-v] [-n idle] [-l] [-f|-F] [-s] [-x|-d] [-r] [-R REF] [-I PC -S SP] [--why] [PID|TASK]...",
    summary: "backtraces of tasks and CPUs, across all stacks down to user mode",
    help: "Without PID or TASK (the address of a task_struct): of the task chosen with 'set', else of the CPU selected in gdb.\n\n\
           -a: of every CPU, -n idle leaving out those that are idle; -c CPUS: of some (0,2-3); -p: of the task that \
           panicked; -g: of all threads of the task's process.\n\
           -l: source lines, and functions that were inlined (needs DWARF).\n\
           -f: the words of each frame; -F: with symbols, per-CPU variables and slab caches for them; -r: all words of \
           the stack.\n\
           -s: symbols with offsets, -d in decimal.\n\
           -R: only of tasks that have a symbol, an address or a module in their backtrace.\n\
           -I, -S: starts at another pc and stack pointer.\n\
           -v: tasks whose stack has overflowed, by its end marker and by the pointers.\n\
           --why: how each frame was found.\n\
           -t: addresses of code on the stack above the stack pointer, -T: on all of it; -e: saved registers on it, -E: on \
           the interrupt and exception stacks of all CPUs. They may be old.\n\
           -u: the user stack, where the pages for it are present.\n\
           --group: identical backtraces of all tasks, or of those chosen as in foreach (UN, a name), once for all that \
           have them.\n\n\
           A frame that is a guess is marked '?'. A CPU that was in user mode has its user registers and no kernel \
           frames.\n\n\
           Examples:\n  bt\n  bt -a\n  bt -l 1\n  bt -c 0-1 --why\n  foreach UN bt\n",
    run,
};

const OPTIONS: &[&str] = &[
    "a",
    "c:",
    "p",
    "g",
    "v",
    "n:",
    "l",
    "f",
    "F",
    "s",
    "x",
    "d",
    "r",
    "R:",
    "I:",
    "S:",
    "-why",
    "t",
    "T",
    "e",
    "E",
    "u",
    "-group",
    "-parallel",
];

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read("bt", OPTIONS, true, arguments)?;
    let kernel = context.kernel()?;
    let tracer = Tracer::new(context.machine).ok_or_else(|| CommandError("no kernel was found".into()))?;
    let reader = kernel.task_reader()?;
    let style = Style::read(&options);
    let renderer = Renderer { kernel, style, tracer: &tracer };
    if let Some(output) = other_views(context, &options, &tracer, &renderer)? {
        return Ok(output);
    }
    let subjects = subjects(context, &options, &tracer)?;
    let trace = |subject: &Subject| match subject {
        Subject::Task(task) => tracer.task(*task),
        Subject::Cpu(cpu) => tracer.cpu(*cpu),
    };
    let answer = |subject: &Subject| {
        let trace = trace(subject);
        let info = trace.task.map(|task| reader.read(task));
        Answer { text: renderer.text(&trace, info.as_ref()), json: renderer.json(&trace, info.as_ref()) }
    };
    let answers = tracer.map(&subjects, answer);
    let _ = (kernel, printable as fn(&str) -> String, identity as fn(&TaskInfo) -> _);
    let text: Vec<String> = answers.iter().map(|answer| answer.text.clone()).collect();
    let json: Vec<Value> = answers.into_iter().map(|answer| answer.json).collect();
    Ok(Output { text: text.join("\n"), json: json!({ "traces": json }) })
}

/// Those that are no backtraces in the usual shape.
fn other_views(
    context: &Context<'_>,
    options: &Options<'_>,
    tracer: &Tracer<'_>,
    renderer: &Renderer<'_>,
) -> Result<Option<Output>, CommandError> {
    let kernel = context.kernel()?;
    let every = || -> Result<Vec<VirtAddr>, CommandError> {
        Ok(kernel.tasks()?.tasks.into_iter().map(|task| task.at).collect())
    };
    if options.has("E") {
        let cpus: Vec<CpuId> = context.machine.cpus().iter().map(|cpu| cpu.id).collect();
        return remains::of_cpus(context, &cpus).map(Some);
    }
    if options.has("v") {
        return remains::overflows(context, tracer, &every()?).map(Some);
    }
    if options.has("-group") {
        let reader = kernel.task_reader()?;
        let tasks = match options.rest.as_slice() {
            [] => every()?,
            selectors => foreach::chosen(context, selectors)?,
        };
        let traced = tracer.map(&tasks, |task| (reader.read(*task), tracer.task(*task)));
        return Ok(Some(group::output(&traced, renderer)));
    }
    if !["t", "T", "e", "u"].iter().any(|letter| options.has(letter)) {
        return Ok(None);
    }
    let mut tasks = Vec::new();
    for subject in subjects(context, options, tracer)? {
        match subject {
            Subject::Task(task) => tasks.push(task),
            Subject::Cpu(cpu) => tasks.extend(kernel.current(cpu).map(|task| task.at)),
        }
    }
    let output = match options.has("u") {
        true => user::output(context, tracer, &tasks, options.has("-why")),
        false => remains::of_tasks(context, options, tracer, &tasks),
    };
    output.map(Some)
}

/// Of what a backtrace is wanted.
enum Subject {
    Task(VirtAddr),
    Cpu(CpuId),
}

struct Answer {
    text: String,
    json: Value,
}

fn subjects(
    context: &Context<'_>,
    options: &Options<'_>,
    tracer: &Tracer<'_>,
) -> Result<Vec<Subject>, CommandError> {
    let kernel = context.kernel()?;
    let _ = tracer;
    if options.has("a") {
        return Ok(context.machine.cpus().iter().map(|cpu| Subject::Cpu(cpu.id)).collect());
    }
    let _ = kernel as &Kernel;
    let mut all = Vec::new();
    for word in &options.rest {
        all.push(Subject::Task(args::task(context, word)?.at));
    }
    if all.is_empty() {
        all.push(Subject::Task(context.task()?.at));
    }
    Ok(all)
}

#[allow(dead_code)]
fn unused(_: &Trace) {}
