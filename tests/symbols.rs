//! Symbols without being asked for: how gdb gets at the vmlinux, and how kstub finds it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

#[path = "support/fake_machine.rs"]
mod fake_machine;
#[path = "support/rsp_client.rs"]
mod rsp_client;

use fake_machine::{TEXT, fake_machine};
use kstub::debuginfo::DebugInfo;
use kstub::gdb::Files;
use kstub::server::{self, Listen};
use rsp_client::{RspClient, to_hex};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use support::elf_file::{self, skip};
use support::lab::{self, Set};
use support::tiny_kernel::TinyKernel;

const KSTUB: &str = env!("CARGO_BIN_EXE_kstub");
const ID: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER_ID: &str = "00000000000000000000000000000000000000ff";

// ---------------------------------------------------------------- a server and its gdbs

/// Serves the fake machine with `files` on a socket in `dir`, until the tests end.
fn serve_fake(dir: &Path, files: Files) -> PathBuf {
    let socket = dir.join("socket");
    let listen = Listen::Unix(socket.clone());
    let (ready, wait) = mpsc::channel();
    std::thread::spawn(move || server::serve(fake_machine(), files, listen, |_| ready.send(()).unwrap()));
    wait.recv_timeout(Duration::from_secs(20)).unwrap();
    socket
}

/// The gdbs at hand: the system's, and the lab's newer one.
fn gdbs() -> Vec<PathBuf> {
    let newer = lab::root().join("tools/bin/gdb-new");
    let gdbs = [PathBuf::from("gdb"), newer].into_iter();
    let gdbs: Vec<PathBuf> = gdbs
        .filter(|gdb| Command::new(gdb).arg("--version").stdout(Stdio::null()).status().is_ok())
        .collect();
    if gdbs.is_empty() {
        skip("there is no gdb");
    }
    gdbs
}

