//! Stock gdb on a guest that runs: breakpoints, stepping, watchpoints, Ctrl-C, modules as they are loaded, per-CPU
//! variables; and how the guest is left.
//!
//! Truth is what the guest has planted (which CPU calls what, which thread writes what), and QEMU's monitor: its registers
//! at each stop, its run state, the guest's heartbeat.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "live_gdb/steps.rs"]
mod steps;
mod support;
#[path = "live_gdb/watches.rs"]
mod watches;

use std::time::Duration;
use steps::*;
use support::gdb_session::functions;
use support::live::{self, Gdb, Guest, PATIENCE, Plan, Session, checks, number, wait_until};
use watches::*;

#[test]
fn gdb_on_four_cpus_with_pti() {
    for plan in [Plan::new("6.1").shared_ram(), Plan::new("6.12")] {
        let Some(guest) = plan.cpus(4).pti(true).boot() else { return };
        checks(
            &guest,
            &[
                ("attach", attach),
                ("break in a system call", system_call),
                ("step, next, finish", stepping),
                ("a task that moves", task_that_moves),
                ("a task that sleeps", task_that_sleeps),
                ("stepi alone", one_instruction),
                ("a step of an idle CPU", step_of_an_idle_cpu),
                ("a step that another CPU ends", step_that_another_ends),
                ("hardware breakpoint", hardware_breakpoint),
                ("counted breakpoint", counted_breakpoint),
                ("watch", watch),
                ("watch what nobody writes", watch_in_vain),
                ("watch a per-CPU variable", watch_per_cpu),
                ("Ctrl-C under load", interrupt_under_load),
                ("do_init_module", module_load),
                ("pending breakpoint", module_pending),
                ("per-CPU variables", per_cpu),
                ("a CPU in user mode", user_mode),
                ("read-only", read_only),
                ("--allow-write", allow_write),
                ("how it is left", how_it_is_left),
                ("commands", commands),
                ("--no-stop", no_stop),
            ],
        );
    }
}

#[test]
fn gdb_on_one_cpu() {
    let Some(guest) = Plan::new("6.12").pti(false).shared_ram().boot() else { return };
    checks(
        &guest,
        &[
            ("attach", attach),
            ("break in a system call", system_call),
            ("step, next, finish", stepping),
            ("watch", watch),
            ("Ctrl-C under load", interrupt_under_load),
            ("do_init_module", module_load),
        ],
    );
}

/// QEMU's own stub, where one runs already, is used, and is there afterwards.
#[test]
fn a_stub_that_runs_already() {
    let directory = tempfile::tempdir().unwrap();
    let stub = directory.path().join("stub");
    let listen = format!("unix:{},server=on,wait=off", stub.display());
    let plan = Plan::new("6.1").cpus(4).pti(true).shared_ram().argument("-gdb").argument(&listen);
    let Some(guest) = plan.boot() else { return };
    checks(&guest, &[("attach", attach), ("break in a system call", system_call), ("watch", watch)]);
    assert!(guest.human("info chardev").contains(&stub.display().to_string()), "its own stub is gone");
}

/// Before there is a kernel: nothing is made up, and the machine stays as it was.
#[test]
fn before_the_first_instruction() {
    live::again(|| {
        let Some(guest) = Plan::new("6.1").cpus(4).argument("-S").boot() else { return };
        let mut gdb = Gdb::start(&guest, &[]);
        assert!(gdb.ask("p/x $pc").ends_with("0xfff0"), "{}", gdb.everything());
        assert!(gdb.ask("info threads").contains("1.4"), "{}", gdb.everything());
        gdb.ask("stepi");
        assert!(!gdb.ask("p/x $pc").ends_with("0xfff0"), "{}", gdb.everything());
        gdb.quit();
        assert_ne!(guest.run_state(), "running", "it did not run before");
        guest.cont();
        guest.wait_ready();
        guest.assert_alive("after a visit before the boot");
    });
}

/// CPU of the program that calls sysinfo, or that spins.
fn cpu_of(guest: &Guest, wanted: u32) -> u32 {
    wanted.min(guest.plan.cpus - 1)
}

