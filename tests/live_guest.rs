//! The live guests themselves: what tests believe of them must be so before kstub is asked.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use support::live::{self, Plan};

/// A guest that is stopped is seen to be stopped, and one that runs to run; its facts are its own.
#[test]
fn guests_tell_the_truth() {
    live::again(|| {
        for (series, cpus, pti) in [("6.1", 4, true), ("6.12", 1, false)] {
            let Some(guest) = Plan::new(series).cpus(cpus).pti(pti).shared_ram().boot() else { return };
            assert_eq!(guest.number("cpus"), u64::from(cpus));
            assert_eq!(guest.fact("release"), guest.release());
            assert_eq!(guest.number("symbol._text") % (2 << 20), 0);
            guest.assert_alive("after the boot");
            guest.events();
            guest.stop();
            guest.assert_stands("after stop");
            assert_eq!(guest.events(), ["STOP"]);

            // The shared file is the guest's RAM, and a module's counter is in it.
            let file = std::fs::read(guest.path("ram")).unwrap();
            assert!(file == guest.ram(), "the RAM file is not what QEMU saves");
            guest.cont();
            guest.assert_alive("after cont");
            assert_eq!(guest.registers().len(), cpus as usize);

            let cpu = cpus - 1;
            let spinner = guest.ask_facts(&format!("plant spin-user {cpu}"));
            let rip = live::number(&spinner["rip"]);
            let spins = || guest.registers().iter().position(|cpu| cpu["cpl"] == 3 && cpu["rip"] == rip);
            assert!(live::wait_until(live::PATIENCE, || spins() == Some(cpu as usize)), "nobody spins");
            let tasks = guest.ask("tasks");
            assert!(
                tasks.iter().any(|line| *line == format!("{} 1 R kstub-spin", spinner["pid"])),
                "{tasks:?}"
            );
            guest.ask("quiet");
            assert!(!guest.ask("tasks").iter().any(|line| line.ends_with("kstub-spin")));

            let counter = |guest: &live::Guest| {
                let facts = guest.ask_facts("cat /proc/kstub_live");
                assert_eq!(live::number(&facts["count"]) % 3, 0);
                live::number(&facts["count"])
            };
            let before = counter(&guest);
            guest.assert_alive("while the counter counts");
            assert!(counter(&guest) > before);

            assert_eq!(guest.ask_facts("plant syscalls 0")["buffer"], "0x5a5a5000");
            guest.ask("plant load 2");
            guest.assert_alive("under load");
            guest.ask("insmod kstub_late factor=3");
            assert_eq!(guest.ask("cat /sys/module/kstub_late/parameters/factor"), ["3"]);
            guest.ask("rmmod kstub_late");
            guest.send("insmod kstub_missing");
            assert!(guest.answer().unwrap_err().starts_with("error 2 "), "no such module");
            guest.send("reboot");
            assert!(live::wait_until(live::PATIENCE * 2, || guest.boots() == 2), "{}", guest.console());
            guest.assert_alive("after the reboot");
        }
    });
}

#[test]
fn a_guest_waits_under_s() {
    live::again(|| {
        let Some(guest) = Plan::new("6.1").argument("-S").boot() else { return };
        assert_eq!(guest.run_state(), "prelaunch");
        assert_eq!(guest.boots(), 0);
        guest.cont();
        guest.wait_ready();
    });
}

/// Only a guest of whose boot nothing comes is mute.
#[test]
fn who_is_mute() {
    assert!(!live::says_of_its_boot("", ""));
    assert!(!live::says_of_its_boot(
        "beat 7 100\nbeat 8 200\n",
        "\r\n[    9.1] reboot: Restarting system\r\n"
    ));
    assert!(live::says_of_its_boot("beat 7 100\nKSTUB-FACTS\n", ""));
    assert!(live::says_of_its_boot("", "[    0.1] Kernel panic - not syncing\n"));
    live::again(|| {
        let Some(guest) = Plan::new("6.1").argument("-S").boot() else { return };
        assert!(!guest.is_mute(), "it was only not let run");
        guest.wait_ready();
        guest.send("reboot");
        assert!(!guest.is_mute(), "it has started again");
        assert!(live::wait_until(live::PATIENCE * 2, || guest.boots() == 2), "{}", guest.console());
    });
}

/// What is recorded can be replayed to the same heartbeat.
#[test]
fn a_recording_replays() {
    let log = tempfile::tempdir().unwrap();
    let icount = |mode: &str| format!("shift=auto,rr={mode},rrfile={}", log.path().join("rr").display());
    let plan = |mode: &str| Plan::new("6.1").counting_instructions(&icount(mode));
    let Some(guest) = plan("record").boot() else { return };
    guest.assert_alive("while recorded");
    // The end of QEMU is recorded, too, and a replay comes to it sooner than the recording did.
    std::thread::sleep(Duration::from_secs(5));
    let facts = guest.facts();
    guest.qmp("quit", serde_json::json!({}));
    assert!(live::wait_until(live::PATIENCE, || !guest.qemu_runs()));
    drop(guest);
    // It may be over before it is looked at: it stands until somebody does.
    let guest = plan("replay").argument("-S").boot().unwrap();
    guest.cont();
    let replayed = || guest.boots() == 1;
    assert!(live::wait_until(live::PATIENCE * 2, replayed), "{}", guest.console());
    assert_eq!(guest.facts(), facts);
}

#[test]
fn the_variable_has_three_states() {
    assert_eq!(live::wanted(Some("1"), None), Some(true));
    assert_eq!(live::wanted(Some("0"), Some("true")), Some(false));
    assert_eq!(live::wanted(None, None), None);
    assert_eq!(live::wanted(None, Some("true")), Some(true));
}

/// Only a test whose guest died of its QEMU begins again.
#[test]
fn tests_begin_again() {
    static BEGUN: AtomicU32 = AtomicU32::new(0);
    struct Dies(&'static str);
    impl Drop for Dies {
        fn drop(&mut self) {
            live::note_end(|| live::died_of_qemu(self.0));
        }
    }
    fn fails_once(console: &'static str) {
        let _guest = Dies(console);
        assert!(BEGUN.fetch_add(1, Ordering::Relaxed) != 0, "fails once, on purpose");
    }
    live::again(|| fails_once("int3: 0000 [#1] SMP\nCode: 66 <90>\n"));
    assert_eq!(BEGUN.swap(0, Ordering::Relaxed), 2);
    assert!(
        std::panic::catch_unwind(|| live::again(|| fails_once("int3: 0000 [#1] SMP\nCode: cc <90>\n")))
            .is_err()
    );
    assert_eq!(BEGUN.swap(0, Ordering::Relaxed), 1);
}

#[test]
fn deaths_by_qemu_are_told_from_breakpoints_that_were_left() {
    let rest = |code: &str| format!("int3: 0000 [#1] SMP\n[ 1.7] RIP: 0010:f+0x9\n[ 1.7] Code: {code}\n");
    let console = |code: &str| format!("up\n[ 1.7] Oops: {}", rest(code));
    // As 6.1 has it.
    assert!(live::died_of_qemu(&format!("up\n[ 1.7] {}", rest("66 <90>"))));
    assert!(live::died_of_qemu(&console("41 54 55 53 66 <90> e8 31")));
    assert!(!live::died_of_qemu(&console("41 54 55 53 cc <90> e8 31")));
    assert!(!live::died_of_qemu(&(console("66 <90>") + &console("cc <90>"))));
    assert!(!live::died_of_qemu("[ 1.7] Oops: int3: 0000 [#1] SMP\n"));
    assert!(!live::died_of_qemu("up\n"));
}
