//! Finding the kernel: by note, by scan, by page tables; what an earlier kernel left behind must lose.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use kstub::addr::{PhysAddr, VirtAddr};
use kstub::arch::x86_64::{TranslateError, VirtError};
use kstub::backend::Dump;
use kstub::kernel::discover::{DiscoverError, Found, FoundBy, discover};
use kstub::kernel::{CpuId, Machine, Options};
use std::sync::Arc;
use support::elf_core::{ElfCore, Segment};
use support::notes::{kernel_notes, qemu_notes};
use support::page_tables::{KERNEL, PageTables, Size};
use support::tiny_kernel::{Damage, InRam, TinyKernel, VMALLOC};
use support::{FlatMemory, TempFile};

/// A dump of `mem` with `notes`, and the file it lives in.
fn dump(mem: &FlatMemory, notes: Vec<u8>) -> (Dump, TempFile) {
    let file = TempFile::new(&ElfCore::of(mem).with_notes(notes).build().bytes);
    (Dump::open(file.path()).unwrap(), file)
}

fn find(mem: &FlatMemory, notes: Vec<u8>) -> Result<Found, DiscoverError> {
    let (dump, _file) = dump(mem, notes);
    discover(&dump, &|_, _| ())
}

/// Four CPUs in `kernel`, in QEMU's notes.
fn cpus_in(kernel: &TinyKernel, vmcoreinfo: Option<&str>) -> Vec<u8> {
    let cpus: Vec<_> = (0..4).map(|cpu| kernel.cpu(cpu)).collect();
    qemu_notes(&cpus, true, vmcoreinfo)
}

/// All that must be found of `kernel`; the text names the first difference.
fn compare(found: &Found, kernel: &TinyKernel) -> Result<(), String> {
    let same = |what: &str, got: String, want: String| {
        if got == want { Ok(()) } else { Err(format!("{what} is {got}, not {want}")) }
    };
    same("release", found.release.clone(), kernel.release.clone())?;
    same("slide", format!("{:#x}", found.kaslr_offset), format!("{:#x}", kernel.slide))?;
    same("phys_base", format!("{:#x}", found.phys_base), format!("{:#x}", kernel.phys_base()))?;
    same("root", found.space.root.to_string(), format!("{:#x}", kernel.swapper_phys()))?;
    same("levels", found.space.levels.to_string(), kernel.levels.to_string())?;
    same("SME mask", format!("{:#x}", found.space.sme_mask), format!("{:#x}", kernel.sme_mask))?;
    same("text", found.text.to_string(), format!("{:#x}", kernel.text()))?;
    if found.by != FoundBy::PageTables {
        same("build-id", found.build_id.clone().unwrap_or_default(), kernel.build_id_hex())?;
    }
    Ok(())
}

fn assert_found(what: &str, found: Result<Found, DiscoverError>, kernel: &TinyKernel) -> Found {
    let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
    compare(&found, kernel).unwrap_or_else(|why| panic!("{what}: {why}"));
    found
}

#[test]
fn by_the_note() {
    let sme = TinyKernel { sme_mask: 1 << 47, ..TinyKernel::default() };
    for (what, kernel) in [
        ("4 levels", TinyKernel::default()),
        ("5 levels", TinyKernel::default().five_levels()),
        ("SME", sme),
        (
            "phys_base below zero",
            TinyKernel { load_at: 16 << 20, slide: 0x3000_0000, ..TinyKernel::default() },
        ),
        ("uts name behind a kref", TinyKernel { uts_name_offset: 4, ..TinyKernel::default() }),
    ] {
        let mem = TinyKernel { in_ram: InRam::Nowhere, ..kernel.clone() }.memory();
        let info = kernel.vmcoreinfo();
        let found = assert_found(what, find(&mem, kernel_notes(&[], Some(&info))), &kernel);
        assert_eq!(found.by, FoundBy::Note);
        assert_eq!(found.problems, Vec::<String>::new(), "{what}");
    }
}

#[test]
fn a_difference_would_be_noticed() {
    let kernel = TinyKernel::default();
    let found = find(&kernel.memory(), cpus_in(&kernel, Some(&kernel.vmcoreinfo()))).unwrap();
    let mut wrong = found.clone();
    wrong.kaslr_offset += 8;
    assert!(compare(&wrong, &kernel).is_err());
    assert!(compare(&found, &TinyKernel::earlier()).is_err());
}

#[test]
fn by_scanning_ram() {
    for in_ram in [InRam::Page, InRam::Note, InRam::Both] {
        for kernel in [TinyKernel::default(), TinyKernel::default().five_levels()] {
            let kernel = TinyKernel { in_ram, ..kernel };
            let found = assert_found("scan", find(&kernel.memory(), cpus_in(&kernel, None)), &kernel);
            assert!(matches!(found.by, FoundBy::Scan(_)), "{:?}", found.by);
            // Without any CPU's cr3 there is less to check by, and no other kernel to mistake it for.
            assert_found("scan without registers", find(&kernel.memory(), Vec::new()), &kernel);
        }
    }
}