/// The CPU of the thread with the star, and its line.
fn current(gdb: &mut Gdb) -> (u32, String) {
    let list = gdb.ask("info threads");
    let line = list
        .lines()
        .find(|line| line.trim_start().starts_with('*'))
        .unwrap_or_else(|| panic!("{list}"))
        .to_owned();
    let cpu =
        line.split("CPU ").nth(1).and_then(|rest| rest.split([',', ')']).next()).map(|n| number(n.trim()));
    (u32::try_from(cpu.unwrap_or_else(|| panic!("{line}"))).unwrap(), line)
}

/// `p`'s answer without `$1 = `.
fn value(gdb: &mut Gdb, expression: &str) -> String {
    let answer = gdb.ask(expression);
    let (_, value) =
        answer.split_once(" = ").unwrap_or_else(|| panic!("{expression}: {answer}; {}", gdb.everything()));
    value.trim().to_owned()
}

/// The guest stands, and gdb's pc is that CPU's, which no other CPU need have.
fn assert_stopped_at(guest: &Guest, gdb: &mut Gdb, cpu: u32) {
    assert_ne!(guest.run_state(), "running");
    let pc = number(&value(gdb, "p/x $pc"));
    let registers = guest.registers();
    assert_eq!(registers[cpu as usize]["rip"], pc, "{pc:#x} is not where CPU {cpu} is");
}

/// Quits, after which the guest runs as before.
fn leave(guest: &Guest, gdb: Gdb) {
    gdb.quit();
    assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{}", guest.run_state());
    guest.assert_alive("after gdb has left");
}

fn attach(guest: &Guest) {
    let chardevs = guest.chardevs();
    let session = Session::run(
        guest,
        &[],
        &[
            "p init_task.comm",
            "p/x &_text",
            "info threads",
            "p linux_banner",
            "thread apply all bt 3",
            "info sharedlibrary",
        ],
    );
    assert!(session.answers[0].contains("swapper/0"), "{:?} {}", session.answers, session.ended.err);
    assert!(session.answers[1].ends_with(&guest.fact("symbol._text")), "{:?}", session.answers);
    let threads = session.answers[2].lines().filter(|line| line.contains("CPU ")).count();
    assert_eq!(threads, guest.plan.cpus as usize, "{}", session.answers[2]);
    assert!(session.answers[3].contains(guest.release()), "{}", session.answers[3]);
    assert!(session.answers[5].contains("kstub_live"), "{}", session.answers[5]);
    eprintln!("  attach, six commands, detach: {} ms", session.ended.took.as_millis());
    guest.assert_alive("after a batch");
    let events = guest.events();
    assert_eq!(events.last().map(String::as_str), Some("RESUME"), "{events:?}");
    assert_eq!(guest.chardevs(), chardevs, "something was left in QEMU");
}

fn system_call(guest: &Guest) {
    let cpu = cpu_of(guest, 2);
    let facts = guest.ask_facts(&format!("plant syscalls {cpu} busy"));
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("break __do_sys_sysinfo");
    let stop = gdb.ask("continue");
    assert!(stop.contains("Breakpoint 1") && stop.contains("__do_sys_sysinfo"), "{stop}");
    assert_stopped_at(guest, &mut gdb, cpu);
    guest.assert_stands("at a breakpoint");
    // Mutation check: no other CPU is there, so that a stop that names the wrong one is seen.
    let registers = guest.registers();
    let here = registers.iter().filter(|regs| regs["rip"] == registers[cpu as usize]["rip"]);
    assert_eq!(here.count(), 1);
    let (seen, line) = current(&mut gdb);
    assert_eq!(seen, cpu, "{line}");
    assert!(line.contains("kstub-sys") && line.contains(&facts["pid"]), "{line}");
    assert!(value(&mut gdb, "p info").contains(&facts["buffer"]), "{}", gdb.everything());
    let bt = gdb.ask("bt");
    let functions = functions(&bt);
    assert_eq!(functions[0], "__do_sys_sysinfo", "{bt}");
    assert!(functions.contains(&"do_syscall_64".to_owned()) && bt.contains("<user mode>"), "{bt}");
    // The user's memory is there, as it is in user mode, though the kernel runs now.
    assert_eq!(value(&mut gdb, "p info->totalram"), facts["totalram"]);
    // It comes again from the same caller, and after the breakpoint is deleted no more.
    let stop = gdb.ask("continue");
    assert!(stop.contains("Breakpoint 1"), "{stop}");
    assert_eq!(current(&mut gdb).0, cpu);
    gdb.ask("delete");
    gdb.send("continue");
    guest.assert_alive("without the breakpoint");
    gdb.interrupt();
    let stop = gdb.wait().unwrap();
    assert!(stop.contains("SIGINT"), "{stop}");
    leave(guest, gdb);
}

