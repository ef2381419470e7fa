//! `sys`: the machine and its kernel at a glance.

use super::{Command, CommandError, Context, Output, no_arguments, printable};
use crate::bytes::ByteSize;
use crate::kernel::cpus::{ONLINE, POSSIBLE};
use crate::kernel::time::{Date, Span};
use crate::kernel::{Kernel, Machine};
use serde_json::{Value, json};
use std::fmt::Write;

pub const COMMAND: Command = Command {
    name: "sys",
    arguments: "",
    summary: "the system at a glance: kernel, uptime, load, memory, panic, taints",
    help: "Uptime and HZ are the timekeeper's own, as of its last update. Memory is what the kernel manages.\n\n\
           Example:\n  sys\n",
    run,
};

/// `COMMAND_LINE_SIZE` on x86.
const COMMAND_LINE_MAX: u64 = 2048;
/// What is not known of the kernel, in words.
const UNKNOWN: &str = "not known";

/// Lines and JSON keys, filled together.
struct Lines {
    text: String,
    json: serde_json::Map<String, Value>,
}

impl Lines {
    fn add(&mut self, name: &str, text: Option<String>, json: Value) {
        let text = text.unwrap_or_else(|| UNKNOWN.to_owned());
        let _ = writeln!(self.text, "{name:<14} {}", printable(&text));
        self.json.insert(name.replace(' ', "_"), json);
    }
}

fn run(context: &Context<'_>, arguments: &[&str]) -> Result<Output, CommandError> {
    no_arguments("sys", arguments)?;
    let (machine, kernel) = (context.machine, context.kernel()?);
    let mut lines = Lines { text: String::new(), json: serde_json::Map::new() };
    dump(&mut lines, machine);
    names(&mut lines, kernel);
    cpus(&mut lines, kernel);
    clock(&mut lines, kernel);
    let tasks = kernel.tasks().ok();
    let count = tasks.as_ref().map(|tasks| tasks.tasks.len());
    lines.add("tasks", count.map(|count| count.to_string()), json!(count));
    let ram = kernel.total_ram();
    lines.add("memory", ram.map(|bytes| ByteSize(bytes).to_string()), json!(ram));
    failure(&mut lines, kernel);
    taints(&mut lines, kernel);
    let pointer = kernel.symbol("saved_command_line").and_then(|at| kernel.read_u64(at));
    let line = pointer.and_then(|at| kernel.text_at(crate::addr::VirtAddr(at), COMMAND_LINE_MAX).ok());
    lines.add("cmdline", line.clone(), json!(line));
    Ok(Output { text: lines.text, json: Value::Object(lines.json) })
}

fn dump(lines: &mut Lines, machine: &Machine) {
    let format = machine.backend().facts().into_iter().find(|fact| fact.name == "format");
    let format = format.map(|fact| fact.value);
    let label = if machine.backend().live().is_some() { "guest" } else { "dump" };
    lines.add(label, format.clone(), json!(format));
    // In JSON it has one name whatever it is.
    lines.json.remove(label);
    lines.json.insert("dump".into(), json!(format));
    let vmlinux = machine.vmlinux().map(|path| path.display().to_string());
    lines.add("vmlinux", vmlinux.clone().or_else(|| Some("none".into())), json!(vmlinux));
}

fn names(lines: &mut Lines, kernel: &Kernel) {
    let uts = kernel.global("uts_namespace", "init_uts_ns").and_then(|ns| ns.member("name")).ok();
    let part = |name| uts.and_then(|uts| uts.member(name).and_then(|part| part.text()).ok());
    for (name, member) in [("nodename", "nodename"), ("version", "version"), ("machine", "machine")] {
        if name == "version" {
            let release = &kernel.found().release;
            lines.add("release", Some(release.clone()), json!(release));
        }
        let value = part(member);
        lines.add(name, value.clone(), json!(value));
    }
}

fn cpus(lines: &mut Lines, kernel: &Kernel) {
    let [possible, online] = [POSSIBLE, ONLINE].map(|names| kernel.cpu_mask(&names));
    let count = |cpus: &Option<Vec<_>>| cpus.as_ref().map(Vec::len);
    let text = count(&possible).zip(count(&online)).map(|(possible, online)| match possible == online {
        true => possible.to_string(),
        // A panic without a crash kernel takes the others offline.
        false => format!("{possible}, of them {online} online"),
    });
    lines.add("cpus", text, json!({ "possible": count(&possible), "online": count(&online) }));
}

fn clock(lines: &mut Lines, kernel: &Kernel) {
    let clock = kernel.clock();
    let clock = clock.as_ref();
    let why = |error| Some(format!("{UNKNOWN}: {error}"));
    let date = clock.map(|clock| Date(clock.real).to_string());
    lines.add("date", date.clone().ok().or_else(|| why(date.as_ref().err()?)), json!(date.ok()));
    let uptime = clock.map(|clock| Span(clock.boottime).to_string()).ok();
    lines.add("uptime", uptime, json!(clock.ok().map(|clock| clock.boottime as f64 / 1e9)));
    let hz = clock.ok().map(|clock| match (clock.hz, clock.hz_by_jiffies) {
        (Some(hz), Some(other)) if hz.abs_diff(other) > hz / 50 => {
            format!("{hz} by the timekeeper, {other} by jiffies since boot")
        }
        (Some(hz), _) => hz.to_string(),
        (None, Some(hz)) => format!("{hz} by jiffies since boot"),
        (None, None) => UNKNOWN.to_owned(),
    });
    lines.add("hz", hz, json!(clock.ok().and_then(|clock| clock.hz.or(clock.hz_by_jiffies))));
    let load = kernel.load_average();
    lines.add("load average", load.map(|[a, b, c]| format!("{a:.2}, {b:.2}, {c:.2}")), json!(load));
}

fn failure(lines: &mut Lines, kernel: &Kernel) {
    let failure = kernel.failure();
    let what = failure.as_ref().filter(|failure| !failure.is_panic).map_or("panic", |_| "oops");
    let text = failure.map(|failure| failure.text);
    lines.add(what, text.clone().or_else(|| Some("none".into())), json!(text));
    let Some(cpu) = kernel.panic_cpu() else { return };
    let task = kernel.current(cpu);
    let shown = task.as_ref().map(|task| {
        let pid = task.pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
        format!("CPU {cpu}, pid {pid} {} at {:x}", task.comm.as_deref().unwrap_or("?"), task.at.0)
    });
    let json = json!({
        "cpu": cpu.0,
        "pid": task.as_ref().and_then(|task| task.pid),
        "comm": task.as_ref().and_then(|task| task.comm.clone()),
        "task": task.as_ref().map(|task| task.at.to_string()),
    });
    lines.add("panicked", shown, json);
}

fn taints(lines: &mut Lines, kernel: &Kernel) {
    let taints = kernel.taints();
    let text = taints.as_ref().map(|taints| match taints.as_slice() {
        [] => "no".to_owned(),
        taints => {
            let one = |taint: &crate::kernel::taint::Taint| format!("{} ({})", taint.letter, taint.words);
            taints.iter().map(one).collect::<Vec<_>>().join(", ")
        }
    });
    let letters = taints.map(|taints| taints.iter().map(|taint| taint.letter).collect::<String>());
    lines.add("tainted", text, json!(letters));
}
