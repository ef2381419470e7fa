//! What a machine that can run offers besides memory and registers.
//!
//! Knows run control as a debugger means it, and no packet: vCPUs go by their index, addresses are the guest's own.
//! Whoever holds a [`LiveControl`] sees the machine as it is now; a [`Backend`] from [`LiveControl::snapshot`] has the
//! registers of one moment over memory that goes on changing unless the guest is stopped.
//! Source: GDB manual, "Packets" (`vCont`, `Z0` to `Z4`), "Stop Reply Packets"; QEMU `docs/interop/qemu-qmp-ref`.

use super::Backend;
use crate::addr::{PhysAddr, VirtAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// A place that stops the guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Point {
    /// `Z0`: a breakpoint by an instruction put there (QEMU under TCG changes no memory for it).
    Software,
    /// `Z1`: a breakpoint by the CPU's own means.
    Hardware,
    /// `Z2`: a write to memory.
    Write,
    /// `Z3`: a read of memory.
    Read,
    /// `Z4`: either.
    Access,
}

/// What a vCPU is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Go {
    /// Run until something stops the guest.
    Continue,
    /// One instruction.
    Step,
}

/// Why the guest stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopReason {
    /// A signal's number as the protocol has it: 5 for a breakpoint or a step, 2 when it was asked to stop.
    Signal(u8),
    /// A watchpoint, at the address that was accessed.
    Watch(Point, VirtAddr),
    /// The recording that is replayed has no more in the direction it went.
    ReplayEnd,
}

/// A stop of the whole guest: no vCPU runs any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stop {
    /// Index of the vCPU that stopped it.
    pub cpu: u32,
    /// Why.
    pub reason: StopReason,
}

/// What a guest is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RunState {
    /// Its vCPUs run.
    Running,
    /// They do not, for the reason that QEMU gives: "paused", "prelaunch", "debug", "guest-panicked", …
    Stopped(&'static str),
}

/// What happened to the guest by other hands than ours. Each is reported once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Happening {
    /// It was reset, or rebooted itself: another boot, maybe another kernel, begins.
    Reset,
    /// Its memory is another's: a snapshot was loaded, or it was migrated away.
    Replaced(String),
    /// Somebody else (another monitor, libvirt) stopped it, or it panicked.
    Stopped,
    /// Somebody else let it run.
    Resumed,
}

/// What was seen of a guest that stood.
pub struct Glimpse {
    /// The machine, with its registers of then.
    pub machine: Arc<dyn Backend>,
    /// How long it was stopped for that, from the order to stop until it went on; `None` if it stood anyway.
    pub stood: Option<Duration>,
}

/// A dump of the guest that is to be written.
#[derive(Clone, Copy, Debug)]
pub struct DumpOrder<'a> {
    /// The file, which gets this name when it is complete.
    pub path: &'a Path,
    /// QEMU's name of the format: "elf", "kdump-zlib", …
    pub format: &'a str,
    /// Whether an ELF file's segments have the virtual addresses of the page tables that the CPUs use.
    pub paging: bool,
    /// Whether a plain file that has the name is replaced.
    pub replace: bool,
}

impl DumpOrder<'_> {
    /// Whether every byte of RAM takes one of the file.
    pub fn is_raw(&self) -> bool {
        self.format == "elf" && !self.paging
    }
}

/// A dump that was written.
#[derive(Clone, Copy, Debug)]
pub struct Dumped {
    /// The size of the file.
    pub bytes: u64,
    /// Whether the guest ran when it was ordered.
    pub ran: bool,
    /// How long it then stood, as far as QEMU said.
    pub stood: Option<Duration>,
    /// What it does now.
    pub state: RunState,
    /// How many breakpoints stand in the dumped memory as instructions (KVM, dumped while it was let run).
    pub breakpoints: usize,
}

/// Why the guest could not be asked or told something.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LiveError {
    /// QEMU is no longer there: it quit, was killed, or closed the connection.
    #[error("QEMU is gone: {0}")]
    Gone(String),
    /// QEMU answered, and said no.
    #[error("{what}: QEMU refuses: {why}")]
    Refused {
        /// What was asked.
        what: String,
        /// Its words.
        why: String,
    },
    /// QEMU answered, and the answer makes no sense.
    #[error("{what}: QEMU's answer makes no sense: {answer}")]
    Nonsense {
        /// What was asked.
        what: String,
        /// The beginning of the answer, printable.
        answer: String,
    },
    /// No answer within the time that there is.
    #[error("{what}: no answer from QEMU within {seconds} s (is it stopped itself, or busy?)")]
    Timeout {
        /// What was asked.
        what: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// It cannot be asked now: there is no run control, the guest runs, another debugger is there.
    #[error("{what}: {why}")]
    NotNow {
        /// What was asked.
        what: String,
        /// Why not, and the cure.
        why: String,
    },
    /// What was given as the address of QEMU is none.
    #[error("'{0}' is no address of QEMU: give unix:PATH, PATH or HOST:PORT")]
    Address(String),
    /// The session was opened without `--allow-write`.
    #[error("{0} would change the guest; start kstub with --allow-write to let it")]
    ReadOnly(String),
}

