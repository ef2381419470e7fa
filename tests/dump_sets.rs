//! What the user may name: parts of a split dump in any order, raw images, LiME images; and what must be refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::PhysAddr;
use kstub::backend::{Backend, Dump};
use kstub::memory::{PhysicalMemory, Unreadable};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use support::elf_core::ElfCore;
use support::flattened::Flatten;
use support::kdump::{Codec, Kdump, STATUS_INCOMPLETE, Slot};
use support::{FlatMemory, Model, Rng, TempFile, lime, notes};

const INFO: &str = "OSRELEASE=6.1.0-test-amd64\nPAGESIZE=4096\n";
/// Where the parts of the sets under test end; the second is the page frame of no page.
const ENDS: [u64; 3] = [10, 14, 30];

/// Frames 1–12, 16–40, 70.
fn memory() -> FlatMemory {
    let mut rng = Rng::new(0x5e7);
    let mut mem = FlatMemory::new();
    mem.add_varied(1, 12, &mut rng);
    mem.add_varied(16, 25, &mut rng);
    mem.add_varied(70, 1, &mut rng);
    mem.pages.insert(5, Box::new([0; 4096]));
    mem.pages.insert(20, Box::new([0; 4096]));
    mem
}

fn kdump(codec: Codec) -> Kdump {
    let notes = notes::kernel_notes(&[notes::CpuValues::distinct(0)], Some(INFO));
    let mut kdump =
        Kdump { notes, vmcoreinfo: INFO.into(), dump_level: 31, ..Kdump::of(&memory()).codec(codec) };
    kdump.slots.insert(8, Slot::Excluded);
    kdump
}

fn model() -> Model {
    Model::of(&memory()).hole(8, "excluded")
}

/// Writes files into a directory of their own.
fn files(contents: &[Vec<u8>]) -> (TempFile, Vec<PathBuf>) {
    let home = TempFile::new(b"not a dump");
    let paths =
        contents.iter().enumerate().map(|(i, bytes)| home.sibling(&format!("part{i}"), bytes)).collect();
    (home, paths)
}

fn open(paths: &[PathBuf]) -> Result<Dump, String> {
    let arguments: Vec<OsString> = paths.iter().map(|path| path.clone().into_os_string()).collect();
    Dump::open_arguments(&arguments).map_err(|error| error.to_string())
}

fn refused(paths: &[PathBuf], words: &[&str]) -> String {
    let Err(text) = open(paths) else { panic!("opened: {paths:?}") };
    for word in words {
        assert!(text.contains(word), "{word:?} in {text:?}");
    }
    assert!(!text.contains('\n') && !text.ends_with('.'), "{text:?}");
    text
}

fn fact(dump: &Dump, name: &str) -> String {
    dump.facts().into_iter().find(|fact| fact.name == name).map(|fact| fact.value).unwrap_or_default()
}

fn build(parts: &[Kdump]) -> Vec<Vec<u8>> {
    parts.iter().map(|part| part.build().bytes).collect()
}

// ---------------------------------------------------------------- split sets

#[test]
fn split_sets_in_any_order_are_the_whole_dump() {
    let mut rng = Rng::new(1);
    for codec in Codec::ALL {
        for version in [2, 5, 6] {
            for flattened in [false, true] {
                let what = format!("{codec:?}, version {version}, flattened {flattened}");
                let mut parts = build(&Kdump { version, ..kdump(codec) }.parts(&ENDS));
                if flattened {
                    let flatten = Flatten { shuffle: true, ..Flatten::default() };
                    parts = parts.iter().map(|part| flatten.apply(part).bytes).collect();
                }
                let (_home, mut paths) = files(&parts);
                for _ in 0..3 {
                    rng.shuffle(&mut paths);
                    let dump = open(&paths).unwrap_or_else(|error| panic!("{what}: {error}"));
                    model().check(&what, &dump);
                    assert_eq!(dump.problems(), Vec::<String>::new(), "{what}");
                    assert_eq!((fact(&dump, "parts"), fact(&dump, "complete")), ("4".into(), "yes".into()));
                    assert_eq!(dump.vmcoreinfo_note().is_some(), version >= 3, "{what}");
                    assert_eq!(dump.saved_cpus().len(), usize::from(version >= 4), "{what}");
                }
            }
        }
    }
}

