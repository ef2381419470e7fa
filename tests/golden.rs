//! Golden files: what each command prints on the committed sample, failing commands included.
//!
//! `KSTUB_BLESS=1 cargo test --test golden` rewrites them; look at the difference before committing it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use kstub::backend::Dump;
use kstub::command::{self, COMMANDS, Context, Focus, Form};
use kstub::debuginfo::find::Places;
use kstub::kernel::{Machine, Options};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

const SAMPLE: &str = "tests/data/sample";
const GOLDEN: &str = "tests/golden";
const BLESS: &str = "KSTUB_BLESS";

/// (golden file, arguments of kstub)
const PROGRAM: [(&str, &[&str]); 5] = [
    ("kstub-info", &["info", "tests/data/sample/vmcore"]),
    ("kstub-info-json", &["info", "--json", "tests/data/sample/vmcore"]),
    ("kstub-info-not-a-dump", &["info", "tests/data/sample/README.md"]),
    ("kstub-info-absent", &["info", "tests/data/sample/absent"]),
    (
        "kstub-info-bad-vmlinux",
        &["info", "tests/data/sample/vmcore", "--vmlinux", "tests/data/sample/facts.txt"],
    ),
];

/// (golden file, command line as after gdb's `monitor`); the CPU is the one that panicked.
const MONITOR: &[(&str, &str)] = &[
    ("files", "files 27"),
    ("files-nobody", "files 4711"),
    ("foreach", "foreach user set"),
    ("foreach-nothing", "foreach"),
    ("kmem-usage", "kmem -i"),
    ("kmem-zones", "kmem -z"),
    ("kmem-address", "kmem init_task"),
    ("kmem-nothing", "kmem -q"),
    ("page", "page init_task"),
    ("page-pfn", "page pfn:1000"),
    ("page-nowhere", "page phys:ffffffffff000"),
    ("qemu-none", "qemu info status"),
    ("dump-none", "dump /nowhere/vmcore"),
    ("vtop", "vtop init_task"),
    ("vtop-unmapped", "vtop 0"),
    ("log-options", "log -m -c -l warn+"),
    ("log-level", "log -l loud"),
    ("mod", "mod"),
    ("mount", "mount"),
    ("nmi", "nmi"),
    ("nmi-no-cpu", "nmi 99"),
    ("bt-text", "bt -t 1"),
    ("bt-saved", "bt -e 1"),
    ("bt-saved-cpus", "bt -E"),
    ("bt-user", "bt -u 1"),
    ("bt-user-kernel-thread", "bt -u 2"),
    ("bt-group", "bt --group"),
    ("bt-group-nothing", "bt --group nobody"),
    ("bt", "bt"),
    ("bt-all", "bt -a"),
    ("bt-task", "bt -s 1"),
    ("bt-why", "bt --why 2"),
    ("bt-words", "bt -F -c 0"),
    ("bt-lines", "bt -l -p"),
    ("bt-reference", "bt -R kthreadd -a"),
    ("bt-overflow", "bt -v"),
    ("bt-cpu", "bt -c 99"),
    ("bt-option", "bt -z"),
    ("ps", "ps"),
    ("ps-times", "ps -t kstub-sleep"),
    ("ps-parents", "ps -p 27"),
    ("ps-children", "ps -c 1"),
    ("ps-last-run", "ps -m -u"),
    ("ps-arguments", "ps -a kstub-spin"),
    ("ps-states", "ps -S"),
    ("ps-stacks", "ps -s -u"),
    ("ps-option", "ps -z"),
    ("runq", "runq"),
    ("runq-cpu", "runq -m -c 1"),
    ("runq-groups", "runq -g"),
    ("runq-lags", "runq -T"),
    ("set", "set"),
    ("set-task", "set 27"),
    ("set-panic", "set -p"),
    ("set-nobody", "set 4711"),
    ("sys", "sys"),
    ("task", "task 27"),
    ("task-members", "task -R se.vruntime,comm,nothing 27"),
    ("vm", "vm -v 26"),
    ("vm-kernel", "vm 2"),
    ("vm-flags", "vm -f 8100073"),
    ("help", "help"),
    ("help-why", "help why"),
    ("help-unknown", "help frobnicate"),
    ("info", "info"),
    ("log", "log"),
    ("log-argument", "log now"),
    ("regs", "regs"),
    ("regs-other-cpu", "regs 0"),
    ("why-symbol", "why init_task"),
    ("why-symbol-offset", "why linux_banner+0x10"),
    ("why-register", "why $rsp"),
    ("why-not-saved", "why $efer"),
    ("why-null", "why 0"),
    ("why-not-canonical", "why 8000000000000000"),
    ("why-physical", "why phys:0"),
    ("why-not-ram", "why phys:f00000000"),
    ("why-nothing", "why"),
    ("why-nonsense", "why on-earth"),
    ("unknown", "frobnicate"),
    ("p", "p init_task.comm"),
    ("p-hex", "p -x init_task.flags"),
    ("p-pointer", "p &init_task.tasks"),
    ("p-structure", "p init_task.tasks"),
    ("p-arithmetic", "p sizeof(struct list_head) * 3 - 0x10"),
    ("p-per-cpu", "p runqueues"),
    ("p-per-cpu-member", "p runqueues:a.cpu"),
    ("p-register", "p -x $rip"),
    ("p-null", "p *(struct list_head *)0"),
    ("p-no-symbol", "p no_such_thing"),
    ("p-no-member", "p init_task.no_such_member"),
    ("p-incomplete", "p 1 +"),
    ("p-call", "p schedule()"),
    ("p-no-cpu", "p runqueues:9.cpu"),
    ("struct", "struct list_head"),
    ("struct-offsets", "struct -o list_head"),
    ("struct-value", "struct list_head modules"),
    ("struct-members", "struct task_struct.pid,comm init_task"),
    ("struct-per-cpu", "struct rq.cpu,nr_running runqueues:a"),
    ("struct-count", "struct list_head super_blocks 2"),
    ("struct-star", "*list_head init_task.tasks"),
    ("struct-unknown", "struct no_such_struct"),
    ("struct-no-member", "struct list_head.first"),
    ("struct-nothing", "struct"),
    ("union", "union sigval"),
    ("whatis", "whatis atomic_t"),
    ("whatis-variable", "whatis jiffies"),
    ("whatis-enum", "whatis enum pid_type"),
    ("whatis-expression", "whatis init_task.comm[0]"),
    ("percpu", "percpu runqueues.cpu"),
    ("percpu-one", "percpu runqueues.curr 1"),
    ("percpu-none", "percpu init_task.pid"),
    ("rd", "rd linux_banner 4"),
    ("rd-bytes", "rd -8 linux_banner 20"),
    ("rd-words", "rd -32 -x linux_banner 6"),
    ("rd-text", "rd -a linux_banner"),
    ("rd-symbols", "rd -s $rsp 6"),
    ("rd-decimal", "rd -d init_task 2"),
    ("rd-unreadable", "rd 0 4"),
    ("rd-option", "rd -z 0"),
    ("sym", "sym schedule"),
    ("sym-address", "sym linux_banner+0x5"),
    ("sym-query", "sym -q vmalloc_base"),
    ("sym-nothing", "sym 0"),
    ("list", "list task_struct.tasks -s task_struct.pid,comm -h init_task"),
    ("list-unreadable", "list 0"),
    ("tree", "tree vmap_area_root"),
    ("tree-xarray", "tree -t xarray init_pid_ns.idr"),
    ("tree-type", "tree -t oak 0"),
    ("dis", "dis schedule 6"),
    ("dis-to", "dis -r schedule+0x10"),
    ("dis-intel", "dis -i schedule 4"),
    ("dis-unreadable", "dis 0"),
];

