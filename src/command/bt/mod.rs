//! `bt`: backtraces of tasks and CPUs.
//!
//! The letters and the look are crash's; what crash does not have is spelled out. Knows no stack: `kernel::stack` walks.

mod render;

use super::args::{self, Options};
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
           --why: how each frame was found.\n\n\
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
    "-parallel",
];

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read("bt", OPTIONS, true, arguments)?;
    let kernel = context.kernel()?;
    let tracer = Tracer::new(context.machine).ok_or_else(|| CommandError("no kernel was found".into()))?;
    let reader = kernel.task_reader()?;
    let style = Style::read(&options);
    let renderer = Renderer { kernel, style, tracer: &tracer };
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
