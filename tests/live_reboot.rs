//! Stock gdb on a guest that becomes another below it: it is started again, with its kernel elsewhere, or a snapshot is
//! loaded; and on one that replays a recording, which can be run backwards.
//!
//! Truth is what the guest says of each boot of its own, QEMU's registers at each stop, its run state and heartbeat.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::time::Duration;
use support::gdb_session::functions;
use support::live::{self, Gdb, Guest, PATIENCE, Plan, SERIES, number, wait_until};

/// `p`'s answer without `$1 = `, as a number.
fn address(gdb: &mut Gdb, expression: &str) -> u64 {
    let answer = gdb.ask(&format!("p/x (unsigned long)({expression})"));
    let (_, value) = answer.rsplit_once(" = ").unwrap_or_else(|| panic!("{expression}: {answer}"));
    number(value.trim())
}

/// The guest stands at the first instruction of a function, where gdb's pc is.
fn assert_at(guest: &Guest, gdb: &mut Gdb, function: &str) {
    let at = address(gdb, &format!("&{function}"));
    assert_eq!(address(gdb, "$pc"), at, "{function}: {}", gdb.everything());
    assert_ne!(guest.run_state(), "running", "{function}");
    assert!(guest.registers().iter().any(|cpu| cpu["rip"] == at), "{function}");
}

/// Nobody is left who could stop the guest.
fn assert_free(guest: &Guest, why: &str) {
    assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{why}: {}", guest.run_state());
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(guest.run_state(), "running", "{why}: it stops by itself");
    }
    guest.assert_alive(why);
}

/// How a guest is started again.
#[derive(Clone, Copy)]
enum Again {
    /// By its own `reboot(2)`.
    Reboot,
    /// By QEMU's `system_reset`, twice in a row: kernels that reboot are often reset twice.
    Reset,
}

/// The guest is started again below gdb, once in each way: breakpoints that were set before are hit after it, in the kernel
/// and in a module, wherever those are now. Where the kernel's text was, without repetitions.
fn starts_again(guest: &Guest, ways: &[Again]) -> Vec<u64> {
    let mut texts = vec![guest.number("symbol._text")];
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("set breakpoint pending on");
    gdb.ask("break __x64_sys_mount");
    gdb.ask("break kstub_live_init");
    gdb.ask("watch kstub_live_constant");
    for (boot, way) in (2..).zip(ways) {
        gdb.send("continue");
        guest.assert_alive("before its reboot");
        match way {
            Again::Reboot => guest.send("reboot"),
            Again::Reset => {
                guest.qmp("system_reset", serde_json::json!({}));
                std::thread::sleep(Duration::from_millis(50));
                guest.qmp("system_reset", serde_json::json!({}));
            }
        }
        let stop = gdb.wait().unwrap();
        assert!(stop.contains("The guest was started again"), "{stop}");
        assert_at(guest, &mut gdb, "start_kernel");
        texts.push(address(&mut gdb, "&_text"));
        // Once in some hundred boots KASLR chooses the same place again.
        let (said, moved) = match texts[boot - 1] == texts[boot - 2] {
            true => ("It is where it was", "symbols of modules are those of the modules that are there now"),
            false => ("gdb's symbols are not there", "symbols and breakpoints were moved"),
        };
        assert!(stop.contains(said) && stop.contains(moved), "{stop}");
        assert!(!gdb.ask("info sharedlibrary").contains("kstub_live"), "{}", gdb.everything());
        let bt = gdb.ask("bt");
        assert!(functions(&bt)[0] == "start_kernel" && bt.contains("_startup_64"), "{bt}");
        gdb.ask("delete 3");
        let stop = gdb.ask("continue");
        assert!(stop.contains("Breakpoint 1, ") && stop.contains("__x64_sys_mount"), "boot {boot}: {stop}");
        assert_at(guest, &mut gdb, "__x64_sys_mount");
        assert!(gdb.ask("bt").contains("<user mode>"), "{}", gdb.everything());
        gdb.ask("disable 1");
        let stop = gdb.ask("continue");
        assert!(stop.contains("Breakpoint 2, ") && stop.contains("kstub_live_init"), "boot {boot}: {stop}");
        assert!(functions(&gdb.ask("bt")).contains(&"do_init_module".to_owned()), "{}", gdb.everything());
        gdb.send("continue");
        assert!(wait_until(PATIENCE * 3, || guest.boots() == boot), "{}", guest.console());
        assert_eq!(guest.number("symbol._text"), texts[boot - 1], "boot {boot}");
        guest.assert_alive("below gdb after its reboot");
        gdb.interrupt();
        gdb.wait().unwrap();
        assert_eq!(address(&mut gdb, "kstub_live_constant"), guest.number("constant"));
        gdb.ask("enable 1");
    }
    gdb.quit();
    assert_free(guest, "after its boots below gdb");
    texts.dedup();
    texts
}

