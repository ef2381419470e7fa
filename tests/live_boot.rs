//! Stock gdb on a guest from before its first instruction: `--wait-kernel`, a kernel that never comes, and a boot that is
//! only looked on.
//!
//! Truth is what the guest says of itself once it is up (where KASLR has put it), QEMU's registers at each stop, the guest's
//! run state and heartbeat.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::process::Stdio;
use std::time::{Duration, Instant};
use support::gdb_session::functions;
use support::live::{Gdb, Guest, PATIENCE, Plan, SERIES, again, finish, kill, number, wait_until};

/// `p`'s answer without `$1 = `.
fn value(gdb: &mut Gdb, expression: &str) -> String {
    let answer = gdb.ask(expression);
    let (_, value) =
        answer.split_once(" = ").unwrap_or_else(|| panic!("{expression}: {answer}; {}", gdb.everything()));
    value.trim().to_owned()
}

/// An address that gdb prints, with or without a type before and a name behind.
fn address(gdb: &mut Gdb, expression: &str) -> u64 {
    let value = value(gdb, &format!("p/x (unsigned long)({expression})"));
    number(&value)
}

/// The guest stands at gdb's pc, on CPU 0, which is that function's first instruction.
fn assert_at(guest: &Guest, gdb: &mut Gdb, function: &str) {
    let at = address(gdb, &format!("&{function}"));
    assert_eq!(address(gdb, "$pc"), at, "{function}");
    assert_ne!(guest.run_state(), "running", "{function}");
    assert_eq!(guest.registers()[0]["rip"], at, "{function}");
}

/// From `start_kernel()` to the heartbeat, on every kernel, with one CPU and with several.
#[test]
fn from_the_first_line_to_the_heartbeat() {
    again(|| {
        let mut texts = Vec::new();
        for (series, cpus) in SERIES.into_iter().flat_map(|series| [(series, 1), (series, 4)]) {
            let Some(guest) = Plan::new(series).cpus(cpus).shared_ram().argument("-S").boot() else { return };
            assert_eq!(guest.run_state(), "prelaunch");
            let start = Instant::now();
            let mut gdb = Gdb::start(&guest, &["--wait-kernel"]);
            eprintln!(
                "{series}, {cpus} CPUs: at start_kernel() after {:.1} s",
                start.elapsed().as_secs_f64()
            );
            assert_at(&guest, &mut gdb, "start_kernel");
            let text = address(&mut gdb, "&_text");
            let bt = gdb.ask("bt");
            let calls = functions(&bt);
            // Some compilers jump to start_kernel(), which never returns. What calls C code first was secondary_startup_64 until
            // about v6.5, and is common_startup_64 since.
            assert!(calls.len() >= 2 && calls[0] == "start_kernel", "{bt}");
            assert!(calls.last().is_some_and(|name| name.contains("_startup_64")), "{bt}");
            assert!(!bt.contains("ends here"), "{bt}");
            let threads = gdb.ask("info threads");
            assert_eq!(
                threads.lines().filter(|line| line.contains("(CPU ")).count(),
                cpus as usize,
                "{threads}"
            );
            assert!(gdb.ask("p linux_banner").contains(guest.release()), "{}", gdb.everything());

            // The scheduler is there, the other CPUs are not.
            gdb.ask("tbreak rest_init");
            let stop = gdb.ask("continue");
            assert!(stop.contains("Temporary breakpoint"), "{stop}");
            assert_at(&guest, &mut gdb, "rest_init");
            let bt = gdb.ask("bt");
            let calls = functions(&bt);
            assert!(calls[0] == "rest_init" && calls.contains(&"start_kernel".to_owned()), "{bt}");
            assert!(calls.last().is_some_and(|name| name.contains("_startup_64")), "{bt}");
            assert!(!bt.contains("ends here"), "{bt}");
            // A function that the kernel throws away after its boot.
            gdb.ask("tbreak kernel_init_freeable");
            assert!(gdb.ask("continue").contains("Temporary breakpoint"), "{}", gdb.everything());
            let bt = gdb.ask("bt");
            assert!(
                functions(&bt).starts_with(&["kernel_init_freeable", "kernel_init"].map(str::to_owned)),
                "{bt}"
            );
            assert_eq!(value(&mut gdb, "p $_thread"), "1");
            // User space, by when the kernel has left the page tables that it began with.
            gdb.ask("tbreak __x64_sys_mount");
            assert!(gdb.ask("continue").contains("Temporary breakpoint"), "{}", gdb.everything());
            let bt = gdb.ask("bt");
            assert!(
                functions(&bt).contains(&"do_syscall_64".to_owned()) && bt.contains("<user mode>"),
                "{bt}"
            );
            assert!(gdb.ask("monitor ps").contains("kthreadd"), "{}", gdb.everything());
            // Code that was not there yet.
            gdb.ask("set breakpoint pending on");
            gdb.ask("tbreak kstub_live_tick");
            let stop = gdb.ask("continue");
            assert!(stop.contains("Temporary breakpoint") && stop.contains("kstub_live_tick"), "{stop}");
            gdb.ask("delete");
            gdb.send("continue");
            guest.wait_ready();
            assert_eq!(guest.number("symbol._text"), text, "gdb's symbols are not where the kernel is");
            gdb.interrupt();
            gdb.wait().unwrap();
            assert_eq!(address(&mut gdb, "kstub_live_constant"), guest.number("constant"));
            assert_eq!(address(&mut gdb, "&_text"), text);
            gdb.quit();
            // It stood before kstub came.
            assert_ne!(guest.run_state(), "running");
            guest.cont();
            guest.assert_alive("after its boot below gdb");
            texts.push(text);
        }
        texts.sort_unstable();
        texts.dedup();
        assert!(texts.len() > 1, "KASLR has moved no kernel: {texts:x?}");
    });
}

