//! A guardian: a process that gives the guest back if kstub is killed while it has run control.
//!
//! QEMU leaves a guest stopped, and its breakpoints put, when the client of its stub goes away. While run control is
//! taken a child process waits at the end of a pipe; if that ends without a word, it connects to the stub itself,
//! which removes all breakpoints, and lets the guest run if it is to. So it does, by the monitor alone, for one that is
//! only stopped for a moment. It is the program that [`enable`] was given, which calls [`run`]. Source: QEMU `gdbstub/gdbstub.c` (`handle_target_halt`, `handle_detach`), `pipe(7)`.

use super::SocketAddress;
use super::qmp::Qmp;
use super::state::{FLUSHED, SUSPENDED, let_run, run_state};
use super::stub::Stub;
use crate::backend::live::LiveError;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::retry_on_intr;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{self, BufRead, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

/// What the guarded process says when the guest needs no help.
const FAREWELL: &[u8] = b"farewell\n";
/// What a guardian says once it knows its errand.
const READY: &[u8] = b"ready\n";
/// How long it may take until then.
const START: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// The longest errand, or word, that is read.
const LONGEST_ERRAND: u64 = 64 << 10;

static PROGRAM: OnceLock<(PathBuf, Vec<OsString>)> = OnceLock::new();

/// From now on run control has a guardian: `program` with `arguments`, which must do nothing but [`run`].
pub fn enable(program: PathBuf, arguments: Vec<OsString>) {
    // Only the first call counts.
    let _ = PROGRAM.set((program, arguments));
}

/// What a guardian has to know.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(super) struct Errand {
    /// `None` for a guest that is stopped by its monitor.
    pub(super) stub: Option<SocketAddress>,
    pub(super) qmp: SocketAddress,
    /// Whether the guest is to run in the end.
    pub(super) runs: bool,
    /// Whether vCPUs may have steps to take that they have not taken.
    pub(super) stepped: bool,
    /// Whether the stub was started for us.
    pub(super) started: bool,
    /// The directory of its socket.
    pub(super) directory: Option<PathBuf>,
}

/// A guardian that waits.
pub(super) struct Guardian {
    child: Child,
    pipe: ChildStdin,
}

impl Guardian {
    /// Starts one; none if that is not enabled, or fails, which is said.
    pub(super) fn start(errand: &Errand) -> Option<Self> {
        let (program, arguments) = PROGRAM.get()?;
        let start = || -> io::Result<Self> {
            let mut child = Command::new(program)
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                // Ctrl-C on our terminal is not meant for it.
                .process_group(0)
                .spawn()?;
            let pipe = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
            let words = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
            let mut guardian = Self { child, pipe };
            match guardian.send(errand, words) {
                Ok(()) => Ok(guardian),
                Err(error) => {
                    // Left alone it would find the pipe's end and help while we are there.
                    let _ = guardian.child.kill();
                    let _ = guardian.child.wait();
                    Err(error)
                }
            }
        };
        start()
            .inspect_err(|error| {
                tracing::warn!("no guardian ({error}): if kstub is killed, the guest stays stopped");
            })
            .ok()
    }

    /// Tells it the errand and waits until it says that it is ready: to start takes time for which the guest shall not
    /// stand.
    fn send(&mut self, errand: &Errand, mut words: ChildStdout) -> io::Result<()> {
        self.tell(errand)?;
        let ready =
            retry_on_intr(|| rustix::event::poll(&mut [PollFd::new(&words, PollFlags::IN)], Some(&START)))?;
        if ready == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut word = [0; READY.len()];
        words.read_exact(&mut word)?;
        if word == READY { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// Tells it another errand, in place of the last.
    pub(super) fn tell(&mut self, errand: &Errand) -> io::Result<()> {
        let mut line = serde_json::to_vec(errand)?;
        line.push(b'\n');
        self.pipe.write_all(&line)
    }

    /// The guest needs no help: the guardian ends.
    pub(super) fn farewell(mut self) {
        // It may have been killed itself.
        let _ = self.pipe.write_all(FAREWELL);
        drop(self.pipe);
        let _ = self.child.wait();
    }
}

/// The guardian's whole life: reads its errand from standard input, waits for the end, and helps if it must.
pub fn run() -> Result<(), LiveError> {
    let mut input = io::stdin().lock();
    let failed = |error: io::Error| LiveError::Gone(format!("no errand: {error}"));
    let first = line(&mut input).map_err(failed)?;
    let mut errand: Errand = serde_json::from_slice(&first).map_err(|error| failed(error.into()))?;
    io::stdout().write_all(READY).and_then(|()| io::stdout().flush()).map_err(failed)?;
    // A line that was cut off is none.
    while let Ok(word) = line(&mut input)
        && word.ends_with(b"\n")
    {
        if word == FAREWELL {
            return Ok(());
        }
        errand = serde_json::from_slice(&word).unwrap_or(errand);
    }
    help(&errand)
}

fn line(input: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    input.take(LONGEST_ERRAND).read_until(b'\n', &mut line)?;
    Ok(line)
}

/// Gives the guest back as far as that goes: by the stub, then by the monitor.
fn help(errand: &Errand) -> Result<(), LiveError> {
    // First of all, to be served before another session that is started now.
    let monitor = Qmp::connect(&errand.qmp, Box::new(|_, _| {}));
    let sleeps = monitor.as_ref().is_ok_and(|qmp| run_state(qmp).is_ok_and(|state| state == SUSPENDED));
    let by_stub = errand.stub.as_ref().map(|stub| by_stub(stub, errand.runs && !sleeps, errand.stepped));
    let by_monitor = monitor.and_then(|qmp| {
        let runs = if errand.runs { let_run(&qmp) } else { Ok(()) };
        if errand.started {
            qmp.human("gdbserver none")?;
        }
        runs
    });
    let is_gone = |outcome: &Result<(), LiveError>| matches!(outcome, Err(LiveError::Gone(_)));
    // Kept otherwise, for the next session to find. Only the socket is in it.
    if let Some(directory) = &errand.directory
        && (by_monitor.is_ok() || is_gone(&by_monitor) && by_stub.as_ref().is_none_or(is_gone))
    {
        let _ = std::fs::remove_file(directory.join("gdb"));
        let _ = std::fs::remove_dir(directory);
    }
    by_stub.map_or(by_monitor.clone(), |by_stub| by_stub.or(by_monitor))
}

/// Gives the guest back by a connection of its own to the stub, which serves it once the last one has ended.
pub(super) fn by_stub(stub: &SocketAddress, runs: bool, stepped: bool) -> Result<(), LiveError> {
    // It removes the breakpoints.
    let (mut stub, _) = Stub::connect_within(stub, FLUSHED)?;
    let mut outcome = stub.raw(b"Qqemu.PhyMemMode:0").map(drop);
    if stepped {
        stub.suspect_steps();
        outcome = outcome.and(stub.end_steps());
    }
    if runs { outcome.and(stub.detach()) } else { outcome }
}
