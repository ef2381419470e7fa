//! A real QEMU guest that runs while tests look at it, and ways to know what it does that do not go through kstub.
//!
//! The guest is `qemu/live`, made by `scripts/lab vm`. QEMU gets a QMP socket for kstub and nothing else that a debugger
//! could use; the tests' own eyes are a second QMP socket, the guest's report (its facts and heartbeat), and a serial
//! line on which it takes commands.

mod again;
mod agent;
mod disk;
mod gdb;
mod qmp;
mod watch;

pub use again::{BOOTS, again, died_of_qemu, note_end, says_of_its_boot};
pub use disk::empty_qcow2;
pub use gdb::{Gdb, Session};
pub use qmp::Qmp;
pub use watch::{Ended, finish, finish_within, kill, wait_until};

use super::gdb_session::KSTUB;
use super::lab;
use again::INT3;
use agent::Agent;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The QEMU that guests run in: `KSTUB_QEMU`, else the system's.
pub fn qemu() -> String {
    std::env::var("KSTUB_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned())
}

const BOOT: Duration = Duration::from_secs(120);
/// How long something that takes a moment may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long a guest that boots may say nothing.
const SILENCE: Duration = Duration::from_secs(30);

/// Every kernel series that live guests are made of.
pub const SERIES: [&str; 2] = ["6.1", "6.12"];

/// One guest at a time in a test program: an emulated CPU is a busy thread.
static TURN: Mutex<()> = Mutex::new(());

/// Where the guest's RAM is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ram {
    /// In a file that others can map (`memory-backend-file`, `share=on`).
    Shared,
    /// In QEMU's own memory.
    Private,
}

/// What guest to boot. The defaults: one CPU, 256 MiB of private RAM, PTI as the kernel chooses.
#[derive(Clone, Debug)]
pub struct Plan {
    series: String,
    pub cpus: u32,
    pub ram: Ram,
    megabytes: u64,
    /// MiB of it below 4 GiB.
    below: u64,
    command_line: Vec<String>,
    machine: String,
    accelerator: String,
    arguments: Vec<String>,
    awaited: bool,
}

impl Plan {
    /// A guest of a kernel series such as "6.1".
    pub fn new(series: &str) -> Self {
        Self {
            series: series.to_owned(),
            cpus: 1,
            ram: Ram::Private,
            megabytes: 256,
            below: 256,
            command_line: ["console=ttyS0", "quiet", "panic=0", "tsc=reliable"].map(str::to_owned).to_vec(),
            machine: "q35".to_owned(),
            accelerator: "tcg,thread=multi".to_owned(),
            arguments: Vec::new(),
            awaited: true,
        }
    }

    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Two page tables for each process, or one.
    pub fn pti(self, on: bool) -> Self {
        self.kernel_argument(if on { "pti=on" } else { "pti=off" })
    }

    pub fn shared_ram(mut self) -> Self {
        self.ram = Ram::Shared;
        self
    }

    /// RAM in MiB; what of it is beyond `below` lies above 4 GiB.
    pub fn split_ram(mut self, megabytes: u64, below: u64) -> Self {
        (self.megabytes, self.below) = (megabytes, below);
        self.machine += &format!(",max-ram-below-4g={below}M");
        self
    }

    pub fn kernel_argument(mut self, argument: &str) -> Self {
        self.command_line.push(argument.to_owned());
        self
    }

    /// An argument for QEMU. `-S` makes [`Self::boot`] return at once.
    pub fn argument(mut self, argument: &str) -> Self {
        self.awaited &= argument != "-S";
        self.arguments.push(argument.to_owned());
        self
    }

    /// One thread for all CPUs and a clock that counts instructions, which recording and replaying need.
    pub fn counting_instructions(mut self, how: &str) -> Self {
        self.accelerator = "tcg,thread=single".to_owned();
        self.argument("-icount").argument(how)
    }

    /// The vmlinux of a series' guest.
    pub fn vmlinux_of(series: &str) -> Option<PathBuf> {
        Some(lab::root().join(manifest(series)?["vmlinux"].as_str().expect("vmlinux")))
    }

