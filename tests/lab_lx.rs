//! The kernel's own gdb scripts (`scripts/gdb` of its source) on a dump, as kstub.py mends them, against what the guest
//! said of itself.
//!
//! They are looked for in `lx/linux-source-VERSION/scripts/gdb` of the lab, with the `constants.py` that a kernel build
//! makes (README, "The kernel's own gdb scripts"); without them the test is skipped.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use support::gdb_session::gdb;
use support::lab::{self, Set};

/// The scripts for each kernel series that the lab has, with the series: `6.1`.
fn scripts() -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(lab::root().join("lx")).into_iter().flatten();
    let found: Vec<(String, PathBuf)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let series = entry.file_name().to_str()?.strip_prefix("linux-source-")?.to_owned();
            let scripts = entry.path().join("scripts/gdb");
            scripts.join("linux/constants.py").exists().then_some((series, scripts))
        })
        .collect();
    if found.is_empty() {
        eprintln!("skipped: no scripts/gdb of a kernel in {}", lab::root().join("lx").display());
    }
    found
}

fn fact(set: &Set, name: &str) -> String {
    std::fs::read_to_string(set.dir.join("facts").join(name)).unwrap()
}

/// When timers end that the guest had and that never come due: `A-B`, of `expires at A-B nsecs`.
fn far_timers(text: &str) -> BTreeSet<&str> {
    let ends = text.lines().filter_map(|line| line.split_once("# expires at ")?.1.split(' ').next());
    ends.filter(|end| end.len() > 2 * "100000000000000".len()).collect()
}

fn session(dump: &Path, scripts: &Path, commands: &[&str]) -> Vec<String> {
    let path = format!("python sys.path.insert(0, '{}')", scripts.display());
    let source = format!("source {}", scripts.join("vmlinux-gdb.py").display());
    let printed = gdb(dump, &[&[path.as_str(), source.as_str()], commands].concat());
    printed.into_iter().skip(2).collect()
}

#[test]
fn per_cpu_helpers_timers_and_symbols() {
    for (series, scripts) in scripts() {
        let of_series = |set: &Set| {
            set.json["kind"] == "qemu"
                && set.json["release"].as_str().unwrap().starts_with(&format!("{series}."))
        };
        for set in lab::sets().unwrap_or_default().into_iter().filter(of_series) {
            let what = set.name();
            eprintln!("{what}");
            let dump = set.dumps()[0].path.clone();
            let busy = |name: &str| {
                (set.planted(name).unwrap()["cpu"].clone(), set.planted(name).unwrap()["pid"].clone())
            };
            let [user, kernel] = ["spin-user.txt", "spin-kernel.txt"].map(busy);
            let current = |cpu: &str| format!("p $lx_current({cpu}).pid");
            let said = session(
                &dump,
                &scripts,
                &[
                    "p $lx_per_cpu(\"runqueues\", 0).cpu",
                    "p $lx_per_cpu(\"runqueues\", 3).cpu",
                    &current(&user.0),
                    &current(&kernel.0),
                    "thread 3",
                    "p $lx_per_cpu(\"runqueues\").cpu",
                    "p $lx_current().pid",
                    "output &schedule",
                    "lx-symbols",
                    "output &schedule",
                    "lx-timerlist",
                ],
            );
            let value = |i: usize| said[i].rsplit(" = ").next().unwrap().to_owned();
            assert_eq!([value(0), value(1)], ["0", "3"], "{what}: {said:?}");
            assert_eq!([value(2), value(3)], [user.1.clone(), kernel.1.clone()], "{what}: {said:?}");
            assert_ne!(user.1, kernel.1);
            // gdb's third thread is CPU 2.
            assert_eq!([value(5), value(6)], ["2".to_owned(), kernel.1], "{what}: {said:?}");
            assert!(said[8].contains("nothing to load"), "{what}: {said:?}");
            assert!(said[7].contains("<schedule>") && said[7] == said[9], "{what}: {said:?}");
            let told = fact(&set, "proc/timer_list");
            let (wanted, found) = (far_timers(&told), far_timers(&said[10]));
            assert!(!wanted.is_empty(), "{what}: {told}");
            assert!(wanted.is_subset(&found), "{what}: {wanted:?}, gdb {found:?}");
        }
    }
}
