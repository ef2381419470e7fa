//! A guest that kstub has stopped for a moment, and then is killed: it runs again.
//!
//! QEMU is a server that speaks QMP and does not answer `stop`: so the moment lasts. What it was told is the truth.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);
const MTREE: &str = "FlatView #0\r\n AS \"memory\", root: system\r\n Root memory region: system\r\n\
                     \x20 0000000000000000-000000000000ffff (prio 0, ram): pc.ram\r\n";
const REGISTERS: &str =
    "CPU#0\r\nEAX=00000000 EBX=00000000\r\nEIP=0000fff0 EFL=00000002\r\nCR0=60000010 CR3=00000000\r\n";

/// What the guest does, and what was told to QEMU.
#[derive(Default)]
struct Told {
    stands: bool,
    commands: Vec<String>,
}

/// The answer to a command; none to `stop`.
fn answer(told: &Mutex<Told>, command: &Value) -> Option<Value> {
    let mut told = told.lock().unwrap();
    let name = command["execute"].as_str().unwrap();
    told.commands.push(name.to_owned());
    Some(match name {
        "query-kvm" => json!({ "enabled": false, "present": false }),
        "query-status" => {
            json!({ "running": !told.stands, "status": if told.stands { "paused" } else { "running" } })
        }
        "query-memdev" => json!([]),
        "stop" => {
            told.stands = true;
            return None;
        }
        "cont" => {
            told.stands = false;
            json!({})
        }
        "human-monitor-command" => {
            let line = command["arguments"]["command-line"].as_str().unwrap();
            json!(match line.split([' ', '/']).next() {
                _ if line == "info mtree -f" => MTREE.to_owned(),
                _ if line == "info registers -a" => REGISTERS.to_owned(),
                Some("xp") => {
                    let words = line.split('/').nth(1).unwrap().split('g').next().unwrap().parse().unwrap();
                    format!("0000: {}\r\n", vec!["0x0000000000000000"; words].join(" "))
                }
                _ => String::new(),
            })
        }
        _ => json!({}),
    })
}

/// Serves one client to its end, as QEMU does.
fn serve(stream: UnixStream, told: &Mutex<Told>) -> std::io::Result<()> {
    let version = json!({ "qemu": { "micro": 22, "minor": 2, "major": 7 }, "package": "" });
    let mut to = stream.try_clone()?;
    writeln!(to, "{}\r", json!({ "QMP": { "version": version, "capabilities": [] } }))?;
    for line in BufReader::new(stream).lines() {
        let command: Value = serde_json::from_str(&line?)?;
        if let Some(answer) = answer(told, &command) {
            writeln!(to, "{}\r", json!({ "return": answer, "id": command["id"] }))?;
        }
    }
    Ok(())
}

fn fake(path: &Path) -> Arc<Mutex<Told>> {
    let (listener, told) = (UnixListener::bind(path).unwrap(), Arc::new(Mutex::new(Told::default())));
    let shared = Arc::clone(&told);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Who is killed leaves a broken pipe.
            let _ = serve(stream, &shared);
        }
    });
    told
}

fn until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn who_is_killed_in_the_moment_of_a_pause_leaves_a_guest_that_runs() {
    for signal in ["KILL", "TERM", "HUP"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let told = fake(&path);
        // Below nohup SIGHUP would be ignored.
        let mut kstub = Command::new("env");
        kstub.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_kstub")]);
        kstub.args(["run", "--no-debuginfod", "--pause", "--qemu"]).arg(&path).arg("info");
        let mut child = kstub.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        until("it is never stopped", || told.lock().unwrap().stands);
        assert!(!told.lock().unwrap().commands.iter().any(|command| command == "cont"));
        // While kstub lives nobody interferes.
        std::thread::sleep(Duration::from_millis(300));
        assert!(told.lock().unwrap().stands && child.try_wait().unwrap().is_none());
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status();
        assert!(sent.unwrap().success());
        child.wait().unwrap();
        until(&format!("SIG{signal}: the guest stays stopped"), || !told.lock().unwrap().stands);
        let cont = told.lock().unwrap().commands.iter().filter(|command| *command == "cont").count();
        assert_eq!(cont, 1, "SIG{signal}");
    }
}

/// What a guardian is told last is what it does, and half a line is nothing.
#[test]
fn the_last_errand_counts() {
    for (lines, runs) in
        [(&[true][..], true), (&[true, false], false), (&[false, true], true), (&[false], false)]
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let told = fake(&path);
        told.lock().unwrap().stands = true;
        let mut guardian = Command::new(env!("CARGO_BIN_EXE_kstub"))
            .arg("__guard")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut pipe = guardian.stdin.take().unwrap();
        for runs in lines {
            let errand = json!({
                "stub": null, "qmp": { "Unix": path }, "runs": runs, "stepped": false, "started": false,
                "directory": null,
            });
            writeln!(pipe, "{errand}").unwrap();
        }
        let mut ready = String::new();
        BufReader::new(guardian.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let name = std::fs::read_to_string(format!("/proc/{}/comm", guardian.id())).unwrap();
        assert_eq!(
            (ready.as_str(), name.trim()),
            ("ready\n", "guest-guardian"),
            "pkill kstub is to spare it"
        );
        pipe.write_all(b"{\"stub\": null, \"ru").unwrap();
        drop(pipe);
        assert!(guardian.wait().unwrap().success());
        assert_eq!(told.lock().unwrap().stands, !runs, "{lines:?}");
    }
}