/// What the program prints, with its exit code.
fn program(arguments: &[&str]) -> String {
    // No other vmlinux of this build-id: neither one used before nor a server's.
    let cache = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kstub"));
    command.env("XDG_CACHE_HOME", cache.path()).env_remove("DEBUGINFOD_URLS").env_remove("RUST_LOG");
    let output = command.args(arguments).output().unwrap();
    let mut text = format!("$ kstub {}\n", arguments.join(" "));
    text.push_str(&String::from_utf8(output.stdout).unwrap());
    text.push_str(&String::from_utf8(output.stderr).unwrap());
    let _ = writeln!(text, "[exit code {}]", output.status.code().unwrap());
    text
}

/// What a command answers: text, then JSON.
fn monitor(machine: &Machine, line: &str) -> String {
    let mut text = format!("(gdb) monitor {line}\n");
    match command::run(
        &Context {
            machine,
            cpu: machine.first_cpu(),
            task: None,
            focus: &Focus::default(),
            form: Form::Both,
        },
        line,
    ) {
        Ok(output) => {
            let _ = write!(text, "{}[json]\n{:#}\n", output.text, output.json);
        }
        Err(error) => {
            let _ = writeln!(text, "{error}\n[failed]");
        }
    }
    text
}

/// Every golden file's name and what is printed today.
fn outputs() -> BTreeMap<String, String> {
    let places = Places { beside: Some(SAMPLE.into()), ..Places::default() };
    let options = Options { places, ..Options::default() };
    let dump = Arc::new(Dump::open(&Path::new(SAMPLE).join("vmcore")).unwrap());
    let machine = Machine::open(dump, &options, &|_, _| ()).unwrap();
    let programs = PROGRAM.iter().map(|(name, arguments)| (format!("{name}.txt"), program(arguments)));
    let monitors =
        MONITOR.iter().map(|(name, line)| (format!("monitor-{name}.txt"), monitor(&machine, line)));
    programs.chain(monitors).collect()
}

