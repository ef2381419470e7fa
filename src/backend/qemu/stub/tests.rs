//! The client against a stub that is not QEMU's: what it asks, and what it survives.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use crate::arch::x86_64::{Reg, Saved};
use crate::backend::live::StopReason;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

/// Three registers in an order that is not QEMU's.
const TARGET: &str = "<target><xi:include href=\"x.xml\"/></target>";
const REGISTERS: &str = "<reg name=\"rip\" bitsize=\"64\"/><reg name=\"new\" bitsize=\"16\"/>\
    <reg name=\"r15\" bitsize=\"64\"/><reg name=\"eflags\" bitsize=\"32\"/>}#";

/// All that was sent to the fake.
type Packets = Arc<Mutex<Vec<String>>>;

/// What the fake answers to a packet; `None`: as a stub of two CPUs would.
type Script = dyn FnMut(&str) -> Option<Vec<u8>> + Send;

fn usual(packet: &str) -> Vec<u8> {
    let part = |text: &str| {
        // In pieces of ten bytes, escaped.
        let range = packet.rsplit(':').next().unwrap();
        let from = usize::from_str_radix(range.split(',').next().unwrap(), 16).unwrap();
        let rest = &text.as_bytes()[from.min(text.len())..];
        let (kind, piece) = if rest.len() > 10 { (b'm', &rest[..10]) } else { (b'l', rest) };
        let mut reply = vec![kind];
        rsp::escape(piece, &mut reply);
        reply
    };
    match packet {
        "?" => b"T05thread:p01.01;".to_vec(),
        "qfThreadInfo" => b"mp01.01".to_vec(),
        "qsThreadInfo" => b"l".to_vec(),
        "g" => b"08070605040302010a0b88776655443322xx46020000".to_vec(),
        _ if packet.starts_with("qSupported") => b"PacketSize=1000;multiprocess+".to_vec(),
        _ if packet.starts_with("qXfer:features:read:target.xml") => part(TARGET),
        _ if packet.starts_with("qXfer:features:read:x.xml") => part(REGISTERS),
        _ if packet.starts_with("vCont") => Vec::new(),
        _ => b"OK".to_vec(),
    }
}

/// A stub that does as `script` says; the second value is all the packets that it got.
fn fake(mut script: Box<Script>) -> (Result<(Stub, StopReply), LiveError>, Packets) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    std::thread::spawn(move || {
        let mut framer = Framer::new(1 << 16);
        let mut bytes = [0; 4096];
        while let Ok(read @ 1..) = theirs.read(&mut bytes) {
            for event in framer.events(&bytes[..read]) {
                let (name, reply) = match event {
                    Event::Packet(packet) => {
                        let packet = String::from_utf8(packet).unwrap();
                        let scripted = script(&packet);
                        let go = packet.starts_with("vCont") || packet == "bc" || packet == "bs";
                        let reply = scripted.unwrap_or_else(|| rsp::frame(&usual(&packet)));
                        let ack = b"+".to_vec();
                        (packet, if go && reply == rsp::frame(b"") { ack } else { [ack, reply].concat() })
                    }
                    Event::Interrupt => ("^C".to_owned(), rsp::frame(b"T02thread:p01.02;")),
                    _ => continue,
                };
                log.lock().unwrap().push(name);
                let _ = theirs.write_all(&reply);
            }
        }
    });
    (Stub::over(Socket::Unix(ours)), seen)
}

fn connected(script: Box<Script>) -> (Stub, Packets) {
    let (stub, seen) = fake(script);
    let (mut stub, _) = stub.unwrap();
    stub.threads = vec![ThreadId::parse("p1.1").unwrap(), ThreadId::parse("p1.2").unwrap()];
    seen.lock().unwrap().clear();
    (stub, seen)
}

fn framed(packet: &str) -> Option<Vec<u8>> {
    Some(rsp::frame(packet.as_bytes()))
}

