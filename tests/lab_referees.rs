//! What commands answer of real dumps, against drgn and crash on the same dumps and against what a module planted in
//! the guest; with a vmlinux, and with the dump alone.
//!
//! Truth is made by `scripts/lab referee`. A referee is not right by itself: [`KNOWN`] has the mistakes of theirs that
//! were looked into, each with its reason.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "lab_referees/planted.rs"]
mod planted;
mod support;

use kstub::addr::VirtAddr;
use kstub::backend::Dump;
use kstub::command::{self, Context, Focus, Form};
use kstub::debuginfo::find::Places;
use kstub::kernel::{CpuId, Machine, Options};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use support::lab::{self, Set};

const SETS: [&str; 5] = ["qemu-6.1-4l", "qemu-6.12-5l", "qemu-newest-5l", "qemu-5.10-4l", "kdump-6.1"];

/// Where a referee is wrong: its name, what the row's name begins and ends with, and why it is so.
const KNOWN: &[(&str, &str, &str, &str)] = &[
    // fork_idle() runs in the first process, and real_parent says so; crash takes 0 for all that have pid 0.
    ("crash", "swapper/", " ppid", "the kernel's own field says 1"),
    // Before v6.2 each task holds counts back, and referees add those of one process; a vfork child shares the mm.
    ("kdump-6.1", "kstub-dstate ", " rss", "smaps has the same as kstub"),
    ("qemu-6.1-4l", "kstub-dstate ", " rss", "smaps has the same as kstub"),
    ("qemu-5.10-4l", "kstub-dstate ", " rss", "smaps has the same as kstub"),
    ("crash", "kstub-dstate ", " rss", "smaps has the same as kstub"),
];

/// One dump as kstub opens it, and what drgn says of it.
struct Case {
    name: String,
    set: Set,
    drgn: Value,
    machine: Machine,
    /// A directory with nothing but a link to the dump.
    _alone: Option<tempfile::TempDir>,
}

/// What is asked of both sides: a value by the name of the thing and of its property.
type Rows = BTreeMap<String, Value>;

