//! `kstub run` and `kstub info` on guests that run: what they answer is what the guest says of itself, they answer what is
//! so now and not what was, and the guest neither stops nor changes for it.
//!
//! Truth is what the guest reads in its own /proc before and after, and QEMU's monitor: its events say each stop, however
//! short, and its own copy of RAM each byte that changed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use serde_json::Value;
use std::collections::BTreeSet;
use std::time::Instant;
use support::live::{self, Guest, PATIENCE, Plan, checks, finish, number};

/// Every kernel, both ways to its memory, one CPU and several, one page table a process and two, RAM above 4 GiB.
#[test]
fn commands_on_running_guests() {
    let plans = [
        Plan::new("6.1").cpus(4).pti(true).shared_ram(),
        Plan::new("6.12").cpus(4).pti(true),
        Plan::new("6.12").pti(false).shared_ram(),
        Plan::new("6.1").pti(false).split_ram(384, 128),
    ];
    for plan in plans {
        let Some(guest) = plan.boot() else { return };
        checks(
            &guest,
            &[
                ("info", info),
                ("ps", ps),
                ("sys", sys),
                ("log", log),
                ("mod", modules),
                ("planted values", planted_values),
                ("what changes", counter),
                ("who spins", spinner),
                ("busy in the kernel", busy_in_the_kernel),
                ("user memory", user_memory),
                ("a paused guest", paused),
                ("--pause", pause_for_a_command),
                ("under load", under_load),
            ],
        );
    }
}

/// Each command's JSON, in order; none may fail, and the guest must not have stopped for any.
fn run(guest: &Guest, commands: &[&str]) -> Vec<Value> {
    guest.events();
    let answers = run_with(guest, &[], commands);
    assert_eq!(guest.events(), [""; 0], "{commands:?}: the guest was stopped, or told something");
    answers
}

fn run_with(guest: &Guest, options: &[&str], commands: &[&str]) -> Vec<Value> {
    let ended = finish(guest.kstub("run").args(options).arg("--json").args(commands));
    let said = ended.err.clone();
    let lines = ended.expect(&format!("kstub run {commands:?}"));
    let answers: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), commands.len(), "{lines} {said}");
    answers.into_iter().map(|mut answer| answer["result"].take()).collect()
}

fn run_one(guest: &Guest, command: &str) -> Value {
    run(guest, &[command]).remove(0)
}

fn hex(value: &Value) -> u64 {
    number(value.as_str().unwrap_or_else(|| panic!("no address: {value}")))
}

fn info(guest: &Guest) {
    guest.events();
    let start = std::time::Instant::now();
    let text = finish(guest.kstub("info").arg("--json")).expect("kstub info");
    eprintln!("  kstub info: {} ms", start.elapsed().as_millis());
    assert_eq!(guest.events(), [""; 0]);
    let info: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(info["kernel"]["release"], guest.release());
    assert_eq!(hex(&info["kernel"]["text"]), guest.number("symbol._text"));
    assert_eq!(info["cpus"].as_array().unwrap().len(), guest.plan.cpus as usize);
    // All RAM that the kernel was told of is RAM, and nothing of what is none.
    let ranges: Vec<(u64, u64)> = info["ram"]
        .as_array()
        .unwrap()
        .iter()
        .map(|range| (hex(&range["start"]), hex(&range["end"])))
        .collect();
    let (mut inside, mut outside) = (0, 0);
    for (key, line) in guest.facts() {
        let Some((range, what)) = line.split_once(" : ").filter(|_| key == "iomem") else { continue };
        let (first, last) = range.trim_start().split_once('-').unwrap();
        let (first, last) = (u64::from_str_radix(first, 16).unwrap(), u64::from_str_radix(last, 16).unwrap());
        let known = ranges.iter().any(|&(start, end)| start <= first && last < end);
        match what {
            "System RAM" => {
                assert!(known, "{line}: {ranges:x?}");
                inside += 1;
            }
            "HPET 0" | "Local APIC" | "PCI MMCONFIG 0000 [bus 00-ff]" => {
                assert!(!known, "{line}: {ranges:x?}");
                outside += 1;
            }
            _ => {}
        }
    }
    assert!(inside >= 2 && outside >= 1, "{:?}", guest.facts());
}

