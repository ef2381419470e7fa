//! `runq`: what runs on each CPU and what waits to.

use super::args::number_of_cpu;
use super::ps::bare;
use super::{Command, CommandError, Context, Output, printable};
use crate::addr::VirtAddr;
use crate::kernel::cpus::POSSIBLE;
use crate::kernel::runqueue::RunQueue;
use crate::kernel::sched::{TaskInfo, TaskReader, policy_name};
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "runq",
    arguments: "[-t|-T|-m|-g] [-c CPU]",
    summary: "run queues: what runs on each CPU and what waits to",
    help: "For every possible CPU: the current task, then the tasks that wait by class: deadline (earliest first), real \
           time (by priority, 0 is highest) and fair (in the order of the queue's tree; groups are walked). [delayed] is a \
           task that sleeps already and leaves the queue when its turn would come.\n\n\
           -t      each CPU's clock and when its current task was given it, in nanoseconds\n\
           -T      how far each CPU's clock is behind the latest one\n\
           -m      how long each current task has been running\n\
           -g      by groups: each group's queue with the tasks that wait in it, and the groups in it\n\
           -c CPU  one CPU only\n\n\
           Examples:\n  runq\n  runq -c 2\n  runq -m\n  runq -g\n",
    run,
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Queues,
    Clocks,
    Lags,
    Running,
    Groups,
}

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let kernel = context.kernel()?;
    let mut what = What::Queues;
    let mut cpus = kernel.cpu_mask(&POSSIBLE);
    let mut words = arguments.iter();
    while let Some(&word) = words.next() {
        match word {
            "-t" => what = What::Clocks,
            "-T" => what = What::Lags,
            "-m" => what = What::Running,
            "-g" => what = What::Groups,
            "-c" => {
                cpus = Some(vec![number_of_cpu(context, words.next().copied().unwrap_or_default())?]);
            }
            _ => return Err(CommandError("'runq' takes -t, -T, -m, -g and -c CPU; try 'help runq'".into())),
        }
    }
    let cpus = cpus.ok_or_else(|| CommandError("which CPUs there are is not known".into()))?;
    let reader = kernel.task_reader()?;
    let (mut text, mut rows) = (String::new(), Vec::new());
    let latest =
        || kernel.possible_cpus().into_iter().filter_map(|cpu| kernel.run_queue(cpu).ok()?.clock).max();
    let latest = if what == What::Lags { latest() } else { None };
    for cpu in cpus {
        let queue = match kernel.run_queue(cpu) {
            Ok(queue) => queue,
            Err(error) => {
                let _ = writeln!(text, "CPU {cpu}: {}\n", printable(&error.to_string()));
                rows.push(json!({ "cpu": cpu.0, "problem": error.to_string() }));
                continue;
            }
        };
        let current = queue.current.map(|at| reader.read(at));
        let ran = current.as_ref().and_then(|task| queue.clock?.checked_sub(task.last_run?));
        let behind = latest.zip(queue.clock).map(|(latest, clock)| latest.saturating_sub(clock));
        let shown = |value: Option<u64>| value.map_or_else(|| "?".into(), |value| value.to_string());
        let _ = match what {
            What::Queues => write!(text, "{}", render(&queue, current.as_ref(), &reader)),
            What::Groups => write!(text, "{}", groups(&queue, current.as_ref(), &reader)),
            What::Clocks => {
                let last = current.as_ref().and_then(|task| task.last_run);
                writeln!(text, "CPU {cpu}: {}  [{}]  {}", shown(queue.clock), shown(last), one(&current))
            }
            What::Lags => match behind {
                Some(behind) => writeln!(text, "CPU {cpu}: {:.3} seconds behind", behind as f64 / 1e9),
                None => writeln!(text, "CPU {cpu}: not known"),
            },
            What::Running => {
                let ms = ran.map(|ran| ran / 1_000_000);
                writeln!(text, "CPU {cpu}: [{} ms]  {}", shown(ms), one(&current))
            }
        };
        let mut row = queue_json(&queue, current.as_ref(), ran, &reader);
        if let (What::Lags, Value::Object(row)) = (what, &mut row) {
            row.insert("behind_ns".into(), json!(behind));
        }
        rows.push(row);
    }
    Ok(Output { text, json: json!({ "runqueues": rows }) })
}

