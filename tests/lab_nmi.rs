//! What CPUs were doing when the dump was made: spinning or not, and in which context, on real kernels' dumps.
//!
//! Truth is what the guest planted and said of it before the end (`set.json`), and QEMU's registers; never kstub.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::VirtAddr;
use kstub::arch::x86_64::Reg;
use kstub::backend::Dump;
use kstub::command::{self, Context, Focus, Form, Output};
use kstub::debuginfo::find::Places;
use kstub::kernel::spin::{Kind, Owner, Spin};
use kstub::kernel::{CpuId, Machine, Options};
use kstub::unwind::Regs;
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::Arc;
use support::lab::{self, DumpFile, Set};

fn open(dump: &DumpFile) -> Machine {
    let opened = Dump::open(&dump.path).unwrap_or_else(|e| panic!("{}: {e}", dump.path.display()));
    let options = Options { vmlinux: None, places: Places::default(), ..Options::default() };
    Machine::open(Arc::new(opened), &options, &|_, _| ()).unwrap()
}

/// Calls `check` with the first dump of each set that `wanted` takes.
fn for_each_set(wanted: &dyn Fn(&Set) -> bool, check: &mut dyn FnMut(&Set, &str, &Machine)) {
    let Some(sets) = lab::sets() else { return };
    for set in sets.iter().filter(|set| wanted(set)) {
        let dumps = set.dumps();
        let Some(first) = dumps.iter().find(|d| d.complete && d.split.is_empty()) else { continue };
        let what = format!("{}/{}", set.name(), first.name);
        eprintln!("{what}");
        check(set, &what, &open(first));
    }
}

fn hex(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}

fn has_spinners(set: &Set) -> bool {
    set.json["chain"]["spinners"].as_array().is_some_and(|all| !all.is_empty())
}

fn run(machine: &Machine, line: &str) -> Output {
    let context =
        Context { machine, cpu: machine.first_cpu(), task: None, focus: &Focus::default(), form: Form::Both };
    command::run(&context, line).unwrap_or_else(|error| panic!("{line}: {error}"))
}

fn json(machine: &Machine, line: &str) -> Value {
    run(machine, line).json
}

fn cpu_of(answer: &Value, cpu: u64) -> &Value {
    let all = answer["cpus"].as_array().unwrap();
    all.iter().find(|one| one["cpu"] == cpu).unwrap_or_else(|| panic!("no CPU {cpu} in {answer}"))
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_default()
}

// ---------------------------------------------------------------- spinning

/// Whether `answer` (of one CPU) has the spin that `spinner` planted, for the lock at `lock`.
fn check_spin(answer: &Value, spinner: &Value, lock: &str) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{what}: {answer:#}"));
    if answer["pid"] != spinner["pid"] {
        return wrong("another task");
    }
    let bit = text(spinner, "what") == "kstub_bitspin";
    let kinds: &[&str] = if bit { &["bit lock"] } else { &["spinlock", "queue of a spinlock"] };
    let spins = answer["spinning"].as_array().unwrap();
    let Some(spin) = spins.iter().find(|spin| kinds.contains(&text(spin, "kind"))) else {
        return wrong("no such spin");
    };
    if spin["word"]["address"] != lock {
        return wrong("another lock");
    }
    let place = text(&spin["word"], "place");
    let name = if bit { "kstub_held_bit [kstub_chain]" } else { "kstub_held_spinlock [kstub_chain]" };
    if place != name {
        return wrong("another place");
    }
    let value = hex(&spin["word"]["value"]);
    if value & 1 == 0 || bit && (value != 1 || spin["bit"] != 0) {
        return wrong("not held");
    }
    // Neither says who holds it.
    if spin["owner"]["unknown"].is_null() { wrong("an owner") } else { Ok(()) }
}

