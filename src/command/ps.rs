//! `ps`: tasks. Its options are crash's.

use super::args::number_of_cpu;
use super::table::Table;
use super::{Command, CommandError, Context, Form, Output, object, printable};
use crate::addr::VirtAddr;
use crate::kernel::Kernel;
use crate::kernel::cpus::POSSIBLE;
use crate::kernel::mm::{MmReader, MmSize};
use crate::kernel::sched::{State, TaskInfo, policy_name};
use crate::kernel::time::{Date, Span};
use crate::parallel;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "ps",
    arguments: "[-k|-u|-G|-A] [-C CPU] [-y POLICY,...] [-s|-l|-m|-t|-a|-p|-c|-S] [PID|TASK|NAME]...",
    summary: "processes, threads and idle tasks",
    help: "'>' stands before what runs on a CPU. ST is the state: RU running or ready, IN interruptible sleep, UN \
           uninterruptible sleep, ID idle kernel thread, ST stopped, TR traced, ZO zombie, DE dead, PA parked, WA \
           waking, NE new. VSZ and RSS are KiB. Kernel threads stand in brackets.\n\n\
           Which tasks (all of these hold):\n\
           \x20 PID|TASK|NAME  these: by number, address of the task_struct, or name\n\
           \x20 -k, -u         the kernel's own threads; user tasks\n\
           \x20 -G             the first thread of each process only\n\
           \x20 -A             those that run on a CPU\n\
           \x20 -C CPU         those whose CPU is this\n\
           \x20 -y POLICY,...  those of these scheduling policies: NORMAL, FIFO, RR, BATCH, IDLE, DEADLINE, EXT, or all; \
           with policy and priority (below 100 is real time) in place of TASK\n\n\
           What of them:\n\
           \x20 -s  kernel stack pointers\n\
           \x20 -l  when each was last given a CPU, in nanoseconds of the scheduler's clock, latest first\n\
           \x20 -m  the same as the time since then, by the clock of its CPU's runqueue\n\
           \x20 -t  run time, start time, time in user mode and in the kernel\n\
           \x20 -a  command line, from the task's user memory\n\
           \x20 -p  the parents of each, oldest first\n\
           \x20 -c  the children of each\n\
           \x20 -S  how many tasks are in each state\n\n\
           Examples:\n  ps\n  ps -u\n  ps -S\n  ps -m bash\n  ps -p 1234\n  ps -y fifo,rr\n",
    run,
};

/// Tasks that are worth a thread to read them.
const READS: usize = 256;
/// Longest command line shown.
const ARGS_MAX: u64 = 4096;
/// Parents followed; a chain of processes is a few dozen long at most.
const PARENTS_MAX: usize = 1024;

/// All tasks, and what is needed to show any of them.
pub struct Tasks<'a> {
    kernel: &'a Kernel,
    /// Sorted by pid, idle tasks by CPU.
    pub all: Vec<TaskInfo>,
    /// Lists that were broken.
    pub problems: Vec<String>,
    /// Tasks that run on a CPU.
    running: HashSet<VirtAddr>,
    by_address: HashMap<VirtAddr, usize>,
}

impl<'a> Tasks<'a> {
    /// Reads all tasks.
    pub fn read(kernel: &'a Kernel) -> Result<Self, CommandError> {
        let found = kernel.tasks()?;
        let reader = kernel.task_reader()?;
        let mut all: Vec<TaskInfo> = parallel::map(&found.tasks, READS, |task| reader.read(task.at));
        all.sort_by_key(|task| (task.pid, if task.pid == Some(0) { task.cpu } else { None }));
        let by_address = (0..).zip(&all).map(|(i, task)| (task.at, i)).collect();
        let cpus = kernel.cpu_mask(&POSSIBLE).unwrap_or_default();
        let running = cpus.into_iter().filter_map(|cpu| Some(kernel.current(cpu)?.at)).collect();
        Ok(Self { kernel, all, problems: found.problems, running, by_address })
    }

    /// Whether the task runs on a CPU.
    pub fn is_running(&self, task: &TaskInfo) -> bool {
        self.running.contains(&task.at)
    }

    fn at(&self, at: VirtAddr) -> Option<&TaskInfo> {
        self.all.get(*self.by_address.get(&at)?)
    }

