//! Every dump format against the memory it was written from: contents, holes, damage, refusals.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

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

// ---------------------------------------------------------------- contents

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

// ---------------------------------------------------------------- what the source says of itself

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

// ---------------------------------------------------------------- holes

#[test]
fn holes_of_every_kind_at_every_place() {
    let mem = memory();
    // First, inside, last of a run, alone, and runs of two; each with its neighbours intact.
    for places in
        [vec![1], vec![12], vec![16], vec![40], vec![70], vec![7], vec![7, 8], vec![15, 16, 17], vec![13]]
    {
        let mut slots = Kdump::of(&mem);
        let mut model = Model::of(&mem);
        for &pfn in &places {
            slots.slots.insert(pfn, Slot::Excluded);
            model.holes.insert(pfn, "excluded");
        }
        let (_file, dump) = must_open("kdump", &slots.build().bytes);
        model.check(&format!("excluded {places:?}"), &dump);
        let ranges: Vec<_> = dump.ranges().iter().map(|r| (r.start.0, r.end.0)).collect();
        assert_eq!(ranges, model.ranges(), "excluded frames are RAM {places:?}");

        let mut slots = Kdump::of(&mem);
        let mut model = Model::of(&mem);
        for pfn in &places {
            slots.slots.remove(pfn);
            model.mem.pages.remove(pfn);
        }
        for (what, bytes) in
            [("kdump", slots.build().bytes), ("kdump of QEMU", slots.clone().qemu().build().bytes)]
        {
            let (_file, dump) = must_open(what, &bytes);
            model.check(&format!("{what}: not RAM {places:?}"), &dump);
        }
        let (_file, dump) = must_open("elf", &ElfCore::of(&model.mem).build().bytes);
        model.check(&format!("elf: not RAM {places:?}"), &dump);

        // makedumpfile's ELF: the segment says how much memory there is, the file has less.
        let mut core = ElfCore::default();
        let mut model = Model::of(&mem);
        for (start, bytes) in mem.runs() {
            let mut kept: Option<Segment> = None;
            for (i, page) in bytes.chunks(4096).enumerate() {
                let at = start + i as u64 * 4096;
                let left_out = places.contains(&(at / 4096));
                match &mut kept {
                    Some(segment) if left_out => segment.memsz += 4096,
                    Some(segment) if segment.memsz == segment.bytes.len() as u64 => {
                        segment.bytes.extend_from_slice(page);
                        segment.memsz += 4096;
                    }
                    _ => {
                        core.segments.extend(kept.take());
                        let held = if left_out { Vec::new() } else { page.to_vec() };
                        kept = Some(Segment::new(at, held).memsz(4096));
                    }
                }
                if left_out {
                    model.holes.insert(at / 4096, "zero-or-excluded");
                }
            }
            core.segments.extend(kept);
        }
        let (_file, dump) = must_open("elf", &core.build().bytes);
        model.check(&format!("elf: left out {places:?}"), &dump);
    }
}

