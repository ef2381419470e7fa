//! Every dump format against the memory it was written from: contents, holes, damage, refusals.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "formats/damage.rs"]
mod damage;
#[path = "formats/holes.rs"]
mod holes;
mod support;

use kstub::addr::PhysAddr;
use kstub::backend::{Backend, Dump};
use kstub::memory::{PhysicalMemory, Unreadable};
use std::error::Error;
use std::path::Path;
use support::elf_core::{self, ElfCore, Segment};
use support::flattened::{self, Flatten};
use support::kdump::{Codec, FLAG_ZLIB, FLAG_ZSTD, Kdump, STATUS_INCOMPLETE, Slot};
use support::{FlatMemory, Model, Rng, TempFile, notes};

const INFO: &str = "OSRELEASE=6.1.0-test-amd64\nPAGESIZE=4096\nKERNELOFFSET=1d600000\n";

fn open(path: &Path) -> Result<Dump, String> {
    Dump::open(path).map_err(|error| {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(next) = cause {
            text = format!("{text}: {next}");
            cause = next.source();
        }
        text
    })
}

fn open_bytes(bytes: &[u8]) -> (TempFile, Result<Dump, String>) {
    let file = TempFile::new(bytes);
    let dump = open(file.path());
    (file, dump)
}

#[track_caller]
fn must_open(what: &str, bytes: &[u8]) -> (TempFile, Dump) {
    let (file, dump) = open_bytes(bytes);
    (file, dump.unwrap_or_else(|error| panic!("{what}: {error}")))
}

/// Frames 1–12, 16–40 (the second run ends on a frame whose bitmap byte is shared), 70.
fn memory() -> FlatMemory {
    let mut rng = Rng::new(0x5eed);
    let mut mem = FlatMemory::new();
    mem.add_varied(1, 12, &mut rng);
    mem.add_varied(16, 25, &mut rng);
    mem.add_varied(70, 1, &mut rng);
    // At least one of each sort, whatever the seed gives.
    mem.pages.insert(5, Box::new([0; 4096]));
    mem.pages.insert(6, rng.noise_page());
    mem.pages.insert(7, rng.text_page());
    mem.pages.insert(20, Box::new([0; 4096]));
    mem
}

fn core_notes() -> Vec<u8> {
    let cpus = [notes::CpuValues::distinct(0), notes::CpuValues::distinct(1)];
    notes::kernel_notes(&cpus, Some(INFO))
}

fn kdump(codec: Codec) -> Kdump {
    Kdump { notes: core_notes(), vmcoreinfo: INFO.into(), ..Kdump::of(&memory()).codec(codec) }
}

/// Each format under test with a name: its bytes and what reads of it must give.
fn all_formats() -> Vec<(String, Vec<u8>, Model)> {
    let mem = memory();
    let model = Model::of(&mem);
    let mut all = vec![
        ("elf".to_owned(), ElfCore::of(&mem).with_notes(core_notes()).build().bytes, model.clone()),
        (
            "elf, counted in section 0".to_owned(),
            { ElfCore { extended_count: true, ..ElfCore::of(&mem).with_notes(core_notes()) }.build().bytes },
            model.clone(),
        ),
    ];
    for codec in Codec::ALL {
        all.push((format!("kdump, {codec:?}"), kdump(codec).build().bytes, model.clone()));
        all.push((format!("kdump of QEMU, {codec:?}"), kdump(codec).qemu().build().bytes, model.clone()));
    }
    let mixed = Kdump { codecs: vec![Codec::Zlib, Codec::Zstd, Codec::Raw], ..kdump(Codec::Raw) };
    all.push(("kdump, mixed codecs".to_owned(), mixed.build().bytes, model.clone()));
    let level31 = Kdump { dump_level: 31, ..kdump(Codec::Zlib) };
    all.push(("kdump, shared zero page".to_owned(), level31.build().bytes, model.clone()));
    for version in 1..=6 {
        let old = Kdump { version, ..kdump(Codec::Zlib) };
        all.push((format!("kdump, header version {version}"), old.build().bytes, model.clone()));
    }
    all
}

fn flattenings() -> Vec<(&'static str, Flatten)> {
    let plain = Flatten::default();
    vec![
        ("in order", plain.clone()),
        ("tiny records", Flatten { record_size: 40, ..plain.clone() }),
        ("one record", Flatten { record_size: usize::MAX / 4, ..plain.clone() }),
        ("shuffled", Flatten { shuffle: true, ..plain.clone() }),
        ("header last", Flatten { header_last: true, ..plain.clone() }),
        ("overlapping", Flatten { overlap: true, shuffle: true, seed: 3, ..plain.clone() }),
        ("unwritten zeros", Flatten { skip_zeros: Some(512), ..plain.clone() }),
        ("no end mark", Flatten { end_mark: false, ..plain.clone() }),
        (
            "all of it",
            Flatten {
                shuffle: true,
                header_last: true,
                overlap: true,
                skip_zeros: Some(64),
                seed: 9,
                ..plain
            },
        ),
    ]
}