/// What a gdb prints that was given no file and connects to `address`.
fn bare(gdb: &Path, before: &[&str], address: &str, commands: &[&str]) -> String {
    let mut command = Command::new(gdb);
    command.args(["-nx", "-batch", "-q"]).env_remove("DEBUGINFOD_URLS");
    command.args(["-iex", "set index-cache enabled on", "-iex", "set style enabled off"]);
    for line in before {
        command.args(["-iex", line]);
    }
    command.args(["-ex", &format!("target remote {address}")]);
    for line in commands {
        command.args(["-ex", line]);
    }
    let output = command.current_dir("/").stdin(Stdio::null()).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// `kstub serve` as a user runs it.
struct Served {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl Served {
    fn start(dump: &Path, arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listen = format!("unix:{}", dir.path().join("socket").display());
        Self::listening(dir, dump, &listen, arguments)
    }

    fn start_on(dump: &Path, listen: &str, arguments: &[&str]) -> Self {
        Self::listening(tempfile::tempdir().unwrap(), dump, listen, arguments)
    }

    fn listening(dir: tempfile::TempDir, dump: &Path, listen: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new(KSTUB)
            .arg("serve")
            .arg(dump)
            .args(["--listen", listen])
            .args(arguments)
            .env("XDG_CACHE_HOME", dir.path())
            .env_remove("DEBUGINFOD_URLS")
            .env_remove("KSTUB_DEBUG_DIR")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stderr.take().unwrap()).lines().map(|line| line.unwrap());
        let mut served = Self { child, address: String::new(), _dir: dir };
        let address = |line: String| Some(line.split_once("target remote ")?.1.to_owned());
        served.address = { said }.find_map(address).expect("the server is ready");
        served
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// ---------------------------------------------------------------- gdb and a small program

/// Addresses as KASLR moved them; the program is linked elsewhere.
fn moved(info: &DebugInfo, symbol: &str) -> String {
    let slide = TEXT - info.first_load().unwrap();
    assert_ne!(slide, 0);
    format!("{:#x} <{symbol}>", info.symbol(symbol).unwrap().addr + slide)
}

fn assert_symbols(printed: &str, info: &DebugInfo, with: &str) {
    for symbol in ["planted", "planted_constant", "planted_zero", "planted_function"] {
        assert!(printed.contains(&moved(info, symbol)), "{with}: no {} in:\n{printed}", moved(info, symbol));
    }
}

const PRINT: [&str; 5] = [
    "info symbol planted",
    "output/a &planted",
    "output/a &planted_constant",
    "output/a &planted_zero",
    "output/a &planted_function",
];

#[test]
fn a_bare_gdb_opens_the_named_file_itself() {
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = elf_file::vmlinux(&dir.path().join("some name"), ID) else { return };
    let info = DebugInfo::open(&path).unwrap();
    let socket = serve_fake(dir.path(), Files::local(Some(&info)));
    for gdb in gdbs() {
        let printed = bare(&gdb, &[], socket.to_str().unwrap(), &[&PRINT[..], &["ptype planted"]].concat());
        assert_symbols(&printed, &info, &format!("{gdb:?}"));
        assert!(printed.contains("struct planted_type"), "{gdb:?}: no types in:\n{printed}");
    }
}

/// Once the file is served its path is gone: whatever gdb shows has come through the connection.
#[test]
fn a_gdb_on_another_machine_gets_symbols_and_then_debug_info() {
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = elf_file::vmlinux(&dir.path().join("vmlinux"), ID) else { return };
    let info = DebugInfo::open(&path).unwrap();
    let socket = serve_fake(dir.path(), Files::serve(Some(&info)).unwrap());
    std::fs::remove_file(&path).unwrap();
    for gdb in gdbs() {
        let commands = [&PRINT[..], &["ptype planted", "info line planted_function"]].concat();
        let printed = bare(&gdb, &[], socket.to_str().unwrap(), &commands);
        assert_symbols(&printed, &info, &format!("{gdb:?}"));
        assert!(printed.contains("struct planted_type"), "{gdb:?}: no types in:\n{printed}");
        assert!(printed.contains("Line 7 of"), "{gdb:?}: no lines in:\n{printed}");
        // A gdb that looks for debug files nowhere has the symbols all the same, and nothing else.
        let printed = bare(
            &gdb,
            &["set debug-file-directory"],
            socket.to_str().unwrap(),
            &[&PRINT[..], &["ptype planted"]].concat(),
        );
        for symbol in ["planted", "planted_function"] {
            assert!(printed.contains(&moved(&info, symbol)), "{gdb:?}: {printed}");
        }
        assert!(!printed.contains("struct planted_type"), "{gdb:?}: debug info came unasked:\n{printed}");
    }
}

#[test]
fn without_a_vmlinux_gdb_says_where_to_ask_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    for (name, files) in [("local", Files::local(None)), ("serve", Files::serve(None).unwrap())] {
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let socket = serve_fake(&dir, files);
        for gdb in gdbs() {
            let printed = bare(&gdb, &[], socket.to_str().unwrap(), &["p/x $pc"]);
            assert!(printed.contains("warning: vmlinux of this kernel ('monitor info' says"), "{printed}");
            assert!(!printed.contains("does not support"), "{printed}");
            assert!(printed.contains(&format!("$1 = {:#x}", TEXT + 0x13)), "{printed}");
        }
    }
}

// ---------------------------------------------------------------- the packets

/// Reads a whole file through `vFile`, by requests of different sizes.
fn read_file(client: &mut RspClient, name: &str) -> Vec<u8> {
    let opened = client.ask(format!("vFile:open:{},0,1c0", to_hex(name.as_bytes())));
    let handle = opened.strip_prefix('F').unwrap_or_else(|| panic!("{name}: {opened}")).to_owned();
    let mut file = Vec::new();
    for size in (1..).map(|i| (i * 977) % 0x9000 + 1) {
        let reply = client.ask_bytes(format!("vFile:pread:{handle},{size:x},{:x}", file.len()));
        let semicolon = reply.iter().position(|&b| b == b';').unwrap();
        let n = usize::from_str_radix(std::str::from_utf8(&reply[1..semicolon]).unwrap(), 16).unwrap();
        assert_eq!(reply.len() - semicolon - 1, n);
        if n == 0 {
            break;
        }
        file.extend_from_slice(&reply[semicolon + 1..]);
    }
    assert_eq!(client.ask(format!("vFile:close:{handle}")), "F0");
    file
}

#[test]
fn only_what_kstub_has_named_is_served_and_only_to_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = elf_file::vmlinux(&dir.path().join("vmlinux"), ID) else { return };
    let info = DebugInfo::open(&path).unwrap();
    let socket = serve_fake(dir.path(), Files::serve(Some(&info)).unwrap());
    let mut client = RspClient::unix(&socket).like_gdb();
    let name = path.to_str().unwrap();
    let open = |name: &str| format!("vFile:open:{},0,1c0", to_hex(name.as_bytes()));

    assert_eq!(client.ask("qXfer:exec-file:read:1:0,1000"), format!("l{name}"));
    assert_eq!(client.ask("qXfer:exec-file:read::1,4"), format!("m{}", &name[1..5]));
    let parent = dir.path().to_str().unwrap();
    for other in [
        "/etc/passwd",
        "",
        "/",
        parent,
        &format!("{parent}/./vmlinux"),
        &format!("{parent}/../{}/vmlinux", dir.path().file_name().unwrap().to_str().unwrap()),
        &format!("{name}\0"),
        &name[1..],
        &format!("/usr/lib/debug/.build-id/{}/{}.debug", &OTHER_ID[..2], &OTHER_ID[2..]),
        &format!("{}/{}.debug", &ID[..2], &ID[2..]),
        &format!("/.build-id/{}/{}.debug", &ID[..2], &ID[2..]),
    ] {
        assert_eq!(client.ask(open(other)), "F-1,2", "{other}");
    }
    // O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
    for flags in ["1", "2", "200", "400"] {
        assert_eq!(client.ask(format!("vFile:open:{},{flags},1c0", to_hex(name.as_bytes()))), "F-1,1e");
    }
    for (request, answer) in [
        ("vFile:setfs:0", "F0"),
        ("vFile:open:zz,0,0", "F-1,16"),
        ("vFile:open:", "F-1,16"),
        ("vFile:pread:0,10,0", "F-1,9"),
        ("vFile:fstat:ffffffffffffffff", "F-1,9"),
        ("vFile:close:0", "F-1,9"),
        ("vFile:close:-1", "F-1,9"),
        ("vFile:pwrite:0,0,x", "F-1,1e"),
        ("vFile:unlink:2f", "F-1,1e"),
        ("vFile:nonsense:1", ""),
    ] {
        assert_eq!(client.ask(request), answer, "{request}");
    }
    for handle in 0..16 {
        assert_eq!(client.ask(open(name)), format!("F{handle:x}"));
    }
    assert_eq!(client.ask(open(name)), "F-1,17", "open files are bounded");
    assert_eq!(client.ask("vFile:close:3"), "F0");
    assert_eq!(client.ask(open(name)), "F3");
    assert_eq!(client.ask("vFile:pread:0,10,ffffffffffffffff"), "F0;");
    let read = client.ask_bytes("vFile:pread:0,ffffffffffff,0");
    assert!(read.len() <= 0x10000, "a reply stays within the packet size");

    // Without being asked to serve, kstub does not know these packets at all.
    let dir = tempfile::tempdir().unwrap();
    let socket = serve_fake(dir.path(), Files::local(Some(&info)));
    let mut client = RspClient::unix(&socket).like_gdb();
    assert_eq!(client.ask(open(name)), "");
    assert_eq!(client.ask("qXfer:exec-file:read:1:0,1000"), format!("l{name}"));
}

fn tool(program: &str, arguments: &[&str], file: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.is_empty(), "{program} {}: {said}", file.display());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// binutils' view of `stripped` against `original`.
fn compare_stripped(original: &Path, stripped: &Path) {
    assert!(!tool("readelf", &["-SW"], stripped).contains(".debug_"), "debug info is left");
    for arguments in [&["-lW"][..], &["-nW"]] {
        assert_eq!(
            tool("readelf", arguments, original),
            tool("readelf", arguments, stripped),
            "{arguments:?}"
        );
    }
    let symbols = |path| tool("nm", &["-n"], path);
    assert_eq!(symbols(original), symbols(stripped));
    assert!(symbols(stripped).lines().count() > 3);
}

#[test]
fn the_served_file_is_the_vmlinux_without_debug_info_and_the_debug_file_is_the_vmlinux() {
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = elf_file::vmlinux(&dir.path().join("vmlinux"), ID) else { return };
    let info = DebugInfo::open(&path).unwrap();
    let socket = serve_fake(dir.path(), Files::serve(Some(&info)).unwrap());
    let mut client = RspClient::unix(&socket).like_gdb();
    let stripped = dir.path().join("stripped");
    let bytes = read_file(&mut client, path.to_str().unwrap());
    std::fs::write(&stripped, &bytes).unwrap();
    compare_stripped(&path, &stripped);
    // fstat and stat tell the size, big-endian, behind seven words.
    let stat = client.ask_bytes(format!("vFile:stat:{}", to_hex(path.to_str().unwrap().as_bytes())));
    let stat = stat.strip_prefix(b"F40;").unwrap();
    assert_eq!(stat.len(), 64);
    assert_eq!(u64::from_be_bytes(stat[28..36].try_into().unwrap()), bytes.len() as u64);
    for place in ["/usr/lib/debug", "/opt/gdb/lib/debug"] {
        let debug = read_file(&mut client, &format!("{place}/.build-id/{}/{}.debug", &ID[..2], &ID[2..]));
        assert_eq!(debug, std::fs::read(&path).unwrap());
    }
}

#[test]
fn a_damaged_vmlinux_is_refused_or_stripped_to_something_of_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = elf_file::vmlinux(&dir.path().join("vmlinux"), ID) else { return };
    let whole = std::fs::read(&path).unwrap();
    let mut rng = support::Rng::new(7);
    let mut stripped = 0;
    for i in 0..2000 {
        let mut bytes = whole.clone();
        match i % 2 {
            0 => bytes.truncate(rng.below(whole.len() as u64) as usize),
            // Headers are at both ends.
            _ => {
                for _ in 0..4 {
                    let near = rng.below(1600) as usize;
                    let at = if rng.below(2) == 0 { near } else { whole.len() - 1 - near };
                    bytes[at] = rng.next() as u8;
                }
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        let Ok(info) = DebugInfo::open(&path) else { continue };
        let Ok(contents) = info.stripped() else { continue };
        assert!(contents.len() <= 2 * whole.len() as u64, "{i}: {}", contents.len());
        let mut buf = vec![0; contents.len() as usize];
        assert_eq!(contents.read(0, &mut buf).unwrap(), buf.len(), "{i}");
        stripped += 1;
    }
    assert!(stripped > 100, "{stripped}");
}

#[test]
fn a_real_vmlinux_is_stripped_alike() {
    let Some(set) = lab::sets().unwrap_or_default().into_iter().next() else { return };
    let path = vmlinux(&set);
    let info = DebugInfo::open(&path).unwrap();
    let contents = info.stripped().unwrap();
    let mut bytes = vec![0; contents.len() as usize];
    assert_eq!(contents.read(0, &mut bytes).unwrap(), bytes.len());
    let dir = tempfile::tempdir().unwrap();
    let stripped = dir.path().join("stripped");
    std::fs::write(&stripped, &bytes).unwrap();
    compare_stripped(&path, &stripped);
    assert!(contents.len() * 3 < path.metadata().unwrap().len(), "{} bytes", contents.len());
}

// ---------------------------------------------------------------- real dumps

fn vmlinux(set: &Set) -> PathBuf {
    lab::root().join(set.json["vmlinux"].as_str().unwrap())
}

fn dump_of(set: &Set) -> PathBuf {
    let dumps = set.dumps();
    let zlib = dumps.iter().find(|d| d.complete && d.compression.as_deref() == Some("zlib"));
    zlib.or_else(|| dumps.iter().find(|d| d.complete && d.format == "elf")).unwrap().path.clone()
}

/// `ADDRESS <SYMBOL>` as the guest itself had it.
fn in_guest(set: &Set, symbol: &str) -> String {
    let kallsyms = std::fs::read_to_string(set.dir.join("facts/proc/kallsyms")).unwrap();
    let line = kallsyms.lines().find(|line| line.split_whitespace().nth(2) == Some(symbol)).unwrap();
    format!("0x{} <{symbol}>", line.split(' ').next().unwrap().trim_start_matches('0'))
}

/// One set of each kernel.
fn kernels() -> Vec<Set> {
    let mut seen = BTreeSet::new();
    let mut sets = lab::sets().unwrap_or_default();
    sets.retain(|set| set.json["chain"].is_null() && seen.insert(set.json["release"].to_string()));
    sets
}

/// `.rodata`, `.data`, `.init.data` and code all move with KASLR.
const GUEST_SYMBOLS: [&str; 4] = ["linux_banner", "init_task", "init_mm", "schedule"];

fn assert_guest_symbols(set: &Set, printed: &str, with: &Path) {
    for symbol in GUEST_SYMBOLS {
        let want = in_guest(set, symbol);
        assert!(printed.contains(&want), "{}, {with:?}: no {want} in:\n{printed}", set.name());
    }
}

#[test]
fn a_bare_gdb_on_a_real_dump_has_symbols_and_the_backtrace() {
    let print = GUEST_SYMBOLS.map(|symbol| format!("output/a &{symbol}"));
    for set in kernels() {
        let served = Served::start(&dump_of(&set), &[]);
        for gdb in gdbs() {
            let mut commands: Vec<&str> = print.iter().map(String::as_str).collect();
            commands.extend(["info line schedule", "bt 5"]);
            let started = Instant::now();
            let printed = bare(&gdb, &[], &served.address, &commands);
            eprintln!("{}, {}: {:?}", set.name(), gdb.display(), started.elapsed());
            assert_guest_symbols(&set, &printed, &gdb);
            assert!(printed.contains("kernel/sched/core.c"), "{}: {printed}", set.name());
            assert_eq!(
                printed.contains(" in panic ("),
                set.json["panic"].is_object(),
                "{}: {printed}",
                set.name()
            );
        }
    }
}

#[test]
fn a_real_vmlinux_is_served_to_a_gdb_that_cannot_open_it() {
    let Some(set) = kernels().into_iter().next() else { return };
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("not-a-name-that-gdb-could-guess");
    std::os::unix::fs::symlink(vmlinux(&set), &link).unwrap();
    let served = Served::start(&dump_of(&set), &["--files", "serve", "--vmlinux", link.to_str().unwrap()]);
    std::fs::remove_file(&link).unwrap();
    let print = GUEST_SYMBOLS.map(|symbol| format!("output/a &{symbol}"));
    for gdb in gdbs() {
        let commands: Vec<&str> = print.iter().map(String::as_str).collect();
        let printed = bare(&gdb, &["set debug-file-directory"], &served.address, &commands);
        assert_guest_symbols(&set, &printed, &gdb);
    }
}

/// A gdb that has none of the lab's files, nor what kstub has made in the directory for temporary files: as on
/// another machine. `None` where one may not make a mount namespace.
fn elsewhere(gdb: &Path, dir: &Path) -> Option<PathBuf> {
    let may = Command::new("unshare").args(["--user", "--map-root-user", "--mount", "true"]).status();
    if !may.is_ok_and(|status| status.success()) {
        skip("unshare may not make a namespace");
        return None;
    }
    let hidden = [lab::root().join("kernels"), lab::root().join("sets"), std::env::temp_dir()];
    let hidden = hidden.iter().filter_map(|dir| dir.canonicalize().ok());
    let hide: String = hidden.map(|dir| format!("mount -t tmpfs none '{}' && ", dir.display())).collect();
    let script = format!(
        "#!/bin/sh\nexec unshare --user --map-root-user --mount sh -c \"{hide}exec '{}' \\\"\\$@\\\"\" sh \"$@\"\n",
        gdb.display()
    );
    let path = dir.join("gdb");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    Some(path)
}

/// With the vmlinux and the modules' files, and with what kstub makes of the dump alone.
#[test]
fn a_gdb_on_another_machine_gets_every_file_through_the_connection() {
    let with_modules = |set: &Set| {
        let told = std::fs::read_to_string(set.dir.join("facts/proc/modules")).unwrap_or_default();
        told.lines().any(|line| line.starts_with("dummy "))
    };
    let Some(set) = kernels().into_iter().find(with_modules) else { return };
    let alone = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(dump_of(&set), alone.path().join("alone")).unwrap();
    let (dump, alone) = (dump_of(&set), alone.path().join("alone"));
    let wanted = [&GUEST_SYMBOLS[..], &["dummy_setup"]].concat();
    let print: Vec<String> = wanted.iter().map(|symbol| format!("output/a &{symbol}")).collect();
    for (dump, files) in [(&dump, "serve"), (&alone, "serve"), (&alone, "local")] {
        let served = Served::start_on(dump, "127.0.0.1:0", &["--files", files]);
        for gdb in gdbs() {
            let dir = tempfile::Builder::new().tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let Some(gdb) = elsewhere(&gdb, dir.path()) else { return };
            let mut commands: Vec<&str> = print.iter().map(String::as_str).collect();
            commands.push("info sharedlibrary");
            let started = Instant::now();
            let printed = bare(&gdb, &["set debug-file-directory"], &served.address, &commands);
            eprintln!("{}: {files}: {:?}", dump.display(), started.elapsed());
            for symbol in &wanted {
                let found = printed.contains(&in_guest(&set, symbol));
                // What is only named is not there: the test sees the difference.
                assert_eq!(found, files == "serve", "{}, {files}: {symbol}: {printed}", dump.display());
            }
        }
    }
}

// ---------------------------------------------------------------- finding it

struct Finder {
    dir: tempfile::TempDir,
    dump: PathBuf,
    id: String,
}

impl Finder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kernel = TinyKernel::default();
        std::fs::create_dir(dir.path().join("dump")).unwrap();
        let dump = dir.path().join("dump/vmcore");
        std::fs::write(&dump, kernel.kdump(&kernel.memory(), 1)).unwrap();
        Self { dir, dump, id: kernel.build_id_hex() }
    }

    fn file(&self, name: &str, build_id: &str) -> Option<PathBuf> {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        elf_file::vmlinux(&path, build_id)
    }

    /// The vmlinux that `kstub info` finds, and its problems.
    fn find(&self, arguments: &[&str]) -> (Option<PathBuf>, String) {
        let output = Command::new(KSTUB)
            .args(["info", "--json"])
            .arg(&self.dump)
            .args(arguments)
            .env("XDG_CACHE_HOME", self.dir.path().join("cache"))
            .env_remove("DEBUGINFOD_URLS")
            .env_remove("KSTUB_DEBUG_DIR")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let json: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
        (json["kernel"]["vmlinux"].as_str().map(PathBuf::from), json["problems"].to_string())
    }
}

