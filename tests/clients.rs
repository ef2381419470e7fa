//! Every debugger at hand — the system's and the lab's newer ones — against a fake machine and real dumps.
//!
//! Which programs there are decides what is tested; what is missing is said.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

#[path = "support/fake_machine.rs"]
mod fake_machine;

use fake_machine::{DATA, OWN, TEXT, fake_machine, pattern};
use kstub::gdb::Files;
use kstub::server::{Listen, serve};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use support::lab;

const KSTUB: &str = env!("CARGO_BIN_EXE_kstub");
const REFUSED: &str = "This is a crash dump: it cannot run or step.";

/// A server over the fake machine that lives as long as the test process; its address.
fn server() -> String {
    let listen = Listen::parse(":0", false).unwrap();
    let (ready, address) = mpsc::channel();
    std::thread::spawn(move || {
        serve(fake_machine(), Files::none(), listen, |address| ready.send(address.to_owned()).unwrap())
    });
    address.recv_timeout(Duration::from_secs(10)).expect("the server is ready")
}

/// Those of `names` that can be run, and the lab's newer one.
fn programs(names: &[&str], newer: &str) -> Vec<PathBuf> {
    let all = names.iter().map(PathBuf::from).chain([lab::root().join("tools/bin").join(newer)]);
    let there: Vec<PathBuf> = all
        .filter(|program| {
            let version = Command::new(program).arg("--version").stdin(Stdio::null()).output();
            version.is_ok_and(|output| output.status.success())
        })
        .collect();
    if there.is_empty() {
        eprintln!("skipped: no {}", names[0]);
    }
    there
}

fn gdbs() -> Vec<PathBuf> {
    programs(&["gdb"], "gdb-new")
}

