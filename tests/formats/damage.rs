//! Dumps that are damaged or were never one: refused, or read without a wrong byte.

use super::*;

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
