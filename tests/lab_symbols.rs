//! Symbols of real kernels from their own memory, with no vmlinux, against what the guest said of itself.
//!
//! Truth is the guest's own `/proc` and `/sys`, never kstub.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::backend::Dump;
use kstub::debuginfo::SymbolTable;
use kstub::kernel::discover::{self, Found, START_KERNEL_MAP};
use kstub::vmcoreinfo::VmcoreInfo;
use std::time::Instant;
use support::lab::{self, DumpFile, Set};

/// Calls `check` with one dump of each kind that kstub can decode.
fn for_each_dump(check: &mut dyn FnMut(&Set, &DumpFile, &Dump)) {
    let Some(sets) = lab::sets() else { return };
    for set in &sets {
        let dumps: Vec<_> = set.dumps().into_iter().filter(|d| d.complete && d.split.is_empty()).collect();
        assert!(!dumps.is_empty(), "{}", set.name());
        for dump in &dumps {
            let opened = Dump::open(&dump.path).unwrap_or_else(|e| panic!("{}: {e}", dump.path.display()));
            check(set, dump, &opened);
        }
    }
}

fn facts(set: &Set, file: &str) -> String {
    let path = set.dir.join("facts").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

type Line = (u64, char, String);

/// The kernel image's lines of the guest's own `/proc/kallsyms`.
fn told_by_guest(set: &Set) -> Vec<Line> {
    let text = facts(set, "proc/kallsyms");
    let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let image = words.take_while(|words| words.len() == 3);
    let line =
        |w: Vec<&str>| (u64::from_str_radix(w[0], 16).unwrap(), w[1].chars().next().unwrap(), w[2].into());
    image.map(line).collect()
}

fn at_run_time(symbols: &SymbolTable, found: &Found) -> Vec<Line> {
    let slide = |at: u64| if at >= START_KERNEL_MAP { at + found.kaslr_offset } else { at };
    symbols.iter().map(|s| (slide(s.addr), s.letter, s.name.to_owned())).collect()
}

/// Compares every line; the text names the first that differs.
fn compare(ours: &[Line], theirs: &[Line]) -> Result<(), String> {
    if let Some((ours, theirs)) = std::iter::zip(ours, theirs).find(|(a, b)| a != b) {
        return Err(format!("kstub has {ours:x?}, the guest has {theirs:x?}"));
    }
    if ours.len() != theirs.len() {
        return Err(format!("kstub has {} symbols, the guest has {}", ours.len(), theirs.len()));
    }
    Ok(())
}

#[test]
fn every_symbol_is_where_the_guest_says_it_is() {
    for_each_dump(&mut |set, dump, opened| {
        let what = format!("{}/{}", set.name(), dump.name);
        let found = discover::discover(opened, &|_, _| ()).unwrap_or_else(|e| panic!("{what}: {e}"));
        let theirs = told_by_guest(set);
        assert!(theirs.len() > 10_000, "{what}: {} lines", theirs.len());
        // As VMCOREINFO tells, where it does; and by searching the image.
        let without = Found { vmcoreinfo: VmcoreInfo::default(), ..found.clone() };
        for (how, found) in [("told", &found), ("searched", &without)] {
            let start = Instant::now();
            let symbols =
                discover::find_kallsyms(opened, found).unwrap_or_else(|e| panic!("{what}: {how}: {e}"));
            eprintln!("{what}: {} symbols, {how} in {:?}", symbols.len(), start.elapsed());
            let ours = at_run_time(&symbols, found);
            compare(&ours, &theirs).unwrap_or_else(|why| panic!("{what}: {how}: {why}"));
            let wrong = Found { kaslr_offset: found.kaslr_offset.wrapping_add(8), ..found.clone() };
            let off_by_8 = at_run_time(&symbols, &wrong);
            assert!(compare(&off_by_8, &theirs).is_err(), "{what}: symbols 8 bytes off must fail");
        }
    });
}
