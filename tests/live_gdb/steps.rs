//! `stepi`, `step`, `next` and `finish`: of CPUs, and of tasks that move or sleep.

use super::*;

pub fn stepping(guest: &Guest) {
    let cpu = cpu_of(guest, 2);
    let facts = guest.ask_facts(&format!("plant syscalls {cpu}"));
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("tbreak __do_sys_sysinfo");
    gdb.ask("continue");
    assert_eq!(functions(&gdb.ask("bt 1")), ["__do_sys_sysinfo"]);
    // Into the function that it calls.
    let start = std::time::Instant::now();
    for _ in 0..5 {
        if functions(&gdb.ask("bt 1")) == ["do_sysinfo"] {
            break;
        }
        gdb.ask("step");
    }
    let bt = gdb.ask("bt 2");
    assert_eq!(functions(&bt), ["do_sysinfo", "__do_sys_sysinfo"], "{bt}");
    assert_eq!(current(&mut gdb).0, cpu);
    assert_stopped_at(guest, &mut gdb, cpu);
    // Over what it calls: never deeper, line by line.
    let mut lines = Vec::new();
    for _ in 0..3 {
        gdb.ask("next");
        let here = gdb.ask("bt 1");
        assert_eq!(functions(&here).len(), 1, "{here}");
        assert_eq!(current(&mut gdb).0, cpu, "{here}");
        let depth = gdb.ask("bt");
        assert!(functions(&depth).contains(&"__do_sys_sysinfo".to_owned()), "{depth}");
        lines.push(here);
    }
    assert!(lines[0] != lines[2], "{lines:?}");
    // Out of it: what it computed is there.
    gdb.ask("frame function do_sysinfo");
    let finish = gdb.ask("finish");
    assert!(finish.contains("Run till exit"), "{finish}");
    assert_eq!(functions(&gdb.ask("bt 1")), ["__do_sys_sysinfo"], "{finish}");
    assert_eq!(value(&mut gdb, "p val.totalram"), facts["totalram"]);
    assert_eq!(value(&mut gdb, "p val.mem_unit"), facts["mem_unit"]);
    eprintln!("  step, 3 next, finish: {} ms", start.elapsed().as_millis());
    let advance = gdb.ask("finish");
    assert_eq!(current(&mut gdb).0, cpu, "{advance}");
    leave(guest, gdb);
}

/// Where tasks are the threads, gdb follows one to another CPU.
pub fn task_that_moves(guest: &Guest) {
    let facts = guest.ask_facts("plant wander 1 2");
    let mut gdb = Gdb::start(guest, &["--threads", "tasks"]);
    gdb.ask("break __x64_sys_sched_setaffinity");
    let mut left = std::collections::BTreeSet::new();
    for _ in 0..3 {
        let stop = gdb.ask("continue");
        assert!(stop.contains("Breakpoint 1"), "{stop}");
        let (from, before) = current(&mut gdb);
        assert!(before.contains("kstub-wander") && before.contains(&facts["pid"]), "{before}");
        assert_stopped_at(guest, &mut gdb, from);
        let finish = gdb.ask("finish");
        assert!(finish.contains("Run till exit") && !finish.contains("Breakpoint"), "{finish}");
        let (to, after) = current(&mut gdb);
        assert!(after.contains("kstub-wander") && after.contains(&facts["pid"]), "{after}");
        assert_eq!(from + to, 3, "{before}; {after}");
        assert_stopped_at(guest, &mut gdb, to);
        left.insert(from);
    }
    assert_eq!(left.len(), 2, "{left:?}");
    leave(guest, gdb);
}

/// A task that does not run takes no step, and stays what is looked at; the CPUs are where they were.
pub fn task_that_sleeps(guest: &Guest) {
    let mut gdb = Gdb::start(guest, &["--threads", "tasks"]);
    let found = gdb.ask("thread find kstub-nap-1");
    let napping = found.split(' ').nth(1).unwrap_or_else(|| panic!("{found}")).to_owned();
    gdb.ask(&format!("thread {napping}"));
    let bt = gdb.ask("bt");
    assert!(
        functions(&bt).iter().any(|name| name.contains("schedule")) && bt.contains("<user mode>"),
        "{bt}"
    );
    let refused = gdb.ask("stepi");
    assert!(refused.contains("does not run"), "{refused}");
    assert_eq!(gdb.ask("bt"), bt);
    let threads = gdb.ask("info threads");
    let of_cpus = threads.lines().filter(|line| line.contains("(CPU "));
    let registers = guest.registers();
    let mut cpus = 0;
    for line in of_cpus {
        let thread = line.trim_start_matches(['*', ' ']).split(' ').next().unwrap();
        let cpu = line.split("(CPU ").nth(1).and_then(|rest| rest.split([',', ')']).next()).unwrap();
        gdb.ask(&format!("thread {thread}"));
        let pc = number(&value(&mut gdb, "p/x $pc"));
        assert_eq!(registers[cpu.parse::<usize>().unwrap()]["rip"], pc, "{line}");
        cpus += 1;
    }
    assert_eq!(cpus, guest.plan.cpus, "{threads}");
    leave(guest, gdb);
}

/// With scheduler-locking one CPU takes one instruction and no other moves.
pub fn one_instruction(guest: &Guest) {
    guest.ask("plant load 4");
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("set scheduler-locking on");
    gdb.ask("thread 2");
    let mut moves = 0;
    for _ in 0..20 {
        let before = guest.registers();
        gdb.ask("stepi");
        let after = guest.registers();
        assert_stopped_at(guest, &mut gdb, 1);
        for cpu in [0, 2, 3] {
            assert_eq!(before[cpu], after[cpu], "CPU {cpu} has moved");
        }
        moves += u32::from(before[1] != after[1]);
    }
    // A step may be a round of `rep`.
    assert!(moves > 0, "CPU 1 takes no steps");
    gdb.ask("set scheduler-locking off");
    leave(guest, gdb);
}

/// A halted CPU takes no step until something wakes it: when the user gives up, nothing may be left of the step, for QEMU
/// would end it at any time after gdb has gone, with nobody to let the guest go on.
pub fn step_of_an_idle_cpu(guest: &Guest) {
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("thread 2");
    gdb.send("stepi");
    std::thread::sleep(Duration::from_secs(1));
    gdb.interrupt();
    gdb.wait().unwrap();
    leave(guest, gdb);
    assert_no_step_is_left(guest);
}

pub fn step_that_another_ends(guest: &Guest) {
    let mut gdb = Gdb::start(guest, &[]);
    gdb.ask("break kstub_live_tick");
    // CPU 1 may just have been woken: then it takes its step.
    let ended = (0..20).any(|_| {
        gdb.ask("continue");
        gdb.ask("thread 2");
        gdb.ask("stepi").contains("hit Breakpoint 1")
    });
    assert!(ended, "{}", gdb.everything());
    leave(guest, gdb);
    assert_no_step_is_left(guest);
}

fn assert_no_step_is_left(guest: &Guest) {
    let facts = guest.ask_facts("plant spin-user 1");
    let rip = number(&facts["rip"]);
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(guest.run_state(), "running", "the guest stops by itself");
    }
    assert!(wait_until(PATIENCE, || guest.registers()[1]["rip"] == rip), "CPU 1 does nothing");
    guest.assert_alive("after the step");
}