#[test]
fn planted_spinners_spin_and_others_do_not() {
    let mut checked = 0;
    for_each_set(&has_spinners, &mut |set, what, machine| {
        let answer = json(machine, "nmi");
        let [spinlock, bit_lock] = set.json["chain"]["locks"].as_array().unwrap().as_slice() else {
            panic!("{what}")
        };
        let lock_of = |spinner: &Value| {
            let lock = if text(spinner, "what") == "kstub_bitspin" { bit_lock } else { spinlock };
            lock.as_str().unwrap().to_owned()
        };
        let spinners = set.json["chain"]["spinners"].as_array().unwrap();
        let mut cpus = Vec::new();
        for spinner in spinners {
            let cpu = spinner["cpu"].as_u64().unwrap();
            let lock = lock_of(spinner);
            check_spin(cpu_of(&answer, cpu), spinner, &lock).unwrap_or_else(|why| panic!("{what}: {why}"));
            // Mutations: the next CPU, the next word.
            let next = (cpu + 1) % set.json["smp"].as_u64().unwrap();
            assert!(check_spin(cpu_of(&answer, next), spinner, &lock).is_err(), "{what}: CPU {next}");
            let beside = format!("{:#x}", hex(&Value::from(lock)) + 8);
            assert!(check_spin(cpu_of(&answer, cpu), spinner, &beside).is_err(), "{what}: {beside}");
            // It waits since about when the guest said so, a second before it was stopped.
            let since = cpu_of(&answer, cpu)["times_ns"]["since_schedule"].as_u64().unwrap();
            assert!((500_000_000..60_000_000_000).contains(&since), "{what}: CPU {cpu}: {since} ns");
            // A bit lock is waited for with preemption on, but for the instant of each try (bit_spin_lock() in
            // include/linux/bit_spinlock.h); a spinlock with preemption off.
            let off = cpu_of(&answer, cpu)["preempt_count"]["preempt"].as_u64().unwrap();
            let wanted = if text(spinner, "what") == "kstub_bitspin" { 0..=1 } else { 1..=1 };
            // A handler that the stop came in may hold locks of its own.
            let in_task = cpu_of(&answer, cpu)["contexts"][0]["context"] == "task";
            assert!(wanted.contains(&off) || !in_task && off >= *wanted.start(), "{what}: CPU {cpu}: {off}");
            cpus.push(cpu);
        }
        // The first spins on the word itself, as the one in front; the second is the whole queue.
        // Behind the verdict on an interrupt's handler, if the stop came in one.
        let queue = |cpu| {
            let verdicts = cpu_of(&answer, cpu)["spinning"].as_array().unwrap();
            verdicts.iter().map(|one| one["queue"].clone()).find(|queue| !queue.is_null()).unwrap_or_default()
        };
        let [first, second] = [4, 5].map(queue);
        for queue in [first, second] {
            assert_eq!(
                (&queue["locked"], &queue["pending"]),
                (&true.into(), &true.into()),
                "{what}: {queue}"
            );
            assert_eq!(queue["cpus"], serde_json::json!([5]), "{what}: {queue}");
        }
        for cpu in (0..set.json["smp"].as_u64().unwrap()).filter(|cpu| !cpus.contains(cpu)) {
            let verdicts = cpu_of(&answer, cpu)["spinning"].as_array().unwrap();
            assert!(verdicts.iter().all(|one| one["spinning"] == false), "{what}: CPU {cpu}: {verdicts:?}");
        }
        checked += 1;
    });
    assert!(lab::sets().is_none() || checked > 0, "no set has spinners");
}

#[test]
fn a_loop_in_user_mode_is_not_called_spinning() {
    for_each_set(&|_| true, &mut |set, what, machine| {
        let cpu = set.json["busy_user_cpu"].as_u64().unwrap();
        let answer = json(machine, &format!("nmi {cpu}"));
        let one = cpu_of(&answer, cpu);
        let Some(planted) = set.planted("spin-user.txt") else { return };
        assert_eq!(one["comm"], planted["comm"].as_str(), "{what}");
        let was_in = &one["was_in"];
        // An interrupt may have come on top.
        if was_in["context"] == "user" {
            assert_eq!(hex(&was_in["pc"]), hex(&Value::from(planted["rip"].as_str())), "{what}: {one}");
            assert_eq!(was_in["irqs_on"], true, "{what}: {one}");
            assert_eq!(one["spinning"][0]["spinning"], false, "{what}: {one}");
            assert_eq!(one["spinning"][0]["why"], "in user mode", "{what}: {one}");
        }
        let last = one["contexts"].as_array().unwrap().last().unwrap();
        assert_eq!(last["context"], "user", "{what}: {one}");
    });
}

