//! `set`: which task the commands are about.

use super::args::{self, number_of_cpu};
use super::task::{heading, identity};
use super::{Command, CommandError, Context, Output};
use crate::kernel::sched::State;
use serde_json::{Value, json};

pub const COMMAND: Command = Command {
    name: "set",
    arguments: "[PID|TASK|-c CPU|-p]",
    summary: "choose the task that commands are about, or show it",
    help: "PID is a number, TASK the address of a task_struct; -c chooses the task that ran on a CPU, -p the one that \
           panicked. The choice holds for this session. 'kstub run' takes the CPU of a task that runs for regs, percpu and \
           the like, too; gdb's own selected thread stays.\n\n\
           Examples:\n  set\n  set 1\n  set -c 2\n  set -p\n",
    run,
};

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let on_cpu = |cpu| {
        let task = kernel.current(cpu).map(|task| task.at);
        task.ok_or_else(|| CommandError(format!("which task ran on CPU {cpu} is not known")))
    };
    let task = match arguments {
        [] => context.task()?.at,
        ["-p"] => {
            let cpu = kernel.panic_cpu().ok_or_else(|| {
                CommandError("no CPU panicked; choose a task with 'set PID' or 'set -c CPU'".into())
            })?;
            on_cpu(cpu)?
        }
        ["-c", cpu] => on_cpu(number_of_cpu(context, cpu)?)?,
        [word] if !word.starts_with('-') => args::task(context, word)?.at,
        _ => return Err(CommandError("'set' takes PID, TASK, -c CPU or -p; try 'help set'".into())),
    };
    let info = kernel.task_reader()?.read(task);
    let state = info.state.map_or("unreadable", State::words);
    let runs = info.cpu.and_then(|cpu| kernel.current(cpu)).is_some_and(|current| current.at == task);
    if !arguments.is_empty() {
        context.focus.task.set(Some(task));
        context.focus.cpu.set(info.cpu.filter(|_| runs));
    }
    let text = format!("{}  STATE: {state}{}\n", heading(&info), if runs { ", on its CPU" } else { "" });
    let mut json = identity(&info);
    json.insert("state".into(), json!(info.state.map(|state| state.letter().to_string())));
    json.insert("running".into(), json!(runs));
    Ok(Output { text, json: Value::Object(json) })
}