    /// Boots it; `None` if tests with guests are to be skipped, which is then said.
    pub fn boot(self) -> Option<Guest> {
        let manifest = manifest(&self.series)?;
        // There is no kstub yet.
        let is_qemus = |why: &str| died_of_qemu(why) || why.trim_end().ends_with("has not come up:");
        for _ in 1..BOOTS {
            match self.clone().try_boot(&manifest) {
                Ok(guest) => return Some(guest),
                Err(why) if is_qemus(&why) => eprintln!("another boot after: {why}"),
                Err(why) => panic!("{why}"),
            }
        }
        Some(self.try_boot(&manifest).unwrap_or_else(|why| panic!("{why}")))
    }

    fn try_boot(self, manifest: &Value) -> Result<Guest, String> {
        let turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let start = Instant::now();
        let guest = Guest::start(self, manifest.clone(), turn);
        if guest.plan.awaited {
            guest.come_up()?;
        }
        eprintln!(
            "guest {} with {} CPUs: {:.1} s",
            guest.release(),
            guest.plan.cpus,
            start.elapsed().as_secs_f64()
        );
        Ok(guest)
    }

    fn argv(&self, manifest: &Value, dir: &Path) -> Vec<String> {
        let file = |key: &str| lab::root().join(manifest[key].as_str().expect(key)).display().to_string();
        let socket = |name: &str| format!("unix:{}/{name},server=on,wait=off", dir.display());
        let log = |name: &str| format!("file:{}/{name}", dir.display());
        let memory = match self.ram {
            Ram::Shared => {
                format!(
                    "memory-backend-file,id=ram,mem-path={}/ram,share=on,size={}M",
                    dir.display(),
                    self.megabytes
                )
            }
            Ram::Private => format!("memory-backend-ram,id=ram,size={}M", self.megabytes),
        };
        let words = ["-no-user-config", "-nodefaults", "-display", "none", "-cpu", "max"];
        let mut argv = words.map(str::to_owned).to_vec();
        let mut add = |option: &str, value: String| argv.extend([option.to_owned(), value]);
        add("-machine", format!("{},memory-backend=ram", self.machine));
        add("-object", memory);
        add("-m", format!("{}M", self.megabytes));
        add("-accel", self.accelerator.clone());
        add("-smp", self.cpus.to_string());
        add("-kernel", file("vmlinuz"));
        add("-initrd", file("initramfs"));
        add("-append", self.command_line.join(" "));
        add("-qmp", socket("qmp"));
        add("-qmp", socket("qmp-tests"));
        add("-serial", log("console"));
        add("-serial", socket("agent"));
        add("-serial", log("report"));
        argv.extend(self.arguments.iter().cloned());
        argv
    }
}

/// What the lab says of a series' guest; `None` if tests with guests are to be skipped.
///
/// `KSTUB_VM` 1 = they must run, 0 = they must not, unset = if QEMU and the lab's guests are there; in CI (`CI=true`)
/// unset is as good as 1.
fn manifest(series: &str) -> Option<Value> {
    let variable = |name| std::env::var(name).ok();
    let must = match wanted(variable("KSTUB_VM").as_deref(), variable("CI").as_deref()) {
        Some(false) => {
            eprintln!("skipped: KSTUB_VM=0");
            return None;
        }
        other => other == Some(true),
    };
    let path = lab::root().join("vm").join(series).join("vm.json");
    let there = std::fs::read_to_string(&path)
        .map_err(|_| format!("no live guest {}; make it with scripts/lab vm", path.display()))
        .and_then(|text| {
            let found = Command::new(qemu()).arg("--version").stdout(Stdio::null()).status();
            found.map(|_| text).map_err(|_| format!("no {}; install it with scripts/lab packages", qemu()))
        });
    match there {
        Ok(text) => Some(serde_json::from_str(&text).expect("vm.json")),
        Err(why) => {
            assert!(!must, "{why}");
            eprintln!("skipped: {why}");
            None
        }
    }
}

/// What the variables say: `Some` is an order, `None` leaves it to what is there.
pub fn wanted(vm: Option<&str>, ci: Option<&str>) -> Option<bool> {
    match vm {
        Some("1") => Some(true),
        Some("0") => Some(false),
        Some("") | None => (ci == Some("true")).then_some(true),
        Some(other) => panic!("KSTUB_VM is {other:?}; it can be 0, 1 or unset"),
    }
}

/// A guest; QEMU is killed when it is dropped.
pub struct Guest {
    pub plan: Plan,
    manifest: Value,
    dir: tempfile::TempDir,
    /// Process id of QEMU.
    pub pid: u32,
    /// Dropped to have QEMU killed, which is done when `ended` closes.
    end: Option<Sender<()>>,
    ended: Receiver<()>,
    qmp: Mutex<Qmp>,
    agent: Mutex<Agent>,
    /// What it had said, and its kernel had printed, when it was told to start again.
    said_before: Mutex<(String, String)>,
    _turn: MutexGuard<'static, ()>,
}