/// What a referee says of one dump.
fn referee(set: &str, dump: &str, who: &str) -> Value {
    let made = Command::new("scripts/lab")
        .args(["referee", set, dump, "--who", who])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(made.status.success(), "{set}: {}", String::from_utf8_lossy(&made.stderr));
    let path = lab::root().join(format!("referee-cache/{set}/{dump}.{who}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The dumps, each opened once with its vmlinux and once alone.
fn cases() -> &'static [Case] {
    static CASES: OnceLock<Vec<Case>> = OnceLock::new();
    CASES.get_or_init(|| {
        let mut cases = Vec::new();
        let wanted = |set: &Set| SETS.contains(&set.name().as_str());
        for set in lab::sets().unwrap_or_default().into_iter().filter(wanted) {
            let dump = set.dumps().first().unwrap().clone();
            let drgn = referee(&set.name(), &dump.name, "drgn");
            assert!(drgn.get("refused").is_none(), "{}: {}", set.name(), drgn["refused"]);
            for with_vmlinux in [true, false] {
                let alone = (!with_vmlinux).then(|| tempfile::tempdir().unwrap());
                let path = alone.as_ref().map_or(dump.path.clone(), |dir| dir.path().join(&dump.name));
                if alone.is_some() {
                    std::os::unix::fs::symlink(&dump.path, &path).unwrap();
                }
                let beside = path.parent().map(std::path::Path::to_owned);
                let options = Options {
                    vmlinux: None,
                    places: Places { beside, ..Places::default() },
                    ..Options::default()
                };
                let machine =
                    Machine::open(Arc::new(Dump::open(&path).unwrap()), &options, &|_, _| ()).unwrap();
                assert_eq!(machine.vmlinux().is_some(), with_vmlinux, "{}", set.name());
                cases.push(Case {
                    name: format!("{}{}", set.name(), if with_vmlinux { "" } else { " without vmlinux" }),
                    set: Set { dir: set.dir.clone(), json: set.json.clone() },
                    drgn: drgn.clone(),
                    machine,
                    _alone: alone,
                });
            }
        }
        cases
    })
}

impl Case {
    fn try_ask(&self, cpu: CpuId, line: &str) -> Result<Value, String> {
        let focus = Focus::default();
        let context = Context { machine: &self.machine, cpu, focus: &focus, task: None, form: Form::Both };
        command::run(&context, line).map(|output| output.json).map_err(|error| error.to_string())
    }

    fn ask(&self, line: &str) -> Value {
        self.try_ask(self.machine.first_cpu(), line)
            .unwrap_or_else(|error| panic!("{}: {line}: {error}", self.name))
    }

    /// The text of an expression's value.
    fn value(&self, expression: &str) -> Value {
        self.ask(&format!("p {expression}"))["values"][0]["value"].clone()
    }

    fn release(&self) -> &str {
        self.set.json["release"].as_str().unwrap()
    }
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn rows(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().unwrap_or_else(|| panic!("no rows: {value}")).iter()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// An address however it is written; that of nothing is null.
fn at(value: &Value) -> Value {
    match value.as_str().map(hex) {
        None | Some(0) => Value::Null,
        Some(at) => json!(format!("{at:#x}")),
    }
}

/// Puts the named properties of one thing among the rows.
fn put(rows: &mut Rows, thing: &str, properties: Value) {
    for (name, value) in properties.as_object().unwrap() {
        let key = format!("{thing} {name}");
        assert!(rows.insert(key.clone(), value.clone()).is_none(), "{key} comes twice");
    }
}

/// The rows in which two sides differ, but for what is known of the referee.
fn differences(what: &str, ours: &Rows, theirs: &Rows) -> Vec<String> {
    let keys: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let known = |key: &str| {
        KNOWN
            .iter()
            .any(|(set, start, end, _)| what.starts_with(set) && key.starts_with(start) && key.ends_with(end))
    };
    keys.into_iter()
        .filter(|key| ours.get(*key) != theirs.get(*key) && !known(key))
        .map(|key| {
            let shown = |side: Option<&Value>| side.map_or("nothing".into(), Value::to_string);
            format!("{what}: {key}: kstub {}, referee {}", shown(ours.get(key)), shown(theirs.get(key)))
        })
        .collect()
}

/// Each property's values moved on to the next thing, as an answer of CPU + 1 or of the next task would be.
fn moved_on(truth: &Rows) -> Rows {
    let mut by_property: BTreeMap<&str, Vec<&String>> = BTreeMap::new();
    for key in truth.keys() {
        by_property.entry(key.rsplit(' ').next().unwrap()).or_default().push(key);
    }
    let mut moved = Rows::new();
    for keys in by_property.values() {
        for (key, next) in keys.iter().zip(keys.iter().cycle().skip(1)) {
            moved.insert((*key).clone(), truth[*next].clone());
        }
    }
    moved
}

/// Compares a family of answers in every case, and checks that wrong ones would have been seen.
fn compare(family: &str, least: usize, sides: &dyn Fn(&Case) -> (Rows, Rows)) {
    let mut all = Vec::new();
    for case in cases() {
        let (ours, theirs) = sides(case);
        eprintln!("{family}: {}: {} rows", case.name, theirs.len());
        assert!(theirs.len() >= least, "{}: only {} rows", case.name, theirs.len());
        all.extend(differences(&case.name, &ours, &theirs));
        let changed = moved_on(&ours);
        let wrong = differences(&case.name, &changed, &theirs).len();
        assert!(wrong * 10 > theirs.len(), "{}: answers of another thing are not seen: {wrong}", case.name);
    }
    let shown: Vec<&String> = all.iter().take(60).collect();
    assert!(all.is_empty(), "{family}: {} differences: {shown:#?}", all.len());
}

const POLICIES: [&str; 8] = ["NORMAL", "FIFO", "RR", "BATCH", "?", "IDLE", "DEADLINE", "EXT"];

#[test]
fn tasks_are_drgns() {
    compare("tasks", 1000, &|case| {
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for task in rows(&case.drgn["tasks"]) {
            let user = task["mm"].as_str().is_some_and(|mm| hex(mm) != 0);
            let pages = |rss: &Value| -> u64 {
                let parts = rss.as_object().unwrap();
                parts
                    .iter()
                    .filter(|(name, _)| ["file", "anon", "shmem"].contains(&name.as_str()))
                    .map(|(_, n)| n.as_u64().unwrap())
                    .sum()
            };
            put(
                &mut theirs,
                &format!("{} {}", text(&task["comm"]), text(&task["task"])),
                json!({
                    "pid": task["pid"], "tgid": task["tgid"], "ppid": task["ppid"], "comm": task["comm"],
                    "state": task["state"], "cpu": task["cpu"], "running": task["on_cpu"] == 1,
                    "mm": at(&task["mm"]), "stack": at(&task["stack"]), "kernel": task["kthread"],
                    "prio": task["prio"], "policy": POLICIES[task["policy"].as_u64().unwrap() as usize],
                    "start": task["start_time"], "utime": task["utime"], "stime": task["stime"],
                    "vsz": task["vsize"].as_u64().unwrap() / 1024,
                    "rss": if user { 4 * pages(&task["rss"]) } else { 0 },
                }),
            );
        }
        let times = case.ask("ps -t");
        for (task, times) in rows(&case.ask("ps")["tasks"]).zip(rows(&times["tasks"])) {
            assert_eq!(task["task"], times["task"]);
            put(
                &mut ours,
                &format!("{} {}", text(&task["comm"]), text(&task["task"])),
                json!({
                    "pid": task["pid"], "tgid": task["tgid"], "ppid": task["ppid"], "comm": task["comm"],
                    "state": task["state"], "cpu": task["cpu"], "running": task["running"],
                    "mm": at(&task["mm"]), "stack": at(&task["stack"]), "kernel": task["kernel"],
                    "prio": task["prio"], "policy": task["policy"],
                    "start": times["start_ns"], "utime": times["utime_ns"], "stime": times["stime_ns"],
                    "vsz": task["vsz_kib"], "rss": task["rss_kib"],
                }),
            );
        }
        // Reading each eight bytes on must be seen.
        let first = text(&case.drgn["tasks"][1]["task"]);
        let pid = |skip: u64| {
            let command = format!("struct task_struct.pid {:#x}", hex(first) + skip);
            case.ask(&command)["values"][0]["value"]["pid"].clone()
        };
        assert_eq!(pid(0), case.drgn["tasks"][1]["pid"], "{}", case.name);
        assert_ne!(pid(8), case.drgn["tasks"][1]["pid"], "{}", case.name);
        (ours, theirs)
    });
}

#[test]
fn members_of_tasks_are_drgns() {
    compare("members of tasks", 300, &|case| {
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for task in rows(&case.drgn["tasks"]) {
            let name = text(&task["task"]);
            let numbers = ["static_prio", "nvcsw", "nivcsw"];
            put(
                &mut theirs,
                name,
                json!({
                    "static_prio": task["static_prio"], "nvcsw": task["nvcsw"], "nivcsw": task["nivcsw"],
                    "flags": hex(text(&task["flags"])), "active_mm": at(&task["active_mm"]),
                }),
            );
            let said = case.ask(&format!("task -R {},flags,active_mm {name}", numbers.join(",")));
            let members = &said["tasks"][0]["members"];
            put(
                &mut ours,
                name,
                json!({
                    "static_prio": members["static_prio"], "nvcsw": members["nvcsw"], "nivcsw": members["nivcsw"],
                    "flags": members["flags"], "active_mm": at(&members["active_mm"]),
                }),
            );
        }
        (ours, theirs)
    });
}

#[test]
fn cpus_are_drgns() {
    compare("CPUs", 30, &|case| {
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        let kernel = case.machine.kernel().unwrap();
        let queues = case.ask("runq");
        let each = |expression: &str| case.ask(&format!("percpu {expression}"))["values"].clone();
        let switches = each("runqueues.nr_switches");
        let idle = each("runqueues.idle");
        for (i, cpu) in rows(&case.drgn["cpus"]).enumerate() {
            let name = format!("CPU {}", cpu["cpu"]);
            let mut fair: Vec<u64> = rows(&cpu["fair"]).map(|pid| pid.as_u64().unwrap()).collect();
            fair.retain(|pid| Some(*pid) != cpu["curr_pid"].as_u64());
            fair.sort();
            put(
                &mut theirs,
                &name,
                json!({
                    "offset": cpu["offset"], "rq": cpu["runqueues"], "curr": cpu["curr"], "pid": cpu["curr_pid"],
                    "comm": cpu["curr_comm"], "running": cpu["nr_running"], "clock": cpu["clock"],
                    "switches": cpu["nr_switches"], "idle": cpu["idle"], "online": cpu["online"], "fair": fair,
                }),
            );
            let queue = &queues["runqueues"][i];
            let current = &queue["current"];
            let offset = kernel.per_cpu_pointer(VirtAddr(0), CpuId(i as u32)).unwrap();
            let mut fair: Vec<u64> = rows(&queue["fair"]).map(|task| task["pid"].as_u64().unwrap()).collect();
            fair.retain(|pid| Some(*pid) != current["pid"].as_u64());
            fair.sort();
            put(
                &mut ours,
                &name,
                json!({
                    "offset": offset.to_string(), "rq": queue["rq"], "curr": current["task"], "pid": current["pid"],
                    "comm": current["comm"], "running": queue["running"], "clock": queue["clock_ns"],
                    "switches": switches[i]["value"], "idle": idle[i]["value"], "online": switches[i]["online"],
                    "fair": fair,
                }),
            );
        }
        (ours, theirs)
    });
}

#[test]
fn modules_are_drgns() {
    compare("modules", 200, &|case| {
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for module in rows(&case.drgn["modules"]) {
            let name = text(&module["name"]);
            let regions: BTreeMap<u64, &Value> = rows(&module["regions"])
                .filter(|region| region[1] != 0)
                .map(|region| (hex(text(&region[0])), &region[1]))
                .collect();
            let mut users: Vec<&str> = rows(&module["users"]).map(text).collect();
            users.sort();
            put(
                &mut theirs,
                name,
                json!({
                    "module": module["module"], "size": module["size"], "regions": json!(regions),
                    "refcount": module["refcount"], "build_id": module["build_id"], "users": users,
                    "taints": module["taints"],
                }),
            );
            for (section, address) in module["sections"].as_object().unwrap() {
                put(&mut theirs, &format!("{name} {section}"), json!({ "section": at(address) }));
            }
        }
        for module in rows(&case.ask("mod")["modules"]) {
            let name = text(&module["name"]);
            let regions: BTreeMap<u64, &Value> = rows(&module["regions"])
                .filter(|region| region["size"] != 0)
                .map(|region| (hex(text(&region["start"])), &region["size"]))
                .collect();
            let mut users: Vec<&str> = rows(&module["used_by"]).map(text).collect();
            users.sort();
            put(
                &mut ours,
                name,
                json!({
                    "module": module["module"], "size": module["size"], "regions": json!(regions),
                    "refcount": module["uses"], "build_id": module["build_id"], "users": users,
                    "taints": module["taints"],
                }),
            );
            for section in rows(&case.ask(&format!("mod -s {name}"))["sections"]) {
                put(
                    &mut ours,
                    &format!("{name} {}", text(&section["name"])),
                    json!({ "section": at(&section["at"]) }),
                );
            }
        }
        (ours, theirs)
    });
}

#[test]
fn log_is_drgns() {
    const LEVELS: [&str; 8] = ["emerg", "alert", "crit", "err", "warn", "notice", "info", "debug"];
    compare("log", 1000, &|case| {
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for (i, record) in rows(&case.drgn["log"]).enumerate() {
            let caller = match (&record["caller_tid"], &record["caller_cpu"]) {
                (Value::Number(tid), _) => json!(format!("T{tid}")),
                (_, Value::Number(cpu)) => json!(format!("C{cpu}")),
                _ => Value::Null,
            };
            put(
                &mut theirs,
                &format!("{i:05}"),
                json!({
                    "time": record["ts_nsec"], "text": record["text"], "facility": record["facility"],
                    "level": LEVELS[record["level"].as_u64().unwrap() as usize], "caller": caller,
                }),
            );
        }
        for (i, record) in rows(&case.ask("log")).enumerate() {
            put(
                &mut ours,
                &format!("{i:05}"),
                json!({
                    "time": record["ts_nsec"], "text": record["text"], "facility": record["facility"],
                    "level": record["level"], "caller": record["caller"],
                }),
            );
        }
        (ours, theirs)
    });
}

#[test]
fn mounts_are_drgns() {
    compare("mounts", 20, &|case| {
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for mount in rows(&case.drgn["mounts"]) {
            let properties = json!({
                "superblock": mount["superblock"], "type": mount["fstype"], "source": mount["devname"],
                "path": mount["path"],
            });
            put(&mut theirs, text(&mount["mount"]), properties);
        }
        for mount in rows(&case.ask("mount")["mounts"]) {
            let properties = json!({
                "superblock": mount["superblock"], "type": mount["type"], "source": mount["source"],
                "path": mount["path"],
            });
            put(&mut ours, text(&mount["mount"]), properties);
        }
        (ours, theirs)
    });
}

#[test]
fn open_files_are_drgns() {
    compare("open files", 100, &|case| {
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for (pid, files) in case.drgn["files"].as_object().unwrap() {
            // drgn names what has no directory by its filesystem ("[sockfs]"); the guest's own links have the names.
            let links = std::fs::read_to_string(case.set.dir.join(format!("facts/proc/{pid}/fd.txt")));
            let links = links.unwrap_or_default();
            // It also lists numbers that are taken and have no file yet, as in accept(); the guest has no such links.
            for file in rows(files).filter(|file| at(&file["file"]) != Value::Null) {
                let link = links.lines().find_map(|line| line.strip_prefix(&format!("{} ", file["fd"])));
                let path = match text(&file["path"]) {
                    name if name.starts_with('[') => json!(link),
                    _ => file["path"].clone(),
                };
                put(
                    &mut theirs,
                    &format!("{pid} {}", file["fd"]),
                    json!({ "file": file["file"], "inode": file["inode"], "ino": file["ino"], "path": path }),
                );
            }
            for file in rows(&case.ask(&format!("files {pid}"))["files"]) {
                put(
                    &mut ours,
                    &format!("{pid} {}", file["fd"]),
                    json!({ "file": file["file"], "inode": file["inode"], "ino": file["ino"], "path": file["path"] }),
                );
            }
        }
        (ours, theirs)
    });
}

#[test]
fn kernel_addresses_lead_where_drgn_says() {
    compare("translations", 100, &|case| {
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        for one in rows(&case.drgn["translations"]).filter(|one| one["pid"].is_null()) {
            let name = format!("{} {}", text(&one["kind"]), text(&one["virtual"]));
            if theirs.contains_key(&format!("{name} physical")) {
                continue;
            }
            put(&mut theirs, &name, json!({ "physical": at(&one["physical"]) }));
            let why = case.ask(&format!("why {}", text(&one["virtual"])));
            put(&mut ours, &name, json!({ "physical": at(&why["physical"]) }));
        }
        (ours, theirs)
    });
}

#[test]
fn user_memory_is_where_drgn_says() {
    const LENGTH: usize = 32;
    compare("user memory", 100, &|case| {
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        let truth = case.set.truth();
        // drgn does not follow PROT_NONE pages, whose present bit is clear; the program has said where it is.
        let memory = std::fs::read_to_string(case.set.dir.join("facts/planted/memory.txt")).unwrap();
        let unprotected = |at: u64| {
            let page = memory.lines().find_map(|line| line.strip_prefix("page name=protnone virtual="))?;
            let (start, physical) = page.split_once(" physical=").unwrap();
            (hex(start) == at).then(|| physical.to_owned())
        };
        let task_of: BTreeMap<u64, u64> = rows(&case.drgn["tasks"])
            .map(|task| (task["pid"].as_u64().unwrap(), hex(text(&task["task"]))))
            .collect();
        for one in rows(&case.drgn["translations"]).filter(|one| !one["pid"].is_null()) {
            let name = format!("{} {}", one["pid"], text(&one["virtual"]));
            let planted = unprotected(hex(text(&one["virtual"])));
            let said = match planted.as_deref().or(one["physical"].as_str()).map(hex) {
                Some(physical) if truth.contains(physical) => {
                    let mut bytes = [0; LENGTH];
                    let piece = truth.pieces.iter().find(|p| (p.start..p.end()).contains(&physical)).unwrap();
                    piece.read(physical, &mut bytes);
                    json!(bytes)
                }
                Some(_) => continue,
                None => Value::Null,
            };
            theirs.insert(format!("{name} bytes"), said);
            let task = VirtAddr(task_of[&one["pid"].as_u64().unwrap()]);
            let mut bytes = [0; LENGTH];
            let outcome = case.machine.read_as_task(task, VirtAddr(hex(text(&one["virtual"]))), &mut bytes);
            let read = if outcome.filled == LENGTH { json!(bytes) } else { Value::Null };
            ours.insert(format!("{name} bytes"), read);
        }
        (ours, theirs)
    });
}

/// Where crash's facts are there: it is slower than all else, so that nobody waits for it.
#[test]
fn tasks_and_modules_are_crashs() {
    for case in cases() {
        let dump = &case.set.dumps()[0].name;
        let name = case.set.name();
        if !lab::root().join(format!("referee-cache/{name}/{dump}.crash.json")).exists() {
            eprintln!("crash: {name}: not asked; scripts/lab referee {name} --who crash");
            continue;
        }
        let crash = referee(&name, dump, "crash");
        if !crash["refused"].is_null() {
            eprintln!("crash: {name}: refused: {}", crash["refused"]);
            continue;
        }
        let (mut ours, mut theirs) = (Rows::new(), Rows::new());
        let tasks = |side: &mut Rows, tasks: &Value, names: [&str; 5]| {
            let [running, kernel, vsz, rss, st] = names;
            for task in rows(tasks) {
                put(
                    side,
                    &format!("{} {}", text(&task["comm"]), text(&task["task"])),
                    json!({
                        "pid": task["pid"], "ppid": task["ppid"], "cpu": task["cpu"], "state": task[st],
                        "running": task[running], "kernel": task[kernel], "vsz": task[vsz], "rss": task[rss],
                    }),
                );
            }
        };
        tasks(&mut theirs, &crash["tasks"], ["active", "kthread", "vsz_kb", "rss_kb", "state"]);
        tasks(&mut ours, &case.ask("ps")["tasks"], ["running", "kernel", "vsz_kib", "rss_kib", "st"]);
        for (side, modules) in [(&mut theirs, &crash["modules"]), (&mut ours, &case.ask("mod")["modules"])] {
            for module in rows(modules) {
                let properties =
                    json!({ "module": module["module"], "base": module["base"], "size": module["size"] });
                put(side, text(&module["name"]), properties);
            }
        }
        eprintln!("crash: {}: {} rows", case.name, theirs.len());
        let differ = differences("crash", &ours, &theirs);
        assert!(differ.is_empty(), "{}: {differ:#?}", case.name);
        assert!(differences("crash", &moved_on(&ours), &theirs).len() * 10 > theirs.len(), "{}", case.name);
    }
}