/// A running or stopped guest.
///
/// Everything up to [`Self::attach`] but [`Self::glimpse`] neither stops nor changes it.
pub trait LiveControl: Send + Sync {
    /// The machine with its registers as they are at this moment. A guest that runs is not stopped for it.
    fn snapshot(&self) -> Result<Arc<dyn Backend>, LiveError>;

    /// Whether it runs.
    fn run_state(&self) -> Result<RunState, LiveError>;

    /// What happened since this was last asked, oldest first.
    fn happenings(&self) -> Vec<Happening>;

    /// Whether clients may change the guest (`--allow-write`).
    fn may_write(&self) -> bool;

    /// Answers a line of QEMU's human monitor. The caller sees to it that the line is harmless or allowed.
    fn monitor(&self, line: &str) -> Result<String, LiveError>;

    /// Shows the machine to `look` while it stands, with registers of about that time. A guest that runs is stopped for
    /// it, as the monitor's `stop` does, and runs again. Returns the machine with the registers of then, over memory
    /// that goes on.
    fn glimpse(&self, look: &mut dyn FnMut(&Arc<dyn Backend>)) -> Result<Glimpse, LiveError>;

    /// Takes run control (QEMU's own GDB stub, which is started if none is), which stops the guest, and says where.
    /// Nothing but the answer if it is taken.
    fn attach(&self) -> Result<Stop, LiveError>;

    /// Whether the guest ran when run control was taken; `None` without run control.
    fn ran_before(&self) -> Option<bool>;

    /// What becomes of the guest if this process dies while it has run control: it runs, it stands, or (`None`) it is as it
    /// was when run control was taken.
    fn on_death(&self, running: Option<bool>);

    /// Passes a packet on to QEMU's stub that is about stepping (`qqemu.sstep`, `Qqemu.sstep=7`, `qqemu.sstepbits`), and
    /// returns its answer. Needs run control and a stopped guest.
    fn stub_packet(&self, packet: &[u8]) -> Result<Vec<u8>, LiveError>;

    /// Gives run control up: all points are removed, and the guest runs or stays as `running` says.
    fn detach(&self, running: bool) -> Result<(), LiveError>;

    /// Whether it can be run backwards now (QEMU replays a recording).
    fn can_reverse(&self) -> bool;

    /// Puts a point at `at` (for watchpoints of `len` bytes). Needs run control and a stopped guest.
    fn insert(&self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError>;

    /// Takes one away that was put there.
    fn remove(&self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError>;

    /// Lets the vCPUs go and returns at once. Each vCPU does what the first action that names it, or names all
    /// (`None`), says; one that no action names stays where it is.
    fn resume(&self, actions: &[(Option<u32>, Go)]) -> Result<(), LiveError>;

    /// Runs the whole guest backwards.
    fn reverse(&self, go: Go) -> Result<(), LiveError>;

    /// Asks for a stop; it comes through [`Self::wait_stop`].
    fn interrupt(&self) -> Result<(), LiveError>;

    /// The stop that ended the last [`Self::resume`], once the guest stands still; `None` if that takes longer than
    /// `patience`.
    fn wait_stop(&self, patience: Duration) -> Result<Option<Stop>, LiveError>;

    /// Has a dump written, for which a guest that runs is stopped, and runs again. Memory is as the guest has it, without
    /// what breakpoints put there while it stands. `progress` gets bytes done and bytes to do.
    fn dump(&self, order: &DumpOrder<'_>, progress: &dyn Fn(u64, u64)) -> Result<Dumped, LiveError>;

    /// Writes guest memory through QEMU, which tells TCG and whoever logs dirty pages.
    fn write_phys(&self, at: PhysAddr, bytes: &[u8]) -> Result<(), LiveError>;

    /// Sets a register of a vCPU, by its name in QEMU's target description ("rax", "cr3"), from little-endian bytes.
    fn write_register(&self, cpu: u32, name: &str, value: &[u8]) -> Result<(), LiveError>;
}
