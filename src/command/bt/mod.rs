//! `bt`: backtraces of tasks and CPUs.
//!
//! The letters and the look are crash's; what crash does not have is spelled out. Knows no stack: `kernel::stack` walks.

mod group;
mod json;
mod remains;
mod render;
mod user;
mod views;

use super::args::{self, Options, number_of_cpu};
use super::{Command, CommandError, Context, Form, Output, object, printable};
use crate::addr::VirtAddr;
use crate::kernel::sched::TaskInfo;
use crate::kernel::stack::{BATCH, Trace, Tracer};
use crate::kernel::{CpuId, Kernel};
use crate::parallel;
use render::{Renderer, Style};
use serde_json::Value;
use std::borrow::Cow;

pub const COMMAND: Command = Command {
    name: "bt",
    arguments: "[-a [-n idle]|-c CPUS|-p|-g|-v] [-l] [-f|-F] [-s] [-x|-d] [-r] [-R REF] [-I PC -S SP] [-t|-T|-e|-E|-u|--group] [--why] [PID|TASK]...",
    summary: "backtraces of tasks and CPUs, across all stacks down to user mode",
    help: "Without PID or TASK (the address of a task_struct): of the task chosen with 'set', else of the CPU selected in gdb.\n\n\
           -a: of every CPU, with -n idle of those that are not idle; -c CPUS: of some (0,2-3); -p: of the CPU that \
           panicked; -g: of all threads of the task's process.\n\
           -l: source lines, and functions that were inlined (needs DWARF; of modules, too, where their debug files are).\n\
           -f: the words of each frame; -F: with names for them: symbols, per-CPU variables; -r: all words of the stack.\n\
           -s: symbols with offsets, -d in decimal.\n\
           -R: only those that have a symbol, an address or a module in their backtrace.\n\
           -I, -S: starts at another pc or stack pointer.\n\
           -v: tasks whose stack has overflowed: its end marker is gone, or it was left.\n\
           --why: how each frame was found.\n\
           -t: addresses of code on the stack above the stack pointer, -T: on all of it; -e: saved registers on it, -E: on \
           the interrupt and exception stacks of all CPUs. They may be old.\n\
           -u: the user stack, where the pages for it are present.\n\
           --group: identical backtraces of all tasks, or of those chosen as in foreach (UN, a name), once for all that \
           have them.\n\n\
           A frame that is a guess is marked '?'. A CPU that was in user mode has its user registers and no kernel frames.\n\n\
           Examples:\n  bt\n  bt -a\n  bt -l 1\n  bt -c 0-1 --why\n  foreach UN bt\n",
    run,
};

const OPTIONS: &[&str] = &[
    "a", "c:", "p", "g", "v", "n:", "l", "f", "F", "s", "x", "d", "r", "R:", "I:", "S:", "-why", "t", "T",
    "e", "E", "u", "-group",
];

/// Options that say of whom, of which one is enough; and those of them behind which no task may stand.
const OF_WHOM: [&str; 7] = ["a", "c", "p", "g", "E", "v", "-group"];
const OF_NO_TASK: [&str; 5] = ["a", "c", "p", "E", "v"];
/// What is no walk from a task's own registers, so that there is nothing to filter, and nowhere else to start.
const NO_WALK: [&str; 6] = ["t", "T", "e", "E", "u", "v"];

