//! Run control of a guest: QEMU's GDB stub, found or started, and what was put into the guest with it.
//!
//! A stub that was started here is ended here. Source: QEMU `hmp-commands.hx` (`gdbserver`), `gdbstub/system.c`.

use super::events::Ours;
use super::guard::{Errand, Guardian};
use super::qmp::{Qmp, nonsense};
use super::replies::StopReply;
use super::stub::Stub;
use super::{QmpAddress, SocketAddress, StubAddress};
use crate::addr::VirtAddr;
use crate::arch::x86_64::RegisterFile;
use crate::backend::live::{LiveError, Point, Stop, StopReason};
use qapi::qmp::query_chardev;
use serde_json::Value;
use std::fs::Permissions;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

const ATTACHING: &str = "attaching to QEMU's GDB stub";

/// The protocol's number for a stop that was asked for.
const SIGINT: u8 = 2;

/// Run control that is taken.
pub(super) struct Control {
    pub(super) stub: Stub,
    /// Whether the guest ran before.
    pub(super) ran: bool,
    /// Where it stopped last.
    pub(super) stop: Stop,
    /// QEMU's name for its state since.
    pub(super) state: &'static str,
    /// While it runs: its stop is not by others.
    pub(super) hold: Option<Ours>,
    points: Vec<(Point, VirtAddr, u64)>,
    started: Option<Started>,
    guardian: Option<Guardian>,
}

/// Breakpoints that were taken away for a while.
#[must_use]
pub(super) struct Lifted(Vec<(VirtAddr, u64)>);

/// A stub that was started for us; its socket's directory, unless it listens at a port.
struct Started {
    directory: Option<tempfile::TempDir>,
}

impl Control {
    /// Takes run control, which stops the guest. `ran` is whether it ran before.
    pub(super) fn attach(
        qmp: &Qmp,
        qmp_address: &QmpAddress,
        given: Option<&StubAddress>,
        ran: bool,
    ) -> Result<Self, LiveError> {
        let (address, started) = match given {
            Some(address) => (address.clone(), None),
            None => match running_stub(qmp)? {
                Some(address) => (address, None),
                None => {
                    let (address, started) = start_stub(qmp)?;
                    (address, Some(started))
                }
            },
        };
        // Before the guest is stopped.
        let guardian = Guardian::start(&Errand {
            stub: Some(address.clone()),
            qmp: qmp_address.clone(),
            ran,
            started: started.is_some(),
            directory: started.as_ref().and_then(|one| Some(one.directory.as_ref()?.path().to_owned())),
        });
        match Stub::connect(&address) {
            Ok((stub, stop)) => {
                tracing::info!("attached to QEMU's GDB stub at {address}");
                let stop = stop_of(stop);
                Ok(Self {
                    stub,
                    ran,
                    stop,
                    state: "paused",
                    hold: None,
                    points: Vec::new(),
                    started,
                    guardian,
                })
            }
            Err(error) => {
                end_stub(qmp, started);
                // Who called lets the guest run again.
                guardian.into_iter().for_each(Guardian::farewell);
                Err(error)
            }
        }
    }

    /// The registers of every vCPU, by its index.
    pub(super) fn registers(&mut self) -> Result<Vec<(u32, RegisterFile)>, LiveError> {
        let mut all = Vec::new();
        for thread in self.stub.threads().to_vec() {
            if let Some(cpu) = thread.cpu() {
                all.push((cpu, self.stub.registers(thread)?));
            }
        }
        all.sort_by_key(|(cpu, _)| *cpu);
        Ok(all)
    }

