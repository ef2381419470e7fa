//! CPUs and tasks as threads of the one process.
//!
//! Thread `n` is CPU `n - 1`, since the protocol has no thread 0; where tasks are shown too, thread
//! 1000000000 + pid is a task, so that the pid stands in what gdb prints. Names and descriptions come from the dump
//! and are shown on a terminal: nothing but printable text leaves this file.
//! Source: GDB manual, "Packets" (thread-id), "Thread List Format".

use crate::addr::VirtAddr;
use crate::arch::x86_64::RegisterFile;
use crate::bytes::printable;
use crate::kernel::{Cpu, CpuId, Kernel, Machine, Object};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::num::NonZeroUsize;

/// The process all threads belong to; gdbstub hard-codes the same.
const PROCESS: usize = 1;
/// Thread ids of tasks begin here: above any number of CPUs.
const FIRST_TASK: u32 = 1_000_000_000;

/// What clients are shown as threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Show {
    /// CPUs.
    #[default]
    Cpus,
    /// Tasks, those that run with the registers of their CPU; CPUs that are idle, or whose task is not known, stay.
    Tasks,
    /// CPUs, and behind them every task that does not run, with the registers it goes on with.
    All,
}

/// A thread of the protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Thread {
    /// A CPU, and whatever ran on it.
    Cpu(CpuId),
    /// The task with this pid.
    Task(u32),
}

/// The threads that one client sees, in the order of their list.
pub(super) struct Threads {
    cpus: Vec<CpuId>,
    tasks: BTreeMap<u32, TaskThread>,
}

/// A task that is a thread: address of its `struct task_struct`, and the CPU that runs it, if one does.
struct TaskThread {
    at: VirtAddr,
    runs_on: Option<CpuId>,
}

impl Threads {
    pub(super) fn new(machine: &Machine, show: Show) -> Self {
        let mut cpus: Vec<CpuId> = machine.cpus().iter().map(|cpu| cpu.id).collect();
        let mut tasks = match (show, machine.kernel()) {
            (Show::Tasks | Show::All, Some(kernel)) => tasks(kernel),
            _ => BTreeMap::new(),
        };
        match show {
            Show::Tasks => cpus.retain(|&cpu| tasks.values().all(|task| task.runs_on != Some(cpu))),
            Show::Cpus | Show::All => tasks.retain(|_, task| task.runs_on.is_none()),
        }
        Self { cpus, tasks }
    }

    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = Thread> {
        self.cpus.iter().map(|&cpu| Thread::Cpu(cpu)).chain(self.tasks.keys().map(|&pid| Thread::Task(pid)))
    }

    pub(super) fn len(&self) -> usize {
        self.cpus.len() + self.tasks.len()
    }

    pub(super) fn has(&self, thread: Thread) -> bool {
        match thread {
            Thread::Cpu(cpu) => self.cpus.binary_search(&cpu).is_ok(),
            Thread::Task(pid) => self.tasks.contains_key(&pid),
        }
    }

    /// The task of a thread that stands for one.
    pub(super) fn task<'m>(&self, machine: &'m Machine, thread: Thread) -> Option<Object<'m>> {
        let Thread::Task(pid) = thread else { return None };
        machine.kernel()?.object("task_struct", self.tasks.get(&pid)?.at).ok()
    }

    /// The thread that stands for `cpu`.
    pub(super) fn on(&self, cpu: CpuId) -> Thread {
        let running = self.tasks.iter().find(|(_, task)| task.runs_on == Some(cpu));
        running.map_or(Thread::Cpu(cpu), |(&pid, _)| Thread::Task(pid))
    }

    /// The CPU that a thread is, or that its task last ran on: whose per-CPU data it means.
    pub(super) fn cpu(&self, machine: &Machine, thread: Thread) -> CpuId {
        match thread {
            Thread::Cpu(cpu) => cpu,
            Thread::Task(_) => {
                let task = self.task(machine, thread);
                let last = task.and_then(|task| task.kernel().task_cpu(task).ok());
                last.filter(|&cpu| machine.cpu(cpu).is_some()).unwrap_or(machine.first_cpu())
            }
        }
    }

    /// The registers of a thread; of a task, those it goes on with. `None` if there is no such thread.
    pub(super) fn registers(&self, machine: &Machine, thread: Thread) -> Option<RegisterFile> {
        match thread {
            Thread::Cpu(cpu) => machine.cpu(cpu).map(|cpu| cpu.regs.clone()),
            Thread::Task(_) => {
                let task = self.task(machine, thread)?;
                if let Some(cpu) = self.runs_on(thread) {
                    return machine.cpu(cpu).map(|cpu| cpu.regs.clone());
                }
                // A task whose stack is gone (exited) has none: all of them are then unavailable.
                Some(task.kernel().switched_out_registers(task).unwrap_or_default())
            }
        }
    }

    /// The CPU that runs a thread.
    pub(super) fn runs_on(&self, thread: Thread) -> Option<CpuId> {
        match thread {
            Thread::Cpu(cpu) => Some(cpu),
            Thread::Task(pid) => self.tasks.get(&pid)?.runs_on,
        }
    }

    fn name(&self, machine: &Machine, thread: Thread) -> Option<String> {
        match thread {
            Thread::Cpu(cpu) => machine.cpu(cpu)?.comm.clone(),
            Thread::Task(_) => self.task(machine, thread)?.member("comm").and_then(|comm| comm.text()).ok(),
        }
    }

    /// What a reader must know of a thread, in a few words.
    pub(super) fn describe(&self, machine: &Machine, thread: Thread) -> String {
        match (self.runs_on(thread), thread) {
            (Some(cpu), _) => machine.cpu(cpu).map(describe_cpu).unwrap_or_default(),
            (None, Thread::Cpu(_)) => String::new(),
            (None, Thread::Task(pid)) => {
                let text = format!("pid {pid}, last on CPU {}", self.cpu(machine, thread));
                match self.registers(machine, thread) {
                    Some(regs) if regs != RegisterFile::default() => text,
                    _ => text + ", stack released",
                }
            }
        }
    }

    /// The answer to `qXfer:threads:read`.
    pub(super) fn list(&self, machine: &Machine, multiprocess: bool) -> String {
        let mut xml = String::from("<?xml version=\"1.0\"?>\n<threads>\n");
        for thread in self.iter() {
            let core = self.cpu(machine, thread);
            let _ = write!(xml, "<thread id=\"{}\" core=\"{core}\"", thread.id_text(multiprocess));
            if let Some(name) = self.name(machine, thread) {
                let _ = write!(xml, " name=\"{}\"", xml_escape(&printable(&name)));
            }
            let _ = writeln!(xml, ">{}</thread>", xml_escape(&self.describe(machine, thread)));
        }
        xml.push_str("</threads>\n");
        xml
    }
}