#[test]
fn every_format_gives_the_pages_it_was_made_of() {
    for (what, bytes, model) in all_formats() {
        let (_file, dump) = must_open(&what, &bytes);
        model.check(&what, &dump);
        let ranges: Vec<_> = dump.ranges().iter().map(|r| (r.start.0, r.end.0)).collect();
        assert_eq!(ranges, model.ranges(), "{what}: ranges");
        assert_eq!(dump.problems(), Vec::<String>::new(), "{what}: problems");
    }
}

#[test]
fn every_format_gives_the_same_when_flattened() {
    for (what, bytes, model) in all_formats() {
        for (how, flatten) in flattenings() {
            let what = format!("{what}, flattened {how}");
            let (_file, dump) = must_open(&what, &flatten.apply(&bytes).bytes);
            model.check(&what, &dump);
            if flatten.end_mark {
                assert_eq!(dump.problems(), Vec::<String>::new(), "{what}: problems");
            } else {
                assert!(!dump.problems().is_empty(), "{what}: a missing end mark is worth a word");
            }
        }
    }
}

#[test]
fn mutation_wrong_pages_are_noticed() {
    // A page shifted by 8 bytes, two pages swapped, one bit changed, a hole of another kind.
    let (_file, dump) = must_open("kdump", &kdump(Codec::Zlib).build().bytes);
    let sound = Model::of(&memory());
    assert_eq!(sound.compare(&dump), Ok(()));
    let mut shifted = sound.clone();
    shifted.mem.pages.get_mut(&7).unwrap().rotate_left(8);
    assert!(shifted.compare(&dump).is_err());
    let mut swapped = sound.clone();
    let (six, seven) = (swapped.mem.pages[&6].clone(), swapped.mem.pages[&7].clone());
    swapped.mem.pages.insert(6, seven);
    swapped.mem.pages.insert(7, six);
    assert!(swapped.compare(&dump).is_err());
    let mut flipped = sound.clone();
    flipped.mem.pages.get_mut(&40).unwrap()[4095] ^= 1;
    assert!(flipped.compare(&dump).is_err());
    assert!(sound.clone().hole(7, "excluded").compare(&dump).is_err());
    assert!(sound.clone().hole(13, "excluded").compare(&dump).is_err());
    let mut missing = sound;
    missing.mem.pages.remove(&12);
    assert!(missing.compare(&dump).is_err());
}

#[test]
fn many_program_headers() {
    // More than 65534 segments: each 4 KiB in memory, its bytes a window into one shared stretch of noise.
    let noise = Rng::new(1).bytes(8 * 70_000 + 4096);
    let mut core = ElfCore { notes: Some(core_notes()), ..ElfCore::default() };
    let frame = |i: u64| (i * 2 + 4) * 4096;
    for i in 0..66_000 {
        core.segments.push(Segment::new(frame(i), Vec::new()).memsz(4096));
    }
    // Far above the rest, so that its file offset is known before the others are written.
    core.segments.push(Segment::new(1 << 40, noise.clone()));
    let base = core.build().segments.last().unwrap().start;
    for i in 0..66_000u64 {
        core.segments[i as usize].at = Some((base + i * 8, 4096));
    }
    let file = core.build();
    assert!(file.section_header.is_some());
    let (_file, dump) = must_open("66001 segments", &file.bytes);
    let mut page = [0; 4096];
    for i in [0, 1, 2, 1000, 65_533, 65_534, 65_535, 65_999] {
        assert_eq!(dump.read_phys_exact(PhysAddr(frame(i)), &mut page), Ok(()), "segment {i}");
        assert_eq!(page, noise[i as usize * 8..i as usize * 8 + 4096], "segment {i}");
        let beside = dump.read_phys(PhysAddr(frame(i) + 4096), &mut page);
        assert_eq!(beside.stopped.map(|e| e.why), Some(Unreadable::NotRam));
    }
    assert_eq!(dump.ranges().len(), 66_001);
}

#[test]
fn overlapping_segments() {
    let mem = memory();
    let mut core = ElfCore::of(&mem);
    // As the kernel's own text: mapped a second time, inside a segment and beyond one end of another.
    let again = |from: u64, to: u64| {
        let bytes = mem.read(from, (to - from) as usize).unwrap();
        Segment::new(from, bytes).vaddr(0xffff_ffff_8100_0000)
    };
    core.segments.insert(0, again(18 * 4096, 22 * 4096));
    core.segments.push(again(0x1800, 0x5321));
    core.segments.push(again(39 * 4096 + 100, 41 * 4096));
    // One whose header says that it is all left out must not hide the data of another.
    core.segments.insert(0, Segment::new(30 * 4096, Vec::new()).memsz(4 * 4096));
    core.segments.push(Segment::new(2 * 4096, Vec::new()).memsz(2 * 4096));
    let (_file, dump) = must_open("overlapping", &core.build().bytes);
    Model::of(&mem).check("overlapping", &dump);
}

