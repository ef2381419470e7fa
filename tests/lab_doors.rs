//! The doors to kstub's commands inside gdb (scripts/kstub.py, `info os`, tasks as threads, scripts/examples), on
//! real dumps and in each gdb there is, against what the guest said of itself, QEMU's registers, and gdb's own reads.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::gdb_session::{KSTUB, has_in_order, kstub};
use support::lab::{self, Set};

const GATHER: &str = include_str!("support/doors.py");
/// Commands whose text must be the same through every door.
const TYPED: [&str; 5] = [
    "ps",
    "log",
    "struct list_head",
    "struct task_struct.comm,pid init_task",
    "struct -o task_struct.thread_info",
];

/// The dump of a set that is read fastest.
fn dump_of(set: &Set) -> PathBuf {
    let dumps = set.dumps();
    let raw =
        dumps.iter().find(|d| d.complete && d.format == "elf" && !d.flattened && d.filter_level.is_none());
    raw.or(dumps.first()).unwrap().path.clone()
}

/// A paused guest of each kernel, and a panic; with `KSTUB_LAB_SETS=NAME,NAME` those.
fn sets() -> Vec<Set> {
    let chosen = std::env::var("KSTUB_LAB_SETS").ok();
    let mut seen = std::collections::BTreeSet::new();
    let mut wanted = |set: &Set| match &chosen {
        Some(names) => names.split(',').any(|name| name == set.name()),
        None if set.json["kind"] == "qemu" => seen.insert(set.json["release"].to_string()),
        None => set.json["kind"] == "kdump" && seen.insert("panic".into()),
    };
    lab::sets().unwrap_or_default().into_iter().filter(|set| wanted(set)).collect()
}

/// The gdbs to test: the system's, and the newest where the lab has it.
fn gdbs() -> Vec<PathBuf> {
    let newest = lab::root().join("tools/bin/gdb-new");
    [PathBuf::from("gdb")].into_iter().chain(newest.exists().then_some(newest)).collect()
}

/// Runs `check` for each set and gdb.
fn for_each(check: &mut dyn FnMut(&Set, &Path, &Path, &str)) {
    for set in sets() {
        for gdb in gdbs() {
            let what = format!("{} in {}", set.name(), gdb.display());
            eprintln!("{what}");
            check(&set, &dump_of(&set), &gdb, &what);
        }
    }
}

/// What the Python program in a file prints in gdb, with kstub's `options`.
fn python_file(gdb: &Path, dump: &Path, options: &[&str], program: &Path) -> String {
    let mut kstub = Command::new(KSTUB);
    kstub.env_remove("DEBUGINFOD_URLS").arg("gdb").arg(dump).arg("--gdb").arg(gdb).args(options);
    kstub.args([
        "--",
        "-nx",
        "-batch",
        "-ex",
        "echo @@@@\\n",
        "-ex",
        &format!("source {}", program.display()),
    ]);
    let output = kstub.output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    match printed.split_once("@@@@\n") {
        Some((_, printed)) if !said.contains("Error") => printed.to_owned(),
        _ => panic!("{}: {printed}\n{said}", dump.display()),
    }
}

/// What a Python program prints in gdb.
fn python(gdb: &Path, dump: &Path, options: &[&str], program: &str) -> String {
    let mut file = tempfile::Builder::new().suffix(".py").tempfile().unwrap();
    file.write_all(program.as_bytes()).unwrap();
    python_file(gdb, dump, options, file.path())
}