/// All tasks by pid, but for the idle ones (pid 0), which their CPUs stand for.
fn tasks(kernel: &Kernel) -> BTreeMap<u32, TaskThread> {
    let all = kernel.tasks().unwrap_or_else(|error| {
        tracing::warn!("no tasks as threads: {error}");
        Default::default()
    });
    let pid = |task: &Object<'_>| task.get("pid").ok().and_then(|pid| u32::try_from(pid).ok());
    let thread = |task: Object<'_>| {
        let shown = TaskThread { at: task.at, runs_on: kernel.running_on(task) };
        Some((pid(&task).filter(|&pid| pid != 0)?, shown))
    };
    all.tasks.into_iter().filter_map(thread).collect()
}

/// `CPU 3, pid 77, panicked here`
fn describe_cpu(cpu: &Cpu) -> String {
    let mut text = format!("CPU {}", cpu.id.0);
    if let Some(pid) = cpu.pid {
        let _ = write!(text, ", pid {pid}");
    }
    for note in &cpu.notes {
        let _ = write!(text, ", {}", printable(note));
    }
    text
}

impl Thread {
    /// gdbstub's number for it.
    pub(super) fn tid(self) -> NonZeroUsize {
        let number = match self {
            Self::Cpu(cpu) => cpu.0,
            Self::Task(pid) => FIRST_TASK.saturating_add(pid) - 1,
        };
        NonZeroUsize::MIN.saturating_add(number as usize)
    }

    /// The thread with gdbstub's number `tid`.
    pub(super) fn of(tid: NonZeroUsize) -> Option<Self> {
        let tid = u32::try_from(tid.get()).ok()?;
        Some(match tid.checked_sub(FIRST_TASK) {
            Some(pid) => Self::Task(pid),
            None => Self::Cpu(CpuId(tid - 1)),
        })
    }

    /// Its thread-id as this client wants it: `p1.4` or `4`.
    pub(super) fn id_text(self, multiprocess: bool) -> String {
        let tid = self.tid();
        if multiprocess { format!("p{PROCESS}.{tid:x}") } else { format!("{tid:x}") }
    }
}

/// What a thread-id of the protocol chooses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Choice {
    /// `0`, `-1` or a process alone: the client leaves it to us.
    Whichever,
    /// A thread.
    One(Thread),
}

impl Choice {
    /// Reads `p1.2`, `p1`, `2`, `0` or `-1`; `None` if malformed or of another process.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let number = |text: &[u8]| match text {
            b"-1" => Some(0),
            text => crate::rsp::parse_u64(text),
        };
        let thread = match text {
            [b'p', ids @ ..] => {
                let mut parts = ids.splitn(2, |&b| b == b'.');
                let process = number(parts.next()?)?;
                if process > PROCESS as u64 {
                    return None;
                }
                parts.next().unwrap_or(b"-1")
            }
            thread => thread,
        };
        match NonZeroUsize::new(usize::try_from(number(thread)?).ok()?) {
            None => Some(Self::Whichever),
            Some(tid) => Thread::of(tid).map(Self::One),
        }
    }
}

pub(super) fn xml_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_ids_in_every_form() {
        let one = |n| Some(Choice::One(Thread::Cpu(CpuId(n))));
        assert_eq!(Choice::parse(b"1"), one(0));
        assert_eq!(Choice::parse(b"p1.1f"), one(0x1e));
        assert_eq!(Choice::parse(b"p0.2"), one(1));
        assert_eq!(Choice::parse(b"p1.3b9aca07"), Some(Choice::One(Thread::Task(7))));
        for whichever in [&b"0"[..], b"-1", b"p1", b"p1.-1", b"p0.0", b"p-1.-1"] {
            assert_eq!(Choice::parse(whichever), Some(Choice::Whichever));
        }
        for wrong in [&b""[..], b"p", b"p.", b"p1.", b"p2.1", b"-2", b"x", b"100000001", b"p1.1.1"] {
            assert_eq!(Choice::parse(wrong), None, "{}", String::from_utf8_lossy(wrong));
        }
    }

    #[test]
    fn a_thread_is_found_by_its_number() {
        for thread in
            [Thread::Cpu(CpuId(0)), Thread::Cpu(CpuId(8191)), Thread::Task(1), Thread::Task(4 << 20)]
        {
            assert_eq!(Thread::of(thread.tid()), Some(thread));
        }
    }

    #[test]
    fn hostile_names_stay_text() {
        let escaped = xml_escape(&printable("<a&b>\"'\x1b[2J\u{202e}é"));
        assert_eq!(escaped, "&lt;a&amp;b&gt;&quot;&apos;\\u{1b}[2J\\u{202e}é");
    }
}