/// The lines that differ, in order: `-` golden, `+` today.
fn difference(golden: &str, today: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (golden.lines().collect(), today.lines().collect());
    // common[i][j]: the longest common subsequence of old[i..] and new[j..].
    let mut common = vec![vec![0; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] = match old[i] == new[j] {
                true => common[i + 1][j + 1] + 1,
                false => common[i + 1][j].max(common[i][j + 1]),
            };
        }
    }
    let (mut i, mut j, mut text) = (0, 0, String::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || i < old.len() && common[i + 1][j] >= common[i][j + 1] {
            let _ = writeln!(text, "-{}", old[i]);
            i += 1;
        } else {
            let _ = writeln!(text, "+{}", new[j]);
            j += 1;
        }
    }
    text
}

/// `None` if both are the same; else what to show, and what to do.
fn complaint(name: &str, golden: Option<&str>, today: &str) -> Option<String> {
    if golden == Some(today) {
        return None;
    }
    let lines = difference(golden.unwrap_or_default(), today);
    Some(format!("{GOLDEN}/{name} is not what is printed today (-golden, +today):\n{lines}"))
}

#[test]
fn output_is_the_golden_files() {
    let outputs = outputs();
    if std::env::var(BLESS).as_deref() == Ok("1") {
        std::fs::create_dir_all(GOLDEN).unwrap();
        for stale in stale(&outputs) {
            std::fs::remove_file(stale).unwrap();
        }
        for (name, today) in &outputs {
            std::fs::write(Path::new(GOLDEN).join(name), today).unwrap();
        }
        return;
    }
    let mut complaints: Vec<String> = outputs
        .iter()
        .filter_map(|(name, today)| {
            let golden = std::fs::read_to_string(Path::new(GOLDEN).join(name)).ok();
            complaint(name, golden.as_deref(), today)
        })
        .collect();
    complaints
        .extend(stale(&outputs).iter().map(|path| format!("{} has no command any more", path.display())));
    assert!(
        complaints.is_empty(),
        "{}\nIf this is as it should be: {BLESS}=1 cargo test --test golden",
        complaints.join("\n")
    );
}

/// Golden files that nothing prints.
fn stale(outputs: &BTreeMap<String, String>) -> Vec<PathBuf> {
    let files = std::fs::read_dir(GOLDEN).into_iter().flatten().map(|entry| entry.unwrap().path());
    files.filter(|path| !outputs.contains_key(path.file_name().unwrap().to_str().unwrap())).collect()
}

#[test]
fn every_command_has_a_golden_success() {
    let outputs = outputs();
    // A dump has no QEMU behind it; what it answers on a guest is for the tests of guests.
    for command in COMMANDS.iter().filter(|command| !["dump", "qemu"].contains(&command.name)) {
        let asked = |text: &&String| {
            text.starts_with(&format!("(gdb) monitor {}", command.name)) && !text.ends_with("[failed]\n")
        };
        assert!(outputs.values().any(|text| asked(&text)), "no golden file of '{}'", command.name);
    }
}

#[test]
fn golden_files_name_no_machine() {
    let here = std::env::current_dir().unwrap();
    for (name, text) in outputs() {
        assert!(!text.contains(here.to_str().unwrap()), "{name} names {}", here.display());
    }
}

#[test]
fn a_changed_character_a_missing_and_an_empty_file_are_told_with_the_cure() {
    assert_eq!(complaint("x.txt", Some("a\nb\nc\n"), "a\nb\nc\n"), None);
    let said = complaint("x.txt", Some("a\nb\nc\n"), "a\nB\nc\n").unwrap();
    assert!(said.ends_with(":\n-b\n+B\n"), "{said}");
    assert!(complaint("x.txt", None, "a\n").unwrap().ends_with("+a\n"));
    assert!(complaint("x.txt", Some("a\n"), "").unwrap().ends_with("-a\n"));
    assert!(complaint("x.txt", Some("a"), "a\n").is_some(), "the last newline counts");
}