fn facts(set: &Set, file: &str) -> String {
    let path = set.dir.join("facts").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Of each task in the guest: tid, state, comm.
fn guest_tasks(set: &Set) -> Vec<(u32, char, String)> {
    let text = facts(set, "tasks.txt");
    let words = text.lines().skip(1).map(|line| line.split(' ').collect::<Vec<_>>());
    words
        .filter(|words| words.len() >= 5)
        .map(|words| (words[0].parse().unwrap(), words[3].chars().next().unwrap(), words[4..].join(" ")))
        .collect()
}

/// Tasks that the guest's own programs and module planted, and that last as long as it does.
fn planted_tasks(set: &Set) -> Vec<(u32, char, String)> {
    let mut tasks = guest_tasks(set);
    tasks.retain(|(_, _, comm)| comm.starts_with("kstub"));
    assert!(tasks.len() > 11, "{}: {tasks:?}", set.name());
    tasks
}

/// Which pid runs on which CPU, where the guest, QEMU or the panic say so: busy programs, the panic's task, and pid 0
/// where QEMU saw the CPU halted.
fn running(set: &Set) -> BTreeMap<usize, u64> {
    let mut found = BTreeMap::new();
    if let Some(path) = set.json["truth"]["registers"].as_str() {
        let text = std::fs::read_to_string(set.dir.join(path)).unwrap();
        for (cpu, part) in text.split("CPU#").skip(1).enumerate() {
            if part.contains("HLT=1") {
                found.insert(cpu, 0);
            }
        }
    }
    for file in ["spin-user.txt", "spin-kernel.txt"] {
        let planted = set.planted(file).unwrap();
        found.insert(planted["cpu"].parse().unwrap(), planted["pid"].parse().unwrap());
    }
    if let Some(panic) = set.json["panic"].as_object() {
        found.insert(panic["cpu"].as_u64().unwrap() as usize, panic["pid"].as_u64().unwrap());
    }
    found
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
}

fn differs(what: &str, got: &[u64], want: &BTreeMap<usize, u64>) -> Result<(), String> {
    match want.iter().find(|(cpu, pid)| got.get(**cpu) != Some(pid)) {
        Some((cpu, pid)) => Err(format!("{what}: CPU {cpu} has {:?}, not {pid}", got.get(*cpu))),
        None => Ok(()),
    }
}

/// The answer of `tests/support/doors.py`.
fn gather(set: &Set, gdb: &Path, dump: &Path) -> Value {
    let pids: Vec<u32> = [1, 2].into_iter().chain(planted_tasks(set).iter().map(|task| task.0)).collect();
    let pid = set.planted("threads.txt").unwrap()["pid"].clone();
    let os =
        ["", "tasks", "cpus", "modules", "log", "mounts", &format!("files {pid}"), "files 4000000", "nosuch"];
    let planted = set.planted("kstub_plant.txt").unwrap_or_default();
    let dynamic = planted.get("percpu.dynamic").map_or("0", String::as_str);
    let head = format!(
        "TYPED, PIDS, OS, DYNAMIC = {}, {}, {}, {dynamic}\n",
        Value::from(TYPED),
        Value::from(pids),
        Value::from(os)
    );
    let printed = python(gdb, dump, &[], &(head + GATHER));
    let line = printed.lines().find_map(|line| line.strip_prefix("@@@"));
    serde_json::from_str(line.unwrap_or_else(|| panic!("{}: {printed}", set.name()))).unwrap()
}

#[test]
fn commands_functions_and_tables_in_gdb() {
    for_each(&mut |set, dump, gdb, what| {
        let got = gather(set, gdb, dump);
        typed_commands(set, dump, &got, what);
        threads_and_cpus(set, &got, what);
        per_cpu_commands(set, &got, what);
        if set.json["kind"] == "qemu" {
            answers_without_a_line(&got, what);
        }
        python_functions(set, &got, what);
        os_tables(set, &got, what);
    });
}

fn typed_commands(set: &Set, dump: &Path, got: &Value, what: &str) {
    for line in TYPED {
        let output = kstub(&["run", dump.to_str().unwrap(), line]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.len() > 20, "{what}: {line}: {text}");
        assert_eq!(got["typed"][line].as_str(), Some(text.as_str()), "{what}: {line}");
    }
    let own = |key: &str| got["own"][key].as_str().unwrap().to_owned();
    assert!(own("list").contains("List specified function or line"), "{what}: {}", own("list"));
    assert!(own("p").contains("= 2"), "{what}: {}", own("p"));
    assert!(own("info").contains("Thread 1.1"), "{what}: {}", own("info"));
    assert!(own("kstub p").contains("init_task.pid = 0"), "{what}: {}", own("kstub p"));
    assert!(own("kstub list").contains("entries of a linked list"), "{what}: {}", own("kstub list"));
    let log = got["typed"]["log"].as_str().unwrap();
    let dmesg = facts(set, "dmesg.txt");
    let banner = dmesg.lines().next().unwrap();
    assert!(log.contains(banner.trim_end()), "{what}: no {banner:?} in the log");
}

fn threads_and_cpus(set: &Set, got: &Value, what: &str) {
    let truth = set.registers();
    let each = got["each"].as_object().unwrap();
    assert_eq!(each.len() as u64, set.json["smp"].as_u64().unwrap(), "{what}");
    // `thread apply all` answers for the thread it is at, with its rsp and for its CPU; QEMU knows both.
    let (apply, regs) = (got["apply"].as_str().unwrap(), got["apply_regs"].as_str().unwrap());
    let mut places = Vec::new();
    let newest_first: Vec<String> = (0..each.len()).rev().map(|cpu| cpu.to_string()).collect();
    for cpu in &newest_first {
        let one = &each[cpu];
        let (rsp, text) = (one["rsp"].as_str().unwrap(), one["text"].as_str().unwrap());
        if let Some(truth) = &truth {
            assert_eq!(
                rsp,
                format!("{:#x}", truth[cpu.parse::<usize>().unwrap()]["rsp"]),
                "{what}: CPU {cpu}"
            );
        }
        assert!(text.contains(rsp), "{what}: CPU {cpu}: {rsp}: {text}");
        places.push((rsp, apply.find(text.trim()).unwrap_or_else(|| panic!("{what}: CPU {cpu}: {apply}"))));
        assert!(regs.contains(&format!("CPU {cpu}")), "{what}: {regs}");
    }
    let order: Vec<String> =
        regs.lines().filter(|line| line.starts_with("CPU ")).map(|line| line[4..5].to_owned()).collect();
    assert_eq!(order, newest_first, "{what}: {regs}");
    assert!(places.windows(2).all(|pair| pair[0].1 < pair[1].1), "{what}: {places:?}");
    // Its own number lies in each CPU's runqueue.
    let cpus: Vec<u64> = (0..each.len() as u64).collect();
    assert_eq!(numbers(&got["rq_cpu"]), cpus, "{what}");
    let (pids, want) = (numbers(&got["rq_pid"]), running(set));
    assert!(want.len() >= 2, "{what}: {want:?}");
    differs(what, &pids, &want).unwrap();
    let shifted: Vec<u64> = cpus.iter().map(|cpu| pids[(cpu + 1) as usize % pids.len()]).collect();
    differs(what, &shifted, &want).expect_err("the next CPU's runqueue must differ");
    assert!(got["no_cpu"].as_str().unwrap().contains("there is no CPU"), "{what}: {}", got["no_cpu"]);
    assert!(got["no_task"].as_str().unwrap().contains("4000000"), "{what}: {}", got["no_task"]);
    assert_eq!(got["task"]["1"], "init", "{what}");
    for (tid, _, comm) in planted_tasks(set) {
        assert_eq!(got["task"][tid.to_string()], comm, "{what}: {tid}");
    }
}

fn python_functions(set: &Set, got: &Value, what: &str) {
    let texts = |key: &str| -> Vec<String> { serde_json::from_value(got[key].clone()).unwrap() };
    let (many, own) = (texts("read_many"), texts("read_gdb"));
    assert!(many.len() > 5000, "{what}: {}", many.len());
    assert!(many == own, "{what}: {:?}", many.iter().zip(&own).position(|(a, b)| a != b));
    assert!(many[0].starts_with(&hex_text(b"Linux version ")), "{what}: {}", many[0]);
    assert_eq!((many[1].len(), many[2].as_str()), (2 * 4096, ""), "{what}: nothing can be read at 0");
    assert_eq!(many[4], "", "{what}: nothing can be read below the kernel's half");
    assert_ne!(many[6..many.len() - 1], many[7..], "{what}: pieces 8 bytes further must differ");
    // Values are complete when they are made: nothing is read later, in another thread's memory.
    assert_eq!(got["tasks"], got["tasks_after_switch"], "{what}");
    let tasks: Vec<(u64, u32, String)> = serde_json::from_value(got["tasks"].clone()).unwrap();
    for (tid, _, comm) in planted_tasks(set) {
        assert!(tasks.iter().any(|task| (task.1, &task.2) == (tid, &comm)), "{what}: no {tid} {comm}");
    }
    // One page, whichever way it is named; in the dump's page tables it is where `why` says, too.
    let pages: Vec<Vec<u64>> = serde_json::from_value(got["pages"].clone()).unwrap();
    let page = pages[0][0];
    assert!(
        page > 0xff00_0000_0000_0000 && pages.iter().flatten().all(|&one| one == page),
        "{what}: {pages:x?}"
    );
    assert!(
        got["typed_page"].as_str().unwrap().contains(&format!("{page:x}")),
        "{what}: {}",
        got["typed_page"]
    );
    let mut names: Vec<String> = texts("modules");
    names.sort();
    let mut want: Vec<String> =
        facts(set, "proc/modules").lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect();
    want.sort();
    assert_eq!(names, want, "{what}");
}

/// An answer without a line is no error. None of the guests said anything at level emerg.
fn answers_without_a_line(got: &Value, what: &str) {
    assert_eq!(got["nothing"], serde_json::json!(["", [], ""]), "{what}");
}

/// gdb's own commands take per-CPU variables by name, address and pointer.
fn per_cpu_commands(set: &Set, got: &Value, what: &str) {
    let said = &got["percpu"];
    let text = |key: &str| said[key].as_str().unwrap().to_owned();
    let copies = numbers(&said["copies"]);
    assert!(copies.len() > 1 && copies[0] != copies[1], "{what}: {copies:x?}");
    for (line, copy) in text("address").lines().zip(&copies) {
        assert!(line.contains(&format!("{copy:#x} <runqueues cpu ")), "{what}: {line}");
    }
    assert_eq!(text("address").lines().count(), copies.len(), "{what}");
    let values: Vec<String> =
        text("member").lines().map(|line| line.rsplit(' ').next().unwrap().to_owned()).collect();
    assert_eq!(values, ["0", "1"], "{what}");
    assert_eq!(said["page"][0], said["page"][1], "{what}: the page of the copy");
    let Some(planted) = set.planted("kstub_plant.txt") else { return };
    for (cpu, line) in text("pointer").lines().enumerate() {
        let keys = [".address", ""].map(|end| planted[&format!("percpu.dynamic.{cpu}{end}")].clone());
        assert_eq!(line, format!("CPU {cpu} at {}: {}", keys[0], keys[1]), "{what}");
    }
}

fn hex_text(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn os_tables(set: &Set, got: &Value, what: &str) {
    let table =
        |name: &str| got["os"][name].as_str().unwrap_or_else(|| panic!("{what}: {}", got["os"])).to_owned();
    let has_row = |table: &str, cells: &[&str]| {
        table.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            cells.iter().all(|cell| words.contains(cell))
        })
    };
    for name in ["tasks", "cpus", "modules", "slabs", "log", "files", "mounts", "vmas"] {
        assert!(has_row(&table(""), &[name]), "{what}: {}", table(""));
    }
    for (tid, _, comm) in planted_tasks(set) {
        assert!(has_row(&table("tasks"), &[&tid.to_string(), &comm]), "{what}: no {tid} {comm}");
        assert!(!has_row(&table("tasks"), &[&(tid + 7000).to_string(), &comm]), "{what}: {comm}");
    }
    for line in facts(set, "proc/modules").lines() {
        let words: Vec<&str> = line.split(' ').collect();
        assert!(has_row(&table("modules"), &[words[0], words[5]]), "{what}: {line}");
    }
    let dmesg = facts(set, "dmesg.txt");
    let text = dmesg.lines().find_map(|line| line.split_once("] Command line: ")).unwrap().1;
    assert!(table("log").contains(text.trim_end()), "{what}: {}", table("log"));
    assert!(has_row(&table("mounts"), &["/mnt/overlay", "overlay"]), "{what}: {}", table("mounts"));
    let pid = set.planted("threads.txt").unwrap()["pid"].clone();
    let files = table(&format!("files {pid}"));
    let fds = facts(set, &format!("proc/{pid}/fd.txt"));
    let regular: Vec<&str> = fds.split_whitespace().filter(|word| word.starts_with('/')).collect();
    assert!(!regular.is_empty(), "{what}: {fds}");
    for path in regular {
        assert!(has_row(&files, &[path]), "{what}: no {path} in {files}");
    }
    assert!(table("files 4000000").contains("4000000"), "{what}: {}", table("files 4000000"));
    assert!(table("nosuch").contains("no table 'nosuch'"), "{what}: {}", table("nosuch"));
}

