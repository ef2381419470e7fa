//! Registers as the notes of a dump record them: every one of every CPU, and none made up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::arch::x86_64::{Reg, RegisterFile, Saved};
use kstub::backend::{Backend, Dump, RegisterSource};
use support::elf_core::ElfCore;
use support::kdump::Kdump;
use support::notes::{self, CpuValues};
use support::{FlatMemory, Rng, TempFile};

fn memory() -> FlatMemory {
    let mut mem = FlatMemory::new();
    mem.add_varied(1, 8, &mut Rng::new(2));
    mem
}

/// The same notes in each container that can carry them.
fn containers(notes: &[u8]) -> Vec<(&'static str, TempFile)> {
    let mem = memory();
    let kdump = Kdump { notes: notes.to_vec(), ..Kdump::of(&mem) };
    let elf = ElfCore::of(&mem).with_notes(notes.to_vec());
    let flat = support::flattened::Flatten { shuffle: true, ..Default::default() };
    vec![
        ("elf", TempFile::new(&elf.build().bytes)),
        ("elf, odd offset", TempFile::new(&ElfCore { gap: 1, ..elf.clone() }.build().bytes)),
        ("kdump", TempFile::new(&kdump.build().bytes)),
        ("kdump, version 4", TempFile::new(&Kdump { version: 4, ..kdump.clone() }.build().bytes)),
        ("flattened elf", TempFile::new(&flat.apply(&elf.build().bytes).bytes)),
        ("flattened kdump", TempFile::new(&flat.apply(&kdump.build().bytes).bytes)),
    ]
}

fn open(what: &str, file: &TempFile) -> Dump {
    Dump::open(file.path()).unwrap_or_else(|error| panic!("{what}: {error}"))
}

fn reg(name: &str) -> Reg {
    *Reg::ALL.iter().find(|reg| reg.name() == name).unwrap_or_else(|| panic!("no register '{name}'"))
}

/// What both flavours of `NT_PRSTATUS` record under the same meaning.
const COMMON: [&str; 25] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15", "rip", "eflags", "cs", "ss", "ds", "es", "fs", "gs", "fs_base",
];

/// Compares the named registers; the text names the first that differs.
fn compare(regs: &RegisterFile, want: &CpuValues, names: &[&str]) -> Result<(), String> {
    for name in names {
        let (got, want) = (regs.get(reg(name)), Saved::Known(want.get(name).into()));
        if got != want {
            return Err(format!("{name} is {got:x?}, not {want:x?}"));
        }
    }
    Ok(())
}

/// Every register but the named ones must be unavailable.
fn nothing_else(what: &str, regs: &RegisterFile, names: &[&str]) {
    for reg in Reg::ALL {
        if !names.contains(&reg.name()) {
            let got = regs.get(reg);
            assert!(
                !matches!(got, Saved::Known(_)),
                "{what}: {} is {got:x?}; nobody recorded it",
                reg.name()
            );
        }
    }
}

#[test]
fn the_values_of_these_tests_are_all_distinct() {
    let mut seen = std::collections::BTreeSet::new();
    for cpu in 0..8 {
        let values = CpuValues::distinct(cpu);
        for (name, value) in &values.values {
            assert!(seen.insert(*value), "cpu {cpu}: {name} = {value:#x} is not unique");
        }
    }
    for name in COMMON {
        reg(name);
    }
}

