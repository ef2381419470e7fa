//! Real kernels: what kstub finds in a dump against what the guest said of itself while it ran.
//!
//! Truth is the guest's own `/proc`, its console, and the registers that its programs planted; never kstub.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::VirtAddr;
use kstub::arch::x86_64::{Reg, Saved};
use kstub::backend::Dump;
use kstub::debuginfo::find::Places;
use kstub::kernel::{Cpu, CpuId, Machine, Options};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::lab::{self, DumpFile, Set};

/// Registers that `spin-user` loads with a value of its own each.
const PLANTED: [&str; 18] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip", "fs_base", "gs_base",
];

fn open(dump: &DumpFile) -> Machine {
    let opened = Dump::open(&dump.path).unwrap_or_else(|e| panic!("{}: {e}", dump.path.display()));
    let beside = dump.path.parent().map(Path::to_owned);
    let options =
        Options { vmlinux: None, places: Places { beside, ..Places::default() }, ..Options::default() };
    Machine::open(Arc::new(opened), &options, &|_, _| ()).unwrap()
}

/// Calls `check` with each dump that kstub can decode; a set without one is an error.
fn for_each_dump(check: &mut dyn FnMut(&Set, &DumpFile, &Machine)) {
    let Some(sets) = lab::sets() else { return };
    for set in &sets {
        let readable = |d: &DumpFile| !matches!(d.compression.as_deref(), Some("lzo" | "snappy"));
        let dumps: Vec<_> =
            set.dumps().into_iter().filter(|d| readable(d) && d.complete && d.split.is_empty()).collect();
        assert!(!dumps.is_empty(), "{}", set.name());
        for dump in &dumps {
            eprintln!("{}/{}", set.name(), dump.name);
            check(set, dump, &open(dump));
        }
    }
}

