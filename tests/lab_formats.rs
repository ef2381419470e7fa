//! Dumps of real machines: every file of a set against the raw memory, registers against what QEMU printed.
//!
//! `KSTUB_LAB_TESTS`: unset = run if there is a lab, 1 = there must be one, 0 = skip. See `scripts/lab`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::PhysAddr;
use kstub::arch::x86_64::{Reg, RegisterFile, Saved};
use kstub::backend::{Backend, Dump, RegisterSource};
use kstub::memory::PhysicalMemory;
use std::collections::BTreeMap;
use support::Rng;
use support::lab::{self, DumpFile, Set, Truth};

const CHUNK: u64 = 1 << 20;

/// Opens a dump; one part of a split set brings all the others, in another order.
fn open(set: &Set, dump: &DumpFile) -> Dump {
    let mut paths = if dump.split.is_empty() { vec![dump.path.clone()] } else { dump.split.clone() };
    paths.rotate_right(1);
    Dump::open_parts(&paths).unwrap_or_else(|error| panic!("{}/{}: {error}", set.name(), dump.name))
}

fn fact(dump: &Dump, name: &str) -> String {
    dump.facts().into_iter().find(|fact| fact.name == name).map(|fact| fact.value).unwrap_or_default()
}

/// What a comparison found: bytes that agree, and frames that are missing by kind.
#[derive(Default, Debug, PartialEq, Eq, Clone)]
struct Found {
    equal: u64,
    /// Runs of missing frames: first → (one past the last, kind).
    holes: BTreeMap<u64, (u64, &'static str)>,
}

impl Found {
    fn hole(&mut self, pfn: u64, kind: &'static str) {
        if let Some(mut last) = self.holes.last_entry()
            && *last.get() == (pfn, kind)
        {
            last.get_mut().0 = pfn + 1;
            return;
        }
        self.holes.insert(pfn, (pfn + 1, kind));
    }

    fn frames(&self, kind: &str) -> u64 {
        self.holes.iter().filter(|(_, (_, k))| *k == kind).map(|(from, (to, _))| to - from).sum()
    }

    /// The runs of one kind alone.
    fn runs(&self, kind: &str) -> Vec<(u64, u64)> {
        let of_kind = self.holes.iter().filter(|(_, (_, k))| *k == kind);
        of_kind.map(|(from, (to, _))| (*from, *to)).collect()
    }