    pub(super) fn insert(&mut self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError> {
        self.stub.point(true, point, at, len)?;
        if !self.points.contains(&(point, at, len)) {
            self.points.push((point, at, len));
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError> {
        self.points.retain(|one| *one != (point, at, len));
        self.stub.point(false, point, at, len)
    }

    /// Takes away, for a while, the breakpoints that may stand in memory as instructions; returns them.
    pub(super) fn lift(&mut self) -> Result<Lifted, LiveError> {
        let mut lifted = Vec::new();
        for &(point, at, len) in self.points.iter().filter(|(point, ..)| *point == Point::Software) {
            if let Err(error) = self.stub.point(false, point, at, len) {
                self.put_back(Lifted(lifted))?;
                return Err(error);
            }
            lifted.push((at, len));
        }
        Ok(Lifted(lifted))
    }

    /// Puts those back; one that cannot be is none any more, and an error in the end.
    pub(super) fn put_back(&mut self, lifted: Lifted) -> Result<(), LiveError> {
        let mut outcome = Ok(());
        for (at, len) in lifted.0 {
            if let Err(error) = self.stub.point(true, Point::Software, at, len) {
                self.points.retain(|one| *one != (Point::Software, at, len));
                outcome = Err(error);
            }
        }
        outcome
    }

    /// Whether QEMU would let the guest run in its state: otherwise it does nothing and says nothing.
    pub(super) fn may_run(&self) -> Result<(), LiveError> {
        // Source: QEMU `softmmu/runstate.c`, `runstate_needs_reset`, and the states in which it is about to end.
        if matches!(self.state, "internal-error" | "shutdown" | "guest-panicked") {
            let why = format!("it cannot go on after '{}'; reset it, or load a snapshot", self.state);
            return Err(LiveError::NotNow { what: "letting the guest run".into(), why });
        }
        Ok(())
    }

    /// The stop of a guest that was let go.
    pub(super) fn wait(&mut self, patience: Duration) -> Result<Option<Stop>, LiveError> {
        let stop = self.stub.wait(patience)?.map(stop_of);
        self.stop = stop.unwrap_or(self.stop);
        Ok(stop)
    }

    /// The guest stands still, and the stub did not say so.
    pub(super) fn unreported_stop(&mut self) -> Stop {
        self.stub.set_stopped();
        self.stop.reason = StopReason::Signal(SIGINT);
        self.stop
    }

    /// Takes all points away and lets the guest run, or stay. Goes as far as it can.
    pub(super) fn release(mut self, qmp: &Qmp, running: bool) -> Result<(), LiveError> {
        let mut outcome = Ok(());
        for (point, at, len) in std::mem::take(&mut self.points) {
            match self.stub.point(false, point, at, len) {
                Ok(()) | Err(LiveError::Refused { .. }) => {}
                Err(error) => outcome = Err(error),
            }
        }
        outcome = outcome.and(self.stub.end_steps());
        if running {
            outcome = outcome.and(self.stub.detach());
        }
        drop(self.stub);
        end_stub(qmp, self.started);
        if outcome.is_ok() {
            self.guardian.into_iter().for_each(Guardian::farewell);
        }
        outcome
    }
}

/// A vCPU that the stub does not name is the first.
fn stop_of(reply: StopReply) -> Stop {
    Stop { cpu: reply.thread.and_then(|thread| thread.cpu()).unwrap_or(0), reason: reply.reason }
}

/// What QEMU's character device for its stub is connected to.
fn stub_device(qmp: &Qmp) -> Result<Option<String>, LiveError> {
    let answer = qmp.execute(query_chardev {})?;
    let devices = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |device: &Value, key: &str| device.get(key).and_then(Value::as_str).map(str::to_owned);
    let stub = devices.iter().find(|device| text(device, "label").as_deref() == Some("gdb"));
    Ok(stub.and_then(|device| text(device, "filename")))
}

/// Where a stub listens that QEMU has already.
fn running_stub(qmp: &Qmp) -> Result<Option<StubAddress>, LiveError> {
    let Some(device) = stub_device(qmp)? else { return Ok(None) };
    let not_now = |why: String| LiveError::NotNow { what: ATTACHING.into(), why };
    match device.strip_prefix("disconnected:") {
        Some(address) => match SocketAddress::parse(address) {
            // A killed session's, in a directory that is gone. QEMU has one stub at a time.
            Ok(SocketAddress::Unix(path)) if !path.exists() && qmp.peer().is_some() => {
                qmp.human("gdbserver none")?;
                Ok(None)
            }
            Ok(address) => Ok(Some(address)),
            Err(_) => Err(not_now(format!("it is at '{device}', where kstub cannot connect"))),
        },
        None => {
            Err(not_now(format!("another debugger is connected to it ({device}); disconnect that first")))
        }
    }
}

/// Has QEMU start a stub that only this process finds.
fn start_stub(qmp: &Qmp) -> Result<(StubAddress, Started), LiveError> {
    // A socket in a directory of mode 0700 can be made by a QEMU of the same user, or of root.
    if let Some((_, user)) = qmp.peer()
        && let Ok(directory) =
            tempfile::Builder::new().prefix("kstub-").permissions(Permissions::from_mode(0o700)).tempdir()
        && directory.path().metadata().is_ok_and(|made| user == made.uid() || user == 0)
    {
        let path = directory.path().join("gdb");
        // The monitor's words end at blanks, options at commas.
        let plain = path.to_str().is_some_and(|path| !path.contains([' ', ',', '"', '\\']));
        if plain {
            qmp.human(&format!("gdbserver unix:{},server=on,wait=off", path.display()))?;
            if path.exists() {
                return Ok((SocketAddress::Unix(path), Started { directory: Some(directory) }));
            }
        }
    }
    let answer = qmp.human("gdbserver tcp:127.0.0.1:0,server=on,wait=off")?;
    let device = stub_device(qmp)?.ok_or_else(|| LiveError::Refused {
        what: "starting QEMU's GDB stub".into(),
        why: answer.trim().to_owned(),
    })?;
    let address = device.strip_prefix("disconnected:").unwrap_or(&device);
    let address = SocketAddress::parse(address).map_err(|_| nonsense("query-chardev", &device))?;
    Ok((address, Started { directory: None }))
}

fn end_stub(qmp: &Qmp, started: Option<Started>) {
    let Some(started) = started else { return };
    if let Err(error) = qmp.human("gdbserver none") {
        tracing::warn!("QEMU's GDB stub was not ended: {error}");
    }
    drop(started.directory);
}