#[test]
fn a_vmlinux_is_found_by_content_under_any_name_and_remembered() {
    let finder = Finder::new();
    let Some(right) = finder.file("debug/a/b/no name at all", &finder.id) else { return };
    // Others of the same look and of promising names.
    let release = TinyKernel::default().release;
    finder.file("debug/a/vmlinux", OTHER_ID).unwrap();
    finder.file(&format!("debug/lib/modules/{release}/vmlinux"), OTHER_ID).unwrap();
    std::fs::write(finder.dir.path().join("debug/text"), "no ELF").unwrap();
    std::os::unix::fs::symlink("..", finder.dir.path().join("debug/a/b/loop")).unwrap();
    let debug = finder.dir.path().join("debug");
    let debug = debug.to_str().unwrap();

    assert_eq!(finder.find(&[]).0, None);
    assert_eq!(finder.find(&["--debug-dir", debug]).0, Some(right.clone()));
    assert_eq!(finder.find(&[]).0, Some(right.clone()), "remembered");
    // What the memory names is checked like anything else.
    let memory = finder.dir.path().join("cache/kstub/vmlinux").join(&finder.id);
    std::fs::write(&memory, finder.dir.path().join("debug/a/vmlinux\n").to_str().unwrap()).unwrap();
    let (found, problems) = finder.find(&[]);
    assert_eq!(found, None);
    assert!(problems.contains(OTHER_ID) && problems.contains(&finder.id), "{problems}");
    std::fs::write(&memory, "garbage").unwrap();
    assert_eq!(finder.find(&[]).0, None);
    // A file that is given is kept in mind, too; and it is of no use once it is gone.
    assert_eq!(finder.find(&["--vmlinux", right.to_str().unwrap()]).0, Some(right.clone()));
    assert_eq!(finder.find(&[]).0, Some(right.clone()));
    std::fs::remove_file(&right).unwrap();
    assert_eq!(finder.find(&["--debug-dir", debug]).0, None);
}

