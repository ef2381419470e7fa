//! A guest and its dump are one machine: every command answers the same on both, but for what the table here names with
//! its reason. And how `dump` treats the guest, the file, and those who use the guest meanwhile.
//!
//! Truth is QEMU: its own copy of RAM (`pmemsave`), its registers, its events, the guest's heartbeat, and what the guest
//! says that it has planted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "support/rsp_client.rs"]
mod rsp_client;
#[path = "live_dump/same.rs"]
mod same;
mod support;

use kstub::addr::PhysAddr;
use kstub::backend::Dump;
use kstub::command::COMMANDS;
use kstub::memory::PhysicalMemory;
use rsp_client::{RspClient, from_hex, packet, to_hex};
use same::{EXCLUDED, Planted, command_lines, unexplained};
use serde_json::Value;
use std::collections::BTreeSet;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use support::gdb_session::KSTUB;
use support::live::{Ended, Gdb, Guest, PATIENCE, Plan, checks, finish, number, wait_until};

/// Several CPUs, RAM in a file, two page tables for each process; one more QMP socket, which passes no descriptors.
#[test]
fn four_cpus_and_their_dumps() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let tcp = format!("tcp:127.0.0.1:{port},server=on,wait=off");
    let plan = Plan::new("6.1").cpus(4).pti(true).shared_ram().argument("-qmp").argument(&tcp);
    let Some(guest) = plan.boot() else { return };
    checks(
        &guest,
        &[
            ("the same guest", same_guest),
            ("a guest that runs", running),
            ("kstub is killed", killed),
            ("refusals", refusals),
            ("no room", no_room),
            ("gdb", in_gdb),
            ("gdb --no-stop", no_stop),
            ("clients", clients),
        ],
    );
    guest.settle();
    by_tcp(&guest, &format!("127.0.0.1:{port}"));
}

/// One CPU, RAM in QEMU's own memory, half of it above 4 GiB.
#[test]
fn one_cpu_and_its_dumps() {
    let Some(guest) = Plan::new("6.12").split_ram(256, 128).boot() else { return };
    checks(&guest, &[("the same guest", same_guest), ("a guest that runs", running)]);
}

/// The results of command lines; none may fail.
fn results(said: Ended, lines: &[String]) -> Vec<Value> {
    let answers: Vec<Value> = said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), lines.len(), "{}", said.err);
    let failed: Vec<&Value> = answers.iter().filter(|answer| answer.get("error").is_some()).collect();
    assert!(failed.is_empty() && said.succeeded(), "{failed:#?} {}", said.err);
    answers.into_iter().map(|mut answer| answer["result"].take()).collect()
}

fn on_guest(guest: &Guest, lines: &[String]) -> Vec<Value> {
    results(finish(guest.kstub("run").arg("--json").args(lines)), lines)
}

/// kstub on a dump, with the files that the guest has.
fn on_dump(guest: &Guest, dump: &Path) -> Command {
    let of_guest = guest.kstub("run");
    let mut kstub = Command::new(KSTUB);
    kstub.env_remove("DEBUGINFOD_URLS").arg("run").arg(dump);
    // All but the command and the guest.
    kstub.args(of_guest.get_args().skip(3));
    kstub
}

fn offered(guest: &Guest) -> Vec<String> {
    let answer = guest.qmp("query-dump-guest-memory-capability", serde_json::json!({}));
    let formats = answer["formats"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned());
    formats.filter(|name| name != "win-dmp").collect()
}

/// `kstub run --json 'dump …'`.
fn dump(guest: &Guest, path: &Path, options: &str) -> Ended {
    finish(guest.kstub("run").arg("--json").arg(format!("dump {} {options}", path.display())))
}

/// What it answers if it succeeds.
fn account(ended: Ended) -> Value {
    let text = ended.expect("dump");
    let mut answer: Value = serde_json::from_str(&text).unwrap();
    answer["result"].take()
}

/// Why it failed.
fn refusal(ended: &Ended) -> String {
    assert_eq!(ended.status.and_then(|status| status.code()), Some(1), "{ended:?}");
    let answer: Value = serde_json::from_str(&ended.out).unwrap();
    answer["error"].as_str().unwrap_or_else(|| panic!("{ended:?}")).to_owned()
}