/// A guest that never was in gdb's hands boots and finds no breakpoint anywhere.
fn assert_untouched(guest: &Guest, why: &str) {
    assert!(wait_until(PATIENCE, || guest.run_state() != "running"), "{why}: it stood before");
    std::thread::sleep(Duration::from_millis(300));
    assert_ne!(guest.run_state(), "running", "{why}");
    guest.cont();
    guest.wait_ready();
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(guest.run_state(), "running", "{why}: it stops by itself");
    }
    guest.assert_alive(why);
    assert!(!guest.chardevs().iter().any(|line| line.contains("kstub-")), "{why}: {:?}", guest.chardevs());
}

/// Waiting is ended by Ctrl-C, or the hard way: the guest stands as it stood, and boots as if nobody had been there.
#[test]
fn who_waits_is_ended() {
    again(|| {
        for signal in ["INT", "TERM", "KILL"] {
            let Some(guest) = Plan::new("6.12").argument("-S").boot() else { return };
            let mut kstub = guest.kstub("gdb");
            kstub.args(["--wait-kernel", "--", "-nx", "-batch"]);
            let mut child =
                kstub.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            // The firmware is at work, or the kernel unpacks itself.
            assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{}", guest.run_state());
            kill(child.id(), signal);
            assert!(
                wait_until(PATIENCE, || child.try_wait().unwrap().is_some()),
                "SIG{signal}: kstub lives on"
            );
            assert_untouched(&guest, &format!("SIG{signal} while it was waited for the kernel"));
        }
    });
}

/// Another kernel than the vmlinux is of: said soon, and the guest is as it was.
#[test]
fn another_kernel_comes() {
    again(|| {
        let Some(guest) = Plan::new("6.1").argument("-S").boot() else { return };
        let Some(other) = Plan::vmlinux_of("6.12") else { return };
        let mut kstub = guest.kstub_of("gdb", &other);
        kstub.args(["--wait-kernel", "--", "-nx", "-batch"]);
        let ended = finish(&mut kstub);
        assert_eq!(ended.status.and_then(|status| status.code()), Some(1), "{ended:?}");
        assert!(ended.err.contains("start_kernel") || ended.err.contains("linux_banner"), "{}", ended.err);
        assert!(ended.took < Duration::from_secs(120), "{:?}", ended.took);
        assert_untouched(&guest, "another kernel came");
    });
}

/// Without `--wait-kernel`: the guest boots below a gdb that came before there was a kernel, and that is told when there
/// is one.
#[test]
fn a_boot_that_is_looked_on() {
    again(|| {
        let Some(guest) = Plan::new("6.12").cpus(4).shared_ram().argument("-S").boot() else { return };
        let mut gdb = Gdb::start(&guest, &[]);
        assert_eq!(address(&mut gdb, "$pc"), 0xfff0);
        gdb.send("continue");
        guest.wait_ready();
        gdb.interrupt();
        let stop = gdb.wait().unwrap();
        assert!(stop.contains("A kernel was found"), "{stop}");
        // gdb had no symbols before: firmware is where they would have been.
        assert!(stop.contains("symbols and breakpoints were moved"), "{stop}");
        assert_eq!(address(&mut gdb, "&_text"), guest.number("symbol._text"));
        assert_eq!(address(&mut gdb, "kstub_live_constant"), guest.number("constant"));
        gdb.ask("tbreak kstub_live_tick");
        assert!(gdb.ask("continue").contains("Temporary breakpoint"), "{}", gdb.everything());
        assert!(gdb.ask("monitor ps").contains("kstub-tick"), "{}", gdb.everything());
        assert!(gdb.ask("monitor sym _text").contains(&format!("{:x}", guest.number("symbol._text"))));
        gdb.quit();
        assert_ne!(guest.run_state(), "running", "it stood before");
        guest.cont();
        guest.assert_alive("after a boot below gdb");
    });
}
