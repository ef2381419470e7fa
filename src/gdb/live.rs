//! A guest that any number of clients share: who controls it, where it stands, and who waits for it to stop.
//!
//! Knows run control and sessions, and no packet. A [`Machine`] is the guest at one stop: while the guest stands,
//! everybody reads through the same one; each stop brings a new one. One client owns run control, the first that asks
//! how the guest stands; the guest is stopped for it, and goes on as it was when that client leaves, however it leaves.

pub mod boot;
mod hook;
mod owner;
mod session;
mod watch;

pub(super) use session::{Resumed, Session};

use super::Files;
use crate::addr::VirtAddr;
use crate::arch::x86_64::Reg;
use crate::backend::Backend;
use crate::backend::live::{LiveControl, LiveError, Point, Stop, StopReason};
use crate::kernel::{Kernel, Machine, OpenError};
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the thread that waits for stops goes without looking what else happened.
const PATIENCE: Duration = Duration::from_millis(200);

/// How long a guest may take to stop.
const STANDSTILL: Duration = Duration::from_secs(10);

/// How long it goes without a look for the kernel where there was none: that reads all memory.
const LOOK: Duration = Duration::from_secs(2);

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

impl OnDisconnect {
    /// What becomes of a guest that now runs, or stands, if kstub is killed.
    pub fn on_death(self, is_running: bool) -> Option<bool> {
        match self {
            Self::Restore => None,
            Self::Resume => Some(true),
            Self::Leave => Some(is_running),
        }
    }
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
    /// Held by whoever changes who controls the guest, lets it run, or takes away what was put into it: each takes its
    /// time.
    turn: Mutex<()>,
    state: Mutex<State>,
    /// The guest was let run.
    runs: Condvar,
}

