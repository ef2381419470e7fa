//! A QEMU that is slow, that others use too, or whose stub fails: the guest is neither lost nor left standing.
//!
//! Monitor and stub are fakes that share a guest, with the manners of QEMU 8.1 and later: a byte that comes while the guest runs
//! stops it and is lost, and only an interrupt is answered. Source: QEMU `gdbstub/gdbstub.c` (`gdb_read_byte`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use kstub::addr::VirtAddr;
use kstub::backend::live::{Go, LiveControl, LiveError, Point, RunState, StopReason};
use kstub::backend::qemu::{Guest, QmpAddress};
use kstub::rsp::{self, Event, Framer};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

const MTREE: &str = "FlatView #0\r\n AS \"memory\", root: system\r\n Root memory region: system\r\n\
                     \x20 0000000000000000-000000000000ffff (prio 0, ram): pc.ram\r\n";
const REGISTERS: &str = "CPU#0\r\nEAX=00000000\r\nEIP=0000fff0 EFL=00000002\r\nCR0=60000010\r\n";
const TARGET: &str = "<target><reg name=\"rip\" bitsize=\"64\"/><reg name=\"r15\" bitsize=\"64\"/></target>";
/// Longer than an answer is waited for.
const STALL: Duration = Duration::from_secs(11);
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest, what it was told, and how its QEMU misbehaves.
#[derive(Default)]
struct Machine {
    stands: bool,
    suspended: bool,
    told: Vec<String>,
    connections: u32,
    /// A command of the monitor that takes so long, once.
    slow: Option<&'static str>,
    /// A packet at which the first connection to the stub ends, from when this is set.
    fatal: Option<&'static str>,
    /// The stub says nothing at all.
    mute: bool,
    /// The stub is another guest's: the monitor knows of no client of its own.
    elsewhere: bool,
}

impl Machine {
    fn has(&self, one: &str) -> bool {
        self.told.iter().any(|told| told == one)
    }
}

struct Fake {
    directory: tempfile::TempDir,
    machine: Arc<Mutex<Machine>>,
}

impl Fake {
    fn start(machine: Machine) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let machine = Arc::new(Mutex::new(machine));
        let listen = |name: &str, serve: fn(UnixStream, &Mutex<Machine>) -> Option<()>| {
            let listener = UnixListener::bind(directory.path().join(name)).unwrap();
            let machine = Arc::clone(&machine);
            // One client at a time.
            std::thread::spawn(move || {
                listener.incoming().flatten().for_each(|one| serve(one, &machine).unwrap_or_default())
            });
        };
        listen("qmp", monitor);
        listen("gdb", stub);
        Self { directory, machine }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn guest(&self) -> Arc<Guest> {
        let address = |name| QmpAddress::parse(self.path(name).to_str().unwrap()).unwrap();
        Guest::with_stub(&address("qmp"), Some(address("gdb"))).unwrap()
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }
}

fn monitor(stream: UnixStream, machine: &Mutex<Machine>) -> Option<()> {
    let version = json!({ "qemu": { "micro": 2, "minor": 2, "major": 10 }, "package": "" });
    let mut to = stream.try_clone().ok()?;
    writeln!(to, "{}\r", json!({ "QMP": { "version": version, "capabilities": [] } })).ok()?;
    for line in BufReader::new(stream).lines() {
        let command: Value = serde_json::from_str(&line.ok()?).ok()?;
        let name = command["execute"].as_str()?.to_owned();
        let stalls = machine.lock().unwrap().slow.take_if(|slow| *slow == name).is_some();
        if stalls {
            std::thread::sleep(STALL);
        }
        let answer = answer(&mut machine.lock().unwrap(), &name, &command);
        writeln!(to, "{}\r", json!({ "return": answer, "id": command["id"] })).ok()?;
    }
    Some(())
}

