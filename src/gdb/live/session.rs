//! One client of a guest: what it may do, what it is told, and that its control goes with it.

use super::{Live, POINTS_MAX, Placed, Policy};
use crate::addr::VirtAddr;
use crate::backend::live::{LiveControl, LiveError, Point, Stop};
use crate::gdb::Libraries;
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

    /// The machine and its modules' files, if they are others than at the last call.
    pub(in crate::gdb) fn changed(&mut self) -> Option<(Arc<Machine>, Option<Libraries>)> {
        let state = self.live.state();
        if state.generation == self.seen {
            return None;
        }
        self.seen = state.generation;
        Some((state.machine.clone(), state.libraries.clone()))
    }

    /// The client wants to know how the guest stands: the first that does controls it from then on.
    pub(in crate::gdb) fn greet(&self) {
        let owner = self.live.state().owner;
        let greeted = match owner {
            None if self.live.policy.control => self.live.take_control(self.id),
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
        // A client's own breakpoint there is reported behind the news of the module.
        let new_module = Live::is_at_hook(&state) && !state.module_told;
        state.module_told |= new_module;
        state.owes_trap = new_module && Live::is_hook_a_clients(&state);
        Stopped { stop: state.stop, backward: state.backward, new_module }
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
            "take" => match self.live.take_control(self.id) {
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

    /// Puts a point, or takes it away, where the client sees `asked` and the guest `at`.
    pub(in crate::gdb) fn set_point(
        &self,
        insert: bool,
        point: Point,
        (asked, at): (VirtAddr, VirtAddr),
        len: u64,
    ) -> Result<(), LiveError> {
        let placed = Placed { point, asked, at, len };
        let same = |other: &Placed| (other.point, other.asked, other.len) == (point, asked, len);
        // What gdb believes of a kernel that is gone; it is told of the next, and asks again.
        let is_of_before = insert && at.0 >> 63 == 1 && self.live.state().boots;
        if is_of_before {
            return Ok(());
        }
        if !insert {
            let found = self.live.state().points.iter().position(same);
            let Some(placed) = found.map(|index| self.live.state().points.swap_remove(index)) else {
                return Ok(());
            };
            return self.live.control.remove(point, placed.at, len);
        }
        let is_full = {
            let state = self.live.state();
            if state.points.iter().any(same) {
                return Ok(());
            }
            state.points.len() >= POINTS_MAX
        };
        if is_full {
            let what = format!("a breakpoint at {at}");
            return Err(LiveError::Refused { what, why: format!("there are {POINTS_MAX} already") });
        }
        self.live.control.insert(point, at, len)?;
        self.live.state().points.push(placed);
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
            && let Err(error) = self.live.take_control(self.id)
        {
            return Resumed::No(format!("{error}\n"));
        }
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
        self.live.state().backward = backward;
        // Whoever waits for stops lets it go.
        if self.live.state().boots && !backward && !steps(stop.cpu) {
            self.live.lets_run();
            return Resumed::Later;
        }
        let passed = if backward { Ok(()) } else { self.live.pass_hook(steps(stop.cpu)) };
        if let Err(error) = passed.and_then(|()| go(&*self.live.control)) {
            self.live.state().waiting.remove(&self.id);
            return Resumed::No(format!("{error}\n"));
        }
        self.live.lets_run();
        Resumed::Later
    }

    fn wait(&self) -> Resumed {
        match self.waker.try_clone() {
            Ok(waker) => {
                self.live.state().waiting.insert(self.id, waker);
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
    pub(in crate::gdb) fn woken(&mut self) {
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
