//! A guest: its monitor, its memory, and run control once that is taken.
//!
//! Ties the parts together and keeps their order: a stop counts once QEMU says that no vCPU runs, and nothing is asked
//! of the GDB stub while the guest runs. Source: QEMU `docs/system/gdb.rst`, `qapi/run-state.json`.

use super::control::Control;
use super::events::Events;
use super::guard::Guardian;
use super::hold::STANDSTILL;
use super::memory::Memory;
use super::patches::{INT3, Patches};
use super::qmp::{Qmp, SOON, lock, nonsense};
use super::snapshot::Snapshot;
use super::stub::Interrupter;
use super::{QmpAddress, StubAddress, registers, state};
use crate::addr::{PhysAddr, PhysRange, VirtAddr};
use crate::arch::x86_64::RegisterFile;
use crate::backend::live::{
    DumpOrder, Dumped, Glimpse, Go, Happening, LiveControl, LiveError, Point, RunState, Stop,
};
use crate::backend::{Backend, RegisterSource, SavedCpu};
use qapi::qmp::query_kvm;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

/// How long a line of the human monitor may take: saving or loading a snapshot of a large guest does.
const MONITOR_PATIENCE: Duration = Duration::from_secs(300);
/// For how long a memory map is believed without a look. Firmware that runs changes it without a word.
const MAP_AGE: Duration = Duration::from_millis(200);
/// How long the control lock is held at a time while the guest runs.
const SLICE: Duration = Duration::from_millis(50);
/// How often a guest that says nothing is looked at.
const UNREPORTED: Duration = Duration::from_secs(1);

/// A guest of a QEMU on this machine, or reached over its sockets.
pub struct Guest {
    me: Weak<Guest>,
    pub(super) qmp: Arc<Qmp>,
    address: QmpAddress,
    pub(super) stub: Option<StubAddress>,
    kvm: bool,
    pub(super) events: Arc<Events>,
    map: Mutex<Option<Map>>,
    pub(super) control: Mutex<Option<Control>>,
    /// As long as there is run control.
    pub(super) interrupter: Mutex<Option<Interrupter>>,
    /// Whether the guest was let go under run control and no stop was seen since.
    pub(super) let_go: AtomicBool,
    pub(super) patches: Patches,
    /// What becomes of the guest if this process dies; `None`: what it was before.
    pub(super) on_death: Mutex<Option<bool>>,
    /// While it is stopped by its monitor for us.
    pub(super) guardian: Mutex<Option<Guardian>>,
    /// Clients may change the guest.
    may_write: AtomicBool,
    /// Why it must not be dumped.
    no_dumps: OnceLock<&'static str>,
    /// Held while it is.
    dumping: Mutex<()>,
}

/// The memory that a memory map told of.
struct Map {
    text: String,
    memory: Arc<Memory>,
    seen: Instant,
}

impl Guest {
    /// Whether clients may change the guest from now on; at first they may not.
    pub fn set_allow_write(&self, allow: bool) {
        self.may_write.store(allow, Ordering::SeqCst);
    }

    /// From now on dumps are refused, because of `why`.
    pub fn refuse_dumps(&self, why: &'static str) {
        // The first reason stays.
        let _ = self.no_dumps.set(why);
    }

    /// Connects to QEMU's monitor; neither stops nor changes the guest.
    pub fn connect(qmp: &QmpAddress) -> Result<Arc<Self>, LiveError> {
        Self::with_stub(qmp, None)
    }