    fn kinds(&self) -> Vec<&'static str> {
        let mut kinds: Vec<_> = self.holes.values().map(|(_, kind)| *kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    }
}

/// Reads all of `truth` below `end` out of `dump`, `shift` bytes further up than it should, and compares.
fn compare(dump: &dyn PhysicalMemory, truth: &Truth, shift: u64, end: u64) -> Result<Found, String> {
    let mut found = Found::default();
    let (mut want, mut got) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    for piece in &truth.pieces {
        let mut at = piece.start;
        let last = piece.end().min(end);
        while at < last {
            let len = (CHUNK - at % CHUNK).min(last - at) as usize;
            piece.read(at, &mut want[..len]);
            let mut done = 0;
            while done < len {
                let here = at + done as u64;
                let read = dump.read_phys(PhysAddr(here + shift), &mut got[done..len]);
                if got[done..done + read.filled] != want[done..done + read.filled] {
                    let i = (done..len).find(|&i| got[i] != want[i]).unwrap_or(done);
                    return Err(format!("byte at {:#x} differs", at + i as u64));
                }
                found.equal += read.filled as u64;
                done += read.filled;
                if let Some(error) = read.stopped {
                    let here = at + done as u64;
                    if error.at.0 != here + shift {
                        return Err(format!("stopped at {here:#x}, but says {error}"));
                    }
                    found.hole(here / 4096, error.why.kind());
                    done += (4096 - here % 4096).min((len - done) as u64) as usize;
                }
            }
            at += len as u64;
        }
    }
    Ok(found)
}

/// Outside all memory a dump must say "not RAM", never anything else.
fn check_outside(what: &str, dump: &dyn PhysicalMemory, truth: &Truth) {
    let mut rng = Rng::new(11);
    let end = truth.pieces.iter().map(|p| p.end()).max().unwrap();
    let mut places: Vec<u64> = truth.pieces.iter().flat_map(|p| [p.start.wrapping_sub(1), p.end()]).collect();
    places.extend((0..2000).map(|_| rng.below(end * 2)));
    places.extend([end + (1 << 30), 1 << 45, u64::MAX]);
    for at in places {
        // Formats with a bitmap know whole frames only.
        if truth.contains(at / 4096 * 4096) || truth.contains(at | 4095) {
            continue;
        }
        let got = dump.read_phys(PhysAddr(at), &mut [0]);
        assert_eq!(got.stopped.map(|e| e.why.kind()), Some("not-ram"), "{what}: {at:#x}");
    }
}

fn check_file(set: &Set, dump: &DumpFile, truth: &Truth) -> Found {
    let what = format!("{}/{}", set.name(), dump.name);
    let opened = open(set, dump);
    let found = compare(&opened, truth, 0, u64::MAX).unwrap_or_else(|e| panic!("{what}: {e}"));
    check_outside(&what, &opened, truth);
    let total: u64 = truth.pieces.iter().map(|p| p.len).sum();
    let kinds = found.kinds();
    let filtered = dump.filter_level.unwrap_or(0) != 0;
    eprintln!("{what}: {} MiB equal, holes {:?}", found.equal >> 20, found.kinds());
    match (dump.complete, filtered, dump.format.as_str()) {
        (false, ..) => {
            assert!(
                found.frames("truncated") > 0 || !opened.problems().is_empty(),
                "{what}: nothing is missing"
            );
            assert!(
                kinds
                    .iter()
                    .all(|kind| ["truncated", "corrupt", "excluded", "zero-or-excluded"].contains(kind)),
                "{what}: {kinds:?}"
            );
        }
        _ if dump.paging => {
            assert!(kinds.iter().all(|kind| *kind == "not-ram"), "{what}: {kinds:?}");
            assert!(found.equal > total * 9 / 10, "{what}: only {} bytes mapped", found.equal);
        }
        (_, false, _) => {
            assert_eq!(found.holes, BTreeMap::new(), "{what}: an unfiltered dump has everything");
            assert_eq!(found.equal, total, "{what}");
        }
        (_, true, "kdump") => {
            // Level 1 leaves out zero pages only, which this format still records.
            if dump.filter_level == Some(1) {
                assert_eq!(found.frames("excluded"), 0, "{what}: zero pages are data");
            } else {
                assert_eq!(kinds, ["excluded"], "{what}");
            }
        }
        (_, true, _) => assert_eq!(kinds, ["zero-or-excluded"], "{what}"),
    }
    assert!(found.equal > total / 100, "{what}: only {} bytes could be compared", found.equal);
    assert_eq!(fact(&opened, "complete"), if dump.complete { "yes" } else { "no" }, "{what}");
    if dump.complete {
        assert_eq!(opened.problems(), Vec::<String>::new(), "{what}");
    }
    let info = opened.vmcoreinfo_note();
    assert_eq!(info.is_some(), dump.has_vmcoreinfo, "{what}: VMCOREINFO");
    if let Some(info) = info {
        let release = format!("OSRELEASE={}\n", set.json["release"].as_str().unwrap());
        assert!(String::from_utf8_lossy(info).starts_with(&release), "{what}: VMCOREINFO of another kernel");
    }
    found
}

#[test]
fn every_file_of_a_set_equals_the_raw_memory() {
    let Some(sets) = lab::sets() else { return };
    for set in sets {
        let truth = set.truth();
        // Files that went through the same filter must lack the same frames.
        let mut by_filter: BTreeMap<(String, u64), (String, Found)> = BTreeMap::new();
        for dump in set.dumps() {
            let found = check_file(&set, &dump, &truth);
            if !dump.complete || dump.paging {
                continue;
            }
            let key = (dump.format.clone(), dump.filter_level.unwrap_or(0));
            let (first, same) = by_filter.entry(key).or_insert((dump.name.clone(), found.clone()));
            for kind in ["excluded", "zero-or-excluded"] {
                let same = same.runs(kind) == found.runs(kind);
                assert!(same, "{}: {first} and {} lack different frames", set.name(), dump.name);
            }
        }
    }
}

#[test]
fn mutation_a_shifted_comparison_fails() {
    let Some(sets) = lab::sets() else { return };
    for set in sets {
        let truth = set.truth();
        for dump in set.dumps() {
            if !dump.complete {
                continue;
            }
            let opened = open(&set, &dump);
            for shift in [8, 4096, 1 << 20] {
                let result = compare(&opened, &truth, shift, u64::MAX);
                assert!(result.is_err(), "{}/{}: shifted by {shift:#x}, yet equal", set.name(), dump.name);
            }
        }
    }
}

/// The frames that the truth has and the dump gives, and those of each kind that it lacks.
fn count_frames(dump: &Dump, truth: &Truth) -> BTreeMap<&'static str, u64> {
    let found = compare(dump, truth, 0, u64::MAX).unwrap_or_else(|e| panic!("{e}"));
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for (from, (to, kind)) in &found.holes {
        *counts.entry(kind).or_default() += to - from;
    }
    counts.insert("equal", found.equal / 4096);
    counts
}

