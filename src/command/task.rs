//! `task`: the members of a task's `struct task_struct` that say most, or those asked for.

use super::ps::{bare, name};
use super::{Command, CommandError, Context, Output, args, nmi, printable};
use crate::debuginfo::types::{IntKind, Shape};
use crate::kernel::nmi::PreemptCount;
use crate::kernel::sched::{State, TaskInfo, policy_name};
use crate::kernel::{Kernel, Object, ObjectError};
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "task",
    arguments: "[-R MEMBER[,MEMBER]...] [PID|TASK]...",
    summary: "the members of a task that say most, or those asked for",
    help: "Without PID or TASK (the address of a task_struct): the task chosen with 'set', else the one on the CPU \
           selected in gdb. Behind 'flags' stand their names, without PF_, and those of the thread's, without TIF_; a \
           task on a CPU has that CPU's preempt count.\n\n\
           -R names members of struct task_struct, as deep as wanted: se.vruntime, thread.sp, \
           signal. The whole structure: 'struct task_struct ADDRESS'.\n\n\
           Examples:\n  task\n  task 1\n  task -R se.vruntime,prio,comm 1\n",
    run,
};

/// Members shown; where a kernel may have one under several names, the newest first.
const MEMBERS: &[&[&str]] = &[
    &["__state", "state"],
    &["exit_state"],
    &["exit_code"],
    &["flags"],
    &["thread_info.flags"],
    &["stack"],
    &["thread.sp"],
    &["on_cpu"],
    &["on_rq"],
    &["thread_info.cpu", "cpu"],
    &["prio"],
    &["static_prio"],
    &["normal_prio"],
    &["rt_priority"],
    &["policy"],
    &["se.vruntime"],
    &["se.sum_exec_runtime"],
    &["sched_info.last_arrival"],
    &["mm"],
    &["active_mm"],
    &["real_parent"],
    &["parent"],
    &["group_leader"],
    &["signal"],
    &["sighand"],
    &["fs"],
    &["files"],
    &["nsproxy"],
    &["real_cred"],
    &["cred"],
    &["utime"],
    &["stime"],
    &["nvcsw"],
    &["nivcsw"],
    &["start_time"],
    &["min_flt"],
    &["maj_flt"],
    &["last_switch_count"],
    &["comm"],
];

/// The first line of an answer that depends on the task: which one it is about.
pub fn heading(task: &TaskInfo) -> String {
    let shown = |value: Option<String>| value.unwrap_or_else(|| "?".to_owned());
    format!(
        "PID: {}  TASK: {}  CPU: {}  COMMAND: \"{}\"\n",
        shown(task.pid.map(|pid| pid.to_string())),
        bare(task.at),
        shown(task.cpu.map(|cpu| cpu.to_string())),
        printable(task.comm.as_deref().unwrap_or("?"))
    )
}

/// What identifies the task, for JSON.
pub fn identity(task: &TaskInfo) -> serde_json::Map<String, Value> {
    let value = json!({
        "pid": task.pid, "task": task.at.to_string(), "cpu": task.cpu.map(|cpu| cpu.0), "comm": task.comm,
    });
    if let Value::Object(object) = value { object } else { serde_json::Map::new() }
}

