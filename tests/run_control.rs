//! Clients of a guest that lives, byte by byte, on a guest that is none: what it is told to do is written down.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "support/rsp_client.rs"]
mod rsp_client;

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
use rsp_client::packet;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const GDB: &str = "qSupported:multiprocess+;QThreadEvents+;error-message+";

/// Three vCPUs without paging: virtual addresses lead nowhere, which registers and run control do not mind.
struct Snapshot(MemoryImage, Vec<SavedCpu>, Arc<FakeGuest>);

impl PhysicalMemory for Snapshot {
    fn read_phys(&self, at: PhysAddr, buf: &mut [u8]) -> ReadOutcome {
        self.0.read_phys(at, buf)
    }
    fn ranges(&self) -> Vec<PhysRange> {
        self.0.ranges()
    }
}

impl Backend for Snapshot {
    fn saved_cpus(&self) -> &[SavedCpu] {
        &self.1
    }
    fn vmcoreinfo_note(&self) -> Option<&[u8]> {
        None
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
struct FakeGuest {
    /// What was done to it.
    told: Mutex<Vec<String>>,
    /// The stops to come.
    stops: Mutex<Vec<Result<Stop, LiveError>>>,
    is_running: Mutex<bool>,
    /// Counts moments, so that each has other registers.
    moment: Mutex<u64>,
    me: Mutex<std::sync::Weak<FakeGuest>>,
    happened: Mutex<Vec<Happening>>,
}

impl FakeGuest {
    fn new(is_running: bool) -> Arc<Self> {
        let guest = Arc::new(Self { is_running: Mutex::new(is_running), ..Self::default() });
        *guest.me.lock().unwrap() = Arc::downgrade(&guest);
        guest
    }
    fn told(&self) -> Vec<String> {
        std::mem::take(&mut *self.told.lock().unwrap())
    }
    fn note(&self, what: String) -> Result<(), LiveError> {
        self.told.lock().unwrap().push(what);
        Ok(())
    }
    fn stops(&self, cpu: u32, reason: StopReason) {
        self.stops.lock().unwrap().push(Ok(Stop { cpu, reason }));
    }
}

impl LiveControl for FakeGuest {
    fn snapshot(&self) -> Result<Arc<dyn Backend>, LiveError> {
        let mut moment = self.moment.lock().unwrap();
        *moment += 1;
        let cpu = |n: u64| {
            let mut regs = RegisterFile::default();
            regs.set_known(Reg::Rip, 0x1000 * *moment + n);
            regs.set_known(Reg::Cs, 0x10);
            SavedCpu { regs, source: RegisterSource::Qemu, pid: None, prstatus: vec![] }
        };
        let mut image = MemoryImage::new();
        image.write(PhysAddr(0x1000), &[0xcc; 16]);
        Ok(Arc::new(Snapshot(image, (0..3).map(cpu).collect(), self.me.lock().unwrap().upgrade().unwrap())))
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
        Ok(Stop { cpu: 1, reason: StopReason::Signal(5) })
    }
    fn ran_before(&self) -> Option<bool> {
        Some(*self.is_running.lock().unwrap())
    }
    fn on_death(&self, running: Option<bool>) {
        self.told.lock().unwrap().push(format!("on death {running:?}"));
    }
    fn stub_packet(&self, packet: &[u8]) -> Result<Vec<u8>, LiveError> {
        self.note(format!("packet {}", packet.escape_ascii())).map(|()| b"0x7".to_vec())
    }
    fn detach(&self, running: bool) -> Result<(), LiveError> {
        self.note(format!("detach {running}"))
    }
    fn can_reverse(&self) -> bool {
        false
    }
    fn insert(&self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError> {
        self.note(format!("insert {point:?} {at:#x} {len}"))
    }
    fn remove(&self, point: Point, at: VirtAddr, len: u64) -> Result<(), LiveError> {
        self.note(format!("remove {point:?} {at:#x} {len}"))
    }
    fn resume(&self, actions: &[(Option<u32>, Go)]) -> Result<(), LiveError> {
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
        self.stops.lock().unwrap().pop().transpose()
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

fn live(guest: &Arc<FakeGuest>, policy: Policy) -> Arc<Live> {
    let open = |backend| Machine::open(backend, &Options::default(), &|_, _| ());
    Live::new(guest.clone(), policy, Box::new(open)).unwrap()
}

fn policy() -> Policy {
    Policy { allow_write: false, control: true, on_disconnect: OnDisconnect::Restore }
}

struct Client {
    front: Front,
    framer: Framer,
}

impl Client {
    fn new(live: &Arc<Live>) -> Self {
        let front = Front::on_guest(live, Settings::from(Files::none())).unwrap();
        let mut client = Self { front, framer: Framer::new(MAX_REQUEST) };
        client.raw(&packet(GDB));
        client.raw(&packet("QStartNoAckMode"));
        client
    }

    fn raw(&mut self, bytes: &[u8]) -> (String, Flow) {
        let (mut out, mut flow) = (Vec::new(), Flow::Continue);
        for event in self.framer.events(bytes) {
            flow = self.front.handle(event, &mut out);
        }
        (String::from_utf8(out).unwrap(), flow)
    }

    /// The body of the one packet that answers, or "" for no answer yet.
    fn ask(&mut self, body: &str) -> String {
        body_of(&self.raw(&packet(body)).0)
    }

    /// What comes when the guest stops.
    fn wait(&mut self) -> String {
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        let wake = self.front.wake().unwrap();
        let woken = rustix::event::poll(&mut [PollFd::new(&wake, PollFlags::IN)], Some(&patience)).unwrap();
        assert_eq!(woken, 1, "the guest has not stopped");
        let mut out = Vec::new();
        self.front.woken(&mut out);
        body_of(&String::from_utf8(out).unwrap())
    }
}

/// The last packet's body.
fn body_of(text: &str) -> String {
    let text = text.trim_end_matches('+');
    match text.rsplit_once('$') {
        Some((_, last)) => last.split_once('#').unwrap().0.to_owned(),
        None => String::new(),
    }
}

#[test]
fn the_first_that_asks_controls_and_leaves_it_as_it_was() {
    for (was_running, on_disconnect, left) in [
        (true, OnDisconnect::Restore, true),
        (false, OnDisconnect::Restore, false),
        (false, OnDisconnect::Resume, true),
        (true, OnDisconnect::Leave, false),
    ] {
        let guest = FakeGuest::new(was_running);
        let live = live(&guest, Policy { on_disconnect, ..policy() });
        let mut first = Client::new(&live);
        // Nothing stops it before someone asks.
        assert_eq!(guest.told(), [""; 0]);
        assert_eq!(first.ask("?"), "T05thread:p1.2;");
        assert_eq!(first.ask("?"), "T05thread:p1.2;");
        assert_eq!(guest.told(), ["attach"]);
        let mut second = Client::new(&live);
        assert_eq!(second.ask("?"), "T05thread:p1.2;");
        drop(second);
        assert_eq!(guest.told(), [""; 0]);
        drop(first);
        assert_eq!(guest.told(), [format!("detach {left}")]);
    }
}

#[test]
fn kill_and_detach_never_reach_qemu() {
    for goodbye in ["k", "vKill;1", "D;1", "D"] {
        let guest = FakeGuest::new(true);
        let live = live(&guest, policy());
        let mut client = Client::new(&live);
        client.ask("?");
        assert_eq!(client.raw(&packet(goodbye)).1, Flow::End, "{goodbye}");
        drop(client);
        assert_eq!(guest.told(), ["attach", "detach true"], "{goodbye}");
    }
}

#[test]
fn threads_run_and_stop_as_they_are_told() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let mut client = Client::new(&live);
    client.ask("?");
    let before = client.ask("p10");
    guest.told();
    assert_eq!(client.ask("vCont;s:p1.2;c"), "");
    assert!(client.front.is_running());
    assert_eq!(guest.told(), ["resume [(Some(1), Step), (None, Continue)]"]);
    guest.stops(2, StopReason::Signal(5));
    assert_eq!(client.wait(), "T05thread:p1.3;");
    assert!(!client.front.is_running());
    // Other registers than before, and those of the thread that stopped.
    let after = client.ask("p10");
    assert_ne!(before, after);
    assert_eq!(&after[..2], "02");
    // Actions for one alone leave the others standing.
    client.ask("vCont;s:p1.1");
    guest.stops(0, StopReason::Watch(Point::Write, VirtAddr(0xffff_8880_0000_1238)));
    assert_eq!(client.wait(), "T05watch:ffff888000001238;thread:p1.1;");
    // The old forms.
    client.ask("c");
    guest.stops(0, StopReason::Watch(Point::Read, VirtAddr(0x10)));
    assert_eq!(client.wait(), "T05rwatch:10;thread:p1.1;");
    client.ask("s");
    guest.stops(0, StopReason::ReplayEnd);
    assert_eq!(client.wait(), "T05replaylog:end;thread:p1.1;");
    client.ask("bc");
    guest.stops(0, StopReason::ReplayEnd);
    assert_eq!(client.wait(), "T05replaylog:begin;thread:p1.1;");
    assert_eq!(
        guest.told(),
        [
            "resume [(Some(0), Step)]",
            "resume [(None, Continue)]",
            "resume [(Some(0), Step), (None, Continue)]",
            "reverse Continue"
        ]
    );
    // What makes no sense runs nothing, and is answered.
    for wrong in ["vCont;s:p1.9", "vCont;q", "vCont;c:zz"] {
        assert!(client.ask(wrong).starts_with("T00"), "{wrong}");
        assert!(!client.front.is_running(), "{wrong}");
    }
    assert_eq!(guest.told(), [""; 0]);
}

#[test]
fn ctrl_c_stops_it() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let mut client = Client::new(&live);
    client.ask("?");
    // While it stands there is nothing to stop.
    assert_eq!(client.raw(b"\x03").0, "");
    client.ask("vCont;c");
    guest.told();
    assert_eq!(client.raw(b"\x03").0, "");
    assert_eq!(guest.told(), ["interrupt"]);
    assert_eq!(client.wait(), "T02thread:p1.3;");
}

#[test]
fn who_looks_on_waits_with_the_one_in_control() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let (mut owner, mut reader) = (Client::new(&live), Client::new(&live));
    owner.ask("?");
    reader.ask("?");
    guest.told();
    assert!(reader.ask("Z0,ffffffff81000000,1").starts_with("E.another client"));
    assert_eq!(reader.ask("vCont;c"), "");
    assert_eq!(reader.ask("vCont;c"), "");
    assert_eq!(guest.told(), [""; 0]);
    owner.ask("vCont;c");
    guest.stops(1, StopReason::Signal(5));
    assert_eq!(owner.wait(), "T05thread:p1.2;");
    assert_eq!(reader.wait(), "T05thread:p1.2;");
    assert_eq!(owner.ask("p10"), reader.ask("p10"));
    // Its Ctrl-C only ends its waiting.
    reader.ask("vCont;c");
    guest.told();
    assert!(body_of(&reader.raw(b"\x03").0).starts_with("T00"));
    assert_eq!(guest.told(), [""; 0]);
    // Control goes by command, and with the client that has it.
    let command = |client: &mut Client, line: &str| {
        let hex: String = line.bytes().map(|b| format!("{b:02x}")).collect();
        let answer = client.ask(&format!("qRcmd,{hex}"));
        String::from_utf8(rsp_client::from_hex(&answer)).unwrap()
    };
    assert!(command(&mut reader, "control").starts_with("Another client"));
    assert!(command(&mut reader, "control take").starts_with("This client"));
    assert!(command(&mut owner, "control").starts_with("Another client"));
    drop(owner);
    assert_eq!(guest.told(), [""; 0]);
    assert!(command(&mut reader, "control give").starts_with("Nobody"));
    assert_eq!(guest.told(), ["detach true"]);
}

#[test]
fn points_go_where_they_are_and_with_their_client() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let mut client = Client::new(&live);
    client.ask("?");
    guest.told();
    assert_eq!(client.ask("Z0,ffffffff81000010,1"), "OK");
    assert_eq!(client.ask("Z0,ffffffff81000010,1"), "OK");
    assert_eq!(client.ask("Z2,ffff888000001238,8"), "OK");
    assert_eq!(client.ask("z0,ffffffff81000010,1"), "OK");
    assert_eq!(client.ask("z0,ffffffff81000010,1"), "OK");
    assert_eq!(client.ask("Z9,1,1"), "");
    assert_eq!(client.ask("Z0,zz,1"), "E16");
    assert_eq!(
        guest.told(),
        [
            "insert Software 0xffffffff81000010 1",
            "insert Write 0xffff888000001238 8",
            "remove Software 0xffffffff81000010 1"
        ]
    );
}

#[test]
fn nothing_is_written_unless_it_is_allowed() {
    let guest = FakeGuest::new(true);
    let read_only = live(&guest, policy());
    let mut client = Client::new(&read_only);
    client.ask("?");
    client.ask("Qqemu.PhyMemMode:1");
    guest.told();
    for write in ["M1000,2:9090", "X1000,2:ab", "P0=0000000000000000", "G00"] {
        assert!(client.ask(write).starts_with('E'), "{write}");
    }
    assert_eq!(guest.told(), [""; 0]);
    drop((client, read_only));
    guest.told();
    let live = live(&guest, Policy { allow_write: true, ..policy() });
    let mut client = Client::new(&live);
    client.ask("?");
    client.ask("Qqemu.PhyMemMode:1");
    guest.told();
    assert_eq!(client.ask("M1000,2:9091"), "OK");
    assert_eq!(client.ask("X1ffe,4:a}\u{3}b}]"), "OK");
    assert_eq!(client.ask("Hgp1.3"), "OK");
    assert_eq!(client.ask("P0=0102030405060708"), "OK");
    for wrong in ["M1000,3:9091", "M1000", "X1000,1:}", "P0", "Pffff=00"] {
        assert!(client.ask(wrong).starts_with('E'), "{wrong}");
    }
    assert_eq!(
        guest.told(),
        [
            "write 0x1000 [90, 91]",
            "write 0x1ffe [61, 23]",
            "write 0x2000 [62, 7d]",
            "register 2 rax [1, 2, 3, 4, 5, 6, 7, 8]"
        ]
    );
}

#[test]
fn a_guest_that_must_not_stop_is_only_looked_at() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, Policy { control: false, ..policy() });
    let mut client = Client::new(&live);
    assert!(client.ask("?").starts_with("T05"));
    let before = client.ask("p10");
    assert_eq!(client.ask("vCont;c"), "");
    assert!(client.front.is_running());
    assert!(body_of(&client.raw(b"\x03").0).starts_with("T00"));
    assert_ne!(client.ask("p10"), before, "Ctrl-C shows what is there now");
    assert!(client.ask("vCont;s:p1.1").starts_with("T00"), "it would wait for ever");
    assert!(!client.front.is_running());
    drop(client);
    assert_eq!(guest.told(), [""; 0]);
}