#[test]
fn kernel_notes_in_kernel_mode() {
    let cpus: Vec<CpuValues> = (0..8).map(CpuValues::distinct).collect();
    for (what, file) in containers(&notes::kernel_notes(&cpus, Some("OSRELEASE=6.1.0\n"))) {
        let dump = open(what, &file);
        assert_eq!(dump.saved_cpus().len(), 8, "{what}");
        for (i, (saved, want)) in dump.saved_cpus().iter().zip(&cpus).enumerate() {
            let what = format!("{what}, cpu {i}");
            compare(&saved.regs, want, &COMMON).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(saved.source, RegisterSource::KernelPrstatus, "{what}");
            assert_eq!(saved.pid, Some(want.pid), "{what}");
            assert_eq!(saved.prstatus, notes::prstatus_desc(want, want.get("k_gs_base")), "{what}");
            assert_eq!(saved.regs.in_user_mode(), Some(false), "{what}");
            // Slot 22 is the inactive GS base: the user's, which the processor calls KERNEL_GS_BASE.
            assert_eq!(saved.regs.u64(Reg::KGsBase), Some(want.get("k_gs_base")), "{what}: k_gs_base");
            assert_eq!(saved.regs.u64(Reg::GsBase), None, "{what}: the kernel's GS base is in no note");
            let recorded: Vec<&str> = COMMON.into_iter().chain(["k_gs_base"]).collect();
            nothing_else(&what, &saved.regs, &recorded);
        }
    }
}

#[test]
fn kernel_notes_in_user_mode() {
    // The CPU was in user mode, so the GS base that is inactive in the NMI handler was active before it.
    let cpus: Vec<CpuValues> = (0..3).map(|cpu| CpuValues::distinct(cpu).in_user_mode()).collect();
    for (what, file) in containers(&notes::kernel_notes(&cpus, None)) {
        let dump = open(what, &file);
        for (i, (saved, want)) in dump.saved_cpus().iter().zip(&cpus).enumerate() {
            let what = format!("{what}, cpu {i}");
            compare(&saved.regs, want, &COMMON).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(saved.regs.in_user_mode(), Some(true), "{what}");
            assert_eq!(saved.regs.u64(Reg::GsBase), Some(want.get("k_gs_base")), "{what}: gs_base");
            assert_eq!(
                saved.regs.u64(Reg::KGsBase),
                None,
                "{what}: k_gs_base was the kernel's and is in no note"
            );
        }
    }
}

#[test]
fn qemu_notes_with_and_without_the_newest_field() {
    let cpus: Vec<CpuValues> = (0..8).map(CpuValues::distinct).collect();
    for with_kernel_gs_base in [true, false] {
        for (what, file) in
            containers(&notes::qemu_notes(&cpus, with_kernel_gs_base, Some("OSRELEASE=6.1.0\n")))
        {
            let dump = open(what, &file);
            assert_eq!(dump.saved_cpus().len(), 8, "{what}");
            for (i, (saved, want)) in dump.saved_cpus().iter().zip(&cpus).enumerate() {
                let what = format!("{what}, cpu {i}, with k_gs_base {with_kernel_gs_base}");
                let mut recorded: Vec<&str> = COMMON.to_vec();
                recorded.extend(["gs_base", "cr0", "cr2", "cr3", "cr4"]);
                if with_kernel_gs_base {
                    recorded.push("k_gs_base");
                }
                compare(&saved.regs, want, &recorded).unwrap_or_else(|e| panic!("{what}: {e}"));
                nothing_else(&what, &saved.regs, &recorded);
                assert_eq!(saved.source, RegisterSource::Qemu, "{what}");
                assert_eq!(saved.pid, Some(i as u32 + 1), "{what}");
                if !with_kernel_gs_base {
                    assert_eq!(saved.regs.u64(Reg::KGsBase), None, "{what}");
                }
            }
        }
    }
}