/// A kernel keeps its text more than once: threads that race each other do not decide which copy is told.
#[test]
fn the_lowest_copy_is_found_each_time() {
    const BORDER: u64 = 8 << 20;
    // The lower one is the last thing in a unit of work, the higher one the first in the next.
    let low = BORDER - 8192;
    let kernel = TinyKernel { info_at: low, in_ram: InRam::Page, ..TinyKernel::default() };
    let mut mem = kernel.memory();
    mem.write(BORDER, &mem.read(low, 4096).unwrap());
    let (dump, _file) = dump(&mem, cpus_in(&kernel, None));
    for _ in 0..50 {
        let found = assert_found("two copies", discover(&dump, &|_, _| ()), &kernel);
        assert_eq!(found.by, FoundBy::Scan(PhysAddr(low)));
    }
}

#[test]
fn an_earlier_kernel_loses() {
    let (kernel, earlier) = (TinyKernel::default(), TinyKernel::earlier());
    for swap in [false, true] {
        // Which of the two texts lies lower in RAM must not matter.
        let kernel =
            TinyKernel { info_at: if swap { earlier.info_at } else { kernel.info_at }, ..kernel.clone() };
        let earlier = TinyKernel { info_at: if swap { 4 << 20 } else { 2 << 20 }, ..earlier.clone() };
        let mem = kernel.memory_after(&earlier);
        assert_found("two texts in RAM", find(&mem, cpus_in(&kernel, None)), &kernel);
        let stale_note = cpus_in(&kernel, Some(&earlier.vmcoreinfo()));
        let found = assert_found("the note is the earlier kernel's", find(&mem, stale_note), &kernel);
        assert!(matches!(found.by, FoundBy::Scan(_)));
        assert_found("and the other way round", find(&mem, cpus_in(&earlier, None)), &earlier);
    }
}

#[test]
fn damaged_remains_are_contradicted_by_memory() {
    for damage in [Damage::Tables, Damage::Uts] {
        let (kernel, earlier) = (TinyKernel::default(), TinyKernel { damage, ..TinyKernel::earlier() });
        let mem = kernel.memory_after(&earlier);
        // No registers at all: only memory tells.
        assert_found("scan", find(&mem, Vec::new()), &kernel);
        let note = kernel_notes(&[], Some(&earlier.vmcoreinfo()));
        assert_found("stale note", find(&mem, note), &kernel);
    }
}

#[test]
fn two_intact_kernels_without_registers_are_called_undecided() {
    let mem = TinyKernel::default().memory_after(&TinyKernel::earlier());
    let found = find(&mem, Vec::new()).unwrap();
    assert!(found.problems.iter().any(|p| p.contains("which of the two")), "{:?}", found.problems);
}

#[test]
fn by_page_tables_without_any_vmcoreinfo() {
    for kernel in [TinyKernel::default(), TinyKernel::default().five_levels()] {
        let kernel = TinyKernel { in_ram: InRam::Nowhere, ..kernel };
        let found = assert_found("page tables", find(&kernel.memory(), cpus_in(&kernel, None)), &kernel);
        assert_eq!(found.by, FoundBy::PageTables);
        assert!(!found.problems.is_empty(), "the lack of VMCOREINFO must be said");
    }
}

#[test]
fn memory_without_a_kernel_says_so_with_the_cure() {
    let mut mem = FlatMemory::new();
    mem.add_varied(0, 64, &mut support::Rng::new(1));
    let error = find(&mem, Vec::new()).unwrap_err();
    assert!(matches!(error, DiscoverError::Nothing { had_cr3: false }), "{error}");
    assert!(error.to_string().contains("-device vmcoreinfo"), "{error}");
}

#[test]
fn a_wrong_phys_base_is_corrected_by_the_formats_hint_or_refused() {
    let kernel = TinyKernel::default();
    let wrong = kernel.vmcoreinfo().replace(
        &format!("NUMBER(phys_base)={}", kernel.phys_base() as i64),
        &format!("NUMBER(phys_base)={}", (kernel.phys_base() as i64) + 0x20_0000),
    );
    let mem = TinyKernel { in_ram: InRam::Nowhere, ..kernel.clone() }.memory();
    let error = find(&mem, kernel_notes(&[], Some(&wrong))).unwrap_err();
    assert!(matches!(error, DiscoverError::Contradicted(_)), "{error}");
}

