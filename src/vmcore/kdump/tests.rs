//! Small compressed dumps, put together byte by byte.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::addr::PhysAddr;
use crate::memory::{ReadOutcome, Unreadable};
use std::sync::Arc;

const BLOCK: usize = 4096;

/// How a test page is stored.
#[derive(Clone, Copy, PartialEq)]
enum Page {
    Hole,
    Excluded,
    Raw,
    Zlib,
    Zstd,
    /// The shared page of zeros.
    Zero,
}
use Page::*;

fn contents(pfn: usize) -> Vec<u8> {
    (0..BLOCK).map(|i| (i / 16 * (pfn + 3)) as u8 | 1).collect()
}

struct Builder {
    pages: Vec<Page>,
    version: u32,
    status: u32,
    machine: &'static str,
    split: u32,
    notes: Vec<u8>,
}

impl Builder {
    fn new(pages: &[Page]) -> Self {
        let pages = pages.to_vec();
        Self { pages, version: 6, status: 1, machine: "x86_64", split: 0, notes: Vec::new() }
    }

    /// Block 0: header; 1: sub header and notes; 2, 3: bitmaps; 4: descriptors and pages.
    fn build(&self) -> Vec<u8> {
        let mut file = vec![0u8; BLOCK * 4];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, SIGNATURE);
        put(8, &self.version.to_le_bytes());
        put(142, b"6.1.0-test");
        put(272, self.machine.as_bytes());
        let count = self.pages.len() as u32;
        for (at, value) in [(424, self.status), (428, BLOCK as u32), (432, 1), (436, 2), (440, count)] {
            put(at, &value.to_le_bytes());
        }
        put(BLOCK, &0x20_0000u64.to_le_bytes());
        put(BLOCK + 8, &31u32.to_le_bytes());
        put(BLOCK + 12, &self.split.to_le_bytes());
        let notes_at = BLOCK as u64 + 104;
        for (at, value) in [
            (16, 1),
            (24, 9),
            (48, notes_at),
            (56, self.notes.len() as u64),
            (80, 2),
            (88, 7),
            (96, count.into()),
        ] {
            put(BLOCK + at, &value.to_le_bytes());
        }
        put(notes_at as usize, &self.notes);
        for (pfn, page) in self.pages.iter().enumerate() {
            let bit = 1u8 << (pfn % 8);
            if *page != Hole {
                file[2 * BLOCK + pfn / 8] |= bit;
            }
            if !matches!(page, Hole | Excluded) {
                file[3 * BLOCK + pfn / 8] |= bit;
            }
        }
        let dumped: Vec<usize> =
            (0..self.pages.len()).filter(|&pfn| !matches!(self.pages[pfn], Hole | Excluded)).collect();
        let zero_at = file.len() + dumped.len() * 24;
        let mut data = vec![0u8; BLOCK];
        let mut descriptors = Vec::new();
        for pfn in dumped {
            let page = contents(pfn);
            let (bytes, flags) = match self.pages[pfn] {
                Zero => (Vec::new(), 0),
                Zlib => {
                    let mut out = vec![0; 2 * BLOCK];
                    let mut zlib = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
                    let n = zlib.zlib_compress(&page, &mut out).unwrap();
                    (out[..n].to_vec(), 1u32)
                }
                Zstd => (zstd::bulk::compress(&page, 1).unwrap(), 0x20),
                _ => (page, 0),
            };
            let (offset, size) =
                if bytes.is_empty() { (zero_at, BLOCK) } else { (zero_at + data.len(), bytes.len()) };
            descriptors.extend((offset as u64).to_le_bytes());
            descriptors.extend((size as u32).to_le_bytes());
            descriptors.extend(flags.to_le_bytes());
            descriptors.extend(0u64.to_le_bytes());
            data.extend(bytes);
        }
        file.extend(descriptors);
        file.extend(data);
        file
    }
}

fn open(file: Vec<u8>) -> Result<Kdump, Error> {
    open_parts(vec![file])
}

