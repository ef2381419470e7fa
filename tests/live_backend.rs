//! The live backend against a real QEMU and the lab's guest: what it reads is what QEMU itself shows.
//!
//! `KSTUB_VM`: unset, the tests run if QEMU and a kernel of the lab are there; 1, they must; 0, they are skipped.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "live_backend/others.rs"]
mod others;
mod support;

use kstub::addr::{PhysAddr, VirtAddr};
use kstub::arch::x86_64::{Reg, Saved};
use kstub::backend::Backend;
use kstub::backend::live::{Go, Happening, LiveControl, LiveError, Point, RunState, StopReason};
use kstub::backend::qemu::{Guest, QmpAddress};
use kstub::memory::PhysicalMemory;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use support::live;

/// How long the lab's guest may take to plant everything.
const BOOT: Duration = Duration::from_secs(240);

/// One guest at a time: two cores emulate four CPUs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const QEMU: &str = "qemu-system-x86_64";
/// What `qemu/programs/spin-user.c` has in rax and r15.
const PLANTED: [(Reg, u64); 2] = [(Reg::Rax, 0x1112_1314_1516_1718), (Reg::R15, 0xf1f2_f3f4_f5f6_f7f8)];

struct Vm {
    qemu: Child,
    directory: tempfile::TempDir,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn lab() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/kstub-lab");
    std::env::var_os("KSTUB_LAB").map_or_else(home, PathBuf::from)
}

/// The lab's guest for its kernel 6.1, which is a link to a release.
fn initrd() -> Option<PathBuf> {
    let release = std::fs::canonicalize(lab().join("kernels/6.1")).ok()?;
    Some(lab().join("initramfs").join(release.file_name()?).join("base.cpio"))
}

/// Whether to run; says why not.
fn wanted(needs_kernel: bool) -> bool {
    let asked = std::env::var("KSTUB_VM").unwrap_or_default();
    let kernel = lab().join("kernels/6.1/vmlinuz").exists() && initrd().is_some_and(|path| path.exists());
    let qemu = Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_ok();
    let there = qemu && (kernel || !needs_kernel);
    match asked.as_str() {
        "0" => eprintln!("skipped: KSTUB_VM=0"),
        "1" => {
            assert!(there, "KSTUB_VM=1, but {QEMU} or the lab's kernel is not there (scripts/lab guest 6.1)")
        }
        _ if !there => eprintln!("skipped: no {QEMU}, or no kernel of the lab (scripts/lab guest 6.1)"),
        _ => {}
    }
    asked != "0" && there
}

impl Vm {
    fn start(machine: &str, more: &[&str]) -> Self {
        Self::start_with(machine, ["tcg,thread=multi", "max,la57=off"], more)
    }

    fn start_with(machine: &str, [accelerator, cpu]: [&str; 2], more: &[&str]) -> Self {
        let directory = tempfile::Builder::new().prefix("kstub-test-").tempdir().unwrap();
        let qmp = format!("unix:{},server=on,wait=off", directory.path().join("qmp").display());
        let log = std::fs::File::create(directory.path().join("qemu.log")).unwrap();
        let qemu = Command::new(QEMU)
            .args(["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-machine", machine, "-accel", accelerator, "-cpu", cpu, "-smp", "4"])
            .args(["-qmp", &qmp])
            .args(more)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let vm = Self { qemu, directory };
        vm.until("QEMU listens", || vm.path("qmp").exists());
        vm
    }

    /// The lab's guest, up to the point where its programs run.
    fn boot(machine: &str, more: &[&str]) -> Self {
        for _ in 1..live::BOOTS {
            match Self::try_boot(machine, more) {
                Ok(vm) => return vm,
                Err(why) if why.is_empty() || live::died_of_qemu(&why) => {
                    eprintln!("another boot after: {why}")
                }
                Err(why) => panic!("{why}"),
            }
        }
        Self::try_boot(machine, more).unwrap()
    }

