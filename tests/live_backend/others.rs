//! Others beside this session: one that was killed, another monitor, a user with a stub of his own.

use super::*;

const VICTIM: &str = "KSTUB_TEST_VICTIM";
/// Where it puts a breakpoint into a guest that stands.
const POINT: &str = "KSTUB_TEST_POINT";

/// A session that takes run control and is killed.
fn victim(address: &str) -> ! {
    kstub::backend::qemu::guard::enable(env!("CARGO_BIN_EXE_kstub").into(), vec!["__guard".into()]);
    let guest = Guest::connect(&QmpAddress::parse(address).unwrap()).unwrap();
    if let Ok(at) = std::env::var(POINT) {
        guest.attach().unwrap();
        guest.insert(Point::Software, VirtAddr(at.parse().unwrap()), 1).unwrap();
    } else {
        // A word: its guardian goes without one.
        guest.attach().unwrap();
        guest.detach(true).unwrap();
        assert_eq!(guest.run_state().unwrap(), RunState::Running);
        guest.attach().unwrap();
        guest.insert(Point::Hardware, VirtAddr(0xffff_ffff_8100_0000), 1).unwrap();
    }
    std::fs::write(format!("{address}.attached"), "").unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn the_guest_of_a_killed_session_runs_on() {
    // The session is this test in a process of its own.
    if let Ok(address) = std::env::var(VICTIM) {
        victim(&address);
    }
    let _one = ONE_AT_A_TIME.lock();
    if !wanted(false) {
        return;
    }
    let vm = Vm::start("q35", &["-m", "64M"]);
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "others::the_guest_of_a_killed_session_runs_on"])
        .env(VICTIM, vm.path("qmp"))
        .spawn()
        .unwrap();
    vm.until("it has run control", || vm.path("qmp.attached").exists());
    victim.kill().unwrap();
    victim.wait().unwrap();
    // The monitor is the guardian's first.
    std::thread::sleep(Duration::from_secs(2));
    let mut guest = None;
    vm.until("the monitor is free", || {
        guest = Guest::connect(&vm.address()).ok();
        guest.as_ref().is_some_and(|guest| guest.run_state().is_ok_and(|state| state == RunState::Running))
    });
    let guest = guest.unwrap();
    assert!(!guest.monitor("info chardev").unwrap().lines().any(|line| line.starts_with("gdb:")));
}

/// Under TCG each vCPU has its own breakpoints, and the guest stood: nobody detaches.
#[test]
fn breakpoints_of_a_killed_session_go_also_where_the_guest_stood() {
    if let Ok(address) = std::env::var(VICTIM) {
        victim(&address);
    }
    let _one = ONE_AT_A_TIME.lock();
    if !wanted(true) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let second = directory.path().join("second");
    let second_qmp = format!("unix:{},server=on,wait=off", second.display());
    let vm = Vm::boot("q35", &["-m", "512M", "-qmp", &second_qmp]);
    let other = Guest::connect(&QmpAddress::parse(second.to_str().unwrap()).unwrap()).unwrap();
    let guest = Guest::connect(&vm.address()).unwrap();
    let in_loop = || guest.take_snapshot().unwrap().saved_cpus()[1].regs.clone();
    vm.until("CPU 1 is in its loop", || {
        other.monitor("stop").unwrap();
        let regs = in_loop();
        let found = PLANTED.iter().all(|&(reg, value)| regs.u64(reg) == Some(value));
        if !found {
            other.monitor("cont").unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
        found
    });
    let at = in_loop().u64(Reg::Rip).unwrap();
    drop(guest);
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "others::breakpoints_of_a_killed_session_go_also_where_the_guest_stood"])
        .envs([(VICTIM, vm.path("qmp").into_os_string()), (POINT, at.to_string().into())])
        .spawn()
        .unwrap();
    vm.until("it has run control", || vm.path("qmp.attached").exists());
    victim.kill().unwrap();
    victim.wait().unwrap();
    vm.until("the guardian has been there", || {
        !other.monitor("info chardev").unwrap().lines().any(|line| line.starts_with("gdb:"))
    });
    assert!(matches!(other.run_state().unwrap(), RunState::Stopped(_)));
    runs_on(&other);

    // Others let it run while kstub has it: it is stopped again, and given back as it is to be.
    let guest = Guest::connect(&vm.address()).unwrap();
    guest.attach().unwrap();
    other.monitor("cont").unwrap();
    guest.snapshot().unwrap();
    assert_eq!(other.run_state().unwrap(), RunState::Running);
    guest.insert(Point::Hardware, VirtAddr(at), 1).unwrap();
    assert!(matches!(other.run_state().unwrap(), RunState::Stopped(_)));
    other.monitor("cont").unwrap();
    guest.detach(true).unwrap();
    runs_on(&other);
}

/// Let run, it does, and nothing stops it.
fn runs_on(guest: &Guest) {
    guest.monitor("cont").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(guest.run_state().unwrap(), RunState::Running);
}

/// The user's own stub is used, by whatever name QEMU has it, and never ended.
#[test]
fn the_users_own_stub_stays() {
    let _one = ONE_AT_A_TIME.lock();
    if !wanted(false) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("own");
    let device = format!("socket,id=gdb0,path={},server=on,wait=off", socket.display());
    let vm = Vm::start("q35", &["-m", "64M", "-chardev", &device, "-gdb", "chardev:gdb0"]);
    let guest = Guest::connect(&vm.address()).unwrap();
    let devices = || guest.monitor("info chardev").unwrap();
    let has = |label: &str| devices().lines().any(|line| line.starts_with(label));
    guest.attach().unwrap();
    assert!(has("gdb0:") && !has("gdb:"), "{}", devices());
    guest.detach(true).unwrap();
    assert!(has("gdb0:") && guest.run_state().unwrap() == RunState::Running);

    // A socket that cannot be found from here is somebody's all the same.
    std::fs::rename(&socket, directory.path().join("elsewhere")).unwrap();
    let refused = guest.attach().unwrap_err().to_string();
    assert!(refused.contains("gdbserver none"), "{refused}");
    assert!(has("gdb0:") && guest.run_state().unwrap() == RunState::Running);
}