    /// The same, where QEMU's GDB stub listens at `stub` (`-gdb`, `-s`). Without it the stub that QEMU has is found by
    /// its monitor, or one is started, when run control is taken.
    pub fn with_stub(qmp: &QmpAddress, stub: Option<StubAddress>) -> Result<Arc<Self>, LiveError> {
        let events = Arc::new(Events::default());
        let sink = Arc::clone(&events);
        let monitor = Qmp::connect(qmp, Box::new(move |event, data| sink.happened(event, data)))?;
        let kvm = monitor.execute(query_kvm {})?;
        let kvm = kvm.get("enabled").and_then(Value::as_bool).unwrap_or(false);
        let guest = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            qmp: Arc::new(monitor),
            address: qmp.clone(),
            stub,
            kvm,
            events,
            map: Mutex::new(None),
            control: Mutex::new(None),
            interrupter: Mutex::new(None),
            let_go: AtomicBool::new(false),
            may_write: AtomicBool::new(false),
            no_dumps: OnceLock::new(),
            dumping: Mutex::new(()),
            patches: Patches::default(),
            on_death: Mutex::new(None),
            guardian: Mutex::new(None),
        });
        let memory = guest.memory()?;
        for (way, bytes) in memory.ways() {
            tracing::info!("{bytes:#x} bytes of the guest's memory are read by {way}");
        }
        Ok(guest)
    }

    /// QEMU's version: "7.2.22".
    pub fn version(&self) -> &str {
        self.qmp.version()
    }

    /// "kvm", or "tcg" for every other.
    pub fn accelerator(&self) -> &'static str {
        if self.kvm { "kvm" } else { "tcg" }
    }

    /// Where its monitor is.
    pub fn address(&self) -> &QmpAddress {
        &self.address
    }

    /// How often the guest went on or was changed, as far as QEMU reported it: what was read before is old.
    pub fn generation(&self) -> u64 {
        self.events.generation()
    }

    /// The machine with its registers as they are now: what [`LiveControl::snapshot`] gives, by its own type.
    pub fn take_snapshot(&self) -> Result<Snapshot, LiveError> {
        let guest = self.me.upgrade().ok_or_else(|| LiveError::Gone("the session ended".into()))?;
        let generation = self.events.generation();
        let state = self.run_state()?;
        let memory = self.memory()?;
        Ok(Snapshot::new(guest, memory, self.saved_cpus(state)?, state, generation))
    }

    /// Each vCPU's registers: all of them from the stub if it may be asked, else those that the monitor shows. To ask the stub
    /// would stop a guest that somebody else let run.
    fn saved_cpus(&self, state: RunState) -> Result<Vec<SavedCpu>, LiveError> {
        if state != RunState::Running
            && !self.let_go.load(Ordering::SeqCst)
            && let Some(control) = &mut *lock(&self.control)
            && !control.stub.is_running()
        {
            return Ok(of_cpus(control.registers()?));
        }
        saved_cpus(self.qmp.human(REGISTERS)?)
    }

    /// The way to the guest's RAM, found anew when the memory map changed.
    pub(super) fn memory(&self) -> Result<Arc<Memory>, LiveError> {
        let mut map = lock(&self.map);
        let old = self.events.take_map_is_old();
        if let Some(map) = &*map
            && !old
            && map.seen.elapsed() < MAP_AGE
        {
            return Ok(Arc::clone(&map.memory));
        }
        let text = self.qmp.human("info mtree -f")?;
        if let Some(map) = &mut *map
            && !old
            && map.text == text
        {
            map.seen = Instant::now();
            return Ok(Arc::clone(&map.memory));
        }
        let memory = Arc::new(Memory::open(&self.qmp, &text)?);
        *map = Some(Map { text, memory: Arc::clone(&memory), seen: Instant::now() });
        Ok(memory)
    }

    /// What is at a virtual address of the first vCPU that has it, and where that is.
    fn byte_at(&self, at: VirtAddr, cpus: &[u32]) -> Result<Option<(PhysAddr, u8)>, LiveError> {
        let ask = |cpu: &u32| -> Result<Option<PhysAddr>, LiveError> {
            let text = self.qmp.human_within(&format!("gva2gpa {at:#x}"), Some(*cpu), SOON)?;
            let digits = text.trim().strip_prefix("gpa: 0x");
            Ok(digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).map(PhysAddr))
        };
        let Some(phys) = cpus.iter().find_map(|cpu| ask(cpu).transpose()).transpose()? else {
            return Ok(None);
        };
        let mut byte = [0];
        let read = self.memory()?.read(phys, &mut byte).stopped.is_none();
        Ok(read.then_some((phys, byte[0])))
    }

    /// Puts back into bytes that were read at `at` what breakpoints stand in the place of.
    pub(super) fn without_breakpoints(&self, at: PhysAddr, bytes: &mut [u8]) {
        self.patches.undo(at, bytes);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let ran = lock(&self.control).as_ref().map(|control| control.ran);
        if let Some(ran) = ran
            && let Err(error) = self.release(ran)
        {
            tracing::warn!("the guest could not be left as it was before: {error}");
        }
    }
}

/// The line of QEMU's human monitor that shows every vCPU's registers.
pub(super) const REGISTERS: &str = "info registers -a";