/// Tasks as (pid, parent, name).
type Tasks = BTreeSet<(u64, u64, String)>;

fn guest_tasks(guest: &Guest) -> Tasks {
    let parse = |line: &String| {
        let mut words = line.splitn(4, ' ');
        let (pid, parent) = (number(words.next()?), number(words.next()?));
        words.next()?;
        Some((pid, parent, words.next()?.to_owned()))
    };
    guest.ask("tasks").iter().map(|line| parse(line).unwrap()).collect()
}

fn kstub_tasks(answer: &Value) -> Tasks {
    let tasks = answer["tasks"].as_array().unwrap().iter();
    let all = tasks.filter(|task| task["pid"] != 0 && task["pid"] == task["tgid"]);
    all.map(|task| {
        let (pid, parent) = (task["pid"].as_u64().unwrap(), task["ppid"].as_u64().unwrap());
        (pid, parent, task["comm"].as_str().unwrap().to_owned())
    })
    .collect()
}

/// What is wrong with `seen`, which was looked at between `before` and `after`. In /proc names of kernel threads may be
/// longer than in the task, and those of workers say what they work on.
fn wrong_tasks(before: &Tasks, seen: &Tasks, after: &Tasks) -> Vec<String> {
    let short = |name: &str| match name.starts_with("kworker/") {
        true => "kworker".to_owned(),
        false => name.chars().take(15).collect(),
    };
    let plain = |tasks: &Tasks| -> Tasks {
        tasks.iter().map(|(pid, parent, name)| (*pid, *parent, short(name))).collect()
    };
    let (before, seen, after) = (plain(before), plain(seen), plain(after));
    let missing = before.intersection(&after).filter(|task| !seen.contains(task));
    // A new kernel thread has kthreadd's name until it is given its own.
    let is_new = |&(pid, parent, ref name): &(u64, u64, String)| {
        let is = |tasks: &Tasks| tasks.iter().any(|other| (other.0, other.1) == (pid, parent));
        parent == KTHREADD && name == "kthreadd" && !is(&before) && is(&after)
    };
    let invented =
        seen.iter().filter(|task| !before.contains(task) && !after.contains(task) && !is_new(task));
    missing
        .map(|task| format!("missing: {task:?}"))
        .chain(invented.map(|task| format!("invented: {task:?}")))
        .collect()
}

/// The parent of all kernel threads.
const KTHREADD: u64 = 2;

fn ps(guest: &Guest) {
    guest.ask("plant threads");
    let before = guest_tasks(guest);
    let answer = run_one(guest, "ps");
    let after = guest_tasks(guest);
    let seen = kstub_tasks(&answer);
    assert_eq!(wrong_tasks(&before, &seen, &after), [""; 0]);
    assert!(seen.len() > 40 && seen.iter().any(|task| task.2 == "kstub-tick"), "{seen:?}");
    let tick = answer["tasks"].as_array().unwrap().iter().find(|task| task["comm"] == "kstub-tick").unwrap();
    assert_eq!(hex(&tick["task"]), guest.number("tick.task"));
    assert_eq!(tick["pid"], guest.number("tick.pid"));
    // What is wrong is seen: another parent, one too few, one too many.
    for fault in 0..3 {
        let mut wrong = seen.clone();
        let task = wrong.iter().find(|task| task.2 == "kstub-nap-2").unwrap().clone();
        match fault {
            0 => wrong.retain(|other| *other != task),
            1 => wrong = wrong.into_iter().map(|(a, b, c)| (a, b + u64::from(a == task.0), c)).collect(),
            _ => drop(wrong.insert((99999, 1, "nobody".to_owned()))),
        }
        assert!(!wrong_tasks(&before, &wrong, &after).is_empty());
    }
}