fn hardware_breakpoint(guest: &Guest) {
    let cpu = cpu_of(guest, 1);
    guest.ask(&format!("plant syscalls {cpu}"));
    let mut gdb = Gdb::start(guest, &[]);
    assert!(gdb.ask("hbreak do_sysinfo").contains("Hardware assisted breakpoint"));
    let stop = gdb.ask("continue");
    assert!(stop.contains("Breakpoint 1"), "{stop}");
    assert_eq!(current(&mut gdb).0, cpu);
    assert_stopped_at(guest, &mut gdb, cpu);
    leave(guest, gdb);
}

/// Every hit is counted, and a breakpoint is stepped over as if it were not there.
fn counted_breakpoint(guest: &Guest) {
    let cpu = cpu_of(guest, 3);
    let before = number(&guest.ask_facts("cat /proc/kstub_live")["count"]);
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("break kstub_live_tick");
    gdb.ask("ignore 1 9");
    let stop = gdb.ask("continue");
    assert!(stop.contains("Breakpoint 1") && stop.contains("=3)"), "{stop}");
    assert!(gdb.ask("info breakpoints").contains("already hit 10 times"), "{}", gdb.everything());
    assert_eq!(current(&mut gdb).0, cpu);
    let count = number(&value(&mut gdb, "p kstub_live.count"));
    assert!(count >= before + 9 * 3 && count.is_multiple_of(3), "{count} {before}");
    gdb.ask("finish");
    assert_eq!(number(&value(&mut gdb, "p kstub_live.count")), count + 3);
    leave(guest, gdb);
}

fn interrupt_under_load(guest: &Guest) {
    guest.ask("plant load 4");
    guest.ask(&format!("plant spin-user {}", cpu_of(guest, 1)));
    let mut gdb = Gdb::start(guest, &[]);
    for round in 0..5 {
        guest.events();
        gdb.send("continue");
        guest.assert_alive("under load, below gdb");
        let start = std::time::Instant::now();
        gdb.interrupt();
        let stop = gdb.wait().unwrap();
        assert!(stop.contains("SIGINT"), "{stop}");
        guest.assert_stands("after Ctrl-C");
        let (cpu, _) = current(&mut gdb);
        assert_stopped_at(guest, &mut gdb, cpu);
        eprintln!("  Ctrl-C {round}: {} ms, with its checks", start.elapsed().as_millis());
        // An argument in the midst of a function may be none that can be read: only the frames count.
        let bt = gdb.ask("thread apply all bt 2");
        let ends = |line: &str| line.starts_with("Cannot access") || line.starts_with("Backtrace stopped");
        assert!(bt.contains("#0 ") && !bt.lines().any(ends), "{bt}");
    }
    leave(guest, gdb);
}

/// Takes the module out that a check before this one may have left.
fn without_late(guest: &Guest) {
    guest.send("rmmod kstub_late");
    let _ = guest.answer();
}