/// How many frames of memory are zero.
fn zero_frames(truth: &Truth) -> u64 {
    let mut zeros = 0;
    let mut buf = vec![0; CHUNK as usize];
    for piece in &truth.pieces {
        for at in (piece.start..piece.end()).step_by(CHUNK as usize) {
            let buf = &mut buf[..(piece.end() - at).min(CHUNK) as usize];
            piece.read(at, buf);
            zeros += buf.chunks(4096).filter(|page| page.iter().all(|&byte| byte == 0)).count() as u64;
        }
    }
    zeros
}

/// The numbers in "about N of M pages".
fn about(text: &str) -> (u64, u64) {
    let rest = text.split_once("about ").unwrap_or_else(|| panic!("{text:?}")).1;
    let mut words = rest.split(' ');
    let n = words.next().unwrap().parse().unwrap();
    assert_eq!(words.next(), Some("of"), "{text}");
    (n, words.next().unwrap().parse().unwrap())
}

#[test]
fn split_sets_of_makedumpfile() {
    let Some(sets) = lab::sets() else { return };
    let mut seen = 0;
    for set in sets {
        let truth = set.truth();
        for dump in set.dumps().iter().filter(|dump| !dump.split.is_empty()) {
            let what = format!("{}/{}", set.name(), dump.name);
            // Alone, its siblings beside it: they are named, in order.
            let text = Dump::open(&dump.path).err().unwrap_or_else(|| panic!("{what}: opened")).to_string();
            let places: Vec<_> = dump.split.iter().map(|part| text.rfind(&*part.to_string_lossy())).collect();
            assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{what}: {text}");
            // Alone in a directory: what it has, and what it lacks.
            let dir = tempfile::tempdir().unwrap();
            let link = dir.path().join(&dump.name);
            std::os::unix::fs::symlink(&dump.path, &link).unwrap();
            let alone = Dump::open(&link).unwrap_or_else(|error| panic!("{what}: {error}"));
            let (part, all) = (count_frames(&alone, &truth), count_frames(&open(&set, dump), &truth));
            assert_eq!(part["equal"] + part["missing-part"], all["equal"], "{what}: {part:?} {all:?}");
            assert_eq!(part["excluded"], all["excluded"], "{what}");
            assert!(part["equal"] > 0 && part["missing-part"] > 0, "{what}: {part:?}");
            assert_eq!(fact(&alone, "complete"), "no", "{what}");
            eprintln!("{what}: {}", alone.problems().join("; "));
            // Twice the same, and with a dump of its own.
            for other in ["vmcore.kdump-zlib-d31", &dump.name] {
                let other = set.dir.join(other);
                if other.exists() {
                    let named = [dump.path.clone(), other.clone()];
                    assert!(Dump::open_parts(&named).is_err(), "{what} and {}", other.display());
                }
            }
            seen += 1;
        }
    }
    eprintln!("{seen} parts of split sets");
}