struct State {
    machine: Arc<Machine>,
    files: Option<Files>,
    /// The kernel that was found last: clients have its symbols.
    known: Option<Known>,
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
    /// Its owner wanted a step.
    steps: bool,
    points: Vec<Placed>,
    /// Those with which it was let run last: the client takes them away at each stop, and puts them where they were.
    went_with: Vec<Placed>,
    /// QEMU's flags for steps, before its owner changed them.
    step_flags: Option<Vec<u8>>,
    /// The sessions whose clients know of modules.
    follow_modules: HashSet<u64>,
    /// Our own breakpoint where every module passes before its init (`do_init_module()` in kernel/module/main.c).
    module_hook: Option<VirtAddr>,
    /// The sessions that were told of the module of the last stop.
    module_told: HashSet<u64>,
    /// The owner was, and is still to be told of its own breakpoint.
    owes_trap: bool,
    /// Who is to be woken by the next stop.
    waiting: HashMap<u64, Waiter>,
    /// The kernel that is known is of an earlier boot.
    is_stale: bool,
    /// Counts what made it so.
    resets: u64,
    /// Counts that, and the kernels that were found.
    kernels: u64,
    /// When the kernel was last looked for.
    looked: Instant,
    /// Why the one that is there is not known, as was told.
    unknown: Option<String>,
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

/// A session that waits for a stop.
struct Waiter {
    waker: UnixStream,
    /// The machine that there was: a stop of before is none that it waits for.
    since: u64,
}

/// Which kernel, and where.
struct Known {
    text: Option<VirtAddr>,
    release: String,
    /// As the kernel tells it, which it does not while it starts; else that of the vmlinux that was found to be its.
    build_id: Option<String>,
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
            files: None,
            is_stale: machine.kernel().is_none(),
            known: Known::of(&machine),
            machine,
            generation: 0,
            owner: None,
            sessions: 0,
            ran_before: false,
            is_running: false,
            stop: Stop { cpu: 0, reason: StopReason::Signal(SIGTRAP) },
            backward: false,
            steps: false,
            points: Vec::new(),
            went_with: Vec::new(),
            step_flags: None,
            follow_modules: HashSet::new(),
            module_hook: None,
            module_told: HashSet::new(),
            owes_trap: false,
            waiting: HashMap::new(),
            resets: 0,
            kernels: 0,
            looked: Instant::now(),
            unknown: None,
            news: HashMap::new(),
            boots: false,
            interrupted: false,
            has_news: false,
            gone: None,
        };
        let (turn, runs) = (Mutex::new(()), Condvar::new());
        let live = Arc::new(Self { control, policy, open, turn, state: Mutex::new(state), runs });
        watch::start(&live)?;
        Ok(live)
    }

    /// The guest as it was last seen.
    pub fn machine(&self) -> Arc<Machine> {
        self.state().machine.clone()
    }

    /// Offers clients these files, and those of every kernel to come in the same way.
    pub fn offer(&self, files: Files) {
        self.state().files = Some(files);
    }

    /// The files of the kernel that was last seen, where any are offered.
    pub fn files(&self) -> Option<Files> {
        self.state().files.clone()
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

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees the guest as it is now.
    fn refresh(&self) -> Result<(), LiveError> {
        self.see(true)
    }

    /// The same; where no kernel is known it is looked for if `looks`.
    fn see(&self, looks: bool) -> Result<(), LiveError> {
        let backend = self.control.snapshot()?;
        let (before, is_stale, resets, files) = {
            let state = self.state();
            (state.machine.clone(), state.is_stale, state.resets, state.files.clone())
        };
        let is_known = !is_stale || !looks && before.kernel().is_none();
        let machine = is_known.then(|| before.again(backend.clone()));
        // A snapshot may have been loaded, of which not every QEMU tells.
        let machine = machine.filter(|machine| machine.kernel().is_none_or(is_there));
        let looked = machine.is_none();
        let machine = machine.map_or_else(|| (self.open)(backend.clone()), Ok);
        let (machine, unknown) = match machine {
            Ok(machine) => (machine, None),
            Err(error) => (Machine::without_kernel(backend, error.to_string()), Some(error.to_string())),
        };
        let machine = Arc::new(machine);
        let files = files.map(|files| files.again(&machine));
        if machine.text_base() != before.text_base() && before.kernel().is_some() {
            self.drop_points();
        }
        let mut state = self.state();
        if looked {
            state.looked = Instant::now();
            // Unless it was started once more meanwhile.
            state.is_stale |= machine.kernel().is_none();
            state.is_stale &= machine.kernel().is_none() || state.resets != resets;
            state.tell_found(&machine, unknown);
        }
        state.machine = machine;
        state.files = files;
        state.generation += 1;
        Ok(())
    }

    /// The guest has stopped: everybody who waits hears of it.
    fn stopped(&self, stop: Stop) -> Result<(), LiveError> {
        let looks = {
            let state = self.state();
            let is_step = state.steps && stop.reason == StopReason::Signal(SIGTRAP);
            let is_asked = stop.reason == StopReason::Signal(SIGINT);
            is_asked || !is_step && state.looked.elapsed() >= LOOK
        };
        self.see(looks)?;
        let generation = {
            let mut state = self.state();
            state.is_running = false;
            (state.interrupted, state.has_news) = (false, false);
            state.boots &= state.is_stale;
            state.stop = stop;
            state.module_told.clear();
            state.owes_trap = false;
            state.generation
        };
        if self.policy.on_disconnect == OnDisconnect::Leave {
            self.control.on_death(Some(false));
        }
        self.hook_modules();
        self.state().wake(generation);
        Ok(())
    }

    fn is_gone(&self, error: LiveError) {
        tracing::warn!("{error}");
        let mut state = self.state();
        state.is_running = false;
        state.gone = Some(error);
        state.wake(u64::MAX);
    }

    /// The guest was let run, or is to be.
    fn lets_run(&self) {
        if self.policy.on_disconnect == OnDisconnect::Leave {
            self.control.on_death(Some(true));
        }
        let mut state = self.state();
        (state.is_running, state.interrupted) = (true, false);
        self.runs.notify_all();
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
            state.went_with.clear();
            (std::mem::take(&mut state.points), state.module_hook.take())
        };
        let hook = hook.map(|at| (Point::Software, at, 1));
        for (point, at, len) in points.iter().map(|one| (one.point, one.at, one.len)).chain(hook) {
            if let Err(error) = self.control.remove(point, at, len) {
                tracing::info!("{error}");
            }
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

impl Known {
    fn of(machine: &Machine) -> Option<Self> {
        let kernel = machine.kernel()?;
        let of_vmlinux = || kernel.debug_info()?.build_id();
        let build_id = kernel.found().build_id.as_deref().or_else(of_vmlinux).map(str::to_owned);
        Some(Self { text: machine.text_base(), release: kernel.found().release.clone(), build_id })
    }

    /// Whether it is surely another: there may be no build-id to tell.
    fn is_other_than(&self, before: &Self) -> bool {
        let ids = self.build_id.as_ref().zip(before.build_id.as_ref());
        self.release != before.release || ids.is_some_and(|(id, before)| id != before)
    }

    /// What a client that has the symbols of `before` is to do.
    fn cure(&self, before: Option<&Self>) -> &'static str {
        match before {
            Some(before) if self.is_other_than(before) => {
                "gdb's symbols are of another: kstub.py loads those of this one, else connect again."
            }
            Some(before) if self.text == before.text => "It is where it was.",
            _ => "gdb's symbols are not there: kstub.py moves them, else connect again.",
        }
    }
}

impl State {
    /// Whoever is there now hears of it. Once: QEMU tells of a reset for the machine and again for who asked for it.
    fn tell(&mut self, news: &str) {
        for heard in self.news.values_mut() {
            heard.retain(|old| old != news);
            heard.push(news.to_owned());
        }
    }

    /// Tells of the kernel that was looked for and found in `machine`, or why that is not known: once.
    fn tell_found(&mut self, machine: &Machine, unknown: Option<String>) {
        if let Some(known) = Known::of(machine) {
            let cure = known.cure(self.known.as_ref());
            let (release, text) = (crate::bytes::printable(&known.release).to_string(), known.text);
            let text = text.unwrap_or_default();
            self.known = Some(known);
            self.kernels += 1;
            self.tell(&format!("A kernel was found: {release} at {text}. {cure}\n"));
        }
        if let Some(why) = unknown.as_ref().filter(|why| self.unknown.as_ref() != Some(why)) {
            tracing::warn!("{why}");
            self.tell(&format!("The kernel that is in the guest is not known: {why}\n"));
        }
        self.unknown = unknown;
    }

    /// Where the vCPU that stopped the guest stands.
    fn stop_pc(&self) -> Option<VirtAddr> {
        let cpu = self.machine.cpu_of_saved(usize::try_from(self.stop.cpu).ok()?)?;
        self.machine.cpu(cpu)?.regs.u64(Reg::Rip).map(VirtAddr)
    }

    /// Wakes those who have waited since before the machine of this generation.
    fn wake(&mut self, generation: u64) {
        self.waiting.retain(|_, waiter| {
            let goes_on = waiter.since >= generation;
            if !goes_on {
                // It fails where the session has just ended, or was woken and has not looked yet.
                let _ = waiter.waker.write(&[0]);
            }
            goes_on
        });
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.release();
    }
}

const SIGINT: u8 = 2;
const SIGTRAP: u8 = 5;
