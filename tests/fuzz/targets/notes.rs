//! ELF notes, against a second walk of them; and the registers in them.
#![no_main]

#[path = "../../support/elf_core.rs"]
#[allow(dead_code)]
mod elf_core;
#[path = "../../support/flat_memory.rs"]
#[allow(dead_code)]
mod flat_memory;
#[path = "../../support/put.rs"]
#[allow(dead_code)]
mod put;
#[path = "../../support/rng.rs"]
#[allow(dead_code)]
mod rng;

use flat_memory::FlatMemory;
use kstub::backend::Backend;
use kstub::vmcore::{NoteIter, Notes, PRSTATUS_SIZE, QemuCpu};
use rng::Rng;

/// As tests/support has it.
type Page = Box<[u8; 4096]>;

/// Where each note begins with its name, type and descriptor, up to one that is cut; whether one is.
fn walk(bytes: &[u8]) -> (Vec<(&[u8], u32, &[u8])>, bool) {
    let mut notes = Vec::new();
    let mut rest = bytes;
    // Zeros end the notes of a CPU and fill up what is left.
    while rest.iter().take(12).any(|&byte| byte != 0) {
        let word = |i: usize| Some(u32::from_le_bytes(rest.get(i..i + 4)?.try_into().ok()?));
        let (Some(name), Some(desc), Some(kind)) = (word(0), word(4), word(8)) else { return (notes, true) };
        let body = rest.get(12..).unwrap_or_default();
        let desc_at = (u64::from(name) + 3) & !3;
        let end = desc_at + u64::from(desc);
        if end > body.len() as u64 {
            return (notes, true);
        }
        notes.push((&body[..name as usize], kind, &body[desc_at as usize..end as usize]));
        rest = body.get((end as usize).next_multiple_of(4)..).unwrap_or_default();
        while rest.len() >= 12 && rest[..12] == [0; 12] {
            rest = &rest[12..];
        }
    }
    (notes, false)
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let found: Vec<_> = NoteIter::new(input).collect();
    let cut = found.iter().position(Result::is_err);
    assert!(cut.is_none_or(|at| at + 1 == found.len()), "notes after the one that is cut");
    let mut start = input;
    while start.len() >= 12 && start[..12] == [0; 12] {
        start = &start[12..];
    }
    let (expected, cut_expected) = walk(start);
    let found: Vec<_> = found.into_iter().filter_map(Result::ok).collect();
    assert_eq!(cut.is_some(), cut_expected);
    assert_eq!(found.len(), expected.len());
    for (note, (name, kind, desc)) in found.iter().zip(&expected) {
        assert_eq!((note.kind, note.desc), (*kind, *desc));
        assert_eq!(Some(note.name), name.split(|&byte| byte == 0).next());
    }
    let mut notes = Notes::default();
    notes.add(input, 0x1000);
    let count = |wanted: &str, kind: u32| {
        let named = found.iter().filter(|note| note.name == wanted.as_bytes() && note.kind == kind);
        named.count()
    };
    assert!(notes.prstatus.len() <= count("CORE", 1) && notes.qemu.len() <= count("QEMU", 0));
    assert!(notes.prstatus.iter().all(|desc| desc.len() >= PRSTATUS_SIZE));
    notes.qemu.iter().for_each(|desc| drop(QemuCpu::parse(desc)));

    let mut memory = FlatMemory::new();
    memory.write(0x1000, b"a page");
    let core = elf_core::ElfCore::of(&memory).with_notes(input.to_vec()).build();
    if let Some(dump) = kstub_fuzz::dump(core.bytes, &[]) {
        assert_eq!(dump.saved_cpus().len(), notes.prstatus.len().max(notes.qemu.len()));
        assert_eq!(dump.vmcoreinfo_note(), notes.vmcoreinfo.as_deref());
    }
});