/// A queue walked by a reader of its own: the tail in the word, and each node's place by the planted CPU numbers.
#[test]
fn the_queue_ends_with_the_cpu_in_the_lock_word() {
    for_each_set(&has_spinners, &mut |set, what, machine| {
        let kernel = machine.kernel().unwrap();
        let at = VirtAddr(hex(&set.json["chain"]["locks"][0]));
        let word = kernel.read_u32(at).unwrap();
        assert_eq!(word >> 18, 5 + 1, "{what}: {word:#x}");
        let queue = kernel.queued_spin_lock(word);
        assert_eq!(queue.waiters.iter().map(|one| one.cpu).collect::<Vec<_>>(), [CpuId(5)], "{what}");
        assert!(queue.is_complete && queue.is_locked && queue.is_pending, "{what}: {queue:?}");
        // A tail that nobody is in the queue with, and none.
        let nobody = kernel.queued_spin_lock((2 + 1) << 18 | 1);
        assert!(nobody.waiters.is_empty() && !nobody.is_complete, "{what}: {nobody:?}");
        assert!(kernel.queued_spin_lock(1).is_complete, "{what}");
    });
}

// ---------------------------------------------------------------- contexts

/// The contexts that the guest made, innermost first; `None` if it is not known.
fn made(set: &Set) -> Option<&'static [&'static str]> {
    Some(match set.json["chain"]["how"].as_str()? {
        "nmi" => &["NMI", "hardirq", "softirq", "task", "user"],
        "irq" => &["exception", "hardirq", "softirq", "task", "user"],
        "fault" | "overflow" => &["exception", "task", "user"],
        _ => return None,
    })
}

fn check_contexts(answer: &Value, expected: &[&str]) -> Result<(), String> {
    let found: Vec<&str> =
        answer["contexts"].as_array().unwrap().iter().map(|one| text(one, "context")).collect();
    if found == expected { Ok(()) } else { Err(format!("{found:?}, not {expected:?}: {answer:#}")) }
}

#[test]
fn contexts_are_those_that_the_guest_made() {
    let mut checked = 0;
    for_each_set(&|set| made(set).is_some(), &mut |set, what, machine| {
        let expected = made(set).unwrap();
        let answer = json(machine, "nmi");
        let cpu = set.json["panic"]["cpu"].as_u64().unwrap();
        let one = cpu_of(&answer, cpu);
        assert_eq!(one["pid"], set.json["panic"]["pid"], "{what}");
        check_contexts(one, expected).unwrap_or_else(|why| panic!("{what}: {why}"));
        for other in (0..set.json["smp"].as_u64().unwrap()).filter(|&other| other != cpu) {
            assert!(check_contexts(cpu_of(&answer, other), expected).is_err(), "{what}: CPU {other}");
        }
        let count = &one["preempt_count"];
        let is_set = |key: &str| count[key].as_u64().unwrap() >= 1;
        if expected.contains(&"softirq") {
            assert!(is_set("hardirq") && count["in_softirq"] == true, "{what}: {count}");
        }
        // A double fault is handled as an NMI is (irqentry_nmi_enter).
        let as_nmi = expected[0] == "NMI" || set.json["chain"]["how"] == "overflow";
        assert_eq!(is_set("nmi"), as_nmi, "{what}: {count}");
        if expected[0] == "NMI" {
            assert_eq!(one["torn_by"], "nmi", "{what}: {one:#}");
            assert_eq!(one["was_in"]["context"], "hardirq", "{what}: {one:#}");
            assert_eq!(one["was_in"]["irqs_on"], false, "{what}: {one:#}");
            // The NMI in the backtrace is not an old one.
            assert_eq!(one["old"], Value::Null, "{what}: {one:#}");
            assert!(one["nmis"].as_u64().unwrap() >= 1, "{what}: {one:#}");
        }
        checked += 1;
    });
    assert!(lab::sets().is_none() || checked > 0, "no set has a chain");
}