fn open_parts(files: Vec<Vec<u8>>) -> Result<Kdump, Error> {
    let named = files.into_iter().enumerate();
    let source = |(i, file)| Source { path: format!("part{i}").into(), file: Arc::new(file) };
    Kdump::open(named.map(source).collect(), 1 << 20)
}

fn read(kdump: &Kdump, at: u64, len: usize) -> (ReadOutcome, Vec<u8>) {
    let mut buf = vec![0xaa; len];
    let outcome = kdump.pages().read_phys(PhysAddr(at), &mut buf);
    (outcome, buf)
}

fn why(kdump: &Kdump, pfn: u64) -> Unreadable {
    read(kdump, pfn * BLOCK as u64, 8).0.stopped.unwrap().why
}

const MIXED: [Page; 14] =
    [Zlib, Raw, Zero, Zero, Zstd, Excluded, Zlib, Zlib, Zlib, Zero, Raw, Raw, Hole, Zlib];

#[test]
fn pages_holes_and_the_difference_between_them() {
    let kdump = open(Builder::new(&MIXED).build()).unwrap();
    assert!(kdump.problems.is_empty() && kdump.complete, "{:?}", kdump.problems);
    for (pfn, page) in MIXED.iter().enumerate() {
        let (outcome, buf) = read(&kdump, (pfn * BLOCK) as u64 + 100, 50);
        match page {
            Hole => assert_eq!(outcome.stopped.unwrap().why, Unreadable::NotRam),
            Excluded => assert_eq!(outcome.stopped.unwrap().why, Unreadable::Excluded),
            Zero => assert_eq!(buf, [0; 50]),
            _ => assert_eq!(buf, &contents(pfn)[100..150]),
        }
    }
    assert_eq!(why(&kdump, 14), Unreadable::NotRam);
    assert_eq!(why(&kdump, u64::MAX / BLOCK as u64), Unreadable::NotRam);
    let ranges: Vec<_> = kdump.ranges().iter().map(|r| (r.start.0 / 4096, r.end.0 / 4096)).collect();
    assert_eq!(ranges, [(0, 12), (13, 14)]);
    assert_eq!(kdump.page_counts(), (12, 13));
    assert_eq!(kdump.phys_base_hint(), Some(0x20_0000));
    let facts = kdump.facts();
    assert!(facts.contains(&("compression", "mixed (zlib, zstd)".into())), "{facts:?}");
    assert!(facts.contains(&("dump level", "31 (excludes zero, cache, cache-private, user, free)".into())));
}

#[test]
fn every_read_equals_a_byte_by_byte_model() {
    let file = Builder::new(&MIXED).build();
    let truth: Vec<Option<u8>> = (0..MIXED.len() * BLOCK)
        .map(|at| match MIXED[at / BLOCK] {
            Hole | Excluded => None,
            Zero => Some(0),
            _ => Some(contents(at / BLOCK)[at % BLOCK]),
        })
        .collect();
    let warm = open(file.clone()).unwrap();
    for start in [0, 1, 4095, 4096, 2 * 4096, 5 * 4096, 6 * 4096, 6 * 4096 + 9, 9 * 4096, 13 * 4096] {
        for len in [0, 1, 4095, 4096, 4097, 3 * 4096, 5 * 4096 + 3, 14 * 4096] {
            let have = truth[start..].iter().take(len).map_while(|&byte| byte).collect::<Vec<u8>>();
            for kdump in [&warm, &open(file.clone()).unwrap()] {
                let (outcome, buf) = read(kdump, start as u64, len);
                assert_eq!(buf[..outcome.filled], have, "{start:#x} + {len:#x}");
                let stopped = outcome.stopped.map(|error| error.at.0);
                assert_eq!(stopped, (have.len() < len).then_some((start + have.len()) as u64));
            }
        }
    }
}