#[test]
fn cut_dumps_say_how_much_is_there() {
    let Some(sets) = lab::sets() else { return };
    for set in sets {
        let truth = set.truth();
        let zeros = zero_frames(&truth);
        for dump in set.dumps().iter().filter(|dump| dump.complete && dump.split.is_empty()) {
            let size = std::fs::metadata(&dump.path).unwrap().len();
            if size > 200 << 20 {
                continue;
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("vmcore");
            std::fs::copy(&dump.path, &path).unwrap();
            let whole = compare(&open(&set, dump), &truth, 0, u64::MAX).unwrap().equal;
            // Ever shorter: two thirds, the end of the bitmaps and notes, little more than the headers.
            for len in [size - 1, size * 2 / 3, size / 10, 200_000, 30_000, 12_000] {
                let what = format!("{}/{} cut to {len} of {size}", set.name(), dump.name);
                std::fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
                let opened = match Dump::open(&path) {
                    Ok(opened) => opened,
                    Err(error) => {
                        // A flattened file has its headers at the end.
                        assert!(dump.flattened || len < 20_000, "{what}: {error}");
                        continue;
                    }
                };
                assert_eq!(fact(&opened, "complete"), "no", "{what}");
                let problems = opened.problems().join("; ");
                let found = compare(&opened, &truth, 0, u64::MAX).unwrap_or_else(|e| panic!("{what}: {e}"));
                let kinds = ["truncated", "excluded", "zero-or-excluded", "not-ram"];
                assert!(found.kinds().iter().all(|kind| kinds.contains(kind)), "{what}: {:?}", found.kinds());
                assert!(found.frames("truncated") > 0 && found.equal < whole, "{what}: {:?}", found.kinds());
                if dump.format == "kdump" && !dump.flattened && problems.contains("about ") {
                    let (held, of) = about(&problems);
                    // Zero pages beyond the cut are there too: they share one page.
                    let (low, high) =
                        (found.equal / 4096 - zeros.min(found.equal / 4096), found.equal / 4096);
                    let right = low.saturating_sub(200) <= held && held <= high + 200 && held <= of;
                    assert!(right, "{what}: says {held}, has {low} to {high}");
                }
                if dump.has_vmcoreinfo && !dump.flattened && len >= 30_000 {
                    assert!(opened.vmcoreinfo_note().is_some(), "{what}: VMCOREINFO lies before the cut");
                }
            }
        }
    }
}

#[test]
fn raw_images_of_qemus_ram() {
    let Some(sets) = lab::sets() else { return };
    for set in sets {
        let mut arguments: Vec<std::ffi::OsString> = Vec::new();
        for ram in set.json["truth"]["ram"].as_array().into_iter().flatten() {
            let path = set.dir.join(ram["file"].as_str().unwrap());
            arguments.push(format!("{}@{}", path.display(), ram["start"].as_str().unwrap()).into());
        }
        if arguments.is_empty() {
            continue;
        }
        arguments.reverse();
        let opened = Dump::open_arguments(&arguments).unwrap();
        let truth = set.truth();
        let found = compare(&opened, &truth, 0, u64::MAX).unwrap_or_else(|e| panic!("{}: {e}", set.name()));
        // Only the BIOS is missing.
        assert!(found.kinds().iter().all(|kind| *kind == "not-ram"), "{}: {:?}", set.name(), found.kinds());
        let bytes: u64 =
            set.json["truth"]["ram"].as_array().unwrap().iter().map(|r| r["size"].as_u64().unwrap()).sum();
        assert_eq!(found.equal, bytes, "{}", set.name());
        assert!(compare(&opened, &truth, 4096, u64::MAX).is_err(), "{}: shifted, yet equal", set.name());
    }
}

/// What QEMU's notes record and `info registers` prints.
const RECORDED: [&str; 30] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15", "rip", "eflags", "cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base", "cr0", "cr2", "cr3",
    "cr4",
];