#[test]
fn registers_go_by_the_description() {
    let (mut stub, seen) = connected(Box::new(|_| None));
    let regs = stub.registers(ThreadId::parse("p1.2").unwrap()).unwrap();
    assert_eq!(regs.u64(Reg::Rip), Some(0x0102_0304_0506_0708));
    assert_eq!((regs.get(Reg::R15), regs.u64(Reg::Eflags)), (Saved::NotSaved, Some(0x246)));
    assert_eq!(regs.get(Reg::Rax), Saved::NotSaved);
    assert_eq!(*seen.lock().unwrap(), ["Hgp1.2", "g"]);
    stub.write_register(1, "rip", &[8, 7, 6, 5, 4, 3, 2, 1]).unwrap();
    assert_eq!(seen.lock().unwrap()[2], "P0=0807060504030201");
    // The fake's register keeps its value.
    let error = stub.write_register(1, "rip", &[1]).unwrap_err().to_string();
    assert!(error.ends_with("it now holds 0x0102030405060708"), "{error}");
    assert!(matches!(stub.write_register(7, "rip", &[1]), Err(LiveError::Refused { .. })));
}

#[test]
fn what_is_sent_is_the_protocols() {
    let (mut stub, seen) = connected(Box::new(|_| None));
    let at = VirtAddr(0xffff_ffff_8100_0000);
    stub.point(true, Point::Software, at, 0).unwrap();
    stub.point(false, Point::Access, at, 8).unwrap();
    stub.write_phys(PhysAddr(0x1000), &[0xab; 1500]).unwrap();
    stub.resume(&[(Some(1), Go::Step), (None, Go::Continue)]).unwrap();
    assert!(matches!(stub.registers(stub.threads[0]), Err(LiveError::NotNow { .. })));
    assert_eq!(stub.wait(Duration::from_millis(30)).unwrap(), None);
    stub.interrupter().unwrap().interrupt().unwrap();
    let stop = stub.wait(SOON).unwrap().unwrap();
    assert_eq!((stop.reason, stop.thread.unwrap().cpu()), (StopReason::Signal(2), Some(1)));
    stub.detach().unwrap();
    let seen = seen.lock().unwrap();
    let long = format!("M1000,400:{}", "ab".repeat(1024));
    let rest = format!("M1400,1dc:{}", "ab".repeat(476));
    let expected = ["Z0,ffffffff81000000,1", "z4,ffffffff81000000,8", "Qqemu.PhyMemMode:1", &long, &rest];
    assert_eq!(seen[..5], expected);
    assert_eq!(seen[5..], ["Qqemu.PhyMemMode:0", "vCont;s:p1.2;c", "^C", "D;1"]);
}

/// QEMU stops the guest when a client connects, and versions before 8.1 say so before they answer.
#[test]
fn stops_that_nobody_asked_about() {
    let (stub, _) = fake(Box::new(|packet| {
        let answer = rsp::frame(&usual(packet));
        packet.starts_with("qSupported").then(|| [rsp::frame(b"T02thread:01;"), answer].concat())
    }));
    assert_eq!(stub.unwrap().1.reason, StopReason::Signal(5));
    // Another monitor let the guest run: the packet is lost.
    let mut lost = false;
    let (mut stub, seen) = connected(Box::new(move |packet| {
        (packet == "g" && !std::mem::replace(&mut lost, true)).then(|| rsp::frame(b"T02thread:p01.01;"))
    }));
    assert!(stub.registers(stub.threads[0]).is_ok());
    assert_eq!(*seen.lock().unwrap(), ["Hgp1.1", "g", "g"]);
}

/// A vCPU that has the registers of before after its step took none; one that never has others jumps to itself.
#[test]
fn a_step_that_was_none_is_taken_again() {
    let registers = |at: u8| format!("{at:02x}070605040302010a0b88776655443322xx46020000");
    for (moves_at, sent) in [(1, 1), (2, 2), (9, 1 + STEP_TRIES)] {
        let mut steps = 0;
        let (mut stub, seen) = connected(Box::new(move |packet| {
            steps += u8::from(packet.starts_with("vCont;s"));
            match packet {
                "g" => framed(&registers(if steps < moves_at { 8 } else { 9 })),
                _ if packet.starts_with("vCont") => framed("T05thread:p01.02;"),
                _ => None,
            }
        }));
        let thread = stub.threads[1];
        let before = stub.registers(thread).unwrap();
        stub.resume(&[(Some(1), Go::Step)]).unwrap();
        assert_eq!(stub.wait(SOON).unwrap().unwrap().thread, Some(thread));
        assert_eq!(stub.registers(thread).unwrap() == before, moves_at > 4);
        let steps = || seen.lock().unwrap().iter().filter(|one| *one == "vCont;s:p1.2").count();
        assert_eq!(steps(), sent, "{moves_at}");
        // A breakpoint where it stands is no step.
        stub.resume(&[(None, Go::Continue)]).unwrap();
        assert!(stub.wait(SOON).unwrap().is_some());
        assert_eq!(seen.lock().unwrap().iter().filter(|one| *one == "vCont;c").count(), 1);
    }
}