/// The tasks that these words mean; without words, the one that commands are about.
pub fn chosen<'a>(context: &Context<'a>, words: &[&str]) -> Result<Vec<Object<'a>>, CommandError> {
    match words {
        [] => Ok(vec![context.task()?]),
        words => words.iter().map(|word| args::task(context, word)).collect(),
    }
}

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let (members, words) = match arguments {
        ["-R", members, words @ ..] => (members.split(',').map(|member| vec![member]).collect(), words),
        [option, ..] if option.starts_with('-') => {
            return Err(CommandError("'task' takes -R MEMBER,MEMBER and tasks; try 'help task'".into()));
        }
        words => (MEMBERS.iter().map(|names| names.to_vec()).collect::<Vec<_>>(), words),
    };
    let asked_for = matches!(arguments, ["-R", ..]);
    let kernel = context.kernel()?;
    let reader = kernel.task_reader()?;
    let (mut text, mut rows) = (String::new(), Vec::new());
    for task in chosen(context, words)? {
        let info = reader.read(task.at);
        let mut json = identity(&info);
        text += &heading(&info);
        if !asked_for {
            let state = info.state.map_or("unreadable", State::words);
            let policy = info.policy.map_or("?", policy_name);
            let _ = writeln!(text, "  {} is {state}; policy {policy}", printable(&name(&info)));
            if info.stack.is_none() {
                text.push_str("  its kernel stack has been released\n");
            }
            if let Some(count) = preempt_count(context, &info) {
                let _ = writeln!(text, "  preempt count {count}");
                json.insert("preempt_count".into(), nmi::preempt_count(count));
            }
        }
        let mut values = serde_json::Map::new();
        for names in &members {
            let Ok(member) = task.either(names) else {
                if asked_for {
                    let missing = task.either(names).err().map(|error| error.to_string());
                    let _ = writeln!(text, "  {}", printable(&missing.unwrap_or_default()));
                }
                continue;
            };
            let path = names.iter().find(|name| task.has(name)).copied().unwrap_or_default();
            let (mut shown, value) = match value(&member) {
                Ok(found) => found,
                Err(error) => (format!("({error})"), Value::Null),
            };
            if let Some(names) = value.as_u64().and_then(|value| flag_names(kernel, path, value)) {
                let _ = write!(shown, ": {}", if names.is_empty() { "none".into() } else { names.join(" ") });
                json.insert(format!("{}_names", path.replace('.', "_")), json!(names));
            }
            let _ = writeln!(text, "  {} = {}", printable(path), printable(&shown));
            values.insert(path.to_owned(), value);
        }
        text.push('\n');
        json.insert("members".into(), Value::Object(values));
        rows.push(Value::Object(json));
    }
    Ok(Output { text, json: json!({ "tasks": rows }) })
}

/// Names of the bits of a member that holds flags.
fn flag_names(kernel: &Kernel, path: &str, value: u64) -> Option<Vec<String>> {
    match path {
        "flags" => Some(kernel.process_flags(value)),
        "thread_info.flags" => kernel.thread_flags(value),
        _ => None,
    }
}

/// That of the CPU the task is on.
fn preempt_count(context: &Context<'_>, task: &TaskInfo) -> Option<PreemptCount> {
    let kernel = context.machine.kernel()?;
    let cpu = task.cpu.filter(|&cpu| kernel.current(cpu).is_some_and(|current| current.at == task.at))?;
    kernel.preempt_count(cpu)
}

/// A member in short: structures by their address only.
fn value(member: &Object<'_>) -> Result<(String, Value), ObjectError> {
    let types = member.kernel().type_table()?;
    let shape = types.strip(member.ty).map(|(_, ty)| ty.shape.clone());
    Ok(match shape {
        Some(Shape::Pointer(_)) => {
            let at = member.pointer()?.to_string();
            (at.clone(), json!(at))
        }
        Some(Shape::Int { kind: IntKind::Bool, .. }) => {
            let value = member.u64()? != 0;
            (value.to_string(), json!(value))
        }
        Some(Shape::Int { signed: false, .. }) => {
            let value = member.u64()?;
            (format!("{value} ({value:#x})"), json!(value))
        }
        Some(Shape::Int { .. }) => {
            let value = member.i64()?;
            (value.to_string(), json!(value))
        }
        Some(Shape::Enum { .. }) => {
            let value = member.i64()?;
            let name = types.enumerator(member.ty, value);
            (name.unwrap_or_else(|| value.to_string()), json!(value))
        }
        Some(Shape::Array { element, .. })
            if types
                .strip(element)
                .is_some_and(|(_, ty)| matches!(ty.shape, Shape::Int { kind: IntKind::Char, .. })) =>
        {
            let text = member.text()?;
            (format!("\"{text}\""), json!(text))
        }
        _ => {
            let (at, ty) = (member.at.to_string(), member.type_name());
            (format!("({ty}) at {at}"), json!({ "type": ty, "at": at }))
        }
    })
}
