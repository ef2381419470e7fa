//! The committed sample: a small kernel's panic, on any machine, without network and lab.
//!
//! Truth is what QEMU, the kernel's console and the guest's own program recorded at the dump; never kstub.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::{PhysAddr, VirtAddr};
use kstub::arch::x86_64::{Reg, Saved};
use kstub::backend::Dump;
use kstub::debuginfo::find::Places;
use kstub::kernel::{CpuId, Machine, Options};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use support::gdb_session::{console_trace, functions, gdb, gdb_complains, has_in_order};
use support::lab::parse_info_registers;

const SAMPLE: &str = "tests/data/sample";
const CPUS: usize = 2;
/// As the recipe gives to the guest.
const RAM: u64 = 64 << 20;

fn file(name: &str) -> PathBuf {
    Path::new(SAMPLE).join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(file(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn open_at(dump: &Path) -> Machine {
    let places = Places { beside: Some(SAMPLE.into()), ..Places::default() };
    let options = Options { places, ..Options::default() };
    Machine::open(Arc::new(Dump::open(dump).unwrap()), &options, &|_, _| ()).unwrap()
}

fn open() -> Machine {
    open_at(&file("vmcore"))
}

/// What the guest's program printed on the console.
fn facts() -> BTreeMap<String, String> {
    let text = text("facts.txt");
    text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
}

fn number(facts: &BTreeMap<String, String>, key: &str) -> u64 {
    let text = &facts[key];
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
        None => text.parse().unwrap(),
    }
}

/// Whether the tests that start gdb run; CI must have one.
fn has_gdb() -> bool {
    let there = Command::new("gdb").arg("--version").output().is_ok_and(|output| output.status.success());
    if !there {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "no gdb: install it");
        eprintln!("skipped: no gdb");
    }
    there
}

#[test]
fn the_kernel_is_where_its_own_kallsyms_say() {
    let (machine, facts) = (open(), facts());
    assert_eq!(machine.problems(), Vec::<String>::new());
    let kernel = machine.kernel().unwrap();
    let banner = text("console.log");
    let release = banner.split("Linux version ").nth(1).unwrap().split(' ').next().unwrap();
    assert_eq!(kernel.found().release, release);
    assert_ne!(kernel.found().kaslr_offset, 0);
    assert_eq!(machine.text_base(), Some(VirtAddr(number(&facts, "kallsyms._text"))));
    let symbols: Vec<_> =
        facts.keys().filter_map(|key| Some((key, key.strip_prefix("kallsyms.")?))).collect();
    assert!(symbols.len() >= 15, "{symbols:?}");
    for (key, name) in symbols {
        // A per-CPU variable's address is an offset: KASLR leaves it alone, kstub's slide does not.
        if name != "runqueues" {
            assert_eq!(kernel.symbol(name), Some(VirtAddr(number(&facts, key))), "{name}");
        }
    }
}

#[test]
fn the_panic_is_told_with_its_cpu_task_and_words() {
    let (machine, facts) = (open(), facts());
    let crash = machine.cpu(machine.first_cpu()).unwrap();
    assert_eq!(u64::from(crash.id.0), number(&facts, "crash.cpu"));
    assert_eq!(crash.pid.map(|pid| pid as u64), Some(number(&facts, "crash.pid")));
    assert_eq!(crash.comm.as_deref(), Some("kstub-crash"));
    assert!(crash.notes.contains(&"panicked here".to_owned()), "{:?}", crash.notes);
    let spin = machine.cpu(CpuId(0)).unwrap();
    assert_eq!(spin.comm.as_deref(), Some("kstub-spin"));
    assert_eq!(spin.pid.map(|pid| pid as u64), Some(number(&facts, "spin.pid")));
    let failure = machine.kernel().unwrap().failure().unwrap();
    assert!(failure.is_panic);
    assert_eq!(failure.text, "Kernel panic - not syncing: sysrq triggered crash");
}

#[test]
fn the_log_is_what_the_console_printed() {
    let log = open().kernel().unwrap().log().unwrap();
    let lines = log.iter().flat_map(|r| {
        let (seconds, micros) = (r.ts_nsec / 1_000_000_000, r.ts_nsec / 1000 % 1_000_000);
        let line = move |line: &str| format!("[{seconds:5}.{micros:06}] {}", line.trim_end());
        r.text.lines().map(line).collect::<Vec<_>>()
    });
    let console = text("console.log");
    let console: Vec<&str> = console.lines().filter(|line| !line.is_empty()).collect();
    assert!(console.len() > 50);
    assert_eq!(lines.collect::<Vec<_>>(), console);
}

/// Registers of a CPU that differ from what QEMU printed.
fn differences(machine: &Machine, cpu: u32, want: &BTreeMap<String, u64>) -> Vec<&'static str> {
    let cpu = machine.cpu(CpuId(cpu)).unwrap();
    let known = Reg::ALL.into_iter().filter_map(|reg| Some((reg, *want.get(reg.name())?)));
    // A dump has no efer, so there is nothing to compare.
    let known = known.filter(|(reg, _)| *reg != Reg::Efer);
    known
        .filter(|(reg, value)| cpu.regs.get(*reg) != Saved::Known((*value).into()))
        .map(|(reg, _)| reg.name())
        .collect()
}

