//! Clients and kstubs that end at every stage, however they end.

use super::*;

type Stage = (&'static str, fn(&Guest, &mut Gdb));

/// What a debugger may be at when it is killed; each leaves it at work or waiting.
const STAGES: &[Stage] = &[
    ("attached", |_, _| ()),
    ("at a breakpoint", |_, gdb| {
        gdb.ask("break kstub_live_tick");
        gdb.ask("continue");
    }),
    ("running, with points", |guest, gdb| {
        gdb.ask("break do_init_module");
        gdb.ask("watch kstub_live_constant");
        gdb.send("continue");
        guest.assert_alive("below gdb");
    }),
    ("stepping", |_, gdb| {
        gdb.send("while 1\nstepi\nend");
        std::thread::sleep(Duration::from_millis(500));
    }),
    ("single-stepping one CPU", |_, gdb| {
        gdb.ask("set scheduler-locking on");
        gdb.ask("break kstub_live_tick");
        gdb.ask("stepi");
    }),
    ("hitting a breakpoint all the time", |_, gdb| {
        gdb.ask("break kstub_live_tick if 0");
        gdb.send("continue");
        std::thread::sleep(Duration::from_millis(700));
    }),
    ("reading much", |_, gdb| {
        gdb.send("monitor ps\nmonitor log\nmonitor foreach bt");
        std::thread::sleep(Duration::from_millis(100));
    }),
];

fn at_every_stage(guest: &Guest, who: &str, end: fn(&Gdb)) {
    let mut left = Vec::new();
    for (stage, reach) in STAGES {
        guest.settle();
        guest.ask("plant load 2");
        let mut gdb = Gdb::start(guest, &["-v"]);
        reach(guest, &mut gdb);
        end(&gdb);
        let ended = gdb.wait_end();
        let said = gdb.everything();
        // Its gdb goes with kstub; one that lives on would hold nothing but a closed socket.
        drop(gdb);
        let start = Instant::now();
        let free = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            assert!(ended, "kstub lives on");
            assert_free(guest, &format!("{who} was killed: {stage}"));
        }));
        eprintln!(
            "  {stage}: {} after {} ms",
            if free.is_ok() { "free" } else { "NOT FREE" },
            start.elapsed().as_millis()
        );
        if free.is_err() {
            eprintln!(
                "{}",
                said.lines().filter(|line| line.contains(" kstub")).collect::<Vec<_>>().join("\n")
            );
            left.push(*stage);
            guest.cont();
        }
    }
    assert!(left.is_empty(), "{who} was killed: {left:?}");
}

pub fn gdb_is_killed(guest: &Guest) {
    at_every_stage(guest, "gdb", |gdb| kill(gdb.gdb_pid(), "KILL"));
}

pub fn kstub_is_killed(guest: &Guest) {
    at_every_stage(guest, "kstub", |gdb| {
        let debugger = gdb.gdb_pid();
        kill(gdb.kstub_pid(), "KILL");
        // It notices by itself, or not; it must not be needed.
        kill(debugger, "KILL");
    });
}

pub fn kstub_is_ended(guest: &Guest) {
    at_every_stage(guest, "kstub", |gdb| {
        let debugger = gdb.gdb_pid();
        kill(gdb.kstub_pid(), "TERM");
        std::thread::sleep(Duration::from_millis(300));
        kill(debugger, "KILL");
    });
}

pub fn client_is_gone(guest: &Guest) {
    let mut server = Server::start(guest, &[]);
    let tick = guest.fact("tick.function");
    let point = format!("Z0,{},1", tick.trim_start_matches("0x"));
    let stages = [
        "attached",
        "at a breakpoint",
        "running",
        "interrupted half-way",
        "stepping all",
        "stepping all, interrupted",
        "stepping one",
    ];
    for stage in stages {
        let mut client = server.owner();
        assert_ne!(guest.run_state(), "running", "{stage}");
        match stage {
            "at a breakpoint" => {
                assert_eq!(client.ask(&point), "OK");
                let stop = client.ask("vCont;c");
                assert!(stop.starts_with("T05"), "{stop}");
            }
            "running" => {
                assert_eq!(
                    client.ask(format!("Z2,{},8", guest.fact("constant.at").trim_start_matches("0x"))),
                    "OK"
                );
                client.send_raw(&packet("vCont;c"));
                guest.assert_alive("running for a client");
            }
            "stepping all" => client.send_raw(&packet("vCont;s")),
            "stepping all, interrupted" => {
                client.send_raw(&packet("vCont;s"));
                client.send_raw(b"\x03");
                std::thread::sleep(Duration::from_millis(100));
            }
            "stepping one" => client.send_raw(&packet("vCont;s:p1.2;c")),
            "interrupted half-way" => {
                client.send_raw(&packet("vCont;c"));
                guest.assert_alive("running for a client");
                client.send_raw(b"\x03$vCont;c#");
            }
            _ => {}
        }
        drop(client);
        assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{stage}: {}", guest.run_state());
        guest.assert_alive(stage);
        let count = || number(&guest.ask_facts("cat /proc/kstub_live")["count"]);
        let before = count();
        assert!(wait_until(PATIENCE, || count() > before), "{stage}: a breakpoint was left");
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(guest.run_state(), "running", "{stage}: the guest stops by itself");
        }
        eprintln!("  {stage}: free");
        assert!(server.runs());
    }
    let took = server.end();
    assert!(took < Duration::from_secs(30), "its end took {took:?}");
    assert_free(guest, "after the server");
}