/// A directory for dumps, which must have these files in the end.
fn assert_files(directory: &Path, names: &[&str]) {
    let entries = std::fs::read_dir(directory).unwrap();
    let there: BTreeSet<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(there, names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>());
}

/// The guest's answers and those of its dumps, one guest at one moment.
fn same_guest(guest: &Guest) {
    let threads = guest.ask_facts("plant threads");
    let last = guest.plan.cpus - 1;
    guest.ask(&format!("plant spin-user {last}"));
    if guest.plan.cpus > 2 {
        guest.ask("plant spin-kernel 2");
        guest.ask("plant syscalls 1 busy");
    }
    let (magic, task) = (guest.number("magic.at"), guest.number("tick.task"));
    let planted = Planted { magic, task, pid: number(&threads["pid"]), cpus: guest.plan.cpus };
    let lines = command_lines(&planted);
    let asked: BTreeSet<&str> = lines.iter().map(|line| line.split(' ').next().unwrap()).collect();
    for command in COMMANDS {
        let excluded = EXCLUDED.iter().any(|(name, _)| *name == command.name);
        assert_ne!(
            asked.contains(command.name),
            excluded,
            "'{}': give it arguments, or a reason",
            command.name
        );
    }

    guest.stop();
    let live = on_guest(guest, &lines);
    assert_eq!(on_guest(guest, &lines), live, "a guest that stands answers the same again");
    let (ram, registers) = (guest.ram(), guest.registers());
    let mut formats = offered(guest);
    assert!(formats.iter().any(|name| name == "elf") && formats.len() > 1, "{formats:?}");
    formats.insert(1, "elf --paging".to_owned());
    let directory = tempfile::tempdir().unwrap();
    for format in &formats {
        let path = directory.path().join("vmcore");
        guest.events();
        let said = account(dump(guest, &path, &format!("--force --format {format}")));
        assert_eq!(guest.events(), ["DUMP_COMPLETED"], "{format}: the guest was let run");
        assert_eq!(guest.run_state(), "paused");
        assert_eq!(said["bytes"], path.metadata().unwrap().len());
        assert_eq!(said["kernel"]["release"], guest.release(), "{said}");
        assert_eq!(said["cpus"], guest.plan.cpus);
        assert_eq!(said["guest"]["ran"], false);
        assert_files(directory.path(), &["vmcore"]);

        let (read, unread) = holds(guest, &path, &ram);
        assert_eq!(read, [0; 0], "{format}: pages that the dump has otherwise");
        assert!(
            unread == 0 || format == "elf --paging" && unread < 1 << 20,
            "{format}: {unread:#x} bytes missing"
        );
        let in_dump = results(finish(on_dump(guest, &path).arg("--json").args(&lines)), &lines);
        let wrong = unexplained(&lines, format, &live, &in_dump);
        assert!(
            wrong.is_empty(),
            "{} differences:\n{}",
            wrong.len(),
            wrong[..wrong.len().min(60)].join("\n")
        );
        for (cpu, registers) in registers.iter().enumerate() {
            let line = lines.iter().position(|line| *line == format!("regs {cpu}")).unwrap();
            let rip = &in_dump[line]["registers"]["rip"]["value"];
            assert_eq!(number(rip.as_str().unwrap()), registers["rip"], "{format}: CPU {cpu}");
        }
        let word = lines.iter().position(|line| line.starts_with("rd ") && line.ends_with(" 64")).unwrap();
        assert_eq!(number(in_dump[word]["values"][0].as_str().unwrap()), guest.number("magic"));
        if format == "elf" {
            a_changed_byte_is_seen(guest, &path, &lines, &live, &ram);
        }
    }
    guest.cont();
    guest.assert_alive("after its dumps");
}

