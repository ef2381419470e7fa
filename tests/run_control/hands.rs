//! Who controls a guest, what others may do, what is said of it, and how it is left.

use super::guest::{Client, FakeGuest, live, policy};
use kstub::addr::VirtAddr;
use kstub::backend::live::{Happening, LiveError, Point, Stop, StopReason};
use kstub::gdb::{OnDisconnect, Policy};

fn timeout() -> LiveError {
    LiveError::Timeout { what: "asking".into(), seconds: 10 }
}

/// A QEMU that does not answer is not gone: its stop is told once it is known.
#[test]
fn a_slow_qemu_is_asked_again() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let mut client = Client::new(&live);
    client.ask("?");
    for error in [
        timeout(),
        LiveError::NotNow { what: "asking".into(), why: "it is busy".into() },
        LiveError::Refused { what: "asking".into(), why: "it is busy".into() },
    ] {
        assert_eq!(client.ask("vCont;c"), "");
        // What is popped first is waited for first; and the guest that has stopped cannot be seen at once.
        guest.fails.lock().unwrap().extend([error.clone(), error.clone()]);
        let stop = Stop { cpu: 1, reason: StopReason::Signal(5) };
        guest.stops.lock().unwrap().extend([Ok(stop), Ok(stop), Ok(stop), Err(error)]);
        assert_eq!(client.wait(), "T05thread:p1.2;");
        guest.stops.lock().unwrap().clear();
    }
    assert_eq!(client.ask("vCont;c"), "");
    guest.stops.lock().unwrap().push(Err(LiveError::Gone("killed".into())));
    assert_eq!(client.wait(), "X09");
}

#[test]
fn a_guest_under_control_already_is_left_as_it_was_before_that() {
    for ran in [true, false] {
        let guest = FakeGuest::new(!ran);
        *guest.taken.lock().unwrap() = Some(ran);
        let live = live(&guest, policy());
        let mut client = Client::new(&live);
        client.ask("?");
        drop(client);
        assert_eq!(guest.told(), ["attach".to_owned(), format!("detach {ran}")]);
    }
}

#[test]
fn a_guest_that_cannot_be_seen_is_let_go() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let mut client = Client::new(&live);
    guest.fails.lock().unwrap().push(timeout());
    client.ask("?");
    assert_eq!(guest.told(), ["attach", "detach true"]);
    // The next time it can be.
    assert_eq!(client.ask("?"), "T05thread:p1.2;");
    drop(client);
    assert_eq!(guest.told(), ["attach", "detach true"]);
}

#[test]
fn what_becomes_of_it_if_kstub_is_killed_is_said_in_time() {
    for (on_disconnect, said) in [
        (OnDisconnect::Restore, vec![None]),
        (OnDisconnect::Resume, vec![Some(true)]),
        (OnDisconnect::Leave, vec![Some(false), Some(true), Some(false)]),
    ] {
        let guest = FakeGuest::new(true);
        let live = live(&guest, Policy { on_disconnect, ..policy() });
        let mut client = Client::new(&live);
        assert_eq!(*guest.death.lock().unwrap(), []);
        client.ask("?");
        client.ask("vCont;c");
        guest.stops(0, StopReason::Signal(5));
        client.wait();
        assert_eq!(*guest.death.lock().unwrap(), said);
    }
}

#[test]
fn who_takes_control_does_not_inherit_breakpoints() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let (mut first, mut second) = (Client::new(&live), Client::new(&live));
    first.ask("?");
    second.ask("?");
    assert_eq!(first.ask("Z0,ffffffff81000010,1"), "OK");
    assert_eq!(first.ask("Qqemu.sstep=1"), "0x7");
    guest.told();
    assert!(second.command("control take").starts_with("This client"));
    assert_eq!(guest.told(), ["remove Software 0xffffffff81000010 1", "packet Qqemu.sstep=7"]);
    // While it runs nobody takes it.
    second.ask("vCont;c");
    assert!(first.command("control take").starts_with("The guest runs"));
}

#[test]
fn nobody_who_only_looks_writes() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, Policy { allow_write: true, ..policy() });
    let (mut owner, mut reader) = (Client::new(&live), Client::new(&live));
    owner.ask("?");
    reader.ask("?");
    reader.ask("Qqemu.PhyMemMode:1");
    guest.told();
    for write in ["M1000,2:9090", "X1000,2:ab", "P0=0000000000000000"] {
        assert!(reader.ask(write).starts_with("E.another client"), "{write}");
    }
    // What asks whether X is known.
    assert_eq!(reader.ask("X0,0:"), "OK");
    assert_eq!(guest.told(), [""; 0]);
    drop(owner);
    assert!(reader.ask("M1000,2:9090").starts_with("E.nobody controls"));
}

#[test]
fn with_no_stop_the_reason_is_said() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, Policy { allow_write: true, control: false, ..policy() });
    let mut client = Client::new(&live);
    client.ask("?");
    for packet in ["M1000,2:9090", "P0=0000000000000000", "Z0,ffffffff81000000,1"] {
        let answer = client.ask(packet);
        assert!(answer.contains("--no-stop"), "{packet}: {answer}");
    }
}