/// The vCPUs of what the monitor answers to [`REGISTERS`].
pub(super) fn saved_cpus(text: String) -> Result<Vec<SavedCpu>, LiveError> {
    let cpus = registers::parse(&text);
    if cpus.is_empty() { Err(nonsense(REGISTERS, &text)) } else { Ok(of_cpus(cpus)) }
}

fn of_cpus(registers: Vec<(u32, RegisterFile)>) -> Vec<SavedCpu> {
    let saved = |(cpu, regs): (u32, RegisterFile)| SavedCpu {
        regs,
        source: RegisterSource::Qemu,
        pid: cpu.checked_add(1),
        prstatus: Vec::new(),
    };
    registers.into_iter().map(saved).collect()
}

impl LiveControl for Guest {
    fn snapshot(&self) -> Result<Arc<dyn Backend>, LiveError> {
        Ok(Arc::new(self.take_snapshot()?))
    }

    fn run_state(&self) -> Result<RunState, LiveError> {
        state::run_state(&self.qmp)
    }

    fn happenings(&self) -> Vec<Happening> {
        self.events.take()
    }

    fn may_write(&self) -> bool {
        self.may_write.load(Ordering::SeqCst)
    }

    fn monitor(&self, line: &str) -> Result<String, LiveError> {
        let answer = self.qmp.human_within(line, None, MONITOR_PATIENCE);
        // Whatever it was: the guest may be another.
        self.events.changed();
        self.events.map_changed();
        answer
    }

    fn glimpse(&self, look: &mut dyn FnMut(&Arc<dyn Backend>)) -> Result<Glimpse, LiveError> {
        self.show_standing(look)
    }

    fn attach(&self) -> Result<Stop, LiveError> {
        self.take_control()
    }

    fn ran_before(&self) -> Option<bool> {
        lock(&self.control).as_ref().map(|control| control.ran)
    }

    fn on_death(&self, running: Option<bool>) {
        self.decide_for_death(running);
    }

    fn stub_packet(&self, packet: &[u8]) -> Result<Vec<u8>, LiveError> {
        let ours = packet.starts_with(b"qqemu.") || packet.starts_with(b"Qqemu.");
        let physical = packet.get(1..).is_some_and(|rest| rest.starts_with(b"qemu.PhyMemMode"));
        if !ours || (physical && packet.starts_with(b"Q")) {
            let why = "only packets about stepping are passed on to QEMU".to_owned();
            return Err(LiveError::NotNow { what: "passing a packet on".into(), why });
        }
        self.with_control("asking QEMU's stub", |control| control.stub.raw(packet))
    }

    fn detach(&self, running: bool) -> Result<(), LiveError> {
        self.release(running)
    }

    fn can_reverse(&self) -> bool {
        if !self.let_go.load(Ordering::SeqCst)
            && let Some(control) = &*lock(&self.control)
        {
            return control.stub.offers("ReverseStep+") && control.stub.offers("ReverseContinue+");
        }
        self.qmp.human("info replay").is_ok_and(|text| text.starts_with("Replaying"))
    }

