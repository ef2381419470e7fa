//! Tasks, times, files, mounts, address spaces, modules and the walks behind them: real kernels' dumps against what the
//! guest said of itself while it ran.
//!
//! Truth is the guest's own `/proc`, its console, its kernel's configuration and what was planted; never kstub. Every
//! comparison is tried on facts that are not those of the answer, too, and must fail on them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;
#[path = "lab_tasks/trees.rs"]
mod trees;

use kstub::addr::VirtAddr;
use kstub::backend::Dump;
use kstub::command::{self, Context, Focus, Form, Output};
use kstub::debuginfo::find::Places;
use kstub::kernel::{Kernel, Machine, Options};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use support::lab::{self, DumpFile, Set};

fn open(dump: &DumpFile, with_vmlinux: bool) -> Machine {
    let opened = Dump::open(&dump.path).unwrap_or_else(|e| panic!("{}: {e}", dump.path.display()));
    let beside = dump.path.parent().map(Path::to_owned).filter(|_| with_vmlinux);
    let options =
        Options { vmlinux: None, places: Places { beside, ..Places::default() }, ..Options::default() };
    Machine::open(Arc::new(opened), &options, &|_, _| ()).unwrap()
}

/// Calls `check` with the first dump of each set, without its vmlinux as well, and with the first filtered one.
fn for_each_set(check: &mut dyn FnMut(&Set, &str, &Machine)) {
    let Some(sets) = lab::sets() else { return };
    for set in &sets {
        let dumps: Vec<_> = set.dumps().into_iter().filter(|d| d.complete && d.split.is_empty()).collect();
        let first = dumps.first().unwrap_or_else(|| panic!("{}: no dump", set.name()));
        let filtered = dumps.iter().find(|dump| dump.filter_level.is_some_and(|level| level == 31));
        // Of a kernel newer than itself makedumpfile leaves out what is none of a user's.
        let log = std::fs::read_to_string(set.dir.join("makedumpfile.log")).unwrap_or_default();
        let filtered = filtered.filter(|_| !log.contains("kernel version is not supported"));
        for (dump, with_vmlinux) in [(Some(first), true), (Some(first), false), (filtered, true)] {
            let Some(dump) = dump else { continue };
            let without = if with_vmlinux { "" } else { " without vmlinux" };
            let what = format!("{}/{}{without}", set.name(), dump.name);
            eprintln!("{what}");
            check(set, &what, &open(dump, with_vmlinux));
        }
    }
}

fn run(machine: &Machine, line: &str) -> Result<Output, String> {
    let context =
        Context { machine, cpu: machine.first_cpu(), task: None, focus: &Focus::default(), form: Form::Both };
    command::run(&context, line).map_err(|error| error.to_string())
}

fn json(machine: &Machine, line: &str) -> Value {
    run(machine, line).unwrap_or_else(|error| panic!("{line}: {error}")).json
}

fn fact(set: &Set, file: &str) -> Option<String> {
    std::fs::read_to_string(set.dir.join("facts").join(file)).ok()
}

fn facts(set: &Set, file: &str) -> String {
    fact(set, file).unwrap_or_else(|| panic!("{}: no {file}", set.name()))
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or("")
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|_| panic!("{text} is no number"))
}

/// A line of `tasks.txt`.
#[derive(Clone, Debug)]
struct Told {
    tid: i64,
    pid: i64,
    ppid: i64,
    state: String,
    comm: String,
}

impl Told {
    /// Whether the task slept for the whole time between the facts and the dump.
    fn sleeps(&self) -> bool {
        let busy = ["kstub-spin", "kstub-kspin"].contains(&self.comm.as_str());
        let own = self.comm.starts_with("kstub-") || self.comm == "kthreadd" || self.comm == "nc";
        own && !busy && self.state != "R"
    }
}

