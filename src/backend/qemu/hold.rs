//! Run control as the guest has it: taken, kept while others interfere, and given back.
//!
//! Knows the order of things and no packet. Source: QEMU `docs/system/gdb.rst`, `system/cpus.c` (`vm_stop`).

use super::control::Control;
use super::dump;
use super::guest::Guest;
use super::qmp::lock;
use super::state::{is_live, is_passing};
use crate::backend::live::{DumpOrder, LiveControl, LiveError, RunState, Stop};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a guest may take to stand still once a stop is reported, and to answer an interrupt.
pub(super) const STANDSTILL: Duration = Duration::from_secs(10);

impl Guest {
    /// Works with run control while the guest stands.
    pub(super) fn with_control<T>(
        &self,
        what: &str,
        work: impl FnOnce(&mut Control) -> Result<T, LiveError>,
    ) -> Result<T, LiveError> {
        let not_now = |why: &str| Err(LiveError::NotNow { what: what.to_owned(), why: why.to_owned() });
        if self.let_go.load(Ordering::SeqCst) {
            return not_now("the guest runs; stop it first");
        }
        match &mut *lock(&self.control) {
            Some(control) if control.stub.is_running() => not_now("the guest runs; stop it first"),
            Some(control) => {
                control.stand(&self.qmp)?;
                work(control)
            }
            None => not_now("kstub has no run control of the guest; attach to it first"),
        }
    }

    pub(super) fn is_attached(&self) -> bool {
        self.let_go.load(Ordering::SeqCst) || lock(&self.control).is_some()
    }

    /// Takes run control, which stops the guest.
    pub(super) fn take_control(&self) -> Result<Stop, LiveError> {
        if self.let_go.load(Ordering::SeqCst) {
            let why = "the guest runs under run control already".to_owned();
            return Err(LiveError::NotNow { what: "attaching".into(), why });
        }
        let mut held = lock(&self.control);
        if let Some(control) = &*held {
            return Ok(control.stop);
        }
        let _ours = self.events.ours();
        let ran = is_live(self.run_state()?);
        let runs = lock(&self.on_death).unwrap_or(ran);
        let mut control = Control::attach(&self.qmp, self.address(), self.stub.as_ref(), ran, runs)?;
        let ready = self.standstill().and_then(|state| Ok((state, control.stub.interrupter()?)));
        match ready {
            Ok((state, interrupter)) => {
                control.state = state;
                *lock(&self.interrupter) = Some(interrupter);
                Ok(held.insert(control).stop)
            }
            Err(error) => {
                if let Err(error) = control.release(&self.qmp, ran) {
                    tracing::warn!("the guest could not be left as it was before: {error}");
                }
                Err(error)
            }
        }
    }

    /// What the guardian does if this process dies, from now on.
    pub(super) fn decide_for_death(&self, running: Option<bool>) {
        *lock(&self.on_death) = running;
        if let Some(control) = &mut *lock(&self.control) {
            let runs = running.unwrap_or(control.ran);
            control.amend(|errand| errand.runs = runs);
        }
    }

    /// Gives run control up. Whatever goes wrong, it is given up then.
    pub(super) fn release(&self, running: bool) -> Result<(), LiveError> {
        if self.let_go.load(Ordering::SeqCst) {
            let stopped = self.interrupt().and_then(|()| self.wait_stop(STANDSTILL));
            if let Err(error) = stopped {
                tracing::info!("the guest is given back without a stop: {error}");
            }
        }
        let Some(mut control) = lock(&self.control).take() else { return Ok(()) };
        self.let_go.store(false, Ordering::SeqCst);
        lock(&self.interrupter).take();
        let _ours = self.events.ours();
        drop(control.hold.take());
        self.events.changed();
        let released = control.release(&self.qmp, running);
        self.patches.clear();
        // What it caused is reported before this is answered.
        let _ = self.run_state();
        released
    }

    /// Whether no vCPU runs, and not only for as long as a snapshot is saved. A QEMU that is busy does not say.
    pub(super) fn is_at_rest(&self) -> Result<bool, LiveError> {
        match self.run_state() {
            Ok(state) => Ok(state != RunState::Running && !is_passing(state)),
            Err(LiveError::Timeout { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// QEMU's state once no vCPU runs.
    pub(super) fn standstill(&self) -> Result<&'static str, LiveError> {
        let deadline = Instant::now() + STANDSTILL;
        loop {
            if let RunState::Stopped(why) = self.run_state()? {
                return Ok(why);
            }
            if Instant::now() >= deadline {
                let what = "waiting for the guest to stand still".to_owned();
                return Err(LiveError::Timeout { what, seconds: STANDSTILL.as_secs() });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The same after a stop that was reported: a QEMU that is too busy to say more has stopped it all the same.
    pub(super) fn state_of_stop(&self) -> Result<&'static str, LiveError> {
        match self.standstill() {
            Err(LiveError::Timeout { .. }) => Ok("paused"),
            other => other,
        }
    }

    /// Has the dump written while no breakpoint of ours stands in memory, if the guest stands. Returns the size.
    pub(super) fn dump_without_breakpoints(
        &self,
        order: &DumpOrder<'_>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<u64, LiveError> {
        let least = match order.is_raw() {
            true => self.memory()?.ranges().iter().map(|range| range.len()).sum(),
            false => 0,
        };
        let write = || dump::write(&self.qmp, &self.events, order, least, progress);
        if self.let_go.load(Ordering::SeqCst) {
            return write();
        }
        // As long as it is held nobody lets the guest go.
        let mut held = lock(&self.control);
        match &mut *held {
            Some(control) if !control.stub.is_running() => {
                control.stand(&self.qmp)?;
                let lifted = control.lift()?;
                let written = write();
                control.put_back(lifted)?;
                written
            }
            _ => write(),
        }
    }
}