#[test]
fn qemu_user_mode_keeps_the_active_gs_base() {
    let cpus = [CpuValues::distinct(0).in_user_mode(), CpuValues::distinct(1)];
    for (what, file) in containers(&notes::qemu_notes(&cpus, true, None)) {
        let dump = open(what, &file);
        for (saved, want) in dump.saved_cpus().iter().zip(&cpus) {
            compare(&saved.regs, want, &["gs_base", "k_gs_base"]).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    }
}

#[test]
fn mutation_a_wrong_cpu_or_a_shift_is_noticed() {
    let cpus: Vec<CpuValues> = (0..4).map(CpuValues::distinct).collect();
    for (what, file) in containers(&notes::qemu_notes(&cpus, true, None)) {
        let dump = open(what, &file);
        for (i, saved) in dump.saved_cpus().iter().enumerate() {
            assert_eq!(compare(&saved.regs, &cpus[i], &COMMON), Ok(()), "{what}");
            let wrong = &cpus[(i + 1) % 4];
            for name in COMMON {
                assert!(
                    compare(&saved.regs, wrong, &[name]).is_err(),
                    "{what}: {name} of a wrong CPU passes"
                );
            }
            // Neighbours in the struct: a layout that is off by one word must not pass either.
            for pair in notes::USER_REGS.windows(2) {
                if pair.iter().all(|name| COMMON.contains(name)) {
                    let value = cpus[i].get(pair[1]);
                    let shifted = cpus[i].clone().set(pair[0], value);
                    assert!(compare(&saved.regs, &shifted, &[pair[0]]).is_err(), "{what}: {pair:?}");
                }
            }
        }
    }
    // A dump whose descriptor is 8 bytes off.
    let mut shifted = notes::prstatus_desc(&cpus[0], 0);
    shifted.splice(112..120, []);
    shifted.extend([0; 8]);
    let (_, file) = containers(&notes::note("CORE", 1, &shifted)).swap_remove(0);
    let dump = open("shifted", &file);
    assert!(compare(&dump.saved_cpus()[0].regs, &cpus[0], &COMMON).is_err());
}

#[test]
fn notes_of_others_and_of_odd_lengths_stand_between() {
    let cpus: Vec<CpuValues> = (0..3).map(CpuValues::distinct).collect();
    let mut all = notes::note("", 0x1234, b"nameless");
    all.extend(notes::note("LINUX", 0x202, &[7; 13])); // NT_X86_XSTATE
    all.extend(notes::kernel_prstatus(&cpus[0]));
    all.extend(notes::note("VMCOREINFO", 0, b"OSRELEASE=odd\nX=1")); // 17 bytes
    all.extend(notes::kernel_prstatus(&cpus[1]));
    all.extend(notes::note("CORE", 3, &[9; 136])); // NT_PRPSINFO
    all.extend(notes::note("Xen", 0x0100_0002, &[])); // empty descriptor
    all.extend(notes::note("GNU", 1, &[1; 336])); // type 1, but not of CORE
    all.extend(notes::kernel_prstatus(&cpus[2]));
    for (what, file) in containers(&all) {
        let dump = open(what, &file);
        let got: Vec<_> = dump.saved_cpus().iter().map(|c| c.regs.u64(Reg::Rip)).collect();
        let want: Vec<_> = cpus.iter().map(|c| Some(c.get("rip"))).collect();
        assert_eq!(got, want, "{what}");
        assert_eq!(dump.vmcoreinfo_note(), Some(&b"OSRELEASE=odd\nX=1"[..]), "{what}");
    }
}

#[test]
fn a_note_cut_short_loses_itself_only() {
    let cpus: Vec<CpuValues> = (0..2).map(CpuValues::distinct).collect();
    let whole = notes::kernel_notes(&cpus, None);
    let one = whole.len() / 2;
    for len in [one + 1, one + 11, one + 12, one + 20, one + 100, one + 335, whole.len() - 1] {
        for (what, file) in containers(&whole[..len]) {
            let what = format!("{what}, notes cut to {len}");
            let Ok(dump) = Dump::open(file.path()) else { panic!("{what}: not opened") };
            let saved = dump.saved_cpus();
            assert!(!saved.is_empty(), "{what}");
            compare(&saved[0].regs, &cpus[0], &COMMON).unwrap_or_else(|e| panic!("{what}: {e}"));
            for cpu in &saved[1..] {
                // If anything is made of the rest, it must be right as far as it goes.
                for name in COMMON {
                    if let Some(value) = cpu.regs.u64(reg(name)) {
                        assert_eq!(value, cpus[1].get(name), "{what}: {name}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_last_note_needs_no_padding() {
    let cpu = CpuValues::distinct(0);
    let mut all = notes::kernel_prstatus(&cpu);
    all.extend(notes::vmcoreinfo_note("OSRELEASE=6.1.0\nA=1"));
    let padding = (4 - "OSRELEASE=6.1.0\nA=1".len() % 4) % 4;
    all.truncate(all.len() - padding);
    for (what, file) in containers(&all) {
        let dump = open(what, &file);
        assert_eq!(dump.vmcoreinfo_note(), Some(&b"OSRELEASE=6.1.0\nA=1"[..]), "{what}");
    }
}

#[test]
fn notes_that_lie_about_their_sizes_are_survived() {
    let cpu = CpuValues::distinct(0);
    let desc = notes::prstatus_desc(&cpu, 0);
    for (namesz, descsz) in [
        (5, u32::MAX),
        (u32::MAX, 336),
        (u32::MAX, u32::MAX),
        (0x7fff_fffd, 0x7fff_fffd),
        (5, 337),
        (5, 0),
        (0, 336),
        (0, 0),
        (6, 336),
        (4, 336),
    ] {
        let mut all = notes::kernel_prstatus(&cpu);
        all.extend(notes::note_with_sizes("CORE", namesz, descsz, 1, &desc));
        for (what, file) in containers(&all) {
            let what = format!("{what}: namesz {namesz:#x}, descsz {descsz:#x}");
            let dump = Dump::open(file.path()).unwrap_or_else(|e| panic!("{what}: {e}"));
            let first = dump.saved_cpus().first().unwrap_or_else(|| panic!("{what}: the sound note is lost"));
            compare(&first.regs, &cpu, &COMMON).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    }
}

#[test]
fn a_prstatus_of_another_size_is_not_read_as_this_one() {
    // 144 bytes: the 32-bit struct. Too short to hold any register of ours.
    for len in [0, 32, 111, 112, 144, 296] {
        let desc = notes::prstatus_desc(&CpuValues::distinct(0), 0)[..len].to_vec();
        for (what, file) in containers(&notes::note("CORE", 1, &desc)) {
            let Ok(dump) = Dump::open(file.path()) else { continue };
            for saved in dump.saved_cpus() {
                for reg in Reg::ALL {
                    assert_eq!(saved.regs.get(reg), Saved::NotSaved, "{what}: {} of {len} bytes", reg.name());
                }
            }
        }
    }
}

#[test]
fn fewer_qemu_notes_than_cpus() {
    // A dump of four CPUs whose note area ends after the second QEMU note.
    let cpus: Vec<CpuValues> = (0..4).map(CpuValues::distinct).collect();
    let mut all: Vec<u8> =
        cpus.iter().enumerate().flat_map(|(i, c)| notes::qemu_prstatus(c, i as u32)).collect();
    for cpu in &cpus[..2] {
        all.extend(notes::qemu_state(cpu, true));
    }
    for (what, file) in containers(&all) {
        let dump = open(what, &file);
        assert_eq!(dump.saved_cpus().len(), 4, "{what}");
        for (i, (saved, want)) in dump.saved_cpus().iter().zip(&cpus).enumerate() {
            let what = format!("{what}, cpu {i}");
            compare(&saved.regs, want, &COMMON).unwrap_or_else(|e| panic!("{what}: {e}"));
            let cr3 = (i < 2).then(|| want.get("cr3"));
            assert_eq!(saved.regs.u64(Reg::Cr3), cr3, "{what}: cr3");
        }
    }
}

#[test]
fn qemu_state_of_another_version_or_size() {
    let cpu = CpuValues::distinct(0);
    let core = notes::qemu_prstatus(&cpu, 0);
    // A later QEMU may append fields and raise `size`: what is known stays where it is.
    let mut longer = notes::qemu_state_desc(&cpu, true);
    longer.extend([0xee; 24]);
    let size = longer.len() as u32;
    longer[4..8].copy_from_slice(&size.to_le_bytes());
    for (what, file) in containers(&[core.clone(), notes::note("QEMU", 0, &longer)].concat()) {
        let dump = open(what, &file);
        compare(&dump.saved_cpus()[0].regs, &cpu, &["cr0", "cr2", "cr3", "cr4", "gs_base", "k_gs_base"])
            .unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    // `size` says 432: what follows is no `kernel_gs_base`, even though there are bytes.
    let mut older = notes::qemu_state_desc(&cpu, true);
    older[4..8].copy_from_slice(&432u32.to_le_bytes());
    for (what, file) in containers(&[core.clone(), notes::note("QEMU", 0, &older)].concat()) {
        let dump = open(what, &file);
        assert_eq!(dump.saved_cpus()[0].regs.u64(Reg::KGsBase), None, "{what}");
    }
    // Version 2 means another layout: nothing may be taken from it, the CORE note still counts.
    let mut other = notes::qemu_state_desc(&cpu, true);
    other[0..4].copy_from_slice(&2u32.to_le_bytes());
    for (what, file) in containers(&[core.clone(), notes::note("QEMU", 0, &other)].concat()) {
        let dump = open(what, &file);
        let regs = &dump.saved_cpus()[0].regs;
        compare(regs, &cpu, &COMMON).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(regs.u64(Reg::Cr3), None, "{what}");
    }
}

#[test]
fn notes_may_be_spread_over_several_segments() {
    // The kernel's own headers have one segment for each CPU and one for VMCOREINFO.
    let cpus: Vec<CpuValues> = (0..4).map(CpuValues::distinct).collect();
    let mut more: Vec<Vec<u8>> = cpus.iter().map(notes::kernel_prstatus).collect();
    more.insert(2, Vec::new());
    more.push(notes::vmcoreinfo_note("OSRELEASE=6.1.0\nA=1"));
    let core = ElfCore { notes: None, more_notes: more, gap: 5, ..ElfCore::of(&memory()) };
    let dump = open("several", &TempFile::new(&core.build().bytes));
    assert_eq!(dump.saved_cpus().len(), 4);
    for (saved, want) in dump.saved_cpus().iter().zip(&cpus) {
        assert_eq!(compare(&saved.regs, want, &COMMON), Ok(()));
    }
    assert_eq!(dump.vmcoreinfo_note(), Some(&b"OSRELEASE=6.1.0\nA=1"[..]));
}

#[test]
fn a_dump_without_notes_has_no_cpus() {
    for (what, file) in containers(&[]) {
        assert!(open(what, &file).saved_cpus().is_empty(), "{what}");
    }
    let none = ElfCore { notes: None, ..ElfCore::of(&memory()) };
    assert!(open("elf", &TempFile::new(&none.build().bytes)).saved_cpus().is_empty());
}

#[test]
fn random_notes_never_panic() {
    let mut rng = Rng::new(0x7077);
    let cpus = [CpuValues::distinct(0), CpuValues::distinct(1)];
    let sound = notes::qemu_notes(&cpus, true, Some("OSRELEASE=6.1.0\nKERNELOFFSET=0\n"));
    for round in 0..300 {
        let mut damaged = sound.clone();
        for _ in 0..1 + rng.below(6) {
            let at = rng.below(damaged.len() as u64) as usize;
            damaged[at] ^= 1 << rng.below(8);
        }
        if rng.chance(1, 3) {
            damaged.truncate(rng.below(sound.len() as u64) as usize);
        }
        let file = TempFile::new(&ElfCore::of(&memory()).with_notes(damaged).build().bytes);
        let result = std::panic::catch_unwind(|| {
            if let Ok(dump) = Dump::open(file.path()) {
                assert!(dump.saved_cpus().len() < 64);
                let _ = (dump.vmcoreinfo_note(), dump.facts(), dump.problems());
            }
        });
        assert!(result.is_ok(), "round {round}");
    }
}
