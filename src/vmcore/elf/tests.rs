//! Small ELF cores, put together byte by byte.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::memory::{ReadOutcome, Unreadable};
use std::sync::Arc;

/// A PT_LOAD: offset, vaddr, paddr, filesz, memsz.
type Load = (u64, u64, u64, u64, u64);

fn header(class: u8, data: u8, kind: u16, machine: u16, phnum: u16) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, data, 1]);
    bytes[16..18].copy_from_slice(&kind.to_le_bytes());
    bytes[18..20].copy_from_slice(&machine.to_le_bytes());
    bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
    bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
    bytes[56..58].copy_from_slice(&phnum.to_le_bytes());
    bytes
}

fn phdr(kind: u32, (offset, vaddr, paddr, filesz, memsz): Load) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    for field in [offset, vaddr, paddr, filesz, memsz, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}

/// A core whose file is `len` bytes long; past the headers, each byte is the low byte of its offset / 16.
fn core(loads: &[Load], len: usize) -> Vec<u8> {
    let mut bytes = header(2, 1, ET_CORE, 62, loads.len() as u16);
    for load in loads {
        bytes.extend(phdr(PT_LOAD, *load));
    }
    for at in bytes.len()..len {
        bytes.push((at / 16) as u8);
    }
    bytes
}

fn open(bytes: Vec<u8>) -> Result<ElfCore, Error> {
    ElfCore::open(Source { path: "dump".into(), file: Arc::new(bytes) }, 1 << 20)
}

fn read(core: &ElfCore, at: u64, len: usize) -> (ReadOutcome, Vec<u8>) {
    let mut buf = vec![0xaa; len];
    (core.memory.read_phys(PhysAddr(at), &mut buf), buf)
}

fn why(core: &ElfCore, at: u64) -> Option<&'static str> {
    read(core, at, 1).0.stopped.map(|error| error.why.kind())
}

#[test]
fn what_a_segment_lacks_has_a_reason() {
    let core = open(core(
        &[
            (0x1000, 0, 0x10_0000, 0x1000, 0x3000),
            // The same memory again, with bytes where the first has none.
            (0x2000, 0, 0x10_1000, 0x800, 0x800),
            // Past the end of the file.
            (0x2f00, 0, 0x20_0000, 0x1000, 0x1000),
            // Not stored by QEMU; without memory; without an address; past all addresses.
            (u64::MAX, 0, 0x30_0000, 0, 0x1000),
            (0x1000, 0, 0x40_0000, 0, 0),
            (0x1000, 0, u64::MAX, 0x1000, 0x1000),
            (0x1000, 0, u64::MAX - 0xfff, 0x1000, 0x2000),
        ],
        0x3000,
    ))
    .unwrap();
    let (outcome, buf) = read(&core, 0x10_0ff0, 0x2000);
    assert_eq!((outcome.filled, buf[0], buf[16], buf[0x80f]), (0x810, 0xff, 0, 0x7f));
    assert_eq!(outcome.stopped.unwrap().at, PhysAddr(0x10_1800));
    assert_eq!(why(&core, 0x10_1800), Some("zero-or-excluded"));
    assert_eq!(why(&core, 0x10_2fff), Some("zero-or-excluded"));
    assert_eq!(why(&core, 0x10_3000), Some("not-ram"));
    assert_eq!(why(&core, 0xf_ffff), Some("not-ram"));
    assert_eq!(why(&core, 0x20_00ff), None);
    let (outcome, _) = read(&core, 0x20_0000, 0x1000);
    assert_eq!(outcome.filled, 0x100);
    assert_eq!(outcome.stopped.unwrap().why, Unreadable::Truncated { offset: 0x3000 });
    for at in [0x30_0000, 0x40_0000, u64::MAX - 8, u64::MAX] {
        assert_eq!(why(&core, at), Some("not-ram"), "{at:#x}");
    }
    let ranges: Vec<_> = core.ranges.iter().map(|r| (r.start.0, r.end.0)).collect();
    assert_eq!(ranges, [(0x10_0000, 0x10_3000), (0x20_0000, 0x20_1000)]);
    assert_eq!((core.segments, core.memory.bytes_held(), core.complete), (3, 0x1900, false));
    assert_eq!(core.problems.len(), 2, "{:?}", core.problems);
}

#[test]
fn the_kernel_image_hints_at_phys_base() {
    let text = START_KERNEL_MAP + 0x0100_0000;
    let loads = [
        (0x1000, text, 0x0300_0000, 0x100, 0x100),
        (0x1000, START_KERNEL_MAP + KERNEL_IMAGE_SIZE, 0, 0x100, 0x100),
        (0x1000, 0xffff_8880_0000_0000, 0, 0x100, 0x100),
        (0x1000, text + 0x1000, 0x0300_2000, 0x100, 0x100),
    ];
    assert_eq!(open(core(&loads, 0x2000)).unwrap().phys_base_hints, [0x0200_0000]);
}

#[test]
fn more_segments_than_16_bits_hold() {
    let load = (0x1000, 0, 0x10_0000, 0x1000, 0x1000);
    let mut bytes = core(&[load], 0x2000);
    bytes[56..58].copy_from_slice(&PN_XNUM.to_le_bytes());
    assert!(matches!(open(bytes.clone()), Err(Error::Invalid { .. })), "no section header");
    bytes[40..48].copy_from_slice(&0x800u64.to_le_bytes());
    bytes[0x82c..0x830].copy_from_slice(&1u32.to_le_bytes());
    assert_eq!(open(bytes.clone()).unwrap().segments, 1);
    bytes[0x82c..0x830].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(open(bytes.clone()), Err(Error::Invalid { .. })));
    bytes[0x82c..0x830].copy_from_slice(&100_000u32.to_le_bytes());
    assert!(matches!(open(bytes), Err(Error::Truncated { .. })));
}