fn module_load(guest: &Guest) {
    without_late(guest);
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("break do_init_module");
    gdb.send("continue");
    guest.assert_alive("before insmod");
    guest.send("insmod kstub_late factor=3");
    let stop = gdb.wait().unwrap();
    assert!(stop.contains("Breakpoint 1") && stop.contains("do_init_module"), "{stop}");
    assert!(value(&mut gdb, "p mod->name").contains("\"kstub_late\""));
    // Its files are known before its first instruction; also code that is thrown away after init can be stopped in.
    assert!(gdb.ask("info sharedlibrary").contains("kstub_late"), "{}", gdb.everything());
    assert_eq!(value(&mut gdb, "p kstub_late_answer"), "1");
    gdb.ask("break kstub_late_init");
    gdb.ask("break kstub_late_product");
    let stop = gdb.ask("continue");
    assert!(stop.contains("Breakpoint 2") && stop.contains("kstub_late_init"), "{stop}");
    assert!(functions(&gdb.ask("bt")).contains(&"do_init_module".to_owned()), "{}", gdb.everything());
    let stop = gdb.ask("continue");
    assert!(stop.contains("Breakpoint 3") && stop.contains("number=21"), "{stop}");
    assert_eq!(value(&mut gdb, "p factor"), "3");
    let finish = gdb.ask("finish");
    assert!(finish.contains("Value returned is") && finish.contains("= 63"), "{finish}");
    gdb.ask("delete");
    gdb.send("continue");
    guest.answer().unwrap();
    assert!(
        guest.console().contains("kstub_late")
            || guest.ask("cat /proc/modules").join("").contains("kstub_late")
    );
    gdb.interrupt();
    gdb.wait().unwrap();
    assert_eq!(value(&mut gdb, "p kstub_late_answer"), "63");
    leave(guest, gdb);
    guest.ask("rmmod kstub_late");
}

/// A breakpoint that is set before its module is there is hit by the module's init.
fn module_pending(guest: &Guest) {
    without_late(guest);
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("set breakpoint pending on");
    assert!(gdb.ask("break kstub_late_product").contains("pending"), "{}", gdb.everything());
    gdb.send("continue");
    guest.assert_alive("before insmod");
    guest.send("insmod kstub_late");
    let stop = gdb.wait();
    let answered = guest.run_state() == "running";
    assert!(stop.as_ref().is_ok_and(|stop| stop.contains("number=21")), "running: {answered}; {stop:?}");
    gdb.ask("delete");
    leave(guest, gdb);
    guest.answer().unwrap();
    guest.ask("rmmod kstub_late");
}

fn per_cpu(guest: &Guest) {
    let mut gdb = Gdb::start(guest, &[]);
    for cpu in 0..guest.plan.cpus {
        gdb.ask(&format!("thread {}", cpu + 1));
        assert_eq!(value(&mut gdb, "p runqueues.cpu"), cpu.to_string());
        // Allocated, at an address of its own for each CPU.
        let at = guest.fact(&format!("percpu.{cpu}.at"));
        assert_eq!(
            number(&value(&mut gdb, &format!("p/x *(unsigned long *){at}"))),
            guest.number(&format!("percpu.{cpu}"))
        );
        let next = guest.number(&format!("percpu.{cpu}.at")) + 8;
        assert_ne!(
            value(&mut gdb, &format!("p/x *(unsigned long *){next:#x}")),
            guest.fact(&format!("percpu.{cpu}"))
        );
    }
    let monitor = gdb.ask("monitor percpu kstub_live_percpu");
    for cpu in 0..guest.plan.cpus {
        assert!(monitor.contains(&guest.number(&format!("percpu.{cpu}")).to_string()), "{monitor}");
    }
    leave(guest, gdb);
}

/// With PTI the page tables of a CPU in user mode have next to nothing of the kernel.
fn user_mode(guest: &Guest) {
    let facts = guest.ask_facts("plant spin-user 1");
    let rip = number(&facts["rip"]);
    assert!(wait_until(PATIENCE, || guest.registers()[1]["rip"] == rip));
    // A stop may come in an interrupt.
    for _ in 0..20 {
        let mut gdb = Gdb::start(guest, &[]);
        gdb.ask("thread 2");
        if number(&value(&mut gdb, "p/x $pc")) != rip {
            leave(guest, gdb);
            continue;
        }
        for register in ["rax", "rbx", "rsi", "r8", "r15", "fs_base", "gs_base"] {
            let seen = number(&value(&mut gdb, &format!("p/x ${register}")));
            assert_eq!(seen, number(&facts[register]), "{register}");
        }
        assert_eq!(value(&mut gdb, "p/x $cs"), "0x33");
        assert!(value(&mut gdb, "p init_task.comm").contains("swapper/0"));
        assert_eq!(number(&value(&mut gdb, "p/x kstub_live_constant")), guest.number("constant"));
        assert!(gdb.ask("x/i $pc").contains("jmp"), "{}", gdb.everything());
        assert!(current(&mut gdb).1.contains("kstub-spin"));
        // One step in user mode stays there: a jump to itself.
        gdb.ask("stepi");
        assert_eq!(number(&value(&mut gdb, "p/x $pc")), rip);
        leave(guest, gdb);
        return;
    }
    panic!("CPU 1 was never found in user mode");
}

