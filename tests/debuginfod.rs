//! Debug info from debuginfod servers: elfutils' own, and ones that misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::debuginfo::DebugInfo;
use kstub::debuginfo::debuginfod::{Debuginfod, DebuginfodError};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::elf_file::{self, skip};
use support::lab;
use support::tiny_kernel::TinyKernel;

const KSTUB: &str = env!("CARGO_BIN_EXE_kstub");
const ID: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER_ID: &str = "00000000000000000000000000000000000000ff";

fn client(url: &str, cache: &Path) -> Debuginfod {
    Debuginfod {
        urls: vec![url.to_owned()],
        cache: cache.to_owned(),
        timeout: Some(Duration::from_secs(1)),
        max_size: 1 << 30,
        progress: Box::new(|_, _| ()),
    }
}

/// Every file below `dir`.
fn files_in(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.flat_map(|e| if e.path().is_dir() { files_in(&e.path()) } else { vec![e.path()] }).collect()
}

// ---------------------------------------------------------------- elfutils' server

struct Server {
    child: Child,
    url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// elfutils' debuginfod over `dir`, once it has looked at the one file there.
fn debuginfod(dir: &Path) -> Option<Server> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let child = Command::new("debuginfod")
        .args(["-F", "-L", "-d", ":memory:", "-p", &port.to_string()])
        .arg(dir)
        .env_remove("DEBUGINFOD_URLS")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let child = match child {
        Ok(child) => child,
        Err(error) => {
            skip(&format!("debuginfod: {error}; install it: apt install debuginfod"));
            return None;
        }
    };
    let server = Server { child, url: format!("http://127.0.0.1:{port}") };
    let deadline = Instant::now() + Duration::from_secs(60);
    while !metrics(port).is_some_and(|text| text.contains("{step_done=\"file-scanned\"}")) {
        assert!(Instant::now() < deadline, "debuginfod does not get ready");
        std::thread::sleep(Duration::from_millis(100));
    }
    Some(server)
}

fn metrics(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

#[test]
fn a_file_comes_from_elfutils_server_into_the_cache_it_shares() {
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let Some(built) = elf_file::vmlinux(&files.join("some-name"), ID) else { return };
    let Some(server) = debuginfod(&files) else { return };
    let cache = dir.path().join("cache");
    let seen = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&seen);
    let mut client = client(&format!("{}/", server.url), &cache);
    client.progress = Box::new(move |got, size| {
        assert!(size.is_none_or(|size| got <= size));
        counted.store(got, Ordering::Relaxed);
    });
    let path = client.fetch(ID).unwrap();
    assert_eq!(path, cache.join(ID).join("debuginfo"), "where elfutils' client looks");
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&built).unwrap());
    assert_eq!(seen.load(Ordering::Relaxed), built.metadata().unwrap().len());
    assert_eq!(DebugInfo::open(&path).unwrap().build_id(), Some(ID));

    // elfutils' own client takes it from there: no server is left.
    let found = Command::new("debuginfod-find")
        .args(["debuginfo", ID])
        .env("DEBUGINFOD_CACHE_PATH", &cache)
        .env("DEBUGINFOD_URLS", "http://127.0.0.1:1")
        .output();
    match found {
        Ok(found) => assert_eq!(String::from_utf8_lossy(&found.stdout).trim(), path.to_str().unwrap()),
        Err(error) => eprintln!("not compared with debuginfod-find: {error}"),
    }

    let errors = client.fetch(OTHER_ID).unwrap_err();
    assert!(matches!(&errors[..], [DebuginfodError::Absent { .. }]), "{errors:?}");
    assert_eq!(client.cached(OTHER_ID).metadata().unwrap().len(), 0, "told not to ask again for a while");
}

/// Runs `kstub info DUMP --json` without anything of this user's; the vmlinux it found, and its problems.
fn info(dump: &Path, caches: &Path, urls: &str, arguments: &[&str]) -> (Option<String>, String) {
    info_with(dump, caches, urls, arguments, None)
}

fn info_with(
    dump: &Path,
    caches: &Path,
    urls: &str,
    arguments: &[&str],
    certificates: Option<&Path>,
) -> (Option<String>, String) {
    let mut command = Command::new(KSTUB);
    if let Some(file) = certificates {
        command.env("SSL_CERT_FILE", file);
    }
    let output = command
        .arg("info")
        .arg(dump)
        .arg("--json")
        .args(arguments)
        .env("XDG_CACHE_HOME", caches)
        .env("DEBUGINFOD_URLS", urls)
        .env("DEBUGINFOD_TIMEOUT", "30")
        .env_remove("DEBUGINFOD_CACHE_PATH")
        .env_remove("DEBUGINFOD_MAXSIZE")
        .env_remove("KSTUB_DEBUG_DIR")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let json: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
    (json["kernel"]["vmlinux"].as_str().map(str::to_owned), json["problems"].to_string())
}