fn sys(guest: &Guest) {
    let before = guest.beat().milliseconds as f64 / 1000.0;
    let answer = run_one(guest, "sys");
    guest.assert_alive("after sys");
    let after = guest.beat().milliseconds as f64 / 1000.0;
    assert_eq!(answer["release"], guest.release());
    assert_eq!(answer["nodename"], "kstub-live");
    assert_eq!(answer["cpus"]["online"], guest.plan.cpus);
    assert_eq!(answer["panic"], Value::Null);
    let uptime = answer["uptime"].as_f64().unwrap();
    // The timekeeper's copy is up to some ticks old.
    assert!(before - 1.0 <= uptime && uptime <= after, "{before} <= {uptime} <= {after}");
}

fn log(guest: &Guest) {
    let has = |text: &str| {
        let answer = run_one(guest, "log");
        answer.as_array().unwrap().iter().any(|record| record["text"].as_str().unwrap().contains(text))
    };
    assert!(has("kstub: a planted line in the kernel log"));
    let new = format!("kstub-news-{}", guest.beat().number);
    assert!(!has(&new), "a line that was not written yet");
    guest.ask(&format!("say {new}"));
    assert!(has(&new), "a new line is not seen");
}

fn modules(guest: &Guest) {
    let compare = |expected: &[&str]| {
        let answer = run_one(guest, "mod");
        let seen: BTreeSet<(String, u64)> = answer["modules"]
            .as_array()
            .unwrap()
            .iter()
            .map(|module| (module["name"].as_str().unwrap().to_owned(), hex(&module["base"])))
            .collect();
        let truth: BTreeSet<(String, u64)> = guest
            .ask("cat /proc/modules")
            .iter()
            .map(|line| {
                let words: Vec<&str> = line.split(' ').collect();
                (words[0].to_owned(), number(words[5]))
            })
            .collect();
        assert_eq!(seen, truth);
        let names: Vec<&str> =
            expected.iter().copied().filter(|name| !seen.iter().any(|has| has.0 == *name)).collect();
        assert_eq!(names, [""; 0], "not loaded");
        assert_eq!(seen.len(), expected.len());
    };
    compare(&["kstub_live"]);
    guest.ask("insmod dummy");
    compare(&["dummy", "kstub_live"]);
    guest.ask("rmmod dummy");
    compare(&["kstub_live"]);
}

fn planted_values(guest: &Guest) {
    let magic = guest.fact("magic.at");
    let beyond = format!("{:#x}", number(&magic) + 8);
    let answers = run(
        guest,
        &[
            &format!("rd {magic}"),
            &format!("rd {beyond}"),
            "p *(u64 *)((char *)&kstub_live + 8)",
            "percpu kstub_live_percpu a",
            "sym kstub_live_constant",
            "rd kstub_live_constant",
        ],
    );
    let word = |answer: &Value| hex(&answer["values"][0]);
    assert_eq!(word(&answers[0]), guest.number("magic"));
    assert_ne!(word(&answers[1]), guest.number("magic"), "eight bytes on is something else");
    assert_eq!(number(answers[2]["values"][0]["value"].to_string().trim_matches('"')), guest.number("magic"));
    assert_eq!(word(&answers[5]), guest.number("constant"));
    assert!(answers[4].to_string().contains(&guest.fact("constant.at")), "{}", answers[4]);
    let copies: Vec<&Value> =
        answers[3]["values"].as_array().unwrap().iter().filter(|copy| copy["online"] == true).collect();
    assert_eq!(copies.len(), guest.plan.cpus as usize, "{}", answers[3]);
    for copy in copies {
        let cpu = copy["cpu"].as_u64().unwrap();
        assert_eq!(hex(&copy["address"]), guest.number(&format!("percpu.{cpu}.at")));
        assert_eq!(copy["value"], guest.number(&format!("percpu.{cpu}")), "CPU {cpu}");
        assert_ne!(copy["value"], 0xc0ffee00u64 + 0x11 * (cpu + 2), "CPU {cpu} has the next one's");
    }
}