fn answer(machine: &mut Machine, name: &str, command: &Value) -> Value {
    machine.told.push(name.to_owned());
    match name {
        "query-kvm" => json!({ "enabled": false, "present": false }),
        "query-status" => {
            let stopped = if machine.suspended { "suspended" } else { "paused" };
            json!({ "running": !machine.stands, "status": if machine.stands { stopped } else { "running" } })
        }
        "query-chardev" if machine.elsewhere => {
            json!([{ "label": "gdb", "filename": "disconnected:tcp:0.0.0.0:1234,server=on" }])
        }
        "query-memdev" | "query-chardev" => json!([]),
        "query-cpus-fast" => json!([{ "cpu-index": 0 }, { "cpu-index": 1 }]),
        "stop" | "cont" => {
            machine.stands = name == "stop";
            json!({})
        }
        "human-monitor-command" => match command["arguments"]["command-line"].as_str().unwrap() {
            "info mtree -f" => json!(MTREE),
            "info registers -a" => json!(REGISTERS),
            "xp /1gx 0x0" => json!("0000: 0x0000000000000000\r\n"),
            _ => json!(""),
        },
        _ => json!({}),
    }
}

fn stub(mut stream: UnixStream, machine: &Mutex<Machine>) -> Option<()> {
    let first = {
        let mut machine = machine.lock().unwrap();
        machine.connections += 1;
        // To connect stops the guest; one that sleeps stays as it is (before QEMU 9.0).
        machine.stands = true;
        machine.connections == 1
    };
    let (mut framer, mut byte, mut acked) = (Framer::new(1 << 16), [0], true);
    while let Ok(1) = stream.read(&mut byte) {
        // Before anything else the end of the last packet is awaited.
        if !std::mem::replace(&mut acked, true) && byte == *b"+" {
            continue;
        }
        if !machine.lock().unwrap().stands {
            machine.lock().unwrap().stands = true;
            if byte == [3] {
                stream.write_all(&rsp::frame(b"T02thread:p01.01;")).ok()?;
            }
            continue;
        }
        for event in framer.events(&byte) {
            let Event::Packet(packet) = event else { continue };
            let packet = String::from_utf8(packet).unwrap();
            let mut machine = machine.lock().unwrap();
            machine.told.push(packet.clone());
            if first && machine.fatal.is_some_and(|fatal| packet.starts_with(fatal)) {
                return None;
            }
            if !machine.mute {
                let reply = reply(&mut machine, &packet);
                drop(machine);
                stream.write_all(b"+").ok()?;
                acked = reply.is_none();
                reply.map_or(Ok(()), |reply| stream.write_all(&rsp::frame(reply.as_bytes()))).ok()?;
            }
        }
    }
    Some(())
}

fn reply(machine: &mut Machine, packet: &str) -> Option<String> {
    let reply = match packet {
        "?" => "T05thread:p01.01;",
        "qfThreadInfo" => "mp01.01,p01.02",
        "qsThreadInfo" => "l",
        "g" => "00000000000000000000000000000000",
        "qqemu.sstep" => "0x7",
        "D;1" => {
            machine.stands = false;
            "OK"
        }
        _ if packet.starts_with("qSupported") => "PacketSize=1000;multiprocess+",
        _ if packet.starts_with("qXfer:features:read") => return Some(format!("l{TARGET}")),
        _ if packet.starts_with("vCont") => {
            machine.stands = false;
            return None;
        }
        _ => "OK",
    };
    Some(reply.to_owned())
}

#[test]
fn a_guest_that_others_let_run_is_stopped_again_and_given_back() {
    let fake = Fake::start(Machine::default());
    let guest = fake.guest();
    guest.attach().unwrap();
    assert_eq!(guest.ran_before(), Some(true));
    let start = Instant::now();
    // Readers do not stop it, and who puts a breakpoint does.
    fake.machine().stands = false;
    guest.snapshot().unwrap();
    assert!(!fake.machine().stands);
    guest.insert(Point::Software, VirtAddr(0x1000), 1).unwrap();
    assert!(fake.machine().stands && fake.machine().has("Z0,1000,1"));
    fake.machine().stands = false;
    guest.detach(true).unwrap();
    assert_eq!(guest.run_state().unwrap(), RunState::Running);
    assert!(fake.machine().has("D;1"));
    // Once more, to be left standing.
    guest.attach().unwrap();
    fake.machine().stands = false;
    guest.detach(false).unwrap();
    assert!(fake.machine().stands);
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}

