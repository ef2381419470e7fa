//! `foreach`: a command for each of several tasks.

use super::ps::Tasks;
use super::{Command, CommandError, Context, Focus, Output, find, object, printable};
use crate::addr::VirtAddr;
use crate::kernel::sched::TaskInfo;
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "foreach",
    arguments: "[PID|TASK|NAME|STATE|kernel|user|gleader|active]... COMMAND [ARGUMENT]...",
    summary: "run a command for each of several tasks",
    help: "Without any word before the command: for all tasks but the idle ones. A task is taken if it is one of \
           those named by PID, TASK or NAME (if any are), in one of the states named (RU, IN, UN, ID, ST, TR, ZO, ..., if \
           any are), and all that kernel, user, gleader (first thread of a process) and active (on a CPU) say.\n\n\
           Commands: those that are about a task, such as ps, task, set, files, vm and bt.\n\n\
           Examples:\n  foreach UN bt\n  foreach user files\n  foreach bash vm\n  foreach kernel task -R policy\n",
    run,
};

/// Commands that are about the task chosen with `set`.
const ABOUT_A_TASK: &[&str] = &["bt", "files", "p", "ps", "rd", "set", "sig", "task", "vm", "vtop"];
const STATES: &[&str] = &["RU", "IN", "UN", "ID", "ST", "TR", "ZO", "DE", "PA", "WA", "NE"];

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let is_command = |word: &&str| ABOUT_A_TASK.contains(word) && find(word).is_ok();
    let split = arguments.iter().position(is_command).and_then(|at| arguments.split_at_checked(at));
    let Some((selectors, [command, rest @ ..])) = split else {
        let known: Vec<&str> = ABOUT_A_TASK.iter().copied().filter(|name| find(name).is_ok()).collect();
        return Err(CommandError(format!(
            "'foreach' needs a command that is about a task; there are: {}",
            known.join(", ")
        )));
    };
    let tasks = Tasks::read(context.kernel()?)?;
    let chosen = select(&tasks, selectors)?;
    if chosen.is_empty() {
        return Err(CommandError("no task is all of that; try 'ps'".into()));
    }
    if *command == "ps" {
        // One table of all of them.
        let addresses: Vec<String> = chosen.iter().map(|task| task.at.to_string()).collect();
        let words: Vec<&str> = rest.iter().copied().chain(addresses.iter().map(String::as_str)).collect();
        return (find(command)?.run)(context, &words);
    }
    let (mut text, mut rows) = (String::new(), Vec::new());
    if *command == "bt" {
        // Many at once.
        let answers = super::bt::for_tasks(context, &chosen, rest)?;
        text.reserve_exact(answers.iter().flatten().map(|answer| answer.text.len() + 1).sum());
        for (task, answer) in chosen.iter().zip(answers) {
            let Some(answer) = answer else { continue };
            text += &answer.text;
            text.push('\n');
            if context.form.has_json() {
                rows.push(of_one(task, "result", answer.json));
            }
        }
        return Ok(Output { text, json: of_all(command, rows) });
    }
    for task in chosen {
        let focus = Focus::default();
        focus.task.set(Some(task.at));
        let about = Context { task: Some(task.at), focus: &focus, ..*context };
        let answer = (find(command)?.run)(&about, rest);
        let (key, value) = match answer {
            Ok(answer) => {
                text += &answer.text;
                ("result", answer.json)
            }
            Err(error) => {
                let _ = writeln!(text, "{}{}", super::task::heading(task), printable(&error.0));
                ("error", json!(error.0))
            }
        };
        if !text.ends_with("\n\n") {
            text.push('\n');
        }
        rows.push(of_one(task, key, value));
    }
    Ok(Output { text, json: of_all(command, rows) })
}

fn of_one(task: &TaskInfo, key: &str, value: Value) -> Value {
    let mut row = super::task::identity(task);
    row.insert(key.into(), value);
    Value::Object(row)
}

fn of_all(command: &str, rows: Vec<Value>) -> Value {
    object([("command", command.into()), ("tasks", Value::Array(rows))])
}

/// The `struct task_struct` of each task that `selectors` choose.
pub(super) fn chosen(context: &Context<'_>, selectors: &[&str]) -> Result<Vec<VirtAddr>, CommandError> {
    let tasks = Tasks::read(context.kernel()?)?;
    Ok(select(&tasks, selectors)?.into_iter().map(|task| task.at).collect())
}

fn select<'t>(tasks: &'t Tasks<'_>, selectors: &[&str]) -> Result<Vec<&'t TaskInfo>, CommandError> {
    let mut named: Option<Vec<&TaskInfo>> = None;
    let mut states = Vec::new();
    let (mut kernel, mut user, mut leaders, mut active) = (false, false, false, false);
    for &word in selectors {
        match word {
            "kernel" => kernel = true,
            "user" => user = true,
            "gleader" => leaders = true,
            "active" => active = true,
            state if STATES.contains(&state) => states.push(state),
            word => {
                // A name that is also a word of ours can be told by quotes.
                let found = tasks.matching(word.trim_matches('"'));
                if found.is_empty() {
                    return Err(CommandError(format!(
                        "'{}' is no task, state or command; try 'help foreach'",
                        printable(word)
                    )));
                }
                named.get_or_insert_default().extend(found);
            }
        }
    }
    let everything = || tasks.all.iter().filter(|task| active || task.pid != Some(0)).collect();
    let mut chosen = named.unwrap_or_else(everything);
    chosen.retain(|task| {
        (states.is_empty() || task.state.is_some_and(|state| states.contains(&state.short())))
            && (!kernel || task.is_kernel)
            && (!user || !task.is_kernel)
            && (!leaders || task.pid == task.tgid)
            && (!active || tasks.is_running(task))
    });
    Ok(chosen)
}