/// Every thread's name, description and functions, innermost first.
const THREADS: &str = r#"
import gdb, json
found = {}
for thread in gdb.selected_inferior().threads():
    thread.switch()
    names = []
    try:
        frame = gdb.newest_frame()
        while frame is not None and len(names) < 60:
            names.append(frame.name() or "")
            frame = frame.older()
    except gdb.error as error:
        names.append("error: %s" % error)
    found[str(thread.ptid[1])] = [thread.name, thread.details or "", names]
print("@@@" + json.dumps(found))
"#;

const FIRST_TASK: u32 = 1_000_000_000;
type ThreadRow = (String, String, Vec<String>);

fn threads(gdb: &Path, dump: &Path, show: &str) -> BTreeMap<u32, ThreadRow> {
    let printed = python(gdb, dump, &["--threads", show], THREADS);
    let line = printed.lines().find_map(|line| line.strip_prefix("@@@"));
    serde_json::from_str(line.unwrap_or_else(|| panic!("{printed}"))).unwrap()
}

/// The functions in which the guest said that a task slept, innermost first, by gdb's names.
fn guest_stack(set: &Set, tid: u32) -> Option<Vec<String>> {
    let tasks = std::fs::read_dir(set.dir.join("facts/proc")).unwrap();
    let file = tasks
        .map(|process| process.unwrap().path().join(format!("task/{tid}/stack")))
        .find(|file| file.exists())?;
    let text = std::fs::read_to_string(file).unwrap();
    let names = text.lines().filter_map(|line| line.split_whitespace().nth(1)?.split(['+', '.']).next());
    let names = names.map(|name| name.strip_suffix("_after_hwframe").unwrap_or(name).to_owned());
    Some(names.collect())
}