fn tasks(set: &Set) -> Vec<Told> {
    let text = facts(set, "tasks.txt");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let mut words = line.splitn(5, ' ');
            let mut word = || words.next().unwrap().to_owned();
            let mut number = || word().parse().unwrap();
            let (tid, pid, ppid) = (number(), number(), number());
            Told { tid, pid, ppid, state: word(), comm: word() }
        })
        .collect()
}

/// Compares what is told of the tasks with `ps`; the text names the first difference.
fn compare_tasks(told: &[Told], rows: &BTreeMap<i64, Value>) -> Result<usize, String> {
    let mut compared = 0;
    for task in told {
        // Workers come and go.
        if task.comm.starts_with("kworker/") || task.state == "R" {
            continue;
        }
        let Some(row) = rows.get(&task.tid) else {
            if task.sleeps() {
                return Err(format!("{task:?} is missing"));
            }
            continue;
        };
        // /proc has kernel threads' full names, the task its first 15 bytes.
        let comm = text(row, "comm");
        let same_name = task.comm == comm || comm.len() == 15 && task.comm.starts_with(comm);
        let same = row["tgid"] == task.pid && row["ppid"] == task.ppid && same_name;
        let state = text(row, "state");
        if !same || task.sleeps() && state != task.state {
            return Err(format!("{task:?} is {row}"));
        }
        compared += 1;
    }
    Ok(compared)
}