fn read_only(guest: &Guest) {
    let mut gdb = Gdb::start(guest, &[]);
    let (registers, ram) = (guest.registers(), guest.ram());
    let writes = [
        "set var kstub_live_constant = 1",
        "set var $rbx = 1",
        "set var $pc = 0",
        "p kstub_live_tick(7)",
        "restore /bin/true binary &init_task",
        "monitor qemu system_reset",
        "monitor qemu quit",
        "monitor qemu cont",
        "monitor qemu loadvm x",
        "monitor qemu sendkey ctrl-alt-delete",
        "monitor qemu nmi",
        "monitor qemu pmemsave 0 4096 /dev/null",
    ];
    for command in writes {
        let answer = gdb.ask(command);
        eprintln!("  {command}: {}", answer.replace('\n', " | "));
        assert!(guest.qemu_runs(), "{command}: QEMU is gone");
        assert_ne!(guest.run_state(), "running", "{command}");
    }
    assert_eq!(guest.registers(), registers);
    let now = guest.ram();
    let changed = live::differences(&ram, &now);
    assert_eq!(changed, [0; 0], "addresses that changed");
    // QEMU's stub would end QEMU.
    gdb.ask("kill");
    drop(gdb);
    assert!(wait_until(PATIENCE, || guest.run_state() == "running"), "{}", guest.run_state());
    guest.assert_alive("after kill");
    assert_eq!(guest.boots(), 1);
    assert_eq!(guest.ask_facts("cat /proc/kstub_live")["constant"], guest.fact("constant"));
}

fn allow_write(guest: &Guest) {
    let mut gdb = Gdb::start(guest, &["--allow-write"]);
    gdb.ask("set var kstub_live_constant = 0x5555666677778888");
    assert_eq!(value(&mut gdb, "p/x kstub_live_constant"), "0x5555666677778888");
    leave(guest, gdb);
    assert_eq!(guest.ask_facts("cat /proc/kstub_live")["constant"], "0x5555666677778888");
    let mut gdb = Gdb::start(guest, &["--allow-write"]);
    gdb.ask(&format!("set var kstub_live_constant = {}", guest.fact("constant")));
    // A register, of the CPU that is selected and no other; and back.
    let before = guest.registers();
    gdb.ask(&format!("thread {}", guest.plan.cpus));
    let cpu = guest.plan.cpus as usize - 1;
    gdb.ask("set var $r15 = 0x1234");
    assert_eq!(guest.registers()[cpu]["r15"], 0x1234);
    assert_eq!(guest.registers()[0], before[0]);
    gdb.ask(&format!("set var $r15 = {:#x}", before[cpu]["r15"]));
    assert_eq!(guest.registers(), before);
    leave(guest, gdb);
}

fn how_it_is_left(guest: &Guest) {
    // Restored by default: what stood stands.
    guest.stop();
    Gdb::start(guest, &[]).quit();
    std::thread::sleep(Duration::from_millis(300));
    guest.assert_stands("it stood before");
    // Unless it is to run.
    Gdb::start(guest, &["--on-disconnect", "resume"]).quit();
    assert!(wait_until(PATIENCE, || guest.run_state() == "running"));
    guest.assert_alive("--on-disconnect resume");
    // Left as gdb left it.
    Gdb::start(guest, &["--on-disconnect", "leave"]).quit();
    std::thread::sleep(Duration::from_millis(300));
    guest.assert_stands("--on-disconnect leave");
    guest.cont();
    guest.assert_alive("after cont");
    // gdb's own detach is an end of control, too.
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("break kstub_live_tick");
    gdb.ask("continue");
    gdb.ask("detach");
    assert!(wait_until(PATIENCE, || guest.run_state() == "running"));
    guest.assert_alive("after detach");
    gdb.quit();
    guest.assert_alive("after quit");
}