/// All that a program prints. One that does not end is ended, and fails: it may repeat a request for ever.
fn printed(program: &Path, arguments: &[OsString]) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let output = || file.as_file().try_clone().unwrap();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(output()).stderr(output());
    let mut child = command.spawn().unwrap();
    let started = Instant::now();
    let ended = loop {
        if child.try_wait().unwrap().is_some() {
            break true;
        }
        if started.elapsed() > Duration::from_secs(120) {
            child.kill().unwrap();
            child.wait().unwrap();
            break false;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut bytes = Vec::new();
    use std::io::{Read, Seek};
    file.rewind().unwrap();
    file.as_file_mut().take(1 << 20).read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    assert!(ended, "{} does not end: {}", program.display(), text.chars().take(4000).collect::<String>());
    text
}

/// gdb's words on `commands`, after it has connected to `address`.
fn gdb(program: &Path, address: &str, commands: &[&str]) -> String {
    let connect = format!("target remote {address}");
    let settings =
        ["set remotetimeout 120", "set pagination off", "set confirm off", "set width 0", &connect];
    let mut arguments: Vec<OsString> = ["-nx", "-q", "-batch"].map(OsString::from).to_vec();
    arguments.extend(settings.iter().chain(commands).flat_map(|command| ["-ex".into(), (*command).into()]));
    printed(program, &arguments)
}

/// lldb's words on `commands`, each run when the one before has ended.
fn lldb(program: &Path, commands: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("commands");
    std::fs::write(&file, commands.join("\n") + "\n").unwrap();
    let source = format!("command source -e 0 -s 0 {}", file.display());
    printed(program, &["--no-lldbinit", "-b", "-o", &source].map(OsString::from))
}

fn assert_has(program: &Path, said: &str, wanted: &[&str]) {
    for wanted in wanted {
        assert!(said.contains(wanted), "{}: no {wanted:?} in:\n{said}", program.display());
    }
}

/// The CPUs that answers were about, by their first lines.
fn answered_for(said: &str) -> Vec<u32> {
    let first_lines = said.lines().filter_map(|line| line.strip_prefix("CPU "));
    first_lines.map(|rest| rest.split(' ').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn gdb_connects_looks_around_is_refused_and_leaves() {
    for program in gdbs() {
        let address = server();
        let hole = format!("x/2gx {:#x}", DATA + 0x1ff8);
        let commands = [
            "info threads",
            "bt",
            &hole,
            "thread 2",
            "info threads",
            "continue",
            "stepi",
            "p $_thread",
            "monitor help",
            "detach",
        ];
        let said = gdb(&program, &address, &commands);
        let unreadable = format!("Cannot access memory at address {:#x}", DATA + 0x2000);
        let wanted = [
            "* 3    Thread 1.4 \"bash\" (CPU 3, pid 231, panicked here)",
            "#0  ",
            &unreadable,
            REFUSED,
            "$1 = 2",
            "registers of a CPU",
            "detached]",
        ];
        assert_has(&program, &said, &wanted);
        assert_eq!(said.matches(REFUSED).count(), 2, "{}: {said}", program.display());
        for artefact in ["Remote failure", "acket", "SIGTRAP", "thread-id", "timeout", "internal-error"] {
            assert!(!said.contains(artefact), "{}: {artefact} in {said}", program.display());
        }
        let said = gdb(&program, &address, &["kill", "info threads"]);
        assert_has(&program, &said, &["killed]", "No threads."]);
    }
}

/// gdb 13 does not say which thread a command is about.
#[test]
fn commands_are_about_the_thread_selected_in_gdb() {
    for program in gdbs() {
        let own = format!("monitor why {OWN:#x}");
        let other = format!("monitor why -c 3 {OWN:#x}");
        let steps: [(&[&str], &[u32]); 12] = [
            (&["monitor regs"], &[3]),
            (&["info threads", "monitor regs", "monitor regs"], &[3, 3]),
            (&["thread 2", "monitor regs"], &[1]),
            (&["thread 3", "monitor why $rip"], &[3]),
            (&["thread 1", "monitor why $rip"], &[0]),
            (&["thread 2", "monitor regs"], &[1]),
            (&["info threads", "monitor regs"], &[1]),
            (&["thread apply all p $rip", "monitor regs"], &[1]),
            (&["thread apply all monitor regs", "monitor regs"], &[3, 1, 0, 1]),
            (&[&own, "monitor regs 0", &other], &[1, 0, 3]),
            (&["info threads", "continue", "monitor regs"], &[1]),
            (&["thread 1", "stepi", "monitor regs"], &[0]),
        ];
        let commands: Vec<&str> = steps.iter().flat_map(|(commands, _)| commands.iter().copied()).collect();
        let wanted: Vec<u32> = steps.iter().flat_map(|(_, cpus)| cpus.iter().copied()).collect();
        let said = gdb(&program, &server(), &commands);
        assert_eq!(answered_for(&said), wanted, "{}: {said}", program.display());
        assert_has(
            &program,
            &said,
            &["CPU 3  pid 231 bash (panicked here)", "CPU 0  pid 0 swapper/0 (idle)"],
        );
    }
}

/// pwndbg and gef tell QEMU by these, and the kernel's own scripts by `info version`.
#[test]
fn what_tools_made_for_qemu_ask_is_answered_or_refused() {
    for program in gdbs() {
        let read = format!("x/2bx {DATA:#x}");
        let commands = [
            "maintenance packet qSupported",
            "maintenance packet Qqemu.sstepbits",
            "maintenance packet qqemu.PhyMemMode",
            "maintenance packet qOffsets",
            "maintenance packet qAttached",
            "monitor info mtree -f",
            "monitor info mem",
            "monitor info registers",
            "monitor info version",
            // As `get_gdbserver_type` of the kernel's scripts.
            "python print('QEMU:', gdb.execute('monitor info version', to_string=True) != '')",
            "info threads",
            &read,
        ];
        let said = gdb(&program, &server(), &commands);
        let version = format!("kstub {} (QEMU-compatible", env!("CARGO_PKG_VERSION"));
        let bytes = format!("{:#04x}\t{:#04x}", pattern(0), pattern(1));
        let offsets = format!("TextSeg={TEXT:x}");
        let wanted = [
            "PacketSize=",
            "ENABLE=",
            "received: \"0\"",
            &offsets,
            "there is no 'info mtree'",
            &version,
            "* 3    Thread 1.4",
            &bytes,
        ];
        assert_has(&program, &said, &wanted);
        assert!(!said.contains("Text=") && !said.contains("QEMU: False"), "{}: {said}", program.display());
        assert!(said.contains("QEMU: True") || said.contains("Python scripting is not supported"), "{said}");
    }
}

#[test]
fn lldb_looks_around_is_refused_and_leaves() {
    for program in programs(&["lldb", "lldb-14"], "lldb-new") {
        for connect in ["gdb-remote ", "process connect connect://"] {
            let connect = format!("{connect}{}", server());
            let (read, hole) =
                (format!("memory read -c 4 {DATA:#x}"), format!("memory read {:#x}", DATA + 0x3000));
            let commands = [
                &connect,
                "thread list",
                "register read rip cr3",
                &read,
                &hole,
                "bt",
                "continue",
                "thread list",
                "thread select 2",
                "stepi",
                "next",
                "register write rax 5",
                "process status",
                "process plugin packet monitor info version",
                "process plugin packet monitor why $rip",
                "detach",
            ];
            let said = lldb(&program, &commands);
            let rip = format!("rip = {:#018x}", TEXT + 0x13);
            let bytes: Vec<String> = (0..4).map(|i| format!("{:02x}", pattern(i))).collect();
            let bytes = format!("{DATA:#x}: {}", bytes.join(" "));
            let wanted = [
                "tid = 0x0001",
                "tid = 0x0002",
                "* thread #1: tid = 0x0004",
                &rip,
                &bytes,
                "memory read failed",
                "frame #0:",
                REFUSED,
                "stop reason = this is a crash dump",
                "Failed to write register",
                "(QEMU-compatible",
                "is readable\n",
                "detached",
            ];
            let wanted = wanted.map(|text| if text == "is readable\n" { "readable" } else { text });
            assert_has(&program, &said, &wanted);
            // Once or twice for each of three: one that takes the stop for a step's end goes on for ever.
            assert!((3..=6).contains(&said.matches(REFUSED).count()), "{}: {said}", program.display());
            let lists = said.matches("* thread #1: tid = 0x0004").count();
            assert_eq!(lists, 2, "the selected thread stays, {}: {said}", program.display());
            for artefact in ["lost connection", "Process 1 exited", "is running"] {
                assert!(!said.contains(artefact), "{}: {artefact} in {said}", program.display());
            }
        }
    }
}

/// The first complete dump of a set that was taken with KASLR offset and registers.
fn some_set() -> Option<lab::Set> {
    let sets = lab::sets()?;
    sets.into_iter().find(|set| set.registers().is_some() && !set.json["truth"]["ram"].is_null())
}

fn kstub_gdb(program: &Path, dump: &[OsString], options: &[OsString], commands: &[&str]) -> String {
    let mut arguments: Vec<OsString> = vec!["gdb".into(), "--gdb".into(), program.into()];
    arguments.extend(options.iter().chain(dump).cloned());
    arguments.extend(["--", "-nx", "-batch"].map(OsString::from));
    arguments.extend(commands.iter().flat_map(|command| ["-ex".into(), (*command).into()]));
    printed(Path::new(KSTUB), &arguments)
}

#[test]
fn on_a_real_dump_commands_are_about_the_selected_thread_too() {
    let Some(set) = some_set() else { return };
    let dump = set.dumps().into_iter().find(|dump| dump.complete).unwrap();
    for program in gdbs() {
        let commands = [
            "info threads",
            "thread 2",
            "monitor regs",
            "thread 3",
            "monitor why $rip",
            "thread apply all bt 3",
            "monitor regs",
            "thread apply all monitor why $rsp",
            "monitor regs",
        ];
        let said = kstub_gdb(&program, &[dump.path.clone().into()], &[], &commands);
        let cpus = u32::try_from(set.json["smp"].as_u64().unwrap()).unwrap();
        let wanted: Vec<u32> = [1, 2, 2].into_iter().chain((0..cpus).rev()).chain([2]).collect();
        assert_eq!(answered_for(&said), wanted, "{}: {said}", program.display());
    }
}

/// A raw image has no registers at all, and gdb refuses a target without a pc.
#[test]
fn gdb_works_on_raw_memory_and_is_told_that_the_pc_is_none() {
    let Some(set) = some_set() else { return };
    let image = |ram: &serde_json::Value| {
        let mut argument = set.dir.join(ram["file"].as_str().unwrap()).into_os_string();
        argument.push(format!("@{}", ram["start"].as_str().unwrap()));
        argument
    };
    let images: Vec<OsString> = set.json["truth"]["ram"].as_array().unwrap().iter().map(image).collect();
    let vmlinux = lab::root().join(set.json["vmlinux"].as_str().unwrap());
    let commands = [
        "info threads",
        "bt",
        "p init_task.comm",
        "p linux_banner",
        "x/i schedule",
        "p $rsp",
        "monitor regs",
        "monitor log",
        "monitor info",
        "thread 2",
        "p init_task.pid",
    ];
    for program in gdbs() {
        let said = kstub_gdb(&program, &images, &["--vmlinux".into(), vmlinux.clone().into()], &commands);
        let banner = format!("\"Linux version {}", set.json["release"].as_str().unwrap());
        let wanted = [
            "registers not saved, pc is a placeholder)",
            "#0  ",
            "\"swapper",
            &banner,
            "<schedule>:",
            "<unavailable>",
            "(derived as a placeholder",
            "] Linux version",
            "(registers not saved, pc is a placeholder)\n",
        ];
        assert_has(&program, &said, &wanted);
        assert_eq!(said.matches("Thread 1.1 ").count(), 1, "{}: {said}", program.display());
        assert!(!said.contains("No threads") && !said.contains("PC register is not available"), "{said}");
    }
}
