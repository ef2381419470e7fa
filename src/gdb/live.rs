//! A guest that any number of clients share: who controls it, where it stands, and who waits for it to stop.
//!
//! Knows run control and sessions, and no packet. A [`Machine`] is the guest at one stop: while the guest stands,
//! everybody reads through the same one; each stop brings a new one. One client owns run control, the first that asks
//! how the guest stands; the guest is stopped for it, and goes on as it was when that client leaves, however it leaves.

pub mod boot;
mod session;

pub(super) use session::{Resumed, Session};

use super::Libraries;
use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::backend::Backend;
use crate::backend::live::{Go, Happening, LiveControl, LiveError, Point, RunState, Stop, StopReason};
use crate::kernel::{Kernel, Machine, OpenError};
use boot::{BootError, Came};
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How long the thread that waits for stops goes without looking what else happened.
const PATIENCE: Duration = Duration::from_millis(200);

/// How long one instruction may take.
const STEP_PATIENCE: Duration = Duration::from_secs(5);

/// How long a guest may take to stop.
const STANDSTILL: Duration = Duration::from_secs(10);

/// Points that clients may have set at once; gdb itself sets some dozens.
const POINTS_MAX: usize = 4096;

/// What becomes of the guest when the client that controls it leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnDisconnect {
    /// It runs if it ran before the client came, and else stands.
    #[default]
    Restore,
    /// It runs.
    Resume,
    /// It stays as it is.
    Leave,
}

/// What clients may do to a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Memory and registers may be written.
    pub allow_write: bool,
    /// Clients may stop it and let it run; without, they see it as it runs.
    pub control: bool,
    /// When the one that controls it leaves.
    pub on_disconnect: OnDisconnect,
}

/// Looks for the kernel in a guest that was not known, or was started again.
pub type Opener = dyn Fn(Arc<dyn Backend>) -> Result<Machine, OpenError> + Send + Sync;

/// A guest and those who look at it.
pub struct Live {
    control: Arc<dyn LiveControl>,
    policy: Policy,
    open: Box<Opener>,
    /// Held by whoever changes who controls the guest, which takes its time.
    turn: Mutex<()>,
    state: Mutex<State>,
    /// The guest was let run.
    runs: Condvar,
}

struct State {
    machine: Arc<Machine>,
    libraries: Option<Libraries>,
    /// Counts the machines.
    generation: u64,
    /// The session that controls it.
    owner: Option<u64>,
    sessions: u64,
    /// Whether it ran before it was controlled.
    ran_before: bool,
    /// It was let run by its owner and has not stopped since.
    is_running: bool,
    stop: Stop,
    backward: bool,
    points: Vec<Placed>,
    /// The sessions whose clients know of modules.
    follow_modules: HashSet<u64>,
    /// Our own breakpoint where every module passes before its init (`do_init_module()` in kernel/module/main.c).
    module_hook: Option<VirtAddr>,
    /// Whether the owner was told of the module of the last stop, and is still to be told of its own breakpoint.
    module_told: bool,
    owes_trap: bool,
    /// Who is to be woken by the next stop.
    waiting: HashMap<u64, UnixStream>,
    /// The kernel that is known is of an earlier boot.
    is_stale: bool,
    /// The guest was started again, and is to stop where its kernel begins.
    boots: bool,
    /// The owner has asked for a stop.
    interrupted: bool,
    /// It is to be stopped for news: QEMU drops the request while it is at them itself.
    has_news: bool,
    /// What the user behind each session is told with the next stop.
    news: HashMap<u64, Vec<String>>,
    gone: Option<LiveError>,
}

/// A point, where the client put it and where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Placed {
    point: Point,
    asked: VirtAddr,
    at: VirtAddr,
    len: u64,
}

