//! A guest that is none, and a client of it.

use crate::rsp_client::packet;
use kstub::addr::{PhysAddr, PhysRange, VirtAddr};
use kstub::arch::x86_64::{Reg, RegisterFile};
use kstub::backend::live::{
    DumpOrder, Dumped, Glimpse, Go, Happening, LiveControl, LiveError, Point, RunState, Stop, StopReason,
};
use kstub::backend::{Backend, Fact, RegisterSource, SavedCpu};
use kstub::gdb::{Files, Flow, Front, Live, MAX_REQUEST, OnDisconnect, Policy, Settings};
use kstub::kernel::{Machine, Options};
use kstub::memory::{MemoryImage, PhysicalMemory, ReadOutcome};
use kstub::rsp::Framer;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const GDB: &str = "qSupported:multiprocess+;QThreadEvents+;error-message+";

/// Three vCPUs without paging: virtual addresses lead nowhere, which registers and run control do not mind. Or a dump's
/// memory and vCPUs.
struct Snapshot(Memory, Vec<SavedCpu>, Arc<FakeGuest>);

enum Memory {
    Image(MemoryImage),
    Dump(Arc<dyn Backend>),
}

impl PhysicalMemory for Snapshot {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        match &self.0 {
            Memory::Image(image) => image.read_phys(at, buf),
            Memory::Dump(dump) => dump.read_phys(at, buf),
        }
    }
    fn ranges(&self) -> Vec<PhysRange> {
        match &self.0 {
            Memory::Image(image) => image.ranges(),
            Memory::Dump(dump) => dump.ranges(),
        }
    }
}

impl Backend for Snapshot {
    fn saved_cpus(&self) -> &[SavedCpu] {
        &self.1
    }
    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        match &self.0 {
            Memory::Image(_) => None,
            Memory::Dump(dump) => dump.vmcoreinfo_note(),
        }
    }
    fn phys_base_hints(&self) -> Vec<u64> {
        vec![]
    }
    fn facts(&self) -> Vec<Fact> {
        vec![]
    }
    fn problems(&self) -> Vec<String> {
        vec![]
    }
    fn live(&self) -> Option<&dyn LiveControl> {
        Some(&*self.2)
    }
}