#[test]
fn every_task_is_in_ps_with_its_parent_state_and_name() {
    for_each_set(&mut |set, what, machine| {
        let told = tasks(set);
        let started = std::time::Instant::now();
        let answer = json(machine, "ps");
        let took = started.elapsed();
        let started = std::time::Instant::now();
        json(machine, "ps");
        eprintln!("    ps: first {took:?}, again {:?}", started.elapsed());
        let problems = answer["problems"].as_array().unwrap();
        // The filter of makedumpfile leaves out kernel pages of kernels that it does not know yet.
        let filtered = what.contains("newest") && what.contains("d31");
        let excused = |problem: &Value| filtered && problem.as_str().unwrap().contains("excluded");
        assert!(problems.iter().all(excused), "{what}: {problems:?}");
        let rows = answer["tasks"].as_array().unwrap();
        let by_pid: BTreeMap<i64, Value> =
            rows.iter().map(|row| (row["pid"].as_i64().unwrap(), row.clone())).collect();
        let compared = compare_tasks(&told, &by_pid).unwrap_or_else(|why| panic!("{what}: {why}"));
        assert!(compared > 40 && told.iter().filter(|task| task.sleeps()).count() > 10, "{what}: {compared}");
        // One idle task for each CPU, and those that run are those that ran.
        let idle = rows.iter().filter(|row| row["pid"] == 0).count() as u64;
        assert_eq!(Some(idle), set.json["smp"].as_u64(), "{what}");
        let running: BTreeSet<_> =
            rows.iter().filter(|row| row["running"] == true).map(|row| row["pid"].as_i64()).collect();
        let of_cpus: BTreeSet<_> = machine.cpus().iter().map(|cpu| cpu.pid.map(i64::from)).collect();
        assert_eq!(running, of_cpus, "{what}");
        // The zombie's stack is gone, and said to be.
        let zombies: Vec<_> = rows.iter().filter(|row| row["state"] == "Z").collect();
        assert!(
            zombies.iter().all(|row| row["stack"].is_null() && text(row, "note").contains("released")),
            "{what}: {zombies:?}"
        );
        assert!(told.iter().all(|task| task.state != "Z") || !zombies.is_empty(), "{what}");
        // A wrong parent, a wrong state, a wrong name and a missing task are noticed.
        let sleeper = told.iter().position(Told::sleeps).unwrap();
        let changed = |change: &dyn Fn(&mut Told)| {
            let mut told = told.clone();
            change(&mut told[sleeper]);
            compare_tasks(&told, &by_pid)
        };
        assert!(changed(&|task| task.ppid += 1).is_err(), "{what}");
        assert!(changed(&|task| task.state = "X".into()).is_err(), "{what}");
        assert!(changed(&|task| task.comm += "x").is_err(), "{what}");
        assert!(changed(&|task| task.tid = 3_999_999).is_err(), "{what}");
        // Selectors agree with the whole.
        let one = json(machine, &format!("ps {}", told[sleeper].tid));
        assert_eq!(one["tasks"].as_array().unwrap().len(), 1, "{what}");
        let states = json(machine, "ps -S");
        let sum: u64 = states["states"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
        assert_eq!(sum as usize, rows.len(), "{what}");
        let of = |line: &str| json(machine, line)["tasks"].as_array().unwrap().len();
        assert_eq!(of("ps -k") + of("ps -u"), rows.len(), "{what}");
        assert_eq!(of("ps -A"), machine.cpus().len(), "{what}");
        let parents = json(machine, &format!("ps -p {}", told[sleeper].tid));
        let chain: Vec<_> =
            parents["tasks"][0]["parents"].as_array().unwrap().iter().filter_map(Value::as_i64).collect();
        assert_eq!(chain[chain.len() - 2..], [told[sleeper].ppid, told[sleeper].tid], "{what}");
    });
}

/// Processes of the facts whose address space stays as it is.
fn sleeping_processes(set: &Set) -> Vec<Told> {
    let own = |task: &Told| task.tid == task.pid && task.sleeps() && task.comm != "kthreadd";
    let told = tasks(set).into_iter().filter(own);
    told.filter(|task| fact(set, &format!("proc/{}/maps", task.pid)).is_some_and(|maps| !maps.is_empty()))
        .collect()
}

/// A line of `/proc/PID/maps` from an area's JSON.
fn maps_line(vma: &Value) -> String {
    let device = text(vma, "device").split_once(':').map(|(a, b)| (a.to_owned(), b.to_owned()));
    let (major, minor) = device.unwrap_or(("0".into(), "0".into()));
    let number = |text: &str| text.parse::<u64>().unwrap();
    let line = format!(
        "{:08x}-{:08x} {} {:08x} {:02x}:{:02x} {}",
        hex(text(vma, "start")),
        hex(text(vma, "end")),
        text(vma, "permissions"),
        vma["offset"].as_u64().unwrap(),
        number(&major),
        number(&minor),
        vma["ino"].as_u64().unwrap_or(0),
    );
    match text(vma, "path") {
        "" => line,
        path => format!("{line} {path}"),
    }
}

/// Compares areas; `lossy` is a dump whose filter left out pages of the kernel: of that only ranges and permissions.
fn compare_maps(told: &str, answer: &Value, lossy: bool) -> Result<(), String> {
    let ours = answer["vmas"].as_array().unwrap();
    let told: Vec<Vec<&str>> = told.lines().map(|line| line.split_whitespace().collect()).collect();
    for (told, vma) in told.iter().zip(ours) {
        let ours = maps_line(vma);
        let mut ours: Vec<&str> = ours.split_whitespace().collect();
        if lossy {
            ours.truncate(2);
            ours.extend(&told[2..]);
        }
        if *told != ours {
            return Err(format!("told {told:?}, found {ours:?}"));
        }
    }
    if told.len() == ours.len() { Ok(()) } else { Err(format!("{} areas, not {}", ours.len(), told.len())) }
}

#[test]
fn address_spaces_are_those_of_proc_maps() {
    for_each_set(&mut |set, what, machine| {
        let told = sleeping_processes(set);
        assert!(told.len() >= 2, "{what}: {told:?}");
        for task in &told {
            let answer = json(machine, &format!("vm {}", task.pid));
            let lossy = what.contains("newest") && what.contains("d31");
            let excused = lossy && text(&answer, "problem").contains("excluded");
            assert!(answer["problem"].is_null() || excused, "{what}: {}", answer["problem"]);
            let maps = |task: &Told| facts(set, &format!("proc/{}/maps", task.pid));
            compare_maps(&maps(task), &answer, lossy).unwrap_or_else(|why| panic!("{what}: {task:?}: {why}"));
            // A child may have the same as its parent.
            let other = told.iter().map(maps).find(|other| *other != maps(task)).unwrap();
            assert!(compare_maps(&other, &answer, lossy).is_err(), "{what}: another's maps must differ");
            // Sizes, to the page.
            let status = facts(set, &format!("proc/{}/status", task.pid));
            let told = |key: &str| {
                let line = status.lines().find(|line| line.starts_with(key))?;
                line.split_whitespace().nth(1)?.parse::<u64>().ok()
            };
            if lossy {
                continue;
            }
            assert_eq!(answer["vsz_kib"].as_u64(), told("VmSize:"), "{what}: {task:?}");
            // VmRSS is not exact: threads (before v6.2) or CPUs have counts that they have not handed in.
            let ours = answer["rss_kib"].as_u64().unwrap();
            let smaps = facts(set, &format!("proc/{}/smaps", task.pid));
            let sum = smaps.lines().filter_map(|line| line.strip_prefix("Rss:")?.split_whitespace().next());
            let sum: u64 = sum.map(|kib| kib.parse::<u64>().unwrap()).sum();
            assert!(ours.abs_diff(sum) <= 64, "{what}: {task:?}: {ours} KiB, smaps has {sum}");
        }
    });
}

fn compare_files(told: &str, answer: &Value) -> Result<(), String> {
    // The filter of makedumpfile leaves out kernel pages of kernels that it does not know yet.
    let (lost, files): (Vec<_>, Vec<_>) = answer["files"]
        .as_array()
        .unwrap()
        .iter()
        .partition(|file| text(file, "problem").contains("excluded"));
    let lost: Vec<String> = lost.iter().map(|file| format!("{} ", file["fd"])).collect();
    let files = files.iter();
    let ours: BTreeSet<String> = files.map(|file| format!("{} {}", file["fd"], text(file, "path"))).collect();
    let told = told.lines().filter(|line| lost.iter().all(|fd| !line.starts_with(fd)));
    let told: BTreeSet<String> = told.map(str::to_owned).collect();
    if ours == told { Ok(()) } else { Err(format!("told {told:?}, found {ours:?}")) }
}

#[test]
fn open_files_are_those_of_proc_fd() {
    for_each_set(&mut |set, what, machine| {
        let mut kinds = BTreeSet::new();
        for task in sleeping_processes(set) {
            let answer = json(machine, &format!("files {}", task.pid));
            let told = facts(set, &format!("proc/{}/fd.txt", task.pid));
            compare_files(&told, &answer).unwrap_or_else(|why| panic!("{what}: {task:?}: {why}"));
            assert!(compare_files(&format!("{told}77 /dev/null\n"), &answer).is_err(), "{what}");
            kinds
                .extend(answer["files"].as_array().unwrap().iter().map(|file| text(file, "type").to_owned()));
            assert_eq!(text(&answer, "cwd"), "/", "{what}");
        }
        assert!(
            kinds.contains("REG") && kinds.contains("CHR") && kinds.contains("FIFO"),
            "{what}: {kinds:?}"
        );
    });
}

#[test]
fn mounts_are_those_of_mountinfo() {
    for_each_set(&mut |set, what, machine| {
        let answer = json(machine, "mount");
        let mounts = answer["mounts"].as_array().unwrap();
        let number = |value: &Value| value.as_i64().map_or_else(|| "?".into(), |n| n.to_string());
        let line = |m: &Value| {
            let (id, parent) = (number(&m["id"]), number(&m["parent_id"]));
            let [device, root, path, kind, source] =
                ["device", "root", "path", "type", "source"].map(|key| text(m, key));
            format!("{id} {parent} {device} {root} {path} - {kind} {source}")
        };
        let ours: BTreeSet<String> = mounts.iter().map(line).collect();
        let told = facts(set, "proc/1/mountinfo");
        if text(&answer, "problem").contains("excluded") {
            // As above: only what is left can be compared.
            assert!(what.contains("newest") && what.contains("d31"), "{what}: {answer}");
            return;
        }
        for told in told.lines() {
            let words: Vec<&str> = told.split_whitespace().collect();
            let dash = words.iter().position(|word| *word == "-").unwrap();
            let told = format!("{} - {} {}", words[..5].join(" "), words[dash + 1], words[dash + 2]);
            assert!(ours.contains(&told), "{what}: {told:?} is not among {ours:#?}");
        }
        // Of the initial root nothing is said in /proc.
        assert!(ours.len() - told.lines().count() <= 1, "{what}: {ours:#?}");
        assert_eq!(answer["problem"], Value::Null, "{what}");
    });
}

fn compare_modules(told: &str, answer: &Value) -> Result<usize, String> {
    let modules = answer["modules"].as_array().unwrap();
    for line in told.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some(ours) = modules.iter().find(|module| module["name"] == words[0]) else {
            return Err(format!("{line} is missing"));
        };
        let users: Vec<&str> =
            words[3].split(',').filter(|user| !["", "-", "[permanent]"].contains(user)).collect();
        let ours_users: Vec<&str> =
            ours["used_by"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let same_users = users.iter().collect::<BTreeSet<_>>() == ours_users.iter().collect();
        let taints = words.get(6).map_or("", |taints| taints.trim_matches(['(', ')']));
        let same = hex(text(ours, "base")) == hex(words[5])
            && ours["size"].as_u64().map(|size| size.to_string()).as_deref() == Some(words[1])
            && same_users
            && text(ours, "taints") == taints
            && text(ours, "state") == words[4];
        if !same {
            return Err(format!("{line} is {ours}"));
        }
    }
    Ok(modules.len() - told.lines().count())
}

#[test]
fn modules_are_those_of_proc_modules() {
    for_each_set(&mut |set, what, machine| {
        let answer = json(machine, "mod");
        let told = facts(set, "proc/modules");
        let more = compare_modules(&told, &answer).unwrap_or_else(|why| panic!("{what}: {why}"));
        // One that brought the kernel down was loaded after the facts.
        assert!(more <= 1, "{what}: {answer}");
        for (from, to) in [("Live 0xffff", "Live 0xfffe"), ("xfs ", "xfs2 "), ("Live", "Going")] {
            assert!(compare_modules(&told.replacen(from, to, 1), &answer).is_err(), "{what}: {from}");
        }
        let one = json(machine, "mod -s virtio_blk");
        let section = one["sections"].as_array().unwrap().iter().find(|one| one["name"] == ".text").unwrap();
        if let Some(told) = fact(set, "sys/module/virtio_blk/sections/.text") {
            assert_eq!(hex(text(section, "at")), hex(told.trim()), "{what}");
        }
    });
}

/// The last `[ seconds.micros]` of the console.
fn last_on_console(set: &Set) -> f64 {
    let console = std::fs::read_to_string(set.dir.join("console.log")).unwrap();
    let mut stamps = console.lines().filter_map(|line| {
        let (stamp, _) = line.trim_start().strip_prefix('[')?.split_once(']')?;
        stamp.trim().parse::<f64>().ok()
    });
    stamps.next_back().unwrap()
}

#[test]
fn time_is_the_kernels_own() {
    for_each_set(&mut |set, what, machine| {
        let answer = json(machine, "sys");
        let release = set.json["release"].as_str().unwrap();
        let config = lab::root().join("kernels").join(release).join("config");
        let config = std::fs::read_to_string(config).unwrap();
        let hz: u64 = config.lines().find_map(|line| line.strip_prefix("CONFIG_HZ=")?.parse().ok()).unwrap();
        assert_eq!(answer["hz"].as_u64(), Some(hz), "{what}");
        let uptime = answer["uptime"].as_f64().unwrap();
        let told = facts(set, "proc/uptime");
        let told: f64 = told.split_whitespace().next().unwrap().parse().unwrap();
        assert!(uptime > told && uptime < told + 300.0, "{what}: up {uptime} s, {told} s when asked");
        let log = json(machine, "log");
        let last = log.as_array().unwrap().last().unwrap()["ts_nsec"].as_u64().unwrap() as f64 / 1e9;
        // The timekeeper stands still while a CPU that panics holds up the others.
        let late = if set.json["panic"].is_object() { 2.0 } else { 0.1 };
        assert!(uptime > last - late, "{what}: up {uptime} s, last line at {last} s");
        if set.json["panic"].is_object() {
            // Nothing ran for long after it. The console of a crash kernel starts anew.
            assert!(uptime < last + 3.0, "{what}: up {uptime} s, last line at {last} s");
        } else if set.json["boots"] == 1 {
            assert!(uptime > last_on_console(set) - 0.1, "{what}");
        }
        assert_eq!(text(&answer, "cmdline"), facts(set, "proc/cmdline").trim(), "{what}");
        let load: Vec<f64> =
            answer["load_average"].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect();
        let then = facts(set, "proc/loadavg");
        let fifteen: f64 = then.split_whitespace().nth(2).unwrap().parse().unwrap();
        // Busy since with two CPUs, the 15-minute average moves slowly.
        assert!(load[2] >= fifteen - 0.01 && load[2] < fifteen + 2.0, "{what}: {load:?}, was {then}");
        assert_eq!(answer["cpus"]["possible"], set.json["smp"], "{what}");
        let total = facts(set, "proc/meminfo");
        let total: u64 = total.lines().next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
        assert_eq!(answer["memory"].as_u64(), Some(total * 1024), "{what}");
        let tainted = json(machine, "mod -t")["modules"].as_array().unwrap().len();
        assert_eq!(tainted > 0, text(&answer, "tainted").contains('O'), "{what}");
    });
}

#[test]
fn log_lines_have_their_level_and_caller() {
    for_each_set(&mut |set, what, machine| {
        let log = json(machine, "log");
        let records = log.as_array().unwrap();
        let Some(planted) = fact(set, "planted/kstub_plant.txt") else { return };
        let pid = planted.lines().find_map(|line| line.strip_prefix("log.pid=")).unwrap();
        let mut seen = BTreeSet::new();
        for record in records {
            let Some(rest) = text(record, "text").strip_prefix("kstub_plant: level ") else { continue };
            let level = rest.split(' ').next().unwrap();
            let names = ["emerg", "alert", "crit", "err", "warn", "notice", "info", "debug"];
            assert_eq!(text(record, "level"), names[level.parse::<usize>().unwrap()], "{what}: {record}");
            assert_eq!(text(record, "caller"), format!("T{pid}"), "{what}: {record}");
            seen.insert(level.to_owned());
        }
        assert!(seen.len() >= 5, "{what}: {seen:?}");
        let grave = json(machine, "log -l err+");
        let grave = grave.as_array().unwrap();
        assert!(!grave.is_empty() && grave.len() < records.len(), "{what}");
        // A line written to /dev/kmsg by a program has its facility: user.
        let user = records.iter().find(|r| text(r, "text") == "kstub: a planted line in the kernel log");
        assert_eq!(user.unwrap()["facility"], 1, "{what}");
    });
}

#[test]
fn run_queues_have_what_runs_and_waits() {
    for_each_set(&mut |set, what, machine| {
        let answer = json(machine, "runq");
        let queues = answer["runqueues"].as_array().unwrap();
        assert_eq!(queues.len() as u64, set.json["smp"].as_u64().unwrap(), "{what}");
        let rows = json(machine, "ps");
        let rows = rows["tasks"].as_array().unwrap();
        let state = |task: &str| rows.iter().find(|row| row["task"] == task).map(|row| text(row, "state"));
        for queue in queues {
            assert_eq!(queue["problems"], serde_json::json!([]), "{what}");
            let cpu = queue["cpu"].as_u64().unwrap();
            let on_cpu = machine.cpus().iter().find(|one| u64::from(one.id.0) == cpu).unwrap();
            assert_eq!(queue["current"]["pid"].as_i64(), on_cpu.pid.map(i64::from), "{what}: CPU {cpu}");
            let idle = u64::from(queue["current"]["pid"] != 0);
            let waiting = ["deadline", "real_time", "fair"].map(|class| queue[class].as_array().unwrap());
            for task in waiting.iter().flat_map(|class| class.iter()) {
                let runnable = state(text(task, "task")) == Some("R") || task["delayed"] == true;
                assert!(runnable, "{what}: {task} is queued and {:?}", state(text(task, "task")));
            }
            // The count is the kernel's own, kept apart from the queues.
            let stopper = u64::from(!queue["stop"].is_null());
            let count = waiting.iter().map(|class| class.len() as u64).sum::<u64>() + stopper;
            let current = state(text(&queue["current"], "task"));
            if current == Some("R") {
                assert_eq!(queue["running"].as_u64(), Some(count + idle), "{what}: {queue}");
            }
        }
    });
}

#[test]
fn a_command_for_each_task() {
    for_each_set(&mut |set, what, machine| {
        let told = sleeping_processes(set);
        let pids = told.iter().map(|task| task.pid.to_string()).collect::<Vec<_>>().join(" ");
        let answer = json(machine, &format!("foreach {pids} files"));
        let rows = answer["tasks"].as_array().unwrap();
        let asked: BTreeSet<i64> = told.iter().map(|task| task.pid).collect();
        let answered: BTreeSet<i64> = rows.iter().filter_map(|row| row["pid"].as_i64()).collect();
        assert_eq!(answered, asked, "{what}");
        for row in rows {
            assert_eq!(row["pid"], row["result"]["pid"], "{what}: the answer is another task's");
            let told = facts(set, &format!("proc/{}/fd.txt", row["pid"]));
            compare_files(&told, &row["result"]).unwrap_or_else(|why| panic!("{what}: {why}"));
        }
        let ids = json(machine, "foreach ID task -R pid,comm");
        let ids = ids["tasks"].as_array().unwrap();
        assert!(ids.len() > 10 && ids.iter().all(|row| row["error"].is_null()), "{what}");
        assert!(run(machine, "foreach nobody files").is_err(), "{what}");
        assert!(run(machine, "foreach").is_err(), "{what}");
        // What is chosen holds for the commands behind it.
        let focus = Focus::default();
        let context =
            Context { machine, cpu: machine.first_cpu(), task: None, focus: &focus, form: Form::Both };
        let pid = told.first().unwrap().pid;
        command::run(&context, &format!("set {pid}")).unwrap();
        assert_eq!(command::run(&context, "task").unwrap().json["tasks"][0]["pid"], pid, "{what}");
        let args = command::run(&context, &format!("ps -a {pid}")).unwrap().json;
        let cmdline = facts(set, &format!("proc/{pid}/cmdline"));
        let words: Vec<&str> = cmdline.trim_end_matches('\0').split('\0').collect();
        let found: Option<Vec<&str>> =
            args["tasks"][0]["args"].as_array().map(|words| words.iter().filter_map(Value::as_str).collect());
        match found {
            Some(found) => assert_eq!(found, words, "{what}"),
            // User pages are what the filter takes.
            None => assert!(text(&args["tasks"][0], "args_problem").contains("excluded"), "{what}: {args}"),
        }
    });
}

/// `#define PREFIX_NAME NUMBER` in the headers that go with a set's kernel.
fn defined(set: &Set, prefix: &str, headers: &[&str]) -> Vec<(String, u64)> {
    let sources = lab::root().join("headers").join(text(&set.json, "release")).join("usr/src");
    let common = std::fs::read_dir(&sources).into_iter().flatten().flatten().map(|entry| entry.path());
    let Some(common) = common.into_iter().find(|path| path.to_string_lossy().ends_with("-common")) else {
        eprintln!("{}: no headers", set.name());
        return Vec::new();
    };
    let files = headers.iter().filter_map(|header| std::fs::read_to_string(common.join(header)).ok());
    let lines: Vec<String> =
        files.flat_map(|file| file.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
    let define = |line: &String| {
        let mut words = line.trim_start_matches('#').split_whitespace();
        let (Some("define"), Some(name), Some(number)) = (words.next(), words.next(), words.next()) else {
            return None;
        };
        let number = match number.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok()?,
            None => number.parse().ok()?,
        };
        Some((name.strip_prefix(prefix).filter(|name| !name.starts_with("_HOLE"))?.to_owned(), number))
    };
    lines.iter().filter_map(define).collect()
}

/// Every flag that the kernel's headers define has their name; shifted by a bit it has another.
#[test]
fn flags_of_tasks_have_the_names_of_the_headers() {
    const THREAD: [&str; 2] = ["arch/x86/include/asm/thread_info.h", "include/asm-generic/thread_info_tif.h"];
    for_each_set(&mut |set, what, machine| {
        let kernel = machine.kernel().unwrap();
        let process = defined(set, "PF_", &["include/linux/sched.h"]);
        for (name, mask) in &process {
            assert_eq!(kernel.process_flags(*mask), [name.as_str()], "{what}: PF_{name} {mask:#x}");
            assert_ne!(kernel.process_flags(*mask << 1), [name.as_str()], "{what}: PF_{name}");
        }
        let thread = defined(set, "TIF_", &THREAD);
        for (name, bit) in &thread {
            let of = |bit: u64| kernel.thread_flags(1 << bit);
            assert_eq!(of(*bit), Some(vec![name.clone()]), "{what}: TIF_{name} {bit}");
            assert_ne!(of(*bit + 1), Some(vec![name.clone()]), "{what}: TIF_{name}");
        }
        assert!(process.is_empty() || process.len() > 20 && thread.len() > 15, "{what}");
        let kthreadd = json(machine, "task 2")["tasks"][0].clone();
        let has = |key: &str, name: &str| kthreadd[key].as_array().unwrap().iter().any(|one| one == name);
        assert!(has("flags_names", "KTHREAD") && !has("flags_names", "RANDOMIZE"), "{what}: {kthreadd}");
    });
}

/// The kernel's own real-time threads are FIFO at the top, and what the guest ran is not.
#[test]
fn tasks_by_policy() {
    for_each_set(&mut |set, what, machine| {
        let names = |line: &str| -> Vec<String> {
            let answer = json(machine, line);
            answer["tasks"].as_array().unwrap().iter().map(|task| text(task, "comm").to_owned()).collect()
        };
        let (fifo, normal, all) = (names("ps -y FIFO"), names("ps -y normal"), names("ps -y all"));
        for cpu in 0..2 {
            let migration = format!("migration/{cpu}");
            assert!(fifo.contains(&migration) && !normal.contains(&migration), "{what}: {fifo:?}");
        }
        assert!(normal.contains(&"init".to_owned()) && !fifo.contains(&"init".to_owned()), "{what}");
        assert_eq!(all.len(), names("ps").len(), "{what}");
        // stop_machine's threads have the highest real-time priority there is.
        assert!(run(machine, "ps -y fifo").unwrap().text.contains("FIFO 0 "), "{what}");
        assert!(run(machine, "ps -y speedy").unwrap_err().contains("there are: NORMAL, FIFO"), "{what}");
        let _ = set;
    });
}