/// Why a guest could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenLive {
    /// It cannot be asked.
    #[error(transparent)]
    Guest(#[from] LiveError),
    /// The vmlinux that was asked for is not its.
    #[error(transparent)]
    Kernel(#[from] OpenError),
    /// The system has no thread for it.
    #[error("cannot start a thread")]
    Thread(#[from] std::io::Error),
}

impl Live {
    /// A guest behind `control`, whose kernel `open` looks for.
    pub fn new(
        control: Arc<dyn LiveControl>,
        policy: Policy,
        open: Box<Opener>,
    ) -> Result<Arc<Self>, OpenLive> {
        let machine = Arc::new(open(control.snapshot()?)?);
        let state = State {
            libraries: None,
            is_stale: machine.kernel().is_none(),
            machine,
            generation: 0,
            owner: None,
            sessions: 0,
            ran_before: false,
            is_running: false,
            stop: Stop { cpu: 0, reason: StopReason::Signal(SIGTRAP) },
            backward: false,
            points: Vec::new(),
            follow_modules: HashSet::new(),
            module_hook: None,
            module_told: false,
            owes_trap: false,
            waiting: HashMap::new(),
            news: HashMap::new(),
            boots: false,
            interrupted: false,
            has_news: false,
            gone: None,
        };
        let (turn, runs) = (Mutex::new(()), Condvar::new());
        let live = Arc::new(Self { control, policy, open, turn, state: Mutex::new(state), runs });
        let weak = Arc::downgrade(&live);
        std::thread::Builder::new().name("kstub-guest".to_owned()).spawn(move || watch(&weak))?;
        Ok(live)
    }

    /// The guest as it was last seen.
    pub fn machine(&self) -> Arc<Machine> {
        self.state().machine.clone()
    }

    /// Offers clients the files of its modules.
    pub fn set_libraries(&self, libraries: Libraries) {
        self.state().libraries = Some(libraries);
    }

    /// The files of its modules, where they are offered.
    pub fn libraries(&self) -> Option<Libraries> {
        self.state().libraries.clone()
    }

    /// A client's way to it.
    pub(super) fn session(self: &Arc<Self>) -> std::io::Result<Session> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        let mut state = self.state();
        state.sessions += 1;
        let (id, seen) = (state.sessions, state.generation);
        state.news.insert(id, Vec::new());
        Ok(Session { live: Arc::clone(self), id, wake, waker, seen })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nobody panics while holding it; and if somebody did, each field would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees the guest as it is now.
    fn refresh(&self) -> Result<(), LiveError> {
        let backend = self.control.snapshot()?;
        let (before, is_stale, libraries) = {
            let state = self.state();
            (state.machine.clone(), state.is_stale, state.libraries.clone())
        };
        let machine = if is_stale { None } else { Some(before.again(backend.clone())) };
        // A snapshot may have been loaded, of which not every QEMU tells.
        let machine = machine.filter(|machine| machine.kernel().is_none_or(is_there));
        let is_stale = machine.is_none();
        let machine = machine.unwrap_or_else(|| self.open_again(backend, &before));
        let machine = Arc::new(machine);
        let libraries = libraries.map(|libraries| libraries.again(machine.clone()));
        if machine.text_base() != before.text_base() && before.kernel().is_some() {
            self.drop_points();
        }
        let mut state = self.state();
        if is_stale && let Some(kernel) = machine.kernel() {
            state.is_stale = false;
            let found = kernel.found();
            let cure = match before.kernel() {
                Some(_) if machine.text_base() == before.text_base() => "It is where it was.",
                _ => "gdb's symbols are not there: kstub.py moves them, else connect again.",
            };
            let release = crate::bytes::printable(&found.release);
            state.tell(&format!("A kernel was found: {release} at {}. {cure}\n", found.text));
        }
        state.machine = machine;
        state.libraries = libraries;
        state.generation += 1;
        Ok(())
    }

    fn open_again(&self, backend: Arc<dyn Backend>, before: &Machine) -> Machine {
        (self.open)(backend.clone()).unwrap_or_else(|error| {
            tracing::warn!("{error}");
            before.again(backend)
        })
    }

    /// The guest has stopped: everybody who waits hears of it.
    fn stopped(&self, stop: Stop) {
        let fresh = self.refresh();
        let mut state = self.state();
        if let Err(error) = fresh {
            state.gone = Some(error);
        }
        state.is_running = false;
        (state.interrupted, state.has_news) = (false, false);
        state.boots &= state.is_stale;
        state.stop = stop;
        (state.module_told, state.owes_trap) = (false, false);
        drop(state);
        self.hook_modules();
        self.state().wake();
    }

    fn is_gone(&self, error: LiveError) {
        tracing::warn!("{error}");
        let mut state = self.state();
        state.is_running = false;
        state.gone = Some(error);
        state.wake();
    }

    /// The guest was let run, or is to be.
    fn lets_run(&self) {
        let mut state = self.state();
        (state.is_running, state.interrupted) = (true, false);
        self.runs.notify_all();
    }

    /// Waits until the guest was let run, at most as long as `patience`; whether it was.
    fn runs_within(&self, patience: Duration) -> bool {
        let state = self.state();
        if state.is_running {
            return true;
        }
        let (state, _) = self.runs.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner);
        state.is_running
    }

    /// Gives run control up for whoever has it: for the end of kstub.
    pub fn release(&self) {
        let owner = self.state().owner;
        owner.into_iter().for_each(|owner| self.give_control(owner));
        // Somebody else may be about it: not before it is done.
        drop(self.turn.lock());
    }

    /// What happened by other hands than ours.
    fn follow(&self) {
        for happening in self.control.happenings() {
            tracing::info!("{happening:?}");
            let mut state = self.state();
            // Clients that have asked for modules can follow a kernel to where it is; others are told with the next
            // stop. Nobody has put anything into a guest whose kernel is not known by what gdb knows of it.
            let follows = state.owner.is_some_and(|owner| state.follow_modules.contains(&owner));
            let is_known = follows && !state.is_stale;
            match happening {
                Happening::Reset => {
                    state.is_stale = true;
                    state.boots |= is_known;
                    state.tell("The guest was started again.\n");
                }
                Happening::Replaced(how) => {
                    state.is_stale = true;
                    state.tell(&format!("The guest's memory is another's: {how}.\n"));
                }
                Happening::Stopped | Happening::Resumed => continue,
            }
            let is_running = state.is_running;
            drop(state);
            if is_known && let Err(error) = self.leave_the_old(is_running) {
                tracing::warn!("breakpoints of before may be left: {error}");
            }
        }
    }

    /// What was put into the guest is not of what is there now: it goes before it stops or harms that.
    fn leave_the_old(&self, is_running: bool) -> Result<(), LiveError> {
        if !self.state().boots {
            self.state().has_news = is_running;
            return Ok(());
        }
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

    /// Whether a guest that stands has another kernel than was known, which is then known and told.
    fn is_replaced(&self) -> bool {
        let is_stale = |state: &State| state.is_stale && !state.boots && state.machine.kernel().is_some();
        if !is_stale(&self.state()) {
            return false;
        }
        if let Err(error) = self.refresh() {
            tracing::warn!("{error}");
        }
        !self.state().is_stale
    }

    /// Takes all breakpoints and watchpoints away, of a guest that stands.
    fn drop_points(&self) {
        let (points, hook) = {
            let mut state = self.state();
            (std::mem::take(&mut state.points), state.module_hook.take())
        };
        let hook = hook.map(|at| (Point::Software, at, 1));
        for (point, at, len) in points.iter().map(|one| (one.point, one.at, one.len)).chain(hook) {
            if let Err(error) = self.control.remove(point, at, len) {
                tracing::info!("{error}");
            }
        }
    }

    /// Follows a guest that was started again to where its kernel begins.
    fn boot(&self) -> Result<Stop, LiveError> {
        let machine = self.machine();
        let info = machine.kernel().and_then(|kernel| kernel.debug_info());
        let stop = self.state().stop;
        let Some(wanted) = info.and_then(boot::Wanted::of) else { return Ok(stop) };
        let goes_on = || {
            let state = self.state();
            state.is_running && !state.interrupted
        };
        if !goes_on() {
            return Ok(stop);
        }
        let why = match boot::run(&*self.control, &wanted, &goes_on) {
            Ok(Came::Exactly(stop) | Came::About(stop) | Came::Interrupted(stop)) => return Ok(stop),
            Err(BootError::Guest(error)) => return Err(error),
            Err(error) => error,
        };
        self.state().tell(&format!("{why}\n"));
        Ok(Stop { reason: StopReason::Signal(SIGINT), ..stop })
    }

    /// Gives `session` run control, which stops the guest.
    fn take_control(&self, session: u64) -> Result<(), LiveError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = match self.state().owner {
            Some(owner) if owner == session => return Ok(()),
            owner => owner.is_none(),
        };
        if is_first {
            let ran_before = self.control.run_state()? == RunState::Running;
            let stop = self.control.attach()?;
            let mut state = self.state();
            (state.ran_before, state.is_running, state.stop) = (ran_before, false, stop);
            state.points.clear();
            state.module_hook = None;
            drop(state);
            self.refresh()?;
        }
        self.state().owner = Some(session);
        self.hook_modules();
        Ok(())
    }

    /// Sees to it that modules stop the guest before their init, where clients are told of modules.
    fn hook_modules(&self) {
        let (machine, hook) = {
            let state = self.state();
            if !state.owner.is_some_and(|owner| state.follow_modules.contains(&owner)) {
                return;
            }
            (state.machine.clone(), state.module_hook)
        };
        let wanted = machine.kernel().and_then(|kernel| kernel.symbol("do_init_module"));
        if wanted == hook {
            return;
        }
        if let Some(Err(error)) = hook.map(|old| self.control.remove(Point::Software, old, 1)) {
            tracing::warn!("{error}");
        }
        let set = |at: &VirtAddr| match self.control.insert(Point::Software, *at, 1) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("modules do not stop the guest before their init: {error}");
                false
            }
        };
        self.state().module_hook = wanted.filter(set);
    }

    /// Whether the last stop is at our own breakpoint.
    fn is_at_hook(state: &State) -> bool {
        let pc = usize::try_from(state.stop.cpu).ok().and_then(|index| state.machine.cpu_of_saved(index));
        let pc = pc.and_then(|cpu| state.machine.cpu(cpu)?.regs.u64(Reg::Rip)).map(VirtAddr);
        state.stop.reason == StopReason::Signal(SIGTRAP) && pc.is_some() && pc == state.module_hook
    }

    /// Whether a client has a breakpoint where ours is.
    fn is_hook_a_clients(state: &State) -> bool {
        let is_code = |point| matches!(point, Point::Software | Point::Hardware);
        state.points.iter().any(|placed| is_code(placed.point) && Some(placed.at) == state.module_hook)
    }

    /// Gets the vCPU that stands at our own breakpoint over it: the client knows nothing of it. If all it does is to
    /// step there (`steps`), the breakpoint is away until it has.
    fn pass_hook(&self, steps: bool) -> Result<(), LiveError> {
        let (hook, stop) = {
            let state = self.state();
            match state.module_hook.filter(|_| Self::is_at_hook(&state)) {
                Some(hook) => (hook, state.stop),
                None => return Ok(()),
            }
        };
        self.control.remove(Point::Software, hook, 1)?;
        if steps {
            self.state().module_hook = None;
            return Ok(());
        }
        self.control.resume(&[(Some(stop.cpu), Go::Step)])?;
        let stepped = self.control.wait_stop(STEP_PATIENCE);
        self.control.insert(Point::Software, hook, 1)?;
        stepped.map(|_| ())
    }

    /// `session` no longer controls the guest: all its points go, and the guest goes on as it is to.
    fn give_control(&self, session: u64) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let runs = {
            let mut state = self.state();
            if state.owner != Some(session) {
                return;
            }
            state.owner = None;
            state.points.clear();
            state.module_hook = None;
            state.boots = false;
            let runs = match self.policy.on_disconnect {
                OnDisconnect::Restore => state.ran_before,
                OnDisconnect::Resume => true,
                OnDisconnect::Leave => state.is_running,
            };
            state.is_running = false;
            runs
        };
        match self.control.detach(runs) {
            Ok(()) => {
                tracing::info!("run control was given up: the guest {}", if runs { "runs" } else { "stands" })
            }
            Err(error) => tracing::warn!("giving up run control: {error}"),
        }
    }
}

