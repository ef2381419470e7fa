//! Stock gdb on real dumps, by `kstub gdb`, against what the guest, its console and QEMU recorded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use support::gdb_session::{
    KSTUB, console_trace, functions, gdb, gdb_complains, gdb_session, has_in_order, kstub, session,
};
use support::lab::{self, Set};

/// One dump of each set: the compressed one where kstub reads it.
fn dump_of(set: &Set) -> PathBuf {
    let dumps = set.dumps();
    let of = |f: &dyn Fn(&lab::DumpFile) -> bool| {
        dumps.iter().find(|d| d.complete && f(d)).map(|d| d.path.clone())
    };
    of(&|d| d.compression.as_deref() == Some("zlib")).or_else(|| of(&|d| d.format == "elf")).unwrap()
}

fn sets() -> Vec<Set> {
    lab::sets().unwrap_or_default()
}

fn planted(set: &Set) -> BTreeMap<String, String> {
    set.planted("spin-user.txt").unwrap()
}

#[test]
fn threads_are_the_cpus_with_the_names_of_their_tasks() {
    for set in sets() {
        let name = set.name();
        let [threads, selected] = &gdb(&dump_of(&set), &["info threads", "thread"])[..] else { panic!() };
        let smp = set.json["smp"].as_u64().unwrap();
        for cpu in 0..smp {
            assert!(threads.contains(&format!("(CPU {cpu}, pid ")), "{name}: {threads}");
        }
        let busy = planted(&set);
        let cpu = &busy["cpu"];
        assert!(
            threads.contains(&format!("\"{}\" (CPU {cpu}, pid {}", busy["comm"], busy["pid"])),
            "{name}: {threads}"
        );
        let first = set.json["panic"]["cpu"].as_u64().unwrap_or(0);
        assert!(selected.contains(&format!("thread is {} (", first + 1)), "{name}: {selected}");
        assert_eq!(threads.contains("panicked here"), set.json["panic"].is_object(), "{name}: {threads}");
    }
}

#[test]
fn symbols_globals_and_code_are_at_their_run_time_addresses() {
    for set in sets() {
        let name = set.name();
        let kallsyms = std::fs::read_to_string(set.dir.join("facts/proc/kallsyms")).unwrap();
        let address = |symbol: &str| {
            let words = kallsyms.lines().map(|line| line.split(' ').collect::<Vec<_>>());
            words
                .filter(|w| w.get(2) == Some(&symbol))
                .map(|w| w[0].trim_start_matches('0').to_owned())
                .next()
                .unwrap()
        };
        let commands = [
            "p init_task.comm",
            "p &init_task",
            "p &init_mm",
            "p schedule",
            "x/2i schedule",
            "p linux_banner",
            "info line schedule",
        ];
        let [comm, task, mm, schedule, code, banner, line] = &gdb(&dump_of(&set), &commands)[..] else {
            panic!()
        };
        assert!(comm.contains("\"swapper"), "{name}: {comm}");
        assert!(task.contains(&format!("0x{} <init_task>", address("init_task"))), "{name}: {task}");
        assert!(mm.contains(&format!("0x{} <init_mm>", address("init_mm"))), "{name}: {mm}");
        assert!(schedule.contains(&format!("0x{} <schedule>", address("schedule"))), "{name}: {schedule}");
        assert!(code.contains("<schedule>:") && !code.contains("(bad)"), "{name}: {code}");
        assert!(
            banner.contains(&format!("Linux version {}", set.json["release"].as_str().unwrap())),
            "{name}: {banner}"
        );
        assert!(line.contains("kernel/sched/core.c"), "{name}: {line}");
    }
}

#[test]
fn the_backtrace_is_the_one_on_the_console_down_to_the_entry_code() {
    let mut panics = 0;
    let sets = sets();
    // The sets that end in a chain of contexts have a trace in several parts.
    let one_part = |set: &&Set| set.json["panic"].is_object() && set.json["chain"].is_null();
    for set in sets.iter().filter(one_part) {
        let expected = console_trace(&std::fs::read_to_string(set.dir.join("console.log")).unwrap());
        assert!(expected.len() >= 8, "{}: {expected:?}", set.name());
        let frames = functions(&gdb(&dump_of(set), &["bt"])[0]);
        // The console names a place behind the entry point, and so does gdb where it has no function there.
        let (entry, expected) = expected.split_last().unwrap();
        assert!(entry.starts_with("entry_SYSCALL_64"), "{}: {expected:?}", set.name());
        let [.., last, user] = &frames[..] else { panic!("{}: {frames:?}", set.name()) };
        assert!(last.starts_with("entry_SYSCALL_64") && user == "<user", "{}: {frames:?}", set.name());
        let mut expected = expected.to_vec();
        assert!(has_in_order(&frames, &expected), "{}: {frames:?} lacks some of {expected:?}", set.name());
        expected.swap(1, 2);
        assert!(!has_in_order(&frames, &expected), "a comparison with another trace must fail");
        panics += 1;
    }
    assert!(sets.is_empty() || panics > 0, "the lab has no panic");
}

