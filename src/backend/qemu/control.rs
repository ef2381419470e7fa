//! Run control of a guest: QEMU's GDB stub, found or started, and what was put into the guest with it.
//!
//! A stub that was started here is ended here. Source: QEMU `hmp-commands.hx` (`gdbserver`), `gdbstub/system.c`.

use super::events::Ours;
use super::guard::{self, Errand, Guardian};
use super::offer::{self, Offer};
use super::qmp::Qmp;
use super::replies::StopReply;
use super::state::{FLUSHED, SUSPENDED, let_run, run_state};
use super::stub::{KERNEL_HALF, Stub};
use super::{QmpAddress, StubAddress};
use crate::addr::VirtAddr;
use crate::arch::x86_64::RegisterFile;
use crate::backend::live::{Go, LiveError, Point, RunState, Stop, StopReason};
use qapi::qmp::{cont, query_cpus_fast};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How long a guest may take to stand still once it was told to.
const STANDSTILL: Duration = Duration::from_secs(10);
/// How long the stub is listened to before QEMU is asked what the guest does.
const SLICE: Duration = Duration::from_millis(50);

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
    /// As often as it was put: QEMU counts.
    points: Vec<(Point, VirtAddr, u64)>,
    offer: Offer,
    errand: Errand,
    guardian: Option<Guardian>,
}

/// Breakpoints that were taken away for a while.
#[must_use]
pub(super) struct Lifted(Vec<(VirtAddr, u64)>);

impl Control {
    /// Takes run control, which stops the guest. `ran` is whether it ran before, `runs` whether it is to if this process dies.
    pub(super) fn attach(
        qmp: &Qmp,
        qmp_address: &QmpAddress,
        given: Option<&StubAddress>,
        ran: bool,
        runs: bool,
    ) -> Result<Self, LiveError> {
        let offer = Offer::find(qmp, qmp_address, given)?;
        let errand = Errand {
            stub: Some(offer.address.clone()),
            qmp: qmp_address.clone(),
            runs,
            stepped: false,
            started: offer.is_ours,
            directory: offer.directory(),
        };
        // Before the guest is stopped.
        let guardian = Guardian::start(&errand);
        let connected = Stub::connect(&offer.address).and_then(|(stub, stop)| {
            let stub = offer::of_this_guest(qmp, &offer.address, stub)?;
            Ok((stub, stop))
        });
        match connected {
            Ok((mut stub, stop)) => {
                tracing::info!("attached to QEMU's GDB stub at {}", offer.address);
                if offer.is_left_over {
                    stub.suspect_steps();
                }
                Ok(Self {
                    stub,
                    ran,
                    stop: stop_of(stop),
                    state: "paused",
                    hold: None,
                    points: Vec::new(),
                    offer,
                    errand,
                    guardian,
                })
            }
            Err(error) => {
                offer.withdraw(qmp);
                // To connect may have stopped it, or does so when QEMU comes to it.
                let runs = match ran {
                    true => qmp.execute_within(cont {}, FLUSHED).and_then(|_| let_run(qmp)),
                    false => Ok(()),
                };
                match runs {
                    Ok(()) => guardian.into_iter().for_each(Guardian::farewell),
                    Err(error) => tracing::warn!("the guest may stand: {error}"),
                }
                Err(error)
            }
        }
    }

    /// What the guardian is to do is another thing now.
    pub(super) fn amend(&mut self, change: impl FnOnce(&mut Errand)) {
        change(&mut self.errand);
        if let Some(guardian) = &mut self.guardian
            && let Err(error) = guardian.tell(&self.errand)
        {
            tracing::warn!(
                "the guardian is gone ({error}): if kstub is killed, the guest stays as it is then"
            );
        }
    }

    /// Sees to it that a guest that counts as stopped is: another monitor may have let it run.
    pub(super) fn stand(&mut self, qmp: &Qmp) -> Result<(), LiveError> {
        if run_state(qmp)? != RunState::Running {
            return Ok(());
        }
        tracing::info!("somebody else let the guest run; it is stopped again");
        self.stub.halt()?;
        let deadline = Instant::now() + STANDSTILL;
        while Instant::now() < deadline {
            let state = run_state(qmp)?;
            if self.wait(SLICE)?.is_some() {
                self.follow_cpus(qmp);
                return Ok(());
            }
            // It was stopped at the same moment: QEMU said nothing.
            if let RunState::Stopped(why) = state {
                self.state = why;
                self.unreported_stop();
                return Ok(());
            }
        }
        let what = "stopping the guest, which somebody else let run".to_owned();
        Err(LiveError::Timeout { what, seconds: STANDSTILL.as_secs() })
    }