#[test]
fn tasks_as_threads_sleep_where_the_guest_said() {
    for_each(&mut |set, dump, gdb, what| {
        let found = threads(gdb, dump, "all");
        let busy = running(set);
        let smp = set.json["smp"].as_u64().unwrap() as u32;
        assert!((1..=smp).all(|cpu| found.contains_key(&cpu)), "{what}");
        let is_busy = |tid: u32| busy.values().any(|&pid| pid == u64::from(tid));
        let mut asleep = 0;
        for (tid, state, comm) in guest_tasks(set) {
            let Some((name, details, frames)) = found.get(&(FIRST_TASK + tid)) else {
                // Workers come and go; others may have run at the dump, and programs of the boot have ended.
                let on_cpu = found.values().any(|(_, text, _)| text.contains(&format!("pid {tid}")));
                // So has the thread that initialises a new filesystem, once it is done.
                let passing = comm.starts_with("kworker")
                    || comm == "ext4lazyinit"
                    || !comm.starts_with("kstub") && state == 'R';
                assert!(on_cpu || is_busy(tid) || passing, "{what}: {tid} {comm} is no thread");
                continue;
            };
            // The guest's /proc adds to a worker's name, and knows a kernel thread's whole name.
            if !comm.starts_with("kworker") {
                assert_eq!(*name, comm.chars().take(15).collect::<String>(), "{what}: {tid}");
            }
            if state == 'Z' {
                assert!(details.contains("stack released"), "{what}: {tid} {comm}: {details}");
                continue;
            }
            let top =
                frames.iter().take(2).any(|name| ["__schedule", "context_switch"].contains(&name.as_str()));
            assert!(top, "{what}: {tid} {comm}: {details}: {frames:?}");
            assert!(!details.contains("released"), "{what}: {tid} {comm}: {details}");
            asleep += 1;
        }
        assert!(asleep > 30, "{what}: {asleep}");
        let mut compared = 0;
        let stacks: Vec<_> = planted_tasks(set)
            .into_iter()
            .filter(|task| task.1 != 'R' && task.1 != 'Z')
            .filter_map(|task| Some((guest_stack(set, task.0).filter(|stack| !stack.is_empty())?, task)))
            .collect();
        for (stack, (tid, _, comm)) in &stacks {
            let frames = &found[&(FIRST_TASK + tid)].2;
            assert!(has_in_order(frames, stack), "{what}: {tid} {comm}: {frames:?} lacks some of {stack:?}");
            let turned: Vec<String> = stack.iter().rev().cloned().collect();
            assert!(stack.len() < 2 || !has_in_order(frames, &turned), "a stack upside down must differ");
            compared += usize::from(comm.starts_with("kstub-thr"));
        }
        assert!(compared >= 8, "{what}: {compared} of the planted threads compared");
        let (other, (tid, ..)) =
            (&stacks.iter().find(|stack| stack.1.2 == "kstub-thr-3").unwrap().0, &stacks[0].1);
        assert!(!has_in_order(&found[&(FIRST_TASK + tid)].2, other), "another task's stack must differ");
    });
}

