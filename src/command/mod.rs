//! Commands: text in, one value out that renders as text or JSON. Knows neither gdb nor stdout.
//!
//! `monitor CMD` in gdb, `kstub info` and tests run the same code. A command is a row in [`COMMANDS`] and a file.

mod args;
mod bt;
mod declare;
mod dis;
mod dump;
mod expression;
mod files;
mod foreach;
mod help;
mod info;
mod kmem;
mod list;
mod log;
mod module;
mod mount;
mod nmi;
mod p;
mod page;
mod page_owner;
mod percpu;
mod ps;
mod qemu;
mod rd;
mod regs;
mod runq;
mod set;
mod source;
mod structure;
mod sym;
mod sys;
mod table;
mod task;
mod tree;
mod value;
mod vm;
mod vtop;
mod whatis;
mod why;

pub use info::render as render_info;

use crate::addr::VirtAddr;
pub use crate::bytes::printable;
use crate::kernel::{Cpu, CpuId, Kernel, Machine, Object, ObjectError};
use std::cell::Cell;

/// What a command is run with.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The machine it is about.
    pub machine: &'a Machine,
    /// The CPU the user has selected.
    pub cpu: CpuId,
    /// Address of the `struct task_struct` the user has selected, where that is not just what ran on the CPU.
    pub task: Option<VirtAddr>,
    /// What else the user has chosen.
    pub focus: &'a Focus,
    /// Which rendering of the answer is wanted.
    pub form: Form,
}

/// Which rendering of an answer is wanted. Of ten thousand backtraces the one that nobody reads takes as long as the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Form {
    /// For people.
    Text,
    /// For scripts.
    Json,
    /// The two.
    #[default]
    Both,
}

impl Form {
    fn has_text(self) -> bool {
        self != Self::Json
    }

    fn has_json(self) -> bool {
        self != Self::Text
    }
}

/// What a user has chosen with commands, for as long as the session lasts.
#[derive(Default)]
pub struct Focus {
    /// Address of the `struct task_struct` chosen with `set`; without one, the task on the selected CPU.
    pub task: Cell<Option<VirtAddr>>,
    /// The CPU that the chosen task runs on, for where nothing else selects one.
    pub cpu: Cell<Option<CpuId>>,
    /// Who shows how far a long command is: bytes done, and bytes to do.
    pub progress: Option<Box<dyn Fn(u64, u64) + Send>>,
}

impl<'a> Context<'a> {
    /// The kernel, or the error that says there is none.
    pub fn kernel(&self) -> Result<&'a Kernel, CommandError> {
        self.machine.kernel().ok_or_else(|| CommandError("no kernel was found; see 'info'".into()))
    }

    /// The task that commands are about: the one chosen with `set`, else the one that ran on the selected CPU.
    pub fn task(&self) -> Result<Object<'a>, CommandError> {
        let kernel = self.kernel()?;
        let running = || kernel.current(self.cpu).map(|task| task.at);
        let at = self.task.or(self.focus.task.get()).or_else(running);
        let at =
            at.ok_or_else(|| CommandError(format!("which task ran on CPU {} is not known", self.cpu)))?;
        Ok(kernel.object("task_struct", at)?)
    }
}

/// What a command answers: one value with two renderings, of which [`Context::form`] tells those that are wanted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// For people; ends with a newline unless empty.
    pub text: String,
    /// For scripts.
    pub json: serde_json::Value,
}

impl Output {
    /// Those of both renderings that `form` asks for; the other is empty, and null.
    fn of(form: Form, text: impl FnOnce() -> String, json: impl FnOnce() -> serde_json::Value) -> Self {
        Self {
            text: if form.has_text() { text() } else { String::new() },
            json: if form.has_json() { json() } else { serde_json::Value::Null },
        }
    }
}

