//! The thread that waits for a guest's stops and for what happens to it by other hands, as long as there is a guest.
//!
//! An answer that does not come, or makes no sense, is no stop yet and no end: it is asked again. Only a QEMU that is gone
//! is given up.

use super::boot::{self, BootError, Came};
use super::{Live, PATIENCE, SIGINT, STANDSTILL};
use crate::backend::live::{Happening, LiveError, Stop, StopReason};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How long a QEMU that has not answered is left alone.
const RETRY: Duration = Duration::from_millis(200);

/// Starts it.
pub(super) fn start(live: &Arc<Live>) -> std::io::Result<()> {
    let weak = Arc::downgrade(live);
    std::thread::Builder::new().name("kstub-guest".to_owned()).spawn(move || watch(&weak)).map(|_| ())
}

fn watch(live: &Weak<Live>) {
    let mut said = String::new();
    while let Some(live) = live.upgrade() {
        live.follow();
        if !live.runs_within(PATIENCE) {
            continue;
        }
        match live.await_stop() {
            Ok(()) => said.clear(),
            // Control was given up while it was waited for.
            Err(_) if !live.state().is_running => {}
            Err(error @ LiveError::Gone(_)) => live.is_gone(error),
            Err(error) => {
                let error = error.to_string();
                if error != said {
                    tracing::warn!("{error}; kstub asks again");
                }
                said = error;
                std::thread::sleep(RETRY);
            }
        }
    }
}

impl Live {
    /// Waits until the guest was let run, at most as long as `patience`; whether it was.
    fn runs_within(&self, patience: Duration) -> bool {
        let state = self.state();
        if state.is_running {
            return true;
        }
        let (state, _) = self.runs.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner);
        state.is_running
    }

    /// Waits for a stop for a while, and tells of one that came.
    fn await_stop(&self) -> Result<(), LiveError> {
        let (boots, has_news) = {
            let state = self.state();
            (state.boots, state.has_news)
        };
        if has_news && let Err(error) = self.control.interrupt() {
            tracing::warn!("{error}");
        }
        let stop = if boots { self.boot()? } else { self.control.wait_stop(PATIENCE)? };
        stop.map_or(Ok(()), |stop| self.stopped(stop))
    }

    /// What happened by other hands than ours.
    fn follow(&self) {
        self.follow_all(self.control.happenings());
    }

    /// A kernel was followed to where it begins. A guest that is told to start again may be reset more than once: a kernel
    /// goes on asking for it until it is done. What was reported of that until now is of this boot, if the guest has got
    /// to its kernel nevertheless.
    fn has_booted(&self) {
        let mut happenings = self.control.happenings();
        if self.control.snapshot().is_ok_and(|snapshot| boot::in_image(&*snapshot).is_some()) {
            happenings.retain(|happening| *happening != Happening::Reset);
        }
        self.follow_all(happenings);
    }

    fn follow_all(&self, happenings: Vec<Happening>) {
        for happening in happenings {
            tracing::info!("{happening:?}");
            let mut state = self.state();
            // Clients that have asked for modules can follow a kernel to where it is; others are told with the next
            // stop. Nobody has put anything into a guest whose kernel is not known by what gdb knows of it.
            let follows = state.owner.is_some_and(|owner| state.follow_modules.contains(&owner));
            let is_known = follows && !state.is_stale;
            match happening {
                Happening::Reset => {
                    state.boots |= is_known;
                    state.tell("The guest was started again.\n");
                }
                Happening::Replaced(how) => {
                    state.tell(&format!("The guest's memory is another's: {how}.\n"));
                }
                Happening::Resumed if state.owner.is_some() && !state.is_running => {
                    // Whoever did wants it to run, also when the client has left.
                    state.ran_before = true;
                    state.tell("Somebody else has let the guest run: what was shown of it is old.\n");
                    continue;
                }
                Happening::Stopped | Happening::Resumed => continue,
            }
            (state.is_stale, state.unknown) = (true, None);
            state.resets += 1;
            state.kernels += 1;
            drop(state);
            if is_known && let Err(error) = self.leave_the_old() {
                tracing::warn!("breakpoints of before may be left: {error}");
            }
        }
    }

    /// What was put into the guest is not of what is there now: it goes before it stops or harms that.
    fn leave_the_old(&self) -> Result<(), LiveError> {
        // From here on nobody lets it run.
        let _turn = self.turn();
        let is_running = {
            let mut state = self.state();
            if !state.boots {
                state.has_news = state.is_running;
                return Ok(());
            }
            state.is_running
        };
        let start = Instant::now();
        while is_running && start.elapsed() < STANDSTILL {
            self.control.interrupt()?;
            if self.control.wait_stop(PATIENCE)?.is_some() {
                break;
            }
        }
        self.drop_points();
        Ok(())
    }

    /// Follows a guest that was started again to where its kernel begins; `None` if that failed half-way, and the guest
    /// may run or stand.
    fn boot(&self) -> Result<Option<Stop>, LiveError> {
        let machine = self.machine();
        let info = machine.kernel().and_then(|kernel| kernel.debug_info());
        let stop = self.state().stop;
        let Some(wanted) = info.and_then(boot::Wanted::of) else { return Ok(Some(stop)) };
        let goes_on = || {
            let state = self.state();
            state.is_running && !state.interrupted
        };
        if !goes_on() {
            return Ok(Some(stop));
        }
        let why = match boot::run(&*self.control, &wanted, &goes_on) {
            Ok(Came::Exactly(stop) | Came::About(stop)) => {
                self.has_booted();
                return Ok(Some(stop));
            }
            Ok(Came::Interrupted(stop)) => return Ok(Some(stop)),
            Err(BootError::Guest(error @ LiveError::Gone(_))) => return Err(error),
            Err(error) => error,
        };
        let mut state = self.state();
        state.tell(&format!("{why}\n"));
        if matches!(why, BootError::Guest(_)) {
            (state.boots, state.has_news) = (false, true);
            return Ok(None);
        }
        Ok(Some(Stop { reason: StopReason::Signal(SIGINT), ..stop }))
    }
}
