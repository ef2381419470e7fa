//! A guest of ten thousand tasks, against what the guest said of itself: every task is listed, each is a thread of
//! gdb's, and what waits for a CPU is in the queue of its group. Times are printed and not tested.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use support::gdb_session::KSTUB;
use support::lab::{self, Set};

/// A task as `/proc/PID/task/TID/stat` has it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Told {
    pid: i64,
    comm: String,
    parent: i64,
}

/// The tasks that the guest listed, without those that came and went with the listing.
fn told(set: &Set) -> BTreeSet<Told> {
    let text = std::fs::read_to_string(set.dir.join("facts/stat.txt")).unwrap();
    let task = |line: &str| {
        let (pid, rest) = line.split_once(" (")?;
        let (comm, rest) = rest.rsplit_once(") ")?;
        let parent = rest.split(' ').nth(1)?.parse().ok()?;
        Some(Told { pid: pid.parse().ok()?, comm: comm.to_owned(), parent })
    };
    text.lines()
        .filter_map(task)
        .filter(|task| task.comm.starts_with("crowd-") || task.comm == "busy")
        .collect()
}

fn listed(rows: &[Value], first: usize) -> BTreeSet<Told> {
    let task = |row: &Value| {
        Some(Told {
            pid: row["pid"].as_i64()?,
            comm: row["comm"].as_str()?.to_owned(),
            parent: row["ppid"].as_i64()?,
        })
    };
    let tasks = rows.iter().skip(first).filter_map(task);
    tasks.filter(|task| task.comm.starts_with("crowd-") || task.comm == "busy").collect()
}

fn dumps(set: &Set) -> Vec<PathBuf> {
    set.dumps().into_iter().map(|dump| dump.path).collect()
}

/// What a command answers, and how long it took from the start.
fn ask(dump: &Path, line: &str) -> Value {
    let began = Instant::now();
    let output = Command::new(KSTUB).args(["run", "--json"]).arg(dump).arg(line).output().unwrap();
    eprintln!("{}: {line} in {:?}", dump.display(), began.elapsed());
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(answer["error"].is_null(), "{line}: {answer}");
    answer["result"].clone()
}