fn facts(set: &Set, file: &str) -> String {
    let path = set.dir.join("facts").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Addresses of some symbols, by the guest's own `/proc/kallsyms`.
fn kallsyms(set: &Set) -> BTreeMap<String, u64> {
    let wanted = ["_text", "init_task", "linux_banner", "init_uts_ns", "swapper_pg_dir", "init_top_pgt"];
    let text = facts(set, "proc/kallsyms");
    let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    words
        .filter(|words| words.len() == 3 && wanted.contains(&words[2]))
        .map(|words| (words[2].to_owned(), u64::from_str_radix(words[0], 16).unwrap()))
        .collect()
}

fn number(set: &Set, key: &str) -> u32 {
    set.json[key].as_u64().unwrap_or_else(|| panic!("{}: no {key}", set.name())) as u32
}

#[test]
fn the_kernel_is_found_where_the_guest_says_it_is() {
    for_each_dump(&mut |set, dump, machine| {
        let what = format!("{}/{}", set.name(), dump.name);
        let kernel = machine.kernel().unwrap_or_else(|| panic!("{what}: {:?}", machine.problems()));
        let symbols = kallsyms(set);
        assert!(symbols.len() >= 4, "{what}: {symbols:x?}");
        assert_eq!(kernel.found().release, set.json["release"].as_str().unwrap(), "{what}");
        assert_eq!(u32::from(kernel.found().space.levels), number(set, "page_table_levels"), "{what}");
        assert_eq!(machine.text_base().map(|at| at.0), symbols.get("_text").copied(), "{what}");
        for (name, &at) in &symbols {
            assert_eq!(kernel.symbol(name), Some(VirtAddr(at)), "{what}: {name}");
        }
        assert_eq!(machine.cpus().len() as u32, number(set, "smp"), "{what}");
        assert_eq!(machine.problems(), Vec::<String>::new(), "{what}");
        // The banner in memory is what /proc/version says.
        let version = facts(set, "uname.txt");
        let release = version.split_whitespace().nth(2).unwrap();
        let mut banner = vec![0; 14 + release.len()];
        assert!(kernel.read(VirtAddr(symbols["linux_banner"]), &mut banner).stopped.is_none(), "{what}");
        assert_eq!(String::from_utf8(banner).unwrap(), format!("Linux version {release}"), "{what}");
    });
}

/// Compares the planted registers; the text names the first that differs.
fn compare(cpu: &Cpu, planted: &BTreeMap<String, String>) -> Result<(), String> {
    for name in PLANTED {
        let reg = Reg::ALL.into_iter().find(|reg| reg.name() == name).unwrap();
        let text = planted.get(name).ok_or_else(|| format!("{name} was not planted"))?;
        let want = u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        if cpu.regs.get(reg) != Saved::Known(want.into()) {
            return Err(format!("{name} is {:x?}, not {want:#x}", cpu.regs.get(reg)));
        }
    }
    Ok(())
}

#[test]
fn registers_belong_to_the_cpu_and_task_they_were_planted_on() {
    for_each_dump(&mut |set, dump, machine| {
        let what = format!("{}/{}", set.name(), dump.name);
        let cpu = |key| machine.cpu(CpuId(number(set, key))).unwrap();
        let (user, kernel) = (cpu("busy_user_cpu"), cpu("busy_kernel_cpu"));
        for (cpu, file) in [(user, "spin-user.txt"), (kernel, "spin-kernel.txt")] {
            let planted = set.planted(file).unwrap_or_else(|| panic!("{what}: {file}"));
            assert_eq!(cpu.comm.as_deref(), planted.get("comm").map(String::as_str), "{what}");
            assert_eq!(cpu.pid.map(|pid| pid.to_string()).as_ref(), planted.get("pid"), "{what}");
        }
        for other in
            machine.cpus().iter().filter(|cpu| cpu.comm.as_deref().is_some_and(|c| c.starts_with("swapper")))
        {
            assert_eq!((other.pid, &other.comm), (Some(0), &Some(format!("swapper/{}", other.id))), "{what}");
        }
        let planted = set.planted("spin-user.txt").unwrap();
        if user.notes.iter().any(|note| note == "offline") {
            // A panic without kdump stopped it in the kernel.
            assert_eq!(user.regs.in_user_mode(), Some(false), "{what}");
            return;
        }
        compare(user, &planted).unwrap_or_else(|why| panic!("{what}: {why}"));
        assert!(compare(kernel, &planted).is_err(), "{what}: a comparison with the wrong CPU must fail");
        // In the kernel gs is the per-CPU base: each CPU's own, and not the user's.
        let bases: Vec<_> = machine
            .cpus()
            .iter()
            .filter_map(|cpu| match cpu.regs.in_user_mode() {
                Some(false) => cpu.regs.u64(Reg::GsBase),
                _ => cpu.regs.u64(Reg::KGsBase),
            })
            .collect();
        let mut distinct = bases.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(
            (bases.len(), distinct.len()),
            (machine.cpus().len(), machine.cpus().len()),
            "{what}: {bases:x?}"
        );
        for reg in [Reg::Efer, Reg::Cr8, Reg::St0, Reg::Xmm0, Reg::Mxcsr] {
            assert!(
                machine.cpus().iter().all(|cpu| cpu.regs.get(reg) == Saved::NotSaved),
                "{what}: {}",
                reg.name()
            );
        }
    });
}

#[test]
fn a_panic_is_told_with_its_cpu_task_and_words() {
    let mut panics = 0;
    for_each_dump(&mut |set, dump, machine| {
        let what = format!("{}/{}", set.name(), dump.name);
        let failure = machine.kernel().unwrap().failure();
        let text = failure.as_ref().filter(|failure| failure.is_panic).map(|failure| failure.text.clone());
        let Some(panic) = set.json.get("panic").filter(|panic| panic.is_object()) else {
            assert_eq!(failure, None, "{what}");
            return;
        };
        panics += 1;
        let console = std::fs::read_to_string(set.dir.join("console.log")).unwrap();
        let line = console.lines().find(|l| l.contains("Kernel panic - not syncing")).unwrap();
        let words = &line[line.find("Kernel panic").unwrap()..];
        assert_eq!(text.as_deref(), Some(words.trim_end()), "{what}");
        let cpu = machine.cpu(machine.first_cpu()).unwrap();
        assert_eq!(u64::from(cpu.id.0), panic["cpu"].as_u64().unwrap(), "{what}");
        assert_eq!(cpu.pid.map(i64::from), panic["pid"].as_i64(), "{what}");
        assert_eq!(cpu.comm.as_deref(), panic["comm"].as_str(), "{what}");
        assert!(cpu.notes.contains(&"panicked here".to_owned()), "{what}: {:?}", cpu.notes);
    });
    assert!(lab::sets().is_none() || panics > 0, "the lab has no panic");
}

#[test]
fn the_log_is_what_dmesg_printed() {
    for_each_dump(&mut |set, dump, machine| {
        let what = format!("{}/{}", set.name(), dump.name);
        let log = machine.kernel().unwrap().log().unwrap_or_else(|e| panic!("{what}: {e}"));
        let lines: Vec<String> = log
            .iter()
            .flat_map(|r| {
                let (seconds, micros) = (r.ts_nsec / 1_000_000_000, r.ts_nsec / 1000 % 1_000_000);
                r.text
                    .lines()
                    .map(move |line| format!("[{seconds:5}.{micros:06}] {line}"))
                    .collect::<Vec<_>>()
            })
            .collect();
        let said = facts(set, "dmesg.txt");
        let said: Vec<&str> = said.lines().collect();
        assert!(said.len() > 100, "{what}");
        // The guest's log went on after dmesg printed it; until then they are the same lines.
        let same = said.iter().zip(&lines).take_while(|(a, b)| a.trim_end() == b.trim_end()).count();
        assert_eq!(same, said.len(), "{what}: dmesg has {:?}, kstub {:?}", said.get(same), lines.get(same));
    });
}

/// The static program that spins on the busy user CPU.
fn spin_program(set: &Set) -> PathBuf {
    let release = set.json["release"].as_str().unwrap();
    lab::root().join("initramfs").join(release).join("tree/bin/spin-user")
}

#[test]
fn user_memory_is_that_of_the_task_on_the_cpu() {
    for_each_dump(&mut |set, dump, machine| {
        let what = format!("{}/{}", set.name(), dump.name);
        let cpu = CpuId(number(set, "busy_user_cpu"));
        let planted = set.planted("spin-user.txt").unwrap();
        let rip = u64::from_str_radix(planted["rip"].trim_start_matches("0x"), 16).unwrap();
        let mut code = [0; 16];
        let read = machine.read_virt(cpu, VirtAddr(rip), &mut code);
        let file = std::fs::read(spin_program(set)).unwrap();
        match read.stopped {
            None => {
                // The program is linked at 0x400000 without moving: find its text by content.
                let at = file.windows(code.len()).position(|window| window == code);
                assert!(at.is_some(), "{what}: {code:x?} at {rip:#x} is not in the program");
                assert_eq!(at.unwrap() as u64 % 4096, rip % 4096, "{what}");
            }
            Some(error) => {
                // Program text is page cache: what the filter takes first.
                assert!(dump.filter_level.is_some_and(|level| level & 2 != 0), "{what}: {error}");
                assert!(error.to_string().contains("excluded"), "{what}: {error}");
            }
        }
        // The idle task has no user memory, and NULL is nobody's.
        for cpu in machine.cpus().iter().filter(|cpu| cpu.pid == Some(0)) {
            let read = machine.read_virt(cpu.id, VirtAddr(rip), &mut code);
            let error = read.stopped.unwrap_or_else(|| panic!("{what}: idle CPU {} has user memory", cpu.id));
            assert!(error.to_string().contains("kernel thread"), "{what}: {error}");
        }
        assert_eq!(
            machine.read_virt(cpu, VirtAddr(0), &mut code).filled,
            0,
            "{what}: a read at NULL must fault"
        );
    });
}