/// At which addresses RAM is otherwise in a dump, and how much of it the dump does not have.
fn holds(guest: &Guest, path: &Path, ram: &[u8]) -> (Vec<u64>, u64) {
    const PAGE: usize = 4096;
    // There QEMU saves what a CPU sees, which is also ROM, and dumps RAM.
    const ROMS: std::ops::Range<u64> = 0xa0000..0x100000;
    let dump = Dump::open(path).unwrap();
    let (mut wrong, mut missing, mut buf) = (Vec::new(), 0, [0; PAGE]);
    let pages = guest.ram_ranges().into_iter().flat_map(|(at, len)| (at..at + len).step_by(PAGE));
    for (at, page) in pages.zip(ram.chunks(PAGE)) {
        let filled = dump.read_phys(PhysAddr(at), &mut buf).filled;
        missing += (PAGE - filled) as u64;
        if buf[..filled] != page[..filled] && !ROMS.contains(&at) && wrong.len() < 20 {
            wrong.push(at);
        }
    }
    (wrong, missing)
}

/// The comparison sees one bit of the planted page, in memory and in what commands answer, and another CPU's registers.
fn a_changed_byte_is_seen(guest: &Guest, path: &Path, lines: &[String], live: &[Value], ram: &[u8]) {
    let mut bytes = std::fs::read(path).unwrap();
    let magic = guest.number("magic").to_le_bytes();
    let places: Vec<usize> = memchr::memmem::find_iter(&bytes, &magic).collect();
    assert!(!places.is_empty());
    places.iter().for_each(|&place| bytes[place] ^= 1);
    let changed = path.with_file_name("changed");
    std::fs::write(&changed, bytes).unwrap();
    assert!(!holds(guest, &changed, ram).0.is_empty());
    let only: Vec<usize> = (0..lines.len()).filter(|&index| lines[index].starts_with("rd ")).collect();
    let some: Vec<String> = only.iter().map(|&index| lines[index].clone()).collect();
    let of_guest: Vec<Value> = only.iter().map(|&index| live[index].clone()).collect();
    let in_dump = results(finish(on_dump(guest, &changed).arg("--json").args(&some)), &some);
    let wrong = unexplained(&some, "elf", &of_guest, &in_dump);
    assert!(wrong.iter().any(|text| text.starts_with("rd ") && text.contains("values/0:")), "{wrong:?}");
    std::fs::remove_file(changed).unwrap();
    // Registers of another CPU, or one that the dump should have and has not.
    let regs = |cpu: u32| lines.iter().position(|line| *line == format!("regs {cpu}")).unwrap();
    let (first, last) = (&live[regs(0)], &live[regs(guest.plan.cpus - 1)]);
    let line = ["regs 0".to_owned()];
    if guest.plan.cpus > 1 {
        assert!(
            !unexplained(&line, "elf", std::slice::from_ref(first), std::slice::from_ref(last)).is_empty()
        );
    }
    let mut lacking = first.clone();
    lacking["registers"]["rip"] = serde_json::json!({ "status": "not saved" });
    assert!(!unexplained(&line, "elf", std::slice::from_ref(first), &[lacking]).is_empty());
}