    /// Takes note of vCPUs that came or went while the guest ran.
    pub(super) fn follow_cpus(&mut self, qmp: &Qmp) {
        let Ok(answer) = qmp.execute(query_cpus_fast {}) else { return };
        let index = |one: &serde_json::Value| u32::try_from(one.get("cpu-index")?.as_u64()?).ok();
        let now: BTreeSet<u32> = answer.as_array().into_iter().flatten().filter_map(index).collect();
        let known: BTreeSet<u32> = self.stub.threads().iter().filter_map(|thread| thread.cpu()).collect();
        if !now.is_empty()
            && now != known
            && let Err(error) = self.stub.list_threads_anew()
        {
            tracing::warn!("QEMU's CPUs have changed, and kstub does not know them: {error}");
        }
    }

    /// Lets vCPUs go.
    pub(super) fn resume(&mut self, actions: &[(Option<u32>, Go)]) -> Result<(), LiveError> {
        let steps = self.offer.is_left_over || actions.iter().any(|(_, go)| *go == Go::Step);
        if steps && !self.errand.stepped {
            self.amend(|errand| errand.stepped = true);
        }
        self.stub.resume(actions)
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
        self.points.push((point, at, len));
        Ok(())
    }

    pub(super) fn remove(&mut self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError> {
        self.forget((point, at, len));
        self.stub.point(false, point, at, len)
    }

    /// By whose page tables a software breakpoint at `at` is put, in the stub's order: those of the vCPU that stopped, and if it
    /// has none for the kernel's half, the others'.
    pub(super) fn whose_tables(&self, at: VirtAddr) -> Vec<u32> {
        let others = self.stub.threads().iter().filter(|_| at >= KERNEL_HALF);
        std::iter::once(self.stop.cpu).chain(others.filter_map(|thread| thread.cpu())).collect()
    }

    /// Whether breakpoints are left where one was removed.
    pub(super) fn has_breakpoint(&self, at: VirtAddr) -> bool {
        self.points.iter().any(|(point, put, _)| *point == Point::Software && *put == at)
    }

    fn forget(&mut self, point: (Point, VirtAddr, u64)) {
        if let Some(index) = self.points.iter().position(|one| *one == point) {
            self.points.remove(index);
        }
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
                self.forget((Point::Software, at, len));
                outcome = Err(error);
            }
        }
        outcome
    }

    /// Whether QEMU would let the guest run in its state: otherwise it does nothing and says nothing.
    pub(super) fn may_run(&self) -> Result<(), LiveError> {
        // Source: QEMU `system/runstate.c`, `runstate_needs_reset`. A guest that panicked may go on.
        let why = match self.state {
            "internal-error" | "shutdown" => {
                format!("it cannot go on after '{}'; reset it, or load a snapshot", self.state)
            }
            // Before QEMU 9.0 it would run, and not as one that was woken.
            "suspended" => "it is suspended; wake it ('system_wakeup' in QEMU's monitor)".to_owned(),
            _ => return Ok(()),
        };
        Err(LiveError::NotNow { what: "letting the guest run".into(), why })
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

    /// Takes all points away and lets the guest run, or stay. Where that fails it is tried by another connection, as the
    /// guardian would, which cannot reach QEMU's monitor as long as this process has it.
    pub(super) fn release(mut self, qmp: &Qmp, running: bool) -> Result<(), LiveError> {
        let mut outcome = self.give_back(qmp, running);
        drop(self.stub);
        if let Err(error) = &outcome {
            tracing::info!("the guest is given back by another connection: {error}");
            let sleeps = run_state(qmp).is_ok_and(|state| state == SUSPENDED);
            outcome = guard::by_stub(&self.offer.address, running && !sleeps, self.errand.stepped);
        }
        // Whatever went wrong, it runs.
        if running {
            outcome = outcome.and(let_run(qmp));
        }
        match &outcome {
            Ok(()) => {
                self.offer.withdraw(qmp);
                self.guardian.into_iter().for_each(Guardian::farewell);
            }
            // It tries, and clears away.
            Err(_) if self.guardian.is_some() => self.offer.leave(),
            Err(_) => {}
        }
        outcome
    }

    fn give_back(&mut self, qmp: &Qmp, running: bool) -> Result<(), LiveError> {
        self.stand(qmp)?;
        self.stub.remove_all_points()?;
        if (running || self.errand.stepped) && self.may_run().is_ok() {
            self.stub.end_steps()?;
        }
        if running && run_state(qmp)? != SUSPENDED { self.stub.detach() } else { Ok(()) }
    }
}

/// A vCPU that the stub does not name is the first.
fn stop_of(reply: StopReply) -> Stop {
    Stop { cpu: reply.thread.and_then(|thread| thread.cpu()).unwrap_or(0), reason: reply.reason }
}