#[test]
fn other_kinds_of_elf_are_refused_by_name() {
    let text = |class, data, kind: u16, machine: u16| {
        let (kind, machine) =
            if data == 2 { (kind.swap_bytes(), machine.swap_bytes()) } else { (kind, machine) };
        let bytes = [header(class, data, kind, machine, 1), phdr(PT_LOAD, (0, 0, 0, 64, 64))].concat();
        open(bytes).err().map(|error| error.to_string()).unwrap_or_default()
    };
    for (class, data, kind, machine, says) in [
        (2, 1, 2, 62, "vmlinux"),
        (2, 1, 3, 62, "--vmlinux"),
        (2, 1, 1, 62, "module"),
        (2, 1, 9, 62, "no core file"),
        (2, 1, 4, 183, "aarch64"),
        (2, 2, 4, 22, "s390x"),
        (2, 2, 4, 21, "ppc64;"),
        (2, 1, 4, 21, "ppc64le"),
        (2, 1, 4, 243, "riscv"),
        (1, 1, 4, 3, "i386"),
        (2, 1, 4, 3, "i386"),
        (1, 1, 4, 62, "x86-64 in an ELF file of another kind"),
        (1, 1, 4, 1234, "ELF machine 1234, 32 bits"),
    ] {
        let said = text(class, data, kind, machine);
        assert!(said.contains(says), "{says}: {said}");
    }
    assert_eq!(text(2, 1, 4, 62), "");
}

#[test]
fn a_process_core_and_one_without_memory_are_refused() {
    assert!(matches!(open(core(&[], 0x1000)), Err(Error::Invalid { .. })));
    let mut bytes = header(2, 1, ET_CORE, 62, 2);
    bytes.extend(phdr(PT_NOTE, (0x100, 0, 0, 20, 0)));
    bytes.extend(phdr(PT_LOAD, (0x100, 0x400000, 0, 0x10, 0x10)));
    bytes.resize(0x100, 0);
    bytes.extend([5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, b'C', b'O', b'R', b'E', 0, 0, 0, 0]);
    assert!(matches!(open(bytes), Err(Error::NotADump { .. })));
}

#[test]
fn cut_in_the_headers_is_truncated_and_later_is_incomplete() {
    let loads = [(0x1000, 0, 0, 0x1000, 0x1000), (0x2000, 0, 0x1000, 0x1000, 0x2000)];
    let bytes = core(&loads, 0x3000);
    for len in (1..0x3000).step_by(61).chain([20, 64, 175, 176, 0x1000, 0x2000, 0x2fff]) {
        match open(bytes[..len].to_vec()) {
            Err(error) => assert!(len < 176 && matches!(error, Error::Truncated { .. }), "{len}: {error}"),
            Ok(core) => {
                assert!(len >= 176 && !core.complete && core.problems.len() == 1, "{len}");
                let (outcome, buf) = read(&core, 0, 0x2000);
                assert_eq!(outcome.filled, len.saturating_sub(0x1000), "{len:#x}");
                assert_eq!(buf[..outcome.filled], bytes[len - outcome.filled..len]);
            }
        }
    }
}

#[test]
fn notes_of_several_segments_are_merged_and_cut_ones_reported() {
    let note = |desc: u8| {
        let mut bytes = [5u32, 336, 1].map(u32::to_le_bytes).concat();
        bytes.extend(b"CORE\0\0\0\0");
        bytes.extend([desc; 336]);
        bytes
    };
    let mut bytes = header(2, 1, ET_CORE, 62, 3);
    let size = note(1).len() as u64;
    bytes.extend(phdr(PT_NOTE, (0x200, 0, 0, size, 0)));
    bytes.extend(phdr(PT_LOAD, (0, 0, 0, 64, 64)));
    bytes.extend(phdr(PT_NOTE, (0x400, 0, 0, size, 0)));
    bytes.resize(0x200, 0);
    bytes.extend(note(1));
    bytes.resize(0x400, 0);
    bytes.extend(note(2));
    let core = open(bytes.clone()).unwrap();
    assert_eq!(core.notes.prstatus.iter().map(|desc| desc[0]).collect::<Vec<_>>(), [1, 2]);
    bytes.truncate(0x410);
    let core = open(bytes).unwrap();
    assert_eq!((core.notes.prstatus.len(), core.complete), (1, false));
    assert!(!core.notes.problems.is_empty());
}

#[test]
fn flipped_bits_never_panic() {
    let loads = [
        (0x1000, START_KERNEL_MAP, 0, 0x1000, 0x1000),
        (0x1000, 0, 0x800, 0x1000, 0x4000),
        (0x2000, 0, 0x9000, 0x1000, 0x1000),
    ];
    let mut bytes = core(&loads, 0x3000);
    bytes[64..68].copy_from_slice(&PT_NOTE.to_le_bytes());
    for at in 0..64 + 3 * 56 {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            if let Ok(core) = open(damaged) {
                let _ = read(&core, 0, 0x10000);
                for range in &core.ranges {
                    let _ = read(&core, range.start.0, 64);
                    let _ = read(&core, range.end.0.wrapping_sub(8), 64);
                }
            }
        }
    }
}