/// A guest that runs is stopped for its dump, once, and runs again; the dump is of one moment.
fn running(guest: &Guest) {
    guest.ask("plant load 2");
    let directory = tempfile::tempdir().unwrap();
    for (format, pause) in [("elf", false), ("kdump-zlib", true)] {
        let path = directory.path().join(format);
        let beat = guest.beat();
        guest.events();
        let line = format!("dump {} --format {format}", path.display());
        let mut kstub = guest.kstub("run");
        let ended = finish(kstub.args(pause.then_some("--pause")).arg("--json").arg(&line));
        let (took, said) = (ended.took, account(ended));
        assert_eq!(guest.events(), ["STOP", "DUMP_COMPLETED", "RESUME"]);
        assert_eq!((&said["guest"]["ran"], &said["guest"]["state"]), (&true.into(), &"running".into()));
        let stood = said["guest"]["stood_ms"].as_f64().unwrap();
        assert!(stood > 0.0 && stood < took.as_secs_f64() * 1e3, "{stood} ms of {took:?}");
        eprintln!("  {format}: the guest stood for {stood:.0} ms");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let commands = ["ps", "info"].map(str::to_owned);
        let answers = results(finish(on_dump(guest, &path).arg("--json").args(&commands)), &commands);
        let tasks = answers[0]["tasks"].as_array().unwrap();
        assert!(tasks.iter().any(|task| task["comm"] == "kstub-tick"), "{}", answers[0]);
        assert_eq!(answers[0]["problems"].as_array().map_or(0, Vec::len), 0, "{}", answers[0]["problems"]);
        guest.assert_alive("after its dump");
        assert!(guest.beat() > beat);
    }
    assert_files(directory.path(), &["elf", "kdump-zlib"]);
    // For people.
    let text = finish(guest.kstub("run").arg(format!("dump {}/again", directory.path().display())));
    let text = text.expect("dump in words");
    for words in ["the guest stood for ", " and runs again", guest.release(), "next: kstub gdb "] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

/// A kstub that is killed leaves no half file, and a guest that goes on once QEMU is done.
fn killed(guest: &Guest) {
    let directory = tempfile::tempdir().unwrap();
    let line = format!("dump {}/vmcore --format kdump-zlib", directory.path().display());
    guest.events();
    let mut kstub = guest.kstub("run").arg(line).stdout(std::process::Stdio::null()).spawn().unwrap();
    assert!(wait_until(PATIENCE, || guest.run_state() == "save-vm" || kstub.try_wait().unwrap().is_some()));
    kstub.kill().unwrap();
    assert!(!kstub.wait().unwrap().success(), "it was done before it was killed");
    guest.assert_alive("after kstub was killed");
    assert_eq!(guest.events(), ["STOP", "DUMP_COMPLETED", "RESUME"]);
    // Where a file needs no name.
    const O_TMPFILE: i32 = 0o20200000;
    let nameless = std::fs::OpenOptions::new().write(true).custom_flags(O_TMPFILE).open(directory.path());
    if nameless.is_ok() {
        assert_files(directory.path(), &[]);
    }
    assert!(!directory.path().join("vmcore").exists());
    account(dump(guest, &directory.path().join("vmcore"), "--format kdump-zlib"));
}

/// What cannot be done is said, once, before the guest is stopped; nothing is left behind, in QEMU neither.
fn refusals(guest: &Guest) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("there");
    std::fs::write(&path, "mine").unwrap();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", guest.pid)).unwrap().count();
    let before = descriptors();
    guest.events();
    let new = directory.path().join("new");
    for (file, options, words) in [
        (path.as_path(), "", "the file exists; --force replaces it"),
        (link.as_path(), "--force", "no plain file"),
        (Path::new("/dev/full"), "--force", "no plain file"),
        (directory.path(), "--force", "no plain file"),
        (Path::new("/no/such/place"), "", "No such file"),
        (new.as_path(), "--format zip", "it has: elf, kdump-zlib"),
        (new.as_path(), "--format win-dmp", "it has: elf, kdump-zlib"),
        (new.as_path(), "--format kdump-zlib --paging", "--paging is for the format elf only"),
        (new.as_path(), "another", "one file"),
        (new.as_path(), "--what", "no option '--what'"),
    ] {
        let ended = dump(guest, file, options);
        let said = refusal(&ended);
        assert!(said.contains(words), "{options}: {said}");
        assert!(ended.err.is_empty(), "{}", ended.err);
    }
    assert_eq!(guest.events(), [""; 0]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    assert_files(directory.path(), &["there", "link"]);
    account(dump(guest, &path, "--force --format kdump-zlib"));
    finish(on_dump(guest, &path).arg("sys")).expect("sys");
    // A dump has nothing to dump.
    let said = finish(on_dump(guest, &path).arg("--json").arg(format!("dump {}", new.display())));
    assert!(refusal(&said).contains("a crash dump already"), "{said:?}");
    assert_files(directory.path(), &["there", "link"]);
    assert!(wait_until(PATIENCE, || descriptors() == before), "QEMU has {} for {before}", descriptors());
}

/// A filesystem that is too small, by far and by a little.
fn no_room(guest: &Guest) {
    let enough = Command::new("unshare").args(["-rm", "true"]).status();
    if !enough.is_ok_and(|status| status.success()) {
        eprintln!("  skipped: no namespaces of one's own here, so no small filesystem");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", guest.pid)).unwrap().count();
    let before = descriptors();
    for (format, words) in
        [("elf", "there is room for 8.0 MiB"), ("kdump-zlib", "the filesystem is full: make room")]
    {
        guest.events();
        let kstub = guest.kstub("run");
        let script = r#"mount -t tmpfs -o size=8m none "$1" && shift && { "$@"; code=$?; ls -A "$DIR" >&2; exit $code; }"#;
        let mut unshare = Command::new("unshare");
        unshare.env("DIR", directory.path()).env_remove("DEBUGINFOD_URLS");
        unshare.args(["-rm", "sh", "-c", script, "sh"]).arg(directory.path());
        unshare.arg(kstub.get_program()).args(kstub.get_args()).arg("--json");
        unshare.arg(format!("dump {}/vmcore --format {format}", directory.path().display()));
        let ended = finish(&mut unshare);
        let said = refusal(&ended);
        assert!(said.contains(words) && said.contains("--format kdump-zlib"), "{said}");
        assert!(!ended.err.contains("vmcore"), "a half file is left: {}", ended.err);
        let events = guest.events();
        match format {
            "elf" => assert_eq!(events, [""; 0], "stopped in vain"),
            // Once, and not again for the error.
            _ => assert_eq!(events, ["STOP", "DUMP_COMPLETED", "RESUME"]),
        }
        guest.assert_alive("after a dump that failed");
    }
    assert!(wait_until(PATIENCE, || descriptors() == before), "QEMU has {} for {before}", descriptors());
    account(dump(guest, &directory.path().join("vmcore"), "--format kdump-zlib"));
    assert_files(directory.path(), &["vmcore"]);
}

/// Under gdb the guest stands before and after; breakpoints go on counting, and are not in the dump.
fn in_gdb(guest: &Guest) {
    guest.ask("plant syscalls 0 busy");
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("set breakpoint always-inserted on");
    gdb.ask("break do_sysinfo");
    let hit = gdb.ask("continue");
    assert!(hit.contains("do_sysinfo"), "{hit}");
    let value = |gdb: &mut Gdb, expression: &str| gdb.ask(expression).rsplit(' ').next().unwrap().to_owned();
    let pc = value(&mut gdb, "p/x (unsigned long)$pc");
    let byte = value(&mut gdb, "p/x *(unsigned char *)$pc");
    let (registers, ram) = (guest.registers(), guest.ram());
    guest.events();
    let said = gdb.ask(&format!("monitor dump {} --format kdump-zlib", file("vmcore").display()));
    assert!(said.contains("the guest stood before, and still does"), "{said} {}", gdb.everything());
    assert!(said.contains(&format!("kernel {} found", guest.release())), "{said}");
    assert_eq!(guest.events(), ["DUMP_COMPLETED"]);
    guest.assert_stands("after a dump in gdb");
    assert_eq!(guest.registers(), registers);
    assert_eq!(holds(guest, &file("vmcore"), &ram).0, [0; 0]);
    // Where the breakpoint is there is what the vmlinux has.
    let here = [format!("rd -8 {:x} 1", number(&pc))];
    let answers = results(finish(on_dump(guest, &file("vmcore")).arg("--json").args(&here)), &here);
    assert_eq!(number(answers[0]["values"][0].as_str().unwrap()), number(&byte), "{answers:?}");
    assert_ne!(number(&byte), 0xcc);
    // It is put back.
    let again = gdb.ask("continue");
    assert!(again.contains("Breakpoint 1, "), "{again}");
    // gdb's own `dump` is gdb's; kstub's is also behind the prefix.
    gdb.ask(&format!("dump binary memory {} linux_banner (char*)linux_banner+13", file("banner").display()));
    assert_eq!(std::fs::read(file("banner")).unwrap(), b"Linux version");
    let said = gdb.ask(&format!("kstub dump {}", file("elf").display()));
    assert!(said.contains("still does"), "{said}");
    let said = gdb.ask(&format!("monitor dump {}", file("elf").display()));
    assert!(said.contains("--force replaces it"), "{said}");
    assert_files(directory.path(), &["vmcore", "banner", "elf"]);
    gdb.quit();
    assert!(wait_until(PATIENCE, || guest.run_state() == "running"));
    guest.assert_alive("after gdb has left");
}

fn no_stop(guest: &Guest) {
    let directory = tempfile::tempdir().unwrap();
    guest.events();
    let mut gdb = Gdb::start(guest, &["--no-stop"]);
    let said = gdb.ask(&format!("monitor dump {}/vmcore", directory.path().display()));
    assert!(said.contains("QEMU stops the guest") && said.contains("--no-stop"), "{said}");
    gdb.quit();
    assert_eq!(guest.events(), [""; 0]);
    assert_files(directory.path(), &[]);
}

/// Who reads while another's guest runs can have it dumped, and the other notices nothing; who comes by TCP cannot.
fn clients(guest: &Guest) {
    let directory = tempfile::tempdir().unwrap();
    let (socket, path) = (guest.path("kstub-dump"), directory.path().join("vmcore"));
    let order = format!("dump {} --format kdump-zlib", path.display());
    {
        let mut server = Served::start(guest, &format!("unix:{}", socket.display()));
        assert!(wait_until(PATIENCE, || socket.exists() || !server.runs()));
        let mut owner = RspClient::unix(&socket).like_gdb();
        let stop = owner.ask("?");
        assert!(stop.starts_with('T'), "{stop}");
        owner.send_raw(&packet("vCont;c"));
        assert!(wait_until(PATIENCE, || guest.run_state() == "running"));
        guest.assert_alive("let run");
        guest.events();
        let said = monitor(&mut RspClient::unix(&socket).like_gdb(), &order);
        assert!(said.contains(" and runs again"), "{said}");
        assert_eq!(guest.events(), ["STOP", "DUMP_COMPLETED", "RESUME"]);
        guest.assert_alive("after another's dump");
        // The next that it hears is the stop that it asks for.
        owner.send_raw(b"\x03");
        let stop = String::from_utf8(owner.receive().unwrap()).unwrap();
        assert!(stop.starts_with("T02"), "{stop}");
        guest.assert_stands("stopped by its owner");
        assert_eq!(owner.ask("D"), "OK");
        assert!(wait_until(PATIENCE, || guest.run_state() == "running"));
    }
    assert_files(directory.path(), &["vmcore"]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let mut server = Served::start(guest, &address);
    assert!(wait_until(PATIENCE, || std::net::TcpStream::connect(&address).is_ok() || !server.runs()));
    let said = monitor(&mut RspClient::tcp(&address).like_gdb(), &format!("{order} --force"));
    assert!(said.contains("clients of a TCP port may be anybody"), "{said}");
    drop(server);
    guest.assert_alive("after all");
}

/// What a monitor command prints.
fn monitor(client: &mut RspClient, command: &str) -> String {
    client.send_raw(&packet(format!("qRcmd,{}", to_hex(command.as_bytes()))));
    let mut text = Vec::new();
    loop {
        let answer = String::from_utf8(client.receive().expect("the server closed")).unwrap();
        match answer.strip_prefix('O') {
            Some(more) if more != "K" => text.extend(from_hex(more)),
            Some(_) => break,
            None => {
                text.extend(from_hex(&answer));
                break;
            }
        }
    }
    String::from_utf8(text).unwrap()
}

/// `kstub serve`, which ends as a user ends it.
struct Served(std::process::Child);

impl Served {
    fn start(guest: &Guest, listen: &str) -> Self {
        let log = std::fs::File::create(guest.path("serve.log")).unwrap();
        let mut kstub = guest.kstub("serve");
        kstub.args(["--listen", listen]).stdin(std::process::Stdio::null()).stdout(log.try_clone().unwrap());
        Self(kstub.stderr(log).spawn().unwrap())
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        support::live::kill(self.0.id(), "TERM");
        let _ = self.0.wait();
    }
}

/// Where no descriptor can be passed QEMU opens the file itself.
fn by_tcp(guest: &Guest, address: &str) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vmcore");
    let of_guest = guest.kstub("run");
    let mut kstub = Command::new(KSTUB);
    kstub.env_remove("DEBUGINFOD_URLS").args(["run", "--qemu", address]);
    kstub.args(of_guest.get_args().skip(3)).arg("--json");
    let ended = finish(kstub.arg(format!("dump {} --format kdump-zlib", path.display())));
    eprintln!("  by TCP: {:.1} s", ended.took.as_secs_f64());
    let said = account(ended);
    assert_eq!(said["kernel"]["release"], guest.release());
    assert_eq!(said["bytes"], path.metadata().unwrap().len());
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_files(directory.path(), &["vmcore"]);
    guest.assert_alive("after a dump by TCP");
}