#[test]
fn damaged_descriptors_name_page_and_offset() {
    let file = Builder::new(&[Raw, Zlib, Zlib, Raw]).build();
    let descriptor = |pfn: usize| 4 * BLOCK + 24 * pfn;
    let with = |at: usize, bytes: &[u8]| {
        let mut file = file.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        open(file).unwrap()
    };
    for (field, bytes, what) in [
        (8, &9000u32.to_le_bytes()[..], "size 9000 exceeds block size 4096"),
        (8, &0u32.to_le_bytes()[..], "cannot be a page"),
        (0, &8u64.to_le_bytes()[..], "cannot be a page"),
        (12, &3u32.to_le_bytes()[..], "more than one codec"),
        (12, &0u32.to_le_bytes()[..], "bytes of none where a page has 4096"),
        (12, &0x20u32.to_le_bytes()[..], "zstd says"),
    ] {
        let kdump = with(descriptor(1) + field, bytes);
        for len in [8, 4096, 2 * 4096] {
            let (outcome, _) = read(&kdump, 4096, len);
            let Unreadable::Corrupt { what: said, .. } = outcome.stopped.unwrap().why else {
                unreachable!("{what}")
            };
            assert!(said.contains(what) && said.contains("pfn 0x1"), "{said}");
        }
        // What lies around it can be read.
        let (outcome, buf) = read(&kdump, 0, 4 * 4096);
        assert_eq!((outcome.filled, &buf[..4096]), (4096, &contents(0)[..]));
        assert_eq!(read(&kdump, 2 * 4096, 4096).1, contents(2));
        assert_eq!(read(&kdump, 3 * 4096, 4096).1, contents(3));
    }
    for offset in [u64::MAX, u64::MAX - 4096, 1 << 40] {
        let kdump = with(descriptor(0), &offset.to_le_bytes());
        assert!(matches!(why(&kdump, 0), Unreadable::Truncated { .. }), "{offset:#x}");
        assert!(read(&kdump, 0, 4096).0.stopped.is_some());
    }
}

#[test]
fn cut_anywhere_it_says_so_and_keeps_what_is_there() {
    let file = Builder::new(&MIXED).build();
    let full = file.len();
    for len in (0..full).step_by(97).chain([4, 463, 464, 4096, 4200, 8192, 16384, 16384 + 24, full - 1]) {
        let mut cut = file.clone();
        cut.truncate(len);
        match open(cut) {
            Err(error) => {
                assert!(len < BLOCK + 104, "{len}: {error}");
                assert!(matches!(error, Error::Truncated { .. }), "{len}: {error}");
            }
            Ok(kdump) => {
                assert!(len >= BLOCK + 104 && !kdump.complete && !kdump.problems.is_empty(), "{len}");
                for (pfn, page) in MIXED.iter().enumerate() {
                    for size in [4096, 8] {
                        let (outcome, buf) = read(&kdump, (pfn * BLOCK) as u64, size);
                        match outcome.stopped {
                            None if *page == Zero => assert!(buf.iter().all(|&b| b == 0)),
                            None => assert_eq!(buf, contents(pfn)[..size]),
                            Some(error) => match error.why {
                                Unreadable::Truncated { offset } => assert_eq!(offset, len as u64),
                                why => assert!(matches!(page, Hole | Excluded), "{len} {pfn}: {why}"),
                            },
                        }
                    }
                }
            }
        }
    }
}

/// Pages of zeros have descriptors and no place of their own: that of the last other page may be far from the table's end.
#[test]
fn the_end_of_the_pages_is_not_that_of_the_descriptors() {
    let blocks = 3 * SAMPLES as usize;
    let mut pages = vec![Zero; blocks * DESCRIPTORS_PER_BLOCK as usize];
    // In no block that is a sample.
    pages[(blocks - 40) * DESCRIPTORS_PER_BLOCK as usize + 5] = Raw;
    pages[(blocks - 41) * DESCRIPTORS_PER_BLOCK as usize] = Raw;
    let mut file = Builder::new(&pages).build();
    assert!(open(file.clone()).unwrap().complete);
    file.pop();
    let kdump = open(file).unwrap();
    let said = kdump.problems.join("; ");
    assert!(!kdump.complete && said.contains(&format!("about {} of", pages.len() - 1)), "{said}");
}