fn reg(name: &str) -> Reg {
    *Reg::ALL.iter().find(|reg| reg.name() == name).unwrap_or_else(|| panic!("no register '{name}'"))
}

fn compare_registers(regs: &RegisterFile, want: &BTreeMap<String, u64>) -> Result<(), String> {
    for name in RECORDED {
        let want = want.get(name).ok_or_else(|| format!("QEMU printed no {name}"))?;
        let got = regs.get(reg(name));
        if got != Saved::Known((*want).into()) {
            return Err(format!("{name} is {got:x?}, QEMU said {want:#x}"));
        }
    }
    Ok(())
}

#[test]
fn registers_are_what_qemu_printed() {
    let Some(sets) = lab::sets() else { return };
    let mut compared = 0;
    for set in &sets {
        let Some(truth) = set.registers() else { continue };
        assert_eq!(truth.len() as u64, set.json["smp"].as_u64().unwrap(), "{}", set.name());
        for dump in set.dumps() {
            let what = format!("{}/{}", set.name(), dump.name);
            let opened = open(set, &dump);
            let saved = opened.saved_cpus();
            assert_eq!(saved.len(), truth.len(), "{what}");
            for (i, cpu) in saved.iter().enumerate() {
                compare_registers(&cpu.regs, &truth[i]).unwrap_or_else(|e| panic!("{what}, CPU {i}: {e}"));
                assert_eq!(cpu.source, RegisterSource::Qemu, "{what}");
                assert_eq!(cpu.pid, Some(i as u32 + 1), "{what}");
                for absent in [Reg::Cr8, Reg::Efer, Reg::St0, Reg::Fctrl, Reg::Xmm0, Reg::Xmm15, Reg::Mxcsr] {
                    assert!(
                        !matches!(cpu.regs.get(absent), Saved::Known(_)),
                        "{what}: {} is in no note",
                        absent.name()
                    );
                }
                // Mutation check: no CPU passes for another, and no register for its neighbour.
                for (j, other) in truth.iter().enumerate() {
                    if other != &truth[i] {
                        assert!(
                            compare_registers(&cpu.regs, other).is_err(),
                            "{what}: CPU {i} passes for {j}"
                        );
                    }
                }
                let mut off = truth[i].clone();
                *off.get_mut("rip").unwrap() += 8;
                assert!(compare_registers(&cpu.regs, &off).is_err(), "{what}: rip + 8 passes");
                compared += 1;
            }
        }
    }
    eprintln!("{compared} CPUs compared with QEMU's own words");
}