/// Where the CPU is as QEMU stopped it, interrupts are on or off as QEMU says.
#[test]
fn interrupts_are_on_where_qemu_says_so() {
    for_each_set(&|set| set.registers().is_some(), &mut |set, what, machine| {
        let answer = json(machine, "nmi");
        let mut compared = 0;
        for (cpu, registers) in (0..).zip(set.registers().unwrap()) {
            let one = cpu_of(&answer, cpu);
            let innermost = &one["contexts"][0];
            if innermost["irqs_on"].is_null() {
                continue;
            }
            assert_eq!(innermost["irqs_on"], registers["eflags"] & 0x200 != 0, "{what}: {one:#}");
            assert_eq!(hex(&innermost["pc"]), registers["rip"], "{what}: CPU {cpu}");
            assert_eq!(innermost["context"] == "user", registers["cs"] & 3 == 3, "{what}: CPU {cpu}");
            compared += 1;
        }
        assert!(compared >= 2, "{what}: only {compared} CPUs");
    });
}

/// A crashing kernel takes the others' registers by NMI; a guest that QEMU stopped has had none.
#[test]
fn nmis_are_where_they_were() {
    for_each_set(&|_| true, &mut |set, what, machine| {
        let answer = json(machine, "nmi");
        let kind = set.json["kind"].as_str().unwrap();
        for one in answer["cpus"].as_array().unwrap() {
            let panicked = set.json["panic"]["cpu"] == one["cpu"];
            match kind {
                "kdump" if !panicked => {
                    assert!(text(one, "torn_by").starts_with("nmi"), "{what}: {one:#}");
                    // What it was in is what the note of the dump has.
                    let id = CpuId(one["cpu"].as_u64().unwrap() as u32);
                    let rip = machine.cpu(id).unwrap().regs.u64(Reg::Rip).unwrap();
                    assert_eq!(hex(&one["was_in"]["pc"]), rip, "{what}: {one:#}");
                    assert_eq!(
                        one["old"],
                        Value::Null,
                        "{what}: the NMI that stopped it is no old one: {one:#}"
                    );
                }
                "qemu" => assert_eq!(
                    (&one["torn_by"], &one["old"]),
                    (&"end".into(), &Value::Null),
                    "{what}: {one:#}"
                ),
                _ => {}
            }
        }
    });
}

/// The guest panicked in an NMI that came while another was handled; no other guest did.
#[test]
fn an_nmi_on_top_of_another_is_told() {
    let mut checked = 0;
    for_each_set(&|_| true, &mut |set, what, machine| {
        let is_nested = set.json["chain"]["how"] == "nested";
        for one in json(machine, "nmi")["cpus"].as_array().unwrap() {
            if is_nested && one["cpu"] == set.json["panic"]["cpu"] {
                assert_eq!((&one["torn_by"], &one["nmis"]), (&"nmi".into(), &2.into()), "{what}: {one:#}");
                assert_eq!(one["old"]["nested"], true, "{what}: {one:#}");
                assert_eq!(one["old"]["waits"], false, "{what}: the last is handled: {one:#}");
                checked += 1;
            } else {
                assert_ne!(one["old"]["nested"], true, "{what}: {one:#}");
            }
        }
    });
    let has_nested = |sets: Vec<Set>| sets.iter().any(|set| set.json["chain"]["how"] == "nested");
    assert!(!lab::sets().is_some_and(has_nested) || checked > 0, "no CPU was in a nested NMI");
}

/// A tick brings the run queue's clock up to date (sched_tick()), so none came after that was. A softirq is begun by
/// nothing that saved registers.
#[test]
fn ticks_and_softirqs() {
    for_each_set(&|_| true, &mut |_, what, machine| {
        for one in json(machine, "nmi")["cpus"].as_array().unwrap() {
            let times = &one["times_ns"];
            if let (Some(tick), Some(clock)) = (times["since_tick"].as_u64(), times["since_clock"].as_u64()) {
                assert!(tick >= clock, "{what}: {one:#}");
                assert_eq!(times["tick_stopped"], false, "{what}: {one:#}");
            }
            for level in one["contexts"].as_array().unwrap().iter().filter(|one| one["context"] == "softirq")
            {
                assert_eq!(level["by"], Value::Null, "{what}: {one:#}");
            }
        }
    });
}