    fn insert(&self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError> {
        self.with_control("putting a breakpoint or watchpoint", |control| {
            let cpus = control.whose_tables(at);
            let before = if self.kvm && point == Point::Software { self.byte_at(at, &cpus)? } else { None };
            control.insert(point, at, len)?;
            if let Some((phys, byte)) = before
                && let Some((_, INT3)) = self.byte_at(at, &cpus)?
                && byte != INT3
            {
                self.patches.add(at, phys, byte);
            }
            self.events.changed();
            Ok(())
        })
    }

    fn remove(&self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError> {
        self.with_control("removing a breakpoint or watchpoint", |control| {
            control.remove(point, at, len)?;
            if point == Point::Software && !control.has_breakpoint(at) {
                self.patches.remove(at);
            }
            self.events.changed();
            Ok(())
        })
    }

    fn resume(&self, actions: &[(Option<u32>, Go)]) -> Result<(), LiveError> {
        self.with_control("letting the guest run", |control| {
            control.may_run()?;
            control.hold = Some(self.events.ours());
            self.events.changed();
            control.resume(actions)?;
            self.let_go.store(true, Ordering::SeqCst);
            Ok(())
        })
    }

    fn reverse(&self, go: Go) -> Result<(), LiveError> {
        self.with_control("letting the guest run backwards", |control| {
            if !control.stub.offers("ReverseStep+") {
                let why = "QEMU does not replay a recording (start it with -icount rr=replay,...)".to_owned();
                return Err(LiveError::NotNow { what: "running backwards".into(), why });
            }
            control.may_run()?;
            control.hold = Some(self.events.ours());
            self.events.changed();
            control.stub.reverse(go)?;
            self.let_go.store(true, Ordering::SeqCst);
            Ok(())
        })
    }

    fn interrupt(&self) -> Result<(), LiveError> {
        // Not through the lock, which who waits for the stop has most of the time.
        match &mut *lock(&self.interrupter) {
            Some(interrupter) if self.let_go.load(Ordering::SeqCst) => interrupter.interrupt(),
            // It stands still.
            Some(_) => Ok(()),
            None => Err(LiveError::NotNow {
                what: "interrupting the guest".into(),
                why: "kstub has no run control of it; attach to it first".into(),
            }),
        }
    }

    fn wait_stop(&self, patience: Duration) -> Result<Option<Stop>, LiveError> {
        let deadline = Instant::now() + patience;
        let mut looked = Instant::now();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // A guest that stands still although the stub said nothing: QEMU has states that it does not report.
            let silent = looked.elapsed() >= UNREPORTED && {
                looked = Instant::now();
                self.is_at_rest()?
            };
            {
                let mut held = lock(&self.control);
                let Some(control) = &mut *held else {
                    let why = "kstub has no run control of it; attach to it first".to_owned();
                    return Err(LiveError::NotNow { what: "waiting for the guest".into(), why });
                };
                // Another thread that waited took note of it.
                if !control.stub.is_running() {
                    return Ok(Some(control.stop));
                }
                let mut waited = control.wait(left.min(SLICE));
                if silent && matches!(waited, Ok(None)) {
                    waited = Ok(Some(control.unreported_stop()));
                }
                if !matches!(waited, Ok(None)) {
                    // A stop, or the connection's end.
                    let state = self.state_of_stop();
                    control.hold = None;
                    self.events.changed();
                    self.let_go.store(false, Ordering::SeqCst);
                    let stop = waited?;
                    control.state = state?;
                    control.follow_cpus(&self.qmp);
                    return Ok(stop);
                }
            }
            if left.is_zero() {
                return Ok(None);
            }
            // Lets those in who wait for the lock, which is not a fair one.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn dump(&self, order: &DumpOrder<'_>, progress: &dyn Fn(u64, u64)) -> Result<Dumped, LiveError> {
        let not_now =
            |why: &str| Err(LiveError::NotNow { what: "dumping the guest".into(), why: why.into() });
        if let Some(why) = self.no_dumps.get() {
            return not_now(why);
        }
        let Ok(_one) = self.dumping.try_lock() else {
            return not_now("another dump of it is being written");
        };
        let _ours = self.events.ours();
        let ran = self.run_state()? == RunState::Running;
        let in_memory = if self.let_go.load(Ordering::SeqCst) { self.patches.len() } else { 0 };
        let written = self.dump_without_breakpoints(order, progress);
        // QEMU lets it run, also after a failure, once it has said that the dump is over.
        let deadline = Instant::now() + STANDSTILL;
        let mut state = self.run_state()?;
        while ran && state != RunState::Running && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
            state = self.run_state()?;
        }
        let stood = if ran { self.events.stood() } else { None };
        Ok(Dumped { bytes: written?, ran, stood, state, breakpoints: in_memory })
    }

    fn write_phys(&self, at: PhysAddr, bytes: &[u8]) -> Result<(), LiveError> {
        let what = || format!("writing {} bytes at physical address {at:#x}", bytes.len());
        let memory = self.memory()?;
        let range = PhysRange::new(at, bytes.len() as u64);
        if !range.is_some_and(|range| memory.is_writable(range)) {
            return Err(LiveError::NotNow { what: what(), why: "not all of that is RAM".into() });
        }
        self.with_control("writing guest memory", |control| {
            let written = control.stub.write_phys(at, bytes);
            self.events.changed();
            written
        })?;
        let mut now = vec![0; bytes.len()];
        if memory.read(at, &mut now).stopped.is_none() && now != bytes {
            let why = "the bytes are not there afterwards".to_owned();
            return Err(LiveError::Refused { what: what(), why });
        }
        Ok(())
    }

    fn write_register(&self, cpu: u32, name: &str, value: &[u8]) -> Result<(), LiveError> {
        self.with_control("setting a register", |control| {
            let written = control.stub.write_register(cpu, name, value);
            self.events.changed();
            written
        })
    }
}
