//! How a guest fares when those who look at it come and go: killed at every stage, two at once, hundreds one after the
//! other, hostile ones; and how they fare when QEMU is killed or the guest is started again.
//!
//! Truth is QEMU's monitor (run state, events, registers, RAM) and the guest's heartbeat. `KSTUB_VM_FULL=1` makes it 200
//! attachments.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "live_clients/ends.rs"]
mod ends;
#[path = "live_clients/hostile.rs"]
mod hostile;
mod support;

#[path = "support/rsp_client.rs"]
mod rsp_client;

use ends::{client_is_gone, gdb_is_killed, kstub_is_ended, kstub_is_killed};
use hostile::{hostile, read_only};
use rsp_client::{RspClient, from_hex, packet, to_hex};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::Rng;
use support::gdb_session::KSTUB;
use support::live::{
    self, Gdb, Guest, PATIENCE, Plan, again, checks, finish, finish_within, kill, number, wait_until,
};

#[test]
fn clients_of_a_guest() {
    let Some(guest) = Plan::new("6.12").cpus(4).pti(true).shared_ram().boot() else { return };
    checks(
        &guest,
        &[
            ("gdb is killed", gdb_is_killed),
            ("kstub is killed", kstub_is_killed),
            ("kstub is ended", kstub_is_ended),
            ("a server's client is gone", client_is_gone),
            ("come and go", come_and_go),
            ("one after the other", many_programs),
            ("two and a script", two_and_a_script),
            ("control is taken and given", control_changes_hands),
            ("read-only", read_only),
            ("hostile clients", hostile),
            ("sockets", sockets),
        ],
    );
}

/// One with QEMU's memory in its own process and one CPU: what is different there.
#[test]
fn clients_of_a_small_guest() {
    let Some(guest) = Plan::new("6.1").pti(false).boot() else { return };
    checks(
        &guest,
        &[("gdb is killed", gdb_is_killed), ("come and go", come_and_go), ("read-only", read_only)],
    );
}

/// `kstub serve` on a socket of its own; killed when dropped.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(guest: &Guest, options: &[&str]) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let socket = guest.path(&format!("kstub-{number}"));
        let mut kstub = guest.kstub("serve");
        kstub.arg("-v").args(options).arg("--listen").arg(format!("unix:{}", socket.display()));
        let log = std::fs::File::create(socket.with_extension("log")).unwrap();
        let child = kstub.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut server = Self { child, socket };
        let up =
            wait_until(PATIENCE, || server.socket.exists() || server.child.try_wait().unwrap().is_some());
        assert!(up && server.runs(), "kstub serve has not come up");
        server
    }

    fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn client(&self) -> RspClient {
        RspClient::unix(&self.socket).like_gdb()
    }

    /// A client that controls the guest.
    fn owner(&self) -> RspClient {
        let mut client = self.client();
        let stop = client.ask("?");
        assert!(stop.starts_with('T') || stop.starts_with('S'), "{stop}");
        client
    }

    /// Stock gdb on the socket.
    fn gdb(&self) -> Gdb {
        let mut gdb = Gdb::spawn(Command::new("gdb").args(["-nx", "-q", "-ex", "set confirm off"]));
        gdb.ask("set pagination off");
        gdb.ask("set remotetimeout 120");
        let answer = gdb.ask(&format!("target remote {}", self.socket.display()));
        assert!(!answer.contains("onnection"), "{answer}");
        gdb
    }

    /// SIGTERM, and how long its end took.
    fn end(mut self) -> Duration {
        let start = Instant::now();
        kill(self.child.id(), "TERM");
        assert!(wait_until(PATIENCE, || !self.runs()), "kstub serve does not end");
        start.elapsed()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.socket.with_extension("log")).unwrap_or_default());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Answer of a monitor command.