/// What gdb prints, with every task as a thread.
fn gdb(gdb: &Path, dump: &Path, threads: &str, commands: &[&str]) -> String {
    let began = Instant::now();
    let mut kstub = Command::new(KSTUB);
    kstub.env_remove("DEBUGINFOD_URLS").arg("gdb").arg(dump).arg("--gdb").arg(gdb);
    kstub.args(["--threads", threads, "--", "-nx", "-batch", "-ex", "set width 0"]);
    for command in commands {
        kstub.args(["-ex", command]);
    }
    let output = kstub.output().unwrap();
    eprintln!("{}: {threads}: {commands:?} in {:?}", gdb.display(), began.elapsed());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", gdb.display());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The system's gdb, and the lab's newer one.
fn gdbs() -> Vec<PathBuf> {
    let newest = lab::root().join("tools/bin/gdb-new");
    [PathBuf::from("gdb")].into_iter().chain(newest.exists().then_some(newest)).collect()
}

/// How many tasks the guest made.
fn made(set: &Set) -> usize {
    let planted = set.planted("crowd.txt").unwrap();
    planted["processes"].parse::<usize>().unwrap() * planted["threads"].parse::<usize>().unwrap()
}

#[test]
fn every_task_is_listed() {
    let Some(set) = lab::crowd() else { return };
    let told = told(&set);
    assert_eq!(told.iter().filter(|task| task.comm.starts_with("crowd-")).count(), made(&set));
    assert!(made(&set) >= 10_000);
    for dump in dumps(&set) {
        let answer = ask(&dump, "ps");
        let rows = answer["tasks"].as_array().unwrap();
        assert_eq!(listed(rows, 0), told, "{}", dump.display());
        assert_ne!(listed(rows, rows.len() / 2), told, "half of them are not all");
        assert_eq!(answer["problems"], serde_json::json!([]), "{}", dump.display());
        let sleep = rows.iter().filter(|row| row["comm"].as_str().unwrap().starts_with("crowd-"));
        assert!(sleep.clone().all(|row| row["state"] == "S"), "{}", dump.display());
        // What each waits in follows from the number in its name.
        let last = sleep.map(|row| row["pid"].as_i64().unwrap()).max().unwrap();
        assert_eq!(ask(&dump, &format!("task {last}"))["tasks"][0]["pid"], last);
    }
}

#[test]
fn every_task_is_a_thread() {
    let Some(set) = lab::crowd() else { return };
    let told = told(&set);
    let dump = &dumps(&set)[0];
    for program in gdbs() {
        for threads in ["tasks", "all"] {
            let printed = gdb(&program, dump, threads, &["info threads"]);
            let names = |line: &str| {
                let (thread, rest) = line.split_once("Thread 1.1")?.1.split_once(" \"")?;
                Some((
                    thread.trim_start_matches('0').parse::<i64>().ok()?,
                    rest.split_once('"')?.0.to_owned(),
                ))
            };
            let found: BTreeSet<(i64, String)> =
                printed.lines().filter_map(names).filter(|(_, comm)| comm.starts_with("crowd-")).collect();
            let wanted: BTreeSet<(i64, String)> = told
                .iter()
                .filter(|task| task.comm.starts_with("crowd-"))
                .map(|task| (task.pid, task.comm.clone()))
                .collect();
            assert_eq!(found, wanted, "{} {threads}", program.display());
            let shifted: BTreeSet<_> = wanted.iter().map(|(pid, comm)| (pid + 1, comm.clone())).collect();
            assert_ne!(found, shifted);
        }
        // By its number each sleeps in the way that it was given.
        for (comm, function) in [
            ("crowd-500-4", "__do_sys_pause"),
            ("crowd-500-5", "hrtimer_nanosleep"),
            ("crowd-999-6", "pipe_read"),
            ("crowd-0-3", "futex_wait"),
        ] {
            let task = told.iter().find(|task| task.comm == comm).unwrap();
            let select = format!(
                "python gdb.selected_inferior().threads(); [t.switch() for t in gdb.selected_inferior().threads() if t.ptid[1] == {}]",
                1_000_000_000 + task.pid
            );
            let printed = gdb(&program, dump, "tasks", &[&select, "bt"]);
            assert!(printed.contains(function), "{comm}: {printed}");
            let others = ["__do_sys_pause", "hrtimer_nanosleep", "pipe_read", "futex_wait"];
            let other = others.into_iter().filter(|other| *other != function && printed.contains(other));
            assert_eq!(other.count(), 0, "{comm}: {printed}");
        }
        let printed = gdb(&program, dump, "cpus", &["info os tasks"]);
        let rows = printed.lines().filter(|line| line.contains(" crowd-"));
        assert_eq!(rows.count(), made(&set), "{}", program.display());
    }
}

#[test]
fn what_waits_is_in_the_queue_of_its_group() {
    let Some(set) = lab::crowd() else { return };
    let text = std::fs::read_to_string(set.dir.join("facts/planted/busy.txt")).unwrap();
    let busy: Vec<BTreeMap<&str, &str>> =
        text.lines().map(|line| line.split(' ').filter_map(|word| word.split_once('=')).collect()).collect();
    assert!(busy.len() >= 6);
    for dump in dumps(&set) {
        let answer = ask(&dump, "runq");
        let queues = answer["runqueues"].as_array().unwrap();
        let mut waiting = 0;
        for one in &busy {
            let pid: i64 = one["busy"].parse().unwrap();
            let cpu: usize = one["cpu"].parse().unwrap();
            if queues[cpu]["current"]["pid"] == pid {
                continue;
            }
            let groups = queues[cpu]["groups"].as_array().unwrap();
            let has =
                |group: &&Value| group["tasks"].as_array().unwrap().iter().any(|task| task["pid"] == pid);
            let own: Vec<&Value> = groups.iter().filter(has).collect();
            let [own] = own.as_slice() else { panic!("{pid} waits in {own:?}: {groups:?}") };
            match one.get("group") {
                Some(path) => {
                    assert_eq!((&own["name"], &own["class"]), (&(*path).into(), &"fair".into()), "{pid}");
                    // /outer/inner is in /outer, and that in the CPU's own.
                    assert_eq!(own["depth"].as_u64(), Some(path.matches('/').count() as u64), "{pid}");
                }
                None => assert_eq!(own["class"], "real_time", "{pid}: {own}"),
            }
            waiting += 1;
        }
        // One of each CPU's runs.
        assert!(waiting >= busy.len() - 2, "{waiting}");
        let lags: Vec<u64> = ask(&dump, "runq -T")["runqueues"]
            .as_array()
            .unwrap()
            .iter()
            .map(|queue| queue["behind_ns"].as_u64().unwrap())
            .collect();
        let clocks: Vec<u64> = queues.iter().map(|queue| queue["clock_ns"].as_u64().unwrap()).collect();
        let latest = clocks.iter().max().unwrap();
        assert_eq!(lags, clocks.iter().map(|clock| latest - clock).collect::<Vec<_>>());
    }
}
