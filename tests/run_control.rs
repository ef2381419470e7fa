//! Clients of a guest that lives, byte by byte, on a guest that is none: what it is told to do is written down.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "run_control/guest.rs"]
mod guest;
#[path = "run_control/hands.rs"]
mod hands;
#[path = "run_control/known.rs"]
mod known;
#[path = "support/rsp_client.rs"]
mod rsp_client;

use guest::{Client, FakeGuest, body_of, live, policy};
use kstub::addr::VirtAddr;
use kstub::backend::live::{Happening, LiveError, Point, StopReason};
use kstub::gdb::{Flow, OnDisconnect, Policy};
use rsp_client::packet;
use rustix::event::{PollFd, PollFlags, Timespec};

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
    let command = Client::command;
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
    // The thread that is told to stand is selected from then on: gdb asks for its registers without `Hg`.
    let mut of_thread = |select: &str| (client.ask(select), client.ask("p10"));
    let [(_, third), (_, first)] = ["Hgp1.3", "Hgp1.1"].map(&mut of_thread);
    assert_ne!(first, third);
    assert_eq!(of_thread("vCont;s:p1.3"), ("T00thread:p1.3;".to_owned(), third));
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
    guest.happens(Happening::Reset);
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
    guest.happens(Happening::Reset);
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