#[test]
fn a_guest_that_is_gone_is_said_to_be() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let mut client = Client::new(&live);
    client.ask("?");
    client.ask("vCont;c");
    guest.stops.lock().unwrap().push(Err(LiveError::Gone("killed".into())));
    assert_eq!(client.wait(), "X09");
    assert_eq!(client.ask("vCont;c"), "X09");
    assert!(!client.front.is_running());
}

#[test]
fn a_reset_is_told_with_the_next_stop() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let mut client = Client::new(&live);
    client.ask("?");
    client.ask("vCont;c");
    guest.happened.lock().unwrap().push(Happening::Reset);
    std::thread::sleep(Duration::from_millis(500));
    guest.stops(0, StopReason::Signal(5));
    let wake = client.front.wake().unwrap();
    let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::new(&wake, PollFlags::IN)], Some(&patience)).unwrap();
    let mut out = Vec::new();
    client.front.woken(&mut out);
    let text = String::from_utf8(out).unwrap();
    let said: String = "The guest was started again".bytes().map(|b| format!("{b:02x}")).collect();
    assert!(text.contains(&format!("$O{said}")) && text.contains("$T05thread:p1.1;#"), "{text}");
    // Once.
    client.ask("vCont;c");
    guest.stops(0, StopReason::Signal(5));
    assert_eq!(client.wait(), "T05thread:p1.1;");
}

/// To gdb the first packet is the answer to `?`: words before it would be taken for it.
#[test]
fn what_has_happened_does_not_come_between_a_question_and_its_answer() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let (mut client, mut other) = (Client::new(&live), Client::new(&live));
    client.ask("?");
    other.ask("?");
    guest.happened.lock().unwrap().push(Happening::Reset);
    std::thread::sleep(Duration::from_millis(500));
    for client in [&mut client, &mut other] {
        assert_eq!(client.raw(&packet("?")).0.matches('$').count(), 1);
    }
    // Each hears of it, and who comes later does not.
    let mut late = Client::new(&live);
    late.ask("?");
    let mut said = Vec::new();
    for client in [&mut client, &mut other, &mut late] {
        client.ask("vCont;c");
    }
    guest.stops(0, StopReason::Signal(5));
    for client in [&mut client, &mut other, &mut late] {
        let wake = client.front.wake().unwrap();
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        rustix::event::poll(&mut [PollFd::new(&wake, PollFlags::IN)], Some(&patience)).unwrap();
        let mut out = Vec::new();
        client.front.woken(&mut out);
        said.push(String::from_utf8(out).unwrap().contains("$O"));
    }
    assert_eq!(said, [true, true, false]);
}