#[test]
fn mutation_swapped_windows_are_noticed() {
    // The comparison must tell a set whose parts claim each other's frames: so it does look at every part.
    let mut parts = kdump(Codec::Raw).parts(&[20]);
    parts[0].slots.insert(3, Slot::Data(Rng::new(2).noise_page()));
    let (_home, paths) = files(&build(&parts));
    let dump = open(&paths).unwrap();
    assert!(model().compare(&dump).is_err());
    let mut parts = kdump(Codec::Raw).parts(&[20]);
    parts[1].slots.insert(33, Slot::Data(Rng::new(2).noise_page()));
    let (_home, paths) = files(&build(&parts));
    assert!(model().compare(&open(&paths).unwrap()).is_err());
}

#[test]
fn one_part_that_holds_everything_is_complete() {
    let (_home, paths) = files(&build(&kdump(Codec::Zlib).parts(&[])));
    let dump = open(&paths).unwrap();
    model().check("one part", &dump);
    assert_eq!(dump.problems(), Vec::<String>::new());
}

#[test]
fn a_missing_part_is_named_by_its_pages() {
    let parts = kdump(Codec::Zstd).parts(&ENDS);
    let all = build(&parts);
    for (lost, part) in parts.iter().enumerate() {
        let window = part.split.clone().unwrap();
        let kept: Vec<_> = (0..all.len()).filter(|&i| i != lost).map(|i| all[i].clone()).collect();
        let (_home, paths) = files(&kept);
        let dump = open(&paths).unwrap();
        let mut model = model();
        let frames: Vec<u64> =
            memory().pages.keys().copied().filter(|pfn| window.contains(pfn) && *pfn != 8).collect();
        for pfn in &frames {
            model.holes.insert(*pfn, "missing-part");
        }
        model.check(&format!("part {lost} of {window:?}"), &dump);
        if frames.is_empty() {
            assert_eq!(dump.problems(), Vec::<String>::new(), "nothing was in it");
            continue;
        }
        assert_eq!(fact(&dump, "complete"), "no");
        let range = format!("pages {:#x} to {:#x}", window.start, window.end);
        assert!(dump.problems()[0].contains(&range), "{range}: {:?}", dump.problems());
        assert!(fact(&dump, "parts").contains(&format!("{:#x} to {:#x}", window.start, window.end)));
        let why = dump.read_phys(PhysAddr(frames[0] * 4096), &mut [0]).stopped.unwrap().why;
        assert_eq!(why, Unreadable::MissingPart { start_pfn: window.start, end_pfn: window.end });
    }
}