#[test]
fn virtual_reads_go_through_page_tables_only() {
    let kernel = TinyKernel::default();
    let mem = kernel.memory();
    let (dump, _file) = dump(&mem, cpus_in(&kernel, Some(&kernel.vmcoreinfo())));
    let machine = Machine::open(Arc::new(dump), &Options::default(), &|_, _| ()).unwrap();
    let read = |at: u64, len: usize| {
        let mut buf = vec![0; len];
        let outcome = machine.read_virt(CpuId(1), VirtAddr(at), &mut buf);
        (buf[..outcome.filled].to_vec(), outcome.stopped)
    };
    let banner = kernel.banner();
    let (bytes, stopped) = read(kernel.banner_virt(), banner.len());
    assert_eq!((String::from_utf8_lossy(&bytes).into_owned(), stopped), (banner.clone(), None));
    assert_eq!(read(VMALLOC + 0x400, banner.len()).0, banner.as_bytes(), "a 4K mapping elsewhere");
    // QEMU writes p_vaddr = p_paddr: neither NULL nor any low address may read physical memory.
    for low in [0, 0x1000, kernel.load_at] {
        let (bytes, stopped) = read(low, 8);
        assert!(bytes.is_empty() && stopped.is_some(), "{low:#x} read {bytes:x?}");
    }
    let (_, stopped) = read(0x8000_0000_0000_0000, 8);
    assert!(
        matches!(stopped, Some(VirtError::Translate(TranslateError::NonCanonical { .. }))),
        "{stopped:?}"
    );
    let (bytes, stopped) = read(VMALLOC + 0x1000 - 4, 8);
    assert_eq!(bytes.len(), 4, "stops exactly at the end of the mapping: {stopped:?}");
    assert_eq!(machine.text_base(), Some(VirtAddr(kernel.text())));
    assert!(machine.why_phys(PhysAddr(kernel.load_at)).is_none());
}

/// Tables of their own that map the kernel's image, as those for EFI calls do, share no top-level entry with it.
#[test]
fn a_cpu_in_other_tables_of_the_same_kernel_proves_it() {
    let kernel = TinyKernel::default();
    let mut mem = kernel.memory();
    let root = 50 << 20;
    let mut tables = PageTables::new(&mut mem, root, root + 0x1000, 4);
    tables.map_range(kernel.text(), kernel.load_at, kernel.image_len(), Size::M2, KERNEL & !(1 << 63));
    let info = kernel.vmcoreinfo();
    let notes = qemu_notes(&[kernel.cpu(0).set("cr3", root)], true, Some(&info));
    assert_eq!(assert_found("EFI tables", find(&mem, notes), &kernel).by, FoundBy::Note);
    // The user's half of a pair of isolated tables: the kernel's half is the page before it.
    let pair = qemu_notes(&[kernel.cpu(0).set("cr3", kernel.swapper_phys() | 0x1000)], true, Some(&info));
    assert_eq!(assert_found("user half", find(&kernel.memory(), pair), &kernel).by, FoundBy::Note);
    // Tables that lead elsewhere prove nothing.
    let foreign = qemu_notes(&[TinyKernel::earlier().cpu(0)], true, Some(&info));
    let error = find(&kernel.memory_after(&TinyKernel::earlier()), foreign).map(|found| found.release);
    assert_eq!(error.unwrap(), TinyKernel::earlier().release);
}

#[test]
fn text_begins_before_stext_in_older_kernels() {
    let kernel = TinyKernel::default();
    let mem = TinyKernel { in_ram: InRam::Nowhere, ..kernel.clone() }.memory();
    let stext = |at: u64| format!("SYMBOL(_stext)={at:x}");
    let info = kernel.vmcoreinfo().replace(&stext(kernel.text()), &stext(kernel.text() + 0x1c8));
    assert_found("_stext behind the head of the text", find(&mem, kernel_notes(&[], Some(&info))), &kernel);
}

/// The file is 4 KiB; what it says of its memory must cost neither memory nor time.
#[test]
fn memory_that_is_only_said_to_be_there_is_not_searched() {
    for memsz in [1 << 46, 1 << 60] {
        let segment = Segment::new(0, vec![b'A'; 4096]).memsz(memsz);
        let core = ElfCore { segments: vec![segment], ..ElfCore::of(&FlatMemory::new()) };
        let file = TempFile::new(&core.build().bytes);
        let error = discover(&Dump::open(file.path()).unwrap(), &|_, _| ()).unwrap_err();
        assert!(matches!(error, DiscoverError::Nothing { .. }), "{error}");
    }
}

#[test]
fn a_memory_full_of_needles_ends() {
    let mut mem = FlatMemory::new();
    mem.write(1 << 20, &b"OSRELEASE=".repeat(800_000));
    assert!(matches!(find(&mem, Vec::new()), Err(DiscoverError::Nothing { .. })));
    // Texts that parse, each naming tables that are not there.
    let mut mem = FlatMemory::new();
    let text = TinyKernel::default().vmcoreinfo();
    for i in 0..2000 {
        mem.write((1 << 20) + i * 4096, text.as_bytes());
    }
    assert!(matches!(find(&mem, Vec::new()), Err(DiscoverError::Contradicted(_))));
}

#[test]
fn a_release_that_is_no_word_is_refused() {
    let kernel = TinyKernel::default();
    let mem = TinyKernel { in_ram: InRam::Nowhere, ..kernel.clone() }.memory();
    let info = kernel.vmcoreinfo().replace(&kernel.release, "6.1\x1b[31m");
    assert!(find(&mem, kernel_notes(&[], Some(&info))).is_err());
}