#[test]
fn segments_need_not_be_whole_pages() {
    let mut rng = Rng::new(12);
    let (low, high) = (rng.bytes(0x9_ec00), rng.bytes(0x567));
    let core = ElfCore {
        segments: vec![Segment::new(0x1000, low.clone()), Segment::new(0x10_0123, high.clone()).memsz(0x600)],
        ..ElfCore::default()
    };
    let (_file, dump) = must_open("odd sizes", &core.build().bytes);
    let check = |at: u64, len: usize, want: &[u8], stop: Option<(u64, Unreadable)>| {
        let mut buf = vec![0; len];
        let got = dump.read_phys(PhysAddr(at), &mut buf);
        assert_eq!(got.stopped.map(|e| (e.at.0, e.why)), stop, "{len:#x} at {at:#x}");
        assert_eq!(&buf[..got.filled], want, "{len:#x} at {at:#x}");
    };
    check(0x1000, low.len(), &low, None);
    check(0x1000, low.len() + 1, &low, Some((0x9_fc00, Unreadable::NotRam)));
    check(0x9_fbff, 1, &low[low.len() - 1..], None);
    check(0x9_fc00, 8, &[], Some((0x9_fc00, Unreadable::NotRam)));
    check(0xfff, 8, &[], Some((0xfff, Unreadable::NotRam)));
    check(0x10_0123, 0x567, &high, None);
    check(0x10_0122, 2, &[], Some((0x10_0122, Unreadable::NotRam)));
    check(0x10_0123, 0x1000, &high, Some((0x10_0123 + 0x567, Unreadable::ZeroOrExcluded)));
    check(0x10_0123 + 0x5ff, 8, &[], Some((0x10_0123 + 0x5ff, Unreadable::ZeroOrExcluded)));
    check(0x10_0123 + 0x600, 8, &[], Some((0x10_0123 + 0x600, Unreadable::NotRam)));
}

#[test]
fn memory_far_up_is_found() {
    // Frames above 4 GiB need the 64-bit fields; the bitmap between is a megabyte of zeros.
    let mut rng = Rng::new(4);
    let far = (64u64 << 30) / 4096;
    let mut mem = FlatMemory::new();
    mem.add_varied(far, 9, &mut rng);
    mem.add_varied(3, 2, &mut rng);
    for (what, bytes) in [
        ("elf", ElfCore::of(&mem).build().bytes),
        ("kdump", Kdump::of(&mem).build().bytes),
        ("kdump of QEMU", Kdump::of(&mem).qemu().build().bytes),
    ] {
        let (_file, dump) = must_open(what, &bytes);
        let model = Model::of(&mem);
        for pfn in (0..8).chain(far - 2..far + 12) {
            model.compare_read(&dump, pfn * 4096, 4096).unwrap_or_else(|e| panic!("{what}: {e}"));
            model.compare_read(&dump, pfn * 4096 + 0xff0, 32).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        assert_eq!(dump.ranges().last().map(|r| r.end), Some(PhysAddr((far + 9) * 4096)), "{what}");
    }
}

#[test]
fn the_last_byte_of_the_physical_address_space_does_not_wrap() {
    for (what, bytes, _) in all_formats().into_iter().take(4) {
        let (_file, dump) = must_open(&what, &bytes);
        let mut buf = [0; 64];
        for at in [u64::MAX, u64::MAX - 8, u64::MAX - 63, 1 << 63, 1 << 52] {
            let got = dump.read_phys(PhysAddr(at), &mut buf);
            assert_eq!(got.filled, 0, "{what}: {at:#x}");
            assert_eq!(got.stopped.map(|e| e.why.kind()), Some("not-ram"), "{what}: {at:#x}");
        }
        assert_eq!(dump.read_phys(PhysAddr(0), &mut []).stopped, None, "{what}: empty read");
    }
}

#[test]
fn threads_read_at_once() {
    let mem = memory();
    let model = Model::of(&mem);
    for (what, bytes) in [
        ("kdump", kdump(Codec::Zlib).build().bytes),
        (
            "flattened kdump",
            Flatten { shuffle: true, ..Flatten::default() }.apply(&kdump(Codec::Zstd).build().bytes).bytes,
        ),
    ] {
        let (_file, dump) = must_open(what, &bytes);
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let (dump, model) = (&dump, &model);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    for _ in 0..500 {
                        let (at, len) = (rng.below(0x50_000), rng.below(30_000) as usize);
                        model.compare_read(dump, at, len).unwrap_or_else(|e| panic!("{what}: {e}"));
                    }
                });
            }
        });
    }
}