fn monitor(client: &mut RspClient, command: &str) -> String {
    client.send_raw(&packet(format!("qRcmd,{}", to_hex(command.as_bytes()))));
    let mut text = Vec::new();
    loop {
        let answer = String::from_utf8(client.receive().expect("the server closed")).unwrap();
        match answer.as_str() {
            "OK" | "" => break,
            error if error.starts_with('E') => break,
            // `O` and hexadecimal is console output; without `O` it is the whole answer.
            more if more.starts_with('O') => text.extend(from_hex(&more[1..])),
            whole => {
                text.extend(from_hex(whole));
                break;
            }
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Nobody is left who could stop the guest: it runs, past where the breakpoints were, and can be looked at anew.
fn assert_free(guest: &Guest, why: &str) {
    let runs = wait_until(PATIENCE, || guest.run_state() == "running");
    assert!(runs, "{why}: the guest was left {}", guest.run_state());
    guest.assert_alive(why);
    let count = || number(&guest.ask_facts("cat /proc/kstub_live")["count"]);
    let before = count();
    assert!(wait_until(PATIENCE, || count() > before), "{why}: the thread with the breakpoint stands");
    assert_eq!(guest.run_state(), "running", "{why}");
    let ps = finish(guest.kstub("run").arg("ps"));
    assert!(ps.succeeded() && ps.out.contains("kstub-tick"), "{why}: the next client: {ps:?}");
}

fn cycles() -> u64 {
    if std::env::var("KSTUB_VM_FULL").as_deref() == Ok("1") { 200 } else { 40 }
}

fn come_and_go(guest: &Guest) {
    guest.ask("plant load 2");
    let mut server = Server::start(guest, &[]);
    let chardevs = guest.chardevs().len();
    let mut rng = Rng::new(1);
    let (beat, start) = (guest.beat(), Instant::now());
    let mut slowest = Duration::ZERO;
    for cycle in 0..cycles() {
        let began = Instant::now();
        let mut client = server.owner();
        match rng.next() % 4 {
            0 => assert_eq!(client.ask("D"), "OK", "cycle {cycle}"),
            1 => {
                assert_eq!(client.ask("g").len() % 2, 0);
                client.ask("D");
            }
            2 => {
                client.send_raw(&packet("vCont;c"));
                drop(client);
            }
            // Without a word.
            _ => drop(client),
        }
        slowest = slowest.max(began.elapsed());
        assert!(
            wait_until(PATIENCE, || guest.run_state() == "running"),
            "cycle {cycle}: {}",
            guest.run_state()
        );
    }
    eprintln!(
        "  {} cycles: {} ms, slowest {} ms",
        cycles(),
        start.elapsed().as_millis(),
        slowest.as_millis()
    );
    guest.assert_alive("after many clients");
    assert!(guest.beat().number > beat.number && guest.boots() == 1);
    // The guest's own clock saw no more than the time that passed.
    let passed = guest.beat().milliseconds - beat.milliseconds;
    assert!(passed <= start.elapsed().as_millis() as u64 + 2000, "{passed} ms");
    assert!(guest.chardevs().len() <= chardevs + 1, "{}", guest.chardevs().join("\n"));
    assert!(server.runs());
    server.end();
    assert_free(guest, "after many clients");
}

/// Programs, each of which attaches anew.
fn many_programs(guest: &Guest) {
    guest.ask("plant load 2");
    let chardevs = guest.chardevs().len();
    for round in 0..cycles() / 10 {
        let mut serve = guest.kstub("serve");
        let mut child = serve
            .args(["--listen", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(&packet("?")).unwrap();
        let stopped = wait_until(PATIENCE, || guest.run_state() != "running");
        assert!(stopped, "round {round}: not attached");
        drop(child.stdin.take());
        assert!(
            wait_until(PATIENCE, || child.try_wait().unwrap().is_some()),
            "round {round}: kstub lives on"
        );
        assert!(
            wait_until(PATIENCE, || guest.run_state() == "running"),
            "round {round}: {}",
            guest.run_state()
        );
    }
    assert_eq!(guest.chardevs().len(), chardevs, "{}", guest.chardevs().join("\n"));
    assert_free(guest, "after many programs");
}

/// The first controls the guest; the second reads it as it stands, and waits when it says continue.
fn two_and_a_script(guest: &Guest) {
    let server = Server::start(guest, &[]);
    let mut first = server.gdb();
    let mut second = server.gdb();
    first.ask("break kstub_live_tick");
    let stop = first.ask("continue");
    assert!(stop.contains("Breakpoint 1"), "{stop}");
    // While the first stands at its breakpoint the second sees the same.
    let count = first.ask("output kstub_live.count");
    assert_eq!(second.ask("output *(unsigned long *)&kstub_live"), count);
    assert!(second.ask("p init_task.comm").contains("swapper/0"));
    // It may not let the guest run: that waits for the first.
    let before = guest.registers();
    second.send("continue");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(guest.registers(), before, "a reader has moved the guest");
    // A script meanwhile.
    let mut script = server.client();
    assert!(monitor(&mut script, "ps").contains("kstub-tick"));
    assert_eq!(guest.registers(), before);
    drop(script);
    assert_ne!(guest.run_state(), "running", "a script that left has let it run");
    // The first goes on; its next stop is the second's, too.
    let stop = first.ask("continue");
    assert!(stop.contains("Breakpoint 1"), "{stop}");
    let stop = second.wait().unwrap();
    assert!(
        stop.contains("stopped") || stop.contains("SIGTRAP") || stop.contains("kstub_live_tick"),
        "{stop}"
    );
    assert_eq!(second.ask("output *(unsigned long *)&kstub_live"), first.ask("output kstub_live.count"));
    assert_ne!(first.ask("output kstub_live.count"), count);
    // The reader dies: nothing happens.
    kill(second.gdb_pid(), "KILL");
    drop(second);
    std::thread::sleep(Duration::from_millis(300));
    guest.assert_stands("a reader that died must not let it run");
    // The owner dies: it runs.
    kill(first.gdb_pid(), "KILL");
    drop(first);
    assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{}", guest.run_state());
    guest.assert_alive("after both");
    server.end();
    assert_free(guest, "after both");
}

fn control_changes_hands(guest: &Guest) {
    let server = Server::start(guest, &[]);
    let mut first = server.owner();
    let mut second = server.client();
    second.ask("?");
    let refused = second.ask(format!("Z0,{},1", guest.fact("tick.function").trim_start_matches("0x")));
    assert!(refused.starts_with('E'), "{refused}");
    monitor(&mut first, "control give");
    assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{}", guest.run_state());
    monitor(&mut second, "control take");
    assert!(wait_until(PATIENCE, || guest.run_state() != "running"), "{}", guest.run_state());
    let set = second.ask(format!("Z0,{},1", guest.fact("tick.function").trim_start_matches("0x")));
    assert_eq!(set, "OK");
    let stop = second.ask("vCont;c");
    assert!(stop.starts_with("T05"), "{stop}");
    drop(first);
    std::thread::sleep(Duration::from_millis(300));
    guest.assert_stands("who gave control away does not let it run by leaving");
    drop(second);
    assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{}", guest.run_state());
    guest.assert_alive("after both");
}

impl Server {
    /// Another server, for which the first makes room.
    fn start_after(first: Self, guest: &Guest, options: &[&str]) -> Self {
        first.end();
        Self::start(guest, options)
    }
}

/// Nobody else can connect to what kstub opens, its own socket and QEMU's stub.
fn sockets(guest: &Guest) {
    let server = Server::start(guest, &[]);
    let _owner = server.owner();
    assert_eq!(std::fs::metadata(&server.socket).unwrap().permissions().mode() & 0o777, 0o600);
    let chardevs = guest.chardevs().join("\n");
    eprintln!("{chardevs}");
    let mut found = 0;
    for line in chardevs.lines().filter(|line| !line.contains(&guest.path("").display().to_string())) {
        let Some(path) = line.split("unix:").nth(1).and_then(|rest| rest.split(',').next()) else {
            assert!(!line.contains("tcp:"), "{line}");
            continue;
        };
        let path = PathBuf::from(path);
        let private = |path: &std::path::Path| {
            std::fs::metadata(path).is_ok_and(|data| data.permissions().mode() & 0o077 == 0)
        };
        // One that is gone is as good: nobody can connect.
        assert!(
            !path.exists() || private(&path) || path.parent().is_some_and(private),
            "{line}: others can connect"
        );
        found += 1;
    }
    assert!(found <= 1, "{chardevs}");
}

/// QEMU is killed below a debugger that stands, that waits, and that steps.
#[test]
fn qemu_is_killed() {
    let stages: [&str; 3] = ["standing", "running", "stepping"];
    for stage in stages {
        let Some(guest) = Plan::new("6.1").cpus(4).shared_ram().boot() else { return };
        let mut gdb = Gdb::start(&guest, &[]);
        match stage {
            "running" => {
                gdb.send("continue");
                guest.assert_alive("below gdb");
            }
            "stepping" => {
                gdb.send("while 1\nstepi\nend");
                std::thread::sleep(Duration::from_millis(300));
            }
            _ => {}
        }
        guest.kill_qemu();
        let start = Instant::now();
        // gdb comes back to its prompt and can be left.
        let answer = gdb.wait_for(PATIENCE);
        assert!(answer.is_ok(), "{stage}: gdb hangs: {answer:?}");
        let _ = gdb.ask("info threads");
        eprintln!(
            "{stage}: {} ms: {}",
            start.elapsed().as_millis(),
            gdb.everything().lines().rev().take(5).collect::<Vec<_>>().join(" | ")
        );
        assert!(!gdb.everything().contains("panicked"), "{}", gdb.everything());
        gdb.send("quit");
        assert!(gdb.wait_end(), "{stage}: kstub outlives QEMU and gdb");
    }
}

/// Another boot is another KASLR offset: whoever comes then is right, and whoever was there is told.
#[test]
fn the_guest_is_started_again() {
    again(|| {
        let Some(guest) = Plan::new("6.12").cpus(4).pti(true).shared_ram().boot() else { return };
        let server = Server::start(&guest, &[]);
        let mut texts = vec![guest.number("symbol._text")];
        let text = |client: &mut RspClient| monitor(client, "sym _text");
        let mut client = server.owner();
        let said = text(&mut client);
        assert!(said.contains(&format!("{:x}", texts[0])), "{said}");
        client.send_raw(&packet("vCont;c"));
        guest.assert_alive("below a client");
        for boot in 2..4 {
            guest.send("reboot");
            assert!(wait_until(PATIENCE * 3, || guest.boots() == boot), "{}", guest.console());
            texts.push(guest.number("symbol._text"));
            guest.assert_alive("after a reboot");
            // A program that starts now.
            drop(client);
            assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{}", guest.run_state());
            client = server.owner();
            let said = text(&mut client);
            assert!(said.contains(&format!("{:x}", texts[boot - 1])), "boot {boot}: {said} {texts:x?}");
            assert!(monitor(&mut client, "ps").contains("kstub-tick"));
            drop(client);
            let mut gdb = server.gdb();
            assert!(
                gdb.ask("info symbol kstub_live_tick").contains("kstub_live_tick"),
                "{}",
                gdb.everything()
            );
            assert!(
                gdb.ask("p/x &_text").ends_with(&format!("{:#x}", texts[boot - 1])),
                "{}",
                gdb.everything()
            );
            drop(gdb);
            client = server.owner();
            client.send_raw(&packet("vCont;c"));
            guest.assert_alive("below the next client");
        }
        texts.dedup();
        assert!(texts.len() > 1, "KASLR has not moved the kernel: {texts:x?}");
        drop(client);
        server.end();
        assert_free(&guest, "after two reboots");
    });
}