#[test]
fn forgotten_parts_are_pointed_out_and_not_opened() {
    for flattened in [false, true] {
        let mut parts = build(&kdump(Codec::Zlib).parts(&[10, 30]));
        // Beside them the parts of another dump, a whole dump, and a file of no kind at all.
        parts.extend(build(&Kdump { time: 5, ..kdump(Codec::Zlib) }.parts(&[10, 30])));
        parts.push(kdump(Codec::Zlib).build().bytes);
        if flattened {
            parts = parts.iter().map(|part| Flatten::default().apply(part).bytes).collect();
        }
        let (home, paths) = files(&parts);
        for named in [vec![0], vec![1], vec![2], vec![2, 0], vec![1, 2]] {
            let named: Vec<PathBuf> = named.iter().map(|&i: &usize| paths[i].clone()).collect();
            let list = format!("'{}' '{}' '{}'", paths[0].display(), paths[1].display(), paths[2].display());
            let text = refused(&named, &[&list, "part of a split dump", "name all"]);
            assert!(!text.contains("part3"), "{text}");
        }
        assert!(open(&paths[..3]).is_ok());
        std::fs::remove_file(&paths[1]).unwrap();
        assert!(open(&[paths[0].clone(), paths[2].clone()]).is_ok(), "nothing beside them would help");
        refused(&paths[..1], &["part0", "part2"]);
        drop(home);
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let sound = kdump(Codec::Zlib);
    let parts = build(&sound.parts(&[10, 30]));
    let (_home, paths) = files(&parts);
    let twice = [paths[0].clone(), paths[1].clone(), paths[0].clone(), paths[2].clone()];
    refused(&twice, &["same part", "pages 0x0 to 0xa", "once"]);
    let other = |change: &dyn Fn(&mut Kdump)| {
        let mut other = sound.clone();
        change(&mut other);
        other.parts(&[10, 30])[1].build().bytes
    };
    for (what, bytes, word) in [
        ("time", other(&|k| k.time += 1), "time"),
        ("machine", other(&|k| k.utsname[1] = "elsewhere".into()), "machine"),
        ("dump level", other(&|k| k.dump_level = 1), "dump level"),
        ("phys_base", other(&|k| k.phys_base = 2 << 20), "kernel address"),
        ("filter", other(&|k| _ = k.slots.insert(11, Slot::Excluded)), "bitmaps"),
        ("RAM", other(&|k| _ = k.slots.insert(50, Slot::Excluded)), "bitmaps"),
        ("size", other(&|k| _ = k.slots.insert(90, Slot::Excluded)), "size of memory"),
        ("overlap", sound.parts(&[9, 31])[1].build().bytes, "overlap"),
        ("version", other(&|k| k.version = 5), "machine"),
    ] {
        let (_home, paths) = files(&[parts[0].clone(), bytes, parts[2].clone()]);
        let text = refused(&paths, &["not parts of one dump", word]);
        assert!(text.contains("makedumpfile --split"), "{what}: {text}");
    }
    // Dumps of their own among them.
    let elf = ElfCore::of(&memory()).build().bytes;
    for whole in [sound.build().bytes, elf.clone(), lime::image(&[(0, vec![1; 4096])])] {
        let (_home, paths) = files(&[parts[0].clone(), whole.clone()]);
        refused(&paths, &["part1", "no part of a split dump"]);
        let (_home, paths) = files(&[whole.clone(), whole]);
        refused(&paths, &["no part of a split dump"]);
    }
    let (_home, paths) = files(&[parts[0].clone(), b"text".repeat(3000)]);
    refused(&paths, &["part1", "not a kernel dump"]);
    assert!(Dump::open_arguments(&[]).is_err() && Dump::open_parts(&[]).is_err());
}

#[test]
fn a_cut_part_costs_its_own_pages_only() {
    let parts = kdump(Codec::Zlib).parts(&[10, 30]);
    let built: Vec<_> = parts.iter().map(Kdump::build).collect();
    for cut in 0..built.len() {
        for len in built[cut].boundaries().into_iter().flat_map(|at| [at.saturating_sub(1), at, at + 1]) {
            let whole = built[cut].bytes.len() as u64;
            if len >= whole {
                continue;
            }
            let mut bytes: Vec<Vec<u8>> = built.iter().map(|part| part.bytes.clone()).collect();
            bytes[cut].truncate(len as usize);
            let (_home, paths) = files(&bytes);
            let Ok(dump) = open(&paths) else {
                assert!(len < 4096 + 104, "part {cut} cut to {len:#x} of {whole:#x}");
                continue;
            };
            assert_eq!(fact(&dump, "complete"), "no", "part {cut} cut to {len:#x} of {whole:#x}");
            assert!(
                dump.problems().iter().any(|text| text.contains(&format!("part{cut}'"))),
                "{:?}",
                dump.problems()
            );
            let mut model = model();
            for &pfn in memory().pages.keys().filter(|pfn| parts[cut].split.clone().unwrap().contains(pfn)) {
                let there = built[cut].data_of.get(&pfn).is_some_and(|data| data.end <= len)
                    && built[cut].descriptor_of[&pfn] + 16 <= len;
                if !there && pfn != 8 {
                    model.holes.insert(pfn, "truncated");
                }
            }
            for pfn in 0..75 {
                let what = format!("part {cut} cut to {len:#x}: frame {pfn}");
                model.compare_read(&dump, pfn * 4096, 8).unwrap_or_else(|error| panic!("{what}: {error}"));
            }
            assert_eq!(dump.saved_cpus().len(), 1, "another part has the notes");
        }
    }
}

#[test]
fn hostile_ranges_of_parts_never_panic() {
    let parts = kdump(Codec::Zlib).parts(&[10, 30]);
    let built = build(&parts);
    let extremes = [0, 1, 9, 11, 29, 31, 70, 71, 72, 1 << 32, 1 << 52, i64::MAX as u64, u64::MAX];
    for field in [4096 + 80, 4096 + 88] {
        for value in extremes {
            for part in 0..3 {
                let mut bytes = built.clone();
                bytes[part][field..field + 8].copy_from_slice(&u64::to_le_bytes(value));
                let (_home, paths) = files(&bytes);
                if let Ok(dump) = open(&paths) {
                    let mut buf = vec![0; 80 * 4096];
                    for pfn in 0..80 {
                        let _ = dump.read_phys(PhysAddr(pfn * 4096), &mut buf);
                    }
                }
            }
        }
    }
}

#[test]
fn a_part_that_ran_out_of_space_is_named() {
    let mut parts = kdump(Codec::Zlib).parts(&[10, 30]);
    parts[1].status = STATUS_INCOMPLETE;
    let mut built = parts[1].build();
    for pfn in [25, 26, 27, 28, 29] {
        let at = built.descriptor_of[&pfn] as usize;
        built.bytes[at..at + 24].fill(0);
    }
    let (_home, paths) = files(&[parts[0].build().bytes, built.bytes, parts[2].build().bytes]);
    let dump = open(&paths).unwrap();
    let model = (25..30).fold(model(), |model, pfn| model.hole(pfn, "truncated"));
    model.check("out of space", &dump);
    // Frames 10–12 and 16–29 were dumped.
    let text = dump.problems().join("\n");
    assert!(text.contains("part1' is marked as incomplete") && text.contains("12 of 17 pages"), "{text}");
}

// ---------------------------------------------------------------- raw images

fn raw(arguments: &[String]) -> Result<Dump, String> {
    let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
    Dump::open_arguments(&arguments).map_err(|error| error.to_string())
}

fn at(path: &Path, address: &str) -> String {
    format!("{}@{address}", path.display())
}

#[test]
fn raw_images_lie_where_the_user_says() {
    let mut mem = FlatMemory::new();
    mem.add_varied(0, 20, &mut Rng::new(3));
    mem.add_varied(0x10_0000, 9, &mut Rng::new(4));
    let runs = mem.runs();
    let (_home, paths) = files(&runs.iter().map(|(_, bytes)| bytes.clone()).collect::<Vec<_>>());
    for (low, high) in [("0", "100000000"), ("0x0", "0x100000000"), ("0X0", "0x0000000100000000")] {
        let mut arguments = vec![at(&paths[0], low), at(&paths[1], high)];
        for _ in 0..2 {
            let dump = raw(&arguments).unwrap();
            let model = Model::of(&mem);
            for pfn in (0..24).chain(0xf_fffe..0x10_000c) {
                for (from, len) in [(0, 4096), (100, 8), (4000, 200), (0, 20_000)] {
                    model.compare_read(&dump, pfn * 4096 + from, len).unwrap();
                }
            }
            let ranges: Vec<_> = dump.ranges().iter().map(|r| (r.start.0, r.end.0)).collect();
            assert_eq!(ranges, model.ranges());
            assert_eq!((fact(&dump, "format"), fact(&dump, "images")), ("raw".into(), "2".into()));
            assert_eq!((dump.problems(), dump.saved_cpus().len(), dump.vmcoreinfo_note()), (vec![], 0, None));
            arguments.reverse();
        }
        // Mutation: an address off by a page is noticed.
        let dump = raw(&[at(&paths[0], "0x1000"), at(&paths[1], high)]).unwrap();
        assert!(Model::of(&mem).compare_read(&dump, 0x2000, 4096).is_err());
    }
}

#[test]
fn raw_images_need_not_be_whole_pages() {
    let bytes = Rng::new(5).bytes(10_001);
    let (_home, paths) = files(&[bytes.clone(), vec![7; 100]]);
    let dump = raw(&[at(&paths[0], "123"), at(&paths[1], "2834")]).unwrap();
    let mut buf = vec![0; 20_000];
    let got = dump.read_phys(PhysAddr(0x123), &mut buf);
    assert_eq!((got.filled, &buf[..10_001]), (10_101, &bytes[..]));
    assert_eq!(buf[10_001..10_101], [7; 100]);
    let stopped = got.stopped.unwrap();
    assert_eq!((stopped.at.0, stopped.why), (0x123 + 10_101, Unreadable::NotRam));
    for (from, len) in [(0x123, 8), (0x1000, 8), (0xffc, 8), (0x2830, 8), (0x2890, 8)] {
        let got = dump.read_phys(PhysAddr(from), &mut buf[..len]);
        let want: Vec<u8> =
            bytes.iter().copied().chain([7; 100]).skip(from as usize - 0x123).take(len).collect();
        assert_eq!(&buf[..got.filled], &want[..], "{from:#x}");
    }
}

#[test]
fn arguments_with_an_at_sign() {
    let (home, paths) = files(&[ElfCore::of(&memory()).build().bytes, vec![1; 8192]]);
    // A file that is really called so wins.
    let named = home.sibling("dump@1000", &ElfCore::of(&memory()).build().bytes);
    Model::of(&memory()).check("named", &raw(&[named.display().to_string()]).unwrap());
    let image = home.sibling("ram@x@y", &[2; 4096]);
    assert_eq!(raw(&[at(&image, "0")]).unwrap().ranges().len(), 1);
    for (argument, words) in [
        (at(&paths[1], ""), ["hexadecimal", "FILE@PHYSADDR"]),
        (at(&paths[1], "0x"), ["hexadecimal", "FILE@PHYSADDR"]),
        (at(&paths[1], "+1000"), ["hexadecimal", "FILE@PHYSADDR"]),
        (at(&paths[1], "12g4"), ["hexadecimal", "FILE@PHYSADDR"]),
        (at(&paths[1], "-1"), ["hexadecimal", "FILE@PHYSADDR"]),
        (at(&paths[1], "0x10000000000000000"), ["no machine", "FILE@PHYSADDR"]),
        (at(&paths[1], "ffffffffffffffff"), ["no machine", "FILE@PHYSADDR"]),
        (at(&paths[1], "fffffffffffff"), ["beyond all memory", "FILE@PHYSADDR"]),
        (at(&home.dir().join("none"), "0"), ["cannot open", "none'"]),
        (at(&home.dir().join("none"), "zzz"), ["cannot open", "none@zzz'"]),
        (at(home.dir(), "0"), ["is a directory", ""]),
    ] {
        let text = raw(std::slice::from_ref(&argument)).err().unwrap_or_else(|| panic!("{argument}: opened"));
        assert!(words.iter().all(|word| text.contains(word)), "{argument}: {text}");
    }
    let both = [at(&paths[1], "0x1000"), at(&paths[1], "0x2000")];
    let text = raw(&both).err().unwrap();
    assert!(text.contains("both hold physical address 0x2000"), "{text}");
    assert!(raw(&[at(&paths[1], "0x1000"), at(&paths[1], "0x3000")]).is_ok());
    let mixed = raw(&[at(&paths[1], "0"), paths[0].display().to_string()]).err().unwrap();
    assert!(mixed.contains("part0'") && mixed.contains("FILE@PHYSADDR"), "{mixed}");
    // It is what the user said, but worth a word.
    let dump = raw(&[at(&paths[0], "0")]).unwrap();
    assert!(dump.problems()[0].contains("starts like a dump"), "{:?}", dump.problems());
    let plain = raw(&[paths[1].display().to_string()]).err().unwrap();
    assert!(plain.contains("FILE@PHYSADDR"), "{plain}");
}

// ---------------------------------------------------------------- LiME

#[test]
fn lime_images() {
    let mem = memory();
    let bytes = lime::image(&mem.runs());
    let (_home, paths) = files(&[bytes.clone(), Flatten::default().apply(&bytes).bytes]);
    for path in &paths {
        let dump = open(std::slice::from_ref(path)).unwrap();
        Model::of(&mem).check("lime", &dump);
        assert_eq!((fact(&dump, "format"), fact(&dump, "ranges")), ("lime".into(), "3".into()));
        assert_eq!((dump.problems(), fact(&dump, "complete")), (vec![], "yes".into()));
    }
    let mut wrong = Model::of(&mem);
    wrong.mem.pages.get_mut(&7).unwrap()[1] ^= 1;
    assert!(wrong.compare(&open(&paths[..1]).unwrap()).is_err());
}

#[test]
fn lime_images_cut_anywhere() {
    let mem = memory();
    let runs = mem.runs();
    let bytes = lime::image(&runs);
    let mut edges = vec![0];
    for (_, bytes) in &runs {
        edges.push(edges.last().unwrap() + lime::HEADER_SIZE);
        edges.push(edges.last().unwrap() + bytes.len());
    }
    let file = TempFile::new(&[]);
    for len in edges.iter().flat_map(|&at| [at.saturating_sub(1), at, at + 1, at + 4096, at + 5000]) {
        if len >= bytes.len() || len < lime::HEADER_SIZE {
            continue;
        }
        file.rewrite(&bytes[..len]);
        let dump = open(&[file.path().to_path_buf()]).unwrap();
        let whole_ranges = edges.contains(&len) && edges.iter().position(|&at| at == len).unwrap() % 2 == 0;
        // An image that ends after a range cannot be told from one that was made so.
        assert_eq!(dump.problems().is_empty(), whole_ranges, "{len}: {:?}", dump.problems());
        assert_eq!(fact(&dump, "complete") == "yes", whole_ranges, "{len}");
        let (mut offset, mut page) = (0, [0; 4096]);
        for (start, bytes) in &runs {
            offset += lime::HEADER_SIZE;
            let known = offset <= len;
            let held = len.saturating_sub(offset).min(bytes.len());
            for from in (0..bytes.len()).step_by(4096) {
                let got = dump.read_phys(PhysAddr(start + from as u64), &mut page);
                assert_eq!(got.filled, held.saturating_sub(from).min(4096), "{len}: {start:#x} + {from:#x}");
                assert_eq!(page[..got.filled], bytes[from..from + got.filled]);
                let kind = got.stopped.map(|error| error.why.kind());
                let lost = if known { "truncated" } else { "not-ram" };
                assert_eq!(kind, (got.filled < 4096).then_some(lost), "{len}: {start:#x} + {from:#x}");
            }
            offset += bytes.len();
        }
    }
}

#[test]
fn odd_lime_images() {
    let file = TempFile::new(&[]);
    let open_bytes = |parts: &[Vec<u8>]| {
        file.rewrite(&parts.concat());
        open(&[file.path().to_path_buf()])
    };
    let page = vec![3; 4096];
    let sound = [lime::header(1, 0x1000, 0x1fff), page.clone()].concat();
    let text = open_bytes(&[lime::header(2, 0, 0xfff), page.clone()]).err().unwrap();
    assert!(
        text.contains("LiME memory image of version 2") && text.contains("without compression"),
        "{text}"
    );
    let text = open_bytes(&[b"AVML\x02\0\0\0".to_vec(), page.clone()]).err().unwrap();
    assert!(text.contains("avml-convert"), "{text}");
    for (first, last) in [(1, 0), (0, u64::MAX), (u64::MAX, 0), (u64::MAX, u64::MAX)] {
        assert!(open_bytes(&[lime::header(1, first, last), page.clone()]).is_err(), "{first:#x} {last:#x}");
        let dump = open_bytes(&[sound.clone(), lime::header(1, first, last), page.clone()]).unwrap();
        assert!(dump.problems()[0].contains("offset 0x1020"), "{:?}", dump.problems());
        assert_eq!(dump.read_phys_u64(PhysAddr(0x1008)), Ok(0x0303_0303_0303_0303));
    }
    let dump = open_bytes(&[sound.clone(), page.clone()]).unwrap();
    assert!(dump.problems()[0].contains("no header of a range"), "{:?}", dump.problems());
    // A range that is far longer than the file costs nothing.
    let dump = open_bytes(&[lime::header(1, 0, (1 << 52) - 1), page.clone()]).unwrap();
    assert_eq!(dump.read_phys_u64(PhysAddr(8)), Ok(0x0303_0303_0303_0303));
    assert_eq!(dump.read_phys(PhysAddr(1 << 40), &mut [0]).stopped.unwrap().why.kind(), "truncated");
    // More ranges than any machine has.
    let tiny: Vec<Vec<u8>> = (0..70_000).map(|i| [lime::header(1, i * 2, i * 2), vec![9]].concat()).collect();
    let dump = open_bytes(&tiny).unwrap();
    assert!(dump.problems()[0].contains("ranges") && dump.ranges().len() == 1 << 16, "{:?}", dump.problems());
}

// ---------------------------------------------------------------- size

#[test]
fn a_million_program_headers_open_in_bounded_time() {
    let mut core = ElfCore { notes: None, ..ElfCore::default() };
    let noise = Rng::new(6).bytes(4096 + 8);
    // The same few bytes a million times over, in falling order and overlapping by half.
    let mut segments: Vec<_> = (0..1_000_000u64)
        .map(|i| support::elf_core::Segment::new(i * 2048, Vec::new()).memsz(4096).at(0, 4096))
        .collect();
    segments.reverse();
    core.segments = segments;
    let mut bytes = core.build().bytes;
    bytes.extend(&noise);
    let file = TempFile::new(&bytes);
    let start = std::time::Instant::now();
    let dump = open(&[file.path().to_path_buf()]).unwrap();
    let mut buf = vec![0; 1 << 20];
    assert_eq!(dump.read_phys(PhysAddr(1 << 30), &mut buf).filled, 1 << 20);
    let took = start.elapsed();
    eprintln!("a million program headers: {took:?}");
    assert!(took.as_secs() < 20, "{took:?}");
    assert_eq!(dump.ranges().len(), 1);
    // More than any dump has.
    let mut more = bytes.clone();
    let section = core.build().section_header.unwrap().start as usize;
    more[section + 44..section + 48].copy_from_slice(&u32::MAX.to_le_bytes());
    file.rewrite(&more);
    assert!(open(&[file.path().to_path_buf()]).is_err());
}