#[test]
fn vmcoreinfo_is_found_in_every_format() {
    let in_notes = {
        let notes = core_notes();
        let at = notes.len() - INFO.len().next_multiple_of(4);
        Kdump {
            vmcoreinfo: Vec::new(),
            vmcoreinfo_in_notes: Some(at as u64..(at + INFO.len()) as u64),
            notes,
            ..kdump(Codec::Zlib)
        }
    };
    let only_notes = Kdump { vmcoreinfo: Vec::new(), ..kdump(Codec::Zlib) };
    let only_text = Kdump { notes: Vec::new(), ..kdump(Codec::Zlib) };
    let qemu = Kdump {
        notes: notes::qemu_notes(&[notes::CpuValues::distinct(0)], true, Some(INFO)),
        vmcoreinfo: Vec::new(),
        ..kdump(Codec::Zlib).qemu()
    };
    let elf = ElfCore::of(&memory());
    for (what, bytes) in [
        ("elf", elf.clone().with_notes(core_notes()).build().bytes),
        (
            "elf, notes at an odd offset",
            ElfCore { gap: 3, ..elf.clone().with_notes(core_notes()) }.build().bytes,
        ),
        ("kdump, own copy", kdump(Codec::Zlib).build().bytes),
        ("kdump, copy inside the notes", in_notes.build().bytes),
        ("kdump, notes only", only_notes.build().bytes),
        ("kdump, text only", only_text.build().bytes),
        ("kdump, version 3", Kdump { version: 3, ..kdump(Codec::Zlib) }.build().bytes),
        ("kdump of QEMU", qemu.build().bytes),
        ("flattened", Flatten::default().apply(&kdump(Codec::Zlib).build().bytes).bytes),
    ] {
        let (_file, dump) = must_open(what, &bytes);
        let info = dump.vmcoreinfo_note().unwrap_or_else(|| panic!("{what}: no VMCOREINFO"));
        assert_eq!(String::from_utf8_lossy(info), INFO, "{what}");
    }
    let none = Kdump { notes: Vec::new(), vmcoreinfo: Vec::new(), ..kdump(Codec::Zlib) };
    for (what, bytes) in [
        (
            "elf without",
            elf.with_notes(notes::kernel_notes(&[notes::CpuValues::distinct(0)], None)).build().bytes,
        ),
        ("elf without notes", ElfCore { notes: None, ..ElfCore::of(&memory()) }.build().bytes),
        ("kdump without", none.build().bytes),
        ("kdump, version 2", Kdump { version: 2, ..kdump(Codec::Zlib) }.build().bytes),
    ] {
        let (_file, dump) = must_open(what, &bytes);
        assert_eq!(dump.vmcoreinfo_note(), None, "{what}");
    }
}

#[test]
fn facts_and_hints() {
    let (_file, dump) = must_open(
        "kdump",
        &Kdump { phys_base: 0x1340_0000, dump_level: 31, ..kdump(Codec::Zstd) }.build().bytes,
    );
    assert!(dump.phys_base_hints().contains(&0x1340_0000), "{:x?}", dump.phys_base_hints());
    let facts: Vec<String> = dump.facts().iter().map(|f| format!("{}: {}", f.name, f.value)).collect();
    let text = facts.join("\n");
    assert!(text.contains("kdump"), "{text}");
    assert!(text.contains("31"), "{text}");
    let negative = (-0x1a80_0000i64) as u64;
    let (_file, dump) =
        must_open("kdump", &Kdump { phys_base: negative, ..kdump(Codec::Zstd) }.build().bytes);
    assert!(dump.phys_base_hints().contains(&negative), "{:x?}", dump.phys_base_hints());
    let (_file, dump) = must_open("elf", &ElfCore::of(&memory()).build().bytes);
    let text = dump.facts().iter().map(|f| f.value.to_lowercase()).collect::<Vec<_>>().join("\n");
    assert!(text.contains("elf"), "{text}");
}

#[test]
fn incomplete_dumps_say_so() {
    let flagged = Kdump { status: STATUS_INCOMPLETE | FLAG_ZLIB, ..kdump(Codec::Zlib) };
    let elf = ElfCore { flags: elf_core::DUMP_ELF_INCOMPLETE, ..ElfCore::of(&memory()) };
    for (what, bytes) in [("kdump", flagged.build().bytes), ("elf", elf.build().bytes)] {
        let (_file, dump) = must_open(what, &bytes);
        let text = dump.problems().join("\n");
        assert!(text.to_lowercase().contains("incomplete"), "{what}: {text:?}");
        Model::of(&memory()).check(what, &dump);
    }
}