/// kstub's own commands between stops: each is about the guest as it stands now.
fn commands(guest: &Guest) {
    let mut gdb = Gdb::start(guest, &[]);
    assert!(gdb.ask("ps").contains("kstub-tick"));
    let first = gdb.ask("monitor rd kstub_live");
    assert_eq!(gdb.ask("monitor rd kstub_live"), first, "it stands");
    gdb.ask("tbreak kstub_live_tick");
    gdb.ask("continue");
    let second = gdb.ask("monitor rd kstub_live");
    gdb.ask("tbreak kstub_live_tick");
    gdb.ask("continue");
    let third = gdb.ask("monitor rd kstub_live");
    assert_ne!(second, third, "nothing new after a stop");
    let bt = gdb.ask("monitor bt");
    assert!(bt.contains("kstub_live_tick") && bt.contains("kstub-tick"), "{bt}");
    // QEMU's flags for steps, as with its own stub.
    let mut flags = |packet: &str| gdb.ask(&format!("maintenance packet {packet}"));
    let before = flags("qqemu.sstep");
    assert!(before.contains("received: \"0x"), "{before}");
    assert!(flags("Qqemu.sstep=1").contains("OK"));
    assert!(flags("qqemu.sstep").contains("\"0x1\""));
    leave(guest, gdb);
    let mut gdb = Gdb::start(guest, &[]);
    assert_eq!(gdb.ask("maintenance packet qqemu.sstep"), before);
    leave(guest, gdb);
}

/// A gdb that only looks on: the guest does not stop for it, not for a moment, and is seen as it is then.
fn no_stop(guest: &Guest) {
    guest.ask("plant spin-kernel 2");
    guest.events();
    let mut gdb = Gdb::start(guest, &["--no-stop"]);
    let first = number(&value(&mut gdb, "p (unsigned long)jiffies_64"));
    assert!(gdb.ask("monitor ps").contains("kstub-tick"), "{}", gdb.everything());
    assert!(gdb.ask("info threads").contains("CPU 3"), "{}", gdb.everything());
    gdb.ask("thread 3");
    assert!(gdb.ask("bt").contains("#0 "), "{}", gdb.everything());
    assert_eq!(number(&value(&mut gdb, "p/x kstub_live_constant")), guest.number("constant"));
    guest.assert_alive("while it is looked at");
    // Registers and memory are those of one look; `continue` waits, Ctrl-C looks again.
    gdb.send("continue");
    assert!(gdb.wait_text("Continuing."), "{}", gdb.everything());
    guest.assert_alive("while gdb waits");
    gdb.interrupt();
    let stop = gdb.wait().unwrap();
    // What gdb prints of the frame is left out: arguments need not be found in the midst of a function.
    assert!(stop.contains("Thread 3") && stop.contains(" stopped."), "{stop}");
    let second = number(&value(&mut gdb, "p (unsigned long)jiffies_64"));
    assert!(second > first, "{first} {second}: it looks at what was");
    // What would stop the guest is refused.
    gdb.ask("break kstub_live_tick");
    let refused = gdb.ask("stepi");
    assert!(refused.contains("--no-stop") || refused.contains("Cannot insert"), "{refused}");
    gdb.ask("delete");
    let refused = gdb.ask("stepi");
    assert!(refused.contains("--no-stop"), "{refused}");
    assert!(gdb.ask("monitor control take").contains("--no-stop"), "{}", gdb.everything());
    assert_eq!(guest.run_state(), "running");
    gdb.quit();
    assert_eq!(guest.events(), [""; 0], "the guest was stopped, or told something");
    guest.assert_alive("after it was looked at");
}
