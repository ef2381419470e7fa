//! What the scheduler knows of a task: its state, CPU and times.
//!
//! Source: `include/linux/sched.h` (states, flags), `fs/proc/array.c` (`get_task_state`), `kernel/sched/sched.h`.

use super::fields::Fields;
use super::{CpuId, Kernel, ObjectError};
use crate::addr::VirtAddr;

/// `PF_KTHREAD`: the task is the kernel's own.
const PF_KTHREAD: u64 = 0x0020_0000;

// These have kept their values since v4.14; later kernels only added some.
const TASK_UNINTERRUPTIBLE: u64 = 0x2;
/// `TASK_REPORT`: what user space is told of.
const TASK_REPORT: u64 = 0x7f;
const TASK_DEAD: u64 = 0x80;
const TASK_WAKING: u64 = 0x200;
/// `TASK_UNINTERRUPTIBLE | TASK_NOLOAD`.
const TASK_IDLE: u64 = 0x402;
const TASK_NEW: u64 = 0x800;
/// Waits for a sleeping spinlock (PREEMPT_RT).
const TASK_RTLOCK_WAIT: u64 = 0x1000;
/// Since Linux commit f5d39b020809 ("freezer,sched: Rewrite core freezer logic") (in v6.1).
const TASK_FROZEN: u64 = 0x8000;

/// What a task is about: `__state` together with `exit_state`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct State {
    /// `__state`, called `state` before v5.14: 0 is running or ready to run.
    pub state: u64,
    /// `exit_state`: set when the task has ended.
    pub exit: u64,
}

/// Letter of `/proc`, crash's two letters, and the words.
const STATES: [(u64, char, &str, &str); 9] = [
    (0, 'R', "RU", "running or ready to run"),
    (0x1, 'S', "IN", "sleeping, interruptible"),
    (0x2, 'D', "UN", "sleeping, uninterruptible"),
    (0x4, 'T', "ST", "stopped"),
    (0x8, 't', "TR", "traced"),
    (0x10, 'X', "DE", "dead"),
    (0x20, 'Z', "ZO", "zombie"),
    (0x40, 'P', "PA", "parked"),
    (TASK_IDLE, 'I', "ID", "idle"),
];

impl State {
    fn row(self) -> (u64, char, &'static str, &'static str) {
        let Self { state, exit } = self;
        let bit = if state & TASK_IDLE == TASK_IDLE {
            TASK_IDLE
        } else if state & (TASK_RTLOCK_WAIT | TASK_FROZEN) != 0 {
            TASK_UNINTERRUPTIBLE
        } else {
            // As the kernel reports it: the highest bit that is set.
            match (state | exit) & TASK_REPORT {
                0 => 0,
                reported => 1 << reported.ilog2(),
            }
        };
        STATES.into_iter().find(|row| row.0 == bit).unwrap_or((bit, '?', "??", "unknown"))
    }

    /// The letter that `/proc/PID/status` shows.
    pub fn letter(self) -> char {
        self.row().1
    }

    /// The two letters that crash's `ps` shows.
    pub fn short(self) -> &'static str {
        let all = self.state | self.exit;
        match self.row().2 {
            "RU" if all & TASK_NEW != 0 => "NE",
            "RU" if all & TASK_WAKING != 0 => "WA",
            "RU" if all & TASK_DEAD != 0 => "DE",
            other => other,
        }
    }

    /// In words.
    pub fn words(self) -> &'static str {
        match self.short() {
            "NE" => "new",
            "WA" => "waking",
            "DE" => "dead",
            _ => self.row().3,
        }
    }

    /// Whether the task has ended.
    pub fn has_ended(self) -> bool {
        self.exit != 0
    }
}

/// Scheduling policies by number (`include/uapi/linux/sched.h`).
pub fn policy_name(policy: u64) -> &'static str {
    match policy {
        0 => "NORMAL",
        1 => "FIFO",
        2 => "RR",
        3 => "BATCH",
        5 => "IDLE",
        6 => "DEADLINE",
        7 => "EXT",
        _ => "?",
    }
}

const MEMBERS: &[&[&str]] = &[
    &["pid"],
    &["tgid"],
    &["comm"],
    // Since Linux commit 2f064a59a11f ("sched: Change task_struct::state") (in v5.14).
    &["__state", "state"],
    &["exit_state"],
    // Since Linux commit bcf9033e5449 ("sched: move CPU field back into thread_info if THREAD_INFO_IN_TASK=y")
    // (in v5.16).
    &["thread_info.cpu", "cpu"],
    &["flags"],
    &["real_parent"],
    &["group_leader"],
    &["mm"],
    &["stack"],
    &["thread.sp"],
    // Without CONFIG_SCHED_INFO the scheduler's own clock has to do.
    &["sched_info.last_arrival", "se.exec_start"],
    &["start_time"],
    &["utime"],
    &["stime"],
    &["policy"],
    &["prio"],
];
const PID: usize = 0;
const TGID: usize = 1;
const COMM: usize = 2;
const STATE: usize = 3;
const EXIT_STATE: usize = 4;
const CPU: usize = 5;
const FLAGS: usize = 6;
const PARENT: usize = 7;
const LEADER: usize = 8;
const MM: usize = 9;
const STACK: usize = 10;
const SP: usize = 11;
const LAST_RUN: usize = 12;
const START: usize = 13;
const UTIME: usize = 14;
const STIME: usize = 15;
const POLICY: usize = 16;
const PRIO: usize = 17;