/// One beat of the guest's heart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Debug)]
pub struct Beat {
    pub number: u64,
    /// The guest's time since its boot.
    pub milliseconds: u64,
}

impl Guest {
    fn start(plan: Plan, manifest: Value, turn: MutexGuard<'static, ()>) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let log = std::fs::File::create(dir.path().join("qemu.log")).expect("qemu.log");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", &qemu()]).args(plan.argv(&manifest, dir.path()));
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("qemu.log")).stderr(log);
        // The signal comes when the thread ends that started it: one that lives as long as the guest.
        let (pid_sender, pid) = channel();
        let (end, ended_by) = channel::<()>();
        let (done, ended) = channel::<()>();
        std::thread::spawn(move || {
            let mut child = command.spawn().expect("setpriv is not there: scripts/lab packages");
            pid_sender.send(child.id()).expect("the test waits");
            let _ = ended_by.recv();
            let _ = child.kill();
            let _ = child.wait();
            drop(done);
        });
        let pid = pid.recv().expect("QEMU was not started");
        let socket = |name: &str| {
            let path = dir.path().join(name);
            let mut stream = None;
            let connected = wait_until(PATIENCE, || {
                stream = UnixStream::connect(&path).ok();
                stream.is_some() || !watch::is_running(pid)
            });
            let said = || std::fs::read_to_string(dir.path().join("qemu.log")).unwrap_or_default();
            stream.unwrap_or_else(|| panic!("QEMU has not opened {name} ({connected}): {}", said()))
        };
        let qmp = Mutex::new(Qmp::new(socket("qmp-tests")));
        let agent = Mutex::new(Agent::new(socket("agent")));
        let said_before = Mutex::default();
        Self { plan, manifest, dir, pid, end: Some(end), ended, qmp, agent, said_before, _turn: turn }
    }

    /// Waits until the guest has planted everything and its heart beats.
    pub fn wait_ready(&self) {
        self.come_up().unwrap_or_else(|why| panic!("{why}"));
    }

    fn come_up(&self) -> Result<(), String> {
        let beats = || self.report().contains("\nbeat ");
        let has_failed = || {
            let console = self.console();
            !self.qemu_runs()
                || ["Kernel panic", "Oops: ", INT3].iter().any(|word| console.contains(word))
                || self.report().contains("KSTUB-GUEST-FAILED")
        };
        wait_until(BOOT, || beats() || has_failed());
        if beats() && !has_failed() {
            return Ok(());
        }
        // The rest of an oops is still to come: what died is told by its code.
        std::thread::sleep(Duration::from_secs(1));
        let (report, console, log) = (self.report(), self.console(), self.qemu_log());
        Err(format!("the guest has not come up: {report} {console} {log}"))
    }

    /// A file of this guest.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The QMP socket that is there for kstub.
    pub fn qmp_path(&self) -> PathBuf {
        self.path("qmp")
    }

    /// As `--qemu` wants it.
    pub fn address(&self) -> String {
        format!("unix:{}", self.qmp_path().display())
    }

    pub fn vmlinux(&self) -> PathBuf {
        lab::root().join(self.manifest["vmlinux"].as_str().expect("vmlinux"))
    }

    pub fn release(&self) -> &str {
        self.manifest["release"].as_str().expect("release")
    }

    /// `kstub COMMAND --qemu … --vmlinux … --debug-dir …`, without what the user's environment would add.
    pub fn kstub(&self, command: &str) -> Command {
        self.kstub_of(command, &self.vmlinux())
    }

    /// The same with that vmlinux.
    pub fn kstub_of(&self, command: &str, vmlinux: &Path) -> Command {
        let mut kstub = Command::new(KSTUB);
        kstub.env_remove("DEBUGINFOD_URLS").arg(command).arg("--qemu").arg(self.address());
        kstub.arg("--vmlinux").arg(vmlinux);
        kstub
            .arg("--debug-dir")
            .arg(lab::root().join(self.manifest["debug_dir"].as_str().expect("debug_dir")));
        kstub
    }

    pub fn qemu_runs(&self) -> bool {
        watch::is_running(self.pid)
    }

    fn qemu_log(&self) -> String {
        std::fs::read_to_string(self.path("qemu.log")).unwrap_or_default()
    }

    /// What the kernel has printed.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path("console")).unwrap_or_default()).into_owned()
    }

    /// What the guest has said of itself, and its heartbeat; only whole lines.
    fn report(&self) -> String {
        let text =
            String::from_utf8_lossy(&std::fs::read(self.path("report")).unwrap_or_default()).into_owned();
        let end = text.rfind('\n').map_or(0, |end| end + 1);
        text[..end].replace('\r', "")
    }

    /// The facts of the newest boot, by key; of `iomem` there are many.
    pub fn facts(&self) -> Vec<(String, String)> {
        let report = self.report();
        let start = report.rfind("KSTUB-FACTS").expect("the guest has reported nothing yet");
        let lines = report[start..].lines().take_while(|line| *line != "KSTUB-LIVE-READY");
        lines.filter_map(|line| line.split_once('=')).map(|(key, value)| (key.into(), value.into())).collect()
    }

    pub fn fact(&self, key: &str) -> String {
        let found = self.facts().into_iter().find(|(name, _)| name == key);
        found.unwrap_or_else(|| panic!("the guest has not said {key}")).1
    }

    /// A fact that is a number, decimal or with 0x.
    pub fn number(&self, key: &str) -> u64 {
        number(&self.fact(key))
    }

    /// How often the guest has reported, which it does once each boot.
    pub fn boots(&self) -> usize {
        self.report().matches("KSTUB-LIVE-READY").count()
    }

    /// The last heartbeat of the newest boot.
    pub fn beat(&self) -> Beat {
        let report = self.report();
        let line = report.lines().rev().find(|line| line.starts_with("beat ")).expect("no heartbeat");
        let mut words = line.split(' ').skip(1).map(number);
        Beat { number: words.next().expect("number"), milliseconds: words.next().expect("time") }
    }

    /// Waits for some more heartbeats: the guest runs.
    pub fn assert_alive(&self, why: &str) {
        let before = self.beat().number;
        // Fewer beats after a reboot than before are a sign of life, too.
        let beats = wait_until(PATIENCE, || !(before..before + 3).contains(&self.beat().number));
        let state = if self.qemu_runs() { self.run_state() } else { "QEMU is gone".to_owned() };
        assert!(beats, "{why}: the heartbeat has stopped at {before} ({state}): {}", self.console());
    }

    /// The opposite: for a while there is none.
    pub fn assert_stands(&self, why: &str) {
        assert_ne!(self.run_state(), "running", "{why}");
        let before = self.beat();
        std::thread::sleep(Duration::from_millis(700));
        assert_eq!(self.beat(), before, "{why}: the heart beats");
    }

    pub fn qmp(&self, command: &str, arguments: Value) -> Value {
        if command == "system_reset" {
            self.starts_again();
        }
        let answer = self.qmp.lock().unwrap_or_else(|e| e.into_inner()).ask(command, arguments);
        answer.unwrap_or_else(|why| panic!("QMP {command}: {why}"))
    }

    /// Names of the events since this was last asked, oldest first ("STOP", "RESUME", …).
    pub fn events(&self) -> Vec<String> {
        self.qmp.lock().unwrap_or_else(|e| e.into_inner()).events()
    }

    /// "running", "paused", "debug", "prelaunch", …
    pub fn run_state(&self) -> String {
        self.qmp("query-status", json!({}))["status"].as_str().expect("status").to_owned()
    }

    pub fn stop(&self) {
        self.qmp("stop", json!({}));
    }

    pub fn cont(&self) {
        self.qmp("cont", json!({}));
    }

    /// A line of the human monitor.
    pub fn human(&self, line: &str) -> String {
        let answer = self.qmp("human-monitor-command", json!({ "command-line": line }));
        answer.as_str().expect("text").replace('\r', "")
    }

    /// QEMU's character devices, but the one through which its stub hears its monitor: once made that stays.
    pub fn chardevs(&self) -> Vec<String> {
        let text = self.human("info chardev");
        let mut lines: Vec<String> =
            text.lines().filter(|line| !line.contains("filename=gdb")).map(str::to_owned).collect();
        lines.sort();
        lines
    }

    /// `info registers -a` of each CPU, by gdb's names; `cpl` is the privilege level.
    pub fn registers(&self) -> Vec<BTreeMap<String, u64>> {
        let text = self.human("info registers -a");
        let mut cpus = lab::parse_info_registers(&text);
        let levels = text.split("CPL=").skip(1).filter_map(|rest| rest.get(..1)?.parse().ok());
        for (cpu, level) in cpus.iter_mut().zip(levels) {
            cpu.insert("cpl".to_owned(), level);
        }
        cpus
    }

    /// Physical memory as QEMU writes it to a file.
    pub fn memory(&self, at: u64, len: u64) -> Vec<u8> {
        let path = self.path("saved");
        self.qmp("pmemsave", json!({ "val": at, "size": len, "filename": path }));
        let bytes = std::fs::read(&path).expect("pmemsave");
        std::fs::remove_file(path).expect("pmemsave");
        bytes
    }

    /// Where its RAM is: (address, length).
    pub fn ram_ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges = vec![(0, self.plan.below << 20)];
        if self.plan.megabytes > self.plan.below {
            ranges.push((4 << 30, (self.plan.megabytes - self.plan.below) << 20));
        }
        ranges
    }

    /// All RAM, in the order of its addresses.
    pub fn ram(&self) -> Vec<u8> {
        self.ram_ranges().into_iter().flat_map(|(at, len)| self.memory(at, len)).collect()
    }

    fn starts_again(&self) {
        *self.said_before.lock().unwrap_or_else(|e| e.into_inner()) = (self.report(), self.console());
    }

    /// Whether it runs, and nothing comes of its boot: so ends one in some hundred. One that still stands is let run.
    pub fn is_mute(&self) -> bool {
        let before = self.said_before.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let has_said = || {
            let (report, console) = (self.report(), self.console());
            let new = |now: &str, before: &str| now.strip_prefix(before).unwrap_or(now).to_owned();
            says_of_its_boot(&new(&report, &before.0), &new(&console, &before.1))
        };
        if has_said() {
            return false;
        }
        let mut qmp = self.qmp.lock().unwrap_or_else(|e| e.into_inner());
        let runs = |qmp: &mut Qmp| {
            qmp.ask("query-status", json!({})).is_ok_and(|status| status["status"] == "running")
        };
        if !runs(&mut qmp) {
            // It fails where QEMU is gone, which the next question shows.
            let _ = qmp.ask("cont", json!({}));
        }
        !wait_until(SILENCE, || has_said() || !self.qemu_runs()) && runs(&mut qmp)
    }

    pub fn kill_qemu(&self) {
        kill(self.pid, "KILL");
        assert!(wait_until(PATIENCE, || !self.qemu_runs()), "QEMU has not ended");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        note_end(|| died_of_qemu(&self.console()) || self.is_mute());
        drop(self.end.take());
        let _ = self.ended.recv_timeout(PATIENCE);
    }
}