/// Breakpoints follow a kernel that KASLR moves.
#[test]
fn breakpoints_go_with_the_kernel() {
    live::again(|| {
        for (series, cpus) in SERIES.into_iter().zip([1, 4]) {
            let Some(guest) = Plan::new(series).cpus(cpus).shared_ram().boot() else { return };
            let texts = starts_again(&guest, &[Again::Reboot, Again::Reset]);
            assert!(texts.len() > 1, "KASLR has not moved the kernel: {texts:x?}");
        }
    });
}

/// Breakpoints stay with a kernel that is where it was; its modules of before are gone.
#[test]
fn breakpoints_stay_with_a_kernel_that_does_not_move() {
    live::again(|| {
        let Some(guest) = Plan::new("6.12").kernel_argument("nokaslr").shared_ram().boot() else { return };
        let texts = starts_again(&guest, &[Again::Reboot]);
        assert_eq!(texts.len(), 1, "it has moved: {texts:x?}");
    });
}

/// Whoever leaves, or is killed, while the guest boots leaves nothing in it.
#[test]
fn who_leaves_while_it_boots() {
    live::again(leave_while_it_boots);
}

fn leave_while_it_boots() {
    let Some(guest) = Plan::new("6.12").shared_ram().boot() else { return };
    for (number, how) in ["quit", "Ctrl-C and quit", "killed"].into_iter().enumerate() {
        let mut gdb = Gdb::start(&guest, &[]);
        gdb.ask("break __x64_sys_mount");
        gdb.send("continue");
        guest.assert_alive("before its reboot");
        guest.events();
        guest.send("reboot");
        assert!(wait_until(PATIENCE, || guest.events().iter().any(|event| event == "RESET")));
        std::thread::sleep(Duration::from_millis(300));
        match how {
            "quit" => drop(gdb),
            "killed" => {
                let debugger = gdb.gdb_pid();
                live::kill(gdb.kstub_pid(), "KILL");
                live::kill(debugger, "KILL");
                drop(gdb);
            }
            _ => {
                gdb.interrupt();
                let stop = gdb.wait().unwrap();
                assert!(stop.contains("The guest was started again"), "{stop}");
                gdb.quit();
            }
        }
        assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{how}: {}", guest.run_state());
        assert!(wait_until(PATIENCE * 3, || guest.boots() == number + 2), "{how}: {}", guest.console());
        assert_free(&guest, how);
    }
}

/// A snapshot of an earlier boot is loaded below gdb: the kernel is where it was then.
#[test]
fn a_snapshot_is_loaded() {
    live::again(load_a_snapshot);
}

fn load_a_snapshot() {
    let disk = tempfile::tempdir().unwrap();
    let image = disk.path().join("snapshots");
    live::empty_qcow2(&image);
    let drive = format!("if=none,format=qcow2,file={}", image.display());
    let Some(guest) = Plan::new("6.12").argument("-drive").argument(&drive).boot() else { return };
    let text = guest.number("symbol._text");
    let constant = guest.number("constant");
    assert_eq!(guest.human("savevm first"), "");
    // Of the same boot: everything is where it was.
    let mut gdb = Gdb::start(&guest, &[]);
    gdb.ask("break do_sysinfo");
    gdb.send("continue");
    guest.assert_alive("below gdb");
    assert_eq!(guest.human("loadvm first"), "");
    guest.assert_alive("after the snapshot");
    gdb.interrupt();
    gdb.wait().unwrap();
    assert_eq!(address(&mut gdb, "&_text"), text);
    gdb.send("continue");
    guest.assert_alive("after the snapshot");
    guest.send("plant syscalls 0");
    let stop = gdb.wait().unwrap();
    assert!(stop.contains("Breakpoint 1, ") && stop.contains("do_sysinfo"), "{stop}");
    // Of the boot before: everything is elsewhere.
    gdb.ask("disable");
    gdb.send("continue");
    guest.answer().unwrap();
    let mut boots = 1;
    loop {
        guest.send("reboot");
        let stop = gdb.wait().unwrap();
        assert!(stop.contains("The guest was started again"), "{stop}");
        let second = address(&mut gdb, "&_text");
        gdb.send("continue");
        boots += 1;
        assert!(wait_until(PATIENCE * 3, || guest.boots() == boots), "{}", guest.console());
        guest.assert_alive("after its reboot");
        // Once in some hundred boots KASLR chooses the same place again.
        if second != text {
            break;
        }
    }
    assert_eq!(guest.human("loadvm first"), "");
    // Not every QEMU tells of it: kstub sees it at the next stop.
    gdb.interrupt();
    let stop = gdb.wait().unwrap();
    assert!(stop.contains("A kernel was found"), "{stop}");
    assert!(stop.contains("were moved"), "{stop}");
    assert_eq!(address(&mut gdb, "&_text"), text);
    assert_eq!(address(&mut gdb, "kstub_live_constant"), constant);
    gdb.quit();
    assert_free(&guest, "after snapshots below gdb");
}