#[test]
fn registers_of_every_cpu_are_qemus() {
    const NAMES: [&str; 17] = [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r12", "r15", "cs", "fs_base",
        "gs_base", "cr0", "cr2", "cr3",
    ];
    for set in sets() {
        let Some(truth) = set.registers() else { continue };
        let commands: Vec<String> = (1..=truth.len())
            .flat_map(|thread| {
                let prints = NAMES.map(|name| format!("p/x (unsigned long)${name}"));
                std::iter::once(format!("thread {thread}")).chain(prints).collect::<Vec<_>>()
            })
            .collect();
        let answers = gdb(&dump_of(&set), &commands.iter().map(String::as_str).collect::<Vec<_>>());
        let read = |cpu: usize, i: usize| {
            let text = answers[cpu * (NAMES.len() + 1) + 1 + i].trim();
            u64::from_str_radix(text.rsplit("0x").next().unwrap(), 16)
                .unwrap_or_else(|e| panic!("{text}: {e}"))
        };
        let mut differ = 0;
        for (cpu, want) in truth.iter().enumerate() {
            for (i, name) in NAMES.iter().enumerate() {
                assert_eq!(read(cpu, i), want[*name], "{}: {name} of CPU {cpu}", set.name());
                differ += usize::from(want[*name] != truth[(cpu + 1) % truth.len()][*name]);
            }
        }
        assert!(differ > truth.len(), "{}: registers of different CPUs must differ", set.name());
    }
}

#[test]
fn what_a_dump_lacks_is_unavailable() {
    for set in sets() {
        let answers = gdb(&dump_of(&set), &["p $efer", "p $cr8", "p $xmm0", "p $st0", "p $mxcsr"]);
        assert!(answers.iter().all(|a| a.contains("<unavailable>")), "{}: {answers:?}", set.name());
    }
}

#[test]
fn what_cannot_be_done_is_refused_in_words_and_the_session_goes_on() {
    for set in sets() {
        let dump = dump_of(&set);
        let name = set.name();
        assert!(gdb_complains(&dump, "x/2gx 0").contains("Cannot access memory at address 0x0"), "{name}");
        let (printed, said) = gdb_session(&dump, &["thread", "continue", "stepi", "thread", "monitor why 0"]);
        let [before, _, _, after, why] = &printed[..] else { panic!() };
        assert_eq!(
            said.matches("This is a crash dump").count()
                + printed.concat().matches("This is a crash dump").count(),
            2,
            "{name}: {said} {printed:?}"
        );
        assert_eq!(before, after, "{name}: the selected thread stays");
        let why = format!("{why}{said}");
        assert!(why.contains("not mapped") || why.contains("kernel thread"), "{name}: {why}");
        let said = gdb_complains(&dump, "set var init_task.pid = 4");
        assert!(said.contains("Cannot access memory"), "{name}: {said}");
        let said = gdb_complains(&dump, "set $rax = 5");
        assert!(said.contains("crash dump"), "{name}: {said}");
    }
}

#[test]
fn another_kernels_vmlinux_is_refused_with_both_build_ids_and_the_cure() {
    let sets = sets();
    let vmlinux = |set: &Set| lab::root().join(set.json["vmlinux"].as_str().unwrap());
    let Some(first) = sets.first() else { return };
    let other = sets.iter().find(|set| set.json["release"] != first.json["release"]).expect("two kernels");
    let dump = dump_of(first);
    let output = kstub(&["info", dump.to_str().unwrap(), "--vmlinux", vmlinux(other).to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{said}");
    for file in [vmlinux(first), vmlinux(other)] {
        let notes = Command::new("readelf").args(["-n"]).arg(&file).output().unwrap().stdout;
        let notes = String::from_utf8_lossy(&notes).into_owned();
        let id = notes.split("Build ID: ").nth(1).unwrap().split_whitespace().next().unwrap();
        assert!(said.contains(id), "no {id} in: {said}");
    }
    assert!(said.contains("--vmlinux FILE"), "{said}");
}

/// Beside a copy of the dump there is no vmlinux, and none is installed: registers, memory and the log still work.
#[test]
fn without_debug_info_registers_and_memory_still_work() {
    let sets = sets();
    let Some(set) = sets.iter().find(|set| set.registers().is_some()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let dump = dir.path().join("vmcore");
    std::os::unix::fs::symlink(dump_of(set), &dump).unwrap();
    let truth = &set.registers().unwrap()[0];
    let kallsyms = std::fs::read_to_string(set.dir.join("facts/proc/kallsyms")).unwrap();
    let banner = kallsyms.lines().find(|line| line.ends_with(" linux_banner")).unwrap();
    let banner = format!("x/s 0x{}", banner.split(' ').next().unwrap());
    // This user's kstub may remember where a vmlinux is.
    let mut kstub = Command::new(KSTUB);
    kstub.env("XDG_CACHE_HOME", dir.path()).env_remove("DEBUGINFOD_URLS").env_remove("KSTUB_DEBUG_DIR");
    let (printed, said) = session(&mut kstub, &dump, &["p/x $rip", &banner, "monitor info"]);
    let ([rip, text, _], info) = (&printed[..], format!("{said}{}", printed[2])) else { panic!() };
    assert!(rip.contains(&format!("{:#x}", truth["rip"])), "{rip}");
    assert!(text.contains("Linux version"), "{text}");
    assert!(info.contains("no vmlinux with debug info") && info.contains("--vmlinux"), "{info}");
}