#[test]
fn qemus_flags_for_steps_are_put_back() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let (mut owner, mut reader) = (Client::new(&live), Client::new(&live));
    owner.ask("?");
    reader.ask("?");
    guest.told();
    assert_eq!(owner.ask("qqemu.Supported"), "sstepbits;sstep;PhyMemMode");
    assert_eq!(owner.ask("qqemu.sstep"), "0x7");
    assert_eq!(owner.ask("Qqemu.sstep=1"), "0x7");
    assert_eq!(owner.ask("Qqemu.sstep=3"), "0x7");
    assert_eq!(reader.ask("Qqemu.sstep=0"), "");
    assert_eq!(reader.ask("qqemu.sstepbits"), "ENABLE=1,NOIRQ=2,NOTIMER=4");
    owner.ask("vCont;c");
    assert_eq!(owner.ask("Qqemu.sstep=0"), "", "a guest that runs is not asked");
    drop(owner);
    assert_eq!(
        guest.told(),
        [
            "packet qqemu.sstep",
            "packet qqemu.sstep",
            "packet Qqemu.sstep=1",
            "packet Qqemu.sstep=3",
            "resume [(None, Continue)]",
            "interrupt",
            "packet Qqemu.sstep=7",
            "detach true"
        ]
    );
}

#[test]
fn somebody_else_lets_it_run() {
    let guest = FakeGuest::new(false);
    let control = live(&guest, policy());
    let mut client = Client::new(&control);
    client.ask("?");
    let resumed = || {
        *guest.is_running.lock().unwrap() = true;
        guest.happens(Happening::Resumed);
    };
    resumed();
    client.ask("vCont;c");
    guest.stops(0, StopReason::Signal(5));
    let (news, stop) = client.wait_with_news();
    assert!(news.contains("Somebody else has let the guest run"), "{news}");
    assert_eq!(stop, "T05thread:p1.1;");
    drop((client, control));
    assert_eq!(guest.told().last().unwrap(), "detach true", "it is to run");
    // Left as it is then, whoever let it run.
    for runs in [true, false] {
        let live = live(&guest, Policy { on_disconnect: OnDisconnect::Leave, ..policy() });
        let mut client = Client::new(&live);
        client.ask("?");
        if runs {
            resumed();
        }
        drop(client);
        assert_eq!(guest.told().last().unwrap(), &format!("detach {runs}"));
    }
}

/// Whoever takes control between a stop and the end of what it causes waits for the next.
#[test]
fn a_waiter_is_not_woken_by_the_stop_before() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let (mut owner, mut reader) = (Client::new(&live), Client::new(&live));
    owner.ask("?");
    reader.ask("?");
    // It was woken, and ended its waiting before it looked.
    reader.ask("vCont;c");
    owner.ask("vCont;c");
    guest.stops(1, StopReason::Signal(5));
    assert_eq!(owner.wait(), "T05thread:p1.2;");
    assert!(reader.is_woken());
    reader.raw(b"\x03");
    reader.ask("vCont;c");
    assert!(!reader.is_woken(), "it hears of a stop that it has seen");
    owner.ask("vCont;c");
    guest.stops(2, StopReason::Signal(5));
    assert_eq!(owner.wait(), "T05thread:p1.3;");
    assert_eq!(reader.wait(), "T05thread:p1.3;");
}

#[test]
fn a_breakpoint_of_the_clients_own_is_said_to_be_one() {
    let guest = FakeGuest::new(true);
    let live = live(&guest, policy());
    let mut client = Client::new(&live);
    let asks = "qSupported:multiprocess+;QThreadEvents+;swbreak+;hwbreak+";
    // A client's first words count.
    let mut newer = Client::with(&live, asks);
    assert!(newer.ask("qSupported").contains(";swbreak+;hwbreak+"));
    assert!(!client.ask("qSupported").contains("swbreak"));
    newer.ask("?");
    client.ask("?");
    // Each moment has another pc: vCPU 0's at the next stop.
    let now = crate::rsp_client::from_hex(&newer.ask("p10"));
    let now = u64::from_le_bytes(now.try_into().unwrap());
    let here = now - now % 0x1000 + 0x1000;
    assert_eq!(newer.ask(&format!("Z0,{here:x},1")), "OK");
    client.ask("vCont;c");
    newer.ask("vCont;c");
    guest.stops(0, StopReason::Signal(5));
    assert_eq!(newer.wait(), "T05swbreak:;thread:p1.1;");
    // It is none of this client's, whose gdb would go on by itself.
    assert_eq!(client.wait(), "T05thread:p1.1;");
    assert_eq!(newer.ask(&format!("Z1,{:x},1", here + 0x1000)), "OK");
    newer.ask("vCont;c");
    guest.stops(0, StopReason::Signal(5));
    assert_eq!(newer.wait(), "T05hwbreak:;thread:p1.1;");
    // Elsewhere, and for another reason.
    newer.ask("vCont;c");
    guest.stops(0, StopReason::Signal(5));
    assert_eq!(newer.wait(), "T05thread:p1.1;");
    assert_eq!(newer.ask(&format!("Z0,{:x},1", here + 0x3000)), "OK");
    newer.ask("vCont;c");
    guest.stops(0, StopReason::Watch(Point::Write, VirtAddr(0x10)));
    assert_eq!(newer.wait(), "T05watch:10;thread:p1.1;");
}