    /// The same, or the console of a guest that does not come up.
    fn try_boot(machine: &str, more: &[&str]) -> Result<Self, String> {
        let directory = tempfile::Builder::new().prefix("kstub-test-").tempdir().unwrap();
        // What it reports goes there.
        let disk = |name: &str| {
            let path = directory.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(256 << 20).unwrap();
            format!("file={},format=raw,if=none,id={name}", path.display())
        };
        let console = directory.path().join("console");
        let (facts, pages) = (disk("facts"), disk("pages"));
        let serial = format!("file:{}", console.display());
        let (kernel, initrd) = (lab().join("kernels/6.1/vmlinuz"), initrd().unwrap());
        let mut args = vec!["-kernel", kernel.to_str().unwrap(), "-initrd", initrd.to_str().unwrap()];
        args.extend(["-append", "console=ttyS0 panic=0", "-serial", &serial]);
        args.extend(["-drive", &facts, "-device", "virtio-blk-pci,drive=facts,serial=facts"]);
        args.extend(["-drive", &pages, "-device", "virtio-blk-pci,drive=pages,serial=pages"]);
        args.extend(more);
        let mut vm = Self::start(machine, &args);
        let said = || String::from_utf8_lossy(&std::fs::read(&console).unwrap_or_default()).into_owned();
        let is_ready = || said().contains("KSTUB-GUEST-READY");
        let has_failed = || {
            let said = said();
            said.contains("KSTUB-GUEST-FAILED")
                || said.contains("end Kernel panic")
                || live::died_of_qemu(&said)
        };
        live::wait_until(BOOT, || is_ready() || has_failed());
        if !is_ready() {
            return Err(said());
        }
        // The files that QEMU has open may go.
        vm.qemu.try_wait().unwrap();
        Ok(vm)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(240);
        while !done() {
            assert!(Instant::now() < deadline, "not in time: {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("qemu.log")).unwrap_or_default()
    }

    fn address(&self) -> QmpAddress {
        QmpAddress::parse(self.path("qmp").to_str().unwrap()).unwrap()
    }
}

/// Every byte of every range is what `pmemsave` writes; the guest must stand still.
fn memory_is_what_qemu_saves(guest: &Guest, at_most: u64, directory: &Path) {
    let machine = guest.take_snapshot().unwrap();
    let file = directory.join("saved");
    let mut compared = 0u64;
    for range in machine.ranges() {
        let len = range.len().min(at_most);
        for start in [range.start.0, range.end.0 - len] {
            let answer =
                guest.monitor(&format!("pmemsave {start:#x} {len:#x} \"{}\"", file.display())).unwrap();
            assert_eq!(answer, "");
            // `monitor` may have changed anything: what is read is read anew.
            let machine = guest.take_snapshot().unwrap();
            let saved = std::fs::read(&file).unwrap();
            assert_eq!(saved.len() as u64, len);
            let mut read = vec![0; saved.len()];
            machine.read_phys_exact(PhysAddr(start), &mut read).unwrap();
            assert!(read == saved, "{len:#x} bytes at {start:#x} differ");
            // Mutation check: eight bytes further it is something else, unless all is the same.
            let (first, rest) = saved.split_at(8);
            assert!(read[8..] != saved[..saved.len() - 8] || rest.chunks(8).all(|word| word == first));
            // In pieces across pages, through the cache.
            for at in (4090..saved.len().saturating_sub(16)).step_by(0x1_0001) {
                let mut read = [0; 16];
                machine.read_phys_exact(PhysAddr(start + at as u64), &mut read).unwrap();
                assert_eq!(read, saved[at..at + 16]);
            }
            compared += len;
            if len == range.len() {
                break;
            }
        }
    }
    let facts = machine.facts();
    let ways = &facts.iter().find(|fact| fact.name == "memory").unwrap().value;
    eprintln!("{compared:#x} bytes equal pmemsave, by {ways}");
    assert!(compared > 0);
}

/// The value behind `NAME=` or `NAME =` in the lines of one CPU of `info registers -a`.
fn shown(text: &str, cpu: u32, name: &str) -> u64 {
    let text = text.split("CPU#").find_map(|one| one.strip_prefix(&format!("{cpu}\n"))).unwrap();
    let at = text.find(&format!("{name}=")).unwrap();
    let digits: String = text[at + name.len() + 1..].chars().take_while(char::is_ascii_hexdigit).collect();
    u64::from_str_radix(&digits, 16).unwrap()
}

fn registers_are_what_qemu_shows(guest: &Guest) {
    let machine = guest.take_snapshot().unwrap();
    registers_are_those_of(&machine, &guest.monitor("info registers -a").unwrap());
}

/// `text` is what the monitor's `info registers -a` shows.
fn registers_are_those_of(machine: &dyn Backend, text: &str) {
    assert_eq!(machine.saved_cpus().len(), 4);
    // Mutation check: the CPUs differ, so that a wrong one would be seen.
    let stacks: Vec<u64> = (0..4).map(|cpu| shown(text, cpu, "RSP")).collect();
    assert!(stacks.iter().enumerate().all(|(i, sp)| !stacks[..i].contains(sp)), "{stacks:x?}");
    for (cpu, saved) in (0..).zip(machine.saved_cpus()) {
        assert_eq!(saved.pid, Some(cpu + 1));
        for (reg, name) in [
            (Reg::Rax, "RAX"),
            (Reg::Rbx, "RBX"),
            (Reg::Rcx, "RCX"),
            (Reg::Rdx, "RDX"),
            (Reg::Rsi, "RSI"),
            (Reg::Rdi, "RDI"),
            (Reg::Rbp, "RBP"),
            (Reg::Rsp, "RSP"),
            (Reg::R8, "R8 "),
            (Reg::R9, "R9 "),
            (Reg::R10, "R10"),
            (Reg::R15, "R15"),
            (Reg::Rip, "RIP"),
            (Reg::Eflags, "RFL"),
            (Reg::Cs, "CS "),
            (Reg::Ss, "SS "),
            (Reg::Cr0, "CR0"),
            (Reg::Cr2, "CR2"),
            (Reg::Cr3, "CR3"),
            (Reg::Cr4, "CR4"),
            (Reg::Efer, "EFER"),
            (Reg::Mxcsr, "MXCSR"),
            (Reg::Fctrl, "FCW"),
        ] {
            assert_eq!(saved.regs.u64(reg), Some(shown(text, cpu, name)), "{name} of CPU {cpu}");
        }
    }
}

#[test]
fn a_guest_before_its_first_instruction() {
    let _one = ONE_AT_A_TIME.lock();
    if !wanted(false) {
        return;
    }
    let vm = Vm::start("q35", &["-m", "64M", "-S"]);
    let guest = Guest::connect(&vm.address()).unwrap();
    assert_eq!(guest.run_state().unwrap(), RunState::Stopped("prelaunch"));
    let machine = guest.snapshot().unwrap();
    let regs = &machine.saved_cpus()[3].regs;
    assert_eq!((regs.u64(Reg::Rip), regs.u64(Reg::Cs)), (Some(0xfff0), Some(0xf000)));
    assert_eq!((regs.get(Reg::R8), regs.get(Reg::KGsBase)), (Saved::NotSaved, Saved::NotSaved));
    assert!(machine.is_ram(PhysAddr(0xffff_fff0)) && !machine.is_ram(PhysAddr(0xfee0_0000)));
    // The reset vector: a far jump.
    let mut jump = [0; 1];
    machine.read_phys_exact(PhysAddr(0xffff_fff0), &mut jump).unwrap();
    assert_eq!(jump, [0xea]);
    let stop = guest.attach().unwrap();
    assert_eq!(stop.cpu, 0);
    let regs = guest.snapshot().unwrap().saved_cpus()[0].regs.clone();
    assert_eq!((regs.u64(Reg::Rip), regs.u64(Reg::KGsBase)), (Some(0xfff0), Some(0)));
    guest.resume(&[(Some(0), Go::Step)]).unwrap();
    let stop = guest.wait_stop(Duration::from_secs(10)).unwrap().unwrap();
    assert_eq!(stop.reason, StopReason::Signal(5));
    assert_ne!(guest.snapshot().unwrap().saved_cpus()[0].regs.u64(Reg::Rip), Some(0xfff0));
    guest.detach(false).unwrap();
    assert!(matches!(guest.run_state().unwrap(), RunState::Stopped(_)));
}

/// Over TCP there is no process to read from, and without a shared file only the monitor is left.
#[test]
fn memory_by_every_way() {
    let _one = ONE_AT_A_TIME.lock();
    if !wanted(false) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ram");
    let shared = format!("memory-backend-file,id=ram,size=64M,mem-path={},share=on", file.display());
    let args = ["-m", "64M", "-object", &shared, "-vga", "std", "-qmp", "tcp:127.0.0.1:0,server=on,wait=off"];
    let dimm =
        ["-object", "memory-backend-memfd,id=more,size=128M,share=on", "-device", "pc-dimm,memdev=more"];
    let args = [&args[..], &dimm[..], &["-m", "64M,slots=2,maxmem=8G"]].concat();
    let vm = Vm::start("q35,memory-backend=ram", &args);
    let by_socket = Guest::connect(&vm.address()).unwrap();
    // The firmware has something in RAM by then.
    vm.until("the firmware runs", || {
        let machine = by_socket.take_snapshot().unwrap();
        machine.read_phys_u64(PhysAddr(0x410)).is_ok_and(|word| word != 0)
    });
    by_socket.monitor("stop").unwrap();
    let devices = by_socket.monitor("info chardev").unwrap();
    let tcp = devices.lines().find_map(|line| line.split_once("tcp:")).unwrap().1;
    let tcp = tcp.split(',').next().unwrap();
    let by_tcp = Guest::connect(&QmpAddress::parse(tcp).unwrap()).unwrap();
    let ways = |guest: &Guest| {
        let facts = guest.take_snapshot().unwrap().facts();
        facts.iter().find(|fact| fact.name == "memory").unwrap().value.clone()
    };
    assert!(
        ways(&by_socket).contains("/ram (") && ways(&by_socket).contains("/mem ("),
        "{}",
        ways(&by_socket)
    );
    assert!(ways(&by_tcp).contains("/ram (") && ways(&by_tcp).contains("monitor ("), "{}", ways(&by_tcp));
    let ranges = by_socket.take_snapshot().unwrap().ranges();
    // The pc-dimm follows the firmware's flash, which ends at 4 GiB.
    assert!(ranges.iter().any(|range| range.end.0 == (1 << 32) + (128 << 20)), "{ranges:?}");
    memory_is_what_qemu_saves(&by_socket, u64::MAX, directory.path());
    memory_is_what_qemu_saves(&by_tcp, 0x8000, directory.path());
    // The pc-dimm is a memfd, which only QEMU's process leads to.
    assert!(by_tcp.take_snapshot().unwrap().problems().iter().any(|problem| problem.contains("monitor")));
    drop(by_tcp);

    // The process at the other end is not QEMU: its memory is not taken for the guest's.
    let proxy = vm.path("proxy");
    forward(&proxy, tcp);
    let by_proxy = Guest::connect(&QmpAddress::parse(proxy.to_str().unwrap()).unwrap()).unwrap();
    assert!(!ways(&by_proxy).contains("/mem (") && ways(&by_proxy).contains("/ram ("), "{}", ways(&by_proxy));
    memory_is_what_qemu_saves(&by_proxy, 0x1000, directory.path());
    drop(by_proxy);

    // Nor is another file of the name that QEMU's had.
    std::fs::rename(&file, directory.path().join("moved")).unwrap();
    std::fs::write(&file, vec![0x5a; 64 << 20]).unwrap();
    forward(&vm.path("again"), tcp);
    let fooled = Guest::connect(&QmpAddress::parse(vm.path("again").to_str().unwrap()).unwrap()).unwrap();
    assert!(!ways(&fooled).contains("/ram (") && ways(&fooled).contains("monitor ("), "{}", ways(&fooled));
    memory_is_what_qemu_saves(&fooled, 0x1000, directory.path());
}

/// Passes one connection to a Unix socket on to a TCP port.
fn forward(path: &Path, tcp: &str) {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    let tcp = tcp.to_owned();
    std::thread::spawn(move || {
        let (mut from, _) = listener.accept().unwrap();
        let mut to = std::net::TcpStream::connect(tcp).unwrap();
        let (mut back_from, mut back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut back_from, &mut back_to);
        });
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
}

#[test]
fn a_running_guest_is_read_stopped_and_left_as_it_was() {
    let _one = ONE_AT_A_TIME.lock();
    if !wanted(true) {
        return;
    }
    let vm = Vm::boot("q35", &["-m", "512M"]);
    let guest = Guest::connect(&vm.address()).unwrap();
    assert_eq!(guest.run_state().unwrap(), RunState::Running);
    assert_eq!(guest.accelerator(), "tcg");

    // Running: registers of a program that keeps them, without a stop.
    vm.until("CPU 1 is seen in its loop", || {
        let machine = guest.take_snapshot().unwrap();
        let regs = &machine.saved_cpus()[1].regs;
        regs.in_user_mode() == Some(true) && PLANTED.iter().all(|&(reg, value)| regs.u64(reg) == Some(value))
    });
    assert_eq!(guest.run_state().unwrap(), RunState::Running);
    assert_eq!(guest.happenings(), []);
    let machine = guest.take_snapshot().unwrap();
    let xmm = machine.saved_cpus()[1].regs.get(Reg::Xmm1).value().unwrap();
    assert_eq!(xmm, 0x1f1e_1d1c_1b1a_1918_1716_1514_1312_1110);

    a_running_guest_is_not_read_from_yesterday(&*guest.snapshot().unwrap());

    // Paused: what QEMU says, byte by byte.
    guest.monitor("stop").unwrap();
    assert_eq!(guest.run_state().unwrap(), RunState::Stopped("paused"));
    registers_are_what_qemu_shows(&guest);
    memory_is_what_qemu_saves(&guest, u64::MAX, vm.directory.path());
    let glimpse = guest.glimpse(&mut |_| ()).unwrap();
    assert_eq!((glimpse.stood, guest.run_state().unwrap()), (None, RunState::Stopped("paused")));
    guest.monitor("cont").unwrap();
    assert_eq!(guest.happenings(), [Happening::Stopped, Happening::Resumed]);
    a_glimpse_is_of_one_moment(&guest);

    run_control(&vm, &guest);

    // Killed in between: an error, and soon.
    guest.monitor("system_reset").unwrap();
    // With -no-reboot a reset ends QEMU.
    vm.until("QEMU ends", || matches!(guest.run_state(), Err(LiveError::Gone(_))));
    assert!(guest.take_snapshot().is_err());
    let asked = Instant::now();
    assert!(matches!(guest.attach(), Err(LiveError::Gone(_))));
    assert!(asked.elapsed() < Duration::from_secs(9), "less than a request may take");
}

/// One snapshot of a running guest sees memory change, also by reads that are small enough for a cache.
fn a_running_guest_is_not_read_from_yesterday(machine: &dyn Backend) {
    let at = changing(machine);
    let first = machine.read_phys_u64(at).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while machine.read_phys_u64(at).unwrap() == first {
        assert!(Instant::now() < deadline, "{at} seems not to change any more");
    }
}

/// Memory and registers are those of one stop, which is our own and ends.
fn a_glimpse_is_of_one_moment(guest: &Guest) {
    const STOOD: Duration = Duration::from_millis(50);
    let at = changing(&*guest.snapshot().unwrap());
    let mut text = String::new();
    let glimpse = guest
        .glimpse(&mut |standing| {
            assert_eq!(guest.run_state().unwrap(), RunState::Stopped("paused"));
            text = guest.monitor("info registers -a").unwrap();
            let first = standing.read_phys_u64(at).unwrap();
            std::thread::sleep(STOOD);
            assert_eq!(standing.read_phys_u64(at).unwrap(), first);
        })
        .unwrap();
    assert_eq!(guest.run_state().unwrap(), RunState::Running);
    assert_eq!(guest.happenings(), [], "our own doing");
    assert!(glimpse.stood.is_some_and(|stood| stood >= STOOD));
    registers_are_those_of(&*glimpse.machine, &text);
    a_running_guest_is_not_read_from_yesterday(&*glimpse.machine);
}

/// Where memory of a running guest changes, again and again.
fn changing(machine: &dyn Backend) -> PhysAddr {
    const CHUNK: usize = 1 << 20;
    let chunk = |at: u64| {
        let mut bytes = vec![0; CHUNK];
        machine.read_phys_exact(PhysAddr(at), &mut bytes).unwrap();
        bytes
    };
    // Read past what small reads are kept in.
    let word = |at: PhysAddr| chunk(at.0)[..8].to_vec();
    let goes_on = |at: PhysAddr| {
        let first = word(at);
        let differs = |_| {
            std::thread::sleep(Duration::from_millis(2));
            word(at) != first
        };
        (0..100).any(differs)
    };
    let changing = (1..511).map(|n| n * CHUNK as u64).find_map(|at| {
        let before = chunk(at);
        std::thread::sleep(Duration::from_millis(2));
        let after = chunk(at);
        let differs = (0..CHUNK).step_by(8).filter(|&i| before[i..i + 8] != after[i..i + 8]);
        differs.map(|i| PhysAddr(at + i as u64)).take(8).find(|&at| goes_on(at) && goes_on(at))
    });
    changing.expect("some memory of a running guest changes")
}

fn run_control(vm: &Vm, guest: &Guest) {
    let soon = Duration::from_secs(20);
    assert!(matches!(guest.resume(&[(None, Go::Continue)]), Err(LiveError::NotNow { .. })));
    guest.attach().unwrap();
    assert!(matches!(guest.run_state().unwrap(), RunState::Stopped(_)));
    registers_are_what_qemu_shows(guest);
    let regs = |cpu: usize| guest.take_snapshot().unwrap().saved_cpus()[cpu].regs.clone();
    assert!(matches!(regs(0).get(Reg::KGsBase), Saved::Known(_)));

    // A breakpoint in the loop of the busy program.
    vm.until("CPU 1 is in its loop", || {
        if regs(1).in_user_mode() == Some(true) {
            return true;
        }
        guest.resume(&[(None, Go::Continue)]).unwrap();
        assert_eq!(guest.wait_stop(Duration::from_millis(20)).unwrap(), None);
        guest.interrupt().unwrap();
        let stop = guest.wait_stop(soon).unwrap().unwrap();
        assert_eq!(stop.reason, StopReason::Signal(2));
        false
    });
    let at = VirtAddr(regs(1).u64(Reg::Rip).unwrap());
    guest.insert(Point::Software, at, 1).unwrap();
    for _ in 0..3 {
        guest.resume(&[(Some(1), Go::Step)]).unwrap();
        guest.wait_stop(soon).unwrap().unwrap();
        guest.resume(&[(None, Go::Continue)]).unwrap();
        let busy = guest.insert(Point::Hardware, at, 1);
        assert!(matches!(busy, Err(LiveError::NotNow { .. })), "{busy:?}");
        let stop = guest.wait_stop(soon).unwrap().unwrap();
        assert_eq!((stop.cpu, stop.reason), (1, StopReason::Signal(5)));
        assert!(matches!(guest.run_state().unwrap(), RunState::Stopped(_)));
        assert_eq!(regs(1).u64(Reg::Rip), Some(at.0));
    }
    guest.remove(Point::Software, at, 1).unwrap();

    // Interrupted by another thread than the one that waits; a third may wait, too.
    guest.resume(&[(None, Go::Continue)]).unwrap();
    std::thread::scope(|scope| {
        let waits: Vec<_> = (0..2).map(|_| scope.spawn(|| guest.wait_stop(soon).unwrap().unwrap())).collect();
        std::thread::sleep(Duration::from_millis(120));
        // Readers need not wait for it.
        assert_eq!(guest.take_snapshot().unwrap().saved_cpus().len(), 4);
        guest.interrupt().unwrap();
        waits.into_iter().for_each(|wait| assert_eq!(wait.join().unwrap().reason, StopReason::Signal(2)));
    });

    // One CPU steps, the others stay.
    let before: Vec<_> = (0..4).map(|cpu| regs(cpu).u64(Reg::Rip)).collect();
    guest.resume(&[(Some(1), Go::Step)]).unwrap();
    assert_eq!(guest.wait_stop(soon).unwrap().unwrap().cpu, 1);
    for cpu in [0, 2, 3] {
        assert_eq!(regs(cpu).u64(Reg::Rip), before[cpu]);
    }

    // Writes, which are undone.
    let rax = regs(1).u64(Reg::Rax).unwrap();
    guest.write_register(1, "rax", &(rax ^ 0xff).to_le_bytes()).unwrap();
    assert_eq!(regs(1).u64(Reg::Rax), Some(rax ^ 0xff));
    guest.write_register(1, "rax", &rax.to_le_bytes()).unwrap();
    assert!(matches!(guest.write_register(1, "nosuch", &[0]), Err(LiveError::Refused { .. })));
    let free = PhysAddr(0x500);
    let word = |at| guest.take_snapshot().unwrap().read_phys_u64(at).unwrap();
    let old = word(free);
    guest.write_phys(free, &0x1122_3344_5566_7788u64.to_le_bytes()).unwrap();
    assert_eq!(word(free), 0x1122_3344_5566_7788);
    let big: Vec<u8> = (0..3000u32).map(|i| (i * 7) as u8).collect();
    let mut kept = vec![0; big.len()];
    guest.take_snapshot().unwrap().read_phys_exact(PhysAddr(0x10_0000), &mut kept).unwrap();
    guest.write_phys(PhysAddr(0x10_0000), &big).unwrap();
    guest.write_phys(PhysAddr(0x10_0000), &kept).unwrap();
    guest.write_phys(free, &old.to_le_bytes()).unwrap();
    for at in [0xffff_fff0, 0xfee0_0000, 1 << 40] {
        assert!(guest.write_phys(PhysAddr(at), &[0]).is_err(), "{at:#x}");
    }
    assert_eq!(guest.stub_packet(b"qqemu.sstep").unwrap(), b"0x7");
    assert!(guest.stub_packet(b"g").is_err() && guest.stub_packet(b"Qqemu.PhyMemMode:1").is_err());

    // Left with a breakpoint set and running: it runs on, and QEMU has no stub any more.
    guest.insert(Point::Hardware, at, 1).unwrap();
    guest.resume(&[(None, Go::Continue)]).unwrap();
    guest.detach(true).unwrap();
    assert_eq!(guest.run_state().unwrap(), RunState::Running);
    assert!(!guest.monitor("info chardev").unwrap().lines().any(|line| line.starts_with("gdb:")));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.run_state().unwrap(), RunState::Running);
    assert_eq!(guest.happenings(), []);
    assert!(!guest.can_reverse());

    // Taken again, and left standing.
    guest.attach().unwrap();
    guest.detach(false).unwrap();
    assert!(matches!(guest.run_state().unwrap(), RunState::Stopped(_)));
    guest.monitor("cont").unwrap();

    // Dropped while attached: it runs as it did before.
    let stub = vm.path("gdb");
    let answer = guest.monitor(&format!("gdbserver unix:{},server=on,wait=off", stub.display())).unwrap();
    assert!(answer.contains("Waiting"), "{answer}");
    guest.attach().unwrap();
    guest.detach(true).unwrap();
    assert!(
        guest.monitor("info chardev").unwrap().lines().any(|line| line.starts_with("gdb:")),
        "not ours to end"
    );
    assert_eq!(guest.run_state().unwrap(), RunState::Running);
}

/// KVM's breakpoints are in the guest's memory, and nobody sees them.
#[test]
fn breakpoints_under_kvm_are_not_read() {
    let _one = ONE_AT_A_TIME.lock();
    if !wanted(false) {
        return;
    }
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("skipped: no /dev/kvm that may be used");
        return;
    }
    let vm = Vm::start_with("q35", ["kvm", "kvm64"], &["-m", "64M", "-S"]);
    let guest = Guest::connect(&vm.address()).unwrap();
    assert_eq!(guest.accelerator(), "kvm");
    guest.attach().unwrap();
    // No page tables yet.
    let (at, phys) = (VirtAddr(0x2_0345), PhysAddr(0x2_0345));
    guest.write_phys(phys, &[0x90]).unwrap();
    let byte = |guest: &Guest| {
        let mut byte = [0];
        guest.take_snapshot().unwrap().read_phys_exact(phys, &mut byte).unwrap();
        byte[0]
    };
    let really = |guest: &Guest| {
        let text = guest.monitor(&format!("xp /1bx {:#x}", phys.0)).unwrap();
        u8::from_str_radix(text.trim().rsplit_once("0x").unwrap().1, 16).unwrap()
    };
    let before = byte(&guest);
    assert_eq!((before, really(&guest)), (0x90, 0x90));
    guest.insert(Point::Software, at, 1).unwrap();
    assert_eq!((byte(&guest), really(&guest)), (before, 0xcc));
    // Put twice it is there until it was removed twice.
    guest.insert(Point::Software, at, 1).unwrap();
    guest.remove(Point::Software, at, 1).unwrap();
    assert_eq!((byte(&guest), really(&guest)), (before, 0xcc));
    guest.remove(Point::Software, at, 1).unwrap();
    assert_eq!((byte(&guest), really(&guest)), (before, before));
    // And given back there is none.
    guest.insert(Point::Software, at, 1).unwrap();
    guest.detach(false).unwrap();
    assert_eq!(really(&guest), before);
}
