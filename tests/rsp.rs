//! Real sockets and, where installed, a real gdb, against a server over a fake machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "support/fake_machine.rs"]
mod fake_machine;
#[path = "support/rsp_client.rs"]
mod rsp_client;

use fake_machine::{BULK, BULK_PAGES, DATA, DEFECT, OWN, fake_machine, pattern};
use kstub::gdb::Files;
use kstub::gdb::Show;
use kstub::server::{Debugger, Listen, gdb, serve};
use rsp_client::{RspClient, from_hex, packet};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// A server that lives as long as the test process; its address.
fn server(listen: &str) -> String {
    let listen = Listen::parse(listen, false).unwrap();
    let (ready, address) = mpsc::channel();
    std::thread::spawn(move || {
        serve(fake_machine(), Files::none(), listen, |address| ready.send(address.to_owned()).unwrap())
    });
    address.recv_timeout(Duration::from_secs(10)).expect("the server is ready")
}

#[test]
fn a_session_over_tcp_and_over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kstub.sock");
    let unix = server(&format!("unix:{}", path.display()));
    assert_eq!(Path::new(&unix), path);
    for mut client in [RspClient::tcp(&server("127.0.0.1:0")).like_gdb(), RspClient::unix(&path).like_gdb()] {
        assert_eq!(client.ask("?"), "T05thread:p1.4;");
        assert_eq!(from_hex(&client.ask(format!("m{OWN:x},f"))), b"memory of CPU 3");
        assert_eq!(client.ask("D;1"), "OK");
        assert_eq!(client.receive(), None, "the server closes after detach");
    }
}

#[test]
fn large_reads_are_whole() {
    let address = server(":0");
    let client = || RspClient::tcp(&address).like_gdb();
    let wanted: Vec<u8> = (0..BULK_PAGES * 4096).map(pattern).collect();
    let ways =
        [(client(), false), (client(), true), (client().with_runs(), false), (client().with_runs(), true)];
    for (mut client, binary) in ways {
        let mut bytes = Vec::new();
        while bytes.len() < wanted.len() {
            let (at, left) = (BULK + bytes.len() as u64, wanted.len() - bytes.len());
            let part = match binary {
                false => from_hex(&client.ask(format!("m{at:x},{left:x}"))),
                true => client.ask_bytes(format!("x{at:x},{left:x}"))[1..].to_vec(),
            };
            assert!(!part.is_empty());
            bytes.extend(part);
        }
        assert!(bytes == wanted, "binary: {binary}");
    }
}

#[test]
fn requests_sent_in_one_go_are_all_answered() {
    let mut client = RspClient::tcp(&server(":0")).like_gdb();
    let asked = ["qC", "Hgp1.1", "qC", "?", "qC"].map(packet);
    client.send_raw(&asked.join(&b"\n\x03+"[..]));
    // A stop reply's thread is selected, as if by `Hg`.
    for answer in ["QCp1.4", "OK", "QCp1.1", "T05thread:p1.4;", "QCp1.4"] {
        assert_eq!(client.receive().unwrap(), answer.as_bytes());
    }
}

#[test]
fn clients_do_not_see_each_other() {
    let address = server(":0");
    let mut one = RspClient::tcp(&address).like_gdb();
    let mut two = RspClient::tcp(&address).like_gdb();
    assert_eq!(one.ask("Hgp1.1"), "OK");
    assert_eq!(one.ask("Qqemu.PhyMemMode:1"), "OK");
    assert_eq!(two.ask("qC"), "QCp1.4");
    assert_eq!(two.ask("qqemu.PhyMemMode"), "0");
    // Killing the dump is leaving it.
    assert_eq!(one.ask("vKill;1"), "OK");
    assert_eq!(two.ask("qC"), "QCp1.4");
    assert_eq!(RspClient::tcp(&address).like_gdb().ask("qC"), "QCp1.4");
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let mut client = RspClient::tcp(&address).like_gdb();
            std::thread::spawn(move || {
                (0..200).all(|_| client.ask(format!("m{DATA:x},2000")).len() == 0x4000)
            })
        })
        .collect();
    assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
}

#[test]
fn a_client_that_stalls_floods_or_vanishes_holds_up_nobody() {
    let address = server(":0");
    let mut stalled = RspClient::tcp(&address).like_gdb();
    // Asks for 64 KiB over and over and reads nothing, until nothing more can be sent.
    let flood = std::thread::spawn(move || {
        let request = packet(format!("m{BULK:x},7000")).repeat(64);
        for _ in 0..64 {
            if !stalled.try_send_raw(&request) {
                break;
            }
        }
        stalled
    });
    let mut half_a_packet = RspClient::tcp(&address);
    half_a_packet.send_raw(b"$qSuppo");
    for _ in 0..20 {
        let mut vanished = RspClient::tcp(&address).like_gdb();
        vanished.send_raw(&packet(format!("m{BULK:x},7000")));
        drop(vanished);
    }
    let mut giant = RspClient::tcp(&address).like_gdb();
    giant.send_raw(b"$");
    (0..100).for_each(|_| giant.send_raw(&[b'a'; 100_000]));
    giant.send_raw(b"#00");
    assert_eq!(giant.receive().unwrap(), b"E07");
    assert_eq!(giant.ask("qC"), "QCp1.4");
    let started = Instant::now();
    let mut client = RspClient::tcp(&address).like_gdb();
    (0..100).for_each(|_| assert_eq!(client.ask(format!("m{DATA:x},1000")).len(), 0x2000));
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    drop(client);
    // Whether it is still stuck does not matter to anyone.
    drop(flood);
}