#[test]
fn a_connection_that_ends_while_the_guest_is_given_back_is_made_again() {
    let fake = Fake::start(Machine::default());
    let guest = fake.guest();
    guest.attach().unwrap();
    fake.machine().told.clear();
    fake.machine().fatal = Some("Hc");
    guest.detach(true).unwrap();
    let machine = fake.machine();
    assert_eq!((machine.connections, machine.stands), (2, false));
    // By the new one all vCPUs' breakpoints are removed.
    let (second, detached) = ("Hcp1.2", machine.told.iter().position(|one| one == "D;1"));
    assert!(machine.told.iter().position(|one| one == second) < detached, "{:?}", machine.told);
    drop(machine);
    assert_eq!(guest.ran_before(), None);
}

#[test]
fn a_stub_that_fails_for_good_leaves_a_guest_that_runs() {
    let fake = Fake::start(Machine::default());
    let guest = fake.guest();
    guest.attach().unwrap();
    std::fs::remove_file(fake.path("gdb")).unwrap();
    fake.machine().fatal = Some("Hc");
    assert!(guest.detach(true).is_err());
    assert!(!fake.machine().stands && fake.machine().has("cont"));
    assert!(matches!(guest.interrupt(), Err(LiveError::NotNow { .. })));
}

#[test]
fn a_monitor_that_is_busy_ends_no_session() {
    let fake = Fake::start(Machine::default());
    let guest = fake.guest();
    guest.attach().unwrap();
    guest.resume(&[(None, Go::Continue)]).unwrap();
    fake.machine().slow = Some("query-status");
    // Somebody saves a snapshot: the monitor is asked after a second of silence, and does not answer.
    let start = Instant::now();
    while start.elapsed() < STALL + Duration::from_secs(2) {
        assert_eq!(guest.wait_stop(Duration::from_millis(200)).unwrap(), None);
    }
    guest.interrupt().unwrap();
    let stop = guest.wait_stop(PATIENCE).unwrap().unwrap();
    assert_eq!(stop.reason, StopReason::Signal(2));
    guest.detach(true).unwrap();
    assert!(!fake.machine().stands);
}

#[test]
fn a_guest_that_stops_slowly_goes_on() {
    let fake = Fake::start(Machine { slow: Some("stop"), ..Machine::default() });
    let guest = fake.guest();
    let mut looked = 0;
    let glimpse = guest.glimpse(&mut |_| looked += 1).unwrap();
    assert!(glimpse.stood.is_some_and(|stood| stood > Duration::from_secs(10)) && looked == 1);
    assert!(!fake.machine().stands && fake.machine().has("cont"));
}

#[test]
fn an_attach_that_fails_leaves_a_guest_that_runs() {
    let fake = Fake::start(Machine { mute: true, ..Machine::default() });
    let guest = fake.guest();
    assert!(matches!(guest.attach(), Err(LiveError::Timeout { .. })));
    assert!(!fake.machine().stands && fake.machine().has("cont"));
}

#[test]
fn another_guests_stub_is_left() {
    let fake = Fake::start(Machine { elsewhere: true, ..Machine::default() });
    let refused = fake.guest().attach().unwrap_err().to_string();
    assert!(refused.contains("another guest answers") && refused.contains("gdbserver none"), "{refused}");
    assert!(!fake.machine().stands && fake.machine().has("D;1"));
}

/// Before QEMU 9.0 a guest that sleeps is not stopped, and must not be let run: it has to be woken.
#[test]
fn a_guest_that_sleeps_sleeps_on() {
    let fake = Fake::start(Machine { stands: true, suspended: true, ..Machine::default() });
    let guest = fake.guest();
    guest.attach().unwrap();
    assert_eq!(guest.ran_before(), Some(true));
    let refused = guest.resume(&[(None, Go::Continue)]).unwrap_err().to_string();
    assert!(refused.contains("system_wakeup"), "{refused}");
    guest.detach(true).unwrap();
    let machine = fake.machine();
    assert!(machine.stands && !machine.has("D;1") && !machine.has("cont"), "{:?}", machine.told);
}