fn counter(guest: &Guest) {
    let truth = || number(&guest.ask_facts("cat /proc/kstub_live")["count"]);
    let mut last = 0;
    for _ in 0..3 {
        let before = truth();
        let answer = run_one(guest, "rd kstub_live");
        let after = truth();
        let seen = hex(&answer["values"][0]);
        assert!(before <= seen && seen <= after, "{before} <= {seen} <= {after}");
        assert_eq!(seen % guest.number("tick.step"), 0);
        assert!(seen > last, "no newer than the last");
        last = seen;
    }
    // In one run each command sees the guest as it is then: two readings of jiffies with work between them differ.
    let answers = run(guest, &["p jiffies", "ps", "log", "bt -a", "kmem -i", "p jiffies"]);
    let jiffies = |answer: &Value| number(answer["values"][0]["value"].to_string().trim_matches('"'));
    assert!(jiffies(&answers[0]) <= jiffies(&answers[5]));
}

/// The backtrace of a CPU; the guest runs, so that one look may find it in an interrupt.
fn trace_of(guest: &Guest, cpu: u64, found: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let answer = run_one(guest, "bt -a");
        let traces = answer["traces"].as_array().unwrap();
        assert_eq!(traces.len(), guest.plan.cpus as usize, "{answer}");
        last = traces.iter().find(|trace| trace["cpu"] == cpu).unwrap().clone();
        if found(&last) {
            return last;
        }
    }
    panic!("CPU {cpu} is not found doing it: {last}");
}

fn spinner(guest: &Guest) {
    let cpu = u64::from(guest.plan.cpus > 1);
    let facts = guest.ask_facts(&format!("plant spin-user {cpu}"));
    let is_spinner = |trace: &Value| trace["comm"] == "kstub-spin" && trace["user_mode"] == true;
    let trace = trace_of(guest, cpu, is_spinner);
    assert_eq!(trace["pid"], number(&facts["pid"]));
    // Registers of that moment: those that never change.
    let mut seen = Value::Null;
    let complete = (0..10).any(|_| {
        seen = run_one(guest, &format!("regs {cpu}"));
        let text = seen.to_string();
        ["rax", "rbx", "r12", "r15"].iter().all(|register| text.contains(&facts[*register]))
    });
    assert!(complete, "{seen}");
    if guest.plan.cpus > 1 {
        let other = run_one(guest, "regs 0");
        assert!(!other.to_string().contains(&facts["rbx"]), "CPU 0 has CPU 1's registers");
    }
}

fn busy_in_the_kernel(guest: &Guest) {
    let cpu = if guest.plan.cpus > 1 { 2 } else { 0 };
    guest.ask(&format!("plant spin-kernel {cpu}"));
    let functions = |trace: &Value| -> Vec<String> {
        let segments = trace["segments"].as_array().unwrap().iter();
        let frames = segments.flat_map(|segment| segment["frames"].as_array().unwrap().iter());
        frames.map(|frame| frame["symbol"].as_str().unwrap_or("?").to_owned()).collect()
    };
    let reads = |trace: &Value| {
        let functions = functions(trace);
        let place = |name: &str| functions.iter().position(|function| function.starts_with(name));
        // From the innermost outwards.
        let wanted = ["seq_read_iter", "proc_reg_read", "vfs_read", "ksys_read", "do_syscall_64"].map(place);
        // The CPU runs while it is looked at: what was read of two moments mostly says so by its guesses, and may have a
        // frame of another moment where it does not.
        trace["comm"] == "kstub-kspin"
            && trace["guessed"] == 0
            && wanted.iter().all(Option::is_some)
            && wanted.is_sorted()
    };
    trace_of(guest, cpu, reads);
}

/// User addresses are those of the task, whatever runs now.
fn user_memory(guest: &Guest) {
    let facts = guest.ask_facts("plant syscalls 0 busy");
    let answers = run(
        guest,
        &[
            &format!("set {}", facts["pid"]),
            &format!("rd -u {}", facts["buffer"]),
            &format!("rd -u -64 {:#x}", number(&facts["buffer"]) + 32),
        ],
    );
    // struct sysinfo: uptime, then three loads; totalram is its fifth word.
    let uptime = hex(&answers[1]["values"][0]);
    assert!(uptime.abs_diff(guest.beat().milliseconds / 1000) <= 60, "{uptime}");
    assert_eq!(hex(&answers[2]["values"][0]), number(&facts["totalram"]), "{}", answers[2]);
}