#[test]
fn directories_come_from_the_environment_and_a_build_id_link_is_enough() {
    let finder = Finder::new();
    let link = format!("linked/.build-id/{}/{}.debug", &finder.id[..2], &finder.id[2..]);
    let Some(right) = finder.file(&link, &finder.id) else { return };
    let dirs = format!("/nonexistent:{}", finder.dir.path().join("linked").display());
    let (found, _) = finder.find(&["--debug-dir", &dirs]);
    assert_eq!(found.as_ref(), Some(&right));
    let output = Command::new(KSTUB)
        .args(["info"])
        .arg(&finder.dump)
        .env("XDG_CACHE_HOME", "/nonexistent")
        .env("KSTUB_DEBUG_DIR", dirs)
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(printed.contains(right.to_str().unwrap()), "{printed}");
}

#[test]
fn what_was_searched_and_what_was_turned_down_is_told() {
    let finder = Finder::new();
    if finder.file("dump/vmlinux-other", OTHER_ID).is_none() {
        return;
    }
    std::fs::write(finder.dir.path().join("dump/vmlinux.xz"), "\u{fd}7zXZ").unwrap();
    let (found, problems) = finder.find(&["--debug-dir", "/nonexistent-directory"]);
    assert_eq!(found, None);
    let dump_dir = finder.dump.parent().unwrap().to_str().unwrap();
    for word in [
        OTHER_ID,
        &finder.id,
        "vmlinux.xz' was not used: it is compressed; unpack it",
        "/nonexistent-directory (0 files)",
        "/usr/lib/debug (",
        dump_dir,
        "--debug-dir",
        "DEBUGINFOD_URLS",
    ] {
        assert!(problems.contains(word), "no '{word}' in: {problems}");
    }
}