#[test]
fn cpus_are_chosen_by_lists() {
    for_each_set(&|set| set.json["smp"].as_u64() >= Some(3), &mut |_, what, machine| {
        let chosen = |line: &str| -> Vec<u64> {
            let answer = json(machine, line);
            answer["cpus"].as_array().unwrap().iter().map(|one| one["cpu"].as_u64().unwrap()).collect()
        };
        assert_eq!(chosen("nmi 1-2"), [1, 2], "{what}");
        assert_eq!(chosen("nmi 2,0"), [2, 0], "{what}");
        assert_eq!(chosen("nmi 1 2"), [1, 2], "{what}");
        assert_eq!(chosen("nmi a"), chosen("nmi"), "{what}");
    });
}

/// What the last NMI left on a CPU's stack is what the crashing kernel wrote into that CPU's note, because that NMI was
/// the one.
#[test]
fn the_last_nmi_has_left_what_the_note_of_the_cpu_has() {
    let (mut whole, mut users) = (0, 0);
    for_each_set(&|set| set.json["kind"] == "kdump", &mut |set, what, machine| {
        let kernel = machine.kernel().unwrap();
        for cpu in machine.cpus() {
            if set.json["panic"]["cpu"] == cpu.id.0 {
                continue;
            }
            let old = kernel.last_nmi(cpu.id).unwrap_or_else(|| panic!("{what}: CPU {}", cpu.id));
            let pushed = [Reg::Rip, Reg::Rsp, Reg::Cs, Reg::Ss, Reg::Eflags];
            let compared = match cpu.regs.in_user_mode() {
                // Of a program the NMI leaves only what the processor pushes.
                Some(true) => {
                    assert_eq!(old.pt_regs, None, "{what}: CPU {}", cpu.id);
                    users += 1;
                    &Reg::ALL[..0]
                }
                _ => {
                    assert!(old.pt_regs.is_some(), "{what}: CPU {}", cpu.id);
                    whole += 1;
                    &Reg::ALL[..16]
                }
            };
            for &reg in compared.iter().chain(&pushed) {
                assert_eq!(old.regs.get(reg), cpu.regs.u64(reg), "{what}: CPU {}: {}", cpu.id, reg.name());
            }
            // Another CPU's is another's.
            let next = machine.cpus().iter().find(|one| one.id != cpu.id && one.regs != cpu.regs).unwrap();
            assert_ne!(old.regs.get(Reg::Rsp), next.regs.u64(Reg::Rsp), "{what}");
        }
    });
    assert!(lab::sets().is_none() || whole > 0 && users > 0, "{whole} in the kernel, {users} in user mode");
}

// ---------------------------------------------------------------- what lies on stacks

fn symbols(value: &Value) -> BTreeSet<String> {
    let all = value.as_array().unwrap().iter();
    all.filter_map(|one| Some(one["symbol"].as_str()?.split('+').next()?.to_owned())).collect()
}

#[test]
fn planted_frames_lie_on_the_stack() {
    for_each_set(&|set| set.json["chain"]["how"] == "fault", &mut |set, what, machine| {
        let pid = &set.json["panic"]["pid"];
        let words = json(machine, &format!("bt -T {pid}"));
        let found = symbols(&words["tasks"][0]["text"]);
        for frame in set.json["chain"]["frames"].as_array().unwrap().iter().skip(1) {
            assert!(found.contains(frame.as_str().unwrap()), "{what}: {frame} is not in {found:?}");
        }
        let above = json(machine, &format!("bt -t {pid}"));
        let count = |answer: &Value| answer["tasks"][0]["text"].as_array().unwrap().len();
        assert!(count(&above) <= count(&words) && count(&above) > 3, "{what}");
        let saved = json(machine, &format!("bt -e {pid}"));
        let saved = saved["tasks"][0]["exception_frames"].as_array().unwrap().clone();
        let fault = saved.iter().find(|one| text(one, "symbol").starts_with("kstub_invalid_access"));
        assert_eq!(fault.unwrap_or_else(|| panic!("{what}: {saved:#?}"))["user"], false, "{what}");
        assert_eq!(saved.last().unwrap()["user"], true, "{what}: the system call's registers are the last");
        // Another task has nothing of it.
        let other = json(machine, "bt -T 1");
        assert!(!symbols(&other["tasks"][0]["text"]).iter().any(|name| name.starts_with("kstub_")), "{what}");
    });
}