/// Refuses options that would be left out otherwise.
fn check(options: &Options<'_>) -> Result<(), CommandError> {
    let has =
        |names: &[&'static str]| names.iter().copied().filter(|name| options.has(name)).collect::<Vec<_>>();
    let refuse = |text: String| Err(CommandError(text));
    match has(&OF_WHOM).as_slice() {
        // The stacks of some CPUs.
        ["c", "E"] => {}
        [one, other, ..] => {
            return refuse(format!("'-{one}' and '-{other}' do not go together"));
        }
        _ => {}
    }
    if let ([name, ..], [task, ..]) = (has(&OF_NO_TASK).as_slice(), options.rest.as_slice()) {
        return refuse(format!("'-{name}' is not about a task, such as '{}'", printable(task)));
    }
    if options.has("n") && !options.has("a") {
        return refuse("'-n' goes with '-a'".into());
    }
    let filters = has(&["R", "I", "S"]);
    if let ([filter, ..], [view, ..]) = (filters.as_slice(), has(&NO_WALK).as_slice()) {
        return refuse(format!("'-{filter}' is about backtraces, which '-{view}' shows none of"));
    }
    if let (true, Some(start)) = (options.has("-group"), has(&["I", "S"]).first()) {
        return refuse(format!("'-{start}' and '--group' do not go together"));
    }
    Ok(())
}

/// What is said where `-R` has left nothing: the answer to a question, and no error.
fn nobody_has(only: &str) -> String {
    format!("no backtrace has '{}' in it\n", printable(only))
}

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let options = Options::read("bt", OPTIONS, true, arguments)?;
    check(&options)?;
    if let Some(output) = views::of(context, &options)? {
        return Ok(output);
    }
    let request = Request::read(context, arguments)?;
    let answers = request.answers(&request.subjects);
    let nobody = request.only.filter(|_| answers.iter().all(Option::is_none));
    let (text, json): (Vec<String>, Vec<Value>) =
        answers.into_iter().flatten().map(|answer| (answer.text, answer.json)).unzip();
    let mut text = nobody.map_or_else(|| text.join("\n"), nobody_has);
    if request.style.lines && request.kernel.debug_info().is_none() {
        text += &request.kernel.why_no_lines(request.kernel.found().text);
        text.push('\n');
    }
    Ok(Output { text, json: object([("traces", Value::Array(json))]) })
}

/// `foreach ... bt`: the answers for many tasks, in their order; `None` for those that -R leaves out.
pub fn for_tasks(
    context: &Context<'_>,
    tasks: &[&TaskInfo],
    arguments: &[&str],
) -> Result<Vec<Option<Output>>, CommandError> {
    let options = Options::read("bt", OPTIONS, true, arguments)?;
    check(&options)?;
    let addresses: Vec<VirtAddr> = tasks.iter().map(|task| task.at).collect();
    if let Some(outputs) = views::of_tasks(context, &options, &addresses)? {
        return Ok(outputs.into_iter().map(Some).collect());
    }
    let request = Request::read(context, arguments)?;
    let subjects: Vec<Subject<'_>> = tasks.iter().copied().map(Subject::Known).collect();
    Ok(request.answers(&subjects))
}

/// Of what a backtrace is wanted.
#[derive(Clone, Copy)]
enum Subject<'t> {
    Task(VirtAddr),
    /// A task that has been read.
    Known(&'t TaskInfo),
    Cpu(CpuId),
}

/// What was asked for.
struct Request<'a> {
    kernel: &'a Kernel,
    tracer: Tracer<'a>,
    style: Style,
    form: Form,
    subjects: Vec<Subject<'static>>,
    /// `-R`
    only: Option<&'a str>,
    /// `-I`, `-S`
    from: (Option<u64>, Option<u64>),
}

