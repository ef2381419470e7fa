//! One client of a guest: what it may do, what it is told, and that its control goes with it.

use super::hook::Passed;
use super::{Live, POINTS_MAX, Placed, Policy, Waiter};
use crate::addr::VirtAddr;
use crate::backend::live::{LiveControl, LiveError, Point, Stop};
use crate::gdb::Files;
use crate::kernel::Machine;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// How the guest last stopped, for a stop reply.
pub(in crate::gdb) struct Stopped {
    pub(in crate::gdb) stop: Stop,
    /// It went backwards.
    pub(in crate::gdb) backward: bool,
    /// A module has been loaded, and has not begun to run.
    pub(in crate::gdb) new_module: bool,
    /// It stands at a breakpoint of this client's, of this kind.
    pub(in crate::gdb) breakpoint: Option<Point>,
}

/// One client's way to the guest. When it goes, so does its control.
pub(in crate::gdb) struct Session {
    pub(super) live: Arc<Live>,
    pub(super) id: u64,
    /// Readable once the guest has stopped.
    pub(super) wake: UnixStream,
    pub(super) waker: UnixStream,
    /// The generation of the machine that the client was told of.
    pub(super) seen: u64,
}

/// What becomes of a request to let the guest run.
pub(in crate::gdb) enum Resumed {
    /// Its answer comes when the guest stops.
    Later,
    /// It has stopped already, for another reason than was told.
    Stopped,
    /// It stands where it stood.
    No(String),
}

impl Session {
    pub(in crate::gdb) fn control(&self) -> &dyn LiveControl {
        &*self.live.control
    }

    pub(in crate::gdb) fn policy(&self) -> Policy {
        self.live.policy
    }

    /// The machine and its kernel's files, if they are others than at the last call.
    pub(in crate::gdb) fn changed(&mut self) -> Option<(Arc<Machine>, Option<Files>)> {
        let state = self.live.state();
        if state.generation == self.seen {
            return None;
        }
        self.seen = state.generation;
        Some((state.machine.clone(), state.files.clone()))
    }

    /// The client wants to know how the guest stands: the first that does controls it from then on.
    pub(in crate::gdb) fn greet(&self) {
        let owner = self.live.state().owner;
        let greeted = match owner {
            None if self.live.policy.control => self.live.take_control(self.id, false),
            None => self.live.refresh(),
            Some(_) => Ok(()),
        };
        if let Err(error) = greeted {
            tracing::warn!("{error}");
            if let Some(news) = self.live.state().news.get_mut(&self.id) {
                news.push(format!("{error}\n"));
            }
        }
    }

    /// The client has asked for the list of modules: it is told of those that come.
    pub(in crate::gdb) fn follow_modules(&self) {
        if self.live.state().follow_modules.insert(self.id) {
            self.live.hook_modules();
        }
    }

    /// How the guest stands.
    pub(in crate::gdb) fn last_stop(&self) -> Stopped {
        let mut state = self.live.state();
        let new_module = state.is_at_hook() && state.module_told.insert(self.id);
        let is_owner = state.owner == Some(self.id);
        let breakpoint = state.breakpoint().filter(|_| is_owner);
        if is_owner {
            // Its own breakpoint there is reported behind the news of the module.
            state.owes_trap = new_module && breakpoint.is_some();
        }
        Stopped { stop: state.stop, backward: state.backward, new_module, breakpoint }
    }

    /// A number that is another once the guest was started again, or another kernel was found in it.
    pub(in crate::gdb) fn kernels(&self) -> u64 {
        self.live.state().kernels
    }

    /// What else to tell the user, once.
    pub(in crate::gdb) fn news(&self) -> String {
        self.live.state().news.get_mut(&self.id).map(std::mem::take).unwrap_or_default().concat()
    }

    /// Why the guest cannot be asked any more.
    pub(in crate::gdb) fn gone(&self) -> Option<LiveError> {
        self.live.state().gone.clone()
    }

    pub(in crate::gdb) fn owns(&self) -> bool {
        self.live.state().owner == Some(self.id)
    }