/// An object of these members. Unlike `json!` it takes the values as they are and makes no copies.
fn object<const N: usize>(members: [(&str, serde_json::Value); N]) -> serde_json::Value {
    members.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// A failed command: the text for the user, lower case, with the cure where there is one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CommandError(pub String);

impl From<ObjectError> for CommandError {
    fn from(error: ObjectError) -> Self {
        Self(error.to_string())
    }
}

/// A command: all that help, dispatch and completion know of it.
pub struct Command {
    /// What the user types.
    pub name: &'static str,
    /// Its arguments, as shown behind the name.
    pub arguments: &'static str,
    /// One line.
    pub summary: &'static str,
    /// The rest of its help, an example included.
    pub help: &'static str,
    run: fn(&Context<'_>, &[&str]) -> Result<Output, CommandError>,
}

/// Every command, in the order of `help`.
pub const COMMANDS: &[Command] = &[
    bt::COMMAND,
    dis::COMMAND,
    dump::COMMAND,
    files::COMMAND,
    foreach::COMMAND,
    help::COMMAND,
    info::COMMAND,
    kmem::COMMAND,
    list::COMMAND,
    log::COMMAND,
    module::COMMAND,
    mount::COMMAND,
    nmi::COMMAND,
    p::COMMAND,
    page::COMMAND,
    percpu::COMMAND,
    ps::COMMAND,
    qemu::COMMAND,
    rd::COMMAND,
    regs::COMMAND,
    runq::COMMAND,
    set::COMMAND,
    structure::STRUCT,
    sym::COMMAND,
    sys::COMMAND,
    task::COMMAND,
    tree::COMMAND,
    structure::UNION,
    vm::COMMAND,
    vtop::COMMAND,
    whatis::COMMAND,
    why::COMMAND,
];

/// Runs one command line such as `why 0xffff888000000000`. What `context` does not ask for is empty in the answer.
pub fn run(context: &Context<'_>, line: &str) -> Result<Output, CommandError> {
    // crash's short form: `*page ADDR`.
    let (star, line) = match line.trim_start().strip_prefix('*') {
        Some(rest) => (Some("struct"), rest),
        None => (None, line),
    };
    let mut words = star.into_iter().chain(line.split_whitespace());
    let name = words.next().unwrap_or("help");
    // gdb's spelling of -x and -d: `p/x jiffies`.
    let (name, style) = match name.split_once('/') {
        Some((name, "x")) => (name, Some("-x")),
        Some((name, "d")) => (name, Some("-d")),
        _ => (name, None),
    };
    let arguments: Vec<&str> = style.into_iter().chain(words).collect();
    let Output { text, json } = (find(name)?.run)(context, &arguments)?;
    // Most commands make both.
    Ok(Output::of(context.form, || text, || json))
}

/// Number of the form of JSON answers; goes up when a key goes or changes its meaning.
pub const SCHEMA: u32 = 1;

/// The answer to `line` as one JSON value that says what it answers.
pub fn envelope(line: &str, result: Result<Output, CommandError>) -> serde_json::Value {
    let (key, value) = match result {
        Ok(output) => ("result", output.json),
        Err(error) => ("error", error.to_string().into()),
    };
    object([("schema", SCHEMA.into()), ("command", line.into()), (key, value)])
}

/// Whether a command line may be run again when its answer is doubtful: whether it only looks.
pub fn only_looks(line: &str) -> bool {
    !matches!(line.split_whitespace().next(), Some("dump" | "qemu"))
}

/// Whether there is a command called `name`.
pub fn exists(name: &str) -> bool {
    find(name).is_ok()
}

/// The command called `name`.
fn find(name: &str) -> Result<&'static Command, CommandError> {
    COMMANDS.iter().find(|command| command.name == name).ok_or_else(|| {
        let known: Vec<&str> = COMMANDS.iter().map(|command| command.name).collect();
        CommandError(format!("unknown command '{}'; there are: {}", printable(name), known.join(", ")))
    })
}

/// A CPU as typed: its number.
fn cpu_argument<'a>(context: &Context<'a>, text: &str) -> Result<&'a Cpu, CommandError> {
    let id = text
        .parse()
        .map_err(|_| CommandError(format!("'{}' is not the number of a CPU", printable(text))))?;
    cpu(context.machine, CpuId(id))
}

fn cpu(machine: &Machine, id: CpuId) -> Result<&Cpu, CommandError> {
    machine.cpu(id).ok_or_else(|| CommandError(format!("there is no CPU {id}; 'info' lists them")))
}

/// The first line of an answer that depends on the CPU: which one it is about, and what ran there.
fn about(cpu: &Cpu) -> String {
    format!("CPU {}{}\n", cpu.id, info::running(cpu))
}

/// Refuses arguments to a command that takes none.
fn no_arguments(command: &str, arguments: &[&str]) -> Result<(), CommandError> {
    match arguments {
        [] => Ok(()),
        _ => Err(CommandError(format!("'{command}' takes no argument; try 'help {command}'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_an_example_in_its_help() {
        for command in COMMANDS {
            assert!(command.help.contains("Example"), "{}", command.name);
            assert!(!command.summary.ends_with('.'), "{}", command.name);
        }
    }
}