    fn parent(&self, task: &TaskInfo) -> Option<&TaskInfo> {
        self.at(task.parent?)
    }

    /// The tasks that `word` means: a pid, the address of a task, or a name.
    pub fn matching(&self, word: &str) -> Vec<&TaskInfo> {
        let number = word.parse::<i32>().ok();
        let by_pid: Vec<_> = self.all.iter().filter(|task| number.is_some() && task.pid == number).collect();
        if !by_pid.is_empty() {
            return by_pid;
        }
        let digits = word.strip_prefix("0x").unwrap_or(word);
        let address = u64::from_str_radix(digits, 16).ok().map(VirtAddr);
        if let Some(task) = address.and_then(|at| self.at(at)) {
            return vec![task];
        }
        self.all.iter().filter(|task| task.comm.as_deref() == Some(word)).collect()
    }
}

/// The name as crash shows it: the kernel's own in brackets.
pub fn name(task: &TaskInfo) -> String {
    let comm = task.comm.as_deref().unwrap_or("?");
    if task.is_kernel { format!("[{comm}]") } else { comm.to_owned() }
}

/// Addresses without `0x`, as crash shows those of tasks.
pub fn bare(at: VirtAddr) -> String {
    format!("{:x}", at.0)
}

fn shown<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "?".to_owned(), |value| value.to_string())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Table,
    Stacks,
    Policies,
    LastRun,
    SinceLastRun,
    Times,
    Arguments,
    Parents,
    Children,
    States,
}

/// Whether a task is wanted.
type Keep = dyn Fn(&TaskInfo) -> bool;

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    let tasks = Tasks::read(context.kernel()?)?;
    let mut what = What::Table;
    let mut keep: Vec<Box<Keep>> = Vec::new();
    let mut named: Option<HashSet<VirtAddr>> = None;
    let mut words = arguments.iter();
    while let Some(&word) = words.next() {
        match word {
            "-s" => what = What::Stacks,
            "-l" => what = What::LastRun,
            "-m" => what = What::SinceLastRun,
            "-t" => what = What::Times,
            "-a" => what = What::Arguments,
            "-p" => what = What::Parents,
            "-c" => what = What::Children,
            "-S" => what = What::States,
            "-k" => keep.push(Box::new(|task| task.is_kernel)),
            "-u" => keep.push(Box::new(|task| !task.is_kernel)),
            "-G" => keep.push(Box::new(|task| task.pid == task.tgid)),
            "-A" => {
                let running = tasks.running.clone();
                keep.push(Box::new(move |task| running.contains(&task.at)));
            }
            "-C" => {
                let cpu = number_of_cpu(context, words.next().copied().unwrap_or_default())?;
                keep.push(Box::new(move |task| task.cpu == Some(cpu)));
            }
            "-y" => {
                what = What::Policies;
                let wanted = policies(words.next().copied().unwrap_or_default())?;
                keep.push(Box::new(move |task| {
                    wanted.is_empty()
                        || task.policy.is_some_and(|policy| wanted.contains(&policy_name(policy)))
                }));
            }
            option if option.starts_with('-') => {
                let option = printable(option);
                return Err(CommandError(format!("'ps' has no option '{option}'; try 'help ps'")));
            }
            word => {
                let found = tasks.matching(word);
                if found.is_empty() {
                    return Err(CommandError(format!(
                        "'{}' is neither a pid, nor the address of a task, nor the name of one",
                        printable(word)
                    )));
                }
                named.get_or_insert_default().extend(found.iter().map(|task| task.at));
            }
        }
    }
    let wanted = |task: &&TaskInfo| {
        named.as_ref().is_none_or(|named| named.contains(&task.at)) && keep.iter().all(|keep| keep(task))
    };
    let chosen: Vec<&TaskInfo> = tasks.all.iter().filter(wanted).collect();
    let mut output = match what {
        What::Table | What::Stacks | What::Policies => table(&tasks, &chosen, what, context.form)?,
        What::LastRun | What::SinceLastRun => last_run(&tasks, &chosen, what == What::SinceLastRun),
        What::Times => times(&tasks, &chosen),
        What::Arguments => command_lines(&tasks, &chosen),
        What::Parents => parents(&tasks, &chosen),
        What::Children => children(&tasks, &chosen),
        What::States => states(&chosen),
    };
    for problem in &tasks.problems {
        let _ = writeln!(output.text, "problem: {}", printable(problem));
    }
    if let Value::Object(object) = &mut output.json {
        object.insert("problems".into(), json!(tasks.problems));
    }
    Ok(output)
}