/// The guest becomes one of another kernel below gdb: what gdb shows is of that one, whoever named no vmlinux.
#[test]
fn a_snapshot_of_another_kernel_is_loaded() {
    let disk = tempfile::tempdir().unwrap();
    let image = disk.path().join("snapshots");
    live::empty_qcow2(&image);
    let drive = format!("if=none,format=qcow2,file={}", image.display());
    let plan = |series: &str| Plan::new(series).argument("-drive").argument(&drive);
    let Some(guest) = plan("6.1").boot() else { return };
    let (text, release) = (guest.number("symbol._text"), guest.release().to_owned());
    assert_eq!(guest.human("savevm other"), "");
    let vmlinux = guest.vmlinux();
    guest.qmp("quit", serde_json::json!({}));
    assert!(wait_until(PATIENCE, || !guest.qemu_runs()));
    drop(guest);
    let Some(guest) = plan("6.12").boot() else { return };
    // The vmlinux of each is found; or the first one is all that there is.
    let places = tempfile::tempdir().unwrap();
    for vmlinux in [guest.vmlinux(), vmlinux] {
        let info = kstub::debuginfo::DebugInfo::open(&vmlinux).unwrap();
        let (dir, rest) = info.build_id().unwrap().split_at(2);
        let dir = places.path().join(".build-id").join(dir);
        std::fs::create_dir_all(&dir).unwrap();
        std::os::unix::fs::symlink(&vmlinux, dir.join(format!("{rest}.debug"))).unwrap();
    }
    for finds in [true, false] {
        let mut kstub = std::process::Command::new(support::gdb_session::KSTUB);
        kstub.env_remove("DEBUGINFOD_URLS").args(["gdb", "--qemu"]).arg(guest.address());
        match finds {
            true => kstub.arg("--debug-dir").arg(places.path()),
            false => kstub.arg("--vmlinux").arg(guest.vmlinux()),
        };
        kstub.args(["--", "-nx", "-q", "-ex", "set confirm off", "-ex", "set pagination off"]);
        let mut gdb = Gdb::spawn(&mut kstub);
        assert!(gdb.ask("p linux_banner").contains("6.12"), "{}", gdb.everything());
        gdb.send("continue");
        guest.assert_alive("below gdb");
        assert_eq!(guest.human("savevm own"), "");
        assert_eq!(guest.human("loadvm other"), "");
        gdb.interrupt();
        let stop = gdb.wait().unwrap();
        if finds {
            assert!(stop.contains("A kernel was found") && stop.contains("were moved"), "{stop}");
            assert_eq!(address(&mut gdb, "&_text"), text, "{stop}");
            assert!(gdb.ask("p linux_banner").contains(&release), "{}", gdb.everything());
        } else {
            assert!(stop.contains("is not known") && !stop.contains("was found"), "{stop}");
        }
        gdb.quit();
        assert_eq!(guest.human("loadvm own"), "");
    }
}

/// A guest that replays what was recorded goes backwards to where it was.
#[test]
fn a_replay_runs_backwards() {
    let log = tempfile::tempdir().unwrap();
    let image = log.path().join("snapshots");
    live::empty_qcow2(&image);
    let plan = |mode: &str| {
        let record = log.path().join("rr");
        let icount = format!("shift=auto,rr={mode},rrfile={},rrsnapshot=start", record.display());
        let drive = format!("if=none,format=qcow2,file={}", image.display());
        Plan::new("6.1").counting_instructions(&icount).argument("-drive").argument(&drive)
    };
    let Some(guest) = plan("record").boot() else { return };
    guest.assert_alive("while recorded");
    // The end of QEMU is recorded, too: the replay must not come to it.
    std::thread::sleep(Duration::from_secs(20));
    guest.qmp("quit", serde_json::json!({}));
    assert!(wait_until(PATIENCE, || !guest.qemu_runs()));
    drop(guest);
    let guest = plan("replay").argument("-S").boot().unwrap();
    let mut gdb = Gdb::start(&guest, &[]);
    gdb.send("continue");
    guest.wait_ready();
    gdb.interrupt();
    let stop = gdb.wait().unwrap();
    assert!(stop.contains("A kernel was found"), "{stop}");
    let count = |guest: &Guest| {
        let said = guest.human("info replay");
        let digits = said.rsplit_once("instruction count = ").unwrap_or_else(|| panic!("{said}")).1;
        digits.trim().parse::<u64>().unwrap_or_else(|_| panic!("{said}"))
    };
    let here = count(&guest);
    for back in 1..4 {
        let answer = gdb.ask("reverse-stepi");
        assert_eq!(count(&guest), here - back, "{answer}");
        assert_eq!(address(&mut gdb, "$pc"), guest.registers()[0]["rip"], "{answer}");
    }
    for _ in 0..3 {
        gdb.ask("stepi");
    }
    // Not the registers: an interrupt that came at this instruction has been taken, or has not.
    assert_eq!(count(&guest), here);
}