/// Whether the kernel is still where it was found: its banner is.
fn is_there(kernel: &Kernel) -> bool {
    const BANNER: &[u8] = b"Linux version ";
    let Some(at) = kernel.symbol("linux_banner") else { return true };
    let mut bytes = [0; BANNER.len()];
    kernel.read(at, &mut bytes).stopped.is_none() && bytes == BANNER
}

impl State {
    /// Whoever is there now hears of it. Once: QEMU tells of a reset for the machine and again for who asked for it.
    fn tell(&mut self, news: &str) {
        for heard in self.news.values_mut() {
            heard.retain(|old| old != news);
            heard.push(news.to_owned());
        }
    }

    fn wake(&mut self) {
        for (_, mut waker) in self.waiting.drain() {
            // It fails where the session has just ended, or was woken and has not looked yet.
            let _ = waker.write(&[0]);
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.release();
    }
}

/// The thread that waits for stops, as long as there is a guest.
fn watch(live: &Weak<Live>) {
    while let Some(live) = live.upgrade() {
        live.follow();
        if !live.runs_within(PATIENCE) {
            continue;
        }
        let (boots, has_news) = {
            let state = live.state();
            (state.boots, state.has_news)
        };
        if has_news && let Err(error) = live.control.interrupt() {
            tracing::warn!("{error}");
        }
        let stop = if boots { live.boot().map(Some) } else { live.control.wait_stop(PATIENCE) };
        match stop {
            Ok(Some(stop)) => live.stopped(stop),
            Ok(None) => {}
            // Control was given up while it was waited for.
            Err(_) if !live.state().is_running => {}
            Err(error) => live.is_gone(error),
        }
    }
}

const SIGINT: u8 = 2;
const SIGTRAP: u8 = 5;