#[test]
fn only_the_stack_that_overflowed_has() {
    for_each_set(&|_| true, &mut |set, what, machine| {
        let answer = json(machine, "bt -v");
        let bad: Vec<&Value> = answer["tasks"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|one| one["problems"] != serde_json::json!([]))
            .collect();
        let pids: Vec<&Value> = bad.iter().map(|one| &one["pid"]).collect();
        match set.json["chain"]["how"] == "overflow" {
            true => assert_eq!(pids, [&set.json["panic"]["pid"]], "{what}: {bad:#?}"),
            false => assert!(pids.is_empty(), "{what}: {bad:#?}"),
        }
    });
}

#[test]
fn groups_have_every_task_once() {
    for_each_set(&|_| true, &mut |_, what, machine| {
        let answer = json(machine, "bt --group");
        let groups = answer["groups"].as_array().unwrap();
        let tasks: Vec<&str> = groups
            .iter()
            .flat_map(|group| group["tasks"].as_array().unwrap())
            .map(|task| text(task, "task"))
            .collect();
        let once: BTreeSet<&str> = tasks.iter().copied().collect();
        let all = json(machine, "ps");
        let all: BTreeSet<&str> =
            all["tasks"].as_array().unwrap().iter().map(|task| text(task, "task")).collect();
        assert_eq!((once.len(), &once), (tasks.len(), &all), "{what}");
        let counts: Vec<u64> = groups.iter().map(|group| group["count"].as_u64().unwrap()).collect();
        assert!(counts.is_sorted_by(|a, b| a >= b) && counts[0] > 5, "{what}: {counts:?}");
        assert!(groups.len() < tasks.len() / 2, "{what}: {} groups of {} tasks", groups.len(), tasks.len());
    });
}

// ---------------------------------------------------------------- user stacks

/// Functions of `qemu/programs/threads.c` by what the thread said that it would wait for.
const WAITS: [(&str, &str); 8] = [
    ("nanosleep", "wait_nanosleep"),
    ("futex-condition", "wait_condition"),
    ("futex-mutex", "wait_mutex"),
    ("pipe-read", "wait_pipe"),
    ("poll", "wait_poll"),
    ("epoll", "wait_epoll"),
    ("unix-accept", "wait_accept"),
    ("pause", "wait_signal"),
];

#[test]
fn user_stacks_lead_to_the_function_that_waits() {
    for_each_set(&|_| true, &mut |set, what, machine| {
        let path = set.dir.join("facts/planted/threads.txt");
        let Ok(planted) = std::fs::read_to_string(path) else { return };
        let mut checked = 0;
        for line in planted.lines().filter_map(|line| line.strip_prefix("thread=")) {
            let (pid, rest) = line.split_once(' ').unwrap();
            let asleep = rest.split_once("asleep=").unwrap().1;
            let function = WAITS.iter().find(|(wait, _)| *wait == asleep).unwrap().1;
            let answer = json(machine, &format!("bt -u {pid}"));
            let frames =
                answer["tasks"][0]["frames"].as_array().unwrap_or_else(|| panic!("{what}: {answer:#}"));
            let names: Vec<&str> = frames.iter().map(|frame| text(frame, "symbol")).collect();
            assert!(names.contains(&function), "{what}: {pid}: {function} is not in {names:?}: {answer:#}");
            for (_, other) in WAITS.iter().filter(|(_, other)| *other != function) {
                assert!(!names.contains(other), "{what}: {pid}: {names:?}");
            }
            // By the program's own tables, not by luck.
            assert!(frames.iter().skip(1).all(|frame| frame["source"] == "cfi"), "{what}: {answer:#}");
            assert_eq!(answer["tasks"][0]["problem"], Value::Null, "{what}: {answer:#}");
            checked += 1;
        }
        assert_eq!(checked, WAITS.len(), "{what}");
        let kernel_thread = json(machine, "bt -u 2");
        assert!(text(&kernel_thread["tasks"][0], "error").contains("kernel thread"), "{what}");
    });
}

// ---------------------------------------------------------------- staged spins

/// Registers of a CPU that is at `pc`, with `argument` in every register that could have it.
fn staged(pc: u64, argument: u64) -> Regs {
    let mut regs = Regs::default();
    for reg in Reg::ALL.into_iter().take(16).filter(|reg| *reg != Reg::Rsp) {
        regs.set(reg, argument);
    }
    regs.set(Reg::Rip, pc);
    regs.set(Reg::Cs, 0x10);
    regs
}