#[derive(Default)]
pub struct FakeGuest {
    /// What was done to it.
    pub told: Mutex<Vec<String>>,
    /// The stops to come.
    pub stops: Mutex<Vec<Result<Stop, LiveError>>>,
    pub is_running: Mutex<bool>,
    /// Counts moments, so that each has other registers.
    moment: Mutex<u64>,
    me: Mutex<std::sync::Weak<FakeGuest>>,
    happened: Mutex<Vec<Happening>>,
    /// Run control that was taken before: whether it ran then.
    pub taken: Mutex<Option<bool>>,
    /// The next snapshots fail so.
    pub fails: Mutex<Vec<LiveError>>,
    /// Its memory, if it is a dump's, and where each of its vCPUs is.
    pub dump: Mutex<Option<Arc<dyn Backend>>>,
    pub pc: Mutex<u64>,
    /// What is to become of it if kstub dies, each time that was said.
    pub death: Mutex<Vec<Option<bool>>>,
    /// Is called when the next breakpoint is put.
    pub on_insert: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl FakeGuest {
    pub fn new(is_running: bool) -> Arc<Self> {
        let guest = Arc::new(Self { is_running: Mutex::new(is_running), ..Self::default() });
        *guest.me.lock().unwrap() = Arc::downgrade(&guest);
        guest
    }
    pub fn told(&self) -> Vec<String> {
        std::mem::take(&mut *self.told.lock().unwrap())
    }
    fn note(&self, what: String) -> Result<(), LiveError> {
        self.told.lock().unwrap().push(what);
        Ok(())
    }
    /// By other hands: returns when it has been noticed.
    pub fn happens(&self, happening: Happening) {
        self.happened.lock().unwrap().push(happening);
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.happened.lock().unwrap().is_empty() {
            assert!(Instant::now() < deadline, "nobody looks");
            std::thread::sleep(Duration::from_millis(10));
        }
        // Whoever took it has yet to act by it.
        std::thread::sleep(Duration::from_millis(200));
    }
    pub fn stops(&self, cpu: u32, reason: StopReason) {
        self.stops.lock().unwrap().push(Ok(Stop { cpu, reason }));
    }
}

impl LiveControl for FakeGuest {
    fn snapshot(&self) -> Result<Arc<dyn Backend>, LiveError> {
        if let Some(error) = self.fails.lock().unwrap().pop() {
            return Err(error);
        }
        let mut moment = self.moment.lock().unwrap();
        *moment += 1;
        let me = self.me.lock().unwrap().upgrade().unwrap();
        if let Some(dump) = &*self.dump.lock().unwrap() {
            let mut cpus = dump.saved_cpus().to_vec();
            cpus.iter_mut().for_each(|cpu| cpu.regs.set_known(Reg::Rip, *self.pc.lock().unwrap()));
            return Ok(Arc::new(Snapshot(Memory::Dump(dump.clone()), cpus, me)));
        }
        let cpu = |n: u64| {
            let mut regs = RegisterFile::default();
            regs.set_known(Reg::Rip, 0x1000 * *moment + n);
            regs.set_known(Reg::Cs, 0x10);
            SavedCpu { regs, source: RegisterSource::Qemu, pid: None, prstatus: vec![] }
        };
        let mut image = MemoryImage::new();
        image.write(PhysAddr(0x1000), &[0xcc; 16]);
        Ok(Arc::new(Snapshot(Memory::Image(image), (0..3).map(cpu).collect(), me)))
    }
    fn run_state(&self) -> Result<RunState, LiveError> {
        Ok(if *self.is_running.lock().unwrap() { RunState::Running } else { RunState::Stopped("prelaunch") })
    }
    fn happenings(&self) -> Vec<Happening> {
        std::mem::take(&mut *self.happened.lock().unwrap())
    }
    fn may_write(&self) -> bool {
        false
    }
    fn monitor(&self, line: &str) -> Result<String, LiveError> {
        self.note(format!("monitor {line}")).map(|()| format!("QEMU says {line}\r\n"))
    }
    fn glimpse(&self, _: &mut dyn FnMut(&Arc<dyn Backend>)) -> Result<Glimpse, LiveError> {
        self.note("glimpse".into()).map(|()| panic!("no client asks for one"))
    }
    fn attach(&self) -> Result<Stop, LiveError> {
        self.note("attach".into())?;
        *self.is_running.lock().unwrap() = false;
        Ok(Stop { cpu: 1, reason: StopReason::Signal(5) })
    }
    fn ran_before(&self) -> Option<bool> {
        *self.taken.lock().unwrap()
    }
    fn on_death(&self, running: Option<bool>) {
        self.death.lock().unwrap().push(running);
    }
    fn stub_packet(&self, packet: &[u8]) -> Result<Vec<u8>, LiveError> {
        self.note(format!("packet {}", packet.escape_ascii())).map(|()| b"0x7".to_vec())
    }
    fn detach(&self, running: bool) -> Result<(), LiveError> {
        *self.is_running.lock().unwrap() = running;
        self.note(format!("detach {running}"))
    }
    fn can_reverse(&self) -> bool {
        false
    }
    fn insert(&self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError> {
        let hook = self.on_insert.lock().unwrap().take();
        hook.into_iter().for_each(|hook| hook());
        self.note(format!("insert {point:?} {at:#x} {len}"))
    }
    fn remove(&self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError> {
        self.note(format!("remove {point:?} {at:#x} {len}"))
    }
    fn resume(&self, actions: &[(Option<u32>, Go)]) -> Result<(), LiveError> {
        *self.is_running.lock().unwrap() = true;
        self.note(format!("resume {actions:?}"))
    }
    fn reverse(&self, go: Go) -> Result<(), LiveError> {
        self.note(format!("reverse {go:?}"))
    }
    fn interrupt(&self) -> Result<(), LiveError> {
        self.stops(2, StopReason::Signal(2));
        self.note("interrupt".into())
    }
    fn wait_stop(&self, _patience: Duration) -> Result<Option<Stop>, LiveError> {
        std::thread::sleep(Duration::from_millis(2));
        let stop = self.stops.lock().unwrap().pop().transpose()?;
        *self.is_running.lock().unwrap() &= stop.is_none();
        Ok(stop)
    }
    fn dump(&self, order: &DumpOrder<'_>, _progress: &dyn Fn(u64, u64)) -> Result<Dumped, LiveError> {
        self.note(format!("dump {order:?}"))?;
        Err(LiveError::NotNow { what: "dumping".into(), why: "there is no QEMU".into() })
    }
    fn write_phys(&self, at: PhysAddr, bytes: &[u8]) -> Result<(), LiveError> {
        self.note(format!("write {at:#x} {bytes:x?}"))
    }
    fn write_register(&self, cpu: u32, name: &str, value: &[u8]) -> Result<(), LiveError> {
        self.note(format!("register {cpu} {name} {value:x?}"))
    }
}

pub fn live(guest: &Arc<FakeGuest>, policy: Policy) -> Arc<Live> {
    let open = |backend| Machine::open(backend, &Options::default(), &|_, _| ());
    Live::new(guest.clone(), policy, Box::new(open)).unwrap()
}

pub fn policy() -> Policy {
    Policy { allow_write: false, control: true, on_disconnect: OnDisconnect::Restore }
}

pub struct Client {
    pub front: Front,
    framer: Framer,
}

impl Client {
    /// What a command of kstub's prints.
    pub fn command(&mut self, line: &str) -> String {
        let hex: String = line.bytes().map(|b| format!("{b:02x}")).collect();
        let answer = self.ask(&format!("qRcmd,{hex}"));
        String::from_utf8(crate::rsp_client::from_hex(&answer)).unwrap()
    }

    /// What comes when the guest stops, with the text before it.
    pub fn wait_with_news(&mut self) -> (String, String) {
        let out = self.woken();
        let text = match out.split_once("$O") {
            Some((_, rest)) => crate::rsp_client::from_hex(rest.split_once('#').unwrap().0),
            None => Vec::new(),
        };
        (String::from_utf8(text).unwrap(), body_of(&out))
    }

    /// Whether the guest's stop has come.
    pub fn is_woken(&self) -> bool {
        let soon = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };
        let wake = self.front.wake().unwrap();
        rustix::event::poll(&mut [PollFd::new(&wake, PollFlags::IN)], Some(&soon)).unwrap() == 1
    }

    pub fn new(live: &Arc<Live>) -> Self {
        Self::with(live, GDB)
    }

    /// One that begins with these words.
    pub fn with(live: &Arc<Live>, words: &str) -> Self {
        let front = Front::on_guest(live, Settings::from(Files::none())).unwrap();
        let mut client = Self { front, framer: Framer::new(MAX_REQUEST) };
        client.raw(&packet(words));
        client.raw(&packet("QStartNoAckMode"));
        client
    }

    pub fn raw(&mut self, bytes: &[u8]) -> (String, Flow) {
        let (mut out, mut flow) = (Vec::new(), Flow::Continue);
        for event in self.framer.events(bytes) {
            flow = self.front.handle(event, &mut out);
        }
        (String::from_utf8(out).unwrap(), flow)
    }

    /// The body of the one packet that answers, or "" for no answer yet.
    pub fn ask(&mut self, body: &str) -> String {
        body_of(&self.raw(&packet(body)).0)
    }

    /// What comes when the guest stops.
    pub fn wait(&mut self) -> String {
        body_of(&self.woken())
    }

    fn woken(&mut self) -> String {
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        let wake = self.front.wake().unwrap();
        let woken = rustix::event::poll(&mut [PollFd::new(&wake, PollFlags::IN)], Some(&patience)).unwrap();
        assert_eq!(woken, 1, "the guest has not stopped");
        let mut out = Vec::new();
        self.front.woken(&mut out);
        String::from_utf8(out).unwrap()
    }
}

/// The last packet's body.
pub fn body_of(text: &str) -> String {
    let text = text.trim_end_matches('+');
    match text.rsplit_once('$') {
        Some((_, last)) => last.split_once('#').unwrap().0.to_owned(),
        None => String::new(),
    }
}