#[test]
fn corrupt_descriptors_are_told_apart_from_holes() {
    let mem = memory();
    let zlib = Codec::Zlib.encode(&mem.pages[&7][..]);
    let zstd = Codec::Zstd.encode(&mem.pages[&7][..]);
    let mut bad_sum = zlib.clone();
    *bad_sum.last_mut().unwrap() ^= 1;
    let short = Codec::Zlib.encode(&mem.pages[&7][..4000]);
    let long = Codec::Zlib.encode(&[&mem.pages[&7][..], &[1, 2, 3]].concat());
    let len = |v: &Vec<u8>| v.len() as u32;
    // What, size, flags, stored bytes, offset if not where they are stored, kind of hole.
    type Case = (&'static str, u32, u32, Vec<u8>, Option<u64>, &'static str);
    let cases: Vec<Case> = vec![
        ("size 0, compressed", 0, FLAG_ZLIB, vec![], None, "corrupt"),
        ("size 0, raw", 0, 0, vec![], None, "corrupt"),
        ("raw, half a page", 2048, 0, vec![1; 2048], None, "corrupt"),
        ("raw, more than a page", 4097, 0, vec![1; 4097], None, "corrupt"),
        ("size beyond a block", 9000, FLAG_ZLIB, zlib.clone(), None, "corrupt"),
        ("size of 4 GiB", u32::MAX, FLAG_ZLIB, zlib.clone(), None, "corrupt"),
        ("unknown codec", len(&zlib), 0x40, zlib.clone(), None, "corrupt"),
        ("zlib cut short", len(&zlib) - 5, FLAG_ZLIB, zlib.clone(), None, "corrupt"),
        ("zlib with a wrong checksum", len(&bad_sum), FLAG_ZLIB, bad_sum, None, "corrupt"),
        ("zlib of less than a page", len(&short), FLAG_ZLIB, short, None, "corrupt"),
        ("zlib of more than a page", len(&long), FLAG_ZLIB, long, None, "corrupt"),
        ("zlib of noise", 500, FLAG_ZLIB, Rng::new(8).bytes(500), None, "corrupt"),
        ("zstd cut short", len(&zstd) - 5, FLAG_ZSTD, zstd.clone(), None, "corrupt"),
        ("zstd said to be zlib", len(&zstd), FLAG_ZLIB, zstd, None, "corrupt"),
        ("zstd of noise", 500, FLAG_ZSTD, Rng::new(8).bytes(500), None, "corrupt"),
        ("data beyond the file", len(&zlib), FLAG_ZLIB, zlib.clone(), Some(1 << 30), "truncated"),
        (
            "data across the end of the offset range",
            len(&zlib),
            FLAG_ZLIB,
            zlib.clone(),
            Some(u64::MAX - 3),
            "any",
        ),
        ("negative offset", len(&zlib), FLAG_ZLIB, zlib.clone(), Some(1 << 63), "any"),
        ("data in the header", 4096, 0, vec![], Some(8), "any"),
    ];
    for (what, size, flags, stored, offset, kind) in cases {
        for pfn in [1, 7, 70] {
            let mut builder = kdump(Codec::Zlib);
            builder.slots.insert(pfn, Slot::Broken { size, flags, stored: stored.clone(), offset });
            let file = builder.build();
            let (_file, dump) = must_open(what, &file.bytes);
            let mut page = [0; 4096];
            let got = dump.read_phys(PhysAddr(pfn * 4096), &mut page);
            if kind == "any" && what == "data in the header" && got.stopped.is_none() {
                continue;
            }
            let error = got.stopped.unwrap_or_else(|| panic!("{what}, frame {pfn}: read without error"));
            assert_eq!(error.at, PhysAddr(pfn * 4096), "{what}, frame {pfn}");
            let told = error.why.kind();
            if kind == "any" {
                assert!(matches!(told, "corrupt" | "truncated"), "{what}, frame {pfn}: {error}");
            } else {
                assert_eq!(told, kind, "{what}, frame {pfn}: {error}");
            }
            // Every other frame is as good as ever.
            let told = match told {
                "corrupt" => "corrupt",
                _ => "truncated",
            };
            Model::of(&mem).hole(pfn, told).check(&format!("{what}, frame {pfn}"), &dump);
        }
    }
}

// ---------------------------------------------------------------- truncation

/// Opens the first `len` bytes; whatever can be read must be right, and what was lost must be called lost.
fn check_cut(
    what: &str,
    file: &TempFile,
    bytes: &[u8],
    len: usize,
    model: &Model,
    intact: &dyn Fn(u64) -> bool,
) {
    file.rewrite(&bytes[..len]);
    let what = format!("{what} cut to {len:#x} of {:#x}", bytes.len());
    let dump = match open(file.path()) {
        Ok(dump) => dump,
        Err(text) => {
            assert!(!text.is_empty(), "{what}");
            return;
        }
    };
    let mut lost = 0;
    for pfn in 0..model.end_pfn() {
        let mut page = [0x5a; 4096];
        let got = dump.read_phys(PhysAddr(pfn * 4096), &mut page);
        let (want, hole) = model.read(pfn * 4096, 4096);
        match (got.stopped, hole) {
            (None, None) => assert!(page[..] == want[..], "{what}: frame {pfn} differs"),
            (None, Some(_)) => panic!("{what}: frame {pfn} is a hole, yet was read"),
            (Some(error), Some((_, kind))) => {
                assert!(error.why.kind() == kind || error.why.kind() == "truncated", "{what}: {error}");
                assert_eq!(got.filled, 0, "{what}");
            }
            (Some(error), None) => {
                assert!(got.filled < 4096 && error.at.0 == pfn * 4096 + got.filled as u64, "{what}: {error}");
                assert!(page[..got.filled] == want[..got.filled], "{what}: frame {pfn} differs");
                assert!(
                    matches!(error.why.kind(), "truncated" | "corrupt"),
                    "{what}: lost, but says {error}"
                );
                assert!(!intact(pfn), "{what}: frame {pfn} lies before the cut, but: {error}");
                lost += 1;
            }
        }
    }
    if lost > 0 {
        assert!(!dump.problems().is_empty(), "{what}: {lost} frames lost and no word of it");
    }
}