/// Nobody spins for a planted lock, but the kernel's own code is there: the verdict at each `pause` of a function, had
/// it been called for the lock.
fn verdicts(machine: &Machine, function: &str, lock: u64) -> Vec<Spin> {
    let kernel = machine.kernel().unwrap();
    if kernel.symbol(function).is_none() {
        return Vec::new();
    }
    let code = json(machine, &format!("dis {function}"));
    let pauses = code["instructions"].as_array().unwrap().iter().filter(|one| one["text"] == "pause");
    let at = pauses.map(|one| kernel.spinning(&staged(hex(&one["address"]), lock)));
    at.filter_map(|verdict| verdict.spin().cloned()).collect()
}

#[test]
fn locks_say_who_holds_them_where_it_is_recorded() {
    let mut checked = BTreeSet::new();
    for_each_set(&|set| set.planted("kstub_plant.txt").is_some(), &mut |set, what, machine| {
        let planted = set.planted("kstub_plant.txt").unwrap();
        let place = |key: &str| hex(&Value::from(planted[key].as_str()));
        let holder = VirtAddr(place("thread.kstub_holder.task"));
        let lock = |name: &str| place(&format!("lock.{name}"));
        let member = |ty: &str, path: &str| machine.kernel().unwrap().member(ty, path).unwrap().offset;
        for spin in verdicts(machine, "mutex_spin_on_owner", lock("kstub_mutex")) {
            assert_eq!((spin.kind, spin.owner), (Kind::SleepingLock, Some(Owner::Task(holder))), "{what}");
            let word = spin.word.unwrap();
            assert_eq!(word.at.0, lock("kstub_mutex") + member("mutex", "owner"), "{what}");
            assert_eq!(word.place.as_deref(), Some("kstub_mutex [kstub_plant]"), "{what}");
            checked.insert("mutex");
        }
        for spin in verdicts(machine, "rwsem_spin_on_owner", lock("kstub_rwsem_written")) {
            assert_eq!((spin.kind, spin.owner), (Kind::SleepingLock, Some(Owner::Task(holder))), "{what}");
            checked.insert("rwsem");
        }
        for spin in verdicts(machine, "osq_lock", lock("kstub_mutex") + member("mutex", "osq")) {
            assert_eq!((spin.kind, spin.owner), (Kind::OptimisticQueue, Some(Owner::Task(holder))), "{what}");
            assert!(
                spin.notes.iter().any(|note| note.contains(&format!("{:#x}", lock("kstub_mutex")))),
                "{what}"
            );
            checked.insert("osq");
        }
        for (name, held) in [("kstub_spinlock", true), ("kstub_spinlock_free", false)] {
            for spin in verdicts(machine, "native_queued_spin_lock_slowpath", lock(name)) {
                let queue = spin.queue.as_ref().unwrap();
                assert_eq!(
                    (queue.is_locked, spin.owner == Some(Owner::Nobody)),
                    (held, !held),
                    "{what}: {spin:?}"
                );
                assert_eq!(spin.word.unwrap().at.0, lock(name), "{what}");
                checked.insert("spinlock");
            }
        }
        // The same loop below another privilege level is a program's business.
        let kernel = machine.kernel().unwrap();
        let pc = kernel.symbol("native_queued_spin_lock_slowpath").unwrap().0;
        let mut user = staged(pc, 0);
        user.set(Reg::Cs, 0x33);
        assert!(kernel.spinning(&user).spin().is_none(), "{what}");
    });
    assert!(lab::sets().is_none() || checked.len() == 4, "only {checked:?}");
}

#[test]
fn a_delay_is_no_lock() {
    for_each_set(&|_| true, &mut |_, what, machine| {
        let found = verdicts(machine, "delay_tsc", 1000);
        assert!(!found.is_empty(), "{what}");
        for spin in found {
            assert_eq!((spin.kind, spin.word, spin.owner), (Kind::Delay, None, None), "{what}");
        }
    });
}

// ---------------------------------------------------------------- kernels without ORC