#[test]
fn incomplete_dumps_have_pages_that_were_not_written() {
    let builder = Builder { status: 1 | header::flags::INCOMPLETE, ..Builder::new(&[Raw, Raw]) };
    let mut file = builder.build();
    file[4 * BLOCK + 24..4 * BLOCK + 48].fill(0);
    let kdump = open(file).unwrap();
    assert!(!kdump.complete && kdump.problems[0].contains("incomplete"));
    assert!(matches!(why(&kdump, 1), Unreadable::Truncated { .. }));
    assert_eq!(read(&kdump, 0, 4096).1, contents(0));
}

#[test]
fn other_machines_and_nonsense_are_refused() {
    let build = |change: fn(&mut Builder)| {
        let mut builder = Builder::new(&[Raw]);
        change(&mut builder);
        builder.build()
    };
    let machine = |file| match open(file) {
        Err(Error::OtherMachine { machine, .. }) => machine,
        _ => "opened".to_string(),
    };
    assert_eq!(machine(build(|b| b.machine = "aarch64")), "aarch64");
    assert_eq!(machine(build(|b| b.machine = "i686")), "i686 (32 bits)");
    // As QEMU writes it.
    assert_eq!(machine(build(|b| b.machine = "Unknown")), "opened");
    assert_eq!(machine(build(|b| (b.machine, b.version) = ("s390x", 6u32.swap_bytes()))), "s390x");
    assert_eq!(machine(build(|b| (b.machine, b.version) = ("", 6u32.swap_bytes()))), "a big-endian machine");
    // Pages 2 to 7, or 1 to 9 by the fields of older versions, of one.
    assert!(matches!(open(build(|b| b.split = 1)), Err(Error::Invalid { offset: 4108, .. })));
    let mut odd = build(|_| ());
    odd[428] = 1;
    assert!(matches!(open(odd), Err(Error::Invalid { offset: 428, .. })));
}

#[test]
fn older_headers_have_fewer_fields() {
    for version in 0..=7 {
        let mut builder = Builder::new(&[Raw, Excluded]);
        builder.version = version;
        builder.notes =
            [&11u32.to_le_bytes()[..], &4u32.to_le_bytes(), &[0; 4], b"VMCOREINFO\0\0A=1\n"].concat();
        let kdump = open(builder.build()).unwrap();
        assert_eq!(kdump.notes.vmcoreinfo.is_some(), version >= 4, "{version}");
        assert_eq!(kdump.facts().iter().any(|(name, _)| *name == "dump level"), version >= 1);
        assert_eq!(kdump.problems.len(), usize::from(version > 6), "{:?}", kdump.problems);
        assert_eq!(read(&kdump, 0, 4096).1, contents(0));
    }
}

#[test]
fn flipped_bits_never_panic() {
    let mut builder = Builder::new(&MIXED);
    builder.notes =
        [&5u32.to_le_bytes()[..], &8u32.to_le_bytes(), &[1, 0, 0, 0], b"CORE\0\0\0\0abcdefgh"].concat();
    let file = builder.build();
    // All of the headers' fields, the bitmaps' first bytes, every descriptor, and the start of the data.
    let fields =
        (0..480).chain(4096..4240).chain(8192..8196).chain(12288..12292).chain(16384..16384 + 12 * 24 + 64);
    for at in fields {
        for bit in 0..8 {
            let mut damaged = file.clone();
            damaged[at] ^= 1 << bit;
            if let Ok(kdump) = open(damaged) {
                let mut buf = vec![0; 16 * BLOCK];
                for pfn in 0..16 {
                    let at = PhysAddr(pfn * BLOCK as u64);
                    let _ = kdump.pages().read_phys(at, &mut buf[..16]);
                    let _ = kdump.pages().read_phys(at, &mut buf);
                }
                let _ = kdump.facts();
            }
        }
    }
}