/// The queues of one CPU, each with its tasks, and below it those of its groups.
fn groups(queue: &RunQueue, current: Option<&TaskInfo>, reader: &TaskReader<'_>) -> String {
    let mut text = format!("CPU {} RUNQUEUE: {}\n", queue.cpu, bare(queue.at));
    let running = current.map_or_else(|| "not known".to_owned(), |task| line(task, ""));
    let _ = writeln!(text, "  CURRENT: {running}");
    if let Some(stop) = queue.stop {
        let _ = writeln!(text, "  STOP: {}", line(&reader.read(stop), ""));
    }
    for one in &queue.groups {
        let indent = 2 + 3 * one.depth;
        let kind = if one.real_time { "RT_RQ" } else { "CFS_RQ" };
        // A kernel without groups of the class has none to name.
        let group = one.group.map_or_else(String::new, |at| format!("TASK_GROUP: {}  ", bare(at)));
        let name = one.name.as_deref().map_or_else(String::new, |name| format!("  {}", printable(name)));
        let _ = writeln!(text, "{:indent$}{group}{kind}: {}{name}", "", bare(one.at));
        if one.tasks.is_empty() {
            let _ = writeln!(text, "{:indent$}   none queued", "");
        }
        for &task in &one.tasks {
            let _ = writeln!(text, "{:indent$}   {}", "", line(&reader.read(task), ""));
        }
    }
    for problem in &queue.problems {
        let _ = writeln!(text, "  problem: {}", printable(problem));
    }
    text.push('\n');
    text
}

fn one(task: &Option<TaskInfo>) -> String {
    task.as_ref().map_or_else(|| "not known".to_owned(), |task| line(task, ""))
}

fn line(task: &TaskInfo, more: &str) -> String {
    let shown = |value: Option<i32>| value.map_or_else(|| "?".to_owned(), |value| value.to_string());
    format!(
        "[{:>3}] PID: {:<6} TASK: {}  {:<8} COMMAND: \"{}\"{more}",
        shown(task.prio),
        shown(task.pid),
        bare(task.at),
        task.policy.map_or("?", policy_name),
        printable(task.comm.as_deref().unwrap_or("?"))
    )
}

fn render(queue: &RunQueue, current: Option<&TaskInfo>, reader: &TaskReader<'_>) -> String {
    let mut text = format!("CPU {} RUNQUEUE: {}\n", queue.cpu, bare(queue.at));
    let running = current.map_or_else(|| "not known".to_owned(), |task| line(task, ""));
    let _ = writeln!(text, "  CURRENT: {running}");
    let mut class = |name: &str, tasks: &mut dyn Iterator<Item = (VirtAddr, &str)>| {
        let lines: Vec<String> = tasks.map(|(at, more)| line(&reader.read(at), more)).collect();
        match lines.as_slice() {
            [] => {
                let _ = writeln!(text, "  {name}: none queued");
            }
            lines => {
                let _ = writeln!(text, "  {name}:");
                for line in lines {
                    let _ = writeln!(text, "     {line}");
                }
            }
        }
    };
    if let Some(stop) = queue.stop {
        class("STOP", &mut std::iter::once((stop, "")));
    }
    class("DL ", &mut queue.deadline.iter().map(|&at| (at, "")));
    class("RT ", &mut queue.real_time.iter().map(|&(_, at)| (at, "")));
    class("CFS", &mut queue.fair.iter().map(|one| (one.task, if one.delayed { " [delayed]" } else { "" })));
    for problem in &queue.problems {
        let _ = writeln!(text, "  problem: {}", printable(problem));
    }
    text.push('\n');
    text
}

fn queue_json(
    queue: &RunQueue,
    current: Option<&TaskInfo>,
    ran: Option<u64>,
    reader: &TaskReader<'_>,
) -> Value {
    let task = |task: &TaskInfo| {
        let mut object = super::task::identity(task);
        object.insert("prio".into(), json!(task.prio));
        object.insert("policy".into(), json!(task.policy.map(policy_name)));
        object
    };
    let read = |at: VirtAddr| task(&reader.read(at));
    json!({
        "cpu": queue.cpu.0,
        "rq": queue.at.to_string(),
        "running": queue.running,
        "clock_ns": queue.clock,
        "current": current.map(task),
        "current_since_ns": ran,
        "stop": queue.stop.map(read),
        "deadline": queue.deadline.iter().map(|&at| read(at)).collect::<Vec<_>>(),
        "real_time": queue.real_time.iter().map(|&(_, at)| read(at)).collect::<Vec<_>>(),
        "fair": queue.fair.iter().map(|one| {
            let mut object = read(one.task);
            object.insert("depth".into(), json!(one.depth));
            object.insert("delayed".into(), json!(one.delayed));
            object
        }).collect::<Vec<_>>(),
        "groups": queue.groups.iter().map(|one| json!({
            "queue": one.at.to_string(),
            "class": if one.real_time { "real_time" } else { "fair" },
            "depth": one.depth,
            "task_group": one.group.map(|at| at.to_string()),
            "name": one.name,
            "tasks": one.tasks.iter().map(|&at| read(at)).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "problems": queue.problems,
    })
}