/// What `ps` shows of a task; `None` is missing or unreadable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskInfo {
    /// Its `struct task_struct`.
    pub at: VirtAddr,
    /// The thread's own number, in the first pid namespace.
    pub pid: Option<i32>,
    /// The process's number.
    pub tgid: Option<i32>,
    /// Untrusted.
    pub comm: Option<String>,
    /// What it is about.
    pub state: Option<State>,
    /// Where it runs, ran last or is queued.
    pub cpu: Option<CpuId>,
    /// Whether it is the kernel's own.
    pub is_kernel: bool,
    /// Its parent's task.
    pub parent: Option<VirtAddr>,
    /// The process's first thread.
    pub leader: Option<VirtAddr>,
    /// Its user memory; kernel threads and tasks that ended have none.
    pub mm: Option<VirtAddr>,
    /// Lowest address of its kernel stack; `None` once released.
    pub stack: Option<VirtAddr>,
    /// Kernel stack pointer as of its last switch.
    pub sp: Option<VirtAddr>,
    /// When it was last given a CPU, in nanoseconds of the scheduler's clock.
    pub last_run: Option<u64>,
    /// When it was made, in nanoseconds of the monotonic clock.
    pub start: Option<u64>,
    /// Nanoseconds in user mode.
    pub utime: Option<u64>,
    /// Nanoseconds in the kernel.
    pub stime: Option<u64>,
    /// Scheduling policy: see [`policy_name`].
    pub policy: Option<u64>,
    /// Priority as the scheduler uses it: below 100 real time, 120 is nice 0, 140 idle tasks' own.
    pub prio: Option<i32>,
}

/// Reads tasks.
pub struct TaskReader<'k> {
    fields: Fields<'k>,
    is_uniprocessor: bool,
}

impl Kernel {
    /// A reader for the tasks of this kernel.
    pub fn task_reader(&self) -> Result<TaskReader<'_>, ObjectError> {
        let fields = Fields::new(self, "task_struct", MEMBERS)?;
        let is_uniprocessor = !fields.has(CPU);
        Ok(TaskReader { fields, is_uniprocessor })
    }
}

impl TaskReader<'_> {
    /// What is known of the task at `at`.
    pub fn read(&self, at: VirtAddr) -> TaskInfo {
        let row = self.fields.read(at);
        // EXIT_DEAD and EXIT_ZOMBIE are 32 bits wide, and so has the state been since v5.14.
        let state = row.u64(STATE).zip(row.u64(EXIT_STATE)).map(|(state, exit)| State { state, exit });
        let cpu = match self.is_uniprocessor {
            true => Some(0),
            false => row.u64(CPU).and_then(|cpu| u32::try_from(cpu).ok()),
        };
        TaskInfo {
            at,
            pid: row.i32(PID),
            tgid: row.i32(TGID),
            comm: row.text(COMM),
            state,
            cpu: cpu.map(CpuId),
            is_kernel: row.u64(FLAGS).is_some_and(|flags| flags & PF_KTHREAD != 0),
            parent: row.pointer(PARENT),
            leader: row.pointer(LEADER),
            mm: row.pointer(MM),
            stack: row.pointer(STACK),
            sp: row.pointer(SP),
            last_run: row.u64(LAST_RUN),
            start: row.u64(START),
            utime: row.u64(UTIME),
            stime: row.u64(STIME),
            policy: row.u64(POLICY),
            prio: row.i32(PRIO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The combinations that `fs/proc/array.c` and crash tell apart.
    #[test]
    fn states_are_what_proc_says() {
        let of = |state, exit| {
            let state = State { state, exit };
            (state.letter(), state.short())
        };
        assert_eq!(of(0, 0), ('R', "RU"));
        assert_eq!(of(1, 0), ('S', "IN"));
        assert_eq!(of(0x2001, 0), ('S', "IN"), "freezable");
        assert_eq!(of(2, 0), ('D', "UN"));
        assert_eq!(of(0x102, 0), ('D', "UN"), "TASK_KILLABLE");
        assert_eq!(of(0x402, 0), ('I', "ID"));
        assert_eq!(of(0x2402, 0), ('I', "ID"), "freezable");
        assert_eq!(of(0x8000, 0), ('D', "UN"), "frozen");
        assert_eq!(of(0x104, 0), ('T', "ST"));
        assert_eq!(of(0x108, 0), ('t', "TR"));
        assert_eq!(of(0x80, 0x20), ('Z', "ZO"), "TASK_DEAD on its way out");
        assert_eq!(of(0x80, 0x10), ('X', "DE"));
        assert_eq!(of(0x40, 0), ('P', "PA"));
        assert_eq!(of(0x200, 0), ('R', "WA"));
        assert_eq!(of(0x800, 0), ('R', "NE"));
    }
}
