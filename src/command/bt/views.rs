//! Those options of `bt` that show no backtrace in the usual shape.

use super::render::{Renderer, Style};
use super::{Subject, cpus_of, group, remains, subjects, user};
use crate::addr::VirtAddr;
use crate::command::args::Options;
use crate::command::{CommandError, Context, Output, foreach};
use crate::kernel::sched::TaskInfo;
use crate::kernel::stack::{BATCH, Tracer};
use crate::parallel;

/// Options that are about one task at a time.
const OF_TASKS: [&str; 4] = ["t", "T", "e", "u"];

fn tracer<'a>(context: &Context<'a>) -> Result<Tracer<'a>, CommandError> {
    let no_kernel = || CommandError("no kernel was found; see 'info'".into());
    Tracer::new(context.machine).ok_or_else(no_kernel)
}

/// The answer, if `options` ask for one of these.
pub fn of(context: &Context<'_>, options: &Options<'_>) -> Result<Option<Output>, CommandError> {
    let kernel = context.kernel()?;
    let every = || -> Result<Vec<VirtAddr>, CommandError> {
        Ok(kernel.tasks()?.tasks.into_iter().map(|task| task.at).collect())
    };
    if options.has("E") {
        let cpus = match options.value("c") {
            Some(cpus) => cpus_of(context, cpus)?,
            None => context.machine.cpus().iter().map(|cpu| cpu.id).collect(),
        };
        return remains::of_cpus(context, &cpus).map(Some);
    }
    if options.has("v") {
        return remains::overflows(context, &tracer(context)?, &every()?).map(Some);
    }
    if options.has("-group") {
        let tasks = match options.rest.as_slice() {
            [] => every()?,
            selectors => foreach::chosen(context, selectors)?,
        };
        return grouped(context, options, &tasks).map(Some);
    }
    if !OF_TASKS.iter().any(|letter| options.has(letter)) {
        return Ok(None);
    }
    let mut tasks = Vec::new();
    for subject in subjects(context, options)? {
        match subject {
            Subject::Task(task) | Subject::Known(&TaskInfo { at: task, .. }) => tasks.push(task),
            Subject::Cpu(cpu) => tasks.extend(kernel.current(cpu).map(|task| task.at)),
        }
    }
    of_each(context, options, &tracer(context)?, &tasks).map(Some)
}

/// `foreach ... bt`: an answer for each of `tasks`, if `options` ask for one of these; of groups one for all.
pub fn of_tasks(
    context: &Context<'_>,
    options: &Options<'_>,
    tasks: &[VirtAddr],
) -> Result<Option<Vec<Output>>, CommandError> {
    if let Some(name) = ["E", "v"].into_iter().find(|name| options.has(name)) {
        return Err(CommandError(format!("'bt -{name}' is not about a task; use it without 'foreach'")));
    }
    if options.has("-group") {
        return Err(CommandError(
            "use 'bt --group' with what would stand behind 'foreach': bt --group UN".into(),
        ));
    }
    if !OF_TASKS.iter().any(|letter| options.has(letter)) {
        return Ok(None);
    }
    let tracer = tracer(context)?;
    tasks.iter().map(|task| of_each(context, options, &tracer, &[*task])).collect::<Result<_, _>>().map(Some)
}

fn of_each(
    context: &Context<'_>,
    options: &Options<'_>,
    tracer: &Tracer<'_>,
    tasks: &[VirtAddr],
) -> Result<Output, CommandError> {
    match options.has("u") {
        true => user::output(context, tracer, tasks, options.has("-why")),
        false => remains::of_tasks(context, options, tracer, tasks),
    }
}

fn grouped(context: &Context<'_>, options: &Options<'_>, tasks: &[VirtAddr]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let (reader, tracer) = (kernel.task_reader()?, tracer(context)?);
    let mut traced = parallel::map(tasks, BATCH, |task| {
        let info = reader.read(*task);
        let trace = tracer.task_read(&info);
        (info, trace)
    });
    let renderer = Renderer::new(kernel, Style::read(options));
    if let Some(only) = options.value("R") {
        traced.retain(|(_, trace)| renderer.mentions(trace, only));
    }
    let mut output = group::output(&traced, &renderer, context.form);
    if let (Some(only), true) = (options.value("R"), traced.is_empty()) {
        output.text = super::nobody_has(only);
    }
    Ok(output)
}
