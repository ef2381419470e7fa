//! Memory that a dump lacks: holes, and what was cut off or excluded.

use super::*;

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