fn tiny_dump(dir: &Path) -> (PathBuf, String) {
    let kernel = TinyKernel::default();
    let dump = dir.join("vmcore");
    std::fs::write(&dump, kernel.kdump(&kernel.memory(), 1)).unwrap();
    (dump, kernel.build_id_hex())
}

#[test]
fn servers_are_asked_last_and_only_if_the_user_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (dump, id) = tiny_dump(dir.path());
    let files = tempfile::tempdir().unwrap();
    let Some(file) = elf_file::vmlinux(&files.path().join("some-name"), &id) else { return };
    let asked = Arc::new(AtomicUsize::new(0));
    let url = serve(whole(&std::fs::read(&file).unwrap()), Arc::clone(&asked));
    let caches = dir.path().join("caches");

    let (found, problems) = info(&dump, &caches, "", &[]);
    assert_eq!(found, None);
    assert!(problems.contains("DEBUGINFOD_URLS") && problems.contains("/usr/lib/debug ("), "{problems}");
    let (found, _) = info(&dump, &caches, &url, &["--no-debuginfod"]);
    assert_eq!((found, asked.load(Ordering::Relaxed)), (None, 0));
    let (found, _) = info(&dump, &caches, &url, &["--debug-dir", files.path().to_str().unwrap()]);
    assert_eq!((found.as_deref(), asked.load(Ordering::Relaxed)), (file.to_str(), 0));
    std::fs::remove_dir_all(&caches).unwrap();
    let (found, _) = info(&dump, &caches, &url, &[]);
    let cached = caches.join("debuginfod_client").join(&id).join("debuginfo");
    assert_eq!((found.as_deref(), asked.load(Ordering::Relaxed)), (cached.to_str(), 1));
    let (found, _) = info(&dump, &caches, &url, &[]);
    assert_eq!((found.as_deref(), asked.load(Ordering::Relaxed)), (cached.to_str(), 1), "cached");
}

#[test]
fn the_vmlinux_of_a_real_dump_comes_from_elfutils_server() {
    let sets = lab::sets().unwrap_or_default();
    let Some(set) = sets.iter().find(|set| set.name().starts_with("kdump-")) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (files, away) = (dir.path().join("files"), dir.path().join("away"));
    std::fs::create_dir(&files).unwrap();
    std::fs::create_dir(&away).unwrap();
    let vmlinux = lab::root().join(set.json["vmlinux"].as_str().unwrap());
    std::os::unix::fs::symlink(vmlinux, files.join("vmlinux")).unwrap();
    let Some(server) = debuginfod(&files) else { return };
    let dump = set.dumps().into_iter().find(|d| d.complete && d.compression.as_deref() == Some("zlib"));
    std::os::unix::fs::symlink(dump.unwrap().path, away.join("vmcore")).unwrap();
    let caches = dir.path().join("caches");
    let (found, problems) = info(&away.join("vmcore"), &caches, &server.url, &[]);
    assert!(found.is_some_and(|path| path.starts_with(caches.to_str().unwrap())), "{problems}");
}

/// A server with a certificate of its own is believed only by who has that certificate among the system's.
#[test]
fn https_checks_certificates_against_the_systems() {
    let dir = tempfile::tempdir().unwrap();
    // Elsewhere, or the served file would be found beside the dump.
    let elsewhere = tempfile::tempdir().unwrap();
    let (dump, id) = tiny_dump(elsewhere.path());
    let served = dir.path().join("buildid").join(&id);
    std::fs::create_dir_all(&served).unwrap();
    if elf_file::vmlinux(&served.join("debuginfo"), &id).is_none() {
        return;
    }
    let openssl = |arguments: &[&str]| {
        let mut command = Command::new("openssl");
        command.args(arguments).current_dir(dir.path()).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let request =
        ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out", "cert", "-days", "2"];
    let names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"];
    let leaf = ["-addext", "basicConstraints=critical,CA:FALSE"];
    match openssl(&[&request[..], &names, &leaf].concat()).status() {
        Ok(status) => assert!(status.success(), "openssl req"),
        Err(error) => return skip(&format!("openssl: {error}; install it: apt install openssl")),
    }
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let arguments = ["s_server", "-accept", &port.to_string(), "-cert", "cert", "-key", "key", "-WWW"];
    let _server = Server { child: openssl(&arguments).spawn().unwrap(), url: String::new() };
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "openssl s_server does not listen");
        std::thread::sleep(Duration::from_millis(50));
    }
    let url = format!("https://127.0.0.1:{port}");
    let caches = dir.path().join("caches");
    let (found, problems) = info(&dump, &caches, &url, &[]);
    assert_eq!(found, None);
    assert!(problems.contains(&url) && problems.contains("certificate"), "{problems}");
    let (found, problems) = info_with(&dump, &caches, &url, &[], Some(&dir.path().join("cert")));
    assert!(found.is_some_and(|path| path.ends_with("debuginfo")), "{problems}");
}