fn paused(guest: &Guest) {
    guest.ask("plant syscalls 0 busy");
    guest.stop();
    let (before, registers) = (guest.ram(), guest.registers());
    guest.events();
    let commands =
        ["ps", "log", "mod", "bt -a", "sys", "runq", "kmem -i", "percpu kstub_live_percpu a", "regs"];
    let answers = run(guest, &commands);
    assert!(kstub_tasks(&answers[0]).iter().any(|task| task.2 == "kstub-sys"));
    // Asked twice, a guest that stands answers the same.
    assert_eq!(run(guest, &commands), answers);
    // QEMU's own registers are the truth.
    let text = finish(guest.kstub("run").args(["regs 0"])).expect("regs 0");
    assert!(text.contains(&format!("{:x}", registers[0]["rip"])), "{text} {:x}", registers[0]["rip"]);
    run_with(guest, &["--pause"], &["ps", "bt -a"]);
    guest.assert_stands("kstub run must leave a paused guest paused");
    assert_eq!(guest.registers(), registers);
    let after = guest.ram();
    let changed = live::differences(&before, &after);
    assert_eq!(changed, [0; 0], "addresses that changed");
    // The comparison sees a single byte, written by the guest itself.
    guest.cont();
    guest.assert_alive("after cont");
    guest.stop();
    assert!(guest.ram() != before);
    guest.cont();
}

fn pause_for_a_command(guest: &Guest) {
    guest.ask("plant load 2");
    guest.events();
    let start = std::time::Instant::now();
    let answers = run_with(guest, &["--pause"], &["bt -a", "ps"]);
    eprintln!("  --pause 'bt -a' ps: {} ms in all", start.elapsed().as_millis());
    assert_eq!(answers[0]["traces"].as_array().unwrap().len(), guest.plan.cpus as usize);
    let events = guest.events();
    assert!(events.contains(&"STOP".to_owned()), "{events:?}");
    assert_eq!(events.last().unwrap(), "RESUME", "{events:?}");
    let count = |name: &str| events.iter().filter(|event| *event == name).count();
    assert!(count("STOP") <= 2 && count("STOP") == count("RESUME"), "{events:?}");
    guest.assert_alive("after --pause");
}

/// Lists change while they are walked: no answer fails for it, and what is always there is in each.
fn under_load(guest: &Guest) {
    guest.ask("plant load 4");
    for _ in 0..5 {
        let answers = run(guest, &["ps", "runq", "mod", "files 1", "bt -a", "kmem -i"]);
        let tasks = kstub_tasks(&answers[0]);
        for name in ["kstub-nap-1", "kstub-nap-2", "kstub-nap-3", "kstub-tick", "kstub-load", "kstub-beat"] {
            assert!(tasks.iter().any(|task| task.2 == name), "{name} is missing: {tasks:?}");
        }
    }
    guest.assert_alive("under load");
}

/// Words that users see when there is no guest, or no QEMU.
#[test]
fn failures_are_said() {
    let Some(guest) = Plan::new("6.1").boot() else { return };
    let fails = |command: &mut std::process::Command| {
        let ended = finish(command);
        assert!(ended.status.is_some_and(|status| !status.success()), "{ended:?}");
        assert!(!ended.err.contains("panicked"), "{}", ended.err);
        ended.err
    };
    let mut nowhere = std::process::Command::new(support::gdb_session::KSTUB);
    let path = guest.path("nothing-here");
    let said = fails(nowhere.args(["run", "--qemu", &format!("unix:{}", path.display()), "ps"]));
    assert!(said.contains("nothing-here"), "{said}");
    // A socket behind which there is no QMP: it is told apart, and not waited for forever.
    let mut agent = std::process::Command::new(support::gdb_session::KSTUB);
    let _listener = std::os::unix::net::UnixListener::bind(guest.path("mute")).unwrap();
    let start = std::time::Instant::now();
    fails(agent.args(["run", "--qemu", &format!("unix:{}", guest.path("mute").display()), "ps"]));
    assert!(start.elapsed() < live::PATIENCE, "waits too long");
    // A QEMU that is killed while it is asked.
    guest.kill_qemu();
    fails(guest.kstub("run").arg("ps"));
}