#[test]
fn the_begin_of_a_recording_and_refusals() {
    let (mut stub, _) = connected(Box::new(|packet| match packet {
        "bs" => framed("E14"),
        "bc" => framed(""),
        _ if packet.starts_with('Z') => framed("E22"),
        _ if packet.starts_with('M') => framed("E01"),
        _ => None,
    }));
    stub.reverse(Go::Step).unwrap();
    assert_eq!(stub.wait(SOON).unwrap().unwrap().reason, StopReason::ReplayEnd);
    assert!(matches!(stub.point(true, Point::Hardware, VirtAddr(0), 1), Err(LiveError::Refused { .. })));
    assert!(matches!(stub.write_phys(PhysAddr(0), &[1]), Err(LiveError::Refused { .. })));
}

#[test]
fn hostile_stubs_are_errors() {
    for (to, reply) in [
        ("?", &b"$OK#9a"[..]),
        ("?", b"$T05#00"),
        ("?", b""),
        ("g", b"$zz#f4"),
        ("g", b"$E01#a6"),
        ("g", b"$123#96"),
        ("qfThreadInfo", b"$l#6c"),
        ("qfThreadInfo", b"$mp1.x#00"),
        ("qfThreadInfo", b"$m#6d"),
        ("qXfer:features:read:target.xml:0,800", b"$m#6d"),
        ("qXfer:features:read:target.xml:0,800", b"$l<reg name=\"x\" bitsize=\"8\"/>#00"),
        ("qXfer:features:read:x.xml:0,800", b"$E00#a5"),
    ] {
        let reply = reply.to_vec();
        let (stub, _) = fake(Box::new(move |packet| {
            // An empty reply stands for the end of the connection.
            match (packet == to, reply.is_empty()) {
                (true, true) => panic!("the fake ends here"),
                (true, false) => Some(reply.clone()),
                (false, _) => None,
            }
        }));
        let outcome = stub.and_then(|(mut stub, _)| {
            let thread = stub.threads[0];
            stub.registers(thread)
        });
        assert!(outcome.is_err(), "{to}: {outcome:?}");
    }
    // Threads, and talk, without end.
    let (stub, _) = fake(Box::new(|packet| packet.ends_with("ThreadInfo").then(|| rsp::frame(b"m1,2,3"))));
    assert!(stub.is_err());
    let talk = rsp::frame(b"O4141").repeat(100);
    let (mut stub, _) = connected(Box::new(move |packet| packet.starts_with("vCont").then(|| talk.clone())));
    stub.resume(&[(None, Go::Continue)]).unwrap();
    assert_eq!(stub.wait(Duration::from_millis(50)).unwrap(), None);
}

/// Under TCG QEMU forgets the breakpoints of the vCPU that `?` is about; and it keeps the flags of steps.
#[test]
fn what_a_killed_session_left_goes_when_the_next_connects() {
    let (stub, seen) = fake(Box::new(|packet| match packet {
        "qfThreadInfo" => framed("mp01.01,p01.02"),
        "Hcp1.3" => framed("E22"),
        "qqemu.sstep" => framed("0x0"),
        "qqemu.sstepbits" => framed("ENABLE=1,NOIRQ=2,NOTIMER=4"),
        _ => None,
    }));
    stub.unwrap();
    let seen = seen.lock().unwrap();
    let after: Vec<&str> = seen.iter().map(String::as_str).skip_while(|one| *one != "qsThreadInfo").collect();
    assert_eq!(after[1..6], ["Hcp1.1", "?", "Hcp1.2", "?", "Hcp1.1"]);
    assert_eq!(after[6..], ["qqemu.sstep", "qqemu.sstepbits", "Qqemu.sstep=0x7"]);
}