// ---------------------------------------------------------------- servers that misbehave

type Answer = Arc<dyn Fn(&mut TcpStream) + Send + Sync>;

/// Answers every request with `answer`; returns the URL.
fn serve(answer: Answer, asked: Arc<AtomicUsize>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            asked.fetch_add(1, Ordering::Relaxed);
            let answer = Arc::clone(&answer);
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                answer(&mut stream);
            });
        }
    });
    url
}

fn bytes(bytes: Vec<u8>) -> Answer {
    Arc::new(move |stream| {
        let _ = stream.write_all(&bytes);
    })
}

fn with_length(length: u64, body: &[u8]) -> Answer {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    bytes([head.as_bytes(), body].concat())
}

fn whole(body: &[u8]) -> Answer {
    with_length(body.len() as u64, body)
}

fn redirect(to: &str) -> Answer {
    bytes(
        format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .into_bytes(),
    )
}

/// `head`, then `piece` over and over until the client leaves.
fn for_ever(head: &'static str, piece: &'static [u8], pause: Duration) -> Answer {
    Arc::new(move |stream| {
        let _ = stream.write_all(head.as_bytes());
        while stream.write_all(piece).is_ok() {
            std::thread::sleep(pause);
        }
    })
}

#[test]
fn every_misbehaving_server_is_named_and_leaves_nothing_behind() {
    const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let dir = tempfile::tempdir().unwrap();
    let Some(right) = elf_file::vmlinux(&dir.path().join("right"), ID) else { return };
    let wrong = elf_file::vmlinux(&dir.path().join("wrong"), OTHER_ID).unwrap();
    let (right, wrong) = (std::fs::read(right).unwrap(), std::fs::read(wrong).unwrap());
    let len = right.len() as u64;
    let status = |status: &str| {
        bytes(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").into_bytes())
    };
    let cases: Vec<(&str, Answer, &[&str])> = vec![
        ("absent", status("404 Not Found"), &["does not have it"]),
        ("broken", status("500 Oops"), &["status 500"]),
        ("empty", whole(b""), &["no x86-64 ELF"]),
        ("no ELF", whole(b"<html>log in first</html>"), &["no x86-64 ELF"]),
        ("other build-id", whole(&wrong), &[ID, OTHER_ID]),
        ("cut", with_length(len, &right[..right.len() / 2]), &["after"]),
        ("cut by one byte", with_length(len, &right[..right.len() - 1]), &["after"]),
        ("huge", with_length(u64::MAX / 2, b""), &["are accepted", "DEBUGINFOD_MAXSIZE"]),
        ("silent", for_ever("", b"", Duration::from_millis(50)), &["within 1 s", "DEBUGINFOD_TIMEOUT"]),
        (
            "silent after the head",
            for_ever("HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"", Duration::from_millis(50)),
            &["within 1 s"],
        ),
        (
            "a drip",
            for_ever("HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", Duration::from_millis(50)),
            &["within 1 s"],
        ),
        (
            "headers without end",
            for_ever("HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", Duration::ZERO),
            &["DEBUGINFOD_URLS"],
        ),
        ("without end", for_ever(CHUNKED, b"4\r\nabcd\r\n", Duration::ZERO), &["are accepted"]),
        ("to a file", redirect("file:///etc/passwd"), &["DEBUGINFOD_URLS"]),
        ("to itself", redirect("/buildid/x/debuginfo"), &["redirect"]),
        ("no HTTP", bytes(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()), &["DEBUGINFOD_URLS"]),
        ("closed", bytes(Vec::new()), &["DEBUGINFOD_URLS"]),
    ];
    for (name, answer, words) in cases {
        let cache = tempfile::tempdir().unwrap();
        let url = serve(answer, Arc::default());
        let mut client = client(&url, cache.path());
        client.max_size = 4 << 20;
        let started = Instant::now();
        let errors = client.fetch(ID).unwrap_err();
        let took = started.elapsed();
        let text = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        assert!(text.contains(&url), "{name}: {text}");
        for word in words {
            assert!(text.contains(word), "{name}: no '{word}' in: {text}");
        }
        assert!(took < Duration::from_secs(60), "{name}: took {took:?}");
        let left = files_in(cache.path());
        let kept = if name == "absent" { vec![client.cached(ID)] } else { vec![] };
        assert_eq!(left, kept, "{name}");
    }
    // The same server, were it to behave.
    let cache = tempfile::tempdir().unwrap();
    let url = serve(whole(&right), Arc::default());
    assert!(client(&url, cache.path()).fetch(ID).is_ok());
    // One that has the file makes up for those before it.
    let cache = tempfile::tempdir().unwrap();
    let mut several = client("file:///tmp", cache.path());
    several.urls.extend([serve(status("404 Not Found"), Arc::default()), url]);
    assert_eq!(std::fs::read(several.fetch(ID).unwrap()).unwrap(), right);
}