/// The policies in a list such as `fifo,rr`; none if it says all.
fn policies(list: &str) -> Result<Vec<&'static str>, CommandError> {
    let known: Vec<&'static str> = (0..=7).map(policy_name).filter(|name| *name != "?").collect();
    if list.eq_ignore_ascii_case("all") {
        return Ok(Vec::new());
    }
    let one = |word: &str| known.iter().copied().find(|name| name.eq_ignore_ascii_case(word));
    list.split(',')
        .map(|word| {
            one(word).ok_or_else(|| {
                let (word, known) = (printable(word), known.join(", "));
                CommandError(format!("'{word}' is no scheduling policy; there are: {known}, and all"))
            })
        })
        .collect()
}

/// What every task's JSON has.
fn task_json(tasks: &Tasks<'_>, task: &TaskInfo) -> serde_json::Map<String, Value> {
    let value = json!({
        "pid": task.pid,
        "tgid": task.tgid,
        "ppid": tasks.parent(task).and_then(|parent| parent.tgid),
        "cpu": task.cpu.map(|cpu| cpu.0),
        "task": task.at.to_string(),
        "state": task.state.map(|state| state.letter().to_string()),
        "st": task.state.map(State::short),
        "comm": task.comm,
        "running": tasks.is_running(task),
        "kernel": task.is_kernel,
    });
    if let Value::Object(object) = value { object } else { serde_json::Map::new() }
}

fn with(mut object: serde_json::Map<String, Value>, more: Value) -> Value {
    if let Value::Object(more) = more {
        object.extend(more);
    }
    Value::Object(object)
}

fn table(tasks: &Tasks<'_>, chosen: &[&TaskInfo], what: What, form: Form) -> Result<Output, CommandError> {
    let reader = tasks.kernel.mm_reader()?;
    let mut sizes = HashMap::new();
    let total = tasks.kernel.total_ram().filter(|&total| total > 0);
    let third = match what {
        What::Stacks => "KSTACKP",
        What::Policies => "POLICY",
        _ => "TASK",
    };
    let titles = [" ", ">PID", ">PPID", ">CPU", third, "ST", ">%MEM", ">VSZ", ">RSS", "COMM"];
    let mut table = Table::new(&titles);
    let mut rows = Vec::new();
    for task in chosen {
        let size = size_of(&reader, &mut sizes, task);
        let percent = size.resident.zip(total).map(|(rss, total)| rss as f64 * 100.0 / total as f64);
        let kib = |bytes: Option<u64>| shown(bytes.map(|bytes| bytes / 1024));
        let parent = tasks.parent(task);
        let third = match (what, task.stack, task.sp) {
            (What::Stacks, None, _) => "(stack released)".to_owned(),
            (What::Stacks, _, sp) => shown(sp.map(bare)),
            (What::Policies, ..) => format!("{} {}", shown(task.policy.map(policy_name)), shown(task.prio)),
            _ => bare(task.at),
        };
        table.row([
            if tasks.is_running(task) { ">" } else { "" }.to_owned(),
            shown(task.pid),
            shown(parent.and_then(|parent| parent.tgid)),
            shown(task.cpu),
            third,
            shown(task.state.map(State::short)),
            percent.map_or_else(|| "?".to_owned(), |percent| format!("{percent:.1}")),
            kib(size.virtual_size),
            kib(size.resident),
            name(task),
        ]);
        if !form.has_json() {
            continue;
        }
        let ended = task.state.is_some_and(State::has_ended);
        let more = json!({
            "vsz_kib": size.virtual_size.map(|bytes| bytes / 1024),
            "rss_kib": size.resident.map(|bytes| bytes / 1024),
            "policy": task.policy.map(policy_name),
            "prio": task.prio,
            "mm": task.mm.map(|at| at.to_string()),
            "stack": task.stack.map(|at| at.to_string()),
            "sp": task.sp.filter(|_| task.stack.is_some()).map(|at| at.to_string()),
            "note": (ended && task.stack.is_none()).then_some("ended; its stack has been released"),
        });
        rows.push(with(task_json(tasks, task), more));
    }
    Ok(Output::of(form, || table.render(), || object([("tasks", Value::Array(rows))])))
}