/// Where two copies of RAM differ: offsets of the first bytes that do.
pub fn differences(before: &[u8], after: &[u8]) -> Vec<usize> {
    const PAGE: usize = 4096;
    assert_eq!(before.len(), after.len());
    let pages = before
        .chunks(PAGE)
        .zip(after.chunks(PAGE))
        .enumerate()
        .filter(|(_, (before, after))| before != after);
    let bytes = pages.flat_map(|(page, (before, after))| {
        (0..before.len()).filter(|&at| before[at] != after[at]).map(move |at| page * PAGE + at)
    });
    bytes.take(100).collect()
}

/// Decimal, or hexadecimal with 0x.
pub fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .unwrap_or_else(|_| panic!("not a number: {text}"))
}

/// A check's name, and the check.
pub type Check<'a> = (&'a str, fn(&Guest));

/// Runs checks on one guest, which is settled before each; what fails is told at the end.
/// `KSTUB_VM_ONLY=NAME` runs only those with NAME in their names.
pub fn checks(guest: &Guest, checks: &[Check]) {
    let only = std::env::var("KSTUB_VM_ONLY").unwrap_or_default();
    let mut failed = Vec::new();
    for (name, check) in checks.iter().filter(|(name, _)| name.contains(&only)) {
        let start = Instant::now();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            guest.settle();
            check(guest);
        }));
        let ok = if outcome.is_ok() { "ok" } else { "FAILED" };
        eprintln!("check {name}: {ok} in {:.1} s", start.elapsed().as_secs_f64());
        if outcome.is_err() {
            failed.push(*name);
        }
        assert!(guest.qemu_runs(), "{name}: QEMU is gone");
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
}