/// A stub whose vCPU 2 stops the guest while vCPU 1 is to step; `moment` is its answer when that step is ended.
fn interrupted_step(moment: &'static str) -> (Stub, Packets) {
    let (mut stub, seen) = connected(Box::new(move |packet| match packet {
        "qqemu.sstep" => framed("0x7"),
        "vCont;s:p1.1;c" => framed("T05thread:p01.02;"),
        "vCont;s:p1.1" if !moment.is_empty() => framed(moment),
        _ => None,
    }));
    stub.resume(&[(Some(0), Go::Step), (None, Go::Continue)]).unwrap();
    assert_eq!(stub.wait(SOON).unwrap().unwrap().thread.unwrap().cpu(), Some(1));
    seen.lock().unwrap().clear();
    (stub, seen)
}

#[test]
fn a_step_that_another_stop_came_in_front_of_stops_nobody_later() {
    let ended = ["qqemu.sstep", "Qqemu.sstep=0x0", "vCont;s:p1.1", "^C", "Qqemu.sstep=0x7"];
    let (mut stub, seen) = interrupted_step("");
    stub.resume(&[(None, Go::Continue)]).unwrap();
    let expected = [&ended[..], &["vCont;c"]].concat();
    // The fake takes note of what it gets a moment later.
    let deadline = Instant::now() + SOON;
    while seen.lock().unwrap().last().is_none_or(|last| last != "vCont;c") && Instant::now() < deadline {
        assert_eq!(stub.wait(Duration::from_millis(10)).unwrap(), None);
    }
    assert_eq!(*seen.lock().unwrap(), expected);

    // The same step again, or another vCPU's alone: the first may keep its own.
    for actions in [&[(Some(0), Go::Step), (None, Go::Continue)][..], &[(Some(1), Go::Step)]] {
        let (mut stub, seen) = interrupted_step("");
        stub.resume(actions).unwrap();
        stub.wait(Duration::from_millis(50)).unwrap();
        assert!(!seen.lock().unwrap().iter().any(|one| one == "qqemu.sstep"));
    }

    // A breakpoint in that moment is the stop.
    let (mut stub, seen) = interrupted_step("T05thread:p01.01;");
    stub.resume(&[(None, Go::Continue)]).unwrap();
    assert!(stub.is_running());
    let stop = stub.wait(SOON).unwrap().unwrap();
    assert_eq!((stop.reason, stop.thread.unwrap().cpu()), (StopReason::Signal(5), Some(0)));
    assert!(!stub.is_running() && !seen.lock().unwrap().iter().any(|one| one == "vCont;c"));
}

/// Steps of an earlier client are nobody's; those of vCPUs that stand stay as they are.
#[test]
fn steps_that_are_suspected_are_ended() {
    let (mut stub, seen) =
        connected(Box::new(|packet| (packet == "qqemu.sstep").then(|| rsp::frame(b"0x7"))));
    stub.end_steps().unwrap();
    assert!(seen.lock().unwrap().is_empty());
    stub.suspect_steps();
    stub.end_steps().unwrap();
    assert_eq!(seen.lock().unwrap()[2], "vCont;s:p1.1;s:p1.2");
}

/// KVM writes breakpoints by page tables, and those of user mode may not have the kernel.
#[test]
fn another_cpu_may_have_the_page_tables() {
    let script = || -> Box<Script> {
        let mut about = String::new();
        Box::new(move |packet| {
            if packet.starts_with("Hc") {
                about = packet.to_owned();
            }
            let put = packet.starts_with("Z0") || packet.starts_with("z0");
            (put && about != "Hcp1.2").then(|| rsp::frame(b"E22"))
        })
    };
    let at = VirtAddr(0xffff_ffff_8100_0000);
    for put in [true, false] {
        let (mut stub, seen) = connected(script());
        stub.stopped_on = ThreadId::parse("p1.1");
        stub.point(put, Point::Software, at, 1).unwrap();
        assert_eq!(seen.lock().unwrap().last().unwrap(), "Hcp1.1");
    }
    // A process's address is another's in another process.
    let (mut stub, seen) = connected(script());
    assert!(matches!(
        stub.point(true, Point::Software, VirtAddr(0x40_1000), 1),
        Err(LiveError::Refused { .. })
    ));
    assert_eq!(seen.lock().unwrap().len(), 1);
}