/// The threads of a process share what they have; it is read once.
fn size_of(reader: &MmReader<'_>, known: &mut HashMap<VirtAddr, MmSize>, task: &TaskInfo) -> MmSize {
    match task.mm {
        Some(mm) => *known.entry(mm).or_insert_with(|| reader.size(mm)),
        None => MmSize { virtual_size: Some(0), resident: Some(0) },
    }
}

fn one_line(task: &TaskInfo) -> String {
    format!(
        "PID: {:<6} TASK: {}  CPU: {:<3} COMMAND: \"{}\"",
        shown(task.pid),
        bare(task.at),
        shown(task.cpu),
        printable(task.comm.as_deref().unwrap_or("?"))
    )
}

fn last_run(tasks: &Tasks<'_>, chosen: &[&TaskInfo], since: bool) -> Output {
    let mut chosen = chosen.to_vec();
    chosen.sort_by_key(|task| std::cmp::Reverse(task.last_run));
    let mut clocks = HashMap::new();
    let (mut text, mut rows) = (String::new(), Vec::new());
    for task in chosen {
        let clock = task.cpu.and_then(|cpu| {
            let read = || tasks.kernel.runqueue(cpu).and_then(|rq| rq.get("clock")).ok();
            *clocks.entry(cpu).or_insert_with(read)
        });
        // A task that never ran has 0. The clocks of CPUs differ a little.
        let ago = clock.zip(task.last_run).map(|(clock, last)| clock.saturating_sub(last));
        let shown_time = match since {
            false => format!("[{}]", shown(task.last_run)),
            true => match ago {
                Some(ago) => format!(
                    "[{} {:02}:{:02}:{:02}.{:03}]",
                    ago / 86_400_000_000_000,
                    ago / 3_600_000_000_000 % 24,
                    ago / 60_000_000_000 % 60,
                    ago / 1_000_000_000 % 60,
                    ago / 1_000_000 % 1000
                ),
                None => "[?]".to_owned(),
            },
        };
        let state = shown(task.state.map(State::short));
        let _ = writeln!(text, "{shown_time}  [{state}]  {}", one_line(task));
        let more = json!({ "last_run_ns": task.last_run, "since_last_run_ns": ago });
        rows.push(with(task_json(tasks, task), more));
    }
    Output { text, json: json!({ "tasks": rows }) }
}

fn times(tasks: &Tasks<'_>, chosen: &[&TaskInfo]) -> Output {
    let clock = tasks.kernel.clock();
    let (mut text, mut rows) = (String::new(), Vec::new());
    if let Err(error) = &clock {
        let _ = writeln!(text, "what time it is is not known: {}", printable(&error.to_string()));
    }
    let clock = clock.ok();
    for task in chosen {
        let run = clock.zip(task.start).map(|(clock, start)| clock.monotonic.saturating_sub(start));
        let began = clock.zip(run).map(|(clock, run)| clock.real.saturating_sub(run));
        let line = |text: &mut String, what: &str, value: Option<String>| {
            let _ = writeln!(text, "{what:>11}: {}", shown(value));
        };
        let _ = writeln!(text, "{}", one_line(task));
        line(&mut text, "RUN TIME", run.map(|run| Span(run).to_string()));
        let date = began.map_or_else(String::new, |began| format!(" ({})", Date(began)));
        let start = task.start.map(|start| format!("{start}{date}"));
        line(&mut text, "START TIME", start);
        line(&mut text, "UTIME", task.utime.map(|t| t.to_string()));
        line(&mut text, "STIME", task.stime.map(|t| t.to_string()));
        text.push('\n');
        let more = json!({
            "run_ns": run, "start_ns": task.start, "utime_ns": task.utime, "stime_ns": task.stime,
        });
        rows.push(with(task_json(tasks, task), more));
    }
    Output { text, json: json!({ "tasks": rows }) }
}