#[test]
fn registers_of_every_cpu_are_qemus() {
    let (machine, truth) = (open(), parse_info_registers(&text("registers.txt")));
    assert_eq!((machine.cpus().len(), truth.len()), (CPUS, CPUS));
    for (cpu, want) in (0..).zip(&truth) {
        assert!(want.len() > 25, "{want:?}");
        assert_eq!(differences(&machine, cpu, want), Vec::<&str>::new(), "CPU {cpu}");
        assert!(differences(&machine, 1 - cpu, want).len() > 8, "another CPU's registers must differ");
        for reg in [Reg::Efer, Reg::Cr8, Reg::St0, Reg::Xmm0] {
            assert_eq!(machine.cpu(CpuId(cpu)).unwrap().regs.get(reg), Saved::NotSaved, "{}", reg.name());
        }
    }
}

#[test]
fn user_memory_is_that_of_the_task_on_the_cpu() {
    let (machine, facts) = (open(), facts());
    let want = facts["string.text"].as_bytes();
    let read = |cpu| {
        let mut got = vec![0; want.len()];
        let read = machine.read_virt(CpuId(cpu), VirtAddr(number(&facts, "string.address")), &mut got);
        (got, read.stopped.map(|error| error.to_string()))
    };
    assert_eq!(read(0), (want.to_vec(), None));
    assert_ne!(read(1).0, want, "the same address of another task is another page");
    let mut got = vec![0; want.len()];
    let physical = PhysAddr(number(&facts, "string.physical"));
    assert!(machine.backend().read_phys(physical, &mut got).stopped.is_none());
    assert_eq!(got, want);
}

/// Every page of the dump: its bytes, or why there are none.
fn pages(machine: &Machine) -> Vec<Result<Vec<u8>, &'static str>> {
    let page = |at| {
        let mut bytes = vec![0; 4096];
        match machine.backend().read_phys(PhysAddr(at), &mut bytes).stopped {
            None => Ok(bytes),
            Some(error) => Err(error.why.kind()),
        }
    };
    (0..RAM / 4096).map(|pfn| page(pfn * 4096)).collect()
}

/// Flips one byte in the dump's data: one page must turn corrupt, and all others stay what they were.
#[test]
fn one_damaged_byte_costs_one_page_and_is_told() {
    let whole = pages(&open());
    assert!(whole.iter().filter(|page| page.is_ok()).count() > 1000);
    let mut bytes = std::fs::read(file("vmcore")).unwrap();
    let at = bytes.len() * 3 / 4;
    bytes[at] ^= 0x10;
    let damaged = support::TempFile::new(&bytes);
    let damaged = pages(&open_at(damaged.path()));
    let changed: Vec<_> =
        whole.iter().zip(&damaged).filter(|(a, b)| a != b).map(|(_, b)| b.clone()).collect();
    assert_eq!(changed, [Err("corrupt")]);
}

#[test]
fn gdb_shows_the_panic() {
    if !has_gdb() {
        return;
    }
    let commands = ["info threads", "thread", "bt"];
    let [threads, selected, bt] = &gdb(&file("vmcore"), &commands)[..] else { panic!() };
    for name in ["\"kstub-spin\" (CPU 0, pid ", "\"kstub-crash\" (CPU 1, pid "] {
        assert!(threads.contains(name), "no {name} in {threads}");
    }
    assert!(threads.contains("panicked here") && selected.contains("thread is 2 ("), "{threads}\n{selected}");
    let mut expected = console_trace(&text("console.log"));
    assert!(expected.len() >= 8, "{expected:?}");
    let frames = functions(bt);
    assert_eq!(frames.last().unwrap(), "<user", "{bt}");
    assert!(has_in_order(&frames, &expected), "{frames:?} lacks some of {expected:?}");
    assert!(bt.contains("kernel/panic.c:") && bt.contains("drivers/tty/sysrq.c:"), "{bt}");
    expected.swap(1, 2);
    assert!(!has_in_order(&frames, &expected), "a comparison with another trace must fail");
}

#[test]
fn gdb_has_symbols_types_lines_and_code() {
    if !has_gdb() {
        return;
    }
    let facts = facts();
    let string = format!("x/s {}", facts["string.address"]);
    let commands = [
        "p init_task.comm",
        "p &init_task",
        "info line schedule",
        "ptype struct task_struct",
        "x/i $pc",
        "x/2i schedule",
        "p linux_banner",
        "thread 1",
        &string,
        "bt",
        "info registers rip cr3",
    ];
    let answers = gdb(&file("vmcore"), &commands);
    let [comm, task, line, types, pc, code, banner, _, string, spin, registers] = &answers[..] else {
        panic!()
    };
    assert!(comm.contains("\"swapper"), "{comm}");
    assert!(task.contains(&format!("{} <init_task>", facts["kallsyms.init_task"])), "{task}");
    assert!(line.contains("\"kernel/sched/core.c\""), "{line}");
    assert!(types.contains("struct mm_struct *mm;") && types.contains("char comm[16];"), "{types}");
    assert!(pc.contains("=> 0xffff") && !pc.contains("(bad)"), "{pc}");
    assert!(code.contains("<schedule>:") && !code.contains("(bad)"), "{code}");
    assert!(banner.contains("Linux version"), "{banner}");
    assert!(string.contains(&facts["string.text"]), "{string}");
    assert!(functions(spin).contains(&"stop_this_cpu".to_owned()), "{spin}");
    let qemu = &parse_info_registers(&text("registers.txt"))[0];
    for name in ["rip", "cr3"] {
        assert!(registers.contains(&format!("{:#x}", qemu[name])), "{name}: {registers}");
    }
    let said = gdb_complains(&file("vmcore"), "x/2gx 0");
    assert!(said.contains("Cannot access memory at address 0x0"), "{said}");
}