#[test]
fn running_tasks_are_threads_in_place_of_their_cpus() {
    for_each(&mut |set, dump, gdb, what| {
        let found = threads(gdb, dump, "tasks");
        for (cpu, pid) in running(set) {
            let (task, own) = (FIRST_TASK + pid as u32, cpu as u32 + 1);
            let (there, gone) = if pid == 0 { (own, task) } else { (task, own) };
            assert!(!found.contains_key(&gone), "{what}: thread {gone} for pid {pid}");
            let (_, details, _) = found.get(&there).unwrap_or_else(|| panic!("{what}: no thread {there}"));
            assert!(details.starts_with(&format!("CPU {cpu}, pid {pid}")), "{what}: {details}");
            assert!(!details.starts_with(&format!("CPU {}", cpu + 1)), "{what}: {details}");
        }
        for (tid, _, comm) in planted_tasks(set) {
            assert_eq!(found[&(FIRST_TASK + tid)].0, comm, "{what}: {tid}");
        }
    });
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/examples").join(name)
}

/// What an example for the shell prints, line by line, as columns.
fn shell_example(name: &str, arguments: &[&str]) -> Vec<Vec<String>> {
    let output = Command::new(example(name))
        .args(arguments)
        .env("KSTUB", KSTUB)
        .env_remove("DEBUGINFOD_URLS")
        .output()
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{name}");
    let columns = |line: &str| line.split('\t').map(str::to_owned).collect();
    String::from_utf8(output.stdout).unwrap().lines().map(columns).collect()
}