fn cuts(boundaries: &[u64], len: usize, seed: u64) -> Vec<usize> {
    let mut rng = Rng::new(seed);
    let mut all: Vec<usize> = boundaries
        .iter()
        .flat_map(|&b| [b.saturating_sub(1), b, b + 1])
        .map(|at| at as usize)
        .chain((0..120).map(|_| rng.below(len as u64) as usize))
        .chain([len * 2 / 3, len - 1, len])
        .filter(|&at| at <= len)
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

#[test]
fn truncated_elf_files() {
    let mem = memory();
    for extended_count in [false, true] {
        let core = ElfCore { extended_count, ..ElfCore::of(&mem).with_notes(core_notes()) };
        let built = core.build();
        let file = TempFile::new(&[]);
        for len in cuts(&built.boundaries(), built.bytes.len(), 1) {
            let intact = |pfn: u64| {
                core.segments.iter().zip(&built.segments).any(|(segment, range)| {
                    let from = (pfn * 4096).checked_sub(segment.paddr);
                    from.is_some_and(|from| {
                        from < segment.memsz && range.start + from + 4096 <= (len as u64).min(range.end)
                    })
                })
            };
            check_cut("elf", &file, &built.bytes, len, &Model::of(&mem), &intact);
        }
    }
}

#[test]
fn truncated_kdump_files() {
    let mem = memory();
    for (what, builder) in [
        ("kdump", kdump(Codec::Zlib)),
        ("kdump, raw", kdump(Codec::Raw)),
        ("kdump, level 31", Kdump { dump_level: 31, ..kdump(Codec::Zstd) }),
        ("kdump of QEMU", kdump(Codec::Zlib).qemu()),
    ] {
        let mut builder = builder;
        let mut model = Model::of(&mem);
        if what == "kdump, level 31" {
            builder.slots.insert(8, Slot::Excluded);
            builder.slots.insert(40, Slot::Excluded);
            model = model.hole(8, "excluded").hole(40, "excluded");
        }
        let built = builder.build();
        let file = TempFile::new(&[]);
        for len in cuts(&built.boundaries(), built.bytes.len(), 2) {
            let intact = |pfn: u64| built.data_of.get(&pfn).is_some_and(|data| data.end <= len as u64);
            check_cut(what, &file, &built.bytes, len, &model, &intact);
        }
    }
}

#[test]
fn truncated_flattened_files() {
    let mem = memory();
    let model = Model::of(&mem);
    for (what, source) in [
        ("flattened kdump", kdump(Codec::Zlib).build().bytes),
        ("flattened elf", ElfCore::of(&mem).build().bytes),
    ] {
        for (how, flatten) in flattenings() {
            if flatten.record_size < 100 || flatten.overlap {
                continue; // Overlapping records make an early cut hold the earlier bytes, which no reader can tell.
            }
            let built = flatten.apply(&source);
            let file = TempFile::new(&[]);
            for len in cuts(&built.boundaries(), built.bytes.len(), 3) {
                if flatten.header_last && len > 8192 && len < built.bytes.len() {
                    continue; // The junk header is all there is.
                }
                check_cut(&format!("{what}, {how},"), &file, &built.bytes, len, &model, &|_| false);
            }
        }
    }
}

#[test]
fn a_cut_kdump_keeps_what_lies_before_the_cut() {
    // What a full disk leaves behind: two thirds of a dump must still be worth opening.
    let built = kdump(Codec::Raw).build();
    let len = built.bytes.len() * 2 / 3;
    let (_file, dump) = must_open("two thirds", &built.bytes[..len]);
    let intact = built.data_of.values().filter(|data| data.end <= len as u64).count();
    let mut page = [0; 4096];
    let readable = built
        .data_of
        .keys()
        .filter(|&&pfn| dump.read_phys_exact(PhysAddr(pfn * 4096), &mut page).is_ok())
        .count();
    assert_eq!(readable, intact);
    assert!(intact > 15, "the cut leaves {intact} pages");
}

// ---------------------------------------------------------------- damage

/// Reads everything a dump offers. Contents are not judged.
fn exercise(dump: &Dump, end_pfn: u64) {
    let mut page = [0; 4096];
    for pfn in 0..end_pfn + 2 {
        let got = dump.read_phys(PhysAddr(pfn * 4096), &mut page);
        assert_eq!(got.stopped.is_none(), got.filled == 4096);
    }
    let _ = dump.read_phys(PhysAddr(0x800), &mut vec![0; 1 << 20]);
    let _ = (dump.ranges().len(), dump.saved_cpus().len(), dump.facts(), dump.problems());
    let _ = (dump.vmcoreinfo_note(), dump.phys_base_hints());
}

#[test]
fn flipped_bits_never_panic() {
    let mut rng = Rng::new(0xb17f11b5);
    let mut sources: Vec<(String, Vec<u8>, u64)> = Vec::new();
    for (what, bytes, model) in all_formats() {
        if ["elf", "elf, counted in section 0", "kdump, Zlib", "kdump, Zstd", "kdump of QEMU, Zstd"]
            .contains(&&*what)
        {
            let flat = Flatten { shuffle: true, ..Flatten::default() }.apply(&bytes).bytes;
            sources.push((format!("flattened {what}"), flat, model.end_pfn()));
            sources.push((what, bytes, model.end_pfn()));
        }
    }
    for (what, bytes, end_pfn) in sources {
        let file = TempFile::new(&[]);
        for round in 0..300 {
            let mut damaged = bytes.clone();
            // Mostly in the headers and tables, where it hurts.
            let reach = if rng.chance(3, 4) { damaged.len().min(20_000) } else { damaged.len() } as u64;
            let mut places = Vec::new();
            for _ in 0..1 + rng.below(4) {
                let at = rng.below(reach) as usize;
                damaged[at] ^= 1 << rng.below(8);
                places.push(at);
            }
            file.rewrite(&damaged);
            let result = std::panic::catch_unwind(|| {
                if let Ok(dump) = open(file.path()) {
                    exercise(&dump, end_pfn);
                }
            });
            assert!(result.is_ok(), "{what}, round {round}: panic with bits flipped at {places:x?}");
        }
    }
}

#[test]
fn extreme_fields_never_panic_or_exhaust_memory() {
    let extremes: [u64; 10] =
        [0, 1, 7, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 40, i64::MAX as u64, 1 << 63, u64::MAX];
    let elf = ElfCore { extended_count: true, ..ElfCore::of(&memory()).with_notes(core_notes()) }.build();
    let kdump = kdump(Codec::Zlib).build();
    let flat = Flatten::default().apply(&kdump.bytes);
    let mut fields: Vec<(&str, &[u8], usize, usize)> = Vec::new();
    // (file, offset, width) of every header field that counts, sizes or locates something.
    for (at, width) in [(32, 8), (40, 8), (54, 2), (56, 2), (58, 2), (60, 2)] {
        fields.push(("elf", &elf.bytes, at, width));
    }
    for header in 0..3 {
        for at in [8, 16, 24, 32, 40, 48] {
            fields.push(("elf", &elf.bytes, elf.program_headers.start as usize + header * 56 + at, 8));
        }
    }
    let section = elf.section_header.clone().unwrap().start as usize;
    fields.extend([("elf", &elf.bytes[..], section + 32, 8), ("elf", &elf.bytes[..], section + 44, 4)]);
    for at in [0, 4] {
        fields.push(("elf", &elf.bytes, elf.notes.start as usize + at, 4));
    }
    for at in [8, 428, 432, 436, 440, 444, 448, 460] {
        fields.push(("kdump", &kdump.bytes, at, 4));
    }
    for (at, width) in [(0, 8), (8, 4), (12, 4)] {
        fields.push(("kdump", &kdump.bytes, 4096 + at, width));
    }
    for at in (16..104).step_by(8) {
        fields.push(("kdump", &kdump.bytes, 4096 + at, 8));
    }
    for (at, width) in [(0, 8), (8, 4), (12, 4)] {
        fields.push(("kdump", &kdump.bytes, kdump.descriptors.start as usize + at, width));
    }
    for record in [0, 1, flat.records.len() - 1] {
        for at in [0, 8] {
            fields.push(("flattened", &flat.bytes, flat.records[record].stream_offset as usize + at, 8));
        }
    }
    fields.extend([("flattened", &flat.bytes[..], 16, 8), ("flattened", &flat.bytes[..], 24, 8)]);
    let file = TempFile::new(&[]);
    for (what, bytes, at, width) in fields {
        for value in extremes {
            let mut damaged = bytes.to_vec();
            let encoded = if what == "flattened" { value.to_be_bytes() } else { value.to_le_bytes() };
            damaged[at..at + width].copy_from_slice(&encoded[..width]);
            file.rewrite(&damaged);
            let result = std::panic::catch_unwind(|| {
                if let Ok(dump) = open(file.path()) {
                    exercise(&dump, 72);
                }
            });
            assert!(result.is_ok(), "{what}: panic with {value:#x} ({width} bytes) at {at:#x}");
        }
    }
}

#[test]
fn damaged_zlib_pages_are_never_returned() {
    // zlib streams carry a checksum, so damage to a page or to its descriptor can always be told.
    let mut rng = Rng::new(0xda7a);
    let mut mem = FlatMemory::new();
    for pfn in 1..40 {
        mem.pages.insert(pfn, rng.text_page());
    }
    let built = Kdump::of(&mem).codec(Codec::Zlib).build();
    let starts: Vec<u64> = built.data_of.values().map(|data| data.start).collect();
    let file = TempFile::new(&[]);
    let mut told = 0;
    for round in 0..600u64 {
        let mut damaged = built.bytes.clone();
        let (&pfn, data) = built.data_of.iter().nth(rng.below(built.data_of.len() as u64) as usize).unwrap();
        let at = if round % 3 == 0 {
            built.descriptor_of[&pfn] + rng.below(16)
        } else {
            data.start + rng.below(data.end - data.start)
        } as usize;
        let bit = rng.below(8);
        damaged[at] ^= 1 << bit;
        let offset = built.descriptor_of[&pfn] as usize;
        let now = u64::from_le_bytes(damaged[offset..offset + 8].try_into().unwrap());
        if now != data.start && starts.contains(&now) {
            continue; // It now is another page's descriptor, and a sound one.
        }
        file.rewrite(&damaged);
        let dump = open(file.path()).unwrap_or_else(|e| panic!("bit {bit} at {at:#x}: {e}"));
        for (&other, want) in &mem.pages {
            let mut page = [0; 4096];
            let got = dump.read_phys(PhysAddr(other * 4096), &mut page);
            match got.stopped {
                None => {
                    assert!(page[..] == want[..], "bit {bit} at {at:#x}: frame {other} is wrong, silently")
                }
                Some(error) => {
                    assert_eq!(other, pfn, "bit {bit} at {at:#x}: {error}");
                    assert!(matches!(error.why.kind(), "corrupt" | "truncated"), "{error}");
                    told += 1;
                }
            }
        }
    }
    assert!(told > 400, "only {told} of the damaged pages were told");
}

/// Both tools write the page data right behind the descriptors, and the first page's data or the shared zero page
/// comes first in it. So the file says twice how many descriptors there are, and a bitmap with a bit too many or too
/// few, which would give every later frame another frame's data, can be told.
#[test]
fn a_bitmap_that_miscounts_the_descriptors_is_noticed() {
    let mem = memory();
    for (what, builder) in [
        ("kdump", kdump(Codec::Zlib)),
        ("kdump, level 31", Kdump { dump_level: 31, ..kdump(Codec::Zlib) }),
        ("kdump of QEMU", kdump(Codec::Zlib).qemu()),
    ] {
        let built = builder.build();
        for pfn in [0u64, 3, 14, 30, 50] {
            let mut damaged = built.bytes.clone();
            for bitmap in [&built.bitmap1, &built.bitmap2] {
                let at = bitmap.start as usize + (pfn / 8) as usize;
                let bit = 1 << (pfn % 8);
                if bitmap == &built.bitmap2 {
                    damaged[at] ^= bit;
                } else {
                    damaged[at] |= bit;
                }
            }
            let (_file, dump) = open_bytes(&damaged);
            let Ok(dump) = dump else { continue };
            let wrong = mem.pages.iter().filter(|(other, want)| {
                let mut page = [0; 4096];
                let got = dump.read_phys(PhysAddr(**other * 4096), &mut page);
                **other != pfn && got.stopped.is_none() && page[..] != want[..]
            });
            let wrong = wrong.count();
            assert!(
                wrong == 0 || !dump.problems().is_empty(),
                "{what}: bit of frame {pfn} flipped: {wrong} frames are wrong and no word of it"
            );
        }
    }
}

#[test]
fn odd_flattened_streams() {
    let source = kdump(Codec::Zlib).build().bytes;
    let sound = Flatten::default().apply(&source).bytes;
    // What follows the end mark is not part of the stream.
    let trailing = [&sound[..], &flattened_record(0, &[0xff; 4096])].concat();
    let (_file, dump) = must_open("trailing", &trailing);
    Model::of(&memory()).check("trailing", &dump);
    // Another type or version is another format.
    for (at, value) in [(16, 0u64), (16, 2), (24, 0), (24, 2), (24, 1 << 56)] {
        let mut other = sound.clone();
        other[at..at + 8].copy_from_slice(&value.to_be_bytes());
        let (_file, dump) = open_bytes(&other);
        assert!(dump.is_err(), "field at {at} = {value:#x}: opened");
    }
    // Negative sizes and offsets that are not the end mark.
    for (offset, size) in [(0i64, -1i64), (-1, 16), (-2, -2), (i64::MIN, 8), (0, i64::MAX), (i64::MAX, 4096)]
    {
        let mut odd = flattened::header();
        odd.extend_from_slice(&offset.to_be_bytes());
        odd.extend_from_slice(&size.to_be_bytes());
        odd.extend_from_slice(&sound[flattened::HEADER_SIZE..]);
        let (_file, dump) = open_bytes(&odd);
        if let Ok(dump) = dump {
            assert!(!dump.problems().is_empty(), "record of {size} at {offset}: no word of it");
            exercise(&dump, 72);
        }
    }
}

fn flattened_record(offset: i64, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    flattened::record(&mut out, offset, data);
    out
}

// ---------------------------------------------------------------- split sets

#[test]
fn one_part_of_a_split_set_is_right_about_its_own_frames() {
    let mem = memory();
    for (from, to) in [(0, 10), (10, 30), (30, 71)] {
        for version in [2, 6] {
            let part = Kdump { split: Some(from..to), version, ..kdump(Codec::Zlib) };
            let (_file, dump) = open_bytes(&part.build().bytes);
            let dump = match dump {
                Ok(dump) => dump,
                Err(error) => {
                    // Refusing a part is right too, if it says so and what to do.
                    assert!(error.contains("split") && error.contains("part"), "{error}");
                    continue;
                }
            };
            for (&pfn, want) in &mem.pages {
                let mut page = [0; 4096];
                let got = dump.read_phys(PhysAddr(pfn * 4096), &mut page);
                match got.stopped {
                    None => {
                        assert!((from..to).contains(&pfn), "part {from}..{to}: frame {pfn} is elsewhere");
                        assert!(page[..] == want[..], "part {from}..{to}: frame {pfn} differs");
                    }
                    Some(error) => {
                        assert!(!(from..to).contains(&pfn), "part {from}..{to}: {error}");
                        assert_ne!(error.why, Unreadable::NotRam, "part {from}..{to}, frame {pfn}");
                    }
                }
            }
            let text = dump.problems().join("\n");
            assert!(text.contains("split") || text.contains("part"), "part {from}..{to}: {text:?}");
        }
    }
}

// ---------------------------------------------------------------- refusals

#[test]
fn files_that_are_no_dump_are_refused_with_a_reason() {
    let mem = memory();
    let elf = ElfCore::of(&mem).with_notes(core_notes());
    let with = |change: &dyn Fn(&mut Kdump)| {
        let mut builder = kdump(Codec::Zlib);
        change(&mut builder);
        builder.build().bytes
    };
    // Each with words of which the message must hold at least one.
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["empty", "short", "ends"]),
        ("three bytes", b"\x7fEL".to_vec(), &["short", "ends", "not a", "format"]),
        (
            "text",
            b"#!/bin/sh\necho hello, this is no dump\n".repeat(500),
            &["not a", "format", "unknown", "recognised"],
        ),
        ("zeros", vec![0; 1 << 16], &["not a", "format", "unknown", "recognised", "zero", "raw memory"]),
        ("noise", Rng::new(1).bytes(1 << 16), &["not a", "format", "unknown", "recognised"]),
        (
            "32-bit ELF",
            ElfCore { machine: elf_core::EM_386, ..elf.clone() }.build_32bit(),
            &["32-bit", "32 bit", "class", "i386"],
        ),
        (
            "big-endian ELF",
            ElfCore { data: 2, ..elf.clone() }.build().bytes,
            &["endian", "byte order", "data 2"],
        ),
        (
            "ELF of arm64",
            ElfCore { machine: elf_core::EM_AARCH64, ..elf.clone() }.build().bytes,
            &["aarch64", "arm64", "machine", "architecture"],
        ),
        (
            "ELF program",
            ElfCore { kind: elf_core::ET_EXEC, ..elf.clone() }.build().bytes,
            &["core", "executable", "vmlinux"],
        ),
        ("kdump of arm64", with(&|k| k.utsname[4] = "aarch64".into()), &["aarch64"]),
        ("gzip", [&b"\x1f\x8b\x08\x00"[..], &[7; 5000]].concat(), &["gzip", "compressed"]),
        ("flattened nothing", flattened::header(), &["flattened", "empty", "ends", "short", "record"]),
        (
            "flattened text",
            Flatten::default().apply(&b"no dump at all\n".repeat(600)).bytes,
            &["not a", "format", "unknown", "recognised"],
        ),
    ];
    for (what, bytes, words) in cases {
        let (_file, dump) = open_bytes(&bytes);
        let Err(text) = dump else { panic!("{what}: opened") };
        assert!(words.iter().any(|word| text.contains(word)), "{what}: none of {words:?} in {text:?}");
        assert!(!text.contains('\n') && !text.ends_with('.'), "{what}: {text:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().to_owned(), dir.path().join("missing"), "/dev/null".into(), "/dev/zero".into()] {
        let Err(text) = open(&path) else { panic!("{path:?}: opened") };
        assert!(!text.is_empty());
    }
}