/// The backtrace that a kernel printed of itself when it panicked, innermost first: names, without those that print. A
/// kernel that guesses marks all as doubtful; of others the doubtful ones are left out.
fn printed_trace(console: &str, guesses: bool) -> Vec<String> {
    let lines = console.lines().skip_while(|line| !line.contains("Call Trace:")).skip(1);
    let lines = lines.take_while(|line| !line.contains("RIP: ") && !line.contains("</TASK>"));
    let name = |line: &str| {
        let (_, frame) = line.split_once("]  ")?;
        let (name, _) = frame.split_once("+0x")?;
        let name = if guesses { name.trim_start_matches("? ") } else { name };
        (!name.starts_with('?') && !name.starts_with("dump_stack")).then(|| name.to_owned())
    };
    lines.filter_map(name).collect()
}

/// Whether `wanted` are among `found` in their order.
fn in_order(wanted: &[String], found: &[String]) -> bool {
    let mut rest = found.iter();
    wanted.iter().all(|name| rest.any(|one| one == name))
}

fn frames_of(trace: &Value) -> Vec<&Value> {
    let segments = trace["segments"].as_array().unwrap().iter();
    segments.flat_map(|segment| segment["frames"].as_array().unwrap()).collect()
}

/// By call frame information where there is a vmlinux, else by frame pointers; where there are none, by guesses that say
/// so.
#[test]
fn kernels_without_orc_unwind() {
    if lab::sets().is_none() {
        return;
    }
    let small = lab::root().join("small");
    for directory in std::fs::read_dir(&small).into_iter().flatten() {
        let dir = directory.unwrap().path();
        let Ok(text) = std::fs::read_to_string(dir.join("set.json")) else { continue };
        if text.contains("UNWINDER_ORC") {
            continue;
        }
        let set = Set { json: serde_json::from_str(&text).unwrap(), dir };
        let console = std::fs::read_to_string(set.dir.join("console.log")).unwrap();
        let has_frame_pointers = text.contains("UNWINDER_FRAME_POINTER");
        let printed = printed_trace(&console, !has_frame_pointers);
        assert!(printed.len() > 8, "{printed:?}");
        // Guessing, it does not get as far as that.
        let user = console.split_once("RIP: 0033:").and_then(|(_, user)| user.split_whitespace().next());
        assert_eq!(user.is_some(), has_frame_pointers);
        for with_vmlinux in [true, false] {
            let what = format!("{}, with vmlinux: {with_vmlinux}", set.name());
            let dump = Dump::open(&set.dir.join("dump.elf")).unwrap();
            let beside = with_vmlinux.then(|| set.dir.clone());
            let options = Options {
                vmlinux: None,
                places: Places { beside, ..Places::default() },
                ..Options::default()
            };
            let machine = Machine::open(Arc::new(dump), &options, &|_, _| ()).unwrap();
            assert_eq!(machine.vmlinux().is_some(), with_vmlinux, "{what}");
            let pid = &set.json["panic"]["pid"];
            let answer = json(&machine, &format!("bt {pid}"));
            let trace = &answer["traces"][0];
            let frames = frames_of(trace);
            let names: Vec<String> = frames.iter().map(|one| text_of(one)).collect();
            let guesses = !with_vmlinux && !has_frame_pointers;
            assert_eq!(trace["guessed"].as_u64().unwrap() > 0, guesses, "{what}: {names:?}");
            assert!(in_order(&printed, &names), "{what}: {printed:?} are not in order in {names:?}");
            let reversed: Vec<String> = printed.iter().rev().cloned().collect();
            assert!(!in_order(&reversed, &names), "{what}");
            if !guesses {
                let rip = &trace["user_registers"]["rip"];
                assert!(user.is_none_or(|user| rip == user) && rip.is_string(), "{what}: {trace:#}");
                assert_eq!(trace["ended"]["complete"], true, "{what}");
            }
            let everyone = json(&machine, "foreach bt");
            for task in everyone["tasks"].as_array().unwrap() {
                let trace = &task["result"];
                assert!(guesses || trace["guessed"] == 0, "{what}: {task:#}");
                let last = frames_of(trace).last().map(|one| text_of(one)).unwrap_or_default();
                let is_root = last.starts_with("ret_from_fork") || trace["ended"]["complete"] == true;
                assert!(guesses || is_root, "{what}: {task:#}");
            }
        }
    }
}

fn text_of(frame: &Value) -> String {
    frame["symbol"].as_str().unwrap_or_default().to_owned()
}