#[test]
fn examples_for_the_shell() {
    if Command::new("jq").arg("--version").output().is_err() {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "no jq: install it");
        eprintln!("skipped: no jq");
        return;
    }
    for set in sets() {
        let what = set.name();
        let path = dump_of(&set);
        let dump = path.to_str().unwrap();
        let modules = facts(&set, "proc/modules");
        let mut sizes: Vec<(u64, &str)> = modules
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .map(|words| (words[1].parse().unwrap(), words[0]))
            .collect();
        sizes.sort_by(|a, b| b.cmp(a));
        let got = shell_example("biggest-modules", &[dump, "1000"]);
        let mut rows: Vec<(u64, &str)> =
            got.iter().map(|row| (row[0].parse().unwrap(), row[1].as_str())).collect();
        assert!(rows.windows(2).all(|pair| pair[0].0 >= pair[1].0), "{what}: {rows:?}");
        rows.sort_by(|a, b| b.cmp(a));
        assert_eq!(rows, sizes, "{what}");

        // The planting programs sleep from before the facts to the dump; others come, go and grow.
        let resident = shell_example("biggest-processes", &[dump, "1000"]);
        let mut compared = 0;
        for (tid, ..) in planted_tasks(&set) {
            // Old kernels' VmRSS lags behind; smaps counts page by page. A zombie has none.
            let smaps = set.dir.join(format!("facts/proc/{tid}/smaps"));
            let rss: Vec<u64> = std::fs::read_to_string(smaps)
                .unwrap_or_default()
                .lines()
                .filter_map(|line| words(line.strip_prefix("Rss:")?)[0].parse().ok())
                .collect();
            let kib: u64 = rss.iter().sum();
            if rss.is_empty() {
                continue;
            }
            let row = resident.iter().find(|row| row[1] == tid.to_string());
            let row = row.unwrap_or_else(|| panic!("{what}: no {tid} in {resident:?}"));
            assert_eq!(row[0].parse::<u64>().unwrap(), kib, "{what}: {tid}: {row:?}");
            compared += 1;
        }
        assert!(compared >= 4, "{what}: {compared}");

        // Caches of the planted module: nobody allocates from them after it was loaded.
        let slabinfo = facts(&set, "proc/slabinfo");
        let caches = shell_example("biggest-slabs", &[dump, "1000"]);
        let mut planted = 0;
        for line in slabinfo.lines().filter(|line| line.starts_with("kstub_")) {
            let want = words(line);
            let row = caches.iter().find(|row| row[3] == want[0]).unwrap_or_else(|| panic!("{what}: {line}"));
            let pages: u64 = [5, 14].iter().map(|&i: &usize| want[i].parse::<u64>().unwrap()).product();
            // What CPUs keep for themselves moves on; slabs and their objects stay.
            assert_eq!((&row[0], row[2].as_str()), (&(pages * 4).to_string(), want[2]), "{what}: {line}");
            let in_use: u64 = row[1].parse().unwrap();
            assert!(in_use <= want[2].parse().unwrap(), "{what}: {line}: {row:?}");
            planted += 1;
        }
        assert_eq!(planted > 0, modules.contains("kstub_plant "), "{what}: {slabinfo}");
        let census = shell_example("page-census", &[dump]);
        let pages = |kind: &str| {
            let row = census.iter().find(|row| row[2] == kind);
            row.map_or(0, |row| row[1].parse::<u64>().unwrap())
        };
        let meminfo = facts(&set, "proc/meminfo");
        let huge = meminfo.lines().find_map(|line| line.strip_prefix("Hugetlb:")).unwrap();
        assert_eq!(pages("hugetlb") * 4, words(huge)[0].parse::<u64>().unwrap(), "{what}: {census:?}");
        assert!(pages("hugetlb") > 0 && pages("hugetlb") != pages("slab"), "{what}: {census:?}");

        let pid = &set.planted("threads.txt").unwrap()["pid"];
        let holders = shell_example("who-has-open", &[dump, "/run/facts/planted/threads.txt"]);
        assert_eq!(holders, [[pid.as_str(), "1", "kstub-threads"]], "{what}");
        assert_eq!(shell_example("who-has-open", &[dump, "/no/such/file"]).len(), 0, "{what}");
    }
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn examples_for_gdb() {
    for_each(&mut |set, dump, gdb, what| {
        let blocked = python_file(gdb, dump, &[], &example("blocked.py"));
        let rows: Vec<Vec<&str>> =
            blocked.lines().map(words).filter(|row| row.len() == 5 && row[1] == "s").collect();
        let pids: Vec<u32> = rows.iter().map(|row| row[2].parse().unwrap()).collect();
        for (tid, state, comm) in planted_tasks(set) {
            assert_eq!(pids.contains(&tid), state == 'D', "{what}: {tid} {comm} {state}: {blocked}");
        }
        let seconds: Vec<f64> = rows.iter().map(|row| row[0].parse().unwrap()).collect();
        assert!(seconds.windows(2).all(|pair| pair[0] >= pair[1]), "{what}: {blocked}");
        // They have slept since before the facts, and not since before the boot.
        let output = kstub(&["run", dump.to_str().unwrap(), "--json", "log"]);
        let log: Value = serde_json::from_slice(&output.stdout).unwrap();
        let last = |records: &Value| records.as_array()?.last()?["ts_nsec"].as_u64();
        let end = last(&log["result"]).or_else(|| last(&log["result"]["records"])).unwrap() as f64 / 1e9;
        assert!(seconds.iter().all(|&since| since > 0.0 && since < end + 600.0), "{what}: {end}: {blocked}");

        let queues = python_file(gdb, dump, &[], &example("runqueues.py"));
        let rows: Vec<Vec<&str>> = queues.lines().skip(1).map(words).filter(|row| row.len() == 6).collect();
        let pids: Vec<u64> = rows.iter().map(|row| row[2].parse().unwrap()).collect();
        assert_eq!(pids.len() as u64, set.json["smp"].as_u64().unwrap(), "{what}: {queues}");
        differs(what, &pids, &running(set)).unwrap();
        for row in &rows {
            assert!(row[2] != "0" || row[3] == format!("swapper/{}", row[0]), "{what}: {queues}");
        }

        let channels = python_file(gdb, dump, &["--threads", "all"], &example("wait-channels.py"));
        let count = |function: &str| {
            let row = channels.lines().map(words).find(|row| row.get(1) == Some(&function));
            row.and_then(|row| row[0].parse().ok()).unwrap_or(0)
        };
        // Functions that only the planted threads sleep in, by their own stacks.
        let mut checked = 0;
        for (tid, _, comm) in planted_tasks(set).into_iter().filter(|task| task.2.starts_with("kstub-thr-")) {
            let stack = guest_stack(set, tid).unwrap();
            if ["pipe_read", "__do_sys_pause", "futex_wait_queue", "__skb_wait_for_more_packets"]
                .contains(&stack[0].as_str())
            {
                assert!(count(&stack[0]) >= 1, "{what}: {comm}: {stack:?}: {channels}");
                checked += 1;
            }
        }
        assert!(checked >= 2, "{what}: {checked}: {channels}");
        assert_eq!(count("no_such_function"), 0, "{what}");
    });
}