/// The format's ancestor has the same header, bitmaps and descriptors, but another sub header.
#[test]
fn a_diskdump_file_is_refused_or_read_without_its_sub_header() {
    let builder =
        Kdump { signature: *b"DISKDUMP", phys_base: 0x1340_0000, notes: Vec::new(), ..kdump(Codec::Zlib) };
    let (_file, dump) = open_bytes(&builder.build().bytes);
    match dump {
        Err(error) => assert!(error.to_lowercase().contains("diskdump"), "{error}"),
        Ok(dump) => {
            Model::of(&memory()).check("diskdump", &dump);
            assert_eq!(dump.vmcoreinfo_note(), None);
            assert_eq!(dump.phys_base_hints(), Vec::<u64>::new());
            assert!(dump.saved_cpus().is_empty());
        }
    }
}

#[test]
fn header_fields_that_make_no_sense_are_refused_or_survived() {
    let sound = kdump(Codec::Zlib).build().bytes;
    for (what, at, width, value) in [
        ("block size 0", 428, 4, 0u64),
        ("block size 1", 428, 4, 1),
        ("block size 4095", 428, 4, 4095),
        ("sub header of 0 blocks", 432, 4, 0),
        ("bitmap of 0 blocks", 436, 4, 0),
        ("bitmap of 1 block", 436, 4, 1),
        ("bitmaps beyond the file", 436, 4, 0x7fff_fffe),
    ] {
        let mut bytes = sound.clone();
        bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        let (_file, dump) = open_bytes(&bytes);
        let Err(text) = dump else { panic!("{what}: opened") };
        assert!(!text.is_empty(), "{what}");
    }
}

/// The writers themselves: a codec under test must really be used, and shrink.
#[test]
fn the_written_pages_really_are_compressed() {
    for codec in Codec::ALL {
        let file = kdump(codec).build();
        let flags: Vec<u32> = file
            .descriptor_of
            .values()
            .map(|&at| u32::from_le_bytes(file.bytes[at as usize + 12..at as usize + 16].try_into().unwrap()))
            .collect();
        let used = flags.iter().filter(|&&flag| flag == codec.flag()).count();
        assert!(used > flags.len() / 2, "{codec:?}: {used} of {} pages", flags.len());
        if codec != Codec::Raw {
            let raw = kdump(Codec::Raw).build().bytes.len();
            assert!(file.bytes.len() < raw * 2 / 3, "{codec:?}: {} of {raw} bytes", file.bytes.len());
        }
    }
}