    /// Why the client may not put anything into the guest; `None` if it controls it.
    pub(in crate::gdb) fn not_in_control(&self) -> Option<&'static str> {
        match self.live.state().owner {
            Some(owner) if owner == self.id => None,
            _ if !self.live.policy.control => Some(
                "kstub was started with --no-stop: nothing is put into the guest, start kstub without it",
            ),
            None => Some("nobody controls the guest ('monitor control take' takes control)"),
            Some(_) => Some("another client controls the guest ('monitor control take' takes control)"),
        }
    }

    /// QEMU's answer to a packet about stepping; `None` where that is not this client's to ask now.
    pub(in crate::gdb) fn ask_about_steps(&self, packet: &[u8]) -> Option<Result<Vec<u8>, LiveError>> {
        let is_mine = self.owns() && !self.live.state().is_running;
        is_mine.then(|| self.live.ask_about_steps(packet))
    }

    /// `monitor control`: who controls the guest, taking control and giving it up.
    pub(in crate::gdb) fn control_command(&self, what: &str) -> String {
        let (owner, is_running) = {
            let state = self.live.state();
            (state.owner, state.is_running)
        };
        let mine = owner == Some(self.id);
        match what {
            "take" if mine => "This client controls the guest already.\n".to_owned(),
            "take" if !self.live.policy.control => {
                "kstub was started with --no-stop: nobody controls the guest.\n".to_owned()
            }
            "take" if is_running => {
                "The guest runs for another client: press Ctrl-C there first, or wait for it to stop.\n"
                    .to_owned()
            }
            "take" => match self.live.take_control(self.id, true) {
                Ok(()) => "This client controls the guest.\n".to_owned(),
                Err(error) => format!("{error}\n"),
            },
            "give" if mine => {
                self.live.give_control(self.id);
                "Nobody controls the guest; 'monitor control take' takes control again.\n".to_owned()
            }
            "give" => "This client does not control the guest.\n".to_owned(),
            _ => match owner {
                Some(_) if mine => "This client controls the guest.\n".to_owned(),
                Some(_) => {
                    "Another client controls the guest; 'monitor control take' takes control.\n".to_owned()
                }
                None => "Nobody controls the guest; 'monitor control take' does.\n".to_owned(),
            },
        }
    }

    /// Puts a point, or takes it away, where the client sees `asked` and the guest `at`. One that the guest was let run with,
    /// and that was taken away since, is put where it was: clients do that at each stop, whatever thread is selected then.
    pub(in crate::gdb) fn set_point(
        &self,
        insert: bool,
        point: Point,
        (asked, at): (VirtAddr, VirtAddr),
        len: u64,
    ) -> Result<(), LiveError> {
        let same = |other: &Placed| (other.point, other.asked, other.len) == (point, asked, len);
        // What gdb believes of a kernel that is gone; it is told of the next, and asks again.
        let is_of_before = insert && at.0 >> 63 == 1 && self.live.state().boots;
        if is_of_before {
            return Ok(());
        }
        if !insert {
            let placed = {
                let mut state = self.live.state();
                let found = state.points.iter().position(same);
                found.map(|index| state.points.swap_remove(index))
            };
            return placed.map_or(Ok(()), |placed| self.live.control.remove(point, placed.at, len));
        }
        let (at, is_full) = {
            let state = self.live.state();
            if state.points.iter().any(same) {
                return Ok(());
            }
            let before = state.went_with.iter().find(|other| same(other));
            (before.map_or(at, |before| before.at), state.points.len() >= POINTS_MAX)
        };
        if is_full {
            let what = format!("a breakpoint at {at}");
            return Err(LiveError::Refused { what, why: format!("there are {POINTS_MAX} already") });
        }
        self.live.control.insert(point, at, len)?;
        self.live.state().points.push(Placed { point, asked, at, len });
        Ok(())
    }

    /// The address that the client knows a watched one by.
    pub(in crate::gdb) fn asked_address(&self, at: VirtAddr) -> VirtAddr {
        let state = self.live.state();
        let covers = |placed: &&Placed| at.0.wrapping_sub(placed.at.0) < placed.len.max(1);
        let placed = state.points.iter().filter(|placed| placed.asked != placed.at).find(covers);
        placed.map_or(at, |placed| placed.asked.wrapping_add(at.0.wrapping_sub(placed.at.0)))
    }

    /// Lets the guest run by `go`, or waits with the one that controls it. `steps` are the vCPUs that step.
    pub(in crate::gdb) fn resume(
        &self,
        backward: bool,
        steps: impl Fn(u32) -> bool,
        go: impl FnOnce(&dyn LiveControl) -> Result<(), LiveError>,
    ) -> Resumed {
        if let Some(error) = self.gone() {
            return Resumed::No(format!("{error}\n"));
        }
        let owner = self.live.state().owner;
        if owner.is_none()
            && self.live.policy.control
            && let Err(error) = self.live.take_control(self.id, false)
        {
            return self.cannot(error);
        }
        // Nobody takes control or points away until it runs.
        let _turn = self.live.turn();
        if !self.owns() {
            return self.wait();
        }
        let stop = {
            let mut state = self.live.state();
            if std::mem::take(&mut state.owes_trap) {
                return Resumed::Stopped;
            }
            state.stop
        };
        if self.live.is_replaced() {
            return Resumed::Stopped;
        }
        if let Resumed::No(why) = self.wait() {
            return Resumed::No(why);
        }
        let boots = {
            let mut state = self.live.state();
            (state.backward, state.steps) = (backward, steps(stop.cpu));
            state.went_with = state.points.clone();
            state.boots
        };
        // Whoever waits for stops lets it go.
        if boots && !backward && !steps(stop.cpu) {
            self.live.lets_run();
            return Resumed::Later;
        }
        let passed = if backward { Ok(Passed::Over) } else { self.live.pass_hook(steps(stop.cpu)) };
        let done = match passed {
            Ok(Passed::Over) => go(&*self.live.control).map(|()| Resumed::Later),
            Ok(Passed::Runs) => Ok(Resumed::Later),
            Ok(Passed::Stopped(stop)) => {
                self.live.state().waiting.remove(&self.id);
                self.live.stopped(stop).map(|()| Resumed::Stopped)
            }
            Err(error) => Err(error),
        };
        match done {
            Ok(Resumed::Later) => self.live.lets_run(),
            Ok(_) => {}
            Err(_) => {
                self.live.state().waiting.remove(&self.id);
                self.live.hook_modules();
            }
        }
        done.unwrap_or_else(|error| self.cannot(error))
    }

    /// It does not run. Nobody waits for one that stands: that QEMU is gone is known by this.
    fn cannot(&self, error: LiveError) -> Resumed {
        let why = format!("{error}\n");
        if let LiveError::Gone(_) = error {
            self.live.is_gone(error);
        }
        Resumed::No(why)
    }

    fn wait(&self) -> Resumed {
        match self.waker.try_clone() {
            Ok(waker) => {
                // What it was woken by and has not looked at is of a stop before.
                self.forget_wakes();
                let mut state = self.live.state();
                let since = state.generation;
                state.waiting.insert(self.id, Waiter { waker, since });
                Resumed::Later
            }
            Err(error) => Resumed::No(format!("cannot wait for the guest: {error}\n")),
        }
    }

    /// Ctrl-C: the guest is asked to stop, which the client hears of; `false` where it only looks on and has to be
    /// answered now.
    pub(in crate::gdb) fn interrupt(&self) -> Result<bool, LiveError> {
        if self.owns() {
            self.live.state().interrupted = true;
            self.live.control.interrupt()?;
            return Ok(true);
        }
        self.live.state().waiting.remove(&self.id);
        if !self.live.policy.control {
            self.live.refresh()?;
        }
        Ok(false)
    }

    /// Forgets that it was woken.
    pub(in crate::gdb) fn forget_wakes(&self) {
        let mut byte = [0; 16];
        while matches!((&self.wake).read(&mut byte), Ok(1..)) {}
    }

    /// The guest was changed: everybody sees it anew.
    pub(in crate::gdb) fn changed_by_us(&self) -> Result<(), LiveError> {
        self.live.refresh()
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        {
            let mut state = self.live.state();
            state.waiting.remove(&self.id);
            state.follow_modules.remove(&self.id);
            state.news.remove(&self.id);
        }
        self.live.give_control(self.id);
    }
}