impl<'a> Request<'a> {
    fn read(context: &Context<'a>, arguments: &[&'a str]) -> Result<Self, CommandError> {
        let options = Options::read("bt", OPTIONS, true, arguments)?;
        let kernel = context.kernel()?;
        let no_kernel = || CommandError("no kernel was found; see 'info'".into());
        let tracer = Tracer::new(context.machine).ok_or_else(no_kernel)?;
        let number = |name| options.value(name).map(args::hexadecimal).transpose();
        if let Some(other) = options.value("n").filter(|what| *what != "idle") {
            return Err(CommandError(format!("'-n' takes idle, not '{}'", printable(other))));
        }
        Ok(Self {
            kernel,
            style: Style::read(&options),
            form: context.form,
            subjects: subjects(context, &options)?,
            only: options.value("R"),
            from: (number("I")?, number("S")?),
            tracer,
        })
    }

    fn answers(&self, subjects: &[Subject<'_>]) -> Vec<Option<Output>> {
        let reader = self.kernel.task_reader().ok();
        let renderer = || Renderer::new(self.kernel, self.style);
        parallel::map_with(subjects, BATCH, renderer, |renderer, subject| {
            let trace = self.trace(subject);
            if self.only.is_some_and(|only| !renderer.mentions(&trace, only)) {
                return None;
            }
            let read = || trace.task.and_then(|task| Some(Cow::Owned(reader.as_ref()?.read(task))));
            let info: Option<Cow<'_, TaskInfo>> = match *subject {
                Subject::Known(info) => Some(Cow::Borrowed(info)),
                Subject::Task(_) | Subject::Cpu(_) => read(),
            };
            let info = info.as_deref();
            Some(Output::of(self.form, || renderer.text(&trace, info), || renderer.json(&trace, info)))
        })
    }

    fn trace(&self, subject: &Subject<'_>) -> Trace {
        let (cpu, task) = match *subject {
            Subject::Task(task) | Subject::Known(&TaskInfo { at: task, .. }) => {
                (self.tracer.running_on(task), Some(task))
            }
            Subject::Cpu(cpu) => (Some(cpu), None),
        };
        match (self.from, cpu, task) {
            ((None, None), _, Some(task)) => match subject {
                Subject::Known(info) => self.tracer.task_read(info),
                Subject::Task(_) | Subject::Cpu(_) => self.tracer.task(task),
            },
            ((None, None), Some(cpu), None) => self.tracer.cpu(cpu),
            ((pc, sp), cpu, task) => self.tracer.from(cpu, task, pc, sp),
        }
    }
}

fn subjects(context: &Context<'_>, options: &Options<'_>) -> Result<Vec<Subject<'static>>, CommandError> {
    let kernel = context.kernel()?;
    let all_cpus = || context.machine.cpus().iter().map(|cpu| cpu.id);
    if options.has("a") {
        let is_idle = |cpu: &CpuId| kernel.current(*cpu).is_some_and(|task| task.pid == Some(0));
        let leave_out_idle = options.has("n");
        return Ok(all_cpus().filter(|cpu| !leave_out_idle || !is_idle(cpu)).map(Subject::Cpu).collect());
    }
    if let Some(cpus) = options.value("c") {
        return Ok(cpus_of(context, cpus)?.into_iter().map(Subject::Cpu).collect());
    }
    if options.has("p") {
        let cpu = kernel.panic_cpu();
        let cpu = cpu.ok_or_else(|| CommandError("no CPU panicked; choose one with 'bt -c CPU'".into()))?;
        return Ok(vec![Subject::Cpu(cpu)]);
    }
    let mut tasks = super::task::chosen(context, &options.rest)?;
    if options.has("g") {
        let groups: Vec<u64> = tasks.iter().filter_map(|task| task.get("tgid").ok()).collect();
        tasks = kernel.tasks()?.tasks;
        tasks.retain(|task| task.get("tgid").is_ok_and(|group| groups.contains(&group)));
    } else if options.rest.is_empty() && context.task.is_none() && context.focus.task.get().is_none() {
        return Ok(vec![Subject::Cpu(context.cpu)]);
    }
    Ok(tasks.into_iter().map(|task| Subject::Task(task.at)).collect())
}

/// `0,2-3`; `a` or `all` are all.
pub(super) fn cpus_of(context: &Context<'_>, text: &str) -> Result<Vec<CpuId>, CommandError> {
    if matches!(text, "a" | "all") {
        return Ok(context.machine.cpus().iter().map(|cpu| cpu.id).collect());
    }
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number_of_cpu(context, first)?, number_of_cpu(context, last)?);
        if first > last {
            return Err(CommandError(format!("'{}' is no range of CPUs", printable(part))));
        }
        cpus.extend((first.0..=last.0).map(CpuId));
    }
    Ok(cpus)
}