fn command_lines(tasks: &Tasks<'_>, chosen: &[&TaskInfo]) -> Output {
    let (mut text, mut rows) = (String::new(), Vec::new());
    for task in chosen {
        let line = arguments_of(tasks.kernel, task);
        let _ = writeln!(text, "{}", one_line(task));
        let _ = match &line {
            Ok(words) => {
                writeln!(text, "ARG: {}\n", words.iter().map(|w| printable(w)).collect::<Vec<_>>().join(" "))
            }
            Err(why) => writeln!(text, "ARG: ({})\n", printable(why)),
        };
        let more = match line {
            Ok(words) => json!({ "args": words }),
            Err(why) => json!({ "args": null, "args_problem": why }),
        };
        rows.push(with(task_json(tasks, task), more));
    }
    Output { text, json: json!({ "tasks": rows }) }
}

/// The words of the command line, from the process's user memory.
fn arguments_of(kernel: &Kernel, task: &TaskInfo) -> Result<Vec<String>, String> {
    let mm = task.mm.ok_or("no user memory")?;
    let object = kernel.object("mm_struct", mm).map_err(|error| error.to_string())?;
    let place = |name| object.get(name).map_err(|error| error.to_string());
    let (start, end) = (place("arg_start")?, place("arg_end")?);
    let len = end.checked_sub(start).ok_or("'arg_end' lies below 'arg_start'")?.min(ARGS_MAX);
    let mut bytes = vec![0; len as usize];
    let read = kernel.read_user(mm, VirtAddr(start), &mut bytes)?;
    if let (0, Some(why)) = (read.filled, read.stopped) {
        return Err(format!("cannot be read: {why}"));
    }
    bytes.truncate(read.filled);
    let text = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
    Ok(text.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect())
}

fn parents(tasks: &Tasks<'_>, chosen: &[&TaskInfo]) -> Output {
    let (mut text, mut rows) = (String::new(), Vec::new());
    for task in chosen {
        let mut chain = vec![*task];
        let mut seen = HashSet::from([task.at]);
        let mut here = *task;
        while let Some(parent) = tasks.parent(here).filter(|parent| seen.insert(parent.at)) {
            chain.push(parent);
            here = parent;
            if chain.len() >= PARENTS_MAX {
                break;
            }
        }
        chain.reverse();
        for (depth, task) in chain.iter().enumerate() {
            let _ = writeln!(text, "{:width$}{}", "", one_line(task), width = depth);
        }
        text.push('\n');
        let chain: Vec<_> = chain.iter().map(|task| task.pid).collect();
        rows.push(with(task_json(tasks, task), json!({ "parents": chain })));
    }
    Output { text, json: json!({ "tasks": rows }) }
}

fn children(tasks: &Tasks<'_>, chosen: &[&TaskInfo]) -> Output {
    let mut by_parent: HashMap<VirtAddr, Vec<&TaskInfo>> = HashMap::new();
    for task in tasks.all.iter().filter(|task| task.pid == task.tgid) {
        if let Some(parent) = task.parent.filter(|&parent| parent != task.at) {
            by_parent.entry(parent).or_default().push(task);
        }
    }
    let (mut text, mut rows) = (String::new(), Vec::new());
    for task in chosen {
        let _ = writeln!(text, "{}", one_line(task));
        let found = by_parent.get(&task.at).map_or(&[][..], Vec::as_slice);
        if found.is_empty() {
            text.push_str("  (no children)\n");
        }
        for child in found {
            let _ = writeln!(text, "  {}", one_line(child));
        }
        text.push('\n');
        let found: Vec<_> = found.iter().map(|child| child.pid).collect();
        rows.push(with(task_json(tasks, task), json!({ "children": found })));
    }
    Output { text, json: json!({ "tasks": rows }) }
}

fn states(chosen: &[&TaskInfo]) -> Output {
    let mut counts: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for task in chosen {
        let (short, words) = task.state.map_or(("??", "unreadable"), |state| (state.short(), state.words()));
        counts.entry(short).or_insert((0, words)).0 += 1;
    }
    let mut text = String::new();
    for (short, (count, words)) in &counts {
        let _ = writeln!(text, "  {short}: {count:<6} {words}");
    }
    let json: serde_json::Map<_, _> =
        counts.iter().map(|(short, (count, _))| ((*short).to_owned(), json!(count))).collect();
    Output { text, json: json!({ "states": json }) }
}