/// Where a guest program keeps its CPU in user mode with known registers.
#[test]
fn a_planted_user_program_is_found_in_the_kernels_own_notes() {
    let Some(sets) = lab::sets() else { return };
    for set in &sets {
        let (Some(planted), Some(cpu)) = (set.planted("spin-user.txt"), set.json["busy_user_cpu"].as_u64())
        else {
            continue;
        };
        if set.registers().is_some() {
            continue; // Compared register for register above.
        }
        let number = |name: &str| {
            let text = planted[name].strip_prefix("0x").unwrap();
            u64::from_str_radix(text, 16).unwrap()
        };
        for dump in set.dumps() {
            let what = format!("{}/{}", set.name(), dump.name);
            let opened = open(set, &dump);
            let saved = opened.saved_cpus();
            assert_eq!(saved.len() as u64, set.json["smp"].as_u64().unwrap(), "{what}");
            // The notes are in the order of CPU numbers here, since every CPU answered.
            let regs = &saved[cpu as usize].regs;
            assert_eq!(regs.in_user_mode(), Some(true), "{what}: CPU {cpu} ran a user program");
            for name in [
                "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
                "r14", "r15", "rip", "fs_base",
            ] {
                assert_eq!(regs.u64(reg(name)), Some(number(name)), "{what}: {name}");
            }
            assert_eq!(regs.u64(Reg::GsBase), Some(number("gs_base")), "{what}: active before the NMI");
            assert_eq!(regs.u64(Reg::KGsBase), None, "{what}: the kernel's GS base is in no note");
            assert_eq!(saved[cpu as usize].pid, planted["pid"].parse().ok(), "{what}: pid");
            for (i, other) in saved.iter().enumerate() {
                if i as u64 != cpu {
                    assert_ne!(
                        other.regs.u64(Reg::Rax),
                        Some(number("rax")),
                        "{what}: CPU {i} shows the same"
                    );
                }
                assert_eq!(other.source, RegisterSource::KernelPrstatus, "{what}");
            }
            // The CPU that panicked did so in the kernel, in the task the set names.
            if let (Some(panicked), Some(pid)) =
                (set.json["panic"]["cpu"].as_u64(), set.json["panic"]["pid"].as_u64())
            {
                let cpu = &saved[panicked as usize];
                assert_eq!(cpu.regs.in_user_mode(), Some(false), "{what}: CPU {panicked} panicked");
                assert_eq!(cpu.pid.map(u64::from), Some(pid), "{what}: pid of CPU {panicked}");
            }
        }
    }
}

#[test]
fn the_register_listing_is_read_right() {
    let text = "\nCPU#0\nRAX=00000000000000aa RBX=0000000000000001 RCX=0000000000000002 RDX=0000000000000037\n\
                R8 =ffffffffb2e03df8 R9 =0000000000000007 R10=0000000000000001 R11=0000000000000003\n\
                RIP=ffffffffb1ebc56f RFL=00000202 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=1\n\
                CS =0010 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]\n\
                GS =0000 ff1cbc143dc00000 00000000 00000000\n\
                CR0=80050033 CR2=0000000038d08730 CR3=0000000002260000 CR4=00751ef0\n\
                EFER=0000000000000d01\n\nCPU#1\nRAX=00000000000000bb\n";
    let cpus = lab::parse_info_registers(text);
    assert_eq!(cpus.len(), 2);
    for (name, want) in [
        ("rax", 0xaa),
        ("r8", 0xffff_ffff_b2e0_3df8),
        ("r9", 7),
        ("rip", 0xffff_ffff_b1eb_c56f),
        ("eflags", 0x202),
        ("cs", 0x10),
        ("gs", 0),
        ("gs_base", 0xff1c_bc14_3dc0_0000),
        ("cr3", 0x226_0000),
        ("cr4", 0x75_1ef0),
        ("efer", 0xd01),
    ] {
        assert_eq!(cpus[0].get(name), Some(&want), "{name}");
    }
    assert_eq!(cpus[1]["rax"], 0xbb);
}

#[test]
fn lab_tests_run_when_they_should() {
    for (variable, ci, want) in [
        (None, None, None),
        (Some(""), None, None),
        (Some("0"), None, Some(false)),
        (Some("0"), Some("true"), Some(false)),
        (Some("1"), None, Some(true)),
        (None, Some("true"), Some(true)),
        (None, Some("false"), None),
    ] {
        assert_eq!(lab::wanted(variable, ci), want, "{variable:?}, CI {ci:?}");
    }
}