#[test]
fn a_defect_ends_one_session_only() {
    let address = server(":0");
    let mut other = RspClient::tcp(&address).like_gdb();
    let mut victim = RspClient::tcp(&address).like_gdb();
    victim.send_raw(&packet(format!("m{DEFECT:x},8")));
    assert_eq!(victim.receive(), None);
    assert_eq!(other.ask("qC"), "QCp1.4");
    assert_eq!(RspClient::tcp(&address).like_gdb().ask("qC"), "QCp1.4");
}

/// gdb's output for some commands, or `None` where there is no gdb.
fn run_gdb(address: &str, commands: &[&str]) -> Option<String> {
    let mut gdb = Command::new("gdb");
    gdb.args([
        "-nx",
        "-q",
        "-batch",
        "-ex",
        "set remotetimeout 120",
        "-ex",
        "set pagination off",
        "-ex",
        "set confirm off",
    ]);
    gdb.args(["-ex".to_owned(), format!("target remote {address}")]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let output = match gdb.output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: no gdb");
            return None;
        }
        Err(error) => panic!("gdb: {error}"),
    };
    Some(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn gdb_sees_threads_registers_and_memory() {
    let commands = [
        "info threads",
        "info registers rax cr0 cr3 eflags",
        "p $xmm0.uint128",
        "p/x $gs_base",
        "x/2gx 0xffff888000101ff0",
        "x/2gx 0xffff888000101ff8",
        "thread 2",
        "p $rax",
        "p $rip",
        "x/s 0x7fff00000000",
        "thread 1",
        "x/s 0x7fff00000000",
        "monitor no-such-command",
    ];
    let Some(said) = run_gdb(&server(":0"), &commands) else { return };
    for wanted in [
        "* 3    Thread 1.4 \"bash\" (CPU 3, pid 231, panicked here)",
        "cr0            0x80050033          [ PE MP ET NE WP AM PG ]",
        "eflags         0x246               [ PF ZF IF IOPL=0 ]",
        "0x1a1a1a1a1a1a1a2a",
        "Cannot access memory at address 0xffff888000102000",
        "<unavailable>",
        "\"memory of CPU 1\"",
        "\"memory of CPU 0\"",
        "no-such-command",
    ] {
        assert!(said.contains(wanted), "{wanted}\n{said}");
    }
}

#[test]
fn gdb_is_refused_politely() {
    let commands = [
        "thread 2",
        "continue",
        "stepi",
        "break *0xffffffff9a000020",
        "continue",
        "delete",
        "set $rip=1",
        "set var *(int*)0xffff888000100000=1",
        "p $_thread",
        "info threads",
        "kill",
    ];
    let Some(said) = run_gdb(&server(":0"), &commands) else { return };
    for wanted in [
        "This is a crash dump: it cannot run or step.",
        "Cannot insert breakpoint 1.",
        "this is a crash dump, its registers cannot be changed",
        "Cannot access memory at address 0xffff888000100000",
        "$1 = 2",
        "killed]",
    ] {
        assert!(said.contains(wanted), "{wanted}\n{said}");
    }
    for artefact in
        ["Remote failure", "Packet", "packet", "SIGTRAP", "without sending a thread-id", "timeout"]
    {
        assert!(!said.contains(artefact), "{artefact}\n{said}");
    }
}

#[test]
fn gdb_dumps_memory_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bulk");
    let dump = format!("dump binary memory {} {BULK:#x} {:#x}", file.display(), BULK + BULK_PAGES * 4096);
    let Some(said) = run_gdb(&server(":0"), &[&dump]) else { return };
    let bytes = std::fs::read(&file).unwrap_or_else(|error| panic!("{error}\n{said}"));
    assert!(bytes == (0..BULK_PAGES * 4096).map(pattern).collect::<Vec<_>>());
}

#[test]
fn the_debugger_is_started_with_our_socket() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("fake-gdb");
    // Stands in for gdb: its last argument is the user's, the one before is ours.
    std::fs::write(&script, "#!/bin/sh\nfor a; do case $a in 'target remote '*) s=${a#target remote };; esac; done\n[ -S \"$s\" ] && [ \"$(stat -c %a \"$s\")\" = 600 ] && echo \"$s\" > \"$0.seen\" && exit 7\nexit 1\n").unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let debugger = Debugger {
        program: script.clone(),
        libraries: None,
        vmlinux: None,
        show: Show::default(),
        args: vec!["-batch".into()],
    };
    assert_eq!(gdb(fake_machine(), &debugger).unwrap(), 7);
    let socket = std::fs::read_to_string(dir.path().join("fake-gdb.seen")).unwrap();
    assert!(!Path::new(socket.trim()).exists() && !Path::new(socket.trim()).parent().unwrap().exists());
    let missing = Debugger {
        program: dir.path().join("none"),
        libraries: None,
        vmlinux: None,
        show: Show::default(),
        args: vec![],
    };
    let error = gdb(fake_machine(), &missing).unwrap_err().to_string();
    assert!(error.contains("install gdb"), "{error}");
}
