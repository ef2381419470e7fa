//! Who controls a guest: taking control, handing it over, and giving it up with all that was put into the guest.

use super::{Live, OnDisconnect, STANDSTILL};
use crate::backend::live::{LiveError, RunState};

impl Live {
    /// Gives `session` run control, which stops the guest; if another has it, only when it `takes` it.
    pub(super) fn take_control(&self, session: u64, takes: bool) -> Result<(), LiveError> {
        let _turn = self.turn();
        let (owner, is_running) = {
            let state = self.state();
            (state.owner, state.is_running)
        };
        match owner {
            Some(owner) if owner == session || !takes => return Ok(()),
            Some(_) if is_running => {
                let why =
                    "the guest runs for another client: press Ctrl-C there first, or wait for it to stop";
                return Err(LiveError::NotNow { what: "taking control".into(), why: why.into() });
            }
            // What the one before has put into the guest would stop it for nobody.
            Some(_) => {
                self.drop_points();
                self.restore_step_flags(false);
            }
            None => self.attach()?,
        }
        let mut state = self.state();
        (state.owner, state.owes_trap) = (Some(session), false);
        drop(state);
        self.hook_modules();
        Ok(())
    }

    fn attach(&self) -> Result<(), LiveError> {
        // It may be taken already, since before the kernel came.
        let ran_before = match self.control.ran_before() {
            Some(ran) => ran,
            None => self.control.run_state()? == RunState::Running,
        };
        let stop = self.control.attach()?;
        self.control.on_death(self.policy.on_disconnect.on_death(false));
        {
            let mut state = self.state();
            (state.ran_before, state.is_running, state.stop) = (ran_before, false, stop);
            state.points.clear();
            state.went_with.clear();
            state.module_told.clear();
            (state.module_hook, state.owes_trap) = (None, false);
        }
        let seen = self.refresh();
        if seen.is_err() {
            self.detach(ran_before);
        }
        seen
    }

    fn detach(&self, runs: bool) {
        match self.control.detach(runs) {
            Ok(()) => {
                tracing::info!("run control was given up: the guest {}", if runs { "runs" } else { "stands" })
            }
            Err(error) => tracing::warn!("giving up run control: {error}"),
        }
    }

    /// `session` no longer controls the guest: all its points go, and the guest goes on as it is to.
    pub(super) fn give_control(&self, session: u64) {
        let _turn = self.turn();
        let (is_running, ran_before) = {
            let mut state = self.state();
            if state.owner != Some(session) {
                return;
            }
            state.owner = None;
            state.points.clear();
            state.went_with.clear();
            state.module_hook = None;
            state.boots = false;
            (std::mem::take(&mut state.is_running), state.ran_before)
        };
        // Somebody else may have let it run.
        let runs_anyhow = || self.control.run_state().is_ok_and(|state| state == RunState::Running);
        let runs = match self.policy.on_disconnect {
            OnDisconnect::Restore => ran_before,
            OnDisconnect::Resume => true,
            OnDisconnect::Leave => is_running || runs_anyhow(),
        };
        self.restore_step_flags(is_running);
        self.detach(runs);
    }

    /// Gives run control up for whoever has it: for the end of kstub.
    pub fn release(&self) {
        let owner = self.state().owner;
        owner.into_iter().for_each(|owner| self.give_control(owner));
        // Somebody else may be about it: not before it is done.
        drop(self.turn());
    }

    /// Passes a packet about stepping on to QEMU's stub.
    pub(super) fn ask_about_steps(&self, packet: &[u8]) -> Result<Vec<u8>, LiveError> {
        if packet.starts_with(SET_STEP_FLAGS) && self.state().step_flags.is_none() {
            let before = self.control.stub_packet(b"qqemu.sstep")?;
            self.state().step_flags = Some(before);
        }
        self.control.stub_packet(packet)
    }

    /// Puts QEMU's flags for steps back, if they were changed.
    fn restore_step_flags(&self, is_running: bool) {
        let Some(flags) = self.state().step_flags.take() else { return };
        let restore = || {
            if is_running {
                self.control.interrupt()?;
                self.control.wait_stop(STANDSTILL)?;
            }
            let flags = flags.strip_prefix(b"0x").unwrap_or(&flags);
            self.control.stub_packet(&[SET_STEP_FLAGS, flags].concat())
        };
        if let Err(error) = restore() {
            tracing::warn!("QEMU steps as the client told it: {error}");
        }
    }
}

/// QEMU `gdbstub/gdbstub.c`, `handle_set_qemu_sstep`.
pub(super) const SET_STEP_FLAGS: &[u8] = b"Qqemu.sstep=";
